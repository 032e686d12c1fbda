"""InterHand2.6M v1.0: layout, joint order and scores (facebookresearch/InterHand2.6M 5d0e456)."""
from __future__ import annotations

import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, mpjpe, n_mpjpe
from hand.official import mirror_mano
from sources.dexycb import ti_net_scores
from sources.files import cached, data_folder, drop_missing, note_poses, path_column
from sources.index import DataSet, Index, pinhole, poses_in_cameras, tight_box
from sources.parsing import (
    below, numbers, one_of, parse_json, reading, rotations, whole)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


INTERHAND_TO_OURS = (20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16)


def index_interhand(root: str | Path, split: str = "train", part: str = "all",
                    mano: dict | None = None, cache: str | Path | None = None) -> Index:
    """InterHand2.6M v1.0, one row an annotated hand: two where hands interact.

    Parts: all, single, interacting (the picture's hand_type); H and M (human, machine annotation)
    need the authors' list aid_human_annot_SPLIT.txt beside the annotations. Joints go from world mm
    to camera m by R (X - campos). Left out and counted: missing pictures, pictures without 3D,
    hands without a valid wrist (then no joint is valid) and with NaN. Boxes are tight around the
    joints. NeuralAnnot poses get the hand's mean and turn into the camera about J_0(shape), both
    from the user's own mano["right"] (the left hand is its mirror image: the fixed shapedirs);
    without it pose and trans stay NaN and a note says so. Columns for official scores:
    annotation_id, image_id, capture, frame, camera, hand_type, hand_type_valid, bbox (all hands').
    UserError: a missing or foreign annotation file.
    """
    root = data_folder(root, "interhand")
    if part not in ("all", "single", "interacting", "H", "M"):
        raise UserError(f"interhand has the parts all, single, interacting, H, M, not {part!r}")
    home = f"annotations/{split}/InterHand2.6M_{split}_"
    files = [home + f"{name}.json" for name in ("data", "camera", "joint_3d", "MANO_NeuralAnnot")]
    files += [f"annotations/{split}/aid_human_annot_{split}.txt"] * (part in ("H", "M"))
    for file in files:
        if not (root / file).is_file():
            raise UserError(f"interhand: {root / file} is missing (layout of v1.0)")
    index = _parse_interhand(root, f"interhand:{part} {split}", split, part, files, files=files,
                             cache=cache, mano=mano)
    return note_poses(drop_missing(index))


def _cameras(captures: dict) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """campos mm, camrot, focal and princpt px of every camera, by (capture, camera)."""
    found = {}
    for capture, table in captures.items():
        for camera in table["campos"]:
            one = {key: numbers(table[key][camera], key, *dims)
                   for key, dims in (("campos", (3,)), ("camrot", (3, 3)), ("princpt", (2,)))}
            rotations(one["camrot"], "camrot")
            one["focal"] = numbers(table["focal"][camera], "focal", 2, least=1e-6)
            found[capture, camera] = one
    return found


def _hands(note: dict, image: dict, path: str, tables: list[dict]) -> list[dict | str]:
    """A picture's annotated hands, and the reasons where something is left out."""
    cameras, frames, fits = tables
    capture = str(image["capture"])
    camera = str(image["camera"])
    frame = str(image["frame_idx"])
    if frame not in frames.get(capture, {}):
        return ["pictures without 3D joints"]
    ok = numbers(note["joint_valid"], "joint_valid", 42, least=0, most=1) > 0
    ok = ok.reshape(2, N_JOINTS)
    world = numbers(frames[capture][frame]["world_coord"], "world_coord", 42, 3, unknown=True)
    world = world.reshape(2, N_JOINTS, 3)
    numbers(note["bbox"], "bbox", 4)
    one_of(note["hand_type_valid"], "hand_type_valid", 0, 1)
    found = []
    for number, side in enumerate(("right", "left")):
        if not ok[number, 20]:                                     # its wrist
            if note["hand_type"] in (side, "interacting"):
                found.append("hands without a valid wrist")
            continue
        fit = (fits.get(capture, {}).get(frame) or {}).get(side) or {}
        found.append({
            "path": path, "id": f"{note['id']}-{side}", "side": side, "ok": ok[number],
            "world": world[number], **cameras[capture, camera],
            **{key: numbers(fit.get(key, [None] * n), key, n, unknown=key not in fit)
               for key, n in (("pose", 48), ("shape", 10), ("trans", 3))},
            "annotation_id": whole(note["id"], "id"),
            "image_id": whole(note["image_id"], "image_id"), "capture": capture,
            "frame": frame, "camera": camera, "bbox": note["bbox"], "hand_type": note["hand_type"],
            "hand_type_valid": note["hand_type_valid"]})
    return found


