"""`prepare`: bad lines are noted, none is lost, each dataset is as `read_examples` has it."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import BAD_ROWS, GOOD, put, refuses

from contrastive_st import data, files, store
from contrastive_st.data import load_source, prepare, read_examples, store_folder
from contrastive_st.store import REJECTS, SUMMARY, Store, text_identity

pytestmark = pytest.mark.usefixtures("quick_disk")


def entry(path, name="a", **more):
    return {"name": name, "path_or_hub_id": path, **more}


def one(tmp_path, path, **more) -> Store:
    "Prepare one dataset and open it."
    made = prepare([entry(path)], tmp_path / "out", progress=False, **more)
    opened = Store(store_folder(tmp_path / "out", "a"))
    assert made == {"a": opened.summary}
    return opened


def rejects(opened: Store) -> list[dict]:
    return [
        json.loads(line)
        for line in (opened.folder / REJECTS).read_text(encoding="utf-8").splitlines()
    ]


def rows(opened: Store) -> list[tuple]:
    return opened.rows(range(len(opened)))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def times(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def left(out: Path) -> list[str]:
    "What lies in a folder of stores, locks left out."
    return sorted(p.name for p in out.iterdir() if p.suffix not in (".lock", ".owner"))


# ---- bad rows and bad files


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_each_bad_row_is_noted_with_its_line(tmp_path, kind):
    raw, problem = BAD_ROWS[kind]
    path = put(
        tmp_path / "a.jsonl.gz",
        b'["Is it foggy?", "No."]\n\n' + raw + b'\n["Who calls?", "The tug."]\n' + raw + b"\n",
    )
    made = one(tmp_path, path)
    assert rows(made) == [("Is it foggy?", "No."), ("Who calls?", "The tug.")]
    found = rejects(made)
    assert [(r["line"], r["kind"]) for r in found] == [
        (n, "empty" if kind in ("empty text", "white text") else "malformed") for n in (3, 5)
    ]
    assert all(problem in r["problem"] for r in found)
    assert made.summary["rejected"][found[0]["kind"]] == 2
    refuses(
        lambda: prepare([entry(path)], tmp_path / "strict", "raise", progress=False),
        f"{path}:3: ",
        problem,
        "on_error='skip'",
    )
    assert not left(tmp_path / "strict")


@pytest.mark.parametrize(
    "name, content, line, problem",
    [
        ("a.tsv", b"anchor\tpositive\na\tb\nc\td\te\nf\tg\n", 3, "3 cells where the header has 2"),
        ("a.tsv", b"anchor\tpositive\na\tb\nc\t\xff\nf\tg\n", 3, "not UTF-8"),
        ("a.tsv", b"anchor\tpositive\na\tb\n\t\nf\tg\n", 3, "text 1 is empty"),
        ("a.csv", b'anchor,positive\na,b\n"c\nd",e,f\nf,g\n', 3, "3 cells"),
        # the record goes as a whole, its middle line alone would leave a wrong one
        ("a.csv", b'anchor,positive\na,b\n"c\n\xff\nd",e\nf,g\n', 3, "not UTF-8"),
        ("a.csv", b'anchor,positive\na,b\n"c\xff\nd",e\nf,g\n', 3, "not UTF-8"),
        ("a.json", b'[["a","b"],\n\n["c"],\n["f","g"]]', 3, "a list of 1"),
        ("a.jsonl", '["a", "b"]\n\ufeff["c", "d"]\n["f", "g"]\n'.encode(), 2, "not JSON"),
        # half a character in a name
        (
            "a.jsonl",
            b'["a", "b"]\n{"\\ud800": "c"}\n["f", "g"]\n',
            2,
            "no known pair of columns among",
        ),
        (
            "a.jsonl",
            b'["a", "b"]\n{"query": "c", "pos": ["d", ""]}\n["f", "g"]\n',
            2,
            "text 2 is empty",
        ),
        (
            "a.jsonl",
            b'["a", "b"]\n{"query": "c", "pos": []}\n["f", "g"]\n',
            2,
            "list of positives is empty",
        ),
        (
            "a.jsonl",
            b'["a", "b"]\n{"premise": "c", "hypothesis": "d", "label": 0}\n["f", "g"]\n',
            2,
            "judges the pairs",
        ),
        ("a.jsonl", b'["a", "b"]\n["c", NaN]\n["f", "g"]\n', 2, "not a string"),
        ("a.jsonl", b'["a", "b"]\n["c", "d"] ["e", "f"]\n["f", "g"]\n', 2, "not JSON"),
        ("a.jsonl", b'["a", "b"]\n["c\x00", "d"]\n["f", "g"]\n', 2, "not JSON"),
    ],
)
def test_bad_rows_of_each_format(tmp_path, name, content, line, problem):
    made = one(tmp_path, put(tmp_path / name, content))
    assert rows(made) == [("a", "b"), ("f", "g")]
    [found] = rejects(made)
    assert found["line"] == line and problem in found["problem"]
    assert found["kind"] == (
        "empty" if "is empty" in problem and "list" not in problem else "malformed"
    )
    refuses(
        lambda: prepare([entry(tmp_path / name)], tmp_path / "strict", "raise", progress=False),
        f"{tmp_path / name}:{line}: ",
        problem,
    )


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_bad_rows_of_parquet(tmp_path):
    n = 9000
    answers = [None if i in (5, 8999) else " " if i == 4096 else f"b{i}" for i in range(n)]
    made = one(
        tmp_path,
        table(
            tmp_path / "a.parquet",
            id=range(n),
            question=[f"a{i}" for i in range(n)],
            answer=answers,
        ),
    )
    expected = [(6, "malformed"), (4097, "empty"), (9000, "malformed")]
    assert [(r["line"], r["kind"]) for r in rejects(made)] == expected
    assert rows(made) == [(f"a{i}", b) for i, b in enumerate(answers) if b not in (None, " ")]


FILES = {
    "empty": ("a.jsonl", b"", "no example in this file"),
    "blank": ("a.jsonl", b"\n \n\n", "no example in this file"),
    "all bad": ("a.jsonl", b'["a"]\n7\n', "0 rows kept, 2 bad rows skipped"),
    "header only": ("a.tsv", b"anchor\tpositive\n", "no example in this file"),
    "wrong header": (
        "a.tsv",
        b"left\tright\tmiddle\na\tb\tc\n",
        ":1: no known pair of columns among left, right, middle",
    ),
    "no header": ("a.csv", b"Is it foggy?,No.\n", "columns=(0, 1) reads a table without a header"),
    "open quote": ("a.csv", b'anchor,positive\na,b\n"c,d\n', ":3: not CSV"),
    "no list": ("a.json", b'{"a": 1}', "write a JSON list"),
    "lines in json": ("a.json", b'["a", "b"]\n["c", "d"]\n', ":2: not JSON"),
    "broken json": ("a.json", b'[["a", "\xff"]]', ":1: "),
    "no gzip": ("a.jsonl.gz", None, "the content is not gzip"),
    "gzip": ("a.jsonl", gzip.compress(b'["a", "b"]\n'), "rename it to a.jsonl.gz"),
    "no parquet": ("a.parquet", b"PAR1", "not a Parquet file"),
    "unknown": ("a.docx", b"x", "the name must end in .jsonl"),
    "same rows": (
        "a.jsonl",
        b'["a", "b"]\n' * 3,
        "every row has the same texts, so there are no negatives",
    ),
    "same anchor": ("a.jsonl", b'["a", "b"]\n["a", "c"]\n', "every row has the same anchor"),
    "same but for case": ("a.jsonl", b'["a", "b"]\n["A ", "c"]\n', "every row has the same anchor"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_bad_file_is_named_and_leaves_no_store(tmp_path, kind, on_error):
    name, raw, problem = FILES[kind]
    path = put(tmp_path / name, raw) if raw is not None else tmp_path / name
    if raw is None:
        path.write_bytes(b'["a", "b"]\n')
    if kind == "all bad" and on_error == "raise":
        problem = ":1: a list of 1"
    refuses(
        lambda: prepare([entry(path)], tmp_path / "out", on_error, progress=False), path, problem
    )
    assert not (tmp_path / "out").exists() or not left(tmp_path / "out")


def test_one_bad_file_among_many_does_not_stop_the_others(tmp_path):
    wanted = [
        entry(put(tmp_path / "a.jsonl", GOOD), "a"),
        entry(tmp_path / "no.jsonl", "b"),
        entry(put(tmp_path / "c.jsonl", b""), "c"),
        entry(put(tmp_path / "d.jsonl", GOOD), "d"),
        entry(put(tmp_path / "e.jsonl", GOOD), "e", columns=("question",)),
    ]
    refuses(
        lambda: prepare(wanted, tmp_path / "out", progress=False),
        tmp_path / "no.jsonl",
        "no such file",
        tmp_path / "c.jsonl",
        "no example",
        "columns=('question',)",
    )
    assert left(tmp_path / "out") == ["a.store", "d.store"]


def test_a_cut_file_leaves_the_old_store(tmp_path):
    path = put(tmp_path / "a.jsonl.gz", GOOD)
    one(tmp_path, path)
    old = content(tmp_path / "out" / "a.store")
    path.write_bytes(path.read_bytes()[:-5])
    refuses(
        lambda: prepare([entry(path)], tmp_path / "out", progress=False),
        f"{path}:",
        "cut off or damaged",
    )
    assert content(tmp_path / "out" / "a.store") == old


def test_damaged_parquet_names_the_file(tmp_path):
    path = table(
        tmp_path / "a.parquet",
        anchor=[f"berth {i * 7919}" for i in range(20_000)],
        positive=[f"quay {i}" for i in range(20_000)],
    )
    raw = bytearray(path.read_bytes())
    raw[1000:60_000] = bytes(59_000)
    path.write_bytes(bytes(raw))
    refuses(
        lambda: prepare([entry(path)], tmp_path / "out", progress=False),
        path,
        "fetch or write it again",
    )


def test_a_file_that_cannot_be_read_is_not_called_a_folder_that_cannot_be_written(
    tmp_path, monkeypatch
):
    def fails(path, mode="r", **options):
        if path.name == "a.jsonl" and mode == "rb":
            raise OSError(errno.EIO, "Input/output error")
        return opens(path, mode, **options)

    opens = Path.open
    monkeypatch.setattr(Path, "open", fails)
    refuses(
        lambda: one(tmp_path, put(tmp_path / "a.jsonl", GOOD)),
        f"{tmp_path / 'a.jsonl'}:1: cannot be read (Input/output error)",
    )


LINES = st.lists(
    st.sampled_from(
        [
            b'["a", "b"]',
            b'["c", "d"]',
            '{"texts": ["é", "港口"]}'.encode(),
            b'{"query": "q", "pos": ["p", "r", "s"]}',
            b'{"anchor": "x", "positive": "y", "id": 3}',
            b"",
            b"  \t",
            b"\r",
            *(raw for raw, _ in BAD_ROWS.values()),
        ]
    ),
    max_size=40,
)


@given(LINES, st.integers(1, 6), st.sampled_from([b"\n", b"\r\n"]))
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost(tmp_path_factory, lines, shard_rows, end):
    "Lines that gave rows and rejected lines are all but the blank; the rows are read_examples'."
    folder = tmp_path_factory.mktemp("s")
    path = put(folder / "a.jsonl", end.join([b'["first", "row"]', b'["second", "line"]', *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_ROWS", shard_rows)
        made = one(folder, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rows(made) == list(read_examples(path, on_error="skip"))
    bad = [r["line"] for r in rejects(made)]
    kept = [n for n, row in files.read_rows(path, reject=lambda *bad: None) if n not in bad]
    assert sorted(bad + kept) == [
        n for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
    ]
    assert sum(made.summary["rejected"].values()) == len(bad) == len(set(bad))
    assert made.identities(range(len(made))).tolist() == [
        [text_identity(t) for t in row] for row in rows(made)
    ]


# ---- interrupted and continued, in each format


def mixed(n=34):
    "Rows of a list, several positives and faults at many places; as JSON values."

    def row(i):
        if i in (0, 5, 11, 12, 13, 20, n - 1):
            return ["only one"]
        if i in (9, 27):
            return ["a", " "]
        if i % 4 == 3:
            return {"query": f"q{i}", "pos": [f"p{i}", f"r{i}", f"s{i}"]}
        return [f"a{i} é", f"b{i}"]

    return [row(i) for i in range(n)]


def tsv(i):
    return "one cell" if i in (5, 11, 12, 13, 33) else f"\t{i}" if i == 9 else f"a{i}\tb{i}"


def csv(i):
    if i in (5, 11, 12, 13, 33):
        return '"one\ncell"'
    if i == 9:
        return '"",x'
    return f'"a{i}\nover ""lines""",b{i}' if i % 3 else f"a{i},b{i}"


