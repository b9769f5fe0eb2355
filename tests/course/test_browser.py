"""Real JupyterLab in Chromium: a lesson runs, its widget answers mouse and keyboard under names
that can be read aloud, and a learner gets from the index to a solved and saved exercise.
"""

import shutil
from pathlib import Path

import nbformat
import pytest

from pruning101.course import material

ROOT = Path(__file__).resolve().parents[2]
MINUTE = 60_000  # milliseconds
LESSONS = ["03_magnitude", "04_lottery_tickets", "05_structured"]
LESSONS += ["06_layer_folding", "07_activation_entropy", "08_layer_collapse", "09_lacoot"]

RUNNING = """() => {
    const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    return Boolean(panel && panel.context && panel.context.isReady
        && panel.sessionContext.session && panel.sessionContext.session.kernel
        && panel.sessionContext.session.kernel.status === "idle");
}"""
CELLS = """() => {
    const WIDGET = "application/vnd.jupyter.widget-view+json";
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
    return Array.from({length: cells.length}, (_, i) => cells.get(i)).map((cell) => {
        const data = cell.toJSON();
        const outputs = data.outputs || [];
        return {
            code: data.cell_type === "code" && data.source.length > 0,
            source: data.source,
            count: data.execution_count || null,
            errors: outputs.filter((out) => out.output_type === "error").map((out) => out.evalue),
            widget: outputs.some((out) => out.data && WIDGET in out.data),
        };
    });
}"""
CLEAR_AND_RUN = """async () => {
    await window.jupyterapp.commands.execute("notebook:clear-all-cell-outputs");
    await window.jupyterapp.commands.execute("notebook:run-all-cells");
}"""
SHOW = """async (index) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, "start");
}"""
# What the widget shows, apart from its sliders: pictures by their bytes, texts as they stand.
SHOWN = """async (area) => {
    const parts = [];
    for (const image of area.querySelectorAll("img")) {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        let sum = 0;
        for (const byte of bytes) sum = (sum * 31 + byte) >>> 0;
        parts.push(`image ${bytes.length} ${sum}`);
    }
    for (const text of area.querySelectorAll(".widget-html-content")) parts.push(text.textContent);
    return parts.join("\\n");
}"""
# Whether the notebook in front is the one at this path, ready to run.
IN_FRONT = f"""(path) => {{
    const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    return Boolean(panel && panel.context && panel.context.path === path && ({RUNNING})());
}}"""
DIRTY = "() => window.jupyterapp.shell.currentWidget.context.model.dirty"
ACTIVE = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
DARK = """async () => {
    const theme = {theme: "JupyterLab Dark"};
    await window.jupyterapp.commands.execute("apputils:change-theme", theme);
}"""
# Controls that a screen reader could not name.
NAMELESS = """(area) => Array.from(area.querySelectorAll("input, select, textarea, button"))
    .filter((control) => !Array.from(control.labels || []).some((label) => label.textContent.trim())
        && !control.textContent.trim() && !control.getAttribute("aria-label"))
    .map((control) => control.outerHTML)"""
# Texts whose contrast to what they stand on is below what WCAG asks of ordinary text.
FAINT = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = channels(color).slice(0, 3).map((value) => value / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const faint = [];
    const texts = ".jp-RenderedMarkdown *, .jp-OutputArea-output *, .jp-OutputArea-output";
    for (const element of document.querySelectorAll(texts)) {
        const own = Array.from(element.childNodes).filter((node) => node.nodeType === 3);
        const text = own.map((node) => node.textContent).join("").trim();
        if (!text || !element.offsetParent || element.closest("svg, .jp-mod-noOutputs")) continue;
        let ground = element;
        const clear = (node) => (channels(getComputedStyle(node).backgroundColor)[3] ?? 1) < 0.5;
        while (ground.parentElement && clear(ground)) ground = ground.parentElement;
        const pair = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
        const [low, high] = pair.map(light).sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) faint.push(`${pair} ${text.slice(0, 60)}`);
    }
    return faint;
}"""


def opened(browser, address):
    """A page on JupyterLab at `address`, and the list that its complaints are added to: console
    errors and questions that the browser asks.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    complaints = []

    def asked(dialog):
        complaints.append(f"{dialog.type}: {dialog.message}")
        dialog.accept()

    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", asked)
    page.goto(address)
    page.wait_for_function(RUNNING, timeout=2 * MINUTE)
    assert popped_up(page) == []
    return page, complaints


def popped_up(page):
    return page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()


