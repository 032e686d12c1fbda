"""Paired differences between rows, their intervals, and the verdict by PLAN.md's rule."""
from __future__ import annotations

from dataclasses import dataclass

from claims.plan import SEEDS, Claim, Comparison, Row, budgets_of, key, without_pictures

import numpy as np
from scipy import stats

DRAWS = 2000


@dataclass(frozen=True)
class Verdict:
    """What the seeds that are there say of a comparison at a budget; gains in percent of `than`."""

    budget: float
    seeds: tuple[int, ...]
    better: float = np.nan                          # means over seeds
    than: float = np.nan
    gains: tuple[float, ...] = ()                   # of each seed
    over_seeds: tuple[float, float] = (np.nan, np.nan)       # 95 % t-interval
    over_hands: tuple[float, float] = (np.nan, np.nan)       # 95 % bootstrap over test hands
    word: str = "not run"

    @property
    def gain(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.gains)) if self.gains else np.nan


def line_of(found: list[dict], row: Row, seed: int, budget: float) -> dict | None:
    """The line of a row and seed; a row without pre-training has one for all budgets."""
    budget = 0 if without_pictures(row) else budget
    return next((line for line in found if key(line) == (row.name, seed, budget)), None)


def over_hands(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Bootstrap interval of the mean gain in percent: the same groups of hands for all seeds."""
    better, than = (np.array([pair[k] for pair in pairs]) for k in (0, 1))        # (seeds, groups)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, better.shape[1], (DRAWS, better.shape[1]))
    gain = 100 * (1 - np.nanmean(better[:, drawn], -1) / np.nanmean(than[:, drawn], -1)).mean(0)
    low, high = np.quantile(gain, (0.025, 0.975))
    return float(low), float(high)


def word_of(gains: list[float], seeds: tuple[float, float], hands: tuple[float, float],
            least: float, wanted: int = SEEDS) -> str:
    """PLAN.md's rule; `seeds` and `hands` are the two intervals of the mean gain, in percent."""
    if len(gains) < wanted or np.isnan(hands).any():
        return "not run"
    if seeds[0] > 0 and hands[0] > 0 and np.mean(gains) >= least:
        return "shown"
    if seeds[1] < 0 and hands[1] < 0:
        return "not shown: the other way"
    if seeds[1] < least:
        return "not shown"
    return "undecided"


def verdict(claim: Claim, compared: Comparison, found: list[dict], budget: float) -> Verdict:
    """A comparison at a budget, over the seeds of which both rows are there."""
    rows = {row.name: row for row in claim.rows}
    pairs = {}
    for seed in sorted({line["seed"] for line in found}):
        both = [line_of(found, rows[name], seed, budget)
                for name in (compared.better[0], compared.than[0])]
        wanted = (compared.better[1], compared.than[1])
        if all(line and name in line["scores"] for line, name in zip(both, wanted)):
            pairs[seed] = both
    if not pairs:
        return Verdict(budget, ())
    values = np.array([[line["scores"][name] for line, (_, name)
                        in zip(both, (compared.better, compared.than))] for both in pairs.values()])
    gains = 100 * (1 - values[:, 0] / values[:, 1])
    n = len(gains)
    reach = stats.t.ppf(0.975, n - 1) * gains.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    by_seed = (float(gains.mean() - reach), float(gains.mean() + reach))
    names = (compared.better[1], compared.than[1])
    by_hand = (np.nan, np.nan)
    if all(name in line["groups"] for both in pairs.values() for line, name in zip(both, names)):
        by_hand = over_hands([tuple(line["groups"][name] for line, name in zip(both, names))
                              for both in pairs.values()])
    no_hands = all(name.endswith("_area_mm") for name in names)            # an area under a curve: seeds alone decide
    return Verdict(budget, tuple(pairs), float(values[:, 0].mean()), float(values[:, 1].mean()),
                   tuple(gains.tolist()), by_seed, by_hand,
                   word_of(gains.tolist(), by_seed, by_seed if no_hands else by_hand, compared.least))


def verdicts(claim: Claim, compared: Comparison, found: list[dict]) -> list[Verdict]:
    """A verdict for each budget that both rows are planned or were run at, at least one."""
    rows = {row.name: row for row in claim.rows}
    planned = [set(budgets_of(claim, rows[name])) for name in (compared.better[0], compared.than[0])]
    planned = [b for b in planned if b != {0}]          # a row without pre-training serves all
    budgets = set.intersection(*planned) if planned else {0}
    run = {line["budget"] for line in found if line["row"] == compared.better[0]} - {0}
    return [verdict(claim, compared, found, b) for b in sorted(budgets | run)]
