"""A Sphinx extension: comments on parameters and fields become tables in the API reference.

def pad(
    lengths: Tensor,  # tokens per text, (N,) int64
    # what fills up the shorter texts; a comment that is too long for the line of its parameter
    # stands above it
    pad_id: int = 0,
) -> Tensor:  # (N, T)

Why an extension of our own? Sphinx itself reads comments beside attributes (`#:`), but none beside
parameters, and the extensions for parameters that we found read docstrings or annotations. nbdev
shows such comments in Quarto's pages only. Its parser, fastcore.docments, agrees with ours on 745
of 797 comments of this package. The others are those on `**options`, which it does not read, on
what a function without a type returns, and the help texts of the command line. The linter of the
notebooks needs the source of a cell to be read without importing it, which fastcore does not do.
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


def comment_above(line: int, source: str, comments: dict[int, str]) -> str:
    "Join the comment lines directly above a line."
    lines, texts = source.splitlines(), []
    while line - 1 in comments and lines[line - 2].lstrip().startswith("#"):
        line -= 1
        texts.append(comments[line])
    return " ".join(reversed(texts))


def is_first(node: ast.arg, source: str) -> bool:
    "Return whether a parameter is the first thing on its line."
    before = source.splitlines()[node.lineno - 1].encode()[: node.col_offset]
    return not before.strip(b" *")


def signature_end(source: str, function: ast.FunctionDef) -> int:
    "Return the line of the colon that ends a signature."
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] < function.lineno or token.type != tokenize.OP:
            continue
        depth += (token.string in "([{") - (token.string in ")]}")
        if token.string == ":" and depth == 0:
            return token.start[0]
    raise ValueError(f"the signature of {function.name} has no end")


Row = tuple[str, str, str, str]  # name, type, default, meaning


def parameter_rows(source: str, function: ast.FunctionDef) -> list[Row]:
    "Return the rows of a function's parameters."
    comments, rows, used = comments_by_line(source), [], set()
    for arg, default in parameters(function):
        line = (default or arg).end_lineno
        meaning = "" if line in used else comments.get(line, "")
        # else the comment belongs to a one-line body
        if line > function.lineno or function.body[0].lineno > line:
            used.add(line)
        if not meaning and is_first(arg, source):
            meaning = comment_above(arg.lineno, source, comments)
        annotation = ast.unparse(arg.annotation) if arg.annotation else ""
        value = ast.unparse(default) if default else ""
        rows.append((arg.arg, annotation, value, meaning or annotated_help(arg.annotation)))
    return rows


def returned_row(source: str, function: ast.FunctionDef) -> tuple[str, str] | None:
    "Return (type, meaning) of what a function returns, or None if it says neither."
    comments = comments_by_line(source)
    ends = [(default or arg).end_lineno for arg, default in parameters(function)]
    last = max(ends, default=function.lineno)  # a comment on this line is a parameter's
    end = signature_end(source, function)
    if function.body[0].lineno == end:  # its comment belongs to a one-line body
        end -= 1
    if not ends and end == function.lineno:  # no parameter, so the comment can only be this
        last -= 1
    # what stands on the line of the colon is about the whole, else each line says a part
    meaning = comments.get(end, "") if end > last else ""
    meaning = meaning or " ".join(comments[n] for n in range(last + 1, end) if n in comments)
    if function.returns is None:
        return ("", meaning) if meaning else None
    return ast.unparse(function.returns), meaning


def function_rows(
    source: str, function: ast.FunctionDef
) -> tuple[list[Row], tuple[str, str] | None]:
    "Return the rows of a function's parameters, and (type, meaning) of what it returns, or None."
    return parameter_rows(source, function), returned_row(source, function)


def field_rows(source: str, cls: ast.ClassDef) -> list[Row]:
    "Return the rows of the annotated fields of a dataclass or NamedTuple."
    comments, rows = comments_by_line(source), []
    for item in cls.body:
        if not isinstance(item, ast.AnnAssign) or item.target.id.startswith("_"):
            continue
        meaning = comments.get(item.end_lineno, "")
        meaning = meaning or comment_above(item.lineno, source, comments)
        annotation = ast.unparse(item.annotation)
        rows.append(
            (item.target.id, annotation, ast.unparse(item.value) if item.value else "", meaning)
        )
    return rows


# --- the Sphinx side ---


def escape(text: str) -> str:
    "Write a Markdown-like sentence as reStructuredText: `code` becomes ``code``, the rest escaped."
    parts = re.split(r"`([^`]+)`", text.replace("``", "`"))

    def plain(part):
        return re.sub(r"([\\*_|`]|(?<=\w):(?=\w))", r"\\\1", part)

    return "".join(f"``{part}``\\ " if i % 2 else plain(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    return f"``{text}``" if text else ""


def bounded(kind: str) -> str:
    "Shorten a type with pydantic's bounds: `Annotated[int, Field(gt=2)]` becomes `int > 2`."
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

    def words(bounds):
        return " and ".join(
            f"{signs[k]} {v}" for k, v in re.findall(r"(gt|ge|lt|le)=([^,\s]+)", bounds)
        )

    return re.sub(
        r"Annotated\[(\w+), Field\(([^()]*)\)\]", lambda m: f"{m[1]} {words(m[2])}".strip(), kind
    )


def table(rows: list[Row], head: str) -> list[str]:
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
    "Return (type, help) of an annotation; an `Annotated` alias, as in the CLI, has its own."
    known = parameter.annotation if parameter else None
    if not hasattr(known, "__metadata__"):
        return annotation, ""
    kind = known.__origin__
    said = next((m.help for m in known.__metadata__ if getattr(m, "help", None)), "")
    plain = isinstance(kind, type) and not hasattr(kind, "__args__")
    return kind.__name__ if plain else str(kind).replace("pathlib.", ""), said


def constructor_rows(cls: type) -> list[Row]:
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
    "Replace a docstring by itself, escaped, with tables of its parameters and what it returns."
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
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # a property of one line, made of a lambda
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
    # pages are read again when this file changes
    app.add_config_value("docments_version", version, "env")
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
