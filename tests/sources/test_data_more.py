"""FreiHAND, YouTube3DHands, HO3D and COCO-WholeBody: trees in the official layouts, written here."""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import TIPS, UserError, axis_angle_to_matrix, mano_numpy
from hand.builtin import builtin_hand
from sources import joints_of, parse_data, read_index
from sources.coco import index_coco
from sources.freihand import freihand_split, index_freihand
from sources.ho3d import index_ho3d
from sources.hands import Hands
from sources.yt3d import index_yt3d
from torch.utils.data import default_collate as collate

KEYS = {"image", "crop", "size", "K", "joints", "joints_ok", "verts", "uv", "uv_label", "visible",
        "confidence", "pose", "shape", "trans", "scale", "has", "side", "id", "box_source"}


def picture(path: Path, w: int = 32, h: int = 32) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)).save(path)


def mesh(hand: dict, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray) -> tuple:
    """Vertices (778, 3) m and the chain's 16 joints of one posed hand, by the NumPy model."""
    R = axis_angle_to_matrix(torch.tensor(pose, dtype=torch.float64).view(1, 16, 3)).numpy()
    shape, trans = (np.asarray(x, float)[None] for x in (shape, trans))
    verts, joints = mano_numpy(hand, R, shape, trans)[:2]
    return verts[0], joints[0]


@pytest.fixture(scope="module")
def hand():
    """A right hand whose mean pose is not flat, as MANO's."""
    return builtin_hand() | {"hands_mean": np.random.default_rng(3).normal(0, 0.2, 45)}


# ---- FreiHAND -------------------------------------------------------------------------------------


