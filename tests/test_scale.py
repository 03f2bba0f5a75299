"""docs/scale.md is written by tools/scale.py: its figures follow from recipes and records."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import scale  # noqa: E402

from contrastive_st import recipes  # noqa: E402


def test_the_page_is_fresh():
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(), "run python tools/scale.py"


def test_twice_the_chips_halve_the_matrix_products_and_nothing_else():
    recipe = recipes.load(ROOT / f"recipes/{scale.SEEDS[1]}.toml")
    report = {"pools": [{"columns": 2, "batches": 10}], "batch_size": 1024}
    chip = scale.GPUS["H100"]
    one, two = (scale.estimate(recipe, report, scale.Machine(n, chip, n, 1)) for n in (8, 16))
    assert two["matmul"] == pytest.approx(one["matmul"] / 2)
    assert two["optimizer"] == one["optimizer"] and two["all_reduce"] > one["all_reduce"]


def test_hosts_that_read_other_rows_than_one_are_noticed(monkeypatch):
    rows = recipes.plan(recipes.load(ROOT / f"recipes/{scale.SEEDS[0]}.toml")).rows

    class Shifted:
        "A mixture whose slices begin one step late."

        def rows(self, step, rank=0, ranks=1):
            return rows(step + (ranks > 1), rank, ranks)

    monkeypatch.setattr(scale.recipes, "plan", lambda recipe: Shifted())
    with pytest.raises(ValueError, match="step 0: the rows of 64 hosts are not those of one"):
        scale.simulate(scale.SEEDS[0])
