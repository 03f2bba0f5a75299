"""Search, mining and clustering against sentence-transformers': ties, memory, bad input."""

import importlib.util
import random
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_st.search import (
    cluster,
    community_detection,
    exact_duplicates,
    faiss_index,
    faiss_search,
    nearest_rows,
    paraphrase_mining,
    semantic_search,
)


class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor that any operation makes."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [
            t
            for t in (out if isinstance(out, tuple | list) else [out])
            if isinstance(t, torch.Tensor)
        ]
        # a view costs nothing
        self.numbers = max([self.numbers, *(t.numel() for t in made if t._base is None)])
        return out


def slow_search(queries, corpus, top_k):
    "One table, one stable sort, in double precision."
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, corpus)
    ]
    scores = unit[0] @ unit[1].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("top_k, chunk", [(1, 100), (10, 333), (10, 16_384), (2000, 64)])
def test_equals_the_peer(top_k, chunk):
    from sentence_transformers.util import semantic_search as peer_search

    rng = np.random.default_rng(0)
    queries, corpus = (rng.standard_normal((n, 24)).astype(np.float32) for n in (300, 900))
    scores, indices = semantic_search(queries, corpus, top_k=top_k, chunk=chunk)
    theirs = peer_search(torch.tensor(queries), torch.tensor(corpus), top_k=top_k)
    assert scores.shape == indices.shape == (300, min(top_k, 900))
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    assert scores == pytest.approx(
        np.array([[hit["score"] for hit in hits] for hits in theirs]), abs=1e-6
    )
    agree = indices == np.array([[hit["corpus_id"] for hit in hits] for hits in theirs])
    assert agree.mean() > 0.999  # neighbours less than 1e-7 apart may swap
    again = slow_search(queries.astype(float), corpus.astype(float), top_k)
    assert scores == pytest.approx(again[0], abs=1e-6) and (indices == again[1]).mean() > 0.999


@pytest.mark.parametrize("chunk", [1, 7, 100, 16_384])
@pytest.mark.parametrize("top_k", [1, 5, 150, 400])
def test_ties_go_to_the_lower_row(chunk, top_k):
    rng = np.random.default_rng(0)
    # exact cosines: five different values
    queries, corpus = (rng.choice([-1.0, 1.0], (n, 4)) for n in (30, 400))
    scores, indices = semantic_search(queries, corpus, top_k=top_k, chunk=chunk)
    expected = slow_search(queries, corpus, top_k)
    assert (scores == expected[0]).all() and (indices == expected[1]).all()


def test_storage_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    queries, corpus = (rng.choice([-1.0, 1.0], (n, 16)) for n in (9, 500))
    np.save(tmp_path / "index.npy", corpus.astype(np.float16))
    expected = semantic_search(queries, corpus, top_k=7)
    for q, d in (
        (torch.tensor(queries), torch.tensor(corpus)),
        (queries, torch.tensor(corpus, dtype=torch.bfloat16)),
        (torch.tensor(queries, requires_grad=True), corpus),
        (queries, np.load(tmp_path / "index.npy", mmap_mode="r")),
    ):
        scores, indices = semantic_search(q, d, top_k=7, chunk=100)
        assert (scores == expected[0]).all() and (indices == expected[1]).all()
    # cosine: length plays no part
    assert semantic_search(5 * queries, 0.1 * corpus, top_k=7)[0] == pytest.approx(
        expected[0], abs=1e-6
    )


def test_edges():
    x = np.eye(4)
    assert semantic_search(x[:0], x)[0].shape == (0, 4)
    # an empty query vector: nothing is near
    scores, indices = semantic_search(np.zeros((1, 4)), x, top_k=2)
    assert scores.tolist() == [[0, 0]] and indices.tolist() == [[0, 1]]
    before = x.copy()
    semantic_search(x, x)
    assert (x == before).all()


@pytest.fixture(scope="module")
def real():
    "Real questions and passages as all-MiniLM-L6-v2 sees them: (640, 384) and (160, 384)."
    from contrastive_st.data import quickstart_folder, read_retrieval
    from contrastive_st.model import SentenceEncoder

    retrieval = read_retrieval(quickstart_folder() / "retrieval")
    encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    return tuple(
        encoder.encode(list(texts.values()), progress=False)
        for texts in (retrieval.queries, retrieval.corpus)
    )


