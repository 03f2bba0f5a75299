"""The cached step against the plain one: gradients, dropout, randomness, work, memory, chunks."""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import WORDS, make_backbone, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from contrastive_st.gradcache import cached_step, split_batch
from contrastive_st.loss import info_nce, same_text
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, batch_loss
from contrastive_st.tokens import split_by_budget

ALL = 10**9  # tokens: one chunk


def make_encoder(dtype=torch.float64, dropout=0.0, layout="packed"):
    "The tiny encoder of conftest in training mode."
    tokenizer = make_tokenizer()
    encoder = (
        SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64).to(dtype).train()
    )
    encoder.layout = layout
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
        if hasattr(layer, "dropout_prob"):
            layer.dropout_prob = dropout
    return encoder


def make_batch(B=12, columns=2, seed=0):
    "Token ids end to end, lengths of 3 to 20, identities with repeats."
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (B * columns,), generator=draw)
    token_ids = torch.randint(5, 5 + len(WORDS), (int(lengths.sum()),), generator=draw)
    identities = torch.randint(0, 2 * B, (B, columns), generator=draw)
    return token_ids, lengths, identities


def contrast(embeddings):
    return info_nce(*embeddings.chunk(2))


def outcome(step, model):
    "The loss, and all gradients as one vector."
    model.zero_grad()
    value = step()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def plain(encoder, token_ids, lengths, loss):
    value = loss(encoder(token_ids, lengths))
    value.backward()
    return value


def through_all(encoder, token_ids, lengths, loss, chunk_tokens):
    "One backward pass through all chunks: the naive version where chunks draw random numbers."
    rows, chunks = zip(*split_batch(token_ids, lengths, chunk_tokens))
    value = loss(torch.cat([encoder(*chunk) for chunk in chunks])[torch.cat(rows).argsort()])
    value.backward()
    return value


