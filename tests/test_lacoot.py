"""The max-sliced Wasserstein distance, the penalty, what ranks blocks, and their removal."""

import dataclasses
import itertools
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from pruning101 import lacoot
from pruning101.core import masks, models, structure
from pruning101.core.block_scores import mean_relative_change
from pruning101.core.data import Split, from_tensors, load
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit
from pruning101.core.transport import _means_and_spreads


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def features(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=seeded(seed), dtype=dtype)


def directions(d, n, seed=9):
    return torch.nn.functional.normalize(features(d, n, seed), dim=0)


# --- max_sliced_wasserstein ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
@pytest.mark.parametrize("counts", [(13, 13), (12, 8), (7, 30), (2, 3)])
def test_value_and_gradients_are_those_of_pot(p, counts):
    from ot.sliced import max_sliced_wasserstein_distance

    x, y = features(counts[0], 6), 0.5 + 2 * features(counts[1], 6, seed=1)
    theta = directions(6, 11)
    results = []
    for distance in (
        lambda a, b: lacoot.max_sliced_wasserstein(a, b, projections=theta, p=p),
        lambda a, b: max_sliced_wasserstein_distance(a, b, projections=theta, p=p),
    ):
        a, b = (z.clone().requires_grad_() for z in (x, y))
        value = distance(a, b)
        value.backward()
        results.append([value.detach(), a.grad, b.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@given(n=st.integers(2, 12), m=st.integers(2, 12), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_one_direction_is_the_distance_on_the_line(n, m, seed):
    x, y = features(n, 1, seed), features(m, 1, seed + 1000)
    found = lacoot.max_sliced_wasserstein(x, y, p=1, projections=torch.ones(1, 1))
    expected = stats.wasserstein_distance(x.flatten().numpy(), y.flatten().numpy())
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_samples_are_rows_whatever_their_shape_and_order():
    x, y = features(6, 24).view(6, 2, 3, 4), features(6, 24, seed=1).view(6, 2, 3, 4)
    theta = directions(24, 5)
    whole = lacoot.max_sliced_wasserstein(x, y, projections=theta)
    expected = max(
        math.sqrt(np.mean((np.sort(a) - np.sort(b)) ** 2))
        for a, b in zip((x.view(6, 24) @ theta).T, (y.view(6, 24) @ theta).T, strict=True)
    )
    assert float(whole) == pytest.approx(expected, rel=1e-12)
    shuffled = lacoot.max_sliced_wasserstein(x.flip(0), y, projections=7 * theta)
    torch.testing.assert_close(whole, shuffled)  # neither order nor length of directions counts


def test_directions_are_drawn_from_the_generator_alone():
    x, y = features(9, 30), features(9, 30, seed=1)
    before = torch.get_rng_state()
    a = lacoot.max_sliced_wasserstein(x, y, generator=seeded(3))
    assert torch.equal(a, lacoot.max_sliced_wasserstein(x, y, generator=seeded(3)))
    assert not torch.equal(a, lacoot.max_sliced_wasserstein(x, y, generator=seeded(4)))
    assert torch.equal(lacoot.max_sliced_wasserstein(x, y), lacoot.max_sliced_wasserstein(x, y))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("direction", ["random", "ascent"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_where_both_coincide_value_and_gradients_are_zero(direction, normalise, p):
    for same in (features(8, 5), torch.zeros(8, 5)):
        x, y = same.clone().requires_grad_(), same.flip(0).clone().requires_grad_()
        value = lacoot.max_sliced_wasserstein(x, y, direction=direction, normalise=normalise, p=p)
        value.backward()
        assert float(value.detach()) == pytest.approx(0, abs=1e-12)
        for gradient in (x.grad, y.grad):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("d", [3, 2000])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_ascent_finds_a_shift_whole_and_random_directions_a_small_part(d, p):
    x = features(20, d)
    shift = features(1, d, seed=5)
    length = float(shift.norm())  # no direction sees more of a shift
    found = lacoot.max_sliced_wasserstein(x, x + shift, direction="ascent", p=p)
    assert float(found) == pytest.approx(length, rel=1e-6)
    random = float(lacoot.max_sliced_wasserstein(x, x + shift, p=p))
    assert random <= length * (1 + 1e-9)
    if d == 2000:
        assert random < 0.1 * length


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("counts", [(40, 40), (40, 25)])
@pytest.mark.parametrize("seed", range(4))
def test_ascent_finds_the_best_direction_in_the_plane(p, counts, seed):
    x = features(counts[0], 2, seed)
    y = features(counts[1], 2, seed + 50) @ torch.tensor([[2.0, 0.3], [0.1, 0.7]]).double()
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    every = torch.stack([angles.cos(), angles.sin()])
    best = lacoot.max_sliced_wasserstein(x, y, projections=every, p=p)
    found = lacoot.max_sliced_wasserstein(x, y, direction="ascent", p=p, n_projections=4)
    assert float(found) >= float(best) * (1 - 1e-3)
    torch.testing.assert_close(found, best, rtol=2e-3, atol=0)


@pytest.mark.parametrize("d", [12, 400])  # more samples than dimensions, and fewer
@pytest.mark.parametrize("counts", [(30, 30), (30, 20)])
def test_ascent_climbs_beyond_where_it_starts(d, counts):
    # as wide along one direction as y is narrow: means agree, and the start has to turn
    x, y = features(counts[0], d), features(counts[1], d, seed=1)
    y = y - y.mean(0) + x.mean(0)
    y[:, 0] *= 6
    found = lacoot.max_sliced_wasserstein(x, y, direction="ascent")
    along_first = lacoot.max_sliced_wasserstein(x, y, projections=torch.eye(d)[:, :1])
    random = lacoot.max_sliced_wasserstein(x, y)
    assert float(found) >= float(along_first)
    assert float(found) > 1.3 * float(random)
    start = float(lacoot.max_sliced_wasserstein(x, y, direction="ascent", iterations=0))
    assert float(found) > (1.05 if d == 400 else 1.0005) * start


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("counts", [(20, 20), (20, 31)])
@pytest.mark.parametrize("n_projections", [0, 5])
def test_no_iteration_of_the_ascent_leads_down(p, counts, n_projections):
    ends = torch.zeros(2)
    for seed in range(3):
        x, y = features(counts[0], 50, seed), 1.5 * features(counts[1], 50, seed + 9)
        values = [
            float(
                lacoot.max_sliced_wasserstein(
                    x, y, direction="ascent", iterations=i, n_projections=n_projections, p=p
                )
            )
            for i in range(9)
        ]
        assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(values))
        ends += torch.tensor([values[0], values[-1]])
    assert ends[1] > 1.01 * ends[0]


@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_ascent_ends_as_high_as_a_slow_climb_by_autograd(p):
    x, y = features(40, 8), 1.5 * features(40, 8, seed=1) + 0.2
    theta, highest = directions(8, 6).T, 0.0
    for i in range(300):
        theta = torch.nn.functional.normalize(theta, dim=1).detach().requires_grad_()
        gaps = (x @ theta.T).sort(0).values - (y @ theta.T).sort(0).values
        values = gaps.abs().pow(p).mean(0).pow(1 / p)
        highest = max(highest, float(values.max().detach()))
        [slope] = torch.autograd.grad(values.sum(), theta)
        theta = theta + 0.5 * 0.98**i * torch.nn.functional.normalize(slope, dim=1)
    found = lacoot.max_sliced_wasserstein(x, y, direction="ascent", p=p)
    assert float(found) > 0.995 * highest


def test_directions_keep_length_one_while_they_climb():
    # on a line there is nowhere to climb: what rounding leaves of the slope must not add to it
    for dtype in (torch.float32, torch.float64):
        x, y = features(9, 1, dtype=dtype), features(9, 1, 1, dtype=dtype) * 3
        found = lacoot.max_sliced_wasserstein(x, y, direction="ascent")
        expected = lacoot.max_sliced_wasserstein(x, y, projections=torch.ones(1, 1))
        torch.testing.assert_close(found, expected)


def test_one_start_is_where_spreads_differ_most():
    x, y = features(60, 100), features(60, 100, seed=1)
    x, y = x - x.mean(0), y - y.mean(0)
    wider = directions(100, 1)
    wider[0] = 0
    wider = wider / wider.norm()
    y = y + 9 * (y @ wider) @ wider.T
    x[:, 0] = y[:, 0] = 9 * x[:, 0]  # wide in both, and no difference
    along = float(lacoot.max_sliced_wasserstein(x, y, projections=wider))
    start = lacoot.max_sliced_wasserstein(x, y, direction="ascent", iterations=0, n_projections=0)
    assert float(start) > 0.95 * along
    narrower = lacoot.max_sliced_wasserstein(
        y, x, direction="ascent", iterations=0, n_projections=0
    )
    torch.testing.assert_close(narrower, start)
    _, spread = _means_and_spreads(x, y + 20)  # where the means are is none of its business
    assert float((spread @ wider).abs()) > 0.95


def test_spreads_are_compared_where_means_are_the_very_same():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    found = lacoot.max_sliced_wasserstein(x, 3 * x, direction="ascent", n_projections=0)
    assert float(found) == pytest.approx(2 * math.sqrt(2), rel=1e-3)  # along the second axis


def test_the_short_ascent_of_training_nearly_finds_what_the_long_one_does():
    # four random maps with a shift and a branch that adds to its input, as residual blocks do
    shares = []
    for seed in range(4):
        x = features(64, 600, seed).relu()
        y = x + (x @ features(600, 600, seed + 20) / 20 + features(1, 600, seed + 40) / 5).relu()
        short = lacoot.max_sliced_wasserstein(
            x, y, direction="ascent", n_projections=0, iterations=4
        )
        long = lacoot.max_sliced_wasserstein(x, y, direction="ascent", iterations=100)
        shares.append(float(short / long))
    assert min(shares) > 0.97
    assert max(shares) <= 1 + 1e-9


def test_ascents_gradient_is_that_of_the_maximum():
    # at the best direction the direction's own motion counts for nothing (envelope theorem)
    x, y = features(15, 2, 3), features(15, 2, 4) * 2 + 1
    x.requires_grad_(), y.requires_grad_()
    lacoot.max_sliced_wasserstein(x, y, direction="ascent").backward()
    step = 1e-5
    nudge = features(15, 2, 7)

    def at(t):
        moved = (x + t * nudge).detach()
        return float(lacoot.max_sliced_wasserstein(moved, y.detach(), direction="ascent"))

    slope = (at(step) - at(-step)) / (2 * step)
    assert float((x.grad * nudge).sum()) == pytest.approx(slope, rel=1e-2)
    torch.testing.assert_close(x.grad.sum(0), -y.grad.sum(0))  # a shift of both changes nothing


def test_a_nearly_identical_output_keeps_its_precision():
    # large features, a small change: the products of rows must not drown it
    x = 100 * features(16, 3000, dtype=torch.float32) + 1000
    shift = 0.05 * features(1, 3000, seed=2, dtype=torch.float32)
    found = lacoot.max_sliced_wasserstein(x, x + shift, direction="ascent")
    assert float(found) == pytest.approx(float(shift.norm()), rel=0.05)


@pytest.mark.parametrize("direction", ["random", "ascent"])
def test_normalised_distances_know_no_scale(direction):
    x, y = features(10, 40), features(10, 40, seed=1) * 2 + 0.3

    def distance(c, normalise):
        return float(
            lacoot.max_sliced_wasserstein(c * x, c * y, direction=direction, normalise=normalise)
        )

    assert distance(1e-3, True) == pytest.approx(distance(1, True), rel=1e-6)
    assert distance(3, False) == pytest.approx(3 * distance(1, False), rel=1e-6)
    scale = math.sqrt(float(x.square().sum(1).mean() + y.square().sum(1).mean()) / 2)
    scale /= math.sqrt(40) if direction == "random" else 1
    assert distance(1, True) == pytest.approx(distance(1, False) / scale, rel=1e-6)
    # so the gradient has nothing to gain from smaller features
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    lacoot.max_sliced_wasserstein(a, b, direction=direction, normalise=True).backward()
    outward = (a * a.grad).sum() + (b * b.grad).sum()
    assert float(outward.detach()) == pytest.approx(0, abs=1e-6)


def test_it_is_computed_in_float32_under_autocast():
    x, y = features(8, 50, dtype=torch.float32), features(8, 50, seed=1, dtype=torch.float32)
    expected = lacoot.max_sliced_wasserstein(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lacoot.max_sliced_wasserstein(x, y), expected)
    half = lacoot.max_sliced_wasserstein(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ((1, 5), (1, 5), {}, "at least two samples"),
        ((8,), (8,), {}, "at least two samples"),
        ((4, 5), (4, 6), {}, "same size"),
        ((4, 5), (4, 5), {"projections": torch.ones(4, 2)}, r"projections must be \[5, n\]"),
        ((4, 5), (4, 5), {"n_projections": 0}, "n_projections"),
        ((4, 5), (4, 5), {"p": 0.5}, "p must be"),
        ((4, 5), (4, 5), {"p": math.nan}, "p must be"),
        ((4, 5), (4, 5), {"direction": "best"}, "direction must be"),
        ((4, 5), (4, 5), {"direction": "ascent", "n_projections": -1}, "n_projections .* 0 or"),
        ((4, 5), (4, 5), {"direction": "ascent", "iterations": -1}, "iterations must be"),
    ],
)
def test_bad_input_of_the_distance_is_told_in_a_sentence(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        lacoot.max_sliced_wasserstein(torch.ones(x), torch.ones(y), **options)


@pytest.mark.parametrize("direction", ["random", "ascent"])
def test_nan_features_are_told(direction):
    x = torch.ones(4, 5)
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        lacoot.max_sliced_wasserstein(x, torch.ones(4, 5), direction=direction)


# --- the relative change -------------------------------------------------------------------------


def test_the_relative_change_is_that_of_each_pair_with_its_gradients():
    x, y = features(7, 24).view(7, 2, 3, 4), features(7, 24, seed=1).view(7, 2, 3, 4)
    expected = np.mean(
        [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(x, y, strict=True)]
    )
    assert float(mean_relative_change(x, y)) == pytest.approx(expected, rel=1e-12)
    assert float(mean_relative_change(x, y.flip(0))) != pytest.approx(expected, rel=1e-3)
    assert float(mean_relative_change(-3 * x, -3 * y)) == pytest.approx(expected, rel=1e-12)
    inputs = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(mean_relative_change, inputs)
    half = mean_relative_change(x.detach().bfloat16(), y.detach().bfloat16())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(expected, rel=0.02)


def test_the_relative_change_is_finite_where_samples_are_0_or_the_same():
    x, y = features(4, 6), features(4, 6, seed=1)
    x[0] = y[0] = 0  # nothing stays nothing
    x[1] = 0  # something out of nothing
    y[2] = x[2]
    x.requires_grad_(), y.requires_grad_()
    value = mean_relative_change(x, y)
    value.backward()
    last = float((y[3] - x[3]).detach().norm() / x[3].detach().norm())
    assert float(value.detach()) == pytest.approx((0 + 1 + 0 + last) / 4)
    for gradient in (x.grad, y.grad):
        assert torch.equal(gradient[:3], torch.zeros(3, 6).double())
        assert bool(gradient[3].isfinite().all())
        assert bool(gradient[3].any())


# --- the penalty ---------------------------------------------------------------------------------


class Block(nn.Module):
    """x + relu(A x), with small weights."""

    def __init__(self, width, scale=0.3):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.layer.weight.mul_(scale)

    def forward(self, x):
        return x + self.act(self.layer(x))


class Residual(nn.Module):
    """Blocks between two linear layers, on flattened images; blocks may be checkpointed."""

    def __init__(self, scales=(0.3, 0.6, 0.1), width=8, pixels=64, classes=10, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(pixels, width)
            self.blocks = nn.ModuleList(Block(width, scale) for scale in scales)
            self.head = nn.Linear(width, classes)
        self.reentrant = None

    def forward(self, images):
        x = self.first(images.flatten(1))
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def images_of(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=seeded(seed))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gradients_of(model, value):
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "random"},
        {"direction": "ascent", "normalise": True},
        {"direction": "random", "p": 1},
    ],
)
def test_the_penalty_is_the_mean_distance_with_gradients_to_both_sides(options):
    model, images = Residual(), images_of(9)
    options |= {"n_projections": 7, "iterations": 2}
    with lacoot.BlockDistances(model, example=images, generator=seeded(1), **options) as distances:
        assert distances.blocks == NAMES
        model(images)
        value = distances.penalty(0.7)(model)
    generator, x, by_hand = seeded(1), model.first(images.flatten(1)), []
    for block in model.blocks:
        y = block(x)
        one = lacoot.max_sliced_wasserstein(x, y, generator=generator, **options)
        by_hand.append(one)
        x = y
    expected = 0.7 * sum(by_hand) / 3
    torch.testing.assert_close(value, expected)
    assert list(distances.latest) == NAMES
    assert [float(d) for d in distances.latest.values()] == pytest.approx(
        [float(d.detach()) for d in by_hand]
    )
    found, wanted = gradients_of(model, value), gradients_of(model, expected)
    assert found.keys() == wanted.keys()
    assert "first.weight" in found  # layers before the first block learn, too
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_penalty_or_are_refused(reentrant):
    model, images = Residual(), images_of(9)
    results = []
    for model.reentrant in (None, reentrant):
        with lacoot.BlockDistances(model, NAMES, generator=seeded(1)) as distances:
            if model.reentrant:
                with pytest.raises(ValueError, match="use_reentrant=False"):
                    model(images)
                assert not distances._features._running
                continue
            outputs = model(images)
            value = distances.penalty(1.0)(model) + outputs.square().mean()
            results.append(gradients_of(model, value))
            with pytest.raises(ValueError, match="no features"):  # not those computed again
                distances.distances()
    for name in results[0] if not reentrant else []:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_the_relative_penalty_is_the_score_of_the_same_name():
    model, images = Residual(), images_of(9)
    with lacoot.BlockDistances(model, NAMES, measure="relative") as distances:
        model(images)
        value = distances.penalty(0.7)(model)
    x, by_hand = model.first(images.flatten(1)), []
    for block in model.blocks:
        y = block(x)
        by_hand.append(((y - x).norm(dim=1) / x.norm(dim=1)).mean())
        x = y
    expected = 0.7 * sum(by_hand) / 3
    torch.testing.assert_close(value, expected)
    found, wanted = gradients_of(model, value), gradients_of(model, expected)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])
    scores = lacoot.relative_change(model, [(images, None)])
    assert {n: float(d) for n, d in distances.latest.items()} == pytest.approx(scores)


