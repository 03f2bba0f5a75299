"""What it costs to mine hard negatives from given vectors: CPU seconds and memory.

python benchmarks/mining.py            # 20,000 queries, 100,000 passages: about ten minutes
python benchmarks/mining.py --quick    # 2,000 and 10,000: less than a minute

Each way runs in a process of its own, on one thread, and the ways take turns. The vectors lie in
files that are mapped into memory; memory is what a process needs beyond its mapped files and what
it had before the mining began. The peer is sentence-transformers' `mine_hard_negatives` on the same
vectors, with its own number of queries at a time (16,384) and with 1,024. Last come the first two
blocks of a mining of 300,000 queries in a million passages, for its memory.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from measure import arguments, fresh, one_thread, peak_while, record, save

from contrastive_st.mining import mine_hard_negatives

D, K, RANGE, MARGIN = 384, 5, 50, 0.05
SIZES = {"whole": (20_000, 100_000), "quick": (2_000, 10_000)}


def write_vectors(folder: Path, Q: int, N: int) -> None:
    "Unit vectors in loose heaps, the answer of query n in row n of the corpus."
    rng = np.random.default_rng(0)
    heaps = rng.standard_normal((N // 100, D), dtype=np.float32)
    corpus = heaps[rng.integers(len(heaps), size=N)]
    corpus += rng.standard_normal((N, D), dtype=np.float32)
    queries = corpus[:Q] + 0.7 * rng.standard_normal((Q, D), dtype=np.float32)
    for name, x in {"queries": queries, "corpus": corpus}.items():
        np.save(folder / f"{name}.npy", x / np.linalg.norm(x, axis=1, keepdims=True))


class Mapped:
    "A model for the peer that answers with the mapped vectors."

    device = torch.device("cpu")

    def __init__(self, queries, corpus):
        self.queries, self.corpus = queries, corpus

    def encode_query(self, texts, **options):
        assert len(texts) == len(self.queries)
        return self.queries

    def encode_document(self, texts, **options):
        assert len(texts) == len(self.corpus)
        return self.corpus

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def ours(queries, corpus, texts, passages) -> list:
    "Mine with our function."
    return mine_hard_negatives(
        texts,
        passages[: len(texts)],
        passages,
        query_embeddings=queries,
        corpus_embeddings=corpus,
        num_negatives=K,
        range_max=RANGE,
        relative_margin=MARGIN,
        output_format="n-tuple",
        progress=False,
    )[0]


def peer(queries, corpus, texts, passages, at_a_time=16_384) -> list:
    "Mine with sentence-transformers' function."
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as function

    mined = function(
        Dataset.from_dict({"anchor": texts, "positive": passages[: len(texts)]}),
        Mapped(queries, corpus),
        corpus=passages,
        num_negatives=K,
        range_max=RANGE,
        relative_margin=MARGIN,
        output_format="n-tuple",
        faiss_batch_size=at_a_time,
        verbose=False,
    )
    return [tuple(row.values()) for row in mined]


def peer_1024(*args) -> list:
    "Mine with sentence-transformers' function, 1,024 queries at a time."
    return peer(*args, at_a_time=1024)


WAYS = {"ours": ours, "peer": peer, "peer_1024": peer_1024}


def measured(way: str, folder: Path) -> dict:
    "Run one way -> CPU seconds, peak MB, and its examples as one number."
    one_thread()
    queries, corpus = (np.load(folder / f"{n}.npy", mmap_mode="c") for n in ("queries", "corpus"))
    texts = [f"question {n}" for n in range(len(queries))]
    passages = [f"passage {n}" for n in range(len(corpus))]
    WAYS[way](queries[:64], corpus[:512], texts[:64], passages[:512])  # imports, first allocations
    start = time.process_time()
    examples, _, peak = peak_while(lambda: WAYS[way](queries, corpus, texts, passages))
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak_mb": peak, "examples": len(examples), "all": examples}


def agreement(ours: list, peer: list) -> float:
    "Share of the queries with the same negatives in the same order."
    table = {row[0]: row for row in peer}
    return sum(table.get(row[0]) == row for row in ours) / max(len(ours), len(peer))


def compare(Q: int, N: int, rounds: int) -> dict:
    "All ways in turns, another first each round."
    runs, examples = {name: [] for name in WAYS}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), Q, N)
        names = list(WAYS)
        for r in range(rounds):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                run = fresh(measured, name, Path(folder))
                examples[name] = run.pop("all")
                runs[name].append(run)
                print(f"{name:10} {run['seconds']:6.1f} s {run['peak_mb']:8.0f} MB", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in several) for key in several[0]}
        for name, several in runs.items()
    }
    same = {name: agreement(examples["ours"], examples[name]) for name in names[1:]}
    return {"queries": Q, "passages": N, "runs": runs, "medians": medians, "same": same}


class Enough(Exception):
    "Some blocks were mined."


def large(Q: int, N: int, blocks: int) -> float:
    "Peak MB of the first blocks of a large mining, all texts and vectors read; 64 wide."
    one_thread()
    rng, calls = np.random.default_rng(0), 0
    texts, passages = [f"question {n}" for n in range(Q)], [f"passage {n}" for n in range(N)]

    def rescore(pairs):
        nonlocal calls
        calls += 1
        if calls > blocks * -(-4096 * RANGE // 8192):
            raise Enough
        return np.zeros(len(pairs))

    with tempfile.TemporaryDirectory() as folder:
        for name, n in {"queries": Q, "corpus": N}.items():
            np.save(f"{folder}/{name}.npy", rng.standard_normal((n, 64), dtype=np.float32))
        vectors = [np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("queries", "corpus")]

        def work():
            try:
                mine_hard_negatives(
                    texts,
                    passages[:Q],
                    passages,
                    query_embeddings=vectors[0],
                    corpus_embeddings=vectors[1],
                    num_negatives=K,
                    rescore=rescore,
                    path=f"{folder}/mined.jsonl",
                    progress=False,
                )
            except Enough:
                pass

        return peak_while(work)[2]


def ratios(results: dict) -> dict:
    "Times by which we are faster, and smaller."
    medians, table = results["medians"], {}
    for name in ("peer", "peer_1024"):
        for key in ("seconds", "peak_mb"):
            table[f"{name}_{key}_over_ours"] = medians[name][key] / medians["ours"][key]
    table["rows_a_second"] = results["queries"] / medians["ours"]["seconds"]
    table["peak_mb"] = medians["ours"]["peak_mb"]
    table["large_peak_mb"] = results["large"]["peak_mb"]
    table["same_as_peer"] = results["same"]["peer"]
    return table


def main(argv=None) -> None:
    "Measure and write."
    args = arguments(__doc__.splitlines()[0], argv)
    results = compare(*SIZES["quick" if args.quick else "whole"], rounds=1 if args.quick else 2)
    results = record("torch", "sentence-transformers") | results
    size = (3_000, 10_000) if args.quick else (300_000, 1_000_000)
    peak = fresh(large, *size, 2)
    results["large"] = {"queries": size[0], "passages": size[1], "peak_mb": peak}
    results["ratios"] = ratios(results)
    save(results, {}, "mining_quick" if args.quick else "mining", args.out)


if __name__ == "__main__":
    main()
