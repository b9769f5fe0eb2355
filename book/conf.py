"""How Sphinx makes the book. `pruning101 book` gathers the pages beside this file and runs it."""

import re
from pathlib import Path

import pruning101
from pruning101.course import book, links

project = "pruning101"
author = copyright = "the authors of pruning101"
version = release = pruning101.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network: MathJax and its fonts, as a package
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["notebooks/exercises", "parts"]

# The lessons: what is stored in the notebooks is shown, and nothing runs.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# The library.
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
viewcode_follow_imported_members = False  # a source links to the page of its own module
default_role = "py:obj"
maximum_signature_line_length = 120
napoleon_numpy_docstring = False
add_module_names = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

html_theme = "sphinx_book_theme"
html_title = "pruning101"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_search_summary = False  # summaries are fetched, which pages opened from a disk may not do
html_context = {"default_mode": "auto"}
_home = links.home(Path(__file__).parent)  # the setting in pyproject.toml, which lies beside this
html_theme_options = {
    "home_page_in_toc": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search stands in the sidebar
    "repository_url": _home.url,
    "repository_branch": _home.branch,
    "use_repository_button": True,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
}


# --- docstrings ---------------------------------------------------------------------------------

_LITERAL = re.compile(r"(``.+?``)")


def plain_to_rst(app, what, name, obj, options, lines):
    """Make of a docstring in plain text what reStructuredText takes for the same: an indented
    formula is shown as it stands, and a bar is a bar.
    """
    result, shown, base = [], False, ""
    for number, line in enumerate(lines):
        if line and not line.startswith(" "):
            shown, base = line.endswith("::"), line
        elif (
            line.startswith("    ")
            and not shown
            and lines[max(number - 2, 0) : number] == [base, ""]
        ):
            result += [".. code-block:: text", ""]
            shown = True
        if not (shown and line.startswith(" ")):
            parts = _LITERAL.split(line)
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            line = "".join(parts)
        result.append(line)
    lines[:] = result


# A topic hands on what stands in the core: both names lead to the one place.
HANDED_ON = {
    f"{module.name}.{name.split('.')[-1]}": name
    for module in book.modules()
    for name in module.handed_on
}


def in_the_package(app, env, node, content):
    """Find `core.masks` where `pruning101.core.masks` is meant, and what a topic hands on."""
    target = node.get("reftarget", "")
    known = HANDED_ON.get(target, f"pruning101.{target}" if target.startswith("core.") else "")
    if node.get("refdomain") != "py" or not known:
        return None
    place = (env, node["refdoc"], app.builder, node["reftype"], HANDED_ON.get(known, known))
    return env.get_domain("py").resolve_xref(*place, node, content)


def setup(app):
    """Connect what is above; what docstrings get here, they get before napoleon reads them."""
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)
    app.connect("missing-reference", in_the_package)
