"""CanonPose's idea as a baseline of HaMuCo (its Tables 1 and 3): 2D labels of several views lifted to 3D, without pictures.

    python tests/claims/canonpose.py --data hanco=DIR --views 8 --out OUT

A network sees the key points of one view, labels with their confidences, and says where the joints are in that camera's axes, up to
scale. Turned by the known rotations into every other camera and projected, they must agree with the labels there (Wandt et al., CVPR
2021, with known relative rotations). Its paper is not at hand: centre, width and schedule are ours. Poses of static cameras that
are learnt from a batch, its way without calibration, need a rig that stands still, which ours does not.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# common before torch: it settles how threads wait
from common import MIDDLE_MCP, N_JOINTS, permutation

import hamuco

import torch
from torch import Tensor, nn

BONE = 0.09            # m from wrist to middle MCP, given to every hand: only scores without scale count


class Lifter(nn.Module):
    """Key points of a view to joints in its axes: a residual network as wide as CanonPose's."""

    def __init__(self, width: int = 1024):
        super().__init__()
        self.first = nn.Linear(3 * N_JOINTS, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(),
                                                  nn.Linear(width, width)) for _ in range(2))
        self.last = nn.Linear(width, 3 * N_JOINTS)

    def forward(self, uv: Tensor, c: Tensor) -> Tensor:
        """(..., 21, 2) of any unit, y down, confidence (..., 21) -> (..., 21, 3) of norm 1, no place."""
        x = self.first(torch.cat([normed(uv, c).flatten(-2), c], -1))
        for block in self.blocks:
            x = x + block(x)
        return normed(self.last(x).unflatten(-1, (N_JOINTS, 3)), torch.ones_like(c))

    def loss(self, batch: dict) -> Tensor:
        """Of moments, without their pictures."""
        uv, c, R = labels(batch)
        return reprojection(self(uv, c), R, uv, c)


def normed(points: Tensor, c: Tensor) -> Tensor:
    """(..., 21, n) about their mean under weights c (..., 21), their weighted square sum 1."""
    w = (c / c.sum(-1, keepdim=True).clamp(min=1e-9))[..., None]
    points = points - (w * points).sum(-2, keepdim=True)
    return points / (w * points.square()).sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-9)


def turned(X: Tensor, R: Tensor) -> Tensor:
    """Joints of all views (B, V, 21, 3) in all cameras (B, i, j, 21, 3); R (B, V, 3, 3) world to camera."""
    relative = R[:, None] @ R[:, :, None].mT                                       # (B, i, j, 3, 3)
    return X[:, :, None] @ relative.mT


def reprojection(X: Tensor, R: Tensor, uv: Tensor, c: Tensor) -> Tensor:
    """Mean distance along the axes between the labels and every view's joints seen by every camera.

    Scaled orthographic: both sides lose place and size. A joint counts by its confidence there.
    """
    c = c[:, None].expand(-1, X.shape[1], -1, -1)
    seen = normed(turned(X, R)[..., :2], c)
    error = (seen - normed(uv[:, None].expand_as(seen), c)).abs().sum(-1)
    return (c * error).sum() / c.sum()


def labels(batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """uv (B, V, 21, 2), confidence (B, V, 21), 0 where there is no label, and rotations (B, V, 3, 3)."""
    known = batch["uv_label"].isfinite().all(-1) & batch["view_ok"][..., None]
    uv = batch["uv_label"].masked_fill(~known[..., None], 0)
    return uv, batch["confidence"].nan_to_num() * known, batch["cameras"][..., :3, :3]


@torch.no_grad()
def predict(model: Lifter, batch: dict) -> dict[str, dict[str, Tensor]]:
    """Labels of moments -> rows single, and fusion, the mean of the views that are there in each camera."""
    uv, c, R = labels(batch)
    X = model(uv, c)
    ok = batch["view_ok"][:, :, None, None, None]
    fused = (turned(X, R) * ok).sum(1) / ok.sum(1).clamp(min=1)
    return {name: {"joints": joints * (BONE / (joints[..., MIDDLE_MCP, :] - joints[..., 0, :]).norm(dim=-1)
                                       )[..., None, None], "uv": batch["uv_label"]}
            for name, joints in (("single", X), ("fusion", fused))}


def train(model: nn.Module, batch: dict, epochs: int, seed: int, size: int = 64) -> list[float]:
    """On moments without pictures, `size` at a time, by the model's `loss`; its mean in each epoch."""
    optimizer = torch.optim.Adam(model.parameters())
    batch = {key: x for key, x in batch.items() if isinstance(x, Tensor) and key not in ("mask", "verts")}
    n = len(batch["uv_label"])
    steps, said = max(1, n // size), []
    for epoch in range(epochs):
        total = 0.0
        for step, rows in enumerate(permutation(n, seed, epoch).split(size)[:steps]):
            optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * (epoch + step / steps) / epochs))
            loss = model.loss({key: x[rows] for key, x in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / steps
        said.append(total)
    return said


def options(words: list[str]) -> hamuco.Config:
    """The command line as HaMuCo's options, which its moments and labels depend on."""
    parser = argparse.ArgumentParser()
    for name, kind, default in (("data", str, "synthetic"), ("samples", int, 4096), ("views", int, 4),
                                ("epochs", int, 60), ("seed", int, 0), ("image-size", int, 64),
                                ("cache", str, "cache"), ("out", str, "")):
        parser.add_argument(f"--{name}", type=kind, default=default, required=name == "out")
    args = vars(parser.parse_args(words))
    return hamuco.Config(**(args | {"data": (args["data"],)}), precision="fp32")


def make(build: Callable[[], nn.Module], name: str, cfg: hamuco.Config) -> None:
    """Train on the moments and labels that hamuco.py learns from; OUT/NAME.pt, OUT/train/config.json, scores said."""
    out = Path(cfg.out)
    data = hamuco.open_rig(cfg, "train", torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    model = build()
    for epoch, loss in enumerate(train(model, data.targets(torch.arange(len(data))), cfg.epochs, cfg.seed), 1):
        print(json.dumps({"epoch": epoch, "loss": round(loss, 5)}))
    (out / "train").mkdir(parents=True)
    torch.save(model.state_dict(), out / f"{name}.pt")
    (out / "train" / "config.json").write_text(json.dumps({"cfg": dataclasses.asdict(cfg)}) + "\n")
    from claims.measure import collaborated                # it knows this file, too
    scores = collaborated(out, "test").means
    print(", ".join(f"{key} {x}" for key, x in scores.items() if not key.startswith("mean_pose")))


if __name__ == "__main__":
    make(Lifter, "canonpose", options(sys.argv[1:]))
