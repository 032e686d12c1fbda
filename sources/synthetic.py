"""Rendered hands with every label exact."""
from __future__ import annotations

import hashlib
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, N_VERTS, Mano, UserError, axis_angle_to_matrix, bits, blur, crop, flip,
    matrix_to_axis_angle, normal, project, rotate_z, six_d_to_matrix, uniform, warp)
from hand.builtin import builtin_hand, draw_pose, draw_shape
from hand.render import Light, rasterise, shade, vertex_normals, visible_joints
from hand.scene import (
    ARM, OCCLUDER, arm_verts, boundary, occluder_verts, occlusion, painted, ramp, rotation_between,
    scenery, tube)
from sources.files import locked
from sources.loader import Source
from sources.pictures import read_image
from sources.reading import to_device
from sources.squares import Kept

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm


WANDER = 0.009             # m, how far a detector's idea of a joint strays from it, per axis


def noisy_labels(uv: Tensor, astray: Tensor, visible: Tensor, moment: Tensor, image: Tensor,
                 seed: int, size: int, outliers: float = 0.1) -> tuple[Tensor, Tensor]:
    """Key points as a 2D detector gives them: uv (N, 21, 2) px -> labels px, confidence (N, 21).

    `astray` (N, 21, 2) px is where joints are seen that stand WANDER x a normal draw beside
    their place. All pictures of a `moment` (N,) share that idea of the hand, as a detector's
    guesses agree between neighbouring views, so triangulation cannot remove it. A label follows
    it where its joint is hidden, and by a third where it is `visible` (N, 21). To this come
    errors of each picture, `image` (N,): jitter (2 % of the detector's square of `size` px, 3 %
    for hidden joints), joints lost anywhere in the square (`outliers` x 0.5 of the visible,
    x 1.5 of the hidden), and, in one moment of six, two neighbouring fingers swapped in every
    second view. The mean error on a 256 px crop is OpenPose's on HanCo, 22-26 px. Confidence
    falls with the error, blurred by noise of its own: their rank correlation is about -0.5.
    Shares and blur: ours.
    """
    N = len(uv)
    jitter = normal(image, 2 * N_JOINTS, seed, "label jitter").view(N, N_JOINTS, 2)
    label = uv + torch.where(visible, 0.35, 1.0)[..., None] * (astray - uv)
    label = label + torch.where(visible, 0.02, 0.03)[..., None] * size * jitter

    swap = uniform(moment, 2, seed, "label swap")
    both = (swap[:, 1] < 1 / 6) & (uniform(image, 1, seed, "label swap view")[:, 0] < 0.5)
    first = (swap[:, :1] * 4).long()                                      # thumb-index, ...
    joint = torch.arange(N_JOINTS, device=uv.device).expand(N, -1)
    finger = torch.div(joint - 1, 4, rounding_mode="floor")
    other = joint + 4 * ((finger == first).long() - (finger == first + 1).long())
    source = torch.where(both[:, None] & (joint > 0), other, joint)
    label = label.gather(1, source[..., None].expand(-1, -1, 2))

    u = uniform(image, 3 * N_JOINTS, seed, "label").view(N, N_JOINTS, 3)
    lost = u[..., 0] < outliers * torch.where(visible, 0.5, 1.5)
    label = torch.where(lost[..., None], u[..., 1:] * size - 0.5, label)

    error = (label - uv).norm(dim=-1) / size
    blurred = 0.25 * normal(image, N_JOINTS, seed, "label confidence")
    confidence = 0.75 - 0.25 * ~visible - 1.2 * error.clamp(max=0.3) + blurred
    return label, confidence.clamp(0.02, 1)


# ---- the synthetic hands

BLOCK = 16                      # samples are made in aligned blocks, so their bits ignore the batch
SKIN = ((0.92, 0.78, 0.69), (0.90, 0.71, 0.59), (0.81, 0.60, 0.46),      # displayed, light to dark
        (0.66, 0.45, 0.33), (0.48, 0.31, 0.23), (0.32, 0.21, 0.16))


