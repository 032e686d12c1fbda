"""What a stage writes down as it goes: log.jsonl, what the screen says of it, and losses.png."""
from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError, rank, say, world
from hand.drawing import curve

import torch
from torch import Tensor


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
