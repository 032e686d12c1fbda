"""How far a command is: which of its stages runs, and how long it and the stages after it take."""
from __future__ import annotations

import time

# common before torch: it settles how threads wait
from common import Flags, say
from sources.synthetic import LENGTH

SCORING = "scoring"                          # the stage that ends a command: every row on the test


def learning(cfg: Flags, passes: float = 1, val: bool = True) -> float:
    """The work of a stage: how often pictures go through a network, backward counting twice.

    `passes`: how many pictures of a sample are learnt from; `val`: whether epochs end in a
    validation. Data sets of which nothing is known yet count as --samples hands.
    """
    return cfg.epochs * (3 * passes * cfg.samples + val * LENGTH["val"])


def judging(rows: int) -> float:
    """The work of scoring so many rows."""
    return float(rows * LENGTH["test"])


class Course:
    """The stages of a command in order, {name: work}, named by their folders.

    A command is a process, so there is one, as there is one `Stop`. What a unit of work takes is
    measured on the stages so far; it differs between them, so what is said of later ones is a rough
    estimate. Rendering and reading count as they come.
    """

    def __init__(self) -> None:
        self.plan({})

    def plan(self, work: dict[str, float]) -> None:
        """The stages of the command that begins."""
        self.work = work
        self.name = ""
        self.done = self.seconds = 0.0                  # work of ended stages, and what it took
        self.began = self.first = self.share = 0.0      # of the stage that runs

    def begin(self, name: str, share: float = 0.0) -> None:
        """A stage begins, of which that share was done before; says which of how many it is."""
        self.done += (self.share - self.first) * self.work.get(self.name, 0.0)
        self.seconds += (time.monotonic() - self.began) * (self.share > self.first)
        self.name = name
        self.began = time.monotonic()
        self.first = self.share = share
        if name in self.work and len(self.work) > 1:
            say(f"stage {1 + list(self.work).index(name)} of {len(self.work)}: {name}")

    def left(self, share: float) -> tuple[float, float]:
        """Seconds that the stage takes from here, where that share of it is done, and all stages.

        Both are infinite where nothing was done yet.
        """
        self.share = share
        taken = time.monotonic() - self.began
        if share <= self.first:
            return float("inf"), float("inf")
        own = taken / (share - self.first) * (1 - share)
        names = list(self.work)
        later = names[names.index(self.name) + 1:] if self.name in names else []
        if not later:
            return own, own
        done = self.done + (share - self.first) * self.work[self.name]
        return own, own + (self.seconds + taken) / done * sum(self.work[name] for name in later)


COURSE = Course()


def spelled(seconds: float) -> str:
    """About how long: 40 s, 3.1 min, 2.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
