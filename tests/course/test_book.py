"""The book: every lesson and module is in it, every link leads somewhere, its figures are those of
the results, and it needs no network.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import pruning101
from pruning101.course import book, book_methods, cli
from pruning101.course.build import KERNEL
from pruning101.course.material import lessons

ROOT = Path(__file__).resolve().parents[2]
METHODS = ROOT / "book" / "methods.toml"
ADDED = "42_added"
RARE = "quaggafolding"  # a word that stands in the added lesson only
DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HIDDEN_CHECK = """assert keep(1) == 1
### BEGIN HIDDEN TESTS
assert keep(2) == 2, "never handed out"
### END HIDDEN TESTS"""


def markdown(notebook):
    return book._markdown(json.loads(notebook.read_text(encoding="utf-8")))


def recaps(root=ROOT):
    return {lesson.name: markdown(lesson.notebook) for lesson in lessons(root)}


def add_lesson(root):
    """Write a lesson's notebook into `root`, as somebody will who knows nothing of the book."""
    cell = nbformat.v4
    figure = cell.new_output("display_data", data={"image/png": DOT, "text/plain": ["<Figure>"]})
    alt = {"mystnb": {"image": {"alt": "One dot, alone."}}}
    cells = [
        cell.new_markdown_cell(
            "# An added lesson\n\n[![Open in Colab](https://example.org/badge.svg)]"
            "(https://example.org/42)\n\nreading: 5 minutes\n\n## Set-up"
        ),
        cell.new_code_cell("from pruning101 import structured\nfrom pruning101.core import masks"),
        cell.new_markdown_cell(f"See [lesson 3](03_magnitude.ipynb) on {RARE}: $x^2$."),
        cell.new_code_cell("plot()", metadata=alt, outputs=[figure], execution_count=1),
        cell.new_code_cell(HIDDEN_CHECK),
        cell.new_markdown_cell(
            "<details><summary>Is $x$ small?</summary>It is $y$, says `keep`.</details>"
            "\n\n## Recap\n\n"
            "| method | removes | score | looks at data | makes it really smaller |\n"
            "| --- | --- | --- | --- | --- |\n| quagga | stripes | width | no | yes |\n"
        ),
    ]
    for number, each in enumerate(cells):
        each["id"] = f"42-{number:03d}"
    notebook = cell.new_notebook(cells=cells, metadata=KERNEL)
    nbformat.write(notebook, root / "notebooks" / f"{ADDED}.ipynb")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the book is made of, with one lesson more."""
    root = tmp_path_factory.mktemp("book") / "course"
    for folder in ("book", "lessons", "notebooks", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    add_lesson(root)
    return root


@pytest.fixture(scope="module")
def source(tree):
    folder = tree.parent / "source"
    book.gather(tree, folder)
    return folder


@pytest.fixture(scope="module")
def html(tree):
    """The built book; every way out of this machine is closed while it is built."""
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinxcontrib.bibtex"):
        if importlib.util.find_spec(name) is None:
            message = f"no {name}: install the extra `book`"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.delenv("NO_PROXY", raising=False)
        return book.book(tree.parent / "html", tree).parent


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loaded, self.images = set(), [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"):
            self.loaded.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "img":
            self.images.append((given.get("src"), given.get("alt")))


@functools.cache
def read(path):
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def faults_of_links(folder):
    """Every relative link, image, script and style of every page that leads nowhere."""
    for path in sorted(folder.rglob("*.html")):
        if path.name == "search.html" or path.name.endswith("webpack-macros.html"):
            continue
        page = read(path)
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = path.parent.joinpath(unquote(parts.path)).resolve() if parts.path else path
            where = path.relative_to(folder)
            if not target.is_file():
                yield f"{where}: {link} is no file"
                continue
            if parts.fragment and unquote(parts.fragment) not in read(target).ids:
                yield f"{where}: {link} is no place in that page"


# --- methods ------------------------------------------------------------------------------------


def test_a_method_belongs_to_the_first_lesson_that_lists_it_and_reads_as_in_the_last():
    head = "| method | removes | score | looks at data | makes it really smaller |\n|-|-|-|-|-|\n"
    texts = {
        "01_a": f"{head}| one | w | s | no | no |\n",
        "02_b": f"{head}| one | w | t | no | no |\n",
    }
    other = "\n| method | accuracy |\n|-|-|\n| original | 3 |\n"
    texts["02_b"] += "| two | u | t | yes | yes |\n" + other
    rows = book_methods.methods(texts)
    assert [(row.name, row.score, row.lesson) for row in rows] == [
        ("one", "t", "01_a"),
        ("two", "t", "02_b"),
    ]
    with pytest.raises(ValueError, match=r"03_c: the recap's row of 'three' has 4 columns"):
        book_methods.methods({"03_c": f"{head}| three | w | s | no |\n"})


def test_figures_are_found_by_their_place():
    given = {"rows": [{"kind": "a", "x": 1.0}, {"kind": "b", "x": 2.0}, {"kind": "b", "x": 4.0}]}
    text = "{rows/#} {rows/0/x:.1f} {rows/*/x:.2f} {rows/kind=b/*/x:.0%} {rows/kind=b/-1/x:g}"
    assert book_methods.filled(text, given, "here") == "3 1.0 2.33 300% 4"
    for wrong in ("{rows/7/x}", "{row/0/x}", "{rows/kind=c/0/x}", "{rows/0}", "{rows/0/kind:.1f}"):
        with pytest.raises(ValueError, match=r"here: the results have no figure at '[^']+'"):
            book_methods.filled(wrong, given, "here")


def test_the_methods_page_shows_what_the_results_hold(tmp_path):
    results = shutil.copytree(ROOT / "results", tmp_path / "results")
    before = book_methods.page_parts(recaps(), METHODS, results)["measured"]
    path = results / "han2015_mnist.json"
    kept = json.loads(path.read_text())
    old = kept["nets"]["lenet_300_100"]["mean_test_error"]["pruned"]
    kept["nets"]["lenet_300_100"]["mean_test_error"]["pruned"] = 77.7777
    path.write_text(json.dumps(kept))
    after = book_methods.page_parts(recaps(), METHODS, results)["measured"]
    shown = f"{old:.2f}\N{NO-BREAK SPACE}% after"
    assert shown in before
    assert after == before.replace(shown, "77.78\N{NO-BREAK SPACE}% after")


def test_the_sentences_on_methods_hold_no_typed_figures():
    units = r"LeNet-300-100|LeNet-5|ResNet-\d+|CIFAR-10"
    for name, told in tomllib.loads(METHODS.read_text()).items():
        typed = re.sub(rf"\{{[^{{}}]*\}}|{units}", "", told.get("measured", ""))
        assert not re.search(r"\d", typed), f"{name}: {typed}"


def test_a_method_that_no_lesson_lists_is_refused(tmp_path):
    added = tmp_path / "methods.toml"
    added.write_text('["magnitude prunning"]\ntrains_again = "no"\n')
    with pytest.raises(ValueError, match="no lesson's recap lists the method 'magnitude prunning'"):
        book_methods.page_parts(recaps(), added, ROOT / "results")


def test_every_method_of_the_course_is_told_whole():
    told = tomllib.loads(METHODS.read_text())
    lacking = [row.name for row in book_methods.methods(recaps()) if row.name not in told]
    assert lacking == [], f"book/methods.toml has no entry for {', '.join(lacking)}"


# --- gathering ----------------------------------------------------------------------------------


def test_public_modules_are_all_there_and_no_others():
    import pkgutil

    named = {module.name for module in book.modules()}
    topics = {
        m.name for m in pkgutil.iter_modules(pruning101.__path__, "pruning101.") if not m.ispkg
    }
    core = importlib.import_module("pruning101.core").__path__
    inside = {m.name for m in pkgutil.iter_modules(core, "pruning101.core.")}
    assert named == {name for name in topics | inside if "._" not in name}


def test_an_added_lesson_needs_nothing_else(source):
    notebook = json.loads((source / "notebooks" / f"{ADDED}.ipynb").read_text())
    text = book._markdown(notebook)
    assert "{py:mod}`pruning101.structured`" in text
    assert "{py:mod}`pruning101.sensitivity`" in text, "what structured hands on is taught, too"
    assert text.index("pruning101.structured") < text.index("## Set-up")
    assert "{py:mod}`~pruning101.core.masks`" in text
    page = (source / "api" / "topics" / "structured.md").read_text()
    assert f"Used in: {{doc}}`/notebooks/{ADDED}`" in page
    assert "| quagga | stripes |" in (source / "parts" / "methods.md").read_text()
    assert f"| quagga | {{doc}}`/notebooks/{ADDED}`" in (source / "parts" / "where.md").read_text()


def test_badges_become_words_and_answers_are_read_as_markdown(source):
    text = book._markdown(json.loads((source / "notebooks" / f"{ADDED}.ipynb").read_text()))
    assert "[Open in Colab](https://example.org/42)" in text
    assert "badge.svg" not in text
    assert r'<summary class="tex2jax_process">Is \(x\) small?</summary>' in text
    assert "</summary>\n\nIt is $y$, says `keep`.\n\n</details>" in text


def test_hidden_tests_stay_hidden(source):
    for path in (source / "notebooks").glob("*.ipynb"):
        assert "HIDDEN TESTS" not in path.read_text(), path.name
    notebook = json.loads((source / "notebooks" / f"{ADDED}.ipynb").read_text())
    assert notebook["cells"][4]["source"] == "assert keep(1) == 1"


def test_symbols_and_glossary_come_from_the_index(source):
    index = markdown(ROOT / "notebooks" / "index.ipynb")
    for name in ("symbols", "glossary"):
        part = (source / "parts" / f"{name}.md").read_text().strip()
        assert len(part) > 1000
        assert part in index
        assert part not in (source / "parts" / "course.md").read_text()


def test_an_index_without_a_glossary_is_told(tree, tmp_path):
    shutil.copytree(tree / "notebooks", tmp_path / "notebooks")
    path = tmp_path / "notebooks" / "index.ipynb"
    path.write_text(path.read_text().replace("## Glossary", "## Words"))
    with pytest.raises(ValueError, match="index of the lessons has no section glossary"):
        book._index_parts(tmp_path)


# --- what stops it ------------------------------------------------------------------------------


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than a book"):
        book.book(tmp_path, ROOT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_installed_course_has_no_book(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no folder `book`"):
        book.book(tmp_path / "html", tmp_path)


def test_a_missing_sphinx_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pruning101\[book\]'"):
        book.book(tmp_path / "html", ROOT)


def test_a_fault_leaves_the_last_book_as_it_was(tree, tmp_path, monkeypatch):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / ".buildinfo").write_text("the last one")
    commands, failed = [], SimpleNamespace(returncode=1)
    monkeypatch.setattr(book.subprocess, "run", lambda line: commands.append(line) or failed)
    with pytest.raises(RuntimeError, match="Sphinx found the faults"):
        book.book(tmp_path / "html", tree)
    assert [path.name for path in tmp_path.iterdir()] == ["html"]
    assert (tmp_path / "html" / ".buildinfo").read_text() == "the last one"
    assert {"-W", "--keep-going"} <= set(commands[0]), "a warning is a fault"


def test_the_command_prints_where_the_book_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "book", lambda out: out / "index.html")
    assert cli.main(["book", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"


# --- the built pages ----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_lesson_and_every_public_name_has_its_place(html, tree):
    for lesson in lessons(tree):
        assert (html / "notebooks" / f"{lesson.name}.html").is_file(), lesson.name
    for module in book.modules():
        page = read(html / Path(module.page).with_suffix(".html"))
        python = importlib.import_module(module.name)
        assert f"module-{module.name}" in page.ids
        own = [name for name, value in vars(python).items() if defined_in(value) == module.name]
        for name in getattr(python, "__all__", own):
            if defined_in(getattr(python, name)) and not name.startswith("_"):
                assert f"{module.name}.{name}" in page.ids


def defined_in(value):
    """The module that a function or class was defined in; None for anything else."""
    return value.__module__ if inspect.isfunction(value) or inspect.isclass(value) else None


@pytest.mark.slow
def test_signatures_are_read(html):
    for module in book.modules():
        text = (html / module.page).with_suffix(".html").read_text()
        assert ">~" not in text, f"a signature of {module.name} is shown as it came"


@pytest.mark.slow
def test_no_link_is_dead(html):
    assert list(faults_of_links(html)) == []


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(html):
    for path in html.rglob("*.html"):
        remote = [each for each in read(path).loaded if urlsplit(each).netloc]
        assert remote == [], path.name


@pytest.mark.slow
def test_every_figure_is_described(html, tree):
    seen = 0
    for lesson in lessons(tree):
        images = read(html / "notebooks" / f"{lesson.name}.html").images
        for source, alt in images:
            assert alt, f"{lesson.name}: {source}"
            assert alt.strip() not in ("", Path(source).name, source), f"{lesson.name}: {alt}"
        notebook = json.loads(lesson.notebook.read_text(encoding="utf-8"))
        wanted = [
            cell["metadata"]["mystnb"]["image"]["alt"]
            for cell in notebook["cells"]
            if "image" in cell["metadata"].get("mystnb", {})
            and any("image/png" in out.get("data", {}) for out in cell["outputs"])
        ]
        said = [" ".join(alt.split()) for _, alt in images]
        assert [" ".join(alt.split()) for alt in wanted if " ".join(alt.split()) not in said] == []
        seen += len(wanted)
    assert seen > 50
    for path in html.rglob("*.html"):
        assert all(alt for _, alt in read(path).images), path.name


@pytest.mark.slow
def test_lessons_link_to_the_reference_and_back(html, tree):
    names = {module.name.split(".")[-1]: module for module in book.modules()}
    for lesson in lessons(tree):
        topic = lesson.name.partition("_")[2]
        for other in ["structured", "sensitivity"] if lesson.name == ADDED else [topic]:
            page = Path(names[other].page).with_suffix(".html")
            there = read(html / "notebooks" / f"{lesson.name}.html").links
            back = read(html / page).links
            # More than once: the sidebar of every page has every page.
            assert paths(there).count(f"../{page}") > 1, (lesson.name, other)
            assert paths(back).count(f"../../notebooks/{lesson.name}.html") > 1, (
                other,
                lesson.name,
            )


def paths(links):
    return [urlsplit(link).path for link in links]


@pytest.mark.slow
def test_names_on_the_methods_page_lead_to_the_reference(html):
    text = (html / "methods.html").read_text()
    names = re.findall(r'<code class="xref py py-obj', text)
    linked = re.findall(r'<a class="reference internal"[^>]*><code class="xref py py-obj', text)
    assert len(linked) == len(names) > 30


@pytest.mark.slow
def test_lessons_can_be_launched_and_exercises_downloaded(html):
    told = (html / "notebooks" / "03_magnitude.html").read_text()
    assert re.search(
        r"colab\.research\.google\.com/github/[^\"]+/notebooks/03_magnitude\.ipynb", told
    )
    assert re.search(r"mybinder\.org/v2/gh/[^\"]+/notebooks/03_magnitude\.ipynb", told)
    downloads = [link for link in read(html / "index.html").links if link.startswith("_downloads/")]
    assert {Path(link).stem for link in downloads} == {lesson.name for lesson in lessons(ROOT)}


# --- in the browser -----------------------------------------------------------------------------


# The least contrast of a text with what lies behind it, and that text.
CONTRAST = """() => {
    const channel = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) =>
        0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    let worst = [99, "", 0];
    const walker = document.createTreeWalker(
        document.querySelector("article"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
        if (element.closest(".headerlink, mjx-assistive-mml, script, style")) continue;
        const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < worst[0]) worst = [ratio, walker.currentNode.data.trim().slice(0, 60), 0];
        worst[2] += 1;
    }
    return worst;
}"""


@pytest.fixture
def visit(browser, html):
    """A function that opens a page from the disk in a narrow window of a colour scheme; the page
    collects its complaints, and what it asks the network for, in `complaints`.
    """
    contexts = []

    def start(scheme="light"):
        size = {"width": 400, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.complaints = []
        page.on("console", lambda said: said.type == "error" and page.complaints.append(said.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda ask: ask.url[:4] == "http" and page.complaints.append(ask.url))
        return page

    yield start
    for context in contexts:
        context.close()


@pytest.mark.slow
def test_every_page_is_quiet_and_fits_a_telephone(visit, html):
    page = visit()
    names = [path for path in html.rglob("*.html") if path.parts[-2] != "_static"]
    names = [path for path in names if "_modules" not in path.parts]
    assert len(names) > 70
    for path in names:
        page.goto(path.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 400, f"{path.relative_to(html)} is {width} pixels wide"
        assert page.complaints == [], path.relative_to(html)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_legible(visit, html, scheme):
    page = visit(scheme)
    names = ["index", "methods", "symbols", "instructor", "api/topics/lacoot", "api/core/training"]
    for name in [*names, "notebooks/03_magnitude", "notebooks/04_lottery_tickets"]:
        page.goto((html / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        ratio, text, count = page.evaluate(CONTRAST)
        assert count > 20, name
        assert ratio >= 4, f"{name}: {text!r} has a contrast of {ratio:.1f}"
    assert page.complaints == []


@pytest.mark.slow
def test_formulas_are_set_without_a_network(visit, html):
    page = visit()
    page.goto((html / "notebooks" / "03_magnitude.html").as_uri())
    page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
    page.evaluate("MathJax.startup.promise")
    assert page.locator("mjx-container").count() > 20
    assert page.locator("mjx-merror").count() == 0
    fonts = "Array.from(document.fonts).some(f => f.family.includes('MJX') && f.status == 'loaded')"
    page.wait_for_function(fonts)
    assert page.complaints == []


@pytest.mark.slow
def test_a_rare_word_is_found(visit, html):
    page = visit()
    page.goto((html / "index.html").as_uri())
    page.keyboard.press("Control+k")
    page.keyboard.type(RARE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert page.locator("#search-results li a").all_inner_texts() == ["An added lesson"]
    page.locator("#search-results li a").click()
    page.wait_for_url(f"**/{ADDED}.html*")
    assert RARE in page.locator("article").inner_text()
    assert page.complaints == []
