"""A run's records, checkpoints and ends: what is kept, what is refused, what a signal leaves."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from test_trainer import (
    At,
    Crash,
    Scores,
    checkpoints,
    config,
    crash,
    losses,
    make_encoder,
    make_mixture,
    read,
    snapshot,
    torchrun,
    weights,
)

from contrastive_st import trainer
from contrastive_st.atomic import MANIFEST, Damaged, read_json
from contrastive_st.run import (
    Stopped,
    TrainConfig,
    claim,
    find_checkpoint,
    load_training,
    plain_metrics,
    run_state,
    write_checkpoint,
)
from contrastive_st.trainer import train


def dropout_run(out, c=None, **options):
    "Train the tiny encoder with dropout; return its weights, also when an exception ended the run."
    encoder = make_encoder(dropout=0.1)
    train(encoder, make_mixture(), c or config(6, save_every=2), out, progress=False, **options)
    return weights(encoder)


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def send(number, steps=(3,)):
    "A callback that sends this process a signal when that many steps are done."

    class Send(At):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in steps:
                os.kill(os.getpid(), number)

    return Send(None, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The weights of the uninterrupted run of 6 steps."
    return dropout_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A run that ended at step 5 without a word, with checkpoints of steps 2 and 4."
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Crash):
        dropout_run(out, callbacks=[At(5, crash)])
    assert checkpoints(out) == [2, 4]
    return out


@pytest.fixture
def broken(killed, tmp_path):
    "A copy of the killed run, to damage."
    return shutil.copytree(killed, tmp_path / "broken")


# ---- which checkpoint ----


def test_the_newest_whole_checkpoint_is_taken_and_said(broken, whole, capsys):
    assert same(dropout_run(broken, resume=True), whole)
    assert "resuming from checkpoint-4, the newest one" in capsys.readouterr().err


def test_a_checkpoint_without_manifest_was_never_finished(broken, whole, capsys):
    (broken / "checkpoints/checkpoint-4" / MANIFEST).unlink()
    assert same(dropout_run(broken, resume=True), whole)
    assert (
        "resuming from checkpoint-2, the newest whole one, since 1 later was never finished"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "training.pt",
        "trainer_state.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bit"])
def test_a_damaged_checkpoint_is_refused_by_name(broken, name, damage):
    path = broken / "checkpoints/checkpoint-4" / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage != "missing":
        data = data[: len(data) // 2 if damage == "cut" else 0]
    path.unlink() if damage == "missing" else path.write_bytes(data)
    before = snapshot(broken)
    with pytest.raises(Damaged, match=f"{path}.*or delete .*checkpoint-4 to go on from step 2"):
        dropout_run(broken, resume=True)
    assert snapshot(broken) == before
    shutil.rmtree(broken / "checkpoints/checkpoint-4")  # as the sentence says
    find_checkpoint(broken)


def test_a_manifest_that_is_damaged_is_refused(broken):
    (broken / "checkpoints/checkpoint-4" / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="manifest.json"):
        dropout_run(broken, resume=True)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(broken):
    (broken / "checkpoints/checkpoint-4").rename(broken / "checkpoints/checkpoint-5")
    with pytest.raises(ValueError, match="training.pt: is of step 4, but its folder says 5"):
        dropout_run(broken, resume=True)


def test_the_order_of_checkpoints_is_that_of_their_steps(tmp_path):
    "A clock that was set back makes new checkpoints the oldest."

    def write(folder):
        (folder / "training.pt").write_bytes(b"x")

    for n, step in enumerate((8, 9, 10, 11)):
        folder = write_checkpoint(tmp_path, step, 0, write)
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 - n * 1e6, 1e9 - n * 1e6))
    assert checkpoints(tmp_path) == [10, 11]
    assert find_checkpoint(tmp_path)[0].name == "checkpoint-11"


def test_what_a_killed_writer_left_is_cleared_away(broken, whole):
    for name in (
        "checkpoints/.checkpoint-6.partial",
        ".model.partial",
        "checkpoints/.checkpoint-2.old",
    ):
        (broken / name).mkdir()
        (broken / name / "half").write_text("x")
    (broken / ".metrics.json.partial").write_text("{")
    assert same(dropout_run(broken, resume=True), whole)
    assert not [path for path in broken.rglob(".*")]


def test_a_moved_run_uses_nothing_of_the_old_place(tmp_path, monkeypatch):
    c, scores = config(6, eval_every=2, metric="score"), Scores(0.1, 0.9, 0.2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Crash):
        train(
            make_encoder(),
            make_mixture(),
            c,
            "here",
            scores,
            callbacks=[At(5, crash)],
            progress=False,
        )
    shutil.copytree("here", "there")
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "here").rglob("checkpoint-2"):  # another run at the old path
        make_encoder(dropout=0.5).save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    encoder = make_encoder()
    metrics = train(
        encoder, make_mixture(), c, tmp_path / "there", Scores(0.3), resume=True, progress=False
    )
    assert metrics["best_step"] == 2 and same(scores.seen[1], weights(encoder))
    assert (
        str(tmp_path)
        not in (tmp_path / "there/checkpoints/checkpoint-6/trainer_state.json").read_text()
    )


# ---- states of a run ----


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys, monkeypatch):
    after = dropout_run(tmp_path / "run")
    before, listing = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    encoder = make_encoder()
    metrics = train(
        encoder,
        make_mixture(),
        config(6, save_every=2),
        tmp_path / "run",
        resume=True,
        progress=False,
    )
    assert metrics == read(tmp_path / "run", "metrics") and metrics["ended_by"] == "steps"
    assert same(after, weights(encoder))
    assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == (before, listing)
    assert "is finished (6 steps); nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError, match="already holds a finished run"):
        dropout_run(tmp_path / "run")


@pytest.mark.parametrize("there", [1, 2, 3, 4])
def test_a_run_killed_between_its_first_records_starts_over(tmp_path, whole, there):
    dropout_run(tmp_path / "run")
    for name in ("metrics.json", "data_config.json", "config.json", "history.json")[: 4 - there]:
        (tmp_path / "run" / name).unlink(missing_ok=True)
    if there == 4:
        (tmp_path / "run/metrics.json").write_text(
            json.dumps({"before": {}, "test": {"before": {}}})
        )
        shutil.rmtree(tmp_path / "run/checkpoints")
    assert run_state(tmp_path / "run") in ("begun", "finished")
    assert same(dropout_run(tmp_path / "run", resume=True), whole)
    assert run_state(tmp_path / "run") == "finished"


def test_a_record_that_is_damaged_is_named(broken):
    for text in ("", "[]", "{", "[" * 100_000, '{"before": 1'):
        (broken / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match="metrics.json: "):
            dropout_run(broken, resume=True)


def test_a_file_or_a_model_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; choose another name"):
        dropout_run(tmp_path / "file")
    make_encoder().save_pretrained(tmp_path / "model")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match="not a run's, perhaps a model"):
            claim(tmp_path / "model", **flags)


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_living_run_is_left_alone(tmp_path, flags):
    "A second start, resume or overwrite is told which process trains here."
    complaints = []

    def second(encoder):
        with pytest.raises(ValueError) as caught:
            dropout_run(tmp_path / "run", **flags)
        complaints.append(str(caught.value))
        return {}

    after = dropout_run(tmp_path / "run", evaluate=second)
    assert len(complaints) == 2 and all(f"process {os.getpid()} on" in text for text in complaints)
    assert same(after, dropout_run(tmp_path / "alone"))


# ---- signals ----


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, whole, number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped at step 3 of 6; saved in") as caught:
        dropout_run(tmp_path, callbacks=[send(number)])
    assert caught.value.code == code and checkpoints(tmp_path) == [2, 3]
    assert signal.getsignal(number) == before
    assert same(dropout_run(tmp_path, resume=True), whole)
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_second_signal_ends_at_once(tmp_path):
    class Twice(At):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        dropout_run(tmp_path, callbacks=[Twice(None, None)])
    assert checkpoints(tmp_path) == [2]


class Interrupted(Scores):
    "An evaluation in which a signal arrives at its n-th call."

    def __init__(self, *values, call):
        super().__init__(*values)
        self.call = call

    def __call__(self, encoder):
        if len(self.seen) + 1 == self.call:
            self.call = None
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(encoder)


@pytest.mark.parametrize("call, step", [(1, 0), (2, 2), (3, 4), (4, 6), (5, 6)])
@pytest.mark.parametrize("patience", [0, 1])
def test_a_signal_during_an_evaluation_loses_neither_steps_nor_the_evaluation(
    tmp_path, call, step, patience
):
    c = config(6, eval_every=2, metric="score", patience=patience)
    values = (0.1, 0.5, 0.9, 0.8, 0.9)
    straight = dropout_run(tmp_path / "straight", c, evaluate=Scores(*values))
    with pytest.raises(Stopped):
        dropout_run(tmp_path / "run", c, evaluate=Interrupted(*values, call=call))
    assert (checkpoints(tmp_path / "run") or [0])[-1] == step
    after = dropout_run(tmp_path / "run", c, evaluate=Scores(*values[call - 1 :]), resume=True)
    assert same(after, straight)
    evaluations = [
        [line for line in read(tmp_path / name, "history") if "eval_score" in line]
        for name in ("straight", "run")
    ]
    assert [(e["step"], e["eval_score"]) for e in evaluations[0]] == [
        (e["step"], e["eval_score"]) for e in evaluations[1]
    ]
    assert read(tmp_path / "run", "metrics")["best_step"] == 4


def test_a_signal_in_the_last_measurement_saves_the_last_step(tmp_path, whole):
    c = config(6)
    with pytest.raises(Stopped, match="stopped at step 6 of 6"):
        dropout_run(tmp_path, c, evaluate=Interrupted(0.1, 0.2, call=2))
    assert checkpoints(tmp_path) == [6]
    assert same(dropout_run(tmp_path, c, evaluate=Scores(0.2), resume=True), whole)
    assert read(tmp_path, "metrics")["after"] == {"score": 0.2}


# ---- a run is a function of recipe and step ----


def test_an_evaluation_that_draws_random_numbers_changes_nothing(tmp_path, whole):
    def drawing(encoder):
        torch.rand(100), np.random.rand(3), torch.manual_seed(5)
        return {}

    assert same(dropout_run(tmp_path, config(6, eval_every=1), evaluate=drawing), whole)


def test_when_a_checkpoint_is_written_changes_nothing(tmp_path, whole, monkeypatch):
    "Checkpoints come by the clock, too: here after every step."
    assert same(dropout_run(tmp_path / "none", config(6)), whole)
    assert not checkpoints(tmp_path / "none")
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)
    assert same(dropout_run(tmp_path / "all", config(6)), whole)
    assert checkpoints(tmp_path / "all") == [5, 6]


# ---- metrics ----


def test_a_metric_that_is_no_number_warns_and_never_selects(tmp_path):
    scores, nan = Scores(0.1, float("nan"), 0.5, float("nan"), 0.5), float("nan")
    with pytest.warns(UserWarning, match="at step 2 gives no number for score: NaN or infinite"):
        metrics = train(
            make_encoder(),
            make_mixture(),
            config(6, eval_every=2, metric="score"),
            tmp_path / "some",
            scores,
            progress=False,
        )
    assert metrics["best_step"] == 4
    with pytest.warns(
        UserWarning, match="no evaluation gave a number for score, so the last model is kept"
    ):
        metrics = train(
            make_encoder(),
            make_mixture(),
            config(6, eval_every=2, metric="score", patience=2),
            tmp_path / "all",
            Scores(nan),
            progress=False,
        )
    assert (metrics["steps"], metrics["best_step"], metrics["ended_by"]) == (4, None, "patience")
    assert read(tmp_path / "all", "metrics")["after"] == {"score": None}


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    given = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), 4: True}
    metrics = train(
        make_encoder(), make_mixture(), config(2), tmp_path, lambda e: given, progress=False
    )
    assert (
        metrics["after"]
        == {"a": 0.5, "b": 0.25, "c": 3.0, "4": 1.0}
        == read(tmp_path, "metrics")["before"]
    )
    for bad in ({"a": "x"}, {"a": None}, {"a": [1, 2]}, {"a": torch.ones(2)}, [1], None):
        with pytest.raises(ValueError, match="the evaluation"):
            plain_metrics(bad)


# ---- the configuration ----


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip", "scale"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


def test_a_full_width_that_is_not_trained_is_said(tmp_path):
    with pytest.warns(UserWarning, match="the full width of 32 is not trained itself; add 32"):
        train(
            make_encoder(), make_mixture(), config(1, widths=(8,)), tmp_path / "a", progress=False
        )


@pytest.mark.parametrize("data", [[("a", "b")], {"anchor": ["a"]}, "file.jsonl", None])
def test_data_that_is_no_mixture_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="train takes a Mixture"):
        train(make_encoder(), data, config(1), tmp_path / "run", progress=False)


def test_a_device_of_torch_tpu_is_refused(tmp_path, monkeypatch):
    encoder, mixture = make_encoder(), make_mixture()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: type("Device", (), {"type": "tpu"})
    )
    with pytest.raises(ValueError, match="torch_tpu"):
        train(encoder, mixture, config(1), tmp_path / "run", progress=False)


def test_training_files_hold_no_code(broken):
    "training.pt is read with weights_only; a pickle that would run code is refused by file name."
    path = broken / "checkpoints/checkpoint-4/training.pt"

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(broken / "ran"),)

    torch.save({"step": 4, "optimizer": Evil()}, path)
    with pytest.raises(ValueError, match="training.pt: cannot be read"):
        load_training(path.parent, {"step"})
    assert not (broken / "ran").exists()


# ---- several processes ----

SCRIPT = """
import json, os, signal, sys, time
sys.path[:0] = {paths!r}
from test_run import *
torch.set_num_threads(1)
rank, calls = int(os.environ["RANK"]), []
def evaluate(encoder):
    calls.append(1)
    return {{"score": float(len(calls))}}
