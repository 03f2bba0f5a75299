"""Private names stay at home: what begins with an underscore is used where it is defined."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("contrastive_st", "tests", "tools", "benchmarks", "docs")
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "_modidx.py"
]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))

# documented parts of Python's or a library's interface, in spite of their underscore
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit", "_getframe", "_repr_markdown_"}
# private names of other libraries that nothing public replaces: the reason for each
FOREIGN = {
    "_fingerprint": "datasets: the only identity of a Dataset that does not read all its rows",
    "_is_mkldnn_bf16_supported": "torch: whether this CPU multiplies bfloat16 has no other name",
    "_linear_pointwise": "torch: the one call that adds bias and gelu inside a bfloat16 product",
    "_softmax_backward_data": "torch: the backward of softmax without a second forward",
    "_attn_implementation_internal": "transformers: restores what a model was opened with",
    "_attn_implementation": "transformers: what a model computes attention by",
    "_global_mapping": "transformers: AttentionInterface has no method that takes a name back",
    "_modules": "torch: the children under their names, None among them",
    "_forward_hooks": "torch: a module that somebody watches is left alone",
    "_forward_pre_hooks": "torch: a module that somebody watches is left alone",
    "_version": "torch: counts the changes of a tensor in place, so its digest need not be new",
    "_base": "torch: tells a view, which costs no memory, from a tensor that does",
    "_XLAC": "torch_xla: the graph of a step as text has no public name",
    "_get_xla_tensors_text": "torch_xla: the graph of a step as text has no public name",
    "_n_gpu": "transformers: TrainingArguments counts GPUs by itself, and we train on one",
}


def is_private(name: str) -> bool:
    "_name, but neither __name__ nor a documented one."
    return bool(re.match(r"_[^_]", name)) and name not in DOCUMENTED


def is_own(node: ast.expr) -> bool:
    "self or cls."
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def definitions(tree: ast.Module) -> set[str]:
    "Names that a file defines: functions, classes, variables, parameters, attributes of self."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if is_own(node.value) else set()
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def uses(tree: ast.Module) -> list[tuple[int, str]]:
    "Names that a file imports, reads from an object or patches: (line, name)."
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and not is_own(node.value):
            names.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            names += [(node.lineno, text) for text in texts if isinstance(text, str)]
    return names


def strangers(source: str) -> list[str]:
    "Private names that a file uses and neither defines nor may take from another library."
    tree = ast.parse(source)
    known = definitions(tree) | FOREIGN.keys()
    return [
        f"line {line}: {name}"
        for line, name in uses(tree)
        if is_private(name) and name not in known
    ]


def code_of(path: Path) -> str:
    "The Python cells of a notebook as one file."
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(
        c.source
        for c in cells
        if c.cell_type == "code" and not re.search(r"^\s*[%!]\w", c.source, re.M)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_uses_its_own_private_names_only(path):
    wrong = strangers(path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.name}: give a public name to what others use: {'; '.join(wrong)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_uses_its_own_private_names_only(path):
    wrong = strangers(code_of(path))
    assert not wrong, f"{path.name}: give a public name to what others use: {'; '.join(wrong)}"


def test_every_exception_is_needed():
    files = [path for path in FILES + NOTEBOOKS if path != Path(__file__)]
    everything = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unused = [name for name in FOREIGN if not re.search(rf"\b{name}\b", everything)]
    assert not unused, f"take them off FOREIGN: {unused}"


@pytest.mark.parametrize(
    "source",
    [
        "from contrastive_st.store import _open",
        "store._open()",
        "def f(a):\n    return a.b._open",
        "monkeypatch.setattr(store, '_open', None)",
        "other._open = 1",
    ],
)
def test_it_really_fails(source):
    assert strangers(source) == [f"line {source.count(chr(10)) + 1}: _open"]


@pytest.mark.parametrize(
    "source",
    [
        "def _open(): pass\n_open()",
        "class A:\n    def __init__(self): self._open = 1\n    def f(self, b): return b._open",
        "self._open",
        "row._replace(a=1)",
        "module.__name__",
        "dataset._fingerprint",
    ],
)
def test_it_lets_through(source):
    assert strangers(source) == []
