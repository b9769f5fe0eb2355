"""Layer folding: slopes and their penalty, what fold merges and what it says, the recipe."""

import copy
import itertools
import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pruning101.core import masks, models, structure
from pruning101.core.data import load
from pruning101.core.measure import footprint
from pruning101.core.merging import BorderedConv2d
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit
from pruning101.layer_folding import (
    Slope,
    clamp_slopes,
    distil,
    fold,
    fold_iteratively,
    make_foldable,
    slope_penalty,
    slopes,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=256, valid=100, test=100)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision and eval mode, with norms that do something."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight.data, m.running_var):
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
            for t in (m.bias.data, m.running_mean):
                t.copy_(0.3 * torch.randn(t.shape, generator=g))
        if isinstance(m, nn.Linear) and not bool(m.weight.any()):  # the head of a ViT
            m.weight.data.copy_(torch.randn(m.weight.shape, generator=g))
    return model.double().eval()


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def check(model: nn.Module, x: Tensor, report, tolerance: float = 1e-8):
    """Outputs stay, depth falls by the merged pairs, and the rows' MACs add up to what is saved."""
    folded = report.model
    error = float((outputs(folded, x) - outputs(model, x)).abs().max())
    assert error <= tolerance
    assert report.difference == pytest.approx(error)
    before, after = footprint(model, x), footprint(folded, x)
    assert before.depth - after.depth == len(report.merged)
    assert sum(p.macs_after - p.macs_before for p in report.merged) == after.macs - before.macs
    assert all(p.difference <= tolerance for p in report.merged)


def by_layers(report) -> dict[tuple[str, str], str]:
    return {(p.first, p.second): f"{p.action}: {p.reason}" for p in report.pairs}


class Residual(nn.Module):
    """x + layer(x), and an activation after it."""

    def __init__(self, layer: nn.Module, act: nn.Module, adds: str = "+") -> None:
        super().__init__()
        self.layer, self.act, self.adds = layer, act, adds

    def forward(self, x: Tensor) -> Tensor:
        if self.adds == "in place":
            y = self.layer(x)
            y += x
        else:
            y = torch.add(x, self.layer(x)) if self.adds == "add" else self.layer(x) + x
        return self.act(y)


# --- slopes --------------------------------------------------------------------------------------


def test_every_activation_of_resnet18_gets_a_slope():
    model = torchvision.models.resnet18()
    foldable = make_foldable(model, start=0.0)
    assert len(slopes(foldable)) == 17
    assert len(structure.activations(model)) == 9  # the model given is left alone
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # slope 0 is ReLU
        torch.testing.assert_close(foldable.eval()(x), model.eval()(x))


