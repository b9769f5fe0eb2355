"""The common base of the widgets: every control reaches the drawing, and errors are seen."""

import gc

import ipywidgets
import pytest
from matplotlib import pyplot as plt

from pruning101.widgets import base


def draw(height):
    figure, ax = plt.subplots(figsize=(2, 2))
    ax.bar([0], [height])
    ax.set_ylim(0, 10)
    return figure


def slider():
    return ipywidgets.IntSlider(value=1, min=0, max=10, description="height of the bar")


def test_moving_a_control_changes_image_and_text():
    control = slider()
    box = base.explore(draw, lambda height: f"the bar is {height} high", height=control)
    text, image = box.children[-2:]
    before = bytes(image.value)
    assert before.startswith(b"\x89PNG")
    control.value = 9
    assert bytes(image.value) != before
    assert text.value == "the bar is 9 high"
    control.value = 1
    assert bytes(image.value) == before


def test_figures_are_closed():
    control = slider()
    base.explore(draw, height=control)
    for value in range(10):
        control.value = value
    assert not plt.get_fignums()


def test_an_error_while_drawing_is_shown():
    control = slider()
    box = base.explore(lambda height: draw(1 // height), height=control)
    with pytest.raises(ZeroDivisionError):
        control.value = 0
    assert "could not be drawn" in box.children[-2].value


def test_the_garbage_collector_goes_on_afterwards():
    control = slider()
    base.explore(lambda height: draw(1 // height), height=control)
    with pytest.raises(ZeroDivisionError):
        control.value = 0
    assert gc.isenabled()


def test_a_control_without_description_is_refused():
    with pytest.raises(ValueError, match="'height' has no description"):
        base.explore(draw, height=ipywidgets.IntSlider())
