"""One sitting: rows that are not done yet, one after the other, each a line in NAME.jsonl."""
from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# common before torch: it settles how threads wait
from common import UserError

from claims.plan import (
    ROOT, SEEDS, Claim, Row, Scale, Weights, budgets_of, key, pictures_of, pretrain_words, tune_words)
from claims.rows import CLAIMS, calibration

RESULTS = Path(__file__).parent
PLACES = ("--out", "--cache", "--init", "--device")    # in which commands of one plan may differ


class Failed(Exception):
    """A command ended with an error."""


@dataclass(frozen=True)
class Task:
    """A row, a seed and a budget: a line of results."""

    claim: Claim
    row: Row
    seed: int
    budget: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.claim.name}-{self.row.name}-b{self.budget:g}-s{self.seed}"


@dataclass
class Place:
    """Where a sitting works: results, runs, rendered hands; how large everything is."""

    results: Path = RESULTS
    runs: Path = ROOT / "runs" / "claims"
    cache: Path = ROOT / "cache"
    scale: Scale = field(default_factory=Scale)
    execute: Callable[[list[str], Path], None] | None = None       # None: a process of its own


# ---- What there is to do -------------------------------------------------------------------------


def told(claim: Claim, results: Path = RESULTS) -> list[dict]:
    """Every line of a claim's file. UserError where one is cut off."""
    file = results / f"{claim.name}.jsonl"
    found = []
    for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}: line {number} is cut off; delete it, and its row is run again") from None
    return found


def lines(claim: Claim, results: Path = RESULTS) -> list[dict]:
    """The results of a claim that count, in the order in which they were made: of the plan's commands, of two the later."""
    rate = _chosen(claim, results)[0]
    return list({key(line): line for line in told(claim, results)
                 if _as_planned(claim, line, rate, Scale())}.values())


def _as_planned(claim: Claim, line: dict, rate: float, scale: Scale) -> bool:
    """Whether its commands are what the plan says today; lines of another share, length or rate stay in the file only."""
    row = next((row for row in claim.rows if row.name == line["row"]), None)
    if row is None:
        return False
    rate = row.rate or rate
    planned = {tuning.name: tune_words(claim, row, tuning, line["seed"], "", "", "", scale, rate) for tuning in claim.tunings}
    if row.weights:
        planned["weights"] = pretrain_words(row.weights, line["seed"], line["budget"], "", "", scale, rate)
    apart = PLACES if rate else (*PLACES, "--lr")                     # a rate that is not chosen yet

    def said(words: list[str]) -> list[str]:
        return [word for before, word in zip(["", *words], words) if word not in apart and before not in apart]

    return all(name in planned and said(shlex.split(command)[1:]) == said(planned[name])
               for name, command in line.get("commands", {}).items())


def tasks(claims: list[Claim], seeds: int, budget: float | None) -> list[Task]:
    """The most telling first: budget by budget, all rows of a seed of all claims, the next seed."""
    found = [(k, seed, Task(claim, row, claim.first_seed + seed, b))
             for claim in claims for seed in range(1 if claim.first_seed else seeds)
             for row in claim.rows for k, b in enumerate(budgets_of(claim, row, budget))]
    found.sort(key=lambda one: one[:2])                            # stable: claims as they were named
    return [task for *_, task in found]


def done(task: Task, results: Path) -> bool:
    """Whether its line is there."""
    return (task.row.name, task.seed, task.budget) in map(key, lines(task.claim, results))


def rate_of(claim: Claim, results: Path) -> float:
    """The rate that calibration chose for a claim, 1 where none is needed, 0 where it is not run yet.

    Failed where scratch did not end below the mean pose: then no row can be told from another.
    """
    rate, scores = _chosen(claim, results)
    if scores and claim.tunings and scores["small_mpjpe_mm"] > scores["small_mean_pose_mpjpe_mm"]:
        raise Failed(f"{calibration(claim).name}: scratch ends at {scores['small_mpjpe_mm']:.1f} mm, above the mean "
                     f"pose's {scores['small_mean_pose_mpjpe_mm']:.1f}; double SHARE, or the tuning's length "
                     "where its curve still falls, and say so, with the date, in PLAN.md")
    return rate


def _chosen(claim: Claim, results: Path) -> tuple[float, dict]:
    """`rate_of`, and the scores of the row that chose it; {} where none did."""
    chooser = calibration(claim)
    if chooser is None:
        return 1.0, {}
    planned = {(row.name, b) for row in chooser.rows for b in budgets_of(chooser, row)}
    found = {line["row"]: line["scores"] for line in lines(chooser, results)
             if (line["row"], line["budget"]) in planned}             # none that was trained for longer
    if not {row.name for row in chooser.rows} <= set(found):
        return 0.0, {}
    name = "single_view_n_mpjpe_mm" if claim.script == "hamuco" else "small_val_mm"
    best = min(chooser.rows, key=lambda row: found[row.name][name])
    return best.rate, found[best.name]


