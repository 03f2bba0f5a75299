"""Execute notebooks in place, honouring nbdev's flags, so that every committed output is real.

    python tools/notebooks.py                        # all of nbs/, what nbdev_test would run
    python tools/notebooks.py nbs/04_loss.ipynb      # one
    python tools/notebooks.py --flags "slow" nbs/tutorials/nli_to_stsb.ipynb
    python tools/notebooks.py --headers              # only the header and the install cell of each notebook, executing nothing

A cell that nbdev_test would skip (`#| eval: false`, or a flag of `tst_flags` that was not given) keeps its committed output.
A notebook in which a cell raises `unittest.SkipTest`, for want of data, is left as it was.
The repository's address in links and in the install cell is written anew from settings.ini; the header under the title takes run times and needs
from tools/pages.json, which `python tools/colab.py --record` writes.
"""

import argparse
import json
import os
import re
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from unittest import SkipTest
from urllib.parse import quote

import nbformat

ROOT = Path(__file__).resolve().parent.parent

PAGES = ROOT / "tools/pages.json"  # seconds, date and needs of each notebook

INSTALL = """#| hide
#| eval: false
# Run this cell first on Colab, on Kaggle (switch Internet on) and in your own Jupyter: it installs what is missing, and nothing else.
from importlib.util import find_spec
if getattr(find_spec("{lib_name}"), "origin", None) is None:   # a folder of that name is no package
    %pip install -q --no-deps "{lib_name} @ git+{git_url}@{branch}"
from {lib_name}.machine import ready
ready()   # ready(slow=True) runs the studies of many minutes, too"""


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters="=")
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def duration(seconds: float) -> str:
    "Seconds in words, coarse enough to stay the same from run to run."
    if seconds < 50:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes > 1)}"


def badge(name: str, address: str, up: str) -> str:
    return f"[![Open in {name}]({up}docs/_static/{name.lower()}.svg)]({address})"


def header(nb, path: Path, cfg: dict[str, str]) -> str:
    "The line under a title: badges, how long all cells take, on what, and what they need."
    where = path.resolve().relative_to(ROOT)
    github = f"github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{where.as_posix()}"
    up = "../" * (len(where.parts) - 1)
    tpu = nb.metadata.get("accelerator") == "TPU"
    badges = [badge("Colab", f"https://colab.research.google.com/{github}", up)]
    if tpu:
        source = quote(f"https://{github.replace('github', 'github.com', 1)}", safe="")
        badges.append(badge("Kaggle", f"https://www.kaggle.com/kernels/welcome?src={source}", up))
    page = json.loads(PAGES.read_text(encoding="utf-8")).get(path.stem, {})
    time = (
        f"All cells take about {duration(page['seconds'])} on {page['cores']} CPU cores. "
        if "seconds" in page
        else ""
    )
    machine = (
        "On a TPU they use it, and without one four devices made of the CPU."
        if tpu
        else "No GPU is needed."
    )
    text = time + machine + (f" {page['needs']}" if "needs" in page else "")
    return " ".join(badges) + "\n\n" + text


def readdress(nb, path: Path, cfg: dict[str, str]) -> None:
    "Put the address of settings.ini into every link to the repository, and write header and install cell after the title."
    address = re.compile(rf"https://github\.com/[\w.-]+/{re.escape(cfg['repo'])}\b")
    if path.resolve().is_relative_to(ROOT):  # a copy somewhere else has no address
        nb.cells = [c for c in nb.cells if c.id not in ("colab-install", "page-header")]
        place = 2 if any(c.id == "default-exp" for c in nb.cells[:2]) else 1
        nb.cells[place:place] = [
            nbformat.v4.new_markdown_cell(header(nb, path, cfg), id="page-header"),
            nbformat.v4.new_code_cell(INSTALL.format(**cfg), id="colab-install"),
        ]
    for cell in nb.cells:
        cell.source = address.sub(cfg["git_url"], cell.source)


def flags_of(source: str) -> set[str]:
    "The directives at the top of a cell: '#| slow' gives {'slow'}, '#| eval: false' gives {'eval: false'}."
    return {m[1].strip() for m in re.finditer(r"^#\|\s*(.+)$", source, re.M)}


def skipped_flags(forced: str) -> set[str]:
    return {"eval: false"} | set(settings()["tst_flags"].split()) - set(forced.split())


def as_output(out) -> nbformat.NotebookNode:
    "Execnb's output as nbformat wants it: streams as one string, no execution count."
    out = nbformat.from_dict(dict(out))
    if out.output_type == "stream":
        out.text = "".join(out.text)
    if out.output_type == "execute_result":
        out.execution_count = None
    return out


def execute(path: Path, forced: str = "") -> tuple[str, float, str]:
    "Run one notebook and write its outputs; returns its name, the seconds it took, and the error if there was one."
    from execnb.shell import CaptureShell

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    start, skip, shell, error = (
        time.time(),
        skipped_flags(forced),
        CaptureShell(path, mpl_format="png"),
        "",
    )
    nb = nbformat.read(path, as_version=4)
    readdress(nb, path, settings())
    for cell in (c for c in nb.cells if c.cell_type == "code" and not flags_of(c.source) & skip):
        cell.outputs = [as_output(o) for o in shell.run(cell.source)]
        cell.execution_count = None
        if isinstance(shell.exc, SkipTest):
            print(f"{path.name}: skipped at cell {cell.id}: {shell.exc}", flush=True)
            return path.name, time.time() - start, ""
        if str(ROOT.parent) in str(cell.outputs):
            error = f"cell {cell.id} prints a path of this machine"
        if shell.exc:
            error = f"cell {cell.id}: " + "".join(traceback.format_exception(shell.exc))
            break
    if not error:
        nbformat.write(nb, path)
    return path.name, time.time() - start, error


def write_header(path: Path) -> bool:
    "Write header and install cell of a notebook without executing it; says whether it changed."
    nb = nbformat.read(path, as_version=4)
    before = nbformat.writes(nb)
    readdress(nb, path, settings())
    if nbformat.writes(nb) != before:
        nbformat.write(nb, path)
    return nbformat.writes(nb) != before


def record(seconds: dict[str, float]) -> None:
    "Note in tools/pages.json how long notebooks took here."
    pages = json.loads(PAGES.read_text(encoding="utf-8"))
    for name, value in seconds.items():
        pages[name] = pages.get(name, {}) | {
            "seconds": round(value),
            "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"),
        }
    text = json.dumps(dict(sorted(pages.items())), indent=1, ensure_ascii=False)
    PAGES.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, default=sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
    )
    parser.add_argument("--flags", default="", help="run cells with these flags too, e.g. 'slow'")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--headers",
        action="store_true",
        help="write the header and the install cell of each notebook, execute nothing",
    )
    args, failed = parser.parse_args(), 0
    if args.headers:
        changed = [path.name for path in args.notebooks if write_header(path.resolve())]
        print(
            f"headers of {len(args.notebooks)} notebooks, {len(changed)} changed",
            *changed,
            sep="\n",
        )
        return 0
    if len(args.notebooks) > 1 and args.workers > 1:
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # notebooks share the cores; threads that fight for them cost more than they bring
    with ProcessPoolExecutor(args.workers, max_tasks_per_child=1) as pool:
        for name, seconds, error in pool.map(
            execute, [p.resolve() for p in args.notebooks], [args.flags] * len(args.notebooks)
        ):
            print(f"{name:32} {seconds:6.1f} s  {'FAILED' if error else 'ok'}", flush=True)
            failed += bool(error)
            print(error, end="\n" if error else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
