"""TI-Net: Learning Transformation-Isomorphic Latent Space for Accurate Hand Pose Estimation.

Ren, Hu, Zhang, Ye, Xia; Pacific Graphics 2025, DOI 10.2312/pg.20251270. The row reproduced is
Table 2 and Table 3 "Ours": ResNet-50, ImageNet-1K, DexYCB 16.79 / 4.91 mm MPJPE / PA-MPJPE (see
the last point below for what that protocol is).

    python ti_net.py --quick                                          minutes on a CPU, no data
    python ti_net.py --data imagenet --root DIR                       the paper's pre-training
    python ti_net.py --init runs/ti_net-imagenet/backbone.pt --finetune dexycb=DIR

The idea: flipping and turning a picture must act on its latent as a linear map, and two of them in
a row as the product of their maps (Table 1), so that the latent keeps what a pose needs.

Letters: I picture, v latent (B, d), H flip, R_a turn by a counter-clockwise, HR_a flip THEN turn,
T the latent's operators (Eq. 3), e embedded angle (n), r rank, w weight of the constraints,
theta (48) axis-angle MANO pose, beta (10) MANO shape. B batch, P pictures of one sample.

Differs from the paper
 1. Latent. Eq. 3 concatenates one vector; we pool the 7x7x2048 map to d = 2048 (authors' code: the
    same), and the decoder reads the map. `decode-latent` reconstructs from the vector, as Eq. 1 says.
 2. Composition. Alg. 1, line 13 writes F1 o F2. Only "F1 first, then F2" agrees with Table 1 and
    Eq. 2; the usual right-to-left reading gives a wrong target in 7 of 9 cells.
 3. Angles. Alg. 1 uses the same two angles in both places, Table 1 four; four cover the whole table,
    shared by all losses. `algorithm-1` draws as printed.
 4. Passes. Pictures reached by several compositions are encoded once: 12 per sample, not 27.
 5. Norms. Printed unsquared; we take mean squares (authors' code), for which w = 0.001 was set.
    `unsquared` is as printed; latent norms then grow some 45 times, picture norms 388 times.
 6. Identity. T_R(v; 0) = v is added (authors' code; costs no picture). `no-identity` leaves it out.
 7. Embedding. Text: two layers. Code: 2-32-32-32, the last without bias; ours is the code's, n = 32,
    r = 128. `two-layer-embedding` is the text's.
 8. M starts at zero, so every operator starts as the identity. `random-m` starts it as the code does.
 9. Turning. Radians about (W - 1) / 2. The code readable to us (Mine268/TI-Net, utils/utils.py
    @3d89d588) hands radians to a function of degrees and turns about W / 2: `degrees`, `half-pixel`.
10. Corners. Turned pictures would show black corners that give the angle away. We cut views from a
    larger square, without any. `black-corners` is the code's way, `disc` masks every view.
11. Decoder. Five transposed convolutions, last layer linear, since targets have both signs.
    `relu-decoder` ends in BatchNorm and ReLU as the code does (resnet/resnet.py @078cab41).
12. Reconstruction: the mean over every encoded picture (authors' code). Alg. 1 sums over H, R and HR;
    `reconstruct-3` takes the mean over these, with the angles of line 4.
13. Schedule. Paper: AdamW, 50 epochs, batch 68, base rate 1.5e-3. Ours, after the authors' logs: rate
    x batch / 256, one epoch of warm-up, cosine, weight decay 0.05, clip 5. Crops keep at least 0.4 of
    the area (they are then cut 1.4 times tighter); `authors-crops` keeps 0.2 and turns the source too.
14. Fine-tuning. Paper: crop, three layers, MANO pose. The rest is the authors' logged recipe (logs/
    23-20241016-1): L1 on rotation matrices, rate 7.5e-4 constant, batch 128, 120 epochs, no decay. We
    start the last layer at zero and at the training set's mean pose, and add shape and a weak-
    perspective camera, read from detached features, so pictures can be drawn; where a data set has
    joints but no MANO pose, L1 on rooted joints, 10 a metre, stands in.
15. Limit (ours, proved in the tests): the linear part of Eq. 3 does not depend on the angle, so where
    all constraints hold exactly, latents do not change under rotation at all. `modulated` lets the
    angle multiply the rank-r code, v + M((N v) * g(e)), which can represent rotations.
16. Protocol. The authors' test poses truth and prediction with the TRUE betas and averages over all
    frames, unlabelled ones too (test_DexYCB.py @7c7f2779), on which their loader also trains; eval.py
    prints that beside the tool kit's. We do not train on them, so our number there is no better for it.
17. Data and batch. Paper: ImageNet-1K, 50 epochs, batch 68. The readable logs pre-train on ImageNet-
    21K-P with 63-64 pictures on each of 4-6 GPUs, and the headline run starts from epoch 9. We read
    68 as the whole batch; BatchNorm sees 17 samples x 12 pictures. No gradient is stopped anywhere.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import (
    BACKBONES, Flags, Mano, Run, UserError, accumulate, arg, autocast, average_buffers,
    axis_angle_to_matrix, barrier, batches, build_backbone, cpu_state, crop, decay_groups,
    denormalise, flip, guarded, invert, load_backbone, normalise, parallel, rank, recall,
    remember, rotation, row_name, save_checkpoint, say, settle, steps_per_epoch,
    training_steps, transform, translation, uniform, unwrapped, warp)
from hand import user_hand
from hand.drawing import draw_skeleton, sheet
from sources import DATASET_TIPS, data_name, open_data
from sources.judging import keep_best, launch, mean_hand, probe_error, report

import torch
from torch import Tensor, nn

# ---- Config ---------------------------------------------------------------------------------------

METHOD = "ti_net"
MARGIN = 1.7           # stored square / hand box: 1.2 (fine-tuning crop) x sqrt(2), so views can turn
STORE = 1.5            # stored side / network side: sqrt(2) to turn freely, and some to shrink from
CROP = 1.2             # fine-tuning crop / hand box (authors' code)
CLIP = 5.0             # largest norm of pre-training's whole gradient (authors' log)

VARIANTS = {
    "no-ordinary": "leave out L_ord (Eq. 2)",
    "no-secondary": "leave out L_sec (Eq. 2)",
    "no-reconstruction": "leave out L_classic (Eq. 1)",
    "no-identity": "leave out T_R(v; 0) = v (authors' code)",
    "algorithm-1": "two angles, drawn again for L_sec, as Alg. 1 prints (lines 4 and 10)",
    "five-ordinary": "ordinary terms for both pairs of angles (authors' code: 14 pictures)",
    "reconstruct-3": "reconstruct H, R, HR only (Alg. 1, line 16)",
    "decode-latent": "reconstruct from the pooled latent (Eq. 1, literally)",
    "unsquared": "norms without the square (Eq. 2, Alg. 1)",
    "two-layer-embedding": "K of two layers (Sec. 3.3)",
    "random-m": "M starts random, not at zero (authors' code)",
    "modulated": "T(v; a) = v + M((N v) * g(e)): can represent rotations (ours)",
    "relu-decoder": "decoder ends in BatchNorm and ReLU (authors' code)",
    "degrees": "pictures turn by a degrees where operators get a radians (authors' code)",
    "half-pixel": "turn about W / 2, half a pixel off the flip's axis (authors' code)",
    "black-corners": "turn the network's own square: black corners (authors' code)",
    "disc": "as black-corners, and every view masked to the inscribed disc (ours)",
    "authors-crops": "source crops of 0.2 to 1 of the area, turned by 0 to 360 degrees",
}

QUICK = {"pretrain": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=1,
                          batch_size=64, micro_batch=64, samples=2240, decoder_width=32, probe_every=0,
                          warmup_epochs=0.1, workers=0),
         "finetune": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=6,
                          batch_size=64, micro_batch=64, samples=2240, workers=0)}


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("resnet50", "encoder E", paper="resnet50", ref="Tab. 2", choices=BACKBONES)
    image_size: int = arg(224, "side of the network's input, px", paper=224, ref="Sec. 4.1")
    epochs: int = arg(50, "passes over the data", paper=50, ref="Sec. 4.1",
                      finetune=120, finetune_why="authors' log")
    batch_size: int = arg(68, "samples a step, over all processes", paper=68, ref="Sec. 4.1",
                          finetune=128, finetune_why="authors' log")
    micro_batch: int = arg(17, "samples at a time, the unit of BatchNorm; a sample of ResNet-50 "
                           "at 224 px takes 0.9 GiB in bfloat16 (CUDA), 1.7 in float32", why="ours",
                           finetune=32, finetune_why="ours")
    lr: float = arg(1.5e-3, "base learning rate; the rate is base x batch / 256", paper=1.5e-3,
                    ref="Sec. 4.1", finetune=1.5e-3, finetune_why="7.5e-4 at 128: authors' log")
    warmup_epochs: float = arg(1.0, "epochs of linear warm-up, then cosine to 0; 0: constant rate",
                               finetune=0.0, finetune_why="constant: authors' log")
    weight_decay: float = arg(0.05, "AdamW's decay, not on biases and norms",
                              finetune=0.0, finetune_why="authors' log")
    w: float = arg(1e-3, "weight of the constraints", paper=1e-3, ref="Sec. 3.2, below Eq. 1")
    rank: int = arg(128, "r of the operators; the paper: r << d")
    embed_dim: int = arg(32, "n of the embedded angle")
    decoder_width: int = arg(256, "channels inside the decoder")
    probe_every: int = arg(5, "epochs between two frozen-probe pose errors (0: none)")
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS))


# ---- Views: 12 pictures of one sample, each one warp of the source (Sec. 3.1, Table 1) ------------


class Element(NamedTuple):
    """A member of {H, R, HR}: flip first (0 or 1), then turn by the sum of turns x drawn angles."""

    flip: int
    turns: tuple[int, ...]


def compose(first: Element, then: Element) -> Element:
    """Table 1: `first`, then `then`. From R_b H^g R_a H^f and H R_a = R_-a H (rows apply first)."""
    sign = -1 if then.flip else 1
    return Element(first.flip ^ then.flip,
                   tuple(t + sign * f for f, t in zip(first.turns, then.turns)))


class Plan(NamedTuple):
    """Which pictures a sample needs and which constraints tie them; pictures[0] is the source."""

    pictures: list[Element]
    ordinary: list[tuple[str, int, int]]                   # operator, its angle, picture
    secondary: list[tuple[str, int, str, int, int]]        # first, its angle, then, its angle, picture


def constraint_plan(variant: tuple[str, ...]) -> Plan:
    """Eq. 2, Alg. 1: the ordinary terms, all nine ordered pairs, every distinct picture once.

    Angles are a1, a2 (first operation), b1, b2 (second), columns 0-3 of what `draw_angles` returns;
    -1 stands for an operation without one. Under `algorithm-1` the columns are alpha, beta of line 4
    and those of line 10.
    """
    turn = lambda k: tuple(int(k == j) for j in range(4))
    make = lambda r, hr: [("H", -1, Element(1, turn(-1))), ("R", r, Element(0, turn(r))),
                          ("HR", hr, Element(1, turn(hr)))]
    literal = "algorithm-1" in variant
    ordinary, first, then = make(0, 1), make(*((2, 3) if literal else (0, 1))), make(2, 3)
    if "five-ordinary" in variant:
        ordinary = ordinary + [op for op in then if op not in ordinary]
    pictures = [Element(0, turn(-1))]

    def number(element: Element) -> int:
        if element not in pictures:
            pictures.append(element)
        return pictures.index(element)

    once = [(name, angle, number(element)) for name, angle, element in ordinary]
    twice = [(n1, k1, n2, k2, number(compose(e1, e2)))
             for n1, k1, e1 in first for n2, k2, e2 in then]
    return Plan(pictures, once, twice)


def stored_side(cfg: Config) -> int:
    """Side of the pictures that the data sets yield, px."""
    return round(STORE * cfg.image_size)


def draw_angles(index: Tensor, cfg: Config, epoch: int) -> Tensor:
    """Alg. 1, lines 4 and 10: U(0, 2 pi), (B,) samples -> (B, 4) rad."""
    return 2 * math.pi * uniform(index, 4, cfg.seed, "ti_net angles", epoch)


def draw_source(index: Tensor, side: int, cfg: Config, epoch: int, square: int) -> Tensor:
    """Random resized crop of the stored picture onto a source square: (B,) -> (B, 3, 3)."""
    u = uniform(index, 5, cfg.seed, "ti_net crop", epoch)
    authors = "authors-crops" in cfg.variant
    least = 0.2 if authors else 0.4
    area, ratio = least + (1 - least) * u[:, 0], (3 / 4) ** (1 - 2 * u[:, 1])
    width = (side * (area * ratio).sqrt()).clamp(max=side)
    height = (side * (area / ratio).sqrt()).clamp(max=side)
    x, y = u[:, 2] * (side - width), u[:, 3] * (side - height)              # left and top edge, px
    zero, one, sx, sy = torch.zeros_like(x), torch.ones_like(x), square / width, square / height
    A = torch.stack([sx, zero, (0.5 - x) * sx - 0.5, zero, sy, (0.5 - y) * sy - 0.5,
                     zero, zero, one], -1).unflatten(-1, (3, 3))
    return rotation(2 * math.pi * u[:, 4] * authors, square) @ A


def view_transforms(angles: Tensor, source: Tensor, plan: Plan, cfg: Config, square: int) -> Tensor:
    """Stored picture -> every view, (B, 4) rad and (B, 3, 3) -> (B, P, 3, 3). Composed, warped once."""
    if "degrees" in cfg.variant:
        angles = angles * math.pi / 180
    turns = torch.tensor([e.turns for e in plan.pictures], device=angles.device)      # (P, 4)
    flips = torch.tensor([e.flip for e in plan.pictures], device=angles.device)
    total = angles @ turns.to(angles.dtype).T                                         # (B, P) rad
    axis = square + 1 if "half-pixel" in cfg.variant else square
    cut = translation(torch.full_like(angles[:, :2], -(square - cfg.image_size) / 2))[:, None]
    turn = rotation(total.flatten(), axis).view(*total.shape, 3, 3)
    return cut @ turn @ flip(flips, square).to(angles) @ source[:, None]


def make_views(batch: dict, cfg: Config, epoch: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A batch -> its views (B, P, 3, S, S), the angles (B, 4) rad and the transforms (B, P, 3, 3)."""
    image, index, S = batch["image"], batch["index"], cfg.image_size
    corners = {"black-corners", "disc"} & set(cfg.variant)
    square = S if corners else math.ceil(S * math.sqrt(2))
    angles = draw_angles(index, cfg, epoch)
    source = draw_source(index, image.shape[-1], cfg, epoch, square)
    A = view_transforms(angles, source, plan, cfg, square)
    views = normalise(warp(image, A, S))
    if "disc" in cfg.variant:
        x = torch.arange(S, device=image.device) - (S - 1) / 2
        views = views * (x[:, None] ** 2 + x ** 2 <= (S / 2) ** 2)
    return views, angles, A


