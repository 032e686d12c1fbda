"""The same samples drawn for the truth and every row, at the end of a stage and by eval.py."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

# common before torch: it settles how threads wait
from common import place, view_intrinsics
from hand.drawing import draw_mesh, draw_side, draw_skeleton, label, picture, sheet
from sources import batches
from sources.judging import Row
from sources.predictors import as_pictures

import torch
from PIL import Image
from torch import Tensor

CELL = 150                                                # px of a drawing in a sheet


def best_median_worst(errors: Tensor, each: int = 2) -> tuple[Tensor, list[str]]:
    """Numbers of some samples by their errors (N,), which may hold NaN, and what to call each."""
    order = errors.argsort()[:int(errors.isfinite().sum())]
    middle = max(0, len(order) // 2 - each // 2)
    picked = torch.cat([order[:each], order[middle:middle + each], order[-each:]])
    names = [kind for kind in ("best", "median", "worst") for _ in range(each)]
    return picked, names[:len(picked)]


@torch.no_grad()
def draw_rows(path: Path, rows: dict[str, Row], picked: Tensor, names: Sequence[str]) -> None:
    """The samples `picked` (n,) for the truth and every row: skeleton, mesh or picture, two sides.

    The truth is grey beside predictions, the error in mm (px where nothing is known in 3D) in the
    corner. Rows that were judged on fewer samples, and the mean pose, are left out.
    """
    shown = {name: row for name, row in rows.items()
             if row.predict and len(row.errors) > int(picked.max())}
    cells: list[list[Image.Image]] = [[] for _ in picked]
    answers: dict[int, tuple[dict, dict]] = {}
    wide = len(shown) == 1
    for row in shown.values():
        V = len(row.errors) // len(row.exam.data)
        if id(row.predict) not in answers:                # one predictor may have several rows
            moments = next(batches(row.exam.data, [picked // V], row.exam.device, 0))
            answers[id(row.predict)] = as_pictures(moments), row.predict(moments)
        batch, every = answers[id(row.predict)]
        at = torch.arange(len(picked)) * V + picked % V
        batch, pred = (taken(one, at) for one in (batch, every[row.output]))
        for i, line in enumerate(cells):
            line += [] if line else [truth_block(batch, i, wide)]
            line.append(answer_block(batch, pred, row, float(row.errors[picked[i]]), i, wide))
    titles = ["truth", *shown]
    sheet(path, cells, titles, names, 1000 if wide else min(1500, 30 + 306 * len(titles)))


def taken(numbers: dict, at: Tensor) -> dict:
    """Tensors at the pictures `at` (n,); the rest as it is."""
    return {key: x[at.to(x.device)] if isinstance(x, Tensor) else x for key, x in numbers.items()}


def block(pictures: list[Image.Image], text: str, wide: bool) -> Image.Image:
    """Four pictures in a line, or two above two, with a text in the corner of the first."""
    step, across = CELL + 2, 4 if wide else 2
    out = Image.new("RGB", (across * step - 2, 4 // across * step - 2), "white")
    for k, image in enumerate(pictures):
        image = picture(image).resize((CELL, CELL))
        image = label(image, text, 14) if text and k == 0 else image
        out.paste(image, (k % across * step, k // across * step))
    return out


def sides(joints: Tensor, true: Tensor | None = None) -> list[Image.Image]:
    """A hand from 60 degrees to the right and to the left."""
    if not joints.isfinite().all(-1).any():
        return [Image.new("RGB", (CELL, CELL), "white")] * 2
    if true is not None and not true.isfinite().all(-1).any():
        true = None
    shown = joints if true is None else true              # draw_side centres on it
    ends = (shown - shown[0]).nan_to_num(0).aminmax(dim=0)
    middle = (ends.min + ends.max) / 2
    far = [(x - x[0] - middle).norm(dim=-1).nan_to_num(0).max() for x in (shown, joints)]
    return [draw_side(joints, CELL, true, turn, 1.05 * float(max(far))) for turn in (60.0, -60.0)]


def true_joints(batch: dict, i: int) -> Tensor:
    """The joints that are known of one picture, NaN for the others."""
    return batch["joints"][i].masked_fill(~batch["joints_ok"][i][:, None], math.nan)


def truth_block(batch: dict, i: int, wide: bool) -> Image.Image:
    """The true skeleton, the picture as it is, and the truth from two sides."""
    image = batch["image"][i]
    drawn = draw_skeleton(image, batch["uv"][i], visible=batch["visible"][i], width=CELL)
    return block([drawn, picture(image), *sides(true_joints(batch, i))], "", wide)


def answer_block(batch: dict, pred: dict, row: Row, error: float, i: int, wide: bool
                 ) -> Image.Image:
    """A prediction over its own picture, its mesh, if any, and two sides with the truth in grey."""
    image = batch["image"][i]
    top = [draw_skeleton(image, pred["uv"][i], width=CELL)]
    if "verts" in pred and pred["verts"][i].isfinite().all():
        K = view_intrinsics(batch)[i]
        moved = place(pred["joints"][i:i + 1], pred["uv"][i:i + 1], K[None])
        top.append(draw_mesh(image, pred["verts"][i] + moved, row.exam.hand.faces, K, width=CELL))
    else:
        top.append(picture(image))
    unit = "mm" if batch["joints_ok"][i].any() and "joints" in pred else "px"
    text = f"{error:.1f} {unit}" if math.isfinite(error) else "no truth"
    joints = pred.get("joints", torch.full_like(batch["joints"], math.nan))[i]
    return block([*top, *sides(joints, true_joints(batch, i))], text, wide)
