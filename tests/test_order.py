"""The reading order: "Next" walks every page once, as `pages.py` lists them for the sidebar."""

import json
import re
from collections import Counter

import nbformat
import pages
import pytest
import run_pages
from pages import ROOT

FIRST_LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+\.ipynb)(?:#[^)]*)?\)")


def next_of(path):
    "The page to which the first link of the cell `next` leads; None if there is no such cell."
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "next"]
    link = FIRST_LINK.search(cells[0].source) if cells else None
    return (path.parent / link[1]).resolve() if link else None


def test_next_walks_every_page_once():
    "From the start page to the last tutorial; what the last one links to is free."
    order = pages.notebooks()
    if next_of(order[0]) is None:  # the start page links to many
        order = order[1:]
    wrong = [
        f"{page.name}: its first link under Next leads to {getattr(next_of(page), 'name', None)},"
        f" not to {following.name}"
        for page, following in zip(order, order[1:])
        if next_of(page) != following
    ]
    assert not wrong, "\n".join(wrong)


def test_every_page_has_a_number_of_its_own_and_a_part():
    numbers = Counter(map(pages.number, pages.modules()))
    assert not [number for number, times in numbers.items() if times > 1]
    listed = [page for part in pages.parts().values() for page in part]
    assert listed == pages.modules() + pages.tutorials()
    assert {page.stem for page in pages.tutorials()} == set(pages.TUTORIALS)


def test_the_sidebar_begins_with_the_tutorial_on_your_own_data():
    assert pages.tutorials()[0] == ROOT / pages.START[0]
    assert [source for source in pages.START if not (ROOT / source).is_file()] == []


def test_the_start_page_names_every_page_and_each_has_a_time():
    start = (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")
    times = json.loads((ROOT / "tools/pages.json").read_text(encoding="utf-8"))
    every = pages.modules() + pages.tutorials()
    assert [page.stem for page in every if f"{page.name})" not in start] == []
    assert [page.stem for page in every if page.stem not in times] == []


@pytest.mark.parametrize(
    "text, target",
    [
        ("## Next\n\n[A](02_model.ipynb) and [B](03_x.ipynb).", "02_model.ipynb"),
        ("## Next\n\n[A](https://x.y) and [B](tutorials/mteb.ipynb#top).", "tutorials/mteb.ipynb"),
        ("## Next\n\nNothing.", None),
    ],
)
def test_the_first_link_to_a_page_counts(tmp_path, text, target):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="next")])
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert next_of(tmp_path / "a.ipynb") == (tmp_path / target if target else None)


def test_the_longest_page_runs_first(monkeypatch):
    "And an nbdev that orders its pages in another way is told."
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run_pages.test, "sorted", sorted, raising=False)
    seconds, ran = json.loads((ROOT / "tools/pages.json").read_text(encoding="utf-8")), []

    def run(n_workers):
        ran.extend(run_pages.test.sorted(pages.modules()))

    monkeypatch.setattr(run_pages.test, "nbdev_test", run)
    run_pages.main()
    times = [seconds[page.stem]["seconds"] for page in ran]
    assert len(ran) == len(pages.modules()) and times == sorted(times, reverse=True)
    monkeypatch.setattr(run_pages.test, "nbdev_test", lambda n_workers: None)
    with pytest.raises(RuntimeError, match="did not sort its pages"):
        run_pages.main()
