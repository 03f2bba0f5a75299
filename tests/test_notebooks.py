"""Lint of the notebooks: each rule says which notebook, which cell and what to do. The rules are those of CONTRIBUTING.md."""

import ast
import filecmp
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbformat.v4.rwbase import rejoin_lines

ROOT = Path(__file__).resolve().parent.parent
MODULES, TUTORIALS = (
    sorted((ROOT / "nbs").glob("[0-9]*.ipynb")),
    sorted((ROOT / "nbs/tutorials").glob("[!.]*.ipynb")),
)
INDEX = [p for p in [ROOT / "nbs/index.ipynb"] if p.exists()]
CODE_LINES, PROSE_WORDS, BYTES = 80, 120, 200_000


def load(path: str):
    "A program of this repository as a module."
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_tool", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docments, tool = load("docs/docments.py"), load("tools/notebooks.py")


# --- what the rules look at ---


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def source(cell) -> str:
    "A cell's source without directive lines."
    return "\n".join(line for line in cell.source.split("\n") if not line.startswith("#|")).strip(
        "\n"
    )


def tree(cell) -> ast.Module:
    "The parsed cell; cells with shell or magic lines count as empty."
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return ast.parse("")


def exported(cell) -> bool:
    return bool(
        {f.split()[0] for f in tool.flags_of(cell.source)} & {"export", "exports", "exporti"}
    )


def is_import(node) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def prose(text: str) -> str:
    "The words of a Markdown cell: without fenced code, formulas, tables and link targets."
    text = re.sub(r"^ *```.*?^ *``` *$", "", text, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " x ", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\|.*$", "", text, flags=re.M))


def printed(node) -> bool:
    "Does this top-level statement surely print or draw? Only the plain cases count."
    while (
        isinstance(node, ast.For)
        and isinstance(node.iter, ast.List | ast.Tuple | ast.Dict)
        and node.body
    ):
        node = node.body[-1]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func) == "print"
    return (
        any(
            isinstance(n, ast.Call) and ast.unparse(n.func) == "plt.subplots"
            for n in ast.walk(node)
        )
        if isinstance(node, ast.Assign)
        else False
    )


def shows(cell) -> bool:
    "Should running this cell leave an output?"
    body = tree(cell).body
    last = body[-1] if body else None
    value = isinstance(last, ast.Expr) and isinstance(
        last.value, ast.BinOp | ast.Compare | ast.List | ast.Dict | ast.Tuple | ast.JoinedStr
    )
    return any(map(printed, body)) or value and not source(cell).rstrip().endswith(";")


# --- the rules: each yields (cell, what is wrong and what to do) ---


def rule_title(nb):
    first = nb.cells[0] if nb.cells else None
    if not (first and first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source)):
        yield (
            first,
            (
                "the first cell must be Markdown: '# Title', then '> one line that says what it is"
                " for'"
            ),
        )


def rule_default_exp(nb):
    second = nb.cells[1] if len(nb.cells) > 1 else None
    if not (
        second
        and second.cell_type == "code"
        and re.match(r"#\| default_exp [a-z_]+$", second.source.strip())
    ):
        yield second, "the second cell must be code with the one line '#| default_exp MODULE'"


def rule_ids(nb):
    seen = set()
    for cell in nb.cells:
        if (
            not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cell.id)
            or re.fullmatch(r"[0-9a-f]{6,}(-[0-9a-f]{4,})*", cell.id)
            or len(cell.id) > 40
        ):
            yield (
                cell,
                (
                    "the cell id is not readable; give it a short lower-case name such as"
                    " 'mean-pool-check'"
                ),
            )
        if cell.id in seen:
            yield cell, "the cell id occurs twice; rename one"
        seen.add(cell.id)


def rule_code_length(nb):
    for cell in code(nb):
        whole_class = exported(cell) and any(
            isinstance(node, ast.ClassDef) for node in tree(cell).body
        )
        limit = CODE_LINES * (3 if whole_class else 1)  # a class is shown once, and whole
        if (n := len(source(cell).splitlines())) > limit:
            yield cell, f"{n} lines of code; split it, {limit} is the limit and 40 the aim"


def rule_prose_length(nb):
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (n := len(prose(cell.source).split())) > PROSE_WORDS:
            yield cell, f"{n} words of prose; split it at an idea, {PROSE_WORDS} is the limit"


