"""Entropies of activations' states, their closed forms, and the recipes that go by them."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from pruning101 import activation_entropy as entropy
from pruning101.core import activation_states, masks, models, removals, runs, structure
from pruning101.core import state_entropy as states
from pruning101.core.data import from_tensors, load
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit

# --- state_entropy: against a plain loop over units and numbers ----------------------------------


def entropy_by_hand(z, zero, exclude, axis):
    values = []
    for unit in z.movedim(axis, 0).flatten(1).tolist():
        if zero == "ignore":
            unit = [v for v in unit if v != 0]
        on = [v > 0 or (v == 0 and zero == "on") for v in unit]
        p = sum(on) / len(on) if on else 0.0
        if exclude and p in (0.0, 1.0):
            continue
        values.append(-sum(q * math.log2(q) for q in (p, 1 - p) if q > 0))
    return sum(values) / len(values) if values else 0.0


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(5, 3), (4, 3, 2, 3), (3, 4, 5), (1, 2), (2, 3, 4, 5)]),
    zero=st.sampled_from(["ignore", "on", "off"]),
    exclude=st.booleans(),
    axis=st.sampled_from([1, -1]),
)
@settings(max_examples=60, deadline=None)
def test_state_entropy_is_the_mean_over_units_of_the_entropy_of_their_share(
    seed, shape, zero, exclude, axis
):
    # whole numbers from -2 to 2: exact zeros, and units that never switch
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, shape, generator=generator).float()
    found = entropy.state_entropy(z, zero=zero, exclude_saturated=exclude, unit_axis=axis)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(entropy_by_hand(z, zero, exclude, axis), abs=1e-6)


def test_the_three_conventions_differ_only_in_what_zero_is():
    z = torch.tensor([[1.0], [0.0], [-1.0], [-1.0]])  # one unit: 1 above, 1 at, 2 below zero
    shares = {"ignore": 1 / 3, "on": 1 / 2, "off": 1 / 4}
    for zero, p in shares.items():
        expected = stats.entropy([p, 1 - p], base=2)
        assert float(entropy.state_entropy(z, zero=zero)) == pytest.approx(expected, abs=1e-6)


def test_units_that_are_always_zero_and_saturated_units():
    dead = torch.zeros(6, 2, 3)
    assert [float(entropy.state_entropy(dead, zero=z)) for z in ("ignore", "on", "off")] == [0] * 3
    half = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # one unit at one bit, one always ON
    assert float(entropy.state_entropy(half, zero="off")) == 0.5
    assert float(entropy.state_entropy(half, zero="off", exclude_saturated=True)) == 1.0
    assert float(entropy.state_entropy(half[:, 1:], exclude_saturated=True)) == 0.0


def test_the_entropy_is_that_of_the_mean_share_not_the_mean_of_entropies():
    z = torch.randn(64, 8, 16, generator=torch.Generator().manual_seed(0))
    of_mean = float(entropy.state_entropy(z))
    share = (z > 0).double().mean(0)  # [units, positions]
    assert of_mean > 0.999 > float(entropy.binary_entropy(share).mean()) + 0.005


def test_counting_in_pieces_adds_up_and_leaves_the_tensor(monkeypatch):
    z = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[z.abs() < 0.2] = 0
    before = z.clone()
    whole = [states.count_states(z, "ignore", axis) for axis in (1, -1, 0)]
    monkeypatch.setattr(states, "PIECE", 16)
    for axis, counts in zip((1, -1, 0), whole, strict=True):
        assert torch.equal(states.count_states(z, "ignore", axis), counts)
        others = [d for d in range(3) if d != axis % 3]
        assert torch.equal(counts, torch.stack([(z > 0).sum(others), (z != 0).sum(others)]))
    assert torch.equal(z, before)
    assert entropy.state_entropy(z).dtype == torch.float64


def test_binary_entropy_at_its_ends_and_in_its_middle():
    p = torch.tensor([0.0, 0.5, 1.0, 0.11], dtype=torch.float64)
    expected = [0.0, 1.0, 0.0, stats.entropy([0.11, 0.89], base=2)]
    assert entropy.binary_entropy(p).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("z", "options", "error", "words"),
    [
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "floating-point"),
        ([[1.0]], {}, TypeError, "not list"),
        (torch.ones(0, 3), {}, ValueError, "must hold numbers"),
        (torch.ones(3), {}, ValueError, "unit_axis=1"),
        (torch.tensor([[math.nan, 1.0]]), {}, ValueError, "NaN"),
        (torch.ones(2, 2), {"zero": "sometimes"}, ValueError, "zero must be one of"),
    ],
)
def test_state_entropy_refuses_in_one_sentence(z, options, error, words):
    with pytest.raises(error, match=words):
        entropy.state_entropy(z, **options)


# --- closed forms ------------------------------------------------------------------------------


def norm_with(norm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return norm


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(50), nn.LayerNorm(50), nn.BatchNorm1d(50), nn.GroupNorm(5, 50)],
    ids=lambda norm: type(norm).__name__,
)
def test_closed_forms_are_those_of_the_normal_distribution(norm):
    norm = norm_with(norm).double()
    beta, gamma = norm.bias.detach().numpy(), norm.weight.detach().abs().numpy()
    found = entropy.norm_state_probability(norm)
    assert found.shape == (50,)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx(stats.norm.sf(0, beta, gamma).tolist(), abs=1e-12)
    wrong = entropy.error_likelihood(norm)
    assert wrong.tolist() == pytest.approx(torch.minimum(found, 1 - found).tolist(), abs=1e-12)
    single = entropy.norm_state_probability(copy.deepcopy(norm).float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), found, atol=1e-6, rtol=0)


def test_closed_forms_against_drawn_normalised_features():
    norm = norm_with(nn.BatchNorm1d(6, eps=1e-9), seed=3)
    x = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.no_grad():
        z = norm(x)  # in training mode: the batch's own statistics
    assert torch.allclose((z > 0).float().mean(0), entropy.norm_state_probability(norm), atol=5e-3)
    rarer = torch.minimum((z > 0).float().mean(0), (z < 0).float().mean(0))
    assert torch.allclose(rarer, entropy.error_likelihood(norm), atol=5e-3)


def test_a_norm_without_scale_or_shift_and_far_tails():
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 0.0, 0.0, -0.1]))
        norm.bias.copy_(torch.tensor([2.0, 0.0, -2.0, 1.0]))
    assert entropy.norm_state_probability(norm).tolist() == pytest.approx([1, 0, 0, 1])
    likelihood = entropy.error_likelihood(norm)
    assert likelihood[:3].tolist() == [0, 0, 0]
    assert float(likelihood[3]) == pytest.approx(stats.norm.cdf(-10), rel=1e-5)
    assert entropy.norm_state_probability(nn.BatchNorm2d(3, affine=False)).tolist() == [0.5] * 3
    assert entropy.error_likelihood(nn.LayerNorm(2, elementwise_affine=False)).tolist() == [0.5] * 2
    assert entropy.norm_state_probability(nn.LayerNorm(2, bias=False)).tolist() == [0.5] * 2


def test_closed_forms_refuse_what_is_no_norm():
    for function in (entropy.norm_state_probability, entropy.error_likelihood):
        with pytest.raises(TypeError, match="a ReLU is no norm"):
            function(nn.ReLU())


# --- one pass over the data --------------------------------------------------------------------


class Tokens(nn.Module):
    """Tokens [B, T, C] and maps [B, C, H, W] of equal sizes, an activation called twice, and one
    in place: all that a pass has to keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.again = nn.Conv2d(4, 4, 1)
        self.mix = nn.Linear(4, 16)
        self.gelu = nn.GELU()
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = self.act(self.again(x) + x)
        x = x.flatten(2).mT  # [B, positions, 4]
        return self.head(self.gelu(self.mix(x)).mean(1))


