"""The widget of lesson 5 without Jupyter: every setting draws, and draws what it says."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pruning101 import magnitude, structured
from pruning101.core import data, masks, models
from pruning101.core.measure import footprint
from pruning101.core.training import evaluate
from pruning101.widgets import structured as widget

SPARSITIES = (0.0, 0.4, 0.8)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", image_size=16).subset(train=64, valid=64, test=10)


@pytest.fixture(scope="module")
def model():
    return models.build("lenet5", in_channels=1, image_size=16, seed=3)


@pytest.fixture(scope="module")
def state(model, digits):
    return widget.precompute(model, digits, sparsities=SPARSITIES, epochs=0)


def title(axes):
    return "".join(axes.get_title(side) for side in ("left", "center"))


def test_every_setting_draws(state):
    for kind in (widget.WEIGHTS, widget.CHANNELS):
        for at, sparsity in enumerate(SPARSITIES):
            figure = widget.draw(state, kind=kind, sparsity=sparsity)
            above, below, side = figure.axes
            assert title(above) == f"{kind}: {sparsity:.0%} gone in each layer"
            assert title(side) == f"accuracy {state.accuracy[kind][at]:.1%}"
            widths = [bar.get_width() for bar in side.patches]
            assert widths == [100 * state.cost[kind][name][at] for name in widget.COSTS]
            for axes, weights in ((above, state.first), (below, state.second)):
                dead = np.isnan(weights[kind][at]).all((-1, -2)).sum()
                strokes = [line for line in axes.lines if line.get_gid() == "gone"]
                drawn = [np.isnan(line.get_xdata()).sum() for line in strokes]
                assert drawn == [dead, dead]  # one stroke down, one up, ended by a NaN
            plt.close(figure)
            said = widget.describe(state, kind=kind, sparsity=sparsity)
            assert said.startswith(f"{sparsity:.0%} of the {kind.split()[-1]} gone")
            assert f"{state.parameters[kind][at]:,} parameters" in said


def test_the_weights_shown_are_those_of_the_pruned_network(model, digits, state):
    kept = masks.from_scores(magnitude.scores(model), 0.4, scope="layer")
    weight, mask = model.conv2.weight.detach(), kept["conv2.weight"]
    expected = torch.where(mask, weight, torch.nan).numpy()[state.shown]
    assert np.array_equal(state.second[widget.WEIGHTS][1], expected, equal_nan=True)

    example, _ = next(iter(digits.batches("valid", 4)))
    pruned = structured.prune_channels(model, example, 0.4, inplace=False)
    whole = torch.full_like(weight, torch.nan)
    rows, columns = pruned.kept["conv2"], pruned.kept["conv1"]
    whole[rows[:, None], columns] = pruned.model.conv2.weight.detach()
    expected = whole.numpy()[state.shown]
    assert np.array_equal(state.second[widget.CHANNELS][1], expected, equal_nan=True)
    assert np.isnan(state.first[widget.CHANNELS][1]).all((1, 2)).sum() == 8


def test_costs_and_accuracies_are_those_of_the_pruned_network(model, digits, state):
    example, _ = next(iter(digits.batches("valid", 4)))
    pruned = structured.prune_channels(model, example, 0.8, inplace=False).model
    before, after = footprint(model, example), footprint(pruned, example)
    cost = {name: values[2] for name, values in state.cost[widget.CHANNELS].items()}
    assert cost["MACs"] == after.macs / before.macs
    assert cost["dense bytes"] == after.dense_bytes / before.dense_bytes
    assert cost["coded bytes"] == after.coded_bytes / before.coded_bytes
    assert state.parameters[widget.CHANNELS][2] == after.parameters
    assert state.accuracy[widget.CHANNELS][2] == evaluate(pruned, digits, "valid").accuracy
    assert (state.cost[widget.WEIGHTS]["dense bytes"] == 1).all()
    assert (state.cost[widget.WEIGHTS]["MACs"] == 1).all()


def test_the_filters_in_view_go_at_the_rate_of_all(state):
    dead = np.isnan(state.second[widget.CHANNELS][1]).all((1, 2, 3)).mean()
    assert dead == pytest.approx(0.4, abs=0.1)


def test_retraining_leaves_zeros_at_zero_and_the_model_alone(model, digits):
    before = [p.detach().clone() for p in model.parameters()]
    state = widget.precompute(model, digits, sparsities=(0.5,), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    weights = state.second[widget.WEIGHTS][0]
    assert 0.3 < np.isnan(weights).mean() < 0.7
    kept = masks.from_scores(magnitude.scores(model), 0.5, scope="layer")["conv2.weight"]
    assert np.array_equal(~np.isnan(weights), kept.numpy()[state.shown])


def test_a_model_is_compared_with_the_first():
    one, many = torch.nn.Linear(8, 8), torch.nn.Sequential(*[torch.nn.Linear(8, 8)] * 200)
    example = torch.randn(4, 8)
    assert widget.relative_latency([one], example, rounds=3).tolist() == [1.0]
    assert widget.relative_latency([one, many], example, rounds=5)[1] > 5


def test_a_model_without_two_convolutions_is_refused(digits):
    network = models.build("lenet_300_100", in_channels=1, image_size=16)
    with pytest.raises(ValueError, match="two convolutions"):
        widget.precompute(network, digits)


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert list(controls["kind"].options) == [widget.WEIGHTS, widget.CHANNELS]
    assert (controls["sparsity"].min, controls["sparsity"].max) == (0.0, 0.8)
    row, menu, text, image = widget.show(state).children
    slider = row.children[-1]
    seen = {bytes(image.value)}
    for kind in menu.options:
        menu.value = kind
        for sparsity in SPARSITIES:
            slider.value = sparsity
            seen.add(bytes(image.value))
            assert text.value == widget.describe(state, kind=kind, sparsity=slider.value)
    assert len(seen) == 2 * len(SPARSITIES)
