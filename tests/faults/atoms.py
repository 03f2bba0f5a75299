"""What is interrupted, without the models: the ways of `contrastive_st.atomic` to write."""

import json
import re
import shutil
from pathlib import Path

from contrastive_st import atomic

LEFTOVER = re.compile(r"\.(partial|part|part\.jsonl|old|tmp|owner)$|^\.tmp")
LOCK = re.compile(r"\.lock$")  # an empty file that may stay, because removing it is a race


class Scenario:
    "Something that writes into a folder, may be killed, and is run again."

    name = ""
    ignored = ""  # operations on paths that hold this are no points

    def prepare(self, template):
        "Write what is there before; it is copied for each attempt."

    def run(self, folder, resume):
        "Do the work."
        raise NotImplementedError

    def between(self, folder):
        "Say what is wrong with the folder after the kill, before anything else has been run."
        return ""

    def outcome(self, folder):
        "Return what is there at the end, as JSON; the same after every interruption."
        raise NotImplementedError


def leftovers(folder):
    "Files below a folder that a finished writer should have cleared away."
    names = [p.relative_to(folder) for p in folder.rglob("*") if LEFTOVER.search(p.name)]
    return sorted(map(str, names))


def copy_of(template, folder):
    "A fresh folder with what is there before."
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    return Path(folder)


def texts(folder):
    "Every file below a folder with what it holds."
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not LOCK.search(p.name))
    return {str(p.relative_to(folder)): p.read_text() for p in files}


class File(Scenario):
    "A file over an older one."

    name = "new-file"
    new, old = "new\n" * 1000, "old\n"

    def prepare(self, template):
        (template / "record.json").write_text(self.old)

    def run(self, folder, resume):
        atomic.write_text(folder / "record.json", self.new)

    def between(self, folder):
        text = (folder / "record.json").read_text()
        return "" if text in (self.old, self.new) else f"the file holds {text[:40]!r}"

    def outcome(self, folder):
        return texts(folder)


class Folder(Scenario):
    "A folder of several files where nothing is."

    name = "new-folder"

    def fill(self, folder, word):
        (folder / "deep").mkdir()
        for name in ("a.txt", "b.txt", "deep/c.txt"):
            (folder / name).write_text(f"{word} " * 500)

    def run(self, folder, resume):
        with atomic.new_folder(folder / "made") as beside:
            self.fill(beside, "new")

    def between(self, folder):
        if (folder / "made").exists():
            atomic.check_folder(folder / "made")
        return ""

    def outcome(self, folder):
        atomic.check_folder(folder / "made")
        return texts(folder)


class FolderOver(Folder):
    "Over an older folder, in which a user keeps a README and a repository."

    name = "new-folder-over"
    may_be_gone = False

    def prepare(self, template):
        with atomic.new_folder(template / "made") as beside:
            self.fill(beside, "old")
        (template / "made" / ".git").mkdir()
        (template / "made" / ".git" / "HEAD").write_text("ref")
        (template / "made" / "README.md").write_text("mine")

    def run(self, folder, resume):
        with atomic.new_folder(folder / "made", carry=True) as beside:
            self.fill(beside, "new")

    def between(self, folder):
        made = folder / "made"
        if not made.exists() and self.may_be_gone:
            made = folder / ".made.old"
        atomic.check_folder(made)
        kept = (made / "README.md").read_text() == "mine" and (made / ".git" / "HEAD").exists()
        return "" if kept else "what the user kept there is gone"


class FolderOverOtherSystems(FolderOver):
    "The same on a system that cannot let two names change places."

    name = "new-folder-renames"
    may_be_gone = True

    def run(self, folder, resume):
        without_exchange()
        super().run(folder, resume)


def without_exchange():
    "Take renameat2 away from this process."

    class Ctypes:
        CDLL = staticmethod(lambda *args, **kwargs: None)

    atomic.ctypes = Ctypes


class Part(Scenario):
    "Pieces in the order of their numbers; a folder that is there is left alone."

    name = "part"
    word = "new"

    def run(self, folder, resume):
        path, origin = folder / "store", {"word": self.word}
        with atomic.lock(path):
            atomic.tidy(path)
            if self.is_current(path):
                return
            part = atomic.Part(path, origin, {"next": 0})
            for n in range(part.notes["next"], 4):

                def write(beside):
                    return beside.write_text(f"{self.word} {n} " * 100)

                part.add(f"piece-{n}", write, next=n + 1)
            part.finish()

    def is_current(self, path):
        if not atomic.is_whole(path):
            return False
        atomic.check_folder(path)
        return (path / "piece-0").read_text().startswith(self.word)

    def between(self, folder):
        if (folder / "store").exists():
            atomic.check_folder(folder / "store")
        state = folder / "store.part" / "state.json"
        return "" if not state.exists() or json.loads(state.read_text()) else "the state is empty"

    def outcome(self, folder):
        atomic.check_folder(folder / "store")
        return texts(folder)


class PartOver(Part):
    "The same over an older folder."

    name = "part-over"
    may_be_gone = False

    def prepare(self, template):
        older = Part()
        older.word = "old"
        older.run(template, False)

    def between(self, folder):
        if not (folder / "store").exists() and not self.may_be_gone:
            return "the older folder is gone"
        return super().between(folder)


class PartOverOtherSystems(PartOver):
    "The same on a system that cannot let two names change places."

    name = "part-renames"
    may_be_gone = True

    def run(self, folder, resume):
        without_exchange()
        super().run(folder, resume)


KINDS = (
    *(File, Folder, FolderOver, FolderOverOtherSystems),
    *(Part, PartOver, PartOverOtherSystems),
)
SCENARIOS = {scenario.name: scenario for scenario in KINDS}
