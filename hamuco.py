"""HaMuCo: Hand Pose Estimation via Multiview Collaborative Self-Supervised Learning.

Zheng, Wen, Xue, Ren, Wang; ICCV 2023, arXiv 2302.00988. On the data that is not given here, HanCo,
the second command is the recipe of Table 4, "Full" with ResNet-50 (paper: 11.14 / 8.31 / 7.65 mm
NMPJPE and 7.05 / 5.35 / 5.34 mm PA-MPJPE of single view, interaction and fusion) and of Table 3
(8.8 / 5.3 mm Opt-Center, 8.5 / 5.6 mm RANSAC). Nobody has run it at that size with this code.

    python hamuco.py --quick                                  minutes on a CPU, no data
    python hamuco.py --data hanco=DIR --init resnet50.pt      the paper's training; --init: see 18
    python hamuco.py --data hanco=DIR --backbone resnet18 --init resnet18.pt    Tab. 4: + --variant

The idea: a network that sees one view learns from noisy 2D labels of several synchronised ones. A
second network lets the views' features talk; its hands, one a view, must agree after the known (or
fitted) rotation between cameras, and their average teaches the first network.

Letters: I pictures, H1..H4 maps of the encoder, G joint features (V, J, D), M hand of a view
(single), M* hand after interaction, M~ fused hand, theta pose, beta shape, A alignment between
views, R camera rotations. B moments, V views, N pictures that are there, J = 21 joints, P = 799
points: 778 vertices, then the joints.

Units: 3D points inside the network are rooted at the middle MCP and counted in SPAN = 0.2 m. 2D
points inside the network are in [-1, 1] from edge to edge of its crop, so a crop is 2 wide, and the
camera's s is in crop widths a metre: `to_crop` takes SPAN to 2 s SPAN. Predictions leave in m and
in px of the stored picture; limits of triangulation are in px of a 256 px crop (`of_crop`), 2D
scores in px of the network's crop, however many px the stored picture has (`crop_side`, zoom).

Differs from the paper
 1. The readable code (zxz267/HaMuCo @7a6885b) is that of the first version; multi-view inference,
    iterative training and the protocols of Tables 2 and 3 were never released. They are ours, after
    the text. Where the text is silent, the code decides.
 2. A is a similarity over all P points, with scale and translation also where R is known (code).
    There is no canonical M~: for every view i, A_i(M*_j) is averaged over j, j = i included (code).
    The scale that fits a hand to one turned away from it falls with the cosine of the angle
    between them, so where views disagree the fused hand is too small.
 3. L_c2D. Pi with the camera of view i would multiply by its scale; the code compares x and y of
    the aligned points. We do as well; `projected-c2d` is as printed.
 4. Alternation. L_c2D on even steps, L_cf on odd ones. The code counts forward passes, and those of
    validation too.
 5. Warm-up. 10 epochs without L_c and L_d (text); the code's counter is set to 0.
 6. L_p. Norms are means over numbers, theta the 15 local joints as axis-angle without MANO's mean,
    alpha 0.01, gamma 100 (code).
 7. Camera. (s, t) with a ReLU on s (code). Last layers start at zero weights, a hand in its mean
    pose and s = 5, so that s cannot begin dead; paper silent; ours.
 8. SAIGB flattens maps of 8x8, which ties the code to 256 px. Ours takes the map's own size, so D
    is the paper's at 256 px and smaller for smaller pictures.
 9. Missing views are left out before the encoder, in attention, in the maximum and in every mean.
10. Random masks (Sec. 4.6) are drawn anew for each sample, and may leave all views; in the code a
    batch shares them and one view at least is hidden. The paper states neither their epochs nor
    their rate; we take a tenth of the rate and a cosine.
11. Iterative training: labels are the interaction's 2D of the round before, confidence 1, from
    fresh weights; paper silent; ours.
12. Crops: the box is HanCo's middle 104 px (code: test crops of 130, training crops of 120 to 159
    px, moved, scaled, turned by 180 degrees either way); shares of the box on other data.
13. `no-dcvi` (Table 4, #10): L_c and M~ act on M; L_d would repeat L_cf, and is left out.
14. Full supervision (Tab. 2, 3) adds L1 on root-relative joints of both networks and takes true key
    points for L_2D; triangulated labels are learnt from in the same way; paper silent; ours.
15. Opt-Center: median over joints of triangulated minus fused, then Huber reprojection, scale kept.
    RANSAC: all pairs instead of ten drawn ones, then as karfly/learnable-triangulation-pytorch.
16. Choice of epoch: the last. Any other choice needs labels. Rate: a cosine by step (code: by
    epoch).
17. Joints are those that the data set means (`sources.hand_for`): HanCo's are regressed from the
    posed mesh (code), those of synthetic hands are the kinematic chain's, as in their truth.
18. First weights. The code starts its encoder from ImageNet's; the text is silent. Ours starts from
    random ones unless --init names a file, for nothing is downloaded here.
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
    MIDDLE_MCP, N_JOINTS, N_VERTS, WITHOUT_FLOAT64, Flags, Mano, UserError, accumulate, arg,
    autocast, axis_angle_to_matrix, barrier, batch_statistics, bits, build_backbone, cpu_state,
    crop, decay_groups, denormalise, epe, guarded, invert, load_backbone, load_checkpoint,
    matrix_to_axis_angle, normalise, parallel, parse, permutation, project, rank, rotate_z,
    rotation, save_checkpoint, say, settle, share, six_d_to_matrix, start, steps_per_epoch,
    transform, uniform, unwrapped, warp)
from hand import hand_mark
from hand.drawing import curve, draw_skeleton, sheet
from sources import (
    Rig, Rows, Source, batches, data_name, hand_for, open_data, scored_split, training_steps)
from sources.judging import LIMITS, Exam, Row, assess, predictions, shares_within
from sources.loader import gather
from sources.predictors import Predictor, answer, outputs, scored_on
from sources.course import COURSE, SCORING, judging, learning
from sources.progress import Run
from sources.sheets import best_median_worst, draw_rows
from sources.recipes import stored_config
from sources.runs import open_out, recall, remember
from sources.stages import mean_hand
from sources.tables import for_screen, table, write_results

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Config --------------------------------------------------------------------------------------

METHOD = "hamuco"
CROP = 1.25                  # network's crop / hand box: 130 / 104 px (authors' code, testing)
MARGIN = 2.2                 # stored square / hand box: HanCo's whole picture, 224 / 104 px
STORE = MARGIN / CROP        # side asked for / network side, so px of both are the same
SPAN = 0.2                   # m, unit of the network's 3D points (authors' code)
OUTLIERS = 0.2               # share of lost labels in --quick: some 32 px on a 256 px crop
QUICK_TEST = 256             # moments that --quick scores

BACKBONES = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet152", "efficientnet_b0")
VARIANTS = {
    "single-view": "Ours-SV: the single-view estimator alone (Sec. 4.3, Tab. 2)",
    "no-vsf": "without the view-shared feature branch (Tab. 4, #3)",
    "no-cva": "without the cross-view attention branch (Tab. 4, #4)",
    "no-g1": "without joint location embedding (Tab. 4, #5)",
    "no-g2": "without joint-wise high-level features (Tab. 4, #6)",
    "no-g3": "without joint-aligned features (Tab. 4, #7)",
    "no-c2d": "without L_c2D, so L_cf at every step (Tab. 4, #8)",
    "no-cf": "without L_cf, so L_c2D at every step (Tab. 4, #9)",
    "no-dcvi": "without the cross-view network; L_c on single views (Tab. 4, #10)",
    "no-c": "without L_c (Tab. 4, #11)",
    "no-d": "without L_d (Tab. 4, #12)",
    "projected-c2d": "L_c2D on projections, as Sec. 3.2.3 prints it",
}
_FEATURES = {"no-vsf", "no-cva", "no-g1", "no-g2", "no-g3"}
IDLE = {                     # what has nothing left to do beside a variant
    "single-view": {*VARIANTS, "calibration", "warm_epochs", "mask_epochs"} - {"single-view"},
    "no-dcvi": {*_FEATURES, "no-d", "mask_epochs"},
    "no-c": {"no-c2d", "no-cf", "projected-c2d"},
    "no-c2d": {"projected-c2d"},
}

_QUICK = dict(data=("synthetic:calm",), backbone="resnet10", image_size=64, batch_size=8,
              micro_batch=8, samples=1536, views=4, lr=1e-3, alpha=0.1, gamma=10.0, augment=0.1,
              workers=0)
QUICK = {"single_view": _QUICK | dict(epochs=4), "hamuco": _QUICK | dict(epochs=3, warm_epochs=1)}


@dataclasses.dataclass
class Config(Flags):
    """Every option: default, what it is, the paper's value and where it stands."""

    backbone: str = arg("resnet50", "encoder F_e", paper="resnet50", ref="Tab. 4",
                        choices=BACKBONES)
    init: str = arg("random", "first weights of the encoder: random, or any checkpoint file",
                    why="ImageNet's in the authors' code (18); nothing is downloaded here")
    image_size: int = arg(256, "side of the network's input, px", paper=256, ref="Sec. 4.2")
    epochs: int = arg(40, "passes over the data, the first ones included", paper=40, ref="Sec. 4.2")
    warm_epochs: int = arg(10, "of these, first ones without L_c and L_d", paper=10, ref="Sec. 4.2")
    mask_epochs: int = arg(0, "further epochs with random view masks, for any number of views "
                              "(Sec. 4.6: a few)")
    batch_size: int = arg(8, "moments a step, over all processes", paper=8, ref="Sec. 4.2", least=1)
    micro_batch: int = arg(8, "moments at a time, the unit of BatchNorm", why="ours", least=1)
    lr: float = arg(3e-4, "first learning rate, then a cosine to 0", paper=3e-4, ref="Sec. 4.2",
                    above=0)
    weight_decay: float = arg(0.01, "AdamW's decay (authors' code); none on biases and norms "
                                    "(ours)")
    alpha: float = arg(0.01, "weight of the pose prior (authors' code)")
    gamma: float = arg(100.0, "alpha gamma is the weight of the shape prior (authors' code)")
    augment: float = arg(1.0, "how far training views are moved, turned and scaled: share of the "
                              "authors' ranges")
    views: int = arg(8, "cameras to train and test with, the first ones", paper=8, ref="Sec. 4.2",
                     least=1)
    calibration: str = arg("known", "rotations between cameras: known, or fitted by Procrustes",
                           paper="known", ref="Tab. 1", choices=("known", "none"))
    supervision: str = arg("labels2d", "what is learnt from: noisy 2D labels, true 2D, true 3D "
                           "(Tab. 2, 3), or labels triangulated in advance (EpipolarPose)",
                           paper="labels2d", ref="Sec. 3.2.3",
                           choices=("labels2d", "truth2d", "truth3d", "triangulated"))
    rounds: int = arg(1, "trainings, each on the 2D of the one before", paper=1, ref="Sec. 4.6",
                      least=1)
    data_fraction: float = arg(1.0, "share of the training moments used (Fig. 3 a)",
                               above=0, most=1)
    variant: tuple[str, ...] = arg((), "named departures, listed below", choices=tuple(VARIANTS))


