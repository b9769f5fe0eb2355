"""The zoo: the papers' counts, the libraries' own networks as oracles, clear refusals."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning101.core import models


def example(name, size=32, channels=3, n=2):
    images = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))
    return (images, torch.arange(n), torch.arange(n)) if name == "dit_tiny" else (images,)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, size=32, channels=3):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size))
    return counter.get_total_flops() / 2


def small(name, **options):
    """As on MNIST for the networks of MNIST, as on CIFAR for the others."""
    shape = {"in_channels": 1, "image_size": 28} if name.startswith("lenet") else {}
    return models.build(name, **{**shape, **options})


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lenet_300_100", 266_610),
        ("lenet5", 431_080),
        ("conv2", 4_301_642),
        ("conv4", 2_425_930),
        ("conv6", 2_262_602),  # the paper prints 1.7 M, which its own layers do not give
        ("resnet18", 11_173_962),
        ("resnet20", 272_474),  # with option A: 269,722
        ("resnet32", 466_906),  # with option A: 464,154
        ("resnet56", 855_770),
        ("vgg11_bn", 9_231_114),
        ("vgg16_bn", 14_728_266),
        ("mobilenet_v2", 2_236_682),
    ],
)
def test_parameters_of_the_papers(name, count):
    assert parameters(small(name)) == count


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 140.19),
        ("mobilenet_v2", 87.98),
        ("resnet20", 40.81),
        ("resnet32", 69.12),
        ("resnet56", 125.75),
        ("vgg16_bn", 313.20),
    ],
)
def test_macs_of_the_papers(name, millions):
    assert round(macs(small(name)) / 1e6, 2) == millions


def test_resnet18_without_its_removable_blocks():
    model = models.build("resnet18")
    for stage in (1, 2, 3, 4):
        model.get_submodule(f"layer{stage}")[1] = nn.Identity()
    assert round(macs(model) / 1e6, 2) == 64.69
    assert parameters(model) == 4_903_242


def test_he_et_als_parameters_within_one_percent():
    assert parameters(models.build("resnet20")) == pytest.approx(0.27e6, rel=0.01)
    assert parameters(models.build("resnet56")) == pytest.approx(0.85e6, rel=0.01)


def test_dit_is_small():
    assert parameters(models.build("dit_tiny")) < 3e6


# --- the libraries as oracles --------------------------------------------------------------------


def same_function(ours, theirs, size, channels=3, forget=()):
    """Give both the same weights and random norm statistics, and compare what they compute."""
    generator = torch.Generator().manual_seed(0)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 10)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    state = {k: v for k, v in theirs.state_dict().items() if k not in forget}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == set(forget)
    (x,) = example("", size, channels)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_resnet18_is_torchvisions_with_another_stem():
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    same_function(models.build("resnet18"), theirs, 32)


def test_vgg_is_torchvisions_with_another_head():
    from torchvision.models import vgg11_bn

    theirs = vgg11_bn(init_weights=False)
    theirs.avgpool, theirs.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    ours = models.build("vgg11_bn")
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    same_function(ours, theirs, 32)


def test_vit_is_timms():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    same_function(models.build("vit_tiny", image_size=224), theirs, 224)
    assert parameters(models.build("vit_tiny", image_size=224, classes=1000)) == 5_717_416


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_t", "vgg11_bn"])
def test_large_images_get_the_published_network(name):
    """As many parameters and MACs as torchvision publishes."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name).DEFAULT.meta
    model = models.build(name, classes=1000, image_size=224)
    assert parameters(model) == published["num_params"]
    if name != "swin_t":  # the flop counter does not see the products inside its attention
        assert macs(model, 224) / 1e9 == pytest.approx(published["_ops"], abs=6e-4)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "squeezenet1_0"],
)
def test_torchvisions_own_counts(name):
    from torchvision.models import get_model_weights

    model = models.build(f"torchvision:{name}", classes=1000, image_size=224)
    assert parameters(model) == get_model_weights(name).DEFAULT.meta["num_params"]


def test_torchvision_vit_takes_the_image_size():
    model = models.build("torchvision:vit_b_16", image_size=32, in_channels=1)
    assert model(example("", 32, 1)[0]).shape == (2, 10)


@pytest.mark.parametrize("inner", ["resnet18", "vit_tiny_patch16_224"])
def test_timm(inner):
    timm = pytest.importorskip("timm")
    model = models.build(f"timm:{inner}", classes=7, in_channels=1, image_size=64)
    assert model(example("", 64, 1)[0]).shape == (2, 7)
    whole = models.build(f"timm:{inner}", classes=1000, image_size=224)
    assert parameters(whole) == parameters(timm.create_model(inner))


