"""Encoding a stream of texts to a file: numbers, order, memory, resume, worker processes, and everything that can go wrong on the way."""
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_backbone, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_st import encoding
from contrastive_st.encoding import write_embeddings
from contrastive_st.model import SentenceEncoder
from contrastive_st.precision import PRECISIONS, calibrate, dequantize, quantize

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500)]


CHEAP = '''
"Encoders for worker processes: they import NumPy only, so that a process starts quickly."
import os
import numpy as np

FAKE

def dying(texts):
    if any("text 1700 " in t for t in texts): os._exit(7)
    return fake(texts)

def failing(texts):
    raise RuntimeError("no numbers today")
'''


def fake(texts):
    "A cheap encoder: every text has a vector of its own."
    return np.array([[len(t), sum(map(ord, t[-9:])), sum(map(ord, t[:9])), 1, -1, 0, 2, 3] for t in texts], np.float32)


@pytest.fixture
def cheap(tmp_path_factory, monkeypatch):
    "The encoders as a module that other processes can import."
    folder = tmp_path_factory.mktemp("cheap")
    (folder / "cheap.py").write_text(CHEAP.replace("FAKE", inspect.getsource(fake)))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.delitem(sys.modules, "cheap", raising=False)
    return importlib.import_module("cheap")


def half_way(texts, n, error):
    yield from texts[:n]
    raise error


def written(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def tiny(tiny_tokenizer, tiny_backbone):
    return SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("model")
    SentenceEncoder(make_backbone(len(tokenizer)), tokenizer, max_length=64).save_pretrained(folder)
    return folder


# ---- fewer bits ----

@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("shape", [(50, 24), (2, 8), (0, 16), (7, 13)])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_quantize_gives_the_peers_numbers(precision, shape, kind):
    from sentence_transformers.util.quantization import quantize_embeddings
    vectors = np.random.default_rng(0).standard_normal(shape).astype(kind)
    if len(vectors): vectors[0], vectors[:, 1] = 0, 0.5  # a zero vector, and a dimension without a range
    ours, peers = quantize(vectors, precision), quantize_embeddings(vectors, precision)
    np.testing.assert_array_equal(ours, peers)
    assert ours.dtype == peers.dtype == PRECISIONS[precision]


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_quantize_with_ranges_gives_the_peers_numbers(precision):
    from sentence_transformers.util.quantization import quantize_embeddings
    rng = np.random.default_rng(1)
    sample, vectors = rng.standard_normal((300, 24)).astype(np.float32), 2 * rng.standard_normal((50, 24)).astype(np.float32)
    expected = quantize_embeddings(vectors, precision, calibration_embeddings=sample)
    np.testing.assert_array_equal(quantize(vectors, precision, calibrate(sample)), expected)  # what lies outside is clipped
    np.testing.assert_array_equal(quantize(vectors[:1], precision, calibrate(sample)), expected[:1])
    np.testing.assert_array_equal(quantize(vectors, precision, calibrate(sample).tolist()), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(list(PRECISIONS)))
def test_back_to_floats(n, width, seed, precision):
    "Integers come back within half a step, bits with their sign, floats as near as their width allows."
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    back = dequantize(quantize(vectors, precision), precision, calibrate(vectors), width)
    assert back.shape == vectors.shape and back.dtype == np.float32
    if "binary" in precision:
        np.testing.assert_array_equal(back > 0, vectors > 0)
    else:
        step = np.ptp(calibrate(vectors), axis=0) / 255
        limit = step * 0.502 + 1e-5 if "int8" in precision else np.full(width, 4e-3 if precision == "float16" else 0)
        assert (np.abs(back - vectors).max(axis=0) <= limit).all()


@pytest.mark.parametrize("call, said", [
    (lambda v: quantize(v, "int4"), "'int4' is not supported; use one of float32"),
    (lambda v: quantize(v.astype(np.int8), "int8"), "vectors are int8"),
    (lambda v: quantize(v * np.nan, "binary"), "NaN or inf"),
    (lambda v: quantize(v * 1e6, "float16"), "does not fit float16"),
    (lambda v: quantize(v[:1], "int8"), "at least 2 vectors"),
    (lambda v: quantize(v, "int8", np.zeros((2, 3))), r"pass \(2, 8\)"),
    (lambda v: quantize(v, "int8", np.stack([np.ones(8), np.zeros(8)])), "least values first"),
    (lambda v: dequantize(quantize(v, "int8"), "int8"), "needs the ranges"),
    (lambda v: calibrate(v[0]), "at least 2 vectors"),
])
def test_what_cannot_be_quantised(call, said):
    with pytest.raises(ValueError, match=said):
        call(np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32))


