"""The widget of lesson 9 without Jupyter: every setting draws, and draws what it says."""

import copy

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import nn

from pruning101 import lacoot
from pruning101.core import data, measure, models, training
from pruning101.widgets import lacoot as widget

SETTINGS = {"epochs": 2, "lr": 0.05, "batch_size": 21, "seed": 4}
BLOCKS = ("2", "3", "5", "6")
PATH = (None, "2", "3", None, "5", "6", None)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").subset(train=64, valid=130, test=10)  # three batches and one image


def network():
    """Blocks of two builds, which cost the same number of MACs."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.ReLU(),
        models.BasicBlock(6, 6, 1),
        models.BasicBlock(6, 6, 1),
        models.BasicBlock(6, 12, 2),
        models.BasicBlock(12, 12, 1),
        models.BasicBlock(12, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


@pytest.fixture(scope="module")
def state(digits):
    return widget.precompute(network(), digits, strength=0.3, points=3, progress=False, **SETTINGS)


def without(model, names):
    model = copy.deepcopy(model)
    for name in names:
        model[int(name)] = nn.Identity()
    return model


def test_the_networks_are_those_that_fit_trains_with_the_penalty_and_without(state, digits):
    plain = network()
    training.fit(plain, digits, progress=False, **SETTINGS)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state.trained[False].model.state_dict()[name], tensor)

    model = network()
    seen = []
    with lacoot.BlockDistances(model, BLOCKS, seed=4) as distances:
        training.fit(
            model,
            digits,
            penalty=distances.penalty(0.3),
            after_step=lambda _: seen.append([distances.latest[name].item() for name in BLOCKS]),
            progress=False,
            **SETTINGS,
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(state.trained[True].model.state_dict()[name], tensor)
    assert len(seen) == 6
    trained = state.trained[True]
    assert trained.blocks == state.blocks == BLOCKS
    assert trained.steps.tolist() == [2, 4, 6]
    assert np.allclose(trained.distances, np.reshape(seen, (3, 2, 4)).mean(1))
    assert (state.trained[False].distances > trained.distances)[-1].any()


def test_the_orders_are_those_of_the_rankings(state, digits):
    assert {ranking for _, ranking in state.removals} == set(widget.RANKINGS)
    for kind, trained in state.trained.items():
        batches = list(digits.batches("valid", 128))  # 128 and 2 images
        expected = {
            widget.RANKINGS[0]: lacoot.block_distances(trained.model, batches, direction="random"),
            widget.RANKINGS[1]: lacoot.block_distances(trained.model, batches, direction="ascent"),
            "relative change": lacoot.relative_change(trained.model, batches),
            "block influence": lacoot.block_influence(trained.model, batches),
        }
        for ranking, scores in expected.items():
            removal = state.removals[kind, ranking]
            assert removal.order == tuple(scores)
            assert removal.scores.tolist() == [scores[name] for name in BLOCKS]
        assert state.removals[kind, "last first"].order == BLOCKS[::-1]
        shuffled = state.removals[kind, "random"]
        assert list(shuffled.order) == lacoot.random_order(BLOCKS, 4)
        assert [shuffled.order[int(s) - 1] for s in shuffled.scores] == list(BLOCKS)


def test_accuracies_and_macs_are_those_of_really_removing_blocks(state, digits):
    image, _ = next(iter(digits.batches("valid", 1)))
    for (kind, _), removal in state.removals.items():
        assert removal.macs.tolist() == sorted(removal.macs, reverse=True)
        assert len(set(removal.macs)) == len(BLOCKS) + 1
        for n in range(len(BLOCKS) + 1):
            smaller = without(state.trained[kind].model, removal.order[:n])
            assert removal.accuracy[n] == training.evaluate(smaller, digits, "valid").accuracy
            assert removal.macs[n] == measure.footprint(smaller, image).macs
        assert (removal.latency_ms > 0).all()
    assert len({tuple(removal.accuracy) for removal in state.removals.values()}) > 2


def test_networks_of_one_build_have_one_latency(state):
    kinds = {"2": "first", "3": "first", "5": "second", "6": "second"}
    found = {}
    for removal in state.removals.values():
        for n, latency in enumerate(removal.latency_ms):
            build = tuple(sorted(kinds[name] for name in removal.order[:n]))
            assert found.setdefault(build, latency) == latency
    assert len(set(found.values())) == len(found)


def test_the_models_and_the_random_state_stay_as_they_were(digits, monkeypatch):
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    settings = {**SETTINGS, "epochs": 1, "progress": False}
    one, two = (widget.train(model, digits, strength=s, **settings) for s in (0.3, 0))
    held = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.model.train()
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    widget.from_trained(one, two, digits, repeats=1, progress=False)
    assert threads == [1, 3], "latency is that on one thread"
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.model.training
    assert [type(m) for m in one.model.modules()] == [type(m) for m in model.modules()]
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(held[k], v) for k, v in one.model.state_dict().items())
    assert one.model.state_dict().keys() == held.keys()


def test_networks_of_different_blocks_are_refused(digits):
    settings = {**SETTINGS, "epochs": 1, "progress": False}
    one = widget.train(network(), digits, strength=0, **settings)
    two = widget.train(network(), digits, strength=0, blocks=["3", "2"], **settings)
    assert two.blocks == ("2", "3"), "in the network's order"
    with pytest.raises(ValueError, match="must have the same blocks"):
        widget.from_trained(one, two, digits)
    none = widget.train(network(), digits, strength=0, **{**settings, "epochs": 0})
    with pytest.raises(ValueError, match="train for one epoch or more"):
        widget.from_trained(none, one, digits)
    with pytest.raises(ValueError, match="no block that could be removed"):
        widget.train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, strength=0, **settings)


def test_distances_and_rankings_are_normalised_alike(digits):
    options = {"direction": "ascent", "normalise": True}
    settings = {**SETTINGS, "epochs": 1, "progress": False, **options}
    state = widget.precompute(network(), digits, strength=0.1, **settings)
    assert (state.trained[True].distances <= 2).all()
    batches = list(digits.batches("valid", 128))
    expected = lacoot.block_distances(state.trained[True].model, batches, **options)
    assert state.ranking == widget.MAXIMISED
    assert state.removals[True, state.ranking].order == tuple(expected)
    figure = widget.draw(state)
    assert figure.axes[0].get_ylabel() == "distance (in the features' size)"
    plt.close(figure)


def test_a_penalty_on_the_relative_change_is_noted_as_such(digits, state):
    settings = {**SETTINGS, "epochs": 1, "progress": False, "measure": "relative"}
    one, two = (widget.train(network(), digits, strength=s, **settings) for s in (0.1, 0))
    with pytest.raises(ValueError, match="must be measured alike"):
        widget.from_trained(one, state.trained[False], digits)
    relative = widget.from_trained(one, two, digits, repeats=1, progress=False)
    assert relative.ranking == widget.CHANGE
    figure = widget.draw(relative)
    assert figure.axes[0].get_ylabel() == "relative change"
    plt.close(figure)


# --- the figure --------------------------------------------------------------------------------


def title(axes):
    return "".join(axes.get_title(side) for side in ("left", "center"))


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def boxes(axes):
    return {p.get_label(): p for p in axes.patches if isinstance(p, FancyBboxPatch)}


def check(state, regularised, removed, ranking):
    figure = widget.draw(state, regularised=regularised, removed=removed, ranking=ranking)
    left, right, below = figure.axes
    removal, trained = state.removals[regularised, ranking], state.trained[regularised]
    gone, count = removal.order[:removed], len(state.blocks)

    assert title(left).endswith(("without", "with")[regularised] + " the regulariser")
    assert left.get_xlabel() == "training step"
    for i, name in enumerate(state.blocks):
        line = lines(left)[name]
        assert np.allclose(line.get_xdata(), trained.steps)
        assert np.allclose(line.get_ydata(), trained.distances[:, i])
        assert (line.get_marker() == "X") == (name in gone)
        assert (line.get_linestyle() == "--") == (name in gone)
    low, high = left.get_ylim()
    for each in state.trained.values():
        assert low < each.distances.min()
        assert each.distances.max() < high, "one scale for both networks"
    heights = sorted(text.get_window_extent().y0 for text in left.texts)
    assert sorted(texts(left), key=int) == [str(i + 1) for i in range(count)]
    assert heights[0] >= left.get_window_extent().y0 - 4
    assert heights[-1] <= left.get_window_extent().y1

    both = lines(right)
    for kind, label in ((True, "with the regulariser"), (False, "without")):
        expected = 100 * state.removals[kind, ranking].accuracy
        assert np.allclose(both[label].get_ydata(), expected)
    assert both["_now"].get_xydata().tolist() == [[removed, 100 * removal.accuracy[removed]]]
    assert ranking in title(right)
    assert both["_guessing"].get_ydata()[0] == 100 / state.classes

    drawn = boxes(below)
    assert tuple(drawn) == state.blocks
    bars = {p.get_label(): p for p in below.patches if isinstance(p, Rectangle)}
    for i, (name, box) in enumerate(drawn.items()):
        bar = bars[f"score of {name}"]
        for patch in (box, bar):
            assert (patch.get_facecolor()[3] == 0) == (name in gone), "removed ones are hollow"
            assert (patch.get_linestyle() != "-" and patch.get_linestyle() != "solid") == (
                name in gone
            ), "and dashed"
        share = removal.scores[i] / removal.scores.max()
        assert np.isclose(bar.get_height() / 36, share)
    path = lines(below)["path"].get_xdata()
    middles = [box.get_x() + box.get_width() / 2 for box in drawn.values()]
    assert middles == sorted(middles)
    assert path[0] < middles[0] < middles[-1] < path[-1], "the path passes by all blocks"
    branches = lines(below).get("branches")
    assert (branches is None) == (removed == count)
    reached = [] if branches is None else branches.get_xdata()
    for name, middle in zip(state.blocks, middles, strict=True):
        half = drawn[name].get_width() / 2
        touches = sum(np.isclose(reached, middle - half)) + sum(np.isclose(reached, middle + half))
        assert touches == (0 if name in gone else 2), "only blocks that are left add to the path"
    assert sum(np.isnan(reached)) == 2 * (count - removed)
    following = lines(below).get("_next")
    if removed < count:
        place = state.blocks.index(removal.order[removed])
        assert np.isclose(following.get_xdata()[0], middles[place])
    else:
        assert following is None
    found = texts(below)
    assert f"{count - removed} of {count}" in found
    assert f"{removal.accuracy[removed]:.1%}" in found
    assert f"{removal.latency_ms[removed]:.3g} ms" in found
    full = bars["MACs an image"].get_width() * removal.macs[0] / removal.macs[removed]
    for label, share in (
        ("blocks", 1 - removed / count),
        ("accuracy on valid", removal.accuracy[removed]),
        ("latency of an image", removal.latency_ms[removed] / removal.latency_ms[0]),
    ):
        assert np.isclose(bars[label].get_width(), share * full)
    plt.close(figure)


@pytest.mark.parametrize("regularised", [True, False])
def test_every_setting_draws(state, regularised):
    for removed in range(len(BLOCKS) + 1):
        check(state, regularised, removed, state.ranking)
    for ranking in widget.RANKINGS:
        check(state, regularised, 2, ranking)


def test_layers_that_stay_are_on_the_path(state):
    assert state.path == PATH
    figure = widget.draw(state)
    below = figure.axes[2]
    places = [(box.get_x(), name) for name, box in boxes(below).items()]
    places += [
        (p.get_x(), None)
        for p in below.patches
        if isinstance(p, Rectangle) and p.get_height() == 18 and p.get_label() == "other layers"
    ]
    assert tuple(name for _, name in sorted(places, key=lambda place: place[0])) == PATH
    plt.close(figure)


def made_up(path):
    """A state of a network with this path, its figures drawn by lot."""
    blocks = tuple(name for name in path if name is not None)
    n = len(blocks)
    rng = np.random.default_rng(n)
    steps = np.arange(1, 41)
    trained = {
        kind: widget.Trained(nn.Identity(), blocks, steps, rng.lognormal(0, 1, (40, n)))
        for kind in (True, False)
    }
    removals = {
        (kind, ranking): widget.Removal(
            order=tuple(blocks[i] for i in rng.permutation(n)),
            scores=rng.random(n),
            accuracy=rng.random(n + 1),
            macs=np.linspace(4.1e9, 7e7, n + 1),
            latency_ms=np.linspace(31, 2, n + 1),
        )
        for kind in (True, False)
        for ranking in widget.RANKINGS
    }
    return widget.State(blocks, path, trained, removals, 10, 100)


STAGES = [
    f"features.{2 * s + 1}.{i}" for s, blocks in enumerate((2, 2, 6, 2)) for i in range(blocks)
]
LARGE = {
    "resnet18": [None, *(x for s in range(1, 5) for x in (f"layer{s}.1", None))],
    "swin_t": [x for name in STAGES for x in ((None, name) if name.endswith(".0") else (name,))],
    "vit_l": [None, *(f"encoder.layers.encoder_layer_{i}" for i in range(24)), None],
}


@pytest.mark.parametrize("kind", LARGE)
def test_names_and_numbers_do_not_overlap(kind):
    state = made_up(tuple(LARGE[kind]))
    count = len(state.blocks)
    check(state, True, count // 2, widget.RANKINGS[1])
    figure = widget.draw(state, removed=count // 2)
    figure.canvas.draw()
    for axes in (figure.axes[0], figure.axes[2]):
        placed = [(t.get_text(), t.get_window_extent()) for t in axes.texts if t.get_text()]
        for i, (one, area) in enumerate(placed):
            assert figure.bbox.x0 <= area.x0, one
            assert area.x1 <= figure.bbox.x1, one
            assert figure.bbox.y0 <= area.y0, one
            for other, another in placed[:i]:
                assert not area.padded(-1).overlaps(another.padded(-1)), (one, other)
    plt.close(figure)


@pytest.mark.parametrize("heights", [[1.0] * 9, [0.0] * 9, [0.2, 0.9, 0.91, 0.93, 0.2, 0.96]])
def test_labels_are_moved_apart_and_stay_inside(heights):
    found = widget._spread(np.array(heights), 0.1)
    places = [place for place, _ in found]
    moved = np.array([height for _, height in found])
    assert sorted(places) == list(range(len(heights)))
    assert [heights[place] for place in places] == sorted(heights)
    assert (np.diff(moved) > 0.1 - 1e-9).all()
    assert moved[0] >= 0
    assert moved[-1] <= 1


def test_the_words_say_what_is_drawn(state):
    for removed in range(len(BLOCKS) + 1):
        removal = state.removals[False, "random"]
        said = widget.describe(state, regularised=False, removed=removed, ranking="random")
        assert said.startswith(
            f"The network without the regulariser, {removed} of {len(BLOCKS)} blocks removed by "
            f"random: {', '.join(removal.order[:removed]) or 'none'}."
        )
        assert f"Accuracy on valid (130 images) {removal.accuracy[removed]:.1%}" in said
        assert f"({removal.macs[removed] / removal.macs[0]:.0%})" in said
        assert f"{removal.latency_ms[removed]:.2f} ms" in said
        left = [name for name in BLOCKS if name not in removal.order[:removed]]
        assert f"What stays: {', '.join(left) or 'none'}." in said


def test_the_controls_reach_every_setting(state):
    controls = widget.controls(state)
    assert (controls["removed"].min, controls["removed"].max) == (0, len(BLOCKS))
    assert dict(controls["regularised"].options) == {
        "with the regulariser": True,
        "without the regulariser": False,
    }
    assert tuple(controls["ranking"].options) == widget.RANKINGS
    row, network, ranking, text, image = widget.show(state).children
    slider = row.children[-1]
    settings = {"regularised": True, "removed": 0, "ranking": state.ranking}
    assert text.value == widget.describe(state) == widget.describe(state, **settings)
    seen = {bytes(image.value)}
    for name, control, values in (
        ("removed", slider, range(1, len(BLOCKS) + 1)),
        ("regularised", network, [False]),
        ("ranking", ranking, widget.RANKINGS),
    ):
        for value in values:
            control.value = value
            settings[name] = value
            assert text.value == widget.describe(state, **settings)
            seen.add(bytes(image.value))
    assert len(seen) == 1 + len(BLOCKS) + 1 + len(widget.RANKINGS) - 1