def test_chosen_layers_alone_are_replaced_and_gates_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Sigmoid())
    assert list(slopes(make_foldable(model, layers=["3"], start=0.3))) == ["3"]
    assert list(slopes(make_foldable(model))) == ["1", "3"]
    assert list(slopes(make_foldable(model, layers=["4"]))) == ["4"]
    assert make_foldable(model, inplace=True) is model
    assert slopes(model) == pytest.approx({"1": 0.05, "3": 0.05})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5}, "start must be a slope"),
        ({"layers": ["2"]}, "there is no activation '2'; there are 1"),
    ],
)
def test_what_cannot_get_slopes_is_refused(options, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=message):
        make_foldable(model, inplace=True, **options)
    assert type(model[1]) is nn.ReLU
    with pytest.raises(ValueError, match="no activation that could get a slope"):
        make_foldable(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model itself is an activation"):
        make_foldable(nn.ReLU())


def test_the_penalty_is_its_formula_with_its_gradient():
    model = nn.Sequential(Slope(0.5), nn.Linear(2, 2), Slope(0.0), Slope(1.0))
    penalty = slope_penalty(model, 2.0)
    assert float(penalty.detach()) == pytest.approx(2 * (0.75 + 1 + 0))
    penalty.backward()
    assert float(model[0].slope.grad) == pytest.approx(2 * -2 * 0.5)
    assert float(model[2].slope.grad) == 0  # at 0 the penalty alone moves nothing
    with pytest.raises(ValueError, match="no slopes"):
        slope_penalty(nn.Linear(2, 2))


def test_from_above_zero_the_penalty_alone_brings_a_slope_to_1_in_the_steps_promised():
    model, lr, start = nn.Sequential(Slope(0.05)), 0.1, 0.05
    optimiser = torch.optim.SGD(model.parameters(), lr)
    steps = 0
    while slopes(model)["0"] < 1 and steps < 1000:
        optimiser.zero_grad()
        slope_penalty(model).backward()
        optimiser.step()
        clamp_slopes(model)
        steps += 1
    assert steps == pytest.approx(2 * math.log(1 / start) / lr, rel=0.05)
    assert slopes(model)["0"] == 1


def test_clamping_puts_slopes_into_0_to_1():
    model = nn.Sequential(Slope(-0.2), Slope(0.4), Slope(1.7))
    clamp_slopes(model)
    assert list(slopes(model).values()) == pytest.approx([0, 0.4, 1])


# --- folding -------------------------------------------------------------------------------------


def with_linear(model: nn.Module, names) -> nn.Module:
    """Slopes everywhere, 1 where ``names`` says so, else 0."""
    foldable = make_foldable(model, start=0.0)
    for name, module in foldable.named_modules():
        if isinstance(module, Slope) and names(name):
            nn.init.ones_(module.slope)
    return foldable


def test_a_linear_network_of_linear_layers_becomes_one_matrix():
    model = randomised(with_linear(models.build("lenet_300_100", in_channels=1), lambda n: True))
    x = example(3, 1, 32, 32)
    report = fold(model, x)
    check(model, x, report)
    assert footprint(report.model, x).depth == 1
    weight, bias = torch.eye(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.float64)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    torch.testing.assert_close(report.model.fc1.weight, weight)
    torch.testing.assert_close(report.model.fc1.bias, bias)


@pytest.mark.parametrize("border", ["exact", "interior"])
def test_a_residual_network_folds_with_its_skips(border):
    model = models.build("resnet20", in_channels=1, image_size=16)
    model = randomised(with_linear(model, lambda n: n.startswith("layer1")))
    x = example(2, 1, 16, 16)
    report = fold(model, x, border=border, force=True)
    if border == "exact":
        check(model, x, report)
        assert all(p.exact and p.border_width == 0 for p in report.merged)
        assert len(report.merged) == 3  # each block's pair; bordered layers merge no further
    else:
        # With plain convolutions the whole first stage is one layer: 5 more pairs than blocks.
        assert len(report.merged) == 5
        assert footprint(report.model, x).depth == footprint(model, x).depth - 5
        assert not any(p.exact for p in report.merged)
        assert report.merged[0].border_width == 1
        assert report.difference > 1e-3
        assert all(p.difference > 1e-3 for p in report.merged)
    assert sum(not p.second and p.action == "merged" for p in report.pairs) == 3  # the skips
    assert "BatchNorm2d" not in {type(m).__name__ for m in report.model.modules()}


def test_by_default_nothing_gets_dearer_and_the_row_says_what_it_would_cost():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Identity(), nn.Conv2d(8, 8, 3))
    model, x = randomised(model), example(2, 8, 10, 10)
    report = fold(model, x)
    (pair, last) = report.pairs
    # 9 * 64 a position, on 10 x 10 and 8 x 8 of them, against 25 * 64 on 8 x 8
    assert (pair.macs_before, pair.macs_after) == (576 * 164, 1600 * 64)
    assert pair.reason == "would cost 8% more multiply-adds (94.5 k to 102 k)"
    assert (pair.action, last.reason) == ("kept", "it gives the network's output")
    forced = fold(model, x, force=True)
    check(model, x, forced)
    assert type(forced.model[0]) is nn.Conv2d  # no padding in the second: plain and exact
    assert forced.model[0].kernel_size == (5, 5)


