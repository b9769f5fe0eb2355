"""The max-sliced Wasserstein distance, the penalty, what ranks blocks, and their removal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pruning101 import lacoot


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
def test_ascent_climbs_beyond_where_it_starts(d, counts, monkeypatch):
    # as wide along one direction as y is narrow: means agree, and the start has to turn
    x, y = features(counts[0], d), features(counts[1], d, seed=1)
    y = y - y.mean(0) + x.mean(0)
    y[:, 0] *= 6
    found = lacoot.max_sliced_wasserstein(x, y, direction="ascent")
    along_first = lacoot.max_sliced_wasserstein(x, y, projections=torch.eye(d)[:, :1])
    random = lacoot.max_sliced_wasserstein(x, y)
    assert float(found) >= float(along_first)
    assert float(found) > 1.3 * float(random)
    monkeypatch.setattr("pruning101.core.transport._ITERATIONS", 0)
    start = float(lacoot.max_sliced_wasserstein(x, y, direction="ascent"))
    assert float(found) > (1.1 if d == 400 else 1.002) * start


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
