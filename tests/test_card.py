"""The model card: it says what the run recorded, its code runs, nothing is uploaded unasked."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_backbone, make_tokenizer
from huggingface_hub import ModelCard

from contrastive_st import atomic, evaluation, mixture, recipes, trainer
from contrastive_st.card import (
    card_to_send,
    files_to_send,
    metric_rows,
    model_card,
    push_to_hub,
    read_records,
    usage,
    with_command,
    write_card,
)
from contrastive_st.model import POOLINGS, SentenceEncoder, add_adapters
from contrastive_st.modeldir import StaticBackbone

THINGS = (
    "dog cat man woman child horse guitar piano rice road street water music ball train rain snow"
    " money".split()
)
RECIPE = """# ```
# ---
# # not a heading
title = "a small run"

[model]
name = "bert-base-uncased"

[data]
mix = "data_config.json"

[train]
steps = 4

[evaluation]
sts = "dev.tsv"

[test]
sts = "test.tsv"
retrieval = "desk"
"""
COMMAND = ["/usr/local/bin/contrastive-st", "train", "recipe.toml", "--set", "train.lr=1e-3"]


def encoder(**options):
    tokenizer = make_tokenizer()
    return SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=32, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run, trained here, with everything measured."
    folder = tmp_path_factory.mktemp("card")
    rows = {
        "pairs|a.jsonl": [
            [f"where is the {x}", f"the {x} is on the {y}"]
            for x in THINGS
            for y in ("road", "street")
        ],
        "triplets.jsonl": [
            [f"what is a {x}", f"a {x} is playing", f"a {x} is not playing"] for x in THINGS
        ],
    }
    for name, examples in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in examples))
    mix = mixture.Mixture.from_config(
        [{"name": name, "weight": w} for name, w in zip(rows, (2, 1))],
        folder,
        batch_size=8,
        datasets_per_batch=1,
    )
    sts = (
        [f"the {x} is eating" for x in THINGS],
        [f"the {THINGS[(i + i % 6) % len(THINGS)]} is eating" for i, x in enumerate(THINGS)],
        [i % 6 for i in range(len(THINGS))],
    )
    desk = (
        {x: f"the {x} is on the road" for x in THINGS},
        {x: f"where is the {x}" for x in THINGS},
        {x: {x: 1} for x in THINGS},
    )

    def graded(e):
        return {
            "sts_n" if k == "n" else k: v
            for k, v in evaluation.evaluate_sts(
                lambda t: e.encode(t, progress=False), sts, 50
            ).items()
        }

    def both(e):
        ranked = evaluation.evaluate_retrieval(
            lambda t: e.encode(t, progress=False), *desk, resamples=50
        )
        del ranked["n"]
        return graded(e) | ranked | {"retrieval_n": len(desk[1])}

    config = trainer.TrainConfig(
        steps=4, warmup=1, lr=1e-3, eval_every=2, metric="spearman", workers=0
    )
    trainer.train(
        encoder(),
        mix,
        config,
        folder / "run",
        graded,
        both,
        recipe=with_command(RECIPE, COMMAND),
        progress=False,
    )
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return Path(
        shutil.copytree(
            run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard")
        )
    )


def change(run, name, **entries):
    path = run / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def section(card, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=\n\n## |\Z)", card, re.M | re.S)[1]


# --- the code in the card runs ---


def blocks(card):
    return re.findall(r"^```python\n(.*?)^```", section(card, "Use"), re.M | re.S)


def computed(code):
    names = {}
    exec(code, names)  # noqa: S102
    return np.asarray(names["embeddings"])


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True},
        {"normalize": False},
        {"prompts": {"query": "what is the "}, "normalize": True},
    ],
    ids=["unit", "free", "prompt"],
)
def test_the_three_ways_give_the_same_vectors(copy, monkeypatch, pooling, options):
    model = encoder(pooling=pooling, **options)
    model.settings = {"default_prompt_name": "query"} if "prompts" in options else {}
    shutil.rmtree(copy / "model")
    model.save_pretrained(copy / "model")
    write_card(copy)
    monkeypatch.chdir(copy)
    code = blocks((copy / "model/README.md").read_text())
    assert [
        re.search(r"(?:from|import) (sentence_transformers|transformers|contrastive_st)", b)[1]
        for b in code
    ] == ["sentence_transformers", "transformers", "contrastive_st"]
    theirs, plain, ours = map(computed, code)
    assert theirs.shape == (2, 32) and theirs == pytest.approx(plain, abs=3e-6)
    assert theirs == pytest.approx(ours, abs=3e-6)
    assert bool(np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-4)) == options["normalize"]
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-4  # else equality would prove nothing
    # and a wrong pooling is seen
    other = code[1].replace("pool(model", "(lambda s, m: s[:, -1])(model")
    assert np.abs(computed(other) - theirs).max() > 1e-4


def test_a_table_of_token_vectors_has_a_card(copy, monkeypatch):
    table = torch.randn(len(make_tokenizer()), 16, generator=torch.Generator().manual_seed(0))
    shutil.rmtree(copy / "model")
    SentenceEncoder(StaticBackbone(table), make_tokenizer()).save_pretrained(copy / "model")
    write_card(copy)
    monkeypatch.chdir(copy)
    card = (copy / "model/README.md").read_text()
    assert "| Backbone | StaticEmbedding, " in card and "| Dimensions | 16 |" in card
    theirs, ours = map(computed, blocks(card))  # transformers alone knows no such model
    assert theirs.shape == (2, 16) and theirs == pytest.approx(ours, abs=1e-6)


def test_adapters_have_a_card_that_names_their_base(copy, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="the extra lora is not installed")
    shutil.rmtree(copy / "model")
    encoder().save_pretrained(tmp_path / "base")
    adapted = add_adapters(SentenceEncoder.from_pretrained(tmp_path / "base"), r=2)
    adapted.save_pretrained(copy / "model")
    write_card(copy)
    monkeypatch.chdir(copy)
    card = (copy / "model/README.md").read_text()
    assert "| Backbone | LoRA adapters of .../base, " in card
    theirs, plain, ours = map(computed, blocks(card))
    assert theirs == pytest.approx(ours, abs=3e-6) and theirs == pytest.approx(plain, abs=3e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_the_pooling_written_out_is_the_models(name):
    "Padding on either side, states below zero, a text of one token."
    torch.manual_seed(0)
    states = torch.randn(3, 5, 4) - 2
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
    model = {"pooling": name, "normalize": False, "max_length": 5, "prompt": "", "prompts": {}}
    names = {"torch": torch}
    exec(re.search(r"def pool.*?\n\n", usage(model), re.S)[0], names)  # noqa: S102
    assert torch.allclose(names["pool"](states, mask), POOLINGS[name](states, mask))


def test_technical_details(copy):
    part = section(model_card(copy), "Technical details")
    parameters = sum(p.numel() for p in encoder().backbone.state_dict().values())
    opened = SentenceEncoder.from_pretrained(copy / "model")
    parameters += sum(w.numel() for w in opened.pooler_weights.values())
    for row in (
        "| Dimensions | 32 |",
        "| Unit length | yes |",
        "mean of the token states",
        "dot product, cosine and Euclidean",
        "32 tokens",
        "not trained for it",
        "| Prompt | none |",
    ):
        assert row in part, row
    assert f"BertModel, {parameters:,} parameters" in part
    shutil.rmtree(copy / "model")
    encoder(pooling="cls", normalize=False).save_pretrained(copy / "model")
    change(copy, "config", similarity="dot", widths=[16, 8])
    part = section(model_card(copy), "Technical details")
    assert "| Score functions | dot product |" in part and "| Unit length | no |" in part
    assert "16, 8" in part and "first token" in part


def test_prompts_that_have_to_be_asked_for_are_named(copy, monkeypatch):
    "No default prompt is not no prompts."
    shutil.rmtree(copy / "model")
    encoder(prompts={"query": "what is the ", "document": ""}).save_pretrained(copy / "model")
    write_card(copy)
    card = (copy / "model/README.md").read_text()
    assert "| Prompt | none unless asked for: query |" in card
    assert '`query` = `"what is the "`' in section(card, "Use")
    assert "document" not in section(card, "Use")
    monkeypatch.chdir(copy)
    for block in blocks(card):
        asked = block.replace(
            "encode(sentences",
            (
                "encode(sentences, prompt_name='query'"
                if "sentence_transformers" in block
                else "encode(sentences, prompt='query'"
            ),
        )
        asked = asked.replace(
            "tokenizer(sentences", "tokenizer(['what is the ' + s for s in sentences]"
        )
        assert asked != block and np.abs(computed(asked) - computed(block)).max() > 1e-4
        assert computed(asked) == pytest.approx(
            SentenceEncoder.from_pretrained(copy / "model").encode(
                ["Where can I leave my bicycle?", "There is a bike rack behind the station."],
                prompt="what is the ",
                progress=False,
            ),
            abs=3e-6,
        )


# --- the figures are the run's ---


def test_training_data_is_what_the_run_accounted_for(run):
    part = section(model_card(run), "Training data")
    report = json.loads((run / "mixture.json").read_text())
    assert len(report["datasets"]) == 2
    for d, weight in zip(report["datasets"], (2, 1)):
        name = d["name"].replace("|", "\\|")
        assert (
            f"| {name} | {d['rows']} | {d['columns']} | {weight} | {d['asked']:.2%} |"
            f" {d['realised']:.2%} | {d['epochs']:.2f} |" in part
        )
    assert "| **all** | 54 |" in part and "32 examples" in part and "7 in-batch" in part
    # a name with a bar breaks no column
    assert all(
        len(re.findall(r"(?<!\\)\|", line)) == 8
        for line in part.splitlines()
        if line.startswith("|")
    )


# None: the pool was not looked into
@pytest.mark.parametrize(
    "masked, is_shown", [(None, False), (0, False), (0.004, False), (0.25, True)]
)
def test_masked_negatives_are_told_where_there_are_any(copy, masked, is_shown):
    report = json.loads((copy / "mixture.json").read_text())
    change(copy, "mixture", pools=[pool | {"masked": masked} for pool in report["pools"]])
    assert (
        ("0.25 of them masked" in model_card(copy))
        == is_shown
        == ("masked" in section(model_card(copy), "Training data"))
    )


def test_evaluation_has_intervals_and_says_what_chose(run):
    card, metrics = model_card(run), json.loads((run / "metrics.json").read_text())
    part = section(card, "Evaluation")
    sets = (
        ("dev.tsv", "evaluation, 18 pairs", metrics, ["spearman", "pearson"]),
        ("test.tsv", "test, 18 pairs", metrics["test"], ["spearman"]),
        ("desk", "test, 18 questions", metrics["test"], ["mrr@10", "ndcg@10"]),
    )
    for path, kind, both, names in sets:
        for name in names:
            cells = [
                f"{both[when][name]:.3f} [{both[when][name + '_low']:.3f},"
                f" {both[when][name + '_high']:.3f}]"
                for when in ("before", "after")
            ]
            assert f"| {path} ({kind}) | {name} | {cells[0]} | {cells[1]} |" in part
    assert f"The checkpoint of step {metrics['best_step']} was chosen by spearman" in part
    assert "optimistic" in part


def test_a_labelled_exam_is_told(copy):
    text = (copy / "recipe.toml").read_text()
    new = text.replace('sts = "dev.tsv"', 'sts = "dev.tsv"\nlabels = "intents.csv"')
    (copy / "recipe.toml").write_text(new)
    metrics = json.loads((copy / "metrics.json").read_text())
    for side, rate in (("before", 0.5), ("after", 0.75)):
        ends = {"knn_accuracy_low": rate - 0.1, "knn_accuracy_high": rate + 0.1}
        exam = {"knn_accuracy": rate, "map@r": rate, "labels_n": 40} | ends
        metrics[side] |= exam
    (copy / "metrics.json").write_text(json.dumps(metrics))
    rows = [row for row in metric_rows(read_records(copy)) if row["task"] == "labels"]
    assert [(row["set"], row["metric"]) for row in rows] == [
        ("intents.csv", "knn_accuracy"),
        ("intents.csv", "map@r"),
    ]
    line = next(line for line in model_card(copy).splitlines() if line.endswith("[0.650, 0.850] |"))
    assert "(evaluation, 40 texts)" in line and "0.500 [0.400, 0.600]" in line
    results = yaml.safe_load(model_card(copy).split("---")[1])["model-index"][0]["results"]
    assert "text-classification" in {result["task"]["type"] for result in results}


def test_training_has_the_command_and_every_setting(run):
    part = section(model_card(run), "Training")
    config = json.loads((run / "config.json").read_text())
    versions = json.loads((run / "versions.json").read_text())
    assert "```bash\ncontrastive-st train recipe.toml --set train.lr=1e-3\n```" in part
    for name, value in config.items():
        assert name == "mix" or f"| {name} | {json.dumps(value)} |" in part, name
    assert versions["date"] in part and f"torch {versions['torch']}" in part
    assert all(f"{name} {value}" in part for name, value in versions["compute"].items())


def test_limits_are_counted(copy):
    report = json.loads((copy / "mixture.json").read_text())
    change(
        copy,
        "mixture",
        warnings=["file x is small"],
        tokens=report["tokens"] | {"columns": {"anchor": {"mean": 9, "truncated": 0.125}}},
    )
    part = section(model_card(copy), "Intended use and limits")
    assert "cut at 32 tokens; in training, up to 12.5%" in part
    assert "The run warned: file x is small" in part and "32 examples of 2 dataset(s)" in part
    assert "No licence" in part
    assert "No licence" not in model_card(copy, metadata={"license": "mit"})


def test_the_card_is_a_function_of_the_records(copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    card = model_card(copy)
    # reads, never writes
    assert card == model_card(str(copy))
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    assert write_card(copy) == copy / "model/README.md"
    assert (copy / "model/README.md").read_text() == card == model_card(copy)
    change(copy, "versions", date="1999-01-01")
    assert model_card(copy) != card


def test_a_run_in_the_home_folder(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert write_card(f"~/{copy.name}") == copy / "model/README.md"
    assert card_to_send(f"~/{copy.name}", "me/model")


def test_recipe_is_one_block_and_changes_count(copy):
    text = (
        RECIPE
        + '\n[run]\nchanges = { title = "changed\\ntitle | x", evaluation = { sts = "other.tsv" },'
        ' test = { sts = "new.tsv" } }\n'
    )
    (copy / "recipe.toml").write_text(text)
    card = model_card(copy)
    assert "````toml\n# ```\n# ---\n# # not a heading\n" in card and card.endswith("\n````\n")
    assert "\n# changed title | x\n" in card and "other.tsv (evaluation, 18 pairs)" in card
    assert "new.tsv (test, 18 pairs)" in card and "desk (test, 18 questions)" in card
    assert "The command was not recorded" in card


def test_a_run_from_python_has_a_card_too(copy):
    (copy / "recipe.toml").unlink()
    metrics = json.loads((copy / "metrics.json").read_text())
    change(copy, "metrics", before={}, after={}, test={"before": {}, "after": {}}, best_step=None)
    card = model_card(copy)
    assert "# run\n" in card and "## Recipe" not in card and "Nothing was measured" in card
    assert "from Python" in card and metrics
    data = yaml.safe_load(card.split("---\n")[1])
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


def test_a_figure_that_could_not_be_measured_is_called_so(copy):
    metrics = json.loads((copy / "metrics.json").read_text())
    # NaN is written as null
    after = {k: v for k, v in metrics["after"].items() if k != "sts_n"} | {"spearman": None}
    change(copy, "metrics", after=after, before={})
    rows = metric_rows(read_records(copy))
    assert [(r["metric"], r["after"] is None) for r in rows if r["split"] == "evaluation"] == [
        ("spearman", True),
        ("pearson", False),
    ]
    card = model_card(copy)
    assert "| dev.tsv (evaluation) | pearson | not measured | " in card
    assert "| dev.tsv (evaluation) | spearman | not measured | not measured |" in card
    assert len(ModelCard(card).data.eval_results) == len(rows) - 1


@pytest.mark.parametrize("value", ["NaN", "null", "Infinity", '"x"', "true", "[]"])
def test_numbers_that_are_none_are_never_shown(copy, value):
    "In metrics, and wherever else a card shows a number that it can do without."
    for name in ("metrics", "mixture", "config"):
        text = (copy / f"{name}.json").read_text()
        keys = "spearman spearman_low ndcg@10 seconds pairs_per_second lr masked realised"
        for key in keys.split():
            text = re.sub(rf'"{key}": [-\d.e]+', f'"{key}": {value}', text)
        (copy / f"{name}.json").write_text(text)
    card = model_card(copy)
    assert not re.search(r"\b(nan|inf|NaN|Infinity|None)\b", card) and "not measured" in card
    assert ModelCard(card).data.library_name == "sentence-transformers"


STRANGE = [
    *("[" * 100_000, "5", "null", "", "{", '"x"', "[]"),
    *("{}", "\0\0\0", '{"a": ' + "9" * 5_000 + "}"),
]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "mixture.json",
        "metrics.json",
        "model/modules.json",
        "model/config.json",
        "model/1_Pooling/config.json",
        "model/sentence_bert_config.json",
        "model/config_sentence_transformers.json",
    ],
)
@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:6] or "empty")
def test_a_damaged_record_is_named_in_one_sentence(copy, name, text):
    (copy / name).write_text(text)
    of_the_model = name in ("model/modules.json", "model/config_sentence_transformers.json")
    if of_the_model and text in ("[]", "{}"):
        return  # no module normalizes, no prompt is there
    with pytest.raises(ValueError, match=re.escape(f"{copy / name}: ")) as error:
        model_card(copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(copy))


@pytest.mark.parametrize(
    "record, key, value",
    [
        ("mixture", "datasets", [{"name": "a"}]),
        ("mixture", "datasets", [5]),
        ("mixture", "pools", [{}]),
        ("mixture", "tokens", 5),
        ("mixture", "warnings", 5),
        ("metrics", "test", 5),
        ("metrics", "steps", "x"),
        ("config", "similarity", 5),
        ("config", "widths", 5),
        ("config", "mix", None),
        ("mixture", "examples", True),
    ],
)
def test_a_record_of_another_shape_is_named(copy, record, key, value):
    change(copy, record, **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"{copy / record}.json: ")) as error:
        model_card(copy)
    assert "\n" not in str(error.value)


def test_a_damaged_recipe_or_weight_file_is_named(copy):
    (copy / "recipe.toml").write_text("title = ")
    with pytest.raises(ValueError, match=r"recipe\.toml: "):
        model_card(copy)
    (copy / "recipe.toml").unlink()
    (copy / "model/model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        model_card(copy)


HOSTILE = [
    *("a\nb", "| x | y", "<script>alert(1)</script>", "[x](http://evil)"),
    *("![x](http://evil)", "**b** _i_ `c`", "---", "a: {b: [c", "# h", "1. x"),
    *("\x1b[31mred\x1b[0m", "\u202eabc", "&lt;", "\ud800", "$x$", "```"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_mean_nothing_but_themselves(copy, name):
    "As the title, as a dataset, as a set, as a model, as a warning, as a setting."
    (copy / "recipe.toml").write_text(
        f"title = {json.dumps(name) if name != chr(0xD800) else '5'}\n[evaluation]\nsts ="
        f" {json.dumps(name.replace(chr(0xD800), ''))}\n",
        encoding="utf-8",
    )
    report = json.loads((copy / "mixture.json").read_text())
    change(
        copy, "mixture", datasets=[d | {"name": name} for d in report["datasets"]], warnings=[name]
    )
    change(copy, "config", metric=name)
    card = model_card(copy)
    card.encode()
    body = card.split("\n## Recipe")[0].partition("\n---\n")[2]
    prose = re.sub(r"^```python\n.*?^```$", "", body, flags=re.M | re.S)
    assert not re.search(
        r"(?<!\\)<script|(?<!\\)\*\*b|\]\(http://evil|\x1b|\u202e|^# h$|(?<!\\)`c`|(?<!\\)\$x",
        prose,
        re.M,
    ), prose[:500]
    assert [
        len(re.findall(r"(?<!\\)\|", line))
        for line in section(card, "Training data").splitlines()
        if line.startswith("|")
    ] == [8] * 5
    data = ModelCard(card).data
    assert data.model_name == (
        " ".join(re.sub(r"[\x1b\u202e]", "", name).split()) if name != "\ud800" else "run"
    )
    titles = ["Use", "Technical details", "Intended use and limits"]
    titles += ["Training data", "Evaluation", "Training"]
    assert re.findall("^## (.*)$", body, re.M) == titles


@pytest.mark.parametrize("prompt", ["\U0001f600 \u00fc: ", 'say "hi" \\ ', "a\nb", "`x` "])
def test_a_prompt_is_the_same_in_the_code(copy, monkeypatch, prompt):
    shutil.rmtree(copy / "model")
    model = encoder(prompts={"query": prompt})
    model.settings = {"default_prompt_name": "query"}
    model.save_pretrained(copy / "model")
    code = blocks(model_card(copy))[1]
    assert eval(re.search(r"\[(.*) \+ s for s in", code)[1]) == prompt  # noqa: S307


@pytest.mark.parametrize(
    "comment",
    [
        "# changed for this run: by hand",
        '# changed for this run: {"title": 5}',
        "# changed for this run: [1]",
        "# command: by hand",
        '# command: ["x"]',
        "# changed for this run: " + "[" * 100_000,
        '# changed for this run: {"model": 5, "test": [1]}',
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_comment_of_the_users_is_a_comment(copy, comment, first):
    text = f"{comment}\n{RECIPE}" if first else f"{RECIPE}\n{comment}\n"
    (copy / "recipe.toml").write_text(with_command(text, COMMAND))
    card = model_card(copy)
    assert "contrastive-st train recipe.toml" in section(card, "Training")
    if first:
        assert "# a small run\n" in card


# --- nothing of the machine ---


def test_no_path_of_the_machine_is_in_the_card(copy, tmp_path, monkeypatch):
    home, work = tmp_path / "home/alice", tmp_path / "home/alice/project"
    for folder in (work / "data", tmp_path / "home/alice/sets", tmp_path / "home/bob/sets"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "link")
    argv = [
        "/home/alice/.venv/bin/contrastive-st",
        "train",
        str(work / "my.toml"),
        "--out",
        str(work / "run"),
        f"--data={tmp_path}/link/data",
        "--set",
        f"evaluation.sts='{home}/sets/my dev.tsv'",
        "--set",
        f"model.name={tmp_path}/home/bob/sets",
        "--store",
        "/data/alice/stores",
    ]
    recipe = f"""title = "t"
