"""Gender bias: figures against definitions, controls with a known answer, files, bad input."""

import json
import warnings

import numpy as np
import pytest
from scipy import stats

from contrastive_st.bias import (
    BiasItem,
    bias_summary,
    by_occupation,
    gender_bias,
    label_separation,
    leans,
    positive_rate,
    read_bias,
    read_winogender,
)

LABELS = {f"m{i}": "male" for i in range(12)} | {f"f{i}": "female" for i in range(12)}
ITEMS = [
    BiasItem(f"{o} says they {verb}", f"{o} says he {verb}", f"{o} says she {verb}", o, LABELS[o])
    for o in LABELS
    for verb in ("sleep", "run")
]


def control(strength, seed, default=0.0):
    "An encoder with a gender axis: occupations move texts by `strength`, other texts by `default`."
    rng = np.random.default_rng(seed)
    words = {"he": 1.0, "she": -1.0, "they": default} | {
        o: strength * (1 if label == "male" else -1) for o, label in LABELS.items()
    }

    def encode(texts):
        rows = 0.2 * rng.standard_normal((len(texts), 8))
        rows[:, 0] += [sum(words.get(word, 0) for word in text.split()) for text in texts]
        rows[:, 1] += 2
        return rows

    return encode


def swapped(items):
    "The same questions with the genders exchanged."
    other = {"male": "female", "female": "male", "": ""}
    return [BiasItem(i.anchor, i.female, i.male, i.occupation, other[i.stereotype]) for i in items]


# --- figures ---


def test_leans_are_differences_of_cosines():
    table = {
        text: row
        for text, row in zip(
            [t for i in ITEMS for t in i[:3]],
            np.random.default_rng(0).standard_normal((3 * len(ITEMS), 5)),
        )
    }

    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    expected = [
        cos(table[i.anchor], table[i.male]) - cos(table[i.anchor], table[i.female]) for i in ITEMS
    ]
    for factor, kind in ((1, np.float64), (7.5, np.float32)):  # length and precision play no part
        found = leans(lambda texts: np.array([factor * table[t] for t in texts], dtype=kind), ITEMS)
        assert found == pytest.approx(np.array(expected), abs=1e-6)


def test_the_encoders_array_stays_as_it_was():
    rows = 5 * np.random.default_rng(0).standard_normal((3 * len(ITEMS), 4))
    before = rows.copy()
    gender_bias(lambda texts: rows, ITEMS)
    assert (rows == before).all()


def test_rate_is_wilsons_and_the_sign_tests():
    for k, n in ((0, 5), (3, 7), (41, 58), (6, 6)):
        found = positive_rate("r", np.array([1.0] * k + [-0.5] * (n - k) + [0.0] * 4))
        z = stats.norm.ppf(0.975)
        centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
        spread = z / (1 + z * z / n) * np.sqrt(k * (n - k) / n**3 + z * z / (4 * n * n))
        assert [found["r"], found["r_low"], found["r_high"]] == pytest.approx(
            [k / n, centre - spread, centre + spread], abs=1e-9
        )
        extreme = [j for j in range(n + 1) if abs(j - n / 2) >= abs(k - n / 2)]
        assert found["r_p"] == pytest.approx(sum(stats.binom.pmf(extreme, n, 0.5)))


def test_separation_counts_pairs():
    rng = np.random.default_rng(0)
    for a, b in ((1, 1), (2, 9), (12, 12)):
        male, female = rng.integers(-3, 4, a) / 10, rng.integers(-3, 4, b) / 10
        found = label_separation(male, female)
        assert found["separation"] == pytest.approx(
            np.mean([(m > f) + (m == f) / 2 for m in male for f in female])
        )
        assert 0 <= found["separation_low"] <= found["separation"] <= found["separation_high"] <= 1


