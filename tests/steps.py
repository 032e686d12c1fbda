"""One training step of every script and stage on samples at hand, for tests and tests/bench.py."""
from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

# common before torch: it settles how threads wait
import common
from common import settle
from sources.synthetic import Synthetic
import hamuco
import handmim
import peclr
import ti_net

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Stage(NamedTuple):
    """What a step needs: options, the side and margin of stored squares, the network, its terms."""

    cfg: Any
    side: int                                           # px
    margin: float
    model: Callable[[], nn.Module]
    terms: Callable[[nn.Module, dict], dict[str, Tensor]]


def _ti_net(given: dict, stage: str) -> Stage:
    cfg = settle(ti_net.Config, given, stage, ti_net.QUICK)
    model = ti_net.TINet if stage == "pretrain" else ti_net.HandNet

    def terms(net: nn.Module, batch: dict) -> dict[str, Tensor]:
        if stage == "pretrain":
            return ti_net.pretrain_step(net, batch, cfg, 0)
        return ti_net.finetune_step(net, batch, cfg)

    return Stage(cfg, ti_net.stored_side(cfg), ti_net.MARGIN, lambda: model(cfg), terms)


def _handmim(given: dict, stage: str) -> Stage:
    cfg = handmim.configure(given, stage)
    if stage == "pretrain":
        side = round(handmim.VIEW_STORE * cfg.image_size)
        return Stage(cfg, side, handmim.VIEW_MARGIN, lambda: handmim.HandMIM(cfg),
                     lambda net, batch: handmim.pretrain_step(net, batch, cfg, 0))
    return Stage(cfg, handmim.stored_side(cfg), handmim.MARGIN, lambda: handmim.HandNet(cfg),
                 lambda net, batch: handmim.finetune_step(net, batch, cfg, 0))


def _peclr(given: dict, stage: str) -> Stage:
    cfg = settle(peclr.Config, given, stage, peclr.QUICK)

    def terms(net: nn.Module, batch: dict) -> dict[str, Tensor]:
        if stage == "pretrain":                 # as `whole_step`, but for its backward pass
            z = peclr.projections(net, batch, cfg, 0)
            return {"loss": peclr.nt_xent(z, cfg.tau), **peclr.contrast_monitors(z)}
        return peclr.finetune_step(net, batch, cfg, 0)

    if stage == "pretrain":
        side = round(peclr.VIEW_STORE * cfg.image_size)
        return Stage(cfg, side, peclr.VIEW_MARGIN, lambda: peclr.PeCLR(cfg), terms)
    return Stage(cfg, peclr.stored_side(cfg), peclr.MARGIN, lambda: peclr.HandNet(cfg), terms)


def _hamuco(given: dict, stage: str) -> Stage:
    cfg = hamuco.stage_config(given)
    return Stage(cfg, hamuco.stored_side(cfg), hamuco.MARGIN, lambda: hamuco.HaMuCo(cfg),
                 lambda net, batch: hamuco.train_step(net, batch, cfg, cfg.warm_epochs, 0))


SCRIPTS = {"ti_net": (_ti_net, ("pretrain", "finetune")),
           "handmim": (_handmim, ("pretrain", "finetune")),
           "peclr": (_peclr, ("pretrain", "finetune")),
           "hamuco": (_hamuco, ("train",))}
STAGES = [(script, stage) for script, (_, stages) in SCRIPTS.items() for stage in stages]


def stage_of(script: str, stage: str, quick: bool = True, **given: Any) -> Stage:
    """A stage with its --quick or its paper's options, but for those that are given."""
    given = {"quick": quick, "mano": "builtin", "precision": "fp32"} | given
    if stage == "finetune":
        given = {"finetune": "synthetic"} | given
    return SCRIPTS[script][0](given, stage)


def samples_of(stage: Stage, n: int) -> dict:
    """The first n synthetic training samples as the stage stores them, moments where it has views."""
    views = getattr(stage.cfg, "views", 1)
    data = Synthetic(stage.side, n, calm=True, margin=stage.margin, views=views)
    index = torch.arange(n)
    return data.batch(index) | {"index": index}


class Watch(TorchDispatchMode):
    """Counts operators, numbers read by the host, copies to the device for which it waits, and norms that are slow.

    (On a CPU a norm over an axis that is not the last takes 10 to 30 times as long as the root of a sum of squares.)
    """

    def __init__(self, pictures):
        super().__init__()
        self.pictures, self.operators, self.reads, self.copies, self.norms = pictures, 0, collections.Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero"):           # answers that any batch could have given
            self.reads[name] += 1
            if name == "nonzero":
                return torch.zeros(5, args[0].dim(), dtype=torch.long, device=args[0].device)
            return False if args[0].dtype == torch.bool else self.pictures
        if name == "linalg_vector_norm" and len(args) > 2 and args[2]:
            self.norms += args[0].ndim - 1 not in [axis % args[0].ndim for axis in args[2]]
        moved = name == "_to_copy" and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu"
        self.copies += moved and torch.device(kwargs.get("device") or "cpu").type == "cuda" and not kwargs.get("non_blocking")
        return func(*args, **kwargs)


def watched(script: str, name: str) -> Watch:
    """A forward pass and its losses as a GPU would be asked for them; nothing is computed."""
    stage = stage_of(script, name)
    batch = samples_of(stage, 2)
    common._made.cache_clear()
    try:
        with (FakeTensorMode() as fake, torch.backends.cudnn.flags(enabled=False),
              mock.patch.object(handmim, "draw_masks", lambda index, grid, *_: torch.zeros(
                  len(index), 2, grid ** 2, dtype=torch.bool)),                # they stay on the host
              mock.patch.object(nn.init, "trunc_normal_", lambda x, **_: x)):  # it reads what it draws
            batch = pytree.tree_map(
                lambda x: fake.from_tensor(x).to("cuda") if isinstance(x, Tensor) else x, batch)
            with torch.device("cuda"):
                net = stage.model()
            for _ in range(2):                               # constants are made in the first
                with Watch(batch["image"].shape[:-3].numel()) as watch:
                    stage.terms(net, batch)
    finally:
        common._made.cache_clear()
    return watch
