"""Where samples come from: names of data sets, and the one function that opens them."""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import UserError, permutation, say
from hand import _both_hands, user_hand
from sources.cameras import index_cameras
from sources.coco import index_coco
from sources.dexycb import index_dexycb
from sources.folder import index_folder, index_imagenet
from sources.freihand import index_freihand
from sources.hanco import index_hanco
from sources.ho3d import index_ho3d
from sources.index import Index
from sources.interhand import index_interhand
from sources.loader import Hands, Joined, Rows, Views
from sources.synthetic import Cached, Synthetic
from sources.yt3d import index_yt3d

import numpy as np
import torch


# ---- Data sets ------------------------------------------------------------------------------------
# An index function reads one official layout into an `Index`: columns of numbers and picture paths,
# one row a hand. `Hands` turns any Index into the one sample dictionary. NaN is the only mark of a
# missing number, in a column and in a sample; `has` and `joints_ok` are read off it. Samples are
# batched by torch's default_collate: strings become lists, `has` a dict of bool tensors.

DATA_NAMES = ("synthetic", "folder", "imagenet", "freihand", "yt3d", "coco", "ho3d", "dexycb", "interhand",
              "hanco", "cameras")


def parse_data(text: str) -> tuple[str, str, str]:
    """NAME[:PART][=DIR] -> (name, part or "", folder or ""); UserError for an unknown name."""
    head, equals, folder = text.partition("=")
    name, colon, part = head.partition(":")
    if name not in DATA_NAMES:
        raise UserError(f"data set {name!r} is not known; choose one of {', '.join(DATA_NAMES)}")
    if (equals and not folder) or (colon and not part):
        raise UserError(f"data set {text!r} must be written NAME[:PART][=DIR]")
    return name, part, folder


def read_index(name: str, part: str, root: str, split: str, mano: dict | None = None,
               cache: str | Path | None = None, unlabelled: bool = False) -> Index:
    """The Index of a data set read from `root`, or from data/NAME; split train, val or test.

    mano: the user's own {"right": load_mano(..), "left": ..}; cache: folder for finished indices.
    UserError: no such folder, part or split, another layout.
    """
    splits = {"folder": ("train", "val", "test", "all"), "imagenet": ("train", "val"),
              "yt3d": ("train", "val", "test"), "ho3d": ("train", "val", "test"),
              "coco": ("train", "val"), "hanco": ("train", "test"), "cameras": ("train", "test", "all")}
    if split not in splits.get(name, ("train", "val", "test")):
        raise UserError(f"{name} has no split {split!r}")
    if part and name in splits and name != "hanco":
        raise UserError(f"{name} has no parts, so {name}:{part} does not exist")
    root = root or f"data/{name}"
    if name == "folder":
        return index_folder(root, split, cache)
    if name == "imagenet":
        return index_imagenet(root, split, cache)
    if name == "dexycb":
        return index_dexycb(root, split, part or "s0", mano, cache, unlabelled)
    if name == "interhand":
        return index_interhand(root, split, part or "all", mano, cache)
    if name == "freihand":
        return index_freihand(root, split, part or "all", mano, cache)
    if name == "yt3d":
        return index_yt3d(root, split, mano, cache)
    if name == "coco":
        return index_coco(root, split, cache)
    if name == "ho3d":
        return index_ho3d(root, split, mano, cache)
    if name == "hanco":
        return index_hanco(root, split, part, mano, cache)
    if name == "cameras":
        return index_cameras(root, split, cache)
    raise UserError(f"{name} is rendered, not read from a folder")


class Rig(NamedTuple):
    """How multi-view samples are asked for; the last two are the noise of synthetic labels."""
    views: int = 1                  # V, the first cameras; samples get a leading axis V
    outliers: float = 0.1           # see Synthetic
    detector: float = 1.0


# The finger tips that each data set's joints mean; the others are annotated, or smplx's. FreiHAND's
# and YouTube3DHands' other joints come from the posed mesh: Mano.regress, not the chain's.
DATASET_TIPS = {"dexycb": "manopth", "freihand": "freihand", "ho3d": "ho3d"}
REGRESSED = ("freihand",)                               # data whose joints come from the posed mesh


