"""Files and folders are whole or not there: kills, full disks, two writers, odd names, damage."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import xxhash
from conftest import ROOT
from faults import killer, sweep

from contrastive_st import atomic
from contrastive_st.atomic import (
    Damaged,
    Part,
    check_folder,
    expanded,
    is_whole,
    lock,
    new_file,
    new_folder,
    read_json,
    write_json,
    write_text,
)


def start(code, *args):
    "Run Python code in a process of its own."
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process):
    "What it printed; it must have ended well."
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def fill(folder, word="new"):
    (folder / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt"):
        (folder / name).write_text(word * 1000)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.fixture
def made(tmp_path):
    "A whole folder."
    with new_folder(tmp_path / "made") as beside:
        fill(beside)
    return tmp_path / "made"


# ---- killed, and out of room ----


@pytest.mark.skipif(bool(killer.missing()), reason=killer.missing())
@pytest.mark.parametrize("name", sweep.ATOMS)
def test_killed_anywhere_twice_and_on_full_disks(atom_servers, name):
    result = sweep.sweep(atom_servers, name, most=30, second=6, disks=3)
    assert not result["failures"], sweep.reasons(result)


@pytest.fixture(scope="module")
def atom_servers():
    with sweep.servers_for(1) as servers:
        yield servers


@pytest.fixture
def short_files():
    "No file of this process may grow beyond 100 kB."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow(tmp_path, short_files):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError, match="a.txt: the disk is full .*make room"):
        write_text(tmp_path / "a.txt", "x" * 200_000)
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_whose_files_may_not_grow(made, short_files):
    with pytest.raises(ValueError, match="made: the disk is full"), new_folder(made) as beside:
        (beside / "a.txt").write_text("x" * 200_000)
    check_folder(made)
    assert names(made.parent) == ["made"]


def test_an_error_inside_leaves_what_was_there(made):
    with pytest.raises(KeyboardInterrupt), new_folder(made) as beside:
        (beside / "a.txt").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), new_file(made / "a.txt") as beside:
        beside.write_text("half")
        1 / 0
    check_folder(made)
    assert names(made.parent) == ["made"] and names(made) == ["a.txt", "deep", "manifest.json"]


# ---- two at a time ----

TAKE_TURNS = """
import sys
from contrastive_st.atomic import lock, new_folder
word, path, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
for _ in range(turns):
    with lock(path, wait=True), new_folder(path) as beside:
        for name in "abc":
            (beside / name).write_text(word * 20_000)
"""


def test_two_replace_a_folder_in_turns_while_a_third_reads(tmp_path):
    path = tmp_path / "made"
    with new_folder(path) as beside:
        for name in "abc":
            (beside / name).write_text("z" * 20_000)
    writers = [start(TAKE_TURNS, word, path, 25) for word in "xy"]
    reads, mixed = 0, 0
    while any(writer.poll() is None for writer in writers):
        assert is_whole(path)
        for name in "abc":
            text = (path / name).read_text()
            # each file is whole, whoever wrote it
            assert len(text) == 20_000 and len(set(text)) == 1
        # a reader of several files may see some of each version, and is told
        with suppress(Damaged):
            check_folder(path)
            mixed -= 1
        reads, mixed = reads + 1, mixed + 1
    for writer in writers:
        said(writer)
    check_folder(path)
    assert reads > 3 and mixed < reads and names(tmp_path) == ["made"]


WRITE_OFTEN = """
import sys
from contrastive_st.atomic import write_text
for _ in range(60):
    write_text(sys.argv[2], sys.argv[1] * 50_000)
