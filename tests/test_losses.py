"""The losses beside InfoNCE against sentence-transformers, loops and finite differences."""

import math

import pytest
import torch

from contrastive_st.losses import cosent

B, D = 7, 12


def batch(seed=0, columns=2, dtype=torch.float32, noise=1.0):
    "Columns that resemble each other, (B, D) each, with gradients."
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(B, D, generator=g)
    rest = [first + noise * torch.randn(B, D, generator=g) for _ in range(columns - 1)]
    return [x.to(dtype).requires_grad_() for x in (first, *rest)]


def grades(seed=0, levels=4):
    "Scores in [0, 1] with ties, (B,)."
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (B,), generator=g).float() / (levels - 1)


@pytest.fixture(scope="module")
def peer():
    "Losses and similarity functions of sentence-transformers; it is a development dependency only."
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    return losses, util


def assert_same_value_and_gradients(ours, theirs, inputs, rounding=1e-6):
    "The same loss, and gradients that differ by at most `rounding` of their length."
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    g1, g2 = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs)])
        for loss in (ours, theirs)
    )
    assert (g1 - g2).norm() <= rounding * max(1, g2.norm())


# --- CoSENT ---


def loop_cosent(first, second, scores, scale=20.0):
    s = torch.cosine_similarity(first, second).tolist()
    total = 1.0
    for k in range(len(s)):
        for i in range(len(s)):
            if scores[i] > scores[k]:
                total += math.exp(scale * (s[k] - s[i]))
    return math.log(total)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosent_equals_sentence_transformers(peer, seed, scale, similarity, dtype):
    losses, util = peer
    function = {"cos": util.pairwise_cos_sim, "dot": util.pairwise_dot_score}[similarity]
    inputs, scores = batch(seed, dtype=dtype, noise=2.0), grades(seed)
    # a dot product of 12 numbers near 20, times 20, leaves fewer digits behind the point
    rounding = 1e-6 if similarity == "cos" else 1e-5 if dtype == torch.float32 else 1e-10
    assert_same_value_and_gradients(
        cosent(*inputs, scores, scale=scale, similarity=similarity),
        losses.CoSENTLoss(
            torch.nn.Identity(), scale=scale, similarity_fct=function
        ).compute_loss_from_embeddings(inputs, scores),
        inputs,
        rounding,
    )


@pytest.mark.parametrize("seed", range(3))
def test_cosent_equals_the_double_loop(seed):
    inputs, scores = batch(seed), grades(seed)
    expected = loop_cosent(*inputs, scores)
    assert cosent(*inputs, scores).item() == pytest.approx(expected, rel=1e-5)


def test_cosent_gradients_equal_finite_differences():
    inputs, scores = batch(dtype=torch.float64), grades()
    assert torch.autograd.gradcheck(lambda *x: cosent(*x, scores, scale=3.0), inputs)


def test_cosent_of_equal_scores_is_zero():
    inputs = batch()
    loss = cosent(*inputs, torch.full((B,), 0.5))
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, inputs))


def test_cosent_stays_finite_and_fp32():
    first, second = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cosent(first, second, grades())
    assert inside.dtype == torch.float32 and inside.item() == cosent(first, second, grades()).item()
    far = cosent(1e3 * first, 1e3 * second, grades(), similarity="dot", scale=100.0)
    assert far.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(far, first))


# --- refusals ---

x = torch.zeros(4, 8)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cosent(x, x[:3], x[:, 0]), ["(4, 8)", "(3, 8)"]),
        (lambda: cosent(x[0], x[0], x[:, 0]), ["(8,)", "(B, D)"]),
        (lambda: cosent(x.long(), x, x[:, 0]), ["torch.int64", "floating point"]),
        (lambda: cosent(x, x, x[:, :1]), ["(4, 1)", "(4,)"]),
        (lambda: cosent(x, x, x[:, 0].long()), ["torch.int64", "floating point"]),
        (lambda: cosent(x, x, x[:, 0], scale=0), ["scale is 0"]),
        (lambda: cosent(x, x, x[:, 0], similarity="cosine"), ["'cosine'", "'cos', 'dot'"]),
    ],
)
def test_refusals_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
