"""What readers share: the cache, files of labels."""
import json
import os
import signal
import time

import numpy as np
import pytest

from common import UserError
from sources.files import locked
from sources.folder import index_folder
from sources.interhand import index_interhand
from sources.parsing import hand_labels
from trees import LABEL, label_folder, write_interhand


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


def test_labels_are_read_in_both_layouts(tmp_path):
    file = tmp_path / "a.json"
    points = [[float(k), float(2 * k)] for k in range(21)]
    for content in ([points, [[0.5]] * 21], {"people": [
            {"hand_right_keypoints_2d": [0.0] * 63},
            {"hand_right_keypoints_2d": [x for u, v in points for x in (u, v, 0.5)]}]}):
        file.write_text(json.dumps(content))
        uv, sure = hand_labels(file)
        assert (uv == points).all() and (sure == 0.5).all()
        if isinstance(content, list):
            with pytest.raises(UserError, match="a.json: does not say which hand it is"):
                hand_labels(file, "left", both=True)
    left = [x for u, v in points for x in (v, u, 0.4)]
    file.write_text(json.dumps({"people": [{"hand_right_keypoints_2d": [9.0] * 63, "hand_left_keypoints_2d": left}]}))
    assert (hand_labels(file, "left")[0] == np.array(points)[:, ::-1]).all()
    file.write_text(json.dumps({"people": []}))
    assert np.isnan(hand_labels(file)[0]).all() and not hand_labels(file)[1].any()
    file.write_text(json.dumps([points[:5], [0.5] * 5]))
    with pytest.raises(UserError, match="a.json: "):
        hand_labels(file)


def test_what_is_kept_is_found_from_another_folder_and_for_one_hand_only(tmp_path, monkeypatch, hand):
    """A relative root that was kept must not send others to where it once pointed; poses are one hand file's."""
    write_interhand(tmp_path / "a", fits={"100": {"right": {"pose": [0.1] * 48, "shape": [0.0] * 10, "trans": [0.0] * 3}}})
    monkeypatch.chdir(tmp_path)
    first = index_interhand("a", "test", cache=tmp_path / "cache", mano={"right": hand})
    monkeypatch.chdir(tmp_path / "a")
    again = index_interhand(".", "test", cache=tmp_path / "cache", mano={"right": hand})
    assert (tmp_path / "a" / again.root / again.path(0)).is_file() and again.root == "." and first.root == "a"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    other = index_interhand(".", "test", cache=tmp_path / "cache", mano={"right": hand | {"hands_mean": np.zeros(45)}})
    known = np.isfinite(first.columns["pose"]).all(1)
    assert known.any() and not np.allclose(other.columns["pose"][known], first.columns["pose"][known])


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path):
    told, tell = os.pipe()
    if not (holder := os.fork()):
        with locked(tmp_path / "lock"):
            if os.fork():
                os.write(tell, b"held")
            time.sleep(2)                                         # the worker outlives its run
        os._exit(0)
    os.read(told, 4)
    with pytest.raises(BlockingIOError, match="another process.*lock"), locked(tmp_path / "lock", wait=False):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock", wait=False):
        pass