# ---- Model (Sec. 3.2, 3.3) ------------------------------------------------------------------------


class Operator(nn.Module):
    """T(v) = v + M N v, with an angle v + M N cat(v, e): Sec. 3.2 and Eq. 3. `modulated`: see 15."""

    def __init__(self, d: int, n: int, cfg: Config):
        super().__init__()
        self.modulated = n > 0 and "modulated" in cfg.variant
        self.N = nn.Linear(d if self.modulated else d + n, cfg.rank, bias=False)
        self.M = nn.Linear(cfg.rank, d, bias=False)
        self.g = nn.Linear(n, cfg.rank) if self.modulated else None
        if "random-m" not in cfg.variant:
            nn.init.zeros_(self.M.weight)

    def forward(self, v: Tensor, e: Tensor | None = None) -> Tensor:
        if self.modulated:
            return v + self.M(self.N(v) * self.g(e))
        return v + self.M(self.N(v if e is None else torch.cat([v, e], -1)))


class Operators(nn.Module):
    """T_H, T_R, T_HR and the embedding K that the last two share (Eq. 3)."""

    def __init__(self, d: int, cfg: Config):
        super().__init__()
        n = cfg.embed_dim
        self.T = nn.ModuleDict({"H": Operator(d, 0, cfg), "R": Operator(d, n, cfg),
                                "HR": Operator(d, n, cfg)})
        layers = [nn.Linear(2, n), nn.ReLU(), nn.Linear(n, n)]
        if "two-layer-embedding" not in cfg.variant:
            layers += [nn.ReLU(), nn.Linear(n, n, bias=False)]
        self.K = nn.Sequential(*layers)

    def forward(self, name: str, v: Tensor, angle: Tensor | None) -> Tensor:
        """Apply T_name to v (B, d), with the angle (B,) rad where it has one."""
        if name == "H":
            return self.T["H"](v)
        return self.T[name](v, self.K(torch.stack([angle.cos(), angle.sin()], -1)))


