"""Lint of the notebooks, with the rules of CONTRIBUTING.md: each says which cell and what to do."""

import ast
import copy
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
MODULES = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("[!.]*.ipynb"))
INDEX = [p for p in [ROOT / "nbs/index.ipynb"] if p.exists()]
CODE_LINES, PROSE_WORDS, BYTES, COLUMNS = 80, 120, 255_000, 100
# a body on the line of its `if`, two statements on a line, a lambda bound to a name
STATEMENTS = "E701,E702,E731"

# Cells whose committed output still has lines of more than 100 columns: change what they print,
# execute the notebook, and take the cell off this list. Nothing is added to it.
WIDE_OUTPUTS = {
    "19_xla": "run",
    "26_recipes": "tiny-runs",
    "mteb": "choose models run hours",
    "multi_qa_search": "data exams train by-set wins failures ask wrong-loud",
    "nli_to_stsb": "bi sts-look road train recipe by-eye",
    "one_billion_pairs_tpu": "seen prepare plan feed run counters resume left spot",
}
WIDE_OUTPUTS = {name: set(ids.split()) for name, ids in WIDE_OUTPUTS.items()}


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
    lines = [line for line in cell.source.split("\n") if not line.startswith("#|")]
    return "\n".join(lines).strip("\n")


def tree(cell) -> ast.Module:
    "The parsed cell; cells with shell or magic lines count as empty."
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return ast.parse("")


def exported(cell) -> bool:
    words = {flag.split()[0] for flag in tool.flags_of(cell.source)}
    return bool(words & {"export", "exports", "exporti"})


def is_import(node) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def prose(text: str) -> str:
    "The words of a Markdown cell: without fenced code, formulas, tables and link targets."
    text = re.sub(r"^ *```.*?^ *``` *$", "", text, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " x ", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\|.*$", "", text, flags=re.M))


def printed(node) -> bool:
    "Does this top-level statement surely print or draw? Only the plain cases count."
    plain = ast.List | ast.Tuple | ast.Dict
    while isinstance(node, ast.For) and isinstance(node.iter, plain) and node.body:
        node = node.body[-1]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func) == "print"
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    return isinstance(node, ast.Assign) and any(
        ast.unparse(call.func) == "plt.subplots" for call in calls
    )


def shows(cell) -> bool:
    "Should running this cell leave an output?"
    body = tree(cell).body
    last = body[-1] if body else None
    value = isinstance(last, ast.Expr) and isinstance(
        last.value, ast.BinOp | ast.Compare | ast.List | ast.Dict | ast.Tuple | ast.JoinedStr
    )
    return any(map(printed, body)) or value and not source(cell).rstrip().endswith(";")


RUFF = {}  # source of a cell -> (the same as ruff formats it, what ruff complains of)


def look_up(sources) -> None:
    "Ask ruff about all cells that it has not seen, in two calls."
    new = sorted(set(sources) - RUFF.keys())
    if new:
        answers = zip(tool.formatted(new), tool.complaints(new, STATEMENTS))
        RUFF.update(zip(new, answers))


def printed_lines(output) -> list[str]:
    "The lines that an output shows as plain text: not those of a table or plot, which is drawn."
    data = output.get("data", {})
    drawn = any(kind.startswith(("text/html", "text/markdown", "image/")) for kind in data)
    text = output.get("text", "") or ("" if drawn else data.get("text/plain", ""))
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


# --- the rules: each yields (cell, what is wrong and what to do) ---


def rule_title(nb):
    first = nb.cells[0] if nb.cells else None
    if not (first and first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source)):
        what = (
            "the first cell must be Markdown: '# Title', then '> one line that says what it is for'"
        )
        yield first, what


def rule_default_exp(nb):
    second = nb.cells[1] if len(nb.cells) > 1 else None
    is_code = second and second.cell_type == "code"
    if not (is_code and re.match(r"#\| default_exp [a-z_]+$", second.source.strip())):
        yield second, "the second cell must be code with the one line '#| default_exp MODULE'"


