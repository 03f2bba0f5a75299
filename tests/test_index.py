"""An index folder: the same answers as a plain search, ids, appending, damage and bad input."""

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import WORDS, make_backbone, make_tokenizer, refuses, sentences

from contrastive_st.atomic import write_manifest
from contrastive_st.encoding import embedding_blocks, open_embeddings, write_embeddings
from contrastive_st.index import Corpus, Hit, Index, build_index, extend_or_build, is_index
from contrastive_st.model import SentenceEncoder
from contrastive_st.precision import dequantize, unit_rows
from contrastive_st.search import semantic_search

TEXTS = sentences(300, seed=0)
QUERIES = sentences(9, seed=1)


def bag(texts):
    "Count words and letters: 80 numbers, cheap and different for different texts."
    table = np.zeros((len(texts), 80), np.float32)
    for row, text in zip(table, texts):
        for word in text.split():
            row[WORDS.index(word) % 50 if word in WORDS else 49] += 1
        for letter in text:
            row[50 + ord(letter) % 30] += 0.1
    return table


def other(texts):
    return bag(texts)[:, ::-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A model directory with prompts, and another one with other weights."
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("models")
    backbone = make_backbone(len(tokenizer))
    prompts = {"query": "how do i ", "document": "a man is "}
    SentenceEncoder(backbone, tokenizer, max_length=64, prompts=prompts).save_pretrained(
        folder / "model"
    )
    backbone.embeddings.word_embeddings.weight.data *= 1.5
    SentenceEncoder(backbone, tokenizer, max_length=64, prompts=prompts).save_pretrained(
        folder / "other"
    )
    return folder / "model"


def quiet(*args, **options):
    return build_index(*args, progress=False, **options)


# ---- search ----


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "uint8", "binary", "ubinary"])
def test_the_same_answers_as_a_search_in_the_stored_vectors(tmp_path, precision):
    index = quiet(tmp_path / "index", bag, TEXTS, precision=precision)
    r = index.record
    stored = dequantize(index.vectors, precision, r.ranges, r.width)
    expected, rows = semantic_search(bag(QUERIES), stored, 7)
    scores, ours = index.nearest(bag(QUERIES), 7)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    np.testing.assert_allclose(
        np.take_along_axis(unit_rows(bag(QUERIES)) @ unit_rows(stored).T, ours, 1),
        expected,
        atol=2e-6,
    )
    hits = index.search(QUERIES, 7)
    assert [[hit.text for hit in row] for row in hits] == [[TEXTS[i] for i in row] for row in ours]
    assert hits[0][0] == Hit(str(ours[0, 0]), float(scores[0, 0]), TEXTS[ours[0, 0]])


def test_many_chunks_give_the_same(tmp_path, monkeypatch):
    index = quiet(tmp_path / "index", bag, TEXTS * 2)
    scores, rows = index.nearest(bag(QUERIES), 20)
    monkeypatch.setattr("contrastive_st.index._ROWS", 37)
    again = quiet(tmp_path / "again", bag, TEXTS * 2).nearest(bag(QUERIES), 20)
    np.testing.assert_allclose(again[0], scores, atol=1e-6)
    assert (np.sort(rows % 300) == np.sort(again[1] % 300)).mean() > 0.99


def test_a_model_with_prompts(tmp_path, model):
    index = quiet(tmp_path / "index", model, TEXTS[:40], ids=range(100, 140))
    encoder = SentenceEncoder.from_pretrained(model)
    corpus = encoder.encode_document(TEXTS[:40], progress=False)
    expected, rows = semantic_search(encoder.encode_query(QUERIES, progress=False), corpus, 5)
    hits = Index.open(tmp_path / "index", full=True).search(QUERIES, 5)
    assert [[int(hit.id) - 100 for hit in row] for row in hits] == rows.tolist()
    np.testing.assert_allclose([[h.score for h in row] for row in hits], expected, atol=1e-6)
    assert index.prompts == encoder.prompts
    assert index.search(QUERIES[0]) == index.search([QUERIES[0]]) and index.search([]) == []


