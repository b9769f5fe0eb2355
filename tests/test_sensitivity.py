"""LOBSTER and SeReNe: the penalties, the sensitivities, the threshold and the procedure."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning101 import sensitivity
from pruning101.core import masks, models, structure
from pruning101.core.data import load
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit

KINDS = ["full", "lower_bound", "local"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*modules: nn.Module) -> nn.Sequential:
    """The modules with weights that depend on nothing else, in double precision."""
    model, g = nn.Sequential(*modules).double(), generator()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g).double() / math.sqrt(p[0].numel()))
    return model


def mlp() -> nn.Sequential:
    return net(
        nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    )


def convnet(inplace: bool = False) -> nn.Sequential:
    return net(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).double()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=400, valid=150, test=100)


def digits_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture(scope="module")
def trained(digits):
    model = digits_net()
    fit(model, digits, epochs=8, lr=0.1, progress=False)
    return model


# --- LOBSTER -----------------------------------------------------------------------------------


def test_lobster_shrinks_by_the_closed_form():
    model = nn.Sequential(nn.Linear(5, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -2.0, 4.0, 1.0, 3.0]]))
        model[0].bias.fill_(5.0)
    model[0].weight.grad = torch.tensor([[0.0, 0.25, -0.75, 1.0, -7.0]])
    model[0].bias.grad = torch.zeros(1)
    # no gradient: the full strength; a quarter: three quarters of it; 1 and more: none
    sensitivity.lobster(0.1)(model)
    expected = [2.0 * 0.9, -2.0 * (1 - 0.075), 4.0 * (1 - 0.025), 1.0, 3.0]
    assert model[0].weight.tolist()[0] == pytest.approx(expected)
    assert model[0].bias.item() == 5.0
    assert model[1].weight.item() == 1.0


def test_biases_and_norms_shrink_only_where_asked_for():
    for biases in (False, True):
        for norms in (False, True):
            model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.LayerNorm(2))
            for p in model.parameters():
                nn.init.ones_(p)
                p.grad = torch.zeros_like(p)
            sensitivity.lobster(0.5, biases=biases, norms=norms)(model)
            norm, bias = 0.5 if norms else 1.0, 0.5 if biases else 1.0
            found = {name: set(p.flatten().tolist()) for name, p in model.named_parameters()}
            expected = {"0.weight": 0.5, "0.bias": bias}
            expected |= {f"{i}.{leaf}": norm for i in (1, 2) for leaf in ("weight", "bias")}
            assert found == {name: {value} for name, value in expected.items()}


def test_lobster_leaves_masked_and_frozen_weights_and_counts_shared_ones_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for p in model.parameters():
        nn.init.ones_(p)
    model[3].weight = model[2].weight
    model[1].weight.requires_grad_(False)
    mask = torch.tensor([[True, False], [False, True]])
    masks.apply(model, {"0.weight": mask})
    model(torch.ones(1, 2)).sum().backward()
    for p in model.parameters():
        if p.requires_grad:
            p.grad.zero_()
    sensitivity.lobster(0.5)(model)
    assert torch.equal(model[0].weight_orig, torch.where(mask, 0.5, 1.0))
    assert torch.equal(model[0].weight, mask * 0.5)  # read at once, without a forward pass
    assert torch.equal(model[1].weight, torch.ones(2, 2))
    assert torch.equal(model[2].weight, torch.full((2, 2), 0.5))
    assert model[3].weight is model[2].weight


def test_a_weight_that_the_loss_does_not_reach_decays_fully():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.ones_(model[1].weight)
    model[0](torch.ones(1, 2)).sum().backward()
    assert model[1].weight.grad is None
    sensitivity.lobster(0.5)(model)
    assert torch.equal(model[1].weight, torch.full((2, 2), 0.5))


def test_in_fit_lobster_is_within_strength_times_the_step_of_the_papers_update(digits):
    # one step: w - lr g - strength w relu(1 - |g|), with the weight and gradient before the step
    data = digits.subset(train=64)
    model, strength, lr = digits_net().double(), 0.05, 0.5
    before = copy.deepcopy(model)
    batch, labels = next(iter(data.batches("train", 64)))
    F.cross_entropy(before(batch.double()), labels).backward()
    options = {"lr": lr, "momentum": 0.0, "batch_size": 64, "progress": False}
    fit(model, data, epochs=1, after_step=sensitivity.lobster(strength), **options)
    moved = 0.0
    for layer in ("1", "3"):
        old, new = before.get_submodule(layer).weight, model.get_submodule(layer).weight
        g = old.grad
        shrink = (1 - g.abs()).relu()
        paper = old - lr * g - strength * old * shrink
        after = (old - lr * g) * (1 - strength * shrink)
        # `fit` takes the images in another order: sums differ by rounding
        assert torch.allclose(new, after, rtol=0, atol=1e-9)
        assert ((new - paper).abs() <= strength * lr * g.abs() + 1e-9).all()
        moved += (strength * old * shrink).abs().max().item()
    assert moved > 1e-3
    assert torch.allclose(model[1].bias, before[1].bias - lr * before[1].bias.grad, atol=1e-9)


def test_the_gradient_that_lobster_sees_is_the_objectives_without_weight_decay(digits):
    data = digits.subset(train=64)
    seen = {}

    def look(model):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    def penalty(model):
        return 0.1 * model[1].weight.square().sum()

    model = digits_net().double()
    twin = copy.deepcopy(model)
    batch, labels = next(iter(data.batches("train", 64)))
    (F.cross_entropy(twin(batch.double()), labels) + penalty(twin)).backward()
    options = {"lr": 0.1, "weight_decay": 0.5, "batch_size": 64, "progress": False}
    fit(model, data, epochs=1, penalty=penalty, after_step=look, **options)
    for name, p in twin.named_parameters():
        assert torch.allclose(seen[name], p.grad, rtol=0, atol=1e-9)


def test_masked_weights_stay_zero_through_training_with_lobster(digits):
    model = digits_net()
    keep = torch.rand(24, 64, generator=generator()) > 0.5
    masks.apply(model, {"1.weight": keep})
    hidden = model[1].weight_orig[~keep].clone()
    shrink = sensitivity.lobster(1e-2)
    fit(model, digits, epochs=2, lr=0.1, momentum=0.0, after_step=shrink, progress=False)
    assert torch.equal(model[1].weight != 0, keep)
    assert torch.equal(model[1].weight_orig[~keep], hidden)


def test_lobster_without_gradients_or_of_a_bad_strength_is_refused():
    with pytest.raises(ValueError, match="no gradients"):
        sensitivity.lobster()(mlp())
    for strength in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="strength"):
            sensitivity.lobster(strength)
        with pytest.raises(ValueError, match="strength"):
            sensitivity.serene(mlp(), strength)


# --- neuron sensitivity ------------------------------------------------------------------------


def by_jacobian(model: nn.Sequential, x: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """One image at a time: the Jacobian of the rest of the network at each layer's output."""
    found = {}
    for index, module in enumerate(model):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        rest = copy.deepcopy(model[index + 1 :])
        for m in rest:
            if isinstance(m, nn.ReLU):
                m.inplace = False
        values = []
        for one in x:
            z = copy.deepcopy(model)[: index + 1](one[None]).detach()
            if kind == "local":
                values.append((z > 0).double()[0])
                continue
            jacobian = torch.autograd.functional.jacobian(lambda v, f=rest: f(v)[0], z)[:, 0]
            slope = jacobian.abs().mean(0) if kind == "full" else jacobian.mean(0).abs()
            values.append(slope)
        s = torch.stack(values)  # [B, neurons, ...]
        found[str(index)] = s.mean([0, *range(2, s.ndim)])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "convolution", "in place"])
