"""Own files become data, a test set and a recipe: no text on both sides, nothing lost."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from contrastive_st import atomic, recipes
from contrastive_st.cli import app
from contrastive_st.data import read_retrieval, read_sts
from contrastive_st.evaluation import read_labelled
from contrastive_st.files import read_rows
from contrastive_st.mixture import read_config
from contrastive_st.new import connect, find_layout, hold_out, new_recipe, parse_holdout
from contrastive_st.store import text_identity

# ten wishes of three wordings and two answers each: six rows hang together
FAQ = [
    (f"wording {w} of {n}?", f"answer {a} to {n}") for n in range(10) for w in "abc" for a in "xy"
]
TICKETS = [(f"message {n}", f"intent {n % 5}") for n in range(60)]
GRADED = [(f"left {n}", f"right {n}", n % 6) for n in range(40)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, header, rows, delimiter=","):
    with open(name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return name


def faq(rows=FAQ, name="faq.csv", **options):
    return write(name, ("question", "answer"), rows, **options)


def rows_of(path):
    return [row for _, row in read_rows(path)]


def fails(words, name, **options):
    "The sentence in which a file ends; nothing was written."
    with pytest.raises(ValueError, match=words) as error:
        new_recipe("new.toml", name, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert not any(path.name.startswith(("new", ".new")) for path in recipes.Path(".").iterdir())
    return message


# --- what is written ---


def test_pairs_become_data_exam_and_recipe(desk):
    made = new_recipe("mine.toml", faq(), holdout="20%")
    assert made.rows == {"train": 48, "heldout": 12} and made.layout.texts == ("question", "answer")
    train = rows_of("mine/train.jsonl")
    exam = read_retrieval("mine/heldout")
    held = {(exam.queries[q], exam.corpus[d]) for q, docs in exam.qrels.items() for d in docs}
    assert held | {tuple(row.values()) for row in train} == set(FAQ)
    assert not {t for row in train for t in row.values()} & {t for pair in held for t in pair}
    recipe = recipes.load("mine.toml")
    assert recipe.evaluation.retrieval == "heldout"
    [entry] = read_config(recipe.data.mix, recipe.folder())
    assert entry.lines == 48 and entry.columns == ("question", "answer")


def test_every_key_of_the_recipe_has_a_comment(desk):
    new_recipe("mine.toml", faq())
    for line in (desk / "mine.toml").read_text().splitlines():
        assert not line or line.startswith(("#", "title", "name", "[")) or " # " in line, line


def test_labels_are_held_out_class_by_class(desk):
    name = write("tickets.csv", ("text", "intent"), TICKETS)
    made = new_recipe("mine.toml", name, label="intent", holdout="20%")
    held = read_labelled("mine/heldout.jsonl")
    assert made.rows == {"train": 50, "heldout": 10} and set(Counter(held.labels).values()) == {2}
    voters = read_labelled("mine/neighbors.jsonl")
    assert not set(voters.texts) & set(held.texts) and set(voters.labels) == set(held.labels)
    recipe = recipes.load("mine.toml")
    assert recipe.evaluation.labels == "heldout.jsonl" and recipe.data.mix[0]["label"] == "intent"
    mixture = recipe.mixture()
    assert mixture.batch(0).labels.shape == (recipe.data.batch_size,)


def test_rare_labels_stay_in_training(desk):
    rows = TICKETS + [("alone", "rare"), ("two a", "pair"), ("two b", "pair")]
    name = write("tickets.csv", ("text", "intent"), rows)
    new_recipe("mine.toml", name, label="intent", holdout="50%")
    counts = Counter(row["intent"] for row in rows_of("mine/train.jsonl"))
    assert counts["pair"] == 2 and counts["rare"] == 1 and min(counts.values()) >= 1
    assert recipes.load("mine.toml").data.mix[0]["lines"] == sum(counts.values()) - 1


def test_scores_are_measured_from_0_to_5(desk):
    name = write("pairs.csv", ("left", "right", "rating"), [(a, b, 2 * s) for a, b, s in GRADED])
    new_recipe("mine.toml", name, ("left", "right", "rating"), scores=True)
    sts = read_sts("mine/heldout.jsonl")
    given = {(a, b): s / 5 for a, b, s in GRADED}
    for first, second, score in zip(*sts):
        assert given[first, second] == pytest.approx(score)
    [entry] = recipes.load("mine.toml").data.mix
    assert entry["score"] == "rating" and entry["score_range"] == [0, 10]
    assert set(recipes.load("mine.toml").mixture().batch(0).scores) <= {
        s for s in np.float32([0, 0.2, 0.4, 0.6, 0.8, 1])
    }


def test_many_held_out_rows_are_two_sets(desk):
    rows = [(f"q {n}", f"a {n}") for n in range(1000)]
    made = new_recipe("mine.toml", faq(rows), holdout="200")
    assert made.rows == {"train": 800, "dev": 100, "test": 100}
    dev, test = read_retrieval("mine/dev"), read_retrieval("mine/test")
    assert not {*dev.corpus.values()} & {*test.corpus.values()}
    recipe = recipes.load("mine.toml")
    assert (recipe.evaluation.retrieval, recipe.test.retrieval) == ("dev", "test")


def test_a_negative_that_is_held_out_is_left_out_and_counted(desk):
    rows = [(f"q {n}", f"a {n}", f"a {(n + 1) % 100}") for n in range(100)]
    name = write("hard.csv", ("anchor", "positive", "negative"), rows)
    made = new_recipe("mine.toml", name)
    train = rows_of("mine/train.jsonl")
    exam = read_retrieval("mine/heldout")
    assert not {text for row in train for text in row.values()} & set(exam.corpus.values())
    left_out = 100 - made.rows["heldout"] - len(train)
    assert left_out > 0 and any(
        f"{left_out} training rows were left out" in r for r in made.remarks
    )


def test_equal_texts_of_a_test_set_are_one(desk):
    rows = [(f"q {n}", f"a {n}") for n in range(100)] * 2
    new_recipe("mine.toml", faq(rows), holdout="50%")
    lines = {
        name: (desk / "mine/heldout" / name).read_text().splitlines()
        for name in ("queries.jsonl", "corpus.jsonl", "qrels/test.tsv")
    }
    assert [len(each) for each in lines.values()] == [50, 50, 51]
    test = read_retrieval("mine/heldout")
    assert test.qrels == {f"q{n}": {f"d{n}": 1} for n in range(50)}
    assert all(test.queries[f"q{n}"][2:] == test.corpus[f"d{n}"][2:] for n in range(50))


def test_bad_rows_are_left_out_counted_and_listed(desk):
    rows = [*FAQ[:30], ("", "no question"), *FAQ[30:], ("no answer", " "), ("last", "")]
    made = new_recipe("mine.toml", faq(rows))
    assert "60 rows kept, 3 bad rows skipped" in "\n".join(made.remarks)
    listed = [(r["line"], r["kind"]) for r in rows_of("mine/rejects.jsonl")]
    assert listed == [(32, "empty"), (63, "empty"), (64, "empty")]


# --- what is read ---


def _jsonl(path, rows):
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_formats_give_the_same_split(desk):
    dicts = [dict(zip(("question", "answer"), row)) for row in FAQ]
    faq(name="a.csv")
    faq(name="b.csv", delimiter=";")
    (desk / "c.tsv").write_text("\n".join("\t".join(row) for row in [("question", "answer"), *FAQ]))
    _jsonl("d.jsonl", dicts)
    _jsonl("e.jsonl.gz", dicts)
    (desk / "f.json").write_text(json.dumps(dicts, indent=1))
    pq.write_table(pa.Table.from_pylist(dicts), "g.parquet")
    held = set()
    for name in "abcdefg":
        [path] = desk.glob(f"{name}.*")
        new_recipe(f"recipe_{name}.toml", path)
        held.add(frozenset(read_retrieval(f"recipe_{name}/heldout").queries.values()))
    assert len(held) == 1


def test_lists_of_texts_have_the_columns_of_training(desk):
    _jsonl("pairs.jsonl", FAQ)
    assert new_recipe("mine.toml", "pairs.jsonl").layout.texts == ("anchor", "positive")
    _jsonl("groups.jsonl", [{"query": f"q {n}", "pos": [f"a {n}", f"b {n}"]} for n in range(40)])
    assert new_recipe("groups.toml", "groups.jsonl").rows == {"train": 72, "heldout": 8}


@pytest.fixture
def hub(monkeypatch):
    "A stand-in for the hub: {what load_dataset is asked for: the dataset}; else no network."
    sets = {}

    def load(*asked):
        if asked not in sets:
            raise ConnectionError("Couldn't reach\nthe Hub")
        return sets[asked]

    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: load(*names, split))
    return sets


def dicts(rows=FAQ, names=("question", "answer")):
    return [dict(zip(names, row)) for row in rows]


def test_a_hub_dataset_is_read_as_training_reads_it(desk, hub):
    held = {}
    for place, asked in {
        "owner/faq": ("owner/faq", "train"),
        "owner/faq/shop": ("owner/faq", "shop", "train"),
        "snli": ("stanfordnlp/snli", "train"),
    }.items():
        hub[asked] = datasets.Dataset.from_list(dicts())
        name = place.replace("/", "-")
        made = new_recipe(f"{name}.toml", place, holdout="20%")
        assert made.rows == {"train": 48, "heldout": 12}
        held[place] = set(read_retrieval(f"{name}/heldout").queries.values())
    new_recipe("file.toml", faq(), holdout="20%")
    assert held["owner/faq"] == set(read_retrieval("file/heldout").queries.values())
    assert held["owner/faq"] == held["owner/faq/shop"] == held["snli"]
    [entry] = recipes.load("owner-faq.toml").data.mix
    assert entry["name"] == "train.jsonl" and entry["lines"] == 48


def test_classes_of_a_hub_dataset_are_labels(desk, hub):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=[f"i{n}" for n in range(5)])
    )
    rows = [{"text": text, "label": n % 5} for n, (text, _) in enumerate(TICKETS)]
    rows.append({"text": None, "label": 1})
    hub["owner/intents", "test"] = datasets.Dataset.from_list(rows, features)
    made = new_recipe("mine.toml", "owner/intents", label="label", split="test")
    assert made.layout == (("text",), "label", "") and sum(made.rows.values()) == 60
    assert set(read_labelled("mine/heldout.jsonl").labels) == set("01234")
    assert "1 bad rows skipped" in made.remarks[0]


def test_a_saved_dataset_is_read(desk):
    saved = datasets.DatasetDict(test=datasets.Dataset.from_list(dicts()))
    saved.save_to_disk("saved")
    assert new_recipe("mine.toml", "saved", split="test").rows["heldout"] == 6
    fails("has no split 'train', but test", "saved")


def test_a_hub_that_does_not_answer(desk, hub):
    sentence = fails("does not give split 'train'", "owner/faq")
    assert "Couldn't reach the Hub" in sentence and "check name and network" in sentence
    hub["owner/rows", "train"] = datasets.Dataset.from_list(dicts(names=("left", "right")))
    assert "--columns left,right" in fails("what is a pair is not clear", "owner/rows")
    assert "did you mean" in fails("no column 'rigt'", "owner/rows", columns=("left", "rigt"))


def test_columns_are_found_or_asked_for():
    assert find_layout([{"id": 1, "Title": "a b", "body": "c d"}]).texts == ("Title", "body")
    rows = [{"utterance": text, "topic": label} for text, label in TICKETS]
    assert find_layout(rows, label="Topic").names == ("utterance", "topic")
    with pytest.raises(ValueError, match="--columns utterance --label topic$"):
        find_layout(rows)
    with pytest.raises(ValueError, match=r"no column 'topik' among .* \(did you mean 'topic'\?\)"):
        find_layout(rows, label="topik")
    graded = [dict(zip(("left", "right", "rating"), row)) for row in GRADED]
    with pytest.raises(ValueError, match="--columns left,right,rating --scores$"):
        find_layout(graded)
    with pytest.raises(ValueError, match="names 2 columns"):
        find_layout(rows, ("utterance", "topic"), label="topic")


# --- the split ---


def slow_groups(rows):
    "Groups by joining sets until nothing changes."
    groups = []
    for row in rows:
        touched = [group for group in groups if group & set(row)]
        groups = [group for group in groups if group not in touched]
        groups.append(set(row).union(*touched))
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_those_of_joined_sets(seed):
    rng = Random(seed)
    rows = [
        (f"a{rng.randrange(60)}", f"b{rng.randrange(60)}", f"a{rng.randrange(60)}")
        for _ in range(40)
    ]
    identities = np.array([[text_identity(text) for text in row] for row in rows])
    numbers, slow = connect(identities), slow_groups(rows)
    pairs = {
        (n, next(i for i, g in enumerate(slow) if row[0] in g)) for n, row in zip(numbers, rows)
    }
    assert len(pairs) == len(slow) == len(set(numbers))


@pytest.mark.parametrize("seed", range(5))
def test_a_split_shares_no_text_and_does_not_depend_on_the_order(seed):
    rng = Random(seed)
    rows = [(f"q{rng.randrange(200)}", f"a{rng.randrange(300)}") for _ in range(300)]
    identities = np.array([[text_identity(text) for text in row] for row in rows])
    held = hold_out(identities, 30, seed)
    assert 0 < held.sum() <= 30
    assert not np.isin(identities[held], identities[~held]).any()
    order = np.random.default_rng(seed).permutation(300)
    assert (hold_out(identities[order], 30, seed) == held[order]).all()


def test_other_spellings_of_a_text_stay_together(desk):
    rows = [
        row
        for n in range(40)
        for row in ((f"Where  is {n}?", f"a {n}"), (f"where is {n}?", f"b {n}"))
    ]
    new_recipe("mine.toml", faq(rows))
    train = {" ".join(r["question"].casefold().split()) for r in rows_of("mine/train.jsonl")}
    exam = read_retrieval("mine/heldout")
    assert not train & {" ".join(q.casefold().split()) for q in exam.queries.values()}


@pytest.mark.parametrize("text, rows", [("10%", 30), ("2.5 %", 8), ("40", 40), ("0.1%", 0)])
def test_holdout_is_a_share_or_a_number(text, rows):
    assert parse_holdout(text, 300) == rows


@pytest.mark.parametrize("text", ["", "ten", "0", "100%", "-5", "1e3", "0.5", "10%%", "nan"])
def test_a_holdout_that_is_none(text):
    with pytest.raises(ValueError, match="write for example 10%"):
        parse_holdout(text, 300)


# --- bad input ---


def test_a_column_that_is_not_there(desk):
    assert "did you mean 'answer'" in fails(
        "no column 'anser'", faq(), columns=("question", "anser")
    )
    _jsonl("faq.jsonl", [dict(zip(("question", "answer"), row)) for row in FAQ])
    assert "did you mean" in fails("no column 'anser'", "faq.jsonl", columns=("question", "anser"))


def test_a_delimiter_that_is_guessed_wrongly(desk):
    (desk / "a.tsv").write_text("question,answer\nwhere?,here\n")
    assert "separated by ','" in fails("one column", "a.tsv")
    faq(name="caret.csv", delimiter="^")
    assert fails("is no table", "caret.csv").endswith("such as sep=;")
    write("two.csv", ("question, or so", "answer"), [(f"{q}, yes", a) for q, a in FAQ], ";")
    assert fails("look like texts", "two.csv").endswith("such as sep=;")
    rows = "".join(f"{n}, where;is it, {n};there, {n}\n" for n in range(20))
    (desk / "b.csv").write_text("id, text;question;answer\n" + rows)
    assert "sep=;" in fails(
        "20 of 20 rows cannot be read", "b.csv", columns=("id", "text;question;answer")
    )


def test_empty_columns(desk):
    assert "column 'answer' is empty" in fails("60 of 60", faq([(q, "") for q, _ in FAQ]))
    fails("no rows to train on", faq([]))


@pytest.mark.parametrize(
    "labels, words",
    [
        (["one"] * 60, "all 60 rows have the same"),
        ([f"label {n}" for n in range(60)], "every value of 'intent' is different"),
        ([f"label {n // 2}" for n in range(60)], "no value of 'intent' stands in three rows"),
    ],
)
def test_labels_that_tell_nothing_apart(desk, labels, words):
    rows = [(text, label) for (text, _), label in zip(TICKETS, labels)]
    fails(words, write("tickets.csv", ("text", "intent"), rows), label="intent")


def test_scores_out_of_range(desk):
    options = {"columns": ("left", "right", "score"), "scores": True}
    wide = write("pairs.csv", options["columns"], [(a, b, 99 * s) for a, b, s in GRADED])
    assert "--score-range 0,495" in fails("0 to 495", wide, **options)
    fails("is not a number from 0 to 1", wide, **options, score_range=(0, 1))
    fails(
        "every score is 3",
        write("same.csv", options["columns"], [(a, b, 3) for a, b, _ in GRADED]),
        **options,
    )
    words = write("words.csv", options["columns"], [(a, b, "good") for a, b, _ in GRADED])
    fails("score 'good' is not a number", words, **options)
    names = write("names.csv", options["columns"], [(a, b, "1_0") for a, b, _ in GRADED])
    fails("score '1_0' is not a number", names, **options)


def test_three_rows(desk):
    assert "3 rows" in fails("both sides need two", faq(FAQ[::20]))
    one_group = [(question, "Please call us.") for question, _ in FAQ]
    sentence = fails("both sides need two", faq(one_group))
    assert "60 rows hang together" in sentence and "add rows with other texts" in sentence


def test_rows_that_hang_together_have_a_way_out(desk):
    sentence = fails("6 rows hang together", faq(), holdout="5%")
    assert sentence.endswith("--holdout 12")
    assert new_recipe("mine.toml", faq(), holdout="12").rows == {"train": 48, "heldout": 12}
    same = write("same.csv", ("text", "intent"), [("Help!", label) for _, label in TICKETS])
    assert fails("hang together", same, label="intent").endswith("keep one row of each text")
    graded = write("graded.csv", ("left", "right", "rating"), [("a", b, s) for _, b, s in GRADED])
    options = {"columns": ("left", "right", "rating"), "scores": True}
    assert fails("hang together", graded, **options).endswith("add pairs of other texts")


def test_nothing_is_overwritten(desk):
    name = faq()
    (desk / "a.toml").write_text("mine")
    (desk / "b").mkdir()
    for out, words in (("a.toml", "this file is there already"), ("b.toml", "this folder of data")):
        with pytest.raises(ValueError, match=words):
            new_recipe(out, name)
    assert (desk / "a.toml").read_text() == "mine" and not any((desk / "b").iterdir())
    with pytest.raises(ValueError, match="end it in .toml"):
        new_recipe("mine", name)


def test_what_is_no_table(desk):
    (desk / "notes.txt").write_text("Call the carrier.")
    fails("cannot read this kind of file", "notes.txt")
    (desk / "prose.csv").write_text("The ship is late\nIt comes at noon\n")
    fails("one column", "prose.csv")
    (desk / "rows.csv").write_text(
        "Where is my parcel today?,It is on the way to you.\nAnd now?,Near.\n"
    )
    fails("look like texts", "rows.csv")
    (desk / "one.json").write_text('{"question": "a"}')
    fails("holds one dict", "one.json")
    (desk / "bytes.parquet").write_bytes(b"no parquet")
    fails("not a Parquet file", "bytes.parquet")
    fails("no such file", "absent.csv")
    fails("is a folder", ".")


def test_options_that_do_not_fit(desk):
    fails("exclude each other", faq(), label="answer", scores=True)
    fails("add --scores, or leave it out", faq(), score_range=(0, 1))
    fails("--model is empty", faq(), model=" ")
    fails("no column of question, answer holds numbers", faq(), scores=True)
    fails("'question' is named twice", faq(), columns=("question", "Question"))
    fails("'answer' is named twice", faq(), columns=("answer",), label="answer")
    assert fails("leaves 0 to train", faq(), holdout="60").endswith("hold out fewer")
    assert fails("leaves 3 to train", faq(FAQ[::20])).endswith("so add rows")


def test_texts_that_are_equal_in_every_row(desk):
    fails("hold the same text in every row", faq([(q, f" {q.upper()}") for q, _ in FAQ]))


def _change_before_writing(monkeypatch, change):
    "Let a function change the file before it is read the last time."
    reads = []

    def read(path, *rest):
        reads.append(path)
        if len(reads) == 3:  # columns, first walk, second walk
            change()
        return read_rows(path, *rest)

    monkeypatch.setattr("contrastive_st.new.read_rows", read)


@pytest.mark.parametrize(
    "rows",
    [
        FAQ[:-1],
        [*FAQ, ("more", "rows")],
        [("other", "text"), *FAQ[1:]],
        [(FAQ[0][0], "other answer"), *FAQ[1:]],
        [(question, "answer x to 0") for question, _ in FAQ],
    ],
)
def test_a_file_that_changes_between_two_readings(desk, monkeypatch, rows):
    _change_before_writing(monkeypatch, lambda: faq(rows))
    fails("changed while it was read; run again", faq())


@pytest.mark.parametrize("changed", ["intent 1", "a new intent"])
def test_labels_that_change_between_two_readings(desk, monkeypatch, changed):
    header = ("text", "intent")
    rows = [("message 0", changed), *TICKETS[1:]]
    _change_before_writing(monkeypatch, lambda: write("tickets.csv", header, rows))
    fails("changed while it was read", write("tickets.csv", header, TICKETS), label="intent")


def test_scores_and_negatives_that_change_between_two_readings(desk, monkeypatch):
    header = ("left", "right", "rating")
    rows = [(*GRADED[0][:2], 5), *GRADED[1:]]
    with monkeypatch.context() as patch:
        _change_before_writing(patch, lambda: write("graded.csv", header, rows))
        name = write("graded.csv", header, GRADED)
        fails("changed while it was read", name, columns=header, scores=True)
    header = ("anchor", "positive", "negative")
    hard = [(f"q {n}", f"a {n}", f"no {n}") for n in range(40)]
    others = [(*hard[0][:2], "a 9"), *hard[1:]]  # perhaps a text that is held out
    _change_before_writing(monkeypatch, lambda: write("hard.csv", header, others))
    fails("changed while it was read", write("hard.csv", header, hard))


def test_an_address_is_no_file(desk):
    fails("is an address and no file; download it", "https://example.org/faq.csv")


def test_a_score_with_a_comma(desk):
    rows = [(a, b, f"{s},5") for a, b, s in GRADED]
    name = write("graded.csv", ("left", "right", "score"), rows, ";")
    options = {"columns": ("left", "right", "score"), "scores": True}
    assert fails("score '0,5' is not a number", name, **options).endswith("write 0.5")


@pytest.mark.parametrize(
    "score, score_range, advice",
    [
        ("1,000", None, "mend the row"),  # one, or a thousand?
        ("1,000", (0, 5), "write 1.000"),
        ("1,500", (0, 1), "mend the row"),
        ("0,500", None, "write 0.500"),
        ("1,5 ", None, "write 1.5"),
    ],
)
def test_a_comma_is_mended_within_the_bounds(desk, score, score_range, advice):
    columns = ("left", "right", "score")
    name = write("graded.csv", columns, [(a, b, score) for a, b, _ in GRADED], ";")
    options = {"columns": columns, "scores": True, "score_range": score_range}
    assert fails("is not a number", name, **options).endswith(advice)


@pytest.mark.parametrize(
    "score_range", [(0, float("inf")), (5, 0), (0,), 5, (0, 10**400), (0, float("nan")), ()]
)
def test_a_range_that_no_recipe_can_have(desk, score_range):
    name = write("graded.csv", ("left", "right", "score"), GRADED)
    options = {"columns": ("left", "right"), "scores": True, "score_range": score_range}
    fails("give the lowest and the highest score", name, **options)


def test_huge_scores_make_a_short_sentence(desk):
    columns = ("left", "right", "score")
    rows = [(a, b, 1e308 * (-1) ** n) for n, (a, b, _) in enumerate(GRADED)]
    sentence = fails(
        "-1e\\+308 to 1e\\+308", write("a.csv", columns, rows), columns=columns, scores=True
    )
    assert "divide them" in sentence and len(sentence) < 200


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": 5}, "model is 5; give a text"),
        ({"label": 5}, "label is 5; give a text"),
        ({"split": 5}, "split is 5; give a text"),
        ({"columns": 5}, "columns is 5; give a list of names"),
        ({"columns": "question"}, "columns is 'question'; give a list of names"),
        ({"columns": (1, 2)}, r"columns is \(1, 2\); give a list of names"),
        ({"split": "dev"}, "faq.csv: a file has no splits, but --split is 'dev'; leave it out"),
    ],
)
def test_options_of_a_wrong_type(desk, options, words):
    fails(words, faq(), **options)


def test_a_model_may_be_a_path(desk):
    new_recipe("mine.toml", faq(), model=desk / "model")
    assert recipes.load("mine.toml").model.name == str(desk / "model")


def test_rows_of_two_kinds_of_names(desk):
    "The rows without the columns of the first one are left out and counted."
    rows = [dict(zip(("anchor", "positive"), row)) for row in FAQ]
    rows[1::2] = [dict(zip(("question", "answer"), row)) for row in FAQ[1::2]]
    _jsonl("two.jsonl", rows)
    made = new_recipe("mine.toml", "two.jsonl", holdout="20%")
    assert sum(made.rows.values()) == 30
    assert any("30 bad rows skipped" in remark for remark in made.remarks)


# --- the command, and what it needs ---


def test_the_command(desk):
    name = faq([*FAQ, ("", "empty")])
    line = ["new", "mine.toml", "--data", name, "--columns", "question,answer", "--holdout", "20%"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "train mine.toml" in result.output and "1 bad rows skipped" in result.output
    assert "index runs/mine/model faq.csv --column answer" in result.output
    result = CliRunner().invoke(app, ["new", "b.toml", "--data", name, "--score-range", "5,0"])
    assert "give the lowest and the highest score" in str(result.exception)


def test_the_next_command_indexes_what_is_there(desk, hub):
    "No dataset of the hub and no lists of texts, but the rows that were written; a bad row first."
    hub["owner/faq", "train"] = datasets.Dataset.from_list(dicts())
    _jsonl("lists.jsonl", [{"query": f"q {n}", "pos": [f"a {n}", f"b {n}"]} for n in range(40)])
    (desk / "wide.csv").write_text(
        "question,answer\na,b,c\n" + "".join(f"{q},{a}\n" for q, a in FAQ)
    )
    for n, (data, words) in enumerate(
        {
            "owner/faq": "r0/train.jsonl --column answer",
            "lists.jsonl": "r1/train.jsonl --column pos",
            "wide.csv": "wide.csv --column answer",
        }.items()
    ):
        result = CliRunner().invoke(app, ["new", f"r{n}.toml", "--data", data])
        assert result.exit_code == 0 and words in result.output, result.output


def test_torch_is_not_needed(desk):
    program = f"""
