"""Run every stage, and eval.py, under torchrun; kill a process, make another fail, and start again.

    python tests/processes.py                        the seven stages, each with eval.py
    python tests/processes.py peclr:finetune         one of them

Each stage is the real command of tests/endurance.py, small, with six micro-batches a step, on 1, 2 and 3
processes. Compared with one process: the first line of the log, to FIRST; later ones and the scores, to
TOLERANCE; the weights of each checkpoint, by the length of their difference; and how many samples were scored,
8 or 11, which 2 and 3 do not divide. (Sums come in another order, and in float32 a rounding may put one
number on the other side of a ReLU's kink; tests/test_processes.py compares gradients in float64, to 1e-10.)
eval.py judges the run again on as many processes.

Then, on three and two processes: one is killed (SIGKILL), and one alone meets an unreadable picture
(UserError), both in the middle; torchrun may not start them again, and it is measured how long the whole job
takes to end, and what was said. At last the same with `--max-restarts 1`: the job is to end by itself, as the
run on as many processes that nothing happened to; on two with its bits (on three DDP's sums come in
another order after a restart).

One line a trial; the exit code is 1 if one went wrong. torchrun starts this file again as each process.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
for place in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(place))

import endurance
import sources.steps
import sources.synthetic
from common import UserError, guarded, load_checkpoint, rank

import torch
from torch import Tensor

FIRST = 1e-5              # of a number: nothing but one step's sums lies before it
TOLERANCE = 3e-2          # of a number (of 1, if it is less), or of the length of all weights: 6 steps in float32
MINUTE = 60.0
SMALL = ("--samples 48 --image-size 32 --batch-size 24 --micro-batch 4 --epochs 3 --workers 0 --device cpu --mano builtin "
         "--save-minutes 1e-6 --cache cache --out run")
JUDGED = {"val": 8, "test": 11}


# ---- One process ---------------------------------------------------------------------------------


def work(words: list[str]) -> int:
    """What torchrun starts: a script's command, in which something may go wrong once; its exit code."""
    trouble, script, *rest = words
    torch.set_num_threads(1)
    sources.synthetic.LENGTH.update(JUDGED)
    if trouble != "none" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        meet(trouble)
    if script == "eval":
        import eval as roof
        return guarded(lambda: roof.main(rest))
    return guarded(lambda: endurance.SCRIPTS[script].main(rest))


def meet(trouble: str) -> None:
    """Let the last process be killed, or fail to read, when it asks for the fourth step's micro-batches."""
    plain = sources.steps.MicroBatches.__getitem__
    asked = []

    def read(self: sources.steps.MicroBatches, k: int) -> dict:
        if k == 0:
            asked.append(self)
        if len(asked) == 4 and rank() == torch.distributed.get_world_size() - 1:
            Path("trouble").write_text(repr(time.time()))
            if trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("frames/0007.jpg: cannot be read")
        return plain(self, k)

    sources.steps.MicroBatches.__getitem__ = read


# ---- Jobs ----------------------------------------------------------------------------------------


def torchrun(folder: Path, count: int, trouble: str, words: str, restarts: int = 0) -> tuple[int, str, float]:
    """Exit code of a job of `count` processes in a folder, what it said, seconds it took."""
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
         f"--max-restarts={restarts}", str(Path(__file__)), "work", trouble, *words.split()],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    (folder / "said.txt").write_text(done.stdout)
    return done.returncode, done.stdout, time.monotonic() - began