def test_recall_on_real_questions(shared_data):
    "Cranfield, first 32 tokens of each: eight bits cost next to nothing, one bit costs a quarter of the neighbours until candidates are scored again."
    from contrastive_st import data, search
    pretrained = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", max_length=32)
    corpus, queries, qrels = data.read_retrieval(shared_data / "retrieval" / "cranfield")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that texts are cut
        documents, asked = (pretrained.encode(list(texts.values()), progress=False) for texts in (corpus, queries))
    exact = search.semantic_search(asked, documents, 10)[1]
    kept = lambda found: np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)])
    ranges = calibrate(documents)
    recall = {p: kept(search.semantic_search(asked, dequantize(quantize(documents, p, ranges), p, ranges), 10)[1]) for p in ("float16", "int8", "binary")}
    near = search.semantic_search(asked, dequantize(quantize(documents, "binary"), "binary"), 40)[1]
    again = [rows[np.argsort(-(documents[rows] @ q), kind="stable")[:10]] for q, rows in zip(asked, near)]
    recall["binary, 40 scored again"] = kept(again)
    print({name: round(float(r), 3) for name, r in recall.items()})
    assert recall["float16"] > 0.99 and recall["int8"] > 0.95 and 0.5 < recall["binary"] < recall["binary, 40 scored again"] > 0.9


# ---- the file ----

@pytest.mark.parametrize("name", ["v.npy", "v.bin", "v", "v.arrow", "v.feather", "v.parquet"])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_every_format_and_precision(tmp_path, name, precision):
    card = write_embeddings(tmp_path / name, fake, iter(TEXTS), precision, calibrate(fake(TEXTS)), window=700, progress=False)
    expected = quantize(fake(TEXTS), precision, calibrate(fake(TEXTS)))
    if name in ("v.arrow", "v.feather"):
        table = pa.ipc.open_file(pa.memory_map(str(tmp_path / name))).read_all()
    elif name == "v.parquet":
        table = pq.read_table(tmp_path / name)
    if "." in name and name.rpartition(".")[2] in ("arrow", "feather", "parquet"):
        assert table.column_names == ["row", "vector"] and table["row"].to_pylist() == list(range(2500))
        found = np.stack([chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in [table["vector"].combine_chunks()]])[0]
        assert pa.types.is_fixed_size_list(table["vector"].type)
    else:
        found = np.load(tmp_path / name, mmap_mode="r")
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and written(tmp_path) == [name, name + ".json"]
    assert (card["rows"], card["width"], card["precision"]) == (2500, 8, precision) and card == json.loads((tmp_path / (name + ".json")).read_text())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 100))
def test_order_whatever_the_windows(tmp_path_factory, texts, window, batch, characters):
    out = tmp_path_factory.mktemp("order") / "v.npy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH", batch)
        patch.setattr(encoding, "WINDOW_CHARACTERS", characters)
        write_embeddings(out, fake, texts, window=window, progress=False)
    np.testing.assert_array_equal(np.load(out), fake(texts))


def test_batches_hold_texts_of_similar_length(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 100)
    spread = []
    write_embeddings(tmp_path / "v.npy", lambda texts: (spread.append(max(map(len, texts)) - min(map(len, texts))), fake(texts))[1], TEXTS, window=1000, progress=False)
    assert np.mean(spread) < 0.2 * (max(map(len, TEXTS)) - min(map(len, TEXTS)))


def test_a_window_ends_when_it_holds_enough_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 1000)
    calls = []
    texts = ["a" * 5000, "b", "c" * 600, "d" * 600, "e"]
    write_embeddings(tmp_path / "v.npy", lambda texts: (calls.append(sorted(map(len, texts))), fake(texts))[1], texts, progress=False)
    assert calls == [[5000], [1, 600, 600], [1]]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), fake(texts))