def is_readable(name: str) -> bool:
    words = re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)
    digits = re.fullmatch(r"[0-9a-f]{6,}(-[0-9a-f]{4,})*", name)
    return bool(words) and not digits and len(name) <= 40


def rule_ids(nb):
    seen = set()
    for cell in nb.cells:
        if not is_readable(cell.id):
            what = (
                "the cell id is not readable; give it a short lower-case name such as 'mean-pool'"
            )
            yield cell, what
        if cell.id in seen:
            yield cell, "the cell id occurs twice; rename one"
        seen.add(cell.id)


def rule_format(nb):
    look_up(c.source for c in code(nb))
    for cell in code(nb):
        if RUFF[cell.source][0] != cell.source:
            yield cell, "the code is not formatted; run `make format`"


def rule_statements(nb):
    look_up(c.source for c in code(nb))
    for cell in code(nb):
        for what in RUFF[cell.source][1]:
            yield cell, f"{what}; give each statement its line, and each function a def"


def rule_columns(nb):
    for cell in code(nb):
        for line in cell.source.split("\n"):
            if len(line) > COLUMNS and "://" not in line:
                what = (
                    f"a line has {len(line)} columns, {COLUMNS} is the limit: {line.strip()[:50]}"
                )
                yield cell, what


def wide_lines(cell) -> list[str]:
    "The lines in a cell's output that have too many columns."
    lines = [line for output in cell.outputs for line in printed_lines(output)]
    return [line for line in lines if len(line) > COLUMNS]


def rule_output_columns(nb):
    for cell in code(nb):
        for line in wide_lines(cell)[:1]:
            what = (
                f"an output line has {len(line)} columns, {COLUMNS} is the limit; print less on it"
            )
            yield cell, f"{what}: {line.strip()[:50]}"


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


def is_picture(data):
    "Whether an output is a picture: a plot, or a drawing as SVG."
    plot = "image/png" in data or "image/svg+xml" in data
    return plot or data.get("text/html", "").startswith("<svg ")


def rule_plot(nb):
    if not any(is_picture(o.get("data", {})) for c in code(nb) for o in c.outputs):
        yield None, "no output is a plot; draw the one that answers this notebook's question"


def rule_check(nb):
    checks = r"\b(test_\w+\(|expect_fail\b|assert\b)"
    if not any(re.search(checks, source(c)) for c in code(nb) if not exported(c)):
        what = (
            "no cell checks anything; compare a result with a naive computation (test_eq,"
            " test_close, assert, expect_fail)"
        )
        yield None, what


def rule_errors(nb):
    for cell in code(nb):
        if any(o.output_type == "error" for o in cell.outputs):
            what = (
                "the committed output is an error; mend the cell, or show the error with"
                " expect_fail, and execute again"
            )
            yield cell, what


def rule_executed(nb):
    skip = tool.skipped_flags("")
    for cell in code(nb):
        if shows(cell) and not cell.outputs and not tool.flags_of(cell.source) & skip:
            what = (
                "the cell prints or shows something but has no output; run `python"
                " tools/notebooks.py` on the notebook"
            )
            yield cell, what


def rule_paths(nb):
    for cell in code(nb):
        texts = []
        for output in cell.outputs:
            data = output.get("data", {})
            others = {k: v for k, v in data.items() if not k.startswith("image/png")}
            texts.append(output.get("text", "") or others)
        if found := re.search(r"(?<![\w.~/])/(home|root|work|tmp)/[\w./-]*", str(texts)):
            what = f"the output shows a path of one machine ({found[0]})"
            yield cell, f"{what}; print a relative path or only the name"