def numbers(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every number in a log line, a table of scores or a file of weights, by a name."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(one, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for k, one in enumerate(value):
            yield from numbers(one, f"{name}/{k}")
    elif isinstance(value, Tensor):
        yield name, value.double()
    elif isinstance(value, (int, float)):
        yield name, torch.tensor(float(value)).double()


def left(run: Path) -> dict[str, dict[str, Tensor]]:
    """What a run leaves, as numbers: logs without their first line, all weights of a file, scores."""
    found = {}
    for path in sorted(run.rglob("log.jsonl")):
        _, first, *others = [json.loads(line) for line in path.open()]
        found[f"{path.relative_to(run)}:2"] = dict(numbers(first))
        found[str(path.relative_to(run))] = dict(numbers(others))
    for path in sorted(run.rglob("*.pt")):
        content = load_checkpoint(path)
        weights = [value.flatten() for _, value in numbers(content.get("model", content))]
        found[str(path.relative_to(run))] = {"": torch.cat(weights)}
    for path in sorted(run.rglob("metrics.json")):
        results = json.loads(path.read_text())["results"]
        found[str(path.relative_to(run))] = dict(numbers([(one["rows"], one["n"], one["left_out"]) for one in results]))
    return found


def apart(one: dict, other: dict) -> tuple[float, str]:
    """The largest difference of two `left`, as a share of the number or of all weights, and where it is.

    Lines that have FIRST as their limit count as much more.
    """
    worst = 0.0, ""
    for file in one | other:
        a, b = one.get(file, {}), other.get(file, {})
        if a.keys() != b.keys():
            return math.inf, f"{file}: {sorted(a.keys() ^ b.keys())[:3]}"
        for name, value in a.items():
            if not torch.equal(value.isnan(), b[name].isnan()):
                return math.inf, f"{file}{name}"
            scale = max(float(value.nan_to_num().norm()), 1.0)
            off = float((value - b[name]).nan_to_num().norm()) / scale
            worst = max(worst, (off * (TOLERANCE / FIRST if file.endswith(":2") else 1), f"{file}{name}"))
    return worst


def scored(run: Path) -> list[tuple[int, int]]:
    """How many samples were scored and left out, in each metrics.json of a run."""
    return [(one["n"], one["left_out"]) for path in sorted(run.rglob("metrics.json"))
            for one in json.loads(path.read_text())["results"]]


def sentence(said: str) -> str:
    """Of what a job said, the lines that our scripts end with."""
    own = said.partition("failed (exitcode")[0]                    # what follows is torchrun's own report
    lines = dict.fromkeys(line for line in own.splitlines() if "error: " in line or "stopped" in line or "Traceback" in line)
    return " | ".join(lines) or "NOTHING"


# ---- Trials --------------------------------------------------------------------------------------


class Trials:
    """The trials of one stage, in a folder; each prints a line."""

    def __init__(self, stage: str, place: Path):
        self.stage, self.place = stage, place
        self.script, _, _ = stage.partition(":")
        self.words = f"{self.script} {endurance.STAGES[stage]} {SMALL}"
        self.sound = True

    def say(self, good: bool, text: str) -> None:
        """A line of the table."""
        self.sound = self.sound and good
        print(f"{self.stage}: {text}{'' if good else '   WRONG'}", flush=True)

    def job(self, name: str, count: int, trouble: str, words: str, restarts: int = 0) -> tuple[int, str, float]:
        """A job in a folder of its own, which has the rendered hands already."""
        folder = self.place / name
        if not folder.exists() and (self.place / "1" / "cache").exists():
            shutil.copytree(self.place / "1" / "cache", folder / "cache")
        return torchrun(folder, count, trouble, words, restarts)

    def straight(self) -> None:
        """1, 2 and 3 processes that nothing happens to, and eval.py on what they made."""
        truth, judged = {}, []
        for count in (1, 2, 3):
            code, said, seconds = self.job(str(count), count, "none", self.words)
            if code:
                raise SystemExit(f"{said[-4000:]}\n{self.stage} on {count} processes: exit code {code}")
            run = self.place / str(count) / "run"
            ends_in_scores = (run / "finetune.pt").exists()
            if ends_in_scores:
                code, said, more = self.job(str(count), count, "none", "eval run --device cpu --workers 0 --data synthetic:calm")
                seconds += more
                if code:
                    raise SystemExit(f"{said[-4000:]}\n{self.stage}, eval.py on {count} processes: exit code {code}")
            found, judged = left(run), scored(run)
            truth = truth or found
            worst, where = apart(truth, found)
            good = worst < TOLERANCE and (bool(judged) == ends_in_scores) and len(set(judged)) <= 1
            self.say(good, f"{count} processes: {len(found)} files, apart by {worst:.1e} ({where}), "
                     f"scored and left out {judged or 'nothing'}, {seconds:.0f} s")

    def troubled(self, count: int, trouble: str) -> None:
        """A job in which the last process is killed or fails, and which is not started again."""
        code, said, _ = self.job(f"{trouble}-{count}", count, trouble, self.words)
        seconds = time.time() - float((self.place / f"{trouble}-{count}" / "trouble").read_text())
        good = code != 0 and seconds < MINUTE and "error: " in sentence(said) and "Traceback" not in sentence(said)
        self.say(good, f"{count} processes, {trouble}: all ended after {seconds:.1f} s, exit code {code}: {sentence(said)}")

    def restarted(self, count: int, trouble: str) -> None:
        """The same with one restart: the job ends as if nothing had happened."""
        name = f"{trouble}-{count}-again"
        code, said, seconds = self.job(name, count, trouble, self.words, restarts=1)
        straight, now = left(self.place / str(count) / "run"), left(self.place / name / "run")
        straight = {file: value for file, value in straight.items() if not file.startswith("eval-")}
        worst, where = apart(straight, now) if code == 0 else (math.inf, sentence(said))
        limit = 0.0 if count == 2 else TOLERANCE
        self.say(code == 0 and worst <= limit and "going on at step" in said,
                 f"{count} processes, {trouble} and restart: exit code {code}, apart by {worst:.1e} {where}, {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="SCRIPT:STAGE", help=", ".join(endurance.STAGES))
    stages = parser.parse_args(argv).stages
    if wrong := set(stages) - set(endurance.STAGES):
        parser.error(f"no stage {' '.join(sorted(wrong))}; there are {', '.join(endurance.STAGES)}")
    sound = True
    for stage in stages or endurance.STAGES:
        with tempfile.TemporaryDirectory() as place:
            trials = Trials(stage, Path(place))
            trials.straight()
            trials.troubled(3, "kill")
            trials.troubled(2, "fail")
            trials.restarted(2, "kill")
            trials.restarted(3, "fail")
            sound = sound and trials.sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["work"] else main())
