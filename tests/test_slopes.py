"""Slopes, and a module of its own for every call of an activation."""

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pruning101.core import masks, structure
from pruning101.core.slopes import Slope, separate_activations


class Functions(nn.Module):
    """Activations as functions, methods and in place, and dropout, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(4, 5)
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = self.conv2(x)
        x.relu_()
        x = F.dropout(x.mean((2, 3)), 0.25, training=self.training)
        return torch.tanh(self.fc(x)) + F.gelu(self.fc(x), approximate="tanh")


class Overwritten(nn.Module):
    """A ReLU in place, whose input is read afterwards: after the ReLU, that is."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.act(x) * 2 + x


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- the activation ------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_slope_is_its_formula_with_its_gradient(slope):
    z = torch.linspace(-2, 2, 7, dtype=torch.float64, requires_grad=True)
    module = Slope(slope).double()
    result = module(z)
    torch.testing.assert_close(result, z.clamp(min=0) + slope * z.clamp(max=0))
    result.sum().backward()
    # d/dslope is the sum of the negative inputs, -2 - 4/3 - 2/3
    assert float(module.slope.grad) == pytest.approx(-4)
    torch.testing.assert_close(z.grad[:3], torch.full((3,), slope, dtype=torch.float64))


def test_slope_scripts_exports_and_follows_the_dtype_of_its_input():
    module, z = Slope(0.25), torch.tensor([-1.0, 2.0])
    assert torch.equal(torch.jit.script(module)(z), torch.tensor([-0.25, 2.0]))
    exported = torch.export.export(module, (z,)).module()
    assert torch.equal(exported(z), torch.tensor([-0.25, 2.0]))
    assert module(z.bfloat16()).dtype == torch.bfloat16
    assert list(module.state_dict()) == ["slope"]


# --- one module for every call -------------------------------------------------------------------


def test_functions_methods_and_dropout_become_modules_and_the_function_stays():
    model, x = Functions(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, keys = outputs(model, x), list(model.state_dict())
    assert separate_activations(model) is model
    assert not model.dropout.training  # as the model was
    kinds = [type(m).__name__ for m in structure.activations(model).values()]
    assert kinds == ["LeakyReLU", "ReLU", "Tanh", "GELU"]
    assert structure.activations(model)["leaky_relu"].negative_slope == 0.2
    assert torch.equal(outputs(model, x), expected)
    assert list(model.state_dict()) == keys
    assert model.note == "kept"
    assert model.dropout.p == 0.25
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model(x), expected)  # it drops out again


def test_replacing_one_call_changes_that_call_only():
    model = torchvision.models.resnet.BasicBlock(4, 4)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    separate_activations(model)
    model.relu_1 = nn.Identity()
    model.eval()
    with torch.no_grad():
        inner = model.bn1(model.conv1(x)).relu()
        expected = model.bn2(model.conv2(inner)) + x
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("resnet18", 9, 17),
        ("googlenet", 0, 57),
        ("mobilenet_v2", 35, 35),
        ("densenet121", 120, 121),
    ],
)
@pytest.mark.slow
def test_torchvision_networks_get_an_activation_a_call(name, before, after):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, keys = outputs(model, x), list(model.state_dict())
    separated = separate_activations(model, inplace=False)
    assert len(structure.activations(model)) == before
    assert len(structure.activations(separated)) == after
    assert list(separated.state_dict()) == keys
    assert torch.equal(outputs(separated, x), expected)
    assert not any(m.inplace for m in structure.activations(separated).values())


