"""One training step of any script and stage, put together from the script's own functions, without its data set.

`step` is what a loop does between two optimiser steps, `update` what it does then; a script's loop says the same in the
same order. The samples are those of a few synthetic hands, repeated: time and memory do not depend on what is seen.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

# common before torch: it settles how threads wait
from common import UserError, batch_statistics, decay_groups, settle
from sources.synthetic import BLOCK, Synthetic
import hamuco
import handmim
import peclr
import ti_net

import torch
from torch import nn


@dataclasses.dataclass
class Stage:
    """A stage of a script: how its network and batches are made, and which data set the paper has for it."""

    script: ModuleType
    kind: str                       # pretrain, finetune or train
    network: str                    # the class
    pictures: int                   # of the paper's data set: samples an epoch (HaMuCo: moments)
    data: str                       # its name
    encoder_pictures: int           # of a sample, through the encoder forward and backward
    seen: float = 1.0               # share of a Boolean mask that is True: HandMIM hides 0.1 to 0.5 of the patches

    @property
    def name(self) -> str:
        """SCRIPT:STAGE, as typed."""
        return f"{self.script.METHOD}:{self.kind}"

    def config(self, quick: bool = False, **given) -> object:
        """The options of the stage: the paper's sizes, or those of --quick; `given` wins."""
        quick_values = self.script.QUICK.get(self.kind, self.script.QUICK.get("hamuco", {})) if quick else {}
        synthetic = {"finetune": "synthetic"} if self.kind == "finetune" else {}
        kept = {key: value for key, value in quick_values.items() if key != "data"}
        return settle(self.script.Config, synthetic | kept | given, self.kind, {})

    def stored(self, cfg) -> tuple[int, float]:
        """Side of the stored pictures, px, and their margin."""
        wide = self.kind == "pretrain" and hasattr(self.script, "VIEW_STORE")
        if wide:
            return round(self.script.VIEW_STORE * cfg.image_size), self.script.VIEW_MARGIN
        return self.script.stored_side(cfg), self.script.MARGIN

    def samples(self, cfg, side: int = 0) -> Synthetic:
        """A block of synthetic hands as the stage's data set would give them; `side` px instead of its own."""
        own, margin = self.stored(cfg)
        return Synthetic(side or own, BLOCK, calm=True, margin=margin, views=getattr(cfg, "views", 1))

    def build(self, cfg) -> nn.Module:
        """The network, with seeded random weights, in training mode."""
        torch.manual_seed(0)
        return getattr(self.script, self.network)(cfg).train()

    def optimizer(self, model: nn.Module, cfg) -> torch.optim.Optimizer:
        """As the stage's loop makes it."""
        kind = torch.optim.AdamW
        if self.script is peclr:
            kind = peclr.Lars if self.kind == "pretrain" else torch.optim.Adam
        return kind(decay_groups(model, cfg.weight_decay), lr=1e-9)

    def micro_step(self, net: nn.Module, batch: dict, cfg) -> dict[str, torch.Tensor]:
        """The terms of one micro-batch; PeCLR's pre-training has none that stand alone."""
        if self.script is hamuco:
            return hamuco.train_step(net, batch, cfg, cfg.warm_epochs, 0)
        if self.kind == "pretrain":
            return self.script.pretrain_step(net, batch, cfg, 0)
        words = (cfg,) if self.script is ti_net else (cfg, 0)
        return self.script.finetune_step(net, batch, *words)

    def step(self, net: nn.Module, model: nn.Module, micro_batches: Sequence[dict], cfg) -> dict[str, torch.Tensor]:
        """Forward and backward of a step; gradients stay in the network. PeCLR: in two passes, as with several."""
        with batch_statistics(model):
            if self.script is peclr and self.kind == "pretrain":
                return peclr.cached_step(net, micro_batches, cfg, 0)
            for batch in micro_batches:
                terms = self.micro_step(net, batch, cfg)
                (terms["loss"] / len(micro_batches)).backward()
            return terms

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, terms: dict, cfg) -> None:
        """What follows the last micro-batch: clipping, the optimiser, HandMIM's teacher and centres."""
        pretrains = self.kind == "pretrain"
        if self.script is ti_net and pretrains:
            torch.nn.utils.clip_grad_norm_(model.parameters(), ti_net.CLIP)
        if self.script is handmim and pretrains:
            handmim.clip_each([p.grad for p in model.parameters() if p.grad is not None], handmim.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.script is handmim and pretrains:
            handmim.update_teacher(model, 0.996)
            for name in ("centre", "centre_patch"):
                handmim.update_centre(getattr(model, name), terms[name].detach())


STAGES = {stage.name: stage for stage in (
    Stage(ti_net, "pretrain", "TINet", 1_281_167, "ImageNet-1K", 12),
    Stage(ti_net, "finetune", "HandNet", 406_888, "DexYCB s0, labelled", 1),
    Stage(peclr, "pretrain", "PeCLR", 130_240 + 47_125, "FreiHAND + YouTube3DHands", 2),
    Stage(peclr, "finetune", "HandNet", 130_240, "FreiHAND", 1),
    Stage(handmim, "pretrain", "HandMIM", 221_602, "Sec. 3.1's mixture", 2, seen=0.3),
    Stage(handmim, "finetune", "HandNet", 130_240, "FreiHAND", 1),
    Stage(hamuco, "train", "HaMuCo", 107_538 * 1_200 // 1_518, "HanCo, first 1,200 sequences", 8))}


def chosen(words: Sequence[str]) -> list[Stage]:
    """The stages that SCRIPT or SCRIPT:STAGE words name, all without a word; UserError for others."""
    found = [stage for name, stage in STAGES.items() if not words or {name, name.split(":")[0]} & set(words)]
    names = {word for name in STAGES for word in (name, name.split(":")[0])}
    if unknown := sorted(set(words) - names):
        raise UserError(f"{' '.join(unknown)}: no such script or stage; there are {', '.join(STAGES)}")
    return found


def batch_of(stage: Stage, cfg, count: int) -> dict:
    """A micro-batch with every key of the stage's samples and its pictures' size, for what no value changes."""
    small = stage.samples(cfg, 32).batch(torch.arange(BLOCK))
    rows = torch.arange(count) % BLOCK
    batch = {key: ({name: on[rows] for name, on in value.items()} if isinstance(value, dict)
                   else value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows])
             for key, value in small.items()}
    side = stage.stored(cfg)[0]
    image = batch["image"][..., :1, :1].expand(*batch["image"].shape[:-2], side, side).contiguous()
    return batch | {"image": image, "index": torch.arange(count)}
