"""Where samples come from: the sample dictionary, the protocol of a source, and what opens one.

The sample dictionary. Every source yields every key; NaN is the only mark of a missing number, and
`has` and `joints_ok` are read off it, so mixed data collates. Metres, pixels of `image`, camera
frame x right, y down, z forward; all left hands are mirrored to right ones.

    image      (3, S, S) uint8 RGB: the square of margin x the hand's box (no hand: the centre
               square), resized once with antialiasing; black outside the picture
    crop       (3, 3) takes px of the picture to px of image      size (2,) px of that picture
    K          (3, 3) px            joints (21, 3) m, wrist, then thumb to pinky from base to tip
    joints_ok  (21,) bool           verts (778, 3) m
    uv         (21, 2) px, true     uv_label (21, 2) px, what self-supervision may see; never the
               truth in its place   confidence (21,) in [0, 1] of uv_label, or of uv if a data set
               has no uv_label      visible (21,) bool
    pose       (48,) rad, axis-angle with the mean pose in it    shape (10,)    trans (3,) m
    scale      metres of a unit of length or of bone 9-10, 1 where neither is known
    has        dict of bool: K joints uv verts pose shape cameras
    side, id, box_source                        strings; id is unique

Several views of one moment have a leading axis V in every tensor, and cameras (V, 4, 4), world to
camera, and view_ok (V,) bool; and, where no picture has the px that were asked for, zoom (V,), how
many of those px is one of image. Samples are batched by torch's default_collate: tensors get a
leading axis B, strings become lists, `has` a dict of bool tensors.

The protocol (`Source`, in sources/loader.py). A source is all that a script knows of data:
    len(source)                              how many samples there are
    source.batches(plan, device, workers)    for each (B,) int64 tensor of rows in `plan`, in order,
                                             the samples of those rows, collated, on the device
    source.targets(rows)                     the same without pictures, on the CPU, and side_px
                                             (B,), the side that the pictures would have
    source.columns(rows)                     what else the data set says, {name: (B, ...) array}: an
                                             official score or submission needs it; {} where nothing
    source.parts()                           the sources that were joined, else [source]
    source.gives(key)                        whether the data set holds numbers of that key
    source.name, source.box_source           for tables; annotated, joints, data set or detector

A picture that breaks after it was indexed is named on stderr and becomes a black image without
labels: batches, and so resumed runs, stay the same.
"""
from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Protocol

# common before torch: it settles how threads wait
from common import Mano, UserError, permutation, say
from hand import both_hands, user_hand
from sources import (
    assembly101, cameras, coco, dexycb, doh100, folder, freihand, h2o, hanco, ho3d, interhand, yt3d)
from sources.hands import Hands, enough_px
from sources.index import Index, Joints
from sources.loader import Joined, Rows, Source, Targets
from sources.squares import keep_squares
from sources.steps import batches, training_steps
from sources.synthetic import Cached, Synthetic
from sources.views import Cameras, Rig, Views

import numpy as np
import torch

__all__ = ["DATA_NAMES", "Hands", "Index", "Joined", "Joints", "Rig", "Rows", "Source", "Targets",
           "Views", "batches", "data_name", "hand_for", "joints_of", "open_data", "parse_data",
           "read_index", "scored_split", "training_steps"]

# An index function reads one official layout into an `Index`, which `Hands` turns into samples.
DATA_SETS = {
    "folder": folder.FOLDER, "imagenet": folder.IMAGENET, "freihand": freihand.FREIHAND,
    "yt3d": yt3d.YT3D, "coco": coco.COCO, "ho3d": ho3d.HO3D, "dexycb": dexycb.DEXYCB,
    "interhand": interhand.INTERHAND, "hanco": hanco.HANCO, "h2o": h2o.H2O, "100doh": doh100.DOH100,
    "assembly101": assembly101.ASSEMBLY101, "cameras": cameras.CAMERAS}
DATA_NAMES = ("synthetic", *DATA_SETS)


