"""Skeletons, shaded meshes, sheets of pictures and curves."""
from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

# common before torch: it settles how threads wait
from common import FINGERS, N_JOINTS
from hand.render import render, studio

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor


# ---- Drawing --------------------------------------------------------------------------------------
# Pictures go in as PIL images, (H, W, 3) uint8 arrays or (3, H, W) tensors and come out as RGB PIL
# images. Lines are drawn four times too large and averaged down, so they are smooth at any size.
# Colours are Okabe and Ito's, told apart by colour-blind readers: thumb to pinky, then curves.
FINGER_COLOURS = ("#d55e00", "#f0e442", "#009e73", "#56b4e9", "#cc79a7")
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK, EDGE, GRID = "#222222", "#1a1a1a", "#dddddd"
FINE = 4                                                              # samples a pixel and axis


def picture(image: Image.Image | np.ndarray | Tensor, width: int | None = None) -> Image.Image:
    """RGB PIL image of a picture, 0..255 or float in 0..1, resized to `width` px if it is given."""
    if not isinstance(image, Image.Image):
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        array = array if array.shape[-1] == 3 else array.transpose(1, 2, 0)
        array = (array.clip(0, 1) * 255).round() if array.dtype.kind == "f" else array
        image = Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))
    if width is None or width == image.width:
        return image.convert("RGB")
    height = max(1, round(image.height * width / image.width))
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _numbers_of(points: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, dtype=float)


def _text(draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: float,
          anchor: str = "mm", fill: str = INK) -> None:
    """Text in Pillow's own font, `size` px high, at an anchor such as "lt" or "mm"."""
    draw.text(xy, text, fill, ImageFont.load_default(size), anchor, align="center")


def _fine_skeleton(draw: ImageDraw.ImageDraw, xy: np.ndarray, ok: np.ndarray, visible: np.ndarray,
                   width: float, colour: str | None, fingers: list[int]) -> None:
    """Fingers in the given order, each bone over a dark edge; joints not visible are hollow."""
    def dot(joint: int, radius: float, fill: str) -> None:
        x, y = xy[joint]
        draw.ellipse([round(v) for v in (x - radius, y - radius, x + radius, y + radius)], fill)

    for finger in fingers:
        chain = [0, *range(4 * finger + 1, 4 * finger + 5)]
        paint = colour or FINGER_COLOURS[finger]
        bones = [(a, b) for a, b in zip(chain, chain[1:]) if ok[a] and ok[b]]
        for edge, fill in ((0.5, EDGE), (0.0, paint)):
            for a, b in bones:
                thin = 1.0 if visible[b] else 0.5
                draw.line([*xy[a], *xy[b]], fill, round((thin + edge) * width))
            for joint in chain[1:]:
                if ok[joint]:
                    dot(joint, (0.85 + edge / 2) * width, fill)
        for joint in chain[1:]:
            if ok[joint] and not visible[joint]:
                dot(joint, 0.5 * width, "white")
    if ok[0]:
        dot(0, 1.2 * width, EDGE)
        dot(0, 0.95 * width, colour or "white")


def draw_skeleton(image: Image.Image | np.ndarray | Tensor, uv: Tensor | np.ndarray,
                  ok: Tensor | np.ndarray | None = None, visible: Tensor | np.ndarray | None = None,
                  width: int | None = None, colour: str | None = None) -> Image.Image:
    """The hand's bones over a picture: uv (21, 2) px of `image`, a colour a finger or one for all.

    Joints with `ok` (21,) False or NaN are left out, with `visible` (21,) False hollow. `width`: of
    the result, if the picture is to be enlarged first.
    """
    before = picture(image)
    after = picture(before, width)
    xy = (_numbers_of(uv) + 0.5) * (FINE * after.width / before.width) - 0.5
    xy = xy.clip(-FINE * after.width, 2 * FINE * after.width)     # Pillow cannot draw to infinity
    good = np.isfinite(xy).all(1) & (True if ok is None else _numbers_of(ok) > 0)
    seen = np.ones(N_JOINTS, bool) if visible is None else _numbers_of(visible) > 0
    big = after.resize((FINE * after.width, FINE * after.height), Image.Resampling.NEAREST)
    line = FINE * max(1.5, min(after.size) / 75)
    _fine_skeleton(ImageDraw.Draw(big), xy, good, seen, line, colour, [4, 3, 2, 1, 0])
    return big.reduce(FINE)


