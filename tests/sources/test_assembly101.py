"""Assembly101 in AssemblyHands' layout."""
import json

import numpy as np
import pytest
import torch

from common import UserError
from sources.assembly101 import assembly101_scores, index_assembly101
from sources.hands import Hands
from sources.views import Views
from trees import KEYS, write_assembly101

SEQUENCE = "nusar-2021_action_both_9012-c07c"


def file_of(root, kind):
    return root / f"annotations/val/assemblyhands_val_{kind}_v1-1.json"


def test_assembly101_reads_both_hands_of_every_camera(tmp_path):
    hidden = [1] * 42
    hidden[24] = hidden[20] = 0                                        # the left thumb's base, the right wrist
    write_assembly101(tmp_path, {0: {"joint_valid": hidden}})
    index = index_assembly101(tmp_path, "val")
    assert len(index) == 8 and not index.dropped and index.box_source == "annotated"
    assert index.columns["side"].tolist() == ["right", "left"] * 4
    assert index.path(2) == f"images/ego_images_rectified/val/{SEQUENCE}/HMC_84355350_mono10bit/000520.jpg"
    assert index.columns["box"][:2].tolist() == [[201.5, 180, 88.75, 82.75], [10, 20, 20, 40]]
    assert index.columns["K"][0].tolist() == [[134.5, 0, 321], [0, 134.5, 238], [0, 0, 1]]
    # joint 0 of theirs is the thumb's tip, our 4: at the world's origin, (10, 20, 400) mm before the first camera
    assert index.columns["joints"][0, 4].tolist() == pytest.approx([0.01, 0.02, 0.4])
    assert index.columns["uv"][0, 4].tolist() == pytest.approx([134.5 / 40 + 321, 134.5 / 20 + 238], abs=1e-3)
    # the left index finger's base, our 5, is their 21 + 7: (112, 56, 50) mm in frame 522; the second camera looks along x
    assert index.columns["joints"][7, 5].tolist() == pytest.approx([-0.05, 0.056, 0.412])
    assert np.isnan(index.columns["joints"][1, 0]).all() and np.isfinite(index.columns["joints"][1, 1:]).all()     # their 41
    assert np.argwhere(~index.columns["visible"]).tolist() == [[0, 0], [1, 1]]
    sample = Hands(index, 16, 1.5)[1]
    assert set(sample) == KEYS and {key for key, known in sample["has"].items() if known} == {"K", "joints", "uv"}
    assert sample["joints_ok"].tolist() == [False] + [True] * 20 and sample["visible"].tolist() == [True, False] + [True] * 19


def test_assembly101_s_moments_are_one_hand_before_the_headset(tmp_path):
    write_assembly101(tmp_path, {2: {"bbox": {"right": None, "left": [10, 20, 30, 60]}}})
    data = Views(Hands(index_assembly101(tmp_path, "val"), 16, 1.5), 4)
    assert [data[k]["id"][-11:] for k in range(4)] == ["000520-left", "00520-right", "000522-left", "00522-right"]
    assert data[0]["view_ok"].tolist() == [True, False, True] and data[3]["view_ok"].tolist() == [False, False, True]
    batch = data.read([0, 1])
    # cameras of mirrored left hands show their mirrored joints: one world hand, x negated
    for b, x in ((0, -0.112), (1, 0.028)):
        for v in (0, 2):
            M, joint = batch["cameras"][b, v], batch["joints"][b, v, 5]
            assert (M[:3, :3].mT @ (joint - M[:3, 3])).tolist() == pytest.approx([x, -x / 2 if b == 0 else x / 2, 0], abs=1e-5)


