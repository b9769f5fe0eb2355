"""What every widget stands on: sliders bound to a pure function that draws a figure."""

import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def explore(
    draw: Callable[..., Figure],
    describe: Callable[..., str] | None = None,
    **controls: ipywidgets.ValueWidget,
) -> ipywidgets.VBox:
    """Bind controls to a function that draws.

    The figure is shown as an image widget rather than as output of a cell: it is replaced in one
    piece, without flicker, and an error while drawing is shown in its place instead of being lost
    in a callback.

    Each slider gets a box with its number before it: neither ipywidgets 7 nor 8 gives a slider's
    handle a name, so that a screen reader says "slider, 3" of it and nothing more; the box it calls
    by the description.

    Args:
        draw: pure function of the controls' values, named as they are, that returns a figure.
        describe: the same, returning a sentence that says in words what the figure shows.
        controls: the widgets, each with a ``description``.

    Raises:
        ValueError: a control has no description, so that nobody could tell what it moves.
    """
    for name, control in controls.items():
        if not getattr(control, "description", ""):
            raise ValueError(
                f"the control {name!r} has no description; give it one that says what it moves"
            )
    rows = [_row(control) for control in controls.values()]
    image = ipywidgets.Image(
        format="png", layout=ipywidgets.Layout(max_width="100%", width="660px")
    )
    text = ipywidgets.HTML()

    def update(_change: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            with plt.ioff(), _collector_held():
                image.value = png(draw(**values))
            text.value = describe(**values) if describe is not None else ""
        except Exception as error:
            text.value = f"<b>This setting could not be drawn:</b> {type(error).__name__}: {error}"
            raise

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*rows, text, image])


def _row(control: ipywidgets.ValueWidget) -> ipywidgets.Widget:
    """The control as it is shown: a slider behind a box with its number, all others alone."""
    control.style.description_width = "initial"
    control.layout.width = "min(42em, 95%)"
    if not isinstance(control, ipywidgets.IntSlider | ipywidgets.FloatSlider):
        return control
    whole = isinstance(control, ipywidgets.IntSlider)
    least, most, step = control.min, control.max, control.step

    def snapped(value: float) -> float:
        """The place of the slider that is nearest to what was typed."""
        nearest = least + step * round((value - least) / step)
        return min(max(nearest, least), most)

    def shown(value: float) -> float:
        return value if whole else round(value, 3)

    number = (ipywidgets.BoundedIntText if whole else ipywidgets.BoundedFloatText)(
        value=shown(control.value),
        min=least,
        max=most,
        step=step if whole else round(step, 3),
        description=control.description,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="max-content"),
    )
    control.description, control.readout = "", False
    control.layout = ipywidgets.Layout(flex="1 1 12em", max_width="24em")

    def moved(_change: Any) -> None:
        number.value = shown(control.value)

    def typed(_change: Any) -> None:
        place = snapped(number.value)
        if abs(place - control.value) > step / 100:  # more than what rounding does
            control.value = place
        number.value = shown(control.value)

    control.observe(moved, names="value")
    number.observe(typed, names="value")
    return ipywidgets.HBox([number, control], layout=ipywidgets.Layout(flex_flow="row wrap"))


@contextmanager
def _collector_held() -> Iterator[None]:
    """Collect a figure's many cycles right after it is closed, and not while it is drawn.

    Left to itself the garbage collector would let figures grow old, and then look through all that
    torch has loaded for them, which takes several times as long as a drawing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(1)
        if enabled:
            gc.enable()
