import copy
import math
import pickle
from collections import OrderedDict
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from pruning101 import structured
from pruning101.core import channels, masks, structure
from pruning101.core.attention import NarrowAttention, heads_of
from pruning101.core.data import load
from pruning101.core.models import build
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit

models = pytest.importorskip("torchvision.models")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(size=32, batch=2, channels=3):
    return torch.randn(batch, channels, size, size, generator=generator(1))


def lively(model, seed=0):
    """Give norms statistics and parameters, and biases values, in which a mistake would show."""
    g = generator(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=g)
            module.bias.data.normal_(0.2, 0.3, generator=g)
            module.running_mean.normal_(0, 0.3, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=g)
            module.bias.data.normal_(0, 0.3, generator=g)
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_bias.data.normal_(0, 0.3, generator=g)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            module.bias.data.normal_(0, 0.2, generator=g)
        if isinstance(module, nn.Linear) and not module.weight.any():  # the head of ViT
            module.weight.data.normal_(0, 0.2, generator=g)
    return model.eval()


@pytest.fixture(scope="module")
def network():
    """Return a function that makes a torchvision, timm or own network with fixed weights."""

    def make(name):
        own = not name.startswith(("torchvision:", "timm:"))
        if own:
            return lively(build(name))
        family, inner = name.split(":")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if family == "timm":
                model = pytest.importorskip("timm").create_model(inner)
            else:
                model = models.get_model(inner)
        return lively(model)

    return make


def small_net():
    return lively(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 6, 3),
                norm1=nn.BatchNorm2d(6),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(6, 5, 3, stride=8),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(5 * 4 * 4, 7),
                relu3=nn.ReLU(),
                fc2=nn.Linear(7, 3),
            )
        )
    )


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_filter_norms_by_hand(p):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(2, 5)
    )
    norms = structured.filter_norms(model, p=p)
    assert list(norms) == ["0", "1", "2"]
    for unit in range(4):
        expected = model[0].weight[unit].detach().flatten().norm(p)
        assert math.isclose(norms["0"][unit], expected, rel_tol=1e-6)
    # What one output channel is made of is read off what an image with a single pixel gives.
    for unit in range(6):
        model[1].zero_grad()
        model[1](torch.ones(1, 4, 1, 1))[0, unit].sum().backward()
        incoming = model[1].weight[model[1].weight.grad != 0]
        assert len(incoming) == 2 * 9
        assert math.isclose(norms["1"][unit], incoming.detach().norm(p), rel_tol=1e-6)
    assert norms["2"].shape == (5,)


def test_filter_norms_of_masked_layers():
    model = small_net()
    prune.random_structured(model.conv1, "weight", amount=2, dim=0)
    norms = structured.filter_norms(model)["conv1"]
    assert int((norms == 0).sum()) == 2


def by_torch_pruning(model, x, importance):
    """Torch-Pruning's own scores, by the name of each layer that makes a group's channels."""
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    names = {m: n for n, m in model.named_modules()}
    return {
        names[item.dep.target.module]: importance(group)
        for group in graph.get_all_groups()
        for item in group
        if item.dep.target.module in names and graph.is_out_channel_pruning_fn(item.dep.handler)
    }


