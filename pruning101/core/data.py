"""Datasets as tensors: one call, `load`, gives train, valid and test images whatever they come from."""

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

_EMBEDDED = Path(__file__).with_name("digits.safetensors")
_TORCHVISION = {  # name here -> class in torchvision.datasets
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
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
        device = torch.device(device)
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
        parts = {}
        for part, n in (("train", train), ("valid", valid), ("test", test)):
            whole: Split = getattr(self, part)
            if n is not None and not 1 <= n <= len(whole):
                raise ValueError(
                    f"{part} of {self.name} has {len(whole)} images: ask for 1 to {len(whole)} "
                    f"of them, not {n}."
                )
            parts[part] = Split(whole.images[:n], whole.labels[:n])
        return replace(self, **parts)

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
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
    if name.startswith("folder:"):
        train, valid, test, classes = _read_folder(Path(name[7:]).expanduser(), image_size)
    else:
        train, test, classes = _read_file(convert(name, root))
        valid = None
    if valid is None:
        # digits are few: 287 of 1,437 make a steadier judge than 144 would
        rest, chosen = _cut(
            train[1], round((0.2 if name == "digits" else 0.1) * len(train[1])), seed
        )
        train, valid = (
            (train[0][rest], train[1][rest]),
            (train[0][chosen], train[1][chosen]),
        )
    splits = [
        (_with_channels(_resize(images, image_size), channels), labels)
        for images, labels in (train, valid, test)
    ]
    data = from_tensors(name, *splits, classes=classes)
    return replace(data, mirror=name not in _NO_MIRROR)


def from_tensors(
    name: str,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: tuple[str, ...] | list[str],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """Make a dataset of one's own tensors; each split is images uint8 [N, C, H, W], labels int64 [N].

    Raises:
        TypeError: images are not uint8, or labels not int64.
        ValueError: shapes do not fit each other, or a label has no class.
    """
    parts = {"train": train, "valid": valid, "test": test}
    for part, (images, labels) in parts.items():
        _check(f"{part} of {name}", images, labels, len(classes))
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
    splits = {part: Split(images, labels) for part, (images, labels) in parts.items()}
    return Dataset(name, **splits, classes=tuple(classes), mean=mean, std=std)


def convert(name: str, root: str | Path | None = None, progress: bool = True) -> Path:
    """Make `<root>/<name>.safetensors`, unless it is there, and return its path.

    The file has the keys `train_images`, `train_labels`, `test_images`, `test_labels`, and the
    metadata `classes` (JSON) and `source`. It appears whole or not at all: what is downloaded and
    written lies in a temporary folder beside it until the last byte is on the disk.

    Raises: as `load`.
    """
    if name == "digits":
        return _EMBEDDED
    if name not in (*_TORCHVISION, "tiny_imagenet"):
        raise ValueError(_unknown(name))
    folder = default_root() if root is None else Path(root).expanduser()
    path = folder / f"{name}.safetensors"
    if path.exists():
        return path
    with _told(name, path), _temporary(folder, name) as scratch:
        if name == "tiny_imagenet":
            tensors, metadata = _tiny_imagenet(folder / "tiny-imagenet-200", progress)
        else:
            tensors, metadata = _from_torchvision(name, scratch, progress)
        part = scratch / path.name
        save_file(tensors, part, metadata)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        plain = scratch / "plain"
        plain.touch()
        shutil.copymode(plain, part)  # readable as files are here: safetensors writes them private
        os.replace(part, path)
    return path


def default_root() -> Path:
    """Return the folder of converted datasets: `$PRUNING101_DATA`, else in the user's cache."""
    given = os.environ.get("PRUNING101_DATA")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruning101"


# --- reading -------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    mend = f"delete or replace {path}, then run `pruning101 data {path.stem}`"
    try:
        with safetensors.safe_open(path, "pt") as file:
            missing = [key for key in _KEYS if key not in file.keys()]  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in _KEYS if key not in missing}
            metadata: dict[str, str] = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path.name} is cut off or no safetensors file ({error}): {mend}."
        ) from None
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error}): {mend}.") from None
    try:
        classes = json.loads(metadata.get("classes", "null"))
    except json.JSONDecodeError:
        classes = None
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        missing.append("the metadata 'classes' (a JSON list of names)")
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: {mend}.")
    for part in ("train", "test"):
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        _check(f"{part} in {path}", images, labels, len(classes))
    train = (tensors["train_images"], tensors["train_labels"])
    return train, (tensors["test_images"], tensors["test_labels"]), tuple(classes)


