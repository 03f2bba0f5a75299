"""The encoder against sentence-transformers: pooling, forward, encode, prompts, threads."""

import copy
import os
import platform
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edited_tokenizer, forget_unknown, make_backbone
from encoders import TEXTS, backbone_and_tokenizer, theirs

from contrastive_st import model
from contrastive_st.model import POOLINGS, SentenceEncoder
from contrastive_st.modeldir import Dense
from contrastive_st.precision import quantize
from contrastive_st.run import load_weights


@pytest.fixture
def encoder(tiny_backbone, tiny_tokenizer):
    return SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)


# ---- poolings ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_the_loop(name, seed):
    gen = torch.Generator().manual_seed(seed)
    hidden, mask = torch.randn(6, 9, 4, generator=gen), torch.randint(0, 2, (6, 9), generator=gen)
    mask[torch.arange(6), torch.randint(0, 9, (6,), generator=gen)] = 1  # one real token somewhere
    for row, (states, bits) in enumerate(zip(hidden, mask)):
        kept = [state for state, bit in zip(states, bits) if bit]
        expected = {
            "mean": sum(kept) / len(kept),
            "cls": kept[0],
            "max": torch.stack(kept).max(0).values,
            "mean_sqrt_len_tokens": sum(kept) / len(kept) ** 0.5,
            "weightedmean": sum(n * state for n, state in enumerate(kept, 1))
            / sum(range(1, len(kept) + 1)),
            "lasttoken": kept[-1],
        }[name]
        torch.testing.assert_close(POOLINGS[name](hidden, mask)[row], expected)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_sentence_transformers(name):
    from sentence_transformers.sentence_transformer.modules import Pooling

    hidden = torch.randn(4, 6, 8)
    mask = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    )
    theirs = Pooling(8, pooling_mode=name)({"token_embeddings": hidden, "attention_mask": mask})[
        "sentence_embedding"
    ]
    torch.testing.assert_close(POOLINGS[name](hidden, mask), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("skip", [1, 2])
def test_a_prompt_is_left_out_as_in_sentence_transformers(name, skip):
    from sentence_transformers.sentence_transformer.modules import Pooling

    hidden = torch.randn(3, 6, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": skip}
    theirs = Pooling(8, pooling_mode=name, include_prompt=False)(features)["sentence_embedding"]
    torch.testing.assert_close(POOLINGS[name](hidden, mask, skip), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_poolings_end_to_end_are_as_wide_as_their_sum(encoder, layout):
    encoder.layout = layout
    parts = []
    for encoder.pooling in ("lasttoken", "mean", "cls+lasttoken+mean"):
        assert encoder.width == 32 * len(encoder.pooling.split("+"))
        encoder.normalize = False
        parts.append(encoder.encode(["a dog", "the man and the woman are eating rice"]))
    np.testing.assert_allclose(parts[2][:, 32:64], parts[0], atol=1e-6)
    np.testing.assert_allclose(parts[2][:, 64:], parts[1], atol=1e-6)


def test_a_text_of_nothing_but_a_prompt_that_is_left_out(tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.post_processor = None  # no [SEP] is left, either
    backbone = make_backbone(len(tiny_tokenizer))
    encoder = SentenceEncoder(backbone, tiny_tokenizer, max_length=16, include_prompt=False)
    with pytest.raises(ValueError, match="text 1 has no token beside those of its prompt, 2"):
        encoder.encode(["snow", ""], prompt="the man ")


def test_poolings_may_be_a_list(tiny_backbone, tiny_tokenizer):
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, ["max", "cls"], max_length=64)
    assert encoder.pooling == "max+cls" and encoder.encode("snow").shape == (64,)


# ---- modules after the pooling ----


def test_the_modules_are_trained_and_computed_in_float32(tiny_backbone, tiny_tokenizer):
    head = [Dense(32, 48), torch.nn.LayerNorm(48), torch.nn.Dropout(0.1), Dense(48, 8)]
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64, head=head).train()
    assert encoder.width == 8
    tokens = torch.tensor([2, 30, 3, 2, 31, 32, 3]), torch.tensor([3, 4])
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encoder(*tokens)
    assert vectors.dtype == torch.float32
    (vectors * torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert len(list(encoder.head.parameters())) == 6


@pytest.mark.parametrize(
    "head, said",
    [
        ([Dense(16, 8)], "the Dense after the pooling takes vectors of 16 dimensions, and gets 32"),
        ([torch.nn.LayerNorm(16)], "the LayerNorm after the pooling takes vectors of 16"),
        ([torch.nn.Linear(32, 8)], "a Linear has no place in a model directory; use Dense"),
        ([torch.nn.LayerNorm(32, eps=1e-12)], "a LayerNorm has no place"),
    ],
)
def test_modules_that_do_not_fit_are_one_sentence(tiny_backbone, tiny_tokenizer, head, said):
    with pytest.raises(ValueError, match=said):
        SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64, head=head)


def test_load_weights_restores_the_modules(tiny_backbone, tiny_tokenizer, tmp_path):
    parts = tiny_backbone, tiny_tokenizer
    encoder = SentenceEncoder(*parts, max_length=64, head=[Dense(32, 8)]).eval()
    encoder.save_pretrained(tmp_path)
    before = encoder.encode(["a dog", "snow"])
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(1)
    load_weights(encoder, tmp_path)
    np.testing.assert_array_equal(encoder.encode(["a dog", "snow"]), before)
    bare = SentenceEncoder(*parts, max_length=64)
    with pytest.raises(ValueError, match="of another model .such as head.0.linear.bias"):
        load_weights(bare, tmp_path)


def test_only_listed_activations():
    with pytest.raises(ValueError, match="activation 'PReLU' is not one of Identity"):
        Dense(4, 4, activation="PReLU")


# ---- forward ----


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_both_layouts_equal_one_padded_forward(encoder, pooling, budget, layout):
    assert encoder.layout == "packed"
    encoder.pooling, encoder.token_budget, encoder.layout = pooling, budget, layout
    gen = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (17,), generator=gen)
    token_ids = torch.randint(5, 100, (int(lengths.sum()),), generator=gen)
    texts = token_ids.split(lengths.tolist())
    input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    target = torch.randn(17, 32, generator=gen)

    def gradients(vectors):
        return torch.autograd.grad((vectors * target).sum(), list(encoder.parameters()))

    ours, plain = encoder(token_ids, lengths), encoder.embed(input_ids, mask)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    for a, b in zip(gradients(ours), gradients(plain)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_every_parameter_gets_a_gradient(encoder):
    encoder(torch.tensor([2, 30, 3, 2, 31, 32, 3]), torch.tensor([3, 4])).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_forward_of_nothing_and_of_nonsense(encoder):
    assert encoder(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).shape == (
        0,
        32,
    )
    with pytest.raises(ValueError, match="text 1 of the batch has no tokens"):
        encoder(torch.tensor([2, 3]), torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="2 lengths add up to 5, but there are 2"):
        encoder(torch.tensor([2, 3]), torch.tensor([2, 3]))
    for layout, budget in (("packed", 0), ("padded", -1), ("Packed", 100)):
        encoder.layout, encoder.token_budget = layout, budget
        message = (
            f"layout '{layout}' with token_budget {budget} does not work; use 'packed' or"
            " 'padded' and at least 1"
        )
        with pytest.raises(ValueError, match=message):
            encoder(torch.tensor([2, 3]), torch.tensor([2]))


# ---- encode ----


def test_order_and_batch_size_do_not_matter(encoder):
    expected = encoder.encode(TEXTS, progress=False)
    assert expected.shape == (len(TEXTS), 32) and expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    for size in (1, 2, 100):
        np.testing.assert_allclose(
            encoder.encode(TEXTS[::-1], batch_size=size)[::-1], expected, atol=1e-6
        )
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode(text), expected[i], atol=1e-6)
    np.testing.assert_allclose(encoder.encode(tuple(TEXTS)), expected, atol=1e-6)


def test_empty_inputs(encoder):
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode([], truncate_dim=4).shape == (0, 4)
    assert encoder.encode("").shape == (32,) and np.isfinite(encoder.encode("")).all()


def test_modes_and_gradients_are_restored(encoder):
    encoder.train()
    encoder.backbone.embeddings.eval()  # a frozen part stays frozen
    before = {name: layer.training for name, layer in encoder.named_modules()}
    encoder.encode(TEXTS)
    assert {name: layer.training for name, layer in encoder.named_modules()} == before
    with pytest.raises(ValueError):
        encoder.encode(TEXTS, prompt="unknown")
    assert torch.is_grad_enabled() and encoder.training


def test_dropout_is_off_while_encoding(tiny_tokenizer):
    backbone = make_backbone(len(tiny_tokenizer))
    for layer in backbone.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    encoder = SentenceEncoder(backbone, tiny_tokenizer, max_length=64).train()
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS))