class Decoder(nn.Sequential):
    """D_aux: one transposed convolution for each halving of the encoder, map -> normalised picture."""

    def __init__(self, d: int, stride: int, cfg: Config):
        widths = [d] + [cfg.decoder_width] * (int(math.log2(stride)) - 1) + [3]
        layers: list[nn.Module] = []
        for k, (a, b) in enumerate(zip(widths, widths[1:])):
            layers.append(nn.ConvTranspose2d(a, b, 4, 2, 1))
            if k + 2 < len(widths) or "relu-decoder" in cfg.variant:
                layers += [nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Moved(NamedTuple):
    """What one pass yields; each *_hat is what the operators make of v."""

    v: Tensor                            # (B, P, d) latents of all pictures, the source first
    ordinary: Tensor                     # (B, terms, d)
    secondary: Tensor                    # (B, 9, d)
    identity: Tensor                     # (B, d) T_R(v; 0)
    pictures: Tensor | None              # (B, Q, 3, S, S) reconstructions


class TINet(nn.Module):
    """Encoder, operators and decoder; the last two are thrown away after pre-training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.variant, self.plan = cfg.variant, constraint_plan(cfg.variant)
        self.backbone = build_backbone(cfg.backbone, cfg.image_size)
        d, stride = self.backbone.dim, self.backbone.stride
        self.operators = Operators(d, cfg)
        if cfg.image_size % stride:
            raise UserError(f"--image-size {cfg.image_size}: pre-training decodes maps of stride "
                            f"{stride}, so it must be a multiple of that")
        self.decoder = None if "no-reconstruction" in cfg.variant else Decoder(d, stride, cfg)
        every = list(range(len(self.plan.pictures)))
        self.decoded = [1, 2, 3] if "reconstruct-3" in cfg.variant else every

    def forward(self, views: Tensor, angles: Tensor) -> Moved:
        """(B, P, 3, S, S) and (B, 4) rad: every picture encoded once, every constraint's two sides."""
        B, P = views.shape[:2]
        flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(flat)[-1]                                                # (B P, d, h, w)
        pictures = self.decode(maps.unflatten(0, (B, P))[:, self.decoded]) if self.decoder else None
        with torch.autocast(views.device.type, enabled=False):
            latents = maps.to(torch.promote_types(maps.dtype, torch.float32)).mean((2, 3))
            v = latents.view(B, P, -1)
            return Moved(v, *self.move(v[:, 0], angles.to(v.dtype)), pictures)

    def decode(self, maps: Tensor) -> Tensor:
        """(B, Q, d, h, w) -> (B, Q, 3, S, S)."""
        B, (h, w) = maps.shape[0], maps.shape[-2:]
        if "decode-latent" in self.variant:
            maps = maps.mean((3, 4), keepdim=True).expand(-1, -1, -1, h, w)
        return self.decoder(maps.flatten(0, 1)).unflatten(0, (B, -1))

    def move(self, v: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operators' side of Eq. 2 for the source's latent v (B, d)."""
        T = lambda name, u, k: self.operators(name, u, None if k < 0 else angles[:, k])
        firsts = {(name, k): T(name, v, k) for name, k, *_ in self.plan.ordinary + self.plan.secondary}
        ordinary = torch.stack([firsts[name, k] for name, k, _ in self.plan.ordinary], 1)
        secondary = torch.stack([T(n2, firsts[n1, k1], k2)
                                 for n1, k1, n2, k2, _ in self.plan.secondary], 1)
        return ordinary, secondary, self.operators("R", v, torch.zeros_like(angles[:, 0]))


# ---- Losses (Eq. 1, 2) ----------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor, unsquared: bool = False) -> Tensor:
    """(B, ...) twice -> scalar: mean square over batch and entries, or the batch's mean norm (5)."""
    difference = (a - b).to(torch.promote_types(a.dtype, torch.float32))
    if unsquared:
        return difference.flatten(1).norm(dim=1).mean()
    return difference.square().mean()


def ordinary_loss(v: Tensor, moved: Tensor, plan: Plan, unsquared: bool = False) -> Tensor:
    """Eq. 2, L_ord: sum over operations of |E(F I) - T_F(E I)|; v (B, P, d), moved (B, terms, d)."""
    return sum(distance(v[:, picture], moved[:, k], unsquared)
               for k, (*_, picture) in enumerate(plan.ordinary))


def secondary_loss(v: Tensor, moved: Tensor, plan: Plan, unsquared: bool = False) -> Tensor:
    """Eq. 2, L_sec: sum over the nine ordered pairs of |E(then(first(I))) - T_then(T_first(E I))|."""
    return sum(distance(v[:, picture], moved[:, k], unsquared)
               for k, (*_, picture) in enumerate(plan.secondary))


def rotation_loss(theta: Tensor, target: Tensor) -> Tensor:
    """Fine-tuning (14): L1 between rotation matrices, (B, 48) axis-angle twice -> (B,), summed."""
    R, R_true = (axis_angle_to_matrix(x.unflatten(-1, (16, 3))) for x in (theta, target))
    return (R - R_true).abs().flatten(1).sum(1)


@torch.no_grad()
def collapse_monitors(out: Moved, plan: Plan) -> dict[str, Tensor]:
    """Three numbers that tell an isomorphic latent from a collapsed one (15).

    variance: of v over the batch, mean over entries. turn_change: |E(R I) - E(I)|^2 over that variance,
    0 where turning changes nothing. residual: |E(R I) - T_R(E I)|^2 over |E(R I) - E(I)|^2, 1 where
    the operator does no better than the identity.
    """
    k, picture = next((k, p) for k, (name, _, p) in enumerate(plan.ordinary) if name == "R")
    v, turned = out.v[:, 0], out.v[:, picture]
    variance = v.var(0, correction=0).mean()
    change = distance(turned, v)
    left = distance(turned, out.ordinary[:, k])
    return {"variance": variance, "turn_change": change / variance.clamp(min=1e-12),
            "residual": left / change.clamp(min=1e-12)}


# ---- Fine-tuned network (Sec. 4.1, last sentence) -------------------------------------------------


def hand_view(image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Stored squares (B, 3, L, L) -> what the network sees, (B, 3, size, size), and how, (1, 3, 3)."""
    L = image.shape[-1]
    middle = torch.full((1, 2), (L - 1) / 2, device=image.device)
    A = crop(middle, torch.full((1,), L * CROP / MARGIN, device=image.device), size)
    return normalise(warp(image, A.expand(len(image), 3, 3), size)), A


class HandNet(nn.Module):
    """Back-bone, global average, three linear layers to theta; beside them shape and a camera (14)."""

    USES = {"image"}

    def __init__(self, cfg: Config):
        super().__init__()
        self.size = cfg.image_size
        self.backbone = build_backbone(cfg.backbone, cfg.image_size)
        d = self.backbone.dim
        self.head = nn.Sequential(nn.Linear(d, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                                  nn.Linear(1024, 48))
        self.extra = nn.Sequential(nn.Linear(d + 48, 256), nn.ReLU(), nn.Linear(256, 13))
        for last in (self.head[-1], self.extra[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mano = Mano(user_hand(cfg.mano)[0], DATASET_TIPS.get(data_name(cfg.finetune), "smplx"))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) normalised -> theta (B, 48) rad, beta (B, 10), camera (B, 3)."""
        maps = self.backbone(crops.contiguous(memory_format=torch.channels_last))[-1]
        with torch.autocast(crops.device.type, enabled=False):
            f = maps.to(torch.promote_types(maps.dtype, torch.float32)).mean((2, 3))
            theta = self.head(f)
            extra = self.extra(torch.cat([f, theta], 1).detach())
            return theta, extra[:, :10], extra[:, 10:]

    def project(self, camera: Tensor, points: Tensor) -> Tensor:
        """Weak perspective: wrist-rooted points (B, N, 3) m -> (B, N, 2) px of the crop.

        camera = (log scale, tx, ty); at 0 a metre spans ten half crops and the wrist is central.
        """
        xy = 10 * camera[:, None, :1].exp() * points[..., :2] + camera[:, None, 1:]
        return (self.size - 1) / 2 + self.size / 2 * xy

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """{"image"} -> wrist-rooted joints and verts, m; uv, px of image; pose, shape."""
        crops, A = hand_view(batch["image"], self.size)
        with autocast(crops.device):
            theta, beta, camera = (x.float() for x in self(crops))
        R = axis_angle_to_matrix(theta.unflatten(-1, (16, 3)))
        verts, joints = self.mano(R, beta)
        verts, joints = verts - joints[:, :1], joints - joints[:, :1]
        uv = transform(invert(A), self.project(camera, joints))
        return {"joints": joints, "verts": verts, "uv": uv, "pose": R, "shape": beta}


def build(cfg: Config) -> HandNet:
    """The network that eval.py judges."""
    return HandNet(cfg)


# ---- Training -------------------------------------------------------------------------------------


def lr_at(step: int, cfg: Config, steps: int) -> float:
    """Rate at a step, `steps` to an epoch: base x batch / 256, warm-up, cosine to 0 (13, 14)."""
    peak, warm = cfg.lr * cfg.batch_size / 256, cfg.warmup_epochs * steps
    if step < warm:
        return peak * (step + 1) / warm
    if not cfg.warmup_epochs:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.epochs * steps - warm)))


