"""The roof: any checkpoint of the four papers against any data set, runs beside runs, your own pictures.

    python eval.py runs/ti_net-finetune-dexycb --data dexycb=DIR        a run folder or a .pt file
    python eval.py RUN RUN ... --data NAME --scratch RUN --sheet        a fair comparison on the same samples
    python eval.py RUN RUN ... --curve label_fraction                   error over an option, from what runs wrote
    python eval.py RUN --images DIR --out DIR [--obj]                   your own photos: overlays, JSON, meshes
    python eval.py RUN --data freihand=DIR --submit                     the file that the data set's server reads
    python eval.py --inspect --data interhand=DIR                       is my data read right?

Judging prints a table with the mean-pose row, a 95 % interval beside each number (bootstrap over samples),
paired differences and the spread over seeds where runs differ in nothing else; it says what a prediction
looks like where it seems mirrored, or in other units, axes or joint order. Into --out, by default
RUN/eval-DATA, go metrics.json, table.md, table.csv, pck.png (share of joints within a distance), joints.png,
visibility.png, predictions.png (best, median and worst samples) and with --sheet sheet.png.
--curve reads metrics.json and config.json: `epoch` for TI-Net's Fig. 5, `label_fraction` or `labels` for
PeCLR's Fig. 6, `freeze_blocks` for HandMIM's Fig. 7, `views` or `data_fraction` for HaMuCo's Fig. 3.
--images wants a folder or a picture; hands are those of labels.jsonl beside it, or what MediaPipe finds.

Protocols, each named beside its numbers
    ours            all labelled samples, wrist-rooted MPJPE, Procrustes with a proper rotation, the
                    data set's own joints
    dexycb          the tool kit's (dex-ycb-toolkit @64551b0): labelled frames, absolute, root-relative
                    and Procrustes errors, the last with reflections allowed; area under the curve to
                    50 mm. Networks without a root are given the true one for the absolute row
    interhand       the tool kit's (InterHand2.6M @5d0e456): the mean over 42 joints of each joint's mean,
                    wrists at zero, over all, single and interacting hands; mrrpe_mm, the vector between the
                    two wrists, where both are known and the network says where it puts them
    intaghand       IntagHand's: middle MCP on middle MCP, scaled to the true bone wrist-middle MCP
    freihand        the official script's (lmb-freiburg/freihand @5ea4ab9): absolute errors in the camera
                    frame, no root taken away, and Procrustes with reflections; areas to 50 mm; F-scores.
                    Mesh scores where there is a mesh. Networks without a root are given the true one
    ho3d            the official script's (ho3d @2fd6ee1): as freihand, and st_mpjpe_mm: scaled by the bone
                    wrist-middle MCP (its joints 0 and 4), wrist on wrist. Needs evaluation_xyz.json
    peclr           PeCLR's helper (dahiyaaneesh/peclr @f29f0a9): the same errors, Procrustes without
                    reflections, areas to 49.5 cm with a strict <
    yt3d            PeCLR's Table 3: the truth is pixels, so each true hand is scaled until its bone 9-10 is
                    as long as the mean hand's (--mano, or the built-in one); Procrustes then, and px in 2D
    coco            COCO-WholeBody hands as mmpose scores them: mean error of all key points in px, PCK within
                    0.2 of the annotated box's longer side (<), area of 20 thresholds below 30 px
    hanco           HaMuCo's (zxz267/HaMuCo @6885b7a): scaled by one bone about the middle MCP, and Procrustes
                    with a proper rotation; every picture of every camera counts once
    ti_net          TI-Net's (Mine268/TI-Net, test_DexYCB.py @7c7f2779): truth and prediction both
                    posed with the TRUE betas, MANO joints, every frame, unlabelled ones included
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
import common
from hand.drawing import save_png
from sources.pictures import detect_hands
from common import (
    FINGERS, MANO_TO_OURS, N_JOINTS, ROOT, Flags, Mano, UserError, axis_angle_to_matrix, barrier,
    bits, epe, gather, guarded, invert, load_checkpoint, matrix_to_axis_angle, mpjpe, pa_mpjpe,
    place, rank, say, score, start, stored_config, transform, uniform, view_intrinsics, world)
from hand import hand_mark, user_hand
from hand.drawing import CURVE_COLOURS, draw_mesh, draw_side, draw_skeleton, label, picture, sheet
from sources import batches, data_name, hand_for, joints_of, open_data, read_index
from sources.index import PICTURES, Index, tight_box, unmirror
from sources.interhand import INTERHAND_TO_OURS, mrrpe
from sources.judging import predictions, write_results
from sources.hands import Hands
from sources.protocols import PROTOCOLS, SUBMIT
from sources.pictures import read_image
import hamuco
import handmim
import peclr
import ti_net

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

METHODS = {"ti_net": ti_net, "handmim": handmim, "peclr": peclr, "hamuco": hamuco}     # all a file may name


# ---- Checkpoints ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Net:
    """A trained network and what its file says about it."""

    path: str
    module: Any                  # the script that made it
    model: nn.Module
    cfg: Any
    row: str
    mean: dict[str, Any]         # of its training set, see `mean_hand`

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent


def load(path: str | Path) -> tuple[nn.Module, Any]:
    """A run folder or a finetune.pt -> (model, its Config). The model has USES and predict(batch).

    Raises UserError where there is no such file, or it is not one of ours.
    """
    net = load_net(path)
    return net.model, net.cfg


def load_net(path: str | Path, mano: str = "") -> Net:
    """As `load`, with what else the file holds; `mano` replaces the hand file that it names."""
    file = Path(path) / "finetune.pt" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(file)
    if not isinstance(content, dict) or not {
            "method", "cfg", "model", "mean", "row"} <= set(content):
        raise UserError(f"{file}: holds no fine-tuned model; give a finetune.pt that a script here wrote")
    if content["method"] not in METHODS:
        raise UserError(f"{file}: names the method {str(content['method'])[:40]!r}; known are "
                        f"{', '.join(METHODS)}")
    module = METHODS[content["method"]]
    try:
        cfg = stored_config(module.Config, content["cfg"])
        cfg = dataclasses.replace(cfg, mano=mano or cfg.mano)
        model = module.build(cfg)
        model.load_state_dict(content["model"])
        other = content.get("hand", hand_mark(cfg.mano)) != hand_mark(cfg.mano)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file}: does not fit this version's {content['method']} "
                        f"({str(error).strip().splitlines()[-1][:120]})") from None
    if other and hasattr(model, "mano"):
        raise UserError(f"{file}: its mesh is another hand's than {user_hand(cfg.mano)[1]}; name the MANO file it was "
                        "trained with (--mano), or `--mano builtin`")
    row = content["row"] + "-frozen" * getattr(cfg, "freeze", False)              # PeCLR's frozen encoder (Tab. 1)
    return Net(str(path), module, model, cfg, row, content["mean"])


# ---- Predictions ----------------------------------------------------------------------------------


def outputs(pred: dict, row: str) -> dict[str, dict[str, Tensor]]:
    """What `predict` returned as rows of pictures: {row: {joints (N, 21, 3), ...}}.

    A network with several named outputs has a row for each, NAME or NAME-VARIANT; a view axis joins the first.
    """
    if "joints" not in pred:
        variant = "-" * ("-" in row) + row.partition("-")[2]
        return {name + variant: hand for key, one in pred.items() for name, hand in outputs(one, key).items()}
    views = pred["joints"].dim() == 4
    return {row: {key: x.flatten(0, 1) if views else x for key, x in pred.items()}}


def redefined(pred: dict, trained: str, tested: str, hand: Mano) -> dict:
    """A prediction with a mesh, its joints as the data set it is tested on means them.

    Data sets differ by centimetres at a tip; without a mesh nothing can be done. `hand` has the test set's joints.
    """
    if joints_of(trained) == joints_of(tested) or not {"verts", "pose", "shape"} <= set(pred):
        return pred
    verts, joints = hand(pred["pose"].float().cpu(), pred["shape"].float().cpu())      # `hand` stays on the CPU
    joints = joints.to(pred["verts"]) + (pred["verts"] - verts.to(pred["verts"])).mean(1, keepdim=True)
    moved = {"root": pred["root"] + joints[:, 0] - pred["joints"][:, 0]} if "root" in pred else {}
    return pred | moved | {"joints": joints}


def as_pictures(batch: dict) -> dict:
    """Moments (B, V, ...) as B x V pictures, without truth where a view is missing; others as they are."""
    if "view_ok" not in batch:
        return batch
    B, V = batch["view_ok"].shape
    out = {key: x.flatten(0, 1) for key, x in batch.items() if isinstance(x, Tensor) and x.shape[:2] == (B, V)}
    ok = out["view_ok"]
    for key in {"joints", "verts", "uv", "pose", "shape"} & set(out):
        out[key] = out[key].masked_fill(~ok.view(-1, *[1] * (out[key].dim() - 1)), math.nan)
    index = batch["index"][:, None] * V + torch.arange(V, device=ok.device)
    return out | {"joints_ok": out["joints_ok"] & ok[:, None], "index": index.flatten(),
                  "side": [side for side in batch["side"] for _ in range(V)]}


def blind(mean: dict[str, Any], batch: dict, hand: Mano) -> tuple[dict, dict]:
    """What the mean of a training set would answer: its mean joints, and the hand in its mean pose.

    The mean of joints under free rotation is a ball, which no alignment can judge: aligned scores are
    those of the second.
    """
    many = lambda x: x.to(batch["joints"]).expand(len(batch["joints"]), *x.shape)
    R = axis_angle_to_matrix(mean["pose"].unflatten(-1, (16, 3)))
    verts, joints = (x[0] for x in hand(R[None], mean["shape"][None]))
    side = batch["image"].shape[-1] if "image" in batch else 1
    posed = {"joints": many(joints), "verts": many(verts), "pose": many(R)}
    return {"joints": many(mean["joints"]), "uv": side * many(mean["uv"]), "pose": many(R)}, posed


def facts(pred: dict, batch: dict, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Prediction and truth of some pictures side by side, as the protocols read them.

    joints, true, camera (N, 21, 3) m, ok, visible (N, 21); uv, uv_true (N, 21, 2) px of the whole picture;
    R, R_true (N, 16, 3, 3), shape_true (N, 10); verts, verts_true (N, 778, 3) where there is a mesh; left (N,);
    and the data set's own columns. `camera` and `verts` stand where the network puts the hand in the
    camera's frame; with their wrist on the true one, or where 2D sees them, if it does not say.
    """
    R_true = axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)))
    joints, back = pred["joints"], invert(batch["crop"].double())
    known = torch.as_tensor(columns["root"]).to(joints) if "root" in columns else batch["joints"][:, ROOT]
    root = pred.get("root", known)
    lost = ~root.isfinite().all(-1)
    if lost.any() and "uv" in pred and "image" in batch:
        seen = joints[:, ROOT] + place(joints, pred["uv"], view_intrinsics(batch))
        root = torch.where(lost[:, None], seen, root)
    moved = (root - joints[:, ROOT])[:, None]
    nowhere = torch.full_like(batch["uv"], math.nan)
    found = {"joints": joints, "true": batch["joints"], "ok": batch["joints_ok"], "camera": joints + moved,
             "visible": batch["visible"], "uv": transform(back, pred.get("uv", nowhere).double()),
             "uv_true": transform(back, batch["uv"].double()), "columns": columns,
             "left": torch.tensor([side == "left" for side in batch["side"]], device=joints.device),
             "R": pred.get("pose", torch.full_like(R_true, math.nan)), "R_true": R_true,
             "shape_true": batch["shape"]}
    if "verts" in pred:
        found |= {"verts": pred["verts"] + moved, "verts_true": batch["verts"]}
    if "root" in pred:
        found["root_error"] = pred["root"] - batch["joints"][:, ROOT]
    return found


