"""The index: mirroring back, frames."""

import numpy as np
import torch

from sources.index import unmirror
from trees import GOLDEN


def test_mirrored_pose_equals_golden():
    from common import mirror_pose
    mirrored = mirror_pose(torch.tensor(GOLDEN["mirror_aa"]).flatten()).reshape(16, 3)
    assert np.abs(mirrored.numpy() - GOLDEN["mirror_aa_flipped"]).max() < 1e-12


def test_unmirror_gives_left_hands_back_and_leaves_right_ones():
    R = torch.linalg.qr(torch.randn(2, 16, 3, 3, dtype=torch.float64))[0]
    given = {"joints": torch.randn(2, 21, 3), "verts": torch.randn(2, 4, 778, 3),
             "root": torch.randn(2, 3), "pose": R, "uv": torch.randn(2, 21, 2),
             "shape": torch.randn(2, 10)}
    out = unmirror(given, ["left", "right"])
    for key in ("joints", "verts", "root"):
        assert torch.equal(out[key][0], given[key][0] * torch.tensor([-1.0, 1, 1]))
        assert torch.equal(out[key][1], given[key][1])
    assert torch.equal(out["uv"], given["uv"]) and torch.equal(out["shape"], given["shape"])
    flipped = torch.tensor([[1, -1, -1], [-1, 1, 1], [-1, 1, 1.0]]).double()
    assert torch.equal(out["pose"][0], R[0] * flipped) and torch.equal(out["pose"][1], R[1])
