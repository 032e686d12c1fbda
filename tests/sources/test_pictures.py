"""Picture files: every mode, rotation, size, broken ones, lens distortion."""
import json
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from common import UserError
from sources.folder import index_folder
from sources.hands import Hands
from sources.pictures import (
    check_images, cut_square, picture_size, read_image, undistort, undistort_picture)
from trees import DIST, KEYS, noise, one, save


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


def test_a_large_photo_is_decoded_smaller_and_cut_to_the_same_square(tmp_path, monkeypatch):
    """A chessboard on a gradient: 2 levels of grey on average, 0.02 px of the square; whichever way EXIF turns it."""
    y, x = np.mgrid[:800, :1200]
    board = 60 + 0.08 * x + 0.05 * y + 50 * ((x // 120 + y // 100) % 2)
    picture = np.stack([board, 0.8 * board, 255 - board], -1).round().astype(np.uint8)
    taken = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda file, mode, size: taken.append(size) or draft(file, mode, size))
    for turn, cut, box, size, want in ((1, slice(None), [300, 100, 600, 600], 96, (300, 200)), (6, slice(None), [100, 300, 600, 600], 96, (300, 200)),
                                       (3, slice(None), [301, 99, 640, 640], 40, (150, 100)), (1, slice(1197), [300, 100, 600, 600], 96, None),
                                       (1, slice(None), [300, 100, 600, 600], 201, None)):
        exif = Image.Exif()
        exif[0x0112] = turn
        save(tmp_path / "a.jpg", picture[:, cut], exif=exif, quality=95, subsampling=0)
        (tmp_path / "labels.jsonl").write_text(json.dumps({"path": "a.jpg", "box": box}))
        taken.clear()
        image = Hands(index_folder(tmp_path), size, 1.0).read([0])["image"][0].permute(1, 2, 0).double().numpy()
        assert taken == [want] * (want is not None)
        whole = cut_square(Image.fromarray(read_image(tmp_path / "a.jpg")), np.array(box[:2]) + np.array(box[2:]) / 2 - 0.5, box[2], size)
        gap = image - whole
        assert abs(gap).mean() < 2 * (want is not None) + 1e-9
        slope = np.stack([*np.gradient(whole.mean(2)), np.ones((size, size))], -1).reshape(-1, 3)
        assert np.abs(np.linalg.lstsq(slope, gap.mean(2).ravel(), rcond=None)[0][:2]).max() < 0.02


def test_exif_rotation_is_applied(tmp_path):
    picture, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    picture[:, :16] = 255                                         # left half white
    exif[0x0112] = 6                                             # shown turned 90 degrees clockwise
    seen = read_image(save(tmp_path / "turned.jpg", picture, exif=exif, quality=95))
    assert seen.shape == (32, 16, 3) and seen[4].mean() > 250 and seen[28].mean() < 5


def bomb(w: int, h: int) -> bytes:
    """The head of a .png of that size, without its pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_sizes_are_refused_by_name_before_pixels_are_read(tmp_path, recwarn, monkeypatch):
    for name, w, h in (("a.png", 10_000, 5_001), ("b.png", 100_000, 100_000)):
        (tmp_path / name).write_bytes(bomb(w, h))
        for look in (read_image, picture_size):
            with pytest.raises(UserError, match=f"{name}: {w} x {h} pixels are more than the 50 million"):
                look(tmp_path / name)
    monkeypatch.setattr("sources.pictures.FULL_CHECK", 0)          # nor does a quick check take it
    save(tmp_path / "c.jpg", noise(300, 200))
    monkeypatch.setattr("sources.pictures.MAX_PIXELS", 60_000 - 1)
    assert not check_images([str(tmp_path / "c.jpg")])[0]
    monkeypatch.setattr("sources.pictures.MAX_PIXELS", 60_000)
    assert check_images([str(tmp_path / "c.jpg")])[0] and not recwarn.list


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "a.png").symlink_to(os.devnull)                    # as a pipe, which would be waited for
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").symlink_to(tmp_path / "c.png")
    for name, said in (("a.png", "not a file"), ("b.png", "not a file"), ("c.png", "cannot be read"), ("d.png", "no such")):
        with pytest.raises(UserError, match=f"{name}: .*{said}"):
            read_image(tmp_path / name)


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sources.pictures.LARGE", 99)
    at_once, most, load = [], [], PngImageFile.load

    def slow(picture):
        at_once.append(picture)
        time.sleep(0.001)
        most.append(len(at_once))
        load(picture)
        at_once.pop()

    monkeypatch.setattr(PngImageFile, "load", slow)
    small, large = (save(tmp_path / f"{n}.png", noise(n, n)) for n in (9, 10))
    assert check_images([str(large)] * 130, 4).all() and set(most) == {1}
    most.clear()
    assert check_images([str(small)] * 130, 4).all() and max(most) > 1


def test_odd_pictures_are_read_as_viewers_show_them(tmp_path):
    assert read_image(save(tmp_path / "1.png", noise(1, 1))).shape == (1, 1, 3)
    frames = [Image.new("RGB", (6, 5), c) for c in ((255, 0, 0), (0, 0, 255))]
    for name in ("moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(tmp_path / name)[2, 3].tolist() == [255, 0, 0]
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\1\0\0\0" * 3     # cut off
    Image.fromarray(noise(20, 30)).save(tmp_path / "exif.jpg", exif=exif)
    assert read_image(tmp_path / "exif.jpg").shape == (20, 30, 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert picture_size(save(tmp_path / "turned.jpg", noise(20, 30), exif=turned)) == (20, 30)
    assert picture_size(tmp_path / "exif.jpg") == (30, 20)


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


def test_undistorted_pictures_and_points_agree():
    K, dist = np.array([[300.0, 0, 150], [0, 310, 120], [0, 0, 1]]), np.array(DIST)
    spots = np.array([[40.0, 60], [240, 180], [150, 30]])
    picture = np.zeros((240, 300, 3), np.uint8)
    yy, xx = np.mgrid[:240, :300]
    for x, y in spots:
        picture += (255 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 8))[..., None].astype(np.uint8)
    flat, moved = undistort_picture(picture, K, dist)[..., 0].astype(float), undistort(spots, K, dist)
    assert np.abs(moved - spots).max() > 1
    for x, y in moved:
        near_it = (np.abs(xx - x) < 7) & (np.abs(yy - y) < 7)
        w = flat * near_it
        assert abs((w * xx).sum() / w.sum() - x) < 0.1 and abs((w * yy).sum() / w.sum() - y) < 0.1