THREE_A_LINE = ",\n".join(", ".join(map(json.dumps, mixed()[i : i + 3])) for i in range(0, 34, 3))
MIXED = {
    "a.jsonl": "\n\n".join(map(json.dumps, mixed())).encode(),
    "a.jsonl.gz": (
        "\n".join(map(json.dumps, mixed())).encode().replace(b'["only one"]', b'["\xff", "b"]')
    ),
    "a.json": json.dumps(mixed(), indent=1).encode(),
    "lines.json": f"[{THREE_A_LINE}]".encode(),
    "a.tsv": (
        "\n".join(["anchor\tpositive", *map(tsv, range(34))])
        .replace("a11\t", "a\udcff")
        .encode("utf-8", "surrogateescape")
    ),
    "a.csv": (
        "\n".join(["anchor,positive", *map(csv, range(34))])
        .replace("a17", "a\udcff")
        .encode("utf-8", "surrogateescape")
    ),
    "a.parquet": None,
}


def file_of(tmp_path, name):
    if MIXED[name] is not None:
        return put(tmp_path / name, MIXED[name])
    given = [row for row in mixed() if isinstance(row, dict) or len(row) == 2]
    return table(
        tmp_path / name,
        query=[r["query"] if isinstance(r, dict) else r[0] for r in given],
        pos=[r["pos"] if isinstance(r, dict) else [r[1]] for r in given],
    )


