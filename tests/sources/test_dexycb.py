"""DexYCB in its official layout."""

import numpy as np
import pytest

from common import UserError
from sources.dexycb import dexycb_split, index_dexycb
from sources.hands import Hands
from trees import KEYS, SERIALS, noise, save, write_dexycb, write_label


@pytest.fixture(scope="module")
def dexycb(tmp_path_factory):
    root = tmp_path_factory.mktemp("dexycb")
    write_dexycb(root, [6], frames=2)                             # s1's val subject
    return root


SIZES = {  # sequences and cameras of train, val, test, from the tool kit's table
    "s0": ([800, 40, 160], [8, 8, 8]), "s1": ([700, 100, 200], [8, 8, 8]),
    "s2": ([1000, 1000, 1000], [6, 1, 1]), "s3": ([750, 100, 150], [8, 8, 8])}


@pytest.mark.parametrize("part", SIZES)
def test_dexycb_splits_have_the_official_sizes_and_no_overlap(part):
    seen, (sequences, cameras) = [], SIZES[part]
    for which, split in enumerate(("train", "val", "test")):
        subject, sequence, camera = dexycb_split(part, split)
        assert len(subject) * len(sequence) == sequences[which] and len(camera) == cameras[which]
        seen.append({(s, i, c) for s in subject for i in sequence for c in camera})
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert len(seen[0] | seen[1] | seen[2]) == 10 * 100 * 8


def test_dexycb_splits_follow_the_tool_kit():
    assert dexycb_split("s0", "test") == ([2, 3, 4, 5, 6, 7, 8, 9], [*range(4, 100, 5)],
                                          [0, 1, 2, 3, 4, 5, 6, 7])
    assert dexycb_split("s0", "val")[0] == [0, 1] and dexycb_split("s0", "train")[1][:6] == [
        0, 1, 2, 3, 5, 6]
    assert [dexycb_split("s1", split)[0] for split in ("train", "val", "test")] == [
        [0, 1, 2, 3, 4, 5, 9], [6], [7, 8]]
    assert [dexycb_split("s2", split)[2] for split in ("train", "val", "test")] == [
        [0, 1, 2, 3, 4, 5], [6], [7]]
    assert dexycb_split("s3", "val")[1] == [15, 16, 17, 18, 19, 95, 96, 97, 98, 99]
    assert dexycb_split("s3", "test")[1][::5] == [35, 55, 75]
    with pytest.raises(UserError, match="s4"):
        dexycb_split("s4", "train")


def test_dexycb_enumerates_as_the_tool_kit_and_reads_its_labels(dexycb, tmp_path):
    (dexycb / "20200928-subject-07" / "stray.txt").touch()
    (dexycb / "20200928-subject-07" / "stray_folder").mkdir(exist_ok=True)
    index = index_dexycb(dexycb, "val", "s1")
    assert len(index) == 1600 and index.columns["image_id"].tolist() == [*range(1600)]
    place = index.columns["joints"][:, 0]                         # (sequence, camera, frame)
    assert place[[0, 1, 2, 15, 16, 1599]].tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 7, 1], [1, 0, 0], [99, 7, 1]]
    assert index.id(16) == "20200928-subject-07/20200928_140001/836212060125/color_000000.jpg"
    assert index.columns["side"][[0, 15, 16, 31]].tolist() == ["right", "right", "left", "left"]
    assert index.columns["K"][3].tolist() == [[600.5, 0, 310.25], [0, 601.5, 240.75], [0, 0, 1]]
    assert index.columns["shape"][0].tolist() == pytest.approx([6 + 0.1 * k for k in range(10)])
    # 20 joints at (100, 100), the wrist at (130, 140): 30 x 40 px, edges half a pixel on
    assert index.columns["box"][0].tolist() == [100.5, 100.5, 30, 40]
    assert index.box_source == "joints"
    assert np.isnan(index.columns["pose"]).all() and "no pose" in index.summary()
    picture = dexycb / index.id(0)
    save(picture, noise(480, 640))
    sample = Hands(index, 64, 1.2)[0]
    assert set(sample) == KEYS and not sample["has"]["pose"] and sample["has"]["shape"]
    assert sample["uv"][0].tolist() == pytest.approx([31.5 + 20, 31.5 + 20 * 64 / 48], abs=1e-4)
    picture.write_bytes(b"")