def go_dark(page, screenshot):
    page.evaluate(DARK)
    page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=MINUTE)
    page.screenshot(path=screenshot)


def run_and_move(browser, address, notebook, screenshot):
    """Run all of `notebook`, move its widget's first slider by keyboard and mouse; return the
    complaints.
    """
    page, complaints = opened(browser, address.replace("index.ipynb", notebook))
    page.evaluate(CLEAR_AND_RUN)
    page.wait_for_function(RUNNING, timeout=5 * MINUTE)
    cells = page.evaluate(CELLS)
    assert [error for cell in cells for error in cell["errors"]] == []
    assert all(cell["count"] for cell in cells if cell["code"]), "every code cell was executed"
    widgets = [index for index, cell in enumerate(cells) if cell["widget"]]
    assert widgets, "the lesson shows a widget"

    page.evaluate(SHOW, widgets[0])
    area = page.locator(".jp-Notebook .jp-Cell.jp-mod-active .jp-OutputArea").first
    handle = area.locator(".widget-slider [role=slider], .widget-slider .ui-slider-handle").first
    handle.wait_for(timeout=MINUTE)
    handle.scroll_into_view_if_needed()
    area_element = area.element_handle()
    before = area_element.evaluate(SHOWN)

    def changed(*since):
        page.wait_for_function(
            f"async ([area, since]) => !since.includes(await ({SHOWN})(area))",
            arg=[area_element, since],
            timeout=MINUTE,
        )
        return area_element.evaluate(SHOWN)

    handle.focus()
    at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
    by_keyboard = changed(before)

    track = area.locator(
        ".widget-slider .slider, .widget-slider .slider-container"
    ).first.bounding_box()
    grip = handle.bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    far = 0.1 if grip["x"] > track["x"] + track["width"] / 2 else 0.9
    page.mouse.move(track["x"] + far * track["width"], grip["y"] + grip["height"] / 2, steps=8)
    page.mouse.up()
    changed(before, by_keyboard)  # a drag passes through the values that were shown before
    page.screenshot(path=screenshot)

    assert area_element.evaluate(NAMELESS) == []
    sliders = area.locator("[role=slider]").count()
    assert sliders == area.get_by_role("spinbutton").count(), "each slider has its named box"
    assert page.evaluate(FAINT) == []
    go_dark(page, screenshot.with_suffix(".dark.png"))
    assert page.evaluate(FAINT) == [], "the dark theme is as legible"
    page.close()
    return complaints


@pytest.fixture
def app(tmp_path):
    """Settings by which the page hands out its application object, to be asked about its cells."""
    folder = tmp_path / "jupyter"
    folder.mkdir()
    config = "c = get_config()\nc.LabApp.expose_app_in_browser = True\n"
    (folder / "jupyter_lab_config.py").write_text(config)
    return {"JUPYTER_CONFIG_DIR": str(folder)}


@pytest.mark.slow
def test_the_tiny_lesson_answers_its_slider(browser, serve, app, built, tmp_path):
    address = serve(**app, PRUNING101_MATERIAL=str(built))
    assert run_and_move(browser, address, "07_tiny.ipynb", tmp_path / "tiny.png") == []
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def by_link(page, words, path):
    """Follow a link of the page in front by keyboard; wait until the notebook `path` is there."""
    link = page.locator(".jp-Notebook:visible a", has_text=words).first
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(IN_FRONT, arg=path, timeout=2 * MINUTE)
    assert popped_up(page) == []


def failed(page, cells):
    """Run `cells` of the notebook in front by Shift-Enter, each from its place; whether each
    showed an error.
    """
    result = []
    for index in cells:
        count = page.evaluate(CELLS)[index]["count"]
        page.evaluate(SHOW, index)
        page.keyboard.press("Shift+Enter")
        page.wait_for_function(
            f"([index, count]) => ![null, count].includes(({CELLS})()[index].count)",
            arg=[index, count],
            timeout=MINUTE,
        )
        page.wait_for_function(RUNNING, timeout=MINUTE)
        result.append(page.evaluate(CELLS)[index]["errors"] != [])
    return result


