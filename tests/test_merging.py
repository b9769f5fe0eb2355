import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from pruning101.core import composition
from pruning101.core.measure import footprint
from pruning101.core.merging import (
    BorderedConv2d,
    border_width,
    merge,
    merge_norm,
    merge_skip,
)
from pruning101.core.structure import channel_groups, linear_chains, prunable

TOLERANCE = 1e-10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(*args, seed=0, **kwargs):
    """A convolution in float64 whose weights are all far from zero in effect."""
    layer = nn.Conv2d(*args, **kwargs, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(draw(*p.shape, seed=seed + i))
    return layer


def norm(kind, channels, *, affine=True, seed=0):
    layer = kind(channels, affine=affine, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.running_mean.copy_(draw(channels, seed=seed))
        layer.running_var.copy_(draw(channels, seed=seed + 1).square() + 0.1)
        if affine:
            layer.weight.copy_(draw(channels, seed=seed + 2))
            layer.bias.copy_(draw(channels, seed=seed + 3))
    return layer


def apart(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


def composed(first, second, x):
    """What the pair gives; None where the input is too small for it."""
    try:
        with torch.no_grad():
            return second(first(x))
    except RuntimeError:
        return None


@st.composite
def pairs(draw_from, *, middle=12):
    """Two convolutions that compose, every argument drawn for rows and columns apart."""

    def two(low, high):
        return tuple(draw_from(st.tuples(*[st.integers(low, high)] * 2)))

    divisors = [1, 1, *(g for g in (2, 3, 4, 6, 12) if middle % g == 0)]
    groups = [draw_from(st.sampled_from(divisors)) for _ in range(2)]
    widths = [draw_from(st.integers(1, 2)) * g for g in groups]
    layers = []
    for i, (start, end) in enumerate([(widths[0], middle), (middle, widths[1])]):
        layers.append(
            conv(
                start,
                end,
                two(1, draw_from(st.integers(1, 5))),
                stride=two(1, 3),
                padding=two(0, draw_from(st.integers(0, 6))),
                dilation=two(1, 3),
                groups=groups[i],
                bias=draw_from(st.booleans()),
                seed=10 * i,
            )
        )
    return tuple(layers)


sizes = st.lists(st.tuples(st.integers(1, 17), st.integers(1, 17)), min_size=1, max_size=4)


# --- two convolutions -------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(pairs(), sizes)
def test_exact_is_the_composition_everywhere(layers, sizes):
    first, second = layers
    merged = merge(first, second)
    for height, width in sizes:
        x = draw(2, first.in_channels, height, width, seed=height)
        expected = composed(first, second, x)
        if expected is None:
            with pytest.raises((ValueError, RuntimeError)):
                merged(x)
        else:
            scale = max(1.0, expected.abs().max().item())
            assert apart(merged(x), expected) < TOLERANCE * scale


@settings(max_examples=60, deadline=None)
@given(pairs(middle=4))
def test_the_interior_is_right_and_its_border_no_wider_than_it_must_be(layers):
    first, second = layers
    width = border_width(first, second)
    merged = merge(first, second, border="interior")
    assert type(merged) is nn.Conv2d
    steps = [a * b for a, b in zip(first.stride, second.stride, strict=True)]
    # Large enough that the two ends are apart, and every remainder of the strides comes up.
    least = [(2 * width + 3) * step + 40 for step in steps]
    widest = 0
    for offset in range(max(steps)):
        x = draw(1, first.in_channels, least[0] + offset, least[1] + offset)
        expected = second(first(x))
        wrong = (merged(x) - expected).abs().amax((0, 1)) > 1e-9 * expected.abs().max()
        rows, columns = (torch.arange(n) for n in wrong.shape)
        from_side = torch.minimum(
            torch.minimum(rows, rows.flip(0))[:, None], torch.minimum(columns, columns.flip(0))
        )
        widest = max([widest, *(from_side[wrong] + 1).tolist()])
    assert widest == width
    if width == 0:
        assert type(merge(first, second)) is nn.Conv2d
        assert type(merge(first, second, border="refuse")) is nn.Conv2d
    else:
        assert type(merge(first, second)) is BorderedConv2d
        with pytest.raises(ValueError, match=f"outer {width} output pixels"):
            merge(first, second, border="refuse")


# First layer, second layer, and the width of the border that one convolution gets wrong.
KNOWN = {
    "no padding in the second": (dict(kernel_size=3, padding=1), dict(kernel_size=3), 0),
    "1x1 second": (dict(kernel_size=5, padding=2, stride=2), dict(kernel_size=1), 0),
    "1x1 first, no bias": (
        dict(kernel_size=1, bias=False),
        dict(kernel_size=3, padding=1),
        0,
    ),
    "1x1 first, bias": (dict(kernel_size=1), dict(kernel_size=3, padding=1), 1),
    "1x1 first, bias, 5x5": (dict(kernel_size=1), dict(kernel_size=5, padding=2), 2),
    "3x3, 3x3": (dict(kernel_size=3, padding=1), dict(kernel_size=3, padding=1), 1),
    "3x3, 5x5": (dict(kernel_size=3, padding=1), dict(kernel_size=5, padding=2), 2),
    "second strided": (
        dict(kernel_size=3, padding=1),
        dict(kernel_size=5, padding=3, stride=2),
        2,
    ),
    "first with all its padding, no bias": (
        dict(kernel_size=3, padding=2, bias=False),
        dict(kernel_size=3, padding=1),
        0,
    ),
    "first with all its padding, bias": (
        dict(kernel_size=3, padding=2),
        dict(kernel_size=3, padding=1),
        1,
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_pairs(case):
    one, two, width = KNOWN[case]
    first, second = conv(3, 5, **one), conv(5, 2, **two, seed=5)
    assert border_width(first, second) == width
    assert isinstance(merge(first, second), BorderedConv2d if width else nn.Conv2d)
    x = draw(2, 3, 13, 12)
    assert apart(merge(first, second)(x), second(first(x))) < TOLERANCE


def test_a_kernel_that_is_only_cropped_is_far_off():
    # What one must not do: keep the inner 3x3 of the 5x5.
    first, second = conv(3, 5, 3, padding=1), conv(5, 2, 3, padding=1, seed=5)
    merged = merge(first, second, border="interior")
    x = draw(2, 3, 13, 12)
    cropped = nn.functional.conv2d(x, merged.weight[:, :, 1:-1, 1:-1], merged.bias, padding=1)
    inner = (..., slice(1, -1), slice(1, -1))
    assert apart(merged(x)[inner], second(first(x))[inner]) < TOLERANCE
    assert apart(cropped[inner], second(first(x))[inner]) > 0.1


@pytest.mark.parametrize(
    ("groups", "merged_groups"), [((4, 4), 4), ((8, 1), 1), ((1, 8), 1), ((4, 2), 2), ((8, 8), 8)]
)
def test_groups_that_both_share_stay(groups, merged_groups):
    first = conv(8, 8, 3, padding=1, groups=groups[0])
    second = conv(8, 8, 1, groups=groups[1], seed=5)
    merged = merge(first, second)
    assert merged.groups == merged_groups
    assert merged.weight.shape == (8, 8 // merged_groups, 3, 3)
    x = draw(2, 8, 6, 7)
    assert apart(merged(x), second(first(x))) < TOLERANCE


def test_taps_that_are_apart_stay_apart():
    first, second = conv(2, 3, 3, padding=4, dilation=4), conv(3, 2, 2, padding=2, dilation=2)
    merged = merge(first, second)
    assert merged.dilation == (2, 2)
    assert merged.kernel_size == (6, 6)
    x = draw(2, 2, 14, 15)
    assert apart(merged(x), second(first(x))) < TOLERANCE


def test_padding_in_words():
    first, second = conv(2, 3, 3, padding="same"), conv(3, 2, (5, 3), padding="same", dilation=2)
    x = draw(2, 2, 9, 10)
    assert apart(merge(first, second)(x), second(first(x))) < TOLERANCE
    first, second = conv(2, 3, 3, padding="valid"), conv(3, 2, 2, padding="valid")
    assert apart(merge(first, second)(x), second(first(x))) < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(pairs())
def test_single_precision_gives_the_same_kernels(layers):
    merged = merge(*layers)
    single = merge(*(copy.deepcopy(layer).float() for layer in layers))
    for (name, p), q in zip(merged.named_parameters(), single.parameters(), strict=True):
        assert apart(p, q.double()) < 1e-5 * max(1.0, p.abs().max().item()), name


def test_products_some_at_a_time_are_the_same(monkeypatch):
    first, second = conv(4, 6, 3, padding=1, groups=2), conv(6, 10, 3, padding=1, groups=2, seed=5)
    whole = merge(first, second)
    monkeypatch.setattr(composition, "_PRODUCTS", 1)
    parts = merge(first, second)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert apart(p, q) < TOLERANCE, name


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=5, padding=4, stride=2),
        dict(kernel_size=5, padding=6, dilation=3),  # fewer outputs than hang over at one end
        dict(kernel_size=5, padding=6, dilation=3, stride=2),
    ],
)
def test_inputs_smaller_than_every_kernel(arguments):
    first, second = conv(2, 3, 5, padding=2), conv(3, 2, **arguments, seed=5)
    merged = merge(first, second)
    for height in range(1, 6):
        for width in range(1, 6):
            x = draw(1, 2, height, width)
            assert apart(merged(x), second(first(x))) < TOLERANCE


def test_real_layers():
    mobilenet = pytest.importorskip("torchvision.models.mobilenetv2")
    resnet = pytest.importorskip("torchvision.models.resnet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mobile = mobilenet.InvertedResidual(24, 32, 2, 6).eval().conv
        basic = resnet.BasicBlock(64, 128, 2).eval()
    depthwise = merge_norm(mobile[1][0], norm(nn.BatchNorm2d, 144).float())
    pointwise = merge_norm(mobile[2], norm(nn.BatchNorm2d, 32, seed=4).float())
    x = draw(2, 144, 28, 28).float()
    merged = merge(depthwise, pointwise, border="refuse")
    expected = pointwise(depthwise(x))
    assert apart(merged(x), expected) < 1e-5 * expected.abs().max()
    merged = merge(basic.conv1, basic.conv2)  # strided: only the far side is not right
    assert merged.top is None
    assert merged.bottom is not None
    x = draw(2, 64, 28, 28, seed=1).float()
    expected = basic.conv2(basic.conv1(x))
    assert apart(merged(x), expected) < 1e-5 * expected.abs().max()


# --- the module -------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        dict(),
        dict(stride=2, groups=2, bias=False),
        dict(kernel_size=1, padding=0),  # its bias alone is wrong at the border
    ],
    ids=["plain", "strided", "bias"],
)
def bordered(request):
    first = conv(4, 6, **{"kernel_size": 3, "padding": 1, **request.param})
    second = conv(6, 8, 3, padding=1, seed=5)
    merged = merge(first, second)
    assert isinstance(merged, BorderedConv2d)
    return first, second, merged


def test_gradients_are_those_of_the_pair_and_reach_every_parameter(bordered):
    first, second, merged = bordered
    x = draw(2, 4, 8, 6).requires_grad_()
    weight = draw(*merged(x).shape, seed=3)
    (expected,) = torch.autograd.grad((second(first(x)) * weight).sum(), x)
    (merged(x) * weight).sum().backward()
    assert apart(x.grad, expected) < 1e-9
    for name, p in merged.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_gradients_of_parameters_are_right(bordered):
    *_, merged = bordered
    x = draw(1, 4, 5, 4)
    names = [name for name, _ in merged.named_parameters()]

    def run(*values):
        return torch.func.functional_call(merged, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach().requires_grad_() for p in merged.parameters())
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_it_can_be_copied_saved_and_loaded(bordered):
    first, second, merged = bordered
    x = draw(2, 4, 9, 8)
    expected = merged(x)
    assert torch.equal(copy.deepcopy(merged)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), expected)
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    file.seek(0)
    for p in [*first.parameters(), *second.parameters()]:
        nn.init.normal_(p)
    other = merge(first, second)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), expected)


