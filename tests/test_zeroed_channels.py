import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning101.core import masks, structure
from pruning101.core.carried import ConstantBorder, Scattered
from pruning101.core.measure import footprint
from pruning101.core.zeroed_channels import materialise

models = pytest.importorskip("torchvision.models")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(model, seed=0):
    """Give norms and biases values that matter, so that a lost constant shows."""
    g = seeded(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.copy_(0.3 + 0.6 * torch.rand(m.weight.shape, generator=g))
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                m.running_mean.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                m.running_var.copy_(0.5 + torch.rand(m.bias.shape, generator=g))
            elif isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
    return model.eval()


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(build(), seed)


def zero_rows(layer, units):
    with torch.no_grad():
        layer.weight[units] = 0


def zero_some(model, share, seed, *, rows=True, columns=True, factors=True):
    """Zero random rows, columns and norm factors, layer by layer."""
    g = seeded(seed)

    def some(n):
        return torch.rand(n, generator=g) < share

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                if rows:
                    m.weight[some(len(m.weight))] = 0
                run = 4 if isinstance(m, nn.Linear) and m.out_features == 6 else 1
                if columns and m.weight.shape[1] > 1:  # of a flattened map, a whole channel's
                    m.weight[:, some(m.weight.shape[1] // run).repeat_interleave(run)] = 0
            elif isinstance(m, nn.BatchNorm2d) and factors:
                m.weight[some(len(m.weight)) & some(len(m.weight))] = 0


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def difference(model, small, x):
    with torch.no_grad():
        expected, actual = model(x), small(x)
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-30))


def zeros_left(model):
    """Names of layers with rows of zeros and, of ungrouped ones, with columns of zeros."""
    rows, columns = set(), set()
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear) and not name.endswith(".border"):
            plain = name.replace(".layer", "")
            if (m.weight == 0).flatten(1).all(1).any():
                rows.add(plain)
            if (
                getattr(m, "groups", 1) == 1
                and (m.weight == 0).transpose(0, 1).flatten(1).all(1).any()
            ):
                columns.add(plain)
    return rows, columns


# --- random small networks: the same function, fewer channels -----------------------------------


class Residual(nn.Module):
    def __init__(self, channels, padding_mode="zeros"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 5, 3, padding=1, padding_mode=padding_mode)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Dense(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.sigmoid(self.norm(x)))], 1)


class Inverted(nn.Module):
    """Expand, filter each channel alone, squeeze and excite, project."""

    def __init__(self, channels):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 3, 1)
        self.excite = nn.Conv2d(3, 8, 1)
        self.project = nn.Conv2d(8, channels, 1)

    def forward(self, x):
        y = F.relu6(self.norm(self.depthwise(self.expand(x))))
        scale = F.adaptive_avg_pool2d(y, 1)
        return x + self.project(y * torch.sigmoid(self.excite(F.relu(self.squeeze(scale)))))


def head(channels):
    hidden = nn.Linear(4 * channels, 6)
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), hidden, nn.Tanh(), nn.Linear(6, 3)]


@st.composite
def chains(draw):
    """A chain of convolutions with random parameters, norms, activations and pools."""
    layers, channels = [], 2
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(2, 5))
        layers.append(
            nn.Conv2d(
                channels,
                out,
                draw(st.sampled_from([1, 2, 3, (1, 3)])),
                stride=draw(st.integers(1, 2)) if not layers else 1,
                padding=draw(st.sampled_from([0, 1])),
                dilation=draw(st.integers(1, 2)) if not layers else 1,
                bias=draw(st.booleans()),
                padding_mode=draw(st.sampled_from(["zeros", "zeros", "replicate", "circular"])),
            )
        )
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(out))
        layers.append(draw(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.GELU, nn.Hardswish]))())
        pools = [
            nn.MaxPool2d(2, stride=1),
            nn.MaxPool2d(3, 1, padding=1),
            nn.AvgPool2d(2, stride=1, ceil_mode=True),
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
            nn.Identity(),
        ]
        layers.append(draw(st.sampled_from(pools)))
        channels = out
    return layers + head(channels)


def check_small(model, *, partial="keep"):
    model = model.double()
    x = torch.randn(3, 2, 24, 24, generator=seeded()).double()
    other = torch.randn(2, 2, 33, 29, generator=seeded(1)).double()
    before = copy.deepcopy(model.state_dict())
    report = materialise(model, x[:1], partial=partial)
    assert difference(model, report.model, x) < 1e-10
    assert difference(model, report.model, other) < 1e-10, "at another size of the input"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert parameters(report.model) <= parameters(model)
    if report.removed:
        assert parameters(report.model) < parameters(model)
        assert footprint(report.model, x[:1]).macs <= footprint(model, x[:1]).macs
    rows, columns = zeros_left(report.model)
    assert rows | columns <= report.kept.keys(), "zeros stay, and nothing says why"
    return report


