"""The settings of a run: a wrong one is answered in a sentence, before torch is imported."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import contrastive_st
from contrastive_st import run
from contrastive_st.config import OTHER_NAMES, TrainConfig, nearest_setting, of_length
from contrastive_st.recipes import DataPlan, ModelPlan


def test_settings_are_checked_without_torch(tmp_path):
    "As the command line meets them: load the recipe, refuse the key, leave with status 2."
    recipe = 'title = "t"\n[model]\nname = "m"\n[data]\nmix = []\n[train]\nleraning_rate = 1e-3\n'
    (tmp_path / "bad.toml").write_text(recipe, encoding="utf-8")
    program = (
        "import sys; from contrastive_st import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "train", "bad.toml", "--out", "never"]
    options = {
        "capture_output": True,
        "text": True,
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
    }
    done = subprocess.run(command, **options)
    assert "train: unknown key 'leraning_rate'; did you mean 'lr'?" in " ".join(done.stderr.split())
    assert (done.returncode, done.stdout.strip()) == (2, "False")


def test_its_names_of_old_still_work():
    assert run.TrainConfig is contrastive_st.TrainConfig is TrainConfig
    assert run.of_length is of_length


@pytest.mark.parametrize(
    "key, name",
    [
        ("leraning_rate", "lr"),
        ("learning_rate", "lr"),
        ("warm_up", "warmup"),
        ("num_train_epochs", "epochs"),
        ("temperature", "scale = 1 / temperature"),
        ("batch_size", "[data] batch_size"),
        ("per_device_train_batch_size", "[data] batch_size"),
        ("warmup_ratio", "warmup = warmup_ratio * steps"),
        ("metric_for_best_model", "metric"),
        ("fp16", "bf16"),
        ("colour", ""),
        ("", ""),
        ("x" * 10**6, ""),
    ],
)
def test_a_wrong_key_leads_to_the_right_one(key, name):
    assert nearest_setting(key) == name
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{key: 1})
    message = str(caught.value)
    assert message.startswith("TrainConfig: there is no setting") and len(message) < 250
    assert message.endswith(f"; did you mean {name}?") == bool(name)


def test_each_name_of_others_leads_to_a_setting():
    "The table of other names cannot outlive a setting that goes away."
    ours = TrainConfig.__dataclass_fields__.keys()
    tables = {"[data]": DataPlan, "[model]": ModelPlan}
    for name in OTHER_NAMES.values():
        first, *rest = name.split()
        assert rest[0] in tables[first].__dataclass_fields__ if first in tables else first in ours
    assert not OTHER_NAMES.keys() & ours


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 1e308}, {"weight_decay": 1e6}, {"lr": 2e-5, "weight_decay": 5e4}],
)
def test_a_weight_decay_that_takes_off_whole_weights(options):
    with pytest.raises(ValueError, match="weight_decay") as caught:
        TrainConfig(**options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert TrainConfig(lr=1e-3, weight_decay=900.0).weight_decay == 900
