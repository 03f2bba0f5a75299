"""Reading: every accepted form, every refusal with file and line, the Arrow store, real data."""

import gzip
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from test_files import GOOD, put, refuses

from contrastive_st import data, store
from contrastive_st.data import (
    Source,
    load_source,
    quickstart_folder,
    read_examples,
    read_retrieval,
    read_sts,
)

REAL = Path(os.environ.get("CONTRASTIVE_ST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the shared data is not here; set CONTRASTIVE_ST_DATA to its folder"
)

pytestmark = pytest.mark.usefixtures("quick_disk")


def read(path, **kwargs):
    return list(read_examples(path, **kwargs))


def stores(cache: Path) -> list[str]:
    "What lies in a cache folder, locks left out."
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


# ---- accepted forms


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", GOOD),
        ("a.jsonl.gz", GOOD),
        ("a.jsonl", [{"texts": row} for row in GOOD]),
        ("a.jsonl", [{"query": a, "pos": p} for a, p in GOOD]),
        ("a.jsonl", [{"query": a, "pos": [p], "neg": []} for a, p in GOOD]),
        ("a.jsonl", [{"positive": p, "id": 3, "anchor": a} for a, p in GOOD]),
        ("a.json", json.dumps(GOOD)),
        ("a.json", json.dumps([{"question": a, "answer": p} for a, p in GOOD], indent=2)),
        ("a.json.gz", json.dumps(GOOD)),
        ("a.tsv", "sentence1\tsentence2\n" + "".join(f"{a}\t{p}\n" for a, p in GOOD)),
        ("a.tsv.gz", "premise\thypothesis\n" + "".join(f"{a}\t{p}\n" for a, p in GOOD)),
        ("a.csv", "id,query,answer\n" + "".join(f'7,"{a}",{p}\n' for a, p in GOOD)),
    ],
)
def test_forms(tmp_path, name, content):
    assert read(put(tmp_path / name, content)) == GOOD


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(
            {"id": [1, 2, 3], "question": [a for a, _ in GOOD], "answer": [p for _, p in GOOD]}
        ),
        path,
    )
    assert read(path) == GOOD
    assert read(path, columns=("answer", "question")) == [(p, a) for a, p in GOOD]
    refuses(lambda: read(path, columns=("answer", "nothing")), path, "no column 'nothing'")
    pq.write_table(pa.table({"texts": [list(row) for row in GOOD]}), path)
    assert read(path) == GOOD
    pq.write_table(pa.table({"anchor": ["a", None], "positive": ["b", "c"]}), path)
    refuses(lambda: read(path), f"{path}:2", "text 1 is null")
    path.write_bytes(b"no parquet")
    refuses(lambda: read(path), path, "not a Parquet file")


def test_one_example_per_positive(tmp_path):
    path = put(
        tmp_path / "a.jsonl",
        [
            {"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]},
            {"query": "s", "pos": "t", "neg": ["u", "v"]},
        ],
    )
    assert read(path) == [("q", "p", "n", "m"), ("q", "r", "n", "m"), ("s", "t", "u", "v")]
    path = put(tmp_path / "c.jsonl", [{"query": "q", "pos": [], "neg": ["n"]}])
    refuses(lambda: read(path), f"{path}:1", "list of positives is empty")


def test_numbered_negatives_are_in_numeric_order(tmp_path):
    row = {
        "negative_10": "n10",
        "negative_2": "n2",
        "anchor": "a",
        "positive": "p",
        "negative": "n1",
    }
    assert read(put(tmp_path / "a.jsonl", [row])) == [("a", "p", "n1", "n2", "n10")]


def test_columns(tmp_path):
    path = put(tmp_path / "a.tsv", "1\tp\ta\n2\tq\tb\n")
    assert read(path, columns=(2, 1)) == [("a", "p"), ("b", "q")]
    path = put(tmp_path / "a.jsonl", [["a", "p", "n"]])
    assert read(path, columns=(0, 2)) == [("a", "n")]
    refuses(lambda: read(path, columns=(0, 3)), f"{path}:1", "does not fit a list of 3")
    refuses(lambda: read(path, columns=("a", "p")), f"{path}:1", "positions")
    for columns in ("anchor", (0,), (0, "positive")):
        refuses(partial(read, path, columns=columns), "columns=")


def test_judged_pairs_are_refused_unless_named(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"premise": "A tug.", "hypothesis": "A boat.", "label": 2}])
    refuses(lambda: read(path), f"{path}:1", "'label' judges the pairs", "columns=")
    assert read(path, columns=("premise", "hypothesis")) == [("A tug.", "A boat.")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", [{"set": {"query": a, "pos": [p], "neg": []}} for a, p in GOOD]),
        ("a.jsonl", [{"set": {"texts": row}} for row in GOOD]),
        ("a.jsonl", [{"anchor": a, "positive": p, "negative": None} for a, p in GOOD]),
        ("a.jsonl", [{"Anchor": a, " positive ": p} for a, p in GOOD]),
        ("a.csv", "anchor;positive\n" + "".join(f'"{a}";{p}\n' for a, p in GOOD)),
        ("a.csv", "id;ANCHOR; Positive\n" + "".join(f"7;{a};{p}\n" for a, p in GOOD)),
        ("a.tsv", "Question\t Answer\n" + "".join(f"{a}\t{p}\n" for a, p in GOOD)),
    ],
)
def test_spellings_that_are_unambiguous(tmp_path, name, content):
    assert read(put(tmp_path / name, content)) == [(a.strip(), p.strip()) for a, p in GOOD]


def test_columns_asked_for_in_other_spellings(tmp_path):
    path = put(tmp_path / "a.csv", "Frage;Antwort\nIst es neblig?;Nein.\n")
    assert (
        read(path, columns=("frage", "antwort"))
        == read(path, columns=("Frage", "Antwort"))
        == [("Ist es neblig?", "Nein.")]
    )
    assert read(path, columns=(0, 1))[1] == ("Ist es neblig?", "Nein.")
    refuses(
        lambda: read(put(tmp_path / "a.tsv", "Frage;Antwort\nIst es neblig?;Nein.\n")),
        "a.tsv:1: ",
        "no known pair of columns",
        "columns=(0, 1)",
        "separated by ';'",
    )
    refuses(
        lambda: read(put(tmp_path / "b.csv", "Anchor,ANCHOR,positive\na,b,c\n")),
        "2 column 'anchor' among",
    )
    # its very name wins
    assert read(put(tmp_path / "c.csv", "Anchor,anchor,positive\na,b,c\n")) == [("b", "c")]


def test_a_set_is_read_as_a_ring(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"set": ["a", "b", "c"]}, {"set": ["d", "e"]}])
    assert read(path) == [("a", "b"), ("b", "c"), ("c", "a"), ("d", "e"), ("e", "d")]


def test_negatives_of_any_number(tmp_path):
    mined = [
        {"query": "q1", "pos": ["p1"], "neg": []},
        {"query": "q2", "pos": ["p2"], "neg": ["n", "m"]},
        {"query": "q3", "pos": ["p3"], "neg": ["k"]},
        {"query": "q4", "pos": ["p4"], "neg": ["1", "2", "3"]},
    ]
    expected = [
        ("q1", "p1", "p1", "p1"),
        ("q2", "p2", "n", "m"),
        ("q3", "p3", "k", "k"),
        ("q4", "p4", "1", "2"),
    ]
    path = put(tmp_path / "a.jsonl", mined)
    for on_error in ("raise", "skip"):
        with pytest.warns(
            UserWarning, match="1 had more and were cut, 1 had fewer and repeat theirs, 1 had none"
        ):
            assert read(path, on_error=on_error) == expected
    with pytest.warns(UserWarning):
        assert read(path, negatives=3)[3] == ("q4", "p4", "1", "2", "3")
        assert {len(row) for row in read(path, negatives=0)} == {2}
    with pytest.warns(UserWarning, match="of the rows, which have 2 negatives each"):
        assert list(load_source(path, cache_dir=tmp_path / "cache")) == expected
    lists = put(tmp_path / "b.jsonl", [("a", "b"), ("c", "d", "e"), ("f", "g", "h", "i")])
    with pytest.warns(UserWarning):
        assert read(lists) == [("a", "b", "b"), ("c", "d", "e"), ("f", "g", "h")]
    late = put(tmp_path / "c.jsonl", [*([f"a{i}", f"b{i}"] for i in range(1500)), ("c", "d", "e")])
    # a stream has given pairs already
    refuses(lambda: read(late), f"{late}:1501: the first row with negatives", "negatives=1")
    with pytest.warns(UserWarning, match="1,500 had none"):
        assert read(late, negatives=1)[-1] == ("c", "d", "e")
        assert len(load_source(late, cache_dir=tmp_path / "cache").columns) == 3
    for wrong in (-1, True, "2", 1.5):
        refuses(partial(read, late, negatives=wrong), "negatives is")


