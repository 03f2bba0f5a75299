"""The benchmarks at tiny size: they run, compare equal work, and fill the table of their README."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import data_input  # noqa: E402
import data_order  # noqa: E402
import families  # noqa: E402
import measure  # noqa: E402
import negatives  # noqa: E402
import new  # noqa: E402
import xla  # noqa: E402

from contrastive_st.data import quickstart_folder  # noqa: E402
from contrastive_st.mining import MiningReport  # noqa: E402
from contrastive_st.tokens import Tokens  # noqa: E402

PAIRS = (("train/question_answer.jsonl", None), ("train/question_question.jsonl", None))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "Small batches; threads and environment of the test run stay as they are."
    for name, value in {"BATCH": 16, "PART": 8, "MAX_LENGTH": 32}.items():
        monkeypatch.setattr(data_input, name, value)
    for module in (data_input, data_order):
        monkeypatch.setattr(module, "one_thread", lambda: None)
        monkeypatch.setattr(module, "fresh", lambda function, *args: function(*args))


def test_the_datasets_have_the_published_total():
    sets = data_order.published()
    assert len(sets) == 27 and sum(d["rows"] for d in sets) == 1_097_953_922
    assert sorted({d["columns"] for d in sets}) == [2, 3] and all(d["weight"] > 0 for d in sets)
    small = data_order.scaled(sets, 1_000_000)
    assert sum(d["rows"] for d in small) == 1_000_000
    assert min(d["rows"] for d in small) >= data_order.BATCH


def test_data_order(tmp_path, capsys):
    sets = data_order.published()
    results = {
        "step_ms": data_order.step_cost(sets, (0, data_order.LAST), 2),
        "run_us_per_row": data_order.run_cost(sets, 1, 2),
        "index_us_per_row": data_order.index_cost(sets[:3], 2),
        "memory_mb": data_order.memory_cost([1_000_000, 2_000_000], 2, 1),
    }
    results["ratios"] = data_order.ratios(results)
    figures = {
        "steps": data_order.steps_figure(results["step_ms"]),
        "memory": data_order.memory_figure(results["memory_mb"], 10**9),
    }
    measure.save(results, figures, "order", tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == results["ratios"].keys()
    expected = {"order.json", "order_steps.png", "order_memory.png"}
    assert {p.name for p in tmp_path.iterdir()} == expected


def test_data_input(tmp_path, tiny_tokenizer):
    files, work = {"short": PAIRS}, tmp_path / "work"
    data_input.prepare_stores(files, quickstart_folder(), work, Tokens(tiny_tokenizer, 32))
    seconds = {
        kind: data_input.feed_seconds(pairs, work, tiny_tokenizer, 1, 2, 1)
        for kind, pairs in files.items()
    }
    assert seconds["short"].keys() == data_input.WAYS.keys()
    assert all(len(s) == 2 for s in seconds["short"].values())
    expected = {"rows", "texts", "identities", "tokens"}
    assert data_input.parts_of_ours(PAIRS, work, tiny_tokenizer, 1, 2).keys() >= expected
    assert min(data_input.bytes_per_row(PAIRS, work, quickstart_folder()).values()) > 0
    found = data_input.ratios(
        seconds,
        {"isal_orjson_lines_per_second": 2, "gzip_json_lines_per_second": 1},
        {n: {"rows": n, "anonymous": 0} for n in (1, 2)},
    )
    assert found["short"]["on_the_fly_over_seeds"] > 0
    assert found["parsing"] == found["rows_of_stores"] == 2
    data_input.figure(
        {
            "short": {way: 1.0 for way in data_input.WAYS},
            "mixed": {way: 2.0 for way in data_input.WAYS},
        }
    )


def test_unequal_work_is_noticed(tmp_path, tiny_tokenizer, monkeypatch):
    work = tmp_path / "work"
    data_input.prepare_stores(
        {"short": PAIRS}, quickstart_folder(), work, Tokens(tiny_tokenizer, 32)
    )
    mixtures = {kind: data_input.mixture_of(PAIRS, work / kind) for kind in ("texts", "tokens")}
    stems = data_input.replay(mixtures["texts"], 2, tmp_path / "replay")
    monkeypatch.setattr(data_input, "MAX_LENGTH", 8)  # the seeds' way cuts earlier now
    with pytest.raises(AssertionError, match="same work"):
        data_input.check_same(mixtures, Tokens(tiny_tokenizer, 32), stems)


def test_parsing_and_big_stores(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.writelines(json.dumps([f"question {i}", f"answer {i}"]) + "\n" for i in range(50))
    assert min(data_input.parsing(tmp_path / "a.jsonl.gz", 2).values()) > 0
    store = data_input.big_store(tmp_path / "big.store", 3, rows=40)
    assert len(store) == 120 and store.rows([0, 40])[0] == store.rows([0, 40])[1]
    found = data_input.memory_of(store.folder, 2) | data_input.cold_read(store.folder)
    assert found["rows"] == 120
    expected = {"anonymous", "anonymous_growth", "file_growth", "milliseconds", "mb_read"}
    assert found.keys() >= expected


def test_no_data_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_ST_DATA", str(tmp_path))
    for find in (data_input.data_folder, xla.data_file):
        with pytest.raises(SystemExit, match="set CONTRASTIVE_ST_DATA"):
            find()


def test_the_peers_on_xla_get_the_rows_of_our_batches():
    file, steps = quickstart_folder() / "train/question_answer.jsonl", 2
    mixture = xla.make_mixture(file, steps)
    rows = xla.in_order(mixture, steps)
    assert [(r["anchor"], r["positive"]) for r in rows] == [
        example for s in range(steps) for example in mixture.batch(s).examples
    ]
    assert len(rows) == steps * xla.BATCH
    assert xla.shapes(file, steps) == {"buckets": 1, "longest": 2}
    with pytest.raises(AssertionError, match="same work"):
        xla.check_same({"ours": {"first_loss": 4.0}, "transformers": {"first_loss": 4.1}})


def test_near_duplicates_are_one_group():
    pairs = [("a", "b"), ("x", "y"), ("c", "b"), ("c", "a")]
    assert [set(group) for group in negatives.grouped(pairs)] == [{"a", "b", "c"}, {"x", "y"}]
    exam = negatives.as_near_exam([["a", "b", "c"], ["x", "y"]])
    assert exam.queries == {"query-0": "a", "query-1": "x"}
    assert {q: {exam.corpus[d] for d in docs} for q, docs in exam.qrels.items()} == {
        "query-0": {"b", "c"},
        "query-1": {"y"},
    }


def test_false_negatives_are_counted():
    rows = [("a", "b", "c"), ("x", "y", "a"), ("x", "y", "z")]
    group = {"a": 0, "b": 0, "c": 0, "x": 1, "y": 1, "z": 1}
    counts = {"negatives": 3, "short": 0, "suspected": 1, "filled": 0}
    scores = np.array([0.5, 0.5, 0.5]), np.array([0.6, 0.1, 0.4])  # positives, negatives
    report = MiningReport({}, counts, *scores, [])
    counted = negatives.counted(rows, report, group)
    assert (counted["false"], counted["left_by_guide"]) == (2, 2)
    assert counted["share"] == pytest.approx(2 / 3) and counted["share_left"] == 0.5


def test_an_interval_over_seeds():
    figure = negatives.over_seeds([1.0, 2.0, 3.0, 4.0])
    assert figure["mean"] == 2.5
    assert figure["high"] - figure["mean"] == pytest.approx(3.182 * 1.291 / 2, abs=1e-3)
    assert negatives.over_seeds([1.0]) == {"mean": 1.0}


def test_an_interval_over_queries_belongs_to_the_mean_over_sets():
    rng, gold = np.random.default_rng(0), np.arange(50)

    def run(gain):
        "Two sets of different size, the larger one worse by the gain."
        sizes = {"large": 400, "small": 40}
        near = {name: rng.random(n) - gain * (name == "large") for name, n in sizes.items()}
        near = {name: values.tolist() for name, values in near.items()}
        cosines = gold + 30 * rng.random(50)
        spearman = spearmanr(cosines, gold).statistic
        return {"spearman": spearman, "search": near, "near": near, "cosines": cosines}

    first, second = [run(0), run(0)], [run(0.3), run(0.3)]
    draws = negatives.draws_of(first, gold), negatives.draws_of(second, gold)
    found = negatives.difference(first, second, draws)
    again = negatives.draws_of(first, gold), negatives.draws_of(second, gold)
    assert found == negatives.difference(first, second, again)
    for name in ("sts", "search", "near", "large", "small"):
        drawn, mean = found[name]["drawn"], found[name]["seeds"]["mean"]
        assert drawn["mean"] == pytest.approx(mean)
        assert drawn["low"] < mean < drawn["high"]
    # A mean over all queries would be near -0.27.
    assert found["near"]["drawn"]["mean"] == pytest.approx(-0.15, abs=0.06)


def test_the_record_of_the_negatives_has_each_mean_within_its_intervals():
    record = json.loads((ROOT / "benchmarks/results/negatives.json").read_text())
    for name, exams in record["differences"].items():
        for exam, figures in exams.items():
            mean = figures["seeds"]["mean"]
            # Cosines are kept with four digits, so a correlation may differ in the fifth.
            close = pytest.approx(mean, rel=1e-3, abs=2e-5)
            assert figures["drawn"]["mean"] == close, f"{name}, {exam}"
            for ends in figures.values():
                assert ends["low"] - 1e-9 <= ends["mean"] <= ends["high"] + 1e-9, f"{name}, {exam}"


def test_a_record_that_is_not_there_has_no_rows(tmp_path):
    (tmp_path / "tiled.json").write_text(
        (ROOT / "benchmarks/results/tiled.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    table = measure.table(tmp_path)
    assert "tiled loss" in table and "mining" not in table


def test_the_table_of_the_readme_is_fresh(tmp_path):
    readme, copy = ROOT / "benchmarks" / "README.md", tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    measure.write_table(copy, ROOT / "benchmarks" / "results")
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8"), (
        "run python benchmarks/measure.py"
    )


def test_new(tmp_path):
    result = new.make(str(tmp_path), 500)
    assert result["rows"] == {"train": 450, "heldout": 50}
    size = (tmp_path / "500.csv").stat().st_size
    assert result["file_mb"] == size / 1e6 and 0 < result["seconds"]
    # In MB: what the command needs for a small file is what it imports, of which torch is no part.
    assert 0 <= result["peak_mb"] < 500
    texts = (tmp_path / "500.csv").read_text().splitlines()
    answers = [line.split(",")[1] for line in texts[1:]]
    assert len(set(answers)) == 450 and answers[8] == answers[9]


def test_the_table_of_the_families_is_fresh(tmp_path):
    page, copy = ROOT / "docs" / "families.md", tmp_path / "families.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/families.json").read_text())
    families.write_table(copy, results)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "run python benchmarks/families.py --table"
    )


def test_the_script_for_a_gpu_is_shell():
    assert subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu.sh"]).returncode == 0
