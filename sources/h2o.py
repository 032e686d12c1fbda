"""H2O: layout, split and scores (taeinkwon/h2odataset ebcb489, h2oplayer 6f30a28)."""
from __future__ import annotations

import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, epe
from sources.files import cached, data_folder, drop_missing, note_poses, path_column
from sources.index import DataSet, Index, Joints, pinhole, tight_box
from sources.parsing import (
    below, file_bytes, hand_labels, intrinsics, numbers, one_of, reading, rotations)

import numpy as np
from torch import Tensor
from tqdm import tqdm

SEQUENCES = {"train": 114, "val": 24, "test": 46}
CAMERAS = 5                                         # four that stand, and cam4 on the head
KINDS = ("cam_intrinsics.txt", "rgb", "hand_pose", "cam_pose", "hand_pose_mano", "labels")


def h2o_split(split: str) -> list[str]:
    """The scenes of a split: subjects 1, 2 and half of 3 train, the rest of 3 is val, 4 test."""
    scenes = [f"subject{subject}/{scene}" for subject in (1, 2, 3, 4)
              for scene in ("h1", "h2", "k1", "k2", "o1", "o2")]
    return {"train": scenes[:15], "val": scenes[15:18], "test": scenes[18:]}[split]


def index_h2o(root: str | Path, split: str = "train", part: str = "",
              cache: str | Path | None = None) -> Index:
    """H2O in its official layout, one row an annotated hand; `Views` makes moments of its cameras.

    Without a part, the pictures of all five cameras, and a moment is one hand at one time; `ego` is
    what is officially scored: the frames in pose_SPLIT.txt, all of the head camera; it lies in root
    or in root/label_split. Joints are stored in metres of each camera and in our order. The
    lens is taken to be a pinhole, as the authors' player does. cam_pose leads from a camera to the
    world, so cameras is its inverse; a note says how well the joints of a moment agree there.
    hand_pose_mano, if it is there, holds pose with the mean in it, shape and trans, as manopth
    reads them. Where subjectS/SCENE/SEQ/camC/labels/FFFFFF.json are a detector's 2D labels of both
    hands (not part of H2O; OpenPose's output, see `hand_labels`), they are uv_label and confidence,
    which HaMuCo learns from. Left out and counted: hands without a label or with NaN, outside the
    picture (but for val and test of ego, where they are scored), seen by a camera without a pose
    (some are all zeros), and those whose picture is missing. UserError: another part or layout, a
    file of other numbers.
    """
    if part not in ("", "ego"):
        raise UserError(f"h2o has the part ego, not {part!r}")
    root = data_folder(root, "h2o")
    scenes = h2o_split(split)
    sequences = [f"{scene}/{number}" for scene in scenes for number in range(8)
                 if (root / scene / str(number)).is_dir()]
    homes = [f"{sequence}/cam{camera}" for sequence in sequences
             for camera in range(CAMERAS) if (root / sequence / f"cam{camera}").is_dir()]
    if not homes:
        raise UserError(f"h2o: {root} must hold {scenes[0]}/0/cam4 and what is like it; {split} is "
                        f"{', '.join(scenes)}")
    listing = ""
    if part:
        places = [f"{folder}pose_{split}.txt" for folder in ("", "label_split/")]
        listing = next((file for file in places if (root / file).is_file()), "")
        if not listing:
            raise UserError(f"h2o: pose_{split}.txt is neither in {root} nor in "
                            f"{root / 'label_split'}")
    files = [f"{home}/{kind}" for home in homes for kind in KINDS] + [listing] * bool(part)
    name = f"h2o:{part} {split}" if part else f"h2o {split}"
    index = _parse_h2o(root, name, homes, listing, cache=cache,
                       files=[file for file in files if (root / file).exists()])
    index.notes.append(f"{len(sequences)} of the {SEQUENCES[split]} sequences")
    outside = index.columns.pop("outside")
    if not part or split == "train":
        index = index.drop(outside, "hands outside the picture")
    elif outside.any():
        index.notes.append(f"{outside.sum()} hands outside the picture are kept: they are scored")
    return note_poses(drop_missing(index))


def _text(file: Path, n: int) -> np.ndarray:
    """The n numbers of a text file, NaN where it says so; UserError where it has anything else."""
    with reading(f"h2o: {file}"):
        return numbers(_floats(file), "its content", n, unknown=True)


def _floats(file: Path) -> list[float]:
    """What a text file holds; ValueError where a word is no number."""
    return [float(word) for word in file_bytes(file).split()]


def _listed(file: Path) -> set[str]:
    """The frames that an official list names, as subjectS/SCENE/SEQ/camC/FFFFFF."""
    with reading(f"h2o: {file}"):
        words = file_bytes(file).decode().split()
        paths = [Path(below(word, "a frame")) for word in words]
        return {(path.parent.parent / path.stem).as_posix() for path in paths}


def _hands(file: Path, n: int) -> np.ndarray:
    """The (2, n) numbers of the left and of the right hand, a file's, without the flag before them.

    They are NaN where the flag is 0: what is written there then means nothing, and may be anything.
    """
    with reading(f"h2o: {file}"):
        words = _floats(file)
        halves = words[:n + 1], words[n + 1:]
        known = [one_of(half[0], "a hand's flag", 0, 1) == 1 for half in halves if half]
        read = [word if ok else 0.0 for half, ok in zip(halves, known) for word in half]
        found = numbers(read, "its content", 2 * (n + 1), unknown=True)
    return np.where(np.array(known)[:, None], found.reshape(2, n + 1)[:, 1:], np.nan)


