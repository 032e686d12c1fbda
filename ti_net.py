"""TI-Net: Learning Transformation-Isomorphic Latent Space for Accurate Hand Pose Estimation.

Ren, Hu, Zhang, Ye, Xia; Pacific Graphics 2025, DOI 10.2312/pg.20251270. The last two commands would
repeat "Ours" of Tables 2 and 3: ResNet-50, ImageNet-1K, DexYCB, 16.79 mm MPJPE and 4.91 mm PA-MPJPE
by the protocol of point 16. Nothing of that size has been run here.

    python ti_net.py --quick                                          minutes on a CPU, no data
    python ti_net.py --data imagenet --root DIR                       the paper's pre-training
    python ti_net.py --init runs/ti_net-imagenet/backbone.pt --finetune dexycb=DIR

The idea: flipping and turning a picture must act on its latent as a linear map, and two of them in
a row as the product of their maps (Table 1), so that the latent keeps what a pose needs.

Letters: I picture, v latent (B, d), H flip, R_a turn by a counter-clockwise, HR_a flip THEN turn, T
the latent's operators (Eq. 3), e embedded angle (n), r rank, w weight of the constraints, theta
(48) axis-angle MANO pose, beta (10) MANO shape. B batch, P pictures of one sample.

Differs from the paper ("authors' code" and their logs: github.com/Mine268/TI-Net, no licence)
 1. Latent. Eq. 3 concatenates one vector: we pool the 7x7x2048 map to d = 2048 and decode the map,
    as the authors' code does. `decode-latent` decodes the vector, as Eq. 1 says.
 2. Composition. Alg. 1, line 13 writes F1 o F2. Only "F1 first, then F2" agrees with Table 1 and
    Eq. 2; the usual right-to-left reading gives a wrong target in 7 of 9 cells.
 3. Angles. Alg. 1 uses the same two angles in both places, Table 1 four. Four cover the whole
    table; all losses share them. `algorithm-1` draws as printed.
 4. Passes. A picture that several compositions reach is encoded once: 12 for each sample, not 27.
 5. Norms. They are printed unsquared. We take mean squares (authors' code), for which w = 0.001 was
    set. `unsquared` is as printed: n entries of root mean square u then cost sqrt(n) u and not u^2,
    which at u = 1 is 45 times as much for a latent and 388 times for a picture.
 6. Identity. T_R(v; 0) = v is added (authors' code; it costs no picture) but for `no-identity`.
 7. Embedding. The text has two layers, the code 2-32-32-32, the last without bias. Ours is the
    code's, n = 32 and r = 128. `two-layer-embedding` is the text's.
 8. M starts at zero, so every operator starts as the identity; `random-m`: as in the code.
 9. Turning. We turn by radians about (W - 1) / 2. The code (utils/utils.py @3d89d588) hands radians
    to a function of degrees and turns about W / 2: `degrees`, `half-pixel`.
10. Corners. Turned pictures would show black corners, which give the angle away. We cut views from
    a larger square, without any. `black-corners` is the code's way, `disc` masks every view.
11. Decoder. Five transposed convolutions, the last layer linear, since targets have both signs.
    `relu-decoder` ends in BatchNorm and ReLU as the code does (resnet/resnet.py @078cab41).
12. Reconstruction is the mean over every encoded picture (authors' code). Alg. 1 sums over H, R and
    HR; `reconstruct-3` takes the mean over these, with the angles of line 4.
13. Schedule. The paper has AdamW, 50 epochs, batch 68, base rate 1.5e-3; betas, decay 0.05, clip 5
    and rate = base x batch / 256 are the code's and its logs'. The logs disagree on the rate: the
    method's own (sl4) has base 1.5e-4, an earlier variant's (sll) the constant rate 1.5e-3 x 378 /
    256. One epoch of warm-up, at most a tenth of the run by default, and a cosine are ours. Crops
    keep 0.4 to 1 of the stored square, and 10 cuts them 1.4 times tighter; ImageNet's pictures are
    stored as their centre squares, so a crop keeps 0.3 or more of a 4 : 3 picture. `authors-crops`
    keeps 0.2 to 1 and turns the source too.
14. Fine-tuning. The paper has the crop, three layers and MANO's pose. The rest is the authors' log
    (logs/23-20241016-1): L1 on rotation matrices, constant rate 7.5e-4, batch 128, 120 epochs, no
    decay. We start the last layer at zero and at the training set's mean pose, and add shape and a
    weak-perspective camera, read from detached features, to draw pictures; it starts where the
    joints' box fills the hand's in the crop. Where there are joints but no pose, L1 on rooted
    joints, 10 a metre, stands in.
15. Limit (ours). Eq. 3 is T_R(v; a) = A v + b(a): A does not know the angle. If it holds exactly on
    pictures and their turned copies, a = 0 says A u = u for differences u of latents, so T_R(v; a)
    = v + c(a) with one c for all; n turns give v + n c(a), which stays bounded only for c = 0.
    Exact latents do not change under rotation. `modulated` can turn them: v + M((N v) * g(e));
    `small-angles`, within 30 degrees, asks less of Eq. 3.
16. Protocol. The authors' test poses truth and prediction with the TRUE betas and averages over all
    frames, unlabelled ones too (test_DexYCB.py @7c7f2779), on which their loader also trains.
    eval.py prints that beside the tool kit's; we do not train on those frames.
17. Data and batch. The paper has ImageNet-1K and batch 68; both logs pre-train on ImageNet-21K-P,
    sl4 with 64 pictures on each of 4 GPUs, sll with 63 on each of 6, and the headline run starts
    from sl4's epoch 9. We read 68 as the whole batch; BatchNorm sees 17 samples x 12 pictures. No
    gradient is stopped anywhere.
"""
from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import (
    BACKBONES, Flags, UserError, accumulate, arg, autocast, axis_angle_to_matrix, barrier,
    batch_statistics, build_backbone, constant, cpu_state, crop, decay_groups, denormalise, flip,
    fused_on, guarded, invert, load_backbone, normalise, parallel, rank, rotation, save_checkpoint,
    say, settle, steps_per_epoch, transform, translation, uniform, unwrapped, warp)
