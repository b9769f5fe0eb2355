"""Optimal brain damage against the full Hessian, per-pattern gradients and brute-force deletion.

Each test's docstring is the claim; the oracle is `torch.func.hessian` on the flattened parameters.
"""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pruning101 import optimal_brain_damage as obd
from pruning101.core import data, masks, models, training
from pruning101.core.steps import History
from pruning101.widgets import optimal_brain_damage as widget


def error_of(outputs, labels, loss):
    """The definition, written once more: mean over patterns, no factor 1/2."""
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, labels)
    if not labels.is_floating_point():
        labels = F.one_hot(labels, outputs.shape[1]).to(outputs)
    return ((labels - outputs) ** 2).sum(1).mean()


def true_diagonal(model, x, y, loss):
    """Diagonal of the full Hessian, all parameters in one vector."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def mean_error(flat):
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        values = {n: part.view_as(p) for (n, p), part in parts}
        return error_of(functional_call(model, values, (x,)), y, loss)

    flat = torch.cat([p.flatten() for p in parameters.values()])
    diagonal = hessian(mean_error)(flat).diagonal().split(sizes)
    return {n: d.view_as(p) for (n, p), d in zip(parameters.items(), diagonal, strict=True)}


def relative(found, true):
    """Largest relative error over the parameters (norms, as the methods' page reports them)."""
    assert found.keys() == true.keys()
    return max(float((found[n] - true[n]).norm() / true[n].norm()) for n in true)


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def patterns(shape, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, shape[:1], generator=generator)


def mlp(activation=nn.Tanh, sizes=(5, 7, 3), last=None):
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1], *([last()] if last else []))


SMOOTH = [nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU]


# --- where theory says equal ---------------------------------------------------------------------