import sys
from contrastive_st.new import new_recipe
from contrastive_st import atomic, recipes
new_recipe("mine.toml", {faq()!r})
recipes.load("mine.toml")
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_names_of_columns_are_shown_as_they_are_typed(desk):
    names = ["my question", "its answer"]
    rows = [{names[0]: f"where is pier {n}", names[1]: f"behind shed {n}"} for n in range(9)]
    assert_refused(rows, "--columns 'my question,its answer'")
    again = [{"a": row[names[0]], 'b\x1b[31m"]': row[names[1]]} for row in rows]
    assert_refused(again, r"--columns 'a,b\x1b[31m")
    assert_refused([{}] * 9, "no row has a text with a name")
    assert_refused([{"a": "x", "\ud800": "y"}] * 9, "holds half a character; rename it")


def assert_refused(rows, words):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as caught:
        new_recipe("rows.toml", "rows.jsonl")
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_a_file_whose_name_is_no_text(desk):
    pairs = "".join(f"where is pier {n},behind shed {n}\n" for n in range(30))
    Path("\udcff.csv").write_text("anchor,positive\n" + pairs)
    new_recipe("mine.toml", "\udcff.csv")
    assert recipes.load("mine.toml").title == "?.csv: anchor, positive"
    with pytest.raises(ValueError, match="holds bytes that are no text"):
        new_recipe("\udcff.toml", "\udcff.csv")


def test_a_recipe_that_cannot_be_written_leaves_no_folder(desk, monkeypatch):
    pairs = "".join(f"where is pier {n},behind shed {n}\n" for n in range(30))
    Path("pairs.csv").write_text("anchor,positive\n" + pairs)
    write_text = atomic.write_text

    def full(path, text):
        raise ValueError("the disk is full")

    monkeypatch.setattr(atomic, "write_text", full)
    with pytest.raises(ValueError, match="the disk is full"):
        new_recipe("mine.toml", "pairs.csv")
    monkeypatch.setattr(atomic, "write_text", write_text)
    assert {path.name for path in desk.iterdir()} == {"pairs.csv"}
    new_recipe("mine.toml", "pairs.csv")