# ---- refused files


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("a.tsv", b"x" * 5_000_000 + b"\n", "no known pair of columns among xxx"),
        ("a.tsv", b"x\t" * 500_000 + b"\n", "and 499,993 more"),
        ("a.csv", b"x" * 5_000_000 + b"\n", "no known pair"),
        ("a.jsonl", b'"' + b"x" * 5_000_000 + b'"', "expected a list of texts"),
        ("a.jsonl", b'{"' + b"x" * 5_000_000 + b'": 1}', "no known pair"),
        ("a.jsonl", b'["a", ' + b"[" * 900 + b"]" * 900 + b"]", "not a string"),
        ("a.jsonl", b'["a", ' + b"9" * 400 + b"]", "not a string"),
        ("a.jsonl", b'["a", "b\x1b[31m' + b"x" * 5_000_000, "not JSON"),
        ("a.json", b"[" * 200_000, "not JSON"),
        ("a.json", b"[[" + b'"x",' * 2 + b"[" * 900 + b"]" * 900 + b"]]", "not a string"),
        (
            "a.tsv",
            b"anchor\tpositive\n" + b"y\t" * 500_000 + b"\n",
            "500001 cells where the header has 2",
        ),
    ],
)
def test_nothing_is_quoted_whole(tmp_path, name, raw, said):
    path = put(tmp_path / name, raw)
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError) as caught:
            read(path, on_error=on_error)
        text = str(caught.value)
        assert said in text and str(path) in text and len(text) < 700 + 2 * len(str(path))
        assert all(c.isprintable() or c == "\n" for c in text)


