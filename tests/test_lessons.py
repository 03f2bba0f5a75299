"""What every lesson has: the papers it stands on, a quiz at the end of a part, the field's words."""

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
def test_the_last_page_of_a_part_asks_five_questions(caption):
    cells = markdown(PARTS[caption][-1])
    text = "\n\n".join(text for id, text in cells.items() if id.startswith("quiz"))
    assert text.startswith("## Quiz\n")
    assert [number for number, _, _ in QUIZ.findall(text)] == list("12345")
    assert all(len(answer.split()) > 4 for _, _, answer in QUIZ.findall(text))
