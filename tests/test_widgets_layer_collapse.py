"""The widget of lesson 8 without Jupyter: every setting draws, and draws what it says."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pruning101.widgets import layer_collapse as widget

SLOPES, EXAMPLES = (0.0, 0.5, 1.0), (10, 20)


@pytest.fixture(scope="module")
def state():
    return widget.precompute(slopes=SLOPES, examples=EXAMPLES, seeds=3, hidden=32, steps=150)


def test_every_setting_draws(state):
    for examples in EXAMPLES:
        fits = state.fits[examples]
        for at, slope in enumerate(SLOPES):
            figure = widget.draw(state, examples=examples, slope=slope)
            left, middle, right = figure.axes
            assert left.get_title() + left.get_title(loc="left") == f"slope {slope:.2f}"
            assert left.lines[0].get_ydata().tolist() == [-2 * slope, 0, 2]
            truth, points, network = middle.lines
            assert np.array_equal(truth.get_ydata(), state.truth)
            assert np.array_equal(points.get_ydata(), fits.targets[0])
            assert np.array_equal(network.get_ydata(), fits.curves[at, 0])
            marks = [line for line in right.lines if len(line.get_xdata()) == 1]
            assert [mark.get_xdata()[0] for mark in marks] == [slope, slope]
            heights = [float(mark.get_ydata()[0]) for mark in marks]
            assert heights == pytest.approx([fits.train[at].mean(), fits.test[at].mean()])
            plt.close(figure)
            said = widget.describe(state, examples=examples, slope=slope)
            assert said.startswith(f"Slope {slope:.2f}, {examples} examples: squared error")
            assert f"{fits.test[at].mean():.2f} on new data" in said


def test_slope_one_is_the_line_of_least_squares():
    """At slope 1 the network is linear: what it finds has a closed form."""
    state = widget.precompute(slopes=(0.0, 1.0), examples=(30,), seeds=2, hidden=16, steps=700)
    fits = state.fits[30]
    for seed in range(2):
        line = np.polyfit(fits.inputs[seed], fits.targets[seed], 1)
        assert fits.curves[1, seed] == pytest.approx(np.polyval(line, state.grid), abs=0.02)
    assert (fits.train[0] < fits.train[1]).all()


def test_errors_are_those_of_the_curves(state):
    for examples, fits in state.fits.items():
        assert fits.inputs.shape == fits.targets.shape == (3, examples)
        distance = np.square(fits.curves - state.truth).mean(-1)
        assert fits.test == pytest.approx(distance + widget.NOISE**2, rel=1e-5)
        for at in range(len(SLOPES)):
            for seed in range(3):
                given = np.interp(fits.inputs[seed], state.grid, fits.curves[at, seed])
                error = np.square(given - fits.targets[seed]).mean()
                assert fits.train[at, seed] == pytest.approx(error, rel=0.05, abs=0.005)


def test_new_data_scatter_around_the_curve_as_much_as_is_added():
    many = widget.precompute(slopes=(1.0,), examples=(400,), seeds=5, hidden=2, steps=1).fits[400]
    rest = many.targets - widget.target(torch.from_numpy(many.inputs)).numpy()
    assert rest.std() == pytest.approx(widget.NOISE, rel=0.05)


def test_one_seed_one_result_and_no_global_randomness(state):
    before = torch.random.get_rng_state()
    again = widget.precompute(slopes=SLOPES, examples=EXAMPLES, seeds=3, hidden=32, steps=150)
    assert torch.equal(before, torch.random.get_rng_state())
    other = widget.precompute(
        slopes=SLOPES, examples=EXAMPLES, seeds=3, hidden=32, steps=150, seed=1
    )
    for n in EXAMPLES:
        assert np.array_equal(state.fits[n].curves, again.fits[n].curves)
        assert not np.array_equal(state.fits[n].inputs, other.fits[n].inputs)


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert list(controls["examples"].options) == list(EXAMPLES)
    assert (controls["slope"].min, controls["slope"].max) == (0.0, 1.0)
    row, menu, text, image = widget.show(state).children
    slider = row.children[-1]
    seen = {bytes(image.value)}
    for examples in EXAMPLES:
        menu.value = examples
        for slope in SLOPES:
            slider.value = slope
            seen.add(bytes(image.value))
            assert text.value == widget.describe(state, examples=examples, slope=slope)
    assert len(seen) == len(EXAMPLES) * len(SLOPES)