def test_products_where_the_model_compares_products(tmp_path, model):
    encoder = SentenceEncoder.from_pretrained(model, normalize=False)
    encoder.settings["similarity_fn_name"] = "dot"
    index = quiet(tmp_path / "index", encoder, TEXTS[:40])
    corpus = encoder.encode_document(TEXTS[:40], progress=False)
    queries = encoder.encode_query(QUERIES, progress=False)
    expected = semantic_search(queries, corpus, 5, similarity="dot")
    np.testing.assert_allclose(index.nearest(queries, 5)[0], expected[0], rtol=1e-5)
    assert index.similarity == "dot"
    refuses(lambda: quiet(tmp_path / "f", encoder, TEXTS, faiss="ivf"), "compares products")


@pytest.mark.parametrize("method", ["ivf", "hnsw"])
def test_faiss_finds_nearly_the_same_with_exact_scores(tmp_path, method):
    pytest.importorskip("faiss")
    index = quiet(tmp_path / "index", bag, TEXTS, faiss=method)
    index.append(sentences(40, seed=2))
    exact, ours = index.search(QUERIES, 5, exact=True), index.search(QUERIES, 5)
    pairs = [({h.id for h in a}, {h.id for h in b}) for a, b in zip(exact, ours)]
    assert np.mean([len(a & b) / 5 for a, b in pairs]) > 0.5
    known = {
        (n, h.id): h.score
        for n, row in enumerate(index.search(QUERIES, 340, exact=True))
        for h in row
    }
    for n, row in enumerate(ours):
        assert all(abs(known[n, h.id] - h.score) < 1e-5 for h in row)


def test_a_missing_extra_is_named_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    refuses(lambda: quiet(tmp_path / "index", None, TEXTS, faiss="ivf"), "[search]")
    refuses(lambda: quiet(tmp_path / "index", bag, TEXTS, faiss="tree"), "tree", "ivf or hnsw")
    assert not (tmp_path / "index").exists()


# ---- rows and ids ----


def test_files_of_all_kinds(tmp_path):
    rows = [{"nr": n, "question": f"q {n}", "answer": text} for n, text in enumerate(TEXTS[:5])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines = [f"{row['nr']};{row['question']};{row['answer']}" for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["nr;question;answer", *lines]) + "\n")
    pa.parquet = __import__("pyarrow.parquet").parquet
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        corpus = Corpus(tmp_path / f"a.{ending}", "answer", "nr")
        assert [(id, text) for _, id, text in corpus] == [(str(n), TEXTS[n]) for n in range(5)]
        refuses(lambda: list(Corpus(tmp_path / f"a.{ending}", "anwser")), "mean 'answer'?", ending)
        refuses(lambda: list(Corpus(tmp_path / f"a.{ending}", "answer", "Nummer")), "Nummer")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(Corpus(tmp_path / "a.txt")) == [(1, None, "one"), (2, None, "two")]
    refuses(lambda: Corpus(tmp_path / "a.txt", id_column="nr"), "a.txt", "no columns")


def test_ids_of_a_corpus_are_taken_unless_you_say_no(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "d7", "title": "a", "text": "dog"}\n{"_id": 8, "text": "cat"}\n')
    assert [id for _, id, _ in Corpus(path)] == ["d7", "8"]
    assert [id for _, id, _ in Corpus(path, id_column="")] == [None, None]
    path.write_text('{"_id": null, "text": "dog"}\n')
    refuses(lambda: list(Corpus(path)), "corpus.jsonl:1", "no id", "None")


def test_blank_texts_are_left_out_and_counted(tmp_path):
    with pytest.warns(UserWarning, match="2 of 5 texts are blank"):
        index = quiet(tmp_path / "index", bag, ["", *TEXTS[:3], " \n"], ids="abcde")
    assert index.table["id"].to_pylist() == ["b", "c", "d"]


