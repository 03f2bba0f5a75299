"""Recipes: what a reader can get wrong in a file is said with the file, the key and what to do."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from conftest import ROOT

from contrastive_st import recipes
from contrastive_st.account import account
from contrastive_st.data import prepare
from contrastive_st.model import POOLINGS
from contrastive_st.recipes import (
    DataPlan,
    EvaluationPlan,
    ModelPlan,
    Recipe,
    build,
    inside,
    known,
    load,
    merge,
    plan,
)
from contrastive_st.trainer import TrainConfig, train

DAMAGED = int(os.environ.get("DAMAGED_RECIPES", 80))  # how many are made and tried
GOOD = """
title = "a test"

[model]
name = "encoder"

[data]
mix = "data_config.json"
folder = "data"
batch_size = 4
datasets_per_batch = 1

[train]
steps = 6
warmup = 1
lr = 1e-3

[evaluation]
sts = "sts.tsv"
"""


def rows(n, word="dog"):
    return "".join(
        json.dumps([f"question {i} about a {word}", f"answer {i} about a {word}"]) + "\n"
        for i in range(n)
    )


@pytest.fixture
def folder(tmp_path):
    "A good recipe with its data: pairs.jsonl of 8 rows, more.jsonl of 8, graded pairs."
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_text(rows(8))
    (data / "more.jsonl").write_text(rows(8, "cat"))
    (data / "data_config.json").write_text(
        json.dumps([{"name": "pairs.jsonl", "weight": 1}, {"name": "more.jsonl", "weight": 3}])
    )
    (data / "sts.tsv").write_text(
        "score\tsentence1\tsentence2\n5\ta dog\tthe dog\n0\ta dog\train\n"
    )
    (tmp_path / "outside.jsonl").write_text(rows(8, "spy"))
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path


@pytest.fixture
def bad(folder, monkeypatch):
    "Write a recipe and go through everything a run checks before it starts; returns the message."
    monkeypatch.setenv("HOME", str(folder))  # stores of this test stay here

    def refuse(text, changes={}, name="bad.toml"):
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            recipe = load(folder / name, changes)
            build(TrainConfig, recipe.train, f"{recipe.path}: train")
            recipe.mixture()
            for key, plan in (("evaluation", recipe.evaluation), ("test", recipe.test)):
                for field in ("sts", "retrieval"):
                    if value := getattr(plan, field):
                        inside(recipe.folder(), value, f"{recipe.path}: {key}.{field}")
        message = str(caught.value)
        assert name in message, f"the file is not named: {message}"
        assert "\n" not in message and len(message) < 400 + 3 * len(str(folder)), message
        assert "pydantic" not in message and "errors.pydantic.dev" not in message
        assert "Input should" not in message
        return message

    return refuse


def record_of(recipe):
    "What a recipe's text says of the run."
    return tomllib.loads(recipe.text)["run"]


def changed(old, new=""):
    assert old in GOOD
    return GOOD.replace(old, new)


# ---- good ones ----


def test_a_good_recipe_in_full(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe = load(folder / "good.toml")
    expected = ("a test", "encoder", "sts.tsv", EvaluationPlan())
    assert (recipe.title, recipe.model.name, recipe.evaluation.sts, recipe.test) == expected
    assert recipe.model.pooling is None and recipe.model.max_length is None
    assert recipe.data.seed == 0
    assert recipe.text == GOOD and recipe.path == str(folder / "good.toml")
    assert recipe.folder().resolve() == (folder / "data").resolve()
    assert build(TrainConfig, recipe.train, "x") == TrainConfig(steps=6, warmup=1, lr=1e-3)
    mixture = recipe.mixture()
    assert [s.name for s in mixture.sources] == ["pairs.jsonl", "more.jsonl"]
    assert mixture.weights == [1, 3]
    assert (mixture.batch_size, mixture.datasets_per_batch, mixture.seed) == (4, 1, 0)


def test_the_poolings_are_the_encoders():
    assert set(get_args(get_args(ModelPlan.__annotations__["pooling"])[0])) == set(POOLINGS)


def test_a_model_in_a_folder_is_noted(folder, monkeypatch):
    "From here: what the same name means elsewhere or later, nobody can tell."
    monkeypatch.chdir(folder)
    assert load("good.toml").text == GOOD
    (folder / "encoder").mkdir()
    noted = load("good.toml")
    assert noted.text.startswith(GOOD)
    assert tomllib.loads(noted.text) == tomllib.loads(GOOD) | {"run": {"model_is_folder": True}}
    assert record_of(load("good.toml", {"title": "x"})) == {
        "changes": {"title": "x"},
        "model_is_folder": True,
    }
    assert record_of(load("good.toml", {"model": {"name": "other"}})) == {
        "changes": {"model": {"name": "other"}}
    }


def test_a_length_replaces_the_other_length(folder):
    longer = load(folder / "good.toml", {"train": {"epochs": 2}})
    assert longer.train["epochs"] == 2 and "steps" not in longer.train
    (folder / "recorded.toml").write_text(longer.text)  # as a run records it
    assert load(folder / "recorded.toml").train == longer.train
    again = load(folder / "recorded.toml", {"train": {"steps": 5}})
    assert again.train["steps"] == 5 and "epochs" not in again.train
    with pytest.raises(ValueError, match="steps is 5 and epochs is 2; give one of the two"):
        load(folder / "good.toml", {"train": {"steps": 5, "epochs": 2}})
    (folder / "small.toml").write_text(f"{GOOD}\n[tiny.train]\nepochs = 1\n")
    small = load(folder / "small.toml", tiny=True)
    assert small.train["epochs"] == 1 and "steps" not in small.train
    assert load(folder / "small.toml").train["steps"] == 6


def test_inline_mixes_folders_and_lists(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    inline = changed(
        'mix = "data_config.json"', 'mix = [{name = "more.jsonl", weight = 2, lines = 8}]'
    )
    (folder / "inline.toml").write_text(inline.replace("lr = 1e-3", "widths = [8, 16]"))
    recipe = load(folder / "inline.toml")
    assert [s.name for s in recipe.mixture().sources] == ["more.jsonl"]
    assert build(TrainConfig, recipe.train, "x").widths == (8, 16)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "more.jsonl").write_text(rows(5))
    with pytest.warns(UserWarning, match="8 lines, the file has 5"):
        assert [len(s) for s in recipe.mixture(folder / "elsewhere").sources] == [5]
    assert recipe.folder(folder / "elsewhere") == folder / "elsewhere"


def test_the_packaged_recipe_loads_and_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # from anywhere
    recipe = load("quickstart")
    config = build(TrainConfig, recipe.train, "x")
    assert config.steps > config.warmup and recipe.mixture().batch(config.steps - 1).examples
    for measured in (recipe.evaluation, recipe.test):
        for name in (measured.sts, measured.retrieval):
            assert not name or inside(recipe.folder(), name, "x").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository(path, shared_data):
    recipe = load(path)
    build(TrainConfig, recipe.train, "x")
    assert recipe.title and recipe.data.batch_size % recipe.data.datasets_per_batch == 0
    for measured in (recipe.evaluation, recipe.test):
        for name in (measured.sts, measured.retrieval):
            assert not name or inside(shared_data, name, path.name).exists()


def test_recipes_load_without_any_data():
    found = sorted((ROOT / "recipes").glob("*.toml"))
    assert ROOT / "recipes" / "nli.toml" in found
    for path in found:
        build(TrainConfig, load(path).train, "x")


def test_nli_opens_on_the_real_data(shared_data):
    mixture = load(ROOT / "recipes" / "nli.toml").mixture(shared_data)
    assert {len(e) for e in mixture.batch(0).examples} == {3}


# ---- the published models ----

PUBLISHED = [
    "all-MiniLM-L6-v2",
    "all_datasets_v3_distilroberta-base",
    "multi-qa-MiniLM-L6-cos-v1",
    "multi-qa-mpnet-base-cos-v1",
    "multi-qa-mpnet-base-dot-v1",
    "nli-distilbert",
]
FAMILIES = ["bge-like", "e5-like"]  # how known models are trained, on small public sets
# the cards'; of the second, the sum of the sizes that its card prints
TOTALS = [1_170_060_424, 1_099_060_508, 214_988_242, 214_988_242, 214_988_242, 314_315]


# newer models: family of the tiny variant, pooling, total of the mix
LIKE = {
    "modernbert-embed-like": ("modernbert", "mean", 234_553_344),  # the paper's total
    "qwen3-embedding-like": ("qwen3", "lasttoken", 21_295_205),
}


def test_the_published_recipes_go_by_name():
    assert set(known()) == {*PUBLISHED, *FAMILIES, *LIKE, "nli", "quickstart"}
    assert load("nli").path == str(ROOT / "recipes" / "nli.toml")


@pytest.mark.parametrize("name, total", list(zip(PUBLISHED, TOTALS)))
def test_a_published_run_is_planned_from_its_sizes(name, total):
    recipe = load(name)
    config, planned = build(TrainConfig, recipe.train, "x"), plan(recipe)
    assert sum(map(len, planned.sources)) == total and recipe.model.name in recipes.BACKBONES
    report = account(planned, config.steps, 0)
    assert report["examples"] == config.steps * recipe.data.batch_size
    assert sum(d["realised"] for d in report["datasets"]) == pytest.approx(1)
    assert {d["name"] for d in report["datasets"] if d["columns"] == 3} == set(recipe.data.triplets)


@pytest.mark.parametrize("name", LIKE)
def test_a_newer_model_is_planned_and_begins_small(name, shared_data):
    family, pooling, total = LIKE[name]
    full, tiny = load(name), load(name, tiny=True)
    config, planned = build(TrainConfig, full.train, "x"), plan(full)
    assert sum(map(len, planned.sources)) == total and full.model.name in recipes.BACKBONES
    assert account(planned, config.steps, 0)["examples"] == config.steps * full.data.batch_size
    assert all(source.prompts for source in planned.sources)  # an instruction or a prefix
    encoder = tiny.encoder()
    assert encoder.backbone.config.model_type == family and encoder.layout == "packed"
    assert encoder.pooling == pooling == full.model.pooling and encoder.max_length == 64
    assert encoder.tokenizer("a dog").input_ids[-1] == encoder.tokenizer.sep_token_id
    assert build(TrainConfig, tiny.train, "x").steps <= 150 and full.data.folder == ""
    for entry in tiny.data.mix:
        assert inside(shared_data, entry["name"], name).exists() and entry["prompts"]


@pytest.mark.parametrize("name", LIKE)
def test_a_newer_model_trains_small_from_random_weights(name, shared_data, tmp_path, monkeypatch):
    from contrastive_st.model import SentenceEncoder
    from contrastive_st.trainer import train

    monkeypatch.setenv("HOME", str(tmp_path))
    changes = {
        "model": {"width": 32, "max_length": 32},
        "train": {"steps": 6, "warmup": 1},
        "data": {
            "mix": [entry | {"weight": 1} for entry in load(name, tiny=True).data.mix[1:2]],
            "batch_size": 16,
        },
    }
    recipe = load(name, changes, tiny=True)
    config, out = build(TrainConfig, recipe.train, "x"), tmp_path / "run"
    encoder = recipe.encoder()
    before = next(encoder.backbone.parameters()).detach().clone()
    train(encoder, recipe.mixture(shared_data), config, out, progress=False)
    again = SentenceEncoder.from_pretrained(out / "model")
    assert not (next(again.backbone.parameters()) == before).all()
    assert again.pooling == LIKE[name][1] and again.layout == "packed"
    # one dataset has one pair of prompts, which the model keeps
    assert again.prompts["query"] == recipe.data.mix[0]["prompts"][0]


def test_a_family_is_of_random_weights_only(bad):
    message = bad(GOOD, {"model": {"family": "qwen3"}})
    assert "model: family says what random weights are made of" in message
    assert "model.family" in bad(GOOD, {"model": {"family": "t5", "layers": 1, "width": 32}})


@pytest.mark.parametrize("name", [*PUBLISHED, *FAMILIES, *LIKE])
def test_each_key_of_a_published_recipe_says_where_it_is_from(name):
    text = known()[name].read_text().split("\n[tiny]\n")[0]
    silent = [
        line
        for line in text.splitlines()
        if re.match(r"\w+ = ", line)
        and not line.startswith("title")
        and not re.search(
            r"# .*(card|script|paper|forum|readme|data_config|call|notebook|by their names"
            r"|our choice)",
            line,
        )
    ]
    assert not silent


def test_poolings_and_similarities_are_those_of_the_cards():
    for name in PUBLISHED:
        for tiny in (False, True):
            recipe = load(name, tiny=tiny)
            dot = name.endswith("-dot-v1")
            assert (recipe.model.pooling, recipe.model.normalize) == (
                ("cls", False) if dot else ("mean", True)
            )
            assert (recipe.train.get("similarity", "cos"), recipe.train["scale"]) == (
                ("dot", 1.0) if dot else ("cos", 20.0)
            )


BGE = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    "name, pooling, scale, prompts, rows",
    [
        ("e5-like", "mean", 100.0, ["query: ", "passage: "], 39_780),
        ("bge-like", "cls", 50.0, [BGE, "", ""], 3922),
    ],
)
def test_a_family_is_planned_and_trained_with_its_prompts(
    name, pooling, scale, prompts, rows, tmp_path, shared_data
):
    recipe = load(name)
    assert (recipe.model.pooling, recipe.train["scale"]) == (pooling, scale)
    planned = plan(recipe)
    assert sum(map(len, planned.sources)) == rows
    assert all(source.prompts == prompts for source in planned.sources)
    assert {len(source.columns) for source in planned.sources} == {len(prompts)}
    small = {
        "model": {"layers": 1, "width": 32},
        "data": {"batch_size": 8},
        "train": {"steps": 2, "warmup": 0, "eval_every": 0},
    }
    tiny = load(name, small, tiny=True)
    mixture = tiny.mixture(shared_data)
    assert sum(map(len, mixture.sources)) == rows  # as many as the recipe says
    config = build(TrainConfig, tiny.train, "x")
    train(tiny.encoder(), mixture, config, tmp_path / "run", progress=False)
    settings = json.loads(
        (tmp_path / "run" / "model" / "config_sentence_transformers.json").read_text()
    )
    assert settings["prompts"] == {"query": prompts[0], "document": prompts[1]}


def test_the_released_config_of_all_datasets_v3_can_take_the_cards_place():
    recipe = load(
        "all_datasets_v3_distilroberta-base", {"data": {"mix": "data_config_all_datasets_v3.json"}}
    )
    assert sum(map(len, plan(recipe).sources)) == 1_124_818_467 and len(plan(recipe).sources) == 123


@pytest.mark.parametrize("name", PUBLISHED + FAMILIES)
def test_each_has_a_tiny_variant_on_the_shared_data(name, shared_data):
    full, tiny = load(name), load(name, tiny=True)
    config = build(TrainConfig, tiny.train, "x")
    assert config.steps <= 150 and "tiny" in tiny.title and full.data.folder == ""
    for entry in tiny.data.mix:
        assert inside(shared_data, entry["name"], name).exists()
    for measured in (tiny.evaluation, tiny.test):
        for path in (measured.sts, measured.retrieval):
            assert not path or inside(shared_data, path, name).exists()
    assert tiny.text.startswith(full.text)
    assert record_of(tiny)["changes"] == tomllib.loads(full.text)["tiny"]


def test_a_tiny_encoder_is_random_small_and_the_same_each_time():
    import torch

    first, again = (load("multi-qa-MiniLM-L6-cos-v1", tiny=True).encoder() for _ in range(2))
    other = load("multi-qa-MiniLM-L6-cos-v1", {"data": {"seed": 1}}, tiny=True).encoder()
    assert first.backbone.config.num_hidden_layers == 2 and first.width == 128
    assert first.max_length == 64 and not first.training
    weights = [e.backbone.embeddings.word_embeddings.weight for e in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_dot_product_model_says_so_when_it_is_saved(tmp_path):
    load("multi-qa-mpnet-base-dot-v1", tiny=True).encoder().save_pretrained(tmp_path / "model")
    config = (tmp_path / "model" / "config_sentence_transformers.json").read_text()
    assert json.loads(config)["similarity_fn_name"] == "dot"
    config = (tmp_path / "model" / "1_Pooling" / "config.json").read_text()
    assert json.loads(config)["pooling_mode_cls_token"] is True
    assert not any(
        m["type"].endswith("Normalize")
        for m in json.loads((tmp_path / "model" / "modules.json").read_text())
    )


def test_the_tiny_data_folder_can_be_named_by_the_environment(folder, monkeypatch):
    text = GOOD + "[tiny]\ndata.folder = 'nowhere'\n"
    (folder / "tiny.toml").write_text(text)
    monkeypatch.delenv("CONTRASTIVE_ST_DATA", raising=False)
    message = (
        "tiny.toml: the data folder .*nowhere' does not exist; .*--data FOLDER;"
        " .*CONTRASTIVE_ST_DATA"
    )
    with pytest.raises(ValueError, match=message):
        load(folder / "tiny.toml", tiny=True).folder()
    monkeypatch.setenv("CONTRASTIVE_ST_DATA", str(folder / "data"))
    assert load(folder / "tiny.toml", tiny=True).folder() == folder / "data"
    assert str(folder) not in load(folder / "tiny.toml", tiny=True).text
    # only the tiny variant listens
    assert load(folder / "tiny.toml").folder().resolve() == (folder / "data").resolve()
    with pytest.raises(ValueError, match="has no .tiny. table"):
        load(folder / "good.toml", tiny=True)


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "[tiny]\ndata.batchsize = 8\n",
            ["bad.toml: tiny: unknown key 'data.batchsize'", "batch_size"],
        ),
        ("[tiny]\nmodle.name = 'x'\n", ["tiny: unknown key 'modle'", "model"]),
        ("[tiny]\ndata.batch_size = 'x'\n", ["tiny: data.batch_size"]),
        ("[tiny]\npath = 'x'\n", ["tiny: unknown key 'path'"]),
        ("[tiny]\nmodel.layers = 2\n", ["tiny: ", "give both"]),
        ("[tiny]\nmodel.layers = 2\nmodel.width = 100\n", ["model.width", "32"]),
        ("[tiny]\nmodel.layers = 0\nmodel.width = 32\n", ["model.layers", "0"]),
        ("[[tiny]]\nx = 1\n", ["tiny: should be an object"]),
    ],
)
def test_the_tiny_table_is_checked_whenever_the_recipe_is_read(bad, text, words):
    message = bad(GOOD + text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "multi-qa", "Quickstart"])
def test_an_unknown_name_is_answered_with_the_known(name):
    with pytest.raises(ValueError, match=f"no recipe '{name}'") as caught:
        load(name)
    assert all(known_name in str(caught.value) for known_name in known())


@pytest.mark.parametrize(
    "mix, words",
    [
        ('[{name = "a", weight = 1}]', ["data.mix: dataset 1 (a) has no 'lines'", "--data FOLDER"]),
        ('[{name = "a", weight = 1, lines = 0}]', ["dataset 1", "lines", "0"]),
        (
            '[{name = "a", weight = 1, lines = 9, line = 9}]',
            ["dataset 1", "unknown key 'line'", "lines"],
        ),
        ('[{name = "a", weight = -1, lines = 9}]', ["weight", "-1"]),
        ('[{name = "a", weight = 1, lines = 9}]\ntriplets = ["b"]', ["data.triplets", "'b'"]),
        ('"beside.json"', ["beside.json: dataset 2 (q) has no 'lines'"]),
        ('"../outside.json"', ["leaves the data folder"]),
        ('"gone.json"', ["gone.json"]),
    ],
)
def test_what_a_plan_lacks_is_named(folder, mix, words):
    (folder / "beside.json").write_text(
        '[{"name": "p", "lines": 3, "weight": 1}, {"name": "q", "weight": 1}]'
    )
    (folder / "sized.toml").write_text(changed('mix = "data_config.json"', f"mix = {mix}"))
    with pytest.raises(ValueError) as caught:
        plan(load(folder / "sized.toml"))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plan_takes_columns_and_temperature(folder):
    mix = (
        'mix = [{name = "a", lines = 900, columns = ["q", "yes", "no"]}, {name = "b", lines = 100,'
        ' columns = [0, 1, 2]}, {name = "c", lines = 50, weight = 0}]\ntemperature = 1'
    )
    (folder / "sized.toml").write_text(changed('mix = "data_config.json"', mix))
    planned = plan(load(folder / "sized.toml"))
    assert [len(s.columns) for s in planned.sources] == [3, 3, 2]
    assert planned.weights[0] == pytest.approx(900 / 1050)


def test_a_data_config_may_lie_beside_the_recipe_but_the_data_folders_wins(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for place, name in ((folder, "more.jsonl"), (folder / "data", "pairs.jsonl")):
        (place / "mix.json").write_text(json.dumps([{"name": name, "weight": 1}]))
        (folder / "beside.toml").write_text(changed('"data_config.json"', '"mix.json"'))
        assert [s.name for s in load(folder / "beside.toml").mixture().sources] == [name]


# ---- unknown keys ----


@pytest.mark.parametrize(
    "text, words",
    [
        (changed('title = "a test"', 'titel = "a test"'), ["titel", "title"]),
        (GOOD + "\n[tests]\nsts = 'x'\n", ["tests", "test"]),
        (changed("name =", "nam ="), ["model.nam", "name"]),
        (changed("batch_size", "batchsize"), ["data.batchsize", "batch_size"]),
        (changed("steps = 6", "step = 6"), ["train", "step", "steps"]),
        (
            changed("lr = 1e-3", "colour_of_adam = 1e-3"),
            ["train", "colour_of_adam", "the keys are", "warmup"],
        ),
        (changed('sts = "sts.tsv"', 'stsb = "sts.tsv"'), ["evaluation.stsb", "sts"]),
        (GOOD + "\n[test]\nretreival = 'x'\n", ["test.retreival", "retrieval"]),
        (changed('title = "a test"', 'title = "a test"\npath = "p"'), ["path"]),
        (changed('title = "a test"', 'title = "a test"\ntext = "t"'), ["text"]),
        (
            changed('mix = "data_config.json"', 'mix = [{nam = "pairs.jsonl", weight = 1}]'),
            ["mix", "nam", "name"],
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known(bad, text, words):
    message = bad(text)
    assert all(word in message for word in words), message
    assert "unknown key" in message


# ---- wrong types and values ----


@pytest.mark.parametrize(
    "text, words",
    [
        (changed('title = "a test"', "title = 5"), ["title", "string", "5"]),
        (changed('title = "a test"', "title = 2024-01-01"), ["title"]),
        (
            changed('[model]\nname = "encoder"\n').replace(
                'title = "a test"', 'title = "a test"\nmodel = "encoder"'
            ),
            ["model"],
        ),
        (changed('name = "encoder"', "name = 7"), ["model.name"]),
        (changed('name = "encoder"', 'name = "encoder"\npooling = 1'), ["model.pooling"]),
        (
            changed('name = "encoder"', 'name = "encoder"\npooling = "maen"'),
            ["model.pooling: should be 'mean', 'cls', 'max', 'mean_sqrt_len_tokens',"],
        ),
        (changed('name = "encoder"', 'name = "encoder"\nnormalize = "yes"'), ["model.normalize"]),
        (
            changed('name = "encoder"', 'name = "encoder"\nmax_length = 2'),
            ["model.max_length", "2"],
        ),
        (changed('name = "encoder"', 'name = "encoder"\nmax_length = 64.0'), ["model.max_length"]),
        (changed('mix = "data_config.json"', "mix = 5"), ["data.mix:"]),
        (changed('mix = "data_config.json"', "mix = [1, 2]"), ["data.mix"]),
        (changed("batch_size = 4", "batch_size = 0"), ["data.batch_size", "0"]),
        (changed("batch_size = 4", "batch_size = 4.5"), ["data.batch_size", "4.5"]),
        (changed("batch_size = 4", 'batch_size = "4"'), ["data.batch_size"]),
        (changed("batch_size = 4", "batch_size = true"), ["data.batch_size"]),
        (changed("datasets_per_batch = 1", "datasets_per_batch = -1"), ["data.datasets_per_batch"]),
        (changed("datasets_per_batch = 1", "seed = 1.5"), ["data.seed"]),
        (changed("datasets_per_batch = 1", "datasets_per_batch = 1\nseed = -1"), ["seed"]),
        (changed('folder = "data"', "folder = 3"), ["data.folder"]),
        (
            changed("[train]\nsteps = 6\nwarmup = 1\nlr = 1e-3\n").replace(
                'title = "a test"', 'title = "a test"\ntrain = 5'
            ),
            ["train"],
        ),
        (changed("steps = 6", 'steps = "6"'), ["train", "steps"]),
        (changed("steps = 6", "steps = 6.0"), ["train", "steps"]),
        (changed("lr = 1e-3", 'lr = "1e-3"'), ["train", "lr"]),
        (changed("lr = 1e-3", "lr = nan"), ["train", "lr"]),
        (changed("lr = 1e-3", "lr = -0.1"), ["train", "lr", "-0.1"]),
        (changed("lr = 1e-3", "symmetric = 1"), ["train", "symmetric"]),
        (changed("lr = 1e-3", "widths = [8, 'x']"), ["train", "widths"]),
        (changed("lr = 1e-3", "widths = 8"), ["train", "widths"]),
        (changed("lr = 1e-3", 'similarity = "cosine"'), ["train", "similarity"]),
        (changed("warmup = 1", "warmup = 6"), ["train", "warmup is 6", "6"]),
        (changed("warmup = 1", "epochs = 2"), ["train", "steps is 6 and epochs is 2"]),
        (changed("lr = 1e-3", 'metric = "spearman"'), ["train", "metric", "eval_every"]),
        (changed("lr = 1e-3", "patience = 2"), ["train", "patience", "metric"]),
        (changed('sts = "sts.tsv"', "sts = 1"), ["evaluation.sts"]),
        (
            changed('[evaluation]\nsts = "sts.tsv"').replace(
                'title = "a test"', 'title = "a test"\nevaluation = "sts.tsv"'
            ),
            ["evaluation"],
        ),
    ],
)
def test_wrong_types_and_values_are_named(bad, text, words):
    message = bad(text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "gone, key",
    [
        ('title = "a test"\n', "title"),
        ('[model]\nname = "encoder"\n', "model"),
        ('name = "encoder"\n', "model.name"),
        ('mix = "data_config.json"\n', "data.mix"),
    ],
)
def test_missing_keys_are_named(bad, gone, key):
    message = bad(changed(gone))
    assert f"'{key}' is missing" in message


# ---- the mix ----


@pytest.mark.parametrize(
    "mix, words",
    [
        ('[{name = "pairs.jsonl", weight = -1}]', ["dataset 1", "pairs.jsonl", "weight is -1"]),
        (
            '[{name = "pairs.jsonl", weight = 1}, {name = "more.jsonl", weight = "2"}]',
            ["dataset 2", "more.jsonl", "weight"],
        ),
        ('[{name = "pairs.jsonl", weight = nan}]', ["data.mix.1.weight", "finite"]),
        ('[{name = "pairs.jsonl", weight = 0}]', ["weight is 0"]),
        ('[{name = "pairs.jsonl"}]', ["dataset 1", "'weight' is missing"]),
        ("[{weight = 1}]", ["dataset 1", "'name' is missing"]),
        ("[]", ["at least one dataset"]),
        ('[{name = "../outside.jsonl", weight = 1}]', ["dataset 1", "leaves the data folder"]),
        ('[{name = "/etc/passwd", weight = 1}]', ["dataset 1", "leaves the data folder"]),
        ('[{name = "pears.jsonl", weight = 1}]', ["dataset 1", "no such file", "pairs.jsonl"]),
        (
            '[{name = "pairs.jsonl", weight = 1}, {name = "pairs.jsonl", weight = 1}]',
            ["dataset 2", "again"],
        ),
        ('"../outside.json"', ["data.mix", "leaves the data folder"]),
        ('"/etc/hostname"', ["data.mix", "leaves the data folder"]),
        ('"data_conf.json"', ["data.mix", "data_conf.json"]),
    ],
)
def test_mixes_that_are_not_right_name_recipe_and_entry(bad, folder, mix, words):
    (folder / "outside.json").write_text("[]")
    message = bad(changed('"data_config.json"', mix))
    assert all(word in message for word in words), message
    assert "mix" in message, f"the key is not named: {message}"


@pytest.mark.parametrize(
    "content, words",
    [
        (
            '[{"name": "pairs.jsonl", "weight": -1}]',
            ["data_config.json", "dataset 1", "weight is -1"],
        ),
        (
            '[{"name": "../outside.jsonl", "weight": 1}]',
            ["data_config.json", "dataset 1", "leaves the data folder"],
        ),
        ('{"name": "pairs.jsonl"}', ["data_config.json", "list"]),
        ("[", ["data_config.json", "JSON"]),
    ],
)
def test_mixes_in_a_file_name_that_file(folder, monkeypatch, content, words):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "data" / "data_config.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load(folder / "good.toml").mixture()
    assert all(word in str(caught.value) for word in words)


def test_a_batch_that_no_dataset_fills(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    # it wraps, and the loss masks the copies
    with pytest.warns(UserWarning, match="8 rows are fewer than the 16"):
        load(folder / "good.toml", {"data": {"batch_size": 16}}).mixture()
    with pytest.raises(ValueError, match="datasets_per_batch"):
        load(folder / "good.toml", {"data": {"datasets_per_batch": 3}}).mixture()


def test_temperature_makes_the_weights(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    flat, sized = (
        load(folder / "good.toml", {"data": {"temperature": t}}).mixture() for t in (1e9, 1)
    )
    assert flat.weights == pytest.approx([1 / len(flat.weights)] * len(flat.weights), rel=1e-6)
    assert sized.weights == pytest.approx(
        [len(s) / sum(map(len, sized.sources)) for s in sized.sources]
    )
    with pytest.raises(ValueError, match="temperature"):
        load(folder / "good.toml", {"data": {"temperature": 0.5}})


def test_the_data_config_of_a_recipe(folder):
    assert recipes.data_config(load(folder / "good.toml")) == (
        folder / "data" / "data_config.json",
        folder / "data",
    )
    inline = [{"name": "pairs.jsonl", "weight": 1}]
    recipe = load(folder / "good.toml", {"data": {"mix": inline}})
    assert recipes.data_config(recipe) == (inline, folder / "data")
    assert recipes.data_config(recipe, folder) == (inline, folder)
    with pytest.raises(
        ValueError, match="good.toml: data.mix: there is no 'data_config.json' in the data folder"
    ):
        recipes.data_config(load(folder / "good.toml"), folder)


def test_a_mixture_from_stores(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe = load(folder / "good.toml")
    names = ["pairs.jsonl", "more.jsonl"]
    prepare(
        [{"name": n, "path_or_hub_id": folder / "data" / n} for n in names],
        folder / "store",
        progress=False,
    )
    stored, read = recipe.mixture(store=folder / "store"), recipe.mixture()
    assert all(
        s.store.folder.parent.resolve() == (folder / "store").resolve() for s in stored.sources
    )
    assert [stored.batch(n).examples for n in range(9)] == [
        read.batch(n).examples for n in range(9)
    ]
    assert recipe.mixture(folder / "data", folder / "store").weights == [1, 3]
    shutil.rmtree(folder / "store" / "more.jsonl.store")
    with pytest.raises(
        ValueError,
        match="more.jsonl.*make it with: contrastive-st prepare .*good.toml --out .*store$",
    ):
        recipe.mixture(store=folder / "store")
    with pytest.raises(ValueError, match="no folder of stores"):
        recipe.mixture(store=folder / "gone")


# ---- paths ----


@pytest.mark.parametrize(
    "table, field",
    [("evaluation", "sts"), ("evaluation", "retrieval"), ("test", "sts"), ("test", "retrieval")],
)
@pytest.mark.parametrize("value", ["../outside.jsonl", "/etc", "sub/../../outside.jsonl", "link"])
def test_paths_that_leave_the_data_folder(bad, folder, table, field, value):
    (folder / "data" / "link").symlink_to(folder / "outside.jsonl")
    message = bad(changed('[evaluation]\nsts = "sts.tsv"\n', f"[{table}]\n{field} = '{value}'\n"))
    assert f"{table}.{field}" in message and "leaves the data folder" in message
    assert value in message


def test_paths_that_are_not_there(bad):
    message = bad(changed('"sts.tsv"', '"tsts.tsv"'))
    assert "evaluation.sts" in message and "tsts.tsv" in message


@pytest.mark.parametrize("value", ["nowhere", "data/sts.tsv"])
def test_data_folders_that_are_not_there(bad, value):
    message = bad(changed('folder = "data"', f'folder = "{value}"'))
    assert "data folder" in message and value in message and "--data" in message


def test_a_recipe_without_a_data_folder_needs_one(folder):
    (folder / "none.toml").write_text(changed('folder = "data"\n'))
    with pytest.raises(ValueError, match="none.toml.*--data"):
        load(folder / "none.toml").folder()
    assert load(folder / "none.toml").folder(folder / "data") == folder / "data"
    with pytest.raises(ValueError, match="none.toml.*nowhere"):
        load(folder / "none.toml").folder(folder / "nowhere")


# ---- the file ----


@pytest.mark.parametrize(
    "text, words",
    [
        ("title = ", ["TOML"]),
        ("title = 'a'\n[model\n", ["TOML", "line 2"]),
        ("title = 'a'\ntitle = 'b'\n", ["TOML"]),
        ("{}", ["TOML"]),
    ],
)
def test_invalid_toml(bad, text, words):
    message = bad(text)
    assert all(word in message for word in words)


def test_an_empty_recipe(bad):
    assert "'title' is missing" in bad("") and "missing" in bad("# nothing\n")


@pytest.mark.parametrize("name", ["absent.toml", "nowhere/absent.toml", "", ".", "quick", "data"])
def test_missing_files(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="no recipe|not a file") as caught:
        load(name)
    assert f"'{name}'" in str(caught.value)


def test_a_recipe_that_is_not_utf8(folder):
    (folder / "latin.toml").write_bytes("title = 'Müller'".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.toml.*UTF-8"):
        load(folder / "latin.toml")


def test_a_recipe_with_a_byte_order_mark(folder):
    (folder / "bom.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(folder / "bom.toml").title == "a test"


def test_windows_line_ends(folder):
    (folder / "crlf.toml").write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert load(folder / "crlf.toml").data.batch_size == 4


# ---- changes ----


def test_merge_lays_tables_over_tables():
    table = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(table, {"a": {"c": {"d": 4, "f": 5}}, "e": {"g": 6}, "h": 7}) == {
        "a": {"b": 1, "c": {"d": 4, "f": 5}},
        "e": {"g": 6},
        "h": 7,
    }
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2} and merge({}, {}) == {}


def test_changes_reach_the_recipe_and_its_record(folder):
    changes = {
        "train": {"lr": 5e-4, "bf16": True},
        "data": {"batch_size": 8},
        "test": {"sts": "sts.tsv"},
        "title": "Tür",
    }
    recipe = load(folder / "good.toml", changes)
    assert build(TrainConfig, recipe.train, "x") == TrainConfig(
        steps=6, warmup=1, lr=5e-4, bf16=True
    )
    assert recipe.data == DataPlan("data_config.json", "data", 8, 1)
    assert recipe.test.sts == "sts.tsv" and recipe.title == "Tür"
    # nothing is left behind
    assert changes["train"] == {"lr": 5e-4, "bf16": True}
    assert load(folder / "good.toml").data.batch_size == 4
    assert recipe.text.startswith(GOOD) and record_of(recipe)["changes"] == changes
    assert tomllib.loads(recipe.text)["title"] == "a test"  # the record is still a recipe


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": {"stepz": 1}}, ["stepz", "steps"]),
        ({"dat": {"mix": "x"}}, ["dat"]),
        ({"data": 5}, ["data"]),
        ({"data": {"batch_size": "many"}}, ["data.batch_size"]),
    ],
)
def test_changes_are_checked_like_the_file(bad, changes, words):
    message = bad(GOOD, changes)
    assert all(word in message for word in words)


def test_a_date_among_the_changes_is_an_error_of_the_user(folder):
    with pytest.raises(ValueError, match="title"):
        load(folder / "good.toml", tomllib.loads("title = 2024-01-01"))


def test_plans_are_frozen():
    with pytest.raises(Exception, match="frozen|cannot assign"):
        DataPlan("x").mix = "y"
    assert Recipe.__dataclass_params__.frozen and recipes.ModelPlan("x").name == "x"
    assert Path(recipes.__file__).exists()


# ---- what no table may hold ----


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "9" * 30])
@pytest.mark.parametrize(
    "key",
    [
        "train.weight_decay",
        "train.clip",
        "data.temperature",
        "data.seed",
        "model.max_length",
        "evaluation.sts",
        "tiny.train.lr",
    ],
)
def test_numbers_that_are_none(bad, key, value):
    table, name = key.rsplit(".", 1)
    message = (
        bad(f"{table}.{name} = {value}\n" + GOOD)
        if table == "tiny.train"
        else bad(GOOD, tomllib.loads(f"{key} = {value}"))
    )
    assert key in message and ("finite" in message or "2 ** 63" in message)


DEEP = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * DEEP + "]" * DEEP,
        "x = " + "{a=" * DEEP,
        ("a." * DEEP)[:-1] + " = 1",
        "x.y = " + "[" * 50 + "]" * 50,
        "[" + ("a." * 30)[:-1] + "]\nb = 1",
        "train.x = " + "9" * 5000,
    ],
)
def test_toml_that_is_nested_without_end(bad, text):
    message = bad(text + "\n" + GOOD if "[a" not in text else GOOD + text)
    assert any(word in message for word in ("nested", "parts", "RecursionError", "ValueError"))


@pytest.mark.parametrize(
    "content",
    [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '{"name": "a"}',
        "[5]",
        "[[]]",
        "5",
        "null",
        "",
        '[{"name": "a", "lines": 1e999}]',
        '[{"name": "a", "lines": "9", "weight": 1}]',
        '[{"name": ["a"], "lines": 9}]',
        '[{"name": "a", "lines": 9, "columns": [[]]}]',
        '[{"name": "a", "lines": 9, "columns": 5}]',
        '[{"name": "a", "lines": 9, "weight": NaN}]',
        "\ud83d",
    ],
)
def test_a_mix_of_foreign_json_names_the_file(folder, content):
    (folder / "mine.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="mine.json") as caught:
        plan(load(folder / "good.toml", {"data": {"mix": "mine.json"}}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize(
    "text, words",
    [
        ("str = 5", ["unknown key 'str'"]),
        ("'a[b' = 5", ["unknown key 'a[b'"]),
        ('"\\u001b[31m" = 5', ["unknown key"]),
        ("'' = 5", ["unknown key ''"]),
        ("k" * 5000 + " = 5", ["unknown key", "..."]),
    ],
)
def test_keys_with_odd_names(bad, text, words):
    message = bad(text + GOOD)
    assert all(word in message for word in words) and message.isprintable()
    assert "unknown key 'model.list'" in bad(GOOD, {"model": {"list": 5}})


@pytest.mark.parametrize("name", ["zero\0byte", "long" * 100])
@pytest.mark.parametrize("key", ["data.folder", "data.mix", "evaluation.sts"])
def test_names_that_no_file_can_have(bad, key, name):
    table, field = key.split(".")
    assert key.replace("data.folder", "data folder") in bad(GOOD, {table: {field: name}})


def test_an_encoder_that_no_machine_holds(bad):
    assert "random weights" in bad(GOOD, {"model": {"layers": 10**6, "width": 32 * 10**6}})
    assert "batch_size" in bad(GOOD, {"data": {"batch_size": 10**15}})


# ---- the record of a run ----


@pytest.mark.parametrize(
    "comment",
    [
        "# changed for this run: by hand",
        '# changed for this run: {"title": "mine"}',
        "# model.name is a folder",
        "[run",
        "#\n# [run]",
    ],
)
def test_comments_are_only_comments(folder, comment):
    (folder / "noted.toml").write_text(GOOD + "# " + comment + "\n")
    recipe = load(folder / "noted.toml")
    assert recipe.title == "a test" and recipe.text == GOOD + "# " + comment + "\n"
    assert "run" not in tomllib.loads(recipe.text)


CHANGES = {
    "title": 'a "b" \\ \n\x00\x7f\u2028 Tür 🐈',
    "train": {"lr": 1e-05, "bf16": True, "widths": [8, 16]},
    "data": {"mix": [{"name": "more.jsonl", "weight": 0.1}]},
    "tiny": {"odd key": {}},
}


def test_a_recorded_recipe_is_the_recipe_of_that_run(folder):
    first = load(folder / "good.toml", CHANGES)
    assert record_of(first)["changes"] == CHANGES
    (folder / "recorded.toml").write_text(first.text + '# command: "contrastive-st train"\n')
    second = load(folder / "recorded.toml")
    assert replace(second, path="", text="") == replace(first, path="", text="")
    assert second.text == first.text
    third = load(folder / "recorded.toml", {"train": {"lr": 0.5}})
    assert third.train == {**first.train, "lr": 0.5} and third.text.count("[run]") == 1
    assert third.title == first.title


@pytest.mark.parametrize(
    "table, words",
    [
        ("[run]\nspeed = 5\n", ["run: unknown key 'speed'", "changes"]),
        ("[run]\nchanges = 5\n", ["run: changes"]),
        ("[run]\nchanges = {}\n[tiny]\n", ["run", "last table"]),
        ("run = 5\n", ["bad.toml: run"]),
    ],
)
def test_a_table_run_that_is_no_record(bad, table, words):
    message = bad(table + GOOD if table.startswith("run") else GOOD + table)
    assert all(word in message for word in words)


# ---- damaged recipes ----

JUNK = [
    *("", "inf", "-1", "0", "1e999", "true", "[]", "{}", "[[[]]]", "'x'"),
    *('"\\u0000"', "2024-01-01", "9" * 40, "[1, 'a']", "{a = {b = {c = 1}}}"),
    *("[" * 3000, "0x7fffffffffffffff", "'" + "y" * 5000 + "'"),
]


def damage(text, random):
    "A recipe with one to three of its lines changed, dropped, doubled or cut."
    lines = text.split("\n")
    for _ in range(random.randint(1, 3)):
        n = random.randrange(len(lines))
        key, equals, value = lines[n].partition("=")
        lines[n : n + 1] = random.choice(
            [
                [key + equals + random.choice(JUNK)],
                [],
                [lines[n], lines[n]],
                [lines[n][: random.randint(0, len(lines[n]))]],
                [key.strip() + "x" + equals + value],
                [value + equals + key],
                [lines[n].replace(random.choice("=.[]\"' "), random.choice("=.[]\"'\0é"))],
                [random.choice(["[data]", "[tiny]", "[run]", "[[model]]", "[train.x]"])],
            ]
        )
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_recipes_load_or_say_what_is_wrong(folder, monkeypatch, seed):
    monkeypatch.setenv("HOME", str(folder))
    random = Random(seed)
    texts = [GOOD, *(path.read_text(encoding="utf-8") for path in known().values())]
    for _ in range(DAMAGED // 8):
        (folder / "damaged.toml").write_text(
            damage(random.choice(texts), random), encoding="utf-8", errors="replace"
        )
        try:
            recipe = load(folder / "damaged.toml", tiny=random.random() < 0.3)
            build(TrainConfig, recipe.train, f"{recipe.path}: train")
            plan(recipe)
        except ValueError as error:
            assert (
                str(folder) in str(error)
                and "\n" not in str(error)
                and len(str(error)) < 400 + 3 * len(str(folder))
            ), str(error)


# ---- the page of the seeds ----


def defined(path):
    "Names that a module or a test file defines at its top level."
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)} | {
        t.id
        for n in body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    }


def test_every_row_of_the_seeds_page_leads_somewhere():
    "Cells exist in a notebook, functions in a module, tests in their file, recipes in recipes/."
    rows = [
        line
        for line in (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| statement")
    ]
    wrong = []
    for row in rows:
        if len(cells := row.strip("|").split(" | ")) != 3:
            wrong.append(f"not three columns: {row[:60]}")
        for cell in cells[1:]:
            notebooks = [ROOT / "docs" / link for link in re.findall(r"\]\(([^)]+\.ipynb)\)", cell)]
            ids = {
                c["id"]
                for path in notebooks
                if path.is_file()
                for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            }
            wrong += [f"no notebook {path}" for path in notebooks if not path.is_file()]
            for name in re.findall(r"`([^`]+)`", cell):
                first, _, last = name.rpartition("::" if "::" in name else ".")
                if name.startswith(("contrastive-st ", "model.max_length")):
                    continue
                if name.startswith("recipes/"):
                    good = (ROOT / name).is_file()
                elif "::" in name:
                    good = (ROOT / first).is_file() and last in defined(ROOT / first)
                else:
                    good = (
                        last in defined(ROOT / "contrastive_st" / f"{first}.py")
                        if first
                        else name in ids
                    )
                if not good:
                    wrong.append(f"{name}: {row[:60]}")
    assert len(rows) > 30 and not wrong, "\n".join(wrong)


def test_an_installed_package_has_every_recipe(tmp_path):
    "Built as pip builds it, asked from elsewhere: the same names, their data configs beside them."
    # asked for, not imported: setuptools refuses to be imported after distutils
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the package, is not installed")
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("contrastive_st", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    code = (
        "from contrastive_st.recipes import known, load, plan; print({n: [p.parent.name, n in"
        " ('nli', 'quickstart') or len(plan(load(n)).sources) > 0] for n, p in known().items()})"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "lib",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert ast.literal_eval(said) == {
        name: ["quickstart" if name == "quickstart" else "published", True] for name in known()
    }


# --- the picture of a plan ---


def test_the_plan_of_many_datasets_is_drawn(tmp_path):
    "Long names, more datasets than rows, datasets never seen; the file is a PNG whatever its name."
    rows = [
        {
            "name": f"{'long/' * 30}{n}.jsonl.gz",
            "asked": (n + 1) / 820,
            "realised": (n % 2) / 50,
            "epochs": float(n % 2 * n),
        }
        for n in range(40)
    ]
    for most in (1, 30, 40):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recipes.report_figure(
                {"steps": 1000, "batch_size": 64, "datasets": rows}, tmp_path / "plan.jpg", most
            )
        assert (tmp_path / "plan.jpg").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("mix =", "mixx =", "bad.toml: unknown key 'data.mixx'; did you mean 'mix'?"),
        ("lr =", "leraning_rate =", "train: unknown key 'leraning_rate'; did you mean 'lr'?"),
        ("lr = 1e-3", "lr = '1e-3'", "bad.toml: train: lr: should be a valid number, not '1e-3'"),
        ("warmup = 1", "warmup = 9", "bad.toml: train: warmup is 9 steps but the run has 6"),
    ],
)
def test_a_recipe_is_read_and_refused_before_torch(tmp_path, old, new, said):
    "A mistyped key must not wait for the libraries that only a training needs."
    (tmp_path / "bad.toml").write_text(GOOD.replace(old, new), encoding="utf-8")
    program = """
