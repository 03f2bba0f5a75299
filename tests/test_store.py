"""The store: what comes back is what went in, damage is named, numbers are a naive count's."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_st import store
from contrastive_st.atomic import write_manifest
from contrastive_st.store import (
    REJECTS,
    SUMMARY,
    TOKENS,
    Shards,
    Store,
    column_names,
    fit_negatives,
    is_current,
    summary_table,
    text_identity,
    verify,
    write_store,
    write_tokens,
)

ORIGIN = {"file": "a.jsonl", "bytes": 7}
WORDS = [
    *("tug", "Tug ", "é", "e\u0301", "Straße", "港口", "a\u2028b"),
    *("\U0001f6a2", "x" * 300, "\u0000", "\n", "q", "berth 4", "\u200f"),
]


pytestmark = pytest.mark.usefixtures("quick_disk")


def reader(lines, stop=None):
    "A `read` over lines: None is blank, a text a reject, a list rows; stopped before line `stop`."

    def read(after, reject):
        for n, line in enumerate(lines, 1):
            if n == stop:
                raise KeyboardInterrupt
            if n <= after or line is None:
                continue
            if isinstance(line, str):
                reject(n, line, f"line {n} is {line}: \u00fc")
            else:
                yield from ((n, row) for row in line)

    return read


def pairs(rows):
    "Lines of one row each."
    return [[tuple(row)] for row in rows]


def content(folder: Path) -> dict[str, bytes]:
    "All files of a folder."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


def small(monkeypatch, rows, characters=2**26):
    monkeypatch.setattr(store, "SHARD_ROWS", rows)
    monkeypatch.setattr(store, "SHARD_CHARACTERS", characters)


# ---- what goes in comes out


@pytest.mark.parametrize("width, shard_rows", [(2, 1), (2, 7), (3, 64), (5, 10**6)])
def test_rows_and_identities_are_those_of_a_list(tmp_path, monkeypatch, width, shard_rows):
    small(monkeypatch, shard_rows)
    draw = random.Random(width)
    rows = [
        tuple("".join(draw.choices(WORDS, k=3)) + str(i) for _ in range(width)) for i in range(200)
    ]
    made = write_store(tmp_path / "a.store", ORIGIN, reader(pairs(rows)))
    assert (len(made), made.columns) == (200, column_names(width))
    assert len(made.summary["shards"]) == -(-200 // shard_rows)
    for indices in (
        [draw.randrange(200) for _ in range(300)],
        range(200),
        np.arange(199, -1, -3),
        (0, 199, 0),
        np.array([5], np.int32),
    ):
        assert made.rows(indices) == [rows[i] for i in indices]
        ids = made.identities(indices)
        assert ids.dtype == np.int64
        assert ids.tolist() == [[text_identity(t) for t in rows[i]] for i in indices]
    for nothing in ([], (), range(0), np.array([], np.int64)):
        assert made.rows(nothing) == [] and made.identities(nothing).shape == (0, width)
        assert made.identities(nothing).dtype == np.int64
    for outside in ([200], [-1], [0, 200], [2**40]):
        for ask in (made.rows, made.identities):
            with pytest.raises(IndexError, match="of 200"):
                ask(outside)


def test_a_store_is_sent_to_another_process_closed(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    made = write_store(
        tmp_path / "a.store", ORIGIN, reader(pairs([(f"a{i}", f"b{i}") for i in range(9)]))
    )
    made.rows(range(9))  # all shards are mapped
    sent = pickle.dumps(made)
    assert len(sent) < 500 and pickle.loads(sent).rows([8, 0]) == [("a8", "b8"), ("a0", "b0")]
    shards = Shards(made.folder, made.summary["shards"])
    closed = pickle.dumps(shards)
    list(shards.find(range(9)))
    assert pickle.dumps(shards) == closed and len(pickle.loads(closed)) == 9


def test_a_thousand_shards_keep_no_file_open(tmp_path, monkeypatch):
    made = write_store(tmp_path / "a.store", ORIGIN, reader(pairs([("a", "b"), ("c", "d")])))
    [one] = made.summary["shards"]
    before = (
        len(os.listdir("/proc/self/fd"))
        if os.path.isdir("/proc/self/fd")
        else pytest.skip("no /proc here")
    )
    many = Shards(made.folder, [one] * 1000)
    assert sum(1 for _ in many.find(range(2000))) == 2000
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_line_with_several_rows_is_never_divided(tmp_path, monkeypatch):
    small(monkeypatch, 3)
    lines = [[(f"q{n}", f"p{n}-{k}") for k in range(n % 5)] or None for n in range(1, 30)]
    made = write_store(tmp_path / "a.store", ORIGIN, reader(lines))
    assert made.rows(range(len(made))) == [row for line in lines for row in line or ()]
    ends = np.cumsum([f["rows"] for f in made.summary["shards"]]).tolist()
    assert set(ends) <= set(np.cumsum([len(line or ()) for line in lines]).tolist())
    assert len(ends) > 5


def test_a_shard_also_ends_by_size(tmp_path, monkeypatch):
    small(monkeypatch, 10**6, 100)
    made = write_store(
        tmp_path / "a.store",
        ORIGIN,
        reader(pairs([("a" * 30, str(i)) for i in range(40)] + [("b" * 1000, "c")] + [("d", "e")])),
    )
    assert [f["rows"] for f in made.summary["shards"]] == [4] * 10 + [1, 1]


# ---- interrupted and continued

EVENTS = st.lists(
    st.one_of(
        st.none(),
        st.sampled_from(["malformed", "empty"]),
        st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), min_size=1, max_size=3),
    ),
    max_size=25,
)


@given(EVENTS, st.integers(1, 5), st.integers(10, 400), st.lists(st.integers(1, 27), max_size=4))
@settings(max_examples=60, deadline=None)
def test_interrupted_anywhere_and_continued_is_the_same_store(
    tmp_path_factory, lines, shard_rows, characters, stops
):
    "Byte for byte, the notes on rejected lines included."
    lines, folder = [[("first", "row")], *lines], tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch:
        small(patch, shard_rows, characters)
        write_store(folder / "whole.store", ORIGIN, reader(lines))
        for stop in stops:
            try:
                write_store(folder / "parts.store", ORIGIN, reader(lines, stop))
                break
            except KeyboardInterrupt:
                assert not (folder / "parts.store").exists()
        made = write_store(folder / "parts.store", ORIGIN, reader(lines))
    assert content(folder / "parts.store") == content(folder / "whole.store")
    rejected = [
        json.loads(line)
        for line in (made.folder / REJECTS).read_text(encoding="utf-8").splitlines()
    ]
    assert [(r["line"], r["kind"]) for r in rejected] == [
        (n, line) for n, line in enumerate(lines, 1) if isinstance(line, str)
    ]
    assert made.rows(range(len(made))) == [
        row for line in lines if isinstance(line, list) for row in line
    ]
    expected = [".parts.store.lock", ".whole.store.lock", "parts.store", "whole.store"]
    assert sorted(p.name for p in folder.iterdir()) == expected


@pytest.mark.parametrize("where", ["_summary", "_add_summary", "write_batch", "_text_arrays"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_interrupted_between_any_two_writes(tmp_path, monkeypatch, where, nth):
    small(monkeypatch, 4)
    lines = [[("a", str(n))] if n % 3 else "empty" for n in range(1, 20)]
    write_store(tmp_path / "whole.store", ORIGIN, reader(lines))
    real, calls = getattr(store, where), [0]

    def fails(*args, **more):
        calls[0] += 1
        if calls[0] == nth + 1:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(store, where, fails)
        try:
            write_store(tmp_path / "a.store", ORIGIN, reader(lines))
        except KeyboardInterrupt:
            assert not (tmp_path / "a.store").exists()
    write_store(tmp_path / "a.store", ORIGIN, reader(lines))
    assert content(tmp_path / "a.store") == content(tmp_path / "whole.store")


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    lines, told = pairs([(f"a{i}", f"b{i}") for i in range(10)]), []
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "a.store", ORIGIN, reader(lines, 8), on_progress=told.append)
    part = tmp_path / "a.store.part"
    kept = {p.name: p.stat().st_mtime_ns for p in part.glob("*.arrow")}
    assert told == [0, 2, 2, 2] and len(kept) == 3
    told.clear()
    write_store(tmp_path / "a.store", ORIGIN, reader(lines), on_progress=told.append)
    assert told == [6, 2, 2]
    assert {name: (tmp_path / "a.store" / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize(
    "harm", ["other origin", "no state", "bad state", "lost shard", "cut shard"]
)
def test_a_part_that_does_not_fit_is_begun_anew(tmp_path, monkeypatch, harm):
    small(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        write_store(
            tmp_path / "a.store", ORIGIN, reader(pairs([("old", str(i)) for i in range(9)]), 8)
        )
    part = tmp_path / "a.store.part"
    if harm == "no state":
        (part / "state.json").unlink()
    if harm == "bad state":
        (part / "state.json").write_text('{"origin":')
    if harm == "lost shard":
        (part / "shard-00001.arrow").unlink()
    if harm == "cut shard":
        os.truncate(part / "shard-00000.arrow", 100)
    rows = [("new", str(i)) for i in range(7)]
    made = write_store(
        tmp_path / "a.store",
        ORIGIN | ({"bytes": 8} if harm == "other origin" else {}),
        reader(pairs(rows)),
    )
    assert made.rows(range(len(made))) == rows and not part.exists()
    assert len(list(made.folder.glob("shard-*"))) == 4


# ---- killed at any file operation

FILE_EVENTS = set(
    """
    open os.rename os.remove os.mkdir os.rmdir os.truncate
    os.scandir shutil.rmtree ctypes.dlsym os.chmod
