"""Which hard negatives make a better encoder, and how many of them are false?

python benchmarks/negatives.py             # half an hour of one thread; a second call goes on
python benchmarks/negatives.py --quick     # a few steps of one seed, three minutes
python benchmarks/negatives.py --summary   # the record of the seeds that are finished; no run

A small encoder learns from pairs of eight sets. Two of them come from corpora full of
near-duplicates: five captions of each photograph, ten simplifications of each sentence. One
caption is marked as the positive, the other three are not, so a miner that finds one of them has
found a false negative, and here we know it. Every arm sees the same pairs and adds another
negative to each. Every finished run leaves a file in `runs/negatives`.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from measure import HERE, one_thread, real_data, record, write
from scipy.stats import rankdata
from scipy.stats import t as student

from contrastive_st.data import Retrieval, Source, read_examples, read_retrieval, read_sts
from contrastive_st.evaluation import (
    evaluate_sts,
    retrieval_by_query,
    sts_cosines,
)
from contrastive_st.index import Index, build_index, is_index
from contrastive_st.mining import mine_hard_negatives
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.notebook import encode_once
from contrastive_st.run import TrainConfig
from contrastive_st.trainer import train

GUIDE = "guide.index"  # folder of the vectors of all texts to train on
MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # mines and guides
LAYERS = 3  # of it that the encoder begins with, which learns
LENGTH, CUT = 32, 160  # tokens and characters of a text that are read
BATCH, RATE, STEPS = 64, 2e-4, 50
SEEDS = (1, 2, 3)
NEAR = ("flickr30k_captions", "asset_simplification")  # corpora of near-duplicates
PLAIN = (
    "medquad_question_answer",
    "stackoverflow_title_code",
    "nl2bash",
    "agnews_title_description",
    "qnli_dev_pairs",
    "inspec_title_abstract",
)
# Half of the rows come from the corpora of near-duplicates.
WEIGHTS = {NEAR[0]: 4, NEAR[1]: 2} | dict.fromkeys(PLAIN, 1)


class Arm(NamedTuple):
    "How a run gets its negatives."

    label: str  # in tables
    mining: dict | None  # options of mine_hard_negatives; None = no negative
    guarded: bool = False  # whether a guide watches over every batch
    knows: bool = False  # whether the groups of near-duplicates are given as ids


MARGIN = {"relative_margin": 0.05, "range_max": 100}
ARMS = {
    "none": Arm("no hard negative", None),
    "random": Arm("random", {"sampling": "random", "range_max": 10**6}),
    "naive": Arm("mined, naive", {}),
    "margin": Arm("mined, 5% margin", MARGIN),
    "margin_guard": Arm("mined, 5% margin, guard", MARGIN, guarded=True),
    "naive_guard": Arm("mined, naive, guard", {}, guarded=True),
    "truth": Arm("mined, truth known", {}, knows=True),
}
MAIN = tuple(ARMS)[:5]  # what was asked; the other two say how far a rule could go
# Miners whose false negatives are counted: nothing is trained on most of them.
RULES = {
    "random": ARMS["random"].mining,
    "naive": {},
    "from rank 10": {"range_min": 10},
    "score at most 0.5": {"max_score": 0.5, "range_max": 100},
    "5% margin": MARGIN,
    "10% margin": MARGIN | {"relative_margin": 0.1},
    "20% margin": MARGIN | {"relative_margin": 0.2},
}
COMPARED = (
    *(("none", arm) for arm in ARMS if arm != "none"),
    ("random", "naive"),
    ("random", "margin"),
    ("naive", "margin"),
    ("margin", "margin_guard"),
    ("naive", "naive_guard"),
    ("naive", "truth"),
    ("margin", "truth"),
)


# ---- data


class Groups(NamedTuple):
    "Texts that say the same, a group each."

    train: list[list[str]]  # the first two are a pair, the others are not marked
    held: list[list[str]]  # the first one is a query, the others answer it


def grouped(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    "All texts that can be reached from pair to pair, a list for each group, in file order."
    near = {}
    for a, b in pairs:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    seen, groups = set(), []
    for first in near:
        if first in seen:
            continue
        group, waiting = [], [first]
        while waiting:
            if (text := waiting.pop()) not in seen:
                seen.add(text)
                group.append(text)
                waiting += near[text]
        groups.append(group)
    return groups


def near_duplicates(name: str, held: int, most: int) -> Groups:
    "Held-out groups first, then those to train on; a group has five texts, or six and more."
    pairs = [tuple(text[:CUT] for text in row[:2]) for row in read_examples(train_file(name))]
    groups = grouped(pairs)
    sizes = (5,) if name == NEAR[0] else range(6, 12)
    groups = [group for group in groups if len(group) in sizes]
    return Groups(groups[held : held + most], groups[:held])


def train_file(name: str) -> Path:
    "The file of a set of pairs."
    return real_data() / f"train/{name}.jsonl.gz"


def split(name: str, held: int, most: int) -> tuple[list, list]:
    "Rows to train on and rows held out; no text stands on both sides, none twice among the latter."
    rows = [tuple(text[:CUT] for text in row[:2]) for row in read_examples(train_file(name))]
    rows = list(dict.fromkeys(rows))[:20_000]
    exam, known = [], set()
    for row in rows:
        if len(exam) < min(held, len(rows) // 5) and not known & set(row):
            exam.append(row)
            known |= set(row)
    return [row for row in rows if not known & set(row)][:most], exam


class Data(NamedTuple):
    "What all runs share."

    near: dict[str, Groups]
    plain: dict[str, list]  # rows to train on
    exams: dict[str, Retrieval]  # search, a set each
    near_exams: dict[str, Retrieval]  # search among near-duplicates
    sts: tuple


def as_exam(rows: list) -> Retrieval:
    "Held-out rows: each anchor looks for its positive among those of the set."
    ids = [str(i) for i in range(len(rows))]
    return Retrieval(
        dict(zip(ids, (row[1] for row in rows))),
        dict(zip(ids, (row[0] for row in rows))),
        {i: {i: 1} for i in ids},
    )


def as_near_exam(groups: list) -> Retrieval:
    "The first text of each group looks for all others."
    corpus, queries, qrels = {}, {}, {}
    for q, (query, *others) in enumerate(groups):
        ids = {f"{q}-{i}": text for i, text in enumerate(others)}
        queries[f"query-{q}"], qrels[f"query-{q}"] = query, dict.fromkeys(ids, 1)
        corpus |= ids
    return Retrieval(corpus, queries, qrels)


def load(quick: bool) -> Data:
    "Read everything."
    part = 10 if quick else 1
    near = {
        NEAR[0]: near_duplicates(NEAR[0], 500 // part, 1500 // part),
        NEAR[1]: near_duplicates(NEAR[1], 150 // part, 600 // part),
    }
    listed = json.loads((real_data() / "train/data_config.json").read_text())
    names = [Path(entry["name"]).name.split(".")[0] for entry in listed]
    rows = {name: split(name, 100, 1000 // part) for name in names if name not in NEAR}
    exams = {name: as_exam(exam) for name, (_, exam) in rows.items()}
    exams["cranfield"] = read_retrieval(real_data() / "retrieval/cranfield")
    near_exams = {name: as_near_exam(groups.held) for name, groups in near.items()}
    plain = {name: rows[name][0] for name in PLAIN}
    return Data(near, plain, exams, near_exams, read_sts(real_data() / "stsb/test.tsv"))


# ---- mining


class Pairs(NamedTuple):
    "The pairs of a set, its corpus, and which texts say the same."

    queries: list[str]
    positives: list[str]
    corpus: list[str]
    group: dict[str, int]  # text -> number of its group; {} if it is not known


def pairs_of(data: Data) -> dict[str, Pairs]:
    "The pairs to train on, set by set."
    table = {}
    for name, groups in data.near.items():
        queries, positives = (list(column) for column in zip(*(g[:2] for g in groups.train)))
        group = {text: n for n, texts in enumerate(groups.train) for text in texts}
        table[name] = Pairs(queries, positives, list(group), group)
    for name, rows in data.plain.items():
        queries, positives = (list(column) for column in zip(*rows))
        table[name] = Pairs(queries, positives, list(dict.fromkeys(positives)), {})
    return table


def mined(pairs: Pairs, arm: Arm, vectors, fill: bool = True) -> tuple[dict, dict]:
    "Mine for an arm -> (query, positive) -> negative, and what the report counts."
    ids = {}
    if arm.knows and pairs.group:
        columns = {"query_ids": pairs.queries, "positive_ids": pairs.positives}
        columns["corpus_ids"] = pairs.corpus
        ids = {name: [pairs.group[text] for text in column] for name, column in columns.items()}
    rows, report = mine_hard_negatives(
        pairs.queries,
        pairs.positives,
        pairs.corpus,
        query_embeddings=vectors(pairs.queries),
        corpus_embeddings=vectors(pairs.corpus),
        num_negatives=1,
        # Filled up at random, so that all arms train on the same pairs.
        too_few="fill" if fill else "drop",
        progress=False,
        **ids,
        **arm.mining,
    )
    return {row[:2]: row[2] for row in rows}, counted(rows, report, pairs.group)


def counted(rows: list, report, group: dict) -> dict:
    "How many negatives there are, how hard they are, and how many of them are false."
    counts = report.counts
    result = {
        "negatives": counts["negatives"],
        "short": counts["short"],  # queries for which the rules left too few
        "suspected": counts["suspected"],  # score within 5% of the positive, or above
        "filled": counts["filled"],
        "mean_score": float(report.negative_scores.mean()),
        # A guide with margin 0 keeps just these out.
        "above_positive": float((report.margins < 0).mean()),
    }
    if group:
        false = np.array([group[query] == group[negative] for query, _, negative in rows])
        left = report.margins >= 0  # by the guide
        result |= {"false": int(false.sum()), "share": float(false.mean())}
        result |= {"left_by_guide": int(left.sum()), "share_left": float(false[left].mean())}
    return result


def false_by_rule(data: Data, guide: Path) -> dict:
    "What each rule finds in the corpora of near-duplicates, and what the guide leaves of it."
    vectors, pairs = table_of_vectors(Index.open(guide)), pairs_of(data)
    return {
        name: {
            rule: mined(pairs[name], Arm(rule, options), vectors, fill=False)[1]
            for rule, options in RULES.items()
        }
        for name in NEAR
    }


def table_of_vectors(index: Index):
    "A function from texts to their vectors in the index."
    row = {text: n for n, text in enumerate(index.table["text"].to_pylist())}
    return lambda texts: np.asarray(index.vectors[[row[text] for text in texts]], np.float32)


def mine_all(data: Data, guide: Path) -> tuple[dict, dict]:
    "Mine for all arms -> arm -> set -> rows to train on, and the counts."
    pairs, rows, counts = pairs_of(data), {arm: {} for arm in ARMS}, {}
    if not is_index(guide):
        texts = dict.fromkeys(t for p in pairs.values() for t in [*p.queries, *p.corpus])
        miner = SentenceEncoder.from_pretrained(MODEL, max_length=LENGTH)
        build_index(guide, miner, list(texts), progress=False)
    vectors = table_of_vectors(Index.open(guide))
    for name, some in pairs.items():
        done, negatives = {}, {}  # arms that mine in the same way share what is found
        for arm, how in ARMS.items():
            if how.mining is not None:
                key = repr((how.mining, how.knows))
                done[key] = done.get(key) or mined(some, how, vectors)
                negatives[arm], counts.setdefault(arm, {})[name] = done[key]
        known = list(zip(some.queries, some.positives))
        shared = [row for row in known if all(row in found for found in negatives.values())]
        rows["none"][name] = shared
        for arm, found in negatives.items():
            rows[arm][name] = [(*row, found[row]) for row in shared]
    return rows, counts


# ---- a run


def start(layers: int = LAYERS) -> SentenceEncoder:
    "The lower layers of the pretrained encoder: it knows words, and not yet what to make of them."
    whole = SentenceEncoder.from_pretrained(MODEL, max_length=LENGTH)
    backbone = whole.backbone
    backbone.encoder.layer = backbone.encoder.layer[:layers]
    backbone.config.num_hidden_layers = layers
    return SentenceEncoder(backbone, whole.tokenizer, max_length=LENGTH).eval()


def config_of(arm: Arm, seed: int, guide: Path, steps: int) -> TrainConfig:
    "All numbers of a run."
    guard = {"guard": "guide", "guide": str(guide)} if arm.guarded else {}
    return TrainConfig(
        steps=steps,
        warmup=max(1, steps // 10),
        lr=RATE,
        symmetric=False,  # as triplets have it
        bf16=True,
        seed=seed,
        log_every=max(1, steps // 4),
        **guard,
    )


def exam(encoder: SentenceEncoder, data: Data) -> dict:
    "All figures of an encoder; nDCG@10 query by query, for paired comparisons."
    encode = partial(encoder.encode, progress=False, bf16=True)
    once = encode_once(_Plain(encode))

    def by_query(exams):
        table = {}
        for name, some in exams.items():
            figures = retrieval_by_query(once, *some, ks=(10,), similarity="cos")
            table[name] = [round(figure["ndcg@10"], 4) for figure in figures.values()]
        return table

    cosines = sts_cosines(once, data.sts)
    return {
        "spearman": evaluate_sts(once, data.sts, resamples=0, similarity="cos")["spearman"],
        "cosines": [round(float(x), 4) for x in cosines],
        "search": by_query(data.exams),
        "near": by_query(data.near_exams),
    }


class _Plain(NamedTuple):
    "A function that stands for an encoder."

    encode: object


def one_run(arm: str, seed: int, rows: dict, data: Data, guide: Path, steps: int) -> dict:
    "Train, then measure."
    begin = time.process_time()
    encoder = start()
    sources = [Source(some, name) for name, some in rows[arm].items()]
    mixture = Mixture(sources, [WEIGHTS[s.name] for s in sources], BATCH, 2, seed)
    train(encoder, mixture, config_of(ARMS[arm], seed, guide, steps), progress=False)
    trained = time.process_time()
    figures = exam(encoder, data)
    seconds = {"train": trained - begin, "exam": time.process_time() - trained}
    return figures | {"cpu_seconds": seconds, "date": time.strftime("%Y-%m-%d")}


def saved(file: Path, make) -> dict:
    "What a file holds; if it is not there yet, make it and write it whole."
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make()))
        part.replace(file)
        print(f"{time.strftime('%H:%M:%S')} {file.stem} {line_of(json.loads(file.read_text()))}")
        sys.stdout.flush()
    return json.loads(file.read_text())


def line_of(run: dict) -> str:
    "The figures of a run in a line."
    values = means(run)
    figures = " ".join(f"{name} {100 * value:.2f}" for name, value in values.items())
    return f"{figures}; {sum(run.get('cpu_seconds', {}).values()):.0f} s"


# ---- the summary


def means(run: dict) -> dict[str, float]:
    "The figures of a run by name: STS-B, the mean over sets, and each corpus of near-duplicates."
    sets = {name: statistics.mean(values) for name, values in run["search"].items()}
    near = {name: statistics.mean(values) for name, values in run["near"].items()}
    return {
        "sts": run["spearman"],
        "search": statistics.mean(sets.values()),
        "near": statistics.mean(near.values()),
    } | near


def over_seeds(values: list[float]) -> dict[str, float]:
    "Mean, with Student's 95% interval over seeds."
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return {"mean": mean}
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


def draws_of(runs: list[dict], gold, resamples: int = 1000, seed: int = 0) -> dict:
    "The measures of `means` on all queries or pairs, then on resamples of them: (1 + R,) each."
    rng, tables = np.random.default_rng(seed), {"search": {}, "near": {}}

    def drawn(n: int) -> np.ndarray:
        "All row numbers, then resamples of them: (1 + R, n). They are the same for every arm."
        return np.vstack([np.arange(n), rng.integers(n, size=(resamples, n))])

    # Queries are drawn within their set, so that each resample weighs the sets as the mean does.
    for part, table in tables.items():
        for name in runs[0][part]:
            values = np.mean([run[part][name] for run in runs], axis=0)  # over seeds
            table[name] = values[drawn(len(values))].mean(axis=1)
    rows = drawn(len(gold))
    wanted = standard_ranks(np.asarray(gold)[rows])
    cosines = (standard_ranks(np.asarray(run["cosines"])[rows]) for run in runs)
    sts = np.mean([(some * wanted).mean(axis=1) for some in cosines], axis=0)
    parts = {part: np.mean(list(table.values()), axis=0) for part, table in tables.items()}
    return {"sts": sts} | parts | tables["near"]


def standard_ranks(values: np.ndarray) -> np.ndarray:
    "Ranks of each row with mean 0 and deviation 1: Spearman is the mean of their products."
    ranks = rankdata(values, axis=1)
    return (ranks - ranks.mean(axis=1, keepdims=True)) / ranks.std(axis=1, keepdims=True)


def difference(first: list[dict], second: list[dict], draws: tuple[dict, dict]) -> dict:
    "Second minus first: over seeds, and paired over queries or sentence pairs."
    a, b = (list(map(means, runs)) for runs in (first, second))
    result = {k: {"seeds": over_seeds([y[k] - x[k] for x, y in zip(a, b)])} for k in a[0]}
    for name, figures in result.items():
        gains = draws[1][name] - draws[0][name]
        low, high = map(float, np.percentile(gains[1:], [2.5, 97.5]))
        figures["drawn"] = {"mean": float(gains[0]), "low": low, "high": high}
    return result


def finished(work: Path) -> dict[str, list[dict]]:
    "The runs of each arm, of the seeds of which all five main arms are there."
    files = {(arm, seed): work / f"{arm}-{seed}.json" for arm in ARMS for seed in SEEDS}
    runs = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    seeds = [seed for seed in SEEDS if all((arm, seed) in runs for arm in MAIN)]
    if not seeds:
        sys.exit("no seed is finished in all five arms; call this again without --summary")
    arms = [arm for arm in ARMS if all((arm, seed) in runs for seed in seeds)]
    return {arm: [runs[arm, seed] | {"seed": seed} for seed in seeds] for arm in arms}


def figures_of(runs: list[dict]) -> dict:
    "All figures of an arm over its seeds, and search set by set."
    table = list(map(means, runs))
    figures = {name: over_seeds([values[name] for values in table]) for name in table[0]}
    by_set = {
        name: statistics.mean(x for run in runs for x in run["search"][name])
        for name in runs[0]["search"]
    }
    return figures | {"by_set": by_set}


def summary(work: Path, data: Data) -> dict:
    "All figures of what is finished."
    runs = finished(work)
    draws = {arm: draws_of(several, data.sts[2]) for arm, several in runs.items()}
    every = [run for several in runs.values() for run in several]
    before = {name: means(json.loads((work / f"{name}.json").read_text())) for name in BEFORE}
    compared = {
        f"{b} - {a}": difference(runs[a], runs[b], (draws[a], draws[b]))
        for a, b in COMPARED
        if {a, b} <= runs.keys()
    }
    return {
        "seeds": [run["seed"] for run in runs["none"]],
        "labels": {arm: ARMS[arm].label for arm in runs},
        "before": before,
        "arms": {arm: figures_of(several) for arm, several in runs.items()},
        "differences": compared,
        "exams": {name: len(some.queries) for name, some in (data.exams | data.near_exams).items()},
        "cpu_minutes": sum(sum(run["cpu_seconds"].values()) for run in every) / 60,
        "run_on": sorted({run["date"] for run in every}),
    }


# ---- the program

BEFORE = {"start": LAYERS, "whole": 6}  # layers of encoders that are measured as they come


def run_all(work: Path, seeds: tuple, steps: int, rows: dict, data: Data) -> None:
    "Run what is not finished, the five main arms of each seed first."
    for name, layers in BEFORE.items():
        saved(work / f"{name}.json", partial(before_training, layers, data))
    order = [(arm, seed) for seed in seeds for arm in MAIN]
    order += [(arm, seed) for seed in seeds for arm in ARMS if arm not in MAIN]
    for arm, seed in order:
        make = partial(one_run, arm, seed, rows, data, work / GUIDE, steps)
        saved(work / f"{arm}-{seed}.json", make)


def before_training(layers: int, data: Data) -> dict:
    "The figures of the lower layers as they come."
    return exam(start(layers), data)


def arguments(argv=None) -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a few steps of one seed")
    add("--summary", action="store_true", help="write what is finished, run nothing")
    add("--out", type=Path, default=HERE / "results", help="folder for the JSON")
    add("--work", type=Path, default=HERE.parent / "runs", help="folder of the runs")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    "Mine, run what is not finished, and write the record."
    args = arguments(argv)
    one_thread()
    warnings.filterwarnings("ignore", message=".*longer than max_length")
    name = "negatives_quick" if args.quick else "negatives"
    work, seeds, steps = args.work / name, SEEDS, STEPS
    if args.quick:
        seeds, steps = SEEDS[:1], 3
    data = load(args.quick)
    rows, counts = mine_all(data, work / GUIDE)
    if not args.summary:
        run_all(work, seeds, steps, rows, data)
    settings = {"steps": steps, "batch": BATCH, "lr": RATE, "layers": LAYERS, "model": MODEL}
    settings["rows"] = {name: len(some) for name, some in rows["none"].items()}
    results = record("torch", "transformers") | {"quick": args.quick, "settings": settings}
    results |= summary(work, data)
    results["command"] = results["command"].replace(" --summary", "")  # which made the runs
    results["mined"] = {arm: some for arm, some in counts.items() if not ARMS[arm].guarded}
    results["false_by_rule"] = false_by_rule(data, work / GUIDE)
    write(results, name, args.out)


if __name__ == "__main__":
    main()
