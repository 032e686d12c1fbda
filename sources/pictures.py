"""Picture files: reading, checking, cutting, undistorting, and finding hands in them."""
from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm


FULL_CHECK = 20_000                                     # so many pictures are decoded to be checked
MAX_PIXELS = 50_000_000                                 # of a picture; one above is refused unread
LARGE = 4_000_000                                       # above, pictures are checked one at a time

Image.MAX_IMAGE_PIXELS = None                           # ours is lower and says which picture it is
warnings.filterwarnings("ignore", module="PIL")         # what is odd is mended or refused by name
_one_large = threading.Lock()


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture file whose size is known and whose pixels are not read yet.

    UserError names a file that is missing, no plain file, broken (also where that shows inside the
    `with`), or larger than MAX_PIXELS.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):                  # a pipe would wait for ever
            raise UserError(f"{path}: is not a file")
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UserError(f"{path}: {file.width} x {file.height} pixels are more than the "
                                f"{MAX_PIXELS // 10 ** 6} million that are read; make it smaller")
            yield file
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such picture") from error
    except Exception as error:           # decoders raise whatever their parsers met, of any class
        raise UserError(f"{path}: the picture cannot be read ({error})") from error


def read_image(path: str | Path) -> np.ndarray:
    """A picture as a viewer shows it: uint8 RGB (H, W, 3).

    EXIF rotation is applied, transparency lies on mid grey (128), 16-bit grey is divided by 257;
    grey, palette and CMYK become RGB, of an animation its first picture. UserError as `opened`.
    """
    with opened(path) as file:
        return np.array(_as_shown(file))


