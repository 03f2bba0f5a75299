"""Compare: what changed between runs and what it brought, as pairs; sweeps that make such runs."""

import json
import shutil
import tomllib

import numpy as np
import pytest
from conftest import make_backbone, make_tokenizer, refuses
from typer.testing import CliRunner

from contrastive_st import atomic, cli, data, evaluation
from contrastive_st.compare import (
    aggregate,
    changed_keys,
    check_plot,
    compare_runs,
    comparison_figure,
    comparison_json,
    comparison_rows,
    parse_sweep,
    read_run,
    read_runs,
    remarks,
)
from contrastive_st.model import SentenceEncoder

THINGS = "dog cat man woman child horse guitar piano rice road street water music ball".split()
RECIPE = """
title = "small"

[model]
name = "encoder"

[data]
mix = "data_config.json"
folder = "data"
batch_size = 8
datasets_per_batch = 1

[train]
steps = 4
warmup = 1
lr = 1e-3

[evaluation]
sts = "sts.tsv"
retrieval = "retrieval"
"""


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*words):
    "Run a command; its output and its error, as `main` would print them."
    return CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=True)


def fill(folder):
    "An encoder, data and a recipe in a folder."
    tokenizer = make_tokenizer()
    encoder = SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=32)
    encoder.save_pretrained(folder / "encoder")
    d = folder / "data"
    jsonl(d / "a.jsonl", [[f"where is the {x}", f"the {x} is on the road"] for x in THINGS])
    (d / "data_config.json").write_text(json.dumps([{"name": "a.jsonl", "weight": 1}]))
    rows = [
        f"{i % 6}\tthe {x} is eating\tthe {THINGS[(i + i % 6) % len(THINGS)]} is eating\n"
        for i, x in enumerate(THINGS)
    ]
    (d / "sts.tsv").write_text("score\tsentence1\tsentence2\n" + "".join(rows))
    r = d / "retrieval"
    jsonl(r / "corpus.jsonl", [{"_id": x, "text": f"the {x} is on the street"} for x in THINGS])
    jsonl(r / "queries.jsonl", [{"_id": x, "text": f"who has the {x}"} for x in THINGS])
    (r / "qrels").mkdir()
    lines = "".join(f"{x}\t{x}\t1\n" for x in THINGS)
    (r / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    (folder / "recipe.toml").write_text(RECIPE.replace('"encoder"', f'"{folder}/encoder"'))


@pytest.fixture(scope="module")
def place(tmp_path_factory, quick_disk):
    "A folder in which a sweep of two rates was trained: runs/lr=0.0001 and runs/lr=0.01."
    folder = tmp_path_factory.mktemp("compare")
    fill(folder)
    words = "train", "recipe.toml", "--out", "runs", "--no-progress"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # so that the runs note a command that can be followed
        patch.setattr("sys.argv", ["contrastive-st", *map(str, words)])
        result = call(*words, "--sweep", "train.lr=1e-4,1e-2")
    assert result.exit_code == 0, (result.output, result.exception)
    (folder / "said.txt").write_text(result.output)
    return folder


@pytest.fixture
def runs(place, tmp_path, monkeypatch):
    "Copies of both runs, in the folder where they were started."
    monkeypatch.chdir(place)
    skip = shutil.ignore_patterns("checkpoints", "tensorboard")
    return [
        shutil.copytree(place / "runs" / name, tmp_path / name, ignore=skip)
        for name in ("lr=0.0001", "lr=0.01")
    ]


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


# --- a comparison ---


def test_a_sweep_ends_with_the_table(place):
    said = (place / "said.txt").read_text()
    table = said[said.rindex("run  ") :]
    assert "Next:" not in said  # four lines for each run, above the table
    assert said.count("baseline") == 2 and "with 0 inside the interval" in table
    row = next(line for line in table.splitlines() if line.startswith("lr=0.01"))
    assert row.split()[1] == "0.01" and row.split()[-1] == "4" and "[" in row
    assert read_run(place / "runs/lr=0.01").settings["train.lr"] == 0.01


def test_only_what_differs_is_a_column(runs):
    assert changed_keys(read_runs(runs)) == {"train.lr": [1e-4, 1e-2]}
    edit(runs[1] / "config.json", lambda c: c["mix"][0].update(weight=3))
    recipe = (runs[1] / "recipe.toml").read_text()
    (runs[1] / "recipe.toml").write_text(recipe.replace('title = "small"', 'title = "larger"'))
    changed = changed_keys(read_runs(runs))
    assert changed.pop("title") == ["small", "larger"]
    assert changed == {"train.lr": [1e-4, 1e-2], "data.mix.a.jsonl.weight": [1, 3]}


def test_differences_are_those_of_evaluation(place, runs):
    comparison = compare_runs(runs)
    assert comparison.metrics == ["spearman", "ndcg@10"] and comparison.notes == []
    assert comparison.differences["ndcg@10"][0] is None  # the baseline
    first, second = (SentenceEncoder.from_pretrained(run / "model") for run in runs)
    pairs = data.read_sts(place / "data/sts.tsv")
    cosines = [evaluation.sts_cosines(e, pairs) for e in (first, second)]
    naive = evaluation.paired_difference(*cosines, pairs[2])
    assert comparison.differences["spearman"][1] == pytest.approx(naive, abs=1e-6)
    exam = data.read_retrieval(place / "data/retrieval")
    values = [
        [row["ndcg@10"] for row in evaluation.retrieval_by_query(e, *exam).values()]
        for e in (first, second)
    ]
    naive = evaluation.paired_difference(*values)
    assert comparison.differences["ndcg@10"][1] == pytest.approx(naive, abs=1e-6)


def test_items_average_to_what_the_run_recorded(runs):
    compare_runs(runs)
    for run in runs:
        items = atomic.read_json(run / "items.json")["items"]
        after = json.loads((run / "metrics.json").read_text())["after"]
        for metric in ("spearman", "pearson", "ndcg@10", "accuracy@1", "map@100"):
            assert aggregate(items, metric) == pytest.approx(after[metric], abs=1e-5)


def test_nothing_is_measured_twice(place, runs, tmp_path):
    for run in runs:
        (run / "items.json").unlink()
    seen = []
    first = compare_runs(runs, on_measure=lambda run: seen.append(run.name))
    again = compare_runs(runs, on_measure=lambda run: seen.append("again"))
    assert seen == ["lr=0.0001", "lr=0.01"] and again.differences == first.differences
    # a damaged file is made anew, and so is one of another model
    (runs[0] / "items.json").write_text("{")
    edit(runs[1] / "items.json", lambda record: record.update(model="of another"))
    assert compare_runs(runs, on_measure=lambda run: seen.append("anew")).notes == []
    assert seen[2:] == ["anew", "anew"]


def test_without_measuring_there_is_only_what_is_kept(runs):
    assert compare_runs(runs, measure=False).notes == []
    (runs[0] / "items.json").unlink()
    comparison = compare_runs(runs, measure=False)
    assert comparison.differences["ndcg@10"] == [None, None]
    assert "lr=0.0001 was not measured question by question yet" in comparison.notes[0]


def test_a_baseline_is_named_or_added(place, runs):
    named = compare_runs(runs, baseline=runs[1])
    plain = compare_runs(runs)
    assert named.baseline == 1 and named.differences["spearman"][1] is None
    gain, loss = (c.differences["spearman"][n]["difference"] for c, n in ((plain, 1), (named, 0)))
    assert gain == pytest.approx(-loss)
    added = compare_runs(runs, baseline=place / "runs/lr=0.01")
    names = [run.name for run in added.runs]
    assert len({*names}) == 3 and added.baseline == 0 and names[1].endswith("lr=0.0001")
    assert added.differences["spearman"][2]["difference"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("neighbors", ["", "voters.csv"])
def test_labelled_texts_are_paired(tmp_path, monkeypatch, quick_disk, neighbors):
    "Each text has a value, whose mean is what the run recorded, and the sweep compares them."
    fill(tmp_path)
    kinds = "animal", "person", "thing"
    for n, name in enumerate(("judged.csv", "voters.csv")):
        rows = [f"the {x} is {n},{kinds[i % 3]}\n" for i, x in enumerate(THINGS)]
        (tmp_path / "data" / name).write_text("say,kind\n" + "".join(rows))
    table = f'labels = "judged.csv"\nneighbors = "{neighbors}"\ntext = "say"\nlabel = "kind"\n'
    recipe = (tmp_path / "recipe.toml").read_text()
    recipe = recipe.replace('sts = "sts.tsv"\nretrieval = "retrieval"\n', table)
    (tmp_path / "recipe.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    words = "train", "recipe.toml", "--out", "runs", "--no-progress"
    monkeypatch.setattr("sys.argv", ["contrastive-st", *words])
    result = call(*words, "--sweep", "train.lr=1e-4,1e-1")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "knn_accuracy" in result.output[result.output.rindex("run  ") :]
    runs = [tmp_path / "runs" / name for name in ("lr=0.0001", "lr=0.1")]
    comparison = compare_runs(runs)
    assert comparison.metrics == ["knn_accuracy"] and comparison.notes == []
    values = []
    for run in runs:
        items = atomic.read_json(run / "items.json")["items"]
        after = json.loads((run / "metrics.json").read_text())["after"]
        for metric in ("knn_accuracy", "map@r"):
            assert len(items["labels"][metric]) == len(THINGS)
            assert aggregate(items, metric) == pytest.approx(after[metric], abs=1e-6)
        values.append(items["labels"]["map@r"])
    paired = evaluation.paired_difference(*values)
    assert compare_runs(runs, metric="map@r").differences["map@r"][1] == pytest.approx(paired)


# --- exams that do not fit ---


def test_another_exam_is_noticed(place, runs, tmp_path):
    "Other questions under the same names: the recorded score says that they are others."
    shutil.copytree(place / "data", tmp_path / "data")
    rows = (tmp_path / "data/sts.tsv").read_text().splitlines()
    (tmp_path / "data/sts.tsv").write_text("\n".join(rows[:8]) + "\n")
    comparison = compare_runs(runs, data_folder=tmp_path / "data")
    assert "these are not the data it was measured on" in comparison.notes[0]
    assert "no paired difference" in comparison.notes[0]
    heads, rows = comparison_rows(comparison, "spearman")
    assert [row[heads.index("difference")] for row in rows] == ["baseline", ""]
    assert "[" in rows[1][heads.index("spearman")]  # the interval of its own


def test_different_exams_are_not_paired(runs):
    edit(runs[1] / "items.json", lambda record: record.update(data="others"))
    comparison = compare_runs(runs, measure=False)
    assert "lr=0.0001 and lr=0.01 were measured on different data" in comparison.notes[0]
    assert comparison.differences["spearman"] == [None, None]


def test_data_that_are_gone_are_said(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    note = compare_runs(runs, data_folder=tmp_path / "empty").notes[0]
    assert "'sts.tsv', which lr=0.0001 was measured on, is not found" in note and "--data" in note
    (runs[0] / "recipe.toml").unlink()
    assert "trained from Python" in compare_runs(runs).notes[0]


def test_runs_without_a_common_metric(runs):
    edit(runs[1] / "metrics.json", lambda m: m.update(after={"other": 1.0}))
    refuses(lambda: compare_runs(runs), "no score in common", "[evaluation]")


# --- bad input ---


def test_bad_folders(runs, tmp_path):
    refuses(lambda: compare_runs([]), "0 run to compare", "two or more")
    refuses(lambda: compare_runs(runs[:1]), "1 run to compare")
    refuses(lambda: compare_runs([*runs, tmp_path]), tmp_path, "not a run directory")
    refuses(lambda: compare_runs([*runs, tmp_path / "none"]), "none", "not a run directory")
    twice = [runs[0], runs[0].parent / "." / runs[0].name]
    refuses(lambda: compare_runs(twice), "is the same run as")
    refuses(lambda: compare_runs(runs, metric="mrr@7"), "'mrr@7' was not measured", "ndcg@10")
    (runs[1] / "mixture.json").unlink()
    refuses(lambda: compare_runs(runs), runs[1], "not a finished run", "mixture.json")


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"before": {', "cannot be read"),
        ("[]", "JSON list"),
        ('{"before": {}, "after": {}, "test": {}, "steps": 4}', "'before' is missing"),
        ('{"before": {}, "after": {"spearman": "x"}, "test": {}, "steps": 4}', "spearman is 'x'"),
        ('{"before": {}, "after": {}, "test": {}}', "'steps'"),
    ],
)
def test_damaged_metrics_are_named(runs, text, said):
    (runs[1] / "metrics.json").write_text(text)
    refuses(lambda: compare_runs(runs), runs[1] / "metrics.json", said)


def test_a_damaged_model_is_said(runs):
    (runs[0] / "items.json").unlink()
    weights = runs[0] / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # one bit
    assert "model.safetensors" in compare_runs(runs).notes[0]
    weights.write_bytes(b"no weights")
    refuses(lambda: compare_runs(runs), weights, "cannot be read")


# --- what is shown ---


def test_command_json_and_plots(runs, tmp_path):
    result = call("compare", *runs, "--json", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.exception
    record = json.loads(result.stdout)
    assert [run["changed"] for run in record["runs"]] == [{"train.lr": 1e-4}, {"train.lr": 1e-2}]
    assert record["runs"][0]["difference"] == {"spearman": None, "ndcg@10": None}
    assert record["runs"][1]["difference"]["ndcg@10"].keys() >= {"difference_low"}
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    comparison_figure(compare_runs(runs), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    refuses(lambda: check_plot("p.jpg"), "--plot p.jpg", ".svg or .png")
    assert isinstance(call("compare", *runs, "--plot", "p.jpg").exception, ValueError)


def test_numbers_that_are_none(runs, tmp_path):
    "A diverged metric is null in the record; it is shown, and draws nothing."
    for run in runs:
        edit(run / "metrics.json", lambda m: m["before"].update(spearman=None))
    edit(runs[1] / "metrics.json", lambda m: m.update(seconds=None))
    comparison = compare_runs(runs)
    heads, rows = comparison_rows(comparison, "spearman")
    assert rows[1][heads.index("before")] == "not measured"
    assert rows[1][heads.index("seconds")] == "-"
    comparison_figure(comparison, tmp_path / "p.svg")
    assert json.loads(comparison_json(comparison))["runs"][1]["seconds"] is None


def test_many_changed_keys(runs):
    for n in range(9):
        edit(runs[1] / "config.json", lambda c, n=n: c.update({f"key{n}": 1}))
    comparison = compare_runs(runs)
    heads, rows = comparison_rows(comparison, "ndcg@10")
    assert len(heads) == 12 and all(len(row) == 12 for row in rows)
    assert "also different: train.key" in remarks(comparison)[-1]


# --- sweeps ---


def test_sweep_values():
    variants = parse_sweep(
        ["train.lr=1e-5, 2e-5", "model.pooling=mean,cls", "train.bf16=true,false"]
    )
    assert len(variants) == 8
    assert variants[0].name == "lr=1e-05,pooling=mean,bf16=true"
    assert variants[-1].changes == ["train.lr=2e-05", 'model.pooling="cls"', "train.bf16=false"]
    assert [v.name for v in parse_sweep(["data.seed=1,2"])] == ["seed=1", "seed=2"]
    both = parse_sweep(["data.seed=1,2", "train.seed=1,2"])
    assert both[0].name == "data.seed=1,train.seed=1"
    for variant in parse_sweep(["train.widths=[16,32],[32]", "model.name='a/b','../c d'"]):
        tables = [tomllib.loads(change) for change in variant.changes]
        assert len(tables) == 2 and "/" not in variant.name
    names = [v.name for v in parse_sweep(["model.name='a b','a/b'"])]
    assert len({*names}) == 2


@pytest.mark.parametrize(
    "sweep, said",
    [
        (["train.lr"], "write key=value,value"),
        (["train.lr="], "write key=value,value"),
        (["lr=1,2"], "write key=value,value"),
        (["train.lr=1e-5"], "one value is no sweep"),
        (["train.lr=1e-5,0.00001"], "occurs twice"),
        (["train.lr=1,,2"], "write key=value,value"),
        (["train.lr=nan,1"], "should be a finite number"),
        (["train.lr=1]\n[x,2"], "write key=value,value"),
        (["train.lr=1,2", "train.lr=3,4"], "swept twice"),
        (["train.seed=" + ",".join(map(str, range(65)))], "65 runs, and 64 is the limit"),
        (["a.b=" + ",".join(map(str, range(9)))] + ["a.c=1,2,3,4,5,6,7,8"], "72 runs"),
    ],
)
def test_bad_sweeps(sweep, said):
    refuses(lambda: parse_sweep(sweep), "--sweep", said)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--sweep", "train.lr=1e-3,-1"], "lr"),
        (["--sweep", "train.stepz=1,2"], "stepz"),
        (["--sweep", "train.warmup=1,99"], "warmup is 99"),
        (["--sweep", "model.name=encoder/none,other"], "encoder/none"),
        (["--sweep", "train.lr=1e-3,1e-2", "--push-to-hub", "me/x"], "one run"),
        (["--sweep", "train.lr=1e-3,1e-2", "--out", "RUN"], "is a run"),
        (
            "--sweep train.lr=1,2 --set evaluation.sts='' --set evaluation.retrieval=''".split(),
            "measures nothing",
        ),
    ],
)
def test_bad_values_are_refused_before_the_first_run(place, tmp_path, words, said):
    words = [str(place / "runs/lr=0.01") if word == "RUN" else word for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    result = call("train", place / "recipe.toml", *out, *words)
    assert isinstance(result.exception, ValueError) and said in str(result.exception)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_sweep_goes_on(place, capsys):
    "What is finished stays; a run that cannot go on is said at the end, and the others are made."
    words = "train", place / "recipe.toml", "--out", place / "runs", "--no-progress"
    before = (place / "runs/lr=0.01/metrics.json").stat().st_mtime_ns
    result = call(*words, "--sweep", "train.lr=1e-2,1e-3")
    assert result.exit_code == 0, result.exception
    assert (place / "runs/lr=0.01/metrics.json").stat().st_mtime_ns == before
    assert (place / "runs/lr=0.001/model/modules.json").is_file()
    # the same directories, but another recipe: nothing is mixed up
    result = call(*words, "--sweep", "train.lr=1e-2,1e-3", "--set", "train.steps=5")
    assert "2 of 2 runs failed, first lr=0.01" in str(result.exception)
    assert "another configuration" in str(result.exception)
    assert np.isfinite(read_run(place / "runs/lr=0.001").metrics["evaluation"]["after"]["spearman"])