def test_half_characters_and_texts_of_a_megabyte(tmp_path, model):
    texts = ["a dog \ud83d", "long " * 200_000, "a cat"]
    with pytest.warns(UserWarning):
        index = quiet(tmp_path / "index", model, texts)
    assert index.search("a dog")[0][0].text in ("a dog \ufffd", texts[1], "a cat")
    assert index.table["text"].to_pylist() == ["a dog \ufffd", *texts[1:]]


# ---- append ----


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_an_appended_index_is_the_one_made_at_once(tmp_path, precision):
    grown = quiet(tmp_path / "grown", bag, TEXTS[:200], precision=precision)
    before = grown.nearest(bag(QUERIES), 200)
    reader = Index.open(tmp_path / "grown", bag)
    grown.append(TEXTS[200:], progress=False)
    assert grown.rows == 300 and grown.record.generation == 2
    assert all((a == b).all() for a, b in zip(reader.nearest(bag(QUERIES), 200), before))
    if precision != "int8":  # whose ranges come from the first texts
        whole = quiet(tmp_path / "whole", bag, TEXTS, precision=precision)
        assert (whole.vectors == grown.vectors).all() and whole.table.equals(grown.table)
        assert (whole.nearest(bag(QUERIES), 9)[1] == grown.nearest(bag(QUERIES), 9)[1]).all()
    assert not (tmp_path / "grown.part").exists()


def test_what_cannot_be_appended(tmp_path, model):
    index = quiet(tmp_path / "index", model, TEXTS[:5], ids="abcde")
    before = (tmp_path / "index/manifest.json").read_bytes()
    refuses(lambda: index.append(["dog"], ids=["c"]), "text 0", "index already", "row 2")
    refuses(lambda: index.append([]), "empty")
    again = Index.open(tmp_path / "index")
    with pytest.raises(ValueError, match="another model .*weights"):
        again.encoder = model.with_name("other")
    options = {"precision": "int8", "vectors": None, "faiss": None}
    corpus = tmp_path / "c.txt"
    corpus.write_text("dog\n")
    refuses(
        lambda: extend_or_build(tmp_path / "index", model, Corpus(corpus), True, options), "--pre"
    )
    other_model = model.with_name("other")
    refuses(
        lambda: extend_or_build(tmp_path / "index", other_model, Corpus(corpus), True, {}),
        "another model",
    )
    assert (tmp_path / "index/manifest.json").read_bytes() == before


def test_an_interrupted_index_goes_on(tmp_path):
    texts, calls = sentences(600, seed=3), []

    def failing(part):
        calls.append(len(part))
        if sum(calls) > 300:
            raise RuntimeError("no power")
        return bag(part)

    with pytest.raises(RuntimeError, match="no power"):
        quiet(tmp_path / "index", failing, texts, window=100)
    assert not (tmp_path / "index").exists()
    refuses(lambda: quiet(tmp_path / "index", failing, texts), "index.part", "resume")
    calls[:] = [-1000]
    index = quiet(tmp_path / "index", failing, texts, window=100, resume=True)
    assert sum(calls) + 1000 == 300  # nothing was encoded twice
    assert (index.vectors == bag(texts)).all() and index.table["text"].to_pylist() == texts
    assert not (tmp_path / "index.part").exists()


# ---- vectors that are there already ----