def test_assembly101_leaves_out_and_counts(tmp_path):
    write_assembly101(tmp_path, {0: {"bbox": {"right": None, "left": [10, 20, 30, 60]}},
                                 1: {"joint_valid": [1] * 9 + [0] * 12 + [1] * 10 + [0] * 11}})
    (tmp_path / f"images/ego_images_rectified/val/{SEQUENCE}/HMC_84355350_mono10bit/000522.jpg").unlink()
    index = index_assembly101(tmp_path, "val", cache=tmp_path / "cache")
    assert index.dropped == {"hands with fewer than 10 visible joints": 1, "hands without a box": 1, "samples without their picture": 2}
    assert len(index) == 4
    content = json.loads(file_of(tmp_path, "joint_3d").read_text())
    frame = content["annotations"][SEQUENCE]["000522"]
    frame["world_coord"][3][1] = frame["world_coord"][41][1] = None    # of the right hand; the left wrist is not valid anyway
    file_of(tmp_path, "joint_3d").write_text(json.dumps(content))
    assert index_assembly101(tmp_path, "val").dropped["hands with NaN"] == 2
    frame["joint_valid"] = [0] * 21 + [1] * 21                      # the right hand is annotated in 2D alone, in two views
    file_of(tmp_path, "joint_3d").write_text(json.dumps(content))
    assert index_assembly101(tmp_path, "val").dropped["hands without 3D joints"] == 2
    del content["annotations"][SEQUENCE]["000522"]
    file_of(tmp_path, "joint_3d").write_text(json.dumps(content))
    assert index_assembly101(tmp_path, "val", cache=tmp_path / "cache").dropped["hands without 3D joints"] == 4


def test_assembly101_takes_a_detector_s_labels_of_each_hand(tmp_path):
    write_assembly101(tmp_path)
    cache = tmp_path / "cache"
    assert "uv_label" not in index_assembly101(tmp_path, "val", cache=cache).columns
    found = {f"hand_{side}_keypoints_2d": [x for j in range(21) for x in (u, 40 + j, 0.75)] for side, u in (("left", 10), ("right", 500))}
    file = tmp_path / f"labels/ego_images_rectified/val/{SEQUENCE}/HMC_84346135_mono10bit/000522.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"people": [found]}))
    index = index_assembly101(tmp_path, "val", cache=cache)
    assert index.columns["uv_label"][[4, 5], 3].tolist() == [[500, 43], [10, 43]]
    assert index.columns["confidence"].sum(1).tolist() == [15.75 * (row in (4, 5)) for row in range(8)]


@pytest.mark.parametrize("kind, old, new, said", [
    ("ego_data", '"file_name": "', '"file_name": "../../', "ego_data.*file_name must be a path below"),
    ("ego_data", '"frame_idx": 520', '"frame_idx": "520"', "ego_data.*frame_idx must be a whole"),
    ("ego_data", '"camera": "HMC_84346135"', '"camera": "C10095"', "'C10095' is on none of the two headsets"),
    ("ego_data", '"joint_valid": [1,', '"joint_valid": [', "ego_data.*joint_valid must be 42"),
    ("ego_data", '"image_id": 7', '"image_id": 6', "ego_data.*it has no 6"),
    ("ego_calib", "[[134.5,", "[[-134.5,", "intrinsics must be"), ("ego_calib", "[[1, 0, 0, 10]", "[[2, 0, 0, 10]", "extrinsics is no rotation"),
    ("ego_calib", "calibration", "c", "it has no 'calibration'"), ("joint_3d", "[[0.0, ", "[[Infinity, ", "joint_3d.*world_coord")])
def test_assembly101_names_what_is_wrong(tmp_path, kind, old, new, said):
    write_assembly101(tmp_path)
    file = file_of(tmp_path, kind)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        index_assembly101(tmp_path, "val")


def test_assembly101_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="assemblyhands_train_ego_data_v1-1.json is missing"):
        index_assembly101(tmp_path)
    write_assembly101(tmp_path, {i: {"joint_valid": [0] * 42} for i in range(4)})
    with pytest.raises(UserError, match="has no hand to read, left out {'hands with fewer than 10 visible joints': 8}"):
        index_assembly101(tmp_path, "val")


def test_assembly101_s_score_is_the_mean_of_joints_means_where_they_are_visible():
    true = torch.zeros(3, 21, 3).double()
    pred = true.clone()
    pred[0, 1:, 0], pred[1, 1:, 1], pred[2, 1:, 2] = 0.01, 0.03, 0.02
    f = {"joints": pred + 5, "true": true, "ok": torch.ones(3, 21, dtype=torch.bool), "visible": torch.ones(3, 21, dtype=torch.bool),
         "left": torch.tensor([False, False, True])}
    f["visible"][1, 1:] = False
    value = assembly101_scores(f)["mpjpe_mm"]
    assert value.shape == (3, 42) and float(value.nanmean(0).mean()) == pytest.approx((20 * 10 + 20 * 20) / 42)
