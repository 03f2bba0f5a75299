"""What may happen to a file of a checkpoint, and a run to which it happens."""

import os
import shutil
import signal
import warnings
from pathlib import Path

from faults.scenarios import SCENARIOS, STEPS, make_mixture


def flip(path, share):
    "Turn one bit around, at this share of the file's length."
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * share), len(data) - 1)] ^= 16
    path.write_bytes(data)


def replaced(path, data):
    "Another file under this name."
    path.unlink()
    path.write_bytes(data)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_link(path, target):
    path.unlink()
    path.symlink_to(target)


KINDS = {  # name -> function of the file and of the file of that name in an older checkpoint
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: os.truncate(path, 0),
    "half": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path, other: os.truncate(path, max(path.stat().st_size - 1, 0)),
    "bit near the start": lambda path, other: flip(path, 0.02),
    "bit in the middle": lambda path, other: flip(path, 0.5),
    "bit at the end": lambda path, other: flip(path, 1),
    "zeros": lambda path, other: path.write_bytes(b"\0" * path.stat().st_size),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"more"),
    "a JSON list": lambda path, other: path.write_text("[1, 2]"),
    "of another step": lambda path, other: shutil.copy(other, path),
    "another name": lambda path, other: path.rename(path.with_name(f"{path.name}.bak")),
    "a folder": lambda path, other: as_folder(path),
    "a link to nowhere": lambda path, other: as_link(path, "/nowhere/at/all"),
    "a link to /dev/zero": lambda path, other: as_link(path, "/dev/zero"),
}
FOLDER_KINDS = {  # the same for a whole checkpoint
    "empty folder": lambda path, other: (shutil.rmtree(path), path.mkdir()),
    "missing folder": lambda path, other: shutil.rmtree(path),
    "a file instead": lambda path, other: (shutil.rmtree(path), path.write_text("x")),
    "an extra file": lambda path, other: (path / "notes.txt").write_text("mine"),
    "a later empty one": lambda path, other: path.with_name("checkpoint-99").mkdir(),
    "a later copy": lambda path, other: shutil.copytree(path, path.with_name("checkpoint-5")),
    "of another step": lambda path, other: (shutil.rmtree(path), shutil.copytree(other, path)),
    "manifest of another": lambda path, other: shutil.copy(
        other / "manifest.json", path / "manifest.json"
    ),
    "a strange name": lambda path, other: path.with_name("checkpoint-x").mkdir(),
}


class Killing:
    "A mixture that kills its process when the batch of a step is asked for."

    def __init__(self, mixture, step):
        self.mixture, self.step = mixture, step

    def __getattr__(self, name):
        return getattr(self.mixture, name)

    def batch(self, step, *args):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.mixture.batch(step, *args)


def interrupt(name, folder):
    "A run that was killed in its last step but one, with two checkpoints behind it."
    scenario = SCENARIOS[name]()
    scenario.mixture = lambda: Killing(make_mixture(), STEPS - 1)
    scenario.run(folder, False)


def checkpoints(folder):
    "Its checkpoints, oldest first."
    found = [
        p for p in (folder / "run" / "checkpoints").iterdir() if p.name.startswith("checkpoint-")
    ]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def cases(folder):
    "Every (file or '', kind) for the newest checkpoint."
    newest = checkpoints(folder)[-1]
    files = sorted(p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file())
    return [(name, kind) for name in files for kind in KINDS] + [
        ("", kind) for kind in FOLDER_KINDS
    ]


def damage(folder, name, kind):
    "Do it to the newest checkpoint."
    *_, older, newest = checkpoints(folder)
    (KINDS if name else FOLDER_KINDS)[kind](newest / name, older / name)


def resume(scenario, folder):
    "Go on, and return the outcome with what was told on the way."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scenario.run(Path(folder), True)
    return {"outcome": scenario.outcome(Path(folder)), "told": [str(w.message) for w in told]}