@pytest.mark.parametrize("similarity", ["cos", "dot"])
def test_real_search_equals_the_peer(real, similarity):
    from sentence_transformers import util

    # lengths matter to one of the two
    queries, corpus = (3 * real[0], real[1] * np.linspace(0.5, 2, 160, dtype=np.float32)[:, None])
    theirs = util.semantic_search(
        torch.tensor(queries),
        torch.tensor(corpus),
        top_k=7,
        score_function=util.cos_sim if similarity == "cos" else util.dot_score,
    )
    scores, indices = semantic_search(queries, corpus, top_k=7, chunk=50, similarity=similarity)
    assert indices.tolist() == [[hit["corpus_id"] for hit in hits] for hits in theirs]
    assert scores == pytest.approx(
        np.array([[hit["score"] for hit in hits] for hits in theirs]), abs=1e-5
    )


@pytest.mark.parametrize(
    "top_k, max_pairs", [(3, 500_000), (100, 500_000), (639, 500_000), (20, 200)]
)
def test_real_mining_equals_the_peer(real, top_k, max_pairs):
    from sentence_transformers.util import paraphrase_mining_embeddings

    theirs = paraphrase_mining_embeddings(torch.tensor(real[0]), top_k=top_k, max_pairs=max_pairs)
    scores, pairs = paraphrase_mining(real[0], top_k=top_k, max_pairs=max_pairs, chunk=100)
    assert {tuple(pair) for pair in pairs.tolist()} == {(i, j) for _, i, j in theirs}
    assert scores == pytest.approx(np.array([score for score, _, _ in theirs]), abs=1e-6)
    assert (np.diff(scores) <= 0).all() and (pairs[:, 0] < pairs[:, 1]).all()


@pytest.mark.parametrize(
    "threshold, size", [(0.4, 2), (0.5, 5), (0.6, 3), (0.75, 2), (0.75, 10), (-1, 2)]
)
def test_real_communities_equal_the_peer(real, threshold, size):
    from sentence_transformers.util import community_detection as peer_communities

    theirs = peer_communities(real[0], threshold=threshold, min_community_size=size)
    for chunk in (16_384, 99):
        assert community_detection(real[0], threshold, size, chunk) == theirs


def test_mining_with_ties():
    "Exact cosines: equal pairs come in the order of rows; a text's copies bring top_k of them."
    points = np.random.default_rng(0).choice([-1.0, 1.0], (60, 4))
    unit = points / 2
    every = sorted((-float(unit[i] @ unit[j]), i, j) for i in range(60) for j in range(i + 1, 60))
    for chunk in (1, 13, 1000):
        scores, pairs = paraphrase_mining(points, top_k=59, chunk=chunk)
        assert pairs.tolist() == [[i, j] for _, i, j in every]
        assert scores.tolist() == [-s for s, _, _ in every]
    assert len(paraphrase_mining(points, top_k=59, threshold=0.5)[1]) == sum(
        s <= -0.5 for s, _, _ in every
    )
    scores, pairs = paraphrase_mining(np.ones((9, 3)), top_k=2)
    assert pairs.tolist() == [[0, j] for j in range(1, 9)] + [[1, j] for j in range(2, 9)]
    assert scores == pytest.approx(1)


def test_mining_of_more_copies_than_top_k_finds_some_pairs_only():
    "300 equal texts have 44,850 pairs; each text brings the 100 copies of the lowest rows."
    pairs = paraphrase_mining(np.ones((300, 4)), top_k=100)[1]
    assert len(pairs) == 100 * 99 // 2 + 100 * 200 and (pairs[:, 0] <= 100).all()


def test_mining_over_blocks():
    "More rows than one block of questions holds; the copies stand 5,000 rows apart."
    rows = np.random.default_rng(0).standard_normal((9000, 16)).astype(np.float32)
    rows[5000:] = rows[:4000]
    scores, pairs = paraphrase_mining(rows, top_k=1, max_pairs=4000)
    assert sorted(pairs.tolist()) == [[i, i + 5000] for i in range(4000)]
    assert scores == pytest.approx(1)


def test_communities_of_a_collapsed_model():
    "All texts alike: one community, found without a list of all neighbours of all."
    with Largest() as seen:
        assert community_detection(torch.ones(20_000, 4), chunk=1000) == [list(range(20_000))]
    assert seen.numbers <= 64 * 20_000  # the neighbours of 64 candidates, not of 20,000


