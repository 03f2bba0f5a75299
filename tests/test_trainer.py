"""The training loop against a plain loop and the peer; resuming, stopping, several processes."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_backbone, make_tokenizer, sentences
from datasets import Dataset
from transformers import BertConfig, BertModel, TrainerCallback

from contrastive_st import cpu, trainer
from contrastive_st.data import Source, prepare
from contrastive_st.gradcache import split_batch
from contrastive_st.mixture import Mixture, as_mixture
from contrastive_st.model import SentenceEncoder, add_adapters
from contrastive_st.run import Stopped, TrainConfig, check_health, last_checkpoint, lr_factor
from contrastive_st.tokens import Tokens
from contrastive_st.trainer import train

RECORDS = {
    "run.json",
    "config.json",
    "data_config.json",
    "versions.json",
    "metrics.json",
    "history.json",
    "mixture.json",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    "The loop tells TensorBoard its folder through the environment; put it back."
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")


# ---- hand-made input ----


def make_encoder(dropout=0.0):
    "The tiny encoder of conftest, the same weights each time."
    tokenizer = make_tokenizer()
    encoder = SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
    return encoder


def make_source(columns=2, rows=40, name="pairs", seed=1, copies=1):
    "A source in memory; with copies > 1 each anchor and positive recurs beside other partners."
    texts = sentences(rows * columns, seed)
    names = ["anchor", "positive", "negative", *(f"negative_{k}" for k in range(2, columns - 1))]
    names = names[:columns]
    table = {name: texts[i * rows : (i + 1) * rows] for i, name in enumerate(names)}
    if copies > 1:
        table["anchor"] = [table["anchor"][i // copies] for i in range(rows)]
        table["positive"] = [
            table["positive"][(i // copies + i % copies) % (rows // copies)] for i in range(rows)
        ]
    return Source(Dataset.from_dict(table), name)


def make_mixture(columns=2, batch_size=8, datasets_per_batch=1, seed=0, **source):
    return Mixture([make_source(columns, **source)], [1.0], batch_size, datasets_per_batch, seed)


def make_pairs_and_triplets(**source):
    return Mixture(
        [make_source(**source), make_source(3, name="triplets", seed=2)], [1.0, 1.0], 8, 1
    )


def make_two_files(batch_size=8, datasets_per_batch=1, seed=0, **source):
    return Mixture(
        [make_source(**source), make_source(name="more", seed=3)],
        [1.0, 1.0],
        batch_size,
        datasets_per_batch,
        seed,
    )


def config(steps=4, **changes):
    return TrainConfig(**{"steps": steps, "warmup": 0, "lr": 1e-3, "log_every": 1} | changes)


def train_tiny(out, c=None, mixture=None, dropout=0.0, **options):
    "Train the tiny encoder into a directory; return it."
    encoder = make_encoder(dropout)
    train(encoder, mixture or make_mixture(), c or config(), out, progress=False, **options)
    return encoder


def weights(encoder):
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def read(out, name):
    "A record, as strict JSON: NaN and Infinity are no JSON."

    def refuse(word):
        raise AssertionError(f"{name}.json holds {word}, which other JSON readers refuse")

    return json.loads(
        (Path(out) / f"{name}.json").read_text(encoding="utf-8"), parse_constant=refuse
    )


def losses(out):
    return {line["step"]: line["loss"] for line in read(out, "history") if "loss" in line}


def checkpoints(out):
    return sorted(
        int(p.name.split("-")[1]) for p in (Path(out) / "checkpoints").glob("checkpoint-*")
    )


class Crash(Exception):
    "What an interrupted run ends with."


class At(TrainerCallback):
    "Call `action(control, model)` when `step` steps are done."

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(control, model)


def crash(control, model):
    raise Crash


def stop(control, model):
    control.should_training_stop = True


def poison(control, model):
    with torch.no_grad():
        model.backbone.embeddings.LayerNorm.weight[0] = float("nan")


class Scores:
    "An evaluation whose answers are known beforehand: the first is given before training."

    def __init__(self, *values, name="score"):
        self.values, self.name, self.seen = list(values), name, []

    def __call__(self, encoder):
        self.seen.append(weights(encoder))
        return {self.name: self.values[min(len(self.seen), len(self.values)) - 1]}


# ---- the same numbers as a loop written by hand ----


def plain_loss(columns, texts, scale, symmetric, similarity, mask_same):
    "InfoNCE with loops over rows and columns; texts as (B, C) strings."
    if similarity == "cos":
        columns = [F.normalize(c, dim=-1) for c in columns]
    B, known = len(texts), {}
    for row in texts:
        known.setdefault(row[0], {row[0]}).add(row[1])
    candidates = (
        torch.cat([columns[1], torch.stack(columns[2:], 1).flatten(0, 1)])
        if len(columns) > 2
        else columns[1]
    )
    candidate_texts = [row[1] for row in texts] + [text for row in texts for text in row[2:]]
    scores = scale * columns[0] @ candidates.T
    if mask_same:
        banned = [
            [n != i and candidate_texts[n] in known[texts[i][0]] for n in range(len(candidates))]
            for i in range(B)
        ]
        scores = scores.masked_fill(torch.tensor(banned), -math.inf)
    there = sum(scores[i].logsumexp(0) - scores[i, i] for i in range(B)) / B
    back = (
        sum(scores[:, i].logsumexp(0) - scores[i, i] for i in range(B)) / B
        if symmetric and len(columns) == 2
        else there
    )
    return (there + back) / 2


def plain_loop(encoder, mixture, c):
    "Train without the library's loop, loss, schedule or layout; return the loss of each step."
    decay = [p for p in encoder.parameters() if p.ndim > 1]
    rest = [p for p in encoder.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=c.lr,
    )
    encoder.train()
    found = []
    for step in range(c.steps):
        texts = mixture.batch(step).examples
        columns = []
        for column in zip(*texts):
            cut = encoder.tokenizer(
                list(column), padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            columns.append(encoder.embed(cut["input_ids"], cut["attention_mask"]))
        loss = sum(
            plain_loss(
                [x[:, :w] for x in columns], texts, c.scale, c.symmetric, c.similarity, c.mask_same
            )
            for w in c.widths or (None,)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), c.clip)
        up, down = (step + 1) / c.warmup if c.warmup else 1, (c.steps - step) / (c.steps - c.warmup)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * min(up, down, 1)
        optimizer.step()
        found.append(loss.item())
    return found


def distance(one, other, start):
    "How far two states are apart, in shares of their way; key biases are noise, and left out."
    names = [n for n in start if not n.endswith("key.bias")]
    apart = sum((one[n] - other[n]).square().sum() for n in names).sqrt()
    return float(apart / sum((one[n] - start[n]).square().sum() for n in names).sqrt())


@pytest.mark.parametrize(
    "columns, copies, changes",
    [
        (2, 1, {}),
        (2, 1, {"symmetric": False}),
        (3, 1, {}),
        (4, 1, {"symmetric": False, "warmup": 2}),
        (2, 4, {}),
        (2, 4, {"mask_same": False}),
        (2, 4, {"symmetric": False}),
        (3, 4, {}),
        (3, 4, {"mask_same": False}),
        (2, 1, {"widths": (8, 32)}),
        (3, 4, {"widths": (4, 16, 32)}),
        (2, 1, {"widths": (8,), "symmetric": False}),
        (2, 1, {"similarity": "dot", "scale": 5.0}),
        (2, 1, {"clip": 0.05, "weight_decay": 0.5, "warmup": 3}),
    ],
)
def test_losses_and_weights_equal_a_plain_loop(tmp_path, columns, copies, changes):
    c, mixture = config(5, **changes), make_mixture(columns, copies=copies)
    ours, plain = make_encoder(), make_encoder()
    start = weights(ours)
    train(ours, mixture, c, tmp_path, progress=False)
    expected = plain_loop(plain, mixture, c)
    assert list(losses(tmp_path).values()) == pytest.approx(expected, rel=1e-5)
    # Adam lets rounding grow where gradients are near zero: of the layout, of the fused kernel
    assert distance(weights(ours), weights(plain), start) < 5e-3
    masked, left = (
        [line[name] for line in read(tmp_path, "history") if "loss" in line]
        for name in ("masked", "negatives")
    )
    if copies > 1:
        assert all(m > 0 for m in masked) if c.mask_same else not any(masked)
    assert [m + n for m, n in zip(masked, left)] == pytest.approx([8 * (columns - 1) - 1] * 5)


def test_losses_equal_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import SequentialSampler

    steps, B, mixture = 5, 8, make_mixture(3)
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "start")
    train(
        encoder,
        mixture,
        config(steps, mask_same=False, symmetric=False),
        tmp_path / "ours",
        progress=False,
    )

    def in_order(dataset, batch_size, drop_last, **_):
        return DefaultBatchSampler(
            SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last
        )

    rows = [example for step in range(steps) for example in mixture.batch(step).examples]
    peer = st.SentenceTransformer(str(tmp_path / "start"), device="cpu")
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "peer"),
        per_device_train_batch_size=B,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler=in_order,
        optim="adamw_torch",
    )
    job = st.SentenceTransformerTrainer(
        model=peer,
        args=args,
        train_dataset=Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), zip(*rows)))),
        loss=MultipleNegativesRankingLoss(peer, scale=20.0),
    )
    job.train()
    theirs = [line["loss"] for line in job.state.log_history if "loss" in line]
    assert len(theirs) == steps
    assert list(losses(tmp_path / "ours").values()) == pytest.approx(theirs, abs=1e-4)
    text = sentences(10, 99)
    np.testing.assert_allclose(encoder.encode(text, progress=False), peer.encode(text), atol=1e-4)


# ---- schedule and optimiser ----


def test_the_optimiser_uses_the_schedule_and_spares_vectors_from_decay(tmp_path):
    rates, groups = [], {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append({g["lr"] for g in optimizer.param_groups})
            groups.update(
                {g["weight_decay"]: {p.ndim for p in g["params"]} for g in optimizer.param_groups}
            )
            assert isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW)

    train_tiny(tmp_path, config(7, warmup=3, weight_decay=0.1), callbacks=[Look()])
    assert [len(r) for r in rates] == [1] * 7
    assert [r.pop() for r in rates] == pytest.approx([1e-3 * lr_factor(s, 7, 3) for s in range(7)])
    assert groups == {0.1: {2}, 0.0: {1}}


def test_same_call_same_weights_and_the_seed_is_of_dropout(tmp_path):
    after = []
    for i, seed in enumerate((3, 3, 4)):
        encoder = make_encoder(dropout=0.1)
        torch.rand(i)  # the caller's random state must not matter
        train(encoder, make_mixture(), config(3, seed=seed), tmp_path / str(i), progress=False)
        after.append(weights(encoder))
    assert all(torch.equal(after[0][n], after[1][n]) for n in after[0])
    assert any(not torch.equal(after[0][n], after[2][n]) for n in after[0])


def test_bf16_trains_in_fp32_weights_near_the_fp32_losses(tmp_path):
    for name, bf16 in (("fp32", False), ("bf16", True)):
        encoder = make_encoder()
        train(encoder, make_mixture(), config(4, bf16=bf16), tmp_path / name, progress=False)
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    full, half = (list(losses(tmp_path / n).values()) for n in ("fp32", "bf16"))
    assert half != full and half == pytest.approx(full, rel=0.05)


def test_bf16_leaves_the_encoder_as_it_was(tmp_path):
    "Measured, used and saved is one and the same float32 encoder."
    encoder, seen = make_encoder(), []

    def evaluate(e):
        seen.append(e.encode(["a dog in the rain"], progress=False))
        return {"score": float(seen[-1][0, 0])}

    metrics = train(
        encoder,
        make_mixture(),
        config(3, bf16=True, eval_every=1),
        tmp_path,
        evaluate,
        progress=False,
    )
    saved = SentenceEncoder.from_pretrained(tmp_path / "model").encode(
        ["a dog in the rain"], progress=False
    )
    np.testing.assert_allclose(seen[-1], saved, atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode(["a dog in the rain"], progress=False), saved, atol=1e-6
    )
    assert metrics["after"]["score"] == pytest.approx(float(saved[0, 0]), abs=1e-6)
    assert "forward" not in vars(encoder)


def test_without_bf16_arithmetic_a_run_is_in_float32_and_says_so(tmp_path, monkeypatch):
    train_tiny(tmp_path / "fp32", config(3))
    monkeypatch.setattr(trainer, "has_bf16", lambda kind: False)
    with pytest.warns(
        UserWarning, match="this cpu has no bfloat16 arithmetic; training in float32"
    ):
        train_tiny(tmp_path / "bf16", config(3, bf16=True))
    assert losses(tmp_path / "bf16") == losses(tmp_path / "fp32")
    assert read(tmp_path / "bf16", "versions")["compute"]["dtype"] == "float32"
    assert read(tmp_path / "bf16", "config")["bf16"] is True


# ---- what computes ----


def pretend(monkeypatch, slow, error):
    "A processor on which MKL is slow or not, and the error of oneDNN's products."
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: slow)
    monkeypatch.setattr(cpu, "onednn_error", lambda: error)


@pytest.mark.parametrize("slow, chosen", [(True, "onednn"), (False, "default")])
def test_what_multiplies_float32_is_chosen_for_the_run_and_recorded(
    tmp_path, monkeypatch, slow, chosen
):
    pretend(monkeypatch, slow, 1e-6)
    during = []

    def evaluate(e):
        during.append(torch.get_float32_matmul_precision())
        return {}

    train_tiny(tmp_path, config(2), evaluate=evaluate)
    assert read(tmp_path, "versions")["compute"]["matmul"] == chosen
    assert set(during) == {"medium" if chosen == "onednn" else "highest"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_onednn_in_a_lower_precision_is_refused_before_the_directory_is_taken(
    tmp_path, monkeypatch
):
    pretend(monkeypatch, True, 2e-3)
    with pytest.raises(
        ValueError, match="float32 products have a relative error of 2e-03; use 'auto' or 'default'"
    ):
        train_tiny(tmp_path / "run", config(2, matmul="onednn"))
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_caller_set_stays_and_is_recorded(tmp_path, monkeypatch):
    pretend(monkeypatch, True, 1e-6)
    torch.set_float32_matmul_precision("high")
    try:
        train_tiny(tmp_path, config(2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    compute = read(tmp_path, "versions")["compute"]
    assert (compute["matmul"], compute["matmul_precision"]) == ("default", "high")


def test_the_precision_is_given_back_when_a_run_fails(tmp_path, monkeypatch):
    pretend(monkeypatch, True, 1e-6)
    with pytest.raises(Crash):
        train_tiny(tmp_path, config(3), callbacks=[At(1, crash)])
    assert torch.get_float32_matmul_precision() == "highest"


def test_fused_adamw_is_used_and_is_adamw(tmp_path):
    used, after = [], []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            used.append({bool(g["fused"]) for g in optimizer.param_groups})

    for fused in (True, False):
        encoder = make_encoder()
        start = weights(encoder)
        train(
            encoder,
            make_mixture(),
            config(4, fused=fused, weight_decay=0.1),
            tmp_path / str(fused),
            callbacks=[Look()],
            progress=False,
        )
        after.append(weights(encoder))
        assert read(tmp_path / str(fused), "versions")["compute"]["fused"] is fused
    assert used == [{True}] * 4 + [{False}] * 4 and distance(*after, start) < 5e-3
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


def test_a_run_says_in_one_line_what_computes(tmp_path, capsys):
    train(
        make_encoder(),
        make_mixture(),
        config(2, chunk_tokens=5000, matmul="default"),
        tmp_path,
        progress=True,
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("computing")]
    assert lines == [
        "computing on cpu: packed texts, float32 by default (highest), fused AdamW,"
        " 5,000 tokens at a time"
    ]
    assert read(tmp_path, "versions")["compute"] == {
        "device": "cpu",
        "layout": "packed",
        "dtype": "float32",
        "matmul": "default",
        "matmul_precision": "highest",
        "fused": True,
        "chunk_tokens": 5000,
    }


# ---- batches larger than the memory ----


def forwards(encoder):
    "A list that grows by (texts, tokens) with each call of the encoder in training."
    calls = []
    encoder.register_forward_pre_hook(
        lambda module, args: calls.append((len(args[1]), len(args[0]))) if module.training else None
    )
    return calls


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"widths": (8, 32)}])
def test_chunks_change_the_memory_not_the_losses(tmp_path, changes):
    for name, chunk_tokens in (("plain", 0), ("chunks", 60), ("texts", 1)):
        encoder = make_encoder()
        calls = forwards(encoder)
        train(
            encoder,
            make_pairs_and_triplets(copies=2),
            config(4, chunk_tokens=chunk_tokens, **changes),
            tmp_path / name,
            progress=False,
        )
        assert (len(calls) == 4) == (name == "plain")
        assert name != "chunks" or max(tokens for _, tokens in calls) <= 60
        assert name != "texts" or {texts for texts, _ in calls} == {1}
    exact = 1e-5 if not changes.get("bf16") else 1e-2
    plain = [
        [line[k] for k in ("loss", "grad_norm", "masked", "negatives", "mean_cosine")]
        for line in read(tmp_path / "plain", "history")
        if "loss" in line
    ]
    for name in ("chunks", "texts"):
        lines = [
            [line[k] for k in ("loss", "grad_norm", "masked", "negatives", "mean_cosine")]
            for line in read(tmp_path / name, "history")
            if "loss" in line
        ]
        assert np.array(lines) == pytest.approx(np.array(plain), rel=10 * exact)
        assert [v[0] for v in lines] == pytest.approx([v[0] for v in plain], rel=exact)


def test_a_chunked_run_resumes_exactly(tmp_path):
    c = config(6, chunk_tokens=50, save_every=2)
    whole = make_encoder(dropout=0.1)
    parts = make_encoder(dropout=0.1)
    train(whole, make_pairs_and_triplets(), c, tmp_path / "whole", progress=False)
    train_tiny(
        tmp_path / "parts",
        c,
        mixture=make_pairs_and_triplets(),
        dropout=0.1,
        callbacks=[At(3, stop)],
    )
    torch.manual_seed(99)
    train(parts, make_pairs_and_triplets(), c, tmp_path / "parts", resume=True, progress=False)
    assert all(torch.equal(v, weights(parts)[n]) for n, v in weights(whole).items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def kept_bytes(encoder, tokens, length):
    "Bytes that autograd keeps for so many tokens, each storage once, weights left out."
    kept, own = {}, {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoder.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # stays alive, and with it what was kept
        embeddings = encoder(torch.full((tokens,), 7), torch.full((tokens // length,), length))
    encoder.eval()
    return sum(kept.values()) + 0 * len(embeddings)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("length", [16, 64])
def test_by_default_a_batch_keeps_about_two_gibibytes(layout, bf16, length):
    shape = BertConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    encoder = SentenceEncoder(BertModel(shape), make_tokenizer(), max_length=64)
    encoder.layout = layout
    chosen = trainer.choose_arithmetic(encoder, config(bf16=bf16), "cpu")["chunk_tokens"]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        each = kept_bytes(encoder, 2048, length) / 2048
    assert 0.5 * 2**31 < chosen * each < 1.7 * 2**31


def test_by_default_a_thousand_long_pairs_go_in_chunks(monkeypatch):
    "MiniLM by its shape; 1,024 pairs of 250 tokens are 512,000."

    class Shape:
        num_hidden_layers, hidden_size = 6, 384

    class Like:
        layout, backbone = "packed", type("Backbone", (), {"config": Shape})

    def chunk(bf16):
        return trainer.choose_arithmetic(Like, config(bf16=bf16), "cpu")["chunk_tokens"]

    monkeypatch.setattr(trainer, "has_bf16", lambda device: True)
    assert (chunk(bf16=False), chunk(bf16=True)) == (9 * 1024, 18 * 1024)
    Shape.num_hidden_layers, Shape.hidden_size = 96, 12288
    assert chunk(bf16=False) == 1024  # never nothing


# ---- waiting for input ----


def waiting(out, batch, step, passes, workers=0):
    "The shares of waiting of a run whose batches and steps take so long; evaluation is neither."
    mixture, encoder = make_mixture(), make_encoder()
    make = mixture.batch

    def slowed(*args):
        if len(args) > 1:
            passes(batch)
        return make(*args)

    mixture.batch = slowed
    encoder.register_forward_pre_hook(
        lambda module, args: passes(step) if module.training else None
    )

    def evaluate(e):
        passes(0.1)
        return {"score": 0.0}

    train(
        encoder,
        mixture,
        config(6, workers=workers, eval_every=2, matmul="default"),
        out,
        evaluate,
        progress=False,
    )
    lines = read(out, "history")
    shares = [line["input_share"] for line in lines if "loss" in line]
    assert all(0 <= share <= 1 for share in shares) and len(shares) == 6
    return lines[-1]["train_input_share"], np.mean(shares)


def test_a_run_knows_its_share_of_waiting(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    assert waiting(tmp_path / "slow", 0.75, 0.25, passes) == pytest.approx((0.75, 0.75))
    assert waiting(tmp_path / "fast", 0.25, 0.75, passes) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_mixture_is_waited_for_and_a_fast_one_is_not(tmp_path, workers):
    slow = waiting(tmp_path / "slow", 0.3, 0.0, time.sleep, workers)
    fast = waiting(tmp_path / "fast", 0.0, 0.3, time.sleep, workers)
    # how much is waited for depends on what else the machine does
    assert min(slow) > 2 * max(fast) and max(fast) < 0.15, (slow, fast)


# ---- resume ----


class Asked(list):
    "Steps, and the threads that asked for them."

    def __init__(self):
        self.threads = set()


def counted(mixture, whole=False):
    "The mixture, and the steps that the loop asks for, or the slice that the account looks at."
    asked, batch = Asked(), mixture.batch

    def ask(step, *part):
        if whole != bool(part):
            asked.append(step)
            asked.threads.add(threading.current_thread().name)
        return batch(step, *part)

    mixture.batch = ask
    return mixture, asked


@pytest.mark.parametrize(
    "way, changes",
    [
        (stop, {}),
        (crash, {}),
        (crash, {"bf16": True}),
        (stop, {"bf16": True, "warmup": 5}),
        (crash, {"eval_every": 2, "save_every": 0, "metric": "score"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, way, changes):
    c = config(8, **{"save_every": 2, "weight_decay": 0.01, "workers": 0} | changes)
    mixed = make_pairs_and_triplets
    assert {len(mixed().batch(s).examples[0]) for s in range(4, 8)} == {2, 3}

    def evaluate(e):
        return {"score": float(e.encode(["a dog", "the rain in the street"], progress=False)[0, 0])}

    whole, parts = make_encoder(dropout=0.1), make_encoder(dropout=0.1)
    mixture, asked = counted(mixed())
    train(whole, mixture, c, tmp_path / "whole", evaluate, progress=False)
    assert asked == list(range(8))

    mixture, asked = counted(mixed())
    try:
        train(
            parts, mixture, c, tmp_path / "parts", evaluate, callbacks=[At(5, way)], progress=False
        )
    except Crash:
        pass
    assert asked == list(range(5)) and last_checkpoint(tmp_path / "parts").endswith("checkpoint-4")
    parts = make_encoder(dropout=0.1)  # a new process knows nothing but the run directory
    torch.manual_seed(12345)
    mixture, asked = counted(mixed())
    metrics = train(parts, mixture, c, tmp_path / "parts", evaluate, resume=True, progress=False)
    assert asked == list(range(4, 8))  # nothing is replayed, nothing is left out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "parts")) == list(range(1, 9))
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
    there = read(tmp_path / "whole", "metrics")
    assert {k: there[k] for k in ("before", "after", "test", "steps", "best_step")} == {
        k: metrics[k] for k in ("before", "after", "test", "steps", "best_step")
    }


def feeding():
    "The background threads that make batches."
    return [t for t in threading.enumerate() if t.name.startswith("feed")]


def test_workers_change_nothing_and_may_change(tmp_path):
    "Batches made by no, one or three threads: the same run, even if a resume changes the number."
    after, before = {}, set(feeding())
    for workers in (0, 1, 3):
        encoder, (mixture, asked) = make_encoder(dropout=0.1), counted(make_pairs_and_triplets())
        train(encoder, mixture, config(8, workers=workers), tmp_path / str(workers), progress=False)
        assert sorted(asked) == list(range(8)) and set(feeding()) <= before
        assert {name.startswith("feed") for name in asked.threads} == {workers > 0}
        assert len(asked.threads) <= max(workers, 1)
        after[workers] = weights(encoder)
    with pytest.raises(Crash):
        train_tiny(
            tmp_path / "parts",
            config(8, workers=1, save_every=2),
            mixture=make_pairs_and_triplets(),
            dropout=0.1,
            callbacks=[At(5, crash)],
        )
    encoder, (mixture, asked) = make_encoder(dropout=0.1), counted(make_pairs_and_triplets())
    train(
        encoder,
        mixture,
        config(8, workers=3, save_every=2),
        tmp_path / "parts",
        resume=True,
        progress=False,
    )
    assert sorted(asked) == list(range(4, 8))
    for other in (1, 3):
        assert all(torch.equal(v, after[other][n]) for n, v in after[0].items())
    assert all(torch.equal(v, weights(encoder)[n]) for n, v in after[0].items())
    assert (
        losses(tmp_path / "0")
        == losses(tmp_path / "1")
        == losses(tmp_path / "3")
        == losses(tmp_path / "parts")
    )
    assert "workers" not in read(tmp_path / "0", "config")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_that_stops_early_leaves_no_thread_and_reads_little_ahead(tmp_path, workers):
    before, (mixture, asked) = set(feeding()), counted(make_mixture())
    train_tiny(tmp_path, config(50, workers=workers), mixture=mixture, callbacks=[At(2, stop)])
    assert set(feeding()) <= before and set(asked) >= {0, 1} and len(asked) <= 3 + 2 * workers


def token_stores(folder, tokens):
    "A prepared dataset with the tokens of `tokens`, and a function that opens it as a mixture."
    rows = list(zip(sentences(40, 1), sentences(40, 2)))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        [{"name": "pairs.jsonl", "path_or_hub_id": folder / "pairs.jsonl"}],
        folder / "stores",
        progress=False,
    )
    tokens.prepare(folder / "stores" / "pairs.jsonl.store")
    return lambda: Mixture.from_config(
        [{"name": "pairs.jsonl", "weight": 1}],
        folder / "stores",
        batch_size=8,
        datasets_per_batch=1,
    )


def test_a_run_on_stored_tokens_is_the_run_on_texts(tmp_path):
    after, tokens = [], Tokens(make_tokenizer(), 64)
    mixture = token_stores(tmp_path, tokens)()
    texts = Mixture.from_config(
        [{"name": "pairs.jsonl", "weight": 1}],
        tmp_path,
        batch_size=8,
        datasets_per_batch=1,
        cache_dir=tmp_path / "cache",
    )
    assert mixture.sources[0].store.tokenised and not texts.sources[0].store.tokenised
    for name, m in (("stored", mixture), ("texts", texts)):
        encoder = make_encoder()
        train(encoder, m, config(4), tmp_path / name, progress=False)
        after.append(weights(encoder))
    assert all(torch.equal(v, after[1][n]) for n, v in after[0].items())
    assert read(tmp_path / "stored", "mixture") == read(tmp_path / "texts", "mixture")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_store_stops_the_run_and_says_why(tmp_path, workers):
    "The file is damaged after the run has begun: the first batch that needs it fails in a worker."
    before, mixture = set(feeding()), token_stores(tmp_path, Tokens(make_tokenizer(), 64))()
    shard = tmp_path / "stores" / "pairs.jsonl.store" / "tokens" / "shard-00000.arrow"

    def damage(encoder):
        shard.write_bytes(shard.read_bytes()[:-1])
        return {}

    with pytest.raises(
        ValueError, match="shard-00000.arrow: has .* bytes instead of .* as it was written"
    ):
        train_tiny(tmp_path / "run", config(4, workers=workers), mixture=mixture, evaluate=damage)
    assert set(feeding()) <= before and not (tmp_path / "run" / "model").exists()


def test_a_store_with_the_tokens_of_another_tokenizer_is_refused_before_the_directory_is_taken(
    tmp_path,
):
    mixture = token_stores(tmp_path, Tokens(make_tokenizer(), 32))()
    with pytest.raises(
        ValueError, match="with max_length 32, this run uses '' with 64; prepare the store again"
    ):
        train_tiny(tmp_path / "run", config(4), mixture=mixture)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run of 6 steps with a checkpoint after 2, stopped at 3."
    out = tmp_path_factory.mktemp("stopped")
    train_tiny(out, config(6, save_every=2), mixture=make_two_files(), callbacks=[At(3, stop)])
    return out


def snapshot(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.is_file() and p.parent.name != "tensorboard"
    }


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"lr": 2e-3}, "lr was 0.001, now 0.002"),
        ({"steps": 7}, "steps was 6, now 7"),
        ({"widths": (8,)}, "widths"),
        ({"seed": 1}, "seed"),
        ({"bf16": True}, "bf16"),
        ({"chunk_tokens": 50}, "chunk_tokens was 0, now 50"),
    ],
)
def test_resume_refuses_another_configuration(stopped, changes, named):
    before = snapshot(stopped)
    with pytest.raises(ValueError, match=f"another configuration.*{named}"):
        train_tiny(
            stopped,
            config(**{"steps": 6, "save_every": 2} | changes),
            mixture=make_two_files(),
            resume=True,
        )
    assert snapshot(stopped) == before


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"batch_size": 4}, {"datasets_per_batch": 2}, {"rows": 44}, {"name": "others"}],
)
def test_resume_refuses_another_order_of_the_data(stopped, changes):
    "Step s must be step s of the same run: another seed, batch size or file is another run."
    before, mixture = snapshot(stopped), make_two_files(**changes)
    of_file = "rows" in changes or "name" in changes
    cause = "(pairs|others)" if of_file else str(next(iter(changes)))
    with pytest.raises(ValueError, match="other data.*" + cause):
        train_tiny(stopped, config(6, save_every=2), mixture=mixture, resume=True)
    assert snapshot(stopped) == before


def test_resume_refuses_another_model(stopped):
    before = snapshot(stopped)
    other = BertModel(
        BertConfig(
            vocab_size=len(make_tokenizer()),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    with pytest.raises(
        ValueError, match="encoder.max_length was 64, now 16.*encoder.weights was [0-9]+, now"
    ):
        train(
            SentenceEncoder(other, make_tokenizer(), max_length=16),
            make_two_files(),
            config(6, save_every=2),
            stopped,
            resume=True,
            progress=False,
        )
    assert {name: snapshot(stopped)[name] for name in before} == before


def test_where_transformers_would_take_an_xla_device_the_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("contrastive_st.trainer.is_torch_xla_available", lambda: True)
    with pytest.raises(ValueError, match="set USE_TORCH_XLA=0 before Python starts"):
        train_tiny(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    "Killed before its first checkpoint, or never begun: the command with resume gives the run."
    whole = make_encoder(dropout=0.1)
    train(whole, make_mixture(), config(), tmp_path / "whole", progress=False)
    for name, callbacks, said in (
        ("nothing", None, "holds no run yet"),
        ("killed", [At(2, crash)], "holds no whole checkpoint, so the run starts over"),
    ):
        if callbacks:
            with pytest.raises(Crash):
                train_tiny(tmp_path / name, dropout=0.1, callbacks=callbacks)
        capsys.readouterr()
        encoder = make_encoder(dropout=0.1)
        train(encoder, make_mixture(), config(), tmp_path / name, resume=True, progress=False)
        assert said in capsys.readouterr().err
        assert all(torch.equal(v, weights(encoder)[n]) for n, v in weights(whole).items())


def test_a_run_that_was_moved_resumes_and_finds_its_best_model(tmp_path):
    c, scores = config(6, eval_every=2, metric="score"), Scores(0.1, 0.9, 0.2)
    with pytest.raises(Crash):
        train_tiny(tmp_path / "here", c, evaluate=scores, callbacks=[At(5, crash)])
    (tmp_path / "here").rename(tmp_path / "there")
    encoder = make_encoder()
    metrics = train(
        encoder, make_mixture(), c, tmp_path / "there", Scores(0.3), resume=True, progress=False
    )
    assert metrics["best_step"] == 2
    assert all(torch.equal(v, weights(encoder)[n]) for n, v in scores.seen[1].items())


def test_patience_is_counted_across_an_interruption(tmp_path):
    # before, then after each step: patience 2 ends the run at step 3
    falling = (0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    c = config(6, eval_every=1, metric="score", patience=2)
    metrics = train(
        make_encoder(), make_mixture(), c, tmp_path / "whole", Scores(*falling), progress=False
    )
    assert metrics["steps"] == 3
    with pytest.raises(Crash):
        train_tiny(tmp_path / "parts", c, evaluate=Scores(*falling), callbacks=[At(3, crash)])
    assert checkpoints(tmp_path / "parts")[-1] == 2
    metrics = train(
        make_encoder(),
        make_mixture(),
        c,
        tmp_path / "parts",
        Scores(*falling[3:]),
        resume=True,
        progress=False,
    )
    assert metrics["steps"] == 3


# ---- evaluation, early stopping, the best model ----


def test_evaluation_happens_before_during_and_after(tmp_path):
    scores, tests = Scores(0.1, 0.2, 0.3), Scores(0.5, 0.6)
    metrics = train(
        make_encoder(),
        make_mixture(),
        config(4, eval_every=2),
        tmp_path,
        scores,
        tests,
        progress=False,
    )
    # that of the last step was just made, so it is not made again
    assert (metrics["before"], metrics["after"]) == ({"score": 0.1}, {"score": 0.3})
    assert len(scores.seen) == 3
    assert metrics["test"] == {"before": {"score": 0.5}, "after": {"score": 0.6}}
    assert len(tests.seen) == 2
    assert [
        (line["step"], line["eval_score"])
        for line in read(tmp_path, "history")
        if "eval_score" in line
    ] == [(2, 0.2), (4, 0.3)]
    assert read(tmp_path, "metrics") == metrics
    start = weights(make_encoder())
    # before = untrained
    assert all(
        torch.equal(v, scores.seen[0][n]) and torch.equal(v, tests.seen[0][n])
        for n, v in start.items()
    )


@pytest.mark.parametrize(
    "curve, best, steps",
    [
        ((0.2, 0.8, 0.5, 0.4, 0.3), 2, 6),
        ((0.2, 0.3, 0.4, 0.5, 0.6), 8, 8),
        ((-3.0, -2.0, -1.0, -1.5, -1.2), 4, 8),
    ],
)
def test_early_stopping_and_the_best_model(tmp_path, curve, best, steps):
    scores, encoder = Scores(*curve), make_encoder()
    metrics = train(
        encoder,
        make_mixture(),
        config(8, eval_every=2, metric="score", patience=2),
        tmp_path,
        scores,
        progress=False,
    )
    assert (metrics["best_step"], metrics["steps"]) == (best, steps)
    kept, saved = scores.seen[best // 2], SentenceEncoder.from_pretrained(tmp_path / "model")
    assert all(
        torch.equal(v, weights(encoder)[n]) and torch.equal(v, weights(saved)[n])
        for n, v in kept.items()
    )
    assert checkpoints(tmp_path) == sorted({best, steps - 2, steps})  # the best and the last two


def test_a_last_step_between_evaluations_may_be_the_best(tmp_path):
    "Step 5 is measured because the run ends there, so its weights are there to be taken."
    scores = Scores(0.1, 0.2, 0.3, 0.4)
    settings = config(5, eval_every=2, metric="score")
    metrics = train(make_encoder(), make_mixture(), settings, tmp_path, scores, progress=False)
    assert metrics["best_step"] == 5 and 5 in checkpoints(tmp_path)
    saved = weights(SentenceEncoder.from_pretrained(tmp_path / "model"))
    assert all(torch.equal(value, saved[name]) for name, value in scores.seen[3].items())


def test_without_a_metric_the_last_model_is_kept(tmp_path):
    scores, encoder = Scores(0.1, 0.9, 0.2), make_encoder()
    metrics = train(
        encoder, make_mixture(), config(4, eval_every=2), tmp_path, scores, progress=False
    )
    assert all(torch.equal(v, weights(encoder)[n]) for n, v in scores.seen[2].items())
    assert metrics["best_step"] is None


def test_the_best_model_is_kept_or_the_configuration_refused_when_saves_are_rarer_than_evaluations(
    tmp_path,
):
    scores, encoder = Scores(0.1, 0.9, 0.5, 0.4, 0.3), make_encoder()
    try:
        c = config(8, eval_every=2, save_every=4, metric="score")
    except ValueError as error:
        assert "save_every" in str(error)
        return
    metrics = train(encoder, make_mixture(), c, tmp_path, scores, progress=False)
    assert metrics["best_step"] == 2
    assert all(torch.equal(v, weights(encoder)[n]) for n, v in scores.seen[1].items())


@pytest.mark.parametrize("evaluate", [None, Scores(0.5, name="spearman")])
def test_a_metric_that_nothing_measures_is_refused_before_training(tmp_path, evaluate):
    mixture, asked = counted(make_mixture())
    with pytest.raises(ValueError, match="score"):
        train_tiny(
            tmp_path, config(4, eval_every=2, metric="score"), mixture=mixture, evaluate=evaluate
        )
    assert not asked


# ---- the run directory ----


def test_a_directory_that_holds_a_run_is_refused_and_overwrite_takes_only_its_own(tmp_path):
    out = tmp_path / "runs" / "one"
    train_tiny(out, config(2, save_every=1), recipe="title = 'a'\n")
    assert (out / "recipe.toml").read_text() == "title = 'a'\n"
    foreign = [out / "notes.txt", out / "plots" / "loss.png", out.parent / "beside.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = snapshot(out)
    with pytest.raises(ValueError, match="already holds a finished run.*resume.*overwrite"):
        train_tiny(out, config(2))
    assert snapshot(out) == before
    train_tiny(out, config(3), overwrite=True)
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (out / "recipe.toml").exists() and not checkpoints(out)
    assert list(losses(out)) == [1, 2, 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run of 4 steps with two checkpoints, evaluation and a recipe."
    out = tmp_path_factory.mktemp("finished") / "run"
    train_tiny(
        out,
        config(4, save_every=2, eval_every=2, widths=(8, 32)),
        evaluate=Scores(0.1, 0.2),
        test=Scores(0.3),
        recipe="# r\n",
    )
    return out


def test_the_run_directory_holds_every_record(finished):
    assert RECORDS | {"recipe.toml", "model", "checkpoints", "tensorboard"} == {
        p.name for p in finished.iterdir()
    }
    found = {name: read(finished, name.removesuffix(".json")) for name in RECORDS}
    assert found["config.json"]["widths"] == [8, 32] and found["config.json"]["steps"] == 4
    assert found["data_config.json"] == [{"name": "pairs", "lines": 40, "weight": 1.0}]
    assert found["versions.json"]["torch"] == torch.__version__
    assert found["versions.json"]["device"] == "cpu"
    assert found["mixture.json"]["steps"] == 4
    assert found["mixture.json"]["datasets"][0]["epochs"] == pytest.approx(4 * 8 / 40)
    names = "before after test steps best_step ended_by seconds pairs_per_second"
    assert set(found["metrics.json"]) == set(names.split())
    line = next(line for line in found["history.json"] if "loss" in line)
    names = "loss grad_norm learning_rate masked negatives truncated mean_cosine step"
    assert set(names.split()) <= set(line) and line["truncated"] == 0
    assert {"max_length", "columns", "waste"} == set(found["mixture.json"]["tokens"])


def test_records_are_json_even_when_a_dataset_is_never_drawn(tmp_path):
    mixture = Mixture([make_source(), make_source(3, name="triplets", seed=2)], [1e6, 1.0], 8, 1)
    assert {len(mixture.batch(s).examples[0]) for s in range(2)} == {2}
    train_tiny(tmp_path, config(2), mixture=mixture)
    assert all(read(tmp_path, name.removesuffix(".json")) is not None for name in sorted(RECORDS))


def test_nothing_written_needs_pickle(finished):
    files = [p for p in finished.rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pkl", ".pickle", ".ckpt")]
    assert not [p for p in (finished / "model").rglob("*") if p.suffix in (".pt", ".pth")]
    states = [p for p in files if p.suffix in (".pt", ".pth")]
    assert {p.name for p in states} == {"training.pt"}
    for path in states:
        torch.load(path, weights_only=True)


def test_the_model_and_every_checkpoint_open_in_sentence_transformers(finished):
    st = pytest.importorskip("sentence_transformers")
    texts = ["a dog is playing", "How do I reset my password?", "snow"]
    assert checkpoints(finished) == [2, 4]
    for folder in (finished / "model", *sorted((finished / "checkpoints").iterdir())):
        ours = SentenceEncoder.from_pretrained(folder)
        peer = st.SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(
            ours.encode(texts, progress=False), peer.encode(texts), atol=1e-6
        )
    last, model = (
        SentenceEncoder.from_pretrained(finished / name)
        for name in ("checkpoints/checkpoint-4", "model")
    )
    assert all(torch.equal(v, weights(model)[n]) for n, v in weights(last).items())


def test_tensorboard_events(finished):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert list((finished / "tensorboard").rglob("events.out.tfevents.*"))
    events = reading.EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {"train/loss", "train/mean_cosine", "eval/score"} <= set(events.Tags()["scalars"])
    assert [round(e.value, 4) for e in events.Scalars("train/loss")] == [
        round(v, 4) for v in losses(finished).values()
    ]


def test_log_lines_cover_log_every_steps(tmp_path):
    train_tiny(tmp_path / "each", config(7))
    train_tiny(tmp_path / "third", config(7, log_every=3))
    each, third = losses(tmp_path / "each"), losses(tmp_path / "third")
    assert third[1] == pytest.approx(each[1]) and third[3] == pytest.approx((each[2] + each[3]) / 2)
    assert third[6] == pytest.approx(sum(each[s] for s in (4, 5, 6)) / 3)


def test_silence(tmp_path, capfd):
    train_tiny(tmp_path, config(2))
    out, err = capfd.readouterr()
    assert not out and "loss" not in err and "it/s" not in err


def test_the_encoder_stays_in_the_mode_it_came_in(tmp_path):
    encoder = make_encoder(dropout=0.5)
    assert not encoder.training
    train(encoder, make_mixture(), config(2), tmp_path, progress=False)
    assert not any(layer.training for layer in encoder.modules()), (
        "dropout is left on: calling the trained encoder gives another vector each time"
    )


# ---- health ----


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(tmp_path):
    with pytest.raises(ValueError, match="nan between steps 2 and 4; lower lr"):
        train_tiny(tmp_path, config(8, log_every=2), callbacks=[At(3, poison)])
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_not_finite_at_once(tmp_path):
    encoder = make_encoder()
    poison(None, encoder)
    with pytest.raises(ValueError, match="the loss became nan") as caught:
        train(encoder, make_mixture(), config(4, log_every=10), tmp_path, progress=False)
    assert "-" not in str(caught.value).split("between")[1].split(";")[0], (
        "steps before the first do not exist"
    )


@pytest.mark.parametrize("steps, log_every", [(4, 10), (15, 10)])
def test_a_loss_that_is_not_finite_after_the_last_log_line(tmp_path, steps, log_every):
    with pytest.raises(ValueError, match="the loss became nan"):
        train_tiny(tmp_path, config(steps, log_every=log_every), callbacks=[At(steps - 2, poison)])
    assert not (tmp_path / "model").exists()


def test_a_huge_learning_rate_ends_in_an_error_or_finite_weights(tmp_path):
    encoder = make_encoder()
    try:
        train(encoder, make_mixture(), config(6, lr=9.0), tmp_path, progress=False)
    except ValueError as error:
        assert "lower lr (9)" in str(error)
    else:
        assert all(v.isfinite().all() for v in weights(encoder).values())


def test_collapse_is_noticed(tmp_path, capsys, recwarn):
    train_tiny(tmp_path / "sound", config(3))
    assert "collapsed" not in capsys.readouterr().out + " ".join(str(w.message) for w in recwarn)
    encoder = make_encoder()
    with torch.no_grad():  # one word, no order: all texts are nearly the same
        encoder.backbone.embeddings.word_embeddings.weight[:] = (
            encoder.backbone.embeddings.word_embeddings.weight[7].clone()
        )
        encoder.backbone.embeddings.position_embeddings.weight.zero_()
    train(
        encoder,
        make_mixture(),
        config(4, lr=1e-9, warmup=2),
        tmp_path / "collapsed",
        progress=False,
    )
    said = capsys.readouterr().out + " ".join(str(w.message) for w in recwarn)
    assert "the mean cosine between texts" in said and "collapsed" in said and "lower lr" in said
    assert read(tmp_path / "collapsed", "history")[-2]["mean_cosine"] > 0.999


# ---- data of every kind ----


def test_pairs_and_triplets_train_together(tmp_path):
    mixture = Mixture(
        [
            make_source(),
            make_source(3, name="triplets", seed=2),
            make_source(5, name="hard", seed=3),
        ],
        [1.0, 1.0, 1.0],
        8,
        1,
    )
    assert {len(mixture.batch(s).examples[0]) for s in range(12)} == {2, 3, 5}
    encoder = make_encoder()
    train(encoder, mixture, config(12), tmp_path, progress=False)
    assert len(losses(tmp_path)) == 12
    assert all(v.isfinite().all() for v in weights(encoder).values())


def copied(columns, others=0):
    "A mixture of 32 equal rows, and some others."
    table = {"anchor": ["a dog"] * 32, "positive": ["the dog is playing"] * 32} | (
        {"negative": ["a dog"] * 32} if columns == 3 else {}
    )
    table = {
        name: texts + sentences(others, seed) for seed, (name, texts) in enumerate(table.items())
    }
    return Mixture([Source(Dataset.from_dict(table), "same", check=False)], [1.0], 8, 1)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_run_on_copies_of_one_row_trains_and_says_so(tmp_path, columns, symmetric):
    encoder = make_encoder()
    message = (
        "nearly every candidate is a copy.*nothing to learn from; remove copies or mix more"
        " datasets"
    )
    with pytest.warns(UserWarning, match=message):
        metrics = train(
            encoder, copied(columns), config(3, symmetric=symmetric), tmp_path, progress=False
        )
    assert metrics["steps"] == 3 and list(losses(tmp_path).values()) == [0, 0, 0]
    # nothing was learned, nothing was harmed
    assert all(torch.equal(v, weights(encoder)[n]) for n, v in weights(make_encoder()).items())
    lines = [line for line in read(tmp_path, "history") if "loss" in line]
    assert {line["masked"] for line in lines} == {7.0 if columns == 2 else 15.0}
    assert {line["negatives"] for line in lines} == {0.0}


@pytest.mark.parametrize("columns", [2, 3])
def test_a_run_on_mostly_copies_learns_from_the_others(tmp_path, columns):
    encoder, mixture = make_encoder(), copied(columns, others=8)
    with pytest.warns(UserWarning, match="nothing to learn from"):
        train(encoder, mixture, config(20), tmp_path, progress=False)
    lines = [line for line in read(tmp_path, "history") if "loss" in line]
    alone = [len(set(mixture.batch(step).examples)) == 1 for step in range(20)]
    assert any(alone) and not all(alone)
    assert (
        [line["loss"] == 0 for line in lines] == [line["negatives"] == 0 for line in lines] == alone
    )
    assert all(v.isfinite().all() for v in weights(encoder).values())
    assert any(not torch.equal(v, weights(encoder)[n]) for n, v in weights(make_encoder()).items())


def test_the_warning_of_copies_is_for_copies_only(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the first two: a batch of two pairs
        for negatives, masked in ((1, 0), (0.9, 0.1), (126.5, 0.5), (1.5, 5.5)):
            check_health({"loss": 1.0, "negatives": negatives, "masked": masked}, 20, config())
        check_health({"loss": 1.0}, 20, config())
    with warnings.catch_warnings(record=True) as said:
        # a choice: copies are negatives
        train_tiny(tmp_path, config(2, mask_same=False), mixture=copied(2))
    assert not [w for w in said if "copy" in str(w.message)]
    assert {
        (line["masked"], line["negatives"]) for line in read(tmp_path, "history") if "loss" in line
    } == {(0.0, 7.0)}


def test_texts_that_are_cut_are_counted(tmp_path):
    table = {
        "anchor": [("dog " * 100) + str(i) for i in range(8)],
        "positive": [f"the cat {i}" for i in range(8)],
    }
    train_tiny(
        tmp_path,
        config(1),
        mixture=Mixture([Source(Dataset.from_dict(table), "long")], [1.0], 8, 1),
    )
    assert [line["truncated"] for line in read(tmp_path, "history") if "loss" in line] == [0.5]


def test_learning_happens(tmp_path):
    encoder = make_encoder()
    train(encoder, make_mixture(rows=16), config(40, lr=3e-3), tmp_path, progress=False)
    found = list(losses(tmp_path).values())
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:3])


# ---- configuration ----


def test_widths_above_the_model_are_refused_before_the_directory_is_taken(tmp_path):
    with pytest.raises(ValueError, match="64"):
        train_tiny(tmp_path / "run", config(2, widths=(16, 64)))
    # try again, same place
    train_tiny(tmp_path / "run", config(2, widths=(16, 32)))


# ---- several processes ----

SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
written = []
def note(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str):
        if args[0].startswith({out!r}) and set(args[1]) & set("wax+"):
            written.append(args[0])
    changes = ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
    if event in changes and str(args[0]).startswith({out!r}):
        written.append(f"{{event}} {{args[0]}}")
sys.addaudithook(note)
from importlib.util import find_spec
from test_trainer import *
rank = int(os.environ["RANK"])
for tokens in {chunk_tokens}:
    mixture, out = make_pairs_and_triplets(copies=2), {out!r} + str(tokens)
    settings = config(4, save_every=2, eval_every=2, metric="score", chunk_tokens=tokens)
    scores = Scores(0.1, 0.2, 0.3)
    result = train(make_encoder(), mixture, settings, out, scores, progress=False)
    with open({notes!r} + f"{{tokens}}-{{rank}}", "w") as file:
        json.dump({{"result": result, "written": written}}, file)
    written.clear()
if find_spec("peft"):
    adapted = add_adapters(make_encoder(), r=2)
    settings = config(4, save_every=2, eval_every=2, metric="score", chunk_tokens=95)
    train(adapted, mixture, settings, {out!r} + "adapters", Scores(0.1, 0.2, 0.3), progress=False)
"""


