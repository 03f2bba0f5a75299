"""A run's records, checkpoints and ends: what is kept, what is refused, what a signal leaves."""

import json
import math
import os
import shutil
import signal
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer, sentences
from test_trainer import (
    At,
    Crash,
    Scores,
    checkpoints,
    config,
    counted,
    crash,
    losses,
    make_encoder,
    make_mixture,
    make_source,
    read,
    snapshot,
    stop,
    torchrun,
    train_tiny,
    weights,
)

from contrastive_st import recipes, trainer
from contrastive_st.atomic import MANIFEST, Damaged, read_json
from contrastive_st.data import Source, load_source
from contrastive_st.guard import guide_mask
from contrastive_st.index import build_index
from contrastive_st.loss import info_nce, same_text
from contrastive_st.losses import cosent, distill_kl, gte, margin_mse, siglip
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import (
    Lines,
    Stopped,
    TrainConfig,
    batch_loss,
    check_health,
    claim,
    find_checkpoint,
    format_seconds,
    learned_scale,
    load_training,
    log_line,
    lr_factor,
    mean_cosine,
    of_length,
    plain_metrics,
    progress_style,
    run_report,
    run_state,
    train_step,
    write_checkpoint,
)
from contrastive_st.tokens import Tokens
from contrastive_st.trainer import train


def dropout_run(out, c=None, **options):
    "Train the tiny encoder with dropout; return its weights, also when an exception ended the run."
    return weights(train_tiny(out, c or config(6, save_every=2), dropout=0.1, **options))


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
    with pytest.raises(Damaged, match="checkpoint-5: is of step 4, but its name says 5"):
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
        train_tiny("here", c, evaluate=scores, callbacks=[At(5, crash)])
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


def test_resuming_twice_and_resuming_a_finished_run(tmp_path, whole):
    dropout_run(tmp_path, callbacks=[At(2, stop)])
    dropout_run(tmp_path, callbacks=[At(4, stop)], resume=True)
    for _ in range(2):  # the second time there is nothing left to do
        assert same(dropout_run(tmp_path, resume=True), whole)
    assert read(tmp_path, "metrics")["steps"] == 6


def test_claim_only_checks_when_told_so(tmp_path):
    claim(tmp_path / "new", make=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises((ValueError, OSError)):
        claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    assert claim(tmp_path / "full") == tmp_path / "full"  # other files are no run


def test_overwrite_leaves_a_model_directory_alone(tmp_path):
    "A model directory has a config.json too, but it is no run."
    make_encoder().save_pretrained(tmp_path / "precious")
    before = snapshot(tmp_path / "precious")
    try:
        claim(tmp_path / "precious", overwrite=True)
    except ValueError:
        pass
    assert snapshot(tmp_path / "precious") == before


def test_overwrite_and_links(tmp_path):
    "A link in the run directory is removed, never what it leads to."
    train_tiny(tmp_path / "run", config(2))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept.txt").write_text("mine")
    link = tmp_path / "run" / "checkpoints"
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(tmp_path / "disk", target_is_directory=True)
    claim(tmp_path / "run", overwrite=True)
    assert (tmp_path / "disk" / "kept.txt").read_text() == "mine" and not link.is_symlink()


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys, monkeypatch):
    after = dropout_run(tmp_path / "run")
    before, listing = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    encoder = make_encoder(dropout=0.1)
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
    for name in ("checkpoints", "model"):
        shutil.rmtree(tmp_path / "run" / name)
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


@pytest.mark.parametrize(
    "numbers, code",
    [
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGINT, signal.SIGTERM), 143),
    ],
)
@pytest.mark.parametrize(
    "step, said", [(3, "of step 2, resume goes on from there"), (1, "no checkpoint yet")]
)
def test_a_second_signal_ends_at_once_and_says_from_where_to_go_on(
    tmp_path, whole, numbers, code, step, said
):
    class Twice(At):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=f"stopped at once; .*{said}") as caught:
        dropout_run(tmp_path, callbacks=[Twice(None, None)])
    assert caught.value.code == code
    assert checkpoints(tmp_path) == ([2] if step == 3 else [])
    assert same(dropout_run(tmp_path, resume=True), whole)


def test_an_interrupt_before_anything_was_recorded_is_only_an_interrupt(tmp_path):
    def interrupted(encoder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dropout_run(tmp_path / "run", evaluate=interrupted)


class Interrupted(Scores):
    "An evaluation in which a signal arrives at its n-th call."

    def __init__(self, *values, call):
        super().__init__(*values)
        self.call = call

    def __call__(self, encoder):
        if len(self.seen) + 1 == self.call:
            self.call = None
            signal.raise_signal(signal.SIGTERM)  # to this thread, so it is there at once
        return super().__call__(encoder)


@pytest.mark.parametrize("call, step", [(1, 0), (2, 2), (3, 4), (4, 6)])
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


def test_a_signal_ends_an_evaluation_whose_code_forgets_it(tmp_path):
    def forgetful(encoder):
        with suppress(KeyboardInterrupt):  # as Python does by itself in a __del__
            signal.raise_signal(signal.SIGTERM)
        return {"score": 0.1}

    with pytest.raises(Stopped, match="stopped before the first step"):
        dropout_run(tmp_path, config(6), evaluate=forgetful)
    assert not checkpoints(tmp_path)


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
    wrong = ({"a": "x"}, {"a": None}, {"a": [1, 2]}, {"a": torch.ones(2)}, [1], None)
    for bad in (*wrong, {"a": 10**400}, {"a": 10**5000}, {"x" * 10**6: "x"}):
        with pytest.raises(ValueError, match="the evaluation") as caught:
            plain_metrics(bad)
        assert len(str(caught.value)) < 300


# ---- the configuration, the schedule and the log ----


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1e-5}, "lr"),
        ({"lr": "1e-4"}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"clip": 0.0}, "clip"),
        ({"scale": -20.0}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 4}, "warmup is 4 steps but the run has 4"),
        ({"metric": "spearman"}, "eval_every"),
        ({"patience": 2}, "metric"),
        ({"eval_every": -1}, "eval_every"),
        ({"log_every": 0}, "log_every"),
        ({"similarity": "cosine"}, "similarity"),
        ({"widths": (0, 8)}, "widths"),
        ({"widths": (-8,)}, "widths"),
        ({"seed": -1}, "seed"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"matmul": "mkl"}, "matmul"),
        ({"fused": 1}, "fused"),
        ({"step": 5}, "step"),
        ({"eval_every": 2, "save_every": 3, "metric": "m"}, "save_every is 3"),
        ({"symmetric": "no"}, "symmetric"),
    ],
)
def test_wrong_configurations_are_refused_by_name(changes, named):
    with pytest.raises((ValueError, TypeError), match=named) as caught:
        config(**changes)
    assert isinstance(caught.value, ValueError)


