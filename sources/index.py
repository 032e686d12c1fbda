"""What the readers of data sets share: the index, its cache, and helpers for folders and files."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError
from sources.pictures import check_images

import numpy as np
import torch
from torch import Tensor


PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MIRROR = np.diag([-1.0, 1.0, 1.0])                      # a left hand becomes a right one: x -> -x
INDEX_VERSION = 1                                       # raise it when an index function changes
# What the sample dictionary holds of an Index, and what is needed to read it.
SAMPLE_COLUMNS = frozenset((
    "paths", "side", "id", "K", "scale", "joints", "uv", "uv_label", "confidence", "verts",
    "visible", "pose", "shape", "trans", "moment", "camera", "cameras", "dist"))


class Joints(NamedTuple):
    """Which 21 joints a data set means, where a mesh is there to take them from."""
    tips: str = "smplx"                                 # the five tip vertices, by name in common.TIPS
    regressed: bool = False                             # the others from the posed mesh, not the chain


class DataSet(NamedTuple):
    """What sources/__init__.py needs to know of a data set; the rest stands in the set's own file."""
    index: Callable[..., Index]                         # (root, split, ...) -> Index
    splits: tuple[str, ...] = ("train", "val", "test")
    joints: Joints = Joints()


@dataclass
class Index:
    """One row a hand, in a fixed order, as columns; those that the data set lacks are not there.

    paths   (N,) picture below `root`, bytes    side (N,) left or right   id (N,) else the paths
    box     (N, 4) x y w h px                   K (N, 3, 3) px            scale (N,) m a unit
    joints  (N, 21, 3) m, camera frame          uv, uv_label (N, 21, 2)   confidence (N, 21)
    verts   (N, 778, 3) m                       visible (N, 21) bool
    pose    (N, 48) axis-angle, mean added      shape (N, 10)             trans (N, 3) m
    moment  (N,) what one time step shares      camera (N,) 0, 1, ...     cameras (N, 4, 4) world to it
    dist    (N, 8) lens distortion of the picture, OpenCV's; key points are undistorted already
    Further columns serve official scores only. All are as annotated: px of the picture, left hands
    not mirrored; box [0, 0, W, H] is the whole picture. `dropped` counts what was left out, by
    reason; `notes` are sentences that belong beside every score; `box_source` is annotated, joints,
    data set or detector.
    """
    name: str
    root: str
    columns: dict[str, np.ndarray]
    box_source: str = "data set"
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns["paths"])

    def id(self, row: int) -> str:
        """Unique name of a row."""
        return str(self.columns["id"][row]) if "id" in self.columns else self.path(row)

    def path(self, row: int) -> str:
        """Picture of a row, below root."""
        return os.fsdecode(self.columns["paths"][row])

    def take(self, rows: np.ndarray) -> Index:
        """The rows named by numbers or by a mask (N,) bool."""
        columns = {key: column[rows] for key, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns, dropped={**self.dropped},
                                   notes=[*self.notes])

    def drop(self, mask: np.ndarray, reason: str) -> Index:
        """Leave out the rows of a mask (N,) bool and count them under `reason`."""
        if not mask.any():
            return self                                   # a copy of FreiHAND's vertices is 1.2 GB
        kept = self.take(~mask)
        kept.dropped[reason] = kept.dropped.get(reason, 0) + int(mask.sum())
        return kept

    def summary(self) -> str:
        """What is in it and what was left out, to be printed with every score."""
        out = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items()) or "nothing"
        return "; ".join([f"{self.name}: {len(self)} samples, box from {self.box_source}, "
                          f"left out: {out}", *self.notes])


def unmirror(prediction: dict[str, Tensor], side: list[str]) -> dict[str, Tensor]:
    """Give left hands back: what `predict` returns, before a score or a submission is written.

    joints, verts (B[, V], N, 3), root, trans (B[, V], 3) and pose (B, 16, 3, 3) are mirrored where
    side (B,) is "left". uv stays px of the image: the inverse of the sample's `crop`, which holds
    the mirroring, takes it to the picture.
    """
    out, left = dict(prediction), torch.tensor([one == "left" for one in side])
    for key in {"joints", "verts", "root", "trans", "pose"} & set(prediction):
        value = prediction[key]
        D = torch.as_tensor(MIRROR, dtype=value.dtype, device=value.device)
        mirrored = D @ value @ D if key == "pose" else value @ D
        on = left.to(value.device).view(-1, *[1] * (value.dim() - 1))
        out[key] = torch.where(on, mirrored, value)
    return out


def tight_box(uv: np.ndarray) -> np.ndarray:
    """Boxes around key points: (N, J, 2) px, NaN where unknown -> (N, 4) x y w h, NaN for none."""
    low = np.where(np.isnan(uv), np.inf, uv).min(1)
    high = np.where(np.isnan(uv), -np.inf, uv).max(1)
    low, high = (np.where(np.isfinite(side), side, np.nan) for side in (low, high))
    box = np.concatenate([low + 0.5, high - low], 1)               # pixel centres to edges
    return np.where(box[:, 2:].max(1, keepdims=True) >= 2, box, np.nan)        # a dot is no hand


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
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        new = os.path.realpath(folder) not in seen                 # a link may lead back up
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        found += [name if below == "." else f"{below}/{name}" for name in files
                  if new and name[0] != "." and name.lower().endswith(PICTURES)]
    return sorted(found)


