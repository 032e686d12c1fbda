"""The ground floor: what two or more of the four papers need and none of them claims.

Contents, in the order of the banners below
    Transforms      batched 3x3 pixel matrices, one warp, points, the pinhole camera
    Draws           random numbers that are functions of what they are drawn for
    MANO            rotations, and the hand model in NumPy and in Torch
    Augmentation    photometric changes on the device, in batches
    Back-bones      ResNets and ViTs with the parameter names of torchvision and timm; their weights
    Metrics         joint, vertex, 2D and area-under-curve scores, batched, in float64
    Run             options that carry the paper's value, folders, logs, checkpoints, processes

Conventions, fixed here once
    Metres and pixels inside, millimetres in reports. Camera frame: x right, y down, z forward.
    Pixel centres are integers: the centre of a picture W wide is (W - 1) / 2, and resizing by s
    maps x to (x + 0.5) s - 0.5. Positive angles turn counter-clockwise on the screen: 90 degrees
    takes the point 10 px right of the centre to 10 px above it.
    21 joints: wrist, then thumb, index, middle, ring, pinky, each from base to tip.
    Shapes: B batch, V views, J = 21 joints, M = 778 vertices, H and W pixels.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import os
import signal
import sys
import time
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

# Threads that spin for long while another program holds a core run six times slower than threads
# that soon sleep. This must be said before torch is loaded, so scripts import this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.efficientnet import MBConv
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `main` prints its one sentence and exits with code 2."""


N_JOINTS = 21
N_VERTS = 778
ROOT = 0                                                     # the wrist
MIDDLE_MCP = 9
FINGERS = ("thumb", "index", "middle", "ring", "pinky")


# ---- Transforms ----------------------------------------------------------------------------------
# A transform is a batch of 3x3 matrices that take source pixels to output pixels. They compose with
# @, the right factor applied first, and the same matrix moves the picture, the points and K.


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """Stack nine tensors of shape (B,) into (B, 3, 3)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def centre(size: int | tuple[int, int]) -> tuple[float, float]:
    """Middle of a picture in px, (x, y), of a side or of (width, height): (W - 1) / 2."""
    width, height = (size, size) if isinstance(size, int) else size
    return (width - 1) / 2, (height - 1) / 2


def rotation(angle: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(B,) rad -> (B, 3, 3): turn counter-clockwise on the screen about the picture's centre."""
    x, y = centre(size)
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _matrix([[c, s, x - c * x - s * y], [-s, c, y + s * x - c * y], [zero, zero, zero + 1]])


def flip(on: Tensor, width: int) -> Tensor:
    """(B,) bool or 0/1 -> (B, 3, 3): x to W - 1 - x where `on`, else the identity."""
    on = on.to(torch.get_default_dtype()) if not on.is_floating_point() else on
    zero, one = torch.zeros_like(on), torch.ones_like(on)
    return _matrix([[1 - 2 * on, zero, on * (width - 1)], [zero, one, zero], [zero, zero, one]])


def scale(factor: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(B,) -> (B, 3, 3): enlarge by `factor` about the picture's centre."""
    x, y = centre(size)
    zero, one = torch.zeros_like(factor), torch.ones_like(factor)
    return _matrix([[factor, zero, x * (1 - factor)], [zero, factor, y * (1 - factor)],
                    [zero, zero, one]])


def translation(shift: Tensor) -> Tensor:
    """(B, 2) px -> (B, 3, 3)."""
    zero, one = torch.zeros_like(shift[..., 0]), torch.ones_like(shift[..., 0])
    return _matrix([[one, zero, shift[..., 0]], [zero, one, shift[..., 1]], [zero, zero, one]])


def crop(middle: Tensor, side: Tensor, size: int) -> Tensor:
    """Square crop, resized: (B, 2) px and (B,) px -> (B, 3, 3) onto a picture `size` px wide.

    The square of `side` px around `middle` fills the output: middle goes to (size - 1) / 2.
    """
    s = size / side
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    shift = (size - 1) / 2 - s[..., None] * middle
    return _matrix([[s, zero, shift[..., 0]], [zero, s, shift[..., 1]], [zero, zero, one]])


def transform(A: Tensor, points: Tensor) -> Tensor:
    """Move points as `warp` moves the picture: (..., 3, 3), (..., N, 2) px -> (..., N, 2) px."""
    # It is no matrix product, because autocast would make that in bfloat16, pixels off.
    return (A[..., None, :2, :2] * points[..., None, :]).sum(-1) + A[..., None, :2, 2]


def rotate_z(angle: Tensor, points: Tensor) -> Tensor:
    """3D points under the in-plane rotation: (B,) rad, (B, N, 3) -> (B, N, 3), about the z axis."""
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    x, y, z = points.unbind(-1)
    return torch.stack([c * x + s * y, c * y - s * x, z], -1)


def invert(A: Tensor) -> Tensor:
    """Inverse of affine transforms, (..., 3, 3); closed form: a sample's bits ignore its batch."""
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in A[..., :2, :].unbind(-2))
    det = a * d - b * c
    zero = torch.zeros_like(a)
    a, b, c, d = d / det, -b / det, -c / det, a / det
    return _matrix([[a, b, -a * x - b * y], [c, d, -c * x - d * y], [zero, zero, zero + 1]])


def warp(images: Tensor, A: Tensor, size: int, samples: int = 1) -> Tensor:
    """Move pictures by A: (B, C, H, W), (B, 3, 3) source to output px -> (B, C, size, size).

    With A of shape (B, P, 3, 3) each source gives P views: -> (B, P, C, size, size).
    One bilinear read of each source, black outside it, differentiable in both arguments. The grid
    is float32 also for half-precision pictures (a bfloat16 grid is a pixel off at 224). `samples`
    reads per output pixel and axis are averaged: 2 where A shrinks by up to two, against aliasing.
    """
    if A.ndim == 3:
        return warp(images, A[:, None], size, samples)[:, 0]
    B, C, height, width = images.shape
    P, n = A.shape[1], size * samples
    back = invert(A.to(torch.promote_types(A.dtype, torch.float32)))        # output px -> source px
    step = (torch.arange(n, device=images.device, dtype=back.dtype) + 0.5) / samples - 0.5
    y, x = torch.meshgrid(step, step, indexing="ij")
    axes = []
    for row, side in zip(back[..., :2, :, None, None].unbind(2), (width, height)):
        at = row[..., 0, :, :] * x + row[..., 1, :, :] * y + row[..., 2, :, :]     # (B, P, n, n) px
        axes.append((2 * at + 1) / side - 1)               # in the units of grid_sample
    grid = torch.stack(axes, -1).view(B, P * n, n, 2).nan_to_num(3.0).clamp(-3, 3)     # 3: outside
    with torch.autocast(images.device.type, enabled=False):
        out = F.grid_sample(images.to(back.dtype), grid, align_corners=False)
    out = F.avg_pool2d(out, samples) if samples > 1 else out
    out = out.view(B, C, P, size, size).transpose(1, 2)
    return out.to(images.dtype) if images.is_floating_point() else out


def project(points: Tensor, K: Tensor) -> Tensor:
    """Camera-frame points to pixels: (..., N, 3) m, (..., 3, 3) px -> (..., N, 2) px; no skew."""
    focal = torch.stack([K[..., 0, 0], K[..., 1, 1]], -1)[..., None, :]
    return points[..., :2] / points[..., 2:] * focal + K[..., None, :2, 2]


def place(points: Tensor, uv: Tensor, K: Tensor) -> Tensor:
    """Where a hand must stand to be seen at uv: (B, N, 3) m, (B, N, 2) px, (B, 3, 3) -> (B, 3) m.

    Least squares on f (X + t) = (uv - c) (Z + t_z), linear in t. NaN key points do not count.
    """
    focal = torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)
    ray = (uv - K[:, None, :2, 2]) / focal[:, None]
    zero, one = torch.zeros_like(ray[..., 0]), torch.ones_like(ray[..., 0])
    A = torch.cat([torch.stack([one, zero, -ray[..., 0]], -1),
                   torch.stack([zero, one, -ray[..., 1]], -1)], 1)                   # (B, 2 N, 3)
    b = (ray * points[..., 2:] - points[..., :2]).mT.flatten(1)
    known = uv.isfinite().all(-1).repeat(1, 2) & b.isfinite()
    A, b = torch.where(known[..., None], A, 0), torch.where(known, b, 0)
    shift = torch.linalg.lstsq(A.cpu().double(), b.cpu().double()[..., None]).solution[..., 0]
    return shift.to(points)


def view_intrinsics(batch: dict) -> Tensor:
    """K of the stored pictures, (B, 3, 3) px; where unknown, the focal length is the diagonal."""
    side = batch["image"].shape[-1]
    f, c = math.sqrt(2) * side, (side - 1) / 2
    guess = f * torch.eye(3, device=batch["K"].device)
    guess[:2, 2] = c
    guess[2, 2] = 1
    known = batch["K"].isfinite().flatten(1).all(1)
    return torch.where(known[:, None, None], batch["K"], guess)


