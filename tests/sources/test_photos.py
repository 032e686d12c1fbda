"""Hands found in whole photos and cut out, once."""
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from sources import photos
from sources.pictures import _hand_detector


LOOKED = []


def finder(picture):
    """Stands in for MediaPipe: a left hand in pictures 90 px wide, its box 20 px around (30, 20)."""
    LOOKED.append(picture.shape)
    uv = np.array([(20, 20), (40, 20), *[(30, 15 + k / 2) for k in range(19)]], float)
    return [{"side": "left", "confidence": 0.9, "uv": uv}] if picture.shape[1] == 90 else []


def test_hands_are_cut_from_whole_photos_once(tmp_path, monkeypatch, capsys):
    """A 20 px box makes a 34 px crop around (30, 20); left hands are mirrored."""
    monkeypatch.setattr(photos, "detect_hands", finder)
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[:, 33:40] = 255                                                 # right of the hand's middle
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.fromarray(photo).save(tmp_path / "photos" / "a.png")
    Image.fromarray(photo[:, :50]).save(tmp_path / "photos" / "more" / "none.png")
    (tmp_path / "photos" / "broken.jpg").write_text("x")
    cache = str(tmp_path / "cache")
    spec = photos.cut_photos(f"folder:photos={tmp_path / 'photos'}", "", cache, 1.7)
    crops = list(Path(spec.removeprefix("folder=")).glob("*.jpg"))
    cut = np.asarray(Image.open(crops[0])).mean((0, 2))
    assert len(crops) == 1 and cut.shape == (34,)
    assert cut[8:13].min() > 200 and cut[18:].max() < 50 and cut[:5].max() < 50      # px 33-39 are 20-26: mirrored
    assert "3 photos" in capsys.readouterr().out and len(LOOKED) == 2
    assert photos.cut_photos("folder:photos", str(tmp_path / "photos"), cache, 1.7) == spec    # --root
    assert len(LOOKED) == 2                                        # seen before
    assert photos.cut_photos("synthetic:calm", "", cache, 1.7) == "synthetic:calm"


def test_without_mediapipe_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.hands", None)
    _hand_detector.cache_clear()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="pip install mediapipe"):
        photos.cut_photos(f"folder:photos={tmp_path}", "", str(tmp_path), 1.7)
