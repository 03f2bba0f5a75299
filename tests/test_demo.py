"""The web page: its functions alone, the server over HTTP, and every page in a real browser."""

import contextlib
import csv
import html
import html.parser
import http.client
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_backbone, make_tokenizer

from contrastive_st import bias, charts, cli, demo
from contrastive_st import server as doors
from contrastive_st.model import SentenceEncoder

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "</td></tr></table><svg onload='window.hacked = 1'>",
    "${window.hacked = 1}",
    "{{7*7}}",
    "&lt;b&gt;",
    "a\u202eb",
    "' onmouseover='window.hacked = 1",
    "\x00",
    "<a href='javascript:window.hacked = 1'>x</a>",
]


class Words:
    "An encoder of its own: a dimension per known word, and a count of its calls."

    prompts, width = {"query": "ask "}, 5

    def __init__(self):
        self.calls = []

    def encode(self, texts, prompt=None, progress=False):
        self.calls.append((prompt, len(texts)))
        if any(len(text) > 100 for text in texts):
            warnings.warn("1 text was cut", stacklevel=2)
        return np.array(
            [
                [1 + text.count(word) for word in ("dog", "cat", "rain", "sun", " he ")]
                for text in texts
            ],
            dtype=np.float32,
        )


@pytest.fixture
def words():
    return demo.Model("words", Words())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two model directories of different widths, and a run with a model in it."
    from transformers import BertConfig, BertModel

    out, tokenizer = tmp_path_factory.mktemp("demo"), make_tokenizer()
    SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64).save_pretrained(
        out / "small"
    )
    wide = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    run_directory(out / "run")
    SentenceEncoder(BertModel(wide).eval(), tokenizer, max_length=64).save_pretrained(
        out / "run" / "model"
    )
    return out


def run_directory(folder: Path) -> Path:
    "A run's records, as the trainer writes them."
    folder.mkdir(parents=True)

    def score(x):
        return {"spearman": x, "spearman_low": x - 0.1, "spearman_high": x + 0.1}

    rest = {"learning_rate": 1e-5, "mean_cosine": 0.2}
    lines = [{"step": s, "loss": 1 / s} | rest for s in (1, 10, 20)]
    records = {
        "versions": {"torch": "2.13"},
        "history": [*lines, {"step": 20, "eval_spearman": 0.7}],
        "metrics": {"before": score(0.5), "after": score(0.7), "test": {"before": {}, "after": {}}},
        "mixture": {
            "datasets": [
                {"name": "train/a<b>.jsonl.gz", "asked": 0.4, "realised": 0.42},
                {"name": "b.jsonl", "asked": 0.6, "realised": 0.58},
            ]
        },
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.copy(ROOT / "docs/images/heatmap.png", folder / "similarity.png")
    return folder


def stranger(folder: Path) -> None:
    "Make a model directory one whose code has to be run to load it; the code leaves a file."
    (folder / "config.json").write_text(
        '{"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel":'
        ' "code.Model"}}'
    )
    (folder / "code.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Model: pass")


# --- models ---


def test_models_open_with_short_names_and_their_run(folders):
    small, run = demo.open_models([folders / "small", str(folders / "run")])
    assert (small.name, small.encoder.width, small.run) == ("small", 32, None)
    assert (run.name, run.encoder.width, run.run) == ("run", 48, folders / "run")
    assert demo.open_models([folders / "run" / "model"])[0].run == folders / "run"


def test_what_is_no_model_is_refused_in_one_sentence(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "going").mkdir()
    (tmp_path / "going/versions.json").write_text("{}")
    stranger(
        shutil.copytree(
            folders / "small", tmp_path / "remote", ignore=shutil.ignore_patterns("manifest.json")
        )
    )
    shutil.copytree(
        folders / "small", tmp_path / "module", ignore=shutil.ignore_patterns("manifest.json")
    )
    chain = json.loads((tmp_path / "module/modules.json").read_text())
    (tmp_path / "module/modules.json").write_text(
        json.dumps([chain[0] | {"type": "code.Transformer"}, *chain[1:]])
    )
    for place, message in (
        ("empty", "not a model directory"),
        ("going", "has no model yet"),
        ("remote", "code that comes with a model is never run"),
        ("module", "only Transformer, Pooling, StaticEmbedding, Dense"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            demo.open_models([folders / "small", tmp_path / place])
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("ran"))
    for places, message in (([], "no model is given"), ([folders / "small"] * 2, "given twice")):
        with pytest.raises(ValueError, match=message):
            demo.open_models(places)


def test_a_corpus_is_encoded_once_and_roles_choose_prompts(words):
    corpus = ["dog", "x" * 200]
    for _ in range(2):
        with pytest.warns(UserWarning, match="words: 1 text was cut"):
            demo.find([words], "rain", corpus, 2)
    assert words.encoder.calls == [("query", 1), (None, 2)]
    for i in range(9):
        words.encode([str(i)])
    assert len(words.memory) <= 4


# --- tables: text stays text ---


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.in_cell = set(), [], False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "td":
            self.texts.append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data):
        if self.in_cell:
            self.texts[-1] += data


def table(*rows):
    "HTML of a table of texts and scores, and what a browser reads in it."
    columns = ["<b>text</b>", "model"]
    page = demo.to_html(pd.DataFrame(rows, columns=columns).astype({"model": float}))
    reader = Reader()
    reader.feed(page)
    return page, reader


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    page, reader = table([text, 0.5])
    assert reader.tags <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "small"}
    assert reader.texts[0] == text and "<b>" not in page
    twice = demo.to_html(pd.DataFrame([[text, 0.5]], columns=[text, text]))  # two equal headings
    for heading in re.findall("<th .*?>(.*?)</th>", twice):
        assert html.unescape(heading) == text


def test_ranks_bars_and_long_texts():
    page, _ = table(["a", 0.5], ["b", 0.9], ["c", 0.5], ["d", -3.0], ["e" * 100_000, 0.1])
    assert re.findall(r"<small>(\d)\.", page) == ["2", "1", "2", "5", "4"]
    assert re.findall(r"\) ([\d.]+)%, transparent", page) == ["50.0", "90.0", "10.0"]
    assert "(100,000 characters)" in page and len(page) < 6_000
    assert table()[0].count("<tr>") == 1


def test_a_table_of_20_000_rows_shows_the_first_thousand():
    start = time.time()
    with pytest.warns(UserWarning, match="the first 1,000 of 20,000 rows"):
        assert table(*[["dog", 0.5]] * 20_000)[0].count("<td ") == 2_000
    assert time.time() - start < 5


# --- similarity, answers ---


def test_compare_is_the_cosine_for_models_of_different_widths(folders):
    models = demo.open_models([folders / "small", folders / "run"])
    lines = ["a dog", "the child is eating rice", "a dog", "how do i reset my password?"]
    table = demo.compare(models, "a cat", lines)
    assert list(table) == ["text", "small", "run"] and len(table) == 4
    for model in models:
        a, *e = model.encoder.encode(["a cat", *table["text"]], progress=False)
        np.testing.assert_allclose(table[model.name], e @ a, atol=1e-5)
    assert table["small"].is_monotonic_decreasing