def pretrain_step(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Algorithm 1 for one micro-batch: the terms and their weighted sum, Eq. 1."""
    plan, unsquared = constraint_plan(cfg.variant), "unsquared" in cfg.variant
    views, angles, _ = make_views(batch, cfg, epoch, plan)
    with autocast(views.device):                    # the network only: bfloat16 matrices miss pixels
        out = net(views, angles)
    target = views[:, [1, 2, 3]] if "reconstruct-3" in cfg.variant else views
    L_ord = ordinary_loss(out.v, out.ordinary, plan, unsquared)
    L_sec = secondary_loss(out.v, out.secondary, plan, unsquared)
    L_id = distance(out.identity, out.v[:, 0], unsquared)
    L_classic = L_ord.new_zeros(()) if out.pictures is None else sum(
        distance(picture, true, unsquared)
        for picture, true in zip(out.pictures.unbind(1), target.unbind(1))) / target.shape[1]
    on = {name: float(f"no-{name}" not in cfg.variant) for name in ("ordinary", "secondary", "identity")}
    loss = L_classic + cfg.w * (
        on["ordinary"] * L_ord + on["secondary"] * L_sec + on["identity"] * L_id)
    return {"loss": loss, "L_classic": L_classic, "L_ord": L_ord, "L_sec": L_sec, "L_id": L_id,
            **collapse_monitors(out, plan)}


def finetune_step(net: nn.Module, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Supervised terms of one micro-batch (14), each over the samples that have its label."""
    model = unwrapped(net)
    has, true = batch["has"], batch["joints"] - batch["joints"][:, :1]
    crops, A = hand_view(batch["image"], cfg.image_size)
    with autocast(crops.device):
        theta, beta, camera = net(crops)
    mean = lambda loss, on: (torch.where(on, loss, 0)).sum() / on.sum().clamp(min=1)
    rooted = lambda joints: joints - joints[:, :1]
    joints = rooted(model.mano.joints(axis_angle_to_matrix(theta.unflatten(-1, (16, 3))), beta.detach()))
    ok = batch["joints_ok"] & batch["joints_ok"][:, :1]                    # rooted: no wrist, no target
    error = torch.where(ok[..., None], joints - true.nan_to_num(), 0)
    uv = (model.project(camera, joints.detach()) - transform(A, batch["uv"])) / cfg.image_size
    seen = uv.isfinite().all(-1)
    L_theta = mean(rotation_loss(theta, batch["pose"].nan_to_num()), has["pose"])
    L_joints = mean(10 * error.abs().flatten(1).sum(1), ok.any(1) & ~has["pose"])        # 10 / m: ours
    L_beta = mean((beta - batch["shape"].nan_to_num()).square().mean(1), has["shape"])
    L_camera = mean(uv.abs().sum(-1), seen)
    loss = L_theta + L_joints + L_beta + L_camera
    return {"loss": loss, "L_theta": L_theta, "L_joints": L_joints, "L_beta": L_beta,
            "L_camera": L_camera}


def pretrain(cfg: Config, out: Path, device: torch.device) -> None:
    """Sec. 3.2 on pictures without labels; writes OUT/backbone.pt."""
    torch.manual_seed(cfg.seed)
    model = TINet(cfg)
    folder = out / f"pretrain-{'-'.join((METHOD, *cfg.variant))}"
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
    data = open_data(cfg, cfg.data, "train", stored_side(cfg), MARGIN, device)
    steps = steps_per_epoch(len(data), cfg.batch_size)
    size = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    say(f"pre-training on {len(data):,} pictures: {len(model.plan.pictures)} encoder passes a "
        f"sample, {len(model.plan.ordinary)} ordinary and {len(model.plan.secondary)} secondary "
        f"constraints, encoder {size:.1f} M parameters, {steps} steps an epoch")
    if rank() == 0:
        draw_views(folder, data, cfg, device, model.plan)

    def pooled(image: Tensor) -> Tensor:
        """What the probe reads: the latent of a stored picture, cut as for fine-tuning."""
        return model.backbone(hand_view(image, cfg.image_size)[0])[-1].mean((2, 3))

    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.95))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=cfg.epochs * steps)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            for k, batch in enumerate(micro_batches, 1):
                with accumulate(net, last=k == len(micro_batches)):
                    terms = pretrain_step(net, batch, cfg, epoch)
                    (terms["loss"] / len(micro_batches)).backward()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average_buffers(model)
            run.advance(sums, epoch, lr=rate, may_save=step + 1 < steps)
        measured = {}
        last = epoch + 1 == cfg.epochs
        if cfg.probe_every and (last or (epoch + 1) % cfg.probe_every == 0):
            measured["probe_mpjpe_mm"] = probe_error(model, pooled, cfg, stored_side(cfg), MARGIN,
                                                     device)
        run.log(epoch=epoch + 1, **measured)
        run.save()
    if cfg.epochs == 0:
        run.save()
    if rank() == 0:
        save_checkpoint(out / "backbone.pt", cpu_state(model.backbone))
        draw_reconstructions(folder, model, data, cfg, device)
    barrier()
    say(f"wrote {out / 'backbone.pt'}")


