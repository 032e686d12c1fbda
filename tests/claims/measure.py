"""The scores of a row: ridge probe of frozen features, trained networks before the judge, curves."""
from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import build_backbone, load_backbone, load_checkpoint, normalise, transform, warp

import eval as judge
import hamuco
import handmim
import peclr
import ti_net
from claims import canonpose, lt_algebraic
from claims.plan import Claim, Scale, backbone_of
from sources import Source, batches, hand_for, open_data
from sources.judging import Exam, Row, assess
from sources.predictors import outputs
from sources.recipes import stored_config

import torch
from torch import Tensor, nn

GROUPS = 100                                   # of test hands, which a bootstrap draws
RIDGES = torch.logspace(-4, 2, 25, dtype=torch.float64)       # tried weights, of a feature's variance
HEADS = {"peclr": peclr, "ti_net": ti_net, "handmim": handmim, "hamuco": hamuco}
LABELS_ALONE = {"canonpose": (canonpose.Lifter, canonpose.predict), "lt_algebraic": (lt_algebraic.Weigher, lt_algebraic.predict)}
CPU = torch.device("cpu")


class Scores(NamedTuple):
    """What a result's line holds of a row."""

    means: dict[str, float]
    groups: dict[str, list[float]]             # of each error that has one a hand: means of GROUPS

    def add(self, name: str, errors: Tensor) -> None:
        """Errors of hands (n,): their mean, and those of groups of neighbours."""
        self.means[name] = round(float(errors.nanmean()), 3)
        parts = errors.tensor_split(min(GROUPS, len(errors)))
        self.groups[name] = [round(float(part.nanmean()), 2) for part in parts]


# ---- Frozen features -----------------------------------------------------------------------------