def torchrun(tmp_path, script, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "script.py").write_text(script)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc_per_node", str(processes)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            str(tmp_path / "script.py"),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "Folder of runs, each on two processes, named by their tokens of a chunk: one start for all."
    folder = tmp_path_factory.mktemp("two")
    names = {"out": str(folder / "run-"), "notes": str(folder / "notes-")}
    paths = [str(Path(__file__).parent), str(ROOT)]
    done = torchrun(folder, SCRIPT.format(paths=paths, chunk_tokens=(0, 95), **names))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("chunk_tokens", [0, 95])
def test_two_processes_are_one_run(two_processes, tmp_path, chunk_tokens):
    out, notes = (
        two_processes / f"run-{chunk_tokens}",
        str(two_processes / f"notes-{chunk_tokens}-"),
    )
    alone, start = make_encoder(), weights(make_encoder())
    mixture = make_pairs_and_triplets(copies=2)
    assert {len(mixture.batch(s).examples[0]) for s in range(4)} == {2, 3}
    train(
        alone,
        mixture,
        config(4, save_every=2, eval_every=2, metric="score", chunk_tokens=chunk_tokens),
        tmp_path / "one",
        Scores(0.1, 0.2, 0.3),
        progress=False,
    )
    # ranks with different numbers of chunks, and one that needs none, exchange in the same order
    if chunk_tokens:
        batches = [
            Tokens(make_tokenizer(), 64)(mixture.batch(step, rank, 2))
            for step in range(4)
            for rank in range(2)
        ]
        counts = [
            len(split_batch(batch.token_ids, batch.lengths, chunk_tokens)) for batch in batches
        ]
        assert any(a != b for a, b in zip(counts[::2], counts[1::2])) and {1, 2} <= set(counts), (
            counts
        )
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    counts = [
        [[line["masked"], line["negatives"]] for line in read(o, "history") if "loss" in line]
        for o in (out, tmp_path / "one")
    ]
    assert counts[0] == counts[1]  # of the global batch
    norms = [
        [line["grad_norm"] for line in read(o, "history") if "loss" in line]
        for o in (out, tmp_path / "one")
    ]
    # gradients, before Adam makes their size disappear
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    both = SentenceEncoder.from_pretrained(out / "model")
    # Adam moves weights with tiny gradients by their rounding
    assert distance(weights(both), weights(alone), start) < 5e-4

    first, second = (json.loads(Path(notes + str(rank)).read_text()) for rank in (0, 1))
    assert second["result"] == {} and first["result"] == read(out, "metrics") and first["written"]
    assert [w for w in second["written"] if "rng_state_1" not in w and "os.mkdir" not in w] == []
    own, same = (
        {
            p.relative_to(o).as_posix()
            for p in o.rglob("*")
            if p.is_file() and not p.name.startswith(("events.out", "rng_state"))
        }
        for o in (out, tmp_path / "one")
    )
    assert own == same and len(list(out.rglob("events.out*"))) == 1


