"""Static models, a table of token vectors: opened, trained, written for sentence-transformers."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_tokenizer, refuses
from encoders import TEXTS, theirs

from contrastive_st.model import SentenceEncoder, add_adapters
from contrastive_st.modeldir import Dense, StaticBackbone, without_special_tokens
from contrastive_st.trainer import train

FULL = [text for text in TEXTS if text]


@pytest.fixture
def encoder():
    tokenizer = without_special_tokens(make_tokenizer())
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(len(tokenizer), 16, generator=draw)
    return SentenceEncoder(StaticBackbone(table), tokenizer).eval()


@pytest.fixture
def saved(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    return tmp_path


def peer(*after):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    table = StaticEmbedding(make_tokenizer(), embedding_dim=16)
    return SentenceTransformer(modules=[table, *after], device="cpu")


def test_it_is_the_mean_of_rows_without_special_tokens(encoder):
    vectors = encoder.encode(TEXTS)
    tokenizer, table = make_tokenizer(), encoder.backbone.embedding.weight.detach()
    for text, vector in zip(TEXTS, vectors):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        mean = table[ids].mean(0) if ids else torch.zeros(16)
        expected = torch.nn.functional.normalize(mean, dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-6)
    assert encoder.layout == "packed" and encoder.token_limit is None
    encoder.layout = "padded"
    np.testing.assert_allclose(encoder.encode(TEXTS), vectors, atol=1e-6)


@pytest.mark.parametrize("kind", ["alone", "normalize", "dense"])
def test_what_sentence_transformers_wrote_opens_and_goes_back(tmp_path, kind):
    from sentence_transformers.sentence_transformer.modules import Dense as TheirDense
    from sentence_transformers.sentence_transformer.modules import Normalize

    after = {"alone": [], "normalize": [Normalize()], "dense": [TheirDense(16, 8), Normalize()]}
    model = peer(*after[kind])
    # an empty text has no vector that a dense layer could take
    texts = FULL if kind == "dense" else TEXTS
    vectors = model.encode(texts)
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    encoder = SentenceEncoder.from_pretrained(tmp_path / "theirs")
    assert encoder.normalize == (kind != "alone") and len(encoder.head) == (kind == "dense")
    np.testing.assert_allclose(encoder.encode(texts), vectors, atol=1e-6)
    encoder.save_pretrained(tmp_path / "ours")
    for again in (theirs(tmp_path / "ours"), SentenceEncoder.from_pretrained(tmp_path / "ours")):
        np.testing.assert_allclose(again.encode(texts), vectors, atol=1e-6)


def test_a_limit_is_kept(encoder, tmp_path):
    encoder.max_length = 4
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="were longer than max_length = 4"):
        vectors = encoder.encode(FULL)
    again = SentenceEncoder.from_pretrained(tmp_path)
    assert again.max_length == 4
    np.testing.assert_allclose(theirs(tmp_path).encode(FULL), vectors, atol=1e-6)


def test_tables_of_model2vec_may_share_rows_and_weigh_them(saved):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    file = saved / "model.safetensors"
    table = safetensors.torch.load_file(file)["embedding.weight"]
    mapping = torch.arange(len(table)) // 2
    weights = torch.linspace(0.5, 2, len(table), dtype=torch.float64)
    tensors = {"embeddings": table[: len(table) // 2 + 1].half(), "mapping": mapping}
    safetensors.torch.save_file(tensors | {"weights": weights}, file)
    expected = StaticEmbedding.load(str(saved)).embedding.weight.detach()
    ours = SentenceEncoder.from_pretrained(saved).backbone.embedding.weight.detach()
    torch.testing.assert_close(ours, expected.float(), atol=2e-3, rtol=2e-3)  # theirs stays float16


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"mapping": torch.arange(3) - 1}, "mapping must be"),
        ({"mapping": torch.tensor([0, 4])}, "mapping must be"),
        ({"mapping": torch.zeros(2, 2, dtype=torch.int64)}, "mapping must be"),
        ({"mapping": torch.tensor(1)}, "mapping must be"),
        ({"mapping": torch.zeros(0, dtype=torch.int64)}, "mapping must be"),
        ({"mapping": torch.tensor([0.5, 1])}, "mapping must be"),
        ({"mapping": torch.tensor([True, False])}, "mapping must be"),
        ({"weights": torch.ones(3)}, "weights has the shape [3]"),
        ({"weights": torch.ones(4, 1)}, "weights has the shape [4, 1]"),
        ({"weights": torch.ones(4, dtype=torch.complex64)}, "weights"),
        ({"embeddings": torch.ones(4, 2, dtype=torch.int64)}, "no table"),
        ({"embeddings": torch.ones(4, 0)}, "no table"),
        ({"embeddings": torch.ones(4, 2, dtype=torch.complex64)}, "no table"),
    ],
)
def test_tables_of_model2vec_that_do_not_fit(saved, tensors, said):
    file = saved / "model.safetensors"
    safetensors.torch.save_file({"embeddings": torch.ones(4, 2)} | tensors, file)
    refuses(lambda: SentenceEncoder.from_pretrained(saved), f"{file}: ", said, "from its source")


@pytest.mark.parametrize("weights", [torch.ones(4) > 0, torch.ones(4, dtype=torch.int64)])
def test_weights_of_model2vec_are_floating_point_numbers(saved, weights):
    file = saved / "model.safetensors"
    safetensors.torch.save_file({"embeddings": torch.ones(4, 2), "weights": weights}, file)
    refuses(lambda: SentenceEncoder.from_pretrained(saved), f"{file}: ", "weights", "real number")


def test_a_row_that_is_shared_too_often(saved):
    file, mapping = saved / "model.safetensors", torch.zeros(100_000, dtype=torch.int64)
    safetensors.torch.save_file({"embeddings": torch.ones(1, 8000), "mapping": mapping}, file)
    said = ("100,000 rows of 1", "800,000,000 numbers", "at most 134,217,728")
    refuses(lambda: SentenceEncoder.from_pretrained(saved), f"{file}: mapping makes", *said)


def test_it_trains_with_a_head_and_opens_elsewhere(encoder, tmp_path):
    encoder = SentenceEncoder(encoder.backbone, encoder.tokenizer, head=[Dense(16, 8)])
    before = encoder.backbone.embedding.weight.detach().clone()
    pairs = [(f"the dog is playing {n}", f"{n} dogs play in the street") for n in range(12)]
    train(encoder, pairs, out=tmp_path, steps=3, lr=0.1, progress=False)
    assert not torch.equal(encoder.backbone.embedding.weight, before)
    np.testing.assert_allclose(
        theirs(tmp_path / "model").encode(FULL), encoder.encode(FULL), atol=1e-6
    )
    again = SentenceEncoder(StaticBackbone(before), encoder.tokenizer, head=[Dense(16, 8)])
    train(again, pairs, out=tmp_path, steps=3, lr=0.1, progress=False, resume=True)
    np.testing.assert_array_equal(again.encode(FULL), encoder.encode(FULL))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda d: (d / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["no tokenizer.json"]),
        (lambda d: (d / "tokenizer.json").write_text("{"), ["tokenizer.json", "cannot be read"]),
        (
            lambda d: safetensors.torch.save_file({"x": torch.ones(2)}, d / "model.safetensors"),
            ["model.safetensors", "holds no table"],
        ),
        (
            lambda d: safetensors.torch.save_file(
                {"embedding.weight": torch.ones(9, 2)}, d / "model.safetensors"
            ),
            ["tokenizer", "do not belong together"],
        ),
        (
            lambda d: safetensors.torch.save_file(
                {"embedding.weight": torch.full((200, 2), torch.nan)}, d / "model.safetensors"
            ),
            ["embedding.weight", "NaN"],
        ),
        (
            lambda d: (d / "modules.json").write_text(
                json.dumps(
                    [
                        {"idx": i, "name": "", "path": "", "type": f"sentence_transformers.{name}"}
                        for i, name in enumerate(["StaticEmbedding", "Pooling"])
                    ]
                )
            ),
            ["modules.json", "the chain is StaticEmbedding, Pooling"],
        ),
    ],
)
def test_a_damaged_folder_is_one_sentence(saved, damage, said):
    damage(saved)
    refuses(lambda: SentenceEncoder.from_pretrained(saved), str(saved), *said)


def test_a_table_has_no_layers_for_adapters(encoder):
    refuses(lambda: add_adapters(encoder), "no linear layers")
