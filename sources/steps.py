"""Which samples make a batch, a step and an epoch, and when they are waited for."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

# common before torch: it settles how threads wait
from common import permutation, share, steps_per_epoch, world
from sources.loader import Source

import torch
from torch import Tensor


def batches(data: Source, plan: list[Tensor], device: torch.device, workers: int
            ) -> Iterator[dict]:
    """Read the samples named by each (B,) tensor of `plan`, modulo len(data), in that order.

    Each batch gets `index` (B,) as planned, from which every random draw of its views is computed;
    on the device, and as `index_host` where the host draws.
    """
    rows = [index % len(data) for index in plan]
    for index, batch in zip(plan, data.batches(rows, device, workers)):
        moved = index.to(device, non_blocking=True)
        yield batch | {"index": moved, "index_host": index}


class Pace(Protocol):
    """The options that `training_steps` reads of any script's Config."""

    batch_size: int
    micro_batch: int
    seed: int
    workers: int


class MicroBatches(Sequence):
    """A step's micro-batches: each is waited for when it is first asked for, and kept.

    So the first is computed while workers still read the others.
    """

    def __init__(self, stream: Iterator[dict], count: int):
        self.stream = stream
        self.count = count
        self.taken: list[dict] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict:
        place = range(self.count)[k]                     # IndexError beyond the last
        while len(self.taken) <= place:
            self.taken.append(next(self.stream))
        return self.taken[place]


def training_steps(data: Source, cfg: Pace, epoch: int, first: int, device: torch.device,
                   order: Tensor | None = None) -> Iterator[tuple[int, MicroBatches]]:
    """(step within the epoch, this process's micro-batches), from step `first` on.

    The order is permutation(n, seed, epoch), so a resumed epoch goes on with the same samples; or
    `order`, int64. There and in `index`, i + k n is sample i for the k-th time: its views differ.
    """
    n = len(data)
    steps = steps_per_epoch(n, cfg.batch_size)
    need = steps * cfg.batch_size
    if order is None:
        order = permutation(n, cfg.seed, epoch)
    again = n * (1 + int(order.max()) // n)
    order = torch.cat([order + k * again for k in range(math.ceil(need / n))])[:need]
    mine = share(cfg.batch_size, cfg.micro_batch)
    micro = order.view(steps, -1, cfg.micro_batch)[first:, mine]
    stream = batches(data, list(micro.flatten(0, 1)), device, cfg.workers)
    try:
        for step in range(first, steps):
            micro_batches = MicroBatches(stream, micro.shape[1])
            yield step, micro_batches
            _ = micro_batches[-1]           # what this step did not ask for is not the next one's
    finally:
        stream.close()                      # and its worker processes with it


def mean_over_processes(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step's terms over all its micro-batches: every process has the mean of its own share."""
    if world() == 1:
        return terms
    total = torch.stack([term.detach().float() for term in terms.values()])
    torch.distributed.all_reduce(total)
    return dict(zip(terms, total / world()))