def test_a_slope_within_the_threshold_counts_as_1_and_the_row_says_what_that_changes():
    first, second = nn.Linear(6, 5), nn.Linear(5, 3)
    model, x = randomised(nn.Sequential(first, Slope(0.93), second)), example(40, 6)
    report = fold(model, x)
    (pair, _) = report.pairs
    # equation: (1 - slope) W2 min(0, z)
    lost = 0.07 * outputs(first, x).clamp(max=0) @ second.weight.detach().T
    assert report.difference == pytest.approx(float(lost.abs().max()))
    assert pair.difference == pytest.approx(float(lost.abs().max()))
    assert not pair.exact
    assert report.linear == pytest.approx({"1": 0.93})
    stays = fold(model, x, threshold=0.05)
    assert stays.difference == 0
    assert by_layers(stays)["0", "2"] == "kept: the slope of '1' is 0.93, further than 0.05 from 1"


def test_a_slope_at_the_threshold_is_linear_in_single_precision_too():
    model = nn.Sequential(nn.Linear(4, 4), Slope(0.9), nn.Linear(4, 2))
    assert model[1].slope.item() < 0.9
    assert list(fold(model, torch.randn(3, 4)).linear) == ["1"]
    model[1].slope.data.fill_(0.8999)
    assert not fold(model, torch.randn(3, 4)).linear


def test_what_worked_in_place_behind_a_linear_activation_spares_its_input():
    class Ahead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.linear, self.relu = nn.PReLU(init=1.0), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + self.last(self.relu(self.linear(x)))

    model, x = randomised(Ahead()), example(9, 4)
    report = fold(model, x)
    torch.testing.assert_close(outputs(report.model, x), outputs(model, x))
    assert list(report.linear) == ["linear"]
    assert model.relu.inplace


def test_leaky_and_parametric_relus_near_1_are_linear_too():
    prelu = nn.PReLU(5)
    nn.init.ones_(prelu.weight)
    model = nn.Sequential(nn.Linear(6, 5), prelu, nn.Linear(5, 5), nn.LeakyReLU(1.0))
    model = randomised(nn.Sequential(*model, nn.Linear(5, 4)))
    check(model, example(3, 6), fold(model, example(3, 6)))
    with torch.no_grad():
        prelu.weight[3] = 0.2  # one channel is enough
    assert len(fold(model, example(3, 6)).merged) == 1


def test_a_chain_merges_pair_by_pair_and_each_difference_is_that_of_the_whole_so_far():
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)]
    model = nn.Sequential(layers[0], Slope(0.95), layers[1], nn.Identity(), layers[2])
    model, x = randomised(model), example(2, 3, 5, 5)
    one, two = fold(model, x).merged
    z = outputs(layers[0], x)
    linear = outputs(layers[1], z) - outputs(layers[1], outputs(model[1], z))
    assert one.difference == pytest.approx(float(linear.abs().max()))
    after = outputs(layers[2], outputs(layers[1], z)) - outputs(model, x)
    assert two.difference == pytest.approx(float(after.abs().max()))
    assert not two.exact  # what was merged into it is not


@pytest.mark.parametrize("adds", ["+", "in place", "add"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity()])
def test_an_identity_skip_goes_into_the_kernel(adds, act):
    branch = nn.Sequential(
        nn.Conv2d(4, 3, 1), nn.Identity(), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    )
    norm = nn.Sequential(branch, nn.BatchNorm2d(4))
    model = randomised(nn.Sequential(nn.Conv2d(2, 4, 1), Residual(norm, act, adds)))
    x = example(2, 2, 6, 6)
    report = fold(model, x, force=True)
    skips = [p for p in report.pairs if p.action == "merged" and not p.second]
    assert [p.first for p in skips] == ["1.layer.0.2"]
    assert skips[0].difference < 1e-12
    check(model, x, report)
    again = copy.deepcopy(report.model)
    assert torch.equal(outputs(again, x), outputs(report.model, x))
    code = again[1].code if hasattr(again[1], "code") else ""
    assert "+" not in code
    assert "add" not in code