def write_freihand(root: Path, home: str = "training", n: int = 3, **changes: list) -> None:
    """n hands as published: hand i lies at (0.01 i, 0, 0.5) m, its joints 5 mm apart in x and y."""
    joints = [[[0.01 * i + 0.005 * j, 0.005 * j, 0.5] for j in range(21)] for i in range(n)]
    content = {
        "K": [[[400.0 + i, 0, 112], [0, 500, 110], [0, 0, 1]] for i in range(n)], "xyz": joints,
        "mano": [[[0.01 * k + i for k in range(61)]] for i in range(n)],          # 1 x 61, as published
        "verts": [[[0.001 * k, i, 0.5] for k in range(778)] for i in range(n)],
        "scale": [0.03 + 0.001 * i for i in range(n)]} | changes
    for kind, values in content.items():
        if values is not None:
            (root / f"{home}_{kind}.json").write_text(json.dumps(values))
    for i in range(n):
        for variant in range(4 if home == "training" else 1):
            picture(root / home / "rgb" / f"{i + 32560 * variant:08d}.jpg")


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
    write_freihand(tmp_path, "evaluation", **{
        "K": [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 3961, "scale": [1] * 3961, "xyz": None, "mano": None,
        "verts": None})
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


# ---- YouTube3DHands -------------------------------------------------------------------------------


def write_yt3d(home: Path, frames: dict[str, tuple] | None = None, **changes: object) -> np.ndarray:
    """Four hands in three frames of 40 x 30 px; -> their vertices (4, 778, 3) px as annotated."""
    names = ["youtube/abc/video/frames/7.png", "youtube/abc/video/frames/12.png",
             "youtube/glued/video/frames/3.png"]
    verts = np.random.default_rng(0).uniform(7, 25, (4, 778, 3)).astype(np.float32)
    verts[:, 0, :2], verts[:, 1, :2] = [4, 6], [28, 26]           # the corners of every box
    notes = [{"vertices": verts[i].tolist(), "is_left": left, "image_id": image, "id": 900 + i}
             for i, (left, image) in enumerate([(0, 55), (1, 55), (1, 53), (0, 54)])]
    images = [{"name": name, "width": 40, "height": 30, "id": 55 - i} for i, name in enumerate(names)]
    home.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": notes} | changes
    (home / "youtube_train.json").write_text(json.dumps(content))
    for name, size in (frames or {name: (40, 30) for name in names}).items():
        picture(home / name, *size)
    return verts


def test_yt3d_gives_one_row_a_hand_in_pixels(tmp_path, hand):
    verts = write_yt3d(tmp_path / "data")                         # as the download script leaves it
    index = index_yt3d(tmp_path, "train", {"right": hand})
    assert index.columns["id"].tolist() == ["900", "901", "902", "903"] and not index.dropped
    assert index.columns["side"].tolist() == ["right", "left", "left", "right"]
    assert [index.path(i)[8:-4] for i in range(4)] == ["abc/video/frames/7", "abc/video/frames/7",
                                                       "glued/video/frames/3", "abc/video/frames/12"]
    assert np.abs(index.columns["verts_px"] - verts).max() < 1e-5
    assert index.columns["box"].tolist() == [[4.5, 6.5, 24, 20]] * 4      # (4, 6) to (28, 26)
    J = hand["J_regressor"] @ verts[2]                            # MANO's order: 13 is the thumb's base
    for ours, mano in ((0, 0), (1, 13), (5, 1), (9, 4), (13, 10), (17, 7), (19, 9)):
        assert np.abs(index.columns["joints_px"][2, ours] - J[mano]).max() < 1e-4
    for ours, vertex in ((4, 744), (8, 320), (12, 443), (16, 554), (20, 671)):
        assert np.abs(index.columns["uv"][2, ours] - verts[2, vertex, :2]).max() < 1e-5
    assert np.array_equal(index.columns["uv"], index.columns["joints_px"][..., :2]) and not index.notes
    right, left = (Hands(index, 48, 1.0)[i] for i in (0, 1))
    assert [key for key, known in left["has"].items() if known] == ["uv"] and set(left) == KEYS
    assert left["verts"].isnan().all() and left["joints"].isnan().all()
    # box 24 wide from 4.5: x goes to 2 (x - 4) - 0.5, then, mirrored, to 47 minus that
    x = 2 * (verts[:2, 744, 0] - 4) - 0.5
    assert right["uv"][4, 0] == pytest.approx(x[0], abs=1e-3)
    assert left["uv"][4, 0] == pytest.approx(47 - x[1], abs=1e-3)


def test_yt3d_annotations_follow_a_frame_of_another_size(tmp_path, hand):
    names = ["youtube/abc/video/frames/7.jpg", "youtube/abc/video/frames/12.png",
             "youtube/glued/video/frames/3.png"]
    verts = write_yt3d(tmp_path, {names[0]: (80, 45), names[1]: (40, 30), names[2]: (40, 30)})
    index = index_yt3d(tmp_path, "train", {"right": hand})
    assert index.path(0) == names[0] and index.path(3) == names[1]        # .jpg where there is no .png
    assert index.columns["frame_scale"].tolist() == [[2, 1.5], [2, 1.5], [1, 1], [1, 1]]
    # x 4 -> 4.5 x 2 - 0.5 = 8.5 and y 6 -> 6.5 x 1.5 - 0.5 = 9.25, centres to edges; 24 x 2, 20 x 1.5
    assert index.columns["box"][1].tolist() == [9, 9.75, 48, 30]
    assert index.columns["verts_px"][0, 5] == pytest.approx(
        [2 * verts[0, 5, 0] + 0.5, 1.5 * verts[0, 5, 1] + 0.25, np.sqrt(3) * verts[0, 5, 2]], abs=1e-4)
    assert np.abs(index.columns["verts_px"][2:] - verts[2:]).max() < 1e-5
    assert index.notes == ["2 hands lie in frames of another size than annotated, and were scaled"]


def test_yt3d_counts_missing_frames_and_names_lost_videos(tmp_path):
    verts = write_yt3d(tmp_path, {"youtube/abc/video/frames/7.png": (40, 30)})
    index = index_yt3d(tmp_path, "train")
    assert index.columns["id"].tolist() == ["900", "901"]
    assert index.dropped == {"samples without their picture": 2}
    assert "not one frame of 1 videos: glued" in index.summary()
    assert "only the finger tips are known" in index.summary() and len(index.notes) == 2
    known = np.isfinite(index.columns["uv"]).all(-1)
    assert known.tolist() == [[i in (4, 8, 12, 16, 20) for i in range(21)]] * 2
    assert index.columns["uv"][1, 8] == pytest.approx(verts[1, 320, :2])
    (tmp_path / "youtube/abc/video/frames/12.png").write_bytes(b"no picture")
    assert index_yt3d(tmp_path, "train").dropped == {"unreadable pictures": 1,
                                                     "samples without their picture": 1}


def test_yt3d_leaves_out_nan(tmp_path):
    verts = write_yt3d(tmp_path)
    notes = json.loads((tmp_path / "youtube_train.json").read_text())["annotations"]
    notes[1]["vertices"][700][1] = float("nan")
    write_yt3d(tmp_path, annotations=notes)
    index = index_yt3d(tmp_path, "train")
    assert index.columns["id"].tolist() == ["900", "902", "903"]
    assert index.dropped == {"hands with NaN": 1}
    assert np.abs(index.columns["verts_px"] - verts[[0, 2, 3]]).max() < 1e-5


def test_yt3d_cache_notices_frames_that_come(tmp_path, monkeypatch):
    write_yt3d(tmp_path, {"youtube/abc/video/frames/7.png": (40, 30)})
    ids = lambda: index_yt3d(tmp_path, "train", cache=tmp_path / "cache").columns["id"].tolist()
    assert ids() == ["900", "901"]
    with monkeypatch.context() as patch:
        patch.setattr("sources.yt3d._frame_size", lambda *_: pytest.fail("was read again"))
        assert ids() == ["900", "901"]
    picture(tmp_path / "youtube/abc/video/frames/12.jpg", 40, 30)
    assert ids() == ["900", "901", "903"]
    picture(tmp_path / "youtube/abc/video/frames/7.png", 80, 60)
    index = index_yt3d(tmp_path, "train", cache=tmp_path / "cache")
    assert index.columns["frame_scale"].tolist() == [[2, 2], [2, 2], [1, 1]]


def test_yt3d_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="youtube_val.json is neither in"):
        index_yt3d(tmp_path, "val")
    notes = [{"vertices": [[1, 2, 3]] * 777, "is_left": 0, "image_id": 55, "id": 1}]
    for change in ({"images": 5}, {"annotations": [{}]}, {"images": []}, {"annotations": notes}):
        write_yt3d(tmp_path, **change)
        with pytest.raises(UserError, match="youtube_train.json is not as published"):
            index_yt3d(tmp_path, "train")
    (tmp_path / "youtube_train.json").write_text("{oops")
    with pytest.raises(UserError, match="youtube_train.json is not as published"):
        index_yt3d(tmp_path, "train")
    other = tmp_path / "other"
    write_yt3d(other, {"youtube/x/video/frames/1.png": (9, 9)})
    with pytest.raises(UserError, match="not one of the pictures"):
        index_yt3d(other, "train")


