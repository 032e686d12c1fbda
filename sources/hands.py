"""The rows of an index as samples, one hand each."""
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, N_VERTS, UserError, crop, flip, mirror_pose, transform
from sources.index import MIRROR, SAMPLE_COLUMNS, Index
from sources.loader import Source, read_items
from sources.pictures import cut_square, picture_size, read_image, undistort_picture

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate as collate


class Hands(Source):
    """The one loader: an Index, crops `size` px wide of `margin` x the box -> sample dictionaries.

    Without a box the crop is the centre square, whatever the margin. Left hands are mirrored to
    right; `side` tells. Numbers are float32; confidence is 1 and visible is "inside the picture"
    where the data set says nothing. uv never stands in for a missing uv_label: a label that is the
    truth would teach it, and score without error. A picture that breaks after the index was checked
    is named on stderr and gives a black image with every `has` False: batches and resumed runs stay
    the same.
    """

    def __init__(self, index: Index, size: int, margin: float):
        self.index = index
        self.size = size
        self.margin = margin
        self.name = index.name
        self.box_source = index.box_source

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
        index = self.index
        columns = index.columns
        path = Path(index.root, index.path(row))
        try:
            picture = read_image(path)
        except UserError as error:
            if not path.exists():
                raise
            print(f"{error}; it becomes a black image without labels", file=sys.stderr)
            picture = np.zeros((self.size, self.size, 3), np.uint8)
            columns = {}
        if "dist" in columns:
            picture = undistort_picture(picture, columns["K"][row], columns["dist"][row])
        middle, side = self._square(columns.get("box"), row, picture.shape[1::-1])
        image = cut_square(picture, middle, side, self.size)
        image = image[:, ::-1] if index.columns["side"][row] == "left" else image
        return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
                **self._labels(columns, row, picture.shape[1::-1], middle, side)}

    def targets(self, rows: Tensor) -> dict:
        """See `Source`; side_px is the side that the pictures would have."""
        found = []
        box = self.index.columns.get("box")
        for row in rows.tolist():
            size = (self.size, self.size)
            if box is None or np.isnan(box[row]).any():
                size = picture_size(Path(self.index.root, self.index.path(row)))
            found.append(self._labels(self.index.columns, row, size, *self._square(box, row, size)))
        return collate(found) | {"side_px": torch.full((len(rows),), float(self.size))}

    def _labels(self, columns: dict[str, np.ndarray], row: int, size: tuple[int, int],
                middle: np.ndarray, side: float) -> dict:
        """All of a sample but its picture, which is `size` (width, height), cut at `middle`."""
        index = self.index
        sample = _numbers(columns, row, size)
        A = crop(torch.tensor(middle)[None], torch.tensor([side]).double(), self.size)
        if index.columns["side"][row] == "left":
            A = flip(torch.ones(1).double(), self.size) @ A
            sample |= {key: sample[key] @ MIRROR for key in ("K", "joints", "verts", "trans")}
            sample["pose"] = mirror_pose(torch.tensor(sample["pose"])).numpy()
        sample["crop"] = A[0].numpy()                              # picture px -> image px
        sample["K"] = sample["crop"] @ sample["K"]
        for key in ("uv", "uv_label"):
            sample[key] = transform(A[0], torch.tensor(sample[key])).numpy()
        ok = np.isfinite(sample["joints"]).all(-1)
        has = {"joints": ok.any(), "uv": np.isfinite(sample["uv"]).any(), "cameras": False}
        has |= {key: np.isfinite(sample[key]).all() for key in ("K", "verts", "pose", "shape")}
        flags = {"joints_ok": ok, "visible": sample.pop("visible")}
        return {
            **{key: torch.tensor(value, dtype=torch.float32) for key, value in sample.items()},
            **{key: torch.tensor(value) for key, value in flags.items()},
            "has": {key: bool(value) for key, value in has.items()}, "id": index.id(row),
            "side": str(index.columns["side"][row]), "box_source": index.box_source}

    def _square(self, box: np.ndarray | None, row: int, size: Sequence[int]) -> tuple:
        """Middle (2,) px and side px of the crop of a picture `size` (width, height)."""
        if box is None or np.isnan(box[row]).any():
            return (np.array(size) - 1) / 2, float(min(size))
        x, y, w, h = box[row].tolist()
        side = max(self.margin * max(w, h), 2.0)
        if max(side, abs(x) / 1000, abs(y) / 1000) > 16 * max(size):
            raise UserError(f"{self.index.id(row)}: box {x, y, w, h} is far off the picture")
        return np.array([x + w / 2, y + h / 2]) - 0.5, side              # edges to pixel centres


def _numbers(columns: dict[str, np.ndarray], row: int, size: tuple) -> dict[str, np.ndarray]:
    """One row's numbers before cropping, NaN where unknown; size is (width, height)."""
    def get(key: str, default: object) -> np.ndarray:
        return np.array(columns[key][row] if key in columns else default, float)

    shapes = {"K": (3, 3), "joints": (N_JOINTS, 3), "verts": (N_VERTS, 3), "uv": (N_JOINTS, 2),
              "uv_label": (N_JOINTS, 2), "pose": (48,), "shape": (10,), "trans": (3,)}
    sample = {key: get(key, np.full(dims, np.nan)) for key, dims in shapes.items()}
    known = np.isfinite(sample["uv_label" if "uv_label" in columns else "uv"]).all(-1)
    inside = ((sample["uv"] >= -0.5) & (sample["uv"] <= np.array(size) - 0.5)).all(-1)
    return sample | {"confidence": np.where(known, get("confidence", known), 0),
                     "visible": get("visible", inside).astype(bool),
                     "scale": get("scale", 1), "size": np.array(size, float)}
