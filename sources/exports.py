"""What predictions of your own pictures become: JSON, overlays and meshes."""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, ROOT, invert, matrix_to_axis_angle, place, transform, view_intrinsics)
from hand.drawing import (
    draw_mesh, draw_side, draw_skeleton, label, legend, save_picture, sheet)
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
    order = turned_faces(faces, {"side": side})
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


def overlay(photo: Image.Image, hands: list[dict], faces: Tensor) -> Image.Image:
    """A photo of 640 to 1,280 px with the mesh and the bones of every hand over it."""
    s = min(max(1.0, SMALLEST / max(photo.size)), LARGEST / max(photo.size))
    size = (round(photo.width * s), round(photo.height * s))
    drawn = photo.resize(size, Image.Resampling.LANCZOS)
    A = np.array([[s, 0, (s - 1) / 2], [0, s, (s - 1) / 2], [0, 0, 1]])  # x to (x + 0.5) s - 0.5
    for hand in hands:
        verts = hand.get("verts", torch.zeros(1, 3))
        if verts.isfinite().all() and (verts[:, 2] > 0.02).all():             # before the camera
            K = torch.tensor(A @ np.array(hand["K"])).float()
            drawn = draw_mesh(drawn, verts, turned_faces(faces, hand), K, alpha=0.75)
    for hand in hands:
        drawn = draw_bones(drawn, np.array(hand["uv"]) * s + (s - 1) / 2)
    return drawn


def turned_faces(faces: Tensor, hand: dict) -> Tensor:
    """Triangles (F, 3) that face outwards: a left hand's, which was mirrored, the other way."""
    return faces[:, [0, 2, 1]] if hand["side"] == "left" else faces


def from_sides(hands: list[dict], faces: Tensor, height: int) -> Image.Image:
    """Each hand from its right and, as a mesh if there is one, from its left, all to one scale."""
    side = max(150, min(300, height // max(1, len(hands))))
    every = [np.array(hand["joints"]) for hand in hands]
    reach = 0.75 * max((float(np.ptp(joints, axis=0).max()) for joints in every), default=0.1)
    out = Image.new("RGB", (2 * side, max(height, side * len(hands))), "white")
    for k, (hand, joints) in enumerate(zip(hands, every)):
        cell = draw_side(joints, side, turn=90.0, reach=reach)
        out.paste(titled(cell, f"{hand['side']} hand, seen from the right"), (0, k * side))
        cell = draw_side(joints, side, turn=-45.0, reach=reach)
        if "verts" in hand and hand["verts"].isfinite().all():
            cell = mesh_from(hand["verts"], turned_faces(faces, hand), side, -45.0, reach)
        out.paste(titled(cell, "seen from the left, 45 degrees"), (side, k * side))
    return out


def titled(cell: Image.Image, text: str) -> Image.Image:
    """A drawing with a text in its upper left corner; the lower one has the scale."""
    cell.paste(label(cell.crop((0, 0, cell.width, 22)), text, 11), (0, 0))
    return cell


def mesh_from(verts: Tensor, faces: Tensor, size: int, turn: float, reach: float) -> Image.Image:
    """A mesh (M, 3) m as `draw_side` shows joints: `turn` degrees round, `reach` m to an edge."""
    angle = math.radians(turn)
    c, s = math.cos(angle), math.sin(angle)
    look = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=verts.dtype)
    low, high = verts.aminmax(dim=0)
    far = 30 * reach                                        # so far that nothing looks nearer
    moved = (verts - (low + high) / 2) @ look.mT + torch.tensor([0, 0, far], dtype=verts.dtype)
    focal, middle = far * size / 2 / reach, (size - 1) / 2
    K = torch.tensor([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])
    return draw_mesh(Image.new("RGB", (size, size), "white"), moved, faces, K, alpha=1.0)


def draw_photo(out: Path, root: Path, path: str, hands: list[dict], faces: Tensor) -> None:
    """OUT/PHOTO.png: the photo with all its hands, two sides of each beside it, a legend below."""
    drawn = overlay(Image.fromarray(read_image(root / path)), hands, faces)
    beside = from_sides(hands, faces, drawn.height)
    wide = drawn.width + beside.width
    below = legend(wide, "Over the photo: the bones of each hand, and its mesh where there is one. "
                   "Beside it: the hands in 3D, all to one scale (the bar).", bones=True)
    both = Image.new("RGB", (wide, beside.height + below.height), "white")
    both.paste(drawn, (0, 0))
    both.paste(beside, (drawn.width, 0))
    both.paste(below, (6, beside.height))
    save_picture(out / f"{flat_name(path)}.png", both)


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
    side = " It is a left hand, so its squares are shown mirrored." * (batch["side"][i] == "left")
    sheet(path, rows, [camera_of(pictures[v]) for v in there], ["bones", "mesh"][:len(rows)],
          width=40 + 306 * len(there), note="The fused hand in each camera's square around the "
          f"hand, lens distortion taken away.{side}", bones=True)


def bone_lengths(joints: Tensor) -> Tensor:
    """Joints (..., 21, 3) -> the lengths (..., 20) of the bones that end in joints 1 to 20."""
    parents = [0 if k % 4 == 1 else k - 1 for k in range(1, N_JOINTS)]
    return (joints[..., 1:, :] - joints[..., parents, :]).norm(dim=-1)
