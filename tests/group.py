"""Processes of one group, forked from this one: as torchrun starts them, without the seconds in which torch is loaded."""
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import barrier, guarded

LIMIT = 120.0                                            # s until a group that hangs is killed


def ends(folder: Path, count: int, function: Callable[[], object]) -> tuple[list[int], list[str]]:
    """Exit codes, below 0 for a signal, and what was said, of processes in which `function` runs as a script's main.

    They know of each other as from torchrun, so that `common.start` joins them; one alone knows of nobody.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(folder, count, rank, port, function) for rank in range(count)]
    codes = dict.fromkeys(children)
    began = time.monotonic()
    while None in codes.values():
        for child in [child for child, code in codes.items() if code is None]:
            gone, status = os.waitpid(child, os.WNOHANG)
            codes[child] = os.waitstatus_to_exitcode(status) if gone else None
        if time.monotonic() - began > LIMIT:
            for child in [child for child, code in codes.items() if code is None]:
                os.kill(child, signal.SIGKILL)
            pytest.fail(f"processes that hang: {list(codes.values())}")
        time.sleep(0.002)
    return list(codes.values()), [(folder / f"said-{rank}").read_text() for rank in range(count)]


def _fork(folder: Path, count: int, rank: int, port: int, function: Callable[[], object]) -> int:
    """Start one of the processes; its number."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        torch.set_num_threads(1)
        file = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if count > 1:
            os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
        code = guarded(function)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def on_processes(folder: Path, count: int, function: Callable[[], object]) -> list:
    """What `function` returns in each process of a group; it must end well in all."""
    def main():
        found = function()
        torch.save(found, folder / f"found-{os.environ.get('RANK', '0')}.pt")
        barrier()

    codes, said = ends(folder, count, main)
    assert codes == [0] * count, "\n".join(said)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(count)]