@pytest.mark.parametrize(
    "options",
    [
        {"n_projections": 50},
        {"p": 1},
        {"direction": "random"},
        {"iterations": 16},
        {"normalise": True},
    ],
)
def test_the_relative_penalty_takes_no_option_of_the_other(options):
    with pytest.raises(ValueError, match='measure="relative" takes no'):
        lacoot.BlockDistances(Residual(), NAMES, measure="relative", **options)
    with pytest.raises(ValueError, match="measure must be"):
        lacoot.BlockDistances(Residual(), NAMES, measure="paired")


def test_training_with_the_penalty_brings_blocks_closer_to_the_identity():
    data = load("digits").subset(train=256)
    ends = []
    for strength in (0.0, 3.0):
        model = Residual()
        with lacoot.BlockDistances(model, NAMES, direction="ascent") as distances:
            fit(model, data, epochs=3, lr=0.05, penalty=distances.penalty(strength), seed=1)
        ends.append(lacoot.relative_change(model, data.batches("valid")))
    assert sum(ends[1].values()) < 0.5 * sum(ends[0].values())


class StopsAt:
    """A penalty that interrupts its call of this number."""

    def __init__(self, number, penalty):
        self.number, self.penalty, self.calls = number, penalty, 0
        self.__qualname__ = penalty.__qualname__

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.number:
            raise KeyboardInterrupt
        return self.penalty(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "chosen", [{"direction": "random", "n_projections": 3}, {}, {"measure": "relative"}]
)
def test_a_run_that_goes_on_from_its_checkpoint_ends_where_a_whole_one_does(
    tmp_path, precision, chosen
):
    data = load("digits").subset(train=100, valid=20)
    state = torch.get_rng_state()
    ends = []
    for interrupted in (False, True):
        file = tmp_path / f"{interrupted}.pt"
        for stop in (True, False) if interrupted else (False,):
            model = Residual()
            with lacoot.BlockDistances(model, NAMES, **chosen) as distances:
                penalty = distances.penalty(0.5)

                stopping = StopsAt(6 if stop else None, penalty)  # in the second epoch
                options = {"epochs": 3, "lr": 0.1, "batch_size": 25, "precision": precision}
                try:
                    fit(model, data, penalty=stopping, checkpoint=file, **options)
                except KeyboardInterrupt:
                    assert stopping.calls == 6
            assert hooks_of(model) == 0
        assert stopping.calls == (8 if interrupted else 12)
        ends.append(model.state_dict())
    for name, weights in ends[0].items():
        assert torch.equal(weights, ends[1][name])
    assert torch.equal(state, torch.get_rng_state())
    with (
        lacoot.BlockDistances(model, NAMES, **chosen) as distances,
        pytest.raises(ValueError, match="made with penalty="),
    ):
        fit(model, data, penalty=distances.penalty(0.6), checkpoint=file, **options)
    with (
        lacoot.BlockDistances(model, NAMES, normalise=True) as distances,
        pytest.raises(ValueError, match="made with penalty="),
    ):
        fit(model, data, penalty=distances.penalty(0.5), checkpoint=file, **options)


