"""A published model of 110 million weights, all-mpnet-base-v2, against sentence-transformers.

`make test-mpnet` fetches the model from the package index and runs these. Without it only the
checks of what is fetched run.
"""

import hashlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import mpnet  # noqa: E402

from contrastive_st.model import SentenceEncoder  # noqa: E402

# ---- what is fetched


def wheels_of(folder, parts):
    "Wheels that hold the parts of a zip, as the package index has them."
    made = []
    for n, part in enumerate(parts, 1):
        made.append(folder / f"part_{n:03}.whl")
        with zipfile.ZipFile(made[-1], "w") as wheel:
            wheel.writestr("part/__init__.py", "")
            wheel.writestr(f"part/input/model.zip.{n:03}", part)
            wheel.writestr("part.dist-info/METADATA", "Name: part")
    return made


@pytest.fixture
def joined(tmp_path):
    "A small model in a zip, cut into three parts and joined again."
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("all-mpnet-base-v2/model.safetensors", b"w" * 100)
        archive.writestr("all-mpnet-base-v2/config.json", "{}")
    content = whole.read_bytes()
    wheels = wheels_of(tmp_path, [content[:90], content[90:200], content[200:]])
    mpnet.join(wheels, tmp_path / "joined.zip")
    assert (tmp_path / "joined.zip").read_bytes() == content
    return tmp_path / "joined.zip"


def test_the_parts_are_joined_checked_and_unpacked(joined, tmp_path):
    mpnet.check(joined, hashlib.sha256(joined.read_bytes()).hexdigest())
    mpnet.unpack(joined, tmp_path / "model", 100)
    assert (tmp_path / "model" / "all-mpnet-base-v2" / "config.json").read_text() == "{}"


def test_other_files_are_refused(joined, tmp_path):
    with pytest.raises(ValueError, match="joined.zip has the sha256 .*, not abc: .* delete it"):
        mpnet.check(joined, "abc")
    with pytest.raises(ValueError, match="has 100 bytes, not 437,971,872"):
        mpnet.unpack(joined, tmp_path / "model", mpnet.WEIGHTS)


def test_only_wheels_are_fetched(monkeypatch, tmp_path):
    "pip builds what comes as source, which runs code of its maker."
    commands = []
    monkeypatch.setattr(mpnet.subprocess, "run", lambda command, check: commands.append(command))
    assert mpnet.download(tmp_path) == []
    [command] = commands
    assert command[command.index("--only-binary") + 1] == ":all:" and "--no-deps" in command


@pytest.mark.parametrize("quick, rounds", [(True, 1), (False, 3)])
def test_quick_is_quicker(monkeypatch, tmp_path, quick, rounds):
    cases = []

    def measure(case, *rest):
        cases.append(case)
        return {"ratio": {"median": 1.0}}

    monkeypatch.setattr("families.measure", measure)
    monkeypatch.setattr("speed.data_folder", lambda: tmp_path)
    monkeypatch.setattr("speed.prepare", lambda *rest: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda model: None)
    assert [*mpnet.speed(tmp_path, quick)] == ["encode_short", "encode_passages", "train_32"]
    assert [case.rounds for case in cases] == [rounds] * 3


def test_the_texts_are_many_and_different():
    texts = mpnet.texts_to_compare()
    assert len(texts) == len(set(texts)) == 60


# ---- the model itself


@pytest.fixture(scope="module")
def encoder():
    if not mpnet.MODEL.is_dir():
        pytest.skip("all-mpnet-base-v2 is not here: make test-mpnet fetches it (405 MB)")
    return SentenceEncoder.from_pretrained(mpnet.MODEL)


def test_its_vectors_are_those_of_sentence_transformers(encoder):
    from sentence_transformers import SentenceTransformer

    assert (encoder.layout, encoder.pooling, encoder.max_length) == ("packed", "mean", 384)
    texts = mpnet.texts_to_compare()
    theirs = SentenceTransformer(str(mpnet.MODEL), device="cpu").encode(texts)
    packed = encoder.encode(texts, progress=False)
    assert mpnet.difference(packed, theirs) < 1e-5
    assert np.allclose(np.linalg.norm(packed, axis=1), 1, atol=1e-5)


def test_it_scores_what_is_published(encoder, shared_data):
    spearman = mpnet.score(lambda texts: encoder.encode(texts, progress=False))
    assert spearman == pytest.approx(mpnet.PUBLISHED, abs=1e-5)


def test_it_trains_ten_steps_and_opens_elsewhere(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = mpnet.texts_to_compare()[:20]
    before = encoder.encode(texts, progress=False)
    training = mpnet.ten_steps(encoder, tmp_path)
    assert training["loss_after"] < training["loss_before"]
    after = encoder.encode(texts, progress=False)
    theirs = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu").encode(texts)
    shutil.rmtree(tmp_path)  # a model of 440 MB and its optimiser's state
    assert mpnet.difference(after, theirs) < 1e-5 < mpnet.difference(after, before)
