"""Datasets: read as written, the same seed gives the same, errors say what to do."""

import errno
import json
import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from pruning101.core import data, sources

CLASSES = tuple(map(str, range(10)))


def pair(n=20, shape=(3, 8, 8), classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g)
    return images, torch.arange(n) % classes


def write(path, train=None, test=None, **changes):
    train, test = train or pair(40), test or pair(20, seed=1)
    tensors = {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
    }
    metadata = {"classes": json.dumps(CLASSES), "source": "test"}
    for key, value in changes.items():
        holder = metadata if key == "classes" else tensors
        if value is None:
            del holder[key]
        else:
            holder[key] = value
    save_file(tensors, path, metadata)
    return tensors


def rows(images):
    return sorted(map(bytes, images.flatten(1).numpy()))


def listing(folder):
    return sorted(p.name for p in folder.rglob("*"))


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    images = torch.tensor((theirs.images * 255 / 16).round(), dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(theirs.target)
    rest, chosen = sources.cut(labels, 360, seed=0)
    digits = data.load("digits")
    assert torch.equal(digits.test.images, images[chosen])
    assert torch.equal(digits.test.labels, labels[chosen])
    ours = torch.cat([digits.train.images, digits.valid.images])
    assert rows(ours) == rows(images[rest])
    assert int(ours.max()) == 255
    assert digits.classes == CLASSES


def test_digits_cut():
    a, b = data.load("digits", seed=0), data.load("digits", seed=1)
    assert [len(a.train), len(a.valid), len(a.test)] == [1150, 287, 360]
    assert torch.equal(a.test.images, b.test.images)
    assert not torch.equal(a.valid.images, b.valid.images)
    assert torch.equal(a.valid.images, data.load("digits", seed=0).valid.images)
    for split in (a.train, a.valid, a.test):
        shares = split.labels.bincount() / len(split)
        assert float((shares - 0.1).abs().max()) < 0.01
    whole = rows(torch.cat([a.train.images, a.valid.images]))
    assert whole == rows(torch.cat([b.train.images, b.valid.images]))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2**31 - 1)
)
def test_cut_is_a_partition_by_class(labels, share, seed):
    labels = torch.tensor(labels)
    n = round(share * len(labels))
    rest, chosen = sources.cut(labels, n, seed)
    assert len(chosen) == n
    assert torch.equal(torch.cat([rest, chosen]).sort().values, torch.arange(len(labels)))
    for c in labels.unique():
        exact = n * int((labels == c).sum()) / len(labels)
        assert abs(int((labels[chosen] == c).sum()) - exact) < 1


# --- images --------------------------------------------------------------------------------------


