"""Moments seen by several cameras as samples."""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import UserError
from sources.hands import Hands
from sources.loader import Source
from sources.reading import read_items

import numpy as np
import torch
from torch import Tensor


class Rig(NamedTuple):
    """How multi-view samples are asked for; two are the noise of rendered labels."""
    views: int = 1                  # V, the first cameras; samples get a leading axis V
    outliers: float = 0.1           # see Synthetic
    detector: float = 1.0
    cameras: tuple[int, ...] = ()   # which of these, in this order; all where none is named


class Views(Source):
    """Synchronised pictures as one sample (V, ...): `Hands` with columns moment, camera, cameras.

    Slot v is the data set's v-th camera, or the v-th of `cameras`. A moment without that picture
    has a black one there, NaN and False, and view_ok (V,) False; moments without any picture are
    not there. cameras (V, 4, 4) is world to camera, in the data set's unit of length; left hands
    are mirrored with their cameras. `zoom` is px of the square that was asked for to one of the
    picture, where that has fewer.
    """

    def __init__(self, hands: Hands, views: int, cameras: tuple[int, ...] = (), zoom: float = 1.0):
        self.hands = hands
        self.zoom = zoom
        self.name = hands.name
        self.box_source = hands.box_source
        columns = hands.index.columns
        moments, row = np.unique(columns["moment"], return_inverse=True)
        views = min(views, 1 + int(columns["camera"].max(initial=0)))
        keep = columns["camera"] < views
        if len(keep) and not keep.any():
            there = sorted(set(columns["camera"].tolist()))
            raise UserError(f"{self.name}: has pictures of camera {' '.join(map(str, there))} "
                            f"alone, counted from 0; take --views {there[0] + 1} or more")
        rows = np.full((len(moments), views), -1)
        rows[row[keep], columns["camera"][keep]] = np.flatnonzero(keep)
        if cameras:
            if max(cameras) >= views:
                raise UserError(f"{self.name}: has {views} cameras, from 0 on, so no "
                                f"{max(cameras)}")
            rows = rows[:, list(cameras)]
        self.rows = rows[(rows >= 0).any(1)]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def picture_bytes(self) -> int:
        """See `Source`."""
        return self.rows.shape[1] * self.hands.picture_bytes

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`."""
        return read_items(self, plan, device, workers)

    def gives(self, key: str) -> bool:
        """See `Source`."""
        return self.hands.gives(key)

    def __getitem__(self, moment: int) -> dict:
        found = self.read([moment])
        has = {key: bool(flag) for key, flag in found["has"].items()}
        return {key: value[0] for key, value in found.items() if key != "has"} | {"has": has}

    def read(self, moments: list[int]) -> dict:
        """See `Source`."""
        at = self.rows[moments]
        return self._stack(at, self.hands.read(at[at >= 0].tolist()))

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        at = self.rows[rows.cpu().numpy()]
        found = self.hands.targets(torch.from_numpy(at[at >= 0]))
        return self._stack(at, found) | {"side_px": found["side_px"].new_full(
            (len(at),), self.hands.size)}

    def paths(self, moment: int) -> list[str]:
        """The picture of each camera, relative to the data set's folder, "" where there is none."""
        return [self.hands.index.path(row) if row >= 0 else "" for row in self.rows[moment]]

    def _stack(self, at: np.ndarray, found: dict) -> dict:
        """Moments of the rows `at` (B, V), -1 for none, of the pictures `found` that are there."""
        ok = at >= 0

        def each(value: Tensor, blank: float) -> Tensor:
            out = value.new_full((*ok.shape, *value.shape[1:]), blank)
            out[torch.from_numpy(ok)] = value
            return out

        columns = self.hands.index.columns
        out = {key: each(value, math.nan if value.is_floating_point() else 0)
               for key, value in found.items() if isinstance(value, Tensor)}
        has = {key: each(flag, False).any(1) for key, flag in found["has"].items()}
        mirror = np.where((columns["side"][at[ok]] == "left")[:, None, None],
                          np.diag([-1.0, 1, 1, 1]), np.eye(4))
        M = np.full((*ok.shape, 4, 4), np.nan)
        M[ok] = mirror @ columns["cameras"][at[ok]] @ mirror
        if self.zoom != 1:
            out["zoom"] = torch.full(ok.shape, self.zoom)
        last = at.max(1)
        return out | {"cameras": torch.from_numpy(M).float(), "view_ok": torch.from_numpy(ok),
                      "confidence": out["confidence"].nan_to_num(),
                      "has": has | {"cameras": torch.from_numpy(np.isfinite(M).any((1, 2, 3)))},
                      "side": columns["side"][last].tolist(),
                      "box_source": [self.box_source] * len(at),
                      "id": columns["moment"][last].tolist()}


class Cameras(Source):
    """Some cameras of a source whose samples have a view axis, in the order given."""

    def __init__(self, data: Source, cameras: tuple[int, ...]):
        self.data = data
        self.cameras = list(cameras)
        self.name = data.name
        self.box_source = data.box_source

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`."""
        for batch in self.data.batches(plan, device, workers):
            yield self._some(batch)

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        return self._some(self.data.targets(rows))

    def gives(self, key: str) -> bool:
        """See `Source`."""
        return self.data.gives(key)

    def _some(self, batch: dict) -> dict:
        """Without the other cameras, in every tensor that has a place for each."""
        views = batch["view_ok"].shape
        return {key: x[:, self.cameras] if isinstance(x, Tensor) and x.shape[:2] == views else x
                for key, x in batch.items()}