# ---- Commands ------------------------------------------------------------------------------------


def stop_at_a_signal() -> None:
    """From now on the first signal raises KeyboardInterrupt, and what runs saves; later ones do nothing."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]            # nohup's

    def on_signal(*_: object) -> None:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, on_signal)


def begun(words: list[str], **more: object) -> subprocess.Popen:
    """A Python of one thread, out of the terminal's reach: it gets a signal from `all_of` alone, and once.

    It inherits the lock of its row, so that nobody else begins with it while it lives.
    """
    return subprocess.Popen([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True, close_fds=False, **more)


def all_of(processes: list[subprocess.Popen]) -> list[int]:
    """Their exit codes. Where this process is stopped it stops them, waits while they save, and ends."""
    try:
        return [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise


def in_a_process(words: list[str], log: Path) -> None:
    """Run a script with one thread and its words; what it says goes to `log`. Failed where it does.

    It is stopped, and saves, where this process is stopped.
    """
    with open(log, "ab") as file:
        code, = all_of([begun(words, cwd=ROOT, stdout=file, stderr=file)])
    if code:
        said = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        raise Failed(f"{' '.join(words)}\n  ended with {code}; its last words, of {log}:\n  "
                     + "\n  ".join([line for line in said if line.strip()][-5:]))


def stage(words: list[str], out: Path, place: Place) -> dict:
    """Run a command into `out` unless it is done; go on from its checkpoint where it was stopped.

    OUT/done.json then holds the command, its seconds over all sittings, git state and precision.
    """
    mark, taken = out / "done.json", out.with_name(out.name + ".seconds")
    command = "python " + " ".join(words)
    if mark.is_file():
        about = json.loads(mark.read_text())
        if about["command"] != command:
            raise Failed(f"{out} was made by another command; move it away:\n  {about['command']}\n  {command}")
        return about
    if out.exists() and not any(out.rglob("last.pt")):
        shutil.rmtree(out)
        taken.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = float(taken.read_text()) if taken.is_file() else 0.0
    began = time.monotonic()
    execute = place.execute or in_a_process
    try:
        execute(words + ["--resume"] * out.exists(), out.with_name(out.name + ".log"))
    finally:
        seconds = before + time.monotonic() - began
        taken.write_text(f"{seconds:.1f}")                # a killed sitting's are lost, not a stopped one's
    config = json.loads(next(out.glob("*/config.json")).read_text())["cfg"]
    about = {"command": command, "seconds": round(seconds),
             "precision": config.get("precision", "fp32"), "git": git()}
    mark.write_text(json.dumps(about) + "\n")
    taken.unlink()
    return about


def git() -> str:
    """The commit, and whether files differ from it; empty where there is no git."""
    def said(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True,
                              text=True).stdout.strip()
    if shutil.which("git") is None:
        return ""
    return said("rev-parse", "--short=12", "HEAD") + "+changes" * bool(
        said("status", "--porcelain", "-uno", "--", "*.py"))


def machine(device: str = "cpu") -> str:
    """What it was run on; on a GPU that is named."""
    if device != "cpu":
        import torch
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, one thread of {os.cpu_count()}"


def slug(weights: Weights, rate: float) -> str:
    """The name of a pre-training's folder: its script, words and data."""
    words = [word.removeprefix("--") for word in weights.words]
    share = [f"share{weights.share:g}"] if weights.share != 1 else []
    data = [weights.data.replace(":", "-")] if weights.data != "synthetic" else []
    return "-".join([weights.script, *words, *share, *data, *([f"lr{rate:g}"] if rate else [])])


@contextlib.contextmanager
def alone(name: str, place: Place) -> Iterator[bool]:
    """Hold the lock of a name while inside; False where another process has it."""
    folder = place.runs / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            os.set_inheritable(file.fileno(), True)
            yield True


# ---- A row ---------------------------------------------------------------------------------------


def weights_of(task: Task, rate: float, place: Place) -> tuple[Path | None, dict]:
    """The folder of a row's pre-training, made where it is not there, and what is known of it."""
    weights = task.row.weights
    if weights is None:
        return None, {}
    rate = rate if weights.script == "hamuco" else 0.0
    out = place.runs / "weights" / f"{slug(weights, rate)}-b{task.budget:g}-s{task.seed}"
    words = pretrain_words(weights, task.seed, task.budget, relative(out), relative(place.cache),
                           place.scale, rate)
    if not (out / "done.json").is_file():                 # what was tuned from others of that name is of no use
        for claim in dict.fromkeys((task.claim, *CLAIMS.values())):
            for row in claim.rows:
                if row.weights == weights:
                    stale = Task(claim, row, task.seed, task.budget).name
                    shutil.rmtree(place.runs / stale, ignore_errors=True)
    about = stage(words, out, place)
    for file in out.rglob("last.pt"):
        file.unlink()
    return out, about


