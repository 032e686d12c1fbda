"""What a data set is to its readers and users: the index, which joints it means, and its frames."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import Mano, axis_angle_to_matrix, matrix_to_axis_angle

import numpy as np
import torch
from torch import Tensor

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MIRROR = np.diag([-1.0, 1.0, 1.0])                      # a left hand becomes a right one: x -> -x
# What a sample holds of an Index, and what is needed to read it; other columns are the set's own.
SAMPLE_COLUMNS = frozenset((
    "paths", "side", "id", "K", "scale", "joints", "uv", "uv_label", "confidence", "verts",
    "visible", "pose", "shape", "trans", "moment", "camera", "cameras", "dist"))


class Joints(NamedTuple):
    """Which 21 joints a data set means, where a mesh is there to take them from."""
    tips: str = "smplx"                                 # the five vertices named in common.TIPS
    regressed: bool = False                             # others from the posed mesh, not the chain


class DataSet(NamedTuple):
    """What sources/__init__.py needs to know of a data set; its own file says the rest."""
    index: Callable[..., Index]                         # (root, split, ...) -> Index
    splits: tuple[str, ...] = ("train", "val", "test")
    joints: Joints = Joints()
    scored_on_val: tuple[str, ...] = ()                 # parts whose val a paper's table is about


@dataclass
class Index:
    """One row a hand, in a fixed order, as columns; those that the data set lacks are not there.

    paths   (N,) picture below `root`, bytes    side (N,) left or right   id (N,) else the paths
    box     (N, 4) x y w h px                   K (N, 3, 3) px            scale (N,) m a unit
    joints  (N, 21, 3) m, camera frame          uv, uv_label (N, 21, 2)   confidence (N, 21)
    verts   (N, 778, 3) m                       visible (N, 21) bool
    pose    (N, 48) axis-angle, mean added      shape (N, 10)             trans (N, 3) m
    moment  (N,) what one time step shares      camera (N,) 0, 1, ...
    cameras (N, 4, 4) world to camera
    dist    (N, 8) lens distortion of the picture, OpenCV's; key points are undistorted already
    Further columns serve official scores only. All are as annotated: px of the picture, left hands
    not mirrored; box [0, 0, W, H] is the whole picture. `dropped` counts what was left out, by
    reason; `notes` are sentences that belong beside every score; `box_source` is annotated, joints,
    data set or detector.
    """
    name: str
    root: str
    columns: dict[str, np.ndarray]
    box_source: str = "data set"
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns["paths"])

    def id(self, row: int) -> str:
        """Unique name of a row."""
        return str(self.columns["id"][row]) if "id" in self.columns else self.path(row)

    def path(self, row: int) -> str:
        """Picture of a row, below root."""
        return os.fsdecode(self.columns["paths"][row])

    def take(self, rows: np.ndarray) -> Index:
        """The rows named by numbers or by a mask (N,) bool."""
        columns = {key: column[rows] for key, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns, dropped={**self.dropped},
                                   notes=[*self.notes])

    def drop(self, mask: np.ndarray, reason: str) -> Index:
        """Leave out the rows of a mask (N,) bool and count them under `reason`."""
        if not mask.any():
            return self                                   # a copy of FreiHAND's vertices is 1.2 GB
        kept = self.take(~mask)
        kept.dropped[reason] = kept.dropped.get(reason, 0) + int(mask.sum())
        return kept

    def summary(self) -> str:
        """What is in it and what was left out, to be printed with every score."""
        out = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items()) or "nothing"
        return "; ".join([f"{self.name}: {len(self)} samples, box from {self.box_source}, "
                          f"left out: {out}", *self.notes])


def unmirror(prediction: dict[str, Tensor], side: list[str]) -> dict[str, Tensor]:
    """Give left hands back: what `predict` returns, before a score or a submission is written.

    joints, verts (B[, V], N, 3), root, trans (B[, V], 3) and pose (B, 16, 3, 3) are mirrored where
    side (B,) is "left". uv stays px of the image: the inverse of the sample's `crop`, which holds
    the mirroring, takes it to the picture.
    """
    out = dict(prediction)
    left = torch.tensor([one == "left" for one in side])
    for key in {"joints", "verts", "root", "trans", "pose"} & set(prediction):
        value = prediction[key]
        D = torch.as_tensor(MIRROR, dtype=value.dtype, device=value.device)
        mirrored = D @ value @ D if key == "pose" else value @ D
        on = left.to(value.device).view(-1, *[1] * (value.dim() - 1))
        out[key] = torch.where(on, mirrored, value)
    return out


def tight_box(uv: np.ndarray) -> np.ndarray:
    """Boxes around key points: (N, J, 2) px, NaN where unknown -> (N, 4) x y w h, NaN for none."""
    low = np.where(np.isnan(uv), np.inf, uv).min(1)
    high = np.where(np.isnan(uv), -np.inf, uv).max(1)
    low, high = (np.where(np.isfinite(side), side, np.nan) for side in (low, high))
    box = np.concatenate([low + 0.5, high - low], 1)               # from pixel centres to edges
    return np.where(box[:, 2:].max(1, keepdims=True) >= 2, box, np.nan)        # a dot is no hand


def pinhole(joints: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Where cameras K (N, 3, 3) px see points (N, J, 3): (N, J, 2) px, NaN if not in front."""
    uv = joints @ K.transpose(0, 2, 1)
    z = uv[..., 2:]
    return uv[..., :2] / np.where(z > 1e-6, z, np.nan)             # nearer, px leave float32


def rest_wrists(hand: dict[str, np.ndarray], shape: np.ndarray) -> np.ndarray:
    """What MANO hands of shape (N, 10) turn about, (N, 3) m: their wrists at rest."""
    return Mano(hand, dtype=torch.float64).rest_joints(torch.tensor(shape))[:, 0].numpy()


def poses_in_cameras(hand: dict[str, np.ndarray], pose: np.ndarray, shape: np.ndarray,
                     trans: np.ndarray, cameras: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MANO's numbers of the world in each hand's camera, MANO's mean pose added.

    pose (N, 48) without the mean, shape (N, 10), trans (N, 3) m, cameras (N, 4, 4) world to camera
    in m -> pose (N, 48) with the mean, trans (N, 3) m. NaN stays NaN.
    """
    layer = Mano(hand, dtype=torch.float64)
    moved_pose = np.empty((len(pose), 48))
    moved_trans = np.empty((len(pose), 3))
    for first in range(0, len(pose), 4096):
        rows = slice(first, first + 4096)
        local = torch.tensor(pose[rows])
        R = axis_angle_to_matrix(local.unflatten(1, (16, 3)))
        R, place = layer.to_camera(R, torch.tensor(shape[rows]), torch.tensor(trans[rows]),
                                   torch.tensor(cameras[rows]))
        fingers = local[:, 3:] + layer.hands_mean
        moved_pose[rows] = torch.cat([matrix_to_axis_angle(R[:, 0]), fingers], 1).numpy()
        moved_trans[rows] = place.numpy()
    return moved_pose, moved_trans
