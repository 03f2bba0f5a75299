"""Write README.md and its pictures (docs/images/) from nbs/index.ipynb.

    python tools/readme.py           # write
    python tools/readme.py --check   # exit 1 if README.md or a picture is stale

Directive lines and hidden cells are dropped, outputs are kept as they were committed, links are
made relative to the repository, and a line of badges built from settings.ini follows the title.
"""

import argparse
import base64
import re
import sys
from html import unescape
from pathlib import Path, PurePosixPath

import nbformat
from jinja2 import DictLoader
from nbconvert import MarkdownExporter
from pages import HIDDEN, ROOT, flags_of, settings, split_directives

FENCES = """{%- extends 'markdown/index.md.j2' -%}
{%- block input %}
```python
{{ cell.source }}
```
{% endblock input %}
{%- block stream %}
```text
{{ output.text | strip_ansi | trim('\\n') }}
```
{% endblock stream %}
{%- block data_text %}
```text
{{ output.data['text/plain'] | strip_ansi | trim('\\n') }}
```
{% endblock data_text %}
"""


def shown(cell):
    "A cell as the README shows it: without directives; None if the README leaves it out."
    flags, source = flags_of(cell.source), split_directives(cell.source)[1].strip("\n")
    # the README has badges of its own
    if cell.cell_type == "raw" or flags & HIDDEN or cell.id == "page-header" or not source:
        return None
    if cell.cell_type == "markdown":
        return nbformat.v4.new_markdown_cell(source, id=cell.id)
    outputs = (
        []
        if flags & {"hide_output", "output: false"}
        else [o for o in cell.outputs if o.get("name") != "stderr"]
    )
    if flags & {"hide_input", "echo: false"}:
        source = ""
    return nbformat.v4.new_code_cell(source, id=cell.id, outputs=outputs)


def pictures(nb) -> dict[str, bytes]:
    "Take plots and drawings out of the outputs: name -> bytes; each becomes a link to its file."
    files = {}
    for cell, output in ((c, o) for c in nb.cells if c.cell_type == "code" for o in c.outputs):
        svg = output.get("data", {}).get("text/html", "")
        if svg.startswith("<svg "):
            # a file cannot ask the page for the colour of its letters
            files[f"{cell.id}.svg"] = svg.replace("currentColor", "#777777").encode()
            alt = unescape(re.search(r'aria-label="([^"]*)"', svg)[1])
            link = {"text/markdown": f"![{alt}](docs/images/{cell.id}.svg)"}
            output.data = nbformat.from_dict(link)
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        for n, output in enumerate(o for o in cell.outputs if "image/png" in o.get("data", {})):
            name = f"{cell.id}{f'-{n + 1}' if n else ''}.png"
            files[name] = base64.b64decode(output.data.pop("image/png"))
            output.data = nbformat.from_dict(
                {"text/markdown": f"![{cell.id.replace('-', ' ')}](docs/images/{name})"}
            )
    return files


def relative(text: str, known) -> str:
    "Turn a notebook's links into links from the root: 07_data.ipynb becomes nbs/07_data.ipynb."

    def link(match):
        if match[1] is None:  # inline code
            return match[0]
        parts = []
        for part in PurePosixPath("nbs", match[2]).parts:
            parts = parts[:-1] if part == ".." and parts else parts + [part]
        path = "/".join(parts)
        if not known(path):
            sys.exit(f"nbs/index.ipynb links to {match[2]}, but there is no {path}: mend the link")
        return f"{match[1]}({path}{match[3] or ''})"

    return re.sub(r"`[^`\n]*`|(\[[^\]]*\])\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)", link, text)


def badges(cfg: dict[str, str]) -> str:
    "One line: tests, documentation, Colab."
    git = cfg["git_url"]
    branch = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}"
    colab = f"https://colab.research.google.com/github/{branch}/nbs/index.ipynb"
    site = cfg["doc_host"] + cfg["doc_baseurl"]
    return (
        f"[![tests]({git}/actions/workflows/test.yml/badge.svg)]({git}/actions/workflows/test.yml)"
        f" [![documentation]({git}/actions/workflows/docs.yml/badge.svg)]({site}/)"
        f" [![Open in Colab](docs/_static/colab.svg)]({colab})"
    )


def render(root: Path) -> tuple[str, dict[str, bytes]]:
    "The text of README.md and its pictures."
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    nb = nbformat.v4.new_notebook(
        cells=[c for c in map(shown, nb.cells) if c], metadata={"language_info": {"name": "python"}}
    )
    for cell in (c for c in nb.cells if c.cell_type == "markdown"):
        parts = re.split(r"(^ *```.*?^ *``` *$)", cell.source, flags=re.M | re.S)
        cell.source = "".join(
            p if i % 2 else relative(p, lambda path: (root / path).exists())
            for i, p in enumerate(parts)
        )
    files = pictures(nb)
    exporter = MarkdownExporter(
        extra_loaders=[DictLoader({"fences.md.j2": FENCES})], template_file="fences.md.j2"
    )
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r"```python\s*```\n", "", text)  # cells shown without their source
    text = (
        re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()
        + "\n"
    )
    title = re.search(r"^# .+\n(\n*> .+\n)*", text, re.M)
    if not title:
        sys.exit("nbs/index.ipynb has no title: begin its first cell with '# ' and a name")
    head = (
        "<!-- Written by tools/readme.py from nbs/index.ipynb: edit the notebook, then run `make"
        " readme`. -->\n"
    )
    return (
        head + text[: title.end()] + "\n" + badges(settings(root)) + "\n" + text[title.end() :],
        files,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if what is there is stale"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    root = args.root.resolve()
    if not (root / "nbs/index.ipynb").exists():
        print("there is no nbs/index.ipynb to write README.md from")
        return 1
    text, files = render(root)
    wanted = {root / "README.md": text.encode()} | {
        root / "docs/images" / name: data for name, data in files.items()
    }
    left = {p for p in (root / "docs/images").glob("*.*") if p.is_file()} - set(wanted)
    stale = sorted(
        p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data
    ) + sorted(left)
    if args.check:
        if stale:
            names = ", ".join(p.relative_to(root).as_posix() for p in stale)
            print(f"stale: {names}: not what nbs/index.ipynb says; run `make readme` and commit")
        return 1 if stale else 0
    for path in left:
        path.unlink()
    for path, data in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(
        f"README.md: {len(text.split()):,} words, {len(files)} pictures"
        + ("" if stale else ", as it was")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