def test_schedule_values():
    factors = [lr_factor(s, 10, 4) for s in range(10)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [lr_factor(s, 4, 0) for s in range(4)] == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])
    assert lr_factor(0, 1, 0) == 1 and min(lr_factor(s, 300, 299) for s in range(300)) > 0


def test_a_log_line_shows_what_there_is():
    logs = {
        "loss": 2.1844,
        "learning_rate": 1.5e-4,
        "masked": 0.15,
        "negatives": 1022.85,
        "truncated": 0.031,
        "mean_cosine": 0.2,
        "grad_norm": 3.0,
    }
    line = log_line(540_000, logs)
    assert (
        line
        == "step 540000 loss 2.184   lr 1.5e-04   masked 0.15   negatives 1022.85   truncated 3.1%"
    )
    assert log_line(20, {"eval_ndcg@10": 0.5, "eval_other": 1.0}) == "step 20     ndcg@10 0.500"
    assert log_line(20, {"eval_other": 1.0}) == ""
    assert log_line(5, {"loss": 1.0, "input_share": 0.034}) == "step 5      loss 1.000   waiting 3%"


def test_mean_cosine_is_the_mean_of_all_cosines():
    x = torch.randn(9, 5)
    assert mean_cosine(x).item() == pytest.approx(
        np.mean([[F.cosine_similarity(a, b, dim=0).item() for a in x] for b in x]), abs=1e-6
    )
    with pytest.raises(ValueError, match="became inf"):
        check_health({"loss": math.inf, "mean_cosine": 0.1}, 20, config())


@pytest.mark.parametrize(
    "steps, sample, looked",
    [(100, 4, [0, 25, 50, 75]), (3, 8, [0, 1, 2]), (1, 8, [0]), (10, 0, [])],
)
def test_the_account_looks_at_different_batches_spread_over_the_run(steps, sample, looked):
    mixture, asked = counted(make_mixture(), whole=True)
    report = run_report(mixture, Tokens(make_tokenizer(), 64), steps, sample)
    assert asked == looked and ("tokens" in report) == bool(looked) and report["steps"] == steps


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip", "scale"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


def test_a_full_width_that_is_not_trained_is_said(tmp_path):
    with pytest.warns(UserWarning, match="the full width of 32 is not trained itself; add 32"):
        train_tiny(tmp_path / "a", config(1, widths=(8,)))


@pytest.mark.parametrize(
    "data, said",
    [
        ([("a", "b")], "every row has the same texts"),
        ({"anchor": ["a"]}, "no known pair of columns"),
        ("file.jsonl", "file.jsonl: no such file"),
        (None, "a NoneType has no rows"),
    ],
)
def test_data_that_holds_no_pairs_is_refused(tmp_path, data, said):
    with pytest.raises(ValueError, match=said):
        train(make_encoder(), data, config(), tmp_path / "run", progress=False)


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


# ---- the same run ----


def measured(encoder):
    return {"m": 0.5}


