"""LT-Algebraic's idea as a baseline of HaMuCo (its Table 3): 2D labels triangulated by learnt confidences, without pictures.

    python tests/claims/lt_algebraic.py --data hanco=DIR --views 8 --out OUT

Learnable triangulation (Iskakov et al., ICCV 2019) weights each view's rows of the DLT by a confidence that a network gives a joint
and learns through the triangulation. There the network sees pictures and learns the 2D points, too; here it sees the labels of one
view with the detector's confidences, and only how much each of them is to be believed is learnt. HaMuCo's Table 3 has it with true 3D and
adapted "to a self-supervised manner", without saying how. Ours is self-supervised: each view in turn is held out, the others are
triangulated, and the point must be seen where the held-out label is. So no label can vouch for itself, and giving no view any weight
gains nothing. Its paper is not at hand: width, loss and schedule are ours; PLAN.md, Changes, says what was seen as they were made.
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# common before torch: it settles how threads wait
from common import N_JOINTS

import hamuco
from claims import canonpose

import torch
from torch import Tensor, nn

STEEPEST = 20.0        # slope of a triangulation's loss over its weights: of 43,008 at equal weights three had more


class Weigher(nn.Module):
    """Key points of each view by itself to how much they are to be believed beside the other views'."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * N_JOINTS, width), nn.LeakyReLU(), nn.Linear(width, width),
                                 nn.LeakyReLU(), nn.Linear(width, N_JOINTS))

    def forward(self, uv: Tensor, c: Tensor) -> Tensor:
        """(..., V, 21, 2) of any unit, confidence (..., V, 21) -> weights (..., V, 21) with sum 1 over views, 0 where c is.

        A triangulation sees only their ratios: sigmoids by themselves would all drift into the flat end.
        """
        known = c > 0
        logits = self.net(torch.cat([canonpose.normed(uv, c).flatten(-2), c], -1))
        return logits.masked_fill(~known, -1e9).softmax(-2).clamp(min=1e-4) * known

    def loss(self, batch: dict) -> Tensor:
        """Of moments, without their pictures."""
        uv, c, _ = canonpose.labels(batch)
        limit = hamuco.of_crop(hamuco.RANSAC_PX, batch["side_px"] * hamuco.CROP / hamuco.MARGIN)
        return held_out(self(uv, c), uv, c, cameras_of(batch), limit)


def cameras_of(batch: dict) -> Tensor:
    """P (B, V, 3, 4), 0 where there is no view: a gradient through NaN would be NaN, its weight 0 or not."""
    P = hamuco.projections(batch["K"], batch["cameras"])
    return torch.where(batch["view_ok"][..., None, None], P, 0)


def tamed(gradient: Tensor, most: Tensor) -> Tensor:
    """Gradients by the weights of triangulations (n, V), none longer than `most` (n,), 0 where not finite.

    Where the two smallest singular values are near each other, the point moves without bound as a weight changes, and where
    they are equal its derivative is no number: one such joint would outweigh, or spoil, all others.
    """
    gradient = gradient.masked_fill(~gradient.isfinite().all(-1, keepdim=True), 0)
    return gradient * (most[:, None] / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def held_out(weight: Tensor, uv: Tensor, c: Tensor, P: Tensor, limit: Tensor) -> Tensor:
    """How far each label is from the weighted triangulation of the other views' labels, by their P.

    weight, c (B, V, 21), uv (B, V, 21, 2), P (B, V, 3, 4), limit (B,) px. The mean of log(1 + (px / limit)^2): beyond the
    limit a label is astray, and pulls the less the farther it is. A label counts by the detector's confidence, as in
    HaMuCo's L_2D, and where two other views have the joint.
    """
    weight, c, uv = weight.mT, c.mT, uv.transpose(1, 2)                                      # (B, 21, V, ...)
    others = ~torch.eye(weight.shape[-1], dtype=torch.bool, device=weight.device)
    enough = (c > 0) & (((c > 0)[..., None, :] & others).sum(-1) > 1)
    b, joint, view = enough.nonzero().unbind(1)                                              # n triangulations
    share = c[b, joint, view] / c[enough].sum()
    used = weight[b, joint] * others[view]
    if used.requires_grad:
        used.register_hook(lambda gradient: tamed(gradient, STEEPEST * share))
    X = hamuco.triangulate(uv[b, joint], P[b], used)
    error = hamuco.reproject(X, P[b, view][:, None])[:, 0] - uv[b, joint, view]
    return (share * (error.square().sum(-1) / limit[b].square()).log1p()).sum()


@torch.no_grad()
def predict(model: Weigher, batch: dict) -> dict[str, dict[str, Tensor]]:
    """Labels of moments -> the row dlt_learnt, in camera frames, NaN where fewer than two views have a joint."""
    uv, c, _ = canonpose.labels(batch)
    X = hamuco.triangulate(uv.transpose(1, 2), cameras_of(batch)[:, None], model(uv, c).mT)
    return {"dlt_learnt": hamuco.in_camera(hamuco.to_cameras(X, batch["cameras"]), batch["K"])}


def options(words: list[str]) -> hamuco.Config:
    """CanonPose's command line; with two views nothing triangulates once one is held out."""
    cfg = canonpose.options(words)
    if 0 < cfg.views < 3:
        raise SystemExit("--views must be 3 or more: each view in turn is held out, and two others triangulate")
    return cfg


if __name__ == "__main__":
    canonpose.make(Weigher, "lt_algebraic", options(sys.argv[1:]))
