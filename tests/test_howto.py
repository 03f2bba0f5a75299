"""The how-to pages say what works: their commands are typed, and their outputs compared."""

import ast
import csv
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pages
import pytest
import reference
import typer
import yaml
from conftest import make_tokenizer
from test_readme import commands, environment, undefined_names
from torch.distributed.run import get_args_parser

from contrastive_st import card, cli
from contrastive_st.cli import app
from contrastive_st.data import quickstart_folder

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("howto_*.md"))}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MPNET = "sentence-transformers/all-mpnet-base-v2"
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


def type_words(words: list[str], folder: Path, text: str = "") -> str:
    "Run the command line in this process, with a text on standard input; return what is shown."
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        patch.setenv("PATH", environment()["PATH"])  # the command is there, as for a reader
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", io.StringIO(text))
        with redirect_stdout(shown), redirect_stderr(shown):
            try:
                cli.main()
            except SystemExit as end:
                failed = end.code not in (0, None)
                assert not failed or "error: " in shown.getvalue(), shown.getvalue()
    return shown.getvalue()


def type_python(text: str, folder: Path) -> str:
    "Run Python of a page in this process, and return what it prints."
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        exec(text, {})
    return printed.getvalue()


def type_line(line: str, folder: Path) -> str:
    "Run a line of a terminal, and return what it prints."
    first, _, second = line.partition(" | ")
    if first.startswith("echo "):
        return type_words(shlex.split(second), folder, " ".join(shlex.split(first)[1:]) + "\n")
    words = shlex.split(line)
    if words[0] == "contrastive-st":
        return type_words(words, folder)
    if words[:2] == ["python", "-c"]:
        return type_python(words[2], folder)
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
        lines = [line for line in commands(block.text) if is_typed(line)]
        printed = "".join(type_line(line, tmp_path) for line in lines)
        if block.output is not None:
            assert comparable(printed) == comparable(block.output), block.text
    assert (tmp_path / "grades/train.jsonl").exists() and (tmp_path / "faq/heldout").is_dir()


def test_python_of_the_page_on_data_prints_what_it_says():
    (block,) = [block for block in page("howto_data") if block.language == "python"]
    assert type_python(block.text, ROOT) == block.output


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
                printed = type_python(text, tmp_path)
            if block.output is not None:
                assert comparable(printed) == comparable(block.output), block.text
    finally:
        if server:
            server.terminate()
            server.wait(60)
    assert server is not None


def launched(words: list[str]) -> list[str]:
    "The call of the program inside of a line with torchrun, whose own words have to exist."
    start = words.index("torchrun")
    options = get_args_parser().parse_args(words[start + 1 :])
    assert options.module and options.training_script == "contrastive_st"
    return ["contrastive-st", *options.training_script_args]


def command_lines(block: Block) -> list[list[str]]:
    "Every call of the program in a block, as words."
    if block.language == "yaml":
        (jobs,) = yaml.safe_load(block.text)["spec"]["replicatedJobs"]
        pods = jobs["template"]["spec"]["template"]["spec"]["containers"]
        return [launched([*pod["command"], *pod["args"]]) for pod in pods]
    if block.language in ("bash", "slurm"):
        lines = [line.partition(" | ")[2] or line for line in commands(block.text)]
        lines = [shlex.split(line) for line in lines]
        calls = [words for words in lines if words[:1] == ["contrastive-st"]]
        return calls + [launched(words) for words in lines if "torchrun" in words]
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
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    of_torchrun = set(re.findall(r"--[a-z-]+", get_args_parser().format_help()))
    named = set(re.findall(r"`(--[a-z-]+)", prose))
    assert named <= every | of_torchrun and (calls or name == "howto_trouble")


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


# --- pages that go on from one small run ---


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    "A folder with a table of short texts, a recipe for it, and a model that learns in a second."
    import torch
    import transformers

    from contrastive_st.model import SentenceEncoder

    folder = tmp_path_factory.mktemp("desk")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 128
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=128, **shape
    )
    torch.manual_seed(0)
    backbone = transformers.BertModel(config, add_pooling_layer=False)
    SentenceEncoder(backbone, tokenizer, "mean", True, 128).save_pretrained(folder / "tiny")
    with (quickstart_folder() / "faq.csv").open(encoding="utf-8") as file:
        rows = [[cell[:16] for cell in row] for row in csv.reader(file)]
    with (folder / "faq.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    new = "contrastive-st new faq.toml --data faq.csv --columns question,answer --holdout 20%"
    type_words(shlex.split(f"{new} --model tiny"), folder)
    recipe = (folder / "faq.toml").read_text(encoding="utf-8")
    assert "\nepochs = 10 " in recipe
    short = recipe.replace("\nepochs = 10 ", "\nepochs = 1.25 ")  # 5 steps instead of 35
    (folder / "faq.toml").write_text(short, encoding="utf-8")
    type_words("contrastive-st train faq.toml --out runs/faq".split(), folder)
    assert (folder / "runs/faq/metrics.json").exists()
    return folder


def without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text.strip())