def inputs_of_activations(model, images):
    """What comes into each call, recomputed by hand."""
    with torch.no_grad():
        first = model.bn(model.conv(images))
        kept = torch.relu(first)
        second = model.again(kept) + kept
        tokens = torch.relu(second).flatten(2).mT
        return {"act": (first, 1), "act#2": (second, 1), "gelu": (model.mix(tokens), -1)}


@pytest.fixture
def tokens():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens()
        model.bn(model.conv(torch.randn(8, 3, 4, 4)))  # some running statistics
        return model, torch.randn(11, 3, 4, 4)


def batches_of(images, size):
    return [(part, torch.zeros(len(part))) for part in images.split(size)]


@pytest.mark.parametrize("zero", ["ignore", "on", "off"])
@pytest.mark.parametrize("exclude", [False, True])
def test_layer_entropies_are_those_of_all_images_at_once_whatever_the_batches(
    tokens, zero, exclude
):
    model, images = tokens
    model.eval()
    options = {"zero": zero, "exclude_saturated": exclude}
    expected = {
        name: float(entropy.state_entropy(z, unit_axis=axis, **options))
        for name, (z, axis) in inputs_of_activations(model, images).items()
    }
    for size in (11, 4, 1):
        found = entropy.layer_entropies(model, batches_of(images, size), **options)
        assert list(found) == ["act", "act#2", "gelu"]
        assert found == pytest.approx(expected, abs=1e-6)