def test_cut_texts_are_counted(encoder):
    encoder.max_length = 8
    message = (
        r"2 of 7 texts were longer than max_length = 8 tokens and were cut; the backbone takes"
        r" up to 64"
    )
    with pytest.warns(UserWarning, match=message):
        long = encoder.encode(["dog " * 20, "dog " * 6, "dog " * 7, "a", "b", "c", "d"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 6 words and two special tokens fit
        np.testing.assert_allclose(long[0], encoder.encode("dog " * 6), atol=1e-6)


def test_the_tokenizer_is_left_as_it_was(encoder, tmp_path):
    core = encoder.tokenizer.backend_tokenizer
    core.enable_truncation(5)
    core.enable_padding(length=7)
    state = core.truncation, core.padding
    encoder.encode(TEXTS)
    assert (core.truncation, core.padding) == state
    encoder.save_pretrained(tmp_path)
    assert (core.truncation, core.padding) == state


def test_prompts(encoder):
    encoder.prompts = {"query": "what is ", "document": ""}
    plain = encoder.encode(TEXTS)
    np.testing.assert_allclose(
        encoder.encode(TEXTS, prompt="query"),
        encoder.encode(["what is " + t for t in TEXTS]),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        encoder.encode(TEXTS, prompt="the man: "),
        encoder.encode(["the man: " + t for t in TEXTS]),
        atol=1e-6,
    )
    np.testing.assert_allclose(encoder.encode(TEXTS, prompt="document"), plain, atol=1e-6)
    encoder.settings["default_prompt_name"] = "query"
    assert np.abs(encoder.encode(TEXTS) - plain).max() > 1e-3
    np.testing.assert_allclose(encoder.encode(TEXTS, prompt=""), plain, atol=1e-6)
    with pytest.raises(ValueError, match="no prompt named 'qeury' .it has: query, document"):
        encoder.encode(TEXTS, prompt="qeury")


def test_truncate_dim_and_precision(encoder):
    full, short = encoder.encode(TEXTS), encoder.encode(TEXTS, truncate_dim=8)
    np.testing.assert_allclose(
        short, full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True), atol=1e-6
    )
    encoder.normalize = False
    np.testing.assert_allclose(
        encoder.encode(TEXTS, truncate_dim=8), encoder.encode(TEXTS)[:, :8], atol=1e-6
    )
    assert encoder.encode(TEXTS, precision="float16").dtype == np.float16


def test_fewer_bits_are_the_bits_of_the_vectors(encoder):
    texts = [f"{text} {i}" for i in range(50) for text in TEXTS]
    vectors = encoder.encode(texts)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        np.testing.assert_array_equal(
            encoder.encode(texts, precision=precision), quantize(vectors, precision)
        )
    assert encoder.encode(texts[0], precision="ubinary").shape == (encoder.width // 8,)
    with pytest.warns(UserWarning, match=f"come from {len(TEXTS)} texts only"):
        encoder.encode(TEXTS, precision="int8")
    with pytest.raises(ValueError, match="takes its ranges from the texts, and one text has none"):
        encoder.encode(texts[0], precision="int8")


def test_bfloat16_is_told_where_there_is_none(encoder, monkeypatch):
    exact = encoder.encode(TEXTS)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic; encoding in float32"):
        np.testing.assert_array_equal(encoder.encode(TEXTS, bf16=True), exact)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64",
    reason="this PyTorch does not take its memory from glibc",
)
def test_an_encoder_keeps_freed_memory_for_the_next_chunk():
    "In its own process, since the C library never forgets the largest block that it saw freed."
    script = """
import resource, torch
from conftest import make_backbone, make_tokenizer
from contrastive_st.model import SentenceEncoder
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(2**21) for _ in range(5)]  # 8 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
tokenizer = make_tokenizer()
before = [faults() for _ in range(3)]
SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64)
print(before[-1], [faults() for _ in range(3)][-1])"""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=plain,
    ).stdout
    before, after = map(int, said.split())
    assert after < 200, (before, after)


