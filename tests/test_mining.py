"""Mining against sentence-transformers' and a double loop: rules, ids, sampling, files, memory."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from contrastive_st.cli import app
from contrastive_st.data import Source, load_source, read_examples
from contrastive_st.mining import cross_encoder, mine_hard_negatives
from contrastive_st.mixture import Mixture
from contrastive_st.search import faiss_index

D = 16


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def problem(rows=60, different=50, N=400, seed=0, lean=0.8):
    "Queries, some of them twice, with positives that lean towards them by `lean`."
    rng = np.random.default_rng(seed)
    of = np.arange(rows) % different
    answers = 7 * np.arange(rows) % N
    q, c = unit(rng.standard_normal((different, D))), unit(rng.standard_normal((N, D)))
    c[answers] = unit(c[answers] + lean * q[of])
    corpus = [f"passage {n}" for n in range(N)]
    return SimpleNamespace(
        queries=[f"question {n}" for n in of],
        positives=[corpus[n] for n in answers],
        corpus=corpus,
        query_embeddings=q[of],
        corpus_embeddings=c,
    )


def mine(p, **options):
    examples, report = mine_hard_negatives(**{**vars(p), "progress": False, **options})
    return examples, report


class Peer:
    "A model for sentence-transformers' function that gives the vectors of a problem."

    device = torch.device("cpu")

    def __init__(self, p):
        self.table = dict(zip(p.queries + p.corpus, [*p.query_embeddings, *p.corpus_embeddings]))

    def encode_query(self, texts, **options):
        return np.stack([self.table[text] for text in texts])

    encode_document = encode_query

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def peer(p, **options):
    "What sentence-transformers mines, as tuples."
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as function

    pairs = Dataset.from_dict({"anchor": p.queries, "positive": p.positives})
    mined = function(pairs, Peer(p), corpus=p.corpus, verbose=False, **options)
    return [tuple(row.values()) for row in mined]


def as_tuples(examples):
    return [tuple(e.values()) if isinstance(e, dict) else e for e in examples]


def negatives_of(examples):
    "Query -> its negatives, from triplets."
    table = {}
    for query, _, negative in examples:
        table.setdefault(query, set()).add(negative)
    return table


# --- what is mined ---


@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative_margin": 0.05},
        {"absolute_margin": 0.1},
        {"absolute_margin": 0.1, "relative_margin": 0.2},
        {"max_score": 0.5, "min_score": 0.3},
        {"range_min": 5},
        # positives with negative scores
        {"relative_margin": 0.05, "lean": -0.3, "range_max": 399},
    ],
)
def test_equals_the_peer(options, output_format):
    options = {"num_negatives": 4, "range_max": 40, "output_format": output_format, **options}
    p = problem(lean=options.pop("lean", 0.8))
    expected = peer(p, **options)
    assert as_tuples(mine(p, **options)[0]) == expected and len(expected) >= 60 * 0.7


def test_a_cross_encoder_decides_as_in_the_peer():
    p = problem()

    class Cross:
        calls = 0

        def predict(self, pairs, **options):
            self.calls += 1
            numbers = [int(text.split()[1]) for pair in pairs for text in pair]
            scores = [(a * 31 + b * 17) % 101 for a, b in zip(numbers[::2], numbers[1::2])]
            return torch.tensor(scores, dtype=torch.float32)

    # The peer rescores the positives, too, before it cuts at a rank: so no cut here.
    options = {"num_negatives": 4, "range_max": 399, "absolute_margin": 10}
    theirs = peer(p, cross_encoder=Cross(), **options)
    ours, report = mine(p, rescore=Cross(), **options)
    assert {q: len(n) for q, n in negatives_of(ours).items()} == {
        q: len(n) for q, n in negatives_of(theirs).items()
    }
    score = {}
    for query, positive, negative in ours + theirs:
        a, *others = (int(text.split()[1]) for text in (query, positive, negative))
        scores = [(a * 31 + n * 17) % 101 for n in others]
        score.setdefault(query, []).append(scores[1])
        assert scores[1] + 10 <= scores[0]
    for scores in score.values():  # equal scores may be of other passages
        half = len(scores) // 2
        assert sorted(scores[:half]) == sorted(scores[half:])
    assert report.margins.min() >= 10
    # any function does, and gives the same
    assert mine(p, rescore=Cross().predict, **options)[0] == ours


def naive(p, K, low, high, rules):
    "A double loop over distinct queries and passages."
    mined = {}
    vectors = dict(zip(p.queries, p.query_embeddings))
    for query, q in vectors.items():
        own = {a for asked, a in zip(p.queries, p.positives) if asked == query}
        scores = {c: float(q @ v) for c, v in zip(p.corpus, p.corpus_embeddings)}
        limit = min(scores[a] for a in own)
        ranked = sorted(scores.keys() - own, key=lambda c: -scores[c])[low:high]
        mined[query] = [c for c in ranked if rules(scores[c], limit)][:K]
    return mined


def test_equals_a_double_loop():
    p = problem(seed=3)
    ours = negatives_of(
        mine(p, num_negatives=3, range_min=2, range_max=20, relative_margin=0.1, max_score=0.6)[0]
    )
    slow = naive(p, 3, 2, 20, lambda s, limit: s <= limit - 0.1 * abs(limit) and s <= 0.6)
    assert ours == {q: set(n) for q, n in slow.items() if n}


def test_several_positives_the_hardest_sets_the_margin():
    q = np.array([[1.0, 0, 0]] * 2)
    corpus = ["far answer", "near answer", "between", "farthest"]
    c = unit(np.array([[0.5, 1, 0], [1, 0.1, 0], [1, 1, 0], [0.1, 1, 0]]))
    p = SimpleNamespace(
        queries=["why", "Why"],  # one query by its identity
        positives=["far answer", "near answer"],
        corpus=corpus,
        query_embeddings=q,
        corpus_embeddings=c,
    )
    examples, report = mine(p, num_negatives=1, absolute_margin=0.0)
    assert examples == [("why", a, "farthest") for a in ("far answer", "near answer")]
    assert report.counts["queries"] == 1 and report.counts["pairs"] == 2


def test_equal_texts_are_one_and_never_negatives():
    rng = np.random.default_rng(0)
    corpus = ["The answer.", "the  ANSWER.", "a question?", "other", "Other", "", "last"]
    v = rng.standard_normal((7, 4))
    v[1], v[4] = v[0], v[3]
    p = SimpleNamespace(
        queries=["A question?"],
        positives=["the answer."],
        corpus=corpus,
        query_embeddings=v[:1],
        corpus_embeddings=v,
    )
    examples, _ = mine(p, num_negatives=2)
    # neither the copies of the answer, nor the query itself, nor the empty one, nor one twice
    assert sorted(n for _, _, n in examples) == ["last", "other"]
    with pytest.raises(ValueError, match="of 4 different passages at most 2 are left"):
        mine(p, num_negatives=3)


def test_equal_ids_are_never_negatives():
    p = problem(rows=20, different=20, N=60)
    ids = [f"document {n // 3}" for n in range(60)]  # three passages a document
    of = dict(zip(p.corpus, ids))
    query_ids = ["document 19", *(f"q{n}" for n in range(1, 20))]
    options = {"corpus_ids": ids, "num_negatives": 10, "range_max": 57}
    examples, _ = mine(p, query_ids=query_ids, positive_ids=[of[a] for a in p.positives], **options)
    assert len(examples) == 200
    assert not any(of[n] == of[a] for _, a, n in examples)
    assert not any(of[n] == "document 19" for q, _, n in examples if q == "question 0")
    assert any(of[n] == of[a] for _, a, n in mine(p, num_negatives=10, range_max=57)[0])


def test_without_a_corpus_the_positives_are_it():
    p = problem(rows=40, different=40)
    vectors = dict(zip(p.corpus, p.corpus_embeddings))
    p.corpus, p.corpus_embeddings = None, np.stack([vectors[a] for a in p.positives])
    examples, _ = mine(p, num_negatives=5)
    assert len(examples) == 200
    assert all(n in p.positives and n != a for _, a, n in examples)


def test_a_negative_score_of_the_positive_still_lowers_the_limit():
    "A limit of 0.95 times a negative score would lie above the positive."
    q, corpus = np.array([[1.0, 0]]), ["answer", "just above", "below"]
    angles = np.arccos([-0.5, -0.48, -0.6])
    c = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    p = SimpleNamespace(
        queries=["q"],
        positives=["answer"],
        corpus=corpus,
        query_embeddings=q,
        corpus_embeddings=c,
    )
    examples, report = mine(p, num_negatives=1, relative_margin=0.05)
    assert examples == [("q", "answer", "below")]
    assert report.counts["relative_margin"] == 1


# --- sampling, and too few ---


def test_random_is_seeded_and_independent_of_the_block():
    p = problem()
    options = {"sampling": "random", "num_negatives": 4, "range_max": 40, "relative_margin": 0.05}
    first = mine(p, seed=1, **options)[0]
    for block, chunk in ((1, 400), (7, 33), (50, 16)):
        assert mine(p, seed=1, block=block, chunk=chunk, **options)[0] == first
    assert mine(p, seed=2, **options)[0] != first
    # other rows, another order: a query keeps its negatives
    turned = SimpleNamespace(**{k: v[::-1] for k, v in vars(p).items()})
    assert negatives_of(mine(turned, seed=1, **options)[0]) == negatives_of(first)
    every = negatives_of(mine(p, **{**options, "num_negatives": 40, "sampling": "top"})[0])
    assert all(chosen <= every[q] for q, chosen in negatives_of(first).items())


def test_random_is_even():
    "Each of ten candidates is drawn for about three of ten queries."
    p = problem(rows=500, different=500, N=12)
    p.corpus_embeddings = np.tile(p.corpus_embeddings[:1], (12, 1))
    examples, _ = mine(p, sampling="random", num_negatives=3, range_max=11)
    names, counts = np.unique([n for _, _, n in examples], return_counts=True)
    assert len(names) == 12 and counts.sum() == 1500
    assert abs(counts - 125).max() < 5 * np.sqrt(125)


def test_too_few_are_counted_and_dropped_or_filled():
    p = problem()
    options = {"num_negatives": 4, "range_max": 8, "relative_margin": 0.3}
    dropped, report = mine(p, output_format="n-tuple", **options)
    assert 0 < report.counts["short"] < 50 and report.counts["filled"] == 0
    assert len(dropped) == 60 - report.counts["left_out"] < 60
    filled, other = mine(p, output_format="n-tuple", too_few="fill", **options)
    assert other.counts["short"] == report.counts["short"]
    assert len(filled) == 60 - other.counts["left_out"] > len(dropped)
    assert other.counts["filled"] > 0
    assert all(len(set(row)) == 6 for row in filled)  # nothing twice, and no positive
    pairs = list(zip(p.queries, p.positives))
    assert not any((row[0], n) in pairs for row in filled for n in row[2:])
    # what is filled in keeps the rules, and is as random as the seed says
    limit = other.positive_scores - 0.3 * np.abs(other.positive_scores)
    assert (other.negative_scores <= limit + 1e-6).all()
    again = mine(p, output_format="n-tuple", too_few="fill", block=3, **options)[0]
    assert again == filled
    assert mine(p, output_format="n-tuple", too_few="fill", seed=1, **options)[0] != filled


def test_a_small_corpus_has_no_passage_minus_one():
    "A search that finds fewer than it was asked for says -1, which is no row."
    p = problem(rows=5, different=5, N=8)
    examples, _ = mine(p, num_negatives=7, range_max=100)
    assert sorted({n for _, _, n in examples}) == p.corpus and len(examples) == 35
    pytest.importorskip("faiss")
    p = problem()
    index = faiss_index(p.corpus_embeddings, "IVF40,Flat")  # looks into one cell of forty
    examples, report = mine(p, index=index, num_negatives=20, range_max=40)
    assert report.counts["short"] > 0 and report.counts["candidates"] < 50 * 40
    cell = index.quantizer.search(p.corpus_embeddings, 1)[1][:, 0]
    row, asked = {t: n for n, t in enumerate(p.corpus)}, dict(zip(p.queries, p.query_embeddings))
    for query, _, negative in examples:
        assert index.quantizer.search(asked[query][None], 1)[1] == cell[row[negative]]


def test_an_exact_index_gives_the_same():
    pytest.importorskip("faiss")
    p = problem()
    p.corpus, copies = p.corpus + p.corpus[:30], p.corpus_embeddings[:30]
    p.corpus_embeddings = np.concatenate([p.corpus_embeddings, copies])
    options = {"num_negatives": 4, "range_max": 40, "relative_margin": 0.05}
    index = faiss_index(p.corpus_embeddings)
    assert mine(p, index=index, **options)[0] == mine(p, **options)[0]
    with pytest.raises(ValueError, match="the index holds 430 vectors and the corpus 400"):
        mine(problem(), index=index)
    with pytest.raises(ValueError, match="an index compares cosines"):
        mine(p, index=index, similarity="dot")


# --- vectors ---


def test_saved_prompts_are_used(tiny_backbone, tiny_tokenizer):
    from contrastive_st.model import SentenceEncoder

    def encoder(prompts):
        return SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64, prompts=prompts)

    words = "man woman child dog cat guitar piano rice road street".split()
    queries, positives = [f"the {w}" for w in words], [f"a {w} is playing" for w in words]
    saved = encoder({"query": "what is ", "document": "music: "})
    by_hand = {
        "query_embeddings": saved.encode(queries, prompt="query", progress=False),
        "corpus_embeddings": saved.encode(positives, prompt="document", progress=False),
    }
    options = {"num_negatives": 2, "progress": False}
    ours, report = mine_hard_negatives(queries, positives, encoder=saved, **options)
    theirs, again = mine_hard_negatives(queries, positives, **by_hand, **options)
    assert ours == theirs and np.allclose(report.margins, again.margins, atol=1e-6)
    other = mine_hard_negatives(
        queries, positives, encoder=saved, query_prompt="", corpus_prompt="road: ", **options
    )[1]
    assert not np.allclose(other.margins, report.margins, atol=1e-3)
    # what is given is not encoded again
    mixed = {"corpus_embeddings": by_hand["corpus_embeddings"], "encoder": saved}
    assert mine_hard_negatives(queries, positives, **mixed, **options)[0] == ours


def test_storage_does_not_matter(tmp_path):
    p, options = problem(), {"num_negatives": 4, "relative_margin": 0.05}
    expected = mine(p, **options)[0]
    np.save(tmp_path / "corpus.npy", p.corpus_embeddings)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    assert mine(p, corpus_embeddings=mapped, **options)[0] == expected
    tensor = torch.tensor(p.corpus_embeddings, requires_grad=True)
    assert mine(p, corpus_embeddings=tensor, device="cpu", **options)[0] == expected
    lists = {"query_embeddings": p.query_embeddings.tolist()}
    assert mine(p, **lists, **options)[0] == expected
    # the dot product of longer vectors is another score
    longer = p.corpus_embeddings * np.linspace(1, 3, 400, dtype=np.float32)[:, None]
    assert mine(p, corpus_embeddings=longer, **options)[0] == expected
    dot = mine(p, corpus_embeddings=longer, similarity="dot", **options)
    assert dot[0] != expected and dot[1].negative_scores.max() > 1


class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor that any operation makes."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]
        self.numbers = max([self.numbers, *(t.numel() for t in made if t._base is None)])
        return out


def test_no_full_matrix():
    p = problem(rows=3900, different=3900, N=4000)  # 16 million cells
    p.corpus[3650] = p.corpus[0]  # no positive; with a copy, rows of the corpus are looked up
    tracemalloc.start()
    with Largest() as largest:
        mine(p, block=256, chunk=512, num_negatives=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.numbers < 300_000
    assert peak < 10_000_000  # one score matrix alone has 64 MB


# --- files ---


def test_files_are_what_training_reads(tmp_path):
    p, options = problem(), {"num_negatives": 3, "relative_margin": 0.05}
    for output_format, width in (("triplet", 3), ("n-tuple", 5)):
        examples, report = mine(p, output_format=output_format, **options)
        path, again = mine(
            p, output_format=output_format, path=tmp_path / "mined.jsonl", block=9, **options
        )
        assert list(read_examples(path)) == examples and len(examples[0]) == width
        assert again.counts == report.counts and str(again) == str(report)
        assert again.table() == report.table() and again.table(True) == report.table(True)
    path, _ = mine(p, output_format="labeled-pair", path=tmp_path / "mined.jsonl", **options)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == mine(p, output_format="labeled-pair", **options)[0]
    positives = [(row["sentence1"], row["sentence2"]) for row in rows if row["label"]]
    assert sorted(positives) == sorted(zip(p.queries, p.positives))
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith(".")] == ["mined.jsonl"]


def test_labeled_pairs_are_read_back_as_hard_negatives(tmp_path):
    "What is mined as labeled pairs trains as the n-tuples of the same mining do."
    p, options = problem(), {"num_negatives": 3, "relative_margin": 0.05}
    tuples, _ = mine(p, output_format="n-tuple", **options)
    path, _ = mine(p, output_format="labeled-pair", path=tmp_path / "mined.jsonl", **options)
    rows, _ = mine(p, output_format="labeled-pair", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # queries with fewer negatives repeat theirs
        read = list(load_source(path, relevance="label", cache_dir=tmp_path / "c"))
        assert list(Source(rows, relevance="label")) == read
    assert {example[:2] for example in read} == set(zip(p.queries, p.positives))
    assert len(tuples) > 50 and set(tuples) <= set(read)


@pytest.mark.parametrize("output_format", ["triplet", "n-tuple"])
def test_scores_are_written_as_the_peer_writes_them(tmp_path, output_format):
    p, options = problem(), {"num_negatives": 3, "range_max": 40, "relative_margin": 0.05}
    rows, report = mine(p, output_format=output_format, output_scores=True, **options)
    plain, _ = mine(p, output_format=output_format, **options)
    assert [tuple(row.values())[:-1] for row in rows] == plain
    vectors = [dict(zip(p.queries, p.query_embeddings)), dict(zip(p.corpus, p.corpus_embeddings))]
    for row in rows:
        query, *texts, scores = row.values()
        expected = [float(vectors[0][query] @ vectors[1][text]) for text in texts]
        assert scores == pytest.approx(expected, abs=1e-6)
    path, again = mine(
        p, output_format=output_format, output_scores=True, path=tmp_path / "m.jsonl", **options
    )
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
    assert report.options["output_scores"] and str(again) == str(report)
    source = load_source(path, teacher="scores", cache_dir=tmp_path / "c")
    assert list(source) == plain == list(read_examples(path))  # the scores may stay unread
    assert source.teacher(range(len(rows))).tolist() == [
        pytest.approx(row["scores"], abs=1e-6) for row in rows
    ]
    theirs = peer(p, output_format=output_format, output_scores=True, **options)
    ours = {tuple(row.values())[:-1]: row["scores"] for row in rows}
    assert {row[:-1]: pytest.approx(row[-1], abs=1e-6) for row in theirs} == ours


def test_written_scores_are_those_of_the_cross_encoder():
    def rescore(pairs):
        return [float((7 * len(a) + 31 * sum(map(ord, b))) % 97) for a, b in pairs]

    rows, _ = mine(problem(), rescore=rescore, output_scores=True, too_few="fill")
    for row in rows:
        query, *texts, scores = row.values()
        assert scores == rescore([(query, text) for text in texts])
    with pytest.raises(ValueError, match="choose output_format 'triplet' or 'n-tuple'"):
        mine(problem(), output_scores=True, output_format="labeled-pair")


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_mining import mine, problem, slow_scores
calls = 0
def scores(pairs):
    global calls
    calls += 1
    if calls == 12:
        os._exit(9)  # as kill -9 does: nothing is tidied
    return slow_scores(pairs)
scores.__qualname__ = "slow_scores"
mine(problem(), rescore=scores, path={path!r}, block=5, seed={seed})
"""


