"""Encoding texts to a file: numbers, order, memory, resume, workers, and everything that fails."""

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
from conftest import make_backbone, make_tokenizer, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_st import atomic, encoding
from contrastive_st.encoding import open_embeddings, verify, write_embeddings
from contrastive_st.model import SentenceEncoder
from contrastive_st.precision import PRECISIONS, calibrate, dequantize, quantize
from contrastive_st.tokens import fix_surrogates

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500)]


CHEAP = """
"Encoders for worker processes: they import NumPy only, so that a process starts quickly."
import os
import numpy as np

FAKE

def dying(texts):
    if any("text 1700 " in t for t in texts): os._exit(7)
    return fake(texts)

def failing(texts):
    raise RuntimeError("no numbers today")
"""


def fake(texts):
    "A cheap encoder: every text has a vector of its own."
    return np.array(
        [[len(t), sum(map(ord, t[-9:])), sum(map(ord, t[:9])), 1, -1, 0, 2, 3] for t in texts],
        np.float32,
    )


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
    "What a reader sees: without hidden files, such as locks."
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def rows_so_far(out):
    "The rows that an unfinished run has written, each piece opened by itself."
    pieces = sorted(out.with_name(out.name + ".part").glob("rows-*.npy"))
    return np.concatenate([np.load(piece) for piece in pieces])


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
    if len(vectors):
        vectors[0], vectors[:, 1] = 0, 0.5  # a zero vector, and a dimension without a range
    ours, peers = quantize(vectors, precision), quantize_embeddings(vectors, precision)
    np.testing.assert_array_equal(ours, peers)
    assert ours.dtype == peers.dtype == PRECISIONS[precision]


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_quantize_with_ranges_gives_the_peers_numbers(precision):
    from sentence_transformers.util.quantization import quantize_embeddings

    rng = np.random.default_rng(1)
    sample = rng.standard_normal((300, 24)).astype(np.float32)
    vectors = 2 * rng.standard_normal((50, 24)).astype(np.float32)
    expected = quantize_embeddings(vectors, precision, calibration_embeddings=sample)
    # what lies outside is clipped
    np.testing.assert_array_equal(quantize(vectors, precision, calibrate(sample)), expected)
    np.testing.assert_array_equal(quantize(vectors[:1], precision, calibrate(sample)), expected[:1])
    np.testing.assert_array_equal(
        quantize(vectors, precision, calibrate(sample).tolist()), expected
    )


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 30), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(list(PRECISIONS))
)
def test_back_to_floats(n, width, seed, precision):
    "Integers come back within half a step, bits with their sign, floats as near as they can be."
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    back = dequantize(quantize(vectors, precision), precision, calibrate(vectors), width)
    assert back.shape == vectors.shape and back.dtype == np.float32
    if "binary" in precision:
        np.testing.assert_array_equal(back > 0, vectors > 0)
    else:
        step = np.ptp(calibrate(vectors), axis=0) / 255
        limit = (
            step * 0.502 + 1e-5
            if "int8" in precision
            else np.full(width, 4e-3 if precision == "float16" else 0)
        )
        assert (np.abs(back - vectors).max(axis=0) <= limit).all()


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda v: quantize(v, "int4"), "'int4' is not supported; use one of float32"),
        (lambda v: quantize(v.astype(np.int8), "int8"), "vectors are int8"),
        (lambda v: quantize(v * np.nan, "binary"), "NaN or inf"),
        (lambda v: quantize(v * 1e6, "float16"), "does not fit float16"),
        (lambda v: quantize(v[:1], "int8"), "at least 2 vectors"),
        (lambda v: quantize(v, "int8", np.zeros((2, 3))), r"pass \(2, 8\)"),
        (lambda v: quantize(v, "int8", np.stack([np.ones(8), np.zeros(8)])), "least values first"),
        (lambda v: dequantize(quantize(v, "int8"), "int8"), "needs the ranges"),
        (lambda v: calibrate(v[0]), "at least 2 vectors"),
        (
            lambda v: quantize(np.where(np.arange(5)[:, None] == 3, np.inf, v), "binary"),
            "vector 3 contains NaN or inf",
        ),
        (
            lambda v: calibrate(np.where(np.arange(5)[:, None] == 3, np.nan, v)),
            "vector 3 contains NaN or inf",
        ),
        (lambda v: dequantize(v, "binary"), "codes are float32, those of binary are int8"),
        (
            lambda v: dequantize(quantize(v, "uint8"), "int8", calibrate(v)),
            "codes are uint8, those of int8 are int8",
        ),
        (lambda v: dequantize(quantize(v, "int8"), "float32"), "codes are int8"),
        (
            lambda v: dequantize(quantize(v, "binary"), "binary", width=9),
            "1 bytes do not hold 9 dimensions",
        ),
    ],
)
def test_what_cannot_be_quantised(call, said):
    with pytest.raises(ValueError, match=said):
        call(np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32))


