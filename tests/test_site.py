"""The site: its search leads to tasks, quizzes can be read, and the lessons become one document."""

import importlib.util
import json
import re

import course
import pages
import pytest
from pages import ROOT

SITE = ROOT / "_site"
# what people look for -> the page that should come first
FIRST = {
    "own data": "tutorials/your_own_data",
    "resume": "howto_resume",
    "deploy": "howto_deploy",
    "torchrun": "howto_machines",
}

# by its path: Python has a module `site` of its own
spec = importlib.util.spec_from_file_location("site_tool", ROOT / "tools/site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


# --- search ---


@pytest.mark.parametrize("words", FIRST)
def test_each_task_has_one_page_for_its_words(words):
    answers = [source for source, asked in pages.ASKED.items() if words in asked.split(", ")]
    assert [source.partition("/")[2].partition(".")[0] for source in answers] == [FIRST[words]]


def test_the_words_of_a_page_stand_under_its_title():
    assert all((ROOT / source).is_file() for source in pages.ASKED)
    source = "docs/howto_deploy.md"
    text = site.indexed("# Deploy\n\nIn a program.\n", source)
    assert text.startswith("# Deploy\n\n```{index} ! deploy, ! deployment")
    text = site.indexed("# Deploy\n\n> One line\n\nMore.", source)
    assert text.startswith("# Deploy\n\n> One line\n\n```{index} ! deploy")
    assert site.indexed("# Other", "docs/other.md") == "# Other"


@pytest.mark.parametrize("words", FIRST)
def test_the_built_search_leads_to_the_task_first(words):
    path = SITE / "searchindex.js"
    if not path.exists():
        pytest.skip("the site is not built here: run `make docs`")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\);?", path.read_text(), re.S)[1])
    entries = index["indexentries"].get(words, [])
    # a main entry that equals the query has the most points that a result can have
    assert [index["docnames"][page] for page, _, is_main in entries if is_main] == [FIRST[words]]


# --- quizzes ---


def test_markdown_in_an_answer_is_not_inside_a_line_of_html():
    text = "**1.** Why?\n\n<details><summary>Answer</summary>See [it](a.md), `b`.</details>\n"
    opened = site.open_answers(text)
    assert "<details><summary>Answer</summary>\n\nSee [it](a.md), `b`.\n\n</details>\n" in opened
    assert site.open_answers("no quiz") == "no quiz"


# --- one document ---

PAGE = """<html><body><nav>x</nav><article role="main"><section id="loss">
<h1>Loss<a class="headerlink" href="#loss">¶</a></h1>
<a class="badge" href="https://colab.example">badge</a><div class="touch">moves</div>
<p><a href="#scale">here</a> <a href="02_model.html#pool">there</a> <a href="api/loss.html">api</a>
<a href="https://arxiv.org/abs/1">paper</a></p>
<section id="scale"><img src="_images/a.png"></section>
<details><summary>Answer</summary>Yes.</details><pre><span class="n">a</span></pre>
<section id="next"><h2>Next</h2></section></section></article></body></html>"""


def test_a_page_becomes_a_chapter():
    listed = {"01_loss", "02_model"}
    title, text = course.chapter(PAGE, "01_loss", "1.", listed, "https://home")
    assert title == "1. Loss" and "<h1>1. Loss</h1>" in text and "¶" not in text
    assert not any(word in text for word in ("badge", "moves", "<nav>", "Next"))
    assert text.startswith('<article id="01_loss">') and 'id="01_loss--scale"' in text
    targets = ["#01_loss--scale", "#02_model--pool", "https://home/api/loss.html"]
    assert re.findall('href="(.*?)"', text) == [*targets, "https://arxiv.org/abs/1"]
    assert "<details open" in text and "<pre>a</pre>" in text and 'src="_images/a.png"' in text


@pytest.mark.parametrize(
    "link, page, target",
    [
        ("../01_loss.html#scale", "tutorials/mteb", "#01_loss--scale"),
        ("mteb.html", "tutorials/nli", "#tutorials-mteb"),
        ("../howto_data.html#rows", "tutorials/mteb", "https://home/howto_data.html#rows"),
        ("#", "01_loss", "#01_loss"),
        ("mailto:a@b.example", "01_loss", "mailto:a@b.example"),
    ],
)
def test_links_lead_to_chapters_or_to_the_site(link, page, target):
    listed = {"01_loss", "tutorials/mteb"}
    assert course.pointed(link, page, listed, "https://home") == target


def test_all_lessons_stand_in_the_document_in_order(tmp_path, monkeypatch):
    table = {"I The idea": {"01_loss": "1.", "02_model": "2."}, "Tutorials": {"tutorials/a": ""}}
    monkeypatch.setattr(course, "chapters", lambda: table)
    (tmp_path / "tutorials").mkdir()
    for page in ("01_loss", "02_model", "tutorials/a"):
        (tmp_path / f"{page}.html").write_text(PAGE, encoding="utf-8")
    html = course.document(tmp_path)
    ids = re.findall('id="(.*?)"', html)
    assert len(ids) == len(set(ids)) and not re.findall('href="#(?!0|tut).*?"', html)
    assert re.findall('<article id="(.*?)"', html) == ["01_loss", "02_model", "tutorials-a"]
    assert html.index("I The idea") < html.index("Tutorials") < html.index("<article")


def test_every_lesson_is_a_chapter():
    listed = [page for part in course.chapters().values() for page in part]
    assert len(listed) == len(pages.modules()) + len(pages.tutorials())


def test_without_a_site_the_document_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(course, "SITE", tmp_path)
    monkeypatch.setattr("sys.argv", ["course.py"])
    assert course.main() == 1 and "run `make docs` first" in capsys.readouterr().err


def test_without_a_browser_there_is_no_pdf(tmp_path, monkeypatch):
    monkeypatch.setattr(course.shutil, "which", lambda name: None)
    assert course.print_pdf(tmp_path / "a.html", tmp_path / "a.pdf") is False