RECIPE = """
title = "a run"
[evaluation]
sts = "dev.jsonl"
[test]
retrieval = "exam"
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A run with an evaluation, a test and a recipe, killed at step 5, with checkpoints 2 and 4."
    out = tmp_path_factory.mktemp("begun") / "run"
    exams = dict(evaluate=measured, test=measured, recipe=RECIPE)
    with pytest.raises(Crash):
        dropout_run(out, callbacks=[At(5, crash)], **exams)
    return out


def go_on(out, encoder=None, mixture=None, c=None, **options):
    "Resume the run that `begun` began, with something changed."
    encoder = encoder or make_encoder(dropout=0.1)
    c = c or config(6, save_every=2)
    exams = dict(evaluate=measured, test=measured, recipe=RECIPE)
    train(
        encoder, mixture or make_mixture(), c, out, progress=False, resume=True, **exams | options
    )
    return weights(encoder)


def changed_encoder(**changes):
    encoder = make_encoder(dropout=changes.pop("dropout", 0.1))
    for name, value in changes.items():
        setattr(encoder, name, value)
    return encoder


def frozen_encoder():
    encoder = make_encoder(dropout=0.1)
    encoder.backbone.embeddings.requires_grad_(False)
    return encoder


def encoder_with_heads(heads):
    encoder = make_encoder(dropout=0.1)
    encoder.backbone.config.num_attention_heads = heads
    return encoder


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(encoder=lambda: changed_encoder(pooling="cls")), "encoder.pooling was 'mean', now"),
        (dict(encoder=lambda: changed_encoder(normalize=False)), "encoder.normalize was True, now"),
        (dict(encoder=lambda: changed_encoder(max_length=8)), "encoder.max_length was 64, now 8"),
        (
            dict(encoder=lambda: changed_encoder(prompts={"query": "q: "})),
            "encoder.prompts.query was None, now 'q: '",
        ),
        (
            dict(encoder=lambda: changed_encoder(settings={"similarity_fn_name": "dot"})),
            "encoder.settings.similarity_fn_name was 'cosine', now 'dot'",
        ),
        (dict(encoder=lambda: changed_encoder(dropout=0.2)), r"dropout was \[0.1\], now \[0.2\]"),
        (dict(encoder=frozen_encoder), "encoder.frozen was 0, now"),
        (dict(encoder=lambda: encoder_with_heads(2)), "encoder.num_attention_heads was"),
        (dict(mixture=lambda: make_mixture(copies=2)), "texts.pairs"),
        (dict(evaluate=lambda: None), "evaluation was True, now False"),
        (dict(test=lambda: None), "test was True, now False"),
        (
            dict(recipe=lambda: RECIPE.replace("dev.jsonl", "other.jsonl")),
            "evaluation.sts was 'dev.jsonl', now 'other.jsonl'",
        ),
        (
            dict(recipe=lambda: RECIPE + '[run]\nchanges = { test = { retrieval = "easier" } }\n'),
            "test.retrieval was 'exam', now 'easier'",
        ),
        (dict(c=lambda: config(6, save_every=2, scale=5.0)), "scale was 20.0, now 5.0"),
    ],
)
def test_resume_refuses_what_would_be_another_run(begun, tmp_path, change, said):
    out = shutil.copytree(begun, tmp_path / "run")
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"another configuration or other data.*{said}") as caught:
        go_on(out, **{name: make() for name, make in change.items()})
    assert len(str(caught.value)) < 1000
    records = {name for name in before if not name.startswith("data_config")}
    assert {name: snapshot(out)[name] for name in records} == {n: before[n] for n in records}


def test_what_does_no_harm_may_differ_after_a_resume(begun, tmp_path):
    "Another title, command and place; other base weights, which the checkpoint replaces."
    straight = go_on(shutil.copytree(begun, tmp_path / "straight"))
    encoder = make_encoder(dropout=0.1)
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    encoder.settings["similarity_fn_name"] = "cosine"  # as a saved model says it
    recipe = RECIPE.replace("a run", "another title") + "# command: resumed\n"
    out = shutil.copytree(begun, tmp_path / "moved")
    after = go_on(out, encoder, c=config(6, save_every=2, workers=0), recipe=recipe)
    assert same(after, straight)
    assert (out / "recipe.toml").read_text() == RECIPE  # how the run began


def test_a_resumed_run_sits_the_exam_that_it_began_with(begun, tmp_path):
    out = shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(ValueError, match="began with an evaluation that measures m, and this one"):
        go_on(out, evaluate=lambda encoder: {"other": 1.0})
    assert json.loads((out / "metrics.json").read_text())["before"] == {"m": 0.5}


def test_one_text_of_a_small_source_is_enough_to_be_another_run(tmp_path):
    rows = [(f"a text {n}", f"its partner {n}") for n in range(40)]
    c = config(6, save_every=2)
    with pytest.raises(Crash):
        mixture = Mixture([Source(rows, "pairs")], [1.0], 8, 1)
        train_tiny(tmp_path, c, mixture=mixture, callbacks=[At(5, crash)])
    rows[17] = (rows[17][0].upper(), rows[17][1])
    mixture = Mixture([Source(rows, "pairs")], [1.0], 8, 1)
    with pytest.raises(ValueError, match="texts.pairs was"):
        train_tiny(tmp_path, c, mixture=mixture, resume=True)


# ---- checkpoints of others ----


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    "A run whose best step is 2, killed at step 7: checkpoints 2, 4 and 6."
    out = tmp_path_factory.mktemp("chosen") / "run"
    c = config(8, eval_every=2, metric="score")
    with pytest.raises(Crash):
        scores = Scores(0.1, 0.9, 0.2, 0.2)
        dropout_run(out, c, evaluate=scores, callbacks=[At(7, crash)])
    assert checkpoints(out) == [2, 4, 6]
    return out, c


def place(out, step):
    return out / f"checkpoints/checkpoint-{step}"


def swap(source, target):
    shutil.rmtree(target)
    shutil.copytree(source, target)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda out, other: swap(place(out, 4), place(out, 2)), "checkpoint-2: is of step 4"),
        (
            lambda out, other: swap(place(other, 2), place(out, 2)),
            "checkpoint-2: is a checkpoint of",
        ),
        (
            lambda out, other: swap(place(other, 6), place(out, 6)),
            "checkpoint-6: is a checkpoint of",
        ),
        (lambda out, other: shutil.rmtree(place(out, 2)), "checkpoint-2: is missing"),
        (lambda out, other: (place(out, 2) / MANIFEST).unlink(), "checkpoint-2: has no manifest"),
        (
            lambda out, other: (place(out, 2) / MANIFEST).write_text("{}"),
            "manifest.json: is not as",
        ),
        (lambda out, other: flip(place(out, 2) / "model.safetensors"), "2/model.safetensors: has"),
        (lambda out, other: place(out, 8).write_text("x"), "checkpoint-8: is no folder"),
        (
            lambda out, other: place(out, 8).symlink_to(out / "nothing"),
            "checkpoint-8: is no folder",
        ),
        (lambda out, other: (out / "model").write_text("x"), "model: is no folder"),
        (lambda out, other: (out / "model").symlink_to(out / "nothing"), "model: is no folder"),
        (lambda out, other: (out / "history.json").mkdir(), "history.json: is no file"),
        (lambda out, other: (out / "mixture.json").mkdir(), "mixture.json: is no file"),
        (lambda out, other: (out / "config.json").unlink(), "config.json: cannot be read"),
        (lambda out, other: (out / "run.json").unlink(), "run.json: cannot be read"),
        (lambda out, other: (out / "run.json").write_text("{}"), "run.json: id is missing"),
        (lambda out, other: (out / "versions.json").unlink(), "no versions.json|not a run's"),
        (
            lambda out, other: [(place(out, n) / MANIFEST).unlink() for n in (2, 4, 6)],
            "checkpoint-6: has no manifest.json, and no other",
        ),
    ],
)
def test_all_that_a_resumed_run_will_need_is_looked_at_when_it_begins(
    chosen, tmp_path, damage, said
):
    (run, c), asked = chosen, []
    out, other = shutil.copytree(run, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(run, other)
    record = read_json(other / "run.json") | {"id": "another"}
    (other / "run.json").write_text(json.dumps(record))
    for step in (2, 4, 6):  # whole checkpoints of the other run
        about = {"run": "another", "seconds": 0.0, "metrics": None}

        def write(folder):
            shutil.copytree(place(run, step), folder, dirs_exist_ok=True)

        write_checkpoint(other, step, 2, write, about)
    damage(out, other)
    before = snapshot(out)

    def evaluate(encoder):
        asked.append(1)
        return {"score": 0.2}

    with pytest.raises(ValueError, match=said) as caught:
        dropout_run(out, c, evaluate=evaluate, resume=True)
    assert not asked and snapshot(out) == before
    assert "delete manifest" not in str(caught.value).replace("delete " + str(out), "")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda model, other: (model / MANIFEST).unlink(), "model: has no manifest.json"),
        (lambda model, other: (model / MANIFEST).write_text("{}"), "manifest.json: is not as it"),
        (lambda model, other: flip(model / "model.safetensors"), "model.safetensors: has another"),
        (lambda model, other: swap(other, model), "model: is not the model that this run made"),
    ],
)
def test_the_model_of_a_finished_run_is_checked_when_it_is_taken(whole_run, tmp_path, damage, said):
    out = shutil.copytree(whole_run, tmp_path / "run")
    damage(out / "model", place(out, 4))
    with pytest.raises(Damaged, match=said):
        dropout_run(out, resume=True)
    shutil.rmtree(out / "model")  # as the sentence says
    assert same(dropout_run(out, resume=True), dropout_run(whole_run, resume=True))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole_run") / "run"
    dropout_run(out)
    return out


# ---- records ----


@pytest.mark.parametrize("name", ["metrics.json", "versions.json", "run.json", "config.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "5", '"x"', '{"before": 5}', '{"compute": 5}', '{"ended_by": []}']
)
def test_a_record_of_another_shape_is_named_before_any_step(broken, name, text):
    (broken / name).write_text(text)
    mixture = make_mixture()
    mixture.batch = None  # no step is made
    if name == "versions.json" and text in ('{"before": 5}', '{"ended_by": []}'):
        return  # it may lack what it computes with
    with pytest.raises(ValueError, match=f"{name}: |was trained with another configuration"):
        train_tiny(broken, config(6, save_every=2), mixture=mixture, dropout=0.1, resume=True)


@pytest.mark.parametrize(
    "change",
    [{"steps": "x"}, {"after": None}, {"best_step": 1.5}, {"ended_by": "x"}, {"test": {}}],
)
def test_a_finished_run_with_a_wrong_record_is_refused(whole_run, tmp_path, change):
    out = shutil.copytree(whole_run, tmp_path / "run")
    record = read_json(out / "metrics.json") | change
    (out / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="metrics.json: (steps|after|best_step|ended_by|test)"):
        dropout_run(out, resume=True)


def test_a_lost_first_measurement_comes_from_the_checkpoint(begun, tmp_path, capsys):
    out = shutil.copytree(begun, tmp_path / "run")
    (out / "metrics.json").unlink()
    (out / "data_config.json").write_text("{}")
    after = go_on(out)
    assert "metrics.json was gone; checkpoint-4 knows what it held" in capsys.readouterr().err
    assert same(after, go_on(shutil.copytree(begun, tmp_path / "straight")))
    for name in ("metrics.json", "data_config.json"):
        one, other = (read_json(tmp_path / n / name, (dict, list)) for n in ("run", "straight"))
        assert name != "metrics.json" or one["before"] == other["before"] == {"m": 0.5}
        assert name == "metrics.json" or one == other


def test_a_finished_run_without_its_metrics_keeps_its_model(whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.json").unlink()
    with pytest.raises(ValueError, match="metrics.json: cannot be read"):
        dropout_run(out, resume=True)
    assert (out / "model/model.safetensors").exists()


# ---- places and times ----


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dropout_run("~/run")
    assert run_state("~/run") == run_state(tmp_path / "home/run") == "finished"
    assert find_checkpoint("~/run")[0] == tmp_path / "home/run/checkpoints/checkpoint-6"
    with pytest.raises(ValueError, match="already holds a finished run"):
        claim("~/run")
    assert not list((tmp_path / "here").iterdir())


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_steps(broken):
    path = broken / "checkpoints/checkpoint-4"
    about = read_json(path / "checkpoint.json") | {"seconds": 1000.0}

    def write(folder):
        for name in (
            name for name in os.listdir(path) if name not in (MANIFEST, "checkpoint.json")
        ):
            copy = shutil.copytree if (path / name).is_dir() else shutil.copy
            copy(path / name, folder / name)

    step, best = about.pop("step"), about.pop("best_step")
    write_checkpoint(broken, step, best, write, about)
    dropout_run(broken, resume=True)
    metrics = read(broken, "metrics")
    assert 1000 < metrics["seconds"] < 1100
    assert metrics["pairs_per_second"] == pytest.approx(6 * 8 / metrics["seconds"], abs=0.06)


# ---- values of other libraries in the configuration ----


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"steps": np.int64(5)}, {"steps": 5}),
        ({"steps": torch.tensor(5)}, {"steps": 5}),
        ({"lr": np.float64(1e-3)}, {"lr": 1e-3}),
        ({"symmetric": np.bool_(False)}, {"symmetric": False}),
        ({"widths": [16, np.int32(32)]}, {"widths": (16, 32)}),
        ({"widths": np.array([16, 32])}, {"widths": (16, 32)}),
    ],
)
def test_what_is_plainly_a_number_is_taken(given, kept):
    c = TrainConfig(**{"steps": 5, "warmup": 0} | given)
    for name, value in kept.items():
        assert getattr(c, name) == value and type(getattr(c, name)) is type(value)
    json.dumps(c.widths + (c.steps, c.lr, c.symmetric))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"step": 5}, "there is no setting step; did you mean steps?"),
        ({"steps": "x" * 10**6}, "steps should be a valid integer, not 'xxx"),
        ({"steps": 10**5000}, "steps should be less than"),
        ({"steps": 5.5}, "steps should be a valid integer, not 5.5"),
        ({"widths": [16, "b"]}, "widths.1 should be a valid integer, not 'b'"),
        ({"warmup": 5}, "warmup is 5 steps but the run has 5"),
        ({"lr": 10**400}, "lr should be"),
        ({"similarity": "c\nos"}, "similarity should be 'cos' or 'dot', not 'c"),
    ],
)
def test_a_wrong_setting_is_one_sentence(wrong, said):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{"steps": 5, "warmup": 0} | wrong)
    text = str(caught.value)
    assert text.startswith("TrainConfig: ") and said in text
    assert "\n" not in text and len(text) < 250


@pytest.mark.parametrize(
    "given, steps, warmup",
    [
        ({}, 1000, 100),
        ({"steps": 90}, 90, 9),
        ({"steps": 5}, 5, 0),
        ({"steps": 90, "warmup": 0}, 90, 0),
        ({"epochs": 2}, None, None),
        ({"epochs": 2, "warmup": 3}, None, 3),
    ],
)
def test_warm_up_is_a_tenth_of_the_steps_unless_given(given, steps, warmup):
    c = TrainConfig(**given)
    assert (c.steps, c.warmup) == (steps, warmup)


@pytest.mark.parametrize(
    "epochs, steps", [(1, 5), (0.2, 1), (0.01, 1), (2.5, 13), (0.8, 4), (3, 15)]
)
def test_epochs_are_steps_by_the_rows_of_the_mixture(epochs, steps):
    mixture = make_mixture()  # 40 rows in batches of 8
    c = of_length(TrainConfig(epochs=epochs), mixture)
    assert (c.steps, c.warmup, c.epochs) == (steps, steps // 10, None)
    assert of_length(c, mixture) is c


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 5, "epochs": 1}, "steps is 5 and epochs is 1; give one of the two"),
        ({"epochs": 0}, "epochs should be greater than 0"),
        ({"epochs": float("inf")}, "epochs should be"),
        ({"epochs": "2"}, "epochs should be a valid number, not '2'"),
    ],
)
def test_a_wrong_length_is_one_sentence(given, said):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_warm_up_that_is_longer_than_the_epochs_is_refused():
    with pytest.raises(ValueError, match="warmup is 6 steps but the run has 5"):
        of_length(TrainConfig(epochs=1, warmup=6), make_mixture())


def test_a_run_of_epochs_is_recorded_in_steps_and_resumed(tmp_path):
    def c(epochs):
        return TrainConfig(epochs=epochs, lr=1e-3, save_every=2, workers=0)

    with pytest.raises(Crash):
        train_tiny(tmp_path, c(1), callbacks=[At(3, crash)])
    record = read_json(tmp_path / "config.json")
    assert (record["steps"], record["warmup"]) == (5, 0) and "epochs" not in record
    with pytest.raises(ValueError, match="steps was 5, now 10"):
        train_tiny(tmp_path, c(2), resume=True)
    train_tiny(tmp_path, c(1), resume=True)
    assert read(tmp_path, "metrics")["steps"] == 5


# ---- how a run speaks ----


def test_plain_lines_say_how_far_how_fast_and_how_long():
    times = iter((0, 10, 20, 24))
    lines = Lines(steps=100, batch_size=64, step=20, clock=lambda: next(times))
    logs = {"loss": 2.0, "learning_rate": 1e-4, "masked": 0.1, "truncated": 0.002}
    assert lines.line(30, logs) == (
        "step  30 of 100   loss 2.000   lr 1.0e-04   64.0 pairs/s   70 s left"
    )
    assert lines.line(30, {"eval_ndcg@10": 0.5}) == "step  30 of 100   ndcg@10 0.500"
    # the evaluation took 10 seconds, which are no seconds of training
    assert lines.line(40, logs | {"truncated": 0.25}) == (
        "step  40 of 100   loss 2.000   lr 1.0e-04   truncated 25.0%   160 pairs/s   72 s left"
    )
    assert lines.line(40, {"train_loss": 1.0}) == ""


@pytest.mark.parametrize(
    "seconds, text",
    [(3.2, "3 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (5400, "1 h 30 min")],
)
def test_times_are_written_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "progress, style",
    [(True, "lines"), (False, "none"), ("bar", "bar"), ("lines", "lines"), (1, "lines")],
)
def test_without_a_terminal_a_run_speaks_in_lines(progress, style):
    assert progress_style(progress) == style
    with pytest.raises(ValueError, match="progress is 'loud'; use True, False, 'bar' or 'lines'"):
        progress_style("loud")


# ---- labels and scores ----


def marked(batch, kind):
    "A batch with labels or scores, which follow from its rows."
    if kind == "labels":
        return batch._replace(labels=batch.identities[:, 0] % 3)
    return batch._replace(scores=(batch.identities[:, 1] % 5).float() / 4)


@pytest.mark.parametrize("mask_same", [True, False])
def test_rows_of_one_label_are_no_negatives(mask_same):
    batch = Tokens(make_tokenizer(), 64)(make_mixture(columns=3).batch(0))
    labels = torch.tensor([5, 5, 0, 0, 7, 7, 7, 9])
    x = torch.nn.functional.normalize(torch.randn(24, 16), dim=-1)
    c = config(mask_same=mask_same)
    loss, masked = batch_loss(x, batch.identities, c, labels)
    a, p, n = x.view(3, 8, 16)
    scores = 20 * a @ torch.cat([p, n]).T  # (8, 16)
    for i, j in ((0, 1), (4, 5), (4, 6), (5, 6)):
        scores[i, j] = scores[j, i] = -math.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(8))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert masked.item() == pytest.approx(8 / 8)


@pytest.mark.parametrize("widths", [(), (8, 16)])
def test_graded_pairs_are_put_in_order_by_cosent(widths):
    batch, x = Tokens(make_tokenizer(), 64)(make_mixture().batch(0)), torch.randn(16, 16)
    scores = torch.tensor([0, 0.25, 0.25, 0.5, 0.75, 1, 1, 0])
    loss, masked = batch_loss(x, batch.identities, config(widths=widths), scores=scores)
    expected = sum(cosent(x[:8, :w], x[8:, :w], scores) for w in widths or (16,))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and masked == 0
    with pytest.raises(ValueError, match="graded rows have 4 texts"):
        batch_loss(x, batch.identities[:4].repeat(1, 2), config(), scores=scores[:4])


def marked_steps(embed, encoder, rank=0, ranks=1):
    "Loss and gradients of a step for both kinds, whole and in chunks."
    found = {}
    for kind in ("labels", "scores"):
        batch = marked(Tokens(make_tokenizer(), 64)(make_mixture().batch(1, rank, ranks)), kind)
        for chunk_tokens in (0, 40):
            no_sync = getattr(embed, "no_sync", nullcontext)
            logs = train_step(
                encoder, batch, config(), embed=embed, chunk_tokens=chunk_tokens, no_sync=no_sync
            )
            found |= {
                f"{kind} {chunk_tokens} {name}": p.grad.clone()
                for name, p in encoder.named_parameters()
            }
            found |= {f"{kind} {chunk_tokens} {key}": logs[key] for key in ("loss", "masked")}
            encoder.zero_grad()
    return found


MARKED = """
import os, sys
sys.path[:0] = {paths!r}
from test_run import *
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, encoder = int(os.environ["RANK"]), make_encoder()
embed = torch.nn.parallel.DistributedDataParallel(encoder)
torch.save(marked_steps(embed, encoder, rank, 2), {notes!r} + str(rank))
torch.distributed.destroy_process_group()
"""


def test_labels_and_scores_on_two_processes_are_those_of_one(tmp_path):
    from pathlib import Path

    paths, notes = [str(Path(__file__).parent), str(Path(__file__).parent.parent)], tmp_path / "n"
    done = torchrun(tmp_path, MARKED.format(paths=paths, notes=str(notes)))
    assert done.returncode == 0, done.stderr[-3000:]
    both = [torch.load(f"{notes}{rank}", weights_only=True) for rank in (0, 1)]
    encoder = make_encoder()
    alone = marked_steps(encoder, encoder)
    assert alone["labels 0 masked"] > 0 and alone["labels 0 loss"] != alone["scores 0 loss"]
    for name, value in alone.items():
        for there in both:
            assert torch.allclose(value, there[name], rtol=1e-4, atol=1e-6), name


# ---- the loss of a run ----

LOSSES = {
    "siglip": dict(loss="siglip"),
    "gte": dict(loss="gte"),
    "tiled": dict(tiled=True),
    "learned": dict(learn_scale=True),
    "learned siglip": dict(loss="siglip", learn_scale=True, scale=10.0),
    "learned tiled": dict(tiled=True, learn_scale=True, widths=(8, 32)),
    "tiled guard": dict(tiled=True, guard="self", guard_margin=-0.01, guard_after=0),
    "guide": dict(guard="guide", guide="not opened here"),
    "tiled guide": dict(tiled=True, guard="guide", guide="not opened here", mask_same=False),
    "gte guide": dict(loss="gte", guard="guide", guide="not opened here", guard_margin=-0.1),
    "relative": dict(guard="guide", guide="not opened here", guard_relative_margin=0.05),
    "taught margin": dict(loss="margin_mse", widths=(8, 32), scale=1.0),
    "taught choice": dict(loss="distill_kl"),
}


def guided(batch):
    "A batch with vectors of a guide, which follow from its texts."
    turns = batch.identities[..., None] % torch.arange(7, 12)  # (B, C, 5)
    return batch._replace(guide=turns.float() / 4 - 1)


def taught(batch):
    "A batch with the scores of a teacher, which follow from its texts."
    return batch._replace(teacher=(batch.identities[:, 1:] % 7).float() / 4 - 1)


def loss_steps(embed, encoder, rank=0, ranks=1):
    "Loss, what it masked and gradients of a step of each loss, whole and in chunks."
    found, no_sync = {}, getattr(embed, "no_sync", nullcontext)
    for columns in (2, 3):
        plain = Tokens(make_tokenizer(), 64)(make_mixture(columns).batch(1, rank, ranks))
        for name, options in LOSSES.items():
            if "taught" in name and columns == 2:  # there is nothing to compare
                continue
            for chunk_tokens in (0, 40):
                c = config(**options)
                learned = learned_scale(c)
                batch = guided(plain) if c.guide else taught(plain) if "taught" in name else plain
                logs = train_step(
                    *(encoder, batch, c),
                    embed=embed,
                    chunk_tokens=chunk_tokens,
                    no_sync=no_sync,
                    learned=learned,
                )
                ours = list(learned.named_parameters()) if learned else []
                key = f"{columns} {name} {chunk_tokens}"
                for n, p in [*encoder.named_parameters(), *ours]:
                    found[f"{key} {n}"] = p.grad.clone()
                found |= {f"{key} {n}": logs[n] for n in ("loss", "masked", "negatives")}
                encoder.zero_grad()
    return found


def test_every_loss_on_two_processes_and_in_chunks_is_that_of_one(tmp_path):
    from pathlib import Path

    paths, notes = [str(Path(__file__).parent), str(Path(__file__).parent.parent)], tmp_path / "n"
    script = MARKED.replace("marked_steps", "loss_steps").format(paths=paths, notes=str(notes))
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [torch.load(f"{notes}{rank}", weights_only=True) for rank in (0, 1)]
    encoder = make_encoder()
    alone = loss_steps(encoder, encoder)
    assert all(
        alone[f"{C} {name} 0 masked"] > 0 for C in (2, 3) for name in LOSSES if "gui" in name
    )
    for name, value in alone.items():
        for there in both:
            torch.testing.assert_close(there[name], value, rtol=1e-4, atol=2e-6, msg=name)
        if " 0 " in name:
            chunked = alone[name.replace(" 0 ", " 40 ")]
            torch.testing.assert_close(chunked, value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("widths", [(), (8, 16)])
def test_the_loss_of_a_batch_goes_by_its_name(columns, widths):
    batch = guided(Tokens(make_tokenizer(), 64)(make_mixture(columns, copies=4).batch(0)))
    torch.manual_seed(0)
    x, C = torch.randn(columns * 8, 16), columns
    rows, same = x.view(C, 8, 16).transpose(0, 1), same_text(batch.identities)
    guide = batch.guide
    same_too = same | guide_mask(
        guide[:, 0], guide[:, 1], guide[:, 2:] if C > 2 else None, absolute_margin=-0.05
    )
    for name, function in {"siglip": siglip, "gte": gte, "info_nce": info_nce}.items():
        guard = dict(guard="guide", guide="x", guard_margin=-0.05, widths=widths, loss=name)
        for options, mask in ((dict(loss=name, widths=widths), same), (guard, same_too)):
            value, masked = batch_loss(x, batch.identities, config(**options), guide=guide)
            way = {"symmetric": C == 2} if name == "info_nce" else {}
            expected = sum(
                function(
                    *(rows[:, 0, :w], rows[:, 1, :w], rows[:, 2:, :w] if C > 2 else None),
                    same=mask,
                    scale=20.0,
                    **way,
                )
                for w in widths or (16,)
            )
            assert value.item() == pytest.approx(expected.item(), rel=1e-6)
            assert masked == mask.sum() / 8
            if name == "info_nce":
                tiled = batch_loss(x, batch.identities, config(**options, tiled=True), guide=guide)
                assert tiled[0].item() == pytest.approx(expected.item(), rel=1e-6)
                assert tiled[1] == masked


@pytest.mark.parametrize("similarity, widths", [("cos", ()), ("dot", (8, 32))])
@pytest.mark.parametrize("loss", ["margin_mse", "distill_kl"])
def test_rows_are_scored_as_the_guide_scores_them(loss, similarity, widths):
    embeddings, identities = torch.randn(4 * 6, 32), torch.randint(0, 60, (6, 4))
    guide = torch.randn(6, 4, 5)
    c = config(loss=loss, guide="not opened", similarity=similarity, widths=widths, scale=10.0)
    rows = embeddings.view(4, 6, 32).transpose(0, 1)  # (b, C, D)
    teacher = F.cosine_similarity(guide[:, :1], guide[:, 1:], dim=-1)  # (b, 1 + K)
    expected = 0
    for w in widths or (32,):
        columns = rows[:, 0, :w], rows[:, 1, :w], rows[:, 2:, :w]
        if loss == "margin_mse":
            expected += 10 * margin_mse(*columns, teacher, similarity=similarity)
        else:
            expected += 100 * distill_kl(*columns, teacher, 0.1, similarity=similarity)
    value, masked = batch_loss(embeddings, identities, c, guide=guide)
    torch.testing.assert_close(value, expected)
    assert masked == 0
    with pytest.raises(ValueError, match="has no vectors of a guide in its field guide"):
        batch_loss(embeddings, identities, c)
    with pytest.raises(ValueError, match="have no hard negatives to compare"):
        batch_loss(embeddings, identities.view(12, 2), c, guide=torch.randn(12, 2, 5))


@pytest.mark.parametrize("loss", ["margin_mse", "distill_kl"])
@pytest.mark.parametrize("scale", [5.0, 20.0, 50.0])
def test_a_distilled_gradient_is_as_long_as_that_of_info_nce(loss, scale):
    "Else one dataset of a mixture counts for nothing beside another."
    torch.manual_seed(0)
    rows, guide, identities = torch.randn(6, 32, 64), torch.randn(32, 6, 8), torch.arange(192)

    def length(name):
        x = F.normalize(rows.flatten(0, 1) + 1.5, dim=-1).requires_grad_()  # (6 * 32, 64)
        options = {} if name == "info_nce" else {"guide": "not opened"}
        c = config(loss=name, scale=scale, **options)
        batch_loss(x, identities.view(32, 6), c, guide=guide)[0].backward()
        return x.grad.norm().item()

    assert 0.1 < length(loss) / length("info_nce") < 10


def test_a_run_that_copies_a_guide(tmp_path):
    texts = sorted({text for row in make_source(3).rows(range(40)) for text in row})
    index = guide_index(tmp_path / "index", texts)
    for loss in ("margin_mse", "distill_kl"):
        c = config(4, save_every=2, loss=loss, guide=index)
        whole = dropout_run(tmp_path / loss, c, mixture=make_mixture(3))
        lines = [line for line in read(tmp_path / loss, "history") if "loss" in line]
        assert all(line["masked"] == 0 < line["loss"] for line in lines)
        assert not same(
            whole, dropout_run(tmp_path / f"{loss} no", config(4), mixture=make_mixture(3))
        )
    with pytest.raises(
        ValueError, match="its rows have no hard negatives, but loss = 'distill_kl'"
    ):
        dropout_run(tmp_path / "pairs", c, mixture=make_mixture(2))
    assert not (tmp_path / "pairs").exists()


def test_graded_pairs_take_cosent_whatever_the_loss():
    batch, x = Tokens(make_tokenizer(), 64)(make_mixture().batch(0)), torch.randn(16, 16)
    scores = torch.tensor([0, 0.25, 0.25, 0.5, 0.75, 1, 1, 0])
    expected = batch_loss(x, batch.identities, config(), scores=scores)
    for options in LOSSES.values():
        c = config(**options | {"scale": 20.0, "widths": ()})
        assert (
            batch_loss(x, batch.identities, c, scores=scores, learned=learned_scale(c)) == expected
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(loss="infonce"),
            "loss should be 'info_nce', 'siglip', .* or 'distill_kl', not 'infonce'",
        ),
        (dict(tiled=True, loss="gte"), "tiled is a form of info_nce, but loss is 'gte'"),
        (dict(learn_scale=True, scale=200.0), "scale is 200, but one that is learned stays from 1"),
        (dict(learn_scale="yes"), "learn_scale"),
        (dict(guard="guide"), "guard is 'guide' but guide is empty; name the index folder"),
        (dict(guide="index"), "guide is 'index' but guard is ''; set guard = 'guide'"),
        (dict(guard_relative_margin=0.1), "guard_relative_margin is 0.1 but there is no guard"),
        (dict(guard="self", guard_relative_margin=2.0), "guard_relative_margin should be less"),
        (
            dict(loss="distill_kl", guide="index", guard="self"),
            "guard is 'self' but loss is 'distill_kl', which compares no texts of other rows",
        ),
        (
            dict(loss="distill_kl", guide="index", learn_scale=True),
            "learn_scale is set but loss is 'distill_kl'",
        ),
        (dict(loss="margin_mse", guide="i", tiled=True), "tiled is a form of info_nce"),
    ],
)
def test_settings_of_the_loss_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_a_batch_without_the_vectors_of_its_guide_is_refused():
    batch, c = Tokens(make_tokenizer(), 64)(make_mixture().batch(0)), config(**LOSSES["guide"])
    with pytest.raises(ValueError, match="the batch has no vectors of one in its field guide"):
        batch_loss(torch.randn(16, 16), batch.identities, c)


@pytest.mark.parametrize("options", [LOSSES["learned"], LOSSES["learned siglip"]])
def test_a_scale_is_trained_logged_saved_and_resumed_exactly(tmp_path, options):
    c = config(6, save_every=2, **options)
    one = dropout_run(tmp_path / "whole", c)
    dropout_run(tmp_path / "parts", c, callbacks=[At(3, stop)])
    two = dropout_run(tmp_path / "parts", c, resume=True)
    assert same(one, two)
    names = ["scale", *(["bias"] if c.loss == "siglip" else [])]
    for name in names:
        curve, other = (
            [line[name] for line in read(tmp_path / run, "history") if name in line]
            for run in ("whole", "parts")
        )
        assert curve == other and len(set(curve)) == 6
        assert curve[0] == pytest.approx(c.scale if name == "scale" else -10)
    state = load_training(tmp_path / "parts/checkpoints/checkpoint-6", {"learned"})
    assert state["learned"]["log_scale"].exp().item() != pytest.approx(c.scale, rel=1e-5)
    fixed = dropout_run(tmp_path / "fixed", config(6, loss=c.loss, scale=c.scale))
    assert not same(one, fixed)
    with pytest.raises(ValueError, match="learn_scale was True, now False"):
        dropout_run(
            tmp_path / "whole", config(6, save_every=2, loss=c.loss, scale=c.scale), resume=True
        )


@pytest.mark.parametrize(
    "before, after, message",
    [
        ({}, dict(loss="gte"), "loss was 'info_nce', now 'gte'"),
        (dict(loss="gte"), {}, "loss was 'gte', now 'info_nce'"),
        (dict(guard="self"), {}, "guard was 'self', now ''"),
        (dict(tiled=True), {}, "tiled was True, now False"),
    ],
)
def test_resume_sees_another_loss_and_old_records_stay_as_they_are(
    tmp_path, before, after, message
):
    train_tiny(tmp_path, config(4, save_every=2, **before), callbacks=[At(3, stop)])
    written = read(tmp_path, "config").keys() & {"loss", "guard", "tiled", "learn_scale", "guide"}
    assert written == before.keys()
    with pytest.raises(ValueError, match=message):
        train_tiny(tmp_path, config(4, save_every=2, **after), resume=True)


# ---- a guide ----


class ByCharacter:
    "A guide that needs no training: how often a text has each letter."

    def __call__(self, texts):
        letters = "abcdefghijklmnopqrstuvwxyz "
        return np.array([[text.count(c) + 0.1 for c in letters] for text in texts], np.float32)


def guide_index(folder, texts):
    build_index(folder, ByCharacter(), texts, progress=False)
    return str(folder)


def test_a_run_with_a_guide(tmp_path):
    texts = sorted({text for row in make_source(3).rows(range(40)) for text in row})
    c = config(4, save_every=2, guard="guide", guide=guide_index(tmp_path / "index", texts))
    whole = dropout_run(tmp_path / "whole", c, mixture=make_mixture(3))
    lines = [line for line in read(tmp_path / "whole", "history") if "loss" in line]
    assert all(line["masked"] > 0 for line in lines)
    assert not same(whole, dropout_run(tmp_path / "plain", config(4), mixture=make_mixture(3)))
    # it may move, but not change
    dropout_run(tmp_path / "parts", c, mixture=make_mixture(3), callbacks=[At(3, stop)])
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "index", tmp_path / "moved/index")
    moved = replace(c, guide=str(tmp_path / "moved/index"))
    assert same(whole, dropout_run(tmp_path / "parts", moved, mixture=make_mixture(3), resume=True))
    other = replace(c, guide=guide_index(tmp_path / "index", texts[:-1]))
    with pytest.raises(ValueError, match="guided_by was"):
        dropout_run(tmp_path / "parts", other, mixture=make_mixture(3), resume=True)
    few = replace(c, guide=guide_index(tmp_path / "few/index", texts[:50]))
    with pytest.raises(ValueError, match="the guide has no vector for .* encode all texts"):
        dropout_run(tmp_path / "stopped", few, mixture=make_mixture(3))


def test_a_guide_that_is_no_index_is_refused_before_the_directory_is_taken(tmp_path):
    c = config(guard="guide", guide=tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing.* is no index folder; make one of all texts"):
        train_tiny(tmp_path / "run", c)
    build_index(tmp_path / "codes", ByCharacter(), ["a", "b"], precision="int8", progress=False)
    with pytest.raises(ValueError, match="holds int8 vectors, which are codes"):
        train_tiny(tmp_path / "run", replace(c, guide=str(tmp_path / "codes")))
    assert not (tmp_path / "run").exists()


def test_a_guide_is_named_relative_to_the_recipe(tmp_path):
    text = """