@pytest.fixture
def stops(monkeypatch):
    "stops(k): the reader is interrupted before its k-th row from now on; stops(None): never."
    real, at = data.read_rows, [None]

    def counted(*args):
        for k, item in enumerate(real(*args)):
            if k == at[0]:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(data, "read_rows", counted)
    return lambda k: at.__setitem__(0, k)


@pytest.mark.parametrize("name", MIXED)
def test_stopped_at_any_row_and_continued_is_the_same_store(tmp_path, monkeypatch, stops, name):
    monkeypatch.setattr(store, "SHARD_ROWS", 4)
    path = file_of(tmp_path, name)
    whole, out = one(tmp_path, path), tmp_path / "parts"
    assert len(whole.summary["shards"]) > 3
    assert name == "a.parquet" or sum(whole.summary["rejected"].values()) >= 6
    expected = content(whole.folder)
    for stop in range(34):
        stops(stop)
        try:
            prepare([entry(path)], out, progress=False)
        except KeyboardInterrupt:
            assert left(out) == ["a.store.part"]
        stops(None)
        prepare([entry(path)], out, progress=False)
        assert content(out / "a.store") == expected, stop
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "lines.json", "a.parquet"])
def test_stopped_again_and_again(tmp_path, monkeypatch, stops, name):
    "Each run gets five rows further than the last one stored."
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    path = file_of(tmp_path, name)
    whole = one(tmp_path, path)
    expected, out = content(whole.folder), tmp_path / "parts"
    for run in range(40):
        stops(12)
        try:
            prepare([entry(path)], out, progress=False)
        except KeyboardInterrupt:
            continue
        break
    assert 1 < run < 39 and content(out / "a.store") == expected