def test_steps_draw_new_directions_and_seeds_tell_them_apart():
    model, images = Residual(), images_of(9)

    def three_steps(**options):
        options |= {"direction": "random", "n_projections": 2}
        with lacoot.BlockDistances(model, NAMES, **options) as distances:
            penalty = distances.penalty(1.0)
            return [float((model(images), penalty(model))[1].detach()) for _ in range(3)]

    first = three_steps()
    assert len(set(first)) == 3
    assert three_steps() == first
    assert set(three_steps(seed=1)).isdisjoint(first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # as fit does, anew in each epoch
        assert set(three_steps()).isdisjoint(first)


def test_ascent_in_training_is_short_draws_nothing_and_keeps_nothing():
    model, images = Residual(), images_of(9)
    with lacoot.BlockDistances(model, NAMES) as distances:
        values = []
        for _ in range(2):
            model(images)
            values.append(float(distances.penalty(1.0)(model).detach()))
        kept = [v for v in vars(distances).values() if isinstance(v, torch.Tensor)]
    short = {"direction": "ascent", "n_projections": 0, "iterations": 4}
    expected = [lacoot.max_sliced_wasserstein(x, y, **short) for _, x, y in streams(model, images)]
    assert values == pytest.approx([float(sum(expected)) / 3] * 2)
    assert distances.options == {**short, "p": 2, "normalise": False}
    assert not kept


@pytest.mark.parametrize(
    "options", [{"direction": "random"}, {"direction": "ascent"}, {"measure": "relative"}]
)
def test_features_are_let_go_of_after_the_penalty_and_by_the_next_step(options):
    model, images = Residual(), images_of(9)
    seen = []
    model.blocks[1].register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    with lacoot.BlockDistances(model, NAMES, **options) as distances:
        for step in range(6):
            outputs = model(images)
            assert seen[-1]() is not None
            if step % 2:  # a penalty that is left out holds one step's features, not more
                (outputs.mean() + distances.penalty(1.0)(model)).backward()
            del outputs
            alive = [ref() is not None for ref in seen]
            assert alive == [False] * step + [step % 2 == 0]
        del alive
    assert all(ref() is None for ref in seen)


def test_hooks_are_gone_whatever_happens():
    model, images = Residual(), images_of(5)
    state = torch.get_rng_state()
    seen = []

    def interrupted():
        with lacoot.BlockDistances(model, NAMES):
            seen.append(hooks_of(model))
            model(images)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [8]
    assert hooks_of(model) == 0
    distances = lacoot.BlockDistances(model, NAMES)
    assert hooks_of(model) == 0
    for _ in range(2):  # and may be used again
        with distances:
            model(images)
            assert float(distances.penalty(1.0)(model).detach()) > 0
        with pytest.raises(ValueError, match="with statement"):
            distances.penalty(1.0)(model)
    with distances, pytest.raises(RuntimeError, match="already"), distances:
        pass
    assert hooks_of(model) == 0
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_and_copies_are_not_counted():
    model, images = Residual(), images_of(9)
    with lacoot.BlockDistances(model, NAMES, generator=seeded(0)) as distances:
        copy, pickled = masks.clone(model), pickle.loads(pickle.dumps(model))
        model(images)
        for other in (copy, pickled):
            other(images_of(4, 1))
        expected = float(distances.penalty(1.0)(model).detach())
        model(images)
        with torch.no_grad():
            model(images)
        with pytest.raises(ValueError, match="with gradients"):
            distances.penalty(1.0)(model)
        model.eval()
        model(images)
        with pytest.raises(ValueError, match="eval mode"):
            distances.penalty(1.0)(model)
        model.train()
        with pytest.raises(ValueError, match="another model"):
            distances.penalty(1.0)(copy)
    with lacoot.BlockDistances(model, NAMES, generator=seeded(0)) as distances:
        model(images)
        assert float(distances.penalty(1.0)(model).detach()) == expected


class Odd(nn.Module):
    """What is no block that can be compared, by name."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(64, 8)
        self.block = nn.Sequential(nn.Linear(8, 8 if kind != "shape" else 4))
        self.never = nn.Sequential(nn.Linear(8, 8))
        self.wrong = OverItsInput()

    def forward(self, images):
        x = self.first(images.flatten(1))
        if self.kind == "twice":
            x = self.block(x)
        if self.kind == "inside":
            x = self.wrong(x)
        y = self.block(x)
        if self.kind == "after":
            y = y.mul_(2)
        return y


class OverItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x.add_(self.layer(x.clone()))


@pytest.mark.parametrize(
    ("kind", "block", "message"),
    [
        ("shape", "block", r"'block' changes the shape from \[5, 8\] to \[5, 4\]"),
        ("twice", "block", "'block' .*called .* leave it"),
        ("", "never", "'never' was .*(not called|called 0 times)"),
        ("inside", "wrong", "'wrong' are written over"),
        ("", "blok", "no block 'blok'; near it are .*'block'"),
    ],
)
def test_blocks_that_cannot_be_compared_are_told(kind, block, message):
    model, images = Odd(kind), images_of(5)

    def train():
        with lacoot.BlockDistances(model, [block]) as distances:
            model(images)
            distances.penalty(1.0)(model)

    for attempt in (
        train,
        lambda: lacoot.block_distances(model, [(images, None)], blocks=[block]),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert hooks_of(model) == 0


def test_features_that_are_written_over_after_the_block_are_told():
    model = Odd("after")
    with lacoot.BlockDistances(model, ["block"]) as distances:
        model(images_of(5))
        with pytest.raises(ValueError, match="'block' are written over in place"):
            distances.penalty(1.0)(model)


def test_bad_input_of_the_penalty_is_told_in_a_sentence():
    model = Residual()
    with pytest.raises(ValueError, match="Give blocks by name, or an example"):
        lacoot.BlockDistances(model)
    with pytest.raises(ValueError, match="each once"):
        lacoot.BlockDistances(model, ["blocks.0", "blocks.0"])
    with pytest.raises(ValueError, match="direction must be"):
        lacoot.BlockDistances(model, NAMES, direction="max")
    plain = models.build("lenet5", classes=10, in_channels=1, image_size=28)
    with pytest.raises(ValueError, match="no block that could be removed"):
        lacoot.BlockDistances(plain, example=torch.randn(2, 1, 28, 28))
    halves = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r"'0': Its .* not added.* '1': It changes the shape"):
        lacoot.BlockDistances(halves, example=torch.randn(2, 8))
    with lacoot.BlockDistances(model, NAMES) as distances:
        with pytest.raises(ValueError, match="strength must be"):
            distances.penalty(-1.0)
        with pytest.raises(ValueError, match="no features"):
            distances.penalty(1.0)(model)
        model(images_of(1))
        with pytest.raises(ValueError, match=r"'blocks.0' .*at least two samples"):
            distances.penalty(1.0)(model)
        model.blocks[1].layer.weight.data[0, 0] = math.nan
        model(images_of(5))
        with pytest.raises(ValueError, match=r"'blocks.1' .*NaN"):
            distances.penalty(1.0)(model)


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_tiny"])
def test_real_networks_train_with_the_penalty(name):
    model = models.build(name, classes=3, in_channels=3, image_size=32)
    images = torch.randn(4, 3, 32, 32, generator=seeded(0))
    names = structure.removable_blocks(model, images)
    with (
        lacoot.BlockDistances(model, example=images) as distances,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.train()
        loss = model(images).float().logsumexp(1).sum() + distances.penalty(0.1)(model)
    assert list(distances.latest) == names
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# --- scores over batches -------------------------------------------------------------------------


def streams(model, images):
    """Input and output of each of Residual's blocks, by calling them one by one."""
    x = model.first(images.flatten(1))
    for name, block in zip(NAMES, model.blocks, strict=True):
        y = block(x)
        yield name, x.detach(), y.detach()
        x = y


def test_block_distances_are_means_over_batches_by_size_in_ascending_order():
    model = Residual(scales=(0.5, 3.0, 0.05)).train()
    batches = [(images_of(8, 1), None), (images_of(4, 2), None)]
    generator, expected = seeded(0), dict.fromkeys(NAMES, 0.0)
    for images, _ in batches:
        for name, x, y in streams(model, images):
            one = lacoot.max_sliced_wasserstein(x, y, direction="ascent", generator=generator)
            expected[name] += len(images) / 12 * float(one)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = lacoot.block_distances(model, batches)
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == sorted(expected, key=expected.get) != NAMES
    assert list(found.values()) == sorted(found.values())
    assert list(lacoot.block_distances(model, batches, blocks=["blocks.1"])) == ["blocks.1"]
    assert model.training
    assert hooks_of(model) == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_tokens_and_positions_are_compared_vector_by_vector():
    x = features(3, 40, dtype=torch.float32).view(3, 4, 2, 5)
    y = x + features(3, 40, seed=1, dtype=torch.float32).view(3, 4, 2, 5)
    x[0, :, 0, 0] = y[0, :, 0, 0] = 0  # a vector along axis 1 that is 0 on both sides
    x[1, 2, 1, :] = 0  # one along the last axis that is 0 on one

    class Conv(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.inner = nn.Sequential(layer)

        def forward(self, images):
            return self.inner(images)

    for layer, axis in ((nn.Conv2d(4, 4, 1), 1), (nn.Linear(5, 5), -1)):
        model = Conv(layer)
        layer.forward = lambda images: y
        cosines = []
        for a, b in zip(
            x.movedim(axis, -1).reshape(-1, x.shape[axis]).double().numpy(),
            y.movedim(axis, -1).reshape(-1, x.shape[axis]).double().numpy(),
            strict=True,
        ):
            if a.any() and b.any():
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            else:
                cosines.append(float(not a.any() and not b.any()))
        batches = [(x, None)]
        found = lacoot.block_influence(model, batches, blocks=["inner"])
        assert found["inner"] == pytest.approx(1 - np.mean(cosines), rel=1e-5)
        found = lacoot.angular_distance(model, batches, blocks=["inner"])
        assert found["inner"] == pytest.approx(np.mean(np.arccos(cosines)) / np.pi, rel=1e-5)
        found = lacoot.relative_change(model, batches, blocks=["inner"])
        change = [float((b - a).norm() / a.norm()) for a, b in zip(x, y, strict=True)]
        assert found["inner"] == pytest.approx(np.mean(change), rel=1e-5)


def test_scores_are_those_of_eval_mode_and_leave_batch_norms_alone():
    model = models.build("resnet20", classes=10, in_channels=1, image_size=8).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = [(images_of(4), None)]
    found = lacoot.relative_change(model, batches)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert lacoot.relative_change(model.eval(), batches) == found


def test_a_block_that_is_the_identity_comes_first_in_every_score():
    model = Residual(scales=(0.5, 0.0, 0.5))
    model.blocks[1].layer.bias.data.zero_()
    batches = [(images_of(8), None)]
    for score in (
        lacoot.block_distances,
        lacoot.block_influence,
        lacoot.angular_distance,
        lacoot.relative_change,
    ):
        found = score(model, batches)
        assert next(iter(found)) == "blocks.1"
        assert found["blocks.1"] == pytest.approx(0, abs=1e-3)
        assert min(found["blocks.0"], found["blocks.2"]) > 0.01


def test_a_diffusion_transformer_is_measured_with_all_its_inputs():
    model = models.build("dit_tiny", classes=10, in_channels=1, image_size=8)
    inputs = images_of(4), torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.arange(4)
    nn.init.normal_(model.blocks[2].modulation[1].weight)
    found = lacoot.block_distances(model, [(inputs, None)])
    assert sorted(found) == [f"blocks.{i}" for i in range(6)]
    assert [name for name, value in found.items() if value > 0] == ["blocks.2"]


def test_bad_batches_are_told_in_a_sentence():
    model = Residual()
    for batches, message in (
        ([], "no batches"),
        ([(images_of(5)[:0], None)], "no inputs"),
        ([(images_of(1), None)], "at least two samples"),
    ):
        with pytest.raises(ValueError, match=message):
            lacoot.block_distances(model, batches)
    model.blocks[1].layer.weight.data[0, 0] = math.nan
    for score in (lacoot.block_distances, lacoot.block_influence, lacoot.relative_change):
        with pytest.raises(ValueError, match=r"'blocks.1' .*NaN"):
            score(model, [(images_of(5), None)])
    assert hooks_of(model) == 0


def test_a_random_order_depends_on_its_seed_alone():
    blocks = [f"b{i}" for i in range(20)]
    state = torch.get_rng_state()
    assert sorted(lacoot.random_order(blocks, 1)) == sorted(blocks)
    assert lacoot.random_order(blocks, 1) == lacoot.random_order(blocks, 1)
    assert lacoot.random_order(blocks, 1) != lacoot.random_order(blocks, 2)
    assert torch.equal(state, torch.get_rng_state())


# --- LaCo's merge --------------------------------------------------------------------------------


def test_the_merge_adds_the_others_differences_to_the_first():
    model = Residual()
    weights = [block.layer.weight.clone() for block in model.blocks]
    biases = [block.layer.bias.clone() for block in model.blocks]
    lacoot.laco_merge(model, NAMES)
    first = model.blocks[0].layer
    torch.testing.assert_close(first.weight, weights[1] + weights[2] - weights[0])
    torch.testing.assert_close(first.bias, biases[1] + biases[2] - biases[0])
    x = torch.randn(5, 8, generator=seeded(0))
    for gone in model.blocks[1:]:
        assert torch.equal(gone(x), x)
        assert not list(gone.parameters())


def test_only_blocks_that_are_built_alike_are_merged():
    model = Residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.blocks[2] = Block(4)
    masked = Residual()
    weight = masked.blocks[1].layer.weight
    masks.apply(masked, {"blocks.1.layer.weight": torch.ones_like(weight, dtype=torch.bool)})
    shared = Residual()
    shared.blocks[1].layer.weight = shared.blocks[0].layer.weight
    for network, blocks, message in (
        (model, NAMES, "not built alike"),
        (model, ["blocks.0"], "two or more"),
        (model, ["blocks.0", "head"], "not built alike"),
        (model, ["blocks.0", "blocks.7"], "no block 'blocks.7'"),
        (masked, NAMES[1:2] + NAMES[1:2], "each once"),
        (shared, NAMES, "share parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            lacoot.laco_merge(network, blocks)
    with pytest.raises(ValueError, match=r"masked|not built alike"):
        lacoot.laco_merge(masked, NAMES)
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before if "s.2" not in n)


# --- removal -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    data = load("digits").subset(train=400, valid=120, test=100)
    model = Residual(scales=(1.0, 1.0, 1.0), width=12)
    fit(model, data, epochs=6, lr=0.05, progress=False)
    return model, data


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_blocks_go_in_ascending_distance_and_are_really_deleted(trained):
    model, data = trained
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = lacoot.block_distances(model, data.batches("valid", 128))
    steps = list(lacoot.remove_blocks(model, data, tolerance=None))
    assert [s.removed for s in steps] == list(expected)
    assert [s.index for s in steps] == [1, 2, 3]
    by_hand = masks.clone(model)
    for step in steps:
        assert step.distances == pytest.approx(expected)
        by_hand.get_submodule(step.removed).forward = lambda x: x
        assert step.accuracy == evaluate(by_hand, data, "valid").accuracy
        assert step.test_accuracy == evaluate(by_hand, data, "test").accuracy
        left = 3 - step.index
        assert step.footprint.macs == 64 * 12 + left * 144 + 12 * 10
        assert step.footprint.parameters == 65 * 12 + left * 156 + 130
        assert step.footprint.depth == 2 + left
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_removal_stops_before_the_drop_passes_the_tolerance(trained):
    model, data = trained
    start = evaluate(model, data, "valid").accuracy
    every = [s.accuracy for s in lacoot.remove_blocks(model, data, tolerance=None)]
    assert start - every[-1] > start - every[0] >= 0
    exactly = start - every[0]
    for tolerance, left in ((exactly, None), (1.0, 3)):
        steps = list(lacoot.remove_blocks(model, data, tolerance=tolerance))
        passing = [start - a > tolerance + 1e-9 for a in every] + [True]
        assert len(steps) == passing.index(True) == (left or passing.index(True))
    # what is trained on is the last network that was yielded, not the one that lost too much
    assert exactly < start - every[-1]
    *steps, healed = lacoot.remove_blocks(model, data, tolerance=exactly, heal_epochs=1, lr=0.01)
    assert 0 < len(steps) < 3
    assert healed.footprint.macs == steps[-1].footprint.macs
    scores = dict(zip(NAMES, (3.0, 1.0, 2.0), strict=True))
    worst = list(lacoot.remove_blocks(model, data, tolerance=None, distances=scores))
    assert [s.removed for s in worst] == ["blocks.1", "blocks.2", "blocks.0"]
    drop = start - worst[0].accuracy
    if drop > 0:
        assert not list(lacoot.remove_blocks(model, data, tolerance=drop - 1e-6, distances=scores))


def test_published_and_given_orders(trained):
    model, data = trained

    def order(**options):
        return [s.removed for s in lacoot.remove_blocks(model, data, tolerance=None, **options)]

    assert order(order="last") == NAMES[::-1]
    assert order(order=["blocks.1", "blocks.0"]) == ["blocks.1", "blocks.0"]
    # far below the mean is |z| = 1.41 and goes last; near the mean goes first
    scores = dict(zip(NAMES, (0.1, 1.0, 1.3), strict=True))
    z = stats.zscore(list(scores.values()))
    percentile = [stats.percentileofscore(list(scores.values()), v) for v in scores.values()]
    by_hand = np.argsort(np.abs(z) + np.array(percentile) / 100)
    assert order(order="reference", distances=scores) == [NAMES[i] for i in by_hand]
    assert order(order="distance", distances=scores) == NAMES
    assert by_hand[0] != 0


def test_healing_is_one_more_step_that_decides_nothing(trained, tmp_path):
    model, data = trained
    options = {"tolerance": None, "order": "last", "heal_epochs": 2, "lr": 0.02}
    plain = list(lacoot.remove_blocks(model, data, tolerance=None, order="last"))
    steps = list(lacoot.remove_blocks(model, data, **options))
    assert [s.accuracy for s in steps[:3]] == [s.accuracy for s in plain]
    healed = steps[3]
    assert (healed.removed, healed.healed_epochs, healed.index) == (None, 2, 4)
    assert [s.healed_epochs for s in steps[:3]] == [0, 0, 0]
    assert healed.loss < plain[-1].loss
    assert healed.footprint.macs == plain[-1].footprint.macs
    assert same(steps[2].model, plain[2].model)  # earlier steps' networks are not trained on
    # resumed after any step, from disk, the run ends in the same numbers
    for done in (1, 3, 4):
        folder = tmp_path / str(done)
        run = lacoot.remove_blocks(model, data, history=History.resume(folder), **options)
        for _ in range(done):
            next(run)
        history = History.resume(folder)
        assert len(history) == done
        rest = list(lacoot.remove_blocks(model, data, history=history, **options))
        assert [s.removed for s in rest] == [s.removed for s in steps[done:]]
        assert same(history[-1].model, healed.model)
        assert history[-1].accuracy == healed.accuracy
    with pytest.raises(ValueError, match="begun with heal_epochs=2"):
        lacoot.remove_blocks(model, data, history=history, **options | {"heal_epochs": 3})
    nothing = {"distances": dict.fromkeys(NAMES, 1.0), "heal_epochs": 1}
    for step in lacoot.remove_blocks(model, data, tolerance=0.0, **nothing):
        assert step.index > 0


def test_bad_input_of_removal_is_told_before_any_work(trained):
    model, data = trained
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = data.valid.images[:0], data.valid.labels[:0]
    empty = dataclasses.replace(data, name="empty", valid=Split(*images))
    for network, split, options, message in (
        (model, empty, {}, "valid split of 'empty' is too small"),
        (plain, data, {}, "no block that could be removed"),
        (model, data, {"tolerance": -0.1}, "tolerance must be"),
        (model, data, {"order": "best"}, "order must be"),
        (model, data, {"order": ["blocks.0", "head"]}, "'head' is no block"),
        (model, data, {"order": ["blocks.0", "blocks.0"]}, "twice"),
        (model, data, {"distances": {"blocks.9": 1.0}}, "'blocks.9' is no block"),
        (model, data, {"distances": {"blocks.0": math.nan}}, "is NaN"),
        (model, data, {"heal_epochs": -1}, "epochs must be"),
    ):
        with pytest.raises(ValueError, match=message):
            lacoot.remove_blocks(network, split, **{"tolerance": 0.1} | options)


def test_resnet18_loses_four_blocks_and_more_than_half_of_its_macs():
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=seeded(0), dtype=torch.uint8)
    split = images, torch.arange(4)
    data = from_tensors("four", split, split, split, classes="abcdefghij")
    model = models.build("resnet18", classes=10, in_channels=3, image_size=32)
    assert footprint(model, torch.randn(1, 3, 32, 32)).macs / 1e6 == pytest.approx(140.19, abs=5e-3)
    steps = list(lacoot.remove_blocks(model, data, tolerance=None))
    assert {s.removed for s in steps} == {f"layer{i}.1" for i in range(1, 5)}
    macs = [s.footprint.macs / 1e6 for s in steps]
    assert macs == pytest.approx([121.31, 102.44, 83.56, 64.69], abs=5e-3)
    assert steps[-1].footprint.parameters / 1e6 == pytest.approx(4.903, abs=5e-4)
    assert steps[-1].footprint.depth == 10
