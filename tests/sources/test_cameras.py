"""Any rig's cameras.json."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sources
from common import UserError
from hamuco import projections, triangulate
from sources.cameras import index_cameras
from sources.hands import Hands
from sources.pictures import _hand_detector
from trees import open_tree, rig_tree


def near(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) < tolerance


@pytest.mark.parametrize("unit", [None, 0.04])
def test_any_rig_triangulates_its_undistorted_labels(tmp_path, unit):
    X = rig_tree(tmp_path, unit)
    data = open_tree(tmp_path)
    batch = next(sources.batches(data, [torch.arange(4)], torch.device("cpu"), 0))
    uv = batch["uv_label"].transpose(1, 2)
    found = triangulate(uv, projections(batch["K"], batch["cameras"])[:, None])
    near(found, torch.tensor(X[:4] * (unit or 1)), 1e-4)
    assert bool(batch["scale"].isnan().all()) == (unit is None)
    assert ("not metres" in data.hands.index.summary()) == (unit is None)
    assert batch["uv"].isnan().all() and batch["joints"].isnan().all()
    assert data[4]["view_ok"].tolist() == [True, False] and data[4]["cameras"][1].isnan().all()


def test_pictures_of_a_rig_are_undistorted_as_their_labels_are(tmp_path):
    """A white spot under the first key point stays under it, and its neighbours stay black."""
    rig_tree(tmp_path, frames=1)
    points = [[40.0 + 11 * j, 30.0 + 9 * j] for j in range(21)]          # the lens moves the corner by five px
    (tmp_path / "labels" / "cam0" / "0000.json").write_text(json.dumps([points, [0.9] * 21]))
    x, y = points[0]
    yy, xx = np.mgrid[:240, :300]
    spot = 255 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 18)
    Image.fromarray(np.repeat(spot[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "frames" / "cam0" / "0000.jpg", quality=95)
    sample = Hands(index_cameras(tmp_path, "all"), 256, 1.5)[0]
    weight = sample["image"][0].double().clamp(min=40) - 40
    at = [(weight.sum(axis) * torch.arange(256)).sum() / weight.sum() for axis in (0, 1)]
    assert (torch.stack(at) - sample["uv_label"][0]).abs().max() < 0.7
    assert sample["confidence"].tolist() == pytest.approx([0.9] * 21)


def test_rig_splits_in_time_and_cameras_may_move(tmp_path):
    rig_tree(tmp_path, moving=True)
    assert [len(open_tree(tmp_path, split)) for split in ("train", "test", "all")] == [8, 2, 10]
    M = open_tree(tmp_path)[2]["cameras"]
    assert M[1, 2, 3] == 4 and M[0, 2, 3] == 3 and open_tree(tmp_path)[1]["cameras"][1, 2, 3] == 3


def test_left_hands_are_mirrored_with_their_cameras(tmp_path):
    X = rig_tree(tmp_path, side="left")
    batch = next(sources.batches(open_tree(tmp_path), [torch.arange(2)], torch.device("cpu"), 0))
    found = triangulate(batch["uv_label"].transpose(1, 2), projections(batch["K"], batch["cameras"])[:, None])
    near(found, torch.tensor(X[:2] * [-1, 1, 1]), 1e-4)
    near(batch["cameras"][..., :3, :3].det(), torch.ones(2, 2), 1e-5)


@pytest.mark.parametrize("change, said", [
    (lambda rig: rig["cam0"].pop("K"), "'cam0' must give a camera's K"),
    (lambda rig: rig["cam0"].update(R=[[1, 0, 0], [0, 1, 0], [0, 0, -1]]), "R is no rotation"),
    (lambda rig: rig["cam0"].update(dist=[0] * 12), "fisheye"),
    (lambda rig: rig.update(unit_m=-1), "unit_m must lie"),
    (lambda rig: rig.update(side="both"), "side must be left or right")])
def test_a_wrong_cameras_json_is_named(tmp_path, change, said):
    rig_tree(tmp_path, frames=2)
    rig = json.loads((tmp_path / "cameras.json").read_text())
    change(rig)
    (tmp_path / "cameras.json").write_text(json.dumps(rig))
    with pytest.raises(UserError, match=said):
        index_cameras(tmp_path)


def test_a_rig_without_labels_and_without_mediapipe_is_refused(tmp_path, monkeypatch):
    rig_tree(tmp_path, frames=2)
    shutil.rmtree(tmp_path / "labels")
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.hands", None)
    _hand_detector.cache_clear()
    with pytest.raises(UserError, match="needs MediaPipe"):
        index_cameras(tmp_path)


def test_a_rig_without_labels_takes_the_surest_hand_of_its_side(tmp_path, monkeypatch):
    rig_tree(tmp_path, frames=2)
    shutil.rmtree(tmp_path / "labels")
    hand = lambda side, confidence, x: {"side": side, "confidence": confidence, "uv": np.full((21, 2), x) + np.arange(21)[:, None]}
    monkeypatch.setattr("sources.cameras.detect_hands", lambda picture: [hand("left", 0.9, 5.0), hand("right", 0.5, 9.0)])
    columns = index_cameras(tmp_path, "all").columns
    assert np.allclose(columns["confidence"], 0.5)
    monkeypatch.setattr("sources.cameras.detect_hands", lambda picture: [hand("left", 0.9, 5.0), hand("right", 0.4, 9.0)])
    assert np.allclose(index_cameras(tmp_path, "all").columns["confidence"], 0.45)          # the other side's counts half
