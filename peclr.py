"""PeCLR: Self-Supervised 3D Hand Pose Estimation from monocular RGB via Contrastive Learning.

Spurr, Dahiya, Wang, Zhang, Hilliges; ICCV 2021, arXiv 2106.05953. The row reproduced is Table 2,
"RN152 + PeCLR (ours)": pre-trained on FreiHAND and YouTube3DHands, FreiHAND 0.66 cm PA-EPE, 0.87 PA-AUC.

    python peclr.py --quick                                            minutes on a CPU, no data
    python peclr.py --data freihand=DIR1 yt3d=DIR2                     the paper's pre-training
    python peclr.py --init runs/peclr-freihand-yt3d/backbone.pt --finetune freihand=DIR1

Table 1 and Fig. 5: pre-train with `--data freihand:90=DIR1 --backbone resnet50 [--objective simclr]
[--augment NAME ...]`, then `--init FILE --finetune freihand:90=DIR1 --backbone resnet50 --image-size 128
--freeze`. Fig. 6: `--label-fraction 0.2`. Table 3: `eval.py RUN --data yt3d=DIR2`.

The idea: SimCLR pulls two views of a picture together and so forgets where things are. Here a view's
rotation and translation are first undone on its projection, read as points of a plane; then the two
must agree (Eq. 3). What looks alike becomes invariant, what moves stays equivariant.

Letters: I picture, p projection (2 m numbers), z~ projection with the view undone, m = 64 points, L_z
their range (Eq. 4), tau temperature, K intrinsics, d root-relative depth (Eq. 5, 6) in lengths of one
bone. B batch, J = 21 joints, S side of a view, px.

Differs from the paper
 1. Batch. Paper: 2048. Authors' code (dahiyaaneesh/peclr @f29f0a9): 16 accumulated losses of 128 pictures,
    254 negatives each. Here the loss sees all 4,094: projections of the whole batch first, without a
    graph; their gradients; then each micro-batch again with them. `accumulate` is the authors' form.
 2. L_z. Eq. 4 reads as one number a sample. The code's, and ours, is one for each of x and y, over the
    points of the projection divided by its norm, and not differentiated; nor is the centre of the rotation.
    `one-range` takes Eq. 4 literally. Shifts come last in a view, so they are undone first.
 3. L. The code divides a shift in source pixels by the network's side, which is too small by the
    factor of the resize. Ours is the share of the crop that the hand moved; `authors-shift` is theirs.
 4. Shift. Paper silent. Code: 0 to 14 px of the source, to the left and up. Ours: up to 7.5 of 128 px of
    the view either way, so that test crops lie in the middle of what was trained. Angles are not rounded.
 5. Scale has no inverse: a projection's length drops out of the cosine (Sec. 3.2, last sentence). That is
    exact where points scale about the origin; rotation is about their mean.
 6. Colour jitter. The code turns RGB arrays to HSV as if they were BGR; ours does not, `bgr` does.
    Its ranges are the code's: hue x U(0.01, 1), saturation x U(0.01, 1), value x U(0.5, 1) + U(5, 20).
 7. Order. Code: Sobel, cut-out, blur, rotate, crop, resize, colour jitter, noise, colour drop. Here one
    warp comes first, so Sobel, cut-out and blur act on the view. Ranges and chances are the code's.
 8. Crops. Paper silent. Code: centred on the mean of the 21 key points, half as wide as 0.9 to 1.5 (off:
    1.25) times the farthest one. Where a picture has no key points, the middle of the hand's box, or of
    the picture, and the mean such distance, 0.65 of the box, stand in; `box-crops` does so everywhere.
    So where key points are annotated, pre-training does use them, to crop and for nothing else.
 9. Weights. The code starts from ImageNet weights; ours from random ones unless --init names a file.
    A random encoder that is frozen first gets BatchNorm statistics from 256 hands. Where no validation
    split is, the last epoch is kept (code: that of the least training loss).
10. Optimiser. Paper: LARS with Adam, 4.5e-3 (code: 1e-4 x sqrt(2048)). The rate grows with the root of
    the batch. Warm-up 10 of 100 epochs, of fewer a tenth; decay 1e-6, trust 0.02, tau = 0.5 are the code's. We decay
    matrices only; the code, by its renaming, also some norms.
11. Fine-tuning. The release has no code for it. Losses, their weights (2D 1, depth 5, root 1), decay
    2e-4, cosine and epochs are those of the first author's earlier project (dahiyaaneesh/
    Handposeestimation @4837be4), whose rate matches the paper's 5e-4. The output's bias starts at the
    training set's mean, its weights at a tenth, the frozen encoder's head has 512 hidden units (ours);
    crops are 1 / 0.7 of the box, as the release's test code has them.
12. Bones. The release's networks mean the palm's middle as root and the middle finger's first phalanx as
    unit (--bone middle, FreiHAND's scale); the loaders mean the wrist and the bone to the index MCP
    (--bone index). Both are here, whole, by name, with the floors and refinement inputs of each.
13. Metric 3D needs the bone's true length, `scale`: FreiHAND gives it for every picture, and so does
    `synthetic`. Where a data set does not, the training set's mean length is taken.
14. Mixing. --mix authors draws every source equally often, in whole passes (code: with replacement).
15. Table 1's AUC of 0.72 at 16.6 cm fits thresholds up to 50 cm, not the 5 cm of Sec. 4.2; eval.py
    prints both, the former as protocol `peclr`.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

# common before torch: it settles how threads wait
from common import (
    BACKBONES, N_JOINTS, Flags, Run, UserError, accumulate, arg, autocast, average_buffers,
    barrier, batches, blur, build_backbone, cpu_state, crop, decay_groups, denormalise,
    guarded, hsv_to_rgb, invert, load_backbone, load_checkpoint, normal, normalise, parallel,
    permutation, project, rank, recall, remember, rgb_to_hsv, rotation, row_name,
    save_checkpoint, say, settle, steps_per_epoch, to_grey, training_steps, transform,
    translation, uniform, view_intrinsics, warp, world)
from hand.drawing import draw_skeleton, label, picture, sheet
from sources import open_data
from sources.judging import keep_best, launch, mean_hand, report

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Config ---------------------------------------------------------------------------------------

METHOD = "peclr"
MARGIN, STORE = 2.2, 1.5               # stored square / hand box, stored / network side: fine-tuning crops turn
VIEW_MARGIN, VIEW_STORE = 2.9, 2.0     # of pre-training: a crop of margin 1.5 is 1.95 boxes wide, and turns
CROP = 1 / 0.7                         # fine-tuning crop / hand box (release's test code)
RADIUS = 0.65                          # farthest key point from their mean / box, on average over synthetic hands
GEOMETRIC = ("scale", "rotation", "translation")
APPEARANCE = ("colour-jitter", "colour-drop", "cut-out", "blur", "noise", "sobel")
BEST = {"peclr": ("scale", "rotation", "translation", "colour-jitter"),                 # Sec. 4.4, last part
        "simclr": ("scale", "colour-jitter")}

VARIANTS = {
    "accumulate": "the loss sees one micro-batch at a time: 16 x 128 (authors' code)",
    "one-range": "L_z is one number a sample, over x and y (Eq. 4, literally)",
    "authors-shift": "0-14 source px to one side, divided by the network's side (authors' code)",
    "bgr": "colour jitter with red and blue swapped (authors' code)",
    "box-crops": "views centred on the box, without key points (ours)",
}

QUICK = {"pretrain": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=4, batch_size=128,
                          micro_batch=128, samples=3072, warmup_epochs=0.2, workers=0),
         "finetune": dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, epochs=3, batch_size=64,
                          micro_batch=64, samples=3072, lr=1.5e-3, workers=0)}
PROBE = {False: dict(epochs=50),                           # frozen encoder: authors' earlier project; --quick
         True: dict(epochs=3, lr=5e-3)}


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("resnet152", "encoder E", paper="resnet152", ref="Sec. 4.6", choices=BACKBONES)
    image_size: int = arg(128, "side of the network's input, px", paper=128, ref="Sec. 4.1",
                          finetune=224, finetune_paper=224)
    epochs: int = arg(100, "passes over the data", why="authors' README",
                      finetune=100, finetune_why="authors' earlier project; 50 with --freeze")
    batch_size: int = arg(2048, "pictures a step, over all processes", paper=2048, ref="Sec. 4.1",
                          finetune=128, finetune_why="authors' earlier project")
    micro_batch: int = arg(128, "pictures at a time, the unit of BatchNorm", why="authors' code",
                           finetune=32, finetune_why="ours")
    lr: float = arg(4.5e-3, "learning rate; pre-training: at a batch of 2048, x sqrt(batch / 2048)",
                    paper=4.5e-3, ref="Sec. 4.1", finetune=5e-4, finetune_paper=5e-4)
    warmup_epochs: float = arg(10.0, "epochs of linear warm-up, then cosine to 0", why="authors' code",
                               finetune=0.0, finetune_why="authors' earlier project")
    weight_decay: float = arg(1e-6, "decay, not on biases and norms", why="authors' code",
                              finetune=2e-4, finetune_why="authors' earlier project")
    objective: str = arg("peclr", "Eq. 3, or Eq. 1: the views not undone", paper="peclr", ref="Sec. 3.2",
                         choices=("peclr", "simclr"))
    tau: float = arg(0.5, "temperature", why="authors' code")
    augment: tuple[str, ...] = arg((), "transformations of Fig. 4 (default: peclr's scale rotation translation "
                                   "colour-jitter; simclr's scale colour-jitter)",
                                   choices=GEOMETRIC + APPEARANCE)
    mix: str = arg("authors", "several data sets: each equally often, or one after the other, shuffled",
                   why="authors' code", choices=("authors", "concat"))
    freeze: bool = arg(False, "fine-tune a two-layer head on the frozen encoder (Tab. 1)")
    bone: str = arg("middle", "root and unit of depth: palm and middle MCP-PIP, or wrist and wrist-index MCP",
                    why="the release's networks", choices=("middle", "index"))
    two_pass: bool = arg(False, "predict, crop around the prediction, predict again (release's test code)")
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS))


# ---- Views: what is drawn, and so what must be undone (Sec. 3.2, Fig. 4) --------------------------


class View(NamedTuple):
    """The geometric part t^g of a view of each sample; None where the composition leaves it out."""

    A: Tensor                            # (B, 3, 3) stored picture to view
    angle: Tensor | None                 # (B,) rad, counter-clockwise
    shift: Tensor | None                 # (B, 2) v / L of Eq. 4: by which share of the view the hand moved


def transformations(cfg: Config) -> tuple[str, ...]:
    """The composition in use: --augment, or the objective's best (Sec. 4.4)."""
    return cfg.augment or BEST[cfg.objective]


