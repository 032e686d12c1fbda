"""Who is judged: functions from a batch to named predictions; what they said beside the truth.

Most are trained networks (`Net`); triangulated labels and the mean pose are judged in the same way.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    ROOT, Flags, Mano, axis_angle_to_matrix, finest, invert, place, transform, view_intrinsics)
from sources import Rig, data_name, joints_of
from sources.reading import to_device

import numpy as np
import torch
from torch import Tensor, nn

Prediction = dict[str, Tensor]                         # joints, uv, verts, ... as `predict` returns
Predictor = Callable[[dict], dict[str, Prediction]]    # a batch -> {row: predictions of pictures}


@dataclasses.dataclass
class Net:
    """A trained network and what its file says about it; called, it answers to a batch."""

    path: str
    method: str                  # the script that made it
    model: nn.Module             # with USES and predict(batch)
    cfg: Flags                   # the script's Config
    row: str
    mean: dict[str, Tensor]      # of its training set, see `sources.stages.mean_hand`
    side: int                    # px of the stored squares it reads
    margin: float                # of these squares, by the hand's box
    rig: Rig | None = None       # of several views

    def __call__(self, batch: dict) -> dict[str, Prediction]:
        """Its predictions by row."""
        return outputs(answer(self.model, batch), self.row)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent

    @property
    def trained_on(self) -> str:
        """Name of the data set whose joints it has learnt."""
        return data_name(self.cfg.finetune or self.cfg.data[0])

    @property
    def millions(self) -> str:
        """Its parameters, as tables show them."""
        return f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M"


def answer(model: nn.Module, batch: dict) -> dict:
    """What a model predicts; it sees the keys in its USES, as far as they are there, no more.

    It computes on its own device, and the answer is where the batch is, see `scored_on`.
    """
    seen = {key: batch[key] for key in model.USES if key in batch}
    here = batch["image"].device
    there = next((p.device for p in model.parameters()), here)
    return to_device(model.eval().predict(to_device(seen, there)), here)


def scored_on(device: torch.device) -> torch.device:
    """Where predictions of a device are judged: on it, or where scores can be in float64."""
    return device if finest(device) == torch.float64 else torch.device("cpu")


def outputs(pred: dict, row: str) -> dict[str, Prediction]:
    """What `predict` returned as rows of pictures: {row: {joints (N, 21, 3), ...}}.

    A network with several named outputs has a row for each, NAME or NAME-VARIANT; a view axis joins
    the first.
    """
    if all(isinstance(one, dict) for one in pred.values()):
        variant = "-" * ("-" in row) + row.partition("-")[2]
        return {name + variant: hand for key, one in pred.items()
                for name, hand in outputs(one, key).items()}
    views = pred["joints" if "joints" in pred else "uv"].dim() == 4
    return {row: {key: x.flatten(0, 1) if views else x for key, x in pred.items()}}


def blind(mean: dict[str, Tensor], batch: dict, hand: Mano) -> tuple[Prediction, Prediction]:
    """What the mean of a training set would answer: its mean joints, and the hand in its mean pose.

    The mean of joints under free rotation is a ball, which no alignment can judge: aligned scores
    are those of the second.
    """
    def many(x: Tensor) -> Tensor:
        return x.to(batch["joints"]).expand(len(batch["joints"]), *x.shape)

    R = axis_angle_to_matrix(mean["pose"].unflatten(-1, (16, 3)))
    verts, joints = (x[0] for x in hand(R[None], mean["shape"][None]))
    raw = {"joints": many(mean["joints"]), "uv": batch["image"].shape[-1] * many(mean["uv"]),
           "pose": many(R)}
    return raw, {"joints": many(joints), "verts": many(verts), "pose": many(R)}


def redefined(pred: Prediction, trained: str, tested: str, hand: Mano) -> Prediction:
    """A prediction with a mesh, its joints as the data set it is tested on means them.

    Data sets differ by centimetres at a tip; without a mesh nothing can be done. `hand` has the
    joints of the data set it is tested on, and stays on the CPU.
    """
    if joints_of(trained) == joints_of(tested) or not {"verts", "pose", "shape"} <= set(pred):
        return pred
    verts, joints = hand(pred["pose"].float().cpu(), pred["shape"].float().cpu())
    moved = (pred["verts"] - verts.to(pred["verts"])).mean(1, keepdim=True)
    joints = joints.to(pred["verts"]) + moved
    out = pred | {"joints": joints}
    if "root" in pred:
        out["root"] = pred["root"] + joints[:, ROOT] - pred["joints"][:, ROOT]
    return out


# ---- What it said and what is true ---------------------------------------------------------------


def as_pictures(batch: dict) -> dict:
    """Moments (B, V, ...) as B x V pictures, without truth where a view is missing."""
    if "view_ok" not in batch:
        return batch
    B, V = batch["view_ok"].shape
    out = {key: x.flatten(0, 1) for key, x in batch.items()
           if isinstance(x, Tensor) and x.shape[:2] == (B, V)}
    ok = out["view_ok"]
    for key in {"joints", "verts", "uv", "pose", "shape"} & set(out):
        out[key] = hidden(out[key], ~ok)
    index = batch["index"][:, None] * V + torch.arange(V, device=ok.device)
    return out | {"joints_ok": out["joints_ok"] & ok[:, None], "index": index.flatten(),
                  "side": [side for side in batch["side"] for _ in range(V)], "views": V}


def hidden(x: Tensor, where: Tensor) -> Tensor:
    """Numbers of pictures (N, ...) with NaN for those in `where` (N,)."""
    return x.masked_fill(where.view(-1, *[1] * (x.dim() - 1)), math.nan)


def root_of(pred: Prediction, batch: dict, columns: dict[str, np.ndarray], truth: bool = True
            ) -> Tensor:
    """Where a prediction's wrist is in the camera's frame, (N, 3) m.

    Where the network says; else where the data set does, or with `truth` the true joints; else
    where it must be to be seen at the predicted key points.
    """
    joints = pred["joints"]
    known = batch["joints"][:, ROOT] if truth else torch.full_like(joints[:, ROOT], math.nan)
    if "root" in columns:                              # all that HO3D tells of its test set
        known = torch.as_tensor(columns["root"]).to(joints)
    root = pred.get("root", known)
    lost = ~root.isfinite().all(-1)
    if lost.any() and "uv" in pred and "image" in batch:
        seen = joints[:, ROOT] + place(joints, pred["uv"], view_intrinsics(batch))
        root = torch.where(lost[:, None], seen, root)
    return root


def facts(pred: Prediction, batch: dict, columns: dict[str, np.ndarray]) -> dict:
    """Prediction and truth of some pictures side by side, as the protocols read them.

    joints, true, camera (N, 21, 3) m, ok, visible (N, 21); uv, uv_true (N, 21, 2) px of the whole
    picture, uv_image of the network's; R, R_true (N, 16, 3, 3), shape_true (N, 10); verts,
    verts_true (N, 778, 3) where there is a mesh; left (N,); the data set's own columns; and the
    batch. `camera` and `verts` stand where the network puts the hand in the camera's frame; with
    their wrist on the true one, or where 2D sees them, if it does not say.
    """
    R_true = axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)))
    joints, back = pred["joints"], invert(batch["crop"].double())
    moved = (root_of(pred, batch, columns) - joints[:, ROOT])[:, None]
    uv = pred.get("uv", torch.full_like(batch["uv"], math.nan))
    found = {"joints": joints, "true": batch["joints"], "ok": batch["joints_ok"],
             "camera": joints + moved, "visible": batch["visible"],
             "uv_image": uv, "uv": transform(back, uv.double()),
             "uv_true": transform(back, batch["uv"].double()), "columns": columns,
             "left": torch.tensor([side == "left" for side in batch["side"]], device=joints.device),
             "R": pred.get("pose", torch.full_like(R_true, math.nan)), "R_true": R_true,
             "shape_true": batch["shape"], "pred": pred, "batch": batch}
    if "verts" in pred:
        found |= {"verts": pred["verts"] + moved, "verts_true": batch["verts"]}
    if "root" in pred:
        found["root_error"] = pred["root"] - batch["joints"][:, ROOT]
    return found
