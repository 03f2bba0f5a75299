"""Work on several machines: parts that are joined, and a training whose machines may die."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_trainer  # noqa: F401, for the job below, which is forked from here
from conftest import refuses, run_itself
from safetensors.numpy import load_file
from torch.distributed.run import main
from typer.testing import CliRunner

from contrastive_st import encoding, run, store
from contrastive_st.atomic import lock
from contrastive_st.cli import app
from contrastive_st.data import load_source, prepare, store_folder
from contrastive_st.encoding import embedding_blocks, open_embeddings, same_texts, write_embeddings
from contrastive_st.files import count_lines, read_rows, read_texts
from contrastive_st.mixture import Mixture, read_config
from contrastive_st.store import REJECTS, Store, part_of_store, verify, write_store, write_tokens
from contrastive_st.workers import Share, find_shares, parts_folder, read_share

pytestmark = pytest.mark.usefixtures("quick_disk")

# ---- which part is which ----


@pytest.mark.parametrize("total", [0, 1, 6, 7, 100])
def test_each_row_is_in_one_part(total):
    spans = [Share(n, 7).span(total) for n in range(1, 8)]
    assert [row for span in spans for row in range(*span)] == list(range(total))
    assert max(b - a for a, b in spans) - min(b - a for a, b in spans) <= 1


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "a/b", "1/2/3", (3,), 4, (0, 0), "-1/4", None])
def test_a_part_that_is_none(part):
    refuses(lambda: read_share(part), "write for example 3/64")


def test_a_part_is_read_in_any_form():
    assert read_share("3/64") == read_share((3, 64)) == read_share(Share(3, 64)) == (3, 64)
    assert str(Share(3, 64)) == "3/64" and Share(3, 64).name == "00003-of-00064"


def test_parts_are_found_by_their_names(tmp_path):
    whole = tmp_path / "v.npy"
    parts_folder(whole).mkdir()
    for name in ("00002-of-00003.npy", "00001-of-00003.npy", "00003-of-00003.npy.part", "x-of-y"):
        (parts_folder(whole) / name).touch()
    assert list(find_shares(whole, ".npy")) == [(1, 3), (2, 3)]
    assert find_shares(tmp_path / "nothing") == {}


def test_lines_are_counted(tmp_path):
    for name, content in (("a.txt", b""), ("b.txt", b"a\nb"), ("c.txt", b"\n" * 70_000)):
        (tmp_path / name).write_bytes(content)
    assert [count_lines(tmp_path / f"{n}.txt") for n in "abc"] == [0, 1, 70_000]
    pq.write_table(pa.table({"a": range(5)}), tmp_path / "a.parquet")
    assert count_lines(tmp_path / "a.parquet") == 5
    refuses(lambda: count_lines(tmp_path / "d.txt"), "d.txt: no such file")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refuses(lambda: count_lines(tmp_path / "bad.parquet"), "not a Parquet file")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 cut")
    refuses(lambda: count_lines(tmp_path / "bad.jsonl.gz"), "gzip data is cut off")


# ---- parts of a store ----


def pairs(n=60):
    return [{"anchor": f"question {i}", "positive": f"answer {i % 13}"} for i in range(n)]


def write_rows(path, rows):
    "Rows of JSON, and bad ones as they are."
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def made(out, path, part=None, **options):
    "Prepare a file, a part of it, or what its parts give."
    entry = {"name": "a", "path_or_hub_id": path, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare([entry], out, progress=False, part=part)


def in_process(call, *args):
    "Start a call in a process of its own, which is forked and so begins at once."
    process = multiprocessing.get_context("fork").Process(target=call, args=args)
    process.start()
    return process


def all_parts(call, count):
    "Run call(part) for all parts at once, each in a process."
    processes = [in_process(call, f"{n}/{count}") for n in range(1, count + 1)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def same_store(one, other):
    "Whether two stores hold the same rows, and say the same of them."
    one, other = Store(one), Store(other)
    rows = range(len(one))
    said = [
        {key: value for key, value in opened.summary.items() if key not in ("shards", "parts")}
        for opened in (one, other)
    ]
    assert said[0] == said[1]
    assert one.rows(rows) == other.rows(rows)
    assert (one.identities(rows) == other.identities(rows)).all()
    assert (one.folder / REJECTS).read_bytes() == (other.folder / REJECTS).read_bytes()
    if one.mark == "score":
        assert one.scores(rows).tolist() == other.scores(rows).tolist()
    if one.mark == "teacher":
        assert one.teacher(rows).tolist() == other.teacher(rows).tolist()


def tokenise(texts):
    "Words as numbers, of which five are kept."
    split = [[sum(word.encode()) for word in text.split()] for text in texts]
    return (
        np.array([number for ids in split for number in ids[:5]]),
        np.array([min(len(ids), 5) for ids in split]),
        np.array([len(ids) > 5 for ids in split]),
    )


def engine(**changes):
    fixed = {"fingerprint": "f", "tokenizer": "words", "max_length": 5, "vocabulary": 9999}
    return fixed | changes


def test_four_parts_in_four_processes_are_the_undivided_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 7)
    rows = pairs(90)
    rows[3], rows[40], rows[89] = '{"anchor": "", "positive": "b"}', "no JSON", '["alone"]'
    path = write_rows(tmp_path / "a.jsonl", rows)
    made(tmp_path / "one", path)
    write_tokens(store_folder(tmp_path / "one", "a"), engine(), tokenise)

    def work(part):
        made(tmp_path / "four", path, part)
        place = parts_folder(store_folder(tmp_path / "four", "a")) / read_share(part).name
        write_tokens(place, engine(), tokenise)

    all_parts(work, 4)
    assert made(tmp_path / "four", path).written == ("a",)
    one, four = (store_folder(tmp_path / name, "a") for name in ("one", "four"))
    same_store(one, four)
    assert not list(four.glob("*.arrow")) and not list(four.glob("tokens/*.arrow"))
    everything = range(len(Store(one)))
    assert Store(one).tokens(everything) == Store(four).tokens(everything)
    assert Store(one).tokenised["truncated"] == Store(four).tokenised["truncated"]
    verify(four)
    # nothing is left to be done, and what was joined travels as a folder
    assert (
        made(tmp_path / "four", path).written == () == made(tmp_path / "four", path, "2/4").written
    )
    shutil.copytree(tmp_path / "four", tmp_path / "copy")
    same_store(one, store_folder(tmp_path / "copy", "a"))


MARKED = [f'{{"text": "note {i}", "label": "{i % 3}"}}' for i in range(20)]
GRADED = [f'{{"a": "one {i}", "b": "two {i}", "grade": {i % 6}}}' for i in range(20)]
JUDGED = [
    json.dumps({"query": f"q{i // 3}", "text": f"text {i}", "relevance": int(i % 3 == 0)})
    for i in range(21)
]
TRIPLES = [row | {"negative": f"no {i}"} for i, row in enumerate(pairs(20))]
TAUGHT = [row | {"good": 9 - i % 5, "bad": i % 3} for i, row in enumerate(TRIPLES)]


@pytest.mark.parametrize("count", [3, 24])  # of the second some are empty
@pytest.mark.parametrize(
    "rows, options",
    [
        (pairs(20), {}),
        (TRIPLES, {}),
        ([*pairs(10), *TRIPLES], {"negatives": 2}),
        ([{"left": f"l{i}", "right": f"r{i}"} for i in range(20)], {}),  # guessed columns
        (MARKED, {"label": "label"}),
        (GRADED, {"score": "grade", "columns": ("a", "b")}),
        (TAUGHT, {"teacher": ("good", "bad")}),
        # three rows of one anchor belong together, on whichever side of a border they lie
        (JUDGED, {"relevance": "relevance", "columns": ("query", "text")}),
    ],
)
def test_parts_of_any_data_are_the_undivided_store(tmp_path, rows, options, count):
    path = write_rows(tmp_path / "a.jsonl", rows)
    made(tmp_path / "one", path, **options)
    for n in range(count, 0, -1):
        made(tmp_path / "parts", path, (n, count), **options)
    made(tmp_path / "parts", path, **options)
    same_store(store_folder(tmp_path / "one", "a"), store_folder(tmp_path / "parts", "a"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.parquet", "a.jsonl.gz"])
def test_parts_of_any_format(tmp_path, name):
    path, rows = tmp_path / name, pairs(20)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        comma = "," if name.endswith(".csv") else "\t"
        cells = [["anchor", "positive"], *(list(row.values()) for row in rows)]
        if comma == ",":  # a record of two lines, which no border may cut
            cells[7][1] = '"two\nlines"'
        path.write_text("\n".join(comma.join(row) for row in cells))
    made(tmp_path / "one", path)
    for n in (1, 2, 3):
        made(tmp_path / "parts", path, (n, 3))
    made(tmp_path / "parts", path)
    same_store(store_folder(tmp_path / "one", "a"), store_folder(tmp_path / "parts", "a"))


def test_an_interrupted_part_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 4)
    path = write_rows(tmp_path / "a.jsonl", pairs())
    calls, add = [], store.write_batch

    def stops(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(*args, **options)

    monkeypatch.setattr(store, "write_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "parts", path, "2/2")
    made(tmp_path / "parts", path, "1/2")
    refuses(lambda: made(tmp_path / "parts", path), "part 2/2 is missing")
    del calls[:3]
    before = len(calls)
    made(tmp_path / "parts", path, "2/2")
    assert len(calls) - before == 6  # of eight shards two were there
    made(tmp_path / "parts", path)
    made(tmp_path / "one", path)
    same_store(store_folder(tmp_path / "one", "a"), store_folder(tmp_path / "parts", "a"))


@pytest.fixture
def three(tmp_path):
    "A file and two of three parts; the third is up to the test."
    path = write_rows(tmp_path / "a.jsonl", pairs())
    for n in (1, 2):
        made(tmp_path / "out", path, (n, 3))
    return path, tmp_path / "out", parts_folder(store_folder(tmp_path / "out", "a"))


def test_parts_that_are_missing_or_of_another_number(three):
    path, out, parts = three
    refuses(lambda: made(out, path), "a.store: part 3/3 is missing", "--part")
    refuses(lambda: made(out, path, "1/4"), "holds parts of 3 and of 4", "wrong number")
    shutil.rmtree(parts / "00001-of-00003")
    refuses(lambda: made(out, path), "parts 1/3, 3/3 are missing")
    made(out, path, "1/3")
    made(out, path, "3/3")
    shutil.copytree(parts / "00001-of-00003", parts / "00001-of-00002")
    refuses(
        lambda: made(out, path), "holds parts of 2 and of 3", "or the folder, to do it undivided"
    )


def test_the_folder_of_parts_is_named_as_the_whole_is(three, tmp_path, monkeypatch):
    path, out, parts = three
    monkeypatch.chdir(tmp_path)
    refuses(lambda: made("out", path), "without it, or delete out/a.store.parts to do it undivided")
    Path("links").mkdir()
    Path("links/a.store").symlink_to(out / "a.store")
    refuses(lambda: made("links", path), f"or delete {parts} to do it undivided")


def test_leftover_parts_leave_a_way_back(three):
    path, out, parts = three
    refuses(lambda: made(out, path), f"then without it, or delete {parts} to do it undivided")
    made(out, path, "3/3")
    refuses(
        lambda: made(out, path, negatives=1),
        f"prepare part 1/3 again, or delete {parts} to do it undivided",
    )
    shutil.rmtree(parts)
    assert made(out, path, negatives=1)["a"]["rows"] == 60


def test_parts_of_other_data_or_options(three):
    path, out, parts = three
    made(out, path, "3/3", negatives=1)
    refuses(lambda: made(out, path), "00003-of-00003: was made of other data", "part 3/3 again")
    made(out, path, "3/3")
    write_rows(path, pairs(61))
    refuses(lambda: made(out, path), "00001-of-00003: was made of other data")


# groups of one to five rows, the first of them a pair
UNEVEN = [
    json.dumps({"query": f"q{n}", "text": f"text {n}.{k}", "relevance": int(k == 0)})
    for n, rows in enumerate([1, 5, 2, 3, 1, 4, 1, 1, 2, 5, 1, 3])
    for k in range(rows)
]
LISTS = [
    row | {"pos": [row["positive"], f"yes {i}"], "neg": [f"no {k}" for k in range(i % 4)]}
    for i, row in enumerate(pairs(20))
]
for listed in LISTS:
    del listed["positive"]
UNEVEN_TAUGHT = [
    {"anchor": f"q{i}", "positive": f"p{i}", "negative": no, "scores": [9 - i % 5, *range(len(no))]}
    for i in range(20)
    for no in [[f"no {k}" for k in range(1 + (i + 2) % 3)]]
]
# a negative in the third column, but none in the first rows; a bad row has the most of all
HOLES = [
    row | ({"id": f"{i}"} if i < 9 else {"negative": f"no {i}"}) for i, row in enumerate(pairs(20))
]
HOLES[2] |= {"negative": ["no", "none", " "]}
HOLES[4] |= {"negative": None}
HOLES[9] |= {"negative": " "}  # of the form of the good rows that follow

GUESSED = [
    {"left": f"l{i}", "right": f"r{i}"} | ({"negative": f"n{i}"} if i > 9 else {})
    for i in range(20)
]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize(
    "rows, options",
    [
        (UNEVEN, {"relevance": "relevance", "columns": ("query", "text")}),
        (LISTS, {}),
        (LISTS[::-1], {}),
        (UNEVEN_TAUGHT, {"teacher": "scores"}),
        ([*pairs(10), *TRIPLES[:10]], {}),  # a whole part is without negatives
        ([*TRIPLES[:10], *pairs(10)], {}),
        (HOLES, {}),
        (GUESSED, {}),
        ([list(row.values()) for row in [*pairs(10), *TRIPLES[:10]]], {}),
        # a row of too many negatives is left out, and so decides nothing
        ([*pairs(3), pairs(4)[3] | {"negative": ["no"] * 1001}, *TRIPLES[4:]], {}),
    ],
)
def test_parts_have_the_width_of_the_whole(tmp_path, rows, options, count):
    path = write_rows(tmp_path / "a.jsonl", rows)
    made(tmp_path / "one", path, **options)
    for n in range(count, 0, -1):
        made(tmp_path / "parts", path, (n, count), **options)
    made(tmp_path / "parts", path, **options)
    assert len(Store(store_folder(tmp_path / "one", "a")).columns) > 2
    same_store(store_folder(tmp_path / "one", "a"), store_folder(tmp_path / "parts", "a"))


def test_a_part_is_not_refused_for_a_bad_row_of_another(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["no JSON", *pairs(10), *TRIPLES[:9]])
    entry = [{"name": "a", "path_or_hub_id": path}]
    refuses(
        lambda: prepare(entry, tmp_path / "out", "raise", progress=False, part="1/2"),
        "a.jsonl:1: not JSON",
    )
    part = prepare(entry, tmp_path / "out", "raise", progress=False, part="2/2")["a"]
    assert part["columns"] == ["anchor", "positive", "negative"]


def test_a_part_warns_of_many_negatives(tmp_path):
    row = {"anchor": "a", "positive": "b", "negative": [f"no {i}" for i in range(65)]}
    path = write_rows(tmp_path / "a.jsonl", [*pairs(9), row])
    with pytest.warns(UserWarning, match="a.jsonl: line 10: is the first row with negatives"):
        prepare([{"name": "a", "path_or_hub_id": path}], tmp_path, progress=False, part="1/2")


def test_parts_that_decided_differently(tmp_path):
    "Each part read by itself, as `write_store` does without a word on negatives."
    folder, origin = tmp_path / "a.store", {"file": "a"}
    for n, row in ((1, ("a", "b")), (2, ("c", "d", "e", "f"))):
        place, own = part_of_store(folder, origin, (n, 2))
        write_store(place, own, lambda after, reject, row=row: [(1, row)])
    refuses(
        lambda: write_store(folder, origin, None),
        "00002-of-00002: its rows have 4 columns, those of an earlier part 2; say how many "
        "negatives a row has with negatives=, then prepare all parts again",
    )
    assert not folder.exists()


def test_parts_that_guessed_differently(tmp_path):
    rows = [{"left": f"l{i}", "right": f"r{i}"} for i in range(9)]
    turned = [{"right": f"r{i}", "left": f"l{i}"} for i in range(9)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, *turned])
    for n in (1, 2):
        made(tmp_path / "out", path, (n, 2))
    refuses(
        lambda: made(tmp_path / "out", path),
        "00002-of-00002: its texts are of the columns ['right', 'left'], those of an earlier part "
        "of ['left', 'right']; name them with columns=, then prepare all parts again",
    )
    assert not store_folder(tmp_path / "out", "a").exists()


def test_parts_without_any_row(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["no JSON", "none"])
    for n in (1, 2):
        made(tmp_path / "out", path, (n, 2))
    refuses(lambda: made(tmp_path / "out", path), "no example in this file")


def test_a_constant_column_is_one_of_the_whole(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": "the same"} for i in range(8)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    for n in (1, 2):
        made(tmp_path / "out", path, (n, 2))
    with pytest.raises(ValueError, match="same"):
        made(tmp_path / "out", path)


def test_what_is_whole_is_not_divided(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", pairs())
    made(tmp_path / "out", path)
    refuses(lambda: made(tmp_path / "out", path, "1/2"), "is prepared already as a whole")


def test_parts_of_other_tokenizers(three):
    path, out, parts = three
    made(out, path, "3/3")
    for n, own in ((1, engine()), (2, engine()), (3, engine(fingerprint="g", max_length=4))):
        write_tokens(parts / Share(n, 3).name, own, tokenise)
    refuses(lambda: made(out, path), "00003-of-00003: holds tokens of 'words' with max_length 4")
    shutil.rmtree(parts / "00003-of-00003/tokens")
    refuses(lambda: made(out, path), "holds no tokens", "one tokenizer")
    write_tokens(parts / "00003-of-00003", engine(), tokenise)
    made(out, path)
    folder = store_folder(out, "a")
    assert Store(folder).tokenised["origin"] == engine()
    refuses(
        lambda: write_tokens(folder, engine(fingerprint="g"), tokenise), "its parts hold tokens of"
    )


@pytest.mark.parametrize("shorter", [0, 1])  # tokens as many as before, and fewer
def test_parts_that_are_tokenised_again_after_they_were_joined(three, shorter):
    path, out, parts = three
    made(out, path, "3/3")
    folder, everything = store_folder(out, "a"), range(60)

    def other(texts):
        ids, lengths, truncated = tokenise([text[: -shorter or None] for text in texts])
        return (ids + 1, lengths, truncated)

    def tokenise_parts(own, encode):
        for n in (1, 2, 3):
            shutil.rmtree(parts / Share(n, 3).name / "tokens", ignore_errors=True)
            write_tokens(parts / Share(n, 3).name, own, encode)

    tokenise_parts(engine(), tokenise)
    made(out, path)
    before = Store(folder).tokens(everything)
    tokenise_parts(engine(fingerprint="g"), other)
    for look in (
        lambda: Store(folder).tokenised,
        lambda: Store(folder).tokens([0]),
        lambda: verify(folder),
    ):
        words = "run the command that joined the parts once more"
        refuses(look, "00001-of-00003/tokens: was written again after", words)
    assert Store(folder).rows([0]) == [("question 0", "answer 0")]  # the texts are not affected
    made(out, path)
    assert Store(folder).tokenised["origin"] == engine(fingerprint="g")
    assert Store(folder).tokens(everything) != before
    verify(folder)
    shutil.move(out, out.with_name("moved"))
    verify(store_folder(out.with_name("moved"), "a"))


def test_tokens_are_joined_where_a_link_leads(three, tmp_path):
    path, out, parts = three
    made(out, path, "3/3")
    for n in (1, 2, 3):
        write_tokens(parts / Share(n, 3).name, engine(), tokenise)
    (tmp_path / "deep/er").mkdir(parents=True)
    link = store_folder(tmp_path / "deep/er", "a")
    link.symlink_to(store_folder(out, "a"))
    made(tmp_path / "deep/er", path)
    assert len(Store(link).tokens(range(60))) == 60
    verify(link)


def test_tokens_of_a_store_whose_parts_have_none(three):
    path, out, parts = three
    made(out, path, "3/3")
    made(out, path)
    write_tokens(store_folder(out, "a"), engine(), tokenise)
    assert len(Store(store_folder(out, "a")).tokens([0, 59])) == 2
    verify(store_folder(out, "a"))


def test_a_part_that_changes_after_it_was_joined(three):
    path, out, parts = three
    made(out, path, "3/3")
    made(out, path)
    folder = store_folder(out, "a")
    shard = parts / "00002-of-00003/shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    Store(folder)  # sizes are compared, bytes are not
    refuses(lambda: verify(folder), "00002-of-00003/shard-00000.arrow: has another digest")
    entry = [{"name": "a", "path_or_hub_id": path}]
    refuses(lambda: prepare(entry, out, progress=False, verify=True), "another digest")
    with pytest.warns(UserWarning, match="written anew"):
        prepare(entry, out, progress=False, verify=True, part="2/3")
    verify(folder)
    shutil.rmtree(parts / "00002-of-00003")
    refuses(lambda: Store(folder), "00002-of-00003: no summary.json")
    made(out, write_rows(path, pairs(70)), "2/3")
    refuses(lambda: Store(folder), "was written again after")


# ---- parts of vectors ----

TEXTS = [f"line {i} " + "." * (i % 9) for i in range(500)]
IDS = [f"id {i}" for i in range(500)]


def embed(texts):
    return np.array([[len(t), sum(t.encode()), 1] for t in texts], np.float32)


def other(texts):
    return embed(texts) + 1


def vectors(path, part=None, encoder=embed, texts=TEXTS, **options):
    options = {"window": 32, "progress": False, "part": part} | options
    return write_embeddings(path, encoder, texts, **options)


@pytest.mark.parametrize("name", ["v.npy", "v.arrow", "v.parquet"])
def test_four_parts_in_four_processes_are_the_undivided_vectors(tmp_path, name):
    ids = {"ids": IDS} if name != "v.npy" else {}
    whole = vectors(tmp_path / f"whole-{name}", **ids)
    all_parts(lambda part: vectors(tmp_path / name, part, **ids), 4)
    card = vectors(tmp_path / name, **ids)
    described = ("bytes", "xxh3")
    assert {k: v for k, v in whole.items() if k not in described} == {
        k: v for k, v in card.items() if k != "parts"
    }
    one, four = open_embeddings(tmp_path / f"whole-{name}"), open_embeddings(tmp_path / name)
    assert one.shape == four.shape and one.dtype == four.dtype and four.ndim == 2
    assert np.asarray(four).tobytes() == np.asarray(one).tobytes()
    for rows in (slice(3, 400, 7), [0, 499, -1], 255, np.arange(500) % 2 == 0, []):
        assert (four[rows] == one[rows]).all()
    with pytest.raises(IndexError, match="of 500"):
        four[[500]]
    assert (np.concatenate(list(embedding_blocks(tmp_path / name))) == one).all()
    assert list(same_texts(tmp_path / name, TEXTS)) == TEXTS
    assert encoding.verify(tmp_path / name) == card
    if name.endswith(".parquet"):  # ids and row numbers go on from part to part
        files = sorted(parts_folder(tmp_path / name).glob("*.parquet"))
        joined = pa.concat_tables(map(pq.read_table, files)).to_pylist()
        assert joined == pq.read_table(tmp_path / f"whole-{name}").to_pylist()


def test_more_parts_than_windows(tmp_path):
    for n in range(20, 0, -1):
        vectors(tmp_path / "v.npy", (n, 20))
    card = vectors(tmp_path / "v.npy")
    assert [part["rows"] for part in card["parts"]].count(0) == 4 and card["rows"] == 500
    assert (np.asarray(open_embeddings(tmp_path / "v.npy")) == embed(TEXTS)).all()


def test_an_index_is_built_of_joined_vectors(tmp_path):
    from contrastive_st.index import Corpus, build_index

    texts = [{"id": i, "text": t} for i, t in zip(IDS, TEXTS)]
    corpus = Corpus(write_rows(tmp_path / "c.jsonl", texts))
    for n in (1, 2):
        vectors(tmp_path / "v.npy", (n, 2))
    vectors(tmp_path / "v.npy")
    built = build_index(tmp_path / "i", embed, corpus, vectors=tmp_path / "v.npy", progress=False)
    assert (np.asarray(built.vectors) == embed(TEXTS)).all()


def test_a_killed_part_goes_on(tmp_path):
    def dying(texts):
        raise KeyboardInterrupt

    vectors(tmp_path / "v.npy", "1/2")
    half = iter([embed] * 3 + [dying])
    with pytest.raises(KeyboardInterrupt):
        vectors(tmp_path / "v.npy", "2/2", lambda texts: next(half)(texts))
    refuses(lambda: vectors(tmp_path / "v.npy"), "part 2/2 is missing")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"encoder": other}, ["another encoder or other options (function)"]),
        ({"precision": "float16"}, ["precision"]),
        ({"texts": [*TEXTS[:-1], "another"]}, ["other texts"]),
        ({"texts": TEXTS[:400]}, ["other texts"]),
    ],
)
def test_parts_of_other_vectors(tmp_path, change, words):
    for n in (1, 3):
        vectors(tmp_path / "v.npy", (n, 3))
    refuses(lambda: vectors(tmp_path / "v.npy"), "part 2/3 is missing")
    refuses(lambda: vectors(tmp_path / "v.npy", "2/4"), "holds parts of 3 and of 4")
    vectors(tmp_path / "v.npy", "2/3", **change)
    refuses(lambda: vectors(tmp_path / "v.npy"), "00002-of-00003.npy: ", *words)
    # and all parts alike, but not what is asked for
    shutil.rmtree(parts_folder(tmp_path / "v.npy"))
    for n in (1, 2, 3):
        vectors(tmp_path / "v.npy", (n, 3))
    refuses(lambda: vectors(tmp_path / "v.npy", **change), "v.npy")
    assert not (tmp_path / "v.npy.json").exists()


def test_texts_and_precisions_that_cannot_be_divided(tmp_path):
    path = tmp_path / "v.npy"
    refuses(lambda: vectors(path, "1/2", texts=iter(TEXTS)), "texts is an iterator", "twice")
    refuses(lambda: vectors(path, "1/2", precision="int8"), "ranges of int8", "float16")
    refuses(lambda: vectors(path, "3/2"), "write for example 3/64")
    vectors(path)
    refuses(lambda: vectors(path, "1/2"), "is there already as a whole")


def test_int8_with_ranges(tmp_path):
    ranges = np.array([[0, 0, 0], [99, 9999, 2]], np.float32)
    options = {"precision": "int8", "ranges": ranges}
    vectors(tmp_path / "one.npy", **options)
    for n in (1, 2):
        vectors(tmp_path / "v.npy", (n, 2), **options)
    vectors(tmp_path / "v.npy", precision="int8")
    assert (np.load(tmp_path / "one.npy") == np.asarray(open_embeddings(tmp_path / "v.npy"))).all()


def test_a_resumed_part_of_other_texts(tmp_path):
    vectors(tmp_path / "v.npy", "1/2")
    vectors(tmp_path / "v.npy", "1/2", resume=True)
    more = [*TEXTS, "one more"]  # the first window ends where it did, and the whole is another
    refuses(lambda: vectors(tmp_path / "v.npy", "1/2", texts=more, resume=True), "other texts")


def test_a_part_of_vectors_that_changes_after_it_was_joined(tmp_path):
    for n in (1, 2):
        vectors(tmp_path / "v.npy", (n, 2))
    vectors(tmp_path / "v.npy")
    part = parts_folder(tmp_path / "v.npy") / "00001-of-00002.npy"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    refuses(lambda: encoding.verify(tmp_path / "v.npy"), "00001-of-00002.npy: xxh3 is")
    part.unlink()
    refuses(lambda: open_embeddings(tmp_path / "v.npy"), "00001-of-00002.npy")
    vectors(tmp_path / "v.npy", "1/2", encoder=other)
    refuses(lambda: open_embeddings(tmp_path / "v.npy"), "was written again after")


# ---- a training on two machines, one of which is killed ----

# What it imports is here already, in the process that all others are forked from.
JOB = """
import os, signal
import torch
from transformers import TrainerCallback
from test_trainer import config, make_encoder, make_mixture
from contrastive_st.trainer import train

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.set_num_threads(1)


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if rank == 1 and not restarts and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


