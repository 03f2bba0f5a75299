"""What is interrupted: small runs of everything that writes, with what they must leave."""

import hashlib
import json
import re

import numpy as np
import torch
from conftest import make_backbone, make_tokenizer, sentences
from datasets import Dataset

from contrastive_st import atomic, card, data, encoding, store, trainer
from contrastive_st.mixture import Mixture
from contrastive_st.model import SentenceEncoder
from contrastive_st.tokens import Tokens
from faults.atoms import LOCK, Scenario, leftovers


def make_encoder(dropout=0.0, shift=0.0):
    "The tiny encoder of conftest; `shift` makes it another one."
    tokenizer = make_tokenizer()
    encoder = SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
    with torch.no_grad():
        next(encoder.parameters()).add_(shift)
    return encoder


def digest(*parts):
    "One short digest of bytes, arrays and texts."
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(part if isinstance(part, bytes) else str(part).encode())
    return whole.hexdigest()


# ---- training ----

CLOCK = re.compile(r"^epoch$|second|runtime|date|input_share|memory|train_loss|flos|time")
STEPS = 6


def without_clock(value):
    "A record without what differs from run to run."
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not CLOCK.search(k)}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def make_mixture():
    "Two sources in memory, mixed."

    def columns(seed):
        return {"anchor": sentences(24, seed), "positive": sentences(24, seed + 1)}

    sources = [data.Source(Dataset.from_dict(columns(seed)), f"set{seed}") for seed in (1, 5)]
    return Mixture(sources, [1.0, 2.0], 8, 1)


def measure(encoder):
    "A metric that changes with every bit of the weights, and is not best at the end."
    total = sum(p.detach().double().abs().sum().item() for p in encoder.parameters())
    return {"m": total * 29 % 1}


class Train(Scenario):
    "A run that keeps its best model, then its card, as the command line does."

    name = "train"
    ignored = "/tensorboard/"
    config = dict(eval_every=2, metric="m")
    mixture = staticmethod(make_mixture)

    def settings(self):
        common = dict(
            steps=STEPS, warmup=1, lr=3e-3, log_every=1, workers=0, seed=3, matmul="default"
        )
        return trainer.TrainConfig(**common, **self.config)

    def run(self, folder, resume):
        encoder, out = make_encoder(dropout=0.1), folder / "run"
        options = dict(resume=resume, recipe='title = "swept"\n', progress=False)
        trainer.train(encoder, self.mixture(), self.settings(), out, measure, measure, **options)
        card.write_card(out)

    def outcome(self, folder):
        out = folder / "run"
        records = {p.name: json.loads(p.read_text()) for p in sorted(out.glob("*.json"))}
        records["run.json"].pop("id")  # another one in each run
        history = records.pop("history.json")
        records.pop("versions.json")["torch"]
        checkpoints = sorted(p.name for p in (out / "checkpoints").iterdir())
        model = SentenceEncoder.from_pretrained(out / "model")
        return {
            "weights": digest(*(p.detach().numpy().tobytes() for p in model.parameters())),
            "records": without_clock(records),
            "history": [without_clock(x) for x in history if "loss" in x or "eval_m" in x],
            "recipe": (out / "recipe.toml").read_text(),
            "card": (out / "model" / "README.md").read_text()[:3],
            "model": sorted(p.relative_to(out).as_posix() for p in (out / "model").rglob("*")),
            "checkpoints": [x for x in checkpoints if not x.startswith(".")],
            "leftovers": leftovers(folder),
        }


class TrainLast(Train):
    "A run that keeps its last model, and saves more often than it evaluates."

    name = "train-last"
    config = dict(eval_every=3, save_every=2)


# ---- preparing data ----


class Prepare(Scenario):
    "Two datasets with a bad line each, written into stores of several shards, and tokenised."

    name = "prepare"
    rows = 40

    def prepare(self, template):
        for n, seed in enumerate((11, 13)):
            left, right = sentences(self.rows, seed), sentences(self.rows, seed + 100)
            lines = [json.dumps(pair) for pair in zip(left, right)]
            lines.insert(7, '["only one"]')
            (template / f"set{n}.jsonl").write_text("\n".join(lines) + "\n")

    def run(self, folder, resume):
        store.SHARD_ROWS = 16
        wanted = [
            {"name": f"set{n}", "path_or_hub_id": str(folder / f"set{n}.jsonl")} for n in (0, 1)
        ]
        data.prepare(wanted, folder / "stores", workers=1, progress=False)
        for n in (0, 1):
            tokens = Tokens(make_tokenizer(), 32)
            tokens.prepare(data.store_folder(folder / "stores", f"set{n}"))

    def content(self, folder, n):
        "The rows of one store, as a digest."
        place = data.store_folder(folder / "stores", f"set{n}")
        opened = store.Store(place)
        rows = range(len(opened))
        texts, ids = opened.rows(rows), opened.identities(rows)
        tokens = [
            tuple(bytes(x) if not isinstance(x, int) else x for x in row)
            for row in opened.tokens(rows)
        ]
        return [len(opened), digest(texts), digest(ids.tobytes()), digest(tokens)]

    def outcome(self, folder):
        places = [data.store_folder(folder / "stores", f"set{n}") for n in (0, 1)]
        return {
            "stores": [self.content(folder, n) for n in (0, 1)],
            "rejects": [(p / store.REJECTS).read_text() for p in places],
            "files": sorted(
                str(p.relative_to(folder)) for p in folder.rglob("*") if not LOCK.search(p.name)
            ),
            "leftovers": leftovers(folder),
        }


