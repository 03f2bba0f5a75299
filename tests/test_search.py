"""Search against sentence-transformers', with ties, odd storage, bounded memory and bad input."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from contrastive_st.search import semantic_search


def slow_search(queries, corpus, top_k):
    "One table, one stable sort, in double precision."
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, corpus)]
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
    assert scores.shape == indices.shape == (300, min(top_k, 900)) and (scores.dtype, indices.dtype) == (np.float32, np.int64)
    assert scores == pytest.approx(np.array([[hit["score"] for hit in hits] for hits in theirs]), abs=1e-6)
    agree = indices == np.array([[hit["corpus_id"] for hit in hits] for hits in theirs])
    assert agree.mean() > 0.999  # neighbours less than 1e-7 apart may swap
    again = slow_search(queries.astype(float), corpus.astype(float), top_k)
    assert scores == pytest.approx(again[0], abs=1e-6) and (indices == again[1]).mean() > 0.999


@pytest.mark.parametrize("chunk", [1, 7, 100, 16_384])
@pytest.mark.parametrize("top_k", [1, 5, 150, 400])
def test_ties_go_to_the_lower_row(chunk, top_k):
    rng = np.random.default_rng(0)
    queries, corpus = (rng.choice([-1.0, 1.0], (n, 4)) for n in (30, 400))  # exact cosines: five different values
    scores, indices = semantic_search(queries, corpus, top_k=top_k, chunk=chunk)
    expected = slow_search(queries, corpus, top_k)
    assert (scores == expected[0]).all() and (indices == expected[1]).all()


def test_storage_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    queries, corpus = (rng.choice([-1.0, 1.0], (n, 16)) for n in (9, 500))
    np.save(tmp_path / "index.npy", corpus.astype(np.float16))
    expected = semantic_search(queries, corpus, top_k=7)
    for q, d in ((torch.tensor(queries), torch.tensor(corpus)), (queries, torch.tensor(corpus, dtype=torch.bfloat16)),
                 (torch.tensor(queries, requires_grad=True), corpus), (queries, np.load(tmp_path / "index.npy", mmap_mode="r"))):
        scores, indices = semantic_search(q, d, top_k=7, chunk=100)
        assert (scores == expected[0]).all() and (indices == expected[1]).all()
    assert semantic_search(5 * queries, 0.1 * corpus, top_k=7)[0] == pytest.approx(expected[0], abs=1e-6)  # cosine: length plays no part


def test_edges():
    x = np.eye(4)
    assert semantic_search(x[:0], x)[0].shape == (0, 4)
    scores, indices = semantic_search(np.zeros((1, 4)), x, top_k=2)  # an empty query vector: nothing is near
    assert scores.tolist() == [[0, 0]] and indices.tolist() == [[0, 1]]
    before = x.copy()
    semantic_search(x, x)
    assert (x == before).all()


def test_memory_is_bounded():
    code = """
import resource, torch
from contrastive_st.search import semantic_search
torch.set_num_threads(1)
queries, corpus = torch.randn(1000, 8), torch.randn(200_000, 8)
semantic_search(queries[:300], corpus[:20_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
semantic_search(queries, corpus)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 150_000  # kB; the table of all cosines would be 800,000


@pytest.mark.parametrize("queries, corpus, options, message", [
    (np.ones(4), np.ones((3, 4)), {}, r"queries \(4,\) .* wrap a single vector"),
    (np.ones((2, 5)), np.ones((3, 4)), {}, "with one D"),
    (np.ones((2, 4)), np.ones((0, 4)), {}, "corpus of 0 rows"),
    (np.ones((2, 4)), np.ones((3, 4)), {"top_k": 0}, "top_k=0"),
    (np.ones((2, 4)), np.ones((3, 4)), {"chunk": 0}, "chunk=0"),
    (np.ones((2, 4)), np.full((3, 4), np.nan), {}, "NaN or inf"),
    (torch.full((2, 4), torch.inf), np.ones((3, 4)), {}, "NaN or inf"),
])
def test_bad_input(queries, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        semantic_search(queries, corpus, **options)
