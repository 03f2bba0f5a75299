"""The how-to pages say what works: their commands are typed, and their outputs compared."""

import io
import re
import shlex
import socket
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from test_readme import commands, environment, undefined_names

from contrastive_st.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("howto_*.md"))}
# Minutes of training, an export of a minute and an installation have tests of their own.
NOT_TYPED = ("train", "compare", "inspect", "export")
TYPED = ("contrastive-st", "python", "echo", "curl")
PORT = "8000"  # on the pages; here a free one takes its place


class Block(NamedTuple):
    "A fenced block, and what the page says that it prints."

    language: str
    text: str
    output: str | None


def read_blocks(text: str) -> list[Block]:
    "All fenced blocks in order; a block `text` belongs to the one before it."
    blocks = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S):
        if language == "text":
            blocks[-1] = blocks[-1]._replace(output=body)
        else:
            blocks.append(Block(language, body, None))
    return blocks


def page(name: str) -> list[Block]:
    return read_blocks(PAGES[name].read_text(encoding="utf-8"))


def comparable(text: str) -> str:
    "An output without the digits behind a point, which differ between machines."
    lines = [re.sub(r"(\d\.\d)\d+", r"\1", line.rstrip()) for line in text.strip().split("\n")]
    return "\n".join(lines)


def is_typed(line: str) -> bool:
    words = shlex.split(line)
    return words[0] in TYPED and words[1] not in NOT_TYPED


def type_line(line: str, folder: Path) -> str:
    "Run a command as a terminal would, and return what it prints."
    options = {"cwd": folder, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], timeout=300, **options)
    assert done.returncode == 0, f"`{line}` exits {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def free_port() -> str:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def start(line: str, folder: Path) -> subprocess.Popen:
    "Start a server, and wait until it says where it is."
    words = [sys.executable, "-m", "contrastive_st", *shlex.split(line)[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(words, cwd=folder, env=environment(), **pipes)
    for text in server.stdout:
        if "http://" in text:
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server
    raise AssertionError(f"`{line}` exits {server.wait(60)} before it serves")


def test_a_table_becomes_a_recipe_as_the_page_says(tmp_path):
    for block in page("howto_data"):
        if block.language == "none":
            (tmp_path / "grades.csv").write_text(block.text, encoding="utf-8")
        if block.language != "bash":
            continue
        # a terminal shows the notes, too
        lines = [f"{line} 2>&1" for line in commands(block.text) if is_typed(line)]
        printed = "".join(type_line(line, tmp_path) for line in lines)
        if block.output is not None:
            assert comparable(printed) == comparable(block.output), block.text
    assert (tmp_path / "grades/train.jsonl").exists() and (tmp_path / "faq/heldout").is_dir()


def test_python_of_the_page_on_data_prints_what_it_says():
    (block,) = [block for block in page("howto_data") if block.language == "python"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(block.text, {})
    assert printed.getvalue() == block.output


def test_an_index_is_searched_and_served_as_the_page_says(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    port, server = free_port(), None
    try:
        for block in page("howto_serve"):
            text = block.text.replace(PORT, port)
            for line in commands(text) if block.language == "bash" else ():
                if line.startswith("contrastive-st serve"):
                    server = start(line, tmp_path)
                elif is_typed(line):
                    printed = type_line(line, tmp_path)
                    assert '"error"' not in printed, printed
            if block.language == "python":
                printed = type_line(
                    f"{shlex.quote(sys.executable)} -c {shlex.quote(text)}", tmp_path
                )
            if block.output is not None:
                assert comparable(printed) == comparable(block.output), block.text
    finally:
        if server:
            server.terminate()
            server.wait(60)
    assert server is not None


def command_lines(block: Block) -> list[list[str]]:
    "Every call of the program in a block, as words."
    if block.language == "bash":
        lines = [line.partition(" | ")[2] or line for line in commands(block.text)]
        return [shlex.split(line) for line in lines if line.startswith("contrastive-st")]
    if block.language == "ini":
        return [shlex.split(line) for line in re.findall(r"ExecStart=.*?bin/(.*)", block.text)]
    if block.language == "dockerfile":
        words = [shlex.split(line) for line in re.findall("RUN (contrastive-st.*)", block.text)]
        return words + [
            re.findall('"([^"]*)"', line) for line in re.findall("CMD (\\[.*)", block.text)
        ]
    return []


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_option_exists(name):
    "Also of those that are not typed here."
    known = typer.main.get_command(app).commands
    calls = [words for block in page(name) for words in command_lines(block)]
    text = PAGES[name].read_text(encoding="utf-8")
    every = {option for command in known.values() for p in command.params for option in p.opts}
    for program, command, *words in calls:
        assert program == "contrastive-st" and command in known, (program, command)
        options = {option for parameter in known[command].params for option in parameter.opts}
        options |= {o for parameter in known[command].params for o in parameter.secondary_opts}
        assert {word for word in words if word.startswith("--")} <= options, words
    named = set(re.findall(r"`(--[a-z-]+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))
    assert named <= every and len(calls) > 3


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_python_stands_alone(name):
    text = PAGES[name].read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text):
        assert (ROOT / "docs" / target).exists(), target
    for block in page(name):
        if block.language == "python":
            assert not (problems := undefined_names(block.text)), problems


def test_the_metrics_that_the_page_names_are_there():
    pytest.importorskip("prometheus_client")
    from contrastive_st.serve import Meter

    text = PAGES["howto_serve"].read_text(encoding="utf-8")
    names = set(re.findall(r"`(contrastive_st_\w+)`", text))
    written = Meter().text().decode()
    assert names and [name for name in names if f"# HELP {name} " not in written] == []


def test_reading_blocks():
    text = "```bash\necho a\n```\n\n```text\na\n```\n```python\nx\n```\n"
    assert read_blocks(text) == [Block("bash", "echo a\n", "a\n"), Block("python", "x\n", None)]
    assert comparable("  0.4531  2 \n") == "0.4  2"
    assert is_typed("echo q") and not is_typed("contrastive-st train x.toml")