import sys
from contrastive_st import recipes
try:
    recipes.load("bad.toml")
except ValueError as error:
    print(error)
print(sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""
    options = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", program], env=environment, **options).stdout
    assert said in output and output.endswith("[]\n")


def test_the_settings_of_the_tiny_table_and_of_changes_are_checked(bad, folder):
    assert "tiny: train: unknown key 'warm_up'" in bad(GOOD + "[tiny]\ntrain.warm_up = 1\n")
    message = bad(GOOD, {"train": {"batch": 8}})
    assert "bad.toml, changed for this run: train: unknown key 'batch'" in message


def test_keys_of_labels_scores_and_prompts_are_passed_on(folder):
    mix = [
        {"name": "a", "weight": 1, "columns": ["text"], "label": "intent", "lines": 10},
        {"name": "b", "weight": 1, "score": "grade", "score_range": [0, 5], "lines": 10},
        {"name": "c", "weight": 1, "prompts": {"anchor": "query: "}, "lines": 10},
    ]
    recipe = Recipe("a test", ModelPlan("encoder"), DataPlan(mix, batch_size=4))
    assert recipe.data.mix == mix
    assert [source.lines for source in plan(recipe).sources] == [10, 10, 10]


def test_labels_are_an_exam(folder):
    table = {"labels": "held.jsonl", "neighbors": "train.jsonl", "text": "body", "label": "topic"}
    exam = build(EvaluationPlan, table, "recipe.toml: test")
    assert (exam.labels, exam.neighbors, exam.text, exam.label) == tuple(table.values())
    assert (EvaluationPlan().labels, EvaluationPlan().text) == ("", "text")


@pytest.mark.parametrize(
    "teacher, loss, words",
    [
        (', teacher = "scores"', "info_nce", "dataset 1 names a teacher, but train.loss is 'info"),
        ("", "margin_mse", "copies a teacher's scores, and there are none; name their column with"),
        (', teachr = "scores"', "margin_mse", "there are none"),
        (', teacher = "scores", teacher_scale = 0.05', "distill_kl", ""),
        (', teacher = ["s1", "s2"]', "margin_mse", ""),
    ],
)
def test_a_teacher_and_its_loss_go_together(folder, teacher, loss, words):
    "Said when the recipe is read, before any data is opened."
    text = changed('mix = "data_config.json"', f'mix = [{{name = "a.jsonl", weight = 1{teacher}}}]')
    (folder / "taught.toml").write_text(text.replace("lr = 1e-3", f'loss = "{loss}"'))
    if not words:
        assert load(folder / "taught.toml").train["loss"] == loss
        return
    with pytest.raises(ValueError, match=words) as error:
        load(folder / "taught.toml")
    assert "taught.toml" in str(error.value) and "\n" not in str(error.value)
