"""HO3D in its official layout."""
import json
import pickle

import numpy as np
import pytest

from common import UserError
from sources.hands import Hands
from sources.ho3d import index_ho3d
from trees import KEYS, evaluation_label, mesh, meta, picture, python2, write_ho3d


def test_ho3d_training_labels_turn_into_our_axes_and_order(tmp_path):
    names = ["SS2/0007", "ABF10/0000", "ABF10/0002"]              # not sorted: the list's own order
    write_ho3d(tmp_path, "train", [meta(0), meta(1), meta(2)], names)
    picture(tmp_path / "train/ABF10/rgb/0001.png")                # not in the list: does not count
    index = index_ho3d(tmp_path)
    assert [index.id(i) for i in range(3)] == ["train/SS2/rgb/0007.png", "train/ABF10/rgb/0000.png",
                                               "train/ABF10/rgb/0002.png"]
    order = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
    joints = [[0.01 * j, -0.002 * j, 0.51] for j in order]        # y and z change their signs
    assert np.abs(index.columns["joints"][1] - joints).max() < 1e-6
    # joint 20: u = 600 x 0.2 / 0.51 + 320 = 555.294, v = 610 x (-0.04) / 0.51 + 240 = 192.157
    assert index.columns["uv"][1, 20] == pytest.approx([555.294, 192.157], abs=1e-3)
    assert index.columns["box"][1] == pytest.approx([320.5, 192.657, 235.294, 47.843], abs=1e-3)
    assert index.box_source == "joints" and index.columns["image_id"].tolist() == [0, 1, 2]
    assert index.columns["shape"][1].tolist() == [k - 1 for k in range(10)]
    assert index.columns["root"][2].tolist() == pytest.approx([0, 0, 0.52])
    sample = Hands(index, 64, 1.25)[1]
    assert set(sample) == KEYS and sample["side"] == "right"
    known = {key for key, known in sample["has"].items() if known}
    assert known == {"joints", "uv", "K", "pose", "shape"}
    assert sample["trans"].isnan().all() and "trans is not known" in index.summary()
    assert "no pose" not in index.summary()                       # the pose needs no MANO file


def test_ho3d_mesh_in_our_axes_is_the_annotated_mesh_flipped(tmp_path, hand):
    rng = np.random.default_rng(1)
    label = meta(0, handPose=rng.normal(0, 0.5, 48), handBeta=rng.normal(size=10))
    write_ho3d(tmp_path, "train", [label], ["A/1"])
    index = index_ho3d(tmp_path, mano={"right": hand})
    row = {key: index.columns[key][0].astype(float) for key in ("pose", "shape", "trans")}
    assert row["pose"][3:] == pytest.approx(label["handPose"][3:], abs=1e-6)      # the mean is in it
    theirs, _ = mesh(hand, label["handPose"], label["handBeta"], label["handTrans"])
    ours, _ = mesh(hand, row["pose"], row["shape"], row["trans"])
    assert np.abs(ours - theirs * [1, -1, -1]).max() < 1e-6
    flat, _ = mesh(hand, row["pose"], row["shape"], label["handTrans"] * [1, -1, -1])
    assert np.abs(flat - theirs * [1, -1, -1]).max() > 1e-3       # trans is not simply flipped