def rule_sections(nb):
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    for name in ("Why", "What goes wrong", "Exercises", "Next"):
        bold = r"|^\*\*Why" if name == "Why" else ""
        if not re.search(rf"^##+ {name}\b{bold}", text, re.M):
            yield None, f"there is no section '## {name}'; write it"


def rule_plot(nb):
    if not any(o.get("data", {}).get("image/png") for c in code(nb) for o in c.outputs):
        yield None, "no output is a plot; draw the one that answers this notebook's question"


def rule_check(nb):
    checks = r"\b(test_\w+\(|expect_fail\b|assert\b)"
    if not any(re.search(checks, source(c)) for c in code(nb) if not exported(c)):
        yield (
            None,
            (
                "no cell checks anything; compare a result with a naive computation (test_eq,"
                " test_close, assert, expect_fail)"
            ),
        )


def rule_errors(nb):
    for cell in code(nb):
        if any(o.output_type == "error" for o in cell.outputs):
            yield (
                cell,
                (
                    "the committed output is an error; mend the cell, or show the error with"
                    " expect_fail, and execute again"
                ),
            )


def rule_executed(nb):
    skip = tool.skipped_flags("")
    for cell in code(nb):
        if shows(cell) and not cell.outputs and not tool.flags_of(cell.source) & skip:
            yield (
                cell,
                (
                    "the cell prints or shows something but has no output; run `python"
                    " tools/notebooks.py` on the notebook"
                ),
            )


def rule_paths(nb):
    for cell in code(nb):
        text = str(
            [
                o.get("text", "")
                or {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/png")}
                for o in cell.outputs
            ]
        )
        if found := re.search(r"(?<![\w.~/])/(home|root|work|tmp)/[\w./-]*", text):
            yield (
                cell,
                (
                    f"the output shows a path of one machine ({found[0]}); print a relative path or"
                    " only the name"
                ),
            )


def rule_imports(nb):
    for cell in code(nb):
        body = tree(cell).body
        if any(map(is_import, body)) and not all(map(is_import, body)):
            other = next(n for n in body if not is_import(n))
            where = f"line {other.lineno}: {ast.unparse(other).splitlines()[0][:50]}"
            yield (
                cell,
                (
                    f"a cell with imports must hold nothing else ({where}); move the imports to a"
                    " cell of their own"
                ),
            )


def undocumented(text: str, node) -> list[str]:
    "What a public function, method or class lacks."
    said = ast.get_docstring(node, clean=False)
    lacks = (
        [] if said and "\n" not in said.strip() else [f"{node.name} needs a docstring of one line"]
    )
    if isinstance(node, ast.ClassDef):
        rows = docments.field_rows(text, node)
    else:
        rows = docments.function_rows(text, node)[0]
    rows = [
        row for row in rows if not row[3] and not re.match(r"_[A-Z]", row[1])
    ]  # an alias such as _Model carries its own help text
    return lacks + [
        f"{node.name}: '{row[0]}' needs a trailing comment: meaning, shape, unit" for row in rows
    ]


def rule_docments(nb):
    for cell in filter(exported, code(nb)):
        text = source(cell)
        for node in (
            n
            for n in tree(cell).body
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
        ):
            lacks = undocumented(text, node)
            for method in (
                (n for n in node.body if isinstance(n, ast.FunctionDef))
                if isinstance(node, ast.ClassDef)
                else ()
            ):
                if method.name == "__init__":
                    lacks += [
                        what for what in undocumented(text, method) if "docstring" not in what
                    ]
                elif not method.name.startswith("_"):
                    lacks += undocumented(text, method)
            for what in lacks:
                yield cell, what


def rule_links(nb, folder=None):
    for cell in (c for c in nb.cells if c.cell_type == "markdown" and folder):
        for target in re.findall(
            r"\[[^\]]*\]\((?![a-z]+:|#)([^)\s#]+)", re.sub(r"`[^`\n]*`", "", cell.source)
        ):
            if not (folder / target).exists():
                yield cell, f"the link to {target} leads nowhere; mend it"


LIGHT = [rule_ids, rule_errors, rule_executed, rule_paths, rule_links]
TUTORIAL = LIGHT + [rule_title, rule_code_length, rule_prose_length, rule_imports]
MODULE = TUTORIAL + [rule_default_exp, rule_sections, rule_plot, rule_check, rule_docments]


def problems(path: Path, rules) -> list[str]:
    "All that the rules find in a notebook, a sentence each."
    nb = rejoin_lines(
        nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))
    )  # as it is: nbformat.read would rename double ids
    found, size = [], path.stat().st_size
    if size > BYTES * (2 if path in TUTORIALS else 1):
        found.append(
            f"{path.name}: {size:,} bytes; draw smaller or fewer plots (figure.dpi 70 to 90),"
            f" {BYTES:,} is the limit"
        )
    for rule in rules:
        for cell, what in rule(nb, path.parent) if rule is rule_links else rule(nb):
            found.append(f"{path.name}, cell {cell.id if cell else '-'}: {what}")
    return found


