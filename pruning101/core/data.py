"""Datasets as tensors: `load` gives train, valid and test images, whatever they come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning101.core.sources import (
    Pair,
    check,
    convert,
    cut,
    default_root,
    read_file,
    read_folder,
    resize,
    size_of_cut,
)

__all__ = ["Batches", "Dataset", "Split", "convert", "default_root", "from_tensors", "load"]

_NO_MIRROR = ("digits", "mnist")  # a mirrored digit is another sign, or none


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a dataset: `images` uint8 [N, C, H, W] and `labels` int64 [N], on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {' x '.join(map(str, self.images.shape[1:]))})"


class Batches:
    """Normalised batches of one split: iterate as often as you like, it gives the same each time.

    Each batch is `(images, labels)`: float32 [B, C, H, W], of mean 0 and standard deviation 1 over
    the train images, and int64 [B], both on the device of the tensors it was made from. The order
    and the augmentation are drawn on the CPU, so that a seed means the same on every device.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        augment: bool = False,
        mirror: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.shuffle, self.augment, self.mirror = shuffle, augment, mirror
        device = split.images.device
        # (x / 255 - mean) / std = (x - 255 mean) * 1 / (255 std): two passes over the batch
        self._shift = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)  # [C, 1, 1]
        self._scale = 1 / (255 * torch.tensor(std, device=device).view(-1, 1, 1))

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.split.images, self.split.labels
        generator = torch.Generator().manual_seed(self.seed)
        if self.shuffle:
            order = torch.randperm(len(labels), generator=generator).to(images.device)
        for start in range(0, len(labels), self.batch_size):
            here = slice(start, start + self.batch_size)
            if self.shuffle:
                x, y = images.index_select(0, order[here]), labels.index_select(0, order[here])
            else:
                x, y = images[here], labels[here]
            if self.augment:
                x = _crop_and_flip(x, generator, mirror=self.mirror)
            yield torch.sub(x, self._shift).mul_(self._scale), y

    def __repr__(self) -> str:
        return f"Batches({len(self)} x {self.batch_size} of {self.split!r})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train, valid and test images, the names of the classes, and how to normalise.

    `mean` and `std` hold one value a channel, of the train images scaled to [0, 1]. Decisions
    (rank, threshold, when to stop) use `valid`; `test` is only ever reported. `mirror` says whether
    a mirrored image keeps its class, which augmentation asks.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool = True
    _moved: dict[tuple[str, str], Split] = field(default_factory=dict, init=False, repr=False)

    def batches(
        self,
        split: str = "train",
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batches:
        """Return normalised `(images, labels)` batches of a split, on `device`.

        The split is moved to the device once and stays there. `shuffle` and `augment` (a random
        shift by up to 1/8 of the size, and a mirror image for half of the images where the classes
        allow it) draw from `seed` alone: one seed, the same batches.
        """
        if split not in ("train", "valid", "test"):
            raise ValueError(f"split must be 'train', 'valid' or 'test', got {split!r}.")
        here: Split = getattr(self, split)
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one
        if device.type != "cpu":
            key = (split, str(device))
            if key not in self._moved:
                self._moved[key] = Split(here.images.to(device), here.labels.to(device))
            here = self._moved[key]
        return Batches(
            here,
            batch_size,
            mean=self.mean,
            std=self.std,
            shuffle=shuffle,
            augment=augment,
            mirror=self.mirror,
            seed=seed,
        )

    def subset(
        self, train: int | None = None, valid: int | None = None, test: int | None = None
    ) -> "Dataset":
        """Return the dataset with only the first n images of each split that is named."""
        parts = []
        for part, whole, n in (
            ("train", self.train, train),
            ("valid", self.valid, valid),
            ("test", self.test, test),
        ):
            if n is not None and not (isinstance(n, Integral) and 1 <= n <= len(whole)):
                raise ValueError(
                    f"{part} of {self.name} has {len(whole)} images: ask for 1 to {len(whole)} "
                    f"of them, not {n!r}."
                )
            if n is not None:  # copied: a view would take the whole along to wherever it is sent
                whole = Split(whole.images[:n].clone(), whole.labels[:n].clone())
            parts.append(whole)
        return replace(self, train=parts[0], valid=parts[1], test=parts[2])

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_moved": {}}  # what lies on a device stays with this process

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.train.images.shape[1:]))
        return (
            f"Dataset({self.name}: {len(self.train)} train, {len(self.valid)} valid, "
            f"{len(self.test)} test images of {size}, {len(self.classes)} classes)"
        )


