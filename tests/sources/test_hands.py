"""Rows of an index as samples: crops, mirroring, what a sample holds."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate as collate

from common import UserError
from sources.hands import Hands
from sources.index import Index
from trees import KEYS, noise, one


def test_crop_at_scale_one_is_a_copy_and_black_outside(tmp_path):
    picture = noise(48, 64)
    sample = Hands(one(tmp_path, picture, box=[10, 20, 16, 16]), 16, 1.0)[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0), picture[20:36, 10:26])
    assert sample["crop"].tolist() == [[1, 0, -10], [0, 1, -20], [0, 0, 1]]
    assert sample["size"].tolist() == [64, 48]
    sample = Hands(one(tmp_path, picture, box=[-4, 40, 16, 12]), 16, 1.0)[0]
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[:10, 4:] = picture[38:, :12]                         # the square is 16 tall: 38 to 54
    assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
    sample = Hands(one(tmp_path, picture), 48, 2.5)[0]            # no box: the centre square
    assert np.array_equal(sample["image"].permute(1, 2, 0), picture[:, 8:56])


def test_margin_enlarges_the_longer_side_about_the_middle(tmp_path):
    # box 20 x 40 around edge coordinate (110, 120): side 60, left edge 80, top edge 90
    crop = Hands(one(tmp_path, noise(240, 240), box=[100, 100, 20, 40]), 30, 1.5)[0]["crop"]
    ends = torch.tensor([[79.5, 89.5, 1], [139.5, 149.5, 1]]) @ crop.T
    assert torch.allclose(ends[:, :2], torch.tensor([[-0.5, -0.5], [29.5, 29.5]]), atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("box, size", [([31.3, 12.7, 150, 150], 64), ([100, 60, 40, 31], 96),
                                       ([-70.2, -33.1, 210, 260], 64), ([150, 130, 130.7, 90], 64)])
def test_drawn_dots_are_where_crop_says(tmp_path, box, size, side):
    dots = np.array([[61.3, 52.8], [118.0, 80.25], [170.6, 160.4]])
    y, x = np.mgrid[:200, :240]
    found = 0
    for dot in dots:
        blob = 250 * np.exp(-((x - dot[0]) ** 2 + (y - dot[1]) ** 2) / (2 * 3.0 ** 2))
        picture = np.repeat(blob[..., None].round().astype(np.uint8), 3, 2)
        uv = np.tile(dot, (21, 1))
        sample = Hands(one(tmp_path, picture, side, box=box, uv=uv), size, 1.1)[0]
        said = sample["crop"] @ torch.tensor([*dot, 1.0]).float()
        assert torch.allclose(sample["uv"][5], said[:2], atol=1e-4)
        reach = 9.5 * abs(float(sample["crop"][0, 0]))            # the whole blob must be in view
        if (said[:2] > reach).all() and (said[:2] < size - 1 - reach).all():
            weight = sample["image"][0].double()
            v, u = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
            centre = torch.stack([(u * weight).sum(), (v * weight).sum()]) / weight.sum()
            assert (centre - said[:2]).abs().max() < 0.03
            found += 1
    assert found


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 254
    image = Hands(one(tmp_path, stripes), 32, 1.0)[0]["image"].float()
    assert (image - 127).abs().max() < 8                          # plain bilinear gives 0 or 254
    hole = np.full((256, 256, 3), 255, np.uint8)
    hole[64:192, 64:192] = 0
    rim = Hands(one(tmp_path, hole, box=[64, 64, 128, 128]), 32, 1.0)[0]["image"][0, 0]
    assert ((rim[1:-1].float() - 255 / 8).abs() < 2).all()        # 1/8 of the triangle is outside


def test_left_hands_are_mirrored_with_everything_they_carry(tmp_path):
    rng = np.random.default_rng(1)
    joints = rng.normal(0, 0.05, (21, 3)) + [0.02, -0.01, 0.5]
    K = np.array([[400, 2, 66], [0, 410, 52], [0, 0, 1.0]])
    uv = joints @ K.T
    uv = uv[:, :2] / uv[:, 2:]
    columns = dict(box=[20, 10, 80, 80], K=K, joints=joints, uv=uv, uv_label=uv + [3, -2], verts=[[1, 2, 3]] * 778,
                   trans=[0.1, 0.2, 0.3], pose=np.tile([0.1, 0.2, 0.3], 16), shape=np.arange(10))
    picture = noise(100, 120)
    right = Hands(one(tmp_path, picture, "right", **columns), 64, 1.25)[0]
    left = Hands(one(tmp_path, picture, "left", **columns), 64, 1.25)[0]
    assert (right["side"], left["side"]) == ("right", "left")
    assert torch.equal(left["image"], right["image"].flip(-1))
    for key in ("uv", "uv_label"):                                # x -> W - 1 - x
        assert torch.allclose(left[key], torch.stack([63 - right[key][:, 0], right[key][:, 1]], -1),
                              atol=1e-4)
    assert torch.equal(left["joints"], right["joints"] * torch.tensor([-1.0, 1, 1]))
    assert left["trans"].tolist() == pytest.approx([-0.1, 0.2, 0.3])
    assert left["verts"][0].tolist() == [-1, 2, 3]
    assert left["pose"][:6].tolist() == pytest.approx([0.1, -0.2, -0.3] * 2)
    assert left["shape"].tolist() == right["shape"].tolist() == [*range(10)]
    # the crop is 100 px wide, so the scale is 0.64; middle px (59.5, 49.5) goes to 31.5
    assert right["K"][0].tolist() == pytest.approx([256, 1.28, 0.64 * (66 - 59.5) + 31.5], abs=1e-4)
    assert left["K"][0].tolist() == pytest.approx([256, -1.28, 63 - (0.64 * 6.5 + 31.5)], abs=1e-4)
    for sample in (left, right):
        seen = sample["joints"] @ sample["K"].T
        assert torch.allclose(seen[:, :2] / seen[:, 2:], sample["uv"], atol=1e-3)


def test_mixed_samples_collate_with_nan_and_has(tmp_path):
    uv = np.tile([20.0, 20.0], (21, 1))
    uv[3] = np.nan
    uv[4] = [-0.6, 5]                                             # outside the picture
    rich = one(tmp_path / "a", noise(40, 40), K=np.eye(3), uv=uv, joints=np.ones((21, 3)),
               scale=0.03, confidence=np.full(21, 0.5))
    poor = one(tmp_path / "b", noise(50, 30), "left")
    batch = collate([Hands(rich, 24, 1.0)[0], Hands(poor, 24, 1.0)[0]])
    assert set(batch) == KEYS and batch["side"] == ["right", "left"]
    assert {key: value.tolist() for key, value in batch["has"].items()} == {
        "K": [True, False], "joints": [True, False], "uv": [True, False], "verts": [False, False],
        "pose": [False, False], "shape": [False, False], "cameras": [False, False]}
    assert batch["image"].shape == (2, 3, 24, 24) and batch["image"].dtype == torch.uint8
    for key in ("K", "joints", "uv", "uv_label"):
        assert batch[key][1].isnan().all() and batch[key].dtype == torch.float32
    assert batch["verts"].shape == (2, 778, 3) and batch["pose"].shape == (2, 48)
    assert batch["scale"].tolist() == pytest.approx([0.03, 1])
    assert batch["joints_ok"].sum(1).tolist() == [21, 0]
    assert batch["confidence"][0, 2:5].tolist() == [0.5, 0, 0.5]
    assert batch["confidence"][1].sum() == 0
    assert batch["visible"][0, 2:5].tolist() == [True, False, False]
    one_sample = Hands(rich, 24, 1.0)[0]
    loader = torch.utils.data.DataLoader(Hands(rich, 24, 1.0), 1, num_workers=1)
    assert torch.equal(next(iter(loader))["image"][0], one_sample["image"])   # whatever the worker


@pytest.mark.parametrize("box", [[0, 0, 1e7, 1e7], [1e15, 0, 5, 5]])
def test_a_box_far_off_the_picture_is_refused(tmp_path, box):
    with pytest.raises(UserError, match="one.png.*box"):
        Hands(one(tmp_path, noise(10, 10), box=box), 16, 1.0)[0]


def test_a_box_far_off_its_picture_is_named_with_it(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    index = Index("folder", str(tmp_path), {
        "paths": np.array([b"a.png"]), "id": np.array(["7"]), "side": np.array(["right"]),
        "box": np.array([[0.0, 0, 4000, 4000]])}, "annotated")
    with pytest.raises(UserError, match=r"a.png: box \(0.0, 0.0, 4000.0, 4000.0\) of 7 is far off the picture"):
        Hands(index, 32, 1.5)[0]