def test_separation_interval_covers_the_truth():
    "Two normal samples one standard deviation apart: 95% intervals hold the truth 95% of the time."
    truth, rng = stats.norm.cdf(1 / np.sqrt(2)), np.random.default_rng(0)
    intervals = [
        label_separation(rng.standard_normal(12) + 1, rng.standard_normal(12)) for _ in range(400)
    ]
    held = sum(i["separation_low"] <= truth <= i["separation_high"] for i in intervals)
    assert 0.92 * 400 <= held <= 0.99 * 400
    perfect = label_separation(np.arange(5) + 10.0, np.arange(5.0))
    # no false certainty
    assert perfect["separation"] == 1 == perfect["separation_high"]
    assert 0.5 < perfect["separation_low"] < 0.8


def test_exchanging_the_genders_mirrors_the_report():
    texts = [t for i in ITEMS for t in i[:3]]
    rows = dict(zip(texts, control(0.6, seed=3, default=0.3)(texts)))

    def encode(these):
        return np.array([rows[t] for t in these])

    one, other = gender_bias(encode, ITEMS), gender_bias(encode, swapped(ITEMS))
    assert other["male_rate"] == pytest.approx(1 - one["male_rate"])
    assert other["lean"] == pytest.approx(-one["lean"])
    assert (other["male_rate_low"], other["male_rate_high"]) == pytest.approx(
        (1 - one["male_rate_high"], 1 - one["male_rate_low"])
    )
    for name in ("stereotype_rate", "separation", "separation_low", "separation_p"):
        assert other[name] == pytest.approx(one[name]), name
    shuffled = gender_bias(encode, ITEMS[::-1])
    # order plays no part
    assert {k: shuffled[k] for k in one if k.endswith("_p")} == pytest.approx(
        {k: one[k] for k in one if k.endswith("_p")}
    )


def test_report_is_plain_json_and_says_what_it_holds():
    report = gender_bias(control(1.0, seed=0), ITEMS)
    assert json.loads(json.dumps(report)) == report
    assert (report["n"], report["occupations"], report["ties"]) == (48, 24, 0)
    assert set(report["by_occupation"]) == set(LABELS)
    row = report["by_occupation"]["m0"]
    # two items can never be significant
    assert row["n"] == 2 and row["stereotype"] == "male"
    assert row["male_rate_q"] >= row["male_rate_p"] == 0.5
    assert report["lean_low"] < report["lean"] < report["lean_high"]
    text = bias_summary(report)
    words = ["48 items", "24 occupations", "male_rate", "stereotype_rate", "separation"]
    assert all(word in text for word in [*words, f"{report['separation']:.0%}"])
    assert (
        "50% = he and she equally near; a shift common to all moves the rates, not the separation"
        in text
    )
    assert "without bias" not in text
    means = np.array([row["lean"] for row in report["by_occupation"].values()])
    assert (report["lean_low"], report["lean_high"]) == pytest.approx(
        stats.t.interval(0.95, 23, means.mean(), stats.sem(means))
    )
    unlabelled = gender_bias(control(1.0, seed=0), [i._replace(stereotype="") for i in ITEMS])
    assert "separation" not in unlabelled and "stereotype_rate" not in unlabelled
    assert "separation" not in bias_summary(unlabelled)
    alone = gender_bias(control(1.0, seed=0), ITEMS[:2])
    assert "lean_low" not in alone and "separation" not in alone and alone["occupations"] == 1
    assert "lean" in bias_summary(alone)


def test_many_tests_are_corrected():
    "A hundred innocent occupations: raw p cries now and then, the corrected one does not."
    rng = np.random.default_rng(0)
    items = [BiasItem("a", "b", "c", f"o{i}") for i in range(100) for _ in range(40)]
    table = by_occupation(rng.choice([-1.0, 1.0], len(items)), items)
    assert sum(row["male_rate_p"] < 0.05 for row in table.values()) >= 1
    assert sum(row["male_rate_q"] < 0.05 for row in table.values()) == 0


# --- controls ---