def finetune(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """Sec. 4.1: the whole network on labels; best.pt is the best epoch on the validation split."""
    torch.manual_seed(cfg.seed)
    model = HandNet(cfg)
    folder = out / f"finetune-{row}"
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
    side = stored_side(cfg)
    data = open_data(cfg, (cfg.finetune,), "train", side, MARGIN, device, labelled=True)
    val = open_data(cfg, (cfg.finetune,), "val", side, MARGIN, device)
    mean = mean_hand(data)
    with torch.no_grad():
        model.head[-1].bias.copy_(mean["pose"])
    steps = steps_per_epoch(len(data), cfg.batch_size)
    if rank() == 0:
        draw_crops(folder, data, cfg, device)
    say(f"fine-tuning {row} on {mean['labels']:,} labelled hands, validated on {len(val):,}")

    about = {"method": METHOD, "row": row, "mean": mean}
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.999))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=cfg.epochs * steps)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            for k, batch in enumerate(micro_batches, 1):
                with accumulate(net, last=k == len(micro_batches)):
                    terms = finetune_step(net, batch, cfg)
                    (terms["loss"] / len(micro_batches)).backward()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average_buffers(model)
            run.advance(sums, epoch, lr=rate, may_save=step + 1 < steps)
        run.log(epoch=epoch + 1, **keep_best(run, epoch, val, cfg, device, about))
        run.save()
    if cfg.epochs == 0:                                    # released weights, as they are
        keep_best(run, -1, val, cfg, device, about)
        run.save()
    barrier()                                              # others read what the first wrote