class PrepareOver(Prepare):
    "The same over stores of older data, which stay readable until the new ones are whole."

    name = "prepare-over"

    def prepare(self, template):
        super().prepare(template)
        self.run(template, False)
        for path in template.glob("*.jsonl"):
            path.write_text(path.read_text() + json.dumps(sentences(2, 99)) + "\n")

    def between(self, folder):
        for n in (0, 1):
            place = data.store_folder(folder / "stores", f"set{n}")
            aside = place.with_name(f".{place.name}.old")
            if not place.exists() and aside.exists():
                continue  # without renameat2: between the two renames
            rows = len(store.Store(place))
            if rows not in (self.rows, self.rows + 1):
                return f"set{n} has {rows} rows"
        return ""


# ---- encoding ----


class Encode(Scenario):
    "Texts to a NumPy file."

    name = "encode"
    file, resumes_first = "vectors.npy", True
    texts = sentences(60, 21)

    def run(self, folder, resume):
        path, options = folder / self.file, dict(window=16, progress=False)
        resume = resume or self.resumes_first
        encoding.write_embeddings(path, make_encoder(), self.texts, resume=resume, **options)

    def outcome(self, folder):
        path = folder / self.file
        note = json.loads((folder / f"{self.file}.json").read_text())
        return {
            "vectors": digest(path.read_bytes()),
            "note": digest(sorted(note.items())),
            "files": sorted(p.name for p in folder.iterdir() if not LOCK.search(p.name)),
            "leftovers": leftovers(folder),
        }


class EncodeOver(Encode):
    "To a NumPy file where vectors of other texts are."

    name = "encode-over"
    resumes_first = False

    def run(self, folder, resume):
        begun = (folder / f"{self.file}.part" / "state.json").exists()
        try:
            super().run(folder, resume)
        except ValueError as error:
            # killed before it wrote anything, it cannot be told from a run that never was
            if begun or "of these texts only; delete it" not in str(error):
                raise
            super().run(folder, False)

    def prepare(self, template):
        options = dict(window=16, progress=False)
        encoding.write_embeddings(template / self.file, make_encoder(), self.texts[:20], **options)

    def between(self, folder):
        rows = len(np.load(folder / self.file))
        return "" if rows in (20, 60) else f"the file has {rows} rows"


class EncodeParquet(Encode):
    "Texts to a Parquet file."

    name = "encode-parquet"
    file = "vectors.parquet"


# ---- models and cards ----


class Save(Scenario):
    "A model directory where nothing is."

    name = "save"
    shifts = (0.5,)  # what may be there after a kill

    def run(self, folder, resume):
        make_encoder(shift=0.5).save_pretrained(folder / "model")

    def read(self, folder):
        "The first weight of the model."
        encoder = SentenceEncoder.from_pretrained(folder / "model")
        return digest(*(p.detach().numpy().tobytes() for p in encoder.parameters()))

    def between(self, folder):
        if not (folder / "model").exists():
            return ""
        atomic.check_folder(folder / "model")
        encoders = [make_encoder(shift=shift) for shift in self.shifts]
        right = [digest(*(p.detach().numpy().tobytes() for p in e.parameters())) for e in encoders]
        return "" if self.read(folder) in right else "the model is neither the old nor the new one"

    def outcome(self, folder):
        return {
            "weights": self.read(folder),
            "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")),
            "leftovers": leftovers(folder),
        }


class SaveOver(Save):
    "A model directory over another one, in which a user keeps a README of their own."

    name = "save-over"
    shifts = (0.0, 0.5)

    def prepare(self, template):
        make_encoder().save_pretrained(template / "model")
        (template / "model" / "README.md").write_text("mine\n")

    def between(self, folder):
        if not (folder / "model").exists():
            return "the old model is gone"
        if not (folder / "model" / "README.md").exists():
            return "the README of the user is gone"
        return super().between(folder)


class Card(Scenario):
    "The card of a finished run, where an older card is."

    name = "card"

    def prepare(self, template):
        Train().run(template, False)
        (template / "run" / "model" / "README.md").write_text("older\n")

    def run(self, folder, resume):
        card.write_card(folder / "run")

    def between(self, folder):
        text = (folder / "run" / "model" / "README.md").read_text()
        return "" if text == "older\n" or text.startswith("---\n") else f"the card is {text[:20]!r}"

    def outcome(self, folder):
        text = (folder / "run" / "model" / "README.md").read_text()
        return {
            # the seconds of the run differ between templates
            "card": (text == card.model_card(folder / "run")),
            "leftovers": leftovers(folder),
        }


KINDS = (
    *(Train, TrainLast, Prepare, PrepareOver, Encode, EncodeOver, EncodeParquet),
    *(Save, SaveOver, Card),
)
SCENARIOS = {scenario.name: scenario for scenario in KINDS}
