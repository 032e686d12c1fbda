"""One trained thing as it goes: its steps, its checkpoint, and how it ends."""
from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import (
    Flags, Stop, Stopped, UserError, load_checkpoint, rank, save_checkpoint, say, whole_file, world)
from sources.checkpoints import not_finite, take_up
from sources.course import COURSE, spelled
from sources.log import Log, draw_losses, in_words, provenance
from sources.steps import mean_over_processes

import torch
from torch import Tensor, nn
from tqdm import tqdm

DRAW_SECONDS = 60                                        # at least, between two losses.png
NEVER = 2 ** 62                                          # the step at which a sound term was lost


def votes(*mine: int) -> list[int]:
    """The largest of each number over all processes, told by the hosts: no device is waited for."""
    told = torch.tensor(mine)
    if world() > 1:
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return told.tolist()


class Run:
    """One trained thing: its folder, log, checkpoint and step, and what its callers keep in `memo`.

    last.pt is written at the end of an epoch, every --save-minutes within, and after the step in
    which a signal came; see `common.guarded`. Draws depend on (seed, epoch, sample), so a resumed
    run repeats a straight one exactly (on a CPU).
    """

    def __init__(self, folder: Path, method: str, cfg: Flags, model: nn.Module,
                 optimizer: torch.optim.Optimizer, total: int):
        self.folder, self.total = folder, total
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self.memo: dict[str, Any] = {}
        self.terms: list[str] = []
        self.lost: Tensor | None = None         # (terms,) the step at which each was lost, or NEVER
        self.head = {"method": method, "cfg": dataclasses.asdict(cfg)}
        self.every = max(1, min(50, total // 20))               # steps between lines of the log
        self.samples = self.head["cfg"]["batch_size"]          # of a step, in all processes
        self.save_seconds = 60 * cfg.save_minutes
        self.saved, self.saved_step = time.monotonic(), 0
        self.drawn = self.saved
        device = next(model.parameters()).device
        last = folder / "last.pt"
        state = load_checkpoint(last) if last.is_file() else None
        if state is not None:
            take_up(state, last, self.head, model, optimizer, total)
            self.step, self.memo, self.saved_step = state["step"], state["memo"], state["step"]
        self.log = Log(folder, state["log_bytes"] if state else 0)
        COURSE.begin(folder.name, self.step / max(1, total))
        if state:
            say(f"{folder}: going on at step {self.step} of {total}")
        elif rank() == 0:
            with whole_file(folder / "config.json") as file:
                file.write((json.dumps(self.head, indent=1) + "\n").encode())
            self.log(**provenance(), seed=cfg.seed, device=str(device), precision=cfg.precision)
        self.first, self.began = self.step, time.monotonic()
        self.bar = tqdm(total=total, initial=self.step, desc=folder.name, unit="step",
                        disable=rank() != 0, mininterval=1)
        Stop.patient = self.step < total

    def advance(self, terms: dict[str, Tensor], epoch: int, lr: float, may_save: bool) -> None:
        """Count a step; log its terms now and then; save if it is time, or a signal came.

        Raises UserError if the loss is lost, see `check`; Stopped after a signal. Processes agree
        on both after every step, by one number from host to host (0.1 ms on one machine): clocks
        differ, and torchrun sends its signals to processes in different steps.
        """
        self.step += 1
        self.bar.update()
        self._watch(terms)
        if self.step % self.every == 0 or self.step == 1:
            self.check()
            terms = mean_over_processes(terms)
            self.log(step=self.step, epoch=epoch, lr=lr, **terms)
            self.tell(terms)
        elif not may_save:                               # what follows may write the best weights
            self.check()
        if self.step == self.first + 5:
            self.estimate()
        due = time.monotonic() - self.saved > self.save_seconds
        if may_save and any(votes(Stop.asked, due)):
            self.save()

    def tell(self, terms: dict[str, Tensor]) -> None:
        """One line on the screen: step, loss and its terms, samples a second, how long it takes.

        The terms have the paper's names; where the loss has none, the monitors are said.
        """
        numbers = {name: float(value) for name, value in terms.items()}
        named = {name: x for name, x in numbers.items() if name == "loss" or name.startswith("L_")}
        numbers = named if len(named) > 1 else numbers
        pace = (self.step - self.first) * self.samples / (time.monotonic() - self.began)
        say(f"step {self.step:,} of {self.total:,}: {in_words(numbers)}; {pace:,.0f} samples/s"
            + f"; {self.to_go()}" * (self.step - self.first > 5))

    def to_go(self) -> str:
        """How long the stage and the command will take from here."""
        own, whole = COURSE.left(self.step / self.total)
        return f"{spelled(own)} to go" + f", {spelled(whole)} in all stages" * (whole > own + 1)

    def _watch(self, terms: dict[str, Tensor]) -> None:
        """Note at which step each term was lost, on the device: `check` reads it now and then."""
        bad = torch.stack([~term.detach().isfinite() for term in terms.values()])
        if self.lost is None:
            self.terms = list(terms)
            self.lost = torch.full(bad.shape, NEVER, device=bad.device)
        self.lost = torch.where(bad, self.lost.clamp(max=self.step), self.lost)

    def check(self) -> None:
        """UserError on every process where a loss so far, or a weight now, is not finite on one."""
        if self.lost is not None:
            lost = self.lost
            if world() > 1:
                torch.distributed.all_reduce(lost, torch.distributed.ReduceOp.MIN)
            steps = dict(zip(self.terms, lost.tolist()))
            when = steps.pop("loss")
            if when < NEVER:
                first = next((f", by its term {name}" for name, step in steps.items()
                              if step <= when and name.startswith("L_")), "")
                raise UserError(f"{self.folder}: the loss is not finite any more at step {when}"
                                f"{first}; a lower --lr may help. {self._kept()}")
        if broken := not_finite(self.model):
            raise UserError(f"{self.folder}: {broken} is not finite any more after step "
                            f"{self.step}, though the loss is; a lower --lr may help. "
                            f"{self._kept()}")

    def _kept(self) -> str:
        """What a run that was lost leaves."""
        return (f"last.pt is from step {self.saved_step}" if self.saved_step else
                "There is no checkpoint yet")

    def estimate(self) -> None:
        """After five steps: how long the rest will take, and a word on --quick above an hour."""
        long = COURSE.left(self.step / self.total)[1] > 3600
        say(f"{self.folder.name}: about {self.to_go()}"
            + "; --quick shows the whole course in minutes" * long)

    def save(self) -> None:
        """last.pt: weights, optimiser, step, memo and how long the log was; see `check`.

        Raises Stopped where a signal came, and UserError on all processes where it is not written.
        """
        self.check()
        failure: UserError | None = None
        if rank() == 0:
            try:
                save_checkpoint(self.folder / "last.pt", self.head | {
                    "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "step": self.step, "memo": self.memo, "log_bytes": self.log.size()})
                if self.step == self.total or time.monotonic() - self.drawn > DRAW_SECONDS:
                    draw_losses(self.folder)
                    self.drawn = time.monotonic()
            except UserError as error:
                failure = error
        asked, failed = votes(Stop.asked, failure is not None)
        if failed:
            raise failure or UserError(f"{self.folder}/last.pt: the first process cannot write it")
        self.saved, self.saved_step = time.monotonic(), self.step
        Stop.patient = self.step < self.total
        if asked:
            Stop.asked = asked
            raise Stopped(f"stopped at step {self.step}")