# ---- Views: every picture of a moment moved on its own (authors' code) ---------------------------


class View(NamedTuple):
    """How pictures were moved; what L_2D and A undo."""

    A: Tensor                    # (B, V, 3, 3) stored picture -> crop, px
    angle: Tensor                # (B, V) rad, of the in-plane turn in A
    colour: Tensor               # (B, V, 3) factor of each channel


def stored_side(cfg: Config) -> int:
    """Side of the pictures that data sets are asked for, px; HanCo's own have fewer."""
    return round(STORE * cfg.image_size)


def as_views(batch: dict) -> dict:
    """A batch of single pictures (B, ...) as moments of one view (B, 1, ...); others unchanged."""
    if batch["image"].dim() == 5:
        return batch
    ok = torch.ones(len(batch["image"]), dtype=torch.bool, device=batch["image"].device)
    one = {key: value[:, None] for key, value in batch.items()
           if isinstance(value, Tensor) and key not in ("index", "cameras")}
    return batch | one | {"view_ok": ok[:, None]}


def draw_view(index: Tensor, V: int, side: int, cfg: Config, epoch: int) -> View:
    """The draws of samples (B,) for V stored pictures `side` px wide, each its own (12).

    The authors' numbers are px of HanCo's pictures, where the hand's box is 104 px wide; --augment
    is the share of their ranges that is used.
    """
    draws = [uniform(index, 10, cfg.seed, "hamuco view", epoch, v) for v in range(V)]
    u = torch.stack(draws, 1).flatten(0, 1)                                 # (B V, 10)
    box = side / MARGIN                                                     # px
    wide = box * (130 + cfg.augment * (39 * u[:, 0] - 10)) / 104            # 120 to 159 px of 224
    wide = wide / (1 + cfg.augment * (0.2 * u[:, 1] - 0.1))                 # scaled by 0.9 to 1.1
    shift = box * cfg.augment * (40 * (u[:, 2:4] - 0.5) + 20 * (u[:, 4:6] - 0.5)) / 104
    angle = math.pi * cfg.augment * (2 * u[:, 6] - 1)
    colour = 0.8 + 0.4 * u[:, 7:]
    A = rotation(angle, cfg.image_size) @ crop((side - 1) / 2 + shift, wide, cfg.image_size)
    return View(*(x.unflatten(0, (-1, V)) for x in (A, angle, colour)))


def make_views(batch: dict, cfg: Config, epoch: int) -> tuple[Tensor, View]:
    """A batch -> what the network sees, (B, V, 3, S, S) normalised, and how it was moved."""
    image, S = batch["image"], cfg.image_size
    view = draw_view(batch["index"], image.shape[1], image.shape[-1], cfg, epoch)
    moved = warp(image.flatten(0, 1), view.A.flatten(0, 1), S).float()
    moved = (moved * view.colour.flatten(0, 1)[..., None, None]).clamp(0, 255)
    return normalise(moved).unflatten(0, image.shape[:2]), view


