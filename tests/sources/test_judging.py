"""The judge below eval.py: what predictors say beside the truth, tallies, tables, what begins and ends a stage."""
import math

import numpy as np
import pytest
import torch

import common
import peclr
from common import Mano
from hand.builtin import builtin_hand
from sources import Source
from sources.judging import Exam, Row, assess, errors_by_joint, shares_within
from sources.predictors import Net, facts, root_of
from sources.sheets import best_median_worst
from sources.stages import mean_hand
from sources.tables import differences, digits, for_screen, gain, markdown, px_compare, seed_groups, table
from sources.tally import Tally


def net_of(row):
    """A network that only has a name, and says what it stores."""
    return Net(row, "ti_net", None, None, row, {}, 64, 2.0)


# ---- Tallies ----


def test_a_tally_averages_points_over_samples_first_unless_they_are_pooled():
    x = torch.tensor([[1.0, 10], [3, math.nan], [5, math.nan]])
    t = Tally(3)
    t.add(torch.tensor([0, 1]), {"macro": x[:2], "pooled": x[:2, :, None], "one": x[:2, 0]})
    t.add(torch.tensor([2]), {"macro": x[2:], "pooled": x[2:, :, None], "one": x[2:, 0]})
    assert t.means() == {"macro": (3 + 10) / 2, "pooled": 19 / 4, "one": 3}


def test_intervals_have_the_width_of_the_mean_s_standard_error():
    """1.96 sigma / sqrt(n) each side, also where 20,000 samples share 4,096 blocks; and no two calls differ."""
    for n in (400, 20_000):
        x = common.normal(torch.arange(n), 1, 3, "test")[:, 0].double()
        t = Tally(n)
        t.add(torch.arange(n), {"x": x})
        low, high = t.intervals()["x"]
        assert (high - low) / 2 == pytest.approx(1.96 * float(x.std()) / math.sqrt(n), rel=0.08)
        assert low < t.means()["x"] < high and t.intervals()["x"] == (low, high)


def test_differences_are_paired():
    """A row that is 1 mm worse on every sample: no doubt about the difference, however the samples vary."""
    x = 30 + 20 * common.uniform(torch.arange(200), 1, 0, "test")[:, 0]
    rows, exam = {}, Exam(range(200), "coco", None, None)
    for name, shift in (("a", 0.0), ("b", 1.0)):
        rows[name] = Row(exam, net_of(name), name)
        rows[name].tallies["ours"].add(torch.arange(200), {"mpjpe_mm": x + shift})
    assert "| b - a             | 1.00 [1.00, 1.00]* |" in differences(rows, "ours", "a", "coco")


def test_a_median_is_kept_in_a_histogram():
    t = Tally(101)
    t.add(torch.arange(101), {"x_median": torch.arange(101.0)[:, None]})
    assert t.means()["x_median"] == pytest.approx(50, abs=0.02)


def test_the_memory_of_a_tally_does_not_grow():
    """850,000 sets in parts are the mean of all, in as many numbers as 4,096 sets."""
    t, total = Tally(850_000), 0.0
    for rows in torch.arange(850_000).split(50_000):
        x = common.uniform(rows, 21, 0, "test")
        total += float(x.double().sum())
        t.add(rows, {"x": x})
    assert t.sums["x"].shape == (4096, 21, 3) and t.means()["x"] == pytest.approx(total / 850_000 / 21, abs=1e-9)


def test_a_spread_is_the_deviation_by_the_mean_of_each_point():
    x = torch.tensor([[1.0, 10], [2, 12], [math.nan, 14], [4, math.nan]])
    t = Tally(4)
    t.add(torch.tensor([0, 1]), {"x_spread_percent": x[:2]})
    t.add(torch.tensor([2, 3]), {"x_spread_percent": x[2:]})
    a, b = np.array([1.0, 2, 4]), np.array([10.0, 12, 14])
    expected = 50 * (a.std(ddof=1) / a.mean() + b.std(ddof=1) / b.mean())
    assert t.means()["x_spread_percent"] == pytest.approx(expected) and t.intervals() == {}


# ---- Tables ----


