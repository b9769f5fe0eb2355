"""How Sphinx makes the book. `pruning101 book` gathers the pages beside this file and runs it."""

import pydoc
import re
from pathlib import Path

import pruning101
from pruning101.course import links

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
autodoc_preserve_defaults = True  # a function as a default is shown by its name
viewcode_follow_imported_members = False  # a source links to the page of its own module
default_role = "py:obj"
maximum_signature_line_length = 120
napoleon_numpy_docstring = False
nitpicky = True  # a function or module that a docstring refers to must be there
nitpick_ignore_regex = [("py:(?!func|meth|mod).*", ".*")]
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
    # napoleon would take what stands before the first colon of an attribute's text for its type
    result, shown, base = [""] if what in ("attribute", "property") else [], False, ""
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


def in_the_package(app, env, node, content):
    """Find what docstrings name more shortly than in full, and what a topic hands on from the core:
    both lead to where the thing is defined.
    """
    target, module = node.get("reftarget", ""), node.get("py:module") or "pruning101"
    if node.get("refdomain") != "py" or (node["reftype"] == "obj" and "." not in target):
        return None
    for name in (target, f"{module}.{target}", f"pruning101.{target}", f"pruning101.core.{target}"):
        thing = pydoc.locate(name) if name.startswith("pruning101.") else None
        if hasattr(thing, "__qualname__"):
            name = f"{thing.__module__}.{thing.__qualname__}"
        if thing is not None:
            place = (env, node["refdoc"], app.builder, node["reftype"], name)
            return env.get_domain("py").resolve_xref(*place, node, content)
    return None


def setup(app):
    """Connect what is above; what docstrings get here, they get before napoleon reads them."""
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)
    app.connect("missing-reference", in_the_package)