def hand_view(image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Stored squares (B, V, 3, L, L) -> the test crop (B, V, 3, size, size), and how, (1, 3, 3).

    It is the middle of what `draw_view` draws around: no turn, no shift, CROP times the box.
    """
    L = image.shape[-1]
    middle = torch.full((1, 2), (L - 1) / 2, device=image.device)
    A = crop(middle, torch.full((1,), L * CROP / MARGIN, device=image.device), size)
    flat = image.flatten(0, 1)
    return normalise(warp(flat, A.expand(len(flat), 3, 3), size)).unflatten(0, image.shape[:2]), A


def to_unit(uv: Tensor, size: int) -> Tensor:
    """px of a picture `size` wide -> [-1, 1] from edge to edge: pixel centres are integers."""
    return (2 * uv + 1) / size - 1


def to_px(uv: Tensor, size: int) -> Tensor:
    """The inverse of `to_unit`."""
    return ((uv + 1) * size - 1) / 2


def of_crop(px: float, size: float) -> float:
    """A limit in px of the authors' 256 px crop -> px of a crop `size` wide."""
    return px * size / 256


def crop_side(batch: dict, size: int) -> float:
    """Side of the test crop in px of the stored pictures, for a network that sees it in `size`."""
    return size * batch["image"].shape[-1] / round(STORE * size)


# ---- Model (Sec. 3.1, 3.2) -----------------------------------------------------------------------

POSE, SHAPE, CAMERA = slice(0, 96), slice(96, 106), slice(106, 109)     # of a head's 109 numbers
JOINTS = slice(N_VERTS, None)                                           # of the P points
# Authors' code: SAIGB's maps a joint, c1, heads and blocks of DCVI, the last graph's width, dropout
MAPS, LOCATION, HEADS, BLOCKS, LAST, DROP = 8, 64, 4, 2, 32, 0.1
UPRIGHT = (0.0, 0, 1, 0, 0, 1)               # 6D of a hand with its palm to the camera, fingers up


class Hand(NamedTuple):
    """Hands of N pictures."""

    xyz: Tensor                  # (N, P, 3) rooted at the middle MCP, 0.2 m
    uv: Tensor                   # (N, P, 2) in [-1, 1]
    theta: Tensor                # (N, 45) axis-angle of the local joints, without the mean
    beta: Tensor                 # (N, 10)
    camera: Tensor               # (N, 3) s, tx, ty
    R: Tensor                    # (N, 16, 3, 3) what MANO gets


class Draws(NamedTuple):
    """What is random inside the cross-view network; see `draw_masks`."""

    see: Tensor                  # (BLOCKS, B, V, V) bool, view q attends to view k
    shared: Tensor               # (BLOCKS, B, V) bool, views in the maximum
    keep: Tensor | None          # (BLOCKS + 1, B, V, J, D) bool, dropout


def quiet(ok: Tensor) -> Draws:
    """No draw at all: every view that is there, (B, V) bool, talks to every other."""
    own = torch.eye(ok.shape[1], dtype=torch.bool, device=ok.device)
    return Draws((ok[:, None] | own).expand(BLOCKS, -1, -1, -1), ok.expand(BLOCKS, -1, -1), None)


def draw_masks(index: Tensor, ok: Tensor, D: int, cfg: Config, epoch: int) -> Draws:
    """Dropout of samples (B,), and in the last --mask-epochs random views (Sec. 4.6; 10)."""
    B, V = ok.shape
    keep = [draw_dropout(index, V * N_JOINTS * D, cfg.seed, epoch, layer).view(B, V, N_JOINTS, D)
            for layer in range(BLOCKS + 1)]
    draws = quiet(ok)._replace(keep=torch.stack(keep))
    if epoch < cfg.epochs:
        return draws
    own = torch.eye(V, dtype=torch.bool, device=ok.device)
    there = ok.sum(1)
    see, shared = [], []
    for block in range(BLOCKS):
        u = uniform(index, 2 + V + V * V, cfg.seed, "hamuco mask", epoch, block)
        few_seen, few_shared, lot, lots = u.split([1, 1, V, V * V], 1)
        lots = torch.where(ok[:, None], lots.view(B, V, V), 2.0)
        lots = lots.masked_fill(own, -1.0)                        # a view always sees itself
        see.append(first_lots(lots, few_seen[:, 0] * there) & (ok[:, None] | own))
        shared.append(first_lots(torch.where(ok, lot, 2.0), few_shared[:, 0] * there) & ok)
    return draws._replace(see=torch.stack(see), shared=torch.stack(shared))


def draw_dropout(index: Tensor, n: int, seed: int, epoch: int, layer: int) -> Tensor:
    """Which of n numbers of each sample (B,) are kept, (B, n) bool, each with chance 1 - DROP.

    A random word of 64 bits decides on four numbers, 16 bits each: drawing is then a small part of
    a step.
    """
    words = bits(index, math.ceil(n / 4), seed, "hamuco dropout", epoch, layer)
    quarters = torch.stack([words >> 16 * k for k in range(4)], -1).flatten(1) & 0xFFFF
    return quarters[:, :n] >= round(DROP * 2 ** 16)


def first_lots(lots: Tensor, few: Tensor) -> Tensor:
    """Where the lots (B, ..., V) are among the 1 + floor(few) lowest of their row; few (B,)."""
    place = lots.argsort(-1).argsort(-1)
    return place < 1 + few.long().view(-1, *[1] * (lots.dim() - 1))


class Heads(nn.ModuleList):
    """F_d: pose (96), shape (10) and camera (3), each from the pooled last map: -> (N, 109)."""

    def __init__(self, C: int):
        super().__init__(nn.Sequential(nn.Linear(C, C), nn.LeakyReLU(0.1), nn.Linear(C, n))
                         for n in (96, 10, 3))
        for head in self:
            nn.init.zeros_(head[-1].weight)
        _begin(*(head[-1].bias for head in self))

    def forward(self, H4: Tensor) -> Tensor:
        f = H4.to(torch.promote_types(H4.dtype, torch.float32)).mean((2, 3))
        return torch.cat([head(f) for head in self], 1)


@torch.no_grad()
def _begin(pose: Tensor, shape: Tensor, camera: Tensor) -> None:
    """Biases of last layers: an upright hand in its mean pose that fills the crop (7)."""
    pose.copy_(torch.tensor([*UPRIGHT, *15 * (1.0, 0, 0, 1, 0, 0)]))
    shape.zero_()
    camera.copy_(torch.tensor([5.0, 0, 0]))


def coordinates(verts: Tensor, joints: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 778, 3), (N, 21, 3) m, camera (N, 3) -> the P points: xyz (N, P, 3), uv (N, P, 2).

    Weak perspective, Sec. 3.1: Pi(P) = s Omega(P) + t.
    """
    xyz = (torch.cat([verts, joints], 1) - joints[:, MIDDLE_MCP, None]) / SPAN
    return xyz, to_crop(camera)[:, None] * xyz[..., :2] + camera[:, None, 1:]


def to_crop(camera: Tensor) -> Tensor:
    """Camera (..., 3) s, tx, ty -> (..., 1): how far SPAN reaches in a crop that is 2 wide."""
    return 2 * SPAN * camera[..., :1].relu()


def sample_joints(H: Tensor, uv: Tensor) -> Tensor:
    """JFS: maps (N, C, h, w) at points (N, J, 2) in [-1, 1] -> (N, J, C); zero outside.

    Corners are aligned, as in the authors' code. The grid stays float32 under autocast too: a
    bfloat16 one is pixels off.
    """
    with torch.autocast(H.device.type, enabled=False):
        grid = uv[:, :, None].nan_to_num(3.0).clamp(-3, 3)         # a CPU crashes at huge ones
        return F.grid_sample(H.to(uv.dtype), grid, align_corners=True)[..., 0].mT


class GraphConv(nn.Module):
    """x -> W (A / rowsum A) x, A learnt, at first the identity (HOPE-Net, as the authors' code)."""

    def __init__(self, D: int, out: int):
        super().__init__()
        self.A = nn.Parameter(torch.eye(N_JOINTS))
        self.fc = nn.Linear(D, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.A / (self.A.sum(1, keepdim=True) + 1e-5)) @ x)


class Graph(nn.Module):
    """F_a, adaptive GCN: norm, two convolutions, dropout between: (..., J, D) -> (..., J, out)."""

    def __init__(self, D: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.first = GraphConv(D, D)
        self.second = GraphConv(D, out)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = F.leaky_relu(self.first(self.norm(x)), 0.1)
        x = x if keep is None else x * keep / (1 - DROP)
        return F.leaky_relu(self.second(x), 0.1)


class Attention(nn.Module):
    """F_t: self-attention over T = V x J tokens, then an MLP, each with its residual."""

    def __init__(self, D: int, heads: int = HEADS):
        super().__init__()
        self.heads = heads
        inner = D // heads * heads                             # D need not be a multiple of heads
        self.norm, self.norm_mlp = nn.LayerNorm(D, 1e-6), nn.LayerNorm(D, 1e-6)
        self.q, self.k, self.v = (nn.Linear(D, inner) for _ in range(3))
        self.out = nn.Linear(inner, D)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, x: Tensor, see: Tensor) -> Tensor:
        """(B, T, D) -> the same; `see` (B, T, T) bool: which tokens a token may attend to."""
        normed = self.norm(x)
        q, k, v = (layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))                # (B, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, see[:, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Block(nn.Module):
    """DCVI, Sec. 3.2.2: G* = G + F_t(G) + C', C' the joints' maximum over views of F_a(G)."""

    def __init__(self, D: int, variant: tuple[str, ...]):
        super().__init__()
        self.attention = None if "no-cva" in variant else Attention(D)
        self.graph = None if "no-vsf" in variant else Graph(D, D)

    def forward(self, G: Tensor, see: Tensor, shared: Tensor, keep: Tensor | None) -> Tensor:
        """G (B, V, J, D), see (B, V, V), shared (B, V), keep as G or None -> (B, V, J, D)."""
        out = G
        if self.attention is not None:
            tokens = see.repeat_interleave(N_JOINTS, 1).repeat_interleave(N_JOINTS, 2)
            out = self.attention(G.flatten(1, 2), tokens).view_as(G)
        if self.graph is not None:
            C = self.graph(G, keep).masked_fill(~shared[:, :, None, None], -math.inf)
            nobody = ~shared.any(1)[:, None, None, None]
            out = out + C.amax(1, keepdim=True).masked_fill(nobody, 0.0)
        return out


class Interaction(nn.Module):
    """CVI-Net, Sec. 3.2: features of every view's joints, DCVI, shared regression -> (N, 109).

    C, c3: channels of H4 and of H1..H3 together; cells: positions of H4; maps: SAIGB's of a joint.
    """

    def __init__(self, C: int, c3: int, cells: int, variant: tuple[str, ...] = (),
                 maps: int = MAPS):
        super().__init__()
        self.local = "no-g3" not in variant
        wide = N_JOINTS * LOCATION
        self.G1 = None if "no-g1" in variant else nn.Sequential(
            nn.Linear(N_JOINTS * 3 + 90, wide), nn.LeakyReLU(0.1), nn.Linear(wide, wide))
        self.G2 = None if "no-g2" in variant else nn.Sequential(
            nn.Conv2d(C, N_JOINTS * maps, 1), nn.LeakyReLU(0.1))
        self.D = LOCATION * bool(self.G1) + maps * cells * bool(self.G2) + c3 * self.local
        if not self.D:
            raise UserError(
                "--variant no-g1 no-g2 no-g3: the cross-view network is left without an input")
        self.blocks = nn.ModuleList(Block(self.D, variant) for _ in range(BLOCKS))
        self.fuse = Graph(self.D, LAST)
        flat = LAST * N_JOINTS
        self.F_r = nn.Sequential(nn.Linear(flat, flat), nn.LeakyReLU(0.1), nn.Linear(flat, 109))
        nn.init.zeros_(self.F_r[-1].weight)
        _begin(*(self.F_r[-1].bias[part] for part in (POSE, SHAPE, CAMERA)))

    def features(self, H4: Tensor, G3: Tensor, uvd: Tensor, six_d: Tensor) -> Tensor:
        """VSGFE, Sec. 3.2.1: (N, C, h, w), (N, J, c3), (N, J, 3), (N, 96) -> G (N, J, D)."""
        parts = [] if self.G2 is None else [self.G2(H4).unflatten(1, (N_JOINTS, -1)).flatten(2)]
        parts += [G3] if self.local else []
        if self.G1 is not None:
            location = self.G1(torch.cat([uvd.flatten(1), six_d[:, 6:]], 1))
            parts.append(location.unflatten(1, (N_JOINTS, LOCATION)))
        return torch.cat(parts, -1)

    def forward(self, H4: Tensor, G3: Tensor, uvd: Tensor, six_d: Tensor, ok: Tensor,
                draws: Draws) -> Tensor:
        """Of the N pictures that are there, ok (B, V) -> pose, (ten unused), camera, (N, 109)."""
        G = pad(self.features(H4, G3, uvd, six_d), ok)
        for k, block in enumerate(self.blocks):
            keep = None if draws.keep is None else draws.keep[k]
            G = block(G, draws.see[k], draws.shared[k], keep)
        keep = None if draws.keep is None else only(draws.keep[BLOCKS], ok, len(H4))
        C = self.fuse(only(G, ok, len(H4)), keep)
        with torch.autocast(G.device.type, enabled=False):
            return self.F_r(C.to(torch.promote_types(C.dtype, torch.float32)).flatten(1))


def only(x: Tensor, ok: Tensor, N: int) -> Tensor:
    """Of (B, V, ...) those of the N pictures that are there, ok (B, V) bool -> (N, ...)."""
    first = ok.flatten().int().argsort(descending=True, stable=True)[:N]     # x[ok] would wait
    return x.flatten(0, 1).index_select(0, first)


def pad(x: Tensor, ok: Tensor, fill: float = 0.0) -> Tensor:
    """The inverse: (N, ...) -> (B, V, ...), `fill` where no picture is."""
    x = torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])
    place = torch.where(ok.flatten(), ok.flatten().cumsum(0) - 1, len(x) - 1)
    return x.index_select(0, place).unflatten(0, ok.shape)