# ---- Draws ---------------------------------------------------------------------------------------
# Every random number is a pure function of (seed, purpose, epoch, view, sample, column), so no
# state is saved and a sample is the same whatever the batch, the worker, the rank or the device.


def _i64(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (Steele, Lea and Flood 2014); shifts are logical."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _i64(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def bits(index: Tensor, n: int, seed: int, purpose: str, epoch: int = 0, view: int = 0) -> Tensor:
    """Random int64 of samples `index` (B,) -> (B, n): a pure function of all its arguments.

    `purpose` names the stream ("rotation", "crop"), so two draws never share numbers by accident.
    """
    key = seed * 0xD1342543DE82EF95 + zlib.crc32(purpose.encode()) * 0xA0761D6478BD642F
    key += epoch * 0xE7037ED1A0B428DB + view * 0x8EBC6AF09C88C6E3
    state = _mix(index.long() * _i64(0x9E3779B97F4A7C15) + _i64(key))
    column = torch.arange(1, n + 1, device=index.device) * _i64(0x9E3779B97F4A7C15)
    return _mix(state[:, None] + column)


def uniform(index: Tensor, n: int, seed: int, purpose: str, epoch: int = 0,
            view: int = 0) -> Tensor:
    """Uniform draws in [0, 1), float32 with 24 exact bits: (B,) -> (B, n). See `bits`."""
    return ((bits(index, n, seed, purpose, epoch, view) >> 40) & 0xFFFFFF).float() * 2.0 ** -24


def normal(index: Tensor, n: int, seed: int, purpose: str, epoch: int = 0, view: int = 0) -> Tensor:
    """Nearly normal draws, float32: (B,) -> (B, n): sums of twelve uniforms, never beyond 6 sigma.

    Sums of 16-bit integers are exact, so the bits agree on every device; a logarithm's would not.
    """
    words = bits(index, 3 * n, seed, purpose, epoch, view).view(len(index), n, 3)
    total = sum((words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)).sum(-1)
    return (total - 6 * 65535).float() * 2.0 ** -16


def permutation(n: int, seed: int, epoch: int = 0) -> Tensor:
    """Order of n samples in an epoch: (n,) int64, the same on every rank."""
    return bits(torch.arange(n), 1, seed, "order", epoch)[:, 0].argsort(stable=True)


# ---- MANO ----------------------------------------------------------------------------------------
# The hand model of Romero, Tzionas and Black (SIGGRAPH Asia 2017): 16 rotations and 10 shape
# numbers to 778 vertices. Metres, no hidden centring. MANO's own joint order is wrist, index 1-3,
# middle, pinky, ring, thumb; ours stands in this file's docstring.

MANO_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
# ours[i] = (MANO's 16 joints, then the five tips thumb to pinky)[MANO_TO_OURS[i]]
MANO_TO_OURS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
# MANO has no tip joints: each project picks its vertices, thumb to pinky, millimetres apart.
TIPS = {
    "smplx": (744, 320, 443, 554, 671),          # also HaMeR, HOT3D, YouTube3DHands; our default
    "manopth": (745, 317, 444, 556, 673),        # also manotorch, DexYCB
    "manopth_left": (745, 317, 445, 556, 673),
    "freihand": (744, 320, 443, 555, 672),       # with joints regressed from the mesh: Mano.regress
    "ho3d": (744, 333, 444, 555, 672),           # also HandMesh
    "graphormer": (745, 317, 445, 556, 673),     # also METRO and HaMuCo, regressed
    "contactpose": (745, 333, 444, 555, 672),
}


def mirror_pose(pose: Tensor) -> Tensor:
    """Axis-angle of the mirrored hand: (..., 3k) rad -> (..., 3k), (x, y, z) to (x, -y, -z)."""
    return (pose.unflatten(-1, (-1, 3)) * pose.new_tensor([1, -1, -1])).flatten(-2)


# Rotations, all (..., 3, 3) and at least float32, also inside autocast.


def _at_least_float32(x: Tensor) -> Tensor:
    """The same numbers, in float32 where they have fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def axis_angle_to_matrix(v: Tensor) -> Tensor:
    """Rodrigues: (..., 3) rad -> (..., 3, 3) = cos t I + a [v]x + b v v^T, t the length of v.

    a = sin t / t and b = (1 - cos t) / t^2 by the half angle, which keeps float32 gradients exact;
    below t = 0.01 their series, so values and two derivatives are right at zero too.
    """
    v = _at_least_float32(v)
    t2 = (v * v).sum(-1)
    small = t2 < 1e-4
    t = torch.where(small, 1.0, t2).sqrt()                   # never 0, or `where` passes on its NaN
    half = t / 2
    h = half.sin() / t
    a = torch.where(small, 1 + t2 * (t2 / 120 - 1 / 6), 2 * h * half.cos())
    b = torch.where(small, 0.5 + t2 * (t2 / 720 - 1 / 24), 2 * h * h)
    x, y, z = v.unbind(-1)
    c = 1 - b * t2
    ax, ay, az = a * x, a * y, a * z
    bx, by, bz = b * x, b * y, b * z
    xy, xz, yz = bx * y, bx * z, by * z
    return torch.stack([c + bx * x, xy - az, xz + ay, xy + az, c + by * y, yz - ax,
                        xz - ay, yz + ax, c + bz * z], -1).unflatten(-1, (3, 3))


def matrix_to_axis_angle(R: Tensor) -> Tensor:
    """(..., 3, 3) rotations -> (..., 3) rad, angle in [0, pi]; gradients are finite at zero too.

    With q the unit quaternion, 4 q q^T is linear in R; its row of largest diagonal is q up to a
    positive factor and a sign, without a division by anything small.
    """
    R = _at_least_float32(R)
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    rows = torch.stack([1 + a + e + i, h - f, c - g, d - b, h - f, 1 + a - e - i, b + d, c + g,
                        c - g, b + d, 1 - a + e - i, f + h, d - b, c + g, f + h, 1 - a - e + i], -1)
    best = rows[..., ::5].argmax(-1)[..., None, None].expand(*R.shape[:-2], 1, 4)
    q = F.normalize(rows.unflatten(-1, (4, 4)).gather(-2, best)[..., 0, :], dim=-1)    # w, x, y, z
    q = torch.where(q[..., :1] < 0, -q, q)
    w, xyz = q[..., 0], q[..., 1:]
    n2 = (xyz * xyz).sum(-1)
    small = n2 < 1e-4
    n = torch.where(small, torch.ones_like(n2), n2).sqrt()
    near_1 = torch.where(small, w, torch.ones_like(w))
    r2 = n2 / near_1 ** 2                                    # tan^2 of half the angle
    series = 2 * (1 - r2 * (1 / 3 - r2 * (1 / 5 - r2 / 7))) / near_1
    return torch.where(small, series, 2 * torch.atan2(n, w) / n)[..., None] * xyz


def six_d_to_matrix(x: Tensor) -> Tensor:
    """6D rotations (Zhou et al. 2019), interleaved: (..., 6) read as (..., 3, 2) -> (..., 3, 3).

    Gram-Schmidt on the two columns, the third is their cross product. The six numbers are those of
    the matrix's first two columns, row by row (SPIN, HaMuCo), not one column after the other.
    """
    a, b = _at_least_float32(x).unflatten(-1, (3, 2)).unbind(-1)
    first = F.normalize(a, dim=-1)
    second = F.normalize(b - (first * b).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def matrix_to_six_d(R: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 6), the inverse of `six_d_to_matrix`."""
    return R[..., :2].flatten(-2)


def mano_numpy(params: dict[str, np.ndarray], R: np.ndarray, shape: np.ndarray,
               trans: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The model step by step, in float64: the text `Mano` is to be read beside, and its oracle.

    R (B, 16, 3, 3), shape (B, 10), trans (B, 3) m -> vertices (B, 778, 3) m and the 16 joints of
    the kinematic chain (B, 16, 3) m in MANO's order. R[:, 0] turns the hand about its rest wrist.
    """
    R = np.asarray(R, np.float64)
    shape = np.broadcast_to(np.asarray(shape, np.float64), (len(R), 10))
    parents = params["kintree_table"][0]
    # Rest shape, and its joints before any pose corrective.
    shaped = params["v_template"] + np.einsum("vcl,bl->bvc", params["shapedirs"], shape)
    J = np.einsum("jv,bvc->bjc", params["J_regressor"], shaped)
    # Pose correctives: linear in how far the 15 finger rotations are from the flat hand.
    feature = (R[:, 1:] - np.eye(3)).reshape(-1, 135)
    posed = shaped + np.einsum("vcl,bl->bvc", params["posedirs"], feature)
    # Down the chain: rotation G and place t of every joint.
    G, t = R.copy(), J.copy()
    for j in range(1, 16):
        p = parents[j]
        G[:, j] = G[:, p] @ R[:, j]
        t[:, j] = t[:, p] + np.einsum("bac,bc->ba", G[:, p], J[:, j] - J[:, p])
    # Skinning: each vertex follows its joints, x -> G (x - J) + t, blended by its weights.
    offset = t - np.einsum("bjac,bjc->bja", G, J)
    verts = np.einsum("vj,bjac,bvc->bva", params["weights"], G, posed, optimize=True)
    verts += np.einsum("vj,bja->bva", params["weights"], offset)
    move = 0 if trans is None else np.asarray(trans, np.float64)[:, None]
    return verts + move, t + move


class Mano(nn.Module):
    """The hand model in Torch, differentiable in everything; same maths as `mano_numpy`.

    `params` from `load_mano` or `builtin_hand`; `tips` a name in TIPS or five vertices, thumb to
    pinky. `regressed`: its other joints are regressed from the posed mesh (see `regress`) instead
    of taken from the kinematic chain. Works in `dtype` whatever the inputs are, also under autocast
    (float16 is NaN at the flat hand in common layers). The arrays stay out of state_dict: MANO's
    may not be passed on with a checkpoint.
    """

    def __init__(self, params: dict[str, np.ndarray], tips: str | tuple[int, ...] = "smplx",
                 dtype: torch.dtype = torch.float32, regressed: bool = False):
        super().__init__()
        self.regressed = regressed
        if isinstance(tips, str) and tips not in TIPS:
            raise UserError(f"unknown finger tips {tips!r}; known: {', '.join(TIPS)}")
        tips = list(TIPS[tips] if isinstance(tips, str) else tips)

        def keep(name: str, array: np.ndarray) -> None:
            value = torch.tensor(np.ascontiguousarray(array))
            value = value.to(dtype) if value.is_floating_point() else value
            self.register_buffer(name, value, persistent=False)

        # Mesh arrays are coordinate-major, (..., 3, N): skinning then reads memory in order.
        template, regressor = params["v_template"], params["J_regressor"]
        basis = np.concatenate([params["shapedirs"], params["posedirs"]], 2).T       # (145, 3, 778)
        for name, part in (("", slice(None)), ("tip_", tips)):
            keep(name + "template", template.T[:, part].reshape(-1))
            keep(name + "basis", basis[:, :, part].reshape(145, -1))
            keep(name + "weights", params["weights"].T[:, part])
        keep("joint_template", (regressor @ template).reshape(48))
        keep("joint_basis",
             np.einsum("jv,vcl->ljc", regressor, params["shapedirs"]).reshape(10, 48))
        keep("regressor", regressor)
        keep("hands_mean", params["hands_mean"])
        keep("hands_components", params["hands_components"])
        keep("faces", params["f"])
        keep("tips", np.array(tips))
        keep("order", np.array(MANO_TO_OURS))
        keep("parents", np.array(MANO_PARENTS[1:]))
        keep("eye", np.eye(3))
        keep("last_row", np.array([0.0, 0.0, 0.0, 1.0]))

    def forward(self, R: Tensor, shape: Tensor,
                trans: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """R (B, 16, 3, 3), shape (B, 10) or (1, 10), trans (B, 3) m -> vertices, joints.

        Vertices (B, 778, 3) m, a transposed view (reshape it, not view); joints (B, 21, 3) m, ours:
        the kinematic chain (or those regressed) and the tip vertices. UserError for other shapes.
        The chain's wrist lands on `rest_joints(shape)[:, 0] + trans` whatever R is, so trans is not
        the wrist.
        """
        verts, chain = self._pose(R, shape, trans, self.template, self.basis, self.weights)
        if self.regressed:
            return verts, self.regress(verts)
        tips = verts.mT.index_select(2, self.tips).mT        # along memory, see _pose
        return verts, self._ours(chain, tips)

    def joints(self, R: Tensor, shape: Tensor, trans: Tensor | None = None) -> Tensor:
        """The joints of `forward`, (B, 21, 3) m; without the mesh where none is regressed."""
        return self(R, shape, trans)[1] if self.regressed else self.chain_joints(R, shape, trans)

    def chain_joints(self, R: Tensor, shape: Tensor, trans: Tensor | None = None) -> Tensor:
        """The chain's joints, (B, 21, 3) m, without the mesh but for its five tip vertices."""
        tips, chain = self._pose(R, shape, trans,
                                 self.tip_template, self.tip_basis, self.tip_weights)
        return self._ours(chain, tips)

    def regress(self, verts: Tensor) -> Tensor:
        """Joints as FreiHAND defines them: (B, 778, 3) posed mesh, any unit -> (B, 21, 3), ours.

        The rest pose's regressor on the posed mesh lies some 2-3 mm from the chain's joints.
        """
        with torch.autocast(verts.device.type, enabled=False):
            verts = verts.to(self.regressor.dtype)
            return self._ours(self.regressor @ verts, verts.index_select(1, self.tips))

    def rest_joints(self, shape: Tensor) -> Tensor:
        """Joints before any rotation: (B, 10) -> (B, 16, 3) m, MANO's order. R[:, 0] turns about 0.
        """
        with torch.autocast(shape.device.type, enabled=False):
            shape = shape.to(self.joint_basis.dtype)
            return torch.addmm(self.joint_template, shape, self.joint_basis).view(-1, 16, 3)

    def to_camera(self, R: Tensor, shape: Tensor, trans: Tensor,
                  M: Tensor) -> tuple[Tensor, Tensor]:
        """The same hand in another frame: inputs as in `forward`, M (B, 4, 4) in m -> R, trans.

        The hand turns about its rest wrist and not about the origin, which trans makes up for.
        """
        R, shape, trans = self._inputs(R, shape, trans)
        with torch.autocast(R.device.type, enabled=False):
            M = M.to(R.dtype)
            wrist = self.rest_joints(shape)[:, 0]
            trans = (M[:, :3, :3] @ (wrist + trans)[..., None])[..., 0] + M[:, :3, 3] - wrist
            return torch.cat([M[:, None, :3, :3] @ R[:, :1], R[:, 1:]], 1), trans

    def full_pose(self, pose: Tensor, *, flat_hand_mean: bool, pca: int | None = None) -> Tensor:
        """Axis-angle of all 16 joints, (B, 48) rad, from the many ways in which poses are stored.

        pose (B, 48): wrist, then 45 axis-angle numbers; with `pca=n` (B, 3 + n): wrist, then n PCA
        coefficients. pca=45 is 45 coefficients (manopth, DexYCB), not "off" (smplx). With
        flat_hand_mean=False the mean hand is added to the fingers, never to the wrist. FreiHAND,
        DexYCB and InterHand2.6M need False, HO3D True; our samples' pose has the mean in it: True.
        """
        width = 48 if pca is None else 3 + pca
        if pca is not None and not 1 <= pca <= 45:
            raise UserError(f"pca={pca}: a hand has 1 to 45 PCA coefficients; None is axis-angle")
        if pose.ndim != 2 or pose.shape[1] != width:
            raise UserError(f"pose is {tuple(pose.shape)}, but pca={pca} (flat_hand_mean="
                            f"{flat_hand_mean}) wants (B, {width}): 3 numbers for the wrist, then "
                            "45 of axis-angle (pca=None) or n PCA coefficients (pca=n)")
        with torch.autocast(pose.device.type, enabled=False):
            wrist, hand = pose.to(self.hands_mean.dtype).split([3, width - 3], 1)
            hand = hand if pca is None else hand @ self.hands_components[:pca]
            return torch.cat([wrist, hand if flat_hand_mean else hand + self.hands_mean], 1)

    def _pose(self, R: Tensor, shape: Tensor, trans: Tensor | None, template: Tensor, basis: Tensor,
              weights: Tensor) -> tuple[Tensor, Tensor]:
        """Pose the N vertices of template (3N,), basis (145, 3N) and weights (16, N).

        Returns the vertices (B, N, 3) and the 16 joints of the chain (B, 16, 3), MANO's order.
        """
        R, shape, trans = self._inputs(R, shape, trans)
        with torch.autocast(R.device.type, enabled=False):
            J = self.rest_joints(shape)
            placed = self._chain(R, J)
            G, t = placed[..., :3, :3], placed[..., :3, 3]
            # Shape and pose blend shapes in one product; the wrist has no correctives.
            coefficients = torch.cat([shape, (R[:, 1:] - self.eye).flatten(1)], 1)     # (B, 145)
            rest = torch.addmm(template, coefficients, basis).unflatten(1, (3, -1))    # (B, 3, N)
            offset = t[..., None] - G @ J[..., None]
            A = torch.cat([G, offset], -1).permute(0, 2, 3, 1).contiguous()    # (B, 3, 4, 16)
            # Skinning: every vertex by its own blend of the 16 transforms, one column at a time.
            along_x, along_y, along_z, away = (A @ weights).unbind(2)          # (B, 3, N) each
            x, y, z = rest[:, None].unbind(2)                                   # (B, 1, N) each
            verts = away.addcmul(along_x, x).addcmul(along_y, y).addcmul(along_z, z).mT
        return (verts, t) if trans is None else (verts + trans[:, None], t + trans[:, None])

    def _inputs(self, R: Tensor, shape: Tensor, trans: Tensor | None) -> list[Tensor | None]:
        """Check the shapes, give a lone shape or trans to all hands, go to the layer's dtype."""
        if R.ndim != 4 or R.shape[1:] != (16, 3, 3):
            raise UserError(f"MANO wants rotation matrices (B, 16, 3, 3), not {tuple(R.shape)}; "
                            "from axis-angle or PCA numbers, flat or around the mean, make them by "
                            "axis_angle_to_matrix(mano.full_pose(...).unflatten(1, (16, 3)))")
        given = [R.to(self.basis.dtype)]
        for name, value, width in (("shape", shape, 10), ("trans", trans, 3)):
            if value is not None and tuple(value.shape) not in ((len(R), width), (1, width)):
                raise UserError(f"MANO wants {name} ({len(R)}, {width}) or (1, {width}) for "
                                f"{len(R)} hands, not {tuple(value.shape)}")
            given.append(None if value is None else value.to(self.basis.dtype).expand(len(R), -1))
        return given

    def _ours(self, joints: Tensor, tips: Tensor) -> Tensor:
        """MANO's 16 joints and 5 tips, (B, 16 and 5, 3) -> (B, 21, 3) in our order."""
        return torch.cat([joints, tips], 1).index_select(1, self.order)

    def _chain(self, R: Tensor, J: Tensor) -> Tensor:
        """Rotations R, rest places J of the 16 joints -> (B, 16, 4, 4), where each one ends up."""
        bone = torch.cat([J[:, :1], J[:, 1:] - J.index_select(1, self.parents)], 1)
        local = torch.cat([R, bone[..., None]], -1)          # (B, 16, 3, 4), in the parent's frame
        local = torch.cat([local, self.last_row.expand(len(R), 16, 1, 4)], -2)
        fingers = local[:, 1:].unflatten(1, (5, 3))          # five fingers side by side
        base = local[:, :1] @ fingers[:, :, 0]
        middle = base @ fingers[:, :, 1]
        last = middle @ fingers[:, :, 2]
        return torch.cat([local[:, :1], torch.stack([base, middle, last], 2).flatten(1, 2)], 1)


# ---- Augmentation --------------------------------------------------------------------------------
# What changes how a picture looks and not where things are: batches on the device, float pictures
# in 0..1, every sample by its own parameters, which the caller draws. And what networks are given.

LUMA = (0.299, 0.587, 0.114)                                             # ITU-R 601, as torchvision
IMAGE_MEAN = (0.485, 0.456, 0.406)                           # of ImageNet, as torchvision
IMAGE_STD = (0.229, 0.224, 0.225)


@functools.cache
def _made(numbers: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, device=device, dtype=dtype)


def constant(numbers: tuple, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Fixed numbers, nested as given: made once a device, for a GPU waits for each copy to it."""
    return _made(numbers, device, dtype or torch.get_default_dtype())


def normalise(images: Tensor) -> Tensor:
    """uint8 or 0..255 float pictures (B, 3, H, W) -> zero mean, unit variance over ImageNet."""
    mean, std = (constant(x, images.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Back to 0..1, clipped, for drawings: (..., 3, H, W) -> the same."""
    mean, std = (constant(x, images.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() * std + mean).clamp(0, 1)


def _luma(images: Tensor) -> Tensor:
    """Brightness as the eye weighs it: (B, 3, H, W) -> (B, 1, H, W)."""
    weights = constant(LUMA, images.device, images.dtype)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def rgb_to_hsv(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> hue in turns, saturation, value, each in 0..1; grey has hue 0."""
    r, g, b = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    d = chroma.clamp(min=1e-6)
    hue = torch.where(value == g, 2 + (b - r) / d, 4 + (r - g) / d)
    hue = torch.where(value == r, (g - b) / d % 6, hue)
    return torch.stack([hue / 6, chroma / value.clamp(min=1e-6), value], 1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv`, of any hue: it counts modulo a turn."""
    hue, saturation, value = (x[:, None] for x in hsv.unbind(1))
    offset = constant((5, 3, 1), hsv.device, hsv.dtype)[:, None, None]
    k = (offset + 6 * hue) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def jitter_colour(images: Tensor, factors: Tensor) -> Tensor:
    """Change (B, 3, H, W) by factors (B, 4): brightness, contrast, saturation, then hue in turns.

    1, 1, 1 and 0 change nothing. As torchvision's ColorJitter, in this fixed order; contrast pivots
    on the picture's mean luma.
    """
    factors = factors.to(images.dtype)[..., None, None, None]
    brightness, contrast, saturation, hue = factors.unbind(1)
    x = (images * brightness).clamp(0, 1)
    x = torch.lerp(_luma(x).mean((2, 3), keepdim=True).expand_as(x), x, contrast).clamp(0, 1)
    x = rgb_to_hsv(torch.lerp(_luma(x).expand_as(x), x, saturation).clamp(0, 1))
    return hsv_to_rgb(torch.cat([x[:, :1] + hue, x[:, 1:]], 1))


def to_grey(images: Tensor, on: Tensor) -> Tensor:
    """Without colour where `on` (B,) bool."""
    return torch.where(on[:, None, None, None], _luma(images), images)


def blur(images: Tensor, sigma: Tensor, reach: int = 6) -> Tensor:
    """Gaussian blur of (B, 3, H, W), each by its own sigma (B,) px, 0 for none; edges repeat.

    The kernel ends `reach` px from its middle; 6 px serve a sigma of up to 2.
    """
    B, C, H, W = images.shape
    at = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (at / sigma.to(images.dtype).clamp_min(0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None]
    out = F.pad(images.reshape(1, B * C, H, W), (reach,) * 4, mode="replicate")
    out = F.conv2d(out, kernel[:, :, None], groups=B * C)
    return F.conv2d(out, kernel[..., None], groups=B * C).view(B, C, H, W)


def solarise(images: Tensor, on: Tensor) -> Tensor:
    """Bright values (0.5 and above) inverted where `on` (B,) bool."""
    return torch.where(on[:, None, None, None] & (images >= 0.5), 1 - images, images)


# ---- Back-bones ----------------------------------------------------------------------------------
# Parameter names are torchvision's (ResNet, EfficientNet) and timm's (ViT): weights go in and out.

class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> maps at strides 4, 8, 16, 32."""

    stride = 32

    def __init__(self, block: type, layers: list[int]):
        super().__init__(block, layers)
        self.dim = self.fc.in_features
        self.fc = nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class EfficientNet(nn.Module):
    """torchvision's EfficientNet-B0 without its classifier: maps at strides 4, 8, 16, 32."""

    stride, dim = 32, 1280

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.efficientnet_b0().features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in (2, 3, 5, 8):
                maps.append(x)
        return maps


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """The transformer's two linear layers, with timm's parameter names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, N, D) -> the same; keep (B, 2) scales what both branches add (stochastic depth)."""
        if keep is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + keep[:, 0, None, None] * self.attn(self.norm1(x))
        return x + keep[:, 1, None, None] * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Pictures to patch embeddings, kept as a map: (B, 3, H, W) -> (B, D, H / p, W / p)."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ViT(nn.Module):
    """Plain vision transformer: (B, 3, S, S) -> [map (B, D, S / p, S / p)] of its patch tokens."""

    def __init__(self, image_size: int, patch: int, dim: int, depth: int, heads: int):
        super().__init__()
        if image_size % patch:
            raise UserError(
                f"--image-size {image_size} must be a multiple of the ViT's patch, {patch}")
        self.dim, self.stride, self.side = dim, patch, image_size // patch
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor, mask: Tensor | None = None,
              mask_token: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) -> what the first block sees, (B, 1 + N, D).

        Where mask (B, N) is True the patch becomes mask_token (D,), before its position is added.
        """
        x = self.patch_embed(x).flatten(2).mT
        if mask is not None:
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, D): the class token, then the patches row by row."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.tokens(x)[:, 1:].mT.unflatten(2, (self.side, self.side))]


_VITS = {                                                    # patch, width, depth, heads
    "vit_mini": (8, 128, 4, 4), "vit_s": (16, 384, 12, 6), "vit_b": (16, 768, 12, 12),
    "vit_l": (16, 1024, 24, 16)}
_RESNETS = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3])}
BACKBONES = (*_RESNETS, "efficientnet_b0", *_VITS)


def build_backbone(name: str, image_size: int, recompute: bool = False) -> nn.Module:
    """A network with `dim` (channels of its last map), `stride`, and forward(x) -> list of maps.

    `recompute` keeps only the input of each block for the backward pass, which then runs the block
    again (Chen et al. 2016): the same numbers from less memory. Keys stay, and as BatchNorm counts
    every call alike, the statistics of `batch_statistics` do too.
    """
    if name in _VITS:
        net = ViT(image_size, *_VITS[name])
    elif name == "efficientnet_b0":
        net = EfficientNet()
    else:
        net = ResNet(*_RESNETS[name])
    for block in net.modules() if recompute else ():
        if isinstance(block, (Block, BasicBlock, Bottleneck, MBConv)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return net


def _tensor_dicts(content: object, name: str = "") -> dict[str, dict[str, Tensor]]:
    """All dicts of tensors inside a checkpoint, by their path of keys."""
    if not isinstance(content, dict):
        return {}
    here = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    found = {name: here} if here else {}
    for key, value in content.items():
        found |= _tensor_dicts(value, f"{name}/{key}")
    return found


def _resize_positions(weight: Tensor, side: int) -> Tensor:
    """Position embedding of another size, (1, 1 + n^2, D) -> (1, 1 + side^2, D), bicubic."""
    old = math.isqrt(weight.shape[1] - 1)
    if old ** 2 + 1 != weight.shape[1]:
        raise UserError(f"the checkpoint's position embedding has {weight.shape[1]} places, not "
                        "one for the class token and a square of patches: is it distilled?")
    grid = weight[:, 1:].mT.unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([weight[:, :1].float(), grid.flatten(2).mT], 1)


def load_backbone(backbone: nn.Module, path: str | Path) -> str:
    """Fill a back-bone from any checkpoint: ours, torchvision's, timm's, or one that wraps them.

    The weights may lie in any sub-dictionary under any prefix, a teacher's (DINO, iBOT, ours)
    before a student's; a position embedding of another size is resized. Returns a sentence that
    says what was ignored. Raises UserError where a key of the back-bone is missing or has another
    shape, where its parts have more keys, or where the file is not a plain checkpoint.
    """
    wanted = {k: v for k, v in backbone.state_dict().items() if "num_batches_tracked" not in k}
    anchor = next(k for k in wanted if k.endswith("weight"))
    dicts = _tensor_dicts(load_checkpoint(path))
    candidates = []
    for home, tensors in dicts.items():
        for prefix in {key[:-len(anchor)] for key in tensors if key.endswith(anchor)}:
            missing = [k for k in wanted if prefix + k not in tensors]
            name = f"{home}/{prefix}"
            candidates.append(((len(missing), "teacher" not in name, name), home, prefix, missing))
    hint = "does --backbone name the network it was made for?"
    if not candidates:
        raise UserError(f"{path}: holds no key that ends in {anchor}, as a "
                        f"{type(backbone).__name__} has; {hint}")
    _, home, prefix, missing = min(candidates)
    tensors = dicts[home]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} of the back-bone's {len(wanted)} keys, the "
                        f"first is {prefix}{missing[0]}; {hint}")
    found = {k: tensors[prefix + k] for k in wanted}
    if "pos_embed" in found and found["pos_embed"].shape[1] != wanted["pos_embed"].shape[1]:
        found["pos_embed"] = _resize_positions(found["pos_embed"], backbone.side)
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise UserError(f"{path}: {prefix}{key} is {tuple(value.shape)}, the back-bone's is "
                            f"{tuple(wanted[key].shape)}; {hint}")
    backbone.load_state_dict(found, strict=False)
    rest = sorted(k for k in tensors if k[len(prefix):] not in wanted and "num_batches" not in k)
    parts = {key.split(".")[0] for key in wanted}
    more = [k for k in rest if k.startswith(prefix) and k[len(prefix):].split(".")[0] in parts]
    if more:                                             # a deeper network holds the smaller's keys
        raise UserError(f"--init {path}: has {len(more)} more tensors than the back-bone, the "
                        f"first is {more[0]}; {hint}")
    said = f"{path}{home and ':'}{home}: {len(found)} back-bone tensors read"
    if rest:
        said += f"; ignored {len(rest)}: {', '.join(rest[:6])}{' ...' * (len(rest) > 6)}"
    return said


# ---- Metrics -------------------------------------------------------------------------------------
# Points are (N, P, 3) m and count where ok (N, P) is True; elsewhere they may be NaN. In the scores
# that root or scale a hand, the first 21 points are its joints; vertices may follow. Errors are
# float64, one a point, NaN where nothing counts: means come last, so scores can be bootstrapped.


def _all(points: Tensor, ok: Tensor | None) -> Tensor:
    """(N, P) bool: `ok`, or every point."""
    return torch.ones_like(points[..., 0], dtype=torch.bool) if ok is None else ok


def epe(pred: Tensor, true: Tensor, ok: Tensor | None = None) -> Tensor:
    """Plain distance, (N, P, D) twice -> (N, P): abs_mpjpe of camera coordinates, epe_2d of px."""
    error = torch.linalg.vector_norm(pred.double() - true.double(), dim=-1)
    return error if ok is None else error.masked_fill(~ok, math.nan)


def mpjpe(pred: Tensor, true: Tensor, ok: Tensor | None = None) -> Tensor:
    """Distance after putting wrist on wrist, (N, P) m; no sample without a wrist that counts."""
    apart = pred.double() - true.double()
    return epe(apart, apart[:, ROOT, None], None if ok is None else ok & ok[:, ROOT, None])


def n_mpjpe(pred: Tensor, true: Tensor, ok: Tensor | None = None, root: int = MIDDLE_MCP,
            lsq: bool = False) -> Tensor:
    """Distance after rooting at joint `root` and scaling the prediction about it, (N, P) m.

    The scale makes the wrist-middle-MCP bone as long as the true one: HaMuCo's N-MPJPE with root 9,
    HO3D's scale and translation with root 0 (the tool kit's joint 4 is our joint 9). `lsq`: the
    scale <true, pred> / <pred, pred> of all joints instead (VideoPose3D); 0 for a hand of no size.
    """
    ok = _all(pred, ok)
    pred, true = (x.double() - x[:, root, None].double() for x in (pred, true))
    if lsq:
        p, t = (x[:, :N_JOINTS].masked_fill(~ok[:, :N_JOINTS, None], 0) for x in (pred, true))
        top, bottom = (p * t).sum((1, 2)), p.square().sum((1, 2))
    else:
        bone = MIDDLE_MCP if root == ROOT else ROOT
        top, bottom = (torch.linalg.vector_norm(x[:, bone], dim=-1) for x in (true, pred))
    factor = torch.where(bottom > 0, top / bottom, 0)[:, None, None]
    return epe(factor * pred, true, ok & ok[:, ROOT, None] & ok[:, MIDDLE_MCP, None])


def _best_turn(A: Tensor, reflect: bool) -> tuple[Tensor, Tensor]:
    """The rotation R (N, 3, 3) of the largest <A, R>, and that product (N,).

    `reflect` allows a determinant of -1 too.
    """
    finite = A.isfinite().all(2).all(1)                          # the SVD raises at a NaN
    U, sizes, Vh = torch.linalg.svd(torch.where(finite[:, None, None], A, 0))
    sign = torch.ones_like(sizes)
    if not reflect:
        sign[:, 2] = torch.linalg.det(U @ Vh).sign()             # the least axis turns back
    return (U * sign[:, None]) @ Vh, (sizes * sign).sum(1)


def procrustes(pred: Tensor, true: Tensor, ok: Tensor | None = None,
               reflect: bool = False) -> Tensor:
    """Put `pred` on `true` by the best similarity, all N at once: (N, P, 3) twice -> (N, P, 3).

    By default a proper rotation (Umeyama 1991). `reflect` allows mirroring too, as the tool kits of
    FreiHAND, HO3D and DexYCB do: there a mirrored hand scores 0. Points that do not count move
    along. A hand collapsed to one point goes to the middle of the true one, in either form. A hand
    with NaN among the points that count is NaN.
    """
    pred, true = pred.double(), true.double()
    counts = _all(pred, ok)[..., None]                                          # (N, P, 1)
    n = counts.sum(1, keepdim=True).clamp(min=1)
    p_mean = torch.where(counts, pred, 0).sum(1, keepdim=True) / n
    t_mean = torch.where(counts, true, 0).sum(1, keepdim=True) / n
    p = torch.where(counts, pred - p_mean, 0)
    t = torch.where(counts, true - t_mean, 0)
    R, overlap = _best_turn(p.mT @ t, reflect)
    size = p.square().sum((1, 2))
    factor = torch.where(size > 0, overlap / size, 0)
    return torch.baddbmm(t_mean, pred - p_mean, factor[:, None, None] * R)


def pa_mpjpe(pred: Tensor, true: Tensor, ok: Tensor | None = None, reflect: bool = False) -> Tensor:
    """Distance after `procrustes`, (N, P) m; no sample with fewer than three points that count."""
    enough = None if ok is None else ok & (ok.sum(1, keepdim=True) > 2)
    return epe(procrustes(pred, true, ok, reflect), true, enough)


def auc(errors: Tensor, limit: float = 0.05) -> Tensor:
    """Area under the PCK curve that each error adds, in [0, 1], same shape; their mean is the AUC.

    PCK(t) is the share of errors <= t at 100 thresholds from 0 to `limit` (m or px), integrated by
    trapezoids over the range (FreiHAND, HO3D, DexYCB): a mean over errors, so the area is one too.
    An error that is not exactly 0 misses the first threshold: at most 98.5 / 99.
    """
    steps = torch.linspace(0, limit, 100, dtype=torch.float64, device=errors.device)
    error = errors.double().clamp(max=2 * limit)
    # The first threshold that is not below the error, by division, which may be one off either way.
    first = (error * (99 / limit)).ceil_().clamp_(0, 100)
    at = first.nan_to_num(0).long()
    first -= ((steps[(at - 1).clamp_(min=0)] >= error) & (at > 0)).double()
    first += ((steps[at.clamp_(max=99)] < error) & (first < 100)).double()
    return (99.5 - first).div_(99).clamp_(0, 1)                       # NaN stays NaN


def pck_2d(pred: Tensor, true: Tensor, ok: Tensor | None = None, reach: float = 0.2) -> Tensor:
    """1 where a key point is nearer than `reach` of the hand's box, else 0: (N, P, 2) px -> (N, P).

    The box is that of the true key points, its longer side counts. paper silent; ours
    """
    ok = _all(pred, ok)
    low = torch.where(ok[..., None], true, math.inf).amin(1)
    high = torch.where(ok[..., None], true, -math.inf).amax(1)
    side = (high - low).amax(-1, keepdim=True)
    return (epe(pred, true) < reach * side).double().masked_fill(~ok, math.nan)


def f_score(pred: Tensor, true: Tensor, limits: tuple[float, ...] = (0.005, 0.015)) -> Tensor:
    """Mesh F-scores, (N, M, 3) m twice -> (N, len(limits)): 2 P R / (P + R), 0 if both are 0.

    P is the share of predicted vertices closer than (<) the limit to any true vertex, R the other
    way round; which vertex is which plays no part (FreiHAND and HO3D, after aligning).
    """
    near = []                              # one table at a time: it stays in the cache, 5x faster
    for p, t in zip(pred.double(), true.double()):
        half = torch.addmm(t.square().sum(1), p, t.mT, alpha=-2)        # (M, M) |p - t|^2 - |p|^2
        size = p.square().sum(1)
        near.append(torch.stack([half.amin(1) + size, (half + size[:, None]).amin(0)]))
    square = torch.stack(near) if near else pred.new_zeros(0, 2, 1).double()          # (N, 2, M)
    limit = torch.tensor(limits, dtype=torch.float64, device=pred.device)
    P, R = (square[..., None] < limit.square()).double().mean(2).unbind(1)
    return 2 * P * R / (P + R).clamp(min=1e-12)


def _scored(name: str, pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float64, and where the truth is finite, (N, P): so must the prediction be there."""
    pred, true = pred.double(), true.double()
    if pred.shape != true.shape:
        raise UserError(f"the prediction's {name} have shape {tuple(pred.shape)}, the data set's "
                        f"{tuple(true.shape)}; predict one per sample, in this order")
    ok = true.isfinite().all(-1)
    bad = ok & ~pred.isfinite().all(-1)
    if bad.any():
        rows = bad.any(1).nonzero()[:, 0].tolist()
        raise UserError(f"{len(rows)} of {len(bad)} predictions have {name} that are not finite "
                        f"(the first is sample {rows[0]}); nothing was scored, since leaving them "
                        "out would flatter the model")
    return pred, true, ok


def score(pred: dict, truth: dict) -> dict[str, Tensor]:
    """Every score that a prediction allows, one number a sample: {name: (N,) float64}, NaN if none.

    `pred` is what a model's `predict` returns: joints (N, 21, 3) m of any origin and, where they
    exist, root (N, 3) m, the wrist in the camera frame; verts (N, 778, 3) m; uv (N, 21, 2) px of
    image. `truth` is the data set's joints, joints_ok, verts, uv, crop; what it lacks is NaN.
    Raises UserError if shapes differ or a prediction is not finite.
    """
    p, t, ok = _scored("joints", pred["joints"], truth["joints"])
    ok = ok & truth["joints_ok"]
    parts = {"mpjpe": slice(0, N_JOINTS)}
    if "verts" in pred and "verts" in truth:
        verts = _scored("vertices", pred["verts"], truth["verts"])
        p, t, ok = (torch.cat(pair, 1) for pair in zip((p, t, ok), verts))
        parts["mpvpe"] = slice(N_JOINTS, None)
    errors = {"{}_mm": mpjpe(p, t, ok), "n_{}_mm": n_mpjpe(p, t, ok),
              "n_{}_mm_lsq": n_mpjpe(p, t, ok, lsq=True), "st_{}_mm": n_mpjpe(p, t, ok, root=ROOT)}
    if "root" in pred:
        camera = p + (pred["root"].double() - p[:, ROOT])[:, None]
        errors["abs_{}_mm"] = epe(camera, t, ok)
    out = {key.format(kind): 1000 * error[:, part].nanmean(1)
           for key, error in errors.items() for kind, part in parts.items()}
    out["auc"] = auc(errors["{}_mm"][:, :N_JOINTS]).nanmean(1)
    for kind, part in parts.items():                        # joints and mesh are aligned separately
        for suffix, reflect in (("", False), ("_reflect", True)):
            error = pa_mpjpe(p[:, part], t[:, part], ok[:, part], reflect)
            out[f"pa_{kind}_mm{suffix}"] = 1000 * error.nanmean(1)
            if kind == "mpjpe" and not reflect:
                out["pa_auc"] = auc(error).nanmean(1)
    if "mpvpe" in parts:
        part = parts["mpvpe"]
        rows = ok[:, N_JOINTS:].all(1)
        meshes = {"": procrustes(p[rows, part], t[rows, part])}
        if "root" in pred:
            meshes["_raw"] = camera[rows, part]
        for suffix, mesh in meshes.items():
            both = t.new_full((len(t), 2), math.nan)
            both[rows] = f_score(mesh, t[rows, part])
            out[f"f_5{suffix}"], out[f"f_15{suffix}"] = both.unbind(1)
    if "uv" in pred:
        out |= _score_2d(pred, truth, ok[:, :N_JOINTS])
    return out


def _score_2d(pred: dict, truth: dict, ok_3d: Tensor) -> dict[str, Tensor]:
    """The scores of `uv`: in px of the original picture, and with `_crop` in px of image.

    (Those are px that were asked for, where `zoom` says how many one of image is.) A joint marked
    wrong in 3D does not count; where a sample has no 3D, every finite uv does.
    """
    p, t, ok = _scored("uv", pred["uv"], truth["uv"])
    ok = ok & (ok_3d | ~ok_3d.any(1, keepdim=True))
    back = invert(truth["crop"].double())                                 # image px -> picture px
    p0, t0 = transform(back, p), transform(back, t)
    picture = epe(p0, t0, ok)
    crop = epe(p, t, ok).nanmean(1) * truth.get("zoom", 1.0)
    return {"epe_2d_px": picture.nanmean(1), "epe_2d_px_crop": crop,
            "pck_2d_20": pck_2d(p0, t0, ok).nanmean(1), "auc_2d": auc(picture, 30.0).nanmean(1)}


def summarise(scores: dict[str, Tensor]) -> tuple[dict[str, float], int, int]:
    """Means, each over the samples that have it; how many samples have any score; how many none.

    A score that no sample has is not in the means.
    """
    scored = torch.stack([~x.isnan() for x in scores.values()]).any(0)
    means = {name: float(x.nanmean()) for name, x in scores.items() if not x.isnan().all()}
    return means, int(scored.sum()), int((~scored).sum())


# ---- Run -----------------------------------------------------------------------------------------
# What surrounds a training loop: options, folders, logs, checkpoints, batches, processes.


SILENT = object()                                                    # the paper does not say
STAGES = {"pretrain": ("pre-training", "pre-trains"), "finetune": ("fine-tuning", "fine-tunes")}


def arg(default: Any, help: str, paper: Any = SILENT, ref: str = "", why: str = "",
        finetune: Any = SILENT, finetune_paper: Any = SILENT, finetune_why: str = "",
        choices: Sequence[str] = (), stage: str = "", least: float = 0, above: float = -1,
        most: float = 10 ** 9) -> Any:
    """A Config field that carries the paper's value and where it stands.

    `why` must say why where `default` is not the paper's; `finetune` is the default of the second
    stage where it has its own. `stage`, "pretrain" or "finetune", is the one that uses the field,
    where not both do: `settle` refuses the flag in the other, and a number below `least`, not above
    `above` or beyond `most`. `--help` prints all but the last three.
    """
    note = dict(help=help, paper=paper, ref=ref, why=why, finetune=finetune, choices=choices,
                finetune_paper=finetune_paper, finetune_why=finetune_why, stage=stage, least=least,
                above=above, most=most)
    return dataclasses.field(default=default, metadata=note)


@dataclasses.dataclass
class Flags:
    """The flags that all four scripts share and no paper claims."""

    data: tuple[str, ...] = arg(("synthetic",), "data sets to train on, NAME[:PART][=DIR] ...")
    root: str = arg("", "folder of the one data set (default data/NAME)")
    out: str = arg("", "folder of the run (default runs/METHOD-DATA, numbered if taken)")
    init: str = arg("random", "first weights of the back-bone: random, or any checkpoint file")
    finetune: str = arg("", "fine-tune from --init on the labels of NAME[:PART][=DIR]")
    label_fraction: float = arg(1.0, "share of the training labels used, nested subsets by seed",
                                stage="finetune", above=0, most=1)
    samples: int = arg(32560, "length of the synthetic training set", least=1)
    backgrounds: str = arg("", "folder of pictures behind synthetic hands (default: procedural)")
    mano: str = arg("", "MANO_RIGHT.pkl or .npz (default: data/mano/MANO_RIGHT.pkl if there, else "
                        "the built-in hand; `builtin` forces that)")
    cache: str = arg("cache", "folder for rendered hands, squares of pictures that were read, and "
                              "indexes of large data sets")
    keep: float = arg(0.25, "share of the free disk that squares of one data set may fill in "
                            "--cache; 0: pictures are decoded whenever they are read",
                      least=0, most=1)
    row: str = arg("", "name of the row (default: what made --init, and the data it was trained "
                       "on)", stage="finetune")
    seed: int = arg(0, "seed of every random draw", most=2 ** 64 - 1)
    workers: int = arg(4, "processes that read pictures (0: none beside the main one)")
    device: str = arg("auto", "cpu, cuda, cuda:N, mps or auto")
    save_minutes: float = arg(10.0, "minutes between two checkpoints inside an epoch", above=0)
    resume: bool = arg(False, "go on with every stage of the run in --out; what torchrun "
                              "--max-restarts starts again does so by itself")
    quick: bool = arg(False, "minutes on two CPU cores: every stage, small; explicit flags win")
    compile: bool = arg(False, "torch.compile the network")
    recompute: bool = arg(False, "save memory: run the back-bone's blocks twice, see README")
    precision: str = arg("auto", "of the networks in training: bf16, fp32, or the faster of the "
                                 "two on this device", choices=("auto", "bf16", "fp32"))


def _shown(value: object) -> str:
    """A value as one types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _describe(field: dataclasses.Field, quick: dict[str, dict[str, Any]]) -> str:
    """One option's help: what it is, its default, quick value, the paper's value and section."""
    note = field.metadata
    stages = [("", field.default, note["paper"], note["why"])]
    if note["finetune"] is not SILENT:
        stages = [("pre-training ", field.default, note["paper"], note["why"]),
                  ("fine-tuning ", note["finetune"], note["finetune_paper"], note["finetune_why"])]
    parts = []
    for stage, default, paper, why in stages:
        if paper is not SILENT:
            said = f"paper {_shown(paper)}, {note['ref']}"
        else:
            said = "paper: not stated" if field.name not in Flags.__dataclass_fields__ else ""
        shown = f"{stage}default {_shown(default)}" if _shown(default) else stage
        parts.append("; ".join(filter(None, (shown, said, why))))
    values = {stage: _shown(q[field.name]) for stage, q in quick.items() if field.name in q}
    if values:                                  # in the order of the stages, or of the one that has
        alone = f"{STAGES[min(values)][0]} " if len(values) < len(stages) else ""
        parts.append(f"quick {alone}{' / '.join(dict.fromkeys(values.values()))}")
    text = f"{STAGES[note['stage']][0]}: {note['help']}" if note["stage"] else note["help"]
    if note["choices"] and field.name != "variant":
        text += f": {', '.join(note['choices'])}"
    about = ". ".join(filter(None, parts))
    return (text + f" ({about})" * bool(about)).replace("%", "%%")


def parse(Config: type, argv: list[str] | None, about: str, quick: dict[str, dict[str, Any]],
          variants: dict[str, str]) -> dict[str, Any]:
    """Command line -> the flags that were given explicitly, by field name. See `settle`."""
    listing = "\n".join(f"  {name:20s} {text}" for name, text in variants.items())
    parser = argparse.ArgumentParser(
        description=about.strip().split("\n")[0], allow_abbrev=False,
        epilog=f"variants (--variant NAME ...):\n{listing}" if variants else None,
        formatter_class=lambda prog: argparse.RawTextHelpFormatter(prog, max_help_position=28))
    hints = typing.get_type_hints(Config)
    for option in dataclasses.fields(Config):
        options: dict[str, Any] = dict(default=argparse.SUPPRESS, help=_describe(option, quick))
        kind = hints[option.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= dict(nargs="+", type=typing.get_args(kind)[0], metavar="NAME")
        else:
            options |= dict(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        if option.metadata["choices"]:
            options |= dict(choices=option.metadata["choices"], metavar="NAME")
        parser.add_argument("--" + option.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def settle(Config: type, given: dict[str, Any], stage: str,
           quick: dict[str, dict[str, Any]]) -> Any:
    """The Config of one stage: its defaults, then the quick values if asked, then what was given.

    A warm-up that nobody gave takes a tenth of the epochs at most, and --precision is one of the
    two. Raises UserError where a value makes no sense, and where a flag was given that only the
    other stage uses; `--quick` runs both in one command.
    """
    notes = {option.name: option.metadata for option in dataclasses.fields(Config)}
    for name in given if stage in STAGES and not given.get("quick") else ():
        home = notes[name]["stage"]
        if home not in ("", stage):
            raise UserError(f"--{name.replace('_', '-')}: belongs to {STAGES[home][0]}, and this "
                            f"command {STAGES[stage][1]}")
    values = {}
    if stage == "finetune":
        values = {name: note["finetune"] for name, note in notes.items()
                  if note["finetune"] is not SILENT}
    values |= quick.get(stage, {}) if given.get("quick") else {}
    cfg = Config(**(values | given))
    cfg.precision = precision_on(cfg.device, cfg.precision, getattr(cfg, "backbone", ""))
    for name, note in notes.items():
        value = getattr(cfg, name)
        least, above, most = note["least"], note["above"], note["most"]
        if isinstance(value, (int, float)) and not (least <= value <= most and value > above):
            bounds = f"above {above}" if above >= least else f"at least {least}"       # NaN is none
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {bounds} and at most "
                            f"{most:,}")
    if "warmup_epochs" in notes and "warmup_epochs" not in given:      # one that is given wins
        cfg.warmup_epochs = min(cfg.warmup_epochs, cfg.epochs / 10)
    stride = _VITS[cfg.backbone][0] if getattr(cfg, "backbone", "") in _VITS else 32
    if hasattr(cfg, "image_size") and (cfg.image_size < 1 or cfg.image_size % stride):
        what = "the ViT's patch" if stride < 32 else "its last map's stride"
        raise UserError(f"--image-size {cfg.image_size}: must be a multiple of {what}, {stride}")
    return cfg


# How a command ends


class Stopped(KeyboardInterrupt):
    """A signal asked for the end of the command; the text says how far it came."""


class Stop:
    """Which signal asked this process to end; signals belong to the process, and so does this."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")               # those that the system knows
    asked = 0                                               # its number
    since = 0.0                                             # s
    process = 0                                             # data workers inherit the handler
    patient = False                                         # a training loop looks at `asked`


def _on_signal(number: int, _: object) -> None:
    """The first signal ends training after its step, anything else now; a second ends all at once.

    torchrun passes on what a terminal has sent to everybody already: within a second it is one.
    """
    if os.getpid() != Stop.process or (Stop.asked and time.monotonic() - Stop.since < 1):
        return
    if Stop.asked:
        signal.signal(number, signal.SIG_DFL)
        os.kill(Stop.process, number)
    Stop.asked, Stop.since = number, time.monotonic()
    if not Stop.patient:
        raise Stopped("stopped")
    os.write(2, b"\nstopping after this step; a second time: at once\n")     # print may not nest


# What gloo and NCCL say where a connection to another process breaks.
GONE = ("by peer", "Broken pipe", "remote process exited")


def guarded(main: Callable[[], None]) -> int:
    """Run a script's main; the exit code, and what went wrong on a line of its own on stderr.

    2 after one sentence of a UserError or of the system (OSError); 128 + its number after a signal,
    as a shell counts: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP (unless nohup ignores it).
    """
    numbers = [getattr(signal, name) for name in Stop.SIGNALS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    before = {n: old for n, old in before.items() if old not in (None, signal.SIG_IGN)}
    Stop.asked, Stop.patient, Stop.process = 0, False, os.getpid()
    try:
        for number in before:
            signal.signal(number, _on_signal)
        try:
            main()
            return 0
        except (UserError, OSError, KeyboardInterrupt, RuntimeError) as error:
            for number in before:
                signal.signal(number, signal.SIG_IGN)    # or torchrun's ends it before it has said
            _close_bars()
            said, code = _last_words(error)
        if rank() == 0 or said.startswith("error"):
            sys.stderr.write("\n" * (rank() > 0) + f"{said}\n")   # the bar is the first one's
        return code
    finally:
        _close_bars()                                    # a traceback, too, begins a line
        for number, old in before.items():
            signal.signal(number, old)
        if torch.distributed.is_initialized():
            gc.collect()             # networks hold the group, whose threads would outlive it
            torch.distributed.destroy_process_group()


def _close_bars() -> None:
    """What is said next gets a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _last_words(error: BaseException) -> tuple[str, int]:
    """A sentence on what ended a command, and its exit code; raises what is no user's business."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return text or "stopped", 128 + (Stop.asked or signal.SIGINT)
    if not isinstance(error, RuntimeError):
        return f"error: {text}", 2
    # When one process ends, torchrun stops the others and their workers: that is then the news.
    code = 128 + Stop.asked if Stop.asked else 2
    if world() > 1 and any(words in text for words in GONE):
        return ("error: another process of this job ended, and says why unless it was killed; go "
                "on with --resume"), code
    if Stop.asked:
        return "stopped", code
    if "DataLoader worker" in text:
        return ("error: a process that reads pictures was killed, as the system does where memory "
                "runs out; go on with --resume and fewer --workers"), code
    raise error


# Folders, logs, checkpoints


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that stands under its name, and on the disk, when it is whole, or not at all.

    A reader sees the old file or the new one, never a part. UserError where that fails (a full
    disk, a quota, a folder that has gone): then no part is left and the old file is intact.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        with contextlib.suppress(OSError):                   # where a folder can be synchronised
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error                  # torch wraps what the system said
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause}); what stood there "
                        "before is intact") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, see `whole_file`."""
    with whole_file(path) as file:
        torch.save(content, file)


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, on the CPU, contiguous: what a file of weights holds."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def load_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint without executing anything; UserError where it is none or asks for more.

    A plain argparse.Namespace is let in: DINO, iBOT and MAE keep their options in one.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if damaged := parts.testzip():                 # torch compares no checksum
                    raise ValueError(f"{damaged} in it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # torch raises many kinds: zip, pickle, runtime
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: is not a plain checkpoint of tensors ({reason})") from None


# Processes


WITHOUT_FLOAT64 = ("mps",)


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        torch.distributed.barrier()


def say(text: str) -> None:
    """Print a line, from one process only, without tearing a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def start(device: str) -> torch.device:
    """Choose the device; under torchrun also join the process group (gloo on CPU, nccl on CUDA)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no usable CUDA device; try cpu")
        if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
            kind = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"      # hosts talk too
            hours = timedelta(hours=6)                                                # one renders
            store, number, count = next(torch.distributed.rendezvous("env://", timeout=hours))
            # Else processes that torchrun starts again would call those that ended.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
            torch.distributed.init_process_group(kind, store=store, rank=number, world_size=count,
                                                 timeout=hours)
        if chosen.type == "cuda" and world() > 1:
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        torch.empty(1, device=chosen)
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    torch.backends.cudnn.allow_tf32 = True           # not matmul's: it would blur the 3x3 matrices
    torch.backends.cudnn.benchmark = chosen.type == "cuda"       # the fastest kernel of each shape
    return chosen


def finest(device: torch.device) -> torch.dtype:
    """The type of most bits on a device: Apple's have no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def share(batch_size: int, micro_batch: int) -> range:
    """The numbers of the micro-batches of a batch that this process takes.

    Raises UserError where micro-batches do not fill the batch, or processes do not divide them.
    """
    if batch_size % micro_batch:
        raise UserError(f"--batch-size {batch_size} is no multiple of --micro-batch {micro_batch}")
    count = batch_size // micro_batch
    if count % world():
        good = [n for n in range(1, count + 1) if count % n == 0]
        raise UserError(f"{world()} processes cannot share {count} micro-batches (--batch-size / "
                        f"--micro-batch); take {', '.join(map(str, good))} processes")
    mine = count // world()
    return range(rank() * mine, (rank() + 1) * mine)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in an epoch; at least one, for which samples are then taken again."""
    if n < 1:
        raise UserError("the data set is empty: no sample is left to train on")
    return max(1, n // batch_size)


def parallel(model: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    """The model as the loop calls it: on the device, channels last, compiled, distributed."""
    model.to(device, memory_format=torch.channels_last)
    net = torch.compile(model) if compile else model
    if world() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():                      # for a name that older torch lacks
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def unwrapped(net: nn.Module) -> nn.Module:
    """The network itself, out of what `parallel` put around it: its parts have names there."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
    return getattr(net, "_orig_mod", net)                # torch.compile's wrapper


def accumulate(net: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around a micro-batch's forward and backward: the last one's gradients cross processes."""
    distributed = isinstance(net, nn.parallel.DistributedDataParallel)
    return net.no_sync() if distributed and not last else contextlib.nullcontext()


def precision_on(device: str, asked: str, backbone: str) -> str:
    """bf16 or fp32, as asked for by --precision; `auto` is the faster on the device.

    On a GPU bf16. On a CPU bf16 where torch says that it has the instructions (1.2 to 3.5 times as
    fast), but not for EfficientNet, whose convolutions of single channels are 2.4 times slower so.
    """
    if asked != "auto":
        return asked
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "bf16"
    try:
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        able = able and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):              # questions that not every torch can answer
        able = False
    return "bf16" if able and not backbone.startswith("efficientnet") else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Around a network's forward pass in training: bfloat16 matrices where `precision` is bf16.

    An `auto` that `settle` has not seen is bf16 on a GPU. Views, geometry and losses stay outside,
    and so does all that is judged: `predict` and probes are float32 on every device.
    """
    on = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Around a step's micro-batches: one update of BatchNorm's running statistics by all of them.

    Each micro-batch is normalised by its own statistics, as ever. At the end the running mean and
    variance move once, by the layer's momentum, to the average over the calls of the layer in all
    processes: the same on any number of processes, and where a step runs each micro-batch twice.
    That takes one collective. Layers in eval mode keep what they have; after an error all do.
    """
    layers = [layer for layer in unwrapped(model).modules() if layer.training
              and isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats]
    before = [torch.cat([layer.running_mean, layer.running_var]) for layer in layers]
    counts = [layer.num_batches_tracked.clone() for layer in layers]
    momenta = [layer.momentum for layer in layers]
    # Per layer: the sums of mean and variance, and the number of calls, (2 C + 1,) in float64.
    seen = [old.new_zeros(len(old) + 1, dtype=finest(old.device)) for old in before]

    def add(layer: nn.Module, *_: object, total: Tensor) -> None:
        total += torch.cat([layer.running_mean, layer.running_var, total.new_ones(1)])

    hooks = []
    for layer, total in zip(layers, seen):
        layer.momentum = 1.0                        # a call leaves its own statistics, to be read
        hooks.append(layer.register_forward_hook(functools.partial(add, total=total)))
    after = before
    try:
        yield
        if world() > 1 and seen:
            everything = torch.cat(seen)
            torch.distributed.all_reduce(everything)
            seen = everything.split([len(total) for total in seen])
        called = [total[-1] > 0 for total in seen]
        means = [total[:-1] / total[-1] for total in seen]
        after = [torch.where(on, old.to(mean).lerp(mean, momentum), old)
                 for on, old, mean, momentum in zip(called, before, means, momenta)]
        counts = [count + on for count, on in zip(counts, called)]
    finally:
        for layer, hook, momentum, new, count in zip(layers, hooks, momenta, after, counts):
            hook.remove()
            layer.momentum = momentum
            layer.running_mean.copy_(new[:layer.num_features])
            layer.running_var.copy_(new[layer.num_features:])
            layer.num_batches_tracked.copy_(count)


def fused_on(device: torch.device) -> bool | None:
    """`fused` of an optimiser: all weights in one kernel on a GPU, elsewhere torch's own choice."""
    return True if device.type == "cuda" else None


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay on matrices and kernels, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
