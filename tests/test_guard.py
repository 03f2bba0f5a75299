"""Guards against false negatives: the double loop, sentence-transformers, shapes, and a guide."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import sentences
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_st.guard import Guide, guide_mask, limits, score_mask, self_mask
from contrastive_st.loss import info_nce, matryoshka, same_text
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, batch_loss, train_step
from contrastive_st.store import text_identity
from contrastive_st.tokens import Tokens

B, K, D = 12, 2, 8


def batch(seed=0, K=K, dtype=torch.float64):
    "Random embeddings of a batch: anchors, positives, negatives."
    torch.manual_seed(seed)
    x = torch.randn(B, 2 + K, D, dtype=dtype)
    return x[:, 0], x[:, 1], x[:, 2:] if K else None


def naive(anchors, positives, negatives=None, absolute=None, relative=None):
    "The mask, one pair at a time."
    candidates = [*positives, *([] if negatives is None else negatives.flatten(0, 1))]
    absolute = 0.0 if absolute is None and relative is None else absolute
    rows = []
    for i, anchor in enumerate(anchors):
        scores = [torch.cosine_similarity(anchor, c, dim=0).item() for c in candidates]
        p = scores[i]
        rows.append(
            [
                n != i
                and (
                    (absolute is not None and s > p - absolute)
                    or (relative is not None and s > p - relative * abs(p))
                )
                for n, s in enumerate(scores)
            ]
        )
    return torch.tensor(rows)


# --- the mask ---


@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize(
    "margins", [(None, None), (0.2, None), (-0.2, None), (None, 0.3), (0.1, 1)]
)
def test_equals_a_double_loop(K, margins):
    columns = batch(K=K)
    mask = guide_mask(*columns, *margins)
    assert torch.equal(mask, naive(*columns, *margins))
    assert mask.dtype == torch.bool and 0 < mask.float().mean() < 1


@given(
    st.integers(0, 10**6),
    st.floats(-0.5, 0.5),
    st.floats(0, 0.5),
)
def test_a_larger_margin_never_masks_less(seed, margin, more):
    columns = batch(seed)
    less, much = (guide_mask(*columns, absolute_margin=m) for m in (margin, margin + more))
    assert not (less & ~much).any()
    assert not much[range(B), range(B)].any()  # the own positive is never masked


def test_a_share_of_a_negative_score_lies_below_it():
    scores = torch.tensor([0.8, -0.2, 0.0])
    limit = limits(scores, relative_margin=0.05)
    assert torch.allclose(limit, torch.tensor([0.76, -0.21, 0.0])) and (limit <= scores).all()
    both = limits(scores, 0.02, 0.05)  # the stricter of the two
    assert torch.allclose(both, torch.tensor([0.76, -0.22, -0.02]))


@pytest.mark.parametrize("P", [1, 2, 3])
def test_the_rows_of_a_process_are_those_of_the_whole(P):
    anchors, positives, negatives = batch()
    b = B // P
    parts = [
        guide_mask(anchors[r * b : (r + 1) * b], positives, negatives, 0.1, first=r * b)
        for r in range(P)
    ]
    assert torch.equal(torch.cat(parts), guide_mask(anchors, positives, negatives, 0.1))


def test_tiles_by_limits_are_the_whole():
    "What a loss without the matrix does: limits first, then one tile after another."
    anchors, positives, negatives = (torch.nn.functional.normalize(x, dim=-1) for x in batch())
    candidates = torch.cat([positives, negatives.flatten(0, 1)])
    limit = limits((anchors * positives).sum(-1), 0.1)
    tiles = [anchors @ tile.T > limit[:, None] for tile in candidates.split(7)]
    whole, own = torch.cat(tiles, dim=1), torch.eye(B, len(candidates), dtype=torch.bool)
    assert torch.equal(whole & ~own, guide_mask(anchors, positives, negatives, 0.1))


def test_sixteen_bits_are_compared_in_thirty_two():
    columns = [x.to(torch.bfloat16) for x in batch()]
    with torch.autocast("cpu", torch.bfloat16):
        mask = guide_mask(*columns)
    assert torch.equal(mask, guide_mask(*(x.float() for x in columns)))


def test_the_own_guard_is_a_guide_with_the_same_sign():
    columns = [x.requires_grad_() for x in batch()]
    mask = self_mask(*columns, margin=-0.2)
    assert torch.equal(mask, naive(*columns, absolute=-0.2)) and mask.any()
    assert torch.equal(self_mask(*columns), naive(*columns, absolute=-0.1))
    assert not mask.requires_grad
    assert not self_mask(*columns, margin=torch.tensor(-torch.inf)).any()
    assert torch.equal(self_mask(*columns, margin=torch.tensor(-0.2)), mask)


class NoReading(TorchDispatchMode):
    "Refuse what would wait for a device: reading a value, or a shape that depends on values."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return function(*args, **(kwargs or {}))


def test_no_value_is_read():
    columns, margin = batch(), torch.tensor(0.1)
    with NoReading():
        masks = [
            guide_mask(*columns, 0.1, 0.2),
            guide_mask(*columns, margin, margin),
            self_mask(*columns, margin=margin),
        ]
    assert all(mask.shape == (B, B * (1 + K)) for mask in masks)


# --- in the loss ---


def test_masked_candidates_get_no_gradient_and_others_are_not_changed():
    anchors, positives, negatives = batch()
    mask = guide_mask(*batch(1), 0.1)
    positives, negatives = positives.requires_grad_(), negatives.requires_grad_()
    candidates = torch.cat([positives, negatives.flatten(0, 1)])
    scores = 20 * torch.nn.functional.normalize(anchors, dim=-1)
    scores = scores @ torch.nn.functional.normalize(candidates, dim=-1).T
    rows = [torch.logsumexp(s[~m], 0) - s[i] for i, (s, m) in enumerate(zip(scores, mask))]
    expected = torch.stack(rows).mean()  # the masked ones simply left out
    value = info_nce(anchors, positives, negatives, same=mask)
    assert torch.allclose(value, expected)
    ours, theirs = (torch.autograd.grad(v, (positives, negatives)) for v in (value, expected))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs))


def test_beside_equal_texts():
    identities = torch.arange(2 * B).view(B, 2)
    identities[1, 1] = identities[0, 1]  # two rows with one positive
    columns = batch(K=0)[:2]
    same, mask = same_text(identities), guide_mask(*columns)
    assert info_nce(*columns, same=same | mask) <= info_nce(*columns, same=same)


class Columns(torch.nn.Sequential):
    "What sentence-transformers asks of a model: it hands on the embeddings that it is given."

    max_seq_length = 8

    def __init__(self, tokenizer, key):
        super().__init__(torch.nn.Identity())
        self.tokenizer, self.key = tokenizer, key

    def forward(self, features):
        return {"sentence_embedding": features[self.key]}


OFF = {"contrast_anchors": False, "contrast_positives": False}


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_equals_the_peer(tiny_tokenizer, strategy, margin, K):
    "Value and gradient of GISTEmbedLoss and of its cached kin, which takes several negatives."
    from sentence_transformers.sentence_transformer import losses

    own, guide = batch(0, K), batch(1, K)
    columns = [
        [x[0], x[1], *([] if x[2] is None else x[2].unbind(1))] for x in (own, guide)
    ]  # 2 + K of (B, D)
    leaves = [x.clone().requires_grad_() for x in columns[0]]
    models = [Columns(tiny_tokenizer, key) for key in ("own", "guide")]
    options = {"margin_strategy": strategy, "margin": margin, "temperature": 0.05} | OFF
    if K <= 1:
        loss = losses.GISTEmbedLoss(*models, **options)
        features = [{"own": x, "guide": y} for x, y in zip(leaves, columns[1])]
        expected = loss(features, None)
    else:
        loss = losses.CachedGISTEmbedLoss(*models, mini_batch_size=5, **options)
        expected = loss.calculate_loss([[x] for x in leaves], [[y] for y in columns[1]])
    gradients = torch.autograd.grad(expected, leaves)
    mask = guide_mask(*guide, **{f"{strategy}_margin": margin})
    negatives = torch.stack(leaves[2:], dim=1) if K else None
    value = info_nce(leaves[0], leaves[1], negatives, scale=20.0, same=mask)
    assert abs(value - expected) < 1e-6 and mask.any()
    for ours, theirs in zip(torch.autograd.grad(value, leaves), gradients):
        assert (ours - theirs).abs().max() < 1e-6


# --- in training ---


def config(**options):
    return TrainConfig(steps=10, warmup=4, guard="self", guard_margin=-0.05, **options)


def training_batch(C=4):
    "Embeddings (C*B, D) as `train_step` gets them, identities with repeats (B, C)."
    torch.manual_seed(0)
    return torch.randn(C * B, D), torch.randint(0, 60, (B, C))


def columns_of(embeddings, C=4):
    rows = embeddings.view(C, -1, D).transpose(0, 1)  # (b, C, D)
    return rows[:, 0], rows[:, 1], rows[:, 2:] if C > 2 else None


@pytest.mark.parametrize("C", [2, 4])
@pytest.mark.parametrize("options", [{}, {"widths": (8, 4)}, {"mask_same": False}])
def test_the_loss_of_a_batch_uses_the_mask(C, options):
    embeddings, identities = training_batch(C)
    columns, guarded = columns_of(embeddings, C), config(**options)
    same = self_mask(*columns, margin=-0.05)
    assert same.any()
    if guarded.mask_same:
        same = same | same_text(identities)
    function = partial(matryoshka, widths=[8, 4]) if guarded.widths else info_nce
    expected = function(*columns, same=same, symmetric=C == 2)
    value, masked = batch_loss(embeddings, identities, guarded)
    assert torch.equal(value, expected) and masked == same.sum() / B


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.2])
@pytest.mark.parametrize("guard", ["self", "guide"])
def test_a_recipe_s_margin_has_the_sign_of_guide_mask(guard, margin):
    embeddings, identities = training_batch()
    guide = embeddings.flip(1).view(4, B, D).transpose(0, 1)  # (B, C, D)
    judge = columns_of(embeddings) if guard == "self" else (guide[:, 0], guide[:, 1], guide[:, 2:])
    more = dict(guard="guide", guide="not opened") if guard == "guide" else dict(guard="self")
    settings = TrainConfig(steps=10, guard_margin=margin, mask_same=False, **more)
    masked = batch_loss(embeddings, identities, settings, guide=guide)[1]
    assert masked == guide_mask(*judge, absolute_margin=margin).sum() / B


@pytest.mark.parametrize("margin", [None, -0.1, 0.3])
@pytest.mark.parametrize("relative", [-0.2, 0.0, 0.3])
def test_a_recipe_s_relative_margin_is_that_of_guide_mask(margin, relative):
    embeddings, identities = training_batch()
    settings = TrainConfig(
        steps=10,
        guard="self",
        guard_margin=margin,
        guard_relative_margin=relative,
        mask_same=False,
        guard_after=4,
    )
    assert settings.guard_margin == margin  # no margin of its own beside the relative one
    expected = guide_mask(*columns_of(embeddings), margin, relative).sum() / B
    none = torch.zeros(())
    for step, masked in ((3, none), (4, expected), (None, expected)):
        for number in {step, None if step is None else torch.tensor(step)}:
            assert batch_loss(embeddings, identities, settings, step=number)[1] == masked
    tiled = replace(settings, tiled=True)
    value, masked = batch_loss(embeddings, identities, tiled, step=torch.tensor(5))
    torch.testing.assert_close(value, batch_loss(embeddings, identities, settings, step=5)[0])
    assert masked == pytest.approx(expected)


def test_the_margin_of_a_recipe_that_names_none():
    assert TrainConfig(steps=10, guard="self").guard_margin == -0.1
    assert TrainConfig(steps=10, guard="guide", guide="x").guard_margin == 0


@pytest.mark.parametrize("after, begins", [(None, 4), (0, 0), (7, 7)])
def test_the_guard_begins_after_the_warm_up_or_when_it_is_told(after, begins):
    embeddings, identities = training_batch()
    guarded, plain = config(guard_after=after), TrainConfig(steps=10, warmup=4)
    without, with_guard = (batch_loss(embeddings, identities, c) for c in (plain, guarded))
    assert not torch.equal(without[0], with_guard[0])
    for step in (0, 3, 4, 6, 7, 9):
        expected = with_guard if step >= begins else without
        for number in (step, torch.tensor(step)):  # a number, or what a compiled step has
            assert batch_loss(embeddings, identities, guarded, step=number) == expected


def test_a_compiled_step_reads_nothing():
    embeddings, identities = training_batch()
    step, guarded = torch.tensor(3), config(mask_same=False)
    with NoReading():
        batch_loss(embeddings, identities, guarded, step=step)


def test_the_cached_step_has_the_same_gradients(tiny_backbone, tiny_tokenizer):
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)
    tokens, texts = Tokens(tiny_tokenizer, 64), sentences(24, 0)
    step_batch = tokens([(texts[n], texts[n + 8], texts[n + 16]) for n in range(8)])
    results = []
    for chunk_tokens in (0, 40):
        encoder.zero_grad()
        logs = train_step(encoder, step_batch, config(), chunk_tokens=chunk_tokens, step=5)
        results.append((logs, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]))
    (plain, gradients), (cached, others) = results
    unguarded = train_step(encoder, step_batch, config(), step=3)
    assert plain["masked"] == cached["masked"] > unguarded["masked"]
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def on_rank(rank, folder):
    "One of two processes: its rows, the loss of the global batch, the gradient of its rows."
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    embeddings, identities = training_batch()
    own = slice(rank * B // 2, (rank + 1) * B // 2)
    rows = embeddings.view(4, B, D)[:, own].reshape(-1, D).requires_grad_()
    value, masked = batch_loss(rows, identities[own], config())
    value.backward()
    torch.save((value.detach(), masked, rows.grad.view(4, -1, D)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    torch.multiprocessing.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    embeddings, identities = training_batch()
    embeddings.requires_grad_()
    value, masked = batch_loss(embeddings, identities, config())
    value.backward()
    for own_value, own_masked, _ in results:
        torch.testing.assert_close(own_value, value.detach(), rtol=1e-6, atol=1e-6)
        assert own_masked == masked
    # each rank's loss is the global one, so the sum over ranks counts every gradient twice
    gradient = torch.cat([g for _, _, g in results], dim=1) / 2
    torch.testing.assert_close(gradient, embeddings.grad.view(4, B, D), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guard": "other"}, "guard should be '', 'self' or 'guide', not 'other'"),
        ({"guard_margin": float("nan")}, "guard_margin"),
        ({"guard_margin": 5.0}, "guard_margin"),
        ({"guard_after": -1}, "guard_after"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**options)
    assert "\n" not in str(error.value)


# --- a guide ---

TEXTS = ["one", "two", "three", "four", "two"]


def identities_of(rows):
    return torch.tensor([[text_identity(text) for text in row] for row in rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_guide_finds_the_vectors_of_texts(tmp_path, dtype):
    table = np.arange(15, dtype=dtype).reshape(5, 3)
    np.save(tmp_path / "guide.npy", table)
    guide = Guide(TEXTS, np.load(tmp_path / "guide.npy", mmap_mode="r"))
    vectors = guide(identities_of([["four", "one"], ["two", "two"]]))
    assert vectors.dtype == torch.float32 and vectors.shape == (2, 2, 3)
    # of equal texts the first
    assert torch.equal(vectors, torch.tensor(table[[[3, 0], [1, 1]]]).float())


def test_a_guide_with_another_tokenizer(tiny_backbone, tiny_tokenizer):
    "The guide sees texts, so neither its tokens nor its width need to be those of the model."
    model = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)
    other = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    pairs = [("a dog is playing", "a dog plays"), ("snow", "rice"), ("a dog", "the dog plays")]
    texts = sorted({text for pair in pairs for text in pair})
    vectors = Guide(texts, other.encode(texts, progress=False))(identities_of(pairs))
    assert vectors.shape == (3, 2, 384)
    own = [torch.tensor(model.encode(list(x), progress=False)) for x in zip(*pairs)]
    mask = guide_mask(vectors[:, 0], vectors[:, 1])
    assert own[0].shape == (3, 32) and torch.isfinite(info_nce(*own, same=mask))


# --- bad input ---


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, p, n: guide_mask(a, p[:, :3]), r"are \(12, 8\), \(12, 3\) and None; they must"),
        (lambda a, p, n: guide_mask(a, p, n[:5]), r"and \(5, 2, 8\); they must be"),
        (lambda a, p, n: guide_mask(a, p, p), r"and \(12, 8\); they must be"),
        (lambda a, p, n: guide_mask(a, p, absolute_margin=float("nan")), "absolute_margin is nan"),
        (lambda a, p, n: guide_mask(a, p, relative_margin="5%"), "relative_margin is '5%'"),
        (lambda a, p, n: score_mask(a @ p.T, relative_margin=10**400), "relative_margin is 1000"),
        (lambda a, p, n: guide_mask(a, p, absolute_margin=-(10**400)), "absolute_margin is -1000"),
        (
            lambda a, p, n: score_mask(a @ p.T, torch.zeros(5)),
            r"absolute_margin is a tensor of shape \(5,\); it must have one value, or one for each",
        ),
        (
            lambda a, p, n: guide_mask(a, p, relative_margin=torch.zeros(12, 1)),
            r"relative_margin is a tensor of shape \(12, 1\)",
        ),
        (lambda a, p, n: self_mask(a, p, margin=torch.zeros(3)), r"margin is a tensor of .*\(3,\)"),
        (
            lambda a, p, n: self_mask(a, p, margin=float("-inf")),
            "margin is -inf; it must be a finite",
        ),
        (lambda a, p, n: guide_mask(a, p, first=1), "first is 1, but 12 anchors have 12"),
        (lambda a, p, n: guide_mask(a, p[:5]), "first is 0, but 12 anchors have 5 candidates"),
        (lambda a, p, n: score_mask(a @ p.T, first=-1), "it must be from 0 to 0"),
        (lambda a, p, n: Guide(TEXTS, np.zeros((4, 3))), r"shape \(4, 3\) for 5 texts"),
        (lambda a, p, n: Guide(TEXTS, np.zeros(5)), r"shape \(5,\) for 5 texts"),
        (lambda a, p, n: Guide(TEXTS, np.zeros((5, 3), np.int8)), "are int8, which are codes"),
        (
            lambda a, p, n: Guide(TEXTS, np.zeros((5, 3)))(identities_of([["one", "six"]])),
            "no vector for 1 of 2 texts, the first in row 0, column 1; encode all texts of the run",
        ),
        (
            lambda a, p, n: Guide(TEXTS, np.full((5, 3), np.nan))(identities_of([["one", "two"]])),
            "vector of row 0, column 0 contains NaN or inf",
        ),
        (
            lambda a, p, n: Guide([], np.zeros((0, 3)))(identities_of([["one", "two"]])),
            "has no text",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(*batch())
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