def test_only_modules_that_need_it_are_rewritten():
    model = torchvision.models.resnet18()
    classes = {name: type(m) for name, m in model.named_modules()}
    separate_activations(model)
    changed = {n for n, m in model.named_modules() if n in classes and type(m) is not classes[n]}
    assert changed == {f"layer{i}.{j}" for i in range(1, 5) for j in range(2)}
    mlp = timm.layers.Mlp(4, 8)
    separate_activations(mlp)
    assert type(mlp) is timm.layers.Mlp


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda m: copy.deepcopy(pickled(m))])
def test_a_rewritten_module_copies_and_pickles_whole(copied):
    model, x = Functions(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    separate_activations(model)
    again = copied(model)
    assert torch.equal(outputs(again, x), outputs(model, x))
    assert [n for n, _ in again.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.note == "kept"
    assert type(again).__name__ == "Functions"
    with torch.no_grad():
        again.conv1.weight.zero_()
    assert bool(model.conv1.weight.any())  # nothing is shared
    model.register_forward_hook(lambda *_: seen.append(1))
    outputs(copy.deepcopy(model), x)
    assert seen == [1]


def test_a_rewritten_module_scripts():
    model, x = Functions(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    separate_activations(model).eval()
    assert torch.allclose(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
def test_the_activation_of_a_transformer_layer_can_be_replaced(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = outputs(model, x)
    separate_activations(model)
    assert list(structure.activations(model)) == ["layers.0.activation", "layers.1.activation"]
    torch.testing.assert_close(outputs(model, x), expected)
    for inner in model.layers:
        inner.activation = Slope(1.0)
    linear = outputs(model, x)
    assert not torch.allclose(linear, expected)  # no fused kernel passes it by
    model.requires_grad_(True)
    torch.testing.assert_close(model(x).detach(), linear)


def test_one_activation_in_several_places_becomes_several():
    act = nn.ReLU()
    inner = nn.Sequential(nn.Linear(4, 4), act)
    model = nn.Sequential(nn.Linear(4, 4), act, inner, act)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = outputs(model, x)
    assert len(structure.activations(model)) == 1
    separate_activations(model)
    assert list(structure.activations(model)) == ["1", "2.1", "3"]
    assert torch.equal(outputs(model, x), expected)


def test_what_an_activation_overwrote_is_still_read_as_overwritten():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for act in (nn.ReLU(inplace=True), nn.Sequential(nn.ReLU(inplace=True), nn.Identity())):
        model = Overwritten(act)
        expected = 3 * torch.relu(model.fc(x)).detach()
        torch.testing.assert_close(outputs(model, x), expected)
        separate_activations(model)
        torch.testing.assert_close(outputs(model, x), expected)
        assert not any(m.inplace for m in structure.activations(model).values())
        pre: list[Tensor] = []
        model.fc.register_forward_hook(lambda m, a, y, pre=pre: pre.append(y))
        outputs(model, x)
        assert float(pre[0].min()) < 0  # a hook sees the pre-activation


def test_hooks_modes_and_frozen_parameters_stay():
    model = torchvision.models.resnet.BasicBlock(4, 4)
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("block"))
    model.conv1.requires_grad_(False)
    model.eval()
    separate_activations(model)
    model(torch.zeros(1, 4, 3, 3))
    assert seen == ["block"]
    assert not model.conv1.weight.requires_grad
    assert not any(m.training for m in model.modules())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return F.relu(x) if float(x.sum()) > 0 else x


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


def test_an_activation_called_in_a_loop_becomes_one_for_each_turn():
    model, x = Loop(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = outputs(model, x)
    separate_activations(model)
    assert list(structure.activations(model)) == ["act", "act_1", "act_2"]
    assert torch.equal(outputs(model, x), expected)


def test_what_cannot_be_traced_is_refused_and_left_as_it_was():
    model = nn.Sequential(torchvision.models.resnet.BasicBlock(4, 4), Branching())
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"'1' \(Branching\) calls in its forward") as raised:
        separate_activations(model)
    assert "\n" not in str(raised.value)
    assert {name: (type(m), dict(vars(m))) for name, m in model.named_modules()} == before


def test_masked_layers_keep_their_masks():
    model = Functions()
    keep = {"fc.weight": torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.5}
    masks.apply(model, keep)
    separated = separate_activations(model, inplace=False)
    assert torch.equal(masks.masks_of(separated)["fc.weight"], keep["fc.weight"])
