"""Other families than BERT: ours packed and sentence-transformers padded, in bfloat16.

    python benchmarks/families.py            # a quarter of an hour
    python benchmarks/families.py --quick    # fewer rounds, three minutes; writes no file
    python benchmarks/families.py --table    # writes the table of docs/families.md anew, a second

Every model has 6 layers, is 384 wide and has random weights, which cost as much as trained ones.
Both sides compute in bfloat16, in turns, on one thread; the ratio is the median over the rounds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from measure import HERE, record, save, write_between
from speed import MODEL, Case, Sides, blocks_of, data_folder, job_of, over, prepare, take_turns
from transformers import (
    AutoTokenizer,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
)

from contrastive_st.model import SentenceEncoder

WAYS = ("ours bf16", "peer bf16")
CASES = {
    "train_64": Case("train", "short", 64, WAYS, 5),
    "encode_short": Case("encode", "short", 300, WAYS, 5),
    "encode_passages": Case("encode", "passages", 60, WAYS, 5),
}
SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
}
FAMILIES = {
    "MPNet": (MPNetConfig, MPNetModel, {}),
    "ModernBERT": (ModernBertConfig, ModernBertModel, {"intermediate_size": 768}),
    "Qwen3": (
        Qwen3Config,
        Qwen3Model,
        {"num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 1024},
    ),
}


def make_model(family: str, folder: Path) -> Path:
    "A model directory of a family, with random weights and the tokenizer of MiniLM."
    config, model, options = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    backbone = model(config(**SHAPE | options | special))
    encoder = SentenceEncoder(backbone, tokenizer, max_length=256)
    if encoder.layout != "packed":
        sys.exit(f"{family} is not packed, so there is nothing to measure")
    encoder.save_pretrained(folder)
    return folder


def measure(case: Case, sides: Sides, texts, model: Path) -> dict:
    "CPU seconds of each side, and the ratio of sentence-transformers' to ours, round by round."
    blocks = blocks_of(case, texts, case.rounds + 2)
    (texts.folder / "blocks.json").write_text(json.dumps(blocks))
    jobs = {
        way: job_of(way, case, texts, len(blocks), sides.settings.threads, model=str(model))
        for way in WAYS
    }
    said, _ = take_turns({way: sides.get(way) for way in WAYS}, jobs, case.rounds)
    sides.close()
    seconds = {way: median(turn["cpu"] for turn in said[way]) for way in WAYS}
    return {"cpu_s": seconds, "ratio": over(said, "peer bf16", "ours bf16", "cpu")}


PAGE = HERE.parent / "docs" / "families.md"
HEADS = {"train_64": "train, batch 64", "encode_short": "encode, short"}
HEADS |= {"encode_passages": "encode, passages"}


def table(results: dict) -> str:
    "The ratios as a table, and where they were measured."
    lines = ["| family | " + " | ".join(HEADS.values()) + " |", "|---|" + "---|" * len(HEADS)]
    for family, cases in results["families"].items():
        cells = [f"{cases[name]['ratio']['median']:.2f}" for name in HEADS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    place = f"{results['date']}, {results['hardware']}, `{results['command']}`."
    return "\n".join([*lines, "", place])


def write_table(page: Path, results: dict) -> None:
    "Put the table into its place in the page of families."
    write_between(page, "<!-- speed -->", table(results), "<!-- end of speed -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds; writes no file")
    parser.add_argument("--table", action="store_true", help="only write the table of the page")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    settings = parser.parse_args()
    if settings.table:
        write_table(PAGE, json.loads((settings.out / "families.json").read_text()))
        return
    settings.threads, settings.openvino = 1, None
    torch.set_num_threads(1)
    results = {"families": {}}
    with tempfile.TemporaryDirectory() as work:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        texts = prepare(data_folder(), Path(work), tokenizer)
        for family in FAMILIES:
            model = make_model(family, Path(work) / family)
            sides = Sides(settings, Path(work))
            cases = {n: c._replace(rounds=3) if settings.quick else c for n, c in CASES.items()}
            results["families"][family] = {
                name: measure(case, sides, texts, model) for name, case in cases.items()
            }
            for name, found in results["families"][family].items():
                print(f"{family:10} {name:16} {found['ratio']['median']:.2f}", flush=True)
    results["ratios"] = {
        f"{family}_{name}": found["ratio"]["median"]
        for family, cases in results["families"].items()
        for name, found in cases.items()
    }
    results |= record("torch", "transformers", "sentence-transformers")
    if not settings.quick:
        save(results, {}, "families", settings.out)
        write_table(PAGE, results)


if __name__ == "__main__":
    main()
