"""The zoo: small networks of the papers, and the usual larger ones fit for small images."""

import difflib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn


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
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}.")
    family, _, inner = name.partition(":")
    make: Callable[[int, int, int], nn.Module]
    if inner and family in _LIBRARIES:
        library = _LIBRARIES[family]
        make = lambda *shape: library(inner, *shape)  # noqa: E731
    elif name in _ZOO:
        make, smallest = _ZOO[name]
        if image_size < smallest:
            raise ValueError(
                f"{name} needs images of at least {smallest} x {smallest} pixels, got image_size="
                f"{image_size}: load the data with image_size={smallest} or more."
            )
    else:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is like it."
        raise ValueError(
            f"There is no model {name!r} (known: {', '.join(NAMES)}, torchvision:NAME, "
            f"timm:NAME); {hint}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make(classes, in_channels, image_size)


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


_LIBRARIES: dict[str, Callable[[str, int, int, int], nn.Module]] = {}

# name -> (maker, smallest image in pixels)
_ZOO: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    "lenet_300_100": (_lenet_300_100, 1),
    "lenet5": (_lenet5, 16),
}

NAMES = tuple(_ZOO)
