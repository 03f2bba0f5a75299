"""Build the documentation site: stage the notebooks in .cache/site, run Sphinx, write _site.

    python tools/site.py               # build
    python tools/site.py --fresh       # forget what earlier builds left
    python tools/site.py --serve 8000  # build, then serve it here

No cell is executed: pages show the outputs that are committed. The only thing fetched is MathJax,
once, through npm; afterwards builds are offline.
"""

import argparse
import ast
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import nbformat
from pages import (
    ASKED,
    HIDDEN,
    HOWTO,
    REFERENCE,
    ROOT,
    START,
    flags_of,
    modules,
    notebooks,
    parts,
    settings,
    split_directives,
)

STAGE = ROOT / ".cache/site"
BUILD = ROOT / ".cache/build"
MATHJAX = ROOT / ".cache/mathjax"
SITE = ROOT / "_site"
MATHJAX_VERSION = "3.2.2"
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
# files of the repository that are pages too
PAGES = {
    **{source: Path(source).name for source in (*HOWTO, *REFERENCE)},
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/LOG.md": "log.md",
    "docs/seeds.md": "seeds.md",
    "docs/data.md": "data.md",
    "docs/families.md": "families.md",
    "docs/scale.md": "scale.md",
    "docs/reliability.md": "reliability.md",
}
# directive -> cell tag
TAGS = {
    "code-fold: true": "hide-cell",
    "fold: code": "hide-input",
    "echo: false": "remove-input",
    "hide_input": "remove-input",
    "output: false": "remove-output",
    "hide_output": "remove-output",
    "export": "exported",
    "exports": "exported",
}


