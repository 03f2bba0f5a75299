"""Everything the README shows works: its Python, its commands, its make targets, its freshness."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MINUTES = 10
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "COLUMNS": "120",
}
# commands that are executed; of all others only make's targets are checked
RUN = ("contrastive-st", "python", "python3")


def blocks(text: str, language: str) -> list[str]:
    "The fenced blocks of one language, in order."
    return [m[1] for m in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def commands(block: str) -> list[str]:
    "The commands of a bash block: joined at backslashes, no prompts, comments and blank lines."
    lines = re.sub(r"\\\n\s*", "", block).split("\n")
    lines = [re.sub(r"^\$ ", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", text, re.M))


def missing_targets(line: str, targets: set[str]) -> list[str]:
    "Targets that a `make ...` command names and the Makefile does not have."
    words = shlex.split(line, comments=True)
    words = words[words.index("make") + 1 :] if "make" in words else []
    asked = [
        w
        for w in words[: next((i for i, w in enumerate(words) if w in ("&&", ";", "|")), None)]
        if "=" not in w and not w.startswith("-")
    ]
    return [w for w in asked if w not in targets]


def missing_run(line: str, folder: Path) -> str:
    "A path under runs/ that a command reads and that is not there, or ''."
    words = shlex.split(line, comments=True)
    written = {words[i + 1] for i, w in enumerate(words[:-1]) if w in ("--out", "-o")}
    paths = [m for w in words if w not in written for m in re.findall(r"\bruns/[\w./-]+", w)]
    return next((p for p in paths if not (folder / p).exists()), "")


def readme() -> str:
    "The text of the README; the tests are skipped as long as it is empty."
    text = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    if len(text.split()) < 30:
        pytest.skip("README.md is still empty: write nbs/index.ipynb, then `make readme`")
    return text


@pytest.fixture
def desk(tmp_path) -> Path:
    "An empty folder that looks like the repository: links to its files, its own runs/."
    names = "recipes benchmarks tools nbs tests contrastive_st settings.ini Makefile docs"
    for entry in ROOT.iterdir():
        if entry.name in names.split():
            (tmp_path / entry.name).symlink_to(entry)
    if (ROOT / "runs").is_dir():
        shutil.copytree(
            ROOT / "runs",
            tmp_path / "runs",
            ignore=shutil.ignore_patterns("checkpoint*", "tensorboard"),
        )
    return tmp_path


def environment() -> dict[str, str]:
    return os.environ | OFFLINE | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def python_program(text: str) -> str:
    "All Python blocks as one program; a last expression is shown, as a notebook does."
    parts = []
    for block in blocks(text, "python"):
        body = ast.parse(block).body  # a syntax error names the line of the block
        if body and isinstance(body[-1], ast.Expr):
            last = body[-1].lineno - 1
            lines = block.rstrip("\n").split("\n")
            block = (
                "\n".join(lines[:last] + ["_ = (" + "\n".join(lines[last:]).rstrip("; ") + "\n)"])
                + "\n"
            )
        parts.append(block)
    return "\n\n".join(parts)


def undefined_names(program: str) -> str:
    "What ruff says about names that a program uses and does not define."
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_python_blocks_stand_alone():
    "They are the index page's cells, which nbdev_test runs; here none may need a hidden cell."
    text = readme()
    if not blocks(text, "python"):
        pytest.skip("README.md has no Python blocks")
    assert not (problems := undefined_names(python_program(text))), problems
    assert "F821" in undefined_names("print(hidden)")


def shorten(line: str, folder: Path) -> None:
    "Let a recipe that a command has made train for one pass: a tutorial trains the same whole."
    if line.startswith("contrastive-st new "):
        recipe = folder / shlex.split(line)[2]
        shorter = re.sub(r"^epochs = \d+", "epochs = 1", recipe.read_text(), flags=re.M)
        assert shorter != recipe.read_text()
        recipe.write_text(shorter)


def test_commands_run(desk):
    ran, left = [], []
    for line in (line for block in blocks(readme(), "bash") for line in commands(block)):
        if line.split()[0] not in RUN:
            continue
        if path := missing_run(line, desk):
            left.append(f"{line}   needs {path}; run `make train` first")
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=desk,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
        )
        assert done.returncode == 0, (
            f"README.md says `{line}`, which exits"
            f" {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
        ran.append(line)
        shorten(line, desk)
    if left:
        pytest.skip(f"ran {len(ran)} commands; not run: " + " | ".join(left))


def test_make_targets_exist():
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    text = readme()
    lines = [
        line
        for block in blocks(text, "bash")
        for line in commands(block)
        if re.search(r"(^|&& |; )make\b", line)
    ]
    lines += re.findall(r"`(make [\w =.-]+)`", text)
    for line in lines:
        assert not (gone := missing_targets(line, targets)), (
            f"README.md says `{line}`, but the Makefile has no target {', '.join(gone)}"
        )


def test_readme_is_fresh():
    "README.md and its pictures are what nbs/index.ipynb says."
    readme()
    done = subprocess.run(
        [sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_relative_links_lead_somewhere():
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", readme()):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


# --- the tools themselves, on a small example ---

SAMPLE = """# T
```bash
$ make train   # a comment
contrastive-st search runs/none/model \\
    "a question"
python -c "print(1)"
```
```python
x = 1
```
```text
1
```
```python
x + 1
```
"""


def test_reading_blocks(tmp_path):
    search = 'contrastive-st search runs/none/model "a question"'
    expected = ["make train   # a comment", search, 'python -c "print(1)"']
    assert commands(blocks(SAMPLE, "bash")[0]) == expected
    scope = {}
    exec(python_program(SAMPLE), scope)
    assert scope["_"] == 2
    assert missing_targets("make train   # a comment", {"train"}) == []
    assert missing_targets("cd x && make docs PYTHON=p", {"train"}) == ["docs"]
    assert missing_run("contrastive-st search runs/none/model q", tmp_path) == "runs/none/model"
    assert missing_run("contrastive-st train quickstart --out runs/mine", tmp_path) == ""


def test_readme_program(tmp_path):
    "The README is written from a notebook without hidden cells, and a stale one is noticed."
    import base64

    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools/readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/07_data.ipynb").write_text("{}")
    shutil.copy2(ROOT / "settings.ini", tmp_path)
    plot = new_output(
        "display_data",
        data={"image/png": base64.b64encode(b"png").decode(), "text/plain": "<Figure>"},
    )
    nb = new_notebook(
        cells=[
            new_markdown_cell(
                "# Name\n> One line.\n\nSee [data](07_data.ipynb) and `[no](link.ipynb)`.",
                id="title",
            ),
            new_code_cell("#| hide\nsecret = 1", id="hidden"),
            new_code_cell(
                "#| slow\nprint('a')", id="shown", outputs=[new_output("stream", text="a  \n")]
            ),
            new_code_cell("plt.plot()", id="curve", outputs=[plot]),
        ]
    )
    nbformat.write(nb, tmp_path / "nbs/index.ipynb")
    at = ["--root", str(tmp_path)]
    assert tool.main([*at, "--check"]) == 1 and tool.main(at) == 0
    assert tool.main([*at, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "secret" not in text and "#|" not in text and "(nbs/07_data.ipynb)" in text
    assert "`[no](link.ipynb)`" in text
    assert blocks(text, "python") == ["print('a')\n", "plt.plot()\n"]
    assert blocks(text, "text") == ["a\n"]
    assert text.index("One line.") < text.index("badge.svg") < text.index("See [data]")
    assert "![curve](docs/images/curve.png)" in text
    assert (tmp_path / "docs/images/curve.png").read_bytes() == b"png"
    (tmp_path / "docs/images/old.png").write_bytes(b"")
    assert tool.main([*at, "--check"]) == 1 and tool.main(at) == 0
    assert not (tmp_path / "docs/images/old.png").exists()
    nb.cells[0].source = nb.cells[0].source.replace("07_data", "99_gone")
    nbformat.write(nb, tmp_path / "nbs/index.ipynb")
    with pytest.raises(SystemExit, match="99_gone"):
        tool.main(at)
