"""PeCLR: Self-Supervised 3D Hand Pose Estimation from monocular RGB via Contrastive Learning.

Spurr, Dahiya, Wang, Zhang, Hilliges; ICCV 2021, arXiv 2106.05953. The recipe is that of Table 2,
"RN152 + PeCLR (ours)", pre-trained on FreiHAND and YouTube3DHands: 0.66 cm PA-EPE and 0.87 PA-AUC
on FreiHAND. Nothing was run at that scale.

    python peclr.py --quick                                      minutes on a CPU, no data
    python peclr.py --data freihand=DIR1 yt3d=DIR2               the paper's pre-training
    python peclr.py --init FILE --finetune freihand:centre=DIR1 --two-pass

Table 1 and Fig. 5 pre-train with `--data freihand:90=DIR1 --backbone resnet50 [--objective simclr]
[--augment NAME ...]`, then `--init FILE --finetune freihand:90=DIR1 --backbone resnet50
--image-size 128 --freeze`, which ends in a table on the paper's own 10 %. Fig. 6 fine-tunes with
`--image-size 128 --label-fraction 0.2`. Table 3's lower half is Table 2's run judged by
`eval.py RUN --data yt3d=DIR2`.

The idea: SimCLR pulls two views of a picture together and so forgets where things are. Here a
view's rotation and translation are first undone on its projection, read as points of a plane; then
the two must agree (Eq. 3). What looks alike becomes invariant, what moves stays equivariant.

Letters: I picture, p projection (2 m numbers), z~ projection with the view undone, m = 64 points,
L_z their range (Eq. 4), tau temperature, K intrinsics, d root-relative depth (Eq. 5, 6) in lengths
of one bone. B batch, J = 21 joints, S side of a view in px.

Differs from the paper
 1. Batch. The paper says 2048. The authors' code (dahiyaaneesh/peclr @f29f0a9) adds up 16 losses of
    128 pictures with 254 negatives each (`accumulate`). Here the loss sees all 4,094: the batch is
    projected without a graph, the loss gives every projection its gradient, and each micro-batch
    goes through again with those.
 2. L_z. Eq. 4 reads as one number a sample (`one-range`). The code's, and ours, is one for each of
    x and y, over the points of the projection divided by its norm. Neither it nor the centre of the
    rotation is differentiated. A shift comes last in a view, so it is undone first.
 3. L. The code divides a shift in source pixels by the network's side (`authors-shift`), too small
    by the factor of the resize. Ours is the share of the crop that the hand moved.
 4. Shift. The paper is silent; the code takes 0 to 14 px of the source, left and up, ours up to 7.5
    of 128 px of the view either way: test crops lie in the middle of what was trained. Our angles
    are not rounded. At a picture's left and top edge the code moves the crop inside and records the
    longer shift; at the other two it cuts the crop off and stretches the rest to a square, which
    nothing undoes. Ours stays square, with black outside the picture, under `authors-shift` too.
 5. Scale has no inverse: a projection's length drops out of the cosine (Sec. 3.2, last sentence).
    That is exact where points scale about the origin; rotation is about their mean.
 6. Colour jitter. The code turns RGB arrays to HSV as if they were BGR (`bgr`); ours does not. The
    ranges are the code's: hue, saturation x U(0.01, 1), value x U(0.5, 1) + U(5, 20).
 7. Order. The code has Sobel, cut-out, blur, rotate, crop, resize, colour jitter, noise, colour
    drop. Here one warp comes first. Ranges and chances are the code's.
 8. Crops. The paper is silent. The code's are centred on the mean of the 21 key points, half as
    wide as 0.9 to 1.5 (off: 1.25) times the farthest one. Where a picture has no key points, the
    middle of the hand's box, or of the picture, and the mean such distance, 0.65 of the box, stand
    in; `box-crops` does so everywhere. Pre-training uses key points for this and nothing else.
 9. Weights. The code starts from ImageNet weights, ours from random ones unless --init names a
    file. A random encoder that is frozen first gets BatchNorm statistics from 256 hands. Without a
    validation split the last epoch is kept (the code keeps that of the least training loss).
10. Optimiser. The paper has LARS with Adam at 4.5e-3 (the code 1e-4 x sqrt(2048)); our rate grows
    with the root of the batch. Warm-up for 10 of 100 epochs, decay 1e-6, trust 0.02 and tau = 0.5
    are the code's; of fewer epochs a tenth warms up. We decay matrices only, the code some norms.
11. Fine-tuning. The release has no code for it. Losses, their weights (2D 1, depth 5, root 1),
    decay 2e-4, cosine and epochs are those of the first author's earlier project (dahiyaaneesh/
    Handposeestimation @4837be4), whose rate matches the paper's 5e-4; crops are 1 / 0.7 of the box,
    and on FreiHAND begin at the picture's centre and follow the prediction (freihand:centre,
    --two-pass), as in the release's test code. Ours: the output's bias starts at the training set's
    mean, its weights at a tenth; the frozen encoder's head has 512 hidden units.
12. Bones. The release's networks mean the palm's middle as root and the middle finger's first
    phalanx as unit (--bone middle, FreiHAND's scale), its loaders the wrist and the bone to the
    index MCP (--bone index). Both are here, with the floors and refinement inputs of each.
13. Metric 3D needs the bone's true length, `scale`: FreiHAND gives it for every picture, and so
    does `synthetic`. Where a data set does not, the training set's mean length is taken.
14. Mixing. --mix authors draws all sources equally often, in whole passes (code: with replacement).
15. Table 1's AUC of 0.72 at 16.6 cm fits thresholds up to 50 cm, not the 5 cm of Sec. 4.2; eval.py
    prints both, the former as protocol `peclr`.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import (
    BACKBONES, N_JOINTS, Flags, UserError, ViT, accumulate, arg, autocast, barrier,
    batch_statistics, blur, build_backbone, constant, cpu_state, crop, decay_groups, denormalise,
    fused_on, guarded, hsv_to_rgb, invert, load_backbone, load_checkpoint, normal, normalise,
    parallel, permutation, project, rank, rgb_to_hsv, rotation, save_checkpoint, say, settle,
    steps_per_epoch, to_grey, transform, translation, uniform, view_intrinsics, warp, world)
from hand.drawing import draw_skeleton, label, picture, sheet
from sources import Source, batches, open_data, training_steps
from sources.course import COURSE, SCORING, judging, learning
from sources.progress import Run
from sources.recipes import row_name
from sources.stages import keep_best, launch, mean_hand, report

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Config --------------------------------------------------------------------------------------

METHOD = "peclr"
MARGIN = 2.2             # stored square / hand box in fine-tuning, whose crops turn
STORE = 1.5              # side of that square / side of the network's input
VIEW_MARGIN = 2.9        # the same in pre-training, where a crop of margin 1.5 is 1.95 boxes wide
VIEW_STORE = 2.0
CROP = 1 / 0.7           # crop / hand box in fine-tuning and prediction (the release's test code)
RADIUS = 0.65            # farthest key point from their mean / box, on average over synthetic hands
GEOMETRIC = ("scale", "rotation", "translation")
APPEARANCE = ("colour-jitter", "colour-drop", "cut-out", "blur", "noise", "sobel")
BEST = {"peclr": ("scale", "rotation", "translation", "colour-jitter"),      # Sec. 4.4, last part
        "simclr": ("scale", "colour-jitter")}

VARIANTS = {
    "accumulate": "the loss sees one micro-batch at a time: 16 x 128 (authors' code)",
    "one-range": "L_z is one number a sample, over x and y (Eq. 4, literally)",
    "authors-shift": "0-14 source px to one side, divided by the network's side (authors' code)",
    "bgr": "colour jitter with red and blue swapped (authors' code)",
    "box-crops": "views centred on the box, without key points (ours)",
}

SMALL = dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, samples=3072, workers=0)
QUICK = {"pretrain": SMALL | dict(epochs=2, batch_size=128, micro_batch=128, warmup_epochs=0.2),
         "finetune": SMALL | dict(epochs=10, batch_size=32, micro_batch=32, lr=1e-3)}
PROBE = dict(epochs=50)                      # with --freeze: the authors' earlier project
QUICK_PROBE = dict(epochs=3, lr=5e-3)


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("resnet152", "encoder E", paper="resnet152", ref="Sec. 4.6",
                        choices=BACKBONES)
    image_size: int = arg(128, "side of the network's input, px", paper=128, finetune=224,
                          finetune_paper=224, ref="Sec. 4.1; fine-tuning: 128 in Sec. 4.4, 4.5")
    epochs: int = arg(100, "passes over the data", why="authors' README", finetune=100,
                      finetune_why="authors' earlier project; 50 with --freeze")
    batch_size: int = arg(2048, "pictures a step, over all processes", paper=2048, ref="Sec. 4.1",
                          finetune=128, finetune_why="authors' earlier project", least=1)
    micro_batch: int = arg(128, "pictures at a time, the unit of BatchNorm", why="authors' code",
                           finetune=32, finetune_why="ours", least=1)
    lr: float = arg(4.5e-3, "learning rate; pre-training: at a batch of 2048, x sqrt(batch / 2048)",
                    paper=4.5e-3, ref="Sec. 4.1", finetune=5e-4, finetune_paper=5e-4, above=0)
    warmup_epochs: float = arg(10.0, "epochs of linear warm-up, then cosine to 0",
                               why="authors' code; unless given a tenth at most", finetune=0.0,
                               finetune_why="authors' earlier project")
    weight_decay: float = arg(1e-6, "decay, not on biases and norms", why="authors' code",
                              finetune=2e-4, finetune_why="authors' earlier project")
    objective: str = arg("peclr", "Eq. 3, or Eq. 1: the views not undone", paper="peclr",
                         ref="Sec. 3.2", choices=("peclr", "simclr"), stage="pretrain")
    tau: float = arg(0.5, "temperature", why="authors' code", stage="pretrain", above=0)
    augment: tuple[str, ...] = arg(
        (), "transformations of Fig. 4, or else the objective's best", paper=BEST["peclr"],
        ref="Sec. 4.4", why="that of --objective; simclr's are scale colour-jitter",
        choices=GEOMETRIC + APPEARANCE, stage="pretrain")
    mix: str = arg("authors", "several data sets: each equally often, or all shuffled",
                   why="authors' code", choices=("authors", "concat"), stage="pretrain")
    freeze: bool = arg(False, "train a two-layer head on the frozen encoder", paper=False,
                       ref="Sec. 4.5 to 4.7; True in Sec. 4.4", stage="finetune")
    bone: str = arg("middle", "root, unit of depth: palm, middle MCP-PIP or wrist, wrist-index MCP",
                    why="the release's networks", choices=("middle", "index"), stage="finetune")
    two_pass: bool = arg(False, "predict, crop around that, predict again (release's test code)",
                         stage="finetune")
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS),
                                   stage="pretrain")


# ---- Views: what is drawn, and so what must be undone (Sec. 3.2, Fig. 4) -------------------------


class View(NamedTuple):
    """The geometric part t^g of a view of each sample; None where the composition leaves it out."""

    A: Tensor                   # (B, 3, 3) stored picture to view
    angle: Tensor | None        # (B,) rad, counter-clockwise
    shift: Tensor | None        # (B, 2) v / L of Eq. 4: by which share of the view the hand moved


def transformations(cfg: Config) -> tuple[str, ...]:
    """The composition in use: --augment, or the objective's best (Sec. 4.4)."""
    return cfg.augment or BEST[cfg.objective]


