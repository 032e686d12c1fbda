"""Sheets of the same samples: one scale for all that is drawn in 3D, and nothing called what it is not."""
import math
from types import SimpleNamespace

import torch
from PIL import Image

from common import N_JOINTS
from sources import sheets
from sources.judging import Exam, Row
from sources.loader import Source


class Line(Source):
    """Two samples whose hand is a line down from the wrist, 20 and 10 cm long; `known`: whether its truth is."""

    name = box_source = "line"

    def __init__(self, known=True):
        self.known = known

    def __len__(self):
        return 2

    def batches(self, plan, device, workers):
        for rows in plan:
            long = torch.tensor([0.2, 0.1])[rows]
            joints = torch.zeros(len(rows), N_JOINTS, 3)
            joints[:, :, 1] = long[:, None] * torch.linspace(0, 1, N_JOINTS)
            missing = 1.0 if self.known else math.nan
            ok = torch.full((len(rows), N_JOINTS), self.known)
            yield {"image": torch.zeros(len(rows), 3, 8, 8), "joints": missing * joints, "joints_ok": ok,
                   "uv": missing * torch.ones(len(rows), N_JOINTS, 2), "visible": ok}


def row(data, predict, name):
    """A row with errors of 1 and 2 mm, whose predictor says `predict(batch)`."""
    out = Row(Exam(data, "x", SimpleNamespace(faces=None), torch.device("cpu")), lambda batch: {name: predict(batch)}, name)
    out.errors = torch.tensor([1.0, 2.0])
    return out


def larger(times):
    """A prediction without a mesh: the true hand, or 20 cm where nothing is known, so many times as large."""
    def predict(batch):
        line = 0.2 * torch.linspace(0, 1, N_JOINTS)[:, None] * torch.tensor([0.0, 1, 0])
        known = batch["joints"].isfinite()
        return {"joints": times * torch.where(known, batch["joints"], line), "uv": torch.ones_like(batch["joints"][..., :2])}
    return predict


def drawn(monkeypatch, tmp_path, data, **predicts):
    """(titles, note, draw_side's reaches and turns, words in empty cells) of a sheet of both samples."""
    found = {"sides": [], "words": []}
    side, words = sheets.draw_side, sheets.words
    monkeypatch.setattr(sheets, "draw_side", lambda *given: found["sides"].append(given[3:]) or side(*given))
    monkeypatch.setattr(sheets, "words", lambda *given: found["words"].append(given[0]) or words(*given))
    monkeypatch.setattr(sheets, "sheet", lambda path, cells, titles, names, width, note, bones: found.update(titles=titles, note=note))
    sheets.draw_rows(tmp_path / "a.png", {name: row(data, predict, name) for name, predict in predicts.items()},
                     torch.tensor([0, 1]), ["", ""], "Two samples.")
    return found


def test_a_sheet_has_one_scale_which_a_wild_hand_does_not_stretch(monkeypatch, tmp_path):
    """A cell is 1.08 times as wide as the largest hand, but at most 1.25 times as a true one of 20 cm may be."""
    found = drawn(monkeypatch, tmp_path, Line(), near=larger(1.1), far=larger(0.5))
    assert {round(reach, 6) for _, reach in found["sides"]} == {round(0.54 * 0.22, 6)}
    found = drawn(monkeypatch, tmp_path, Line(), near=larger(1.1), wild=larger(10))
    assert {round(reach, 6) for _, reach in found["sides"]} == {round(0.54 * 1.25 * 0.2, 6)}
    assert found["titles"] == ["truth", "near", "wild"] and found["note"].startswith("Two samples. ")


def test_a_hand_without_a_mesh_is_drawn_from_the_front_too(monkeypatch, tmp_path):
    found = drawn(monkeypatch, tmp_path, Line(), one=larger(1))
    assert [turn for turn, _ in found["sides"]] == 2 * [60, -60, 0, 60, -60] and "from the front" in found["note"]


def test_nothing_is_called_truth_where_there_is_none(monkeypatch, tmp_path):
    found = drawn(monkeypatch, tmp_path, Line(known=False), one=larger(1))
    assert found["titles"] == ["picture", "one"] and "truth" not in found["note"].lower() and "error, to the 2D labels, in px" in found["note"]
    assert found["words"] == [] and {round(reach, 6) for _, reach in found["sides"]} == {round(0.54 * 0.2, 6)}


def test_labels_are_drawn_over_the_picture_alone_and_what_was_not_made_says_so(monkeypatch, tmp_path):
    found = drawn(monkeypatch, tmp_path, Line(), labels=lambda batch: {"uv": batch["uv"]}, one=larger(math.nan))
    assert found["words"] == ["no hand was made", "", ""] * 2
    assert "In the corner: the error, in px of the square that is asked for." in found["note"]
    assert [turn for turn, _ in found["sides"]] == 2 * [60, -60]                    # the truth's


def test_an_error_is_called_mm_only_where_it_is(monkeypatch, tmp_path):
    """Where the true wrist is not known nothing is wrist-rooted, and the error that is shown is that in 2D."""
    class Wristless(Line):
        def batches(self, plan, device, workers):
            for batch in super().batches(plan, device, workers):
                batch["joints_ok"][1:, 0] = False
                yield batch

    texts = []
    monkeypatch.setattr(sheets, "label", lambda image, text, size: (texts.append(text), image)[1])
    found = drawn(monkeypatch, tmp_path, Wristless(), one=larger(1))
    assert texts == ["1.0 mm", "2.0 px"] and "together, in 2D in px" in found["note"]
    texts.clear()
    found = drawn(monkeypatch, tmp_path, Line(), one=larger(1))
    assert texts == ["1.0 mm", "2.0 mm"] and "px" not in found["note"]


def test_one_picture_alone_is_as_large_as_four():
    red = Image.new("RGB", (9, 9), "#ff0000")
    for wide, size in ((False, (302, 302)), (True, (606, 150))):
        out = sheets.block([red], "", wide)
        assert out.size == size and out.getpixel((5, size[1] - 1)) == (255, 0, 0) == out.getpixel((size[1] - 1, 5))
