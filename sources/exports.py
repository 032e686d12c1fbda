"""What predictions of your own pictures become: JSON, overlays and meshes."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, ROOT, invert, matrix_to_axis_angle, place, transform, view_intrinsics)
from hand.drawing import draw_mesh, draw_side, draw_skeleton, label, save_png, sheet
from sources.index import Index, unmirror
from sources.pictures import read_image

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SMALLEST, LARGEST = 640, 1280                            # px of an overlay's longer side


# ---- Photos --------------------------------------------------------------------------------------


def flat_name(path: str) -> str:
    """sub/photo.jpg -> sub__photo.jpg, so that every photo has a file of its own."""
    return path.replace("/", "__")


def obj_text(verts: Tensor, faces: Tensor, side: str) -> str:
    """A mesh (M, 3) as the text of an .obj file; a left hand's triangles turn the other way."""
    order = faces[:, [0, 2, 1]] if side == "left" else faces
    return ("".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in verts.tolist())
            + "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in order.tolist()))


def described(batch: dict, pred: dict[str, Tensor], index: Index, known: np.ndarray) -> list[dict]:
    """Predictions as JSON-able hands of their photo: un-mirrored, px of the photo, metres.

    joints and verts are in the camera's frame: where the network puts them, else where 2D sees
    them.
    """
    K = view_intrinsics(batch)
    back = invert(batch["crop"].double())
    uv = transform(back, pred["uv"].double())
    wrist = pred["joints"][:, ROOT]
    shift = pred["root"] - wrist if "root" in pred else place(pred["joints"], pred["uv"], K)
    shift = shift[:, None]
    moved = {key: pred[key] + shift for key in ("joints", "verts") if key in pred}
    plain = unmirror(moved | {"pose": pred["pose"]} if "pose" in pred else moved, batch["side"])
    boxes = index.columns.get("box", np.full((len(index), 4), np.nan))
    out = []
    for i, row in enumerate(batch["index"].tolist()):
        box = boxes[row].tolist() if np.isfinite(boxes[row]).all() else None
        hand = {"path": index.path(row), "id": index.id(row), "side": batch["side"][i], "box": box,
                "joints": plain["joints"][i].tolist(), "uv": uv[i].tolist(),
                "K": index.columns["K"][row].tolist(), "metric": bool(known[row])}
        if "pose" in plain:
            hand["pose"] = matrix_to_axis_angle(plain["pose"][i]).flatten().tolist()
        hand |= {key: pred[key][i].tolist() for key in ("shape",) if key in pred}
        out.append(hand | ({"verts": plain["verts"][i]} if "verts" in plain else {}))
    return out


