"""The file that the servers of FreiHAND and HO3D read."""
from __future__ import annotations

import json
import zipfile
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_VERTS, UserError, say
from sources.index import Index

import torch
from torch import Tensor


def every_sample(index: Index) -> None:
    """UserError where samples are missing: servers count entries, and tell none from another."""
    entry = index.columns["image_id"].tolist()
    if not entry or entry != list(range(len(entry))) or index.dropped:
        raise UserError(f"--submit: {index.summary()}; the server wants every sample of the "
                        "evaluation in its order, so nothing was written")


def write_submission(path: Path, joints: Tensor, verts: Tensor | None) -> Path:
    """pred.zip with pred.json, [(N, 21, 3), (N, 778, 3)] m, in the axes and order of the data set.

    Without a mesh the server still wants vertices: zeros, so its mesh scores mean nothing then.
    """
    if not joints.isfinite().all():
        lost = int((~joints.isfinite()).flatten(1).any(1).sum())
        raise UserError(f"--submit: {lost} hands have no place in the camera frame: the network "
                        "gives no root, no 2D, and the data set no wrist")
    verts = torch.zeros(len(joints), N_VERTS, 3) if verts is None else verts
    content = [[[[round(x, 5) for x in point] for point in hand] for hand in part.tolist()]
               for part in (joints, verts)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pred.json", json.dumps(content))
    say(f"wrote {path}: {len(joints):,} hands"
        + ", vertices zero: this network has no mesh" * (not verts.any()))
    return path
