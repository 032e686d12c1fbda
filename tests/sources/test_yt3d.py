"""YouTube3DHands in its official layout."""
import json

import numpy as np
import pytest

from common import UserError
from sources.hands import Hands
from sources.yt3d import index_yt3d
from trees import KEYS, picture, write_yt3d


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
        with pytest.raises(UserError, match="youtube_train.json: "):
            index_yt3d(tmp_path, "train")
    (tmp_path / "youtube_train.json").write_text("{oops")
    with pytest.raises(UserError, match="youtube_train.json: "):
        index_yt3d(tmp_path, "train")
    other = tmp_path / "other"
    write_yt3d(other, {"youtube/x/video/frames/1.png": (9, 9)})
    with pytest.raises(UserError, match="not one of the pictures"):
        index_yt3d(other, "train")