def stored_side(cfg: Config) -> int:
    """Side of the pictures that fine-tuning and evaluation are given, px."""
    return round(STORE * cfg.image_size)


def hand_circle(batch: dict, box_only: bool) -> tuple[Tensor, Tensor]:
    """Middle (B, 2) and radius (B,) of hands, px of image: mean and farthest key point (8)."""
    side = batch["image"].shape[-1]
    uv = batch["uv"]
    middle = uv.mean(1)
    radius = (uv - middle[:, None]).norm(dim=-1).amax(1)
    known = (radius > 0) & (not box_only)
    middle = torch.where(known[:, None], middle, (side - 1) / 2)
    return middle, torch.where(known, radius, RADIUS * side / VIEW_MARGIN)


def draw_view(batch: dict, cfg: Config, epoch: int, view: int) -> View:
    """Scale, rotation and translation of one view, drawn for each sample and composed."""
    on = transformations(cfg)
    S = cfg.image_size
    u = uniform(batch["index"], 4, cfg.seed, "peclr view", epoch, view)
    middle, radius = hand_circle(batch, "box-crops" in cfg.variant)
    margin = 0.9 + 0.6 * u[:, 0] if "scale" in on else torch.full_like(u[:, 0], 1.25)
    side = 2 * radius * margin                                          # px of image
    A = crop(middle, side, S)
    angle = shift = None
    if "rotation" in on:
        angle = (2 * u[:, 1] - 1) * math.pi / 4
        A = rotation(angle, S) @ A
    if "translation" in on and "authors-shift" in cfg.variant:
        jitter = -(15 * u[:, 2:]).floor()                               # px of the picture
        picture_side = side / batch["crop"][:, 0, 0].abs()            # the crop's, likewise
        A = translation(S * (jitter / picture_side[:, None])) @ A
        shift = jitter / S                                              # not by picture_side (3)
    elif "translation" in on:
        shift = (15 * u[:, 2:] - 7.5) / 128
        A = translation(S * shift) @ A
    return View(A, angle, shift)