class Options(Protocol):
    """The options that `open_data` reads of any script's Config."""

    root: str
    mano: str
    cache: str
    keep: float
    samples: int | None
    seed: int
    backgrounds: str
    label_fraction: float


# ---- Names ---------------------------------------------------------------------------------------


def parse_data(text: str) -> tuple[str, str, str]:
    """NAME[:PART][=DIR] -> (name, part or "", folder or ""); UserError for an unknown name."""
    head, equals, place = text.partition("=")
    name, colon, part = head.partition(":")
    if name not in DATA_NAMES:
        raise UserError(f"data set {name!r} is not known; choose one of {', '.join(DATA_NAMES)}")
    if (equals and not place) or (colon and not part):
        raise UserError(f"data set {text!r} must be written NAME[:PART][=DIR]")
    return name, part, place


def data_name(spec: str) -> str:
    """NAME[:PART][=DIR] -> NAME."""
    return parse_data(spec)[0] if spec else ""


def joints_of(spec: str) -> Joints:
    """Which joints the data set NAME[:PART][=DIR] means; the chain's where nothing else is said."""
    known = DATA_SETS.get(data_name(spec))
    return known.joints if known else Joints()


def hand_for(spec: str, mano: str) -> Mano:
    """The hand of --mano with the joints that the data set NAME[:PART][=DIR] means.

    A network that is trained or tested there, its truth and the mean pose all take their joints
    from it: joints of another definition lie millimetres beside.
    """
    joints = joints_of(spec)
    return Mano(user_hand(mano)[0], joints.tips, regressed=joints.regressed)


def scored_split(spec: str) -> str:
    """The split of NAME[:PART][=DIR] that is scored where none is asked for: test, or else val.

    That is so where a data set has no test split, and where a paper's table is about another one.
    """
    name, part, _ = parse_data(spec)
    known = DATA_SETS.get(name)
    other = known and ("test" not in known.splits or part in known.scored_on_val)
    return "val" if other else "test"


# ---- Opening -------------------------------------------------------------------------------------


def read_index(name: str, part: str, root: str, split: str, mano: dict | None = None,
               cache: str | Path | None = None, unlabelled: bool = False) -> Index:
    """The Index of a data set read from `root`, or from data/NAME; split train, val or test.

    mano: the user's own {"right": load_mano(..), "left": ..}; cache: folder for finished indices.
    UserError: no such folder, part or split, another layout.
    """
    if name not in DATA_SETS:
        raise UserError(f"{name} is rendered, not read from a folder")
    known = DATA_SETS[name]
    takes = inspect.signature(known.index).parameters
    if split not in known.splits:
        raise UserError(f"{name} has no split {split!r}")
    if part and "part" not in takes:
        raise UserError(f"{name} has no parts, so {name}:{part} does not exist")
    options = {"mano": mano, "cache": cache, "unlabelled": unlabelled}
    options |= {"part": part} if part else {}
    return known.index(root or f"data/{name}", split,
                       **{key: value for key, value in options.items() if key in takes})