def apart(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


# ---- the numbers of the plain step ----

KINDS = {
    "pairs": (2, {"symmetric": False, "mask_same": False}),
    "symmetric": (2, {}),
    "triplets": (3, {}),
    "four columns": (4, {}),
    "no mask": (3, {"mask_same": False}),
    "widths": (2, {"widths": (8, 16, 32)}),
    "triplets, widths": (3, {"widths": (4, 32)}),
    "dot": (2, {"similarity": "dot", "scale": 0.5}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_gradients_are_those_of_the_plain_step(kind, dtype, limit):
    columns, changes = KINDS[kind]
    token_ids, lengths, identities = make_batch(columns=columns)
    encoder, config = make_encoder(dtype), TrainConfig(**changes)
    if config.mask_same:
        assert same_text(identities).any()  # the mask has something to do

    def loss(embeddings):
        return batch_loss(embeddings, identities, config)[0]

    value, truth = outcome(lambda: plain(encoder, token_ids, lengths, loss), encoder)
    for chunk_tokens in (1, 37, 100, 200, int(lengths.sum()) - 1, ALL):
        found_value, found = outcome(
            lambda: cached_step(encoder, token_ids, lengths, loss, chunk_tokens), encoder
        )
        assert found_value.item() == pytest.approx(value.item(), rel=limit)
        assert apart(found, truth) < limit
        assert found.dtype == dtype and not found_value.requires_grad


def test_the_padded_layout_too():
    (token_ids, lengths, _), encoder = make_batch(), make_encoder(layout="padded")
    encoder.token_budget = 60
    _, truth = outcome(lambda: plain(encoder, token_ids, lengths, contrast), encoder)
    result = apart(
        outcome(lambda: cached_step(encoder, token_ids, lengths, contrast, 50), encoder)[1], truth
    )
    assert result < 1e-10


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("chunk_tokens", [ALL, 120, 30])
def test_dropout_falls_twice_on_the_same_numbers(layout, chunk_tokens):
    (token_ids, lengths, _), encoder = make_batch(), make_encoder(dropout=0.3, layout=layout)
    results = []
    for step in (through_all, cached_step, cached_step):
        torch.manual_seed(3 + (len(results) == 2))
        results.append(
            (
                *outcome(
                    lambda: step(encoder, token_ids, lengths, contrast, chunk_tokens), encoder
                ),
                torch.get_rng_state(),
            )
        )
    (value, truth, after), (found_value, found, found_after), (_, other, _) = results
    assert found_value.item() == pytest.approx(value.item(), rel=1e-12)
    assert apart(found, truth) < 1e-12
    assert torch.equal(found_after, after)  # what is drawn next is what would have been
    assert apart(other, truth) > 1e-2  # another seed is another mask: there is something to keep


def test_the_random_state_is_that_after_the_loss():
    "A loss that draws random numbers draws them once."
    (token_ids, lengths, _), encoder, states = make_batch(), make_encoder(dropout=0.1), []

    def loss(embeddings):
        noisy = embeddings + 0.1 * torch.randn(embeddings.shape, dtype=embeddings.dtype)
        states.append(torch.get_rng_state())
        return contrast(noisy)

    cached_step(encoder, token_ids, lengths, loss, 50)
    assert len(states) == 1 and torch.equal(torch.get_rng_state(), states[0])


def test_bf16():
    (token_ids, lengths, _), encoder = make_batch(), make_encoder(torch.float32, dropout=0.1)
    embed, results = torch.autocast("cpu", torch.bfloat16)(encoder.__call__), []
    for step, model in ((through_all, encoder), (through_all, embed), (cached_step, embed)):
        torch.manual_seed(5)
        results.append(outcome(lambda: step(model, token_ids, lengths, contrast, 60), encoder))
    (_, exact), (value, truth), (found_value, found) = results
    assert found_value.item() == pytest.approx(value.item(), rel=1e-6)
    assert apart(found, truth) < 1e-4
    # it really was bfloat16
    assert found.dtype == torch.float32 and 1e-4 < apart(truth, exact) < 0.1


def test_a_batch_that_fits_is_the_plain_step_bit_for_bit():
    (token_ids, lengths, _), encoder = make_batch(), make_encoder(torch.float32, dropout=0.1)
    results = []
    for step in (plain, lambda *args: cached_step(*args, len(token_ids))):
        torch.manual_seed(1)
        results.append(outcome(lambda: step(encoder, token_ids, lengths, contrast), encoder))
    assert torch.equal(results[0][1], results[1][1]) and results[0][0] == results[1][0]


def test_gradients_are_added_and_the_loss_may_have_weights():
    (token_ids, lengths, _), encoder = make_batch(), make_encoder()
    log_scale = torch.tensor(math.log(20), dtype=torch.float64, requires_grad=True)

    def loss(embeddings):
        return info_nce(*embeddings.chunk(2), scale=log_scale.exp())

    _, once = outcome(lambda: cached_step(encoder, token_ids, lengths, loss, ALL), encoder)
    expected, log_scale.grad = log_scale.grad.clone(), None
    outcome(lambda: cached_step(encoder, token_ids, lengths, loss, 50), encoder)
    assert log_scale.grad.item() == pytest.approx(expected.item(), rel=1e-10)
    cached_step(encoder, token_ids, lengths, loss, 80)
    assert apart(torch.cat([p.grad.flatten() for p in encoder.parameters()]), 2 * once) < 1e-10


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: its own random generator is put back too"
)
def test_dropout_on_a_gpu():
    token_ids, lengths, _ = make_batch()
    encoder, token_ids = make_encoder(torch.float32, dropout=0.3).cuda(), token_ids.cuda()
    results = []
    for step in (through_all, cached_step):
        torch.manual_seed(3)
        results.append(
            (
                *outcome(lambda: step(encoder, token_ids, lengths, contrast, 50), encoder),
                torch.cuda.get_rng_state(),
            )
        )
    assert apart(results[1][1], results[0][1]) < 1e-4 and torch.equal(results[0][2], results[1][2])


# ---- what it costs and saves ----


class Counted:
    "An encoder that notes its calls: texts, and whether activations were kept."

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, []

    def __call__(self, token_ids, lengths):
        self.calls.append((len(lengths), torch.is_grad_enabled()))
        return self.encoder(token_ids, lengths)


@pytest.mark.parametrize("chunk_tokens", [ALL, 150, 60, 20])
def test_each_chunk_is_embedded_twice_but_the_first(chunk_tokens):
    (token_ids, lengths, _), encoder = make_batch(), Counted(make_encoder())
    cached_step(encoder, token_ids, lengths, contrast, chunk_tokens)
    sizes = [len(rows) for rows, _ in split_batch(token_ids, lengths, chunk_tokens)]
    assert encoder.calls == [(sizes[0], True)] + [(n, False) for n in sizes[1:]] + [
        (n, True) for n in sizes[1:]
    ]
    assert (len(sizes) == 1) == (chunk_tokens == ALL)


def test_the_work_is_four_thirds_at_most():
    (token_ids, lengths, _), encoder = make_batch(64), make_encoder(torch.float32, layout="padded")

    def flops(chunk_tokens):
        with FlopCounterMode(display=False) as counter:
            outcome(
                lambda: cached_step(encoder, token_ids, lengths, contrast, chunk_tokens), encoder
            )
        return counter.get_total_flops()

    encoder.token_budget = 64  # the same sub-batches, more or less, whatever the chunks
    once = flops(ALL)
    for n in (2, 4, 16):
        assert flops(math.ceil(len(token_ids) / n * 1.05)) / once == pytest.approx(
            (4 - 1 / n) / 3, abs=0.06
        )


class Kept:
    "The most bytes that autograd keeps for the backward pass: each storage once, weights left out."

    def __init__(self, model):
        self.now = self.most = 0
        self.count, self.weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def change(self, tensor, by):
        storage = tensor.untyped_storage()
        key, before = storage.data_ptr(), self.count.get(storage.data_ptr(), 0)
        if key not in self.weights:
            self.count[key] = before + by
            self.now += storage.nbytes() * ((before + by > 0) - (before > 0))
            self.most = max(self.most, self.now)


class Box:
    def __init__(self, tensor, kept):
        self.tensor, self.kept = tensor, kept
        kept.change(tensor, 1)

    def __del__(self):
        self.kept.change(self.tensor, -1)


def kept_bytes(model, step):
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: Box(tensor, kept), lambda box: box.tensor
    ):
        step()
    assert kept.now == 0
    return kept.most


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_memory_is_that_of_a_chunk_whatever_the_batch(layout):
    encoder = make_encoder(torch.float32, dropout=0.1, layout=layout)

    def loss(embeddings):
        return embeddings.square().sum()  # no (B, N) scores, which are the loss's own

    def kept(texts, chunk_tokens):
        return kept_bytes(
            encoder,
            lambda: cached_step(
                encoder, torch.full((16 * texts,), 7), torch.full((texts,), 16), loss, chunk_tokens
            ),
        )

    small, large = kept(16, ALL), kept(128, ALL)
    assert 7 < large / small < 9  # the plain step's memory grows with the batch
    for texts in (32, 128, 512):
        assert kept(texts, 16 * 16) < 1.15 * small  # one chunk of 16 texts, and the embeddings


# ---- chunks ----


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 400))
def test_cuts(lengths, chunk_tokens):
    lengths = sorted(lengths, reverse=True)
    runs = split_by_budget(lengths, chunk_tokens)
    sizes = [sum(run) for run in runs]
    assert sum(runs, []) == lengths
    assert all(size <= chunk_tokens or len(run) == 1 for run, size in zip(runs, sizes))
    if lengths[0] <= chunk_tokens / 4:
        # half of the largest, but for half a text
        assert sizes[-1] >= max(sizes) / 3 and sizes[-1] >= (max(sizes) - lengths[0]) / 2
        assert len(sizes) <= math.ceil(sum(lengths) / chunk_tokens) + 1
    if sum(lengths) <= chunk_tokens:
        assert len(sizes) == 1


