"""Write docs/scale.md: what the published runs would take, by sizes, measured rates, arithmetic.

    python tools/scale.py           # write
    python tools/scale.py --check   # exit 1 if docs/scale.md is stale

Nothing here was measured on an accelerator. What a step computes and moves is arithmetic
(`xla.step_time`); what it costs to read, tokenise and store a row is measured by
benchmarks/data_input.py; what a chip can do stands in its maker's data sheet.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from pages import ROOT

from contrastive_st import recipes
from contrastive_st.account import account
from contrastive_st.xla import CHIPS, Chip, run_time, step_time

PAGE = ROOT / "docs/scale.md"
UTILISATION = 0.35  # share of the peak that matrix products reach, on every chip
HOSTS = 64  # of the simulation


class Machine(NamedTuple):
    "What a run computes on, and what is paid for it."

    devices: int  # that each hold a slice of the batch
    chip: Chip
    paid: int  # chips on the bill; a v3 chip has two devices
    hosts: int  # machines that read data


GPUS = {  # peak in bfloat16 without sparsity, memory, NVLink in one direction
    "A100": Chip(312e12, 2039e9, 300e9),  # 80 GB, SXM
    "H100": Chip(989e12, 3350e9, 450e9),  # 80 GB, SXM
}
MACHINES = {
    "1 A100": Machine(1, GPUS["A100"], 1, 1),
    "8 H100": Machine(8, GPUS["H100"], 8, 1),
    "TPU v3-8": Machine(8, CHIPS["v3"], 4, 1),
    "TPU v5e-8": Machine(8, CHIPS["v5e"], 8, 1),
    "TPU v5e-64": Machine(64, CHIPS["v5e"], 64, 8),
    "TPU v5e-256": Machine(256, CHIPS["v5e"], 256, 32),
}
SEEDS = (
    "all_datasets_v3_distilroberta-base",
    "multi-qa-MiniLM-L6-cos-v1",
    "multi-qa-mpnet-base-cos-v1",
)


def load_report(recipe) -> dict:
    "The account of a published run from sizes alone; no text is opened."
    return account(recipes.plan(recipe), recipe.train["steps"], sample=0)


def estimate(recipe, report, machine) -> dict[str, float]:
    "Seconds of a run by what they are spent on; nothing overlaps."
    setting = {"T": recipe.model.max_length, "devices": machine.devices, "chip": machine.chip}
    size = recipes.BACKBONES[recipe.model.name]
    return run_time(size, report, **setting, utilisation=UTILISATION)


def first_limit(spent, cores) -> str:
    "What would have to grow first for the run to become faster."
    if cores > 8:  # a host of a TPU or of eight GPUs has many more, a small one may not
        return "the tokenizer, unless tokens are stored"
    return {
        "matmul": "matrix products",
        "all_reduce": "the exchange of gradients",
        "optimizer": "the optimiser's passes over memory",
    }[max(spent, key=spent.get)]


def run_table(name: str, rates: dict) -> tuple[str, str]:
    "A published run on each machine: a heading, and a table."
    recipe = recipes.load(ROOT / f"recipes/{name}.toml")
    report, rows = load_report(recipe), []
    for machine_name, machine in MACHINES.items():
        spent = estimate(recipe, report, machine)
        seconds = sum(spent.values())
        pairs = report["steps"] * report["batch_size"] / seconds / machine.hosts
        cores = pairs / rates["on_the_fly"]
        rows.append(
            {
                "machine": machine_name,
                "ms a step": f"{1000 * seconds / report['steps']:,.0f}",
                "hours": f"{seconds / 3600:,.1f}",
                "chip-hours": f"{machine.paid * seconds / 3600:,.0f}",
                "pairs/s for each host": f"{pairs:,.0f}",
                "cores, tokenised on the fly": f"{cores:.2f}",
                "cores, tokens stored": f"{pairs / rates['pretokenised']:.2f}",
                "saturates first": first_limit(spent, cores),
            }
        )
    heading = (
        f"## {name}\n\n{report['steps']:,} steps of {report['batch_size']:,} rows,"
        f" {recipe.model.max_length} tokens each; {sum(d['rows'] for d in report['datasets']):,}"
        f" rows in the corpus.\n"
    )
    return heading, pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def disk_table(measured: dict) -> str:
    "What a billion pairs take on disk, and the hours to write them."
    recipe = recipes.load(ROOT / f"recipes/{SEEDS[0]}.toml")
    total = sum(entry["lines"] for entry in recipe.data.mix)
    files = measured["files"]
    rows = [
        {
            "if all rows were": kind,
            "gzip files": f"{total * size['file'] / 1e9:,.0f} GB",
            "store of texts": f"{total * size['texts'] / 1e9:,.0f} GB",
            "tokens beside it": f"{total * size['tokens'] / 1e9:,.0f} GB",
            "core hours, texts": f"{total / files['prepare_rows_per_second'] / 3600:.1f}",
            "core hours, tokens": f"{total / files['tokenise_rows_per_second'] / 3600:.1f}",
        }
        for kind, size in measured["bytes_per_row"].items()
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return f"{total:,} pairs.\n\n{table}"


def network_table() -> str:
    "What one device sends for the gradients of a step, once round the ring."
    rows, link = [], 1e6  # over a link of a megabyte a second, seconds are megabytes
    for hub_id, (layers, width, parameters) in recipes.BACKBONES.items():
        sent = {
            P: step_time(layers, width, parameters, P, 1, P, Chip(1, 1, link))["all_reduce"]
            for P in (8, 64, 256)
        }
        rows.append(
            {"backbone": hub_id, "layers x width": f"{layers} x {width}"}
            | {f"MB sent, {P} devices": f"{mb:,.0f}" for P, mb in sent.items()}
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def simulate(name: str, hosts: int = HOSTS, steps=(0, 1, 1000, 539_999)) -> str:
    "Draw the rows of a published run for many hosts and compare; a sentence about it."
    mixture = recipes.plan(recipes.load(ROOT / f"recipes/{name}.toml"))
    rows_seen = 0
    for step in steps:
        whole = np.stack(mixture.rows(step), axis=1)  # (B, 2): dataset and row
        parts = [np.stack(mixture.rows(step, h, hosts), axis=1) for h in range(hosts)]
        if not np.array_equal(np.concatenate(parts), whole):
            raise ValueError(f"step {step}: the rows of {hosts} hosts are not those of one")
        if len(np.unique(whole, axis=0)) != len(whole):
            raise ValueError(f"step {step}: a row is read twice")
        rows_seen += len(whole)
    listed = ", ".join(f"{step:,}" for step in steps)
    return (
        f"Drawn for {hosts} hosts and for one, steps {listed} of `{name}` hold the same"
        f" {rows_seen:,} rows in the same order, and no two hosts read the same row of a step."
    )


def page() -> str:
    "The whole page."
    record = json.loads((ROOT / "benchmarks/results/data_input.json").read_text())
    rates = record["pairs_per_second_per_core"]["mixed"]
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        record,
        rates=rates,
        share=f"{UTILISATION:.0%}",
        runs="\n\n".join("\n".join(run_table(name, rates)) for name in SEEDS),
        disk=disk_table(record),
        network=network_table(),
        simulation=simulate(SEEDS[0]),
    )


def main() -> None:
    "Write the page, or check that it is fresh."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    check, text = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/scale.md is stale: run python tools/scale.py")


if __name__ == "__main__":
    main()