def stored_side(cfg: Config) -> int:
    """Side of the pictures that fine-tuning and evaluation are given, px."""
    return round(STORE * cfg.image_size)


def hand_circle(batch: dict, box_only: bool) -> tuple[Tensor, Tensor]:
    """Middle (B, 2) and radius (B,) of each hand, px of image: mean and farthest of its key points (8)."""
    side, uv = batch["image"].shape[-1], batch["uv"]
    middle = uv.mean(1)
    radius = (uv - middle[:, None]).norm(dim=-1).amax(1)
    known = radius.isfinite() & (radius > 0) & (not box_only)
    middle = torch.where(known[:, None], middle, (side - 1) / 2)
    return middle, torch.where(known, radius, RADIUS * side / VIEW_MARGIN)


def draw_view(batch: dict, cfg: Config, epoch: int, view: int) -> View:
    """Scale, rotation and translation of one view, drawn for each sample; composed, not yet applied."""
    on, S = transformations(cfg), cfg.image_size
    u = uniform(batch["index"], 4, cfg.seed, "peclr view", epoch, view)
    middle, radius = hand_circle(batch, "box-crops" in cfg.variant)
    margin = 0.9 + 0.6 * u[:, 0] if "scale" in on else torch.full_like(u[:, 0], 1.25)
    side = 2 * radius * margin                                                        # px of image
    angle = (2 * u[:, 1] - 1) * math.pi / 4 if "rotation" in on else None
    moved = shift = (15 * u[:, 2:] - 7.5) / 128 if "translation" in on else None
    if shift is not None and "authors-shift" in cfg.variant:
        jitter = -(15 * u[:, 2:]).floor()                                             # px of the picture
        moved = jitter / (side / batch["crop"][:, 0, 0].abs())[:, None]
        shift = jitter / S
    A = crop(middle, side, S)
    A = A if angle is None else rotation(angle, S) @ A
    return View(A if moved is None else translation(S * moved) @ A, angle, shift)


