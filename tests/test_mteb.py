"""The tutorial's road into MTEB, on tiny models and made-up tasks: mteb's figures are ours.

The code under test stands in nbs/tutorials/mteb.ipynb; its cells are executed here. Without mteb
(`make test-mteb` has it) these are skipped.
"""

import ast
import configparser
import random
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from conftest import WORDS, make_backbone, make_tokenizer

from contrastive_st.evaluation import evaluate_retrieval, evaluate_sts
from contrastive_st.model import SentenceEncoder

ROOT = Path(__file__).resolve().parent.parent
CELLS = tuple(
    "imports imports-mteb about local-retrieval local-classification road-st road-ours run".split()
)
ROADS = ("through_st", "Ours")
# STSBenchmark, cosine_spearman, of sentence-transformers/all-MiniLM-L6-v2: see the tutorial
PUBLISHED = 0.8203247283


def test_the_extra_takes_the_version_that_is_pinned():
    requirement = pytest.importorskip("packaging.requirements").Requirement
    parser = configparser.ConfigParser(delimiters="=")
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = requirement(parser["DEFAULT"]["mteb_requirements"])
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert wanted.name == "mteb" and wanted.specifier.contains(pinned["mteb"])


@pytest.fixture(scope="module")
def tutorial():
    "The definitions of the tutorial."
    pytest.importorskip(
        "mteb", reason="mteb is not installed here: make test-mteb runs these tests"
    )
    cells = {
        cell.id: cell.source
        for cell in nbformat.read(ROOT / "nbs/tutorials/mteb.ipynb", as_version=4).cells
    }
    space = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages on import
        for name in CELLS:
            tree = ast.parse(cells[name])
            tree.body = [
                node
                for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
            ]
            exec(compile(tree, f"cell {name}", "exec"), space)
    return SimpleNamespace(**space)


def texts(n: int, seed: int) -> list[str]:
    "Sentences of made-up sense, all different."
    rng, found = random.Random(seed), {}
    while len(found) < n:
        found[" ".join(rng.choices(WORDS, k=rng.randint(3, 9)))] = None
    return list(found)


