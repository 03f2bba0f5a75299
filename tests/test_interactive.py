"""The figures that readers of the site can move: their numbers equal the library's."""

import json
import shutil
import subprocess

import nbformat
import pytest
import torch
from conftest import ROOT, refuses
from IPython.core.formatters import HTMLFormatter

from contrastive_st.drawings import Interactive
from contrastive_st.loss import info_nce, same_text
from contrastive_st.mixture import WINDOW, draw_counts, draw_window

STATIC = ROOT / "docs/_static"
SCRIPTS = ("touch.js", "similarity_matrix.js", "draw_window.js")


def in_javascript(script: str, name: str, calls: list) -> list:
    "Results of a function of docs/_static for many lists of arguments, by one node."
    if not shutil.which("node"):
        pytest.skip("no JavaScript outside of a browser: apt-get install nodejs")
    code = (
        f"const f = require({json.dumps(str(STATIC / script))}).{name};"
        "const calls = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(calls.map((call) => f(...call))));"
    )
    done = subprocess.run(
        ["node", "-e", code], input=json.dumps(calls), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers_of(page: str, cell: str) -> tuple[str, dict]:
    "The HTML of a movable figure as a page has it committed, and its numbers."
    cells = nbformat.read(ROOT / f"nbs/{page}.ipynb", as_version=4).cells
    outputs = next(c for c in cells if c.id == cell).outputs
    html = next(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {}))
    text = html.split("data-numbers='")[1].split("'")[0]
    for escaped, sign in (("&#39;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(escaped, sign)
    return html, json.loads(text)


# --- the numbers ---


def test_loss_and_gradient_in_javascript_equal_the_library():
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    for b, scale in ((2, 1), (3, 20), (6, 20), (7, 100), (5, 7.5)):
        a, p = torch.randn(2, b, 16, generator=generator, dtype=torch.float64)
        identities = torch.randint(0, 2 * b, (b, 2), generator=generator)
        for same in (None, same_text(identities)):
            units = [torch.nn.functional.normalize(x, dim=-1) for x in (a, p)]
            cosines = (units[0] @ units[1].T).requires_grad_()
            loss = info_nce(a, p, scale=scale, same=same)
            # the same loss from the cosines alone: a dot product with one-hot rows gives them back
            again = info_nce(cosines, torch.eye(b).double(), None, scale, False, "dot", same)
            assert torch.allclose(loss, again, atol=1e-12)
            (gradient,) = torch.autograd.grad(again, cosines)
            calls.append([cosines.tolist(), scale, [] if same is None else same.tolist()])
            expected.append((loss.item(), gradient))
    for result, (loss, gradient) in zip(
        in_javascript("similarity_matrix.js", "infoNce", calls), expected
    ):
        assert abs(result["loss"] - loss) < 1e-6
        assert abs(sum(result["losses"]) / len(gradient) - loss) < 1e-6
        assert torch.allclose(torch.tensor(result["gradient"]).double(), gradient, atol=1e-6)


def test_a_scale_without_end_overflows_nowhere():
    (result,) = in_javascript("similarity_matrix.js", "infoNce", [[[[1, -1], [1, -1]], 1e6, []]])
    assert result["losses"] == [0, 2e6] and result["loss"] == 1e6


def test_the_batch_of_the_figure_masks_what_the_library_masks():
    # six pairs, and a row 6 that asks otherwise and has the answer of row 0
    identities = torch.tensor([[i, 10 + i] for i in range(6)] + [[6, 10]])
    cosines = torch.arange(49).reshape(7, 7)
    states = [
        {"size": size, "repeat": repeat, "mask": mask}
        for size in (2, 6)
        for repeat in (False, True)
        for mask in (False, True)
    ]
    calls = [[cosines.tolist(), state] for state in states]
    for state, rows in zip(states, in_javascript("similarity_matrix.js", "batch", calls)):
        chosen = [*range(state["size"]), *([6] if state["repeat"] else [])]
        assert rows["chosen"] == chosen
        assert rows["cosines"] == cosines[chosen][:, chosen].tolist()
        same = same_text(identities[chosen]) & state["mask"]
        assert rows["same"] == same.tolist()


def test_the_draw_window_in_javascript_equals_the_library():
    _, numbers = numbers_of("08_mixture", "touch-window")
    weights = [(4, 3, 2, 1), (1, 1, 1, 1), (9, 1, 1, 1), (5, 5, 2, 9), (1, 7, 7, 7)]
    cases = [(w, k, n) for w in weights for k in (1, 2, 3, 4) for n in (0, 1, 7, 15)]
    calls = [[w, k, n, numbers["orders"][n]] for w, k, n in cases]
    for (w, k, n), drawn in zip(cases, in_javascript("draw_window.js", "drawWindow", calls)):
        choice, turn = draw_window(w, k=k, window=n)
        assert drawn["choice"] == choice.tolist() and drawn["turn"] == turn.tolist()
        assert drawn["start"] == draw_counts(w, n * WINDOW * k)
        assert sorted(sum(drawn["grouped"], [])) == sorted(choice.flatten().tolist())


# --- what a page holds ---


def test_every_page_of_the_site_loads_the_scripts():
    configured = (ROOT / "docs/conf.py").read_text(encoding="utf-8")
    assert sorted(SCRIPTS) == sorted(path.name for path in STATIC.glob("*.js"))
    assert all(f'"{script}"' in configured for script in SCRIPTS)


def test_a_figure_is_safe_html_and_says_what_it_is_without_scripts():
    figure = Interactive("some-name", {"texts": ['it\'s <b>"5" & 6</b>']}, "move <it>")
    html = HTMLFormatter()(figure)  # as a notebook asks for it
    assert "<b>" not in html and "move <it>" not in html and html.count("'") == 2
    assert (
        "<p>On the site: move &lt;it&gt;</p>" in html and repr(figure) == "Interactive: move <it>"
    )


@pytest.mark.parametrize(
    "name, numbers, alt, part",
    [
        ("Some Name", {}, "move it", "small letters and hyphens"),
        ("../other", {}, "move it", "small letters and hyphens"),
        ("some-name", {}, "", "alt says in a sentence"),
        ("some-name", {"x": float("nan")}, "move it", "finite numbers"),
        ("some-name", {"x": torch.ones(2)}, "move it", "a tensor by its tolist()"),
    ],
)
def test_what_a_browser_could_not_draw_is_refused(name, numbers, alt, part):
    refuses(lambda: Interactive(name, numbers, alt), part)


# --- in a browser ---


def opened(browser, folder, html: str, width=1280):
    "A page with a figure and the site's scripts, opened as a file, and what went wrong on it."
    scripts = "".join(f'<script defer src="{(STATIC / s).as_uri()}"></script>' for s in SCRIPTS)
    style = f'<link rel="stylesheet" href="{(STATIC / "site.css").as_uri()}">'
    page = f'<!doctype html><html lang="en"><head>{style}{scripts}</head><body>'
    page += f'<div class="cell_output"><div class="output">{html}</div><img alt="plot"></div>'
    (folder / "page.html").write_text(page + "</body></html>", encoding="utf-8")
    tab, wrong = browser.new_page(viewport={"width": width, "height": 844}), []
    tab.set_default_timeout(10_000)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "request",
        lambda asked: None if asked.url.startswith("file:") else wrong.append(asked.url),
    )
    tab.goto((folder / "page.html").as_uri())
    tab.locator(".touch-result").wait_for()
    return tab, wrong


def test_the_similarity_matrix_can_be_moved_by_the_keyboard(browser, tmp_path):
    html, numbers = numbers_of("01_loss", "touch-matrix")
    tab, wrong = opened(browser, tmp_path, html)
    cosines = torch.tensor(numbers["encoders"]["trained"], dtype=torch.float64)
    identities = torch.tensor([[i, 10 + i] for i in range(6)] + [[6, 10]])

    def expected(scale, rows=range(7), masked=False):
        rows = list(rows)
        same = same_text(identities[rows]) if masked else None
        square = cosines[rows][:, rows]
        loss = info_nce(square, torch.eye(len(rows)).double(), None, scale, False, "dot", same)
        return f"{loss.item():.4f}"

    def shown():
        return tab.locator(".touch-result").inner_text().split()[1].rstrip(".")

    assert shown() == expected(20)
    scale = tab.get_by_role("slider", name="scale")
    for _ in range(5):
        scale.press("ArrowRight")
    assert scale.input_value() == "25" and shown() == expected(25)
    tab.get_by_role("checkbox", name="mask equal texts").check()
    assert shown() == expected(25, masked=True)
    assert tab.locator("td.touch-masked").count() == 2 * 2  # two cells in each of two tables
    tab.get_by_label("pairs in the batch").press("Home")
    assert shown() == expected(25, rows=(0, 1, 6), masked=True)
    tab.get_by_label("row 6 repeats").uncheck()
    assert (
        shown() == expected(25, rows=(0, 1))
        and tab.get_by_role("checkbox", name="mask").is_disabled()
    )
    cosines = torch.tensor(numbers["encoders"]["untrained"], dtype=torch.float64)
    tab.get_by_role("combobox", name="encoder").select_option("untrained")
    assert shown() == expected(25, rows=(0, 1))
    assert not tab.locator("img").is_visible()  # the plot of the cell is for print
    tab.emulate_media(media="print")
    assert tab.locator("img").is_visible() and not tab.locator(".touch").is_visible()
    assert wrong == []
    tab.close()


def test_the_draw_window_can_be_moved(browser, tmp_path):
    html, _ = numbers_of("08_mixture", "touch-window")
    tab, wrong = opened(browser, tmp_path, html)

    def shown():
        return "".join(tab.locator(".touch-steps .touch-draw").all_inner_texts())

    def expected(weights, k, window):
        return "".join("ABCD"[i] for i in draw_window(weights, k=k, window=window)[0].flatten())

    assert shown() == expected((4, 3, 2, 1), 2, 1)
    tab.get_by_label("window of the run").press("End")
    assert shown() == expected((4, 3, 2, 1), 2, 15)
    tab.get_by_label("draws in a step").press("ArrowRight")
    tab.get_by_label("weight of D").press("End")
    assert shown() == expected((4, 3, 2, 9), 3, 15)
    tab.get_by_label("random order").uncheck()
    assert sorted(shown()) == sorted(expected((4, 3, 2, 9), 3, 15))
    assert wrong == []
    tab.close()


@pytest.mark.parametrize(
    "page, cell", [("01_loss", "touch-matrix"), ("08_mixture", "touch-window")]
)
def test_a_figure_fits_on_a_phone(browser, tmp_path, page, cell):
    tab, wrong = opened(browser, tmp_path, numbers_of(page, cell)[0], width=390)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390 and wrong == []
    tab.close()
