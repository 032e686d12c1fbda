"""HandMIM: Pose-Aware Self-Supervised Learning for 3D Hand Mesh Estimation.

Liu, Lin, Wang, Zheng, Zhu (ByteDance), arXiv 2307.16061. The second and third command are those of
Table 1 "HandMIM-Small", in the paper FreiHAND 6.57 / 6.57 mm PA vertex / joint error, F@5 0.725,
F@15 0.984, and with `--finetune ho3d=DIR` of the same row of Table 2; nothing was run at that scale
here. Tables 3 (iBOT) and 5 (losses removed), Fig. 7 (frozen blocks), ViT-B and -L run here, too.

    python handmim.py --quick                                 minutes on a CPU, no data
    python handmim.py --data freihand=DIR1 yt3d=DIR2 folder:hands=DIR3
    python handmim.py --init runs/handmim-freihand-yt3d-folder/backbone.pt --finetune freihand=DIR1

DIR3 holds COCO 2017's train and unlabeled pictures, in which MediaPipe finds the hands (15).

The idea: hide patches of two views of a hand and let a student recover what a slow copy of itself,
the teacher, makes of the whole views: their patch tokens (L_patch), their pixels (L_recon), and
across the views the class token, read as 128 pseudo key points with each view's transform undone
(L_pose).

Letters: gamma scale, R rotation, (a, b) shift of a view (Eq. 3), z the 256 numbers that the shared
MLP makes of a token, K prototypes, c centre, tau temperature; fine-tuning: theta (16 rotations),
beta (10) MANO pose and shape, t wrist in the camera, m, K intrinsics. B batch, N patches, D width,
S image side.

Differs from the paper (it has no public code; "iBOT" is bytedance/ibot @da316d8)
 1. Gaps. Where the paper is silent we take iBOT: rate 2e-3 at 1,024 is iBOT's 5e-4 x 1024 / 256, so
    it is the peak; ten epochs of warm-up, cosine to 1e-6; decay 0.04 to 0.4; teacher's momentum
    0.996 to 1; temperatures 0.1 and 0.04 to 0.07 over 30 epochs; centres 0.9; clipping at 3, each
    tensor by its own norm; stochastic depth 0.1 for the student; prototypes still for an epoch,
    their norms too but for ViT-S. Still prototypes, and a warm-up that is not given, take at most a
    tenth of a run, so short ones work. Of its start the teacher keeps exp(-(1 - m) steps / 2): of
    0.996 nothing after 86,400 steps, but two fifths of 0.95 after --quick's 35, which begin at 0.74
    so that half a percent is left.
 2. Masks. The text says M = 1 keeps a token, its formula and Eq. 2 and 9 that M = 1 hides it: 1
    hides. Block-wise as iBOT; `random-mask`. One ratio in U[0.1, 0.5] for each picture and view.
 3. Latent. "A shared MLP", then 128 x 2 = 256 numbers: the width of iBOT's bottleneck. We undo the
    view there, then normalise and score K = 8,192 prototypes (reading B), which keeps iBOT's guard
    against collapse. `reading-a`: the 256 numbers are the logits; `reading-c`: one distribution
    along x, one along y, from which the shift falls out.
 4. Alignment. Eq. 3 and 4 invert each other if R turns about the origin, and pictures turn about
    the view's centre: so coordinates are centred on the view, (a, b) = gamma x the crop's centre,
    in view sides. Latents have no unit: (a, b) is multiplied by their range along each axis,
    detached, as PeCLR does (dahiyaaneesh/peclr @f29f0a9); the order is Eq. 4's, rotation first.
    `unscaled-shift` takes a unit of latent for a view side; `rotation-only` and `no-alignment` undo
    less.
 5. Views. Eq. 3 has one gamma, so crops are square: area U(0.08, 1) of the square 1.2 x the hand's
    box. Rotation U(0, 150) degrees as printed; `symmetric` takes both signs. Crop and rotation are
    one warp of a larger stored square, so turning cuts no black corner that would give the angle
    away; where that square leaves its picture (a hand near the edge) it is black, as stored, and
    that border turns along. No flip: Eq. 3 has none. Colour jitter, grey, blur and solarisation
    have iBOT's strengths and chances.
 6. Eq. 6 and 7 are sums of two terms; we take means, as iBOT. `summed` is as printed.
 7. Decoder. Eq. 8 leaves T^0 (absent), widths (8, 4, 2, 1 x --decoder-width) and activations (GELU)
    open. L^i are raw block outputs, shallow first, `deep-first` reversed. They must grow to T^i's
    size: a linear layer commutes with that, so they are projected small, then enlarged (nearest).
    Blocks 3, 6, 9, 12 of ViT-S and -B; 6, 12, 18, 24 of ViT-L, where `printed-taps` takes the
    former.
 8. L_recon. Mean absolute error over the hidden pixels of a picture, in units of ImageNet's
    deviations, then over pictures (Eq. 9 has no normaliser; SimMIM's runs over the whole batch).
 9. Centres are updated once a step, after it, from all micro-batches and processes (iBOT: once a
    forward pass); with no BatchNorm anywhere, the size of a micro-batch then changes nothing. Loss
    maths is float32. backbone.pt is the teacher's, as iBOT evaluates.
10. `--objective ibot` is iBOT without local crops (its default), with its own views: two crops of
    area U(0.14, 1), aspect 3/4 to 4/3, flipped half the time, and a coin that leaves half of them
    unmasked. `our-views` gives it HandMIM's views and masks.
11. Rectifiers. PyMAF (HongwenZhang/PyMAF @c866830) samples 431 mesh points on a pyramid; a plain
    ViT has one map, and the paper says key points: 21 joints, 64 numbers each, with the class
    token. State: 6D pose, shape, camera; updated by residuals, detached between steps; all three
    outputs supervised alike. ReLU between the linear layers; `linear-rectifiers` has none, as
    PyMAF's code, whose dropout we leave out. We sample where patches are; `pymaf-sampler` is half a
    patch off.
12. Camera. State (log s, x, y): the wrist's place in the crop and half crops a metre, turned into t
    by the true K of the crop (where unknown: focal length = diagonal). L_MANO takes t in metres.
13. L_FT has no weights in the paper: squares of rotation matrices, 0.01 of shape, 10 of t in m; L1
    of vertices and joints, wrist-rooted, 10 a metre; L1 of 2D joints in half crops. Summed over
    axes, and over a matrix's entries; means over joints, shape numbers and the three outputs.
    Samples without a label do not count for it. Joints are regressed from the mesh for FreiHAND,
    elsewhere the chain's.
14. Augmentation of fine-tuning is named without numbers: scale 1 +- 0.25, rotation 30 N degrees
    within 60 in six of ten (HandOccNet's), shift 0.05, jitter 0.2. Adam, constant rate, no decay;
    crop 1.2 x the hand's box.
15. Photos. `--data folder:hands=DIR` finds hands by MediaPipe (Sec. 3.1), in COCO's too, whose
    train pictures COCO-WholeBody annotates (`coco=DIR` reads those); boxes are those of its key
    points. Of a picture without a box the centre square is stored, and views come from its middle
    71 %.
16. Data. The paper counts 221,602 pictures; each source's count is printed, so yours can be
    compared.
17. Short runs. Of a fast teacher all answers become the same one while its centre lags, and uniform
    once the centre is there: so centres move 25 times as fast as the teacher at first, at most all
    the way (of iBOT's 0.996: its tenth). And what two views share fades unless their logits
    correlate (`agreement`) by more than the temperatures' ratio, since a student of targets at tau
    answers with correlation x 0.1 / tau of their spread. Young networks agree by 0.3 to 0.4 on
    iBOT's views, under 0.1 on HandMIM's, whose turns they cannot undo yet: --quick has tau 0.02
    (`--teacher-tau`), which suffices for the former only; 0.008 keeps both from uniform answers.
    Neither rate nor batch was searched.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import (
    BACKBONES, N_JOINTS, N_VERTS, Flags, UserError, accumulate, arg, autocast,
    axis_angle_to_matrix, barrier, blur, build_backbone, constant, cpu_state, crop, decay_groups,
    denormalise, flip, fused_on, guarded, invert, jitter_colour, load_backbone, matrix_to_six_d,
    normal, normalise, parallel, rank, rotate_z, rotation, save_checkpoint, say, settle,
    six_d_to_matrix, solarise, steps_per_epoch, to_grey, transform, uniform, unwrapped,
    view_intrinsics, warp, world)
from hand.drawing import draw_skeleton, sheet
from sources import Source, batches, hand_for, open_data, training_steps
from sources.course import COURSE, SCORING, judging, learning
from sources.progress import Run
from sources.recipes import row_name
from sources.stages import keep_best, launch, mean_hand, probe_error, report

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Config -------------------------------------------------------------------------------------

METHOD = "handmim"
VITS = tuple(name for name in BACKBONES if name.startswith("vit"))

# How wide squares are, in sides of the hand's box (ours; S is the side of the network's input):
#
#     +-----------------------------+   MARGIN 2.2, stored STORE x S px wide: in it the crops of
#     |   +---------------------+   |     fine-tuning, up to 1.5 boxes wide, turn by 60 degrees
#     |   |   +-------------+   |   |   VIEW_MARGIN 1.7 = 1.2 x sqrt(2), stored VIEW_STORE x S px
#     |   |   |  +-------+  |   |   |     wide: in it the square of 1.2 turns by any angle
#     |   |   |  | 1 box |  |   |   |   CROP 1.2: the square that views are cut from, and
#     |   |   |  +-------+  |   |   |     fine-tuning's crop where nothing is drawn
#     |   |   +-------------+   |   |
#     |   +---------------------+   |   A set is stored once, at one of the two outer squares:
#     +-----------------------------+   pre-training stores at VIEW_MARGIN, fine-tuning at MARGIN.
CROP = 1.2
VIEW_MARGIN = 1.7
VIEW_STORE = 1.5
MARGIN = 2.2
STORE = 1.75

MASK_RATIO = (0.1, 0.5)                 # Sec. 3.1
LATENT = (128, 2)                       # pseudo key points, Sec. 3.1
STUDENT_TAU = 0.1                       # iBOT's README recipe, as all that follows
TEACHER_TAU = (0.04, 0.07)              # first and last
TEACHER_TAU_EPOCHS = 30                 # from the first to the last
FROZEN_EPOCHS = 1                       # prototypes keep still
CENTRE_MOMENTUM = 0.9
CENTRE_PACE = 25                        # a centre's share of a step, in the teacher's: 0.1 / 0.004
CLIP = 3.0
FINAL_LR = 1e-6
PASSES = 8 / 3                          # of a sample: two views, also seen by the teacher

VARIANTS = {
    "no-pose": "leave out L_pose (Tab. 5)",
    "no-patch": "leave out L_patch (Tab. 5)",
    "no-recon": "leave out L_recon (Tab. 5)",
    "reading-a": "the 256 latent numbers are the logits (Sec. 2.2, 3.1)",
    "reading-c": "one distribution along x, one along y (Sec. 2.2, 3.1)",
    "no-alignment": "undo nothing of the views (Eq. 4)",
    "rotation-only": "undo the rotation, not scale and shift (Eq. 4)",
    "unscaled-shift": "a latent's unit is a view side, not its range (Eq. 4)",
    "symmetric": "rotations of both signs (Sec. 3.1)",
    "random-mask": "patches hidden one by one, not in blocks (Sec. 2.1)",
    "summed": "Eq. 6 and 7 as printed: sums, twice the means",
    "deep-first": "the decoder takes deep blocks first (Eq. 8)",
    "printed-taps": "blocks 3, 6, 9, 12 whatever the depth (Sec. 3.1)",
    "our-views": "with --objective ibot: HandMIM's views and masks (Tab. 3)",
    "linear-rectifiers": "no activation inside the rectifiers (PyMAF's code)",
    "pymaf-sampler": "sample the map with aligned corners and zeros outside (PyMAF's code)",
}

IBOT_VARIANTS = {"random-mask", "summed", "our-views", "no-pose", "no-patch"}
FINETUNE_VARIANTS = {"linear-rectifiers", "pymaf-sampler"}

SMALL = dict(data=("synthetic:calm",), backbone="vit_mini", image_size=64, batch_size=64,
             micro_batch=64, samples=2240, workers=0)
QUICK = {"pretrain": SMALL | dict(epochs=1, lr=8e-3, teacher_momentum=0.74, teacher_tau=0.02,
                                  prototypes=512, head_hidden=256, decoder_width=16, probe_every=0),
         "finetune": SMALL | dict(epochs=12, batch_size=32, micro_batch=32, lr=1e-3)}


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("vit_s", "the vision transformer; Tab. 1 also has vit_b and vit_l",
                        paper="vit_s", ref="Tab. 1, 3, 5", choices=VITS)
    image_size: int = arg(224, "side of the network's input, px", ref="Sec. 3.2",
                          why="fine-tuning's, whose positions then fit", finetune=224,
                          finetune_paper=224)
    epochs: int = arg(400, "passes over the data; pre-training vit_l: 250, as the paper", paper=400,
                      ref="Sec. 3.1, 3.2", finetune=100, finetune_paper=100)
    batch_size: int = arg(1024, "samples a step, over all processes", paper=1024,
                          ref="Sec. 3.1, 3.2", finetune=128, finetune_paper=128, least=1)
    micro_batch: int = arg(64, "samples at a time; changes memory and speed, not the step",
                           why="ours", finetune=32, finetune_why="ours", least=1)
    lr: float = arg(2e-3, "peak learning rate, pre-training: of a batch of 1,024, x batch / 1,024; "
                    "fine-tuning: as it is, constant", paper=2e-3, ref="Sec. 3.1, 3.2",
                    finetune=4e-5, finetune_paper=4e-5, above=0)
    objective: str = arg("handmim", "what to pre-train with; ibot is Tab. 3's baseline",
                         paper="handmim", ref="Tab. 3", choices=("handmim", "ibot"),
                         stage="pretrain")
    freeze_blocks: int = arg(0, "leave embeddings and the first N blocks as they are", paper=0,
                             ref="Sec. 3.3, Fig. 7", stage="finetune")
    warmup_epochs: float = arg(10.0, "epochs from rate 0 to its peak, then a cosine; if not given, "
                               "at most a tenth of all", why="iBOT", stage="pretrain")
    weight_decay: float = arg(0.4, "AdamW's decay at the end, from a tenth of it by a cosine",
                              why="iBOT", finetune=0.0, finetune_why="Adam has none")
    teacher_momentum: float = arg(0.996, "of the teacher at first, 1 at last, by a cosine",
                                  why="iBOT", stage="pretrain", most=1)
    teacher_tau: float = arg(TEACHER_TAU[0], "the teacher's temperature at first; within 30 epochs "
                             "it grows to 7/4 of this", why="iBOT", stage="pretrain")
    drop_path: float = arg(0.1, "chance that the student's last block is skipped", why="iBOT",
                           stage="pretrain", most=1)
    prototypes: int = arg(8192, "K, scores that latents are compared by", why="iBOT",
                          stage="pretrain", least=1)
    head_hidden: int = arg(2048, "width inside the shared MLP", why="iBOT", stage="pretrain",
                           least=1)
    decoder_width: int = arg(32, "channels of the decoder's last layer but one; 2, 4, 8 x before",
                             why="ours", stage="pretrain", least=1)
    probe_every: int = arg(20, "epochs between two frozen-probe pose errors (0: none)", why="ours",
                           stage="pretrain")
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS))


def configure(given: dict[str, Any], stage: str) -> Config:
    """The Config of a stage; ViT-L pre-trains for 250 epochs (Sec. 3.1) unless told otherwise."""
    cfg = settle(Config, given, stage, QUICK)
    if stage == "pretrain" and cfg.backbone == "vit_l" and cfg.epochs == Config.epochs:
        cfg.epochs = given.get("epochs", 250)
    return cfg


# ---- Views: two of a sample, each one warp of the source (Sec. 2.2, 3.1) ------------------------


class View(NamedTuple):
    """How views were cut; `undo` needs the last three. (B, 2, ...): the second axis is the view."""

    A: Tensor                   # (B, 2, 3, 3) stored px -> view px
    angle: Tensor               # (B, 2) rad, R of Eq. 3
    gamma: Tensor               # (B, 2) source side / crop side
    shift: Tensor               # (B, 2, 2) (a, b): gamma x the crop's centre, of a view's sides


def stored_side(cfg: Config) -> int:
    """Side of the pictures that fine-tuning and evaluation are given, px."""
    return round(STORE * cfg.image_size)


def turn(points: Tensor, angle: Tensor) -> Tensor:
    """Rotate (..., N, 2) about the origin by (...) rad, counter-clockwise as seen (y is down)."""
    c, s = angle.cos()[..., None], angle.sin()[..., None]
    x, y = points.unbind(-1)
    return torch.stack([c * x + s * y, c * y - s * x], -1)


def move(points: Tensor, view: View) -> Tensor:
    """Eq. 3: where a view shows points (..., N, 2), R(gamma p - (a, b)).

    In: from the source square's centre, in its sides. Out: from the view's centre, in the view's.
    """
    return turn(view.gamma[..., None, None] * points - view.shift[..., None, :], view.angle)


def undo(points: Tensor, view: View) -> Tensor:
    """Eq. 4: (R^-1 q + (a, b)) / gamma, the inverse of `move`; (..., N, 2) -> (..., N, 2)."""
    back = turn(points, -view.angle)
    return (back + view.shift[..., None, :]) / view.gamma[..., None, None]


def in_latent_units(view: View, points: Tensor) -> View:
    """The view with (a, b) in units of latent points (..., N, 2), which have none themselves (4).

    A view's side becomes the points' range along each axis after R^-1, without a gradient. Points
    twice as large are then undone to points twice as large.
    """
    back = turn(points.detach(), -view.angle)
    reach = back.amax(-2) - back.amin(-2)
    return view._replace(shift=view.shift * reach)


def draw_view(index: Tensor, number: int, side: int, cfg: Config, epoch: int) -> View:
    """Sec. 3.1: crop of area U(0.08, 1), rotation U(0, 150) degrees; (B,) -> fields (B, ...)."""
    u = uniform(index, 4, cfg.seed, "handmim view", epoch, number)
    width = (0.08 + 0.92 * u[:, 0]).sqrt()                      # of the source square's side
    middle = (u[:, 1:3] - 0.5) * (1 - width)[:, None]           # from its centre
    turns = 2 * u[:, 3] - 1 if "symmetric" in cfg.variant else u[:, 3]
    angle = math.radians(150) * turns
    source = side * CROP / VIEW_MARGIN                          # px
    A = crop((side - 1) / 2 + source * middle, source * width, cfg.image_size)
    return View(A=rotation(angle, cfg.image_size) @ A, angle=angle, gamma=1 / width,
                shift=middle / width[:, None])


def draw_ibot_view(index: Tensor, number: int, side: int, cfg: Config, epoch: int) -> View:
    """iBOT's: crop of area U(0.14, 1), aspect 3/4 to 4/3, flipped half the time; no rotation."""
    u = uniform(index, 5, cfg.seed, "ibot view", epoch, number)
    S = cfg.image_size
    area = 0.14 + 0.86 * u[:, 0]                                # of the source square's
    ratio = (3 / 4) ** (1 - 2 * u[:, 1])
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)     # width, height
    middle = (side - 1) / 2 + side * CROP / VIEW_MARGIN * (u[:, 2:4] - 0.5) * (1 - size)
    zoom = S / (size * side * CROP / VIEW_MARGIN)
    A = torch.diag_embed(F.pad(zoom, (0, 1), value=1.0))
    A[:, :2, 2] = (S - 1) / 2 - zoom * middle
    still = torch.zeros_like(u[:, 0])
    return View(A=flip(u[:, 4] < 0.5, S).to(A) @ A, angle=still, gamma=still + 1,
                shift=torch.stack([still, still], 1))