def test_training_under_autocast_goes_on_after_encoding_in_bfloat16(encoder):
    "Autocast remembers casts; those made without a graph must not reach the next training step."
    ids, lengths = torch.tensor([2, 5, 6, 3]), torch.tensor([4])
    with torch.autocast("cpu", torch.bfloat16):
        encoder.encode(TEXTS, bf16=True)
        encoder(ids, lengths).sum().backward()
    assert all(
        p.grad is not None for name, p in encoder.named_parameters() if "query.weight" in name
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "int4"}, "precision 'int4' is not supported"),
        ({"truncate_dim": 33}, "truncate_dim 33 does not fit"),
        ({"truncate_dim": 0}, "truncate_dim 0 does not fit"),
    ],
)
def test_bad_options(encoder, options, said):
    with pytest.raises(ValueError, match=said):
        encoder.encode(TEXTS, **options)


def test_bad_texts(encoder):
    with pytest.raises(ValueError, match="text 1 is of type float"):
        encoder.encode(["a", float("nan")])
    with pytest.raises(ValueError, match="texts is of type NoneType"):
        encoder.encode(None)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_half_characters_are_mended_and_counted(kind):
    encoder = SentenceEncoder(*backbone_and_tokenizer(kind), max_length=62).eval()
    whole = ["snow \ufffd", "\ufffd", "\U0001f600", "snow"]
    broken = ["snow \ud800", "\udfff", "\ud83d\ude00", "snow"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = encoder.encode(whole)  # whole texts are left alone
    with pytest.warns(UserWarning, match="3 of 4 texts held half characters .* U.FFFD") as caught:
        np.testing.assert_allclose(encoder.encode(broken), expected, atol=1e-6)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert encoder.encode("\ud800").shape == (32,)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_nul_characters_work(kind):
    encoder = SentenceEncoder(*backbone_and_tokenizer(kind), max_length=62).eval()
    vectors = encoder.encode(["a\0b", "\0", "snow"])
    assert np.isfinite(vectors).all() and np.ptp(np.linalg.norm(vectors, axis=1)) < 1e-5
    np.testing.assert_allclose(vectors[2], encoder.encode("snow"), atol=1e-6)


def test_parts_must_fit(tiny_backbone, tiny_tokenizer):
    for options, said in [
        ({}, "max_length 128 does not fit; this backbone takes 3 to 64"),
        ({"pooling": "avg", "max_length": 64}, "'avg' is not one of mean"),
        ({"max_length": 2}, "max_length 2 does not fit"),
    ]:
        with pytest.raises(ValueError, match=said):
            SentenceEncoder(tiny_backbone, tiny_tokenizer, **options)
    with pytest.raises(ValueError, match="knows 146 tokens but the backbone embeds 100"):
        SentenceEncoder(make_backbone(100), tiny_tokenizer, max_length=64)
    tiny_tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)