def test_the_same_as_encode(tmp_path, tiny):
    texts = [t[:40] for t in TEXTS[:90]] + ["", "dog", "dog"]
    for encoder in (tiny, tiny.encode, partial(tiny.encode, progress=False)):
        write_embeddings(tmp_path / "v.npy", encoder, texts, window=40, progress=False)
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), tiny.encode(texts, progress=False), atol=1e-6)
    card = write_embeddings(tmp_path / "v.npy", tiny, texts, progress=False, truncate_dim=8, prompt="query: ")
    assert np.load(tmp_path / "v.npy").shape == (93, 8) and card["options"] == {"truncate_dim": 8, "prompt": "query: "}
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), tiny.encode(texts, progress=False, truncate_dim=8, prompt="query: "), atol=1e-6)


def test_ranges_come_from_the_first_window_or_the_caller(tmp_path):
    card = write_embeddings(tmp_path / "v.npy", fake, TEXTS, "int8", window=500, progress=False)
    np.testing.assert_array_equal(card["ranges"], calibrate(fake(TEXTS[:500])))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), quantize(fake(TEXTS), "int8", calibrate(fake(TEXTS[:500]))))
    with pytest.warns(UserWarning, match="ranges of uint8 come from 20 texts only"):
        write_embeddings(tmp_path / "v.npy", fake, TEXTS[:20], "uint8", progress=False)
    assert write_embeddings(tmp_path / "v.npy", fake, TEXTS, "binary", progress=False)["ranges"] is None


def test_memory_does_not_grow_with_the_texts(tmp_path):
    "200,000 texts from a generator; their vectors alone would be 51 MB, the texts 20 MB."
    child = """
        import resource, sys, numpy as np
        from contrastive_st.encoding import write_embeddings
        fake = lambda texts: np.ones((len(texts), 64), np.float32)
        texts = lambda n: (f"text {i} " + "x" * (i % 50) for i in range(n))
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_embeddings(sys.argv[1], fake, texts(20_000), progress=False)
        before = peak()
        write_embeddings(sys.argv[1], fake, texts(200_000), progress=False)
        print((peak() - before) / 1024)
    """
    for name in ("v.npy", "v.arrow"):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(child), tmp_path / name], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 16, f"{done.stdout} MiB"


# ---- resume ----

def test_an_iterator_that_raises_loses_nothing(tmp_path):
    "All texts before the error are written and readable; the finished file is that of a run without an error."
    out, error = tmp_path / "v.npy", ConnectionError("the server went away")
    with pytest.raises(ConnectionError) as caught:
        write_embeddings(out, fake, half_way(TEXTS, 1700, error), window=500, progress=False)
    assert caught.value is error and "1,700 rows" in error.__notes__[0] and "resume" in error.__notes__[0]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy.part", mmap_mode="r"), fake(TEXTS[:1700]))
    assert not out.exists()
    called = []
    write_embeddings(out, spy(called), iter(TEXTS), window=500, resume=True, progress=False)
    assert sum(called) == 800 and written(tmp_path) == ["v.npy", "v.npy.json"]
    np.testing.assert_array_equal(np.load(out), fake(TEXTS))


def spy(called):
    def fake(texts):  # under the same name: it is the name that is compared
        called.append(len(texts))
        return globals()["fake"](texts)
    fake.__qualname__ = "fake"
    return fake


@pytest.mark.parametrize("stage", ["rows", "header", "journal", "torn"])
def test_killed_between_two_writes(tmp_path, stage):
    "Whatever a killed run had written of a window, resume takes up what is whole."
    out = tmp_path / "v.npy"
    with pytest.raises(ConnectionError):
        write_embeddings(out, fake, half_way(TEXTS, 1500, ConnectionError()), window=500, progress=False)
    part, journal = tmp_path / "v.npy.part", tmp_path / "v.npy.part.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    if stage == "rows":                                # rows without header and journal
        with open(part, "ab") as file: file.write(b"half a window")
    elif stage == "header":                            # the header counts rows that the journal does not know
        journal.write_bytes(b"".join(lines[:-1]))
    elif stage == "journal":                           # the journal knows rows that never reached the disk
        os.truncate(part, part.stat().st_size - 100)
    else:
        journal.write_bytes(b"".join(lines)[:-20])
    called = []
    write_embeddings(out, spy(called), TEXTS, window=500, resume=True, progress=False)
    assert sum(called) == (1000 if stage == "rows" else 1500)
    np.testing.assert_array_equal(np.load(out), fake(TEXTS))


