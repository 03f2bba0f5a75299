"""Jobs of test_xla.py that need XLA devices. Their number is fixed when XLA starts, so each job is
a process of its own:

    DEVICES=4 CPU_NUM_DEVICES=4 PJRT_DEVICE=CPU python tests/xla_child.py run FOLDER

A job writes below FOLDER and prints one JSON object on its last line. DEVICES=0 means one device
without SPMD.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import make_tokenizer
from datasets import Dataset

from contrastive_st import trainer, xla
from contrastive_st.data import ScoredPairs, Source, load_source, quickstart_folder, read_sts
from contrastive_st.evaluation import evaluate_sts
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, batch_loss
from contrastive_st.tokens import Tokens

DEVICES = int(os.environ.get("DEVICES", 0))
BUCKETS, LENGTH, BATCH = (16, 32, 64), 64, 24
# no number of devices: rows of a device times heads must not look like the global batch
HEADS = 16
TEXTS = [
    "What time does the yawn start tonight?",
    "The lock keeper publishes each period on form L4.",
    "a",
]


# ---- what is trained, on what: the same in every process


def make_encoder(family="bert", dropout=0.0, **changes):
    "A random encoder, two layers, 32 wide, always the same; no attention dropout, as on XLA."
    from transformers import (
        AutoModel,
        BertConfig,
        DistilBertConfig,
        ElectraConfig,
        ModernBertConfig,
        MPNetConfig,
        Qwen3Config,
        RobertaConfig,
        XLMRobertaConfig,
    )

    tokenizer = make_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH + 2,
        "pad_token_id": 0,
    }
    sizes = (
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 64,
            "attention_probs_dropout_prob": 0.0,
        }
        | common
        | changes
    )
    configs = {
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "mpnet": MPNetConfig,
        "electra": ElectraConfig,
        "xlm-roberta": XLMRobertaConfig,
        "modernbert": ModernBertConfig,
        "qwen3": Qwen3Config,
    }
    own = {  # what a family names otherwise, or has alone
        "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
        "qwen3": {"num_key_value_heads": HEADS // 2, "head_dim": 2},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # as many rows as are used, so that the whole table's gradient travels
        sizes |= {"max_position_embeddings": LENGTH} if family == "bert" else {}
        small = DistilBertConfig(
            dim=32, n_layers=2, n_heads=HEADS, hidden_dim=64, attention_dropout=0.0, **common
        )
        backbone = AutoModel.from_config(
            small if family == "distilbert" else configs[family](**sizes | own.get(family, {}))
        ).eval()
    for name, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0 if re.search(r"attention\.(self\.)?(attn\.)?dropout$", name) else dropout
    pooling = "lasttoken" if family == "qwen3" else "mean"
    return SentenceEncoder(backbone, tokenizer, pooling, max_length=LENGTH)


def make_mixture(cache, batch_size=BATCH):
    """Pairs and triplets of the quickstart corpus, short texts, and texts that are all cut.

    Short texts fit a smaller bucket, and batches of cut texts have no padding. With real data
    around, there are NLI triplets, too.
    """
    desk = quickstart_folder()
    sources = [
        load_source(desk / f"train/{name}.jsonl", name=name, cache_dir=cache)
        for name in ("question_answer", "question_question", "slang_triplets")
    ]
    texts = [question for question, _ in sources[1].rows(range(200))]
    short = {
        "anchor": [" ".join(t.split()[:2]) for t in texts],
        "positive": [" ".join(t.split()[-2:]) for t in texts],
    }
    long = {
        "anchor": [" ".join(texts[i : i + 6]) for i in range(150)],
        "positive": [" ".join(texts[i + 20 : i + 26]) for i in range(150)],
    }
    sources += [
        Source(Dataset.from_dict(table), name) for name, table in (("short", short), ("long", long))
    ]
    nli = (
        Path(os.environ.get("CONTRASTIVE_ST_DATA", Path(__file__).parents[2] / "shared" / "data"))
        / "train"
        / "AllNLI_devtest_triplets.jsonl.gz"
    )
    sources += [load_source(nli, name="nli", cache_dir=cache)] if nli.is_file() else []
    return Mixture(sources, [1.0] * len(sources), batch_size, 1)


def make_config(**changes):
    return TrainConfig(
        **{"steps": 20, "warmup": 5, "lr": 5e-4, "log_every": 1, "workers": 1} | changes
    )


# a log line begins where a checkpoint ends: a resumed run has the same lines
COUNTED = {"log_every": 4, "eval_every": 8}
STOPPED = {"log_every": 4, "eval_every": 4, "metric": "score", "patience": 2}


def kinds(mixture, tokens):
    "The first batch of pairs, of triplets, and without padding; where in the run."
    found = {}
    for step in range(20):
        batch = tokens(mixture.batch(step))
        full = int(batch.lengths.min()) == LENGTH
        found.setdefault(
            "full" if full else "pairs" if batch.identities.shape[1] == 2 else "triplets", batch
        )
    return found


def graded(encoder):
    "Real work on the host between steps: pairs that people have graded."
    sts = ScoredPairs(*(column[:60] for column in read_sts(quickstart_folder() / "sts.tsv")))
    # as NumPy's metrics are
    scores = evaluate_sts(lambda texts: encoder.encode(texts, progress=False), sts, resamples=10)
    return {"spearman": np.float64(scores["spearman"])}


class Scores:
    "An evaluation whose answers are known beforehand."

    def __init__(self):
        self.values = [0.1, 0.2, 0.5, 0.3, 0.4, 0.6]

    def __call__(self, encoder):
        return {"score": self.values.pop(0)}


class Broken:
    "A mixture that fails from some step on, as a disk may; a thread makes its batches."

    def __init__(self, mixture, step):
        self.mixture, self.step = mixture, step

    def __getattr__(self, name):
        return getattr(self.mixture, name)

    def batch(self, step, *rank):
        if step >= self.step:
            raise OSError(f"no batch {step}: the disk is gone")
        return self.mixture.batch(step, *rank)


# ---- one step, in eager and on the devices


def eager(encoder, batch, config, noise=None):
    """Loss and gradients on the host: the encoder as it is, in float64 and without padding.

    In eager's own float32 a sum that nearly cancels (the last bias) is off by 2e-4. With noise: in
    float32, padded, with hashed dropout.
    """
    encoder = copy.deepcopy(encoder).train()
    if noise is None:
        vectors = encoder.double()(batch.token_ids, batch.lengths)
    else:
        xla.shardable(encoder.backbone, noise)
        arrays = xla.lay_out(batch, LENGTH)
        noise.rows, noise.step = arrays["rows"], torch.tensor(7, dtype=torch.int32)
        vectors = xla.embed(encoder, arrays["input_ids"], arrays["lengths"])
    marks = batch.labels, batch.scores, None, batch.guide
    loss, masked = batch_loss(vectors, batch.identities, config, *marks)
    loss.backward()
    return {
        "loss": loss.item(),
        "masked": masked.item(),
        "gradients": {name: p.grad for name, p in encoder.named_parameters()},
    }


class Kept:
    "In the place of an optimiser: keeps the gradients."

    def __init__(self, encoder):
        self.parameters = list(encoder.parameters())

    def step(self):
        self.gradients = [p.grad for p in self.parameters]

    def zero_grad(self, set_to_none):
        for p in self.parameters:
            p.grad = None


def begin(folder):
    "Turn on the devices, before anything else."
    if DEVICES:
        return xla.start(folder / "hlo")
    import torch_xla

    torch.zeros(1, device=torch_xla.device())


def on_devices(encoder, batches, config, mesh, change=lambda backbone: None, graphs=1):
    "The same by the compiled step, for each batch; `change` may spoil the backbone."
    import torch_xla
    import torch_xla.distributed.spmd as spmd

    devices = max(DEVICES, 1)
    twin = copy.deepcopy(encoder).train()
    noise = xla.Noise(config.seed)
    device = torch_xla.device()
    change(xla.shardable(twin.backbone, noise))
    twin.to(device)
    zero = torch.zeros(6).to(device)
    number = torch.tensor(7, dtype=torch.int32).to(device)
    kept = Kept(twin)
    if mesh:
        for p in (*twin.parameters(), *twin.buffers()):
            spmd.mark_sharding(p, mesh, (None,) * p.dim())
    torch_xla.sync(wait=True)
    step = xla.make_step(twin, kept, config, noise, devices, graphs)
    for batch in batches:
        T = next(bucket for bucket in BUCKETS[1:] if bucket >= batch.lengths.max())
        arrays = {name: value.to(device) for name, value in xla.lay_out(batch, T, devices).items()}
        if mesh:
            for value in arrays.values():
                spmd.mark_sharding(value, mesh, ("data",) + (None,) * (value.dim() - 1))
        before = xla.counters()
        totals, _ = step(zero, number, **arrays)
        after = xla.counters()
        gradients = {name: g.cpu() for (name, _), g in zip(twin.named_parameters(), kept.gradients)}
        loss, norm, masked, *_ = totals.cpu().tolist()
        yield {
            "loss": loss,
            "masked": masked,
            "norm": norm,
            "gradients": gradients,
            "counts": {k: after[k] - before[k] for k in after},
        }


def compared(here, there):
    "How far the devices are from eager: absolute for the loss, relative for gradients."
    size = torch.cat([g.flatten() for g in here["gradients"].values()]).norm()
    off = {name: (there["gradients"][name] - g).norm() for name, g in here["gradients"].items()}
    whole = torch.stack(list(off.values())).norm() / size
    # a key's bias has no gradient but rounding
    worst = max(off[name] / max(g.norm(), 1e-3 * size) for name, g in here["gradients"].items())
    return {
        "value": there["loss"],
        "loss": abs(here["loss"] - there["loss"]),
        "masked": abs(here["masked"] - there["masked"]),
        "gradients": whole.item(),
        "worst": worst.item(),
        "norm": abs(there["norm"] / size.item() - 1),
        "counts": there["counts"],
    }


def newest_program(folder):
    "The file of the program compiled last, after XLA's optimisations."
    return str(
        max((folder / "hlo").rglob("*.contrastive.*cpu_after_optimizations.txt"), default="")
    )


def step(folder):
    "One step of each kind, against eager."
    mesh = begin(folder)
    found = {}
    batches = kinds(make_mixture(folder / "cache"), Tokens(make_tokenizer(), LENGTH, BUCKETS))

    def compare(name, encoder, kinds, noise=None, **changes):
        config = make_config(clip=1e9, **changes)
        for kind, there in zip(
            kinds, on_devices(encoder, [batches[kind] for kind in kinds], config, mesh)
        ):
            found[f"{name} {kind}"] = compared(
                eager(encoder, batches[kind], config, noise), there
            ) | {"program": newest_program(folder)}

    compare("bert", make_encoder(), ("pairs", "full"))  # one program for both
    compare("bert", make_encoder(), ("triplets",))
    if DEVICES in (0, 4):  # each program takes seconds: others are tried on one and on several
        numbers = torch.arange(BATCH)
        batches["labels"] = batches["pairs"]._replace(labels=numbers % 3)
        batches["graded"] = batches["pairs"]._replace(scores=(numbers % 5).float() / 4)
        compare("bert", make_encoder(), ("labels",))
        compare("bert", make_encoder(), ("graded",))
        for family in ("roberta", "distilbert", "mpnet"):
            compare(family, make_encoder(family), ("pairs",))
    for family in ("xlm-roberta", "modernbert", "qwen3") if DEVICES in (1, 2, 4) else ():
        compare(family, make_encoder(family), ("pairs",))
    compare("dropout", make_encoder(dropout=0.1), ("pairs",), xla.Noise(0))
    found["dropout pairs"]["another seed"] = eager(
        make_encoder(dropout=0.1), batches["pairs"], make_config(), xla.Noise(1)
    )["loss"]
    if DEVICES == 4:
        compare("one way", make_encoder(), ("pairs",), symmetric=False)
        compare("widths", make_encoder(), ("pairs",), widths=(8, 32))
        compare("copies count", make_encoder(), ("pairs",), mask_same=False)
        for loss in ("siglip", "gte"):
            compare(loss, make_encoder(), ("triplets",), loss=loss)
        turns = batches["triplets"].identities[..., None] % torch.arange(7, 12)  # (B, C, 5)
        batches["guided"] = batches["triplets"]._replace(guide=turns.float() / 4 - 1)
        compare("bert", make_encoder(), ("guided",), guard="guide", guide="not opened here")
    return found


# ---- whole runs


def records(out):
    "What a run left: history, metrics, a digest of the weights."

    def read(name):
        return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))

    return {
        "history": read("history"),
        "metrics": read("metrics"),
        "weights": hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest(),
        "out": str(out),
    }


def reference(folder):
    "The runs of the CPU trainer."
    mixture = make_mixture(folder / "cache")
    options = {
        "curve": ({}, {}),
        "stopped": (STOPPED, {"evaluate": Scores()}),
        "theirs": ({"steps": 6, "save_every": 2}, {}),
    }
    for name, (changes, more) in options.items():
        trainer.train(
            make_encoder(), mixture, make_config(**changes), folder / name, progress=False, **more
        )
    return {name: records(folder / name) for name in options}


def run(folder):
    "A run with everything in it, counted; then runs like the CPU trainer's."
    mesh = begin(folder)
    mixture = make_mixture(folder / "cache")
    encoder = make_encoder(dropout=0.1)
    config = make_config(**COUNTED)
    options, begun = {"buckets": BUCKETS, "mesh": mesh, "progress": False}, xla.counters()
    xla.train(encoder, mixture, config, folder / "all", graded, **options)
    found = {
        "counts": {name: value - begun[name] for name, value in xla.counters().items()},
        "programs": len(xla.programs()),
        "shapes": [],
    }
    tokens = Tokens(encoder.tokenizer, LENGTH, BUCKETS)
    for batch in map(tokens, map(mixture.batch, range(config.steps))):
        found["shapes"].append(
            (
                batch.identities.shape[1],
                tokens.bucket(batch),
                int(batch.lengths.min()) == tokens.bucket(batch),
            )
        )
    if DEVICES == 4:
        found["embeddings"] = encoder.encode(TEXTS, progress=False).tolist()
        found["broken"] = raised(
            xla.train,
            make_encoder(dropout=0.1),
            Broken(mixture, 13),
            config,
            folder / "broken",
            graded,
            **options,
        )
    xla.train(make_encoder(), mixture, make_config(), folder / "curve", **options)
    if DEVICES == 4:
        xla.train(
            make_encoder(), mixture, make_config(**STOPPED), folder / "stopped", Scores(), **options
        )
        xla.train(
            make_encoder(),
            mixture,
            make_config(steps=12, log_every=7, eval_every=2, save_every=5),
            folder / "apart",
            lambda encoder: {"score": 0.5},
            **options,
        )
    return found | {
        name: records(folder / name)
        for name in ("all", "curve", "stopped", "apart")
        if (folder / name).is_dir()
    }


def resume(folder):
    "The broken run, continued in a new process."
    mesh, mixture = begin(folder), make_mixture(folder / "cache")
    xla.train(
        make_encoder(dropout=0.1),
        mixture,
        make_config(**COUNTED),
        folder / "broken",
        graded,
        buckets=BUCKETS,
        mesh=mesh,
        progress=False,
        resume=True,
    )
    return records(folder / "broken")


# ---- what must not pass


def raised(f, *args, **kwargs):
    "What a call complains about."
    try:
        f(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def change_class(backbone, old, new):
    for module in backbone.modules():
        if type(module) is old:
            module.__class__ = new


class TheirNorm(torch.nn.LayerNorm):
    "A LayerNorm of somebody else, which `shardable` does not know."


class Asking(torch.nn.Module):
    "Looks at a value in the middle of a step."

    def forward(self, x):
        return x if x.sum() > 0 else -x


def poisoned(encoder):
    with torch.no_grad():
        next(encoder.parameters())[5] = float("nan")
    return encoder


def taken(folder, name):
    "The program compiled last, moved away from where the guard looks."
    text = folder / f"{name}.txt"
    shutil.move(newest_program(folder), text)
    return str(text)


def guards(folder):
    "Each thing that must be refused and what is said; FOLDER holds a run of trainer.train."
    mesh = begin(folder)
    mixture = make_mixture(folder / "cache")
    tokens = Tokens(make_tokenizer(), LENGTH, BUCKETS)
    batch, found, programs = kinds(mixture, tokens)["pairs"], {}, {}

    def one(encoder, *batches, change=lambda backbone: None):
        return list(on_devices(encoder, batches, make_config(), mesh, change))

    def train(name, encoder=None, data=mixture, buckets=BUCKETS, resume=False, **changes):
        return raised(
            xla.train,
            encoder or make_encoder(),
            data,
            make_config(**changes),
            folder / name,
            buckets=buckets,
            mesh=mesh,
            progress=False,
            resume=resume,
        )

    for name, old, new in (
        ("ours", None, None),
        ("norm", xla.ShardableLayerNorm, torch.nn.LayerNorm),
        ("dropout", xla.HashDropout, torch.nn.Dropout),
    ):
        one(
            make_encoder(dropout=0.1),
            batch,
            change=lambda backbone: change_class(backbone, old, new),
        )
        found[name] = raised(xla.check_program, (batch.identities.numel(), LENGTH), DEVICES)
        programs[name] = taken(folder, name)
    cut = batch._replace(
        lengths=batch.lengths.clamp(max=32),
        token_ids=torch.cat([ids[:32] for ids in batch.token_ids.split(batch.lengths.tolist())]),
    )
    found["two lengths"] = raised(one, make_encoder(), batch, cut)
    found["asking"] = raised(
        one,
        make_encoder(),
        batch,
        change=lambda backbone: setattr(backbone.encoder.layer[0].output, "dropout", Asking()),
    )
    before, _ = xla.counters()["fallbacks"], torch.ones(1, device="xla").item()
    found["fallback"] = raised(xla.check_program, (1, 1), 1, before)
    odd = make_encoder()
    change_class(odd.backbone, torch.nn.LayerNorm, TheirNorm)
    found["replicated"] = train("replicated", odd, steps=6)
    taken(folder, "replicated")
    found["lost"] = train("lost", poisoned(make_encoder()), steps=6)
    found["lost before a checkpoint"] = train(
        "lost before", poisoned(make_encoder()), steps=6, log_every=6, save_every=2
    )
    found["lost late"] = train("lost late", poisoned(make_encoder()), steps=6, log_every=6)
    found["indivisible"] = train("indivisible", data=make_mixture(folder / "cache", 18))
    found["family"] = train("family", make_encoder("electra"))
    found["learned"] = train("learned", learn_scale=True)
    found["tiled"] = train("tiled", tiled=True)
    found["positions"] = train("positions", buckets=(32, 128))
    found["bf16"] = train("bf16", bf16=True, save_every=10)
    bf16 = newest_program(folder).replace(".cpu_after_", ".before_")
    # as if they had been killed at their end: a finished run is not resumed
    for name in ("theirs", "bf16"):
        metrics = folder / name / "metrics.json"
        metrics.write_text(
            json.dumps({key: json.loads(metrics.read_text())[key] for key in ("before", "test")})
        )
    found["their checkpoint"] = train("theirs", resume=True, steps=6, save_every=2)
    found["another model"] = train(
        "bf16", make_encoder(intermediate_size=48), resume=True, bf16=True, save_every=10
    )
    found["claimed"] = train("bf16")
    found["other buckets"] = train("bf16", buckets=(64,), resume=True, bf16=True, save_every=10)
    (folder / "bf16" / "checkpoints" / "checkpoint-20" / "training.pt").unlink()
    found["not whole"] = train("bf16", resume=True, bf16=True, save_every=10)

    def curious(encoder):
        return {"score": torch.ones(1, device="xla").item()}

    found["an evaluation that asks the device"] = raised(
        xla.train,
        make_encoder(),
        mixture,
        make_config(steps=20, eval_every=2),
        folder / "curious",
        curious,
        buckets=BUCKETS,
        mesh=mesh,
        progress=False,
    )
    return {
        "programs": programs,
        "said": found,
        "bf16": records(folder / "bf16"),
        "bf16 program": bf16,
        "there": sorted(p.name for p in folder.iterdir() if p.is_dir()),
        "kept of the lost": len([*(folder / "lost before").rglob("checkpoint-*")]),
    }


def late(folder):
    "SPMD after a tensor."
    import torch_xla

    torch.ones(1, device=torch_xla.device())
    return {"late": raised(xla.start)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
