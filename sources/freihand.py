"""FreiHAND v2: layout, joints, variants, scores and submission (lmb-freiburg/freihand 5ea4ab9)."""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, N_VERTS, Mano, UserError, auc, axis_angle_to_matrix, epe, f_score, pa_mpjpe,
    procrustes)
from sources.files import (
    cached, data_folder, drop_missing, empty_index, note_poses, path_column)
from sources.index import DataSet, Index, Joints, pinhole, tight_box
from sources.parsing import hand_labels, intrinsics, json_numbers, reading
from sources.submission import every_sample, write_submission

import numpy as np
import torch
from torch import Tensor

FREIHAND_IDS = 32_560                                   # hands to train on
FREIHAND_EVALUATION = 3_960
FILES = {"K": (3, 3), "xyz": (N_JOINTS, 3), "mano": (61,), "verts": (N_VERTS, 3), "scale": ()}
# Joints are regressed from the posed mesh, and the tips are the data set's own choice of vertices.
JOINTS = Joints("freihand", regressed=True)
# The evaluation has no boxes: PeCLR's released code starts from the central 33 % of 224 px.
FREIHAND_BOX = (75.04, 75.04, 73.92, 73.92)


def freihand_split(part: str, split: str) -> np.ndarray:
    """Numbers of the pictures: id + 32560 x variant, by variant, then id.

    Each of the 32,560 training hands has four backgrounds: green screen, then three composed ones.
    Parts: all (no validation), gs (the green screen alone), 90 and 90-gs: PeCLR's 29,304 training
    and 3,256 validation hands (peclr f29f0a9), train_test_split(train_size=0.9, random_state=5) of
    scikit-learn. That is one legacy permutation: validation is its head, training the rest.
    centre is all, its evaluation cropped without help from the truth (see `index_freihand`).
    """
    if part not in ("all", "gs", "90", "90-gs", "centre"):
        raise UserError(f"freihand has the parts all, gs, 90, 90-gs, centre, not {part!r}")
    if split == "test":
        return np.arange(FREIHAND_EVALUATION)
    order = np.arange(FREIHAND_IDS)
    held = 0
    if part.startswith("90"):
        order = np.random.RandomState(5).permutation(FREIHAND_IDS)
        held = FREIHAND_IDS // 10
    ids = np.sort(order[:held] if split == "val" else order[held:])
    variants = 1 if part.endswith("gs") else 4
    return (ids + FREIHAND_IDS * np.arange(variants)[:, None]).ravel()


def index_freihand(root: str | Path, split: str = "train", part: str = "all",
                   mano: dict | None = None, cache: str | Path | None = None) -> Index:
    """FreiHAND v2 as published, FreiHAND_pub_v2 with _v2_eval's files beside them; right hands.

    Parts as in `freihand_split`; test is the evaluation set, in the order of pred.json, whatever
    the part. evaluation_xyz, _mano and _verts may be missing: then the truth is NaN, the box is
    PeCLR's central square and a note says so; else boxes are tight around the joints, but for the
    part centre, which takes the central square where the truth is known too. scale is the metres
    of bone 9-10. The stored pose lacks MANO's mean, so it needs the user's own mano["right"], and
    stays NaN without. trans then puts that hand's vertices onto the annotated ones (least squares);
    the official code puts joint 9 at (u - cx, v - cy, f) / s of mano[58:61], the same place but for
    which joint 9 is meant. A note says how well that file agrees with the annotation: with its
    vertices, and with its joints if these are regressed from the mesh. Missing pictures are left
    out and counted. Where training/labels/%08d.json hold a detector's 2D labels of the hands (not
    part of FreiHAND; see `hand_labels`), they are uv_label and confidence, which HaMuCo's Ours-SV
    learns from. Columns for scores: image_id, a picture's number, and hand, which four share.
    UserError: missing or foreign files, or files that do not have one entry a hand.
    """
    root = data_folder(root, "freihand")
    numbers = freihand_split(part, split)
    name = f"freihand:{part} {split}"
    home = "evaluation" if split == "test" else "training"
    if not len(numbers):
        return empty_index(name, root,
                           "freihand has no validation split; freihand:90 has PeCLR's")
    tables = {kind: f"{home}_{kind}.json" for kind in FILES}
    for kind in ("K", "scale") if split == "test" else FILES:
        if not (root / tables[kind]).is_file():
            raise UserError(f"freihand: {root / tables[kind]} is missing "
                            "(layout of FreiHAND_pub_v2)")
    tables = {kind: file for kind, file in tables.items() if (root / file).is_file()}
    detected = (root / home / "labels").glob("*.json")
    labels = sorted(f"{home}/labels/{file.name}" for file in detected)
    hands = _parse_freihand(root, home, tables, files=[*tables.values(), *labels], cache=cache,
                            mano=mano)
    numbers = numbers[numbers % FREIHAND_IDS < len(hands)]
    paths = path_column([f"{home}/rgb/{number:08d}.jpg" for number in numbers])
    index = dataclasses.replace(hands, name=name, columns={"paths": paths, "image_id": numbers})
    index = drop_missing(index)         # first: four times the vertices are 1.2 GB, copied once
    hand = index.columns["image_id"] % FREIHAND_IDS
    index.columns["hand"] = hand
    index.columns |= {key: column[hand] for key, column in hands.columns.items() if key != "paths"}
    if part == "centre" and split == "test":
        index.columns["box"] = np.tile(np.float32(FREIHAND_BOX), (len(index), 1))
        index.box_source = "data set"
    return note_poses(index)


