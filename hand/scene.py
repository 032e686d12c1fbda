"""What a rendered hand is seen with: a forearm, something held, a room, and its own shadows.

Every function takes the random numbers that it turns into a scene, or the samples to draw them for.
"""
from __future__ import annotations

import math
from itertools import pairwise

# common before torch: it settles how threads wait
from common import uniform

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def ramp(u: Tensor, low: float, high: float) -> Tensor:
    """Draws in 0..1 spread over low..high."""
    return low + (high - low) * u


def rotation_between(a: Tensor, b: Tensor) -> Tensor:
    """Smallest rotation taking unit a to unit b, (B, 3) -> (B, 3, 3); not for opposite vectors."""
    x, y, z = torch.linalg.cross(a, b).unbind(-1)
    zero = torch.zeros_like(x)
    W = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    c = (a * b).sum(-1)[:, None, None]
    return torch.eye(3, device=a.device) + W + W @ W / (1 + c)


def boundary(faces: np.ndarray) -> list[int]:
    """The wrist's opening: its vertices in the order of the loop's directed edges."""
    edges = {(int(t[i]), int(t[(i + 1) % 3])) for t in faces for i in range(3)}
    follow = {a: b for a, b in edges if (b, a) not in edges}
    loop = [min(follow)]
    while follow[loop[-1]] != loop[0]:
        loop.append(follow[loop[-1]])
    return loop


ARM = (0.012, 0.026, 0.045, 0.065, 0.095, 0.15, 0.22, 0.31, 0.42)       # rings, m beyond the wrist


def tube(rings: list[list[int]]) -> list[tuple[int, int, int]]:
    """Faces between rings of equally many vertices; a pole is a ring that repeats one vertex."""
    return [face for a, b in pairwise(rings) for k in range(len(a))
            for face in ((a[k - 1], b[k - 1], b[k]), (a[k - 1], b[k], a[k]))]


def arm_verts(verts: Tensor, joints: Tensor, loop: Tensor, u: Tensor, cuff: Tensor,
              eye: Tensor) -> Tensor:
    """Forearm that continues the wrist's loop: -> (B, len(ARM) * len(loop), 3) m.

    Draws u (B, 3) bend the wrist; eye (B, 3) is the direction to the camera: the arm never leans
    toward it by more than 6 degrees, or it would hide the hand. A sleeve begins at ring `cuff`.
    """
    ring = verts[:, loop]
    centre = ring.mean(1, keepdim=True)
    straight = F.normalize(centre[:, 0] - joints[:, 9], dim=-1)
    bent = F.normalize(straight + 0.9 * (u - 0.5), dim=-1)
    lean = (bent * eye).sum(-1, keepdim=True)
    aside = F.normalize(bent - lean * eye, dim=-1)
    lean = lean.clamp(max=0.1)
    bent = aside * (1 - lean * lean).sqrt() + eye * lean
    at = torch.tensor((0.0, *ARM), device=u.device)
    number = torch.arange(len(ARM) + 1, device=u.device)
    at = torch.where(number == cuff[:, None], at.roll(-1) - 0.001, at)    # (B, rings): a sharp edge
    out = []
    for k in range(len(ARM)):
        way = F.normalize(torch.lerp(straight, bent, min(1.0, (k + 1) / 4)), dim=-1)
        centre = centre + ((at[:, k + 1] - at[:, k])[:, None] * way)[:, None]
        width = 1 + 0.9 * at[:, k + 1] + 0.16 * (k >= cuff)
        turned = (ring - ring.mean(1, keepdim=True)) @ rotation_between(straight, way).mT
        out.append(centre + turned * width[:, None, None])
    return torch.cat(out, 1)


OCCLUDER = (9, 14)                                  # rings and vertices a ring, poles apart


def occluder_verts(power: Tensor) -> Tensor:
    """Superquadrics of unit half-width: powers (B, 2), 1 round or 0.1 square -> (B, N, 3).

    (1, 1) is a ball, (0.1, 1) a cylinder along z, (0.1, 0.1) a box.
    """
    def bend(t: Tensor, k: int) -> Tensor:
        return t.sign() * t.abs() ** power[:, k, None].to(t)

    rings, n = OCCLUDER
    lat = (0.5 - (torch.arange(rings) + 0.5) / rings) * math.pi
    lon = (torch.arange(n) + 0.5) / n * 2 * math.pi
    lat = lat.to(power.device)
    lon = lon.to(power.device)
    r = bend(lat.cos(), 0)[:, :, None]                                    # (B, rings, 1)
    z = bend(lat.sin(), 0)[:, :, None]
    x = bend(lon.cos(), 1)[:, None]                                       # (B, 1, n)
    y = bend(lon.sin(), 1)[:, None]
    grid = torch.stack([r * x, r * y, z.expand(-1, -1, n)], -1).flatten(1, 2)
    pole = torch.tensor([[0.0, 0, 1], [0, 0, -1]], device=power.device).expand(len(power), 2, 3)
    return torch.cat([pole, grid], 1)