def test_storage_does_not_matter_to_the_others(real, tmp_path):
    half = real[0].astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    pairs = paraphrase_mining(half.astype(np.float32), top_k=5)[1]
    groups = community_detection(half.astype(np.float32), 0.5, 3)
    labels = cluster(half.astype(np.float32), 5)[0]
    for stored in (
        half,
        torch.tensor(half),
        np.load(tmp_path / "half.npy", mmap_mode="r"),
        4 * half.astype(np.float64),
    ):
        assert (paraphrase_mining(stored, top_k=5)[1] == pairs).all()
        assert community_detection(stored, 0.5, 3) == groups
        assert (cluster(stored, 5)[0] == labels).all()


@pytest.mark.parametrize("order", ["as drawn", "rising", "falling"])
@pytest.mark.parametrize("levels", [2, 30, 1000])  # exact in float32
@pytest.mark.parametrize("k", [1, 7, 64, 300])
def test_chunks_of_whole_groups_lose_nothing(order, levels, k):
    "A later chunk is looked into where it beats the best: nowhere, here and there, all over."
    g = torch.Generator().manual_seed(k)
    queries = torch.randint(-levels, levels, (70, 3), generator=g).float()
    table = torch.randint(-levels, levels, (1000, 3), generator=g).float()
    if order != "as drawn":  # for the first query, and so for its likes
        table = table[(table @ queries[0]).argsort(descending=order == "falling")]
    values, columns = (queries @ table.T).sort(dim=1, descending=True, stable=True)
    for size in (64, 320, 512):
        scores, rows = nearest_rows(queries, table.split(size), k)
        assert torch.equal(scores, values[:, :k]) and torch.equal(rows, columns[:, :k])


def test_memory_is_bounded(tmp_path):
    "200,000 lines on disk: no block has more than 1,024 x chunk numbers, of 2e8 in all."
    np.lib.format.open_memmap(
        tmp_path / "index.npy", mode="w+", dtype=np.float16, shape=(200_000, 8)
    )[:] = np.random.default_rng(0).standard_normal((200_000, 8))
    corpus = np.load(tmp_path / "index.npy", mmap_mode="r")
    with Largest() as seen:
        scores, indices = semantic_search(corpus[:1000], corpus, top_k=10, chunk=4096)
    assert (indices[:, 0] == np.arange(1000)).all()
    assert seen.numbers == 1000 * 4096
    with Largest() as seen:
        paraphrase_mining(corpus[:9000], top_k=10, chunk=512)
    assert seen.numbers == 1024 * 512
    with Largest() as seen:
        community_detection(corpus[:9000], threshold=0.999, min_community_size=3, chunk=512)
    assert seen.numbers <= 256 * 512


def test_a_corpus_of_one_line():
    one = np.array([[3.0, 4.0]])
    assert [x.tolist() for x in semantic_search(one, one)] == [[[1.0]], [[0]]]
    scores, pairs = paraphrase_mining(one)
    assert scores.shape == (0,) and pairs.shape == (0, 2)
    assert community_detection(one) == []
    assert community_detection(one, min_community_size=1) == [[0]]
    assert cluster(one, 1)[0].tolist() == [0]
    assert exact_duplicates(["alone"]) == exact_duplicates([]) == []


def test_exact_duplicates():
    from contrastive_st.tokens import text_identity

    texts = ["b", "a", "B ", "c", "a", "a"]
    assert exact_duplicates(texts) == [[1, 4, 5]]
    assert exact_duplicates(text_identity(t) for t in texts) == [[0, 2], [1, 4, 5]]


def test_clusters():
    rng = np.random.default_rng(0)
    heaps = np.eye(3)[np.repeat([1, 0, 2], [50, 30, 20])] + 0.05 * rng.standard_normal((100, 3))
    lengths = rng.uniform(0.1, 10, (100, 1))
    labels, centres = cluster(heaps * lengths, 3)  # length plays no part
    assert labels.tolist() == np.repeat([0, 1, 2], [50, 30, 20]).tolist()  # the largest is 0
    assert centres.shape == (3, 3) and centres.argmax(axis=1).tolist() == [1, 0, 2]
    assert (cluster(heaps, 7, seed=3)[0] == cluster(heaps, 7, seed=3)[0]).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW32"])
def test_faiss(real, factory, tmp_path):
    faiss = pytest.importorskip("faiss")
    queries, corpus = 2 * real[0], real[0].astype(np.float16)
    index = faiss_index(corpus, factory, chunk=100)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    if factory.startswith("IVF"):
        index.nprobe = 16  # all cells
    scores, indices = faiss_search(index, queries, top_k=5)
    expected = semantic_search(queries, corpus, top_k=5)
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    assert scores == pytest.approx(expected[0], abs=1e-5)
    assert (indices == expected[1]).mean() > (0.99 if factory == "HNSW32" else 0.999)
    assert faiss_search(index, queries[:2], top_k=9999)[1].shape == (2, 640)
    with pytest.raises(ValueError, match="queries are 9 wide and the corpus 384"):
        faiss_search(index, np.ones((1, 9)))