@given(layers=chains(), seed=st.integers(0, 10_000), share=st.floats(0.1, 0.7))
@settings(max_examples=25, deadline=None)
def test_no_zeros_stay_in_a_chain_but_where_a_layer_needs_a_unit(layers, seed, share):
    model = made(lambda: nn.Sequential(*layers), seed)
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    randomise(model, seed)
    zero_some(model, share, seed)
    report = check_small(model)
    last = len(model) - 1
    for name, reason in report.kept.items():
        parts = {part.split(": ")[1] for part in reason.split("; ")}
        if name == str(last):
            parts.discard("they are the network's output")
        if name == "0":
            parts.discard("they are not made by channels that could go")  # the image's
        if isinstance(report.model.get_submodule(name), ConstantBorder):
            # all that it read was constant, and what is left of it differs at the border
            parts.discard(
                f"they are constants that zero padding cuts off at the border of '{name}'"
            )
        assert parts <= {"a layer needs a unit"}, report.kept


BLOCKS = {"residual": Residual, "dense": Dense, "inverted": Inverted}


@pytest.mark.parametrize("partial", ["keep", "scatter"])
@pytest.mark.parametrize("kind", BLOCKS)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.7))
@settings(max_examples=15, deadline=None)
def test_blocks_with_random_zeros_keep_their_function(kind, partial, seed, share):
    def build():
        more = 4 if kind == "dense" else 0
        blocks = [BLOCKS[kind](6 + i * more) for i in range(2)]
        return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *blocks, *head(6 + 2 * more))

    model = made(build, seed)
    zero_some(model, share, seed)
    check_small(model, partial=partial)


# --- one thing at a time ------------------------------------------------------------------------


def image(channels=2, size=9, batch=3, seed=0):
    return torch.randn(batch, channels, size, size, generator=seeded(seed)).double()


def test_a_constant_cut_off_at_the_border_is_added_by_one_small_convolution():
    model = made(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, (3, 1), stride=2, padding=(2, 1))
        )
    ).double()
    zero_rows(model[0], [1, 4])
    report = materialise(model, image())
    assert report.removed == {"0": 2}
    assert report.kept == {}
    wrapped = report.model[2]
    assert isinstance(wrapped, ConstantBorder)
    constant = torch.sigmoid(model[0].bias[[1, 4]])
    expected = (model[2].weight[:, [1, 4]] * constant.view(1, 2, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(wrapped.border.weight, expected, rtol=1e-12, atol=1e-12)
    for x in (image(), image(size=5, seed=1), image(size=12, batch=1, seed=2)):
        assert difference(model, report.model, x) < 1e-12


@pytest.mark.parametrize("between", [nn.Identity, nn.Sigmoid])
def test_a_norm_factor_of_zero_makes_a_constant_whatever_comes_before(between):
    model = made(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            between(),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 3, 1, bias=False),
        )
    ).double()
    with torch.no_grad():
        model[2].weight[[0, 5]] = 0
        model[2].bias[[0, 5]] = torch.tensor([1.5, -1.0]).double()
    report = materialise(model, image())
    assert report.removed == {"0": 2}
    shift = 1.5 * model[4].weight[:, 0, 0, 0]
    torch.testing.assert_close(report.model[4].bias, shift, rtol=1e-12, atol=1e-12)
    assert difference(model, report.model, image()) < 1e-12


def test_nothing_stays_nothing_whatever_it_is_scaled_by():
    # Squeeze-and-excite scales a channel by a number that depends on the input.
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 4, 1), Inverted(4), nn.Conv2d(4, 2, 1)))
    model = model.double()
    zero_rows(model[1].depthwise, [0, 5])
    norm = model[1].norm
    with torch.no_grad():
        norm.bias[[0, 5]] = torch.tensor([9.0, -9.0]).double()  # ReLU6 gives 6 and 0
    report = materialise(model, image())
    block = report.model[1]
    assert block.expand[0].out_channels == block.depthwise.groups == block.excite.out_channels == 7
    assert difference(model, report.model, image(seed=1)) < 1e-12
    assert report.kept.keys() == {"1.depthwise"}