def test_sensitivity_is_that_of_explicit_jacobians(name, kind):
    model = mlp() if name == "mlp" else convnet(inplace=name == "in place")
    model[1].training = False
    if name != "mlp":
        model[1].running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = images(7, 6) if name == "mlp" else images(7, 2, 5, 5)
    expected = by_jacobian(model.eval(), x, kind)
    batches = [(x[:4], None), (x[4:], None)]  # of different sizes: every image counts alike
    found = sensitivity.neuron_sensitivity(model, batches, kind=kind)
    assert found.keys() == expected.keys()
    for layer, s in expected.items():
        assert torch.allclose(found[layer], s, rtol=1e-10, atol=1e-12), layer
        assert not found[layer].requires_grad


def test_the_lower_bound_is_one_and_the_output_layer_has_one_over_k():
    model, x = convnet(), images(9, 2, 5, 5)
    full = sensitivity.neuron_sensitivity(model, [(x, None)])
    lower = sensitivity.neuron_sensitivity(model, [(x, None)], kind="lower_bound")
    assert all((lower[layer] <= full[layer] + 1e-12).all() for layer in full)
    assert (lower["0"] < 0.9 * full["0"]).any()
    assert full["6"].tolist() == pytest.approx([1 / 3] * 3)


def test_a_layer_called_twice_and_one_over_tokens_count_every_call_and_position():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net(nn.Linear(3, 3))[0]
            self.unused = nn.Linear(3, 3).double()

        def forward(self, x):  # [B, T, 3]
            return self.layer(self.layer(x).tanh()).sum(1)

    model, x = Twice(), images(5, 2, 3)
    found = sensitivity.neuron_sensitivity(model, [(x, None)])
    assert list(found) == ["layer"]
    first = model.layer(x)
    # second call: dy_k/dz_i is 1 for k = i; first call: W[k, i] tanh'(z_i)
    inner = (model.layer.weight.abs().mean(0) * (1 - first.tanh() ** 2)).mean([0, 1])
    assert torch.allclose(found["layer"], (inner + 1 / 3) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_model_images_and_random_state_as_they_were(kind):
    model, x = convnet(inplace=True), images(6, 2, 5, 5)
    model.insert(0, nn.ReLU(inplace=True))
    model.append(nn.Dropout(0.5))
    model.requires_grad_(False)  # frozen, and yet it can be measured
    before, kept_images, random = state(model), x.clone(), torch.get_rng_state()
    first = sensitivity.neuron_sensitivity(model, [(x, None)], kind=kind)
    again = sensitivity.neuron_sensitivity(model, [(x, None)], kind=kind)
    assert same(first, again)
    assert same(before, state(model))
    assert model.training
    assert torch.equal(x, kept_images)
    assert torch.equal(random, torch.get_rng_state())
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_even_if_the_model_fails():
    model = mlp()
    with pytest.raises(RuntimeError):
        sensitivity.neuron_sensitivity(model, [(images(2, 5), None)])
    assert all(not m._forward_hooks for m in model.modules())


def test_what_cannot_be_measured_is_refused():
    x = images(2, 6)
    with pytest.raises(ValueError, match="sensitivity"):
        sensitivity.neuron_sensitivity(mlp(), [(x, None)], kind="some")
    with pytest.raises(ValueError, match="nothing to measure"):
        sensitivity.neuron_sensitivity(mlp(), [])
    with pytest.raises(ValueError, match=r"outputs must be \[B, K\]"):
        sensitivity.neuron_sensitivity(mlp()[1:3].append(nn.Unflatten(1, (5, 1))), [(x, None)])


# --- SeReNe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_serene_shrinks_all_weights_of_a_neuron_by_its_insensitivity(kind):
    model, x = convnet(), images(6, 2, 5, 5)
    with torch.no_grad():
        model[6].weight[:, :8] *= 20  # some neurons with a sensitivity above 1
    keep = torch.rand(4, 3, 3, 3, generator=generator()) > 0.3
    masks.apply(model, {"3.weight": keep})
    with sensitivity.serene(model, 0.25, sensitivity=kind) as shrink:
        model(x)
        before = state(model)
        s = sensitivity.neuron_sensitivity(model, [(x, None)], kind=kind)
        with torch.no_grad():
            model.eval()(images(3, 2, 5, 5, seed=5))  # an evaluation is not the batch to use
        model.train()
        shrink(model)
    factors = {layer: 1 - 0.25 * (1 - value).relu() for layer, value in s.items()}
    for layer, stored in (("0", "weight"), ("6", "weight")):
        old, new = before[f"{layer}.{stored}"], model.state_dict()[f"{layer}.{stored}"]
        assert torch.allclose(new, old * factors[layer].view(-1, *[1] * (old.ndim - 1)))
    old, new = before["3.weight_orig"], model[3].weight_orig
    shrunk = old * factors["3"].view(-1, 1, 1, 1)
    assert torch.allclose(new, torch.where(keep, shrunk, old))
    assert torch.allclose(model[3].weight, shrunk * keep)
    for name in before.keys() - {"0.weight", "3.weight_orig", "6.weight"}:
        assert torch.equal(before[name], model.state_dict()[name]), name
    if kind == "full":
        assert (factors["3"] == 1).any()
        assert (factors["3"] < 1).any()


def test_serene_in_fit_uses_the_batch_of_the_step(digits):
    data = digits.subset(train=96)
    model = digits_net().double()
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.0, "batch_size": 48, "epochs": 1, "progress": False}
    with sensitivity.serene(model, 0.1) as shrink:
        fit(model, data, after_step=shrink, **options)
    batches = []

    def remember(module, inputs):
        if module.training:
            batches.append(inputs[0])

    handle = twin.register_forward_pre_hook(remember)

    def by_hand(network):
        felt = sensitivity.neuron_sensitivity(network, [(batches[-1], None)])
        with torch.no_grad():
            for layer, s in felt.items():
                network.get_submodule(layer).weight.mul_(1 - 0.1 * (1 - s).relu()[:, None])

    fit(twin, data, after_step=by_hand, **options)
    handle.remove()
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 2
    assert all(
        torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_serenes_hook_is_gone_whatever_happens(digits):
    model = digits_net()
    with pytest.raises(FloatingPointError), sensitivity.serene(model, 1e-3) as shrink:
        fit(model, digits, epochs=2, lr=1e30, after_step=shrink, progress=False)
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="no batch"):
        shrink(model)
    with pytest.raises(ValueError, match="sensitivity"):
        sensitivity.serene(model, 1e-3, sensitivity="upper")


