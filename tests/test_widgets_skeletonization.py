"""The widget of lesson 1 without Jupyter: every setting draws, and draws what it says."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pruning101.skeletonization import relevance, trim
from pruning101.widgets import skeletonization as widget


@pytest.fixture(scope="module")
def network():
    return widget.toy()


@pytest.fixture(scope="module")
def state(network):
    return widget.precompute(*network)


def title(axes):
    return "".join(axes.get_title(side) for side in ("left", "center"))


def test_every_setting_draws(state):
    units = len(state.relevances)
    for order in widget.ORDERS:
        for removed in range(units):
            figure = widget.draw(state, removed=removed, order=order)
            left, right = figure.axes
            assert f"{units - removed} of {units}" in title(right)
            assert title(left).startswith(f"{removed} removed")
            grey = [bar for bar in right.patches if bar.get_hatch()]
            assert len(grey) == removed
            plt.close(figure)
            assert f"{removed} of {units}" in widget.describe(state, removed=removed, order=order)


def test_the_maps_and_accuracies_are_those_of_trimmed_networks(network, state):
    model, points, labels = network
    rho = relevance(model, "0", [(points, labels)])
    assert np.allclose(state.relevances, rho)
    assert state.orders["linear"].tolist() == rho.argsort().tolist()
    assert state.orders["most"].tolist() == rho.argsort().tolist()[::-1]
    for name, order in state.orders.items():
        smaller = trim(model, "0", order[:5], points[:2])
        with torch.no_grad():
            right = (smaller(points).argmax(1) == labels).float().mean().item()
            x1, x2 = (
                np.linspace(*state.extent[:2], widget.GRID),
                np.linspace(*state.extent[2:], widget.GRID),
            )
            place = torch.tensor([[x1[10], x2[40]]], dtype=torch.float32)
            p = smaller(place).softmax(1)[0, 1].item()
        assert state.accuracies[name][5] == pytest.approx(right)
        assert state.maps[name][5, 40, 10] == pytest.approx(p, abs=1e-5)


def test_the_phenomenon_is_there(state):
    # what the lesson says of this network: the order matters, and the linear error's is the best
    mean = {order: accuracy.mean() for order, accuracy in state.accuracies.items()}
    assert mean["linear"] > mean["quadratic"]
    assert mean["linear"] > mean["most"]


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert controls["removed"].max == len(state.relevances) - 1
    assert list(controls["order"].options) == list(widget.ORDERS)
    row, menu, text, image = widget.show(state).children
    slider = row.children[-1]
    before = bytes(image.value)
    slider.value = 4
    assert bytes(image.value) != before
    menu.value = "most relevant first"
    assert "most relevant first" in text.value