@pytest.mark.parametrize(
    "name", ["small", "resnet20", "vgg11_bn", pytest.param("resnet18", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("kind", "p"), [("l1", 1), ("l2", 2)])
def test_importance_is_that_of_torch_pruning(network, name, kind, p):
    tp = pytest.importorskip("torch_pruning")
    model, x = small_net() if name == "small" else network(name), images()
    kinds = [nn.modules.conv._ConvNd, nn.Linear]
    theirs = by_torch_pruning(
        model, x, tp.importance.GroupMagnitudeImportance(p=p, target_types=kinds)
    )
    groups = structure.channel_groups(model, x)
    assert len(groups) >= 3
    for group in groups:
        ours = structured.group_importance(group, model, kind=kind)
        # Bit for bit, but for the order in which more than two sums a channel are added up.
        parts = (*group.producers, *group.consumers)
        exact = sum(len(m.index) for m in parts) <= 2 * group.channels
        tolerance = 0 if exact else 1e-6
        torch.testing.assert_close(ours, theirs[group.name], rtol=tolerance, atol=0)


def test_importance_by_batch_norm_is_that_of_torch_pruning(network):
    tp = pytest.importorskip("torch_pruning")
    model, x = network("resnet20"), images()
    theirs = by_torch_pruning(model, x, tp.importance.BNScaleImportance())
    for group in structure.channel_groups(model, x):
        ours = structured.group_importance(group, model, kind="batch_norm")
        torch.testing.assert_close(ours, theirs[group.name])


def test_importance_by_brute_force():
    """Each weight is asked which channels it belongs to, one at a time."""
    model, x = small_net(), images()
    data = [(images(batch=3), torch.tensor([0, 1, 2])), (images(batch=1), torch.tensor([1]))]
    found = structured.gradients(model, data)
    flat, labels = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])
    loss = F.cross_entropy(model(flat), labels)
    by_hand = dict(
        zip(
            (n for n, _ in model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[name], gradient)
    (group,) = structure.channel_groups(model, x, layers=["conv2"])
    rows, columns = model.conv2.weight, model.fc1.weight
    products = [
        (w * by_hand[n]).abs() for w, n in ((rows, "conv2.weight"), (columns, "fc1.weight"))
    ]
    own = [slice(16 * c, 16 * c + 16) for c in range(5)]
    one, two = products
    each = {
        "taylor": [(one[c].sum() + two[:, own[c]].sum()) / 2 for c in range(5)],
        "linf": [(rows[c].abs().max() + columns[:, own[c]].abs().max()) / 2 for c in range(5)],
        "l2": [(rows[c] ** 2).sum() / 2 + (columns[:, own[c]] ** 2).sum() / 2 for c in range(5)],
    }
    for kind, expected in each.items():
        expected = torch.stack(expected).detach()
        ours = structured.group_importance(
            group, model, kind=kind, gradients=by_hand, normalise=False
        )
        torch.testing.assert_close(ours, expected)
        ours = structured.group_importance(group, model, kind=kind, gradients=by_hand)
        torch.testing.assert_close(ours, expected / expected.mean())
    most = structured.group_importance(group, model, reduce="max", normalise=False)
    both = [
        torch.stack([w[c].abs().sum() for c in range(5)])
        for w in (rows, columns.unflatten(1, (5, 16)).transpose(0, 1))
    ]
    torch.testing.assert_close(most, torch.maximum(*both).detach())


def test_gradients_leave_the_model_alone_and_see_frozen_weights():
    model = small_net().requires_grad_(False).train()
    state = copy.deepcopy(model.state_dict())
    found = structured.gradients(model, [(images(), torch.tensor([0, 1]))])
    assert all(bool((g != 0).any()) for g in found.values())
    assert model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no batches"):
        structured.gradients(model, [])


def test_importance_at_random_and_what_is_refused():
    model = small_net()
    groups = structure.channel_groups(model, images())
    state = torch.get_rng_state()
    one = [structured.group_importance(g, model, kind="random", seed=3) for g in groups]
    two = [structured.group_importance(g, model, kind="random", seed=3) for g in groups]
    other = structured.group_importance(groups[0], model, kind="random", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other)
    assert not torch.equal(one[0][:5], one[1][:5])
    with pytest.raises(ValueError, match="'conv2' has what kind='batch_norm' looks at"):
        structured.group_importance(groups[1], model, kind="batch_norm")
    with pytest.raises(ValueError, match="needs gradients"):
        structured.group_importance(groups[0], model, kind="taylor")
    with pytest.raises(ValueError, match="kind must be"):
        structured.group_importance(groups[0], model, kind="l3")
    with pytest.raises(ValueError, match="reduce must be"):
        structured.group_importance(groups[0], model, reduce="median")


# --- surgery ----------------------------------------------------------------------------------


def silenced(model, groups, kept):
    """The dense network with the channels that went at zero where they are made."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[kept[group.name]] = False
            for member in (*group.producers, *group.others):
                chosen = member.index[gone[member.channel]]
                module = model.get_submodule(member.layer)
                module.weight.index_fill_(member.axis, chosen, 0)
                if module.bias is not None:
                    module.bias.index_fill_(0, chosen, 0)
    return model


ZOO = [
    ("resnet20", 32),
    ("mobilenet_v2", 32),
    pytest.param("vgg16_bn", 32, marks=pytest.mark.slow),
    pytest.param("torchvision:resnet18", 64, marks=pytest.mark.slow),
    pytest.param("torchvision:resnet50", 64, marks=pytest.mark.slow),
    pytest.param("torchvision:vgg16_bn", 32, marks=pytest.mark.slow),
    pytest.param("torchvision:densenet121", 64, marks=pytest.mark.slow),
    pytest.param("torchvision:efficientnet_b0", 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size"), ZOO)
@pytest.mark.parametrize("scope", ["group", "global"])
@torch.no_grad()
def test_pruned_equals_the_same_channels_zeroed(network, name, size, scope):
    model, x = network(name), images(size)
    groups = structure.channel_groups(model, x)
    dense = model(x)
    scores = partial(structured.group_importance, kind="random", seed=1)
    pruned = structured.prune_channels(model, x, 0.3, scores=scores, scope=scope, inplace=False)
    expected = silenced(model, groups, pruned.kept)(x)
    scale = expected.abs().max()
    assert (dense - expected).abs().max() > 0.05 * scale  # the test has power
    assert (pruned.model(x) - expected).abs().max() <= 1e-5 * scale
    sizes = {g.name: g.channels for g in groups}
    if scope == "group":
        assert pruned.removed == {n: round(0.3 * size) for n, size in sizes.items()}
    else:
        assert sum(pruned.removed.values()) == round(0.3 * sum(sizes.values()))
    assert {n: len(k) + pruned.removed[n] for n, k in pruned.kept.items()} == sizes
    assert torch.equal(model(x), dense)
    # Every convolution and linear layer is in a group or has a reason.
    inside = {m.layer for g in groups for m in (*g.producers, *g.others)}
    assert inside | set(pruned.skipped) >= set(structure.prunable(model))


def by_position(group, model):
    """The higher the position, the more important: what goes is then known without scoring."""
    return torch.arange(group.channels, dtype=torch.float)


def test_counts_are_exact_and_ties_go_by_position():
    model = small_net()
    flat = {"conv1": torch.zeros(6), "conv2": torch.ones(5), "fc1": torch.tensor([1.0] * 6 + [0.5])}
    pruned = structured.prune_channels(model, images(), 0.5, scores=flat)
    assert pruned.model is model
    assert pruned.removed == {"conv1": 3, "conv2": 2, "fc1": 4}  # halves to the even number
    kept = {name: k.tolist() for name, k in pruned.kept.items()}
    assert kept == {"conv1": [3, 4, 5], "conv2": [2, 3, 4], "fc1": [3, 4, 5]}
    assert list(pruned.skipped) == ["fc2"]
    assert "output" in pruned.skipped["fc2"]
    assert (model.conv1.out_channels, model.fc1.in_features, model.fc2.in_features) == (3, 48, 3)
    nothing = structured.prune_channels(model, images(), 0.0)
    assert nothing.removed == {"conv1": 0, "conv2": 0, "fc1": 0}


def test_one_sparsity_a_group_and_restricting_the_layers():
    model = small_net()
    pruned = structured.prune_channels(
        model, images(), {"conv2": 0.4}, scores=by_position, inplace=False
    )
    assert pruned.removed == {"conv1": 0, "conv2": 2, "fc1": 0}
    pruned = structured.prune_channels(model, images(), 0.5, layers=["fc1"], scores=by_position)
    assert pruned.removed == {"fc1": 4}
    assert model.conv1.out_channels == 6


def test_the_last_channel_of_a_group_stays_and_this_is_said():
    model = small_net()
    pruned = structured.prune_channels(model, images(), 0.95, scores=by_position, inplace=False)
    assert pruned.removed == {"conv1": 5, "conv2": 4, "fc1": 6}
    assert [k.tolist() for k in pruned.kept.values()] == [[5], [4], [6]]
    assert all("cannot lose its last" in pruned.skipped[n] for n in pruned.kept)
    low = {"conv1": torch.full((6,), 0.1), "conv2": torch.ones(5), "fc1": torch.ones(7)}
    pruned = structured.prune_channels(
        model, images(), 0.5, scores=low, scope="global", inplace=False
    )
    assert pruned.removed == {"conv1": 5, "conv2": 4, "fc1": 0}  # round(0.5 * 18), one from afar
    assert pruned.kept["conv1"].tolist() == [5]
    assert set(pruned.skipped) == {"conv1", "fc2"}
    pruned = structured.prune_channels(model, images(), 15 / 18, scope="global", inplace=False)
    assert pruned.removed == {"conv1": 5, "conv2": 4, "fc1": 6}


class Rigid(nn.Module):
    """A ``view`` with a number written into it: nothing before it can shrink."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.c(self.a(x)).mean((2, 3)).view(-1, 6))


def masked_net():
    model = small_net()
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    return model


class NoGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.from_numpy(self.a(x).detach().numpy())


NO_GRAPH = NoGraph()
GROUPED = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
ALL = {"conv1": torch.ones(6), "conv2": torch.ones(5), "fc1": torch.ones(7)}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small_net(), {"sparsity": 1}, "a group cannot lose its last"),
        (small_net(), {"sparsity": math.nan}, "sparsity must be a share"),
        (small_net(), {"sparsity": {"conv1": 1.0}}, "sparsity must be a share"),
        (small_net(), {"sparsity": {"conv9": 0.5}}, "'conv9' is no group"),
        (small_net(), {"sparsity": {"conv1": 0.5}, "scope": "global"}, 'needs scope="group"'),
        (small_net(), {"sparsity": 0.9, "scope": "global"}, "16 of 18 channels, but each of the 3"),
        (small_net(), {"scope": "layer"}, "scope must be"),
        (small_net(), {"layers": ["conv9"]}, "no convolution or linear layer 'conv9'"),
        (
            small_net(),
            {"layers": ["conv1", "fc2"]},
            "'fc2' cannot be pruned. .*the network's output",
        ),
        (small_net(), {"scores": {"conv1": torch.ones(6)}}, "no scores for the group 'conv2'"),
        (small_net(), {"scores": ALL | {"fc2": torch.ones(3)}}, "'fc2' is no group"),
        (small_net(), {"scores": ALL | {"fc1": torch.ones(6)}}, "shape .6,., but it has 7"),
        (small_net(), {"scores": ALL | {"fc1": torch.full((7,), math.nan)}}, "'fc1' contain NaN"),
        (masked_net(), {}, "'conv2' is masked"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), {}, "'0' cannot be pruned"),
        (GROUPED, {}, "grouped convolution '1'"),
        (nn.Sequential(nn.ReLU()), {}, "no channels that could be pruned"),
        (NO_GRAPH, {}, "'a' cannot be pruned. .*not on the way from input to output"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), {}, "cannot be traced"),
        (Rigid(), {}, "2 groups cannot be removed, .*nothing was changed"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(model, options, message):
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    text = repr(model)
    with pytest.raises(ValueError, match=message):
        structured.prune_channels(model, images(), **({"sparsity": 0.5} | options))
    assert repr(model) == text
    assert all(
        p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters()
    )


def test_a_frozen_model_is_pruned_and_stays_frozen():
    model = small_net().requires_grad_(False)
    pruned = structured.prune_channels(model, images(), 0.5)
    assert pruned.removed == {"conv1": 3, "conv2": 2, "fc1": 4}
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_are_cut_along_and_the_copy_shares_nothing():
    model = small_net()
    model(images()).sum().backward()
    gradient = model.conv2.weight.grad.clone()
    copied = structured.prune_channels(model, images(), 0.5, scores=by_position, inplace=False)
    copied.model(images()).sum().backward()
    assert torch.equal(model.conv2.weight.grad, gradient)
    assert model.conv2.weight.shape == (5, 6, 3, 3)
    pruned = structured.prune_channels(model, images(), 0.5, scores=by_position)
    kept = model.conv2.weight.grad
    assert torch.equal(kept, gradient[pruned.kept["conv2"]][:, pruned.kept["conv1"]])


class Halves(nn.Module):
    """Units that are added to one another in pairs, so that none can go alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(5, 2)

    def forward(self, x):
        one, two = self.b(self.a(x).relu()).chunk(2, 1)
        return self.c(one + two)


def test_channels_that_meet_one_another_stay():
    model, x = Halves(), torch.randn(4, 6, generator=generator())
    pruned = structured.prune_channels(model, x, 0.5)
    assert pruned.removed == {"a": 4}
    assert "several of them meet in one place" in pruned.skipped["b"]


class Merging(nn.Module):
    """Neighbouring tokens become one of twice the width (as between the stages of Swin)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 8)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x):  # [B, 4, 6]
        return self.head(self.norm(self.down(self.up(x).relu()).reshape(-1, 2, 16)))


