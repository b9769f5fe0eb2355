"""The widget of lesson 4 without Jupyter: every setting draws, and draws what it says."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from pruning101 import lottery_tickets
from pruning101.core import data, masks, runs
from pruning101.widgets import lottery_tickets as widget

TRAINING = {"iterations": 12, "optimizer": "sgd", "lr": 1.0, "evaluate_every": 4}
SEEDS, ROUNDS = 2, 3


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").subset(train=240, valid=60, test=60)


@pytest.fixture(scope="module")
def searches(digits):
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
        search = lottery_tickets.find_ticket(
            model, digits, rounds=ROUNDS, rate=0.4, seed=seed, **TRAINING
        )
        found.append(list(search))
    return found


@pytest.fixture(scope="module")
def state(searches, digits):
    return widget.precompute(searches, digits, **TRAINING)


def title(axes):
    return "".join(axes.get_title(side) for side in ("left", "center"))


def test_the_tickets_are_those_of_the_searches(state, searches):
    assert state.densities.tolist() == [step.density for step in searches[0]]
    assert state.iterations.tolist() == [0, 4, 8, 12]
    assert len(np.unique(state.early_stop["ticket"])) > 1, "or it could be any iteration"
    for index in range(ROUNDS + 1):
        for seed, search in enumerate(searches):
            step = search[index]
            assert state.valid_loss["ticket"][index, seed].tolist() == list(step.valid_loss)
            assert state.early_stop["ticket"][index, seed] == step.early_stop
            assert state.accuracy["ticket"][index, seed] == step.accuracy_at_early_stop


def test_the_controls_are_trained_as_the_ticket_was(state, searches, digits):
    for index, seed in ((1, 0), (3, 1)):
        own = runs.derive(seed, index)
        for kind, make in {
            "re-initialised": lottery_tickets.random_reinitialisation,
            "random": lottery_tickets.random_ticket,
        }.items():
            model = make(searches[seed][index].ticket, seed=own)
            run = lottery_tickets.train(model, digits, seed=own, progress=False, **TRAINING)
            assert state.valid_loss[kind][index, seed].tolist() == list(run.valid_loss)
            assert state.early_stop[kind][index, seed] == run.early_stop
            assert state.accuracy[kind][index, seed] == run.accuracy_at_early_stop


def test_before_the_first_round_all_are_the_dense_network(state):
    for values in (state.valid_loss, state.early_stop, state.accuracy):
        assert np.array_equal(values["random"][0], values["ticket"][0])
        assert np.array_equal(values["re-initialised"][0], values["ticket"][0])
        assert not np.array_equal(state.valid_loss["random"][1], state.valid_loss["ticket"][1])


def test_the_pictures_are_the_masks_of_the_first_seed(state, searches):
    assert state.masks["ticket"][0].all()
    for index in range(1, ROUNDS + 1):
        kept = masks.masks_of(searches[0][index].ticket)["1.weight"].numpy()
        ticket, random = state.masks["ticket"][index], state.masks["random"][index]
        assert np.array_equal(ticket, kept)
        assert random.sum() == kept.sum()
        assert not np.array_equal(random, kept)


def test_every_setting_draws(state):
    for measure in widget.MEASURES:
        values = {"early stop": state.early_stop, "accuracy": state.accuracy}[measure]
        for index, density in enumerate(state.densities):
            figure = widget.draw(state, round=index, measure=measure)
            ticket, random, curves, levels = figure.axes
            assert np.array_equal(ticket.images[0].get_array(), state.masks["ticket"][index])
            assert np.array_equal(random.images[0].get_array(), state.masks["random"][index])
            assert title(curves) == f"{density:.1%} of the weights left"
            drawn = curves.lines[0].get_ydata()
            assert np.allclose(drawn, state.valid_loss["ticket"][index].mean(0))
            assert title(levels) == widget.MEASURES[measure]
            for kind, line in zip(widget.KINDS, levels.lines[:3], strict=True):
                assert np.allclose(line.get_xdata(), 100 * state.densities)
                assert np.allclose(line.get_ydata(), values[kind].mean(1))
            for kind, marked in zip(widget.KINDS, levels.lines[-3:], strict=True):
                place = marked.get_xydata()[0]
                assert np.allclose(place, (100 * density, values[kind][index].mean()))
            plt.close(figure)


def test_the_text_says_what_the_figure_shows(state):
    text = widget.describe(state, round=2, measure="accuracy")
    here = state.accuracy["random"][2]
    assert f"random {here.mean():.1%} ({here.min():.1%} to {here.max():.1%})" in text
    assert text.startswith(f"Round 2: {state.densities[2]:.1%} of the weights left.")
    stops = state.early_stop["ticket"]
    text = widget.describe(state, round=3, measure="early stop")
    assert f"ticket {stops[3].mean():.0f} ({stops[3].min():.0f} to {stops[3].max():.0f})" in text
    assert f"dense {stops[0].mean():.0f}" in text


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert (controls["round"].min, controls["round"].max) == (0, ROUNDS)
    assert list(controls["measure"].options) == list(widget.MEASURES)
    row, menu, text, image = widget.show(state).children
    slider = row.children[-1]
    before = bytes(image.value)
    slider.value = 1
    assert bytes(image.value) != before
    assert text.value == widget.describe(state, round=1, measure="early stop")
    menu.value = "accuracy"
    assert text.value == widget.describe(state, round=1, measure="accuracy")


def test_searches_of_different_lengths_are_refused(searches, digits):
    with pytest.raises(ValueError, match=r"got lengths \[4, 2\]"):
        widget.precompute([searches[0], searches[1][:2]], digits, **TRAINING)
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        widget.precompute([], digits, **TRAINING)