class Domain(NamedTuple):
    """What differs between two data sets of the same hands; pairs are uniform ranges."""
    tone: tuple[float, float] = (0.0, 1.0)          # along SKIN
    warmth: tuple[float, float] = (-0.2, 0.7)       # of the lamp: bluish .. orange
    ambient: tuple[float, float] = (0.25, 0.65)     # share of all light
    distance: tuple[float, float] = (0.45, 0.95)    # m, camera to hand
    off_axis: float = 0.25                          # largest tangent of the angle to the axis
    blur: tuple[float, float] = (0.0, 0.7)          # sigma, px of a 128 px picture
    noise: tuple[float, float] = (0.004, 0.025)     # of the display range
    shapes: int = 7                                 # in the background
    saturation: float = 0.12                        # of the background
    exposure: tuple[float, float] = (0.8, 1.3)      # factor of all light
    cast: float = 0.08                              # how far apart its three colours' factors lie
    upright: float = 0.0                            # share of hands with fingers up, palm or back
    edges: float = 0.0                              # chance of a side that the photo ends before


DOMAINS = {"A": Domain(),
           "B": Domain((0.25, 0.95), (0.3, 1.2), (0.1, 0.4), (0.28, 0.5), 0.45, (0.4, 1.2),
                       (0.015, 0.045), 14, 0.24),
           "C": Domain((0.0, 1.0), (-0.6, 1.3), (0.1, 0.75), (0.3, 1.6), 0.4, (0.0, 1.6),
                       (0.0, 0.05), 14, 0.3, (0.4, 2.0), 0.6, 0.6, 0.2)}
LENGTH = {"val": 1000, "test": 2000}


