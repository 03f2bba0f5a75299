"""The mixture: properties over many sizes and weights, bad configs one by one, and the real files."""
import gzip
import json
import math
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contrastive_st.mixture import WINDOW, Mixture, Plan, draw_counts, draw_window, epoch_order, masked_negatives, read_config, report_table

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class Fake:
    "A source in memory whose texts tell where they come from."

    def __init__(self, name, rows, columns=2):
        self.name, self.n, self.columns, self.read = name, rows, ("anchor", "positive", "negative", "negative_2")[:columns], 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.rows([i])[0]

    def rows(self, indices):
        self.read += len(indices)
        assert all(0 <= i < self.n for i in indices)
        return [tuple(f"{self.name}/{c}/{i}" for c in self.columns) for i in indices]


@st.composite
def mixtures(draw):
    k = draw(st.integers(1, 4))
    part = draw(st.integers(1, 6))
    n = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(60, 200), min_size=n, max_size=n))  # grain's permutation is slow below some hundred rows
    columns = draw(st.lists(st.integers(2, 4), min_size=n, max_size=n))
    weights = draw(st.lists(st.one_of(st.integers(1, 1000), st.floats(0.01, 100)), min_size=n, max_size=n))
    seed = draw(st.integers(0, 2**40))
    return lambda: Mixture([Fake(f"s{i}", s, c) for i, (s, c) in enumerate(zip(sizes, columns))], weights, k * part, k, seed)


# ---- the draws

@quick
@given(st.lists(st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=30), st.integers(0, 10**12))
def test_counts_sum_never_fall_and_follow_the_weights(weights, n):
    now, then = draw_counts(weights, n), draw_counts(weights, n + 1)
    assert sum(now) == n and sum(then) == n + 1
    assert all(0 <= b - a <= 1 for a, b in zip(now, then))
    assert max(abs(c - n * w / math.fsum(weights)) for c, w in zip(now, weights)) < 2 + 1e-9 * n


@quick
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**31), st.integers(0, 2**40))
def test_a_window_holds_the_counted_draws_in_turn(weights, k, window, key):
    choice, turn = draw_window(tuple(weights), k, window, key)
    assert choice.shape == turn.shape == (WINDOW, k)
    start, stop = (draw_counts(weights, w * WINDOW * k) for w in (window, window + 1))
    for i in range(len(weights)):
        assert turn[choice == i].tolist() == list(range(start[i], stop[i]))
        if stop[i] - start[i] <= WINDOW:  # such a dataset never meets itself
            assert (choice == i).sum(1).max() <= 1


def test_draws_are_fixed_for_all_time():
    "A run that resumes with a later version of the library must find the rows it left."
    choice, _ = draw_window((4, 3, 2, 1), 2, 1, 0)
    assert choice[:6].tolist() == [[2, 1], [2, 1], [0, 1], [0, 3], [2, 1], [0, 1]]
    assert [epoch_order(10, "a", 0)[i] for i in range(6)] == GOLDEN_ORDER


GOLDEN_ORDER = [6, 0, 3, 1, 2, 8]


