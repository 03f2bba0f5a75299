"""Export: other programs get the same vectors, or nothing is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_backbone, make_tokenizer, refuses
from typer.testing import CliRunner

from contrastive_st import cli
from contrastive_st.export import OnnxEncoder, export_onnx
from contrastive_st.model import SentenceEncoder

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="needs the extra 'onnx'")

TEXTS = ["a dog is playing", "snow", "the man and the woman are eating rice " * 9, "x, y. z!"]
SHORT = [text for text in TEXTS if len(text) < 40]
NODE = Path(os.environ.get("CONTRASTIVE_ST_NODE", ROOT / ".cache/node"))


def encoder(**options):
    tokenizer = make_tokenizer()
    return SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=20, **options)


def plain(model, texts, **options):
    "Vectors of torch, without a word on those that are truncated."
    with pytest.warns(UserWarning, match="were cut"):
        return model.encode(texts, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_disk):
    "A model directory and its export."
    place = tmp_path_factory.mktemp("export")
    encoder(prompts={"query": "where is "}).save_pretrained(place / "model")
    about = export_onnx(place / "model", place / "out")
    return place, about


def test_vectors_of_onnxruntime_are_ours(whole):
    place, about = whole
    model = SentenceEncoder.from_pretrained(place / "model")
    theirs = OnnxEncoder(place / "out").encode(TEXTS, batch_size=3)
    ours = plain(model, TEXTS)
    assert np.abs(ours - theirs).max() < 1e-6 and theirs.dtype == np.float32
    assert about["texts"] == 100 and about["largest_difference"] < 1e-5
    assert about["prompts"] == {"query": "where is "} and about["max_length"] == 20
    # alone or beside longer ones, in any order, none at all
    for n, text in enumerate(TEXTS):
        assert np.abs(OnnxEncoder(place / "out").encode([text])[0] - ours[n]).max() < 1e-6
    assert OnnxEncoder(place / "out").encode([]).shape == (0, 32)
    states, vectors = OnnxEncoder(place / "out").run(TEXTS)
    assert states.shape == (4, 20, 32) and vectors.shape == (4, 32)


def test_the_files_are_enough_without_this_library(whole):
    "Ten lines of onnxruntime in a process that imports no torch."
    code = """
import sys, json, numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
batch = tokenizer.encode_batch(texts)
ids, mask = (np.array([getattr(e, k) for e in batch]) for k in ("ids", "attention_mask"))
vectors = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]
assert "torch" not in sys.modules and "contrastive_st" not in sys.modules
print(json.dumps(vectors.tolist()))
"""
    words = [sys.executable, "-c", code, str(whole[0] / "out"), json.dumps(TEXTS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    ours = plain(SentenceEncoder.from_pretrained(whole[0] / "model"), TEXTS)
    assert np.abs(np.array(json.loads(done.stdout)) - ours).max() < 1e-6


def test_opening_an_export_needs_no_torch(whole):
    code = "import sys; from contrastive_st.export import OnnxEncoder as E;"
    code += f"E({str(whole[0] / 'out')!r}).encode(['snow']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_js_gives_the_same_vectors(whole):
    "For texts that fit: of longer ones transformers.js cuts off the last special token as well."
    if not shutil.which("node"):
        pytest.skip("there is no node")
    if not (NODE / "node_modules/@huggingface/transformers").is_dir():
        pytest.skip(
            f"no npm package: ONNXRUNTIME_NODE_INSTALL=skip npm install --prefix {NODE}"
            " @huggingface/transformers"
        )
    code = """