class Sum(nn.Module):
    """A residual sum of two convolutions with norms, read by a padded and by a plain one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = torch.sigmoid(self.norm(self.stem(x)))
        return self.out(x + self.branch(x))


def test_a_channel_of_a_sum_goes_if_all_who_make_it_are_silent():
    model = made(Sum).double()
    zero_rows(model.stem, [0, 1, 2, 7])
    zero_rows(model.branch, [1, 2, 3])
    for partial in ("keep", "scatter"):
        report = materialise(model, image(), partial=partial)
        assert difference(model, report.model, image()) < 1e-12
        assert difference(model, report.model, image(size=6, seed=1)) < 1e-12
        assert report.model.norm.num_features == 6  # both silent: 1 and 2
        if partial == "keep":
            assert report.removed == {"stem": 2, "branch": 2}
            assert "'branch' makes them, too" in report.kept["stem"]
            assert "'stem' makes them, too" in report.kept["branch"]
        else:
            assert report.removed == {"stem": 4, "branch": 3}
            assert report.kept == {}
            assert isinstance(report.model.stem, Scattered)
            assert report.model.stem.layer.out_channels == 4
            assert report.model.stem.constants.numel() == 2  # biases


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(2, divisor_override=3, ceil_mode=True),
        nn.ZeroPad2d(1),
        nn.ConstantPad2d((1, 0, 0, 0), 0.3),
    ],
)
def test_what_waters_a_constant_at_the_border_keeps_it_where_it_is(pool):
    # An image of one pixel looks the same all over even so: nothing may be read off it.
    model = made(
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 1), nn.Sigmoid(), pool, nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 3, 1)
        )
    ).double()
    zero_rows(model[0], [1, 2])
    report = materialise(model, image(size=1))
    assert difference(model, report.model, image(size=7)) < 1e-12
    assert report.removed == {}
    assert "no constants" in report.kept["0"]
    with torch.no_grad():
        model[4].weight[:, [2, 3]] = 0
    report = materialise(model, image(size=1))
    assert report.removed == {"0": 2}
    assert difference(model, report.model, image(size=7)) < 1e-12


def test_a_norm_over_channels_and_the_output_keep_theirs_and_say_so():
    model = made(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))
    ).double()
    zero_rows(model[0], [1])
    zero_rows(model[3], [2])
    x = torch.randn(5, 4, generator=seeded()).double()
    report = materialise(model, x)
    assert report.removed == {}
    assert report.kept == {
        "0": "1 without inputs: '1' reads all channels together",
        "3": "1 without inputs: they are the network's output",
    }


def test_heads_whose_output_nobody_reads_go_whole():
    encoder = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    model = made(lambda: nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 2))).double()
    with torch.no_grad():
        model[1].self_attn.out_proj.weight[:, 2:6] = 0  # heads 1 and 2
        model[1].linear1.weight[3] = 0
    x = torch.randn(3, 5, 8, generator=seeded()).double()
    report = materialise(model, x)
    assert difference(model, report.model, x) < 1e-12
    assert report.model[1].self_attn.num_heads == 2
    assert report.model[1].linear1.out_features == 11


def test_masks_become_permanent_and_count_as_zeros():
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).double()
    keep = torch.ones(6, 4, dtype=torch.bool)
    keep[[0, 3]] = False
    masks.apply(model, {"0.weight": keep})
    x = torch.randn(5, 4, generator=seeded()).double()
    report = materialise(model, x)
    assert report.removed == {"0": 2}
    assert masks.masks_of(model)
    assert not masks.masks_of(report.model)
    assert difference(model, report.model, x) < 1e-12
    changed = materialise(model, x, inplace=True)
    assert changed.model is model
    assert model[0].out_features == 4


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


def test_shared_weights_stay_shared():
    model = made(Tied).double()
    zero_rows(model.one, [1])
    x = torch.randn(5, 6, generator=seeded()).double()
    report = materialise(model, x)
    assert report.removed == {}
    assert "shares its weights" in report.kept["one"]
    assert report.model.one.weight is report.model.two.weight


class Mixed(nn.Module):
    """Its softmax over channels reads what no layer reads any more."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.softmax(self.first(x), -1))


def test_a_function_that_would_change_is_refused_and_nothing_changes():
    model = made(Mixed).double()
    masks.apply(model, {"second.weight": torch.arange(6).repeat(3, 1) != 2})
    x = torch.randn(5, 4, generator=seeded()).double()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(ValueError, match="something else without its zeros"):
        materialise(model, x, inplace=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="partial must be"):
        materialise(model, x, partial="some")