def test_ho3d_evaluation_keeps_its_order_and_scores_the_released_truth(tmp_path):
    names = ["SM1/0003", "AP10/0000"]
    write_ho3d(tmp_path, "evaluation", [evaluation_label(0), evaluation_label(1)], names, ".jpg")
    index = index_ho3d(tmp_path, "test")
    assert index.columns["paths"].tolist() == [b"evaluation/SM1/rgb/0003.jpg",
                                               b"evaluation/AP10/rgb/0000.jpg"]
    assert index.columns["box"].tolist() == [[10, 5, 30, 32], [10, 6, 30, 31]]
    assert index.box_source == "annotated" and "evaluation_xyz.json is not there" in index.summary()
    assert index.columns["root"][1].tolist() == pytest.approx([0.01, -0.02, 0.5])
    sample = Hands(index, 32, 1.0)[1]
    assert [key for key, known in sample["has"].items() if known] == ["K"]
    xyz = [[[0.01 * i + 0.001 * j, 0.02, -0.5] for j in range(21)] for i in range(2)]
    verts = [[[0.0001 * k, 0.1 * i, -0.4] for k in range(778)] for i in range(2)]
    (tmp_path / "evaluation_xyz.json").write_text(json.dumps(xyz))
    (tmp_path / "evaluation_verts.json").write_text(json.dumps(verts))
    index = index_ho3d(tmp_path, "test", cache=tmp_path / "cache")
    sample = Hands(index, 32, 1.0)[1]
    assert sample["joints"][1].tolist() == pytest.approx([0.01 + 0.013, -0.02, 0.5])    # their joint 13
    assert sample["verts"][777].tolist() == pytest.approx([0.0777, -0.1, 0.4])
    # u = 60 x 0.01 / 0.5 + 32 = 33.2, v = 60 x (-0.02) / 0.5 + 24 = 21.6
    assert index.columns["uv"][1, 0].tolist() == pytest.approx([33.2, 21.6], abs=1e-5)
    assert not index.notes and index.box_source == "annotated"
    xyz = [[[x, -y, -z] for x, y, z in hand] for hand in xyz]     # truth in other axes
    (tmp_path / "evaluation_xyz.json").write_text(json.dumps(xyz))
    with pytest.raises(UserError, match="lies 1001 mm from the wrists"):
        index_ho3d(tmp_path, "test", cache=tmp_path / "cache")
    (tmp_path / "evaluation_xyz.json").write_text(json.dumps(xyz[:1]))
    with pytest.raises(UserError, match="has 1 entries, evaluation.txt 2 frames"):
        index_ho3d(tmp_path, "test")


def test_ho3d_leaves_out_and_counts(tmp_path):
    nan = meta(0)["handJoints3D"] * np.nan
    labels = [meta(0), meta(1, handJoints3D=None), meta(2, handJoints3D=nan), b"no pickle", meta(4),
              python2(meta(5))[:-300], meta(6, handPose=np.zeros(45)), meta(7)]
    write_ho3d(tmp_path, "train", labels, [f"A/{i}" for i in range(8)])
    (tmp_path / "train/A/meta/4.pkl").unlink()
    (tmp_path / "train/A/rgb/7.png").unlink()
    index = index_ho3d(tmp_path)
    assert index.columns["image_id"].tolist() == [0] and index.dropped == {
        "unlabelled frames": 1, "frames with NaN labels": 1, "frames with a broken label file": 3,
        "frames without a label file": 1, "samples without their picture": 1}
    assert len(index_ho3d(tmp_path, "val")) == 0


class Evil:
    """What a hostile label would have run."""

    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def test_ho3d_labels_are_read_without_running_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    later = {key: value for key, value in meta(1).items() if key != "objCorners3D"}
    labels = [pickle.dumps(later | {"objLabel": np.float64(2)}, protocol) for protocol in (2, 3, 4, 5)]
    write_ho3d(tmp_path, "train", labels, [f"A/{i}" for i in range(4)])           # re-saved by Python 3
    index = index_ho3d(tmp_path)
    assert len(index) == 4 and not index.dropped
    assert np.abs(index.columns["joints"][..., 2] - 0.51).max() < 1e-6
    for protocol in (0, 2, 4):
        write_ho3d(tmp_path, "train", [pickle.dumps(meta(0, objName=Evil()), protocol)], ["A/0"])
        with pytest.raises(UserError, match="A/meta/0.pkl: names '.*eval', which no label needs"):
            index_ho3d(tmp_path)
    ch = python2(meta(0))[:-1] + python2("x") + b"cchumpy.ch\nCh\n)\x81d."      # MANO files may
    write_ho3d(tmp_path, "train", [ch], ["A/0"])
    with pytest.raises(UserError, match="'chumpy.ch.Ch', which no label needs"):
        index_ho3d(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_ho3d_cache_notices_other_labels(tmp_path, monkeypatch):
    write_ho3d(tmp_path, "train", [meta(0), meta(1)], ["A/0", "A/1"])
    fresh = index_ho3d(tmp_path, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("sources.ho3d._label", lambda _: pytest.fail("was read again"))
        again = index_ho3d(tmp_path, cache=tmp_path / "cache")
    assert np.array_equal(again.columns["joints"], fresh.columns["joints"]) and len(again) == 2
    (tmp_path / "train/A/meta/1.pkl").unlink()
    assert len(index_ho3d(tmp_path, cache=tmp_path / "cache")) == 1


def test_ho3d_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="train.txt is missing"):
        index_ho3d(tmp_path)
    for text in ("", "ABF10\n", "a/b/c\n"):
        (tmp_path / "train.txt").write_text(text)
        with pytest.raises(UserError, match="train.txt must have one SEQUENCE/FRAME a line"):
            index_ho3d(tmp_path)