def test_a_dimension_that_never_varies_comes_back_as_it_was():
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    vectors[:, 2] = 0.25
    for precision in ("int8", "uint8"):
        codes = quantize(vectors, precision)
        assert (dequantize(codes, precision, calibrate(vectors))[:, 2] == 0.25).all()


def test_recall_on_real_questions(shared_data):
    "Cranfield: eight bits cost nothing, one bit a quarter of the neighbours without rescoring."
    from contrastive_st import data, search

    pretrained = SentenceEncoder.from_pretrained(
        "sentence-transformers/all-MiniLM-L6-v2", max_length=32
    )
    corpus, queries, qrels = data.read_retrieval(shared_data / "retrieval" / "cranfield")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that texts are cut
        documents, asked = (
            pretrained.encode(list(texts.values()), progress=False) for texts in (corpus, queries)
        )
    exact = search.semantic_search(asked, documents, 10)[1]

    def kept(found):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)])

    ranges = calibrate(documents)
    recall = {}
    for p in ("float16", "int8", "binary"):
        read = dequantize(quantize(documents, p, ranges), p, ranges)
        recall[p] = kept(search.semantic_search(asked, read, 10)[1])
    near = search.semantic_search(asked, dequantize(quantize(documents, "binary"), "binary"), 40)[1]
    again = [
        rows[np.argsort(-(documents[rows] @ q), kind="stable")[:10]] for q, rows in zip(asked, near)
    ]
    recall["binary, 40 scored again"] = kept(again)
    print({name: round(float(r), 3) for name, r in recall.items()})
    assert recall["float16"] > 0.99 and recall["int8"] > 0.95
    assert 0.5 < recall["binary"] < recall["binary, 40 scored again"] > 0.9


# ---- the file ----


@pytest.mark.parametrize("name", ["v.npy", "v.bin", "v", "v.arrow", "v.feather", "v.parquet"])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_every_format_and_precision(tmp_path, name, precision):
    card = write_embeddings(
        tmp_path / name,
        fake,
        iter(TEXTS),
        precision,
        calibrate(fake(TEXTS)),
        window=700,
        progress=False,
    )
    expected = quantize(fake(TEXTS), precision, calibrate(fake(TEXTS)))
    if name in ("v.arrow", "v.feather"):
        table = pa.ipc.open_file(pa.memory_map(str(tmp_path / name))).read_all()
    elif name == "v.parquet":
        table = pq.read_table(tmp_path / name)
    if "." in name and name.rpartition(".")[2] in ("arrow", "feather", "parquet"):
        assert table.column_names == ["row", "vector"]
        assert table["row"].to_pylist() == list(range(2500))
        vectors = table["vector"].combine_chunks()
        found = vectors.flatten().to_numpy().reshape(len(vectors), -1)
        assert pa.types.is_fixed_size_list(table["vector"].type)
    else:
        found = np.load(tmp_path / name, mmap_mode="r")
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and written(tmp_path) == [name, name + ".json"]
    assert (card["rows"], card["width"], card["precision"]) == (2500, 8, precision)
    assert card == json.loads((tmp_path / (name + ".json")).read_text())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 100),
)
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
    write_embeddings(
        tmp_path / "v.npy",
        lambda texts: (spread.append(max(map(len, texts)) - min(map(len, texts))), fake(texts))[1],
        TEXTS,
        window=1000,
        progress=False,
    )
    assert np.mean(spread) < 0.2 * (max(map(len, TEXTS)) - min(map(len, TEXTS)))


def test_a_window_ends_when_it_holds_enough_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 1000)
    calls = []
    texts = ["a" * 5000, "b", "c" * 600, "d" * 600, "e"]
    write_embeddings(
        tmp_path / "v.npy",
        lambda texts: (calls.append(sorted(map(len, texts))), fake(texts))[1],
        texts,
        progress=False,
    )
    assert calls == [[5000], [1, 600, 600], [1]]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), fake(texts))


