"""SNIP, GraSP and SynFlow against their definitions, and the masks that rounds of them make."""

import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F

from pruning101 import pruning_at_initialisation as pai
from pruning101.core import masks, models
from pruning101.core.data import load
from pruning101.core.models import BasicBlock


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp(*sizes, activation=nn.ReLU, bias=True, seed=0):
    def make():
        layers = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b, bias=bias), activation()]
        return nn.Sequential(*layers[:-1])

    return seeded(make, seed)


def convnet(seed=0):
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        seed,
    )


def images_of(n=12, channels=1, side=8, classes=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, side, side, generator=g, dtype=dtype)
    return x, torch.randint(0, classes, (n,), generator=g)


def half_masked(model, seed=0):
    masks.apply(model, masks.from_scores(pai.random_scores(model, seed=seed), 0.5))
    return model


def mean_loss(model, weights, x, y, temperature=1.0):
    """The definition once more: training mode, no dropout, the given weights."""
    rest = {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())
    work = functional_call(model, rest | weights, (x,))
    return F.cross_entropy(work / temperature, y)


@pytest.fixture(scope="module")
def digits():
    return load("digits").subset(train=256, valid=100, test=100)


SCORES = {
    "snip": lambda model: pai.snip(model, [images_of()]),
    "grasp": lambda model: pai.grasp(model, [images_of()]),
    "synflow": lambda model: pai.synflow(model, images_of()[0]),
    "random": lambda model: pai.random_scores(model, seed=0),
}


# --- SNIP and GraSP ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 11))
def test_snip_is_the_gradient_of_the_mean_loss_over_all_images(seed, cut):
    model = mlp(64, 9, 5, seed=seed)
    x, y = images_of(seed=seed)
    slopes = grad(lambda w: mean_loss(model, w, x, y))(dict(model.named_parameters()))
    found = pai.snip(model, [(x[:cut], y[:cut]), (x[cut:], y[cut:])])  # of unequal size
    assert list(found) == ["1.weight", "3.weight"]
    for name, score in found.items():
        expected = (model.get_parameter(name) * slopes[name]).abs()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-8)


def test_snip_of_the_squared_error():
    model = mlp(64, 5)
    x, y = images_of()
    w = model[1].weight
    error = (model(x) - F.one_hot(y, 5)).square().sum(1).mean()
    expected = (w * torch.autograd.grad(error, w)[0]).abs()
    torch.testing.assert_close(
        pai.snip(model, [(x, y)], loss="squared_error")["1.weight"], expected
    )


def test_snip_predicts_what_removing_a_weight_does_to_the_loss():
    model = mlp(16, 6, 5, activation=nn.Tanh).double()
    x, y = images_of(side=4, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)  # where the first order is all there is
    found = pai.snip(model, [(x, y)])
    for name, score in found.items():
        w = model.get_parameter(name).detach()
        for at in [(0, 0), (2, 3), (4, 1)]:
            less = w.clone()
            less[at] = 0
            change = mean_loss(model, {name: less}, x, y) - mean_loss(model, {name: w}, x, y)
            assert abs(change) == pytest.approx(score[at].item(), rel=1e-2)


def test_scores_are_those_of_the_first_training_step():
    """Batch norms normalise with the batch; dropout is off; running statistics have no part."""
    model = convnet()
    x, y = images_of()
    before = pai.snip(model, [(x, y)])
    weights = {n: p for n, p in model.named_parameters()}
    model[7].p = 0.0
    slopes = torch.autograd.grad(
        F.cross_entropy(functional_call(model.train(), weights, (x,)), y), list(weights.values())
    )
    for (name, w), slope in zip(weights.items(), slopes, strict=True):
        if name in before:
            torch.testing.assert_close(before[name], (w * slope).abs(), rtol=1e-4, atol=1e-8)
    model[7].p = 0.5
    model[1].running_mean.fill_(3.0)
    for name, score in pai.snip(model.eval(), [(x, y)]).items():
        assert torch.equal(score, before[name])


def flat_loss(model, names, x, y, temperature):
    shapes = [model.get_parameter(n).shape for n in names]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return mean_loss(model, weights, x, y, temperature)

    return loss, torch.cat([model.get_parameter(n).detach().flatten() for n in names])


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_w_times_hessian_times_gradient(temperature):
    model = mlp(16, 5, 4, 5, activation=nn.Tanh).double()
    x, y = images_of(side=4, dtype=torch.float64)
    found = pai.grasp(model, [(x[:5], y[:5]), (x[5:], y[5:])], temperature=temperature)
    loss, flat = flat_loss(model, list(found), x, y, temperature)
    expected = flat * (hessian(loss)(flat) @ grad(loss)(flat))
    scores = torch.cat([s.flatten() for s in found.values()])
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-14)
    assert scores.min() < 0 < scores.max()


