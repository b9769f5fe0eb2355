"""Where the images of `data.load` come from: one converted file, a download, a tree of images."""

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
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

Pair = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W] and labels int64 [N]


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
    import torchvision  # noqa: F401  (one that does not fit torch fails here, by its own words)

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


def _unknown(name: str) -> str:
    names = ["digits", *_TORCHVISION, "tiny_imagenet"]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is like it."
    return f"There is no dataset {name!r} (known: {', '.join(names)}, folder:PATH); {hint}"


# --- reading -------------------------------------------------------------------------------------


def read_file(path: Path) -> tuple[Pair, Pair, tuple[str, ...]]:
    """Read a converted file, memory-mapped; return (train, test, classes), checked."""
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
        raise type(error)(f"{path} cannot be read ({error.strerror or error}): {mend}.") from None
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
        try:
            check(f"{part} in {path}", images, labels, len(classes))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(error).rstrip('.')}; {mend}.") from None
    train = (tensors["train_images"], tensors["train_labels"])
    return train, (tensors["test_images"], tensors["test_labels"]), tuple(classes)


def check(where: str, images: Tensor, labels: Tensor, classes: int) -> None:
    """Raise, in one sentence, if these are not images with their labels."""
    kinds = [getattr(value, "dtype", type(value).__name__) for value in (images, labels)]
    if kinds != [torch.uint8, torch.int64]:
        raise TypeError(
            f"{where} must have images of torch.uint8 and labels of torch.int64, not {kinds[0]} "
            f"and {kinds[1]}."
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


def read_folder(
    path: Path, image_size: int | None
) -> tuple[Pair, Pair | None, Pair, tuple[str, ...]]:
    """Read an ImageFolder tree: its own train, valid and test where it has them, else cuts."""
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}: give the path of a tree of images.")

    def part(*names: str) -> Path | None:
        # a class may be called "train" too, but then it holds images and no folders
        found = (path / n for n in names if any(p.is_dir() for p in (path / n).glob("*")))
        return next(found, None)

    def read(where: Path) -> tuple[Pair, tuple[str, ...]]:
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
        return (images, torch.tensor([label for _, label in files])), tuple(tree.classes)

    train, classes = read(part("train") or path)
    others: list[Pair | None] = []
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
        rest, chosen = cut(train[1], size_of_cut(len(train[1]), 0.2), seed=0)
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
        image = resize(pixels.movedim(-1, 0).unsqueeze(0), image_size)  # [1, 3, H, W]
        if n == 0:
            images = torch.empty(len(files), *image.shape[1:], dtype=torch.uint8)
        if image.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{file} has {list(image.shape[2:])} pixels but {files[0]} "
                f"{list(images.shape[2:])}: give image_size so that all are scaled to one size."
            )
        images[n] = image[0]
    return images


def size_of_cut(images: int, share: float) -> int:
    """Return how many images make this share, leaving at least one on either side."""
    if images < 2:
        raise ValueError(
            f"{images} image is too few to cut valid or test images off: give at least 3 in all."
        )
    return max(1, round(share * images))


def cut(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
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


def resize(images: Tensor, size: int | None) -> Tensor:
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
            f"{error.filename} is missing, and Tiny ImageNet is not fetched for you: unpack "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip into {tree.parent}."
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
    other = "or set PRUNING101_DATA to another folder"
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
            raise OSError(code, f"{path} needs more room on the disk: free some {other}.") from None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise PermissionError(
                code, f"{path} cannot be written: make {path.parent} a writable folder {other}."
            ) from None
        reason = " ".join(str(error).split())  # torchvision's runs over several lines
        raise ConnectionError(
            f"{name} is not at {path} and cannot be downloaded ({reason}): connect to the network, "
            f"copy {path.name} there from another machine {other} that has it."
        ) from None