@pytest.mark.parametrize("name", ["v.npy", "v.arrow"])
def test_killed_while_it_gives_the_file_its_name(tmp_path, monkeypatch, name):
    "Stop before each rename, and at each file that is taken away; resume ends in the same files."
    clean = tmp_path / "clean"
    clean.mkdir()
    write_embeddings(clean / name, fake, TEXTS, progress=False)
    calls = {"replace": Path.replace, "unlink": Path.unlink}
    for which in ("replace", "unlink"):
        for n in range(3):
            folder, count = tmp_path / f"{which}{n}", iter(range(100))
            folder.mkdir()
            def stop(self, *args, which=which, count=count, n=n, **kwargs):
                if next(count) == n: raise KeyboardInterrupt
                return calls[which](self, *args, **kwargs)
            with monkeypatch.context() as patch:
                patch.setattr(Path, which, stop)
                try: write_embeddings(folder / name, fake, TEXTS, progress=False)
                except KeyboardInterrupt: pass
            write_embeddings(folder / name, fake, TEXTS, resume=True, progress=False)
            assert (folder / name).read_bytes() == (clean / name).read_bytes()
            assert [n for n in written(folder) if not n.endswith(".jsonl")] == written(clean)


def test_killed_for_good(tmp_path, cheap):
    "SIGKILL in the middle; the resumed file is the uninterrupted one, byte for byte."
    child = """
        import sys, time, cheap
        from contrastive_st.encoding import write_embeddings
        def fake(texts):
            time.sleep(0.02)
            return cheap.fake(texts)
        write_embeddings(sys.argv[1], fake, (f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500)), window=100, resume=True, progress=False)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(child), tmp_path / "v.npy"]
    process, journal = subprocess.Popen(arguments), tmp_path / "v.npy.part.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3): time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was too quick to be killed"
    rows = len(np.load(tmp_path / "v.npy.part", mmap_mode="r"))
    assert 0 < rows < 2500 and rows % 100 == 0
    assert subprocess.run(arguments).returncode == 0
    write_embeddings(tmp_path / "whole.npy", fake, TEXTS, progress=False)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_nothing_is_encoded_twice(tmp_path):
    called, out = [], tmp_path / "v.npy"
    write_embeddings(out, fake, TEXTS, progress=False)
    before = out.stat().st_mtime_ns
    card = write_embeddings(out, spy(called), iter(TEXTS), resume=True, progress=False)
    assert called == [] and out.stat().st_mtime_ns == before and card["rows"] == 2500
    write_embeddings(out, spy(called), TEXTS[:3], progress=False)  # without resume the old file is replaced
    assert sum(called) == 3 and len(np.load(out)) == 3


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change, said", [
    (dict(texts=TEXTS[:700] + ["another"] + TEXTS[701:]), "other texts .rows .* to .* differ"),
    (dict(texts=[TEXTS[0] + TEXTS[1][:1], TEXTS[1][1:], *TEXTS[2:]]), "other texts"),
    (dict(texts=TEXTS[:900]), "other texts"),
    (dict(precision="float16"), "precision"),
    (dict(encoder=len), "another encoder .* .function"),
    (dict(normalize=True), "options"),
    (dict(precision="int8", ranges=np.array([[0] * 8, [1] * 8])), "precision"),
])
def test_resume_with_something_else_is_refused(tmp_path, finished, change, said):
    out = tmp_path / "v.npy"
    if finished:
        write_embeddings(out, fake, TEXTS, window=500, progress=False)
    else:
        with pytest.raises(ConnectionError):
            write_embeddings(out, fake, half_way(TEXTS, 1500, ConnectionError()), window=500, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=said):
        write_embeddings(out, **{"encoder": fake, "texts": TEXTS, "resume": True, "progress": False} | change)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_more_texts_than_a_finished_file_has(tmp_path):
    write_embeddings(tmp_path / "v.npy", fake, TEXTS[:900], progress=False)
    with pytest.raises(ValueError, match="first 900 of these texts only"):
        write_embeddings(tmp_path / "v.npy", fake, TEXTS, resume=True, progress=False)


def test_what_is_there_is_not_lost_without_resume(tmp_path):
    out = tmp_path / "v.npy"
    with pytest.raises(ConnectionError):
        write_embeddings(out, fake, half_way(TEXTS, 1500, ConnectionError()), progress=False)
    with pytest.raises(ValueError, match="1,500 rows of a run that stopped; go on with resume, or delete it"):
        write_embeddings(out, fake, TEXTS, progress=False)


def test_an_encoder_is_known_by_its_weights_settings_and_tokenizer(tmp_path, tiny, model_folder):
    import torch
    known = encoding._fingerprint(tiny)
    tiny.encode(["a dog"], progress=False)          # leaves truncation and padding of the tokenizer as they were, or not: no matter
    assert encoding._fingerprint(tiny) == encoding._fingerprint(partial(tiny.encode, batch_size=3)) == known
    assert encoding._fingerprint(partial(tiny.encode, truncate_dim=3))["arguments"] != known["arguments"]
    assert encoding._fingerprint(fake)["function"] == encoding._fingerprint(partial(fake))["function"] == "fake"
    loaded = SentenceEncoder.from_pretrained(model_folder)
    assert encoding._fingerprint(loaded)["weights"] == known["weights"]
    loaded.max_length = 32
    assert encoding._fingerprint(loaded)["settings"] != known["settings"]
    loaded.tokenizer.add_tokens(["dogs"])
    assert encoding._fingerprint(loaded)["tokenizer"] != known["tokenizer"]
    with torch.no_grad(): next(tiny.parameters()).view(-1)[5] += 1e-6
    assert encoding._fingerprint(tiny)["weights"] != known["weights"]


def test_resume_with_a_smaller_batch_size(tmp_path, tiny):
    "Memory was short: the batch size may change, for it changes no vector."
    out = tmp_path / "v.npy"
    with pytest.raises(ConnectionError):
        write_embeddings(out, tiny, half_way(TEXTS, 60, ConnectionError()), window=30, progress=False, batch_size=32)
    begun = np.load(tmp_path / "v.npy.part")
    write_embeddings(out, tiny, TEXTS[:90], window=30, resume=True, progress=False, batch_size=4)
    np.testing.assert_array_equal(np.load(out)[:60], begun)
    np.testing.assert_allclose(np.load(out), tiny.encode(TEXTS[:90], progress=False), atol=1e-6)


# ---- several processes ----

def test_workers_give_the_same_file(tmp_path, model_folder):
    texts = TEXTS[:1300] + ["\ud800", ""]
    for workers in (1, 2):
        with pytest.warns(UserWarning, match="1 texts hold surrogates, text 1,300 first"):
            write_embeddings(tmp_path / f"{workers}.npy", str(model_folder), iter(texts), window=600, workers=workers, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))


def test_a_worker_that_dies(tmp_path, cheap):
    "One sentence, soon, and the windows before it are kept; another encoder of that name goes on."
    start, out = time.time(), tmp_path / "v.npy"
    with pytest.raises(ValueError, match="a worker process died.*resume"):
        write_embeddings(out, cheap.dying, TEXTS, window=512, workers=2, progress=False)
    assert time.time() - start < 60
    kept = np.load(tmp_path / "v.npy.part", mmap_mode="r")
    assert 0 < len(kept) <= 1536 and len(kept) % 512 == 0
    np.testing.assert_array_equal(kept, fake(TEXTS[:len(kept)]))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_encoder_that_raises(tmp_path, cheap, workers):
    with pytest.raises(RuntimeError, match="no numbers today"):
        write_embeddings(tmp_path / "v.npy", cheap.failing, TEXTS, workers=workers, progress=False)
    assert written(tmp_path) == []


def test_workers_keep_what_came_before_an_iterator_raised(tmp_path, cheap):
    with pytest.raises(ConnectionError):
        write_embeddings(tmp_path / "v.npy", cheap.fake, half_way(TEXTS, 1300, ConnectionError()), window=600, workers=2, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy.part"), fake(TEXTS[:1300]))


def test_workers_end_with_their_parent(tmp_path, cheap):
    "No process is left behind when the parent is killed."
    child = """
        import sys, time, multiprocessing
        from cheap import fake
        from contrastive_st.encoding import write_embeddings
        def texts():
            yield from ("text %d" % i for i in range(3000))
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)
            time.sleep(100)
        if __name__ == "__main__": write_embeddings(sys.argv[1], fake, texts(), workers=2, window=500, progress=False)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(child))
    process = subprocess.Popen([sys.executable, script, tmp_path / "v.npy"], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline: time.sleep(0.05)
    assert len(workers) == 2 and not any(map(alive, workers))


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


@pytest.mark.parametrize("encoder, said", [(lambda texts: fake(texts), "cannot go to worker processes"), ("tiny", "save_pretrained"), ("tiny.encode", "save_pretrained"), ("partial", "save_pretrained")])
def test_encoders_that_cannot_be_sent(tmp_path, tiny, encoder, said):
    encoder = {"tiny": tiny, "tiny.encode": tiny.encode, "partial": partial(tiny.encode, batch_size=4)}.get(encoder, encoder) if isinstance(encoder, str) else encoder
    with pytest.raises(ValueError, match=said):
        write_embeddings(tmp_path / "v.npy", encoder, TEXTS, workers=2, progress=False)


# ---- bad texts ----

STRANGE = ["", " ", "\0", "a\0b", "\u2028", "\ufeff", "\U0001f600", "\ud83d\ude00", "e\u0301" * 50, "dog " * 5000, "\U0010ffff", "\ud800", "a \udfff b"]


def test_strange_texts(tmp_path, tiny):
    with pytest.warns(UserWarning) as said:
        write_embeddings(tmp_path / "v.npy", tiny, STRANGE, progress=False)
    assert any("3 texts hold surrogates, text 7 first; pairs were joined, lone ones replaced by U+FFFD" in str(w.message) for w in said)
    assert any("longer than max_length" in str(w.message) for w in said)
    found = np.load(tmp_path / "v.npy")
    assert found.shape == (13, 32) and np.isfinite(found).all()
    mended = STRANGE[:7] + ["\U0001f600", *STRANGE[8:11], "\ufffd", "a \ufffd b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(found, tiny.encode(mended, progress=False), atol=1e-6)
    write_embeddings(tmp_path / "v.npy", tiny, STRANGE, resume=True, progress=False)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=20), st.text(st.characters(codec="utf-8"), max_size=20))