def jitter_hsv(images: Tensor, factors: Tensor, bgr: bool = False) -> Tensor:
    """Colour jitter of (B, 3, H, W) in 0..1; factors (B, 4): hue, saturation, value, and an offset.

    `bgr` reads red as blue and the other way round, as the authors' code does (6).
    """
    hue, saturation, value = rgb_to_hsv(images.flip(1) if bgr else images).unbind(1)
    fh, fs, fv, add = factors[:, :, None, None].unbind(1)
    out = hsv_to_rgb(torch.stack([hue * fh, saturation * fs, (value * fv + add).clamp(0, 1)], 1))
    return out.flip(1) if bgr else out


def sobel(images: Tensor) -> Tensor:
    """Length of each channel's 3 x 3 Sobel gradient, (B, 3, H, W), clipped to 1; edges repeat."""
    kernel = constant(((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), images.device)
    kernel = torch.stack([kernel, kernel.T])[:, None].repeat(3, 1, 1, 1)
    gradient = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    across, down = gradient.unflatten(1, (3, 2)).unbind(2)
    return torch.hypot(across, down).clamp(max=1)


def cut_out(images: Tensor, u: Tensor) -> Tensor:
    """A black square, 0 to 16 % of the side, in (B, 3, S, S): u (B, 3) is its size, x and y."""
    S = images.shape[-1]
    half = 0.16 * S * u[:, 0, None] / 2
    at = torch.arange(S, device=images.device) + 0.5
    columns = (at - S * u[:, 1, None]).abs() < half
    rows = (at - S * u[:, 2, None]).abs() < half
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def change_appearance(images: Tensor, index: Tensor, cfg: Config, epoch: int, view: int,
                      on: tuple[str, ...]) -> Tensor:
    """t^a: appearance transformations of (B, 3, S, S) in 0..1, each sample by its own draws (7)."""
    S = images.shape[-1]

    def draw(n: int, purpose: str) -> Tensor:
        return uniform(index, n, cfg.seed, f"peclr {purpose}", epoch, view)

    half = {name: draw(1, f"{name} on")[:, 0, None, None, None] < 0.5 for name in on}
    if "sobel" in on:
        images = torch.where(half["sobel"], sobel(images), images)
    if "cut-out" in on:
        images = torch.where(half["cut-out"], cut_out(images, draw(3, "cut-out")), images)
    if "blur" in on:                                             # the kernel is a tenth of the side
        blurred = blur(images, 0.1 + 1.9 * draw(1, "blur")[:, 0], max(1, round(S / 20)))
        images = torch.where(half["blur"], blurred, images)
    if "colour-jitter" in on:                                    # always, as in the authors' code
        low = constant((0.01, 0.01, 0.5, 5 / 255), images.device)
        high = constant((1, 1, 1, 20 / 255), images.device)
        images = jitter_hsv(images, low + (high - low) * draw(4, "colour"), "bgr" in cfg.variant)
    if "noise" in on:
        noise = normal(index, 3 * S * S, cfg.seed, "peclr noise", epoch, view).view_as(images)
        images = torch.where(half["noise"], (images + 25 / 255 * noise).clamp(0, 1), images)
    if "colour-drop" in on:
        images = to_grey(images, half["colour-drop"].flatten())
    return images


def make_views(batch: dict, cfg: Config, epoch: int) -> tuple[Tensor, tuple[View, View]]:
    """A batch -> two views of each sample, (2, B, 3, S, S) normalised, and how each was made."""
    drawn = (draw_view(batch, cfg, epoch, 0), draw_view(batch, cfg, epoch, 1))
    pictures = warp(batch["image"], torch.stack([g.A for g in drawn], 1), cfg.image_size) / 255
    views = [change_appearance(pictures[:, k], batch["index"], cfg, epoch, k, transformations(cfg))
             for k in (0, 1)]
    return normalise(255 * torch.stack(views)), drawn


# ---- Model (Sec. 3.1, 3.3) -----------------------------------------------------------------------


def encode(backbone: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, d): the average of the last map, or a transformer's class token."""
    if isinstance(backbone, ViT):
        return backbone.tokens(images)[:, 0]
    return backbone(images.contiguous(memory_format=torch.channels_last))[-1].mean((2, 3))


class PeCLR(nn.Module):
    """f = g o E: encoder and projection head; g is thrown away after pre-training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        self.g = nn.Sequential(nn.Linear(self.backbone.dim, 512), nn.BatchNorm1d(512), nn.ReLU(),
                               nn.Linear(512, 128, bias=False))            # widths: authors' code

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> p (B, 128), the points x0, y0, x1, y1, ..."""
        return self.g(encode(self.backbone, images))


# ---- Losses (Eq. 1, 3, 4, 5) ---------------------------------------------------------------------


def undo_view(p: Tensor, angle: Tensor | None, shift: Tensor | None,
              one_range: bool = False) -> Tensor:
    """Eq. 3, 4: z~ = (t^g)^-1 p, for projections p (B, 2 m) whose pairs are points of a plane.

    angle (B,) rad and shift (B, 2), the share v / L by which the view moved its content; None is
    not undone, and with neither p itself comes back. `one_range`: L_z over x and y together.
    """
    if angle is None and shift is None:
        return p
    z = F.normalize(p, dim=1).unflatten(1, (-1, 2))                                # (B, m, 2)
    if shift is not None:
        axes = (1, 2) if one_range else (1,)
        L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)).detach()   # Eq. 4
        z = z - shift[:, None] * L_z
    if angle is not None:
        mean = z.mean(1, keepdim=True).detach()
        x, y = (z - mean).unbind(-1)
        c = angle.cos()[:, None]
        s = angle.sin()[:, None]
        z = torch.stack([c * x - s * y, s * x + c * y], -1) + mean                 # clockwise: back
    return z.flatten(1)


