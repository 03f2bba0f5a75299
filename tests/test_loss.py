"""The loss against sentence-transformers, against loops, and across two real processes."""

import math
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import forked, run_itself

from contrastive_st.loss import gather, info_nce, matryoshka, same_text

B, D = 6, 16


def batch(seed=0, b=B, d=D, k=0, dtype=torch.float32, noise=1.0):
    "Anchors, positives that resemble them, k negatives per row (None if k = 0), with gradients."
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(b, d, generator=g)
    positives = anchors + noise * torch.randn(b, d, generator=g)
    negatives = anchors[:, None] + 2 * noise * torch.randn(b, k, d, generator=g) if k else None
    return [
        None if x is None else x.to(dtype).requires_grad_() for x in (anchors, positives, negatives)
    ]


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [x for x in tensors if x is not None])


# --- the naive version: loops over Python floats ---


def loop_similarity(u, v, similarity):
    dot = sum(x * y for x, y in zip(u, v))
    return (
        dot
        if similarity == "dot"
        else dot / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))
    )


def loop_loss(
    anchors, positives, negatives=None, scale=20.0, symmetric=False, similarity="cos", same=None
):
    hard = [] if negatives is None else [n for row in negatives.tolist() for n in row]
    anchors, positives = anchors.tolist(), positives.tolist()

    def direction(queries, candidates, masked):
        total = 0.0
        for i, query in enumerate(queries):
            scores = {
                n: scale * loop_similarity(query, c, similarity)
                for n, c in enumerate(candidates)
                if n == i or not masked(i, n)
            }
            top = max(scores.values())
            total += top + math.log(sum(math.exp(s - top) for s in scores.values())) - scores[i]
        return total / len(queries)

    def masked(i, n):
        return same is not None and bool(same[i, n])

    loss = direction(anchors, positives + hard, masked)
    return (
        (loss + direction(positives, anchors, lambda i, n: masked(n, i))) / 2 if symmetric else loss
    )


