"""HanCo (contra-hand cddbad2), with the 2D labels and the scores of HaMuCo (7a6885b)."""
from __future__ import annotations

import os
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, n_mpjpe, pa_mpjpe
from sources.files import cached, data_folder, note_poses, path_column
from sources.index import DataSet, Index, Joints, pinhole, poses_in_cameras
from sources.parsing import (
    file_bytes, hand_labels, intrinsics, numbers, parse_json, reading, rotations)

import numpy as np
from torch import Tensor
from tqdm import tqdm


HANCO_TRAIN = 1200                                  # HaMuCo trains on sequences below (Sec. 4.1)
HANCO_BOX = (60.0, 60.0, 104.0, 104.0)              # of 224 px pictures, which are crops already
HANCO_FOLDERS = ("rgb", "rgb_merged", "rgb_homo", "rgb_color_auto", "rgb_color_sample")
HANCO_LABELS = ("rgb_2D_keypoints", "rgb_2d_keypoints")         # how HaMuCo's files are spelled


def index_hanco(root: str | Path, split: str = "train", part: str = "", mano: dict | None = None,
                cache: str | Path | None = None) -> Index:
    """HanCo in its official layout, a row a picture; `Views` makes moments of eight cameras of it.

    HaMuCo's split: sequences below 1200 train, the others test. Pictures are `rgb` for training and
    `rgb_merged`, which only some sequences have, for testing; a part names one folder for both.
    Calibration is per frame, M takes the world to the camera. Labels are rgb_2D_keypoints (or
    rgb_2d_keypoints)/SSSS/camC/F.json, see `hand_labels`; without them uv_label is NaN. Joints and
    fits are read where they are there. With the user's own mano["right"], pose, shape and trans are
    the fit in the camera, the mean added. Counted: missing pictures, labels, joints. UserError:
    another layout.
    """
    if part and part not in HANCO_FOLDERS:
        raise UserError(f"hanco has the parts {', '.join(HANCO_FOLDERS)}, not {part!r}")
    root = data_folder(root, "hanco")
    home = root / "calib"
    folder = part or {"train": "rgb", "test": "rgb_merged"}[split]
    known = sorted(p.name for p in home.iterdir() if p.name.isdigit()) if home.is_dir() else []
    names = [name for name in known if (int(name) < HANCO_TRAIN) == (split == "train")]
    if not names:
        side = "below" if split == "train" else "from"
        raise UserError(f"hanco: {home} must hold the folders of the sequences, {split} those "
                        f"{side} {HANCO_TRAIN}; it has {len(known)}")
    labels = next((top for top in HANCO_LABELS if (root / top).is_dir()), "")
    cameras = [f"{top}/{name}/cam{c}" for name in names for top in (folder, labels) if top
               for c in range(8)]
    files = [f"{top}/{name}" for name in names for top in ("calib", "xyz", "shape")] + cameras
    index = _parse_hanco(root, f"hanco:{folder} {split}", folder, labels, names, cache=cache,
                         files=[file for file in files if (root / file).is_dir()], mano=mano)
    return note_poses(index)