def public_names() -> dict[str, str]:
    "Exported name -> module, for names that only one module exports."
    homes: dict[str, list[str]] = {}
    for path in sorted((ROOT / "contrastive_st").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    homes.setdefault(name, []).append(path.stem)
    return {name: modules[0] for name, modules in homes.items() if len(modules) == 1}


# --- one markdown text ---


def outside_fences(change, text: str) -> str:
    "Apply `change` to a Markdown text, but not to its fenced code."
    parts = re.split(r"(^ *(```+|~~~+).*?^ *\2 *$)", text, flags=re.M | re.S)
    return "".join(
        part if i % 3 == 1 else change(part) for i, part in enumerate(parts) if i % 3 != 2
    )


def links(text: str, folder: Path, depth: int, cfg: dict[str, str]) -> str:
    "Point links at pages of the site, else at the repository; drop those that lead nowhere."

    def link(match):
        if match[1] is None:  # inline code
            return match[0]
        bang, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        known = path.is_relative_to(ROOT) and path.exists()
        where = path.relative_to(ROOT).as_posix() if known else ""
        if not known:
            print(
                f"note: the link to {target} in {folder.relative_to(ROOT) or '.'} leads nowhere;"
                " its text is kept"
            )
            return label
        if bang:
            (STAGE / "files").mkdir(exist_ok=True)
            shutil.copy2(path, STAGE / "files" / where.replace("/", "-"))
            return f"![{label}]({'../' * depth}files/{where.replace('/', '-')})"
        if where in PAGES:
            return f"[{label}]({'../' * depth}{PAGES[where]}{anchor})"
        if where.startswith("nbs/") and path.suffix == ".ipynb":
            return f"[{label}]({'../' * depth}{where.removeprefix('nbs/')}{anchor})"
        kind = "tree" if path.is_dir() else "blob"
        return f"[{label}]({cfg['git_url']}/{kind}/{cfg['branch']}/{quote(where)}{anchor})"

    return re.sub(r"`[^`\n]*`|(!?)\[([^\]]*)\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)", link, text)


def symbols(text: str, names: dict[str, str]) -> str:
    "Link `name` to its entry in the API reference; headings and link texts are left alone."

    def linked(line):
        if line.startswith("#"):
            return line
        pieces = re.split(r"(\[[^\]]*\]\([^)]*\))", line)

        def swap(m):
            if m[1] not in names:
                return m[0]
            return f"{{py:obj}}`{m[1]} <contrastive_st.{names[m[1]]}.{m[1]}>`"

        return "".join(
            p if i % 2 else re.sub(r"(?<![`}])`(\w+)`(?!`)", swap, p) for i, p in enumerate(pieces)
        )

    return "\n".join(map(linked, text.split("\n")))


def indexed(text: str, source: str) -> str:
    "Put the words that people look for under a page's title, as entries of the site's index."
    if source not in ASKED:
        return text
    # the search shows main entries, which have a !, before whatever else it finds
    words = ", ".join(f"! {word}" for word in ASKED[source].split(", "))
    entries = f"```{{index}} {words}\n```"
    title = r"^# .+(\n+> .+)?$"
    return re.sub(title, lambda m: f"{m[0]}\n\n{entries}", text, count=1, flags=re.M)


def open_answers(text: str) -> str:
    "Stand what is folded on lines of its own: inside a line of HTML, Markdown would stay as it is."
    folded = r"<details><summary>(.+?)</summary>(.+?)</details>"
    return re.sub(folded, r"<details><summary>\1</summary>\n\n\2\n\n</details>\n", text, flags=re.S)


# --- one notebook ---


def code_cell(cell):
    "A code cell as the page shows it; None if the page does not."
    flags, source = flags_of(cell.source), split_directives(cell.source)[1].strip("\n")
    words = {flag.split()[0] for flag in flags} | flags
    if words & HIDDEN or not source:
        return None
    tags = sorted({TAGS[d] for d in words if d in TAGS})
    return nbformat.v4.new_code_cell(
        source, id=cell.id, outputs=cell.outputs, metadata={"tags": tags} if tags else {}
    )


def number_answers(cells) -> None:
    "The folded cells after the heading 'Exercises' are answers: say which."
    start = next(
        (i for i, c in enumerate(cells) if re.search(r"^##+ Exercises", c.source, re.M)), len(cells)
    )
    for n, cell in enumerate(
        (c for c in cells[start:] if "hide-cell" in c.metadata.get("tags", ())), 1
    ):
        cell.metadata["mystnb"] = {
            "code_prompt_show": f"Show answer {n}",
            "code_prompt_hide": f"Hide answer {n}",
        }


def fold_details(cells) -> None:
    "Fold the exported code below the heading 'Details', and say what a click unfolds."
    start = next(
        (i for i, c in enumerate(cells) if re.search(r"^## Details\b", c.source, re.M)), len(cells)
    )
    for cell in cells[start:]:
        if "exported" not in cell.metadata.get("tags", ()):
            continue
        cell.metadata["tags"] = sorted({*cell.metadata["tags"], "hide-input"})
        named = ast.FunctionDef | ast.ClassDef
        names = [node.name for node in ast.parse(cell.source).body if isinstance(node, named)]
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        if names:
            cell.metadata["mystnb"] = {
                f"code_prompt_{verb.lower()}": f"{verb} {', '.join(names[:3])}{more}"
                for verb in ("Show", "Hide")
            }


def badges(path: Path, tpu: bool, depth: int, cfg: dict[str, str]) -> str:
    "The badges of a notebook, Colab and for a TPU Kaggle, and a link to its source."
    where, up = quote(path.relative_to(ROOT).as_posix()), "../" * depth
    github = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{where}"
    found = [
        "[![Open in"
        f" Colab]({up}files/colab.svg)]"
        f"(https://colab.research.google.com/github/{github}){{.badge}}"
    ]
    if tpu:
        source = quote(f"https://github.com/{github}", safe="")
        found.append(
            "[![Open in"
            f" Kaggle]({up}files/kaggle.svg)]"
            f"(https://www.kaggle.com/kernels/welcome?src={source}){{.badge}}"
        )
    address = f"{cfg['git_url']}/blob/{cfg['branch']}/{where}"
    return " ".join([*found, f"[the notebook]({address}){{.notebook-source}}"])


def staged(path: Path, cfg: dict[str, str], names: dict[str, str]):
    "Turn a notebook into a page: no directives or hidden cells, folded code, links, badges."
    nb, depth = nbformat.read(path, as_version=4), len(path.relative_to(ROOT / "nbs").parts) - 1
    module, where = module_of(nb), path.relative_to(ROOT).as_posix()
    cells, words = [], ""
    for cell in nb.cells:
        # its badges are made anew for the site, how long it runs and what it needs is kept
        if cell.id == "page-header":
            words = cell.source.partition("\n\n")[2]
        elif cell.cell_type == "code":
            cells += [c] if (c := code_cell(cell)) else []
        elif cell.cell_type == "markdown":
            text = outside_fences(
                lambda t: symbols(links(open_answers(t), path.parent, depth, cfg), names),
                indexed(cell.source, where) if cell is nb.cells[0] else cell.source,
            )
            cells.append(nbformat.v4.new_markdown_cell(text, id=cell.id))
    number_answers(cells)
    fold_details(cells)
    if cells and cells[0].cell_type == "markdown":
        line = badges(path, nb.metadata.get("accelerator") == "TPU", depth, cfg)
        cells.insert(
            1, nbformat.v4.new_markdown_cell(f"{line}\n\n{words}".strip(), id="badge-line")
        )
    if module and (ROOT / f"contrastive_st/{module}.py").exists():
        note = (
            "Cells with a coloured edge are exported: together they are the module"
            f" `contrastive_st.{module}` ([API reference]({'../' * depth}api/{module}.md))."
        )
        cells.insert(
            2,
            nbformat.v4.new_markdown_cell(
                f"::::{{container}} exported-note\n{note}\n::::", id="exported-note"
            ),
        )
    return nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        },
    )


