"""LoRA adapters: trained, packed, resumed, written as peft writes them, merged."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from conftest import refuses
from encoders import TEXTS, backbone_and_tokenizer, theirs
from test_trainer import At, Crash, config, crash, losses, make_pairs_and_triplets

from contrastive_st.encoding import fingerprint
from contrastive_st.model import SentenceEncoder, adapters_of, add_adapters, merge_adapters
from contrastive_st.modeldir import Dense, frozen_digest, has_adapters
from contrastive_st.recipes import load
from contrastive_st.run import checkpoint_folder, load_weights
from contrastive_st.trainer import train

pytest.importorskip("peft", reason="the extra lora is not installed")
pytestmark = pytest.mark.usefixtures("quick_disk")
PAIRS = [(f"where is pier {n}", f"behind shed {n}") for n in range(12)]


def move(encoder, size=0.1):
    "Give the adapters other numbers, as training would."
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in encoder.parameters():
            if value.requires_grad:
                value.add_(size * torch.randn(value.shape, generator=draw))
    return encoder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Folders of tiny encoders, by family."
    folder = tmp_path_factory.mktemp("bases")
    for family in ("bert", "distilbert", "roberta", "mpnet"):
        encoder = SentenceEncoder(*backbone_and_tokenizer(family), max_length=60)
        encoder.save_pretrained(folder / family)
    return folder


@pytest.fixture
def adapted(bases):
    return move(add_adapters(SentenceEncoder.from_pretrained(bases / "bert"), r=4))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mpnet"])
def test_new_adapters_change_nothing_and_packed_equals_padded(bases, family):
    encoder = SentenceEncoder.from_pretrained(bases / family)
    before = encoder.encode(TEXTS)
    add_adapters(encoder, r=4)
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)
    moved = move(encoder).encode(TEXTS)
    assert encoder.layout == "packed" and np.abs(moved - before).max() > 0.01
    encoder.layout = "padded"
    np.testing.assert_allclose(encoder.encode(TEXTS), moved, atol=1e-6)


def test_gradients_packed_equal_padded_and_reach_adapters_and_head_only(bases):
    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    encoder = SentenceEncoder(
        encoder.backbone, encoder.tokenizer, max_length=60, head=[Dense(32, 8)]
    )
    move(add_adapters(encoder, r=2, target_modules=["query", "output.dense"]))
    token_ids, lengths, _ = encoder.ragged_tokenizer()([text for text in TEXTS if text])
    inputs, gradients = (torch.from_numpy(token_ids), torch.from_numpy(lengths)), {}
    for layout in ("packed", "padded"):
        encoder.layout = layout
        encoder.zero_grad()
        encoder.eval()(*inputs)[:, 0].sum().backward()
        gradients[layout] = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in gradients["packed"])
    for name, gradient in gradients["packed"].items():
        torch.testing.assert_close(gradient, gradients["padded"][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_folder_of_adapters_opens_here_there_and_in_peft(bases, tmp_path, family, capfd):
    import peft
    import transformers

    encoder = move(add_adapters(SentenceEncoder.from_pretrained(bases / family), r=4))
    vectors = encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    again = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    assert adapters_of(again) == adapters_of(encoder)
    assert adapters_of(again)["base_model_name_or_path"] == str(bases / family)
    capfd.readouterr()
    np.testing.assert_allclose(theirs(tmp_path).encode(TEXTS), vectors, atol=1e-6)
    assert "MISSING" not in capfd.readouterr().err
    base = transformers.AutoModel.from_pretrained(bases / family)
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    inputs = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = opened(**inputs).last_hidden_state
        pooled = encoder.pool(states, inputs["attention_mask"])
    np.testing.assert_allclose(pooled.numpy(), vectors, atol=1e-6)


def test_what_sentence_transformers_trained_opens_here(bases, tmp_path):
    from peft import LoraConfig

    peer = theirs(bases / "bert")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    peer.add_adapter(LoraConfig(**options, init_lora_weights=False, use_rslora=True))
    peer.save_pretrained(str(tmp_path), create_model_card=False)
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(encoder.encode(TEXTS), peer.encode(TEXTS), atol=1e-6)


def test_adapters_without_a_tokenizer_take_that_of_their_base(bases, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    model = get_peft_model(
        AutoModel.from_pretrained(bases / "bert"),
        LoraConfig(r=2, target_modules=["query"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path))
    encoder = SentenceEncoder.from_pretrained(tmp_path, max_length=60)
    inputs = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**inputs).last_hidden_state
        pooled = encoder.pool(states, inputs["attention_mask"])
    np.testing.assert_allclose(encoder.encode(TEXTS), pooled.numpy(), atol=1e-6)


def test_merged_on_request_and_in_place(adapted, tmp_path):
    vectors = adapted.encode(TEXTS)
    adapted.save_pretrained(tmp_path, merge=True)
    assert has_adapters(adapted.backbone) and not (tmp_path / "adapter_config.json").exists()
    for opened in (SentenceEncoder.from_pretrained(tmp_path), theirs(tmp_path)):
        np.testing.assert_allclose(opened.encode(TEXTS), vectors, atol=1e-6)
    plain = SentenceEncoder.from_pretrained(tmp_path).backbone.state_dict()
    merged = merge_adapters(adapted)
    np.testing.assert_allclose(merged.encode(TEXTS), vectors, atol=1e-6)
    assert not has_adapters(merged.backbone)
    assert all(value.requires_grad for value in merged.parameters())
    assert merged.backbone.state_dict().keys() == plain.keys()


def test_a_base_that_was_trained_since_is_not_named(bases, tmp_path):
    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    with torch.no_grad():
        encoder.backbone.encoder.layer[1].output.dense.weight[0, 0] += 1
    vectors = move(add_adapters(encoder, r=2)).encode(TEXTS)
    assert adapters_of(encoder)["base_model_name_or_path"] is None
    encoder.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        SentenceEncoder.from_pretrained(tmp_path).encode(TEXTS), vectors, atol=1e-6
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"r": 0}, ["r is 0", "from 1 to 65,536"]),
        ({"r": 10**9}, ["r is 1000000000", "from 1 to 65,536"]),
        ({"lora_alpha": 0}, ["lora_alpha is 0"]),
        ({"lora_alpha": 10**400}, ["lora_alpha is 1000", "at most a million"]),
        ({"lora_dropout": 1.0}, ["lora_dropout is 1.0", "below 1"]),
        ({"target_modules": "query"}, ["a list of names"]),
        ({"target_modules": []}, ["is empty"]),
        ({"target_modules": ["query", "qurey"]}, ["'qurey' names no linear layer of this bert",
                                                  "dense, key, query, value"]),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(bases, options, said):
    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    refuses(lambda: add_adapters(encoder, **options), *said)
    assert not has_adapters(encoder.backbone)


def test_adapters_twice_or_none_to_merge(adapted, bases):
    refuses(lambda: add_adapters(adapted), "has adapters already", "merge_adapters")
    plain = SentenceEncoder.from_pretrained(bases / "bert")
    refuses(lambda: merge_adapters(plain), "no adapters to merge")


def test_without_peft_the_extra_is_named(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    refuses(lambda: add_adapters(encoder), "peft is not installed", "[lora]")


def wider(bases, config):
    "A base model of another width."
    config["base_model_name_or_path"] = str(bases / "wide")


def another(bases, config):
    "A base model whose layers have other names."
    config["base_model_name_or_path"] = str(bases / "mpnet")


@pytest.mark.parametrize(
    "change, said",
    [
        (wider, ["has the shape [4, 32]", "needs [4, 64]", "another base model"]),
        (another, ["adapter_config.json", "names no linear layer of this mpnet"]),
        (lambda b, c: c.update(base_model_name_or_path="/no/such"), ["base model is not there"]),
        (lambda b, c: c.update(base_model_name_or_path=None), ["names no base model"]),
        (lambda b, c: c.update(r=0), ["r should be"]),
        (lambda b, c: c.update(r=8), ["has the shape [4, 32]", "needs [8, 32]"]),
        (lambda b, c: c.update(peft_type="IA3"), ["peft_type should be"]),
        (lambda b, c: c.update(use_dora=True), ["use_dora is True", "only plain LoRA"]),
        (lambda b, c: c.update(modules_to_save=["pooler"]), ["modules_to_save", "only plain LoRA"]),
        (lambda b, c: c.update(init_lora_weights="pissa"), ["init_lora_weights is 'pissa'",
                                                            "where they were trained"]),
        (lambda b, c: c.update(init_lora_weights="pissa_niter_4"), ["where they were trained"]),
        (lambda b, c: c.update(target_modules=r"(\w+\.?)+!"), ["target_modules", "only names"]),
        (lambda b, c: c.update(rank_pattern={r"(\w+\.?)+!": 2}), ["rank_pattern", "only names"]),
        (lambda b, c: c.update(alpha_pattern={"a|" * 9999: 2}), ["alpha_pattern", "only names"]),
        (lambda b, c: c.update(layers_pattern=["(a*)*b"]), ["layers_pattern", "only names"]),
        (lambda b, c: c.update(exclude_modules="(a*)*b"), ["exclude_modules", "only names"]),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(bases, adapted, tmp_path, change, said):
    if change is wider and not (bases / "wide").exists():
        backbone, tokenizer = backbone_and_tokenizer("bert")
        shape = copy.deepcopy(backbone.config)
        shape.hidden_size = 64
        SentenceEncoder(type(backbone)(shape), tokenizer, max_length=60).save_pretrained(
            bases / "wide"
        )
    adapted.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    change(bases, content)
    file.write_text(json.dumps(content))
    refuses(lambda: SentenceEncoder.from_pretrained(tmp_path), str(tmp_path), *said)


MANY = [f"m{n}" for n in range(20_000)]


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("target_modules", MANY, "at most 10000 items"),
        ("layers_to_transform", [*range(20_000)], "at most 10000 items"),
        ("rank_pattern", dict.fromkeys(MANY, 2), "at most 1000 items"),
        ("alpha_pattern", dict.fromkeys(MANY, 2.0), "at most 1000 items"),
        ("layers_pattern", MANY, "at most 1000 items"),
    ],
)
def test_names_and_patterns_without_end(adapted, tmp_path, key, value, said):
    changed(adapted, tmp_path, **{key: value})
    file = tmp_path / "adapter_config.json"
    refuses(lambda: SentenceEncoder.from_pretrained(tmp_path), f"{file}: {key}", said)


@pytest.mark.parametrize("beginning", [True, False, "gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_alone_open(adapted, tmp_path, beginning):
    changed(adapted, tmp_path, init_lora_weights=beginning)
    opened = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(opened.encode(TEXTS), adapted.encode(TEXTS))


def test_patterns_of_names_open(adapted, tmp_path):
    changed(adapted, tmp_path, alpha_pattern={r"^encoder\.layer.0.attention|none": 4})
    opened = SentenceEncoder.from_pretrained(tmp_path)
    assert adapters_of(opened)["alpha_pattern"] and "alpha_pattern" not in adapters_of(adapted)


def test_a_pattern_of_targets_stays_as_it_is(bases, tmp_path):
    pattern = "encoder.layer.0.attention.self.query|encoder.layer.0.attention.self.value"
    encoder = add_adapters(
        SentenceEncoder.from_pretrained(bases / "bert"),
        target_modules=[f"layer.0.attention.self.{name}" for name in ("query", "value")],
    )
    changed(encoder, tmp_path, target_modules=pattern)
    assert adapters_of(SentenceEncoder.from_pretrained(tmp_path))["target_modules"] == pattern


def changed(encoder, folder, **settings):
    "Save adapters, and change their settings in the file."
    encoder.save_pretrained(folder)
    (folder / "manifest.json").unlink()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("settings", [{"lora_alpha": 32}, {"use_rslora": True}])
def test_what_counts_otherwise_is_another_encoder(adapted, tmp_path, settings):
    changed(adapted, tmp_path, **settings)
    other = SentenceEncoder.from_pretrained(tmp_path)
    assert np.abs(other.encode(TEXTS) - adapted.encode(TEXTS)).max() > 0.001
    first, second = fingerprint(adapted), fingerprint(other)
    assert first["weights"] == second["weights"] and first["settings"] != second["settings"]
    assert adapters_of(other) != adapters_of(adapted)
    refuses(lambda: load_weights(adapted, tmp_path), str(tmp_path), next(iter(settings)))


def test_adapters_know_their_base(adapted, bases, tmp_path):
    shutil.copytree(bases / "bert", tmp_path / "base")
    base = SentenceEncoder.from_pretrained(tmp_path / "base")
    move(add_adapters(base, r=4)).save_pretrained(tmp_path / "adapters")
    other = SentenceEncoder.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.backbone.encoder.layer[1].output.dense.weight.mul_(2)
    other.save_pretrained(tmp_path / "base")
    said = ("adapters", "on other weights than their base model has now")
    refuses(lambda: SentenceEncoder.from_pretrained(tmp_path / "adapters"), *said)
    (tmp_path / "adapters" / "adapter_base.json").unlink()  # as older folders are
    (tmp_path / "adapters" / "manifest.json").unlink()
    SentenceEncoder.from_pretrained(tmp_path / "adapters")


@pytest.mark.parametrize("where", ["base", "."])
def test_the_base_is_not_lost(bases, tmp_path, where):
    shutil.copytree(bases / "bert", tmp_path / "base")
    encoder = move(add_adapters(SentenceEncoder.from_pretrained(tmp_path / "base"), r=4))
    vectors, target = encoder.encode(TEXTS), tmp_path / where
    refuses(lambda: encoder.save_pretrained(target, merge=False), target, "would be lost")
    SentenceEncoder.from_pretrained(tmp_path / "base")
    encoder.save_pretrained(target)
    encoder.save_pretrained(tmp_path / "later")  # its base lies nowhere any more
    for folder in (target, tmp_path / "later"):
        opened = SentenceEncoder.from_pretrained(folder)
        np.testing.assert_allclose(opened.encode(TEXTS), vectors, atol=1e-6)
        assert not has_adapters(opened.backbone)


def test_a_run_does_not_overwrite_the_base_of_its_adapters(bases, tmp_path):
    shutil.copytree(bases / "bert", tmp_path / "model")
    encoder = add_adapters(SentenceEncoder.from_pretrained(tmp_path / "model"), r=2)
    mixture, settings = make_pairs_and_triplets(), config(1)
    refuses(
        lambda: train(encoder, mixture, settings, tmp_path, overwrite=True, progress=False),
        "overwrite would delete",
        tmp_path / "model",
    )
    SentenceEncoder.from_pretrained(tmp_path / "model")


def test_adapters_are_in_the_mode_of_their_encoder(adapted):
    assert not any(module.training for module in adapted.modules())


def test_names_from_an_iterator(bases):
    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    add_adapters(encoder, target_modules=(name for name in ("value", "query")))
    assert adapters_of(encoder)["target_modules"] == ["query", "value"]


def test_a_base_that_is_gone_has_no_name(bases, tmp_path):
    shutil.copytree(bases / "bert", tmp_path / "base")
    encoder = SentenceEncoder.from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    add_adapters(encoder, r=2)
    assert adapters_of(encoder)["base_model_name_or_path"] is None
    refuses(lambda: add_adapters(encoder), "has adapters already")


def other_config(base):
    "Another rounding in every layer, and the same weights."
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_eps": 0.1}))


def other_weights(base):
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] *= 2
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})


LOSSES = [shutil.rmtree, lambda base: (base / "model.safetensors").unlink(), other_config,
          other_weights]  # fmt: skip


@pytest.mark.parametrize("lose", LOSSES)
def test_a_base_that_was_deleted_or_changed_is_no_loss(bases, tmp_path, lose):
    base, alone = tmp_path / "base", tmp_path / "alone"
    shutil.copytree(bases / "bert", base)
    (base / "manifest.json").unlink()
    encoder = move(add_adapters(SentenceEncoder.from_pretrained(base), r=4))
    vectors = encoder.encode(TEXTS)
    lose(base)
    with pytest.warns(UserWarning, match=f"{base}: .* deleted or changed .* saved whole"):
        encoder.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match=f"{base}: .* in the folder base: copy it back"):
        encoder.save_pretrained(alone, merge=False)
    for again in (SentenceEncoder.from_pretrained(tmp_path / "whole"), theirs(tmp_path / "whole")):
        np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-6)
    opened = SentenceEncoder.from_pretrained(alone)
    np.testing.assert_array_equal(opened.encode(TEXTS), vectors)
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(alone / "base", base)
    opened.save_pretrained(tmp_path / "later")  # without a warning
    (tmp_path / "later" / "manifest.json").unlink()
    again = SentenceEncoder.from_pretrained(tmp_path / "later")
    assert has_adapters(again.backbone)
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-6)


def test_a_base_that_was_only_touched_is_named(bases, tmp_path, recwarn):
    base = tmp_path / "base"
    shutil.copytree(bases / "bert", base)
    encoder = add_adapters(SentenceEncoder.from_pretrained(base), r=2)
    SentenceEncoder.from_pretrained(base).save_pretrained(base)
    copy.deepcopy(encoder).save_pretrained(tmp_path / "a")
    encoder.save_pretrained(tmp_path / "b")
    assert not recwarn.list and has_adapters(
        SentenceEncoder.from_pretrained(tmp_path / "b").backbone
    )


def test_the_digest_of_the_base_is_computed_once(bases, tmp_path, monkeypatch):
    encoder, digests = add_adapters(SentenceEncoder.from_pretrained(bases / "bert"), r=2), []

    class Counted:
        def __init__(self):
            self.digest = new()
            self.update = self.digest.update

        def hexdigest(self):
            digests.append(self.digest.hexdigest())
            return digests[-1]

    new = xxhash.xxh3_64
    monkeypatch.setattr(xxhash, "xxh3_64", Counted)
    train(encoder, make_pairs_and_triplets(), config(4, save_every=1), tmp_path, progress=False)
    assert len(digests) == 1
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight[3] += 1
    assert frozen_digest(encoder.backbone) != digests[0] and len(digests) == 2
    merge_adapters(encoder)
    add_adapters(encoder, r=2)
    assert frozen_digest(encoder.backbone) not in digests[:2]


@pytest.mark.parametrize("use", [adapters_of, merge_adapters])
def test_several_adapters_are_refused(adapted, use):
    import peft

    other = peft.LoraConfig(r=2, target_modules=["query"])
    peft.inject_adapter_in_model(other, adapted.backbone, adapter_name="other")
    before = adapted.backbone.state_dict().keys()
    refuses(lambda: use(adapted), "has 2 adapters (default, other)", "delete_adapter")
    assert adapted.backbone.state_dict().keys() == before


def test_one_adapter_may_have_any_name(bases, tmp_path):
    import peft

    encoder = SentenceEncoder.from_pretrained(bases / "bert")
    settings = peft.LoraConfig(
        r=2, target_modules=["query"], base_model_name_or_path=str(bases / "bert")
    )
    peft.inject_adapter_in_model(settings, encoder.backbone, adapter_name="mine")
    vectors = move(encoder.eval()).encode(TEXTS)
    encoder.save_pretrained(tmp_path)
    for same in (SentenceEncoder.from_pretrained(tmp_path), merge_adapters(encoder)):
        np.testing.assert_allclose(same.encode(TEXTS), vectors, atol=1e-6)


def test_bytes_do_not_depend_on_the_hash_seed(adapted, tmp_path):
    changed(adapted, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 3


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.to(torch.complex64), "is of type C64"),
        (lambda x: x > 0, "is of type BOOL"),
        (lambda x: x.to(torch.int32), "is of type I32"),
        (lambda x: x.to(torch.uint8), "is of type U8"),
        (lambda x: x * torch.nan, "holds NaN or infinity"),
        (lambda x: x.double() * torch.inf, "holds NaN or infinity"),
        (lambda x: x.double() + 1e300, "holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("where", ["adapters", "base"])
def test_numbers_that_are_no_weights(bases, tmp_path, change, said, where):
    base, folder = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(bases / "bert", base)
    move(add_adapters(SentenceEncoder.from_pretrained(base), r=2)).save_pretrained(folder)
    for path in (base, folder):
        (path / "manifest.json").unlink()
    file = (
        folder / "adapter_model.safetensors"
        if where == "adapters"
        else (base / "model.safetensors")
    )
    weights = safetensors.torch.load_file(file)
    name = next(name for name in sorted(weights) if name.endswith(".weight"))
    safetensors.torch.save_file(weights | {name: change(weights[name])}, file, {"format": "pt"})
    refuses(lambda: SentenceEncoder.from_pretrained(folder), str(file), name[-50:], said)
    if where == "base":
        refuses(lambda: SentenceEncoder.from_pretrained(base), str(file), name, said)


@pytest.mark.parametrize("base", ["", " ", ".", "/", "..", "a\0b", "x" * 300, "x/" * 3000, "~"])
def test_a_base_that_is_none_names_the_file(adapted, tmp_path, monkeypatch, base):
    changed(adapted, tmp_path, base_model_name_or_path=base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    todo = "there as base_model_name_or_path"
    file = tmp_path / "adapter_config.json"
    refuses(lambda: SentenceEncoder.from_pretrained(tmp_path), f"{file}: ", "base model", todo)


def test_adapters_whose_numbers_are_gone(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    refuses(lambda: SentenceEncoder.from_pretrained(tmp_path), "no adapter_model.safetensors")


# ---- training ----


def start(bases):
    return add_adapters(SentenceEncoder.from_pretrained(bases / "bert"), r=4, lora_dropout=0.1)


def test_a_run_whose_base_is_deleted_goes_on_and_opens(bases, tmp_path):
    base, cut, settings = tmp_path / "base", tmp_path / "cut", config(4, save_every=2)
    mixture = make_pairs_and_triplets()
    shutil.copytree(bases / "bert", base)

    def fresh():
        return add_adapters(SentenceEncoder.from_pretrained(base), r=4)

    whole = fresh()
    train(whole, mixture, settings, tmp_path / "whole", progress=False)
    first, second = fresh(), fresh()
    ways = {"callbacks": [At(1, lambda *_: shutil.rmtree(base))], "progress": False}
    with pytest.warns(UserWarning, match="deleted or changed"):
        train(first, mixture, settings, cut, **ways)
    opened = SentenceEncoder.from_pretrained(cut / "model")
    np.testing.assert_allclose(opened.encode(TEXTS), whole.encode(TEXTS), atol=1e-6)
    train(second, mixture, settings, cut, resume=True, progress=False)  # a finished run
    np.testing.assert_allclose(second.encode(TEXTS), whole.encode(TEXTS), atol=1e-6)
    # killed at step 3 in its place: the base is copied back, and the run goes on
    for path in (cut / "model", checkpoint_folder(cut, 4)):
        shutil.rmtree(path)
    (cut / "metrics.json").write_text((tmp_path / "whole" / "metrics.json").read_text())
    shutil.copytree(checkpoint_folder(cut, 2) / "base", base)
    third = fresh()
    train(third, mixture, settings, cut, resume=True, progress=False)
    assert losses(cut) == losses(tmp_path / "whole")
    np.testing.assert_array_equal(third.encode(TEXTS), whole.encode(TEXTS))


@pytest.mark.parametrize("chunk_tokens", [0, 60])
def test_a_resumed_run_is_the_uninterrupted_run(bases, tmp_path, chunk_tokens):
    settings = config(4, save_every=2, chunk_tokens=chunk_tokens)
    mixture, whole, again = make_pairs_and_triplets(), start(bases), start(bases)
    frozen = {n: p.clone() for n, p in whole.named_parameters() if not p.requires_grad}
    train(whole, mixture, settings, tmp_path / "whole", progress=False)
    with pytest.raises(Crash):
        ways = {"callbacks": [At(3, crash)], "progress": False}
        train(start(bases), mixture, settings, tmp_path / "cut", **ways)
    names = {path.name for path in checkpoint_folder(tmp_path / "cut", 2).iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    train(again, mixture, settings, tmp_path / "cut", resume=True, progress=False)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in again.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)), name
        assert name not in frozen or torch.equal(value, frozen[name])
    opened = SentenceEncoder.from_pretrained(tmp_path / "cut" / "model")
    np.testing.assert_array_equal(opened.encode(TEXTS), whole.encode(TEXTS))
    # a finished run gives the encoder its adapters
    third = start(bases)
    train(third, mixture, settings, tmp_path / "cut", resume=True, progress=False)
    np.testing.assert_array_equal(third.encode(TEXTS), whole.encode(TEXTS))


def test_chunks_give_the_losses_of_one_pass(bases, tmp_path):
    for name, tokens in (("one", 0), ("chunks", 60)):
        encoder = add_adapters(SentenceEncoder.from_pretrained(bases / "bert"), r=4)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        settings = config(3, chunk_tokens=tokens)
        train(encoder, make_pairs_and_triplets(), settings, tmp_path / name, progress=False)
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    "other, said",
    [
        (lambda encoder: add_adapters(encoder, r=2), "lora.r was 4, now 2"),
        (lambda encoder: encoder, "lora"),
    ],
)
def test_resume_refuses_other_adapters(bases, tmp_path, other, said):
    mixture, settings = make_pairs_and_triplets(), config(4, save_every=2)
    encoder = add_adapters(SentenceEncoder.from_pretrained(bases / "bert"), r=4)
    with pytest.raises(Crash):
        train(encoder, mixture, settings, tmp_path, callbacks=[At(3, crash)], progress=False)
    with pytest.raises(ValueError, match="another configuration") as caught:
        again = other(SentenceEncoder.from_pretrained(bases / "bert"))
        train(again, mixture, settings, tmp_path, resume=True, progress=False)
    assert said in str(caught.value)


def test_a_base_without_a_name_is_merged_in_the_end(tmp_path):
    def fresh():
        backbone, tokenizer = backbone_and_tokenizer("bert")
        return add_adapters(SentenceEncoder(backbone, tokenizer, max_length=60), r=2)

    encoder, settings = fresh(), config(2, save_every=1)
    train(encoder, make_pairs_and_triplets(), settings, tmp_path, progress=False)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert (checkpoint_folder(tmp_path, 2) / "adapter_model.safetensors").exists()
    again = fresh()
    train(again, make_pairs_and_triplets(), settings, tmp_path, resume=True, progress=False)
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    third = fresh()
    third.source = "a/b"
    train(third, make_pairs_and_triplets(), settings, tmp_path, resume=True, progress=False)
    assert third.source is None  # what was merged is not the base


# ---- recipes ----

RECIPE = """
title = "adapters"
[model]
name = "{base}"
[data]
mix = []
"""


def test_a_recipe_has_adapters(bases, tmp_path):
    file = tmp_path / "r.toml"
    text = RECIPE.format(base=bases / "bert")
    file.write_text(text)
    assert not has_adapters(load(file).encoder().backbone)
    file.write_text(text + '[lora]\nr = 2\ntarget_modules = ["query"]\n')
    found = adapters_of(load(file).encoder())
    assert (found["r"], found["lora_alpha"], found["target_modules"]) == (2, 16, ["query"])
    assert load(file, {"lora": {"r": 3}}).lora.r == 3


@pytest.mark.parametrize(
    "table, said",
    [
        ("r = 0", "lora.r"),
        ("r = 8\nalpha = 3", "did you mean 'lora_alpha'?"),
        ("lora_alpha = 3", "'lora.r' is missing"),
        ("", "'lora.r' is missing"),
        ("r = 2\nlora_dropout = 1.5", "lora.lora_dropout"),
        ('r = 2\ntarget_modules = "query"', "lora.target_modules"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, table, said):
    (tmp_path / "r.toml").write_text(RECIPE.format(base="x") + f"[lora]\n{table}\n")
    refuses(lambda: load(tmp_path / "r.toml"), "r.toml", said)
