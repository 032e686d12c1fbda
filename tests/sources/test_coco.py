"""COCO-WholeBody in its official layout."""

import numpy as np
import pytest

from common import UserError
from sources.coco import index_coco
from sources.hands import Hands
from trees import KEYS, person, write_coco


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
        with pytest.raises(UserError, match="coco_wholebody_val_v1.0.json"):
            index_coco(tmp_path, "val")
    write_coco(tmp_path, [person(1, lefthand_valid=False, righthand_valid=False)])
    with pytest.raises(UserError, match="has no valid hand"):
        index_coco(tmp_path, "val")