def draw_views(index: Tensor, side: int, cfg: Config, epoch: int) -> View:
    """Both views of samples `index` (B,), from stored squares `side` px wide."""
    ibot = cfg.objective == "ibot" and "our-views" not in cfg.variant
    draw = draw_ibot_view if ibot else draw_view
    first = draw(index, 0, side, cfg, epoch)
    second = draw(index, 1, side, cfg, epoch)
    return View(*(torch.stack(pair, 1) for pair in zip(first, second)))


def colour(images: Tensor, index: Tensor, number: int, cfg: Config, epoch: int) -> Tensor:
    """Sec. 3.1 with iBOT's numbers: jitter, grey, blur, solarise; (B, 3, S, S) in 0..1 twice."""
    u = uniform(index, 9, cfg.seed, "handmim colour", epoch, number)
    reach = constant((0.4, 0.4, 0.2, 0.1), u.device)
    still = constant((1.0, 1.0, 1.0, 0.0), u.device)
    factors = still + reach * (2 * u[:, 1:5] - 1) * (u[:, :1] < 0.8)
    images = to_grey(jitter_colour(images, factors), u[:, 5] < 0.2)
    unit = cfg.image_size / 224                                         # sigma is 0.1 - 2 px at 224
    sigma = (0.1 + 1.9 * u[:, 7]) * unit * (u[:, 6] < (1.0, 0.1)[number])
    images = blur(images, sigma, reach=math.ceil(6 * unit))
    return solarise(images, u[:, 8] < (0.0, 0.2)[number])


