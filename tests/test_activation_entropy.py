"""Entropies of activations' states, their closed forms, and the recipes that go by them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from pruning101 import activation_entropy as entropy
from pruning101.core import activation_states, models, structure
from pruning101.core import state_entropy as states
from pruning101.core.data import load

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
