"""How the samples of a plan are read: by worker processes, ahead of their use, onto the device."""
from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator

# common before torch: it settles how threads wait
from common import UserError, world
from sources.loader import Source

import torch
from torch import Tensor


# So much is read ahead, in bytes and in batches, by all workers of a source: a step of any of the
# four recipes has at most 64 micro-batches, so the next one is read while this one is computed.
AHEAD_BYTES = 1 << 30
AHEAD = 64
SHARED = "/dev/shm"                  # where batches wait; at most a quarter of what is free there

# Those that wait for a disk may outnumber the cores, and --workers says how many there are.
warnings.filterwarnings("ignore", message="This DataLoader will create")


def read_items(data: Source, plan: list[Tensor], device: torch.device,
               workers: int) -> Iterator[dict]:
    """`Source.batches` of a data set that reads sample by sample, in so many worker processes.

    They start anew in each epoch (four in 0.2 s) and end with the iterator, wherever it is left.
    """
    workers = min(workers, len(plan))
    loader = torch.utils.data.DataLoader(
        Planned(data, plan), batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=read_ahead(data, plan, workers) if workers else None)
    return on_device(_told(iter(loader)), device)


class Planned(torch.utils.data.Dataset):
    """The batches of a plan, one an item, for torch's DataLoader."""

    def __init__(self, data: Source, plan: list[Tensor]):
        self.data = data
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> dict:
        return self.data.read(self.plan[k].tolist())


def read_ahead(data: Source, plan: list[Tensor], workers: int) -> int:
    """How many batches each worker has ready or in hand, at least two."""
    largest = max(map(len, plan)) * data.picture_bytes
    room = AHEAD_BYTES
    if os.path.isdir(SHARED):
        room = min(room, shutil.disk_usage(SHARED).free // (4 * world()))
    return max(2, min(AHEAD, room // max(largest, 1)) // workers)


def _told(stream: Iterator[dict]) -> Iterator[dict]:
    """The batches, a worker's UserError without the traceback it comes wrapped in."""
    try:
        yield from stream
    except UserError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(last.removeprefix("common.UserError: ")) from None


def on_device(stream: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """The batches on the device; on CUDA the next is copied there while the last is computed."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in stream)
        return
    lane = torch.cuda.Stream(device)
    coming = None
    for batch in stream:
        with torch.cuda.stream(lane):
            following = to_device(batch, device), lane.record_event()
        if coming:
            yield _arrived(*coming)
        coming = following
    if coming:
        yield _arrived(*coming)


def _arrived(batch: dict, copied: torch.cuda.Event) -> dict:
    """A batch that another stream copied, for use on this one."""
    here = torch.cuda.current_stream()
    here.wait_event(copied)
    for value in (*batch.values(), *batch.get("has", {}).values()):
        if isinstance(value, Tensor):
            value.record_stream(here)           # its memory is not given away while it is used
    return batch


def to_device(batch: dict, device: torch.device | str) -> dict:
    """A batch with its tensors, and those of dictionaries in it, on a device; the rest stays."""
    wait = torch.device(device).type == "cpu"                # a copy to the CPU is read at once
    moved = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            moved[key] = to_device(value, device)
        else:
            held = isinstance(value, Tensor)
            moved[key] = value.to(device, non_blocking=not wait) if held else value
    return moved