def test_adapters_on_two_processes_are_one_run(two_processes, tmp_path):
    "The ranks exchange the gradients of the adapters alone."
    pytest.importorskip("peft", reason="the extra lora is not installed")
    settings = config(4, save_every=2, eval_every=2, metric="score", chunk_tokens=95)
    adapted, mixture = add_adapters(make_encoder(), r=2), make_pairs_and_triplets(copies=2)
    train(adapted, mixture, settings, tmp_path / "one", Scores(0.1, 0.2, 0.3), progress=False)
    assert losses(two_processes / "run-adapters") == pytest.approx(
        losses(tmp_path / "one"), rel=1e-5
    )


# ---- in one call ----

PAIRS = [(f"where is pier {n}", f"behind shed {n}") for n in range(20)]


def test_pairs_train_in_one_call(capsys):
    encoder, start = make_encoder(), weights(make_encoder())
    metrics = train(encoder, PAIRS, epochs=2, batch_size=8, lr=1e-3, log_every=2, workers=0)
    assert (metrics["steps"], metrics["ended_by"]) == (5, "steps")
    assert not all(torch.equal(value, start[name]) for name, value in weights(encoder).items())
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("computing on ") and lines[-1].startswith("5 of 5 steps in ")
    assert [line[:11] for line in lines[:-1]] == ["step 1 of 5", "step 2 of 5", "step 4 of 5"]
    assert all(line.endswith(" left") and " pairs/s   " in line for line in lines[:-1])