def _moment(root: Path, folder: str, labels: str, sequence: str, frame: str,
            there: list[set[str]]) -> list[dict]:
    """The pictures of one time step that are there."""
    def file(top: str) -> Path:
        return root / top / sequence / f"{frame}.json"

    with reading(f"hanco: {file('calib')}"):
        calibration = parse_json(file_bytes(file("calib")))
        K = intrinsics(numbers(calibration["K"], "K", 8, 3, 3))
        M = numbers(calibration["M"], "M", 8, 4, 4)
        rotations(M[:, :3, :3], "M")
        if (M[:, 3] != [0, 0, 0, 1]).any():
            raise ValueError("M must end in the row 0, 0, 0, 1")
    xyz = np.full((N_JOINTS, 3), np.nan)
    if file("xyz").is_file():
        with reading(f"hanco: {file('xyz')}"):
            xyz = numbers(parse_json(file("xyz").read_bytes()), "xyz", N_JOINTS, 3)
    fit = {"poses": np.full(48, np.nan), "shapes": np.full(10, np.nan),
           "global_t": np.full(3, np.nan)}
    if file("shape").is_file():
        with reading(f"hanco: {file('shape')}"):
            found = parse_json(file("shape").read_bytes())
            fit = {key: numbers(found[key], key, len(row)) for key, row in fit.items()}
    rows = []
    for camera in [c for c in range(8) if f"{frame}.jpg" in there[c]]:
        detected = root / labels / sequence / f"cam{camera}" / f"{frame}.json"
        label = np.full((N_JOINTS, 2), np.nan)
        sure = np.zeros(N_JOINTS)
        if labels and detected.is_file():
            label, sure = hand_labels(detected)
        rows.append({"path": f"{folder}/{sequence}/cam{camera}/{frame}.jpg", "camera": camera,
                     "moment": f"{sequence}/{frame}", "K": K[camera], "cameras": M[camera],
                     "joints": xyz @ M[camera, :3, :3].T + M[camera, :3, 3], "uv_label": label,
                     "confidence": sure, "pose": fit["poses"], "shape": fit["shapes"],
                     "trans": fit["global_t"]})
    return rows


@cached
def _parse_hanco(root: Path, name: str, folder: str, labels: str, names: list[str],
                 mano: dict | None = None) -> Index:
    """All pictures of some sequences."""
    rows = []
    moments = 0
    for sequence in tqdm(names, "reading hanco", disable=len(names) < 20):
        homes = [root / folder / sequence / f"cam{c}" for c in range(8)]
        there = [set(os.listdir(home)) if home.is_dir() else set() for home in homes]
        for file in sorted((root / "calib" / sequence).glob("*.json")):
            rows += _moment(root, folder, labels, sequence, file.stem, there)
            moments += 1
    if not rows:
        raise UserError(f"{name}: not one of {moments} frames has a picture in {root / folder}")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    column["uv"] = pinhole(column["joints"], column["K"])
    n = len(rows)
    fit = {"pose": np.full((n, 48), np.nan), "shape": column["shape"],
           "trans": np.full((n, 3), np.nan)}
    if "right" in (mano or {}):
        fit["pose"], fit["trans"] = poses_in_cameras(mano["right"], column["pose"], column["shape"],
                                                     column["trans"], column["cameras"])
    missing = 8 * moments - n
    labelled, annotated = (int(np.isfinite(column[key]).all(-1).any(-1).sum())
                           for key in ("uv_label", "joints"))
    return Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": np.full(n, "right"),
        "moment": column["moment"], "camera": column["camera"],
        "box": np.tile(np.float32(HANCO_BOX), (n, 1)), "cameras": column["cameras"],
        **{key: column[key].astype(np.float32)
           for key in ("K", "joints", "uv", "uv_label", "confidence")},
        **{key: value.astype(np.float32) for key, value in fit.items()}},
        dropped={"pictures that are not there": missing} if missing else {},
        notes=[f"{len(names)} sequences, {moments} time steps, {labelled} pictures with 2D labels, "
               f"{annotated} with joints"])


# Its joints are those of a network, which no mesh defines; HaMuCo, whose split and scores these
# are, compares them with joints that it regresses from the posed mesh, and with these tips.
HANCO = DataSet(index_hanco, ("train", "test"), Joints("graphormer", regressed=True))


# ---- Official protocol ---------------------------------------------------------------------------


def hanco_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """HaMuCo's two errors; theirs are means of batches' means, these count every picture alike."""
    return {"n_mpjpe_mm": 1000 * n_mpjpe(f["joints"], f["true"], f["ok"]),
            "pa_mpjpe_mm": 1000 * pa_mpjpe(f["joints"], f["true"], f["ok"])}


PROTOCOLS = {"hanco": hanco_scores}
