"""What InfoNCE costs with its matrix of scores and without it: CPU seconds and memory.

python benchmarks/tiled.py            # 1,024, 8,192 and 65,536 pairs: about ten minutes
python benchmarks/tiled.py --quick    # 1,024 and 4,096 pairs: less than a minute

Forward and backward of the loss alone, on embeddings of width 384 that are given, with the mask of
equal texts. Each run has a process of its own and one thread, and the ways take turns. Memory is
what the process gains beyond what it had with the embeddings in it: scores, masks, gradients. The
plain loss is measured where its matrices fit: at 65,536 pairs one of them has 17 GB.
"""

import statistics
import time

import torch
from matplotlib.figure import Figure
from measure import arguments, fresh, one_thread, peak_while, record, save

from contrastive_st.loss import info_nce, same_text
from contrastive_st.tiled import SameTiles, tiled_info_nce

D, SCALE = 384, 20.0
PLAIN_UP_TO = 8_192  # pairs
ROUNDS = {1_024: 3, 4_096: 3, 8_192: 3, 65_536: 1}


def batch(B: int) -> tuple[torch.Tensor, ...]:
    "Anchors, positives that resemble them, (B, D) each, and identities with some repeats (B, 2)."
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(B, D, generator=g)
    positives = torch.randn(B, D, generator=g).mul_(2).add_(anchors)
    identities = torch.randint(0, 20 * B, (B, 2), generator=g)
    return anchors.requires_grad_(), positives.requires_grad_(), identities


def plain(anchors, positives, identities) -> torch.Tensor:
    "The loss with its matrix and its mask."
    return info_nce(anchors, positives, scale=SCALE, same=same_text(identities))


def tiled(anchors, positives, identities) -> torch.Tensor:
    "The same loss, tile by tile."
    return tiled_info_nce(anchors, positives, scale=SCALE, same=SameTiles(identities))


WAYS = {"plain": plain, "tiled": tiled}


def measured(way: str, B: int) -> dict:
    "Run forward and backward once -> CPU seconds, peak MB, the loss and length of its gradient."
    one_thread()
    WAYS[way](*batch(64)).backward()  # first allocations
    inputs = batch(B)

    def step():
        loss = WAYS[way](*inputs)
        loss.backward()
        return loss.item()

    start = time.process_time()
    loss, _, peak = peak_while(step)
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak_mb": peak, "loss": loss, "norm": inputs[0].grad.norm().item()}


def compare(sizes: list[int]) -> dict:
    "Both ways at each size, in turns."
    table = {}
    for B in sizes:
        names = [name for name in WAYS if name == "tiled" or B <= PLAIN_UP_TO]
        runs = {name: [] for name in names}
        for r in range(ROUNDS[B]):
            for name in names[:: -1 if r % 2 else 1]:
                run = fresh(measured, name, B)
                runs[name].append(run)
                print(f"{B:6,} {name} {run['seconds']:7.2f} s {run['peak_mb']:7.0f} MB", flush=True)
        table[f"{B}"] = {
            name: {key: statistics.median(run[key] for run in several) for key in several[0]}
            for name, several in runs.items()
        }
    return table


def plot(medians: dict, key: str, label: str, title: str) -> Figure:
    "One line a way."
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name in WAYS:
        points = [(int(B), row[name][key]) for B, row in medians.items() if name in row]
        axis.plot(*zip(*points), "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="pairs in the batch", ylabel=label, title=title)
    axis.legend()
    return figure


def ratios(medians: dict) -> dict:
    "Times of memory that the tiles save, of seconds they cost, and the largest batch's figures."
    table = {}
    for B, row in medians.items():
        if "plain" in row:
            for key in ("seconds", "peak_mb"):
                table[f"tiled_over_plain_{key}_at_{B}"] = row["tiled"][key] / row["plain"][key]
            table[f"difference_of_losses_at_{B}"] = abs(row["tiled"]["loss"] - row["plain"]["loss"])
    largest = max(medians, key=int)
    matrix = 4 * int(largest) ** 2 / 1e6
    return table | {
        f"tiled_peak_mb_at_{largest}": medians[largest]["tiled"]["peak_mb"],
        f"tiled_seconds_at_{largest}": medians[largest]["tiled"]["seconds"],
        f"one_matrix_mb_at_{largest}": matrix,
    }


def main(argv=None) -> None:
    "Measure and write."
    args = arguments(__doc__.splitlines()[0], argv)
    medians = compare([1_024, 4_096] if args.quick else [1_024, 8_192, 65_536])
    results = record("torch") | {"quick": args.quick, "width": D, "medians": medians}
    results["ratios"] = ratios(medians)
    figures = {
        "memory": plot(
            medians, "peak_mb", "memory beyond the embeddings, MB", "What does it take?"
        ),
        "seconds": plot(medians, "seconds", "CPU seconds, forward and backward", "How long?"),
    }
    save(results, figures, "tiled_quick" if args.quick else "tiled", args.out)


if __name__ == "__main__":
    main()
