"""What the benchmarks share: one thread, turns, medians, memory, and where it was measured.

python benchmarks/measure.py  # a second: writes the table of README.md anew from results/*.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
from matplotlib.figure import Figure

from contrastive_st.machine import processor_name

HERE = Path(__file__).resolve().parent


def one_thread() -> None:
    "Keep every library to one thread, in this process and in its children."
    os.environ.update(
        TOKENIZERS_PARALLELISM="false",
        RAYON_NUM_THREADS="1",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def interleaved(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    "Measure CPU seconds, all threads, of each way; the ways take turns, another first each round."
    names, seconds = list(ways), {name: [] for name in ways}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.process_time()
            ways[name](r)
            seconds[name].append(time.process_time() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    "Median and quartiles."
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q1": low, "q3": high}


def memory() -> dict[str, float]:
    "Return this process's resident MB: in all, its own (anonymous), and pages of mapped files."
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon", "RssFile")
    }


def peak_while(work) -> tuple:
    "Its result, seconds, and how many MB of its own the process had more at most, looked at often."
    before, peak, done = memory()["RssAnon"], 0.0, threading.Event()

    def look():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, memory()["RssAnon"])

    watcher = threading.Thread(target=look)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return result, seconds, max(peak - before, 0.0)


def fresh(function: Callable, *args):
    "The result of a function in a new process."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def real_data() -> Path:
    "Where the folder of the real files is, or would be."
    return Path(
        os.environ.get("CONTRASTIVE_ST_DATA", HERE.parent / ".." / "shared" / "data")
    ).resolve()


def hardware() -> str:
    "Processor and memory of this machine."
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor_name()}, {size:.0f} GiB"


def record(*packages: str) -> dict:
    "Where and with what a result was measured."
    options = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("contrastive_st", "numpy", "pyarrow", *packages)},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *options]),
    }


def arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    "The command line of a benchmark."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a rough figure in less than a minute")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder for the JSON and the plots"
    )
    return parser.parse_args(argv)


def rounded(value, digits: int = 4):
    "The same JSON with `digits` significant digits, which is more than the clock is good for."
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write(results: dict, name: str, out: Path) -> None:
    "Write NAME.json."
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(rounded(results), indent=1) + "\n")


def save(results: dict, figures: dict[str, Figure], name: str, out: Path) -> None:
    "Write NAME.json, the plots and the table of this folder's README.md; print the ratios last."
    write(results, name, out)
    for suffix, figure in figures.items():
        figure.savefig(out / f"{name}_{suffix}.png", dpi=120)
    if out.resolve() == HERE / "results":
        write_table(HERE / "README.md", out)
    print(json.dumps(rounded(results["ratios"])))


# ---- the table of README.md


def ratio_rows(name: str, subject: str, *rows: tuple[str, str, str, str]) -> list[tuple]:
    "Rows of one file's ratios: of each its key, what it is of the subject, target and form."
    return [(name, ("ratios", key), f"{subject}, {what}", *rest) for key, what, *rest in rows]


# file, keys, what, target, how to write it
ROWS = (
    (
        "data_order",
        ("ratios", "batch_at_540000_over_batch_at_0"),
        "a batch at step 540,000 against step 0, from nothing",
        "< 1.5",
        "{:.2f} times",
    ),
    (
        "data_order",
        ("ratios", "resident_mb_more_at_1.1B_rows_than_at_1M"),
        "resident memory at 1.1 billion rows against 1 million",
        "< 50 MB more",
        "{:.1f} MB more",
    ),
    (
        "data_order",
        ("run_us_per_row", "ours_540000", "median"),
        "finding a row, in a run",
        "",
        "{:.2f} µs",
    ),
    (
        "data_order",
        ("run_us_per_row", "grain_540000", "median"),
        "the same in grain",
        "",
        "{:.1f} µs",
    ),
    (
        "data_order",
        ("ratios", "permutation_mb_at_1.1B_rows_computed"),
        "a stored permutation of 1.1 billion rows (computed)",
        "",
        "{:,.0f} MB",
    ),
    *(
        (
            "data_input",
            ("pairs_per_second_per_core", kind, way),
            f"{kind} texts, {words}",
            "≥ 200,000" if way == "pretokenised" else "",
            "{:,.0f} pairs/s",
        )
        for kind in ("short", "mixed")
        for way, words in (
            ("seeds", "the released script's way"),
            ("datasets", "`datasets`, row by row"),
            ("datasets_blocks", "`datasets`, in blocks"),
            ("tokenizer", "the tokenizer alone"),
            ("on_the_fly", "ours, tokenised on the fly"),
            ("pretokenised", "ours, from tokens"),
        )
    ),
    (
        "data_input",
        ("ratios", "short", "on_the_fly_over_seeds"),
        "short texts, ours on the fly against the released script's way",
        "≥ 5",
        "{:.1f} times",
    ),
    (
        "data_input",
        ("ratios", "mixed", "on_the_fly_over_seeds"),
        "mixed texts, ours on the fly against the released script's way",
        "≥ 2.2",
        "{:.1f} times",
    ),
    (
        "data_input",
        ("ratios", "short", "on_the_fly_over_tokenizer"),
        "short texts, ours on the fly against the tokenizer alone",
        "≥ 0.9",
        "{:.2f} times",
    ),
    (
        "data_input",
        ("ratios", "mixed", "on_the_fly_over_tokenizer"),
        "mixed texts, ours on the fly against the tokenizer alone",
        "≥ 0.9",
        "{:.2f} times",
    ),
    (
        "data_input",
        ("ratios", "rows_of_stores"),
        "a store with this many times the rows ...",
        "",
        "{:.0f} times",
    ),
    (
        "data_input",
        ("ratios", "anonymous_mb_more"),
        "... needs this much more memory of its own",
        "",
        "{:.1f} MB more",
    ),
    (
        "data_input",
        ("ratios", "parsing"),
        "parsing lines, isal and orjson against gzip and json",
        "",
        "{:.1f} times",
    ),
    (
        "data_input",
        ("files", "prepare_rows_per_second"),
        "writing a store, texts and identities",
        "",
        "{:,.0f} rows/s",
    ),
    (
        "data_input",
        ("files", "tokenise_rows_per_second"),
        "adding tokens to a store",
        "",
        "{:,.0f} rows/s",
    ),
    *(
        (
            "speed",
            ("cases", case, "ratios", f"{peer} / {ours}", "median"),
            f"{what}, {ours} against {peer}",
            target,
            "{:.2f} times",
        )
        for case, peer, ours, what, target in (
            ("train_64", "peer fp32", "ours bf16", "training on short pairs, batch 64", "≥ 5"),
            ("train_64", "peer bf16", "ours bf16", "training on short pairs, batch 64", "≥ 2.5"),
            ("train_64", "peer fp32", "ours fp32", "training on short pairs, batch 64", ""),
            ("train_64", "peer tuned", "ours bf16", "training on short pairs, batch 64", ""),
            ("train_128", "peer fp32", "ours bf16", "the same, batch 128", "≥ 5"),
            ("train_128", "peer bf16", "ours bf16", "the same, batch 128", "≥ 2.5"),
            ("train_256", "peer bf16", "ours bf16", "the same, batch 256", ""),
            ("train_1024", "peer cached bf16", "ours bf16", "the same, batch 1,024", "≥ 2.5"),
            (
                "train_long",
                "peer bf16",
                "ours bf16",
                "training on questions and answers of 250 word pieces",
                "≥ 1.5",
            ),
            *(
                (case, peer, "ours bf16", f"encoding {what}", target)
                for case, what, targets in (
                    ("encode_short", "short sentences", ("≥ 4", "≥ 1.4", "≥ 1.1")),
                    ("encode_passages", "passages of 170 word pieces", ("≥ 4", "≥ 1.5", "≥ 1.0")),
                    ("encode_long", "answers of 250 word pieces", ("", "", "")),
                )
                for peer, target in zip(("peer fp32", "peer bf16", "peer OpenVINO"), targets)
            ),
        )
    ),
    (
        "speed",
        ("cases", "train_64", "share", "ours bf16", "median"),
        "share of the bf16 matrix products' ceiling, training on short pairs",
        "≥ 50%",
        "{:.0%}",
    ),
    (
        "speed",
        ("cases", "train_64", "share", "peer bf16", "median"),
        "the same of the peer",
        "",
        "{:.0%}",
    ),
    (
        "speed",
        ("whole", "ratio", "median"),
        "a whole run from random weights, ours bf16 against peer bf16",
        "≥ 2",
        "{:.2f} times",
    ),
    (
        "speed",
        ("whole", "means", "ours bf16", "test"),
        "its STS-B test correlation x 100, ours",
        "≥ the peer's - 0.5",
        "{:.2f}",
    ),
    ("speed", ("whole", "means", "peer bf16", "test"), "the same of the peer", "", "{:.2f}"),
    *(
        (
            "xla",
            ("ways", way, name),
            f"{what} in 60 training steps on XLA, {whose}",
            target if way == "ours" else "",
            "{:,.0f}" + unit,
        )
        for name, what, target, unit in (
            (
                "compilations",
                "programs compiled",
                "one for each bucket, one to copy the weights",
                "",
            ),
            ("waits", "waits of the loop for the device", "0", ""),
            ("seconds", "seconds", "", " s"),
        )
        for way, whose in (
            ("ours", "ours"),
            ("transformers", "transformers' Trainer"),
            ("sentence_transformers", "sentence-transformers' trainer"),
        )
    ),
    *ratio_rows(
        "serve",
        "a service under 50 clients",
        ("texts_per_s_of_50_clients", "requests of one text", "", "{:,.0f} a second"),
        ("together_over_alone", "against a forward for each request", "", "{:.2f} times"),
        ("together_over_loop", "against a Python loop, text by text", "", "{:.2f} times"),
        ("cpu_of_loop_over_together", "CPU time of a loop's text by ours", "", "{:.2f} times"),
        ("p50_ms", "median time of an answer", "", "{:.0f} ms"),
        ("p95_ms", "95th percentile", "", "{:.0f} ms"),
    ),
    *ratio_rows(
        "tiled",
        "the tiled loss",
        ("tiled_over_plain_peak_mb_at_8192", "memory of the plain one at 8,192", "", "{:.2f}"),
        ("tiled_over_plain_seconds_at_8192", "time of the plain one at 8,192", "", "{:.2f}"),
        ("tiled_peak_mb_at_65536", "memory at 65,536", "≤ 1,000 MB", "{:,.0f} MB"),
        ("one_matrix_mb_at_65536", "one matrix of scores there (computed)", "", "{:,.0f} MB"),
    ),
    *(
        ("index", keys, what, target, how)
        for keys, what, target, how in (
            (
                ("ratios", "index_seconds"),
                "an index of 300,000 texts whose vectors cost nothing",
                "",
                "{:.1f} s",
            ),
            (("ratios", "index_peak_mb"), "its memory at most", "≤ 500 MB", "{:,.0f} MB"),
            (
                ("ratios", "search_seconds"),
                "one query in 1,000,000 x 384 vectors, exact, two threads",
                "≤ 1 s",
                "{:.2f} s",
            ),
            (
                ("search", "random-float32", "one query, one thread", "median"),
                "the same on one thread",
                "",
                "{:.2f} s",
            ),
            (("ratios", "search_peak_mb"), "memory beside the mapped vectors", "", "{:,.0f} MB"),
        )
    ),
    *ratio_rows(
        "mining",
        "mining hard negatives",
        ("rows_a_second", "20,000 queries in 100,000 passages", "", "{:,.0f} queries/s"),
        ("peer_seconds_over_ours", "CPU time of the peer by ours", "≥ 1", "{:.2f} times"),
        ("peer_peak_mb_over_ours", "memory of the peer by ours", "≥ 10", "{:.1f} times"),
        ("peak_mb", "memory beside the mapped vectors", "", "{:,.0f} MB"),
        ("large_peak_mb", "300,000 queries in 1,000,000", "≤ 2,000 MB", "{:,.0f} MB"),
        ("same_as_peer", "queries with the negatives of the peer", "100%", "{:.1%}"),
    ),
    *ratio_rows(
        "guard",
        "a training step with a guard",
        *(
            (f"{way}_percent_at_{B}", f"{what}, batch of {B}", "", "{:+.1f}%")
            for way, what in (
                ("self", "by the model itself"),
                ("stored", "by stored vectors"),
                ("encoder", "by another encoder of the same size"),
            )
            for B in (64, 256)
        ),
    ),
    *(
        (
            "families",
            ("ratios", f"{family}_{case}"),
            f"{family}, {what}, ours bf16 against peer bf16",
            "",
            "{:.2f} times",
        )
        for family in ("MPNet", "ModernBERT", "Qwen3")
        for case, what in (
            ("train_64", "training on short pairs, batch 64"),
            ("encode_short", "encoding short sentences"),
            ("encode_passages", "encoding passages of 170 word pieces"),
        )
    ),
    *(
        (
            "negatives",
            ("false_by_rule", "flickr30k_captions", rule, "share"),
            f"mined negatives that show the query's own photograph, {what}",
            "",
            "{:.0%}",
        )
        for rule, what in (
            ("naive", "mined naively"),
            ("5% margin", "5% below the positive"),
            ("20% margin", "20% below the positive"),
        )
    ),
    *(
        (
            "negatives",
            ("differences", f"{arm} - none", "near", "seeds", "mean"),
            f"nDCG@10 among near-duplicates, {what} against no hard negatives",
            "",
            "{:+.3f}",
        )
        for arm, what in (("naive", "mined naively"), ("margin", "5% below the positive"))
    ),
)


def table(folder: Path) -> str:
    "The results as a table, with what was aimed at, and where they were measured."
    files = {name: folder / f"{name}.json" for name in dict.fromkeys(row[0] for row in ROWS)}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    lines = ["| what, on one core | target | measured |", "|---|---|---|"]
    for name, keys, what, target, how in ROWS:
        if name not in results:  # nobody has measured it yet
            continue
        value = results[name]
        for key in keys:
            value = (value or {}).get(key)
        said = "not measured" if value is None else how.format(value).replace("-0.0 ", "0.0 ")
        lines.append(f"| {what} | {target} | {said} |")
    where = [
        f"`{name}.json`: {r['date']}, {r['hardware']}, {r['cores']} cores, Python"
        f" {r['python']}{', a quick run' if r.get('quick') else ''}."
        for name, r in results.items()
    ]
    return "\n".join([*lines, "", *where])


def write_between(page: Path, begin: str, text: str, end: str) -> None:
    "Put a text between two lines of a page, in the place of what stood there."
    before, rest = page.read_text(encoding="utf-8").split(f"{begin}\n")
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def write_table(readme: Path, folder: Path) -> None:
    "Put the table into its place in README.md."
    write_between(readme, "<!-- table -->", table(folder), "<!-- end of table -->")


if __name__ == "__main__":
    write_table(HERE / "README.md", HERE / "results")