def test_channels_whose_number_changes_on_the_way_stay():
    pruned = structured.prune_channels(Merging(), torch.randn(2, 4, 6), 1 / 3)
    assert pruned.removed == {"up": 3}
    assert "on the way to 'norm' 8 of them become 16" in pruned.skipped["down"]


class Joined(nn.Module):
    """Two layers whose channels lie one after the other for a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 2, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def test_importance_after_a_concatenation():
    model = Joined()
    one, two = structure.channel_groups(model, images())
    for group, layer, columns in ((one, model.a, slice(0, 4)), (two, model.b, slice(4, 9))):
        own = layer.weight.detach().abs().flatten(1).sum(1)
        read = model.c.weight.detach()[:, columns].abs().flatten(2).sum(2).sum(0)
        ours = structured.group_importance(group, model, normalise=False)
        torch.testing.assert_close(ours, (own + read) / 2)


class Beside(nn.Module):
    """A first layer that is added to the input, and attention before a view that cannot shrink."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.embed, self.attention = (
            nn.Linear(8, 12),
            nn.MultiheadAttention(12, 2, batch_first=True),
        )
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.embed(x + self.down(self.up(x).relu()))
        return self.head(self.attention(x, x, x)[0].reshape(-1, 3, 12))


def test_what_is_added_to_the_input_stays():
    model, x = Beside(), torch.randn(2, 3, 8, generator=generator())
    pruned = structured.prune_channels(model, x, 0.5, layers=["up", "attention"], inplace=False)
    assert pruned.removed == {"up": 10, "attention": 1}
    with pytest.raises(ValueError, match=r"'down' cannot be pruned\. .*meet the network's input"):
        structured.prune_channels(model, x, 0.5, layers=["down"])


