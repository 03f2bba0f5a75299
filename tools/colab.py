"""Execute notebooks as a stranger on Colab does: all cells, in an empty folder, install cell first.

    python tools/colab.py cpu                  # all notebooks, with what Colab's CPU and GPU bring
    python tools/colab.py tpu 19_xla           # one, with what its TPU runtime brings
    python tools/colab.py empty 01_loss index  # two, in an environment with nothing but Jupyter
    python tools/colab.py cpu --record         # note the seconds in tools/pages.json

The environments are .venv-colab-cpu and so on, built the first time from constraints-colab.txt and
constraints-colab-tpu.txt. The package comes from the last commit of this clone, by the install cell
itself. Cells that need what is not there (the hub, a TPU, hours) are skipped as on Colab.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import notebooks as tool
from pages import ROOT, notebooks, settings

VERSIONS = {"cpu": "constraints-colab.txt", "tpu": "constraints-colab-tpu.txt", "empty": ""}
# not needed for text, or installed before the others
LEFT_OUT = ("torchvision", "torchaudio", "libtpu", "torch")


def pip(venv: Path, *arguments: str) -> None:
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "--quiet", *arguments], check=True)


def build(venv: Path, kind: str, python: str, pip_args: list[str]) -> None:
    "Make an environment that has what the runtime brings."
    print(f"building {venv.name}", flush=True)
    subprocess.run([python, "-m", "venv", venv], check=True)
    pip(venv, "--upgrade", "pip")
    if kind == "empty":
        pip(venv, *pip_args, "jupyter")
    else:
        lines = (ROOT / VERSIONS[kind]).read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        torch = [p for p in pins if p.startswith("torch==")]
        pip(venv, *pip_args, *torch)
        pip(venv, *pip_args, *torch, *[p for p in pins if p.split("==")[0] not in LEFT_OUT])
    (venv / ".ready").touch()


def everything(path: Path, slow: bool) -> nbformat.NotebookNode:
    "A notebook as Colab runs it, except that the repository is this clone's last commit."
    nb, cfg = nbformat.read(path, as_version=4), settings()
    tool.readdress(nb, path, cfg)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        cell.source = cell.source.replace(
            f"git+{cfg['git_url']}@{cfg['branch']}", f"git+file://{ROOT}@{commit}"
        )
        cell.source = re.sub(
            rf"(git clone .*){re.escape(cfg['git_url'])}", rf"\1file://{ROOT}", cell.source
        )
        cell.source = (
            cell.source.replace("\nready()", "\nready(slow=True)") if slow else cell.source
        )
        cell.outputs = []
    return nb


def environment(venv: Path, hub: bool) -> dict[str, str]:
    "The variables of a new session: nothing of this clone's."
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "VIRTUAL_ENV", "CONTRASTIVE_ST_DATA")
    }
    return kept | {
        "PATH": f"{venv.resolve() / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "0" if hub else "1",
    }


def execute(path: Path, venv: Path, hub: bool, slow: bool, keep: Path | None) -> tuple[float, str]:
    "Run all cells of a notebook in an empty folder; return the seconds and the error if any."
    folder = Path(tempfile.mkdtemp(prefix="colab-"))
    nbformat.write(everything(path, slow), folder / path.name)
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [(venv / "bin/jupyter-execute").resolve(), "--inplace", "--timeout=-1", path.name],
        cwd=folder,
        env=environment(venv, hub),
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # on a machine that has other work the clock says too much
    seconds = min(time.time() - start, computed)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / path.name, keep / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    return seconds, done.stderr[-4000:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=VERSIONS)
    parser.add_argument("names", nargs="*", help="notebooks, such as 01_loss; all if none is named")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the interpreter of the environment; Colab's is 3.13",
    )
    parser.add_argument(
        "--pip-args",
        default="",
        help="for building the environment, e.g. an index of CPU builds of torch",
    )
    parser.add_argument("--venv", type=Path, help="an environment that is there already")
    parser.add_argument("--hub", action="store_true", help="let the notebooks ask the hub")
    parser.add_argument("--slow", action="store_true", help="run the studies of many minutes, too")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the executed notebooks there"
    )
    parser.add_argument(
        "--record", action="store_true", help="note the seconds in tools/pages.json"
    )
    args = parser.parse_intermixed_args()
    venv = args.venv or ROOT / f".venv-colab-{args.kind}"
    if not args.venv and not (venv / ".ready").exists():
        build(venv, args.kind, args.python, args.pip_args.split())
    every = notebooks()
    if unknown := set(args.names) - {p.stem for p in every}:
        parser.error(f"there is no notebook {', '.join(sorted(unknown))} in nbs/")
    subprocess.run(
        [venv / "bin/python", "-m", "pip", "uninstall", "--quiet", "-y", "contrastive_st"],
        check=True,
    )
    seconds, failed = {}, 0
    for path in (p for p in every if not args.names or p.stem in args.names):
        took, error = execute(path, venv, args.hub, args.slow, args.keep)
        print(f"{path.stem:28} {took:6.0f} s  {'FAILED' if error else 'ok'}", flush=True)
        print(error, end="\n" if error else "", file=sys.stderr, flush=True)
        failed += bool(error)
        if not error:
            seconds[path.stem] = took
    if args.record:
        tool.record(seconds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
