"""Write what the pages in docs/ say of the code and of the records: recipe keys, and figures.

    python tools/reference.py           # write docs/recipe_keys.md and the tables of docs/howto_*
    python tools/reference.py --check   # say what is not fresh, and write nothing

A table of a how-to page stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`. Its
numbers come from benchmarks/results, so that none of them is typed by hand.
"""

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import ROOT
from pydantic import TypeAdapter

sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- figures: {} -->", "<!-- end of figures -->"
SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
HUGE = 10**6  # a bound beyond it only keeps nonsense out, so the page is shorter without it
PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}

INTRODUCTION = """# All keys of a recipe

A recipe is a TOML file with the tables below. Every key is checked before anything starts, and a
misspelt one is answered with the nearest that exists. `--set` changes a key for one run, for
example `--set train.lr=1e-4`, and `--sweep` tries several values. What a whole recipe looks like,
and why, is the subject of [recipes](../nbs/26_recipes.ipynb).

This page is made from the records that check a recipe, so it lists what the library takes today.
"""
CLOSING = """## `[tiny]`

The same tables again, under `tiny`, for example `tiny.train.steps = 150`. They are laid over the
others when you type `--tiny`, so that a long run can be tried in minutes.
"""


# --- recipe keys ---


def range_of(schema: dict[str, Any]) -> str:
    "Say in words which values a JSON schema lets through: 'whole number > 0'."
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join('""' if value == "" else f'"{value}"' for value in values)
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(map(range_of, kinds))
    kind = schema.get("type")
    if kind == "array":
        inner = range_of(schema.get("items") or {})
        return f"list, each a {inner}" if inner != "table" else "list of tables"
    if kind == "object" or "$ref" in schema:
        return "table"
    bounds = [
        f"{sign} {schema[key]:,}"
        for key, sign in SIGNS.items()
        if abs(schema.get(key, HUGE)) < HUGE
    ]
    return " ".join([PLAIN.get(kind, "value"), " and ".join(bounds)]).strip()


def toml(value: Any) -> str:
    "Write a default as a recipe would; an empty text stays visible."
    if value is None:
        return "left out"
    if isinstance(value, list | tuple):
        return f"`{json.dumps(list(value))}`"
    return f"`{json.dumps(value)}`"


def meanings(record: type) -> dict[str, str]:
    "Field -> the comment beside it, in the source of a record."
    from docments import field_rows

    source = inspect.getsource(sys.modules[record.__module__])
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == record.__name__
    )
    rows = field_rows(source, node)
    return {name: re.sub(r"\bNone =|\(\) =", "left out:", text) for name, _, _, text in rows}


def defaults(record: type) -> dict[str, Any]:
    "Field -> its default, for fields that have one."
    values = {}
    for field in dataclasses.fields(record):
        default, factory = field.default, field.default_factory
        if type(default).__name__ == "FieldInfo":  # pydantic's own Field
            default, factory = default.default, default.default_factory or dataclasses.MISSING
        if factory is not dataclasses.MISSING:
            default = factory()
        if default is not dataclasses.MISSING:
            values[field.name] = default
    return values


