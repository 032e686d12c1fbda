"""What stands between a command and its run folder: who may write there, and its flags."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import time
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import Stopped, UserError, barrier, rank, say, whole_file, world
from sources.checkpoints import FREE
from sources.files import locked

import torch

JOB = ".job"                                          # who began here, of those that may restart
PART = re.compile(r"\..+\.\d+|.+\.\d+\.part")         # what a killed writer leaves, by its process


@contextlib.contextmanager
def open_out(out: str, default: str, resume: bool) -> Iterator[Path]:
    """The run's folder: `out`, or the first free of default, default-2, ...; the last to `resume`.

    Raises UserError on every process where an explicit folder holds something and `resume` is off,
    where there is nothing to resume, where it cannot be written, or where another run writes there.
    A new folder goes again if a UserError ends the run before its first checkpoint. What a killed
    run left half written goes at the start. An end by a signal says how to go on. Where torchrun
    starts a command again (--max-restarts), it is the folder of its first start, if it had one: a
    folder that was refused then is refused again.
    """
    with contextlib.ExitStack() as held:
        found: list[Any] = [None, ""]                      # the folder, or why there is none
        if rank() == 0:                                    # the first process chooses, or all race
            try:
                folder = _chosen(out, default, resume)
                held.enter_context(_alone(folder))
                if _job():
                    (folder / JOB).write_text(_job(), encoding="utf-8")
                sweep(folder.rglob("*"))
                found[0] = folder
            except UserError as error:
                found[1] = str(error)
            except OSError as error:
                found[1] = f"--out {error.filename or out}: cannot be written ({error.strerror})"
        if world() > 1:
            torch.distributed.broadcast_object_list(found)
        folder, refused = found
        if refused:
            raise UserError(refused)
        try:
            yield folder
        except UserError:
            if not resume and rank() == 0 and not any(folder.rglob("*.pt")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        except KeyboardInterrupt as stop:
            raise Stopped(f"{str(stop) or 'stopped'}; go on with --resume --out {folder}") from None


def _chosen(out: str, default: str, resume: bool) -> Path:
    """The folder that `open_out` opens, which is there then; UserError, OSError."""
    numbered = [Path(default), *(Path(f"{default}-{k}") for k in range(2, 1000))]
    folders = [Path(out)] if out else numbered
    there = [folder for folder in folders if folder.exists()]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        for folder in reversed(there):
            if (folder / JOB).is_file() and (folder / JOB).read_text(encoding="utf-8") == _job():
                return folder
    if resume:
        if not there:
            raise UserError(f"--resume: {folders[0]} is not there; name the run's folder by --out")
        if not (there[-1] / "flags.json").is_file() and not any(there[-1].rglob("last.pt")):
            raise UserError(f"--resume: {there[-1]} holds no run (neither flags.json nor a "
                            "last.pt); start one without --resume")
        return there[-1]
    if out:
        if there and (not folders[0].is_dir()
                      or any(not path.name.startswith(".") for path in folders[0].iterdir())):
            raise UserError(f"--out {out}: holds something already; take another folder, or "
                            "--resume")
        folders[0].mkdir(parents=True, exist_ok=True)
        return folders[0]
    for folder in folders:
        with contextlib.suppress(FileExistsError):         # two may start at once
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"{default}: a thousand runs have this name; give --out")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs; UserError where one has it.

    It is a lock of the system, which ends with the process that holds it, however that ends: a file
    that is only there, with a process number in it, would outlive a kill and lie after a restart.
    """
    path = folder / ".lock"
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(locked(path, wait=False))
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())    # not one just removed
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise UserError(f"--out {folder}: another run writes there; wait for its end, or take "
                            "another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):             # Windows keeps what is open
                path.unlink()


def sweep(files: Iterable[Path], age: float = 0) -> None:
    """Remove what killed writers left among some files, if it is older than `age` seconds."""
    for path in list(files):
        with contextlib.suppress(OSError):                 # another process may be faster
            if PART.fullmatch(path.name) and time.time() - path.stat().st_mtime >= age:
                path.unlink()


def _job() -> str:
    """What torchrun's starts of one job have in common; "" where it starts it once only."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")       # "none": nobody gave it one
    return name if name != "none" else f"{platform.node()} {os.getppid()}"


def recall(Config: type, given: dict[str, Any]) -> dict[str, Any]:
    """On --resume the flags that OUT/flags.json keeps, those given now winning; else `given`.

    A damaged or foreign file is a UserError, unless flags of the run are given: they count then,
    and last.pt says whether they are the run's.
    """
    path = Path(given.get("out", "")) / "flags.json"
    if not given.get("resume") or not path.is_file():
        return given
    try:
        stored = json.loads(path.read_bytes())
        wrong = _misfit(Config, stored)
    except (ValueError, RecursionError) as error:
        wrong = f"is damaged ({error})"
    if not wrong:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()} | given
    if not set(given) - FREE:
        raise UserError(f"{path}: {wrong}; give the run's flags again beside --resume, or move the "
                        "file away if there were none")
    say(f"{path}: {wrong}; the flags given now count alone")
    return given


def _misfit(Config: type, stored: Any) -> str:
    """What of a flags.json is no option of this command, or has another type; or ""."""
    if not isinstance(stored, dict):
        return "is no object of options"
    hints = typing.get_type_hints(Config)
    choices = {option.name: option.metadata["choices"] for option in dataclasses.fields(Config)}
    for name, value in stored.items():
        if name not in hints:
            return f"holds {name!r}, which is no option of this command"
        kind = hints[name]
        several = typing.get_origin(kind) is tuple
        words = value if isinstance(value, list) else [value]
        kinds = {typing.get_args(kind)[0] if several else kind}
        kinds |= {int} if float in kinds else set()
        if isinstance(value, list) != several or any(type(word) not in kinds for word in words):
            return f"holds {name} {value!r}, which is of another type"
        if choices[name] and not set(words) <= set(choices[name]):
            return f"holds {name} {value!r}, which is no choice"
    return ""


def remember(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Write a run's explicit flags to OUT/flags.json, for `recall`, until there is a checkpoint.

    Returns them with the folder. Later ones may be refused, and so do not replace the run's own.
    """
    barrier()                                          # all have read before one writes
    if rank() == 0 and not any(out.rglob("*.pt")):
        kept = {k: v for k, v in given.items() if k not in ("resume", "out")}
        with whole_file(out / "flags.json") as file:
            file.write((json.dumps(kept) + "\n").encode())
    if rank() == 0:                                    # others may write there now: an hour is safe
        sweep(Path(given.get("cache", "cache")).glob("*.part"), age=3600)
    return given | {"out": str(out)}
