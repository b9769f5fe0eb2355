import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from pruning101.core import structure
from pruning101.core.models import build

models = pytest.importorskip("torchvision.models")


@pytest.fixture(scope="module")
def network():
    """Return a function that makes a torchvision or timm network once, with fixed weights."""
    made = {}

    def make(name):
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                if name.startswith("timm:"):
                    model = pytest.importorskip("timm").create_model(name.removeprefix("timm:"))
                else:
                    model = models.get_model(name)
            made[name] = model.eval()
        return made[name]

    return make


def example(size=64, batch=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _mlp()


def _mlp():
    layers = [("fc1", nn.Linear(6, 8)), ("relu1", nn.ReLU()), ("fc2", nn.Linear(8, 7))]
    layers += [("norm2", nn.BatchNorm1d(7)), ("relu2", nn.ReLU()), ("fc3", nn.Linear(7, 3))]
    return nn.Sequential(OrderedDict(layers))


# --- layers -----------------------------------------------------------------------------------


def test_prunable_and_activations():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 1, 1),
            "up": nn.ConvTranspose1d(1, 1, 1),
            "norm": nn.BatchNorm2d(1),
            "attention": nn.MultiheadAttention(4, 2),
            "body": nn.Sequential(nn.PReLU(), nn.Linear(1, 1), nn.GELU(), nn.Softmax(dim=1)),
        }
    )
    model["again"] = model["conv"]
    prune.identity(model["body"][1], "weight")
    assert list(structure.prunable(model)) == ["conv", "up", "attention.out_proj", "body.1"]
    assert structure.prunable(model)["body.1"] is model["body"][1]
    assert list(structure.activations(model)) == ["body.0", "body.2"]


# --- chains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_a_sequence_is_one_chain(inplace):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.Identity(),
        nn.Dropout(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 31 * 31, 5),
    )
    assert structure.linear_chains(model, example()) == [list("01234567")]


class Wiring(nn.Module):
    """Small layers and a ``forward`` given from outside."""

    def __init__(self, wire, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


def chains(wire, **layers):
    layers = layers or {name: nn.Linear(4, 4) for name in "abcd"}
    return structure.linear_chains(Wiring(wire, **layers), torch.randn(2, 4))


def test_a_value_read_twice_ends_the_chain():
    def wire(m, x):
        x = m.b(m.a(x))
        return m.d(m.c(x)) + x

    assert chains(wire) == [["a", "b"], ["c", "d"]]


def test_a_skip_past_a_module_that_hands_its_input_on_is_seen():
    def wire(m, x):
        x = m.a(x)
        return m.c(m.b(x)) + x

    layers = {"a": nn.Linear(4, 4), "b": nn.Identity(), "c": nn.Linear(4, 4)}
    assert chains(wire, **layers) == [["a"], ["b", "c"]]


def test_a_read_without_gradient_counts_as_a_consumer():
    def wire(m, x):
        x = m.a(x)
        m.level = float(x.detach().sum())
        return m.b(x)

    assert chains(wire) == [["a"], ["b"]]


def test_reading_what_an_inplace_module_wrote():
    def wire(m, x):
        kept = m.a(x)
        m.relu(kept)
        return m.b(kept) + kept

    layers = {"a": nn.Linear(4, 4), "relu": nn.ReLU(True), "b": nn.Linear(4, 4)}
    assert chains(wire, **layers) == [["a", "relu"], ["b"]]


def test_functions_end_the_chain_but_flattening_does_not():
    layers = {"conv": nn.Conv2d(1, 2, 1), "pool": nn.AvgPool2d(2), "fc": nn.Linear(8, 3)}

    def run(function):
        model = Wiring(lambda m, x: m.fc(function(m.pool(m.conv(x)))), **layers)
        return structure.linear_chains(model, torch.randn(2, 1, 4, 4))

    whole, parted = [["conv", "pool", "fc"]], [["conv", "pool"], ["fc"]]
    assert run(lambda x: torch.flatten(x, 1)) == whole
    assert run(lambda x: x.view(x.shape[0], -1)) == whole
    assert run(lambda x: x.reshape(-1, 8)) == whole
    assert run(lambda x: F.relu(x).flatten(1)) == parted
    assert run(lambda x: x.transpose(2, 3).flatten(1)) == parted
    assert run(lambda x: x.permute(0, 2, 3, 1).reshape(-1, 8)) == parted
    assert run(lambda x: x.flatten(1).relu_()) == parted
    assert run(lambda x: x.view(4, 4).repeat(1, 2)[:2]) == parted
    assert run(lambda x: x.view(1, 2, 8)[0]) == whole  # the same rows after all


def test_a_view_that_is_no_flattening_of_each_input_ends_the_chain():
    layers = {"a": nn.Conv2d(1, 4, 1), "b": nn.Linear(4, 2)}
    model = Wiring(lambda m, x: m.b(m.a(x).view(8, 4)), **layers)
    assert structure.linear_chains(model, torch.randn(2, 1, 2, 2)) == [["a"], ["b"]]


def test_a_module_used_twice_is_in_no_chain():
    assert chains(lambda m, x: m.c(m.b(m.b(m.a(x))))) == [["a"], ["c"]]
    shared = nn.Linear(4, 4)
    layers = {"a": shared, "b": nn.ReLU(), "c": shared}
    assert chains(lambda m, x: m.c(m.b(m.a(x))), **layers) == [["b"]]


def test_two_inputs_or_a_second_output_end_the_chain():
    assert chains(lambda m, x: m.c(m.a(x) + m.b(x))) == [["a"], ["b"], ["c"]]
    assert chains(lambda m, x: (lambda y: (y, m.b(y)))(m.a(x))) == [["a"], ["b"]]
    layers = {"a": nn.Linear(4, 4), "b": nn.Bilinear(4, 4, 4)}
    assert chains(lambda m, x: m.b(m.a(x), x), **layers) == [["a"], ["b"]]


def test_chains_of_known_networks(network):
    before = copy.deepcopy(network("resnet18").state_dict())
    found = structure.linear_chains(network("resnet18"), example())
    assert found[0] == ["conv1", "bn1", "relu", "maxpool"]
    assert ["avgpool", "fc"] in found
    assert ["layer2.0.downsample.0", "layer2.0.downsample.1"] in found
    assert not any("layer1.0.relu" in chain for chain in found)  # called twice
    after = network("resnet18").state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks for m in network("resnet18").modules())
    (whole,) = structure.linear_chains(models.vgg11(), example())
    assert len(whole) == len([m for m in models.vgg11().modules() if not list(m.children())])