def test_layer_entropies_averaged_over_batches_as_the_published_codes_do(tokens):
    model, images = tokens
    model.eval()
    parts = images.split(4)
    found = entropy.layer_entropies(model, batches_of(images, 4), average="batches")
    for name in found:
        values = []
        for part in parts:
            z, axis = inputs_of_activations(model, part)[name]
            values.append(float(entropy.state_entropy(z, unit_axis=axis)))
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert found["gelu"] < entropy.layer_entropies(model, batches_of(images, 4))["gelu"]


def test_layer_entropies_leaves_the_model_and_the_random_state(tokens):
    model, images = tokens
    model.train()
    model.bn.eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    entropy.layer_entropies(model, batches_of(images, 4))
    entropy.activation_moments(model, batches_of(images, 4))
    with pytest.raises(ValueError, match="NaN"):
        entropy.layer_entropies(model, batches_of(images * math.nan, 4))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_layer_entropies_of_chosen_layers_only(tokens):
    model, images = tokens
    batches = batches_of(images, 4)
    found = entropy.layer_entropies(model, batches, layers=["gelu"])
    assert found == {"gelu": entropy.layer_entropies(model, batches)["gelu"]}


def test_layer_entropies_says_what_is_missing(tokens):
    model, images = tokens
    with pytest.raises(ValueError, match=r"has no activation 'gelo'; near it are .*gelu"):
        entropy.layer_entropies(model, batches_of(images, 4), layers=["gelo"])
    with pytest.raises(ValueError, match="no activation that is a module"):
        entropy.layer_entropies(nn.Linear(3, 2), batches_of(images, 4))
    with pytest.raises(ValueError, match="there are no batches"):
        entropy.layer_entropies(model, [])
    with pytest.raises(ValueError, match="a batch holds no images"):
        entropy.layer_entropies(model, [(images[:0], None)])
    with pytest.raises(ValueError, match="average must be one of"):
        entropy.layer_entropies(model, batches_of(images, 4), average="epochs")
    with pytest.raises(ValueError, match="does not take images of 1 x 4 x 4"):
        entropy.layer_entropies(model, batches_of(images[:, :1], 4))


def test_moments_are_mean_and_unbiased_deviation_of_each_unit(tokens, monkeypatch):
    model, images = tokens
    model.eval()
    monkeypatch.setattr(activation_states, "PIECE", 64)
    found = entropy.activation_moments(model, batches_of(images, 4))
    for name, (z, axis) in inputs_of_activations(model, images).items():
        z = z.movedim(axis, -1).flatten(0, -2).double()
        assert torch.allclose(found[name].mean, z.mean(0), atol=1e-6)
        assert torch.allclose(found[name].std, z.std(0), atol=1e-6)
        share = entropy.state_probability(found[name].mean, found[name].std)
        expected = stats.norm.sf(0, z.mean(0).numpy(), z.std(0).numpy())
        assert share.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_origins_follow_the_branch_and_know_the_axis_of_the_units(tokens):
    model, images = tokens
    found = activation_states.origins(model, images[:2])
    assert {name: (o.layer, o.norm, o.joined, o.unit_axis) for name, o in found.items()} == {
        "act": ("conv", "bn", False, 1),
        "act#2": ("again", None, True, 1),
        "gelu": ("mix", None, False, -1),
    }


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 17), ("mobilenet_v2", 35), ("swin_t", 12), ("vgg16_bn", 13)]
)
def test_origins_in_the_networks_of_the_papers(name, count):
    model = models.build(name, image_size=32)
    found = activation_states.origins(model, torch.randn(2, 3, 32, 32))
    assert len(found) == count
    assert list(found) == list(structure.activations(model))
    if name == "resnet18":
        # after the sum with a projected skip it is still the second convolution's activation
        assert found["layer2.0.relu2"] == activation_states.Origin(
            "layer2.0.conv2", "layer2.0.bn2", True, 1
        )
        assert found["layer2.0.relu1"].joined is False
    if name == "swin_t":
        assert {o.unit_axis for o in found.values()} == {-1}
        assert found["features.1.0.mlp.1"].layer == "features.1.0.mlp.0"
    else:
        assert all(o.norm is not None and o.unit_axis == 1 for o in found.values())


def test_entropies_of_a_trained_norm_agree_with_its_closed_form():
    # BatchNorm in front of a ReLU: what is counted on the data is what beta and gamma say
    data = load("digits").subset(train=512, valid=64, test=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
        )
        norm_with(model[2])
        model[2].momentum = None  # cumulative average
        model(torch.cat([x for x, _ in data.batches("train", 512)]))
    counted = entropy.layer_entropies(model, data.batches("train", 100))["3"]
    closed = entropy.binary_entropy(entropy.norm_state_probability(model[2])).mean().item()
    assert counted == pytest.approx(closed, abs=0.03)