def relative(path: Path) -> Path:
    """As written in commands, from the project's folder where it lies below."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def run(task: Task, place: Place) -> None:
    """Everything of a row and seed, then its line."""
    from claims import measure                     # torch takes seconds to load, and --help needs none
    claim, row, scale = task.claim, task.row, place.scale
    split = "val" if claim.first_seed else "test"  # rates are not chosen on the test hands
    rate = row.rate or rate_of(claim, place.results)
    made, about = weights_of(task, rate, place)
    stages = {"weights": about} if about else {}
    init = str(relative(made / "backbone.pt")) if made else "random"
    outs = {}
    for tuning in claim.tunings:
        out = outs[tuning.name] = place.runs / task.name / tuning.name
        words = tune_words(claim, row, tuning, task.seed, init, relative(out),
                           relative(place.cache), scale, rate)
        stages[tuning.name] = stage(words, out, place)
    began = time.monotonic()
    parts = [measure.tuned(out, name, claim.tests, split) for name, out in outs.items()]
    if claim.script == "hamuco":
        parts.append(measure.collaborated(made, split))
    if claim.probe:
        weights = str(made / "backbone.pt") if made else init
        parts.append(measure.probe(claim, weights, task.seed, str(place.cache), scale))
    wanted = {name for c in claim.compared for _, name in (c.better, c.than)}
    groups = {name: x for part in parts for name, x in part.groups.items()
              if name in wanted or "curve" in name}
    seconds = {name: x["seconds"] for name, x in stages.items()}
    line = {"claim": claim.name, "row": row.name, "seed": task.seed, "budget": task.budget,
            "date": datetime.date.today().isoformat(), "machine": machine(scale.device), "git": git(),
            "commits": {name: x["git"] for name, x in stages.items()},
            "device": scale.device, "precision": sorted({x["precision"] for x in stages.values()}),
            "pictures": pictures_of(row.weights, task.budget, scale) if row.weights else 0,
            "seconds": seconds | {"scoring": round(time.monotonic() - began)},
            "commands": {name: x["command"] for name, x in stages.items()},
            "scores": {name: x for part in parts for name, x in part.means.items()},
            "monitors": measure.monitored(made) if made else {},
            "groups": groups}
    place.results.mkdir(parents=True, exist_ok=True)
    with open(place.results / f"{claim.name}.jsonl", "ab", buffering=0) as file:
        file.write(f"{json.dumps(line)}\n".encode())             # at once: others append, too
    shutil.rmtree(place.runs / task.name, ignore_errors=True)


def sit(claims: list[Claim], seeds: int = SEEDS, budget: float | None = None,
        place: Place | None = None, until: float = math.inf) -> int:
    """Run what is not done, until a moment of time.monotonic; how many rows failed.

    The rates that rows need are chosen first, by the rows of `calibrate-SCRIPT`. Rows that another sitting works on at the same time,
    or whose weights it makes, wait for later.
    """
    place = place or Place()
    failed: set[Task] = set()
    choosers = [calibration(claim) for claim in claims]
    first = tasks([*dict.fromkeys(one for one in choosers if one)], 1, None)      # at their own budget
    every = [*dict.fromkeys(first + tasks(claims, seeds, budget))]
    while time.monotonic() < until:
        moved = busy = False
        for task in every:
            if task in failed or done(task, place.results):
                continue
            try:
                if not rate_of(task.claim, place.results):
                    continue
            except Failed as error:
                print(error, flush=True)
                failed.update(other for other in every if other.claim is task.claim)
                continue
            name = task.name
            if task.row.weights:                           # rows of several claims share weights
                name = f"{slug(task.row.weights, task.row.rate)}-b{task.budget:g}-s{task.seed}"
            with alone(name, place) as mine:
                if not mine:
                    busy = True
                    continue
                if done(task, place.results):
                    continue
                left = sum(not done(other, place.results) for other in every)
                print(f"{datetime.datetime.now():%H:%M} {task.name}; {left} of {len(every)} to do",
                      flush=True)
                try:
                    run(task, place)
                except (Failed, UserError, OSError, RuntimeError) as error:
                    print(f"{task.name}: {error}", flush=True)
                    failed.add(task)
                moved = True
                break                                      # the first of the list again
        if not moved and not busy:
            break
        if not moved:
            time.sleep(20)
    return len(failed)