def jitter_hsv(images: Tensor, factors: Tensor, bgr: bool = False) -> Tensor:
    """Colour jitter (B, 3, H, W) in 0..1: factors (B, 4) for hue, saturation, value and what is added to it.

    `bgr` reads red as blue and the other way round, as the authors' code does (6).
    """
    hue, saturation, value = rgb_to_hsv(images.flip(1) if bgr else images).unbind(1)
    fh, fs, fv, add = factors[:, :, None, None].unbind(1)
    out = hsv_to_rgb(torch.stack([hue * fh, saturation * fs, (value * fv + add).clamp(0, 1)], 1))
    return out.flip(1) if bgr else out


def sobel(images: Tensor) -> Tensor:
    """Length of the 3 x 3 Sobel gradient in each channel, (B, 3, H, W) in 0..1, clipped; edges repeat."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device)
    kernel = torch.stack([kernel, kernel.T])[:, None].repeat(3, 1, 1, 1)
    gradient = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    return gradient.unflatten(1, (3, 2)).norm(dim=2).clamp(max=1)


def cut_out(images: Tensor, u: Tensor) -> Tensor:
    """A black square of 0 to 16 % of the side, somewhere in (B, 3, S, S): u (B, 3) is size, x and y."""
    S = images.shape[-1]
    side, (x, y) = 0.16 * S * u[:, 0, None], (S * u[:, 1:]).T[..., None]
    at = torch.arange(S, device=images.device) + 0.5
    inside = ((at - y).abs() < side / 2)[:, :, None] & ((at - x).abs() < side / 2)[:, None]
    return images.masked_fill(inside[:, None], 0)


def change_appearance(images: Tensor, index: Tensor, cfg: Config, epoch: int, view: int,
                      on: tuple[str, ...]) -> Tensor:
    """t^a: appearance transformations of (B, 3, S, S) in 0..1, each sample by its own draws (7)."""
    draw = lambda n, purpose: uniform(index, n, cfg.seed, f"peclr {purpose}", epoch, view)
    half = {name: draw(1, f"{name} on")[:, 0, None, None, None] < 0.5 for name in on}
    S = images.shape[-1]
    if "sobel" in on:
        images = torch.where(half["sobel"], sobel(images), images)
    if "cut-out" in on:
        images = torch.where(half["cut-out"], cut_out(images, draw(3, "cut-out")), images)
    if "blur" in on:                                               # the kernel is a tenth of the side
        blurred = blur(images, 0.1 + 1.9 * draw(1, "blur")[:, 0], max(1, round(S / 20)))
        images = torch.where(half["blur"], blurred, images)
    if "colour-jitter" in on:                                      # always, as the authors' code
        low = torch.tensor([0.01, 0.01, 0.5, 5 / 255], device=images.device)
        high = torch.tensor([1, 1, 1, 20 / 255], device=images.device)
        images = jitter_hsv(images, low + (high - low) * draw(4, "colour"), "bgr" in cfg.variant)
    if "noise" in on:
        noise = normal(index, 3 * S * S, cfg.seed, "peclr noise", epoch, view).view_as(images)
        images = torch.where(half["noise"], (images + 25 / 255 * noise).clamp(0, 1), images)
    if "colour-drop" in on:
        images = to_grey(images, half["colour-drop"].flatten())
    return images


def make_views(batch: dict, cfg: Config, epoch: int) -> tuple[Tensor, tuple[View, View]]:
    """A batch -> two views of each sample, (2, B, 3, S, S) normalised, and how each was made."""
    drawn = tuple(draw_view(batch, cfg, epoch, view) for view in (0, 1))
    pictures = warp(batch["image"], torch.stack([g.A for g in drawn], 1), cfg.image_size) / 255
    views = [change_appearance(pictures[:, k], batch["index"], cfg, epoch, k, transformations(cfg))
             for k in (0, 1)]
    return normalise(255 * torch.stack(views)), drawn


# ---- Model (Sec. 3.1, 3.3) ------------------------------------------------------------------------


def encode(backbone: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, d): the average of the last map, or a transformer's class token."""
    if hasattr(backbone, "tokens"):
        return backbone.tokens(images)[:, 0]
    return backbone(images.contiguous(memory_format=torch.channels_last))[-1].mean((2, 3))