class HaMuCo(nn.Module):
    """Single-view estimator F_s and the cross-view network; any number of views, some missing."""

    USES = {"image", "view_ok", "cameras"}      # cameras only where they are known, to fuse

    def __init__(self, cfg: Config):
        super().__init__()
        self.size = cfg.image_size
        self.calibrated = cfg.calibration == "known"
        self.backbone = build_backbone(cfg.backbone, cfg.image_size, cfg.recompute)
        self.heads = Heads(self.backbone.dim)
        alone = {"single-view", "no-dcvi"} & set(cfg.variant)
        self.interaction = None if alone else self._interaction(cfg.variant)
        self.mano = hand_for(cfg.data[0], cfg.mano)                                      # (17)

    def _interaction(self, variant: tuple[str, ...]) -> Interaction:
        """CVI-Net for the encoder's maps, whose sizes a look at one black picture gives."""
        self.backbone.eval()                                   # BatchNorm must not count that look
        with torch.no_grad():
            maps = self.backbone(torch.zeros(1, 3, self.size, self.size))
        self.backbone.train()
        local = sum(H.shape[1] for H in maps[:3])
        return Interaction(self.backbone.dim, local, maps[3][0, 0].numel(), variant)

    def forward(self, pictures: Tensor, ok: Tensor, draws: Draws) -> tuple[Hand, Hand | None]:
        """(B, V, 3, S, S), (B, V) bool -> M and M* (None without the network), N pictures each."""
        seen = only(pictures, ok, int(ok.sum()))                 # the one number a GPU is asked for
        maps = self.backbone(seen.contiguous(memory_format=torch.channels_last))
        with torch.autocast(pictures.device.type, enabled=False):
            parameters = self.heads(maps[-1])
            single = self.decode(parameters)
            if self.interaction is None:
                return single, None
            uv = single.uv[:, JOINTS]
            uvd = torch.cat([uv, single.xyz[:, JOINTS, 2:]], -1)
        G3 = torch.cat([sample_joints(H, uv.detach()) for H in maps[:3]], -1)
        update = self.interaction(maps[-1], G3, uvd, parameters[:, POSE], ok, draws)
        with torch.autocast(pictures.device.type, enabled=False):
            return single, self.decode(torch.cat([update[:, POSE], single.beta.detach(),
                                                  update[:, CAMERA]], 1))

    def decode(self, parameters: Tensor) -> Hand:
        """A head's numbers (N, 109) -> hands, Sec. 3.1: 6D to axis-angle, and MANO's mean added."""
        six_d, beta, camera = (parameters[:, part] for part in (POSE, SHAPE, CAMERA))
        R = six_d_to_matrix(six_d.unflatten(1, (16, 6)))
        theta = matrix_to_axis_angle(R[:, 1:]).flatten(1)
        local = axis_angle_to_matrix((theta + self.mano.hands_mean).unflatten(1, (15, 3)))
        R = torch.cat([R[:, :1], local], 1)
        verts, joints = self.mano(R, beta)
        return Hand(*coordinates(verts, joints, camera), theta, beta, camera, R)

    def predict(self, batch: dict) -> dict[str, dict[str, Tensor]]:
        """{"image", "view_ok", "cameras"} -> single, interaction (if there is one) and fusion.

        Each has joints (B, V, 21, 3) and verts (B, V, 778, 3) m in camera axes, rooted at the
        middle MCP, and uv (B, V, 21, 2) px of image; all but fusion also pose (B, V, 16, 3, 3) and
        shape (B, V, 10). NaN where a view is missing. A batch of single pictures (B, 3, S, S) gives
        them without the axis V. Without cameras, hands are fused by Procrustes.
        """
        single_pictures = batch["image"].dim() == 4
        batch = as_views(batch)
        ok = batch["view_ok"]
        crops, A = hand_view(batch["image"], self.size)
        M, M_star = self(crops, ok, quiet(ok))
        best = M if M_star is None else M_star
        out = {"single": self._named(M, ok, A)}
        if M_star is not None:
            out["interaction"] = self._named(M_star, ok, A)
        known = self.calibrated and "cameras" in batch
        R = view_rotations(batch["cameras"], ok) if known else None
        fused = fuse(align(pad(best.xyz, ok), R), ok)
        camera = pad(best.camera, ok)[:, :, None]
        uv = to_crop(camera) * fused[..., JOINTS, :2] + camera[..., 1:]
        out["fusion"] = self._placed(*(only(x, ok, len(M.xyz)) for x in (fused, uv)), ok, A)
        if single_pictures:
            return {name: {key: x[:, 0] for key, x in hand.items()} for name, hand in out.items()}
        return out

    def _named(self, hand: Hand, ok: Tensor, A: Tensor) -> dict[str, Tensor]:
        """A network's hand as `predict` returns it; A (1, 3, 3) stored picture -> crop."""
        pose, shape = (pad(x, ok, math.nan) for x in (hand.R, hand.beta))
        return self._placed(hand.xyz, hand.uv[:, JOINTS], ok, A) | {"pose": pose, "shape": shape}

    def _placed(self, xyz: Tensor, uv: Tensor, ok: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Points (N, P, 3), (N, J, 2) in the network's units -> m and px of the stored picture."""
        metres = SPAN * xyz
        pixels = transform(invert(A), to_px(uv, self.size))
        found = {"joints": metres[:, JOINTS], "verts": metres[:, :N_VERTS], "uv": pixels}
        return {name: pad(x, ok, math.nan) for name, x in found.items()}


def build(cfg: Config) -> HaMuCo:
    """The network that eval.py judges."""
    return HaMuCo(cfg)


# ---- Alignment and losses (Sec. 3.2.3) -----------------------------------------------------------


def view_rotations(cameras: Tensor, ok: Tensor, angle: Tensor | None = None) -> Tensor:
    """World to camera (B, V, 4, 4) -> rotations (B, V, 3, 3) of pictures turned by `angle` (B, V).

    The identity where a view is missing; NaN for the whole moment where one that is there has none.
    A picture turned by an angle (rad) is what the camera sees when it turns about its optical axis.
    """
    eye = torch.eye(3, device=cameras.device, dtype=cameras.dtype)
    R = torch.where(ok[..., None, None], cameras[..., :3, :3], eye)
    R = torch.where(R.isfinite().flatten(1).all(1)[:, None, None, None], R, math.nan)
    return R if angle is None else rotate_z(angle.flatten(), R.flatten(0, 1).mT).mT.view_as(R)


def best_rotation(K: Tensor) -> Tensor:
    """The rotation R that maximises tr(R K), K (..., 3, 3) = sum source target^T -> (..., 3, 3).

    Its value comes from a singular value decomposition, as a constant. Its derivative comes from
    the implicit function theorem, which also holds where singular values coincide and that of the
    decomposition is infinite: a further small turn w (rad) changes tr(R K) by g . w - w^T H w / 2,
    so the best one is w = H^-1 g. At R that is 0 (no turn improves the best), but g moves with K,
    and so does w: adding w's turn to R leaves its value and gives it its derivative.

    Where another turn is as good (points on a line, or all in one place), R is one of the best, and
    its derivative has no part about the axes of those turns. NaN in K gives NaN.
    """
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(K.nan_to_num())
        sign = torch.ones_like(S)
        sign[..., 2] = torch.linalg.det(U @ Vh)
        R = (Vh.mT * sign[..., None, :]) @ U.mT
        values = sign * S                                    # eigenvalues of R K, whose axes are Vh
        stiff = values.sum(-1, keepdim=True) - values        # and those of H, about the same axes
        free = stiff <= 8 * torch.finfo(K.dtype).eps * S[..., :1]
        H_inverse = (Vh.mT * torch.where(free, 0, 1 / stiff)[..., None, :]) @ Vh
    P = R @ K
    apart = P - P.mT
    g = torch.stack([apart[..., 1, 2], apart[..., 2, 0], apart[..., 0, 1]], -1)
    x, y, z = (H_inverse @ g[..., None])[..., 0].unbind(-1)
    zero = torch.zeros_like(x)
    W = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return R + W @ R


def align(x: Tensor, R: Tensor | None) -> Tensor:
    """A: hands x (B, V, P, 3) -> (B, V, V, P, 3): [:, i, j] is view j's hand as view i has it.

    A similarity (2): rotation R_i R_j^T from R (B, V, 3, 3), or the best one where R is None or
    NaN; then the best scale and translation onto view i's own hand. A missing view is a hand of
    zeros.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mu = x.mean(2, keepdim=True)
    c = x - mu
    K = torch.einsum("bjpa,bipd->bijad", c, c)
    turn = None if R is None else torch.einsum("biac,bjdc->bijad", R.to(x.dtype), R.to(x.dtype))
    if turn is None:
        turn = best_rotation(K)
    elif turn.isnan().any():
        turn = torch.where(turn.isnan(), best_rotation(K), turn)
    size = c.square().sum((2, 3))[:, None].clamp(min=1e-12)
    s = torch.einsum("bijad,bijda->bij", turn, K) / size
    return s[..., None, None] * torch.einsum("bijad,bjpd->bijpa", turn, c) + mu[:, :, None]


def fuse(aligned: Tensor, ok: Tensor) -> Tensor:
    """M~ as every view has it, Sec. 3.2.3: the mean over views j that are there: (B, V, P, 3)."""
    w = ok.to(aligned.dtype)
    return torch.einsum("bijpa,bj->bipa", aligned, w) / w.sum(1).clamp(min=1)[:, None, None, None]


def mean_where(error: Tensor, ok: Tensor) -> Tensor:
    """Mean of errors (B, V, ...) or (B, V, V, ...) over views that are there, ok (B, V[, V])."""
    error = error.flatten(ok.dim()).mean(-1)
    return torch.where(ok, error, 0).sum() / ok.sum().clamp(min=1)


def loss_c2d(aligned: Tensor, x: Tensor, ok: Tensor, scale: Tensor | None = None) -> Tensor:
    """L_c2D, Sec. 3.2.3: x and y of view i's hand are the label of every view j's, j = i too (3).

    aligned as `align` gives it, x (B, V, P, 3), ok (B, V). `scale` (B, V): `to_crop` of each view,
    to compare projections. Of the gradient: the label is a constant, but view i's hand is also what
    A_i fits the others to, so through the fitted scale and place (and the rotation, where it is not
    known) a gradient still reaches view i; the authors' code does the same. For j = i the error is
    0, and so is ours; theirs is a rounding error, whose sign is noise in the gradient.
    """
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)[:, :, None, None]
    error = (aligned[..., :2] - x[:, :, None, :, :2].detach()).abs().masked_fill(own, 0)
    error = error if scale is None else error * scale[:, :, None, None, None]
    return mean_where(error, ok[:, :, None] & ok[:, None])


def loss_cf(aligned: Tensor, x: Tensor, ok: Tensor) -> Tensor:
    """L_cf, Sec. 3.2.3: |M*_i - A_i^-1(M~)|, the fused hand as a constant label of every view's."""
    return mean_where((fuse(aligned, ok).detach() - x).abs(), ok)


def loss_d(aligned: Tensor, single: Tensor, ok: Tensor) -> Tensor:
    """L_d, Sec. 3.2.3: |M_i - A_i^-1(M~)|, the same label for the single-view network's hands."""
    return mean_where((fuse(aligned, ok).detach() - single).abs(), ok)


def loss_2d(uv: Tensor, target: Tensor, c: Tensor, ok: Tensor) -> Tensor:
    """L_2D: L1 of joints (B, V, J, 2) in [-1, 1], weighted by the labels' confidence (B, V, J)."""
    assert uv.shape == target.shape, (uv.shape, target.shape)     # or all pairs would be compared
    label = torch.where(c[..., None] > 0, target, 0)
    uv = uv.to(torch.promote_types(uv.dtype, torch.float32))
    return mean_where((c[..., None] * (uv - label)).abs(), ok)


def loss_3d(xyz: Tensor, target: Tensor, ok: Tensor) -> Tensor:
    """Full supervision (14): L1 of joints (B, V, J, 3) where the target is known, not NaN."""
    known = target.isfinite() & ok[..., None, None]
    return torch.where(known, xyz - target.nan_to_num(), 0).abs().sum() / known.sum().clamp(min=1)


# ---- Triangulation (Sec. 4.3.2) ------------------------------------------------------------------
# Points (..., V, 2) px of one joint in V views, P (..., V, 3, 4) = K [R t]. All float64, batched.

RANSAC_PX, HUBER_PX = 30.0, 2.0             # limits on a 256 px crop (15; theirs: 15 and 1 HALF px)


def projections(K: Tensor, cameras: Tensor) -> Tensor:
    """(..., 3, 3) px and (..., 4, 4) world to camera -> P (..., 3, 4)."""
    return K.double() @ cameras[..., :3, :].double()


def triangulate(uv: Tensor, P: Tensor, weight: Tensor | None = None) -> Tensor:
    """DLT: (..., V, 2), (..., V, 3, 4), weights (..., V) of both rows of a view -> (..., 3).

    The last right-singular vector of the rows u P3 - P1, v P3 - P2, as the smallest eigenvector of
    their 4x4 normal matrix. NaN where fewer than two views have a finite point of weight above 0.
    """
    uv, P = uv.double(), P.double()
    rows = uv[..., None] * P[..., 2:, :] - P[..., :2, :]                            # (..., V, 2, 4)
    used = rows.sum((-2, -1)).isfinite()
    if weight is not None:
        rows = rows * weight.double()[..., None, None]
        used = used & (weight > 0)
    rows = torch.where(used[..., None, None], rows, 0).flatten(-3, -2)
    X = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., 0]
    return torch.where((used.sum(-1) > 1)[..., None], X[..., :3] / X[..., 3:], math.nan)


