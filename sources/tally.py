"""Sums behind the numbers of a table: means, medians, bootstrap intervals, in constant memory."""
from __future__ import annotations

import functools
import math

# common before torch: it settles how threads wait
from common import bits, uniform, world

import torch
from torch import Tensor

BLOCKS = 4096                # groups of samples, which the bootstrap draws
DRAWS = 1000                 # bootstrap replicates
FINE_MM = 0.02               # of the histogram behind a median
FINE_BINS = 100_000          # of it: to 2 m
MEDIAN, SPREAD = "_median", "_spread_percent"          # names that ask for another number


class Tally:
    """Sums of values by block of samples: memory does not grow with the number of samples.

    Up to BLOCKS samples each is its own block, beyond they are spread over blocks by a hash.
    Bootstrap draws blocks, which for one sample a block is the ordinary bootstrap; every tally of n
    samples draws alike, so differences between two are paired.
    """

    def __init__(self, n: int):
        self.n = n
        self.blocks = max(1, min(n, BLOCKS))
        self.sums: dict[str, Tensor] = {}         # (blocks, P, 3): sum, count, sum of squares

    def add(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Values of the samples `index` (B,), as protocols give them (`sources.protocols`)."""
        index = index.cpu()
        block = index if self.n <= BLOCKS else self._block(index)
        for name, x in values.items():
            x = x.detach().double().cpu()
            if name.endswith(MEDIAN):
                self._count(name, x[~x.isnan()])
                continue
            pooled = x.dim() == 3
            x = x.reshape(len(x), math.prod(x.shape[1:]))
            known = x.nan_to_num(0.0)
            parts = torch.stack([known, (~x.isnan()).double(), known.square()], -1)  # (B, P, 3)
            parts = parts.sum(1, keepdim=True) if pooled else parts
            zero = torch.zeros(self.blocks, *parts.shape[1:], dtype=torch.float64)
            self.sums.setdefault(name, zero).index_add_(0, block, parts)

    def _block(self, index: Tensor) -> Tensor:
        return bits(index, 1, 0, "block")[:, 0].remainder(self.blocks)

    def _count(self, name: str, values: Tensor) -> None:
        """Put values (n,) into the histogram of a median."""
        bins = (values / FINE_MM).long().clamp(0, FINE_BINS - 1)
        total = self.sums.setdefault(name, torch.zeros(FINE_BINS, dtype=torch.float64))
        total.index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))

    def gather(self) -> None:
        """Replace the sums by those of all processes."""
        if world() > 1:
            everyone: list[dict[str, Tensor]] = [{}] * world()
            torch.distributed.all_gather_object(everyone, self.sums)
            names = dict.fromkeys(name for one in everyone for name in one)
            self.sums = {name: sum(one[name] for one in everyone if name in one) for name in names}

    def points(self, name: str) -> Tensor:
        """The mean over samples of each point, (P,); NaN where no sample has it."""
        total = self.sums[name].sum(0)
        return torch.where(total[:, 1] > 0, total[:, 0] / total[:, 1], math.nan)

    def count(self, name: str) -> int:
        """How many values stand behind a name."""
        return int(self.sums[name][..., 1].sum()) if name in self.sums else 0

    def means(self) -> dict[str, float]:
        """{name: mean, median or spread}; what no sample has is not in it."""
        out = {}
        for name in self.sums:
            if name.endswith(MEDIAN):
                out[name] = self._median(name)
            elif name.endswith(SPREAD):
                out[name] = self._spread(name)
            else:
                out[name] = float(self.points(name).nanmean())
        return {name: value for name, value in out.items() if not math.isnan(value)}

    def _median(self, name: str) -> float:
        total = self.sums[name]
        middle = int(torch.searchsorted(total.cumsum(0), total.sum() / 2))
        return FINE_MM * (middle + 0.5) if total.any() else math.nan

    def _spread(self, name: str) -> float:
        """Standard deviation over samples by the mean, mean over points, in percent."""
        value, count, square = self.sums[name].sum(0).unbind(-1)
        mean = value / count
        deviation = ((square - count * mean.square()).clamp(min=0) / (count - 1)).sqrt()
        return 100 * float((deviation / mean).mean())

    def draws(self, name: str) -> Tensor:
        """Bootstrap replicates of each point's mean, (DRAWS, P)."""
        sums = self.sums[name][..., :2]
        total = torch.einsum("rb,bpk->rpk", bootstrap_weights(self.blocks), sums)
        return torch.where(total[..., 1] > 0, total[..., 0] / total[..., 1], math.nan)

    def interval(self, name: str) -> tuple[float, float]:
        """95 % percentile interval of a mean over samples."""
        return interval(self.draws(name).nanmean(1))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The intervals of all means; medians and spreads have none."""
        return {name: self.interval(name) for name in self.means() if is_mean(name)}


def is_mean(name: str) -> bool:
    """Whether a name stands for a mean, which alone has an interval."""
    return not name.endswith((MEDIAN, SPREAD))


@functools.cache
def bootstrap_weights(blocks: int) -> Tensor:
    """How often each replicate draws each block, (DRAWS, blocks); the same in every call."""
    u = uniform(torch.arange(DRAWS), blocks, 0, "bootstrap").double()
    drawn = (u * blocks).long().clamp(max=blocks - 1)
    weights = torch.zeros(DRAWS, blocks, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(u))


def interval(draws: Tensor) -> tuple[float, float]:
    """The middle 95 % of replicates."""
    low, high = torch.nanquantile(draws, draws.new_tensor([0.025, 0.975])).tolist()
    return low, high