def test_one_call_is_the_run_of_a_configuration(tmp_path):
    "The same weights as by hand, whatever the data came as."
    import pandas as pd

    frame = pd.DataFrame(PAIRS, columns=["anchor", "positive"])
    by_hand = make_encoder()
    c = TrainConfig(steps=3, lr=1e-3, workers=0)
    train(by_hand, as_mixture(PAIRS, 8), c, tmp_path / "by-hand", progress=False)
    options = {"batch_size": 8, "progress": False}
    for data in (frame, Dataset.from_pandas(frame), PAIRS):
        encoder = make_encoder()
        train(encoder, data, steps=3, lr=1e-3, workers=0, **options)
        assert all(torch.equal(v, weights(by_hand)[n]) for n, v in weights(encoder).items())
    encoder = make_encoder()
    train(encoder, PAIRS, c, **options)
    assert all(torch.equal(v, weights(by_hand)[n]) for n, v in weights(encoder).items())


def test_several_datasets_are_drawn_by_their_weights(tmp_path):
    more = [(f"when does boat {n} leave", f"at {n} sharp") for n in range(40)]
    options = {"epochs": 1, "progress": False, "workers": 0}
    train(make_encoder(), [PAIRS, more], out=tmp_path / "rows", **options)
    record = read(tmp_path / "rows", "config")
    assert record["batch_size"] == 60 and [d["weight"] for d in record["mix"]] == [20, 40]
    train(make_encoder(), [PAIRS, more], out=tmp_path / "given", weights=[3, 1], **options)
    assert [d["weight"] for d in read(tmp_path / "given", "config")["mix"]] == [3, 1]


