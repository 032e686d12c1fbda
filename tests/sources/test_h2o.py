"""H2O in its official layout."""
import json

import numpy as np
import pytest
import torch

from common import UserError
from sources.h2o import h2o_scores, h2o_split, index_h2o
from sources.hands import Hands
from sources.views import Views
from trees import KEYS, write_h2o


def test_h2o_splits_by_subject_and_scene():
    train, val, test = map(h2o_split, ("train", "val", "test"))
    assert train[:2] == ["subject1/h1", "subject1/h2"] and train[-3:] == ["subject3/h1", "subject3/h2", "subject3/k1"]
    assert val == ["subject3/k2", "subject3/o1", "subject3/o2"] and len(train) == 15
    assert test == [f"subject4/{scene}" for scene in ("h1", "h2", "k1", "k2", "o1", "o2")]


def test_h2o_reads_both_hands_of_every_camera(tmp_path):
    write_h2o(tmp_path)
    index = index_h2o(tmp_path)
    assert len(index) == 12 and index.box_source == "joints" and not index.dropped
    assert [index.id(row) for row in (0, 1, 11)] == [
        "subject1/h1/0/cam0/rgb/000000.png-left", "subject1/h1/0/cam0/rgb/000000.png-right",
        "subject1/h1/0/cam4/rgb/000001.png-right"]
    assert index.columns["side"].tolist() == ["left", "right"] * 6
    assert index.columns["camera"].tolist() == [0] * 4 + [1] * 4 + [4] * 4
    assert index.columns["moment"][[1, 5, 9]].tolist() == ["subject1/h1/0/000000-right"] * 3
    # camera 0 stands in the world's origin: the left hand's joint 20 lies at (0.04, 0.02, 0.5) m
    assert index.columns["joints"][0, 20].tolist() == pytest.approx([0.04, 0.02, 0.5])
    assert index.columns["uv"][0, 20].tolist() == pytest.approx([640.5 * 0.08 + 635.5, 636.25 * 0.04 + 366.75], abs=1e-3)
    # camera 1 looks along the world's x from (-0.5, 0, 0.5): joint 20 is 0.54 m before it, 0.02 below
    assert index.columns["joints"][4, 20].tolist() == pytest.approx([0, 0.02, 0.54], abs=1e-6)
    assert index.columns["K"][0].tolist() == [[640.5, 0, 635.5], [0, 636.25, 366.75], [0, 0, 1]]
    world = np.array([0.2 + 0.01 + 0.04, 0.02, 0.5, 1])                # the right hand's, in the second frame
    for row in (3, 7, 11):
        assert (index.columns["cameras"][row] @ world)[:3] == pytest.approx(index.columns["joints"][row, 20], abs=1e-6)
    assert index.columns["cameras"][11, :3, 3].tolist() == pytest.approx([0, -0.61, 0.5])      # it moves with the head
    assert "joints lie 0.0 mm from those of the moment's first camera" in index.summary()
    assert "1 of the 114 sequences" in index.summary()


def test_h2o_hands_have_the_pose_that_is_stored(tmp_path):
    write_h2o(tmp_path, frames=1)
    (tmp_path / "subject1/h1/0/cam1/hand_pose_mano/000000.txt").unlink()
    index = index_h2o(tmp_path)
    assert index.columns["pose"][1].tolist() == pytest.approx([0.01 * k for k in range(48)])      # the mean is in it
    assert index.columns["trans"][[0, 1]].ravel().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2, 1.3])
    assert index.columns["shape"][1].tolist() == [k - 1 for k in range(10)]
    assert "2 samples have no pose" in index.summary() and np.isnan(index.columns["pose"][2:4]).all()


def test_h2o_moments_are_one_hand_before_all_cameras(tmp_path):
    write_h2o(tmp_path)
    (tmp_path / "subject1/h1/0/cam0/rgb/000001.png").unlink()
    data = Views(Hands(index_h2o(tmp_path), 32, 1.5), 5)
    assert len(data) == 4 and data[0]["view_ok"].tolist() == [True, True, False, False, True]
    assert data[2]["view_ok"].tolist() == [False, True, False, False, True]
    batch = data.read([0, 1])
    assert batch["side"] == ["left", "right"] and batch["id"][0] == "subject1/h1/0/000000-left"
    # cameras of mirrored left hands show their mirrored joints: one world hand, x negated
    for b, x in ((0, -0.04), (1, 0.24)):
        for v in (0, 1, 4):
            M, joint = batch["cameras"][b, v], batch["joints"][b, v, 20]
            assert (M[:3, :3].mT @ (joint - M[:3, 3])).tolist() == pytest.approx([x, 0.02, 0.5], abs=1e-5)


def test_cameras_that_are_all_left_out_are_named(tmp_path):
    """H2O's archives of the head camera alone hold camera 4: with --views 4 nothing would be left."""
    write_h2o(tmp_path)
    for v in (0, 1):
        (tmp_path / f"subject1/h1/0/cam{v}/hand_pose").rename(tmp_path / f"not-{v}")
    hands = Hands(index_h2o(tmp_path), 32, 1.5)
    with pytest.raises(UserError, match="has pictures of camera 4 alone, counted from 0; take --views 5 or more"):
        Views(hands, 4)
    assert len(Views(hands, 5)) == 4


def test_h2o_tells_when_a_camera_means_one_hand_of_another_place(tmp_path):
    write_h2o(tmp_path, frames=1)
    file = tmp_path / "subject1/h1/0/cam1/cam_pose/000000.txt"
    file.write_text("0 0 1 -0.5  0 1 0 0.03  -1 0 0 0.54  0 0 0 1")              # 30 mm and 40 mm off, before two of three
    (tmp_path / "subject1/h1/0/cam4/cam_pose/000000.txt").write_text("0 " * 16)
    assert "joints lie 50.0 mm from" in index_h2o(tmp_path).summary()
    file.write_text("0 " * 16)
    assert "no hand is seen by two cameras" in index_h2o(tmp_path).summary()


def test_h2o_ego_is_the_head_camera_on_the_official_list(tmp_path):
    write_h2o(tmp_path, ("subject4/k1",), frames=3)
    with pytest.raises(UserError, match="pose_test.txt is neither in"):
        index_h2o(tmp_path, "test", "ego")
    (tmp_path / "label_split").mkdir()
    lines = [f"subject4/k1/0/cam4/rgb/{frame:06d}.png\n" for frame in (1, 2, 7)]
    (tmp_path / "label_split/pose_test.txt").write_text("".join(lines))
    (tmp_path / "subject4/k1/0/cam4/cam_pose/000001.txt").write_text("0 " * 16)
    file = tmp_path / "subject4/k1/0/cam4/hand_pose/000002.txt"
    file.write_text(" ".join(["1"] + ["5 0 1"] * 21 + ["0"] + ["nan 0 1"] * 21))       # far to the right; no right hand
    index = index_h2o(tmp_path, "test", "ego")
    assert [index.id(row)[-16:] for row in range(3)] == ["/000001.png-left", "000001.png-right", "/000002.png-left"]
    assert index.dropped == {"listed frames without a label file": 1, "hands without a label": 1}
    assert index.name == "h2o:ego test" and not {"moment", "camera", "cameras", "outside"} & set(index.columns)
    assert "1 hands outside the picture are kept" in index.summary()
    assert set(Hands(index, 32, 1.5)[0]) == KEYS


def test_h2o_leaves_out_and_counts(tmp_path):
    write_h2o(tmp_path, frames=4)
    home = tmp_path / "subject1/h1/0/cam1"
    (home / "cam_pose/000000.txt").write_text("0 " * 16)
    (home / "hand_pose/000001.txt").write_text(" ".join(["0"] + ["1e30"] * 63 + ["1"] + ["0.1 0.1 0.5"] * 20 + ["-0.1 nan 1"]))
    (home / "hand_pose/000002.txt").write_text(" ".join(["1"] + ["0.1 0.1 -0.5"] * 21 + ["1"] + ["0.1 0.1 0.5 0 0 1"] * 10 + ["0 0 1"]))
    (home / "rgb/000003.png").unlink()
    index = index_h2o(tmp_path)
    assert index.dropped == {"hands without a label": 2, "hands seen by a camera without a pose": 2,
                             "hands outside the picture": 1, "samples without their picture": 2}
    assert len(index) == 24 - 7


def test_h2o_takes_a_detector_s_labels_of_each_hand(tmp_path):
    write_h2o(tmp_path)
    assert "uv_label" not in index_h2o(tmp_path).columns
    found = {f"hand_{side}_keypoints_2d": [x for j in range(21) for x in (u, 40 + j, 0.75)] for side, u in (("left", 10), ("right", 500))}
    file = tmp_path / "subject1/h1/0/cam1/labels/000001.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"people": [found]}))
    index = index_h2o(tmp_path)
    assert index.columns["uv_label"][[6, 7], 3].tolist() == [[10, 43], [500, 43]]
    assert index.columns["confidence"].sum(1).tolist() == [15.75 * (row in (6, 7)) for row in range(12)]
    assert np.isnan(index.columns["uv_label"][5]).all()


def test_h2o_s_cache_notices_another_frame(tmp_path):
    write_h2o(tmp_path)
    cache = tmp_path / "cache"
    first, again = (index_h2o(tmp_path, cache=cache) for _ in range(2))
    assert np.array_equal(first.columns["joints"], again.columns["joints"]) and len(list(cache.iterdir())) == 1
    (tmp_path / "subject1/h1/0/cam4/hand_pose/000001.txt").unlink()
    assert len(index_h2o(tmp_path, cache=cache)) == 10


@pytest.mark.parametrize("name, text, said", [
    ("cam_intrinsics.txt", "640 640 320 240 1280", "cam_intrinsics.txt: its content must be 6 numbers"),
    ("cam_intrinsics.txt", "-640 640 320 240 1280 720", "cam_intrinsics.txt: K must be"),
    ("cam_pose/000000.txt", "2 " * 15 + "1", "000000.txt: the rotation is no rotation"),
    ("cam_pose/000000.txt", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 3 1", "000000.txt: it must end in 0 0 0 1"),
    ("hand_pose/000000.txt", "1 " * 104, "hand_pose/000000.txt: its content must be 128 numbers"),
    ("hand_pose/000000.txt", "0.5 " * 128, "hand_pose/000000.txt: a hand's flag must be one of 0, 1"),
    ("hand_pose_mano/000000.txt", "1 two", "hand_pose_mano/000000.txt: could not convert")])
def test_h2o_names_what_is_wrong(tmp_path, name, text, said):
    write_h2o(tmp_path, frames=1)
    (tmp_path / "subject1/h1/0/cam0" / name).write_text(text)
    with pytest.raises(UserError, match=said):
        index_h2o(tmp_path)


def test_h2o_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="must hold subject4/h1/0/cam4 and what is like it"):
        index_h2o(tmp_path, "test")
    with pytest.raises(UserError, match="has the part ego, not 'cam4'"):
        index_h2o(tmp_path, "test", "cam4")
    (tmp_path / "subject1/h1/0/cam4").mkdir(parents=True)
    (tmp_path / "subject1/h1/0/cam4/cam_intrinsics.txt").write_text("640 640 320 240 1280 720")
    with pytest.raises(UserError, match="no camera below .* has a file in hand_pose"):
        index_h2o(tmp_path)


def test_h2o_s_score_tells_hands_apart():
    true = torch.zeros(2, 21, 3).double()
    f = {"camera": true + torch.tensor([[[0.003, 0, 0.004]], [[0.0, 0.02, 0]]]), "true": true,
         "ok": torch.ones(2, 21, dtype=torch.bool), "left": torch.tensor([True, False])}
    means = {name: float(value.nanmean()) for name, value in h2o_scores(f).items()}
    assert means == {"abs_mpjpe_mm_left": pytest.approx(5), "abs_mpjpe_mm_right": pytest.approx(20)}