def test_unbiased_encoder_rarely_alarms_and_a_biased_one_is_seen():
    runs = 200
    names = ("male_rate_p", "stereotype_rate_p", "separation_p")
    calm = np.array(
        [[gender_bias(control(0.0, seed), ITEMS)[n] for n in names] for seed in range(runs)]
    )
    for name, p in zip(names, calm.T):
        # about 5%, or below
        assert stats.binomtest(int((p < 0.05).sum()), runs, 0.05, "greater").pvalue > 0.001, (
            name,
            (p < 0.05).mean(),
        )
        assert 0.35 < p.mean() < 0.75 and (p < 0.5).mean() > 0.25, name  # not silent by being dead
    one = gender_bias(control(1.5, seed=1), ITEMS)
    assert one["separation"] > 0.9 and one["separation_low"] > 0.7 and one["stereotype_rate"] > 0.85
    assert one["by_occupation"]["m0"]["lean"] > 0 > one["by_occupation"]["f0"]["lean"]
    biased = np.array(
        [[gender_bias(control(1.0, seed), ITEMS)[n] for n in names] for seed in range(50)]
    )
    assert (biased[:, 1:] < 0.05).mean(axis=0).min() > 0.95  # stereotype rate and separation see it
    assert (biased[:, 0] < 0.05).mean() < 0.2  # the male rate is blind to a balanced stereotype


def test_a_male_default_is_not_taken_for_a_stereotype():
    unequal = [i for i in ITEMS if i.stereotype == "male" or i.occupation in ("f0", "f1", "f2")]
    reports = [gender_bias(control(0.0, seed, default=1.0), unequal) for seed in range(60)]
    assert all(
        r["male_rate"] == 1 and r["male_rate_p"] < 0.001 and r["stereotype_rate"] == 12 / 15
        for r in reports
    )
    assert np.mean([r["separation_p"] < 0.05 for r in reports]) < 0.15
    assert 0.4 < np.mean([r["separation"] for r in reports]) < 0.6


def test_copies_of_an_item_are_no_new_evidence():
    one = gender_bias(control(0.0, seed=5), ITEMS[::2])
    rows = dict(zip(texts := [t for i in ITEMS[::2] for t in i[:3]], control(0.0, seed=5)(texts)))
    ten = gender_bias(lambda these: np.array([rows[t] for t in these]), ITEMS[::2] * 10)
    assert ten["n"] == 10 * one["n"] and ten["male_rate_p"] == one["male_rate_p"]
    assert ten["male_rate_low"] == one["male_rate_low"]


def test_an_encoder_that_cannot_tell_measures_nothing():
    for dead in (lambda texts: np.ones((len(texts), 4)), lambda texts: np.zeros((len(texts), 4))):
        with pytest.warns(RuntimeWarning, match="every item is a tie"):
            report = gender_bias(dead, ITEMS)
        names = ("male_rate", "male_rate_low", "male_rate_high", "male_rate_p")
        assert [report[name] for name in names] == [0.5, 0, 1, 1]
        assert report["ties"] == 48
    rng = np.random.default_rng(0)
    # rounding is no opinion
    assert not leans(lambda texts: 1 + 1e-8 * rng.standard_normal((len(texts), 4)), ITEMS).any()
    assert leans(lambda texts: 1 + 1e-1 * rng.standard_normal((len(texts), 4)), ITEMS).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gender_bias(control(0.0, seed=0), ITEMS)


# --- files ---

ROW = {"base_sentence": "A.", "occupation": "b", "male_sentence": "He.", "female_sentence": "She."}
HEAD = "base_sentence,occupation,stereotypical_gender,male_sentence,female_sentence\n"


