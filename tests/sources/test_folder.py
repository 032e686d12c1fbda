"""Folders with and without labels.jsonl, and class folders."""

import pytest

from common import UserError
from sources import read_index
from sources.folder import index_folder, index_imagenet
from sources.hands import Hands
from trees import LABEL, label_folder, noise, save


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
    ('{"path": "a.png", "box": [0, 0, 1e999, 1]}', "box must lie from")])
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