CHILD = """
import os, resource, signal, sys
from contrastive_st import data, store
store.SHARD_ROWS = 20
path, out, what, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if what == "kill":
    real = data.read_rows
    def rows(*args):
        for k, item in enumerate(real(*args)):
            if k == number: os.kill(os.getpid(), signal.SIGKILL)
            yield item
    data.read_rows = rows
if what == "size": resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
try: data.prepare([{"name": "a", "path_or_hub_id": path}], out, progress=False)
except ValueError as error: sys.exit(f"said: {error}")
"""


def child(path, out, what, number=0):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(out), what, str(number)],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_is_continued_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 20)
    path = put(
        tmp_path / "a.jsonl.gz",
        [[f"a{i}", f"b{i}"] if i % 7 else [f"a{i}", ""] for i in range(200)],
    )
    whole = content(one(tmp_path, path).folder)
    process = child(path, tmp_path / "killed", "kill", 130)
    assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    kept = times(tmp_path / "killed" / "a.store.part")
    assert left(tmp_path / "killed") == ["a.store.part"]
    assert len([p for p in kept if p.suffix == ".arrow"]) == 5
    prepare([entry(path)], tmp_path / "killed", progress=False)
    assert content(tmp_path / "killed" / "a.store") == whole
    now = {p.name: t for p, t in times(tmp_path / "killed" / "a.store").items()}
    assert all(now[p.name] == t for p, t in kept.items() if p.suffix == ".arrow")


def test_a_file_size_limit_stops_with_words_and_the_old_store_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 20)
    path = put(tmp_path / "a.jsonl", GOOD)
    old = content(one(tmp_path, path).folder)
    put(path, [[f"a{i}", "b" * (20 if i < 50 else 2000) + str(i)] for i in range(200)])
    process = child(path, tmp_path / "out", "size", 20_000)
    assert process.wait(60) == 1
    said = process.stderr.read()
    assert "said: " in said and "a.store: the disk is full (" in said and "File too large" in said
    assert "make room" in said and "Traceback" not in said
    assert content(tmp_path / "out" / "a.store") == old
    assert rows(Store(tmp_path / "out" / "a.store")) == GOOD
    kept = {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "a.store.part").glob("*.arrow")
    }
    assert len(kept) == 2
    made = one(tmp_path, path)
    assert len(made) == 200
    assert {name: (made.folder / name).stat().st_mtime_ns for name in kept} == kept


