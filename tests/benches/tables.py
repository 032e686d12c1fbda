"""Tables of what training takes, from what tests/benches/counting.py counts: memory by GPU size, hours by GPU."""
from __future__ import annotations

import argparse
from typing import Any

from benches.counting import apart, bytes_of, flops_of, precision
from benches.measuring import peak_of
from benches.stages import Stage, batch_of, chosen

import torch

GIB = 2 ** 30
CARDS = (8, 12, 24, 80)         # GiB of memory
OVERHEAD = 1.5                  # GiB that CUDA's context, cuDNN's workspaces and fragments take (assumed, not counted)
# Peak dense bfloat16 TFLOPS: NVIDIA's data sheets of the A100 SXM, H100 SXM and H200.
PEAK = {"A100 80 GB": 312, "H100 / H200": 989}


def line(cells: list[Any]) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def largest(cfg: Any, fixed: float, each: float, room: float) -> str:
    """The largest micro-batch, in samples, that divides the batch and whose step fits in `room` bytes."""
    fit = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0 and fixed + n * each <= room]
    return str(max(fit)) if fit else "-"


def memory_row(stage: Stage, half: bool, recompute: bool) -> list[Any]:
    """Default micro-batch and what its step takes, then the largest that fits each card.

    The peak is linear in the micro-batch: two are counted.
    """
    cfg = stage.config(recompute=recompute)
    few = 1 if "views" in vars(cfg) else 2
    one, two = (apart(lambda n=n: bytes_of(stage, cfg, n, half)) for n in (few, 2 * few))
    each = (two.peak - one.peak) / few
    waiting = one.inputs / few * cfg.batch_size             # a step keeps all its samples, uint8
    fixed = one.peak - few * each + waiting
    kept = (two.kept - one.kept) / few
    state = one.network + one.gradients + one.optimizer
    parts = [f"{x / GIB:.2f}" for x in (state, waiting, kept, fixed + cfg.micro_batch * each)]
    return [stage.name, "on" if recompute else "off", cfg.micro_batch, *parts,
            *(largest(cfg, fixed, each, (card - OVERHEAD) * GIB) for card in CARDS)]


def checked_row(stage: Stage, half: bool, recompute: bool) -> list[Any]:
    """GiB that a step of few samples takes beside weights, gradients and optimiser: counted, and given out by the CPU's allocator."""
    cfg = stage.config(recompute=recompute)
    few = 1 if "views" in vars(cfg) else 2
    count = apart(lambda: bytes_of(stage, cfg, few, half))

    def measure() -> int:
        with precision(stage, half):
            model, batch = stage.build(cfg), batch_of(stage, cfg, few)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            return peak_of(lambda: stage.step(model, model, [batch], cfg))

    counted, measured = count.peak - count.network - count.gradients - count.optimizer - count.inputs, apart(measure)
    return [stage.name, "on" if recompute else "off", few, f"{counted / GIB:.2f}", f"{measured / GIB:.2f}", f"{measured / counted:.2f}"]


def bench_memory(words: list[str]) -> None:
    """memory [SCRIPT[:STAGE] ...] [--precision bf16|fp32] [--check]: what a step takes at the paper's sizes, and what fits."""
    parser = argparse.ArgumentParser(prog="bench.py memory")
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--check", action="store_true", help="also run a step of few samples of each on this CPU")
    asked = parser.parse_args(words)
    print(f"One process, {asked.precision}, counted; GiB. Of a card {OVERHEAD} GiB are left to CUDA.")
    print(line(["stage", "--recompute", "micro-batch", "weights, gradients, optimiser", "samples of a step",
                "kept for backward, a sample", "peak", *(f"fits {card} GB" for card in CARDS)]))
    print(line(["---"] * (7 + len(CARDS))))
    for stage in chosen(asked.stages):
        for recompute in (False, True):
            print(line(memory_row(stage, asked.precision == "bf16", recompute)), flush=True)
    if asked.check:
        print(line(["stage", "--recompute", "samples", "counted, GiB", "measured, GiB", "ratio"]))
        print(line(["---"] * 6))
    for stage in chosen(asked.stages) if asked.check else []:
        for recompute in (False, True):
            print(line(checked_row(stage, asked.precision == "bf16", recompute)), flush=True)


def bench_hours(words: list[str]) -> None:
    """hours [SCRIPT[:STAGE] ...] [--utilisation X]: a paper's whole recipe, extrapolated from the FLOPs of its steps."""
    parser = argparse.ArgumentParser(prog="bench.py hours")
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--utilisation", type=float, default=0.25, help="of the GPU's peak (default 0.25)")
    asked = parser.parse_args(words)
    print(f"Extrapolated, not run: FLOPs of forward and backward at {asked.utilisation:.0%} of the peak in dense bfloat16, "
          + ", ".join(f"{name} {peak} TFLOPS" for name, peak in PEAK.items()) + "; reading and scoring not counted.")
    print(line(["stage", "data", "samples", "epochs", "steps", "GFLOPs a sample",
                *(f"hours, {count} x {name}" for name in PEAK for count in ("1", "up to 8"))]))
    print(line(["---"] * (6 + 2 * len(PEAK))))
    for stage in chosen(asked.stages):
        cfg = stage.config()
        each = apart(lambda: flops_of(stage, cfg, 2) / 2)
        steps = stage.pictures // cfg.batch_size * cfg.epochs
        seconds = {name: each * cfg.batch_size * steps / (1e12 * peak * asked.utilisation) for name, peak in PEAK.items()}
        parts = cfg.batch_size // cfg.micro_batch
        most = max(n for n in range(1, 9) if parts % n == 0)            # processes share whole micro-batches
        hours = [cell for took in seconds.values()
                 for cell in (f"{took / 3600:.3g}", f"{took / most / 3600:.3g} (on {most})")]
        print(line([stage.name, stage.data, f"{stage.pictures:,}", cfg.epochs, f"{steps:,}", f"{each / 1e9:.3g}", *hours]),
              flush=True)
