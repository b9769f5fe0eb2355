"""Real JupyterLab in Chromium: a lesson runs, and its widget answers mouse and keyboard."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("PRUNING101_CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        message = "no Chromium: install the distribution's, or set PRUNING101_CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def run_and_move(browser, address, notebook, screenshot):
    """Run all of `notebook`, move its widget's first slider by keyboard and mouse; return the
    complaints.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    complaints = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address.replace("index.ipynb", notebook))
    page.wait_for_function(RUNNING, timeout=2 * MINUTE)
    popped_up = page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()
    assert popped_up == []

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
