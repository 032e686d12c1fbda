"""Where a step's time goes: data, views, forward, backward, optimiser and the rest, with scripts as they are.

Clocks are put around the scripts' own functions and the network's hooks from here. On one CPU thread they count processor
time, which other programs do not lengthen; on CUDA each waits for the device.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benches.measuring import peak_of
from benches.stages import Stage, chosen
from common import parallel, start
from sources import training_steps
from sources.synthetic import Cached

import torch
from torch import nn

VIEWS = ("make_views", "hand_view", "make_crops")           # what turns stored pictures into the network's
PARTS = ("data", "views", "forward", "backward of losses", "backward", "optimiser", "other")


class Clock:
    """Seconds by part; what runs inside another part counts for the inner one alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.open: list[str] = ["other"]
        self.last = self.now()

    def now(self) -> float:
        """Seconds, when the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def turn(self) -> None:
        """Give the time since the last turn to the part that was open."""
        now = self.now()
        self.spent[self.open[-1]] += now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        """A part begins."""
        self.turn()
        self.open.append(part)

    def leave(self) -> None:
        """The part that began last ends."""
        self.turn()
        self.open.pop()

    def around(self, part: str, call: Callable) -> Callable:
        """The call, timed."""
        def timed(*words: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                return call(*words, **named)
            finally:
                self.leave()
        return timed


def seconds_of(stage: Stage, cfg: Any, device: torch.device, folder: str, rounds: int = 2
               ) -> tuple[dict[str, float], float, int]:
    """Seconds by part of a step of one micro-batch, those of the bare encoder's forward and backward on as many pictures,
    and the step's peak in bytes (on a CPU: beyond the weights and what the optimiser keeps).
    """
    model = stage.build(cfg)
    net = parallel(model, device, cfg.compile)
    optimizer = stage.optimizer(model, cfg)
    data = Cached(stage.samples(cfg), Path(folder))
    encoder = getattr(model, "student", model).backbone
    clock = Clock(device)

    def read() -> list[dict]:
        steps = training_steps(data, cfg, 0, 0, device)
        return list(next(steps)[1])

    def one() -> None:
        batches = clock.around("data", read)()
        terms = stage.step(net, model, batches, cfg)
        clock.around("optimiser", stage.update)(model, optimizer, terms, cfg)

    backward = torch.Tensor.backward
    patches = [mock.patch.object(stage.script, name, clock.around("views", getattr(stage.script, name)))
               for name in VIEWS if hasattr(stage.script, name)]
    patches.append(mock.patch.object(torch.Tensor, "backward", clock.around("backward of losses", backward)))
    hooks = [model.register_forward_pre_hook(lambda *_: clock.enter("forward")),
             model.register_forward_hook(lambda *_: clock.leave())]

    def reached(grad: torch.Tensor) -> None:
        """A loss's gradient has come to what the network gave: from here on its own backward runs."""
        clock.turn()
        clock.open[-1] = "backward"

    def watch(module: nn.Module, given: Any, out: Any) -> None:
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(reached)

    hooks.append(model.register_forward_hook(watch))
    for patch in patches:
        patch.start()
    try:
        for _ in range(rounds + 1):
            clock.spent = defaultdict(float)
            clock.last = clock.now()
            one()
            clock.turn()
    finally:
        for patch in patches:
            patch.stop()
        for hook in hooks:
            hook.remove()
    spent = dict(clock.spent)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        one()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = peak_of(one)
    x = torch.randn(cfg.micro_batch * stage.encoder_pictures, 3, cfg.image_size, cfg.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        began = clock.now()
        with stage.script.autocast(device, cfg.precision):
            out = encoder(x)[-1]
        out.float().sum().backward()
        bare = clock.now() - began
    return spent, bare, peak


def bench_profile(words: list[str]) -> None:
    """profile [SCRIPT[:STAGE] ...] [--device cpu] [--sizes paper quick] [--micro-batch N] [--precision P] [--compile]."""
    parser = argparse.ArgumentParser(prog="bench.py profile")
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=("paper", "quick"), default=["quick", "paper"])
    parser.add_argument("--micro-batch", type=int, help="default: the recipe's on CUDA, at most 2 on a CPU")
    parser.add_argument("--precision", default="auto", help="as the scripts' flag")
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args(words)
    device = start(asked.device)
    print("A step of one micro-batch on cached synthetic pictures; shares of its time. Outside: data, views, backward of the "
          "losses and the rest, of a step without its optimiser, which a recipe runs once for many micro-batches.")
    for stage in chosen(asked.stages):
        for size in asked.sizes:
            cfg = stage.config(size == "quick", compile=asked.compile, workers=0, device=asked.device,
                               precision=asked.precision)
            most = cfg.micro_batch if device.type == "cuda" else min(cfg.micro_batch, 2)
            cfg.micro_batch = cfg.batch_size = asked.micro_batch or most
            with tempfile.TemporaryDirectory() as folder:
                spent, bare, peak = seconds_of(stage, cfg, device, folder)
            whole = sum(spent.values())
            step = whole - spent.get("optimiser", 0)
            outside = sum(spent.get(part, 0) for part in ("data", "views", "backward of losses", "other"))
            parts = ", ".join(f"{part} {spent.get(part, 0) / whole:.1%}" for part in PARTS)
            print(f"{stage.name} {size}, {cfg.backbone}, {cfg.image_size} px, micro-batch {cfg.micro_batch}, {device}, {cfg.precision}: {whole:.3f} s; "
                  f"{parts}; outside network, head and decoder {outside / step:.1%} (bar 10 %), x{step / bare:.2f} the bare "
                  f"encoder, peak {peak / 2 ** 30:.2f} GiB", flush=True)
