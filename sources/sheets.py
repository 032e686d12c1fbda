"""The same samples drawn for the truth and every row, at the end of a stage and by eval.py."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# common before torch: it settles how threads wait
from common import place, view_intrinsics
from hand.drawing import (
    draw_mesh, draw_side, draw_skeleton, label, picture, seen_from, sheet, words)
from sources import batches
from sources.judging import Row
from sources.predictors import as_pictures

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CELL = 150                                                # px of a drawing in a sheet
SIDES = (60.0, -60.0)                                     # degrees to the right, of 3D drawings
WILD = 1.25                                               # so much wider than true hands is cut off


def best_median_worst(errors: Tensor, each: int = 2) -> tuple[Tensor, list[str]]:
    """Numbers of some samples by their errors (N,), which may hold NaN, and what to call each."""
    order = errors.argsort()[:int(errors.isfinite().sum())]
    middle = max(0, len(order) // 2 - each // 2)
    picked = torch.cat([order[:each], order[middle:middle + each], order[-each:]])
    names = [kind for kind in ("best", "median", "worst") for _ in range(each)]
    return picked, names[:len(picked)]


class Answered(NamedTuple):
    """What a row says of the pictures of a sheet, one a line."""

    row: Row
    batch: dict
    pred: dict
    errors: list[float]          # mm or px, see `Row.errors`

    def joints(self, i: int) -> Tensor:
        """The predicted joints of picture i, wrist at 0; NaN without 3D."""
        if "joints" not in self.pred:
            return torch.full_like(self.batch["joints"][i], math.nan)
        return self.pred["joints"][i] - self.pred["joints"][i, :1]

    def truth(self, i: int) -> Tensor:
        """The true joints of picture i that are known, wrist at 0; NaN for the others."""
        known = self.batch["joints"][i].masked_fill(~self.batch["joints_ok"][i][:, None], math.nan)
        return known - known[:1]

    def unit(self, i: int) -> str:
        """Of the error of picture i: mm, px where its joints or the true wrist are not known."""
        return "mm" if (self.joints(i) - self.truth(i))[1:].isfinite().any() else "px"


@torch.no_grad()
def draw_rows(path: Path, rows: dict[str, Row], picked: Tensor, names: Sequence[str],
              about: str = "") -> None:
    """The samples `picked` (n,) for the truth and every row: skeleton, mesh or picture, two sides.

    The truth is grey beside predictions, the error in mm (px where nothing is known in 3D) in the
    corner; all 3D drawings of a sheet have one scale. `about` says below what its lines are. Rows
    that were judged on fewer samples, and the mean pose, are left out.
    """
    found = answered({name: row for name, row in rows.items()
                      if row.predict and len(row.errors) > int(picked.max())}, picked)
    first = next(iter(found.values()))
    reach = common_reach(list(found.values()), len(picked))
    wide = len(found) == 1
    cells = [[truth_block(first, i, reach, wide),
              *(answer_block(one, i, reach, wide) for one in found.values())]
             for i in range(len(picked))]
    known = bool(first.batch["uv"].isfinite().any() or first.batch["joints_ok"].any())
    titles = ["truth" if known else "picture", *found]
    sheet(path, cells, titles, names, 1240 if wide else min(1500, 30 + 306 * len(titles)),
          f"{about} {legend(list(found.values()), known)}", bones=True)


def answered(rows: dict[str, Row], picked: Tensor) -> dict[str, Answered]:
    """What every row says of the samples `picked` (n,); a predictor with several is asked once."""
    answers: dict[int, tuple[dict, dict]] = {}
    found = {}
    for name, row in rows.items():
        V = len(row.errors) // len(row.exam.data)
        if id(row.predict) not in answers:
            moments = next(batches(row.exam.data, [picked // V], row.exam.device, 0))
            answers[id(row.predict)] = as_pictures(moments), row.predict(moments)
        batch, every = answers[id(row.predict)]
        at = torch.arange(len(picked)) * V + picked % V
        found[name] = Answered(row, taken(batch, at), taken(every[row.output], at),
                               row.errors[picked].tolist())
    return found


def taken(numbers: dict, at: Tensor) -> dict:
    """Tensors at the pictures `at` (n,); the rest as it is."""
    return {key: x[at.to(x.device)] if isinstance(x, Tensor) else x for key, x in numbers.items()}


def common_reach(found: list[Answered], n: int) -> float:
    """m from the middle of each 3D drawing to its edge: all hands fit, but for a few wild ones."""
    true = max(extent(one.truth(i)) for one in found for i in range(n))
    both = max(extent(one.truth(i), one.joints(i)) for one in found for i in range(n))
    return 0.54 * (min(both, WILD * true) if true else both)


def extent(*hands: Tensor) -> float:
    """How wide or high (m) hands (21, 3) with one wrist are from the two sides; 0: none known."""
    widest = 0.0
    for turn in SIDES:
        points = np.concatenate([seen_from(joints, turn) for joints in hands])[:, :2]
        points = points[np.isfinite(points).all(1)]
        widest = max(widest, float(np.ptp(points, 0).max()) if len(points) else 0.0)
    return widest


def legend(found: list[Answered], known: bool) -> str:
    """What a reader must know of the cells, as sentences."""
    meshes = ["verts" in one.pred for one in found if "joints" in one.pred]
    beside = ("Beside the bones: the mesh." if all(meshes) else
              "Beside the bones: the mesh, or the bones in 3D from the front." if any(meshes) else
              "Beside the bones: the bones in 3D from the front.")
    grey = " The truth is grey behind a prediction; joints that are hidden are hollow." * known
    units = {one.unit(i) for one in found for i, error in enumerate(one.errors)
             if math.isfinite(error)}
    said = {"mm": "in mm with the wrists together", "px": "in px of the square that is asked for"}
    errors = ", in 2D ".join(said[unit] for unit in sorted(units))
    errors = errors if known else f"to the 2D labels, {said['px']}"
    return (f"{beside} On white: in 3D from 60 degrees to the right and to the left, all to one "
            f"scale (the bar).{grey}" + f" In the corner: the error, {errors}." * bool(units))


def block(pictures: list[Image.Image], text: str, wide: bool) -> Image.Image:
    """Four pictures in a line, or two above two; one alone is as large as they are.

    A text stands in the corner of the first.
    """
    step, across = CELL + 2, 4 if wide else 2
    out = Image.new("RGB", (across * step - 2, 4 // across * step - 2), "white")
    size = out.height if len(pictures) == 1 else CELL
    for k, image in enumerate(pictures):
        image = picture(image).resize((size, size))
        image = label(image, text, 14) if text and k == 0 else image
        out.paste(image, (k % across * step, k // across * step))
    return out


def sides(joints: Tensor, true: Tensor | None, reach: float, turns: Sequence[float],
          missing: str) -> list[Image.Image]:
    """A hand from some sides, degrees to the right; where nothing is known in 3D, it says so."""
    if not joints.isfinite().all(-1).any():
        return [words(missing if turn == turns[0] else "", CELL) for turn in turns]
    if true is not None and not true.isfinite().all(-1).any():
        true = None
    return [draw_side(joints, CELL, true, turn, reach) for turn in turns]


def truth_block(one: Answered, i: int, reach: float, wide: bool) -> Image.Image:
    """The true skeleton, the picture as it is, and the truth from two sides; or the picture."""
    image = one.batch["image"][i]
    uv, joints = one.batch["uv"][i], one.truth(i)
    if not uv.isfinite().any() and not joints.isfinite().any():
        return block([picture(image)], "", wide)
    drawn = draw_skeleton(image, uv, visible=one.batch["visible"][i], width=CELL)
    seen = sides(joints, None, reach, SIDES, "no truth in 3D")
    return block([drawn, picture(image), *seen], "", wide)


def answer_block(one: Answered, i: int, reach: float, wide: bool) -> Image.Image:
    """A prediction over its own picture, its mesh, if any, and two sides with the truth in grey.

    One without 3D is drawn over the picture alone.
    """
    batch, pred = one.batch, one.pred
    image = batch["image"][i]
    turns = SIDES
    text = f"{one.errors[i]:.1f} {one.unit(i)}" if math.isfinite(one.errors[i]) else ""
    if "joints" not in pred:                              # labels, which say nothing of 3D
        return block([draw_skeleton(image, pred["uv"][i], width=2 * CELL)], text, wide)
    top = [draw_skeleton(image, pred["uv"][i], width=CELL)]
    if "verts" in pred and pred["verts"][i].isfinite().all():
        K = view_intrinsics(batch)[i]
        moved = place(pred["joints"][i:i + 1], pred["uv"][i:i + 1], K[None])
        mesh = pred["verts"][i] + moved
        top.append(draw_mesh(image, mesh, one.row.exam.hand.faces, K, width=CELL))
    else:
        turns = (0.0, *turns)
    seen = sides(one.joints(i), one.truth(i), reach, turns, "no hand was made")
    return block([*top, *seen], text, wide)