# ---- texts of any size and kind ----


def test_max_length_is_checked_when_it_is_set(encoder):
    encoder.max_length = 32
    for value in (65, 600, 2, 8.5, True, "8", None):
        with pytest.raises(
            ValueError, match="max_length .* does not fit; this backbone takes 3 to 64"
        ):
            encoder.max_length = value
    assert encoder.max_length == 32


@pytest.mark.parametrize(
    "texts", [{"a dog": 1}, {"a", "dog"}, b"a dog", frozenset("ab"), memoryview(b"ab"), 5]
)
def test_what_has_no_order_of_texts_is_refused(encoder, texts):
    with pytest.raises(ValueError, match=f"texts is of type {type(texts).__name__}; pass a list"):
        encoder.encode(texts)


def test_a_data_frame_is_refused_and_its_column_is_not(encoder):
    import pandas as pd

    frame = pd.DataFrame({"text": TEXTS, "other": TEXTS})
    with pytest.raises(ValueError, match="texts is of type DataFrame"):
        encoder.encode(frame)
    np.testing.assert_array_equal(encoder.encode(frame["text"]), encoder.encode(TEXTS))


def test_an_iterator_is_read_in_parts(encoder, monkeypatch):
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    alive = []
    monkeypatch.setattr(model, "PART_TEXTS", 7)
    gen = (alive.append(torch.is_inference_mode_enabled()) or text for text in texts)
    np.testing.assert_allclose(encoder.encode(gen), encoder.encode(texts), atol=1e-6)
    assert not any(alive) and encoder.encode(iter([])).shape == (0, 32)
    with pytest.raises(ValueError, match="text 8 is of type int"):
        encoder.encode(iter([*"abcdefgh", 8]))