[model]
name = "{tmp_path}/home/bob/model"
[data]
mix = "{home}/sets/mix.json"
folder = '/home/alice/my data'
[evaluation]
sts = "{home}/sets/my dev.tsv"
[test]
sts = "/home/alice"
"""
    (copy / "recipe.toml").write_text(with_command(recipe, argv))
    report = json.loads((copy / "mixture.json").read_text())
    change(
        copy,
        "mixture",
        datasets=[d | {"name": f"{home}/sets/{d['name']}"} for d in report["datasets"]],
        warnings=[f"{home}/sets/a.jsonl: is small"],
    )
    change(copy, "config", out=str(work / "run"))
    card = model_card(copy)
    for word in ("alice", "bob", str(tmp_path), "/home", "/data"):
        assert word not in card, re.findall(f".*{word}.*", card)
    part = section(card, "Training").split("```")[1]
    assert (
        part == "bash\ncontrastive-st train my.toml --out run --data=data --set"
        " 'evaluation.sts='\"'\"'../sets/my dev.tsv'\"'\"'' --set model.name=.../sets --store"
        " .../stores\n"
    )
    assert "started from `.../model`" in card and "| my dev.tsv" not in card
    assert ".../my dev.tsv (evaluation" in card and ".../a.jsonl: is small" in card


def test_what_is_no_absolute_path_stays(copy):
    texts = "and/or 3 / 4 https://a.b/c/d ~/data a/b/c.txt ../x </b> s/step cosine/dot"
    (copy / "recipe.toml").write_text(f"# {texts}\n")
    assert f"# {texts}\n" in model_card(copy)


# --- whole or not at all ---


def test_a_full_disk_is_one_sentence_and_leaves_the_card_that_was_there(copy, monkeypatch):
    path = write_card(copy)
    before = path.read_text()
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(ValueError, match=r"README\.md: the disk is full") as error:
        write_card(copy, {"license": "mit"})
    assert "\n" not in str(error.value) and path.read_text() == before
    assert sorted(p.name for p in path.parent.glob(".*")) == []


@pytest.mark.parametrize("keep", [0, 3, 4096, 0.5, -1, "zeros", "older"])
def test_half_a_card_is_none(copy, keep):
    "What a killed writer left is written anew; what a person wrote is sent as it is."
    card = write_card(copy).read_text()
    left = {
        "zeros": "\0" * 4096,
        "older": card.replace("AdamW", "Adam")[: len(card) * 2 // 3].rstrip("\n"),
    }.get(keep)
    left = (
        card[: int(keep * len(card)) if isinstance(keep, float) else keep] if left is None else left
    )
    (copy / "model/README.md").write_text(left)
    assert card_to_send(copy, "me/model", {"license": "mit"}) == model_card(
        copy, "me/model", {"license": "mit"}
    )


def test_an_edited_card_is_sent_unless_it_names_a_home(copy):
    card = write_card(copy).read_text()
    path = copy / "model/README.md"
    path.write_text(card.replace("Made for semantic search", "Made for the harbour"))
    assert "Made for the harbour" in card_to_send(copy, "me/model", {})
    assert 'SentenceTransformer("me/model")' in card_to_send(copy, "me/model", {})
    path.write_text("my own words")
    assert card_to_send(copy, "me/model", {}) == "my own words"
    path.write_text("trained in /home/alice/runs")
    with pytest.raises(ValueError, match="names a folder of this machine"):
        push_to_hub(copy, "me/model")


def test_what_is_pushed_is_what_the_manifest_says(copy, tmp_path):
    with atomic.new_folder(copy / "checked") as folder:
        shutil.copytree(copy / "model", folder, dirs_exist_ok=True)
    shutil.rmtree(copy / "model")
    (copy / "checked").rename(copy / "model")
    write_card(copy)
    (copy / "model/notes.txt").write_text("mine")
    assert set(files_to_send(copy / "model")) == {
        *json.loads((copy / "model/manifest.json").read_text())["files"],
        "manifest.json",
    } - {"README.md"}
    weights = copy / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors: has another digest"):
        push_to_hub(copy, "me/model")


def test_a_link_out_of_the_model_directory_is_not_pushed(copy, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (copy / "model/manifest.json").unlink()  # of a directory with one only its files are sent
    (copy / "model/vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab\.txt: is a link"):
        push_to_hub(copy, "me/model")


@pytest.mark.parametrize(
    "lost", ["config.json", "mixture.json", "metrics.json", "versions.json", "model/modules.json"]
)
def test_an_unfinished_run_is_refused(copy, lost):
    (copy / lost).unlink()
    with pytest.raises(ValueError, match=f"it has no {lost}; train to the end first"):
        write_card(copy)
    with pytest.raises(ValueError, match=f"it has no {lost}"):
        push_to_hub(copy, "me/model")


@pytest.mark.parametrize(
    "argv",
    [
        ["x/contrastive-st", "train", "a b.toml"],
        ["c", "--set", "title='''a\n# command: \"rm\"\n[train]'''"],
        ["c", "\u2028\r\x0b", '"""', "ü"],
    ],
)
def test_with_command_keeps_the_recipe_a_recipe(copy, argv):
    text = with_command(RECIPE, argv)
    assert tomllib.loads(text) == tomllib.loads(RECIPE) and text.startswith(RECIPE.rstrip())
    (copy / "recipe.toml").write_text(text, encoding="utf-8")
    training = section(model_card(copy), "Training")
    command = re.search(r"^```+bash\n(.*?)^```+$", training, re.M | re.S)[1]
    assert shlex.split(command) == [Path(argv[0]).name, *argv[1:]]