@pytest.mark.parametrize("name", ["v.npy", "v.arrow", "v.parquet"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_vectors_of_a_file(tmp_path, name, precision):
    texts = [*TEXTS[:100], "", *TEXTS[100:]]
    write_embeddings(tmp_path / name, bag, texts, progress=False)
    with pytest.warns(UserWarning, match="1 of 301"):
        index = quiet(tmp_path / "index", bag, texts, vectors=tmp_path / name, precision=precision)
    expected = semantic_search(bag(QUERIES), bag(TEXTS), 5)
    np.testing.assert_allclose(index.nearest(bag(QUERIES), 5)[0], expected[0], atol=0.02)
    if precision is None:
        assert (index.nearest(bag(QUERIES), 5)[1] == expected[1]).all()


@pytest.mark.parametrize("name", ["v.npy", "v.arrow", "v.parquet"])
def test_vectors_of_a_file_are_read_block_by_block(tmp_path, name, monkeypatch):
    monkeypatch.setattr("contrastive_st.encoding.WINDOW", 64)
    write_embeddings(tmp_path / name, bag, TEXTS, progress=False)
    blocks = list(embedding_blocks(tmp_path / name))
    assert max(map(len, blocks)) == 64
    assert (np.concatenate(blocks) == open_embeddings(tmp_path / name)).all()


def test_equal_texts_come_in_their_order(tmp_path):
    "A product may differ in its last digit from place to place; the order must not."

    def shaky(texts):
        noise = np.random.default_rng(len(texts)).normal(0, 1e-7, (len(texts), 80))
        return bag(texts) + noise.astype(np.float32)

    texts = [TEXTS[0], TEXTS[1]] * 8
    index = quiet(tmp_path / "index", shaky, texts)
    first = index.search(bag(TEXTS[:1]), 4)[0]
    assert [hit.id for hit in first] == ["0", "2", "4", "6"]
    scores, rows = index.nearest(bag(TEXTS[:2]), 16)
    assert (np.diff(scores) <= 0).all() and (np.sort(rows) == np.arange(16)).all()
    assert rows[1].tolist() == [*range(1, 16, 2), *range(0, 16, 2)]


def test_vectors_of_other_texts_or_models_are_refused(tmp_path, model):
    path = tmp_path / "v.npy"
    write_embeddings(path, model, TEXTS[:5], progress=False, prompt="document")
    for texts in (TEXTS[:4], TEXTS[:6], TEXTS[5:10]):
        refuses(lambda: quiet(tmp_path / "i", model, texts, vectors=path), "v.npy", "other texts")
    refuses(
        lambda: quiet(tmp_path / "i", model.with_name("other"), TEXTS[:5], vectors=path),
        "v.npy",
        "another model",
    )
    refuses(
        lambda: quiet(tmp_path / "i", model, TEXTS[:5], vectors=path, document_prompt=""),
        "v.npy",
        "a man is",
    )
    assert quiet(tmp_path / "i", model, TEXTS[:5], vectors=path).rows == 5
    write_embeddings(path, bag, TEXTS[:200], "int8", progress=False)
    refuses(
        lambda: quiet(tmp_path / "j", bag, TEXTS[:200], vectors=path, precision="binary"), "int8"
    )
    assert not (tmp_path / "j").exists() and not (tmp_path / "j.part").exists()


# ---- bad input ----


def with_nan(texts):
    return np.where(np.arange(80) == 3, np.nan, bag(texts))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"texts": []}, ["is empty", "at least one"]),
        ({"texts": [" "]}, ["all texts are blank"]),
        ({"texts": iter([])}, ["is empty"]),
        ({"texts": "a dog"}, ["type str"]),
        ({"texts": ["a", None]}, ["text 1", "NoneType"]),
        ({"texts": ["a", "b"], "ids": ["x", "x"]}, ["text 1", "same id as text 0", "unique"]),
        ({"texts": ["a", "b"], "ids": ["x"]}, ["text 1 has no id"]),
        ({"texts": ["a"], "ids": ["x", "y"]}, ["more ids than the 1 texts"]),
        ({"encoder": with_nan}, ["NaN"]),
        ({"precision": "int4"}, ["int4"]),
        ({"query_prompt": "q: "}, ["plain function"]),
        ({"vectors": "absent.npy"}, ["absent.npy"]),
    ],
)
def test_what_cannot_be_indexed(tmp_path, options, words):
    arguments = {"encoder": bag, "texts": TEXTS[:3]} | options
    refuses(lambda: quiet(tmp_path / "index", **arguments), *words)
    assert not (tmp_path / "index").exists() and not (tmp_path / "index.part").exists()