def test_what_follows_a_skip_merges_in_a_second_round_and_is_compared_from_its_start():
    skip = Residual(nn.Linear(4, 4), nn.Identity())
    layers = [nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4), skip, nn.Linear(4, 4), Slope(0.95)]
    model, x = randomised(nn.Sequential(*layers, nn.Linear(4, 4))), example(9, 4)
    report = fold(model, x)
    rows = [(p.first, p.second, p.exact) for p in report.pairs if p.action == "merged"]
    # the skip, and 4 with 6, where a slope is rounded; then what those made possible
    assert set(rows) == {("3.layer", "", True), ("4", "6", False), ("2", "3.layer", True),
                         ("3.layer", "4", False)}  # fmt: skip
    assert report.norms["1"] == "merged into '2'"
    assert footprint(report.model, x).depth == 1
    exact = [p.difference for p in report.merged if p.exact]
    assert exact == pytest.approx([0])
    lost = max(p.difference for p in report.merged)
    assert lost > 1e-3
    assert report.difference == pytest.approx(lost)


def test_a_pair_of_a_second_round_is_compared_behind_the_norm_that_it_took_in():
    skip = Residual(nn.Linear(4, 4), nn.Identity())
    model = randomised(nn.Sequential(skip, nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    report = fold(model, example(9, 4))
    assert [(p.first, p.second) for p in report.merged] == [("0.layer", "1")]
    check(model, example(9, 4), report)


def test_a_skip_around_more_than_a_layer_stays():
    model = randomised(
        nn.Sequential(
            Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.ReLU())
        )
    )
    rows = by_layers(fold(model, example(3, 4)))
    assert rows["0.layer.0", "0.layer.2"] == "kept: '0.layer.1' (ReLU) stays"
    assert "adds something else than its own input" in rows["0.layer.2", ""]
    assert rows["", ""] == "kept: '0.act' (ReLU) stays"


def test_what_is_read_transposed_or_gated_stays():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).transpose(1, 2))
            return self.c(y * x.tanh())

    model, x = randomised(Turned()), example(2, 4, 4)
    report = fold(model, x)
    check(model, x, report)
    assert by_layers(report) == {
        ("a", "b"): "kept: its output is read in another arrangement",
        ("b", ""): "kept: 'mul' joins it with something else",
        ("c", ""): "kept: it gives the network's output",
    }


def test_a_sum_of_two_branches_stays_in_a_forward_with_functions():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.a(x)
            return {"out": self.b(y).relu() + self.c(y)}

    rows = by_layers(fold(Branches().eval(), torch.ones(2, 4)))
    assert rows["a", ""] == "kept: its output is read in 2 places"
    assert rows["b", ""] == "kept: the function 'relu' stands between"
    assert "adds something else" in rows["c", ""]


@pytest.mark.parametrize("norms", [True, False])
def test_norms_merge_into_the_layer_before_or_behind(norms):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),  # before a ReLU
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3),  # between
        nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1),  # padding: not exact
    )  # fmt: skip
    model, x = randomised(model), example(2, 3, 9, 9)
    report = fold(model, x, norms=norms)
    check(model, x, report)
    kinds = [type(m).__name__ for m in report.model]
    if norms:
        assert kinds[1] == kinds[3] == kinds[5] == "Identity"
        assert report.norms["1"] == "merged into '0'"
        assert report.norms["3"] == "merged into '4'"
    else:  # only the one within the pair that merges
        assert kinds[1] == kinds[3] == "BatchNorm2d"
    assert kinds[5] == "Identity"
    assert report.norms["5"] == "merged into '4'"
    assert kinds[8] == "BatchNorm2d"
    assert len(report.merged) == 1


def test_a_norm_over_positions_is_not_taken_for_one_over_units():
    norm = nn.BatchNorm1d(6)
    model = randomised(nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6)))
    report = fold(model, example(2, 6, 6))  # [B, positions, units]: the norm is over positions
    assert not report.merged
    assert report.norms == {"1": "'1' (BatchNorm1d) normalises positions, not units"}
    check(model, example(2, 6, 6), report)
    assert len(fold(model, example(5, 6)).merged) == 1