title = "guided"
[model]
name = "m"
[data]
mix = "data_config.json"
[train]
guard = "guide"
guide = "guide-index"
"""
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    recipe = recipes.load(tmp_path / "r.toml")
    assert recipe.train["guide"] == str(tmp_path / "guide-index") and recipe.text == text
    changed = recipes.load(tmp_path / "r.toml", {"train": {"guide": "/elsewhere"}})
    assert TrainConfig(**changed.train).guide == "/elsewhere"


def test_overwrite_deletes_what_compare_measured(tmp_path):
    train_tiny(tmp_path, config(1))
    (tmp_path / "items.json").write_text("{}", encoding="utf-8")
    train_tiny(tmp_path, config(1), overwrite=True)
    assert not (tmp_path / "items.json").exists()


# ---- prompts, labels and scores of a run ----


def prompted(*prompts, names=("pairs", "more")):
    table = [make_source(name=name, seed=n) for n, name in enumerate(names[: len(prompts)])]
    for source, own in zip(table, prompts):
        source.prompts = own
    return Mixture(table, [1.0] * len(table), 8, 1)


def test_training_prompts_are_saved_with_the_model(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    mixture = prompted(("query: ", "passage: "))
    train_tiny(tmp_path / "run", config(2, save_every=1), mixture=mixture)
    ours = SentenceEncoder.from_pretrained(tmp_path / "run/model")
    assert ours.prompts == {"query": "query: ", "document": "passage: "}
    peer = st.SentenceTransformer(str(tmp_path / "run/model"), device="cpu")
    np.testing.assert_allclose(
        ours.encode_query(["snow"], progress=False), peer.encode_query(["snow"]), atol=1e-6
    )
    bare = ours.encode(["query: snow"], progress=False)
    np.testing.assert_allclose(ours.encode_query(["snow"], progress=False), bare, atol=1e-6)
    # an encoder that has prompts keeps them
    encoder = make_encoder()
    encoder.prompts = {"query": "q: "}
    train(encoder, mixture, config(1), tmp_path / "own", progress=False)
    assert SentenceEncoder.from_pretrained(tmp_path / "own/model").prompts == {"query": "q: "}
    with pytest.warns(UserWarning, match="2 different pairs of prompts, so the model keeps none"):
        train_tiny(tmp_path / "two", config(1), mixture=prompted(("a: ", "b: "), ("c: ", "b: ")))
    assert not SentenceEncoder.from_pretrained(tmp_path / "two/model").prompts


@pytest.mark.parametrize("now", [None, ("query: ", "")])
def test_a_run_that_is_resumed_with_other_prompts_is_refused(tmp_path, now):
    c = config(4, save_every=2)
    train_tiny(tmp_path, c, mixture=prompted(("query: ", "passage: ")), callbacks=[At(3, stop)])
    with pytest.raises(ValueError, match="mix.1.prompts was"):
        train_tiny(tmp_path, c, mixture=prompted(now), resume=True)
    train_tiny(tmp_path, c, mixture=prompted(("query: ", "passage: ")), resume=True)


@pytest.mark.parametrize("mark", ["label", "score"])
def test_a_run_that_is_resumed_with_other_labels_or_scores_is_refused(tmp_path, mark):
    texts, c = sentences(40, 1), config(4, save_every=2)

    def mixture(change=0):
        if mark == "label":
            rows = [{"text": text, "label": str(n % 4)} for n, text in enumerate(texts)]
            rows[0]["label"] = str(change)
        else:
            rows = [
                {"anchor": a, "positive": b, "score": n % 5 / 5}
                for n, (a, b) in enumerate(zip(texts[:20], texts[20:]))
            ]
            rows[7]["score"] += change / 10
        path = tmp_path / f"{mark}{change}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = load_source(path, "marked", cache_dir=tmp_path / "stores", **{mark: mark})
        return Mixture([source], [1.0], 8, 1)

    train_tiny(tmp_path / "run", c, mixture=mixture(), callbacks=[At(3, stop)])
    with pytest.raises(ValueError, match="texts.marked was"):
        train_tiny(tmp_path / "run", c, mixture=mixture(1), resume=True)
    train_tiny(tmp_path / "run", c, mixture=mixture(), resume=True)


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
torch.distributed.destroy_process_group()  # a thread of gloo that is left can abort the exit
"""


def test_of_two_processes_the_first_measures_and_a_signal_to_either_saves_both(tmp_path):
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
    assert [calls for _, calls in straight] == [4, 0]  # before, and three times during
    for number in (1, 2):
        out = f"stopped-{number}"
        stopped = start(out, stop=number)
        assert all("stopped at step 3 of 6" in said for said, _ in stopped)
        resumed = start(f"resumed-{number}", out=out, resume=True)
        assert [calls for _, calls in resumed] == [2, 0]
        # two uninterrupted runs differ by as much: gloo adds in any order
        after, expected = (resumed[0][0], straight[0][0])
        assert all(torch.allclose(v, expected[name], atol=1e-5) for name, v in after.items())
        assert same(after, resumed[1][0])
        assert read_json(tmp_path / out / "metrics.json")["steps"] == 6