@pytest.mark.parametrize("factory", ["IVF1024,Flat", "Nonsense"])
def test_an_index_that_cannot_be(factory):
    pytest.importorskip("faiss")
    with pytest.raises(
        ValueError, match=f"^faiss cannot make '{factory}' from 9 rows of width 4: .{{10,200}}$"
    ):
        faiss_index(np.eye(9)[:, :4] + 1, factory)


def test_faiss_ties_and_gaps():
    faiss = pytest.importorskip("faiss")
    assert faiss_search(faiss_index(np.ones((20, 4))), np.ones((1, 4)), top_k=20)[1].tolist() == [
        list(range(20))
    ]
    sparse = faiss_index(np.vstack([np.eye(4)] * 200), "IVF4,Flat")
    assert sparse.nprobe == 1
    # one cell of four: it finds fewer than 800
    scores, rows = faiss_search(sparse, np.eye(4), top_k=800)
    assert (rows[:, 0] >= 0).all() and (rows[:, -1] == -1).all()
    assert (scores[:, -1] == np.finfo(np.float32).min).all()
    assert isinstance(sparse, faiss.IndexIVFFlat)


@pytest.mark.parametrize(
    "module, call",
    [("faiss", lambda x: faiss_index(x)), ("sklearn.cluster", lambda x: cluster(x, 2))],
)
def test_a_missing_extra_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{module} is not installed; .*pip install .*\[search\]"):
        call(np.eye(3))