def make_views(batch: dict, cfg: Config, epoch: int, grid: int) -> tuple[Tensor, View, Tensor]:
    """A batch -> its views (B, 2, 3, S, S), how they were cut, their masks (B, 2, grid^2) bool."""
    image, index = batch["image"], batch["index"]
    view = draw_views(index, image.shape[-1], cfg, epoch)
    pictures = warp(image, view.A, cfg.image_size) / 255
    pictures = [colour(x, index, k, cfg, epoch) for k, x in enumerate(pictures.unbind(1))]
    # On the host: some hundred small operations, and one of them asks whether to go on.
    masks = draw_masks(batch.get("index_host", index), grid, cfg, epoch)
    masks = masks.to(image.device, non_blocking=True)
    return normalise(255 * torch.stack(pictures, 1)), view, masks


# ---- Masks (Sec. 2.1, 3.1) ----------------------------------------------------------------------


def draw_masks(index: Tensor, grid: int, cfg: Config, epoch: int) -> Tensor:
    """Which patches of both views are hidden, (B,) -> (B, 2, grid^2) bool; True hides (2)."""
    def draw(n: int, purpose: str) -> Tensor:
        views = [uniform(index, n, cfg.seed, purpose, epoch, number) for number in (0, 1)]
        return torch.stack(views, 1).flatten(0, 1)                              # (2 B, n)

    low, high = MASK_RATIO
    u = draw(2, "handmim mask")
    ratio = low + (high - low) * u[:, 0]
    if cfg.objective == "ibot" and "our-views" not in cfg.variant:   # iBOT's recipe: a coin first
        ratio = ratio * (u[:, 1] < 0.5)
    if "random-mask" in cfg.variant:
        masks = random_mask(draw(grid ** 2, "handmim patches"), ratio)
    else:
        masks = block_mask(draw(4 * 96, "handmim blocks").unflatten(1, (96, 4)), ratio, grid)
    return masks.reshape(len(index), 2, -1)


def random_mask(u: Tensor, ratio: Tensor) -> Tensor:
    """Draws (B, N), ratios (B,) -> (B, N) bool: exactly int(ratio N) patches of each picture."""
    count = (ratio * u.shape[1]).floor()
    return u.argsort(1).argsort(1) < count[:, None]