def painted(u: Tensor, saturation: float) -> Tensor:
    """Muted colours as displayed: draws (..., 3) -> (..., 3); mostly grey, tinted warm or cool."""
    grey = 0.08 + 0.84 * u[..., 0]
    warm = u[..., 1] - 0.42
    green = u[..., 2] - 0.5
    tint = torch.stack([warm + 0.2 * green, 0.25 * warm + 0.5 * green, -warm - 0.2 * green], -1)
    return (grey[..., None] + 2 * saturation * tint).clamp(0.02, 0.98)


def scenery(image: Tensor, seed: int, size: int, shapes: int, saturation: float, calm: bool
            ) -> Tensor:
    """Blurred rooms, (N,) -> (N, 3, size, size) in 0..1: two surfaces, furniture, falling light.

    `shapes` pieces of furniture in colours of that `saturation`; a `calm` room has none.
    """
    def paint(u: Tensor) -> Tensor:
        return painted(u[..., 0, 0], saturation)[..., None, None]

    N = len(image)
    R = max(32, size // 2)
    axis = (torch.arange(R, device=image.device) + 0.5) / R * 2 - 1
    y = axis[:, None]
    x = axis[None, :]
    u = uniform(image, 16, seed, "room")[..., None, None]                 # (N, 16, 1, 1)
    wall = paint(u[:, :3])
    floor = torch.lerp(wall, paint(u[:, 3:6]), 0.25 if calm else 0.8)
    tilt = 0.5 * (u[:, 6] - 0.5)
    soft = 0.03 + 0.3 * u[:, 7] + 0.5 * calm
    below = ((y - tilt * x - 1.6 * (u[:, 8] - 0.5)) / soft + 0.5).clamp(0, 1)
    room = torch.lerp(wall, floor, below[:, None])
    for k in range(0 if calm else shapes):
        v = uniform(image, 12, seed, f"shape {k}")[..., None, None]
        turn = tilt + 0.15 * (v[:, 0] - 0.5) + (v[:, 1] > 0.85) * (v[:, 2] - 0.5) * 1.5
        right = x - 2.4 * (v[:, 3] - 0.5)
        down = y - 2.4 * (v[:, 4] - 0.5)
        across = (right + turn * down).abs() / (0.06 + 0.6 * v[:, 5] ** 2)
        along = (down - turn * right).abs() / (0.06 + 0.6 * v[:, 6] ** 2)
        oval = (across * across + along * along).sqrt()
        far = torch.where(v[:, 7] < 0.3, oval, torch.maximum(across, along))
        inside = ((1 - far) / (0.05 + 0.5 * v[:, 8]) + 0.5).clamp(0, 1) * (0.55 + 0.45 * v[:, 7])
        room = torch.lerp(room, paint(v[:, 9:]), inside[:, None])
    stripes = ((x * 9 * u[:, 9] + y * 9 * u[:, 10]) % 1 - 0.5).abs() - 0.25
    room = room * (1 + (u[:, 11] > 0.7) * (not calm) * 0.35 * u[:, 12] * stripes * below)[:, None]
    cloud = uniform(image, 64 + 400, seed, "cloud")
    for n, part, amount in ((8, cloud[:, :64], 0.14), (20, cloud[:, 64:], 0.06)):
        part = F.interpolate(part.view(N, 1, n, n), size=(R, R), mode="bilinear")
        room = room * (1 + amount * (part - 0.5) * 2)
    room = room * (1 + 0.35 * (u[:, 13] - 0.5) * x + 0.35 * (u[:, 14] - 0.5) * y)[:, None]
    return F.interpolate(room, size=(size, size), mode="bilinear").clamp(0, 1)


def occlusion(verts: Tensor, normals: Tensor, joints: Tensor, lamp: Tensor
              ) -> tuple[Tensor, Tensor]:
    """What the hand hides from itself: open sky (B, M) and share of the lamp (B, M), both 0..1.

    The hand is 40 balls along its bones. One of radius r at distance d under cosine c hides about
    c (r / d)^2 of the sky, and the lamp where the ray to it passes within r.
    """
    ends = joints[:, 1:]
    starts = joints[:, [k * (k % 4 > 0) for k in range(20)]]
    balls = torch.cat([torch.lerp(starts, ends, t) for t in (0.35, 0.8)], 1)           # (B, 40, 3)
    radius = torch.full((40,), 0.0085, device=verts.device)
    radius[[0, 20]] = 0.013                                               # the thumb's base
    radius[[4, 8, 12, 16, 24, 28, 32, 36]] = 0.012                        # the palm's bones
    middle = joints[:, 9:10]                                          # small numbers cancel less
    p = verts - middle
    c = balls - middle
    square = p.square().sum(-1)[..., None] + c.square().sum(-1)[:, None] - 2 * p @ c.mT
    square = square.clamp_min(1e-6)
    cosine = normals @ c.mT - (normals * p).sum(-1, keepdim=True)         # times the distance
    along = (lamp[:, None] @ c.mT) - (p @ lamp[..., None])                # (B, M, 40)
    above = (cosine / radius).clamp(0, 1)
    sky = (above * cosine * radius ** 2 / (square * square.sqrt())).clamp(max=0.7).sum(-1)
    miss = (square - along * along).clamp_min(0) / radius ** 2            # squared, in radii
    shadow = ((1.6 - miss) / 1.2).clamp(0, 1) * above * (along / radius - 0.5).clamp(0, 1)
    return 1 / (1 + 1.8 * sky), 1 - shadow.amax(-1)
