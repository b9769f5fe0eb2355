"""LayerCollapse: gains, bounds, pairs that are found, the optimiser, the collapse, the recipe."""

import copy
import itertools
import math
import typing
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning101 import layer_collapse as lc
from pruning101.core import masks
from pruning101.core.data import load
from pruning101.core.measure import footprint
from pruning101.core.slopes import Slope
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit

timm = pytest.importorskip("timm")


def seeded(build, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    def build() -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return seeded(build)


def set_slopes(model: nn.Module, value: float = 1.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Slope):
            nn.init.constant_(module.slope, value)
    return model.eval()


def activations_of(model: nn.Module, **options) -> list[str]:
    return [pair.activation for pair in lc.pairs(model, **options)]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- formulas ----------------------------------------------------------------------------------


def test_gain_is_the_share_of_weights_saved():
    assert lc.gain(768, 3072, 768) == 0.875
    assert lc.gain(512, 64, 512) == -3.0
    assert lc.gain(25088, 4096, 1000) == pytest.approx(1 - 25088000 / (4096 * 26088))
    with pytest.raises(ValueError, match="n_hidden must be positive, got 0"):
        lc.gain(3, 0, 3)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.sampled_from([1, 3, 5])] * 2))
@settings(max_examples=40, deadline=None)
def test_conv_gain_counts_the_kernel_that_two_convolutions_need(channels, kernels):
    c_in, c_hidden, c_out = channels
    first = nn.Conv2d(c_in, c_hidden, kernels[0], bias=False)
    second = nn.Conv2d(c_hidden, c_out, kernels[1], bias=False)
    # What an input pixel reaches, through both layers, is the support of the kernel of the pair.
    size = kernels[0] + kernels[1] - 1
    x = torch.zeros(1, c_in, size, size, requires_grad=True)
    out = second(first(x))
    assert out.shape[2:] == (1, 1)
    merged = c_out * x.numel()
    before = first.weight.numel() + second.weight.numel()
    assert lc.conv_gain(*channels, *kernels) == pytest.approx(1 - merged / before)


def test_conv_gain_is_not_the_printed_one():
    assert lc.conv_gain(64, 64, 64, 3, 3) == pytest.approx(-0.389, abs=5e-4)
    assert lc.conv_gain(64, 512, 64, 3, 3) == pytest.approx(0.826, abs=5e-4)
    with pytest.raises(ValueError, match="k2 must be positive"):
        lc.conv_gain(1, 1, 1, 3, -3)


def squared_error(first: nn.Linear, second: nn.Linear, x: Tensor, slope: float) -> Tensor:
    hidden = first(x)
    bent = torch.where(hidden > 0, hidden, slope * hidden)
    return (second(hidden) - second(bent)).square().sum(-1)


@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 3),
    slope=st.floats(-1, 2),
    seed=st.integers(0, 10_000),
    bias=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_error_bound_bounds(sizes, slope, seed, bias):
    n_in, n_hidden, n_out = sizes
    first, second = nn.Linear(n_in, n_hidden, bias), nn.Linear(n_hidden, n_out)
    for i, parameter in enumerate([*first.parameters(), *second.parameters()]):
        parameter.data = rows(*parameter.shape, seed=7 * seed + i).double()
    x = rows(3, 5, n_in, seed=seed).double()
    bound = lc.error_bound(first, second, x, slope)
    assert bound.shape == (3, 5)
    error = squared_error(first, second, x, slope)
    assert (error <= bound * (1 + 1e-9) + 1e-18).all()


def test_the_error_bound_is_the_error_for_orthonormal_columns_and_zero_at_slope_one():
    first, second = nn.Linear(6, 4).double(), nn.Linear(4, 9).double()
    second.weight.data = torch.linalg.qr(rows(9, 4).double())[0]
    x = rows(20, 6).double()
    error = squared_error(first, second, x, 0.3)
    assert torch.allclose(lc.error_bound(first, second, x, 0.3), error, rtol=1e-9)
    assert error.max() > 0.01
    assert lc.error_bound(first, second, x, 1.0).abs().max() == 0


