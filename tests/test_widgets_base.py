"""The common base of the widgets: every control reaches the drawing, and errors are seen."""

import gc
import io

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


def test_a_figure_brings_its_own_light_ground_into_a_dark_theme():
    image = plt.imread(io.BytesIO(base.png(draw(1))))
    corner = image[0, 0]
    assert corner[:3].min() > 0.9
    assert len(corner) == 3 or corner[3] == 1


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


def test_a_slider_stands_behind_a_box_that_bears_its_name():
    control = slider()
    box = base.explore(draw, lambda height: f"the bar is {height} high", height=control)
    number, shown = box.children[0].children
    assert shown is control
    assert number.description == "height of the bar"
    assert (number.min, number.max, number.value) == (0, 10, 1)
    number.value = 7
    assert control.value == 7
    assert box.children[-2].value == "the bar is 7 high"
    control.value = 3
    assert number.value == 3


def test_what_is_typed_moves_to_the_nearest_place_of_the_slider():
    drawn = []
    control = ipywidgets.FloatSlider(min=0.1, max=1, step=0.3, value=0.1, description="share")
    box = base.explore(lambda share: drawn.append(share) or draw(1), share=control)
    number = box.children[0].children[0]
    for typed, place in ((0.5, 0.4), (0.6, 0.7), (7, 1.0), (-7, 0.1)):
        number.value = typed
        assert control.value == pytest.approx(place)
        assert number.value == pytest.approx(place), "the box says what is drawn"
    assert {round(share, 6) for share in drawn} <= {0.1, 0.4, 0.7, 1.0}


def test_other_controls_stand_alone_under_their_own_names():
    menu = ipywidgets.Dropdown(options=[1, 2], description="height")
    assert base.explore(draw, height=menu).children[0] is menu
    assert menu.description == "height"


def test_a_control_without_description_is_refused():
    with pytest.raises(ValueError, match="'height' has no description"):
        base.explore(draw, height=ipywidgets.IntSlider())
