"""Who may import whom: the modules stay apart, so each notebook can be read and run alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "contrastive_st"
MODULES = sorted(
    p
    for p in (ROOT / PACKAGE).glob("*.py")
    if p.name not in ("__init__.py", "__main__.py", "_modidx.py")
)

# importer -> imported; a module that is not named here imports none of the others
ALLOWED = {
    "data": {"store"},
    "tokens": {"store"},
    "mixture": {"account", "data"},
    "packed": {"cpu", "tokens"},
    "losses": {"loss"},
    "tiled": {"loss"},
    "gradcache": {"tokens"},
    "model": {"cpu", "modeldir", "packed", "precision", "tokens"},
    "run": {
        "config",
        "cpu",
        "gradcache",
        "guard",
        "loss",
        "losses",
        "model",
        "modeldir",
        "tiled",
        "tokens",
    },
    "trainer": {"cpu", "evaluation", "mixture", "model", "run", "tokens"},
    "xla": {"model", "modeldir", "run", "tokens"},
    "encoding": {"model", "precision", "tokens"},
    "index": {"encoding", "evaluation", "precision", "search"},
    "mining": {"search", "store"},
    "guard": {"index", "store"},
    "evaluation": {"precision", "search"},
    "bias": {"evaluation"},
    "card": {"evaluation", "modeldir"},
    "charts": {"evaluation"},
    "compare": {"card", "data", "evaluation", "model", "recipes"},
    "export": {"model"},
    "recipes": {"config", "mixture", "model", "tokens"},
    "new": {"data", "store"},
    "notebook": {"model", "store"},
    "serve": {"evaluation", "index", "model", "precision", "search", "server"},
}
# how everything is written and read, in which processes, on what machine: all may import them
BASE = {"atomic", "files", "workers", "machine"}
WIRES = {"cli", "demo", "__main__"}  # these put everything together
# tools of the notebooks and the peer, not of the library
FORBIDDEN = {"fastcore", "nbdev", "execnb", "sentence_transformers", "IPython"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imports(tree: ast.Module) -> list[tuple[ast.stmt, str, list[str]]]:
    "All imports of a module, wherever they stand: (statement, dotted name, names taken from it)."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(
                (
                    node,
                    (f"{PACKAGE}." if node.level else "") + (node.module or ""),
                    [alias.name for alias in node.names],
                )
            )
    return found


def siblings(dotted: str, names: list[str]) -> set[str]:
    "Modules of this package that an import reaches."
    parts = [part for part in dotted.split(".") if part]
    if not parts or parts[0] != PACKAGE:
        return set()
    return (
        {parts[1]}
        if len(parts) > 1
        else {n for n in names if (ROOT / PACKAGE / f"{n}.py").exists()} - {"__version__"}
    )


def loads_pickle(call: ast.Call) -> bool:
    "True for torch.load without weights_only=True and for numpy's allow_pickle=True."
    options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    return (
        options.get("allow_pickle") is True
        or ast.unparse(call.func) == "torch.load"
        and options.get("weights_only") is not True
    )


def problems(name: str, source: str) -> list[str]:
    "What is wrong with the imports of one module, a sentence each."
    tree, found = ast.parse(source), []
    lazy = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    for statement, dotted, names in imports(tree):
        where, top = f"{name}.py:{statement.lineno}", dotted.split(".")[0]
        if name not in WIRES:
            found += [
                f"{where} imports {other}: the table in tests/test_layering.py does not allow"
                f" {name} -> {other}; pass the value in instead"
                for other in siblings(dotted, names) - ALLOWED.get(name, set()) - BASE
            ]
        if top in FORBIDDEN:
            found.append(
                f"{where} imports {top}: exported code must run without it; keep it in unexported"
                " cells"
            )
        if top in PICKLES:
            found.append(
                f"{where} imports {top}: pickles can run code when they are opened; write"
                " safetensors, Arrow or JSON"
            )
        if "*" in names:
            found.append(f"{where} imports * from {dotted}: name what is imported")
        if top == "torch_xla" and name != "xla":
            found.append(f"{where} imports torch_xla: only xla.py may")
        elif top == "torch_xla" and id(statement) not in lazy:
            found.append(
                f"{where} imports torch_xla when xla.py is imported: import it inside the functions"
                " that need it"
            )
    found += [
        f"{name}.py:{c.lineno} reads a pickle ({ast.unparse(c.func)}): pass weights_only=True, or"
        " write another format"
        for c in ast.walk(tree)
        if isinstance(c, ast.Call) and loads_pickle(c)
    ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports(path):
    found = problems(path.stem, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_no_cycles():
    "No module reaches itself; the two modules that wire everything are imported by nobody."
    edges = {
        p.stem: (
            set().union(
                *(siblings(d, n) for _, d, n in imports(ast.parse(p.read_text(encoding="utf-8"))))
            )
        )
        for p in MODULES
    }
    for name, others in edges.items():
        reached, todo = set(), list(others)
        while todo:
            if (other := todo.pop()) not in reached:
                reached.add(other)
                todo += edges.get(other, ())
        assert name not in reached, f"{name} imports itself through {', '.join(sorted(reached))}"
        assert name in WIRES or not others & WIRES, f"{name} imports {', '.join(others & WIRES)}"


@pytest.mark.parametrize(
    "name, source, said",
    [
        ("loss", "from contrastive_st.data import read_examples", "does not allow loss -> data"),
        ("loss", "def f():\n    from . import model", "does not allow loss -> model"),
        ("data", "import contrastive_st.model as m", "does not allow data -> model"),
        ("data", "from fastcore.test import test_eq", "imports fastcore"),
        (
            "evaluation",
            "def f():\n    import sentence_transformers",
            "imports sentence_transformers",
        ),
        ("data", "import pickle", "imports pickle"),
        ("model", "import torch\ntorch.load('x')", "reads a pickle"),
        ("model", "import numpy as np\nnp.load('x', allow_pickle=True)", "reads a pickle"),
        ("data", "from torch import *", "imports *"),
        ("trainer", "def f():\n    import torch_xla", "only xla.py may"),
        ("xla", "import torch_xla", "inside the functions"),
    ],
)
def test_it_really_fails(name, source, said):
    found = problems(name, source)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    "name, source",
    [
        (
            "trainer",
            (
                "from contrastive_st.mixture import Mixture\ndef train(m: Mixture, n: 'Mixture |"
                " None' = None) -> Mixture: return m"
            ),
        ),
        ("xla", "def f():\n    import torch_xla"),
        ("model", "import torch\ntorch.load('x', weights_only=True)"),
        ("cli", "from contrastive_st import data, model"),
        ("data", "from contrastive_st import __version__"),
    ],
)
def test_it_lets_through(name, source):
    assert problems(name, source) == []