def reproject(X: Tensor, P: Tensor) -> Tensor:
    """(..., 3) in every view: P (..., V, 3, 4) -> (..., V, 2) px."""
    x = (P[..., :3] @ X[..., None, :, None])[..., 0] + P[..., 3]
    return x[..., :2] / x[..., 2:]


def ransac(uv: Tensor, P: Tensor, ok: Tensor, pairs: Tensor | None = None,
           limit: float = RANSAC_PX) -> tuple[Tensor, Tensor]:
    """RANSAC over pairs of views (15): (..., V, 2), (..., V, 3, 4), ok (..., V) -> X, inliers.

    pairs (n, 2) or (..., n, 2), by default all. Of each pair's DLT, views nearer than `limit` px,
    and the pair itself, agree; the first largest set is triangulated: X (..., 3), inliers (..., V),
    NaN and none with fewer than two views.
    """
    uv, P, V = uv.double(), P.double(), uv.shape[-2]
    ok = ok & uv.isfinite().all(-1) & P.isfinite().all(-1).all(-1)
    if pairs is None:
        pairs = torch.tensor(list(itertools.combinations(range(V), 2)), dtype=torch.long,
                             device=uv.device).view(-1, 2)
    member = F.one_hot(pairs, V).any(-2) & ok[..., None, :]                          # (..., n, V)
    whole = member.sum(-1) == 2
    if not member.shape[-2]:
        return uv.new_full((*uv.shape[:-2], 3), math.nan), torch.zeros_like(ok)
    X = triangulate(uv[..., None, :, :], P[..., None, :, :, :], member)
    near = (reproject(X, P[..., None, :, :, :]) - uv[..., None, :, :]).norm(dim=-1) < limit
    agree = (near & ok[..., None, :] | member) & whole[..., None]
    best = agree.sum(-1).argmax(-1)[..., None, None].expand(*agree.shape[:-2], 1, V)
    inliers = agree.gather(-2, best)[..., 0, :]
    return triangulate(uv, P, inliers), inliers