# --- residual blocks --------------------------------------------------------------------------

BLOCKS = {
    "resnet18": ["layer1.1", "layer2.1", "layer3.1", "layer4.1"],
    "resnet50": [
        f"layer{stage}.{i}" for stage, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(1, n)
    ],
    "mobilenet_v2": [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
    "swin_t": [f"features.{s}.{i}" for s, n in ((1, 2), (3, 2), (5, 6), (7, 2)) for i in range(n)],
    "timm:vit_tiny_patch16_224": [f"blocks.{i}" for i in range(12)],
    "timm:deit3_small_patch16_224": [f"blocks.{i}" for i in range(12)],  # with LayerScale
    "vgg11": [],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_known_networks(network, name):
    size = 224 if name.startswith("timm:") else 64
    model, x = network(name), example(size)
    assert structure.removable_blocks(model, x) == BLOCKS[name]
    # Every one of them can go, and all of them together.
    shape = model(x).shape
    together = copy.deepcopy(model)
    for block in BLOCKS[name]:
        parent, _, child = block.rpartition(".")
        setattr(together.get_submodule(parent), child, nn.Identity())
    with torch.no_grad():
        assert together(x).shape == shape


def test_blocks_of_the_large_vision_transformer(network):
    found = structure.removable_blocks(network("vit_b_16"), example(224))
    assert found == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_blocks_with_drop_path_are_found_in_any_state(training, frozen):
    model = models.convnext_tiny(stochastic_depth_prob=0.9).train(training)
    model.requires_grad_(not frozen)
    state = torch.random.get_rng_state()
    found = structure.removable_blocks(model, example())
    assert len(found) == 18
    assert model.training is training
    assert torch.equal(state, torch.random.get_rng_state())


class Residual(nn.Module):
    def __init__(self, branch, *, after=None):
        super().__init__()
        self.branch, self.after = branch, after

    def forward(self, x, *others):
        x = x + self.branch(x)
        return x if self.after is None else self.after(x)


def linear():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def found(*parts):
    model = nn.Sequential(OrderedDict((f"p{i}", part) for i, part in enumerate(parts)))
    return structure.removable_blocks(model, torch.randn(2, 4))


def test_what_is_a_block_and_what_is_not():
    stem = nn.Linear(4, 4)
    assert found(stem, Residual(linear())) == ["p1"]
    assert found(stem, Residual(linear(), after=nn.ReLU())) == ["p1"]
    assert found(stem, Residual(linear(), after=nn.PReLU())) == ["p1"]
    assert found(stem, Residual(linear(), after=nn.Linear(4, 4))) == []
    assert found(stem, linear()) == []
    assert found(stem, Residual(nn.Sequential(nn.ReLU()))) == []  # no weights in it
    projected = Wiring(lambda m, x: m.a(x) + m.b(x), a=linear(), b=linear())
    assert found(stem, projected) == []
    widened = Wiring(lambda m, x: x[:1] + m.a(x), a=linear())
    assert found(stem, widened) == []
    # The input is changed in place before it is added: that is no identity.
    changed = Wiring(lambda m, x: x.relu_() + m.a(x), a=linear())
    assert found(stem, changed) == []
    accumulated = Wiring(lambda m, x: m.a(x).add_(x), a=linear())
    assert found(stem, accumulated) == ["p1"]
    scaled = Wiring(lambda m, x: torch.addcmul(x, m.a(x), torch.ones(4)), a=linear())
    assert found(stem, scaled) == ["p1"]
    twice = Residual(linear())
    assert found(stem, twice, twice) == []


def test_of_nested_modules_the_block_is_reported():
    stem = nn.Linear(4, 4)
    stage = nn.Sequential(Residual(linear()), Residual(linear()))
    assert found(stem, stage) == ["p1.0", "p1.1"]
    assert found(stem, nn.Sequential(Residual(linear()))) == ["p1.0"]
    inner = nn.Sequential(nn.Linear(4, 4), Residual(linear()))
    assert found(stem, Residual(inner)) == ["p1"]
    two_steps = Wiring(lambda m, x: (x := x + m.a(x)) + m.b(x), a=linear(), b=linear())
    assert found(stem, two_steps) == ["p1"]


def test_features_that_are_only_pooled_keep_their_first_block():
    pool = nn.MaxPool1d(2)
    stem = nn.Linear(8, 8)

    def run(*parts):
        return structure.removable_blocks(nn.Sequential(stem, *parts), torch.randn(2, 1, 8))

    assert run(pool, Residual(linear()), Residual(linear())) == ["3"]
    assert run(pool, nn.Linear(4, 4), Residual(linear()), Residual(linear())) == ["3", "4"]
    assert run(pool, nn.LayerNorm(4), Residual(linear(), after=nn.ReLU())) == []


def test_reasons_are_given():
    reasons = structure.why_not_removable(models.resnet18(), example())
    assert "only pooled" in reasons["layer1.0"]
    assert "changes the shape" in reasons["layer2.0"]
    assert "made of residual blocks" in reasons["layer1"]
    assert set(reasons).isdisjoint(BLOCKS["resnet18"])


def test_a_block_with_a_second_input_is_found_and_removed():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.blocks = nn.ModuleList([Residual(linear()), Residual(linear())])

        def forward(self, x, condition):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, condition)
            return x

    model = Conditioned()
    inputs = (torch.randn(2, 4), torch.randn(2, 4))
    assert structure.removable_blocks(model, inputs) == ["blocks.0", "blocks.1"]
    for name in ("blocks.0", "blocks.1"):
        structure.remove_block(model, name)
    assert torch.equal(model(*inputs), model.stem(inputs[0]))
    with pytest.raises(ValueError, match=r"no module 'blocks\.2'"):
        structure.remove_block(model, "blocks.2")


# --- coupled channels -------------------------------------------------------------------------


def conv_net():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 3),
            norm1=nn.BatchNorm2d(6),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 5, 3, stride=8),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(5 * 8 * 8, 7),
            relu3=nn.ReLU(),
            fc2=nn.Linear(7, 3),
        )
    )


