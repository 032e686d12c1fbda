"""Drawings: where the ink lands, what is left alone, and that odd input still gives a picture."""
import numpy as np
import pytest
import torch
from PIL import Image

from hand.drawing import (
    CURVE_COLOURS, FINGER_COLOURS, curve, draw_mesh, draw_side, draw_skeleton, figure, label, picture,
    save_picture, sheet)

GREY = np.full((120, 120, 3), 128, np.uint8)


def rgb(colour):
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def changed(before, after):
    """(H, W) bool: pixels that differ."""
    return (np.asarray(picture(before)) != np.asarray(after)).any(-1)


def near(image, colour, tolerance=12):
    """(H, W) bool: pixels of about that colour."""
    return (np.abs(np.asarray(image).astype(int) - rgb(colour)).max(-1) <= tolerance)


def fan():
    """A hand (21, 2) px: wrist at the bottom, five straight fingers 20 px apart."""
    uv = np.zeros((21, 2))
    uv[0] = 60, 110
    for f in range(5):
        uv[4 * f + 1:4 * f + 5] = [(20 + 20 * f, y) for y in (70, 50, 35, 20)]
    return uv


def test_picture_takes_every_layout_and_scales():
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for image in (array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array),
                  torch.from_numpy(array).permute(2, 0, 1) / 255):
        assert np.array_equal(np.asarray(picture(image)), array)
    assert picture(array, 12).size == (12, 8)


def test_every_bone_has_its_fingers_colour():
    out = np.asarray(draw_skeleton(GREY, fan()))
    for f, colour in enumerate(FINGER_COLOURS):
        for y in (60, 42, 28):                                         # in the middle of the bones
            assert np.abs(out[y, 20 + 20 * f].astype(int) - rgb(colour)).max() <= 2


def test_joints_lie_on_their_pixel_also_when_the_picture_is_enlarged():
    ok = np.arange(21) == 0
    for width, want in ((120, (60.0, 110.0)), (360, (181.0, 331.0))):     # (60.5) 3 - 0.5
        out = draw_skeleton(GREY, fan(), ok, width=width)
        rows, columns = np.nonzero(changed(picture(GREY, width), out))
        assert (columns.mean(), rows.mean()) == pytest.approx(want, abs=0.2)


def test_joints_that_are_not_ok_or_not_finite_leave_the_picture_alone():
    half = fan()
    half[9:] = np.nan                                                      # thumb and index remain
    out = draw_skeleton(GREY, half, ok=torch.arange(21) < 5)               # thumb remains
    assert near(out, FINGER_COLOURS[0]).any()
    assert not any(near(out, colour).any() for colour in FINGER_COLOURS[1:])
    assert not changed(GREY, draw_skeleton(GREY, fan() * np.nan)).any()
    draw_skeleton(GREY, 1e30 * (fan() - 60))


def test_hidden_joints_are_hollow_and_the_input_is_not_drawn_on():
    visible = np.arange(21) != 8
    image = Image.fromarray(GREY)
    hollow, full = draw_skeleton(image, fan(), visible=visible), draw_skeleton(image, fan())
    assert hollow.getpixel((40, 20))[2] > 200 > full.getpixel((40, 20))[2]
    assert hollow.getpixel((60, 20)) == full.getpixel((60, 20))
    assert np.array_equal(np.asarray(image), GREY)


def test_one_colour_for_the_whole_hand():
    out = draw_skeleton(GREY, fan(), colour="#ff0000")
    assert near(out, "#ff0000").sum() > 300
    assert not near(out, FINGER_COLOURS[2]).any()


def test_side_view_puts_far_joints_to_the_right_and_keeps_down_down():
    joints = np.zeros((21, 3))
    joints[:, 2] = 0.5
    joints[8] = 0.0, 0.0, 0.62                                             # index tip, far
    joints[20] = 0.0, 0.08, 0.5                                            # pinky tip, down
    out = draw_side(joints, 200)
    index, pinky = (np.argwhere(near(out, FINGER_COLOURS[f])) for f in (1, 4))
    assert index[:, 1].max() > 180 and index[:, 1].min() < 30         # 12 cm deep, fills the width
    assert pinky[:, 0].max() > 150 and pinky[:, 0].min() < 60
    assert np.ptp(pinky[:, 1]) < 10 and index[:, 0].mean() < pinky[:, 0].mean()
    other = np.argwhere(near(draw_side(joints, 200, turn=-90), FINGER_COLOURS[4]))
    assert other[:, 1].min() > 170                               # now the wrist is on the right
    assert near(draw_side(joints, 200, true=joints * 1.1), "#b5b5b5").any()


def test_near_fingers_are_drawn_over_far_ones():
    joints = np.zeros((21, 3))
    joints[5:9] = [(x, 0.03, 0.0) for x in (-0.05, -0.02, 0.02, 0.05)]
    joints[9:13] = [(0.001, y, 0.0) for y in (0.0, 0.01, 0.05, 0.06)]
    seen = []
    for depth in (-0.1, 0.1):
        joints[5:9, 2] = depth
        seen.append(draw_side(joints, 200, turn=0.0).getpixel((100, 100)))      # where they cross
    assert seen[0][0] > 200 and seen[1][0] < 60                            # yellow, then green


def square_mesh(z=0.5, half=0.05):
    verts = torch.tensor([[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]])
    return verts, torch.tensor([[0, 2, 1], [0, 3, 2]])