def refine(X: Tensor, uv: Tensor, P: Tensor, ok: Tensor, offset: Tensor | float = 0.0,
           delta: float = HUBER_PX, steps: int = 60, still: float = 1e-6) -> Tensor:
    """Robust refinement: X (..., 3) minimises the sum over views of Huber(|error in px|, delta).

    (..., N, 2), (..., N, 3, 4), ok (..., N); `offset` (..., N, 3) moves X in each term. Damped
    Gauss-Newton with Huber's weights and curvature: an error beyond delta has none along itself,
    and by weights alone points with labels near delta would creep for hundreds of steps. So it ends
    in the minimum that any other solver finds. Every ten steps those are done with that an undamped
    one would not move by more than `still` px.
    """
    shape, N = X.shape, uv.shape[-2]
    lost = ~X.isfinite().all(-1, keepdim=True)                # fewer than two views: X stays NaN
    X = X.double().masked_fill(lost, 0.0).reshape(-1, 3)
    offset = (X.new_zeros(()) + offset).expand(*shape[:-1], N, 3).reshape(-1, N, 3)
    ok = (ok & ~lost).reshape(-1, N)
    uv = torch.where(ok[..., None], uv.double().reshape(-1, N, 2), 0)
    P = torch.where(ok[..., None, None], P.double().reshape(-1, N, 3, 4), 0)
    eye = torch.eye(3, dtype=uv.dtype, device=uv.device)
    damping = torch.full_like(X[:, 0], 1e-3)

    def look(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Errors (n, N, 2) px, their derivative by X (n, N, 2, 3), their lengths (n, N)."""
        x = (P[..., :3] @ (X[..., None, :] + offset)[..., None])[..., 0] + P[..., 3]
        z = torch.where(ok, x[..., 2], 1)[..., None]
        r = torch.where(ok[..., None], x[..., :2] / z - uv, 0)
        J = (P[..., :2, :3] - (x[..., :2] / z)[..., None] * P[..., 2:, :3]) / z[..., None]
        return r, J, r.norm(dim=-1)

    def cost(d: Tensor) -> Tensor:
        return torch.where(d <= delta, d * d, 2 * delta * d - delta ** 2).sum(-1)

    def solve(damping: Tensor) -> Tensor:
        """What a step of that damping (n,) takes from X, (n, 3)."""
        w = (delta / d.clamp(min=delta))[..., None] * ok[..., None]
        u = torch.where(d > delta, 1 / d.clamp(min=delta), 0)[..., None] * r      # 0 within delta
        across = J - u[..., None] * (u[..., None, :] @ J)
        H = torch.einsum("...nra,...nrb->...ab", across * w[..., None], J)
        g = torch.einsum("...nra,...nr->...a", J, w * r)
        scale = damping[..., None, None] * H.diagonal(dim1=-2, dim2=-1)[..., None] + 1e-12
        A = H.nan_to_num() + scale.nan_to_num(nan=1.0) * eye
        return torch.linalg.solve_ex(A, g.nan_to_num()).result        # unchecked: a GPU would wait

    found, rows = X.clone(), torch.arange(len(X), device=X.device)
    r, J, d = look(X)
    for k in range(1, steps + 1):
        step = solve(damping)
        r_new, J_new, d_new = look(X - step)
        good = (cost(d_new) <= cost(d))[..., None]
        damping = torch.where(good[..., 0], damping / 10, damping * 10).clamp(1e-15, 1e9)
        X = torch.where(good, X - step, X)
        d = torch.where(good, d_new, d)
        r = torch.where(good[..., None], r_new, r)
        J = torch.where(good[..., None, None], J_new, J)
        if k % 10 == 0:
            found[rows] = X
            px = (J @ solve(torch.full_like(damping, 1e-9))[:, None, :, None])[..., 0].norm(dim=-1)
            left = (~(px <= still)).any(-1).nonzero()[:, 0]           # here a GPU waits
            if not len(left):
                break
            rows, X, uv, P, ok, offset, damping = (
                x[left] for x in (rows, X, uv, P, ok, offset, damping))
            r, J, d = look(X)
    found[rows] = X
    return found.view(shape).masked_fill(lost, math.nan)


def opt_center(joints: Tensor, uv: Tensor, P: Tensor, ok: Tensor,
               delta: float = HUBER_PX) -> Tensor:
    """Opt-Center, Sec. 4.3.2 (15): where a rigid hand must stand to be seen at uv, -> (B, 3) m.

    joints (B, J, 3) m in world axes, uv (B, V, J, 2) px, P (B, V, 3, 4), ok (B, V).
    """
    V, J = uv.shape[1:3]
    every = ok[..., None].expand(-1, -1, J)
    alone = triangulate(uv.transpose(1, 2), P[:, None], every.transpose(1, 2))
    first = (alone - joints).nanmedian(1).values
    offset = joints.double()[:, None].expand(-1, V, -1, -1).flatten(1, 2)             # (B, V J, 3)
    P = P[:, :, None].expand(-1, -1, J, -1, -1).flatten(1, 2)
    return refine(first, uv.flatten(1, 2), P, every.flatten(1), offset, delta)


def to_cameras(X: Tensor, cameras: Tensor) -> Tensor:
    """World points (B, J, 3) -> camera frames (B, V, J, 3), by (B, V, 4, 4)."""
    M = cameras.to(X.dtype)
    return X[:, None] @ M[..., :3, :3].mT + M[..., None, :3, 3]


@torch.no_grad()
def place_fused(prediction: dict[str, dict[str, Tensor]], batch: dict, size: int
                ) -> dict[str, dict[str, Tensor]]:
    """fusion_center and fusion_ransac of a calibrated batch, in camera frames with their root.

    The 2D predictions are the interaction's; `size` of the network's input, in px of which limits
    are known. Where the rig's unit of length is not known (scale NaN), no hand of known size can be
    placed.
    """
    ok, K, M = batch["view_ok"], batch["K"], batch["cameras"]
    P = projections(K, M)
    uv = prediction.get("interaction", prediction["single"])["uv"]
    side = crop_side(batch, size)
    free = to_cameras(triangulate_robustly(uv, P, ok, side)[0], M)
    placed = {"fusion_ransac": in_camera(free, K)}
    if batch["scale"][ok].isnan().any():
        return placed
    world = prediction["fusion"]["joints"] @ M[..., :3, :3]                             # R^T x
    shape = world.nanmean(1).double()
    centre = opt_center(shape, uv, P, ok, of_crop(HUBER_PX, side))
    fixed = to_cameras(shape + centre[:, None], M)
    return {"fusion_center": in_camera(fixed, K)} | placed


def in_camera(joints: Tensor, K: Tensor) -> dict[str, Tensor]:
    """Joints (B, V, J, 3) m in camera frames as a prediction with a root and key points."""
    return {"joints": joints, "root": joints[:, :, 0], "uv": project(joints, K.to(joints))}


def triangulate_robustly(uv: Tensor, P: Tensor, ok: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """RANSAC, then Huber on the inliers: uv (B, V, J, 2) px, P (B, V, 3, 4), ok (B, V).

    `size` of the network's crop in the same px, to which limits belong. Returns (B, J, 3) twice:
    the refined points, and those of RANSAC alone.
    """
    by_joint = uv.transpose(1, 2)                                                   # (B, J, V, 2)
    P = P[:, None].expand(-1, by_joint.shape[1], -1, -1, -1)
    there = ok[:, None].expand(by_joint.shape[:3])
    X, inliers = ransac(by_joint, P, there, limit=of_crop(RANSAC_PX, size))
    return refine(X, by_joint, P, inliers, delta=of_crop(HUBER_PX, size)), X


# ---- Training ------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What a micro-batch is to learn."""

    uv: Tensor                   # (B, V, J, 2) in [-1, 1]
    c: Tensor                    # (B, V, J) confidence, 0 where there is no label
    xyz: Tensor | None           # (B, V, J, 3) rooted, 0.2 m, or NaN; None without 3D supervision


def targets(batch: dict, view: View, cfg: Config) -> Target:
    """Labels as --supervision chooses them, moved as the pictures were."""
    label, c, xyz = batch["uv"], torch.ones_like(batch["confidence"]), batch["joints"]
    if cfg.supervision == "labels2d":
        label, c = batch["uv_label"], batch["confidence"]
    if cfg.supervision == "triangulated":
        P = projections(batch["K"], batch["cameras"])
        weight = batch["confidence"] * batch["view_ok"][..., None]
        X = triangulate(batch["uv_label"].transpose(1, 2), P[:, None], weight.transpose(1, 2))
        xyz = to_cameras(X, batch["cameras"])
        label = project(xyz, batch["K"].to(xyz)).to(c.dtype)
    known = label.isfinite().all(-1)
    uv = to_unit(transform(view.A, torch.where(known[..., None], label, 0)), cfg.image_size)
    if cfg.supervision not in ("truth3d", "triangulated"):
        return Target(uv, c * known, None)
    rooted = (xyz - xyz[:, :, MIDDLE_MCP, None]) / SPAN
    no_unit = batch["scale"].isnan()[..., None, None]        # a rig that does not say its unit
    rooted = torch.where(no_unit, math.nan, rooted)
    turned = rotate_z(view.angle.flatten(), rooted.flatten(0, 1)).view_as(rooted)
    return Target(uv, c * known, turned.to(c.dtype))


def lr_at(step: int, cfg: Config, steps: int) -> float:
    """Rate at a step, `steps` to an epoch: a cosine to 0; in --mask-epochs a second one (10)."""
    peak, first, epochs = cfg.lr, 0, cfg.epochs
    if step >= cfg.epochs * steps:
        peak, first, epochs = cfg.lr / 10, cfg.epochs * steps, cfg.mask_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, epochs * steps)))


def train_step(net: nn.Module, batch: dict, cfg: Config, epoch: int,
               step: int) -> dict[str, Tensor]:
    """Sec. 3.2.3 for one micro-batch of moments: the terms and their sum.

    `step` counts from the run's first: whether it is even decides which consistency loss acts (4).
    """
    model, off = unwrapped(net), set(cfg.variant)
    ok = batch["view_ok"]
    pictures, view = make_views(batch, cfg, epoch)
    draws = quiet(ok)
    if model.interaction is not None:
        draws = draw_masks(batch["index"], ok, model.interaction.D, cfg, epoch)
    with autocast(pictures.device, cfg.precision):     # the network only: bfloat16 misses pixels
        M, M_star = net(pictures, ok, draws)
    hands = [M] if M_star is None else [M, M_star]
    last = hands[-1]                                # what is fused: M where there is no M*
    true = targets(batch, view, cfg)
    L_c = L_d = L_3D = M.xyz.new_zeros(())
    if epoch >= cfg.warm_epochs and "single-view" not in off:
        x = pad(last.xyz, ok)
        R = None
        if cfg.calibration == "known" and "cameras" in batch:
            R = view_rotations(batch["cameras"], ok, view.angle)
        aligned = align(x, R)
        if not off & {"no-c", "no-c2d"} and (step % 2 == 0 or "no-cf" in off):
            scale = pad(to_crop(last.camera), ok)[..., 0] if "projected-c2d" in off else None
            L_c = loss_c2d(aligned, x, ok, scale)
        elif not off & {"no-c", "no-cf"}:
            L_c = loss_cf(aligned, x, ok)
        if M_star is not None and "no-d" not in off:
            L_d = loss_d(aligned, pad(M.xyz, ok), ok)
    L_2D = sum(loss_2d(pad(hand.uv[:, JOINTS], ok), true.uv, true.c, ok) for hand in hands)
    priors = sum(hand.theta.abs().mean() for hand in hands) + cfg.gamma * M.beta.abs().mean()
    L_p = cfg.alpha * priors
    if true.xyz is not None:
        L_3D = sum(loss_3d(pad(hand.xyz[:, JOINTS], ok), true.xyz, ok) for hand in hands)
    return {"loss": L_c + L_d + L_2D + L_p + L_3D,
            "L_c": L_c, "L_d": L_d, "L_2D": L_2D, "L_p": L_p, "L_3D": L_3D}