def rule_imports(nb):
    for cell in code(nb):
        body = tree(cell).body
        if any(map(is_import, body)) and not all(map(is_import, body)):
            other = next(n for n in body if not is_import(n))
            where = f"line {other.lineno}: {ast.unparse(other).splitlines()[0][:50]}"
            what = f"a cell with imports must hold nothing else ({where})"
            yield cell, f"{what}; move the imports to a cell of their own"


def undocumented(text: str, node) -> list[str]:
    "What a public function, method or class lacks."
    lacks = []
    doc = ast.get_docstring(node, clean=False)
    if not doc or "\n" in doc.strip():
        lacks.append(f"{node.name} needs a docstring of one line")
    if isinstance(node, ast.ClassDef):
        rows = docments.field_rows(text, node)
    else:
        rows = docments.function_rows(text, node)[0]
    for name, annotation, _, meaning in rows:
        # an alias such as _Model carries its own help text
        if not meaning and not re.match(r"_[A-Z]", annotation):
            lacks.append(f"{node.name}: '{name}' needs a comment: meaning, shape, unit")
    return lacks


def undocumented_with_methods(text: str, node) -> list[str]:
    "What a public function lacks, or a public class with its methods."
    lacks = undocumented(text, node)
    methods = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.FunctionDef)]
    for method in methods if isinstance(node, ast.ClassDef) else ():
        if method.name == "__init__":
            lacks += [what for what in undocumented(text, method) if "docstring" not in what]
        elif not method.name.startswith("_"):
            lacks += undocumented(text, method)
    return lacks


def rule_docments(nb):
    for cell in filter(exported, code(nb)):
        for node in tree(cell).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_"):
                for what in undocumented_with_methods(source(cell), node):
                    yield cell, what


def rule_links(nb, folder=None):
    link = r"\[[^\]]*\]\((?![a-z]+:|#)([^)\s#]+)"
    for cell in (c for c in nb.cells if c.cell_type == "markdown" and folder):
        for target in re.findall(link, re.sub(r"`[^`\n]*`", "", cell.source)):
            if not (folder / target).exists():
                yield cell, f"the link to {target} leads nowhere; mend it"


FORM = [rule_format, rule_statements, rule_columns, rule_output_columns]
LIGHT = [rule_ids, rule_errors, rule_executed, rule_paths, rule_links, *FORM]
TUTORIAL = LIGHT + [rule_title, rule_code_length, rule_prose_length, rule_imports]
MODULE = TUTORIAL + [rule_default_exp, rule_sections, rule_plot, rule_check, rule_docments]


def read(path: Path):
    "A notebook as it is: nbformat.read would rename double ids."
    return rejoin_lines(nbformat.from_dict(json.loads(path.read_text(encoding="utf-8"))))


def problems(path: Path, rules) -> list[str]:
    "All that the rules find in a notebook, a sentence each."
    nb, found, size = read(path), [], path.stat().st_size
    if size > BYTES * (2 if path in TUTORIALS else 1):
        found.append(
            f"{path.name}: {size:,} bytes; draw smaller or fewer plots (figure.dpi 70 to 90),"
            f" {BYTES:,} is the limit"
        )
    for rule in rules:
        for cell, what in rule(nb, path.parent) if rule is rule_links else rule(nb):
            known = WIDE_OUTPUTS.get(path.stem, ()) if rule is rule_output_columns else ()
            if not (cell and cell.id in known):
                found.append(f"{path.name}, cell {cell.id if cell else '-'}: {what}")
    return found


@pytest.fixture(scope="session")
def one_call():
    "All cells of all notebooks go through ruff at once, not notebook by notebook."
    look_up(c.source for path in NOTEBOOKS for c in code(read(path)))


NOTEBOOKS = {path: MODULE for path in MODULES}
NOTEBOOKS |= {path: TUTORIAL for path in TUTORIALS}
NOTEBOOKS |= {path: LIGHT for path in INDEX}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lint(one_call, path):
    found = problems(path, NOTEBOOKS[path])
    assert not found, "\n" + "\n".join(found)


