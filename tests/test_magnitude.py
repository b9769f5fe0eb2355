"""Magnitude pruning: thresholds, scan, the recipe, and units that lost all inputs or outputs."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pruning101 import magnitude
from pruning101.core import masks, models, structure
from pruning101.core.data import load
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit
from pruning101.widgets import magnitude as widget


def mlp(*sizes: int, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])


def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight.data, m.bias.data, m.running_mean):
                t.copy_(torch.randn(t.shape, generator=g))
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)


def zero_units(layer: nn.Module, units: list[int]) -> None:
    with torch.no_grad():
        layer.weight[units] = 0


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=512, valid=150, test=150)


@pytest.fixture(scope="module")
def trained(digits):
    model = mlp(64, 32, 16, 10)
    fit(model, digits, epochs=6, lr=0.1, progress=False)
    return model


# --- scores and thresholds ---------------------------------------------------------------------


def test_scores_are_absolute_effective_weights():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    found = magnitude.scores(model)
    assert list(found) == ["0.weight", "3.weight"]
    assert torch.equal(found["0.weight"], model[0].weight.abs())
    masks.apply(model, {"3.weight": torch.eye(5, 12, dtype=torch.bool)})
    with torch.no_grad():
        model[3].weight_orig.fill_(-2.0)  # as an optimiser would, behind the effective weight
    assert torch.equal(magnitude.scores(model)["3.weight"], 2 * torch.eye(5, 12))
    assert not any(s.requires_grad for s in magnitude.scores(model).values())


@given(q=st.floats(0, 3), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_masks_by_std_are_those_of_the_formula_and_of_torch(q, seed):
    model = mlp(9, 7, 4, seed=seed)
    found = magnitude.masks_by_std(model, q)
    for layer in ("1", "3"):
        w = model.get_submodule(layer).weight.detach().numpy()
        expected = np.abs(w) >= np.float32(q * float(w.std()))
        assert np.array_equal(found[f"{layer}.weight"].numpy(), expected)
        twin = copy.deepcopy(model.get_submodule(layer))
        prune.l1_unstructured(twin, "weight", amount=int((~expected).sum()))
        assert torch.equal(found[f"{layer}.weight"], twin.weight_mask.bool())


def test_masks_by_std_of_a_gaussian_layer_remove_erf():
    model = nn.Sequential(nn.Linear(1000, 500))
    nn.init.normal_(model[0].weight, std=0.3, generator=torch.Generator().manual_seed(0))
    for q, expected in ((0.25, 0.197), (0.5, 0.383), (1, 0.683), (1.5, 0.866), (2, 0.954)):
        gone = 1 - magnitude.masks_by_std(model, q)["0.weight"].float().mean().item()
        assert gone == pytest.approx(expected, abs=0.003)
        assert magnitude.gaussian_sparsity(q) == pytest.approx(expected, abs=6e-4)


def test_a_later_round_uses_the_spread_of_the_weights_still_there_and_revives_none():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[5.0, -3.0, 0.4, 0.2]])
    masks.apply(model, {"0.weight": torch.tensor([[False, True, True, True]])})
    # survivors -3, 0.4, 0.2: mean -0.8, variance (4.84 + 1.44 + 1) / 3
    std = math.sqrt((4.84 + 1.44 + 1) / 3)
    just_below, just_above = 0.4 / std - 1e-3, 0.4 / std + 1e-3
    assert magnitude.masks_by_std(model, just_below)["0.weight"].tolist() == [
        [False, True, True, False]
    ]
    assert magnitude.masks_by_std(model, just_above)["0.weight"].tolist() == [
        [False, True, False, False]
    ]
    assert magnitude.masks_by_std(model, 0)["0.weight"].tolist() == [[False, True, True, True]]


def test_masks_by_std_takes_a_quality_a_layer_and_survives_an_empty_layer():
    model = mlp(8, 6, 3)
    found = magnitude.masks_by_std(model, {"3": 1.0})
    assert found["1.weight"].all()
    assert torch.equal(found["3.weight"], magnitude.masks_by_std(model, 1.0)["3.weight"])
    same = magnitude.masks_by_std(model, {"3.weight": 1.0})
    assert torch.equal(found["3.weight"], same["3.weight"])
    masks.apply(model, {"3.weight": torch.zeros(3, 6, dtype=torch.bool)})
    assert not magnitude.masks_by_std(model, 1.0)["3.weight"].any()


@pytest.mark.parametrize("quality", [-0.1, math.nan, math.inf, {"nowhere": 1.0}])
def test_masks_by_std_refuses_bad_qualities(quality):
    with pytest.raises(ValueError, match=r"quality|nowhere"):
        magnitude.masks_by_std(mlp(4, 3, 2), quality)


def test_masks_by_std_refuses_nan_weights_and_other_types():
    model = mlp(4, 3, 2)
    with pytest.raises(TypeError, match="quality"):
        magnitude.masks_by_std(model, "1")
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        magnitude.masks_by_std(model, 1.0)


# --- the scan ----------------------------------------------------------------------------------


def test_the_scan_is_that_of_torchs_pruning_one_layer_at_a_time(trained, digits):
    before = copy.deepcopy(trained.state_dict())
    scan = magnitude.sensitivity_scan(trained, digits, sparsities=(0.9, 0.5), layers=["1", "5"])
    assert scan.sparsities == (0.0, 0.5, 0.9)
    assert list(scan.accuracy) == ["1", "5"]
    assert scan.weights == {"1": 64 * 32, "5": 160}
    for layer in scan.accuracy:
        for sparsity, accuracy in zip(scan.sparsities, scan.accuracy[layer], strict=True):
            twin = copy.deepcopy(trained)
            prune.l1_unstructured(twin.get_submodule(layer), "weight", amount=sparsity)
            assert accuracy == evaluate(twin, digits, "valid").accuracy
    assert len(set(scan.accuracy["1"])) > 1
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert scan.table().loc[0.9, "5"] == scan.accuracy["5"][2]
    with pytest.raises(ValueError, match="sparsities"):
        magnitude.sensitivity_scan(trained, digits, sparsities=(1.5,))
    with pytest.raises(ValueError, match="nowhere"):
        magnitude.sensitivity_scan(trained, digits, layers=["nowhere"])


def test_sparsities_from_a_scan_cost_every_layer_the_same_drop():
    # a loses 0.2 per unit of sparsity, b 0.4 per unit: at equal drop a goes twice as far
    scan = magnitude.Scan(
        (0.0, 0.5, 1.0), {"a": (0.9, 0.8, 0.7), "b": (0.9, 0.7, 0.5)}, {"a": 100, "b": 100}
    )
    found = magnitude.sparsities_from_scan(scan, 0.6)
    assert found == pytest.approx({"a": 0.8, "b": 0.4})


def test_an_accuracy_that_recovers_by_chance_buys_no_sparsity():
    scan = magnitude.Scan(
        (0.0, 0.3, 0.6, 0.9),
        {"a": (0.9, 0.7, 0.9, 0.5), "b": (0.9, 0.8, 0.7, 0.6)},
        {"a": 100, "b": 100},
    )
    # at a drop of 0.3, a stands half-way between its drops of 0.2 (reached at 0.3) and 0.4
    found = magnitude.sparsities_from_scan(scan, 0.825)
    assert found == pytest.approx({"a": 0.75, "b": 0.9})


@given(
    data=st.lists(st.lists(st.integers(0, 100), min_size=4, max_size=4), min_size=1, max_size=4),
    sparsity=st.floats(0, 0.95),
)
@settings(max_examples=80, deadline=None)
def test_sparsities_from_a_scan_meet_the_total(data, sparsity):
    names = "abcd"[: len(data)]
    scan = magnitude.Scan(
        (0.0, 0.3, 0.6, 0.95),
        {n: tuple(v / 100 for v in values) for n, values in zip(names, data, strict=True)},
        {n: 10 ** (i + 1) for i, n in enumerate(names)},
    )
    found = magnitude.sparsities_from_scan(scan, sparsity)
    total = sum(found[n] * scan.weights[n] for n in names) / sum(scan.weights.values())
    assert total == pytest.approx(sparsity, abs=1e-9)
    assert all(-1e-12 <= s <= 0.95 + 1e-12 for s in found.values())


def test_sparsities_from_a_scan_beyond_it_are_refused():
    scan = magnitude.Scan((0.0, 0.5), {"a": (1.0, 0.5)}, {"a": 10})
    with pytest.raises(ValueError, match="scan further"):
        magnitude.sparsities_from_scan(scan, 0.6)


def test_dropout_rate_is_the_papers():
    assert magnitude.dropout_rate(0.5, 1000, 90) == pytest.approx(0.15)
    assert magnitude.dropout_rate(0.3, 70, 70) == 0.3
    assert magnitude.dropout_rate(0.5, 70, 0) == 0
    for bad in ((1.5, 10, 5), (0.5, 5, 10), (0.5, 0, 0), (0.5, 5, -1)):
        with pytest.raises(ValueError, match=r"rate|connections"):
            magnitude.dropout_rate(*bad)


# --- the recipe --------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_rounds_remove_an_equal_share_of_what_is_left_and_leave_the_caller_alone(trained, digits):
    before = state(trained)
    steps = list(
        magnitude.prune_iteratively(trained, digits, sparsity=0.875, rounds=3, epochs=1, lr=0.02)
    )
    assert [s.index for s in steps] == [1, 2, 3]
    for step, density in zip(steps, (0.5, 0.25, 0.125), strict=True):
        for name, mask in masks.masks_of(step.model).items():
            assert int(mask.sum()) == mask.numel() - round((1 - density) * mask.numel()), name
        assert step.accuracy == evaluate(step.model, digits, "valid").accuracy
        assert step.test_accuracy == evaluate(step.model, digits, "test").accuracy
    for earlier, later in itertools.pairwise(steps):
        for name, mask in masks.masks_of(later.model).items():
            assert not (mask & ~masks.masks_of(earlier.model)[name]).any(), "revived a weight"
    total = 64 * 32 + 32 * 16 + 160
    assert [s.removed for s in steps] == [total // 2, total // 4, total // 8]
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert not masks.masks_of(trained)


def test_without_retraining_survivors_keep_their_trained_values(trained, digits):
    (step,) = magnitude.prune_iteratively(trained, digits, sparsity=0.6, rounds=1, epochs=0)
    for layer, module in structure.prunable(step.model).items():
        mask = masks.masks_of(step.model)[f"{layer}.weight"]
        assert torch.equal(module.weight, trained.get_submodule(layer).weight * mask)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_one_round_without_retraining_is_torchs_own_pruning(trained, digits, scope):
    (step,) = magnitude.prune_iteratively(
        trained, digits, sparsity=0.7, rounds=1, epochs=0, scope=scope
    )
    twin = copy.deepcopy(trained)
    targets = [(m, "weight") for m in structure.prunable(twin).values()]
    if scope == "global":
        prune.global_unstructured(targets, prune.L1Unstructured, amount=0.7)
    else:
        for module, name in targets:
            prune.l1_unstructured(module, name, amount=0.7)
    for layer, module in structure.prunable(twin).items():
        assert torch.equal(masks.masks_of(step.model)[f"{layer}.weight"], module.weight_mask.bool())
    assert step.accuracy == evaluate(twin, digits, "valid").accuracy


def test_retraining_starts_from_the_survivors_and_is_fit_itself(trained, digits):
    (step,) = magnitude.prune_iteratively(
        trained,
        digits,
        sparsity=0.8,
        rounds=1,
        epochs=2,
        lr=0.03,
        penalty="l1",
        strength=1e-3,
        retrain={"optimizer": "adam", "batch_size": 64},
        seed=3,
    )
    twin = copy.deepcopy(trained)
    masks.apply(twin, masks.from_scores(magnitude.scores(twin), 0.8, scope="layer"))
    fit(
        twin,
        digits,
        epochs=2,
        lr=0.03,
        optimizer="adam",
        batch_size=64,
        penalty=lambda m: 1e-3 * sum(m[i].weight.abs().sum() for i in (1, 3, 5)),
        seed=3001,
        progress=False,
    )
    for a, b in zip(step.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_layers_left_out_of_a_mapping_stay_whole(trained, digits):
    steps = list(
        magnitude.prune_iteratively(
            trained, digits, sparsity={"1": 0.75, "3": 0.5}, rounds=2, epochs=0
        )
    )
    kept = {n: int(m.sum()) for n, m in masks.masks_of(steps[-1].model).items()}
    assert kept == {"1.weight": 512, "3.weight": 256, "5.weight": 160}
    assert int(masks.masks_of(steps[0].model)["1.weight"].sum()) == 1024


def test_quality_rounds_apply_the_threshold_again_each_time(trained, digits):
    steps = list(magnitude.prune_iteratively(trained, digits, quality=0.5, rounds=2, epochs=0))
    twin = copy.deepcopy(trained)
    for step in steps:
        before = masks.sparsity(twin)
        masks.apply(twin, magnitude.masks_by_std(twin, 0.5))
        assert masks.sparsity(step.model) == masks.sparsity(twin) > before


def test_pruning_a_pruned_model_starts_from_its_masks(trained, digits):
    start = copy.deepcopy(trained)
    masks.apply(start, {"1.weight": torch.rand(32, 64, generator=torch.Generator()) > 0.9})
    (step,) = magnitude.prune_iteratively(start, digits, sparsity=0.95, rounds=1, epochs=0)
    for name, mask in masks.masks_of(start).items():
        assert not (masks.masks_of(step.model)[name] & ~mask).any()
    (step,) = magnitude.prune_iteratively(start, digits, sparsity={"1": 0.2}, rounds=1, epochs=0)
    assert torch.equal(masks.masks_of(step.model)["1.weight"], masks.masks_of(start)["1.weight"]), (
        "a layer that came in sparser than asked for must stay as it is"
    )


def test_another_score_decides_what_goes_and_the_gone_stay_gone(trained, digits):
    def largest_first(model):
        return {name: 1 / (1 + s) for name, s in magnitude.scores(model).items()}

    steps = list(
        magnitude.prune_iteratively(
            trained, digits, sparsity=0.75, rounds=2, epochs=0, score=largest_first
        )
    )
    for layer, module in structure.prunable(steps[-1].model).items():
        mask = masks.masks_of(steps[-1].model)[f"{layer}.weight"]
        w = trained.get_submodule(layer).weight.abs()
        assert w[mask].max() <= w[~mask].min()
        assert mask.float().mean() == 0.25, module


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_cut_off_goes_on_to_the_same_weights(trained, digits, tmp_path, done):
    options = {"sparsity": 0.9, "rounds": 3, "epochs": 1, "lr": 0.05, "seed": 5}
    whole = list(magnitude.prune_iteratively(trained, digits, **options))
    run = magnitude.prune_iteratively(
        trained, digits, **options, history=History(path=tmp_path / "run")
    )
    for _ in range(done):
        next(run)
    run.close()
    history = History.load(tmp_path / "run")
    rest = list(magnitude.prune_iteratively(trained, digits, **options, history=history))
    assert [s.index for s in rest] == list(range(done + 1, 4))
    assert len(history) == 3
    assert same_state(history.last.model, whole[-1].model)
    with pytest.raises(ValueError, match="lr"):
        magnitude.prune_iteratively(trained, digits, **{**options, "lr": 0.1}, history=history)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "quality": 1.0},
        {"sparsity": 1.2},
        {"sparsity": {"1": -0.5}},
        {"sparsity": {"nowhere": 0.5}},
        {"quality": -1.0},
        {"sparsity": 0.5, "rounds": 0},
        {"sparsity": 0.5, "epochs": -1},
        {"sparsity": 0.5, "penalty": "l3"},
    ],
)
def test_bad_settings_are_refused_before_any_work(digits, options):
    with pytest.raises(ValueError):  # noqa: PT011 - one of many sentences
        magnitude.prune_iteratively(mlp(64, 4, 10), digits, **options)


def test_nine_tenths_go_where_nothing_is_said(digits):
    *_, last = magnitude.prune_iteratively(mlp(64, 4, 10), digits, rounds=2, epochs=0)
    # two layers of 256 and 40 weights, each cut to a tenth
    assert masks.sparsity(last.model) == pytest.approx((230 + 36) / 296)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_penalties_have_the_closed_form_gradient_of_kept_weights_only(kind):
    model = mlp(5, 4, 3).double()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    masks.apply(model, {"1.weight": mask})
    penalty = magnitude.weight_penalty(kind, 0.3)(model)
    w1, w3 = model[1].weight_orig.detach() * mask, model[3].weight.detach()
    penalty.backward()
    if kind == "l1":
        assert penalty.item() == pytest.approx(0.3 * (w1.abs().sum() + w3.abs().sum()).item())
        expected = 0.3 * w1.sign(), 0.3 * w3.sign()
    else:
        expected_value = 0.15 * (w1.square().sum() + w3.square().sum()).item()
        assert penalty.item() == pytest.approx(expected_value)
        expected = 0.3 * w1, 0.3 * w3
    torch.testing.assert_close(model[1].weight_orig.grad, expected[0])
    torch.testing.assert_close(model[3].weight.grad, expected[1])
    assert model[1].bias.grad is None


# --- dead units --------------------------------------------------------------------------------


def unchanged(model: nn.Module, small: nn.Module, x: torch.Tensor, tolerance=1e-11) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=tolerance, atol=tolerance)


def test_a_unit_without_inputs_leaves_its_constant_in_the_next_bias():
    model = mlp(3, 2, 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.5, 2.0]))
        model[3].weight.copy_(torch.tensor([[1.0, 10.0], [-1.0, 20.0]]))
        model[3].bias.copy_(torch.tensor([0.25, 0.0]))
    report = magnitude.remove_dead_units(model, torch.zeros(1, 3))
    assert report.model is model
    assert report.removed == {"1": 1}
    assert not report.kept
    assert model[1].weight.tolist() == [[1, 2, 3]]
    assert model[3].weight.tolist() == [[1], [-1]]
    assert model[3].bias.tolist() == [20.25, 40]  # relu(2) times 10 and 20


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.PReLU])
@given(seed=st.integers(0, 10_000), sparsity=st.floats(0.5, 0.98))
@settings(max_examples=12, deadline=None)
def test_random_masks_on_an_mlp_keep_the_function_and_leave_no_dead_unit(
    activation, seed, sparsity
):
    model = mlp(6, 9, 7, 8, 4, seed=seed, activation=activation).double()
    g = torch.Generator().manual_seed(seed)
    noise = {n: torch.rand(s.shape, generator=g) for n, s in magnitude.scores(model).items()}
    masks.apply(model, masks.from_scores(noise, sparsity))
    x = torch.randn(50, 6, generator=g, dtype=torch.float64)
    report = magnitude.remove_dead_units(model, x[:1], inplace=False)
    assert masks.masks_of(model), "the copy is not the caller's"
    assert not masks.masks_of(report.model)
    unchanged(model, report.model, x)
    linear = [m for m in report.model if isinstance(m, nn.Linear)]
    for first, second in itertools.pairwise(linear):
        if first.out_features > 1:
            assert (first.weight != 0).any(1).all(), "a unit without inputs is left"
            assert (second.weight != 0).any(0).all(), "a unit without outputs is left"
    assert linear[-1].out_features == 4


def test_deadness_spreads_forwards_and_backwards():
    model = mlp(3, 4, 4, 4, 2).double()
    with torch.no_grad():
        # forwards: 2 of the first layer's units are dead, and unit 0 of the second hears only them
        model[1].weight[:2] = 0
        model[3].weight[0, 2:] = 0
        # backwards: unit 3 of the third has no outputs, and unit 3 of the second speaks to it alone
        model[7].weight[:, 3] = 0
        model[5].weight[:3, 3] = 0
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x, inplace=False)
    assert report.removed == {"1": 2, "3": 2, "5": 1}
    unchanged(model, report.model, x)
    assert footprint(report.model, x[:1]).parameters < footprint(model, x[:1]).parameters


def test_nothing_dead_changes_nothing():
    model = mlp(3, 4, 2)
    before = state(model)
    report = magnitude.remove_dead_units(model, torch.zeros(1, 3))
    assert report.removed == {}
    assert report.kept == {}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_layer_that_is_dead_altogether_keeps_one_unit():
    model = mlp(3, 4, 2).double()
    zero_units(model[1], [0, 1, 2, 3])
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x, inplace=False)
    assert report.removed == {"1": 3}
    assert "needs a unit" in report.kept["1"]
    unchanged(model, report.model, x)


def test_a_consumer_without_bias_gets_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    zero_units(model[0], [1])
    model[0].bias.data[1] = 1.5
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x, inplace=False)
    assert report.removed == {"0": 1}
    torch.testing.assert_close(report.model[2].bias, 1.5 * model[2].weight[:, 1])
    unchanged(model, report.model, x)


def conv_net(padding: int, mode: str = "zeros", *, norm: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, padding=padding, padding_mode=mode),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(5 * (2 if padding else 1) ** 2, 4),
        ).double()
    randomise_norms(model)
    return model


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("norm", [True, False])
def test_constants_pass_norms_pools_and_flattening_and_stop_at_a_zero_border(padding, mode, norm):
    model = conv_net(padding, mode, norm=norm)
    zero_units(model[0], [0, 2, 5])
    zero_units(model[4], [1, 3])
    with torch.no_grad():
        # what units 0 and 2 emit after norm and ReLU is above 0, what 5 emits is 0
        if norm:
            b = model[1]
            bias = b.bias
            scale = b.weight / (b.running_var + b.eps).sqrt()
            model[0].bias[[0, 2, 5]] = (torch.tensor([1.0, 0.5, -1.0]) - bias[[0, 2, 5]]) / scale[
                [0, 2, 5]
            ] + b.running_mean[[0, 2, 5]]
        else:
            model[0].bias[[0, 2, 5]] = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2, 8, 8, generator=g, dtype=torch.float64)
    report = magnitude.remove_dead_units(model, x[:2], inplace=False)
    unchanged(model, report.model, x)
    if padding and mode == "zeros":
        assert report.removed == {"0": 1, "4": 2}
        assert "2 without inputs" in report.kept["0"]
        assert "border" in report.kept["0"]
    else:
        assert report.removed == {"0": 3, "4": 2}
        assert report.kept == {}
    assert report.model[9].in_features == 3 * (4 if padding else 1)


def test_channels_without_outputs_go_whatever_the_border():
    model = conv_net(1)
    with torch.no_grad():
        model[4].weight[:, [1, 2]] = 0
        model[9].weight.view(4, 5, 4)[:, 0] = 0
    x = torch.randn(9, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x[:2], inplace=False)
    assert report.removed == {"0": 2, "4": 1}
    unchanged(model, report.model, x)


def test_depthwise_channels_go_with_the_channel_they_filter():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 1),
            nn.ReLU6(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 4, 1),
        ).double()
    randomise_norms(model)
    zero_units(model[2], [1])  # deaf to its channel, still emits
    zero_units(model[0], [4, 5])
    with torch.no_grad():
        model[0].bias[4:] = torch.tensor([-1.0, 1.0])  # 4 emits 0, 5 emits 1 up to the border
    x = torch.randn(9, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x[:1], inplace=False)
    unchanged(model, report.model, x)
    assert report.model[0].out_channels == report.model[2].groups == 4
    assert "border" in report.kept["0"]


def test_units_of_tokens_are_the_last_dimension():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Dropout(), nn.Linear(7, 5)).double()
    zero_units(model[0], [0, 6])
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x, inplace=False)
    assert report.removed == {"0": 2}
    unchanged(model, report.model, x)


def test_a_norm_over_the_layer_is_not_crossed():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 5)).double()
    zero_units(model[0], [0, 6])
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x, inplace=False)
    assert report.removed == {}
    unchanged(model, report.model, x)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_networks_keep_their_function(name):
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(num_classes=10).double().eval()
    randomise_norms(model)
    with torch.no_grad():
        for m in model.modules():  # keep activations of a moderate size through random norms
            if isinstance(m, nn.BatchNorm2d):
                m.weight.mul_(0.3)
    inner = {"resnet18": ("layer1.0.conv1", "layer4.1.conv1")}.get(
        name, ("features.3.conv.0.0", "features.5.conv.1.0")
    )
    for layer in inner:
        zero_units(model.get_submodule(layer), list(range(0, 40, 2)))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x[:1], inplace=False)
    assert sum(report.removed.values()) > 5, report
    # with random norms about half of the dead channels emit more than 0 into a padded convolution
    assert report.kept
    assert any("border" in reason for reason in report.kept.values())
    unchanged(model, report.model, x, 1e-9)
    before, after = footprint(model, x[:1]), footprint(report.model, x[:1])
    assert after.parameters < before.parameters
    assert after.macs < before.macs


def test_lenet5_pruned_hard_becomes_smaller_and_stays_the_same():
    model = models.build("lenet5", in_channels=1, image_size=28).double()
    masks.apply(model, masks.from_scores(magnitude.scores(model), 0.995))
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    report = magnitude.remove_dead_units(model, x[:1], inplace=False)
    unchanged(model, report.model, x)
    assert sum(report.removed.values()) > 20
    assert footprint(report.model, x[:1]).parameters < 0.8 * footprint(model, x[:1]).parameters


# --- the widget --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def widget_state(trained, digits):
    before = state(trained)
    prepared = widget.precompute(trained, digits, qualities=(0.0, 0.5, 1.0, 2.0, 3.0))
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    return prepared


def test_the_widgets_numbers_are_the_librarys(widget_state, trained, digits):
    assert list(widget_state.sparsity) == [widget.ALL, "1", "3", "5"]
    for i, q in enumerate((0.0, 0.5, 1.0, 2.0, 3.0)):
        for name, quality in ((widget.ALL, q), ("3", {"3": q})):
            twin = masks.clone(trained)
            masks.apply(twin, magnitude.masks_by_std(twin, quality))
            assert widget_state.accuracy[name][i] == evaluate(twin, digits, "valid").accuracy
            share = masks.sparsity(twin if name == widget.ALL else twin[3])
            assert widget_state.sparsity[name][i] == pytest.approx(share, abs=1e-12)


def test_every_setting_of_the_widget_draws_and_says_what_it_shows(widget_state):
    from matplotlib import pyplot as plt

    sentences = set()
    for layer in (widget.ALL, *widget_state.weights):
        for i, quality in enumerate(widget_state.qualities):
            figure = widget.draw(widget_state, layer=layer, quality=float(quality))
            left, right = figure.axes
            edges = sorted(line.get_xdata()[0] for line in left.lines)
            assert edges == pytest.approx([-quality, quality])
            points = [tuple(line.get_ydata()) for line in right.lines]
            assert (widget_state.accuracy[layer][i],) in points
            assert (widget_state.sparsity[layer][i],) in points
            assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
            plt.close(figure)
            text = widget.describe(widget_state, layer=layer, quality=float(quality))
            assert f"{widget_state.accuracy[layer][i]:.1%}" in text
            sentences.add(text)
    assert len(sentences) == 4 * 5


def test_the_widget_has_one_slider_that_says_what_it_moves(widget_state):
    ipywidgets = pytest.importorskip("ipywidgets")
    box = widget.show(widget_state)
    rows = [c.children for c in box.children if isinstance(c, ipywidgets.HBox)]
    sliders = [c for row in rows for c in row if isinstance(c, ipywidgets.FloatSlider)]
    assert len(sliders) == 1
    assert "threshold" in rows[0][0].description
    image = next(c for c in box.children if isinstance(c, ipywidgets.Image))
    before = image.value
    sliders[0].value = 3.0
    assert image.value != before
    before = image.value
    next(c for c in box.children if isinstance(c, ipywidgets.Dropdown)).value = "3"
    assert image.value != before