def test_dexycb_cache_notices_other_labels(dexycb, tmp_path, monkeypatch):
    fresh = index_dexycb(dexycb, "val", "s1", cache=tmp_path)
    again = index_dexycb(dexycb, "val", "s1", cache=tmp_path)
    assert np.array_equal(again.columns["joints"], fresh.columns["joints"])
    file = dexycb / fresh.id(7).replace("color", "labels").replace("jpg", "npz")
    file.rename(tmp_path / "label.npz")
    assert 7 not in index_dexycb(dexycb, "val", "s1", cache=tmp_path).columns["image_id"]
    (tmp_path / "label.npz").rename(file)


def test_dexycb_pose_is_pca_of_the_same_side_plus_its_mean(dexycb):
    rng = np.random.default_rng(5)
    hands = {side: {"hands_components": rng.normal(size=(45, 45)),
                    "hands_mean": rng.normal(size=45)} for side in ("right", "left")}
    index = index_dexycb(dexycb, "val", "s1", mano=hands)
    for row, side in ((0, "right"), (16, "left")):
        expected = hands[side]["hands_mean"].copy()
        for k in range(45):                                       # pose_m[k] is k / 100
            expected += (3 + k) / 100 * hands[side]["hands_components"][k]
        pose = index.columns["pose"][row]
        assert pose[:3].tolist() == pytest.approx([0, 0.01, 0.02])
        assert np.abs(pose[3:] - expected).max() < 1e-5
        assert index.columns["trans"][row].tolist() == pytest.approx([0.48, 0.49, 0.5])
    half = index_dexycb(dexycb, "val", "s1", mano={"right": hands["right"]})
    known, right = np.isfinite(half.columns["pose"]).all(1), half.columns["side"] == "right"
    assert np.array_equal(known, right) and "800 samples have no pose" in half.summary()
    assert np.isnan(half.columns["trans"][16]).all()


def test_dexycb_leaves_out_and_counts(tmp_path, monkeypatch):
    write_dexycb(tmp_path, [6])
    home = sorted((tmp_path / "20200928-subject-07").iterdir())
    at = lambda i: home[i // 8] / SERIALS[i % 8]
    minus = {"joint_3d": np.full((1, 21, 3), -1, "f4"), "joint_2d": np.full((1, 21, 2), -1, "f4"),
             "pose_m": np.zeros((1, 51), "f4")}
    write_label(at(1), 0, [0, 0, 0], **minus)                     # unlabelled
    write_label(at(2), 0, [0, 0, 0], **minus)
    (at(3) / "labels_000000.npz").unlink()
    (at(4) / "labels_000000.npz").write_bytes(b"PK not a zip")
    write_label(at(5), 0, [np.nan, 0, 0])
    write_label(at(6), 0, [0, 6, 0], joint_2d=np.zeros((1, 20, 2), np.float32))
    (at(7) / "color_000000.jpg").unlink()
    write_label(at(9), 0, [1, 1, 0], uv=700)                      # labelled, outside the picture
    write_label(at(10), 0, [1, 2, 0], uv=470)                     # partly inside
    index = index_dexycb(tmp_path, "val", "s1")
    assert index.dropped == {"unlabelled frames": 2, "frames without a label file": 1,
                             "frames with a broken label file": 2, "frames with NaN labels": 1,
                             "samples without their picture": 1}
    assert index.columns["image_id"].tolist() == [0, *range(8, 800)]      # the numbers stay
    assert index.columns["outside"].sum() == 1 and "1 hands outside" in index.summary()
    monkeypatch.setattr("sources.dexycb.dexycb_split", lambda part, split: ([6], [*range(100)], [*range(8)]))
    train = index_dexycb(tmp_path, "train", "s1")
    assert train.dropped["hands outside the picture"] == 1 and len(train) == 792


def test_dexycb_refuses_another_layout_in_one_sentence(tmp_path, dexycb):
    with pytest.raises(UserError, match="subject-01 must hold 100 sequences.* has 0"):
        index_dexycb(dexycb, "train", "s0")
    write_dexycb(tmp_path, [6])
    home = sorted((tmp_path / "20200928-subject-07").iterdir())
    (home[5] / "meta.yml").write_text("serials: [oops")
    with pytest.raises(UserError, match=home[5].name):
        index_dexycb(tmp_path, "val", "s1")
    (home[5] / "meta.yml").unlink()
    with pytest.raises(UserError, match="has 99"):
        index_dexycb(tmp_path, "val", "s1")
    with pytest.raises(UserError, match="no folder"):
        index_dexycb(tmp_path / "nowhere", "val", "s1")