def key_table(record: type, leave_out: tuple[str, ...] = ()) -> str:
    "Return the table of a record's keys: name, values, default, meaning."
    schema = TypeAdapter(record).json_schema()["properties"]
    rows = ["| Key | Values | If you leave it out | Meaning |", "|---|---|---|---|"]
    said, values = meanings(record), defaults(record)
    for field in dataclasses.fields(record):
        name = field.name
        if name not in leave_out:
            default = toml(values[name]) if name in values else "**must be given**"
            cells = [f"`{name}`", range_of(schema[name]), default, said[name]]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def mix_table() -> str:
    "Return the table of the keys that a dataset of the mixture may have."
    from contrastive_st.mixture import read_config

    meaning = {
        "name": "file in the data folder, a prepared store, or the id of a dataset of the hub",
        "weight": "share of the batches, beside the other datasets; 0 leaves it out",
        "lines": "rows that the file should have; a difference is a warning",
        "columns": 'anchor, positive and hard negatives, such as `["question", "answer"]`',
        "split": "of a dataset of the hub",
        "label": "column with the label, if the texts have labels",
        "score": "column with the score, if the rows are graded pairs",
        "score_range": "lowest and highest score, such as `[0, 5]`",
        "prompts": 'text before the texts of each column, such as `["query: ", "passage: "]`',
        "relevance": "column that judges pairs: 1 is a positive, 0 a hard negative of the anchor",
        "teacher": "column with a teacher's scores of positive and negatives: a list of them, or "
        "how far the positive lies above the negative; or a list of columns, such as "
        '`["s1", "s2"]`',
        "teacher_scale": "multiplies these scores, so that they reach as far as our similarities, "
        "such as `0.05` for scores from -10 to 10; 1 if you leave it out",
    }
    try:  # it names its keys when it refuses one that is none
        read_config([{"name": "a", "weight": 1, "§": 1}], ROOT)
    except ValueError as error:
        keys = str(error).partition("the keys are ")[2].split(", ")
    if missing := set(keys) ^ set(meaning):
        raise ValueError(f"tools/reference.py has other keys of a dataset than mixture: {missing}")
    rows = [f"| `{key}` | {meaning[key]} |" for key in keys]
    return "\n".join(["| Key | Meaning |", "|---|---|", *rows])


def recipe_keys() -> str:
    "Return the page of all recipe keys."
    from contrastive_st.recipes import DataPlan, EvaluationPlan, ModelPlan, Recipe
    from contrastive_st.run import TrainConfig

    tables = ("model", "data", "train", "evaluation", "test", "tiny", "path", "text")
    more = {
        name: type(default)
        for name, default in defaults(Recipe).items()
        if dataclasses.is_dataclass(default) and name not in tables
    }
    parts = [
        INTRODUCTION,
        f"## Before the first table\n\n{key_table(Recipe, (*tables, *more))}\n",
        f"## `[model]`\n\n{key_table(ModelPlan)}\n",
        f"## `[data]`\n\n{key_table(DataPlan)}\n",
        f"## `[[data.mix]]`\n\nOne such table for each dataset.\n\n{mix_table()}\n",
        f"## `[train]`\n\n{key_table(TrainConfig)}\n",
        *(f"## `[{name}]`\n\n{key_table(record)}\n" for name, record in more.items()),
        "## `[evaluation]` and `[test]`\n\nBoth have the same keys. What `evaluation` measures may"
        " choose the model that is kept, and `test` is measured before and after training"
        f" only.\n\n{key_table(EvaluationPlan)}\n",
        CLOSING,
    ]
    return "\n".join(parts)


# --- figures of the how-to pages ---


def read(name: str) -> dict[str, Any]:
    "Return a record of benchmarks/results."
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source_of(record: dict[str, Any], case: dict[str, Any] | None = None) -> str:
    "Return the line below a table: command, date, hardware."
    date = (case or record).get("date", record["date"])
    command = record["command"].partition(" --")[0]
    return f"`{command}`, {date}, {record['hardware']}, torch {record['versions']['torch']}"


def batch_figures() -> str:
    "Pairs per second and peak memory by batch size, beside padded training."
    record = read("speed")
    rows = [
        "| Global batch | Pairs per second | Peak memory | Padded, in sentence-transformers |",
        "|---|---|---|---|",
    ]
    for size in (64, 128, 256, 1024):
        ways = record["cases"][f"train_{size}"]["ways"]
        ours, other = ways["ours bf16"], ways.get("peer bf16") or ways["peer cached bf16"]
        cells = [f"{size:,}", f"{ours['per_second']['median']:.0f}", f"{ours['peak_mb']:,.0f} MB"]
        cells.append(f"{other['per_second']['median']:.0f} pairs/s, {other['peak_mb']:,.0f} MB")
        rows.append("| " + " | ".join(cells) + " |")
    note = (
        "one thread, all-MiniLM-L6-v2 in bfloat16, short pairs; 1,024 goes in chunks on both sides"
    )
    return "\n".join([*rows, "", f"{source_of(record)}, {note}."])