# --- the hub reads it ---


def test_metadata_survives_the_hubs_library(run):
    card = ModelCard(model_card(run, metadata={"language": ["en"], "license": "apache-2.0"}))
    metrics = json.loads((run / "metrics.json").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.language, data.license, data.base_model) == (
        "sentence-transformers",
        "sentence-similarity",
        ["en"],
        "apache-2.0",
        "bert-base-uncased",
    )
    assert data.model_name == "a small run"
    assert {"sentence-transformers", "sentence-similarity"} <= set(data.tags)
    results = {
        (r.task_type, r.dataset_name, r.dataset_split, r.metric_type): r for r in data.eval_results
    }
    after, test = metrics["after"], metrics["test"]["after"]
    expected = {
        ("semantic-similarity", "dev.tsv", "validation", "spearman_cosine"): after["spearman"],
        ("semantic-similarity", "test.tsv", "test", "spearman_cosine"): test["spearman"],
        ("information-retrieval", "desk", "test", "cosine_ndcg@10"): test["ndcg@10"],
    }
    for key, value in expected.items():
        assert results[key].metric_value == pytest.approx(value, abs=5e-5)
        assert "95% interval" in results[key].metric_name
    # the two sets of pairs stay apart
    assert len(results) == len(data.eval_results) == len(metric_rows(read_records(run)))
    assert card.text.strip().startswith("# a small run")