def test_the_lowest_grasp_score_goes_where_the_gradient_grows_most():
    """By brute force: every weight removed alone, the norm of the gradient measured anew."""
    model = mlp(16, 4, 5, activation=nn.Tanh).double()
    x, y = images_of(side=4, dtype=torch.float64)
    found = pai.grasp(model, [(x, y)])
    loss, flat = flat_loss(model, list(found), x, y, 200.0)
    scores = torch.cat([s.flatten() for s in found.values()])

    def rise(step):
        """Of |gradient|^2, when each weight in turn loses the share `step` of itself."""
        norm = lambda w: grad(loss)(w).square().sum()  # noqa: E731
        lessened = flat - step * torch.diag(flat)
        return torch.stack([norm(w) for w in lessened]) - norm(flat)

    slight = rise(1e-5) / 1e-5
    torch.testing.assert_close(slight, -2 * scores, rtol=1e-3, atol=1e-6 * slight.abs().max())
    gone = rise(1.0)
    lowest, highest = scores.argsort()[:8], scores.argsort()[-8:]
    assert gone[lowest].mean() > 0 > gone[highest].mean()


def test_masked_weights_score_zero_and_have_no_part_in_grasp():
    model = half_masked(mlp(16, 5, 5, activation=nn.Tanh).double())
    x, y = images_of(side=4, dtype=torch.float64)
    gone = {name: ~kept for name, kept in masks.masks_of(model).items()}
    for name, score in pai.snip(model, [(x, y)]).items():
        assert not score[gone[name]].any()
        assert score[~gone[name]].any()
    found = pai.grasp(model, [(x, y)])
    plain = masks.clone(model)
    masks.make_permanent(plain)
    names = list(found)
    loss, flat = flat_loss(plain, names, x, y, 200.0)
    there = ~torch.cat([gone[n].flatten() for n in names])
    place = torch.eye(len(flat), dtype=torch.float64)[:, there]  # the weights that are there
    among = hessian(lambda w: loss(place @ w))(flat[there])
    slopes = grad(loss)(flat)[there]
    scores = torch.cat([s.flatten() for s in found.values()])
    torch.testing.assert_close(scores[there], flat[there] * (among @ slopes))
    assert not scores[~there].any()


# --- SynFlow -------------------------------------------------------------------------------------