def test_the_modules_it_may_leave_are_ordinary_ones():
    model = made(Sum)
    zero_rows(model.stem, [0, 1, 2])
    zero_rows(model.branch, [1, 2, 3])
    x = image().float()
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        small = materialise(model, x, partial="scatter").model
        state = torch.get_rng_state()
        torch.manual_seed(7)
        assert torch.equal(state, torch.get_rng_state()), "random numbers were drawn"
    assert not any(p.requires_grad for p in small.parameters())
    assert difference(small, torch.jit.script(small), x) < 1e-6
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert difference(small, torch.load(file, weights_only=False), x) == 0
    other = copy.deepcopy(small)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(small.state_dict())
    assert difference(small, other, x) == 0


def test_a_branch_whose_norm_is_zero_computes_nothing_any_more():
    # As a residual network starts with zero_init_residual: the sum gets the norms' biases only.
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 6, 1), Residual(6), nn.Conv2d(6, 2, 1)))
    model = model.double()
    with torch.no_grad():
        model[1].norm2.weight.zero_()
    for partial, width in (("keep", 6), ("scatter", 1)):
        report = materialise(model, image(), partial=partial)
        block = report.model[1]
        assert block.conv1.out_channels == 1
        assert getattr(block.conv2, "layer", block.conv2).out_channels == width
        assert "'0' makes them, too" in report.kept["1.norm2"]
        assert difference(model, report.model, image(seed=1)) < 1e-12


def test_a_materialised_network_can_lose_more():
    model = made(Sum).double()
    zero_rows(model.stem, [0, 1, 2])
    zero_rows(model.branch, [1, 2, 3])
    small = materialise(model, image()).model
    assert materialise(small, image()).removed == {}
    zero_rows(small.stem, [0, 4])
    zero_rows(small.branch.layer, [0, 4])
    zero_rows(small.branch.border, [0, 4])
    report = materialise(small, image())
    assert report.removed == {"stem": 2, "branch": 2}
    assert difference(small, report.model, image(size=7)) < 1e-12
    groups = structure.channel_groups(report.model, image())
    structure.remove_channels(report.model, groups[0].name, [0], image())
    assert report.model.out.in_channels == 3


# --- networks of torchvision --------------------------------------------------------------------

NETWORKS = [
    "vgg11_bn", "densenet121", "resnet18", "resnet50", "mobilenet_v2", "convnext_tiny", "vit_b_16",
    "efficientnet_b0",
]  # fmt: skip


def zero_half(model, x, by_group):
    """Zero half of each convolution's rows, by itself or group by group; and of MLPs' units."""
    g = seeded(3)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    layers |= {  # the hidden units of ConvNeXt's and ViT's MLPs
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.endswith((".block.3", ".mlp.0"))
    }
    halves = {}
    if by_group:
        for group in structure.channel_groups(model, x):
            half = torch.randperm(group.channels, generator=g)[: group.channels // 2]
            for member in group.producers:
                halves[member.layer] = member.index[torch.isin(member.channel, half)]
    with torch.no_grad():
        for name, m in layers.items():
            n = len(m.weight)
            half = halves.get(name, torch.randperm(n, generator=g)[: n // 2])
            m.weight[half] = 0


@pytest.mark.slow
@pytest.mark.parametrize("by_group", [False, True], ids=["by layer", "by group"])
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_compute_the_same_with_fewer_channels(name, by_group):
    size = {"image_size": 32} if name.startswith("vit") else {}
    model = made(lambda: models.get_model(name, num_classes=10, **size))
    if name.startswith("vit"):
        with torch.no_grad():
            model.heads.head.weight.normal_(generator=seeded())
    x = torch.randn(2, 3, 32, 32, generator=seeded())
    zero_half(model, x[:1], by_group)
    report = materialise(model, x[:1], partial="keep" if by_group else "scatter")
    assert difference(model, report.model, x) < 1e-5
    if not name.startswith("vit"):
        other = torch.randn(1, 3, 56, 40, generator=seeded(1))
        assert difference(model, report.model, other) < 1e-5
    assert sum(report.removed.values()) > 0
    before, after = parameters(model), parameters(report.model)
    assert after < before
    rows, columns = zeros_left(report.model)
    assert rows | columns <= report.kept.keys()
    units = {"features.1.0.block.3": 192, "encoder.layers.encoder_layer_0.mlp.0": 1536}
    hidden = [m for n, m in report.model.named_modules() if n in units]
    if hidden:  # a norm over channels reads the stream: nothing but hidden units goes
        assert all(m.out_features in units.values() for m in hidden)
        if by_group:
            assert any("reads all channels together" in why for why in report.kept.values())
    elif name in ("vgg11_bn", "densenet121") or (by_group and name.startswith("resnet")):
        assert not rows, "channels that nothing holds are left"
        assert after < 0.4 * before or name == "vgg11_bn"