def nt_xent(z: Tensor, tau: float) -> Tensor:
    """Eq. 1, 3: z (2, B, D) -> mean over the 2 B anchors of -log softmax of the positive."""
    z = F.normalize(z.flatten(0, 1), dim=1)
    similarity = (z @ z.T / tau).fill_diagonal_(-math.inf)
    B = len(z) // 2
    return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B))


def pose_loss(pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: (B, J, 3) of u, v px, d in bones, twice -> L_J2D, L_d, none where `true` is NaN.

    2D: mean over x and y and over the joints that have it; depth likewise (authors' earlier code).
    """
    known = true.isfinite()
    error = (pred - true).abs().where(known, 0)
    flat = known[..., :2].all(-1)
    deep = known[..., 2]
    L_J2D = (error[..., :2].mean(-1) * flat).sum() / flat.sum().clamp(min=1)
    L_d = (error[..., 2] * deep).sum() / deep.sum().clamp(min=1)
    return L_J2D, L_d


@torch.no_grad()
def contrast_monitors(z: Tensor) -> dict[str, Tensor]:
    """Similarity of positives and negatives, how often the positive is the nearest; z (2, B, D).

    All similarities near 1 is a collapse; positives no nearer than negatives is nothing learnt.
    """
    z = F.normalize(z, dim=-1)
    table = z[0] @ z[1].T
    positive = table.diagonal()
    B = len(table)
    nearest = table.argmax(1) == torch.arange(B, device=z.device)
    return {"positive": positive.mean(), "nearest": nearest.float().mean(),
            "negative": (table.sum() - positive.sum()) / max(1, B * B - B)}


# ---- 3D hand pose estimator (Sec. 3.3) -----------------------------------------------------------
# A `rooted` hand has the convention's root as its joint 0; every other hand has the wrist there.


class Convention(NamedTuple):
    """What root and unit of depth mean, and the details of the code that means them so (12)."""

    root: tuple[int, ...]        # joints whose mean is the root
    bone: tuple[int, int]        # its length is the unit
    floor: float                 # least discriminant and leading coefficient
    limits: tuple[float, float]  # clamp of the root's depth, bones
    slope: float                 # of the refinement's LeakyReLU
    depth_first: bool            # refinement input: root, rays, depths; else depths, rays, root


MIDDLE_BONE = (9, 10)                    # middle MCP to PIP: FreiHAND's `scale` is its length
NOT_GIVEN = 1.0                          # m: a sample's `scale` where its data set gives no length
CONVENTIONS = {"middle": Convention((0, 9), MIDDLE_BONE, 1e-8, (4.0, 50.0), 0.01, False),
               "index": Convention((0,), (0, 5), 1e-6, (-math.inf, math.inf), 0.0, True)}


def root_depth(rays: Tensor, d: Tensor, bone: tuple[int, int], floor: float) -> Tensor:
    """Depth of the root, (B,) bones: where `bone` has length 1 (Iqbal et al. 2018, Eq. 6, 7).

    rays (B, J, 2) = the first two of K^-1 (u, v, 1); d (B, J) root-relative depth in bones. Of the
    two solutions the farther.
    """
    points = torch.cat([rays, d[..., None]], -1)
    xm, ym, zm = points[:, bone[0]].unbind(-1)
    xn, yn, zn = points[:, bone[1]].unbind(-1)
    a = (xn - xm) ** 2 + (yn - ym) ** 2
    b = 2 * (zn * (xn ** 2 + yn ** 2 - xn * xm - yn * ym)
             + zm * (xm ** 2 + ym ** 2 - xn * xm - yn * ym))
    c = (xn * zn - xm * zm) ** 2 + (yn * zn - ym * zm) ** 2 + (zn - zm) ** 2 - 1
    return (-b + (b * b - 4 * a * c).clamp(min=floor).sqrt()) / (2 * a.clamp(min=floor))


def lift(rays: Tensor, d: Tensor, root: Tensor) -> Tensor:
    """Eq. 6: J3D = K^-1 J2D (d + d_root); (B, J, 2), (B, J), (B,) -> (B, J, 3), in bones."""
    return F.pad(rays, (0, 1), value=1.0) * (d + root[:, None])[..., None]


def bone_length(joints: Tensor, bone: tuple[int, int]) -> Tensor:
    """Length of a bone, (B, J, 3) -> (B,)."""
    return (joints[:, bone[1]] - joints[:, bone[0]]).norm(dim=-1)


def with_root(joints: Tensor, convention: Convention) -> Tensor:
    """The rooted hand: joint 0 becomes the mean of the root's joints; (B, J, D), any axes."""
    root = torch.stack([joints[:, j] for j in convention.root], 1).mean(1, keepdim=True)
    return torch.cat([root, joints[:, 1:]], 1)


def with_wrist(rooted: Tensor, convention: Convention) -> Tensor:
    """The inverse of `with_root`: of a root (wrist + MCP) / 2 the wrist is 2 root - MCP."""
    wrist = len(convention.root) * rooted[:, :1]
    for joint in convention.root[1:]:
        wrist = wrist - rooted[:, joint, None]
    return torch.cat([wrist, rooted[:, 1:]], 1)


def pose_25d(batch: dict, A: Tensor, convention: Convention) -> tuple[Tensor, Tensor, Tensor]:
    """The rooted targets of Eq. 5 from a batch and its views A (B, 3, 3); NaN where unknown.

    Returns (B, J, 3) u, v px of the view and d in bones; the root's depth (B,) in bones; the length
    (B,) m of the unit bone.
    """
    joints = torch.where(batch["joints_ok"][..., None], batch["joints"], math.nan)
    unit = bone_length(joints, convention.bone)
    rooted = with_root(joints, convention)
    depth = rooted[..., 2] / unit[:, None]
    rooted_uv = with_root(transform(A, batch["uv"]), convention)
    root_uv = transform(A, project(rooted[:, :1], batch["K"]))       # the middle in space, as seen;
    root_uv = torch.where(root_uv.isfinite(), root_uv, rooted_uv[:, :1])     # no 3D: in the picture
    uv = torch.cat([root_uv, rooted_uv[:, 1:]], 1)
    return torch.cat([uv, (depth - depth[:, :1])[..., None]], -1), depth[:, 0], unit


def hand_view(image: Tensor, cfg: Config, epoch: int = 0, index: Tensor | None = None
              ) -> tuple[Tensor, Tensor]:
    """Stored squares (B, 3, L, L) -> what the network sees, (B, 3, S, S), and how, (B, 3, 3).

    With `index` (B,) a training view: turned by up to 45 degrees, shifted (authors' earlier code).
    """
    B = len(image)
    L = image.shape[-1]
    S = cfg.image_size
    A = crop(torch.full((B, 2), (L - 1) / 2, device=image.device),
             torch.full((B,), L * CROP / MARGIN, device=image.device), S)
    if index is not None:
        u = uniform(index, 3, cfg.seed, "peclr fine-tuning", epoch)
        turn = rotation((2 * u[:, 0] - 1) * math.pi / 4, S)
        A = translation(S * (15 * u[:, 1:] - 7.5) / 128) @ turn @ A
    return normalise(warp(image, A, S)), A


class HandNet(nn.Module):
    """Encoder and 2.5D head; root depth in closed form, refined by a small network (12)."""

    USES = {"image", "K", "scale"}

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.convention = CONVENTIONS[cfg.bone]
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        self.backbone.requires_grad_(not cfg.freeze)
        width = self.backbone.dim
        hidden = []
        if cfg.freeze:                                                 # Sec. 4.4: a two-layer MLP
            hidden = [nn.Linear(width, 512), nn.ReLU()]
            width = 512
        self.head = nn.Sequential(*hidden, nn.Linear(width, 3 * N_JOINTS))
        slope = self.convention.slope
        self.refine = nn.Sequential(
            nn.Linear(3 * N_JOINTS + 1, 128), nn.BatchNorm1d(128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.BatchNorm1d(128), nn.LeakyReLU(slope), nn.Linear(128, 1))
        self.register_buffer("unit", torch.tensor(1.0))                # mean length of bone 9-10, m

    def train(self, mode: bool = True) -> HandNet:
        """A frozen encoder stays in evaluation mode: its BatchNorm does not move."""
        super().train(mode)
        self.backbone.train(mode and not self.cfg.freeze)
        return self

    def forward(self, images: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) normalised, K of these views (B, 3, 3) -> the rooted hand, seen and lifted.

        Returns u, v px and d in bones (B, J, 3), the root's d being 0; rays (B, J, 2); the refined
        root depth (B,) in bones, which sends no gradient into the encoder or the head.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cfg.freeze):
            f = encode(self.backbone, images)
        with torch.autocast(images.device.type, enabled=False):
            f = f.to(torch.promote_types(f.dtype, torch.float32))
            out = self.head(f).unflatten(1, (N_JOINTS, 3))
            out = torch.cat([out[..., :2], F.pad(out[:, 1:, 2:], (0, 0, 1, 0))], -1)
            rays, root = self.depth(out.detach(), K)
        return out, rays, root

    def depth(self, out: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
        """(B, J, 3) as `forward`, K of the views -> rays (B, J, 2), refined root depth (B,) bones.

        The refinement adds to the closed form (Spurr et al. 2020, as in the authors' code).
        """
        c = self.convention
        rays = transform(invert(K), out[..., :2])
        root = root_depth(rays, out[..., 2], c.bone, c.floor).clamp(*c.limits)
        parts = [out[..., 2], rays.flatten(1), root[:, None]]
        parts = parts[::-1] if c.depth_first else parts
        return rays, root + self.refine(torch.cat(parts, 1))[:, 0]

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """{"image", "K", "scale"} -> joints, root m in the camera frame; uv px of image."""
        S = self.cfg.image_size
        K = view_intrinsics(batch)
        crops, A = hand_view(batch["image"], self.cfg)
        seen_K = A @ K
        out, rays, root = self(crops, seen_K)
        if self.cfg.two_pass:
            uv = transform(invert(A), out[..., :2])
            low = uv.amin(1)
            high = uv.amax(1)
            A = crop((low + high) / 2, CROP * (high - low).amax(1).clamp(min=4), S)
            crops = normalise(warp(batch["image"], A, S))
            seen_K = A @ K
            out, rays, root = self(crops, seen_K)
        joints = with_wrist(lift(rays, out[..., 2], root), self.convention)              # bones
        length = torch.where(batch["scale"] == NOT_GIVEN, self.unit, batch["scale"])    # 9-10, m
        if self.cfg.bone == "index":            # where the joints are in lengths of another bone
            length = length / bone_length(joints, MIDDLE_BONE).clamp(min=1e-6)
        uv = torch.cat([project(joints[:, :1], seen_K), out[:, 1:, :2]], 1)
        joints = joints * length[:, None, None]
        return {"joints": joints, "root": joints[:, 0], "uv": transform(invert(A), uv)}


# Our joints, each by its number in the release: the root, then MCP, PIP, DIP, tip of all fingers.
RELEASED = (0, 1, 6, 11, 16, 2, 7, 12, 17, 3, 8, 13, 18, 4, 9, 14, 19, 5, 10, 15, 20)


def load_released(model: HandNet, file: str) -> str:
    """Head and refinement of a fine-tuned network of the release, put into our joint order.

    Keys backend_model.fc.{weight (64, d), bias} and zroot_ref.zroot_ref.*; returns what to print,
    or "" where the file has none. Raises UserError where this model means depth otherwise (--bone)
    or has another head.
    """
    weights = load_checkpoint(file)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    head = "backend_model.fc."
    refine = "zroot_ref.zroot_ref."
    if f"{head}weight" not in weights or f"{refine}0.weight" not in weights:
        return ""
    if model.cfg.bone != "middle" or model.cfg.freeze:
        raise UserError(f"{file}: is a fine-tuned network of the release; it needs --bone middle "
                        "and no --freeze")
    j = torch.tensor(RELEASED)
    outputs = (3 * j[:, None] + torch.arange(3)).flatten()              # rows u, v, d of each joint
    rays = (N_JOINTS + 2 * j[:, None] + torch.arange(2)).flatten()
    inputs = torch.cat([j, rays, torch.tensor([3 * N_JOINTS])])          # depths, rays, root
    state = {k.removeprefix(refine): v for k, v in weights.items() if k.startswith(refine)}
    state["0.weight"] = state["0.weight"][:, inputs]
    try:
        model.head[-1].load_state_dict({k: weights[head + k][outputs] for k in ("weight", "bias")})
        model.refine.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{file}: head or refinement do not fit ({reason})") from None
    return f"{file}: head and depth refinement of the release read, joints put into our order"


def build(cfg: Config) -> HandNet:
    """The network that eval.py judges."""
    return HandNet(cfg)


# ---- Training ------------------------------------------------------------------------------------


class Lars(torch.optim.Adam):
    """LARS around Adam (You et al. 2017; lightning-bolts 0.2.2): each tensor's gradient, with its
    decay, times q = min(eta |w| / (|g| + decay |w| + eps) / rate, 1); then Adam.

    Where w or g is 0 the gradient stays as it is. At rate 0 q is 1.
    """

    ETA = 0.02
    EPS = 1e-8

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            for w in group["params"]:
                if w.grad is None:
                    continue
                size = w.norm()
                slope = w.grad.norm()
                trust = self.ETA * size / (slope + decay * size + self.EPS)
                q = (trust / group["lr"]).clamp(max=1)
                scaled = (w.grad + decay * w) * q
                w.grad.copy_(torch.where((size > 0) & (slope > 0), scaled, w.grad))
            group["weight_decay"] = 0.0                             # it is in the gradient already
        super().step(closure)
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


def lr_at(step: int, peak: float, warm: int, total: int) -> float:
    """Rate at a step: linear from 0 to `peak` in `warm` steps, then a cosine to 0 at `total`."""
    if step < warm:
        return peak * step / max(1, warm - 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1, (step - warm) / max(1, total - warm))))


def mixed_order(sizes: list[int], seed: int, epoch: int) -> Tensor:
    """Order of an epoch that draws all of several data sets equally often: (sum of sizes,) int64.

    A small one is passed through several times; `i + k n` is sample i the k-th time (14).
    """
    n = sum(sizes)
    parts = []
    start = 0
    for number, size in enumerate(sizes):
        quota = n // len(sizes) + (number < n % len(sizes))
        passes = math.ceil(quota / size)
        once = [start + permutation(size, seed, epoch * passes + k) + k * n for k in range(passes)]
        parts.append(torch.cat(once)[:quota])
        start += size
    return torch.cat(parts)[permutation(n, seed, epoch)]


def projections(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> Tensor:
    """Both views of a micro-batch, encoded, projected and, for PeCLR, undone: z~ (2, B, 128)."""
    views, drawn = make_views(batch, cfg, epoch)
    with autocast(views.device, cfg.precision):     # the network only: bfloat16 misses pixels
        p = net(views.flatten(0, 1))
    p = p.to(torch.promote_types(p.dtype, torch.float32)).unflatten(0, (2, -1))
    if cfg.objective == "simclr":
        return p
    one_range = "one-range" in cfg.variant
    return torch.stack([undo_view(p[k], g.angle, g.shift, one_range) for k, g in enumerate(drawn)])


def gathered(z: Tensor) -> Tensor:
    """(2, B, D) of all processes side by side, where only one's own carry gradients."""
    if world() == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world())]
    torch.distributed.all_gather(parts, z.detach().contiguous())
    parts[rank()] = z
    return torch.cat(parts, 1)


