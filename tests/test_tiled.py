"""The loss without its matrix: equal to the plain loss, tile by tile and rank by rank."""

import sys

import pytest
import torch
import torch.distributed as dist
from conftest import forked, run_itself
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_st.loss import gather, info_nce, same_text
from contrastive_st.tiled import SameTiles, own_rows_info_nce, tiled_info_nce

D = 12


def batch(B, k=0, seed=0, dtype=torch.float32):
    "Anchors, positives and k negatives that resemble them (None if k = 0), with gradients."
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(B, D, generator=g)
    positives = anchors + 2 * torch.randn(B, D, generator=g)
    negatives = anchors[:, None] + 2 * torch.randn(B, k, D, generator=g) if k else None
    return [
        None if x is None else x.to(dtype).requires_grad_() for x in (anchors, positives, negatives)
    ]


def names(B, k=0, seed=0, texts=None):
    "Identities with repeats, and labels of which some are 0."
    g = torch.Generator().manual_seed(seed)
    identities = torch.randint(-(texts or B), texts or B, (B, 2 + k), generator=g)
    return identities, torch.randint(0, 4, (B,), generator=g)


def given(inputs):
    return [x for x in inputs if x is not None]


def assert_equal_losses(one, two, inputs, rounding=1e-6):
    torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)
    g1, g2 = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, given(inputs))])
        for loss in (one, two)
    )
    # twice, since in float32 each of the two is about `rounding` away from the truth
    assert (g1 - g2).norm() <= 2 * rounding * max(1, g2.norm())


# --- the mask ---


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("texts", [1, 5, 1000])
@pytest.mark.parametrize("labelled", [False, True])
def test_tiles_of_the_mask_equal_the_whole(seed, k, texts, labelled):
    B = 9
    identities, labels = names(B, k, seed, texts)
    labels = labels if labelled else None
    same, tiles = same_text(identities, labels), SameTiles(identities, labels)
    assert tiles.shape == same.shape
    own = torch.eye(*same.shape, dtype=torch.bool)
    for t in (1, 4, 9, 100):
        for i in range(0, B, t):
            for j in range(0, same.shape[1], t):
                rows = slice(i, min(i + t, B))
                columns = slice(j, min(j + t, same.shape[1]))
                expected = same[rows, columns]
                assert torch.equal(tiles(rows, columns) & ~own[rows, columns], expected)


# --- the loss ---


@pytest.mark.parametrize("B, tile", [(2, 1), (7, 3), (7, 7), (8, 4), (33, 16), (130, 64)])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("similarity, scale", [("cos", 20.0), ("dot", 0.5)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", ["", "text", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_info_nce(B, tile, k, similarity, scale, symmetric, masked, dtype):
    inputs, (identities, labels) = batch(B, k, dtype=dtype), names(B, k)
    named = {"": None, "text": (identities,), "labels": (identities, labels)}[masked]
    options = dict(similarity=similarity, scale=scale, symmetric=symmetric)
    assert_equal_losses(
        tiled_info_nce(*inputs, same=named and SameTiles(*named), tile=tile, **options),
        info_nce(*inputs, same=None if named is None else same_text(*named), **options),
        inputs,
        1e-6 if dtype == torch.float32 else 1e-12,
    )


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_equal_finite_differences(k, symmetric):
    columns = given(batch(5, k, dtype=torch.float64))
    inputs = [x.detach()[..., :4].requires_grad_() for x in columns]  # each number costs two calls
    same = SameTiles(names(5, k)[0])
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(scale, *columns):
        return tiled_info_nce(*columns, scale=scale, symmetric=symmetric, same=same, tile=2)

    assert torch.autograd.gradcheck(loss, (scale, *inputs))


def test_a_whole_mask_and_a_function_work_too_and_stay_as_they_were():
    inputs, (identities, _) = batch(7, 1), names(7, 1)
    same = same_text(identities) | torch.eye(7, 14, dtype=torch.bool)  # own positives, too
    before = same.clone()
    for mask in (same, lambda rows, columns: same[rows, columns]):
        one = tiled_info_nce(*inputs, symmetric=True, same=mask, tile=3)
        assert_equal_losses(one, info_nce(*inputs, symmetric=True, same=same), inputs)
    assert torch.equal(same, before)


@pytest.mark.parametrize("k", [0, 2])
def test_a_batch_of_duplicates_gives_zero(k):
    inputs = batch(6, k)
    same = SameTiles(torch.full((6, 2 + k), 5))
    loss = tiled_info_nce(*inputs, symmetric=True, same=same, tile=4)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, given(inputs)))