def block_mask(draws: Tensor, ratio: Tensor, grid: int) -> Tensor:
    """Rectangles as in BEiT and iBOT: draws (B, T, 4), ratios (B,) -> (B, grid, grid) bool.

    Each try has an area between (grid // 3)^2 and what is left, an aspect between 0.3 and 1 / 0.3,
    and counts if it is smaller than the grid and hides at least one new patch, at most what is
    left. Ten failures in a row end it, and so do T tries. Nothing changes between two tries that
    count, so the ten that may follow one are judged at once.
    """
    B, T = draws.shape[:2]
    at = torch.arange(grid, device=draws.device)
    ten = torch.arange(10, device=draws.device)
    every = torch.arange(B, device=draws.device)
    free = draws.new_ones(B, grid, grid)                # 1 where a patch is not hidden
    budget = ratio * grid ** 2                          # patches still to hide, (B,)
    over = torch.zeros(B, dtype=torch.long, device=draws.device)     # tries that are, (B,)
    least = float((grid // 3) ** 2)
    while bool((over < T).any()):                       # a GPU would wait: see make_views
        tries = over[:, None] + ten                                             # (B, 10)
        u = draws[every[:, None], tries.clamp(max=T - 1)]                       # (B, 10, 4)
        area = (least + u[..., 0] * (budget[:, None] - least)).clamp(min=0)
        aspect = 0.3 ** (1 - 2 * u[..., 1])
        size = torch.stack([area / aspect, area * aspect], -1).sqrt().round()   # width, height
        start = (u[..., 2:] * (grid - size + 1)).floor()                        # left, top
        inside = (at >= start[..., None]) & (at < (start + size)[..., None])    # (B, 10, 2, grid)
        columns, rows = inside.to(free.dtype).unbind(2)
        count = (rows @ free * columns).sum(-1)                                 # new patches
        good = (size < grid).all(-1) & (count > 0) & (count <= budget[:, None]) & (tries < T)
        found, first = good.int().max(1)
        new = rows[every, first][:, :, None] * columns[every, first][:, None]   # (B, grid, grid)
        free = free * (1 - new * found[:, None, None])
        budget = budget - count[every, first] * found
        over = torch.where(found > 0, over + first + 1, T)
    return free == 0


def draw_paths(index: Tensor, depth: int, cfg: Config, epoch: int) -> Tensor | None:
    """Stochastic depth: (B,) -> factors (B, 2, depth, 2) of the branches, 0 or 1 / (1 - chance)."""
    if not cfg.drop_path:
        return None
    u = [uniform(index, 2 * depth, cfg.seed, "handmim depth", epoch, k) for k in (0, 1)]
    chance = torch.linspace(0, cfg.drop_path, depth, device=index.device)[:, None]
    return (torch.stack(u, 1).unflatten(2, (depth, 2)) >= chance) / (1 - chance)


# ---- Model (Sec. 2.2 - 2.4) ---------------------------------------------------------------------


def walk(vit: nn.Module, x: Tensor, keep: Tensor | None = None, taps: Sequence[int] = ()
         ) -> tuple[Tensor, list[Tensor]]:
    """Embedded tokens (B, 1 + N, D) -> the ViT's output, and what the blocks `taps` (from 1) gave.

    keep (B, depth, 2) scales the blocks' branches; taps are taken before the final norm.
    """
    tapped = []
    for k, block in enumerate(vit.blocks):
        x = block(x, None if keep is None else keep[:, k])
        if k + 1 in taps:
            tapped.append(x)
    return vit.norm(x), tapped


class Prototypes(nn.Module):
    """Scores of normalised latents, (..., d) -> (..., K), by weights of norm g (iBOT's names)."""

    def __init__(self, d: int, K: int, learn_norm: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(K, 1), requires_grad=learn_norm)
        self.weight_v = nn.Parameter(torch.empty(K, d).uniform_(-d ** -0.5, d ** -0.5))

    def forward(self, z: Tensor) -> Tensor:
        return self.scores(F.normalize(z, dim=-1))

    def scores(self, z: Tensor) -> Tensor:
        """Of latents that are normalised already; linear in them, never in bfloat16."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.weight_g * F.normalize(self.weight_v, dim=-1))


class Head(nn.Module):
    """The shared MLP, tokens (..., D) -> latents z (..., 256), and the prototypes of reading B."""

    def __init__(self, D: int, hidden: int, latent: int, K: int, learn_norm: bool = True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, latent))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(latent, K, learn_norm) if K else None

    def forward(self, x: Tensor) -> Tensor:
        """The latents, at least float32 also under autocast."""
        z = self.mlp(x)
        return z.to(torch.promote_types(z.dtype, torch.float32))


class Network(nn.Module):
    """What student and teacher both are: a ViT and a head."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        K = 0 if {"reading-a", "reading-c"} & set(cfg.variant) else cfg.prototypes
        learn_norm = cfg.backbone in ("vit_mini", "vit_s")               # iBOT: frozen for B and L
        self.head = Head(self.backbone.dim, cfg.head_hidden, math.prod(LATENT), K, learn_norm)


class Decoder(nn.Module):
    """Eq. 8: T^(i+1) = T-Conv(Linear(Concat[T^i, L^i])), from patch tokens to the picture.

    Linear(Concat[T, up(L)]) = W_T T + up(W_L L): L is projected at its own size, then enlarged.
    """

    def __init__(self, dim: int, stages: int, grid: int, width: int):
        super().__init__()
        widths = [width * 2 ** k for k in range(stages - 1, -1, -1)]     # 256, 128, 64, 32
        before = [0, *widths[1:]]                               # channels of T^i; T^0 is absent
        after = [*widths[1:], 3]
        self.grid = grid
        self.before = before
        self.fuse = nn.ModuleList(nn.Linear(c + dim, w) for c, w in zip(before, widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, c, 4, 2, 1) for w, c in zip(widths, after))

    def forward(self, taps: list[Tensor]) -> Tensor:
        """One (B, N, D) a stage -> (B, 3, S, S), in normalised units."""
        T = None
        for k, (L, c, fuse, up) in enumerate(zip(taps, self.before, self.fuse, self.up)):
            x = F.linear(L, fuse.weight[:, c:], fuse.bias).mT.unflatten(2, (self.grid, self.grid))
            x = F.interpolate(x, scale_factor=2 ** k) if k else x
            x = x if T is None else x + F.conv2d(T, fuse.weight[:, :c, None, None])
            T = up(F.gelu(x))
        return T


class Out(NamedTuple):
    """What one pass yields; logits have a trailing axis of K, or of (2, 128) with reading C."""

    teacher: Tensor                         # (B, 2, K) class tokens
    centre: Tensor                          # (K,) their mean
    student: Tensor | None = None           # (B, 2, K) class tokens; not of `no-pose`
    student_patch: Tensor | None = None     # (T, K) hidden patches of all views; not of `no-patch`
    teacher_patch: Tensor | None = None     # (T, K)
    weight: Tensor | None = None            # (T,): their sum is a mean over views of means
    centre_patch: Tensor | None = None      # (K,) mean over the teacher's patches, hidden or not
    pictures: Tensor | None = None          # (B, 2, 3, S, S) recovered views; not of `no-recon`


class HandMIM(nn.Module):
    """Student, teacher, centres and decoder; of all this backbone.pt keeps the teacher's ViT."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.student = Network(cfg)
        self.teacher = Network(cfg)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        vit = self.student.backbone
        self.masked_embed = nn.Parameter(torch.zeros(1, vit.dim))
        stages = int(math.log2(vit.stride))
        self.taps = taps_of(len(vit.blocks), stages, cfg.variant)
        plain = cfg.objective == "ibot" or "no-recon" in cfg.variant
        self.decoder = None if plain else Decoder(vit.dim, stages, vit.side, cfg.decoder_width)
        shape: tuple[int, ...] = (cfg.prototypes,)
        if "reading-a" in cfg.variant:
            shape = (math.prod(LATENT),)
        if "reading-c" in cfg.variant:
            shape = LATENT[::-1]
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("centre_patch", torch.zeros(shape))
        if {"no-pose", "no-patch"} <= set(cfg.variant):         # nothing asks for latents
            self.student.head.requires_grad_(False)

    def forward(self, views: Tensor, masks: Tensor, view: View, keep: Tensor | None) -> Out:
        """Eq. 5: (B, 2, 3, S, S), (B, 2, N) bool, how views were cut, `draw_paths` -> `Out`."""
        x = views.flatten(0, 1)                                             # (2 B, 3, S, S)
        hidden = masks.flatten(0, 1)                                        # (2 B, N)
        keep = None if keep is None else keep.flatten(0, 1)
        vit = self.student.backbone
        embedded = vit.embed(x, hidden, self.masked_embed)
        tokens, taps = walk(vit, embedded, keep, self.taps if self.decoder else ())
        with torch.no_grad():                                               # it sees whole views
            true = self.teacher.backbone.tokens(x)
            true = self.teacher.head(true[:, :1] if "no-patch" in self.cfg.variant else true)
        teacher = self.class_logits(self.teacher, true[:, 0].unflatten(0, (-1, 2)), view)
        out = Out(teacher=teacher, centre=teacher.mean((0, 1)))
        if "no-pose" not in self.cfg.variant:
            z = self.student.head(tokens[:, 0]).unflatten(0, (-1, 2))       # (B, 2, 256)
            out = out._replace(student=self.class_logits(self.student, z, view))
        if "no-patch" not in self.cfg.variant:
            which, patch = hidden.nonzero(as_tuple=True)                    # (T,): a GPU waits once
            z = self.student.head(tokens[which, 1 + patch])                 # (T, 256)
            weight = 1 / hidden.sum(1, keepdim=True).clamp(min=1) / len(x)
            out = out._replace(
                student_patch=self.logits(self.student, z),
                teacher_patch=self.logits(self.teacher, true[which, 1 + patch]),
                weight=weight.to(z.dtype)[which, 0],
                centre_patch=self.mean_logits(true[:, 1:].flatten(0, 1)))
        if self.decoder:
            order = reversed(taps) if "deep-first" in self.cfg.variant else taps
            pictures = self.decoder([tap[:, 1:] for tap in order])
            out = out._replace(pictures=pictures.unflatten(0, (-1, 2)))
        return out

    def class_logits(self, network: Network, z: Tensor, view: View) -> Tensor:
        """Sec. 2.2: latents (B, 2, 256) as points, each view's transform undone, their logits."""
        how = set(self.cfg.variant)
        if self.cfg.objective == "ibot" or "no-alignment" in how:
            return self.logits(network, z)
        if "rotation-only" in how:
            view = view._replace(gamma=torch.ones_like(view.gamma),
                                 shift=torch.zeros_like(view.shift))
        points = z.unflatten(-1, LATENT)                                    # (B, 2, 128, 2)
        if "unscaled-shift" not in how:
            view = in_latent_units(view, points)
        return self.logits(network, undo(points, view).flatten(-2))

    def logits(self, network: Network, z: Tensor) -> Tensor:
        """Latents (..., 256) -> logits (..., K); reading C: (..., 2, 128), x and y apart."""
        if "reading-c" in self.cfg.variant:
            return z.unflatten(-1, LATENT).mT
        return network.head.last_layer(z) if network.head.last_layer else z

    def mean_logits(self, z: Tensor) -> Tensor:
        """Mean of the teacher's logits over (T, 256) latents; linear, so the mean goes first."""
        last = self.teacher.head.last_layer
        if last is None:
            return self.logits(self.teacher, z.mean(0))
        return last.scores(F.normalize(z, dim=-1).mean(0))


def taps_of(depth: int, stages: int, variant: tuple[str, ...]) -> list[int]:
    """Sec. 3.1: the blocks (from 1) whose outputs are decoded, evenly spaced, the last too."""
    if "printed-taps" in variant:
        return [3, 6, 9, 12][:stages] if depth >= 12 else list(range(1, depth + 1))[:stages]
    return [round(depth * (k + 1) / stages) for k in range(stages)]


# ---- Losses (Eq. 6, 7, 9) -----------------------------------------------------------------------


def cross_entropy(student: Tensor, teacher: Tensor, centre: Tensor, tau: float) -> Tensor:
    """-softmax((t - c) / tau) log softmax(s / 0.1): raw logits (..., K) twice -> (...)."""
    p = ((teacher - centre) / tau).softmax(-1)
    return -(p * (student / STUDENT_TAU).log_softmax(-1)).sum(-1)


def pose_loss(student: Tensor, teacher: Tensor, centre: Tensor, tau: float) -> Tensor:
    """Eq. 6: each view's class token against the other's; logits (B, 2, ..., K) -> scalar, mean."""
    return cross_entropy(student, teacher.flip(1), centre, tau).mean()


def patch_loss(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor,
               tau: float) -> Tensor:
    """Eq. 7: hidden patches against the same view's; logits (T, ..., K), weight (T,) -> scalar."""
    if not len(student):
        return student.sum()                            # nothing hidden: 0, and the graph is whole
    error = cross_entropy(student, teacher, centre, tau)
    return (error.reshape(len(error), -1).mean(1) * weight).sum()


def recon_loss(pictures: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. 9: mean |T^4 - x| over hidden pixels, then pictures: (n, 3, S, S) twice, (n, N) bool."""
    grid = math.isqrt(mask.shape[1])
    pictures = pictures.to(torch.promote_types(pictures.dtype, torch.float32))
    error = (pictures - target).abs().mean(1, keepdim=True)
    error = F.avg_pool2d(error, target.shape[-1] // grid).flatten(1)                    # (n, N)
    return ((error * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def collapse_monitors(teacher: Tensor, centre: Tensor, tau: float) -> dict[str, Tensor]:
    """Entropy, nats, of the teacher's answers for (B, 2, ..., K) logits; 0 and ln K are collapses.

    entropy: mean over pictures (ln K: every answer is uniform); entropy_mean: of the mean answer
    (near `entropy`: all pictures get the same one); agreement: correlation of two views' logits,
    which fade where it stays below tau / 0.1 (17).
    """
    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp(min=1e-12).log()).sum(-1).mean()

    answers = ((teacher - centre) / tau).softmax(-1)
    apart = teacher - teacher.mean((0, 1))
    shared = 2 * (apart[:, 0] * apart[:, 1]).sum() / apart.square().sum().clamp(min=1e-12)
    return {"entropy": entropy(answers), "entropy_mean": entropy(answers.mean((0, 1))),
            "agreement": shared}


# ---- Fine-tuned network (Sec. 2.5) --------------------------------------------------------------


def plain_crop(side: int, S: int, device: torch.device, margin: float = MARGIN) -> Tensor:
    """Stored px -> the middle 1.2 x box of a square of `margin` x box, S px wide: (1, 3, 3)."""
    middle = torch.full((1, 2), (side - 1) / 2, device=device)
    return crop(middle, torch.full((1,), side * CROP / margin, device=device), S)


def draw_crop(index: Tensor, side: int, cfg: Config, epoch: int) -> tuple[Tensor, Tensor]:
    """Sec. 3.2: random scale, shift and rotation; (B,) -> stored px to crop px, and rad (B,)."""
    u = uniform(index, 3, cfg.seed, "handmim crop", epoch)
    n = normal(index, 2, cfg.seed, "handmim crop size and angle", epoch)
    width = side * CROP / MARGIN * (1 + 0.25 * n[:, 0].clamp(-1, 1))
    angle = math.radians(30) * n[:, 1].clamp(-2, 2) * (u[:, 0] < 0.6)
    middle = (side - 1) / 2 + 0.1 * (u[:, 1:] - 0.5) * width[:, None]
    return rotation(angle, cfg.image_size) @ crop(middle, width, cfg.image_size), angle


def draw_colour(index: Tensor, cfg: Config, epoch: int) -> Tensor:
    """Sec. 3.2, colour jitter: (B,) -> factors (B, 4) for `jitter_colour`."""
    u = 2 * uniform(index, 4, cfg.seed, "handmim hand colour", epoch) - 1
    still = constant((1.0, 1.0, 1.0, 0.0), u.device)
    return still + u * constant((0.2, 0.2, 0.2, 0.05), u.device, u.dtype)


def make_crops(batch: dict, cfg: Config, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch -> its crops (B, 3, S, S) in 0..1, stored to crop px (B, 3, 3), turned (B,) rad."""
    A, angle = draw_crop(batch["index"], batch["image"].shape[-1], cfg, epoch)
    factors = draw_colour(batch["index"], cfg, epoch)
    return jitter_colour(warp(batch["image"], A, cfg.image_size) / 255, factors), A, angle


def crop_intrinsics(A: Tensor, K: Tensor, angle: Tensor) -> Tensor:
    """K of a crop whose 3D turns with it: (B, 3, 3) twice, (B,) rad -> A K Rz^-1, exact."""
    return A @ K @ invert(rotation(angle, 1))


def sample(maps: Tensor, uv: Tensor, size: int, pymaf: bool = False) -> Tensor:
    """Read maps (B, D, h, w) at uv (B, N, 2) px of a picture `size` px wide -> (B, N, D), bilinear.

    The map's cells are the picture's patches, so pixel centres go where they belong and the border
    goes on outside. `pymaf`: corners aligned to u / (size / 2) - 1, zeros outside (PyMAF's code).
    """
    grid = uv / (size / 2) - 1 if pymaf else (2 * uv + 1) / size - 1
    grid = grid.nan_to_num(3.0).clamp(-3, 3)                    # a CPU crashes at huge ones
    read = F.grid_sample(maps, grid[:, None], align_corners=pymaf,
                         padding_mode="zeros" if pymaf else "border")
    return read[:, :, 0].mT


class PointMlp(nn.Module):
    """PyMAF's reduction of sampled features, (B, N, D) -> (B, C N), channel-major.

    Three layers, of which the second and third also see the input; leaky ReLU between, ReLU last.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        D, *rest = widths
        self.layers = nn.ModuleList(nn.Linear(a + D * (k > 0), b)
                                    for k, (a, b) in enumerate(zip(widths, rest)))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k, layer in enumerate(self.layers):
            y = layer(torch.cat([y, x], -1) if k else y)
            y = F.relu(y) if k + 1 == len(self.layers) else F.leaky_relu(y)
        return y.mT.flatten(1)


class Rectifier(nn.Module):
    """One step of the feedback: features at the joints, class token, state -> change of state."""

    def __init__(self, D: int, n_state: int, linear: bool):
        super().__init__()
        self.points = PointMlp((D, 128, 64, 64))
        act = nn.Identity if linear else nn.ReLU
        self.mlp = nn.Sequential(nn.Linear(64 * N_JOINTS + D + n_state, 1024), act(),
                                 nn.Linear(1024, 1024), act(), nn.Linear(1024, n_state))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, sampled: Tensor, token: Tensor, state: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.points(sampled), token, state], 1))


class Hand(NamedTuple):
    """A state made flesh, in the camera frame of the crop."""

    R: Tensor                   # (B, 16, 3, 3) theta
    beta: Tensor                # (B, 10)
    t: Tensor                   # (B, 3) m, the wrist
    verts: Tensor               # (B, 778, 3) m, wrist-rooted
    joints: Tensor              # (B, 21, 3) m, wrist-rooted
    uv: Tensor                  # (B, 21, 2) px of the crop
    trans: Tensor               # (B, 3) m: where MANO's own origin stands, t less the wrist there


class HandNet(nn.Module):
    """ViT and three rectifiers (Sec. 2.5). State (B, 109): 16 x 6D pose, beta, camera (12)."""

    USES = {"image", "K"}

    def __init__(self, cfg: Config):
        super().__init__()
        self.size = cfg.image_size
        self.pymaf = "pymaf-sampler" in cfg.variant
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        self.mano = hand_for(cfg.finetune, cfg.mano)
        flat = matrix_to_six_d(torch.eye(3)).repeat(16)
        self.register_buffer("start", torch.cat([flat, torch.zeros(13)]))
        self.rectifiers = nn.ModuleList(
            Rectifier(self.backbone.dim, len(self.start), "linear-rectifiers" in cfg.variant)
            for _ in range(3))

    @torch.no_grad()
    def start_at(self, mean: dict[str, Any]) -> None:
        """Begin every prediction at the training set's mean hand (of `mean_hand`)."""
        R = axis_angle_to_matrix(mean["pose"].unflatten(0, (16, 3)))
        wrist = (mean["uv"][0] - 0.5) * 2 * MARGIN / CROP * bool(mean["uv"].any())
        self.start.copy_(torch.cat([matrix_to_six_d(R).flatten(), mean["shape"], torch.zeros(1),
                                    wrist.clamp(-1, 1)]))

    def forward(self, crops: Tensor, K: Tensor) -> Tensor:
        """(B, 3, S, S) normalised, K of the crops -> a state from each rectifier, (3, B, 109)."""
        tokens = self.backbone.tokens(crops)
        with torch.autocast(crops.device.type, enabled=False):
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            side = self.backbone.side
            maps = tokens[:, 1:].mT.unflatten(2, (side, side))
            state = self.start.expand(len(crops), -1)
            states = []
            for rectifier in self.rectifiers:
                state = state.detach()              # PyMAF: no gradient through the feedback
                sampled = sample(maps, self.where(state, K), self.size, self.pymaf)
                state = state + rectifier(sampled, tokens[:, 0], state)
                states.append(state)
            return torch.stack(states)

    @torch.no_grad()
    def where(self, state: Tensor, K: Tensor) -> Tensor:
        """The key points of a state in the crop, (B, 21, 2) px, kept within twice its size.

        Always the chain's joints: those regressed from the mesh lie a millimetre beside, and would
        cost a whole mesh.
        """
        R, beta, t = self.unpack(state, K)
        joints = self.mano.chain_joints(R, beta)
        uv = project(joints - joints[:, :1] + t[:, None], K)
        return uv.clamp(-self.size / 2, 1.5 * self.size).to(state.dtype)

    def unpack(self, state: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State (B, 109), K of the crops -> R (B, 16, 3, 3), beta (B, 10), t (B, 3) m.

        camera = (log scale, x, y): the wrist is seen at (x, y) in half crops from the centre, and
        at its depth a metre spans 10 exp(log scale) half crops: Z = f / (S / 2 x that).
        """
        pose, beta, camera = state.split([96, 10, 3], 1)
        pixel = (self.size - 1) / 2 + self.size / 2 * camera[:, 1:]
        focal = torch.linalg.det(K[:, :2, :2]).abs().sqrt()
        depth = focal / (self.size / 2 * 10 * camera[:, 0].exp())
        ray = transform(invert(K), pixel[:, None])[:, 0]
        t = depth[:, None] * F.pad(ray, (0, 1), value=1.0)
        return six_d_to_matrix(pose.unflatten(1, (16, 6))), beta, t

    def hand(self, state: Tensor, K: Tensor) -> Hand:
        """The hand that a state (B, 109) means to a camera K (B, 3, 3)."""
        R, beta, t = self.unpack(state, K)
        verts, joints = self.mano(R, beta)
        wrist = joints[:, :1]
        rooted = joints - wrist
        return Hand(R=R, beta=beta, t=t, verts=verts - wrist, joints=rooted,
                    uv=project(rooted + t[:, None], K), trans=t - wrist[:, 0])

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """{"image", "K"} -> joints, verts, trans, root (m), uv (px of image), pose, shape.

        In the camera frame; root and trans are NaN where K is not known.
        """
        image = batch["image"]
        known = batch["K"].isfinite().flatten(1).all(1)[:, None]
        A = plain_crop(image.shape[-1], self.size, image.device).expand(len(image), 3, 3)
        K = A @ view_intrinsics(batch)
        states = self(normalise(warp(image, A, self.size)), K)
        hand = self.hand(states[-1], K)
        return {"joints": hand.joints, "verts": hand.verts,
                "root": torch.where(known, hand.t, math.nan),
                "trans": torch.where(known, hand.trans, math.nan),
                "uv": transform(invert(A), hand.uv), "pose": hand.R, "shape": hand.beta}


def project(points: Tensor, K: Tensor) -> Tensor:
    """(B, N, 3) m, (B, 3, 3) px, skew and all -> (B, N, 2) px; nearer than 5 cm counts as 5 cm."""
    return transform(K, points[..., :2] / points[..., 2:].clamp(min=0.05))


def build(cfg: Config) -> HandNet:
    """The network that eval.py judges."""
    return HandNet(cfg)


# ---- Training -----------------------------------------------------------------------------------


def cosine(step: int, steps: int, first: float, last: float, warm: int = 0) -> float:
    """0 to `first` over `warm` steps, both ends included, then half a cosine to `last` (iBOT)."""
    if step < warm:
        return first * step / max(1, warm - 1)
    done = (step - warm) / max(1, steps - warm)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * done))


def lr_at(step: int, cfg: Config, steps: int) -> float:
    """Rate at a step, `steps` to an epoch: see --lr and (1)."""
    if cfg.finetune:
        return cfg.lr
    warm = round(cfg.warmup_epochs * steps)
    return cosine(step, cfg.epochs * steps, cfg.lr * cfg.batch_size / 1024, FINAL_LR, warm)


def teacher_tau(epoch: int, first: float = TEACHER_TAU[0], warm: int = TEACHER_TAU_EPOCHS) -> float:
    """The teacher's temperature in an epoch: from `first`, linear over `warm` epochs (iBOT).

    Shorter runs end below the last value, on the side that guards against uniform answers.
    """
    low, high = TEACHER_TAU
    return first / low * (low + (high - low) * min(1.0, epoch / max(1, warm - 1)))


def pretrain_step(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """One micro-batch: the terms of Eq. 10, their sum, and the means that centres are made of."""
    model = unwrapped(net)
    vit = model.student.backbone
    views, view, masks = make_views(batch, cfg, epoch, vit.side)
    keep = draw_paths(batch["index"], len(vit.blocks), cfg, epoch)
    with autocast(views.device, cfg.precision):     # the network only: bfloat16 misses pixels
        out = net(views, masks, view, keep)
    tau = teacher_tau(epoch, cfg.teacher_tau)
    times = 2 if "summed" in cfg.variant else 1
    zero = views.new_zeros(())
    L_pose, L_patch, L_recon = zero, zero, zero         # what a variant leaves out is not computed
    if out.student is not None:
        L_pose = times * pose_loss(out.student, out.teacher, model.centre, tau)
    if out.student_patch is not None:
        L_patch = times * patch_loss(out.student_patch, out.teacher_patch, model.centre_patch,
                                     out.weight, tau)
    if out.pictures is not None:
        L_recon = recon_loss(out.pictures.flatten(0, 1), views.flatten(0, 1), masks.flatten(0, 1))
    loss = L_pose + L_patch + L_recon                                                     # Eq. 10
    means = {"centre": out.centre}
    if out.centre_patch is not None:
        means["centre_patch"] = out.centre_patch
    return {"loss": loss, "L_pose": L_pose, "L_patch": L_patch, "L_recon": L_recon,
            **collapse_monitors(out.teacher, model.centre, tau), **means}


def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scale each gradient by its own norm to at most `limit`, in place (DINO, iBOT; not global)."""
    for gradient, norm in zip(gradients, torch._foreach_norm(gradients)):
        gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))


def freeze_prototypes(model: HandMIM, step: int, cfg: Config, steps: int) -> None:
    """iBOT: no gradient for the prototypes in the first epoch, at most in a tenth of the run (1).

    Without a gradient AdamW neither moves nor decays them.
    """
    last = model.student.head.last_layer
    if last is not None and step < min(FROZEN_EPOCHS, cfg.epochs / 10) * steps:
        for p in last.parameters():
            p.grad = None


@torch.no_grad()
def update_teacher(model: HandMIM, momentum: float) -> None:
    """Sec. 2.3: the teacher's numbers become momentum x themselves + (1 - momentum) x student's."""
    teacher = list(model.teacher.parameters())
    student = list(model.student.parameters())
    torch._foreach_lerp_(teacher, student, 1 - momentum)


def centre_share(teacher_momentum: float) -> float:
    """How far centres move in a step: iBOT's tenth, or more beside a teacher that is faster (17).

    A centre that lags lets every answer become the same one; once it arrives, all are uniform.
    """
    return max(1 - CENTRE_MOMENTUM, min(1.0, CENTRE_PACE * (1 - teacher_momentum)))


@torch.no_grad()
def update_centre(centre: Tensor, mean: Tensor, share: float = 1 - CENTRE_MOMENTUM) -> None:
    """A centre moves a share toward a step's mean logits, of all of its pictures (9)."""
    if world() > 1:
        torch.distributed.all_reduce(mean)
        mean /= world()
    centre.lerp_(mean.to(centre.dtype), share)


def finetune_step(net: nn.Module, batch: dict, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """Eq. 11 and 12 for one micro-batch, over all three outputs (11, 13)."""
    model = unwrapped(net)
    crops, A, angle = make_crops(batch, cfg, epoch)
    K = crop_intrinsics(A, view_intrinsics(batch), angle)
    with autocast(crops.device, cfg.precision):
        states = net(normalise(255 * crops), K)                                 # (3, B, 109)
    outputs = len(states)
    hand = model.hand(states.flatten(0, 1), repeated(K, outputs))               # 3 B hands
    labels, known = hand_targets(batch, A, angle)
    true = Hand(*(repeated(x.nan_to_num(), outputs) for x in labels))
    on = Known(*(repeated(x, outputs) for x in known))
    L_theta = masked((hand.R - true.R).square().sum((2, 3)).mean(1), on.pose)
    L_beta = masked((hand.beta - true.beta).square().mean(1), on.shape)
    L_t = masked((hand.t - true.t).square().sum(1), on.t)
    L_vert = 10 * masked((hand.verts - true.verts).abs().sum(-1), on.verts)
    L_3d = 10 * masked((hand.joints - true.joints).abs().sum(-1), on.joints)
    L_2d = masked((hand.uv - true.uv).abs().sum(-1) / (cfg.image_size / 2), on.uv)
    L_mano = L_theta + 0.01 * L_beta + 10 * L_t
    L_kpt = L_3d + L_2d                                                         # Eq. 12
    return {"loss": L_mano + L_vert + L_kpt, "L_theta": L_theta, "L_beta": L_beta, "L_t": L_t,
            "L_vert": L_vert, "L_3d": L_3d, "L_2d": L_2d}                       # Eq. 11


def repeated(x: Tensor, times: int) -> Tensor:
    """A batch (B, ...), whole, one `times` after the other: (times x B, ...)."""
    return x.repeat(times, *[1] * (x.ndim - 1))


# twin: ti_net.py:masked
def masked(loss: Tensor, on: Tensor) -> Tensor:
    """Mean of a loss (n, ...) where `on`, 0 where nothing is; NaN filled before, for gradients."""
    return torch.where(on, loss, 0).sum() / on.sum().clamp(min=1)


class Known(NamedTuple):
    """Which labels a batch of hands has, bool."""

    pose: Tensor                # (B,)
    shape: Tensor               # (B,)
    t: Tensor                   # (B,)
    verts: Tensor               # (B, 778)
    joints: Tensor              # (B, 21)
    uv: Tensor                  # (B, 21)


def hand_targets(batch: dict, A: Tensor, angle: Tensor) -> tuple[Hand, Known]:
    """The labels in the frame of a crop turned by `angle` (B,) rad; what is unknown stays NaN.

    Without a wrist nothing can be rooted, so vertices, joints and t then count as unknown.
    """
    R = axis_angle_to_matrix(batch["pose"].nan_to_num().unflatten(-1, (16, 3)))
    turned = rotate_z(angle, R[:, 0].mT).mT                                     # columns are points
    joints = rotate_z(angle, batch["joints"])
    verts = rotate_z(angle, batch["verts"])
    wrist = joints[:, :1]
    true = Hand(R=torch.cat([turned[:, None], R[:, 1:]], 1), beta=batch["shape"], t=wrist[:, 0],
                verts=verts - wrist, joints=joints - wrist, uv=transform(A, batch["uv"]),
                trans=wrist[:, 0])
    has = batch["has"]
    rooted = batch["joints_ok"][:, 0]
    known = Known(pose=has["pose"], shape=has["shape"], t=rooted & has["K"],
                  verts=(has["verts"] & rooted)[:, None].expand(-1, N_VERTS),
                  joints=batch["joints_ok"] & rooted[:, None], uv=true.uv.isfinite().all(-1))
    return true, known


def check_pretraining(cfg: Config) -> None:
    """UserError for variants that pre-training does not know, or that exclude each other."""
    own = set(VARIANTS) - FINETUNE_VARIANTS - {"our-views"}
    known = IBOT_VARIANTS if cfg.objective == "ibot" else own
    if wrong := set(cfg.variant) - known:
        raise UserError(f"--variant {' '.join(sorted(wrong))}: pre-training with --objective "
                        f"{cfg.objective} knows {', '.join(sorted(known))}")
    if {"reading-a", "reading-c"} <= set(cfg.variant):
        raise UserError("--variant: a class token has one reading; take reading-a or reading-c")
    losses = {"no-pose", "no-patch"} | ({"no-recon"} if cfg.objective == "handmim" else set())
    if losses <= set(cfg.variant):
        raise UserError(f"--variant {' '.join(sorted(losses))}: no loss is left to learn from")


# twin: peclr.py:stage_name
def stage_name(cfg: Config) -> str:
    """What a pre-training is called in folders and on the screen."""
    return "-".join((cfg.objective, *cfg.variant))


def pretrain(cfg: Config, out: Path, device: torch.device) -> None:
    """Sec. 3.1 on pictures without labels; writes the teacher's ViT to OUT/backbone.pt."""
    check_pretraining(cfg)
    torch.manual_seed(cfg.seed)
    model = HandMIM(cfg)
    folder = out / f"pretrain-{stage_name(cfg)}"
    vit = model.teacher.backbone
    if cfg.init != "random":
        say(load_backbone(model.student.backbone, cfg.init))
        model.teacher.load_state_dict(model.student.state_dict())
    stored = round(VIEW_STORE * cfg.image_size)
    data = open_data(cfg, cfg.data, "train", stored, VIEW_MARGIN, device)
    steps = steps_per_epoch(len(data), cfg.batch_size)
    total = cfg.epochs * steps
    say(f"pre-training {cfg.objective} on {len(data):,} pictures: ViT {parameters(vit):.1f} M "
        f"parameters, head {parameters(model.teacher.head):.1f} M, decoder "
        f"{parameters(model.decoder):.1f} M from blocks {model.taps}, {steps} steps an epoch, peak "
        f"rate {cfg.lr * cfg.batch_size / 1024:.3g}")
    if rank() == 0:
        draw_pretraining(folder, data, cfg, device, vit.side)

    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), fused=fused_on(device))
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=total)
    share = centre_share(cfg.teacher_momentum)
    for epoch in range(run.step // steps, cfg.epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            decay = cosine(run.step, total, cfg.weight_decay / 10, cfg.weight_decay)
            optimizer.param_groups[0]["weight_decay"] = decay
            sums: dict[str, Tensor] = {}
            for k, batch in enumerate(micro_batches, 1):
                with accumulate(net, last=k == len(micro_batches)):
                    terms = pretrain_step(net, batch, cfg, epoch)
                    (terms["loss"] / len(micro_batches)).backward()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            clip_each([p.grad for p in model.parameters() if p.grad is not None], CLIP)
            freeze_prototypes(model, run.step, cfg, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_teacher(model, cosine(run.step, total, cfg.teacher_momentum, 1.0))
            update_centre(model.centre, sums.pop("centre"), share)
            if "centre_patch" in sums:
                update_centre(model.centre_patch, sums.pop("centre_patch"), share)
            run.advance(sums, epoch, lr=rate, may_save=step + 1 < steps)
        measured = {}
        last = epoch + 1 == cfg.epochs
        if cfg.probe_every and (last or (epoch + 1) % cfg.probe_every == 0):
            measured["probe_mpjpe_mm"] = probe(model, cfg, device)
        run.log(epoch=epoch + 1, **measured)
        run.save()
    if cfg.epochs == 0:
        run.save()
    if rank() == 0:
        save_checkpoint(out / "backbone.pt", cpu_state(vit))
        draw_recovered(folder, model, data, cfg, device)
    barrier()
    say(f"wrote {out / 'backbone.pt'}")


def probe(model: HandMIM, cfg: Config, device: torch.device) -> float:
    """mm MPJPE of a ridge regression on the teacher's class tokens; the model ends in eval mode."""
    side = stored_side(cfg)
    A = plain_crop(side, cfg.image_size, device)

    def encode(image: Tensor) -> Tensor:
        crops = warp(image, A.expand(len(image), 3, 3), cfg.image_size)
        return model.teacher.backbone.tokens(normalise(crops))[:, 0]

    return probe_error(model, encode, cfg, side, MARGIN, device)


def finetune(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """Sec. 3.2: the whole network on labels; best.pt is the best epoch on the validation split."""
    if wrong := set(cfg.variant) - FINETUNE_VARIANTS:
        raise UserError(f"--variant {' '.join(sorted(wrong))}: fine-tuning knows "
                        f"{', '.join(sorted(FINETUNE_VARIANTS))}")
    torch.manual_seed(cfg.seed)
    model = HandNet(cfg)
    folder = out / f"finetune-{row}"
    if cfg.init != "random":
        say(load_backbone(model.backbone, cfg.init))
    freeze(model.backbone, cfg.freeze_blocks)
    side = stored_side(cfg)
    data = open_data(cfg, (cfg.finetune,), "train", side, MARGIN, device, labelled=True)
    val = open_data(cfg, (cfg.finetune,), "val", side, MARGIN, device)
    mean = mean_hand(data)
    model.start_at(mean)
    steps = steps_per_epoch(len(data), cfg.batch_size)
    if rank() == 0:
        draw_crops(folder, data, cfg, device)
    say(f"fine-tuning {row} on {mean['labels']:,} labelled hands, validated on {len(val):,}: ViT "
        f"{parameters(model.backbone):.1f} M parameters, rectifiers "
        f"{parameters(model.rectifiers):.1f} M, {cfg.freeze_blocks} blocks frozen")

    about = {"method": METHOD, "row": row, "mean": mean}
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), fused=fused_on(device))
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


def freeze(vit: nn.Module, blocks: int) -> None:
    """Fig. 7: the first blocks do not learn, nor do patch embedding, class token and positions."""
    if not 0 <= blocks <= len(vit.blocks):
        raise UserError(f"--freeze-blocks {blocks}: the back-bone has {len(vit.blocks)} blocks")
    if blocks:
        for part in (vit.patch_embed, vit.cls_token, vit.pos_embed, *vit.blocks[:blocks]):
            part.requires_grad_(False)


def parameters(module: nn.Module | None) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6 if module else 0.0


# twin: ti_net.py:some
def some(data: Source, n: int, device: torch.device) -> dict:
    """A batch of n samples, evenly spaced."""
    return next(batches(data, [torch.linspace(0, len(data) - 1, n).long()], device, 0))


@torch.no_grad()
def draw_pretraining(folder: Path, data: Source, cfg: Config, device: torch.device,
                     grid: int) -> None:
    """views.png: six samples as stored, two views with key points, and what the student sees."""
    batch = some(data, 6, device)
    views, view, masks = make_views(batch, cfg, 0, grid)
    uv = transform(view.A, batch["uv"][:, None])
    rows = [[draw_skeleton(denormalise(x), points) for x, points in zip(views[:, k], uv[:, k])]
            for k in (0, 1)]
    hidden = [list(hide(denormalise(views[:, k]), masks[:, k])) for k in (0, 1)]
    sheet(folder / "views.png", [list(batch["image"]), rows[0], hidden[0], rows[1], hidden[1]],
          labels=("stored", "view 1", "student sees", "view 2", "student sees"),
          bones=bool(uv.isfinite().any()),
          note="Six samples: the square that is cut out of each picture, and two views of it, key "
          "points moved along where they are known; the student does not see the grey patches.")


def hide(pictures: Tensor, masks: Tensor, instead: Tensor | None = None) -> Tensor:
    """Pictures (B, 3, S, S) in 0..1, the masked patches (B, N) grey or from other pictures."""
    grid = math.isqrt(masks.shape[1])
    mask = masks.view(-1, 1, grid, grid).float()
    mask = F.interpolate(mask, scale_factor=pictures.shape[-1] // grid)
    instead = torch.full_like(pictures, 0.5) if instead is None else instead
    return torch.where(mask > 0, instead, pictures)


@torch.no_grad()
def draw_recovered(folder: Path, model: HandMIM, data: Source, cfg: Config,
                   device: torch.device) -> None:
    """recovered.png: six hands, uncut and unturned, what the student sees, and what it recovers."""
    if model.decoder is None:
        return
    model.eval()
    batch = some(data, 6, device)
    _, view, masks = make_views(batch, cfg, 0, model.student.backbone.side)
    A = plain_crop(batch["image"].shape[-1], cfg.image_size, device, VIEW_MARGIN)
    hands = normalise(warp(batch["image"], A.expand(6, 3, 3), cfg.image_size))
    out = model(torch.stack([hands, hands], 1), masks, view, None)
    truth, guess = denormalise(hands), denormalise(out.pictures[:, 0])
    rows = [list(truth), list(hide(truth, masks[:, 0])), list(hide(truth, masks[:, 0], guess))]
    sheet(folder / "recovered.png", rows, labels=("hand", "student sees", "recovered"),
          note="Six training hands whole, without the turns and small crops of views; the patches "
          "that are hidden from the student, grey; and what the decoder puts there (L_recon).")


def draw_crops(folder: Path, data: Source, cfg: Config, device: torch.device) -> None:
    """views.png of fine-tuning: eight augmented crops with their key points."""
    batch = some(data, 8, device)
    crops, A, _ = make_crops(batch, cfg, 0)
    drawn = [draw_skeleton(x, uv, width=160) for x, uv in zip(crops, transform(A, batch["uv"]))]
    sheet(folder / "views.png", [drawn[:4], drawn[4:]], bones=True,
          note="Eight training crops as the network sees them, with their key points.")


# ---- CLI ----------------------------------------------------------------------------------------


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One stage, or with --quick both; each takes the variants that it knows."""
    work: dict[str, float] = {}
    if given.get("quick"):
        every = given.get("variant", ())
        before = tuple(name for name in every if name not in FINETUNE_VARIANTS)
        first = configure(given | {"variant": before}, "pretrain")
        given = given | {"init": str(out / "backbone.pt"),
                         "finetune": given.get("finetune") or first.data[0],
                         "row": given.get("row") or "-".join((first.objective, *every)),
                         "variant": tuple(name for name in every if name in FINETUNE_VARIANTS)}
        work = {f"pretrain-{stage_name(first)}": learning(first, PASSES, val=False)}
    elif not given.get("finetune"):
        return pretrain(configure(given, "pretrain"), out, device)
    cfg = configure(given, "finetune")
    named = row_name(cfg.init, cfg.row)
    row = named if cfg.row else "-".join((named, *cfg.variant))
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