def test_attention_is_put_back_when_something_else_cannot_go():
    model, x = Beside(), torch.randn(2, 3, 8, generator=generator())
    attention, before = model.attention, copy.deepcopy(model.state_dict())
    expected = model(x)
    with pytest.raises(ValueError, match="nothing was changed; restrict the layers"):
        structured.prune_channels(model, x, 0.5)
    assert model.attention is attention
    assert (attention.embed_dim, attention.num_heads, model.up.out_features) == (12, 2, 20)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_grouped_convolutions_are_skipped_with_a_reason():
    model = lively(
        nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(3, 8, 1),
                grouped=nn.Conv2d(8, 8, 3, groups=2),
                free=nn.Conv2d(8, 6, 1),
                flatten=nn.Flatten(),
                head=nn.Linear(6 * 30 * 30, 4),
            )
        )
    )
    pruned = structured.prune_channels(model, images(), 0.5)
    assert pruned.removed == {"free": 3}
    assert set(pruned.skipped) == {"stem", "grouped", "head"}
    assert "grouped convolution 'grouped'" in pruned.skipped["stem"]


# --- attention --------------------------------------------------------------------------------


def heads_silenced(model, kept):
    """The dense network with what the other heads give at zero, worked out without the groups."""
    model = copy.deepcopy(model)
    for name, heads in kept.items():
        module = model.get_submodule(name)
        out = module.out_proj if isinstance(module, nn.MultiheadAttention) else module.proj
        number = module.num_heads if hasattr(module, "num_heads") else module.heads
        each = out.in_features // number
        for head in set(range(number)) - set(heads.tolist()):
            out.weight.data[:, head * each : (head + 1) * each] = 0
    return model


