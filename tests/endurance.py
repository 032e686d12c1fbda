"""Kill every stage again and again, and see that it ends as if nothing had happened.

    python tests/endurance.py                             the seven stages, 20 kills each
    python tests/endurance.py peclr:finetune --kills 3    one of them
    python tests/endurance.py --seed 7                    other moments

Each stage is a real command on the built-in hand, small. It runs once from beginning to end; then, in
another folder, SIGKILL comes at random moments, and --resume goes on, until the command ends by itself: and
then again from nothing, until there were N kills. A checkpoint is written after every step, so many kills
fall into the writing of one; one in five falls before the first. What both leave behind must have the same
bits: every checkpoint with its weights, optimiser and memo, every file of weights, the log (but for its first
line, which names the command) and metrics.json. One line a stage; the exit code is 1 if one differs.

Every run is a process of its own, forked from this one, which has imported torch and computed nothing.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import hamuco
import handmim
import peclr
import sources.synthetic
import ti_net
from common import guarded, load_checkpoint
from sources.checkpoints import FREE

import torch
from torch import Tensor

SCRIPTS = {"ti_net": ti_net, "peclr": peclr, "handmim": handmim, "hamuco": hamuco}
SMALL = ("--samples 24 --image-size 32 --batch-size 8 --micro-batch 4 --epochs 3 --workers 0 --device cpu --mano builtin "
         "--save-minutes 1e-6 --cache cache --out run")
FIRST, SECOND = "--data synthetic:calm", "--finetune synthetic:calm"
STAGES = {
    "ti_net:pretrain": f"{FIRST} --backbone resnet10 --rank 8 --embed-dim 4 --decoder-width 4 --probe-every 0",
    "ti_net:finetune": f"{SECOND} --backbone resnet10",
    "peclr:pretrain": f"{FIRST} --backbone resnet10",
    "peclr:finetune": f"{SECOND} --backbone resnet10",
    "handmim:pretrain": f"{FIRST} --backbone vit_mini --prototypes 32 --head-hidden 16 --decoder-width 8 --probe-every 0",
    "handmim:finetune": f"{SECOND} --backbone vit_mini",
    "hamuco:train": f"{FIRST} --backbone resnet10 --views 2 --warm-epochs 1 --samples 16 --epochs 2",
}


def begin(stage: str, folder: Path, resume: bool) -> int:
    """Start the stage's command in a folder, in a process of its own; its number."""
    words = f"{SMALL} {STAGES[stage]}{' --resume' * resume}".split()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        with open("said.txt", "a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        torch.set_num_threads(1)
        sources.synthetic.LENGTH.update(val=8, test=8)             # how many hands are judged
        code = guarded(lambda: SCRIPTS[stage.partition(":")[0]].main(words))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(child: int, folder: Path, wait: float) -> bool:
    """Whether a process ended by itself within some seconds; SystemExit where it failed."""
    until = time.monotonic() + wait
    while time.monotonic() < until:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            if status:
                said = (folder / "said.txt").read_text()[-3000:]
                raise SystemExit(f"{said}\n{folder}: exit code {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.002)
    return False


def straight(stage: str, folder: Path) -> tuple[float, float]:
    """Run a stage in one go; the seconds until its first checkpoint, and from there to its end."""
    folder.mkdir()
    began, first = time.monotonic(), 0.0
    child = begin(stage, folder, resume=False)
    while not finished(child, folder, 0.01):
        if not first and any(folder.glob("run/*/last.pt")):
            first = time.monotonic() - began
    return first, time.monotonic() - began - first


def killed(stage: str, folder: Path, start: float, course: float, kills: int, draw: random.Random) -> int:
    """Run a stage with at most so many kills, resuming it each time; how many there were."""
    folder.mkdir()
    for k in range(kills + 1):
        child = begin(stage, folder, resume=(folder / "run" / "flags.json").is_file())
        wait = start * draw.random() if draw.random() < 0.2 else start + 2 * course / kills * draw.random()
        if finished(child, folder, wait if k < kills else 600):
            return k
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    raise SystemExit(f"{folder}: does not end in ten minutes")


def bits(value: object) -> object:
    """A checkpoint's content as something that is equal where, and only where, its bits are."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items() if key not in FREE}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return repr(value)


def left(folder: Path) -> dict[str, object]:
    """What a run leaves: its checkpoints, logs and scores, by their names."""
    run = folder / "run"
    found: dict[str, object] = {str(path.relative_to(run)): bits(load_checkpoint(path)) for path in run.rglob("*.pt")}
    for path in run.rglob("log.jsonl"):
        found[str(path.relative_to(run))] = path.read_text().splitlines()[1:]
    for path in run.rglob("metrics.json"):
        found[str(path.relative_to(run))] = json.loads(path.read_text())
    return found | {"names": sorted(str(path.relative_to(run)) for path in run.rglob("*"))}


def endure(stage: str, kills: int, seed: int) -> bool:
    """Print a stage's line; whether all that it left is equal."""
    began, draw = time.monotonic(), random.Random(f"{stage} {seed}")
    with tempfile.TemporaryDirectory() as place:
        start, course = straight(stage, Path(place, "straight"))
        truth = left(Path(place, "straight"))
        done, runs, wrong = 0, 0, set()
        while done < kills:
            runs += 1
            folder = Path(place, f"killed-{runs}")
            more = killed(stage, folder, start, course, kills - done, draw)
            done += more
            if not more:                    # it was faster than the first: the machine has less to do
                start, course = 0.7 * start, 0.7 * course
            other = left(folder)
            wrong |= {name for name in truth | other if truth.get(name) != other.get(name)}
    print(f"{stage}: {done} kills, {done} resumes, {runs} runs of {start + course:.1f} s, "
          f"{f'DIFFERENT: {sorted(wrong)}' if wrong else f'{len(truth) - 1} files equal'}, "
          f"{time.monotonic() - began:.0f} s", flush=True)
    return not wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="SCRIPT:STAGE", help=", ".join(STAGES))
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs a stage (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    if wrong := set(args.stages) - set(STAGES):
        parser.error(f"no stage {' '.join(sorted(wrong))}; there are {', '.join(STAGES)}")
    equal = [endure(stage, args.kills, args.seed) for stage in args.stages or STAGES]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