@pytest.mark.parametrize(
    "path, rules",
    [(p, MODULE) for p in MODULES]
    + [(p, TUTORIAL) for p in TUTORIALS]
    + [(p, LIGHT) for p in INDEX],
    ids=lambda v: v.stem if isinstance(v, Path) else "",
)
def test_lint(path, rules):
    found = problems(path, rules)
    assert not found, "\n" + "\n".join(found)


# --- the exported library is what the notebooks say ---


def test_export_is_fresh(tmp_path):
    "Export and clean a copy: nothing may change."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "contrastive_st").mkdir()
    for name in ("settings.ini", "contrastive_st/__init__.py", "contrastive_st/__main__.py"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for program in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run(
            [Path(sys.executable).parent / program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, f"{program} failed:\n{done.stderr[-2000:]}"
    kinds = (("contrastive_st", "*.py"), ("nbs", "*.ipynb"))
    fresh = sorted(
        p.relative_to(tmp_path) for folder, end in kinds for p in (tmp_path / folder).rglob(end)
    )
    here = sorted(p.relative_to(ROOT) for p in (ROOT / "contrastive_st").glob("*.py"))
    stale = [
        str(p)
        for p in fresh
        if not (ROOT / p).exists() or not filecmp.cmp(ROOT / p, tmp_path / p, shallow=False)
    ]
    orphans = [
        str(p) for p in here if p not in fresh and p.name != "__main__.py"
    ]  # three lines, for python -m
    assert not stale, (
        f"not what the notebooks say: {', '.join(stale)}; run `make export` and commit notebook and"
        " module together"
    )
    assert not orphans, (
        f"written by hand or left over: {', '.join(orphans)}; modules come from notebooks"
    )


# --- the lint really fails ---


def good(**change):
    "A notebook that keeps every rule; a named cell can be replaced."
    image = new_output("display_data", data={"image/png": "aGVsbG8="})
    cells = {
        "title": new_markdown_cell("# Pooling\n> From token states to one vector."),
        "default-exp": new_code_cell("#| default_exp pooling"),
        "why": new_markdown_cell("**Why.** Because."),
        "imports": new_code_cell("import torch"),
        "half": new_code_cell(
            '#| export\ndef half(\n    x:float, # a number\n)->float: # half of it\n    "Halve a'
            ' number."\n    return x / 2'
        ),
        "half-check": new_code_cell(
            "assert half(2) == 1\nprint(half(3))", outputs=[new_output("stream", text="1.5\n")]
        ),
        "plot": new_code_cell("fig, ax = plt.subplots()", outputs=[image]),
        "wrong": new_markdown_cell("## What goes wrong\nThis.\n## Exercises\nThat.\n## Next\nEnd."),
    } | change
    for name, cell in cells.items():
        cell.id = cell.id if cell.metadata.pop("keep", False) else name
    nb = new_notebook()
    nb.cells = list(cells.values())  # given to new_notebook, double ids would be renamed
    return nb


def lint(tmp_path, nb) -> list[str]:
    (tmp_path / "99_bad.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return problems(tmp_path / "99_bad.ipynb", MODULE)


def test_a_good_notebook_passes(tmp_path):
    assert lint(tmp_path, good()) == []


BAD = {
    "no title": (dict(title=new_markdown_cell("Pooling")), "'# Title'"),
    "no line": (dict(title=new_markdown_cell("# Pooling")), "'> one line"),
    "no module": (dict([("default-exp", new_code_cell("x = 1"))]), "default_exp MODULE"),
    "uuid": (
        dict(imports=new_code_cell("1;", id="3f2a9c1e", metadata={"keep": True})),
        "not readable",
    ),
    "capital": (
        dict(imports=new_code_cell("1;", id="My_Cell", metadata={"keep": True})),
        "not readable",
    ),
    "twice": (dict(imports=new_code_cell("1;", id="why", metadata={"keep": True})), "occurs twice"),
    "long code": (dict(imports=new_code_cell("x = 1\n" * 81)), "81 lines"),
    "long prose": (dict(why=new_markdown_cell("**Why.** " + "word " * 121)), "122 words"),
    "no why": (dict(why=new_markdown_cell("Because.")), "'## Why'"),
    "no exercises": (
        dict(wrong=new_markdown_cell("## What goes wrong\n## Next")),
        "'## Exercises'",
    ),
    "no plot": (dict(plot=new_code_cell("x = 1")), "no output is a plot"),
    "no check": (dict([("half-check", new_code_cell("x = half(2)"))]), "no cell checks"),
    "error": (
        dict(
            imports=new_code_cell(
                "import torch", outputs=[new_output("error", ename="E", evalue="", traceback=[])]
            )
        ),
        "is an error",
    ),
    "not run": (dict([("half-check", new_code_cell("assert True\nprint(1)"))]), "has no output"),
    "value not run": (
        dict([("half-check", new_code_cell("assert True\nhalf(1) + 1"))]),
        "has no output",
    ),
    "path": (
        dict(
            [
                (
                    "half-check",
                    new_code_cell(
                        "assert 1", outputs=[new_output("stream", text="/home/me/x.tsv")]
                    ),
                )
            ]
        ),
        "/home/me/x.tsv",
    ),
    "mixed imports": (
        dict(imports=new_code_cell("import torch\ntorch.manual_seed(0)")),
        "must hold nothing else",
    ),
    "no comment": (
        dict(half=new_code_cell('#| export\ndef half(x:float):\n    "Halve."\n    return x / 2')),
        "'x' needs a trailing comment",
    ),
    "no docstring": (
        dict(
            half=new_code_cell(
                "#| export\ndef half(\n    x:float, # a number\n):\n    return x / 2"
            )
        ),
        "docstring of one line",
    ),
    "method": (
        dict(
            half=new_code_cell(
                '#| export\nclass Half:\n    "Halves."\n    def run(self, x):\n        "Run."\n    '
                "    x"
            )
        ),
        "run: 'x'",
    ),
    "field": (
        dict(
            half=new_code_cell(
                '#| export\nclass Half(NamedTuple):\n    "Halves."\n    x:float\n    y:float #'
                " known"
            )
        ),
        "Half: 'x'",
    ),
    "dead link": (
        dict(
            wrong=new_markdown_cell(
                "## What goes wrong\n## Exercises\n## Next\n[on](98_none.ipynb)"
            )
        ),
        "98_none.ipynb leads nowhere",
    ),
    "large": (
        dict(
            plot=new_code_cell(
                "x = 1", outputs=[new_output("display_data", data={"image/png": "A" * BYTES})]
            )
        ),
        "is the limit",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_lint_really_fails(tmp_path, name):
    change, said = BAD[name]
    found = lint(tmp_path, good(**change))
    assert len(found) == 1 and said in found[0] and "99_bad.ipynb" in found[0], found


def test_a_notebook_that_lacks_its_data_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    "A cell that raises SkipTest says why, and neither it nor a cell before it is written."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cells = (
        new_code_cell("print(1)", id="first"),
        new_code_cell("raise __import__('unittest').SkipTest('no data here')", id="run"),
        new_code_cell("1 / 0", id="last"),
    )
    nb = new_notebook()
    nb.cells = list(cells)
    nbformat.write(nb, tmp_path / "a.ipynb")
    before = (tmp_path / "a.ipynb").read_bytes()
    assert (
        tool.execute(tmp_path / "a.ipynb")[2] == ""
        and (tmp_path / "a.ipynb").read_bytes() == before
    )
    assert "a.ipynb: skipped at cell run: no data here" in capsys.readouterr().out
