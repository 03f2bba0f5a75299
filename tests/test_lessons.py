"""What every lesson has: the papers it stands on, a quiz at a part's end, the field's words."""

import json
import re
from pathlib import Path

import pages
import pytest
from pages import ROOT

# pages 30 and later are about programs, whose sources are their own manuals
LESSONS = [path for path in pages.modules() if pages.number(path) < 30]
PARTS = {caption: paths for caption, paths in pages.parts().items() if caption != "Tutorials"}
QUIZ = re.compile(r"\*\*(\d)\.\*\* (.+\?)\n\n<details><summary>Answer</summary>(.+)</details>")


def markdown(path: Path) -> dict[str, str]:
    "Id -> text of the Markdown cells of a notebook, or of a Markdown file."
    if path.suffix == ".md":
        return {"": path.read_text(encoding="utf-8")}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_ends_with_its_sources(path):
    cells = [text for text in markdown(path).values() if re.match(r"(## )?Sources\b", text)]
    assert len(cells) == 1, "write one cell '## Sources' before Next"
    assert re.search(r"\]\(https://\S+\)", cells[0]), "link the papers"


@pytest.mark.parametrize("caption", PARTS)
def test_each_part_asks_five_questions_near_its_end(caption):
    cells = [c for path in PARTS[caption][-3:] for c in markdown(path).items()]
    text = "\n\n".join(text for id, text in cells if id.startswith("quiz"))
    assert text.startswith("## Quiz\n") and text.count("## Quiz") == 1
    assert [number for number, _, _ in QUIZ.findall(text)] == list("12345")
    assert all(len(answer.split()) > 4 for _, _, answer in QUIZ.findall(text))


# --- words of this house, where the field has one of its own ---

INSTEAD = {  # pattern -> what to write
    r"mend(s|ed|ing)?": "fix, repair",
    r"dear(er|est)?": "expensive",
    r"shel(f|ves)": "corpus",
    r"kin": "family",
    r"twins?": "say what it is",
    r"oracles?": "naive version, reference",
    r"(some|no)body|whoever": "you, we, the user",
    r"(the|a) peers?": "sentence-transformers",
    r"the seeds": "the source documents, or the random seeds",
    r"company": "co-occurrence",
    r"the door": "boundary, input check",
    r"that is none|rounds otherwise": "plain English",
}
# How often pages still have such a word. A number may only become smaller; nothing is added.
STILL = {
    "01_loss.ipynb": 1,
    "02_model.ipynb": 1,
    "06_store.ipynb": 1,
    "07_data.ipynb": 2,
    "08_mixture.ipynb": 4,
    "11_mining.ipynb": 5,
    "12_guard.ipynb": 1,
    "13_losses.ipynb": 4,
    "14_packed.ipynb": 1,
    "16_gradcache.ipynb": 2,
    "21_encoding.ipynb": 3,
    "27_new.ipynb": 1,
    "30_cli.ipynb": 3,
    "33_modeldir.ipynb": 1,
    "35_workers.ipynb": 2,
    "38_charts.ipynb": 1,
    "40_drawings.ipynb": 2,
}


def plain(text: str) -> str:
    "A Markdown text without code, formulas and link targets."
    text = re.sub(r"^ *```.*?^ *``` *$", " ", text, flags=re.M | re.S)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|\$[^$]*\$", " ", text)


def house_words(path: Path) -> list[str]:
    "The words of a page that the field calls otherwise, each with what to write."
    text = "\n\n".join(map(plain, markdown(path).values()))
    return [
        f"{match[0]} ({instead})"
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.I)
    ]


PROSE = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *pages.notebooks()]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_a_page_speaks_the_words_of_the_field(path):
    words = house_words(path)
    assert len(words) <= STILL.get(path.name, 0), f"{path.name}: {'; '.join(words)}"


def test_house_words_are_seen_in_prose_and_not_in_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Nobody mends `oracle(kin)`.\n\n```python\nshelf = 1\n```\n$twin$\n")
    assert [word.split()[0] for word in house_words(page)] == ["mends", "Nobody"]