def test_a_text_of_megabytes_costs_what_its_head_costs(encoder):
    encoder.max_length = 32
    texts = ["the dog is playing " * 4, "x" * 200 + ",", "中" * 40, "dog,cat;" * 9]
    with pytest.warns(UserWarning, match="were cut"):
        whole = encoder.encode([text * 3 for text in texts])
    start = time.process_time()
    with pytest.warns(UserWarning, match="were cut"):
        long = encoder.encode([text * (2**21 // len(text)) for text in texts])
    assert time.process_time() - start < 4
    np.testing.assert_allclose(long[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_text_without_special_tokens(tiny_tokenizer, tmp_path, pooling):
    tiny_tokenizer.backend_tokenizer.post_processor = None
    encoder = SentenceEncoder(
        make_backbone(len(tiny_tokenizer)), tiny_tokenizer, pooling, max_length=16
    )
    texts = ["a dog", "", "snow is here", ""]
    if pooling in ("mean", "mean_sqrt_len_tokens", "weightedmean"):
        encoder.save_pretrained(tmp_path)
        np.testing.assert_allclose(encoder.encode(texts), theirs(tmp_path).encode(texts), atol=1e-6)
        assert not encoder.encode("").any()
    else:
        message = (
            "text 1 has no token, and this tokenizer adds none, so there is nothing for"
            f" {pooling} pooling"
        )
        with pytest.raises(ValueError, match=message):
            encoder.encode(texts)


def test_a_mistyped_prompt_is_no_literal_text(encoder):
    encoder.prompts = {"s2p_query": "q: "}
    for name in ("s2p-query", "s2p.query", "query", "query-", "q2"):
        with pytest.raises(
            ValueError,
            match="no prompt named .* literal text must contain a space or end in a mark",
        ):
            encoder.encode(TEXTS, prompt=name)
    for literal in ("query:", "a query", "[Q]", "query\n", "検索："):
        np.testing.assert_allclose(
            encoder.encode(TEXTS, prompt=literal),
            encoder.encode([literal + t for t in TEXTS]),
            atol=1e-6,
        )
    with pytest.raises(ValueError, match="prompt is of type int"):
        encoder.encode(TEXTS, prompt=5)


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {"query": "what is "},
        {"query": "what is ", "document": "the "},
        {"document": "the "},
        {"passage": "a "},
    ],
)
@pytest.mark.parametrize("default", [False, True])
def test_queries_and_documents_as_in_sentence_transformers(encoder, tmp_path, prompts, default):
    encoder.prompts = {**prompts, "other": "on "}
    encoder.settings["default_prompt_name"] = "other" if default else None
    encoder.save_pretrained(tmp_path)
    peer = theirs(tmp_path)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), peer.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode_document(TEXTS), peer.encode_document(TEXTS), atol=1e-6
    )
    np.testing.assert_allclose(
        encoder.encode_query(TEXTS, prompt="my: "), encoder.encode(TEXTS, prompt="my: "), atol=1e-6
    )


# ---- threads ----


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("training", [False, True])
def test_eight_threads_get_the_vectors_of_one(tiny_tokenizer, layout, training):
    backbone = make_backbone(len(tiny_tokenizer))
    for layer in backbone.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    encoder = SentenceEncoder(backbone, tiny_tokenizer, max_length=12).train(training)
    encoder.layout = layout
    core = tiny_tokenizer.backend_tokenizer
    core.enable_truncation(5)
    texts = [
        [f"{text} {word}" for text in TEXTS]
        for word in ("a", "dog", "the man", "rice " * 20, "x", "snow " * 9)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [encoder.encode(part, progress=False) for part in texts]
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(
                    lambda i: encoder.encode(texts[i % len(texts)], progress=False), range(120)
                )
            )
    assert all(np.array_equal(vectors, expected[i % len(texts)]) for i, vectors in enumerate(found))
    assert core.truncation["max_length"] == 5
    assert {layer.training for layer in encoder.modules()} == {training}


def test_a_tokenizer_that_you_change_is_followed(encoder):
    from tokenizers import normalizers

    before = encoder.encode("A DOG")
    encoder.tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert np.abs(encoder.encode("A DOG") - before).max() > 0.01
    np.testing.assert_array_equal(copy.deepcopy(encoder).encode("A DOG"), encoder.encode("A DOG"))


def test_vectors_that_are_no_numbers_are_said(encoder):
    with torch.no_grad():
        encoder.backbone.encoder.layer[1].output.dense.bias[0] = float("nan")
    with pytest.warns(UserWarning, match="6 of 6 vectors hold NaN or infinity"):
        encoder.encode(TEXTS)


def test_a_text_that_the_tokenizer_refuses_is_named_by_its_number():
    tokenizer = edited_tokenizer(forget_unknown)
    rows = 1 + max(tokenizer.get_vocab().values())
    encoder = SentenceEncoder(make_backbone(rows), tokenizer, max_length=16)
    texts = ["a long text with many words"] * 5 + ["\u65e5", "b"]
    for given in (texts, iter(texts)):
        with pytest.raises(ValueError, match="text 5 cannot be tokenised"):
            encoder.encode(given)


# ---- the text of a prompt is not a name ----


@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "\u67e5\u8be2", "document": ""},
        {"query": "Q-", "document": "D_"},
        {"query": "document", "document": "the man: "},
        {"query": "passage", "document": "query", "passage": "the man: "},
        {"query": "query", "document": "the"},
    ],
)
def test_the_text_of_a_saved_prompt_is_used_as_it_is(encoder, tmp_path, prompts):
    encoder.prompts = prompts
    encoder.save_pretrained(tmp_path / "prompted")
    own = SentenceEncoder.from_pretrained(tmp_path / "prompted")
    other = theirs(tmp_path / "prompted")
    for method in ("encode_query", "encode_document"):
        np.testing.assert_allclose(
            getattr(own, method)(TEXTS[:2]), getattr(other, method)(TEXTS[:2]), atol=1e-6
        )
    for text in prompts.values():  # as text it is accepted, too, unless it is another's name
        if text and text not in prompts:
            expected = own.encode([text + TEXTS[0]], prompt="")
            np.testing.assert_array_equal(own.encode(TEXTS[:1], prompt=text), expected)