class Stack(nn.Module):
    """Two blocks of torchvision's ViT, at a size that runs at once."""

    def __init__(self):
        super().__init__()
        self.vit = models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=40
        )

    def forward(self, x):
        return self.vit(x)


def small_vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stack()
    generator_ = generator(5)
    model.vit.heads.head.weight.data.normal_(0, 0.2, generator=generator_)
    return lively(model)


VITS = [
    ("small", 32),
    ("vit_tiny", 32),
    pytest.param("timm:vit_tiny_patch16_224", 224, marks=pytest.mark.slow),
    pytest.param("torchvision:vit_b_16", 224, marks=pytest.mark.slow),
]


def transformer(network, name):
    model = small_vit() if name == "small" else network(name)
    if name == "vit_tiny":
        model.blocks = model.blocks[:2]
    for module in model.modules():  # attention that looks somewhere, so that heads matter
        if heads_of(module) is not None:
            for parameter in module.parameters():
                parameter.data.mul_(2)
    return model


@pytest.mark.parametrize(("name", "size"), VITS)
@torch.no_grad()
def test_heads_go_as_wholes(network, name, size):
    model, x = transformer(network, name), images(size)
    dense = model(x)
    attention = [n for n, m in model.named_modules() if heads_of(m) is not None]
    number = heads_of(model.get_submodule(attention[0])).number
    score = partial(structured.group_importance, kind="random", seed=2)
    pruned = structured.prune_channels(
        model, x, 1 / number, layers=attention, scores=score, inplace=False
    )
    assert pruned.removed == dict.fromkeys(attention, 1)
    expected = heads_silenced(model, pruned.kept)(x)
    scale = expected.abs().max()
    assert (dense - expected).abs().max() > 1e-3 * scale
    assert (pruned.model(x) - expected).abs().max() <= 1e-5 * scale
    # Once more, on what the first time left behind.
    again = structured.prune_channels(pruned.model, x, 1 / (number - 1), layers=attention)
    assert again.removed == dict.fromkeys(attention, 1)
    assert again.model(x).shape == dense.shape


