"""Put the lessons of the built site into one document for print: _site/course.html, and a PDF.

    make docs                   # first: the pages themselves
    python tools/course.py      # _site/course.html, and _site/course.pdf if there is a Chromium

A page becomes a chapter: what leads from page to page on a screen is left out, answers are
unfolded, and a link to another chapter leads there. Any other link leads to the site on the web.
"""

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from pages import ROOT, number, parts, settings

SITE = ROOT / "_site"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# what helps on a screen only
FURNITURE = (
    "a.headerlink, a.badge, a.notebook-source, .exported-note, .touch, button, script, section#next"
)
# Colours that are left out in code. Each coloured word is an element of the PDF of its own, and a
# million of them made it ten times as large; keywords, texts and comments keep theirs.
PLAIN = re.compile(r'<span class="(?:n|p|o|w|si|ow|nb|mi|bp|pre)">([^<]*)</span>')
SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}: the course</title>
{styles}
<script>
window.MathJax = {{options: {{
  processHtmlClass: "tex2jax_process|mathjax_process|math|output_area",
  menuOptions: {{settings: {{assistiveMml: false}}}},
}}}};
</script>
<script defer src="_static/tex-svg.js"></script>
</head>
<body data-theme="light">
<main class="content course">
<header><h1>{title}</h1><p>{description}</p><p>Version {version}</p></header>
<nav>{contents}</nav>
{chapters}
</main>
</body>
</html>
"""


def chapters() -> dict[str, dict[str, str]]:
    "Part -> page of the site, without .html -> its number and a dot, or nothing for a tutorial."
    table = {}
    for caption, paths in parts().items():
        pages = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in paths]
        numbers = [f"{number(path)}." if path.stem[0].isdigit() else "" for path in paths]
        table[caption] = dict(zip(pages, numbers))
    return table


def anchor(page: str, fragment: str = "") -> str:
    "The id of a page, or of a place on it, in the one document: two pages may share a heading."
    return f"{page.replace('/', '-')}--{fragment}".rstrip("-")


def pointed(link: str, page: str, pages: set[str], home: str) -> str:
    "Where a link of a page leads in the one document: to a chapter, else to the site on the web."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return link
    if not parts.path:
        return f"#{anchor(page, parts.fragment)}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path))
    if target.removesuffix(".html") in pages:
        return f"#{anchor(target.removesuffix('.html'), parts.fragment)}"
    return f"{home}/{target}" + (f"#{parts.fragment}" if parts.fragment else "")


def chapter(html: str, page: str, label: str, pages: set[str], home: str) -> tuple[str, str]:
    "A page of the site as a chapter: its title and its HTML."
    from bs4 import BeautifulSoup

    start, end = html.index("<article"), html.index("</article>")
    article = BeautifulSoup(PLAIN.sub(r"\1", html[start:end]), "html.parser").find("article")
    for tag in article.select(FURNITURE):
        tag.decompose()
    for tag in article.select("details"):
        tag["open"] = ""  # paper cannot be unfolded
    for tag in article.select("[id]"):
        tag["id"] = anchor(page, tag["id"])
    for tag in article.select("a[href]"):
        tag["href"] = pointed(tag["href"], page, pages, home)
    for tag in article.select("img[src]"):
        if not urlsplit(tag["src"]).scheme:
            tag["src"] = posixpath.normpath(posixpath.join(posixpath.dirname(page), tag["src"]))
    heading = article.find("h1")
    title = f"{label} {heading.get_text()}".strip()
    heading.string = title
    return title, f'<article id="{anchor(page)}">{article.decode_contents()}</article>'


def styles(html: str) -> str:
    "The style sheets of a page, with that for print behind them."
    names = [
        href.partition("?")[0] for href in re.findall(r'rel="stylesheet".*?href="(.*?)"', html)
    ]
    links = [f'<link rel="stylesheet" href="{name}">' for name in [*names, "_static/print.css"]]
    return "\n".join(links)


def document(site: Path) -> str:
    "All lessons of a built site as one HTML page."
    cfg, table = settings(), chapters()
    home = cfg["doc_host"] + cfg["doc_baseurl"]
    pages = {page for part in table.values() for page in part}
    contents, body, first = [], [], ""
    for caption, part in table.items():
        rows = []
        for page, label in part.items():
            html = (site / f"{page}.html").read_text(encoding="utf-8")
            first = first or html
            title, text = chapter(html, page, label, pages, home)
            rows.append(f'<li><a href="#{anchor(page)}">{escape(title)}</a></li>')
            body.append(text)
        contents.append(f"<h2>{escape(caption)}</h2><ul>{''.join(rows)}</ul>")
    return SHELL.format(
        title=escape(cfg["title"]),
        description=escape(cfg["description"]),
        version=escape(cfg["version"]),
        styles=styles(first),
        contents="".join(contents),
        chapters="\n".join(body),
    )


def print_pdf(source: Path, target: Path) -> bool:
    "Let a headless Chromium make a PDF of a page; False if there is none on this machine."
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        return False
    options = "--headless --no-sandbox --disable-gpu --no-pdf-header-footer".split()
    # formulas are set by a script: their time is given before the page is printed
    options += ["--generate-pdf-document-outline", "--virtual-time-budget=300000"]
    command = [browser, *options, f"--print-to-pdf={target}", source.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode or not target.exists():
        raise RuntimeError(f"{browser} could not print {source}: {done.stderr.strip()[-500:]}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    missing = [p for part in chapters().values() for p in part if not (SITE / f"{p}.html").exists()]
    if missing:
        print(f"{SITE.name}/ has no {missing[0]}.html: run `make docs` first", file=sys.stderr)
        return 1
    page, pdf = SITE / "course.html", SITE / "course.pdf"
    page.write_text(document(SITE), encoding="utf-8")
    print(f"{page.relative_to(ROOT)}: all lessons as one page")
    if print_pdf(page, pdf):
        print(f"{pdf.relative_to(ROOT)}: the same for print, {pdf.stat().st_size / 1e6:.1f} MB")
    else:
        print(
            "no PDF was made, for want of a Chromium (Debian: apt install chromium): open the page"
            " in any browser and print it"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
