"""What an index costs: time and memory to make one of 300,000 texts, and to search in it.

python benchmarks/index.py            # 300,000 short texts and 1,000,000 vectors: some minutes
python benchmarks/index.py --quick    # 100,000 of both: less than three minutes

The vectors come from a function that turns a text into 384 numbers in no time, so that the figures
are those of the index and not of a model: what a model needs stands in benchmarks/speed.py. Each
step runs in a process of its own. Memory is what a process needs beyond its mapped files and what
it had before the step began.
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from measure import arguments, fresh, peak_while, record, save

from contrastive_st.index import Corpus, Index, build_index

D = 384
SIZES = {"whole": (300_000, 1_000_000), "quick": (100_000, 100_000)}


def letters(texts: list) -> np.ndarray:
    "Vectors of no meaning, different for different texts, in some microseconds each."
    codes = np.frombuffer("".join(t[-64:].ljust(64) for t in texts).encode(), np.uint8)
    codes = codes.reshape(len(texts), 64).astype(np.float32)  # all letters are ASCII
    return np.concatenate([np.sin(codes * n) for n in range(1, 7)], axis=1)  # (n, 384)


def write_texts(path: Path, N: int) -> None:
    "Short sentences with an id, as a CSV."
    rng = np.random.default_rng(0)
    words = np.array("the bus stops where old trams turn near a quiet harbour at night".split())
    with open(path, "w") as file:
        file.write("id,answer\n")
        for n, chosen in enumerate(rng.integers(len(words), size=(N, 8))):
            file.write(f"a{n},{' '.join(words[chosen])} {n}\n")


def make(folder: str, precision: str) -> dict:
    "Index the texts of the CSV."
    out, corpus = Path(folder, precision), Corpus(Path(folder, "texts.csv"), "answer", "id")
    options = {"precision": precision, "progress": False}
    index, seconds, peak = peak_while(lambda: build_index(out, letters, corpus, **options))
    size = sum(path.stat().st_size for path in out.iterdir())
    return {"rows": index.rows, "seconds": seconds, "peak_mb": peak, "disk_mb": size / 1e6}


def make_random(folder: str, N: int, precision: str) -> dict:
    "Index N random vectors, each with a short text."
    rng = np.random.default_rng(0)

    def random(texts):
        return rng.standard_normal((len(texts), D), dtype=np.float32)

    texts = (f"text {n}" for n in range(N))
    out, options = Path(folder, f"random-{precision}"), {"precision": precision, "progress": False}
    _, seconds, peak = peak_while(lambda: build_index(out, random, texts, **options))
    return {"seconds": seconds, "peak_mb": peak}


WAYS = {"one query, one thread": (1, 1), "one query": (1, 2), "100 queries": (100, 2)}


def search(folder: str, name: str) -> dict:
    "Open an index and search in it: the first time, and the median of nine more."
    results = {}

    def work():
        start = time.perf_counter()
        index = Index.open(Path(folder, name))
        results["open"] = time.perf_counter() - start
        for way, (queries, threads) in WAYS.items():
            torch.set_num_threads(threads)
            vectors = np.random.default_rng(1).standard_normal((queries, D), dtype=np.float32)
            times = []
            for _ in range(10):
                start = time.perf_counter()
                index.search(vectors)
                times.append(time.perf_counter() - start)
            first, *others = times
            results[way] = {
                "first": first,
                "median": float(np.median(others)),
                "fastest": min(others),
            }

    peak = peak_while(work)[2]
    return results | {"peak_mb": peak}


def main(argv=None) -> None:
    "Measure and write."
    args = arguments(__doc__.splitlines()[0], argv)
    texts, rows = SIZES["quick" if args.quick else "whole"]
    results = record("torch") | {"quick": args.quick, "texts": texts, "random_rows": rows}
    results |= {"index": {}, "search": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder, "texts.csv"), texts)
        for precision in ("float32", "int8", "binary"):
            results["index"][precision] = fresh(make, folder, precision)
            results["index"][f"random-{precision}"] = fresh(make_random, folder, rows, precision)
            for name in (precision, f"random-{precision}"):
                results["search"][name] = fresh(search, folder, name)
    million = results["search"]["random-float32"]
    results["ratios"] = {
        "index_seconds": results["index"]["float32"]["seconds"],
        "index_peak_mb": results["index"]["float32"]["peak_mb"],
        "search_seconds": million["one query"]["median"],
        "search_peak_mb": million["peak_mb"],
    }
    save(results, {}, "index_quick" if args.quick else "index", args.out)


if __name__ == "__main__":
    main()
