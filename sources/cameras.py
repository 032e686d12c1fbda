"""Synchronised cameras of any rig: frames/NAME/FRAME.jpg, cameras.json, labels/NAME/FRAME.json."""
from __future__ import annotations

import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError
from sources.files import cached, data_folder, path_column, pictures_below
from sources.index import DataSet, Index, Joints, tight_box
from sources.parsing import (
    below, file_bytes, hand_labels, intrinsics, numbers, parse_json, reading, rotations)
from sources.pictures import detect_hands, read_image, undistort

import numpy as np
from tqdm import tqdm


def index_cameras(root: str | Path, split: str = "train", cache: str | Path | None = None) -> Index:
    """Synchronised cameras of any rig, a row a picture with a hand in it; `Views` makes moments.

    cameras.json: {"NAME": {"K", "R", "t", "dist"?, "frames"?}, ..., "unit_m"?, "side"?}, where
    x_cam = R x + t, dist is OpenCV's (2 to 8 numbers), frames is {FRAME: {"R", "t"}} for cameras
    that move, unit_m is metres a unit of t (without it lengths stay in that unit, and the samples'
    scale is NaN) and side is the hand's, right. Pictures are frames/NAME/FRAME.jpg; labels are
    labels/NAME/FRAME.json (see `hand_labels`), or MediaPipe's if there is no folder labels. Labels
    and pictures are undistorted. The first 80 % of the frames train, the others test; or all. Left
    out and counted: pictures without a label. UserError: another layout, no label and no MediaPipe.
    """
    root = data_folder(root, "cameras")
    cameras = _rig(root)[0]
    pictures = {name: {Path(file).stem: f"frames/{name}/{file}"
                       for file in pictures_below(root / "frames" / name)} for name in cameras}
    frames = sorted(set().union(*pictures.values()))
    if not frames:
        raise UserError(f"cameras: {root}/frames/ must hold a folder of pictures for each camera "
                        f"of cameras.json ({', '.join(cameras)})")
    cut = math.ceil(0.8 * len(frames))
    frames = {"train": frames[:cut], "test": frames[cut:], "all": frames}[split]
    wanted = {frame: {name: pictures[name][frame] for name in cameras if frame in pictures[name]}
              for frame in frames}
    files = [file for of_frame in wanted.values() for file in of_frame.values()]
    labels = [str(p.relative_to(root)) for p in sorted((root / "labels").glob("*/*.json"))]
    return _parse_cameras(root, f"cameras {split}", wanted, cache=cache,
                          files=["cameras.json", *files, *labels])


def _rig(root: Path) -> tuple[dict[str, dict], float, str]:
    """cameras.json as cameras in the order of their names, metres a unit or NaN, and the side."""
    file = root / "cameras.json"
    with reading(f"cameras: {file}"):
        rig = parse_json(file_bytes(file))
        unit = rig.pop("unit_m", None)
        unit = math.nan if unit is None else float(numbers(unit, "unit_m", least=1e-9))
        side = rig.pop("side", "right")
        if side not in ("left", "right") or not rig:
            raise ValueError("side must be left or right, and one camera at least must be there")
        cameras = {}
        for name, given in sorted(rig.items()):
            if not isinstance(given, dict) or not {"K"} <= given.keys():
                raise ValueError(f"{name!r} must give a camera's K (3 x 3), R (3 x 3) and t (3)")
            cameras[below(name, "the name of a camera")] = _camera(name, given)
    return cameras, unit, side


def _camera(name: str, given: dict) -> dict:
    """A camera of cameras.json as arrays: K, dist (8,) and {frame: M (4, 4)}, "" for others."""
    lens = given.get("dist", [0.0] * 5)
    if not isinstance(lens, list) or len(lens) > 8:
        raise ValueError(f"{name}'s dist must be a list of at most 8 numbers; fisheye and "
                         "thin-prism lenses are not known")
    dist = numbers(lens, f"{name}'s dist", len(lens), least=-1000, most=1000)
    M = {frame: _extrinsics(name, place) for frame, place in given.get("frames", {}).items()}
    if "R" in given or not M:
        M[""] = _extrinsics(name, given)
    K = intrinsics(numbers(given["K"], f"{name}'s K", 3, 3), f"{name}'s K")
    return {"K": K, "M": M, "dist": np.pad(dist, (0, 8 - len(dist)))}


def _extrinsics(name: str, place: dict) -> np.ndarray:
    """R and t as one matrix (4, 4), world to camera; ValueError where R is no rotation."""
    M = np.eye(4)
    M[:3, :3] = rotations(numbers(place["R"], f"{name}'s R", 3, 3), f"{name}'s R")
    M[:3, 3] = numbers(place["t"], f"{name}'s t", 3)
    return M


def _detected(path: Path, side: str) -> tuple[np.ndarray, np.ndarray]:
    """The surest hand that MediaPipe sees, as `hand_labels` gives them.

    A hand of the other side counts half: the detector mistakes sides, more than it mistakes hands.
    """
    best = 0.0
    label = np.full((N_JOINTS, 2), np.nan)
    for hand in detect_hands(read_image(path)):
        sure = hand["confidence"] * (1.0 if hand["side"] == side else 0.5)
        if sure >= best:
            best = sure
            label = hand["uv"]
    return label, np.full(N_JOINTS, min(best, 1.0))


@cached
def _parse_cameras(root: Path, name: str, wanted: dict[str, dict[str, str]]) -> Index:
    """The labelled pictures of some frames; `wanted` is {frame: {camera: picture}}."""
    cameras, unit, side = _rig(root)
    detect = not (root / "labels").is_dir()
    rows = []
    lost = 0
    homeless = 0
    for frame, pictures in tqdm(wanted.items(), "reading cameras", disable=len(wanted) < 100):
        for number, (camera, given) in enumerate(cameras.items()):
            if camera not in pictures:
                continue
            file = root / "labels" / camera / f"{frame}.json"
            label = np.full((N_JOINTS, 2), np.nan)
            sure = np.zeros(N_JOINTS)
            if detect:
                label, sure = _detected(root / pictures[camera], side)
            elif file.is_file():
                label, sure = hand_labels(file, side)
            M = given["M"].get(frame, given["M"].get(""))
            lost += not sure.any()
            homeless += M is None
            if sure.any() and M is not None:
                M = M.copy()
                M[:3, 3] *= 1 if math.isnan(unit) else unit
                rows.append({"path": pictures[camera], "moment": frame, "camera": number,
                             "K": given["K"], "dist": given["dist"], "cameras": M,
                             "uv_label": undistort(label, given["K"], given["dist"]),
                             "confidence": sure})
    if not rows:
        raise UserError(f"{name}: no picture below {root} has a labelled hand")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    reasons = {"pictures without a labelled hand": lost, "pictures without R and t": homeless}
    notes = ["labels from " + ("MediaPipe" if detect else "JSON files")]
    if math.isnan(unit):
        notes.append("cameras.json has no unit_m: lengths are in its own unit, not metres")
    return Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": np.full(len(rows), side),
        "scale": np.full(len(rows), unit), "box": tight_box(column["uv_label"]),
        "uv": np.full((len(rows), N_JOINTS, 2), np.nan),
        **{key: column[key] for key in ("moment", "camera", "cameras", "K", "dist", "uv_label",
                                        "confidence")}},
        "detector", {reason: n for reason, n in reasons.items() if n}, notes)


# Its labels are a detector's, as HanCo's: a mesh shows the same joints as there.
CAMERAS = DataSet(index_cameras, ("train", "test", "all"), Joints("graphormer", regressed=True))
