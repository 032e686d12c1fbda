"""Moments seen by several cameras as samples."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator

# common before torch: it settles how threads wait
from common import UserError
from sources.hands import Hands
from sources.loader import Source, read_items

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate as collate


class Views(Source):
    """Synchronised pictures as one sample (V, ...): `Hands` with columns moment, camera, cameras.

    Slot v is the data set's v-th camera, or the v-th of `cameras`. A moment without that picture
    has a black one there, NaN and False, and view_ok (V,) False; moments without any picture are
    not there. cameras (V, 4, 4) is world to camera, in the data set's unit of length; left hands
    are mirrored with their cameras.
    """

    def __init__(self, hands: Hands, views: int, cameras: tuple[int, ...] = ()):
        self.hands = hands
        self.name = hands.name
        self.box_source = hands.box_source
        columns = hands.index.columns
        moments, row = np.unique(columns["moment"], return_inverse=True)
        views = min(views, 1 + int(columns["camera"].max(initial=0)))
        keep = columns["camera"] < views
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
        return self._stack(moment, self.hands.__getitem__)

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        def first(row: int) -> dict:
            one = self.hands.targets(torch.tensor([row]))
            return {key: value[0] for key, value in one.items() if isinstance(value, Tensor)}

        found = [self._stack(moment, first) for moment in rows.tolist()]
        return collate(found) | {"side_px": torch.full((len(rows),), float(self.hands.size))}

    def paths(self, moment: int) -> list[str]:
        """The picture of each camera, relative to the data set's folder, "" where there is none."""
        return [self.hands.index.path(row) if row >= 0 else "" for row in self.rows[moment]]

    def _stack(self, moment: int, read: Callable[[int], dict]) -> dict:
        """One moment's samples on top of each other."""
        rows = self.rows[moment].tolist()
        index = self.hands.index
        found = {v: read(row) for v, row in enumerate(rows) if row >= 0}
        first = next(iter(found.values()))
        blank = {key: torch.full_like(value, math.nan if value.is_floating_point() else 0)
                 for key, value in first.items() if isinstance(value, Tensor)}
        out = {key: torch.stack([found.get(v, blank)[key] for v in range(len(rows))])
               for key in blank}
        M = np.full((len(rows), 4, 4), np.nan)
        for v, row in enumerate(rows):
            if row >= 0:
                mirrored = index.columns["side"][row] == "left"
                D = np.diag([-1.0, 1, 1, 1]) if mirrored else np.eye(4)
                M[v] = D @ index.columns["cameras"][row] @ D
        has = {key: any(one["has"][key] for one in found.values()) for key in first.get("has", ())}
        row = max(rows)
        return out | {"cameras": torch.tensor(M, dtype=torch.float32),
                      "view_ok": torch.tensor([row >= 0 for row in rows]),
                      "confidence": out["confidence"].nan_to_num(),
                      "has": has | {"cameras": bool(np.isfinite(M).any())},
                      "side": str(index.columns["side"][row]), "box_source": self.box_source,
                      "id": str(index.columns["moment"][row])}


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