@pytest.mark.parametrize("activation", [*SMOOTH, nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
@pytest.mark.parametrize("last", [None, nn.Sigmoid])
def test_lecun_is_exact_with_one_hidden_layer(activation, last):
    """Eqs. 6, 7 (with +) and 8 give the exact diagonal: one hidden layer, squared error."""
    model = seeded(lambda: mlp(activation, last=last))
    x, y = patterns((20, 5), 3)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]  # unequal batches: the mean is over patterns
    found = obd.hessian_diagonal(model, batches, "squared_error", method="lecun")
    assert relative(found, true_diagonal(model, x, y, "squared_error")) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_lecun_is_exact_for_any_width(inputs, hidden, outputs, seed):
    """Exactness is a property of the depth, whatever the widths, the weights and the targets."""
    model = seeded(lambda: mlp(nn.Tanh, (inputs, hidden, outputs)), seed)
    x, _ = patterns((4, inputs), 2, seed)
    d, _ = patterns((4, outputs), 2, seed + 1)  # real-valued targets
    found = obd.hessian_diagonal(model, [(x, d)], "squared_error")
    assert relative(found, true_diagonal(model, x, d, "squared_error")) < 1e-10


def test_exact_is_the_hessian_of_any_model():
    """Double backward agrees with the full Hessian, shared weights and depth included."""
    conv = nn.Conv2d(1, 2, 3)
    model = seeded(lambda: nn.Sequential(conv, nn.Tanh(), nn.Flatten(), mlp(sizes=(8, 4, 4, 3))))
    x, y = patterns((6, 1, 4, 4), 3)
    for loss in ("squared_error", "cross_entropy"):
        found = obd.hessian_diagonal(model, [(x, y)], loss, method="exact")
        assert relative(found, true_diagonal(model, x, y, loss)) < 1e-12


CONVOLUTIONS = [
    {"stride": 2, "padding": 1},
    {"groups": 2, "padding": 2, "dilation": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"stride": (1, 3), "bias": False},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("method", ["lecun", "levenberg_marquardt", "gauss_newton"])
def test_one_convolution_is_exact(options, method):
    """Eq. 5 is exact for one shared-weight layer: places of a linear layer share no second term."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, **options), nn.Flatten()))
    x, _ = patterns((5, 2, 7, 6), 2)
    d = torch.randn_like(model(x))
    found = obd.hessian_diagonal(model, [(x, d)], "squared_error", method=method)
    assert relative(found, true_diagonal(model, x, d, "squared_error")) < 1e-12


BETWEEN = {
    "average": lambda: nn.AvgPool2d(2),
    "average, overlapping, padded": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average, ceil": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "average, divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "maximum": lambda: nn.MaxPool2d(2),
    "maximum, overlapping": lambda: nn.MaxPool2d(3, 1),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm, plain": lambda: nn.BatchNorm2d(2, affine=False),
    "dropout": lambda: nn.Dropout(0.5),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_layers_without_weights_pass_curvature_exactly(kind):
    """Pools, norms and routes above one weighted layer keep the recursion exact (squared error)."""

    def make():
        between = BETWEEN[kind]()
        if isinstance(between, nn.BatchNorm2d):
            between.train()(3 + 2 * torch.randn(50, 2, 5, 5))
            for p in between.parameters():
                nn.init.normal_(p)
        return nn.Sequential(
            nn.Linear(4, 50), nn.Unflatten(1, (2, 5, 5)), nn.Tanh(), between, nn.Flatten()
        )

    model = seeded(make)
    x, _ = patterns((6, 4), 2)
    d = torch.randn_like(model(x))
    found = obd.hessian_diagonal(model, [(x, d)], "squared_error")
    assert relative(found, true_diagonal(model, x, d, "squared_error")) < 1e-12


def test_softmax_regression_is_exact():
    """p (1 - p) x^2 is the whole diagonal of cross-entropy in a linear model, by four methods."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4)))
    x, y = patterns((30, 5), 4)
    true = true_diagonal(model, x, y, "cross_entropy")
    for method in ("lecun", "levenberg_marquardt", "gauss_newton", "exact"):
        found = obd.hessian_diagonal(model, [(x, y)], "cross_entropy", method=method)
        assert relative(found, true) < 1e-12, method


def test_gauss_newton_is_exact_for_deep_linear_output_diagonal():
    """GGN drops only curvature of the network itself: none in a piecewise linear one."""
    model = seeded(lambda: mlp(nn.ReLU, (5, 7, 6, 3)))
    x, y = patterns((20, 5), 3)
    for loss in ("squared_error", "cross_entropy"):
        found = obd.hessian_diagonal(model, [(x, y)], loss, method="gauss_newton")
        assert relative(found, true_diagonal(model, x, y, loss)) < 1e-12


@pytest.mark.parametrize("activation", SMOOTH)
def test_levenberg_marquardt_is_gauss_newton_with_one_hidden_layer(activation):
    """Both drop f''; with one hidden layer nothing else is dropped (squared error)."""
    model = seeded(lambda: mlp(activation, last=nn.Tanh))
    x, y = patterns((20, 5), 3)
    lm, gn = (
        obd.hessian_diagonal(model, [(x, y)], "squared_error", method=m)
        for m in ("levenberg_marquardt", "gauss_newton")
    )
    assert relative(lm, gn) < 1e-12


def test_fisher_is_the_mean_squared_gradient():
    """One pattern at a time, by an ordinary backward pass."""
    model = seeded(lambda: mlp())
    x, y = patterns((9, 5), 3)
    for loss in ("squared_error", "cross_entropy"):
        expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in range(9):
            e = error_of(model(x[i : i + 1]), y[i : i + 1], loss)
            for n, g in zip(expected, torch.autograd.grad(e, model.parameters()), strict=True):
                expected[n] += g**2 / 9
        found = obd.hessian_diagonal(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss, method="fisher")
        assert relative(found, expected) < 1e-12


def test_per_pattern_methods_do_not_depend_on_the_chunks(monkeypatch):
    """Memory is bounded by chunks of patterns; the numbers are the same."""
    model, (x, y) = seeded(lambda: mlp()), patterns((9, 5), 3)
    whole = obd.hessian_diagonal(model, [(x, y)], method="gauss_newton")
    monkeypatch.setattr("pruning101.core.curvature.CHUNK_FLOATS", 500)
    monkeypatch.setattr("pruning101.core.curvature.CHUNK_ROWS", 5)
    assert relative(obd.hessian_diagonal(model, [(x, y)], method="gauss_newton"), whole) < 1e-12
    found = obd.hessian_diagonal(model, [(x, y)], method="exact")
    assert relative(found, true_diagonal(model, x, y, "cross_entropy")) < 1e-12


def test_hutchinson_goes_to_the_exact_diagonal_and_is_seeded():
    """The estimate is unbiased: its error falls as 1/sqrt(samples); same generator, same draw."""
    model, (x, y) = seeded(lambda: mlp()), patterns((12, 5), 3)
    true = true_diagonal(model, x, y, "squared_error")

    def estimate(n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return obd.hessian_diagonal(
            model, [(x, y)], "squared_error", method="hutchinson", n_samples=n, generator=generator
        )

    assert relative(estimate(4000), true) < 0.2
    few = sum(relative(estimate(10, s), true) for s in range(8)) / 8
    more = sum(relative(estimate(160, s), true) for s in range(8)) / 8
    assert 2.5 < few / more < 6.4  # sqrt(16) = 4
    one = nn.Linear(1, 1, bias=False).double()  # a single parameter leaves nothing to chance
    h = obd.hessian_diagonal(one, [(x[:, :1], x[:, 1:2])], "squared_error", method="hutchinson")
    assert h["weight"].item() == pytest.approx(2 * float((x[:, 0] ** 2).mean()))
    assert relative(estimate(3, 5), estimate(3, 5)) == 0
    assert relative(estimate(3, 5), estimate(3, 6)) > 0.01


# --- where theory says not equal -----------------------------------------------------------------


def test_deeper_than_one_hidden_layer_is_an_approximation():
    """The last two layers stay exact, the first does not: curvature between units is dropped."""
    model, (x, y) = seeded(lambda: mlp(sizes=(5, 7, 6, 3))), patterns((20, 5), 3)
    found = obd.hessian_diagonal(model, [(x, y)], "squared_error")
    true = true_diagonal(model, x, y, "squared_error")
    errors = {n: float((found[n] - true[n]).norm() / true[n].norm()) for n in true}
    assert errors["0.weight"] > 0.05
    assert max(errors["2.weight"], errors["4.weight"]) < 1e-12


def test_shared_weights_below_another_layer_are_an_approximation():
    """A convolution under a linear layer: the cross terms between places of eq. 5 are dropped."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    )
    x, y = patterns((10, 1, 5, 5), 3)
    found = obd.hessian_diagonal(model, [(x, y)], "squared_error")
    true = true_diagonal(model, x, y, "squared_error")
    assert (found["0.weight"] - true["0.weight"]).norm() > 0.05 * true["0.weight"].norm()
    assert (found["3.weight"] - true["3.weight"]).norm() < 1e-12 * true["3.weight"].norm()


def test_a_weight_tied_across_layers_gets_the_sum_of_its_places():
    """Eq. 5 adds the places up, which is not the exact second derivative."""

    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        return model

    untied = seeded(make)
    untied[2].weight.data.copy_(untied[0].weight)
    tied = copy.deepcopy(untied)
    tied[2].weight = tied[0].weight
    x, y = patterns((10, 4), 4)
    apart = obd.hessian_diagonal(untied, [(x, y)], "squared_error")
    together = obd.hessian_diagonal(tied, [(x, y)], "squared_error")
    assert torch.allclose(together["0.weight"], apart["0.weight"] + apart["2.weight"], rtol=1e-12)
    true = obd.hessian_diagonal(tied, [(x, y)], "squared_error", method="exact")["0.weight"]
    assert (together["0.weight"] - true).norm() > 0.05 * true.norm()


def test_the_printed_sign_of_equation_7_is_wrong():
    """With '-' the first layer is off by as much as the f'' term is large; with '+' it is exact."""
    model, (x, y) = seeded(lambda: mlp()), patterns((20, 5), 3)
    (w1, b1), (w2, b2) = [(layer.weight, layer.bias) for layer in (model[0], model[2])]
    hidden = (x @ w1.T + b1).tanh()
    output = hidden @ w2.T + b2
    slope, bend = 1 - hidden**2, -2 * hidden * (1 - hidden**2)
    d_hidden = 2 * (output - F.one_hot(y, 3)) @ w2
    true = true_diagonal(model, x, y, "squared_error")["0.weight"]
    for sign, exact in ((1, True), (-1, False)):
        h = slope**2 * (2 * (w2**2).sum(0)) + sign * bend * d_hidden
        eq6 = h.T @ x**2 / 20
        error = float((eq6 - true).norm().detach() / true.norm())
        assert (error < 1e-12) if exact else (error > 0.1)


def test_curvature_is_negative_away_from_a_minimum_and_never_under_levenberg_marquardt():
    """The exact diagonal has negative entries at random weights; LM, GGN and Fisher have none."""
    model, (x, y) = seeded(lambda: mlp(last=nn.Sigmoid)), patterns((20, 5), 3)
    smallest = {
        m: min(
            float(h.min())
            for h in obd.hessian_diagonal(model, [(x, y)], "squared_error", method=m).values()
        )
        for m in ("lecun", "exact", "levenberg_marquardt", "gauss_newton", "fisher")
    }
    assert smallest["lecun"] < -1e-3
    assert smallest["exact"] < -1e-3
    assert min(smallest[m] for m in ("levenberg_marquardt", "gauss_newton", "fisher")) >= 0


# --- what the function promises ------------------------------------------------------------------


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(108, 4),
    )  # fmt: skip


@pytest.mark.parametrize("method", obd.METHODS)
def test_the_model_is_left_alone_and_masks_count(method):
    """Modes, gradients, buffers and masks stay; the diagonal is that of the effective weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_net().train()
    model[5].bias.requires_grad_(False)
    masks.apply(model, {"5.weight": torch.rand(4, 108) > 0.5})
    before = copy.deepcopy(model.state_dict())
    x, y = patterns((6, 1, 8, 8), 4)
    state = torch.random.get_rng_state()
    found = obd.hessian_diagonal(model, [(x.float(), y)], method=method, n_samples=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert not model[5].bias.requires_grad
    assert masks.masks_of(model).keys() == {"5.weight"}
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    plain = masks.clone(model)
    masks.make_permanent(plain)
    assert found.keys() == dict(plain.named_parameters()).keys()
    expected = obd.hessian_diagonal(plain, [(x, y)], method=method, n_samples=2)
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert all(found[n].shape == p.shape for n, p in plain.named_parameters())
    assert not any(h.requires_grad for h in found.values())


def test_a_residual_model_is_refused_by_name_and_taken_by_the_others():
    """The recursion needs a chain; the sentence names where it ends and what works instead."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.act = nn.Tanh()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.act(self.inner(x)))

    model, (x, y) = seeded(Residual), patterns((8, 4), 3)
    for method in ("lecun", "levenberg_marquardt"):
        with pytest.raises(ValueError, match=r"chain.*'act'.*gauss_newton"):
            obd.hessian_diagonal(model, [(x, y)], method=method)
    found = obd.hessian_diagonal(model, [(x, y)], method="exact")
    assert relative(found, true_diagonal(model, x, y, "cross_entropy")) < 1e-12
    gauss_newton = obd.hessian_diagonal(model, [(x, y)], method="gauss_newton")
    assert (gauss_newton["head.weight"] - found["head.weight"]).norm() < 1e-12


def test_attention_has_second_derivatives():
    """Fused attention kernels have none; the diagonal of a small one equals the full Hessian's."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.inner(x).unflatten(2, (3, 1, 4)).permute(2, 0, 3, 1, 4)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    model, (x, y) = seeded(Attention), patterns((4, 5, 4), 3)
    with sdpa_kernel(SDPBackend.MATH):
        true = true_diagonal(model, x, y, "cross_entropy")
    found = obd.hessian_diagonal(model, [(x, y)], method="exact")
    assert all(torch.allclose(found[n], true[n], atol=1e-12) for n in true)
    obd.hessian_diagonal(model.float(), [(x, y)], method="hutchinson", n_samples=1)


def test_a_function_between_the_layers_is_not_overlooked():
    """A tanh called in forward is no module: the chain of modules would compute something else."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(x).tanh())

    x, y = patterns((8, 4), 3)
    with pytest.raises(ValueError, match=r"chain ends at 'first'"):
        obd.hessian_diagonal(seeded(Hidden), [(x, y)])


def test_a_flatten_called_in_forward_is_followed():
    """torchvision's VGG flattens by a function; that is the one function the chain may hold."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Linear(18, 3)

        def forward(self, x):
            return self.head(torch.flatten(self.act(self.conv(x)), 1))

    model, (x, y) = seeded(Flat), patterns((8, 1, 5, 5), 3)
    found = obd.hessian_diagonal(model, [(x, y)], "squared_error")
    plain = nn.Sequential(model.conv, model.act, nn.Flatten(), model.head)
    expected = obd.hessian_diagonal(plain, [(x, y)], "squared_error")
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


def test_an_unknown_layer_is_refused_by_name():
    x, y = patterns((8, 4), 4)
    unstable = nn.BatchNorm1d(4, track_running_stats=False)  # patterns would depend on each other
    for layer, kind in (
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.PReLU(), "PReLU"),
        (unstable, "BatchNorm1d"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), layer).double()
        with pytest.raises(ValueError, match=f"'1' is a {kind}.*'exact'"):
            obd.hessian_diagonal(model, [(x, y)])
        obd.hessian_diagonal(model, [(x, y)], method="exact")


def test_errors_say_what_was_wrong():
    model, (x, y) = mlp(), patterns((8, 5), 3)
    with pytest.raises(ValueError, match=r"method must be one of lecun.*'obs'"):
        obd.hessian_diagonal(model, [(x, y)], method="obs")
    with pytest.raises(ValueError, match=r"loss must be one of squared_error.*'mse'"):
        obd.hessian_diagonal(model, [(x, y)], "mse")
    with pytest.raises(ValueError, match="no patterns"):
        obd.hessian_diagonal(model, [])
    with pytest.raises(ValueError, match=r"integers .batch. below 3"):
        obd.hessian_diagonal(model, [(x, y + 1)])
    with pytest.raises(ValueError, match="has no parameters"):
        obd.hessian_diagonal(nn.Flatten(), [(x, y)])
    with pytest.raises(ValueError, match=r"at most 50,000 of them, got .*hutchinson"):
        obd.hessian_diagonal(nn.Linear(300, 200), [(x, y)], method="exact")
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        obd.hessian_diagonal(model, [(x, y)], method="hutchinson", n_samples=0)
    with pytest.raises(ValueError, match=r"'fc.weight'.*this model has not"):
        obd.saliency(model, {"fc.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"counts must lie in 0 ... 2"):
        obd.deletion_curve(model, [(x, y)], "cross_entropy", {"0.bias": torch.ones(2)}, [3])


def test_lenet5_takes_the_recursion():
    """The course's own convolutional net is a chain; its last layer is exact under p (1 - p)."""
    model = models.build("lenet5", in_channels=1, image_size=16)
    x, y = patterns((4, 1, 16, 16), 10)
    found = obd.hessian_diagonal(model, [(x, y)])
    assert found.keys() == dict(model.named_parameters()).keys()
    gauss_newton = obd.hessian_diagonal(model, [(x, y)], method="gauss_newton")
    torch.testing.assert_close(found["fc2.weight"], gauss_newton["fc2.weight"])
    assert all(float(h.min()) >= 0 for h in found.values())


# --- saliency, deletion, recipe ------------------------------------------------------------------


def test_saliency_is_the_cost_of_deletion_in_a_linear_model():
    """At the least-squares optimum E is a parabola: s_k is exactly what deleting u_k costs."""
    x, _ = patterns((60, 4), 2)
    d, _ = patterns((60, 2), 2, seed=1)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    model[0].weight.data = torch.linalg.lstsq(x, d).solution.T.contiguous()
    found = obd.saliency(model, obd.hessian_diagonal(model, [(x, d)], "squared_error"))
    base = error_of(model(x), d, "squared_error")
    for i in range(2):
        for j in range(4):
            cut = copy.deepcopy(model)
            cut[0].weight.data[i, j] = 0
            cost = error_of(cut(x), d, "squared_error") - base
            assert found["0.weight"][i, j].item() == pytest.approx(cost.item(), rel=1e-9)


def test_deletion_curve_is_brute_force():
    """The rise after k deletions, deleting by hand in the order of the scores; ties by position."""
    model, (x, y) = seeded(lambda: mlp()), patterns((20, 5), 3)
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    scores["2.weight"] += 1
    scores["0.bias"] -= 1
    counts = [0, 3, 7, 10, 60, 66]
    found = obd.deletion_curve(
        model, [(x[:8], y[:8]), (x[8:], y[8:])], "cross_entropy", scores, counts
    )
    parts = [("0.bias", 7), ("0.weight", 35), ("2.bias", 3), ("2.weight", 21)]
    places = [(n, i) for n, size in parts for i in range(size)]
    for count, rise in zip(counts, found, strict=True):
        cut = copy.deepcopy(model)
        for n, i in places[:count]:
            dict(cut.named_parameters())[n].data.view(-1)[i] = 0
        expected = error_of(cut(x), y, "cross_entropy") - error_of(model(x), y, "cross_entropy")
        assert float(rise) == pytest.approx(expected.item(), abs=1e-12)


@pytest.fixture(scope="module")
def trained():
    digits = data.load("digits").subset(train=300, valid=60, test=60)
    model = nn.Sequential(nn.Flatten(), *mlp(nn.Tanh, (64, 12, 10)))
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    training.fit(model, digits, epochs=15, lr=0.05, progress=False)
    return digits, model


@pytest.mark.parametrize("criterion", obd.CRITERIA)
def test_recipe_counts_freezes_and_leaves_the_model(trained, criterion):
    """Exact counts, nested masks, zeros after retraining, and the caller's model as before."""
    digits, model = trained
    before = copy.deepcopy(model.state_dict())
    n, gone, dead = 64 * 12 + 120, 0, None
    for k, step in enumerate(
        obd.prune_iteratively(model, digits, rounds=3, rate=0.3, epochs=1, criterion=criterion), 1
    ):
        gone += step.removed
        assert step.index == k
        assert gone == round(n * (1 - 0.7**k))
        assert masks.sparsity(step.model) == gone / n
        assert step.footprint.nonzero <= sum(p.numel() for p in model.parameters()) - gone
        zeros = {name: ~mask for name, mask in masks.masks_of(step.model).items()}
        if dead is not None:
            assert all(bool((zeros[name] | ~dead[name]).all()) for name in dead)
        dead = zeros
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_recipe_deletes_the_least_salient_first(trained):
    """The first round's mask is that of the lowest h u^2 / 2 of the dense model."""
    digits, model = trained
    step = next(obd.prune_iteratively(model, digits, rounds=1, rate=0.4, epochs=1, lr=0.01))
    diagonal = obd.hessian_diagonal(model, digits.batches(), method="levenberg_marquardt")
    s = obd.saliency(model, diagonal)
    lowest = torch.cat([s["1.weight"].flatten(), s["3.weight"].flatten()]).argsort()
    kept = torch.cat([m.flatten() for m in masks.masks_of(step.model).values()])
    assert not kept[lowest[: step.removed]].any()
    assert kept[lowest[step.removed :]].all()


def test_recipe_resumes_to_the_same_numbers(trained, tmp_path):
    """Two rounds, stopped, read back and gone on with: the same as three in one go."""
    digits, model = trained
    options = {"rate": 0.3, "epochs": 1, "seed": 3}
    whole = list(obd.prune_iteratively(model, digits, rounds=3, **options))
    history = History(path=tmp_path)
    list(obd.prune_iteratively(model, digits, rounds=2, history=history, **options))
    rest = list(
        obd.prune_iteratively(model, digits, rounds=3, history=History.load(tmp_path), **options)
    )
    assert [step.index for step in rest] == [3]
    assert (rest[0].loss, rest[0].accuracy) == (whole[2].loss, whole[2].accuracy)
    expected = whole[2].model.state_dict()
    assert all(torch.equal(expected[n], v) for n, v in rest[0].model.state_dict().items())
    changed = {**options, "seed": 4}
    with pytest.raises(ValueError, match="seed"):
        next(obd.prune_iteratively(model, digits, rounds=4, history=history, **changed))


def test_saliency_beats_magnitude_where_inputs_differ_in_scale():
    """A small weight on a large input matters: h u^2 follows the true cost, |u| does not."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 12, dtype=torch.float64)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) * scales
    truth = torch.randn(3, 12, generator=generator, dtype=torch.float64) / scales
    d = (x @ truth.T).tanh() + 0.05 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    model = seeded(lambda: mlp(nn.Tanh, (12, 8, 3)))
    for layer in (model[0], model[2]):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator).double() / 4
    model[0].weight.data /= scales
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        e = error_of(model(x), d, "squared_error")
        e.backward()
        return e

    optimizer.step(closure)
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    h = obd.hessian_diagonal(model, [(x, d)], "squared_error")
    s = obd.saliency(model, {n: h[n] for n in weights})
    cost, size, predicted = [], [], []
    for n, p in weights.items():
        for i in range(p.numel()):
            one = {n: torch.ones_like(p)}
            one[n].view(-1)[i] = 0
            rise = obd.deletion_curve(model, [(x, d)], "squared_error", one, [1])
            cost.append(float(rise[0]))
            size.append(float(p.detach().view(-1)[i].abs()))
            predicted.append(float(s[n].view(-1)[i]))

    def spearman(a, b):
        ranks = [torch.tensor(v).argsort().argsort().double() for v in (a, b)]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    assert spearman(predicted, cost) > 0.85
    assert spearman(predicted, cost) > spearman(size, cost) + 0.3


# --- the widget ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(trained):
    digits, model = trained
    return widget.precompute(model, digits, "cross_entropy", points=21)


def test_widget_curves_are_those_of_the_library(trained, state):
    """Deleting a weight is offset -1; the marked points are saliency and brute-force deletion."""
    digits, model = trained
    double = copy.deepcopy(model).double()
    batches = list(digits.batches("train", 64))
    h = obd.hessian_diagonal(double, batches, method="levenberg_marquardt")
    s = obd.saliency(double, {n: h[n] for n in h if n.endswith("weight")})
    at_zero = int(abs(state.offsets + 1).argmin())
    for k in (0, 7, len(state.names) - 1):
        name, place = state.names[k].rstrip("]").split("[")
        where = tuple(map(int, place.split(",")))
        one = {name: torch.ones_like(s[name])}
        one[name][where] = 0
        rise = obd.deletion_curve(double, batches, "cross_entropy", one, [1])
        assert state.rises[k, at_zero] == pytest.approx(float(rise), rel=1e-6, abs=1e-9)
        assert state.saliencies[k] == pytest.approx(float(s[name][where]), rel=1e-6, abs=1e-12)
    assert state.n == 64 * 12 + 120
    assert state.predicted[-1] == pytest.approx(sum(float(v.sum()) for v in s.values()), rel=1e-6)
    assert state.actual[-1] == pytest.approx(state.by_magnitude[-1])
    assert state.actual[0] == state.predicted[0] == 0


def test_widget_draws_every_setting(state):
    """Sweep both sliders over their range: a figure and a sentence each, nothing kept open."""
    sliders = widget.controls()
    open_before = plt.get_fignums()
    pictures = set()
    for slider, other in (("weight", "deleted"), ("deleted", "weight")):
        steps = range(sliders[slider].min, sliders[slider].max + 1, sliders[slider].step)
        for value in steps:
            settings = {slider: value, other: sliders[other].value}
            figure = widget.draw(state, **settings)
            left, right = figure.axes
            assert left.get_xlabel()
            assert right.get_ylabel()
            assert str(value) in (left if slider == "weight" else right).get_title()
            pictures.add(widget.describe(state, **settings))
            plt.close(figure)
    assert len(pictures) > 60  # each setting says something else
    assert plt.get_fignums() == open_before


def test_widget_binds_its_sliders(state):
    """Moving a slider replaces picture and text."""
    box = widget.show(state)
    row, _, text, image = box.children
    weight = row.children[-1]
    before = (bytes(image.value), text.value)
    weight.value = 95
    assert image.value != before[0]
    assert text.value != before[1]