@pytest.mark.parametrize(
    "text, name",
    [
        (
            HEAD + '"The nurse said ""they, maybe"" left.",nurse,female,He left.,She left.\n',
            "a.csv",
        ),
        (
            ",Base Sentence,Occupation,Steretypical_Gender,Male Sentence,Female Sentence\n"
            '0,"The nurse said ""they, maybe"" left.",nurse,female,He left.,She left.\n',
            "a.csv",
        ),
        (
            json.dumps(
                {
                    "base_sentence": 'The nurse said "they, maybe" left.',
                    "occupation": "nurse",
                    "stereotypical_gender": "female",
                    "male_sentence": "He left.",
                    "female_sentence": "She left.",
                    "more": 1,
                }
            ),
            "a.jsonl",
        ),
    ],
    ids=["csv", "the card's spelling and an index column", "jsonl"],
)
def test_read_bias(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    assert read_bias(tmp_path / name) == [
        BiasItem('The nurse said "they, maybe" left.', "He left.", "She left.", "nurse", "female")
    ]


def test_anchors_that_hold_the_answer_are_counted(tmp_path):
    anchors = [
        "He left.",
        "The nurse said that HIS coat is here.",
        "Ask her!",
        "She, too.",
        "They left the theatre, the hero and Sheila.",
        "Where is this?",
    ]
    (tmp_path / "a.csv").write_text(HEAD + "".join(f'"{a}",b,,He.,She.\n' for a in anchors))
    message = (
        "a.csv: 4 of 6 anchors hold he or she, which is the answer; write they, or compare only"
        " models with each other$"
    )
    with pytest.warns(UserWarning, match=message):
        assert len(read_bias(tmp_path / "a.csv")) == 6
    (tmp_path / "a.csv").write_text(HEAD + "".join(f'"{a}",b,,He.,She.\n' for a in anchors[4:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_bias(tmp_path / "a.csv")) == 2


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", HEAD, "a.csv:1: no rows"),
        ("a.csv", "one,two\nA,B\n", "a.csv:1: no column 'base_sentence' among one, two"),
        ("a.csv", HEAD + "A.,b,,He.,  \n", "a.csv:2: no text in female_sentence"),
        ("a.csv", HEAD + '"A\nlong.",b,,He.,She.\nA.,b,,He.,He.\n', "a.csv:4: male and female"),
        ("a.csv", HEAD + "A.,b,neutral,He.,She.\n", "a.csv:2: stereotypical_gender is 'neutral'"),
        ("a.csv", HEAD + f"A.,b,{'m' * 10_000},He.,She.\n", "stereotypical_gender is 'mmm"),
        ("a.jsonl", "{}\n", "a.jsonl:1: a row needs base_sentence"),
        ("a.jsonl", json.dumps(ROW | {"base_sentence": 5}), "a.jsonl:1: no text in base_sentence"),
        ("a.jsonl", json.dumps(ROW).replace('"b"', "NaN"), "a.jsonl:1: no text in occupation"),
        ("a.jsonl", json.dumps(ROW | {"stereotypical_gender": ["male"] * 999}), "is ['male'"),
        ("a.jsonl", json.dumps(ROW | {"stereotypical_gender": 5}), "stereotypical_gender is 5"),
        ("a.xlsx", "PK", "a.xlsx"),
    ],
)
def test_read_bias_errors(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_bias(tmp_path / name)
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 400


def test_missing_file(tmp_path):
    for read, name in ((read_bias, "no.csv"), (read_winogender, "no.tsv")):
        with pytest.raises(ValueError, match="no such file"):
            read(tmp_path / name)


def winogender_lines(key="nurse.patient.0", genders=("male", "female", "neutral")):
    return "".join(f"{key}.{g}.txt\tThe nurse said {g}.\n" for g in genders)


def test_read_winogender(tmp_path):
    (tmp_path / "w.tsv").write_text(
        "sentid\tsentence\n"
        + winogender_lines()
        + winogender_lines("nurse.patient.1", ("neutral", "male", "female"))
    )
    for about in ("occupation", "participant"):
        assert read_winogender(tmp_path / "w.tsv", about) == [
            BiasItem(
                "The nurse said neutral.", "The nurse said male.", "The nurse said female.", "nurse"
            )
        ]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", ":1: no sentences"),
        ("sentid\tsentence\n", ":1: no sentences"),
        ("nurse.patient.0.male\tHe.", ":1: expected an id like"),
        ("nurse.patient.2.male.txt\tHe.", ":1: expected an id like"),
        ("nurse.patient.0.male.txt He.", ":1: expected an id like"),
        (
            winogender_lines() + "nurse.patient.0.male.txt\tHe.",
            ":4: nurse.patient.0.male.txt occurs twice",
        ),
        (
            winogender_lines() + winogender_lines("cook.guest.1", ("male", "neutral")),
            ":4: cook.guest.1 has no female sentence",
        ),
    ],
)
def test_read_winogender_errors(tmp_path, content, said):
    (tmp_path / "w.tsv").write_text(content)
    with pytest.raises(ValueError) as error:
        read_winogender(tmp_path / "w.tsv")
    assert f"w.tsv{said}" in str(error.value)
    with pytest.raises(ValueError, match="use 'occupation' or 'participant'"):
        read_winogender(tmp_path / "w.tsv", "nobody")