def train(cfg: Config, folder: Path, model: HaMuCo, data: Source, device: torch.device,
          labels: Tensor | None) -> None:
    """One round: the loop. OUT/train-ROW/last.pt has the weights at its end.

    `labels` (n, V, J, 2) px of image take the place of the data's, with confidence 1 (11).
    """
    steps = steps_per_epoch(len(data), cfg.batch_size)
    epochs = cfg.epochs + cfg.mask_epochs
    labels = None if labels is None else labels.to(device)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), fused=True)
    net = parallel(model, device, cfg.compile)
    run = Run(folder, METHOD, cfg, model, optimizer, total=epochs * steps)
    for epoch in range(run.step // steps, epochs):
        model.train()
        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):
            rate = lr_at(run.step, cfg, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums: dict[str, Tensor] = {}
            with batch_statistics(model):
                for k, batch in enumerate(micro_batches, 1):
                    batch = as_views(batch)
                    if labels is not None:
                        batch["uv_label"] = labels[batch["index"] % len(labels)]
                        batch["confidence"] = torch.ones_like(batch["confidence"])
                    with accumulate(net, last=k == len(micro_batches)):
                        terms = train_step(net, batch, cfg, epoch, run.step)
                        (terms["loss"] / len(micro_batches)).backward()
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0) + term.detach() / len(micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.advance(sums, epoch, lr=rate, may_save=step + 1 < steps)
        run.save()
    if epochs == 0:                                        # released weights, as they are
        run.save()


def rig_of(cfg: Config) -> Rig:
    """How moments are asked for: their views, and the noise of synthetic labels."""
    return Rig(cfg.views, OUTLIERS if cfg.quick else 0.1, CROP / MARGIN)


def open_rig(cfg: Config, split: str, device: torch.device, most: int | None = None) -> Source:
    """The moments of --data, or of training the share --data-fraction of them."""
    data = open_data(cfg, cfg.data, split, stored_side(cfg), MARGIN, device, most=most,
                     rig=rig_of(cfg))
    if split == "train" and cfg.data_fraction < 1:
        keep = math.ceil(cfg.data_fraction * len(data))
        data = Rows(data, permutation(len(data), cfg.seed)[:keep].sort().values)
        say(f"{keep:,} moments used (--data-fraction {cfg.data_fraction:g})")
    return data


def check_labels(data: Source, cfg: Config) -> None:
    """UserError where --supervision wants labels that the data set does not have.

    A data set without noisy labels gives its true key points in their place: learning from those
    would be no self-supervision, so it is refused.
    """
    if cfg.supervision in ("labels2d", "triangulated"):
        for part in data.parts():
            if not part.gives("uv_label"):
                raise UserError(f"{part.name}: has no 2D labels; put them into its folder "
                                "(see README), or take --supervision truth2d or truth3d, which "
                                "learn from annotations")
    if cfg.supervision == "triangulated" and not data.gives("cameras"):
        raise UserError("--supervision triangulated: needs data with several calibrated cameras")


def next_labels(file: Path, model: HaMuCo, data: Source, cfg: Config,
                device: torch.device) -> Tensor:
    """What the next round learns from: the interaction's 2D of every training moment (11).

    (n, V, J, 2) px of image, kept for --resume in a file, with the side of its pictures.
    """
    side = float(data.targets(torch.zeros(1, dtype=torch.long))["side_px"].flatten()[0])
    if not file.is_file():
        parts = []
        for batch, found in predictions(model, data, cfg, device):
            uv = found.get("interaction", found["single"])["uv"]
            parts.append({"uv": uv if batch["image"].dim() == 5 else uv[:, None]})
        labels = gather(parts, len(data))["uv"]
        if rank() == 0:
            save_checkpoint(file, {"uv": labels, "side": side})
        barrier()
    kept = load_checkpoint(file)
    labels, then = kept["uv"], kept.get("side", stored_side(cfg))     # older files lack it
    if len(labels) != len(data):
        raise UserError(f"{file}: holds labels of {len(labels):,} moments, the data are "
                        f"{len(data):,}; a resumed run cannot change its data")
    return labels if then == side else (labels + 0.5) * (side / then) - 0.5


def stage_name(row: str, k: int) -> str:
    """What round k of a row is called in folders and on the screen."""
    return f"train-{row}" + f"-{k}" * (k > 1)


def fit(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """All rounds of one row; writes OUT/train-ROW/final.pt, OUT/finetune.pt and OUT/backbone.pt."""
    data = open_rig(cfg, "train", device)
    check_labels(data, cfg)
    mean = mean_hand(data)
    epochs = cfg.epochs + cfg.mask_epochs
    labels = None
    for k in range(1, cfg.rounds + 1):
        folder = out / stage_name(row, k)
        torch.manual_seed(cfg.seed)
        model = HaMuCo(cfg)
        say("first weights of the encoder are random (18)" if cfg.init == "random"
            else load_backbone(model.backbone, cfg.init))
        if rank() == 0:
            folder.mkdir(exist_ok=True)
            draw_views(folder, data, cfg, device)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"training {folder.name} on {len(data):,} moments, {size:.1f} M parameters, "
            f"{steps_per_epoch(len(data), cfg.batch_size)} steps an epoch, {epochs} epochs")
        if cfg.warm_epochs >= epochs and "single-view" not in cfg.variant:
            say(f"L_c and L_d stay off in all of --warm-epochs {cfg.warm_epochs}")
        train(cfg, folder, model, data, device, labels)
        if k < cfg.rounds:
            labels = next_labels(folder / "labels.pt", model, data, cfg, device)
    if rank() == 0:
        content = {"method": METHOD, "row": row, "mean": mean, "cfg": dataclasses.asdict(cfg),
                   "epoch": epochs, "model": cpu_state(model), "hand": hand_mark(cfg.mano)}
        save_checkpoint(out / f"train-{row}" / "final.pt", content)
        save_checkpoint(out / "finetune.pt", content)
        save_checkpoint(out / "backbone.pt", cpu_state(model.backbone))
    barrier()


# ---- Report --------------------------------------------------------------------------------------

COLUMNS = ("mpjpe_mm", "n_mpjpe_mm", "pa_mpjpe_mm", "epe_2d_px_crop", "abs_mpjpe_mm", "mpvpe_mm",
           "pa_mpvpe_mm", "auc", "f_5", "f_15", "label_px_crop", "bone_spread_percent")
SHEET = ("labels", "single_view", "single", "interaction", "fusion")      # the first four: Fig. 4


def label_rows(batch: dict, size: int) -> dict[str, dict[str, Tensor]]:
    """What the 2D labels give without any training: themselves, and triangulated (Tab. 3, top)."""
    ok, uv = batch["view_ok"], batch["uv_label"]
    c = batch["confidence"] * ok[..., None]
    rows = {"labels": {"uv": uv}}                             # they say nothing of 3D
    if not bool(batch["has"]["cameras"].all()) or uv.shape[1] < 2:
        return rows
    P, by_joint = projections(batch["K"], batch["cameras"]), uv.transpose(1, 2)
    refined, plain = triangulate_robustly(uv, P, ok, crop_side(batch, size))
    for name, X in (("dlt", triangulate(by_joint, P[:, None], (c > 0).transpose(1, 2))),
                    ("dlt_confidence", triangulate(by_joint, P[:, None], c.transpose(1, 2))),
                    ("ransac", plain), ("ransac_huber", refined)):
        rows[name] = in_camera(to_cameras(X, batch["cameras"]), batch["K"])
    return rows


def model_rows(models: dict[str, HaMuCo], batch: dict) -> dict[str, dict[str, Tensor]]:
    """Trained models' outputs by row: single_view; or single, interaction, fusion, placed."""
    rows: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        found = answer(model, batch)
        if name.startswith("single_view"):
            rows[name] = found["single"]
            continue
        known = model.calibrated and bool(batch["has"]["cameras"].all())
        if known and batch["image"].shape[1] > 1:
            found |= place_fused(found, batch, model.size)
        rows |= {key + name.removeprefix(METHOD): hand for key, hand in found.items()}
    return rows


def predictor(models: dict[str, HaMuCo], size: int, labelled: bool) -> Predictor:
    """The trained models' rows and, where the data are `labelled` in 2D, the labels' own.

    Data without 2D labels have the truth in their place: it would score 0.0 px.
    """
    def rows_of(batch: dict) -> dict[str, dict[str, Tensor]]:
        batch = as_views(batch)
        rows = label_rows(batch, size) if labelled else {}
        return outputs(rows | model_rows(models, batch), "")
    return rows_of


def against_labels(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """Where nothing is known but labels: distance to them, px of the crop, how far bones change.

    A protocol. The bones' spread is their lengths' standard deviation over moments by the mean; of
    each moment the first view that has the hand counts.
    """
    batch, joints = f["batch"], f["joints"]
    there = batch.get("view_ok", torch.ones_like(batch["joints_ok"][:, 0]))
    known = there[:, None] & (batch["confidence"] > 0)
    apart = epe(f["uv_image"], batch["uv_label"], known).nanmean(1)
    out = {"label_px_crop": apart * batch.get("zoom", 1.0)}
    parents = [0 if k % 4 == 1 else k - 1 for k in range(1, N_JOINTS)]
    bones = (joints[:, 1:] - joints[:, parents]).norm(dim=-1)
    made = bones.isfinite().unflatten(0, (-1, batch.get("views", 1)))                # (B, V, 20)
    first = made & (made.cumsum(1) == 1)
    return out | {"bone_spread_percent": bones.masked_fill(~first.flatten(0, 1), math.nan)}


def report(cfg: Config, out: Path, row: str, device: torch.device) -> None:
    """Score the last epoch of a training on the `scored_split`: table, metrics.json, pictures."""
    content = load_checkpoint(out / f"train-{row}" / "final.pt")
    model = build(stored_config(Config, content["cfg"])).to(device).eval()
    model.load_state_dict(content["model"])
    models = {row: model}
    COURSE.begin(SCORING)
    split = scored_split(cfg.data[0])
    test = open_rig(cfg, split, device, most=QUICK_TEST if cfg.quick else None)
    test = Rows(test, torch.arange(min(QUICK_TEST, len(test)))) if cfg.quick else test
    if not len(test):
        say(f"wrote {out}/finetune.pt; {' '.join(cfg.data)} has no {split} split, so nothing was "
            "scored")
        return

    def fig_4(f: dict, hand: Mano) -> dict[str, Tensor]:
        """Share of joints within some px of a 256 px crop; a protocol."""
        error = epe(f["uv_image"], f["batch"]["uv"]) * 256
        return {"within": shares_within(error / crop_side(f["batch"], cfg.image_size))}

    hand = hand_for(cfg.data[0], cfg.mano)
    exam = Exam(test, cfg.data[0], hand, scored_on(device), cfg.workers,
                {"labels": against_labels, "fig_4": fig_4})
    judged = predictor(models, cfg.image_size, test.gives("uv_label"))
    rows, _ = assess(exam, judged, content["mean"])
    rows = {"mean_pose": rows.pop("mean_pose"), **rows}
    learnt: dict[str, Row] = {}
    if any("pa_mpjpe_mm" in row.means() for row in rows.values()):
        train = open_rig(cfg, "train", device)          # Fig. 4, left: moments that were trained on
        train = Rows(train, torch.linspace(0, len(train) - 1, min(128, len(train))).long())
        exam = dataclasses.replace(exam, data=train, protocols={})
        learnt, _ = assess(exam, predictor(models, cfg.image_size, train.gives("uv_label")))
    if rank() == 0:
        conclude(cfg, out, rows, learnt, model, split)


def conclude(cfg: Config, out: Path, rows: dict[str, Row], learnt: dict[str, Row], model: HaMuCo,
             split: str) -> None:
    """Print and write what was found on moments of a split, and on those `learnt` from."""
    protocol = "ours" if any(row.means() for row in rows.values()) else "labels"
    means = {name: row.means(protocol) for name, row in rows.items()}
    means["mean_pose"].pop("bone_spread_percent", None)     # a stiff hand; it would look perfect
    *_, last = rows.values()
    key = next(m for m in ("pa_mpjpe_mm", "epe_2d_px_crop", "label_px_crop")
               if m in last.means(protocol) or m == "label_px_crop")
    counts = {name: row.tallies[protocol].count(key) for name, row in rows.items() if row.predict}
    n, most = last.tallies[protocol].count(key), max(counts.values())
    size = sum(p.numel() for p in model.parameters()) / 1e6
    test = last.exam.data
    say("\n" + for_screen(table(means, COLUMNS), "metrics.json"))
    if few := [f"{row} {count:,}" for row, count in counts.items() if 0 < count < most]:
        say(f"of {most:,} pictures these rows have fewer, for no hand could be made: "
            f"{', '.join(few)}")
    left_out, uses = len(last.errors) - n, sorted(model.USES)
    say(f"{n:,} pictures of {len(test):,} {split} moments scored, {left_out} left out; MPJPE is "
        f"wrist-rooted, 2D in px of a crop {cfg.image_size} px wide; one seed ({cfg.seed}); "
        f"{size:.1f} M parameters; boxes from {test.box_source}; the network sees "
        f"{', '.join(uses)}, _center and _ransac also K")
    entry = {"run": out.name, "split": split, "n": n, "left_out": left_out,
             "box_source": test.box_source, "uses": uses}
    write_results(out / "metrics.json", cfg.data[0], entry | {"protocol": "ours", "rows": means})
    if learnt:
        two = {name: {metric: x for metric, x in row.means().items() if "2d" in metric}
               for name, row in kinds(learnt, SHEET).items()}
        say("on moments it was trained on, 2D error to the truth in px: "
            + ", ".join(f"{name} {row['epe_2d_px_crop']:.2f}" for name, row in two.items() if row))
        n = max(row.count("scored ours") for row in learnt.values())
        left_out = max(len(row.errors) for row in learnt.values()) - n
        entry |= {"split": "train", "n": n, "left_out": left_out, "protocol": "training_2d",
                  "rows": two}
        write_results(out / "metrics.json", cfg.data[0], entry)
        lines = {name: (LIMITS, row.tallies["fig_4"].points("within"))
                 for name, row in kinds(rows, SHEET[:4]).items()}
        curve(out / "pck_2d.png", lines, "joints within a 2D distance", "px of a 256 px crop",
              "share")
    draw_moments(out / "predictions.png", rows)
    say(f"wrote {', '.join(sorted(str(file) for file in out.glob('[!.]*.*')))}")


def kinds(rows: dict[str, Row], names: tuple[str, ...]) -> dict[str, Row]:
    """The rows of some outputs, whatever variant their network is."""
    return {name: row for name, row in rows.items() if name.partition("-")[0] in names}


def draw_moments(path: Path, rows: dict[str, Row]) -> None:
    """Two views each of the moments that fusion, or else the last row, does best to worst."""
    *_, (name, judged) = (kinds(rows, ("fusion",)) or rows).items()
    errors = judged.errors.view(len(judged.exam.data), -1)
    moments, found = best_median_worst(errors.nanmean(1), each=1)
    if len(moments):
        missing = errors[moments].isnan().int()
        views = missing.argsort(dim=1, stable=True)[:, :2]
        picked = moments[:, None] * errors.shape[1] + views
        draw_rows(path, kinds(rows, SHEET), picked.flatten(),
                  [kind for kind in found for _ in views[0]],
                  f"Two views each of the moments that {name} does best, in the middle and worst. "
                  "Where views disagree, fitting one's hand to another's shrinks it, and so the "
                  "fused hand (hamuco.py, 2).")


@torch.no_grad()
def draw_views(folder: Path, data: Any, cfg: Config, device: torch.device) -> None:
    """views.png: training views of four moments with the labels that they are to learn."""
    batch = as_views(next(batches(data, [torch.linspace(0, len(data) - 1, 4).long()], device, 0)))
    pictures, view = make_views(batch, cfg, 0)
    true = targets(batch, view, cfg)
    uv = to_px(torch.where(true.c[..., None] > 0, true.uv, math.nan), cfg.image_size)
    rows = [[draw_skeleton(denormalise(picture), points, width=200)
             for picture, points in zip(*both)] for both in zip(pictures, uv)]
    sheet(folder / "views.png", rows, [f"view {v}" for v in range(pictures.shape[1])], bones=True,
          note="Four training moments, a camera a column, each picture moved on its own; the bones "
          "are the labels that are learnt from" + ", a detector's, errors included." * (
              cfg.supervision == "labels2d") + "." * (cfg.supervision != "labels2d"))


# ---- CLI -----------------------------------------------------------------------------------------


def row_of(variant: tuple[str, ...]) -> str:
    """What a trained model is called: single_view, hamuco, hamuco-VARIANT."""
    if "single-view" in variant:
        return "-".join(("single_view", *(name for name in variant if name != "single-view")))
    return "-".join((METHOD, *variant))


def checked(cfg: Config, given: set[str]) -> Config:
    """UserError where options do not go together; `given` are those that the user named."""
    for variant in cfg.variant:
        for name in sorted(IDLE.get(variant, set()) & (given | set(cfg.variant))):
            flag = f"variant {name}" if name in VARIANTS else name.replace("_", "-")
            raise UserError(f"--{flag}: does nothing beside --variant {variant}")
    if cfg.row:
        raise UserError("--row: HaMuCo's rows are named after its outputs and --variant")
    if cfg.finetune:
        raise UserError("--finetune: HaMuCo has one stage, training on 2D labels of --data")
    if len(splits := {scored_split(spec) for spec in cfg.data}) > 1:
        raise UserError(f"--data {' '.join(cfg.data)}: are scored on other splits than each other "
                        f"({', '.join(sorted(splits))}); train on those of one")
    if cfg.label_fraction != 1:
        raise UserError("--label-fraction: HaMuCo needs no labels; --data-fraction takes a part of "
                        "the moments")
    if cfg.supervision == "triangulated" and (cfg.calibration == "none" or cfg.views < 2):
        raise UserError("--supervision triangulated: needs --calibration known, --views 2 or more")
    if cfg.supervision == "triangulated" and cfg.device.startswith(WITHOUT_FLOAT64):
        raise UserError(f"--supervision triangulated: needs float64, which --device {cfg.device} "
                        "does not have; take --device cpu")
    if cfg.rounds > 1 and cfg.supervision in ("truth2d", "truth3d"):
        raise UserError("--rounds: later rounds replace noisy labels, and --supervision "
                        f"{cfg.supervision} has none")
    return cfg


def stage_config(given: dict[str, Any], alone: bool = False) -> Config:
    """The options of a training, or of --quick's single-view stage, which is trained `alone`."""
    if alone:
        given = given | dict(variant=("single-view",), rounds=1, mask_epochs=0)
    sizes = "single_view" if "single-view" in given.get("variant", ()) else "hamuco"
    return checked(settle(Config, given, sizes, QUICK), set() if alone else set(given))


def run_stages(given: dict[str, Any], out: Path, device: torch.device) -> None:
    """One training, then the report.

    With --quick a back-bone learns from single views first, in the place of a long warm-up, for
    they cost a third; --init says otherwise.
    """
    cfg = stage_config(given)
    every = [cfg]
    if cfg.quick and "single-view" not in cfg.variant and "init" not in given:
        every = [stage_config(given, alone=True), cfg]
    cost = {one.variant: 1 if "single-view" in one.variant else 3 for one in every}
    whole = [dataclasses.replace(one, epochs=one.epochs + one.mask_epochs) for one in every]
    work = {stage_name(row_of(one.variant), k): learning(one, one.views * cost[one.variant], False)
            for one in whole for k in range(1, one.rounds + 1)}
    scored = float(cfg.views * QUICK_TEST) if cfg.quick else judging(cfg.views)
    COURSE.plan(work | {SCORING: scored})
    if len(every) > 1:
        row = row_of(every[0].variant)
        fit(every[0], out, row, device)
        cfg = dataclasses.replace(cfg, init=str(out / f"train-{row}" / "final.pt"))
    fit(cfg, out, row_of(cfg.variant), device)
    report(cfg, out, row_of(cfg.variant), device)


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    given = recall(Config, parse(Config, argv, __doc__, QUICK, VARIANTS))
    cfg = stage_config(given)
    device = start(cfg.device)
    share(cfg.batch_size, cfg.micro_batch)
    name = "-".join(map(data_name, cfg.data))
    with open_out(cfg.out, f"runs/{METHOD}-{name}{'-quick' * cfg.quick}", cfg.resume) as out:
        given = given if cfg.out else recall(Config, given | {"out": str(out)})
        run_stages(remember(out, given), out, device)


if __name__ == "__main__":
    sys.exit(guarded(main))