"""


def test_two_write_a_file_without_a_lock(tmp_path):
    "Without a lock a writer may be refused, but nobody reads half a file."
    path = tmp_path / "record.txt"
    write_text(path, "z" * 50_000)
    writers = [start(WRITE_OFTEN, word, path) for word in "xy"]
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert len(text) == 50_000 and len(set(text)) == 1
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert writer.returncode == 0 or "ValueError: " + str(path) in err, err


HOLD = """
import sys, time
from contrastive_st.atomic import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_who_holds_it_and_dies_with_them(tmp_path):
    path = tmp_path / "made"
    holder = start(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"made: process {holder.pid} on .* is writing it; wait"):
        with lock(path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lock(path):
        assert not path.exists()
    with lock(path):
        pass
    assert names(tmp_path) == []


def test_a_lock_is_held_against_this_process_too(tmp_path):
    with lock(tmp_path / "made"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        with lock(tmp_path / "made"):
            pass


def test_who_waits_for_a_lock_gets_it(tmp_path):
    path = tmp_path / "made"
    code = HOLD.replace("lock(sys.argv[1])", "lock(sys.argv[1], wait=True)").replace("60", "0")
    with lock(path):
        waiting = start(code, path)
        time.sleep(0.5)
        assert waiting.poll() is None
    assert said(waiting) == "held\n"


# ---- links, permissions, names ----


def test_a_link_stays_one(tmp_path, made):
    (tmp_path / "link").symlink_to(made)
    with new_folder(tmp_path / "link") as beside:
        fill(beside, "newer")
    assert (tmp_path / "link").is_symlink() and (made / "a.txt").read_text().startswith("newer")
    (tmp_path / "b.txt").symlink_to(made / "a.txt")
    write_text(tmp_path / "b.txt", "through the link")
    assert (tmp_path / "b.txt").is_symlink() and (made / "a.txt").read_text() == "through the link"


def test_a_hard_link_keeps_the_older_content(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    os.link(tmp_path / "a.txt", tmp_path / "backup.txt")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "backup.txt").read_text() == "old"


def test_what_a_user_keeps_in_a_folder_is_carried_over(made):
    (made / "README.md").write_text("mine")
    (made / ".git" / "objects").mkdir(parents=True)
    (made / ".git" / "objects" / "x").write_text("object")
    (made / "link").symlink_to("/dev/zero")
    with new_folder(made, carry=True) as beside:
        (beside / "c.txt").write_text("new")
    assert names(made) == [".git", "README.md", "c.txt", "link", "manifest.json"]
    assert (made / "link").is_symlink()
    assert (made / ".git" / "objects" / "x").read_text() == "object"
    assert list(check_folder(made)) == ["c.txt"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        with new_folder(tmp_path / "made") as beside:
            (beside / "secret").touch(mode=0o600)
    finally:
        os.umask(before)
    paths = (tmp_path / "a.txt", tmp_path / "made" / "secret", tmp_path / "made" / "manifest.json")
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode] * 3


@pytest.mark.parametrize(
    "name",
    [
        *("a b", "тест", "ü" * 60, "日本語", "-rf", ".hidden"),
        *("a\nb", "x" * 200, "🙂.json", "a.partial", "a.part"),
    ],
)
def test_odd_names(tmp_path, name):
    write_text(tmp_path / name, "text")
    with lock(tmp_path / f"{name}d"), new_folder(tmp_path / f"{name}d") as beside:
        (beside / name).write_text("x")
    part = Part(tmp_path / f"{name}p", 1)
    part.add(name, lambda beside: beside.write_text("y"))
    part.finish()
    for folder in (tmp_path / f"{name}d", tmp_path / f"{name}p"):
        assert list(check_folder(folder)) == [name]
    assert len(names(tmp_path)) == 3 and (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x"),
        lambda path: write_json(path, {}),
        lambda path: new_folder(path).__enter__(),
        lambda path: lock(path).__enter__(),
        lambda path: Part(path, 1),
    ],
    ids=["write_text", "write_json", "new_folder", "lock", "Part"],
)
@pytest.mark.parametrize("place", ["a file/x", "/proc/nowhere/x", "n" * 300])
def test_where_nothing_can_be_written(tmp_path, write, place):
    (tmp_path / "a file").write_text("")
    with pytest.raises(
        ValueError, match="cannot be written .*choose a folder|too long for the name"
    ):
        write(tmp_path / place)
    assert names(tmp_path) == ["a file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(made):
    made.parent.chmod(0o500)
    try:
        with (
            pytest.raises(ValueError, match="cannot be written .Permission denied"),
            new_folder(made),
        ):
            pass
    finally:
        made.parent.chmod(0o700)
    check_folder(made)


def test_a_file_where_a_folder_should_be(tmp_path):
    write_text(tmp_path / "made", "x")
    with pytest.raises(ValueError, match="made: is a file"), new_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made").read_text() == "x"


# ---- JSON ----


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "JSONDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"9" * 5000, "ValueError|int"),
        (b"\x00" * 100, "JSONDecodeError"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_that_cannot_be_read(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*({reason}).*; restore the file") as error:
        read_json(tmp_path / "a.json")
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="a.json: cannot be read .No such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is not a file"):
        read_json(tmp_path)


def test_json_survives(tmp_path):
    value = {"ü": [1, 2.5, None, "🙂\n"], "deep": {"a": True}}
    write_json(tmp_path / "a.json", value | {"nan": float("nan"), "inf": [float("inf")]})
    assert read_json(tmp_path / "a.json") == value | {"nan": None, "inf": [None]}


# ---- damage ----


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: flip(path, 0), "another digest"),
        (lambda path: flip(path, -1), "another digest"),
        (lambda path: os.truncate(path, 5), "has 5 bytes instead of 3,000"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hosts")), "is missing"),
        (lambda path: path.write_bytes(b"new" * 2000), "6,000 bytes"),
    ],
    ids=range(8),
)
def test_damage_is_found_and_named(made, damage, reason):
    damage(made / "deep" / "b.txt")
    with pytest.raises(Damaged, match=f"deep/b.txt: .*{reason}.*not as it was written; restore"):
        check_folder(made)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"files": []}', '{"files": {"a.txt": 5}}'),
        *("[" * 10_000, "\x00", '{"files": 5}'),
    ],
)
def test_a_damaged_manifest_is_named(made, text):
    (made / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json: "):
        check_folder(made)


@pytest.mark.parametrize(
    "name, entry",
    [
        ("../outside.txt", {"bytes": 1}),
        ("/etc/hosts", {"bytes": 1}),
        ("a.txt", {}),
        ("a.txt", {"bytes": "3000"}),
        ("a.txt", {"bytes": 3000}),
        ("a.txt", {"bytes": None}),
        ("deep", {"bytes": 1}),
        ("", {"bytes": 1}),
    ],
)
def test_an_edited_manifest_is_no_way_out(made, name, entry):
    (made.parent / "outside.txt").write_text("x")
    write_json(made / "manifest.json", {"format": 1, "files": {name: entry}})
    with pytest.raises(Damaged):
        check_folder(made)


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(Damaged, match="has no manifest.json, so it was never finished"):
        check_folder(tmp_path)


# ---- parts ----


def test_a_part_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "store"
    part = Part(path, {"of": "these"}, {"line": 0})
    part.add("a", lambda beside: beside.write_text("a"), line=3)
    again = Part(path, {"of": "these"})
    assert (list(again.files), again.notes) == (["a"], {"line": 3})
    with pytest.raises(ValueError, match="store: .*division by zero"):
        again.add("b", lambda beside: (beside.write_text("b"), 1 / 0))
    assert list(Part(path, {"of": "these"}).files) == ["a"]
    assert list(Part(path, {"of": "others"}).files) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "a").write_text("longer"),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text('{"files": {"a": 1}}'),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text("[" * 9999),
    ],
    ids=range(7),
)
def test_a_damaged_part_is_begun_anew(tmp_path, damage):
    part = Part(tmp_path / "store", 1)
    part.add("a", lambda beside: beside.write_text("a"))
    damage(part.folder)
    assert list(Part(tmp_path / "store", 1).files) == []