def stamp(root: Path, names: list[str]) -> str:
    """Digest of names, sizes and times of files or folders: changes when any of them does."""
    stats = [os.stat(os.path.join(root, name)) for name in names]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)])
    return hashlib.sha1(text.encode("utf-8", "surrogateescape")).hexdigest()


def cached(cache: str | Path | None, key: tuple, build: Callable[[], Index]) -> Index:
    """`build()`, or what it returned before under the same key, from an .npz file in `cache`."""
    if cache is None:
        return build()
    digest = hashlib.sha1(repr((INDEX_VERSION, *key)).encode("utf-8", "surrogateescape"))
    file = Path(cache, f"index-{digest.hexdigest()[:20]}.npz")
    try:
        with np.load(file) as stored:
            columns = {name: stored[name] for name in stored.files if name != "about"}
            return Index(columns=columns, **json.loads(str(stored["about"])))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        index = build()                                            # not there, or not whole
    about = {name: value for name, value in vars(index).items() if name != "columns"}
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            np.savez(out, about=json.dumps(about), **index.columns)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"--cache {file.parent}: cannot be written ({error.strerror})") from None
    return index


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
    """Leave out and count rows whose picture is not there; UserError where none is."""
    root, listed, there = os.fsencode(index.root), {}, []
    for folder, name in map(os.path.split, index.columns["paths"].tolist()):
        if folder not in listed:
            full = os.path.join(root, folder)
            listed[folder] = set(os.listdir(full)) if os.path.isdir(full) else set()
        there.append(name in listed[folder])
    if not any(there):
        raise UserError(f"{index.summary()}; not one of the pictures is below {index.root}")
    return index.drop(~np.array(there), "samples without their picture")


def note_poses(index: Index) -> Index:
    """Say how many samples have no pose."""
    if count := int(np.isnan(index.columns["pose"]).any(1).sum()):
        index.notes.append(f"{count} samples have no pose: no fit, or the MANO file is not given")
    return index


UNLABELLED = "unlabelled frames"


def hand_stamp(mano: dict | None) -> str:
    """Digest of the hand files that poses are converted with."""
    parts = [part for side, hand in sorted((mano or {}).items()) for key in sorted(hand)
             for part in (side.encode(), key.encode(), np.asarray(hand[key]).tobytes())]
    return hashlib.sha1(b"".join(parts)).hexdigest()


def empty_index(name: str, root: Path, note: str) -> Index:
    """An index without rows, for a split that the data set does not have."""
    return Index(name, str(root), {"paths": path_column([]), "side": np.array([], str)}, notes=[note])


def json_numbers(file: Path, dims: tuple[int, ...]) -> np.ndarray:
    """A .json that is nested lists of numbers as (N, *dims), float64; UserError if it is not that.

    It is read as one run of numbers: FreiHAND's vertices would be 76 million Python objects.
    """
    text = file.read_bytes().translate(None, b"[] \t\r\n")
    try:
        values = np.fromstring(text, sep=",")
    except ValueError:
        values = np.empty(0)
    if not text or len(values) != text.count(b",") + 1 or len(values) % math.prod(dims):
        raise UserError(f"{file}: is not a list of entries of "
                        f"{' x '.join(map(str, dims)) or 'one'} numbers each, or is cut off")
    return values.reshape(-1, *dims)


def hand_labels(file: str | Path, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """2D key points of a JSON file -> (21, 2) px, NaN where none, and (21,) confidence.

    Either [coordinates, confidences] as HaMuCo's released labels, or OpenPose's output, of which
    the surest person's hand is taken. UserError where it is neither.
    """
    try:
        found = json.loads(Path(file).read_bytes())
        if isinstance(found, dict):
            people = [np.array(person[f"hand_{side}_keypoints_2d"], float).reshape(N_JOINTS, 3)
                      for person in found["people"] if person.get(f"hand_{side}_keypoints_2d")]
            people.sort(key=lambda hand: hand[:, 2].sum())
            hand = people[-1] if people else np.zeros((N_JOINTS, 3))
            uv, sure = hand[:, :2], hand[:, 2]
        else:
            uv = np.array(found[0], float).reshape(N_JOINTS, 2)
            sure = np.array(found[1], float).reshape(N_JOINTS)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: neither [coordinates, confidences] of 21 points nor OpenPose's "
                        f"hands ({type(error).__name__}: {error})") from error
    known = np.isfinite(uv).all(1) & (sure > 0)
    return np.where(known[:, None], uv, np.nan), np.where(known, sure, 0).clip(0, 1)
