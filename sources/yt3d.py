"""YouTube3DHands: layout, joints and scores (arielai/youtube_3d_hands).

The frames come from its own download script.
"""
from __future__ import annotations

import math
from multiprocessing.pool import ThreadPool
from pathlib import Path

# common before torch: it settles how threads wait
from common import (
    MANO_TO_OURS, MIDDLE_MCP, N_VERTS, TIPS, Mano, UserError, auc, epe, pa_mpjpe)
from sources.files import cached, data_folder, drop_missing, path_column, pictures_below
from sources.index import DataSet, Index, Joints, tight_box
from sources.parsing import below, numbers, one_of, parse_json, reading, whole
from sources.pictures import picture_size

import numpy as np
import torch
from torch import Tensor

# Only a mesh is annotated, in pixels; its joints are regressed from it.
JOINTS = Joints("smplx", regressed=True)


def index_yt3d(root: str | Path, split: str = "train", mano: dict | None = None,
               cache: str | Path | None = None) -> Index:
    """YouTube3DHands, one row a hand: youtube_SPLIT.json in root or root/data, frames beside it.

    Vertices are pixels, with a depth on the same scale: joints and verts in metres stay NaN. For
    scores there are verts_px (N, 778, 3) and joints_px (N, 21, 3), px of the frame as it lies
    there, and frame_scale (N, 2), how much wider and higher that frame is than annotated (videos
    come in other sizes than they had; x goes to (x + 0.5) s - 0.5, the depth by the geometric
    mean). joints_px, and uv with it, are the 16 joints that the user's own mano["right"] regresses
    from the vertices, of either side, and smplx's tips; without that file only the tips are known,
    and a note says so. Boxes are tight around the vertices. Frames may be .png or .jpg; hands
    without their frame are left out and counted, videos of which nothing is there are named.
    UserError: no or foreign file.
    """
    root = data_folder(root, "yt3d")
    name = f"youtube_{split}.json"
    home = next((place for place in (root / "data", root) if (place / name).is_file()), None)
    if home is None:
        raise UserError(f"yt3d: {name} is neither in {root} nor in {root / 'data'}")
    frames = [f"youtube/{frame}" for frame in pictures_below(home / "youtube")]
    return drop_missing(_parse_yt3d(home, name, frames, files=[name, *frames], cache=cache,
                                    mano=mano))


def _compact(entry: dict) -> dict:
    """An annotation with its vertices as an array: lists of all of them would fill the memory."""
    if "vertices" in entry:
        found = numbers(entry["vertices"], "vertices", N_VERTS, 3, unknown=True)
        entry["vertices"] = found.astype(np.float32)
    return entry


def _frame_size(path: str) -> tuple[float, float]:
    """Width and height of a picture, NaN where it cannot be read."""
    try:
        return picture_size(path)
    except UserError:
        return math.nan, math.nan


