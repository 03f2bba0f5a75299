"""Execute notebooks in place, honouring nbdev's flags, so that every committed output is real.

    python tools/notebooks.py                    # all of nbs/, what nbdev_test would run
    python tools/notebooks.py nbs/01_loss.ipynb  # one
    python tools/notebooks.py --flags "slow" nbs/tutorials/nli_to_stsb.ipynb
    python tools/notebooks.py --headers          # write header and install cells, execute nothing
    python tools/notebooks.py --format           # format the code cells by ruff, execute nothing

A cell that nbdev_test would skip (`#| eval: false`, or a flag of `tst_flags` that was not given)
keeps its committed output. A notebook in which a cell raises `unittest.SkipTest`, for want of data,
is left as it was.

The repository's address in links and in the install cell is written anew from settings.ini. The
header under the title counts how long the page takes to read, and takes run times and needs from
tools/pages.json, which `python tools/colab.py --record` writes.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import SkipTest
from urllib.parse import quote

import nbformat
from pages import HIDDEN, ROOT, flags_of, notebooks, settings, split_directives

PAGES = ROOT / "tools/pages.json"  # seconds, date and needs of each notebook
WORDS, LINES = 200, 40  # of prose and of code that one reads in a minute
LARGEST_SVG = 100_000  # characters; a plot of more shapes is kept as pixels
FOLDED = HIDDEN | {"code-fold: true", "fold: code", "echo: false"}  # cells that one need not read

INSTALL = """#| hide
#| eval: false
# Run this cell first on Colab, on Kaggle (switch Internet on) and in your own Jupyter:
# it installs what is missing, and nothing else.
from importlib.util import find_spec

# a folder of that name is no package
if getattr(find_spec("{lib_name}"), "origin", None) is None:
    %pip install -q --no-deps "{lib_name} @ git+{git_url}@{branch}"
from {lib_name}.machine import ready

ready()  # ready(slow=True) runs the studies of many minutes, too"""


def duration(seconds: float) -> str:
    "Seconds in words, coarse enough to stay the same from run to run."
    if seconds < 50:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes > 1)}"


def reading_time(nb) -> str:
    "How long the lesson of a page takes to read: what stands before its details, and unfolded."
    minutes, details = 0.0, False
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            details = details or bool(re.match(r"## Details\b", cell.source))
            minutes += 0 if details else len(cell.source.split()) / WORDS
        elif cell.cell_type == "code" and not details and not flags_of(cell.source) & FOLDED:
            code = split_directives(cell.source)[1]
            minutes += len([line for line in code.splitlines() if line.strip()]) / LINES
    return f"about {duration(60 * max(1, minutes))}{', without the details' * details}"


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
    sentences = [f"Reading takes {reading_time(nb)}."]
    if "seconds" in page:
        took = duration(page["seconds"])
        sentences.append(f"All cells take about {took} on {page['cores']} CPU cores.")
    if tpu:
        sentences.append("On a TPU they use it, and without one four devices made of the CPU.")
    else:
        sentences.append("No GPU is needed.")
    if "needs" in page:
        sentences.append(page["needs"])
    return " ".join(badges) + "\n\n" + " ".join(sentences)


def readdress(nb, path: Path, cfg: dict[str, str]) -> None:
    "Write header and install cell after the title, and the address of settings.ini into links."
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


def skipped_flags(forced: str) -> set[str]:
    return {"eval: false"} | set(settings()["tst_flags"].split()) - set(forced.split())


def drawn_twice() -> str:
    "Code that lets a page draw each plot as SVG and as pixels, of which `lean_plot` keeps one."
    from contrastive_st.drawings import SVG_SETTINGS  # --format works without

    return f"""import matplotlib
matplotlib.rcParams.update({SVG_SETTINGS})
set_matplotlib_formats("svg", "png")
del matplotlib"""


def lean_svg(svg: str) -> str:
    "A plot of matplotlib without its date, and in the reader's own letters."
    from contrastive_st.drawings import in_own_letters

    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    return in_own_letters(svg)


def lean_plot(data: dict) -> dict:
    "Of a plot that was drawn as SVG and as pixels, keep the SVG unless it is large or an image."
    if not {"image/svg+xml", "image/png"} <= data.keys():
        return data
    svg = lean_svg("".join(data["image/svg+xml"]))
    if len(svg) > LARGEST_SVG or "<image" in svg:
        return {kind: value for kind, value in data.items() if kind != "image/svg+xml"}
    return {kind: value for kind, value in data.items() if kind != "image/png"} | {
        "image/svg+xml": svg
    }


def as_output(out) -> nbformat.NotebookNode:
    "Execnb's output as nbformat wants it: streams as one string, no execution count."
    out = nbformat.from_dict(dict(out))
    if out.output_type == "stream":
        out.text = "".join(out.text)
    if out.output_type == "execute_result":
        out.execution_count = None
    if "data" in out:
        out.data = lean_plot(out.data)
    return out