def randomise(model, seed=0):
    """Biases, norms and their statistics as after training, and everything in float64."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape, generator=g))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=g))
                module.running_var.copy_(torch.rand(module.num_features, generator=g) + 0.5)
    return model.double()


@settings(deadline=None, max_examples=10)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 100))
def test_synflow_of_an_mlp_is_the_product_of_its_absolute_weights(sizes, seed):
    model = mlp(*sizes, seed=seed)
    chain = [layer.weight.detach().double().abs() for layer in model if hasattr(layer, "weight")]
    found = pai.synflow(model, torch.zeros(3, sizes[0]))
    for i, (name, score) in enumerate(found.items()):
        left, right = torch.ones(sizes[-1]).double(), torch.ones(sizes[0]).double()
        for w in chain[:i]:
            right = w @ right
        for w in reversed(chain[i + 1 :]):
            left = left @ w
        torch.testing.assert_close(score, chain[i] * torch.outer(left, right), msg=name)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.PReLU])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_synflow_is_conserved_at_every_unit_and_layer(kind, activation):
    if kind == "mlp":
        model = randomise(mlp(64, 7, 6, 5, activation=activation))
        layers = ["1.weight", "3.weight", "5.weight"]
    else:
        model = randomise(convnet())
        model[2] = activation()
        layers = ["0.weight", "4.weight", "10.weight"]
    found = pai.synflow(model, images_of()[0])
    flow = found[layers[0]].sum()
    for before, after in pairwise(layers):
        into = found[before].flatten(1).sum(1)  # [units]
        onward = found[after].unflatten(1, (len(into), -1)).transpose(0, 1).flatten(1).sum(1)
        torch.testing.assert_close(into, onward, rtol=1e-12, atol=0)
        torch.testing.assert_close(onward.sum(), flow, rtol=1e-12, atol=0)
    assert flow > 0


def test_synflow_is_conserved_across_a_residual_block():
    stem = seeded(lambda: nn.Conv2d(1, 4, 3, padding=1, bias=False))
    head = seeded(lambda: nn.Linear(6, 5))
    block = seeded(lambda: BasicBlock(4, 6, stride=2))
    model = randomise(nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
    found = {name: score.sum().item() for name, score in pai.synflow(model, images_of()[0]).items()}
    flow = found["0.weight"]
    assert found["4.weight"] == pytest.approx(flow, rel=1e-12)
    shortcut = found["1.downsample.0.weight"]
    assert found["1.conv1.weight"] + shortcut == pytest.approx(flow, rel=1e-12)
    assert found["1.conv2.weight"] + shortcut == pytest.approx(flow, rel=1e-12)
    assert 0.01 < shortcut / flow < 0.99


def test_synflow_looks_at_no_data_and_at_no_sign():
    model, (x, y) = convnet(), images_of()
    found = pai.synflow(model, [(x, y)])
    nothing = torch.full_like(x, torch.nan)
    flipped = masks.clone(model)
    with torch.no_grad():
        for p in flipped.parameters():
            p.neg_()
    for other in (pai.synflow(model, nothing), pai.synflow(flipped, x[:1])):
        for name, score in found.items():
            assert torch.equal(score, other[name])
    assert all(s.dtype == torch.float64 and (s >= 0).all() for s in found.values())


def test_synflow_of_a_deep_network_leaves_float32_far_behind():
    model = mlp(200, *[200] * 40, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    found = pai.synflow(model, torch.ones(1, 200))
    sums = torch.stack([score.sum() for score in found.values()])
    assert sums[0] > 1e39  # float32 ends at 3.4e38
    torch.testing.assert_close(sums, sums[:1].expand(41), rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "mobilenet_v2", "densenet121"])
def test_synflow_on_torchvision_models(name):
    model = models.build(f"torchvision:{name}", image_size=64)
    found = pai.synflow(model, torch.ones(1, 3, 64, 64))
    sums = {layer: score.sum().item() for layer, score in found.items()}
    flow = next(iter(sums.values()))
    chain = {
        "resnet18": ["fc.weight"],
        "vgg16_bn": list(sums),
        # expansion, depthwise and projection of blocks without a shortcut, stem and head
        "mobilenet_v2": ["features.2.conv.0.0.weight", "features.2.conv.2.weight"],
        "densenet121": ["classifier.weight"],
    }[name]
    for layer in [*chain, list(sums)[-1]]:
        assert sums[layer] == pytest.approx(flow, rel=1e-9)
    assert all(score.isfinite().all() and score.sum() > 0 for score in found.values())


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.b(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.build("vit_tiny", image_size=32),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)
        ),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), Gate()),
    ],
    ids=["vit_tiny", "group norm", "norm by the batch", "gate"],
)
def test_synflow_refuses_what_is_no_product_of_weights(make):
    with pytest.raises(ValueError, match=r"products of weights.*use snip"):
        pai.synflow(make(), torch.ones(1, 3, 32, 32))


def test_synflow_refuses_a_network_that_nothing_flows_through():
    model = mlp(64, 6, 5)
    masks.apply(model, {"1.weight": torch.zeros(6, 64, dtype=torch.bool)})
    with pytest.raises(ValueError, match="nothing flows through Sequential"):
        pai.synflow(model, torch.ones(1, 64))


# --- all scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_the_model_and_the_random_state_are_left_alone(name):
    model = half_masked(convnet())
    x, y = images_of()
    F.cross_entropy(model(x), y).backward()
    model[4].weight_orig.requires_grad_(False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    effective = model[4].weight
    random_state = torch.get_rng_state()
    found = SCORES[name](model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert model[4].weight is effective
    assert model.training
    assert [p.requires_grad for p in model[4].parameters()] == [False]
    kept = masks.masks_of(model)
    assert list(found) == list(kept) == ["0.weight", "4.weight", "10.weight"]
    for layer, score in found.items():
        assert score.shape == kept[layer].shape
        assert not score.requires_grad
        assert not score[~kept[layer]].any()
        assert score[kept[layer]].count_nonzero() > 0.5 * kept[layer].sum()


@pytest.mark.parametrize("name", SCORES)
def test_a_weight_that_layers_share_is_scored_once(name):
    model = mlp(64, 5, 5, 5)
    model[5].weight = model[3].weight
    assert list(SCORES[name](model)) == ["1.weight", "3.weight"]


def test_a_bare_layer_has_a_bare_name():
    assert list(pai.random_scores(nn.Linear(3, 2), seed=1)) == ["weight"]


def test_random_scores_are_uniform_and_seeded():
    model = mlp(64, 100, 10)
    found = torch.cat([s.flatten() for s in pai.random_scores(model, seed=3).values()])
    again = torch.cat([s.flatten() for s in pai.random_scores(model, seed=3).values()])
    other = torch.cat([s.flatten() for s in pai.random_scores(model, seed=4).values()])
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert found.min() > 0
    counts = torch.histc(found, 10, 0, 1)
    assert (counts / len(found) - 0.1).abs().max() < 0.02


def nan_model():
    model = mlp(64, 6, 5)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_what_cannot_be_scored_is_refused_in_one_sentence(name):
    score, (x, y) = getattr(pai, name), images_of()
    with pytest.raises(ValueError, match="not all finite"):
        score(nan_model(), [(x, y)])
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        score(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), [(x, y)])
    with pytest.raises(ValueError, match="held no images"):
        score(mlp(64, 5), [])
    with pytest.raises(ValueError, match=r"pairs \(images, labels\)"):
        score(mlp(64, 5), (x, y))
    normed = mlp(64, 6, 5)
    nn.utils.parametrizations.weight_norm(normed[1])
    with pytest.raises(ValueError, match="weight of '1' is computed from other parameters"):
        score(normed, [(x, y)])


def test_settings_out_of_range_are_refused():
    model, batch = mlp(64, 5), [images_of()]
    with pytest.raises(ValueError, match="loss must be one of"):
        pai.snip(model, batch, loss="hinge")
    for temperature in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be"):
            pai.grasp(model, batch, temperature=temperature)
    for wrong in (-0.1, 1.1, math.nan, "0.5"):
        with pytest.raises(ValueError, match="sparsity must be a share"):
            pai.prune_at_initialisation(model, batch, wrong)
    for rounds in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="rounds must be"):
            pai.prune_at_initialisation(model, batch, 0.5, rounds=rounds)
    with pytest.raises(ValueError, match="score must be a function or one of synflow"):
        pai.prune_at_initialisation(model, batch, 0.5, score="snap")
    with pytest.raises(ValueError, match="scope must be"):
        pai.prune_at_initialisation(model, batch, 0.5, scope="channel")
    with pytest.raises(ValueError, match=r"already make a sparsity of 0\.5"):
        pai.prune_at_initialisation(half_masked(mlp(64, 5)), batch, 0.3)


# --- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("score", ["random", "magnitude", "snip", "grasp", "synflow"])
def test_exactly_as_many_go_as_asked_and_the_model_is_left_alone(score, scope):
    model = convnet()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    found = pai.prune_at_initialisation(
        model, [images_of()], 0.77, score=score, scope=scope, rounds=5
    )
    assert list(found) == ["0.weight", "4.weight", "10.weight"]
    sizes = [mask.numel() for mask in found.values()]
    gone = [int((~mask).sum()) for mask in found.values()]
    if scope == "global":
        assert sum(gone) == round(0.77 * sum(sizes))
    else:
        assert gone == [round(0.77 * n) for n in sizes]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert masks.masks_of(model) == {}


@pytest.mark.parametrize(
    ("score", "lone"),
    [
        ("magnitude", lambda m, b: {n: p.abs() for n, p in m.named_parameters() if p.ndim > 1}),
        ("random", lambda m, b: pai.random_scores(m, seed=7)),
        ("snip", pai.snip),
        ("grasp", pai.grasp),
    ],
)
def test_by_default_all_but_synflow_take_one_round(score, lone):
    model, batch = mlp(64, 20, 5), [images_of()]
    found = pai.prune_at_initialisation(model, batch, 0.8, score=score, seed=7)
    expected = masks.from_scores(lone(model, batch), 0.8)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def by_hand(model, batches, sparsity, rounds, score, start=1.0):
    """Algorithm 1 of the SynFlow paper, with its schedule and a full sort."""
    work = masks.clone(model)
    densities = []
    for k in range(1, rounds + 1):
        found = score(work, batches)
        names = list(found)
        flat = torch.cat([found[n].double().flatten() for n in names])
        gone = [~masks.masks_of(work).get(n, torch.ones_like(found[n]).bool()) for n in names]
        flat[torch.cat([g.flatten() for g in gone])] = -math.inf
        density = start * ((1 - sparsity) / start) ** (k / rounds)
        kept = torch.ones(len(flat), dtype=torch.bool)
        kept[flat.argsort(stable=True)[: round((1 - density) * len(flat))]] = False
        parts = kept.split([found[n].numel() for n in names])
        mask = {n: p.view_as(found[n]) for n, p in zip(names, parts, strict=True)}
        masks.apply(work, mask)
        densities.append(kept.float().mean().item())
    return mask, densities


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_rounds_score_what_is_left_on_an_exponential_schedule(name, sparsity):
    model, batch, score = convnet(), [images_of()], getattr(pai, name)
    densities = []

    def watched(work, batches):
        kept = masks.masks_of(work).values()
        densities.append(sum(int(m.sum()) for m in kept) / 372 if kept else 1.0)
        return score(work, batches)

    found = pai.prune_at_initialisation(model, batch, sparsity, score=watched, rounds=6)
    expected, after = by_hand(model, batch, sparsity, 6, score)
    assert densities == pytest.approx([1.0, *after[:-1]])
    by_name = pai.prune_at_initialisation(model, batch, sparsity, score=name, rounds=6)
    for layer, mask in expected.items():
        assert torch.equal(found[layer], mask)
        assert torch.equal(by_name[layer], mask)


@pytest.mark.parametrize("name", ["magnitude", "grasp", "synflow"])
def test_masks_that_are_there_count_in_and_stay(name):
    model = half_masked(convnet())
    before = masks.masks_of(model)
    found = pai.prune_at_initialisation(model, [images_of()], 0.9, score=name, rounds=4)
    assert sum(int(mask.sum()) for mask in found.values()) == 372 - round(0.9 * 372)
    assert not any((found[n] & ~before[n]).any() for n in found)
    if name != "magnitude":
        expected, _ = by_hand(model, [images_of()], 0.9, 4, getattr(pai, name), start=0.5)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    for mask in pai.prune_at_initialisation(model, [images_of()], 0.5, score=name).values():
        assert mask.any()


def test_batches_that_can_be_read_only_once_will_do():
    model, (x, y) = mlp(64, 8, 5), images_of()
    for score in ("snip", "grasp", "synflow"):
        once = (batch for batch in [(x[:6], y[:6]), (x[6:], y[6:])])
        again = [(x[:6], y[:6]), (x[6:], y[6:])]
        found = pai.prune_at_initialisation(model, once, 0.7, score=score, rounds=3)
        expected = pai.prune_at_initialisation(model, again, 0.7, score=score, rounds=3)
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_collapsed_layers_are_those_without_a_weight():
    kept, gone = torch.tensor([True, False]), torch.tensor([False, False])
    found = {"fc1.weight": gone, "fc2.weight": kept, "fc2.bias": gone, "a.fc3.weight": gone}
    assert pai.collapsed_layers(found) == ["fc1", "a.fc3"]
    assert pai.collapsed_layers({"weight": gone}) == [""]


def test_only_synflow_in_many_rounds_survives_extreme_sparsity(digits):
    """Down to one weight a layer, the most that any method could do without collapse."""
    model = mlp(64, *[40] * 10, 10)
    batches = list(digits.batches("train", 128, shuffle=True))
    weights = 64 * 40 + 9 * 40 * 40 + 40 * 10

    def collapsed(kept, score, **options):
        sparsity = 1 - kept / weights
        found = pai.prune_at_initialisation(model, batches, sparsity, score=score, **options)
        assert sum(int(m.sum()) for m in found.values()) == kept
        return pai.collapsed_layers(found)

    for kept in (174, 17, 11):  # densities of 1e-2, 1e-3, and one weight for each of 11 layers
        assert collapsed(kept, "synflow") == []
        assert collapsed(kept, "synflow", rounds=1)
        for score in ("magnitude", "snip", "grasp"):
            assert collapsed(kept, score)
    assert collapsed(10, "synflow")


def test_a_bar_shows_on_a_terminal_only(monkeypatch):
    shown = []

    def watched(steps, what, total, **options):
        shown.append((total, options["disable"], options["leave"]))
        return steps

    monkeypatch.setattr(pai, "tqdm", watched)
    for score, terminal, progress in [
        ("snip", False, True),
        ("snip", True, True),
        ("synflow", True, True),
        ("snip", True, False),
    ]:
        monkeypatch.setattr("sys.stderr", Terminal(terminal))
        pai.prune_at_initialisation(
            mlp(64, 5), [images_of()], 0.5, score=score, rounds=3, progress=progress
        )
    assert shown == [(3, True, False), (3, False, False), (3, False, False), (3, True, False)]


class Terminal(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal
