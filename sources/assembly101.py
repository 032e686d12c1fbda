"""Assembly101's headset views, as AssemblyHands labels them (assemblyhands-toolkit 73fe963)."""
from __future__ import annotations

import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, mpjpe
from sources.files import cached, data_folder, drop_missing, path_column
from sources.index import DataSet, Index, pinhole
from sources.interhand import INTERHAND_TO_OURS
from sources.parsing import (
    below, hand_labels, intrinsics, numbers, parse_json, reading, rotations, whole)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# The four cameras of either headset, in the order of the places where they sit on it.
HEADSETS = (("HMC_84346135", "HMC_84347414", "HMC_84355350", "HMC_84358933"),
            ("HMC_21176875", "HMC_21176623", "HMC_21110305", "HMC_21179183"))
SEEN = 10                                           # joints, or the tool kit skips the hand


def index_assembly101(root: str | Path, split: str = "train",
                      cache: str | Path | None = None) -> Index:
    """Assembly101 in AssemblyHands' layout, one row an annotated hand; `Views` makes moments.

    Assembly101's own release is videos with a tracker's poses and no lenses; AssemblyHands v1.1
    holds pictures of the headset's four cameras in 20 of its sequences, made pinhole ones, with
    annotated joints: annotations/SPLIT/assemblyhands_SPLIT_{ego_data,ego_calib,joint_3d}_v1-1.json
    over images/. The test set's truth is not public. Joints go from world mm to camera m by R X + t
    and from InterHand2.6M's order to ours; a moment is one hand in one frame, and its cameras move
    with the head. visible is what the annotators say of that view. Where labels/ holds a detector's
    2D labels of both hands, in place of images/*.jpg as *.json (not part of AssemblyHands;
    OpenPose's output, see `hand_labels`), they are uv_label and confidence, which HaMuCo learns
    from. Left out and counted: hands without a box, as they are not in view, with fewer than 10
    joints visible, without 3D joints or with NaN, and without their picture. UserError: another
    layout.
    """
    root = data_folder(root, "assembly101")
    files = [f"annotations/{split}/assemblyhands_{split}_{kind}_v1-1.json"
             for kind in ("ego_data", "ego_calib", "joint_3d")]
    for file in files:
        if not (root / file).is_file():
            raise UserError(f"assembly101: {root / file} is missing (layout of AssemblyHands v1.1)")
    labels = sorted(folder.relative_to(root).as_posix()
                    for folder in (root / "labels").glob(f"ego_images_rectified/{split}/*/*"))
    return drop_missing(_parse_assembly101(root, f"assembly101 {split}", files,
                                           files=[*files, *labels], cache=cache))


def _compact(entry: dict) -> dict:
    """An object of the files with its numbers as arrays: lists of them would fill the memory."""
    entry.pop("keypoints", None)
    if "world_coord" in entry:
        entry["world_coord"] = numbers(entry["world_coord"], "world_coord", 42, 3, unknown=True)
    if "joint_valid" in entry:
        entry["joint_valid"] = numbers(entry["joint_valid"], "joint_valid", 42, least=0, most=1) > 0
    return entry


def _content(file: Path) -> dict:
    """What an annotation file holds."""
    with reading(f"assembly101: {file}"):
        return parse_json(file.read_bytes(), _compact)


def _camera(calibration: dict, camera: str, frame: str) -> tuple[int, np.ndarray, np.ndarray]:
    """The number of a camera on its headset, its K (3, 3) and its (4, 4) world to camera, m."""
    slot = next((names.index(camera) for names in HEADSETS if camera in names), None)
    if slot is None:
        raise ValueError(f"camera {camera!r} is on none of the two headsets")
    key = f"{camera}_mono10bit"
    K = intrinsics(numbers(calibration["intrinsics"][key], "intrinsics", 3, 3), "intrinsics")
    M = np.eye(4)
    M[:3] = numbers(calibration["extrinsics"][frame][key], "extrinsics", 3, 4)
    rotations(M[:3, :3], "extrinsics")
    M[:3, 3] /= 1000
    return slot, K, M