def test_no_space_for_the_rejects(tmp_path, monkeypatch):
    "The disk is full while a reject is noted: the folder is named, not the file that is read."
    path = put(tmp_path / "a.jsonl", [GOOD[0], GOOD[1], ["a"]])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def opened(*args, **more):
        with open(*args, **more) as file:
            yield SimpleNamespace(truncate=file.truncate, write=full)

    with monkeypatch.context() as patch:
        patch.setattr(store, "open", opened, raising=False)
        refuses(
            lambda: one(tmp_path, path),
            tmp_path / "out" / "a.store",
            "the disk is full (No space left on device); make room",
        )
    assert len(one(tmp_path, path)) == 2


def test_two_processes_at_once_make_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 20)
    path = put(tmp_path / "a.jsonl", [[f"a{i}", f"b{i}"] if i % 7 else ["a"] for i in range(4000)])
    whole = content(one(tmp_path, path).folder)
    both = [child(path, tmp_path / "both", "run") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0], [
        process.stderr.read() for process in both
    ]
    assert content(tmp_path / "both" / "a.store") == whole
    assert left(tmp_path / "both") == ["a.store"]


# ---- what is there


def test_a_second_run_does_nothing(tmp_path, monkeypatch):
    wanted = [entry(put(tmp_path / f"{n}.jsonl", [*GOOD, ["a"]]), n) for n in "abc"]
    first, before = prepare(wanted, tmp_path / "out", progress=False), times(tmp_path / "out")
    monkeypatch.setattr(data, "read_rows", lambda *args: pytest.fail("a file was read again"))
    assert prepare(wanted, tmp_path / "out", progress=False) == first
    assert times(tmp_path / "out") == before
    os.chmod(tmp_path / "out", 0o555)
    assert prepare(wanted, tmp_path / "out", progress=False) == first


def test_a_changed_file_is_prepared_again_and_the_old_store_serves_until_then(tmp_path, stops):
    path = put(tmp_path / "a.jsonl", GOOD)
    old = one(tmp_path, path)
    put(path, [(p, a) for a, p in GOOD])  # the same size
    os.utime(path, ns=(1, 1))
    stops(2)
    with pytest.raises(KeyboardInterrupt):
        prepare([entry(path)], tmp_path / "out", progress=False)
    assert rows(Store(old.folder)) == GOOD
    stops(None)
    assert rows(one(tmp_path, path)) == [(p, a) for a, p in GOOD]
    assert left(tmp_path / "out") == ["a.store"]


@pytest.mark.parametrize("change", [{"columns": (1, 0)}, {"on_error": "raise"}])
def test_other_options_make_another_store(tmp_path, change):
    path = put(tmp_path / "a.jsonl", GOOD)
    before = one(tmp_path, path).summary["origin"]
    columns, on_error = change.get("columns"), change.get("on_error", "skip")
    prepare([entry(path, columns=columns)], tmp_path / "out", on_error, progress=False)
    made = Store(tmp_path / "out" / "a.store")
    assert made.summary["origin"] != before
    assert rows(made) == ([(p, a) for a, p in GOOD] if columns else GOOD)


@pytest.mark.parametrize("harm", ["cut", "missing", "summary"])
def test_a_damaged_store_is_named_and_prepare_mends_it(tmp_path, harm):
    path = put(tmp_path / "a.jsonl", GOOD)
    folder = one(tmp_path, path).folder
    shard = folder / "shard-00000.arrow"
    if harm == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    if harm == "missing":
        shard.unlink()
    if harm == "summary":
        (folder / SUMMARY).write_text("{")
    refuses(
        lambda: load_source(folder),
        shard if harm != "summary" else folder / SUMMARY,
        "prepare the data again",
    )
    assert rows(one(tmp_path, path)) == GOOD and list(load_source(folder)) == GOOD


def test_stores_that_would_share_a_folder(tmp_path):
    path = put(tmp_path / "a.jsonl", GOOD)
    refuses(
        lambda: prepare(
            [entry(path, "x/a"), entry(path, "b"), entry(path, "x--a")],
            tmp_path / "out",
            progress=False,
        ),
        "'x/a', 'x--a' would share the store",
        "x--a.store",
        "rename one",
    )
    refuses(
        lambda: prepare([entry(path, "b")] * 2, tmp_path / "out", progress=False),
        "'b', 'b' would share the store",
    )
    assert not (tmp_path / "out").exists()
    prepare([entry(path, "../x/a.jsonl")], tmp_path / "out", progress=False)
    assert left(tmp_path / "out") == ["..--x--a.jsonl.store"]  # a name never leaves the folder


