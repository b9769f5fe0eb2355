"""The widget of lesson 7 without Jupyter: every setting draws, and draws what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from pruning101 import activation_entropy
from pruning101.core import data, models, training
from pruning101.widgets import activation_entropy as widget

EPOCHS, IMAGES = 2, 48
SETTINGS = {"epochs": EPOCHS, "lr": 0.1, "batch_size": 21, "seed": 4}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").subset(train=64, valid=40, test=10)  # three batches and one image


def network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        models.BasicBlock(6, 6, 1),
        nn.Flatten(),
        nn.Linear(216, 12),
        nn.GELU(),
        nn.Linear(12, 10),
    )


NAMES = ("2", "3.relu1", "3.relu2", "6")


@pytest.fixture(scope="module")
def state(digits):
    return widget.precompute(network(), digits, images=IMAGES, bins=30, **SETTINGS)


def title(axes):
    return "".join(axes.get_title(side) for side in ("left", "center"))


def trained(digits, epochs):
    """The network as it is after so many of the epochs that the widget trains."""
    model, reached = network(), {}

    def after_step(network):
        reached["steps"] = reached.get("steps", 0) + 1
        if reached["steps"] == 3 * epochs:
            reached["state"] = {k: v.clone() for k, v in network.state_dict().items()}

    reached["state"] = {k: v.clone() for k, v in model.state_dict().items()}
    training.fit(
        model, digits, schedule="cosine", after_step=after_step, progress=False, **SETTINGS
    )
    model.load_state_dict(reached["state"])
    return model


@pytest.mark.parametrize("epoch", range(EPOCHS + 1))
def test_the_entropies_are_those_of_the_network_at_that_epoch(state, digits, epoch):
    model = trained(digits, epoch)
    batches = [next(iter(digits.batches("train", IMAGES)))]
    expected = activation_entropy.layer_entropies(model, batches)
    assert tuple(expected) == state.layers == NAMES
    for name in NAMES:
        found = widget.entropies(state.on[name][epoch]).mean()
        assert found == pytest.approx(expected[name], abs=1e-6)
    assert state.accuracy[epoch] == training.evaluate(model, digits, "valid").accuracy
    assert len(state.accuracy) == EPOCHS + 1


def test_the_histogram_is_that_of_what_enters_the_layer(state, digits):
    model = trained(digits, 1).eval()
    images, _ = next(iter(digits.batches("train", IMAGES)))
    with torch.no_grad():
        z = model[1](model[0](images)).numpy()
    counts, _ = np.histogram(z, bins=state.edges[0])
    assert np.allclose(state.shares[1, 0], counts / z.size)
    assert state.edges[0][15] == 0, "the border between OFF and ON is one of the bins' borders"
    assert np.allclose(state.shares[1, 0, 15:].sum(), (z > 0).mean(), atol=0.02)
    assert (state.shares.sum(2) > 0.97).all()


def test_a_unit_whose_states_are_all_zero_is_off():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 10))
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = 0, 0
        model[1].weight[2], model[1].bias[2] = 0, 1
    digits = data.load("digits").subset(train=32, valid=10)
    state = widget.precompute(model, digits, epochs=0)
    assert state.on["2"][0, 1:].tolist() == [0, 1]
    assert widget.entropies(state.on["2"][0])[1:].tolist() == [0, 0]


def test_the_model_stays_as_it_was(digits):
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widget.precompute(model, digits, epochs=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


def test_every_setting_draws(state):
    for place, layer in enumerate(NAMES):
        for epoch in range(EPOCHS + 1):
            figure = widget.draw(state, layer=layer, epoch=epoch)
            left, right = figure.axes
            on = state.on[layer][epoch]
            assert title(left) == f"{layer} after {epoch} epochs: {on.mean():.0%} ON"
            assert title(right) == f"H = {widget.entropies(on).mean():.2f} bits"
            heights = np.concatenate([p.get_data().values for p in left.patches])
            assert np.allclose(heights, 100 * state.shares[epoch, place])
            _, units, mean, of_mean = right.lines
            assert np.allclose(units.get_xydata(), np.stack([on, widget.entropies(on)], 1))
            assert np.allclose(mean.get_ydata(), widget.entropies(on).mean())
            assert np.allclose(of_mean.get_ydata(), widget.entropies(on.mean()))
            plt.close(figure)
            said = widget.describe(state, layer=layer, epoch=epoch)
            assert said.startswith(f"{layer} after {epoch} epochs")
            assert f"Mean entropy {widget.entropies(on).mean():.3f} bits" in said


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert (controls["epoch"].min, controls["epoch"].max) == (0, EPOCHS)
    assert tuple(controls["layer"].options) == NAMES
    row, menu, text, image = widget.show(state).children
    slider = row.children[-1]
    seen = set()
    for layer in menu.options:
        menu.value = layer
        for epoch in range(EPOCHS + 1):
            slider.value = epoch
            seen.add(bytes(image.value))
            assert text.value == widget.describe(state, layer=layer, epoch=epoch)
    assert len(seen) == len(NAMES) * (EPOCHS + 1)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return F.relu(self.fc(x.flatten(1)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(64, 10), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(self.fc(x.flatten(1))) - 1)


def test_an_activation_that_is_called_twice_is_two_layers(digits):
    state = widget.precompute(Twice(), digits, epochs=0)
    assert state.layers == ("relu", "relu#2")
    assert (state.on["relu#2"][0] < state.on["relu"][0]).all()


def test_activations_that_are_no_modules_are_refused(digits):
    with pytest.raises(ValueError, match="no activation that is a module"):
        widget.precompute(Functional(), digits, epochs=0)