def test_mesh_covers_the_pixels_it_projects_to_also_enlarged_and_on_wide_pictures():
    verts, faces = square_mesh()
    K = torch.tensor([[200.0, 0, 79.5], [0, 200.0, 39.5], [0, 0, 1]])    # 40 px wide, in the middle
    wide = np.zeros((80, 160, 3), np.uint8)
    for width, s in ((160, 1), (320, 2)):
        out = draw_mesh(wide, verts, faces, K, width=width)
        mask = changed(picture(wide, width), out)
        rows, columns = np.nonzero(mask)
        assert out.size == (160 * s, 80 * s)
        assert (rows.min(), rows.max() + 1) == (20 * s, 60 * s)
        assert (columns.min(), columns.max() + 1) == (60 * s, 100 * s)


def test_alpha_fades_the_mesh():
    verts, faces = square_mesh()
    K = torch.tensor([[200.0, 0, 59.5], [0, 200.0, 59.5], [0, 0, 1]])
    colour = [np.asarray(draw_mesh(GREY, verts, faces, K, alpha=a))[60, 60].astype(int)
              for a in (0.0, 0.5, 1.0)]
    assert colour[0].tolist() == [128] * 3
    assert np.abs(colour[1] - (colour[0] + colour[2]) / 2).max() <= 1
    assert colour[2][2] > colour[2][0] + 20                                # bluish


def test_label_is_light_on_dark_in_the_lower_left_corner_only():
    white = np.full((120, 200, 3), 255, np.uint8)
    out = label(white, "yes 3.2 mm")
    mask = changed(white, out)
    assert mask[-5, 3] and not mask[:90].any() and not mask[:, 150:].any()
    box = np.asarray(out)[-20:, :60].mean(-1)
    assert box.min() < 110 and box.max() > 250


def test_sheet_is_a_grid_of_the_wanted_width(tmp_path):
    red = np.full((50, 50, 3), (200, 0, 0), np.uint8)
    wide = np.zeros((25, 50, 3))
    sheet(tmp_path / "new/one/sheet.png", [[red, None], [red, wide]],
          ["one", "a title too long for so narrow a column"], ["first", "second"], width=400)
    out = Image.open(tmp_path / "new/one/sheet.png").convert("RGB")
    assert out.width == 400
    assert out.getpixel((100, 100)) == (200, 0, 0)
    assert out.getpixel((310, 100)) == (255, 255, 255)
    assert (np.asarray(out)[:27, 195:212] == 255).all()                # titles keep to their column
    assert out.getpixel((310, 27 + 2 * 180 + 6 - 10)) == (255, 255, 255)   # below the wide picture
    assert sheet(tmp_path / "plain.png", [[red]]).width == 900


def test_a_sheet_says_below_what_its_colours_are_and_what_is_seen(tmp_path):
    grey = np.full((50, 50, 3), 200, np.uint8)
    bare = sheet(tmp_path / "a.png", [[grey]], width=400)
    noted = np.asarray(sheet(tmp_path / "b.png", [[grey]], width=400, note="some words " * 12, bones=True))
    below = noted[bare.height:]
    assert below.shape[0] == 20 * (1 + 3) and (noted[:bare.height] == np.asarray(bare)).all()      # fingers, three lines
    assert all(near(below[:20], colour).any() for colour in FINGER_COLOURS)
    assert [(below[20 * k:20 * k + 20] < 100).any() for k in (1, 2, 3)] == [True] * 3
    assert (below[:, 394:] == 255).all()                                                      # and they keep inside


def test_a_picture_is_written_in_all_its_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (330, 330, 3), dtype=np.uint8)
    save_picture(tmp_path / "new" / "a.png", Image.fromarray(noise))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), noise)
    save_picture(tmp_path / "a.jpg", Image.fromarray(noise))
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


def test_curve_is_where_its_axes_say_and_breaks_at_nan(tmp_path):
    x = list(range(101))
    y = [5.0 if i != 30 else float("nan") for i in x]
    curve(tmp_path / "c.png", {"level": (x, y), "ramp": (x, torch.arange(101) / 10)}, "t", "x", "y")
    out = Image.open(tmp_path / "c.png").convert("RGB")
    assert out.size == (910, 532)
    inside = np.asarray(out)[80:440, 100:860]                            # inside the axes
    rows, columns = np.nonzero(near(inside, CURVE_COLOURS[0], 40))
    middle = np.median(rows)
    assert np.abs(rows - middle).max() < 4 and columns.size              # level
    gap = set(range(columns.min(), 350)) - set(columns.tolist())         # before the ramp crosses it
    assert 6 <= len(gap) <= 20                                           # two of 100 steps
    rows, columns = np.nonzero(near(inside[:, 300:], CURVE_COLOURS[1], 40))      # right of the legend
    assert np.corrcoef(rows, columns)[0, 1] < -0.99                      # up is up


def test_a_figure_is_written_once_its_block_ends_and_not_when_it_fails(tmp_path):
    with figure(tmp_path / "one" / "f.png", 3, 2) as axis:
        axis.plot([0, 1], [0, 1])
        assert not (tmp_path / "one").exists()
    assert Image.open(tmp_path / "one" / "f.png").size == (420, 280)
    with pytest.raises(ValueError), figure(tmp_path / "g.png"):
        raise ValueError
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("series", [
    {}, {"one": ([3], [4.0])}, {"flat": ([0, 1], [2.0, 2.0])}, {"nan": ([0, 1], [np.nan] * 2)},
    {"no points": ([], [])}, {f"series {i}": ([0, 1], [i, 1e6 * i]) for i in range(9)}])
def test_curve_of_odd_series_is_still_a_picture(tmp_path, series):
    curve(tmp_path / "c.png", series)
    assert Image.open(tmp_path / "c.png").size == (910, 532)
