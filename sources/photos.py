"""Whole photos without boxes, in which MediaPipe finds the hands, once; videos as their frames."""
from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError, barrier, rank, say
from sources.files import path_column
from sources.index import Index, tight_box
from sources.pictures import detect_hands, read_image

import numpy as np
from PIL import Image
from tqdm import tqdm


def found_hands(root: Path, files: list[str], cache: str | Path, name: str) -> Index:
    """The hands that MediaPipe finds in some photos below a folder, boxes tight around its points.

    What it found is kept in `cache`, a line a photo, and a photo is looked at again only if it has
    changed; so what was stopped goes on. Photos that cannot be read and those without a hand are
    counted and named. UserError where MediaPipe is not installed.
    """
    place = os.path.realpath(root).encode("utf-8", "surrogateescape")
    kept = Path(cache) / f"hands-{hashlib.sha1(place).hexdigest()[:16]}.jsonl"
    if rank() == 0:
        _look(Path(root), files, kept)
    barrier()
    known = _looked_at(kept)
    if missing := next((file for file in files if file not in known), ""):
        raise UserError(f"--cache {kept}: does not know {missing}; all processes need one --cache")
    rows: list[tuple[str, int, dict]] = []
    broken: list[str] = []
    empty: list[str] = []
    for file in files:
        hands = known[file]["hands"]
        if hands is None:
            broken.append(file)
        elif not hands:
            empty.append(file)
        rows += [(file, k, hand) for k, hand in enumerate(hands or ())]
    uv = np.array([hand["uv"] for *_, hand in rows], float).reshape(-1, N_JOINTS, 2)
    columns = {"paths": path_column([file for file, *_ in rows]),
               "id": np.array([f"{file}#{k}" for file, k, _ in rows], str),
               "side": np.array([hand["side"] for *_, hand in rows], str),
               "uv_label": uv, "box": tight_box(uv)}
    dropped = {"unreadable photos": len(broken), "photos without a hand": len(empty)}
    notes = [f"{what}: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
             for what, names in (("unreadable", broken), ("no hand in", empty)) if names]
    return Index(name, str(root), columns, "detector",
                 {reason: count for reason, count in dropped.items() if count}, notes)


def _look(root: Path, files: list[str], kept: Path) -> None:
    """Look for hands in the photos that `kept` does not know as they are, and add a line for each.

    A line is the checksum of what follows, and an object: path, stamp (size and time), and hands,
    null for a photo that cannot be read. A line that was torn or changed is not there.
    """
    known = _looked_at(kept)
    new = [file for file in files if known.get(file, {}).get("stamp") != _stamp(root / file)]
    if not new:
        return
    if os.path.lexists(kept) and not kept.is_file():                    # a pipe would wait for ever
        raise UserError(f"--cache: {kept} is in the way; remove it")
    for file in tqdm(new, "finding hands", unit="photo"):
        hands: list[dict] | None = None
        try:
            photo = read_image(root / file)
        except UserError as error:
            say(f"{error}; left out")
        else:
            hands = [hand | {"uv": hand["uv"].tolist()} for hand in detect_hands(photo)]
        text = json.dumps({"path": file, "stamp": _stamp(root / file), "hands": hands})
        _add_line(kept, f"{zlib.crc32(text.encode()):08x} {text}")


def _add_line(kept: Path, text: str) -> None:
    """A line of its own at the end of a file, also where the last was torn."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(kept, "a", encoding="utf-8") as lines:
            lines.write(f"\n{text}\n")
    except OSError as error:
        raise UserError(f"--cache {kept}: cannot be written ({error.strerror})") from None


def _stamp(photo: Path) -> list[int]:
    """What changes when a photo does: its size and time; [] where it is not there."""
    try:
        stat = photo.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _looked_at(kept: Path) -> dict[str, dict[str, Any]]:
    """What is known of photos, {path: {stamp, hands}}, from the lines that are whole."""
    found: dict[str, dict[str, Any]] = {}
    if not kept.is_file():
        return found
    for line in kept.read_bytes().splitlines():
        mark, _, text = line.partition(b" ")
        if mark != f"{zlib.crc32(text):08x}".encode() or not text:
            continue
        one = json.loads(text)
        found[one["path"]] = one
    return found


# ---- Videos --------------------------------------------------------------------------------------

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def _opencv(file: Path) -> ModuleType:
    """OpenCV, which comes with MediaPipe; UserError where it is missing."""
    try:
        import cv2
    except ImportError:
        raise UserError(f"{file}: reading a video needs OpenCV (pip install opencv-python-headless)"
                        "; without it give a folder of its frames") from None
    return cv2


def frames_of(video: Path, folder: Path) -> float:
    """Write a video's frames to folder/000001.jpg, ...; returns how many there are in a second.

    UserError where OpenCV is missing or cannot read the file.
    """
    cv2 = _opencv(video)
    stream = cv2.VideoCapture(str(video))
    rate = stream.get(cv2.CAP_PROP_FPS) or 25.0
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    while True:
        there, frame = stream.read()
        if not there:
            break
        count += 1
        Image.fromarray(frame[:, :, ::-1]).save(folder / f"{count:06d}.jpg", quality=95)
    if not count:
        raise UserError(f"{video}: OpenCV finds no frame in it; give a folder of its frames")
    say(f"{video}: {count:,} frames, {rate:.4g} a second, written to {folder}")
    return rate


def write_video(path: Path, pictures: Iterable[Image.Image], rate: float) -> None:
    """Pictures of one size as a video (.mp4), `rate` a second."""
    cv2 = _opencv(path)
    writer = None
    for picture in pictures:
        frame = np.asarray(picture.convert("RGB"))[: picture.height // 2 * 2,
                                                   : picture.width // 2 * 2, ::-1]
        if writer is None:
            kind = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(path), kind, rate, frame.shape[1::-1])
        writer.write(np.ascontiguousarray(frame))
    writer.release()