callbacks = [send(signal.SIGTERM)] if {stop} and rank == {stop} - 1 else []
try:
    options = dict(evaluate=evaluate, callbacks=callbacks, resume={resume})
    after = dropout_run({out!r}, config(6, eval_every=2), **options)
except Stopped as error:
    after = str(error)
torch.save([after, len(calls)], {notes!r} + str(rank))
"""


@pytest.mark.parametrize("stop", [1, 2])
def test_of_two_processes_the_first_measures_and_a_signal_to_either_saves_both(tmp_path, stop):
    from pathlib import Path

    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

    def start(name, **options):
        notes = str(tmp_path / f"notes-{name}-")
        out = str(tmp_path / options.pop("out", name))
        done = torchrun(
            tmp_path,
            SCRIPT.format(
                paths=paths, out=out, notes=notes, **{"stop": 0, "resume": False} | options
            ),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(notes + str(rank), weights_only=True) for rank in (0, 1)]

    straight = start("straight")
    assert [calls for _, calls in straight] == [5, 0]  # before, three times during, after
    stopped = start("stopped", stop=stop)
    assert all("stopped at step 3 of 6" in said for said, _ in stopped)
    resumed = start("resumed", out="stopped", resume=True)
    assert [calls for _, calls in resumed] == [3, 0]
    # two uninterrupted runs differ by as much: gloo adds in any order
    after, expected = (resumed[0][0], straight[0][0])
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in after.items())
    assert same(after, resumed[1][0])
    assert read_json(tmp_path / "stopped/metrics.json")["steps"] == 6