def contrast(z: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Eq. 3 of one's own projections among those of all processes: terms, the gradient sent back.

    Processes average their gradients, so the loss of the whole batch counts once for each.
    """
    everyone = gathered(z)
    loss = nt_xent(everyone, cfg.tau)
    (world() * loss).backward()
    return {"loss": loss.detach(), **contrast_monitors(everyone)}


# A step of pre-training in three forms: the micro-batches of one process in, the terms out, their
# gradients left in the network. Eq. 3 couples all samples of a batch.


def whole_step(net: nn.Module, micro_batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Eq. 3 over the whole batch where a process has one micro-batch of it."""
    return contrast(projections(net, micro_batch, cfg, epoch), cfg)


def cached_step(net: nn.Module, micro_batches: list[dict], cfg: Config, epoch: int
                ) -> dict[str, Tensor]:
    """Eq. 3 over a whole batch too large for the memory: each micro-batch goes through twice (1).

    First without a graph, for the loss and its gradient on each projection; then one at a time with
    that gradient.
    """
    with torch.no_grad():
        z = torch.cat([projections(net, batch, cfg, epoch) for batch in micro_batches], 1)
    terms = contrast(z.requires_grad_(), cfg)
    slopes = z.grad.split(cfg.micro_batch, 1)
    for k, (batch, slope) in enumerate(zip(micro_batches, slopes), 1):
        with accumulate(net, last=k == len(micro_batches)):
            projections(net, batch, cfg, epoch).backward(slope)
    return terms


def accumulated_step(net: nn.Module, micro_batches: list[dict], cfg: Config, epoch: int
                     ) -> dict[str, Tensor]:
    """The mean of Eq. 3 over micro-batches, each among its own samples only (`accumulate`)."""
    sums: dict[str, Tensor] = {}
    for k, batch in enumerate(micro_batches, 1):
        with accumulate(net, last=k == len(micro_batches)):
            z = projections(net, batch, cfg, epoch)
            terms = {"loss": nt_xent(z, cfg.tau), **contrast_monitors(z.detach())}
            (terms["loss"] / len(micro_batches)).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
    return sums


def finetune_step(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Eq. 5 and the refined root's depth of a micro-batch, each over the samples with its label."""
    crops, A = hand_view(batch["image"], cfg, epoch, batch["index"])
    true, root_true, _ = pose_25d(batch, A, CONVENTIONS[cfg.bone])
    K = A @ view_intrinsics(batch)              # outside: bfloat16 intrinsics are millimetres off
    with autocast(crops.device, cfg.precision):
        out, _, root = net(crops, K)
    known = root_true.isfinite()
    L_J2D, L_d = pose_loss(out, true)
    L_root = (root - root_true).abs().where(known, 0).sum() / known.sum().clamp(min=1)
    loss = L_J2D + 5 * L_d + L_root
    return {"loss": loss, "L_J2D": L_J2D, "L_d": L_d, "L_root": L_root}


# twin: handmim.py:stage_name
def stage_name(cfg: Config) -> str:
    """What a pre-training is called in folders and on the screen."""
    return "-".join((cfg.objective, *cfg.variant))


def pretrain(cfg: Config, out: Path, device: torch.device) -> None:
    """Sec. 3.2 on pictures without labels; writes OUT/backbone.pt."""
    torch.manual_seed(cfg.seed)
    name = stage_name(cfg)
    folder = out / f"pretrain-{name}"
    model = PeCLR(cfg)
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
    side = round(VIEW_STORE * cfg.image_size)
    data = open_data(cfg, cfg.data, "train", side, VIEW_MARGIN, device)
    sizes = [len(part) for part in data.parts()]
    steps = steps_per_epoch(len(data), cfg.batch_size)
    total = cfg.epochs * steps
    warm = round(cfg.warmup_epochs * steps)
    peak = cfg.lr * math.sqrt(cfg.batch_size / 2048)
    millions = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    seen = cfg.micro_batch if "accumulate" in cfg.variant else cfg.batch_size
    say(f"pre-training {name} on {len(data):,} pictures, cropped around key points where there are "
        f"any: {', '.join(transformations(cfg))}; {2 * seen - 2:,} negatives, "
        f"peak rate {peak:.3g}, encoder {millions:.1f} M parameters, {steps} steps an epoch")
    if rank() == 0:
        draw_views(folder, data, cfg, device)
    optimizer = Lars(decay_groups(model, cfg.weight_decay))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        mixed = cfg.mix == "authors" and len(sizes) > 1
        order = mixed_order(sizes, cfg.seed, epoch) if mixed else None
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device,
                                                  order):
            rate = lr_at(run.step, peak, warm, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with batch_statistics(model):
                if "accumulate" in cfg.variant:
                    terms = accumulated_step(net, micro_batches, cfg, epoch)
                elif len(micro_batches) > 1:
                    terms = cached_step(net, micro_batches, cfg, epoch)
                else:
                    terms = whole_step(net, micro_batches[0], cfg, epoch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.advance(terms, epoch, lr=rate, may_save=step + 1 < steps)
        run.log(epoch=epoch + 1)
        run.save()
    if cfg.epochs == 0:
        run.save()
    if rank() == 0:
        save_checkpoint(out / "backbone.pt", cpu_state(model.backbone))
    barrier()
    say(f"wrote {out / 'backbone.pt'}")


def finetune(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """Sec. 3.3 on labels: end to end, or the head alone (--freeze); best.pt: best epoch on val."""
    torch.manual_seed(cfg.seed)
    folder = out / f"{'probe' if cfg.freeze else 'finetune'}-{row}"
    model = HandNet(cfg)
    side = stored_side(cfg)
    data = open_data(cfg, (cfg.finetune,), "train", side, MARGIN, device, labelled=True)
    val = open_data(cfg, (cfg.finetune,), "val", side, MARGIN, device)
    mean = mean_hand(data)
    start_at_mean(model, data, mean)
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
        released = load_released(model, cfg.init)
        if released:
            say(released)
    elif cfg.freeze:
        settle_statistics(model, data, device)
    if rank() == 0:
        draw_crops(folder, data, cfg, device)
    frozen = " with its encoder frozen" if cfg.freeze else ""
    say(f"fine-tuning {row}{frozen} on {mean['labels']:,} labelled hands, "
        f"validated on {len(val):,}")
    about = {"method": METHOD, "row": row, "mean": mean}
    steps = steps_per_epoch(len(data), cfg.batch_size)
    total = cfg.epochs * steps
    warm = round(cfg.warmup_epochs * steps)
    optimizer = torch.optim.Adam(decay_groups(model, cfg.weight_decay), fused=fused_on(device))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg.lr, warm, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            with batch_statistics(model):
                for k, batch in enumerate(micro_batches, 1):
                    with accumulate(net, last=k == len(micro_batches)):
                        terms = finetune_step(net, batch, cfg, epoch)
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


@torch.no_grad()
def start_at_mean(model: HandNet, data: Source, mean: dict[str, Any]) -> None:
    """The head's bias at the training set's mean u, v, d; the mean length of bone 9-10 (11, 13)."""
    S = model.cfg.image_size
    c = model.convention
    index = torch.linspace(0, len(data) - 1, min(len(data), 4096)).long()     # sets go by subject
    joints = torch.cat([data.targets(part)["joints"] for part in index.split(512)])
    unit = bone_length(joints, MIDDLE_BONE)
    if unit.isfinite().any():
        model.unit.fill_(unit.nanmean())
    length = bone_length(joints, c.bone).nanmean().nan_to_num(1.0)
    depth = with_root(mean["joints"][None], c)[0, :, 2]
    uv = with_root(mean["uv"][None], c)[0]                               # share of the square
    uv = S * ((uv - 0.5) * MARGIN / CROP + 0.5)                          # px of the crop
    model.head[-1].weight.mul_(0.1)
    model.head[-1].bias.copy_(torch.cat([uv, ((depth - depth[0]) / length)[:, None]], 1).flatten())


@torch.no_grad()
def settle_statistics(model: HandNet, data: Source, device: torch.device) -> None:
    """BatchNorm's statistics of a random encoder to be frozen: the mean over 8 batches (9)."""
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    model.to(device).backbone.train()
    for norm in norms:
        norm.momentum = None                                        # a plain mean of all batches
    index = torch.linspace(0, len(data) - 1, min(len(data), 256)).long()      # sets go by subject
    for batch in batches(data, list(index.split(32)), device, 0):
        model.backbone(hand_view(batch["image"], model.cfg)[0])
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def draw_views(folder: Path, data: Source, cfg: Config, device: torch.device) -> None:
    """views.png: four samples as stored and both views with their key points moved along;
    transformations.png: Fig. 4, each transformation alone."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 4).long()], device, 0))
    views, drawn = make_views(batch, cfg, 0)
    rows = [[draw_skeleton(denormalise(view), uv)
             for view, uv in zip(views[k], transform(g.A, batch["uv"]))]
            for k, g in enumerate(drawn)]
    rows = [list(batch["image"]), *rows]
    sheet(folder / "views.png", rows, labels=("stored", "view 1", "view 2"), width=800, note="Four "
          "samples: the square that is cut out of each picture, and the two views that are "
          "compared, key points moved along where they are known.",
          bones=bool(batch["uv"].isfinite().any()))
    first = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor)}
    still = draw_view(first, dataclasses.replace(cfg, augment=("blur",)), 0, 0).A
    original = warp(first["image"], still, cfg.image_size)[0] / 255
    hand = near_points(transform(still, first["uv"])[0], cfg.image_size)
    cells = [label(picture(original, 160), "original")]
    for name in GEOMETRIC + APPEARANCE:
        alone = dataclasses.replace(cfg, augment=(name,))
        tries = torch.cat([make_views(first, alone, k)[0].flatten(0, 1) for k in range(16)])
        change = (denormalise(tries) - original).abs().mean(1) * hand
        clearest = change.mean((1, 2)).argmax()                         # half the draws do nothing
        cells.append(label(picture(denormalise(tries[clearest]), 160), name))
    sheet(folder / "transformations.png", [cells[:5], cells[5:]], width=800, note="The "
          "transformations of Fig. 4, each alone: of 32 draws the one that changes the hand most.")


def near_points(uv: Tensor, size: int) -> Tensor:
    """Which pixels lie within an eighth of the side of points (n, 2) px: (size, size), 1 or 0.

    Where no point is known, the middle half of the picture.
    """
    at = torch.arange(size, device=uv.device)
    pixels = torch.cartesian_prod(at, at).flip(1).to(uv)                          # (size^2, 2) x, y
    known = uv[uv.isfinite().all(-1)]
    if not len(known):
        inside = ((pixels - (size - 1) / 2).abs() < size / 4).all(1)
    else:
        inside = torch.cdist(pixels, known).amin(1) < size / 8
    return inside.view(size, size).float()


def draw_crops(folder: Path, data: Source, cfg: Config, device: torch.device) -> None:
    """views.png of fine-tuning: eight crops as the network sees them, with their key points."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 8).long()], device, 0))
    crops, A = hand_view(batch["image"], cfg, 0, batch["index"])
    drawn = [draw_skeleton(denormalise(view), uv, width=160)
             for view, uv in zip(crops, transform(A, batch["uv"]))]
    sheet(folder / "views.png", [drawn[:4], drawn[4:]], bones=True,
          note="Eight training crops as the network sees them, with their key points.")


# ---- CLI -----------------------------------------------------------------------------------------


def finetune_config(given: dict[str, Any]) -> Config:
    """Fine-tuning's options; with --freeze those of a probe stand between defaults and flags."""
    if given.get("freeze"):
        given = (QUICK_PROBE if given.get("quick") else PROBE) | given
    return settle(Config, given, "finetune", QUICK)


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One stage, or with --quick both."""
    work: dict[str, float] = {}
    if given.get("quick"):
        first = settle(Config, given, "pretrain", QUICK)
        given = given | {"init": str(out / "backbone.pt"),
                         "finetune": given.get("finetune") or first.data[0],
                         "row": given.get("row") or stage_name(first)}
        work = {f"pretrain-{stage_name(first)}": learning(first, 2, val=False)}
    elif not given.get("finetune"):
        return pretrain(settle(Config, given, "pretrain", QUICK), out, device)
    cfg = finetune_config(given)
    row = row_name(cfg.init, cfg.row)
    stage = "probe" if cfg.freeze else "finetune"
    COURSE.plan(work | {f"{stage}-{row}": learning(cfg), SCORING: judging(1)})
    if work:
        pretrain(first, out, device)
    finetune(cfg, out, row, device)
    report(cfg, out / f"{stage}-{row}", row, device, build, stored_side(cfg), MARGIN)


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    launch(Config, METHOD, argv, __doc__, QUICK, VARIANTS, run_stages)


if __name__ == "__main__":
    sys.exit(guarded(main))