def is_for_desk(line: str) -> bool:
    "Whether a line is typed in the small folder: not what serves, exports or takes many runs."
    words = shlex.split(line)
    is_ours = words[:1] == ["contrastive-st"] and words[1] not in ("serve", "export")
    return is_ours and "--sweep" not in words and "--push-to-hub" not in words


@pytest.mark.parametrize(
    "name", [f"howto_{name}" for name in "resume settings memory machines deploy models".split()]
)
def test_commands_of_a_page_work_on_a_small_run(name, desk):
    typed = 0
    for block in page(name):
        if block.language == "python":
            assert type_python(block.text, desk) == block.output
        for line in commands(block.text) if block.language == "bash" else ():
            line = line.removeprefix("time ")
            if not is_for_desk(line) or line == "contrastive-st train faq.toml --out runs/faq":
                continue
            words = shlex.split(line)
            if words[1] != "new":  # which only writes the name down
                words = [word.replace(MINILM, "tiny").replace(MPNET, "tiny") for word in words]
            if "--resume" not in words:  # a longer run, and yet a short one
                words = [word.replace("epochs=20", "epochs=2") for word in words]
            shown, typed = type_words(words, desk), typed + 1
            if block.output is None:
                assert "error: " not in shown, (line, shown)
            else:
                assert without_numbers(shown) == without_numbers(block.output), line
    assert typed


def test_a_model_is_pushed_as_the_page_says(desk, monkeypatch):
    sent = []

    class Hub:
        "Takes what would go to the hub."

        def create_repo(self, repo_id, private, exist_ok):
            sent.append((repo_id, private))
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, commit_message):
            sent.append([operation.path_in_repo for operation in operations])
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})

    monkeypatch.setattr(card, "HfApi", Hub)
    for block in page("howto_hub"):
        if "--push-to-hub" in block.text:
            (line,) = commands(block.text)
            assert "Pushed: https://hub/ada/library-search" in type_line(line, desk)
        if block.language == "python":
            assert type_python(block.text, desk) == "https://hub/ada/library-search\n"
    (first, private), files, (second, public), _ = sent
    assert first == second == "ada/library-search" and private and not public
    assert "README.md" in files and "config.json" in files
    assert not [name for name in files if "train" in name]


# --- several machines ---


def is_parsed(words: list[str]):
    "Read a call of the program as the program does, without running it."
    program, command, *rest = words
    assert program == "contrastive-st"
    known = typer.main.get_command(app).commands[command]
    known.make_context(command, rest)  # exits with 2 for what it does not know


def meets_by_name(options):
    "Whether a line for torchrun lets it start dead processes again."
    return (
        options.rdzv_backend == "c10d"
        and options.rdzv_id
        and options.rdzv_endpoint.endswith(":29500")
        and options.max_restarts > 0
        and options.training_script_args[-1] == "--resume"
    )


def test_two_machines_get_the_same_line_but_for_their_rank():
    (block,) = [block for block in page("howto_machines") if "--node-rank" in block.text]
    lines = [line for line in commands(block.text) if line.startswith("torchrun")]
    options = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [o.node_rank for o in options] == [0, 1] == list(range(int(options[0].nnodes)))
    assert len({re.sub(r"--node-rank \d", "", line) for line in lines}) == 1


def slurm_jobs() -> list[tuple[Block, dict[str, str]]]:
    "The jobs for Slurm, and what each asks for."
    jobs = []
    for block in page("howto_machines"):
        if block.language != "slurm":
            continue
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        wishes = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", block.text, re.M))
        assert len(wishes) == block.text.count("#SBATCH") and "requeue" in wishes
        jobs.append((block, wishes))
    return jobs


