"""Fresh processes: how long --help takes, and whether memory grows from step to step."""
from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("ti_net", "peclr", "handmim", "hamuco", "eval")
RSS = """
import sys
sys.path.insert(0, sys.argv[1])
import peclr
seen = {}
advance = peclr.Run.advance

def watched(run, *words, **named):
    advance(run, *words, **named)
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    seen[run.step] = int(line.split()[1])

peclr.Run.advance = watched
peclr.main(["--backbone", "resnet10", "--image-size", "32", "--batch-size", "16", "--micro-batch", "8", "--samples", "960",
            "--epochs", "5", "--workers", "0", "--device", "cpu", "--out", "run"])
print("RSS", seen[50], seen[300])
"""


def bench_start() -> None:
    """Processor seconds of --help of the five commands, beside those of torch and torchvision alone, in turn."""
    calls = {"torch, torchvision": ["-c", "import torch, torchvision"],
             **{name: [f"{name}.py", "--help"] for name in COMMANDS}}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, words in calls.items():
            began = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            times[name].append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    bare = median(times["torch, torchvision"][1:])
    for name in COMMANDS:
        took = median(times[name][1:])
        print(f"start: python {name}.py --help {took:.1f} s, of it torch and torchvision {bare:.1f} s; ours "
              f"{took - bare:.2f} s, bar 3")


def bench_rss() -> None:
    """Memory of a fresh process at steps 50 and 300 of PeCLR's pre-training, ResNet-10 at 32 px (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        said = subprocess.run([sys.executable, "-c", RSS, str(ROOT)], cwd=folder, check=True, capture_output=True, text=True)
    early, late = map(int, said.stdout.rpartition("RSS")[2].split())
    print(f"rss: {early / 1024:.0f} MiB at step 50, {late / 1024:.0f} at step 300: {late / early - 1:+.1%}, bar 2 %")