def test_serene_removes_the_same_shares_in_every_process(monkeypatch):
    # Two processes with 2 and 4 images of a batch of 6: sums over both are what each works with.
    model, x = mlp(), images(6, 6)
    parts = [sensitivity.neuron_sensitivity(model, [(p, None)]) for p in (x[:2], x[2:])]

    def sum_of_both(self, tensors):
        *sums, count = list(tensors)
        for total, layer in zip(sums, parts[1], strict=True):
            total += 4 * parts[1][layer]
        count += 4

    monkeypatch.setattr("pruning101.core.runs.Group.sum", sum_of_both)
    twin = copy.deepcopy(model)
    with sensitivity.serene(model, 0.5) as shrink:
        model(x[:2])
        shrink(model)
    monkeypatch.undo()
    with sensitivity.serene(twin, 0.5) as shrink:
        twin(x)
        shrink(twin)
    assert all(
        torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_removed_neurons_are_those_without_incoming_weights():
    model = convnet()
    keep = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    keep[[0, 2]] = False
    keep[1, 0] = False
    masks.apply(model, {"3.weight": keep})
    assert sensitivity.removed_neurons(model) == {"0": 0, "3": 2, "6": 0}


# --- the threshold -----------------------------------------------------------------------------


def losses_by_count(model, data) -> list[float]:
    """The loss on valid with the n smallest weights gone, for every n, without the library."""
    weights = [m.weight for m in structure.prunable(model).values()]
    order = torch.cat([w.detach().abs().flatten() for w in weights]).sort().values
    losses = []
    for n in range(len(order)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for m in structure.prunable(twin).values():
                if n:
                    m.weight[m.weight.abs() <= order[n - 1]] = 0
        losses.append(evaluate(twin, data, "valid").loss)
    return losses


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.5])
def test_the_threshold_is_global_within_the_bound_and_on_its_edge(digits, tolerance):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 10))
    fit(model, digits, epochs=6, lr=0.2, progress=False)
    before = state(model)
    losses = losses_by_count(model, digits)
    kept = sensitivity.prune_within(model, digits, tolerance=tolerance, resolution=0)
    assert same(before, state(model))
    weight = model[2].weight.detach().abs()
    mask = kept["2.weight"]
    removed = int((~mask).sum())
    assert removed == 0 or weight[~mask].max() < weight[mask].min()
    bound = losses[0] * (1 + tolerance)
    assert losses[removed] <= bound
    assert losses[removed + 1] > bound  # the very next weight would have broken it
    masks.apply(model, kept)
    assert evaluate(model, digits, "valid").loss <= bound
    if tolerance == 0.5:
        assert removed > 20


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 1.0])
def test_the_masked_model_never_exceeds_the_bound_and_nothing_comes_back(
    trained, digits, tolerance
):
    model = masks.clone(trained)
    bound = evaluate(model, digits, "valid").loss * (1 + tolerance)
    masks.apply(model, sensitivity.prune_within(model, digits, tolerance=tolerance))
    assert evaluate(model, digits, "valid").loss <= bound
    first = masks.masks_of(model)
    sizes = {name: m.weight.detach().abs() for name, m in structure.prunable(model).items()}
    kept = torch.cat([s[first[f"{n}.weight"]] for n, s in sizes.items()])
    original = {n: m.weight.detach().abs() for n, m in structure.prunable(trained).items()}
    gone = torch.cat([s[~first[f"{n}.weight"]] for n, s in original.items()])
    assert len(gone) > 100
    assert gone.max() <= kept.min()
    second_bound = evaluate(model, digits, "valid").loss * (1 + tolerance)
    second = sensitivity.prune_within(model, digits, tolerance=tolerance)
    assert all((~first[name] & mask).sum() == 0 for name, mask in second.items())
    masks.apply(model, second)
    assert evaluate(model, digits, "valid").loss <= second_bound


