"""The rows of an index as samples, one hand each."""
from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, N_VERTS, UserError, crop, flip, mirror_pose, transform
from sources.index import MIRROR, SAMPLE_COLUMNS, Index
from sources.loader import Source
from sources.pictures import (
    cut_square, picture_size, read_image, read_shrunk, undistort_picture)
from sources.reading import read_items
from sources.squares import Kept

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Hands(Source):
    """The one loader: an Index, crops `size` px wide of `margin` x the box -> sample dictionaries.

    Without a box the crop is the centre square, whatever the margin. Left hands are mirrored to
    right; `side` tells. Numbers are float32; confidence is 1 and visible is "inside the picture"
    where the data set says nothing. uv never stands in for a missing uv_label: a label that is the
    truth would teach it, and score without error. A picture that breaks after the index was checked
    is named on stderr and gives a black image with every `has` False: batches and resumed runs stay
    the same. `kept` holds the squares that were read before, and gets those that are read.
    """

    def __init__(self, index: Index, size: int, margin: float, kept: Kept | None = None):
        self.index = index
        self.size = size
        self.margin = margin
        self.name = index.name
        self.box_source = index.box_source
        self.kept = kept

    def __len__(self) -> int:
        return len(self.index)

    @property
    def picture_bytes(self) -> int:
        """See `Source`."""
        return 3 * self.size ** 2

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`."""
        return read_items(self, plan, device, workers)

    def columns(self, rows: Tensor) -> dict[str, np.ndarray]:
        """See `Source`; what is not part of a sample, see `Index`."""
        at = rows.cpu().numpy()
        return {key: column[at] for key, column in self.index.columns.items()
                if key not in SAMPLE_COLUMNS}

    def gives(self, key: str) -> bool:
        """See `Source`."""
        column = self.index.columns.get(key, np.empty(0))
        return bool(np.isfinite(column).any() if column.dtype.kind == "f" else len(column))

    def __getitem__(self, row: int) -> dict:
        found = self.read([row])
        has = {key: bool(flag) for key, flag in found["has"].items()}
        return {key: value[0] for key, value in found.items() if key != "has"} | {"has": has}

    def read(self, rows: list[int]) -> dict:
        """See `Source`."""
        at = np.array(rows)
        images = np.empty((len(at), 3, self.size, self.size), np.uint8)
        sizes = np.full((len(at), 2), self.size)
        broken = np.zeros(len(at), bool)
        for k, row in enumerate(at.tolist()):
            found = self._picture(row)
            broken[k] = found is None
            images[k], sizes[k] = found or (0, self.size)
        return {"image": torch.from_numpy(images), **self._labels(at, sizes, broken)}

    def _picture(self, row: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A row's square (3, S, S), and (width, height) of its picture; None where that broke."""
        kept = self.kept.read(row) if self.kept else None
        if kept is not None:
            return kept["image"], kept["size"]
        columns = self.index.columns
        path = Path(self.index.root, self.index.path(row))
        at, whole = np.array([row]), np.zeros(1, bool)

        def ratio(size: tuple[int, int]) -> float:
            return float(self._squares(at, np.array([size]), whole)[1][0]) / self.size

        try:
            if "dist" in columns:
                found = undistort_picture(read_image(path), columns["K"][row], columns["dist"][row])
                picture, shrunk = Image.fromarray(found), 1
            else:
                picture, shrunk = read_shrunk(path, ratio)
        except UserError as error:
            if not path.exists():
                raise
            print(f"\n{error}; it becomes a black image without labels", file=sys.stderr)
            return None
        size = shrunk * np.array(picture.size)
        (middle,), (side,) = self._squares(at, size[None], whole)
        if max(side, *abs(middle) / 1000) > 16 * max(size):
            raise UserError(f"{path}: box {tuple(columns['box'][row].tolist())} of "
                            f"{self.index.id(row)} is far off the picture")
        image = cut_square(picture, (middle + 0.5) / shrunk - 0.5, side / shrunk, self.size)
        image = image[:, ::-1] if columns["side"][row] == "left" else image
        image = image.transpose(2, 0, 1)
        if self.kept:
            self.kept.write(row, np.array([(image, size)], self.kept.record))
        return image, size

    def targets(self, rows: Tensor) -> dict:
        """See `Source`; side_px is the side that the pictures would have."""
        at = rows.cpu().numpy()
        sizes = np.full((len(at), 2), self.size)
        box = self.index.columns.get("box", np.full((len(self), 4), np.nan))[at]
        for k in np.flatnonzero(np.isnan(box).any(1)).tolist():
            sizes[k] = picture_size(Path(self.index.root, self.index.path(at[k])))
        side = torch.full((len(at),), float(self.size))
        return self._labels(at, sizes, np.zeros(len(at), bool)) | {"side_px": side}

    def _labels(self, rows: np.ndarray, sizes: np.ndarray, broken: np.ndarray) -> dict:
        """All of some samples but their pictures, of (width, height) `sizes` (B, 2)."""
        index = self.index
        sample = _numbers(index.columns, rows, sizes, broken)
        middle, side = map(torch.from_numpy, self._squares(rows, sizes, broken))
        A = crop(middle, side.float().double(), self.size)         # the side is a float32 number
        left = index.columns["side"][rows] == "left"
        if left.any():
            A[left] = flip(torch.ones(1).double(), self.size) @ A[left]
            for key in ("K", "joints", "verts", "trans"):
                sample[key][left] = sample[key][left] @ MIRROR
            sample["pose"][left] = mirror_pose(torch.from_numpy(sample["pose"][left])).numpy()
        sample["crop"] = A.numpy()                                 # picture px -> image px
        sample["K"] = sample["crop"] @ sample["K"]
        for key in ("uv", "uv_label"):
            sample[key] = transform(A, torch.from_numpy(sample[key])).numpy()
        known = {key: np.isfinite(sample[key]).reshape(len(rows), -1)
                 for key in ("K", "verts", "pose", "shape")}
        ok = np.isfinite(sample["joints"]).all(-1)
        seen = np.isfinite(sample["uv"]).reshape(len(rows), -1)
        has = {"joints": ok.any(1), "uv": seen.any(1), "cameras": np.zeros(len(rows), bool)}
        has |= {key: flags.all(1) for key, flags in known.items()}
        flags = {"joints_ok": ok, "visible": sample.pop("visible")}
        return {
            **{key: torch.from_numpy(value).float() for key, value in sample.items()},
            **{key: torch.from_numpy(value) for key, value in flags.items()},
            "has": {key: torch.from_numpy(value) for key, value in has.items()},
            "id": [index.id(row) for row in rows.tolist()],
            "side": index.columns["side"][rows].tolist(),
            "box_source": [index.box_source] * len(rows)}

    def _squares(self, rows: np.ndarray, sizes: np.ndarray, broken: np.ndarray) -> tuple:
        """Middles (B, 2) px and sides (B,) px of the crops of pictures (width, height) `sizes`."""
        middle = (sizes - 1) / 2
        side = sizes.min(1).astype(float)
        if "box" not in self.index.columns:
            return middle, side
        box = self.index.columns["box"][rows].astype(float)
        boxed = ~np.isnan(box).any(1) & ~broken
        wide = np.maximum(self.margin * box[:, 2:].max(1), 2.0)
        middle[boxed] = (box[:, :2] + box[:, 2:] / 2)[boxed] - 0.5       # edges to pixel centres
        side[boxed] = wide[boxed]
        return middle, side


def enough_px(index: Index, size: int, margin: float) -> int:
    """`size`, or less where no square of `margin` x the box has so many px of its picture."""
    box = index.columns.get("box", np.full((1, 4), np.nan))
    widest = margin * float(box[:, 2:].max(initial=0))                  # NaN: some picture is whole
    return min(size, math.ceil(widest)) if widest > 0 else size


def _numbers(columns: dict[str, np.ndarray], rows: np.ndarray, sizes: np.ndarray,
             broken: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of some rows before cropping, (B, ...) float64, NaN where unknown.

    sizes (B, 2) is (width, height); of the `broken` pictures nothing is known.
    """
    def get(key: str, default: np.ndarray) -> np.ndarray:
        if key not in columns:
            return default.astype(float, copy=False)
        found = columns[key][rows].astype(float)
        found[broken] = default[broken]
        return found

    B = len(rows)
    shapes = {"K": (3, 3), "joints": (N_JOINTS, 3), "verts": (N_VERTS, 3), "uv": (N_JOINTS, 2),
              "uv_label": (N_JOINTS, 2), "pose": (48,), "shape": (10,), "trans": (3,)}
    sample = {key: get(key, np.full((B, *dims), np.nan)) for key, dims in shapes.items()}
    known = np.isfinite(sample["uv_label" if "uv_label" in columns else "uv"]).all(-1)
    inside = ((sample["uv"] >= -0.5) & (sample["uv"] <= sizes[:, None] - 0.5)).all(-1)
    return sample | {"confidence": np.where(known, get("confidence", known), 0),
                     "visible": get("visible", inside).astype(bool),
                     "scale": get("scale", np.ones(B)), "size": sizes.astype(float)}
