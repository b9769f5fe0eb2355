"""The zoo: small networks of the papers, and the usual larger ones fit for small images."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core.transformers import DiT, ViT


def build(
    name: str, *, classes: int = 10, in_channels: int = 3, image_size: int = 32, seed: int = 0
) -> nn.Module:
    """Build an untrained network; the same seed gives the same weights.

    Args:
        name: one of `NAMES`, or `torchvision:NAME` or `timm:NAME` for any classifier of theirs.
        classes: number of outputs.
        in_channels: channels of the input, 1 for grey and 3 for colour.
        image_size: height and width of the input in pixels.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ValueError: the name is unknown, or the images are too small for the network.
        ImportError: `timm:NAME` without timm.
    """
    for what, value in (
        ("classes", classes),
        ("in_channels", in_channels),
        ("image_size", image_size),
    ):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{what} must be at least 1, got {value!r}: give a whole number.")
    family, _, inner = name.partition(":")
    make: Callable[[int, int, int], nn.Module]
    if inner and family in _LIBRARIES:
        make = partial(_LIBRARIES[family], inner)
    elif name in _ZOO:
        make, smallest = _ZOO[name]
        if image_size < smallest:
            raise ValueError(
                f"{name} needs images of at least {smallest} x {smallest} pixels, got image_size="
                f"{image_size}: load the data with image_size={smallest} or more."
            )
    else:
        listed = f" (known: {', '.join(NAMES)}, torchvision:NAME, timm:NAME)"
        raise ValueError(_unknown("model", name, NAMES, listed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = make(classes, in_channels, image_size)
        except AssertionError as error:  # how torchvision's transformers refuse a size
            raise ValueError(
                f"{name} cannot be made for images of {image_size} x {image_size} pixels "
                f"({str(error).rstrip('.!')}): try another image_size, such as 224."
            ) from None
    if inner:
        _check_runs(name, model, (in_channels, image_size, image_size), classes)
    for module in model.modules():
        if hasattr(module, "inplace"):
            vars(module)["inplace"] = (
                False  # what a hook keeps of an activation's input stays as it was
            )
    return model


# --- the networks of the papers ------------------------------------------------------------------


def _lenet_300_100(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """LeCun et al. 1998: two hidden layers of 300 and 100 units; 266,610 parameters on MNIST."""
    layers = OrderedDict[str, nn.Module](
        flatten=nn.Flatten(),
        fc1=nn.Linear(in_channels * image_size**2, 300),
        relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(),
        fc3=nn.Linear(100, classes),
    )
    return nn.Sequential(layers)


def _lenet5(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The 20-50-500 variant that pruning papers call LeNet-5; 431,080 parameters on MNIST."""
    side = ((image_size - 4) // 2 - 4) // 2  # 28 -> 24 -> 12 -> 8 -> 4
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(in_channels, 20, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * side**2, 500),
        relu3=nn.ReLU(),
        fc2=nn.Linear(500, classes),
    )
    return nn.Sequential(layers)


