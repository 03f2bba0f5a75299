"""The losses beside InfoNCE against sentence-transformers, loops and finite differences."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer, sentences
from test_run import dropout_run, guide_index, same
from test_trainer import At, config, make_encoder, stop

from contrastive_st.data import Source
from contrastive_st.loss import info_nce, same_text
from contrastive_st.losses import (
    DIRECTIONS,
    HARDNESS,
    LearnedScale,
    cosent,
    distill_kl,
    gte,
    margin_mse,
    siglip,
)
from contrastive_st.mixture import Mixture, as_mixture
from contrastive_st.run import Run, TrainConfig, batch_loss
from contrastive_st.tokens import Tokens

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


# --- SigLIP ---


def pairs(seed=0, k=0, dtype=torch.float32, noise=2.0):
    "Anchors, positives and (B, K, D) negatives, None if K = 0."
    columns = batch(seed, 2 + k, dtype, noise)
    negatives = torch.stack([x.detach() for x in columns[2:]], dim=1) if k else None
    return [*columns[:2], negatives.requires_grad_() if k else None]


def mask(seed=0, k=0, texts=9):
    g = torch.Generator().manual_seed(seed)
    same = same_text(torch.randint(0, texts, (B, 2 + k), generator=g))
    assert same.any()
    return same


def given(inputs):
    return [x for x in inputs if x is not None]


def loop_siglip(a, p, n, scale, bias, same):
    candidates = p if n is None else torch.cat([p, n.flatten(0, 1)])
    s = torch.cosine_similarity(a[:, None], candidates[None], dim=-1).tolist()
    total = 0.0
    for i, row in enumerate(s):
        for j, value in enumerate(row):
            z = 1 if i == j else -1
            if i == j or same is None or not same[i, j]:
                total -= math.log(1 / (1 + math.exp(-z * (scale * value + bias))))
    return total / len(s)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (3.0, 0.5)])
@pytest.mark.parametrize("masked", [False, True])
def test_siglip_equals_the_formula(seed, k, scale, bias, masked):
    inputs, same = pairs(seed, k, torch.float64), mask(seed, k) if masked else None
    ours = siglip(*inputs, scale=scale, bias=bias, same=same)
    assert ours.item() == pytest.approx(loop_siglip(*inputs, scale, bias, same), rel=1e-6)


def test_siglip_equals_transformers():
    "Their SiglipModel computes its loss from the logits of two towers."
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.SiglipConfig(
        text_config=size | {"vocab_size": 20, "projection_size": 8, "max_position_embeddings": 8},
        vision_config=size | {"image_size": 4, "patch_size": 2},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    torch.nn.init.constant_(model.logit_scale, math.log(10.0))
    torch.nn.init.constant_(model.logit_bias, -10.0)
    texts, images = torch.randint(2, 20, (5, 8)), torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        theirs = model(input_ids=texts, pixel_values=images, return_loss=True)
    ours = siglip(theirs.text_embeds, theirs.image_embeds)
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_siglip_gradients_equal_finite_differences(k):
    inputs, same = given(pairs(k=k, dtype=torch.float64)), mask(k=k)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(scale, bias, *columns):
        return siglip(*columns, scale=scale, bias=bias, same=same)

    assert torch.autograd.gradcheck(loss, (scale, bias, *inputs))


def test_siglip_masked_cells_get_no_gradient():
    same = mask(k=1)
    anchors = torch.eye(B)
    candidates = torch.randn(2 * B, B, requires_grad=True)
    positives, negatives = candidates[:B], candidates[B:, None]
    loss = siglip(anchors, positives, negatives, 1.0, 0.0, similarity="dot", same=same)
    (cells,) = torch.autograd.grad(loss, candidates)
    assert torch.equal(cells.T == 0, same)


# --- GTE ---


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize(
    "directions",
    [DIRECTIONS, DIRECTIONS[:1], ("query_to_doc", "doc_to_doc"), ("query_to_doc", "doc_to_query")],
)
@pytest.mark.parametrize(
    "hardness, hardness_of", [(0.0, HARDNESS[0]), *((5.0, h) for h in HARDNESS)]
)
def test_gte_equals_sentence_transformers(peer, k, similarity, directions, hardness, hardness_of):
    losses, util = peer
    inputs = pairs(1, k, torch.float64)
    if similarity == "dot":
        inputs = [
            x if x is None else F.normalize(x.detach(), dim=-1).requires_grad_() for x in inputs
        ]
    theirs = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        similarity_fct={"cos": util.cos_sim, "dot": util.dot_score}[similarity],
        directions=directions,
        hardness_mode=hardness_of if hardness else None,
        hardness_strength=hardness,
    )
    columns = inputs[:2] + ([] if k == 0 else list(inputs[2].unbind(1)))
    options = dict(directions=directions, hardness=hardness, hardness_of=hardness_of)
    assert_same_value_and_gradients(
        gte(*inputs, similarity=similarity, **options),
        theirs.compute_loss_from_embeddings(columns, None),
        given(inputs),
    )


def loop_gte(a, p, n, same, scale=20.0):
    "The four sums of the paper, without what belongs to the row."
    K = 0 if n is None else n.shape[1]
    documents = p if n is None else torch.cat([p, n.flatten(0, 1)])
    row = [*range(B), *(i for i in range(B) for _ in range(K))]  # of each document

    def e(u, v):
        return math.exp(scale * torch.cosine_similarity(u, v, dim=0).item())

    def masked(i, j):
        return i != j and bool(same[i, j])

    total = 0.0
    for i in range(B):
        z = sum(e(a[i], c) for j, c in enumerate(documents) if not masked(i, j))
        z += sum(e(p[i], a[j]) for j in range(B) if not masked(j, i))
        for j in range(B):
            if j != i and not masked(i, j) and not masked(j, i):
                z += e(a[i], a[j]) + e(p[i], p[j])
        for j in range(B, len(documents)):
            if row[j] != i and not masked(i, j):
                z += e(p[i], documents[j])
        total -= math.log(e(a[i], p[i]) / z)
    return total / B


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [0, 2])
def test_gte_with_a_mask_equals_the_loops(seed, k):
    inputs, same = pairs(seed, k, torch.float64), mask(seed, k)
    assert gte(*inputs, same=same).item() == pytest.approx(loop_gte(*inputs, same), rel=1e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_gte_gradients_equal_finite_differences(k):
    inputs, same = given(pairs(k=k, dtype=torch.float64)), mask(k=k)
    assert torch.autograd.gradcheck(lambda *x: gte(*x, scale=3.0, same=same), inputs)


@pytest.mark.parametrize("k", [0, 2])
def test_gte_of_one_direction_is_info_nce(k):
    inputs, same = pairs(k=k), mask(k=k)
    one, two = gte(*inputs, same=same, directions=DIRECTIONS[:1]), info_nce(*inputs, same=same)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [siglip, gte])
def test_autocast_and_bf16_change_nothing_but_the_inputs(loss):
    half = [x.bfloat16() for x in pairs(k=1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*half)
    assert inside.dtype == torch.float32
    assert inside.item() == loss(*(x.float() for x in half)).item()


# --- the learned scale ---


def test_learned_scale_is_saved_logged_and_held_below_its_maximum():
    learned = LearnedScale(20.0, bias=-10.0, maximum=50.0)
    assert learned()["scale"].item() == pytest.approx(20.0) and learned.logs()["bias"] == -10.0
    with torch.no_grad():
        learned.log_scale.fill_(9.0)  # an optimiser that went too far
    scale = learned()["scale"]
    assert scale.item() == pytest.approx(50.0)
    scale.backward()
    assert learned.log_scale.grad > 0  # it can come back
    other = LearnedScale(bias=0.0)
    other.load_state_dict(learned.state_dict())
    assert other()["scale"].item() == pytest.approx(50.0) and other.bias.item() == -10.0
    assert not other.logs()["scale"].requires_grad


def test_learned_scale_gets_the_gradient_of_the_formula():
    anchors, positives, _ = pairs(dtype=torch.float64)
    learned = LearnedScale(5.0).double()
    info_nce(anchors, positives, **learned()).backward()
    step = 1e-6
    above, below = (
        info_nce(anchors, positives, scale=5.0 * math.exp(d)).item() for d in (step, -step)
    )
    assert learned.log_scale.grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-6)


# --- distillation ---


def teacher(k, seed=0):
    return 5 * torch.randn(B, 1 + k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("form", ["scores", "margins"])
def test_margin_mse_equals_sentence_transformers(peer, k, similarity, form):
    losses, util = peer
    inputs, scores = pairs(k=k, dtype=torch.float64), teacher(k).double()
    if form == "margins":
        scores = scores[:, :1] - scores[:, 1:]
    function = {"cos": util.pairwise_cos_sim, "dot": util.pairwise_dot_score}[similarity]
    theirs = losses.MarginMSELoss(torch.nn.Identity(), similarity_fct=function)
    columns = [*inputs[:2], *inputs[2].unbind(1)]
    assert_same_value_and_gradients(
        margin_mse(*inputs, scores, similarity=similarity),
        theirs.compute_loss_from_embeddings(columns, scores),
        inputs,
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("temperatures", [(1.0, None), (0.05, None), (0.1, 2.0)])
def test_distill_kl_equals_sentence_transformers(peer, k, similarity, temperatures):
    losses, util = peer
    inputs, scores = pairs(k=k, dtype=torch.float64), teacher(k).double() / 10
    function = {"cos": util.pairwise_cos_sim, "dot": util.pairwise_dot_score}[similarity]
    theirs = losses.DistillKLDivLoss(
        torch.nn.Identity(),
        similarity_fct=function,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
    )
    columns = [*inputs[:2], *inputs[2].unbind(1)]
    ours = distill_kl(
        *inputs,
        scores,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        similarity=similarity,
    )
    expected = theirs.compute_loss_from_embeddings(columns, scores)
    assert_same_value_and_gradients(ours, expected, inputs)


@pytest.mark.parametrize("loss", [margin_mse, distill_kl])
def test_distillation_gradients_equal_finite_differences(loss):
    inputs, scores = pairs(k=2, dtype=torch.float64), teacher(2).double()
    assert torch.autograd.gradcheck(lambda *x: loss(*x, scores, similarity="cos"), inputs)


def test_one_margin_per_row_may_come_without_its_dimension():
    inputs, scores = pairs(k=1), teacher(1)
    margins = scores[:, 0] - scores[:, 1]
    assert margin_mse(*inputs, margins).item() == margin_mse(*inputs, scores).item()


# --- a teacher's scores in columns ---


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("k, form", [(1, "scores"), (3, "scores"), (1, "margins"), (3, "margins")])
@pytest.mark.parametrize("loss", ["margin_mse", "distill_kl"])
def test_a_run_s_loss_of_a_column_equals_sentence_transformers(peer, loss, k, form, similarity):
    "From rows with scores or differences, through source, batch and tokens, to 1e-6."
    scores = teacher(k, seed=k)
    column = scores if form == "scores" else scores[:, :1] - scores[:, 1:]
    rows = [
        (f"a {n}", f"p {n}", *(f"n {n} {j}" for j in range(k)), *column[n].tolist())
        for n in range(B)
    ]
    at = range(2 + k, len(rows[0]))
    mixture = as_mixture(rows, B, teacher=list(at))
    batch = Tokens(make_tokenizer(), 16)(mixture.batch(0))
    order = [int(text.split()[1]) for text, *_ in mixture.batch(0).examples]
    torch.manual_seed(0)
    embeddings = torch.randn((2 + k) * B, D, dtype=torch.float64, requires_grad=True)
    c = TrainConfig(steps=1, loss=loss, scale=1.0, similarity=similarity)
    ours, masked = batch_loss(embeddings, batch.identities, c, teacher=batch.teacher)
    losses, util = peer
    function = {"cos": util.pairwise_cos_sim, "dot": util.pairwise_dot_score}[similarity]
    Loss = losses.MarginMSELoss if loss == "margin_mse" else losses.DistillKLDivLoss
    labels = column[order].double()
    if loss == "distill_kl" and form == "margins":  # it takes scores, of which differences count
        labels = torch.cat([torch.zeros(B, 1), -labels], dim=1)
    theirs = Loss(torch.nn.Identity(), similarity_fct=function)
    expected = theirs.compute_loss_from_embeddings(list(embeddings.split(B)), labels)
    gradients = [torch.autograd.grad(x, embeddings)[0] for x in (ours, expected)]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    assert masked == 0
    with pytest.raises(ValueError, match="no scores of a teacher in its field teacher"):
        batch_loss(embeddings, batch.identities, c)


def taught_rows(n=24, k=2, scale=1.0):
    "Rows of texts with a teacher that prefers short ones."
    texts = sentences((2 + k) * n, 3)
    rows = [tuple(texts[i::n][: 2 + k]) for i in range(n)]
    return [(*row, [scale * 0.01 * (len(row[0]) - len(text)) for text in row[1:]]) for row in rows]


def taught(rows, **options):
    return as_mixture(Source(rows, "taught", teacher=4, **options), 8)


def test_a_run_learns_from_a_column_and_goes_on_exactly(tmp_path):
    rows, c = taught_rows(), config(6, save_every=2, loss="distill_kl")
    whole = dropout_run(tmp_path / "whole", c, mixture=taught(rows))
    dropout_run(tmp_path / "parts", c, mixture=taught(rows), callbacks=[At(3, stop)])
    same_scores = taught(taught_rows(scale=0.5), teacher_scale=2.0)
    assert same(whole, dropout_run(tmp_path / "parts", c, mixture=same_scores, resume=True))
    with pytest.raises(ValueError, match="texts.taught was"):
        dropout_run(tmp_path / "whole", c, mixture=taught(taught_rows(scale=2)), resume=True)


def test_datasets_with_a_teacher_beside_others(tmp_path):
    "A batch has a column's scores, or the guide's, but never both."
    sources = [Source(taught_rows(), "column", teacher=4)]
    sources += [Source([row[:4] for row in taught_rows()], "guided")]
    texts = sorted({text for source in sources for row in source for text in row})
    guide = guide_index(tmp_path / "index", texts)
    mixture = Mixture(sources, [1, 1], 8, 1)
    assert [(pool.columns, pool.taught) for pool in mixture.pools] == [(4, False), (4, True)]
    c = config(4, loss="margin_mse", guide=guide)
    run, tokens = Run(make_encoder(), mixture, c, tmp_path / "run"), Tokens(make_tokenizer(), 64)
    kinds = Counter()
    for step in range(8):
        whole, parts = run.batch(tokens, step), [run.batch(tokens, step, r, 2) for r in (0, 1)]
        kinds[whole.teacher is None] += 1
        assert (whole.guide is None) != (whole.teacher is None)
        if whole.teacher is not None:
            assert torch.equal(torch.cat([part.teacher for part in parts]), whole.teacher)
            numbers = mixture.batch(step).teacher
            assert whole.teacher.dtype == torch.float32 and np.array_equal(whole.teacher, numbers)
    assert min(kinds.values()) >= 2
    dropout_run(tmp_path / "trained", c, mixture=mixture)


@pytest.mark.parametrize(
    "rows, options, settings, message",
    [
        (
            taught_rows(),
            {"teacher": 4},
            {},
            "dataset 1: its rows have the scores of a teacher, but loss is 'info_nce'",
        ),
        (
            [row[:4] for row in taught_rows()],
            {},
            {"loss": "margin_mse"},
            "its rows have no scores of a teacher, but loss = 'margin_mse' copies them; name their",
        ),
        ([row[:2] for row in taught_rows()], {}, {"loss": "distill_kl"}, "no scores of a teacher"),
    ],
)
def test_a_teacher_without_its_loss_and_the_loss_without_a_teacher(
    tmp_path, rows, options, settings, message
):
    mixture = as_mixture([Source(rows, "dataset 1", **options)], 8)
    with pytest.raises(ValueError, match=message) as error:
        dropout_run(tmp_path / "run", config(2, **settings), mixture=mixture)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


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
        (lambda: siglip(x, x[:3]), ["(4, 8)", "(3, 8)"]),
        (lambda: siglip(x, x, same=torch.zeros(4, 4)), ["torch.float32", "torch.bool"]),
        (lambda: gte(x, x, x), ["negatives[:, None]"]),
        (lambda: gte(x, x, directions=("doc_to_doc",)), ["'doc_to_doc'", "take 'query_to_doc'"]),
        (lambda: gte(x, x, directions=("query_to_doc", "up")), ["'up'", "'doc_to_query'"]),
        (lambda: gte(x, x, hardness=-1), ["hardness is -1"]),
        (lambda: gte(x, x, hardness_of="all"), ["'all'", "'hard_negatives'"]),
        (lambda: LearnedScale(0.5), ["scale is 0.5", "between 1"]),
        (lambda: LearnedScale(200.0), ["200.0", "maximum 100.0"]),
        (lambda: margin_mse(x, x, None, x), ["no negatives"]),
        (lambda: margin_mse(x, x, x[:, None], x), ["(4, 8)", "(4, 2) or (4, 1) or (4,)"]),
        (lambda: margin_mse(x, x, x[:, None], x[:, 0].long()), ["torch.int64"]),
        (lambda: distill_kl(x, x, x[:, None], x[:, :1]), ["(4, 1)", "must be (4, 2)"]),
        (lambda: distill_kl(x, x, x[:, None], x[:, :2], 0.0), ["temperature is 0.0"]),
    ],
)
def test_refusals_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
