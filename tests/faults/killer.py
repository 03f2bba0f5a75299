"""The compiled half of the sweep: build it, load it, steer it from the process that it watches."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BEFORE, MIDDLE = 0, 1


def missing() -> str:
    "Why processes cannot be killed at a chosen operation here; empty if they can."
    if sys.platform != "linux":
        return "killing at a chosen file operation needs Linux, for LD_PRELOAD and /proc"
    return "" if shutil.which("gcc") else "killing at a chosen file operation needs gcc"


def build(folder: Path) -> Path:
    "Compile the library into a folder."
    library, source = folder / "killer.so", Path(__file__).with_name("killer.c")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"]
    subprocess.run(command, check=True, timeout=120)
    return library


class Operation(NamedTuple):
    "One change to a file or folder that was seen."

    kind: str  # "-..." if it failed and so changed nothing
    bytes: int  # of a write
    path: str


class Killer:
    "The library inside a process that was started with LD_PRELOAD."

    def __init__(self):
        self.library = ctypes.CDLL(None)
        self.library.operation.restype = ctypes.c_char_p
        self.library.limit.argtypes = [ctypes.c_long]

    def watch(self, folder: Path, ignored: str = "") -> None:
        "Count the operations below a folder from now on; paths with `ignored` in them pass."
        self.library.watch(str(folder).encode(), ignored.encode())

    def arm(self, n: int, mode: int) -> None:
        "Kill this process at operation n, from 1."
        self.library.arm(n, mode)

    def limit(self, room: int) -> None:
        "Let every write fail after so many bytes."
        self.library.limit(room)

    def operations(self) -> list[Operation]:
        "Return what was counted so far."
        lines = [self.library.operation(n + 1).decode() for n in range(self.library.operations())]
        fields = [line.lstrip(" ").split(" ", 2) for line in lines]
        return [Operation(kind, int(size), path) for kind, size, path in fields]