def test_dropout_between_goes_with_the_pair():
    model = randomised(nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 3), nn.Dropout()))
    report = fold(model, example(4, 6))
    check(model, example(4, 6), report)
    assert [type(m).__name__ for m in report.model] == ["Linear", "Identity", "Identity", "Dropout"]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU(), "'1' (ReLU) stays"),
        (nn.ReLU(inplace=True), "'1' (ReLU) stays"),
        (nn.MaxPool2d(2), "'1' (MaxPool2d) stands between"),
        (nn.AvgPool2d(2), "'1' (AvgPool2d) stands between, linear but not merged here"),
        (nn.GroupNorm(2, 4), "'1' (GroupNorm) stands between"),
        (Slope(0.2), "the slope of '1' is 0.20, further than 0.1 from 1"),
    ],
)
def test_what_stands_between_is_named(between, reason):
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.Conv2d(4, 4, 1)))
    assert by_layers(fold(model, example(2, 3, 8, 8)))["0", "2"] == f"kept: {reason}"


def test_shared_weights_hooks_and_other_layers_stay_with_a_reason():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    reasons = by_layers(fold(randomised(tied), example(2, 4)))
    assert "the weights of '0' belong to another layer, too" in reasons["0", "1"]
    layer = nn.Linear(4, 4)
    twice = randomised(nn.Sequential(layer, nn.Linear(4, 4), layer))
    report = fold(twice, example(2, 4))
    assert not report.merged
    assert any("is called 2 times" in p.reason for p in report.pairs)
    watched = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    watched[0].register_forward_hook(lambda *_: None)
    assert "a hook watches '0'" in by_layers(fold(watched, example(2, 4)))["0", "1"]
    turned = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.Conv2d(3, 3, 1))
    reason = by_layers(fold(randomised(turned), example(1, 3, 5, 5)))["0", "1"]
    assert "transposed" in reason


def test_a_flattened_map_is_not_taken_for_units():
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2))
    report = fold(randomised(model), example(5, 2, 3))
    assert by_layers(report)["0", "2"] == "kept: '1' (Flatten) stands between"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {}, "'1' .BatchNorm1d. is in training"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout()), {}, "call model.eval"),
        (nn.Linear(2, 2), {"threshold": 1.5}, "threshold must be a distance"),
        (nn.Linear(2, 2), {"border": "some"}, "border must be"),
    ],
)
def test_wrong_uses_are_refused_in_a_sentence(model, options, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        fold(model, torch.randn(3, 2), inplace=True, **options)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_empty_example_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        fold(nn.Linear(2, 2), torch.zeros(0, 2))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), Slope(1.0)])
def test_a_single_layer_is_refused(layer):
    with pytest.raises(ValueError, match="a single layer, with nothing beside it"):
        fold(layer, torch.zeros(1, 2))


def test_masked_layers_are_refused_and_permanent_zeros_fold():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    masks.apply(model, {"0.weight": torch.eye(4) > 0})
    with pytest.raises(ValueError, match="make_permanent"):
        fold(model, example(2, 4))
    masks.make_permanent(model)
    check(model, example(2, 4), fold(model, example(2, 4)))


def test_the_model_given_is_left_alone_unless_in_place_and_whole_after_an_error():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)))
    x = example(2, 4)
    expected, before = outputs(model, x), list(model)
    report = fold(model, x)
    assert list(model) == before
    with pytest.raises(RuntimeError):
        fold(model, example(2, 5), inplace=True)
    assert list(model) == before
    report = fold(model, x, inplace=True)
    assert report.model is model
    assert footprint(model, x).depth == 1
    torch.testing.assert_close(outputs(model, x), expected)
    table = report.table()
    assert list(table["action"]) == ["merged", "kept"]


def test_folding_twice_finds_nothing_new():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), nn.ReLU()))
    once = fold(model, example(2, 4)).model
    assert not fold(once, example(2, 4)).merged


# --- networks of others --------------------------------------------------------------------------


