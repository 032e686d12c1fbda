"""freihand: reader of its official layout."""
from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, N_VERTS, Mano, UserError, auc, axis_angle_to_matrix, epe, f_score, pa_mpjpe,
    procrustes)
from sources.index import (
    DataSet, Index, Joints, cached, data_folder, drop_missing, empty_index, hand_labels,
    hand_stamp, json_numbers, note_poses, path_column, stamp, tight_box)
from sources.submission import every_sample, write_submission

import numpy as np
import torch
from torch import Tensor


# FreiHAND v2: layout, joint order and variants are those of lmb-freiburg/freihand 5ea4ab9.

FREIHAND_IDS, FREIHAND_EVALUATION = 32_560, 3_960       # hands of the two halves
FILES = {"K": (3, 3), "xyz": (N_JOINTS, 3), "mano": (61,), "verts": (N_VERTS, 3), "scale": ()}
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
    order, held = np.arange(FREIHAND_IDS), 0
    if part.startswith("90"):
        order, held = np.random.RandomState(5).permutation(FREIHAND_IDS), FREIHAND_IDS // 10
    ids = np.sort(order[:held] if split == "val" else order[held:])
    variants = 1 if part.endswith("gs") else 4
    return (ids + FREIHAND_IDS * np.arange(variants)[:, None]).ravel()


def index_freihand(root: str | Path, split: str = "train", part: str = "all",
                   mano: dict | None = None, cache: str | Path | None = None) -> Index:
    """FreiHAND v2 as published, FreiHAND_pub_v2 with _v2_eval's files beside them; right hands.

    Parts as in `freihand_split`; test is the evaluation set, in the order of pred.json, whatever
    the part. evaluation_xyz, _mano and _verts may be missing: then the truth is NaN, the box is
    PeCLR's central square and a note says so; else boxes are tight around the joints, but for the
    part centre, which takes the central square where the truth is known too. scale is the
    metres of bone 9-10. The stored pose lacks MANO's mean, so it needs the user's own mano["right"],
    and stays NaN without. trans then puts that hand's vertices onto the annotated ones (least
    squares); the official code puts joint 9 at (u - cx, v - cy, f) / s of mano[58:61], the same place
    but for which joint 9 is meant. A note says how well that file agrees with the annotation: with
    its vertices, and with its joints if these are regressed from the mesh. Missing pictures are left
    out and counted; image_id is a picture's number. Where training/labels/%08d.json hold a detector's 2D
    labels of the hands (not part of FreiHAND; see `hand_labels`), they are uv_label and confidence, which
    HaMuCo's Ours-SV learns from. UserError: missing or foreign files, or files
    that do not have one entry a hand.
    """
    root, numbers = data_folder(root, "freihand"), freihand_split(part, split)
    name, home = f"freihand:{part} {split}", "evaluation" if split == "test" else "training"
    if not len(numbers):
        return empty_index(name, root, "freihand has no validation split; freihand:90 has PeCLR's")
    files = {kind: f"{home}_{kind}.json" for kind in FILES}
    needed = ("K", "scale") if split == "test" else FILES
    for kind in needed:
        if not (root / files[kind]).is_file():
            raise UserError(f"freihand: {root / files[kind]} is missing (layout of FreiHAND_pub_v2)")
    files = {kind: file for kind, file in files.items() if (root / file).is_file()}
    labels = sorted(file.name for file in (root / home / "labels").glob("*.json"))
    key = ("freihand", os.path.realpath(root), stamp(root, [*files.values(), *(f"{home}/labels/{f}" for f in labels)]),
           hand_stamp(mano))
    hands = cached(cache, key, lambda: _index_freihand(root, home, files, mano))
    numbers = numbers[numbers % FREIHAND_IDS < len(hands)]
    paths = path_column([f"{home}/rgb/{number:08d}.jpg" for number in numbers])
    index = dataclasses.replace(hands, name=name, columns={"paths": paths, "image_id": numbers})
    index = drop_missing(index)              # first: four times the vertices are 1.2 GB, copied once
    index.columns["hand"] = index.columns["image_id"] % FREIHAND_IDS
    index.columns |= {key: column[index.columns["hand"]] for key, column in hands.columns.items() if key != "paths"}
    if part == "centre" and split == "test":
        index.columns["box"] = np.tile(np.float32(FREIHAND_BOX), (len(index), 1))
        index.box_source = "data set"
    return note_poses(index)


