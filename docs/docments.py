"""A Sphinx extension: trailing comments on parameters and fields become tables in the API reference.

def pad(
    lengths:Tensor,   # tokens per text, (N,) int64
    pad_id:int=0,     # what fills up the shorter texts
)->Tensor:            # (N, T)
"""

import ast
import hashlib
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path


def comments_by_line(source: str) -> dict[int, str]:
    "The comment on each line of a source text, without its '#'."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def parameters(function: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    "The parameters of a function in order, each with its default; without self and cls."
    a = function.args
    positional = a.posonlyargs + a.args
    pairs = list(zip(positional, [None] * (len(positional) - len(a.defaults)) + a.defaults))
    pairs += [(a.vararg, None)] if a.vararg else []
    pairs += list(zip(a.kwonlyargs, a.kw_defaults))
    pairs += [(a.kwarg, None)] if a.kwarg else []
    return [(arg, default) for arg, default in pairs if arg.arg not in ("self", "cls")]


def annotated_help(annotation: ast.expr | None) -> str:
    "The help text inside `Annotated[..., typer.Option(help='...')]`; '' if there is none."
    calls = [n for n in ast.walk(annotation) if isinstance(n, ast.Call)] if annotation else []
    texts = [
        k.value.value
        for c in calls
        for k in c.keywords
        if k.arg == "help" and isinstance(k.value, ast.Constant)
    ]
    return texts[0] if texts else ""


def function_rows(
    source: str, function: ast.FunctionDef
) -> tuple[list[tuple[str, str, str, str]], tuple[str, str] | None]:
    "Rows (name, type, default, meaning) of a function in `source`, and (type, meaning) of what it returns, or None."
    comments, rows, used = comments_by_line(source), [], set()
    for arg, default in parameters(function):
        line = (default or arg).end_lineno
        meaning = "" if line in used else comments.get(line, "")
        if (
            line > function.lineno or function.body[0].lineno > line
        ):  # else the comment belongs to a one-line body
            used.add(line)
        kind = ast.unparse(arg.annotation) if arg.annotation else ""
        rows.append(
            (
                arg.arg,
                kind,
                ast.unparse(default) if default else "",
                meaning or annotated_help(arg.annotation),
            )
        )
    if function.returns is None:
        after = (
            function.args.end_lineno
            if hasattr(function.args, "end_lineno")
            else max(used, default=function.lineno)
        ) + 1
        meaning = " ".join(
            comments[n]
            for n in range(after, function.body[0].lineno)
            if n in comments and n not in used
        )
        return rows, ("", meaning) if meaning else None
    line = function.returns.end_lineno
    return rows, (
        ast.unparse(function.returns),
        comments.get(line, "") if line not in used and line < function.body[0].lineno else "",
    )


def field_rows(source: str, cls: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    "Rows (name, type, default, meaning) of the annotated fields of a dataclass or NamedTuple."
    comments, lines, rows = comments_by_line(source), source.splitlines(), []
    for item in (
        n for n in cls.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")
    ):
        above = (
            comments.get(item.lineno - 1, "")
            if lines[item.lineno - 2].lstrip().startswith("#")
            else ""
        )
        kind, default = ast.unparse(item.annotation), ast.unparse(item.value) if item.value else ""
        rows.append((item.target.id, kind, default, comments.get(item.end_lineno, "") or above))
    return rows


# --- the Sphinx side ---


def escape(text: str) -> str:
    "A Markdown-like sentence as reStructuredText: `code` becomes ``code``, other markup characters stay themselves."
    parts = re.split(r"`([^`]+)`", text.replace("``", "`"))
    plain = lambda part: re.sub(r"([\\*_|`]|(?<=\w):(?=\w))", r"\\\1", part)
    return "".join(f"``{part}``\\ " if i % 2 else plain(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    return f"``{text}``" if text else ""


def bounded(kind: str) -> str:
    "A type with the bounds that pydantic checks, short: `Annotated[int, Field(gt=2)]` becomes `int > 2`."
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    words = lambda bounds: " and ".join(
        f"{signs[k]} {v}" for k, v in re.findall(r"(gt|ge|lt|le)=([^,\s]+)", bounds)
    )
    return re.sub(
        r"Annotated\[(\w+), Field\(([^()]*)\)\]", lambda m: f"{m[1]} {words(m[2])}".strip(), kind
    )


def table(rows: list[tuple[str, str, str, str]], head: str) -> list[str]:
    "A list-table: name, type and default, meaning."
    lines = [
        ".. list-table::",
        "   :class: docments",
        "   :header-rows: 1",
        "   :widths: 20 30 50",
        "",
        f"   * - {head}",
        "     - Type and default",
        "     - Meaning",
    ]
    for name, kind, default, meaning in rows:
        typed = code(bounded(kind)) + (f" = {code(default)}" if default else "")
        lines += [
            f"   * - {code(name)}",
            f"     - {typed}".rstrip(),
            f"     - {escape(meaning)}".rstrip(),
        ]
    return lines + [""]


def shorten(annotation: str, parameter: inspect.Parameter | None) -> tuple[str, str]:
    "(type, help) of an annotation; an `Annotated` alias, as the command line uses, gives its own type and help text."
    known = parameter.annotation if parameter else None
    if not hasattr(known, "__metadata__"):
        return annotation, ""
    kind = known.__origin__
    said = next((m.help for m in known.__metadata__ if getattr(m, "help", None)), "")
    return (
        kind.__name__
        if isinstance(kind, type) and not hasattr(kind, "__args__")
        else str(kind).replace("pathlib.", "")
    ), said


def constructor_rows(cls: type) -> list[tuple[str, str, str, str]]:
    "Rows of the parameters of `__init__`, also of one that a private base class of ours defines."
    init = cls.__init__
    if (
        not inspect.isfunction(init)
        or init.__module__.split(".")[0] != cls.__module__.split(".")[0]
    ):
        return []
    try:
        source = textwrap.dedent(inspect.getsource(init))
    except OSError:  # written by a decorator
        return []
    return function_rows(source, ast.parse(source).body[0])[0]


def process_docstring(app, what, name, obj, options, lines) -> None:
    "Replace a docstring by itself, escaped, with the tables of its parameters and of what it returns."
    lines[:] = [escape(line) for line in lines]
    if what not in ("function", "method", "class", "property"):
        return
    try:
        target = obj.fget if isinstance(obj, property) else inspect.unwrap(obj)
        source = textwrap.dedent(inspect.getsource(target))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return
    rows, returned = [], None
    if isinstance(node, ast.ClassDef):
        fields = field_rows(source, node)
        rows = fields or constructor_rows(obj)
        head = "Field" if fields else "Parameter"
    else:
        rows, returned = function_rows(source, node)
        signature = inspect.signature(target).parameters
        for i, (arg, kind, default, meaning) in enumerate(rows):
            kind, said = shorten(kind, signature.get(arg))
            rows[i] = (arg, kind, default, meaning or said)
        head = "Parameter"
    if lines and lines[-1]:
        lines.append("")
    lines += table(rows, head) if rows else []
    if returned and returned != ("None", ""):
        kind, meaning = returned
        lines += [
            " ".join(p for p in ("**Returns**", code(kind.strip("\"'")), escape(meaning)) if p),
            "",
        ]


def skip_member(app, what, name, obj, skip, options):
    "Leave out the fields of a class: they stand in its table already."
    method = inspect.isroutine(obj) or isinstance(obj, property | classmethod | staticmethod | type)
    return True if what == "class" and not method else None


def setup(app):
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    app.add_config_value(
        "docments_version", version, "env"
    )  # pages are read again when this file changes
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