def test_existing_masks_stay_even_where_the_hidden_weights_are_large(trained, digits):
    model = masks.clone(trained)
    keep = torch.rand(24, 64, generator=generator()) > 0.2
    keep[0] = True
    masks.apply(model, {"1.weight": keep})
    with torch.no_grad():
        model[1].weight_orig[~keep] = 100.0
        model[1].weight_orig[0] = 0.0  # zeros that no mask made do not take their places
    found = sensitivity.prune_within(model, digits, tolerance=0.05)
    assert not (found["1.weight"] & ~keep).any()
    assert (keep & ~found["1.weight"]).any()
    same_as_before = sensitivity.prune_within(model, digits, tolerance=0, resolution=1)
    assert torch.equal(same_as_before["1.weight"], keep)


def test_a_loss_that_is_not_monotone_still_ends_within_the_bound(digits, monkeypatch):
    # The loss goes up and down with the share pruned: whatever is found was measured to be inside.
    model = digits_net()

    def jagged(network, *_args, **_options):
        sparsity = masks.sparsity(network)
        return type("Score", (), {"loss": 1.0 + 0.2 * math.sin(40 * sparsity)})()

    monkeypatch.setattr(sensitivity, "evaluate", jagged)
    for tolerance in (0.01, 0.05, 0.1, 0.15):
        twin = masks.clone(model)
        masks.apply(twin, sensitivity.prune_within(twin, digits, tolerance=tolerance))
        assert jagged(twin).loss <= 1 + tolerance