class PeCLR(nn.Module):
    """f = g o E: encoder and projection head; g is thrown away after pre-training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.backbone = build_backbone(cfg.backbone, cfg.image_size)
        self.g = nn.Sequential(nn.Linear(self.backbone.dim, 512), nn.BatchNorm1d(512), nn.ReLU(),
                               nn.Linear(512, 128, bias=False))            # widths: authors' code

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> p (B, 128), the points x0, y0, x1, y1, ..."""
        return self.g(encode(self.backbone, images))


# ---- Losses (Eq. 1, 3, 4, 5) ----------------------------------------------------------------------


def undo_view(p: Tensor, angle: Tensor | None, shift: Tensor | None, one_range: bool = False) -> Tensor:
    """Eq. 3, 4: z~ = (t^g)^-1 p, for projections p (B, 2 m) whose pairs are points of the picture's plane.

    angle (B,) rad and shift (B, 2), the share v / L by which the view moved its content; None: not undone,
    and with neither p itself comes back. `one_range`: L_z over x and y together.
    """
    if angle is None and shift is None:
        return p
    z = F.normalize(p, dim=1).unflatten(1, (-1, 2))                                   # (B, m, 2)
    if shift is not None:
        axes = (1, 2) if one_range else (1,)
        L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)).detach()      # Eq. 4
        z = z - shift[:, None] * L_z
    if angle is not None:
        mean, (c, s) = z.mean(1, keepdim=True).detach(), (angle.cos()[:, None], angle.sin()[:, None])
        x, y = (z - mean).unbind(-1)
        z = torch.stack([c * x - s * y, s * x + c * y], -1) + mean                    # clockwise: back
    return z.flatten(1)


def nt_xent(z: Tensor, tau: float) -> Tensor:
    """Eq. 1, 3: mean over the 2 B anchors of -log softmax of the positive among all others; z (2, B, D)."""
    z = F.normalize(z.flatten(0, 1), dim=1)
    similarity = (z @ z.T / tau).fill_diagonal_(-math.inf)
    B = len(z) // 2
    return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B))


