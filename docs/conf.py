"""Sphinx configuration: tools/site.py stages the pages, settings.ini has all about the project."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

parser = ConfigParser(delimiters="=")
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
html_title = settings["title"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "docments"]

# notebooks: committed outputs are shown, nothing is executed
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# API reference: types and defaults stand in the tables that docments.py makes
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True}
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
default_role = "literal"
smartquotes = False

# math and everything else comes from this machine: no page loads anything from elsewhere
mathjax_path = "tex-svg.js"
html_static_path = ["_static", "../.cache/mathjax"]
html_css_files = ["site.css"]
# the figures that readers can move; a page without one is left alone
html_js_files = [
    (name, {"defer": "defer"}) for name in ("touch.js", "similarity_matrix.js", "draw_window.js")
]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None

html_theme = "furo"
pygments_style = "github-light"
pygments_dark_style = "github-dark"
html_theme_options = {"top_of_page_buttons": [], "navigation_with_keys": True}