@pytest.mark.parametrize(("name", "size"), VITS)
@torch.no_grad()
def test_hidden_units_of_transformers(network, name, size):
    model, x = transformer(network, name), images(size)
    dense = model(x)
    groups = structure.channel_groups(model, x)
    inner = [g for g in groups if len(g.producers) == 1 and g.others == ()]
    assert len(inner) * 2 + 1 == len(groups)  # MLPs, heads and the stream
    pruned = structured.prune_channels(model, x, 0.5, layers=[g.name for g in inner], inplace=False)
    expected = silenced(model, inner, pruned.kept)(x)
    scale = expected.abs().max()
    assert (dense - expected).abs().max() > 1e-3 * scale
    assert (pruned.model(x) - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(("name", "size"), VITS)
def test_the_stream_of_transformers_runs_on_and_trains(network, name, size):
    model, x = transformer(network, name), images(size)
    pruned = structured.prune_channels(model, x, 0.5, inplace=False)
    (stream,) = [n for n, k in pruned.kept.items() if "conv_proj" in n or "patch_embed" in n]
    width = len(pruned.kept[stream])
    assert pruned.removed[stream] == model.get_submodule(stream).out_channels - width > 0
    norms = [m for m in pruned.model.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.normalized_shape for m in norms} == {(width,)}
    assert len(pruned.skipped) == 1  # the classifier
    result = pruned.model(x)
    assert result.shape == model(x).shape
    assert bool(result.isfinite().all())
    result.sum().backward()
    assert all(p.grad is not None for p in pruned.model.parameters())
    reloaded = pickle.loads(pickle.dumps(pruned.model))
    torch.testing.assert_close(reloaded(x), result)


@torch.no_grad()
def test_the_stream_by_hand():
    """With the norms taken away, a ViT's embedding can be silenced, too."""
    model, x = small_vit(), images()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, nn.Identity())
    model.vit.conv_proj.weight.mul_(0.3)
    groups = structure.channel_groups(model, x)
    (stream,) = [g for g in groups if g.name == "vit.conv_proj"]
    assert {m.layer for m in stream.others} == {"vit.class_token", "vit.encoder.pos_embedding"}
    pruned = structured.prune_channels(model, x, 0.25, layers=["vit.conv_proj"], inplace=False)
    expected = copy.deepcopy(model)
    gone = sorted(set(range(24)) - set(pruned.kept["vit.conv_proj"].tolist()))
    for tensor in (expected.vit.class_token, expected.vit.encoder.pos_embedding):
        tensor[..., gone] = 0
    makers = [expected.vit.conv_proj]
    for layer in expected.vit.encoder.layers:
        makers += [layer.self_attention.out_proj, layer.mlp[3]]
    for maker in makers:
        maker.weight[gone] = 0
        maker.bias[gone] = 0
    dense, expected = model(x), expected(x)
    assert (dense - expected).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(pruned.model(x), expected, rtol=1e-4, atol=1e-5)
    assert pruned.model.vit.hidden_dim == 18
    assert model.vit.hidden_dim == 24


def test_parts_of_attention_are_named_by_the_whole():
    model = small_vit()
    with pytest.raises(ValueError, match=r"name the attention itself, 'vit.encoder.layers"):
        structured.prune_channels(
            model,
            images(),
            0.5,
            layers=["vit.encoder.layers.encoder_layer_0.self_attention.out_proj"],
        )
    name = "vit.encoder.layers.encoder_layer_0.self_attention"
    structure.remove_channels(model, name, [1, 3], images())
    assert model.get_submodule(name).num_heads == 2
    with pytest.raises(ValueError, match="has units 0 to 1, got 2"):
        structure.remove_channels(model, name, [2], images())
    with pytest.raises(ValueError, match="All 2 units"):
        structure.remove_channels(model, name, [0, 1], images())


