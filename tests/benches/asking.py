"""What a step asks of a GPU, counted without one; what bfloat16 and torch.compile do on this CPU."""
from __future__ import annotations

import copy
import logging
import time
import warnings
from statistics import median

# common before torch: it settles how threads wait
from benches.stages import chosen
from common import build_backbone, parallel
from steps import STAGES, samples_of, stage_of, watched

import torch
import torch._inductor.config

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


def bench_compile(words: list[str]) -> None:
    """compile [SCRIPT[:STAGE] ...]: --compile on this CPU at 32 px, four samples: the same losses and gradients, and the pace."""
    warnings.simplefilter("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR)                           # where the graph breaks is no news
    torch._inductor.config.force_disable_caches = True
    for stage in chosen(words):
        script, name = stage.name.split(":")
        small = stage_of(script, name, image_size=32, backbone="vit_mini" if script == "handmim" else "resnet10")
        batch = samples_of(small, 4)
        torch.manual_seed(0)
        plain = small.model().to(memory_format=torch.channels_last).train()
        net = parallel(copy.deepcopy(plain), torch.device("cpu"), compile=True)
        times: dict[str, list[float]] = {"compiled": [], "eager": []}
        found, took = {}, {}
        began = time.perf_counter()
        for k in range(9):
            for kind, model in (("compiled", net), ("eager", plain)):
                model.zero_grad()
                start = time.process_time()
                terms = small.terms(model, batch)
                terms["loss"].backward()
                times[kind].append(time.process_time() - start)
                if k == 0:                      # of the same weights; BatchNorm's statistics have not moved
                    losses = torch.stack([x.detach().double() for key, x in terms.items() if key == "loss" or key.startswith("L_")])
                    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
                    found[kind] = losses, gradient
                    took[kind] = time.perf_counter() - began
        compiled, eager = (median(times[kind][2:]) for kind in times)
        apart = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found["compiled"], found["eager"])]
        verdict = "agree" if apart[0] < 1e-5 and apart[1] < 1e-3 else "DIFFER"
        print(f"compile {stage.name}: {took['compiled']:.0f} s to compile; losses {apart[0]:.1e} and gradients {apart[1]:.1e} apart (they {verdict}: "
              f"below 1e-5 and 1e-3), a step {1000 * compiled:.0f} ms, eager {1000 * eager:.0f} ms: x{eager / compiled:.2f}", flush=True)
