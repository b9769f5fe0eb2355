"""Reads zip archives that may be hostile: nothing is ever unpacked to disk, and sizes are looked at
before anything is read.
"""

import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from .notebook import LARGEST, LINK, too_large

MOST_FILES = 20_000
LARGEST_ARCHIVE = 50_000_000  # bytes of a student's archive, and of what it unpacks to
LARGEST_DOWNLOAD = 4_000_000_000  # the same of a whole class's
RATIO = 200  # text shrinks to a tenth; what shrinks to less than a two-hundredth is a bomb


@dataclass(frozen=True)
class Member:
    """A file in an archive: the name that the archive gives it, and its size."""

    name: str
    size: int
    info: zipfile.ZipInfo


def members(file: IO[bytes], *, largest: int = LARGEST_ARCHIVE) -> list[Member]:
    """The files in the archive, without its folders.

    Raises ValueError where it is no zip archive, or unpacks to more than it may.
    """
    entries = sum(block.count(b"PK\x01\x02") for block in _blocks(file))
    if entries > MOST_FILES:
        raise ValueError(f"It holds more than {MOST_FILES:,} files, so it was not unpacked.")
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RecursionError):
        raise ValueError("It is no zip archive, or a damaged one: pack it again.") from None
    packed = max(1, file.seek(0, 2))
    unpacked = sum(info.file_size for info in infos)
    if unpacked > min(largest, max(LARGEST, RATIO * packed)):
        raise ValueError(
            f"It would unpack {packed / 1e6:,.1f} MB to {unpacked / 1e6:,.0f} MB, so it was not "
            "unpacked: hand in the notebook only."
        )
    return [Member(info.filename, info.file_size, info) for info in infos if not info.is_dir()]


def content(file: IO[bytes], member: Member, *, largest: int = LARGEST) -> bytes:
    """The bytes of one file in the archive; raises ValueError where they cannot be had."""
    if stat.S_ISLNK(member.info.external_attr >> 16):
        raise ValueError(LINK)
    if member.info.flag_bits & 1:
        raise ValueError("It is locked with a password: hand it in without one.")
    if member.info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("It is packed in a way that is not read: pack it as an ordinary zip.")
    if member.size > largest:
        raise ValueError(too_large(member.size))
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member.info) as packed:
            return packed.read(largest + 1)
    except Exception:  # each way of packing has its own errors
        raise ValueError("It is damaged inside its archive: pack it again.") from None


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(1 << 20):
        yield block
    file.seek(0)