import { pipeline, env } from "@huggingface/transformers";
const [folder, texts] = process.argv.slice(-2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const embed = await pipeline("feature-extraction", "out", { dtype: "fp32" });
const vectors = await embed(JSON.parse(texts), { pooling: "mean", normalize: true });
console.log(JSON.stringify(vectors.tolist()));
"""
    words = ["node", "--input-type=module", "-e", code, "--", str(whole[0]), json.dumps(SHORT)]
    done = subprocess.run(words, cwd=NODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = SentenceEncoder.from_pretrained(whole[0] / "model").encode(SHORT, progress=False)
    assert np.abs(np.array(json.loads(done.stdout.splitlines()[-1])) - ours).max() < 1e-5


def test_another_pooling_and_fewer_dimensions(tmp_path, quick_disk):
    model = encoder(pooling="max", normalize=False)
    model.settings["truncate_dim"] = 16
    about = export_onnx(model, tmp_path / "out")
    assert about["width"] == 16 and about["pooling"] == "max" and about["normalize"] is False
    theirs = OnnxEncoder(tmp_path / "out").encode(TEXTS)
    assert theirs.shape == (4, 16) and np.abs(theirs - plain(model, TEXTS)).max() < 1e-6
    assert model.settings["truncate_dim"] == 16 and model.layout == "packed"  # untouched


# --- what goes wrong ---


def test_a_graph_that_differs_is_not_written(whole, tmp_path, monkeypatch):
    "torch's exporter is replaced by one that writes the graph of other weights."
    graph = whole[0] / "out/onnx/model.onnx"
    monkeypatch.setattr(torch.onnx, "export", lambda m, args, path, **k: shutil.copy(graph, path))
    other = encoder()
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight[:, 0] += 0.1
    refuses(lambda: export_onnx(other, tmp_path / "out"), "differs from the model by", "1e-05")
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_that_cannot_be_traced(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no such operator\nand a page of trace")

    monkeypatch.setattr(torch.onnx, "export", fail)
    refuses(
        lambda: export_onnx(encoder(), tmp_path / "out"),
        "a BertModel cannot be written as an ONNX graph (RuntimeError: 'no such operator')",
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_exported(tmp_path):
    own = encoder()
    own.pooling = "lasttoken"
    refuses(lambda: export_onnx(own, tmp_path / "out"), "'lasttoken' is not exported; mean")
    own = encoder()
    own.head = torch.nn.Sequential(torch.nn.Dropout())
    refuses(lambda: export_onnx(own, tmp_path / "out"), "has modules after its pooling")
    refuses(lambda: export_onnx(tmp_path / "none", tmp_path / "out"), "is not a directory")


def test_other_files_are_never_replaced(whole, tmp_path):
    (tmp_path / "mine.txt").write_text("my only copy")
    refuses(lambda: export_onnx(encoder(), tmp_path), tmp_path, "holds other files")
    refuses(lambda: export_onnx(encoder(), whole[0] / "model"), "holds other files")
    (tmp_path / "file").write_text("")
    refuses(lambda: export_onnx(encoder(), tmp_path / "file"), "is a file")
    assert (tmp_path / "mine.txt").read_text() == "my only copy"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuses(
        lambda: export_onnx(encoder(), tmp_path / "out"),
        "onnxscript is not installed",
        "[onnx]",
    )


def test_damaged_exports(whole, tmp_path):
    refuses(lambda: OnnxEncoder(tmp_path), "is not an exported model", "contrastive-st export")
    folder = shutil.copytree(whole[0] / "out", tmp_path / "out")
    (folder / "onnx/model.onnx").write_bytes(b"short")
    refuses(lambda: OnnxEncoder(folder), "model.onnx", "5 bytes", "export the model again")
    (folder / "manifest.json").unlink()  # as in a copy of some of the files
    refuses(lambda: OnnxEncoder(folder), folder, "cannot be read", "export the model again")


def test_the_command(whole, tmp_path, monkeypatch):
    graph = whole[0] / "out/onnx/model.onnx"
    monkeypatch.setattr(torch.onnx, "export", lambda m, args, path, **k: shutil.copy(graph, path))
    words = ["export", str(whole[0] / "model"), "--onnx", str(tmp_path / "out")]
    for _ in range(2):  # an export is replaced by another one
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.exception
    assert "32 dimensions" in result.output and "on 100 texts" in result.output
    assert "{ pooling: 'mean', normalize: true }" in result.output
    assert (tmp_path / "out/config.json").is_file()
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path), "--onnx", str(tmp_path / "x")])
    assert isinstance(result.exception, ValueError)
    assert CliRunner().invoke(cli.app, ["export", "model"]).exit_code == 2  # --onnx is missing