def _conv_n(groups: int, classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Conv-2, Conv-4 and Conv-6 of Frankle and Carbin 2019, figure 2: pairs of 3x3 convolutions.

    On CIFAR 4.3 M, 2.4 M and 2.26 M parameters. The figure prints 1.7 M for Conv-6, which the
    layers that it lists do not give: the first linear layer alone has 4096 x 256.
    """
    layers = OrderedDict[str, nn.Module]()
    width, n = in_channels, 0
    for group in range(groups):
        for _ in range(2):
            n += 1
            layers[f"conv{n}"] = nn.Conv2d(width, 64 * 2**group, 3, padding=1)
            layers[f"relu{n}"] = nn.ReLU()
            width = 64 * 2**group
        layers[f"pool{group + 1}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    sizes = (width * (image_size // 2**groups) ** 2, 256, 256, classes)
    for k in (1, 2, 3):
        layers[f"fc{k}"] = nn.Linear(sizes[k - 1], sizes[k])
        if k < 3:
            layers[f"relu{n + k}"] = nn.ReLU()
    return nn.Sequential(layers)


# --- residual networks ---------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    Where the shape changes the shortcut is a strided 1x1 convolution (option B).
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            project = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(width))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, width, H / stride, W / stride]."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(inner + self.downsample(x))


def _resnet(
    widths: tuple[int, ...], blocks: int, pool: nn.Module | None, classes: int, channels: int
) -> nn.Module:
    """A 3x3 stem, a stage of blocks for each width, of which all but the first halve the image."""
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(),
    )
    if pool is not None:
        layers["maxpool"] = pool
    before = widths[0]
    for stage, width in enumerate(widths, start=1):
        first = BasicBlock(before, width, stride=1 if stage == 1 else 2)
        rest = [BasicBlock(width, width, stride=1) for _ in range(blocks - 1)]
        layers[f"layer{stage}"] = nn.Sequential(first, *rest)
        before = width
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(before, classes)
    model = nn.Sequential(layers)
    _init_convolutions(model)
    return model


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet18(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """He et al. 2016 with a 3x3 stem of stride 1 and the max-pool kept: 140.19 M MACs at 32x32."""
    return _resnet((64, 128, 256, 512), 2, nn.MaxPool2d(3, 2, padding=1), classes, in_channels)


def _resnet_cifar(blocks: int, classes: int, in_channels: int, image_size: int) -> nn.Module:
    """He et al. 2016, section 4.2, of 6 * blocks + 2 layers.

    With option B's projections in place of the paper's option A (channels padded with zeros): the
    1 % more parameters buy a network in which every channel of a stage can be pruned, while of
    padded channels the later ones have no counterpart before the padding.
    """
    return _resnet((16, 32, 64), blocks, None, classes, in_channels)


# --- torchvision's, fit for small images ---------------------------------------------------------

_SMALL = 64  # images up to this side get the small-image variant


def _vgg(depth: int, classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Simonyan and Zisserman 2015; small images go from 512 features straight to the classes."""
    from torchvision.models import vgg

    if image_size > _SMALL:
        whole = getattr(vgg, f"vgg{depth}_bn")(weights=None, num_classes=classes)
        return _with_in_channels(whole, in_channels)
    plan = vgg.cfgs[{11: "A", 16: "D"}[depth]]
    layers = OrderedDict[str, nn.Module](
        features=vgg.make_layers(plan, batch_norm=True),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(512, classes),
    )
    model = nn.Sequential(layers)
    _init_convolutions(model)
    return _with_in_channels(model, in_channels)


def _mobilenet_v2(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Sandler et al. 2018; for small images neither the stem nor the second stage has a stride."""
    from torchvision.models import MobileNetV2

    stride = 1 if image_size <= _SMALL else 2
    stages = [  # expansion, width, blocks, stride: table 2 of the paper
        [1, 16, 1, 1],
        [6, 24, 2, stride],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model = MobileNetV2(num_classes=classes, inverted_residual_setting=stages)
    model.get_submodule("features.0.0").stride = (stride, stride)  # type: ignore[assignment]
    return _with_in_channels(model, in_channels)


def _swin_t(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Liu et al. 2021; small images are cut into 8 to 16 patches a side, in windows of 4 x 4."""
    from torchvision.models import SwinTransformer

    small = image_size <= _SMALL
    patch = next(p for p in (1, 2, 4) if image_size <= 16 * p or p == 4)
    model = SwinTransformer(
        patch_size=[patch, patch],
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[4, 4] if small else [7, 7],
        stochastic_depth_prob=0.0 if small else 0.2,
        num_classes=classes,
    )
    return _with_in_channels(model, in_channels)


# --- any classifier of the libraries -------------------------------------------------------------


def _from_torchvision(inner: str, classes: int, in_channels: int, image_size: int) -> nn.Module:
    from torchvision import models as zoo

    known = zoo.list_models(module=zoo)
    if inner not in known:
        raise ValueError(_unknown("torchvision model", inner, known))
    options: dict[str, Any] = {"num_classes": classes, "weights": None}
    if inner.startswith("vit_"):
        options["image_size"] = image_size
    if inner in ("googlenet", "inception_v3"):  # plain classifiers, without the side outputs
        options.update(aux_logits=False, init_weights=True)
    return _with_in_channels(zoo.get_model(inner, **options), in_channels)


def _from_timm(inner: str, classes: int, in_channels: int, image_size: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ImportError(
            f"timm:{inner} needs the package timm: install it with `pip install pruning101[timm]`."
        ) from None
    if not timm.is_model(inner):
        raise ValueError(_unknown("timm model", inner, timm.list_models()))
    options: dict[str, Any] = {"num_classes": classes, "in_chans": in_channels}
    pretrained = timm.get_pretrained_cfg(inner)
    if pretrained is not None and pretrained.fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(inner, pretrained=False, **options)


def _with_in_channels(model: nn.Module, in_channels: int) -> nn.Module:
    """Let the stem take other than 3 channels, its initial weights those of the colours in turn."""
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    if in_channels != stem.in_channels:
        turns = torch.arange(in_channels) % stem.in_channels
        stem.weight = nn.Parameter(stem.weight.detach()[:, turns])
        stem.in_channels = in_channels
    return model


def _check_runs(name: str, model: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Run the model on shapes alone, so that what does not fit is told now and in one sentence."""
    state = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
    training = model.training
    try:
        images = torch.empty(2, *shape, device="meta")
        with torch.no_grad():
            out = torch.func.functional_call(model.eval(), state, (images,))
        if out.shape != (2, classes):
            raise ValueError(f"it gives {list(out.shape)}, not [2, {classes}]")
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{name} does not take images of {' x '.join(map(str, shape))} ({reason}): "
            "try a larger image_size, such as 224."
        ) from None
    finally:
        model.train(training)


def _unknown(kind: str, name: str, known: Sequence[str], listed: str = "") -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none has a name like it."
    return f"There is no {kind} {name!r}{listed}; {hint}"


_LIBRARIES: dict[str, Callable[[str, int, int, int], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}

# name -> (maker, smallest image in pixels)
_ZOO: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    "lenet_300_100": (_lenet_300_100, 1),
    "lenet5": (_lenet5, 16),
    "conv2": (partial(_conv_n, 1), 2),
    "conv4": (partial(_conv_n, 2), 4),
    "conv6": (partial(_conv_n, 3), 8),
    "resnet18": (_resnet18, 8),
    "resnet20": (partial(_resnet_cifar, 3), 4),
    "resnet32": (partial(_resnet_cifar, 5), 4),
    "resnet56": (partial(_resnet_cifar, 9), 4),
    "vgg11_bn": (partial(_vgg, 11), 32),
    "vgg16_bn": (partial(_vgg, 16), 32),
    "mobilenet_v2": (_mobilenet_v2, 8),
    "swin_t": (_swin_t, 8),
    "vit_tiny": (ViT, 8),
    "dit_tiny": (DiT, 8),
}

NAMES = tuple(_ZOO)