def test_the_same_as_encode(tmp_path, tiny):
    texts = [t[:40] for t in TEXTS[:90]] + ["", "dog", "dog"]
    for encoder in (tiny, tiny.encode, partial(tiny.encode, progress=False)):
        write_embeddings(tmp_path / "v.npy", encoder, texts, window=40, progress=False)
        np.testing.assert_allclose(
            np.load(tmp_path / "v.npy"), tiny.encode(texts, progress=False), atol=1e-6
        )
    card = write_embeddings(
        tmp_path / "v.npy", tiny, texts, progress=False, truncate_dim=8, prompt="query: "
    )
    assert np.load(tmp_path / "v.npy").shape == (93, 8)
    assert card["options"] == {"truncate_dim": 8, "prompt": "query: "}
    np.testing.assert_allclose(
        np.load(tmp_path / "v.npy"),
        tiny.encode(texts, progress=False, truncate_dim=8, prompt="query: "),
        atol=1e-6,
    )


def test_ranges_come_from_the_first_window_or_the_caller(tmp_path):
    card = write_embeddings(tmp_path / "v.npy", fake, TEXTS, "int8", window=500, progress=False)
    np.testing.assert_array_equal(card["ranges"], calibrate(fake(TEXTS[:500])))
    np.testing.assert_array_equal(
        np.load(tmp_path / "v.npy"), quantize(fake(TEXTS), "int8", calibrate(fake(TEXTS[:500])))
    )
    with pytest.warns(UserWarning, match="ranges of uint8 come from 20 texts only"):
        write_embeddings(tmp_path / "v.npy", fake, TEXTS[:20], "uint8", progress=False)
    assert (
        write_embeddings(tmp_path / "v.npy", fake, TEXTS, "binary", progress=False)["ranges"]
        is None
    )


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
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(child), tmp_path / name],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 16, f"{done.stdout} MiB"


# ---- resume ----


def test_an_iterator_that_raises_loses_nothing(tmp_path):
    "All texts before the error are written; the finished file is that of a run without one."
    out, error = tmp_path / "v.npy", ConnectionError("the server went away")
    with pytest.raises(ConnectionError) as caught:
        write_embeddings(out, fake, half_way(TEXTS, 1700, error), window=500, progress=False)
    assert caught.value is error and "1,700 rows" in error.__notes__[0]
    assert "resume" in error.__notes__[0]
    np.testing.assert_array_equal(rows_so_far(out), fake(TEXTS[:1700]))
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


KILLED = """
    import os, sys
    from pathlib import Path
    from cheap import fake
    from contrastive_st.encoding import write_embeddings

    os.fsync = lambda handle: None  # not what is looked at here
    texts = [f"text {i} " + "ab" * (i % 23) for i in range(300)]

    def write(path, texts, end_before=0, **options):
        "In a process that ends before its n-th call which changes a name."
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        calls = 0
        def counted(call):
            def counts(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == end_before: os._exit(9)
                return call(*args, **kwargs)
            return counts
        for name in ("replace", "unlink", "mkdir", "rename", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try: write_embeddings(path, fake, texts, window=160, progress=False, **options)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    folder, name = Path(sys.argv[1]), sys.argv[2]
    (folder / "clean").mkdir()
    assert write(folder / "clean" / name, texts) == 0
    for n in range(1, 100):
        path = folder / str(n) / name
        path.parent.mkdir()
        assert write(path, texts[:7]) == 0  # an older file
        if write(path, texts, n) == 0: break
        begun = (path.parent / f"{name}.part" / "state.json").exists()
        print(n, begun, path.exists(), (path.parent / f"{name}.json").exists())
        if path.exists() and path.with_name(f"{name}.json").exists():
            from contrastive_st.encoding import verify
            verify(path)  # a file never stands beside the card of another
        finished = path.exists() and path.read_bytes() == (folder / "clean" / name).read_bytes()
        assert write(path, texts, resume=begun or finished) == 0
        left = sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock"))
        assert left == sorted([name, f"{name}.json"]), left
        for file in left:
            assert (path.parent / file).read_bytes() == (folder / "clean" / file).read_bytes()
"""


def test_killed_at_every_step(tmp_path, cheap):
    "A run that ends before any rename or deletion is completed by the same command with resume."
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, "v.npy"],
        capture_output=True,
        text=True,
    )
    steps = done.stdout.splitlines()
    assert done.returncode == 0 and len(steps) > 15, done.stdout + done.stderr
    expected = {"False True True", "True True True", "True True False"}
    assert {line.split(" ", 1)[1] for line in steps} >= expected


