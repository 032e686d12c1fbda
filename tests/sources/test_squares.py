"""Squares that are kept: the bits that were read, whatever is killed, torn, full or changed in between."""
import errno
import json
import multiprocessing
import os
import pickle
import types

import numpy as np
import pytest
import torch

from common import Flags
from sources import open_data, squares
from sources.folder import index_folder
from sources.hands import Hands
from sources.squares import Kept, keep_squares, square_record
from test_loader import equal
from trees import noise, rig_tree, save

CPU = torch.device("cpu")
PLAN = [torch.tensor([3, 1]), torch.tensor([0, 2, 3])]


def photos(root, n=4):
    """n photos, every second of a left hand, one of them without a box."""
    lines = []
    for k in range(n):
        save(root / f"{k}.jpg", noise(90 + k, 120, k), quality=95)
        lines.append({"path": f"{k}.jpg", "side": ("right", "left")[k % 2]} | ({"box": [30, 20 + k, 40, 50]} if k else {}))
    (root / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return index_folder(root)


def opened(root, share=0.25):
    """A source that keeps its squares, and where."""
    index = photos(root) if not (root / "labels.jsonl").exists() else index_folder(root)
    kept = keep_squares(index, 32, 1.25, root / "cache", share)
    return Hands(index, 32, 1.25, kept), kept


def read(data, workers=0):
    return list(data.batches(PLAN, CPU, workers))


def spoil(root):
    """Overwrite all photos' pixels with size and time as they were: who still sees them did not look."""
    for path in root.glob("*.jpg"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_is_what_was_read_to_the_bit(tmp_path, workers, capsys):
    data, kept = opened(tmp_path)
    want = read(Hands(data.index, 32, 1.25))
    assert not kept.marks.any() and all(map(equal, read(data, workers), want)) and kept.marks.all()
    again, _ = opened(tmp_path)
    spoil(tmp_path)
    assert all(map(equal, read(again, workers), want))
    said = capsys.readouterr()
    assert "4 of 4 are there" in said.out and "black" not in said.err
    assert kept.marks.all() and kept.path.stat().st_size == kept.whole


def test_moments_of_several_cameras_are_kept_too(tmp_path):
    rig_tree(tmp_path, frames=2)
    cfg = Flags(root=str(tmp_path), cache=str(tmp_path / "cache"), mano="builtin")
    from sources import Rig
    data = open_data(cfg, ("cameras",), "train", 64, 2.2, CPU, rig=Rig(2))
    first = next(data.batches([torch.arange(len(data))], CPU, 0))
    assert data.hands.kept.marks[data.rows.ravel()].all()
    data.hands.index.root = "nowhere"
    assert equal(next(data.batches([torch.arange(len(data))], CPU, 0)), first)


@pytest.mark.parametrize("where", ["mark", "image", "size"])
def test_a_torn_record_is_read_again_from_its_picture(tmp_path, where):
    data, kept = opened(tmp_path)
    want = read(data)
    assert all(map(equal, read(data), want))
    start = kept.whole - (4 - 2) * kept.record.itemsize                # of record 2
    place = {"mark": 4 * 2 + 1, "image": start + 77, "size": start + 3 * 32 * 32}[where]
    with open(kept.path, "r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 255]))
    assert kept.read(2) is not None                          # this run has looked at it already
    again, fresh = opened(tmp_path)
    assert fresh.read(2) is None and fresh.read(1) is not None
    assert all(map(equal, read(again), want)) and fresh.read(2) is not None


def test_a_writer_killed_in_the_middle_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    """Killed after part of the record, and between the record and its mark."""
    data, kept = opened(tmp_path)
    record = np.array([(np.full((3, 32, 32), 9), (5, 5))], kept.record)
    for after, calls in ((1000, 1), (None, 1)):
        made = []

        def write(file, content, after=after, calls=calls, made=made):
            made.append(1)
            if len(made) > calls or after:
                file.write(content[:after or 0])
                raise KeyboardInterrupt
            file.write(content)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(squares, "_write", write)
            kept.write(0, record)
        assert kept.read(0) is None
    kept.write(0, record)
    assert (kept.read(0)["image"] == 9).all()


def fill(root, rows):
    data, _ = opened(root)
    for row in rows:
        data.read([row])


def test_two_processes_fill_one_file(tmp_path):
    want = read(Hands(photos(tmp_path), 32, 1.25))
    both = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, rows)) for rows in ([0, 1, 2], [2, 3, 1])]
    for one in both:
        one.start()
    for one in both:
        one.join()
        assert one.exitcode == 0
    data, kept = opened(tmp_path)
    spoil(tmp_path)
    assert kept.marks.all() and all(map(equal, read(data), want))
    assert len(list((tmp_path / "cache").glob("*.squares"))) == 1


