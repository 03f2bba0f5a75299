"""Jobs of test_xla.py that need XLA devices. Their number is fixed when XLA starts, so each job is a process of its own:

    CPU_NUM_DEVICES=4 python tests/xla_child.py step FOLDER

A job prints one JSON object on its last line; FOLDER receives what it writes. DEVICES=0 means one device without SPMD.
"""
import copy
import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from conftest import make_backbone, make_tokenizer
from datasets import Dataset

from contrastive_st import trainer, xla
from contrastive_st.data import ScoredPairs, Source, load_source, quickstart_folder, read_sts
from contrastive_st.evaluation import evaluate_sts
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.tokens import Tokens
from contrastive_st.trainer import TrainConfig, batch_loss

DEVICES = int(os.environ.get("DEVICES", 0))
BUCKETS = (16, 32, 64)


# ---- what is trained, on what: the same in every process

def make_encoder(family="bert", dropout=0.0):
    "A random encoder of two layers, the same weights each time; attention dropout is always 0, as on XLA."
    from transformers import AutoModel, DistilBertConfig, MPNetConfig, RobertaConfig

    tokenizer = make_tokenizer()
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64 + 2, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "attention_probs_dropout_prob": 0.0, **common}
    configs = {"roberta": lambda: RobertaConfig(**sizes), "mpnet": lambda: MPNetConfig(**sizes),
               "distilbert": lambda: DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, attention_dropout=0.0, **common)}
    if family == "bert":
        backbone = make_backbone(len(tokenizer))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = AutoModel.from_config(configs[family]())
    for name, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0 if re.search(r"attention\.(self\.)?(attn\.)?dropout$", name) else dropout
    return SentenceEncoder(backbone, tokenizer, max_length=64)


