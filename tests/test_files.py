"""Text files: every row with its line, every refusal with file and line, whatever the format."""

import gzip
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refuses

from contrastive_st import files
from contrastive_st.files import (
    Rejects,
    as_number,
    as_path,
    read_columns,
    read_lines,
    read_rows,
    read_text,
    read_texts,
)

GOOD = [
    ("Is it foggy?", "No."),
    ("Where is berth 4?", "On the east quay."),
    ("Who opens the lock?", "The lock keeper."),
]
BERTHS = "".join(f'["berth {i * 7919}", "quay {i * 104729}"]\n' for i in range(5000)).encode()


def put(path: Path, content) -> Path:
    "Write bytes, text or rows (as JSON Lines) to path, gzipped when the name says so."
    if not isinstance(content, (bytes, str)):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows(path, **options):
    return list(read_rows(path, **options))


# ---- lines


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_any_system(tmp_path, mark, end):
    "Whatever wrote it: the same lines, with the same numbers, and only line ends end one."
    lines = ["Is it foggy?", "", "Fog:\u2028none.\f", "港口"]
    path = put(tmp_path / "a.txt.gz", (end.join(lines) + end * (end != "\r")).encode(mark))
    assert list(read_lines(path)) == list(read_texts(path)) == list(enumerate(lines, 1))
    assert read_text(path) == "\n".join(lines)


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_utf16_without_its_mark(tmp_path, code, name):
    path = put(tmp_path / name, '"text","other"\n"a","b"\n'.encode(code))
    refuses(lambda: rows(path), f"{path}:1: looks like UTF-16 without its mark", "as UTF-8")


@pytest.mark.parametrize(
    "text", ["\0", "\0a\0", "a\0b", "\0\0\0\0\0\0\0\0", "\0 is no mark of UTF-16"]
)
def test_a_text_may_hold_nul(tmp_path, text):
    assert list(read_lines(put(tmp_path / "a.txt", text))) == [(1, text)]


@pytest.mark.parametrize(
    "value, number",
    [(3, 3), ("0.75", 0.75), (" 4 ", 4), (np.float32(0.5), 0.5), (np.int64(2), 2), ("1e2", 100)],
)
def test_a_cell_that_is_a_number(value, number):
    assert as_number(value) == number


@pytest.mark.parametrize(
    "value",
    ["1_0", "", "four", True, np.True_, None, [1], 1j, 10**400, pytest.param(10**5000, id="long")],
)
def test_a_cell_that_is_no_number(value):
    assert math.isnan(as_number(value))


def test_a_line_that_is_not_utf8(tmp_path):
    path = put(tmp_path / "a.txt", b"a\ncaf\xe9\nb")
    refuses(lambda: list(read_lines(path)), f"{path}:2: byte 4 of the line is not UTF-8")
    reject = Rejects(path, "skip")
    assert list(read_lines(path, reject)) == [(1, "a"), (3, "b")] and reject.first[0][0] == 2
    refuses(lambda: list(read_lines(put(path, b"\xff\xfea"))), f"{path}:1: begins like UTF-16")
    refuses(lambda: read_text(put(path, "ab\n" * 9), 10, "be brief"), f"{path}:4: ", "be brief")