@pytest.mark.parametrize(
    "title",
    ["a: 'b' # c", "---", "- x", "yes", "1e3", 'say "hi" {x: [y', "\u00fc\u4e16 | \U0001f600"],
)
def test_any_title_is_quoted_right(copy, title):
    (copy / "recipe.toml").write_text(
        f"title = {json.dumps(title, ensure_ascii=False)}\n", encoding="utf-8"
    )
    data = ModelCard(model_card(copy)).data
    assert data.model_name == title and data.eval_results


@pytest.mark.parametrize(
    "name, base",
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("distilroberta-base", "distilroberta-base"),
        ("/home/me/encoder", None),
        ("../encoder", None),
        ("here", None),
        ("a/b/c", None),
    ],
)
def test_only_a_hub_model_is_a_base_model(copy, monkeypatch, name, base):
    monkeypatch.chdir(copy)
    (copy / "here").mkdir()
    (copy / "recipe.toml").write_text(
        f'title = "t"\n[model]\nname = "{name}"\n[data]\nmix = "m.json"\n'
    )
    (copy / "recipe.toml").write_text(recipes.load(copy / "recipe.toml").text)
    assert ModelCard(model_card(copy)).data.base_model == base
    # the card asks the records, not the folder it is written in
    (copy / "here").rename(copy / "gone")
    (copy / "distilroberta-base").mkdir()
    assert ModelCard(model_card(copy)).data.base_model == base