def test_what_is_there_is_not_replaced(tmp_path):
    quiet(tmp_path / "index", bag, TEXTS[:3])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("mine")
    refuses(lambda: quiet(tmp_path / "index", bag, TEXTS), "index: is an index already", "append")
    refuses(lambda: quiet(tmp_path / "file", bag, TEXTS), "is a file already")
    refuses(lambda: quiet(tmp_path / "folder", bag, TEXTS), "is a folder already")
    (tmp_path / "empty").mkdir()
    assert quiet(tmp_path / "empty", bag, TEXTS).rows == 300


def test_an_index_of_another_model_or_width(tmp_path):
    quiet(tmp_path / "index", bag, TEXTS[:3])
    refuses(lambda: Index.open(tmp_path / "index", other), "another model", "function")
    index = Index.open(tmp_path / "index")
    refuses(lambda: index.search("a dog"), "made with an encoder of a program")
    assert len(index.search(bag(["a dog"]), 2)[0]) == 2
    refuses(lambda: index.search(np.ones((2, 79))), "79 wide", "80")
    refuses(lambda: index.search(np.full((2, 80), np.nan)), "NaN")
    refuses(lambda: index.search(bag(["a"]), 0), "top_k")
    refuses(lambda: index.search([" "]), "blank")


def test_a_moved_model_is_found_beside_its_index(tmp_path, model):
    import shutil

    shutil.copytree(model, tmp_path / "run/model")
    quiet(tmp_path / "run/index", tmp_path / "run/model", TEXTS[:5])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert Index.open(tmp_path / "moved/index").search(TEXTS[3], 1)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", "vectors.npy lengths.npy texts.arrow index.json".split())
@pytest.mark.parametrize("damage", [cut, flip, type(WORDS) and (lambda path: path.unlink())])
def test_a_damaged_folder(tmp_path, name, damage):
    quiet(tmp_path / "index", bag, TEXTS[:20])
    damage(tmp_path / "index" / name)
    refuses(lambda: Index.open(tmp_path / "index", full=True), name, "make the index again")
    assert is_index(tmp_path / "index")
    if damage is not flip:
        refuses(lambda: Index.open(tmp_path / "index"), name, "make the index again")


def test_folders_that_are_no_index(tmp_path, model):
    refuses(lambda: Index.open(tmp_path / "absent"), "absent", "no such folder")
    refuses(lambda: Index.open(model), "model", "is no index")
    assert not is_index(model) and not is_index(tmp_path)


def test_an_index_of_another_version(tmp_path):
    from contrastive_st.atomic import write_manifest

    quiet(tmp_path / "index", bag, TEXTS[:20])
    path = tmp_path / "index/index.json"
    for change in ({"format": 2}, {"rows": 19}, {"rows": "many"}, {"color": 1}):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | change))
        write_manifest(path.parent)
        refuses(lambda: Index.open(path.parent), "again")
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prompts": {"query": ""}}, "prompts has no document"),
        ({"prompts": {}}, "prompts has no document"),
        ({"model": {"name": "x", "relative": 5}}, "model has a name that is no text"),
        ({"model": {"name": True}}, "model has a name that is no text"),
        ({"precision": "int3"}, "precision 'int3' is not supported"),
    ],
)
def test_a_record_that_another_program_wrote(tmp_path, change, said):
    folder = tmp_path / "index"
    quiet(folder, bag, TEXTS[:20])
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    write_manifest(folder)
    refuses(lambda: Index.open(folder), f"{file}: {said}", "make the index again")
