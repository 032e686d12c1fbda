"""Pictures made once, rendered or read, and kept: records of one file that many processes share."""
from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

# common before torch: it settles how threads wait
from common import UserError, rank, say
from sources.files import locked
from sources.index import Index

import numpy as np
import PIL

VERSION = 1                                     # raise it when a square's pixels change
HEAD = mmap.ALLOCATIONGRANULARITY


class Kept:
    """n records of one dtype in a file: written in any order by any process, read memory-mapped.

    The file has a mark for each record, then the records. A mark is 0, or the checksum of a record
    that was written before it, and it is compared when a run first reads the record. So whatever a
    kill, a power cut or a full disk left half written is not there, in whichever order it reached
    the disk, and nothing waits for the disk. Records take room when they are written (a hole in the
    file until then). All writers of a record must write the same bytes, so they need no lock.
    UserError where the file cannot be made.
    """

    def __init__(self, path: Path, record: np.dtype, n: int):
        self.path = path
        self.record = np.dtype(record)
        self.n = n
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")), open(path, "ab") as file:
                if file.tell() < self.whole:
                    file.truncate(self.whole)
        except OSError as error:
            raise UserError(f"--cache {path.parent}: cannot be written ({error.strerror})"
                            ) from None
        self._open()

    def _open(self) -> None:
        self.marks = np.memmap(self.path, np.uint32, "r", 0, (self.n,))
        self.bytes = np.memmap(self.path, np.uint8, "r", self._start,
                               (self.n, self.record.itemsize))
        self.records = self.bytes.view(self.record)[:, 0]
        self.checked = np.frombuffer(mmap.mmap(-1, self.n), np.uint8)    # forked workers share it
        self.full = False                                    # whether this process has met the end

    def __getstate__(self) -> tuple:
        return self.path, self.record, self.n                # to another process, not its content

    def __setstate__(self, state: tuple) -> None:
        self.path, self.record, self.n = state
        self._open()

    @property
    def _start(self) -> int:
        return -(-4 * self.n // HEAD) * HEAD

    @property
    def whole(self) -> int:
        """Bytes of the file when all records are there."""
        return self._start + self.n * self.record.itemsize

    def read(self, row: int) -> np.void | None:
        """A record, in the file's own memory; None where it is not there, or not whole."""
        mark = self.marks[row]
        if not mark:
            return None
        if not self.checked[row]:
            if _checksum(self.bytes[row]) != mark:
                return None
            self.checked[row] = 1
        return self.records[row]

    def write(self, row: int, records: np.ndarray) -> None:
        """Put records (k,) at row, row + 1, ...; where the disk is full that is said, once."""
        if self.full:
            return
        raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
        marks = np.array([_checksum(one) for one in raw], np.uint32)
        try:
            with open(self.path, "r+b", buffering=0) as file:    # not through the map: a full disk
                file.seek(self._start + row * self.record.itemsize)    # would end the process there
                _write(file, raw.tobytes())
                file.seek(4 * row)
                _write(file, marks.tobytes())
        except OSError as error:
            self.full = True
            print(f"\n{self.path}: {error.strerror}; pictures are kept no longer", file=sys.stderr)
            return
        self.checked[row:row + len(records)] = 0


def _write(file: io.FileIO, content: bytes) -> None:
    """All of it: what a nearly full disk took in part is tried again, and fails."""
    left = memoryview(content)
    while left:
        left = left[file.write(left):]


def _checksum(content: np.ndarray) -> int:
    return zlib.crc32(content) or 1                              # 0 means that nothing is there


# ---- Squares of pictures -------------------------------------------------------------------------


def square_record(size: int) -> np.dtype:
    """A square as samples have it, and the (width, height) of its picture."""
    return np.dtype([("image", np.uint8, (3, size, size)), ("size", np.int32, 2)])


def keep_squares(index: Index, size: int, margin: float, folder: Path, share: float) -> Kept | None:
    """Where the squares of an index are kept; None where they need more than `share` of the disk.

    The file is known by all that its pixels come from: pictures with their sizes and times, boxes,
    sides, lenses, `size` and `margin`. Its own size is printed first, and files of the same data
    that were made of other pictures are named; they are not deleted.
    """
    n = len(index)
    record = square_record(size)
    need = n * record.itemsize
    if not need or share <= 0:
        return None
    settings = (VERSION, index.name, os.path.realpath(index.root), size, margin)
    words = re.sub(r"\W+", "-", index.name) + "-" + _digest([repr(settings).encode()])[:8]
    home = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    disk = shutil.disk_usage(home)
    free = disk.free
    if need <= share * disk.total:                  # else its million files need not be looked at
        path = folder / f"{words}-{_digest(_content(index))[:16]}.squares"
        free += _room_of(path) if path.is_file() else 0
    if need > share * free:
        say(f"{index.name}: its squares would fill {need / 1e9:.1f} of the {free / 1e9:.1f} GB "
            f"free in --cache {folder}, more than the share --keep {share:g} allows, so its "
            "pictures are decoded whenever they are read")
        return None
    kept = Kept(path, record, n)
    have = int((kept.marks > 0).sum())
    say(f"{index.name}: squares are kept in {path} as they are read, {need / 1e9:.2f} GB; "
        f"{have:,} of {n:,} are there")
    for old in sorted(folder.glob(f"{words}-*.squares")) if rank() == 0 else []:
        if old != path:
            say(f"{old}: {_room_of(old) / 1e9:.2f} GB of the same data with other rows or "
                "pictures; delete it if no run needs it")
    return kept


def _room_of(file: Path) -> int:
    """Bytes that a file takes on the disk, without its holes where the system tells."""
    stat = file.stat()
    return 512 * stat.st_blocks if hasattr(stat, "st_blocks") else stat.st_size


def _content(index: Index) -> Iterable[bytes]:
    """What the pixels of an index's squares come from."""
    columns = index.columns
    yield PIL.__version__.encode()                                  # decoders differ by a level
    for path in np.unique(columns["paths"]).tolist():
        try:
            stat = os.stat(os.path.join(os.fsencode(index.root), path))
            yield f"{stat.st_size} {stat.st_mtime_ns} ".encode()
        except OSError:
            yield b"missing "                                   # said when it is to be read
    names = ["paths", "side", "box"] + ["K", "dist"] * ("dist" in columns)
    for name in [name for name in names if name in columns]:
        yield f"{name} {columns[name].dtype} ".encode()
        yield np.ascontiguousarray(columns[name]).tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
