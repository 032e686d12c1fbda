"""The judge: what a predictor answers to a data set, scored by every protocol, a row an output.

A stage's report and eval.py call the same `assess`.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

# common before torch: it settles how threads wait
from common import ROOT, Flags, Mano, epe, mpjpe, pa_mpjpe, rank, score, world
from sources import Source, batches, data_name
from sources.index import unmirror
from sources.interhand import mrrpe
from sources.loader import gather
from sources.predictors import (
    Net, Prediction, Predictor, answer, as_pictures, blind, facts, hidden, redefined, root_of,
    scored_on)
from sources.protocols import Protocol
from sources.tally import Tally

import torch
from torch import Tensor, nn

LIMITS = torch.arange(51, dtype=torch.float64)            # mm or px of the PCK curves
PARTS = 512                                               # samples a row keeps as they are


@dataclasses.dataclass
class Exam:
    """A data set to be judged on, its joints, and the protocols beside `ours`."""

    data: Source
    spec: str                    # NAME[:PART][=DIR]
    hand: Mano                   # with the joints that the data set means, on the CPU
    device: torch.device         # see `scored_on`
    workers: int = 0
    protocols: dict[str, Protocol] = dataclasses.field(default_factory=dict)
    submit: bool = False         # whether camera joints and vertices are kept


def every_batch(data: Source, device: torch.device, workers: int) -> Iterator[dict]:
    """A data set in batches of 64; of several processes each takes every n-th sample."""
    mine = torch.arange(len(data))[rank()::world()]
    return batches(data, [rows for rows in mine.split(64) if len(rows)], device, workers)


@torch.no_grad()
def predictions(model: nn.Module, data: Source, cfg: Flags, device: torch.device
                ) -> Iterator[tuple[dict, dict]]:
    """(batch, prediction) over a data set, each sample once over all processes."""
    for batch in every_batch(data, scored_on(device), cfg.workers):
        yield batch, answer(model, batch)


# ---- Rows ----------------------------------------------------------------------------------------


class Row:
    """One line of a table: a predictor's tallies by protocol, and what stands beside them."""

    def __init__(self, exam: Exam, predict: Predictor | None = None, output: str = ""):
        n = len(exam.data)
        self.exam = exam
        self.predict = predict                      # None: the mean pose
        self.output = output                        # its name among the predictor's rows
        self.tallies = {name: Tally(n) for name in ("ours", *exam.protocols)}
        self.plots = {unit: Tally(n) for unit in ("mm", "px")}          # see `errors_by_joint`
        self.counts = Tally(n)                      # scored by a protocol; absent; not made
        self.errors: Tensor | list = []             # (N,) mm of every picture, px without 3D
        self.parts: list[dict[str, Tensor]] = []    # some samples as they are, for `looks_like`
        self.about: dict[str, str] = {}             # parameters, images a second
        self.rooted = False                         # whether it says where the wrist is

    @property
    def net(self) -> Net | None:
        """The trained network behind it, if there is one."""
        return self.predict if isinstance(self.predict, Net) else None

    @property
    def unit(self) -> str:
        """Of its plots: mm, or px where nothing is known in 3D."""
        return "mm" if self.plots["mm"].count("joints") else "px"

    def count(self, what: str) -> int:
        """How many pictures are: scored PROTOCOL, absent (no such view), not made."""
        return int(self.counts.sums[what][..., 0].sum()) if what in self.counts.sums else 0

    def means(self, protocol: str = "ours") -> dict[str, float]:
        """{metric: mean} of a protocol."""
        return self.tallies[protocol].means()

    def add(self, index: Tensor, values: dict[str, dict[str, Tensor]]) -> None:
        """Add values of some pictures, {protocol: {metric: values}}."""
        for name, scores in values.items():
            if name in self.plots:
                self.plots[name].add(index, scores)
                continue
            self.tallies[name].add(index, scores)
            known = [~x.reshape(len(x), -1).isnan().all(1) for x in scores.values()]
            if known:
                self.counts.add(index, {f"scored {name}": torch.stack(known).any(0).double()})

    def gather(self) -> None:
        """The numbers of all processes, in each."""
        for one in (*self.tallies.values(), *self.plots.values(), self.counts):
            one.gather()
        if self.predict:
            self.errors = gather(self.errors, len(self.exam.data))["error"].flatten()


def shares_within(error: Tensor) -> Tensor:
    """Which share of the errors (N, P) that are known lie within each of LIMITS, (N, 51)."""
    near = (error[..., None] <= LIMITS.to(error)).to(error)
    return torch.where(error.isnan()[..., None], error[..., None], near).nanmean(1)