def _world_to_camera(file: Path) -> np.ndarray:
    """The inverse of a cam_pose file, (4, 4) m; NaN where it is all zeros, as some are."""
    P = _text(file, 16).reshape(4, 4)
    if not P.any():
        return np.full((4, 4), np.nan)
    with reading(f"h2o: {file}"):
        R = rotations(P[:3, :3], "the rotation")
        if (P[3] != [0, 0, 0, 1]).any():
            raise ValueError("it must end in 0 0 0 1")
    M = np.eye(4)
    M[:3, :3] = R.T
    M[:3, 3] = -R.T @ P[:3, 3]
    return M


def _camera(root: Path, home: str, listed: set[str] | None) -> dict[str, np.ndarray]:
    """Columns of one camera of one sequence: frame by frame, the left hand, then the right one."""
    file = root / home / "cam_intrinsics.txt"
    fx, fy, cx, cy, *size = _text(file, 6)
    with reading(f"h2o: {file}"):
        K = intrinsics(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
    sequence, _, camera = home.rpartition("/cam")
    rows = []
    for frame in sorted(file.stem for file in (root / home / "hand_pose").glob("*.txt")):
        if listed is not None and f"{home}/{frame}" not in listed:
            continue
        joints = _hands(root / home / "hand_pose" / f"{frame}.txt", 63).reshape(2, N_JOINTS, 3)
        fit = np.full((2, 61), np.nan)
        file = root / home / "hand_pose_mano" / f"{frame}.txt"
        if file.is_file():
            fit = _hands(file, 61)
        M = np.full((4, 4), np.nan)
        if listed is None:
            M = _world_to_camera(root / home / "cam_pose" / f"{frame}.txt")
        detected = root / home / "labels" / f"{frame}.json"
        for k, side in enumerate(("left", "right")):
            label = np.full((N_JOINTS, 2), np.nan)
            sure = np.zeros(N_JOINTS)
            if detected.is_file():
                label, sure = hand_labels(detected, side, both=True)
            rows.append({"path": f"{home}/rgb/{frame}.png", "side": side,
                         "moment": f"{sequence}/{frame}-{side}", "camera": int(camera),
                         "K": K, "size": size, "joints": joints[k], "fit": fit[k], "cameras": M,
                         "uv_label": label, "confidence": sure})
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    return {key: column.astype(np.float32) if column.dtype == float else column
            for key, column in columns.items()}


@cached
def _parse_h2o(root: Path, name: str, homes: list[str], listing: str) -> Index:
    """The annotated hands of some cameras, with whether they lie outside the picture."""
    listed = _listed(root / listing) if listing else None
    found = []
    for home in tqdm(homes, "reading h2o", disable=len(homes) < 20):
        found += [one for one in [_camera(root, home, listed)] if one]
    if not found:
        raise UserError(f"{name}: no camera below {root} has a file in hand_pose that is asked for")
    column = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
    trans, pose, shape = np.split(column["fit"], (3, 51), 1)
    uv = pinhole(column["joints"], column["K"])
    size = column["size"][:, None]
    columns = {
        "paths": path_column(column["path"].tolist()), "side": column["side"],
        "id": np.char.add(np.char.add(column["path"], "-"), column["side"]),
        "box": tight_box(uv), "joints": column["joints"], "uv": uv, "K": column["K"],
        "pose": pose, "shape": shape, "trans": trans,
        "outside": ~((uv >= -0.5) & (uv <= size - 0.5)).all(-1).any(-1)}
    if listed is None:
        columns |= {key: column[key] for key in ("moment", "camera", "cameras")}
    if np.isfinite(column["uv_label"]).any():
        columns |= {key: column[key] for key in ("uv_label", "confidence")}
    index = Index(name, str(root), columns, "joints")
    if listed is not None:
        gone = len(listed) - len({*column["path"].tolist()})
        index.dropped |= {"listed frames without a label file": gone} if gone else {}
    index = index.drop(np.isnan(index.columns["joints"]).any((1, 2)), "hands without a label")
    if listed is None:
        lost = np.isnan(index.columns["cameras"]).any((1, 2))
        index = index.drop(lost, "hands seen by a camera without a pose")
        index.notes.append(_agreement(index))
    return index


def _agreement(index: Index) -> str:
    """How far the cameras of a moment are from meaning one hand: a wrong cam_pose shows at once."""
    M = index.columns["cameras"]
    world = (index.columns["joints"] - M[:, None, :3, 3]) @ M[:, :3, :3]
    _, first, row = np.unique(index.columns["moment"], return_index=True, return_inverse=True)
    apart = np.linalg.norm(world - world[first][row], axis=-1).mean(1)
    others = np.setdiff1d(np.arange(len(row)), first)
    if not len(others):
        return "no hand is seen by two cameras"
    return (f"in the world, joints lie {1000 * np.median(apart[others]):.1f} mm from those of the "
            "moment's first camera (median)")


# The authors' player poses manopth's hand, which lies on the stored joints.
H2O = DataSet(index_h2o, joints=Joints("manopth"))


# ---- Official protocol ---------------------------------------------------------------------------


def h2o_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """The mean error in the camera frame, unaligned, of left and of right hands by themselves."""
    error = 1000 * epe(f["camera"], f["true"], f["ok"])
    left = f["left"][:, None]
    return {"abs_mpjpe_mm_left": error.masked_fill(~left, math.nan),
            "abs_mpjpe_mm_right": error.masked_fill(left, math.nan)}


PROTOCOLS = {"h2o": h2o_scores}