def load(
    name: str = "digits",
    root: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a dataset by name, downloading and converting it the first time.

    Args:
        name: `digits` (embedded), `mnist`, `fashion_mnist`, `cifar10`, `cifar100`, `tiny_imagenet`,
            or `folder:PATH` for a tree of images in one folder a class, either under `train/`,
            `val/` (or `valid/`) and `test/` or straight under PATH.
        root: where `<name>.safetensors` is or will be; by default `$PRUNING101_DATA`, else
            `pruning101` in the user's cache folder.
        image_size: images are resized to this many pixels a side (bilinear; what is not square is
            cropped to its centre); by default they keep their own size.
        channels: 3 repeats a grey channel, 1 takes the luminance of colours; by default as stored.
        seed: moves the cut between train and valid, stratified by class; never touches test.

    Raises:
        ValueError: the name is unknown, or the file is damaged or not one of ours.
        OSError: nothing there and no way to fetch it: no network (ConnectionError), no such path
            (FileNotFoundError), no write permission (PermissionError), disk full.
    """
    if not isinstance(name, str):
        raise TypeError(f'name must be that of a data set, as "digits", not {name!r}.')
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}.")
    if image_size is not None and (not isinstance(image_size, Integral) or image_size < 1):
        raise ValueError(
            f"image_size must be at least 1 pixel, a whole number, got {image_size!r}."
        )
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, not {seed!r}.")
    valid: Pair | None
    if name.startswith("folder:"):
        train, valid, test, classes = read_folder(Path(name[7:]).expanduser(), image_size)
    else:
        train, test, classes = read_file(convert(name, root))
        valid = None
    if valid is None:
        # digits are few: 287 of 1,437 make a steadier judge than 144 would
        share = 0.2 if name == "digits" else 0.1
        rest, chosen = cut(train[1], size_of_cut(len(train[1]), share), seed)
        train, valid = (train[0][rest], train[1][rest]), (train[0][chosen], train[1][chosen])
    train, valid, test = (
        (_with_channels(resize(images, image_size), channels), labels)
        for images, labels in (train, valid, test)
    )
    data = from_tensors(name, train, valid, test, classes=classes)
    return replace(data, mirror=name not in _NO_MIRROR)


def from_tensors(
    name: str,
    train: Pair,
    valid: Pair,
    test: Pair,
    *,
    classes: Sequence[str],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """Make a dataset of one's own tensors.

    Each split is (images uint8 [N, C, H, W], labels int64 [N]). `mean` and `std` of the channels
    are measured on the train images unless given.

    Raises:
        TypeError: images are not uint8, or labels not int64.
        ValueError: shapes do not fit each other, or a label has no class.
    """
    for part, (images, labels) in (("train", train), ("valid", valid), ("test", test)):
        check(f"{part} of {name}", images, labels, len(classes))
        if images.shape[1:] != train[0].shape[1:]:
            raise ValueError(
                f"All splits of {name} must have images of one shape, but train has "
                f"{list(train[0].shape[1:])} and {part} {list(images.shape[1:])}."
            )
    measured_mean, measured_std = _statistics(train[0])
    mean = measured_mean if mean is None else tuple(mean)
    std = measured_std if std is None else tuple(std)
    n = train[0].shape[1]
    if len(mean) != n or len(std) != n or min(std) <= 0:
        raise ValueError(
            f"mean and std of {name} need one value for each of its {n} channels, std above 0; "
            f"got mean={mean}, std={std}."
        )
    return Dataset(
        name, Split(*train), Split(*valid), Split(*test), tuple(classes), mean=mean, std=std
    )


# --- images --------------------------------------------------------------------------------------


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, on the scale [0, 1].

    A histogram of the 256 values is exact and needs no copy in floating point.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for c in range(images.shape[1]):
        share = torch.bincount(images[:, c].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        std = (share * (values - mean).square()).sum().sqrt()
        means.append(float(mean))
        stds.append(float(std) or 1.0)  # a constant channel is only shifted
    return tuple(means), tuple(stds)


def _with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Repeat a grey channel three times, or take the luminance of colours (ITU-R BT.601)."""
    have = images.shape[1]
    if channels in (None, have):
        return images
    if have == 1:
        return images.repeat(1, 3, 1, 1)
    if have != 3:
        raise ValueError(
            f"Images of {have} channels cannot be made grey or colour: leave channels=None."
        )
    weights = torch.tensor([0.299, 0.587, 0.114])
    pieces = [
        (piece.movedim(1, -1).float() @ weights).round().byte() for piece in images.split(1024)
    ]
    return torch.cat(pieces).unsqueeze(1)


def _crop_and_flip(images: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Shift each image by up to 1/8 of its size over a black border, and mirror half of them.

    Draws on the CPU and gathers every pixel of the batch at once. 1/8 is 4 of 32 pixels, the
    padding of He et al. 2016 for CIFAR (section 4.2).
    """
    n, channels, height, width = images.shape
    device = images.device
    rows, cols = (
        torch.arange(size) + torch.randint(2 * pad + 1, (n, 1), generator=generator)  # [N, size]
        for size, pad in ((height, _border(height)), (width, _border(width)))
    )
    if mirror:
        flip = torch.rand(n, 1, generator=generator) < 0.5
        cols = torch.where(flip, cols.flip(1), cols)
    padded = F.pad(images, (_border(width),) * 2 + (_border(height),) * 2)
    return padded[
        torch.arange(n, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.to(device)[:, None, :, None],
        cols.to(device)[:, None, None, :],
    ]  # [N, C, H, W]


def _border(size: int) -> int:
    return (size + 4) // 8