def cropped(script: str, image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Stored squares (B, 3, L, L) -> a script's test crop, normalised, and by which A (.., 3, 3)."""
    if script == "peclr":
        return peclr.hand_view(image, peclr.Config(image_size=size))
    if script == "ti_net":
        return ti_net.hand_view(image, size)
    A = handmim.plain_crop(image.shape[-1], size, image.device)
    return normalise(warp(image, A.expand(len(image), 3, 3), size)), A


def features(net: nn.Module, crops: Tensor) -> dict[str, Tensor]:
    """What a frozen back-bone says of crops: the pooled map, or class token and mean patch token."""
    if hasattr(net, "tokens"):
        tokens = net.tokens(crops)
        return {"class": tokens[:, 0], "patch": tokens[:, 1:].mean(1)}
    return {"probe": net(crops)[-1].mean((2, 3))}


@torch.no_grad()
def settle_norms(net: nn.Module, script: str, data: Source, size: int) -> None:
    """BatchNorm's statistics of random weights: the mean over 256 hands, as peclr.py freezes them."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.train()
    for norm in norms:
        norm.momentum = None
    for batch in batches(data, list(torch.arange(min(256, len(data))).split(32)), CPU, 0):
        net(cropped(script, batch["image"], size)[0])
    net.eval()


@torch.no_grad()
def encoded(net: nn.Module, script: str, data: Source, n: int, size: int) -> dict[str, Tensor]:
    """Features of the first n hands, and what is regressed: joints (n, 63) mm, uv (n, 42) px."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(data, list(torch.arange(min(n, len(data))).split(64)), CPU, 0):
        crops, A = cropped(script, batch["image"], size)
        found = features(net, crops)
        found["joints"] = 1000 * (batch["joints"] - batch["joints"][:, :1]).flatten(1)
        found["uv"] = transform(A, batch["uv"]).flatten(1)
        for key, x in found.items():
            parts.setdefault(key, []).append(x.double())
    return {key: torch.cat(x) for key, x in parts.items()}


def ridge(X: dict[str, Tensor], targets: dict[str, tuple[dict[str, Tensor], int]]
          ) -> dict[str, Tensor]:
    """Closed-form ridge regression: errors (m,) of test hands for each of some targets.

    X (n, d) of train, val and test; of a target Y (n, points x axes) and its axes, 3 or 2. Features
    have mean 0 and deviation 1 on train; the weight is the one of RIDGES with the least error on
    val, and test is looked at once.
    """
    mean, scale = X["train"].mean(0), X["train"].std(0).clamp(min=1e-6)
    X = {split: (x - mean) / scale for split, x in X.items()}
    n = len(X["train"])
    S, V = torch.linalg.eigh(X["train"].mT @ X["train"] / n)
    turned = {split: x @ V for split, x in X.items()}
    out = {}
    for name, (Y, axes) in targets.items():
        offset = Y["train"].mean(0)
        moved = turned["train"].mT @ (Y["train"] - offset) / n

        def errors(split: str, weight: Tensor) -> Tensor:
            guess = turned[split] @ (moved / (S.clamp(min=0) + weight)[:, None]) + offset
            return (guess - Y[split]).unflatten(1, (-1, axes)).norm(dim=-1).mean(1)

        best = min(RIDGES, key=lambda weight: float(errors("val", weight).mean()))
        out[name] = errors("test", best)
    return out


def dimensions(X: Tensor) -> float:
    """How many axes the variance of features (n, d) fills: (sum of eigenvalues)^2 / sum of squares."""
    X = X - X.mean(0)
    C = X.mT @ X
    return float(C.trace().square() / C.square().sum().clamp(min=1e-30))


def probe(claim: Claim, init: str, seed: int, cache: str, scale: Scale) -> Scores:
    """Ridge probes of frozen weights: joints in mm, key points in px of the crop, dimensions."""
    head = HEADS[claim.script]
    cfg = head.Config(image_size=scale.side, samples=scale.pictures, seed=seed, cache=cache)
    sets = {split: open_data(cfg, ("synthetic",), split, head.stored_side(cfg), head.MARGIN, CPU)
            for split in ("train", "val", "test")}
    torch.manual_seed(seed)
    net = build_backbone(backbone_of(claim.script, scale), scale.side)
    if init == "random":
        settle_norms(net, claim.script, sets["train"], scale.side)
    else:
        load_backbone(net, init)
    net.eval()
    count = {"train": scale.probed, "val": len(sets["val"]), "test": len(sets["test"])}
    found = {split: encoded(net, claim.script, data, count[split], scale.side)
             for split, data in sets.items()}
    targets = {measure: ({split: x[key] for split, x in found.items()}, axes)
               for measure, key, axes in (("mpjpe_mm", "joints", 3), ("2d_px", "uv", 2))}
    out = Scores({}, {})
    for name in [key for key in found["train"] if key not in ("joints", "uv")]:
        X = {split: x[name] for split, x in found.items()}
        for measure, errors in ridge(X, targets).items():
            out.add(f"{name}_{measure}", errors)
        out.means[f"{name}_dimensions"] = round(dimensions(X["train"]), 2)
    return out


# ---- Trained networks ----------------------------------------------------------------------------


def by_hand(row: Row, metric: str) -> Tensor:
    """A metric of every sample, (n,): the judge keeps each of up to 4,096 samples by itself."""
    total = row.tallies["ours"].sums[metric].sum(1)
    return total[:, 0] / total[:, 1]


def tuned(folder: Path, name: str, tests: tuple[str, ...], split: str) -> Scores:
    """A fine-tuned run before the judge, and its validation curve's least and mean error."""
    net = judge.load_net(folder)
    out = Scores({}, {})
    for spec in tests:
        data = open_data(net.cfg, (spec,), split, net.side, net.margin, CPU)
        rows, _ = assess(Exam(data, spec, hand_for(spec, net.cfg.mano), CPU), net, net.mean)
        place = f"{name}_on_{spec.partition(':')[2]}" if ":" in spec else name
        for metric in ("mpjpe_mm", "pa_mpjpe_mm"):
            out.add(f"{place}_{metric}", by_hand(rows[net.row], metric))
            out.add(f"{place}_mean_pose_{metric}", by_hand(rows["mean_pose"], metric))
    log = next(folder.glob("finetune-*")) / "log.jsonl"
    curve = [line["val_mpjpe_mm"] for line in map(json.loads, log.read_text().splitlines())
             if "val_mpjpe_mm" in line]
    out.means[f"{name}_val_mm"] = round(min(curve), 3)
    out.means[f"{name}_area_mm"] = round(sum(curve) / len(curve), 3)
    out.groups[f"{name}_curve_mm"] = [round(x, 2) for x in curve]
    return out


def monitored(folder: Path) -> dict[str, float]:
    """What a pre-training's log says of its last quarter, in the mean over the steps that it logged; {} without one."""
    logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("pretrain-*/log.jsonl")]
    steps = [line for log in logs for line in log if "step" in line]
    late = [line for line in steps if line["step"] > 0.75 * steps[-1]["step"]]
    return {name: round(sum(line[name] for line in late) / len(late), 4)
            for name in (late[-1] if late else {}) if name not in ("step", "epoch", "lr")}


def collaborated(folder: Path, split: str) -> Scores:
    """HaMuCo's outputs, its labels and their triangulation, or what a baseline without pictures makes of labels."""
    alone = next((name for name in LABELS_ALONE if (folder / f"{name}.pt").is_file()), None)
    if alone:
        cfg = stored_config(hamuco.Config, json.loads((folder / "train" / "config.json").read_text())["cfg"])
        build, predict = LABELS_ALONE[alone]
        model, mean = build(), None
        model.load_state_dict(load_checkpoint(folder / f"{alone}.pt"))
    else:
        net = judge.load_net(folder)
        cfg, mean = net.cfg, net.mean
        name = "single_view" if "single-view" in cfg.variant else "hamuco"
        guess = hamuco.predictor({name: net.model.eval()}, cfg.image_size, True)

    def from_labels(batch: dict) -> dict[str, dict[str, Tensor]]:
        return outputs(predict(model, batch), "")

    data = hamuco.open_rig(cfg, split, CPU)
    exam = Exam(data, cfg.data[0], hand_for(cfg.data[0], cfg.mano), CPU)
    rows, _ = assess(exam, from_labels if alone else guess, mean)
    out = Scores({}, {})
    for name, row in rows.items():
        for metric in ("pa_mpjpe_mm", "n_mpjpe_mm", "mpjpe_mm"):
            if metric in row.means():
                out.add(f"{name.partition('-')[0]}_{metric}", by_hand(row, metric))
        if "epe_2d_px_crop" in row.means():
            in_256 = 256 / cfg.image_size * by_hand(row, "epe_2d_px_crop")
            out.add(f"{name.partition('-')[0]}_2d_px", in_256)
    return out