def test_the_printed_bound_is_violated_where_two_units_cancel():
    # y = relu(x) + relu(-x): the linear network is 0 everywhere, since W2 W1 = 0.
    first, second = nn.Linear(1, 2).double(), nn.Linear(2, 1, bias=False).double()
    first.weight.data = torch.tensor([[1.0], [-1.0]]).double()
    first.bias.data.zero_()
    second.weight.data = torch.ones(1, 2).double()
    x = torch.tensor([[2.0]]).double()
    assert lc.printed_error_bound(first, second, x, 0.0).item() == 0
    assert squared_error(first, second, x, 0.0).item() == pytest.approx(4)
    assert lc.error_bound(first, second, x, 0.0).item() == pytest.approx(8)
    # As printed, on a layer where nothing cancels: sigma^2 |x|^2 + |W2 b1|^2, times (1 - a)^2.
    first.weight.data = torch.tensor([[2.0], [0.0]]).double()
    first.bias.data = torch.tensor([1.0, 2.0]).double()
    printed = lc.printed_error_bound(first, second, x, 0.5).item()
    assert printed == pytest.approx((4 * 4 + 9) * 0.25)


# --- finding -----------------------------------------------------------------------------------


class Shuffled(nn.Module):
    """Attributes in another order than they are called, and a branch that reads a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.act, self.first = nn.Linear(8, 3), nn.GELU(), nn.Linear(5, 8)
        self.gate, self.gate_act, self.out = nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 2)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.act(self.first(x))))
        gate = self.gate_act(self.gate(x))
        return self.out(gate) * gate.mean()  # a function reads the gate, too: no pair


@pytest.mark.parametrize("example", [None, torch.zeros(2, 5)])
def test_pairs_follow_the_execution_and_stop_at_other_readers(example):
    model = Shuffled().eval()
    (pair,) = lc.pairs(model, example)
    assert (pair.first, pair.activation, pair.second) == ("first", "act", "second")
    assert pair.slope is None
    assert pair.gain == pytest.approx(1 - 15 / 64)
    assert pair.obstacle == ""


def small_networks() -> dict[str, tuple[nn.Module, Tensor, list[str]]]:
    image = torch.zeros(1, 3, 32, 32)
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 24, num_classes=4)
    mixer = timm.models.mlp_mixer.MlpMixer(4, 32, patch_size=16, num_blocks=2, embed_dim=12)
    timm_vit = timm.models.vision_transformer.VisionTransformer(
        32, 16, num_classes=4, embed_dim=12, depth=2, num_heads=2
    )
    vgg = torchvision.models.VGG(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), 3)
    vgg.avgpool = nn.AdaptiveAvgPool2d(2)
    for place, layer in ((0, nn.Linear(8, 32)), (3, nn.Linear(32, 24)), (6, nn.Linear(24, 3))):
        vgg.classifier[place] = layer
    layers = "encoder.layers.encoder_layer"
    mixed = [f"blocks.{i}.mlp_{kind}.act" for i in (0, 1) for kind in ("tokens", "channels")]
    return {
        "torchvision vit": (vit, image, [f"{layers}_{i}.mlp.1" for i in (0, 1)]),
        "timm mixer": (mixer, image, mixed),
        "timm vit": (timm_vit, image, [f"blocks.{i}.mlp.act" for i in (0, 1)]),
        "torchvision vgg": (vgg, image, ["classifier.1", "classifier.4"]),
    }


@pytest.mark.parametrize("name", ["torchvision vit", "timm mixer", "timm vit", "torchvision vgg"])
def test_networks_of_torchvision_and_timm_collapse_to_the_same_function(name):
    model, image, expected = small_networks()[name]
    assert activations_of(model) == expected
    assert activations_of(model, example=image) == expected
    before = copy.deepcopy(model.state_dict())
    linear = lc.make_collapsible(model)
    assert not any(isinstance(m, Slope) for m in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    set_slopes(linear)
    torch.manual_seed(1)
    for module in linear.modules():  # the heads are zeros, and so would be all differences
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    x = rows(2, 3, 32, 32)
    report = lc.collapse(linear, example=x)
    assert [p.activation for p in report.pairs] == expected
    assert all(p.collapsed and p.reason == "" and p.difference < 1e-3 for p in report.pairs)
    with torch.no_grad():
        wanted, got = linear(x), report.model(x)
    assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-3)
    small, large = footprint(report.model, image), footprint(linear, image)
    assert large.depth - small.depth == len(expected)
    # The report's counts of pairs that share no layer are those of the networks.
    if name != "torchvision vgg":
        saved = sum(p.parameters_before - p.parameters_after for p in report.pairs)
        assert large.parameters - small.parameters == saved
        macs = sum(p.macs_before - p.macs_after for p in report.pairs)
        assert large.macs - small.macs == macs


def test_last_counts_pairs_from_the_end():
    model = mlp(4, 6, 5, 4, 3)
    linear = lc.make_collapsible(model, last=2)
    assert [p.slope for p in lc.pairs(linear)] == [None, pytest.approx(0.01), pytest.approx(0.01)]
    with pytest.raises(ValueError, match="between 1 and 3, the number of pairs found, got 4"):
        lc.make_collapsible(model, last=4)
    with pytest.raises(ValueError, match="got 0"):
        lc.make_collapsible(model, last=0)


def test_slopes_begin_at_start_or_where_the_activation_is_and_train_with_the_model():
    model = mlp(4, 5, 3).double()
    model[1] = nn.LeakyReLU(0.3)
    x = rows(9, 4).double()
    kept = lc.make_collapsible(model, start=0.2)
    assert torch.allclose(kept(x), model(x))
    model[1] = nn.PReLU(init=0.4)
    assert torch.allclose(lc.make_collapsible(model.double())(x), model(x))
    model[1] = nn.GELU()
    started = lc.make_collapsible(model, start=0.2)
    hidden = model[0](x)
    assert torch.allclose(started(x), model[2](torch.where(hidden > 0, hidden, 0.2 * hidden)))
    assert started[1].slope.dtype == torch.float64
    assert started[1].slope.requires_grad
    same = lc.make_collapsible(model, inplace=True)
    assert same is model
    assert isinstance(model[1], Slope)
    slope = model[1]
    lc.make_collapsible(model, inplace=True)
    assert model[1] is slope  # what is a slope stays the one it is
    with pytest.raises(ValueError, match="finite"):
        lc.make_collapsible(mlp(2, 2, 2), start=math.nan)


class Functional(nn.Module):
    """One ReLU for two calls, or functions."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.act = nn.ReLU() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None:
            return self.c(self.act(self.b(self.act(self.a(x)))))
        return self.c(F.relu(self.b(F.gelu(self.a(x)))))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("example", [None, torch.zeros(2, 4)])