def test_the_slurm_job_is_a_script_whose_numbers_fit():
    block, wishes = slurm_jobs()[0]
    assert wishes["ntasks-per-node"] == "1" and re.fullmatch(r"\d\d:\d\d:\d\d", wishes["time"])
    assert re.fullmatch(r"TERM@\d+", wishes["signal"])
    (line,) = [line for line in commands(block.text) if "torchrun" in line]
    words = shlex.split(line)
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.nproc_per_node == wishes["gpus-per-node"] and "--resume" in words
    assert options.nnodes == "$SLURM_NNODES" and meets_by_name(options)
    is_parsed(launched(words))
    # the notice of Slurm is longer than what torchrun grants, and that than nothing
    (granted,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", block.text)
    assert 30 < int(granted) < int(wishes["signal"].partition("@")[2])
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in block.text


def test_the_job_array_gives_each_task_its_part():
    block, wishes = slurm_jobs()[1]
    assert wishes["array"] == "1-64"  # a part counts from 1
    (line,) = commands(block.text)[-1:]
    words = shlex.split(line)
    assert words[words.index("--part") + 1] == "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    assert "--resume" in words and "requeue" in wishes
    is_parsed(words)


def test_the_line_that_starts_again_is_the_same_on_each_machine():
    (block,) = [b for b in page("howto_machines") if b.language == "bash" and "rdzv" in b.text]
    export, line = commands(block.text)
    assert export == "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    options = get_args_parser().parse_args(shlex.split(line)[1:])
    assert meets_by_name(options) and options.nnodes == "2"
    is_parsed(launched(shlex.split(line)))


def test_the_jobset_is_a_manifest_whose_names_and_numbers_fit():
    (block,) = [block for block in page("howto_machines") if block.language == "yaml"]
    jobset = yaml.safe_load(block.text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    (jobs,) = spec["replicatedJobs"]
    job, pod = jobs["template"]["spec"], jobs["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    options = get_args_parser().parse_args(words[1:])
    assert words[0] == "torchrun" and meets_by_name(options)
    is_parsed(launched(words))
    # the first pod is the meeting point, and there is a pod for each machine
    assert options.rdzv_endpoint == f"{name}-{jobs['name']}-0-0.{name}:29500"
    assert job["parallelism"] == job["completions"] == int(options.nnodes)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    # a dead pod is the JobSet's business, a dead process that of torchrun
    assert pod["restartPolicy"] == "Never" and spec["failurePolicy"]["maxRestarts"] > 0
    env = {item["name"]: item["value"] for item in container["env"]}
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert all(isinstance(value, str) for value in env.values())  # numbers are refused
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


# --- what pages quote of the library ---


def messages() -> list[list[str]]:
    "The fixed parts of every text in the package that is filled in, or long."
    templates = []
    for path in sorted((ROOT / "contrastive_st").glob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = [getattr(part, "value", None) for part in node.values]
                templates.append([part if isinstance(part, str) else "" for part in values])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                templates.append([node.value])
    return [parts for parts in templates if len("".join(parts)) > 20]


def is_said(quote: str, templates: list[list[str]]) -> bool:
    "Whether a template gives this sentence, with something in the place of each value."
    near = [parts for parts in templates if all(part in quote for part in parts)]
    patterns = ("".join(re.escape(part) or r"\S.*?" for part in parts) for parts in near)
    return any(re.fullmatch(pattern + r"(\.\.\.)?", quote) for pattern in patterns)


def test_messages_on_the_page_are_those_of_the_library():
    text = PAGES["howto_trouble"].read_text(encoding="utf-8")
    # the fixed words are in bold
    quotes, templates = re.findall(r"^> (.+)$", text.replace("**", ""), re.M), messages()
    assert len(quotes) > 12
    assert [quote for quote in quotes if not is_said(quote, templates)] == []
    assert not is_said("the loss is unhappy about its life", templates)


def test_the_message_on_batches_and_processes_is_what_a_mixture_says():
    from contrastive_st.mixture import Mixture
    from contrastive_st.notebook import VirtualSource

    mixture = Mixture([VirtualSource("rows", 100)], [1.0], 30, 1)
    with pytest.raises(ValueError) as refused:
        mixture.batch(0, 0, 4)
    assert str(refused.value) in PAGES["howto_machines"].read_text(encoding="utf-8")


def test_rules_of_thumb_quote_what_the_experiment_says():
    text = PAGES["howto_settings"].read_text(encoding="utf-8")
    quoted = re.findall(r"[+-]\d\.\d \[[+-]\d\.\d, [+-]\d\.\d\]", text)
    study = json.loads((ROOT / "nbs/tutorials/three_claims.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in study["cells"] for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    printed = re.sub(r"([\[,]) +", r"\1 ", printed).replace("[ ", "[")
    assert len(quoted) == 7 and [figure for figure in quoted if figure not in printed] == []


def test_generated_pages_and_tables_are_fresh():
    stale = [
        path.name
        for path, text in reference.fresh().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{', '.join(stale)}: run `python tools/reference.py`"


def test_ranges_of_keys_are_said_in_words():
    assert reference.range_of({"type": "integer", "exclusiveMinimum": 0}) == "whole number > 0"
    assert reference.range_of({"anyOf": [{"type": "string"}, {"type": "null"}]}) == "text"
    assert reference.range_of({"enum": ["", "self"]}) == '"", "self"'
    assert reference.range_of({"type": "array", "items": {"type": "object"}}) == "list of tables"
    assert reference.toml(None) == "left out" and reference.toml(()) == "`[]`"
    with pytest.raises(ValueError, match="there is no"):
        reference.filled("<!-- figures: batch -->\n")


def test_the_glossary_is_in_order_and_its_links_lead_somewhere():
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\*\*(.+)\*\*$", text, re.M)
    assert words == sorted(words, key=str.lower) and len(words) == len(set(words)) > 40
    assert len(re.findall("^: ", text, re.M)) == len(words)
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_every_how_to_page_stands_in_the_sidebar():
    assert sorted(pages.HOWTO) == [f"docs/{name}.md" for name in PAGES]
    assert [name for name in pages.REFERENCE if not (ROOT / name).is_file()] == []


def test_reading_blocks():
    text = "```bash\necho a\n```\n\n```text\na\n```\n```python\nx\n```\n"
    assert read_blocks(text) == [Block("bash", "echo a\n", "a\n"), Block("python", "x\n", None)]
    assert comparable("  0.4531  2 \n") == "0.4  2"
    assert is_typed("echo q") and not is_typed("contrastive-st train x.toml")