def test_what_is_no_regular_file(tmp_path):
    from contrastive_st.mixture import read_config

    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    os.symlink("/dev/null", tmp_path / "null.tsv")
    (tmp_path / "search" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        os.symlink("/dev/zero", tmp_path / "search" / name)
    for path in (tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl", tmp_path / "null.tsv"):
        for call in (
            read_examples,
            read_sts,
            lambda p: load_source(p, cache_dir=tmp_path / "cache"),
            lambda p: read_config(p, tmp_path),
        ):
            refuses(
                partial(call, path),
                path,
                "is a pipe, a socket or a device",
                "copy its content to a file",
            )
    refuses(
        lambda: read_retrieval(tmp_path / "search"),
        tmp_path / "search" / "corpus.jsonl",
        "is a pipe, a socket or a device",
    )


def test_missing_folder_unknown_kind(tmp_path):
    # at once, not at the first row
    refuses(
        lambda: read_examples(tmp_path / "no.jsonl"), tmp_path / "no.jsonl", "no such file", "check"
    )
    refuses(lambda: load_source(tmp_path / "no.jsonl"), "no such file")
    refuses(lambda: load_source(str(tmp_path / "no")), "no such file")
    refuses(lambda: read_examples(tmp_path), "is a folder")
    refuses(lambda: read_examples(put(tmp_path / "a.docx", "x")), "a.docx", "must end in .jsonl")


BAD_ROWS = {
    "broken UTF-8": (b'["caf\xe9", "b"]', "not UTF-8"),
    "not JSON": (b"['a', 'b']", "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "a number": (b"7", "expected a list"),
    "a string": (b'"no"', "expected a list"),
    "list of one": (b'["a"]', "a list of 1"),
    "empty list": (b"[]", "a list of 0"),
    "a set of one": (b'{"set": ["a"]}', "a set of 1"),
    "a set of numbers": (b'{"set": [1, 2]}', "text 1 is 1, not a string"),
    "number for text": (b'["a", 3]', "text 2 is 3, not a string"),
    "null for text": (b'[null, "b"]', "text 1 is null, not a string"),
    "list for text": (b'["a", ["b"]]', "not a string"),
    "empty text": (b'["a", ""]', "text 2 is empty"),
    "white text": (b'[" \\t\\u00a0", "b"]', "text 1 is empty"),
    "half a character": (b'["a", "\\ud83d"]', "text 2 holds half a character"),
    "unknown names": (b'{"x": "a", "y": "b", "z": "c"}', "no known pair of columns among x, y, z"),
    "texts is no list": (b'{"texts": "ab"}', "expected a list"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_names_its_line_and_can_be_skipped(tmp_path, kind):
    raw, problem = BAD_ROWS[kind]
    path = put(
        tmp_path / "a.jsonl.gz",
        b'["Is it foggy?", "No."]\n\n' + raw + b'\n["Who calls?", "The tug."]\n',
    )
    refuses(lambda: read(path), f"{path}:3: ", problem, "on_error='skip'")
    refuses(lambda: load_source(path, cache_dir=tmp_path / "cache"), f"{path}:3: ", problem)
    assert not stores(tmp_path / "cache")  # neither half a store nor a temporary file
    with pytest.warns(UserWarning, match="2 rows kept, 1 bad rows skipped") as caught:
        assert read(path, on_error="skip") == [("Is it foggy?", "No."), ("Who calls?", "The tug.")]
    assert "line 3: " in str(caught[0].message) and problem in str(caught[0].message)


def test_skipping_is_reported_by_the_store_every_time(tmp_path):
    path = put(tmp_path / "a.jsonl", [*GOOD, ["a"], ["b"], ["c"], ["d"]])
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 rows kept, 4 bad rows skipped") as caught:
            assert len(load_source(path, cache_dir=tmp_path / "cache", on_error="skip")) == 3
        assert "line 6" in str(caught[0].message) and "line 7" not in str(caught[0].message)
    # the tolerant store does not serve a strict reader
    refuses(lambda: load_source(path, cache_dir=tmp_path / "cache"), f"{path}:4")
    refuses(
        lambda: read(put(tmp_path / "b.jsonl", [["a"]]), on_error="skip"),
        "no example in this file",
        "1 bad rows skipped",
    )
    refuses(lambda: read_examples(path, on_error="ignore"), "on_error is 'ignore'")


def test_good_file_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_source(put(tmp_path / "a.jsonl", GOOD), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.tsv", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if not name.endswith("gz") else content and gzip.compress(content))
    refuses(lambda: read(path), path, "no example in this file")
    refuses(
        lambda: load_source(path, cache_dir=tmp_path / "cache"), path, "no example in this file"
    )


def test_table_errors(tmp_path):
    path = put(tmp_path / "b.tsv", "Is it foggy?\tNo.\n")
    refuses(lambda: read(path), f"{path}:1: ", "line 1 must name the columns", "columns=(0, 1)")
    path = put(tmp_path / "c.tsv", "anchor\tpositive\n\t\n")
    # a line of tabs is a row, not a blank line
    refuses(lambda: read(path), f"{path}:2: ", "text 1 is empty")
    path = put(tmp_path / "e.csv", "anchor,positive,positive\na,b,c\n")
    refuses(lambda: read(path), f"{path}:1: ", "2 column 'positive'")
    path = put(tmp_path / "f.csv", b"anchor,positive\nc\xff,d\ne,f\ng,\n")
    with pytest.warns(UserWarning, match="line 2: .*\n  line 4: "):
        assert read(path, on_error="skip") == [("e", "f")]


# ---- nothing to contrast


@pytest.mark.parametrize(
    "rows, what",
    [
        ([("a", "b")] * 3, "the same texts"),
        ([("a", "b")], "the same texts"),
        ([("a", "b", "c")] * 2, "the same texts"),
        ([("a", "b"), ("a", "c")], "the same anchor"),
        ([("a", "b"), ("c", "b")], "the same positive"),
    ],
)
def test_no_negatives(tmp_path, rows, what):
    path = put(tmp_path / "a.jsonl", rows)
    refuses(
        lambda: load_source(path, cache_dir=tmp_path / "cache"),
        path,
        f"every row has {what}",
        "no negatives to learn from",
    )
    columns = dict(zip(("anchor", "positive", "negative"), map(list, zip(*rows))))
    refuses(
        lambda: Source(datasets.Dataset.from_dict(columns), "mine"),
        "mine",
        f"every row has {what}",
        "no negatives to learn from",
    )
    assert read(path) == rows  # reading alone has no opinion


def test_hard_negatives_are_negatives(tmp_path):
    result = load_source(
        put(tmp_path / "a.jsonl", [("a", "b", "c"), ("a", "b", "d")]), cache_dir=tmp_path / "cache"
    )
    assert len(result) == 2


# ---- the store and Source


def test_source(tmp_path):
    # several Arrow batches
    rows = [(f"anchor {i}", f"positive {i}", f"first {i}", f"second {i}") for i in range(40_000)]
    source = load_source(put(tmp_path / "a.jsonl.gz", rows), cache_dir=tmp_path / "cache")
    assert (source.name, source.columns, len(source)) == (
        "a.jsonl.gz",
        ("anchor", "positive", "negative", "negative_2"),
        40_000,
    )
    assert source[0] == rows[0] and source[-1] == rows[-1] and isinstance(source[0], tuple)
    assert source.rows([39_999, 0, 16_384, 0]) == [rows[39_999], rows[0], rows[16_384], rows[0]]
    assert source.rows([]) == []
    for i in (40_000, -40_001):
        with pytest.raises(IndexError):
            source[i]
    assert pickle.loads(pickle.dumps(source))[7] == rows[7]
    import numpy as np

    assert source[np.int64(3)] == rows[3] and source.rows(np.array([5, 2])) == [rows[5], rows[2]]
    assert (
        load_source(tmp_path / "a.jsonl.gz", name="mine", cache_dir=tmp_path / "cache").name
        == "mine"
    )


def test_store_is_reused_and_rebuilt_when_the_file_changes(tmp_path, monkeypatch):
    path, cache = put(tmp_path / "a.jsonl", GOOD), tmp_path / "cache"
    load_source(path, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_rows", lambda *args: pytest.fail("the store was built again"))
        assert list(load_source(path, cache_dir=cache)) == GOOD
    put(path, GOOD[:2])
    assert list(load_source(path, cache_dir=cache)) == GOOD[:2]
    put(path, [(p, a) for a, p in GOOD[:2]])  # the same size
    os.utime(path, ns=(1, 1))
    assert list(load_source(path, cache_dir=cache)) == [(p, a) for a, p in GOOD[:2]]
    assert len(stores(cache)) == 1
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert list(load_source(path, cache_dir=cache)) == [(p, a) for a, p in GOOD[:2]]
    # written anew
    assert (
        json.loads((cache / stores(cache)[0] / store.SUMMARY).read_text())["format"] == store.FORMAT
    )
    assert len(stores(cache)) == 1
    assert load_source(path, cache_dir=cache, columns=(1, 0))[0] == GOOD[0]
    assert len(stores(cache)) == 2  # other columns, another store


def test_equal_names_in_two_folders_do_not_meet(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        put(tmp_path / folder / "a.jsonl", [(f"{folder} {a}", p) for a, p in GOOD])
    one, two = (
        load_source(tmp_path / folder / "a.jsonl", cache_dir=tmp_path / "cache")
        for folder in ("one", "two")
    )
    assert one[0] != two[0]


def test_interrupted_build_leaves_no_store(tmp_path, monkeypatch):
    path = put(tmp_path / "a.jsonl", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(store.Part, "finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_source(path, cache_dir=tmp_path / "cache")
    assert [name for name in stores(tmp_path / "cache") if not name.endswith(".part")] == []
    assert len(load_source(path, cache_dir=tmp_path / "cache")) == 3
    assert len(stores(tmp_path / "cache")) == 1  # and the part became the store


def test_cache_folder_that_cannot_be_made(tmp_path):
    refuses(
        lambda: load_source(
            put(tmp_path / "a.jsonl", GOOD), cache_dir=tmp_path / "a.jsonl" / "cache"
        ),
        "cache_dir=",
    )


def test_memory_does_not_grow_with_rows(tmp_path):
    path = put(
        tmp_path / "a.jsonl",
        [(f"Is berth {i} free?", f"Berth {i} is taken. " * 20) for i in range(30_000)],
    )
    load_source(path, cache_dir=tmp_path / "cache")
    code = """if True:
        import sys, tracemalloc, pyarrow
        from contrastive_st.data import load_source
        tracemalloc.start()
        source = load_source(sys.argv[1], cache_dir=sys.argv[2])
        for i in range(0, len(source), 64): source.rows(range(i, min(i + 64, len(source))))
        print(tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes())"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < path.stat().st_size / 5


def test_source_from_a_dataset():
    snli = datasets.Dataset.from_dict(
        {
            "premise": ["a", "b", "c"],
            "hypothesis": ["d", "e", "f"],
            "label": [0, 2, 0],
            "id": [1, 2, 3],
        }
    )
    refuses(lambda: Source(snli, "snli"), "snli", "'label' judges the pairs")
    source = Source(
        snli.filter(lambda row: row["label"] == 0), "snli", columns=("premise", "hypothesis")
    )
    assert list(source) == [("a", "d"), ("c", "f")] and source.columns == ("anchor", "positive")
    # unsupervised SimCSE
    assert list(Source(snli, "same", columns=("premise", "premise")))[1] == ("b", "b")
    assert Source(snli.with_format("numpy"), "numpy", columns=("hypothesis", "premise"))[0] == (
        "d",
        "a",
    )


def test_source_refuses(tmp_path):
    make = datasets.Dataset.from_dict
    refuses(lambda: Source({"anchor": ["a"]}, "dict"), "dict row 0: no known pair of columns")
    refuses(lambda: Source({"anchor": ["a"], "positive": []}, "dict"), "dict: ", "of 0, 1 rows")
    refuses(lambda: Source({"anchor": 3, "positive": ["b"]}, "dict"), "dict: ", "equal length")
    refuses(lambda: Source({}, "dict"), "dict: no example")
    refuses(lambda: Source(iter("ab"), "it"), "it: a str_", "has no rows", "datasets.Dataset")
    refuses(
        lambda: Source(datasets.DatasetDict(train=make({"anchor": ["a"]})), "two"), "pass one split"
    )
    refuses(
        lambda: Source(make({"anchor": ["a", "b"], "positive": [1, 2]}), "x"),
        "x: column 'positive' holds int64, not texts",
    )
    refuses(
        lambda: Source(make({"anchor": ["a", "b"], "positive": [["a"], ["b"]]}), "x"),
        "x: column 'positive' holds",
        "not texts",
    )
    refuses(
        lambda: Source(make({"anchor": ["a", "b", "c"], "positive": ["d", "e", " \t"]}), "x"),
        "x row 2: column 'positive' is empty",
        "filter",
    )
    refuses(
        lambda: Source(make({"anchor": ["a", None], "positive": ["d", "e"]}), "x"),
        "x row 1: column 'anchor' is empty",
    )
    refuses(
        lambda: Source(make({"anchor": ["a"], "positive": ["d"]}).select([]), "x"), "x: no rows"
    )
    refuses(
        lambda: Source(make({"left": ["a"], "right": ["b"], "middle": ["c"]}), "x"),
        "x: no known pair of columns among left, right, middle",
        "for example columns=('left', 'right')",
    )


def test_source_from_rows_in_memory():
    frame = datasets.Dataset.from_dict(
        {"question": [a for a, _ in GOOD], "answer": [p for _, p in GOOD]}
    ).to_pandas()
    for given in (
        GOOD,
        tuple(GOOD),
        [list(row) for row in GOOD],
        [{"query": a, "pos": [p]} for a, p in GOOD],
        frame,
        frame.set_index(frame.index + 5),
    ):
        source = Source(given)
        assert list(source) == GOOD and source.columns == ("anchor", "positive")
        assert source.store is None and len(source) == 3
        assert source.identities([2, 0]).tolist() == [
            [store.text_identity(text) for text in GOOD[i]] for i in (2, 0)
        ]
        assert source.identities([]).shape == (0, 2)
        assert pickle.loads(pickle.dumps(source))[1] == GOOD[1]
    assert list(Source(frame, columns=("answer", "question")))[0] == GOOD[0][::-1]
    assert Source(GOOD, columns=(1, 0))[0] == GOOD[0][::-1]
    with pytest.warns(
        UserWarning, match="dataset: of the rows, which have 1 negative each, 1 had none"
    ):
        assert list(Source([*GOOD[:1], ("a", "b", "c")])) == [
            (*GOOD[0], GOOD[0][1]),
            ("a", "b", "c"),
        ]
    refuses(lambda: Source([*GOOD, ("a", " ")], "mine"), "mine row 3: text 2 is empty")
    refuses(lambda: Source([("a", 3)], "mine"), "mine row 0: text 2 is 3, not a string")
    refuses(lambda: Source([], "mine"), "mine: no example")
    refuses(lambda: Source([("a", "b")] * 2, "mine"), "every row has the same texts")
    frame.loc[1, "answer"] = None
    refuses(lambda: Source(frame, "mine"), "mine row 1: column 'answer' is empty")


@pytest.mark.parametrize(
    "name, call",
    [
        ("owner/name", ("owner/name",)),
        ("owner/name/pair", ("owner/name", "pair")),
        ("glue/stsb", ("nyu-mll/glue", "stsb")),
        ("snli", ("stanfordnlp/snli",)),
    ],
)
def test_hub_ids(monkeypatch, name, call):
    asked = []
    monkeypatch.setattr(
        data.datasets,
        "load_dataset",
        lambda *args, split: (
            asked.append((args, split))
            or datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
        ),
    )
    source = load_source(name, split="validation")
    assert asked == [(call, "validation")] and source.name == name and source[1] == ("b", "d")


def test_hub_out_of_reach_says_so(monkeypatch):
    def fail(*args, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(data.datasets, "load_dataset", fail)
    refuses(
        lambda: load_source("owner/name"),
        "owner/name: no such file",
        "hub",
        "no network",
        "pass a file",
    )


# ---- scored pairs

STS = "score\tsentence1\tsentence2\n"


def test_sts(tmp_path):
    sts = read_sts(
        put(
            tmp_path / "a.tsv",
            "\ufeff" + STS + '5.0\tA "tug.\tA boat.\r\n2.5\tFog.\tMist"\r\n0\tA.\tB.\r\n',
        )
    )
    assert sts == (['A "tug.', "Fog.", "A."], ["A boat.", 'Mist"', "B."], [1.0, 0.5, 0.0])
    assert sts._fields == ("sentence1", "sentence2", "scores")


def test_sts_split_column(tmp_path):
    path = put(
        tmp_path / "a.tsv.gz", "split\tscore\tsentence1\tsentence2\ntrain\t5\ta\tb\ntest\t4\tc\td\n"
    )
    assert read_sts(path).sentence1 == ["c"] and read_sts(path, "train").sentence1 == ["a"]
    refuses(lambda: read_sts(path, "dev"), path, "no rows of split 'dev'", "['test', 'train']")


@pytest.mark.parametrize(
    "rows, line, problem",
    [
        (STS + "5.0\ta\tb\n5.1\ta\tb\n", 3, "score '5.1' is not a number from 0 to 5"),
        (STS + "-0.1\ta\tb\n", 2, "score '-0.1'"),
        (STS + "nan\ta\tb\n", 2, "score 'nan'"),
        (STS + "\ta\tb\n", 2, "score ''"),
        (STS + "high\ta\tb\n", 2, "score 'high'"),
        (STS + "5.0\ta\tb\n5.0\ta\n", 3, "2 cells where the header has 3"),
        (STS + "5.0\ta\tb\tc\n", 2, "4 cells where the header has 3"),
        ("5.0\ta\tb\n4.0\tc\td\n", 1, "line 1 must name the columns"),
        (STS + "5.0\t \tb\n", 2, "text 1 is empty"),
    ],
)
def test_sts_refuses(tmp_path, rows, line, problem):
    path = put(tmp_path / "a.tsv", rows)
    refuses(lambda: read_sts(path), f"{path}:{line}: ", problem)


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"score": 10**400, "sentence1": "a", "sentence2": "b"}, "is not a number from 0 to 5"),
        ({"score": float("nan"), "sentence1": "a", "sentence2": "b"}, "score nan"),
        ({"score": float("inf"), "sentence1": "a", "sentence2": "b"}, "score inf"),
        ({"score": [1], "sentence1": "a", "sentence2": "b"}, "score [1]"),
        ({"score": None, "sentence1": "a", "sentence2": "b"}, "score None"),
        ({"score": True, "sentence1": "a", "sentence2": "b"}, "score True"),
        ({"score": 1, "sentence1": ["a"], "sentence2": "b"}, "text 1 is ['a'], not a string"),
        ({"score": 1, "sentence1": "a", "sentence2": None}, "text 2 is null"),
        ({"score": 1, "sentence1": "a", "sentence2": "b", "split": ["test"]}, "split is ['test']"),
        ({"score": 1, "sentence1": "a", "sentence2": "b", "split": 3}, "split is 3"),
        ([1, "a", "b"], "a row needs score, sentence1, sentence2"),
        ("x" * 5_000_000, "a row needs score, sentence1, sentence2"),
    ],
)
def test_sts_rows_of_wrong_types(tmp_path, row, problem):
    path = put(tmp_path / "a.jsonl", [{"score": 1, "sentence1": "a", "sentence2": "b"}, row])
    refuses(lambda: read_sts(path), f"{path}:2: ", problem)
    path.write_text('{"score": 1, "sentence1": "a", "sentence2": ' + "[" * 100_000)
    refuses(lambda: read_sts(path), f"{path}:1: ", "not JSON")


def test_sts_headers_in_other_spellings(tmp_path):
    assert read_sts(
        put(tmp_path / "a.csv", "Split;Score;Sentence1;Sentence2\ntest;5;a;b\ntrain;1;c;d\n")
    ) == (["a"], ["b"], [1.0])
    table = pa.table(
        {
            "split": ["test", "train"],
            "score": [5.0, 1.0],
            "sentence1": ["a", "c"],
            "sentence2": ["b", "d"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_sts(tmp_path / "a.parquet") == (["a"], ["b"], [1.0])


def test_sts_files_without_rows(tmp_path):
    refuses(lambda: read_sts(tmp_path / "no.tsv"), "no such file")
    refuses(lambda: read_sts(put(tmp_path / "a.tsv", STS)), "a.tsv", "the file is empty")
    refuses(
        lambda: read_sts(put(tmp_path / "a.jsonl", [{"score": 1, "sentence1": "a"}])),
        "a.jsonl:1",
        "a row needs score, sentence1, sentence2",
    )


def test_sts_hub(monkeypatch):
    table = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    sets = {
        "sentence-transformers/stsb": {**table, "score": [0.5, 1.0]},
        "nyu-mll/glue": {**table, "label": [2.5, 5.0], "idx": [0, 1]},
    }
    splits = []
    monkeypatch.setattr(
        data.datasets,
        "load_dataset",
        lambda name, *rest, split: splits.append(split) or datasets.Dataset.from_dict(sets[name]),
    )
    assert (
        read_sts("sentence-transformers/stsb", "dev")
        == read_sts("glue/stsb")
        == (["a", "b"], ["c", "d"], [0.5, 1.0])
    )
    assert splits == ["validation", "test"]
    sets["nyu-mll/glue"]["label"] = [-1.0, -1.0]  # as in the test split of GLUE
    refuses(lambda: read_sts("glue/stsb"), "glue/stsb row 0", "score -1.0", "hides its scores")


# ---- retrieval


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    put(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Fog", "text": "Ferries wait."},
            {"_id": "d2", "text": "No title."},
            {"_id": "d3", "title": "", "text": ""},
        ],
    )
    put(
        tmp_path / "queries.jsonl",
        [{"_id": "q1", "text": "fog?"}, {"_id": "q2", "text": "of another split"}],
    )
    put(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_retrieval(beir):
    corpus, queries, qrels = found = read_retrieval(beir)
    assert corpus == {"d1": "Fog Ferries wait.", "d2": "No title.", "d3": ""}
    assert queries == {"q1": "fog?"} and qrels == {"q1": {"d1": 2, "d2": 0}}
    put(beir / "corpus.jsonl.gz", (beir / "corpus.jsonl").read_bytes())
    (beir / "corpus.jsonl").unlink()
    assert read_retrieval(beir) == found


def test_grades_with_a_point_and_documents_that_are_not_there(beir):
    put(
        beir / "qrels" / "test.tsv",
        "Query-ID\tCorpus-ID\tScore\nq1\td1\t1.0\nq1\td9\t2\nq1\td2\t0.\n",
    )
    found = read_retrieval(beir)
    assert found.qrels == {"q1": {"d1": 1, "d9": 2, "d2": 0}} and "d9" not in found.corpus


@pytest.mark.parametrize(
    "file, content, parts",
    [
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\t1.5\n",
            (":2: ", "'1.5' is not a whole number"),
        ),
        (
            "qrels/test.tsv",
            f"query-id\tcorpus-id\tscore\nq1\td1\t{'9' * 5000}\n",
            (":2: ", "is not a whole number"),
        ),
        ("queries.jsonl", '{"_id": "q1", "text": ' + "[" * 100_000, (":1: ", "not JSON")),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq9\td1\t1\n",
            (":2: ", "query 'q9' is not in queries.jsonl"),
        ),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\tyes\n",
            (":2: ", "'yes' is not a whole number"),
        ),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t1\n",
            (":3: ", "judged before"),
        ),
        ("qrels/test.tsv", "q1\t0\td1\t1\n", (":1: ", "line 1 must name the columns")),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\n",
            (":2: ", "2 cells where the header has 3"),
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", ("no judgements",)),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n',
            (":2: ", "id 'd1' was taken by line 1"),
        ),
        ("corpus.jsonl", '{"_id": 1.5, "text": "a"}\n', (":1: ", "expected")),
        ("corpus.jsonl", '{"_id": true, "text": "a"}\n', (":1: ", "expected")),
        ("corpus.jsonl", '["d1", "a"]\n', (":1: ", "expected")),
        ("corpus.jsonl", "not json\n", (":1: ", "not JSON")),
        ("corpus.jsonl", '{"_id": "d1", "title": 3, "text": "a"}\n', (":1: ", "expected")),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n',
            (":2: ", "id 'q1' was taken by line 1"),
        ),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', (":1: ", "query 'q1' is empty")),
    ],
)
def test_retrieval_refuses(beir, file, content, parts):
    put(beir / file, content)
    refuses(lambda: read_retrieval(beir), beir / file, *parts)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_retrieval_missing_file(beir, file):
    (beir / file).unlink()
    refuses(
        lambda: read_retrieval(beir), beir / file, "no such file", "a search test is a folder with"
    )


# ---- the embedded corpus and the real data


def test_quickstart(tmp_path):
    folder = quickstart_folder()
    assert folder.is_dir()
    for entry in json.loads((folder / "data_config.json").read_text()):
        assert len(load_source(folder / entry["name"], cache_dir=tmp_path)) > 100
    assert len(read_sts(folder / "sts.tsv").scores) >= 200
    assert set(read_retrieval(folder / "retrieval").qrels)


@needs_real
def test_real_training_files(tmp_path):
    config = json.loads((REAL / "train" / "data_config.json").read_text())
    assert len(config) == 19
    for entry in config:
        assert (
            len(load_source(REAL / "train" / entry["name"], cache_dir=tmp_path)) == entry["lines"]
        ), entry["name"]


@needs_real
def test_real_sts():
    dev, test = read_sts(REAL / "stsb" / "dev.tsv"), read_sts(REAL / "stsb" / "test.tsv")
    assert (len(dev.scores), len(test.scores)) == (1500, 1379)
    whole = REAL / "stsbenchmark.tsv.gz"

    # the original has spaces at some ends
    def stripped(sts):
        return sorted((one.strip(), two.strip(), score) for one, two, score in zip(*sts))

    assert stripped(read_sts(whole, "dev")) == stripped(dev)
    assert stripped(read_sts(whole)) == stripped(test)


@needs_real
def test_real_retrieval():
    corpus, queries, qrels = read_retrieval(REAL / "retrieval" / "cranfield")
    assert (len(corpus), len(queries), sum(map(len, qrels.values()))) == (1400, 225, 1612)


# ---- any bytes at all

STRANGE = [
    *(None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\ud800"),
    *("\x00", "x" * 10_000, [], {}, [[]], ["a"], {"a": 1}, [["a", "b"]], "9" * 5000),
]
BITS = [
    *(b"[" * 3000, b'{"a":' * 2000, b"\x00", b'"', b"\\", b"NaN", b"1e999"),
    *(b"9" * 5000, b"null", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b","),
    *(b";", b"\\ud800", b"-", b"]", b"}", b"\x1f\x8b", b"PAR1", b"/../", b"'"),
]


def valid_files(folder: Path) -> dict[str, list[tuple[Path, object]]]:
    "One small valid file of every format: {name: [(file to spoil, call that reads it), ..]}."
    from contrastive_st.mixture import read_config

    tables = {"jsonl": GOOD, "sts": [(5.0, "a", "b", "test"), (2.5, "c", "d", "train")]}
    names = {"jsonl": ["anchor", "positive"], "sts": ["score", "sentence1", "sentence2", "split"]}
    found = {}
    for what, rows in tables.items():
        records = [dict(zip(names[what], row)) for row in rows]
        texts = {
            "jsonl": "".join(json.dumps(r) + "\n" for r in records),
            "json": json.dumps(records),
            "tsv": "\n".join("\t".join(map(str, r)) for r in (names[what], *rows)),
            "csv": "\n".join(";".join(f'"{c}"' for c in r) for r in (names[what], *rows)),
        }
        paths = [put(folder / f"{what}.{ending}", text) for ending, text in texts.items()] + [
            put(folder / f"{what}.jsonl.gz", texts["jsonl"]),
            folder / f"{what}.parquet",
        ]
        pq.write_table(pa.Table.from_pylist(records), paths[-1])
        for path in paths:
            calls = [partial(read_sts, path)]
            if what == "jsonl":
                calls = [
                    partial(read, path),
                    partial(read, path, on_error="skip"),
                    partial(load_source, path, cache_dir=folder / "cache"),
                ]
            found[path.name] = [(path, call) for call in calls]
    put(
        folder / "forms.jsonl",
        [
            {"set": ["a", "b"]},
            {"set": {"query": "q", "pos": ["p"], "neg": ["n"]}},
            {"texts": ["c", "d"]},
            ["e", "f", "g"],
        ],
    )
    found["forms.jsonl"] = [
        (folder / "forms.jsonl", partial(read, folder / "forms.jsonl", on_error="skip"))
    ]
    search = folder / "search"
    (search / "qrels").mkdir(parents=True)
    put(
        search / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Fog", "text": "Ferries wait."},
            {"_id": "d2", "text": "No title."},
        ],
    )
    put(search / "queries.jsonl", [{"_id": "q1", "text": "fog?"}])
    put(search / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        found[name] = [(search / name, partial(read_retrieval, search))]
    config = put(
        folder / "config.json",
        json.dumps(
            [
                {
                    "name": "jsonl.jsonl",
                    "weight": 1,
                    "lines": 3,
                    "columns": ["anchor", "positive"],
                    "split": "train",
                },
                {"name": "jsonl.tsv", "weight": 2},
            ]
        ),
    )
    found["config.json"] = [(config, partial(read_config, config, folder))]
    with pytest.warns(UserWarning, match="1 bad rows skipped"):
        made = load_source(
            put(folder / "texts.jsonl", [*GOOD, ["only one"]]),
            cache_dir=folder / "stores",
            on_error="skip",
        ).store.folder

    def ids(texts):
        return np.arange(len(texts)), np.ones(len(texts), int), np.zeros(len(texts), bool)

    store.write_tokens(
        made, {"fingerprint": "f", "tokenizer": "t", "max_length": 5, "vocabulary": 256}, ids
    )

    def open_store():
        source = load_source(made)
        (
            source.rows([0, len(source) // 2, len(source) - 1]),
            source.identities([0]),
            source.store.tokens([0, len(source) - 1]),
        )

    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        name = path.relative_to(made).as_posix()
        found[f"store/{name}"] = [(path, open_store), (path, partial(store.verify, made))]
    return found


def spoil_values(value, draw):
    "The same JSON value with something strange in one place."
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw.random() < 0.15:
            del copy[key]
        elif isinstance(copy, dict) and draw.random() < 0.2:
            copy[str(draw.choice(STRANGE))] = copy.pop(key)
        else:
            copy[key] = spoil_values(value[key], draw)
        return copy
    return draw.choice(STRANGE)


def spoil(raw: bytes, name: str, draw) -> bytes:
    "The content of a file with some bytes, or some values, changed."
    if name.endswith((".jsonl", ".json")) and draw.random() < 0.5:
        lines = raw.decode().splitlines() if name.endswith("jsonl") else [raw.decode()]
        n = draw.randrange(len(lines))
        lines[n] = json.dumps(spoil_values(json.loads(lines[n]), draw))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    zipped = name.endswith(".gz") and draw.random() < 0.7
    data = bytearray(gzip.decompress(raw) if zipped else raw)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        how = draw.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[at:end]
        elif how == 2:
            data[at:at] = data[at:end]
        elif how == 3:
            data[at : at + draw.choice([0, 1])] = draw.choice(BITS)
        elif how == 4:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
        else:
            del data[at:]
    return gzip.compress(bytes(data)) if zipped else bytes(data)


def fuzz(folder: Path, number: int, seed: int = 0) -> dict[str, int]:
    "Spoil files and read them: only ValueError or OSError, a short sentence with the file, fast."
    draw, outcomes = random.Random(seed), Counter()
    found = valid_files(folder)
    originals = {path: path.read_bytes() for calls in found.values() for path, _ in calls}
    for n in range(number):
        name = sorted(found)[n % len(found)]
        path, call = draw.choice(found[name])
        path.write_bytes(spoil(originals[path], name, draw))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            outcomes["read"] += 1
            said = [str(w.message) for w in caught]
        except (ValueError, OSError) as error:
            said = [str(error)]
            assert str(folder) in said[0], (n, name, said)
            outcomes["refused"] += 1
        assert time.perf_counter() - start < 10, (n, name)
        assert all(len(text) < 1500 for text in said), (n, name, said)
        path.write_bytes(originals[path])
    return dict(outcomes)


def test_spoiled_files_are_read_or_refused_in_a_sentence(tmp_path):
    outcomes = fuzz(tmp_path, int(os.environ.get("FUZZ", 200)), int(os.environ.get("FUZZ_SEED", 0)))
    assert min(outcomes["read"], outcomes["refused"]) > 20


# ---- names of columns


NEGATIVES = """negative negatives neg negs hard_negative hard_negatives hard_neg hard_neg_1
    neg_1 neg1
    negative-1 Negative_1 NEGATIVES HardNegative hard-negs neg_text negative_passages
    distractor""".split()


@pytest.mark.parametrize("name", [*NEGATIVES, "Negative 1", " hard negatives "])
@pytest.mark.parametrize("pair", [("anchor", "positive"), ("query", "pos"), ("sent0", "sent1")])
@pytest.mark.filterwarnings("error")
def test_negatives_under_other_usual_names(tmp_path, name, pair):
    rows = [(f"a{i}", f"p{i}", f"n{i}") for i in range(3)]
    dicts = [dict(zip((*pair, name), row)) for row in rows]
    assert read(put(tmp_path / "a.jsonl", dicts)) == rows
    table = ",".join((*pair, name)) + "\n" + "".join(",".join(row) + "\n" for row in rows)
    assert read(put(tmp_path / "a.csv", table)) == rows
    assert list(Source(dicts)) == rows
    pq.write_table(pa.Table.from_pylist(dicts), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == list(Source(datasets.Dataset.from_list(dicts))) == rows
    lists = [row | {name: [row[name], "m"]} for row in dicts]
    assert read(put(tmp_path / "b.jsonl", lists)) == [(*row, "m") for row in rows]


@pytest.mark.filterwarnings("error")
def test_third_sentences_are_negatives_and_third_captions_are_not(tmp_path):
    def columns(*names):
        chooser = data.Columns()
        return chooser.choose(names, dict.fromkeys(names, "text")), chooser.remarks

    triple = ("sentence1", "sentence2", "sentence3")
    assert columns(*triple) == (triple, {})
    captions, remarks = columns("caption1", "caption2", "caption3")
    assert captions == ("caption1", "caption2") and remarks == {"unused": ["caption3"]}
    numbered = ("neg_10", "neg_2", "anchor", "positive", "neg", "neg_scores", "pos_scores")
    assert columns(*numbered)[0] == ("anchor", "positive", "neg", "neg_2", "neg_10")


PAIRS = """question/passage title/abstract text/simplified caption1/caption2 comment/code title/body
    article/summary sentence/paraphrase set1/set2 text1/text2 s1/s2 sentence_A/sentence_B
    title1/title2 query/document query/passage question/context anchor/pos text/summary
    english/non_english instruction/output sent0/sent1 Query/Positive_Passage""".split()


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.filterwarnings("error")
def test_pairs_of_public_sets(tmp_path, names):
    first, second = names.split("/")
    columns = {second: ["c", "d"], "id": [1, 2], first: ["a", "b"], "url": ["x", "y"]}
    assert list(Source(datasets.Dataset.from_dict(columns))) == [("a", "c"), ("b", "d")]
    assert list(Source(columns)) == [("a", "c"), ("b", "d")]
    frame = datasets.Dataset.from_dict(columns).to_pandas()
    frame.to_csv(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv") == [("a", "c"), ("b", "d")]


def test_unknown_names_are_taken_in_order_if_there_are_two(tmp_path):
    rows = [{"id": 7, "left": a, "right": p, "stars": "4.5"} for a, p in GOOD]
    with pytest.warns(UserWarning, match="'left' was taken as the anchor and 'right'") as caught:
        assert read(put(tmp_path / "a.jsonl", rows)) == GOOD
    assert len(caught) == 1
    # another order in a later row changes nothing
    mixed = [*rows, {"right": "p", "left": "a"}]
    with pytest.warns(UserWarning):
        assert read(put(tmp_path / "b.jsonl", mixed))[-1] == ("a", "p")
    with pytest.warns(UserWarning, match="columns=.0, 1. if line 1 is a row"):
        assert read(put(tmp_path / "a.tsv", "Frage\tAntwort\na\tb\n")) == [("a", "b")]
    judged = put(tmp_path / "c.jsonl", [row | {"label": 1} for row in rows])
    refuses(lambda: read(judged), "no known pair")
    three = put(tmp_path / "d.jsonl", [row | {"middle": "m"} for row in rows])
    refuses(
        lambda: read(three), "d.jsonl:1: no known pair", "for example columns=('left', 'right')"
    )
    # a sentence is no name of a column
    refuses(lambda: read(put(tmp_path / "b.tsv", "Is it foggy?\tNo.\na\tb\n")), "line 1 must")


def test_text_that_is_not_read_is_named_once(tmp_path):
    row = {"question": "q", "answer": "a", "id": "x", "source": "s", "n": "12", "score_url": "u"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(put(tmp_path / "a.jsonl", [row])) == [("q", "a")]
    late = [row, row | {"hint": None}, row | {"hint": "look"}, row | {"hint": "look"}]
    path = put(tmp_path / "b.jsonl", [*late, row | {"context": "c"}])
    with pytest.warns(UserWarning, match="b.jsonl: columns hint, context hold text") as caught:
        assert len(read(path)) == 5
    assert len(caught) == 1 and "columns=(anchor, positive, negative, ...)" in str(
        caught[0].message
    )
    with pytest.warns(UserWarning, match="column context holds text"):
        next(read_examples(put(tmp_path / "c.csv", "question,answer,context\na,b,c\n")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # you chose
        read(path, columns=("question", "answer"))


# ---- other shapes


@pytest.mark.filterwarnings("error")
def test_other_shapes(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in GOOD)
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(lines.encode()))
    assert read(tmp_path / "A.JSONL.GZ") == read(put(tmp_path / "a.ndjson", lines)) == GOOD

    class InputExample:
        def __init__(self, texts):
            self.guid, self.texts, self.label = None, texts, 0

    assert list(Source([InputExample(list(row)) for row in GOOD])) == GOOD
    columns = {"anchor": [a for a, _ in GOOD], "positive": tuple(p for _, p in GOOD)}
    assert list(Source(columns)) == GOOD


def test_ids_of_documents_may_be_numbers(beir):
    put(beir / "corpus.jsonl", [{"_id": 1, "text": "a"}, {"_id": "d2", "text": "b"}])
    put(beir / "queries.jsonl", [{"_id": 7, "text": "q"}])
    put(beir / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n7\t1\t1\n")
    found = read_retrieval(beir)
    assert list(found.corpus) == ["1", "d2"] and found.qrels == {"7": {"1": 1}}


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", GOOD)
    made = data.prepare([{"name": "a", "path_or_hub_id": "~/a.jsonl"}], "~/out", progress=False)
    assert made["a"]["rows"] == 3 and (tmp_path / "out").is_dir()
    assert data.is_store("~/out/a.store") and not data.is_hub_id("~/a.jsonl")
    assert list(load_source("~/out/a.store")) == GOOD
    assert list(load_source("~/a.jsonl", cache_dir="~/cache")) == GOOD
    assert not (tmp_path / "~").exists()
    refuses(lambda: read("~nobody-here/a.jsonl"), "no such file")


# ---- limits in bytes


def test_rows_are_bounded(tmp_path, monkeypatch):
    many = {"query": "q", "pos": ["p"], "neg": ["n"] * 1001}
    path = put(tmp_path / "a.jsonl", [many, {"query": "r", "pos": ["s"]}])
    refuses(lambda: read(path), f"{path}:1: the row has 1,001 negatives", "negatives=")
    with pytest.warns(UserWarning, match="1 bad rows skipped"):
        assert read(path, on_error="skip") == [("r", "s")]
    with pytest.warns(UserWarning, match="1 had more and were cut"):
        assert read(path, negatives=2) == [("q", "p", "n", "n"), ("r", "s", "s", "s")]
    refuses(lambda: read(path, negatives=1001), "from 0 to 1,000")
    put(path, [many | {"neg": ["n"] * 100}, {"query": "r", "pos": ["s"]}])
    with pytest.warns(UserWarning, match="a.jsonl:1: is the first row with negatives and has 100"):
        assert {len(row) for row in read(path)} == {102}
    wide = put(tmp_path / "b.jsonl", [{f"c{i}": "x" for i in range(1001)}])
    refuses(lambda: read(wide), f"{wide}:1: 1,001 columns among c0", "columns=")
    assert read(wide, columns=("c0", "c1000")) == [("x", "x")]
    unfolds = {"query": "q" * 1000, "pos": ["p"] * 1000}
    monkeypatch.setattr(data, "ROW_CHARACTERS", 10_000)
    refuses(lambda: read(put(path, [unfolds])), "2,000 texts", "1,001,000 characters")


def test_rows_that_wait_are_bounded_in_characters(tmp_path, monkeypatch):
    rows = [(f"a{i}", "z" * 1000) for i in range(20)]
    path = put(tmp_path / "a.jsonl", [*rows, ("c", "d", "e")])
    monkeypatch.setattr(data, "AHEAD_CHARACTERS", 5000)
    refuses(lambda: read(path), f"{path}:21: the first row with negatives, after 20 without any")
    assert len(read(path, negatives=1)) == 21


# ---- labels, scores, judged pairs ----

LABELLED = [(f"how to {v} {n}", v) for v in ("pay", "send", "track") for n in range(4)]


def stops(words, call, *args, **options):
    "A ValueError in one sentence, with these words."
    refuses(lambda: call(*args, **options), words)


def csv(folder, name, head, rows):
    lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / name).write_text(f"{head}\n{lines}", encoding="utf-8")
    return folder / name


def test_labels_from_everywhere_give_the_same_pairs(tmp_path):
    path = csv(tmp_path, "q.csv", "text,intent", LABELLED)
    frame = pd.DataFrame(LABELLED, columns=["text", "intent"])
    frame.to_parquet(tmp_path / "q.parquet")
    sources = [
        Source(LABELLED, "q", label=1),
        Source(frame, "q", label="intent"),
        Source(frame.to_dict("list"), "q", label="Intent"),
        load_source(path, "q", label="intent", cache_dir=tmp_path / "c"),
        load_source(
            tmp_path / "q.parquet", "q", ["text"], label="intent", cache_dir=tmp_path / "c"
        ),
    ]
    rows = list(range(5 * 12))
    for source in sources:
        assert source.has_labels and not source.has_scores and len(source) == 12
        assert source.rows(rows) == sources[0].rows(rows)
        assert source.identities(rows).tolist() == sources[0].identities(rows).tolist()
        assert source.labels(rows).tolist() == sources[0].labels(rows).tolist()
    label = dict(LABELLED)
    assert all(label[a] == label[p] and a != p for a, p in sources[0].rows(rows))
    assert len(set(sources[0].labels(range(12)).tolist())) == 3
    other = Source(LABELLED, "another", label=1)
    assert not set(other.labels(range(12)).tolist()) & set(sources[0].labels(range(12)).tolist())


@for_all(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=4, max_size=40),
    st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_partners(rows, turn):
    labels, texts = (np.array(column, np.int64) for column in zip(*rows))
    sizes = Counter(labels.tolist())
    if sum(n > 1 for n in sizes.values()) < 2:
        with pytest.raises(ValueError, match="one label|only one label|labels differ"):
            data.Classes(labels, texts)
        return
    classes = data.Classes(labels, texts)
    numbers = np.arange(len(classes))
    own = classes.rows(numbers)
    assert sorted(own) == [i for i in range(len(rows)) if sizes[labels[i]] > 1]
    assert classes.alone == len(rows) - len(own)
    seen = {i: [] for i in own.tolist()}
    for t in range(turn, turn + 2 * len(rows)):
        partner = classes.partners(numbers, np.full(len(numbers), t))
        assert (labels[own] == labels[partner]).all() and (own != partner).all()
        for i, p in zip(own.tolist(), partner.tolist()):
            seen[i].append(p)
    for i, partners in seen.items():
        others = {j for j in range(len(rows)) if labels[j] == labels[i] and j != i}
        best = {j for j in others if texts[j] != texts[i]} or others
        assert set(partners) == best  # of another text if there is one, each of them
        if len(best) > 1:
            assert all(a != b for a, b in zip(partners, partners[1:]))


def test_labels_alone_and_copies_are_counted():
    rows = [*LABELLED, ("odd", "alone"), ("same", "copies"), ("Same ", "copies")]
    with pytest.warns(UserWarning) as caught:
        source = Source(rows, "q", label=1)
    assert "1 of 15 rows are alone with their label" in str(caught[0].message)
    assert "2 rows have no partner of another text" in str(caught[1].message)
    assert len(source) == 14


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", "x"), ("b", "x"), ("c", "x")], "all 3 rows have one label"),
        ([("a", "x"), ("b", "y"), ("c", "z")], "all 3 labels differ"),
        ([("a", "x"), ("b", "x"), ("c", "z")], "only one label has two rows"),
        ([("a", "x"), ("b", "")], "row 1: the label is empty"),
        ([("a", "x"), ("b", 0.5)], "row 1: the label is 0.5"),
        ([("a", "x"), ("", "x")], "row 1: text 1 is empty"),
        ([("a",)], "a list of 1 does not fit label=1"),
    ],
)
def test_labels_that_will_not_do(rows, words):
    with pytest.raises(ValueError, match=words):
        Source(rows, "q", label=1)


def test_labels_of_any_kind():
    rows = [("a", 1), ("b", "1"), ("c", True), ("d", " true"), ("e", np.int64(1)), ("f", False)]
    with pytest.warns(UserWarning, match="alone"):
        source = Source(rows, label=1)
    first = [source.labels([i])[0] for i in range(5)]
    assert first[0] == first[1] == first[4] and first[2] == first[3] != first[0]


def test_columns_of_labels_and_scores_by_name(tmp_path):
    path = csv(tmp_path, "q.csv", "id,utterance,intent", [(i, *r) for i, r in enumerate(LABELLED)])
    assert len(load_source(path, label="intent", cache_dir=tmp_path / "c")) == 12
    stops("did you mean 'intent'", load_source, path, label="intents", cache_dir=tmp_path / "c")
    stops("one column of texts", load_source, path, columns=["id", "text"], label="intent")
    stops("labels or scores", load_source, path, label="intent", score="id")
    stops("score_range without score", load_source, path, score_range=[0, 1])
    empty = csv(tmp_path, "e.csv", "text,intent", [("a", ""), ("b", "")])
    stops("e.csv:2: the label is empty", load_source, empty, label="intent", cache_dir=tmp_path)


GRADED = [("a cat", "one cat", 4.5), ("a dog", "a bird", 1), ("rain", "sun", 0)]


def test_scores_from_everywhere(tmp_path):
    path = csv(tmp_path, "g.csv", "sentence1,sentence2,score", GRADED)
    frame = pd.DataFrame(GRADED, columns=["sentence1", "sentence2", "score"])
    for source in (
        Source(GRADED, score=2),
        Source(frame, score="score"),
        load_source(path, score="score", cache_dir=tmp_path / "c"),
    ):
        assert source.has_scores and source.columns == ("anchor", "positive")
        assert source.rows([1, 0]) == [GRADED[1][:2], GRADED[0][:2]]
        assert source.scores([0, 1, 2]) == pytest.approx([0.9, 0.2, 0])
        assert source.scores([0]).dtype == np.float32
    wide = load_source(path, score="score", score_range=[-5, 5], cache_dir=tmp_path / "c")
    assert wide.scores([0, 2]) == pytest.approx([0.95, 0.5])
    assert Source([("a", "b", 0.5), ("c", "d", 1)], score=2).scores([0, 1]).tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("scores", "given", "words"),
    [
        ([1, 70], None, "g.csv:3: score 70 is neither from 0 to 1 nor from 0 to 5"),
        ([1, -1], None, "g.csv:3: score -1 is neither"),
        ([1, 6], [0, 5], "g.csv:3: score 6 is not from 0 to 5"),
        ([1, "high"], None, "g.csv:3: the score is 'high', not a number"),
        ([1, "nan"], None, "g.csv:3: the score is 'nan', not a number"),
        ([1, ""], None, "g.csv:3: the score is '', not a number"),
        ([1, 1], None, "every row has the score 1"),
        ([1, 0], [5, 0], "score_range is"),
    ],
)
def test_scores_that_will_not_do(tmp_path, scores, given, words):
    rows = [(f"a {i}", f"b {i}", score) for i, score in enumerate(scores)]
    path = csv(tmp_path, "g.csv", "sentence1,sentence2,score", rows)
    stops(words, load_source, path, score="score", score_range=given, cache_dir=tmp_path / "c")


def test_prepared_stores_keep_labels_and_scores(tmp_path):
    wanted = [
        {
            "name": "q",
            "path_or_hub_id": csv(tmp_path, "q.csv", "text,intent", [*LABELLED, ("odd", "alone")]),
            "label": "intent",
        },
        {
            "name": "g",
            "path_or_hub_id": csv(tmp_path, "g.csv", "sentence1,sentence2,score", GRADED),
            "score": "score",
        },
    ]
    table = store.summary_table(data.prepare(wanted, tmp_path / "out", progress=False))
    assert "q: 4 labels, from 1 row ('alone') to 4" in table and "1 with one row" in table
    assert "g: graded, scores from 0 to 4.5" in table
    with pytest.warns(UserWarning, match="alone"):
        labelled = load_source(tmp_path / "out" / "q.store", label="intent")
    graded = load_source(tmp_path / "out" / "g.store")
    assert labelled.has_labels and graded.scores([0]) == pytest.approx([0.9])
    assert graded.store.summary["format"] == store.MARKED_FORMAT
    store.verify(tmp_path / "out" / "g.store")
    again = data.prepare(wanted, tmp_path / "out", progress=False, verify=True)
    assert again.written == ()
    stops("label='x' is asked of a store", load_source, tmp_path / "out" / "g.store", label="x")
    bad = [wanted[0] | {"label": "intents"}]
    stops("did you mean 'intent'", data.prepare, bad, tmp_path / "other", progress=False)


def test_judged_pairs_become_hard_negatives(tmp_path):
    rows = [
        ("q", "p", 1),
        ("q", "n", 0),
        ("q", "o", 0),
        ("r", "s", 1),
        ("r", "t", 1),
        ("r", "u", 0),
    ]
    path = csv(tmp_path, "m.csv", "sentence1,sentence2,label", rows)
    with pytest.warns(UserWarning, match="repeat theirs"):
        source = load_source(path, relevance="label", cache_dir=tmp_path / "c")
    assert list(source) == [("q", "p", "n", "o"), ("r", "s", "u", "u"), ("r", "t", "u", "u")]
    csv(tmp_path, "m.csv", "sentence1,sentence2,label", [*rows, ("v", "w", 0)])
    stops("m.csv:8: no row of this anchor", load_source, path, relevance="label")
    csv(tmp_path, "m.csv", "sentence1,sentence2,label", [*rows, ("v", "w", 2)])
    stops("relevance 2 is not from 0 to 1", load_source, path, relevance="label")
    csv(tmp_path, "m.csv", "sentence1,sentence2,label", [*rows, ("v", "w", 0.5)])
    stops("relevance is 0.5; write 1 (positive)", load_source, path, relevance="label")
    csv(tmp_path, "m.csv", "sentence1,sentence2,label", [*rows, ("v", "w", "yes")])
    stops("the relevance is 'yes', not a number", load_source, path, relevance="label")
    stops("relevance is ['label']", load_source, path, relevance=["label"])
    stops("relevance='label' beside a label", load_source, path, relevance="label", label="label")


JUDGED = [("q", "p", 1), ("q", "n", 0), ("r", "s", 1), ("r", "u", 0)]
JUDGED_KEYS = ("sentence1", "sentence2", "label")


def test_judged_pairs_from_everywhere(tmp_path):
    frame = pd.DataFrame(JUDGED, columns=JUDGED_KEYS)
    dataset = datasets.Dataset.from_pandas(frame)
    dataset.save_to_disk(tmp_path / "saved")
    rows = frame.to_dict("records")
    for data_, column in (
        (frame, "label"),
        (dataset, "label"),
        (rows, "label"),
        (frame.to_dict("list"), "label"),
        (JUDGED, 2),
    ):
        assert list(Source(data_, relevance=column)) == [("q", "p", "n"), ("r", "s", "u")]
    assert list(load_source(tmp_path / "saved", relevance="label"))[1] == ("r", "s", "u")
    stops("dataset row 3: no row of this anchor", Source, [*JUDGED[:3], ("v", "w", 0)], relevance=2)
    stops("dataset row 1: relevance 3 is not", Source, [JUDGED[0], ("q", "n", 3)], relevance=2)
    stops("a set has no judged rows", Source, {1, 2}, relevance=2)
    stops("relevance='label' beside a score", Source, rows, relevance="label", score="label")


def test_a_store_knows_its_relevance(tmp_path):
    path = csv(tmp_path, "m.csv", ",".join(JUDGED_KEYS), JUDGED)
    wanted = {"name": "m", "path_or_hub_id": path, "relevance": "label"}
    plain = {"name": "n", "path_or_hub_id": csv(tmp_path, "n.csv", "anchor,positive", ["ab", "cd"])}
    data.prepare([wanted, plain], tmp_path / "out", progress=False)
    m, n = (tmp_path / "out" / f"{name}.store" for name in "mn")
    assert list(load_source(m, relevance="label")) == list(load_source(m))
    stops("prepared with relevance='label'", load_source, m, relevance="other")
    stops("prepared without relevance", load_source, n, relevance="label")


def test_a_prompt_of_half_a_character_is_refused_when_the_source_is_made():
    stops("holds half a character", Source, [("a", "b"), ("c", "d")], prompts="q\ud83d: ")


def test_prompts_are_checked():
    rows = [("a", "b", "c"), ("d", "e", "f")]
    assert Source(rows, prompts={"positive": "p: "}).prompts == ("", "p: ", "p: ")
    assert Source(rows, prompts="q: ").prompts == ("q: ",) * 3
    assert Source(rows, prompts=["", "", ""]).prompts is None
    stops("did you mean 'anchor'", Source, rows, prompts={"ancor": "q: "})
    stops("2 prompts for 3 columns", Source, rows, prompts=["a", "b"])
    stops("prompts is 5", Source, rows, prompts=5)


# ---- a teacher's scores ----

# (query, positive, two negatives, a teacher's score of each but the query)
TAUGHT = [(f"q {n}", f"p {n}", f"n {n}", f"m {n}", 9.5 - n, 1.25, n / 4) for n in range(6)]
TAUGHT_NAMES = ("query", "positive", "negative", "negative_2", "s1", "s2", "s3")
TAUGHT_SCORES = np.array([row[4:] for row in TAUGHT], np.float32)


def lists(rows=TAUGHT, **change):
    "Rows as objects whose scores are a list."
    return [dict(zip(TAUGHT_NAMES[:4], row)) | {"scores": list(row[4:])} | change for row in rows]


def margins(rows=TAUGHT):
    return [{**row, "scores": [row["scores"][0] - x for x in row["scores"][1:]]} for row in lists()]


def test_a_teacher_s_scores_from_everywhere_are_the_same(tmp_path):
    names, three = TAUGHT_NAMES, list(TAUGHT_NAMES[4:])
    objects = [dict(zip(names, row)) for row in TAUGHT]
    pd.DataFrame(lists()).to_parquet(tmp_path / "list.parquet")
    tsv = "".join("\t".join(map(str, row)) + "\n" for row in TAUGHT)
    example = Mock(texts=list(TAUGHT[0][:4]), label=list(TAUGHT[0][4:]), spec=("texts", "label"))
    datasets.Dataset.from_list(lists()).save_to_disk(tmp_path / "saved")
    files = [
        (put(tmp_path / "list.jsonl", lists()), {"teacher": "scores"}),
        (tmp_path / "list.parquet", {"teacher": "Scores"}),
        (tmp_path / "saved", {"teacher": "scores"}),
        (csv(tmp_path, "three.csv", ",".join(names), TAUGHT), {"teacher": three}),
        (put(tmp_path / "bare.tsv", tsv), {"columns": (0, 1, 2, 3), "teacher": (4, 5, 6)}),
        (put(tmp_path / "rows.jsonl", [[*r[:4], list(r[4:])] for r in TAUGHT]), {"teacher": 4}),
        (
            put(
                tmp_path / "lists.jsonl",
                [{"query": q, "pos": [p], "neg": [n, m], "t": s} for q, p, n, m, *s in TAUGHT],
            ),
            {"teacher": "t"},
        ),
    ]
    sources = [load_source(path, cache_dir=tmp_path / "c", **how) for path, how in files]
    sources += [
        Source(objects, teacher=three),
        Source(TAUGHT, teacher=[4, 5, 6]),
        Source(pd.DataFrame(objects), teacher=three),
        Source(datasets.Dataset.from_list(lists()), teacher="scores", columns=names[:4]),
        Source({name: [row[name] for row in objects] for name in names}, teacher=three),
        Source([{"texts": list(row[:4]), "label": row[4:]} for row in TAUGHT], teacher="label"),
    ]
    for source in sources:
        assert source.has_teacher and not source.has_scores and not source.has_labels
        assert list(source) == [row[:4] for row in TAUGHT], source
        scores = source.teacher([5, 0, 0, 3])
        assert scores.dtype == np.float32 and np.array_equal(scores, TAUGHT_SCORES[[5, 0, 0, 3]])
    assert Source([example], teacher="label").teacher([0])[0].tolist() == [9.5, 1.25, 0]


def test_differences_say_the_same_as_scores(tmp_path):
    source = load_source(
        put(tmp_path / "m.jsonl", margins()),
        teacher="scores",
        teacher_scale=0.5,
        cache_dir=tmp_path,
    )
    expected = (TAUGHT_SCORES - TAUGHT_SCORES[:, :1]) / 2
    assert np.array_equal(source.teacher(range(6)), expected)
    # the published files of MarginMSE: one negative and one number, positive minus negative
    path = csv(tmp_path, "one.csv", "query,positive,negative,score", [("q", "p", "n", -3.5)] * 2)
    assert load_source(path, teacher="score", cache_dir=tmp_path).teacher([1]).tolist() == [
        [0, 3.5]
    ]


def test_scores_go_with_their_negatives(tmp_path):
    "Rows of 3, 1 and 2 negatives, of which the first decides, in memory and in a store."
    rows = [
        {"query": "q", "pos": ["p"], "neg": ["a", "b"], "t": [5, 1, 2]},
        {"query": "r", "pos": ["p"], "neg": ["c"], "t": [6, 3]},
        {"query": "s", "pos": ["p"], "neg": ["d", "e", "f"], "t": [7, 4, 5, 6]},
    ]
    path = put(tmp_path / "a.jsonl", rows)
    words = "2 negatives each, 1 had more and were cut, 1 had fewer and repeat theirs"
    for read in (
        lambda: Source(rows, teacher="t"),
        lambda: load_source(path, teacher="t", cache_dir=tmp_path / "c"),
    ):
        with pytest.warns(UserWarning, match=words):
            source = read()
        assert [row[2:] for row in source] == [("a", "b"), ("c", "c"), ("d", "e")]
        assert source.teacher(range(3)).tolist() == [[5, 1, 2], [6, 3, 3], [7, 4, 5]]
    with pytest.warns(UserWarning, match="which have 1 negative each, 2 had more"):
        source = load_source(path, teacher="t", negatives=1, cache_dir=tmp_path / "c")
    assert source.teacher([2]).tolist() == [[7, 4]]


def test_a_prepared_teacher_is_opened_and_summed_up(tmp_path):
    put(tmp_path / "a.jsonl", margins() + lists(scores=["x", 1, 2])[:1])
    wanted = {"name": "a", "path_or_hub_id": tmp_path / "a.jsonl", "teacher": "scores"}
    with pytest.warns(UserWarning, match="1 bad row"):
        made = data.prepare([wanted], tmp_path / "out", progress=False)
        opened = load_source(tmp_path / "out/a.store")
    assert made["a"]["rejected"] == {"malformed": 1, "empty": 0}
    assert made["a"]["margins"]["highest"] == 9.5 and made["a"]["mark"] == "teacher"
    assert "a teacher's scores, the positive 6.06 above" in store.summary_table(made)
    assert opened.has_teacher and len(opened) == 6
    stops(
        "asked of a store that has a teacher's scores",
        load_source,
        tmp_path / "out/a.store",
        score="scores",
    )
    again = data.prepare([wanted | {"teacher_scale": 2.0}], tmp_path / "out", progress=False)
    assert not again.written  # the scale is of the reading


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scores": [1, "high", 2]}, "a teacher's score is 'high', not a number below a billion"),
        ({"scores": [1, math.nan, 2]}, "a teacher's score is nan, not a number"),
        ({"scores": [1, 1e30, 2]}, "not a number below a billion; mend or delete the row"),
        ({"scores": [1, True, 2]}, "a teacher's score is True, not a number"),
        ({"scores": [1, None, 2]}, "a teacher's score is missing; mend or delete the row"),
        ({"scores": None}, "a teacher's score is missing"),
        ({"scores": [3]}, "the row has 1 score of a teacher, for a positive and 2 negatives; give"),
        ({"scores": [3, 4, 5, 6]}, "has 4 scores of a teacher, for a positive and 2 negatives"),
        ({"scores": []}, "the row has 0 scores of a teacher"),
        ({"negative": None, "negative_2": None}, "the row has no negative, so that a teacher's"),
        ({"positive": ["a", "b"]}, "has 2 positives, and a teacher's scores are of one; write"),
    ],
)
def test_bad_scores_of_a_teacher(tmp_path, change, words):
    path = put(tmp_path / "a.jsonl", lists()[:2] + lists(**change)[:1] + lists())
    read = partial(load_source, path, teacher="scores", cache_dir=tmp_path / "c")
    refuses(read, f"{path}:3: ", words)
    refuses(
        lambda: Source(lists()[:2] + lists(**change)[:1], "mine", teacher="scores"), "mine row 2"
    )
    with pytest.warns(UserWarning, match="1 bad row"):
        assert len(read(on_error="skip")) == 8


@pytest.mark.parametrize(
    "options, words",
    [
        ({"teacher": "scroes"}, "no column 'scroes' among query, positive, negative, negative_2"),
        ({"teacher": "scroes"}, "(did you mean 'scores'?)"),
        ({"teacher": ["scores", "s"]}, "no column 's' among"),
        ({"teacher": ""}, "teacher is ''; give the column of the scores, such as 'scores', or a"),
        ({"teacher": ["a", "a"]}, "teacher is ['a', 'a']; give"),
        ({"teacher": ["a", 1]}, "teacher is ['a', 1]; give"),
        ({"teacher": {"a": 1}}, "teacher is {'a': 1}; give"),
        ({"teacher": "scores", "score": "x"}, "score='x' and teacher='scores'; a dataset has"),
        ({"teacher": "scores", "relevance": "x"}, "relevance='x' beside a teacher"),
        ({"teacher_scale": 2}, "teacher_scale without teacher; name the columns"),
        (
            {"teacher": "scores", "teacher_scale": 0},
            "teacher_scale is 0; it must be a number above",
        ),
        ({"teacher": "scores", "teacher_scale": "2"}, "teacher_scale is '2'; it must be"),
        ({"teacher": 4, "columns": ("query", "positive")}, "write all as names, or all as"),
        ({"teacher": "scores", "columns": ("query", "positive")}, "the row has no negative"),
        (
            {"teacher": "scores", "columns": TAUGHT_NAMES[:3]},
            "has 3 scores of a teacher, for a posi",
        ),
    ],
)
def test_bad_columns_of_a_teacher(tmp_path, options, words):
    path = put(tmp_path / "a.jsonl", lists())
    stops(words, load_source, path, cache_dir=tmp_path / "c", **options)
    stops(words, Source, lists(), **options)
    if "row" not in words and options.get("teacher") != 4:
        stops(words, Source, datasets.Dataset.from_list(lists()), **options)


def test_a_teacher_that_tells_nothing_apart(tmp_path):
    path = put(tmp_path / "a.jsonl", lists(scores=[2, 2, 2]))
    stops(
        "negatives is 0, but a teacher's scores compare",
        load_source,
        path,
        teacher="scores",
        negatives=0,
        cache_dir=tmp_path,
    )
    stops(
        "gives all texts of a row the same score",
        load_source,
        path,
        teacher="scores",
        cache_dir=tmp_path,
    )
    stops(
        "a list of 5 does not fit teacher=7; give positions such as teacher=4",
        Source,
        [[*row[:4], list(row[4:])] for row in TAUGHT],
        teacher=7,
    )
    stops(
        "the row is no object, so that it has no column 'scores'", Source, TAUGHT, teacher="scores"
    )
