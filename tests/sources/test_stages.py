"""What a stage ends in: the mean hand, the row that it makes, tables and their file."""
import importlib
import json
import math

import pytest
import torch

from common import Mano, score
from hand.builtin import builtin_hand
from sources.course import COURSE
from sources.hands import Hands
from sources.predictors import blind
from sources.stages import mean_hand
from sources.tables import STAGE, table, write_results
from trees import open_tree, rig_tree


class Labels:
    """A data set of the given numbers."""

    def __init__(self, **numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers["joints"])

    def targets(self, index):
        return {key: value[index] for key, value in self.numbers.items()}


def labels():
    """Two hands turned +-0.4 rad about z at the wrist, anywhere in the room; a third without labels."""
    joints = torch.zeros(3, 21, 3)
    joints[0, 1:, 0], joints[1, 1:, 0] = 0.1, 0.3
    joints += torch.tensor([[[1.0, 2, 3]], [[-4, 0, 9]], [[0, 0, 0]]])
    joints[2] = math.nan
    pose, shape = torch.zeros(3, 48), torch.tensor([1.0, 3.0, math.nan])[:, None].expand(3, 10)
    pose[0, 2], pose[1, 2], pose[2] = 0.4, -0.4, math.nan
    return Labels(joints=joints, pose=pose, shape=shape, uv=torch.full((3, 21, 2), 16.0),
                  side_px=torch.full((3,), 64.0), joints_ok=joints.isfinite().all(-1),
                  crop=torch.eye(3).expand(3, 3, 3), verts=torch.full((3, 778, 3), math.nan))


def test_the_mean_hand_is_rooted_and_its_rotation_is_nearest_to_the_mean_matrix():
    mean = mean_hand(labels())
    assert mean["pose"].abs().max() < 1e-6 and torch.allclose(mean["shape"], torch.full((10,), 2.0))
    assert (mean["joints"][0] == 0).all() and torch.allclose(mean["joints"][1:, 0], torch.tensor(0.2))
    assert (mean["uv"] == 0.25).all() and mean["labels"] == 2


def test_the_mean_pose_row_judges_mean_joints_raw_and_the_mean_hand_aligned():
    data = labels()
    hand = Mano(builtin_hand())
    flat = hand.joints(torch.eye(3).expand(1, 16, 3, 3), torch.full((1, 10), 2.0))[0]
    data.numbers["joints"][0] = 2 * flat + 5                       # aligned, it is the mean hand itself
    mean = mean_hand(labels())
    batch = data.numbers | {"image": torch.zeros(3, 3, 64, 64)}
    raw, posed = (score(guess, batch) for guess in blind(mean, batch, hand))
    assert posed["pa_mpjpe_mm"][0] < 1e-2 and posed["pa_mpjpe_mm"][2].isnan()
    assert raw["mpjpe_mm"][1] == pytest.approx(1000 * 0.1 * 20 / 21, rel=1e-5)
    assert raw["epe_2d_px"][1] == 0


def test_mean_hand_looks_at_the_whole_of_a_sorted_data_set():
    """The first half of the hands have one length, the second half another: 2 of 100 still see both."""
    class Sorted:
        def __len__(self):
            return 100

        def targets(self, index):
            joints = torch.where(index[:, None, None] < 50, 1.0, 3.0) * torch.arange(21.0)[:, None].expand(21, 3)
            return {"pose": torch.full((len(index), 48), math.nan), "shape": torch.zeros(len(index), 10), "joints": joints,
                    "uv": torch.zeros(len(index), 21, 2), "side_px": torch.ones(len(index))}

    assert float(mean_hand(Sorted(), 2)["joints"][1, 0]) == pytest.approx(2.0)


def test_mean_hand_reads_columns_not_rows(tmp_path, monkeypatch):
    """A rig's moments are asked for 512 at a time, and so are the pictures in them: HanCo has eight a moment."""
    rig_tree(tmp_path, frames=6)
    data, asked, labels = open_tree(tmp_path), [], Hands._labels
    monkeypatch.setattr(Hands, "_labels", lambda hands, rows, *more: asked.append(len(rows)) or labels(hands, rows, *more))
    mean_hand(data)
    assert asked == [int((data.rows >= 0).sum())] and asked[0] > 6


def test_results_hold_one_entry_a_run_and_protocol(tmp_path):
    entry = {"run": "a", "protocol": "ours", "rows": {"x": {"mpjpe_mm": 1.0}}}
    write_results(tmp_path / "m.json", "d", entry)
    write_results(tmp_path / "m.json", "d", entry | {"protocol": "dexycb"})
    write_results(tmp_path / "m.json", "d", entry | {"rows": {"x": {"mpjpe_mm": 2.0}}})
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["data"] == "d" and len(found["results"]) == 2
    assert found["results"][1]["rows"]["x"]["mpjpe_mm"] == 2.0


def test_table_shows_missing_scores_as_dashes():
    lines = table({"a": {"mpjpe_mm": 12.345}, "b": {"mpjpe_mm": 2.0, "auc": 0.5}}, STAGE).splitlines()
    assert lines[0].split() == ["|", "row", "|", "mpjpe_mm", "|", "auc", "|"]
    assert lines[2].split() == ["|", "a", "|", "12.35", "|", "-", "|"] or "12.34" in lines[2]
    assert lines[3].split() == ["|", "b", "|", "2.00", "|", "0.500", "|"]


QUICK = {"ti_net": ["pretrain-ti_net", "finetune-ti_net", "scoring"], "peclr": ["pretrain-peclr", "finetune-peclr", "scoring"],
         "handmim": ["pretrain-handmim", "finetune-handmim", "scoring"],
         "hamuco": ["train-single_view", "train-hamuco", "scoring"]}


@pytest.mark.parametrize("name", QUICK)
def test_the_stages_that_are_told_are_those_that_run_in_their_order(name, monkeypatch, tmp_path):
    """Stages and report only write down what they are called."""
    script, done = importlib.import_module(name), []

    def stand_in(kind):
        return lambda cfg, out, row, *given: done.append(f"{kind}-{row if isinstance(row, str) else name}")

    for function, kind in (("pretrain", "pretrain"), ("finetune", "finetune"), ("fit", "train")):
        if hasattr(script, function):
            monkeypatch.setattr(script, function, stand_in(kind))
    monkeypatch.setattr(script, "report", lambda *given: done.append("scoring"))
    monkeypatch.setattr(COURSE, "work", {})
    script.run_stages({"quick": True}, tmp_path, torch.device("cpu"))
    assert list(COURSE.work) == QUICK[name] == done and all(work > 0 for work in COURSE.work.values())


def test_epochs_with_random_masks_count_as_others_do_and_all_test_moments_are_scored(monkeypatch, tmp_path):
    """Three epochs of 32,560 moments of 8 views at 3 x 3 a picture, then 2,000 moments; quick runs score 256."""
    hamuco = importlib.import_module("hamuco")
    for name in ("fit", "report"):
        monkeypatch.setattr(hamuco, name, lambda *given: None)
    monkeypatch.setattr(COURSE, "work", {})
    hamuco.run_stages({"epochs": 0, "mask_epochs": 3}, tmp_path, torch.device("cpu"))
    assert COURSE.work == {"train-hamuco": 3 * 32560 * 8 * 9, "scoring": 16000}
    hamuco.run_stages({"quick": True}, tmp_path, torch.device("cpu"))
    assert COURSE.work["scoring"] == 4 * 256
