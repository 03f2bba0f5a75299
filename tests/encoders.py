"""Tiny encoders for the tests, and the library that they are compared with."""

import torch
import transformers
from conftest import make_tokenizer

TEXTS = [
    "a dog is playing",
    "How do I reset my password?",
    "",
    "snow",
    "the man and the woman are eating rice in the street " * 2,
    "x, y. z!",
]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def theirs(folder, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


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