# after the restart the first run is there, and the second one is resumed
for name, callbacks in (("undisturbed", []), ("killed", [Dies()])):
    out = os.path.join({out!r}, name)
    options = dict(resume=True, callbacks=callbacks, progress="none")
    train(make_encoder(dropout=0.1), make_mixture(), config(8, save_every=2), out, **options)
    with open(os.path.join({out!r}, f"{{name}}-{{rank}}-{{restarts}}"), "w"):
        pass
"""


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def torchrun(words, log, env):
    "An agent of torchrun, and below it its workers, forked from this process: nothing is imported."
    if node := os.fork():
        return node
    code = 1
    try:
        os.setsid()  # one group of processes, so that all can be ended
        sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        os.environ.update(env)
        main(words)
        code = 0
    finally:
        os._exit(code)


def ends_of(nodes, seconds):
    "The exit codes of agents; those that take too long are killed."
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(nodes) and time.monotonic() < end:
        for node in {*nodes} - {*codes}:
            pid, status = os.waitpid(node, os.WNOHANG)
            if pid:
                codes[node] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for node in {*nodes} - {*codes}:
        os.killpg(node, signal.SIGKILL)
        os.waitpid(node, 0)
    return [codes.get(node, "too late") for node in nodes]


def losses(folder):
    history = json.loads((folder / "history.json").read_text())
    return [line["loss"] for line in history if "loss" in line]


def two_agents(folder):
    "Run the job on two agents, and write how they ended; this process has no other threads."
    (folder / "job.py").write_text(JOB.format(out=str(folder)))
    words = [
        *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "job"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
        *("--local-addr", "127.0.0.1", "--monitor-interval", "0.1"),
        *("--start-method", "fork", "--run-path", str(folder / "job.py")),
    ]
    # as the page on several machines says; the other two are for a test on one machine
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [torchrun(words, folder / f"log-{n}", env) for n in (1, 2)]
    (folder / "codes.json").write_text(json.dumps(ends_of(nodes, 120)))


def test_a_killed_worker_is_started_again_and_resumes_to_the_same_weights(tmp_path):
    "Two agents of torchrun on loopback, as on two machines."
    run_itself(__file__, tmp_path)
    codes = json.loads((tmp_path / "codes.json").read_text())
    logs = [tmp_path / f"log-{n}" for n in (1, 2)]
    said = "".join(log.read_text(encoding="utf-8") for log in logs)
    assert codes == [0, 0], said[-5000:]
    ends = {path.name for path in tmp_path.glob("killed-*")}
    assert ends == {"killed-0-1", "killed-1-1"}, said[-5000:]
    assert "resuming from checkpoint-4, the newest one" in said
    one, other = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("undisturbed", "killed")
    )
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "killed")
    assert len(losses(tmp_path / "killed")) == 8


def hold(out, seconds):
    with lock(out):
        (out.parent / "held").touch()
        time.sleep(seconds)


@pytest.mark.parametrize("under_torchrun, resume", [(True, True), (True, False), (False, True)])
def test_a_restarted_run_waits_for_the_lock_of_a_dying_process(
    tmp_path, monkeypatch, capsys, under_torchrun, resume
):
    "A file server gives a killed machine's lock away late; only a resumed run of torchrun waits."
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    (tmp_path / "run").mkdir()
    other = in_process(hold, tmp_path / "run", 0.4)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    if under_torchrun and resume:
        run.claim(tmp_path / "run", resume=True, make=False)
        assert "is writing it" in capsys.readouterr().err
    else:
        refuses(lambda: run.claim(tmp_path / "run", resume, make=False), "is writing it")
    other.join()


def test_a_lock_that_is_never_given_away(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    other = in_process(hold, tmp_path / "run", 3)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    refuses(lambda: run.claim(tmp_path / "run", resume=True, make=False), "is writing it")
    other.kill()
    other.join()


# ---- files at an address ----


@pytest.fixture
def desk():
    "A folder that lies in no file system of this machine."
    memory = fsspec.filesystem("memory")
    yield lambda name, content: memory.pipe(f"/desk/{name}", content)
    if memory.exists("/desk"):
        memory.rm("/desk", recursive=True)


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.txt"])
def test_files_at_an_address_are_read_like_others(tmp_path, desk, name):
    rows = pairs(20)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        text = lines_of(rows).decode()
        if name == "a.csv":
            text = "anchor,positive\n" + "".join(f"{r['anchor']},{r['positive']}\n" for r in rows)
        (tmp_path / name).write_bytes(text.encode())
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    desk(name, (tmp_path / name).read_bytes())
    address = f"memory://desk/{name}"
    reader = read_texts if name == "a.txt" else read_rows
    assert list(reader(address)) == list(reader(tmp_path / name))
    assert list(reader(Path(address))) == list(reader(f"file://{tmp_path / name}"))
    assert count_lines(address) == count_lines(tmp_path / name)
    if name != "a.txt":
        source = load_source(address, cache_dir=tmp_path / "cache")
        assert source.name == name and source.rows([3]) == [("question 3", "answer 3")]


def test_a_changed_file_at_an_address_is_read_again(tmp_path, desk):
    desk("a.jsonl", lines_of(pairs(20)))
    address, out = "memory://desk/a.jsonl", tmp_path / "out"
    assert made(out, address).written == ("a",) and made(out, address).written == ()
    time.sleep(0.01)
    desk("a.jsonl", lines_of([*pairs(19), {"anchor": "question 9", "positive": "answer 7"}]))
    assert made(out, address).written == ("a",)


def test_parts_and_vectors_of_an_address(tmp_path, desk):
    desk("a.jsonl", lines_of(pairs(20)))
    for n in (1, 2):
        made(tmp_path / "out", "memory://desk/a.jsonl", (n, 2))
    assert made(tmp_path / "out", "memory://desk/a.jsonl")["a"]["rows"] == 20


def test_a_mixture_of_addresses(tmp_path, desk):
    desk("a.jsonl", lines_of(pairs(20)))
    config = [{"name": "memory://desk/a.jsonl", "weight": 1}]
    (entry,) = read_config(config, tmp_path)
    assert entry.path == "memory://desk/a.jsonl"
    mixture = Mixture.from_config(config, tmp_path, batch_size=4, cache_dir=tmp_path / "cache")
    assert len(mixture.batch(0).examples) == 4


@pytest.mark.parametrize(
    "address, words",
    [
        ("memory://desk/none.jsonl", ["none.jsonl: no such file; check the address"]),
        ("memory://desk", ["memory://desk is a folder"]),
        ("tape://desk/a.jsonl", ["tape://desk/a.jsonl: cannot be read", "tape"]),
        ("memory://desk/a.doc", ["a.doc: cannot read this kind of file", ".jsonl"]),
        ("s3://desk/a.jsonl", ["s3://desk/a.jsonl: ", "s3fs"]),
    ],
)
def test_an_address_that_cannot_be_read(desk, address, words):
    if address.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed here")
    desk("a.jsonl", b"x")
    desk("a.doc", b"x")
    refuses(lambda: list(read_rows(address)), *words)


def test_a_bad_line_at_an_address_is_named(desk):
    desk("a.jsonl", b'["a", "b"]\nnone\n')
    refuses(lambda: list(read_rows("memory://desk/a.jsonl")), "memory://desk/a.jsonl:2: not JSON")
    desk("b.jsonl.gz", gzip.compress(lines_of(pairs(99)))[:60])
    refuses(lambda: list(read_rows("memory://desk/b.jsonl.gz")), "b.jsonl.gz:1: the gzip data is")


@pytest.mark.parametrize("words", ["prepare none.json --out x", "encode model none.txt"])
def test_a_part_is_checked_before_anything_else(words):
    result = CliRunner().invoke(app, [*words.split(), "--part", "5/4"])
    assert "part is '5/4'; write for example 3/64" in str(result.exception)


def test_standard_input_has_no_parts(monkeypatch):
    monkeypatch.setattr("contrastive_st.cli.check_model", lambda model: None)
    result = CliRunner().invoke(app, "encode model - --out v.npy --part 1/2".split())
    assert "standard input cannot be read twice" in str(result.exception)


if __name__ == "__main__":
    two_agents(Path(sys.argv[1]))