def test_random_weights_have_no_base_model(copy):
    def opened():
        return model_card(copy).split("## Use")[0]

    assert "started from `bert-base-uncased`" in opened()
    assert "base_model: bert-base-uncased" in opened()
    (copy / "recipe.toml").write_text(
        'title = "t"\n[model]\nname = "bert-base-uncased"\nlayers = 2\nwidth = 32\n'
    )
    assert "started from random weights, with the word pieces of `bert-base-uncased`" in opened()
    assert "base_model" not in opened()


# --- a push, to a hub of our own ---


class Hub(BaseHTTPRequestHandler):
    "What of the hub's interface an upload needs; the repository's name decides what goes wrong."

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status, answer = (
                (403, {"error": "You don't have the rights"})
                if "forbidden" in name
                else (200, {"url": f"{self.server.address}/{name}"})
            )
        elif self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
            bad = not isinstance(data.get("license", ""), str)
            status, answer = (
                (400, {"errors": [{"message": '"license" must be a string'}], "warnings": []})
                if bad
                else (200, {"errors": [], "warnings": []})
            )
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/model/commit/abc", "commitOid": "abc"}
        else:
            status, answer = 404, {"error": f"the stub does not know {self.path}"}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.address = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSHES = """
import json, sys
from pathlib import Path
from contrastive_st.card import model_card, push_to_hub, write_card
run, answers = Path(sys.argv[1]), {}
model_card(run); write_card(run)
print("written", flush=True); sys.stdin.readline()
for name, more in json.loads(sys.argv[2]):
    try: answers[name] = push_to_hub(run, name, metadata=more)
    except ValueError as error: answers[name] = f"error: {error}"
if sys.argv[3] == "on":
    write_card(run, {"language": "en", "license": "mit"})
    push_to_hub(run, "me/written")
(run / "model/README.md").write_text("my own words")
answers["me/edited"] = push_to_hub(run, "me/edited", private=False) if sys.argv[3] == "on" else ""
print(json.dumps(answers))
"""