def test_every_pair_of_datasets_meets():
    met = Counter(tuple(sorted(row)) for w in range(20) for row in draw_window((4, 3, 2, 1), 2, w, 5)[0].tolist())
    assert set(met) == {(a, b) for a in range(4) for b in range(a + 1, 4)}


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 1000])
def test_each_epoch_holds_each_row_once(rows):
    order = epoch_order(rows, "a", 3)
    epochs = [[order[e * rows + n] for n in range(rows)] for e in range(4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 7 or len({tuple(epoch) for epoch in epochs}) == 4


def test_orders_differ_between_names_and_seeds_and_do_not_slide():
    first = lambda name, seed, epoch=0: [epoch_order(100, name, seed)[epoch * 100 + n] for n in range(100)]
    assert first("a", 0) != first("b", 0) != first("a", 1)
    assert first("a", 0, epoch=1) != first("a", 1, epoch=0)  # seed 1 is not seed 0 one epoch later


@pytest.mark.parametrize("rows", [0, 2**32])
def test_lengths_the_permutation_cannot_take(rows):
    with pytest.raises(ValueError, match="split the source"):
        epoch_order(rows, "a")


# ---- the plan

@quick
@given(mixtures(), st.integers(0, 10**9))
def test_a_step_is_a_function(make, step):
    "Built afresh, asked out of order, from threads: the same rows, all of one column count."
    mixture, again = make(), make()
    again.batch(step + 1)
    batch = mixture.batch(step)
    assert batch == again.batch(step) and batch.step == step
    assert len(batch.examples) == len(batch.sources) == mixture.batch_size
    assert len({len(e) for e in batch.examples}) == 1
    assert [e[0].split("/")[0] for e in batch.examples] == batch.sources
    assert [f"{mixture.sources[i].name}/anchor/{r}" for i, r in mixture.rows(step)] == [e[0] for e in batch.examples]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(mixture.batch, [step] * 4)) == [batch] * 4
    assert pickle.loads(pickle.dumps(mixture)).batch(step).examples == batch.examples  # data loader workers


@quick
@given(mixtures(), st.integers(0, 10**6))
def test_slices_put_together_are_the_batch(make, step):
    mixture = make()
    whole = mixture.batch(step)
    for ranks in (n for n in range(1, mixture.batch_size + 1) if mixture.batch_size % n == 0):
        slices = [mixture.batch(step, rank, ranks) for rank in range(ranks)]
        assert [e for s in slices for e in s.examples] == whole.examples
        assert [n for s in slices for n in s.sources] == whole.sources


@settings(quick, max_examples=6)
@given(mixtures())
def test_sources_go_through_their_epochs(make):
    "The rows of a source, in the order of steps, are its epochs one after the other."
    mixture = make()
    seen = {i: [] for i in range(len(mixture.sources))}
    for step in range(70):  # crosses the border of a window
        rows, k = mixture.rows(step), mixture.datasets_per_batch
        for d, (i, _) in enumerate(mixture.draws(step)):
            assert {j for j, _ in rows[d::k]} == {i}
            seen[i] += [r for _, r in rows[d::k]]
    for i, source in enumerate(mixture.sources):
        n = len(source)
        for e in range(len(seen[i]) // n):
            assert sorted(seen[i][e * n:(e + 1) * n]) == list(range(n))


@quick
@given(mixtures(), st.integers(1, 300))
def test_report_counts_what_happens(make, steps):
    mixture = make()
    report, drawn = mixture.report(steps, sample=2), Counter(i for s in range(steps) for i, _ in mixture.draws(s))
    k, part = mixture.datasets_per_batch, mixture.batch_size // mixture.datasets_per_batch
    for i, d in enumerate(report["datasets"]):
        assert d["realised"] == pytest.approx(drawn[i] / (steps * k))
        assert d["epochs"] == pytest.approx(drawn[i] * part / d["rows"])
    assert sum(p["batches"] for p in report["pools"]) == steps
    assert report["mixed_batches"] == pytest.approx(sum(len({i for i, _ in mixture.draws(s)}) > 1 for s in range(steps)) / steps)
    assert sum(d["asked"] for d in report["datasets"]) == pytest.approx(1)
    table = report_table(report)
    assert all(s.name in table for s in mixture.sources)
    json.dumps(report)


def test_shares_converge_with_pairs_and_triplets():
    weights = [19, 7, 1, 12.5]
    mixture = Mixture([Fake(f"s{i}", 100, 2 + i % 2) for i in range(4)], weights, 8, 2)
    for d in mixture.report(20_000, sample=0)["datasets"]:
        assert d["realised"] == pytest.approx(d["asked"], abs=3e-4)


def test_steps_far_away_read_one_batch_and_need_no_memory_of_the_others():
    source = Fake("large", 2_000_000_000)
    Mixture([source], [1], 64, 2).batch(539_999_999)
    assert source.read == 64


def test_another_process_finds_the_same_rows():
    code = ("import sys; sys.path.insert(0, 'tests'); from test_mixture import *; "
            "print(Mixture([Fake('a', 50), Fake('b', 30, 3)], [2, 1], 12, 2, seed=9).rows(12345))")
    rows = Mixture([Fake("a", 50), Fake("b", 30, 3)], [2, 1], 12, 2, seed=9).rows(12345)
    root = __file__.rsplit("/tests/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.strip() == str(rows), done.stderr
    assert "profiler" not in done.stderr  # grain's warning about jax is kept away


def test_the_silenced_logger_still_speaks():
    code = ("import contrastive_st.mixture; from absl import logging; logging.warning('something else'); "
            "logging.warning('Failed to load jax profiler: later')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "something else" in done.stderr and done.stderr.count("profiler") == 1


@pytest.mark.parametrize(("settings", "words"), [
    ({"batch_size": 1001}, "global batch 1001 is not divisible by datasets_per_batch=2; use 1000 or 1002"),
    ({"batch_size": 1, "datasets_per_batch": 2}, "not divisible by datasets_per_batch=2; use 2$"),
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": 8.0}, "batch_size is 8.0"), ({"batch_size": True}, "batch_size is True"),
    ({"datasets_per_batch": 0}, "datasets_per_batch is 0"), ({"seed": -1}, "seed is -1"), ({"seed": None}, "seed is None"),
    ({"weights": [1]}, "2 sources but 1 weights"), ({"weights": [0, 0.0]}, "no dataset is left"), ({"weights": [1, -1]}, "b: weight is -1"),
    ({"weights": [1, True]}, "b: weight is True"), ({"weights": [1, "1"]}, "b: weight is '1'"), ({"weights": [1, math.nan]}, "b: weight is nan"),
    ({"weights": [1, math.inf]}, "b: weight is inf"), ({"sources": [Fake("a", 9), Fake("a", 9)]}, "two datasets are called 'a'"),
    ({"batch_size": 40}, "b: 10 rows are fewer than the 20 .* at most 20, more datasets per batch"), ({"sources": [], "weights": []}, "no dataset is left"),
])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Mixture(**{"sources": [Fake("a", 1000), Fake("b", 10)], "weights": [1, 1], "batch_size": 8} | settings)


@pytest.mark.parametrize(("args", "words"), [
    ((0, 0, 3), "global batch 8 is not divisible by 3 ranks; use 6 or 9"), ((0, 2, 2), "rank 2 does not exist among 2 ranks"),
    ((0, -1, 2), "rank is -1"), ((0, 0, 0), "ranks is 0"), ((-1,), "step is -1"), ((1.5,), "step is 1.5"), (("1",), "step is '1'")])
def test_bad_steps_and_ranks(args, words):
    with pytest.raises(ValueError, match=words):
        Mixture([Fake("a", 10)], [1], 8).batch(*args)
    if len(args) == 1:
        with pytest.raises(ValueError, match=words):
            Plan([Fake("a", 10)], [1], 8).rows(*args)


def test_numpy_integers_are_whole_numbers():
    mixture = Mixture([Fake("a", 10)], [1], np.int64(8))
    assert mixture.batch(np.int64(3), np.int32(1), np.int32(2)) == mixture.batch(3, 1, 2)


# ---- accounting

@quick
@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=3, max_size=3).map(tuple), min_size=1, max_size=20))
def test_masked_negatives_are_those_of_the_rule(examples):
    candidates = [e[1] for e in examples] + [e[2] for e in examples]
    naive = [sum(n != i and (text == e[0] or text in [o[1] for o in examples if o[0] == e[0]]) for n, text in enumerate(candidates))
             for i, e in enumerate(examples)]
    assert masked_negatives(examples).tolist() == naive


def test_a_source_of_duplicates_ends_and_is_reported():
    class Same(Fake):
        def rows(self, indices):
            return [("same question", "Same Answer" if i % 2 else "same answer") for i in indices]

    report = Mixture([Same("copies", 100)], [1], 16).report(10, identity=str.casefold)
    [pool] = report["pools"]
    assert pool["masked"] == 15 and pool["negatives"] == 0 and pool["duplicates"] == pytest.approx(30 / 32)


# ---- configs

@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    pairs = [[f"question {i}", f"answer {i}"] for i in range(12)]
    text = "".join(json.dumps(p) + "\n" for p in pairs)
    (data / "plain.jsonl").write_text(text)
    (data / "sub" / "deep.jsonl").write_text(text)
    with gzip.open(data / "meta.stackexchange.com.jsonl.gz", "wt") as file:
        file.write(text)
    with gzip.open(data / "three.jsonl.gz", "wt") as file:
        file.writelines(json.dumps([*p, "no"]) + "\n" for p in pairs)
    (tmp_path / "secret.jsonl").write_text(text)
    return data


def test_names_with_and_without_extension(folder, tmp_path):
    config = [{"name": "plain", "weight": 1, "lines": 12}, {"name": "sub/deep.jsonl", "weight": 2.5}, {"name": "meta.stackexchange.com", "weight": 3},
              {"name": "three", "weight": 1}, {"name": "gone.jsonl", "weight": 0}]
    path = tmp_path / "data_config.json"
    path.write_text(json.dumps(config), encoding="utf-8-sig")  # some editors leave a byte order mark
    one, two = (Mixture.from_config(c, folder, 8, 2, seed=4, cache_dir=tmp_path / "cache") for c in (config, path))
    assert [s.name for s in one.sources] == [c["name"] for c in config[:4]] and one.weights == [1, 2.5, 3, 1]
    assert [one.batch(s) for s in range(20)] == [two.batch(s) for s in range(20)]
    assert {len(one.batch(s).examples[0]) for s in range(64)} == {2, 3}


@pytest.mark.parametrize(("item", "words"), [
    ({"name": "plain", "wieght": 1}, "dataset 2: unknown key 'wieght'; did you mean 'weight'"), ({"name": "plain", "weight": 1, "zz": 0}, "unknown key 'zz'; the keys are"),
    ({"weight": 1}, "dataset 2: 'name' is missing"), ({"name": "plain"}, "'weight' is missing"), ({"name": "", "weight": 1}, "name is ''"),
    ({"name": 3, "weight": 1}, "name is 3"), ({"name": "plain", "weight": -2}, r"\(plain\): weight is -2"), ({"name": "plain", "weight": "2"}, "weight is '2'"),
    ({"name": "plain", "weight": True}, "weight is True"), ({"name": "plain", "weight": None}, "weight is None"), ({"name": "plain", "weight": math.nan}, "weight is nan"),
    ({"name": "plain", "weight": 1, "lines": -1}, "lines is -1"), ({"name": "plain", "weight": 1, "lines": 1.5}, "lines is 1.5"),
    ({"name": "../secret.jsonl", "weight": 1}, "leaves the data folder"), ({"name": "sub/../../secret.jsonl", "weight": 1}, "leaves the data folder"),
    ({"name": "/etc/passwd", "weight": 1}, "leaves the data folder"), ({"name": "C:\\data\\x.jsonl", "weight": 1}, "leaves the data folder"),
    ({"name": "..\\secret.jsonl", "weight": 1}, "leaves the data folder"), ({"name": "link.jsonl", "weight": 1}, "is a link that leaves the data folder"),
    ({"name": "linked/secret.jsonl", "weight": 1}, "is a link that leaves the data folder"), ({"name": "plian.jsonl", "weight": 1}, "no such file .* did you mean 'plain.jsonl'"),
    ({"name": "sub", "weight": 1}, "no such file"), ({"name": "three.jsonl.gz", "weight": 1}, "is the file of dataset 1 again"), ("plain", "expected an object"),
])
def test_bad_items_are_named(folder, item, words):
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    (folder / "linked").symlink_to(folder.parent, target_is_directory=True)
    with pytest.raises(ValueError, match=words):
        read_config([{"name": "three", "weight": 1}, item], folder)


@pytest.mark.parametrize(("content", "words"), [
    ("[]", "at least one dataset"), ('{"name": "plain", "weight": 1}', "must be a list"), ("[{", "not JSON"), ('[{"name": "plain", "weight": 0}]', "every weight is 0"), (None, "cannot read the data config")])
def test_bad_config_files_are_named(folder, tmp_path, content, words):
    path = tmp_path / "mix.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"mix.json.*{words}"):
        Mixture.from_config(path, folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_config([{"name": "a", "weight": 1}], tmp_path / "nowhere")


def test_lines_that_differ_warn_with_both_numbers(folder, tmp_path):
    with pytest.warns(UserWarning, match="says 99 lines, the file has 12 rows"):
        Mixture.from_config([{"name": "plain", "weight": 1, "lines": 99}], folder, 8, cache_dir=tmp_path)


# ---- the real files

def test_real_data_builds_and_batches(shared_data, tmp_path_factory, recwarn):
    folder = shared_data / "train"
    mixture = Mixture.from_config(folder / "data_config.json", folder, 256, 2, cache_dir=tmp_path_factory.mktemp("cache"))
    assert len(mixture.sources) == 19 and not [w for w in recwarn if "lines" in str(w.message)]
    batch = mixture.batch(539_999)
    assert batch == mixture.batch(539_999) and len(batch.examples) == 256 and len(set(batch.sources)) == 2
    report = mixture.report(2000, sample=2, identity=str.casefold)
    assert report["mixed_batches"] > 0.97  # in the pool of triplets one file owns more than half
    assert {p["columns"]: p["hard"] for p in report["pools"]} == {2: 0, 3: 256}
    for d in report["datasets"]:
        assert d["realised"] == pytest.approx(d["asked"], abs=2e-3)
    with pytest.raises(ValueError, match="trecqa_triplets.jsonl.gz: 342 rows are fewer than the 512"):
        Mixture(mixture.sources, mixture.weights, 1024, 2)
