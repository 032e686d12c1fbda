"""InterHand2.6M in its official layout."""
import json

import numpy as np
import pytest
import torch

from common import UserError, axis_angle_to_matrix, mano_numpy
from hand.builtin import builtin_hand
from hand.official import mirror_mano
from sources.hands import Hands
from sources.index import unmirror
from sources.interhand import index_interhand
from trees import GOLDEN, write_interhand


def test_interhand_gives_one_row_a_hand_in_camera_metres(tmp_path):
    write_interhand(tmp_path)
    index = index_interhand(tmp_path, "test")
    assert index.columns["id"].tolist() == ["20-right", "20-left", "21-right", "22-left"]
    right, left = GOLDEN["map_ih26m_right_to_std"], GOLDEN["map_ih26m_left_to_std"]
    for row, order in enumerate((right, left, right, left)):
        assert np.abs(index.columns["joints"][row] - GOLDEN["ih_cam"][order] / 1000).max() < 1e-6
        pixel = GOLDEN["ih_pixel"][order, :2]
        assert np.abs(index.columns["uv"][row] - pixel).max() < 2e-3
        low, high = pixel.min(0), pixel.max(0)
        assert np.abs(index.columns["box"][row] - [*(low + 0.5), *(high - low)]).max() < 2e-3
    f, c = GOLDEN["ih_focal"], GOLDEN["ih_princpt"]
    assert np.allclose(index.columns["K"][1], [[f[0], 0, c[0]], [0, f[1], c[1]], [0, 0, 1]])
    assert index.columns["hand_type"].tolist() == ["interacting", "interacting", "right", "left"]
    assert index.columns["annotation_id"].tolist() == [20, 20, 21, 22]
    assert index.columns["frame"].tolist() == ["100", "100", "101", "102"] and not index.dropped
    samples = [Hands(index, 64, 1.25)[i] for i in range(4)]
    for sample in samples:
        seen = sample["joints"] @ sample["K"].T                   # also of the mirrored left hands
        assert (seen[:, :2] / seen[:, 2:] - sample["uv"]).abs().max() < 2e-2
    assert [sample["side"] for sample in samples] == ["right", "left", "right", "left"]
    D = torch.tensor([-1.0, 1, 1])
    back = unmirror({"joints": torch.stack([sample["joints"] for sample in samples])},
                    [sample["side"] for sample in samples])["joints"]
    assert np.abs(back[1].numpy() - GOLDEN["ih_cam"][left] / 1000).max() < 1e-6
    assert torch.equal(samples[1]["joints"] * D, back[1])


def test_interhand_counts_what_is_missing_or_invalid(tmp_path):
    some = [1] * 42
    some[3] = 0                                                   # right thumb's base: our joint 1
    some[41] = 0                                                  # the left wrist: no left hand
    write_interhand(tmp_path, {0: {"joint_valid": [[v] for v in some]}})   # nested, as mmpose ships
    (tmp_path / "images/test/Capture3/0390_x/cam400026/image101.jpg").unlink()
    file = tmp_path / "annotations/test/InterHand2.6M_test_joint_3d.json"
    frames = json.loads(file.read_text())
    del frames["3"]["102"]
    file.write_text(json.dumps(frames))
    index = index_interhand(tmp_path, "test")
    assert index.columns["id"].tolist() == ["20-right"]
    assert index.dropped == {"hands without a valid wrist": 1, "samples without their picture": 1,
                             "pictures without 3D joints": 1}
    sample = Hands(index, 64, 1.25)[0]
    assert (~sample["joints_ok"]).nonzero().flatten().tolist() == [1]
    assert sample["uv"][1].isnan().all() and sample["confidence"][1] == 0
    assert sample["has"]["joints"] and sample["has"]["uv"]