def open_data(cfg: Options, specs: tuple[str, ...], split: str, size: int, margin: float,
              device: torch.device, labelled: bool = False, unlabelled: bool = False,
              live: bool = False, rig: Rig | None = None, most: int | None = None) -> Source:
    """The data sets that --data or --finetune names, as one; prints what is in each.

    `size` and `margin` as in `Hands`. `labelled` keeps rows with a pose or joints, of these the
    share --label-fraction: the first of a seeded order, so smaller subsets lie inside larger ones.
    A label may have several pictures (column `hand`: FreiHAND's four backgrounds): all or none.
    `unlabelled` also keeps DexYCB's frames without a label (see `index_dexycb`); `live` renders
    synthetic hands when they are asked for, on a CPU too; else `most` are rendered beforehand, if
    given. `rig` asks for multi-view samples. UserError: a wrong name, folder or layout.
    """
    if cfg.root and len(specs) > 1:
        raise UserError("--root names the folder of one data set; give each of several NAME=DIR")
    room = 0 if split == "test" or live else cfg.keep       # what is looked at once is not kept
    live = live or (device.type != "cpu" and len(specs) == 1)
    found: list[Source] = []
    for spec in specs:
        if data_name(spec) == "synthetic":
            found.append(_rendered(cfg, spec, split, size, margin, rig or Rig(),
                                   device if live else None, most))
        else:
            found.append(_read(cfg, spec, split, size, margin, room, labelled, unlabelled, rig,
                               alone=len(specs) == 1))
    data = found[0] if len(found) == 1 else Joined(found)
    if labelled and cfg.label_fraction < 1:
        every = np.arange(len(data))
        label = data.columns(torch.from_numpy(every)).get("hand", every)
        label, label_of = np.unique(label, return_inverse=True)
        keep = permutation(len(label), cfg.seed)[:math.ceil(cfg.label_fraction * len(label))]
        data = Rows(data, torch.isin(torch.from_numpy(label_of), keep).nonzero()[:, 0])
        say(f"{len(keep):,} labels used (--label-fraction {cfg.label_fraction:g}), "
            f"{len(data):,} pictures")
    return data


def _rendered(cfg: Options, spec: str, split: str, size: int, margin: float, rig: Rig,
              device: torch.device | None, most: int | None) -> Source:
    """Synthetic hands, rendered as they are asked for on `device`, or once on the CPU."""
    part = parse_data(spec)[1]
    data = Synthetic(size, cfg.samples if split == "train" else None, cfg.seed, split, rig.views,
                     user_hand(cfg.mano)[0], cfg.backgrounds or None, calm=part == "calm",
                     domain="A" if part in ("", "calm") else part, margin=margin,
                     outliers=rig.outliers, detector=rig.detector)
    if device is None:
        data = Cached(data, Path(cfg.cache), most)
    else:
        data.move(device)
    return Cameras(data, rig.cameras) if rig.cameras and rig.views > 1 else data


def _read(cfg: Options, spec: str, split: str, size: int, margin: float, room: float,
          labelled: bool, unlabelled: bool, rig: Rig | None, alone: bool) -> Source:
    """A data set that lies in a folder; its moments, if `alone`, with the px that pictures have."""
    name, part, place = parse_data(spec)
    place = place or cfg.root
    mano = both_hands(cfg.mano)
    plain = not (Path(place or "data/folder") / "labels.jsonl").is_file()
    if name == "folder" and split == "train" and (plain or part) and not labelled:
        split = "all"                         # nothing is ever tested on pictures without labels
    index = read_index(name, part, place, split, mano, Path(cfg.cache) / "index", unlabelled)
    if mano is None:
        index = _without_mesh(index)
    if labelled:
        known = np.zeros(len(index), bool)
        for key in {"pose", "joints"} & set(index.columns):
            known |= np.isfinite(index.columns[key]).reshape(len(index), -1).any(1)
        index = index.drop(~known, "without pose or joints")
        if not len(index):
            raise UserError(f"{spec}: not one hand has joints or a pose, so none can be learnt "
                            "from")
    say(index.summary())
    moments = rig is not None and "camera" in index.columns
    px = enough_px(index, size, margin) if moments and alone else size
    hands = Hands(index, px, margin, keep_squares(index, px, margin, Path(cfg.cache), room))
    if not moments:
        return hands
    data = Views(hands, rig.views, rig.cameras, size / px)
    say(f"{name}: {len(data):,} moments of up to {rig.views} cameras, "
        f"{int((data.rows < 0).sum()):,} of their pictures missing")
    return data


def _without_mesh(index: Index) -> Index:
    """The index without MANO's numbers, which say nothing of another hand than MANO's."""
    mesh = {"pose", "shape", "verts", "trans"} & set(index.columns)
    if not mesh:
        return index
    columns = {key: column for key, column in index.columns.items() if key not in mesh}
    note = "mesh, pose and shape are left out: they are MANO's, whose file is not given"
    return dataclasses.replace(index, columns=columns, notes=[*index.notes, note])