@torch.no_grad()
def draw_views(folder: Path, data: Any, cfg: Config, device: torch.device, plan: Plan) -> None:
    """views.png: every picture of four samples, with key points moved along where they are known."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 4).long()], device, 0))
    views, _, A = make_views(batch, cfg, 0, plan)
    uv = transform(A, batch["uv"][:, None])
    rows = [[draw_skeleton(denormalise(view), points) for view, points in zip(row, moved)]
            for row, moved in zip(views, uv)]
    sheet(folder / "views.png", rows, [element_name(e) for e in plan.pictures], width=1200)


def draw_crops(folder: Path, data: Any, cfg: Config, device: torch.device) -> None:
    """views.png of fine-tuning: eight crops as the network sees them, with their key points."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 8).long()], device, 0))
    crops, A = hand_view(batch["image"], cfg.image_size)
    drawn = [draw_skeleton(denormalise(view), uv, width=160)
             for view, uv in zip(crops, transform(A, batch["uv"]))]
    sheet(folder / "views.png", [drawn[:4], drawn[4:]])


@torch.no_grad()
def draw_reconstructions(folder: Path, model: TINet, data: Any, cfg: Config,
                         device: torch.device) -> None:
    """reconstructions.png: six pictures and what the decoder makes of them, BatchNorm as trained."""
    if model.decoder is None:
        return
    model.train()
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 6).long()], device, 0))
    views, angles, _ = make_views(batch, cfg, 0, model.plan)
    out = model(views, angles)
    rows = [[denormalise(x[0]) for x in side] for side in (views[:, model.decoded], out.pictures)]
    sheet(folder / "reconstructions.png", rows, labels=("input", "decoded"))