@cached
def _parse_freihand(root: Path, home: str, tables: dict[str, str],
                    mano: dict | None = None) -> Index:
    """One row a hand, its first picture: all that `index_freihand` reads from the .json files."""
    found = {kind: json_numbers(root / file, FILES[kind]) for kind, file in tables.items()}
    most = FREIHAND_IDS if home == "training" else FREIHAND_EVALUATION
    n = len(found["K"])
    if {*map(len, found.values())} != {n} or n > most:
        counts = ", ".join(f"{kind} {len(values):,}" for kind, values in found.items())
        raise UserError(f"freihand: {root}/{home}_*.json must have one entry for each of the "
                        f"{most:,} hands; they have {counts}")
    with reading(f"freihand: {root / home}_K.json"):
        intrinsics(found["K"])
        if "scale" in found and (found["scale"] <= 0).any():
            raise ValueError(f"{home}_scale.json must hold lengths above 0")
    notes = [] if n == most else [f"{home}_*.json have {n:,} of the {most:,} hands"]
    known = "xyz" in found
    if not known:
        notes.append(f"{root / home}_xyz.json is not there, so nothing in 3D can be scored")
    found = {kind: np.full((n, *dims), np.nan) for kind, dims in FILES.items()} | found
    joints = found["xyz"]
    theta = found["mano"]
    shape = theta[:, 48:58]
    uv = pinhole(joints, found["K"])
    box = tight_box(uv) if known else np.tile(FREIHAND_BOX, (n, 1))
    pose = np.full((n, 48), np.nan)
    trans = np.full((n, 3), np.nan)
    if "right" in (mano or {}):
        pose = theta[:, :48] + np.concatenate([np.zeros(3), mano["right"]["hands_mean"]])
        trans, *gaps = _mesh_trans(pose, shape, found["verts"], joints, mano["right"])
        if np.isfinite(gaps).all(0).any():
            mesh, regressed = 1000 * np.nanmedian(gaps, 1)
            notes.append(f"by the MANO file, vertices in the stored poses lie {mesh:.2f} mm, "
                         f"joints regressed from the stored vertices {regressed:.2f} mm from the "
                         "annotated ones (medians)")
    numbers = {"K": found["K"], "joints": joints, "verts": found["verts"], "uv": uv, "box": box,
               "pose": pose, "shape": shape, "trans": trans, "scale": found["scale"]}
    if (root / home / "labels").is_dir():
        numbers |= _detected(root / home / "labels", n)
        some = int((numbers["confidence"] > 0).any(1).sum())
        notes.append(f"2D labels of {some:,} of {n:,} hands in {home}/labels")
    return Index("freihand", str(root), {
        "paths": path_column([f"{home}/rgb/{i:08d}.jpg" for i in range(n)]),
        "side": np.full(n, "right"),
        **{key: value.astype(np.float32) for key, value in numbers.items()}},
        "joints" if known else "data set", notes=notes)


