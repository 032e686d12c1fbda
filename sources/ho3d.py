"""HO3D v2 and v3: layout, axes, joints, scores and submission (shreyashampali/ho3d 2fd6ee1)."""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    MANO_TO_OURS, N_JOINTS, N_VERTS, ROOT, Mano, UserError, auc, axis_angle_to_matrix,
    matrix_to_axis_angle, n_mpjpe)
from hand.official import PICKLE_NAMES, Recorded, Recorder, read_pickle, worked_out
from sources.files import (
    UNLABELLED, cached, data_folder, drop_missing, empty_index, note_poses, path_column)
from sources.freihand import freihand_scores
from sources.index import DataSet, Index, Joints, pinhole, rest_wrists, tight_box
from sources.parsing import below, intrinsics, json_numbers, numbers, reading
from sources.submission import every_sample, write_submission

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


OPENGL = np.diag([1.0, -1.0, -1.0])                     # x right, y up, z backward <-> our axes
LABELS = {"handJoints3D": (N_JOINTS, 3), "handPose": (48,), "handTrans": (3,), "handBeta": (10,),
        "camMat": (3, 3), "handBoundingBox": (4,)}


class _LabelRecorder(Recorder):
    """The same for a file of labels: arrays, strings, numbers, no class of chumpy or scipy."""

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
            return type("scalar", (Recorded,), {"kind": "scalar"})       # it is never read
        if PICKLE_NAMES.get(full) not in ("array", "buffer", "ndarray", "dtype", "bytes"):
            raise UserError(f"names {full[:99]!r}, which no label needs; refused, and nothing in "
                            "the file was run")
        return super().find_class(module, name)


def index_ho3d(root: str | Path, split: str = "train", mano: dict | None = None,
               cache: str | Path | None = None) -> Index:
    """HO3D v2 (or v3, in .jpg) as published: the frames of train.txt or, as test, evaluation.txt.

    Right hands, in our axes: x' = F x with F = diag(1, -1, -1). handPose is the whole pose (MANO's
    mean is in it), its wrist turned by F; the hand turns about J0(shape), so trans' is
    F (J0 + trans) - J0, known with the user's own mano["right"], and a note says so. Training boxes
    are tight around the joints; the evaluation has its own. There only the wrist is annotated,
    column root (N, 3) m; joints and verts come from evaluation_xyz.json and _verts.json, if they
    lie in the folder (released in November 2024), else they are NaN. Rows keep the order of the
    list and of pred.json, image_id is the place in it. No validation split. Labels are pickles,
    read without running them. Left out and counted: frames without picture or label, broken and
    empty labels.
    UserError: a missing list, a label that asks for code, truth that belongs to other frames.
    """
    root = data_folder(root, "ho3d")
    home = "evaluation" if split == "test" else "train"
    if split == "val":
        return empty_index("ho3d val", root, "ho3d has no validation split")
    if not (root / f"{home}.txt").is_file():
        raise UserError(f"ho3d: {root / home}.txt is missing, which lists the frames that count")
    with reading(f"ho3d: {root / home}.txt"):
        listed = (root / f"{home}.txt").read_text(encoding="utf-8").split()
        frames = [below(frame, "a frame").split("/") for frame in listed]
    if not frames or {*map(len, frames)} != {2}:
        raise UserError(f"ho3d: {root / home}.txt must have one SEQUENCE/FRAME a line")
    labels = [f"{home}/{sequence}/meta/{frame}.pkl" for sequence, frame in frames]
    truth = [f"{home}_{kind}.json" for kind in ("xyz", "verts") if split == "test"]
    files = [file for file in (f"{home}.txt", *truth, *labels) if (root / file).is_file()]
    index = _parse_ho3d(root, home, labels, files=files, cache=cache, mano=mano)
    for reason in sorted(set(index.columns["reason"].tolist()) - {""}):
        index = index.drop(index.columns["reason"] == reason, reason)
    index = drop_missing(_png_or_jpg(index))
    return index if split == "test" else note_poses(index)


def _png_or_jpg(index: Index) -> Index:
    """The same with .jpg paths where that picture is there and the .png is not."""
    there: dict[str, set[str]] = {}
    found = []
    for path in index.columns["paths"].tolist():
        folder, name = os.path.split(os.fsdecode(path))
        if folder not in there:
            full = Path(index.root, folder)
            there[folder] = set(os.listdir(full)) if full.is_dir() else set()
        other = Path(name).with_suffix(".jpg").name
        jpg = name not in there[folder] and other in there[folder]
        found.append(f"{folder}/{other if jpg else name}")
    return dataclasses.replace(index, columns=index.columns | {"paths": path_column(found)})