@pytest.mark.parametrize(
    "queries, corpus, options, message",
    [
        (np.ones(4), np.ones((3, 4)), {}, r"queries of shape \(4,\) .* wrap a single vector"),
        (np.ones((2, 4)), np.ones(4), {}, r"embeddings of shape \(4,\) .* wrap a single vector"),
        (
            np.ones((2, 5)),
            np.ones((3, 4)),
            {},
            "the queries are 5 wide and the corpus 4; encode both with the same model",
        ),
        (np.ones((2, 4)), np.ones((0, 4)), {}, "rows=0"),
        (np.ones((2, 4)), np.ones((3, 4)), {"top_k": 0}, "top_k=0"),
        (np.ones((2, 4)), np.ones((3, 4)), {"chunk": 0}, "chunk=0"),
        (np.ones((2, 4)), np.ones((3, 4)), {"similarity": "l2"}, "unknown similarity 'l2'"),
        (
            np.ones((2, 4)),
            np.vstack([np.ones((7, 4)), np.full((1, 4), np.nan)]),
            {"chunk": 3},
            "corpus embedding 7 contains NaN or inf",
        ),
        (
            torch.full((2, 4), torch.inf),
            np.ones((3, 4)),
            {},
            "query embedding 0 contains NaN or inf",
        ),
    ],
)
def test_bad_input(queries, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        semantic_search(queries, corpus, **options)


@pytest.mark.parametrize(
    "texts",
    ["a question", "", ["a"], ("a", "b"), np.array(["a", "b"]), np.array(["a"], dtype=object)],
)
def test_texts_are_not_embeddings(texts):
    x = np.ones((3, 4))
    for call in (
        lambda: semantic_search(texts, x),
        lambda: semantic_search(x, texts),
        lambda: paraphrase_mining(texts),
        lambda: community_detection(texts),
        lambda: cluster(texts, 1),
    ):
        with pytest.raises(
            ValueError,
            match="^these are texts, not embeddings; encode them first: encoder.encode\\(texts\\)$",
        ):
            call()
    for number in (None, 3.5, np.array(3.5)):
        with pytest.raises(ValueError, match="wrap a single vector"):
            semantic_search(x, number)
    # lists of numbers are welcome
    assert semantic_search(x.tolist(), x.tolist())[1].shape == (3, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paraphrase_mining(np.ones((0, 4))), "rows=0"),
        (lambda: paraphrase_mining(np.ones(4)), "wrap a single vector"),
        (lambda: paraphrase_mining(np.ones((3, 4)), top_k=0), "top_k=0"),
        (lambda: paraphrase_mining(np.ones((3, 4)), max_pairs=0), "max_pairs=0"),
        (lambda: paraphrase_mining(np.full((3, 4), np.nan)), "NaN or inf"),
        (
            lambda: paraphrase_mining(np.ones((3, 4)), threshold=float("nan")),
            "threshold is nan, but a cosine",
        ),
        (lambda: community_detection(np.ones((0, 4))), "rows=0"),
        (
            lambda: community_detection(np.ones((3, 4)), min_community_size=0),
            "min_community_size=0",
        ),
        (
            lambda: community_detection(np.ones((3, 4)), threshold=75),
            "threshold is 75, but a cosine",
        ),
        (lambda: community_detection(np.full((3, 4), np.inf)), "embedding 0 contains NaN or inf"),
        (lambda: cluster(np.ones((3, 4)), 0), "n_clusters=0"),
        (
            lambda: cluster(np.ones((3, 4)), 4),
            "n_clusters is 4, but there are 3 texts; ask for at most 3",
        ),
        (lambda: cluster(np.full((3, 4), np.nan), 2), "NaN or inf"),
        (lambda: faiss_index(np.ones((0, 4))), "rows=0"),
    ],
)
def test_bad_input_of_the_others(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def global_randomness():
    "A block that must leave the generators of Python, NumPy and torch as they were."

    @contextmanager
    def unmoved():
        def state():
            kind, keys, *rest = np.random.get_state()
            return (
                random.getstate(),
                kind,
                keys.tobytes(),
                rest,
                torch.get_rng_state().numpy().tobytes(),
            )

        before = state()
        yield
        assert state() == before

    return unmoved


def all_that_take_vectors(bad, good):
    "Each function with what is wrong in each of its places."
    calls = [
        lambda: semantic_search(bad, good),
        lambda: semantic_search(good, bad),
        lambda: paraphrase_mining(bad),
        lambda: community_detection(bad),
        lambda: cluster(bad, 1),
    ]
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(good.shape[1])
    index.add(np.asarray(good, np.float32))
    return [*calls, lambda: faiss_index(bad), lambda: faiss_search(index, bad)]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_codes_are_not_vectors(precision):
    "Their products are numbers, too, but of the ten nearest they find six (int8) or two (bits)."
    from contrastive_st.precision import calibrate, dequantize, quantize

    vectors = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    codes = quantize(vectors, precision)
    for bad in (codes, codes.tolist() and torch.tensor(codes), list(codes), codes > 0):
        for call in all_that_take_vectors(bad, np.ones((4, codes.shape[1]), np.float32)):
            with pytest.raises(ValueError, match="are codes and not vectors.*dequantize"):
                call()
    back = dequantize(codes, precision, calibrate(vectors), 32)
    nearest = semantic_search(vectors, back, 10)[1]
    exact = semantic_search(vectors, vectors, 10)[1]
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, nearest)])
    assert overlap > (0.95 if "int8" in precision else 0.3)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.ones((3, 4), complex), "embeddings are complex128; pass a table of floats"),
        (np.full((3, 4), None), "embeddings are object"),
        (np.zeros((3, 4), "M8[s]"), "embeddings are datetime64"),
        ([[1.0, 2.0], [3.0]], "are not of one width"),
        (np.ones((3, 4, 1)), "not a table|one more"),
        (np.vstack([np.ones((2, 4)), np.full((1, 4), np.inf)]), "embedding 2 contains NaN or inf"),
        (np.vstack([np.ones((2, 4)), np.full((1, 4), 1e300)]), "embedding 2 contains NaN or inf"),
    ],
)
def test_one_check_for_all(bad, message):
    for call in all_that_take_vectors(bad, np.ones((3, 4), np.float32)):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert len(str(caught.value)) < 300


def test_whole_numbers_are_vectors():
    table = [[1, 0], [0, 1], [1, 1]]
    for kind in (list, np.int64, np.int16, np.uint32):
        x = table if kind is list else np.array(table, kind)
        assert semantic_search(x, x, 1)[1].tolist() == [[0], [1], [2]]
        assert cluster(x, 3)[0].shape == (3,)


def test_nothing_moves_the_global_generators(global_randomness):
    x = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    with global_randomness():
        semantic_search(x, x)
        paraphrase_mining(x, 3)
        community_detection(x, 0.5, 2)
        cluster(x, 7)
        faiss_index(x, "IVF4,Flat") if importlib.util.find_spec("faiss") else None


@pytest.mark.parametrize("top_k", [1.5, "3", True, None])
def test_a_number_of_results_is_a_whole_number(top_k):
    rows = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="top_k is .*; it must be a whole number, at least 1"):
        semantic_search(rows, rows, top_k)
    assert semantic_search(rows, rows, np.int64(2))[1].shape == (4, 2)
