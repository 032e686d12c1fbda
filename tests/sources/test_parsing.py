"""Numbers, words and paths of other people's files."""
import json
import math

import numpy as np
import pytest

from common import UserError
from sources.coco import index_coco
from sources.dexycb import _frames
from sources.ho3d import index_ho3d
from sources.interhand import index_interhand
from sources.parsing import (
    below, file_bytes, hand_labels, intrinsics, numbers, one_of, parse_json, parse_yaml, reading, rotations, whole)
from sources.yt3d import index_yt3d
from trees import SERIALS, meta, person, write_coco, write_dexycb, write_ho3d, write_interhand, write_yt3d


@pytest.mark.parametrize("given", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]], [[[1, 2, 3]], [[4, 5, 6]]], [[[1.0, 2, 3], [4, 5, 6]]],
                                   np.arange(1, 7, dtype="i2").reshape(1, 2, 3)])
def test_numbers_take_their_shape_flat_or_with_axes_of_one(given):
    assert numbers(given, "a", 2, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert numbers([[None, 2], [math.nan, 4]], "a", 2, 2, unknown=True)[:, 1].tolist() == [2, 4]
    assert numbers(5, "a") == 5 and numbers([[[5]]], "a", 1).tolist() == [5]


BOMB = [1] * 9
for _ in range(30):
    BOMB = [BOMB] * 9
DEEP = [1]
for _ in range(400):
    DEEP = [DEEP]


@pytest.mark.parametrize("given, said", [
    ([[1, 4], [2, 5], [3, 6]], "a must be 2 x 3 numbers"), ([1] * 5, "2 x 3"), ([[1, 2, 3], [4, 5]], "2 x 3"), ([], "2 x 3"), (1, "2 x 3"),
    (BOMB, "2 x 3"), (DEEP, "2 x 3"), (np.ones((3, 2)), "2 x 3"), (np.ones((2, 3), complex), "must be numbers"), (np.array([[None] * 3] * 2), "numbers"),
    ([1, 2, 3, 4, 5, "6"], "a must be numbers, not '6'"), ([1, 2, 3, 4, 5, None], "not None"), ([1, 2, 3, 4, 5, True], "not True"),
    ([1, 2, 3, 4, 5, {}], "numbers, not {}"), ([1, 2, 3, 4, 5, math.nan], "not hold nan"), ([1, 2, 3, 4, 5, -math.inf], "not hold -inf"),
    ([1, 2, 3, 4, 5, 1e308], r"from -1e\+06 to 1e\+06, not hold 1e\+308"), ([1, 2, 3, 4, 5, 10 ** 400], "beyond all bounds")])
def test_what_is_no_such_array_is_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        numbers(given, "a", 2, 3)


def test_ranges_hold_for_what_may_be_unknown_too():
    with pytest.raises(ValueError, match="from 0 to 1, not hold 2"):
        numbers([None, 2], "a", 2, least=0, most=1, unknown=True)
    with pytest.raises(ValueError, match="not hold inf"):
        numbers([None, math.inf], "a", 2, unknown=True)


def test_words_whole_numbers_and_paths_are_checked():
    assert whole(7, "id") == 7 and one_of(True, "valid", 0, 1) and below("a/..b/c.jpg", "path") == "a/..b/c.jpg"
    for bad in (True, 1.0, "1", -1, 1 << 60, None):
        with pytest.raises(ValueError, match="id must be a whole number"):
            whole(bad, "id")
    for bad in ("x", None, 2, [1], math.nan):
        with pytest.raises(ValueError, match="valid must be one of 0, 1"):
            one_of(bad, "valid", 0, 1)
    for bad in ("/etc/passwd", "../a", "a/../../b", "..\\a", "C:\\a", "~/a", "", "a\0b", None, 5):
        with pytest.raises(ValueError, match="path must be a path below"):
            below(bad, "path")


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        below("a\ud800.jpg", "path")


def test_cameras_and_rotations_are_what_they_say():
    K = np.array([[300.0, 1, 150], [0, 310, 120], [0, 0, 1]])
    intrinsics(np.stack([K, np.full((3, 3), np.nan)]))
    for place, value in (((0, 0), 0), ((1, 1), -5), ((1, 0), 3), ((2, 2), 2), ((2, 0), 1)):
        wrong = K.copy()
        wrong[place] = value
        with pytest.raises(ValueError, match="K must be"):
            intrinsics(np.stack([K, wrong]))
    rotations(np.eye(3)[[1, 2, 0]])
    for wrong in (np.eye(3)[[1, 0, 2]], 1.01 * np.eye(3), np.zeros((3, 3))):
        with pytest.raises(ValueError, match="R is no rotation"):
            rotations(np.stack([np.eye(3), wrong]))


def test_a_key_given_twice_is_refused():
    assert parse_json(b'[{"a": 1, "b": {"a": NaN}}]')[0]["a"] == 1 and parse_yaml(b"a: 1\nb: {a: 2}")["b"] == {"a": 2}
    for parse, text in ((parse_json, b'[{"b": 0, "a": 1, "a": 1}]'), (parse_yaml, b"b: 0\na: 1\na: 1"), (parse_yaml, b"c: {a: 1, a: 2}")):
        with pytest.raises(ValueError, match="'a' twice"):
            parse(text)
    with pytest.raises(ValueError, match="NaN is not allowed"):
        parse_json(b"[NaN]", nan=False)


@pytest.mark.parametrize("text, said", [("[" * 99_999, "nests too deeply"), ("7" * 5000, "4300"), ("{", "line 1"), ("{}", "no 'people'")])
def test_whatever_fails_is_one_line_with_the_file(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json: [^\n]*{said}[^\n]*$"):
        hand_labels(tmp_path / "a.json")
    with pytest.raises(UserError, match="a.json: .{100,160}$"), reading("a.json"):
        raise TypeError("long\n" * 999)
    (tmp_path / "b.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a file"):
        file_bytes(tmp_path / "b.json")


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("file, old, new, said", [
    ("*/*/meta.yml", "num_frames: 1", "num_frames: 0", "num_frames"), ("*/*/meta.yml", "num_frames: 1", "num_frames: 1000000000", "num_frames"),
    ("*/*/meta.yml", "num_frames: 1", "num_frames: .inf", "num_frames"), ("*/*/meta.yml", "mano_calib:\n- ", "mano_calib:\n- ../../", "path below"),
    ("*/*/meta.yml", f"- '{SERIALS[0]}'", f"- '{SERIALS[1]}'", "eight cameras"), ("*/*/meta.yml", "- right", "- both", "mano_sides"),
    ("calibration/intrinsics/*.yml", "fx: 600.5", "fx: 1e308", "fx"), ("calibration/intrinsics/*.yml", "fx: 600.5", "fx: .nan", "fx"),
    ("calibration/intrinsics/*.yml", "fx: 600.5", "fx: -600.5", "fx"), ("calibration/*/mano.yml", "- 0.1\n", "", "betas must be 10")])
def test_dexycb_names_what_is_wrong(tmp_path, file, old, new, said):
    write_dexycb(tmp_path, [0], sequences=1)
    change(min(tmp_path.glob(file)), old, new)
    with pytest.raises(UserError, match=f"meta.yml.*{said}"):
        _frames(tmp_path, min(tmp_path.glob("2*/*")).relative_to(tmp_path).as_posix(), [0])


@pytest.mark.parametrize("name, old, new, said", [
    ("camera", '"focal": {"400026"', '"focal": {"4"', "camera.json: it has no '400026'"), ("camera", '"3":', '"4": null, "3":', "camera.json"),
    ("data", '"bbox": [30', '"bbox": [Infinity', "bbox"), ("data", '"hand_type": "right"', '"hand_type": "foot"', "hand_type must be one of"),
    ("data", '"file_name": "', '"file_name": "../../', "file_name must be a path below"), ("data", '"id": 20', '"id": null', "id must be a whole"),
    ("joint_3d", '"world_coord": [[', '"world_coord": [[1e308, ', "world_coord")])
def test_interhand_names_what_is_wrong(tmp_path, name, old, new, said):
    write_interhand(tmp_path)
    change(tmp_path / f"annotations/test/InterHand2.6M_test_{name}.json", old, new)
    with pytest.raises(UserError, match=said):
        index_interhand(tmp_path, "test")


@pytest.mark.parametrize("changes, said", [
    ({"lefthand_box": [1, 2, math.inf, 4]}, "lefthand_box"), ({"lefthand_box": [1, 2, 10 ** 400, 4]}, "lefthand_box"),
    ({"righthand_kpts": [1e308] * 63}, "righthand_kpts"), ({"righthand_kpts": [None] * 63}, "righthand_kpts"),
    ({"lefthand_valid": "no"}, "lefthand_valid must be one of"), ({"id": 1e99}, "id must be a whole")])
def test_coco_names_what_is_wrong(tmp_path, changes, said):
    write_coco(tmp_path, [person(0, **changes)])
    with pytest.raises(UserError, match=f"coco_wholebody_val_v1.0.json: .*{said}"):
        index_coco(tmp_path, "val")


def test_no_path_leads_out_of_a_data_set(tmp_path):
    write_coco(tmp_path, [person(0)], images=[{"id": 0, "file_name": "../../etc/a.jpg"}])
    with pytest.raises(UserError, match="file_name must be a path below"):
        index_coco(tmp_path, "val")
    write_yt3d(tmp_path / "y", images=[{"id": 55, "name": "../a.png", "width": 4, "height": 4}])
    with pytest.raises(UserError, match="name must be a path below"):
        index_yt3d(tmp_path / "y")
    (tmp_path / "train.txt").write_text("../A\n")
    with pytest.raises(UserError, match="train.txt: a frame must be a path below"):
        index_ho3d(tmp_path)


def test_ho3d_labels_with_numbers_that_cannot_be_are_left_out_and_counted(tmp_path):
    labels = [meta(0), meta(1, handTrans=np.array([0, math.nan, 0])), meta(2, handBeta=np.full(10, 1e308)), meta(3, camMat=-np.eye(3))]
    write_ho3d(tmp_path, "train", labels, [f"A/{i}" for i in range(4)])
    assert index_ho3d(tmp_path).dropped == {"frames with NaN labels": 1, "frames with a broken label file": 2}


def test_yt3d_sizes_and_sides_are_checked(tmp_path):
    write_yt3d(tmp_path)
    content = json.loads((tmp_path / "youtube_train.json").read_text())
    for where, key, value, said in (("images", "width", 0, "width must be"), ("annotations", "is_left", 2, "is_left must be"),
                                    ("annotations", "vertices", [[1, 2, 3]], "vertices must be 778 x 3")):
        changed = json.loads(json.dumps(content))
        changed[where][0][key] = value
        (tmp_path / "youtube_train.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"youtube_train.json: {said}"):
            index_yt3d(tmp_path)
