"""What readers of data sets do with folders and files; what they parsed is parsed once."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:                                     # Windows
    import msvcrt
    fcntl = None

# common before torch: it settles how threads wait
from common import UserError
from sources.index import PICTURES, Index
from sources.pictures import check_images

import numpy as np

INDEX_VERSION = 3                                       # raise it when what readers return changes
UNLABELLED = "unlabelled frames"                        # why a row may be left out


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[IO[bytes]]:
    """Hold the file `path`, which is made for that and stays, against all other processes.

    With `wait` until another lets go of it; else BlockingIOError at once. The lock belongs to this
    process, not to its children, and ends with it however it ends: a kill leaves none behind, not
    even while data workers outlive it. The same process may take it twice.
    """
    with open(path, "ab") as file:
        while True:
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                else:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                break
            except (BlockingIOError, PermissionError) as error:        # as the system calls it
                if not wait:
                    raise BlockingIOError(error.errno, "held by another process", str(path)
                                          ) from None
                time.sleep(0.5)                         # Windows waits for ten seconds at most
        yield file


def data_folder(root: str | Path, name: str) -> Path:
    """The folder of a data set; UserError where it is missing."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"{name}: there is no folder {path}; give {name}=DIR or --root DIR")
    return path


def path_column(paths: list[str]) -> np.ndarray:
    """Relative paths as one compact column of bytes; any file name survives."""
    return np.array([os.fsencode(path) for path in paths], dtype=bytes)


def pictures_below(root: Path) -> list[str]:
    """Relative paths of all pictures below a folder, sorted; hidden files and folders left out."""
    found = []
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                                           # a link may lead back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        found += [name if below == "." else f"{below}/{name}" for name in files
                  if name[0] != "." and name.lower().endswith(PICTURES)]
    return sorted(found)


def stamp(root: Path, names: list[str]) -> str:
    """Digest of names, sizes and times of files or folders: changes when any of them does."""
    stats = [os.stat(os.path.join(root, name)) for name in names]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)])
    return hashlib.sha1(text.encode("utf-8", "surrogateescape")).hexdigest()


def cached(parse: Callable[..., Index]) -> Callable[..., Index]:
    """Decorator: parse(root, *given[, mano]) -> Index is called once for the same files.

    The caller adds `files`, the names below root that the Index is made of, and `cache`, the folder
    that keeps it as .npz, or None. What is kept is found again by the function's name, `given`, the
    files' names, sizes and times, and the hands in `mano`.
    """
    @functools.wraps(parse)
    def parse_once(root: Path, *given: object, files: list[str], cache: str | Path | None,
                   **mano: dict | None) -> Index:
        if cache is None:
            return parse(root, *given, **mano)
        key = (INDEX_VERSION, parse.__name__, os.path.realpath(root), given, stamp(root, files),
               hand_stamp(mano.get("mano")))
        digest = hashlib.sha1(repr(key).encode("utf-8", "surrogateescape")).hexdigest()
        file = Path(cache, f"index-{digest[:20]}.npz")
        kept = load_index(file)
        if kept is None:
            kept = parse(root, *given, **mano)
            save_index(kept, file)
        return dataclasses.replace(kept, root=str(root))       # it may have been another way there
    return parse_once


def load_index(file: Path) -> Index | None:
    """What `save_index` wrote, byte by byte; None where there is no such file, or another one."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as stored:
            columns = {name: stored[name] for name in stored.files}
            about = str(columns.pop("about"))
            digest = str(columns.pop("digest"))
            return Index(columns=columns, **json.loads(about)) if (
                digest == _digest(about, columns)) else None
    except Exception:                  # bytes that are no .npz can fail anywhere in NumPy's readers
        return None


def _digest(about: str, columns: dict[str, np.ndarray]) -> str:
    """What tells whether an index is as it was written; zip files' own checks leave gaps."""
    digest = hashlib.sha1(about.encode("utf-8", "surrogatepass"))
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype} {column.shape}".encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(column).reshape(-1).view("u1"))
    return digest.hexdigest()


def save_index(index: Index, file: Path) -> None:
    """Write an index as .npz, under another name until it is whole; UserError on failure."""
    about = json.dumps({name: x for name, x in vars(index).items() if name != "columns"})
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            np.savez(out, about=about, digest=_digest(about, index.columns), **index.columns)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"--cache {file.parent}: cannot be written ({error.strerror})") from None


def drop_unreadable(index: Index) -> Index:
    """Open every picture of an index once; leave out, count and name those that cannot be read."""
    paths, row = np.unique(index.columns["paths"], return_inverse=True)
    good = check_images([os.path.join(index.root, os.fsdecode(path)) for path in paths])
    if not good.all():
        index = index.drop(~good[row], "unreadable pictures")
        bad = [os.fsdecode(path) for path in paths[~good]]
        index.notes.append(f"unreadable: {', '.join(bad[:20])}" + ", ..." * (len(bad) > 20))
    return index


def drop_missing(index: Index) -> Index:
    """Leave out and count rows whose picture is not there; UserError where none is left."""
    root = os.fsencode(index.root)
    listed = {}
    there = []
    for folder, name in map(os.path.split, index.columns["paths"].tolist()):
        if folder not in listed:
            full = os.path.join(root, folder)
            listed[folder] = set(os.listdir(full)) if os.path.isdir(full) else set()
        there.append(name in listed[folder])
    if not any(there):
        none = "not one of the pictures is below" if there else "nothing is left to read in"
        raise UserError(f"{index.summary()}; {none} {index.root}")
    return index.drop(~np.array(there), "samples without their picture")


def note_poses(index: Index) -> Index:
    """Say how many samples have no pose."""
    if count := int(np.isnan(index.columns["pose"]).any(1).sum()):
        index.notes.append(f"{count} samples have no pose: no fit, or the MANO file is not given")
    return index


def hand_stamp(mano: dict | None) -> str:
    """Digest of the hand files that poses are converted with."""
    parts = [part for side, hand in sorted((mano or {}).items()) for key in sorted(hand)
             for part in (side.encode(), key.encode(), np.asarray(hand[key]).tobytes())]
    return hashlib.sha1(b"".join(parts)).hexdigest()


def empty_index(name: str, root: Path, note: str) -> Index:
    """An index without rows, for a split that the data set does not have."""
    columns = {"paths": path_column([]), "side": np.array([], str)}
    return Index(name, str(root), columns, notes=[note])