# --- surgery -----------------------------------------------------------------------------------


def mlp(*sizes: int, norms: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers, each with BatchNorm and ReLU behind it but for the last."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norms else []), nn.ReLU()]
        return nn.Sequential(*layers[: -2 if norms else -1])


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=384, valid=120, test=120)


@pytest.fixture(scope="module")
def trained(digits):
    model = mlp(64, 24, 20, 16, 10)
    fit(model, digits, epochs=4, lr=0.1, progress=False)
    return model


def everything(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, str(model)


def same(before, model):
    state, text = everything(model)
    return before[1] == text and all(torch.equal(v, before[0][k]) for k, v in state.items())


def test_remove_activations_puts_identities_there_and_nowhere_else(tokens):
    model, images = tokens
    model.eval()
    entropy.remove_activations(model, ["gelu"])
    assert isinstance(model.gelu, nn.Identity)
    kept = model.act(model.bn(model.conv(images)))
    kept = model.act(model.again(kept) + kept).flatten(2).mT
    assert torch.allclose(model(images), model.head(model.mix(kept).mean(1)), atol=1e-6)


def test_remove_activations_refuses_and_changes_nothing():
    model = mlp(4, 3, 3, 2)
    before = everything(model)
    with pytest.raises(ValueError, match="has no activation '2' to remove; it has 3, 6"):
        entropy.remove_activations(model, ["3", "2"])
    with pytest.raises(ValueError, match="has no activation '' to remove"):
        entropy.remove_activations(nn.ReLU(), [""])
    assert same(before, model)
    model.append(model[3])
    with pytest.raises(ValueError, match="'3' stands in several places"):
        entropy.remove_activations(model, ["6", "3"])
    assert isinstance(model[6], nn.ReLU)


# --- budgets: against the formulas, written down with scipy --------------------------------------


def budgets_by_the_book(importance, alive, budget):
    """Shares before rounding, emptied layers whole, by recursion."""
    if not importance:
        return {}
    names = list(importance)
    i = np.array([importance[n] for n in names])
    shares = dict(zip(names, budget * special.softmax(i.sum() / i), strict=True))
    short = [n for n in names if alive[n] < shares[n]]
    if not short:
        return shares
    rest = {n: importance[n] for n in names if n not in short}
    rest = budgets_by_the_book(rest, alive, budget - sum(alive[n] for n in short))
    return {n: float(alive[n]) for n in short} | rest


@given(
    layers=st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(1, 5000)), min_size=1, max_size=6),
    rate=st.floats(0.0, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_budgets_follow_the_softmax_and_add_up(layers, rate):
    importance = {f"l{k}": i for k, (i, _) in enumerate(layers)}
    alive = {f"l{k}": n for k, (_, n) in enumerate(layers)}
    budget = rate * sum(alive.values())
    exact = entropy.weight_budgets(importance, alive, budget)
    assert list(exact) == list(importance)
    assert sum(exact.values()) == round(budget)
    book = budgets_by_the_book(importance, alive, round(budget))
    assert all(0 <= exact[n] <= alive[n] and abs(exact[n] - book[n]) < 1 + 1e-6 for n in alive)
    down = entropy.weight_budgets(importance, alive, budget, rounding="down")
    book = budgets_by_the_book(importance, alive, budget)
    # int() of a share that is a whole number but for its last bit may go either way
    assert all(down[n] in {int(book[n]), int(book[n] - 1e-7), int(book[n] + 1e-7)} for n in alive)


def test_budgets_of_a_layer_that_has_too_little():
    # R = 7, 3.5, 1.75: nearly all of the budget falls on "a", which has 10; then R = 3, 1.5
    importance, alive = {"a": 0.1, "b": 0.2, "c": 0.4}, {"a": 10, "b": 500, "c": 1000}
    found = entropy.weight_budgets(importance, alive, 110)
    share = 100 / (1 + math.exp(-1.5))
    assert found == {"a": 10, "b": round(share), "c": 100 - round(share)}
    # with everything to go, every layer is emptied
    assert entropy.weight_budgets(importance, alive, 1510) == alive
    assert entropy.weight_budgets({"a": 1e-4, "b": 1.0}, alive, 8) == {"a": 8, "b": 0}
    assert entropy.weight_budgets({}, {}, 0) == {}
    # thirds: largest remainders give the sum, EGP's int() does not
    thirds = dict.fromkeys("abc", 0.5)
    many = dict.fromkeys("abc", 100)
    assert sum(entropy.weight_budgets(thirds, many, 100).values()) == 100
    assert set(entropy.weight_budgets(thirds, many, 100, rounding="down").values()) == {33}
    with pytest.raises(ValueError, match="above 0"):
        entropy.weight_budgets({"a": 0.0}, {"a": 3}, 1)


# --- EASIER ------------------------------------------------------------------------------------


def inputs_of(model, images):
    """What comes into each ReLU of an :func:`mlp`, and the outputs."""
    model.eval()
    found, x = {}, images
    with torch.no_grad():
        for name, module in model.named_children():
            if isinstance(module, nn.ReLU):
                found[name] = x
            x = module(x)
    return found, x


def all_images(data, split="train"):
    return torch.cat([images for images, _ in data.batches(split, 50)])


def test_easier_removes_the_lowest_entropy_and_folds_what_became_linear(digits, trained):
    before = everything(trained)
    images = all_images(digits)
    copied, order = copy.deepcopy(trained), []
    steps = list(entropy.easier(trained, digits, epochs=0, lr=0.1))
    for step in steps:
        z, _ = inputs_of(copied, images)
        expected = {name: float(entropy.state_entropy(v)) for name, v in z.items()}
        assert step.entropies == pytest.approx(expected, abs=1e-6)
        assert step.scores == step.entropies
        order.append(min(expected, key=expected.get))
        assert step.removed == [order[-1]] == list(step.linearised)
        copied[int(order[-1])] = nn.Identity()
        assert torch.equal(step.model.eval()(images), inputs_of(copied, images)[1])
        assert torch.allclose(step.folded.eval()(images), step.model(images), atol=1e-4)
        assert step.activations_left == 3 - step.index
        # four linear layers, one less for each activation that is gone
        assert step.footprint == footprint(step.folded, images[:1])
        assert (step.footprint.depth, step.unfolded_depth) == (4 - step.index, 4)
        assert step.footprint.macs <= step.unfolded_macs == footprint(trained, images[:1]).macs
        assert step.accuracy == evaluate(step.model, digits, "valid").accuracy
    assert sorted(order) == ["3", "6", "9"]
    assert steps[-1].footprint.parameters == 64 * 10 + 10
    assert same(before, trained)


def test_activations_at_exactly_zero_go_together_with_the_lowest(digits, trained):
    model = copy.deepcopy(trained)
    with torch.no_grad():  # always OFF, so that what follows never switches either
        model[5].weight.fill_(1e-3)
        model[5].bias.fill_(-5.0)
    (step,) = entropy.easier(model, digits, removals=1, epochs=0, lr=0.1)
    assert step.removed == ["6", "9"]
    assert step.entropies["3"] > 0.5
    assert step.activations_left == 1


def test_easier_takes_the_conventions_and_the_layers_it_is_told(digits, trained):
    options = {"removals": 1, "epochs": 0, "lr": 0.1}
    (step,) = entropy.easier(trained, digits, layers=["3"], **options)
    assert step.removed == ["3"]
    assert list(step.entropies) == ["3"]
    assert step.activations_left == 2
    (coded,) = entropy.easier(trained, digits, zero="on", average="batches", **options)
    batches = list(digits.batches("train", 128))
    expected = entropy.layer_entropies(trained, batches, zero="on", average="batches")
    assert coded.entropies == expected


def test_retraining_goes_on_from_the_current_weights(digits, trained):
    options = {"momentum": 0.5, "batch_size": 50}
    (step,) = entropy.easier(
        trained, digits, removals=1, epochs=2, lr=0.05, retrain=options, seed=3
    )
    expected = copy.deepcopy(trained)
    entropy.remove_activations(expected, step.removed)
    fit(expected, digits, epochs=2, lr=0.05, seed=runs.derive(3, 1), progress=False, **options)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, step.model.state_dict()[name])