def pose_loss(pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: (B, J, 3) of u, v px and depth in bones, twice -> L_J2D, L_d; NaN in `true` does not count.

    2D: mean over x and y and over the joints that have it; depth likewise (authors' earlier project).
    """
    error = (pred - true).abs()
    known = true.isfinite()
    error, flat, deep = error.where(known, 0), known[..., :2].all(-1), known[..., 2]
    return (error[..., :2].mean(-1) * flat).sum() / flat.sum().clamp(min=1), \
        (error[..., 2] * deep).sum() / deep.sum().clamp(min=1)


@torch.no_grad()
def contrast_monitors(z: Tensor) -> dict[str, Tensor]:
    """Similarity of positives and of negatives, and how often the positive is the nearest; z (2, B, D).

    All similarities near 1 is a collapse; positives no nearer than negatives is nothing learnt.
    """
    z = F.normalize(z, dim=-1)
    table = z[0] @ z[1].T
    positive, B = table.diagonal(), len(table)
    nearest = table.argmax(1) == torch.arange(B, device=z.device)
    return {"positive": positive.mean(), "nearest": nearest.float().mean(),
            "negative": (table.sum() - positive.sum()) / max(1, B * B - B)}


# ---- 3D hand pose estimator (Sec. 3.3) ------------------------------------------------------------


class Convention(NamedTuple):
    """What root and unit of depth mean, and with them the details of the code that means them so (12)."""

    root: tuple[int, ...]                # joints whose mean is the root
    bone: tuple[int, int]                # its length is the unit
    floor: float                         # least discriminant and leading coefficient
    limits: tuple[float, float]          # clamp of the root's depth, bones
    slope: float                         # of the refinement's LeakyReLU
    depth_first: bool                    # refinement input: root, rays, depths; else depths, rays, root


MIDDLE_BONE = (9, 10)                    # middle MCP to PIP: FreiHAND's `scale` is its length
CONVENTIONS = {"middle": Convention((0, 9), MIDDLE_BONE, 1e-8, (4.0, 50.0), 0.01, False),
               "index": Convention((0,), (0, 5), 1e-6, (-math.inf, math.inf), 0.0, True)}


def root_depth(rays: Tensor, d: Tensor, bone: tuple[int, int], floor: float) -> Tensor:
    """Depth of the root, (B,) bones: where `bone` has length 1 (Iqbal et al. 2018, Eq. 6, 7).

    rays (B, J, 2) = the first two of K^-1 (u, v, 1); d (B, J) root-relative depth in bones. Of the two
    solutions the farther.
    """
    m, n = bone
    (xm, ym), (xn, yn), zm, zn = rays[:, m].T, rays[:, n].T, d[:, m], d[:, n]
    a = (xn - xm) ** 2 + (yn - ym) ** 2
    b = 2 * (zn * (xn ** 2 + yn ** 2 - xn * xm - yn * ym) + zm * (xm ** 2 + ym ** 2 - xn * xm - yn * ym))
    c = (xn * zn - xm * zm) ** 2 + (yn * zn - ym * zm) ** 2 + (zn - zm) ** 2 - 1
    return (-b + (b * b - 4 * a * c).clamp(min=floor).sqrt()) / (2 * a.clamp(min=floor))


def lift(rays: Tensor, d: Tensor, root: Tensor) -> Tensor:
    """Eq. 6: J3D = K^-1 J2D (d + d_root); (B, J, 2), (B, J), (B,) -> (B, J, 3), in bones."""
    return F.pad(rays, (0, 1), value=1.0) * (d + root[:, None])[..., None]


def bone_length(joints: Tensor, bone: tuple[int, int]) -> Tensor:
    """Length of a bone, (B, J, 3) -> (B,)."""
    return (joints[:, bone[1]] - joints[:, bone[0]]).norm(dim=-1)


def swap_root(joints: Tensor, convention: Convention, back: bool = False) -> Tensor:
    """Joint 0 from wrist to the convention's root, or `back`; (B, J, D) linear coordinates.

    The palm is the middle of wrist and middle MCP, so wrist = 2 palm - MCP.
    """
    if len(convention.root) == 1:
        return joints
    other = joints[:, convention.root[1]]
    first = 2 * joints[:, 0] - other if back else (joints[:, 0] + other) / 2
    return torch.cat([first[:, None], joints[:, 1:]], 1)


def pose_25d(batch: dict, A: Tensor, convention: Convention) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of Eq. 5 from a batch and its views: (B, J, 3) u, v px of the view and d in bones,
    the root's depth in bones (B,), the unit bone's length (B,) m; NaN where unknown."""
    joints = torch.where(batch["joints_ok"][..., None], batch["joints"], math.nan)
    joints = swap_root(joints, convention)
    unit = bone_length(joints, convention.bone)
    uv = transform(A, batch["uv"])
    root_uv = transform(A, project(joints[:, :1], batch["K"]))                 # the middle in space, seen
    flat = swap_root(uv, convention)[:, :1]                                    # no 3D: the middle in the picture
    uv = torch.cat([torch.where(root_uv.isfinite(), root_uv, flat), uv[:, 1:]], 1)
    depth = joints[..., 2] / unit[:, None]
    return torch.cat([uv, (depth - depth[:, :1])[..., None]], -1), depth[:, 0], unit


def hand_view(image: Tensor, cfg: Config, epoch: int = 0, index: Tensor | None = None
              ) -> tuple[Tensor, Tensor]:
    """Stored squares (B, 3, L, L) -> what the network sees, (B, 3, S, S), and how, (B, 3, 3).

    With `index` (B,) a training view: turned by up to 45 degrees and shifted (authors' earlier project).
    """
    (B, L), S = (len(image), image.shape[-1]), cfg.image_size
    A = crop(torch.full((B, 2), (L - 1) / 2, device=image.device),
             torch.full((B,), L * CROP / MARGIN, device=image.device), S)
    if index is not None:
        u = uniform(index, 3, cfg.seed, "peclr fine-tuning", epoch)
        A = translation(S * (15 * u[:, 1:] - 7.5) / 128) @ rotation((2 * u[:, 0] - 1) * math.pi / 4, S) @ A
    return normalise(warp(image, A, S)), A


class HandNet(nn.Module):
    """Encoder and 2.5D head; root depth in closed form, refined by a small network (12)."""

    USES = {"image", "K", "scale"}

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.convention = cfg, CONVENTIONS[cfg.bone]
        self.backbone = build_backbone(cfg.backbone, cfg.image_size).requires_grad_(not cfg.freeze)
        d = self.backbone.dim
        hidden = [nn.Linear(d, 512), nn.ReLU()] if cfg.freeze else []          # Sec. 4.4: a two-layer MLP
        self.head = nn.Sequential(*hidden, nn.Linear(512 if hidden else d, 3 * N_JOINTS))
        act = lambda: nn.LeakyReLU(self.convention.slope)
        self.refine = nn.Sequential(
            nn.Linear(3 * N_JOINTS + 1, 128), nn.BatchNorm1d(128), act(),
            nn.Linear(128, 128), nn.BatchNorm1d(128), act(), nn.Linear(128, 1))
        self.register_buffer("unit", torch.tensor(1.0))                        # mean length of bone 9-10, m

    def train(self, mode: bool = True) -> HandNet:
        """A frozen encoder stays in evaluation mode: its BatchNorm does not move."""
        super().train(mode)
        self.backbone.train(mode and not self.cfg.freeze)
        return self

    def forward(self, images: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) normalised, K of these views (B, 3, 3) -> u, v px and d in bones (B, J, 3), the
        root's d being 0; rays (B, J, 2); refined root depth (B,) in bones."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cfg.freeze):
            f = encode(self.backbone, images)
        with torch.autocast(images.device.type, enabled=False):
            out = self.head(f.to(torch.promote_types(f.dtype, torch.float32))).unflatten(1, (N_JOINTS, 3))
            out = torch.cat([out[..., :2], F.pad(out[:, 1:, 2:], (0, 0, 1, 0))], -1)
            return out, *self.depth(out.detach(), K)

    def depth(self, out: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
        """(B, J, 3) as `forward` and K of the views -> rays (B, J, 2), refined root depth (B,) bones.

        The refinement adds to the closed form (Spurr et al. 2020, as in the authors' code).
        """
        c, rays = self.convention, transform(invert(K), out[..., :2])
        root = root_depth(rays, out[..., 2], c.bone, c.floor).clamp(*c.limits)
        parts = [out[..., 2], rays.flatten(1), root[:, None]]
        return rays, root + self.refine(torch.cat(parts[::-1] if c.depth_first else parts, 1))[:, 0]

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """{"image", "K", "scale"} -> joints, root m in the camera frame; uv px of image."""
        c, cfg, K = self.convention, self.cfg, view_intrinsics(batch)
        crops, A = hand_view(batch["image"], cfg)
        for again in (True, False) if cfg.two_pass else (False,):
            seen_K = A @ K                          # outside: bfloat16 intrinsics are millimetres off
            with autocast(crops.device):
                out, rays, root = self(crops, seen_K)
            if again:
                uv = transform(invert(A), out[..., :2])
                low, high = uv.amin(1), uv.amax(1)
                A = crop((low + high) / 2, CROP * (high - low).amax(1).clamp(min=4), cfg.image_size)
                crops = normalise(warp(batch["image"], A, cfg.image_size))
        joints = swap_root(lift(rays, out[..., 2], root), c, back=True)                     # bones
        length = torch.where(batch["scale"] == 1, self.unit, batch["scale"])                # 1 m: not known
        if cfg.bone == "index":                       # the length given is that of 9-10, not of this unit
            length = length / bone_length(joints, MIDDLE_BONE).clamp(min=1e-6)
        uv = torch.cat([project(joints[:, :1], seen_K), out[:, 1:, :2]], 1)
        joints = joints * length[:, None, None]
        return {"joints": joints, "root": joints[:, 0], "uv": transform(invert(A), uv)}


RELEASED = (0, 1, 6, 11, 16, 2, 7, 12, 17, 3, 8, 13, 18, 4, 9, 14, 19, 5, 10, 15, 20)     # ours to the release's joints


def load_released(model: HandNet, file: str) -> str:
    """Head and refinement of a fine-tuned network of the release, put into our joint order.

    Keys backend_model.fc.{weight (64, d), bias} and zroot_ref.zroot_ref.*; "" where the file has none.
    Raises UserError where this model means depth otherwise (--bone) or has another head.
    """
    weights = load_checkpoint(file)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    if "backend_model.fc.weight" not in weights or "zroot_ref.zroot_ref.0.weight" not in weights:
        return ""
    if model.cfg.bone != "middle" or model.cfg.freeze:
        raise UserError(f"{file}: is a fine-tuned network of the release; it needs --bone middle and no --freeze")
    j = torch.tensor(RELEASED)
    outputs = (3 * j[:, None] + torch.arange(3)).flatten()                    # rows u, v, d of each joint
    inputs = torch.cat([j, N_JOINTS + (2 * j[:, None] + torch.arange(2)).flatten(), torch.tensor([63])])
    state = {k.removeprefix("zroot_ref.zroot_ref."): v for k, v in weights.items() if k.startswith("zroot_ref.")}
    state["0.weight"] = state["0.weight"][:, inputs]
    try:
        model.head[-1].load_state_dict({k: weights[f"backend_model.fc.{k}"][outputs] for k in ("weight", "bias")})
        model.refine.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{file}: head or refinement do not fit ({str(error).splitlines()[-1].strip()})") from None
    return f"{file}: head and depth refinement of the release read, joints put into our order"


def build(cfg: Config) -> HandNet:
    """The network that eval.py judges."""
    return HandNet(cfg)


# ---- Training -------------------------------------------------------------------------------------


class Lars(torch.optim.Adam):
    """LARS around Adam (You et al. 2017; lightning-bolts 0.2.2): each tensor's gradient, with its decay,
    times q = min(eta |w| / (|g| + decay |w| + eps) / rate, 1), where neither norm is 0; then Adam."""

    ETA, EPS = 0.02, 1e-8

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            for w in group["params"]:
                if w.grad is None:
                    continue
                size, slope = w.norm(), w.grad.norm()
                q = self.ETA * size / (slope + decay * size + self.EPS) / group["lr"] if group["lr"] else 1 + size
                both = (size > 0) & (slope > 0)
                w.grad.copy_(torch.where(both, (w.grad + decay * w) * q.clamp(max=1), w.grad))
            group["weight_decay"] = 0.0                             # it is in the gradient already
        super().step(closure)
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


def lr_at(step: int, peak: float, warm: int, total: int) -> float:
    """Rate at a step: linear from 0 to `peak` in `warm` steps, then half a cosine to 0 at `total`."""
    if step < warm:
        return peak * step / max(1, warm - 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1, (step - warm) / max(1, total - warm))))


def mixed_order(sizes: list[int], seed: int, epoch: int) -> Tensor:
    """Order of an epoch that draws each of several joined data sets equally often: (sum of sizes,) int64.

    A small one is passed through several times; `i + k n` is sample i the k-th time (14).
    """
    n, parts, start = sum(sizes), [], 0
    for number, size in enumerate(sizes):
        quota = n // len(sizes) + (number < n % len(sizes))
        passes = math.ceil(quota / size)
        once = [start + permutation(size, seed, epoch * passes + k) + k * n for k in range(passes)]
        parts.append(torch.cat(once)[:quota])
        start += size
    return torch.cat(parts)[permutation(n, seed, epoch)]


def projections(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> Tensor:
    """Both views of a micro-batch, encoded, projected and, for PeCLR, undone: (2, B, 128)."""
    views, drawn = make_views(batch, cfg, epoch)
    with autocast(views.device):                    # the network only: bfloat16 points would miss theirs
        p = net(views.flatten(0, 1))
    p = p.to(torch.promote_types(p.dtype, torch.float32)).unflatten(0, (2, -1))
    if cfg.objective == "simclr":
        return p
    return torch.stack([undo_view(p[k], g.angle, g.shift, "one-range" in cfg.variant)
                        for k, g in enumerate(drawn)])


def gathered(z: Tensor) -> Tensor:
    """The projections of all processes, (2, B, D) each, side by side; only one's own carry gradients."""
    if world() == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world())]
    torch.distributed.all_gather(parts, z.detach().contiguous())
    parts[rank()] = z
    return torch.cat(parts, 1)