def slow_scores(pairs):
    "A callable that scores pairs of texts."
    slow_scores.calls += 1
    return [(37 * len(a) + int(b.split()[1]) * 17) % 101 / 101 for a, b in pairs]


slow_scores.calls = 0


def killed(path, seed=0):
    "Mine in a process that dies on the way."
    code = KILLED.format(tests=os.path.dirname(__file__), path=str(path), seed=seed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


def test_a_killed_mining_goes_on(tmp_path):
    path = tmp_path / "mined.jsonl"
    path.write_text("an older file", encoding="utf-8")
    killed(path)
    assert path.read_text(encoding="utf-8") == "an older file"
    slow_scores.calls = 0
    mine(problem(), rescore=slow_scores, path=path, block=5)
    # two calls a block, the positives and the candidates: five blocks of ten were there
    assert slow_scores.calls == 10
    once, report = mine(problem(), rescore=slow_scores)
    assert list(read_examples(path)) == once and report.counts["queries"] == 50
    assert not (tmp_path / "mined.jsonl.part").exists()


@pytest.mark.parametrize("change", ["options", "vectors", "texts"])
def test_pieces_of_another_mining_are_not_used(tmp_path, change):
    "Vectors made with another prompt are other vectors, whatever the texts and the model."
    path, p, options = tmp_path / "mined.jsonl", problem(), {}
    killed(path)
    if change == "options":
        options = {"max_score": 0.9}
    elif change == "vectors":
        p.query_embeddings = p.query_embeddings[::-1].copy()
    else:
        p.corpus = [f"passage {n + 1}" for n in range(400)]
        p.positives = [f"passage {int(a.split()[1]) + 1}" for a in p.positives]
    mine(p, rescore=slow_scores, path=path, block=5, **options)
    assert list(read_examples(path)) == mine(p, rescore=slow_scores, **options)[0]


def test_a_mining_may_begin_anew(tmp_path):
    path = tmp_path / "mined.jsonl"
    killed(path)
    slow_scores.calls = 0
    mine(problem(), rescore=slow_scores, path=path, block=5, resume=False)
    assert slow_scores.calls == 20  # all ten blocks
    assert list(read_examples(path)) == mine(problem(), rescore=slow_scores)[0]


def test_a_failed_mining_leaves_what_was_there(tmp_path):
    path = tmp_path / "mined.jsonl"
    path.write_text("an older file", encoding="utf-8")
    with pytest.raises(ValueError, match="no example has its negatives"):
        mine(problem(), path=path, min_score=0.999)
    with pytest.raises(ValueError, match="name the file .jsonl"):
        mine(problem(), path=tmp_path / "mined.csv")
    assert path.read_text(encoding="utf-8") == "an older file"
    assert not (tmp_path / "mined.jsonl.part").exists()


# --- the report ---


def test_the_report_counts_what_happened():
    p = problem()
    options = {"num_negatives": 3, "range_max": 20, "relative_margin": 0.1, "max_score": 0.5}
    examples, report = mine(p, **options)
    vectors = dict(zip(p.queries + p.corpus, [*p.query_embeddings, *p.corpus_embeddings]))
    scores = np.array([[vectors[q] @ vectors[t] for t in rest] for q, *rest in examples])
    assert report.positive_scores == pytest.approx(scores[:, 0], abs=1e-6)
    assert report.margins == pytest.approx(scores[:, 0] - scores[:, 1], abs=1e-6)
    assert report.counts["candidates"] == 50 * 20
    assert report.shares()["relative_margin"] == report.counts["relative_margin"] / 1000 > 0
    counts, edges = report.histogram(10)
    assert counts.sum() == len(examples) == report.counts["negatives"] and len(edges) == 11
    assert report.counts["suspected"] == 0  # nothing within 5%, as 10% were asked for
    worst = report.table(filtered=True)
    assert worst[0]["filtered_by"] == "relative_margin" and len(worst) == 20
    assert [row["margin"] for row in worst] == sorted(row["margin"] for row in worst)
    assert report.table()[0]["margin"] == pytest.approx(report.margins.min(), abs=1e-6)
    text = str(report)
    assert "relative_margin=0.1" in text and "█" in text and "suspected false: 0 of" in text
    assert "| query | positive |" in report._repr_markdown_()


def test_suspects_are_counted():
    p = problem(lean=0.0)  # positives like any other passage
    report = mine(p, num_negatives=3)[1]
    limit = report.positive_scores - 0.05 * np.abs(report.positive_scores)
    assert report.counts["suspected"] == (report.negative_scores > limit).sum() > 100
    assert all(row["filtered_by"] == "" and row["margin"] < 0 for row in report.table())


# --- bad input ---


def changed(**change):
    "A problem in which something is wrong."
    return SimpleNamespace(**{**vars(problem()), **change})


V = problem().corpus_embeddings


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"positives": ["elsewhere", *problem().positives[1:]]},
            r"positives\[0\], 'elsewhere', is not in the corpus \(1 of 60 are not\)",
        ),
        (
            {"positives": ["a"] * 60, "corpus": ["a"], "corpus_embeddings": V[:1]},
            "of 1 different passages at most 0 are left",
        ),
        ({"num_negatives": 400}, "of 400 different passages at most 399 are left"),
        ({"num_negatives": 3, "range_min": 397}, "from rank 397 on"),
        ({"range_min": 10, "range_max": 12}, "hold 2 passages, fewer than num_negatives=3"),
        ({"corpus_ids": ["x"] * 399}, "corpus_ids: 399 ids for 400 texts"),
        ({"corpus_ids": ["x"] * 400, "query_ids": ["x"]}, "query_ids: 1 ids for 60 texts"),
        ({"positive_ids": ["x"] * 60}, "there are ids, but no corpus_ids"),
        (
            {"positive_ids": ["x"] * 60, "corpus_ids": range(400)},
            r"positive_ids\[0\], 'x', is not among the corpus_ids \(60 of 60 do not match\)",
        ),
        (
            {"positive_ids": range(60), "corpus_ids": range(400)},
            r"positive_ids\[1\], 1, has another text in the corpus \(59 of 60",
        ),
        (
            {"corpus_embeddings": np.where(np.arange(400)[:, None] == 7, np.nan, V)},
            r"corpus_embeddings\[7\] contains NaN or inf",
        ),
        ({"query_embeddings": np.full((60, D), np.inf)}, r"query_embeddings\[0\] contains NaN"),
        ({"corpus_embeddings": V[:, :8]}, "the queries are 16 wide and the corpus 8"),
        ({"corpus_embeddings": V[:9]}, r"the shape \(9, 16\), but there are 400 texts"),
        ({"query_embeddings": [[1.0, 2.0], [1.0]]}, "query_embeddings are not vectors of one"),
        ({"query_embeddings": None}, "vectors are missing: pass a SentenceEncoder"),
        ({"query_embeddings": None, "encoder": print}, "an encoder of type builtin"),
        ({"corpus_embeddings": (V * 99).astype(np.int8)}, "are int8, which are codes"),
        ({"absolute_margin": 3}, r"of 1,500 candidates absolute_margin removed 1,500; loosen"),
        ({"min_score": 0.99}, "min_score removed 1,500"),
        ({"rescore": lambda pairs: [0.5]}, r"scores of shape \(1,\) for 60 pairs"),
        ({"rescore": lambda pairs: [[1, 2]] * len(pairs)}, r"of shape \(60, 2\) for 60 pairs"),
        ({"rescore": lambda pairs: [np.nan] * len(pairs)}, "rescore gave NaN or inf for the pair"),
        ({"positives": ["passage 0"]}, "60 queries and 1 positives"),
        ({"queries": [], "positives": []}, "0 queries and 0 positives"),
        ({"queries": "why"}, "queries is of type str; pass a list of texts"),
        ({"corpus": {"d": "text"}}, "corpus is of type dict"),
        ({"corpus": [3] * 400}, r"corpus\[0\] is of type int; pass texts"),
        ({"queries": [" "] * 60}, r"queries\[0\] is empty"),
        ({"num_negatives": 0}, "num_negatives is 0; it must be a whole number, at least 1"),
        ({"range_min": -1}, "range_min is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"block": 0}, "block is 0"),
        ({"max_score": float("nan")}, "max_score is nan; it must be a finite number"),
        ({"relative_margin": 95}, "0.05 keeps negatives that score at most 95% of it"),
        ({"sampling": "hard"}, "sampling is 'hard'; choose 'top' or 'random'"),
        ({"too_few": "keep"}, "too_few is 'keep'; choose 'drop' or 'fill'"),
        ({"output_format": "pairs"}, "output_format is 'pairs'; choose 'triplet' or 'n-tuple'"),
        ({"similarity": "l2"}, "similarity is 'l2'; choose 'cos' or 'dot'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message) as error:
        mine(changed(**change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# --- a cross-encoder ---


@pytest.fixture
def reranker(tmp_path, tiny_tokenizer):
    "A tiny random cross-encoder on disk."
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(
        vocab_size=len(tiny_tokenizer), intermediate_size=64, num_labels=1, **small
    )
    model = transformers.BertForSequenceClassification(config)
    model.classifier.weight.data *= 50  # scores that differ
    model.save_pretrained(tmp_path / "reranker")
    tiny_tokenizer.save_pretrained(tmp_path / "reranker")
    return tmp_path / "reranker"


def test_a_cross_encoder_scores_as_the_peers(reranker):
    from sentence_transformers import CrossEncoder

    pairs = [("where is the dog", "snow " * n + "in the street") for n in range(1, 40)]
    theirs = CrossEncoder(str(reranker), device="cpu", max_length=64).predict(pairs)
    ours = cross_encoder(reranker, max_length=64, batch_size=7)(pairs)
    assert np.abs(ours.numpy() - theirs).max() < 1e-6 and np.ptp(theirs) > 1e-3


def test_what_is_no_cross_encoder(tmp_path, tiny_backbone, tiny_tokenizer):
    with pytest.raises(ValueError, match="cannot be opened as a cross-encoder") as error:
        cross_encoder(tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    tiny_backbone.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 2 numbers for a pair"):
        cross_encoder(tmp_path)


# --- the command ---


@pytest.fixture
def files(tmp_path):
    "A problem as files: pairs, corpus, and the vectors of both."
    p, folder = problem(), tmp_path
    rows = [json.dumps(pair) + "\n" for pair in zip(p.queries, p.positives)]
    (folder / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join(p.corpus), encoding="utf-8")
    np.save(folder / "queries.npy", p.query_embeddings)
    np.save(folder / "documents.npy", p.corpus_embeddings)
    return folder


def command(folder, words="", **change):
    "Run `mine` on a folder; the model does not exist, so it must not be opened."
    options = {
        "corpus": "corpus.txt",
        "query-vectors": "queries.npy",
        "document-vectors": "documents.npy",
        "out": "mined.jsonl",
    } | change
    line = ["mine", "nowhere", str(folder / "pairs.jsonl"), "--no-progress", *words.split()]
    for name, value in options.items():
        line += [f"--{name}", str(folder / value)] if value else []
    result = CliRunner().invoke(app, line)
    if isinstance(result.exception, ValueError | OSError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_calls_the_function(files):
    out = files / "mined.jsonl"
    said = command(files, "--k 2 --range-max 30 --relative-margin 0.1", report="report.json")
    expected, report = mine(problem(), num_negatives=2, range_max=30, relative_margin=0.1)
    assert list(read_examples(out)) == expected and str(report) in said
    record = json.loads((files / "report.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(report.record()))
    assert record["counts"]["examples"] == len(expected)
    row = report.table()[0]
    assert row["query"] in said and row["negative"] in said and "Next: read the list" in said


def test_training_reads_what_the_command_wrote(files):
    command(files, "--k 3 --format n-tuple --fill --relative-margin 0")
    line = next(line for line in command(files, "--format n-tuple").split("\n") if "Next" in line)
    name = re.search(r'name = "([^"]+)", weight = 1', line)[1]
    mix = [{"name": name, "weight": 1}]
    mixture = Mixture.from_config(mix, files, batch_size=4, cache_dir=files / "cache")
    batch = mixture.batch(0)
    assert {len(example) for example in batch.examples} == {2 + 5}  # --k is 5


def test_the_command_writes_scores(files):
    said = command(files, "--k 3 --scores --format n-tuple --fill --relative-margin 0")
    entry = {"name": "mined.jsonl", "weight": 1, "teacher": "scores"}
    assert '{name = "mined.jsonl", weight = 1, teacher = "scores"}' in said
    assert 'train with loss = "margin_mse" or "distill_kl"' in said
    batch = Mixture.from_config([entry], files, 4, cache_dir=files / "cache").batch(0)
    assert batch.teacher.shape == (4, 4) and (batch.teacher[:, 0] > batch.teacher[:, 1]).all()


def test_the_command_with_an_index_and_without_a_corpus(files):
    out = files / "mined.jsonl"
    command(files, "--faiss --k 3")
    assert list(read_examples(out)) == mine(problem(), relative_margin=0.05)[0]
    p = problem()
    own = p.corpus_embeddings[7 * np.arange(60) % 400]
    np.save(files / "positives.npy", own)
    command(files, "--k 3", **{"corpus": None, "document-vectors": "positives.npy"})
    p.corpus, p.corpus_embeddings = None, own
    assert list(read_examples(out)) == mine(p, relative_margin=0.05)[0]


def test_the_command_rescores(files, reranker):
    out = files / "mined.jsonl"
    command(files, "--k 3 --relative-margin 0", rescore=reranker)
    expected = mine(problem(), relative_margin=0.0, rescore=cross_encoder(reranker))[0]
    assert list(read_examples(out)) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"corpus": "short.txt"},
            r"documents.npy: has the shape \(400, 16\) and .*short.txt has 3",
        ),
        ({"corpus": "other.txt"}, r"positives\[0\], 'passage 0', is not in the corpus \(60 of 60"),
        ({"corpus": "one.txt", "document-vectors": "one.npy"}, r"is not in the corpus \(59 of 60"),
        ({"words": "--k 400"}, "of 400 different passages at most 399 are left"),
        ({"words": "--margin 3"}, "absolute_margin removed 2,500; loosen the rules"),
        ({"words": "--relative-margin 95"}, "0.05 keeps negatives that score at most 95% of it"),
        ({"words": "--format pairs"}, "output_format is 'pairs'; choose"),
        ({"document-vectors": "nan.npy"}, r"corpus_embeddings\[7\] contains NaN or inf"),
        ({"document-vectors": "narrow.npy"}, "the queries are 16 wide and the corpus 8"),
        ({"query-vectors": "flat.npy"}, r"flat.npy: has the shape \(60,\)"),
        ({"query-vectors": "none.npy"}, "none.npy"),
        ({"query-vectors": "corpus.txt"}, "corpus.txt"),
        ({"out": "mined.csv"}, "name the file .jsonl"),
        ({"rescore": "none"}, "cannot be opened as a cross-encoder"),
    ],
)
def test_bad_input_of_the_command(files, change, message):
    (files / "short.txt").write_text("a\nb\nc\n", encoding="utf-8")
    (files / "other.txt").write_text("".join(f"other {n}\n" for n in range(400)), encoding="utf-8")
    (files / "one.txt").write_text("passage 0\n", encoding="utf-8")
    vectors = np.load(files / "documents.npy")
    np.save(files / "one.npy", vectors[:1])
    np.save(files / "narrow.npy", vectors[:, :8])
    np.save(files / "nan.npy", np.where(np.arange(400)[:, None] == 7, np.nan, vectors))
    np.save(files / "flat.npy", np.zeros(60))
    with pytest.raises((ValueError, OSError), match=message) as error:
        command(files, **change)
    assert "\n" not in str(error.value)
    assert not list(files.glob("mined.*"))