def _check(where: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.dtype != torch.uint8 or labels.dtype != torch.int64:
        raise TypeError(
            f"{where} must have images of uint8 and labels of int64, not {images.dtype} and "
            f"{labels.dtype}: convert them with .to()."
        )
    if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels) or not images.numel():
        raise ValueError(
            f"{where} must have images [N, C, H, W] and labels [N] with N at least 1, not "
            f"{list(images.shape)} and {list(labels.shape)}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where} has labels from {low} to {high}, but with {classes} classes they must lie "
            f"between 0 and {classes - 1}."
        )


def _unknown(name: str) -> str:
    names = ["digits", *_TORCHVISION, "tiny_imagenet"]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is like it."
    return f"There is no dataset {name!r} (known: {', '.join(names)}, folder:PATH); {hint}"


def _read_folder(
    path: Path, image_size: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor], list[str]]:
    """Read an ImageFolder tree: its own train, valid and test where it has them, else cuts."""
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}: give the path of a tree of images.")

    def part(*names: str) -> Path | None:
        # a class may be called "train" too, but then it holds images and no folders
        found = (path / n for n in names if any(p.is_dir() for p in (path / n).glob("*")))
        return next(found, None)

    def read(where: Path) -> tuple[tuple[Tensor, Tensor], list[str]]:
        try:
            tree = ImageFolder(str(where))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{where} is no tree of images in one folder a class: {str(error).splitlines()[0]}"
            ) from None
        # files come sorted by class: mixed once, the first n are a fair sample
        order = torch.randperm(len(tree), generator=torch.Generator().manual_seed(0)).tolist()
        files = [tree.samples[i] for i in order]
        images = _decode([Path(file) for file, _ in files], image_size)
        return (images, torch.tensor([label for _, label in files])), tree.classes

    train, classes = read(part("train") or path)
    others: list[tuple[Tensor, Tensor] | None] = []
    for where in (part("val", "valid"), part("test")):
        found, names = read(where) if where else (None, classes)
        if names != classes:
            raise ValueError(
                f"{where} must have the same class folders as {path / 'train'}, but they differ "
                f"in {sorted(set(names) ^ set(classes))}."
            )
        others.append(found)
    valid, test = others
    if test is None:  # a fifth, the same one whatever the seed
        rest, chosen = _cut(train[1], round(0.2 * len(train[1])), seed=0)
        train, test = (train[0][rest], train[1][rest]), (train[0][chosen], train[1][chosen])
    return train, valid, test, classes


def _decode(files: list[Path], image_size: int | None, progress: bool = False) -> Tensor:
    """Decode image files as colour into one uint8 [N, 3, H, W]."""
    from PIL import Image

    images = torch.empty(0)
    for n, file in enumerate(tqdm(files, desc="images", disable=not progress, leave=False)):
        try:
            with Image.open(file) as raw:
                pixels = torch.from_numpy(np.array(raw.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} cannot be read as an image ({error}): mend it.") from None
        image = _resize(pixels.movedim(-1, 0).unsqueeze(0), image_size)  # [1, 3, H, W]
        if n == 0:
            images = torch.empty(len(files), *image.shape[1:], dtype=torch.uint8)
        if image.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{file} has {list(image.shape[2:])} pixels but {files[0]} "
                f"{list(images.shape[2:])}: give image_size so that all are scaled to one size."
            )
        images[n] = image[0]
    return images


