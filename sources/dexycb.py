"""DexYCB: layout, official subsets, scores and the tool kit's file (dex-ycb-toolkit 64551b0)."""
from __future__ import annotations

from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, auc, epe, mpjpe, pa_mpjpe, say
from sources.files import UNLABELLED, cached, data_folder, drop_missing, note_poses, path_column
from sources.index import DataSet, Index, Joints, tight_box
from sources.parsing import below, file_bytes, numbers, one_of, parse_yaml, reading, whole

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


def dexycb_split(part: str, split: str) -> tuple[list[int], list[int], list[int]]:
    """The official subsets: subjects of 0-9, sequences of a subject's 0-99, cameras of 0-7.

    s0 holds out every fifth sequence (subjects 0 and 1 for val, the others for test), s1 subjects,
    s2 cameras, s3 grasped objects, each of which has five sequences in a row.
    """
    which = ("train", "val", "test").index(split)
    subjects, sequences, cameras = range(10), range(100), range(8)
    if part == "s0":
        subjects = (range(10), range(2), range(2, 10))[which]
        sequences = [i for i in sequences if (i % 5 == 4) != (split == "train")]
    elif part == "s1":
        subjects = ((0, 1, 2, 3, 4, 5, 9), (6,), (7, 8))[which]
    elif part == "s2":
        cameras = (range(6), (6,), (7,))[which]
    elif part == "s3":
        group = {3: 1, 19: 1, 7: 2, 11: 2, 15: 2}                  # of the object; the others train
        sequences = [i for i in sequences if group.get(i // 5, 0) == which]
    else:
        raise UserError(f"dexycb has the parts s0, s1, s2, s3, not {part!r}")
    return [*subjects], [*sequences], [*cameras]


def index_dexycb(root: str | Path, split: str = "train", part: str = "s0", mano: dict | None = None,
                 cache: str | Path | None = None, unlabelled: bool = False) -> Index:
    """DexYCB in its official layout; joints are joint_3d (manopth's tips), boxes tight joint_2d.

    `mano` holds the user's own {"right": load_mano(..), "left": ..}: pose_m is 45 PCA coefficients
    of the hand's side, so without that file pose and trans stay NaN and a note says so. (The mirror
    image of trans is the right hand's up to shapedirs, which the left file has unmirrored.)
    Left out and counted: frames without picture or label, broken and NaN labels, unlabelled ones
    (all -1), and in training hands wholly outside the picture; val and test keep these, as the tool
    kit scores every labelled frame. Column image_id is the tool kit's number of the frame, outside
    (bool) marks hands outside. UserError: another layout, a subject without its 100 sequences.
    `unlabelled` keeps the unlabelled ones as TI-Net's authors read them: the mean pose unturned, a
    box of no size at (-1, -1), but no joints.
    """
    root = data_folder(root, "dexycb")
    folders = []
    subjects, sequences, cameras = dexycb_split(part, split)
    for subject in subjects:
        home = sorted(root.glob(f"*-subject-{subject + 1:02d}"))
        found = sorted(file.parent for file in home[0].glob("*/meta.yml")) if home else []
        if len(found) != 100:                                      # stray files hold no meta.yml
            raise UserError(f"dexycb: {root}/*-subject-{subject + 1:02d} must hold 100 sequences, "
                            f"each with a meta.yml, for the official splits; it has {len(found)}")
        folders += [found[i].relative_to(root).as_posix() for i in sequences]
    below = [str(file.relative_to(root)) for folder in folders
             for file in (root / folder).glob("*")]
    index = _parse_dexycb(root, f"dexycb:{part} {split}", folders, cameras, files=below,
                          cache=cache, mano=mano)
    for reason in sorted(set(index.columns["reason"].tolist()) - {""}):
        if not (unlabelled and reason == UNLABELLED):
            index = index.drop(index.columns["reason"] == reason, reason)
    index = drop_missing(index)
    outside = index.columns["outside"]
    if split == "train":
        index = index.drop(outside, "hands outside the picture")
    elif outside.any():
        index.notes.append(f"{outside.sum()} hands outside the picture are kept: they are scored")
    return note_poses(index)


def _label(file: Path) -> tuple[str, np.ndarray]:
    """Why a frame is left out or "", and its (156,) joint_3d m, joint_2d px, pose_m."""
    if not file.is_file():
        return "frames without a label file", np.full(156, np.nan)
    try:
        with np.load(file) as label:
            sizes = (("joint_3d", (21, 3)), ("joint_2d", (21, 2)), ("pose_m", (51,)))
            values = np.concatenate([numbers(label[key], key, *dims, unknown=True).ravel()
                                     for key, dims in sizes])
    except Exception:                         # bytes that are no .npz can fail anywhere in NumPy
        return "frames with a broken label file", np.full(156, np.nan)
    if (values[:63] == -1).all():
        return UNLABELLED, values
    return "" if np.isfinite(values).all() else "frames with NaN labels", values


def _frames(root: Path, folder: str, cameras: list[int]) -> dict[str, np.ndarray]:
    """Columns of a sequence: camera by camera in the order of serials, frame by frame."""
    def read(*parts: str) -> dict:
        file = Path(root, *(below(part, "a folder that meta.yml names") for part in parts))
        return parse_yaml(file_bytes(file))

    rows = []
    with reading(f"dexycb: {root / folder / 'meta.yml'}, or what it names in calibration/"):
        meta = read(folder, "meta.yml")
        side = one_of(meta["mano_sides"][0], "mano_sides", "left", "right")
        serials = sorted(below(serial, "serials") for serial in meta["serials"])
        if len(set(serials)) != 8:
            raise ValueError("serials must name eight cameras")
        calibration = "mano_" + below(meta["mano_calib"][0], "mano_calib")
        mano = read("calibration", calibration, "mano.yml")
        shape = numbers(mano["betas"], "betas", 10)
        frames = whole(meta["num_frames"], "num_frames", 1, 1000)
        for serial in [serials[camera] for camera in cameras]:
            k = read("calibration", "intrinsics", f"{serial}_640x480.yml")["color"]
            fx, fy = (float(numbers(k[key], key, least=1e-6)) for key in ("fx", "fy"))
            cx, cy = (float(numbers(k[key], key)) for key in ("ppx", "ppy"))
            K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
            for frame in range(frames):
                reason, values = _label(root / folder / serial / f"labels_{frame:06d}.npz")
                rows.append({"reason": reason, "values": values, "side": side, "K": K,
                             "shape": shape, "path": f"{folder}/{serial}/color_{frame:06d}.jpg"})
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@cached
def _parse_dexycb(root: Path, name: str, folders: list[str], cameras: list[int],
                  mano: dict | None = None) -> Index:
    """All frames of some sequences, with why some will be left out."""
    found = [_frames(root, folder, cameras) for folder in tqdm(folders, "reading dexycb")]
    column = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
    joints, uv, pose_m = np.split(column["values"].astype(float), (63, 105), 1)
    joints = joints.reshape(-1, N_JOINTS, 3)
    uv = uv.reshape(-1, N_JOINTS, 2)
    empty = column["reason"] == UNLABELLED
    pose = np.full((len(uv), 48), np.nan)
    trans = np.full((len(uv), 3), np.nan)
    for side, hand in (mano or {}).items():
        one = (column["side"] == side) & (pose_m.any(1) | empty)
        fingers = pose_m[one, 3:48] @ hand["hands_components"] + hand["hands_mean"]
        pose[one] = np.concatenate([pose_m[one, :3], fingers], 1)
        trans[one] = pose_m[one, 48:]
    outside = ~((uv >= -0.5) & (uv <= [639.5, 479.5])).all(-1).any(-1) & ~empty
    box = np.where(empty[:, None], (-1.0, -1.0, 0.0, 0.0), tight_box(uv))
    joints[empty] = np.nan
    uv[empty] = np.nan
    numbers = {"box": box, "K": column["K"], "joints": joints, "uv": uv, "pose": pose,
               "shape": column["shape"], "trans": trans}
    return Index(name, str(root), {
        "paths": path_column(column["path"].tolist()), "side": column["side"],
        **{key: value.astype(np.float32) for key, value in numbers.items()},
        "image_id": np.arange(len(uv)), "outside": outside, "reason": column["reason"]}, "joints")


# joint_3d is the output of manopth, which the tool kit pins.
DEXYCB = DataSet(index_dexycb, joints=Joints("manopth"))


# ---- Official protocol ---------------------------------------------------------------------------


def dexycb_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """The tool kit's errors and areas, of labelled frames: absolute, wrist-rooted, aligned."""
    ok = f["ok"].all(1, keepdim=True).expand_as(f["ok"])
    absolute = epe(f["camera"], f["true"], ok)
    relative = mpjpe(f["joints"], f["true"], ok)
    aligned = pa_mpjpe(f["joints"], f["true"], ok, reflect=True)
    return {"abs_mpjpe_mm": 1000 * absolute, "abs_auc": auc(absolute),
            "mpjpe_mm": 1000 * relative, "pa_mpjpe_mm_reflect": 1000 * aligned,
            "auc": auc(relative), "pa_auc_reflect": auc(aligned)}


def ti_net_scores(f: dict, hand: Mano) -> dict[str, Tensor]:
    """TI-Net's test: both hands posed with the true betas, no translation, rooted at the wrist.

    The authors wrote it for DexYCB and use it on InterHand2.6M too.
    """
    parts = (f["R_true"], f["shape_true"], f["R"])
    rows = torch.stack([x.isfinite().flatten(1).all(1) for x in parts]).all(0)

    def filled(x: Tensor) -> Tensor:
        """The hand stays on the CPU, and unknown poses must not spoil the others."""
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, 0).float().cpu()

    shape = filled(f["shape_true"])
    ok = rows.cpu()[:, None].expand(-1, N_JOINTS)
    pred, true = (hand.joints(filled(f[key]), shape) for key in ("R", "R_true"))
    return {"mpjpe_mm": 1000 * mpjpe(pred, true, ok),
            "pa_mpjpe_mm": 1000 * pa_mpjpe(pred, true, ok)}


def submit_dexycb(out: Path, index: Index, kept: dict[str, Tensor]) -> Path:
    """The tool kit's file in the folder `out`: a line a frame, its number, then 63 in mm."""
    file = out / f"{index.name.replace(' ', '_').replace(':', '_')}.txt"
    frames = index.columns["image_id"].tolist()
    lines = (1000 * kept["joints"]).flatten(1).tolist()
    file.write_text("".join(f"{frame}," + ",".join(f"{x:.4f}" for x in line) + "\n"
                            for frame, line in zip(frames, lines)), encoding="utf-8")
    say(f"wrote {file}: {len(lines):,} lines for the tool kit, mm")
    return file


PROTOCOLS = {"dexycb": dexycb_scores, "ti_net": ti_net_scores}