def test_winogender_itself(shared_data):
    file = shared_data / "bias/winogender_all_sentences.tsv"
    about = {kind: read_winogender(file, kind) for kind in ("occupation", "participant")}
    assert [len(items) for items in about.values()] == [120, 120]
    assert len({i.occupation for i in about["occupation"]}) == 60
    assert not {i.anchor for i in about["occupation"]} & {i.anchor for i in about["participant"]}
    for item in sum(about.values(), []):
        assert item.occupation in item.anchor.lower()
        assert len({item.anchor, item.male, item.female}) == 3
        words = [set(text.lower().rstrip(".").split()) for text in item[:3]]
        assert (
            words[1] & {"he", "him", "his"}
            and words[2] & {"she", "her"}
            and words[0] & {"they", "them", "their"}
        ), item


# --- bad input ---


@pytest.mark.parametrize(
    "encode, items, said",
    [
        (control(0, 0), [], "there are no items"),
        (lambda texts: np.ones((3, 4)), ITEMS, r"encode returned shape \(3, 4\) for 144 texts"),
        (lambda texts: np.ones(len(texts)), ITEMS, "one row per text"),
        (lambda texts: np.full((len(texts), 4), np.nan), ITEMS, "NaN or inf"),
        (
            lambda texts: np.where(np.arange(len(texts))[:, None] == 4, np.nan, 1.0),
            ITEMS,
            f"NaN or inf .* first for {ITEMS[1].male!r}",
        ),
        (
            lambda texts: np.ones((len(texts), 4), np.int8),
            ITEMS,
            "encode returned int8, which are codes",
        ),
        (
            lambda texts: np.full((len(texts), 4), "a"),
            ITEMS,
            "encode returned <U1 instead of floats",
        ),
        (
            control(0, 0),
            [ITEMS[0]._replace(male=None)],
            "item 0 holds a NoneType instead of a sentence",
        ),
        (control(0, 0), [ITEMS[0]._replace(stereotype=["x"])], "labelled"),
        (
            control(0, 0),
            [ITEMS[0], ITEMS[1]._replace(stereotype="female")],
            "'m0' is labelled female and male",
        ),
        (control(0, 0), [ITEMS[0]._replace(stereotype="men")], "'m0' is labelled men;"),
    ],
)
def test_bad_input(encode, items, said):
    with pytest.raises(ValueError, match=said):
        gender_bias(encode, items)


def test_leans_may_be_any_numbers():
    items = ITEMS[:4]
    expected = by_occupation(np.array([1.0, -1.0, 2.0, 0.0]), items)
    assert (
        by_occupation([1, -1, 2, 0], items)
        == by_occupation([np.int64(1), np.float32(-1), 2, 0], items)
        == expected
    )
    json.dumps(expected, allow_nan=False)
    for wrong in ([1, 2], [1, 2, 3, np.nan], [[1, 2, 3, 4]]):
        with pytest.raises(ValueError, match="one finite number for each"):
            by_occupation(wrong, items)
