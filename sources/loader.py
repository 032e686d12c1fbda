"""The protocol of a source, and sources made of sources."""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

# common before torch: it settles how threads wait
from common import world

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate as collate


# ---- The protocol --------------------------------------------------------------------------------


class Targets(Protocol):
    """What knows the labels of its samples; see the head of sources/__init__.py."""

    def __len__(self) -> int: ...

    def targets(self, rows: Tensor) -> dict:
        """The samples of `rows` (B,) without pictures, collated, on the CPU; with side_px (B,)."""
        ...


@runtime_checkable
class Source(Targets, Protocol):
    """Where samples come from: the one thing that scripts know of data; see sources/__init__.py.

    The methods with a body here are right for a data set that has no columns and no parts.
    """

    name: str
    box_source: str
    picture_bytes: int = 0           # of a sample, where they bound what is read ahead

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """The samples of each (B,) int64 tensor of rows in `plan`, collated, on the device."""
        ...

    def read(self, rows: list[int]) -> dict:
        """The samples of some rows, collated, on the CPU: what `read_items` asks for."""
        return collate([self[row] for row in rows])

    def columns(self, rows: Tensor) -> dict[str, np.ndarray]:
        """The data set's own numbers at `rows` (B,) that a sample does not hold, {} where none."""
        return {}

    def parts(self) -> list[Source]:
        """The sources that were joined, else the source alone."""
        return [self]

    def gives(self, key: str) -> bool:
        """Whether the data set itself holds `key` (uv_label, cameras, ...) of some sample."""
        ...


# ---- Sources of sources --------------------------------------------------------------------------


class Rows(Source):
    """Some rows of a source, (n,) int64, in ascending order."""

    def __init__(self, data: Source, rows: Tensor):
        self.data = data
        self.rows = rows
        self.name = data.name
        self.box_source = data.box_source

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`."""
        return self.data.batches([self.rows[rows] for rows in plan], device, workers)

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        return self.data.targets(self.rows[rows])

    def columns(self, rows: Tensor) -> dict[str, np.ndarray]:
        """See `Source`."""
        return self.data.columns(self.rows[rows])

    def gives(self, key: str) -> bool:
        """See `Source`; of the whole source."""
        return self.data.gives(key)


class Joined(Source):
    """Several sources, one after the other.

    It has no columns, since numbers of one data set mean nothing in another, and of what sources
    give beyond the sample dictionary (the mask of rendered hands) only what all of them have.
    """

    box_source = "each data set's own"

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.name = ", ".join(source.name for source in sources)
        self.starts = torch.tensor([0, *map(len, sources)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def parts(self) -> list[Source]:
        """See `Source`."""
        return self.sources

    def gives(self, key: str) -> bool:
        """See `Source`; whether every part does."""
        return all(source.gives(key) for source in self.sources)

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`; the worker processes are shared out to the parts."""
        split = [self._split(rows) for rows in plan]
        each = math.ceil(workers / len(self.sources))
        streams = [source.batches([rows[k] for rows, _ in split if k in rows], device, each)
                   for k, source in enumerate(self.sources)]
        for rows, order in split:
            found = [next(stream) for k, stream in enumerate(streams) if k in rows]
            batch = _together(found, order)
            batch.pop("mask", None)
            yield batch

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        own, order = self._split(rows)
        return _together([self.sources[k].targets(at) for k, at in own.items()], order)

    def _split(self, rows: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Rows (B,) as {part: its own rows}, and the order (B,) that undoes the sorting by part."""
        part = torch.bucketize(rows, self.starts[1:], right=True)
        own = {k: rows[part == k] - self.starts[k] for k in part.unique().tolist()}
        return own, part.argsort(stable=True).argsort()


def _together(found: list[dict], order: Tensor) -> dict:
    """Collated samples one after the other, then taken in `order` (B,); keys that all have."""
    out = {}
    for key, first in found[0].items():
        values = [one[key] for one in found if key in one]
        if len(values) < len(found):
            continue
        if isinstance(first, dict):
            out[key] = _together(values, order)
        elif isinstance(first, Tensor):
            out[key] = torch.cat(values)[order.to(first.device)]
        else:
            strings = [text for value in values for text in value]
            out[key] = [strings[i] for i in order.tolist()]
    return out


def gather(parts: list[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
    """Columns of n samples, process r's those of range(r, n, world): all of them, in that order."""
    mine = {k: torch.cat([part[k] for part in parts]).cpu() for k in parts[0]} if parts else {}
    if world() == 1:
        return mine
    everyone: list[dict | None] = [None] * world()
    torch.distributed.all_gather_object(everyone, mine)
    order = torch.cat([torch.arange(n)[r::world()] for r in range(world())]).argsort()
    keys = next((part for part in everyone if part), {})
    return {k: torch.cat([part[k] for part in everyone if part])[order] for k in keys}
