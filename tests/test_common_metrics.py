"""Scores against the official tool kits' numbers, loops typed from the formulas, and literals."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common import (
    UserError, auc, epe, f_score, mpjpe, n_mpjpe, pa_mpjpe, pck_2d, procrustes,
    score, summarise)

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
SKEW = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=torch.float64)


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def hands(n, points=21, seed=0):
    """A random true hand and a noisy, turned prediction, (n, points, 3) m, half a metre away."""
    g = torch.Generator().manual_seed(seed)
    true = 0.04 * torch.randn(n, points, 3, generator=g, dtype=torch.float64)
    pred = true + 0.01 * torch.randn(n, points, 3, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64)).Q
    turn[:, 0] *= torch.linalg.det(turn)[:, None]
    return 1.2 * pred @ turn + 0.1, true + torch.tensor([0.1, 0.0, 0.5])


def truth_of(true, **more):
    ok = torch.ones(len(true), 21, dtype=torch.bool)
    return {"joints": true[:, :21].clone(), "joints_ok": ok, **more}


# ---- Procrustes ----

def test_reflecting_procrustes_gives_the_tool_kits_aligned_points_and_errors():
    true = golden("pa_gt")[None].expand(4, -1, -1)                                          # mm
    aligned = procrustes(golden("pa_pred"), true, reflect=True)
    assert (aligned - golden("pa_official_aligned")).abs().max() < 1e-6
    error = pa_mpjpe(golden("pa_pred"), true, reflect=True).mean(1)
    assert error.tolist() == pytest.approx([7.747635, 14.948132, 0.0, 5.993297], abs=1e-6)


def test_proper_procrustes_gives_the_golden_errors_and_does_not_forgive_a_mirrored_hand():
    error = pa_mpjpe(golden("pa_pred"), golden("pa_gt")[None].expand(4, -1, -1)).mean(1)
    assert error.tolist() == pytest.approx([7.74763, 14.94815, 13.22907, 15.17702], abs=5e-4)
    assert error[2] > 10


def test_procrustes_matches_a_loop_over_scipy_rotations():
    from scipy.spatial.transform import Rotation
    pred, true = hands(6)
    aligned = procrustes(pred, true)
    for p, t, a in zip(pred.numpy(), true.numpy(), aligned.numpy()):
        p0, t0 = p - p.mean(0), t - t.mean(0)
        R = Rotation.align_vectors(t0, p0)[0].as_matrix()
        s = np.trace(t0.T @ p0 @ R.T) / (p0 ** 2).sum()
        assert np.abs(s * p0 @ R.T + t.mean(0) - a).max() < 1e-9


@pytest.mark.parametrize("reflect", [False, True])
def test_pa_mpjpe_is_invariant_to_similarity(reflect):
    pred, true = hands(5)
    turn = torch.linalg.matrix_exp(SKEW)
    other = 0.3 * pred @ turn - 7.0
    before, after = pa_mpjpe(pred, true, reflect=reflect), pa_mpjpe(other, true, reflect=reflect)
    assert (before - after).abs().max() < 1e-10
    assert 0.005 < before.mean() < 0.03


def test_a_mirrored_hand_scores_zero_only_with_reflection():
    _, true = hands(3)
    mirrored = true * torch.tensor([-1.0, 1, 1])
    assert pa_mpjpe(mirrored, true, reflect=True).max() < 1e-9
    assert pa_mpjpe(mirrored, true).mean(1).min() > 0.010


@pytest.mark.parametrize("point", [0.0, 0.35, 0.113, 0.383])
def test_a_prediction_collapsed_to_a_point_goes_to_the_middle_of_the_hand(point):
    _, true = hands(2)
    for reflect in (False, True):
        aligned = procrustes(torch.full_like(true, point), true, reflect=reflect)
        assert (aligned - true.mean(1, keepdim=True)).abs().max() < 1e-9


def test_flat_and_straight_hands_align_exactly():
    for shape in (torch.tensor([1.0, 1, 0]), torch.tensor([1.0, 0, 0])):
        true = hands(4)[1] * shape
        turn = torch.linalg.matrix_exp(SKEW)
        assert pa_mpjpe(true @ turn, true).max() < 1e-9


@pytest.mark.parametrize("reflect", [False, True])
def test_a_hand_with_nan_is_nan_and_spoils_no_other(reflect):
    pred, true = hands(4)
    want = procrustes(pred, true, reflect=reflect)
    pred[1, 4, 2], true[2, 7] = math.nan, math.nan
    got = procrustes(pred, true, reflect=reflect)
    assert got[1:3].isnan().all() and torch.equal(got[[0, 3]], want[[0, 3]])


def test_procrustes_of_no_samples_is_empty():
    assert procrustes(torch.zeros(0, 21, 3), torch.zeros(0, 21, 3)).shape == (0, 21, 3)
    assert f_score(torch.zeros(0, 778, 3), torch.zeros(0, 778, 3)).shape == (0, 2)
    none = torch.zeros(0, 21, 3)
    assert score({"joints": none}, truth_of(none))["auc"].shape == (0,)


def test_points_that_do_not_count_change_nothing_even_if_nan():
    pred, true = hands(4)
    keep = torch.tensor([0, 2, 3, 9, 12, 20])
    ok = torch.zeros(4, 21, dtype=torch.bool)
    ok[:, keep] = True
    holes = torch.where(ok[..., None], true, math.nan)
    wild = torch.where(ok[..., None], pred, 1e3)
    aligned = pa_mpjpe(wild, holes, ok)
    assert (aligned[:, keep] - pa_mpjpe(pred[:, keep], true[:, keep])).abs().max() < 1e-9
    assert aligned.isnan().sum() == 4 * 15
    assert (mpjpe(wild, holes, ok)[:, keep] - mpjpe(pred, true)[:, keep]).abs().max() < 1e-12
    assert not n_mpjpe(wild, holes, ok, lsq=True)[:, keep].isnan().any()


def test_alignment_of_two_points_is_no_score():
    pred, true = hands(2)
    ok = torch.arange(21).expand(2, -1) < torch.tensor([[2], [3]])
    assert pa_mpjpe(pred, true, ok)[0].isnan().all()
    assert pa_mpjpe(pred, true, ok)[1, :3].min() >= 0


# ---- Rooted and scaled errors ----

def test_errors_match_a_double_loop():
    pred, true = hands(3)
    for i in range(3):
        p, t = pred[i].numpy(), true[i].numpy()
        bone_p, bone_t = np.linalg.norm(p[9] - p[0]), np.linalg.norm(t[9] - t[0])
        lsq = ((p - p[9]) * (t - t[9])).sum() / ((p - p[9]) ** 2).sum()
        for j in range(21):
            want = [np.linalg.norm(p[j] - t[j]),
                    np.linalg.norm((p[j] - p[0]) - (t[j] - t[0])),
                    np.linalg.norm((p[j] - p[9]) * bone_t / bone_p - (t[j] - t[9])),
                    np.linalg.norm((p[j] - p[9]) * lsq - (t[j] - t[9])),
                    np.linalg.norm((p[j] - p[0]) * bone_t / bone_p - (t[j] - t[0]))]
            got = [epe(pred, true), mpjpe(pred, true), n_mpjpe(pred, true),
                   n_mpjpe(pred, true, lsq=True), n_mpjpe(pred, true, root=0)]
            assert [x[i, j].item() for x in got] == pytest.approx(want, rel=1e-10)


def test_n_mpjpe_of_a_scaled_and_shifted_hand_is_zero():
    _, true = hands(3)
    for scaled in (n_mpjpe(0.1 * true + 1, true), n_mpjpe(7 * true, true, lsq=True),
                   n_mpjpe(0.1 * true + 1, true, root=0)):
        assert scaled.max() < 1e-12
    assert mpjpe(0.1 * true, true).mean() > 0.02


def test_a_missing_wrist_leaves_the_sample_out_of_rooted_scores_only():
    pred, true = hands(2)
    truth = truth_of(true)
    truth["joints_ok"][1, 0] = False
    scores = score({"joints": pred, "root": pred[:, 0]}, truth)
    gone = {name for name, x in scores.items() if x[1].isnan()}
    assert gone == {"mpjpe_mm", "n_mpjpe_mm", "n_mpjpe_mm_lsq", "st_mpjpe_mm", "auc"}


# ---- AUC and PCK ----

def test_auc_matches_the_tool_kits_formula_and_its_golden_value():
    true, pred = golden("fh_xyz_gt"), golden("fh_xyz_pred")
    errors = pa_mpjpe(pred, true, reflect=True)
    assert errors.mean().item() == pytest.approx(0.0093508, abs=5e-8)
    assert auc(errors).mean().item() == pytest.approx(0.8127104, abs=1e-7)


def test_auc_equals_trapezoids_under_the_curve_typed_from_the_formula():
    errors = torch.tensor([[0.0, 0.004, 0.0123], [0.049, 0.0501, 0.3]], dtype=torch.float64)
    pck = [np.mean([e <= t for e in errors.flatten().tolist()]) for t in np.linspace(0, 0.05, 100)]
    area = sum((a + b) / 2 for a, b in zip(pck[:-1], pck[1:])) / 99
    assert auc(errors).mean().item() == pytest.approx(area, abs=1e-12)


def test_auc_of_single_errors():
    errors = torch.tensor([0.0, 1e-9, 0.025, 0.05, 0.0500001, 2.0, math.nan], dtype=torch.float64)
    want = [1.0, 98.5 / 99, 49.5 / 99, 0.5 / 99, 0.0, 0.0, math.nan]
    assert auc(errors).tolist() == pytest.approx(want, nan_ok=True)
    assert auc(torch.tensor([15.0]), 30.0).item() == pytest.approx(49.5 / 99)


def test_areas_are_those_of_the_curve_also_for_errors_on_or_beside_a_threshold():
    """Each error adds the trapezoids of its own step from 0 to 1, at the first of 100 thresholds that it meets."""
    for limit in (0.05, 30.0):
        steps = torch.linspace(0, limit, 100, dtype=torch.float64).numpy()
        errors = np.concatenate([steps, np.nextafter(steps, 1e9), np.nextafter(steps[1:], 0), [1e9, np.inf]])
        share = (errors[:, None] <= steps).astype(float)
        area = ((share[:, 1:] + share[:, :-1]) / 2).sum(1) / 99
        assert np.abs(auc(torch.tensor(errors), limit).numpy() - area).max() < 1e-12
    assert auc(torch.tensor([math.nan])).isnan().all()


# ---- F-score ----

def test_f_score_matches_the_tool_kits_after_alignment():
    pred, true = golden("fh_verts_pred"), golden("fh_verts_gt")
    got = f_score(procrustes(pred, true, reflect=True), true)
    assert np.abs(got[:, 0].numpy() - GOLDEN["fh_f_5"]).max() < 1e-9
    assert np.abs(got[:, 1].numpy() - GOLDEN["fh_f_15"]).max() < 1e-9


def test_f_score_of_points_on_a_line():
    true = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0]]])
    pred = torch.tensor([[[0.004, 0, 0], [0.010, 0, 0]]])           # P 1/2 and 1; R 1/2 and 1/2
    assert f_score(pred, true)[0].tolist() == pytest.approx([1 / 2, 2 * 1 * 0.5 / 1.5])
    assert f_score(pred + 9, true)[0].tolist() == [0, 0]


def test_f_score_matches_a_loop_and_does_not_use_the_order_of_vertices():
    pred, true = hands(2, 40)
    pred = true + 0.3 * (pred - pred.mean(1, keepdim=True))
    for i in range(2):
        table = [[math.dist(a, b) for b in true[i].tolist()] for a in pred[i].tolist()]
        P = np.mean([min(row) < 0.015 for row in table])
        R = np.mean([min(column) < 0.015 for column in zip(*table)])
        assert f_score(pred, true)[i, 1].item() == pytest.approx(2 * P * R / (P + R))
    assert torch.equal(f_score(pred, true), f_score(pred.flip(1), true))


# ---- 2D ----

def test_2d_scores_are_in_pixels_of_the_original_picture():
    true = torch.rand(2, 21, 2) * 100
    true[:, 0], true[:, 1] = torch.tensor([0.0, 0]), torch.tensor([100.0, 40]) # 200 px wide
    crop = torch.tensor([[0.5, 0, 3], [0, 0.5, 4], [0, 0, 1]]).repeat(2, 1, 1)    # picture -> image
    truth = truth_of(hands(2)[1], uv=true, crop=crop)
    pred = true + torch.tensor([2.97, 3.96])
    pred[1] += torch.tensor([27.0, 36.0])
    scores = score({"joints": hands(2)[0], "uv": pred}, truth)
    assert scores["epe_2d_px_crop"].tolist() == pytest.approx([4.95, 49.95], abs=1e-4)
    assert scores["epe_2d_px"].tolist() == pytest.approx([9.9, 99.9], abs=1e-4)
    assert scores["pck_2d_20"].tolist() == [1, 0]
    assert scores["auc_2d"].tolist() == pytest.approx([66.5 / 99, 0])    # 9.9 of 30 px: 33rd of 99
    near = torch.full((1, 21, 2), 19.9) * torch.tensor([1.0, 0])
    assert pck_2d(true[:1] + near, true[:1]).mean() == 1
    assert pck_2d(true[:1] + 1.01 * near, true[:1]).mean() == 0
    assert pck_2d(true, true, torch.arange(21).expand(2, -1) < 5).isnan().sum() == 32


def test_2d_scores_count_finite_uv_where_there_is_no_3d_and_only_good_joints_where_there_is():
    uv, crop = torch.zeros(2, 21, 2), torch.eye(3).repeat(2, 1, 1)
    truth = truth_of(hands(2)[1], uv=uv, crop=crop)
    truth["joints"][0], truth["joints_ok"][0] = math.nan, False
    truth["uv"][0, 5:], truth["joints_ok"][1, 10:] = math.nan, False
    pred = torch.arange(21.0)[None, :, None] * torch.tensor([1.0, 0])
    scores = score({"joints": hands(2)[0], "uv": pred.repeat(2, 1, 1)}, truth)
    assert scores["epe_2d_px"].tolist() == pytest.approx([2.0, 4.5])         # means of 0-4, 0-9
    assert scores["pa_mpjpe_mm"][0].isnan()


# ---- The whole table ----

NAMES_3D = {"mpjpe_mm", "pa_mpjpe_mm", "pa_mpjpe_mm_reflect", "n_mpjpe_mm", "n_mpjpe_mm_lsq",
            "st_mpjpe_mm", "auc", "pa_auc"}


def whole(n):
    true = torch.cat([hands(n)[1], hands(n, 778, 1)[1]], 1)
    uv, crop = torch.rand(n, 21, 2), torch.eye(3).repeat(n, 1, 1)
    truth = truth_of(true, verts=true[:, 21:], uv=uv, crop=crop)
    shift = torch.tensor([1.0, 2, 3])
    pred = {"joints": true[:, :21] + shift, "verts": true[:, 21:] + shift, "root": true[:, 0],
            "uv": truth["uv"].clone()}
    return pred, truth


def test_truth_as_prediction_is_perfect_in_every_score_whatever_the_origin():
    pred, truth = whole(3)
    means, n, left_out = summarise(score(pred, truth))
    assert (n, left_out) == (3, 0)
    perfect = {name: 0.0 if "_mm" in name or "_px" in name else 1.0 for name in means}
    half_a_step = {name: 0.0051 if "auc" in name else 1e-5 for name in means}
    assert all(abs(means[name] - perfect[name]) < half_a_step[name] for name in means), means
    mesh = {name.replace("mpjpe", "mpvpe") for name in NAMES_3D if "mpjpe" in name}
    assert set(means) == NAMES_3D | mesh | {
        "abs_mpjpe_mm", "abs_mpvpe_mm", "f_5", "f_15", "f_5_raw", "f_15_raw", "epe_2d_px",
        "epe_2d_px_crop", "pck_2d_20", "auc_2d"}


def test_scores_stand_apart_from_one_another():
    pred, truth = whole(2)
    middle = truth["joints"][:, :1]
    for key in ("joints", "verts"):
        pred[key] = 1.1 * (truth[key] - middle) + middle
    pred["root"] = pred["root"] + torch.tensor([0.0, 0.0, 0.2])
    means, *_ = summarise(score(pred, truth))
    size = 1000 * (truth["joints"] - middle).norm(dim=-1).mean().item()
    assert means["mpjpe_mm"] == pytest.approx(0.1 * size, rel=1e-6)
    assert max(means[name] for name in ("pa_mpjpe_mm", "n_mpjpe_mm", "st_mpvpe_mm")) < 1e-6
    assert 190 < means["abs_mpjpe_mm"] < 215 and means["f_15_raw"] < 0.05 and means["f_5"] == 1


def test_score_in_millimetres_of_each_part_is_the_mean_of_its_errors():
    pred, truth = whole(2)
    true = torch.cat([truth["joints"], truth["verts"]], 1)
    moved = true + 0.02 * torch.sin(torch.arange(799.0) ** 2)[:, None]
    scores = score(pred | {"joints": moved[:, :21], "verts": moved[:, 21:]}, truth)
    want = {"mpjpe_mm": mpjpe(moved, true)[:, :21], "mpvpe_mm": mpjpe(moved, true)[:, 21:],
            "pa_mpjpe_mm": pa_mpjpe(moved[:, :21], true[:, :21]),
            "pa_mpvpe_mm": pa_mpjpe(moved[:, 21:], true[:, 21:]),
            "n_mpjpe_mm_lsq": n_mpjpe(moved, true, lsq=True)[:, :21]}
    for name, error in want.items():
        assert scores[name].tolist() == pytest.approx((1000 * error.mean(1)).tolist())
    assert torch.equal(scores["auc"], auc(want["mpjpe_mm"]).mean(1))
    assert torch.equal(scores["pa_auc"], auc(want["pa_mpjpe_mm"]).mean(1))


def test_score_gives_only_what_the_prediction_allows():
    pred, true = hands(2)
    assert set(score({"joints": pred}, truth_of(true))) == NAMES_3D


def test_samples_without_truth_are_nan_counted_and_left_out_of_the_mean():
    pred, true = hands(4)
    truth = truth_of(true)
    alone = summarise(score({"joints": pred[:3]}, truth_of(true[:3])))
    truth["joints"][3], truth["joints_ok"][3] = math.nan, False
    means, n, left_out = summarise(score({"joints": pred}, truth))
    assert (n, left_out) == (3, 1) and means == pytest.approx(alone[0])
    verts = hands(4, 778)[1]
    verts[0] = math.nan
    scores = score({"joints": pred, "verts": hands(4, 778)[0]}, truth | {"verts": verts})
    assert scores["f_5"].isnan().tolist() == [True, False, False, False]
    assert scores["mpvpe_mm"].isnan().tolist() == [True, False, False, True]


def test_summarise_counts_samples_with_any_score_and_drops_scores_nobody_has():
    nan = math.nan
    scores = {"a": torch.tensor([1.0, nan, nan, 4.0]), "b": torch.tensor([nan, 5.0, nan, nan]),
              "c": torch.full((4,), nan)}
    assert summarise(scores) == ({"a": 2.5, "b": 5.0}, 3, 1)


def test_a_prediction_that_is_not_finite_is_refused_not_left_out():
    pred, true = hands(3)
    pred[1, 4, 2] = math.nan
    with pytest.raises(UserError, match="1 of 3 predictions have joints .* sample 1"):
        score({"joints": pred}, truth_of(true))
    with pytest.raises(UserError, match="shape"):
        score({"joints": pred[:2]}, truth_of(true))


def test_scores_of_float32_and_of_a_part_of_the_batch_agree():
    pred, true = hands(50)
    scores = score({"joints": pred}, truth_of(true))
    single = score({"joints": pred.float()}, truth_of(true.float()))
    part = score({"joints": pred[10:13]}, truth_of(true[10:13]))
    for name in NAMES_3D:
        assert scores[name].dtype == single[name].dtype == torch.float64
        assert (scores[name] - single[name]).abs().max() < 1e-3
        assert (scores[name][10:13] - part[name]).abs().max() < 1e-9