def test_killed_for_good(tmp_path, cheap):
    "SIGKILL in the middle; the resumed file is the uninterrupted one, byte for byte."
    child = """
        import sys, time, cheap
        from contrastive_st.encoding import write_embeddings
        def fake(texts):
            time.sleep(0.02)
            return cheap.fake(texts)
        texts = (f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500))
        write_embeddings(sys.argv[1], fake, texts, window=100, resume=True, progress=False)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(child), tmp_path / "v.npy"]
    process, part = subprocess.Popen(arguments), tmp_path / "v.npy.part"
    while process.poll() is None and len(list(part.glob("rows-*.npy"))) < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was too quick to be killed"
    rows = len(rows_so_far(tmp_path / "v.npy"))
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
    # without resume the old file is replaced
    write_embeddings(out, spy(called), TEXTS[:3], progress=False)
    assert sum(called) == 3 and len(np.load(out)) == 3


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, said",
    [
        (
            dict(texts=TEXTS[:700] + ["another"] + TEXTS[701:]),
            "other texts .its .* rows are not those",
        ),
        (dict(texts=[TEXTS[0] + TEXTS[1][:1], TEXTS[1][1:], *TEXTS[2:]]), "other texts"),
        (dict(texts=TEXTS[:900]), "other texts"),
        (dict(precision="float16"), "precision"),
        (dict(encoder=len), "another encoder .* .function"),
        (dict(normalize=True), "options"),
        (dict(precision="int8", ranges=np.array([[0] * 8, [1] * 8])), "precision"),
    ],
)
def test_resume_with_something_else_is_refused(tmp_path, finished, change, said):
    out = tmp_path / "v.npy"
    if finished:
        write_embeddings(out, fake, TEXTS, window=500, progress=False)
    else:
        with pytest.raises(ConnectionError):
            write_embeddings(
                out, fake, half_way(TEXTS, 1500, ConnectionError()), window=500, progress=False
            )
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=said):
        write_embeddings(
            out, **{"encoder": fake, "texts": TEXTS, "resume": True, "progress": False} | change
        )
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_more_texts_than_a_finished_file_has(tmp_path):
    write_embeddings(tmp_path / "v.npy", fake, TEXTS[:900], progress=False)
    with pytest.raises(ValueError, match="first 900 of these texts only"):
        write_embeddings(tmp_path / "v.npy", fake, TEXTS, resume=True, progress=False)


def test_what_is_there_is_not_lost_without_resume(tmp_path):
    out = tmp_path / "v.npy"
    with pytest.raises(ConnectionError):
        write_embeddings(out, fake, half_way(TEXTS, 1500, ConnectionError()), progress=False)
    with pytest.raises(
        ValueError, match="1,500 rows of a run that stopped; go on with resume, or delete it"
    ):
        write_embeddings(out, fake, TEXTS, progress=False)


def test_an_encoder_is_known_by_its_weights_settings_and_tokenizer(tmp_path, tiny, model_folder):
    import torch

    known = encoding.fingerprint(tiny)
    # leaves truncation and padding of the tokenizer as they were, or not: no matter
    tiny.encode(["a dog"], progress=False)
    assert (
        encoding.fingerprint(tiny)
        == encoding.fingerprint(partial(tiny.encode, batch_size=3))
        == known
    )
    assert (
        encoding.fingerprint(partial(tiny.encode, truncate_dim=3))["arguments"]
        != known["arguments"]
    )
    assert (
        encoding.fingerprint(fake)["function"]
        == encoding.fingerprint(partial(fake))["function"]
        == "fake"
    )
    loaded = SentenceEncoder.from_pretrained(model_folder)
    assert encoding.fingerprint(loaded)["weights"] == known["weights"]
    loaded.max_length = 32
    assert encoding.fingerprint(loaded)["settings"] != known["settings"]
    loaded.tokenizer.add_tokens(["dogs"])
    assert encoding.fingerprint(loaded)["tokenizer"] != known["tokenizer"]
    with torch.no_grad():
        next(tiny.parameters()).view(-1)[5] += 1e-6
    assert encoding.fingerprint(tiny)["weights"] != known["weights"]


def test_resume_with_a_smaller_batch_size(tmp_path, tiny):
    "Memory was short: the batch size may change, for it changes no vector."
    out = tmp_path / "v.npy"
    with pytest.raises(ConnectionError):
        write_embeddings(
            out,
            tiny,
            half_way(TEXTS, 60, ConnectionError()),
            window=30,
            progress=False,
            batch_size=32,
        )
    begun = rows_so_far(out)
    write_embeddings(out, tiny, TEXTS[:90], window=30, resume=True, progress=False, batch_size=4)
    np.testing.assert_array_equal(np.load(out)[:60], begun)
    np.testing.assert_allclose(np.load(out), tiny.encode(TEXTS[:90], progress=False), atol=1e-6)


# ---- several processes ----


def test_workers_give_the_same_file(tmp_path, model_folder):
    texts = TEXTS[:1300] + ["\ud800", ""]
    for workers in (1, 2):
        with pytest.warns(UserWarning, match="1 texts hold surrogates, text 1,300 first"):
            write_embeddings(
                tmp_path / f"{workers}.npy",
                str(model_folder),
                iter(texts),
                window=600,
                workers=workers,
                progress=False,
            )
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))


def test_a_worker_that_dies(tmp_path, cheap):
    "One sentence, soon, and the windows before it are kept; another encoder of that name goes on."
    start, out = time.time(), tmp_path / "v.npy"
    with pytest.raises(ValueError, match="a worker process died.*resume"):
        write_embeddings(out, cheap.dying, TEXTS, window=512, workers=2, progress=False)
    assert time.time() - start < 60
    kept = rows_so_far(out)
    assert 0 < len(kept) <= 1536 and len(kept) % 512 == 0
    np.testing.assert_array_equal(kept, fake(TEXTS[: len(kept)]))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_encoder_that_raises(tmp_path, cheap, workers):
    with pytest.raises(RuntimeError, match="no numbers today"):
        write_embeddings(tmp_path / "v.npy", cheap.failing, TEXTS, workers=workers, progress=False)
    assert written(tmp_path) == []


def test_workers_keep_what_came_before_an_iterator_raised(tmp_path, cheap):
    with pytest.raises(ConnectionError):
        write_embeddings(
            tmp_path / "v.npy",
            cheap.fake,
            half_way(TEXTS, 1300, ConnectionError()),
            window=600,
            workers=2,
            progress=False,
        )
    np.testing.assert_array_equal(rows_so_far(tmp_path / "v.npy"), fake(TEXTS[:1300]))


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
        if __name__ == "__main__":
            write_embeddings(sys.argv[1], fake, texts(), workers=2, window=500, progress=False)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(child))
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "v.npy"], stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(alive, workers))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "encoder, said",
    [
        (lambda texts: fake(texts), "cannot go to worker processes"),
        ("tiny", "save_pretrained"),
        ("tiny.encode", "save_pretrained"),
        ("partial", "save_pretrained"),
    ],
)
def test_encoders_that_cannot_be_sent(tmp_path, tiny, encoder, said):
    if encoder == "partial":
        encoder = partial(tiny.encode, batch_size=4)
    elif isinstance(encoder, str):
        encoder = {"tiny": tiny, "tiny.encode": tiny.encode}.get(encoder, encoder)
    with pytest.raises(ValueError, match=said):
        write_embeddings(tmp_path / "v.npy", encoder, TEXTS, workers=2, progress=False)


# ---- bad texts ----

STRANGE = [
    *("", " ", "\0", "a\0b", "\u2028", "\ufeff", "\U0001f600", "\ud83d\ude00"),
    *("e\u0301" * 50, "dog " * 5000, "\U0010ffff", "\ud800", "a \udfff b"),
]


def test_strange_texts(tmp_path, tiny):
    with pytest.warns(UserWarning) as said:
        write_embeddings(tmp_path / "v.npy", tiny, STRANGE, progress=False)
    assert any(
        "3 texts hold surrogates, text 7 first; pairs were joined, lone ones replaced by U+FFFD"
        in str(w.message)
        for w in said
    )
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
    mended = fix_surrogates(any_text)
    mended.encode()
    assert fix_surrogates(good) == good and fix_surrogates(mended) == mended
    assert (
        fix_surrogates(good + "\ud800") == good + "\ufffd"
        and fix_surrogates("\udc00" + good) == "\ufffd" + good
    )


@pytest.mark.parametrize("bad", [None, 5, b"dog", float("nan"), ["dog"]])
def test_a_text_that_is_no_string_is_named_by_its_number(tmp_path, bad):
    with pytest.raises(
        ValueError, match=f"text 1,?200 is of type {type(bad).__name__}, not a string"
    ) as caught:
        write_embeddings(
            tmp_path / "v.npy",
            fake,
            TEXTS[:1200] + [bad] + TEXTS[1200:],
            window=500,
            progress=False,
        )
    assert "1,200 rows" in caught.value.__notes__[0]
    assert len(rows_so_far(tmp_path / "v.npy")) == 1200
    write_embeddings(tmp_path / "v.npy", fake, TEXTS, window=500, resume=True, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), fake(TEXTS))


def test_warnings_of_many_batches_are_told_once(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 10)
    with pytest.warns(UserWarning) as said:
        write_embeddings(tmp_path / "v.npy", tiny, ["dog " * 100] * 45, progress=False)
    assert [str(w.message) for w in said] == [
        "5 batches of 10 gave a warning, the first: 10 of 10 texts were longer than max_length = 64"
        " tokens and were cut; the backbone takes up to 64"
    ]


# ---- what the caller or the disk gets wrong ----


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(texts="a dog"), "texts is of type str; pass a list"),
        (dict(texts=5), "texts is of type int"),
        (dict(texts=[]), "no texts to encode"),
        (dict(precision="int4"), "'int4' is not supported; use one of"),
        (dict(window=0), "window=0"),
        (dict(workers=0), "workers=0"),
        (
            dict(encoder=lambda texts: np.ones((2, 3), np.float32)),
            r"gave \(2, 3\) float32 for 5 texts",
        ),
        (dict(encoder=lambda texts: np.ones((len(texts), 3), int)), "vector of floats"),
        (
            dict(encoder=lambda texts: np.full((len(texts), 3), np.nan, np.float32)),
            "text 0: its vector holds NaN",
        ),
        (dict(encoder="no/such/model"), "no/such/model"),
        (dict(precision="int8", texts=["a"]), "at least 2 vectors"),
        (dict(path="absent/v.npy"), "there is no folder"),
        (dict(path="."), "is a folder"),
    ],
)
def test_arguments_that_are_not_right(tmp_path, change, said):
    arguments = {"path": "v.npy", "encoder": fake, "texts": TEXTS[:5], "progress": False} | change
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_embeddings(tmp_path / arguments.pop("path"), **arguments)
    assert written(tmp_path) == []


def test_an_encoder_of_changing_width(tmp_path):
    with pytest.raises(ValueError, match="vectors of 4 dimensions, .* holds 8"):
        write_embeddings(
            tmp_path / "v.npy",
            lambda texts: fake(texts)[:, : 8 if TEXTS[0] in texts else 4],
            TEXTS,
            window=500,
            progress=False,
        )
    assert rows_so_far(tmp_path / "v.npy").shape == (500, 8)


def begin(out, texts=1500, window=500):
    "Leave an unfinished run."
    with pytest.raises(ConnectionError):
        write_embeddings(
            out, fake, half_way(TEXTS, texts, ConnectionError()), window=window, progress=False
        )
    return out.with_name(out.name + ".part")


def flip(path, place=-1):
    "Change one bit of a file."
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda part: (part / "state.json").write_bytes(b"\0" * 100), "state.json: cannot be read"),
        (
            lambda part: (part / "state.json").write_text("[" * 100_000),
            "state.json: cannot be read",
        ),
        (lambda part: (part / "state.json").write_text("[1]"), "holds a JSON list"),
        (lambda part: (part / "state.json").write_text("{}"), "is not that of this version"),
        (lambda part: (part / "rows-000001.npy").unlink(), "rows-000001.npy"),
        (
            lambda part: os.truncate(part / "rows-000001.npy", 300),
            "rows-000001.npy: is not as it was written",
        ),
        (lambda part: flip(part / "rows-000001.npy"), "rows-000001.npy: is not as it was written"),
    ],
)
def test_a_damaged_part(tmp_path, damage, said):
    "It is refused by name, with and without resume; rows of hours are not thrown away unasked."
    out = tmp_path / "v.npy"
    part = begin(out)
    damage(part)
    there = sorted(p.name for p in part.iterdir())
    for resume in (True,) if "flip" in damage.__code__.co_names else (True, False):
        with pytest.raises(ValueError, match=said) as caught:
            write_embeddings(out, fake, TEXTS, resume=resume, progress=False)
        assert "delete" in str(caught.value) and len(str(caught.value)) < 400
    assert set(there) <= {p.name for p in part.iterdir()} and not out.exists()
    atomic.remove(part)
    write_embeddings(out, fake, TEXTS, progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"]


def test_what_an_older_version_left(tmp_path):
    "Its rows in one file are refused in a sentence; its journal without rows is useless and goes."
    out, part, journal = tmp_path / "v.npy", tmp_path / "v.npy.part", tmp_path / "v.npy.part.jsonl"
    np.save(part.open("wb"), fake(TEXTS[:500]))
    journal.write_text("{}")
    for resume in (True, False):
        with pytest.raises(ValueError, match="v.npy.part: rows of an older version.* delete"):
            write_embeddings(out, fake, TEXTS, resume=resume, progress=False)
    assert part.is_file() and journal.is_file()
    part.unlink()
    write_embeddings(out, fake, TEXTS, resume=True, progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"]
    card = json.loads((tmp_path / "v.npy.json").read_text())
    (tmp_path / "v.npy.json").write_text(
        json.dumps({k: v for k, v in card.items() if k not in ("bytes", "xxh3")})
    )
    assert (
        write_embeddings(out, spy(called := []), TEXTS, resume=True, progress=False)["rows"] == 2500
    )
    assert called == []
    with pytest.raises(ValueError, match="an older version wrote it, without a digest"):
        verify(out)


def test_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "v.npy.part").mkdir()
    (tmp_path / "v.npy.part" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="'diary.txt', which is not ours"):
        write_embeddings(tmp_path / "v.npy", fake, TEXTS, progress=False)
    assert (tmp_path / "v.npy.part" / "diary.txt").exists()


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("moment", ["loading", "encoding"])
def test_killed_before_the_first_window(tmp_path, older, moment):
    "With or without an older file of other texts there, the same command with resume works."
    out = tmp_path / "v.npy"
    if older:
        write_embeddings(out, fake, TEXTS[:9], progress=False)
    child = """
        import os, signal, sys
        import contrastive_st.encoding as encoding
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "loading": encoding.load_encoder = die
        encoding.write_embeddings(sys.argv[1], die, ["a text"], progress=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(child), out, moment],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL and out.exists() == older
    write_embeddings(out, fake, TEXTS, resume=True, progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"] and verify(out)["rows"] == 2500


@pytest.mark.parametrize("name", ["v.npy", "v.arrow", "v.parquet"])
def test_a_file_knows_its_digest(tmp_path, name):
    "Every flipped bit and wrong length is found, and resume does not call such a file finished."
    out = tmp_path / name
    card = write_embeddings(out, fake, TEXTS, "int8", window=600, progress=False)
    assert (
        verify(out)
        == verify(str(out))
        == card
        == json.loads((tmp_path / f"{name}.json").read_text())
    )
    assert card["bytes"] == out.stat().st_size and card["xxh3"] == atomic.digest_file(out)
    np.testing.assert_array_equal(
        open_embeddings(out), quantize(fake(TEXTS), "int8", card["ranges"])
    )
    whole = out.read_bytes()
    for place in (0, 130, len(whole) // 2, len(whole) - 1):
        flip(out, place)
        with pytest.raises(atomic.Damaged, match=f"{name}: xxh3 is .* not as it was written"):
            verify(out)
        verify(out, full=False)
        with pytest.raises(ValueError, match="not as it was written"):
            write_embeddings(out, fake, TEXTS, "int8", resume=True, progress=False)
        flip(out, place)
    for other in (whole[:-1], whole + b"\0"):
        out.write_bytes(other)
        with pytest.raises(atomic.Damaged, match=f"{name}: bytes is"):
            open_embeddings(out)


@pytest.mark.parametrize(
    "card, said",
    [
        (None, "v.npy.json"),
        ("", "v.npy.json: cannot be read"),
        ("[1]", "holds a JSON list"),
        ("{}", "is no card"),
        ("[" * 10**5, "cannot be read"),
    ],
)
def test_a_card_that_is_none(tmp_path, card, said):
    out = tmp_path / "v.npy"
    write_embeddings(out, fake, TEXTS, progress=False)
    (
        (tmp_path / "v.npy.json").unlink()
        if card is None
        else (tmp_path / "v.npy.json").write_text(card)
    )
    for call in (verify, open_embeddings):
        with pytest.raises(ValueError, match=said) as caught:
            call(out)
        assert len(str(caught.value)) < 400
    if card is not None:
        with pytest.raises(ValueError, match=said):
            write_embeddings(out, fake, TEXTS, resume=True, progress=False)


def test_an_arrow_file_does_not_depend_on_where_windows_ended(tmp_path):
    for window in (33, 700, 9000):
        write_embeddings(tmp_path / f"{window}.arrow", fake, TEXTS, window=window, progress=False)
    assert (
        (tmp_path / "33.arrow").read_bytes()
        == (tmp_path / "700.arrow").read_bytes()
        == (tmp_path / "9000.arrow").read_bytes()
    )


def test_two_writers_of_one_file(tmp_path):
    out = tmp_path / "v.npy"

    def texts():
        yield from TEXTS
        with pytest.raises(ValueError, match="process .* is writing it"):
            write_embeddings(out, fake, TEXTS, progress=False)

    write_embeddings(out, fake, texts(), progress=False)
    assert written(tmp_path) == ["v.npy", "v.npy.json"]


@pytest.mark.parametrize(
    "name, limit",
    [
        ("v.npy", 10_000),
        ("v.npy", 50_000),
        ("v.arrow", 50_000),
        ("v.arrow", 90_000),
        ("v.parquet", 20_000),
    ],
)
def test_a_full_disk(tmp_path, cheap, name, limit):
    "A limit on file size acts as a full disk: rows before it stay, and with room the run goes on."
    child = """
        import resource, signal, sys
        from cheap import fake
        from contrastive_st.encoding import write_embeddings
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
        texts = (f"text {i} " + "ab" * (i * 7 % 23) for i in range(2500))
        try: write_embeddings(sys.argv[1], fake, texts, window=500, progress=False)
        except ValueError as error: print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(child), tmp_path / name, str(limit)],
        capture_output=True,
        text=True,
    )
    assert (
        "the disk is full" in done.stdout
        and "run again" in done.stdout
        and done.stdout.count("\n") == 1
    ), done.stdout + done.stderr
    rows = 0 if limit < 16_000 else 2500  # a window has 16,000 bytes; the whole file does not fit
    assert (
        len(rows_so_far(tmp_path / name)) if rows else (tmp_path / f"{name}.part").exists()
    ) == rows
    assert not (tmp_path / name).exists()
    write_embeddings(tmp_path / name, fake, TEXTS, resume=True, progress=False)
    assert written(tmp_path) == [name, name + ".json"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    write_embeddings(tmp_path / "v.npy", fake, TEXTS[:9], progress=False)
    with pytest.raises(ConnectionError):
        write_embeddings(
            tmp_path / "v.npy", fake, half_way(TEXTS, 1500, ConnectionError()), progress=False
        )
    assert len(np.load(tmp_path / "v.npy")) == 9
    write_embeddings(tmp_path / "v.npy", fake, TEXTS, resume=True, progress=False)
    assert len(np.load(tmp_path / "v.npy")) == 2500


# ---- ids and texts of a file ----


@pytest.mark.parametrize("name", ["e.arrow", "e.parquet"])
def test_ids_are_a_column(tmp_path, name):
    texts = [f"text {n}" for n in range(20)]
    ids = (f"d{n}" for n in range(20))
    card = write_embeddings(tmp_path / name, fake, texts, window=7, ids=ids, progress=False)
    if name.endswith("parquet"):
        table = pq.read_table(tmp_path / name)
    else:
        table = pa.ipc.open_file(tmp_path / name).read_all()
    assert table.column_names == ["row", "id", "vector"] and card["ids"]
    assert table["id"].to_pylist() == [f"d{n}" for n in range(20)]
    assert (open_embeddings(tmp_path / name) == fake(texts)).all()


def test_ids_that_do_not_fit(tmp_path):
    texts, arrow = ["a", "b"], tmp_path / "e.arrow"
    refuses(
        lambda: write_embeddings(tmp_path / "e.npy", fake, texts, ids=["x", "y"]), "e.npy", "ids"
    )
    refuses(lambda: write_embeddings(arrow, fake, texts, ids="xy"), "list of strings")
    for ids in (["x"], ["x", "y", "z"]):
        refuses(
            lambda: write_embeddings(arrow, fake, texts, ids=ids, resume=True), "ids than texts"
        )
    write_embeddings(arrow, fake, texts, resume=True, progress=False)  # what was encoded waits
    refuses(
        lambda: write_embeddings(arrow, fake, texts, ids=["x", "y"], resume=True), "without ids"
    )


def test_texts_of_a_file_are_known_again(tmp_path):
    path, texts = tmp_path / "e.npy", [f"text {n}" for n in range(20)]
    write_embeddings(path, fake, texts, window=7, progress=False)
    assert list(encoding.same_texts(path, iter(texts))) == texts
    for others in (texts[:-1], [*texts, "more"], texts[::-1], []):
        refuses(lambda: list(encoding.same_texts(path, others)), "e.npy", "other texts")


def test_parts_that_were_cut_by_other_windows_are_refused(tmp_path):
    "They would meet in the middle of others' texts: one is missing, and all behind it are moved."
    texts, path = [f"text {n}" for n in range(10)], tmp_path / "v.npy"

    def embed(batch):
        return np.array([[int(text.split()[1]), 1] for text in batch], np.float32)

    def part(share, window):
        options = {"part": share, "window": window, "progress": False}
        return write_embeddings(path, embed, texts, **options)

    part("1/2", 2)
    part("2/2", 5)
    words = "00002-of-00002", "meet at text 5", "end at 4", "with the same window"
    refuses(lambda: part(None, 5), *words)
    (tmp_path / "v.npy.parts" / "00002-of-00002.npy").unlink()
    part("2/2", 2)
    part(None, 2)
    np.testing.assert_array_equal(np.asarray(open_embeddings(path))[:, 0], range(10))