# ---- Tallies ----------------------------------------------------------------------------------------

BLOCKS, DRAWS = 4096, 1000                    # groups of samples; bootstrap replicates
FINE_MM, FINE_BINS = 0.02, 100_000            # of the histogram behind medians: to 2 m
LIMITS = torch.arange(51, dtype=torch.float64)                                # mm or px of the PCK curves


class Tally:
    """Sums of a protocol's values by block of samples: memory does not grow with their number.

    Up to BLOCKS samples each is its own block, beyond they are spread over blocks by a hash. Bootstrap draws
    blocks, which for one sample a block is the ordinary bootstrap; every tally of n samples draws alike,
    so differences between two are paired.
    """

    def __init__(self, n: int):
        self.n, self.blocks = n, max(1, min(n, BLOCKS))
        self.sums: dict[str, Tensor] = {}

    def add(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Values of the samples `index` (B,), see Protocols; those that end in _median become histograms."""
        index = index.cpu()
        block = index if self.n <= BLOCKS else bits(index, 1, 0, "block")[:, 0].remainder(self.blocks)
        for name, x in values.items():
            x = x.detach().double().cpu()
            if name.endswith("_median"):
                bins = (x[~x.isnan()] / FINE_MM).long().clamp(0, FINE_BINS - 1)
                total = self.sums.setdefault(name, torch.zeros(FINE_BINS, dtype=torch.float64))
                total.index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
                continue
            pooled, x = x.dim() == 3, x.reshape(len(x), math.prod(x.shape[1:]))
            both = torch.stack([x.nan_to_num(0.0), (~x.isnan()).double()], -1)                # (B, P, 2)
            both = both.sum(1, keepdim=True) if pooled else both
            total = self.sums.setdefault(name, torch.zeros(self.blocks, *both.shape[1:], dtype=torch.float64))
            total.index_add_(0, block, both)

    def gather(self) -> None:
        """The sums of all processes, in each."""
        if world() > 1:
            everyone: list[Any] = [None] * world()
            torch.distributed.all_gather_object(everyone, self.sums)
            self.sums = {name: sum(one[name] for one in everyone if name in one)
                         for name in dict.fromkeys(name for one in everyone for name in one)}

    def points(self, name: str) -> Tensor:
        """The mean over samples of each point, (P,)."""
        total = self.sums[name].sum(0)
        return torch.where(total[:, 1] > 0, total[:, 0] / total[:, 1], math.nan)

    def means(self) -> dict[str, float]:
        """{metric: mean or median}; what no sample has is not in it."""
        out = {}
        for name, total in self.sums.items():
            if name.endswith("_median"):
                middle = int(torch.searchsorted(total.cumsum(0), total.sum() / 2))
                out[name] = FINE_MM * (middle + 0.5) if total.any() else math.nan
            else:
                out[name] = float(self.points(name).nanmean())
        return {name: value for name, value in out.items() if not math.isnan(value)}

    def draws(self, name: str) -> Tensor:
        """Bootstrap replicates of a metric's mean, (DRAWS,)."""
        total = torch.einsum("rb,bpk->rpk", bootstrap_weights(self.blocks), self.sums[name])
        return torch.where(total[..., 1] > 0, total[..., 0] / total[..., 1], math.nan).nanmean(1)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % percentile intervals of the means over samples."""
        return {name: interval(self.draws(name)) for name in self.means() if not name.endswith("_median")}


@functools.cache
def bootstrap_weights(blocks: int) -> Tensor:
    """How often each replicate draws each block, (DRAWS, blocks); the same in every call."""
    u = uniform(torch.arange(DRAWS), blocks, 0, "bootstrap").double()
    drawn = (u * blocks).long().clamp(max=blocks - 1)
    return torch.zeros(DRAWS, blocks, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(DRAWS, blocks, dtype=torch.float64))


def interval(draws: Tensor) -> tuple[float, float]:
    """The middle 95 % of replicates."""
    low, high = torch.nanquantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


# ---- What a prediction looks like -----------------------------------------------------------------

FINGER = [list(range(4 * k + 1, 4 * k + 5)) for k in range(5)]
ORDERS = {                                    # where our joints stand in an order that others use
    "": tuple(range(N_JOINTS)),
    "MANO's joint order (index, middle, pinky, ring, thumb, then the tips)": MANO_TO_OURS,
    "MANO's joint order with the tips in MANO's order": (
        0, 13, 14, 15, 20, 1, 2, 3, 16, 4, 5, 6, 17, 10, 11, 12, 19, 7, 8, 9, 18),
    "InterHand2.6M's joint order (tips first, the wrist last)": INTERHAND_TO_OURS,
    "joints from tip to base in each finger": (0, *itertools.chain(*(finger[::-1] for finger in FINGER))),
    "joints from pinky to thumb": (0, *itertools.chain(*FINGER[::-1])),
    "joints level by level (all bases, ..., all tips)": peclr.RELEASED}
UNITS = {1000.0: "millimetres where metres are expected", 0.001: "metres divided by 1,000 once too often",
         100.0: "centimetres where metres are expected"}
AXES = {(-1, 2, 3): "a mirrored hand (x has the wrong sign)", (1, -2, 3): "y pointing up",
        (1, -2, -3): "OpenGL axes (y up, z towards the viewer)", (1, 2, -3): "depth with the wrong sign",
        (-1, -2, -3): "all axes with the wrong sign",
        (-1, -2, 3): "a hand turned by 180 degrees in the picture"}


def looks_like(pred: dict, truth: dict) -> str:
    """A sentence where undoing a common mistake makes a prediction fit far better, else "".

    `pred` and `truth` as in `score`. Tried are units, the 48 ways of naming the axes and six joint orders.
    It must explain the samples: end below 0.9 x the error of the best constant hand and 0.75 x its own.
    So a constant or untrained answer is accused of nothing; nor is one of fewer than 8 samples.
    """
    p, t = (x["joints"].detach().double().cpu() for x in (pred, truth))
    ok = truth["joints_ok"].cpu() & t.isfinite().all(-1)
    rows = ok[:, ROOT] & p.isfinite().flatten(1).all(1) & (ok.sum(1) > N_JOINTS // 2)
    p, t, ok = (x[rows][:512] for x in (p, t, ok))
    if len(p) < 8:
        return ""
    t = torch.where(ok[..., None], t - t[:, :1], math.nan)
    typical = lambda x: float((x - t).norm(dim=-1).nanmean(-1).median())
    plain, constant = typical(p - p[:, :1]), typical(t.nanmean(0)) * len(p) / (len(p) - 1)
    size = lambda x: torch.where(ok[..., None], x - x.mean(1, keepdim=True), 0).norm(dim=(1, 2)).median()
    ratio = float(size(p) / size(t.nan_to_num(0)))
    unit = next((u for u in UNITS if 0.5 < ratio / u < 2), 1.0)
    found = []
    for order, where in ORDERS.items():
        q = (p[:, list(where)] - p[:, where[0], None]) / unit
        signs = itertools.product((1, -1), repeat=3)
        for axes, sign in itertools.product(itertools.permutations((1, 2, 3)), signs):
            named = tuple(a * s for a, s in zip(axes, sign))
            turned = q[..., [a - 1 for a in axes]] * torch.tensor(sign, dtype=q.dtype)
            wrong = [UNITS.get(unit, ""), AXES.get(named, f"axes named otherwise ({written(named)})"), order]
            wrong[1] = "" if named == (1, 2, 3) else wrong[1]
            wrong = [one for one in wrong if one]
            found.append((typical(turned) * 1.02 ** len(wrong), wrong))          # the simpler, if alike
    error, wrong = min(found)
    if not wrong or error > 0.9 * constant or error > 0.75 * plain:
        return ""
    return (f"looks like {' and '.join(wrong)}: undone, the median MPJPE falls from {1000 * plain:,.1f} to "
            f"{1000 * error:,.1f} mm")


def written(axes: tuple[int, ...]) -> str:
    """(2, -1, 3) -> "y, -x, z"."""
    return ", ".join("-" * (a < 0) + "xyz"[abs(a) - 1] for a in axes)


# ---- Judging --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One line of a table: a predictor's tallies by protocol, and what stands beside them."""

    tallies: dict[str, Tally]
    plots: Tally                                 # pck, pck_aligned, joints, visible, hidden: values by point
    net: Net | None = None                       # None: the mean pose
    output: str = ""                             # which output of the network, by its row name
    errors: Tensor | None = None                 # (N,) mm, or px where nothing is known in 3D, of every picture
    parts: list[dict] = dataclasses.field(default_factory=list)               # some samples, for `looks_like`
    about: dict[str, Any] = dataclasses.field(default_factory=dict)           # parameters, images a second
    rooted: bool = False                         # whether the network says where the wrist is

    def count(self, what: str) -> int:
        """Of the pictures: scored, absent (no such view), not made."""
        return int(self.plots.sums[what][..., 0].sum()) if what in self.plots.sums else 0

    def means(self) -> dict[str, dict[str, float]]:
        """{protocol: {metric: mean}}."""
        return {name: one.means() for name, one in self.tallies.items()}


def open_for(net: Net, spec: str, split: str, flags: Flags, device: torch.device, unlabelled: bool) -> Any:
    """The data set in a network's own square and margin; a method of several views opens its own rig."""
    if hasattr(net.module, "open_rig"):
        shared = {f.name: getattr(flags, f.name) for f in dataclasses.fields(Flags) if f.name in (
            "root", "mano", "cache", "workers", "backgrounds")}
        cfg = dataclasses.replace(net.cfg, data=(spec,), quick=False, **shared)
        return net.module.open_rig(cfg, split, device)
    return open_data(flags, (spec,), split, net.module.stored_side(net.cfg), net.module.MARGIN, device,
                     unlabelled=unlabelled)


def columns_of(data: Any, index: Tensor) -> dict[str, np.ndarray]:
    """The data set's own columns at some samples; nothing where samples are not its rows."""
    return data.columns(index)


def values_of(pred: dict, batch: dict, columns: dict, protocols: dict[str, Callable], hand: Mano
              ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """({protocol: {metric: values}}, facts) of some pictures; `ours` always, and `plots`."""
    f = facts(pred, batch, columns)
    out = {"ours": score(pred, batch)} | {name: scores(f, hand) for name, scores in protocols.items()}
    flat = not f["ok"].any() and f["uv"].isfinite().any()
    known = f["ok"] if not flat else f["uv_true"].isfinite().all(-1)
    error = epe(f["uv"], f["uv_true"], known) if flat else 1000 * mpjpe(f["joints"], f["true"], known)
    aligned = error if flat else 1000 * pa_mpjpe(f["joints"], f["true"], known)
    within = lambda x: torch.where(x.isnan()[..., None], x[..., None], (x[..., None] <= LIMITS.to(x)).to(x)).nanmean(1)
    out["plots"] = {"pck": within(error), "pck_aligned": within(aligned), "joints": error,
                    "visible": error.masked_fill(~f["visible"], math.nan)[..., None],
                    "hidden": error.masked_fill(f["visible"], math.nan)[..., None]}
    return out, f


def assess(net: Net, data: Any, protocols: dict[str, Callable], flags: Flags, device: torch.device,
           hand: Mano, mean: bool, submit: bool, tested: str) -> tuple[dict[str, Row], dict[str, Tensor]]:
    """One pass over a data set: every row of a network, with `mean` also the mean pose's; and what is kept.

    Kept are camera joints (and vertices) to submit, and root errors where two hands make a pair.
    """
    rows, kept, errors, n = {}, {}, {}, len(data)
    trained = data_name(net.cfg.finetune or net.cfg.data[0])
    stride = max(1, n // 512)
    for moments, answer in predictions(net.model.to(device), data, flags, device):
        batch = as_pictures(moments)
        V = len(batch["joints"]) // len(moments["index"])
        columns = columns_of(data, moments["index"]) if V == 1 else {}
        moment = batch["index"] // V                       # views of one moment are no samples of their own
        for name, pred in outputs(answer, net.row).items():
            row, pred = rows.setdefault(name, new_row(n, protocols, net, name)), redefined(pred, trained, tested, hand)
            truth = batch if name == net.row else only_made(pred, batch, row, moment)
            values, f = values_of(pred, truth, columns, protocols, hand)
            row.rooted = "root" in pred
            tally(row, moment, values)
            some = batch["index"] % stride == 0
            row.parts.append({key: x[some].cpu() for key, x in (
                ("pred", pred["joints"]), ("true", truth["joints"]), ("ok", truth["joints_ok"]))})
            one = values["ours"].get("mpjpe_mm", values["ours"].get("epe_2d_px"))
            one = torch.where(one.isnan(), values["ours"].get("epe_2d_px", one), one)
            errors.setdefault(name, []).append({"error": one.float().unflatten(0, (-1, V)).cpu()})
        if mean:
            row = rows.setdefault("mean_pose", new_row(n, protocols, None, ""))
            raw, posed = (values_of(guess, batch, columns, protocols, hand)[0]
                          for guess in blind(net.mean, batch, hand))
            tally(row, moment, {p: posed[p] | {k: x for k, x in raw[p].items() if not k.startswith(
                ("pa_", "f_", "pck_aligned"))} for p in raw})
        keep(kept, f, submit, "interhand" in protocols)
    for name, row in rows.items():
        for one in (*row.tallies.values(), row.plots):
            one.gather()
        if row.net:
            row.errors = gather(errors[name], n)["error"].flatten()
    everything = gather(kept["parts"], n) if kept else {}
    if "root_error" in everything:
        at, error = mrrpe(everything["root_error"], everything["left"], data.columns(torch.arange(n))["image_id"])
        rows[net.row].tallies["interhand"].add(at, {"mrrpe_mm": 1000 * error})
    return rows, everything


def new_row(n: int, protocols: dict[str, Callable], net: Net | None, output: str) -> Row:
    """An empty row of n samples."""
    return Row({name: Tally(n) for name in ("ours", *protocols)}, Tally(n), net, output)


def tally(row: Row, index: Tensor, values: dict[str, dict[str, Tensor]]) -> None:
    """Add values of some pictures, by protocol, to a row."""
    for name, x in values.items():
        (row.plots if name == "plots" else row.tallies[name]).add(index, x)
        has = [~one.reshape(len(one), -1).isnan().all(1) for one in x.values()]
        if name != "plots" and has:
            row.plots.add(index, {f"scored {name}": torch.stack(has).any(0).double()})


def only_made(pred: dict, batch: dict, row: Row, moment: Tensor) -> dict:
    """The truth without pictures for which one of several outputs made no hand (too few views): not scored."""
    lost = ~pred["joints"].isfinite().flatten(1).all(1)
    there = batch.get("view_ok", torch.ones_like(lost))
    row.plots.add(moment, {"absent": (~there).double(), "not made": (lost & there).double()})
    hide = lambda x: x.masked_fill(lost.view(-1, *[1] * (x.dim() - 1)), math.nan)
    return batch | {key: hide(batch[key]) for key in {"joints", "verts", "uv"} & set(batch)} | {
        "joints_ok": batch["joints_ok"] & ~lost[:, None]}


def keep(kept: dict, f: dict[str, Any], submit: bool, pairs: bool) -> None:
    """Collect what needs all samples at once: a submission, in its data set's frame, and pairs of hands."""
    part: dict[str, Tensor] = {}
    if submit:
        side = ["left" if left else "right" for left in f["left"].tolist()]
        part = unmirror({"joints": f["camera"]} | ({"verts": f["verts"]} if "verts" in f else {}), side)
    if pairs and "root_error" in f:
        part |= {"root_error": f["root_error"], "left": f["left"]}
    if part:
        kept.setdefault("parts", []).append({key: x.cpu() for key, x in part.items()})


def images_a_second(net: Net, data: Any, device: torch.device, count: int) -> float:
    """Pictures predicted in a second in batches of `count` samples, median of three; reading not counted."""
    batch = next(batches(data, [torch.arange(count) % len(data)], device, 0))
    seen, taken = {key: batch[key] for key in net.model.USES if key in batch}, []
    for _ in range(4):
        began = time.perf_counter()
        with torch.no_grad():
            net.model.eval().predict(seen)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return math.prod(batch["image"].shape[:-3]) / sorted(taken[1:])[1]


# ---- Tables ---------------------------------------------------------------------------------------

PLAIN = {"seed", "out", "init", "resume", "workers", "device", "cache", "save_minutes", "root", "compile"}
MAIN = ("mpjpe_mm", "pa_mpjpe_mm", "abs_mpjpe_mm", "n_mpjpe_mm", "auc", "mpvpe_mm", "pa_mpvpe_mm", "f_5", "f_15",
        "epe_2d_px", "pck_2d_20", "auc_2d")                                    # of `ours`; the rest goes to files


def digits(metric: str, value: float) -> str:
    """A number as tables show it: shares with three digits, mm and px with two."""
    share = "auc" in metric or metric.startswith(("f_", "pck"))
    return f"{value:.{3 if share else 2}f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    width = [max(map(len, column)) for column in zip(head, *lines)]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    text = [[line[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(line[1:], width[1:]))]
            for line in (head, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (text[0], rule, *text[1:]))


def px_compare(rows: dict[str, Row], spec: str) -> bool:
    """Whether px mean the same in all rows: synthetic pictures are as large as each network stores them."""
    nets = [row.net for row in rows.values() if row.net]
    sizes = {(net.module.stored_side(net.cfg), net.module.MARGIN) for net in nets}
    return data_name(spec) != "synthetic" or len(sizes) == 1


def shown_metrics(rows: dict[str, Row], protocol: str, spec: str) -> list[str]:
    """The metrics that a table has columns for."""
    some = dict.fromkeys(itertools.chain(*(row.tallies[protocol].means() for row in rows.values())))
    shown = [m for m in (MAIN if protocol == "ours" else some) if m in some]
    return [m for m in shown if px_compare(rows, spec) or m not in ("epe_2d_px", "auc_2d")]


def score_table(rows: dict[str, Row], protocol: str, spec: str) -> str:
    """Means with their 95 % intervals, a line a row."""
    means = {name: row.tallies[protocol].means() for name, row in rows.items()}
    lines, shown = [], shown_metrics(rows, protocol, spec)
    for name, row in rows.items():
        spans = {m: interval(row.tallies[protocol].draws(m)) for m in shown if m in means[name]
                 and not m.endswith("_median")}
        cell = lambda m: digits(m, means[name][m]) + (
            f" [{digits(m, spans[m][0])}, {digits(m, spans[m][1])}]" if m in spans else "")
        lines.append([name, *(cell(m) if m in means[name] else "-" for m in shown)])
    return markdown(["row", *shown], lines)


def differences(rows: dict[str, Row], protocol: str, base: str, spec: str) -> str:
    """Each row less `base` on the same samples, with 95 % intervals: "" where there is nothing to compare.

    A row that scored other samples has no difference, nor has an absolute error where one of the two was
    given the true wrist.
    """
    others = {name: row for name, row in rows.items() if name != base and row.net}
    theirs = rows[base].tallies[protocol]
    shown = [m for m in shown_metrics(rows, protocol, spec) if m in theirs.means() and not m.endswith("_median")][:6]
    lines = []
    for name, row in others.items():
        mine, cells = row.tallies[protocol], []
        for m in shown:
            if m not in mine.means() or (m.startswith("abs_") and row.rooted != rows[base].rooted):
                cells.append("-")
                continue
            counts = mine.sums[m][..., 1].sum(1), theirs.sums[m][..., 1].sum(1)
            if mine.n != theirs.n or not torch.equal(*counts):                # not the same samples: not paired
                cells.append("other samples")
                continue
            low, high = interval(mine.draws(m) - theirs.draws(m))
            apart = digits(m, mine.means()[m] - theirs.means()[m])
            cells.append(f"{apart} [{digits(m, low)}, {digits(m, high)}]" + "*" * (low > 0 or high < 0))
        lines.append([f"{name} - {base}", *cells])
    text = markdown(["paired difference", *shown], lines) + "\n\\* its interval does not hold 0"
    return text if lines else ""


def seed_groups(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Rows whose runs differ in nothing but the seed: {what to call them: names}, two or more each."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.net:
            recipe = {k: v for k, v in dataclasses.asdict(row.net.cfg).items() if k not in PLAIN}
            groups.setdefault(f"{row.output}|{json.dumps(recipe, default=str)}", []).append(name)
    return {f"{key.partition('|')[0]}, {len(names)} seeds": names for key, names in groups.items()
            if len({rows[name].net.cfg.seed for name in names}) > 1}


def seed_table(rows: dict[str, Row], protocol: str, spec: str) -> str:
    """Mean and standard deviation over seeds; "" where every row has one."""
    lines, shown = [], shown_metrics(rows, protocol, spec)
    for called, names in seed_groups(rows).items():
        every = [rows[name].tallies[protocol].means() for name in names]
        values = {m: np.array([one.get(m, math.nan) for one in every]) for m in shown}
        cells = [f"{digits(m, x.mean())} ± {digits(m, x.std(ddof=1))}" if np.isfinite(x).all() else "-"
                 for m, x in values.items()]
        lines.append([called, *cells])
    return markdown(["mean ± std over seeds", *shown], lines) if lines else ""


def about_table(rows: dict[str, Row]) -> str:
    """What each row's network is and costs."""
    lines = [[name, *(str(row.about.get(key, "-")) for key in ABOUT)] for name, row in rows.items() if row.net]
    return markdown(["row", *ABOUT], lines)


ABOUT = ("parameters", "images/s, batch 1", "images/s, batch 64", "labels", "seed", "keys given")


def write_tables(out: Path, rows: dict[str, Row], texts: list[str]) -> None:
    """table.md with what was printed, and table.csv: a line a protocol, row and metric."""
    (out / "table.md").write_text("\n\n".join(texts) + "\n")
    with open(out / "table.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["protocol", "row", "run", "seed", "metric", "value", "low_95", "high_95", "n"])
        for name, row in rows.items():
            for protocol, one in row.tallies.items():
                spans = one.intervals()
                for metric, value in one.means().items():
                    low, high = spans.get(metric, ("", ""))
                    lines.writerow([protocol, name, row.net.path if row.net else "", row.net.cfg.seed if row.net
                                    else "", metric, value, low, high, row.count(f"scored {protocol}")])


# ---- Plots and sheets -----------------------------------------------------------------------------


def figure_of(width: float = 6.5, height: float = 3.8) -> tuple[Any, Any, Any]:
    """pyplot, a figure and its axis, without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height), dpi=140)
    axis.set_prop_cycle(color=CURVE_COLOURS)
    axis.grid(alpha=0.3)
    return pyplot, figure, axis


def finish(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_pck(path: Path, rows: dict[str, Row], unit: str) -> None:
    """Share of joints within 0-50 mm (px), wrist-rooted and, dashed, aligned; bands are 95 % intervals."""
    pyplot, figure, axis = figure_of()
    for k, (name, row) in enumerate(rows.items()):
        colour, total = CURVE_COLOURS[k % len(CURVE_COLOURS)], row.plots.sums["pck"]
        axis.plot(LIMITS, row.plots.points("pck"), color=colour, label=name)
        if unit == "mm":
            axis.plot(LIMITS, row.plots.points("pck_aligned"), "--", color=colour, lw=1)
        drawn = torch.einsum("rb,bpk->rpk", bootstrap_weights(row.plots.blocks), total)
        spans = torch.quantile(drawn[..., 0] / drawn[..., 1], torch.tensor([0.025, 0.975]).double(), dim=0)
        axis.fill_between(LIMITS, *spans, color=colour, alpha=0.2, lw=0)
    n = max(row.count("scored ours") for row in rows.values())
    axis.set(xlabel=f"error, {unit}", ylabel="share of joints", xlim=(0, 50), ylim=(0, 1),
             title=f"PCK of {n:,} samples" + "; dashed: aligned" * (unit == "mm"))
    axis.legend(fontsize=8)
    finish(pyplot, figure, path)


def plot_joints(path: Path, rows: dict[str, Row], unit: str) -> None:
    """Mean error of each joint."""
    pyplot, figure, axis = figure_of(7.5)
    names = ["wrist", *(f"{finger} {k}" for finger in FINGERS for k in range(1, 5))]
    for k, (name, row) in enumerate(rows.items()):
        shift = (k - (len(rows) - 1) / 2) * 0.8 / len(rows)
        axis.bar(np.arange(N_JOINTS) + shift, row.plots.points("joints").numpy(), 0.8 / len(rows), label=name,
                 color=CURVE_COLOURS[k % len(CURVE_COLOURS)])
    axis.set_xticks(range(N_JOINTS), names, rotation=60, ha="right", fontsize=8)
    axis.set(ylabel=f"error, {unit}", title="error by joint, base to tip" + ", wrist-rooted" * (unit == "mm"))
    axis.legend(fontsize=8)
    finish(pyplot, figure, path)


def plot_visibility(path: Path, rows: dict[str, Row], unit: str) -> None:
    """Mean error of joints that are seen, and of those hidden or outside the picture."""
    pyplot, figure, axis = figure_of(5)
    for k, (name, row) in enumerate(rows.items()):
        values = [float(row.plots.points(kind)[0]) for kind in ("visible", "hidden")]
        shift = (k - (len(rows) - 1) / 2) * 0.8 / len(rows)
        bars = axis.bar(np.arange(2) + shift, np.nan_to_num(values), 0.8 / len(rows), label=name,
                        color=CURVE_COLOURS[k % len(CURVE_COLOURS)])
        axis.bar_label(bars, [f"{x:.1f}" if math.isfinite(x) else "none" for x in values], fontsize=8)
    count = lambda kind: int(next(iter(rows.values())).plots.sums[kind][..., 1].sum())
    axis.set_xticks(range(2), [f"visible ({count('visible'):,} joints)", f"hidden ({count('hidden'):,})"])
    axis.margins(y=0.3)
    axis.set(ylabel=f"error, {unit}", title="error by visibility")
    axis.legend(fontsize=8)
    finish(pyplot, figure, path)


def block(pictures: list[Image.Image], text: str, wide: bool, size: int = 150) -> Image.Image:
    """Four pictures in a line, or two above two, with a text in the corner of the first."""
    step, across = size + 2, 4 if wide else 2
    out = Image.new("RGB", (across * step - 2, 4 // across * step - 2), "white")
    for k, image in enumerate(pictures):
        image = picture(image).resize((size, size))
        out.paste(label(image, text, 14) if text and k == 0 else image, (k % across * step, k // across * step))
    return out


@torch.no_grad()
def draw_rows(path: Path, rows: dict[str, Row], data: dict[str, Any], picked: Tensor, names: list[str],
              device: torch.device) -> None:
    """The same samples for the truth and every row: skeleton, mesh or picture, and 3D from two sides.

    The truth is grey beside predictions, the error in mm (px where nothing is known in 3D) in the corner.
    """
    cells, columns, answers = [[] for _ in picked], ["truth"], {}
    wide = sum(row.net is not None for row in rows.values()) == 1
    for name, row in rows.items():
        if not row.net:
            continue
        columns.append(name)
        source = data[row.net.path]
        if len(row.errors) <= int(picked.max()):                   # other samples: nothing to lay beside
            columns.pop()
            continue
        V = len(row.errors) // len(source)
        moments = next(batches(source, [(picked // V)], device, 0))
        if row.net.path not in answers:
            seen = {key: moments[key] for key in row.net.model.USES if key in moments}
            answers[row.net.path] = outputs(row.net.model.eval().predict(seen), row.net.row)
        batch, pred = as_pictures(moments), answers[row.net.path][row.output]
        at = torch.arange(len(picked)) * V + picked % V
        batch, pred = ({k: x[at.to(x.device)] if isinstance(x, Tensor) and len(x) == V * len(picked) else x
                        for k, x in d.items()} for d in (batch, pred))
        if columns == ["truth", name]:
            for i, line in enumerate(cells):
                line.append(truth_block(batch, i, wide))
        for i, line in enumerate(cells):
            line.append(answer_block(batch, pred, row, int(picked[i]), i, wide))
    sheet(path, cells, columns, names, 1000 if wide else min(1500, 30 + 306 * len(columns)))


def sides(joints: Tensor, true: Tensor | None = None) -> list[Image.Image]:
    """A hand from 60 degrees to the right and to the left."""
    if true is not None and not true.isfinite().all(-1).any():
        true = None
    if not joints.isfinite().all(-1).any():
        return [Image.new("RGB", (150, 150), "white")] * 2
    shown = joints if true is None else true                          # draw_side centres on it
    middle = (shown - shown[0]).nan_to_num(0).aminmax(dim=0)
    middle = (middle.min + middle.max) / 2
    far = [(x - x[0] - middle).norm(dim=-1).nan_to_num(0).max() for x in (shown, joints)]
    return [draw_side(joints, 150, true, turn, 1.05 * float(max(far))) for turn in (60.0, -60.0)]


def truth_block(batch: dict, i: int, wide: bool) -> Image.Image:
    """The true skeleton, the picture as it is, and the truth from two sides."""
    image = batch["image"][i]
    joints = batch["joints"][i].masked_fill(~batch["joints_ok"][i][:, None], math.nan)
    drawn = draw_skeleton(image, batch["uv"][i], visible=batch["visible"][i], width=150)
    return block([drawn, image, *sides(joints)], "", wide)


def answer_block(batch: dict, pred: dict, row: Row, sample: int, i: int, wide: bool) -> Image.Image:
    """A prediction over the network's own picture, its mesh, if any, and two sides with the truth in grey."""
    image = batch["image"][i]
    top = [draw_skeleton(image, pred["uv"][i], width=150)]
    if "verts" in pred and pred["verts"][i].isfinite().all():
        K = view_intrinsics(batch)
        place_at = place(pred["joints"][i:i + 1], pred["uv"][i:i + 1], K[i:i + 1])
        faces = Mano(user_hand(row.net.cfg.mano)[0]).faces
        top.append(draw_mesh(image, pred["verts"][i] + place_at, faces, K[i], width=150))
    else:
        top.append(picture(image))
    error = float(row.errors[sample])
    flat = not batch["joints_ok"][i].any()
    text = f"{error:.1f} {'px' if flat else 'mm'}" if math.isfinite(error) else "no truth"
    true = batch["joints"][i].masked_fill(~batch["joints_ok"][i][:, None], math.nan)
    return block([*top, *sides(pred["joints"][i], true)], text, wide)


# ---- One command: judge ---------------------------------------------------------------------------


def named(nets: list[Net], scratch: str) -> list[str]:
    """A name for each network's row: its own, with what tells it apart where two are alike."""
    names = ["scratch" if scratch and net.path == scratch else net.row for net in nets]
    out = []
    for net, name in zip(nets, names):
        alike = [other for other, theirs in zip(nets, names) if theirs == name]
        if scratch and net.path == scratch:
            alike = [net]                                          # the one that others are compared with
        seeds = {other.cfg.seed for other in alike}
        tail = f", seed {net.cfg.seed}" if len(seeds) == len(alike) > 1 else f" ({net.folder.name})"
        out.append(name + tail * (len(alike) > 1))
    return out


def prepared(args: argparse.Namespace) -> list[Net]:
    """The networks to judge; UserError where one cannot do what is asked."""
    nets = [load_net(path, args.mano) for path in dict.fromkeys([*args.run, *filter(None, [args.scratch])])]
    for net in nets:
        if args.two_pass and not hasattr(net.cfg, "two_pass"):
            raise UserError(f"--two-pass: {net.module.__name__} predicts in one pass")
        if args.two_pass:
            net.model.cfg = dataclasses.replace(net.cfg, two_pass=True)
            net.row += "-two_pass"
    return nets


def judge(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """Everything that is known of some checkpoints on one data set: tables, metrics.json, plots, sheets."""
    nets = prepared(args)
    head = nets[0]
    spec = args.data or head.cfg.finetune or head.cfg.data[0]
    name = data_name(spec)
    split = args.split or ("val" if name in ("coco", "imagenet") else "test")
    flags = dataclasses.replace(flags, mano=head.cfg.mano)
    if not args.data:
        flags = dataclasses.replace(flags, root=args.root or head.cfg.root, backgrounds=head.cfg.backgrounds)
    if args.submit and (name not in SUBMIT or split != "test" or len(nets) > 1):
        raise UserError(f"--submit: no server takes {name} {split}; it can be the test split of "
                        f"{', '.join(SUBMIT)}, for one run")
    known = {"ours", *PROTOCOLS.get(name, {})}
    if unknown := set(args.protocol) - known:
        raise UserError(f"--protocol {' '.join(sorted(unknown))}: {name} is judged by {', '.join(sorted(known))}")
    wanted = {p: f for p, f in PROTOCOLS.get(name, {}).items() if not args.protocol or p in args.protocol}
    called = spec.partition("=")[0].replace(":", "-") + f"-{split}" * (split != "test") + "-two_pass" * args.two_pass
    out = folder_for(args, head, called)
    hand, opened, data, rows = hand_for(spec, flags.mano), {}, {}, {}
    for net, called in zip(nets, named(nets, args.scratch)):
        key = (net.module.stored_side(net.cfg), net.module.MARGIN, hasattr(net.module, "open_rig") and net.path)
        if key not in opened:
            opened[key] = open_for(net, spec, split, flags, device, "ti_net" in wanted)
        data[net.path] = opened[key]
        if not len(opened[key]):
            raise UserError(f"{spec} {split}: holds no sample, so nothing can be scored")
        found, kept = assess(net, opened[key], wanted, flags, device, hand, net is head, args.submit, name)
        tail = called.removeprefix("scratch" if called == "scratch" else net.row)
        beside = about(net, opened[key], device)
        for row_name, row in found.items():
            own = called if row.output == net.row else row_name + tail
            rows[unused(rows, own, net) if row.net else row_name] = row
            row.about = beside
        if args.submit:
            SUBMIT[name](out, opened[key].index, kept)
    rows = {"mean_pose": rows.pop("mean_pose"), **rows}
    if rank() == 0:
        conclude(args, rows, data, spec, split, out, wanted, device)
    barrier()


def unused(rows: dict[str, Row], name: str, net: Net) -> str:
    """A row's name that no other row has: two runs may call their outputs alike."""
    for candidate in (name, f"{name} of {net.row}", f"{name} of {net.path}"):
        if candidate not in rows:
            return candidate
    return next(f"{name} of {net.path} {k}" for k in itertools.count(2) if f"{name} of {net.path} {k}" not in rows)


def folder_for(args: argparse.Namespace, head: Net, called: str) -> Path:
    """--out, or RUN/eval-DATA, or for several runs runs/compare-DATA; UserError where it cannot be written."""
    alone = len(args.run) == 1
    out = Path(args.out or (head.folder / f"eval-{called}" if alone else Path("runs") / f"compare-{called}"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def about(net: Net, data: Any, device: torch.device) -> dict[str, str]:
    """What stands beside a network's scores."""
    size = sum(p.numel() for p in net.model.parameters()) / 1e6
    return {"parameters": f"{size:.1f} M", "labels": f"{net.mean['labels']:,}", "seed": str(net.cfg.seed),
            "keys given": ", ".join(sorted(net.model.USES)),
            **{f"images/s, batch {b}": f"{images_a_second(net, data, device, b):.0f}" for b in (1, 64)}}


def conclude(args: argparse.Namespace, rows: dict[str, Row], data: dict[str, Any], spec: str, split: str,
             out: Path, wanted: dict[str, Callable], device: torch.device) -> None:
    """Print and write what `judge` found."""
    best = next(row for row in rows.values() if row.net)
    box, texts = data[best.net.path].box_source, []
    for name, row in rows.items():
        if row.net:
            n, absent, lost = row.count("scored ours"), row.count("absent"), row.count("not made")
            total = len(row.errors)
            texts.append(f"{name} = {row.net.path} on {spec} {split}: {n:,} samples scored, {total - n - absent:,} "
                         f"without truth" + f" or hand ({lost:,})" * bool(lost) + f"; boxes from {box}; the network "
                         f"sees {', '.join(sorted(row.net.model.USES))}; {row.about['parameters']} parameters; trained "
                         f"on {row.net.mean['labels']:,} labelled hands, seed {row.net.cfg.seed}")
    if all(row.count("scored ours") == 0 for row in rows.values()):
        say("\n".join(texts))
        if not args.submit:
            raise UserError(f"{spec} {split}: no sample has joints or key points to score against")
        draw_rows(out / "samples.png", rows, data, some_of(len(best.errors), 6), [""] * 6, device)
        say(f"wrote {out}/samples.png")
        return
    texts.append(judged(rows, spec, split, out, wanted, args, box))
    say("\n" + "\n\n".join(texts))
    write_tables(out, rows, texts)
    pictures_of(args, rows, data, out, device)
    say(f"\nwrote {', '.join(sorted(str(file) for file in out.glob('*.*')))}")


def judged(rows: dict[str, Row], spec: str, split: str, out: Path, wanted: dict[str, Callable],
           args: argparse.Namespace, box: str) -> str:
    """The tables of all protocols as text; they go to metrics.json too."""
    texts, base = [], "scratch" if "scratch" in rows else next(name for name, row in rows.items() if row.net)
    suspects = {name: found for name, row in rows.items() if row.parts and (found := suspect(row))}
    chosen = [p for p in ("ours", *wanted) if p != "ours" or not args.protocol or "ours" in args.protocol]
    for protocol in chosen:
        if not any(row.net and row.tallies[protocol].means() for row in rows.values()):
            files = "; a pose or regressed joints need the MANO files (--mano)"
            say(f"{protocol}: not run, no sample has what it needs" + files * (protocol in ("ti_net", "yt3d")))
            continue
        parts = [score_table(rows, protocol, spec), differences(rows, protocol, base, spec), seed_table(rows, protocol, spec)]
        counts = {row.count(f"scored {protocol}") for row in rows.values() if row.net} - {0}
        given = [name for name, row in rows.items() if not row.rooted and any(
            m.startswith("abs_") for m in row.tallies[protocol].means())]
        parts.append(f"abs_: {', '.join(given)} do not say where the wrist is and are given the true one" * bool(given))
        texts.append(f"{protocol} ({' / '.join(f'{n:,}' for n in sorted(counts))} samples, 95 % intervals over samples)\n\n"
                     + "\n\n".join(filter(None, parts)))
        if protocol in ("freihand", "ho3d") and not all("f_5_raw" in row.tallies[protocol].sums
                                                        for row in rows.values() if row.net):
            texts.append(f"{protocol}: the mesh's scores are not applicable to a network without a mesh")
        for path in dict.fromkeys(row.net.path for row in rows.values() if row.net):
            mine = {name: row for name, row in rows.items() if not row.net or row.net.path == path}
            row = next(row for row in mine.values() if row.net)
            write_results(out / "metrics.json", spec, {
                "run": path, "split": split, "protocol": protocol, "n": row.count(f"scored {protocol}"),
                "left_out": len(row.errors) - row.count(f"scored {protocol}") - row.count("absent"), "box_source": box,
                "uses": sorted(row.net.model.USES), "rows": {name: one.tallies[protocol].means() for name, one
                                                             in mine.items()},
                "intervals": {name: one.tallies[protocol].intervals() for name, one in mine.items()},
                "looks_like": {name: suspects[name] for name in mine if name in suspects}})
    if not px_compare(rows, spec):
        texts.append("px are left out: synthetic pictures are as large as each network stores them")
    texts.append(about_table(rows))
    texts += [gains(rows)] + [f"{name} {found}" for name, found in suspects.items()]
    return "\n\n".join(filter(None, texts))


def gains(rows: dict[str, Row]) -> str:
    """How much of the mean pose's and of scratch's error each row takes away."""
    means = {name: row.means()["ours"] for name, row in rows.items()}
    said = [] if any(name.startswith("scratch") for name in rows) else ["scratch: not run (--scratch RUN)"]
    for base in ("mean_pose", "scratch"):
        metric = next((m for m in ("mpjpe_mm", "epe_2d_px") if base in means and m in means[base]), "")
        better = [f"{name} {1 - one[metric] / means[base][metric]:.0%}" for name, one in means.items()
                  if metric and metric in one and name not in ("mean_pose", base)]
        said += [f"relative gain in {metric} over {base}: {', '.join(better)}"] * bool(better)
    return "; ".join(said)


def suspect(row: Row) -> str:
    """`looks_like` of the samples that a row kept."""
    whole = {key: torch.cat([part[key] for part in row.parts]) for key in ("pred", "true", "ok")}
    return looks_like({"joints": whole["pred"]}, {"joints": whole["true"], "joints_ok": whole["ok"]})


def some_of(n: int, count: int) -> Tensor:
    """`count` of n numbers, evenly spread."""
    return torch.linspace(0, n - 1, count).long()


def pictures_of(args: argparse.Namespace, rows: dict[str, Row], data: dict[str, Any], out: Path,
                device: torch.device) -> None:
    """Plots of all rows; predictions.png of the last row's best, median and worst; --sheet for all rows."""
    flat = not any("mpjpe_mm" in row.tallies["ours"].means() for row in rows.values())
    unit = "px" if flat else "mm"
    shown = {name: row for name, row in rows.items() if row.plots.points("pck").isfinite().any()}
    plot_pck(out / "pck.png", shown, unit)
    plot_joints(out / "joints.png", shown, unit)
    plot_visibility(out / "visibility.png", shown, unit)
    name, row = [(name, row) for name, row in rows.items() if row.net][-1]
    order = row.errors.argsort()[:int(row.errors.isfinite().sum())]
    middle = max(0, len(order) // 2 - 1)
    picked = torch.cat([order[:2], order[middle:middle + 2], order[-2:]])
    names = [f"{kind} {'2D' if flat else 'MPJPE'}" for kind in ("best", "median", "worst") for _ in range(2)]
    draw_rows(out / "predictions.png", {name: row}, data, picked, names[:len(picked)], device)
    if args.sheet:
        first = next(row for row in rows.values() if row.net)
        order = first.errors.argsort()[:int(first.errors.isfinite().sum())]
        draw_rows(out / "sheet.png", rows, data, order[some_of(len(order), min(5, len(order)))],
                  [f"{k:.0%}" for k in torch.linspace(0, 1, min(5, len(order))).tolist()], device)


# ---- Curves over runs -----------------------------------------------------------------------------


def run_points(path: str, field: str, metric: str) -> list[tuple[str, Any, float]]:
    """(row, value of the field, metric) of a run's rows, from metrics.json and each row's config.json.

    The field `epoch` gives the validation errors that the run logged; `labels` the hands learnt from.
    UserError where the folder holds no run, or nothing that has the field or the metric.
    """
    folder, found = Path(path), []
    configs = {file.parent.name.partition("-")[2]: file for stage in ("train", "probe", "finetune")
               for file in sorted(folder.glob(f"{stage}-*/config.json"))}
    try:
        results = json.loads((folder / "metrics.json").read_text())["results"]
        rows = next((r["rows"] for r in results if r["protocol"] == "ours"), results[0]["rows"])
        for row, file in configs.items():
            if field == "epoch":
                lines = [json.loads(line) for line in (file.parent / "log.jsonl").read_text().splitlines()]
                found += [(row, one["epoch"], one[f"val_{metric}"]) for one in lines
                          if f"val_{metric}" in one and "epoch" in one]
                continue
            cfg = json.loads(file.read_text())["cfg"]
            x = load_net(path).mean["labels"] if field == "labels" else cfg.get(field)
            found += [(name, x, one[metric]) for name, one in rows.items() if metric in one and x is not None
                      and name in (row, "single", "interaction", "fusion")]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder}: is not the folder of a finished run ({type(error).__name__}: {error})"
                        ) from None
    if not found:
        raise UserError(f"{folder}: no row has the field {field!r} in config.json and {metric!r} in "
                        "metrics.json")
    return found


def draw_curve(args: argparse.Namespace) -> None:
    """Error over a field, a line a row: the mean of runs that share row and value, bars from least to most."""
    points: dict[str, dict[Any, list[float]]] = {}
    for path in args.run:
        for row, x, y in run_points(path, args.curve, args.metric):
            points.setdefault(row, {}).setdefault(x, []).append(y)
    out = Path(args.out or f"runs/curve-{args.curve}")
    out.mkdir(parents=True, exist_ok=True)
    values = sorted({x for line in points.values() for x in line}, key=lambda x: (isinstance(x, str), x))
    numbers = not any(isinstance(x, (str, bool, list)) for x in values)
    where = {x: x if numbers else k for k, x in enumerate(values)} if numbers or len(values) else {}
    pyplot, figure, axis = figure_of()
    for name, line in points.items():
        xs = [x for x in values if x in line]
        ys = np.array([np.mean(line[x]) for x in xs])
        reach = np.array([[y - min(line[x]), max(line[x]) - y] for x, y in zip(xs, ys)]).T
        axis.errorbar([where[x] for x in xs], ys, reach, marker="o", ms=4, capsize=3, label=name)
    if not numbers:
        axis.set_xticks(list(where.values()), [str(x) for x in values])
    axis.set(xlabel=args.curve.replace("_", " "), ylabel=args.metric.replace("_", " "))
    axis.legend(fontsize=8)
    finish(pyplot, figure, out / "curve.png")
    lines = [[name, *(f"{np.mean(line[x]):.2f} (n {len(line[x])})" if x in line else "-" for x in values)]
             for name, line in points.items()]
    text = markdown([f"{args.metric} over {args.curve}", *map(str, values)], lines)
    say(text if len(values) <= 20 else f"{len(values)} values of {args.curve}")
    (out / "curve.md").write_text(text + "\n")
    with open(out / "curve.csv", "w", newline="") as file:
        csv.writer(file).writerows([["row", args.curve, args.metric]] + [
            [name, x, y] for name, line in points.items() for x in line for y in line[x]])
    say(f"wrote {out}/curve.png, curve.md, curve.csv")


# ---- Your own pictures ----------------------------------------------------------------------------

SMALLEST, LARGEST = 640, 1280                            # px of an overlay's longer side


def hands_in(args: argparse.Namespace, cache: str) -> Index:
    """The hands of a folder of photos, or of one photo: labels.jsonl's, or those that MediaPipe finds.

    Unreadable photos and photos without a hand are named and counted. UserError where nothing is left.
    """
    given = Path(args.images)
    if not given.exists():
        raise UserError(f"--images {given}: there is no such file or folder")
    root = given if given.is_dir() else given.parent
    if (root / "labels.jsonl").is_file():
        index = read_index("folder", "", str(root), "all", cache=Path(cache) / "index")
        if not given.is_dir():
            index = index.take(np.array([index.path(k) == given.name for k in range(len(index))], bool))
            if not len(index):
                raise UserError(f"--images {given}: {root / 'labels.jsonl'} has no line for it")
    else:
        index = detected(root, [given.name] if not given.is_dir() else sorted(
            p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in PICTURES))
    say(index.summary())
    if not len(index):
        raise UserError(f"--images {given}: holds no picture of a hand ({' '.join(PICTURES)})")
    return index


def detected(root: Path, files: list[str]) -> Index:
    """MediaPipe's hands in photos below `root`, boxes tight around its key points."""
    rows, broken, empty = [], [], []
    for file in tqdm(files, "finding hands", unit="photo"):
        try:
            photo = read_image(root / file)
        except UserError as error:
            say(str(error))
            broken.append(file)
            continue
        found = detect_hands(photo)
        rows += [(file, f"{file}#{k}", hand["side"], hand["uv"]) for k, hand in enumerate(found)]
        empty += [] if found else [file]
    paths, ids, side, uv = zip(*rows) if rows else ((), (), (), np.zeros((0, N_JOINTS, 2)))
    dropped = {"unreadable photos": len(broken), "photos without a hand": len(empty)}
    return Index("images", str(root), {
        "paths": np.array([path.encode() for path in paths], bytes), "id": np.array(ids, str),
        "side": np.array(side, str), "uv_label": np.array(uv, float), "box": tight_box(np.array(uv, float))},
        "detector", {k: v for k, v in dropped.items() if v},
        [f"{what}: {', '.join(names[:20])}" for what, names in (("unreadable", broken), ("no hand in", empty))
         if names])


def with_cameras(index: Index) -> np.ndarray:
    """Give every hand a K, the photo's diagonal as focal length where it has none; what was known, (N,)."""
    K = np.array(index.columns.get("K", np.full((len(index), 3, 3), np.nan)), float)
    known, sizes = np.isfinite(K).all((1, 2)), {}
    for row in np.flatnonzero(~known):
        path = index.path(row)
        if path not in sizes:
            sizes[path] = read_image(Path(index.root, path)).shape[1::-1]
        w, h = sizes[path]
        K[row] = [[math.hypot(w, h), 0, (w - 1) / 2], [0, math.hypot(w, h), (h - 1) / 2], [0, 0, 1]]
    index.columns["K"] = K.astype(np.float32)
    return known


@torch.no_grad()
def own_pictures(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """--images: predict every hand of a folder of photos; overlays, hands.json and with --obj meshes."""
    if len(args.run) != 1:
        raise UserError("--images wants one run")
    net = load_net(args.run[0], args.mano)
    net.model.to(device).eval()
    out = Path(args.out or net.folder / f"images-{Path(args.images).stem}")
    index = hands_in(args, flags.cache)
    known = with_cameras(index)
    data = Hands(index, net.module.stored_side(net.cfg), net.module.MARGIN)
    out.mkdir(parents=True, exist_ok=True)
    faces = Mano(user_hand(net.cfg.mano)[0]).faces
    hands: dict[str, list[dict]] = {}
    plan = list(torch.arange(len(data)).split(64))
    for batch in tqdm(batches(data, plan, device, flags.workers), "predicting", len(plan), unit="batch"):
        batch = common.to_device(batch, torch.device("cpu")) | {}
        seen = {key: common.to_device(batch[key], device) for key in net.model.USES if key in batch}
        every = outputs(net.model.predict(seen), net.row)
        pred = {key: x.float().cpu() for key, x in every[chosen_output(every)].items()}
        if args.obj and "verts" not in pred:
            raise UserError(f"--obj: {net.row} predicts joints only, so there is no mesh to write")
        for row, hand in zip(batch["index"].tolist(), described(batch, pred, index, known)):
            hands.setdefault(index.path(row), []).append(hand)
    for path, found in tqdm(hands.items(), "drawing", unit="photo"):
        draw_photo(out, Path(index.root), path, found, faces)
        for k, hand in enumerate(found):
            if args.obj:
                write_obj(out / f"{flat_name(path)}-{k}.obj", hand, faces)
    public = [{key: x for key, x in hand.items() if key != "verts"} for found in hands.values() for hand in found]
    (out / "hands.json").write_text(json.dumps(public, indent=1, allow_nan=False) + "\n")
    say(f"wrote {out}: {len(public):,} hands in {len(hands):,} photos, hands.json, a picture of each"
        + ", .obj" * args.obj + "; " + ("the scale is metric where K was given" if known.any() else
                                       "no K was given: focal length is the diagonal, 3D is up to scale"))


def chosen_output(every: dict[str, dict]) -> str:
    """Of several outputs the last that is a posed hand, else the last."""
    posed = [name for name, pred in every.items() if "pose" in pred]
    return (posed or list(every))[-1]


def flat_name(path: str) -> str:
    """sub/photo.jpg -> sub__photo.jpg, so that every photo has a file of its own."""
    return path.replace("/", "__")


NO_BOX = np.full((1, 4), np.nan)


def described(batch: dict, pred: dict[str, Tensor], index: Index, known: np.ndarray) -> list[dict]:
    """Predictions as JSON-able hands of the photo they are in: un-mirrored, px of the photo, metres.

    joints and verts are in the camera's frame: where the network puts them, else where 2D sees them.
    """
    K = view_intrinsics(batch)
    back = invert(batch["crop"].double())
    uv = transform(back, pred["uv"].double())
    root = pred["root"] if "root" in pred else pred["joints"][:, ROOT] + place(pred["joints"], pred["uv"], K)
    shift = (root - pred["joints"][:, ROOT])[:, None]
    moved = {key: pred[key] + shift for key in ("joints", "verts") if key in pred}
    plain = unmirror(moved | {"pose": pred["pose"]} if "pose" in pred else moved, batch["side"])
    out = []
    for i, row in enumerate(batch["index"].tolist()):
        hand = {"path": index.path(row), "id": index.id(row), "side": batch["side"][i],
                "box": box.tolist() if np.isfinite(box := index.columns.get("box", NO_BOX)[row % len(
                    index.columns.get("box", NO_BOX))]).all() else None,
                "joints": plain["joints"][i].tolist(), "uv": uv[i].tolist(),
                "K": index.columns["K"][row].tolist(), "metric": bool(known[row])}
        if "pose" in plain:
            hand["pose"] = matrix_to_axis_angle(plain["pose"][i]).flatten().tolist()
        hand |= {key: pred[key][i].tolist() for key in ("shape",) if key in pred}
        out.append(hand | ({"verts": plain["verts"][i]} if "verts" in plain else {}))
    return out


def draw_photo(out: Path, root: Path, path: str, hands: list[dict], faces: Tensor) -> None:
    """OUT/PHOTO.png: the photo with every hand's mesh and bones; beside it each hand from two sides."""
    photo = Image.fromarray(read_image(root / path))
    s = min(max(1.0, SMALLEST / max(photo.size)), LARGEST / max(photo.size))
    image = photo.resize((round(photo.width * s), round(photo.height * s)), Image.Resampling.LANCZOS)
    A = np.array([[s, 0, (s - 1) / 2], [0, s, (s - 1) / 2], [0, 0, 1]])          # x to (x + 0.5) s - 0.5
    drawn = image
    for hand in hands:
        if "verts" in hand and hand["verts"].isfinite().all() and (hand["verts"][:, 2] > 0.02).all():
            order = faces[:, [0, 2, 1]] if hand["side"] == "left" else faces
            K = torch.tensor(A @ np.array(hand["K"])).float()
            drawn = draw_mesh(drawn, hand["verts"], order, K, alpha=0.75)
    for hand in hands:
        uv = np.array(hand["uv"]) * s + (s - 1) / 2
        drawn = draw_bones(drawn, uv)
    side = max(120, min(300, drawn.height // max(1, len(hands))))
    beside = Image.new("RGB", (2 * side, max(drawn.height, side * len(hands))), "white")
    for k, hand in enumerate(hands):
        for j, turn in enumerate((90.0, -45.0)):
            cell = draw_side(np.array(hand["joints"]), side, turn=turn)
            beside.paste(cell, (j * side, k * side))
        top = beside.crop((0, k * side, side, k * side + 24))
        beside.paste(label(top, f"{hand['side']} hand", 13), (0, k * side))
    sheet_ = Image.new("RGB", (drawn.width + beside.width, beside.height), "white")
    sheet_.paste(drawn, (0, 0))
    sheet_.paste(beside, (drawn.width, 0))
    save_png(out / f"{flat_name(path)}.png", sheet_)


def draw_bones(image: Image.Image, uv: np.ndarray) -> Image.Image:
    """One hand's bones over a photo, with lines as thick as the hand is large."""
    low, high = np.floor(uv.min(0)).astype(int), np.ceil(uv.max(0)).astype(int)
    reach = int(max(high - low) // 8 + 8)
    box = (*np.maximum(low - reach, 0).tolist(), *np.minimum(high + reach, image.size).tolist())
    if not np.isfinite(uv).all() or box[2] - box[0] < 4 or box[3] - box[1] < 4:
        return image                                              # the hand lies outside the photo
    out = image.copy()
    out.paste(draw_skeleton(image.crop(box), uv - np.array(box[:2])), box[:2])
    return out


def write_obj(path: Path, hand: dict, faces: Tensor) -> None:
    """A mesh in metres, camera frame with y up and z towards the viewer, as viewers of .obj expect."""
    verts = hand["verts"] * torch.tensor([1.0, -1, -1])
    order = faces[:, [0, 2, 1]] if hand["side"] == "left" else faces
    path.write_text("".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in verts.tolist())
                    + "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in order.tolist()))


# ---- Inspect --------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """16 samples of a data set with their joints and, where there is a pose, the mesh; and counts."""
    if not args.data:
        raise UserError("--inspect needs --data NAME[:PART][=DIR]")
    split = args.split or ("val" if data_name(args.data) in ("coco", "imagenet") else "test")
    data = open_data(flags, (args.data,), split, 256, 1.5, device, live=True)
    if not len(data):
        raise UserError(f"{args.data} {split}: there is no sample to look at")
    index = some_of(len(data), min(16, len(data)))
    batch = next(batches(data, [index], device, 0))
    hand = hand_for(args.data, flags.mano).to(device)
    verts, joints = hand(axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)).nan_to_num()),
                         batch["shape"].nan_to_num())
    K = view_intrinsics(batch)
    posed = verts + place(joints, batch["uv"], K)[:, None]
    pictures = []
    for i in range(len(index)):
        drawn = draw_skeleton(batch["image"][i], batch["uv"][i], visible=batch["visible"][i])
        pictures.append(label(drawn, f"{int(index[i])} {batch['side'][i]}"))
        if batch["has"]["pose"][i] and batch["has"]["uv"][i]:
            pictures.append(draw_mesh(batch["image"][i], posed[i], hand.faces, K[i]))
    out = Path(args.out or f"runs/inspect-{data_name(args.data)}")
    sheet(out / "inspect.png", [pictures[k:k + 8] for k in range(0, len(pictures), 8)])
    has = {key: int(value.sum()) for key, value in batch["has"].items()}
    say(f"{len(data):,} samples in {args.data} {split}; of the {len(index)} drawn: "
        + ", ".join(f"{count} have {key}" for key, count in has.items()))
    say(f"wrote {out}/inspect.png; left hands are shown as the right hands they become")


# ---- CLI ------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="*", help="run folders or finetune.pt files")
    add("--data", default="", metavar="NAME", help="NAME[:PART][=DIR] (default: what RUN was tuned on)")
    add("--root", default="", metavar="DIR", help="the data set's folder (default data/NAME)")
    add("--split", default="", choices=("train", "val", "test"), help="default test; coco has val")
    add("--protocol", nargs="+", default=(), metavar="NAME", help="default: all of the data set's")
    add("--out", default="", metavar="DIR", help="default RUN/eval-DATA, for several runs runs/compare-DATA")
    add("--scratch", default="", metavar="RUN", help="the run trained from random weights, as the row scratch")
    add("--sheet", action="store_true", help="sheet.png: the same samples for the truth and all runs")
    add("--curve", default="", metavar="FIELD", help="draw --metric over an option, `epoch` or `labels`")
    add("--metric", default="mpjpe_mm", metavar="NAME", help="of --curve (default mpjpe_mm)")
    add("--images", default="", metavar="DIR|FILE", help="predict your own photos")
    add("--obj", action="store_true", help="with --images: write each hand's mesh")
    add("--submit", action="store_true", help=f"write the server's or tool kit's file: {', '.join(SUBMIT)}")
    add("--two-pass", action="store_true", help="PeCLR: predict, crop around the prediction, predict again")
    add("--inspect", action="store_true", help="draw 16 samples of --data and count what they have")
    add("--mano", default="", metavar="FILE", help="MANO_RIGHT.pkl or .npz, or builtin")
    add("--cache", default="cache", metavar="DIR", help="rendered hands and indexes (default cache)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read pictures (default 4)")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    args = parser.parse_args(argv)
    if not args.run and not args.inspect:
        raise UserError("name a run folder or a finetune.pt, or --inspect --data NAME (see --help)")
    if args.obj and not args.images:
        raise UserError("--obj writes the meshes of --images DIR")
    flags = Flags(root=args.root, mano=args.mano, cache=args.cache, workers=args.workers)
    if args.curve:
        return draw_curve(args)
    device = start(args.device)
    (inspect if args.inspect else own_pictures if args.images else judge)(args, flags, device)


if __name__ == "__main__":
    sys.exit(guarded(main))