def test_a_finished_part_has_its_manifest_only(tmp_path):
    part = Part(tmp_path / "store", 1)
    part.add("a", lambda beside: beside.write_text("a"))
    part.finish()
    assert names(tmp_path) == ["store"] and names(tmp_path / "store") == ["a", "manifest.json"]


# ---- what an error says ----


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EACCES, "no"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("other"), False),
    ],
)
def test_a_full_disk_is_recognised(tmp_path, error, full):
    assert atomic.is_disk_full(error) == full
    with pytest.raises(
        ValueError, match="x: the disk is full" if full else "x: cannot be written"
    ) as told:
        with atomic.writing("x"):
            raise error
    assert told.value.__cause__ is error


def test_a_long_foreign_error_is_cut(tmp_path):
    for boundary in (atomic.writing, atomic.reading):
        with pytest.raises(ValueError) as error, boundary("x"):
            raise RuntimeError("y" * 10_000 + "\nmore")
        assert len(str(error.value)) < 350 and json.dumps(str(error.value)).isascii()


# ---- what is no file, no folder ----


def special(path, kind):
    "A named pipe, a socket or a folder at a path."
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(os.path.relpath(path))  # a socket's name must be short
    else:
        os.mkfifo(path) if kind == "named pipe" else path.mkdir()