def test_a_changed_picture_is_another_file_and_the_old_one_is_named(tmp_path, capsys, monkeypatch):
    old = opened(tmp_path)[1]
    for change in ("pixels", "box", "row"):
        before = {path.name for path in (tmp_path / "cache").glob("*.squares")}
        lines = (tmp_path / "labels.jsonl").read_text().splitlines()
        if change == "pixels":
            save(tmp_path / "2.jpg", noise(90, 120, 77))
        elif change == "box":
            lines[1] = lines[1].replace("[30,", "[31,")
        else:
            lines = lines[:-1]
        (tmp_path / "labels.jsonl").write_text("\n".join(lines))
        capsys.readouterr()
        new = opened(tmp_path)[1]
        assert new.path.name not in before, change
        said = capsys.readouterr().out
        assert f"{old.path}: " in said and "delete it if no run needs it" in said and f"{new.path}: " not in said
    index = index_folder(tmp_path)
    monkeypatch.setattr("PIL.__version__", "0.1")
    assert opened(tmp_path)[1].path != new.path
    names = {keep_squares(index, *given, tmp_path / "cache", 0.25).path for given in ((32, 1.25), (33, 1.25), (32, 1.3))}
    assert len(names) == 3


def test_a_broken_picture_is_not_kept_as_a_black_one(tmp_path, capsys):
    data, kept = opened(tmp_path)
    content = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(content[:60])
    assert read(data)[1]["image"][1].max() == 0 and kept.marks.astype(bool).tolist() == [True, True, False, True]
    (tmp_path / "2.jpg").write_bytes(content)
    assert read(data)[1]["image"][1].max() > 0 and kept.marks.all()


def test_a_disk_without_room_is_said_and_reading_goes_on(tmp_path, monkeypatch, capsys):
    index = photos(tmp_path)
    need = 4 * square_record(32).itemsize
    free = lambda n: monkeypatch.setattr(squares.shutil, "disk_usage", lambda home: types.SimpleNamespace(free=n, total=n))
    free(4 * need - 1)
    assert keep_squares(index, 32, 1.25, tmp_path / "cache", 0.25) is None
    assert "decoded whenever they are read" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    free(4 * need)
    data, kept = opened(tmp_path)
    want, plain, room = read(Hands(index, 32, 1.25)), squares._write, [2]

    def full(file, content):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file, content)

    monkeypatch.setattr(squares, "_write", full)
    assert all(map(equal, read(data), want)) and all(map(equal, read(data), want))
    assert int((kept.marks > 0).sum()) == 1 and capsys.readouterr().err.count("No space left") == 1
    assert keep_squares(index, 32, 1.25, tmp_path / "cache", 0) is None


def test_what_is_looked_at_once_is_not_kept(tmp_path):
    for k in range(40):
        save(tmp_path / f"{k}.png", noise(8, 8, k))
    kept = lambda split, **more: open_data(Flags(root=str(tmp_path), cache=str(tmp_path / "cache"), mano="builtin", **more),
                                           ("folder",), split, 16, 1.25, CPU).kept
    assert kept("train") and kept("val") and not kept("test") and not kept("train", keep=0.0)


def test_another_process_opens_the_file_and_is_not_sent_it(tmp_path):
    kept = Kept(tmp_path / "a.squares", square_record(64), 2000)
    kept.write(7, np.ones(1, kept.record))
    sent = pickle.dumps(kept)
    assert len(sent) < 2000 and pickle.loads(sent).read(7)["image"].all() and pickle.loads(sent).read(6) is None