def errors_by_joint(error: Tensor, aligned: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """What the plots show of errors (N, 21): pck, pck_aligned (N, 51) and joints, by visibility."""
    return {"pck": shares_within(error), "pck_aligned": shares_within(aligned), "joints": error,
            "visible": error.masked_fill(~visible, math.nan)[..., None],
            "hidden": error.masked_fill(visible, math.nan)[..., None]}


def values_of(f: dict, exam: Exam) -> dict[str, dict[str, Tensor]]:
    """{protocol: {metric: values}} of the facts of some pictures: `ours`, the exam's, and plots."""
    out = {"ours": score(f["pred"], f["batch"])}
    out |= {name: scores(f, exam.hand) for name, scores in exam.protocols.items()}
    error = 1000 * mpjpe(f["joints"], f["true"], f["ok"])
    aligned = 1000 * pa_mpjpe(f["joints"], f["true"], f["ok"])
    for one in (error, aligned):                     # wrist on wrist its error is 0 by definition
        one[:, ROOT] = math.nan
    out["mm"] = errors_by_joint(error, aligned, f["visible"])
    flat = epe(f["uv"], f["uv_true"], f["uv_true"].isfinite().all(-1))
    return out | {"px": errors_by_joint(flat, flat, f["visible"])}


def only_made(pred: Prediction, batch: dict, lifted: bool = True) -> dict:
    """The truth without what a predictor could not make: a hand of too few views, a missing label.

    `lifted`: it says where joints are, so that a point in 2D alone is none of its own.
    """
    made = pred["joints"].isfinite().all(-1)
    lost = ~made.all(1)
    unseen = ~pred["uv"].isfinite().all(-1, keepdim=True)
    if lifted:
        unseen = unseen | ~made[..., None]
    return batch | {"joints_ok": batch["joints_ok"] & ~lost[:, None],
                    "uv": batch["uv"].masked_fill(unseen, math.nan),
                    **{key: hidden(batch[key], lost) for key in {"joints", "verts"} & set(batch)}}


@torch.no_grad()
def assess(exam: Exam, predict: Predictor, mean: dict | None = None
           ) -> tuple[dict[str, Row], dict[str, Tensor]]:
    """One pass over a data set: a row for each output of a predictor, and the mean pose's (`mean`).

    Then what needs all samples at once, (N, ...): camera joints and vertices to submit, and errors
    of wrists where two hands make a pair. A lone output that is not finite is an error; of several,
    one may have nothing to say of a picture, which then does not count for it.
    """
    rows: dict[str, Row] = {}
    kept: list[dict[str, Tensor]] = []
    for moments in every_batch(exam.data, exam.device, exam.workers):
        batch = as_pictures(moments)
        V = len(batch["joints"]) // len(moments["index"])
        columns = exam.data.columns(moments["index"])
        moment = batch["index"] // V                    # views of one are no samples of their own
        found = predict(moments)
        for name, pred in found.items():
            row = rows.setdefault(name, Row(exam, predict, name))
            if row.net:
                pred = redefined(pred, row.net.trained_on, data_name(exam.spec), exam.hand)
            lifted = "joints" in pred                      # labels say nothing of 3D
            pred = {"joints": torch.full_like(batch["joints"], math.nan)} | pred
            truth = batch if len(found) == 1 else only_made(pred, batch, lifted)
            f = facts(pred, truth, columns)
            values = values_of(f, exam)
            row.add(moment, values)
            row.rooted = "root" in pred
            _note(row, f, values, V)
        if mean is not None:
            raw, posed = (values_of(facts(guess, batch, columns), exam)
                          for guess in blind(mean, batch, exam.hand))
            row = rows.setdefault("mean_pose", Row(exam))
            row.add(moment, {name: posed[name] | {
                metric: x for metric, x in raw[name].items()
                if not metric.startswith(("pa_", "f_", "pck_aligned"))} for name in raw})
        kept.append(_keep(f, exam))
    for row in rows.values():
        row.gather()
    everything = gather(kept, len(exam.data))
    if "root_error" in everything:
        pictures = exam.data.columns(torch.arange(len(exam.data)))["image_id"]
        at, error = mrrpe(everything["root_error"], everything["left"], pictures)
        rows[name].tallies["interhand"].add(at, {"mrrpe_mm": 1000 * error})
    return rows, everything


def _note(row: Row, f: dict, values: dict[str, dict[str, Tensor]], V: int) -> None:
    """What a row keeps of every picture, and some pictures as they are."""
    scores = values["ours"] | values.get("labels", {})         # of data without truth, its labels
    error, batch = scores["mpjpe_mm"], f["batch"]
    for flat in ("epe_2d_px_crop", "label_px_crop"):
        error = torch.where(error.isnan(), scores[flat], error) if flat in scores else error
    row.errors.append({"error": error.float().unflatten(0, (-1, V)).cpu()})
    there = batch.get("view_ok", torch.ones_like(error, dtype=torch.bool))
    lost = ~f["joints"].isfinite().flatten(1).all(1)
    row.counts.add(batch["index"] // V, {"absent": (~there).double(),
                                         "not made": (lost & there).double()})
    some = batch["index"] % max(1, len(row.exam.data) // PARTS) == 0
    row.parts.append({key: f[key][some].cpu() for key in ("joints", "true", "ok")})


def _keep(f: dict, exam: Exam) -> dict[str, Tensor]:
    """Of some pictures, what a submission holds, un-mirrored, and what pairs of hands need."""
    part: dict[str, Tensor] = {}
    if exam.submit:
        sides = ["left" if left else "right" for left in f["left"].tolist()]
        root = root_of(f["pred"], f["batch"], f["columns"], truth=False)
        moved = (root - f["joints"][:, ROOT])[:, None]
        placed = {key: f["pred"][key] + moved for key in ("joints", "verts") if key in f["pred"]}
        part = unmirror(placed, sides)
    if "interhand" in exam.protocols and "root_error" in f:
        part |= {"root_error": f["root_error"], "left": f["left"]}
    return {key: x.cpu() for key, x in part.items()}