# ---- HO3D -----------------------------------------------------------------------------------------


def python2(value: object) -> bytes:
    """A value as Python 2's cPickle wrote it, opcode by opcode: strings and arrays are raw bytes."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"I01\n", False: b"I00\n"}[value]
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, (bytes, str)):
        raw = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + len(raw).to_bytes(4, "little") + raw                     # BINSTRING
    if isinstance(value, (list, tuple)):
        return b"(" + b"".join(map(python2, value)) + (b"t" if isinstance(value, tuple) else b"l")
    if isinstance(value, dict):
        return b"(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"d"
    kind = b"cnumpy\ndtype\n" + python2((f"f{value.itemsize}", 0, 1)) + b"R"
    kind += python2((3, "<", None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2("b")
    state = b"(" + python2(1) + python2(value.shape) + kind + python2(False) + python2(value.tobytes())
    return empty + b"tR" + state + b"tb"


def meta(i: int, **changes: object) -> dict:
    """A training label: joint j of frame i at (0.01 j, 0.002 j, -0.5 - 0.01 i) m, OpenGL axes."""
    joints = np.array([[0.01 * j, 0.002 * j, -0.5 - 0.01 * i] for j in range(21)])
    return {"handJoints3D": joints, "handPose": np.arange(48) / 100 + i, "objName": "003_cracker_box",
            "handTrans": np.array([0.1, 0.2, -0.6 - i]), "handBeta": np.arange(10.0) - i, "objLabel": 2,
            "camMat": np.array([[600.0, 0, 320], [0, 610, 240], [0, 0, 1]], "f4"),
            "camIDList": ["0", "1"], "objCorners3D": None} | changes


def write_ho3d(root: Path, split: str, labels: list, names: list[str], suffix: str = ".png") -> None:
    (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    for name, label in zip(names, labels):
        sequence, frame = name.split("/")
        picture(root / split / sequence / "rgb" / (frame + suffix), 64, 48)
        file = root / split / sequence / "meta" / f"{frame}.pkl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(label if isinstance(label, bytes) else python2(label) + b".")


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


def evaluation_label(i: int) -> dict:
    return {"handJoints3D": np.array([0.01 * i, 0.02, -0.5]), "handBoundingBox": [10, 5 + i, 40, 37],
            "camMat": np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]), "objName": "a", "objLabel": 1}


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


# ---- COCO-WholeBody -------------------------------------------------------------------------------


def person(i: int, **changes: object) -> dict:
    """Both hands in picture i: left key point j at (10 + j, 20), right at (50, 30.5 + j)."""
    return {"id": 70 + i, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 90, 60],
            "lefthand_valid": True, "lefthand_box": [9.5, 15, 22.25, 12],
            "lefthand_kpts": [x for j in range(21) for x in (10 + j, 20.0, 2)],
            "righthand_valid": True, "righthand_box": [45.0, 28, 10, 25],
            "righthand_kpts": [x for j in range(21) for x in (50, 30.5 + j, 1)]} | changes


def write_coco(root: Path, people: list[dict], **changes: object) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    ids = {one["image_id"] for one in people if "image_id" in one}
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 64} for i in sorted(ids)]
    content = {"images": images, "annotations": people} | changes
    (root / "annotations" / "coco_wholebody_val_v1.0.json").write_text(json.dumps(content))
    for i in ids:
        picture(root / "val2017" / f"{i:012d}.jpg", 96, 64)


def test_coco_gives_both_hands_with_their_own_boxes(tmp_path):
    write_coco(tmp_path, [person(5)])
    index = index_coco(tmp_path, "val")
    assert index.columns["id"].tolist() == ["75-left", "75-right"]
    assert index.columns["side"].tolist() == ["left", "right"] and index.box_source == "annotated"
    assert index.path(0) == "val2017/000000000005.jpg" and index.columns["image_id"].tolist() == [5, 5]
    assert index.columns["box"].tolist() == [[9.5, 15, 22.25, 12], [45, 28, 10, 25]]
    assert index.columns["uv"][0, 8].tolist() == [18, 20]         # already in our order, of either side
    assert index.columns["uv"][1, 20].tolist() == [50, 50.5]
    left, right = (Hands(index, 50, 1.0)[i] for i in range(2))
    assert set(left) == KEYS and [key for key, known in left["has"].items() if known] == ["uv"]
    # right: a square of 25 around (50, 40.5), so x goes to 2 (x + 0.5 - 37.5) - 0.5
    assert right["uv"][0].tolist() == pytest.approx([25.5, 5.5], abs=1e-4)
    # left: a square of 22.25 around (20.625, 21), mirrored; joint 0 is at x = 10
    assert left["uv"][0, 0] == pytest.approx(49 - ((10.5 - 9.5) * 50 / 22.25 - 0.5), abs=1e-4)


def test_coco_takes_points_with_any_v_above_zero_and_valid_hands_only(tmp_path):
    points = [x for j in range(21) for x in (9.0, 9.0, [0, 0.04, 1, 2][j % 4])]
    nowhere = {"righthand_valid": False, "righthand_box": [0.0] * 4, "righthand_kpts": [0.0] * 63}
    people = [person(1, lefthand_kpts=points, **nowhere), person(2, lefthand_valid=False),
              person(3, lefthand_box=[5.0, 5.0, 0.0, 0.0])]
    write_coco(tmp_path, people)
    index = index_coco(tmp_path, "val")
    assert index.columns["id"].tolist() == ["71-left", "72-right", "73-right"]
    assert index.dropped == {"valid hands without a box": 1}
    assert np.isnan(index.columns["uv"][0]).any(1).tolist() == [j % 4 == 0 for j in range(21)]
    assert Hands(index, 32, 1.0)[0]["confidence"].tolist() == [float(j % 4 > 0) for j in range(21)]
    (tmp_path / "val2017/000000000002.jpg").unlink()
    index = index_coco(tmp_path, "val", cache=tmp_path / "cache")
    assert index.dropped["samples without their picture"] == 1 and len(index) == 2


def test_coco_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="coco_wholebody_train_v1.0.json is missing"):
        index_coco(tmp_path)
    plain = {key: value for key, value in person(1).items() if "hand" not in key}     # COCO's own file
    for people, change in (([plain], {}), ([person(1, lefthand_kpts=[0] * 62)], {}), ([person(1)], {
            "images": []}), ([person(1, righthand_box=[1, 2, 3])], {}), ([], {"annotations": 3})):
        write_coco(tmp_path, people, **change)
        with pytest.raises(UserError, match="coco_wholebody_val_v1.0.json is not as published"):
            index_coco(tmp_path, "val")
    write_coco(tmp_path, [person(1, lefthand_valid=False, righthand_valid=False)])
    with pytest.raises(UserError, match="has no valid hand"):
        index_coco(tmp_path, "val")


# ---- Names ----------------------------------------------------------------------------------------


def test_data_sets_are_read_by_name(tmp_path):
    write_freihand(tmp_path)
    assert parse_data("freihand:90-gs=/a") == ("freihand", "90-gs", "/a")
    assert len(read_index("freihand", "", str(tmp_path), "train")) == 12
    assert len(read_index("freihand", "gs", str(tmp_path), "train")) == 3
    assert len(read_index("freihand", "", str(tmp_path), "val")) == 0
    write_yt3d(tmp_path)
    assert len(read_index("yt3d", "", str(tmp_path), "train")) == 4
    write_ho3d(tmp_path, "train", [meta(0)], ["A/0"])
    assert len(read_index("ho3d", "", str(tmp_path), "train")) == 1
    write_coco(tmp_path, [person(5)])
    assert len(read_index("coco", "", str(tmp_path), "val")) == 2
    for name in ("yt3d", "coco", "ho3d"):
        with pytest.raises(UserError, match=f"{name} has no parts"):
            read_index(name, "x", str(tmp_path), "train")
    with pytest.raises(UserError, match="coco has no split 'test'"):
        read_index("coco", "", str(tmp_path), "test")
    with pytest.raises(UserError, match="freihand has no split 'all'"):
        read_index("freihand", "", str(tmp_path), "all")


def test_tips_are_each_data_sets_own():
    tips = {name: TIPS[joints_of(name).tips] for name in ("freihand", "yt3d", "ho3d")}
    assert tips == {"freihand": (744, 320, 443, 555, 672), "yt3d": (744, 320, 443, 554, 671),
                    "ho3d": (744, 333, 444, 555, 672)}
