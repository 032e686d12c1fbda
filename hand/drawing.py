"""Skeletons, shaded meshes, sheets of pictures and curves.

Pictures go in as PIL images, (H, W, 3) uint8 arrays or (3, H, W) tensors and come out as RGB PIL
images. Bones are drawn four times too large and averaged down, so they are smooth at any size.
Colours are Okabe and Ito's, which colour-blind readers tell apart: thumb to pinky, then curves.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

# common before torch: it settles how threads wait
from common import FINGERS, N_JOINTS, whole_file
from hand.render import render, studio

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINGER_COLOURS = ("#d55e00", "#f0e442", "#009e73", "#56b4e9", "#cc79a7")
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "#222222"                          # of text
EDGE = "#1a1a1a"                         # around bones and behind labels
FINE = 4                                 # samples a pixel and axis


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


def _numbers_of(points: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    """Points as an array of float64, from a tensor of any device or from plain numbers."""
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
        bones = [(a, b) for a, b in pairwise(chain) if ok[a] and ok[b]]
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


def seen_from(joints: Tensor | np.ndarray, turn: float) -> np.ndarray:
    """Joints (21, 3) m, camera frame -> right, down, away (21, 3) of a viewer `turn` degrees to the
    camera's right, wrist at 0."""
    points = _numbers_of(joints)
    c = math.cos(math.radians(turn))
    s = math.sin(math.radians(turn))
    return (points - points[0]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T


def draw_side(joints: Tensor | np.ndarray, size: int = 256, true: Tensor | np.ndarray | None = None,
              turn: float = 90.0, reach: float | None = None) -> Image.Image:
    """The 3D skeleton (21, 3) m, camera frame, on white, seen from the camera's side.

    The viewer walks `turn` degrees to the right around the hand's middle; parallel projection.
    `true` (21, 3) is drawn under it in grey, wrist on wrist. `reach`: m from middle to edge (fits).
    """
    sets = [seen_from(points, turn) for points in ((joints,) if true is None else (true, joints))]
    low, high = (edge(np.concatenate(sets)[:, :2], 0) for edge in (np.nanmin, np.nanmax))
    middle = np.append((low + high) / 2, 0)
    sets = [points - middle for points in sets]
    reach = reach or 1.12 * float(max(high - low)) / 2
    big = Image.new("RGB", (FINE * size, FINE * size), "white")
    draw = ImageDraw.Draw(big)
    px_a_metre = FINE * size / 2 / max(reach, 1e-6)
    bar = max(m for m in (0.01, 0.02, 0.05, 0.1, 1.0) if m <= max(reach * 0.8, 0.01))
    base = FINE * size * 0.955
    left = FINE * size * 0.04
    draw.line((left, base, left + bar * px_a_metre, base), "#888888", FINE * max(1, size // 150))
    font = FINE * max(10, size / 20)
    _text(draw, (left, base - FINE * 4), f"{bar * 100:g} cm", font, "lb", "#666666")
    for points, colour in zip(sets, ("#b5b5b5", None) if true is not None else (None,)):
        xy = points[:, :2] * px_a_metre + FINE * size / 2
        ok = np.isfinite(points).all(1)
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
    larger = after.width / before.width
    side = max(after.size)
    K = K.detach().float().cpu() * torch.tensor([larger, larger, 1.0])[:, None]
    K[:2, 2] += (larger - 1) / 2                         # x goes to (x + 0.5) larger - 0.5
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
    font = ImageFont.load_default(size)
    pad = round(size / 3)
    _, _, right, bottom = ImageDraw.Draw(out).textbbox((0, 0), text, font)
    box = (0, out.height - round(bottom) - 2 * pad, round(right) + 2 * pad, out.height)
    dark = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), EDGE)
    out.paste(Image.blend(out.crop(box), dark, 0.7), box[:2])
    ImageDraw.Draw(out).text((pad, box[1] + pad), text, "white", font)
    return out


def words(text: str, size: int) -> Image.Image:
    """A white square of `size` px with a few words in its middle, where nothing can be drawn."""
    out = Image.new("RGB", (size, size), "white")
    _text(ImageDraw.Draw(out), (size / 2, size / 2), text, max(11, size / 11), fill="#777777")
    return out


def save_picture(path: str | Path, image: Image.Image) -> None:
    """Write a picture into a folder that is made if need be: as it is, or as JPEG by its suffix."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        if Path(path).suffix == ".jpg":
            image.save(file, "JPEG", quality=80, optimize=True)
        else:
            image.save(file, "PNG", optimize=True)


def sheet(path: str | Path, rows: list[list], titles: Sequence[str] = (),
          labels: Sequence[str] = (), width: int = 900, note: str = "",
          bones: bool = False) -> Image.Image:
    """Write a grid of pictures `width` px wide, titles over columns, labels beside rows.

    Every picture is scaled to its column; a cell may be None. Below stand the fingers' colours, if
    the sheet shows `bones`, and a `note` on what is seen. Returns what was written.
    """
    gap = 6
    font = 15
    left = font + 2 * gap if labels else gap
    top = font + 2 * gap if titles else gap
    columns = max(len(row) for row in rows)
    cell = (width - left - gap * columns) // columns
    rows = [[None if image is None else picture(image, cell) for image in row] for row in rows]
    heights = [max((image.height for image in row if image), default=0) for row in rows]
    below = legend(width - 2 * gap, note, bones)
    high = top + sum(heights) + gap * len(rows)
    out = Image.new("RGB", (width, high + below.height), "white")
    out.paste(below, (gap, high))
    draw = ImageDraw.Draw(out)
    y = top
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
            long = draw.textlength(labels[i], ImageFont.load_default(font))
            fit = font * min(1, height / max(long, 1))
            _text(ImageDraw.Draw(strip), (height / 2, strip.height / 2), labels[i], fit)
            out.paste(strip.rotate(90, expand=True), (gap // 2, y))
        y += height + gap
    save_picture(path, out)
    return out


def legend(width: int, note: str, bones: bool) -> Image.Image:
    """The fingers' names beside their colours, if `bones`, and a note, wrapped to `width` px."""
    size, line = 14, 20
    font = ImageFont.load_default(size)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts: list[str] = []
    for word in note.split():
        longer = f"{texts[-1]} {word}" if texts else word
        if texts and ruler.textlength(longer, font) <= width:
            texts[-1] = longer
        else:
            texts.append(word)
    out = Image.new("RGB", (width, line * (bones + len(texts))), "white")
    draw = ImageDraw.Draw(out)
    if bones:
        step = min(100.0, width / len(FINGERS))
        for k, (finger, colour) in enumerate(zip(FINGERS, FINGER_COLOURS)):
            draw.ellipse((k * step, line / 2 - 5, k * step + 10, line / 2 + 5), colour, EDGE)
            _text(draw, (k * step + 14, line / 2), finger, size, "lm")
    for k, text in enumerate(texts, bones):
        _text(draw, (0, line * (k + 0.5)), text, size, "lm")
    return out


@contextlib.contextmanager
def figure(path: str | Path, width: float = 6.5, height: float = 3.8) -> Iterator[Axes]:
    """An axis of a Matplotlib figure, inches wide and high, which is written when the block ends.

    No screen is needed, and nothing of a figure stays in memory afterwards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg      # a second, only for plots
    from matplotlib.figure import Figure

    whole = Figure(figsize=(width, height), dpi=140)
    FigureCanvasAgg(whole)
    axis = whole.add_subplot()
    axis.set_prop_cycle(color=CURVE_COLOURS)
    axis.grid(alpha=0.3)
    yield axis
    whole.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        whole.savefig(file, format="png")


def curve(path: str | Path, series: dict[str, tuple], title: str = "", xlabel: str = "",
          ylabel: str = "") -> None:
    """Write lines {name: (xs, ys)} with axes and a legend; a line breaks at NaN."""
    with figure(path) as axis:
        for name, (xs, ys) in series.items():
            marker = "o" if len(xs) <= 20 else ""
            axis.plot(_numbers_of(xs), _numbers_of(ys), marker=marker, markersize=4, label=name)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if series:
            axis.legend(fontsize=8)