def test_biases_and_norms_are_pruned_only_where_asked_for(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    names = {"1.weight", "3.weight"}
    fit(model, digits, epochs=3, lr=0.1, progress=False)
    with torch.no_grad():
        model[2].bias.fill_(1e-9)
    assert sensitivity.prune_within(model, digits).keys() == names
    found = sensitivity.prune_within(model, digits, biases=True)
    assert found.keys() == names | {"1.bias", "3.bias"}
    with pytest.warns(UserWarning, match=r"2\.bias"):
        found = sensitivity.prune_within(model, digits, norms=True)
    assert found.keys() == names | {"2.weight", "2.bias"}
    assert not found["2.bias"].any()  # the smallest of all: with them gone nothing changes


def test_a_layer_may_lose_all_its_weights_with_a_warning_and_without_a_crash(digits):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.first, self.branch = nn.Linear(64, 10), nn.Linear(10, 10)

        def forward(self, x):
            z = self.first(x.flatten(1))
            return z + 1e-6 * self.branch(z)

    model = Residual()
    with torch.no_grad():
        model.branch.weight *= 1e-6
    with pytest.warns(UserWarning, match=r"branch\.weight"):
        found = sensitivity.prune_within(model, digits, tolerance=0.2)
    assert not found["branch.weight"].any()
    assert found["first.weight"].any()
    masks.apply(model, found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was gone before is not told again
        again = sensitivity.prune_within(model, digits, tolerance=0.2)
    assert not again["branch.weight"].any()


def test_what_the_threshold_cannot_do_is_refused(trained, digits):
    for tolerance in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            sensitivity.prune_within(trained, digits, tolerance=tolerance)
    with pytest.raises(ValueError, match="test decides nothing"):
        sensitivity.prune_within(trained, digits, split="test")
    with pytest.raises(ValueError, match="resolution"):
        sensitivity.prune_within(trained, digits, resolution=-1)
    with pytest.raises(ValueError, match="no convolution"):
        sensitivity.prune_within(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), digits)
    broken = digits_net()
    with torch.no_grad():
        broken[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="loss on valid"):
        sensitivity.prune_within(broken, digits)


# --- the procedure -----------------------------------------------------------------------------

QUICK = {"rounds": 3, "epochs": 3, "patience": 2, "lr": 0.1, "strength": 2e-3, "tolerance": 0.1}


def fingerprint(steps) -> list:
    return [(s.index, s.removed, s.loss, s.test_accuracy, s.footprint.nonzero) for s in steps]


@pytest.mark.parametrize("method", ["lobster", "serene", None])
def test_the_procedure_is_repeatable_resumes_and_only_ever_removes(
    trained, digits, tmp_path, method
):
    before = state(trained)
    options = {**QUICK, "method": method, "train": {"batch_size": 64}}
    whole = list(sensitivity.regularise_and_prune(trained, digits, **options))
    assert same(before, state(trained))
    assert [s.index for s in whole] == [1, 2, 3]
    sparsities = [masks.sparsity(s.model) for s in whole]
    assert sparsities == sorted(set(sparsities))
    weights = 64 * 24 + 240
    for index, step in enumerate(whole):
        assert sum(s.removed for s in whole[: index + 1]) == round(sparsities[index] * weights)
        assert not step.model._forward_pre_hooks
        if index:
            old, new = masks.masks_of(whole[index - 1].model), masks.masks_of(step.model)
            assert all(not (new[name] & ~old[name]).any() for name in old)
    history = History(path=tmp_path / "h")
    next(iter(sensitivity.regularise_and_prune(trained, digits, history=history, **options)))
    resumed = History.resume(tmp_path / "h")
    assert len(resumed) == 1
    list(sensitivity.regularise_and_prune(trained, digits, history=resumed, **options))
    assert fingerprint(resumed) == fingerprint(whole)
    other = list(sensitivity.regularise_and_prune(trained, digits, seed=1, **options))
    assert fingerprint(other) != fingerprint(whole)


@pytest.mark.parametrize("method", ["lobster", "serene", None])
def test_a_round_is_fit_with_the_penalty_to_the_best_epoch_then_the_threshold(
    trained, digits, method
):
    from pruning101.core import runs

    options = {"lr": 0.1, "batch_size": 64, "momentum": 0.0, "progress": False}
    work, best = masks.clone(trained), (math.inf, None)
    for epoch in range(1, 5):
        shrink = sensitivity.lobster(2e-3) if method == "lobster" else None
        with sensitivity.serene(work, 2e-3, sensitivity="local") as serene:
            shrink = serene if method == "serene" else shrink
            seed = runs.derive(7, 1, epoch)
            (record,) = fit(work, digits, epochs=1, after_step=shrink, seed=seed, **options)
        if record.valid_loss < best[0]:
            best = (record.valid_loss, masks.clone(work))
    expected = sensitivity.prune_within(best[1], digits, tolerance=0.1)
    settings = QUICK | {"rounds": 1, "epochs": 4, "patience": 4, "sensitivity": "local"}
    train = {"batch_size": 64, "momentum": 0.0}
    (step,) = sensitivity.regularise_and_prune(
        trained, digits, method=method, train=train, seed=7, **settings
    )
    assert step.loss <= best[0] * 1.1
    found = masks.masks_of(step.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    for layer in ("1", "3"):
        new, old = step.model.get_submodule(layer), best[1].get_submodule(layer)
        assert torch.equal(new.weight_orig, old.weight)


def test_patience_ends_a_round(trained, digits, monkeypatch):
    calls = []

    def stale(model, data, **options):
        calls.append(options["seed"])
        history = fit(model, data, **options)
        losses = [0.5, 0.4, 0.45, 0.41, 0.3]
        return [type("Epoch", (), {"valid_loss": losses[len(calls) - 1]})()] if history else None

    monkeypatch.setattr(sensitivity, "fit", stale)
    settings = QUICK | {"rounds": 1, "epochs": 5, "patience": 2}
    list(sensitivity.regularise_and_prune(trained, digits, **settings))
    assert len(calls) == 4  # two epochs that were no better, and the better fifth is not reached
    assert len(set(calls)) == 4


def test_the_procedure_ends_where_nothing_can_go(trained, digits, monkeypatch):
    def all_kept(model, data, **_options):
        return {n: torch.ones_like(m) for n, m in masks.masks_of(model).items()}

    monkeypatch.setattr(sensitivity, "prune_within", all_kept)
    assert list(sensitivity.regularise_and_prune(trained, digits, **QUICK)) == []


def test_the_penalty_makes_weights_small(trained, digits):
    def size(method):
        settings = QUICK | {"rounds": 1, "strength": 1e-2, "epochs": 2}
        steps = sensitivity.regularise_and_prune(trained, digits, method=method, **settings)
        layers = structure.prunable(next(iter(steps)).model).values()
        return sum(m.weight_orig.abs().sum().item() for m in layers)

    plain = size(None)
    assert size("lobster") < 0.95 * plain
    assert size("serene") < 0.95 * plain


def test_a_bad_procedure_is_refused_before_any_work(trained, digits):
    for bad in (
        {"method": "l2"},
        {"rounds": 0},
        {"patience": 0},
        {"epochs": 0},
        {"strength": -1},
        {"tolerance": math.nan},
        {"sensitivity": "upper"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sensitivity.regularise_and_prune(trained, digits, **bad)
    history = History()
    next(iter(sensitivity.regularise_and_prune(trained, digits, history=history, **QUICK)))
    with pytest.raises(ValueError, match="strength"):
        sensitivity.regularise_and_prune(
            trained, digits, history=history, **QUICK | {"strength": 1e-4}
        )


@pytest.mark.slow
def test_lenet5_loses_weights_to_serenes_lower_bound_and_keeps_its_accuracy():
    data = load("digits", image_size=16).subset(train=600, valid=150, test=50)
    model = models.build("lenet5", in_channels=1, image_size=16)
    fit(model, data, epochs=10, lr=0.05, batch_size=50, progress=False)
    accuracy = evaluate(model, data, "valid").accuracy
    assert accuracy > 0.9
    settings = QUICK | {"rounds": 2, "strength": 3e-3, "lr": 0.05}
    *_, last = sensitivity.regularise_and_prune(
        model,
        data,
        method="serene",
        sensitivity="lower_bound",
        train={"batch_size": 50},
        **settings,
    )
    assert masks.sparsity(last.model) > 0.6
    assert last.accuracy > accuracy - 0.05
    removed = sensitivity.removed_neurons(last.model)
    for layer, module in structure.prunable(last.model).items():
        rows = module.weight.flatten(1).abs().sum(1)
        assert removed[layer] == (rows == 0).sum()