def test_a_folder_that_cannot_be_written(tmp_path):
    path = put(tmp_path / "a.jsonl", GOOD)
    refuses(
        lambda: prepare([entry(path)], path / "out", progress=False),
        "a.store: cannot be written",
        "choose a folder that you may write to",
    )
    refuses(
        lambda: prepare([entry(path, "x" * 300)], tmp_path / "out", progress=False),
        "(File name too long)",
    )
    refuses(lambda: prepare([entry(path)], tmp_path / "out", "ignore"), "on_error is 'ignore'")
    assert prepare([], tmp_path / "out", progress=False) == {}


# ---- several at once


def test_two_workers_do_what_one_does(tmp_path):
    wanted = [
        entry(
            put(tmp_path / f"{n}.jsonl", [*[(f"{n}{i}", f"p{i}") for i in range(50)], ["a"]]),
            f"sub/{n}",
        )
        for n in "abcd"
    ]
    one_by_one = prepare(wanted, tmp_path / "one", workers=1, progress=False)
    assert prepare(wanted, tmp_path / "two", workers=2, total=200, progress=True) == one_by_one
    assert list(one_by_one) == ["sub/a", "sub/b", "sub/c", "sub/d"]
    assert content(tmp_path / "one") == content(tmp_path / "two")
    bad = [
        *wanted,
        entry(tmp_path / "no.jsonl", "no"),
        entry(put(tmp_path / "e.jsonl", b""), "empty"),
    ]
    refuses(
        lambda: prepare(bad, tmp_path / "two", workers=2, progress=False),
        "no such file",
        "no example in this file",
    )