def data_name(spec: str) -> str:
    """NAME[:PART][=DIR] -> NAME."""
    return parse_data(spec)[0] if spec else ""


def open_data(cfg: Any, specs: tuple[str, ...], split: str, size: int, margin: float,
              device: torch.device, labelled: bool = False, unlabelled: bool = False,
              live: bool = False, rig: Rig | None = None) -> Any:
    """The data sets that --data or --finetune names, as one; prints what is in each and was left out.

    `size` and `margin` as in `Hands`. `labelled` keeps rows with a pose or joints, of these the
    share --label-fraction: the first of a seeded order, so smaller subsets lie inside larger ones.
    A label may have several pictures (column `hand`: FreiHAND's four backgrounds): all or none.
    `unlabelled` also keeps DexYCB's frames without a label (see `index_dexycb`); `live` renders
    synthetic hands when they are asked for, also on a CPU. `rig` asks for multi-view samples.
    Raises UserError for names, folders and layouts that are not what they should be.
    """
    if cfg.root and len(specs) > 1:
        raise UserError("--root names the folder of one data set; write NAME=DIR for each of several")
    live = live or device.type != "cpu" and len(specs) == 1
    found = [_open_one(cfg, spec, split, size, margin, device if live else torch.device("cpu"), labelled,
                       unlabelled, live, rig) for spec in specs]
    data = found[0] if len(found) == 1 else Joined(found)
    if labelled and cfg.label_fraction < 1:
        columns = data.index.columns if isinstance(data, Hands) else {}
        label, label_of = np.unique(columns.get("hand", np.arange(len(data))), return_inverse=True)
        keep = permutation(len(label), cfg.seed)[:math.ceil(cfg.label_fraction * len(label))]
        data = Rows(data, torch.isin(torch.from_numpy(label_of), keep).nonzero()[:, 0])
        say(f"{len(keep):,} labels used (--label-fraction {cfg.label_fraction:g}), {len(data):,} pictures")
    return data


def _open_one(cfg: Any, spec: str, split: str, size: int, margin: float, device: torch.device,
              labelled: bool, unlabelled: bool, live: bool, rig: Rig | None = None) -> Any:
    """One of the data sets of `open_data`."""
    name, part, folder = parse_data(spec)
    folder = folder or cfg.root
    if name == "synthetic":
        rig = rig or Rig()
        data = Synthetic(size, cfg.samples if split == "train" else None, cfg.seed, split, rig.views,
                         user_hand(cfg.mano)[0], cfg.backgrounds or None, part == "calm",
                         domain="A" if part in ("", "calm") else part, margin=margin,
                         outliers=rig.outliers, detector=rig.detector)
        data._move(device)
        return data if live else Cached(data, Path(cfg.cache))
    every = name == "folder" and split == "train" and not labelled and not (
        Path(folder or "data/folder") / "labels.jsonl").is_file()
    index = read_index(name, part, folder, "all" if every else split, _both_hands(cfg.mano),
                       Path(cfg.cache) / "index", unlabelled)
    meant = {"pose", "shape", "verts", "trans"} & set(index.columns)
    if meant and _both_hands(cfg.mano) is None:                # MANO's numbers say nothing of another hand
        index = dataclasses.replace(index, columns={k: x for k, x in index.columns.items() if k not in meant},
                                    notes=[*index.notes, "mesh, pose and shape are left out: they are MANO's, whose "
                                                         "file is not given"])
    if labelled:
        known = np.zeros(len(index), bool)
        for key in {"pose", "joints"} & set(index.columns):
            known |= np.isfinite(index.columns[key]).reshape(len(index), -1).any(1)
        index = index.drop(~known, "without pose or joints")
        if not len(index):
            raise UserError(f"{spec}: not one hand has joints or a pose, so none can be learnt from")
    say(index.summary())
    if rig and "camera" in index.columns:
        data = Views(Hands(index, size, margin), rig.views)
        say(f"{name}: {len(data):,} moments of up to {rig.views} cameras, "
            f"{int((data.rows < 0).sum()):,} of their pictures missing")
        return data
    return Hands(index, size, margin)