def with_statistics(model, x):
    """Give norms statistics and parameters that a mistake would show in."""
    generator = torch.Generator().manual_seed(2)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if len(list(model.modules())) < 20:
                module.weight.data.uniform_(-0.2, 0.3, generator=generator)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_(0.5, 0.3, generator=generator)
            module.running_var.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def output_with_columns_silenced(model, group, units, x):
    """The dense network, with these channels' weights in all their consumers at zero."""
    model = copy.deepcopy(model)
    layers = dict(model.named_modules())
    for member in group.consumers:
        chosen = member.index[torch.isin(member.channel, torch.tensor(units))]
        layers[member.layer].weight.data.index_fill_(member.axis, chosen, 0)
    return model(x)


CASES = [
    ("mlp", "fc1", [0, 3]),
    ("mlp", "fc2", [6]),
    ("conv_net", "conv1", [1, 5]),
    ("conv_net", "conv2", [0, 2, 4]),
    ("conv_net", "fc1", [3]),
    ("resnet18", "conv1", [0, 7, 63]),
    ("resnet18", "layer3.0.conv1", [1, 2]),
    ("resnet18", "layer2.1.conv2", list(range(0, 128, 2))),
    ("mobilenet_v2", "features.17.conv.0.0", list(range(0, 960, 2))),
    ("densenet121", "features.conv0", [3, 9]),
]