def test_the_list_of_wide_outputs_holds_nothing_that_is_mended():
    wide = {
        path.stem: {cell.id for cell in code(read(path)) if wide_lines(cell)} for path in NOTEBOOKS
    }
    mended = {(name, i) for name, ids in WIDE_OUTPUTS.items() for i in ids - wide.get(name, set())}
    assert not mended, f"take them off WIDE_OUTPUTS: {sorted(mended)}"


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
    # three lines, for python -m
    orphans = [str(p) for p in here if p not in fresh and p.name != "__main__.py"]
    assert not stale, (
        f"not what the notebooks say: {', '.join(stale)}; run `make export` and commit notebook and"
        " module together"
    )
    assert not orphans, (
        f"written by hand or left over: {', '.join(orphans)}; modules come from notebooks"
    )


# --- the lint really fails ---

md, py = new_markdown_cell, new_code_cell
HALF = """#| export
def half(
    x: float,  # a number
) -> float:  # half of it
    "Halve a number."
    return x / 2"""


def prints(source: str, text: str, **more):
    "A cell that has printed a text."
    return py(source, outputs=[new_output("stream", text=text)], **more)


def shows_data(source: str, **data):
    "A cell that has shown something: text_plain='5' is the mime type text/plain."
    data = {kind.replace("_", "/"): value for kind, value in data.items()}
    return py(source, outputs=[new_output("display_data", data=data)])


def good(**change):
    "A notebook that keeps every rule; a named cell can be replaced."
    cells = {
        "title": md("# Pooling\n> From token states to one vector."),
        "default-exp": py("#| default_exp pooling"),
        "why": md("**Why.** Because."),
        "imports": py("import torch"),
        "half": py(HALF),
        "half-check": prints("assert half(2) == 1\nprint(half(3))", "1.5\n"),
        "plot": shows_data("fig, ax = plt.subplots()", image_png="aGVsbG8="),
        "wrong": md("## What goes wrong\nThis.\n## Exercises\nThat.\n## Next\nEnd."),
    } | change
    for name, cell in cells.items():
        cell.id = cell.metadata.pop("id", name)
    nb = new_notebook()
    nb.cells = list(cells.values())  # given to new_notebook, double ids would be renamed
    return nb


