"""BERT, MPNet and ModernBERT on a GPU in bfloat16: ours and sentence-transformers, in turns.

    bash benchmarks/gpu.sh               # on the machine with the GPU: tests, then this
    python benchmarks/gpu.py             # five minutes; stops with what it has after 300 seconds
    python benchmarks/gpu.py --tiny      # a dry run on any machine, a minute; writes no file

Every model has the shape of BERT base and random weights, which cost as much as trained ones.
Both sides get the same texts in one process; seconds are those of the clock, with the GPU waited
for. BERT runs through the kernel for texts of any lengths there, the other two padded.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from families import FAMILIES
from measure import HERE, record, write
from speed import MODEL, blocks_of, data_folder, prepare
from speed import Case as Texts
from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback

from contrastive_st.model import SentenceEncoder

MODELS = {"BERT": (BertConfig, BertModel, {})} | {
    name: FAMILIES[name] for name in ("MPNet", "ModernBERT")
}


class Size(NamedTuple):
    "How much is done."

    shape: dict[str, int]  # of the models
    short: int  # texts in a block
    passages: int
    pairs: int  # in a batch
    steps: int  # of a training, of which the first third warms up
    rounds: int


FULL = Size(
    {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"intermediate_size": 3072, "max_position_embeddings": 514},
    *(4000, 1000, 256, 15, 3),
)
TINY = Size(
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 128, "max_position_embeddings": 514},
    *(20, 6, 8, 3, 2),
)


def make_model(family: str, size: Size, folder: Path) -> Path:
    "A model directory of a family, with random weights and the tokenizer of MiniLM."
    config, model, options = MODELS[family]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    if "intermediate_size" in options:  # two gates share the wide matrix
        options = options | {"intermediate_size": size.shape["intermediate_size"] // 2}
    torch.manual_seed(0)
    backbone = model(config(**size.shape | options | special))
    SentenceEncoder(backbone, tokenizer, max_length=256).save_pretrained(folder)
    return folder


def clock() -> float:
    "Seconds, after the GPU has done what it was given."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(ways: dict[str, Callable[[int], float]], rounds: int) -> dict:
    "Seconds of each way in each round, and the median ratio of the peer's to ours."
    seconds = {name: [] for name in ways}
    for r in range(rounds + 1):  # the first round warms up
        for name in list(ways)[:: 1 if r % 2 else -1]:
            seconds[name].append(ways[name](r))
    seconds = {name: values[1:] for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["peer"])]
    return {"seconds": seconds, "ratio": statistics.median(ratios)}


def encoding(model: Path, device: str, blocks: list) -> dict[str, Callable[[int], float]]:
    "Each side's seconds for one block of texts."
    from sentence_transformers import SentenceTransformer

    encoder = SentenceEncoder.from_pretrained(model).to(device)
    peer = SentenceTransformer(
        str(model), device=device, model_kwargs={"dtype": torch.bfloat16}
    ).encode

    def timed(run):
        def work(r):
            start = clock()
            run(blocks[r])
            return clock() - start

        return work

    return {
        "ours": timed(lambda texts: encoder.encode(texts, progress=False, bf16=True)),
        "peer": timed(lambda texts: peer(texts, batch_size=128)),
    }


class Clock(TrainerCallback):
    "When each step of a Trainer ended."

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(clock())


def step_seconds(times: list[float]) -> float:
    "The median time of a step, without those that warm up."
    steps = [b - a for a, b in zip(times, times[1:])]
    return statistics.median(steps[len(times) // 3 :])


def training(
    model: Path, device: str, texts, size: Size, work: Path
) -> dict[str, Callable[[int], float]]:
    "Each side's seconds for one optimiser step, over a training of some steps."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses
    from speed import mixture_of

    from contrastive_st.trainer import TrainConfig, train

    mixture = mixture_of(texts, "short", size.pairs)
    rows = [row[:2] for step in range(size.steps) for row in mixture.batch(step).examples]
    anchors, positives = zip(*rows)

    def ours(r):
        ended = Clock()
        config = TrainConfig(steps=size.steps, warmup=0, symmetric=False, bf16=True)
        encoder = SentenceEncoder.from_pretrained(model).to(device)
        train(encoder, mixture, config, work / f"ours {r}", callbacks=[ended], progress=False)
        return step_seconds(ended.times)

    def peer(r):
        ended, encoder = Clock(), SentenceTransformer(str(model), device=device)
        arguments = Arguments(
            output_dir=str(work / f"peer {r}"),
            max_steps=size.steps,
            per_device_train_batch_size=size.pairs,
            learning_rate=2e-5,
            bf16=True,
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
            loss=losses.MultipleNegativesRankingLoss(encoder, scale=20.0),
            callbacks=[ended],
        ).train()
        return step_seconds(ended.times)

    return {"ours": ours, "peer": peer}


def measure(family: str, device: str, texts, size: Size, work: Path) -> dict:
    "All cases of a family."
    model = make_model(family, size, work / family)
    found = {"layout": SentenceEncoder.from_pretrained(model).to(device).layout, "cases": {}}
    for name, batch in (("short", size.short), ("passages", size.passages)):
        blocks = blocks_of(Texts("encode", name, batch, (), 0), texts, size.rounds + 1)
        ways = encoding(model, device, blocks)
        found["cases"][f"encode_{name}"] = in_turns(ways, size.rounds)
    ways = training(model, device, texts, size, work / f"{family} runs")
    found["cases"]["train"] = in_turns(ways, 1)
    for name, case in found["cases"].items():
        print(f"{family:10} {name:16} {case['ratio']:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; writes no file")
    parser.add_argument("--seconds", type=float, default=300, help="no family is begun after that")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    settings = parser.parse_args()
    device, size = ("cuda" if torch.cuda.is_available() else "cpu"), (FULL, TINY)[settings.tiny]
    if device == "cpu" and not settings.tiny:
        raise SystemExit("there is no GPU here; --tiny makes a dry run")
    begun, results = time.monotonic(), {"families": {}, "quick": settings.tiny}
    name = torch.cuda.get_device_name() if device == "cuda" else "none"
    results |= {"gpu": name, "cuda": torch.version.cuda}
    with tempfile.TemporaryDirectory() as work:
        texts = prepare(data_folder(), Path(work), AutoTokenizer.from_pretrained(MODEL))
        for family in MODELS:
            if time.monotonic() - begun > settings.seconds:
                print(f"{family:10} left out: no time")
                continue
            results["families"][family] = measure(family, device, texts, size, Path(work))
            # after each family, so that what is measured is kept if the machine goes
            about = record("torch", "transformers", "sentence-transformers")
            if not settings.tiny:
                write(results | about, "gpu", settings.out)


if __name__ == "__main__":
    main()