def read_shrunk(path: str | Path, ratio: Callable[[tuple[int, int]], float]
                ) -> tuple[Image.Image, int]:
    """`read_image` as Pillow has it, s times smaller, and s: 1, or 2, 4 or 8 for a large JPEG.

    `ratio` says from the (width, height) how many times the picture will be shrunk; s takes two
    thirds of that at most. A JPEG's blocks are decoded to 8 / s pixels a side, which leaves out
    what is shrunk away; the rest differs by 0.2 % of the range (0.5 to 0.9 grey levels of 63
    photos, the worst 1.6) and is shifted by less than 0.02 px of the result. A picture whose sides
    s does not divide is not shrunk, so x becomes x / s, edges counted, however EXIF turns it.
    """
    with opened(path) as file:
        s = 1
        if file.format == "JPEG":
            most = ratio(_size(file)) / 1.5
            s = next(s for s in (8, 4, 2, 1)
                     if s == 1 or (s <= most and file.width % s == file.height % s == 0))
            if s > 1:
                file.draft(None, (file.width // s, file.height // s))
        return _as_shown(file), s


def _as_shown(file: Image.Image) -> Image.Image:
    """The pixels of an open file as RGB, see `read_image`."""
    turned = file.getexif().get(0x0112, 1) != 1                      # a copy takes as long as a cut
    picture = ImageOps.exif_transpose(file) if turned else file
    if picture.mode.startswith("I"):                                 # 16 or 32 bits, one channel
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, (128, 128, 128, 255))
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as `read_image` gives it, from its header."""
    with opened(path) as file:
        return _size(file)


def _size(file: Image.Image) -> tuple[int, int]:
    turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)           # EXIF's orientation
    return file.size[::-1] if turned else file.size


def _readable(path: str, full: bool) -> bool:
    """Whether a picture decodes; unless `full`, a JPEG's header and end marker are enough."""
    try:
        with opened(path) as picture:
            if not full and picture.format == "JPEG":
                with open(path, "rb") as file:
                    file.seek(-2, os.SEEK_END)
                    if file.read() == b"\xff\xd9":
                        return True
            large = picture.width * picture.height > LARGE
            with _one_large if large else contextlib.nullcontext():
                picture.load()
                picture.getexif()
    except UserError:
        return False
    return True


def check_images(paths: list[str], workers: int | None = None) -> np.ndarray:
    """Open every picture once: paths -> (N,) bool, whether it can be read.

    Up to FULL_CHECK files are decoded. Beyond, a JPEG needs a header and an end marker, which finds
    truncated files at a fraction of the time, and only what looks odd is decoded. Decoders take up
    to 16 bytes a pixel: the memory stays below 64 MB a thread, and 0.8 GB for one large picture.
    """
    full = len(paths) <= FULL_CHECK
    with ThreadPool(workers or os.cpu_count()) as pool:
        good = pool.imap(lambda path: _readable(path, full), paths, chunksize=64)
        good = tqdm(good, "checking pictures", len(paths), disable=len(paths) < 2000)
        return np.fromiter(good, bool, len(paths))


def cut_square(picture: Image.Image, middle: np.ndarray, side: float, size: int) -> np.ndarray:
    """The square of `side` px around `middle` as (size, size, 3): one antialiased resize.

    The map is `crop`'s. The patch is wider by the filter's reach: its rim mixes with the true
    neighbours, or with black where the square leaves the picture, and only there.
    """
    end = np.array(picture.size)
    low = middle + 0.5 - side / 2                                  # edges: pixel i is [i, i + 1]
    reach = int(np.ceil(max(side / size, 1))) + 1
    first = np.floor(low).astype(int) - reach
    first = np.where(low >= 0, np.maximum(first, 0), first)
    last = np.ceil(low + side).astype(int) + reach
    last = np.where(low + side <= end, np.minimum(last, end), last)
    patch = picture.crop((*first.tolist(), *last.tolist()))
    left, top = (low - first).tolist()
    return np.array(patch.resize((size, size), Image.Resampling.BILINEAR,
                                 box=(left, top, left + side, top + side)))


@functools.cache
def _hand_detector() -> Any:
    """MediaPipe's hand detector, made once; UserError where the package is missing."""
    try:
        from mediapipe.python.solutions.hands import Hands as Detector
    except ImportError:
        raise UserError("finding hands in photos needs MediaPipe (pip install --no-deps "
                        "mediapipe==0.10.21, and what README names beside it); without it write "
                        "labels.jsonl beside the photos, with path, side and box of each hand, or "
                        "labels/CAMERA/FRAME.json beside a rig's frames") from None
    return Detector(static_image_mode=True, max_num_hands=8)


def detect_hands(picture: np.ndarray) -> list[dict]:
    """Hands in a photo (H, W, 3) uint8: side, uv (21, 2) px, confidence in [0, 1], of each.

    UserError where MediaPipe is not installed.
    """
    found = _hand_detector().process(np.ascontiguousarray(picture))
    size = np.array(picture.shape[1::-1])
    hands = []
    for points, kind in zip(found.multi_hand_landmarks or (), found.multi_handedness or ()):
        sure = kind.classification[0]
        side = "left" if sure.label == "Right" else "right"      # named for a mirrored selfie
        hands.append({"side": side, "confidence": float(sure.score),
                      "uv": np.array([(p.x, p.y) for p in points.landmark]) * size - 0.5})
    return hands


def _distort(xy: np.ndarray, dist: np.ndarray) -> np.ndarray:
    """Lens distortion in OpenCV's order k1 k2 p1 p2 k3 k4 k5 k6, of points (..., 2) at depth 1."""
    k1, k2, p1, p2, k3, k4, k5, k6 = np.pad(dist, (0, 8 - len(dist)))
    x, y = xy[..., 0], xy[..., 1]
    r = x * x + y * y
    radial = (1 + r * (k1 + r * (k2 + r * k3))) / (1 + r * (k4 + r * (k5 + r * k6)))
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x),
                     y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y], -1)


def undistort(uv: np.ndarray, K: np.ndarray, dist: np.ndarray) -> np.ndarray:
    """Points (..., 2) px as seen -> where a pinhole camera with the same K sees them, else NaN."""
    f = K[[0, 1], [0, 1]]
    c = K[:2, 2]
    seen = (uv - c) / f
    xy = seen
    with np.errstate(over="ignore", invalid="ignore"):             # far outside it runs away
        for _ in range(50):                                        # fixed point: x = seen - bend(x)
            xy = seen - (_distort(xy, dist) - xy)
        found = xy * f + c
    return np.where(np.abs(found) <= 1e6, found, np.nan)


def undistort_picture(picture: np.ndarray, K: np.ndarray, dist: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as a pinhole camera with the same K takes it; black where it saw more."""
    f = K[[0, 1], [0, 1]]
    c = K[:2, 2]
    H, W = picture.shape[:2]
    grid = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1)
    at = (2 * (_distort((grid - c) / f, dist) * f + c) + 1) / (W, H) - 1
    source = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    at = torch.tensor(at)[None].float().nan_to_num(3.0).clamp(-3, 3)       # huge ones crash a CPU
    out = F.grid_sample(source, at, align_corners=False)
    return (out[0].permute(1, 2, 0) + 0.5).clamp(0, 255).byte().numpy()