@cached
def _parse_interhand(root: Path, name: str, split: str, part: str, files: list[str],
                     mano: dict | None = None) -> Index:
    """All hands of a part, from the annotation files."""
    found: list[dict | str] = []
    tables = []
    for file in files[:4]:
        with reading(f"interhand: {root / file}"):
            tables.append(parse_json((root / file).read_bytes()))
    data, cameras, *tables = tables
    with reading(f"interhand: {root / files[1]}"):
        tables = [_cameras(cameras), *tables]
    with reading(f"interhand: {root / files[0]}, or what belongs to it"):
        listed = (root / files[4]).read_text(encoding="utf-8") if files[4:] else ""
        human = {int(i) for i in listed.split()}
        images = {image["id"]: image for image in data["images"]}
        for note in tqdm(data["annotations"], "reading interhand", disable=len(images) < 2000):
            two = one_of(note["hand_type"], "hand_type", "right", "left", "interacting"
                         ) == "interacting"
            by_hand = note["id"] in human
            wanted = {"all": True, "single": not two, "interacting": two, "H": by_hand,
                      "M": not by_hand}
            if wanted[part]:
                image = images[note["image_id"]]
                path = below(image["file_name"], "file_name")
                found += _hands(note, image, f"images/{split}/{path}", tables)
        rows = [row for row in found if isinstance(row, dict)]
        column = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    reasons = [row for row in found if isinstance(row, str)]
    dropped = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    if not rows:
        raise UserError(f"{name}: {root} has no hand to read, left out {dropped}")
    n = len(rows)
    R = column["camrot"]
    joints = np.einsum("nij,nkj->nki", R, column["world"] - column["campos"][:, None]) / 1000
    broken = (column["ok"] & ~np.isfinite(joints).all(-1)).any(1)
    joints = np.where(column["ok"][..., None], joints, np.nan)[:, INTERHAND_TO_OURS]
    K = np.tile(np.eye(3), (n, 1, 1))
    K[:, [0, 1], [0, 1]] = column["focal"]
    K[:, :2, 2] = column["princpt"]
    uv = pinhole(joints, K)
    cameras = np.tile(np.eye(4), (n, 1, 1))
    cameras[:, :3, :3] = R
    cameras[:, :3, 3] = -np.einsum("nij,nj->ni", R, column["campos"]) / 1000
    pose = np.full((n, 48), np.nan)
    trans = np.full((n, 3), np.nan)
    if "right" in (mano or {}):
        for side, hand in (("right", mano["right"]), ("left", mirror_mano(mano["right"]))):
            one = column["side"] == side
            pose[one], trans[one] = poses_in_cameras(
                hand, column["pose"][one], column["shape"][one], column["trans"][one], cameras[one])
    numbers = {"box": tight_box(uv), "K": K, "joints": joints, "uv": uv, "pose": pose,
               "shape": column["shape"], "trans": trans}
    score = ("annotation_id", "image_id", "capture", "frame", "camera", "hand_type",
             "hand_type_valid", "bbox")
    return Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": column["side"], "id": column["id"],
        **{key: value.astype(np.float32) for key, value in numbers.items()},
        **{key: column[key] for key in score}}, "joints", dropped).drop(broken, "hands with NaN")


# Its joints are annotated by hand and by machine, not defined by a mesh: the chain's are nearest.
INTERHAND = DataSet(index_interhand)


# ---- Official protocol ---------------------------------------------------------------------------


def interhand_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """The tool kit's MPJPE: each of 42 joints' mean first, then their mean, wrists at zero."""
    error = 1000 * mpjpe(f["joints"], f["true"], f["ok"])
    left = f["left"][:, None]
    wide = torch.cat([error.masked_fill(left, math.nan), error.masked_fill(~left, math.nan)], 1)
    two = torch.as_tensor(f["columns"]["hand_type"] == "interacting").to(left.device)[:, None]
    return {"mpjpe_mm": wide, "mpjpe_mm_single": wide.masked_fill(two, math.nan),
            "mpjpe_mm_interacting": wide.masked_fill(~two, math.nan)}


def mrrpe(root_error: Tensor, left: Tensor, picture_of: np.ndarray) -> tuple[Tensor, Tensor]:
    """Error of the vector between two hands: (N, 3) m as read, left, pictures (N,) -> two (P,).

    First the numbers of rows, then errors in m. A pair counts where both hands of a picture have a
    predicted and a true wrist; its row is the right hand's.
    """
    mirrored = root_error * root_error.new_tensor([-1.0, 1, 1])
    error = torch.where(left[:, None], mirrored, root_error).double()
    known = error.isfinite().all(1)
    right_of, left_of = (dict(zip(picture_of[rows].tolist(), rows.tolist())) for rows in (
        (~left & known).nonzero()[:, 0].numpy(), (left & known).nonzero()[:, 0].numpy()))
    pairs = [(row, left_of[picture]) for picture, row in right_of.items() if picture in left_of]
    rights, lefts = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return rights, (error[lefts] - error[rights]).norm(dim=-1)


def intaghand_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """IntagHand's: rooted at the middle MCP, the bone wrist-middle MCP as long as the true one."""
    error = 1000 * n_mpjpe(f["joints"], f["true"], f["ok"]).nanmean(1)
    two = torch.as_tensor(f["columns"]["hand_type"] == "interacting").to(error.device)
    return {"n_mpjpe_mm": error, "n_mpjpe_mm_interacting": error.masked_fill(~two, math.nan)}


PROTOCOLS = {"interhand": interhand_scores, "intaghand": intaghand_scores, "ti_net": ti_net_scores}