def test_mended_texts_are_unicode(any_text, good):
    mended = encoding._mended(any_text)
    mended.encode()
    assert encoding._mended(good) == good and encoding._mended(mended) == mended
    assert encoding._mended(good + "\ud800") == good + "\ufffd" and encoding._mended("\udc00" + good) == "\ufffd" + good


@pytest.mark.parametrize("bad", [None, 5, b"dog", float("nan"), ["dog"]])
def test_a_text_that_is_no_string_is_named_by_its_number(tmp_path, bad):
    with pytest.raises(ValueError, match=f"text 1,?200 is of type {type(bad).__name__}, not a string") as caught:
        write_embeddings(tmp_path / "v.npy", fake, TEXTS[:1200] + [bad] + TEXTS[1200:], window=500, progress=False)
    assert "1,200 rows" in caught.value.__notes__[0]
    assert len(np.load(tmp_path / "v.npy.part")) == 1200
    write_embeddings(tmp_path / "v.npy", fake, TEXTS, window=500, resume=True, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), fake(TEXTS))


def test_warnings_of_many_batches_are_told_once(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 10)
    with pytest.warns(UserWarning) as said:
        write_embeddings(tmp_path / "v.npy", tiny, ["dog " * 100] * 45, progress=False)
    assert [str(w.message) for w in said] == ["5 batches of 10 gave a warning, the first: 10 of 10 texts were longer than max_length = 64 tokens and were cut; the backbone takes up to 64"]


