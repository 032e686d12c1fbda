"""hanco: reader of its official layout."""
from __future__ import annotations

import json
import os
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, Mano, UserError, axis_angle_to_matrix, matrix_to_axis_angle, n_mpjpe, pa_mpjpe)
from sources.index import (
    DataSet, Index, Joints, cached, data_folder, hand_labels, hand_stamp, note_poses, path_column,
    stamp)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


# HanCo (contra-hand cddbad2), with the 2D labels that zxz267/HaMuCo 7a6885b released beside it.

HANCO_TRAIN = 1200                                  # sequences below are trained on (HaMuCo, Sec. 4.1)
HANCO_BOX = (60.0, 60.0, 104.0, 104.0)              # of the 224 px pictures, which are crops already
HANCO_FOLDERS = ("rgb", "rgb_merged", "rgb_homo", "rgb_color_auto", "rgb_color_sample")


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
    root, home = data_folder(root, "hanco"), Path(root).expanduser() / "calib"
    folder = part or {"train": "rgb", "test": "rgb_merged"}[split]
    known = sorted(p.name for p in home.iterdir() if p.name.isdigit()) if home.is_dir() else []
    names = [name for name in known if (int(name) < HANCO_TRAIN) == (split == "train")]
    if not names:
        raise UserError(f"hanco: {home} must hold the folders of the sequences, {split} those "
                        f"{'below' if split == 'train' else 'from'} {HANCO_TRAIN}; it has {len(known)}")
    below = [f"{top}/{name}" for name in names
             for top in ("calib", "xyz", "shape", *(f"{folder}/{name}/cam{c}" for c in range(8)))
             if (root / top / name).is_dir()]
    key = ("hanco", os.path.realpath(root), split, folder, stamp(root, below), hand_stamp(mano))
    return cached(cache, key, lambda: _index_hanco(f"hanco:{folder} {split}", root, folder, names,
                                                    mano))


def _hanco_moment(root: Path, folder: str, labels: str, sequence: str, frame: str,
                  there: list[set[str]]) -> list[dict]:
    """The pictures of one time step that are there."""
    read = lambda top: json.loads((root / top / sequence / f"{frame}.json").read_bytes())
    number = lambda value, *dims: np.array(value, float).reshape(dims)
    calib, fit = read("calib"), {}
    K, M = number(calib["K"], 8, 3, 3), number(calib["M"], 8, 4, 4)
    xyz = np.full((N_JOINTS, 3), np.nan)
    if (root / "xyz" / sequence / f"{frame}.json").is_file():
        xyz = number(read("xyz"), N_JOINTS, 3)
    if (root / "shape" / sequence / f"{frame}.json").is_file():
        fit = read("shape")
    pose, shape, trans = (number(fit.get(name, np.full(n, np.nan)), n)
                          for name, n in (("poses", 48), ("shapes", 10), ("global_t", 3)))
    rows = []
    for camera in [c for c in range(8) if f"{frame}.jpg" in there[c]]:
        file = root / labels / sequence / f"cam{camera}" / f"{frame}.json"
        label, sure = (hand_labels(file) if labels and file.is_file()
                       else (np.full((N_JOINTS, 2), np.nan), np.zeros(N_JOINTS)))
        joints = xyz @ M[camera, :3, :3].T + M[camera, :3, 3]
        uv = joints @ K[camera].T
        rows.append({"path": f"{folder}/{sequence}/cam{camera}/{frame}.jpg", "camera": camera,
                     "moment": f"{sequence}/{frame}", "K": K[camera], "cameras": M[camera],
                     "joints": joints, "uv": uv[:, :2] / uv[:, 2:], "uv_label": label,
                     "confidence": sure, "pose": pose, "shape": shape, "trans": trans})
    return rows


def _index_hanco(name: str, root: Path, folder: str, names: list[str], mano: dict | None) -> Index:
    """`index_hanco` without the cache."""
    spellings = ("rgb_2D_keypoints", "rgb_2d_keypoints")
    labels = next((top for top in spellings if (root / top).is_dir()), "")
    rows, moments = [], 0
    listed = lambda path: set(os.listdir(path)) if path.is_dir() else set()
    for sequence in tqdm(names, "reading hanco", disable=len(names) < 20):
        there = [listed(root / folder / sequence / f"cam{c}") for c in range(8)]
        for file in sorted((root / "calib" / sequence).glob("*.json")):
            try:
                rows += _hanco_moment(root, folder, labels, sequence, file.stem, there)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"hanco: {file} or what belongs to it is not as published "
                                f"({type(error).__name__}: {error})") from error
            moments += 1
    if not rows:
        raise UserError(f"{name}: not one of {moments} frames has a picture in {root / folder}")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    missing = 8 * moments - len(rows)
    index = Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": np.full(len(rows), "right"),
        "moment": column["moment"], "camera": column["camera"],
        "box": np.tile(np.float32(HANCO_BOX), (len(rows), 1)), "cameras": column["cameras"],
        **{key: column[key].astype(np.float32)
           for key in ("K", "joints", "uv", "uv_label", "confidence")},
        **_hanco_poses(column, mano)},
        dropped={"pictures that are not there": missing} if missing else {})
    count = lambda key: int(np.isfinite(column[key]).all(-1).any(-1).sum())
    index.notes.append(f"{len(names)} sequences, {moments} time steps, {count('uv_label')} pictures "
                       f"with 2D labels, {count('joints')} with joints")
    return note_poses(index)


def _hanco_poses(column: dict[str, np.ndarray], mano: dict | None) -> dict[str, np.ndarray]:
    """World fits to cameras, the mean added: turned about the rest wrist, see `Mano.to_camera`."""
    n = len(column["pose"])
    pose, trans = np.full((n, 48), np.nan), np.full((n, 3), np.nan)
    if "right" in (mano or {}):
        hand = mano["right"]
        J, M = hand["J_regressor"][0], column["cameras"]
        wrist = column["shape"] @ np.einsum("m,mcs->sc", J, hand["shapedirs"]) + J @ hand["v_template"]
        local = torch.tensor(column["pose"])
        root = matrix_to_axis_angle(torch.tensor(M[:, :3, :3]) @ axis_angle_to_matrix(local[:, :3]))
        pose = np.concatenate([root.numpy(), local[:, 3:].numpy() + hand["hands_mean"]], 1)
        trans = np.einsum("nij,nj->ni", M[:, :3, :3], wrist + column["trans"]) + M[:, :3, 3] - wrist
    return {key: value.astype(np.float32) for key, value in
            (("pose", pose), ("shape", column["shape"]), ("trans", trans))}


# Its joints are those of a network, which no mesh defines; HaMuCo, whose split and scores these are,
# compares them with joints that it regresses from the posed mesh, and with these tips.
HANCO = DataSet(index_hanco, ("train", "test"), Joints("graphormer", regressed=True))


# ---- Official protocol ----------------------------------------------------------------------------



def hanco_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """HaMuCo's two errors; theirs are means of batches' means, these count every picture alike."""
    return {"n_mpjpe_mm": 1000 * n_mpjpe(f["joints"], f["true"], f["ok"]),
            "pa_mpjpe_mm": 1000 * pa_mpjpe(f["joints"], f["true"], f["ok"])}


PROTOCOLS = {"hanco": hanco_scores}