def test_autocast_and_bf16_change_nothing_but_the_inputs():
    half = [x.detach().bfloat16().requires_grad_() for x in batch(7, 1)]
    full = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tiled_info_nce(*half, symmetric=True, tile=3)
        grads = torch.autograd.grad(inside, half)
    outside = tiled_info_nce(*full, symmetric=True, tile=3)
    assert inside.dtype == torch.float32 and inside.item() == outside.item()
    for g1, g2 in zip(grads, torch.autograd.grad(outside, full)):
        assert g1.dtype == torch.bfloat16 and torch.equal(g1, g2.bfloat16())


def test_extreme_scores_stay_finite_and_nan_is_not_hidden():
    anchors, positives, _ = batch(6)
    far = tiled_info_nce(1e3 * anchors, -1e3 * positives, scale=100.0, similarity="dot", tile=4)
    assert far.isfinite() and torch.autograd.grad(far, anchors)[0].isfinite().all()
    broken = anchors.detach().index_fill(0, torch.tensor(1), float("nan"))
    assert tiled_info_nce(broken, positives, same=torch.ones(6, 6).bool(), tile=4).isnan()


def test_no_tensor_is_larger_than_a_tile_or_the_embeddings():
    "Every result of an operator, forward and backward, has at most N x D or tile x tile numbers."
    B, tile = 600, 50
    anchors, positives, negatives = batch(B, 1)
    identities, labels = names(B, 1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    with Watch():
        same = SameTiles(identities, labels)
        tiled_info_nce(
            anchors, positives, negatives, symmetric=True, same=same, tile=tile
        ).backward()
    assert largest <= max(2 * B * D, (tile + 1) ** 2) < B * B


# --- refusals ---

x = torch.zeros(4, 8)
IDS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize("loss", [tiled_info_nce, own_rows_info_nce])
@pytest.mark.parametrize(
    "args, options, words",
    [
        ((x, x[:3]), {}, ["(4, 8)", "(3, 8)"]),
        ((x, x, x), {}, ["negatives[:, None]"]),
        ((x.long(), x), {}, ["torch.int64", "floating point"]),
        ((x[:1], x[:1]), {}, ["nothing to contrast"]),
        ((x, x), {"scale": 0}, ["scale is 0"]),
        ((x, x), {"similarity": "l2"}, ["'l2'", "'cos', 'dot'"]),
        ((x, x), {"tile": 0}, ["tile is 0"]),
        ((x, x), {"tile": 2.5}, ["tile is 2.5"]),
        ((x, x), {"same": SameTiles(IDS[:3])}, ["(3, 3)", "(4, 4)"]),
        ((x, x), {"same": torch.zeros(4, 4)}, ["torch.float32", "torch.bool"]),
    ],
)
def test_refusals_name_what_is_wrong(loss, args, options, words):
    with pytest.raises(ValueError) as error:
        loss(*args, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "identities, labels, words",
    [
        (IDS[:, :1], None, ["(4, 1)", "(B, C)"]),
        (x, None, ["torch.float32", "torch.int64"]),
        (IDS, IDS, ["labels are (4, 2)"]),
    ],
)
def test_the_mask_refuses_what_same_text_refuses(identities, labels, words):
    with pytest.raises(ValueError) as error:
        SameTiles(identities, labels)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- across ranks: 12 rows over 1, 2, 3 or 4 processes ---

B, WIDE, K = 12, 10, 2
OPTIONS = [
    {},
    {"symmetric": True},
    {"k": K, "masked": True},
    {"k": K, "masked": True, "symmetric": True, "learned": True},
]


class Encoder(torch.nn.Module):
    "A linear encoder with a learned scale beside it."

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(WIDE, D, dtype=torch.float64)
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, inputs):
        return self.linear(inputs), self.log_scale.exp()