""".split()
)


def killed_at(k: int, folder: Path, call) -> bool:
    "Run call() in a child that dies at its k-th file operation below `folder`; False if it ended."
    child = os.fork()
    if child == 0:
        seen = [0]

        def hook(event, args):
            if event in FILE_EVENTS and (
                event == "ctypes.dlsym" or any(str(folder) in str(a) for a in args[:2])
            ):
                seen[0] += 1
                if seen[0] == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            call()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child is forked")
@pytest.mark.parametrize("first", [0, 1, 2])
def test_killed_at_any_file_operation_the_next_run_ends_with_the_same_bytes(
    tmp_path, monkeypatch, first
):
    "An older store is replaced; a third of the operations in each of three runs of this test."
    small(monkeypatch, 3)
    lines = [[("a", str(n))] if n % 4 else "empty" for n in range(1, 9)]
    write_store(tmp_path / "whole" / "a.store", {"bytes": 8}, reader(lines))
    expected, k, deaths = content(tmp_path / "whole" / "a.store"), first + 1, 0
    while True:
        folder = tmp_path / str(k)
        older(folder)
        if not killed_at(
            k, folder, lambda: write_store(folder / "a.store", {"bytes": 8}, reader(lines))
        ):
            break
        deaths, k = deaths + 1, k + 3
        if is_current(folder / "a.store", ORIGIN):
            assert Store(folder / "a.store").rows([0]) == [("old", "1")]
        made = write_store(folder / "a.store", {"bytes": 8}, reader(lines))
        assert content(made.folder) == expected and len(verify(made.folder)) == 6
        assert sorted(p.name for p in folder.iterdir()) == [".a.store.lock", "a.store"]
        shutil.rmtree(folder)
    assert deaths > 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child is forked")
def test_tokenising_killed_at_any_file_operation(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "whole.store")
    write_tokens(tmp_path / "whole.store", engine(), encode)
    expected, k = content(tmp_path / "whole.store"), 1
    while True:
        folder = tmp_path / str(k) / "a.store"
        shutil.copytree(texts, folder)
        write_tokens(folder, engine(fingerprint="older"), encode)
        if not killed_at(k, folder.parent, lambda: write_tokens(folder, engine(), encode)):
            break
        write_tokens(folder, engine(), encode)
        # a `prepare` that finds all up to date clears the rest away
        write_store(folder, ORIGIN, None)
        assert content(folder) == expected and verify(folder).tokenised["origin"] == engine()
        assert sorted(p.name for p in folder.parent.iterdir()) == [".a.store.lock", "a.store"]
        k += 7
    assert k > 60


def test_a_part_whose_notes_are_damaged_is_begun_anew(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    lines = [[("a", str(n))] if n % 3 else "empty" for n in range(1, 20)]
    write_store(tmp_path / "whole.store", ORIGIN, reader(lines))
    for key, wrong in (
        ("line", 11),
        ("rejects", 1),
        ("rows", [2, 2, 2]),
        ("negatives", {}),
        ("width", 3),
        ("seal", "0"),
    ):
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path / "a.store", ORIGIN, reader(lines, 15))
        state = json.loads((tmp_path / "a.store.part" / "state.json").read_text())
        state["notes"][key] = wrong
        (tmp_path / "a.store.part" / "state.json").write_text(json.dumps(state))
        write_store(tmp_path / "a.store", ORIGIN, reader(lines))
        assert content(tmp_path / "a.store") == content(tmp_path / "whole.store")
        shutil.rmtree(tmp_path / "a.store")


def test_a_part_whose_rejects_were_lost_is_begun_anew(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    lines = [[("a", str(n))] if n % 3 else "empty" for n in range(1, 20)]
    write_store(tmp_path / "whole.store", ORIGIN, reader(lines))
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "a.store", ORIGIN, reader(lines, 15))
    (tmp_path / "a.store.part" / REJECTS).write_text("")
    write_store(tmp_path / "a.store", ORIGIN, reader(lines))
    assert content(tmp_path / "a.store") == content(tmp_path / "whole.store")


# ---- the old store


def older(tmp_path):
    return write_store(tmp_path / "a.store", ORIGIN, reader(pairs([("old", "1"), ("old", "2")])))


def test_the_same_origin_is_not_written_twice(tmp_path):
    older(tmp_path)

    def read(*args):
        pytest.fail("it was read again")

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a.store").iterdir()}
    assert len(write_store(tmp_path / "a.store", dict(ORIGIN), read)) == 2
    assert is_current(tmp_path / "a.store", ORIGIN)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a.store").iterdir()} == before
    assert not is_current(tmp_path / "a.store", ORIGIN | {"bytes": 8})
    assert not is_current(tmp_path / "none", ORIGIN)


@pytest.mark.parametrize(
    "failure", [ValueError("line 3 is bad"), KeyboardInterrupt(), RuntimeError("x")]
)
@pytest.mark.parametrize("place", ["read", "check"])
def test_the_old_store_stays_whole_until_the_new_one_is(tmp_path, failure, place):
    old, rows = older(tmp_path), pairs([("new", "1"), ("new", "2")])

    def fail(*args):
        raise failure

    with pytest.raises(type(failure)):
        write_store(
            tmp_path / "a.store", {"bytes": 8}, fail if place == "read" else reader(rows), fail
        )
    assert (
        Store(tmp_path / "a.store").rows([0, 1]) == old.rows([0, 1]) == [("old", "1"), ("old", "2")]
    )
    # bad data: nothing to go on with
    assert (tmp_path / "a.store.part").exists() == (not isinstance(failure, ValueError))
    assert write_store(tmp_path / "a.store", {"bytes": 8}, reader(rows)).rows([0]) == [("new", "1")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.store.lock", "a.store"]


def remains(folder, harm):
    "What killed writers left, by name: this version and the one before it."
    old = folder / "a.store"
    left = {
        "old": folder / "a.store.old",
        "tmp": folder / "a.store.tmp",
        "aside": folder / ".a.store.old",
        "part": folder / "a.store.part",
        "inside": old / "summary.json.tmp",
        "partial": old / ".shard-00000.arrow.partial",
        "state": old / "state.json",
    }[harm]
    if harm in ("old", "aside", "part"):
        shutil.copytree(old, left)
    else:
        left.write_text("{}")
    return left


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("harm", ["old", "tmp", "aside", "part", "inside", "partial", "state"])
def test_leftovers_are_cleared_away_whether_or_not_the_store_is_current(tmp_path, harm, current):
    older(tmp_path)
    left = remains(tmp_path, harm)
    made = write_store(
        tmp_path / "a.store",
        ORIGIN if current else {"bytes": 8},
        reader(pairs([("new", "1"), ("new", "2")])),
    )
    assert made.rows([0]) == [("old" if current else "new", "1")] and not left.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.store.lock", "a.store"]
    assert verify(tmp_path / "a.store")


def test_a_link_to_a_store_stays_a_link(tmp_path):
    old = older(tmp_path)
    (tmp_path / "b.store").symlink_to(old.folder, target_is_directory=True)
    assert Store(tmp_path / "b.store").rows([1]) == [("old", "2")]
    for n in (8, 9):
        assert write_store(
            tmp_path / "b.store", {"bytes": n}, reader(pairs([("new", str(n)), ("b", "c")]))
        ).rows([0]) == [("new", str(n))]
    assert (tmp_path / "b.store").is_symlink()
    assert Store(tmp_path / "a.store").rows([0]) == [("new", "9")]


def test_a_file_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "a.store").write_text("mine")
    refuses(
        lambda: write_store(tmp_path / "a.store", ORIGIN, reader(pairs([("a", "b"), ("c", "d")]))),
        "a.store: is a file",
    )
    assert (tmp_path / "a.store").read_text() == "mine"


def test_an_open_store_that_is_replaced_never_mixes_old_and_new(tmp_path, monkeypatch):
    small(monkeypatch, 1)
    old = older(tmp_path)
    assert old.rows([0]) == [("old", "1")]
    write_store(
        tmp_path / "a.store",
        {"bytes": 8},
        reader(
            pairs(
                [("a new text that is longer", "1" * 99), ("a new text that is longer", "2" * 99)]
            )
        ),
    )
    assert old.rows([0]) == [("old", "1")]  # mapped before
    refuses(lambda: old.rows([1]), "shard-00001.arrow", "bytes instead of")


def test_a_current_store_is_opened_without_the_lock(tmp_path, monkeypatch):
    "A folder that can only be read will do, and nobody waits."
    older(tmp_path)
    monkeypatch.setattr(store, "lock", lambda *args, **more: pytest.fail("it was locked"))
    assert len(write_store(tmp_path / "a.store", ORIGIN, None)) == 2


def test_what_another_process_wrote_meanwhile_is_not_written_again(tmp_path, monkeypatch):
    real = store.lock

    def waited(path, wait):
        with monkeypatch.context() as patch:
            patch.setattr(store, "lock", real)
            older(tmp_path)
        return real(path, wait)

    monkeypatch.setattr(store, "lock", waited)

    def read(*args):
        pytest.fail("it was read again")

    assert write_store(tmp_path / "a.store", ORIGIN, read).rows([1]) == [("old", "2")]


# ---- the disk


@pytest.mark.parametrize(
    "code, todo",
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "that were finished are kept"),
        (errno.EACCES, "that you may write to"),
        (errno.EROFS, "that you may write to"),
    ],
)
def test_a_full_disk_is_said_in_words_and_the_next_run_goes_on(tmp_path, monkeypatch, code, todo):
    old, lines = older(tmp_path), pairs([("new", str(i)) for i in range(9)])
    small(monkeypatch, 2)
    real, count = store.write_batch, Counter()

    def full(*args, **more):
        count["shards"] += 1
        if count["shards"] == 4:
            raise OSError(code, os.strerror(code))
        real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_batch", full)
        refuses(
            lambda: write_store(tmp_path / "a.store", {"bytes": 8}, reader(lines)),
            tmp_path / "a.store",
            os.strerror(code),
            todo,
        )
    assert Store(tmp_path / "a.store").rows([1]) == old.rows([1]) == [("old", "2")]
    told = []
    made = write_store(tmp_path / "a.store", {"bytes": 8}, reader(lines), on_progress=told.append)
    assert told[0] == 6 and made.rows(range(9)) == [row for [row] in lines]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    refuses(
        lambda: write_store(tmp_path / "file" / "a.store", ORIGIN, reader([])),
        tmp_path / "file" / "a.store",
        "choose a folder that you may write to",
    )


# ---- damage


def test_a_shard_that_is_cut_missing_or_no_arrow_file(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    rows = [(f"a{i}", f"b{i}") for i in range(6)]
    folder = write_store(tmp_path / "a.store", ORIGIN, reader(pairs(rows))).folder
    shard, todo = folder / "shard-00001.arrow", "or delete this folder and prepare the data again"
    whole = shard.read_bytes()
    for harm in (whole[:-1], whole[:8], whole + b"\0", b"", None):
        shard.unlink(missing_ok=True)
        if harm is not None:
            shard.write_bytes(harm)
        refuses(
            lambda: Store(folder),
            shard,
            "is missing" if harm is None else f"{len(harm):,} bytes instead of {len(whole):,}",
            todo,
        )
        assert not is_current(folder, ORIGIN)
        # and preparing rebuilds it, and says why
        with pytest.warns(UserWarning, match="shard-00001.arrow: .* damaged and is written anew"):
            made = write_store(folder, ORIGIN, reader(pairs(rows)))
        assert made.rows([2]) == [rows[2]] and made.is_new
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # data that changed are no damage
            (folder / "shard-00000.arrow").write_bytes(b"")
            write_store(folder, ORIGIN | {"edition": 2}, reader(pairs(rows)))
            write_store(folder, ORIGIN, reader(pairs(rows)))
    shard.write_bytes(b"\0" * len(whole))  # the right size: found when it is read
    assert Store(folder).rows([0, 5]) == [rows[0], rows[5]]
    refuses(lambda: Store(folder).rows([3]), shard, "cannot be read", "prepare the data again")


SPOILED = [
    (None, "no summary.json, so this is no prepared dataset"),
    ("{", "cannot be read"),
    (b"\xff", "cannot be read"),
    ("[]", "holds a JSON list"),
    ("null", "holds a JSON NoneType"),
    ('{"format": 1}', "format 1, this version reads"),
    ("[" * 100_000, "RecursionError"),
    (f'{{"format": {store.FORMAT}}}', "bytes instead of"),
]


@pytest.mark.parametrize("text, said", SPOILED)
def test_a_summary_that_is_not_one(tmp_path, text, said):
    folder = older(tmp_path).folder
    (
        (folder / SUMMARY).unlink()
        if text is None
        else (folder / SUMMARY).write_bytes(text if isinstance(text, bytes) else text.encode())
    )
    refuses(lambda: Store(folder), folder, said, "prepare")
    assert not is_current(folder, ORIGIN)
    assert write_store(folder, ORIGIN, reader(pairs([("a", "b"), ("c", "d")]))).rows([0]) == [
        ("a", "b")
    ]


def test_a_store_without_a_manifest_was_never_finished(tmp_path):
    folder = older(tmp_path).folder
    (folder / "manifest.json").unlink()
    refuses(lambda: Store(folder), folder, "has no manifest.json", "prepare the data again")
    refuses(lambda: verify(folder), folder, "has no manifest.json")
    assert not is_current(folder, ORIGIN)


def test_no_store_at_all(tmp_path):
    refuses(
        lambda: Store(tmp_path / "none"), tmp_path / "none", "no prepared dataset", "prepare it"
    )


def flips(folder, number, seed=0):
    "Places in all files of a store: (file, byte, bit), most of them in the small files."
    draw = random.Random(seed)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    return [
        (path, draw.randrange(path.stat().st_size), draw.randrange(8))
        for _ in range(number)
        for path in [draw.choice(files)]
    ]


def flip(path, byte, bit):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def test_one_wrong_bit_anywhere_is_found_and_named(texts):
    write_tokens(texts, engine(), encode)
    with open(texts / "rejects.jsonl", "a") as file:
        file.write('{"line": 3, "kind": "empty", "problem": "x"}')
    aside = (texts / TOKENS).rename(texts.parent / "aside")  # tokens have a manifest of their own
    write_manifest(texts)
    aside.rename(texts / TOKENS)
    assert len(verify(texts)) == 50
    for path, byte, bit in flips(texts, 120):
        flip(path, byte, bit)
        with pytest.raises(ValueError) as caught:
            verify(texts)
        assert (
            str(path) in str(caught.value)
            or path.name == "manifest.json"
            and str(path.parent) in str(caught.value)
        ), (path, byte, bit)
        assert len(str(caught.value)) < 500 + len(str(texts))
        flip(path, byte, bit)
    assert len(verify(texts)) == 50


def test_every_bit_of_a_manifest_counts(texts):
    path = texts / "manifest.json"
    for byte in range(0, path.stat().st_size, 3):
        flip(path, byte, byte % 8)
        with pytest.raises(ValueError, match="a.store"):
            verify(texts)
        flip(path, byte, byte % 8)
    verify(texts)


@pytest.mark.parametrize("place", ["texts", "tokens"])
def test_a_damaged_store_is_written_anew_when_it_is_verified(texts, place):
    write_tokens(texts, engine(), encode)
    whole = {name: raw for name, raw in content(texts).items() if not name.startswith(TOKENS)}
    flip(texts / ("shard-00002.arrow" if place == "texts" else "tokens/shard-00002.arrow"), 200, 3)

    def never(*args):
        pytest.fail("it was read again")

    write_store(texts, ORIGIN, never)  # sizes are right: a quick look finds nothing
    with pytest.warns(
        UserWarning,
        match="shard-00002.arrow: has another digest.* "
        + ("written anew" if place == "texts" else "tokens are deleted"),
    ):
        made = write_store(
            texts, ORIGIN, reader(pairs(ROWS)) if place == "texts" else never, full=True
        )
    assert content(texts) == whole and made.tokenised is None
    assert verify(texts).rows([20]) == [ROWS[20]]


def shards_with_a_wrong_bit(texts, place):
    "Each bit of some bytes of a shard flipped in turn; yields the store, opened."
    path = texts / place
    for byte in range(8, path.stat().st_size, 23):
        flip(path, byte, byte % 8)
        yield path
        flip(path, byte, byte % 8)


def test_a_row_that_cannot_be_decoded_names_file_and_row(texts):
    path = texts / "shard-00001.arrow"
    raw = bytearray(path.read_bytes())
    at = raw.index("ppppp".encode())
    raw[at] = 0xFF
    path.write_bytes(raw)
    opened = Store(texts)
    with pytest.raises(ValueError, match=r"shard-00001.arrow: row \d+ is damaged") as caught:
        opened.rows(range(50))
    assert str(path) in str(caught.value) and "prepare the data again" in str(caught.value)


@pytest.mark.parametrize("place", ["shard-00003.arrow", "tokens/shard-00003.arrow"])
def test_reading_a_damaged_shard_gives_rows_or_a_sentence(texts, place):
    write_tokens(texts, engine(), encode)
    read = (
        (lambda s: s.rows(range(50)))
        if place.startswith("shard")
        else (lambda s: s.tokens(range(50)))
    )
    refused = 0
    for path in shards_with_a_wrong_bit(texts, place):
        try:
            assert len(read(Store(texts))) == 50
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 3


# ---- negatives of any number


def test_the_first_row_with_negatives_decides_the_width(tmp_path, monkeypatch):
    small(monkeypatch, 3)
    rows = [
        ("a", "p"),
        ("b", "q", "n", "m"),
        ("c", "r", "k"),
        ("d", "s", "1", "2", "3"),
        ("e", "t"),
    ]
    made = write_store(tmp_path / "a.store", ORIGIN, reader(pairs(rows)))
    expected = [
        ("a", "p", "p", "p"),
        ("b", "q", "n", "m"),
        ("c", "r", "k", "k"),
        ("d", "s", "1", "2"),
        ("e", "t", "t", "t"),
    ]
    assert made.rows(range(5)) == expected and made.columns == column_names(4)
    assert made.summary["negatives"] == {"cut": 1, "repeated": 1, "none": 2}
    assert (
        "1 had more and were cut, 1 had fewer and repeat theirs, 2 had none and hold their own"
        " positive" in summary_table({"a": made.summary})
    )
    told = []
    # shards without negatives are written before the first negative comes
    late = [*pairs([(f"a{i}", f"p{i}") for i in range(7)]), *pairs(rows)]
    made = write_store(tmp_path / "b.store", ORIGIN, reader(late), on_progress=told.append)
    assert made.rows(range(7, 12)) == expected and made.rows([0]) == [("a0", "p0", "p0", "p0")]
    assert sum(told) == 12
    assert made.summary["negatives"] == {"cut": 1, "repeated": 1, "none": 9}
    assert write_store(tmp_path / "c.store", ORIGIN, reader(pairs(rows)), negatives=1).rows(
        [1, 4]
    ) == [("b", "q", "n"), ("e", "t", "t")]
    assert write_store(
        tmp_path / "d.store", ORIGIN, reader(pairs(rows)), negatives=0
    ).columns == column_names(2)


@given(
    st.lists(st.lists(st.sampled_from("nmk"), max_size=4), min_size=1, max_size=20),
    st.integers(1, 4),
    st.lists(st.integers(1, 20), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_any_numbers_of_negatives_interrupted_anywhere(
    tmp_path_factory, negatives, shard_rows, stops
):
    rows = [(f"a{i}", f"p{i}", *own) for i, own in enumerate(negatives)]
    width = next((len(row) for row in rows if len(row) > 2), 2)
    folder = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch:
        small(patch, shard_rows)
        for stop in stops:
            try:
                write_store(folder / "a.store", ORIGIN, reader(pairs(rows), stop))
                break
            except KeyboardInterrupt:
                pass
        made = write_store(folder / "a.store", ORIGIN, reader(pairs(rows)))
        whole = write_store(folder / "b.store", ORIGIN, reader(pairs(rows)))
    assert content(made.folder) == content(whole.folder)
    assert made.rows(range(len(rows))) == [fit_negatives(row, width)[0] for row in rows]
    kinds = Counter(fit_negatives(row, width)[1] for row in rows)
    assert made.summary["negatives"] == {kind: kinds[kind] for kind in ("cut", "repeated", "none")}


def test_a_positive_in_the_place_of_a_negative_is_masked_for_its_anchor():
    from contrastive_st.loss import same_text

    rows = [fit_negatives(row, 4)[0] for row in [("a", "p"), ("b", "q", "n"), ("c", "r", "k", "m")]]
    same = same_text(torch.tensor([[text_identity(text) for text in row] for row in rows]))
    B, K = 3, 2
    hard = same[:, B:].reshape(B, B, K)
    assert hard[0, 0].all()  # the own positive, twice, is no negative of its anchor
    assert not hard[1, 1].any() and not hard[2, 2].any()  # real negatives stay, repeated ones too
    assert not same[0, 0]  # and the positive itself is kept


# ---- the summary


def naive(rows, lines):
    "The summary's counts, in plain Python."
    ids = [tuple(map(text_identity, row)) for row in rows]

    def lengths(column):
        n = sorted(len(row[column]) for row in rows)
        return {
            "mean": round(sum(n) / len(n), 1),
            "median": n[(len(n) + 1) // 2 - 1],
            "p95": n[-(-len(n) * 95 // 100) - 1],
            "longest": n[-1],
        }

    names = column_names(len(rows[0]))
    return {
        "rows": len(rows),
        "rejected": {kind: lines.count(kind) for kind in ("malformed", "empty")},
        "duplicate_rows": len(ids) - len(set(ids)),
        "distinct": {name: len({i[c] for i in ids}) for c, name in enumerate(names)},
        "characters": {name: lengths(c) for c, name in enumerate(names)},
    }


@given(
    st.integers(2, 4).flatmap(
        lambda C: st.lists(
            st.one_of(
                st.sampled_from(["malformed", "empty"]),
                st.lists(st.tuples(*[st.sampled_from(WORDS)] * C), min_size=1, max_size=2),
            ),
            max_size=40,
        )
    ),
    st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_the_summary_is_a_naive_count(tmp_path_factory, lines, shard_rows):
    rows = [row for line in lines if isinstance(line, list) for row in line]
    if not rows:
        return
    with pytest.MonkeyPatch.context() as patch:
        small(patch, shard_rows)
        made = write_store(tmp_path_factory.mktemp("s") / "a.store", ORIGIN, reader(lines))
    expected = naive(rows, lines)
    assert {key: made.summary[key] for key in expected} == expected


@given(
    st.lists(
        st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=30).map(
            lambda n: np.array(n, np.uint64)
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 40),
)
def test_distinct_counts_are_exact_in_any_number_of_passes(parts, at_once):
    assert store.count_distinct(lambda: iter(parts), sum(map(len, parts)), at_once) == len(
        {n for part in parts for n in part.tolist()}
    )


def test_rows_of_the_same_texts_in_another_order_are_no_duplicates(tmp_path):
    rows = [("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a"), ("a", "c", "b"), ("A ", "b", "c")]
    assert (
        write_store(tmp_path / "a.store", ORIGIN, reader(pairs(rows))).summary["duplicate_rows"]
        == 1
    )


def test_very_long_texts_are_counted(tmp_path):
    made = write_store(
        tmp_path / "a.store", ORIGIN, reader(pairs([("a" * 70_000, "b"), ("a" * 2**17, "c")]))
    )
    assert made.summary["characters"]["anchor"] == {
        "mean": (70_000 + 2**17) / 2,
        "median": 65_535,
        "p95": 65_535,
        "longest": 2**17,
    }


def test_the_table(tmp_path):
    made = write_store(
        tmp_path / "a.store",
        ORIGIN,
        reader([*pairs([("a", "bb"), ("a", "bb"), ("c", "d")]), "empty", "malformed", "empty"]),
    )
    clean = made.summary | {"rejected": {"malformed": 0, "empty": 0}}
    head, *lines, total = summary_table({"harbour/a.jsonl": made.summary, "b": clean}).splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["harbour/a.jsonl", "3", "2", "3", "2", "1"],
        ["b", "3", "2", "0", "0", "1"],
    ]
    assert lines[0].endswith("  1/1/1  2/2/2") and head.startswith("dataset")
    assert max(map(len, [head, *lines, total])) <= 100
    assert total.startswith("2 datasets, 6 rows; 3 bad lines left out") and REJECTS in total
    assert summary_table({"b": clean}).endswith("1 dataset, 3 rows; no line was left out")
    assert summary_table({}).endswith("0 datasets, 0 rows; no line was left out")


# ---- tokens beside the texts


def encode(texts):
    "Characters as tokens, cut at 5."
    ids = [[ord(c) for c in text[:5]] for text in texts]
    return (
        np.array([i for text in ids for i in text], np.int64),
        np.array(list(map(len, ids)), np.int64),
        np.array([len(text) > 5 for text in texts]),
    )


def engine(vocabulary=256, fingerprint="f"):
    return {"fingerprint": fingerprint, "tokenizer": "t", "max_length": 5, "vocabulary": vocabulary}


ROWS = [(f"anchor {i}"[i % 4 :], "p" * (i % 7 + 1), f"n{i}") for i in range(50)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    small(monkeypatch, 7)
    return write_store(tmp_path / "a.store", ORIGIN, reader(pairs(ROWS))).folder


@pytest.mark.parametrize(
    "vocabulary, kind", [(256, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_tokens_are_those_of_the_texts(texts, vocabulary, kind):
    assert Store(texts).tokenised is None
    refuses(lambda: Store(texts).tokens([0]), texts / TOKENS, "no summary.json", "prepare it")
    write_tokens(texts, engine(vocabulary), encode)
    made, draw = Store(texts), random.Random(0).choices(range(50), k=80)
    assert made.tokenised["origin"] == engine(vocabulary) and made.tokens([]) == []
    for i, (*ids, a, b, c) in zip(draw, made.tokens(draw)):
        assert ["".join(map(chr, np.frombuffer(n, kind))) for n in ids] == [
            text[:5] for text in ROWS[i]
        ]
        assert [a, b, c] == [len(text) > 5 for text in ROWS[i]]
    assert made.tokenised["truncated"] == {
        name: sum(len(row[c]) > 5 for row in ROWS) for c, name in enumerate(made.columns)
    }
    assert made.rows(draw) == [ROWS[i] for i in draw]
    assert {f["name"] for f in made.tokenised["shards"]} == {
        f["name"] for f in made.summary["shards"]
    }
    with pytest.raises(IndexError):
        made.tokens([50])


def test_ids_at_the_end_of_16_bits(texts):
    def last(texts):
        return (
            np.full(len(texts), 2**16 - 1),
            np.ones(len(texts), np.int64),
            np.zeros(len(texts), bool),
        )

    write_tokens(texts, engine(2**16), last)
    assert Store(texts).tokens([3])[0][:3] == (b"\xff\xff",) * 3


def test_tokenising_goes_on_where_it_stopped_and_is_not_done_twice(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "whole.store")
    write_tokens(tmp_path / "whole.store", engine(), encode)
    calls, told = Counter(), []

    def interrupted(texts):
        calls["now"] += 1
        if calls["now"] == 8:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        write_tokens(texts, engine(), interrupted)
    assert Store(texts).tokenised is None
    calls.clear()

    def counted(texts):
        calls["now"] += 1
        return encode(texts)

    write_tokens(texts, engine(), counted, told.append)
    assert calls["now"] == 3 * 6 and sum(told) == 50  # two of eight shards were there
    assert content(texts / TOKENS) == content(tmp_path / "whole.store" / TOKENS)

    def none(texts):
        pytest.fail("tokenised again")

    write_tokens(texts, engine(), none)


def test_another_tokenizer_replaces_the_tokens_when_it_is_done(texts):
    write_tokens(texts, engine(), encode)

    def upper(texts):
        return encode([text.upper() for text in texts])

    def fails(texts):
        raise ValueError("text 3 has no token")

    refuses(lambda: write_tokens(texts, engine(fingerprint="g"), fails), "text 3 has no token")
    assert str(Store(texts).tokens([1])[0][0], "utf-16-le") == ROWS[1][0][:5]
    assert not (texts / "tokens.part").exists()
    write_tokens(texts, engine(fingerprint="g"), upper)
    assert str(Store(texts).tokens([1])[0][0], "utf-16-le") == ROWS[1][0][:5].upper()
    assert sorted(p.name for p in texts.iterdir() if p.is_dir()) == ["tokens"]


@pytest.mark.parametrize("harm", ["cut", "gone", "bad summary"])
def test_damaged_tokens_are_named_and_made_again(texts, harm):
    write_tokens(texts, engine(), encode)
    shard = texts / TOKENS / "shard-00002.arrow"
    if harm == "cut":
        os.truncate(shard, 10)
    if harm == "gone":
        shard.unlink()
    if harm == "bad summary":
        (texts / TOKENS / SUMMARY).write_text("{")
    refuses(
        lambda: Store(texts).tokens([20]),
        shard if harm != "bad summary" else texts / TOKENS / SUMMARY,
        "prepare the data again",
    )
    assert Store(texts).rows([20]) == [ROWS[20]]  # the texts are whole
    with pytest.warns(UserWarning, match="the tokens were damaged and are written anew"):
        write_tokens(texts, engine(), encode)
    assert str(Store(texts).tokens([20])[0][0], "utf-16-le") == ROWS[20][0][:5]


def test_a_full_disk_while_tokenising(texts, monkeypatch):
    write_tokens(texts, engine(), encode)
    with monkeypatch.context() as patch:
        patch.setattr(
            pa,
            "OSFile",
            lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        )
        refuses(
            lambda: write_tokens(texts, engine(fingerprint="g"), encode),
            texts / TOKENS,
            "No space left",
            "make room",
        )
    assert Store(texts).tokenised["origin"] == engine()
    assert len(Store(texts).tokens(range(50))) == 50


def test_preparing_the_texts_again_drops_the_tokens(texts):
    write_tokens(texts, engine(), encode)
    assert (
        write_store(texts, {"bytes": 8}, reader(pairs([("x", "y"), ("z", "w")]))).tokenised is None
    )


# ---- what writing says


def test_a_damaged_store_is_reported_without_an_order(texts):
    flip(texts / "shard-00002.arrow", 200, 3)
    with pytest.warns(UserWarning) as caught:
        write_store(texts, ORIGIN, reader(pairs(ROWS)), full=True)
    [message] = [str(w.message) for w in caught]
    assert message.endswith("; the store was damaged and is written anew")
    assert "delete" not in message and "shard-00002.arrow: has another digest" in message


def test_a_store_knows_whether_it_was_written_and_what_was_compared(texts):
    made = write_store(texts, ORIGIN, reader(pairs(ROWS)))
    assert not made.is_new and made.verified == {}
    made = write_store(texts, ORIGIN, reader(pairs(ROWS)), full=True)
    files = json.loads((texts / "manifest.json").read_text())["files"]
    size = sum((texts / name).stat().st_size for name in files)
    assert not made.is_new and made.verified == {"files": len(files), "bytes": size}
    assert write_store(texts, ORIGIN | {"edition": 2}, reader(pairs(ROWS))).is_new


def test_remarks_of_a_killed_run_are_those_of_an_undisturbed_one(tmp_path, monkeypatch):
    small(monkeypatch, 2)
    found = {3: "x", 7: "y"}

    def read(remarks, stop=99):
        def lines(after, reject):
            for n in range(after + 1, 10):
                if n == stop:
                    raise KeyboardInterrupt
                if n in found:
                    remarks.setdefault("unused", []).append(found[n])
                    remarks["unused"] = sorted(set(remarks["unused"]))
                yield n, (f"a{n}", f"b{n}")

        return lines

    def write(name, stop=99):
        remarks = {}
        lines = read(remarks, stop)
        return write_store(tmp_path / name, ORIGIN, lines, remarks=remarks)

    with pytest.raises(KeyboardInterrupt):
        write("a", 6)
    assert write("a").summary["remarks"] == write("b").summary["remarks"] == {"unused": ["x", "y"]}
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_wide_rows_are_bounded_in_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_TEXTS", 1000)
    many = [(f"a{i}", f"b{i}") for i in range(40)] + [("c", "d", *"n" * 98)]
    with pytest.warns(UserWarning, match="line 41: is the first row with negatives and has 98"):
        made = write_store(tmp_path / "a.store", ORIGIN, reader(pairs(many)))
    assert {f["rows"] for f in made.summary["shards"]} == {10, 1}  # ten rows of a hundred texts
    assert made.rows([40]) == [many[40]] and len(made.columns) == 100


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = write_store("~/a.store", ORIGIN, reader(pairs(ROWS)))
    assert made.folder == tmp_path / "a.store" and not (tmp_path / "~").exists()
    assert is_current("~/a.store", ORIGIN) and len(verify("~/a.store")) == len(ROWS)
    write_tokens("~/a.store", engine(), encode)
    assert Store("~/a.store").tokenised and store.expanded("~no-body/a") == Path("~no-body/a")