def draw_photo(out: Path, root: Path, path: str, hands: list[dict], faces: Tensor) -> None:
    """OUT/PHOTO.png: the photo with every hand's mesh and bones, two sides of each beside it."""
    photo = Image.fromarray(read_image(root / path))
    s = min(max(1.0, SMALLEST / max(photo.size)), LARGEST / max(photo.size))
    size = (round(photo.width * s), round(photo.height * s))
    image = photo.resize(size, Image.Resampling.LANCZOS)
    A = np.array([[s, 0, (s - 1) / 2], [0, s, (s - 1) / 2], [0, 0, 1]])  # x to (x + 0.5) s - 0.5
    drawn = image
    for hand in hands:
        verts = hand.get("verts", torch.zeros(1, 3))
        if verts.isfinite().all() and (verts[:, 2] > 0.02).all():             # before the camera
            order = faces[:, [0, 2, 1]] if hand["side"] == "left" else faces
            K = torch.tensor(A @ np.array(hand["K"])).float()
            drawn = draw_mesh(drawn, verts, order, K, alpha=0.75)
    for hand in hands:
        uv = np.array(hand["uv"]) * s + (s - 1) / 2
        drawn = draw_bones(drawn, uv)
    side = max(120, min(300, drawn.height // max(1, len(hands))))
    beside = Image.new("RGB", (2 * side, max(drawn.height, side * len(hands))), "white")
    for k, hand in enumerate(hands):
        for j, turn in enumerate((90.0, -45.0)):
            cell = draw_side(np.array(hand["joints"]), side, turn=turn)
            beside.paste(cell, (j * side, k * side))
        top = beside.crop((0, k * side, side, k * side + 24))
        beside.paste(label(top, f"{hand['side']} hand", 13), (0, k * side))
    sheet_ = Image.new("RGB", (drawn.width + beside.width, beside.height), "white")
    sheet_.paste(drawn, (0, 0))
    sheet_.paste(beside, (drawn.width, 0))
    save_png(out / f"{flat_name(path)}.png", sheet_)


def draw_bones(image: Image.Image, uv: np.ndarray) -> Image.Image:
    """One hand's bones over a photo, with lines as thick as the hand is large."""
    low, high = np.floor(uv.min(0)).astype(int), np.ceil(uv.max(0)).astype(int)
    reach = int(max(high - low) // 8 + 8)
    box = (*np.maximum(low - reach, 0).tolist(), *np.minimum(high + reach, image.size).tolist())
    if not np.isfinite(uv).all() or box[2] - box[0] < 4 or box[3] - box[1] < 4:
        return image                                              # the hand lies outside the photo
    out = image.copy()
    out.paste(draw_skeleton(image.crop(box), uv - np.array(box[:2])), box[:2])
    return out


# ---- Moments of several cameras ------------------------------------------------------------------


class Fused(NamedTuple):
    """Moments' hands in the world, as a network and its fusion give them; NaN where two views lack.

    joints (B, 21, 3) and verts (B, 778, 3) in world axes, verts only where the rig's unit is known;
    camera (B, V, 21, 3) in each camera's frame; uv (B, V, 21, 2) px of the stored squares; error
    (B,) px of the pictures, from uv to the network's own 2D, mean over views and joints.
    """

    joints: Tensor
    verts: Tensor | None
    camera: Tensor
    uv: Tensor
    error: Tensor


def camera_of(path: str) -> str:
    """frames/NAME/FRAME.jpg -> NAME."""
    return Path(path).parent.name


def of_moment(batch: dict, found: Fused, pictures: list[str], i: int) -> dict:
    """One moment as JSON: in the world, and in every camera that has a picture of it."""
    back = invert(batch["crop"][i].double())
    uv = transform(back, found.uv[i].double())
    views = {camera_of(path): {"picture": path, "joints": found.camera[i, v].tolist(),
                               "uv": uv[v].tolist()}
             for v, path in enumerate(pictures) if path}
    return {"frame": batch["id"][i], "side": batch["side"][i],
            "unit": "m" if found.verts is not None else "cameras.json's own",
            "joints": found.joints[i].tolist(), "reprojection_px": float(found.error[i]),
            "cameras": views}


def draw_moment(path: Path, batch: dict, found: Fused, pictures: list[str], faces: Tensor, i: int
                ) -> None:
    """The fused hand in all views: bones, and below them the mesh, over the pictures' squares."""
    there = [v for v, picture in enumerate(pictures) if picture]
    image = batch["image"][i].cpu()
    rows = [[draw_skeleton(image[v], found.uv[i, v], width=300) for v in there]]
    if found.verts is not None:
        left = batch["side"][i] == "left"                    # squares show left hands mirrored
        D = torch.tensor([-1.0 if left else 1.0, 1, 1], dtype=torch.float64)
        M = batch["cameras"][i].double().cpu()
        verts = (found.verts[i].cpu() * D) @ M[:, :3, :3].mT + M[:, None, :3, 3]       # (V, 778, 3)
        rows.append([draw_mesh(image[v], verts[v], faces, batch["K"][i, v], width=300)
                     for v in there])
    sheet(path, rows, [camera_of(pictures[v]) for v in there], ["bones", "mesh"][:len(rows)],
          width=40 + 306 * len(there))


def bone_lengths(joints: Tensor) -> Tensor:
    """Joints (..., 21, 3) -> the lengths (..., 20) of the bones that end in joints 1 to 20."""
    parents = [0 if k % 4 == 1 else k - 1 for k in range(1, N_JOINTS)]
    return (joints[..., 1:, :] - joints[..., parents, :]).norm(dim=-1)