def draw_side(joints: Tensor | np.ndarray, size: int = 256, true: Tensor | np.ndarray | None = None,
              turn: float = 90.0, reach: float | None = None) -> Image.Image:
    """The 3D skeleton (21, 3) m, camera frame, on white, seen from the camera's side.

    The viewer walks `turn` degrees to the right around the hand's middle; parallel projection.
    `true` (21, 3) is drawn under it in grey, wrist on wrist. `reach`: m from middle to edge (fits).
    """
    sets = [_numbers_of(joints)] if true is None else [_numbers_of(true), _numbers_of(joints)]
    sets = [points - points[0] for points in sets]
    middle = (np.nanmin(sets[0], 0) + np.nanmax(sets[0], 0)) / 2
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    look = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])             # rows: right, down, away
    sets = [(points - middle) @ look.T for points in sets]
    reach = reach or 1.12 * max(np.nanmax(np.abs(points[:, :2])) for points in sets)
    big = Image.new("RGB", (FINE * size, FINE * size), "white")
    draw, scale = ImageDraw.Draw(big), FINE * size / 2 / max(reach, 1e-6)
    bar = max(m for m in (0.01, 0.02, 0.05, 0.1, 1.0) if m <= max(reach * 0.8, 0.01))
    low, left = FINE * size * 0.955, FINE * size * 0.04
    draw.line((left, low, left + bar * scale, low), "#888888", FINE * max(1, size // 150))
    font = FINE * max(10, size / 20)
    _text(draw, (left, low - FINE * 4), f"{bar * 100:g} cm", font, "lb", "#666666")
    for points, colour in zip(sets, ("#b5b5b5", None) if true is not None else (None,)):
        xy, ok = points[:, :2] * scale + FINE * size / 2, np.isfinite(points).all(1)
        far_first = np.argsort(-points[1:, 2].reshape(len(FINGERS), 4).mean(1)).tolist()
        _fine_skeleton(draw, xy, ok, np.ones(N_JOINTS, bool), FINE * max(1.5, size / 75), colour,
                       far_first)
    return big.reduce(FINE)


def draw_mesh(image: Image.Image | np.ndarray | Tensor, verts: Tensor, faces: Tensor, K: Tensor,
              alpha: float = 0.9, width: int | None = None,
              colour: tuple[float, float, float] = (0.62, 0.76, 0.92)) -> Image.Image:
    """A shaded mesh over a picture: verts (M, 3) m camera, faces (F, 3), K (3, 3) px of `image`.

    `alpha` is how much of the picture the mesh hides; `colour` RGB in 0..1.
    """
    before = picture(image)
    after = picture(before, width)
    s, side = after.width / before.width, max(after.size)
    K = K.detach().float().cpu() * torch.tensor([s, s, 1.0])[:, None]
    K[:2, 2] += (s - 1) / 2                                        # x to (x + 0.5) s - 0.5
    square = Image.new("RGB", (side, side))
    square.paste(after)
    behind = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 255
    verts = verts.detach().float().cpu()[None]
    albedo = torch.tensor(colour).expand_as(verts)
    front, _ = render(verts, faces.cpu(), K[None], side, albedo, studio(1), behind)
    return picture(torch.lerp(behind, front, alpha)[0]).crop((0, 0, *after.size))


def label(image: Image.Image | np.ndarray | Tensor, text: str,
          size: float | None = None) -> Image.Image:
    """A short text in the lower left corner, white on dark, readable over any picture."""
    out = picture(image)
    size = size or max(11, out.width / 18)
    font, pad = ImageFont.load_default(size), round(size / 3)
    x0, y0, x1, y1 = ImageDraw.Draw(out).textbbox((0, 0), text, font)
    box = (0, out.height - round(y1) - 2 * pad, round(x1) + 2 * pad, out.height)
    shade = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), EDGE)
    out.paste(Image.blend(out.crop(box), shade, 0.7), box[:2])
    ImageDraw.Draw(out).text((pad, box[1] + pad), text, "white", font)
    return out


def save_png(path: str | Path, image: Image.Image, limit: int = 300_000) -> None:
    """Write a PNG; above `limit` bytes with 256 colours, dithered and then plain, then with 64.

    The colours of the drawings are always among them, however little of the picture they cover.
    """
    plain, dithered = Image.Dither.NONE, Image.Dither.FLOYDSTEINBERG
    kept = [x for name in (*FINGER_COLOURS, EDGE, "white") for x in ImageColor.getrgb(name)]
    for colours, dither in ((0, plain), (256, dithered), (256, plain), (64, plain)):
        data, flat = io.BytesIO(), image
        if colours:
            few = image.quantize(colours - len(kept) // 3, Image.Quantize.MEDIANCUT)
            few.putpalette(few.getpalette()[:3 * colours - len(kept)] + kept)
            flat = image.quantize(palette=few, dither=dither)
        flat.save(data, "PNG", optimize=True)
        if data.tell() <= limit:
            break
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.getvalue())