class Synthetic(Source):
    """Rendered hands with every label exact, in batches of DESIGN's sample dictionary; see `batch`.

    size px of the square image, `margin` x the box of the joints' pixels. `samples` is the length
    (32,560, 1,000, 2,000 for part train, val, test); parts and domains share no draw, and val and
    test ignore `seed`. views > 1 gives V synchronised cameras around the hand. `hand`: MANO arrays
    (our own). `backgrounds`: a folder of pictures instead of painted rooms. `calm`: palm to the
    camera within 60 degrees, +-45 in plane, plain backgrounds. Otherwise the hand's rotation is
    uniform on SO(3), so palm and back, and every angle between, are equally often seen.
    Domain B: darker skin, warm hard light, near wide-angle camera, colourful clutter, blur, noise.
    Domain C, to learn for photos: nearly all of both and more, under any exposure and colour cast,
    most hands with their fingers up, some near the edge of the photo.
    `outliers` and `detector` are the labels' noise: the share of lost joints, and how much of the
    picture's side the detector's own square had, in which it errs (see `noisy_labels`).
    """

    box_source = "joints"

    def __init__(self, size: int, samples: int | None = None, seed: int = 0, part: str = "train",
                 views: int = 1, hand: dict[str, np.ndarray] | None = None,
                 backgrounds: str | Path | None = None, calm: bool = False, occluders: bool = True,
                 domain: str = "A", margin: float = 1.5, outliers: float = 0.1,
                 detector: float = 1.0):
        if part not in ("train", "val", "test"):
            raise UserError(f"synthetic has the parts train, val and test, not {part!r}")
        if domain not in DOMAINS:
            raise UserError(f"synthetic has the domains {', '.join(DOMAINS)}, not {domain!r}")
        self.size = size
        self.views = views
        self.calm = calm
        self.margin = margin
        self.samples = LENGTH.get(part, 32560) if samples is None else samples
        self.domain = DOMAINS[domain]
        self.occluders = occluders and not calm
        self.outliers = outliers
        self.detector = detector
        kept = seed if part == "train" else 0           # val and test are the same for every seed
        self.settings = (size, self.samples, kept, part, views, calm, occluders, domain, margin,
                         outliers, detector)
        self.name = f"synthetic-{domain}-{part}" + (f"-{seed}" if part == "train" else "")
        self.seed = zlib.crc32(self.name.encode())                        # the parts' own streams
        self.hand = builtin_hand() if hand is None else hand
        self.backgrounds = None if backgrounds is None else _wallpapers(Path(backgrounds), size)
        self.mano = Mano(self.hand)
        loop = boundary(self.hand["f"])

        def ids(start: int, rings: int, n: int) -> list[list[int]]:
            return torch.arange(start, start + rings * n).view(rings, n).tolist()

        top = N_VERTS + len(ARM) * len(loop)                          # the occluder's poles first
        arm = tube([loop, *ids(N_VERTS, len(ARM), len(loop))])
        thing = tube([[top] * OCCLUDER[1], *ids(top + 2, *OCCLUDER), [top + 1] * OCCLUDER[1]])
        self.loop = torch.tensor(loop)
        self.n_hand = len(self.hand["f"])
        self.faces = torch.tensor([*self.hand["f"].tolist(), *arm, *thing])
        self.skin = self._skin_maps()

    def __len__(self) -> int:
        return self.samples

    def _skin_maps(self) -> Tensor:
        """How much a vertex is palm, and how near a joint's red: (778, 2) in 0..1."""
        verts = torch.tensor(self.hand["v_template"]).float()
        joints = self.mano.joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))[0]
        up = vertex_normals(verts[None], self.faces[:self.n_hand])[0][0, :, 1]
        near = torch.cdist(verts, joints[[k for k in range(2, 21) if k % 4 != 1]]).amin(1)
        return torch.stack([(0.5 - 0.9 * up).clamp(0, 1), torch.exp(-(near / 0.009) ** 2)], 1)

    def gives(self, key: str) -> bool:
        """See `Source`; every label is exact, and noisy 2D labels are made too."""
        return self.views > 1 if key == "cameras" else True

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`; `workers` have nothing to do."""
        return (self.batch(rows, device) for rows in plan)

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        out = self.batch(rows, self.faces.device)
        out["side_px"] = torch.full((len(rows),), float(self.size))
        return to_device({key: value for key, value in out.items() if key != "image"}, "cpu")

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> dict:
        """Samples `index` (B,) -> the sample dictionary, collated; with views > 1, (B, V, ...).

        Extra keys: `mask` (B[, V], S, S) uint8, 255 where the hand itself (no forearm) is seen;
        cameras (B, V, 4, 4) world to camera and view_ok (B, V) where views > 1. On a CPU, sample i
        has the same bits in every batch: aligned blocks of 16 are made and sliced, so scattered
        indices cost a block each (see `Cached`). IndexError outside 0 .. len - 1.
        """
        rows = self.rows(index)
        device = torch.device(device)
        if self.faces.device != device:
            self.move(device)
        if device.type == "cpu":
            blocks = sorted({row // BLOCK for row in rows})
            groups = [torch.arange(BLOCK * k, BLOCK * (k + 1)) for k in blocks]
            start = {k: BLOCK * n for n, k in enumerate(blocks)}
            take = torch.tensor([start[row // BLOCK] + row % BLOCK for row in rows])
        else:
            groups = index.to(device).split(64)
            take = slice(None)
        parts = [self.block(group) for group in groups]
        values = {key: torch.cat([part[key] for part in parts])[take] for key in parts[0]}
        return self.finish(values, rows)

    def rows(self, index: Tensor) -> list[int]:
        """The index (B,) as numbers; IndexError outside 0 .. len - 1, or without any."""
        rows = index.tolist()
        if not rows or not 0 <= min(rows) <= max(rows) < self.samples:
            raise IndexError(f"{self.name}: samples 0 .. {self.samples - 1}, asked for {rows[:9]}")
        return rows

    def finish(self, values: dict[str, Tensor], rows: list[int]) -> dict:
        """Tensors (B, V, ...) to the sample dictionary: no view axis for one camera."""
        if self.views == 1:
            values = {key: x.squeeze(1) for key, x in values.items()}
        yes = torch.ones(len(rows), dtype=torch.bool, device=values["K"].device)
        keys = ("K", "joints", "uv", "verts", "pose", "shape")
        return values | {"has": dict.fromkeys(keys, yes) | {"cameras": yes & (self.views > 1)},
                         "side": ["right"] * len(rows), "box_source": [self.box_source] * len(rows),
                         "id": [f"{self.name}-{row:06d}" for row in rows]}

    def move(self, device: torch.device) -> None:
        """Render on this device from now on."""
        self.mano.to(device)
        for name in ("faces", "loop", "skin", "backgrounds"):
            value = getattr(self, name)
            setattr(self, name, value if value is None else value.to(device))

    @torch.no_grad()
    def block(self, index: Tensor) -> dict[str, Tensor]:
        """Everything of samples `index` (B,) but the strings, each (B, V, ...)."""
        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(V, 0)                          # of samples, to their views

        def to_camera(x: Tensor) -> Tensor:
            return each(x) @ R.mT + t[:, None]

        V = self.views
        size = self.size
        device = index.device
        image = (index[:, None] * V + torch.arange(V, device=device)).flatten()
        R, t = self._cameras(index, image)                            # world to camera, (B V, ...)
        world = self._world(index, -R.view(-1, V, 3, 3)[:, 0, 2])
        verts = to_camera(world["mesh"])
        joints = to_camera(world["joints"])
        flat = joints[..., :2] / joints[..., 2:]
        low = flat.amin(1)
        high = flat.amax(1)
        extent = (high - low).amax(-1).maximum(0.06 / joints[:, 0, 2]) * self.margin
        K = crop((low + high) / 2, extent, size)                          # of a camera with f = 1
        uv = project(joints, K)
        light = Light(*(each(x) for x in self._light(index, world["lamp"])))
        light = light._replace(direction=(R @ light.direction[..., None])[..., 0])
        out = self._photograph(image, verts, joints, K, each(world["albedo"]), each(world["lit"]),
                               light)
        side = round(size * self.detector)
        rim = (size - side) / 2                                       # around the detector's square
        stray = WANDER * normal(index, 3 * N_JOINTS, self.seed, "label stray").view(-1, N_JOINTS, 3)
        astray = project(to_camera(world["joints"] + stray), K)
        label, confidence = noisy_labels(uv - rim, astray - rim, out["visible"], each(index), image,
                                         self.seed, side, self.outliers)
        label = label + rim
        pose = torch.cat([(R @ each(world["turn"]))[:, None], each(world["fingers"])], 1)
        wrist = each(world["wrist"])
        out |= {"crop": torch.eye(3, device=device).expand(len(K), 3, 3), "K": K, "joints": joints,
                "size": torch.full((len(K), 2), float(size), device=device), "uv": uv,
                "joints_ok": torch.ones_like(out["visible"]), "verts": verts[:, :N_VERTS],
                "uv_label": label, "confidence": confidence, "shape": each(world["shape"]),
                "pose": matrix_to_axis_angle(pose).flatten(1),
                "trans": (R @ each(world["origin"])[..., None])[..., 0] + t - wrist,
                "scale": (joints[:, 10] - joints[:, 9]).norm(dim=-1)}
        if V > 1:
            M = torch.cat([torch.cat([R, t[..., None]], 2),
                           torch.eye(4, device=device)[3:].expand(len(R), 1, 4)], 1)
            out |= {"cameras": M, "view_ok": torch.ones(len(R), dtype=torch.bool, device=device)}
        return {key: value.unflatten(0, (-1, V)) for key, value in out.items()}

    def _cameras(self, index: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """World to camera, R (B V, 3, 3) and t (B V, 3) m; one camera alone has the world's axes.

        Several stand on a ring around the origin, where the hand is, -20 .. 50 degrees above it;
        calm ones on 110 degrees of it in front of the palm, -20 .. 20 degrees.
        """
        V = self.views
        domain = self.domain
        seed = self.seed
        u = uniform(image, 6, seed, "camera")
        z = ramp(u[:, 0], *((0.6, 0.75) if self.calm else domain.distance))
        off = (0.05 if self.calm else domain.off_axis) * 1.4 * (u[:, 1:3] - 0.5)
        t = torch.cat([off * z[:, None], z[:, None]], 1)
        if V == 1:
            return torch.eye(3, device=index.device).expand(len(index), 3, 3), t
        phase = uniform(index, 1, seed, "ring").repeat_interleave(V, 0)[:, 0]
        angle = 2 * math.pi * ((image % V + 0.6 * (u[:, 3] - 0.5)) / V + phase)
        if self.calm:
            arc = (image % V + 0.5 + 0.6 * (u[:, 3] - 0.5)) / V - 0.5
            angle = math.radians(110) * arc - math.pi / 2
        rise = torch.deg2rad(ramp(u[:, 4], -20, 20 if self.calm else 50))
        flat = -rise.cos()
        forward = torch.stack([angle.cos() * flat, rise.sin(), angle.sin() * flat], -1)
        down = torch.tensor([0.0, 1, 0], device=index.device).expand_as(forward)
        x = F.normalize(torch.linalg.cross(down, forward), dim=-1)
        R = torch.stack([x, torch.linalg.cross(forward, x), forward], 1)
        return rotate_z(0.5 * (u[:, 5] - 0.5), R.mT).mT, t

    def _turns(self, index: Tensor) -> Tensor:
        """The hand's rotation in the world, (B, 3, 3)."""
        if not self.calm:                               # two normal vectors made orthonormal
            free = six_d_to_matrix(normal(index, 6, self.seed, "turn"))
            if not self.domain.upright:
                return free
        u = uniform(index, 3, self.seed, "cone")
        tilt = math.radians(60) * u[:, :1].sqrt()
        angle = 2 * math.pi * u[:, 1]
        axis = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1)
        roll = F.pad(math.radians(90) * (u[:, 2:] - 0.5), (2, 0))
        # palm to the camera, fingers up: hand x is down, y into the picture, z right
        base = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], device=index.device)
        leaning = axis_angle_to_matrix(roll) @ axis_angle_to_matrix(axis * tilt)
        if self.calm:
            return leaning @ base
        u = uniform(index, 2, self.seed, "upright")
        behind = base.new_tensor([[-1], [1], [-1]]) * base                # half a turn: the back
        side = torch.where((u[:, 0] < 0.5)[:, None, None], base, behind)
        return torch.where((u[:, 1] < self.domain.upright)[:, None, None], leaning @ side, free)

    def _world(self, index: Tensor, eye: Tensor) -> dict[str, Tensor]:
        """Hand, forearm and occluder around the world's origin, with their colours.

        eye (B, 3): from the hand to the first camera.
        """
        B = len(index)
        device = index.device
        seed = self.seed
        turn = self._turns(index)
        shape = draw_shape(index, seed)
        fingers = axis_angle_to_matrix(draw_pose(index, seed))
        flat = torch.eye(3, device=device).expand(B, 1, 3, 3)
        verts, joints = self.mano(torch.cat([flat, fingers], 1), shape)
        wrist = joints[:, 0]                                          # what rotations turn about
        verts, joints = ((x - wrist[:, None]) @ turn.mT for x in (verts, joints))
        origin = -(joints.amin(1) + joints.amax(1)) / 2
        verts = verts + origin[:, None]
        joints = joints + origin[:, None]
        u = uniform(index, 24, seed, "scene")
        cuff = torch.tensor([1.0, 3.0, 99.0, 99.0], device=device)[(u[:, 0] * 4).long()]
        arm = arm_verts(verts, joints, self.loop, u[:, 1:4], cuff, eye)
        thing = self._occluder(u[:, 4:18], joints, turn, eye)
        lamp = F.normalize(0.7 * normal(index, 3, seed, "lamp")
                           + torch.tensor([0, -0.7, -0.3], device=device) + 0.5 * eye, dim=-1)
        normals = vertex_normals(verts, self.faces[:self.n_hand])[0]
        sky, lit = occlusion(verts, normals, joints, lamp)
        albedo = self._skin_colours(index)
        bare = torch.ones_like(torch.cat([arm, thing], 1)[..., 0])
        cloth = painted(u[:, 18:21], 0.2)
        paint = painted(u[:, 21:24], 0.25)
        ring = torch.arange(arm.shape[1], device=device).div(len(self.loop), rounding_mode="floor")
        sleeve = (ring >= cuff[:, None])[..., None]
        # the arm goes on with the colours around the wrist
        albedo = albedo.square() * sky[..., None]
        rest = albedo[:, self.loop].repeat(1, len(ARM), 1)
        albedo = torch.cat([albedo, torch.where(sleeve, cloth[:, None].square(), rest),
                            paint[:, None].square().expand_as(thing)], 1)
        return {"mesh": torch.cat([verts, arm, thing], 1), "joints": joints, "lamp": lamp,
                "turn": turn, "origin": origin, "wrist": wrist, "fingers": fingers, "shape": shape,
                "albedo": albedo, "lit": torch.cat([lit, bare], 1)}

    def _skin_colours(self, index: Tensor) -> Tensor:
        """Colours of the hand's vertices as displayed, (B, 778, 3): human tones, palms lighter."""
        u = uniform(index, 6, self.seed, "skin")
        tone = ramp(u[:, 0], *self.domain.tone)
        table = torch.tensor(SKIN, device=index.device)
        at = tone * (len(SKIN) - 1)
        k = at.long().clamp_max(len(SKIN) - 2)
        skin = torch.lerp(table[k], table[k + 1], (at - k)[:, None])
        skin = (skin * (1 + 0.06 * (u[:, 1:4] - 0.5)))[:, None]           # (B, 1, 3)
        palm, red = self.skin.unbind(-1)                                  # (778,) each
        def row(*c: float) -> Tensor:
            return torch.tensor(c, device=index.device)

        pale = torch.lerp(skin, row(0.88, 0.66, 0.57), (0.12 + 0.45 * tone)[:, None, None])
        skin = torch.lerp(skin, pale, palm[:, None])
        skin = skin * (1 + (0.5 + u[:, 4])[:, None, None] * red[:, None] * row(0.03, -0.08, -0.07))
        return skin * (0.97 + 0.06 * uniform(index, N_VERTS, self.seed, "mottle")[..., None])

    def _occluder(self, u: Tensor, joints: Tensor, turn: Tensor, eye: Tensor) -> Tensor:
        """A ball, cylinder or box (B, N, 3) m held in the hand, or between it and the camera.

        Two samples of five have one; in the others all its vertices coincide, so nothing is drawn.
        """
        kind = (u[:, 0] * 3).long()                                       # ball, cylinder, box
        powers = torch.tensor([[1.0, 1.0], [0.1, 1.0], [0.12, 0.12]], device=u.device)[kind]
        held = (u[:, 1] < 0.5)[:, None]
        radius = ramp(u[:, 2:4], 0.010, 0.028)
        length = torch.where(kind == 0, radius[:, 0], ramp(u[:, 4], 0.025, 0.11))
        width = torch.where(kind == 2, radius[:, 1], radius[:, 0])
        half = torch.stack([radius[:, 0], width, length], 1)
        across = F.normalize(joints[:, 5] - joints[:, 17], dim=-1) + 0.4 * (u[:, 5:8] - 0.5)
        grip = 0.3 * joints[:, 0] + 0.7 * joints[:, [5, 9, 13, 17]].mean(1) \
            - turn[..., 1] * (0.014 + radius[:, :1])                      # -y: out of the palm
        pick = (u[:, 8] * N_JOINTS).long()
        front = joints[torch.arange(len(u), device=u.device), pick] \
            + eye * ramp(u[:, 9:10], 0.03, 0.07) + 0.03 * (u[:, 10:13] - 0.5)
        axis = F.normalize(torch.where(held, across, u[:, 5:8] - 0.5), dim=-1)
        z = torch.tensor([0.0, 0, 1], device=u.device)
        verts = occluder_verts(powers) * (half * (u[:, 13:] < 0.4 * self.occluders))[:, None]
        verts = verts @ rotation_between(z.expand_as(axis), axis * axis[:, 2:].sign()).mT
        return verts + torch.where(held, grip, front)[:, None]

    def _light(self, index: Tensor, lamp: Tensor) -> Light:
        """Lamp, from the direction `lamp` (B, 3) in the world, and surroundings of the samples."""
        def row(*c: float) -> Tensor:
            return torch.tensor(c, device=index.device)

        u = uniform(index, 4, self.seed, "light")
        warm = ramp(u[:, :1], *self.domain.warmth)
        share = ramp(u[:, 1:2], *self.domain.ambient)
        colour = (1 + warm * row(0.22, 0.0, -0.40)) * (1.15 - share) * 1.25
        ambient = (1 + 0.4 * (u[:, 2:3] - 0.6) * row(0.2, 0.0, -0.3)) * share * 1.1
        return Light(lamp, colour, ambient, 0.02 + 0.16 * u[:, 3] ** 2)

    def _photograph(self, image: Tensor, verts: Tensor, joints: Tensor, K: Tensor, albedo: Tensor,
                    lit: Tensor, light: Light) -> dict[str, Tensor]:
        """image (N, 3, S, S), mask (N, S, S), visible (N, 21); a few pictures at a time."""
        step = 16 if self.size <= 128 else 4
        out = []
        for a in range(0, len(image), step):
            s = slice(a, a + step)
            lamp = Light(*(x[s] for x in light))
            ids = rasterise(verts[s], self.faces, K[s], self.size)
            pixels = shade(ids, verts[s], self.faces, K[s], albedo[s], lamp, lit[s])
            hand = ((ids >= 0) & (ids < self.n_hand)).float()
            out.append((self._develop(image[s], pixels, lamp),
                        (F.avg_pool2d(hand, 2) * 255).round().byte(),
                        visible_joints(joints[s], verts[s], self.faces, K[s], ids)))
        return dict(zip(("image", "mask", "visible"), (torch.cat(x) for x in zip(*out))))

    def _develop(self, image: Tensor, pixels: Tensor, light: Light) -> Tensor:
        """Linear colours and coverage (N, 4, S, S) -> uint8 (N, 3, S, S), as a camera stores it."""
        domain = self.domain
        size = self.size
        seed = self.seed
        u = uniform(image, 6, seed, "exposure")
        tint = light.ambient + 0.5 * light.colour
        if self.backgrounds is None:
            room = scenery(image, seed, size, domain.shapes, domain.saturation, self.calm)
        else:
            room = self._wallpaper(image)
        tint = (tint / tint.mean(1, keepdim=True)).sqrt()[..., None, None]
        linear = pixels[:, :3] + room.square() * tint * (1 - pixels[:, 3:])
        gain = ramp(u[:, :1], *domain.exposure) * (1 + domain.cast * (u[:, 1:4] - 0.5))
        sigma = ramp(u[:, 4], *domain.blur) * size / 128
        linear = blur(linear, sigma, math.ceil(2 * domain.blur[1] * size / 128))
        display = (linear * gain[..., None, None]).clamp(0, 1).sqrt()
        words = bits(image, size * size, seed, "grain").view(len(image), 1, size, size)
        grain = [((words >> k) & 1023) + ((words >> (k + 10)) & 1023) for k in (3, 23, 43)]
        grain = (torch.cat(grain, 1) - 1023).float() / 417.7              # triangular, variance 1
        display = display + grain * ramp(u[:, 5], *domain.noise)[:, None, None, None]
        if domain.edges:                                     # outside of a photo pictures are black
            ends, cut = uniform(image, 8, seed, "edges").chunk(2, 1)
            reach = torch.where(cut < domain.edges, ramp(ends, min(1.1 / self.margin, 1), 1), 1)
            at = torch.linspace(-1, 1, size, device=image.device)
            x, y = ((-at <= reach[:, k:k + 1]) & (at <= reach[:, k + 1:k + 2]) for k in (0, 2))
            display = display * (y[:, None, :, None] & x[:, None, None])
        return (display * 255 + 0.5).clamp(0, 255).byte()

    def _wallpaper(self, image: Tensor) -> Tensor:
        """A random square of one of the user's pictures, (N, 3, S, S) in 0..1."""
        u = uniform(image, 5, self.seed, "wallpaper")
        wide = self.backgrounds.shape[-1]
        which = (u[:, 0] * len(self.backgrounds)).long()
        side = ramp(u[:, 1], 0.5, 1) * wide
        middle = side[:, None] / 2 - 0.5 + u[:, 2:4] * (wide - side)[:, None]
        A = flip(u[:, 4] < 0.5, self.size) @ crop(middle, side, self.size)
        return (warp(self.backgrounds[which].float(), A, self.size, samples=2) / 255).clamp(0, 1)


def _wallpapers(folder: Path, size: int) -> Tensor:
    """All pictures below `folder`, centre squares of 2 size px: (N, 3, 2 size, 2 size) uint8.

    UserError for a folder without pictures and for a broken picture.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"--backgrounds {folder}: no .jpg or .png picture in this folder")
    try:
        out = [np.asarray(ImageOps.fit(Image.fromarray(read_image(file)), (2 * size, 2 * size)))
               for file in files]
    except UserError as error:
        raise UserError(f"--backgrounds: {error}; remove it") from None
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


class Cached(Source):
    """A `Synthetic` rendered once on the CPU and `Kept`; `.batch` gives those bits.

    The size is printed first. The file's name holds a hash of every parameter, the hand, the
    backgrounds and the first block as rendered now, so a stale file is never used. A killed run
    goes on where it stopped, and of several processes one renders while the others wait.
    With `most` no more than the first samples are rendered beforehand, and others when they are
    asked for. UserError where the disk has no room.
    """

    def __init__(self, source: Synthetic, folder: str | Path, most: int | None = None):
        self.source = source
        self.name = source.name
        self.views = source.views
        self.box_source = source.box_source
        first = self._records(0)
        mark = hashlib.sha256(repr((source.settings, first.dtype)).encode() + first.tobytes())
        for name, value in sorted(source.hand.items()):
            mark.update(name.encode() + np.asarray(value).tobytes())
        if source.backgrounds is not None:
            mark.update(source.backgrounds.numpy())
        path = Path(folder) / f"{source.name}-{mark.hexdigest()[:16]}.squares"
        self.kept = Kept(path, first.dtype, len(source))
        count = len(source) if most is None else min(most, len(source))
        if not self.kept.marks[:count].all():
            self._render(count)

    def __len__(self) -> int:
        return len(self.source)

    def _records(self, block: int) -> np.ndarray:
        """One aligned block as a structured array (16,), a field a key."""
        values = self.source.block(torch.arange(BLOCK * block, BLOCK * (block + 1)))
        arrays = {key: value.contiguous().numpy() for key, value in values.items()}
        out = np.empty(BLOCK, [(key, x.dtype, x.shape[1:]) for key, x in arrays.items()])
        for key, x in arrays.items():
            out[key] = x
        return out

    def _render(self, count: int) -> None:
        """Render every block of the first `count` samples that is not there."""
        kept = self.kept
        print(f"rendering {count} samples of {self.name} into {kept.path}: "
              f"{kept.whole / 1e6 * count / kept.n:.0f} MB")
        with locked(kept.path.with_suffix(".lock")):
            gone = np.flatnonzero(kept.marks[:count] == 0)
            need = len(gone) * kept.record.itemsize
            free = shutil.disk_usage(kept.path.parent).free
            if need > free:
                raise UserError(f"--cache {kept.path.parent}: {need / 1e6:.0f} MB needed, "
                                f"{free / 1e6:.0f} MB free; lower --samples or --image-size")
            blocks = np.unique(gone // BLOCK).tolist()
            for block in tqdm(blocks, "rendering", unit="block"):
                self._keep(block)

    def _keep(self, block: int) -> None:
        """Render one block; UserError where the disk is full."""
        first = BLOCK * block
        self.kept.write(first, self._records(block)[:self.kept.n - first])
        if self.kept.full:
            raise UserError(f"--cache {self.kept.path.parent}: is full; make room, or lower "
                            "--samples or --image-size")

    def _found(self, rows: list[int]) -> np.ndarray:
        """The records (B,) of some samples; what a power cut tore is rendered again."""
        for row in rows:
            if self.kept.read(row) is None:
                self._keep(row // BLOCK)
        return self.kept.records[rows]

    def gives(self, key: str) -> bool:
        """See `Source`."""
        return self.source.gives(key)

    def batches(self, plan: list[Tensor], device: torch.device, workers: int) -> Iterator[dict]:
        """See `Source`; `workers` have nothing to do."""
        return (self.batch(rows, device) for rows in plan)

    def targets(self, rows: Tensor) -> dict:
        """See `Source`."""
        found = self._found(self.source.rows(rows))
        values = {key: torch.from_numpy(found[key].copy()) for key in found.dtype.names
                  if key != "image"}
        side = torch.full((len(rows),), float(self.source.size))
        return self.source.finish(values, rows.tolist()) | {"side_px": side}

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> dict:
        """As `Synthetic.batch`, read back: the bits of its CPU rendering, whatever the device."""
        rows = self.source.rows(index)
        found = self._found(rows)
        values = {key: torch.from_numpy(found[key].copy()).to(device) for key in found.dtype.names}
        return self.source.finish(values, rows)