def test_it_can_be_scripted_and_exported(bordered):
    first, second, merged = bordered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(merged)
        exported = torch.export.export(merged, (draw(2, 4, 9, 8),)).module()
    for size in [(9, 8), (4, 13), (3, 2)]:
        x = draw(2, 4, *size)
        assert apart(scripted(x), second(first(x))) < TOLERANCE
    x = draw(2, 4, 9, 8, seed=1)
    assert apart(exported(x), second(first(x))) < TOLERANCE


def test_other_kinds_of_inputs(bordered):
    first, second, merged = bordered
    x = draw(2, 4, 9, 8)
    assert apart(merged(x[0]), second(first(x[0]))) < TOLERANCE
    assert merged(x[:0]).shape == second(first(x[:0])).shape
    wide = x.to(memory_format=torch.channels_last)
    assert apart(merged(wide), second(first(x))) < TOLERANCE
    # A view of a larger tensor, and one that must not be written to.
    before = x.clone()
    assert apart(merged(x[..., 1:-1]), second(first(x[..., 1:-1]))) < TOLERANCE
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_other_precisions(bordered, dtype, tolerance):
    first, second, _ = bordered
    x = draw(2, 4, 9, 8)
    expected = second(first(x))
    first, second = first.to(dtype), second.to(dtype)
    merged = merge(first, second)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    out = merged(x.to(dtype))
    assert out.dtype == dtype
    assert apart(out.double(), expected) < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    pairs = [
        (conv(40, 30, 3, padding=1), conv(30, 8, 3, padding=1, seed=5)),
        (norm(nn.BatchNorm2d, 30), conv(30, 8, 3, padding=1, seed=5)),
        (conv(40, 30, 3, padding=1), norm(nn.BatchNorm2d, 30)),
        (nn.Linear(40, 30, dtype=torch.float64), nn.Linear(30, 8, dtype=torch.float64)),
        (norm(nn.BatchNorm1d, 30), nn.Linear(30, 8, dtype=torch.float64)),
    ]
    for pair in pairs:
        half = [layer.to(dtype) for layer in pair]
        rounded = merge(*half)
        exact = merge(*(copy.deepcopy(layer).double() for layer in half))
        for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
            assert q.dtype == dtype
            error = (q.double() - p).abs()
            assert (error <= 0.51 * torch.finfo(dtype).eps * p.abs() + 1e-5).all(), name


