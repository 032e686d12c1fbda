"""What a step asks of a GPU, counted without one; what bfloat16 is worth on this CPU."""
from __future__ import annotations

import time
import warnings
from statistics import median

# common before torch: it settles how threads wait
from common import build_backbone
from steps import STAGES, samples_of, stage_of, watched

import torch

BACKBONES = (("resnet10", 64, 64), ("resnet18", 64, 64), ("resnet50", 128, 8), ("efficientnet_b0", 64, 32), ("vit_mini", 64, 64),
             ("vit_s", 224, 4))


def bench_launches() -> None:
    """Operators of a forward pass with its losses, --quick's networks; what the host reads and waits to copy."""
    warnings.simplefilter("ignore")
    for script, stage in STAGES:
        seen = watched(script, stage)
        print(f"launches {script} {stage}: {seen.operators:,} operators forward, {sum(seen.reads.values())} numbers read by the host, "
              f"{seen.copies} copies waited for", flush=True)


def bench_precision() -> None:
    """Forward and backward in bfloat16 against float32, interleaved: back-bones, then whole steps of --quick's sizes."""
    torch.set_num_threads(1)
    for name, size, n in BACKBONES:
        net = build_backbone(name, size).to(memory_format=torch.channels_last)
        x = torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)

        def run(half: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = net(x)[-1]
            y.float().square().mean().backward()

        _report(f"{name} at {size} px", n, run)
    for script, stage in STAGES:
        kinds = [stage_of(script, stage, precision=kind) for kind in ("fp32", "bf16")]
        n = kinds[0].cfg.batch_size
        batch, net = samples_of(kinds[0], n), kinds[0].model().to(memory_format=torch.channels_last).train()
        _report(f"{script} {stage}, a step", n, lambda half: kinds[half].terms(net, batch)["loss"].backward())


def _report(name: str, n: int, run: object, rounds: int = 3) -> None:
    times = {False: [], True: []}
    for _ in range(rounds + 1):
        for half, taken in times.items():
            start = time.perf_counter()
            run(half)
            taken.append(time.perf_counter() - start)
    plain, half = (median(taken[1:]) for taken in times.values())                    # the first warms up
    print(f"precision {name}: {n / plain:.0f} a second in float32, {n / half:.0f} in bfloat16: x{plain / half:.2f}", flush=True)
