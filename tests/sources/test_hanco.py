"""HanCo in its official layout."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import common
import hamuco
import sources
from common import UserError, axis_angle_to_matrix, score
from hamuco import Config
from hand.builtin import builtin_hand
from sources import Rig, open_data
from sources.hanco import index_hanco
from sources.predictors import as_pictures, facts
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


def test_squares_have_no_more_px_than_their_pictures_and_2d_is_counted_as_before(g, tmp_path):
    """HanCo's 2.2 x 104 px as 229 px, not as 451: the same crops, errors and limits of triangulation, in px of the 256 px crop."""
    hanco_tree(tmp_path, g)
    low, high = np.meshgrid(np.arange(224), np.arange(224))
    for c in range(8):
        wave = 128 + 60 * np.sin(low / 9 + c) + 50 * np.cos(high / 7)
        Image.fromarray(np.stack([wave] * 3, -1).astype(np.uint8)).save(tmp_path / "rgb" / "0003" / f"cam{c}" / "00000000.jpg", quality=95)
    cfg = Config(root=str(tmp_path), cache=str(tmp_path / "cache"), mano="builtin")
    given = dict(cfg=cfg, split="train", size=451, margin=2.2, device=torch.device("cpu"), rig=Rig(8))
    here, = sources.batches(open_data(specs=("hanco",), **given), [torch.tensor([0])], torch.device("cpu"), 0)
    place = f"hanco={tmp_path}"
    joined = open_data(specs=(place, place), **given | {"cfg": dataclasses.replace(cfg, root="")})       # one size for all
    wide, = sources.batches(joined, [torch.tensor([0])], torch.device("cpu"), 0)
    assert here["image"].shape[-1] == 229 and wide["image"].shape[-1] == 451 and "zoom" not in wide
    assert here["zoom"].tolist() == [[pytest.approx(451 / 229)] * 8] and hamuco.stored_side(cfg) == 451
    crops = [hamuco.hand_view(batch["image"], 256)[0] for batch in (here, wide)]
    assert float((crops[0] - crops[1]).abs().mean()) < 0.01                                # 1 is a quarter of the range
    scores = []
    for batch in (here, wide):
        px = batch["image"].shape[-1] / 451
        pictures = as_pictures(batch | {"index": torch.arange(1)})
        pred = {"uv": pictures["uv"] + 3 * px, "joints": pictures["joints"]}
        pictures["uv_label"] = pictures["uv"] - 2 * px
        found = score(pred, pictures) | hamuco.against_labels(facts(pred, pictures, {}))
        scores.append([found[name] for name in ("epe_2d_px_crop", "epe_2d_px", "label_px_crop")])
        assert hamuco.of_crop(30.0, hamuco.crop_side(batch, 256)) == pytest.approx(30 * px)
        near(hamuco.label_rows(batch, 256)["ransac_huber"]["joints"], hamuco.label_rows(wide, 256)["ransac_huber"]["joints"], 1e-4)
    assert scores[0][0].tolist() == pytest.approx([3 * 2 ** 0.5] * 8, rel=1e-4)
    assert scores[0][2].tolist() == pytest.approx([5 * 2 ** 0.5] * 8, rel=1e-4)
    for a, b in zip(*scores):
        near(a, b, 1e-3)


def test_labels_of_a_round_follow_the_side_of_the_pictures(tmp_path):
    """A file that says no side is of the square that was asked for: pixel centres are integers in both."""
    class Data:
        def targets(self, rows):
            return {"side_px": torch.full((1,), 229.0)}

        def __len__(self):
            return 1

    cfg = Config(mano="builtin")
    for kept, expected in (({"side": 229.0}, 100.0), ({}, 100.5 * 229 / 451 - 0.5)):
        torch.save({"uv": torch.full((1, 8, 21, 2), 100.0), **kept}, tmp_path / "labels.pt")
        labels = hamuco.next_labels(tmp_path / "labels.pt", None, Data(), cfg, torch.device("cpu"))
        assert float((labels - expected).abs().max()) < 1e-4