def loop_same_text(rows, labels=None):
    candidates = [row[1] for row in rows] + [text for row in rows for text in row[2:]]
    known = {(row[0], row[1]) for row in rows}
    labels = labels or [0] * len(rows)

    def is_right(i, n):
        mates = n < len(rows) and labels[i] == labels[n] != 0
        return mates or rows[i][0] == candidates[n] or (rows[i][0], candidates[n]) in known

    return [
        [n != i and is_right(i, n) for n, text in enumerate(candidates)] for i in range(len(rows))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize(
    "similarity, scale", [("cos", 1.0), ("cos", 20.0), ("cos", 100.0), ("dot", 0.5)]
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_double_loop(seed, k, similarity, scale, symmetric, masked):
    inputs = batch(seed, k=k)
    g = torch.Generator().manual_seed(seed)
    same = same_text(torch.randint(0, 8, (B, 2 + k), generator=g)) if masked else None
    options = {"scale": scale, "symmetric": symmetric, "similarity": similarity, "same": same}
    assert info_nce(*inputs, **options).item() == pytest.approx(
        loop_loss(*inputs, **options), rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_equal_finite_differences(similarity, symmetric):
    inputs = batch(k=2, b=4, d=5, dtype=torch.float64)
    same = same_text(torch.randint(0, 6, (4, 4), generator=torch.Generator().manual_seed(0)))
    assert same.any()
    torch.autograd.gradcheck(
        lambda *x: info_nce(*x, scale=3.0, symmetric=symmetric, similarity=similarity, same=same),
        inputs,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [0, 2])
def test_order_of_the_rows_does_not_matter(seed, k):
    inputs = batch(seed, k=k)
    g = torch.Generator().manual_seed(seed)
    identities, order = torch.randint(0, 9, (B, 2 + k), generator=g), torch.randperm(B, generator=g)
    shuffled = [None if x is None else x.detach()[order].requires_grad_() for x in inputs]
    one = info_nce(*inputs, symmetric=True, same=same_text(identities))
    two = info_nce(*shuffled, symmetric=True, same=same_text(identities[order]))
    torch.testing.assert_close(one, two)
    for g1, g2 in zip(gradients(one, inputs), gradients(two, shuffled)):
        torch.testing.assert_close(g1[order], g2, rtol=1e-5, atol=1e-6)


def test_a_constant_encoder_scores_log_n():
    flat = torch.ones(8, 4)
    assert info_nce(flat, flat, flat[:, None].expand(8, 3, 4)).item() == pytest.approx(
        math.log(32), abs=1e-6
    )


# --- parity with sentence-transformers ---


@pytest.fixture(scope="module")
def peer():
    "Losses and similarity functions of sentence-transformers; it is a development dependency only."
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score

    return losses, {"cos": cos_sim, "dot": dot_score}


def columns(inputs):
    "The peer takes one (B, D) tensor per column."
    anchors, positives, negatives = inputs
    return [anchors, positives] + ([] if negatives is None else list(negatives.unbind(1)))


def assert_same_value_and_gradients(ours, theirs, inputs, rounding=1e-6):
    "The same loss, and gradients that differ by at most `rounding` of their length."
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    g1, g2 = (torch.cat([g.flatten() for g in gradients(loss, inputs)]) for loss in (ours, theirs))
    assert (g1 - g2).norm() <= rounding * g2.norm()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_sentence_transformers(peer, seed, k, scale, similarity, symmetric, dtype):
    # Pairs as an untrained encoder sees them. In float32 neighbouring scores near 100 are 8e-6
    # apart, so two orders of summation differ by about that much at scale 100; in float64 nothing
    # hides behind rounding.
    rounding = 1e-10 if dtype == torch.float64 else 1e-6 * max(1, scale / 20)
    losses, similarities = peer
    inputs = batch(seed, k=k, dtype=dtype, noise=3.0)
    if similarity == "dot":  # unit vectors, as models that are compared by dot product give
        inputs = [
            None if x is None else F.normalize(x.detach(), dim=-1).requires_grad_() for x in inputs
        ]
    directions = (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        if symmetric
        else {}
    )
    theirs = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=scale, similarity_fct=similarities[similarity], **directions
    )
    assert_same_value_and_gradients(
        info_nce(*inputs, scale=scale, similarity=similarity, symmetric=symmetric),
        theirs.compute_loss_from_embeddings(columns(inputs), None),
        inputs,
        rounding,
    )


def test_equals_their_symmetric_class(peer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class announces that it will be removed
        theirs = peer[0].MultipleNegativesSymmetricRankingLoss(torch.nn.Identity())
    inputs = batch(noise=3.0)
    assert_same_value_and_gradients(
        info_nce(*inputs, symmetric=True),
        theirs.compute_loss_from_embeddings(columns(inputs), None),
        inputs,
    )


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_matryoshka_equals_sentence_transformers(peer, k, weights):
    class Embedded(torch.nn.Module):
        "A model whose forward hands out embeddings that are there already."

        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return D

    losses, _ = peer
    model, inputs, widths = Embedded(), batch(k=k, noise=3.0), [16, 8, 4]
    theirs = losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model), widths, weights
    )
    assert_same_value_and_gradients(
        matryoshka(*inputs, widths=widths, weights=weights),
        theirs([{"embedding": x} for x in columns(inputs)], None),
        inputs,
    )


# --- the mask ---


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("texts", [1, 3, 12, 1000])
def test_mask_equals_its_definition(seed, columns, texts):
    identities = torch.randint(
        -texts, texts, (9, columns), generator=torch.Generator().manual_seed(seed)
    )
    same = same_text(identities)
    assert same.dtype == torch.bool and same.shape == (9, 9 * (columns - 1))
    assert same.tolist() == loop_same_text(identities.tolist())
    assert torch.equal(same[:, :9].T, same_text(identities[:, :2].flip(1)))  # the way back


def test_mask_holds_for_identities_at_the_ends_of_the_range():
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    rows = [[low, high], [high, low], [low, 0], [0, -1]]
    assert same_text(torch.tensor(rows)).tolist() == loop_same_text(rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("classes", [1, 4, 1000])
def test_mask_with_labels_equals_its_definition(seed, columns, classes):
    g = torch.Generator().manual_seed(seed)
    identities = torch.randint(-30, 30, (9, columns), generator=g)
    labels = torch.randint(0, classes + 1, (9,), generator=g)  # 0: without a label
    same = same_text(identities, labels)
    assert same.tolist() == loop_same_text(identities.tolist(), labels.tolist())
    assert torch.equal(same[:, :9].T, same_text(identities[:, :2].flip(1), labels))  # the way back


def test_labels_reach_no_hard_negative_and_zero_says_nothing():
    identities = torch.arange(9).view(3, 3)
    assert not same_text(identities, torch.zeros(3, dtype=torch.int64)).any()
    same = same_text(identities, torch.full((3,), 5))
    assert torch.equal(same[:, :3], ~torch.eye(3, dtype=torch.bool)) and not same[:, 3:].any()


def test_masked_cells_get_no_gradient():
    # one-hot anchors: the gradient of candidate n is the sum over anchors i of g[i, n] * anchor i,
    # so it can be read off cell by cell
    same = same_text(torch.randint(0, 7, (B, 4), generator=torch.Generator().manual_seed(3)))
    anchors = torch.eye(B)
    positives = torch.randn(B, B, requires_grad=True)
    negatives = torch.randn(B, 2, B, requires_grad=True)
    gp, gn = gradients(
        info_nce(anchors, positives, negatives, scale=1.0, similarity="dot", same=same),
        (positives, negatives),
    )
    cells = torch.cat([gp, gn.flatten(0, 1)]).T  # (B, N)
    assert same.any() and torch.equal(cells == 0, same)


def test_a_masked_column_may_hold_anything():
    "What is masked for every anchor changes neither the loss nor any gradient."
    anchors, positives, negatives = batch(k=1)
    same = torch.zeros(B, 2 * B, dtype=torch.bool)
    same[:, B + 1] = True  # the hard negative of row 1
    changed = negatives.detach().clone()
    changed[1] = 7.0
    one = info_nce(anchors, positives, negatives, same=same)
    two = info_nce(anchors, positives, changed, same=same)
    assert one.item() == two.item()
    for g1, g2 in zip(gradients(one, (anchors, positives)), gradients(two, (anchors, positives))):
        assert torch.equal(g1, g2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_a_batch_of_duplicates_gives_zero(symmetric, k):
    inputs = batch(k=k)
    loss = info_nce(*inputs, symmetric=symmetric, same=same_text(torch.full((B, 2 + k), 5)))
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(loss, inputs))


def test_own_positive_is_kept_whatever_the_mask_says():
    inputs = batch()
    same = torch.ones(B, B, dtype=torch.bool)
    loss = info_nce(*inputs, same=same, symmetric=True)
    assert loss.item() == 0
    assert all(torch.isfinite(g).all() for g in gradients(loss, inputs))


# --- precision, compilation ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1])
def test_half_precision_embeddings_are_computed_in_fp32(dtype, k):
    half = batch(k=k, dtype=dtype)
    full = [None if x is None else x.detach().float().requires_grad_() for x in half]
    one, two = info_nce(*half, symmetric=True), info_nce(*full, symmetric=True)
    assert one.dtype == torch.float32 and one.item() == two.item()
    for g1, g2 in zip(gradients(one, half), gradients(two, full)):
        assert g1.dtype == dtype and torch.equal(g1, g2.to(dtype))


def test_autocast_changes_nothing():
    inputs = batch(k=1)
    outside = info_nce(*inputs, symmetric=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(*inputs, symmetric=True)
        nested = matryoshka(*inputs, widths=[16, 8])
    assert inside.dtype == nested.dtype == torch.float32 and inside.item() == outside.item()
    for g1, g2 in zip(gradients(inside, inputs), gradients(outside, inputs)):
        assert torch.equal(g1, g2)


def test_extreme_scores_stay_finite():
    a = torch.randn(B, D, requires_grad=True)
    loss = info_nce(1e3 * a, -1e3 * a, scale=100.0, similarity="dot")
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(a.grad).all()


def test_compiles_into_one_graph():
    "No value is read on the way: tracing needs no break, one graph serves every batch of a shape."

    def step(anchors, positives, negatives, identities):
        return info_nce(
            gather(anchors), positives, negatives, symmetric=True, same=same_text(identities)
        )

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, backend=count, fullgraph=True)
    for seed, texts in enumerate([1, 5, 1000]):
        inputs, identities = batch(seed, k=1), torch.randint(0, texts, (B, 3))
        torch.testing.assert_close(compiled(*inputs, identities), step(*inputs, identities))
    assert len(graphs) == 1


def test_a_tensor_scale_learns():
    log_scale = torch.tensor(3.0, requires_grad=True)
    anchors, positives, _ = batch()
    info_nce(anchors, positives, scale=log_scale.exp()).backward()
    assert log_scale.grad.abs() > 0


def test_nan_is_not_hidden():
    anchors, positives, _ = batch()
    anchors = anchors.detach().index_fill(0, torch.tensor(1), float("nan"))
    assert info_nce(anchors, positives, same=torch.ones(B, B, dtype=torch.bool)).isnan()


# --- refusals ---

x = torch.zeros(4, 8)
IDS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: info_nce(x, x[:3]), ["(4, 8)", "(3, 8)"]),
        (lambda: info_nce(x, x[:, :5]), ["(4, 8)", "(4, 5)"]),
        (lambda: info_nce(x[0], x[0]), ["(8,)", "(B, D)"]),
        (lambda: info_nce(x, x, x), ["(4, K, 8)", "negatives[:, None]"]),
        (lambda: info_nce(x, x, torch.zeros(3, 2, 8)), ["(3, 2, 8)", "(4, K, 8)"]),
        (lambda: info_nce(x, x, torch.zeros(4, 2, 7)), ["(4, 2, 7)"]),
        (lambda: info_nce(x[:0], x[:0]), ["B = 0", "nothing to contrast"]),
        (lambda: info_nce(x[:1], x[:1]), ["B = 1", "nothing to contrast"]),
        (lambda: info_nce(x.long(), x), ["torch.int64", "floating point"]),
        (lambda: info_nce(x, x, scale=0), ["scale is 0"]),
        (lambda: info_nce(x, x, scale=-20.0), ["scale is -20.0"]),
        (lambda: info_nce(x, x, scale=float("nan")), ["scale is nan"]),
        (lambda: info_nce(x, x, scale=float("inf")), ["scale is inf"]),
        (lambda: info_nce(x, x, similarity="euclidean"), ["'euclidean'", "'cos', 'dot'"]),
        (lambda: info_nce(x, x, same=torch.zeros(4, 8, dtype=torch.bool)), ["(4, 8)", "(4, 4)"]),
        (
            lambda: info_nce(x, x, x[:, None], same=torch.zeros(4, 4, dtype=torch.bool)),
            ["(4, 4)", "(4, 8)"],
        ),
        (lambda: info_nce(x, x, same=torch.zeros(4, 4)), ["torch.float32", "torch.bool"]),
        (lambda: same_text(torch.zeros(4, dtype=torch.int64)), ["(4,)", "(B, C)"]),
        (lambda: same_text(torch.zeros(4, 1, dtype=torch.int64)), ["(4, 1)"]),
        (lambda: same_text(torch.zeros(4, 2)), ["torch.float32", "torch.int64"]),
        (lambda: same_text(IDS, torch.zeros(3).long()), ["labels are (3,)", "(4,)"]),
        (lambda: same_text(IDS, torch.zeros(4)), ["labels are (4,) torch.float32", "torch.int64"]),
        (lambda: matryoshka(x, x, widths=[]), ["at least one"]),
        (lambda: matryoshka(x, x, widths=[8, 16]), ["[8, 16]", "width 8"]),
        (lambda: matryoshka(x, x, widths=[0]), ["[0]"]),
        (lambda: matryoshka(x, x, widths=[8, 4], weights=[1.0]), ["1 weights", "2 widths"]),
    ],
)
def test_refusals_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_one_pair_with_a_hard_negative_is_enough():
    assert info_nce(x[:1] + 1, x[:1] + 1, x[:1, None] + 1).item() == pytest.approx(
        math.log(2), abs=1e-6
    )