from hand.drawing import draw_skeleton, sheet
from sources import Source, batches, hand_for, open_data, training_steps
from sources.course import COURSE, SCORING, judging, learning
from sources.progress import Run
from sources.recipes import row_name
from sources.stages import keep_best, launch, mean_hand, probe_error, report

import torch
from torch import Tensor, nn

# ---- Config --------------------------------------------------------------------------------------

METHOD = "ti_net"
MARGIN = 1.7        # stored square / hand box: 1.2 (fine-tuning crop) x sqrt(2), so views can turn
STORE = 1.5         # stored side / network side: sqrt(2) to turn freely, and some to shrink from
CROP = 1.2          # fine-tuning crop / hand box (authors' code)
CLIP = 5.0          # largest norm of pre-training's whole gradient (authors' log)
PICTURES = 12       # of a sample that are encoded in pre-training (4); some variants differ

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
    "small-angles": "angles within 30 degrees of 0 (ours)",
    "relu-decoder": "decoder ends in BatchNorm and ReLU (authors' code)",
    "degrees": "pictures turn by a degrees where operators get a radians (authors' code)",
    "half-pixel": "turn about W / 2, half a pixel off the flip's axis (authors' code)",
    "black-corners": "turn the network's own square: black corners (authors' code)",
    "disc": "as black-corners, and every view masked to the inscribed disc (ours)",
    "authors-crops": "source crops of 0.2 to 1 of the area, turned by 0 to 360 degrees",
}

QUICK = {
    "pretrain": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=1,
                     batch_size=64, micro_batch=64, samples=1024, decoder_width=32, probe_every=0,
                     workers=0),
    "finetune": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=15,
                     batch_size=32, micro_batch=32, lr=6e-3, warmup_epochs=1.0, samples=3072,
                     workers=0)}


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("resnet50", "encoder E", paper="resnet50", ref="Tab. 2", choices=BACKBONES)
    image_size: int = arg(224, "side of the network's input, px", paper=224, ref="Sec. 4.1")
    epochs: int = arg(50, "passes over the data", paper=50, ref="Sec. 4.1",
                      finetune=120, finetune_why="authors' log")
    batch_size: int = arg(68, "samples a step, over all processes", paper=68, ref="Sec. 4.1",
                          finetune=128, finetune_why="authors' log", least=1)
    micro_batch: int = arg(17, "samples at a time, the unit of BatchNorm; a sample of ResNet-50 "
                           "at 224 px takes 0.9 GiB in bfloat16 (CUDA), 1.7 in float32", why="ours",
                           finetune=32, finetune_why="ours", least=1)
    lr: float = arg(1.5e-3, "base learning rate; the rate is base x batch / 256", paper=1.5e-3,
                    ref="Sec. 4.1", finetune=1.5e-3, finetune_why="7.5e-4 at 128: authors' log",
                    above=0)
    warmup_epochs: float = arg(1.0, "epochs of linear warm-up (by default a tenth of the run at "
                                    "most), then cosine to 0; 0: constant rate", why="ours",
                               finetune=0.0, finetune_why="constant: authors' log")
    weight_decay: float = arg(0.05, "AdamW's decay, not on biases and norms", why="authors' code",
                              finetune=0.0, finetune_why="authors' log")
    w: float = arg(1e-3, "weight of the constraints", paper=1e-3, ref="Sec. 3.2, below Eq. 1",
                   stage="pretrain")
    rank: int = arg(128, "r of the operators; the paper: r << d", why="authors' code",
                    stage="pretrain", least=1)
    embed_dim: int = arg(32, "n of the embedded angle", why="authors' code", stage="pretrain",
                         least=1)
    decoder_width: int = arg(256, "channels inside the decoder", why="authors' code",
                             stage="pretrain", least=1)
    probe_every: int = arg(5, "epochs between two frozen-probe pose errors (0: none)",
                           stage="pretrain")
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS),
                                   stage="pretrain")