def test_differences_are_of_the_same_samples_only():
    def row_of(values, n=8, rooted=True):
        row = Row(Exam(range(n), "coco", None, None), net_of("x"))
        row.rooted = rooted
        row.tallies["ours"].add(torch.arange(len(values)), {"mpjpe_mm": torch.tensor(values), "abs_mpjpe_mm": torch.tensor(values)})
        return row
    flat = [10.0] * 8
    rows = {"a": row_of(flat), "b": row_of([11.0] * 8), "fewer": row_of([9.0] * 7 + [math.nan]), "larger": row_of(flat, 9),
            "blind": row_of(flat, rooted=False)}
    lines = {line.split("|")[1].strip(): line for line in differences(rows, "ours", "a", "coco").splitlines() if " - a" in line}
    assert "1.00 [1.00, 1.00]*" in lines["b - a"]
    assert lines["fewer - a"].count("other samples") == 2 and lines["larger - a"].count("other samples") == 2
    cells = [cell.strip() for cell in lines["blind - a"].split("|")]
    assert "-" in cells and "0.00 [0.00, 0.00]" in cells                     # no absolute difference


def test_numbers_have_the_digits_of_their_kind():
    assert [digits(m, 1.23456) for m in ("mpjpe_mm", "epe_2d_px", "bone_spread_percent")] == ["1.23"] * 3
    assert [digits(m, 0.51234) for m in ("auc", "pa_auc", "f_15", "pck_2d_20")] == ["0.512"] * 4
    lines = table({"a": {"auc": 0.5, "x": 2.0}, "b": {"x": 1.0}}, ("x", "auc", "y"), {"a": {"x": (1.5, 2.5)}}).splitlines()
    assert lines[0].split() == ["|", "row", "|", "x", "|", "auc", "|"]
    assert "2.00 [1.50, 2.50] | 0.500" in lines[2] and lines[3].split()[-2] == "-"


def test_gains_are_the_share_of_the_error_that_goes():
    means = {"mean_pose": {"mpjpe_mm": 80.0}, "scratch": {"mpjpe_mm": 40.0}, "a": {"mpjpe_mm": 10.0}, "b": {}}
    assert gain(means, "mean_pose") == "relative gain in mpjpe_mm over mean_pose: scratch 50%, a 88%"
    assert gain(means, "scratch") == "relative gain in mpjpe_mm over scratch: a 75%" and gain(means, "b") == ""
    flat = {"mean_pose": {"epe_2d_px": 4.0}, "a": {"epe_2d_px": 3.0}}
    assert gain(flat, "mean_pose") == "relative gain in epe_2d_px over mean_pose: a 25%"


def test_pixels_of_rendered_pictures_compare_where_networks_store_them_alike():
    def rows(*sizes):
        exam = Exam(range(3), "x", None, None)
        return {str(k): Row(exam, Net("", "", None, None, "", {}, *size), "") for k, size in enumerate(sizes)}

    assert px_compare(rows((64, 2.0), (64, 2.0)), "synthetic:calm") and px_compare(rows((64, 2.0), (96, 2.0)), "coco")
    assert not px_compare(rows((64, 2.0), (96, 2.0)), "synthetic")
    assert not px_compare(rows((64, 2.0), (64, 1.7)), "synthetic")


def test_one_seed_twice_is_no_spread():
    exam = Exam(range(3), "coco", None, None)
    rows = {f"r{k}": Row(exam, Net(str(k), "peclr", None, peclr.Config(seed=seed), "peclr", {}, 8, 1.0), "peclr")
            for k, seed in enumerate((3, 3))}
    assert seed_groups(rows) == {}
    rows["r2"] = Row(exam, Net("2", "peclr", None, peclr.Config(seed=4), "peclr", {}, 8, 1.0), "peclr")
    assert seed_groups(rows) == {"peclr, 3 seeds": ["r0", "r1", "r2"]}


# ---- One pass ----


