"""The leaderboard: an entry is run, scored and written into its table, and a false one refused."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, make_backbone, make_tokenizer, sentences

sys.path.insert(0, str(ROOT / "benchmarks"))

import leaderboard  # noqa: E402

from contrastive_st.model import SentenceEncoder  # noqa: E402

PAGE = "# Page\n" + "".join(
    f"\n<!-- {name} -->\n<!-- end {name} -->\n" for name in leaderboard.TASKS
)


@pytest.fixture
def tiny_model(tmp_path):
    tokenizer = make_tokenizer()
    folder = tmp_path / "tiny"
    SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=16).save_pretrained(folder)
    return folder


def test_an_entry_is_scored_and_stands_in_the_table(tiny_model, tmp_path, monkeypatch, capsys):
    page, record = tmp_path / "LEADERBOARD.md", tmp_path / "leaderboard.json"
    page.write_text(PAGE)
    monkeypatch.setattr(leaderboard, "PAGE", page)
    monkeypatch.setattr(leaderboard, "RECORD", record)
    copy = f"import shutil, sys; shutil.copytree('{tiny_model}', sys.argv[1] + '/model')"
    command = f'{sys.executable} -c "{copy}" {{out}}'
    for name in ("copied", "copied", "copied again"):  # the second takes the place of the first
        words = ["leaderboard.py", "harbour", "--name", name, "--command", command]
        monkeypatch.setattr(sys, "argv", words)
        leaderboard.main()
    entries = json.loads(record.read_text())
    assert [entry["name"] for entry in entries] == ["copied", "copied again"]
    assert 0 < entries[0]["score"] < 50 and entries[0]["cpu"] > 0 and entries[0]["gflops"] > 0
    rows = page.read_text().split("<!-- harbour -->")[1].split("<!-- end")[0].strip().split("\n")
    assert len(rows) == 4 and "nDCG@10" in rows[0] and "copied" in rows[2]
    assert leaderboard.task_table("harbour", entries) in page.read_text()


def test_vectors_of_another_model_are_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "TEXTS", 600)
    monkeypatch.setattr(leaderboard, "MINILM", str(tiny_model))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(sentences(600, 0)) + "\n")
    lines = texts.read_text().splitlines()
    vectors = SentenceEncoder.from_pretrained(tiny_model).encode(lines, progress=False)
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float16))
    assert leaderboard.encode_score(tmp_path, texts) > 0.999
    np.save(tmp_path / "vectors.npy", np.roll(vectors, 1, 0))
    with pytest.raises(ValueError, match="has a cosine of .* 0.999 is the least"):
        leaderboard.encode_score(tmp_path, texts)
    np.save(tmp_path / "vectors.npy", vectors[1:])
    with pytest.raises(ValueError, match=r"shape \(599, 32\), not \(600, 32\): embed each"):
        leaderboard.encode_score(tmp_path, texts)


def test_the_page_holds_what_is_recorded():
    entries = json.loads(leaderboard.RECORD.read_text())
    assert entries and {entry["task"] for entry in entries} <= leaderboard.TASKS.keys()
    for name in leaderboard.TASKS:
        assert leaderboard.task_table(name, entries) in leaderboard.PAGE.read_text()
