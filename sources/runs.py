"""What stands between a command and its run folder: who may write there, and its flags."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError, barrier, rank, world

import torch


@contextlib.contextmanager
def open_out(out: str, default: str, resume: bool) -> Iterator[Path]:
    """The run's folder: `out`, or the first free of default, default-2, ...; the last to `resume`.

    Raises UserError where an explicit folder holds something and `resume` is off, where there is
    nothing to resume, or where it cannot be written. A new folder goes again if a UserError ends
    the run before its first checkpoint.
    """
    numbered = [Path(default), *(Path(f"{default}-{k}") for k in range(2, 1000))]
    folders = [Path(out)] if out else numbered
    there = [folder for folder in folders if folder.exists()]
    if resume:
        if not there:
            raise UserError(f"--resume: {folders[0]} is not there; name the run's folder by --out")
        folder = there[-1]
    elif out:
        folder = folders[0]
        if there and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {out}: holds something already; take another folder, or "
                            "--resume")
    else:
        folder = next(folder for folder in folders if folder not in there)
    if world() > 1:                                    # the first process chooses, or all race
        chosen = [folder]
        torch.distributed.broadcast_object_list(chosen)
        folder = chosen[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    try:
        yield folder
    except UserError:
        if not resume and rank() == 0 and not any(folder.rglob("*.pt")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def recall(given: dict[str, Any]) -> dict[str, Any]:
    """On --resume the flags that OUT/flags.json keeps, those given now winning; else `given`."""
    path = Path(given.get("out", "")) / "flags.json"
    if not given.get("resume") or not path.is_file():
        return given
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); give the run's flags again") from None
    return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()} | given


def remember(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Write a run's explicit flags to OUT/flags.json, for `recall`; returns them."""
    barrier()                                          # all have read before one writes
    if rank() == 0:
        kept = {k: v for k, v in given.items() if k not in ("resume", "out")}
        partial = out / f".flags.json.{os.getpid()}"
        partial.write_text(json.dumps(kept) + "\n")
        partial.replace(out / "flags.json")
    return given