def save(folder: Path, noise: float = 0, prompts: dict | None = None) -> Path:
    "A tiny random encoder, written as users do; `noise` makes another model of it."
    import torch

    tokenizer = make_tokenizer()
    backbone = make_backbone(len(tokenizer))
    with torch.no_grad():
        for weight in backbone.parameters():
            weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    SentenceEncoder(backbone, tokenizer, max_length=48, prompts=prompts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def encode(folder):
    encoder = SentenceEncoder.from_pretrained(folder)
    return lambda texts: encoder.encode(texts, progress=False)


@pytest.fixture(scope="module")
def sts():
    lines = texts(60, 0)
    return lines[:30], lines[30:], [round(random.Random(i).random(), 2) for i in range(30)]


@pytest.fixture(scope="module")
def exam():
    "40 documents, one empty; 12 queries with relevant ones, the last with one irrelevant only."
    documents, asked, rng = texts(39, 1) + [""], texts(12, 2), random.Random(3)
    qrels = {
        f"q{i}": {
            f"d{d}": rng.choice((1, 1, 1, 3)) for d in rng.sample(range(40), rng.randint(1, 14))
        }
        for i in range(12)
    }
    qrels["q11"] = {"d0": 0}
    return (
        {f"d{i}": t for i, t in enumerate(documents)},
        {f"q{i}": t for i, t in enumerate(asked)},
        qrels,
    )


@pytest.mark.parametrize("road", ROADS)
def test_sts_is_ours(tutorial, folder, encode, sts, road):
    result = tutorial.run(
        getattr(tutorial, road)("tiny", folder), tutorial.LocalSTS("LocalSTS", sts)
    )["LocalSTS"]
    expected = evaluate_sts(encode, sts, resamples=0)
    scores = result.scores["test"][0]
    assert (
        result.get_score()
        == scores["cosine_spearman"]
        == pytest.approx(expected["spearman"], abs=1e-4)
    )
    assert scores["cosine_pearson"] == pytest.approx(expected["pearson"], abs=1e-4)


@pytest.mark.parametrize("road", ROADS)
def test_retrieval_is_ours(tutorial, folder, encode, exam, road):
    result = tutorial.run(
        getattr(tutorial, road)("tiny", folder), tutorial.LocalRetrieval("LocalSearch", exam)
    )["LocalSearch"]
    expected = evaluate_retrieval(encode, *exam, ks=(1, 10), resamples=0)
    scores = result.scores["test"][0]
    assert expected["n"] == 11 and 0 < expected["ndcg@10"] < 1
    assert (
        result.get_score() == scores["ndcg_at_10"] == pytest.approx(expected["ndcg@10"], abs=1e-4)
    )
    for k in (1, 10):
        for ours, theirs in (("recall", "recall"), ("mrr", "mrr"), ("accuracy", "hit_rate")):
            assert scores[f"{theirs}_at_{k}"] == pytest.approx(expected[f"{ours}@{k}"], abs=1e-4), (
                ours,
                k,
            )


def test_grades_are_counted_only_when_asked(tutorial, folder, encode, exam):
    corpus, queries, qrels = exam
    model = tutorial.Ours("tiny", folder)
    score = {}
    for graded in (False, True):
        task = tutorial.LocalRetrieval("LocalSearch", exam, graded)
        score[graded] = tutorial.run(model, task)["LocalSearch"].get_score()
    assert abs(score[True] - score[False]) > 1e-3
    flat = (
        corpus,
        queries,
        {q: {d: min(grade, 1) for d, grade in found.items()} for q, found in qrels.items()},
    )
    task = tutorial.LocalRetrieval("LocalSearch", flat, graded=True)
    same = tutorial.run(model, task)["LocalSearch"].get_score()
    assert same == pytest.approx(score[False], abs=1e-6)


def test_classification_is_the_same_on_both_roads(tutorial, folder):
    rng = random.Random(4)
    rows = [
        (label, f"{word} {' '.join(rng.choices(WORDS, k=3))}")
        for label, word in (("music", "guitar"), ("food", "rice"), ("trip", "train"))
        for _ in range(20)
    ]

    def task():
        return tutorial.LocalClassification("LocalIntents", train=rows[::2], test=rows[1::2])

    scores = [
        tutorial.run(getattr(tutorial, road)("tiny", folder), task())["LocalIntents"]
        for road in ROADS
    ]
    assert scores[0].get_score() == pytest.approx(scores[1].get_score(), abs=1e-3)
    assert scores[0].get_score() > 0.4
    assert len(scores[0].scores["test"][0]["scores_per_experiment"]) == 3


def test_prompts_are_used_on_both_roads(tutorial, folder, exam, tmp_path):
    "A model that wants other words before a query than before a document gets them."
    prompts = {"query": "what is the ", "document": "a man and the "}
    with_prompts = save(tmp_path / "prompted", prompts=prompts)
    scores = [
        tutorial.run(
            getattr(tutorial, road)("p", with_prompts), tutorial.LocalRetrieval("LocalSearch", exam)
        )["LocalSearch"].get_score()
        for road in ROADS
    ]
    encoder = SentenceEncoder.from_pretrained(with_prompts)
    expected = evaluate_retrieval(
        lambda texts: encoder.encode(texts, prompt="query", progress=False),
        *exam,
        ks=(10,),
        resamples=0,
        encode_corpus=lambda texts: encoder.encode(texts, prompt="document", progress=False),
    )["ndcg@10"]
    task = tutorial.LocalRetrieval("LocalSearch", exam)
    plain = tutorial.run(tutorial.Ours("tiny", folder), task)["LocalSearch"].get_score()
    assert scores == pytest.approx([expected, expected], abs=1e-4) and abs(expected - plain) > 1e-3


def test_each_text_is_encoded_once(tutorial, folder, sts, monkeypatch):
    model, seen = tutorial.Ours("tiny", folder), []
    encode = model.encoder.encode
    monkeypatch.setattr(
        model.encoder,
        "encode",
        lambda texts, **options: (seen.extend(texts), encode(texts, **options))[1],
    )
    double = tuple(2 * column for column in sts)
    tasks = [tutorial.LocalSTS("LocalSTS", double), tutorial.LocalSTS("LocalSTSAgain", sts)]
    results = tutorial.run(model, tasks)
    assert sorted(seen) == sorted({*sts[0], *sts[1]})
    assert results["LocalSTS"].get_score() == pytest.approx(
        results["LocalSTSAgain"].get_score(), abs=1e-6
    )
    rows = model.vectors([sts[0][3], sts[1][0], sts[0][3]])
    assert rows == pytest.approx(
        encode([sts[0][3], sts[1][0], sts[0][3]], progress=False), abs=1e-6
    )
    assert len(seen) == 60


# --- names ---


def test_names_and_revisions(tutorial, folder, sts, tmp_path):
    meta = tutorial.named("tiny", folder)
    assert meta.name == "local/tiny" and re.fullmatch("[0-9a-f]{12}", meta.revision)
    assert meta.similarity_fn_name.value == "cosine"
    assert (
        tutorial.named("tiny", save(tmp_path / "copy")).revision
        == meta.revision
        != tutorial.named("tiny", save(tmp_path / "other", 0.1)).revision
    )
    task = tutorial.LocalSTS("LocalSTS", sts)
    other = tutorial.LocalSTS("LocalSTS", (*sts[:2], sts[2][::-1]))
    assert task.metadata.dataset["revision"] != other.metadata.dataset["revision"]


def test_two_models_one_score_unless_they_are_named(tutorial, folder, sts, tmp_path):
    "What the tutorial warns of. If the first half fails, mteb has mended it: rewrite the warning."
    from sentence_transformers import SentenceTransformer

    mteb, other = tutorial.mteb, save(tmp_path / "tiny", 0.2)  # the same name even, trained further
    true = []
    for f in (folder, other):
        task = tutorial.LocalSTS("LocalSTS", sts)
        true.append(tutorial.run(tutorial.Ours("tiny", f), task)["LocalSTS"].get_score())
    assert abs(true[0] - true[1]) > 1e-3
    cache = mteb.ResultCache(tmp_path / "unnamed")
    for f in (folder, other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mteb uses sentence-transformers' old names
            result = mteb.evaluate(
                SentenceTransformer(str(f), device="cpu"),
                tutorial.LocalSTS("LocalSTS", sts),
                cache=cache,
                co2_tracker=False,
                show_progress_bar=False,
            )
        assert result.model_name == "no_model_name/available"
        assert result[0].get_score() == pytest.approx(true[0], abs=1e-4)
    cache = mteb.ResultCache(tmp_path / "named")
    for f, expected in zip((folder, other, folder), (*true, true[0])):
        for road in ROADS:
            result = tutorial.run(
                getattr(tutorial, road)("tiny", f), tutorial.LocalSTS("LocalSTS", sts), cache
            )["LocalSTS"]
            assert result.get_score() == pytest.approx(expected, abs=1e-4)


# --- bad input ---


def test_what_is_no_model_is_refused(tutorial, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(ValueError, match=name):
            tutorial.Ours("x", tmp_path / name)
    with (
        pytest.raises(NotImplementedError, match="No model implementation"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        tutorial.mteb.get_model(str(folder))  # the command line too takes names only


def test_bad_tasks(tutorial, folder, encode, sts, exam):
    "Where mteb goes on with a wrong figure, our evaluator says what is wrong: a reason to compare."
    model = tutorial.Ours("tiny", folder)
    with pytest.raises(Exception, match="length"):
        tutorial.LocalSTS("LocalSTS", (sts[0], sts[1][:-1], sts[2]))
    flat = (*sts[:2], [0.5] * 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(
            tutorial.run(model, tutorial.LocalSTS("LocalSTS", flat))["LocalSTS"].get_score()
        )
    with pytest.raises(ValueError, match="cannot be ranked"):
        evaluate_sts(encode, flat)
    corpus, queries, qrels = exam
    lost = corpus, queries, {**qrels, "q0": {"elsewhere": 1}}
    task = tutorial.LocalRetrieval("LocalSearch", lost)
    assert 0 <= tutorial.run(model, task)["LocalSearch"].get_score() < 1
    with pytest.warns(UserWarning, match="corpus"):
        assert evaluate_retrieval(encode, *lost)["missing_documents"] == 1
    with pytest.raises(ValueError, match="Input should be 'BitextMining'"):
        tutorial.about("Local", "NoSuchType", "ndcg_at_10", 0)


def test_an_official_task_without_a_network_is_reported(tutorial, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tutorial.mteb.evaluate(
            tutorial.Ours("tiny", folder),
            tutorial.mteb.get_task("STSBenchmark.v2"),
            cache=None,
            co2_tracker=False,
            raise_error=False,
            show_progress_bar=False,
        )
    if not result.exceptions:
        pytest.skip("the hub was reached")
    assert len(result.task_results) == 0 and result.exceptions[0].task_name == "STSBenchmark.v2"


def test_the_benchmark_has_the_tasks_that_the_tutorial_counts(tutorial):
    tasks = tutorial.mteb.get_benchmark("MTEB(eng, v2)").tasks
    assert len(tasks) == 41 and all("test" in task.metadata.descriptive_stats for task in tasks)


def test_real_sts_is_the_published_figure(tutorial, shared_data, tmp_path):
    from contrastive_st.data import read_sts

    SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2").save_pretrained(
        tmp_path / "minilm"
    )
    task = tutorial.LocalSTS("LocalSTSB", read_sts(shared_data / "stsb/test.tsv"))
    result = tutorial.run(tutorial.Ours("minilm", tmp_path / "minilm"), task)["LocalSTSB"]
    assert result.get_score() == pytest.approx(PUBLISHED, abs=1e-4)
