"""HanCo in its official layout."""

import numpy as np
import pytest
import torch

import common
import sources
from common import UserError, axis_angle_to_matrix
from hamuco import Config
from hand.builtin import builtin_hand
from sources import Rig, open_data
from sources.hanco import index_hanco
from trees import hanco_tree


EXACT = torch.float64


@pytest.fixture(scope="module")
def g(golden):
    arrays = golden("hamuco")
    return lambda name: torch.tensor(arrays[name])


def near(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) < tolerance


def test_hanco_reads_what_the_authors_loader_reads(g, tmp_path):
    index = index_hanco(hanco_tree(tmp_path, g))
    order = g("loader/test/view_order").long()
    joints = torch.tensor(index.columns["joints"])[order]
    near((joints - joints[:, 9:10]) / 0.2, g("loader/test/mesh_pose_xyz_joints"), 1e-4)
    crop = lambda uv: (256 / 130 * (torch.tensor(uv)[order] - 112) + 128) / 128 - 1    # their test crop
    near(crop(index.columns["uv_label"]), g("loader/test/mesh_pose_uvd_joints")[..., :2], 1e-4)
    near(crop(index.columns["uv"])[..., 0], g("loader/test/mesh_pose_uvd_gt_joints")[..., 0], 1e-4)    # fx twice, theirs
    near(torch.tensor(index.columns["confidence"])[order], g("loader/test/confidence")[..., 0], 1e-6)
    assert "8 pictures with 2D labels, 8 with joints" in index.summary()


def test_hanco_moments_keep_their_cameras_when_a_picture_is_missing(g, tmp_path):
    hanco_tree(tmp_path, g, missing=(2, 5))
    hanco_tree(tmp_path, g, "0004")
    cfg = Config(data=("hanco",), root=str(tmp_path), cache=str(tmp_path / "cache"), mano="builtin")
    data = open_data(cfg, cfg.data, "train", 64, 2.2, torch.device("cpu"), rig=Rig(8))
    assert len(data) == 2 and data[0]["view_ok"].tolist() == [True, True, False, True, True, False, True, True]
    batch = next(sources.batches(data, [torch.tensor([1, 0])], torch.device("cpu"), 0))
    assert batch["image"].shape == (2, 8, 3, 64, 64) and batch["cameras"].shape == (2, 8, 4, 4)
    near(batch["cameras"][0].double(), g("tri/M_w2c"), 1e-6)
    assert batch["image"][1, 2].max() == 0 and batch["joints"][1, 2].isnan().all()
    assert batch["has"]["cameras"].all() and batch["confidence"].isfinite().all()
    assert open_data(cfg, cfg.data, "train", 64, 2.2, torch.device("cpu"), rig=Rig(3))[0]["K"].shape == (3, 3, 3)
    # the crop at 2.2 x 104 px: a point of the picture goes where `crop` and K say
    point = batch["joints"] @ batch["K"].mT
    point = point[..., :2] / point[..., 2:]
    near(point[0], batch["uv"][0], 1e-2)
    targets = data.targets(torch.tensor([1, 0]))
    near(targets["joints"][0], batch["joints"][0], 1e-6)


def test_hanco_labels_that_come_later_are_seen(g, tmp_path):
    hanco_tree(tmp_path / "d", g)
    (tmp_path / "d" / "rgb_2d_keypoints").rename(tmp_path / "labels")
    index = index_hanco(tmp_path / "d", cache=tmp_path / "cache")
    assert np.isnan(index.columns["uv_label"]).all() and index.columns["joints"].shape == (8, 21, 3)
    (tmp_path / "labels").rename(tmp_path / "d" / "rgb_2D_keypoints")
    assert np.isfinite(index_hanco(tmp_path / "d", cache=tmp_path / "cache").columns["uv_label"]).all()
    next((tmp_path / "d" / "rgb_2D_keypoints" / "0003" / "cam3").iterdir()).unlink()
    some = np.isfinite(index_hanco(tmp_path / "d", cache=tmp_path / "cache").columns["uv_label"]).all((1, 2))
    assert some.tolist() == [True] * 3 + [False] + [True] * 4
    assert index.columns["box"][0].tolist() == [60, 60, 104, 104]


def test_hanco_splits_by_sequence_and_tests_on_merged_pictures(g, tmp_path):
    hanco_tree(tmp_path, g, "1199")
    hanco_tree(tmp_path, g, "1200", folder="rgb_merged")
    assert index_hanco(tmp_path, "train").path(0) == "rgb/1199/cam0/00000000.jpg"
    assert index_hanco(tmp_path, "test").path(0) == "rgb_merged/1200/cam0/00000000.jpg"
    with pytest.raises(UserError, match="not one of 1 frames has a picture in .*rgb"):
        index_hanco(tmp_path, "test", "rgb")
    with pytest.raises(UserError, match="hanco has the parts rgb, rgb_merged"):
        index_hanco(tmp_path, "test", "grey")
    with pytest.raises(UserError, match="must hold the folders of the sequences"):
        index_hanco(tmp_path / "xyz", "test")


def test_hanco_poses_are_turned_into_the_camera(g, tmp_path):
    hand = builtin_hand()
    index = index_hanco(hanco_tree(tmp_path, g), mano={"right": hand})
    mano = common.Mano(hand, dtype=EXACT)
    posed = lambda pose, trans: mano(axis_angle_to_matrix(torch.tensor(pose).double().view(1, 16, 3)),
                                     torch.full((1, 10), 0.2, dtype=EXACT), torch.tensor(trans).double()[None])[0][0]
    mean = torch.tensor(hand["hands_mean"])
    world = posed(np.concatenate([np.full(3, 0.1), 0.1 + mean.numpy()]), np.array([0.01, 0.02, 0.5]))
    for c in (0, 3):
        M = g("tri/M_w2c")[c]
        found = posed(index.columns["pose"][c], index.columns["trans"][c])
        near(found, world @ M[:3, :3].T + M[:3, 3], 1e-5)