def test_dot_product_and_what_lengths_say(words):
    table, remarks = demo.answers([words], "dog", ["dog dog dog", "dog", "cat cat cat cat"], "dot")
    # length beats meaning
    rows = table.values.tolist()
    assert rows == [["dog dog dog", 12.0], ["cat cat cat cat", 10.0], ["dog", 8.0]]
    assert "favours" in remarks[0]
    assert demo.answers([words], "dog", ["dog", "cat"], "cos")[1][0].endswith("give one order")


# --- reading ---


def write(path: Path, text) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "name, text, column, expected",
    [
        ("a.txt", "\ufeffone\r\n\r\ntwo\u2028still two\n", "", ["one", "two\u2028still two"]),
        (
            "a.jsonl",
            '{"id": 1, "text": "one"}\n\n{"title": "t", "text": "two"}\n',
            "",
            ["one", "t two"],
        ),
        ("a.jsonl", '{"title": "t", "text": "two"}\n', "text", ["two"]),
        ("a.csv", 'id,headline\n1,"one, or\ntwo"\n', "headline", ["one, or\ntwo"]),
        ("a.csv", "anything\none\n", "", ["one"]),
        ("a.tsv", 'id\tsentence\n1\tsay "one\n', "", ['say "one']),
        ("A.TXT", "日本語\nالعربية\n", "", ["日本語", "العربية"]),
    ],
)
def test_read_corpus(tmp_path, name, text, column, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert demo.read_corpus(write(tmp_path / name, text), column) == expected


@pytest.mark.parametrize(
    "name, text, column, message",
    [
        ("a.pdf", "%PDF", "", "save it as one of these"),
        ("a.txt.gz", b"\x1f\x8b", "", "save it as one of these"),
        ("a.txt", b"caf\xe9", "", "a.txt:1: "),
        ("a.txt", "", "", "there is no text"),
        ("a.txt", "\n \n", "", "there is no text"),
        ("a.csv", "id,headline\n1,one\n", "", "the columns are id, headline, name one"),
        ("a.csv", "id,headline\n1,one\n", "body", "no column 'body' among id, headline"),
        ("a.csv", "text,id\nx\n", "", "a.csv:2: 1 cells where the header has 2"),
        ("a.csv", 'text,id\n"y', "", "not CSV"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "", "a.jsonl:2: expected an object"),
        ("a.jsonl", '{"text": 3}\n', "", "a.jsonl:1"),
        ("a.jsonl", "[" * 100_000, "", "a.jsonl:1: not JSON"),
        ("a.txt", "line\n" * 200_000, "", "more than 20,000 lines of text"),
        ("a.txt", "x" * 5_000_000, "", "text 1 has 5,000,000 characters, more than the 100,000"),
        ("a.txt", "ok\n\n" + "x" * 5_000_000, "", "text 3 has 5,000,000"),
        ("a.txt", "\n" * 5_000_000, "", "more than 20,000 lines of text"),
        ("a.txt", " \n" * 300_000 + "x", "", "more than 20,000 lines of text"),
        ("a.txt", "\u65e5" * 7_000_000, "", "21,000,000 bytes, more than the 20,000,000"),
        (
            "a.txt",
            "word " * 2_100_000,
            "",
            "text 1 has 10,499,999 characters",
        ),
        ("a.tsv", "x" * 5_000_000 + "\ta\n1\t2\n", "", "which column holds the texts is not clear"),
        ("a.tsv", "x" * 50_000 + "\ta\n1\t2\n", "", "which column holds the texts is not clear"),
        ("a.csv", "\x1b[31mred,b\n1,2\n", "", "red, b"),
        ("a.jsonl", '{"text": "' + "x" * 5_000_000 + '"}\n', "", "has 5,000,000 characters"),
        ("a.jsonl", '{"a": ' * 100_000 + "1" + "}" * 100_000, "", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": null, "title": ["x"]}\n', "", "a.jsonl:1"),
        ("a.jsonl", '{"n": ' + "9" * 5_000 + "}", "", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": NaN}\n', "", "a.jsonl:1"),
        ("a.jsonl", '{"x": 1, "y": 2}\n', "c" * 9_000, "no column 'ccc"),
    ],
)
def test_bad_corpus_is_one_sentence(tmp_path, name, text, column, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        demo.read_corpus(write(tmp_path / name, text), column)
    assert "\n" not in str(error.value) and len(str(error.value)) < 350 + len(str(tmp_path))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.jsonl", '{"text": "a\\ud800b"}\n', ["a\ufffdb"]),
        ("a.txt", "a\0b\n", ["a\0b"]),
        ("a.jsonl", '{"title": 5, "text": "two"}\n', ["two"]),
    ],
)
def test_odd_characters_reach_the_page_as_text(words, tmp_path, name, text, expected):
    texts = demo.read_corpus(write(tmp_path / name, text))
    assert texts == expected
    (page,) = demo.reply(lambda: (demo.to_html(demo.compare([words], "dog", texts)),), [])
    assert "</table>" in page.encode().decode()


def test_what_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name in ("endless", "pipe", "folder", "nothing"):
        with pytest.raises(ValueError, match=f"{name}.txt:? (is a|no such file)"):
            demo.read_corpus(tmp_path / f"{name}.txt")


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "a,b\n1,2\n"),
        ("a.jsonl", "[" * 100_000),
        ("a.jsonl", '{"base_sentence": 5}\n'),
        ("a.jsonl", "{}\n"),
        ("a.csv", b"\xff"),
        ("a.tsv", "\0"),
        ("a.tsv", "sentid\tsentence\nx\ty\n"),
        ("a.csv", ""),
        ("a.jsonl", "5\n"),
        ("a.csv", "x" * 21_000_000),
    ],
)
def test_bad_sets_of_questions_are_one_sentence(tmp_path, name, text):
    with pytest.raises(ValueError) as error:
        demo.read_items(write(tmp_path / name, text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_typed_texts_are_limited():
    for text, message in (
        ("x" * 100_001, "text 1 has 100,001 characters"),
        (("x" * 99_999 + "\n") * 101, "more than 10,000,000 characters of text"),
        ("a\n" * 20_001, "more than 20,000 lines of text"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.split_lines(text, "text")
    assert len(demo.split_lines("x" * 100_000, "text")) == 1


def test_lines_and_half_characters():
    assert demo.split_lines(" a \r\nb\ud800c", "line") == ["a", "b\ufffdc"]
    with pytest.warns(UserWarning, match="empty: 1 of 3"):
        demo.split_lines("a\n\nb", "line")
    for text in (None, "", " \n\t"):
        with pytest.raises(ValueError, match="the corpus is empty"):
            demo.split_lines(text, "corpus")


# --- search and map ---


def test_a_corpus_of_one_line_and_too_large_a_k(words):
    with pytest.warns(UserWarning, match="the corpus has 1 texts"):
        assert list(demo.find([words], "dog", ["one"], 5)["words"]["text"]) == ["one"]
    with warnings.catch_warnings(action="error"):
        figure, table = demo.clusters(words, ["one"], 1, 3)
    assert table.values.tolist() == [["1", "1", "one"]] and len(figure.data) == 1
    with pytest.raises(ValueError, match="n_clusters is 3, but there are 2 texts"):
        demo.clusters(words, ["dog", "cat"], 3)
    with pytest.raises(ValueError, match="5 to 1,000 texts here, and there are 2"):
        demo.clusters(words, ["dog", "cat"], 1, 2, "t-SNE")


def test_copies_of_one_text_make_one_cluster(words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, table = demo.clusters(words, ["dog"] * 6, 3)
    assert list(table["texts"]) == ["6"]


def test_a_projection_is_the_same_each_time():
    rows = np.random.default_rng(0).standard_normal((50, 8)) * np.arange(1, 9)
    for method in ("PCA", "t-SNE"):
        points = charts.project(rows, 2, method)
        assert points.shape == (50, 2) and np.array_equal(points, charts.project(rows, 2, method))
    assert charts.project(rows[:, :1], 3).shape == (50, 3)


def test_map_is_json_samples_large_corpora_and_keeps_text_as_text():
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(12_000)]
    with pytest.warns(UserWarning, match="shows 5,000 of the 12,000"):
        figure = charts.map_chart(np.zeros((12_000, 2)), np.arange(12_000) % 3, texts, "<b>")
    assert sum(len(trace.text) for trace in figure.data) == 5_000
    assert not re.search(r"<(?!br>)", figure.to_json())


# --- bias ---


def test_own_items_differ_in_the_pronoun_only():
    items = demo.own_items()
    assert len(items) == 160 and {item.stereotype for item in items} == {"male", "female"}
    assert all(
        item.male.replace(" he ", " they ") == item.anchor == item.female.replace(" she ", " they ")
        for item in items
    )


def test_bias_tables_with_and_without_labels(words, tmp_path):
    labelled = bias.gender_bias(words.encode, demo.own_items())
    bare = bias.gender_bias(
        words.encode, [item._replace(stereotype="") for item in demo.own_items()]
    )
    table = demo.bias_table({"a": labelled, "b": bare})
    assert list(table) == ["", "a", "b"] and list(table["b"]).count("no labels") == 2
    assert "(50%: he and she equally near)" in table[""][0] and "a common shift" in table[""][2]
    assert len(charts.lean_chart({"a": labelled, "b": bare}).data[1].x) == 40
    write(
        tmp_path / "s.tsv",
        "sentid\tsentence\n"
        + "".join(
            f"nurse.patient.0.{g}.txt\tThe nurse said {p} came.\n"
            for g, p in (("male", "he"), ("female", "she"), ("neutral", "they"))
        ),
    )
    assert demo.read_items(tmp_path / "s.tsv")[0].occupation == "nurse"
    with pytest.raises(ValueError, match="cannot read this kind of file"):
        demo.read_items(write(tmp_path / "s.txt", "x"))


# --- runs ---


def test_a_finished_run(tmp_path):
    run = charts.watch_run(run_directory(tmp_path / "run"))
    lines = charts.curves([run, run | {"name": "<b>again"}]).data
    assert [trace.name for trace in lines[:2]] == ["run", "&lt;b&gt;again"]
    assert lines[2].x == (0, 20) and lines[2].y == (0.5, 0.7)  # Spearman, from before step 1
    assert charts.shares(run).data[0].y == ("train/a&lt;b&gt;", "b")  # drawn from the bottom
    rows = charts.before_after(run).values.tolist()
    assert rows == [["Spearman", "0.500 [0.400, 0.600]", "0.700 [0.600, 0.800]"]]


def test_a_run_that_is_still_going_is_read_from_its_events(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "versions.json").write_text("{}")
    (tmp_path / "metrics.json").write_text(
        json.dumps(
            {
                "before": {"spearman": 0.1, "spearman_low": 0.0, "spearman_high": 0.2},
                "test": {"before": {}},
            }
        )
    )
    with SummaryWriter(tmp_path / "tensorboard") as log:
        for step in (1, 2, 3):
            log.add_scalar("train/loss", 1 / step, step)
        log.add_scalar("eval/spearman", 0.5, 3)
    run = charts.watch_run(tmp_path)
    assert [h["step"] for h in run["history"]] == [1, 2, 3]
    assert charts.curves([run]).data[1].x == (0, 3)
    assert charts.shares(run) is None and charts.before_after(run)["after"][0] == "not yet"


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        charts.watch_run(tmp_path)
    (tmp_path / "versions.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing yet"):
        charts.curves([charts.watch_run(tmp_path)])


@pytest.mark.parametrize("name", ["history", "metrics", "mixture"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "5",
        "null",
        '"x"',
        "[1, null, []]",
        '{"before": 5, "after": [], "test": {"before": null}, "datasets": {"a": 1}}',
        "[" * 100_000,
        b"\xff",
        "\0" * 100,
        (
            '[{"step": "x", "loss": NaN}, {"step": 3, "loss": NaN, "eval_spearman": "y",'
            ' "learning_rate": 1e999}]'
        ),
        (
            '{"before": {"spearman": NaN, "ndcg@10": 0.5}, "datasets": [{"name": 5, "asked": 1,'
            ' "realised": 1}, {"name": "a", "asked": null}, 3]}'
        ),
    ],
)
def test_a_run_that_is_being_written_is_read_as_far_as_it_is(tmp_path, name, text):
    folder = run_directory(tmp_path / "run")
    write(folder / f"{name}.json", text)
    # half of a picture
    write(folder / "similarity.png", (ROOT / "docs/images/heatmap.png").read_bytes()[:-5])
    run = charts.watch_run(folder)
    shown = demo.run_html(run)
    assert run["picture"] == b"" and "<img" not in shown and "nan" not in shown.lower()
    for figure in (
        charts.curves([run]) if run["history"] or run["metrics"]["before"] else None,
        charts.shares(run),
    ):
        assert figure is None or "NaN" not in figure.to_json()
    if text in ("[", b"\xff", ""):
        assert f"{name}.json" in shown and str(tmp_path) not in shown


def test_events_that_cannot_be_read_are_a_remark(tmp_path):
    write(tmp_path / "versions.json", "{}")
    write(tmp_path / "tensorboard", "not a folder")
    assert charts.watch_run(tmp_path)["history"] == []
    (tmp_path / "tensorboard").unlink()
    (tmp_path / "tensorboard").mkdir()
    write(tmp_path / "tensorboard/events.out.tfevents.1.x", os.urandom(500))
    assert charts.watch_run(tmp_path)["history"] == []


def test_heat_puts_pairs_on_the_diagonal(words):
    figure = demo.heat(words, ["dog dog", "rain rain"], ["dog dog", "rain rain"])
    assert np.argmax(figure.data[0].z, axis=1).tolist() == [0, 1]
    assert "100% find" in figure.layout.title.text
    for left, right, message in (
        (["a"], ["b", "c"], "1 texts stand on the left and 2"),
        (["a"] * 41, ["b"] * 41, "41 pairs are too many"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.heat(words, left, right)


# --- which is better, and own texts ---


def measured_run(folder: Path, title=None, ndcg=(0.7, 0.6, 0.8), exam="retrieval", test=None):
    "A run directory with a recipe and what it measured."
    folder.mkdir(parents=True)
    names = "ndcg@10", "ndcg@10_low", "ndcg@10_high"
    before, after = dict(zip(names, (0.3, 0.2, 0.4))), dict(zip(names, ndcg))
    record = {"before": before, "after": after}
    if test:
        record["test"] = {"before": before, "after": dict(zip(names, test))}
    write(folder / "metrics.json", json.dumps(record))
    write(folder / "versions.json", "{}")
    if title is not None:
        name = '[model]\nname = "sentence-transformers/mini"'
        text = f'title = "{title}"\n{name}\n[evaluation]\nretrieval = "{exam}"\n'
        write(folder / "recipe.toml", text)
    return folder


def in_run(folder):
    (name,) = demo.titles([folder.name], [folder])
    return demo.Model(name, Words(), folder)


def test_runs_are_called_by_their_titles(tmp_path):
    runs = [
        measured_run(tmp_path / "a", "Parcels"),
        measured_run(tmp_path / "b", "Parcels"),
        measured_run(tmp_path / "c", "Letters"),
        measured_run(tmp_path / "d"),
        measured_run(tmp_path / "e", ""),
    ]
    write(runs[3] / "recipe.toml", "title = [")  # damaged
    with_changes = measured_run(tmp_path / "f", "Parcels")
    with (with_changes / "recipe.toml").open("a") as file:
        file.write('[run.changes]\ntitle = "Changed"\n')
    runs += [with_changes, None]
    assert demo.titles([*"abcdefg"], runs) == [
        *("Parcels (a)", "Parcels (b)", "Letters", "d", "e", "Changed", "g"),
    ]


def test_which_model_is_better_and_by_how_much(tmp_path):
    good = in_run(measured_run(tmp_path / "a", "Good", (0.9, 0.85, 0.95)))
    fair = in_run(measured_run(tmp_path / "b", "Fair"))
    near = in_run(measured_run(tmp_path / "c", "Near", (0.75, 0.65, 0.85)))
    assert demo.verdict([fair, good]) == (
        "Good is better than Fair: nDCG@10 0.900 [0.850, 0.950] against 0.700 [0.600, 0.800],"
        " +0.200, and the intervals do not overlap"
    )
    assert demo.verdict([near, fair]).endswith("+0.050, but the intervals overlap")
    assert demo.verdict([near, fair]).startswith("Near is ahead of Fair")
    assert demo.verdict([fair, near, good]).startswith("Good is ahead of Near")
    base = demo.Model("mini", Words(), place="sentence-transformers/mini")
    assert demo.verdict([base, fair]).startswith("Fair is better than mini: nDCG@10 0.700")
    base.place = "mini"
    assert "against 0.300 [0.200, 0.400], +0.400" in demo.verdict([base, fair])
    base.place = "other"
    assert demo.verdict([base, fair]) == demo.verdict([fair]) == demo.verdict([]) == ""


@pytest.mark.parametrize(
    "low, words",
    [(0.01, "Good is better than Fair: nDCG"), (-0.01, "Good is ahead of Fair, perhaps by luck")],
)
def test_a_paired_difference_is_preferred(tmp_path, monkeypatch, low, words):
    good = in_run(measured_run(tmp_path / "a", "Good", (0.9, 0.85, 0.95)))
    fair = in_run(measured_run(tmp_path / "b", "Fair"))
    paired = {"difference": 0.2, "difference_low": low, "difference_high": 0.3}

    def compare_runs(folders, metric, measure):
        assert (folders, metric, measure) == ([fair.run, good.run], "ndcg@10", False)
        return SimpleNamespace(differences={"ndcg@10": [None, paired]})

    monkeypatch.setattr(demo, "compare_runs", compare_runs)
    sentence = demo.verdict([fair, good])
    assert sentence.startswith(words)
    assert sentence.endswith(f"+0.200 [{low:+.3f}, +0.300], paired over the same questions")


def test_different_exams_are_not_compared(tmp_path):
    first = in_run(measured_run(tmp_path / "a", "One"))
    other = in_run(measured_run(tmp_path / "b", "Two", exam="another"))
    tested = in_run(measured_run(tmp_path / "c", "Three", test=(0.8, 0.7, 0.9)))
    bare = in_run(run_directory(tmp_path / "d"))
    for model in (other, tested, bare):
        assert "measured on different test sets" in demo.verdict([first, model])
    write(first.run / "metrics.json", "{}")
    assert demo.verdict([first, tested]) == ""


def test_own_texts(tmp_path):
    corpus = write(tmp_path / "faq.csv", 'id,text\n1,"one\ntwo"\n2,three\n')
    queries = write(tmp_path / "queries.txt", "who?\nwhere?\nwho?\n")
    assert demo.own_texts(None) is None
    own = demo.own_texts(corpus, queries)
    assert own == (["one two", "three"], ["who?", "where?"], "faq.csv")
    assert demo.own_texts(corpus).queries == []
    assert len(demo.own_texts(None, queries).corpus) == 160
    for path, message in (
        (tmp_path / "none.txt", "no such file"),
        (write(tmp_path / "empty.txt", ""), "there is no text"),
        (write(tmp_path / "many.txt", ("x" * 999 + "\n") * 7_000), "more than the page can send"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.own_texts(path)


# --- the wrapper and the launch ---


def test_complaints_become_sentences(tmp_path):
    path = str(write(tmp_path / "a.pdf", ""))
    shown, *figures = demo.reply(demo.read_corpus, [path], 2)
    assert (
        shown
        == '<p class="error">a.pdf: a corpus is a .txt, .jsonl, .csv or .tsv file; save it as one'
        " of these</p>"
    )
    assert figures == [None, None]

    def warned(text):
        warnings.warn("<b>", stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
        return ("shown",)

    assert demo.reply(warned, ["x"]) == ['<p class="note">&lt;b&gt;</p>shown']
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        demo.reply(lambda: 1 / 0, [])


def test_a_port_in_use_and_other_doors_that_do_not_open(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port in (
            ("127.0.0.1", taken.getsockname()[1]),
            ("127.0.0.1", 99_999),
            ("203.0.113.7", 0),
        ):
            with pytest.raises(ValueError, match=f"cannot be served at {host}:{port}") as error:
                doors.bind(host, port)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["gradio", "plotly"])
def test_without_the_extra_one_sentence(monkeypatch, words, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install .*\[demo\]"):
        demo.build([words])


# --- over HTTP ---

gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="Gradio is not installed: it comes with the extra demo",
)
COMMAND = [sys.executable, "-c", "from contrastive_st.cli import main; main()", "demo"]
PROCESSES = {}  # address -> process
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(folders):
    "The page of two models on a free port, in a process of its own; yields its address."
    process = subprocess.Popen(
        [*COMMAND, str(folders / "small"), str(folders / "run"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"GRADIO_TEMP_DIR": str(folders / "uploads")},
    )
    errors = []
    threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True).start()
    line = process.stdout.readline()
    assert "http://" in line, "".join(errors)
    address = re.search(r"http://\S+", line)[0]
    for _ in range(100):
        try:
            urllib.request.urlopen(address, timeout=30).read()
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    PROCESSES[address] = process.pid
    yield address
    process.terminate()
    process.wait(30)
    bugs = [line for line in errors if re.match(r"[\w.]*(Error|Exception)\b", line)]
    assert not bugs, "".join(errors)


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server, verbose=False, analytics_enabled=False)


@gradio
def test_the_server_answers_to_its_own_name_and_loads_nothing_from_elsewhere(server):
    with urllib.request.urlopen(server) as page:
        text, policy = page.read().decode(), page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="https?:', text)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(server, headers={"Host": "evil.example"}))
    config = json.loads(text.split("window.gradio_config = ")[1].split(";</script>")[0])
    assert config["analytics_enabled"] is False


@gradio
def test_the_command_line_refuses_in_one_sentence(server, tmp_path, folders):
    "Exit code 2, nothing on standard output, and one line that says what and what to do."
    port = server.rstrip("/").rpartition(":")[2]
    done = subprocess.run(
        [*COMMAND, folders / "small", "--port", port],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and not done.stdout
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert f"cannot be served at 127.0.0.1:{port}" in done.stderr


@gradio
@pytest.mark.parametrize(
    "names, options, message",
    [
        (["empty"], [], "empty has no config.json"),
        (["small", "remote"], [], "is never run"),
        (["nowhere"], [], "nowhere"),
        (["small", "small"], [], "given twice"),
        (["small"], ["--run", "empty"], "empty"),
    ],
)
def test_models_not_shown(folders, tmp_path, monkeypatch, capfd, names, options, message):
    (tmp_path / "empty").mkdir()
    stranger(
        shutil.copytree(
            folders / "small", tmp_path / "remote", ignore=shutil.ignore_patterns("manifest.json")
        )
    )
    shutil.copytree(folders / "small", tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets it, for good
    monkeypatch.setattr(sys, "argv", ["contrastive-st", "demo", *names, *options, "--port", "0"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capfd.readouterr()
    assert (
        stopped.value.code == 2
        and not printed.out
        and printed.err.startswith("error: ")
        and printed.err.count("\n") == 1
    ), printed.err
    assert message in printed.err and not (tmp_path / "ran").exists()


@gradio
def test_pages_over_http(client, tmp_path):
    from gradio_client import handle_file

    assert {"/similarity", "/answers", "/search", "/cluster", "/bias", "/runs", "/heat"} == set(
        client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    )
    assert client.predict("a dog", "a cat\nthe child", api_name="/similarity").count("<tr>") == 3
    assert "the anchor is empty" in client.predict("", "a cat", api_name="/similarity")
    assert "were longer than max_length" in client.predict(
        "a dog", "dog " * 25_000, api_name="/similarity"
    )
    for text in HOSTILE:
        assert "hacked" not in re.sub(
            r"<td.*?</td>", "", client.predict("a dog", text, api_name="/similarity")
        )
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "headline"], ["1", "the dog"], ["2", "the cat"]])
    assert "the cat" in client.predict(
        "ignored", handle_file(tmp_path / "c.csv"), "headline", "dog", 5, api_name="/search"
    )
    assert "c.csv:2: which column" in client.predict(
        "ignored", handle_file(tmp_path / "c.csv"), "", "dog", 5, api_name="/search"
    )
    many = write(tmp_path / "many.txt", "line\n" * 200_000)
    assert "more than 20,000 lines" in client.predict(
        "", handle_file(many), "", "dog", 5, api_name="/search"
    )
    shown, *plots = client.predict(
        "one\ntwo\nthree", None, "", 2, "3-D", "PCA", api_name="/cluster"
    )
    assert shown.count("</table>") == 2 and len(plots) == 2
    assert (
        "n_clusters is 9"
        in client.predict("one\ntwo", None, "", 9, "2-D", "PCA", api_name="/cluster")[0]
    )


def call(server, name, *data):
    "Ask the server as a stranger would, without the client's help; returns what it streams back."
    asked = urllib.request.Request(
        f"{server}gradio_api/call/{name}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.loads(urllib.request.urlopen(asked, timeout=120).read())["event_id"]
    return (
        urllib.request.urlopen(f"{server}gradio_api/call/{name}/{event}", timeout=120)
        .read()
        .decode()
    )


@gradio
def test_a_file_of_the_server_is_not_read(server, tmp_path):
    # neither below the working folder nor a temporary file
    secret = write(Path.home() / f".contrastive_st_test_{os.getpid()}.txt", "the secret dog\n")
    try:
        for path in (str(secret), secret.as_uri(), f"{server}config"):
            with pytest.raises(urllib.error.HTTPError, match="422") as refused:
                call(
                    server,
                    "search",
                    "",
                    {"path": path, "orig_name": "a.txt", "meta": {"_type": "gradio.FileData"}},
                    "",
                    "dog",
                    5,
                )
            assert "was not uploaded here" in refused.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server}gradio_api/file={secret}")
    finally:
        secret.unlink()
    assert "a dog" in call(server, "search", "a dog", None, "", "dog", 5)


@gradio
def test_a_large_request_is_refused_before_it_is_read(server):
    def peak():
        "The server's highest memory so far, in MiB."
        status = Path(f"/proc/{PROCESSES[server]}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    before, body = peak(), json.dumps({"data": ["a dog", "dog " * 6_250_000]}).encode()
    for path in ("queue/join", "call/similarity", "upload"):
        form = "multipart/form-data; boundary=x"
        kind = {"Content-Type": form if path == "upload" else "application/json"}
        status, answer = ask(server, "POST", f"/gradio_api/{path}", body, kind)
        assert status == 413 and "more than the" in answer
    # says no length
    body = iter([b"x" * 1000] * 100)
    result = ask(server, "POST", "/gradio_api/call/similarity", body, JSON)
    assert result[0] == 411
    lines = "\n".join("dog " * 24_000 for _ in range(80))  # 7.7 MB, in texts that are allowed
    assert "</table>" in call(server, "similarity", "a dog", lines)
    assert peak() - before < 500


@gradio
def test_a_file_of_one_long_line_is_refused_quickly(client, tmp_path):
    from gradio_client import handle_file

    start = time.time()
    assert "5,000,000 characters" in client.predict(
        "",
        handle_file(write(tmp_path / "line.txt", "x" * 5_000_000)),
        "",
        "dog",
        5,
        api_name="/search",
    )
    assert time.time() - start < 10


@gradio
def test_the_page_begins_with_own_texts(words, tmp_path):
    own = demo.Own(["a dog <b>", "a cat"], ["which *animal*?", "who?", *"abcdef"], "faq.csv")
    config = demo.build([words], own=own).config["components"]
    values = [c["props"].get("value") for c in config]
    assert "a dog <b>\na cat" in values and "which *animal*?" in values
    for label in ("which *animal*?", "who?", "c", "faq.csv in 3-D"):
        assert values.count(label) >= 1
    assert "d" not in values and "In the harbour's handbook" not in values
    alone = demo.build([words], own=demo.Own(["a dog"], [], "faq.csv")).config["components"]
    assert "Somebody prepares a meal" not in [c["props"].get("value") for c in alone]


@gradio
def test_the_page_says_which_is_better(tmp_path):
    models = [
        in_run(measured_run(tmp_path / "a", "Good *one*", (0.9, 0.85, 0.95))),
        in_run(measured_run(tmp_path / "b", "Fair")),
    ]
    head = demo.build(models).config["components"][0]["props"]["value"]
    assert "is better than Fair" in head and "*one*" not in head


# --- strangers ---


class Slow(Words):
    "An encoder that takes a second for 640 texts, and says so."

    def encode(self, texts, prompt=None, progress=False):
        time.sleep(0.1)
        warnings.warn(f"{len(texts)} of {len(texts)} texts were slow", stacklevel=2)
        return super().encode(texts, prompt, progress)


@pytest.fixture(scope="module")
def stranger_server(tmp_path_factory):
    "A page with a slow model, served by a thread of this process; yields its address."
    uvicorn = pytest.importorskip("uvicorn")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    blocks = demo.build(
        [demo.Model("slow", Slow())], [run_directory(tmp_path_factory.mktemp("runs") / "run")]
    )
    door = doors.bind("127.0.0.1", 0)
    running = uvicorn.Server(
        uvicorn.Config(demo.application(blocks), log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=running.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{door.getsockname()[1]}/"
    running.should_exit = True
    thread.join(10)
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture
def trap():
    "A web server that nobody should ask for anything."

    class Trap(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.server.seen.append(self.path)
            self.send_error(404)

        do_POST = do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    server.seen, server.address = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(address, method, path, body=None, headers={}):
    "Status and body of one request, with exactly these headers."
    line = http.client.HTTPConnection(re.search(r"//([^/]+)", address)[1], timeout=120)
    with contextlib.closing(line):
        line.request(
            method,
            path,
            body,
            dict(headers),
            encode_chunked=body is not None and not isinstance(body, bytes),
        )
        answer = line.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")


JSON = {"Content-Type": "application/json"}
GOOD = json.dumps({"data": ["dog", "cat\nrain"]}).encode()


@gradio
@pytest.mark.parametrize(
    "path",
    [
        "docs",
        "redoc",
        "openapi.json",
        "docs/oauth2-redirect",
        "gradio_api/openapi.json",
        "gradio_api/dev/reload",
        "login",
        "logout",
        "login_check",
        "monitoring",
        "monitoring/summary",
        "manifest.json",
        "robots.txt",
        "pwa_icon",
        "gradio_api/mcp/",
        "gradio_api/mcp/sse",
        "gradio_api/vibe-code",
        "gradio_api/vibe-edit",
        "gradio_api/user",
        "gradio_api/token",
        "gradio_api/app_id",
        "gradio_api/runs",
        "gradio_api/deep_link",
        "gradio_api/theme.css",
        "gradio_api/startup-events",
        "gradio_api/queue/status",
        "gradio_api/file=/etc/passwd",
        "gradio_api/file//etc/passwd",
        "gradio_api/run/predict",
        "gradio_api/api/similarity",
        "gradio_api/cancel",
        "gradio_api/reset",
        "gradio_api/component_server",
        "gradio_api/custom_component/a/client/b/c",
        "gradio_api/stream/a/b/1/playlist.m3u8",
        "gradio_api/process_recording",
        "gradio_api/profiling/traces",
        "assets/../config",
        "assets/%2e%2e/%2e%2e/routes.py",
        "static/..%2f..%2froutes.py",
        "svelte/x",
        "gradio_api/call/v2/similarity",
        "config/",
        "//docs",
        "nothing",
    ],
)
def test_what_the_page_does_not_need_is_not_there(stranger_server, trap, path):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        assert (
            ask(stranger_server, method, f"/{path}", GOOD if method == "POST" else None, JSON)[0]
            == 404
        )
    assert (
        ask(stranger_server, "GET", f"/gradio_api/proxy={trap.address}/x")[0]
        == ask(stranger_server, "GET", f"/gradio_api/file={trap.address}/x")[0]
        == 404
    )
    assert trap.seen == []


@gradio
@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": "OURS"}, 200),
        ({"Origin": "OURS", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "OURS", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 400),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ],
)
def test_other_web_sites_are_refused(stranger_server, headers, status):
    headers = {
        name: value.replace("OURS", stranger_server.rstrip("/")) for name, value in headers.items()
    }
    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\na'
        b" dog\r\n--x--\r\n"
    )
    assert (
        ask(stranger_server, "POST", "/gradio_api/call/similarity", GOOD, JSON | headers)[0]
        == status
    )
    upload = {"Content-Type": "multipart/form-data; boundary=x"} | headers
    result = ask(stranger_server, "POST", "/gradio_api/upload", form, upload)
    assert result[0] == status
    if status != 200:
        for path in (
            "gradio_api/queue/join",
            "gradio_api/run/predict",
            "gradio_api/cancel",
            "nothing",
        ):
            assert ask(stranger_server, "POST", f"/{path}", GOOD, JSON | headers)[0] == status
        for path in (
            "gradio_api/queue/data?session_hash=a",
            "gradio_api/heartbeat/a",
            "gradio_api/upload_progress?upload_id=a",
            "gradio_api/call/similarity/a",
            "config",
        ):
            assert ask(stranger_server, "GET", f"/{path}", None, headers)[0] == status
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        result = ask(stranger_server, "GET", "/gradio_api/queue/join", None, headers | upgrade)
        assert result[0] in (400, 403)


@gradio
def test_a_link_to_the_page_may_be_followed_and_every_answer_has_the_headers(stranger_server):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(stranger_server, "GET", "/", None, link)[0] == 200
    assert ask(stranger_server, "GET", "/", None, link | {"Sec-Fetch-Mode": "no-cors"})[0] == 403
    for path in ("", "docs", "theme.css"):
        try:
            answer = urllib.request.urlopen(stranger_server + path)
        except urllib.error.HTTPError as error:
            answer = error
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def hostile_values(trap, secret):
    "Values that no field should be asked to hold."
    addresses = [
        f"{trap}/a.txt",
        "file:///etc/hostname",
        "data:text/plain,dog",
        str(secret),
        f"//{trap[7:]}/b",
        f"{trap}\0.txt",
        "\\\\host\\share",
        "../" * 30 + "etc/hostname",
    ]
    files = [{"path": a, "meta": {"_type": "gradio.FileData"}} for a in addresses] + [
        {"path": "x", "url": a, "meta": {"_type": "gradio.FileData"}} for a in addresses
    ]
    files += [
        {"url": addresses[0], "meta": {"_type": "gradio.FileData"}},
        {"path": addresses[0], "is_stream": True, "meta": {"_type": "gradio.FileData"}},
        {"path": {"path": addresses[0]}},
    ]
    nested = (
        [[f] for f in files[:4]] + [{"value": f} for f in files[:4]] + [{"a": [{"b": files[0]}]}]
    )
    values = [
        *(None, True, -1, 10**30, 1.5, float("nan"), float("inf"), [], {}, [[]]),
        *("", "\ud800", "\0", "\x1b[31m", "x" * 200_000, [1] * 1000),
        {"__type__": "update", "value": "x"},
    ]
    return files + nested + addresses + values


@gradio
def test_a_hostile_client_gets_sentences_and_nothing_is_fetched(stranger_server, trap, tmp_path):
    secret = write(Path.home() / f".contrastive_st_test_{os.getpid()}.txt", "the secret dog\n")
    calls = {
        "similarity": ["dog", "cat"],
        "answers": ["dog", "cat", "cosine"],
        "search": ["dog", None, "", "dog", 5],
        "cluster": ["dog\ncat", None, "", 2, "2-D", "PCA"],
        "bias": [None],
        "runs": [["run"]],
        "heat": ["dog", "cat"],
    }
    chance, counts = random.Random(0), {}
    try:
        values = hostile_values(trap.address, secret)
        bodies = [
            (name, {"data": [*data[:i], value, *data[i + 1 :]]})
            for name, data in calls.items()
            for i in range(len(data))
            for value in values
        ]
        bodies = chance.sample(bodies, 250)
        # the file field: all of them
        bodies += [("search", {"data": ["", value, "", "dog", 5]}) for value in values]
        strange = [
            {},
            [],
            5,
            None,
            {"data": {}},
            {"data": "x"},
            {"data": [1] * 50},
            {"data": [], "fn_index": 10**9},
            {"data": ["dog", "cat"], "session_hash": {"a": 1}},
            {"data": ["dog", "cat"], "session_hash": "../x"},
        ]
        bodies += [("similarity", body) for body in strange] + [("nothing", {"data": []})]
        raw = [
            b"",
            b"{",
            b"[" * 100_000,
            b'{"data": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
            b"\xff\xfe",
            b'{"data": [1e99999, "x"]}',
            b'{"data": ["\\ud800", "x"]}',
            b'{"data": ["a", ' + b"9" * 10_000 + b"]}",
        ]
        for name, body in bodies + [("similarity", r) for r in raw]:
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            status, answer = ask(stranger_server, "POST", f"/gradio_api/call/{name}", sent, JSON)
            if status == 200:
                status, answer = ask(
                    stranger_server,
                    "GET",
                    f"/gradio_api/call/{name}/{json.loads(answer)['event_id']}",
                )
                assert "event: complete" in answer, (name, str(body)[:300], answer[:300])
            assert (
                status in (200, 422)
                and "Traceback" not in answer
                and "secret dog" not in answer
                and len(answer) < 200_000
            ), (name, str(body)[:300], status, answer[:300])
            counts[status] = counts.get(status, 0) + 1
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        part = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\na'
            b" dog\r\n--x--\r\n"
        )
        for body in (
            b"",
            b"--x",
            b"--x--",
            part % b"../../../../tmp/evil.txt",
            part % (b"n" * 5_000),
            part % b"\xff",
            part % b"a\0b",
            part % b"",
            part.replace(b"files", b"other") % b"a",
            b"\0" * 1000,
        ):
            status, answer = ask(stranger_server, "POST", "/gradio_api/upload", body, form)
            assert (
                status < 500 or answer == "Internal Server Error"
            ) and "Traceback" not in answer, (body[:80], status, answer[:300])
    finally:
        secret.unlink()
    assert trap.seen == [] and sum(counts.values()) > 150 and min(counts.values()) > 30, (
        trap.seen,
        counts,
    )
    assert "cat" in call(stranger_server, "similarity", "dog", "cat")
    assert not Path("/tmp/evil.txt").exists()


@gradio
def test_a_slow_request_blocks_nobody_and_its_warnings_are_its_own(stranger_server):
    lines = "\n".join(f"dog {i}" for i in range(4_000))
    body = json.dumps({"data": [lines, None, "", "dog", 3]}).encode()
    _, answer = ask(stranger_server, "POST", "/gradio_api/call/search", body, JSON)
    event = json.loads(answer)["event_id"]
    time.sleep(0.5)
    start = time.time()
    assert ask(stranger_server, "GET", "/")[0] == 200
    quick = call(stranger_server, "similarity", "dog", "cat")
    assert time.time() - start < 4 and len(doors.working) == 1  # of about 7 s
    assert "2 of 2" not in quick and "1 of 1 texts were slow" in quick
    assert (
        "4000 of 4000 texts were slow"
        in ask(stranger_server, "GET", f"/gradio_api/call/search/{event}")[1]
    )


@gradio
def test_work_for_a_page_that_was_closed_is_stopped(stranger_server):
    config = json.loads(ask(stranger_server, "GET", "/config")[1])
    search = [f["api_name"] for f in config["dependencies"]].index("search")
    body = {
        "data": ["\n".join(f"cat {i}" for i in range(20_000)), None, "", "dog", 3],
        "fn_index": search,
        "session_hash": "visitor",
    }
    assert (
        ask(stranger_server, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), JSON)[0]
        == 200
    )
    line = http.client.HTTPConnection(re.search(r"//([^/]+)", stranger_server)[1], timeout=120)
    line.request("GET", "/gradio_api/queue/data?session_hash=visitor")
    line.getresponse().read(10)
    for _ in range(100):
        if doors.working:
            break
        time.sleep(0.05)
    assert [work.session for work in doors.working] == ["visitor"]
    line.sock.shutdown(socket.SHUT_RDWR)
    line.close()
    for _ in range(200):
        if not doors.working:
            break
        time.sleep(0.05)
    assert not doors.working  # of about 31 s


def test_a_request_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(doors, "SECONDS", 0.3)
    work, slow = doors.Work(None), demo.Model("slow", Slow())
    token = doors.this_work.set(work)
    try:
        (shown,) = demo.reply(lambda: (slow.encode(["dog"] * 1_000),), [])
    finally:
        doors.this_work.reset(token)
    assert "took longer than 0.3 seconds and was stopped" in shown


@gradio
@pytest.mark.parametrize("working", [False, True], ids=["idle", "working"])
def test_ctrl_c_ends_the_server_at_once(folders, working):
    process = subprocess.Popen(
        [*COMMAND, str(folders / "small"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        if working:
            texts = "\n".join(
                f"the dog number {i} is eating rice on the road and the street"
                for i in range(20_000)
            )
            body = json.dumps({"data": [texts, None, "", "dog", 5]}).encode()
            result = ask(address, "POST", "/gradio_api/call/search", body, JSON)
            assert result[0] == 200
            time.sleep(1)
        start = time.time()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=120)[1]
        # less than 2 s on a machine that is not busy
        assert time.time() - start < 4 and "Traceback" not in errors, (time.time() - start, errors)
    finally:
        process.kill()


def test_warnings_stay_in_their_threads():
    results, begin = {}, threading.Barrier(4)

    def listen(name):
        with doors.listen() as heard:
            begin.wait()
            for i in range(50):
                warnings.warn(f"{name} {i}", stacklevel=1)
                time.sleep(0.0005)
        results[name] = list(heard)

    before = warnings.showwarning, list(warnings.filters)
    threads = [threading.Thread(target=listen, args=(name,)) for name in "abcd"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {name: [f"{name} {i}" for i in range(50)] for name in "abcd"}
    assert (warnings.showwarning, list(warnings.filters)) == before


@gradio
def test_20_000_texts_do_not_hang(client, tmp_path):
    from gradio_client import handle_file

    path = write(tmp_path / "corpus.txt", "".join(f"the dog number {i}\n" for i in range(20_000)))
    start = time.time()
    shown = client.predict("", handle_file(path), "", "the dog number 7", 3, api_name="/search")
    assert shown.count("the dog number") == 6 and time.time() - start < 240


# --- in a browser ---


@pytest.fixture
def page(request, browser, server):
    "The page at a width, which complains of script errors and of anything that is asked elsewhere."
    width = getattr(request, "param", 1280)
    tab, wrong = browser.new_page(viewport={"width": width, "height": 844}), []
    tab.set_default_timeout(30_000)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    tab.on(
        "request",
        lambda asked: (
            wrong.append(asked.url)
            if not asked.url.startswith((server, "data:", "blob:"))
            else None
        ),
    )
    tab.goto(server)
    tab.get_by_role("tab", name="Similarity").wait_for()
    yield tab
    assert not wrong, wrong
    assert tab.evaluate("window.hacked") is None
    tab.close()


def press(page, name: str, *, plots=0):
    "Press a page's button, wait for its result, return the result's text."
    page.locator(f"#{name}-go").click()
    return result(page, name, plots=plots)


def result(page, name: str, *, plots=0):
    for i in range(plots):
        page.locator(f"#{name}-plot{i} .js-plotly-plot .main-svg").first.wait_for()
    where = page.locator(f"#{name}-result")
    if name != "heat":
        where.locator("table, p").first.wait_for()
    return where.inner_text()


PAGES = [
    ("Similarity", [("similarity", 0)]),
    ("Answers", [("answers", 0)]),
    ("Search", [("search", 0), ("cluster", 2)]),
    ("Bias", [("bias", 1)]),
    ("Training", [("runs", 2), ("heat", 2)]),
]


@gradio
@pytest.mark.parametrize("page", [1280, 390], indirect=True, ids=["desktop", "phone"])
def test_every_page(page):
    for title, actions in PAGES:
        page.get_by_role("tab", name=title).click()
        for name, plots in actions:
            shown = press(page, name, plots=plots)
            assert name == "heat" or "small" in shown or name == "runs" and "Spearman" in shown, (
                name,
                shown,
            )
        assert (
            page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        ), f"{title} is wider than the screen"
        assert page.evaluate(
            "[...document.querySelectorAll('.result')].every(box => box.scrollWidth <="
            " box.clientWidth)"
        ), f"a table of {title} has to be scrolled"
    assert page.locator("#runs-result img").evaluate("image => image.naturalWidth") > 100


@gradio
def test_examples_are_one_click(page):
    for tab, name, title, message in (
        ("Similarity", "similarity", "Languages", "glücklich|herrlich"),
        ("Similarity", "similarity", "Negation", "granted the loan"),
        ("Answers", "answers", "Same words, no answer", "Seven minutes"),
        ("Search", "search", "In the harbour's handbook", "cosine"),
        ("Search", "cluster", "The harbour's handbook in 3-D", "nearest"),
        ("Bias", "bias", "The set that comes with the page", "40 occupations"),
    ):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=title).click()
        page.locator(f"#{name}-result").get_by_text(re.compile(message)).first.wait_for()
    page.get_by_role("tab", name="Search").click()
    page.locator("#cluster-plot1 canvas").first.wait_for()  # the 3-D map is drawn


@gradio
def test_hostile_text_and_enter(page):
    page.get_by_label("Texts, one a line").fill(
        "\n".join(text for text in HOSTILE if text != "\x00")
    )
    page.get_by_label("Anchor").fill(HOSTILE[1])
    page.get_by_label("Anchor").press("Enter")
    shown = result(page, "similarity")
    assert all(text in shown for text in HOSTILE[:5])
    assert page.locator("#similarity-result img").count() == 0
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Corpus", exact=True).fill("\n".join(HOSTILE[:5]))
    press(page, "cluster", plots=2)
    plot = page.locator("#cluster-plot0 .nsewdrag").first.bounding_box()
    for share in np.linspace(0.02, 0.98, 25):  # over the points, so that their texts are shown
        page.mouse.move(plot["x"] + share * plot["width"], plot["y"] + plot["height"] * 0.5)
    page.get_by_role("tab", name="Training").click()
    for label in ("Questions, one a line", "Their answers, in the same order"):
        page.get_by_label(label).fill("\n".join(HOSTILE[:5]))
    press(page, "heat", plots=2)
    plot = page.locator("#heat-plot0 .nsewdrag").first.bounding_box()
    for at in (0.1, 0.5, 0.9):
        page.mouse.move(plot["x"] + at * plot["width"], plot["y"] + at * plot["height"])
        page.wait_for_timeout(150)
    assert page.locator("#heat-plot0 .hoverlayer a").count() == 0


@gradio
def test_uploads_and_what_is_wrong_with_them(page, tmp_path):
    page.get_by_role("tab", name="Search").click()
    chosen = page.locator("input[type=file]").first
    wrong = [
        ("notes.pdf", "%PDF", "save it as one of these"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("many.txt", "line\n" * 200_000, "more than 20,000 lines of text"),
        ("<img src=x onerror=hacked>.csv", "a,b\n1,2\n", "which column"),
    ]
    for name, text, message in [
        *wrong,
        ("one.txt", "the only dog\n", "fewer than the 5 asked for"),
        ("good.jsonl", '{"text": "a dog"}\n{"text": "a cat"}\n', "a cat"),
    ]:
        chosen.set_input_files(write(tmp_path / name, text))
        page.locator(
            "button[aria-label='Remove this file'], [aria-label='Clear'], .file-preview"
        ).first.wait_for()
        press(page, "search")
        page.locator("#search-result").get_by_text(message).first.wait_for()
        page.get_by_label("Clear", exact=True).first.click()
        chosen = page.locator("input[type=file]").first
        chosen.wait_for(state="attached")


@gradio
def test_empty_and_very_long(page):
    page.get_by_label("Texts, one a line").fill("")
    assert "the text is empty" in press(page, "similarity")
    page.get_by_label("Texts, one a line").fill("dog " * 25_000)
    page.locator("#similarity-go").click()
    page.locator("#similarity-result").get_by_text("were longer than max_length").first.wait_for()
    page.locator("#similarity-result").get_by_text("characters)").first.wait_for()
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Corpus", exact=True).fill("one\ntwo")
    assert "there are 2 texts; ask for at most 2" in press(page, "cluster")


# --- the pictures in the docs ---


@gradio
def test_the_pictures_show_the_page_as_it_is(words, tmp_path):
    "Every tab, sentence, label and button that the page had when the pictures were taken."
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "tools/screenshots.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.words(demo.build([words], [run_directory(tmp_path / "run")]).config)
    record = json.loads((tool.FOLDER / "words.json").read_text(encoding="utf-8"))
    assert page == record, "the page has changed; run: python tools/screenshots.py"
    assert {steps[0] for steps in tool.PAGES.values()} == set(page)
    assert all(steps[1] in page[steps[0]] for steps in tool.PAGES.values())
    names = {path.stem for path in tool.FOLDER.glob("*.png")}
    assert names == {*tool.PAGES, "phone"}