WRITERS = {
    "new_file": lambda path: new_file(path).__enter__().write_text("x"),
    "write_text": lambda path: write_text(path, "x"),
    "new_folder": lambda path: new_folder(path).__enter__(),
    "Part": lambda path: Part(path, 1),
}


@pytest.mark.parametrize("through", ["itself", "link"])
@pytest.mark.parametrize("kind", ["named pipe", "socket", "folder"])
@pytest.mark.parametrize("write", WRITERS)
def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch, write, kind, through):
    if kind == "folder" and write in ("new_folder", "Part"):
        pytest.skip("that is what they replace")
    monkeypatch.chdir(tmp_path)
    special(tmp_path / "there", kind)
    path = tmp_path / "there"
    if through == "link":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = (tmp_path / "there").lstat()
    with pytest.raises(ValueError, match=f"is a {kind}; choose another name") as error:
        WRITERS[write](path)
    assert str(path) in str(error.value) and str(tmp_path / "there") in str(error.value)
    after = (tmp_path / "there").lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert set(names(tmp_path)) <= {"there", "link"}


def test_a_pipe_that_a_user_keeps_in_a_folder_does_not_stop_a_save(made):
    os.mkfifo(made / "pipe")
    with new_folder(made, carry=True) as beside:
        fill(beside, "newer")
    assert (made / "pipe").is_fifo() and check_folder(made)


def test_the_owner_of_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".made.owner").symlink_to(tmp_path / "precious")
    with lock(tmp_path / "made"):
        assert (tmp_path / "precious").read_text() == "mine"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_json("~/a.json", {"a": 1})
    with lock("~/made"), new_folder("~/made") as beside:
        fill(beside)
    part = Part("~/part", 1)
    part.finish()
    assert names(tmp_path) == ["a.json", "elsewhere", "made", "part"]
    assert not names(tmp_path / "elsewhere") and read_json("~/a.json") == {"a": 1}
    assert is_whole("~/made") and len(check_folder("~/made")) == 2


# ---- two savers without a lock ----


def save_word(path, word):
    with new_folder(path) as beside:
        for name in "abc":
            (beside / name).write_text(word * 20_000)


def words_of(path):
    return {(path / name).read_text()[0] for name in "abc"}


@pytest.mark.parametrize("system", ["this one", "without exchange"])
def test_two_threads_save_one_folder_whole(tmp_path, monkeypatch, quick_disk, system):
    if system == "without exchange":
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **options: object())
    for _ in range(40):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(partial(save_word, tmp_path / "made"), "xyz"))
        check_folder(tmp_path / "made")
        assert len(words_of(tmp_path / "made")) == 1 and names(tmp_path) == ["made"]