@pytest.mark.parametrize("chunk_tokens", [1, 30, 100, ALL])
def test_chunks_hold_each_text_once_and_similar_lengths_together(chunk_tokens):
    token_ids, lengths, _ = make_batch(30)
    texts, seen, longest = token_ids.split(lengths.tolist()), [], []
    for rows, (ids, n) in split_batch(token_ids, lengths, chunk_tokens):
        assert ids.tolist() == torch.cat([texts[i] for i in rows]).tolist()
        assert n.tolist() == lengths[rows].tolist()
        seen += rows.tolist()
        longest.append((int(n.max()), int(n.min())))
    assert sorted(seen) == list(range(60))
    # longest texts first
    assert all(before[1] >= after[0] for before, after in zip(longest, longest[1:]))


# ---- several ranks, and what is refused ----


@pytest.mark.parametrize("chunk_tokens", [ALL, 150, 20])
def test_only_the_last_chunk_synchronises(chunk_tokens):
    (token_ids, lengths, _), encoder, alone = make_batch(), make_encoder(), [False]
    passes = []

    @contextmanager
    def no_sync():
        alone[0] = True
        yield
        alone[0] = False

    def embed(*chunk):
        if torch.is_grad_enabled():
            passes.append(alone[0])
        return encoder(*chunk)

    cached_step(embed, token_ids, lengths, contrast, chunk_tokens, no_sync)
    n = len(split_batch(token_ids, lengths, chunk_tokens))
    assert passes == [True] * (n - 1) + [False]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0; a chunk needs 1 token or more"),
        ({"chunk_tokens": -5}, "chunk_tokens is -5"),
        ({"lengths": torch.tensor([3, 4])}, "2 lengths add up to 7, but there are .* token ids"),
        ({"lengths": torch.tensor([], dtype=torch.int64)}, "the batch has no text"),
        (
            {"encoder": lambda ids, n: torch.ones(1, 8, requires_grad=True)},
            "1 embeddings for 24 texts; it must give one row for each",
        ),
        ({"encoder": lambda ids, n: torch.ones(len(n), 8)}, "carry no gradient; unfreeze weights"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    token_ids, lengths, _ = make_batch()
    options = {
        "encoder": make_encoder(),
        "token_ids": token_ids,
        "lengths": lengths,
        "loss": contrast,
        "chunk_tokens": ALL,
    } | changes
    with pytest.raises(ValueError, match=said):
        cached_step(**options)


def test_an_error_of_the_loss_comes_through():
    token_ids, lengths, _ = make_batch()
    with pytest.raises(ValueError, match="nothing to contrast"):
        cached_step(make_encoder(), token_ids, lengths, lambda e: info_nce(e[:1], e[1:2]), 50)