def test_interhand_nan_joints_are_left_out_and_counted(tmp_path):
    write_interhand(tmp_path)
    file = tmp_path / "annotations/test/InterHand2.6M_test_joint_3d.json"
    frames = json.loads(file.read_text())
    frames["3"]["101"]["world_coord"][7][1] = float("nan")
    frames["3"]["102"]["world_coord"][7][1] = float("nan")        # of the right hand, not annotated
    file.write_text(json.dumps(frames))
    index = index_interhand(tmp_path, "test")
    assert index.dropped == {"hands with NaN": 1} and "21-right" not in index.columns["id"]
    assert len(index) == 3


def test_interhand_parts(tmp_path):
    write_interhand(tmp_path)
    ids = lambda part: index_interhand(tmp_path, "test", part).columns["id"].tolist()
    assert ids("single") == ["21-right", "22-left"]
    assert ids("interacting") == ["20-right", "20-left"]
    with pytest.raises(UserError, match="aid_human_annot_test.txt is missing"):
        ids("H")
    (tmp_path / "annotations/test/aid_human_annot_test.txt").write_text("21\n")
    assert ids("H") == ["21-right"] and ids("M") == ["20-right", "20-left", "22-left"]
    with pytest.raises(UserError, match="'X'"):
        ids("X")


def pose_mesh(params: dict, pose: np.ndarray, sample: dict) -> np.ndarray:
    """Vertices (778, 3) m of a pose (48,) with the sample's shape and trans."""
    R = axis_angle_to_matrix(torch.tensor(pose, dtype=torch.float64).view(1, 16, 3)).numpy()
    shape, trans = (np.asarray(sample[key], float)[None] for key in ("shape", "trans"))
    return mano_numpy(params, R, shape, trans)[0][0]


def test_interhand_mesh_in_the_camera_equals_the_world_mesh_moved(tmp_path):
    rng, hand = np.random.default_rng(3), builtin_hand()
    hand = hand | {"hands_mean": rng.normal(0, 0.2, 45)}
    fit = {side: {"pose": rng.normal(0, 0.4, 48).tolist(), "shape": rng.normal(size=10).tolist(),
                  "trans": [0.1, -0.2, 1.1]} for side in ("right", "left")}
    write_interhand(tmp_path, fits={"100": fit, "101": {"right": None, "left": None}, "102": None})
    index = index_interhand(tmp_path, "test", mano={"right": hand})
    assert "2 samples have no pose" in index.summary()
    for row, (side, params) in enumerate((("right", hand), ("left", mirror_mano(hand)))):
        mean = np.concatenate([np.zeros(3), params["hands_mean"]])
        world = pose_mesh(params, np.array(fit[side]["pose"]) + mean, fit[side])
        expected = (world - GOLDEN["ih_campos"] / 1000) @ GOLDEN["ih_camrot"].astype(float).T
        columns = {key: index.columns[key][row] for key in ("pose", "shape", "trans")}
        assert np.abs(pose_mesh(params, columns["pose"], columns) - expected).max() < 1e-6
        sample = Hands(index, 64, 1.0)[row]                       # posed with the right hand's file
        mirrored = expected * ([-1, 1, 1] if side == "left" else 1)
        assert np.abs(pose_mesh(hand, sample["pose"].numpy(), sample) - mirrored).max() < 1e-6
        assert sample["has"]["pose"] and sample["has"]["shape"]
    bare = index_interhand(tmp_path, "test")
    assert np.isnan(bare.columns["pose"]).all() and np.isfinite(bare.columns["shape"][0]).all()
    assert not Hands(bare, 64, 1.0)[0]["has"]["pose"] and "4 samples have no pose" in bare.summary()


def test_interhand_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="data.json is missing"):
        index_interhand(tmp_path, "test")
    write_interhand(tmp_path)
    for name, text in (("camera", "{}"), ("data", "[]"), ("data", '{"images": []}'),
                       ("joint_3d", "{bad")):
        file = tmp_path / "annotations/test" / f"InterHand2.6M_test_{name}.json"
        whole = file.read_text()
        file.write_text(text)
        with pytest.raises(UserError, match="InterHand2.6M_test_.*json"):
            index_interhand(tmp_path, "test")
        file.write_text(whole)