def lint(tmp_path, nb) -> list[str]:
    (tmp_path / "99_bad.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return problems(tmp_path / "99_bad.ipynb", MODULE)


def test_a_good_notebook_passes(tmp_path):
    assert lint(tmp_path, good()) == []


def named(name: str):
    "A cell with an id of its own."
    return py("1;", metadata={"id": name})


LONG = "y = 10 * '" + 85 * "y" + "'\n"
WIDE = {"text_plain": "x" * 101}
ERROR = new_output("error", ename="E", evalue="", traceback=[])
CLASS = '#| export\nclass Half{}:\n    "Halves."\n\n    {}'
DEAD = "## What goes wrong\n## Exercises\n## Next\n[on](98_none.ipynb)"

# what is wrong, in which cell, the cell, what the lint says
BAD = [
    ("no title", "title", md("Pooling"), "'# Title'"),
    ("no line", "title", md("# Pooling"), "'> one line"),
    ("no module", "default-exp", py("x = 1"), "default_exp MODULE"),
    ("uuid", "imports", named("3f2a9c1e"), "not readable"),
    ("capital", "imports", named("My_Cell"), "not readable"),
    ("twice", "imports", named("why"), "occurs twice"),
    ("not formatted", "imports", py("x=1"), "run `make format`"),
    ("not formatted, exported", "half", py(HALF.replace(": float", ":float")), "run `make format`"),
    ("lambda", "imports", py("f = lambda x: x"), "E731"),
    ("long line", "imports", py("# " + "x" * 99), "101 columns"),
    ("long line with magic", "imports", py("%pip install " + "x" * 88), "101 columns"),
    ("wide print", "imports", prints("import torch", "ok\n" + "x" * 101), "101 columns"),
    ("wide value", "imports", shows_data("import torch", **WIDE), "101 columns"),
    ("long code", "imports", py("\n".join(["x = 1"] * 81)), "81 lines"),
    ("long prose", "why", md("**Why.** " + "word " * 121), "122 words"),
    ("no why", "why", md("Because."), "'## Why'"),
    ("no exercises", "wrong", md("## What goes wrong\n## Next"), "'## Exercises'"),
    ("no plot", "plot", py("x = 1"), "no output is a plot"),
    ("no check", "half-check", py("x = half(2)"), "no cell checks"),
    ("error", "imports", py("import torch", outputs=[ERROR]), "is an error"),
    ("not run", "half-check", py("assert True\nprint(1)"), "has no output"),
    ("value not run", "half-check", py("assert True\nhalf(1) + 1"), "has no output"),
    ("path", "half-check", prints("assert 1", "/home/me/x.tsv"), "/home/me/x.tsv"),
    ("mixed imports", "imports", py("import torch\n\ntorch.manual_seed(0)"), "nothing else"),
    ("no comment", "half", py(HALF.replace("  # a number", "")), "'x' needs a comment"),
    ("no docstring", "half", py(HALF.replace('"Halve a number."', "x = x")), "docstring of one"),
    ("method", "half", py(CLASS.format("", 'def run(self, x):\n        "Run."')), "run: 'x'"),
    ("field", "half", py(CLASS.format("(NamedTuple)", "x: float")), "Half: 'x'"),
    ("dead link", "wrong", md(DEAD), "98_none.ipynb leads nowhere"),
    ("large", "plot", shows_data("x = 1", image_png="A" * BYTES), "is the limit"),
]


@pytest.mark.parametrize("place, cell, says", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_lint_really_fails(tmp_path, place, cell, says):
    found = lint(tmp_path, good(**{place: copy.deepcopy(cell)}))
    assert len(found) == 1 and says in found[0] and "99_bad.ipynb" in found[0], found


@pytest.mark.parametrize(
    "source", ["if x: y = 1", "x = 1; y = 2", "for x in y: pass", "class X: y = 1"]
)
def test_each_statement_has_its_line(tmp_path, source):
    "ruff finds it where it stands, and would format it away."
    found = lint(tmp_path, good(imports=py(source)))
    assert len(found) == 2 and "run `make format`" in found[0] and "line 1: E70" in found[1]


def test_lines_that_may_be_wide(tmp_path):
    "A line with an address, and the plain text of a table or a plot, which nobody sees."
    address = py("# https://example.org/" + "x" * 99)
    table = shows_data("import torch", text_html="<b>1</b>", **WIDE)
    assert lint(tmp_path, good(imports=address)) == lint(tmp_path, good(imports=table)) == []


# --- formatting ---

MESSY = ["#| export\n#| hide\n\nx=1\n", "plt.plot(  );", "!ls  -l\nx=1", "%time x=1", "#| hide", ""]
TIDY = ["#| export\n#| hide\nx = 1", "plt.plot();", "!ls  -l\nx=1", "%time x=1", "#| hide", ""]


def test_cells_are_formatted(tmp_path, monkeypatch):
    "Directives first and untouched, a last semicolon kept, cells with magic lines left alone."
    calls, ruff = [], tool.ruff
    monkeypatch.setattr(tool, "ruff", lambda *args: calls.append(args) or ruff(*args))
    for name in "ab":
        nb = new_notebook()
        nb.cells = [py(source, id=f"cell-{i}") for i, source in enumerate(MESSY)]
        nb.cells.append(md("x=1", id="prose"))
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    paths = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    assert tool.format_notebooks(paths) == paths and len(calls) == 1
    for path in paths:
        assert [c.source for c in read(path).cells] == [*TIDY, "x=1"]
    assert tool.format_notebooks(paths) == [] == tool.format_notebooks([])


# --- comments become documentation ---

ABOVE = """def f(
    a: int,  # trailing
    # above, on two
    # lines
    b: dict[str, int] = None,
    # not this one
    *args: int,  # but this
    c=1,
    # not directly above

    d=2,
    # for two on a line
    e=3, g=4,
) -> {returns}
    # no parameter
    pass
"""


def rows_of(text: str):
    return docments.function_rows(text, ast.parse(text).body[0])


def test_the_comment_on_a_parameter_may_stand_above_it():
    rows, _ = rows_of(ABOVE.format(returns="int:"))
    expected = [
        ("a", "int", "", "trailing"),
        ("b", "dict[str, int]", "None", "above, on two lines"),
        ("args", "int", "", "but this"),
        ("c", "", "1", ""),
        ("d", "", "2", ""),
        ("e", "", "3", "for two on a line"),
        ("g", "", "4", ""),
    ]
    assert rows == expected


RETURNS = [
    ("int:  # all", ("int", "all")),
    ("int:", ("int", "")),
    ("tuple[\n    int,\n    str,\n]:  # both", ("tuple[int, str]", "both")),
    ("tuple[\n    int,  # one\n    str,  # two\n]:", ("tuple[int, str]", "one two")),
    ("(\n    tuple[int, str]  # both\n):", ("tuple[int, str]", "both")),
    ("(\n    # both\n    tuple[int, str]\n):", ("tuple[int, str]", "both")),
]


@pytest.mark.parametrize("text, expected", RETURNS)
def test_what_is_returned_may_take_several_lines(text, expected):
    assert rows_of(ABOVE.format(returns=text))[1] == expected
    assert rows_of(f"def f() -> {text}\n    pass\n")[1] == expected
    assert rows_of(f"def f(a) -> {text}\n    pass\n")[0][0][:2] == ("a", "")


def test_the_comment_on_a_field_may_take_several_lines():
    text = "class A(NamedTuple):\n    # one,\n    # two\n    x: int\n    y: int = 1  # three\n"
    rows = docments.field_rows(text, ast.parse(text).body[0])
    assert rows == [("x", "int", "", "one, two"), ("y", "int", "1", "three")]


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
    assert tool.execute(tmp_path / "a.ipynb")[2] == ""
    assert (tmp_path / "a.ipynb").read_bytes() == before
    assert "a.ipynb: skipped at cell run: no data here" in capsys.readouterr().out


def plot(svg: str, **more):
    "What the shell gives for a plot that was drawn twice."
    return {"image/svg+xml": svg, "image/png": "aGVsbG8=", "text/plain": "<Figure>"} | more


def test_a_plot_is_kept_as_svg_unless_it_is_large_or_holds_pixels():
    "One of the two stays, without the date and with letters of the reader."
    font = "font: 10px 'DejaVu Sans', 'Verdana', sans-serif"
    svg = f'<svg>\n <metadata><date>today</date></metadata><text style="{font}">a</text></svg>'
    small = tool.lean_plot(plot(svg))
    assert small.keys() == {"image/svg+xml", "text/plain"}
    assert small["image/svg+xml"] == '<svg><text style="font: 10px sans-serif">a</text></svg>'
    for other in ("<svg>" + "x" * tool.LARGEST_SVG, '<svg><image href="data:"/></svg>'):
        assert tool.lean_plot(plot(other)).keys() == {"image/png", "text/plain"}
    assert tool.lean_plot({"image/png": "a"}) == {"image/png": "a"}  # a picture, not a plot


def test_the_lint_takes_an_svg_for_a_plot(tmp_path):
    drawn = shows_data("fig, ax = plt.subplots()", text_plain="x" * 101)
    drawn.outputs[0].data["image/svg+xml"] = "<svg></svg>"
    assert lint(tmp_path, good(plot=drawn)) == []