# ---- Views: 12 pictures of one sample, each one warp of the source (Sec. 3.1, Table 1) -----------


class Element(NamedTuple):
    """A member of {H, R, HR}: flip first (0 or 1), then turn by the sum of turns x drawn angles."""

    flip: int
    turns: tuple[int, ...]


NO_TURN = (0, 0, 0, 0)


def compose(first: Element, then: Element) -> Element:
    """Table 1: `first`, then `then`. From R_b H^g R_a H^f and H R_a = R_-a H (rows apply first)."""
    sign = -1 if then.flip else 1
    return Element(first.flip ^ then.flip,
                   tuple(t + sign * f for f, t in zip(first.turns, then.turns)))


class Operation(NamedTuple):
    """One of H, R and HR: its operator, the column of its angle (H has none), what it does."""

    name: str
    angle: int | None
    element: Element


class Plan(NamedTuple):
    """Which pictures a sample needs, the source first, and which constraints tie them.

    ordinary: E(picture) is to equal T(E I); secondary: E(picture) is to equal T_then(T_first(E I)).
    """

    pictures: list[Element]
    ordinary: list[tuple[Operation, int]]                   # operation, number of the picture
    secondary: list[tuple[Operation, Operation, int]]       # first, then, number of the picture


def operations(r: int, hr: int) -> list[Operation]:
    """H, R turning by drawn angle number r, HR by number hr."""
    def once(k: int) -> tuple[int, ...]:
        return tuple(int(k == j) for j in range(4))

    return [Operation("H", None, Element(1, NO_TURN)), Operation("R", r, Element(0, once(r))),
            Operation("HR", hr, Element(1, once(hr)))]


def constraint_plan(variant: tuple[str, ...]) -> Plan:
    """Eq. 2, Alg. 1: the ordinary terms, all nine ordered pairs, every distinct picture once.

    The four angles of `draw_angles` are a1, a2 of the first operation and b1, b2 of the second.
    Under `algorithm-1` they are alpha, beta of line 4 and alpha, beta of line 10, the latter for
    both operations of a pair.
    """
    with_a = operations(0, 1)
    with_b = operations(2, 3)
    ordinary = with_a + with_b[1:] if "five-ordinary" in variant else with_a
    first = with_b if "algorithm-1" in variant else with_a
    pictures = [Element(0, NO_TURN)]

    def number(element: Element) -> int:
        if element not in pictures:
            pictures.append(element)
        return pictures.index(element)

    once = [(one, number(one.element)) for one in ordinary]
    twice = [(one, two, number(compose(one.element, two.element)))
             for one in first for two in with_b]
    return Plan(pictures, once, twice)


def stored_side(cfg: Config) -> int:
    """Side of the pictures that the data sets yield, px."""
    return round(STORE * cfg.image_size)


def draw_angles(index: Tensor, cfg: Config, epoch: int) -> Tensor:
    """Alg. 1, lines 4 and 10: U(0, 2 pi), (B,) samples -> (B, 4) rad. `small-angles`: see 15."""
    u = uniform(index, 4, cfg.seed, "ti_net angles", epoch)
    return math.pi / 6 * (2 * u - 1) if "small-angles" in cfg.variant else 2 * math.pi * u