class Hands(Source):
    """Three moments in memory, of V views or plain pictures."""

    name, box_source = "hands", "joints"

    def __init__(self, n=6, V=0):
        generator = torch.Generator().manual_seed(4)
        joints = Mano(builtin_hand()).joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10)).expand(n, -1, -1)
        self.n = n
        self.numbers = {
            "joints": joints + torch.randn(n, 1, 3, generator=generator), "joints_ok": torch.ones(n, 21, dtype=torch.bool),
            "uv": 20 + torch.randn(n, 21, 2, generator=generator), "crop": 0.5 * torch.eye(3).expand(n, 3, 3),
            "visible": torch.arange(21).expand(n, 21) < 5, "pose": torch.zeros(n, 48), "shape": torch.zeros(n, 10),
            "K": torch.eye(3).expand(n, 3, 3), "image": torch.zeros(n, 3, 8, 8),
            "verts": torch.full((n, 778, 3), math.nan)}
        self.numbers["crop"] = torch.diag(torch.tensor([0.5, 0.5, 1.0])).expand(n, 3, 3)

    def __len__(self):
        return self.n

    def batches(self, plan, device, workers):
        for rows in plan:
            sides = ["left" if row % 2 else "right" for row in rows.tolist()]
            yield {key: x[rows] for key, x in self.numbers.items()} | {"side": sides}


def exam_of(data):
    return Exam(data, "folder", Mano(builtin_hand()), torch.device("cpu"))


def test_the_mean_pose_row_is_raw_by_mean_joints_and_aligned_by_the_mean_hand():
    """Mean joints at one point, and a mean pose that is the truth itself: far off raw, nothing aligned."""
    data = Hands()
    mean = {"pose": torch.zeros(48), "shape": torch.zeros(10), "joints": torch.zeros(21, 3), "uv": torch.full((21, 2), 2.0)}
    rows, _ = assess(exam_of(data), lambda batch: {"x": {"joints": batch["joints"], "uv": batch["uv"]}}, mean)
    blind, right = rows["mean_pose"].means(), rows["x"].means()
    reach = (data.numbers["joints"][0] - data.numbers["joints"][0, 0]).norm(dim=1).mean()
    assert blind["mpjpe_mm"] == pytest.approx(1000 * float(reach), rel=1e-5) and blind["pa_mpjpe_mm"] < 1e-3
    off = (16 - data.numbers["uv"]).norm(dim=-1).mean()                       # 2 x the picture's 8 px
    assert blind["epe_2d_px_crop"] == pytest.approx(float(off), rel=1e-5)
    assert blind["epe_2d_px"] == pytest.approx(2 * float(off), rel=1e-5)      # of the whole picture
    assert right["mpjpe_mm"] == 0 and not rows["x"].rooted and rows["mean_pose"].predict is None


def test_a_lone_prediction_that_is_not_finite_is_an_error_and_one_of_several_says_nothing():
    data = Hands()

    def broken(batch):
        joints = batch["joints"].clone()
        joints[2, 4] = math.nan
        return {"x": {"joints": joints, "uv": batch["uv"]}}

    with pytest.raises(common.UserError, match="not finite"):
        assess(exam_of(data), broken)
    rows, _ = assess(exam_of(data), lambda batch: broken(batch) | {"y": {"joints": batch["joints"], "uv": batch["uv"]}})
    assert [rows[name].count("scored ours") for name in "xy"] == [6, 6] and rows["x"].count("not made") == 1
    assert rows["x"].tallies["ours"].count("mpjpe_mm") == 5 and rows["y"].tallies["ours"].count("mpjpe_mm") == 6
    assert rows["x"].errors.isfinite().sum() == 6                              # the sixth in px


def test_where_a_wrist_is_comes_from_the_network_the_data_set_or_the_truth():
    data = Hands(2)
    batch = data.numbers | {"side": ["right", "left"]}
    joints = batch["joints"] - batch["joints"][:, :1]
    assert torch.equal(root_of({"joints": joints, "root": joints[:, 3]}, batch, {}), joints[:, 3])
    assert torch.equal(root_of({"joints": joints}, batch, {}), batch["joints"][:, 0])
    assert root_of({"joints": joints}, batch, {}, truth=False).isnan().all()
    told = np.ones((2, 3), np.float32)
    assert torch.equal(root_of({"joints": joints}, batch, {"root": told}, truth=False), torch.ones(2, 3))
    f = facts({"joints": joints, "uv": batch["uv"]}, batch, {})
    assert torch.allclose(f["camera"], batch["joints"]) and f["left"].tolist() == [False, True]
    assert torch.allclose(f["uv"], 2 * batch["uv"].double()) and torch.equal(f["uv_image"], batch["uv"])