def _cut(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose n of the labels at random, each class by its share; return (rest, chosen) indices."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    members = [order[labels[order] == c] for c in labels.unique()]
    shares = torch.tensor([len(m) for m in members], dtype=torch.float64) * n / len(labels)
    counts = shares.floor().long()
    # what rounding down left over goes to the largest remainders
    by_remainder = (shares - counts).argsort(descending=True, stable=True)
    counts[by_remainder[: n - int(counts.sum())]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for m, count in zip(members, counts.tolist(), strict=True):
        chosen[m[:count]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


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


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Scale the shorter side to `size` (bilinear, smoothed when it shrinks) and crop the centre."""
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    factor = size / min(height, width)
    scaled = (max(size, round(height * factor)), max(size, round(width * factor)))
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    out = images.new_empty(*images.shape[:2], size, size)
    for start in range(0, len(images), 1024):  # in pieces: the work space stays small
        piece = F.interpolate(images[start : start + 1024], scaled, mode="bilinear", antialias=True)
        out[start : start + 1024] = piece[..., top : top + size, left : left + size]
    return out


def _with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Repeat a grey channel three times, or take the luminance of colours (ITU-R BT.601)."""
    have = images.shape[1]
    if channels in (None, have):
        return images
    if have == 1:
        return images.repeat(1, 3, 1, 1)
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


# --- fetching ------------------------------------------------------------------------------------


def _from_torchvision(
    name: str, scratch: Path, progress: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torchvision

    make = getattr(torchvision.datasets, _TORCHVISION[name])
    tensors = {}
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not progress:  # torchvision has no switch for its bar
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        for part in ("train", "test"):
            raw = make(str(scratch), train=part == "train", download=True)
            images = torch.as_tensor(raw.data)  # [N, H, W] or [N, H, W, 3]
            images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)
            tensors[f"{part}_images"] = images.contiguous()
            tensors[f"{part}_labels"] = torch.as_tensor(raw.targets, dtype=torch.int64)
    classes = list(map(str, range(10))) if name == "mnist" else list(raw.classes)
    source = f"torchvision {torchvision.__version__}, {_TORCHVISION[name]}"
    return tensors, {"classes": json.dumps(classes), "source": source}


def _tiny_imagenet(tree: Path, progress: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the official tree; its labelled `val` is our test, for its own test has no labels."""
    try:
        ids = (tree / "wnids.txt").read_text().split()
        words = dict(line.split("\t") for line in (tree / "words.txt").read_text().splitlines())
        held_out = [
            line.split("\t")[:2]
            for line in (tree / "val" / "val_annotations.txt").read_text().splitlines()
        ]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Tiny ImageNet is not fetched for you: unpack cs231n.stanford.edu/tiny-imagenet-200.zip "
            f"so that {error.filename} exists, then ask again."
        ) from None
    label = {wnid: i for i, wnid in enumerate(ids)}
    train = [(f, label[i]) for i in ids for f in sorted((tree / "train" / i / "images").iterdir())]
    test = [(tree / "val" / "images" / file, label[wnid]) for file, wnid in held_out]
    tensors = {}
    for part, files in (("train", train), ("test", test)):
        tensors[f"{part}_images"] = _decode([file for file, _ in files], 64, progress)
        tensors[f"{part}_labels"] = torch.tensor([i for _, i in files])
    classes = [words.get(wnid, wnid).split(",")[0] for wnid in ids]
    return tensors, {"classes": json.dumps(classes), "source": "Tiny ImageNet, official tree"}


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Give a scratch folder beside the result, gone afterwards whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _told(name: str, path: Path) -> Iterator[None]:
    """Turn what can go wrong in fetching and writing into a sentence that says what to do."""
    elsewhere = "or choose another folder with PRUNING101_DATA"
    try:
        yield
    except FileNotFoundError:
        raise  # says already what is missing
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        code = getattr(error, "errno", None)
        # safetensors gives the number of the operating system's error only in its text
        if in_text := re.search(r"os error (\d+)", str(error)):
            code = int(in_text[1])
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                code, f"no room on the disk to make {path.name}: free some {elsewhere}", str(path)
            ) from None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise PermissionError(
                code, f"{path.name} cannot be written: get permission {elsewhere}", str(path.parent)
            ) from None
        raise ConnectionError(
            f"{name} is not at {path} and could not be downloaded ({error}): connect to the "
            f"network, or put {path.name} there {elsewhere} that has it."
        ) from None