def draw_source(index: Tensor, side: int, cfg: Config, epoch: int, square: int) -> Tensor:
    """Random resized crop of the stored picture onto a source square, px: (B,) -> (B, 3, 3)."""
    u = uniform(index, 5, cfg.seed, "ti_net crop", epoch)
    authors = "authors-crops" in cfg.variant
    least = 0.2 if authors else 0.4
    area = least + (1 - least) * u[:, 0]
    ratio = (3 / 4) ** (1 - 2 * u[:, 1])                    # 3/4 to 4/3, even in its log
    width = (side * (area * ratio).sqrt()).clamp(max=side)
    height = (side * (area / ratio).sqrt()).clamp(max=side)
    left = u[:, 2] * (side - width)
    top = u[:, 3] * (side - height)
    A = torch.eye(3, dtype=u.dtype, device=u.device).repeat(len(index), 1, 1)
    A[:, 0, 0] = square / width
    A[:, 1, 1] = square / height
    A[:, 0, 2] = (0.5 - left) * A[:, 0, 0] - 0.5      # edges lie half a pixel beside centres
    A[:, 1, 2] = (0.5 - top) * A[:, 1, 1] - 0.5
    return rotation(2 * math.pi * u[:, 4] * authors, square) @ A


def view_transforms(angles: Tensor, source: Tensor, plan: Plan, cfg: Config, square: int) -> Tensor:
    """Stored picture -> every view: (B, 4) rad and `source` (B, 3, 3) -> (B, P, 3, 3).

    The source square of `square` px is flipped, turned about its centre and cut to its middle, all
    in one matrix, so that a picture is warped once.
    """
    if "degrees" in cfg.variant:
        angles = angles * math.pi / 180
    device, dtype = angles.device, angles.dtype
    turns = constant(tuple(element.turns for element in plan.pictures), device, dtype)   # (P, 4)
    flips = constant(tuple(element.flip for element in plan.pictures), device, dtype)    # (P,)
    turned = square + 1 if "half-pixel" in cfg.variant else square      # turns about half of it
    turn = rotation(angles @ turns.T, turned)
    cut = translation(angles.new_full((1, 2), -(square - cfg.image_size) / 2))
    return cut @ turn @ flip(flips, square) @ source[:, None]


