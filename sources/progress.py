"""One trained thing as it goes: its log, its checkpoint, and how it ends."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import (
    Flags, Stop, Stopped, UserError, load_checkpoint, rank, save_checkpoint, say, whole_file, world)
from hand.drawing import curve
from sources.checkpoints import not_finite, take_up
from sources.steps import mean_over_processes

import torch
from torch import Tensor, nn
from tqdm import tqdm

DRAW_SECONDS = 60                                        # at least, between two losses.png
NEVER = 2 ** 62                                          # the step at which a sound term was lost


def provenance() -> dict[str, Any]:
    """What a log opens with: command, versions, git state, host kind."""
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno")
        state = git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except OSError:                                    # no git here
        state = ""
    return {"command": shlex.join(sys.argv), "git": state, "python": platform.python_version(),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "processes": world()}


def in_words(record: dict[str, Any]) -> str:
    """What the screen says of a record of the log: "val pa mpjpe 12.5 mm, L_inv 0.0312"."""
    parts = []
    for name, value in record.items():
        if name.endswith("_mm"):
            parts.append(f"{name.removesuffix('_mm').replace('_', ' ')} {value:.1f} mm")
        else:
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


def draw_losses(folder: Path) -> None:
    """losses.png of a stage's log, from its tenth line on: every term by step."""
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        lines = [record for record in map(json.loads, file) if "step" in record]
    if len(lines) < 10:
        return
    steps = [line["step"] for line in lines]
    names = [name for name in lines[-1] if name == "loss" or name.startswith("L_")]
    curve(folder / "losses.png", {name: (steps, [line[name] for line in lines]) for name in names},
          f"{folder.name}: the loss and its terms", "step")


class Log:
    """log.jsonl: one JSON object a line; a resumed run cuts it back. An epoch's is said as well."""

    def __init__(self, folder: Path, kept_bytes: int = 0):
        self.path = folder / "log.jsonl"
        self.on = rank() == 0
        if self.on:
            with self._named():
                folder.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                os.truncate(self.path, min(kept_bytes, self.path.stat().st_size))

    def __call__(self, **record: Any) -> None:
        """Write one record; tensors of one number become numbers, rounded to six digits."""
        if not self.on:
            return
        clean = {k: float(f"{float(v):.6g}") if isinstance(v, (float, Tensor)) else v
                 for k, v in record.items()}
        with self._named(), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        epoch = clean.pop("epoch", None)
        if epoch is not None and clean and "step" not in clean:
            say(f"epoch {epoch}: {in_words(clean)}")

    def size(self) -> int:
        """Bytes written so far; a checkpoint keeps it so that a resumed log has no line twice."""
        with self._named():
            return self.path.stat().st_size if self.on else 0

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Around what the system may refuse: its word becomes a sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None


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
        """One line on the screen: the step, its terms by the paper's names, samples a second."""
        numbers = {name: float(value) for name, value in terms.items()}
        pace = (self.step - self.first) * self.samples / (time.monotonic() - self.began)
        say(f"step {self.step:,} of {self.total:,}: {in_words(numbers)}; {pace:,.0f} samples/s")

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
        hours = (time.monotonic() - self.began) / 5 * (self.total - self.step) / 3600
        hint = "; --quick shows the whole course in minutes" if hours > 1 else ""
        say(f"{self.folder.name}: about {hours:.1f} hours to go{hint}" if hours > 0.1 else
            f"{self.folder.name}: about {60 * hours:.1f} minutes to go")

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