RECIPES = {
    "easier": (entropy.easier, {"removals": 3}),
    "likelihood": (entropy.tlc, {"removals": 3}),
    "loss_gap": (entropy.tlc, {"ranking": "loss_gap", "removals": 3}),
    "egp": (entropy.egp, {"rounds": 3, "rate": 0.6}),
    "nepenthe": (entropy.nepenthe, {"rounds": 3, "rate": 0.6}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_history_goes_on_to_the_same_numbers(name, digits, trained, tmp_path):
    recipe, settings = RECIPES[name]
    options = {"epochs": 1, "lr": 0.05, **settings}
    whole = list(recipe(trained, digits, **options))
    assert same(everything(trained), trained)
    first = recipe(trained, digits, history=History(path=tmp_path / "run"), **options)
    next(first)
    first.close()
    rest = list(recipe(trained, digits, history=History.load(tmp_path / "run"), **options))
    assert [step.index for step in rest] == [step.index for step in whole[1:]]
    for a, b in zip(rest, whole[1:], strict=True):
        assert (a.removed, a.linearised, a.scores) == (b.removed, b.linearised, b.scores)
        assert (a.accuracy, a.loss, a.footprint) == (b.accuracy, b.loss, b.footprint)
    again = History.load(tmp_path / "run")
    assert [type(step) for step in again] == [entropy.Removal] * len(whole)
    assert again[0].linearised == whole[0].linearised
    x = all_images(digits, "valid")
    assert torch.equal(again.last.folded.eval()(x), whole[-1].folded.eval()(x))
    with pytest.raises(ValueError, match="begun with lr"):
        recipe(trained, digits, history=again, **options | {"lr": 0.1})


def test_the_removal_that_passes_the_tolerance_is_not_yielded(digits, trained):
    options = {"epochs": 0, "lr": 0.1}
    free = list(entropy.easier(trained, digits, **options))
    dense = evaluate(trained, digits, "valid").accuracy
    drops = [dense - step.accuracy for step in free]
    assert 0 < drops[0] < max(drops)  # or the test shows nothing
    for tolerance in (drops[0], drops[0] - 1e-3, 1.0):
        held = list(entropy.easier(trained, digits, tolerance=tolerance, **options))
        fine = [drop <= tolerance for drop in drops] + [False]
        assert [step.removed for step in held] == [
            step.removed for step in free[: fine.index(False)]
        ]
    history = History()
    assert list(entropy.egp(trained, digits, tolerance=0, rate=1, history=history, **options)) == []
    assert len(history) == 0


def test_recipes_refuse_before_any_work(digits, trained):
    before = everything(trained)
    good = {"epochs": 0, "lr": 0.1}
    for recipe in (entropy.easier, entropy.tlc, entropy.egp, entropy.nepenthe):
        with pytest.raises(ValueError, match="no activation that could be removed"):
            recipe(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, **good)
        with pytest.raises(ValueError, match="no activation 'relu9'; it has 3, 6, 9"):
            recipe(trained, digits, layers=["3", "relu9"], **good)
        with pytest.raises(ValueError, match="tolerance must be"):
            recipe(trained, digits, tolerance=2, **good)
        with pytest.raises(ValueError, match="epochs must be"):
            recipe(trained, digits, **good | {"epochs": -1})
    for rate in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="rate must be a share in"):
            entropy.egp(trained, digits, rate=rate, **good)
    for rounds in (0, 1.5):
        with pytest.raises(ValueError, match="number of rounds"):
            entropy.nepenthe(trained, digits, rounds=rounds, **good)
    with pytest.raises(ValueError, match="ranking must be"):
        entropy.tlc(trained, digits, ranking="entropy", **good)
    with pytest.raises(ValueError, match="zero must be"):
        entropy.easier(trained, digits, zero="no", **good)
    assert same(before, trained)


# --- TLC ---------------------------------------------------------------------------------------


def test_tlc_ranks_by_error_likelihood_and_silences_what_is_mostly_off(digits, trained):
    (step,) = entropy.tlc(trained, digits, removals=1, epochs=0, lr=0.1)
    for name in ("3", "6", "9"):
        norm = trained[int(name) - 1]
        beta, gamma = norm.bias.detach().numpy(), norm.weight.detach().abs().numpy()
        below = stats.norm.cdf(0, beta, gamma)
        bits = [stats.entropy([p, 1 - p], base=2) for p in below]
        assert step.entropies[name] == pytest.approx(np.mean(bits), abs=1e-6)
        assert step.scores[name] == pytest.approx(np.minimum(below, 1 - below).mean(), abs=1e-6)
    (name,) = step.removed
    assert name == min(step.scores, key=step.scores.get)
    # by hand: units with a negative beta give 0, the others go through
    images = all_images(digits, "valid")
    z, _ = inputs_of(trained, images)
    norm = trained[int(name) - 1]
    assert 0 < int((norm.bias < 0).sum()) < len(norm.bias)
    after = trained[int(name) + 1 :](z[name] * (norm.bias >= 0))
    assert torch.allclose(step.model.eval()(images), after, atol=1e-5)
    layer = step.model[int(name) - 2]
    assert torch.equal(masks.masks_of(step.model)[f"{int(name) - 2}.weight"].any(1), norm.bias >= 0)
    assert bool((layer.weight[norm.bias < 0] == 0).all())


def test_tlc_without_norms_goes_by_the_statistics_of_valid(digits):
    model = mlp(64, 20, 16, 10, norms=False)
    fit(model, digits, epochs=3, lr=0.1, progress=False)
    (step,) = entropy.tlc(model, digits, removals=1, epochs=0, lr=0.1)
    images = all_images(digits, "valid")
    z, _ = inputs_of(model, images)
    for name, values in z.items():
        mean, std = values.double().mean(0).numpy(), values.double().std(0).numpy()
        expected = stats.norm.cdf(-np.abs(mean), 0, std).mean()
        assert step.scores[name] == pytest.approx(expected, abs=1e-6)
    (name,) = step.removed
    on = z[name].mean(0) >= 0
    assert not bool(on.all())
    expected = model[int(name) + 1 :](z[name] * on)
    assert torch.allclose(step.model.eval()(images), expected, atol=1e-5)


class Sum(nn.Module):
    """Logits [s, 0] with s the sum of the parts that are no activation any more."""

    def __init__(self, parts):
        super().__init__()
        self.linear = []
        self.parts = parts
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        s = sum(self.parts[name] for name in self.linear)
        return torch.tensor([[float(s), 0.0]]).expand(len(x), 2)


@pytest.mark.parametrize(
    ("parts", "going"),
    [
        # the larger, the more the loss falls: the first n that hurts goes whole
        ({"c": -0.5, "a": 2.0, "d": -10.0, "b": 1.0}, ["a", "b", "c", "d"]),
        ({"a": 2.0, "b": -3.0, "c": -4.0}, ["a", "b"]),
        # no n hurts: the best alone
        ({"a": 5.0, "b": 1.0, "c": -1.0}, ["a"]),
        # every one hurts: the best alone
        ({"a": -2.0, "b": -1.0}, ["b"]),
    ],
)
def test_the_codes_rule_for_how_many_layers_go_together(digits, parts, going):
    zeros = from_tensors(
        "zeros",
        *(
            (torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
            for _ in range(3)
        ),
        classes=("yes", "no"),
    )
    found, chosen = entropy._by_loss_gap(
        Sum(parts), zeros, list(parts), lambda model, names: model.linear.extend(names)
    )
    assert chosen == going
    for name, part in parts.items():
        assert found[name] == pytest.approx(math.log1p(math.exp(-part)) - math.log(2), abs=1e-6)


def test_tlc_by_the_gap_of_the_loss_on_the_first_batch_of_valid(digits, trained):
    (step,) = entropy.tlc(trained, digits, ranking="loss_gap", removals=1, epochs=0, lr=0.1)
    images, labels = next(iter(digits.batches("valid", 128)))
    z, outputs = inputs_of(trained, images)
    loss = nn.functional.cross_entropy
    for name, values in z.items():
        norm = trained[int(name) - 1]
        linear = trained[int(name) + 1 :](values * (norm.bias > 0))
        expected = (loss(linear, labels) - loss(outputs, labels)).item()
        assert step.scores[name] == pytest.approx(expected, abs=1e-5)
    assert set(step.removed) <= {"3", "6", "9"}
    assert step.removed[0] == min(step.scores, key=step.scores.get)


def test_channels_of_a_convolution_are_silenced_behind_a_sum_by_the_branchs_norm():
    block = models.BasicBlock(3, 3, 1).eval()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm_with(norm, seed=5)
        block.bn2.bias.copy_(torch.tensor([-1.0, 0.5, -0.2]))
    x = torch.randn(2, 3, 5, 5)
    origin = activation_states.origins(block, x)["relu2"]
    expected = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    expected = expected * torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1) + x
    removals.silence(block, origin, block.bn2.bias < 0)
    entropy.remove_activations(block, ["relu2"])
    assert torch.allclose(block(x), expected, atol=1e-6)


# --- EGP and NEPENTHE --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("name", ["egp", "nepenthe"])
def test_the_weights_of_a_round_are_those_of_the_formulas(name, rate, digits, trained):
    trained = copy.deepcopy(trained).requires_grad_(False)
    trained[7].weight.mul_(0.3)  # a layer of little importance
    there = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.4
    masks.apply(trained, {"4.weight": there})
    recipe = getattr(entropy, name)
    (step,) = recipe(trained, digits, rounds=1, rate=rate, epochs=0, lr=0.1)
    conventions = {"zero": "off", "exclude_saturated": True}
    parts = all_images(digits).split(128)
    if name == "nepenthe":
        conventions, parts = {"zero": "ignore"}, [all_images(digits)]
    layers = {"3": trained[1], "6": trained[4], "9": trained[7]}
    bits, importance, alive = {}, {}, {}
    for act, layer in layers.items():
        inputs = [inputs_of(trained, x)[0][act] for x in parts]
        values = [entropy.state_entropy(z, **conventions) for z in inputs]
        bits[act] = float(torch.stack(values).mean())
        weights = layer.weight[layer.weight != 0]
        index = str(int(act) - 2)
        importance[index] = bits[act] * float(weights.abs().mean())
        alive[index] = len(weights)
    assert step.entropies == pytest.approx(bits, abs=1e-6)
    assert step.scores == pytest.approx(importance, rel=1e-5)
    budget = rate * sum(alive.values())
    book = budgets_by_the_book(importance, alive, budget)
    kept = masks.masks_of(step.model)
    for index, share in book.items():
        weight = trained[int(index)].weight.abs()
        mask = kept[f"{index}.weight"]
        gone = int((~mask).sum()) - (weight.numel() - alive[index])
        assert abs(gone - share) < 1
        if name == "egp":
            assert gone == int(share)
        if 0 < gone < alive[index]:
            assert weight[~mask].max() <= weight[mask].min()
            assert bool((weight[mask] > 0).all())
        emptied = gone == alive[index]
        assert isinstance(step.model[int(index) + 2], nn.Identity) == emptied
        assert (str(int(index) + 2) in step.linearised) == emptied
    assert bool(step.linearised) == (rate == 0.6)
    assert step.removed == (round(budget) if name == "nepenthe" else sum(map(int, book.values())))


def test_budgets_are_exact_over_rounds_and_retraining_revives_nothing(digits, trained):
    total = sum(trained[i].weight.numel() for i in (1, 4, 7))
    alive = total
    for step in entropy.nepenthe(trained, digits, rounds=4, rate=0.5, epochs=1, lr=0.05):
        kept = masks.masks_of(step.model)
        left = {k: int(m.sum()) for k, m in kept.items()}
        acting = {f"{int(n) - 2}.weight" for n in structure.activations(step.model)}
        # the weights of layers that lost their activation are out of the game
        candidates = sum(left.get(k, 0) for k in acting)
        assert step.removed == round(0.5 * alive)
        alive = candidates
        for layer, mask in kept.items():
            weight = step.model.get_parameter(f"{layer}_orig") * mask
            assert int(weight.count_nonzero()) == left[layer]


def test_a_layer_at_zero_entropy_is_no_candidate_and_goes_only_in_nepenthe(digits, trained):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[8].weight.fill_(1e-3)
        model[8].bias.fill_(5.0)
    options = {"rounds": 1, "rate": 0.2, "epochs": 0, "lr": 0.1}
    (step,) = entropy.egp(model, digits, **options)
    assert list(step.scores) == ["1", "4"]
    assert step.linearised == ()
    (step,) = entropy.nepenthe(model, digits, **options)
    assert list(step.scores) == ["1", "4"]
    assert step.linearised == ("9",)
    assert step.removed == round(0.2 * (24 * 64 + 20 * 24))


def test_rounds_end_when_nothing_is_left_to_prune(digits, trained):
    steps = list(entropy.egp(trained, digits, rounds=5, rate=1, epochs=0, lr=0.1))
    assert len(steps) == 1
    assert steps[0].removed == sum(trained[i].weight.numel() for i in (1, 4, 7))
    assert steps[0].activations_left == 0
    assert steps[0].footprint.depth == 1


# --- the networks of the papers, narrow ----------------------------------------------------------


def narrow(name):
    from torchvision import models as zoo
    from torchvision.models import resnet, vgg

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "resnet":  # one ReLU called twice a block
            network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 10)
            network.layer2, network.layer3, network.layer4 = (nn.Identity() for _ in range(3))
            network.fc = nn.Linear(64, 10)
            return network
        if name == "vgg":
            features = vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True)
            return nn.Sequential(
                features, nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(True), nn.Linear(12, 10)
            )
        if name == "mobilenet":
            return zoo.MobileNetV2(10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]])
        return zoo.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=10)