def make_views(batch: dict, cfg: Config, epoch: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A batch -> its views (B, P, 3, S, S), the angles (B, 4) rad, the transforms (B, P, 3, 3)."""
    image = batch["image"]
    S = cfg.image_size
    corners = {"black-corners", "disc"} & set(cfg.variant)
    square = S if corners else math.ceil(S * math.sqrt(2))
    angles = draw_angles(batch["index"], cfg, epoch)
    source = draw_source(batch["index"], image.shape[-1], cfg, epoch, square)
    A = view_transforms(angles, source, plan, cfg, square)
    views = normalise(warp(image, A, S))
    if "disc" in cfg.variant:
        x = torch.arange(S, device=image.device) - (S - 1) / 2
        views = views * (x[:, None] ** 2 + x ** 2 <= (S / 2) ** 2)
    return views, angles, A


# ---- Model (Sec. 3.2, 3.3) -----------------------------------------------------------------------


class Operator(nn.Module):
    """T(v) = v + M N v, with an angle v + M N cat(v, e): Sec. 3.2, Eq. 3. `modulated`: see 15."""

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
        code = v if e is None else torch.cat([v, e], -1)
        return v + self.M(self.N(code))


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
        """Apply T_name to v (..., d), with the angle (...) rad where it has one."""
        if name == "H":
            return self.T["H"](v)
        e = self.K(torch.stack([angle.cos(), angle.sin()], -1))
        return self.T[name](v, e.expand(*v.shape[:-1], -1))


class Decoder(nn.Sequential):
    """D_aux: a transposed convolution for each halving of the encoder; map -> picture."""

    def __init__(self, d: int, stride: int, cfg: Config):
        widths = [d] + [cfg.decoder_width] * (int(math.log2(stride)) - 1) + [3]
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(itertools.pairwise(widths), 2):
            layers.append(nn.ConvTranspose2d(before, after, 4, 2, 1))
            if k < len(widths) or "relu-decoder" in cfg.variant:
                layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Moved(NamedTuple):
    """What one pass yields: latents, what the operators make of the source's, what D_aux draws."""

    v: Tensor                            # (B, P, d) latents of all pictures, the source first
    ordinary: Tensor                     # (B, terms, d) T(v)
    secondary: Tensor                    # (B, 9, d) T_then(T_first(v))
    identity: Tensor                     # (B, d) T_R(v; 0)
    pictures: Tensor | None              # (B, Q, 3, S, S) reconstructions


class TINet(nn.Module):
    """Encoder, operators and decoder; the last two are thrown away after pre-training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.variant = cfg.variant
        self.plan = constraint_plan(cfg.variant)
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        d, stride = self.backbone.dim, self.backbone.stride
        self.operators = Operators(d, cfg)
        if cfg.image_size % stride:
            raise UserError(f"--image-size {cfg.image_size}: pre-training decodes maps of stride "
                            f"{stride}, so it must be a multiple of that")
        self.decoder = None if "no-reconstruction" in cfg.variant else Decoder(d, stride, cfg)
        self.decoded = list(range(len(self.plan.pictures)))
        if "reconstruct-3" in cfg.variant:
            self.decoded = [1, 2, 3]                                   # H, R and HR of the source

    def forward(self, views: Tensor, angles: Tensor) -> Moved:
        """Views (B, P, 3, S, S), angles (B, 4) rad -> both sides of every constraint."""
        B, P = views.shape[:2]
        flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(flat)[-1].unflatten(0, (B, P))                    # (B, P, d, h, w)
        some = slice(self.decoded[0], self.decoded[-1] + 1)          # a list would copy all maps
        pictures = self.decode(maps[:, some]) if self.decoder else None
        with torch.autocast(views.device.type, enabled=False):
            v = maps.to(torch.promote_types(maps.dtype, torch.float32)).mean((3, 4))
            return Moved(v, *self.move(v[:, 0], angles.to(v.dtype)), pictures)

    def decode(self, maps: Tensor) -> Tensor:
        """(B, Q, d, h, w) -> (B, Q, 3, S, S)."""
        B, (h, w) = maps.shape[0], maps.shape[-2:]
        if "decode-latent" in self.variant:
            maps = maps.mean((3, 4), keepdim=True).expand(-1, -1, -1, h, w)
        return self.decoder(maps.flatten(0, 1)).unflatten(0, (B, -1))

    def move(self, v: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operators' side of Eq. 2, as in `Moved`, for the source's v (B, d), angles (B, 4)."""
        def apply(operation: Operation, latents: Tensor) -> Tensor:
            angle = None if operation.angle is None else angles[:, operation.angle, None]
            return self.operators(operation.name, latents, angle)               # (B, n, d)

        plan, source = self.plan, v[:, None]
        ones = dict.fromkeys(one for one, *_ in plan.ordinary + plan.secondary)    # each once
        firsts = {one: apply(one, source) for one in ones}
        ordinary = torch.cat([firsts[one] for one, _ in plan.ordinary], 1)
        three = torch.cat([firsts[one] for one in dict.fromkeys(x[0] for x in plan.secondary)], 1)
        nine = [apply(two, three) for two in dict.fromkeys(x[1] for x in plan.secondary)]
        secondary = torch.stack(nine, 2).flatten(1, 2)             # row by row, as the plan lists
        return ordinary, secondary, self.operators("R", v, torch.zeros_like(angles[:, 0]))


# ---- Losses (Eq. 1, 2) ---------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor, unsquared: bool = False) -> Tensor:
    """(B, ...) twice -> scalar: mean square over batch and entries, or mean norm (5)."""
    difference = (a - b).to(torch.promote_types(a.dtype, torch.float32))
    if unsquared:
        return difference.flatten(1).norm(dim=1).mean()
    return difference.square().mean()


def ordinary_loss(v: Tensor, moved: Tensor, plan: Plan, unsquared: bool = False) -> Tensor:
    """Eq. 2, L_ord: sum of |E(F I) - T_F(E I)|; v (B, P, d), moved (B, terms, d) -> scalar."""
    return sum(distance(v[:, picture], moved[:, k], unsquared)
               for k, (_, picture) in enumerate(plan.ordinary))


def secondary_loss(v: Tensor, moved: Tensor, plan: Plan, unsquared: bool = False) -> Tensor:
    """Eq. 2, L_sec: sum over nine ordered pairs of |E(then(first(I))) - T_then(T_first(E I))|."""
    return sum(distance(v[:, picture], moved[:, k], unsquared)
               for k, (_, _, picture) in enumerate(plan.secondary))


def reconstruction_loss(pictures: Tensor, views: Tensor, decoded: list[int],
                        unsquared: bool = False) -> Tensor:
    """Eq. 1, L_classic: mean of |D(E(F I)) - F I|; pictures (B, Q, ...) are of views `decoded`."""
    return sum(distance(pictures[:, k], views[:, view], unsquared)
               for k, view in enumerate(decoded)) / len(decoded)


def rotation_loss(theta: Tensor, target: Tensor) -> Tensor:
    """Fine-tuning (14): L1 between rotation matrices, (B, 48) axis-angle twice -> (B,), summed."""
    R, R_true = (axis_angle_to_matrix(x.unflatten(-1, (16, 3))) for x in (theta, target))
    return (R - R_true).abs().flatten(1).sum(1)


# twin: handmim.py:masked
def masked(loss: Tensor, on: Tensor) -> Tensor:
    """Mean of a loss (n, ...) where `on`, 0 where nothing is; NaN must be filled before."""
    return torch.where(on, loss, 0).sum() / on.sum().clamp(min=1)


@torch.no_grad()
def collapse_monitors(out: Moved, plan: Plan) -> dict[str, Tensor]:
    """Four numbers that tell an isomorphic latent from a collapsed one (15).

    variance: of v over the batch, mean over entries. dimensions: how many axes that variance fills,
    (sum of covariance eigenvalues)^2 / sum of their squares, from 1 (all on one axis, whatever the
    variance) to B - 1; 0 where nothing varies. turn_change: |E(R I) - E(I)|^2 over the variance, 0
    where turning changes nothing. residual: |E(R I) - T_R(E I)|^2 over |E(R I) - E(I)|^2, 1 where
    the operator does no better than the identity.
    """
    k, picture = next((k, picture) for k, (operation, picture) in enumerate(plan.ordinary)
                      if operation.name == "R")
    v = out.v[:, 0]
    turned = out.v[:, picture]
    variance = v.var(0, correction=0).mean()
    centred = v - v.mean(0)
    gram = centred @ centred.T                      # (B, B), with the covariance's eigenvalues
    dimensions = gram.trace().square() / gram.square().sum().clamp(min=1e-30)
    change = distance(turned, v)
    left = distance(turned, out.ordinary[:, k])
    return {"variance": variance, "dimensions": dimensions,
            "turn_change": change / variance.clamp(min=1e-12),
            "residual": left / change.clamp(min=1e-12)}


# ---- Fine-tuned network (Sec. 4.1, last sentence) ------------------------------------------------


def hand_view(image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Stored squares (B, 3, L, L) -> the network's (B, 3, size, size), and by which A (1, 3, 3)."""
    L = image.shape[-1]
    middle = torch.full((1, 2), (L - 1) / 2, device=image.device)
    side = torch.full((1,), L * CROP / MARGIN, device=image.device)
    A = crop(middle, side, size)
    return normalise(warp(image, A.expand(len(image), 3, 3), size)), A


class HandNet(nn.Module):
    """Back-bone, global average, three linear layers to theta; beside them shape, a camera (14)."""

    USES = {"image"}

    def __init__(self, cfg: Config):
        super().__init__()
        self.size = cfg.image_size
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        d = self.backbone.dim
        self.head = nn.Sequential(nn.Linear(d, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                                  nn.Linear(1024, 48))
        self.extra = nn.Sequential(nn.Linear(d + 48, 256), nn.ReLU(), nn.Linear(256, 13))
        for last in (self.head[-1], self.extra[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mano = hand_for(cfg.finetune, cfg.mano)
        self.register_buffer("boxed", torch.tensor(True))

    def _load_from_state_dict(self, state: dict, prefix: str, *more: Any) -> None:
        """Finished networks of before have no `boxed`: at camera 0 their wrist is central."""
        state.setdefault(prefix + "boxed", torch.tensor(False))
        super()._load_from_state_dict(state, prefix, *more)

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

        camera = (log scale, tx, ty); at 0 the points' box lies where the crop has the hand's.
        """
        low, high = points[..., :2].amin(1, keepdim=True), points[..., :2].amax(1, keepdim=True)
        side = (high - low).amax(-1, keepdim=True).clamp(min=1e-3)
        xy = 2 / CROP * (points[..., :2] - (low + high) / 2) / side
        xy = torch.where(self.boxed, xy, 10 * points[..., :2])         # half crops
        xy = camera[:, None, :1].exp() * xy + camera[:, None, 1:]
        return (self.size - 1) / 2 + self.size / 2 * xy

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """{"image"} -> wrist-rooted joints and verts, m; uv, px of image; pose, shape."""
        crops, A = hand_view(batch["image"], self.size)
        theta, beta, camera = self(crops)
        R = axis_angle_to_matrix(theta.unflatten(-1, (16, 3)))
        verts, joints = self.mano(R, beta)
        verts, joints = verts - joints[:, :1], joints - joints[:, :1]
        uv = transform(invert(A), self.project(camera, joints))
        return {"joints": joints, "verts": verts, "uv": uv, "pose": R, "shape": beta}


def build(cfg: Config) -> HandNet:
    """The network that eval.py judges."""
    return HandNet(cfg)


# ---- Training ------------------------------------------------------------------------------------


def lr_at(step: int, cfg: Config, steps: int) -> float:
    """Rate at a step, `steps` to an epoch: base x batch / 256, warm-up, cosine to 0 (13, 14)."""
    peak = cfg.lr * cfg.batch_size / 256
    warm = cfg.warmup_epochs * steps
    if step < warm:
        return peak * min(1, (step + 1) / warm)
    if not cfg.warmup_epochs:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.epochs * steps - warm)))


def pretrain_step(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Algorithm 1 for one micro-batch: the terms and their weighted sum, Eq. 1."""
    model = unwrapped(net)
    plan = model.plan
    unsquared = "unsquared" in cfg.variant
    views, angles, _ = make_views(batch, cfg, epoch, plan)
    with autocast(views.device, cfg.precision):     # the network only: bfloat16 misses pixels
        out = net(views, angles)
    L_ord = ordinary_loss(out.v, out.ordinary, plan, unsquared)
    L_sec = secondary_loss(out.v, out.secondary, plan, unsquared)
    L_id = distance(out.identity, out.v[:, 0], unsquared)
    L_classic = L_ord.new_zeros(())
    if out.pictures is not None:
        L_classic = reconstruction_loss(out.pictures, views, model.decoded, unsquared)
    on = {name: float(f"no-{name}" not in cfg.variant)
          for name in ("ordinary", "secondary", "identity")}
    loss = L_classic + cfg.w * (
        on["ordinary"] * L_ord + on["secondary"] * L_sec + on["identity"] * L_id)
    return {"loss": loss, "L_classic": L_classic, "L_ord": L_ord, "L_sec": L_sec, "L_id": L_id,
            **collapse_monitors(out, plan)}


def finetune_step(net: nn.Module, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Supervised terms of one micro-batch (14), each over the samples that have its label."""
    model = unwrapped(net)
    has = batch["has"]
    crops, A = hand_view(batch["image"], cfg.image_size)
    with autocast(crops.device, cfg.precision):
        theta, beta, camera = net(crops)
    R = axis_angle_to_matrix(theta.unflatten(-1, (16, 3)))
    joints = model.mano.joints(R, beta.detach())
    joints = joints - joints[:, :1]
    true = batch["joints"] - batch["joints"][:, :1]
    ok = batch["joints_ok"] & batch["joints_ok"][:, :1]            # rooted: no wrist, no target
    error = torch.where(ok[..., None], joints - true.nan_to_num(), 0)
    uv = (model.project(camera, joints.detach()) - transform(A, batch["uv"])) / cfg.image_size
    seen = uv.isfinite().all(-1)
    L_theta = masked(rotation_loss(theta, batch["pose"].nan_to_num()), has["pose"])
    L_joints = masked(10 * error.abs().flatten(1).sum(1), ok.any(1) & ~has["pose"])   # 10 / m: ours
    L_beta = masked((beta - batch["shape"].nan_to_num()).square().mean(1), has["shape"])
    L_camera = masked(uv.abs().sum(-1), seen)
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

    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.95),
                                  fused=fused_on(device))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=cfg.epochs * steps)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            with batch_statistics(model):
                for k, batch in enumerate(micro_batches, 1):
                    with accumulate(net, last=k == len(micro_batches)):
                        terms = pretrain_step(net, batch, cfg, epoch)
                        (terms["loss"] / len(micro_batches)).backward()
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.999),
                                  fused=fused_on(device))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=cfg.epochs * steps)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            with batch_statistics(model):
                for k, batch in enumerate(micro_batches, 1):
                    with accumulate(net, last=k == len(micro_batches)):
                        terms = finetune_step(net, batch, cfg)
                        (terms["loss"] / len(micro_batches)).backward()
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.advance(sums, epoch, lr=rate, may_save=step + 1 < steps)
        run.log(epoch=epoch + 1, **keep_best(run, epoch, val, cfg, device, about))
        run.save()
    if cfg.epochs == 0:                                    # released weights, as they are
        keep_best(run, -1, val, cfg, device, about)
        run.save()
    barrier()                                              # others read what the first wrote


# twin: handmim.py:some
def some(data: Source, n: int, device: torch.device) -> dict:
    """A batch of n samples, evenly spaced."""
    return next(batches(data, [torch.linspace(0, len(data) - 1, n).long()], device, 0))


@torch.no_grad()
def draw_views(folder: Path, data: Source, cfg: Config, device: torch.device, plan: Plan) -> None:
    """views.png: every picture of four samples, with key points moved along where known."""
    batch = some(data, 4, device)
    views, _, A = make_views(batch, cfg, 0, plan)
    uv = transform(A, batch["uv"][:, None])
    rows = [[draw_skeleton(denormalise(view), points) for view, points in zip(row, moved)]
            for row, moved in zip(views, uv)]
    rows = [[stored, *row] for stored, row in zip(batch["image"], rows)]
    sheet(folder / "views.png", rows, ["stored", *map(element_name, plan.pictures)], width=1300,
          note="Four samples: the square that is cut out of each picture, and what is encoded of "
          "it, key points moved along where they are known: I as it is, H flipped, R turned by the "
          "angles a1, a2, b1, b2, their sums and differences (Table 1).",
          bones=bool(uv.isfinite().any()))


def draw_crops(folder: Path, data: Source, cfg: Config, device: torch.device) -> None:
    """views.png of fine-tuning: eight crops as the network sees them, with their key points."""
    batch = some(data, 8, device)
    crops, A = hand_view(batch["image"], cfg.image_size)
    drawn = [draw_skeleton(denormalise(view), uv, width=160)
             for view, uv in zip(crops, transform(A, batch["uv"]))]
    sheet(folder / "views.png", [drawn[:4], drawn[4:]], bones=True,
          note="Eight crops as the network sees them, with their key points.")


@torch.no_grad()
def draw_reconstructions(folder: Path, model: TINet, data: Source, cfg: Config,
                         device: torch.device) -> None:
    """reconstructions.png: six pictures and what the decoder makes of them, in training mode."""
    if model.decoder is None:
        return
    model.train()
    views, angles, _ = make_views(some(data, 6, device), cfg, 0, model.plan)
    out = model(views, angles)
    rows = [[denormalise(x[0]) for x in side] for side in (views[:, model.decoded], out.pictures)]
    sheet(folder / "reconstructions.png", rows, labels=("input", "decoded"), note="Six pictures "
          "that were encoded, and what the decoder makes of their latents (L_classic).")


def element_name(element: Element) -> str:
    """I, H, R or HR with its angle, as Table 1 writes it."""
    angle = "".join(f"{'+' if times > 0 else '-'}{abs(times) if abs(times) > 1 else ''}{name}"
                    for times, name in zip(element.turns, ("a1", "a2", "b1", "b2")) if times)
    letters = "H" * element.flip + "R" * bool(angle) or "I"
    return f"{letters} {angle.removeprefix('+')}".rstrip()


# ---- CLI -----------------------------------------------------------------------------------------


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One stage, or with --quick both."""
    work: dict[str, float] = {}
    if given.get("quick"):
        first = settle(Config, given, "pretrain", QUICK)
        name = "-".join((METHOD, *first.variant))
        given = given | {"init": str(out / "backbone.pt"),
                         "finetune": given.get("finetune") or first.data[0],
                         "row": given.get("row") or name}
        work = {f"pretrain-{name}": learning(first, PICTURES, val=False)}
    elif not given.get("finetune"):
        return pretrain(settle(Config, given, "pretrain", QUICK), out, device)
    cfg = settle(Config, given, "finetune", QUICK)
    row = row_name(cfg.init, cfg.row)
    COURSE.plan(work | {f"finetune-{row}": learning(cfg), SCORING: judging(1)})
    if work:
        pretrain(first, out, device)
    finetune(cfg, out, row, device)
    report(cfg, out / f"finetune-{row}", row, device, build, stored_side(cfg), MARGIN)


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    launch(Config, METHOD, argv, __doc__, QUICK, VARIANTS, run_stages)


if __name__ == "__main__":
    sys.exit(guarded(main))