def make_mixture(batch_size=24, cache=None):
    """Pairs and triplets of the quickstart corpus in full, short and long: short texts need a smaller bucket, and of the long ones
    each is cut, so that their batches have no padding. With real data around, NLI triplets too."""
    desk = quickstart_folder()
    sources = [load_source(desk / f"train/{name}.jsonl", name=name, cache_dir=cache) for name in ("question_answer", "question_question", "slang_triplets")]
    questions = [q for q, _ in sources[1].rows(range(200))]
    short = {"anchor": [" ".join(q.split()[:2]) for q in questions], "positive": [" ".join(q.split()[-2:]) for q in questions]}
    long = {"anchor": [" ".join(questions[i:i + 6]) for i in range(150)], "positive": [" ".join(questions[i + 20:i + 26]) for i in range(150)]}
    sources += [Source(Dataset.from_dict(table), name) for name, table in (("short", short), ("long", long))]
    nli = Path(os.environ.get("CONTRASTIVE_ST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "train" / "AllNLI_devtest_triplets.jsonl.gz"
    sources += [load_source(nli, name="nli", cache_dir=cache)] if nli.is_file() else []
    return Mixture(sources, [1.0] * len(sources), batch_size, 1)


def make_config(**changes):
    return TrainConfig(**{"steps": 20, "warmup": 5, "lr": 5e-4, "log_every": 1, "workers": 1} | changes)


# ---- one step, by hand and on the devices

class Kept:
    "In the place of an optimiser: keeps the gradients."
    def __init__(self, encoder): self.parameters = [p for p in encoder.parameters() if p.requires_grad]
    def step(self): self.gradients = [p.grad for p in self.parameters]
    def zero_grad(self, set_to_none):
        for p in self.parameters: p.grad = None


def eager(encoder, batch, config, noise=None):
    "Loss and gradients on the host: the encoder as it is, on ragged texts; with noise, the rectangle with hashed dropout."
    encoder = copy.deepcopy(encoder).train()
    if noise is None:
        vectors = encoder(batch.token_ids, batch.lengths)
    else:
        xla.shardable(encoder.backbone, noise)
        arrays = xla.lay_out(batch, 64)
        noise.rows, noise.step = arrays["rows"], torch.tensor(7, dtype=torch.int32)
        vectors = xla.embed(encoder, arrays["input_ids"], arrays["lengths"])
    loss, masked = batch_loss(vectors, batch.identities, config)
    loss.backward()
    return {"loss": loss.item(), "masked": masked.item(), "gradients": {n: p.grad for n, p in encoder.named_parameters()}, "vectors": vectors.detach()}


def on_devices(encoder, batch, config, mesh, change=lambda backbone: None, guard=True):
    "The same through the compiled step; `change` may spoil the backbone."
    import torch_xla
    import torch_xla.distributed.spmd as spmd

    devices, twin, noise, device = max(DEVICES, 1), copy.deepcopy(encoder).train(), xla.Noise(config.seed), torch_xla.device()
    change(xla.shardable(twin.backbone, noise))
    twin.to(device)
    arrays = {name: value.to(device) for name, value in xla.lay_out(batch, 64, devices).items()}
    if mesh:
        for p in (*twin.parameters(), *twin.buffers()): spmd.mark_sharding(p, mesh, (None,) * p.dim())
        for value in arrays.values(): spmd.mark_sharding(value, mesh, ("data",) + (None,) * (value.dim() - 1))
    totals, number, kept = torch.zeros(6, device=device), torch.tensor(7, dtype=torch.int32, device=device), Kept(twin)
    torch_xla.sync(wait=True)
    before = xla.counters()
    totals, _ = xla.make_step(twin, kept, config, noise, devices, 1)(totals, number, **arrays)
    after = xla.counters()
    gradients = {n: p.cpu() for (n, _), p in zip(twin.named_parameters(), kept.gradients)}
    loss, norm, masked, *_ = totals.cpu().tolist()
    return {"loss": loss, "masked": masked, "norm": norm, "gradients": gradients, "counts": {k: after[k] - before[k] for k in after}}


def compared(here, there):
    "How far the devices are from eager."
    ours, theirs = (torch.cat([g.flatten() for g in side["gradients"].values()]).double() for side in (there, here))
    size = theirs.norm()
    worst = max((there["gradients"][n] - g).norm() / max(g.norm(), 1e-3 * size) for n, g in here["gradients"].items())
    return {"loss": abs(here["loss"] - there["loss"]), "masked": abs(here["masked"] - there["masked"]), "gradients": ((ours - theirs).norm() / size).item(),
            "worst": worst.item(), "norm": abs(there["norm"] - size.item()) / size.item(), **there["counts"], "value": there["loss"]}


def begin(folder):
    "Turn on the devices, before anything else: autograd sizes its queues at the first backward pass."
    if DEVICES:
        return xla.start(folder / "hlo")
    import torch_xla
    torch.zeros(1, device=torch_xla.device())


def step(folder):
    "One step of each kind, against eager."
    mesh = begin(folder)
    mixture, tokens, config = make_mixture(cache=folder / "cache"), Tokens(make_tokenizer(), 64, BUCKETS), make_config(clip=1e9)
    batches = {}
    for s in range(20):
        batch = mixture.batch(s)
        batches.setdefault("long" if batch.sources[0] == "long" else len(batch.examples[0]), tokens(batch))
    found = {}
    for name, family, batch, changes in (("pairs", "bert", 2, {}), ("triplets", "bert", 3, {}), ("full", "bert", "long", {}), ("one way", "bert", 2, {"symmetric": False}),
                                         *((family, family, 2, {}) for family in ("roberta", "distilbert", "mpnet"))):
        encoder, cfg = make_encoder(family), make_config(clip=1e9, **changes)
        start = time.time()
        found[name] = compared(eager(encoder, batches[batch], cfg), on_devices(encoder, batches[batch], cfg, mesh)) | {"seconds": time.time() - start}
    encoder = make_encoder(dropout=0.1)
    found["dropout"] = compared(eager(encoder, batches[2], config, xla.Noise(config.seed)), on_devices(encoder, batches[2], config, mesh))
    found["dropout"]["other"] = eager(encoder, batches[2], config, xla.Noise(1))["loss"]
    return found


# ---- whole runs

def evaluation(encoder):
    "Real work on the host between steps: graded pairs."
    sts = read_sts(quickstart_folder() / "sts.tsv")
    sts = ScoredPairs(*(column[:60] for column in sts))
    return {"spearman": evaluate_sts(lambda texts: encoder.encode(texts, progress=False), sts, resamples=10)["spearman"]}


def shapes(mixture, tokens, steps):
    "(columns, length) of each step, and whether its batch has no padding."
    found = []
    for s in range(steps):
        batch = tokens(mixture.batch(s))
        T = tokens.bucket(batch)
        found.append((batch.identities.shape[1], T, int(batch.lengths.min()) == T))
    return found


def records(out):
    "What a run left: its history, and a digest of the weights."
    return {"history": json.loads((out / "history.json").read_text()), "metrics": json.loads((out / "metrics.json").read_text()),
            "weights": hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest(), "out": str(out)}


def losses(encoder): return [line["loss"] for line in encoder["history"] if "loss" in line]


class Scores:
    "An evaluation whose answers are known beforehand."
    def __init__(self): self.values = [0.1, 0.2, 0.5, 0.3, 0.4, 0.6]
    def __call__(self, encoder): return {"score": self.values.pop(0)}


class Broken:
    "A mixture that fails from some step on, as a disk may; the batches are made by background threads."
    def __init__(self, mixture, step): self.mixture, self.step = mixture, step
    def __getattr__(self, name): return getattr(self.mixture, name)

    def batch(self, step, *rank):
        if step >= self.step: raise OSError(f"no batch {step}: the disk is gone")
        return self.mixture.batch(step, *rank)


def raised(f, *args, **kwargs):
    "What a call complains about."
    try: f(*args, **kwargs)
    except Exception as error: return f"{type(error).__name__}: {error}"
    return "nothing"


STOPPED = {"metric": "score", "eval_every": 4, "patience": 2, "log_every": 4}


def reference(folder):
    "The runs of the CPU trainer."
    mixture, make = make_mixture(cache=folder / "cache"), lambda name, **changes: (make_config(**changes), folder / name)
    for name, changes, options in (("curve", {}, {}), ("stopped", STOPPED, {"evaluate": Scores()}), ("theirs", {"steps": 6, "save_every": 2}, {})):
        trainer.train(make_encoder(), mixture, make_config(**changes), folder / name, progress=False, **options)
    return {name: records(folder / name) for name in ("curve", "stopped", "theirs")}


COUNTED = {"log_every": 4, "eval_every": 8}     # a log line begins where a checkpoint ends, so that a resumed run has the same lines


def run(folder):
    "A run with everything in it, counted; then one like the CPU trainer's."
    mesh, mixture, encoder, config = begin(folder), make_mixture(cache=folder / "cache"), make_encoder(dropout=0.1), make_config(**COUNTED)
    options, begun = {"buckets": BUCKETS, "mesh": mesh, "progress": False}, xla.counters()
    xla.train(encoder, mixture, config, folder / "all", evaluation, **options)
    found = {"counts": {name: value - begun[name] for name, value in xla.counters().items()},
             "shapes": shapes(mixture, Tokens(encoder.tokenizer, 64, BUCKETS), config.steps), "programs": sorted(p.name for p in (folder / "hlo").glob("*cpu_after_optimizations.txt"))}
    if DEVICES == 4:
        found["embeddings"] = encoder.encode(TEXTS, progress=False).tolist()
        found["broken"] = raised(xla.train, make_encoder(dropout=0.1), Broken(mixture, 13), config, folder / "broken", evaluation, **options)
    xla.train(make_encoder(), mixture, make_config(), folder / "curve", **options)
    if DEVICES == 4:
        xla.train(make_encoder(), mixture, make_config(**STOPPED), folder / "stopped", Scores(), **options)
    return found | {name: records(folder / name) for name in ("all", "curve", "stopped") if (folder / name).is_dir()}


def resume(folder):
    "The broken run, continued in a new process; FOLDER is its directory."
    mesh, mixture = begin(folder), make_mixture(cache=folder / "cache")
    xla.train(make_encoder(dropout=0.1), mixture, make_config(**COUNTED), folder, evaluation, buckets=BUCKETS, mesh=mesh, progress=False, resume=True)
    return records(folder)


# ---- what must not pass

def change_class(backbone, old, new):
    for module in backbone.modules():
        if type(module) is old: module.__class__ = new


class Asking(torch.nn.Module):
    "Looks at a value in the middle of a step."
    def forward(self, x): return x if x.sum() > 0 else -x


def poison(encoder):
    with torch.no_grad(): next(encoder.parameters())[5] = float("nan")
    return encoder


def guards(folder):
    "Each thing that must be refused, and what is said."
    mesh, mixture = begin(folder), make_mixture(cache=folder / "cache")
    tokens, options = Tokens(make_tokenizer(), 64, BUCKETS), {"buckets": BUCKETS, "mesh": mesh, "progress": False}
    batch, found, programs = next(tokens(b) for b in map(mixture.batch, range(20)) if len(b.examples[0]) == 2), {}, {}
    for name, change, dropout in (("ours", lambda backbone: None, 0.1),
                                  ("dropout", lambda backbone: change_class(backbone, xla.HashDropout, torch.nn.Dropout), 0.1),
                                  ("norm", lambda backbone: change_class(backbone, xla.ShardableLayerNorm, torch.nn.LayerNorm), 0.0)):
        on_devices(make_encoder(dropout=dropout), batch, make_config(), mesh, change)
        found[name] = raised(xla.check_program, batch.identities.numel() * 64, DEVICES)
        programs[name] = taken(folder, name)

    before, _ = xla.counters()["fallbacks"], torch.ones(1, device="xla").item()
    found["fallback"] = raised(xla.check_program, 7, 1, before)
    found["asking"] = raised(on_devices, make_encoder(), batch, make_config(), mesh, lambda backbone: setattr(backbone.encoder.layer[0].output, "dropout", Asking()))
    found["programs"] = raised(one_program_for_two_lengths, batch, mesh)

    class TheirNorm(torch.nn.LayerNorm): pass
    odd, start = make_encoder(), lambda name, encoder=None, data=mixture, **changes: raised(
        xla.train, encoder or make_encoder(), data, make_config(**changes), folder / name, **options)
    change_class(odd.backbone, torch.nn.LayerNorm, TheirNorm)
    found["replicated"] = start("replicated", odd, steps=6)
    taken(folder, "replicated")
    found["lost"] = start("lost", poison(make_encoder()), steps=6)
    found["lost late"] = start("lost late", poison(make_encoder()), steps=6, log_every=6)
    found["indivisible"] = start("indivisible", data=make_mixture(18, cache=folder / "cache"))
    found["family"] = start("family", electra())
    start("bf16", bf16=True)
    options["buckets"] = (32, 128)
    found["positions"] = start("positions")
    return {"programs": programs, "said": found, "bf16": records(folder / "bf16"), "there": sorted(p.name for p in folder.iterdir())}


def taken(folder, name):
    "The newest program's text, moved away from where the guard looks."
    files = sorted((folder / "hlo").glob("*.contrastive.*cpu_after_optimizations.txt"))
    shutil.copy(files[-1], folder / f"{name}.txt")
    for file in files: file.unlink()
    return str(folder / f"{name}.txt")


def one_program_for_two_lengths(batch, mesh):
    import torch_xla

    encoder, noise = make_encoder(), xla.Noise()
    xla.shardable(encoder.backbone, noise)
    encoder.to("xla")
    step, totals, number = xla.make_step(encoder, Kept(encoder), make_config(), noise, DEVICES, 1), torch.zeros(6).to("xla"), torch.tensor(0, dtype=torch.int32).to("xla")
    torch_xla.sync(wait=True)
    for T in (64, 32):
        cut = batch._replace(lengths=batch.lengths.clamp(max=T), token_ids=torch.cat([ids[:T] for ids in batch.token_ids.split(batch.lengths.tolist())]))
        totals, number = step(totals, number, **{name: value.to("xla") for name, value in xla.lay_out(cut, T, DEVICES).items()})


def electra():
    from transformers import ElectraConfig, ElectraModel
    tokenizer = make_tokenizer()
    return SentenceEncoder(ElectraModel(ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                      intermediate_size=16, max_position_embeddings=64)), tokenizer, max_length=64)


def late(folder):
    "SPMD after a tensor; and an eager backward pass before XLA."
    torch.ones(1, device=__import__("torch_xla").device())
    return {"late": raised(xla.start)}


def early(folder):
    "A backward pass on the host before XLA was ever used."
    torch.ones(1, requires_grad=True).sum().backward()
    return {"early": raised(xla.train, make_encoder(), make_mixture(cache=folder / "cache"), make_config(steps=6), folder / "early", buckets=BUCKETS, progress=False)}


TEXTS = ["What time does the yawn start tonight?", "The lock keeper publishes each period on form L4.", "a", "rain " * 90]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
