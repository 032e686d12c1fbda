"""The data sets: trees in the official layouts, written here, and what the loader makes of them."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError
from sources import parse_data, read_index
from sources.dexycb import dexycb_split, index_dexycb
from sources.folder import index_folder, index_imagenet
from sources.index import Index, unmirror
from sources.interhand import index_interhand
from sources.hands import Hands
from sources.pictures import check_images, read_image
from torch.utils.data import default_collate as collate
from hand.builtin import builtin_hand
from common import axis_angle_to_matrix, mano_numpy
from hand.official import mirror_mano

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "datasets.npz")
KEYS = {"image", "crop", "size", "K", "joints", "joints_ok", "verts", "uv", "uv_label", "visible",
        "confidence", "pose", "shape", "trans", "scale", "has", "side", "id", "box_source"}


def save(path: Path, picture: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)


def one(root: Path, picture: np.ndarray, side: str = "right", **columns) -> Index:
    """An Index of a single picture."""
    save(root / "one.png", picture)
    columns = {key: np.array([value], float) for key, value in columns.items()}
    return Index("one", str(root), {"paths": np.array([b"one.png"]), "side": np.array([side]),
                                    **columns})


# ---- Pictures -------------------------------------------------------------------------------------


def test_pictures_of_every_mode_become_rgb(tmp_path):
    grey = np.array([[0, 100, 255]], np.uint8)
    save(tmp_path / "grey.png", grey)
    assert read_image(tmp_path / "grey.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    sixteen = save(tmp_path / "16.png", np.array([[0, 25700, 65535]], np.uint16))
    assert read_image(sixteen)[0, :, 0].tolist() == [0, 100, 255]
    clear = np.array([[[200, 10, 10, 255], [200, 10, 10, 0], [255, 0, 0, 51]]], np.uint8)
    assert read_image(save(tmp_path / "alpha.png", clear)).tolist() == [
        [[200, 10, 10], [128, 128, 128], [153, 102, 102]]]        # 0.2 x colour + 0.8 x 128
    palette = Image.fromarray(np.array([[[0, 255, 0], [0, 0, 255]]], np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").tolist() == [[[0, 255, 0], [0, 0, 255]]]
    palette.save(tmp_path / "hole.png", transparency=palette.getpixel((0, 0)))
    assert read_image(tmp_path / "hole.png").tolist() == [[[128, 128, 128], [0, 0, 255]]]
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[4, 4].astype(int) - [0, 255, 255]).max() <= 3
    Image.new("1", (2, 1), 1).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").tolist() == [[[255] * 3] * 2]


def test_exif_rotation_is_applied(tmp_path):
    picture, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    picture[:, :16] = 255                                         # left half white
    exif[0x0112] = 6                                             # shown turned 90 degrees clockwise
    seen = read_image(save(tmp_path / "turned.jpg", picture, exif=exif, quality=95))
    assert seen.shape == (32, 16, 3) and seen[4].mean() > 250 and seen[28].mean() < 5


@pytest.mark.parametrize("full_check", [20_000, 0])
def test_broken_pictures_are_found_named_and_left_out(tmp_path, monkeypatch, full_check):
    monkeypatch.setattr("sources.pictures.FULL_CHECK", full_check)
    good = save(tmp_path / "a" / "good.jpg", noise(90, 120))
    save(tmp_path / "a" / "odd.JPEG", noise(9, 9), format="PNG")   # as one of ImageNet's is
    (tmp_path / "a" / "tail.jpg").write_bytes(good.read_bytes() + b"\0\0\0")
    (tmp_path / "a" / "cut.jpg").write_bytes(good.read_bytes()[:-700])
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("no picture")
    whole = save(tmp_path / "a" / "whole.png", noise(40, 40)).read_bytes()
    (tmp_path / "a" / "flipped.png").write_bytes(whole[:2000] + b"\1\2\3\4" + whole[2004:])
    index = index_folder(tmp_path)
    assert [index.id(i) for i in range(len(index))] == [
        "a/good.jpg", "a/odd.JPEG", "a/tail.jpg", "a/whole.png"]
    assert index.dropped == {"unreadable pictures": 4}
    for name in ("a/cut.jpg", "a/empty.jpg", "a/text.png", "a/flipped.png"):
        assert name in index.summary()
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    assert check_images([str(good), str(tmp_path / "a" / "cut.jpg")]).tolist() == [True, False]


def test_a_picture_that_breaks_later_is_black_named_and_unlabelled(tmp_path, capsys):
    index = one(tmp_path, noise(40, 40), joints=np.ones((21, 3)), box=[1, 1, 20, 20])
    (tmp_path / "one.png").write_bytes(b"gone bad")
    sample = Hands(index, 16, 1.0)[0]
    assert set(sample) == KEYS and sample["image"].sum() == 0 and not any(sample["has"].values())
    assert sample["joints"].isnan().all() and "one.png" in capsys.readouterr().err
    (tmp_path / "one.png").unlink()
    with pytest.raises(UserError, match="one.png"):
        Hands(index, 16, 1.0)[0]


# ---- The loader -----------------------------------------------------------------------------------


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
    columns = dict(box=[20, 10, 80, 80], K=K, joints=joints, uv=uv, verts=[[1, 2, 3]] * 778,
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


def test_mirrored_pose_equals_golden():
    from common import mirror_pose
    mirrored = mirror_pose(torch.tensor(GOLDEN["mirror_aa"]).flatten()).reshape(16, 3)
    assert np.abs(mirrored.numpy() - GOLDEN["mirror_aa_flipped"]).max() < 1e-12


def test_unmirror_gives_left_hands_back_and_leaves_right_ones():
    R = torch.linalg.qr(torch.randn(2, 16, 3, 3, dtype=torch.float64))[0]
    given = {"joints": torch.randn(2, 21, 3), "verts": torch.randn(2, 4, 778, 3),
             "root": torch.randn(2, 3), "pose": R, "uv": torch.randn(2, 21, 2),
             "shape": torch.randn(2, 10)}
    out = unmirror(given, ["left", "right"])
    for key in ("joints", "verts", "root"):
        assert torch.equal(out[key][0], given[key][0] * torch.tensor([-1.0, 1, 1]))
        assert torch.equal(out[key][1], given[key][1])
    assert torch.equal(out["uv"], given["uv"]) and torch.equal(out["shape"], given["shape"])
    flipped = torch.tensor([[1, -1, -1], [-1, 1, 1], [-1, 1, 1.0]]).double()
    assert torch.equal(out["pose"][0], R[0] * flipped) and torch.equal(out["pose"][1], R[1])


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


# ---- Folders --------------------------------------------------------------------------------------


def test_folder_is_sorted_takes_any_case_and_passes_hidden_files_by(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a/x.webp", "c.bmp", "b/deep/er/z.JPG", ".hidden/h.png",
                 "._mac.jpg"):
        save(tmp_path / name, noise(8, 8))
    (tmp_path / "b" / "notes.txt").write_text("not a picture")
    (tmp_path / "loop").symlink_to(tmp_path)                      # must not run forever
    index = index_folder(tmp_path)
    assert [index.id(i) for i in range(len(index))] == [
        "a/x.webp", "b/1.jpeg", "b/2.PNG", "b/deep/er/z.JPG", "c.bmp"]
    assert index.dropped == {} and "5 samples" in index.summary()


def test_folder_splits_are_disjoint_complete_and_stay_put(tmp_path):
    for i in range(200):
        (tmp_path / f"p{i:03d}.png").touch()
    whole = save(tmp_path / "x.png", noise(4, 4)).read_bytes()
    for file in tmp_path.glob("p*.png"):
        file.write_bytes(whole)
    names = {split: set(index_folder(tmp_path, split).columns["paths"].tolist())
             for split in ("train", "val", "test", "all")}
    assert names["train"] | names["val"] | names["test"] == names["all"]
    assert sum(map(len, (names["train"], names["val"], names["test"]))) == 201
    assert 165 < len(names["train"]) < 195 and names["val"] and names["test"]
    for i in range(100):
        (tmp_path / f"p{i:03d}.png").unlink()
    assert set(index_folder(tmp_path, "val").columns["paths"].tolist()) <= names["val"]


LABEL = {"path": "a.png", "side": "left", "box": [1, 2, 20, 10], "uv": [[5.0, 6.0]] * 21,
         "confidence": [0.5] * 21, "K": [[50, 0, 15.5], [0, 50, 15.5], [0, 0, 1]],
         "joints": [[0.0, 0.1, 0.5]] * 21}


def label_folder(root: Path, *labels: dict | str) -> Path:
    save(root / "a.png", noise(32, 32))
    lines = [label if isinstance(label, str) else json.dumps(label) for label in labels]
    (root / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_folder_labels_give_one_sample_a_hand(tmp_path):
    save(tmp_path / "b.png", noise(8, 8))
    uv = [[10.0, 4.0], [16.0, 12.0]] + [[None, None]] * 19
    label_folder(tmp_path, LABEL, "", {"path": "a.png", "uv": uv, "confidence": [1, .3] + [0] * 19},
                 {"path": "./a.png", "uv": uv, "confidence": [0] * 21}, {"path": "a.png", "uv": uv})
    index = index_folder(tmp_path)
    assert index.columns["id"].tolist() == ["a.png#1", "a.png#3", "a.png#4", "a.png#5"]
    assert index.dropped == {"pictures without a line in labels.jsonl": 1}
    assert index.box_source == "annotated, joints"
    left, some, none, sure = (Hands(index, 16, 1.0)[i] for i in range(4))
    assert left["side"] == "left" and left["confidence"].tolist() == [0.5] * 21
    assert left["joints"][0].tolist() == pytest.approx([0, 0.1, 0.5]) and left["has"]["K"]
    # the tight box of (10, 4) and (16, 12) is 8 px wide around (13, 8), which goes to 7.5; scale 2
    assert some["uv"][:2].flatten().tolist() == pytest.approx([1.5, -0.5, 13.5, 15.5])
    assert some["uv"][2:].isnan().all() and some["side"] == "right" and not some["has"]["joints"]
    assert some["confidence"].tolist() == pytest.approx([1, .3] + [0] * 19)
    assert sure["confidence"].tolist() == [1, 1] + [0] * 19       # not said: sure where known
    assert not none["has"]["uv"] and none["crop"][0, 0] == 0.5    # nothing known: centre square


@pytest.mark.parametrize("change, words", [
    ("{not json", "line 2"), ("[1]", "path"), ("{}", "path"), ("[" * 100_000, "line 2"),
    ({"path": "c.png"}, "c.png"), ({"path": "../a.png"}, "../a.png"), ({"bbox": [1] * 4}, "bbox"),
    ({"side": "both"}, "side"), ({"box": [1, 2, 3]}, "box"), ({"box": [1, 2, 0, 3]}, "box"),
    ({"box": [1, 2, None, 3]}, "box"), ({"uv": [[1, 2]] * 20}, "uv"), ({"uv": "abc"}, "line 2"),
    ({"uv": [[1, 2], [3]]}, "line 2"), ({"confidence": [1.5] * 21}, "confidence"),
    ({"K": [[50, 0, 1], [0, -50, 1], [0, 0, 1]]}, "K must"), ({"K": [[1, 0, 0]] * 3}, "K must"),
    ({"joints": [[0, 0, 500.0 * i] for i in range(21)]}, "metres"),
    ({"joints": [[0, 0, float("nan")]] * 21}, "NaN is not allowed"),
    ({"joints": [[0, 0, float("inf")]] * 21}, "Infinity is not allowed"),
    ('{"path": "a.png", "box": [0, 0, 1e999, 1]}', "box must be finite")])
def test_a_wrong_label_is_named_by_its_line(tmp_path, change, words):
    label_folder(tmp_path, LABEL, change if isinstance(change, str) else LABEL | change)
    with pytest.raises(UserError) as error:
        index_folder(tmp_path)
    message = str(error.value)
    assert "line 2" in message and words in message and "\n" not in message


def test_folder_refuses_what_is_empty(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        index_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no picture"):
        index_folder(tmp_path)
    with pytest.raises(UserError, match="empty"):
        index_folder(label_folder(tmp_path))


def test_cached_index_equals_a_fresh_one_and_notices_changes(tmp_path, monkeypatch):
    root = label_folder(tmp_path / "data", LABEL)
    fresh = index_folder(root, cache=tmp_path / "cache")
    monkeypatch.setattr("sources.files.check_images", lambda paths: pytest.fail("was read again"))
    again = index_folder(root, cache=tmp_path / "cache")
    assert vars(again).keys() == vars(fresh).keys() and again.summary() == fresh.summary()
    for key, column in fresh.columns.items():
        assert np.array_equal(again.columns[key], column, equal_nan=column.dtype.kind == "f"), key
    monkeypatch.undo()
    label_folder(root, LABEL, LABEL)
    assert len(index_folder(root, cache=tmp_path / "cache")) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])                 # a damaged cache is rebuilt
    assert len(index_folder(root, cache=tmp_path / "cache")) == 2


def test_imagenet_takes_class_folders_and_nothing_else(tmp_path):
    for name in ("train/n01/b.JPEG", "train/n01/a.JPEG", "train/n00/c.JPEG", "train/stray.JPEG",
                 "val/d.JPEG"):
        save(tmp_path / name, noise(8, 8), format="JPEG")
    (tmp_path / "train" / "n02").mkdir()
    index = index_imagenet(tmp_path)
    assert [index.id(i) for i in range(3)] == ["train/n00/c.JPEG", "train/n01/a.JPEG",
                                               "train/n01/b.JPEG"]
    assert index.dropped == {"pictures in no class folder": 1} and len(index) == 3
    with pytest.raises(UserError, match="val/<class>/<picture>.*no class folder"):
        index_imagenet(tmp_path, "val")
    with pytest.raises(UserError, match="no split"):
        read_index("imagenet", "", str(tmp_path), "test")


# ---- DexYCB ---------------------------------------------------------------------------------------

SERIALS = ["836212060125", "839512060362", "840412060917", "841412060263", "932122060857",
           "932122060861", "932122061900", "932122062010"]


def write_dexycb(root: Path, subjects: list[int], frames: int = 1) -> None:
    """The official tree: in each label file joint_3d[0, 0] is (sequence, camera, frame)."""
    import yaml
    K = {"fx": 600.5, "fy": 601.5, "ppx": 310.25, "ppy": 240.75}
    for serial in SERIALS:
        file = root / "calibration" / "intrinsics" / f"{serial}_640x480.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"color": K, "depth": dict.fromkeys(K, 1.0)}))
    dates = ["20200709", "20200813", "20200820", "20200903", "20200908", "20200918", "20200928",
             "20201002", "20201015", "20201022"]
    for subject in subjects:
        home = root / f"{dates[subject]}-subject-{subject + 1:02d}"
        calibration = f"{dates[subject]}_{subject}"
        file = root / "calibration" / f"mano_{calibration}" / "mano.yml"
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump({"betas": [subject + 0.1 * k for k in range(10)]}))
        for sequence in range(100):
            folder = home / f"{dates[subject]}_{140000 + sequence}"
            for camera, serial in enumerate(SERIALS):
                (folder / serial).mkdir(parents=True)
                for frame in range(frames):
                    (folder / serial / f"color_{frame:06d}.jpg").touch()
                    write_label(folder / serial, frame, [sequence, camera, frame])
            (folder / "meta.yml").write_text(yaml.safe_dump({
                "serials": SERIALS[::-1], "num_frames": frames, "extrinsics": "x",
                "mano_calib": [calibration], "mano_sides": ["left" if sequence % 2 else "right"]}))


def write_label(folder: Path, frame: int, first: list[float], uv: float = 100, **other) -> None:
    joint_3d = np.tile(np.array([0.1, 0.2, 0.5], np.float32), (1, 21, 1))
    joint_3d[0, 0] = first
    label = {"joint_3d": joint_3d, "joint_2d": np.full((1, 21, 2), uv, np.float32),
             "pose_m": np.arange(51, dtype=np.float32)[None] / 100, "seg": np.zeros((2, 2), "u1")}
    label["joint_2d"][0, 0] = [uv + 30, uv + 40]
    np.savez(folder / f"labels_{frame:06d}.npz", **label | other)


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


# ---- InterHand2.6M --------------------------------------------------------------------------------


def write_interhand(root: Path, changes: dict | None = None, fits: dict | None = None) -> None:
    """v1.0 with the golden camera: two hands, a right, a left; `changes` to the annotations."""
    kinds = ["interacting", "right", "left"]
    images, notes = [], []
    for i, kind in enumerate(kinds):
        valid = [int(kind != "left")] * 21 + [int(kind != "right")] * 21
        images.append({"id": 10 + i, "file_name": f"Capture3/0390_x/cam400026/image{100 + i}.jpg",
                       "width": 334, "height": 512, "capture": 3, "subject": 3, "camera": "400026",
                       "seq_name": "0390_x", "frame_idx": 100 + i})
        notes.append({"id": 20 + i, "image_id": 10 + i, "bbox": [30, 160, 180, 140],
                      "joint_valid": valid, "hand_type": kind, "hand_type_valid": 1}
                     | (changes or {}).get(i, {}))
        save(root / "images" / "test" / images[-1]["file_name"], noise(512, 334)[..., 0])   # grey
    frames = {str(100 + i): {"world_coord": GOLDEN["ih_world"].tolist(), "joint_valid": [1] * 42,
                             "hand_type": kind, "hand_type_valid": True}
              for i, kind in enumerate(kinds)}
    camera = {"campos": {"400026": GOLDEN["ih_campos"].tolist()},
              "camrot": {"400026": GOLDEN["ih_camrot"].tolist()},
              "focal": {"400026": GOLDEN["ih_focal"].tolist()},
              "princpt": {"400026": GOLDEN["ih_princpt"].tolist()}}
    for name, content in (("data", {"images": images, "annotations": notes}),
                          ("camera", {"3": camera}), ("joint_3d", {"3": frames}),
                          ("MANO_NeuralAnnot", {"3": fits or {}})):
        file = root / "annotations" / "test" / f"InterHand2.6M_test_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


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


def test_pictures_that_come_or_go_after_caching_are_noticed(tmp_path):
    write_interhand(tmp_path)
    ids = lambda: index_interhand(tmp_path, "test", cache=tmp_path / "cache").columns["id"].tolist()
    assert len(ids()) == 4
    for number in (101, 100, 102):
        file = tmp_path / f"images/test/Capture3/0390_x/cam400026/image{number}.jpg"
        file.rename(tmp_path / file.name)
        if number == 101:
            assert ids() == ["20-right", "20-left", "22-left"]
    with pytest.raises(UserError, match="not one of the pictures"):
        ids()


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
        with pytest.raises(UserError, match="not in the layout of v1.0"):
            index_interhand(tmp_path, "test")
        file.write_text(whole)


# ---- Names ----------------------------------------------------------------------------------------


def test_data_names_are_parsed():
    assert parse_data("dexycb:s1=/a/b:c=d") == ("dexycb", "s1", "/a/b:c=d")
    assert parse_data("folder=x") == ("folder", "", "x")
    assert parse_data("imagenet") == ("imagenet", "", "")
    for wrong, words in (("imagent", "'imagent' is not known.*imagenet"), ("folder=", "NAME"),
                         ("dexycb:=x", "NAME"), ("", "not known")):
        with pytest.raises(UserError, match=words):
            parse_data(wrong)


def test_read_index_reads_by_name_and_refuses_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data" / "folder" / "a.png", noise(8, 8))
    assert read_index("folder", "", "", "all").id(0) == "a.png"
    for arguments, words in ((("dexycb", "", "", "train"), "data/dexycb"),
                             (("folder", "x", "", "all"), "folder:x"),
                             (("folder", "", "", "trian"), "trian"),
                             (("dexycb", "", "", "all"), "all"),
                             (("synthetic", "", "", "train"), "rendered")):
        with pytest.raises(UserError, match=words) as error:
            read_index(*arguments)
        assert "\n" not in str(error.value)