def _label(file: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Why a frame is left out or "", and its numbers by the names in LABELS, NaN where not given.

    In the evaluation handJoints3D is the wrist alone, which fills the first joint.
    """
    values = {key: np.full(dims, np.nan) for key, dims in LABELS.items()}
    if not file.is_file():
        return "frames without a label file", values
    try:
        meta = read_pickle(file.read_bytes(), _LabelRecorder)
        given = {key: worked_out(meta[key]) for key in LABELS if meta.get(key) is not None}
        if "handJoints3D" not in given or "camMat" not in given:
            return UNLABELLED, values
        for key, value in given.items():
            if key == "handJoints3D" and np.size(value) == 3:
                values[key][0] = numbers(value, key, 3, unknown=True)
            else:
                values[key] = numbers(value, key, *LABELS[key], unknown=True)
        intrinsics(values["camMat"])
    except UserError as error:
        raise UserError(f"ho3d: {file}: {error}") from None
    except Exception:                    # bytes that are no pickle can fail anywhere in the decoder
        nothing = {key: np.full(dims, np.nan) for key, dims in LABELS.items()}
        return "frames with a broken label file", nothing
    whole = all(np.isfinite(np.asarray(value, float)).all() for value in given.values())
    return "" if whole else "frames with NaN labels", values


@cached
def _parse_ho3d(root: Path, home: str, labels: list[str], mano: dict | None = None) -> Index:
    """One row a line of the list: all that `index_ho3d` reads from the labels."""
    read = [_label(root / file)
            for file in tqdm(labels, "reading ho3d", disable=len(labels) < 2000)]
    column = {key: np.array([values[key] for _, values in read]) for key in LABELS}
    n = len(read)
    evaluation = home == "evaluation"
    wrists = column["handJoints3D"][:, 0] @ OPENGL
    truth = {"xyz": column["handJoints3D"]}
    notes = []
    if evaluation:
        truth, notes = _truth(root, wrists)
    joints = truth["xyz"][:, MANO_TO_OURS] @ OPENGL
    pose = column["handPose"].copy()
    turn = torch.tensor(OPENGL) @ axis_angle_to_matrix(torch.tensor(pose[:, :3]))
    pose[:, :3] = matrix_to_axis_angle(turn).numpy()
    trans = np.full((n, 3), np.nan)
    if "right" in (mano or {}):
        pivot = rest_wrists(mano["right"], column["handBeta"])
        trans = (pivot + column["handTrans"]) @ OPENGL - pivot
    elif not evaluation:
        notes.append("trans is not known: it needs the MANO file")
    uv = pinhole(joints, column["camMat"])
    box = tight_box(uv)
    if evaluation:
        corners = column["handBoundingBox"]                       # x1 y1 x2 y2
        box = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    numbers = {"box": box, "K": column["camMat"], "joints": joints, "uv": uv, "pose": pose,
               "shape": column["handBeta"], "trans": trans, "root": wrists}
    if "verts" in truth:
        numbers["verts"] = truth["verts"] @ OPENGL
    pictures = [label.replace("/meta/", "/rgb/").replace(".pkl", ".png") for label in labels]
    return Index(f"ho3d {'test' if evaluation else 'train'}", str(root), {
        "paths": path_column(pictures), "side": np.full(n, "right"), "image_id": np.arange(n),
        "reason": np.array([reason for reason, _ in read]),
        **{name: value.astype(np.float32) for name, value in numbers.items()}},
        "annotated" if evaluation else "joints", notes=notes)


def _truth(root: Path, wrists: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    """xyz (N, 21, 3) and, if there, verts of the evaluation, HO3D's axes and order, m; notes.

    Its first joint must be the labels' wrist (N, 3) m: else it is of other frames or in other axes.
    """
    found = {"xyz": np.full((len(wrists), N_JOINTS, 3), np.nan)}
    notes = []
    for kind, dims in (("xyz", (N_JOINTS, 3)), ("verts", (N_VERTS, 3))):
        file = root / f"evaluation_{kind}.json"
        if not file.is_file():
            notes.append(f"{file} is not there, so {kind} cannot be scored")
            continue
        found[kind] = json_numbers(file, dims)
        if len(found[kind]) != len(wrists):
            raise UserError(f"ho3d: {file} has {len(found[kind]):,} entries, evaluation.txt "
                            f"{len(wrists):,} frames")
    apart = np.linalg.norm(found["xyz"][:, 0] @ OPENGL - wrists, axis=-1)
    if np.isfinite(apart).any() and np.nanmedian(apart) > 0.01:
        raise UserError(f"ho3d: {root}/evaluation_xyz.json lies {1000 * np.nanmedian(apart):.0f} "
                        "mm from the wrists in evaluation/*/meta: it is of other frames or in "
                        "other axes")
    return found, notes


HO3D = DataSet(index_ho3d, joints=Joints("ho3d"))


# ---- Official protocol ---------------------------------------------------------------------------


def ho3d_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """The official script's: FreiHAND's twelve, and joints after scale and translation."""
    scaled = n_mpjpe(f["joints"], f["true"], f["ok"], root=ROOT)
    return freihand_scores(f) | {"st_mpjpe_mm": 1000 * scaled, "st_auc": auc(scaled)}


def submit_ho3d(out: Path, index: Index, kept: dict[str, Tensor]) -> Path:
    """pred.zip in the folder `out`, as the server reads it: OpenGL axes, joints in MANO's order."""
    every_sample(index)
    axes = torch.tensor(OPENGL).float()
    verts = kept["verts"] @ axes if "verts" in kept else None
    joints = kept["joints"][:, np.argsort(MANO_TO_OURS)] @ axes
    return write_submission(out / "pred.zip", joints, verts)


PROTOCOLS = {"ho3d": ho3d_scores}