def test_statistics_are_those_of_floats():
    images, labels = pair(30)
    d = data.from_tensors("x", (images, labels), pair(), pair(), classes=CLASSES)
    scaled = images.double() / 255
    assert d.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert d.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_constant_channel_is_only_shifted():
    grey = (torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    d = data.from_tensors("x", grey, grey, grey, classes=("a",))
    (x, _), *_ = d.batches()
    assert d.std == (1.0,)
    assert torch.allclose(x, torch.zeros_like(x), atol=1e-6)


@pytest.mark.parametrize("size", [5, 8, 12, 32])
def test_resize_is_as_pillow_does(size):
    digits = data.load("digits", image_size=size)
    plain = data.load("digits")
    assert digits.test.images.shape == (360, 1, size, size)
    for ours, raw in zip(digits.test.images[:20], plain.test.images[:20], strict=True):
        image = Image.fromarray(raw[0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
        difference = ours[0].int() - torch.tensor(np.array(image)).int()
        assert int(difference.abs().max()) <= 1


def test_resize_crops_the_centre():
    images = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    images[..., 2:6] = 200
    assert torch.equal(sources.resize(images, 4), torch.full((1, 1, 4, 4), 200, dtype=torch.uint8))


def test_channels(tmp_path):
    grey = data.load("digits").test.images
    assert torch.equal(data.load("digits", channels=3).test.images, grey.expand(-1, 3, -1, -1))
    written = write(tmp_path / "cifar10.safetensors")
    ours = data.load("cifar10", tmp_path, channels=1).test.images
    for image, raw in zip(ours, written["test_images"], strict=True):
        theirs = np.array(Image.fromarray(raw.movedim(0, -1).numpy()).convert("L"))
        assert int((image[0].int() - torch.tensor(theirs).int()).abs().max()) <= 1


# --- batches -------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.integers(0, 2**31 - 1))
def test_batches_give_every_image_once_and_normalised(n, batch_size, shuffle, seed):
    images, labels = pair(n, shape=(2, 3, 4))
    d = data.from_tensors(
        "x", (images, labels), pair(5, (2, 3, 4)), pair(5, (2, 3, 4)), classes=CLASSES
    )
    batches = d.batches("train", batch_size, shuffle=shuffle, seed=seed)
    parts = list(batches)
    assert len(parts) == len(batches)
    assert all(len(x) == batch_size for x, _ in parts[:-1])
    x = torch.cat([x for x, _ in parts])
    y = torch.cat([y for _, y in parts])
    assert x.dtype == torch.float32
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (d.mean, d.std))
    back = ((x * std + mean) * 255).round().byte()
    if shuffle:
        assert rows(torch.cat([back.flatten(1), y.byte()[:, None]], 1)) == rows(
            torch.cat([images.flatten(1), labels.byte()[:, None]], 1)
        )
    else:
        assert torch.equal(back, images)
        assert torch.equal(y, labels)


def test_same_seed_same_batches_and_no_other_randomness():
    digits = data.load("digits")
    before = torch.random.get_rng_state()
    kinds = {"shuffle": True, "augment": True}
    one = digits.batches("train", 100, seed=3, **kinds)
    first, again = list(one), list(one)
    other = list(digits.batches("train", 100, seed=4, **kinds))
    anew = list(data.load("digits").batches("train", 100, seed=3, **kinds))
    for (x, y), (x2, y2), (x3, y3) in zip(first, again, anew, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(x, x3)
        assert torch.equal(y, y2)
        assert torch.equal(y, y3)
    assert not torch.equal(first[0][1], other[0][1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_batches_do_not_touch_the_images():
    digits = data.load("digits").subset(train=10)
    kept = digits.train.images.clone()
    for x, _ in digits.batches(batch_size=4):
        x.zero_()
    assert torch.equal(kept, digits.train.images)


@pytest.mark.parametrize("mirror", [True, False])
def test_augmentation_is_a_crop_and_a_flip(mirror):
    size, border = 16, 2
    images, labels = pair(64, (3, size, size))
    d = data.from_tensors(
        "x", (images, labels), (images, labels), (images, labels), classes=CLASSES
    )
    d = data.replace(d, mirror=mirror)
    x, y = next(iter(d.batches(batch_size=64, augment=True)))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (d.mean, d.std))
    got = ((x * std + mean) * 255).round().byte()
    assert torch.equal(y, labels)
    padded = torch.nn.functional.pad(images, (border,) * 4)
    found = set()
    for image, source in zip(got, padded, strict=True):
        matches = [
            (top, left, flipped)
            for top in range(2 * border + 1)
            for left in range(2 * border + 1)
            for flipped in (False, True)
            if torch.equal(
                image.flip(-1) if flipped else image,
                source[:, top : top + size, left : left + size],
            )
        ]
        assert len(matches) == 1
        found.add(matches[0])
    for place in (0, 1):
        assert {f[place] for f in found} == set(range(2 * border + 1))
    assert {f[2] for f in found} == ({False, True} if mirror else {False})


def test_digits_are_never_mirrored():
    assert not data.load("digits").mirror
    assert not data.load("digits").subset(train=5).mirror


def test_subset_and_repr():
    digits = data.load("digits")
    small = digits.subset(train=7, test=5)
    assert [len(small.train), len(small.valid), len(small.test)] == [7, 287, 5]
    assert torch.equal(small.train.images, digits.train.images[:7])
    assert small.mean == digits.mean
    text = "Dataset(digits: 7 train, 287 valid, 5 test images of 1 x 8 x 8, 10 classes)"
    assert repr(small) == text
    assert len(repr(small.batches())) < 80
    with pytest.raises(ValueError, match=r"1150 images.*not 2000"):
        digits.subset(train=2000)


def test_moved_to_a_device_once():
    digits = data.load("digits")
    there = digits.batches("train", device="meta").split
    assert there.images.device.type == "meta"
    assert digits.batches("train", shuffle=True, device="meta").split is there
    assert digits.batches("valid", device="meta").split is not there
    assert len(digits.subset(train=5).batches(device="meta").split) == 5


def test_sent_to_another_process_without_what_it_does_not_need():
    digits = data.load("digits")
    digits.batches("train", device="meta")
    sent = pickle.dumps(digits.subset(train=7, valid=1, test=1))
    assert len(sent) < 10_000
    assert len(pickle.loads(sent).train) == 7
    there = pickle.loads(pickle.dumps(digits))
    assert there._moved == {}
    assert torch.equal(there.test.images, digits.test.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_same_batches_on_the_gpu():
    digits = data.load("digits")
    kinds = {"shuffle": True, "augment": True, "seed": 5}
    there = digits.batches("train", 64, device="cuda", **kinds)
    for (x, y), (x2, y2) in zip(digits.batches("train", 64, **kinds), there, strict=True):
        assert x2.is_cuda
        assert torch.equal(y, y2.cpu())
        assert torch.allclose(x, x2.cpu(), atol=1e-6)
    assert digits.batches(device="cuda").split.images is there.split.images


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("mnsit", "'mnist'"), ("CIFAR-10", "'cifar10'"), ("digit", "'digits'")]
)
def test_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no dataset '{name}'.*did you mean {near}"):
        data.load(name)


def test_wrong_arguments():
    digits = data.load("digits")
    with pytest.raises(TypeError, match=r"name must be .* not None"):
        data.load(None)
    for call, match in (
        (lambda: data.load("digits", channels=2), "channels must be 1"),
        (lambda: data.load("digits", image_size=0), "image_size must be at least 1"),
        (lambda: data.load("digits", image_size=16.5), "image_size must be.*got 16.5"),
        (lambda: data.load("digits", image_size="16"), "image_size must be.*got '16'"),
        (lambda: digits.subset(train=0.1), "ask for 1 to 1150 of them, not 0.1"),
        (lambda: digits.batches("training"), "split must be"),
        (lambda: digits.batches(batch_size=0), "batch_size must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_from_tensors_refuses_what_does_not_fit():
    good = pair()
    images, labels = good
    wrong = (
        (TypeError, (images.float(), labels), "uint8"),
        (TypeError, (images, labels.int()), "int64"),
        (TypeError, (images.tolist(), labels), "not list"),
        (ValueError, (images[:, 0], labels), "N, C, H, W"),
        (ValueError, (images[:5], labels), "N, C, H, W"),
        (ValueError, (images[:0], labels[:0]), "at least 1"),
        (ValueError, (images, labels + 1), "from 1 to 10"),
        (ValueError, (images, labels - 1), "from -1 to 8"),
        (ValueError, pair(shape=(3, 9, 9)), "one shape"),
    )
    for error, bad, match in wrong:
        with pytest.raises(error, match=match):
            data.from_tensors("x", good, good, bad, classes=CLASSES)
    with pytest.raises(ValueError, match="one value for each of its 3"):
        data.from_tensors("x", good, good, good, classes=CLASSES, mean=(0.5,), std=(0.5,))


# --- files ---------------------------------------------------------------------------------------


def test_reads_the_file_of_a_classroom(tmp_path, monkeypatch):
    written = write(tmp_path / "cifar10.safetensors", train=pair(100))
    monkeypatch.setenv("PRUNING101_DATA", str(tmp_path))
    d = data.load("cifar10")
    assert [len(d.train), len(d.valid), len(d.test)] == [90, 10, 20]
    assert torch.equal(d.test.images, written["test_images"])
    assert sorted(d.valid.labels.tolist()) == list(range(10))
    assert d.mirror


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING101_DATA", "~/somewhere")
    assert data.default_root() == Path.home() / "somewhere"
    monkeypatch.delenv("PRUNING101_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_root() == tmp_path / "pruning101"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.default_root() == Path.home() / ".cache" / "pruning101"


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "mnist.safetensors"
    good, labels = pair(40)

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            data.load("mnist", tmp_path)
        assert "pruning101 data mnist" in str(caught.value)
        assert "\n" not in str(caught.value)

    write(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("cut off")
    path.write_bytes(b"PK\x03\x04" + whole)
    refused("cut off or no safetensors")
    save_file({"weight": good}, path)
    refused("lacks train_images, train_labels, test_images, test_labels, the metadata")
    for changes, match in (
        ({"classes": "ten"}, "classes"),
        ({"classes": "[]"}, "classes"),
        ({"classes": json.dumps(["a", "b"])}, "labels from 0 to 9"),
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": good.float()}, "uint8"),
        ({"train_labels": labels.int()}, "int64"),
        ({"train_images": good[:, 0].clone()}, "N, C, H, W"),
        ({"train_images": good[:5]}, "N, C, H, W"),
        ({"train_labels": labels + 1}, "from 1 to 10"),
    ):
        write(path, **changes)
        refused(match)


def test_file_is_mapped_not_read(tmp_path):
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc")
    write(tmp_path / "cifar10.safetensors")
    d = data.load("cifar10", tmp_path)
    assert len(d.test) == 20
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "cifar10.safetensors") in maps


# --- downloads, simulated ------------------------------------------------------------------------


class FakeCIFAR:
    """Gives what torchvision's CIFAR10 gives, and leaves files behind as it does."""

    classes = list(CLASSES)  # noqa: RUF012

    def __init__(self, root, train, download):
        assert download
        (Path(root) / "raw.tar.gz").write_bytes(b"x" * 1000)
        images, labels = pair(100 if train else 20, seed=int(train))
        self.data = images.movedim(1, -1).numpy()
        self.targets = labels.tolist()


class FakeMNIST:
    """Gives what torchvision's MNIST gives."""

    classes = [f"{i} - name" for i in range(10)]  # noqa: RUF012

    def __init__(self, root, train, download):
        images, self.targets = pair(100 if train else 20, (1, 8, 8), seed=int(train))
        self.data = images[:, 0]


def fake(monkeypatch, name, make):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, name, make)


@pytest.mark.parametrize(
    ("name", "theirs", "make"),
    [("cifar10", "CIFAR10", FakeCIFAR), ("mnist", "MNIST", FakeMNIST)],
)
def test_converted_once(tmp_path, monkeypatch, name, theirs, make):
    fake(monkeypatch, theirs, make)
    root = tmp_path / "new" / "folder"
    d = data.load(name, root)
    assert listing(root) == [f"{name}.safetensors"]
    assert d.classes == CLASSES
    kept = load_file(root / f"{name}.safetensors")
    channels = 3 if name == "cifar10" else 1
    expected, labels = pair(20, (channels, 8, 8), seed=0)
    assert torch.equal(kept["test_images"], expected)
    assert torch.equal(kept["test_labels"], labels)
    fake(monkeypatch, theirs, None)  # gone: the second time needs no network
    assert torch.equal(data.load(name, root).test.images, expected)
    umask = os.umask(0)
    os.umask(umask)
    assert (root / f"{name}.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def failing(error):
    def make(root, **_):
        (Path(root) / "raw.tar.gz").write_bytes(b"half")
        raise error

    return make


@pytest.mark.parametrize(
    ("raised", "expected", "match"),
    [
        (URLError("no route"), ConnectionError, "connect to the network.*PRUNING101_DATA"),
        (RuntimeError("Error downloading x"), ConnectionError, "cannot be downloaded"),
        (TimeoutError("slow"), ConnectionError, "cannot be downloaded"),
        (OSError(errno.ENOSPC, "full"), OSError, "more room on the disk"),
        (OSError(errno.EACCES, "no"), PermissionError, "writable folder"),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, raised, expected, match):
    fake(monkeypatch, "CIFAR10", failing(raised))
    with pytest.raises(expected, match=match) as caught:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []
    fake(monkeypatch, "CIFAR10", FakeCIFAR)
    assert len(data.load("cifar10", tmp_path).test) == 20


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to set")
@pytest.mark.parametrize("limit", [0, 3_000, 12_000])
def test_disk_full_half_way(tmp_path, monkeypatch, limit):
    """With the operating system itself refusing to write beyond `limit` bytes."""
    import resource
    import signal

    fake(monkeypatch, "CIFAR10", FakeCIFAR)
    raw = sources._from_torchvision("cifar10", tmp_path, False)
    (tmp_path / "raw.tar.gz").unlink()
    monkeypatch.setattr(sources, "_from_torchvision", lambda *_: raw)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match="more room on the disk"):
            data.convert("cifar10", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert listing(tmp_path) == []
    assert len(data.load("cifar10", tmp_path).test) == 20


def test_the_file_appears_at_once_when_it_is_whole(tmp_path, monkeypatch):
    def refuse(part, path):
        assert not path.exists()
        assert len(load_file(part)) == 4
        raise OSError(errno.EDQUOT, "quota")

    fake(monkeypatch, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(sources.os, "replace", refuse)
    with pytest.raises(OSError, match="more room"):
        data.convert("cifar10", tmp_path)
    assert listing(tmp_path) == []


def test_root_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PermissionError, match="writable folder"):
            data.load("mnist", root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="writable folder"):
        data.load("mnist", tmp_path)


def test_quiet_conversion(tmp_path, monkeypatch, capsys):
    class Loud(FakeCIFAR):
        def __init__(self, root, **options):
            print("100%", file=sys.stderr)
            super().__init__(root, **options)

    fake(monkeypatch, "CIFAR10", Loud)
    path = data.convert("cifar10", tmp_path, progress=False)
    assert path == tmp_path / "cifar10.safetensors"
    assert capsys.readouterr() == ("", "")


# --- trees of images -----------------------------------------------------------------------------


def tree(folder, n=10, classes=("cat", "dog"), size=(8, 8)):
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (c * 100, i, 7)).save(folder / name / f"{i}.png")


def test_folder_with_splits(tmp_path):
    tree(tmp_path / "train", 10)
    tree(tmp_path / "val", 3)
    tree(tmp_path / "test", 4)
    d = data.load(f"folder:{tmp_path}")
    assert [len(d.train), len(d.valid), len(d.test)] == [20, 6, 8]
    assert d.classes == ("cat", "dog")
    for split in (d.train, d.valid, d.test):
        assert torch.equal(split.images[:, 0, 0, 0].long(), split.labels * 100)
        assert split.labels.tolist() != sorted(split.labels.tolist())


def test_folder_without_splits(tmp_path):
    tree(tmp_path / "pets" / "train", 10)
    flat = data.load(f"folder:{tmp_path / 'pets' / 'train'}")
    assert [len(flat.train), len(flat.valid), len(flat.test)] == [14, 2, 4]
    only_train = data.load(f"folder:{tmp_path / 'pets'}", seed=1)
    assert torch.equal(only_train.test.images, flat.test.images)
    assert not torch.equal(only_train.train.images, flat.train.images)


def test_a_class_may_be_called_train(tmp_path):
    tree(tmp_path, 5, classes=("bus", "train"))
    assert data.load(f"folder:{tmp_path}").classes == ("bus", "train")


def test_folder_sizes(tmp_path):
    tree(tmp_path, 5, classes=("a",), size=(8, 12))
    tree(tmp_path, 5, classes=("b",), size=(20, 10))
    with pytest.raises(ValueError, match="give image_size"):
        data.load(f"folder:{tmp_path}")
    d = data.load(f"folder:{tmp_path}", image_size=6, channels=1)
    assert d.train.images.shape[1:] == (1, 6, 6)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load(f"folder:{tmp_path / 'missing'}")
    with pytest.raises(FileNotFoundError, match="no tree of images"):
        data.load(f"folder:{tmp_path}")
    tree(tmp_path / "train")
    tree(tmp_path / "test", classes=("cat", "fox"))
    with pytest.raises(ValueError, match=r"same class folders.*'dog', 'fox'"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        data.load(f"folder:{tmp_path / 'train'}")


def test_tiny_imagenet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt is missing.*unpack"):
        data.load("tiny_imagenet", tmp_path)
    assert listing(tmp_path) == []
    official = tmp_path / "tiny-imagenet-200"
    official.mkdir()
    (official / "wnids.txt").write_text("n02\nn01\n")
    (official / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tsalamander\nn03\tx\n")
    for wnid, grey in (("n01", 10), ("n02", 20)):
        (official / "train" / wnid / "images").mkdir(parents=True)
        for i in range(10):
            file = official / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            Image.new("L", (64, 64), grey).save(file)
    (official / "val" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), (10, 10, 10)).save(official / "val" / "images" / "val_0.JPEG")
    (official / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")
    d = data.load("tiny_imagenet", tmp_path)
    assert d.classes == ("salamander", "goldfish")
    assert [len(d.train), len(d.valid), len(d.test)] == [18, 2, 1]
    assert d.test.labels.tolist() == [1]
    assert d.train.images.shape[1:] == (3, 64, 64)
    assert torch.equal(d.train.images[:, 0, 0, 0].long(), 20 - 10 * d.train.labels)
    assert (tmp_path / "tiny_imagenet.safetensors").exists()


# --- the real thing, where it is -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "shape"), [("mnist", 54_000, (1, 28, 28)), ("cifar10", 45_000, (3, 32, 32))]
)
def test_real_files(name, train, shape):
    folder = os.environ.get("PRUNING101_DATA")
    if not folder or not (Path(folder) / f"{name}.safetensors").exists():
        pytest.skip(f"PRUNING101_DATA holds no {name}.safetensors")
    d = data.load(name)
    assert [len(d.train), len(d.test)] == [train, 10_000]
    assert d.train.images.shape[1:] == shape
    if name == "mnist":  # the usual constants, measured on all of train
        assert d.mean == pytest.approx((0.1307,), abs=5e-4)
        assert d.std == pytest.approx((0.3081,), abs=5e-4)


def test_a_few_images_are_cut_and_too_few_are_told(tmp_path):
    tree(tmp_path, 2)
    few = data.load(f"folder:{tmp_path}")
    assert [len(split) for split in (few.train, few.valid, few.test)] == [2, 1, 1]
    tree(tmp_path / "one", 1, classes=("a",))
    with pytest.raises(ValueError, match="too few"):
        data.load(f"folder:{tmp_path / 'one'}")


def test_other_channels_than_grey_or_colour_are_not_converted(tmp_path):
    images, labels = pair(shape=(2, 8, 8))
    tensors = {"train_images": images, "train_labels": labels}
    tensors |= {"test_images": images.clone(), "test_labels": labels.clone()}
    metadata = {"classes": json.dumps([str(c) for c in range(10)])}
    save_file(tensors, tmp_path / "mnist.safetensors", metadata)
    assert data.load("mnist", tmp_path).train.images.shape[1] == 2
    with pytest.raises(ValueError, match="2 channels cannot be made"):
        data.load("mnist", tmp_path, channels=3)


def test_a_refused_download_is_told_on_one_line(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("Tried a:\n<no host>\nTried b:\n<no host>\n")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(ConnectionError, match="cannot be downloaded") as caught:
        data.load("mnist", tmp_path)
    assert "\n" not in str(caught.value)
