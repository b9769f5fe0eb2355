"""The widget of lesson 6 without Jupyter: every setting draws, and draws what it says."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from pruning101.widgets import layer_folding as widget

NAMES = ("one", "two")
SLOPES = [{"one": i / 10, "two": 0.0} for i in range(11)]
SETTINGS = list(itertools.product(widget.FIRST, widget.SECOND, widget.STRIDES, widget.PADS))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state(images):
    return widget.precompute(SLOPES, images)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def pair_of(pair, images, pads):
    """What the two kernels give one after the other, and what the one gives, without biases."""
    first, second = (torch.tensor(w)[None, None] for w in (pair.first, pair.second))
    p1, p2 = len(pair.first) // 2, len(pair.second) // 2 if pads == "yes" else 0
    between = F.conv2d(images, first, stride=pair.stride, padding=p1)
    two = F.conv2d(between, second, padding=p2)
    single = torch.tensor(pair.weight)[None, None]
    one = F.conv2d(images, single, stride=pair.stride, padding=p1 + pair.stride * p2)
    return two, one


@pytest.mark.parametrize(("first", "second", "stride", "pads"), SETTINGS)
def test_one_kernel_does_what_two_do_inside_the_border(state, images, first, second, stride, pads):
    pair = state.merged[first, second, stride, pads]
    two, one = pair_of(pair, images, pads)
    inner = slice(pair.border, two.shape[-1] - pair.border)
    assert torch.allclose(one[..., inner, inner], two[..., inner, inner], atol=1e-5)
    assert pair.change[inner, inner].max() < 1e-5
    padded = second > 1 and pads == "yes"
    assert pair.border == padded
    assert (pair.change.max() > 1e-2) == padded
    assert pair.change.shape == tuple(two.shape[-2:])


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_taps_add_up_to_the_merged_kernel(state, setting):
    pair = state.merged[setting]
    assert not pair.grown(0).any()
    assert np.allclose(pair.grown(pair.second.size), pair.weight, atol=1e-6)
    for place in range(pair.second.size):
        top, left, height, width = pair.patch(place)
        added = pair.grown(place + 1) - pair.grown(place)
        expected = pair.second.flat[place] * pair.first
        assert np.allclose(added[top : top + height, left : left + width], expected, atol=1e-6)
        added[top : top + height, left : left + width] = 0
        assert not added.any()


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("iteration", [1, 10, 11])
def test_slopes_and_activations_are_those_of_the_iteration(state, iteration):
    above, beside, _ = widget.draw(state, iteration=iteration).axes
    slope = SLOPES[iteration - 1]["one"]
    near = int(slope >= 0.9)
    title = "".join(above.get_title(side) for side in ("left", "center"))
    assert title == f"iteration {iteration}: {near} of 2 slopes near 1"
    drawn = {
        line.get_label(): line.get_ydata() for line in above.lines if line.get_label() in NAMES
    }
    assert drawn["one"].tolist() == [s["one"] for s in SLOPES]
    assert not drawn["two"].any()
    assert [line.get_ydata()[0] for line in beside.lines] == [-slope, 0]
    assert f"one {slope:.2f}, two 0.00" in widget.describe(state, iteration=iteration)


def test_the_tiles_say_what_they_show(state):
    axes = widget.draw(state, first=3, second=3, stride=2, pads="yes", taps=4).axes[2]
    said = texts(axes)
    assert said == [
        "first, 3 x 3",
        "second, 3 x 3",
        "together: 4 of 9 taps, 7 x 7",
        "its errors: 1 pixel a side",
    ]
    assert len(axes.images) == 4
    assert len(axes.patches) == 4 + 2 + 1  # frames of the tiles, of the tap, of the sound inside
    axes = widget.draw(state, first=5, second=1, pads="yes", taps=9).axes[2]
    assert texts(axes)[2:] == ["together: 1 of 1 taps, 5 x 5", "its errors: none"]
    assert len(axes.patches) == 4
    told = widget.describe(state, first=5, second=1, taps=9)
    assert told.endswith("make 5 x 5 (1 of 1 taps added); one convolution is exact everywhere.")
    assert "on 1 output pixel a side" in widget.describe(state)


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert [controls[n].options for n in ("first", "second", "stride", "pads")] == [
        widget.FIRST,
        widget.SECOND,
        widget.STRIDES,
        widget.PADS,
    ]
    assert (controls["iteration"].min, controls["iteration"].max) == (1, len(SLOPES))
    assert (controls["taps"].min, controls["taps"].max) == (0, 9)
    box = widget.show(state)
    *rows, text, image = box.children
    moved = [row.children[-1] if hasattr(row, "children") else row for row in rows]
    by_name = dict(zip(controls, moved, strict=True))
    seen = {bytes(image.value)}
    changes = {"iteration": 6, "first": 5, "stride": 2, "taps": 4, "pads": "no", "second": 1}
    settings = {name: control.value for name, control in by_name.items()}
    for name, value in changes.items():
        by_name[name].value = value
        settings[name] = value
        seen.add(bytes(image.value))
        assert text.value == widget.describe(state, **settings)
    assert len(seen) == len(changes) + 1


def test_a_training_without_slopes_is_refused(images):
    for slopes in ([], [{}]):
        with pytest.raises(ValueError, match="no slopes to draw"):
            widget.precompute(slopes, images)