def test_standard_input(monkeypatch):
    "With a buffer of its own, as in a shell, and without, as in tests of commands."
    for wrap in (io.BytesIO, lambda raw: io.BufferedReader(io.BytesIO(raw))):
        stdin = SimpleNamespace(buffer=wrap("\ufeffa\n\nb".encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(read_texts("-")) == [(1, "a"), (2, ""), (3, "b")]
        assert not stdin.buffer.closed
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n\xff")))
    refuses(lambda: list(read_texts("-")), "standard input:2: byte 1 of the line is not UTF-8")


def test_an_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    long = "x" * 2000
    for name, content in (
        ("a.jsonl", f'["a", "b"]\n["c", "{long}"]\n'),
        ("a.jsonl.gz", f'["a", "b"]\n["c", "{long}"]\n'),
        ("a.tsv", f"anchor\tpositive\na\t{long}\n"),
        ("a.csv", f"anchor,positive\na,{long}\n"),
        ("a.json", f'[["a", "b"],\n["c", "{long}"]]'),
    ):
        path = put(tmp_path / name, content)
        for reject in (None, Rejects(path, "skip")):
            refuses(
                lambda: rows(path, reject=reject),
                f"{path}:2: the line is longer than 1,000 bytes",
            )
    assert rows(put(tmp_path / "b.jsonl", ["x" * 900])) == [(1, "x" * 900)]
    cell = "\n".join(["y" * 90] * 20)
    refuses(
        lambda: rows(put(tmp_path / "c.csv", f'anchor,positive\na,"{cell}"\n')),
        "c.csv:2: not CSV",
        "field larger than field limit",
    )
    monkeypatch.setattr(files, "JSON_BYTES", 5000)
    refuses(
        lambda: rows(put(tmp_path / "d.json", "[" + '["a", "b"],\n' * 600 + '["c", "d"]]')),
        "the file is read as a whole",
        "5,000 bytes",
    )


# ---- zipped files


def test_gzip_by_name_and_by_content(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'["a", "b"]\n')
    refuses(lambda: rows(path), path, "not gzip", "drop .gz")
    path = tmp_path / "b.jsonl"
    path.write_bytes(gzip.compress(b'["a", "b"]\n'))
    refuses(lambda: rows(path), path, "rename it to b.jsonl.gz")
    # members one after another are one file, and zeros may follow
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(BERTHS[:20_000]) + gzip.compress(BERTHS[20_000:]) + b"\0" * 40)
    assert len(rows(path)) == 5000


@pytest.mark.parametrize(
    "harm, line",
    [
        (lambda raw: raw[:-20], ""),
        (lambda raw: raw[:15], "1"),
        (lambda raw: raw[:-6] + bytes([raw[-6] ^ 255]) + raw[-5:], "5001"),  # the checksum
    ],
)
def test_damaged_gzip(tmp_path, harm, line):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(harm(gzip.compress(BERTHS)))
    refuses(lambda: rows(path), f"{path}:{line}", "cut off or damaged", "fetch the file again")


# ---- JSON


def test_json_errors_name_the_line_of_the_item(tmp_path):
    items = '[\n  ["a", "b"],\n  {"anchor": "a",\n   "positive": "b"},\n  ["c"]\n]'
    path = put(tmp_path / "a.json", items)
    assert [line for line, _ in rows(path)] == [2, 3, 5]
    path = put(tmp_path / "b.json", '["a", "b"]\n["c", "d"]\n')
    refuses(lambda: rows(path), f"{path}:2: not JSON", "name the file .jsonl")
    refuses(lambda: rows(put(tmp_path / "c.json", '{"a": 1}')), "c.json:1: ", "write a JSON list")
    # half a file cannot be parsed
    path = put(tmp_path / "d.json", b'[\n["a", "\xff"]]')
    refuses(lambda: rows(path, reject=Rejects(path, "skip")), "d.json:2: ", "not UTF-8")
    strange = [["[1, 2]", ", ]"], ["a", "b"]]
    path = put(tmp_path / "e.json", json.dumps(strange, indent=1))
    assert [row for _, row in rows(path)] == strange
    path = put(tmp_path / "f.jsonl", "[1]\n\n[2}\n")
    refuses(lambda: rows(path), f"{path}:3: not JSON (Expecting ',' delimiter at column 3)")
    path = put(tmp_path / "g.jsonl", '["Is it foggy?", "No\n')
    refuses(lambda: rows(path), "g.jsonl:1: not JSON (Unterminated string starting at column 18)")


# ---- tables


def test_tsv_quotes_are_text_and_csv_cells_run_over_lines(tmp_path):
    assert rows(put(tmp_path / "a.tsv", 'x\ty\n"a\tb"c\n')) == [(2, {"x": '"a', "y": 'b"c'})]
    path = put(tmp_path / "a.csv", 'x,y\n"two\nlines","say ""no"""\n\nq,\n')
    assert rows(path) == [(2, {"x": "two\nlines", "y": 'say "no"'}), (5, {"x": "q", "y": ""})]
    long = "tide " * 60_000  # 300 kB, above the csv module's own limit
    assert rows(put(tmp_path / "b.csv", f"x,y\na,{long}\n")) == [(2, {"x": "a", "y": long})]


@pytest.mark.parametrize(
    "text",
    [
        "x,y\na,b\n",
        "x;y\na;b\n",
        "x\ty\r\na\tb\r\n",
        "\ufeffx|y\na|b\n",
        "\n\nx,y\na,b\n",
        'x, y\n"a", "b"\n',
        '"sep=;"\nx;y\na;b\n',
    ],
)
def test_what_separates_the_cells(tmp_path, text):
    [(line, row)] = read_columns(put(tmp_path / "a.csv", text), ("x", "y"))
    assert row == {"x": "a", "y": "b"} and line == text.count("\n")


def test_table_errors(tmp_path):
    path = put(tmp_path / "a.tsv", "x\ty\na\tb\nc\td\te\n")
    refuses(lambda: rows(path), f"{path}:3: ", "3 cells where the header has 2")
    path = put(tmp_path / "d.csv", 'x,y\na,b\n\n"c,d\ne,f\n')
    refuses(lambda: rows(path), f"{path}:4: ", "not CSV")
    path = put(tmp_path / "e.tsv", "x;y\na;b\n")
    refuses(
        lambda: list(read_columns(path, ("x", "y"))),
        f"{path}:1: no column 'x' among x;y",
        "line 1 must name the columns",
        "separated by ';'",
    )
    path = put(tmp_path / "f.csv", b"x,y\nc\xff,d\ne,f\ng\n")
    refuses(lambda: rows(path), f"{path}:2: ", "not UTF-8")
    reject = Rejects(path, "skip")  # a line that was left out is still counted
    assert rows(path, reject=reject) == [(3, {"x": "e", "y": "f"})]
    assert [line for line, _ in reject.first] == [2, 4]


# ---- Parquet and datasets


@pytest.mark.parametrize("after", [0, 1, 4095, 4096, 4097, 8192, 8999, 9000])
def test_the_rows_above_a_number(tmp_path, after):
    records = [{"x": f"a{i}", "y": f"b{i}"} for i in range(9000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    dataset = datasets.Dataset.from_list(records)
    numbered = list(enumerate(records, 1))[after:]
    assert rows(path, after=after) == list(files.dataset_rows(dataset, after)) == numbered
    lines = put(tmp_path / "a.jsonl", records)
    assert rows(lines, after=after) == numbered


def test_parquet_batches_are_bounded_in_bytes(tmp_path, monkeypatch):
    long = "x " * 50_000
    coded = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 1000, pa.int32()), [long, long + "y"])
    plain = pa.array([f"p{i}" for i in range(2000)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": coded, "y": plain}), path, row_group_size=700)
    monkeypatch.setattr(files, "BATCH_BYTES", 2**20)
    sizes = [b.nbytes for b in files.parquet_batches(pq.ParquetFile(path), None)]
    assert max(sizes) <= 2**20 and len(sizes) < 2000 and path.stat().st_size < 100_000
    table = [row for _, row in rows(path)]
    assert [row["y"] for row in table] == plain.to_pylist() and table[1]["x"] == long + "y"
    # short rows first: the batch has grown when the long ones come
    skewed = pa.array(["a"] * 1500 + [long] * 500)
    pq.write_table(pa.table({"x": skewed, "y": plain}), path)
    assert [row["y"] for _, row in rows(path)] == plain.to_pylist()
    assert len(list(files.dataset_rows(datasets.Dataset(pq.read_table(path))))) == 2000


# ---- columns and texts


def test_columns_by_their_names(tmp_path):
    for name, content in (
        ("a.csv", "Base Sentence;id;MALE-sentence\na;7;b\n"),
        ("a.jsonl", [{"base.sentence": "a", "malesentence": "b", "id": "7"}]),
    ):
        path = put(tmp_path / name, content)
        [(_, row)] = read_columns(path, ("base_sentence", "male_sentence"), ("ID", "more"))
        assert row == {"base_sentence": "a", "male_sentence": "b", "ID": "7"}
    path = put(tmp_path / "b.jsonl", [{"x": 1, "y": 2}, {"x": 1}, [1, 2]])
    reject = Rejects(path, "skip")
    assert list(read_columns(path, ("x", "y"), reject=reject)) == [(1, {"x": 1, "y": 2})]
    assert "no column 'y' among x" in str(reject.first[0][1])
    assert "this is [1, 2]" in str(reject.first[1][1])
    refuses(lambda: read_columns(tmp_path / "no.csv", ("x",)), "no.csv: no such file")


@pytest.mark.parametrize(
    "row, column, text",
    [
        ("plain", "", "plain"),
        ({"_id": "d1", "title": "Fog", "text": "wait"}, "", "Fog wait"),
        ({"title": "", "Text": " wait"}, "", "wait"),
        ({"title": None, "text": "wait"}, "", "wait"),
        ({"title": "Fog", "text": "wait"}, "TITLE", "Fog"),
        ({"id": "3", "question": "q", "body": "b"}, "", "q"),
        ({"only": "one"}, "", "one"),
    ],
)
def test_the_text_of_a_row(tmp_path, row, column, text):
    assert list(read_texts(put(tmp_path / "a.jsonl", [row]), column)) == [(1, text)]


@pytest.mark.parametrize(
    "row, column, problem",
    [
        ([1], "", 'expected an object with a "text"'),
        ({"x": "a", "y": "b"}, "", "which column holds the texts is not clear"),
        ({"text": 5}, "", "there is no text in column 'text', but 5"),
        ({"text": "a"}, "body", "no column 'body' among text"),
        ({}, "", "the columns are none"),
    ],
)
def test_a_row_without_a_text(tmp_path, row, column, problem):
    path = put(tmp_path / "a.jsonl", ["fine", row])
    refuses(lambda: list(read_texts(path, column)), f"{path}:2: ", problem)


@pytest.mark.parametrize(
    "typed, address",
    [
        ("s3://desk/a.jsonl", "s3://desk/a.jsonl"),
        (Path("s3://desk/a.jsonl"), "s3://desk/a.jsonl"),  # pathlib takes a slash away
        ("hdfs:///data/a.jsonl", "hdfs:///data/a.jsonl"),  # no host: the one that is configured
        ("arrow_hdfs://host/a.jsonl", "arrow_hdfs://host/a.jsonl"),
        ("simplecache::s3://desk/a.jsonl", "simplecache::s3://desk/a.jsonl"),
        ("file:///tmp/a.jsonl", "file:///tmp/a.jsonl"),
    ],
)
def test_addresses_stay_as_they_were_typed(typed, address):
    assert str(as_path(typed)) == address
