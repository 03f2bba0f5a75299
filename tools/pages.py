"""The pages of this project: which there are, in which order people read them, what a cell says.

The order is said here only. The site's sidebar follows it, and tests/test_order.py walks it by the
links under "Next".
"""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PARTS = {  # caption -> numbers of the pages in nbs/
    "I The idea": range(1, 5),
    "II Data": range(5, 11),
    "III Better examples": range(11, 14),
    "IV Larger, faster": range(14, 20),
    "V In use": range(20, 26),
    "VI From end to end": range(26, 33),
    "VII What it stands on": range(33, 42),
}
# in the order of reading, which is none of the alphabet
TUTORIALS = (
    "your_own_data",
    "nli_to_stsb",
    "multi_qa_search",
    "three_claims",
    "mteb",
    "one_billion_pairs_tpu",
)
# what the sidebar shows before everything else
START = ("nbs/tutorials/your_own_data.ipynb",)
# then the tasks, in the order in which most people meet them
HOWTO = (
    "docs/howto_data.md",
    "docs/howto_models.md",
    "docs/howto_settings.md",
    "docs/howto_resume.md",
    "docs/howto_memory.md",
    "docs/howto_machines.md",
    "docs/howto_trouble.md",
    "docs/howto_deploy.md",
    "docs/howto_serve.md",
    "docs/howto_hub.md",
)
# then the parts above, and last what one looks up
REFERENCE = ("docs/recipe_keys.md", "docs/glossary.md")
# What people type into the search box, and the page that answers it: the site lists these words in
# its index, and its search shows a page of the index before all others.
ASKED = {
    "nbs/tutorials/your_own_data.ipynb": "own data, your own data, my data, fine-tune, fine-tuning",
    "docs/howto_data.md": "CSV, JSONL, Parquet, data format, bring data",
    "docs/howto_models.md": "which model, base model, model to start from, multilingual",
    "docs/howto_settings.md": "batch size, learning rate, steps, epochs, warm-up",
    "docs/howto_resume.md": "resume, train longer, checkpoint, interrupted",
    "docs/howto_memory.md": "memory, out of memory, OOM, gradient cache, bfloat16",
    "docs/howto_machines.md": "torchrun, several GPUs, multi-GPU, DDP, Slurm, distributed",
    "docs/howto_trouble.md": "troubleshooting, NaN, collapse, loss does not fall",
    "docs/howto_deploy.md": "deploy, deployment, production, Docker",
    "docs/howto_serve.md": "serve, server, REST, OpenAI, systemd",
    "docs/howto_hub.md": "hub, Hugging Face hub, push to the hub, upload",
    "docs/recipe_keys.md": "recipe keys, configuration keys, all options",
    "docs/glossary.md": "glossary, terms",
}
HIDDEN = {"hide", "include: false"}  # directives of cells that no reader sees


def settings(root: Path = ROOT) -> dict[str, str]:
    "Everything that settings.ini says."
    parser = ConfigParser(delimiters="=")
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def number(path: Path) -> int:
    "The number of a page: nbs/01_loss.ipynb -> 1."
    return int(path.stem.partition("_")[0])


def modules() -> list[Path]:
    "The numbered pages, each of them a module, in reading order."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"), key=number)


def tutorials() -> list[Path]:
    "The tutorials in reading order; one that is not in the list above comes last."
    every = {path.stem: path for path in sorted((ROOT / "nbs/tutorials").glob("[!.]*.ipynb"))}
    return [every.pop(name) for name in TUTORIALS if name in every] + list(every.values())


def parts() -> dict[str, list[Path]]:
    "Caption -> pages, in reading order; parts without a page are left out."
    pages = modules()
    table = {name: [p for p in pages if number(p) in numbers] for name, numbers in PARTS.items()}
    table["Tutorials"] = tutorials()
    return {caption: pages for caption, pages in table.items() if pages}


def notebooks() -> list[Path]:
    "All pages in reading order, the start page first."
    start = [path for path in [ROOT / "nbs/index.ipynb"] if path.exists()]
    return start + modules() + tutorials()


def split_directives(source: str) -> tuple[str, str]:
    "Split a cell into its leading directive lines and its code."
    lines = source.split("\n")
    count = 0
    while count < len(lines) and lines[count].startswith("#|"):
        count += 1
    return "\n".join(lines[:count]), "\n".join(lines[count:])


def flags_of(source: str) -> set[str]:
    "Return the directives of a cell: '#| eval: false' gives {'eval: false'}."
    return {m[1].strip() for m in re.finditer(r"^#\|\s*(.+)$", split_directives(source)[0], re.M)}