@pytest.mark.parametrize(
    "texts, options, said",
    [
        (["a"], {"batch_size": "2"}, "batch_size is '2'; it must be a whole number"),
        (["a"], {"batch_size": 1.5}, "batch_size is 1.5"),
        (["a"], {"batch_size": True}, "batch_size is True"),
        (["a"], {"batch_size": None}, "batch_size is None"),
        (["a"], {"truncate_dim": 1.5}, "truncate_dim 1.5 does not fit"),
        (["a"], {"truncate_dim": "8"}, "truncate_dim '8' does not fit"),
        (np.array("a"), {}, "texts is of type ndarray; pass a list"),
        (torch.tensor(5), {}, "texts is of type Tensor; pass a list"),
        ("a", {"precision": "int8"}, "takes its ranges from the texts, and one text has none"),
    ],
)
def test_other_types_are_one_sentence(encoder, texts, options, said):
    with pytest.raises(ValueError, match=said):
        encoder.encode(texts, **options)


def test_numpy_integers_are_integers(encoder):
    some = encoder.encode(TEXTS, batch_size=np.int8(2), truncate_dim=np.uint8(8))
    np.testing.assert_array_equal(some, encoder.encode(TEXTS, batch_size=2, truncate_dim=8))
    np.testing.assert_array_equal(encoder.encode(np.str_("a")), encoder.encode("a"))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pooling": ["mean", 5]}, "pooling .* is not one of"),
        ({"prompts": ["a: "]}, "prompts is of type list"),
        ({"prompts": {"query": 5}}, "prompt 'query' is 5; both"),
    ],
)
def test_parts_of_other_types_are_one_sentence(tiny_backbone, tiny_tokenizer, options, said):
    with pytest.raises(ValueError, match=said):
        SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=16, **options)