def training_batch():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(B, 2 + K, WIDE, generator=g, dtype=torch.float64)
    return inputs, *names(B, K, texts=8)


def columns(embeddings, k=0):
    return embeddings[:, 0], embeddings[:, 1], embeddings[:, 2:] if k else None


def rank_step(model, inputs, identities, labels, options):
    "What a training step does on each rank, its gradients averaged as DDP averages them."
    k = options.get("k", 0)
    same = None
    if options.get("masked"):
        same = SameTiles(gather(identities[:, : 2 + k].contiguous()), gather(labels))
    embeddings, scale = model(inputs)
    loss = own_rows_info_nce(
        *columns(embeddings, k),
        scale=scale if options.get("learned") else 20.0,
        symmetric=options.get("symmetric", False),
        same=same,
        tile=5,
    )
    loss.backward()
    for p in model.linear.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    # the learned scale lies outside of DDP: its gradient must be right by itself
    return loss.detach(), [p.grad for p in model.parameters()]


def on_rank(rank, folder):
    "Train for a step among the first P processes, for P from 1 to 4."
    torch.set_num_threads(1)
    for P in range(rank + 1, 5):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous{P}", rank=rank, world_size=P
        )
        b = B // P
        rows = [t[rank * b : (rank + 1) * b] for t in training_batch()]
        results = [rank_step(Encoder(), *rows, options) for options in OPTIONS]
        try:  # refused on each rank before anything is exchanged
            own_rows_info_nce(rows[0][:, 0], rows[0][:, 1], same=SameTiles(rows[1][:, :2]))
        except ValueError as error:
            results.append(str(error))
        torch.save(results, f"{folder}/{P}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    run_itself(__file__, folder)
    return folder


@pytest.fixture(params=[1, 2, 3, 4])
def ranks(request, four_processes):
    "What each of P ranks computed."
    P = request.param
    return [torch.load(four_processes / f"{P}-{rank}.pt") for rank in range(P)]


def test_ranks_of_own_rows_equal_one_process(ranks):
    inputs, identities, labels = training_batch()
    for number, options in enumerate(OPTIONS):
        k, model = options.get("k", 0), Encoder()
        embeddings, scale = model(inputs)
        same = same_text(identities, labels) if options.get("masked") else None
        loss = info_nce(
            *columns(embeddings, k),
            scale=scale if options.get("learned") else 20.0,
            symmetric=options.get("symmetric", False),
            same=same,
        )
        loss.backward()
        for results in ranks:
            value, grads = results[number]
            torch.testing.assert_close(value, loss.detach(), rtol=1e-10, atol=1e-10)
            for got, want in zip(grads, [p.grad for p in model.parameters()]):
                assert (got is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_mask_of_the_own_rows_only_is_refused(ranks):
    for results in ranks:
        if len(ranks) > 1:
            b = B // len(ranks)
            assert f"({b}, {b})" in results[-1] and "(12, 12)" in results[-1]


def test_without_ranks_it_is_the_tiled_loss():
    inputs = batch(6, 1)
    one, two = own_rows_info_nce(*inputs, tile=4), tiled_info_nce(*inputs, tile=4)
    assert one.item() == two.item()


if __name__ == "__main__":
    forked(on_rank, (sys.argv[1],), 4)