# ---- what the caller or the disk gets wrong ----

@pytest.mark.parametrize("change, said", [
    (dict(texts="a dog"), "texts is of type str; pass a list"), (dict(texts=5), "texts is of type int"), (dict(texts=[]), "no texts to encode"),
    (dict(precision="int4"), "'int4' is not supported; use one of"), (dict(window=0), "window=0"), (dict(workers=0), "workers=0"),
    (dict(encoder=lambda texts: np.ones((2, 3), np.float32)), r"gave \(2, 3\) float32 for 5 texts"),
    (dict(encoder=lambda texts: np.ones((len(texts), 3), int)), "vector of floats"),
    (dict(encoder=lambda texts: np.full((len(texts), 3), np.nan, np.float32)), "text 0: its vector holds NaN"),
    (dict(encoder="no/such/model"), "no/such/model"), (dict(precision="int8", texts=["a"]), "at least 2 vectors"),
    (dict(path="absent/v.npy"), "there is no folder"), (dict(path="."), "is a folder"),
])
def test_arguments_that_are_not_right(tmp_path, change, said):
    arguments = {"path": "v.npy", "encoder": fake, "texts": TEXTS[:5], "progress": False} | change
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_embeddings(tmp_path / arguments.pop("path"), **arguments)
    assert written(tmp_path) == []


