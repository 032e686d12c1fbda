"""COCO-WholeBody's hands: layout, splits and official scores."""
from __future__ import annotations

import math
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, Mano, UserError, epe
from sources.files import cached, data_folder, drop_missing, path_column
from sources.index import DataSet, Index
from sources.parsing import below, numbers, one_of, parse_json, reading, whole

import numpy as np
import torch
from torch import Tensor


def index_coco(root: str | Path, split: str = "train", cache: str | Path | None = None) -> Index:
    """COCO-WholeBody's hands (jin-s13/COCO-WholeBody v1.0), one row a hand with a valid box.

    annotations/coco_wholebody_SPLIT_v1.0.json over the pictures of train2017 and val2017; the
    annotators split it into train and val only. A key point counts where its v, which may be a
    fraction, is above 0; boxes are annotated, tight around the hand, left and right as annotated.
    No 3D. Left out and counted: hands that are valid but have no box, missing pictures.
    Columns for scores: box, annotation_id, image_id. UserError: a missing or foreign annotation
    file.
    """
    root = data_folder(root, "coco")
    file = f"annotations/coco_wholebody_{split}_v1.0.json"
    if not (root / file).is_file():
        raise UserError(f"coco: {root / file} is missing: it is COCO-WholeBody's, beside COCO 2017")
    return drop_missing(_parse_coco(root, file, split, files=[file], cache=cache))


@cached
def _parse_coco(root: Path, file: str, split: str) -> Index:
    """All hands of an annotation file."""
    rows = []
    with reading(f"coco: {root / file}"):
        content = parse_json((root / file).read_bytes())
        names = {image["id"]: below(image["file_name"], "file_name")
                 for image in content["images"]}
        for note in content["annotations"]:
            for side in ("left", "right"):
                key = f"{side}hand"
                if one_of(note[f"{key}_valid"], f"{key}_valid", False, True):
                    rows.append({
                        "path": f"{split}2017/{names[note['image_id']]}", "side": side,
                        "id": f"{note['id']}-{side}", "annotation_id": whole(note["id"], "id"),
                        "image_id": whole(note["image_id"], "image_id"),
                        "points": numbers(note[f"{key}_kpts"], f"{key}_kpts", N_JOINTS, 3),
                        "box": numbers(note[f"{key}_box"], f"{key}_box", 4)})
    if not rows:
        raise UserError(f"coco: {root / file} has no valid hand")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    box = column["box"]
    uv = np.where(column["points"][..., 2:] > 0, column["points"][..., :2], np.nan)
    index = Index(f"coco {split}", str(root), {
        "paths": path_column(column["path"].tolist()), "uv": uv.astype(np.float32),
        "box": box.astype(np.float32),
        **{key: column[key] for key in ("side", "id", "annotation_id", "image_id")}}, "annotated")
    valid = np.isfinite(box).all(1) & (box[:, 2:] > 0).all(1)
    return index.drop(~valid, "valid hands without a box")


COCO = DataSet(index_coco, ("train", "val"))


# ---- Official protocol ---------------------------------------------------------------------------


def coco_scores(f: dict, hand: Mano | None = None) -> dict[str, Tensor]:
    """mmpose's: EPE of all key points, PCK at 0.2 of the box, area of thresholds 0 to 28.5 px."""
    ok = f["uv_true"].isfinite().all(-1) & f["uv"].isfinite().all(-1)
    error = epe(f["uv"], f["uv_true"], ok)
    side = torch.as_tensor(f["columns"]["box"][:, 2:].max(1)).to(error)[:, None]
    limits = 30 * torch.arange(20, dtype=torch.float64, device=error.device) / 20
    above = 20 - torch.searchsorted(limits, error, right=True).double()       # thresholds > error
    near = (error < 0.2 * side).double()
    return {"epe_2d_px": error[..., None], "pck_2d_20": near.masked_fill(~ok, math.nan),
            "auc_2d_30": (above / 20).masked_fill(~ok, math.nan)}


PROTOCOLS = {"coco": coco_scores}