def element_name(element: Element) -> str:
    """I, H, R or HR with its angle, as Table 1 writes it."""
    names = ("a1", "a2", "b1", "b2")
    angle = "".join(f"{'+' if t > 0 else '-'}{abs(t) if abs(t) > 1 else ''}{n}"
                    for t, n in zip(element.turns, names) if t).removeprefix("+")
    return ("H" * element.flip + "R" * bool(angle) or "I") + f" {angle}".rstrip()


# ---- CLI ------------------------------------------------------------------------------------------


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One stage, or with --quick all of them."""
    given = remember(out, recall(given | {"out": str(out)}))
    make = lambda stage, **more: settle(Config, given | more, stage, QUICK)
    if given.get("quick"):
        pretrain(make("pretrain"), out, device)
        for init in ("random", str(out / "backbone.pt")):
            target = given.get("finetune") or make("pretrain").data[0]
            cfg = make("finetune", init=init, finetune=target)
            finetune(cfg, out, row_name(init), device)
        report(cfg, out, ["scratch", row_name(init)], device, build, stored_side(cfg), MARGIN)
    elif given.get("finetune"):
        cfg = make("finetune")
        finetune(cfg, out, row_name(cfg.init), device)
        report(cfg, out, [row_name(cfg.init)], device, build, stored_side(cfg), MARGIN)
    else:
        pretrain(make("pretrain"), out, device)


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    launch(Config, METHOD, argv, __doc__, QUICK, VARIANTS, run_stages)


if __name__ == "__main__":
    sys.exit(guarded(main))