def _hands(note: dict, image: dict, root: Path, tables: list[dict]) -> list[dict | str]:
    """A picture's hands, right and left, and the reasons where one is left out."""
    calibrations, frames = tables
    sequence = image["seq_name"]
    frame = f"{whole(image['frame_idx'], 'frame_idx'):06d}"
    path = below(image["file_name"], "file_name")
    found = []
    for number, side in enumerate(("right", "left")):
        own = slice(N_JOINTS * number, N_JOINTS * (number + 1))
        seen = note["joint_valid"][own]
        if note["bbox"][side] is None:
            found.append("hands without a box")
        elif seen.sum() < SEEN:
            found.append("hands with fewer than 10 visible joints")
        elif not (frame in frames.get(sequence, {})
                  and frames[sequence][frame]["joint_valid"][own].any()):
            found.append("hands without 3D joints")
        else:
            true = frames[sequence][frame]
            slot, K, M = _camera(calibrations[sequence], image["camera"], frame)
            known = true["joint_valid"][own, None]
            world = np.where(known, true["world_coord"][own], np.nan)
            label = np.full((N_JOINTS, 2), np.nan)
            sure = np.zeros(N_JOINTS)
            file = (root / "labels" / path).with_suffix(".json")
            if file.is_file():
                label, sure = hand_labels(file, side, both=True)
            found.append({
                "path": f"images/{path}", "id": f"{path}-{side}", "side": side, "K": K,
                "moment": f"{sequence}/{frame}-{side}", "camera": slot, "cameras": M,
                "box": numbers(note["bbox"][side], "bbox", 4), "world": world / 1000,
                "broken": np.isnan(world[known[:, 0]]).any(), "visible": seen,
                "uv_label": label, "confidence": sure})
    return found


@cached
def _parse_assembly101(root: Path, name: str, files: list[str]) -> Index:
    """All hands of a split, from its annotation files."""
    data, calibrations, joints = (_content(root / file) for file in files)
    found: list[dict | str] = []
    with reading(f"assembly101: {root / files[0]}, or what belongs to it"):
        images = {image["id"]: image for image in data["images"]}
        tables = [calibrations["calibration"], joints["annotations"]]
        notes = data["annotations"]
        for note in tqdm(notes, "reading assembly101", disable=len(notes) < 2000):
            found += _hands(note, images[note["image_id"]], root, tables)
    rows = [row for row in found if isinstance(row, dict)]
    reasons = [row for row in found if isinstance(row, str)]
    dropped = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    if not rows:
        raise UserError(f"{name}: {root / files[0]} has no hand to read, left out {dropped}")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    order = list(INTERHAND_TO_OURS)
    M = column["cameras"]
    joints = np.einsum("nij,nkj->nki", M[:, :3, :3], column["world"][:, order]) + M[:, None, :3, 3]
    box = np.concatenate([column["box"][:, :2], column["box"][:, 2:] - column["box"][:, :2]], 1)
    numbers = {"box": box, "K": column["K"], "joints": joints, "uv": pinhole(joints, column["K"])}
    if np.isfinite(column["uv_label"]).any():
        numbers |= {key: column[key] for key in ("uv_label", "confidence")}
    index = Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "visible": column["visible"][:, order],
        **{key: column[key] for key in ("side", "id", "moment", "camera", "cameras")},
        **{key: value.astype(np.float32) for key, value in numbers.items()}}, "annotated", dropped)
    return index.drop(column["broken"], "hands with NaN")


# Its joints are annotated as points, which no mesh defines.
ASSEMBLY101 = DataSet(index_assembly101, ("train", "val"))


# ---- Official protocol ---------------------------------------------------------------------------


def assembly101_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """AssemblyHands': visible joints, wrist on wrist, the mean over 42 joints of each one's mean.

    Two of the 42 are the wrists, at zero.
    """
    error = mpjpe(f["joints"], f["true"], f["ok"]).masked_fill(~f["visible"], math.nan)
    left = f["left"][:, None]
    wide = torch.cat([error.masked_fill(left, math.nan), error.masked_fill(~left, math.nan)], 1)
    return {"mpjpe_mm": 1000 * wide}


PROTOCOLS = {"assembly101": assembly101_scores}
