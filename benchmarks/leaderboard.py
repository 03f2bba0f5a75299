"""The leaderboard: three tasks that anyone can run on a laptop, and one line for each who tried.

python benchmarks/leaderboard.py harbour   # some minutes: train on the quickstart corpus
python benchmarks/leaderboard.py stsb      # some minutes: train on NLI, score on STS-B
python benchmarks/leaderboard.py encode    # a minute: embed 10,000 short texts

Without options it runs our own entry. To run yours, give the command that does the work and a name:

python benchmarks/leaderboard.py harbour --name "batches of 128" --command \\
    "contrastive-st train quickstart --out {out} --set data.batch_size=128"

In a command, {out} stands for an empty folder, {data} for the folder of the real files and {texts}
for the file of texts. The entry goes into results/leaderboard.json, and the tables of
LEADERBOARD.md are written anew. LEADERBOARD.md says the rules.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from measure import HERE, real_data, record, rounded, write_between

from contrastive_st.data import quickstart_folder, read_retrieval, read_sts
from contrastive_st.evaluation import evaluate_retrieval, evaluate_sts
from contrastive_st.model import SentenceEncoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS, COSINE = 10_000, 0.999  # texts to embed, and the least cosine with the reference
PAGE, RECORD = HERE / "LEADERBOARD.md", HERE / "results" / "leaderboard.json"


# ---- scores: what a command left in its folder -> a number


def harbour_score(out: Path, texts: Path) -> float:
    "Return nDCG@10 x 100 of the trained model on the test questions of the quickstart corpus."
    encode = partial(SentenceEncoder.from_pretrained(out / "model").encode, progress=False)
    found = evaluate_retrieval(encode, *read_retrieval(quickstart_folder() / "retrieval"))
    return 100 * found["ndcg@10"]


def stsb_score(out: Path, texts: Path) -> float:
    "Return Spearman's correlation x 100 of the trained model on the test part of STS-B."
    encode = partial(SentenceEncoder.from_pretrained(out / "model").encode, progress=False)
    rows = read_sts(real_data() / "stsb" / "test.tsv")
    return 100 * evaluate_sts(encode, rows, resamples=0)["spearman"]


def encode_score(out: Path, texts: Path) -> float:
    "Return the least cosine of vectors.npy with the vectors in float32; refuse one below 0.999."
    vectors = np.load(out / "vectors.npy").astype(np.float32)  # (N, D)
    sample = np.linspace(0, TEXTS - 1, 500).astype(int)
    lines = texts.read_text(encoding="utf-8").split("\n")
    encoder = SentenceEncoder.from_pretrained(MINILM)
    reference = encoder.encode([lines[n] for n in sample], progress=False)  # (500, D)
    if vectors.shape != (TEXTS, reference.shape[1]):
        raise ValueError(
            f"vectors.npy has the shape {vectors.shape}, not {(TEXTS, reference.shape[1])}:"
            " embed each text once, in the order of the file"
        )
    unit = vectors[sample] / np.linalg.norm(vectors[sample], axis=1, keepdims=True)
    least = float((unit * reference).sum(1).min())
    if not least >= COSINE:
        raise ValueError(
            f"a vector has a cosine of {least:.4f} with its reference, and {COSINE} is the least"
            " that counts as the same model"
        )
    return least


class Task(NamedTuple):
    "A task of the leaderboard: our command, how its result is scored, and how it is written."

    command: str
    score: Callable[[Path, Path], float]
    column: str  # heading of the score
    form: str  # of the score
    needs_data: bool


OURS_STSB = (
    "contrastive-st train recipes/nli.toml --data {data} --out {out} --no-progress"
    " --set model.layers=4 --set model.width=256 --set data.batch_size=128 --set train.steps=212"
    " --set train.warmup=21 --set train.lr=5e-4 --set train.eval_every=0 --set 'train.metric=\"\"'"
)
TASKS = {
    "harbour": Task(
        "contrastive-st train quickstart --out {out} --no-progress",
        harbour_score,
        "nDCG@10 x 100",
        "{:.1f}",
        False,
    ),
    "stsb": Task(OURS_STSB, stsb_score, "Spearman x 100", "{:.2f}", True),
    "encode": Task(
        f"contrastive-st encode {MINILM} {{texts}} --out {{out}}/vectors.npy --bf16",
        encode_score,
        "least cosine",
        "{:.4f}",
        True,
    ),
}


# ---- an entry


def write_short_texts(path: Path) -> None:
    "Write ten thousand different sentences of the NLI pairs, one a line."
    import gzip

    source = real_data() / "train" / "AllNLI_devtest_triplets.jsonl.gz"
    found: dict[str, None] = {}
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            found.update(dict.fromkeys(" ".join(text.split()) for text in json.loads(line)))
            if len(found) >= TEXTS:
                break
    path.write_text("".join(f"{text}\n" for text in list(found)[:TEXTS]), encoding="utf-8")


def yardstick() -> float:
    "Return GFLOP/s of float32 products of 1,024 x 1,024 on one thread: how fast this machine is."
    torch.set_num_threads(1)
    a, seconds = torch.rand(1024, 1024), []
    for _ in range(20):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    return 2 * 1024**3 / sorted(seconds)[10] / 1e9


def run_command(command: str) -> dict[str, float]:
    "Run a command to its end: CPU seconds of all its processes and threads, and seconds of wall."
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        shlex.split(command), check=True, cwd=HERE.parent, env=os.environ | {"PATH": bin_first}
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - start}


def measure_entry(name: str, task: Task, command: str, who: str) -> dict:
    "Run a command in a fresh folder, score what it left, and say where and when."
    with tempfile.TemporaryDirectory() as work:
        out, texts = Path(work) / "out", Path(work) / "texts.txt"
        if name == "encode":
            out.mkdir()
            write_short_texts(texts)
        cost = run_command(command.format(out=out, data=real_data(), texts=texts))
        score = task.score(out, texts)
    entry = {"task": name, "name": who, "score": score, **cost, "runs": command}
    return entry | {"gflops": yardstick()} | record("torch", "transformers")


# ---- the page


def task_table(name: str, entries: list[dict]) -> str:
    "Return the Markdown table of one task, the least processor time first."
    task = TASKS[name]
    lines = [
        f"| entry | {task.column} | CPU s | wall s | machine | date | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in sorted((e for e in entries if e["task"] == name), key=lambda e: e["cpu"]):
        machine = f"{entry['hardware']}, {entry['cores']} cores, {entry['gflops']:.0f} GFLOP/s"
        score, seconds = (
            task.form.format(entry["score"]),
            f"{entry['cpu']:.0f} | {entry['wall']:.0f}",
        )
        lines.append(
            f"| {entry['name']} | {score} | {seconds} | {machine} | {entry['date']} |"
            f" `{entry['runs']}` |"
        )
    return "\n".join(lines)


def write_page(page: Path, entries: list[dict]) -> None:
    "Put the tables into their places."
    for name in TASKS:
        write_between(page, f"<!-- {name} -->", task_table(name, entries), f"<!-- end {name} -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--name", default="contrastive_st", help="how the entry is called")
    parser.add_argument("--command", help="what does the work; without it: our own entry")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
    settings = parser.parse_args()
    task = TASKS[settings.task]
    if task.needs_data and not (real_data() / "train").is_dir():
        sys.exit(f"this task needs the files of {real_data()}; docs/data.md says what they are")
    command = settings.command or task.command
    entry = rounded(measure_entry(settings.task, task, command, settings.name))
    print(json.dumps(entry, indent=1))
    if not settings.dry_run:
        entries = json.loads(RECORD.read_text()) if RECORD.exists() else []
        same = (entry["task"], entry["name"], entry["hardware"])
        entries = [e for e in entries if (e["task"], e["name"], e["hardware"]) != same]
        RECORD.write_text(json.dumps([*entries, entry], indent=1) + "\n")
        write_page(PAGE, [*entries, entry])


if __name__ == "__main__":
    main()