def execute(path: Path, forced: str = "") -> tuple[str, float, str]:
    "Run a notebook and write its outputs; return its name, the seconds, and the error if any."
    from execnb.shell import CaptureShell

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Commands that a page runs are those of this environment, and are called by their names.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    start, skip, error = time.time(), skipped_flags(forced), ""
    shell = CaptureShell(path, mpl_format="png")
    shell.run(drawn_twice())
    nb = nbformat.read(path, as_version=4)
    readdress(nb, path, settings())
    for cell in (c for c in nb.cells if c.cell_type == "code" and not flags_of(c.source) & skip):
        cell.outputs = [as_output(o) for o in shell.run(cell.source)]
        cell.execution_count = None
        if isinstance(shell.exc, SkipTest):
            print(f"{path.name}: skipped at cell {cell.id}: {shell.exc}", flush=True)
            return path.name, time.time() - start, ""
        if place := re.search(
            rf".{{0,40}}{re.escape(str(ROOT.parent))}.{{0,60}}", str(cell.outputs)
        ):
            error = f"cell {cell.id} prints a path of this machine: {place[0]}"
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


# --- formatting ---


def is_python(code: str) -> bool:
    "Return whether code parses: a cell with shell or magic lines does not."
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def ruff(command: list[str], codes: list[str]) -> tuple[str, list[str]]:
    "Run ruff once over a notebook of these cells; return what it prints, and the cells afterwards."
    # a notebook, not a file each: in a notebook a semicolon that hides a cell's value is kept
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in codes],
        metadata={"language_info": {"name": "python"}},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.ipynb"
        nbformat.write(nb, path)
        config = ["--quiet", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, str(path)],
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1) or done.stderr:
            raise RuntimeError(f"ruff {command[0]} failed: {done.stderr}")
        return done.stdout, [cell.source for cell in nbformat.read(path, as_version=4).cells]


def formatted(sources: list[str]) -> list[str]:
    "Format cells as ruff would, directives first; cells that are no plain Python stay as they are."
    heads, codes = zip(*map(split_directives, sources)) if sources else ((), ())
    places = [i for i, code in enumerate(codes) if is_python(code)]
    _, written = ruff(["format"], [codes[i] for i in places])
    result = list(sources)
    for i, code in zip(places, written):
        result[i] = "\n".join(part for part in (heads[i], code.strip("\n")) if part)
    return result


def complaints(sources: list[str], rules: str) -> list[list[str]]:
    "Return what ruff's rules, such as 'E701,E731', find in each cell, a sentence each."
    codes = [split_directives(source)[1] for source in sources]
    places = [i for i, code in enumerate(codes) if is_python(code)]
    command = ["check", "--output-format", "json", "--select", rules]
    report, _ = ruff(command, [codes[i] for i in places])
    result = [[] for _ in sources]
    for entry in json.loads(report):
        what = f"line {entry['location']['row']}: {entry['code']} {entry['message']}"
        result[places[entry["cell"] - 1]].append(what)
    return result


def format_notebooks(paths: list[Path]) -> list[Path]:
    "Format the code cells of notebooks in one call of ruff; return the notebooks that changed."
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    cells = [[c for c in nb.cells if c.cell_type == "code"] for nb in notebooks]
    sources = iter(formatted([c.source for group in cells for c in group]))
    changed = []
    for path, nb, group in zip(paths, notebooks, cells):
        before = [c.source for c in group]
        for cell in group:
            cell.source = next(sources)
        if [c.source for c in group] != before:
            nbformat.write(nb, path)
            changed.append(path)
    return changed


# --- the command ---


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, default=notebooks())
    parser.add_argument("--flags", default="", help="run cells with these flags too, e.g. 'slow'")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--headers",
        action="store_true",
        help="write the header and the install cell of each notebook, execute nothing",
    )
    parser.add_argument(
        "--format",
        action="store_true",
        help="format the code cells of each notebook by ruff, execute nothing",
    )
    return parser.parse_args()


def execute_all(paths: list[Path], flags: str, workers: int) -> int:
    "Execute notebooks in processes of their own; return how many failed."
    failed = 0
    if len(paths) > 1 and workers > 1:
        # notebooks share the cores; threads that fight for them cost more than they bring
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, max_tasks_per_child=1) as pool:
        for name, seconds, error in pool.map(execute, paths, [flags] * len(paths)):
            print(f"{name:32} {seconds:6.1f} s  {'FAILED' if error else 'ok'}", flush=True)
            failed += bool(error)
            print(error, end="\n" if error else "", file=sys.stderr)
    return failed


def main() -> int:
    args = arguments()
    paths = [path.resolve() for path in args.notebooks]
    if args.headers:
        changed = [path.name for path in paths if write_header(path)]
        print(f"headers of {len(paths)} notebooks, {len(changed)} changed", *changed, sep="\n")
    if args.format:
        changed = [path.name for path in format_notebooks(paths)]
        print(f"formatted {len(paths)} notebooks, {len(changed)} changed", *changed, sep="\n")
    if args.headers or args.format:
        return 0
    return 1 if execute_all(paths, args.flags, args.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
