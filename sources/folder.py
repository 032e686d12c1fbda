"""Folders of pictures: any tree with or without labels.jsonl, and ImageNet's class folders."""
from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError
from sources.files import cached, data_folder, drop_unreadable, path_column, pictures_below
from sources.index import PICTURES, DataSet, Index, tight_box
from sources.parsing import intrinsics, numbers, one_of, parse_json, reading
from sources.photos import found_hands

import numpy as np


def index_imagenet(root: str | Path, split: str = "train",
                   cache: str | Path | None = None) -> Index:
    """Class folders as torchvision's ImageFolder, SPLIT/<class>/<picture>; any classes, no labels.

    Pictures that cannot be read are left out, named and counted. UserError: another layout.
    """
    root = data_folder(root, "imagenet")
    found = pictures_below(root / split)
    files = [f"{split}/{file}" for file in found if "/" in file]
    if not files:
        flat = ", and the pictures lie in no class folder" if found else ""
        raise UserError(f"imagenet: {root} must hold {split}/<class>/<picture>{flat}")
    index = _whole_pictures(root, f"imagenet {split}", files, files=files, cache=cache)
    if len(files) < len(found):
        index.dropped["pictures in no class folder"] = len(found) - len(files)
    return index


@cached
def _whole_pictures(root: Path, name: str, paths: list[str]) -> Index:
    """Pictures of which nothing is known, those that can be read."""
    columns = {"paths": path_column(paths), "side": np.full(len(paths), "right")}
    return drop_unreadable(Index(name, str(root), columns))


def index_folder(root: str | Path, split: str = "all", part: str = "",
                 cache: str | Path | None = None) -> Index:
    """Any folder tree of pictures, sorted, or the hands that its labels.jsonl lists.

    labels.jsonl has one object a hand: path, and optionally side, box [x, y, w, h] px, uv,
    confidence, K, joints (m); null is "not known", NaN is refused. With it, pictures without a line
    are left out; without a box the key points' tight box is taken, else the centre square. A
    confidence of 0 makes a key point unknown. Splits go by a hash of the path, so they stay put
    when the folder grows: train 90 %, val 5 %, test 5 %, or all. Pictures that cannot be read are
    left out, named and counted. Part `hands` (or `photos`, as it was called) wants the hands that
    MediaPipe finds in the pictures instead, see `found_hands`. UserError: no folder, no picture, no
    hand, another part, a line and what is wrong in it.
    """
    root = data_folder(root, "folder")
    files = pictures_below(root)
    if not files:
        raise UserError(f"folder: {root} holds no picture ({' '.join(PICTURES)})")
    if part not in ("", *FOUND):
        raise UserError(f"folder:{part}: the part of a folder can be hands (those that MediaPipe "
                        "finds)")
    if part:
        index = found_hands(root, files, cache or "cache/index", "folder hands")
        if not len(index):
            raise UserError(f"{index.summary()}; there is nothing to learn from in {root}")
    elif (root / "labels.jsonl").is_file():
        index = _labelled(root, files, files=[*files, "labels.jsonl"], cache=cache)
    else:
        index = _whole_pictures(root, "folder", files, files=files, cache=cache)
        index.notes.append("there is no labels.jsonl, so the middle square of each picture is cut; "
                           "folder:hands=DIR cuts the hands that MediaPipe finds")
    first, last = {"all": (0, 100), "train": (0, 90), "val": (90, 95), "test": (95, 100)}[split]
    bucket = np.array([zlib.crc32(path) % 100 for path in index.columns["paths"].tolist()])
    index = index.take((bucket >= first) & (bucket < last))
    return dataclasses.replace(index, name=f"{index.name} {split}")


FOUND = ("hands", "photos")                     # parts whose hands are found in the pictures
LABELS = {"box": (4,), "uv": (N_JOINTS, 2), "confidence": (N_JOINTS,), "K": (3, 3),
          "joints": (N_JOINTS, 3)}


def _label(line: bytes, known: set[str]) -> dict:
    """A line of labels.jsonl as path, side, arrays with NaN for null; ValueError where wrong."""
    hand = parse_json(line, nan=False)
    if not isinstance(hand, dict) or not isinstance(hand.get("path"), str):
        raise ValueError('needs an object with "path", the picture below the folder')
    if unknown := set(hand) - {"path", "side", *LABELS}:
        raise ValueError(f"{min(unknown)!r} is none of path, side, {', '.join(LABELS)}")
    label = {"path": Path(hand["path"]).as_posix(),
             "side": one_of(hand.get("side"), "side", "left", "right", None) or "right"}
    if label["path"] not in known:
        raise ValueError(f"the folder holds no picture {hand['path']!r}")
    for key, dims in LABELS.items():
        given = hand.get(key)
        bounds = {"least": 0, "most": 1} if key == "confidence" else {}
        label[key] = np.full(dims, np.nan) if given is None else numbers(
            given, key, *dims, unknown=key not in ("box", "K"), **bounds)
    intrinsics(label["K"])
    if (label["box"][2:] <= 0).any():
        raise ValueError("box is [x, y, width, height] in px, with sizes above 0")
    joints = label["joints"]
    if (np.abs(joints - joints[:1]) > 1).any():
        raise ValueError("joints lie over 1 m from the wrist: they must be in metres")
    return label


@cached
def _labelled(root: Path, pictures: list[str]) -> Index:
    """The hands of labels.jsonl, in its order."""
    file = root / "labels.jsonl"
    known = set(pictures)
    labels = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        with reading(f"{file}, line {number}"):
            labels += [_label(line, known) | {"id": number}] if line.strip() else []
    if not labels:
        raise UserError(f"{file} is empty: give it one line a hand, or delete it")
    columns = {key: np.array([label[key] for label in labels]) for key in ("side", *LABELS)}
    columns["paths"] = path_column([label["path"] for label in labels])
    columns["id"] = np.array([f"{label['path']}#{label['id']}" for label in labels])
    columns["uv"][columns["confidence"] == 0] = np.nan
    columns["confidence"] = np.nan_to_num(columns["confidence"], nan=1.0)
    given = np.isfinite(columns["box"]).all(1)
    columns["box"] = np.where(given[:, None], columns["box"], tight_box(columns["uv"]))
    joints = np.isfinite(columns["box"]).all(1) & ~given
    sources = ("annotated", given.any()), ("joints", joints.any())
    source = ", ".join(source for source, used in sources if used) or "data set"
    unnamed = len(known - {label["path"] for label in labels})
    dropped = {"pictures without a line in labels.jsonl": unnamed} if unnamed else {}
    return drop_unreadable(Index("folder", str(root), columns, source, dropped))


FOLDER = DataSet(index_folder, ("train", "val", "test", "all"))
IMAGENET = DataSet(index_imagenet, ("train", "val"))