# ---- similarity ----


@pytest.mark.parametrize("name", [None, "cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_that_of_sentence_transformers(encoder, tmp_path, name):
    if name:
        encoder.settings["similarity_fn_name"] = name
    encoder.save_pretrained(tmp_path)
    peer, (a, b) = theirs(tmp_path), (encoder.encode(TEXTS[:2]), encoder.encode(TEXTS[2:]))
    expected = peer.similarity(a, b).numpy()
    assert expected.shape == (2, 4)
    texts, other = TEXTS[:2], TEXTS[2:]
    for left, right in ((a, b), (torch.from_numpy(a), b), (texts, list(b)), (list(a), other)):
        np.testing.assert_allclose(encoder.similarity(left, right), expected, atol=1e-5)


def test_a_single_text_or_vector_is_a_row(encoder):
    vectors = encoder.encode(TEXTS[:4])
    for one in (TEXTS[0], vectors[0], [TEXTS[0]], vectors[:1]):
        assert encoder.similarity(one, vectors).shape == (1, 4)
        assert encoder.similarity(one, vectors)[0, 0] == pytest.approx(1, abs=1e-5)
    assert encoder.similarity([], vectors).shape == (0, 4)


@pytest.mark.parametrize(
    "b, said",
    [
        (np.ones((2, 5)), "vectors of 32 and of 5 dimensions cannot be compared"),
        (np.ones((2, 2, 32)), "vectors have the shape"),
        ([[1.0, 2.0], [1.0]], "must be texts, or vectors of one width"),
        (["a", 5], "must be texts, or vectors of one width"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(encoder, b, said):
    with pytest.raises(ValueError, match=said):
        encoder.similarity("a cat", b)


def test_an_unknown_similarity_is_one_sentence(encoder):
    encoder.settings["similarity_fn_name"] = "cosmic"
    with pytest.raises(ValueError, match="compares by 'cosmic', which is not known; set"):
        encoder.similarity("a", "b")


@pytest.mark.parametrize("texts, bar", [("one", False), (["a"] * 32, False), (["a"] * 33, True)])
def test_few_texts_have_no_bar(encoder, monkeypatch, texts, bar):
    calls = []

    class Bar(model.tqdm):
        def __init__(self, *args, **options):
            calls.append(not options["disable"])
            super().__init__(*args, **options)

    monkeypatch.setattr(model, "tqdm", Bar)
    encoder.encode(texts)
    assert calls == [bar]