# --- every name ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMES)
def test_every_network(name):
    """Shapes, seeds, gradients to every parameter, one activation module a use."""
    before = torch.random.get_rng_state()
    model = models.build(name, classes=7, in_channels=1, image_size=32, seed=3)
    again = models.build(name, classes=7, in_channels=1, image_size=32, seed=3)
    other = models.build(name, classes=7, in_channels=1, image_size=32, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    weights = zip(model.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    assert model.training

    calls = {}
    for path, module in model.named_modules():
        assert not getattr(module, "inplace", False)
        if isinstance(module, nn.ReLU | nn.ReLU6 | nn.GELU | nn.SiLU):
            calls[path] = 0
            module.register_forward_hook(
                lambda *_, path=path: calls.update({path: calls[path] + 1})
            )
    inputs = example(name, 32, 1)
    out = model(*inputs)
    assert out.shape == (inputs[0].shape if name == "dit_tiny" else (2, 7))
    assert set(calls.values()) == {1}
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", models.NAMES)
def test_smallest_image(name):
    smallest = models._ZOO[name][1]
    model = models.build(name, image_size=smallest).eval()
    assert len(model(*example(name, smallest))) == 2
    if smallest > 1:
        with pytest.raises(ValueError, match=f"{name} needs images of at least {smallest} x"):
            models.build(name, image_size=smallest - 1)


@pytest.mark.parametrize("name", ["swin_t", "vit_tiny", "dit_tiny", "resnet20", "conv4", "lenet5"])
@pytest.mark.parametrize("size", [28, 50])
def test_other_sizes(name, size):
    inputs = example(name, size)
    assert len(models.build(name, image_size=size).eval()(*inputs)) == 2


def test_activation_counts_of_the_papers():
    """EASIER (Quetu et al. 2024) finds 17, 35 and 12 candidates in these three."""
    for name, count in (("resnet18", 17), ("mobilenet_v2", 35), ("swin_t", 12)):
        modules = models.build(name).modules()
        assert sum(isinstance(m, nn.ReLU | nn.ReLU6 | nn.GELU) for m in modules) == count


# --- the diffusion transformer -------------------------------------------------------------------


def stirred(model):
    """Give the layers that start at zero some weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def test_dit_blocks_start_as_the_identity():
    model = models.build("dit_tiny")
    tokens, condition = torch.randn(2, 64, 128), torch.randn(2, 128)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert not model(*example("dit_tiny")).any()


def test_dit_depends_on_time_and_label_and_place():
    model = stirred(models.build("dit_tiny", classes=3))
    images, times, labels = example("dit_tiny")
    out = model(images, times, labels)
    assert not torch.allclose(out, model(images, times + 100, labels), atol=1e-3)
    assert not torch.allclose(out, model(images, times, labels + 1), atol=1e-3)
    assert model(images, times, torch.tensor([3, 3])).shape == out.shape  # 3: no class
    # each image of a batch is on its own
    torch.testing.assert_close(out[1:], model(images[1:], times[1:], labels[1:]))
    rolled = model(images.roll(4, dims=-1), times, labels)
    assert not torch.allclose(out.roll(4, dims=-1), rolled, atol=1e-3)


@pytest.mark.parametrize(("size", "patch"), [(8, 4), (28, 4), (32, 4), (10, 2), (9, 1)])
def test_dit_patches_are_four_pixels_where_that_divides_the_image(size, patch):
    model = models.build("dit_tiny", classes=2, in_channels=1, image_size=size)
    assert model.patch_embed.kernel_size == (patch, patch)
    assert len(model.places) == (size // patch) ** 2
    images = torch.randn(2, 1, size, size)
    assert model(images, torch.tensor([0, 9]), torch.tensor([0, 1])).shape == images.shape


def test_dit_puts_patches_back_in_place():
    """With blocks that do nothing, a patch of the output depends on that patch of the input."""
    model = stirred(models.build("dit_tiny"))
    model.blocks = nn.ModuleList()
    images, times, labels = example("dit_tiny")
    changed = images.clone()
    changed[:, 1, 9, 22] += 1  # the patch of rows 8 to 11 and columns 20 to 23
    difference = (model(images, times, labels) - model(changed, times, labels)).abs().sum((0, 1))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:12, 20:24] = True
    assert (difference[inside] > 1e-4).all()
    assert difference[~inside].max() < 1e-5


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lenet300", "no model 'lenet300'.*did you mean 'lenet_300_100'"),
        ("ResNet-18", "did you mean 'resnet18'"),
        ("torchvision:resnet19", "no torchvision model 'resnet19'; did you mean.*resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no torchvision model"),
        ("timm:vit_tinny", "no timm model"),
        ("keras:x", "no model 'keras:x'"),
        ("torchvision:", "no model 'torchvision:'"),
        ("torchvision:alexnet", "does not take images of 3 x 32 x 32.*larger image_size"),
    ],
)
def test_refused(name, match):
    with pytest.raises(ValueError, match=match) as caught:
        models.build(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["classes", "in_channels", "image_size"])
def test_counts_must_be_positive(what):
    with pytest.raises(ValueError, match=f"{what} must be at least 1, got 0"):
        models.build("lenet5", **{what: 0})
    for value in (2.5, "3"):
        with pytest.raises(ValueError, match=f"{what} must be at least 1, got .*whole number"):
            models.build("lenet5", **{what: value})


def test_torchvisions_transformers_refuse_a_size_in_one_sentence():
    with pytest.raises(ValueError, match="cannot be made for images of 30 x 30"):
        models.build("torchvision:vit_b_16", image_size=30)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install pruning101\[timm\]"):
        models.build("timm:resnet18")