@pytest.mark.parametrize("network", ["resnet", "vgg", "mobilenet", "swin"])
def test_every_recipe_works_on_every_kind_of_network(network):
    data = load("digits", image_size=16, channels=3).subset(train=64, valid=32, test=32)
    model = narrow(network).eval()
    before = everything(model)
    images = all_images(data, "valid")
    number = {"resnet": 3, "vgg": 4, "mobilenet": 7, "swin": 2}[network]
    for name, (recipe, chosen) in RECIPES.items():
        options = chosen | ({"rounds": 1} if "rounds" in chosen else {"removals": 1})
        (step,) = recipe(model, data, epochs=0, lr=0.1, **options)
        assert step.activations_left == number - len(step.linearised), name
        with torch.no_grad():
            difference = step.folded.eval()(images) - step.model.eval()(images)
        assert difference.abs().max() < 1e-4, name
        assert step.footprint.depth <= step.unfolded_depth
        assert step.footprint.macs <= step.unfolded_macs
        if network == "swin" and name == "easier":  # two linear layers became one, and it pays
            assert step.footprint.depth == step.unfolded_depth - 1
            assert step.footprint.macs < step.unfolded_macs
        if network == "resnet" and name == "easier":
            named = set(step.entropies)
            assert named == {"relu", "layer1.0.relu", "layer1.0.relu_1"}
    assert same(before, model)