def pushes(run, names, endpoint, offline="0", meanwhile=lambda: None):
    "Run PUSHES in its own process: the hub's address is read when its library is imported."
    known = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_TOKEN": "hf_of_the_test",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(run / "home"),
    }
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PUSHES,
            str(run),
            json.dumps(names),
            "on" if offline == "0" and not endpoint.endswith(":9") else "off",
        ],
        env=known,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "written\n", child.stderr.read()
    meanwhile()
    out, err = child.communicate("\n", timeout=120)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def received(body):
    "The files of a commit."
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0]["key"] == "header" and "a small run" in lines[0]["value"]["summary"]
    return {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}


def test_push_to_a_stub_of_the_hub(copy, hub, tmp_path, monkeypatch):
    silent = []
    answers = pushes(
        copy,
        [
            ("me/model", {"license": "mit"}),
            ("me/forbidden", {}),
            ("me/strange", {"license": 5}),
            ("no name!", {}),
        ],
        hub.address,
        meanwhile=lambda: silent.extend(hub.requests),
    )
    assert silent == []  # making and writing a card asks nobody
    assert answers["me/model"] == f"{hub.address}/me/model/commit/abc"
    assert "me/forbidden was not pushed" in answers["me/forbidden"]
    assert "rights" in answers["me/forbidden"]
    assert "license" in answers["me/strange"] and "no name! was not pushed" in answers["no name!"]
    assert all("\n" not in sentence for sentence in answers.values())
    created = {
        f"{b['organization']}/{b['name']}" if b.get("organization") else b["name"]: b
        for p, _, b in (
            (p, a, json.loads(b)) for p, a, b in hub.requests if p == "/api/repos/create"
        )
    }
    assert (
        created["me/model"].get("private") is True
        or created["me/model"].get("visibility") == "private"
    ), created["me/model"]
    assert (
        created["me/edited"].get("private") is False
        or created["me/edited"].get("visibility") == "public"
    ), created["me/edited"]
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_of_the_test"}
    commits = {
        path.split("/")[3] + "/" + path.split("/")[4]: received(body)
        for path, _, body in hub.requests
        if "/commit/" in path
    }
    # keeps what it was written with
    assert commits["me/written"]["README.md"].decode() == model_card(
        copy, "me/written", {"language": "en", "license": "mit"}
    )
    assert set(commits) == {"me/model", "me/written", "me/edited"}
    assert commits["me/edited"]["README.md"] == b"my own words"
    files = commits["me/model"]
    assert set(files) == {
        p.relative_to(copy / "model").as_posix() for p in (copy / "model").rglob("*") if p.is_file()
    }
    readme = files["README.md"].decode()
    assert readme == model_card(copy, "me/model", {"license": "mit"})
    assert 'SentenceTransformer("me/model")' in readme and '"model"' not in section(readme, "Use")
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    from sentence_transformers import SentenceTransformer

    texts = ["the dog is playing", "where is the piano"]
    assert SentenceTransformer(str(tmp_path / "pulled")).encode(texts) == pytest.approx(
        SentenceEncoder.from_pretrained(copy / "model").encode(texts, progress=False), abs=1e-5
    )


def test_push_without_a_hub(copy, monkeypatch):
    answers = pushes(copy, [("me/model", {})], "http://127.0.0.1:9")  # nobody listens on port 9
    assert "me/model was not pushed" in answers["me/model"]
    assert "check the name, the network and the token" in answers["me/model"]
    before = (copy / "model/README.md").read_text()
    # this process is told to stay offline
    with pytest.raises(ValueError, match="me/model was not pushed.*offline"):
        push_to_hub(copy, "me/model")
    assert (copy / "model/README.md").read_text() == before
