"""What the order of 1.1 billion rows costs: time and memory of a global batch at any step.

python benchmarks/data_order.py            # about three minutes
python benchmarks/data_order.py --quick    # about twenty seconds

The 27 datasets of all_datasets_v3.json have their true sizes and no texts: what is measured is how
the rows of a step are found.
Peers: grain's MapDataset (shuffle, repeat, mix) and a permutation kept in memory.
"""

import json
import statistics
import time
import warnings

import grain
import numpy as np
from grain.experimental import index_shuffle
from matplotlib.figure import Figure
from measure import HERE, arguments, fresh, interleaved, memory, one_thread, record, save, spread

from contrastive_st.mixture import Mixture, draw_window, epoch_order
from contrastive_st.notebook import VirtualSource

BATCH, DATASETS_PER_BATCH, LAST = 1024, 2, 540_000
STEPS = (0, 100, 10_000, LAST, 100_000_000)
PERMUTATION_LIMIT = 100_000_000  # rows; a permutation of all takes 8.8 GB


class Virtual(VirtualSource):
    "A dataset of the published size; to grain, which reads by index, a row is its number."

    def __init__(self, name, rows, columns, **_):
        super().__init__(name, rows, columns)

    def __getitem__(self, i):
        return i


def published() -> list[dict]:
    "Name, rows, columns and weight of the 27 datasets."
    return json.loads((HERE / "all_datasets_v3.json").read_text())["datasets"]


def scaled(sets: list[dict], total: int) -> list[dict]:
    "Scale the datasets to `total` rows; the smallest has a global batch, the largest what is left."
    whole, largest = sum(d["rows"] for d in sets), max(sets, key=lambda d: d["rows"])
    small = [
        d | {"rows": max(BATCH, round(d["rows"] * total / whole))} for d in sets if d is not largest
    ]
    return small + [largest | {"rows": total - sum(d["rows"] for d in small)}]


def ours(sets: list[dict]) -> Mixture:
    "Our mixture, with nothing remembered from an earlier one."
    draw_window.cache_clear()
    return Mixture(
        [Virtual(**d) for d in sets], [d["weight"] for d in sets], BATCH, DATASETS_PER_BATCH
    )


