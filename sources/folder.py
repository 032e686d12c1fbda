"""Folders of pictures: any tree with or without labels.jsonl, and ImageNet's class folders."""
from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError
from sources.index import (
    PICTURES, DataSet, Index, cached, data_folder, drop_unreadable, path_column, pictures_below,
    stamp, tight_box)

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
        raise UserError(f"imagenet: {root} must hold {split}/<class>/<picture>"
                        + (", and the pictures lie in no class folder" if found else ""))
    columns = {"paths": path_column(files), "side": np.full(len(files), "right")}
    index = cached(cache, ("imagenet", os.path.realpath(root), split, stamp(root, files)),
                    lambda: drop_unreadable(Index(f"imagenet {split}", str(root), columns)))
    if len(files) < len(found):
        index.dropped["pictures in no class folder"] = len(found) - len(files)
    return index


def index_folder(root: str | Path, split: str = "all", cache: str | Path | None = None) -> Index:
    """Any folder tree of pictures, sorted, or the hands that its labels.jsonl lists.

    labels.jsonl has one object a hand: path, and optionally side, box [x, y, w, h] px, uv,
    confidence, K, joints (m); null is "not known", NaN is refused. With it, pictures without a line
    are left out; without a box the key points' tight box is taken, else the centre square. A
    confidence of 0 makes a key point unknown. Splits go by a hash of the path, so they stay put
    when the folder grows: train 90 %, val 5 %, test 5 %, or all. Pictures that cannot be read are
    left out, named and counted. UserError: no folder, no picture, a line and what is wrong in it.
    """
    root = data_folder(root, "folder")
    files = pictures_below(root)
    if not files:
        raise UserError(f"folder: {root} holds no picture ({' '.join(PICTURES)})")
    labels = ["labels.jsonl"] * (root / "labels.jsonl").is_file()
    columns = {"paths": path_column(files), "side": np.full(len(files), "right")}
    plain = Index("folder", str(root), columns)
    index = cached(cache, ("folder", os.path.realpath(root), stamp(root, files + labels)),
                    lambda: drop_unreadable(_labelled(plain, set(files)) if labels else plain))
    first, last = {"all": (0, 100), "train": (0, 90), "val": (90, 95), "test": (95, 100)}[split]
    bucket = np.array([zlib.crc32(path) % 100 for path in index.columns["paths"].tolist()])
    index = index.take((bucket >= first) & (bucket < last))
    return dataclasses.replace(index, name=f"folder {split}")


LABELS = {"box": (4,), "uv": (N_JOINTS, 2), "confidence": (N_JOINTS,), "K": (3, 3),
          "joints": (N_JOINTS, 3)}


def _label(line: bytes, known: set[str]) -> dict:
    """A line of labels.jsonl as path, side, arrays with NaN for null; ValueError where wrong."""
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not allowed, use null")

    hand = json.loads(line, parse_constant=refuse)
    if not isinstance(hand, dict) or not isinstance(hand.get("path"), str):
        raise ValueError('needs an object with "path", the picture below the folder')
    if unknown := set(hand) - {"path", "side", *LABELS}:
        raise ValueError(f"{min(unknown)!r} is none of path, side, {', '.join(LABELS)}")
    label = {"path": Path(hand["path"]).as_posix(), "side": hand.get("side") or "right"}
    if label["path"] not in known:
        raise ValueError(f"the folder holds no picture {hand['path']!r}")
    if label["side"] not in ("left", "right"):
        raise ValueError(f"side must be left or right, not {label['side']!r}")
    for key, dims in LABELS.items():
        given = hand.get(key)
        value = np.full(dims, np.nan) if given is None else np.array(given, float)
        if value.shape != dims:
            raise ValueError(f"{key} must be {' x '.join(map(str, dims))} numbers, "
                             f"not {value.shape}")
        whole = given is None or key not in ("box", "K") or not np.isnan(value).any()
        if np.isinf(value).any() or not whole:
            raise ValueError(f"{key} must be finite")
        label[key] = value
    box, K, sure, joints = (label[key] for key in ("box", "K", "confidence", "joints"))
    if (box[2:] <= 0).any():
        raise ValueError("box is [x, y, width, height] in px, with sizes above 0")
    if (K[2] != [0, 0, 1]).any() and hand.get("K") or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError("K must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in px")
    if ((sure < 0) | (sure > 1)).any():
        raise ValueError("confidence must lie in [0, 1]")
    if (np.abs(joints - joints[:1]) > 1).any():
        raise ValueError("joints lie over 1 m from the wrist: they must be in metres")
    return label


def _labelled(plain: Index, known: set[str]) -> Index:
    """The hands of labels.jsonl, in its order."""
    labels, file = [], Path(plain.root, "labels.jsonl")
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            labels += [_label(line, known) | {"id": number}] if line.strip() else []
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: {error}") from error
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
    return Index(plain.name, plain.root, columns, source, dropped)


FOLDER = DataSet(index_folder, ("train", "val", "test", "all"))
IMAGENET = DataSet(index_imagenet, ("train", "val"))