def bf16_figures() -> str:
    "What bfloat16 brings: speed and memory, short and long texts."
    record = read("speed")
    rows = ["| Work | float32 | bfloat16 | Peak memory |", "|---|---|---|---|"]
    names = {
        "train_64": "training, 64 short pairs",
        "train_long": "training, 16 pairs of about 250 tokens",
        "encode_short": "encoding, short sentences",
        "encode_passages": "encoding, passages of about 170 tokens",
    }
    for key, name in names.items():
        ways = record["cases"][key]["ways"]
        full, half = ways["ours fp32"], ways["ours bf16"]
        speeds = [f"{way['per_second']['median']:,.0f}/s" for way in (full, half)]
        memory = f"{full['peak_mb']:,.0f} and {half['peak_mb']:,.0f} MB"
        rows.append("| " + " | ".join([name, *speeds, memory]) + " |")
    return "\n".join([*rows, "", f"{source_of(record)}, one thread, all-MiniLM-L6-v2."])


def tiled_figures() -> str:
    "What the tiled loss takes of memory and time, beside the plain one."
    record = read("tiled")
    rows = ["| Rows of the batch | Plain loss | Tiled loss |", "|---|---|---|"]
    for size, ways in record["medians"].items():
        cells = [f"{int(size):,}"]
        for way in ("plain", "tiled"):
            cells.append(
                f"{ways[way]['peak_mb']:,.0f} MB, {ways[way]['seconds']:,.2f} s"
                if way in ways
                else f"one matrix alone: {record['ratios'][f'one_matrix_mb_at_{size}']:,.0f} MB"
            )
        rows.append("| " + " | ".join(cells) + " |")
    note = f"{record['width']} dimensions, memory beyond the embeddings"
    return "\n".join([*rows, "", f"{source_of(record)}, {note}."])


def serve_figures() -> str:
    "What a service answers, one by one and batched."
    record = read("serve")
    rows = [
        "| Clients at once | Texts per second, each alone | Texts per second, batched |",
        "|---|---|---|",
    ]
    for clients in ("1", "8", "50"):
        alone, together = (record[way][clients]["texts_per_s"] for way in ("alone", "together"))
        rows.append(f"| {clients} | {alone:.1f} | {together:.1f} |")
    note = f"{record['cores']} cores, both busy with the clients too"
    return "\n".join([*rows, "", f"{source_of(record)}, {note}."])


FIGURES: dict[str, Callable[[], str]] = {
    "batch": batch_figures,
    "bf16": bf16_figures,
    "tiled": tiled_figures,
    "serve": serve_figures,
}


def filled(text: str) -> str:
    "Return a page with each of its tables of figures made anew."
    for name, make in FIGURES.items():
        begin = BEGIN.format(name)
        if begin in text:
            head, _, rest = text.partition(begin)
            old, end, tail = rest.partition(END)
            if not end:
                raise ValueError(f"after {begin} there is no {END}; add it")
            text = f"{head}{begin}\n{make()}\n{END}{tail}"
    return text


def fresh() -> dict[Path, str]:
    "Page -> its text as it should be, for all pages that this program writes."
    texts = {ROOT / "docs/recipe_keys.md": recipe_keys()}
    for path in sorted((ROOT / "docs").glob("howto_*.md")):
        texts[path] = filled(path.read_text(encoding="utf-8"))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if not fresh")
    check = parser.parse_args().check
    stale = []
    for path, text in fresh().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("not fresh: " if check else "written: ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