def test_progress_counts_every_row_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    counts, bars = Counter(), []

    class Bar(data.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            bars.append(self)

        def update(self, n=1):
            counts["rows"] += n

    monkeypatch.setattr(data, "tqdm", Bar)

    def looks_again(jobs, seconds, real=data.wait, looks=[]):
        "The parent looks three times more after all is done: nothing is counted twice."
        looks.append(real(jobs))
        return SimpleNamespace(not_done=len(looks) % 4)

    monkeypatch.setattr(data, "wait", looks_again)
    wanted = [
        entry(put(tmp_path / f"{n}.jsonl", [*GOOD, *[(str(i), n) for i in range(9)]]), n)
        for n in "ab"
    ]
    for workers in (1, 2):
        counts.clear()
        prepare(wanted, tmp_path / str(workers), workers=workers, total=24)
        assert counts["rows"] == 24 and bars[-1].total == 24


def test_many_stores_open_at_once(tmp_path):
    "As many as the largest published mixture has; each is a few system calls."
    folder = one(tmp_path, put(tmp_path / "a.jsonl", GOOD)).folder
    for i in range(290):
        shutil.copytree(folder, tmp_path / "many" / f"{i}.store")
    sources = [load_source(tmp_path / "many" / f"{i}.store") for i in range(290)]
    assert sum(map(len, sources)) == 870 and sources[289].name == "289" and sources[7][1] == GOOD[1]


# ---- hub datasets


@pytest.fixture
def hub(monkeypatch):
    "A stand-in for the hub: {id and configuration: dataset}."
    sets, asked = {}, []

    def load(*args, split):
        asked.append((*args, split))
        if args not in sets:
            raise ConnectionError("no network")
        return sets[args]

    monkeypatch.setattr(data.datasets, "load_dataset", load)
    return sets, asked


def test_hub_datasets(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 3000)
    sets, asked = hub
    n = 9000
    sets["owner/nli", "pair"] = datasets.Dataset.from_dict(
        {
            "id": range(n),
            "anchor": [f"a{i}" for i in range(n)],
            "positive": ["" if i == 4097 else f"b{i}" for i in range(n)],
        }
    )
    wanted = [
        entry("owner/nli/pair", "owner/nli/pair", split="dev"),
        entry(put(tmp_path / "a.jsonl", GOOD), "a"),
    ]
    made = prepare(wanted, tmp_path / "out", progress=False)
    assert asked == [("owner/nli", "pair", "dev")] and made["owner/nli/pair"]["rows"] == n - 1
    opened = Store(tmp_path / "out" / "owner--nli--pair.store")
    assert rejects(opened) == [
        {"line": 4098, "kind": "empty", "problem": "text 2 is empty; fill it in or delete the row"}
    ]
    assert opened.rows([0, 4096, 4097, n - 2]) == [
        (f"a{i}", f"b{i}") for i in (0, 4096, 4098, n - 1)
    ]
    before = times(tmp_path / "out")
    assert prepare(wanted, tmp_path / "out", progress=False) == made
    assert times(tmp_path / "out") == before
    # a new revision
    sets["owner/nli", "pair"] = datasets.Dataset.from_dict(
        {"anchor": ["x", "y"], "positive": ["z", "w"]}
    )
    assert prepare(wanted, tmp_path / "out", progress=False)["owner/nli/pair"]["rows"] == 2


def test_hub_faults(tmp_path, hub):
    sets, _ = hub
    sets["owner/judged",] = datasets.Dataset.from_dict(
        {"premise": ["a", "c"], "hypothesis": ["b", "d"], "label": [0, 1]}
    )
    refuses(
        lambda: prepare(
            [entry("owner/judged"), entry("owner/none", "b")], tmp_path / "out", progress=False
        ),
        "owner/judged",
        "'label' judges the pairs",
        "owner/none: no such file",
        "no network",
    )
    result = prepare(
        [entry("owner/judged", columns=("premise", "hypothesis"))], tmp_path / "out", progress=False
    )["a"]
    assert result["rows"] == 2


def test_a_hub_dataset_is_continued(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    sets, _ = hub
    sets["owner/set",] = datasets.Dataset.from_dict(
        {
            "question": [f"q{i}" for i in range(9)],
            "answer": [None if i in (3, 4) else f"a{i}" for i in range(9)],
        }
    )
    whole = content(one(tmp_path, "owner/set").folder)
    real, seen = data.dataset_rows, []

    def stopped(dataset, after):
        for row in real(dataset, after):
            if row[0] == 7:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(data, "dataset_rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare([entry("owner/set")], tmp_path / "parts", progress=False)
    monkeypatch.setattr(
        data, "dataset_rows", lambda dataset, after: seen.append(after) or real(dataset, after)
    )
    prepare([entry("owner/set")], tmp_path / "parts", progress=False)
    assert seen[0] >= 2 and content(tmp_path / "parts" / "a.store") == whole


# ---- the whole, against a plain list


def test_a_random_file_across_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 97)
    draw = random.Random(0)
    letters = "abc XYZ é\u0301港\U0001f6a2\u2028\u00a0ßﬁ"

    def text():
        return "".join(draw.choices(letters, k=draw.randrange(1, 60))) + "."

    given = [tuple(text() for _ in range(3)) for _ in range(1000)]
    source = load_source(one(tmp_path, put(tmp_path / "a.jsonl.gz", given)).folder)
    asked = draw.choices(range(1000), k=500)
    assert source.rows(asked) == [given[i] for i in asked] and list(source) == given
    assert source.identities(asked).tolist() == [
        [text_identity(t) for t in given[i]] for i in asked
    ]
    assert source.identities(np.array([], int)).shape == (0, 3)
    assert source.store.summary["distinct"]["anchor"] == len({text_identity(a) for a, *_ in given})


# ---- workers and their parent

SLOW = """
import sys, time
from contrastive_st import data, store
store.SHARD_ROWS = 20
real = data.read_rows
def rows(*args):
    for item in real(*args):
        time.sleep(0.01)
        yield item
data.read_rows = rows
if __name__ == "__main__":
    print("begun", flush=True)
    wanted = [{"name": n, "path_or_hub_id": f"{sys.argv[1]}/{n}.jsonl"} for n in "ab"]
    data.prepare(wanted, sys.argv[2], workers=2, progress=False)
"""


def children_of(pid: int) -> list[int]:
    "The living descendants of a process."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            child = int(path.parent.name)
            found += [child, *children_of(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_killed_parent(tmp_path, how):
    for n in "ab":
        put(tmp_path / f"{n}.jsonl", [[f"{n}{i}", f"p{i}"] for i in range(20_000)])
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.part/*.arrow"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    workers = children_of(process.pid)
    assert len(workers) >= 2 and process.poll() is None
    process.send_signal(how)
    process.wait(10)
    until = time.monotonic() + 3
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert process.stdout.read() == ""  # the pipe is closed: nobody holds it any more


# ---- looked at in full


def test_prepare_verifies_what_is_there(tmp_path):
    wanted = [entry(put(tmp_path / f"{n}.jsonl", [*GOOD, ["a"]]), n) for n in "ab"]
    out = tmp_path / "out"
    first = prepare(wanted, out, progress=False)
    expected = content(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(wanted, out, progress=False, verify=True) == first
    for name in ("shard-00000.arrow", "rejects.jsonl", "summary.json", "manifest.json"):
        path = out / "b.store" / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 16
        path.write_bytes(raw)
        for workers in (1, 2) if name == "rejects.jsonl" else (1,):
            path.write_bytes(raw)
            with (
                pytest.warns(UserWarning, match="b.store/.*written anew")
                if name in ("shard-00000.arrow", "rejects.jsonl")
                else nullcontext()
            ):
                assert prepare(wanted, out, progress=False, verify=True, workers=workers) == first
            assert content(out) == expected, name


def test_rows_with_other_numbers_of_negatives_are_kept_and_counted(tmp_path):
    path = put(
        tmp_path / "a.jsonl",
        [
            {"query": "q1", "pos": ["p1"], "neg": []},
            {"query": "q2", "pos": ["p2", "r2"], "neg": ["n", "m"]},
            {"query": "q3", "pos": ["p3"], "neg": ["k"]},
            {"query": "q4", "pos": "p4", "neg": None},
            {"query": "q5", "pos": ["p5"], "neg": ["x", "y", "z"]},
        ],
    )
    made = one(tmp_path, path)
    assert rows(made) == [
        ("q1", "p1", "p1", "p1"),
        ("q2", "p2", "n", "m"),
        ("q2", "r2", "n", "m"),
        ("q3", "p3", "k", "k"),
        ("q4", "p4", "p4", "p4"),
        ("q5", "p5", "x", "y"),
    ]
    assert made.summary["negatives"] == {"cut": 1, "repeated": 1, "none": 2}
    assert made.summary["rejected"] == {"malformed": 0, "empty": 0}
    with pytest.warns(
        UserWarning, match="1 had more and were cut, 1 had fewer and repeat theirs, 2 had none"
    ):
        load_source(made.folder)
    prepare([entry(path, negatives=1)], tmp_path / "one", progress=False)
    assert rows(Store(tmp_path / "one" / "a.store"))[5] == ("q5", "p5", "x")
    refuses(
        lambda: prepare([entry(path, negatives=-1)], tmp_path / "out", progress=False),
        "negatives is -1",
    )


def test_prepare_tells_what_it_wrote_and_what_it_compared(tmp_path):
    wanted = [entry(put(tmp_path / f"{n}.jsonl", GOOD), n) for n in "ab"]
    out = tmp_path / "out"
    for workers in (1, 2):
        made = prepare(wanted, out / str(workers), progress=False, workers=workers)
        assert made.written == ("a", "b") and made.verified == {}
    assert prepare(wanted, out / "1", progress=False).written == ()
    again = prepare(wanted, out / "1", progress=False, verify=True, workers=2)
    assert again.written == () and again == made and list(again.verified) == ["a", "b"]
    assert again.verified["a"]["files"] == 3 and again.verified["a"]["bytes"] > 1000
    shard = out / "1" / "b.store" / "shard-00000.arrow"
    os.truncate(shard, 100)
    with pytest.warns(UserWarning, match="shard-00000.arrow: .* damaged and is written anew"):
        assert prepare(wanted, out / "1", progress=False).written == ("b",)


def test_columns_that_are_not_read_are_said_at_each_opening(tmp_path):
    rows = [{"anchor": a, "positive": p, "note": f"n {a}", "id": "x1"} for a, p in GOOD]
    path = put(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        with pytest.warns(UserWarning, match="column note holds text that is not read") as caught:
            made = one(tmp_path, path)
        assert len(caught) == 1
    assert made.summary["remarks"] == {"unused": ["note"]}
    with pytest.warns(UserWarning, match="column note holds text"):
        load_source(made.folder)


def test_unknown_names_keep_their_order_when_a_run_is_continued(tmp_path, monkeypatch, stops):
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    one_way = [{"left": f"a{i}", "right": f"b{i}"} for i in range(4)]
    other_way = [{"right": f"b{i}", "left": f"a{i}"} for i in range(4, 8)]
    path = put(tmp_path / "a.jsonl", one_way + other_way)
    stops(6)
    with pytest.raises(KeyboardInterrupt):
        prepare([entry(path)], tmp_path / "out", progress=False)
    stops(None)
    with pytest.warns(UserWarning, match="'left' was taken as the anchor"):
        assert rows(one(tmp_path, path)) == [(f"a{i}", f"b{i}") for i in range(8)]


def test_a_saved_dataset_is_prepared(tmp_path):
    columns = {"question": [a for a, _ in GOOD], "answer": [p for _, p in GOOD]}
    saved = datasets.Dataset.from_dict(columns)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=saved, test=saved.select([2, 1])).save_to_disk(str(tmp_path / "two"))
    assert rows(one(tmp_path, tmp_path / "one")) == GOOD
    assert list(load_source(tmp_path / "one")) == list(read_examples(tmp_path / "one")) == GOOD
    made = prepare([entry(tmp_path / "two", split="test")], tmp_path / "out2", progress=False)
    assert made["a"]["rows"] == 2
    assert list(load_source(tmp_path / "two", split="test")) == [GOOD[2], GOOD[1]]
    refuses(lambda: load_source(tmp_path / "two", split="dev"), "no split 'dev', but train, test")