def all_activations_told(report, model: nn.Module) -> None:
    told = set(itertools.chain(*(p.between for p in report.pairs))) | set(report.linear)
    left = {n for n, m in model.named_modules() if "" in structure.activations(m)}
    left |= set(slopes(model))
    assert left <= told, left - told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size", "merged"),
    [
        (lambda: torchvision.models.resnet18(), 32, 8),
        (lambda: torchvision.models.mobilenet_v2(), 32, None),
        (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32), 32, 2),
        (lambda: timm.create_model("resnet18"), 32, 8),
        (lambda: timm.create_model("mobilenetv3_small_050"), 32, None),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), 32, 2),
        (lambda: timm.models.MlpMixer(4, img_size=32, num_blocks=2, embed_dim=32), 32, 4),
    ],
    ids=["resnet18", "mobilenet_v2", "vit", "timm resnet18", "timm mnv3", "timm vit", "mixer"],
)
def test_networks_of_torchvision_and_timm_fold_to_the_same_function(make, size, merged):
    model = randomised(make())
    x = example(1, 3, size, size)
    if merged is None:  # only that all is told, and the function stays
        report = fold(model, x)
        all_activations_told(report, model)
        assert float((outputs(report.model, x) - outputs(model, x)).abs().max()) < 1e-8
        assert not report.merged or all(p.macs_after <= p.macs_before for p in report.merged)
        return
    if any(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()):
        inner = ("relu", "act1")  # of every block, the stem's as well
        model = with_linear(model, lambda n: n.endswith(inner) and "layer" in n)
    else:
        model = with_linear(model, lambda n: True)
    report = fold(model, x, force=True)
    all_activations_told(report, model)
    check(model, x, report)
    assert len(report.merged) == merged


def test_a_norm_that_carries_its_activation_is_split_where_it_has_to_be():
    conv = timm.layers.ConvNormAct(3, 4, 3)
    last = nn.Conv2d(4, 2, 1)
    model = randomised(nn.Sequential(conv, last))
    x = example(2, 3, 7, 7)
    report = fold(model, x)  # a ReLU stays in it: only the norm goes
    check(model, x, report)
    assert type(report.model[0].bn).__name__ == "Sequential"
    assert report.model[0].bn.act is not conv.bn.act
    conv.bn.act = Slope(1.0).double()
    report = fold(model, x)
    check(model, x, report)
    assert len(report.merged) == 1
    alone = randomised(nn.Sequential(nn.ReLU(), timm.layers.BatchNormAct2d(3), nn.MaxPool2d(2)))
    kept = fold(alone, x).model
    assert type(kept[1]) is timm.layers.BatchNormAct2d
    assert list(kept.state_dict()) == list(alone.state_dict())


# --- one fitted layer, and the recipe ------------------------------------------------------------


