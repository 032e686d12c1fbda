"""100DOH's annotated frames in their official layout."""
import numpy as np
import pytest

from common import UserError
from sources import read_index
from sources.doh100 import index_doh100
from sources.hands import Hands
from trees import KEYS, write_doh100

FRAME = "diy_v_AbCdEfGhIjK_frame000123"


def test_doh100_gives_each_hand_its_box_and_side(tmp_path):
    write_doh100(tmp_path / "VOCdevkit2007_handobj_100K" / "VOC2007")
    index = read_index("100doh", "", str(tmp_path), "train")
    assert index.columns["id"].tolist() == [f"{FRAME}-0", f"{FRAME}-1", "vlog_v_0123456789a_frame000001-0"]
    assert index.path(0) == f"JPEGImages/{FRAME}.jpg" and index.columns["side"].tolist() == ["right", "left", "right"]
    # pixels 11 to 30 and 21 to 30, counted from 1, both ends included: the left edge lies 10 px from the picture's
    assert index.columns["box"].tolist() == [[10, 20, 20, 10], [0, 0, 8, 16], [10, 20, 20, 10]]
    assert index.box_source == "annotated" and index.name == "100doh train" and not index.dropped
    sample = Hands(index, 16, 1.0)[1]
    assert set(sample) == KEYS and not any(sample["has"].values())
    assert np.array_equal(index_doh100(tmp_path / "VOCdevkit2007_handobj_100K/VOC2007").columns["box"], index.columns["box"])


def test_doh100_leaves_out_and_counts(tmp_path):
    write_doh100(tmp_path, frames={
        "a": [("None", 1, 1, 9, 9), ("", 1, 1, 9, 9), (None, 1, 1, 9, 9), ("0", 5, 5, 5, 9), ("0", 9, 1, 5, 9)],
        "b": [("0", 1, 1, 9, 9)], "c": [], "d": [("1", 1, 1, 9, 9)]})
    (tmp_path / "JPEGImages/d.jpg").unlink()
    index = index_doh100(tmp_path, "train", cache=tmp_path / "cache")
    assert index.columns["id"].tolist() == ["b-0"] and index.notes == ["1 of 4 frames have no hand"]
    assert index.dropped == {"hands without a side": 3, "hands without a box": 2, "samples without their picture": 1}
    write_doh100(tmp_path / "none", frames={"a": [("None", 1, 1, 9, 9)]})
    with pytest.raises(UserError, match="1 hands without a side; nothing is left to read in"):
        index_doh100(tmp_path / "none")


@pytest.mark.parametrize("old, new, said", [
    ("<handside>1", "<handside>2", "handside must be one of"), ("<name>hand", "<name>foot", "name must be one of"),
    ("<xmin>11", "<xmin>None", "could not convert"), ("<xmin>11", "<xmin>nan", "bndbox must lie"),
    ("</annotation>", "", "no element found"), ("<annotation>", "<!DOCTYPE a []><annotation>", "a document type is not allowed")])
def test_doh100_names_what_is_wrong(tmp_path, old, new, said):
    write_doh100(tmp_path)
    file = tmp_path / "Annotations" / f"{FRAME}.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{FRAME}.xml: .*{said}"):
        index_doh100(tmp_path)


def test_doh100_refuses_another_layout_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="VOC2007/ImageSets/Main/test.txt is missing"):
        index_doh100(tmp_path, "test")
    write_doh100(tmp_path, frames={"a": []})
    with pytest.raises(UserError, match="no frame of .*train.txt has a hand"):
        index_doh100(tmp_path)
    (tmp_path / "Annotations/a.xml").unlink()
    (tmp_path / "Annotations").rmdir()
    with pytest.raises(UserError, match="a.xml: .*No such file"):
        index_doh100(tmp_path, cache=tmp_path / "cache")
    (tmp_path / "ImageSets/Main/train.txt").write_text("../a\n")
    with pytest.raises(UserError, match="train.txt: a frame must be a path below"):
        index_doh100(tmp_path)