def batch_loss(z: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Eq. 3 of one's own projections among those of all processes, and its monitors."""
    everyone = gathered(z)
    return {"loss": nt_xent(everyone, cfg.tau), **contrast_monitors(everyone.detach())}


def pretrain_step(net: nn.Module, micro_batches: list[dict], cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Loss of the whole batch, Eq. 3, with its gradients left in the network (1).

    Several micro-batches go through twice: without a graph for the loss and its gradient on each
    projection, then one at a time with that gradient. BatchNorm's running statistics move once.
    """
    last = len(micro_batches)
    if "accumulate" in cfg.variant:
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(micro_batches, 1):
            with accumulate(net, last=k == last):
                z = projections(net, batch, cfg, epoch)
                terms = {"loss": nt_xent(z, cfg.tau), **contrast_monitors(z.detach())}
                (terms["loss"] / last).backward()
            sums = {n: sums.get(n, 0) + t.detach() / last for n, t in terms.items()}
        return sums
    if last == 1:
        terms = batch_loss(projections(net, micro_batches[0], cfg, epoch), cfg)
        (world() * terms["loss"]).backward()                        # processes' gradients are averaged
        return terms
    with torch.no_grad():
        z = torch.cat([projections(net, batch, cfg, epoch) for batch in micro_batches], 1)
    terms = batch_loss(z.requires_grad_(), cfg)
    (world() * terms["loss"]).backward()
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    for k, (batch, slope) in enumerate(zip(micro_batches, z.grad.split(cfg.micro_batch, 1)), 1):
        with accumulate(net, last=k == last):
            projections(net, batch, cfg, epoch).backward(slope)
    for norm in norms:
        norm.track_running_stats = True
    return terms


def finetune_step(net: nn.Module, micro_batches: list[dict], cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Eq. 5 and the refined root's depth, each over the samples that have its label; gradients left."""
    sums: dict[str, Tensor] = {}
    for k, batch in enumerate(micro_batches, 1):
        crops, A = hand_view(batch["image"], cfg, epoch, batch["index"])
        true, root_true, _ = pose_25d(batch, A, CONVENTIONS[cfg.bone])
        K = A @ view_intrinsics(batch)
        with accumulate(net, last=k == len(micro_batches)):
            with autocast(crops.device):
                out, _, root = net(crops, K)
            known = root_true.isfinite()
            L_J2D, L_d = pose_loss(out, true)
            L_root = (root - root_true).abs().where(known, 0).sum() / known.sum().clamp(min=1)
            loss = L_J2D + 5 * L_d + L_root
            (loss / len(micro_batches)).backward()
        terms = {"loss": loss, "L_J2D": L_J2D, "L_d": L_d, "L_root": L_root}
        sums = {n: sums.get(n, 0) + t.detach() / len(micro_batches) for n, t in terms.items()}
    return sums


def train(cfg: Config, folder: Path, model: nn.Module, data: Any, device: torch.device,
          train_step: Callable, optimizer: torch.optim.Optimizer, peak: float, after_epoch: Callable) -> None:
    """The loop of both stages; everything it needs to go on after a crash is in `run`."""
    steps = steps_per_epoch(len(data), cfg.batch_size)
    total = cfg.epochs * steps
    warm = min(round(cfg.warmup_epochs * steps), total // 10)
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total)
    sizes = [len(part) for part in getattr(data, "datasets", [data])]
    if cfg.epochs == 0:
        after_epoch(run, -1)
        run.save()
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        order = mixed_order(sizes, cfg.seed, epoch) if cfg.mix == "authors" and len(sizes) > 1 else None
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device, order):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(run.step, peak, warm, total)
            terms = train_step(net, micro_batches, cfg, epoch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average_buffers(model)
            run.advance(terms, epoch, lr=group["lr"], may_save=step + 1 < steps)
        run.log(epoch=epoch + 1, **after_epoch(run, epoch))
        run.save()


def pretrain(cfg: Config, out: Path, device: torch.device) -> Path:
    """Sec. 3.2 on pictures without labels; returns OUT/backbone.pt, or backbone-simclr.pt beside PeCLR's."""
    torch.manual_seed(cfg.seed)
    name = "-".join((cfg.objective, *cfg.variant))
    model, folder = PeCLR(cfg), out / f"pretrain-{name}"
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
    data = open_data(cfg, cfg.data, "train", round(VIEW_STORE * cfg.image_size), VIEW_MARGIN, device)
    size, peak = sum(p.numel() for p in model.backbone.parameters()) / 1e6, cfg.lr * math.sqrt(cfg.batch_size / 2048)
    seen = cfg.micro_batch if "accumulate" in cfg.variant else cfg.batch_size
    say(f"pre-training {name} on {len(data):,} pictures, cropped around key points where there are any: "
        f"{', '.join(transformations(cfg))}; {2 * seen - 2:,} negatives, "
        f"peak rate {peak:.3g}, encoder {size:.1f} M parameters, "
        f"{steps_per_epoch(len(data), cfg.batch_size)} steps an epoch")
    if rank() == 0:
        draw_views(folder, data, cfg, device)
    optimizer = Lars(decay_groups(model, cfg.weight_decay))
    train(cfg, folder, model, data, device, pretrain_step, optimizer, peak, lambda run, epoch: {})
    file = out / ("backbone.pt" if not cfg.quick or cfg.objective == "peclr" else f"backbone-{cfg.objective}.pt")
    if rank() == 0:
        save_checkpoint(file, cpu_state(model.backbone))
    barrier()
    say(f"wrote {file}")
    return file


def finetune(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """Sec. 3.3 on labels: end to end, or the head alone (--freeze); best.pt is the best validation epoch."""
    side, target = stored_side(cfg), (cfg.finetune,)
    folder = out / f"{'probe' if cfg.freeze else 'finetune'}-{row}"
    torch.manual_seed(cfg.seed)
    model = HandNet(cfg)
    data = open_data(cfg, target, "train", side, MARGIN, device, labelled=True)
    val, mean = open_data(cfg, target, "val", side, MARGIN, device), mean_hand(data)
    start_at_mean(model, data, mean)
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
        if said := load_released(model, cfg.init):
            say(said)
    elif cfg.freeze:
        settle_statistics(model, data, device)
    if rank() == 0:
        draw_crops(folder, data, cfg, device)
    say(f"fine-tuning {row}{' with its encoder frozen' * cfg.freeze} on {mean['labels']:,} labelled hands, "
        f"validated on {len(val):,}")
    optimizer = torch.optim.Adam(decay_groups(model, cfg.weight_decay))
    about = {"method": METHOD, "row": row, "mean": mean}
    train(cfg, folder, model, data, device, finetune_step, optimizer, cfg.lr,
          lambda run, epoch: keep_best(run, epoch, val, cfg, device, about))
    barrier()                                                       # others read what the first wrote


@torch.no_grad()
def start_at_mean(model: HandNet, data: Any, mean: dict[str, Any]) -> None:
    """Bias of the head at the training set's mean u, v and d; the mean length of bone 9-10 (11, 13)."""
    S, joints = model.cfg.image_size, mean["joints"][None]
    index = torch.arange(min(len(data), 4096))
    every = torch.cat([data.targets(part)["joints"] for part in index.split(512)])
    unit = bone_length(every, MIDDLE_BONE)
    if unit.isfinite().any():
        model.unit.fill_(unit.nanmean())
    c = model.convention
    length = bone_length(every, c.bone).nanmean().nan_to_num(1.0)
    uv, depth = swap_root(mean["uv"][None], c)[0], swap_root(joints, c)[0, :, 2]
    uv = S * ((uv - 0.5) * MARGIN / CROP + 0.5)                                 # share of the square -> px
    model.head[-1].weight.mul_(0.1)
    model.head[-1].bias.copy_(torch.cat([uv, ((depth - depth[0]) / length)[:, None]], 1).flatten())


@torch.no_grad()
def settle_statistics(model: HandNet, data: Any, device: torch.device) -> None:
    """BatchNorm's statistics of a random encoder that will be frozen: the mean over 8 training batches (9)."""
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    model.to(device).backbone.train()
    for norm in norms:
        norm.momentum = None                                        # a plain mean of all batches
    for batch in batches(data, list(torch.arange(min(len(data), 256)).split(32)), device, 0):
        model.backbone(hand_view(batch["image"], model.cfg)[0])
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def draw_views(folder: Path, data: Any, cfg: Config, device: torch.device) -> None:
    """views.png: both views of four samples with their key points moved along; transformations.png: Fig. 4,
    each transformation alone."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 4).long()], device, 0))
    views, drawn = make_views(batch, cfg, 0)
    rows = [[draw_skeleton(denormalise(view), uv) for view, uv in zip(views[k], transform(g.A, batch["uv"]))]
            for k, g in enumerate(drawn)]
    sheet(folder / "views.png", rows, labels=("view 1", "view 2"), width=800)
    first = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor)}
    still = draw_view(first, dataclasses.replace(cfg, augment=("blur",)), 0, 0).A
    original = warp(first["image"], still, cfg.image_size)[0] / 255
    cells = [label(picture(original, 160), "original")]
    for name in GEOMETRIC + APPEARANCE:                            # half of the draws change nothing: the clearest of 8
        alone = dataclasses.replace(cfg, augment=(name,))
        tries = [denormalise(make_views(first, alone, epoch)[0][0, 0]) for epoch in range(8)]
        best = max(tries, key=lambda view: float((view - original).abs().mean()))
        cells.append(label(picture(best, 160), name))
    sheet(folder / "transformations.png", [cells[:5], cells[5:]], width=800)


def draw_crops(folder: Path, data: Any, cfg: Config, device: torch.device) -> None:
    """views.png of fine-tuning: eight crops as the network sees them, with their key points."""
    batch = next(batches(data, [torch.linspace(0, len(data) - 1, 8).long()], device, 0))
    crops, A = hand_view(batch["image"], cfg, 0, batch["index"])
    drawn = [draw_skeleton(denormalise(view), uv, width=160)
             for view, uv in zip(crops, transform(A, batch["uv"]))]
    sheet(folder / "views.png", [drawn[:4], drawn[4:]])


# ---- CLI ------------------------------------------------------------------------------------------


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One stage, or with --quick all of them: both objectives, then every row frozen and end to end."""
    given = remember(out, recall(given | {"out": str(out)}))
    make = lambda stage, **more: settle(Config, given | more, stage, QUICK)
    probe = lambda freeze: (PROBE[bool(given.get("quick"))] | given if freeze else {}) | {"freeze": freeze}
    end = lambda cfg, names: report(cfg, out, names, device, build, stored_side(cfg), MARGIN)
    if given.get("quick"):
        inits = {"scratch": "random"}
        for objective in ("simclr", "peclr"):
            inits[objective] = str(pretrain(make("pretrain", objective=objective), out, device))
        target = given.get("finetune") or make("pretrain").data[0]
        for row, init in inits.items():
            for freeze in (True, False):
                cfg = make("finetune", **probe(freeze) | dict(init=init, finetune=target))
                finetune(cfg, out, row, device)
        end(cfg, list(inits))
    elif given.get("finetune"):
        cfg = make("finetune", **probe(given.get("freeze", False)))
        finetune(cfg, out, row_name(cfg.init), device)
        end(cfg, [row_name(cfg.init)])
    else:
        pretrain(make("pretrain"), out, device)


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    launch(Config, METHOD, argv, __doc__, QUICK, VARIANTS, run_stages)


if __name__ == "__main__":
    sys.exit(guarded(main))