def test_an_activation_used_twice_or_called_as_a_function_is_separated(shared, example):
    model = Functional(shared)
    linear = lc.make_collapsible(model, example=example)
    assert len(lc.pairs(linear, example)) == 2
    assert all(pair.slope == pytest.approx(0.01) for pair in lc.pairs(linear, example))
    report = lc.collapse(set_slopes(linear), example=example)
    x = rows(7, 4)
    assert torch.allclose(report.model(x), model.c(model.b(model.a(x))), atol=1e-6)
    # An error leaves the model as it was, its class and forward included.
    with pytest.raises(ValueError, match="last must be"):
        lc.make_collapsible(model, last=3, example=example, inplace=True)
    assert type(model) is Functional
    assert not isinstance(model.act, Slope)
    assert model(x).shape == (7, 3)


def test_models_without_such_pairs_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"no two linear layers .* give an example$"):
        lc.make_collapsible(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'2' \(LayerNorm\) divides .* not linear$"):
        lc.make_collapsible(model, inplace=True)
    assert isinstance(model[1], nn.ReLU)
    assert "LayerNorm" in lc.pairs(model)[0].obstacle
    # Beside a pair that works, such a one is left as it is.
    both = nn.Sequential(*model, nn.Tanh(), nn.Linear(2, 2))
    assert [p.slope is None for p in lc.pairs(lc.make_collapsible(both))] == [True, False]


class Fickle(nn.Module):
    """A forward that cannot be followed symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(3, 6, 3)
        self.a, self.act, self.b = nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        x = self.mlp(x) if x.sum() > -1e9 else x
        return self.b(self.act(self.a(x)))


def test_an_example_finds_what_symbols_cannot_and_parts_that_can_be_followed_are_found():
    model = Fickle()
    assert activations_of(model) == ["mlp.1"]
    outer = nn.Sequential(OrderedDict(inner=Fickle(), a=nn.Linear(2, 5), act=nn.GELU()))
    outer.add_module("b", nn.Linear(5, 2))
    assert activations_of(outer) == ["inner.mlp.1", "act"]  # one it calls cannot be followed
    assert "seen" not in vars(model)  # following a forward leaves no trace
    assert activations_of(model, example=torch.zeros(1, 3)) == ["mlp.1", "act"]


# --- layouts of Hugging Face transformers, without the library ------------------------------------


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer whose weight is stored [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(rows(nx, nf)), nn.Parameter(rows(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class NewGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class GPT2MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(12, 4), Conv1D(4, 12)
        self.act, self.dropout = NewGELUActivation(), nn.Dropout(0.1)

    def forward(self, hidden_states: tuple[Tensor] | None) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class BertIntermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(4, 12), NewGELUActivation()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(12, 4), nn.LayerNorm(4), nn.Dropout()

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = BertIntermediate(), BertOutput()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask
        return self.feed_forward_chunk(hidden_states)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self.output(self.intermediate(attention_output), attention_output)


@pytest.mark.parametrize("kind", [GPT2MLP, BertLayer])
@pytest.mark.parametrize("follow", [True, False])
def test_the_layouts_of_gpt2_and_bert(kind, follow):
    model = nn.Sequential(OrderedDict(a=kind(), b=kind())).eval()
    x = rows(2, 5, 4)
    linear = set_slopes(lc.make_collapsible(model, example=None if follow else x))
    report = lc.collapse(linear, example=None if follow else x)
    assert [p.collapsed for p in report.pairs] == [True, True]
    assert torch.allclose(report.model(x), linear(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(report.model(x), model(x), atol=1e-2)
    assert sum(p.numel() for p in report.model.parameters()) < 0.5 * sum(
        p.numel() for p in model.parameters()
    )


def test_a_network_that_brings_its_own_input_needs_no_example():
    class Bert(nn.Module):
        main_input_name = "inputs"
        dummy_inputs: typing.ClassVar = {"inputs": torch.ones(1, 5, 4), "labels": torch.ones(1)}

        def __init__(self) -> None:
            super().__init__()
            self.intermediate, self.output = BertIntermediate(), BertOutput()

        def forward(self, inputs: Tensor) -> Tensor:
            if inputs.sum() > 0:  # what torch.fx cannot follow
                inputs = 2 * inputs
            return self.output(self.intermediate(inputs), inputs)

    pair = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
    [found] = lc.pairs(lc.make_collapsible(Bert()))
    assert (found.first, found.activation, found.second) == pair
    Bert.main_input_name = "other"
    with pytest.raises(ValueError, match="give an example"):
        lc.make_collapsible(Bert())


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_hugging_face_where_it_is_installed(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 0}
    layers = {"num_hidden_layers": 2, "intermediate_size": 64, "eos_token_id": 0}
    if name == "GPT2":
        layers = {"n_inner": 64, "n_layer": 2, "eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, **layers)
    torch.manual_seed(0)
    linear = set_slopes(lc.make_collapsible(getattr(transformers, f"{name}Model")(config).eval()))
    report = lc.collapse(linear)
    assert [pair.collapsed for pair in report.pairs] == [True, True]
    words = torch.arange(10).view(2, 5)
    expected, given = linear(words), report.model(words)
    assert torch.allclose(given.last_hidden_state, expected.last_hidden_state, atol=1e-4)


# --- penalty and optimiser ----------------------------------------------------------------------


def test_the_penalty_is_a_sum_over_slopes_with_its_gradient():
    model = lc.make_collapsible(mlp(3, 4, 4, 2))
    a, b = model[1].slope, model[3].slope
    nn.init.constant_(a, 0.4)
    nn.init.constant_(b, 1.5)
    penalty = lc.linearity_penalty(model, 0.2)
    assert penalty.item() == pytest.approx(0.2 * (0.36 + 0.25))
    penalty.backward()
    assert a.grad.item() == pytest.approx(-2 * 0.2 * 0.6)
    assert b.grad.item() == pytest.approx(2 * 0.2 * 0.5)
    with pytest.raises(ValueError, match="no slope to draw to 1"):
        lc.linearity_penalty(mlp(3, 4, 2))


def adam_by_hand(model, gradients, lr, betas, eps, decay, strength, order):
    """Algorithm 2 of the paper in Python floats, every parameter entry by itself."""
    values = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(v) for n, v in values.items()}
    second = {n: torch.zeros_like(v) for n, v in values.items()}
    for t, gradient in enumerate(gradients, 1):
        for name, p in values.items():
            g, slope = gradient[name].double(), name == "1.slope"
            if slope and order == "code":
                p = p - 2 * lr * strength * (p - 1)
            if not slope:
                p = p * (1 - lr * decay)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            m, v = first[name] / (1 - betas[0] ** t), second[name] / (1 - betas[1] ** t)
            p = p - lr * m / (v.sqrt() + eps)
            if slope and order == "paper":
                p = p - 2 * lr * strength * (p - 1)
            values[name] = p
    return values


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("groups", [False, True])
def test_adam_lc_is_algorithm_2(order, groups):
    model = lc.make_collapsible(mlp(3, 4, 2)).double()
    generator = torch.Generator().manual_seed(3)
    gradients = [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        for _ in range(20)
    ]
    settings = (0.05, (0.8, 0.95), 1e-6, 0.1, 1.5)
    expected = adam_by_hand(model, gradients, *settings, order)
    other = adam_by_hand(model, gradients, *settings, "code" if order == "paper" else "paper")
    assert (expected["1.slope"] - other["1.slope"]).abs() > 1e-4  # the two orders can be told apart
    lr, betas, eps, decay, strength = settings
    slope = model[1].slope
    parameters = model
    if groups:
        rest = [p for p in model.parameters() if p is not slope]
        parameters = [{"params": rest}, {"params": [slope], "slopes": True}]
    optimiser = lc.AdamLC(
        parameters, lr, strength=strength, order=order, betas=betas, eps=eps, weight_decay=decay
    )
    for gradient in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name].clone()
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.detach(), expected[name], atol=1e-12, rtol=0)


def test_adam_lc_takes_a_closure_and_refuses_what_makes_no_sense():
    model = lc.make_collapsible(mlp(3, 4, 2))
    x = rows(5, 3)
    optimiser = lc.AdamLC(model, 0.01, order="code")
    seen = []

    def closure():
        seen.append(model[1].slope.item())
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == pytest.approx(model_loss(mlp(3, 4, 2), x), rel=1e-5)
    assert seen == [pytest.approx(0.01)]  # once, at the values before the decay
    with pytest.raises(ValueError, match="no slopes among the parameters; give a model"):
        lc.AdamLC(model.parameters())
    with pytest.raises(ValueError, match="no slopes among"):
        lc.AdamLC(mlp(2, 2, 2))
    with pytest.raises(ValueError, match='order must be "paper" or "code"'):
        lc.AdamLC(model, order="paper first")
    with pytest.raises(ValueError, match="strength"):
        lc.AdamLC(model, strength=-1.0)


def model_loss(model: nn.Sequential, x: Tensor) -> float:
    hidden = model[0](x)
    return model[2](torch.where(hidden > 0, hidden, 0.01 * hidden)).square().mean().item()


# --- the collapse ------------------------------------------------------------------------------


def normed(where: str, seed: int = 0) -> nn.Sequential:
    def build() -> nn.Sequential:
        norm = nn.BatchNorm1d(8, affine=where != "plain")
        norm.running_mean = torch.randn(8)
        norm.running_var = torch.rand(8) + 0.2
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        between = [Slope(1.0), nn.Dropout(0.5)]
        between.insert(0 if where == "before" else 2, norm)
        return nn.Sequential(nn.Linear(5, 8), *between, nn.Linear(8, 3), nn.Dropout(0.7))

    return seeded(build, seed).double()


@pytest.mark.parametrize("where", ["after", "before", "plain"])
def test_a_batch_norm_is_merged_on_its_side_and_what_follows_stays(where):
    model = normed(where).eval()
    report = lc.collapse(model)
    x = rows(11, 5).double()
    assert torch.allclose(report.model(x), model(x), atol=1e-12)
    assert report.pairs[0].difference < 1e-12
    assert isinstance(report.model[0], nn.Linear)
    assert all(isinstance(m, nn.Identity) for m in report.model[1:5])
    assert report.model[5].p == 0.7
    assert isinstance(model[4], nn.Linear)  # the model given is left alone
    # As the paper writes it, the norm after the activation.
    if where == "after":
        first, norm, second = model[0], model[3], model[4]
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = second.weight @ torch.diag(s) @ first.weight
        bias = second.weight @ (s * (first.bias - norm.running_mean) + norm.bias) + second.bias
        assert torch.allclose(report.model[0].weight, weight)
        assert torch.allclose(report.model[0].bias, bias)


@pytest.mark.parametrize(
    ("slope", "collapsed"),
    [(0.94, False), (0.951, True), (1.0, True), (1.049, True), (1.2, False), (0.0, False)],
)
def test_a_slope_is_taken_for_one_within_the_tolerance_on_both_sides(slope, collapsed):
    model = set_slopes(lc.make_collapsible(mlp(6, 30, 4)), slope)
    state = copy.deepcopy(model.state_dict())
    x = rows(40, 6)
    report = lc.collapse(model, example=x, inplace=True)
    (line,) = report.pairs
    assert report.model is model
    assert line.collapsed is collapsed
    assert line.slope == pytest.approx(slope)
    if not collapsed:
        assert "not within 0.05 of 1" in line.reason
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        assert line.parameters_after == line.parameters_before
    else:
        before = lc.make_collapsible(mlp(6, 30, 4))
        expected = (set_slopes(before, slope)(x) - model(x)).abs().max().item()
        assert line.difference == pytest.approx(expected, abs=1e-6)
        assert (line.difference > 1e-4) is (slope != 1.0)
        assert (line.parameters_before, line.parameters_after) == (30 * 7 + 4 * 31 + 1, 28)
        assert (line.macs_before, line.macs_after) == (30 * 10, 24)


def test_a_pair_that_would_grow_is_only_merged_by_force():
    model = set_slopes(lc.make_collapsible(mlp(16, 2, 16)))
    (line,) = lc.collapse(model).pairs
    assert not line.collapsed
    assert "256 weights, 16-2-16 has 64; force=True" in line.reason
    report = lc.collapse(model, force=True)
    assert report.pairs[0].collapsed
    assert report.pairs[0].parameters_after == 16 * 17
    x = rows(3, 16)
    assert torch.allclose(report.model(x), model(x), atol=1e-6)


def test_pairs_that_share_a_layer_collapse_one_after_the_other():
    model = set_slopes(lc.make_collapsible(mlp(4, 16, 9, 12, 3)))
    x = rows(8, 4)
    report = lc.collapse(model, example=x)
    assert [p.collapsed for p in report.pairs] == [True] * 3
    assert [(p.first, p.activation, p.second) for p in report.pairs] == [
        ("0", "1", "2"),
        ("2", "3", "4"),
        ("4", "5", "6"),
    ]
    assert torch.allclose(report.model(x), model(x), atol=1e-6)
    assert footprint(report.model, x).depth == 1
    # Only the first and the last: the layer in the middle is both a second and a first one.
    for slopes, place in (((1, 0, 1), "0"), ((1, 1, 0), "0"), ((0, 1, 1), "2")):
        for i, slope in zip((1, 3, 5), slopes, strict=True):
            nn.init.constant_(model[i].slope, slope)
        mixed = lc.collapse(model, example=x)
        assert [p.collapsed for p in mixed.pairs] == [bool(s) for s in slopes]
        assert torch.allclose(mixed.model(x), model(x), atol=1e-6)
        assert footprint(mixed.model, x).depth == 4 - sum(slopes)
        assert isinstance(mixed.model.get_submodule(place), nn.Linear)


def test_a_merge_that_becomes_worth_it_is_tried_again_where_its_first_layer_is_by_then():
    # 40-4-40 alone would grow; but 2-40-4 becomes 2-4, and 2-4-40 pays.
    model = set_slopes(lc.make_collapsible(mlp(2, 40, 4, 40)))
    assert lc.gain(40, 4, 40) < 0 < lc.gain(2, 4, 40)
    x = rows(6, 2)
    report = lc.collapse(model, example=x)
    assert [p.collapsed for p in report.pairs] == [True, True]
    assert report.pairs[1].first == "2"
    assert torch.allclose(report.model(x), model(x), atol=1e-6)
    assert sum(p.numel() for p in report.model.parameters()) == 40 * 3


def test_pairs_are_tried_from_the_last_backwards():
    # Each of 10-4-4 and 4-4-10 pays, but not 10-4-10, which is left after either.
    model = set_slopes(lc.make_collapsible(mlp(10, 4, 4, 10)))
    assert [p.collapsed for p in lc.collapse(model).pairs] == [False, True]


def test_each_obstacle_is_told_in_one_line_and_nothing_changes():
    def reason(model: nn.Module, **options) -> str:
        report = lc.collapse(model, **options)
        (line,) = report.pairs
        assert not line.collapsed
        assert line.reason.count("\n") == 0
        assert math.isnan(line.difference)
        state = report.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        return line.reason

    def pair(*between: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), Slope(1.0), *between, nn.Linear(6, 4)).eval()

    assert "'2' is in training mode" in reason(pair(nn.BatchNorm1d(6)).train())
    assert "'2' (LayerNorm) divides" in reason(pair(nn.LayerNorm(6)))
    assert "(BatchNorm1d) divides" in reason(pair(nn.BatchNorm1d(6, track_running_stats=False)))
    positions = pair(nn.BatchNorm1d(6))
    assert "'2' normalises positions" in reason(positions, example=rows(2, 6, 4))
    assert "normalises positions" in reason(pair(nn.BatchNorm1d(5)), example=rows(2, 5, 4))

    masked = pair()
    prune.l1_unstructured(masked[0], "weight", 0.5)
    assert "'0' is masked or computed; call masks.make_permanent" in reason(masked)
    masks.make_permanent(masked)
    assert lc.collapse(masked).pairs[0].collapsed

    tied = nn.Sequential(*pair(), nn.Sigmoid(), nn.Softmax(1), nn.Linear(6, 4))
    tied[5].weight = tied[2].weight
    assert "'2' shares its weight" in reason(tied)

    hooked = pair()
    hooked[0].register_forward_hook(lambda *_: None)
    assert "a hook watches '0'" in reason(hooked)

    twice = pair()
    again = nn.Sequential(twice[0], twice[1], twice[2], nn.Softmax(1), twice[0])
    assert "'0' is used elsewhere" in reason(again)
    stacked = nn.Sequential(nn.Linear(4, 6), Slope(1.0), nn.Softmax(1), nn.Linear(6, 4))
    assert "'1' does not stand between two linear layers" in reason(stacked)

    assert "if its forward cannot be followed, give an example" in reason(stacked)
    assert "give an example" not in reason(stacked, example=rows(2, 4))

    with pytest.raises(ValueError, match="the model has no slope"):
        lc.collapse(mlp(3, 4, 2))
    with pytest.raises(ValueError, match="empty batch"):
        lc.collapse(pair(), example=torch.zeros(0, 4))
    with pytest.raises(ValueError, match="empty batch"):
        lc.collapsed_counts(pair(), torch.zeros(0, 4))
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be a positive number"):
            lc.collapse(pair(), tolerance=tolerance)


def test_the_report_makes_a_table_and_the_models_stay_trainable():
    model = set_slopes(lc.make_collapsible(mlp(4, 9, 3)))
    report = lc.collapse(model)
    table = report.table()
    assert list(table["activation"]) == ["1"]
    assert table["collapsed"].all()
    report.model(rows(2, 4)).sum().backward()
    assert report.model[0].weight.grad is not None
    clone = copy.deepcopy(report.model)
    clone.load_state_dict(report.model.state_dict())


# --- counts without weights ----------------------------------------------------------------------


def test_counts_on_the_meta_device_are_those_of_a_real_collapse():
    model, image, _ = small_networks()["timm mixer"]
    counts = lc.collapsed_counts(model, image, last=1)
    real = lc.collapse(set_slopes(lc.make_collapsible(model, last=1)), example=image)
    before, after = footprint(model, image), footprint(real.model, image)
    assert counts.parameters_before == before.parameters
    assert counts.parameters_after == after.parameters
    assert (counts.macs_before, counts.macs_after) == (before.macs, after.macs)
    assert counts.macs_saved == pytest.approx(1 - after.macs / before.macs)
    assert counts.parameters_saved == pytest.approx(1 - after.parameters / before.parameters)
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="between 1 and 4"):
        lc.collapsed_counts(model, image, last=5)


@pytest.mark.parametrize(
    ("name", "last", "before", "after"),
    [
        ("vit_tiny_patch16_224", 3, 5.72, 4.94),
        ("mixer_b16_224", 4, 59.88, 51.39),
        ("vgg19", 2, 143.67, 45.11),
        ("vgg11", 2, 132.86, 34.31),
    ],
)
def test_counts_of_the_papers_table_4(name, last, before, after):
    with torch.device("meta"):
        model = timm.create_model(name)
        image = torch.empty(1, 3, 224, 224)
    if name.startswith("vgg"):  # timm writes the classifier as convolutions
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
    counts = lc.collapsed_counts(model, image, last=last)
    assert round(counts.parameters_before / 1e6, 2) == before
    assert round(counts.parameters_after / 1e6, 2) == after


# --- recipes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=256, valid=100, test=100)


@pytest.fixture(scope="module")
def trained(digits):
    model = nn.Sequential(nn.Flatten(), *mlp(64, 48, 24, 10))
    fit(model, digits, epochs=5, lr=0.1, progress=False)
    return model


def test_self_distillation_is_half_labels_half_teacher_and_the_penalty(digits, trained):
    student = lc.make_collapsible(trained)
    teacher = nn.Sequential(nn.Flatten(), mlp(64, 10, seed=5))  # one that answers otherwise
    nn.init.normal_(teacher[1][0].weight, generator=torch.Generator().manual_seed(0))
    one = digits.subset(train=64)
    images, labels = next(iter(one.batches("train", 64)))
    by_hand = masks.clone(student)
    outputs, answers = by_hand(images), teacher(images).detach()
    loss = F.cross_entropy(outputs, labels) / 2
    divergence = answers.softmax(1) * (answers.log_softmax(1) - outputs.log_softmax(1))
    loss = loss + divergence.sum(1).mean() / 2
    loss = loss + 3.0 * ((1 - by_hand[2].slope) ** 2 + (1 - by_hand[4].slope) ** 2)
    loss.backward()
    history = lc.self_distillation(
        student, one, teacher=teacher, epochs=1, lr=0.1, strength=3.0, batch_size=64, progress=False
    )
    assert len(history) == 1
    for parameter, other in zip(student.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(parameter, other - 0.1 * other.grad, atol=1e-5)


OPTIONS = {"epochs": 4, "lr": 0.02, "strength": 2.0, "train": {"batch_size": 16}}


def test_the_sequence_goes_backwards_and_resumes_to_the_same_numbers(digits, trained, tmp_path):
    before = copy.deepcopy(trained.state_dict())
    whole = list(lc.collapse_sequentially(trained, digits, **OPTIONS))
    assert all(torch.equal(trained.state_dict()[k], v) for k, v in before.items())
    assert [step.removed for step in whole] == [["4"], ["2"]]
    assert [list(step.slopes) for step in whole] == [["4"], ["2"]]
    assert all(abs(slope - 1) < 0.05 for step in whole for slope in step.slopes.values())
    assert [step.footprint.depth for step in whole] == [2, 1]
    assert whole[0].footprint.parameters == 65 * 48 + 49 * 10
    assert whole[1].footprint.parameters == 65 * 10
    assert whole[1].accuracy > 0.7
    # The first phase by hand, from the network that came: its teacher is that network, too.
    first = lc.make_collapsible(trained, last=1)
    settings = {k: OPTIONS[k] for k in ("epochs", "lr", "strength")}
    lc.self_distillation(
        first, digits, teacher=trained, **settings, batch_size=16, seed=1, progress=False
    )
    assert whole[0].slopes == {"4": first[4].slope.item()}
    step = whole[-1]
    assert evaluate(step.model, digits, "valid").accuracy == step.accuracy

    history = History(path=tmp_path / "run")
    next(lc.collapse_sequentially(trained, digits, **OPTIONS, history=history))
    resumed = History.load(tmp_path / "run")
    assert isinstance(resumed[0], lc.Collapse)
    (last,) = lc.collapse_sequentially(trained, digits, **OPTIONS, history=resumed)
    assert last.loss == whole[1].loss
    assert last.slopes == whole[1].slopes
    with pytest.raises(ValueError, match="strength"):
        lc.collapse_sequentially(trained, digits, **(OPTIONS | {"strength": 1}), history=resumed)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights"):
        lc.collapse_sequentially(other, digits, **OPTIONS, history=resumed)


def test_the_sequence_stops_after_a_drop_and_keeps_slopes_that_do_not_come_near(digits, trained):
    (only,) = lc.collapse_sequentially(trained, digits, **(OPTIONS | {"last": 1}))
    assert only.removed == ["4"]
    short = OPTIONS | {"epochs": 0}
    steps = list(lc.collapse_sequentially(trained, digits, **short))
    assert [step.removed for step in steps] == [[], []]
    assert list(steps[1].slopes) == ["2", "4"]
    assert steps[1].footprint.depth == 3
    # Everything is linear at once and badly so: the first step goes too far, no second follows.
    bad = OPTIONS | {"epochs": 0, "tolerance": 2.0, "drop": 0.0}
    steps = list(lc.collapse_sequentially(trained, digits, **bad))
    assert steps[0].accuracy < evaluate(trained, digits, "valid").accuracy
    assert len(steps) == 1
    with pytest.raises(ValueError, match="slopes already"):
        lc.collapse_sequentially(lc.make_collapsible(trained), digits, **OPTIONS)
    for wrong in ({"drop": 1.5}, {"epochs": -1}, {"last": 3}):
        with pytest.raises(ValueError, match=r"drop a share|last must"):
            lc.collapse_sequentially(trained, digits, **(OPTIONS | wrong))
