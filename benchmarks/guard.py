"""What a guard against false negatives adds to a training step, in percent of a step without one.

python benchmarks/guard.py            # batches of 64 and 256: about ten minutes
python benchmarks/guard.py --quick    # a batch of 32: less than a minute

A step is what a run does: draw the batch, tokenise it, embed, contrast, go backward, move the
weights of the packaged MiniLM. The guard asks the model itself, vectors in an index on disk, or
another encoder of the same size, which embeds the batch as well. The ways take turns on the same
batches and the same weights, on one thread. A percentage is the median over the rounds of one
way's CPU seconds against those of the plain step of that round.
"""

import os
import statistics
import tempfile
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from matplotlib.figure import Figure
from measure import arguments, fresh, interleaved, one_thread, record, save, spread

from contrastive_st.data import load_source, quickstart_folder
from contrastive_st.guard import open_guide
from contrastive_st.index import build_index
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, train_step
from contrastive_st.tokens import Tokens

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ROUNDS = {32: 3, 64: 9, 256: 5}
WAYS = {  # way -> what a recipe's [train] says
    "plain": {},
    "self": {"guard": "self", "guard_after": 0},
    "stored": {"guard": "guide", "guide": "an index"},
    "encoder": {"guard": "guide", "guide": "another encoder"},
}
SAID = {"self": "the model itself", "stored": "stored vectors", "encoder": "another encoder"}


def embedding(guide: SentenceEncoder) -> Callable:
    "A function that embeds the texts of a batch with another encoder, (B, C, G)."

    @torch.no_grad()
    def vectors(batch):
        B, C = batch.identities.shape
        return guide(batch.token_ids, batch.lengths).view(C, B, -1).transpose(0, 1)

    return vectors


def make_ways(mixture: Mixture, folder: str) -> dict[str, Callable[[int], object]]:
    "A training step of each way; all of them train the same encoder."
    encoder, other = (SentenceEncoder.from_pretrained(MODEL) for _ in range(2))
    tokens = Tokens(encoder.tokenizer, encoder.max_length)
    texts = sorted({text for source in mixture.sources for row in source for text in row})
    build_index(folder, other, texts, progress=False)
    stored = open_guide(folder)
    asked = {"stored": lambda batch: stored(batch.identities), "encoder": embedding(other)}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6)

    def way(name: str) -> Callable[[int], object]:
        config, guide = TrainConfig(steps=1000, **WAYS[name]), asked.get(name)

        def step(number: int) -> dict:
            batch = tokens(mixture.batch(number))
            if guide is not None:
                batch = batch._replace(guide=guide(batch))
            return train_step(encoder.train(), batch, config, optimizer, step=number)

        return step

    return {name: way(name) for name in WAYS}


def measured(B: int) -> dict:
    "Median CPU seconds of each way's step, what it adds in percent, and candidates it masks."
    one_thread()
    source = load_source(quickstart_folder() / "train/question_answer.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(Mixture([source], [1], B, 1), f"{folder}/guide")
        masked = {name: step(0)["masked"].item() for name, step in ways.items()}  # warms up, too
        seconds = interleaved(ways, ROUNDS[B])
    ratios = {name: [a / b for a, b in zip(s, seconds["plain"])] for name, s in seconds.items()}
    return {
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "percent": {name: 100 * (statistics.median(r) - 1) for name, r in ratios.items()},
        "masked": masked,
    }


def plot(batches: dict) -> Figure:
    "A bar for each way and batch."
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis, height = figure.subplots(), 0.8 / len(batches)
    for n, (B, results) in enumerate(batches.items()):
        y = [row + n * height for row in range(len(SAID))]
        axis.barh(y, [results["percent"][name] for name in SAID], height, label=f"batch of {B}")
    axis.set(yticks=range(len(SAID)), yticklabels=SAID.values(), xlabel="% more CPU time a step")
    axis.set_title("What does a guard cost?")
    axis.invert_yaxis()
    axis.legend()
    return figure


def main(argv=None) -> None:
    "Measure and write."
    args = arguments(__doc__.splitlines()[0], argv)
    batches = {}
    for B in (32,) if args.quick else (64, 256):
        batches[f"{B}"] = results = fresh(measured, B)
        for name, percent in results["percent"].items():
            seconds = results["seconds"][name]["median"]
            print(f"{B:4} {name:8} {seconds:7.3f} s {percent:+6.1f}%", flush=True)
    results = record("torch") | {"quick": args.quick, "batches": batches}
    results["ratios"] = {
        f"{name}_percent_at_{B}": batches[B]["percent"][name] for B in batches for name in SAID
    }
    figures = {"cost": plot(batches)}
    save(results, figures, "guard_quick" if args.quick else "guard", args.out)


if __name__ == "__main__":
    main()
