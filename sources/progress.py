"""One trained thing as it goes: its log, its checkpoint, and how it ends."""
from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import Flags, UserError, load_checkpoint, rank, save_checkpoint, say, world

import torch
from torch import Tensor, nn
from tqdm import tqdm


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


class Log:
    """log.jsonl: one JSON object a line, on the screen too; a resumed run cuts it back."""

    def __init__(self, folder: Path, kept_bytes: int = 0):
        self.path = folder / "log.jsonl"
        self.on = rank() == 0
        if self.on:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, min(kept_bytes, self.path.stat().st_size))

    def __call__(self, **record: Any) -> None:
        """Write one record; tensors of one number become numbers, rounded to six digits."""
        if not self.on:
            return
        clean = {k: float(f"{float(v):.6g}") if isinstance(v, (float, Tensor)) else v
                 for k, v in record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(clean) + "\n")
        tqdm.write(json.dumps(clean))

    def size(self) -> int:
        """Bytes written so far; a checkpoint keeps it so that a resumed log has no line twice."""
        return self.path.stat().st_size if self.on else 0


class Run:
    """One trained thing: its folder, log, checkpoint and step, and what its callers keep in `memo`.

    last.pt is written at the end of an epoch and every --save-minutes within. Nothing random is in
    it: draws depend on (seed, epoch, sample), so a resumed run repeats a straight one exactly (on a
    CPU).
    """

    def __init__(self, folder: Path, method: str, cfg: Flags, model: nn.Module,
                 optimizer: torch.optim.Optimizer, total: int):
        self.folder, self.total = folder, total
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self.memo: dict[str, Any] = {}
        self.lost: bool | Tensor = False
        self.head = {"method": method, "cfg": dataclasses.asdict(cfg)}
        self.every = max(1, min(50, total // 20))               # steps between lines of the log
        self.save_seconds = 60 * cfg.save_minutes
        self.saved = time.monotonic()
        device = next(model.parameters()).device
        state = load_checkpoint(folder / "last.pt") if (folder / "last.pt").is_file() else None
        if state:
            try:
                self.step, self.memo = state["step"], state["memo"]
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                stored = {"precision": "fp32" if device.type == "cpu" else "bf16"} | state["cfg"]
                kept = {name: stored.get(name)      # of a file without precision it is what it was
                        for name in ("batch_size", "micro_batch", "seed", "samples", "precision")}
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"{folder}/last.pt: does not fit these options "
                                f"({str(error).strip().splitlines()[0][:120]})") from None
            for name, old in kept.items():
                if old != getattr(cfg, name):
                    raise UserError(f"{folder}/last.pt: was written with {name} {old}, not "
                                    f"{getattr(cfg, name)}; a resumed run cannot change it, so "
                                    f"give --{name.replace('_', '-')} {old}")
        self.log = Log(folder, state["log_bytes"] if state else 0)
        if state:
            say(f"{folder}: going on at step {self.step} of {total}")
        elif rank() == 0:
            (folder / "config.json").write_text(json.dumps(self.head, indent=1) + "\n")
            self.log(**provenance(), seed=cfg.seed, device=str(device), precision=cfg.precision)
        self.first, self.began = self.step, time.monotonic()
        self.bar = tqdm(total=total, initial=self.step, desc=folder.name, unit="step",
                        disable=rank() != 0, mininterval=1)

    def advance(self, terms: dict[str, Tensor], epoch: int, lr: float, may_save: bool) -> None:
        """Count a step; log its terms now and then; save if it is time.

        Raises UserError if the loss is lost, see `check`.
        """
        self.step += 1
        self.bar.update()
        self.lost = self.lost | ~terms["loss"].isfinite()              # read only when it is logged
        if self.step % self.every == 0 or self.step == 1:
            self.check()
            self.log(step=self.step, epoch=epoch, lr=lr, **terms)
        if self.step == self.first + 5:
            self.estimate()
        if may_save and time.monotonic() - self.saved > self.save_seconds:
            self.save()

    def check(self) -> None:
        """UserError on every process if a loss of any step so far was not finite on one of them."""
        lost = torch.as_tensor(self.lost).float()
        if world() > 1:
            torch.distributed.all_reduce(lost, torch.distributed.ReduceOp.MAX)
        if lost > 0:
            raise UserError(f"{self.folder}: the loss is not finite any more at step {self.step}; "
                            "a lower --lr may help. last.pt is from before")

    def estimate(self) -> None:
        """After five steps: how long the rest will take, and a word on --quick above an hour."""
        hours = (time.monotonic() - self.began) / 5 * (self.total - self.step) / 3600
        hint = "; --quick shows the whole course in minutes" if hours > 1 else ""
        say(f"{self.folder.name}: about {hours:.1f} hours to go{hint}" if hours > 0.1 else
            f"{self.folder.name}: about {60 * hours:.1f} minutes to go")

    def save(self) -> None:
        """last.pt: weights, optimiser, step, memo and how long the log was; see `check`."""
        self.check()
        if rank() == 0:
            save_checkpoint(self.folder / "last.pt", self.head | {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "step": self.step, "memo": self.memo, "log_bytes": self.log.size()})
        self.saved = time.monotonic()