def test_a_small_list_is_one_batch_an_epoch():
    assert train(make_encoder(), PAIRS[:5], progress=False, workers=0)["steps"] == 1


@pytest.mark.parametrize(
    "encoder, data, options, said",
    [
        ("a/model", PAIRS, {}, "encoder is the name 'a/model' and there is no out"),
        (None, PAIRS, {"resume": True}, "resume needs out"),
        (None, PAIRS[:1], {}, "there are no negatives to learn from; add rows that differ"),
        (None, PAIRS, {"learning_rate": 1}, "there is no setting learning_rate"),
        (None, PAIRS, {"lr": -1}, "lr should be greater than 0"),
        (None, PAIRS, {"steps": 1, "epochs": 1}, "give one of the two"),
        (None, PAIRS, {"config": config(1), "lr": 1e-3}, "config is given, and beside it lr"),
        (None, make_mixture(), {"batch_size": 8}, "data is a mixture, which has a batch size"),
        (None, PAIRS, {"weights": [1, 2]}, "1 sources but 2 weights"),
        (None, PAIRS, {"progress": "loud"}, "progress is 'loud'"),
        (None, PAIRS, {"batch_size": 0}, "it must be a whole number, 1 or more"),
    ],
)
def test_a_wrong_call_is_one_sentence(encoder, data, options, said):
    with pytest.raises(ValueError) as caught:
        train(encoder or make_encoder(), data, **{"progress": False} | options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_stopped_run_without_a_directory_does_not_promise_to_go_on():
    with pytest.raises(Stopped, match="stopped at step 2 of 9; nothing is saved, as there is no"):
        train(make_encoder(), PAIRS, steps=9, callbacks=[At(2, signalled)], progress=False)


def signalled(*args):
    os.kill(os.getpid(), signal.SIGTERM)