@pytest.mark.slow
def test_from_the_index_to_a_saved_exercise_by_keyboard(browser, serve, app, built, tmp_path):
    address = serve(**app, PRUNING101_MATERIAL=str(built))
    page, complaints = opened(browser, address)
    before = (built / "notebooks" / "index.ipynb").read_bytes()
    by_link(page, "Cutting a tiny vector", "notebooks/07_tiny.ipynb")
    assert not page.evaluate(DIRTY), "opening a lesson is no edit"
    page.evaluate(CLEAR_AND_RUN)
    page.wait_for_function(RUNNING, timeout=MINUTE)
    (widget,) = [index for index, cell in enumerate(page.evaluate(CELLS)) if cell["widget"]]
    page.evaluate(SHOW, widget)
    area = page.locator(".jp-Notebook:visible .jp-Cell.jp-mod-active .jp-OutputArea").first
    said = area.locator(".widget-html-content")
    area.get_by_role("spinbutton", name="removed", exact=True).focus()
    for key, sentence in (("ArrowUp", "1 of 3"), ("Tab", "1 of 3"), ("ArrowRight", "2 of 3")):
        page.keyboard.press(key)
        said.get_by_text(f"{sentence} removed").wait_for(timeout=MINUTE)

    page.get_by_role("tab", name="index.ipynb").click()
    by_link(page, "exercises", "notebooks/exercises/07_tiny.ipynb")
    student = nbformat.read(built / "notebooks" / "exercises" / "07_tiny.ipynb", as_version=4)
    graded = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in student.cells]
    setup, solution = 1, graded.index("ex-07-1")
    checks = [graded.index(f"ex-07-1-check-{letter}") for letter in "ab"]
    assert failed(page, [setup, solution, *checks]) == [False, False, True, True]
    for _ in range(page.evaluate(ACTIVE) - solution):
        page.keyboard.press("ArrowUp")
    assert page.evaluate(ACTIVE) == solution
    page.keyboard.press("Enter")  # into the cell
    page.keyboard.press("Control+a")
    page.keyboard.insert_text("def keep_largest(values, k):\n    return np.sort(values)[::-1][:k]")
    page.keyboard.press("Escape")
    assert failed(page, [solution, *checks]) == [False, False, False]
    page.screenshot(path=tmp_path / "solved.png")
    assert page.evaluate(DIRTY)
    page.keyboard.press("Control+s")
    page.wait_for_function(f"() => !({DIRTY})()", timeout=MINUTE)

    page.goto(address.replace("index.ipynb", "exercises/07_tiny.ipynb"))
    page.wait_for_function(IN_FRONT, arg="notebooks/exercises/07_tiny.ipynb", timeout=2 * MINUTE)
    cells = page.evaluate(CELLS)
    assert cells[solution]["source"].endswith("return np.sort(values)[::-1][:k]")
    assert [cells[check]["count"] is None for check in checks] == [False, False]
    assert [cells[check]["errors"] for check in checks] == [[], []]
    page.evaluate('() => { window.jupyterapp.commands.execute("application:close"); }')
    page.wait_for_function(
        "() => !window.jupyterapp.shell.currentWidget?.context?.path.includes('exercises')"
    )
    assert popped_up(page) == []
    page.close()
    # What comes of leaving the page by its address, in whatever JupyterLab is about then.
    left = ("beforeunload", "Could not restore the debugger state: Canceled")
    assert [said for said in complaints if not said.startswith(left)] == []
    assert (built / "notebooks" / "index.ipynb").read_bytes() == before


@pytest.mark.slow
def test_the_index_of_the_course_opens_what_it_names(browser, serve, app, tmp_path):
    page, complaints = opened(browser, serve(**app))
    assert not page.evaluate(DIRTY)
    table = page.locator(".jp-Notebook:visible table").first
    for lesson in material.lessons(ROOT):
        row = table.locator("tr", has_text=lesson.number).first
        assert "min" in row.inner_text()
        targets = row.locator("a").evaluate_all("links => links.map((a) => a.pathname)")
        files = [f"{lesson.name}.ipynb", f"exercises/{lesson.name}.ipynb"]
        assert [target.split("/notebooks/")[1] for target in targets] == files
    page.screenshot(path=tmp_path / "index.png")
    go_dark(page, tmp_path / "index.dark.png")
    assert page.evaluate(FAINT) == []
    page.close()
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_answers_its_slider(browser, serve, app, tmp_path, lesson):
    material = tmp_path / "material"  # a copy: JupyterLab saves what it ran
    for folder in ("lessons", "notebooks", "results"):
        shutil.copytree(ROOT / folder, material / folder)
    address = serve(**app, PRUNING101_MATERIAL=str(material))
    screenshot = tmp_path / f"{lesson}.png"
    assert run_and_move(browser, address, f"{lesson}.ipynb", screenshot) == []
    assert screenshot.stat().st_size > 10_000