def module_of(nb) -> str:
    "The module that a notebook is the source of, or ''."
    flags = (flag for cell in nb.cells for flag in flags_of(cell.source))
    return next((f.split()[1] for f in flags if f.startswith("default_exp ")), "")


def title_of(path: Path) -> str:
    "The title of a notebook: its first heading."
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (m := re.search(r"^# (.+)$", cell.source, re.M)):
            return m[1].strip()
    return path.stem


# --- the whole tree ---


def api_pages() -> dict[str, str]:
    "One page per module, and their table of contents."
    explained = {module_of(nbformat.read(path, as_version=4)): path for path in modules()}
    order = [m for m in explained if (ROOT / f"contrastive_st/{m}.py").exists()]
    order += sorted(
        p.stem for p in (ROOT / "contrastive_st").glob("[!_]*.py") if p.stem not in order
    )
    pages, rows = {}, []
    for module in order:
        where = (
            "Explained, built and tested in"
            f" [{title_of(explained[module])}](../{explained[module].name})."
            if module in explained
            else ""
        )
        pages[f"api/{module}.md"] = (
            f"# contrastive_st.{module}\n\n```{{eval-rst}}\n.. automodule::"
            f" contrastive_st.{module}\n```\n".replace("\n\n```", f"\n\n{where}\n\n```", 1)
        )
        text = (ROOT / f"contrastive_st/{module}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(text)) or ""
        rows.append(f"[{module}]({module}.md)\n: {doc.splitlines()[0] if doc else ''}\n")
    # not index.md, which is the page of the module index
    pages["api/overview.md"] = (
        "# API reference\n\nOne page per module, made from the signatures and the comment beside"
        " each parameter. Letters in shapes: B global batch, b per-device batch, C columns of an"
        " example, T tokens, D width, N candidates, K hard negatives, P devices.\n\n"
        + "\n".join(rows)
        + "\n```{toctree}\n:hidden:\n\n"
        + "\n".join(f"{m} <{m}>" for m in order)
        + "\n```\n"
    )
    return pages


def entry(path: Path) -> str:
    "The line of a page in the table of contents: its title, after its number if it has one."
    if path.suffix == ".md":
        return PAGES[path.relative_to(ROOT).as_posix()].removesuffix(".md")
    place = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    if not path.stem[0].isdigit():
        return place
    return f"{path.stem[:2]} {title_of(path)} <{place}>"


def contents(cfg: dict[str, str]) -> str:
    "The site's table of contents, as hidden toctrees for the end of the start page."

    def tree(caption, entries):
        lines = "\n".join(entries)
        return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"

    start = [ROOT / source for source in START if (ROOT / source).exists()]
    tasks, lookup = ([entry(ROOT / source) for source in group] for group in (HOWTO, REFERENCE))
    listed = {*START, *HOWTO, *REFERENCE}
    sources = [source for source in PAGES if (ROOT / source).exists() and source not in listed]
    about = [PAGES[source].removesuffix(".md") for source in sources]
    # a page stands in one tree, or Sphinx would not know which is its parent
    table = {caption: [p for p in pages if p not in start] for caption, pages in parts().items()}
    learn = {
        caption if caption == "Tutorials" else f"Learn {caption}": pages
        for caption, pages in table.items()
    }
    return "\n".join(
        [
            *([tree("Start", map(entry, start))] if start else []),
            tree("How-to", tasks),
            *(tree(caption, map(entry, pages)) for caption, pages in learn.items() if pages),
            tree("Reference", [*lookup, "api/overview"]),
            tree("Project", about + [f"Repository <{cfg['git_url']}>"]),
        ]
    )


def write(path: Path, text: str) -> None:
    "Write a file if its text changed, so that Sphinx rebuilds only what it must."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def stage() -> None:
    "Write all pages into the staging folder and delete those that are no longer wanted."
    cfg, names = settings(), public_names()
    STAGE.mkdir(parents=True, exist_ok=True)
    pages = {
        path.relative_to(ROOT / "nbs").as_posix(): staged(path, cfg, names) for path in notebooks()
    }
    last = nbformat.v4.new_markdown_cell(contents(cfg), id="contents")
    pages["index.ipynb"].cells.append(last)
    pages = {name: nbformat.writes(page) for name, page in pages.items()}
    pages |= api_pages()
    for source, name in PAGES.items():
        if (ROOT / source).exists():
            pages[name] = outside_fences(
                lambda t: links(t, (ROOT / source).parent, 0, cfg),
                indexed((ROOT / source).read_text(encoding="utf-8"), source),
            )
    for old in STAGE.rglob("*"):
        if (
            old.is_file()
            and old.suffix in (".md", ".ipynb")
            and old.relative_to(STAGE).as_posix() not in pages
        ):
            old.unlink()
    for name, text in pages.items():
        write(STAGE / name, text)
    for name in ("colab", "kaggle"):
        write(
            STAGE / f"files/{name}.svg",
            (ROOT / f"docs/_static/{name}.svg").read_text(encoding="utf-8"),
        )


def fetch_mathjax() -> None:
    "Put tex-svg.js of MathJax into the cache, once; its checksum is known."
    target = MATHJAX / "tex-svg.js"

    def intact():
        return target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == MATHJAX_SHA256

    if intact():
        return
    MATHJAX.mkdir(parents=True, exist_ok=True)
    if not shutil.which("npm"):
        sys.exit(
            "the math renderer is missing: install npm (Debian: apt install npm) and build again,"
            f" or put es5/tex-svg.js of MathJax {MATHJAX_VERSION} into {MATHJAX.relative_to(ROOT)}/"
        )
    done = subprocess.run(
        ["npm", "pack", "--silent", f"mathjax@{MATHJAX_VERSION}"],
        cwd=MATHJAX,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"npm could not fetch MathJax {MATHJAX_VERSION}; it said:"
            f" {done.stderr.strip() or done.stdout.strip()}"
        )
    packed = MATHJAX / f"mathjax-{MATHJAX_VERSION}.tgz"
    with tarfile.open(packed) as archive:
        target.write_bytes(archive.extractfile("package/es5/tex-svg.js").read())
    packed.unlink()
    if not intact():
        target.unlink()
        sys.exit(
            f"the tex-svg.js that npm fetched is not the one of MathJax {MATHJAX_VERSION}: its"
            " checksum differs; nothing was built"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="delete what earlier builds left")
    parser.add_argument(
        "--serve", type=int, metavar="PORT", help="serve the site on this machine afterwards"
    )
    args = parser.parse_args()
    if args.fresh:
        for folder in (STAGE, BUILD, SITE):
            shutil.rmtree(folder, ignore_errors=True)
    fetch_mathjax()
    stage()
    # -a: each page holds the contents of all
    options = "-q -W --keep-going -a -c docs".split()
    command = [sys.executable, "-m", "sphinx", *options, "-d", str(BUILD / "doctrees")]
    command += [str(STAGE), str(BUILD / "html")]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode
    if code:
        print("the site was not built: mend what is named above", file=sys.stderr)
        return code
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(BUILD / "html", SITE, ignore=shutil.ignore_patterns("_sources", ".buildinfo*"))
    print(
        f"the site is in {SITE.relative_to(ROOT)}/: open {SITE.relative_to(ROOT)}/index.html, or"
        " python tools/site.py --serve 8000"
    )
    if args.serve:
        print(f"serving http://localhost:{args.serve}/ until you press Ctrl-C")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
        try:
            http.server.ThreadingHTTPServer(("127.0.0.1", args.serve), handler).serve_forever()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