SAVE_OFTEN = """
import sys
from contrastive_st.atomic import new_folder
for _ in range(40):
    with new_folder(sys.argv[2]) as beside:
        for name in "abc":
            (beside / name).write_text(sys.argv[1] * 20_000)
"""


def test_two_processes_save_one_folder_whole(tmp_path):
    writers = [start(SAVE_OFTEN, word, tmp_path / "made") for word in "xy"]
    for writer in writers:
        said(writer)
    check_folder(tmp_path / "made")
    assert len(words_of(tmp_path / "made")) == 1 and names(tmp_path) == ["made"]


def test_a_living_writers_work_stays_and_a_dead_ones_goes(tmp_path):
    path = tmp_path / "made"
    dead = start("")
    said(dead)
    (tmp_path / f".made.{dead.pid}-0.partial").mkdir()
    (tmp_path / f".made.{os.getpid()}-999999.partial").mkdir()  # the same number, another start
    (tmp_path / ".made.partial").mkdir()  # of an earlier version
    other = tmp_path / f".made.{os.getppid()}-0.partial"
    other.mkdir()
    with new_folder(path) as beside:
        fill(beside)
        atomic.tidy(path)
        assert beside.is_dir() and other.is_dir()
        assert set(atomic.abandoned(tmp_path)) == set()
        assert set(names(tmp_path)) == {beside.name, other.name}
    check_folder(path)
    other.rmdir()
    assert names(tmp_path) == ["made"]


def test_one_writer_inside_another_of_the_same_folder(tmp_path):
    with new_folder(tmp_path / "made") as outer:
        fill(outer, "outer")
        with new_folder(tmp_path / "made") as inner:
            fill(inner, "inner")
    assert (tmp_path / "made" / "a.txt").read_text().startswith("outer")
    check_folder(tmp_path / "made")


# ---- what is quoted ----


@pytest.mark.parametrize("value", ["\x1b[31mred", "x" * 10_000, ["y" * 999] * 99, {"k\n": 10**99}])
def test_what_is_quoted_is_short_and_printable(value):
    assert len(atomic.quote(value)) <= 80 and atomic.quote(value).isprintable()
    if isinstance(value, str):
        assert len(atomic.named(value)) <= 80 and atomic.named(value).isprintable()
    assert atomic.named("weights.bin") == "weights.bin"


def test_an_error_of_a_library_that_names_the_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError) as error, atomic.reading(tmp_path / "a"):
        raise ValueError(f"{tmp_path / 'a'}\nis \x1b[31m bad " + "x" * 5000)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "files", [{"x" * 100_000: {"bytes": 1}}, {"a\x1b[31m": {}}, {"a": 5}, [], 5]
)
def test_a_manifest_of_any_content_is_one_sentence(made, files):
    record = {"format": 1, "files": files}
    seal = xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())
    write_json(made / "manifest.json", record | {"xxh3": seal})
    with pytest.raises(Damaged) as error:
        check_folder(made)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


# ---- names that no file can have ----

NAMES = {
    "a\0b": "holds a NUL character",
    "~\0": "holds a NUL character",
    "a/\ud800": "holds half a character",
    "x" * 300: "300 bytes",
    "é" * 200: "400 bytes",
    "x/" * 2500: "too long",
    "": "is empty",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "use",
    [
        expanded,
        read_json,
        is_whole,
        check_folder,
        lambda path: write_json(path, {}),
        lambda path: new_folder(path).__enter__(),
        lambda path: lock(path).__enter__(),
        lambda path: Part(path, 1),
    ],
)
def test_names_that_no_file_can_have(tmp_path, monkeypatch, use, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        use(name)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 300 and not isinstance(caught.value, UnicodeError)
    assert NAMES[name] in said or not name
    assert not any(tmp_path.iterdir())


def test_a_name_without_room_for_another_beside_it(tmp_path):
    path = tmp_path / ("y" * 250)  # while it is written the name has more letters
    with pytest.raises(ValueError, match="too long") as caught:
        write_json(path, {})
    assert str(caught.value).startswith(f"{path}: cannot be written")