def grains(sets: list[dict]) -> grain.MapDataset:
    "Build the same in grain: shuffled, repeated sub-batches, mixed by weight, without pools."
    parts = [
        grain.MapDataset.source(Virtual(**d))
        .seed(0)
        .shuffle()
        .repeat()
        .batch(BATCH // DATASETS_PER_BATCH)
        for d in sets
    ]
    return grain.MapDataset.mix(parts, [d["weight"] for d in sets]).batch(DATASETS_PER_BATCH)


def step_cost(sets: list[dict], steps: tuple[int, ...], rounds: int) -> dict[str, dict[int, dict]]:
    "Milliseconds from nothing to the rows of a step, to its texts, and to grain's rows."
    ways = {("rows", s): lambda r, s=s: ours(sets).rows(s) for s in steps}
    ways |= {("batch", s): lambda r, s=s: ours(sets).batch(s).examples for s in steps}
    ways |= {("grain", s): lambda r, s=s: grains(sets)[s] for s in steps}
    found = interleaved(ways, rounds)
    return {
        way: {s: spread([1e3 * v for v in found[w, s]]) for w, s in found if w == way}
        for way in ("rows", "batch", "grain")
    }


def run_cost(sets: list[dict], steps: int, rounds: int) -> dict[str, dict]:
    "Measure microseconds a row within a run: many steps around step 0 and around step 540,000."
    mixture, peer = ours(sets), grains(sets)
    ways = {
        f"ours_{first}": lambda r, first=first: [
            mixture.rows(first + r * steps + s) for s in range(steps)
        ]
        for first in (0, LAST)
    }
    ways |= {
        f"grain_{first}": lambda r, first=first: [peer[first + r * steps + s] for s in range(steps)]
        for first in (0, LAST)
    }
    return {
        name: spread([1e6 * v / steps / BATCH for v in seconds])
        for name, seconds in interleaved(ways, rounds).items()
    }


def index_cost(sets: list[dict], rounds: int, epoch: int = 3) -> dict[str, dict]:
    "Measure microseconds to find a row in one dataset's order: mean over the datasets."
    part = BATCH // DATASETS_PER_BATCH
    starts = [epoch * d["rows"] + d["rows"] // 2 for d in sets]
    orders = [grain.MapDataset.range(d["rows"]).seed(0).shuffle().repeat() for d in sets]

    def one(r):
        return [
            epoch_order(np.arange(s, s + part), d["rows"], d["name"]) for d, s in zip(sets, starts)
        ]

    def two(r):
        return [[order[i] for i in range(s, s + part)] for order, s in zip(orders, starts)]

    def three(r):
        return [
            [
                index_shuffle(i, max_index=d["rows"] - 1, seed=epoch, rounds=4)
                for i in range(d["rows"] // 2, d["rows"] // 2 + part)
            ]
            for d in sets
        ]

    found = interleaved(
        {"ours": one, "grain_shuffle_repeat": two, "grain_index_shuffle": three}, rounds
    )
    return {
        name: spread([1e6 * v / part / len(sets) for v in seconds])
        for name, seconds in found.items()
    }


def memory_of(way: str, total: int, batches: int) -> dict[str, float]:
    "Measure MB and seconds to start of a process that draws from all over a run of 540,000 steps."
    one_thread()
    warnings.simplefilter("ignore")
    sets, before, start = scaled(published(), total), memory(), time.process_time()
    if way == "permutation":
        order = [np.random.default_rng(0).permutation(d["rows"]) for d in sets]
    else:
        source = ours(sets) if way == "ours" else grains(sets)
    ready = time.process_time() - start
    for step in range(0, LAST, LAST // batches):
        if way == "permutation":
            _ = order[step % len(order)][:BATCH]
        else:
            _ = source.batch(step).examples if way == "ours" else source[step]
    after = memory()
    return {
        "resident": after["VmRSS"],
        "growth": after["VmRSS"] - before["VmRSS"],
        "ready_seconds": ready,
    }


def memory_cost(sizes: list[int], batches: int, repeats: int) -> dict[str, dict[int, dict]]:
    "Memory by way and number of rows, the median process of each."
    found = {"ours": {}, "grain": {}, "permutation": {}}
    for way in found:
        for total in sizes:
            if way == "permutation" and total > PERMUTATION_LIMIT:
                continue
            runs = [fresh(memory_of, way, total, batches) for _ in range(repeats)]
            found[way][total] = {
                key: statistics.median(run[key] for run in runs) for key in runs[0]
            }
    return found


def ratios(results: dict) -> dict[str, float]:
    "What the targets are about."
    steps, mb, index = results["step_ms"], results["memory_mb"], results["index_us_per_row"]
    few, many = min(mb["ours"]), max(mb["ours"])
    return {
        "batch_at_540000_over_batch_at_0": (
            steps["batch"][LAST]["median"] / steps["batch"][0]["median"]
        ),
        "rows_at_540000_over_rows_at_0": steps["rows"][LAST]["median"] / steps["rows"][0]["median"],
        "resident_mb_more_at_1.1B_rows_than_at_1M": (
            mb["ours"][many]["resident"] - mb["ours"][few]["resident"]
        ),
        "permutation_mb_at_1.1B_rows_computed": 8 * many / 1e6,
        "grain_over_ours_per_row_of_a_run": (
            results["run_us_per_row"][f"grain_{LAST}"]["median"]
            / results["run_us_per_row"][f"ours_{LAST}"]["median"]
        ),
        "grain_shuffle_repeat_over_ours_per_row": (
            index["grain_shuffle_repeat"]["median"] / index["ours"]["median"]
        ),
        "grain_index_shuffle_over_ours_per_row": (
            index["grain_index_shuffle"]["median"] / index["ours"]["median"]
        ),
    }


def steps_figure(cost: dict) -> Figure:
    "Does a later step cost more?"
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for way, label, marker in (
        ("grain", "grain, row numbers", "s"),
        ("batch", "ours, texts (made up)", "^"),
        ("rows", "ours, row numbers", "o"),
    ):
        x, middle = list(cost[way]), [v["median"] for v in cost[way].values()]
        error = [
            [v["median"] - v["q1"] for v in cost[way].values()],
            [v["q3"] - v["median"] for v in cost[way].values()],
        ]
        axes.errorbar(x, middle, yerr=error, marker=marker, label=label, capsize=2)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(
        xlabel="step of the run",
        ylabel="from nothing to a batch of 1,024 (ms)",
        ylim=(0, None),
        title="Any step of 1.1 billion rows costs the same",
    )
    axes.legend()
    return figure


def memory_figure(found: dict, total: int) -> Figure:
    "Does more data need more memory?"
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for way, label, marker in (
        ("permutation", "stored permutation", "s"),
        ("grain", "grain", "^"),
        ("ours", "ours", "o"),
    ):
        axes.plot(
            list(found[way]),
            [max(v["growth"], 0.1) for v in found[way].values()],
            marker=marker,
            label=label,
        )
    last = max(found["permutation"])
    axes.plot(
        [last, total],
        [8 * last / 1e6, 8 * total / 1e6],
        ls=":",
        marker="s",
        mfc="none",
        color="C0",
        label="stored permutation, computed",
    )
    axes.axhline(50, color="tab:gray", lw=0.8, ls="--", label="50 MB")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rows in 27 datasets",
        ylabel="memory for order and batches (MB)",
        title="A billion rows need no more memory than a million",
    )
    axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    args, begun = arguments(__doc__.splitlines()[0], argv), time.time()
    one_thread()
    sets = published()
    total = sum(d["rows"] for d in sets)
    sizes = [1_000_000, total] if args.quick else [1_000_000, 10_000_000, 100_000_000, total]
    results = {
        "rows": total,
        "datasets": len(sets),
        "batch_size": BATCH,
        "datasets_per_batch": DATASETS_PER_BATCH,
        "step_ms": step_cost(sets, STEPS, 15 if args.quick else 100),
        "run_us_per_row": run_cost(sets, 16, 5 if args.quick else 30),
        "index_us_per_row": index_cost(sets, 3 if args.quick else 15),
        "memory_mb": memory_cost(sizes, 50 if args.quick else 500, 1 if args.quick else 2),
    }
    results = {
        "ratios": ratios(results),
        **results,
        **record("grain"),
        "quick": args.quick,
        "seconds": round(time.time() - begun),
    }
    save(
        results,
        {
            "steps": steps_figure(results["step_ms"]),
            "memory": memory_figure(results["memory_mb"], total),
        },
        "data_order",
        args.out,
    )


if __name__ == "__main__":
    main()
