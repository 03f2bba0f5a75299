"""Mutated inputs: JSON, TOML, model directories and data files, each changed in one place."""

import json
import random
import resource
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from contrastive_st import data, mixture, recipes
from contrastive_st.model import SentenceEncoder
from faults.scenarios import make_encoder, sentences

SLOWEST, LONGEST_MESSAGE, MEMORY = 10, 600, 6 * 2**30  # seconds, characters beside the path, bytes

VALUES = [
    *(None, True, False, 0, -1, 1, 5, 10**19, -(10**19)),
    *(2**31, 0.5, float("nan"), float("inf"), 1e308),
    *("", "x", "../x", "/dev/zero", "\x00", "\ud800", "ü" * 3000),
    *("1", "nan", [], {}, [[]], [None], [1, 2], {"a": 1}),
    *([[[[[[]]]]]], "__import__('os')", "mean", "cls", "gelu", "silu", [0] * 300),
]


# ---- mutations ----


def nodes(value, path=()):
    "Every place in a JSON value."
    yield path
    children = ()
    if isinstance(value, dict):
        children = value.items()
    if isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from nodes(child, (*path, key))


def mutated_value(value, chance):
    "A JSON value with one place changed."
    *way, last = chance.choice([path for path in nodes(value) if path] or [("x",)])
    place = value
    for key in way:
        place = place[key]
    if chance.random() < 0.2 and isinstance(place, (dict, list)) and place:
        del place[last]
    elif isinstance(place, (dict, list)):
        place[last] = chance.choice(VALUES)
    return value


def mutated_bytes(raw, chance):
    "Bytes with one change: cut, flipped, doubled, put in, or nested."
    at = chance.randrange(len(raw) + 1)
    insert = chance.choice(
        [
            *(b"\x00", b"\xff", b"[" * 20_000, b'{"a":' * 5_000),
            *(b"9" * 5_000, b"\n\n", b'"', b"\t", b",,,", b"\\u"),
        ]
    )
    flipped = bytearray(raw or b"x")
    flipped[at % len(flipped)] ^= 1 << chance.randrange(8)
    return chance.choice(
        [
            raw[:at],
            bytes(flipped),
            raw[:at] + raw[at // 2 :],
            raw[:at] + insert + raw[at:],
            b"",
            insert,
        ]
    )


def mutate(path, chance):
    "Change one file in one place."
    raw = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.7:
        text = json.dumps(mutated_value(json.loads(raw), chance))
        path.write_text(text)
    else:
        path.write_bytes(mutated_bytes(raw, chance))


# ---- inputs ----


def model_input(folder, chance):
    make_encoder().save_pretrained(folder / "m")
    mutate(
        chance.choice(
            sorted(p for p in (folder / "m").rglob("*") if p.suffix in (".json", ".safetensors"))
        ),
        chance,
    )
    vectors = SentenceEncoder.from_pretrained(folder / "m").encode(["a man", ""], progress=False)
    if not np.isfinite(vectors).all():
        raise AssertionError("vectors that are not finite, without a word")


def mix_input(folder, chance):
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(
            "\n".join(json.dumps(pair) for pair in zip(sentences(9, 1), sentences(9, 2)))
        )
    entries = [
        {"name": "a.jsonl", "lines": 9, "weight": 1},
        {"name": "b.jsonl", "lines": 9, "weight": 2.5},
    ]
    (folder / "data_config.json").write_text(json.dumps(entries))
    mutate(folder / "data_config.json", chance)
    mixture.Mixture.from_config(
        folder / "data_config.json", folder, batch_size=4, datasets_per_batch=1
    ).batch(0)


def rows_input(folder, chance):
    left, right = sentences(9, 1), sentences(9, 2)
    kinds = {
        "x.jsonl": "\n".join(json.dumps({"anchor": a, "positive": b}) for a, b in zip(left, right)),
        "x.json": json.dumps([[a, b] for a, b in zip(left, right)]),
        "x.tsv": "anchor\tpositive\n" + "\n".join(map("\t".join, zip(left, right))),
        "x.csv": "anchor,positive\n" + "\n".join(map(",".join, zip(left, right))),
    }
    name = chance.choice(sorted(kinds))
    (folder / name).write_text(kinds[name])
    mutate(folder / name, chance)
    list(data.read_examples(folder / name, on_error=chance.choice(["raise", "skip"])))


def sts_input(folder, chance):
    rows = [
        {"score": n % 6, "sentence1": a, "sentence2": b}
        for n, (a, b) in enumerate(zip(sentences(9, 1), sentences(9, 2)))
    ]
    table = "score\tsentence1\tsentence2\n" + "\n".join(
        "\t".join(map(str, row.values())) for row in rows
    )
    name, text = chance.choice(
        [
            ("s.tsv", table),
            ("s.jsonl", "\n".join(map(json.dumps, rows))),
            ("s.json", json.dumps(rows)),
        ]
    )
    (folder / name).write_text(text)
    mutate(folder / name, chance)
    data.read_sts(folder / name)


def retrieval_input(folder, chance):
    (folder / "qrels").mkdir()
    lines = [
        json.dumps({"_id": str(n), "title": "", "text": text})
        for n, text in enumerate(sentences(9, 1))
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text("\n".join(lines[:3]))
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n0\t1\t1\n1\t2\t1\n2\t3\t0\n"
    )
    mutate(chance.choice(sorted(p for p in folder.rglob("*") if p.is_file())), chance)
    data.read_retrieval(folder)


def recipe_input(folder, chance):
    source = chance.choice(sorted(set(recipes.known().values())))
    (folder / "r.toml").write_bytes(mutated_bytes(Path(source).read_bytes(), chance))
    recipes.load(folder / "r.toml", tiny=chance.random() < 0.3)


INPUTS = [
    *(model_input, model_input, mix_input, rows_input, rows_input),
    *(sts_input, retrieval_input, recipe_input),
]


# ---- one after the other ----


@contextmanager
def at_most(seconds):
    "Raise TimeoutError in a block that takes longer."

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    remaining = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(remaining)
        signal.signal(signal.SIGALRM, before)


def fault_of(seed, folder):
    "What is wrong with how one input is taken; empty if it is read, or refused in a sentence."
    chance = random.Random(seed)
    make = INPUTS[seed % len(INPUTS)]
    try:
        with at_most(SLOWEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(folder, chance)
    except (ValueError, OSError) as error:
        words = str(error).replace(str(folder), "")
        if isinstance(error, TimeoutError) or isinstance(error, OSError) and not error.filename:
            return f"{make.__name__}: {type(error).__name__}: {words[:200]}"
        if len(words) > LONGEST_MESSAGE:
            return f"{make.__name__}: a message of {len(words):,} characters: {words[:120]}"
        known = type(error) in (ValueError, FileNotFoundError)
        if not known and not str(error).startswith(str(folder)):
            return f"{make.__name__}: {type(error).__name__}: {words[:200]}" * isinstance(
                error, UnicodeError
            )
    except BaseException as error:
        return f"{make.__name__}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def fuzz(folder, seeds):
    "Try some inputs; return how many were tried, and the faults by seed."
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    faults = {}
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        place = folder / f"input-{seed}"
        place.mkdir()
        if fault := fault_of(seed, place):
            faults[seed] = fault
    return {
        "tried": len(seeds),
        "failed": [f"seed {seed}: {fault}" for seed, fault in faults.items()],
    }
