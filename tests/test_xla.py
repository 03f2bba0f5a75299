"""The XLA loop against eager, against the CPU trainer and itself; its programs; what it refuses.

No TPU is needed: XLA makes several devices of one CPU. Each job of xla_child.py is a process with
its own number of devices, two run at a time, and only those that the selected tests ask for.
Without torch_xla (`make test-xla` has it) these are skipped, and the others run.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xla_child
from conftest import ROOT, make_tokenizer
from xla_child import BATCH, LENGTH, TEXTS, make_encoder, make_mixture

from contrastive_st import xla
from contrastive_st.machine import pair_arguments
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, batch_loss
from contrastive_st.tokens import Tokens

XLA = importlib.util.find_spec("torch_xla") is not None
NEWEST = ("xlm-roberta", "modernbert", "qwen3")
FAMILIES = ("bert", "roberta", "distilbert", "mpnet", *NEWEST)
WIDTH, HIDDEN, LAYERS = 32, 64, 2  # of the encoders that xla_child makes
PATHS = [str(Path(xla.__file__).parents[1]), str(ROOT)]  # the package under test, and its metadata


# ---- processes


def launch(job, devices, folder):
    "Run a job in a process of its own; its result."
    env = {
        **os.environ,
        "DEVICES": str(devices),
        "CPU_NUM_DEVICES": str(max(devices, 1)),
        "PJRT_DEVICE": "CPU",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]),
    }
    # else transformers' Trainer takes the XLA device
    env |= {"USE_TORCH_XLA": "0"} if job == "reference" else {}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "xla_child.py", job, folder],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{job} on {devices} devices failed:\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


class Jobs:
    "Results by name, such as run-4: job and devices; each runs once, after those it builds on."

    NEEDS = {
        "guards-4": ("reference-0", "theirs"),
        "resume-4": ("run-4", "broken"),
        "resume-2": ("run-4", "broken"),
    }

    def __init__(self, folder):
        self.folder, self.futures, self.pool = folder, {}, ThreadPoolExecutor(2)

    def ask(self, name) -> Future:
        if name not in self.futures:
            before = self.ask(self.NEEDS[name][0]) if name in self.NEEDS else None
            self.futures[name] = self.pool.submit(self.work, name, before)
        return self.futures[name]

    def work(self, name, before):
        folder, (job, devices) = self.folder / name, name.split("-")
        if before:
            before.result()  # it was submitted earlier, so it is done or runs in the other thread
            part = self.NEEDS[name][1]
            shutil.copytree(self.folder / self.NEEDS[name][0] / part, folder / part)
        return launch(job, int(devices), folder)

    def __getitem__(self, name):
        return self.ask(name).result()


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    if not XLA:
        pytest.skip("torch_xla is not installed here: make test-xla runs these tests")
    jobs = Jobs(tmp_path_factory.mktemp("xla"))
    wanted = {
        name
        for item in request.session.items
        for mark in item.iter_markers("jobs")
        for name in mark.args
    }
    for name in sorted(
        wanted, key=lambda name: (list(ORDER).index(name.split("-")[0]), -int(name.split("-")[1]))
    ):
        jobs.ask(name)
    yield jobs
    jobs.pool.shutdown(cancel_futures=True)


# what others wait for, and what takes long, comes first
ORDER = ("run", "reference", "guards", "step", "resume", "late")


def each(job, *devices):
    "A test for each number of devices; its job is begun with those of the other tests."
    return pytest.mark.parametrize(
        "devices", [pytest.param(n, marks=pytest.mark.jobs(f"{job}-{n}")) for n in devices]
    )


# ---- 1. the same numbers

# what depends on how rows are divided is tried on each number of devices
CASES = ("bert pairs", "bert full", "bert triplets", "dropout pairs")
MARKS_AND_FAMILIES = ("bert labels", "bert graded")
MARKS_AND_FAMILIES += ("roberta pairs", "distilbert pairs", "mpnet pairs")
# on 1, 2 and 4 devices, as compiling takes the time
NEWER = tuple(f"{family} pairs" for family in NEWEST)
MORE = ("one way pairs", "widths pairs", "copies count pairs")
MORE += ("siglip triplets", "gte triplets", "bert guided")
EXPECTED = dict.fromkeys((1, 2, 8), {*CASES}) | {0: {*CASES, *MARKS_AND_FAMILIES}}
EXPECTED[1] = EXPECTED[2] = {*CASES, *NEWER}
EXPECTED[4] = {*CASES, *MARKS_AND_FAMILIES, *NEWER, *MORE}


@each("step", 0, 1, 2, 4, 8)
def test_a_step_equals_eager(jobs, devices):
    found = jobs[f"step-{devices}"]
    assert found.keys() == EXPECTED[devices]
    for name, off in found.items():
        # the loss is about 3, a step of float32 there 2.4e-7
        assert off["loss"] <= 1e-6 * off["value"] and off["masked"] <= 1e-6, (name, off)
        assert off["gradients"] < 2e-5 and off["worst"] < 3e-4 and off["norm"] < 1e-5, (name, off)
        # padding or none: one program; XLM-R is RoBERTa with other weights
        again = {"bert full", *(["xlm-roberta pairs"] if "roberta pairs" in found else [])}
        assert off["counts"] == {
            "compilations": name not in again,
            "executions": 1,
            "fallbacks": 0,
        }, (name, off)


@pytest.mark.jobs("reference-0")
@each("run", 1, 4, 8)
def test_a_run_equals_the_trainers(jobs, devices):
    ours, theirs = (
        [line for line in jobs[name]["curve"]["history"] if "loss" in line]
        for name in (f"run-{devices}", "reference-0")
    )
    assert (
        [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 21))
    )
    names = "loss grad_norm mean_cosine masked negatives truncated learning_rate"
    for name in names.split():
        assert [line[name] for line in ours] == pytest.approx(
            [line[name] for line in theirs], rel=1e-5, abs=1e-6
        ), name
    # it was no easy run
    assert max(line["masked"] for line in ours) > 0 and max(line["truncated"] for line in ours) > 0


@pytest.mark.jobs("reference-0", "run-4")
def test_the_best_is_kept_and_patience_ends_as_in_the_trainer(jobs):
    ours, theirs = jobs["run-4"]["stopped"], jobs["reference-0"]["stopped"]

    def drop(metrics):
        return {k: v for k, v in metrics.items() if k not in ("seconds", "pairs_per_second")}

    assert drop(ours["metrics"]) == drop(theirs["metrics"]) and ours["metrics"]["steps"] == 16
    assert ours["metrics"]["best_step"] == 8
    scores = [
        [(line["step"], line["eval_score"]) for line in run["history"] if "eval_score" in line]
        for run in (ours, theirs)
    ]
    assert scores[0] == scores[1] == [(4, 0.2), (8, 0.5), (12, 0.3), (16, 0.4)]
    a, b = (
        SentenceEncoder.from_pretrained(f"{run['out']}/model").state_dict()
        for run in (ours, theirs)
    )
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)
    kept = SentenceEncoder.from_pretrained(f"{ours['out']}/checkpoints/checkpoint-8").state_dict()
    assert all(torch.equal(a[name], kept[name]) for name in a)


@pytest.mark.jobs("run-4")
def test_evaluations_checkpoints_and_log_lines_keep_their_own_time(jobs):
    history, out = jobs["run-4"]["apart"]["history"], Path(jobs["run-4"]["apart"]["out"])
    assert [line["step"] for line in history if "eval_score" in line] == [2, 4, 6, 8, 10, 12]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "checkpoint-10",
        "checkpoint-12",
    ]
    # one before each of them too, so that only healthy weights are kept
    assert [line["step"] for line in history if "loss" in line] == [2, 4, 5, 6, 7, 8, 10, 12]


@pytest.mark.jobs("guards-4", "reference-0")
def test_bfloat16_stays_close_and_the_loss_stays_in_float32(jobs):
    lines, exact = (
        [line["loss"] for line in run["history"] if "loss" in line]
        for run in (jobs["guards-4"]["bf16"], jobs["reference-0"]["curve"])
    )
    off = max(abs(a - b) for a, b in zip(lines, exact, strict=True))
    assert 2e-6 < off < 1e-2  # more than rounding in float32, little enough
    dots = Counter(
        re.findall(r"= (\w+)\[[\d,]*\]\S* dot\(", open(jobs["guards-4"]["bf16 program"]).read())
    )
    # 6 layers and 2 products of attention; 3 of the loss; each forward and twice backward
    assert dots == {"bf16": LAYERS * (6 + 2) * 3, "f32": 3}
    weights = SentenceEncoder.from_pretrained(
        f"{jobs['guards-4']['bf16']['out']}/model"
    ).state_dict()
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {
        torch.float32
    }


# ---- 2. counts


@each("run", 1, 4, 8)
def test_one_program_for_each_shape_and_one_execution_for_each_step(jobs, devices):
    "Schedules, log lines, evaluation, padding, triplets: none costs a program or an execution."
    found = jobs[f"run-{devices}"]
    shapes = {tuple(shape) for shape in found["shapes"]}
    programs = {(columns, T) for columns, T, _ in shapes}
    assert programs == {(2, 32), (2, 64), (3, 64)} and {(2, 64, True), (2, 64, False)} <= shapes
    logged = [line["step"] for line in found["all"]["history"] if "loss" in line]
    measured = [line["step"] for line in found["all"]["history"] if "eval_spearman" in line]
    assert (logged, measured) == ([4, 8, 12, 16, 20], [8, 16, 20])
    start = 1  # before step 0: weights and the optimiser's zeros are laid out
    assert found["counts"] == {
        "compilations": len(programs) + start,
        "executions": 20 + start,
        "fallbacks": 0,
    }
    assert found["programs"] == len(programs)


# ---- 3. what the programs hold

SHAPE = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")


def shapes_of(text):
    "name -> dimensions of what each operation of a program makes."
    return {
        m[1]: [int(d) for d in m[2].split(",") if d]
        for m in re.finditer(r"%([\w.-]+) = \w+\[([\d,]*)\]", text)
    }


def matmul_flops(text):
    "FLOPs of a program's matrix products, on one device."
    shape, total = shapes_of(text), 0
    for m in re.finditer(
        r"%([\w.-]+) = \S+ dot\(%([\w.-]+), %[\w.-]+\).*?lhs_contracting_dims=\{([\d,]+)\}", text
    ):
        total += (
            2 * math.prod(shape[m[1]]) * math.prod(shape[m[2]][int(d)] for d in m[3].split(","))
        )
    return total


def whole_batch(text, texts, T):
    "Operations with a value per token of the global batch on one device: texts * T or (texts, T)."
    found = [
        (m[1], m[2].split(","))
        for m in re.finditer(r"%([\w.-]+) = \(?(?:\w+\[\d*\]\S* )?\w+\[([\d,]*)\]", text)
    ]
    return [
        name for name, dims in found if str(texts * T) in dims or {str(texts), str(T)} <= {*dims}
    ]


def exchanged(text):
    "Operation -> what travels between devices: kind of number, dimensions."
    return {
        op: [
            (kind, tuple(int(d) for d in dims.split(",") if d))
            for results in re.findall(rf"= (\([^()=]*\)|\S+) {op}\(", text)
            for kind, _, dims in SHAPE.findall(results)
        ]
        for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    }


def floats(travels):
    return sum(math.prod(dims) for kind, dims in travels if kind == "f32")


def program(jobs, devices, kind):
    with open(jobs[f"step-{devices}"][f"{kind}"]["program"]) as file:
        return file.read()


@pytest.mark.parametrize("kind, C", [("bert pairs", 2), ("dropout pairs", 2), ("bert triplets", 3)])
@each("step", 2, 4, 8)
def test_each_device_multiplies_its_share(jobs, devices, kind, C):
    text = program(jobs, devices, kind)
    tokens = C * BATCH * LENGTH // devices
    candidates = (C - 1) * BATCH
    # for a token: projections, feed-forward, scores and their sum
    layer = 2 * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 4 * LENGTH * WIDTH
    scores = 2 * BATCH // devices * candidates * WIDTH  # of the loss
    # forward, and twice that backward
    assert matmul_flops(text) == 3 * (tokens * LAYERS * layer + scores)
    assert (
        xla.replicated_matmuls(text, C * BATCH * LENGTH)
        == []
        == whole_batch(text, C * BATCH, LENGTH)
    )


@pytest.mark.parametrize("kind", NEWER)
@each("step", 2, 4)
def test_newer_families_are_sharded_as_bert_is(jobs, devices, kind):
    "Rotary positions, windows, a causal order and the last token ask no device for other rows."
    text, plain = program(jobs, devices, kind), program(jobs, devices, "bert pairs")
    assert xla.replicated_matmuls(text, 2 * BATCH * LENGTH) == []
    assert whole_batch(text, 2 * BATCH, LENGTH) == []
    gathers = [floats(exchanged(program)["all-gather"]) for program in (text, plain)]
    # of a last token, the gradient of all embeddings travels once more, and no other state
    assert gathers[0] - gathers[1] == (2 * BATCH * WIDTH if "qwen3" in kind else 0)
    assert floats(exchanged(text)["all-to-all"]) == 0


@pytest.mark.parametrize("kind, C", [("bert pairs", 2), ("bert triplets", 3)])
@each("step", 2, 4, 8)
def test_what_travels_does_not_grow_with_the_devices(jobs, devices, kind, C):
    travels, candidates = exchanged(program(jobs, devices, kind)), (C - 1) * BATCH
    # all embeddings, to undo the interleaving, and their gradients, to redo it
    undone = 2 * C * BATCH * WIDTH
    # candidates for the scores, and again for the anchors' gradients
    assert floats(travels["all-gather"]) == undone + 2 * candidates * WIDTH
    # cutting triplets' columns
    assert floats(
        travels["all-to-all"] + travels["collective-permute"]
    ) <= 5 * candidates * WIDTH / 2 * (C == 3)
    assert travels["reduce-scatter"] == []

    sizes = Counter(
        tuple(sorted(p.shape))
        for name, p in make_encoder().named_parameters()
        if "pooler" not in name
    )
    reduced = Counter(tuple(sorted(dims)) for kind, dims in travels["all-reduce"] if kind == "f32")
    assert sizes <= reduced  # each gradient once
    rest = reduced - sizes
    assert rest.pop(tuple(sorted((candidates, WIDTH)))) == 1  # the candidates' gradients
    # the mean cosine is of the embeddings that every device has: it costs no exchange
    assert (WIDTH,) not in rest
    # softmax over columns, scalars
    assert {len(dims) for dims in rest} <= {0, 1}
    assert sum(n * math.prod(dims) for dims, n in rest.items()) <= 3 * BATCH + 6


@pytest.mark.jobs("guards-4")
def test_stock_layers_fail_the_same_check(jobs):
    found, kept = jobs["guards-4"], {}
    for name, path in found["programs"].items():
        text = open(path).read()
        kept[name] = (
            len(xla.replicated_matmuls(text, 2 * BATCH * LENGTH)),
            len(whole_batch(text, 2 * BATCH, LENGTH)),
            4 * floats(exchanged(text)["all-gather"]),
        )
    assert kept["ours"][:2] == (0, 0) and found["said"]["ours"] == "nothing"
    assert kept["norm"][0] > 0 and kept["norm"][1] > 0 and kept["norm"][2] > 50 * kept["ours"][2]
    assert (
        "3,072 token rows on each of 4 devices: the batch is not sharded there"
        in found["said"]["norm"]
    )
    # its products are sharded, its random numbers are not
    assert kept["dropout"][1] > 0 and kept["dropout"][0] == 0


def test_the_check_reads_programs():
    text = """  %param.1 = f32[512,32]{1,0} parameter(0)
  %dot.1 = f32[128,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %dot.2 = f32[32,64]{1,0} dot(%param.1, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %dot.3 = f32[8,512]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    assert xla.replicated_matmuls(text, 512) == ["dot.2", "dot.3"]
    assert xla.replicated_matmuls(text, 51) == []


# ---- 4. resume


@pytest.mark.jobs("run-4", "resume-4")
def test_a_resumed_run_is_the_same_run_bit_for_bit(jobs):
    whole, again = jobs["run-4"]["all"], jobs["resume-4"]
    # what a background thread meets ends the run
    assert jobs["run-4"]["broken"] == "OSError: no batch 13: the disk is gone"
    assert again["history"] == whole["history"] and again["weights"] == whole["weights"]
    assert again["metrics"]["steps"] == 20
    assert again["metrics"]["after"] == whole["metrics"]["after"]


@pytest.mark.jobs("run-4", "resume-2")
def test_it_can_resume_on_fewer_devices(jobs):
    whole, again = (
        [line for line in run["history"] if "loss" in line]
        for run in (jobs["run-4"]["all"], jobs["resume-2"])
    )
    assert again[:2] == whole[:2]  # until the checkpoint
    assert [line["loss"] for line in again] == pytest.approx(
        [line["loss"] for line in whole], abs=1e-6
    )


# ---- 5. dropout from a hash


def keep(p=0.5, step=0, layer=0, seed=0, rows=range(256), shape=(16, 32), device="cpu"):
    noise = xla.Noise(seed)
    noise.step = torch.tensor(step, dtype=torch.int32, device=device)
    noise.rows = torch.tensor(list(rows), dtype=torch.int32, device=device)
    return noise.keep(torch.zeros(len(noise.rows), *shape, device=device), p, layer)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_dropout_drops_its_rate(p, seed):
    for step, layer in ((0, 0), (1, 5), (540_000, 97)):
        kept = keep(p, step, layer, seed).double()
        assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
        # no row, unit or position is special
        for by_row in (kept.flatten(1).mean(1), kept.mean((0, 1)), kept.mean((0, 2))):
            spread = math.sqrt(p * (1 - p) / (kept.numel() / len(by_row)))
            assert (by_row - (1 - p)).abs().max() < 6.5 * spread
            assert 0.4 < by_row.std() / spread < 1.7


def test_dropout_masks_are_independent():
    base, rng = keep().double(), np.random.default_rng(0)
    others = {
        "layer": keep(layer=1),
        "step": keep(step=1),
        "seed": keep(seed=1),
        "far step": keep(step=2**20),
        "rows": keep(rows=range(256, 512)),
        "next row": base.roll(1, 0),
        "next position": base.roll(1, 1),
        "next unit": base.roll(1, 2),
        "two units": base.roll(2, 2),
        "layer for step": keep(step=1, layer=1),
        "chance": torch.from_numpy(rng.random(base.shape) < 0.5),
    }
    for name, other in others.items():
        a, b = base - base.mean(), other.double() - other.double().mean()
        assert abs((a * b).mean() / (a.std() * b.std())) * math.sqrt(base.numel()) < 4.5, name
    result = {
        keep(step=s, layer=n, rows=range(4)).numpy().tobytes() for s in range(20) for n in range(20)
    }
    assert len(result) == 400


def test_a_mask_belongs_to_the_row_not_to_its_place():
    rows = torch.randperm(256).tolist()
    assert torch.equal(keep(rows=rows), keep()[rows])
    assert torch.equal(keep(rows=range(32, 64)), keep()[32:64])  # what one of 8 devices holds


@each("step", 0, 1, 2, 4, 8)
def test_dropout_is_the_same_on_any_number_of_devices_and_in_eager(jobs, devices):
    off = jobs[f"step-{devices}"]["dropout pairs"]
    assert off["loss"] <= 1e-6 and off["worst"] < 1e-4
    assert abs(off["value"] - off["another seed"]) > 1e-3  # it matters which are dropped


def test_dropout_scales_and_sleeps_in_evaluation():
    noise = xla.Noise(3)
    noise.step, noise.rows = torch.tensor(5, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    layer = torch.nn.Dropout(0.25)
    layer.__class__, layer.noise, layer.layer = xla.HashDropout, noise, 2
    x = torch.rand(8, 5, 6, requires_grad=True)
    y = layer.train()(x)
    kept = noise.keep(x, 0.25, 2)
    assert torch.equal(y, torch.where(kept, x / 0.75, 0.0))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], kept / 0.75)
    assert layer.eval()(x) is x


# ---- 6. the directory


@pytest.mark.jobs("run-4")
def test_the_saved_model_opens_elsewhere(jobs):
    peers = pytest.importorskip("sentence_transformers")
    folder, expected = f"{jobs['run-4']['all']['out']}/model", np.array(jobs["run-4"]["embeddings"])
    assert SentenceEncoder.from_pretrained(folder).encode(TEXTS, progress=False) == pytest.approx(
        expected, abs=1e-6
    )
    assert peers.SentenceTransformer(folder, device="cpu").encode(TEXTS) == pytest.approx(
        expected, abs=1e-6
    )
    start = make_encoder().encode(TEXTS, progress=False)
    assert np.abs(expected - start).max() > 1e-3  # trained


# ---- 7. what is refused

SAID = {
    "two lengths": (
        "ValueError: the step needs more programs than its buckets and column counts allow (1)"
    ),
    "asking": "ValueError: the step reads a value from the device while it is being traced",
    "fallback": (
        "ValueError: operations of the step ran on the host (1 times) because XLA has no form of"
        " them"
    ),
    "replicated": "token rows on each of 4 devices: the batch is not sharded there",
    "lost": "ValueError: the loss became nan between steps 0 and 1; lower lr",
    "lost late": "ValueError: the loss became nan between steps 0 and 6; lower lr",
    "indivisible": "ValueError: global batch 18 is not divisible by 4 devices; use 16 or 20",
    "family": "ValueError: backbones of type electra were not checked under SPMD",
    "positions": "ValueError: bucket 128 is longer than the 64 positions of this backbone",
    "learned": "ValueError: learn_scale is for CPU and GPU; on XLA the loss is part of one",
    "tiled": "ValueError: tiled is for CPU and GPU; on XLA the loss is part of one compiled",
    "bf16": "nothing",
    "their checkpoint": (
        "training.pt: was written by another training loop or version, whose state has another"
        " form; resume with that one"
    ),
    "another model": "was trained with another configuration or other data (encoder.weights was",
    "claimed": "already holds a run; choose another directory",
    "lost before a checkpoint": "ValueError: the loss became nan between steps 0 and 2; lower lr",
    "other buckets": "was trained with buckets [16, 32, 64], now [64]; resume with the same",
    "not whole": "checkpoint-20/training.pt: is missing, so it is not as it was written",
    "an evaluation that asks the device": "nothing",
}


@pytest.mark.jobs("guards-4")
@pytest.mark.parametrize("name", SAID)
def test_refused_with_a_sentence(jobs, name):
    assert SAID[name] in jobs["guards-4"]["said"][name]


@pytest.mark.jobs("guards-4")
def test_what_is_refused_beforehand_leaves_no_directory(jobs):
    assert not {"indivisible", "positions", "family", "learned", "tiled"} & {
        *jobs["guards-4"]["there"]
    }


@pytest.mark.jobs("guards-4")
def test_no_checkpoint_is_made_of_lost_weights(jobs):
    assert jobs["guards-4"]["kept of the lost"] == 0


@pytest.mark.jobs("late-2")
def test_spmd_has_to_come_first(jobs):
    assert jobs["late-2"]["late"].startswith(
        "ValueError: a tensor is on an XLA device already, and SPMD has to come first; restart the"
        " kernel"
    )


@pytest.fixture
def broken_torch_xla(monkeypatch, tmp_path):
    "A torch_xla that cannot be imported, for a reason that may be given; no other is installed."

    def install(reason):
        (tmp_path / "torch_xla.py").write_text(f"raise ImportError({reason!r})")

    install("none")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    monkeypatch.setattr(xla, "find_spec", lambda name: None)
    monkeypatch.setattr(xla.metadata, "distributions", lambda name: [])
    return install


def test_what_to_do_without_torch_xla_is_a_short_sentence(monkeypatch, broken_torch_xla):
    "The advice fits this Python and this machine; a long text of the linker is cut."
    python = {"version": (3, 13)}
    monkeypatch.setattr(
        xla,
        "pair_arguments",
        lambda chips: pair_arguments(chips, python["version"], "Linux x86_64"),
    )
    broken_torch_xla("/long/path/_XLAC.so: undefined symbol: _ZN3c10" + "x" * 900)
    for chips in (0, 1):
        monkeypatch.setattr(xla, "tpu_chips", lambda: chips)
        with pytest.raises(ValueError) as caught:
            xla.start()
        text = str(caught.value)
        assert "(_XLAC.so: undefined symbol" in text
        assert "torch==2.9.0+cpu torch_xla==2.9.0" in text
        assert ("libtpu==0.0.21.1" in text) == bool(chips) and len(text) <= 330
    python["version"] = (3, 14)
    with pytest.raises(
        ValueError, match="has wheels for Linux on x86-64 and Python 3.11 to 3.13, not for"
    ):
        xla.start()


def test_a_torch_xla_of_another_release_is_named_although_it_cannot_be_imported(
    monkeypatch, broken_torch_xla
):
    "Its library asks for a symbol that this torch has not: the versions say more than the linker."
    monkeypatch.setattr(
        xla.metadata, "distributions", lambda name: [SimpleNamespace(version="1.13.0")]
    )
    sentence = "torch_xla 1.13.0 does not fit torch .*; install the same version"
    with pytest.raises(ValueError, match=sentence):
        xla.start()


def test_the_successor_alone_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    monkeypatch.setattr(xla, "find_spec", lambda name: name == "torch_tpu")
    with pytest.raises(
        ValueError, match="torch_tpu is installed, which contrastive_st was never tried with"
    ):
        xla.start()


def test_the_cpu_of_a_machine_with_a_tpu_is_said_loudly(monkeypatch):
    monkeypatch.setattr(xla, "tpu_chips", lambda: 4)
    with pytest.warns(
        UserWarning,
        match=r"has a TPU \(4 chips\), but XLA computes on its CPU.* remove PJRT_DEVICE",
    ):
        xla.warn_if_on_cpu("CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla.warn_if_on_cpu("TPU")
        monkeypatch.setattr(xla, "tpu_chips", lambda: 0)
        xla.warn_if_on_cpu("CPU")


@pytest.mark.parametrize(
    "module, said",
    [
        (None, r"torch_xla cannot be imported .* pip install torch==2\.9\.0"),
        (
            SimpleNamespace(__version__="1.13.0"),
            r"torch_xla 1\.13\.0 does not fit torch \d.*; install the same version of both",
        ),
    ],
)
def test_without_torch_xla_or_with_another(monkeypatch, tmp_path, module, said):
    monkeypatch.setitem(sys.modules, "torch_xla", module)
    for call in (
        xla.start,
        xla.counters,
        lambda: xla.train(
            make_encoder(), make_mixture(tmp_path / "cache"), TrainConfig(), tmp_path / "run"
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not (tmp_path / "run").exists()


# ---- the parts that need no devices


@pytest.fixture
def batches(tmp_path):
    return xla_child.kinds(make_mixture(tmp_path), Tokens(make_tokenizer(), LENGTH, (16, 32, 64)))


@pytest.mark.parametrize(
    "family, kind",
    [(f, k) for f in FAMILIES for k in ("pairs", "triplets", "full")[: 1 if f in NEWEST else 3]],
)
def test_embed_is_the_encoders_forward(batches, family, kind):
    batch, encoder = batches[kind], make_encoder(family).eval()
    encoder.layout = "padded"  # as XLA does; packed, MPNet rounds its scores in another order
    expected = encoder(batch.token_ids, batch.lengths)
    xla.shardable(encoder.backbone, xla.Noise())
    for devices in (1, 2, 8):
        arrays = xla.lay_out(batch, LENGTH, devices)
        got = xla.embed(encoder, arrays["input_ids"], arrays["lengths"])
        rows = arrays["rows"].long()
        assert torch.allclose(got, expected[rows], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_shardable_and_back_leave_the_weights_alone(family):
    encoder = make_encoder(family, dropout=0.1)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # attention's too
        if family in ("modernbert", "qwen3") and hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1

    def rates():
        names = ("p", "attention_dropout")
        return [(type(m), *map(vars(m).get, names)) for m in encoder.modules()]

    before, kinds = encoder.state_dict(), rates()
    noise = xla.Noise()
    xla.shardable(xla.shardable(encoder.backbone, noise), noise)  # twice is once
    assert not any(type(m) in (torch.nn.LayerNorm, torch.nn.Dropout) for m in encoder.modules())
    dropped = [
        name for name, m in encoder.named_modules() if isinstance(m, torch.nn.Dropout) and not m.p
    ]
    numbers = [m for m in encoder.modules() if hasattr(m, "attention_dropout")]
    if family in ("modernbert", "qwen3"):  # a number of the attention, no layer
        assert not dropped and [m.attention_dropout for m in numbers] == [0.0] * LAYERS
    else:
        assert len(dropped) == LAYERS and all("attention" in name for name in dropped)
    assert encoder.state_dict().keys() == before.keys()
    assert all(
        v is encoder.state_dict()[k] or torch.equal(v, encoder.state_dict()[k])
        for k, v in before.items()
    )
    xla.plain(encoder.backbone)
    assert rates() == kinds


@pytest.mark.parametrize(
    "dtype, off", [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_layer_norm_is_the_layer_norm(dtype, off):
    stock = torch.nn.LayerNorm(48, eps=1e-12).to(dtype)
    with torch.no_grad():
        stock.weight.uniform_(0.5, 1.5), stock.bias.uniform_(-1, 1)
    x = (torch.randn(4, 7, 48) * 3 + 5).to(dtype).requires_grad_()
    results = []
    for kind in (torch.nn.LayerNorm, xla.ShardableLayerNorm):
        stock.__class__ = kind
        y = stock(x)
        results.append(
            (y, *torch.autograd.grad(y.float().square().sum(), (x, stock.weight, stock.bias)))
        )
        assert y.dtype == dtype
    for a, b in zip(*results):
        assert (a - b).abs().max() <= off * a.abs().max()


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_a_layout_holds_the_batch_and_can_be_undone(batches, kind):
    batch = batches[kind]
    B, C = batch.identities.shape
    alone = xla.lay_out(batch, LENGTH)
    for devices in (1, 2, 3, 4, 6, 8, 12, 24):
        arrays = xla.lay_out(batch, LENGTH, devices)
        rows = arrays["rows"].long()
        assert sorted(rows.tolist()) == list(range(C * B)) and arrays["rows"].dtype == torch.int32
        for name in ("input_ids", "lengths"):
            assert torch.equal(arrays[name], alone[name][rows])
        owners = (rows % B).view(devices, -1) // (B // devices)
        # all texts of a row on one device
        assert torch.equal(owners, torch.arange(devices)[:, None].expand_as(owners))
        real = torch.arange(LENGTH) < arrays["lengths"][:, None]
        assert sorted(arrays["input_ids"][real].tolist()) == sorted(batch.token_ids.tolist())
        assert not arrays["input_ids"][~real].any()
    with pytest.raises(
        ValueError, match="global batch 24 is not divisible by 5 devices; use 20 or 25"
    ):
        xla.lay_out(batch, LENGTH, 5)


def test_dropout_gives_the_same_loss_for_any_layout(batches):
    batch = batches["pairs"]
    encoder = make_encoder(dropout=0.2).train()
    noise = xla.Noise(11)
    config = TrainConfig()
    xla.shardable(encoder.backbone, noise)
    found = []
    for devices in (1, 2, 8):
        arrays = xla.lay_out(batch, LENGTH, devices)
        noise.rows, noise.step = arrays["rows"], torch.tensor(9, dtype=torch.int32)
        vectors = xla.embed(encoder, arrays["input_ids"], arrays["lengths"])
        found.append(
            batch_loss(vectors[arrays["rows"].argsort()], batch.identities, config)[0].item()
        )
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_an_unknown_backbone_is_refused():
    message = (
        "backbones of type electra were not checked under SPMD; use one of bert, roberta,"
        " xlm-roberta, distilbert, mpnet, modernbert, qwen3"
    )
    with pytest.raises(ValueError, match=message):
        xla.shardable(make_encoder("electra").backbone, xla.Noise())
