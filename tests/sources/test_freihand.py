"""FreiHAND in its official layout."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate as collate

from common import UserError
from hand.builtin import builtin_hand
from sources.freihand import freihand_split, index_freihand
from sources.hands import Hands
from trees import KEYS, mesh, write_freihand


def test_freihand_90_is_scikit_learns_split_of_the_unique_hands():
    # scikit-learn's documented example: train_test_split(range(5), test_size=0.33, random_state=42)
    # is train 2 0 3, test 1 4; one legacy permutation, its head is the test set
    assert np.random.RandomState(42).permutation(5).tolist() == [1, 4, 2, 0, 3]
    train, val = freihand_split("90", "train"), freihand_split("90", "val")
    assert (len(train), len(val)) == (4 * 29304, 4 * 3256)
    assert val[:10].tolist() == [5, 19, 21, 39, 86, 111, 119, 133, 140, 145]
    assert val[:3256].sum() == 52735085 and (np.diff(val[:3256]) > 0).all()
    for block in range(4):                                        # all variants of a hand stay together
        assert np.array_equal(val[3256 * block:3256 * (block + 1)], val[:3256] + 32560 * block)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(130240))
    assert np.array_equal(freihand_split("90-gs", "val"), val[:3256])
    assert np.array_equal(freihand_split("90-gs", "train"), train[:29304])


def test_freihand_parts_and_their_sizes():
    assert np.array_equal(freihand_split("all", "train"), np.arange(130240))
    assert np.array_equal(freihand_split("gs", "train"), np.arange(32560))
    for part in ("all", "gs", "90", "90-gs"):
        assert np.array_equal(freihand_split(part, "test"), np.arange(3960))
    assert len(freihand_split("all", "val")) == len(freihand_split("gs", "val")) == 0
    for wrong in ("gs-90", "91", "90-", ""):
        with pytest.raises(UserError, match="parts all, gs, 90, 90-gs"):
            freihand_split(wrong, "train")


def test_freihand_reads_four_variants_of_each_hand(tmp_path):
    write_freihand(tmp_path)
    index = index_freihand(tmp_path)
    assert len(index) == 12 and index.id(7) == "training/rgb/00065121.jpg"      # hand 1, variant 2
    assert index.columns["image_id"].tolist() == [0, 1, 2, 32560, 32561, 32562, 65120, 65121, 65122,
                                                  97680, 97681, 97682]
    assert "training_*.json have 3 of the 32,560 hands" in index.summary() and not index.dropped
    sample = Hands(index, 64, 1.0)[7]
    assert set(sample) == KEYS and sample["side"] == "right" and sample["box_source"] == "joints"
    assert sample["joints"][4].tolist() == pytest.approx([0.03, 0.02, 0.5])
    assert sample["verts"][777].tolist() == pytest.approx([0.777, 1, 0.5])
    assert sample["scale"] == pytest.approx(0.031)
    assert sample["shape"].tolist() == pytest.approx([1.48 + 0.01 * k for k in range(10)])
    row = {key: column[7] for key, column in index.columns.items()}
    assert row["K"].tolist() == [[401, 0, 112], [0, 500, 110], [0, 0, 1]]
    # u = 401 x 0.03 / 0.5 + 112, v = 500 x 0.02 / 0.5 + 110 for joint 4 of hand 1
    assert row["uv"][4].tolist() == pytest.approx([136.06, 130])
    # from joint 0 at (120.02, 110) to joint 20 at (200.22, 210), centres to edges
    assert row["box"].tolist() == pytest.approx([120.52, 110.5, 80.2, 100], abs=1e-4)
    seen = sample["joints"] @ sample["K"].T
    assert torch.allclose(seen[:, :2] / seen[:, 2:], sample["uv"], atol=1e-3)
    green = index_freihand(tmp_path, part="gs")
    assert green.columns["paths"].tolist() == index.columns["paths"].tolist()[:3]


def test_freihand_keeps_its_split_in_a_folder_with_few_hands(tmp_path):
    write_freihand(tmp_path, n=20)
    hands = lambda split: index_freihand(tmp_path, split, "90-gs").columns["image_id"].tolist()
    assert hands("val") == [5, 19]                                # of 5, 19, 21, ... of the whole
    assert hands("train") == [i for i in range(20) if i not in (5, 19)]


def test_freihand_counts_missing_pictures_and_has_no_val(tmp_path):
    write_freihand(tmp_path)
    (tmp_path / "training/rgb/00032561.jpg").unlink()
    index = index_freihand(tmp_path)
    assert index.dropped == {"samples without their picture": 1} and len(index) == 11
    assert index.columns["image_id"][3:6].tolist() == [32560, 32562, 65120]
    assert index.columns["scale"][3:6].tolist() == pytest.approx([0.03, 0.032, 0.03])     # still theirs
    for part in ("all", "gs"):
        empty = index_freihand(tmp_path, "val", part)
        hands = Hands(empty, 32, 1.0)
        assert len(empty) == len(hands) == 0 and "no validation split" in empty.summary()
        assert len(torch.utils.data.ConcatDataset([Hands(index, 32, 1.0), hands])) == 11


def test_freihand_pose_has_the_mean_and_trans_puts_it_on_the_mesh(tmp_path, hand):
    rng, thetas, meshes, offsets, regressed = np.random.default_rng(0), [], [], [], []
    for i in range(3):
        theta = np.concatenate([rng.normal(0, 0.4, 48), rng.normal(size=10), [130 - i, 100, 700]])
        pose = theta[:48] + np.concatenate([np.zeros(3), hand["hands_mean"]])
        verts, joints = mesh(hand, pose, theta[48:58], np.zeros(3))
        # official: the middle finger's base, MANO's joint 4, goes to (u - cx, v - cy, f) / s
        root = np.array([theta[58] - 112, theta[59] - 110, (400 + i + 500) / 2]) / 700
        offsets.append(root - joints[4])
        meshes.append((verts + offsets[-1]).tolist())
        thetas.append([theta.tolist()])
        J = hand["J_regressor"] @ meshes[-1]
        J = np.concatenate([J, np.array(meshes[-1])[[744, 320, 443, 555, 672]]])
        regressed.append(J[[0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]])
    write_freihand(tmp_path, mano=thetas, verts=meshes, xyz=[J.tolist() for J in regressed])
    index = index_freihand(tmp_path, part="gs", mano={"right": hand})
    for i in range(3):
        row = {key: column[i].astype(float) for key, column in index.columns.items()
               if key in ("pose", "shape", "trans")}
        assert row["pose"][:3] == pytest.approx(thetas[i][0][:3], abs=1e-6)
        assert row["pose"][3:] == pytest.approx(thetas[i][0][3:48] + hand["hands_mean"], abs=1e-6)
        assert np.abs(row["trans"] - offsets[i]).max() < 1e-6
        posed, _ = mesh(hand, row["pose"], row["shape"], row["trans"])
        assert np.abs(posed - meshes[i]).max() < 2e-6
    assert "lie 0.00 mm, joints regressed from the stored vertices 0.00 mm" in index.summary()
    assert "no pose" not in index.summary()
    other = index_freihand(tmp_path, part="gs", mano={"right": builtin_hand()})       # not its mean
    assert "0.00 mm, joints" not in other.summary() and "vertices 0.00 mm" in other.summary()
    moved = [(J + [0, 0.003, 0]).tolist() for J in regressed]
    write_freihand(tmp_path, mano=thetas, verts=meshes, xyz=moved)
    assert "vertices 3.00 mm" in index_freihand(tmp_path, part="gs", mano={"right": hand}).summary()
    bare = index_freihand(tmp_path, part="gs", mano={})
    assert np.isnan(bare.columns["pose"]).all() and np.isnan(bare.columns["trans"]).all()
    assert np.isfinite(bare.columns["shape"]).all() and "3 samples have no pose" in bare.summary()
    sample = Hands(bare, 32, 1.0)[0]
    assert not sample["has"]["pose"] and sample["has"]["verts"]


def test_freihand_evaluation_without_truth_starts_from_the_central_square(tmp_path, hand):
    write_freihand(tmp_path, "evaluation", n=2, xyz=None, mano=None, verts=None)
    index = index_freihand(tmp_path, "test")
    assert index.columns["paths"].tolist() == [b"evaluation/rgb/00000000.jpg",
                                               b"evaluation/rgb/00000001.jpg"]
    # 33 % of 224 px is 73.92, and (224 - 73.92) / 2 = 75.04
    assert index.columns["box"].tolist() == [pytest.approx([75.04, 75.04, 73.92, 73.92])] * 2
    assert index.box_source == "data set" and "evaluation_xyz.json is not there" in index.summary()
    assert np.isnan(index_freihand(tmp_path, "test", mano={"right": hand}).columns["pose"]).all()
    sample = Hands(index, 64, 2.2)[1]
    assert [key for key, known in sample["has"].items() if known] == ["K"]
    assert sample["scale"] == pytest.approx(0.031) and not sample["joints_ok"].any()
    write_freihand(tmp_path, "evaluation", n=2, verts=None)
    index = index_freihand(tmp_path, "test", "90")
    has = collate([Hands(index, 64, 1.0)[i] for i in range(2)])["has"]
    assert has["joints"].all() and has["uv"].all() and not has["verts"].any()
    assert index.box_source == "joints" and index.columns["image_id"].tolist() == [0, 1]


def test_freihand_refuses_other_files_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="training_K.json is missing"):
        index_freihand(tmp_path)
    write_freihand(tmp_path, mano=None)
    with pytest.raises(UserError, match="training_mano.json is missing"):
        index_freihand(tmp_path)
    write_freihand(tmp_path, scale=[0.03] * 4)
    with pytest.raises(UserError, match="32,560 hands; they have K 3, xyz 3, mano 3, verts 3, scale 4"):
        index_freihand(tmp_path)
    write_freihand(tmp_path)
    whole = (tmp_path / "training_xyz.json").read_text()
    for text in ("", "[]", "{}", whole[:-40], whole.replace("0.5", "null"), "[[[1, 2, 3]]]"):
        (tmp_path / "training_xyz.json").write_text(text)
        with pytest.raises(UserError, match="training_xyz.json: is not a list of entries of 21 x 3"):
            index_freihand(tmp_path)
    write_freihand(tmp_path, "evaluation", K=[[[1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 3961, scale=[1] * 3961, xyz=None, mano=None, verts=None)
    with pytest.raises(UserError, match="3,960 hands; they have K 3,961, scale 3,961"):
        index_freihand(tmp_path, "test")


def test_freihand_cache_notices_other_annotations(tmp_path, monkeypatch):
    write_freihand(tmp_path)
    fresh = index_freihand(tmp_path, part="gs", cache=tmp_path / "cache")
    monkeypatch.setattr("sources.freihand.json_numbers", lambda *_: pytest.fail("was read again"))
    again = index_freihand(tmp_path, "train", "all", cache=tmp_path / "cache")   # one file, every part
    assert np.array_equal(again.columns["joints"][3:6], fresh.columns["joints"])
    assert again.box_source == "joints" and len(again) == 12
    monkeypatch.undo()
    write_freihand(tmp_path, scale=[0.5, 0.6, 0.75])
    changed = index_freihand(tmp_path, part="gs", cache=tmp_path / "cache")
    assert changed.columns["scale"].tolist() == pytest.approx([0.5, 0.6, 0.75])