def _index_freihand(root: Path, home: str, files: dict[str, str], mano: dict | None) -> Index:
    """One row a hand, its first picture: all that `index_freihand` reads from the .json files."""
    found = {kind: json_numbers(root / file, FILES[kind]) for kind, file in files.items()}
    counts, most = {kind: len(x) for kind, x in found.items()}, FREIHAND_EVALUATION
    most = FREIHAND_IDS if home == "training" else most
    n = counts["K"]
    if set(counts.values()) != {n} or n > most:
        raise UserError(f"freihand: {root}/{home}_*.json must have one entry for each of the {most:,} "
                        f"hands; they have {', '.join(f'{k} {c:,}' for k, c in counts.items())}")
    notes = [] if n == most else [f"{home}_*.json have {n:,} of the {most:,} hands"]
    get = lambda kind: found[kind] if kind in found else np.full((n, *FILES[kind]), np.nan)
    joints, verts, theta = get("xyz"), get("verts"), get("mano")
    uv = joints @ found["K"].transpose(0, 2, 1)
    uv = uv[..., :2] / uv[..., 2:]
    box = tight_box(uv) if "xyz" in found else np.tile(FREIHAND_BOX, (n, 1))
    if "xyz" not in found:
        notes.append(f"{root / home}_xyz.json is not there, so nothing in 3D can be scored")
    pose, shape = np.full((n, 48), np.nan), theta[:, 48:58]
    trans = np.full((n, 3), np.nan)
    if "right" in (mano or {}):
        pose = theta[:, :48] + np.concatenate([np.zeros(3), mano["right"]["hands_mean"]])
        trans, *gaps = _mesh_trans(pose, shape, verts, joints, mano["right"])
        if np.isfinite(gaps).all(0).any():
            mesh, regressed = 1000 * np.nanmedian(gaps, 1)
            notes.append(f"by the MANO file, vertices in the stored poses lie {mesh:.2f} mm, joints "
                         f"regressed from the stored vertices {regressed:.2f} mm from the annotated "
                         "ones (medians)")
    numbers = {"K": found["K"], "joints": joints, "verts": verts, "uv": uv, "box": box, "pose": pose,
               "shape": shape, "trans": trans, "scale": found["scale"]}
    if (root / home / "labels").is_dir():
        numbers |= _freihand_labels(root / home / "labels", n)
        notes.append(f"2D labels of {int((numbers['confidence'] > 0).any(1).sum()):,} of {n:,} hands in {home}/labels")
    return Index("freihand", str(root), {
        "paths": path_column([f"{home}/rgb/{i:08d}.jpg" for i in range(n)]), "side": np.full(n, "right"),
        **{name: value.astype(np.float32) for name, value in numbers.items()}},
        "joints" if "xyz" in found else "data set", notes=notes)


def _freihand_labels(folder: Path, n: int) -> dict[str, np.ndarray]:
    """A detector's 2D labels of hands 0 .. n - 1, one file %08d.json each (`hand_labels`); NaN where there is none."""
    uv, sure = np.full((n, N_JOINTS, 2), np.nan), np.zeros((n, N_JOINTS))
    for i in range(n):
        if (file := folder / f"{i:08d}.json").is_file():
            uv[i], sure[i] = hand_labels(file)
    return {"uv_label": uv, "confidence": sure}


def _mesh_trans(pose: np.ndarray, shape: np.ndarray, verts: np.ndarray, joints: np.ndarray,
                hand: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """trans (N, 3) m with which posed hands lie nearest to given verts (N, 778, 3) m.

    Then the mean distances left, m: of those vertices (N,), and of joints (N, 21, 3) from the ones
    that `hand` regresses from the given vertices (N,).
    """
    layer, found = Mano(hand, "freihand"), []
    for first in range(0, len(pose), 512):
        theta, beta, given, stored = (torch.tensor(x[first:first + 512])
                                      for x in (pose, shape, verts, joints))
        apart = given - layer(axis_angle_to_matrix(theta.unflatten(1, (16, 3))), beta)[0]
        trans, other = apart.mean(1), layer.regress(given) - stored
        found.append((trans, (apart - trans[:, None]).norm(dim=-1).mean(1), other.norm(dim=-1).mean(1)))
    return tuple(torch.cat(part).numpy() for part in zip(*found))


# Its joints are regressed from the posed mesh, and its tips are its own choice of vertices.
FREIHAND = DataSet(index_freihand, joints=Joints("freihand", regressed=True))


# ---- Official protocol ----------------------------------------------------------------------------



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
    """PeCLR's helper: mean and median of all joints' errors, area of the PCK to 49.5 cm, strict <."""
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
