"""One side of speed.py in its own process: it does one unit of work when told, and says the cost.

You do not start this program: speed.py does, and talks to it in lines of JSON. Each job imports
its own side only, so that neither carries the other's libraries.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

LR, SCALE = 2e-5, 20.0
GEMM_TOKENS = (512, 1024, 2048, 4096)


# ---- turns


class Turns:
    "End a unit of work: say what it cost and wait to be told to go on."

    def __init__(self, read, write):
        self.read, self.write = read, write
        self.start()

    def start(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, **said) -> bool:  # False = stop
        "Return CPU seconds; they run on in the others' turns, so that background work counts too."
        now, cpu = time.perf_counter(), time.process_time()
        self.write(
            {"wall": now - self.wall, "cpu": cpu - self.cpu, "peak_mb": peak_memory(), **said}
        )
        go = self.read() == "go"
        self.wall, self.cpu = time.perf_counter(), cpu
        return go


def peak_memory() -> float | None:
    "The most memory this process has held so far, in MB (Linux)."
    status = Path("/proc/self/status")
    return (
        int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
        if status.is_file()
        else None
    )


class Products(TorchDispatchMode):
    "Count the matrix products by the type of what they multiply."

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if re.search("mm|linear|matmul|attention", name):
            kinds = [
                str(a.dtype).removeprefix("torch.")
                for a in args
                if isinstance(a, torch.Tensor) and a.is_floating_point()
            ]
            self.found[kinds[-1] if kinds else "?"] += 1
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    "Take turns after each optimiser step of either Trainer, and look at the first step's products."

    def __init__(self, turn):
        self.turn, self.products, self.losses = turn, Products(), []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.products.__enter__()

    def on_step_end(self, args, state, control, **_):
        first = state.global_step == 1
        if first:
            self.products.__exit__(None, None, None)
        control.should_training_stop |= not self.turn(
            **({"products": dict(self.products.found)} if first else {})
        )

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [logs["loss"]] if "loss" in (logs or {}) else []


# ---- training


def train_ours(job: dict, turn) -> dict:
    "Our training loop, as a recipe runs it; the loss goes one way, as the peer's does."
    from contrastive_st.mixture import Mixture
    from contrastive_st.model import SentenceEncoder
    from contrastive_st.trainer import TrainConfig, train

    rows, steps = Path(job["rows"]), Steps(turn)
    mixture = Mixture.from_config(
        [{"name": rows.name, "weight": 1}], rows.parent, job["batch"], 1, cache_dir=job["cache"]
    )
    config = TrainConfig(
        steps=job["steps"],
        lr=job["lr"],
        warmup=job["warmup"],
        scale=SCALE,
        symmetric=False,
        bf16=job["bf16"],
        seed=job["seed"],
    )
    train(
        SentenceEncoder.from_pretrained(job["model"]),
        mixture,
        config,
        job["out"],
        callbacks=[steps],
        progress=False,
    )
    return {"losses": steps.losses, "model": str(Path(job["out"]) / "model")}


def train_peer(job: dict, turn) -> dict:
    "The peer's Trainer with its defaults, on the same batches in the same order."
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses
    from torch.utils.data import SequentialSampler

    anchors, positives = zip(
        *(row for block in json.loads(Path(job["blocks"]).read_text()) for row in block)
    )
    model, steps = SentenceTransformer(job["model"], device="cpu"), Steps(turn)
    loss = (
        losses.CachedMultipleNegativesRankingLoss
        if job["cached"]
        else losses.MultipleNegativesRankingLoss
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=job["out"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=job["lr"],
        warmup_steps=job["warmup"],
        bf16=job["bf16"],
        seed=job["seed"],
        batch_sampler=lambda dataset, **options: DefaultBatchSampler(
            SequentialSampler(dataset), **options
        ),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_first_step=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=loss(model, scale=SCALE),
        callbacks=[steps],
    )
    trainer.train()
    model.save_pretrained(str(Path(job["out"]) / "model"), create_model_card=False)
    return {"losses": steps.losses, "model": str(Path(job["out"]) / "model")}


# ---- encoding


def encoder_ours(job: dict):
    "texts -> vectors, ours."
    from contrastive_st.model import SentenceEncoder

    return (
        partial(
            SentenceEncoder.from_pretrained(job["model"]).encode, progress=False, bf16=job["bf16"]
        ),
        {},
    )


def encoder_peer(job: dict):
    "texts -> vectors, the peer's: float32, bfloat16 weights, or OpenVINO."
    from sentence_transformers import SentenceTransformer

    if job["backend"] == "openvino":
        model = SentenceTransformer(
            job["model"],
            device="cpu",
            backend="openvino",
            model_kwargs={"ov_config": {"INFERENCE_NUM_THREADS": torch.get_num_threads()}},
        )
        # bfloat16 by default where the processor has it
        kind = model[0].auto_model.request.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return model.encode, {
            "products": {kind: "all"},
            "versions": {
                name: version(name) for name in ("openvino", "optimum-intel", "transformers")
            },
        }
    model = SentenceTransformer(
        job["model"], device="cpu", model_kwargs={"dtype": torch.bfloat16} if job["bf16"] else {}
    )
    return model.encode, {}


def encode(job: dict, turn) -> dict:
    "Encode another block of texts in each turn; the first block's vectors are kept."
    run, about = (encoder_ours if job["side"] == "ours" else encoder_peer)(job)
    blocks, products = json.loads(Path(job["blocks"]).read_text()), Products()
    with products:
        np.save(job["out"] + ".npy", np.asarray(run(blocks[0]), dtype=np.float32))
    turn(products=dict(products.found))
    for block in blocks[1:]:
        run(block)
        if not turn():
            break
    return about


# ---- what the machine can do


def layer_products(tokens: int, width: int, inner: int, dtype: torch.dtype, backward: bool) -> list:
    "Return a transformer layer's weight products, (function, FLOPs): forward and the two backward."
    found = []
    for out, into, times in ((width, width, 4), (inner, width, 1), (width, inner, 1)):
        x = torch.randn(tokens, into).to(dtype)
        w = torch.randn(out, into).to(dtype)
        g = torch.randn(tokens, out).to(dtype)
        products = [lambda x=x, w=w: x @ w.T]
        if backward:
            products += [lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x]
        found += [(product, 2 * tokens * out * into) for product in products] * times
    return found


def gemm(job: dict, turn) -> dict:
    "GFLOP/s of the products of one layer, for several numbers of tokens at once."
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    layers = {
        tokens: layer_products(tokens, job["width"], job["inner"], dtype, job["backward"])
        for tokens in GEMM_TOKENS
    }
    more = True
    while more:
        rates = {}
        for tokens, products in layers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for product, _ in products * (GEMM_TOKENS[-1] // tokens):
                product()
            work = sum(flops for _, flops in products) * (GEMM_TOKENS[-1] // tokens) / 1e9
            rates[str(tokens)] = {
                "cpu": work / (time.process_time() - cpu),
                "wall": work / (time.perf_counter() - wall),
            }
        more = turn(rates=rates)
    return {}


# ---- the process


def begin(job: dict, turn) -> dict:
    "Do a job with its settings and say how it was done."
    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["precision"])
    work = {
        "gemm": gemm,
        "encode": encode,
        "train": train_ours if job.get("side") == "ours" else train_peer,
    }[job["job"]]
    return work(job, turn) | {
        "float32_products": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log

    def write(said):
        lines.write(json.dumps(said) + "\n")

    def read():
        return sys.stdin.readline().strip()

    while line := read():
        job = json.loads(line)
        write({"done": begin(job, Turns(read, write) if job["turns"] else lambda **_: True)})


if __name__ == "__main__":
    main()
