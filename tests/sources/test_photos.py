"""Hands that are found in whole photos, once."""
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ti_net
from common import UserError
from sources import open_data, photos, read_index
from sources.folder import index_folder
from sources.hands import Hands
from sources.pictures import _hand_detector


LOOKED = []


def finder(picture):
    """Stands in for MediaPipe: a left hand in pictures 90 px wide, its box 20 px around (30, 20)."""
    LOOKED.append(picture.shape)
    uv = np.array([(20, 20), (40, 20), *[(30, 15 + k / 2) for k in range(19)]], float)
    return [{"side": "left", "confidence": 0.9, "uv": uv}] if picture.shape[1] == 90 else []


def photos_below(folder):
    """a.png with a hand, more/none.png without one, a broken picture."""
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[:, 33:40] = 255                                                 # right of the hand's middle
    (folder / "more").mkdir(parents=True)
    Image.fromarray(photo).save(folder / "a.png")
    Image.fromarray(photo[:, :50]).save(folder / "more" / "none.png")
    (folder / "broken.jpg").write_text("x")
    return folder


@pytest.fixture
def looked(monkeypatch):
    """Shapes of the photos that the stand-in for MediaPipe has looked at."""
    LOOKED.clear()
    monkeypatch.setattr(photos, "detect_hands", finder)
    return LOOKED


def hands_of(folder, cache, split="all", part="hands"):
    return index_folder(folder, split, part, cache)


def test_hands_are_found_in_whole_photos_once(tmp_path, looked):
    """A box of 20 px around (30, 20), in edges 20.5 to 40.5; margin 1.7 makes a square of 34 px; left hands are mirrored."""
    folder, cache = photos_below(tmp_path / "photos"), tmp_path / "cache"
    index = hands_of(folder, cache)
    assert index.columns["box"].tolist() == [[20.5, 15.5, 20, 9]] and index.box_source == "detector" and index.id(0) == "a.png#0"
    assert index.dropped == {"unreadable photos": 1, "photos without a hand": 1} and len(looked) == 2
    one = Hands(index, 34, 1.7)[0]
    row = one["image"].float().mean((0, 1))
    assert one["side"] == "left" and row[8:13].min() > 200 and row[18:].max() < 50 and row[:5].max() < 50     # px 33-39: 20-26 mirrored
    assert not one["has"]["uv"] and one["uv_label"].isfinite().all()                # a detector's are labels, never the truth
    again = read_index("folder", "photos", str(folder), "all", cache=cache)         # as it was called
    assert len(looked) == 2 and again.columns["uv_label"].tolist() == index.columns["uv_label"].tolist()


def test_only_photos_that_are_new_or_changed_are_looked_at_and_a_torn_line_is_no_line(tmp_path, looked):
    folder, cache = photos_below(tmp_path / "photos"), tmp_path / "cache"
    hands_of(folder, cache)
    shutil.copy(folder / "a.png", folder / "b.png")
    assert [hands_of(folder, cache).id(k) for k in (0, 1)] == ["a.png#0", "b.png#0"] and len(looked) == 3
    os.utime(folder / "a.png", ns=(1, 1))
    hands_of(folder, cache)
    assert len(looked) == 4
    kept = next(cache.glob("hands-*.jsonl"))
    kept.write_bytes(kept.read_bytes()[:-9])                                        # a kill in the last line, a.png's
    assert [len(hands_of(folder, cache)) for _ in range(2)] == [2, 2] and len(looked) == 5
    kept.write_text(kept.read_text().replace("40.0", "44.0"))                       # nobody's answer
    assert hands_of(folder, cache).columns["box"][:, 2].tolist() == [20, 20] and len(looked) == 7


def test_what_cannot_be_asked_for_is_said(tmp_path, looked):
    folder = photos_below(tmp_path / "photos")
    with pytest.raises(UserError, match="folder:feet: the part of a folder can be hands"):
        hands_of(folder, tmp_path, part="feet")
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match="1 photos without a hand.*there is nothing to learn from"):
        hands_of(folder, tmp_path)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="--cache .*taken"):
        hands_of(folder, tmp_path / "taken")
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    index = index_folder(folder)
    assert "the middle square of each picture is cut; folder:hands=DIR" in index.summary()


def test_every_pretraining_takes_all_hands_that_are_found(tmp_path, looked, capsys):
    """Also where labels.jsonl lies there: the part asks for MediaPipe."""
    folder = photos_below(tmp_path / "photos")
    for k in range(30):
        shutil.copy(folder / "a.png", folder / f"{k}.png")
    (folder / "labels.jsonl").write_text('{"path": "a.png"}')
    cfg = ti_net.Config(cache=str(tmp_path / "cache"), keep=0.0)
    data = open_data(cfg, (f"folder:hands={folder}",), "train", 32, 1.7, torch.device("cpu"))
    assert len(data) == 31 and data.gives("uv_label")
    assert "folder hands all: 31 samples, box from detector" in capsys.readouterr().out


def test_without_mediapipe_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.hands", None)
    _hand_detector.cache_clear()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="pip install --no-deps mediapipe"):
        hands_of(tmp_path, tmp_path / "cache")