def small(seed: int = 0, *, act: nn.Module | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), act or nn.Identity(),
            nn.Conv2d(6, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def trained(digits):
    model = small()
    fit(model, digits, epochs=8, lr=0.05, progress=False)
    return model


def test_the_fitted_layer_is_the_least_squares_one(digits, trained):
    report = distil(trained, "3", "6", digits, epochs=0, ridge=0.0)
    layer = report.model[3]
    assert layer.kernel_size == (3, 3)
    assert layer.stride == (2, 2)
    # autograd knows the minimum as well as the normal equations: there, the gradient is zero
    images = next(iter(digits.batches("train", 256)))[0]
    teacher = copy.deepcopy(trained).eval().double()
    with torch.no_grad():
        x = teacher[:3](images.double())
        y = teacher[3:7](x)
    layer = copy.deepcopy(layer).double().requires_grad_(True)
    ((layer(x) - y).square().sum() / y.square().sum()).backward()
    assert float(layer.weight.grad.abs().max()) < 1e-4
    assert float(layer.bias.grad.abs().max()) < 1e-4
    assert report.error_after < 0.5 * report.error_cropped
    before, after = footprint(trained, images), footprint(report.model, images)
    assert before.depth - after.depth == 1
    assert report.macs_after - report.macs_before == after.macs - before.macs
    assert report.accuracy_before == evaluate(trained, digits, "valid").accuracy
    assert report.accuracy_fitted == report.accuracy_after
    assert report.accuracy_after == evaluate(report.model, digits, "valid").accuracy


def test_a_kernel_as_large_as_the_merged_one_loses_nothing_but_the_border(digits, trained):
    report = distil(trained, "3", "6", digits, epochs=0, kernel_size=5)
    assert report.error_after <= report.error_cropped < 0.2
    report = distil(trained, "3", "6", digits, epochs=1, retrain={"batch_size": 64})
    assert report.accuracy_after == evaluate(report.model, digits, "valid").accuracy
    assert type(trained[6]) is nn.Conv2d


def test_what_cannot_be_distilled_is_refused(digits, trained):
    with pytest.raises(ValueError, match="'0' with only modules between"):
        distil(trained, "0", "6", digits)
    with pytest.raises(ValueError, match="must be 2d convolutions; try merge"):
        distil(trained, "6", "10", digits)
    with pytest.raises(ValueError, match="a kernel of 4 cannot stand"):
        distil(trained, "3", "6", digits, kernel_size=4)
    with pytest.raises(ValueError, match="a kernel of 0 cannot stand"):
        distil(trained, "3", "6", digits, kernel_size=0)
    with pytest.raises(ValueError, match="images must be a whole number, 1 or more, not 0"):
        distil(trained, "3", "6", digits, images=0)
    with pytest.raises(ValueError, match="ridge must be a finite number, 0 or more, not -1"):
        distil(trained, "3", "6", digits, ridge=-1)
    broken = copy.deepcopy(trained)
    nn.init.constant_(broken.get_submodule("3").weight, math.nan)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        distil(broken, "3", "6", digits, epochs=0)
    with pytest.raises(ValueError, match="strength must be a finite number, 0 or more, not nan"):
        fold_iteratively(trained, digits, strength=math.nan)


@pytest.fixture(scope="module")
def options():
    return {
        "epochs": 3, "finetune_epochs": 1, "lr": 0.1, "rounds": 2, "strength": 0.25, "force": True,
        "retrain": {"batch_size": 32, "momentum": 0.5},
    }  # fmt: skip


@pytest.mark.slow
def test_the_recipe_folds_what_its_penalty_made_linear(digits, trained, options):
    steps = list(fold_iteratively(trained, digits, **options))
    first = steps[0]
    linear = sorted(n for n, s in first.slopes.items() if s >= 0.9)
    assert first.removed == linear != []
    assert first.footprint.depth == 4 - first.merged
    assert first.accuracies[2] == first.accuracy == evaluate(first.model, digits, "valid").accuracy
    assert set(slopes(first.model)) == set(first.slopes) - set(linear)
    assert isinstance(trained[2], nn.ReLU)
    again = list(fold_iteratively(trained, digits, **options))
    assert [s.accuracies for s in again] == [s.accuracies for s in steps]


@pytest.mark.slow
def test_the_recipe_resumes_to_the_same_numbers(digits, trained, options, tmp_path):
    options = {**options, "strength": 0.02, "lr": 0.05}
    whole = list(fold_iteratively(trained, digits, **options))
    assert len(whole) == 2
    history = History.resume(tmp_path / "run")
    next(fold_iteratively(trained, digits, history=history, **options))
    history = History.resume(tmp_path / "run")
    (second,) = fold_iteratively(trained, digits, history=history, **options)
    assert second.accuracies == whole[1].accuracies
    assert second.slopes == whole[1].slopes
    with pytest.raises(ValueError, match=r"strength=0\.02"):
        fold_iteratively(trained, digits, history=history, **{**options, "strength": 1.0})
    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights"):
        fold_iteratively(other, digits, history=history, **options)


def test_a_folded_network_trains_and_saves(digits, tmp_path):
    model = fold(small().eval(), digits.train.images[:2].float(), force=True).model
    assert any(isinstance(m, BorderedConv2d) for m in model.modules())
    fit(model, digits, epochs=1, lr=0.01, progress=False)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert evaluate(again, digits, "valid") == evaluate(model, digits, "valid")