@pytest.mark.parametrize(("name", "layer", "units"), CASES)
@torch.no_grad()
def test_removal_equals_silencing(network, name, layer, units):
    x = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
        if name == "mlp"
        else example(66, batch=2)
    )
    model = {"mlp": mlp, "conv_net": conv_net}.get(name, lambda: network(name))()
    model = with_statistics(model, x)
    (group,) = structure.channel_groups(model, x, layers=[layer])
    dense, expected = model(x), output_with_columns_silenced(model, group, units, x)
    assert (dense - expected).abs().max() > 1e-3 * dense.abs().max()  # the test has power
    before = sum(p.numel() for p in model.parameters())
    structure.remove_channels(model, layer, torch.tensor(units), x)
    assert sum(p.numel() for p in model.parameters()) < before
    assert dict(model.named_modules())[layer].weight.shape[0] == group.channels - len(units)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


@torch.no_grad()
def test_removal_by_hand():
    """An oracle that does not use the groups at all."""
    model = with_statistics(conv_net(), None)
    x = example(66)
    conv1, conv2, fc1 = model.conv1, model.conv2, model.fc1
    kept = [0, 2, 3]
    columns = [c * 64 + i for c in kept for i in range(64)]
    hidden = F.relu(model.norm1(conv1(x)))
    hidden = F.relu(F.conv2d(hidden, conv2.weight[kept], conv2.bias[kept], stride=8)).flatten(1)
    expected = model.fc2(F.relu(F.linear(hidden, fc1.weight[:, columns], fc1.bias)))
    structure.remove_channels(model, "conv2", [1, 4], x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
@torch.no_grad()
def test_removal_in_vgg16_bn():
    x = example(64)
    model = with_statistics(models.vgg16_bn(), x)
    for layer in ("features.7", "features.40", "classifier.0"):
        units = [0, 5, 17]
        (group,) = structure.channel_groups(model, x, layers=[layer])
        expected = output_with_columns_silenced(model, group, units, x)
        structure.remove_channels(model, layer, units, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_groups_of_a_small_network():
    groups = {g.name: g for g in structure.channel_groups(conv_net(), example(66))}
    assert list(groups) == ["conv1", "conv2", "fc1"]  # fc2 makes the output
    group = groups["conv2"]
    assert group.channels == 5
    ((producer,), (consumer,)) = group.producers, group.consumers
    assert (producer.layer, producer.role, producer.axis) == ("conv2", "out", 0)
    assert producer.index.tolist() == producer.channel.tolist() == list(range(5))
    assert (consumer.layer, consumer.role, consumer.axis) == ("fc1", "in", 1)
    assert sorted(consumer.index.tolist()) == list(range(320))
    assert torch.equal(consumer.channel, consumer.index // 64)
    assert [m.layer for m in groups["conv1"].others] == ["norm1"]


@pytest.mark.parametrize(("name", "count"), [("resnet18", 12), ("mobilenet_v2", 25)])
def test_groups_of_known_networks(network, name, count):
    model = copy.deepcopy(network(name)).requires_grad_(False).train()
    groups = structure.channel_groups(model, example())
    assert len(groups) == count
    made = [m.layer for g in groups for m in g.producers]
    assert len(made) == len(set(made))
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert len(structure.channel_groups(model, example())) == count  # nothing is remembered


def test_a_depthwise_layer_leads_to_its_group(network):
    (group,) = structure.channel_groups(
        network("mobilenet_v2"), example(), layers=["features.2.conv.1.0"]
    )
    assert group.name == "features.2.conv.0.0"
    assert "features.2.conv.1.0" in [m.layer for m in group.others if m.role == "depthwise"]


@pytest.mark.slow
def test_swin_gives_its_mlps_and_refuses_the_stream():
    model = models.swin_t()
    groups = structure.channel_groups(model, example())
    assert len(groups) == 12
    assert all(".mlp.0" in g.name for g in groups)
    with pytest.raises(ValueError, match="used outside"):
        structure.remove_channels(model, "features.0.0", [0], example())


def test_removal_keeps_flags_and_leaves_other_parameters_alone():
    model = conv_net()
    model.conv1.requires_grad_(False)
    kept = model.fc2.weight
    structure.remove_channels(model, "conv1", {0}, example(66))
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad
    assert model.fc2.weight is kept
    assert model.training
    assert model.norm1.num_features == len(model.norm1.running_mean) == 5
    model(example(66, batch=2)).sum().backward()


class Rigid(nn.Module):
    """A ``view`` with a number written into it: nothing before it can shrink."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).mean((2, 3)).view(-1, 4))


GROUPED = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
NO_GRAPH = Wiring(lambda m, x: m.a(x).detach(), a=nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize(
    ("model", "layer", "units", "message"),
    [
        (conv_net(), "conv3", [0], "no convolution or linear layer 'conv3'; the nearest are 'conv"),
        (conv_net(), "norm1", [0], "no convolution or linear layer 'norm1'"),
        (conv_net(), "conv1", [6], "units 0 to 5, got 6"),
        (conv_net(), "conv1", [-1], "units 0 to 5, got -1"),
        (conv_net(), "conv1", range(6), "All 6 units of 'conv1' would go"),
        (conv_net(), "fc2", [0], "are the network's output"),
        (Rigid(), "a", [1], "would not run without them"),
        (GROUPED, "0", [1], "grouped convolution"),
        (NO_GRAPH, "a", [1], "not on the way from input to output"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), "0", [1], "Sequential cannot be traced"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_changes(model, layer, units, message):
    x = example(66)
    parameters = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    widths = [(m.extra_repr(), m.training) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        structure.remove_channels(model, layer, units, x)
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == parameters
    assert [(m.extra_repr(), m.training) for m in model.modules()] == widths
    for name, buffer in model.named_buffers():
        assert id(buffer) == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_masked_models_are_refused():
    model = conv_net()
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    with pytest.raises(ValueError, match="'conv2' is masked"):
        structure.remove_channels(model, "conv1", [0], example(66))
    with pytest.raises(ValueError, match="make_permanent"):
        structure.channel_groups(model, example(66))


def test_resnet18_without_its_removable_blocks_has_the_published_macs():
    from pruning101.core import measure
    from pruning101.core.models import build

    model, x = build("resnet18"), example(32)
    assert round(measure.footprint(model, x).macs / 1e6, 2) == 140.19
    for block in structure.removable_blocks(model, x):
        structure.remove_block(model, block)
    smaller = measure.footprint(model, x)
    assert round(smaller.macs / 1e6, 2) == 64.69
    assert smaller.depth == 10
    assert structure.removable_blocks(model, x) == []


def test_units_must_be_positions_and_no_mask():
    model = build("lenet5", in_channels=1, image_size=28)
    for units in (torch.arange(20) < 2, [1.5], ["a"]):
        with pytest.raises(TypeError, match="positions of units of 'conv1'"):
            structure.remove_channels(model, "conv1", units, torch.zeros(1, 1, 28, 28))
    assert model.get_submodule("conv1").out_channels == 20
    scores = torch.arange(20.0)
    structure.remove_channels(model, "conv1", [scores.argmin()], torch.zeros(1, 1, 28, 28))
    assert model.get_submodule("conv1").out_channels == 19
