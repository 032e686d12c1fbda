"""cameras: reader of its official layout."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError
from sources.index import (
    DataSet, Index, Joints, cached, data_folder, hand_labels, path_column, pictures_below, stamp,
    tight_box)
from sources.pictures import detect_hands, read_image, undistort

import numpy as np
from tqdm import tqdm


def index_cameras(root: str | Path, split: str = "train", cache: str | Path | None = None) -> Index:
    """Synchronised cameras of any rig, a row a picture with a hand in it; `Views` makes moments.

    cameras.json: {"NAME": {"K", "R", "t", "dist"?, "frames"?}, ..., "unit_m"?, "side"?}, where
    x_cam = R x + t, dist is OpenCV's (2 to 8 numbers), frames is {FRAME: {"R", "t"}} for cameras that
    move, unit_m is metres a unit of t (without it lengths stay in that unit, and the samples' scale
    is NaN) and side is the hand's, right. Pictures are frames/NAME/FRAME.jpg; labels labels/NAME/FRAME
    .json (see `hand_labels`), or MediaPipe's if there is no folder labels. Labels and pictures are
    undistorted. The first 80 % of the frames train, the others test; or all. Left out and counted:
    pictures without a label. UserError: another layout, no label and no MediaPipe.
    """
    root = data_folder(root, "cameras")
    try:
        rig = json.loads((root / "cameras.json").read_bytes())
        cameras = {name: _camera(value) for name, value in sorted(rig.items())
                   if isinstance(value, dict)}
        unit, side = float(rig.get("unit_m", math.nan)), rig.get("side", "right")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cameras: {root / 'cameras.json'} must give each camera K (3 x 3), R (3 x 3) "
                        f"and t (3) ({type(error).__name__}: {error})") from error
    if side not in ("left", "right") or unit <= 0 or not cameras:
        raise UserError(f"cameras: {root / 'cameras.json'}: side must be left or right, unit_m above "
                        "0, and one camera at least must be there")
    home = root / "frames"
    files = {name: {Path(file).stem: f"frames/{name}/{file}" for file in pictures_below(home / name)}
             for name in cameras}
    frames = sorted(set().union(*files.values()))
    if not frames:
        raise UserError(f"cameras: {root}/frames/ must hold a folder of pictures for each camera of "
                        f"cameras.json ({', '.join(cameras)})")
    cut = math.ceil(0.8 * len(frames))
    frames = {"train": frames[:cut], "test": frames[cut:], "all": frames}[split]
    wanted = [files[name][frame] for frame in frames for name in cameras if frame in files[name]]
    labels = [str(p.relative_to(root)) for p in sorted((root / "labels").glob("*/*.json"))]
    key = ("cameras", os.path.realpath(root), split, stamp(root, ["cameras.json", *wanted, *labels]))
    return cached(cache, key, lambda: _index_cameras(f"cameras {split}", root, cameras, files, frames,
                                                      unit, side))


def _camera(given: dict) -> dict:
    """A camera of cameras.json as arrays: K, dist, and M (4, 4) of each frame, "" for all others."""
    number = lambda value, *dims: np.array(value, float).reshape(dims)

    def matrix(place: dict) -> np.ndarray:
        M = np.eye(4)
        M[:3, :3], M[:3, 3] = number(place["R"], 3, 3), number(place["t"], 3)
        if np.abs(M[:3, :3] @ M[:3, :3].T - np.eye(3)).max() > 1e-3 or np.linalg.det(M[:3, :3]) < 0:
            raise ValueError("R is no rotation")
        return M

    dist = number(given.get("dist", [0.0] * 5), -1)
    if len(dist) > 8:
        raise ValueError("dist has more than 8 numbers; fisheye and thin-prism lenses are not known")
    moving = {frame: matrix(place) for frame, place in given.get("frames", {}).items()}
    fixed = {"": matrix(given)} if "R" in given or not moving else {}
    return {"K": number(given["K"], 3, 3), "dist": dist, "M": fixed | moving}


def _surest(path: Path, side: str) -> tuple[np.ndarray, np.ndarray]:
    """The surest hand that MediaPipe sees, as `hand_labels` gives them; one of the other side counts half."""
    rank_of = lambda hand: hand["confidence"] * (1.0 if hand["side"] == side else 0.5)
    hands = sorted(detect_hands(read_image(path)), key=rank_of)
    if not hands:
        return np.full((N_JOINTS, 2), np.nan), np.zeros(N_JOINTS)
    return hands[-1]["uv"], np.full(N_JOINTS, min(rank_of(hands[-1]), 1.0))


def _index_cameras(name: str, root: Path, cameras: dict, files: dict, frames: list[str], unit: float,
                   side: str) -> Index:
    """`index_cameras` without the cache."""
    detect = not (root / "labels").is_dir()
    rows, lost, homeless = [], 0, 0
    for frame in tqdm(frames, "reading cameras", disable=len(frames) < 100):
        for number, (camera, given) in enumerate(cameras.items()):
            if frame not in files[camera]:
                continue
            file = root / "labels" / camera / f"{frame}.json"
            M = given["M"].get(frame, given["M"].get(""))
            label, sure = (_surest(root / files[camera][frame], side) if detect else hand_labels(file, side)
                           if file.is_file() else (np.full((N_JOINTS, 2), np.nan), np.zeros(N_JOINTS)))
            lost, homeless = lost + (not sure.any()), homeless + (M is None)
            if sure.any() and M is not None:
                M = M.copy()
                M[:3, 3] *= 1 if math.isnan(unit) else unit
                rows.append({"path": files[camera][frame], "moment": frame, "camera": number,
                             "K": given["K"],
                             "dist": np.pad(given["dist"], (0, 8 - len(given["dist"]))),
                             "cameras": M, "uv_label": undistort(label, given["K"], given["dist"]),
                             "confidence": sure})
    if not rows:
        raise UserError(f"{name}: no picture below {root} has a labelled hand")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    dropped = {reason: n for reason, n in (("pictures without a labelled hand", lost),
                                           ("pictures without R and t", homeless)) if n}
    notes = ["labels from " + ("MediaPipe" if detect else "JSON files")]
    if math.isnan(unit):
        notes.append("cameras.json has no unit_m: lengths are in its own unit, not metres")
    return Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": np.full(len(rows), side),
        "scale": np.full(len(rows), unit), "box": tight_box(column["uv_label"]),
        "uv": np.full((len(rows), N_JOINTS, 2), np.nan),
        **{key: column[key] for key in ("moment", "camera", "cameras", "K", "dist", "uv_label",
                                        "confidence")}}, "detector", dropped, notes)


# Its labels are a detector's, as HanCo's: a mesh shows the same joints as there.
CAMERAS = DataSet(index_cameras, ("train", "test", "all"), Joints("graphormer", regressed=True))