def test_an_encoder_of_changing_width(tmp_path):
    with pytest.raises(ValueError, match="vectors of 4 dimensions, .* holds 8"):
        write_embeddings(tmp_path / "v.npy", lambda texts: fake(texts)[:, :8 if TEXTS[0] in texts else 4], TEXTS, window=500, progress=False)
    assert np.load(tmp_path / "v.npy.part").shape == (500, 8)


def test_a_damaged_journal(tmp_path):
    with pytest.raises(ConnectionError):
        write_embeddings(tmp_path / "v.npy", fake, half_way(TEXTS, 1500, ConnectionError()), progress=False)
    for damage in (b"\0" * 100 + b"\n\n", b"1\n2\n", b"{}\n{}\n"):
        (tmp_path / "v.npy.part.jsonl").write_bytes(damage)
        with pytest.raises(ValueError, match="v.npy.part.jsonl: damaged; delete it"):
            write_embeddings(tmp_path / "v.npy", fake, TEXTS, resume=True, progress=False)
    (tmp_path / "v.npy.part.jsonl").unlink()
    write_embeddings(tmp_path / "v.npy", fake, TEXTS, progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"]


def test_two_writers_of_one_file(tmp_path):
    out = tmp_path / "v.npy"
    def texts():
        yield from TEXTS
        with pytest.raises(ValueError, match="another process is writing it"):
            write_embeddings(out, fake, TEXTS, progress=False)
    write_embeddings(out, fake, texts(), progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"]


@pytest.mark.parametrize("name, limit", [("v.npy", 50_000), ("v.arrow", 50_000), ("v.arrow", 90_000), ("v.parquet", 50_000)])
def test_a_full_disk(tmp_path, cheap, name, limit):
    "The limit on file size stands for a full disk: rows before it are kept, and with more room the run goes on."
    child = """
        import resource, signal, sys
        from cheap import fake
        from contrastive_st.encoding import write_embeddings
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
        try: write_embeddings(sys.argv[1], fake, (f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500)), window=500, progress=False)
        except ValueError as error: print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(child), tmp_path / name, str(limit)], capture_output=True, text=True)
    rows = min(limit // 32 // 500 * 500, 2500)
    assert "the disk is full" in done.stdout and f"{rows:,} rows stay readable" in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / f"{name}.part", mmap_mode="r"), fake(TEXTS[:rows]))
    assert not (tmp_path / name).exists()
    write_embeddings(tmp_path / name, fake, TEXTS, resume=True, progress=False)
    assert written(tmp_path) == [name, name + ".json"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    write_embeddings(tmp_path / "v.npy", fake, TEXTS[:9], progress=False)
    with pytest.raises(ConnectionError):
        write_embeddings(tmp_path / "v.npy", fake, half_way(TEXTS, 1500, ConnectionError()), progress=False)
    assert len(np.load(tmp_path / "v.npy")) == 9
    write_embeddings(tmp_path / "v.npy", fake, TEXTS, resume=True, progress=False)
    assert len(np.load(tmp_path / "v.npy")) == 2500