def sheet(path: str | Path, rows: list[list], titles: Sequence[str] = (),
          labels: Sequence[str] = (), width: int = 900) -> Image.Image:
    """Write a grid of pictures as a PNG `width` px wide, titles over columns, labels beside rows.

    Every picture is scaled to its column; a cell may be None. Returns what was written.
    """
    gap, font = 6, 15
    left, top = (font + 2 * gap if labels else gap), (font + 2 * gap if titles else gap)
    columns = max(len(row) for row in rows)
    cell = (width - left - gap * columns) // columns
    rows = [[None if image is None else picture(image, cell) for image in row] for row in rows]
    heights = [max((image.height for image in row if image), default=0) for row in rows]
    out = Image.new("RGB", (width, top + sum(heights) + gap * len(rows)), "white")
    draw, y = ImageDraw.Draw(out), top
    for i, title in enumerate(titles):
        long = draw.textlength(title, ImageFont.load_default(font))
        fit = font * min(1, 0.95 * cell / max(long, 1))
        _text(draw, (left + i * (cell + gap) + cell / 2, top / 2), title, fit)
    for i, (row, height) in enumerate(zip(rows, heights)):
        for j, image in enumerate(row):
            if image:
                out.paste(image, (left + j * (cell + gap), y))
        if i < len(labels):
            strip = Image.new("RGB", (height, left - gap), "white")
            _text(ImageDraw.Draw(strip), (height / 2, strip.height / 2), labels[i], font)
            out.paste(strip.rotate(90, expand=True), (gap // 2, y))
        y += height + gap
    save_png(path, out)
    return out


def _ticks(low: float, high: float, n: int = 5) -> np.ndarray:
    """Round numbers, about n of them, from the last below `low` to the first above `high`."""
    high = high if high > low else low + max(abs(low), 1.0)
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), default=10)
    return np.arange(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1) * step


def curve(path: str | Path, series: dict[str, tuple], title: str = "", xlabel: str = "",
          ylabel: str = "", size: tuple[int, int] = (720, 400)) -> Image.Image:
    """Write lines {name: (xs, ys)} as a PNG with axes and a legend; a line breaks at NaN."""
    lines = {name: (_numbers_of(x), _numbers_of(y)) for name, (x, y) in series.items()}
    points = np.concatenate([np.stack(line, 1) for line in lines.values()] or [np.zeros((0, 2))])
    points = points[np.isfinite(points).all(1)]
    points = points if len(points) else np.array([[0.0, 0.0], [1.0, 1.0]])
    xs, ys = (_ticks(*span) for span in zip(points.min(0), points.max(0)))
    (width, height), k, font = size, FINE, FINE * 13
    big = Image.new("RGB", (width * k, height * k), "white")
    draw = ImageDraw.Draw(big)
    gutter = max(draw.textlength(f"{y:g}", ImageFont.load_default(font)) for y in ys)
    length = max((draw.textlength(name, ImageFont.load_default(font)) for name in lines), default=0)
    left, right = gutter + 18 * k, width * k - length - 52 * k
    top, bottom = 58 * k, (height - 46) * k
    px = lambda x: left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left)
    py = lambda y: bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)
    for x in xs:
        draw.line((px(x), top, px(x), bottom), GRID, k)
        _text(draw, (px(x), bottom + 6 * k), f"{x:g}", font, "mt")
    for y in ys:
        draw.line((left, py(y), right, py(y)), GRID, k)
        _text(draw, (left - 7 * k, py(y)), f"{y:g}", font, "rm")
    draw.line((left, top, left, bottom, right, bottom), INK, round(1.5 * k))
    _text(draw, ((left + right) / 2, 15 * k), title, FINE * 15)
    _text(draw, ((left + right) / 2, (height - 6) * k), xlabel, font, "mb")
    _text(draw, (10 * k, top - 8 * k), ylabel, font, "lb")
    for i, (name, (x, y)) in enumerate(lines.items()):
        paint, row = CURVE_COLOURS[i % len(CURVE_COLOURS)], top + (10 + 20 * i) * k
        draw.line((right + 16 * k, row, right + 34 * k, row), paint, 3 * k)
        _text(draw, (right + 40 * k, row), name, font, "lm")
        good = np.isfinite(x) & np.isfinite(y)
        for run in np.split(np.arange(len(x)), np.flatnonzero(~good)):
            dots = [(px(x[j]), py(y[j])) for j in run if good[j]]
            if len(dots) > 1:
                draw.line(dots, paint, round(2.2 * k), joint="curve")
            for u, v in dots if len(x) <= 20 else ():
                draw.ellipse((u - 3.5 * k, v - 3.5 * k, u + 3.5 * k, v + 3.5 * k), paint)
    out = big.reduce(k)
    save_png(path, out)
    return out
