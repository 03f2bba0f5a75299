"""What a run will see: negatives and duplicates, what looks wrong, and a report's table."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import Fake

from contrastive_st.account import concerns, masked_negatives, report_table
from contrastive_st.mixture import Mixture
from contrastive_st.store import text_identity

quick = settings(max_examples=100, deadline=None)


@quick
@given(
    st.lists(
        st.lists(st.sampled_from("abcdefg"), min_size=3, max_size=3).map(tuple),
        min_size=1,
        max_size=20,
    )
)
def test_masked_negatives_are_those_of_the_rule(examples):
    candidates = [e[1] for e in examples] + [e[2] for e in examples]
    naive = [
        sum(
            n != i and (text == e[0] or text in [o[1] for o in examples if o[0] == e[0]])
            for n, text in enumerate(candidates)
        )
        for i, e in enumerate(examples)
    ]
    assert (
        masked_negatives(np.array([[text_identity(text) for text in e] for e in examples])).tolist()
        == naive
    )


def test_masked_negatives_are_those_of_the_loss():
    "Counted here, masked there."
    torch = pytest.importorskip("torch")
    from contrastive_st.loss import same_text

    identities = np.random.default_rng(3).integers(0, 30, (40, 4))
    assert (
        masked_negatives(identities).tolist()
        == same_text(torch.from_numpy(identities)).sum(1).tolist()
    )


def test_a_source_of_duplicates_ends_and_is_reported():
    class Same(Fake):
        def rows(self, indices):
            return [("same question", "Same Answer" if i % 2 else "same answer") for i in indices]

    report = Mixture([Same("copies", 100)], [1], 16, 1).report(10)
    [pool] = report["pools"]
    assert pool["masked"] == 15 and pool["negatives"] == 0
    assert pool["duplicates"] == pytest.approx(30 / 32)
    assert report["warnings"] == [
        "batches of 2 columns are mostly duplicates: 0.0 of 15 negatives are left to an anchor;"
        " remove copies from the data"
    ]


def test_concerns_name_what_dominates_and_what_repeats():
    sources = [Fake("forum", 10**6), Fake("articles", 10**5), Fake("manual", 20)]
    report = Mixture(sources, [6, 2, 1], 16, 2).report(1000)
    # the manual is seen 89 times
    assert [w.split(";")[0] for w in report["warnings"]] == [
        "forum dominates: 67% of all rows come from it"
    ]
    report = Mixture(sources, [6, 2, 1], 16, 2).report(64 * 36)
    assert [w.split(";")[0] for w in report["warnings"]] == [
        "forum dominates: 67% of all rows come from it",
        "manual repeats: its 20 rows are seen 205 times each",
    ]
    assert "warning: manual repeats" in report_table(report)
    assert Mixture(sources, [1, 1, 1], 16, 2).report(100)["warnings"] == []
    # one dataset cannot help being all
    assert Mixture(sources[:1], [1], 16, 1).report(100)["warnings"] == []


def test_concerns_begin_above_their_bounds():
    base = {"name": "a", "rows": 9, "realised": 0.5, "epochs": 100}

    def report(**change):
        return {
            "datasets": [base | change, base | {"name": "b"}],
            "pools": [{"columns": 2, "in_batch": 7, "hard": 0, "negatives": 3.5}],
        }

    assert concerns(report()) == []
    assert [
        len(concerns(report(**change)))
        for change in ({"epochs": 100.4}, {"realised": 0.51}, {"epochs": 101, "realised": 0.51})
    ] == [1, 1, 2]
    assert concerns(report(epochs=1234.5)) == [
        "a repeats: its 9 rows are seen 1,234 times each; lower its weight, or shorten the run"
    ]


def test_a_report_that_reads_nothing_says_nothing_of_duplicates():
    source = Fake("a", 100)
    report = Mixture([source], [1], 8, 1).report(10, sample=0)
    assert source.read == 0 and math.isnan(report["pools"][0]["masked"])
    table = report_table(report)
    assert report["warnings"] == [] and "nan" not in table
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.parametrize(
    ("args", "words"), [((0,), "steps is 0"), ((10, -1), "sample is -1"), ((2.0,), "steps is 2.0")]
)
def test_bad_reports(args, words):
    with pytest.raises(ValueError, match=words):
        Mixture([Fake("a", 10)], [1], 8, 1).report(*args)


def test_rows_of_one_label_are_masked_as_by_comparing_all():
    rng = np.random.default_rng(0)
    for columns in (2, 3, 4):
        texts, labels = rng.integers(0, 9, (25, columns)), rng.integers(0, 4, 25)
        expected = []
        for i, anchor in enumerate(texts[:, 0]):
            banned = {anchor, *texts[texts[:, 0] == anchor, 1]}
            same = (labels == labels[i])[:, None] & (labels[i] != 0)
            masked = np.isin(texts[:, 1:], list(banned)) | same
            masked[i, 0] = False
            expected.append(int(masked.sum()))
        assert masked_negatives(texts, labels).tolist() == expected