ARGUMENTS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
    {"attn_mask": torch.linspace(-1, 1, 8 * 25).view(8, 5, 5)},
    {"key_padding_mask": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()},
    {
        "attn_mask": torch.zeros(5, 5),
        "key_padding_mask": torch.tensor([[0.0, -1, 0, 0, 1], [0, 0, 0, 2, 1]]),
        "need_weights": False,
    },
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_narrow_attention_is_multihead_attention(batch_first, bias):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.MultiheadAttention(12, 4, bias=bias, batch_first=batch_first)
    dense = lively(dense) if bias else dense.eval()
    same = NarrowAttention.like(dense)
    assert list(same.state_dict()) == list(dense.state_dict())
    assert all(a is b for a, b in zip(same.parameters(), dense.parameters(), strict=True))
    assert not same.training
    scripted = torch.jit.script(copy.deepcopy(same))
    x, y = (
        torch.randn(2, 5, 12, generator=generator(1)),
        torch.randn(2, 5, 12, generator=generator(2)),
    )
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    for inputs in ((x, x, x), (x, y, y), (x, y, x)):
        for options in ARGUMENTS:
            expected, looked = dense(*inputs, **options)
            for module in (same, scripted):
                result, weights = module(*inputs, **options)
                torch.testing.assert_close(result, expected)
                assert (weights is None) == (looked is None)
                if weights is not None:
                    torch.testing.assert_close(weights, looked)
    one = x[0] if batch_first else x[:, 0]
    mask = torch.tensor([False, True, False, False, True])
    for ours, theirs in zip(
        same(one, one, one, key_padding_mask=mask), dense(one, one, one, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="pass the mask itself"):
        same(x, x, x, is_causal=True)


def test_a_pruned_encoder_layer_of_torch_keeps_off_the_kernel_for_whole_attention():
    """That kernel is taken in eval mode without gradients, and assumes heads * d = embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
    model = lively(nn.Sequential(layer, nn.Linear(16, 3)))
    x = torch.randn(2, 5, 16, generator=generator())
    with torch.no_grad():
        pruned = structured.prune_channels(
            model, x, 0.5, layers=["0.self_attn"], scores=by_position, inplace=False
        )
        expected = heads_silenced(model, pruned.kept)(x)
        torch.testing.assert_close(pruned.model(x), expected, rtol=1e-5, atol=1e-6)


def test_attention_of_a_kind_unknown_is_left_alone():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Linear(4, 12), nn.Linear(12, 10)
            self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12)
            self.out = nn.Linear(12, 2)

        def forward(self, x):
            x = self.inner(self.embed(x).relu())
            q, k, v = (
                p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
            )
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    pruned = structured.prune_channels(Other(), torch.randn(2, 5, 4), 0.5)
    assert pruned.removed == {"embed": 6, "inner": 5}
    assert all("product of activations" in pruned.skipped[n] for n in "qkv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "groups"),
    [("torchvision:swin_t", 12), ("timm:swin_tiny_patch4_window7_224", 13)],
)
@torch.no_grad()
def test_swin_loses_hidden_units_and_says_what_stays(network, name, groups):
    model, x = network(name), images(224, batch=1)
    dense, found = model(x), structure.channel_groups(model, x)
    hidden = [g for g in found if ".mlp." in g.name]
    assert (len(hidden), len(found)) == (12, groups)  # and timm's last stage, which nothing splits
    pruned = structured.prune_channels(
        model, x, 0.5, layers=[g.name for g in hidden], inplace=False
    )
    expected = silenced(model, hidden, pruned.kept)(x)
    assert (dense - expected).abs().max() > 1e-2 * expected.abs().max()
    assert (pruned.model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    skipped = structured.prune_channels(model, x, 0.5).skipped
    assert all(any(word in n for n in skipped) for word in ("qkv", "attn.proj", "head"))


@pytest.mark.slow
@torch.no_grad()
def test_convnext(network):
    model, x = network("torchvision:convnext_tiny"), images(64)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.fill_(0.5)  # near zero as made, which hides the blocks
    dense, groups = model(x), structure.channel_groups(model, x)
    hidden = [g for g in groups if len(g.producers) == 1]
    assert (len(hidden), len(groups)) == (18, 22)
    pruned = structured.prune_channels(
        model, x, 0.5, layers=[g.name for g in hidden], inplace=False
    )
    expected = silenced(model, hidden, pruned.kept)(x)
    assert (dense - expected).abs().max() > 1e-2 * expected.abs().max()
    assert (pruned.model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    whole = structured.prune_channels(model, x, 0.5)
    assert len(whole.removed) == 22
    assert whole.model(x).shape == dense.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext50_32x4d", "regnet_y_400mf"])
def test_networks_with_grouped_convolutions(network, name):
    model, x = network(f"torchvision:{name}"), images(64)
    pruned = structured.prune_channels(model, x, 0.5)
    assert sum(pruned.removed.values()) > 0
    assert sum("grouped convolution" in reason for reason in pruned.skipped.values()) > 30
    assert pruned.model(x).shape == (2, 1000)
    with pytest.raises(ValueError, match="cannot be traced"):
        structured.prune_channels(network("torchvision:shufflenet_v2_x1_0"), x, 0.5)


# --- two of four ------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("shape", [(3, 8), (2, 7), (2, 5, 3, 2), (1, 3, 2, 2)])
def test_semi_structured_by_brute_force(shape, keep, group):
    scores = torch.randint(0, 4, shape, generator=generator()).float()  # with ties
    mask = structured.semi_structured({"w": scores}, keep=keep, group=group)["w"]
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    rows, kept = scores.movedim(1, -1).flatten(0, -2), mask.movedim(1, -1).flatten(0, -2)
    for row, stays in zip(rows.tolist(), kept.tolist(), strict=True):
        for start in range(0, len(row), group):
            values, chosen = row[start : start + group], stays[start : start + group]
            n = min(keep, len(values))
            # Of all ways to keep n: the most score, then the highest positions.
            best = max(
                combinations(range(len(values)), n), key=lambda c: (sorted(values[i] for i in c), c)
            )
            assert [i for i, stay in enumerate(chosen) if stay] == list(best)


def test_semi_structured_masks_hold_and_nonsense_is_refused():
    model = build("lenet_300_100", in_channels=1, image_size=8)
    found = structured.semi_structured({"fc1.weight": model.fc1.weight.abs()})
    masks.apply(model, found)
    assert masks.sparsity(model.fc1) == 0.5
    for options in ({"keep": 0}, {"keep": 5}):
        with pytest.raises(ValueError, match="keep must be"):
            structured.semi_structured({"w": torch.ones(2, 4)}, **options)
    with pytest.raises(ValueError, match="'b' has no input dimension"):
        structured.semi_structured({"b": torch.ones(4)})
    with pytest.raises(ValueError, match="'w' has NaN"):
        structured.semi_structured({"w": torch.full((2, 4), math.nan)})


def test_without_a_gpu_for_it_compressed_weights_are_refused():
    model = nn.Linear(64, 32)
    masks.apply(model, structured.semi_structured({"weight": model.weight.abs()}))
    with pytest.raises(
        ValueError, match=r"compute capability 8\.0 or more, and the model is on 'cpu'"
    ):
        structured.to_semi_structured(model)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="there is no NVIDIA GPU with sparse tensor cores here",
)
def test_compressed_weights_compute_the_same():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).cuda().half()
    masks.apply(model, structured.semi_structured({"0.weight": model[0].weight.abs()}))
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    compressed = structured.to_semi_structured(model)
    assert compressed[0].weight.is_sparse or "Sparse" in type(compressed[0].weight).__name__
    torch.testing.assert_close(compressed(x), model(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="No linear layer is 2:4"):
        structured.to_semi_structured(nn.Linear(8, 8).cuda().half())


# --- the recipe -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    data = load("digits").subset(train=400, valid=150, test=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(12 * 16, 30), nn.ReLU(), nn.Linear(30, 10))
    fit(model, data, epochs=12, lr=0.1, progress=False)
    return model, data


def counts(model, data):
    image, _ = next(iter(data.batches("valid", 1)))
    return {g.name: g.channels for g in structure.channel_groups(model, image)}


@pytest.mark.parametrize("scope", ["group", "global"])
def test_pruning_in_rounds(trained, scope):
    model, data = trained
    start, state = counts(model, data), copy.deepcopy(model.state_dict())
    steps = list(
        structured.prune_iteratively(
            model, data, sparsity=0.6, rounds=3, scope=scope, epochs=1, lr=0.02
        )
    )
    gone = dict.fromkeys(start, 0)
    for index, step in enumerate(steps, start=1):
        for name, n in step.removed.items():
            gone[name] += n
        share = 1 - 0.4 ** (index / 3)
        if scope == "group":
            assert gone == {name: round(share * n) for name, n in start.items()}
        else:
            assert sum(gone.values()) == round(share * sum(start.values()))
        assert counts(step.model, data) == {name: n - gone[name] for name, n in start.items()}
        assert step.index == index
        assert step.accuracy == evaluate(step.model, data, "valid").accuracy
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    sizes = [step.footprint.parameters for step in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert steps[-1].accuracy > 0.5


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(trained, tmp_path):
    model, data = trained
    options = {"sparsity": 0.6, "rounds": 2, "epochs": 1, "lr": 0.02, "seed": 5}
    options["scores"] = partial(structured.group_importance, kind="l2")
    whole = list(structured.prune_iteratively(model, data, **options))
    first = structured.prune_iteratively(model, data, history=History.resume(tmp_path), **options)
    next(first)
    history = History.resume(tmp_path)
    rest = list(structured.prune_iteratively(model, data, history=history, **options))
    assert [step.index for step in rest] == [2]
    assert [step.removed for step in history] == [step.removed for step in whole]
    states = whole[-1].model.state_dict(), rest[-1].model.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for change in ({"sparsity": 0.5}, {"scores": structured.group_importance}, {"seed": 6}):
        with pytest.raises(ValueError, match="begun with"):
            structured.prune_iteratively(model, data, history=history, **(options | change))


def test_what_a_recipe_cannot_do_is_said_before_any_work(trained):
    model, data = trained
    for options, message in (
        ({"rounds": 0}, "rounds must be"),
        ({"sparsity": 1.0}, "a group cannot lose its last"),
        ({"layers": ["conv9"]}, "no convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            structured.prune_iteratively(model, data, **options)


def test_pruning_leaves_nothing_behind_in_torch_pruning():
    """Its pruners keep their default dictionaries from call to call; ours uses none of them."""
    import inspect

    tp = pytest.importorskip("torch_pruning")
    structured.prune_channels(small_net(), images(), 0.5)
    kept = inspect.signature(tp.pruner.BasePruner.__init__).parameters.values()
    assert [p.default for p in kept if isinstance(p.default, dict)] == [{}] * 4
    modules = {id(m) for m in tp.pruner.function.PrunerBox.values()}
    assert len(modules) == len(tp.pruner.function.PrunerBox)


def test_names_are_those_of_the_parts():
    assert channels.ChannelGroup is structured.ChannelGroup
    groups = structure.channel_groups(small_vit(), images())
    heads = [g for g in groups if any(m.role == "heads" for m in g.others)]
    assert [g.name.rpartition(".")[2] for g in heads] == ["self_attention"] * 2
    (given,), (read,) = heads[0].producers, heads[0].consumers
    assert (given.role, given.axis, len(given.index)) == ("out", 0, 72)
    assert (read.role, read.axis, len(read.index)) == ("in", 1, 24)
    assert given.channel.view(3, 4, 6).tolist() == [[[h] * 6 for h in range(4)]] * 3
