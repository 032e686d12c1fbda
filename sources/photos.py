"""Whole photos without boxes: hands found by MediaPipe and cut out, once (HandMIM Sec. 3.1)."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

# common before torch: it settles how threads wait
from common import UserError, barrier, rank, say
from sources import parse_data
from sources.index import PICTURES
from sources.pictures import detect_hands, read_image

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm


def cut_photos(spec: str, root: str, cache: str, margin: float) -> str:
    """`folder:photos=DIR`: the hands in whole photos, cut out once -> `folder=CROPS`.

    Other specs are returned as they are. Without DIR it is `root`, or data/folder. Crops (`margin`
    x the key points' box, left hands mirrored) go to `cache`; photos seen before are not looked at
    again. Raises UserError without the package mediapipe.
    """
    name, part, folder = parse_data(spec)
    if (name, part) != ("folder", "photos"):
        return spec
    photos = Path(folder or root or "data/folder")
    crops = Path(cache) / f"hands-{_digest(str(photos.resolve()))}"
    if rank() == 0:
        _find_hands(photos, crops, margin)
    barrier()
    return f"folder={crops}"


def _find_hands(photos: Path, crops: Path, margin: float) -> None:
    """Cut every hand in the photos below a folder; `crops`/seen.txt lists those done so far."""
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*")
                   if p.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"folder:photos: {photos} holds no picture ({' '.join(PICTURES)})")
    crops.mkdir(parents=True, exist_ok=True)
    seen = crops / "seen.txt"
    done = set(seen.read_text("utf-8", "surrogateescape").splitlines()) if seen.is_file() else set()
    new = [file for file in files if file not in done]
    if os.path.lexists(seen) and not seen.is_file():
        raise UserError(f"--cache: {seen} is in the way; remove it")
    with open(seen, "a", encoding="utf-8", errors="surrogateescape") as known:
        for file in tqdm(new, "finding hands", unit="photo"):
            try:
                picture = read_image(photos / file)
            except UserError as error:
                say(f"{error}; left out")
                continue
            for k, hand in enumerate(detect_hands(picture)):
                cut = _cut_hand(picture, hand["uv"], margin, left=hand["side"] == "left")
                cut.save(crops / f"{_digest(file)}-{k}.jpg", quality=95)
            print(file, file=known, flush=True)
    hands = len(list(crops.glob("*.jpg")))
    say(f"folder:photos: {len(files):,} photos in {photos}, {hands:,} hands found")


def _digest(name: str) -> str:
    """Sixteen hexadecimal digits of a name: 240,000 photos need more than 32 bits."""
    return hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _cut_hand(picture: np.ndarray, xy: np.ndarray, margin: float, left: bool) -> Image.Image:
    """The square of margin x the box of key points (21, 2) px, at most 512 px, as a right hand."""
    low, high = xy.min(0), xy.max(0)
    side = margin * max(*(high - low), 2.0)
    middle = (low + high) / 2 + 0.5                     # pixel centres to edges, as `crop` counts
    box = [round(x) for x in (*(middle - side / 2), *(middle + side / 2))]
    out = Image.fromarray(picture).crop(box)
    out = out.resize((min(out.width, 512),) * 2, Image.Resampling.LANCZOS)
    return ImageOps.mirror(out) if left else out


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