# --- across ranks ---

P, b, WIDE = 2, 4, 10
OPTIONS = [{}, {"symmetric": True}, {"masked": True, "symmetric": True}, {"matryoshka": True}]


def training_batch():
    "Inputs of a linear encoder, (P * b, 3, WIDE), and identities with repeats across the halves."
    g = torch.Generator().manual_seed(0)
    return torch.randn(P * b, 3, WIDE, generator=g), torch.randint(0, 9, (P * b, 3), generator=g)


def encoder():
    torch.manual_seed(1)
    return torch.nn.Linear(WIDE, D)


def step_loss(embeddings, identities, masked=False, **options):
    "What a training step does: gather columns and identities, then the loss of the global batch."
    anchors, positives, negatives = (
        gather(e) for e in (embeddings[:, 0], embeddings[:, 1], embeddings[:, 2:])
    )
    if options.pop("matryoshka", False):
        return matryoshka(anchors, positives, negatives, widths=[D, D // 2], **options)
    return info_nce(
        anchors,
        positives,
        negatives,
        same=same_text(gather(identities)) if masked else None,
        **options,
    )


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=P
    )
    # this rank's contiguous slice
    inputs, identities = (t[rank * b : (rank + 1) * b] for t in training_batch())
    results = {}
    for number, options in enumerate(OPTIONS):
        model = torch.nn.parallel.DistributedDataParallel(encoder())
        loss = step_loss(model(inputs), identities, **options)
        loss.backward()
        results[number] = loss.detach(), [p.grad for p in model.parameters()]
    # the other way to spend the ranks: each scores its own anchors only. A gather whose backward
    # sums is exact for this too.
    model = torch.nn.parallel.DistributedDataParallel(encoder())
    embeddings = model(inputs)
    candidates = F.normalize(gather(embeddings[:, 1]), dim=-1)
    F.cross_entropy(
        20 * F.normalize(embeddings[:, 0], dim=-1) @ candidates.T,
        torch.arange(rank * b, (rank + 1) * b),
    ).backward()
    results["own anchors"] = None, [p.grad for p in model.parameters()]
    # layout: rank 0 first, any number of dimensions, integers too
    results["rows"] = gather(torch.full((2, 3), rank)), gather(inputs.transpose(1, 2)).requires_grad
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    run_itself(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(P)]


@pytest.mark.parametrize(
    "number", range(len(OPTIONS)), ids=[", ".join(o) or "plain" for o in OPTIONS]
)
def test_two_processes_equal_one(two_ranks, number):
    inputs, identities = training_batch()
    model = encoder()
    loss = step_loss(model(inputs), identities, **OPTIONS[number])
    expected = gradients(loss, list(model.parameters()))
    for rank in range(P):
        value, grads = two_ranks[rank][number]
        # every rank reports the global batch's loss
        torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-6)
        for got, want in zip(grads, expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # and no factor is needed


def test_the_mask_reaches_across_ranks():
    _, identities = training_batch()
    same = same_text(identities)
    assert same[:b, b : 2 * b].any() or same[b:, :b].any()


def test_gather_is_exact_when_each_rank_scores_its_own_anchors(two_ranks):
    inputs, _ = training_batch()
    model = encoder()
    embeddings = model(inputs)
    expected = gradients(info_nce(embeddings[:, 0], embeddings[:, 1]), list(model.parameters()))
    for got, want in zip(two_ranks[0]["own anchors"][1], expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gather_keeps_the_order_of_the_ranks(two_ranks):
    for results in two_ranks:
        rows, requires_grad = results["rows"]
        assert rows[:, 0].tolist() == [0, 0, 1, 1] and rows.dtype == torch.int64
        assert not requires_grad


def test_gather_without_ranks_is_the_identity():
    assert gather(x) is x


def test_imports_torch_only():
    import contrastive_st.loss as module

    with open(module.__file__, encoding="utf-8") as file:
        imported = {
            line.split()[1].split(".")[0] for line in file if line.startswith(("import ", "from "))
        }
    assert imported == {"collections", "torch"}, os.path.basename(module.__file__)


if __name__ == "__main__":
    forked(on_rank, (sys.argv[1],), P)
