"""A batched triangle rasteriser and shader: meshes to pictures, with coverage and visibility."""
from __future__ import annotations

from typing import NamedTuple

# common before torch: it settles how threads wait
from common import project

import torch
import torch.nn.functional as F
from torch import Tensor


def _corners(verts: Tensor, K: Tensor, samples: int) -> tuple[Tensor, ...]:
    """x and y on the sample grid and 1 / z of vertices: three times (B, M)."""
    x, y = ((project(verts, K) + 0.5) * samples - 0.5).unbind(-1)
    return x, y, 1 / verts[..., 2]


def rasterise(verts: Tensor, faces: Tensor, K: Tensor, size: int, samples: int = 2,
              back: bool = False, near: float = 0.02) -> Tensor:
    """Nearest face at every sample: (B, M, 3) m camera frame, (F, 3), (B, 3, 3) px -> (B, S, S).

    int64, S = size * samples, -1 where nothing is hit; sample i sits at (i + .5) / samples - .5 px.
    Only faces seen from the front are drawn, or with `back` only those seen from behind, and only
    those wholly beyond `near` metres. Deterministic: the order of faces does not matter.
    """
    B = len(verts)
    S = size * samples
    device = verts.device
    x, y, nearness = (t[:, faces].view(-1, 3) for t in _corners(verts, K, samples))
    area = ((x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (y[:, 1] - y[:, 0]) * (x[:, 2] - x[:, 0]))
    keep = (area > 1e-9 if back else area < -1e-9) & (nearness.amax(-1) < 1 / near)
    keep = (keep & (nearness.amin(-1) > 0)).nonzero()[:, 0]
    x, y, nearness, area = (t.index_select(0, keep) for t in (x, y, nearness, area))
    left, top = (t.amin(-1).ceil().clamp(0, S) for t in (x, y))
    width, height = (((t.amax(-1).floor() + 1).clamp(0, S) - low).clamp_min(0).int()
                     for t, low in ((x, left), (y, top)))

    # One row per candidate (face, sample of its box). l1 and l2 are the weights of corners 1 and 2.
    count = width * height
    face = torch.arange(len(keep), device=device, dtype=torch.int32).repeat_interleave(count)

    def pick(of_face: Tensor) -> Tensor:
        return of_face.index_select(0, face)

    k = torch.arange(len(face), device=device, dtype=torch.int32)
    k = k - pick(count.cumsum(0).int() - count)
    row = torch.div(k, pick(width), rounding_mode="floor")
    column = k - row * pick(width)
    x1, x2, y1, y2 = ((t[:, i] - t[:, 0]) / area for t in (x, y) for i in (1, 2))
    dx = column + pick(left - x[:, 0])
    dy = row + pick(top - y[:, 0])
    l1 = dx * pick(y2) - dy * pick(x2)
    l2 = dy * pick(x1) - dx * pick(y1)
    hit = ((l1 >= 0) & (l2 >= 0) & (l1 + l2 <= 1)).nonzero()[:, 0]      # an edge is both faces'
    face, l1, l2, row, column = (t.index_select(0, hit) for t in (face, l1, l2, row, column))
    z0, z1, z2 = nearness.unbind(1)
    depth = pick(z0) + l1 * pick(z1 - z0) + l2 * pick(z2 - z0)

    # Positive floats sort like their bits: (1 / z | face) in one integer, and the largest wins.
    key = (depth.view(torch.int32).long() << 20) | pick(keep % len(faces))
    corner = torch.div(keep, len(faces), rounding_mode="floor") * S * S + (top * S + left).long()
    place = pick(corner) + row * S + column
    best = torch.full((B * S * S,), -1, dtype=torch.long, device=device)
    best.scatter_reduce_(0, place, key, "amax")
    return torch.where(best >= 0, best & 0xFFFFF, best).view(B, S, S)


def vertex_normals(verts: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Outward unit normals of vertices (B, M, 3) and faces (B, F, 3); gathers only: repeatable."""
    a, b, c = verts[:, faces].unbind(2)
    normals = torch.linalg.cross(b - a, c - a)                            # length: twice the area
    order = faces.flatten().argsort(stable=True)
    count = torch.bincount(faces.flatten(), minlength=verts.shape[1])
    slot = torch.arange(int(count.max()), device=faces.device)
    start = (count.cumsum(0) - count)[:, None] + slot
    table = torch.div(order[start.clamp_max(len(order) - 1)], 3, rounding_mode="floor")
    table = torch.where(slot < count[:, None], table, len(faces))         # (M, incident), padded
    rows = F.pad(normals.transpose(0, 1), (0, 0, 0, 0, 0, 1))             # (F + 1, B, 3)
    total = rows.index_select(0, table.flatten()).unflatten(0, table.shape).sum(1).transpose(0, 1)
    return F.normalize(total, dim=-1), F.normalize(normals, dim=-1)


class Light(NamedTuple):
    """One distant lamp and its surroundings, for each picture."""
    direction: Tensor           # (B, 3) unit, camera frame, towards the lamp
    colour: Tensor              # (B, 3) linear intensity
    ambient: Tensor             # (B, 3) linear intensity from everywhere
    gloss: Tensor               # (B,) strength of the highlight


def studio(n: int, device: torch.device | str = "cpu") -> Light:
    """Plain light over the viewer's left shoulder, for drawings."""
    def row(*values: float) -> Tensor:
        return torch.tensor([values], device=device).expand(n, -1)

    return Light(F.normalize(row(-0.4, -0.6, -0.8), dim=-1), row(0.75, 0.75, 0.75),
                 row(0.35, 0.35, 0.35), row(0.05)[:, 0])


def _interpolate(ids: Tensor, verts: Tensor, faces: Tensor, K: Tensor, extra: Tensor,
                 samples: int) -> tuple[Tensor, ...]:
    """Perspective-correct values at the N covered samples: normals and `extra` (B, M, C).

    -> values (3 + C, N), and the samples' places: flat index (N,) int64, b, row, column (N,) int32.
    Normals are smooth over edges up to some 40 degrees on either side, and flat beyond.
    """
    S = ids.shape[-1]
    n_faces = len(faces)
    device = ids.device
    hit = (ids >= 0).flatten().nonzero()[:, 0]                            # (N,) covered samples
    b = torch.div(hit, S * S, rounding_mode="floor").int()
    place = (hit % (S * S)).int()
    row = torch.div(place, S, rounding_mode="floor")
    column = place - row * S
    face = b * n_faces + ids.flatten()[hit].int()
    seen = torch.zeros(len(ids) * n_faces, dtype=torch.int32, device=device)
    seen[face.long()] = 1                                             # visible faces, renumbered
    face = (seen.cumsum(0) - 1).int().index_select(0, face)
    seen = seen.nonzero()[:, 0]
    at = faces[seen % n_faces] + torch.div(seen, n_faces, rounding_mode="floor")[:, None] \
        * verts.shape[1]
    x, y, nearness = (t.reshape(-1)[at] for t in _corners(verts, K, samples))            # (n, 3)
    smooth, flat = vertex_normals(verts, faces)
    smooth = smooth.flatten(0, 1)[at]                                     # (n, 3, 3)
    flat = flat.flatten(0, 1)[seen, None]                                 # (n, 1, 3)
    smooth = torch.where((smooth * flat).sum(-1, keepdim=True) < 0.75, flat, smooth)
    values = torch.cat([smooth, extra.flatten(0, 1)[at], torch.ones_like(x)[..., None]], -1)

    # The weight of corner i at (column, row) is affine, so value / z is too: three numbers each.
    x1, x2, y1, y2 = (t[:, k] - t[:, 0] for t in (x, y) for k in (1, 2))
    l1, l2 = (torch.stack([p, q, -p * x[:, 0] - q * y[:, 0]], -1) / (x1 * y2 - y1 * x2)[:, None]
              for p, q in ((y2, -x2), (-y1, x1)))
    weights = torch.stack([-l1 - l2, l1, l2], 1)                          # (n, corner, 3)
    weights[:, 0, 2] += 1
    plane = (values * nearness[..., None]).mT @ weights                   # (n, value, 3)
    plane = plane.permute(2, 1, 0).flatten(0, 1).index_select(1, face)    # a picture may be empty
    u, v, w = plane.unflatten(0, (3, -1))                                 # (value, N) each
    value = torch.addcmul(torch.addcmul(w, u, column), v, row)
    return value[:-1] / value[-1], hit, b, row, column


def shade(ids: Tensor, verts: Tensor, faces: Tensor, K: Tensor, albedo: Tensor, light: Light,
          lit: Tensor | None = None, samples: int = 2) -> Tensor:
    """Linear colours times coverage, and coverage: `ids` of `rasterise` -> (B, 4, size, size).

    albedo (B, M, 3) linear; lit (B, M) share of the lamp that reaches a vertex (1).
    """
    lit = torch.ones_like(verts[..., 0]) if lit is None else lit
    value, hit, b, row, column = _interpolate(ids, verts, faces, K,
                                              torch.cat([albedo, lit[..., None]], -1), samples)

    def unit(v: Tensor) -> Tensor:
        return v * (v * v).sum(0).clamp_min(1e-20).rsqrt()

    def each(of_picture: Tensor) -> Tensor:
        return of_picture.T.contiguous().index_select(1, b)

    n = unit(value[:3])
    toward = each(light.direction)
    lamp = each(light.colour) * value[6].clamp(0, 1)
    d = (n * toward).sum(0)
    wrap = torch.tensor([[0.35], [0.22], [0.18]], device=ids.device)      # skin bleeds red light
    out = ((d + wrap) / (1 + wrap)).clamp_min(0) * lamp
    out = out + each(light.ambient) * (0.85 - 0.15 * n[1])                # a little more from above
    cx, cy, focal = each(torch.stack([K[:, 0, 2], K[:, 1, 2], K[:, 0, 0]], 1))
    eye = torch.stack([(cx + 0.5) * samples - 0.5 - column, (cy + 0.5) * samples - 0.5 - row,
                       -focal * samples])
    shine = (n * unit(toward + unit(eye))).sum(0).clamp_min(0) ** 2
    shine = ((shine ** 2) ** 2) ** 2 * each(light.gloss[:, None]) * (d > 0)
    out = value[3:6].clamp(0, 1) * out + shine * lamp
    full = torch.zeros(4, ids.numel(), device=ids.device)
    full[:, hit] = F.pad(out, (0, 0, 0, 1), value=1.0)
    return F.avg_pool2d(full.view(4, *ids.shape), samples).transpose(0, 1)


def render(verts: Tensor, faces: Tensor, K: Tensor, size: int, albedo: Tensor, light: Light,
           background: Tensor, samples: int = 2) -> tuple[Tensor, Tensor]:
    """Picture of meshes (B, 3, size, size) in 0..1, and the share of each pixel they cover.

    verts (B, M, 3) m camera frame, faces (F, 3), K (B, 3, 3) px; albedo (B, M, 3) and background
    (B, 3, size, size) in 0..1 as displayed. Light adds up linearly; display = its square root
    (close to sRGB's curve).
    """
    ids = rasterise(verts, faces, K, size, samples)
    out = shade(ids, verts, faces, K, albedo ** 2, light, samples=samples)
    linear = out[:, :3] + background ** 2 * (1 - out[:, 3:])
    return linear.clamp(0, 1).sqrt(), out[:, 3]


# A joint counts as visible when the surface in front of it is its own flesh: at most so many metres
# nearer to the camera than the joint itself (wrist, thumb, then four fingers from base to tip).
FLESH = (0.030, 0.026, 0.018, 0.015, 0.013) + 4 * (0.020, 0.014, 0.013, 0.012)


def visible_joints(joints: Tensor, verts: Tensor, faces: Tensor, K: Tensor, ids: Tensor,
                   samples: int = 2) -> Tensor:
    """Joints inside the picture with nothing but their own flesh (`FLESH`) in front: (B, 21) bool.

    joints (B, 21, 3) m camera frame; `ids` (B, S, S) from `rasterise` of verts, faces and K.
    """
    b = torch.arange(len(ids), device=ids.device)[:, None]
    cell = ((project(joints, K) + 0.5) * samples).floor()
    inside = ((cell >= 0) & (cell < ids.shape[-1])).all(-1)
    column, row = cell.clamp(0, ids.shape[-1] - 1).long().unbind(-1)
    hit = ids[b, row, column]                                             # (B, 21)
    a, p, q = verts[b[..., None], faces[hit.clamp_min(0)]].unbind(2)      # (B, 21, 3) each
    n = torch.linalg.cross(p - a, q - a)
    pixel = (torch.stack([column, row], -1) + 0.5) / samples - 0.5
    focal = torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)[:, None]
    ray = F.pad((pixel - K[:, None, :2, 2]) / focal, (0, 1), value=1.0)
    surface = (n * a).sum(-1) / (n * ray).sum(-1)                         # depth of the face there
    flesh = torch.tensor(FLESH, device=ids.device)
    return inside & ((hit < 0) | (joints[..., 2] - surface <= flesh))