def test_plots_are_in_millimetres_of_rooted_joints_and_aligned_ones_are_no_larger():
    """One finger tip is 3, 0, 4 mm off: 5 mm in its bar, none in the others, and 19 of 20 within 4 mm, the wrist left out."""
    data = Hands()

    def predict(batch):
        joints = batch["joints"].clone()
        joints[:, 8] += torch.tensor([0.003, 0, 0.004])
        return {"x": {"joints": joints, "uv": batch["uv"]}}

    plots = assess(exam_of(data), predict)[0]["x"].plots["mm"]
    bars = plots.points("joints")
    assert float(bars[8]) == pytest.approx(5, abs=1e-3) and float(bars[1:].sum()) == pytest.approx(5, abs=1e-3)
    assert bars[0].isnan() and float(plots.points("pck")[4]) == pytest.approx(19 / 20) and float(plots.points("pck")[6]) == 1
    aligned = plots.points("pck_aligned")                     # the tip alone is between 4 and 5 mm off
    assert float(aligned[4]) == pytest.approx(19 / 20) and float(aligned[5]) == 1


def test_what_plots_show_of_errors():
    error = torch.tensor([[0.0, 10.0, 10.5, math.nan], [50.0, 60.0, math.nan, math.nan]], dtype=torch.float64)
    share = shares_within(error)
    assert share.shape == (2, 51) and share[0, [0, 9, 10, 11]].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert share[1, [49, 50]].tolist() == [0.0, 0.5]
    seen = torch.tensor([[True, True, False, True], [False, True, True, True]])
    plots = errors_by_joint(error, 2 * error, seen)
    assert plots["visible"][..., 0].isfinite().tolist() == [[True, True, False, False], [False, True, False, False]]
    assert plots["hidden"][..., 0].isfinite().tolist() == [[False, False, True, False], [True, False, False, False]]
    assert torch.equal(plots["pck_aligned"], shares_within(2 * error))


def test_best_median_and_worst_leave_out_what_has_no_error():
    errors = torch.tensor([5.0, math.nan, 1.0, 3.0, 9.0, 2.0, 4.0])
    picked, names = best_median_worst(errors, 1)
    assert picked.tolist() == [2, 6, 4] and names == ["best", "median", "worst"]
    assert best_median_worst(torch.full((3,), math.nan))[0].tolist() == []


def test_a_screen_shows_the_first_columns_and_says_where_the_rest_are():
    """Columns of 2 + 20 k + 1 letters: with the row's name (1), four end at 2 + 1 + 4 x 23 + 2 = 97, five at 120."""
    head = ["r", *(f"{name:>20}" for name in "abcde")]
    text = "above\n\n" + markdown(head, [["x", "1", "2", "3", "4", "5"]]) + "\n\nbelow | as it is"
    lines = for_screen(text, "a.md").splitlines()
    assert lines[0] == "above" and lines[-1] == "below | as it is" and max(map(len, lines)) == 97
    assert lines[5] == "further columns in a.md: e" and [len(line.split(" | ")) for line in lines[2:5]] == [5, 5, 5]
    narrow = markdown(["r", "a"], [["x", "1"]])
    assert for_screen(narrow, "a.md") == narrow


# ---- Stages ----


def test_the_mean_hand_counts_the_views_of_moments_as_pictures():
    """Two moments of three views, one picture missing: means over five, 2D labels where no truth is known."""
    class Moments:
        def __len__(self):
            return 2

        def targets(self, rows):
            joints = torch.zeros(2, 3, 21, 3) + torch.arange(21.0)[:, None] * torch.tensor([1.0, 2, 3])[:, None, None]
            joints[1, 2] = math.nan
            uv = torch.full((2, 3, 21, 2), math.nan)
            uv[0] = 4.0
            label = torch.full((2, 3, 21, 2), 8.0)
            label[1, 2] = math.nan
            return {"joints": joints[rows], "pose": torch.full((2, 3, 48), math.nan)[rows], "uv": uv[rows],
                    "shape": torch.zeros(2, 3, 10)[rows], "uv_label": label[rows], "side_px": torch.full((2,), 16.0)[rows],
                    "view_ok": torch.tensor([[True] * 3, [True, True, False]])[rows]}

    mean = mean_hand(Moments())
    assert mean["labels"] == 5 and float(mean["joints"][1, 0]) == pytest.approx((1 + 2 + 3 + 1 + 2) / 5)
    assert float(mean["uv"][3, 1]) == pytest.approx((3 * 4 + 2 * 8) / 5 / 16)