def test_under_autocast(bordered):
    first, second, _ = bordered
    x = draw(2, 4, 9, 8)
    expected = second(first(x))
    merged = merge(first.float(), second.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = merged(x.float())
    assert out.dtype == torch.bfloat16
    assert apart(out.double(), expected) < 3e-2 * expected.abs().max()


def test_it_is_one_layer_deep_and_costs_what_it_computes():
    first, second = conv(4, 6, 3, padding=1), conv(6, 8, 3, padding=1, seed=5)
    net = nn.Sequential(merge(first, second), nn.ReLU(), conv(8, 2, 1))
    x = draw(3, 4, 9, 7)
    cost = footprint(net, x)
    assert cost.depth == 2
    kernel, sides, corners = 25 * 9 * 7, 5 * 2 * (9 + 7), 4
    assert cost.macs == 4 * 8 * (kernel + sides + corners) + 8 * 2 * 9 * 7
    assert linear_chains(net, x) == [["0", "1", "2"]]
    # Its channels are in several parameters: what prunes weights or channels leaves it alone.
    assert list(prunable(net)) == ["2"]
    assert channel_groups(net, x) == []


def test_it_says_what_it_is():
    merged = merge(conv(4, 6, 3, 2, 1, bias=False), conv(6, 8, 3, padding=1, bias=False))
    for words in (
        "4, 8, kernel_size=(7, 7)",
        "stride=(2, 2)",
        "corrected=['bottom', 'right', 'bot",
    ):
        assert words in repr(merged)


# --- linear layers, norms and skips -----------------------------------------------------------


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_layers(biases):
    first = nn.Linear(5, 7, bias=biases[0], dtype=torch.float64)
    second = nn.Linear(7, 3, bias=biases[1], dtype=torch.float64)
    merged = merge(first, second, border="refuse")
    assert type(merged) is nn.Linear
    assert (merged.bias is not None) == any(biases)
    x = draw(2, 4, 5)
    assert apart(merged(x), second(first(x))) < TOLERANCE
    assert border_width(first, second) == 0


LAYERS = {
    "linear": lambda: (nn.Linear(6, 4, dtype=torch.float64), nn.BatchNorm1d, (3, 6)),
    "linear without bias": lambda: (
        nn.Linear(6, 4, bias=False, dtype=torch.float64),
        nn.BatchNorm1d,
        (3, 6),
    ),
    "1d": lambda: (nn.Conv1d(6, 4, 3, padding=1, dtype=torch.float64), nn.BatchNorm1d, (3, 6, 8)),
    "2d": lambda: (conv(6, 4, 3, 2, 2, dilation=2, groups=2), nn.BatchNorm2d, (3, 6, 8, 9)),
    "2d, no bias": lambda: (conv(6, 4, 3, bias=False), nn.BatchNorm2d, (3, 6, 8, 9)),
    "2d, circular": lambda: (
        conv(6, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d,
        (3, 6, 8, 9),
    ),
    "bordered": lambda: (
        merge(conv(6, 8, 3, padding=1), conv(8, 4, 3, padding=1)),
        nn.BatchNorm2d,
        (3, 6, 8, 9),
    ),
    "bordered by a bias": lambda: (
        merge(conv(6, 8, 1), conv(8, 4, 3, padding=1, bias=False)),
        nn.BatchNorm2d,
        (3, 6, 8, 9),
    ),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_norm_is_merged_into_the_layer_before_it(kind, affine):
    layer, norm_kind, shape = LAYERS[kind]()
    behind = norm(norm_kind, 4, affine=affine)
    before = copy.deepcopy(layer.state_dict())
    x = draw(*shape)
    for merged in (merge_norm(layer, behind), merge(layer, behind)):
        assert type(merged) is type(layer)
        assert apart(merged(x), behind(layer(x))) < TOLERANCE
        assert all(p.requires_grad for p in merged.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_norm_before_a_convolution(affine, padding):
    before, layer = norm(nn.BatchNorm2d, 4, affine=affine), conv(4, 6, 3, 2, padding, groups=2)
    merged = merge(before, layer)
    x = draw(2, 4, 8, 9)
    assert apart(merged(x), layer(before(x))) < TOLERANCE
    assert merged.groups == 2
    assert border_width(before, layer) == math.ceil(padding / 2)
    # Nothing is moved, nothing is wrong: scale alone.
    nn.init.zeros_(before.running_mean)
    if affine:
        nn.init.zeros_(before.bias)
    merged = merge(before, layer, border="refuse")
    assert apart(merged(x), layer(before(x))) < TOLERANCE


def test_a_norm_before_a_linear_layer():
    before, layer = norm(nn.BatchNorm1d, 5), nn.Linear(5, 3, dtype=torch.float64)
    x = draw(4, 5)
    assert apart(merge(before, layer)(x), layer(before(x))) < TOLERANCE


SKIPPED = {
    "linear": lambda: (nn.Linear(6, 6, bias=False, dtype=torch.float64), (3, 6)),
    "3x3": lambda: (conv(6, 6, 3, padding=1), (3, 6, 7, 8)),
    "grouped": lambda: (
        conv(6, 6, (3, 5), padding=(2, 2), dilation=(2, 1), groups=3),
        (3, 6, 7, 8),
    ),
    "depthwise": lambda: (conv(6, 6, 3, padding="same", groups=6), (3, 6, 7, 8)),
    "even and dilated": lambda: (conv(6, 6, (2, 4), padding=(1, 3), dilation=2), (3, 6, 7, 8)),
    "circular": lambda: (conv(6, 6, 3, padding=1, padding_mode="circular"), (3, 6, 7, 8)),
    "bordered": lambda: (
        merge(conv(6, 4, 3, padding=1), conv(4, 6, 5, padding=2)),
        (3, 6, 7, 8),
    ),
    "bordered, even and dilated": lambda: (
        merge(conv(6, 4, 2, padding=1, dilation=2), conv(4, 6, 3, padding=2, dilation=2)),
        (3, 6, 7, 8),
    ),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_a_skip_is_merged(kind):
    layer, shape = SKIPPED[kind]()
    x = draw(*shape)
    expected = x + layer(x)
    merged = merge_skip(layer)
    assert type(merged) is type(layer)
    assert apart(merged(x), expected) < TOLERANCE
    assert apart(x + layer(x), expected) == 0
    assert all(p.requires_grad and p.grad is None for p in merged.parameters())


# --- what is kept and what is refused ---------------------------------------------------------


def test_the_layers_given_stay_and_no_random_number_is_drawn():
    layers = [
        (conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)),
        (conv(2, 3, 1, bias=False), conv(3, 2, 1)),
        (nn.Linear(2, 3, bias=False), nn.Linear(3, 2)),
        (norm(nn.BatchNorm2d, 3), conv(3, 2, 3, padding=1)),
        (conv(2, 3, 1, bias=False), norm(nn.BatchNorm2d, 3)),
    ]
    before = copy.deepcopy([[m.state_dict() for m in pair] for pair in layers])
    state = torch.get_rng_state()
    merged = [merge(*pair, border=b) for pair in layers for b in ("exact", "interior")]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # what is new shares no memory with what was given
        for p in [p for m in merged for p in m.parameters()]:
            p.fill_(7)
    for pair, states in zip(layers, before, strict=True):
        for layer, values in zip(pair, states, strict=True):
            assert all(torch.equal(v, values[name]) for name, v in layer.state_dict().items())


def test_device_and_what_trains_carry_over():
    first = nn.Conv2d(2, 3, 3, padding=1, device="meta")
    second = nn.Conv2d(3, 4, 3, padding=1, device="meta")
    merged = merge(first, second)
    assert all(p.is_meta and p.requires_grad for p in merged.parameters())
    assert merged(torch.empty(1, 2, 8, 8, device="meta")).shape == (1, 4, 8, 8)
    for layer in (first, second):
        layer.requires_grad_(False)
    for border in ("exact", "interior"):
        assert not any(p.requires_grad for p in merge(first, second, border=border).parameters())
    for training in (True, False):
        second.train(training)
        assert [merge(first, second, border=b).training for b in ("exact", "interior")] == (
            [training] * 2
        )
    second.bias.requires_grad_(True)
    assert all(p.requires_grad for p in merge(first, second).parameters())


def masked(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def trained(layer):
    return layer.train()


BAD = {
    "channels": (lambda: merge(conv(2, 3, 1), conv(4, 2, 1)), ValueError, "gives 3.*takes 4"),
    "features": (lambda: merge(nn.Linear(2, 3), nn.Linear(4, 2)), ValueError, "gives 3.*takes 4"),
    "kinds": (lambda: merge(conv(2, 3, 1), nn.Linear(3, 2)), TypeError, "not Conv2d"),
    "kinds again": (lambda: merge(nn.Linear(3, 2), conv(2, 3, 1)), TypeError, "Linear does not"),
    "no layer": (lambda: merge(nn.ReLU(), conv(2, 3, 1)), TypeError, "ReLU does not"),
    "transposed": (
        lambda: merge(nn.ConvTranspose2d(2, 3, 1), nn.Conv2d(3, 2, 1)),
        TypeError,
        "transposed",
    ),
    "transposed, norm": (
        lambda: merge_norm(nn.ConvTranspose2d(2, 3, 1), nn.BatchNorm2d(3).eval()),
        TypeError,
        "transposed",
    ),
    "circular": (
        lambda: merge(conv(2, 3, 3, padding=1, padding_mode="circular"), conv(3, 2, 1)),
        ValueError,
        "padding_mode='circular'",
    ),
    "uneven same": (
        lambda: merge(conv(2, 3, 4, padding="same"), conv(3, 2, 1)),
        ValueError,
        "one side more",
    ),
    "border": (lambda: merge(conv(2, 3, 1), conv(3, 2, 1), border="no"), ValueError, "'no'"),
    "training norm": (
        lambda: merge_norm(conv(2, 3, 1), trained(norm(nn.BatchNorm2d, 3))),
        ValueError,
        "training mode",
    ),
    "training norm before": (
        lambda: merge(trained(norm(nn.BatchNorm2d, 3)), conv(3, 2, 1)),
        ValueError,
        "training mode",
    ),
    "no statistics": (
        lambda: merge_norm(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False).eval()),
        ValueError,
        "no running statistics",
    ),
    "another norm": (
        lambda: merge_norm(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3)),
        TypeError,
        "must be BatchNorm2d, not GroupNorm",
    ),
    "norm of other dimensions": (
        lambda: merge(nn.Conv2d(2, 3, 1), nn.BatchNorm1d(3).eval()),
        TypeError,
        "must be BatchNorm2d, not BatchNorm1d",
    ),
    "norm of other channels": (
        lambda: merge_norm(conv(2, 3, 1), norm(nn.BatchNorm2d, 4)),
        ValueError,
        "gives 3.*takes 4",
    ),
    "masked": (
        lambda: merge(conv(2, 3, 1), masked(conv(3, 2, 1))),
        ValueError,
        "masks.make_permanent",
    ),
    "masked, norm": (
        lambda: merge_norm(masked(conv(2, 3, 1)), norm(nn.BatchNorm2d, 3)),
        ValueError,
        "masks.make_permanent",
    ),
    "masked, skip": (
        lambda: merge_skip(masked(nn.Linear(3, 3))),
        ValueError,
        "masks.make_permanent",
    ),
    "parametrised": (
        lambda: merge(parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 2)),
        ValueError,
        "parametrisation",
    ),
    "lazy": (lambda: merge(nn.LazyLinear(3), nn.Linear(3, 2)), ValueError, "no weight yet"),
    "lazy norm": (
        lambda: merge_norm(nn.Linear(2, 3), nn.LazyBatchNorm1d().eval()),
        ValueError,
        "no weight yet",
    ),
    "lazy convolution": (
        lambda: merge(nn.Conv2d(2, 3, 1), nn.LazyConv2d(3, 1)),
        ValueError,
        "no weight yet",
    ),
    "a forward of its own": (
        lambda: merge(Scaled(2, 3, 1), nn.Conv2d(3, 2, 1)),
        TypeError,
        "Scaled does something else",
    ),
    "precision": (
        lambda: merge(nn.Conv2d(2, 3, 1), conv(3, 2, 1)),
        ValueError,
        "same dtype and device",
    ),
    "three": (
        lambda: merge(merge(conv(2, 3, 3), conv(3, 2, 3, padding=1)), conv(2, 3, 1)),
        TypeError,
        "no third",
    ),
    "skip, channels": (lambda: merge_skip(conv(2, 3, 1)), ValueError, "keeps the shape"),
    "skip, size": (lambda: merge_skip(conv(3, 3, 3)), ValueError, "keeps the shape"),
    "skip, stride": (
        lambda: merge_skip(conv(3, 3, 3, stride=2, padding=1)),
        ValueError,
        "keeps the shape",
    ),
    "skip, features": (lambda: merge_skip(nn.Linear(3, 2)), ValueError, "keeps the shape"),
    "skip, no layer": (lambda: merge_skip(nn.ReLU()), TypeError, "not ReLU"),
    "width": (lambda: border_width(conv(2, 3, 1), conv(4, 2, 1)), ValueError, "gives 3.*takes 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_merged_is_refused_in_one_sentence(case):
    wrong, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        wrong()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


def test_an_input_too_small_for_the_first_layer_is_refused():
    merged = merge(conv(2, 3, 3), conv(3, 2, 3, padding=4))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        merged(draw(1, 2, 2, 5))