@cached
def _parse_yt3d(home: Path, name: str, frames: list[str], mano: dict | None = None) -> Index:
    """All hands of an annotation file, in the size of their frames."""
    file = home / name
    listed = set(frames)
    with reading(f"yt3d: {file}"):
        content = parse_json(file.read_bytes(), _compact)
        images = {whole(image["id"], "id"): image for image in content["images"]
                  if below(image["name"], "name")}
        hands = content["annotations"]
        of = [images[hand["image_id"]] for hand in hands]
        paths = [image["name"] if image["name"] in listed
                 else Path(image["name"]).with_suffix(".jpg").as_posix() for image in of]
        annotated = np.float32([[whole(image[key], key, 1, 1 << 16)
                                 for key in ("width", "height")] for image in of]).reshape(-1, 2)
        px = np.array([hand["vertices"] for hand in hands]).reshape(-1, N_VERTS, 3)
        side = np.array(["left" if one_of(hand["is_left"], "is_left", 0, 1) else "right"
                         for hand in hands])
        ids = {key: np.array([whole(hand[key], key) for hand in hands])
               for key in ("id", "image_id")}
    there = sorted({path for path in paths if path in listed})
    with ThreadPool() as pool:
        sizes = dict(zip(there, pool.map(_frame_size, [str(home / path) for path in there])))
    scale = np.array([sizes.get(path, size) for path, size in zip(paths, annotated)], np.float32)
    scale = scale.reshape(-1, 2) / annotated                       # 1 where there is no frame
    depth = px[..., 2] * np.sqrt(scale.prod(1))[:, None]
    px = np.concatenate([(px[..., :2] + 0.5) * scale[:, None] - 0.5, depth[..., None]], -1)
    joints = np.full((len(px), 16, 3), np.nan)
    if "right" in (mano or {}):
        joints = mano["right"]["J_regressor"].astype(np.float32) @ px
    joints = np.concatenate([joints, px[:, list(TIPS[JOINTS.tips])]], 1)[:, MANO_TO_OURS]
    numbers = {"uv": joints[..., :2], "box": tight_box(px[..., :2]), "verts_px": px,
               "joints_px": joints, "frame_scale": scale}
    split = file.stem.removeprefix("youtube_")
    index = Index(f"yt3d {split}", str(home), {
        "paths": path_column(paths), "side": side, "id": ids["id"].astype(str),
        "image_id": ids["image_id"],
        **{key: value.astype(np.float32) for key, value in numbers.items()}}, "joints",
        notes=_notes(paths, frames, scale, "right" in (mano or {})))
    unreadable = np.isnan(scale).any(1)
    index = index.drop(unreadable, "unreadable pictures")
    return index.drop(~np.isfinite(px[~unreadable]).all((1, 2)), "hands with NaN")


def _videos(paths: list[str]) -> set[str]:
    """Names of the videos that frames are of."""
    return {path.split("/")[1] if path.count("/") > 1 else path for path in paths}


def _notes(paths: list[str], frames: list[str], scale: np.ndarray, known: bool) -> list[str]:
    """What belongs beside a score: videos that are missing, frames resized, joints unknown."""
    notes = []
    gone = sorted(_videos(paths) - _videos(frames))
    if gone:
        notes.append(f"not one frame of {len(gone)} videos: {', '.join(gone[:20])}"
                     + ", ..." * (len(gone) > 20))
    other = int((np.abs(scale - 1) > 1e-6).any(1).sum())
    if other:
        notes.append(f"{other} hands lie in frames of another size than annotated, and were scaled")
    if not known:
        notes.append("only the finger tips are known: the other joints need the MANO file's "
                     "regressor")
    return notes


YT3D = DataSet(index_yt3d, joints=JOINTS)


# ---- Official protocol ---------------------------------------------------------------------------


def yt3d_scores(f: dict, hand: Mano) -> dict[str, Tensor]:
    """Cross-data errors on pixel hands (N, 21, 3), which know no metres: the mean hand lends them.

    Left hands are mirrored as their predictions are. Without the MANO file most joints are unknown.
    """
    px = torch.as_tensor(f["columns"]["joints_px"]).to(f["left"].device).double()
    mirrored = px * px.new_tensor([-1.0, 1, 1])
    px = torch.where(f["left"][:, None, None], mirrored, px)
    one = hand.joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))[0].double()
    length = (one[MIDDLE_MCP + 1] - one[MIDDLE_MCP]).norm()
    bone = (px[:, MIDDLE_MCP + 1] - px[:, MIDDLE_MCP]).norm(dim=-1)
    true = px * (length / bone)[:, None, None]
    error = pa_mpjpe(f["joints"], true, true.isfinite().all(-1))
    known = f["uv_true"].isfinite().all(-1) & f["uv"].isfinite().all(-1)
    flat = epe(f["uv"], f["uv_true"], known)
    return {"pa_mpjpe_mm": 1000 * error, "pa_auc": auc(error),
            "epe_2d_px": flat, "auc_2d": auc(flat, 30.0)}


PROTOCOLS = {"yt3d": yt3d_scores}