def _detected(folder: Path, n: int) -> dict[str, np.ndarray]:
    """A detector's 2D labels of hands 0 .. n - 1, %08d.json each, NaN where there is none."""
    uv = np.full((n, N_JOINTS, 2), np.nan)
    sure = np.zeros((n, N_JOINTS))
    for i in range(n):
        file = folder / f"{i:08d}.json"
        if file.is_file():
            uv[i], sure[i] = hand_labels(file)
    return {"uv_label": uv, "confidence": sure}


def _mesh_trans(pose: np.ndarray, shape: np.ndarray, verts: np.ndarray, joints: np.ndarray,
                hand: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """trans (N, 3) m with which posed hands lie nearest to given verts (N, 778, 3) m.

    Then the mean distances left, m: of those vertices (N,), and of joints (N, 21, 3) from the ones
    that `hand` regresses from the given vertices (N,).
    """
    layer = Mano(hand, JOINTS.tips)
    found = []
    for first in range(0, len(pose), 512):
        theta, beta, given, stored = (torch.tensor(x[first:first + 512])
                                      for x in (pose, shape, verts, joints))
        apart = given - layer(axis_angle_to_matrix(theta.unflatten(1, (16, 3))), beta)[0]
        trans = apart.mean(1)
        mesh = (apart - trans[:, None]).norm(dim=-1).mean(1)
        regressed = (layer.regress(given) - stored).norm(dim=-1).mean(1)
        found.append((trans, mesh, regressed))
    return tuple(torch.cat(part).numpy() for part in zip(*found))


FREIHAND = DataSet(index_freihand, joints=JOINTS,
                   scored_on_val=("90", "90-gs"))                          # PeCLR, Tab. 1


# ---- Official protocol ---------------------------------------------------------------------------


def freihand_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """The official script's twelve scores, those of the mesh where there is one.

    Joints and mesh are aligned each by itself. Samples without truth do not count: the test set
    as published has none.
    """
    parts = {"mpjpe": (f["camera"], f["true"], f["ok"])}
    if "verts" in f:
        parts["mpvpe"] = f["verts"], f["verts_true"], f["verts_true"].isfinite().all(-1)
    out = {}
    for kind, (pred, true, ok) in parts.items():
        raw, aligned = epe(pred, true, ok), pa_mpjpe(pred, true, ok, reflect=True)
        area = "auc" + "_verts" * (kind == "mpvpe")
        out |= {f"abs_{kind}_mm": 1000 * raw, f"abs_{area}": auc(raw),
                f"pa_{kind}_mm_reflect": 1000 * aligned, f"pa_{area}_reflect": auc(aligned)}
    if "verts" in f:
        pred, true, ok = parts["mpvpe"]
        rows = ok.all(1)
        meshes = {"_raw": pred, "_reflect": procrustes(pred, true, ok, reflect=True)}
        for suffix, mesh in meshes.items():
            both = true.new_full((len(rows), 2), math.nan, dtype=torch.float64)
            both[rows] = f_score(mesh[rows], true[rows])
            out |= {f"f_5{suffix}": both[:, 0], f"f_15{suffix}": both[:, 1]}
    return out


def peclr_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """PeCLR's helper: mean and median of all joints' errors, area of the PCK to 49.5 cm, <."""
    limits = torch.arange(100, dtype=torch.float64, device=f["true"].device) * 0.005
    errors = {"abs": epe(f["camera"], f["true"], f["ok"]),
              "pa": pa_mpjpe(f["camera"], f["true"], f["ok"])}
    out = {}
    for name, error in errors.items():
        first = torch.searchsorted(limits, error, right=True).double()
        area = ((99.5 - first).clamp(min=0) / 99).masked_fill(error.isnan(), math.nan)
        out |= {f"{name}_mpjpe_mm": 1000 * error, f"{name}_mpjpe_mm_median": 1000 * error,
                f"{name}_auc_495": area}
    return out


def submit_freihand(out: Path, index: Index, kept: dict[str, Tensor]) -> Path:
    """pred.zip in the folder `out`, as the server reads it: our axes and order are FreiHAND's."""
    every_sample(index)
    return write_submission(out / "pred.zip", kept["joints"], kept.get("verts"))


PROTOCOLS = {"freihand": freihand_scores, "peclr": peclr_scores}
