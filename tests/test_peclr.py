"""PeCLR: Eq. 1 to 6, the transformations of Fig. 4, LARS, the large batch, the 2.5D head."""
import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import handmim
import peclr
from common import batch_statistics, load_backbone, rotation, settle, translation
from group import on_processes
from sources import Source, open_data, training_steps
from sources.reading import read_items
from sources.synthetic import Synthetic
from peclr import (BEST, CONVENTIONS, RELEASED, Config, HandNet, Lars, PeCLR, View, cut_out, draw_view,
                   hand_circle, hand_view, jitter_hsv, lift, load_released, lr_at, make_views, mixed_order,
                   nt_xent, pose_25d, pose_loss, root_depth, sobel, undo_view, with_root, with_wrist)

ROOT = Path(__file__).parent.parent
EXACT = torch.float64
TINY = dict(backbone="resnet10", image_size=32, workers=0, samples=32)
TUNE = ["--samples", "48", "--backbone", "resnet10", "--image-size", "32", "--batch-size", "8",
        "--micro-batch", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def gold():
    return np.load(ROOT / "tests" / "golden" / "peclr.npz")


def batch_of(n=4, size=48, seed=3):
    torch.manual_seed(seed)
    uv = size / 2 + size / 8 * torch.randn(n, 21, 2)
    return {"image": torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8), "index": torch.arange(n),
            "uv": uv, "crop": torch.eye(3).expand(n, 3, 3)}


@pytest.fixture(scope="module")
def hands():
    data = Synthetic(48, 16, 0, "train", calm=True, margin=peclr.MARGIN)
    return data.batch(torch.arange(16)) | {"index": torch.arange(16)}


# ---- Eq. 1: NT-Xent


@pytest.mark.parametrize("name, tau", [("t050", 0.5), ("t010", 0.1), ("t007", 0.07)])
def test_nt_xent_and_its_gradient_match_golden(gold, name, tau):
    z = torch.tensor(np.stack([gold["ntx_z1"], gold["ntx_z2"]])).requires_grad_()
    assert np.abs(np.linalg.norm(gold["ntx_z1"], axis=1) - 1).max() < 1e-12
    loss = nt_xent(z, tau)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(gold[f"ntx_loss_{name}"]), abs=1e-10)
    for k in (1, 2):                         # the official loss takes unit vectors as they are, ours makes them
        unit, slope = gold[f"ntx_z{k}"], gold[f"ntx_grad{k}_{name}"]
        tangent = slope - (slope * unit).sum(1, keepdims=True) * unit
        assert np.abs(z.grad[k - 1].numpy() - tangent).max() < 1e-10


def test_nt_xent_is_the_double_loop_of_equation_1():
    torch.manual_seed(0)
    z = torch.randn(2, 3, 5, dtype=EXACT)
    flat, total = z.flatten(0, 1), 0.0
    similar = lambda u, v: float(u @ v / (u.norm() * v.norm()))
    for i in range(6):
        j = (i + 3) % 6
        others = sum(math.exp(similar(flat[i], flat[k]) / 0.3) for k in range(6) if k != i)
        total -= math.log(math.exp(similar(flat[i], flat[j]) / 0.3) / others)
    assert float(nt_xent(z, 0.3)) == pytest.approx(total / 6, abs=1e-12)


# ---- Eq. 3, 4: undoing a view


def golden_projections(gold, rotate, shift):
    raw = torch.tensor(gold["pec_raw"]).float().requires_grad_()
    H, W = gold["pec_image_hw"]
    parts = []
    for k, p in enumerate(raw.split(5), 1):
        angle = torch.tensor(np.deg2rad(gold[f"pec_angle_{k}"])).float()
        moved = torch.tensor(np.stack([gold[f"pec_jitter_x_{k}"] / H, gold[f"pec_jitter_y_{k}"] / W], 1)).float()
        parts.append(undo_view(p, angle if rotate else None, moved if shift else None))
    return raw, torch.stack(parts)


def test_peclr_loss_and_gradient_match_golden(gold):
    raw, z = golden_projections(gold, True, True)
    for k in (1, 2):
        got = F.normalize(z[k - 1], dim=1).detach().numpy()
        assert np.abs(got - gold[f"pec_full_proj{k}"]).max() < 1e-6
    loss = nt_xent(z, 0.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(gold["pec_full_loss"]), abs=1e-5)
    assert float(loss.detach()) == pytest.approx(2.100964, abs=2e-6)
    assert np.abs(raw.grad.numpy() - gold["pec_full_grad_raw"]).max() < 1e-6


@pytest.mark.parametrize("rotate, shift, loss", [(True, False, 2.042444), (False, True, 2.145039)])
def test_each_inverse_alone_gives_the_official_loss(gold, rotate, shift, loss):
    _, z = golden_projections(gold, rotate, shift)
    assert float(nt_xent(z, 0.5).detach()) == pytest.approx(loss, abs=2e-6)


def test_without_inverses_peclr_is_simclr_bit_for_bit(gold):
    raw, z = golden_projections(gold, False, False)
    assert torch.equal(nt_xent(z, 0.5), nt_xent(raw.unflatten(0, (2, 5)), 0.5))
    nt_xent(z, 0.5).backward()
    assert float(nt_xent(z, 0.5).detach()) == pytest.approx(float(gold["pec_simclr_loss"]), abs=1e-6)
    assert np.abs(raw.grad.numpy() - gold["pec_simclr_grad_raw"]).max() < 1e-6


def test_both_objectives_are_equal_bit_for_bit_where_nothing_is_to_undo(monkeypatch):
    batch, found = batch_of(6), {}
    for objective in ("peclr", "simclr"):
        cfg = Config(objective=objective, augment=("scale", "colour-jitter"), batch_size=6, micro_batch=6, **TINY)
        found[objective] = gradients(cfg, [batch], monkeypatch)
    assert found["peclr"][0] == found["simclr"][0]
    assert all(torch.equal(a, b) for a, b in zip(found["peclr"][1], found["simclr"][1]))


def test_latent_rotation_and_translation_match_golden(gold):
    """The official helpers, each alone and the inverse of both, on points that are not normalised."""
    enc = torch.tensor(gold["lat_enc"])
    angle = torch.tensor(np.deg2rad(gold["lat_angle_deg"]))
    moved = torch.tensor(np.stack([gold["lat_tx"], gold["lat_ty"]], 1))
    norm = enc.flatten(1).norm(dim=1)[:, None, None]                   # ours normalises, these do not
    back = lambda z: z.unflatten(1, (-1, 2)) * norm
    turned = back(undo_view(enc.flatten(1), -angle, None))
    assert (turned - torch.tensor(gold["lat_rotate"])).abs().max() < 1e-6
    shifted = back(undo_view(enc.flatten(1), None, -moved))            # a share of the range, there too
    assert (shifted - torch.tensor(gold["lat_translate"])).abs().max() < 1e-9
    both = back(undo_view(enc.flatten(1), angle, moved))
    assert (both - torch.tensor(gold["lat_inverse"])).abs().max() < 2e-6


def test_one_range_is_equation_4_read_literally():
    p = torch.randn(3, 8, dtype=EXACT)
    z = F.normalize(p, dim=1)
    shift = torch.tensor([[0.1, -0.2]], dtype=EXACT).expand(3, 2)
    moved = z.unflatten(1, (4, 2)) - undo_view(p, None, shift, one_range=True).unflatten(1, (4, 2))
    L_z = z.amax(1) - z.amin(1)
    assert torch.allclose(moved, (shift * L_z[:, None])[:, None].expand(3, 4, 2), atol=1e-12)


def equivariant_encoder(views: tuple[View, View], shape: torch.Tensor) -> list[torch.Tensor]:
    """Points of a known shape (m, 2), as an encoder that obeys Eq. 2 sees them in each view: turned as the
    picture about their mean, moved by the share of their own range, at any size."""
    out = []
    for g in views:
        B = len(g.A)
        R = rotation(g.angle, 1)[:, :2, :2].to(EXACT)
        mean = shape.mean(0)
        points = (shape - mean).expand(B, -1, 2) @ R.mT + mean
        extent = points.amax(1) - points.amin(1)
        points = points + (g.shift.to(EXACT) * extent)[:, None]
        out.append((3.7 * points).flatten(1))
    return out


def test_an_equivariant_encoder_s_positives_agree_whatever_was_drawn():
    batch = batch_of(64)
    cfg = Config(**TINY)
    views = tuple(draw_view(batch, cfg, 5, k) for k in (0, 1))
    torch.manual_seed(1)
    first, second = equivariant_encoder(views, torch.randn(64, 2, dtype=EXACT) + 0.4)
    undo = lambda p, g, sign=1: undo_view(p, sign * g.angle.to(EXACT), sign * g.shift.to(EXACT))
    similar = lambda a, b: F.cosine_similarity(a, b, dim=1)
    assert similar(undo(first, views[0]), undo(second, views[1])).min() > 1 - 1e-3
    assert similar(first, second).mean() < 0.98
    wrong = similar(undo(first, views[0], -1), undo(second, views[1], -1))
    assert wrong.mean() < 0.9
    halves = similar(undo_view(first, views[0].angle.to(EXACT), None), undo_view(second, views[1].angle.to(EXACT), None))
    assert 0.9 < halves.mean() < 1 - 1e-3                     # the shift is left in


# ---- Fig. 4: transformations


def test_views_move_the_picture_as_the_matrix_and_the_drawn_numbers_say():
    """Mean and farthest key point land where angle, shift and a margin within [0.9, 1.5] put them."""
    batch, cfg = batch_of(32), Config(**TINY)
    g = draw_view(batch, cfg, 0, 1)
    uv = batch["uv"] @ g.A[:, :2, :2].mT + g.A[:, None, :2, 2]
    assert torch.allclose(uv.mean(1), 15.5 + 32 * g.shift, atol=1e-3)
    R = rotation(g.angle, 1)[:, :2, :2]
    before, after = batch["uv"] - batch["uv"].mean(1, keepdim=True), uv - uv.mean(1, keepdim=True)
    turned = before @ R.mT
    ratio = after / turned
    assert torch.allclose(ratio, ratio.mean((1, 2), keepdim=True).expand_as(ratio), rtol=1e-2)
    margin = 16 / after.norm(dim=-1).amax(1)
    assert margin.min() >= 0.9 and margin.max() <= 1.5 and margin.std() > 0.1
    assert g.angle.abs().max() <= math.pi / 4 and g.angle.abs().max() > 0.6
    assert g.shift.abs().max() <= 7.5 / 128 and g.shift.std() > 0.02


def test_two_views_of_a_sample_differ_and_do_not_depend_on_the_batch():
    batch, cfg = batch_of(8), Config(**TINY)
    views, drawn = make_views(batch, cfg, 0)
    assert (drawn[0].angle != drawn[1].angle).all() and views.shape == (2, 8, 3, 32, 32)
    few = {k: v[5:6] for k, v in batch.items()}
    again, _ = make_views(few, cfg, 0)
    assert torch.equal(again[:, 0], views[:, 5])
    assert not torch.equal(make_views(few, cfg, 1)[0], again)


def test_simclr_views_are_scaled_and_jittered_and_nothing_is_undone():
    assert BEST == {"peclr": ("scale", "rotation", "translation", "colour-jitter"),
                    "simclr": ("scale", "colour-jitter")}                # Sec. 4.4, composite augmentations
    g = draw_view(batch_of(), Config(objective="simclr", **TINY), 0, 0)
    assert g.angle is None and g.shift is None
    assert g.A[:, 0, 1].abs().max() == 0 and g.A[:, 0, 0].std() > 0


@pytest.mark.parametrize("name", peclr.GEOMETRIC + peclr.APPEARANCE)
def test_each_transformation_can_be_used_alone(name):
    batch = batch_of(16)
    cfg = Config(augment=(name,), **TINY)
    views, drawn = make_views(batch, cfg, 0)
    assert views.isfinite().all()
    assert (drawn[0].angle is not None) == (name == "rotation") and (drawn[0].shift is not None) == (name == "translation")
    changed = (views[0] - views[1]).abs().amax((1, 2, 3)) > 1e-4
    share = changed.float().mean()                     # chances of a half: three of four pairs differ
    assert share == 1 if name in (*peclr.GEOMETRIC, "colour-jitter") else 0.4 < share < 1


def alone(name, picture, **more):
    """One transformation on many copies of a picture (3, 32, 32) in 0..1, as `make_views` calls it."""
    n = 400
    return peclr.change_appearance(picture.expand(n, -1, -1, -1), torch.arange(n), Config(**(TINY | more)), 0, 0, (name,))


def test_appearance_ranges_are_the_authors():
    """Notes of the released code: V x U(0.5, 1) + U(5, 20); noise of 25 levels; sigma U(0.1, 2); chances of a half."""
    grey = torch.full((3, 32, 32), 0.5)
    value = 255 * alone("colour-jitter", grey)[:, 0, 0, 0]
    assert 63.75 + 5 <= value.min() < 76 and 136 < value.max() <= 127.5 + 20
    red = torch.zeros(3, 32, 32)
    red[0] = 1.0
    out = alone("colour-jitter", red)
    saturation = 1 - out.amin(1) / out.amax(1)
    assert saturation.min() < 0.05 and 0.9 < saturation.max() <= 1                  # S x U(0.01, 1)
    noisy = alone("noise", grey)
    on = (noisy != 0.5).flatten(1).any(1)
    assert 0.4 < on.float().mean() < 0.6 and abs(255 * float(noisy[on].std()) - 25) < 0.5
    dot = torch.zeros(3, 32, 32)
    dot[:, 16, 16] = 1.0
    peak = alone("blur", dot)[:, 0, 16, 16]
    assert 0.4 < (peak < 1).float().mean() < 0.6 and 0.03 < peak.min() < 0.12       # 1 / (2 pi 2^2) = 0.04, cut at 2 px


def test_named_departures_reach_the_views_and_the_loss():
    batch = batch_of(6) | {"crop": 2 * torch.eye(3).expand(6, 3, 3)}
    plain, (g, _) = make_views(batch, Config(**TINY), 0)
    changed = lambda name: make_views(batch, Config(variant=(name,), **TINY), 0)
    assert not torch.equal(changed("bgr")[0], plain)
    assert not torch.equal(changed("box-crops")[1][0].A, g.A) and not torch.equal(changed("authors-shift")[1][0].shift, g.shift)
    torch.manual_seed(0)
    model = PeCLR(Config(**TINY))
    z, one = (peclr.projections(model, batch, Config(variant=v, **TINY), 0) for v in ((), ("one-range",)))
    assert not torch.allclose(z, one)


def test_views_of_a_full_square_have_no_black_wedge():
    """Black corners would give the angle away: a view turned by 45 degrees at margin 1.5 stays inside the square."""
    data = Synthetic(64, 32, 0, "train", calm=True, margin=peclr.VIEW_MARGIN)
    batch = data.batch(torch.arange(32)) | {"index": torch.arange(32)}
    batch["image"] = torch.full_like(batch["image"], 255)
    views, _ = make_views(batch, Config(augment=peclr.GEOMETRIC, **TINY), 0)
    black = (views < -1).any(2).float().mean((2, 3))
    assert black.mean() < 0.002 and (black > 0.01).float().mean() < 0.05


def test_authors_shift_is_whole_pixels_of_the_picture_over_the_network_s_side():
    batch = batch_of(32)
    batch["crop"] = torch.diag(torch.tensor([2.0, 2.0, 1.0])).expand(32, 3, 3)          # image = 2 x picture
    g = draw_view(batch, Config(variant=("authors-shift",), augment=("translation",), **TINY), 0, 0)
    jitter = -32 * g.shift                                                              # 32: the network's side
    assert torch.equal(jitter, jitter.round()) and jitter.min() >= 0 and 10 <= jitter.max() <= 14
    uv = batch["uv"] @ g.A[:, :2, :2].mT + g.A[:, None, :2, 2]
    moved = (uv.mean(1) - 15.5) / g.A[:, 0, 0, None] / 2                                # px of the picture
    assert torch.allclose(moved, -jitter, atol=1e-3)


def test_without_key_points_the_crop_is_centred_on_the_box():
    batch = batch_of(2)
    batch["uv"][0] = math.nan
    middle, radius = hand_circle(batch, False)
    assert middle[0].tolist() == [23.5, 23.5] and float(radius[0]) == pytest.approx(0.65 * 48 / 2.9)
    assert torch.allclose(middle[1], batch["uv"][1].mean(0))
    assert torch.equal(hand_circle(batch, True)[0], torch.full((2, 2), 23.5))


def test_colour_jitter_matches_the_official_one_within_eight_bit_hsv(gold):
    """OpenCV rounds hue to 2 degrees and saturation to a level in between: up to 3 levels of ours, 0.7 on average."""
    picture = torch.tensor(gold["cj_in_uint8"]).permute(2, 0, 1)[None].double() / 255
    true = torch.tensor(gold["cj_out_uint8_h0.6_s0.5_a0.8_b12"]).permute(2, 0, 1)[None].double()
    factors = torch.tensor([[0.6, 0.5, 0.8, 12 / 255]], dtype=EXACT)
    error = (255 * jitter_hsv(picture, factors, bgr=True) - true).abs()
    assert error.max() < 3.5 and error.mean() < 1
    assert (255 * jitter_hsv(picture, factors) - true).abs().mean() > 20        # the slip matters


def test_colour_jitter_is_the_standard_library_s_hsv():
    import colorsys
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 4, 4, dtype=EXACT)
    got = jitter_hsv(picture, torch.tensor([[0.7, 0.4, 0.9, 0.05]], dtype=EXACT))
    for y in range(4):
        for x in range(4):
            h, s, v = colorsys.rgb_to_hsv(*picture[0, :, y, x].tolist())
            want = colorsys.hsv_to_rgb(0.7 * h, 0.4 * s, min(1, 0.9 * v + 0.05))
            assert got[0, :, y, x].tolist() == pytest.approx(want, abs=1e-9)


def test_sobel_finds_an_edge_and_cut_out_blackens_a_square():
    picture = torch.zeros(1, 3, 8, 8)
    picture[..., 4:] = 0.2
    assert torch.allclose(sobel(picture)[0, 0, :, 3:5], torch.tensor(0.8)) and sobel(picture)[..., 0].max() == 0
    holes = cut_out(torch.ones(2, 3, 100, 100), torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]]))
    assert (holes == 0).sum((1, 2, 3)).tolist() == [3 * 16 * 16, 0]
    assert holes[0, :, 42:58, 42:58].max() == 0


# ---- Optimiser and schedule


@pytest.mark.parametrize("name, decay", [("adam_wd1e-6", 1e-6)])
def test_lars_matches_six_official_steps(gold, name, decay):
    w, b = (torch.tensor(gold[f"lars_{k}0"]).requires_grad_() for k in "wb")
    optimizer = Lars([{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}], lr=4.5e-3)
    for step in range(6):
        w.grad, b.grad = (torch.tensor(gold[f"lars_grad_{k}"][step]) for k in "wb")
        optimizer.step()
        for k, p in (("w", w), ("b", b)):
            assert np.abs(p.grad.numpy() - gold[f"lars_{name}_lr4.5e-3_scaledgrad_{k}"][step]).max() < 1e-12
            assert np.abs(p.detach().numpy() - gold[f"lars_{name}_lr4.5e-3_{k}"][step]).max() < 1e-12
    assert [g["weight_decay"] for g in optimizer.param_groups] == [decay, 0.0]


def test_lars_scaling_of_decayed_gradients_matches_golden(gold):
    """The wrapper's own part at a decay of 0.1, whose inner step there was plain gradient descent."""
    w = torch.tensor(gold["lars_w0"]).requires_grad_()
    for step in range(6):
        optimizer = Lars([{"params": [w], "weight_decay": 0.1}], lr=4.5e-3)
        w.grad = torch.tensor(gold["lars_grad_w"][step])
        optimizer.step()
        assert np.abs(w.grad.numpy() - gold["lars_sgd_wd0.1_lr4.5e-3_scaledgrad_w"][step]).max() < 1e-12
        w.data = torch.tensor(gold["lars_sgd_wd0.1_lr4.5e-3_w"][step])


def test_rate_matches_the_official_schedule(gold):
    got = [lr_at(s, 0.02, 10, 40) for s in range(41)]
    assert np.abs(np.array(got) - gold["lr_w10_m40_base0.02"][:41]).max() < 1e-12
    steps, base = gold["lr_real_steps"], float(gold["lr_real_base"])
    assert base == pytest.approx(1e-4 * math.sqrt(2048))
    for step, value in zip(steps, gold["lr_real_values"]):
        if step <= 8656:                                        # later the official rate rises again
            assert lr_at(int(step), base, 865, 8656) == pytest.approx(float(value), abs=1e-12)


def test_the_peak_rate_follows_the_root_of_the_batch(tmp_path, monkeypatch, capsys):
    peaks = []
    monkeypatch.setattr(peclr, "lr_at", lambda step, peak, warm, total: peaks.append(peak) or 0.0)
    monkeypatch.setattr(peclr, "draw_views", lambda *words: None)
    monkeypatch.setattr(peclr, "training_steps", lambda *words: [(0, [{}])])
    monkeypatch.setattr(peclr, "whole_step", lambda *words: {"loss": torch.zeros(())})
    cfg = Config(batch_size=512, micro_batch=4, epochs=1, cache=str(tmp_path), **TINY)
    peclr.pretrain(cfg, tmp_path, torch.device("cpu"))
    assert peaks == [pytest.approx(4.5e-3 / 2)]
    assert "1,022 negatives" in capsys.readouterr().out


def test_the_loop_sets_the_rate_of_every_step(tmp_path, monkeypatch):
    rates = []

    class Spy(Lars):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(peclr, "Lars", Spy)
    monkeypatch.setattr(peclr, "draw_views", lambda *words: None)
    monkeypatch.setattr(peclr, "whole_step", lambda *words: {"loss": torch.zeros(())})
    cfg = Config(cache=str(tmp_path), epochs=5, warmup_epochs=0.5, batch_size=8, micro_batch=8, lr=1.6, **TINY)   # peak 0.1
    peclr.pretrain(cfg, tmp_path / "run", torch.device("cpu"))
    assert len(rates) == 20 and rates[0] == 0 and rates[1] == pytest.approx(0.1) == rates[2]      # 2 of 20
    assert rates[11] == pytest.approx(0.05) and 0 < rates[-1] < 0.002


@pytest.mark.parametrize("given, epochs, warm", [({}, 100, 10), ({"epochs": 200}, 200, 10), ({"epochs": 5}, 5, 0.5),
                                                  ({"epochs": 5, "warmup_epochs": 4.0}, 5, 4), ({"quick": True}, 2, 0.2)])
def test_a_tenth_of_the_epochs_warms_up_unless_another_warm_up_is_given(given, epochs, warm):
    cfg = settle(Config, given, "pretrain", peclr.QUICK)
    assert (cfg.epochs, cfg.warmup_epochs) == (epochs, warm)


@pytest.mark.parametrize("flags", [["--tau", "0.1"], ["--augment", "blur"], ["--variant", "bgr"], ["--mix", "concat"],
                                   ["--objective", "simclr"]])
def test_a_flag_of_pretraining_is_refused_in_finetuning(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(peclr.UserError, match=f"^{flags[0]}: belongs to pre-training, and this command fine-tunes"):
        peclr.main(["--finetune", "synthetic", "--device", "cpu", *flags])


@pytest.mark.parametrize("flags", [["--freeze"], ["--bone", "index"], ["--two-pass"], ["--label-fraction", "0.5"]])
def test_a_flag_of_finetuning_is_refused_in_pretraining(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(peclr.UserError, match=f"^{flags[0]}: belongs to fine-tuning, and this command pre-trains"):
        peclr.main(["--data", "synthetic", "--device", "cpu", *flags])


def test_mixing_draws_every_source_equally_often_and_no_view_twice():
    order = mixed_order([30, 7], seed=0, epoch=1)
    assert len(order) == 37 and len(order.unique()) == 37
    rows = order % 37
    assert (rows < 30).sum() == 19 and torch.bincount(rows, minlength=37)[30:].tolist().count(3) == 4
    assert torch.bincount(rows)[:30].max() == 1
    assert not torch.equal(order, mixed_order([30, 7], 0, 2)) and not (rows[:19] < 30).all()

    class Numbers(Source):
        batches = read_items

        def __len__(self):
            return 37

        def __getitem__(self, row):
            return {"value": row}

    cfg = Config(batch_size=80, micro_batch=80, workers=0)
    (_, (batch,)), = training_steps(Numbers(), cfg, 1, 0, torch.device("cpu"), order)
    assert len(batch["index"].unique()) == 80 and torch.equal(batch["index"] % 37, batch["value"])


# ---- The large batch


def pretrain_step(net, micro_batches, cfg, epoch):
    """The step that `pretrain` takes of a batch."""
    if "accumulate" in cfg.variant:
        return peclr.accumulated_step(net, micro_batches, cfg, epoch)
    if len(micro_batches) > 1:
        return peclr.cached_step(net, micro_batches, cfg, epoch)
    return peclr.whole_step(net, micro_batches[0], cfg, epoch)


def exact_model(cfg):
    torch.manual_seed(0)
    return PeCLR(cfg).to(EXACT)


def gradients(cfg, micro_batches, monkeypatch):
    model = exact_model(cfg)
    views = peclr.make_views
    monkeypatch.setattr(peclr, "make_views", lambda batch, cfg, epoch: (
        views(batch, cfg, epoch)[0].to(EXACT), views(batch, cfg, epoch)[1]))
    model.train()
    with batch_statistics(model):
        terms = pretrain_step(model, micro_batches, cfg, 0)
    monkeypatch.setattr(peclr, "make_views", views)
    return float(terms["loss"].detach()), [p.grad for p in model.parameters()], model


def split(batch, size):
    n = len(batch["index"])
    return [{k: v[i:i + size] for k, v in batch.items()} for i in range(0, n, size)]


def oracle(cfg, micro_batches):
    """One graph over all micro-batches: each encoded by itself, one loss over all projections."""
    model = exact_model(cfg)
    model.train()
    parts = []
    with batch_statistics(model):
        for batch in micro_batches:
            views, drawn = make_views(batch, cfg, 0)
            p = model(views.to(EXACT).flatten(0, 1)).unflatten(0, (2, -1))
            parts.append(torch.stack([undo_view(p[k], g.angle, g.shift) for k, g in enumerate(drawn)]))
        loss = nt_xent(torch.cat(parts, 1), cfg.tau)
        loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()], model


def test_the_cached_step_equals_one_graph_over_the_whole_batch(monkeypatch):
    cfg = Config(batch_size=12, micro_batch=4, **TINY)
    micro = split(batch_of(12), 4)
    loss, slopes, model = gradients(cfg, micro, monkeypatch)
    true, expected, whole = oracle(cfg, micro)
    assert loss == pytest.approx(true, abs=1e-10)
    assert max(float((a - b).abs().max()) for a, b in zip(slopes, expected)) < 1e-10
    for (name, a), b in zip(model.named_buffers(), whole.buffers()):                 # moved once, not twice
        assert torch.allclose(a, b, atol=1e-12), name


def test_the_simclr_objective_undoes_nothing_even_where_views_turn(monkeypatch):
    """Fig. 5b: both objectives on rotated and shifted views; only Eq. 3 undoes them."""
    batch, same = batch_of(6), dict(augment=("rotation", "translation"), batch_size=6, micro_batch=6, **TINY)
    loss, _, _ = gradients(Config(objective="simclr", **same), [batch], monkeypatch)
    model, (views, drawn) = exact_model(Config(**same)), make_views(batch, Config(**same), 0)
    p = model.train()(views.to(EXACT).flatten(0, 1)).unflatten(0, (2, -1)).detach()
    assert loss == pytest.approx(float(nt_xent(p, 0.5)), abs=1e-9)
    undone = torch.stack([undo_view(p[k], g.angle, g.shift) for k, g in enumerate(drawn)])
    other, _, _ = gradients(Config(**same), [batch], monkeypatch)
    assert other == pytest.approx(float(nt_xent(undone, 0.5)), abs=1e-6) and abs(other - loss) > 1e-3


def test_accumulated_losses_see_only_their_micro_batch(monkeypatch):
    cfg = Config(batch_size=12, micro_batch=4, variant=("accumulate",), **TINY)
    micro = split(batch_of(12), 4)
    loss, slopes, _ = gradients(cfg, micro, monkeypatch)
    found = [oracle(cfg, [batch]) for batch in micro]
    each = [f[0] for f in found]
    assert loss == pytest.approx(sum(each) / 3, abs=1e-6)
    for got, *want in zip(slopes, *(f[1] for f in found)):
        assert torch.allclose(got, sum(want) / 3, atol=1e-9)
    assert abs(loss - oracle(cfg, micro)[0]) > 0.5                                   # ln 7 against ln 23


def a_step():
    """Loss, gradients and statistics of four micro-batches in float64, shared out to the processes."""
    device = common.start("cpu")
    cfg = Config(batch_size=8, micro_batch=2, **TINY)
    torch.manual_seed(0)
    model = PeCLR(cfg).double()
    peclr.make_views = lambda *given: (lambda views, drawn: (views.double(), drawn))(*make_views(*given))
    net = common.parallel(model, device, False)
    torch.manual_seed(3)
    image, uv = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8), 24 + 6 * torch.randn(8, 21, 2)
    mine = [torch.arange(2 * k, 2 * k + 2) for k in common.share(8, 2)]
    micro = [{"image": image[i], "uv": uv[i], "index": i, "crop": torch.eye(3).expand(2, 3, 3)} for i in mine]
    model.train()
    with batch_statistics(model):
        terms = peclr.cached_step(net, micro, cfg, 0) if len(micro) > 1 else peclr.whole_step(net, micro[0], cfg, 0)
    return {"loss": terms["loss"].detach(), "grads": [p.grad for p in model.parameters()], "buffers": dict(model.named_buffers())}


def test_one_two_and_four_processes_have_equal_loss_gradients_and_statistics(tmp_path):
    found = [on_processes(tmp_path, count, a_step)[0] for count in (1, 2, 4)]     # four: one micro-batch each, the plain form
    for other in found[1:]:
        assert float((other["loss"] - found[0]["loss"]).abs()) < 1e-10
        assert max(float((a - b).abs().max()) for a, b in zip(other["grads"], found[0]["grads"])) < 1e-10
        assert max(float((b - found[0]["buffers"][k]).abs().max()) for k, b in other["buffers"].items()) < 1e-12


def test_bfloat16_is_for_the_network_only(monkeypatch):
    cfg = Config(**TINY, precision="bf16")
    seen = []
    monkeypatch.setattr(peclr, "undo_view", lambda p, *rest: seen.append(p.dtype) or undo_view(p, *rest))
    model, inside = PeCLR(cfg), []
    model.backbone.conv1.register_forward_hook(lambda module, given, out: inside.append(out.dtype))
    terms = pretrain_step(model, [batch_of(4)], cfg, 0)
    assert seen == [torch.float32] * 2 and terms["loss"].dtype == torch.float32 and inside == [torch.bfloat16]


# ---- 2.5D: depth of the root, targets, lifting


def test_root_depth_and_lifting_match_the_loader_s_golden(gold):
    """Root wrist, unit wrist to index MCP: noisy 2.5D hands of the authors' loader, in AIT order."""
    order, c = list(RELEASED), CONVENTIONS["index"]
    for clean in ("d25n", "d25"):
        points = torch.tensor(gold[f"{clean}_joints25d"]).double()[:, order]
        K = torch.tensor(gold["hand_K"])
        rays = ((points[..., :2] - K[:, None, :2, 2]) / torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)[:, None])
        root = root_depth(rays, points[..., 2], c.bone, c.floor)
        want = gold[f"{clean}_zroot"]
        assert np.abs(root.numpy() - want).max() < (2e-6 if clean == "d25n" else 1e-4)
    joints = lift(rays, points[..., 2], torch.tensor(gold["d25_zroot"])) * torch.tensor(gold["d25_scale"])[:, None, None]
    assert np.abs(joints.numpy() - gold["d25_back3d"][:, order]).max() < 1e-5
    assert np.abs(joints.numpy() - gold["hand_xyz_freihand"]).max() < 1e-5


def released(gold, d=512):
    """A checkpoint with the keys and shapes of the release's fine-tuned networks."""
    torch.manual_seed(0)
    encoder = HandNet(Config(**TINY)).backbone.state_dict()
    state = {f"backend_model.{k}": torch.randn_like(v) if v.is_floating_point() else v for k, v in encoder.items()}
    state |= {"backend_model.fc.weight": torch.randn(64, d), "backend_model.fc.bias": torch.randn(64)}
    state |= {f"zroot_ref.{k.removeprefix('rn_sd.')}": torch.tensor(gold[k]) for k in gold.files if k.startswith("rn_sd.")}
    return {"state_dict": state}


def test_released_networks_load_and_lift_as_the_official_code_does(gold, tmp_path):
    torch.save(released(gold), tmp_path / "released.pth")
    model = HandNet(Config(**TINY))
    assert "put into our order" in load_released(model, str(tmp_path / "released.pth"))
    model.double().eval()
    out = torch.tensor(gold["rn_clean_out64"])[:, :63].unflatten(1, (21, 3))[:, list(RELEASED)].clone()
    out[:, 0, 2] = 0
    rays, root = model.depth(out, torch.tensor(gold["hand_K"]))
    assert np.abs(root.detach().numpy() - gold["rn_clean_seedMLP_zroot"]).max() < 1e-9
    joints = lift(rays, out[..., 2], root).detach().numpy()
    assert np.abs(joints - gold["rn_clean_seedMLP_kp3d"][:, list(RELEASED)]).max() < 1e-9
    for p in model.refine[-1].parameters():
        p.data.zero_()
    rays, root = model.depth(out, torch.tensor(gold["hand_K"]))
    assert np.abs(root.detach().numpy() - gold["rn_clean_zeroMLP_zroot"]).max() < 1e-9
    metres = lift(rays, out[..., 2], root) * torch.tensor(gold["rn_scale_bone"])[:, None, None]
    assert np.abs(metres.detach().numpy() - gold["rn_xyz_palm_ait"][:, list(RELEASED)]).max() < 1e-9


@pytest.mark.parametrize("prefix, extra", [("", {"fc.weight": (1000, 512), "fc.bias": (1000,)}),       # pre-trained
                                           ("backend_model.", {"backend_model.fc.weight": (64, 512), "backend_model.fc.bias": (64,)})])
def test_released_encoders_load_whole(tmp_path, prefix, extra):
    """Plain torchvision keys under "state_dict", with or without the fine-tuned networks' prefix."""
    torch.manual_seed(5)
    true = {k: torch.randn(v.shape) for k, v in HandNet(Config(**TINY)).backbone.state_dict().items() if "num_b" not in k}
    content = {prefix + k: v for k, v in true.items()} | {k: torch.zeros(shape) for k, shape in extra.items()}
    torch.save({"state_dict": content}, tmp_path / "encoder.pth")
    backbone = HandNet(Config(**TINY)).backbone
    assert "ignored 2" in load_backbone(backbone, tmp_path / "encoder.pth")
    assert all(torch.equal(v, true[k]) for k, v in backbone.state_dict().items() if k in true)
    content.pop(prefix + "layer2.0.bn1.bias")
    torch.save({"state_dict": content}, tmp_path / "less.pth")
    with pytest.raises(peclr.UserError, match="lacks 1 of"):
        load_backbone(backbone, tmp_path / "less.pth")


def test_a_transformer_gives_its_class_token():
    model = PeCLR(Config(backbone="vit_mini", image_size=32)).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(peclr.encode(model.backbone, images), model.backbone.tokens(images)[:, 0])
    assert model(images).shape == (2, 128)


def test_a_released_head_gives_the_outputs_of_its_own_rows(gold, tmp_path):
    """Row 3 k of the released layer is u of the release's joint k, so of our joint RELEASED.index(k)."""
    content = released(gold)
    torch.save(content, tmp_path / "released.pth")
    model = HandNet(Config(**TINY)).eval()
    load_released(model, str(tmp_path / "released.pth"))
    f = torch.randn(2, 512)
    raw = f @ content["state_dict"]["backend_model.fc.weight"].T + content["state_dict"]["backend_model.fc.bias"]
    got = model.head(f).unflatten(1, (21, 3))
    for ours, theirs in enumerate(RELEASED):
        assert torch.allclose(got[:, ours], raw[:, 3 * theirs:3 * theirs + 3], atol=1e-5)


def test_a_released_network_is_not_read_under_the_other_convention(gold, tmp_path):
    torch.save(released(gold), tmp_path / "released.pth")
    with pytest.raises(peclr.UserError, match="needs --bone middle"):
        load_released(HandNet(Config(bone="index", **TINY)), str(tmp_path / "released.pth"))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "encoder.pth")
    assert load_released(HandNet(Config(**TINY)), str(tmp_path / "encoder.pth")) == ""


def test_the_release_s_joint_order_is_the_golden_one(gold):
    assert list(RELEASED) == gold["map_ait_freihand"].tolist()
    assert np.array_equal(gold["hand_xyz_ait"][:, list(RELEASED)], gold["hand_xyz_freihand"])


def test_the_wrist_comes_back_from_the_palm_as_in_the_release(gold):
    """Its post-processing in its own joint order, where the middle MCP is joint 3; then FreiHAND's order."""
    palm = torch.tensor(gold["post_palm_ait_in"])[None][:, list(RELEASED)]
    back = with_wrist(palm, CONVENTIONS["middle"])
    assert np.abs(back[0].numpy() - gold["post_freihand_order"]).max() < 1e-12
    assert np.abs(back[0, 0].numpy() - gold["post_wrist_ait"][0]).max() < 1e-12
    assert torch.allclose(with_root(back, CONVENTIONS["middle"]), palm)


def test_root_depth_keeps_its_floors_where_the_quadratic_fails():
    """Both ends of the bone on one ray: a = 0; and a bone longer than 1 at every depth: no real solution."""
    rays, d = torch.zeros(2, 21, 2), torch.zeros(2, 21)
    d[1, 9], d[1, 10] = -3.0, 3.0
    rays[1, 10, 0] = 0.5
    root = root_depth(rays, d, (9, 10), 1e-8)
    # typed from the formula: a = b = 0, c = -1, both floors; a = .25, b = 1.5, c = 2.25 + 36 - 1
    assert float(root[0]) == pytest.approx(math.sqrt(1e-8) / 2e-8, rel=1e-4)
    assert float(root[1]) == pytest.approx((-1.5 + math.sqrt(1e-8)) / 0.5, rel=1e-4)
    model = HandNet(Config(**TINY)).eval()
    for p in model.refine[-1].parameters():
        p.data.zero_()
    out = torch.cat([rays, d[..., None]], -1)
    assert model.depth(out, torch.eye(3).expand(2, 3, 3))[1].tolist() == [50.0, 4.0]        # clamped


@pytest.mark.parametrize("bone", ["middle", "index"])
def test_targets_lift_back_to_the_true_hand(hands, bone):
    c = CONVENTIONS[bone]
    A = translation(torch.tensor([[3.0, -5.0]])) @ rotation(torch.tensor([0.4]), 32)
    target, root, unit = pose_25d(hands, A, c)
    K = A @ hands["K"]
    rays = (torch.linalg.inv(K)[:, None] @ F.pad(target[..., :2], (0, 1), value=1.0)[..., None])[..., :2, 0]
    joints = with_wrist(lift(rays, target[..., 2], root), c) * unit[:, None, None]
    assert (joints - hands["joints"]).abs().max() < 1e-5
    closed = root_depth(rays.double(), target[..., 2].double(), c.bone, c.floor)
    assert (closed / root - 1).abs().max() < 2e-3                    # the quadratic finds the true depth
    assert (target[:, c.bone[1], 2] - target[:, c.bone[0], 2]).abs().max() <= 1.001
    assert torch.equal(target[:, 0, 2], torch.zeros(16))


def test_losses_match_golden_where_joints_are_missing(gold):
    pred, true = torch.tensor(gold["l1_pred25d"]), torch.tensor(gold["d25_joints25d"]).double()
    flat, deep = pose_loss(pred, true)
    assert [float(flat), float(deep)] == pytest.approx(gold["l1_out_allvalid"][:2].tolist(), abs=5e-7)
    valid = torch.tensor(gold["l1_valid"]) > 0
    flat, deep = pose_loss(pred, true.where(valid, math.nan))
    assert [float(flat), float(deep)] == pytest.approx(gold["l1_out_2d_z_zunscaled"][:2].tolist(), abs=5e-7)
    assert float(flat) == pytest.approx(1.0986396, abs=1e-6) and float(deep) == pytest.approx(0.0819556, abs=1e-6)


class Oracle(torch.nn.Module):
    """Stands where encoder and head are: returns given 2.5D outputs, whatever it sees."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, images):
        return self.out.flatten(1)


@pytest.mark.parametrize("bone", ["middle", "index"])
def test_true_outputs_are_predicted_as_the_true_hand(hands, bone, monkeypatch):
    """From 2.5D truth in the network's crop to metres in the camera frame and px of image, wrist included."""
    cfg = Config(bone=bone, **TINY)
    model = HandNet(cfg).eval()
    for p in model.refine[-1].parameters():
        p.data.zero_()
    _, A = hand_view(hands["image"], cfg)
    target, _, _ = pose_25d(hands, A, CONVENTIONS[bone])
    monkeypatch.setattr(peclr, "encode", lambda backbone, images: target.flatten(1))
    model.head = torch.nn.Identity()
    pred = model.predict({k: hands[k] for k in HandNet.USES})
    assert (pred["uv"] - hands["uv"]).abs().max() < 0.05
    assert (pred["joints"] - hands["joints"]).abs().max() < 0.01
    assert torch.equal(pred["root"], pred["joints"][:, 0])
    model.unit.fill_(0.05)
    blind = model.predict({k: hands[k] for k in HandNet.USES} | {"scale": torch.ones(16)})   # not known
    length = (blind["joints"][:, 10] - blind["joints"][:, 9]).norm(dim=1)
    assert torch.allclose(length, torch.full((16,), 0.05), atol=1e-3)


def test_the_second_pass_crops_around_the_first_prediction(hands, monkeypatch):
    """Release's rule: the box of the predicted points fills 70 % of the second crop."""
    cfg = Config(two_pass=True, **TINY)
    model, crops = HandNet(cfg).eval(), []
    points = torch.tensor([[10.0, 12.0]]).expand(21, 2).clone()
    points[1] = torch.tensor([20.0, 16.0])                                  # box 10 x 4 px around (15, 14)
    out = F.pad(points, (0, 1)).flatten()
    monkeypatch.setattr(peclr, "encode", lambda backbone, images: images.flatten(1)[:, :1] * 0 + out)
    monkeypatch.setattr(peclr, "warp", lambda image, A, size: crops.append(A) or torch.zeros(len(image), 3, size, size))
    model.head = torch.nn.Identity()
    model.predict({k: hands[k] for k in HandNet.USES})
    first, second = crops
    back = torch.linalg.inv(first)[0]
    corners = torch.tensor([[10.0, 12.0, 1], [20.0, 16.0, 1]]) @ back.T @ second[0].T
    assert torch.allclose((corners[1] - corners[0])[:2], torch.tensor([0.7 * 32, 0.28 * 32]), atol=1e-3)
    assert torch.allclose(corners.mean(0)[:2], torch.tensor([15.5, 15.5]), atol=1e-3)


def test_a_frozen_encoder_does_not_move_nor_does_its_batchnorm(hands):
    cfg = Config(freeze=True, **TINY)
    model = HandNet(cfg).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    peclr.finetune_step(model, hands, cfg, 0)["loss"].backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert len(model.head) == 3 and model.head[0].weight.grad.abs().sum() > 0       # a two-layer head that learns
    assert len(HandNet(Config(**TINY)).head) == 1                                   # one linear layer end to end


def test_the_loss_is_equation_5_and_the_root_s_depth(hands):
    """2D 1, depth 5, root 1, each term by a loop."""
    cfg = Config(**TINY)
    torch.manual_seed(0)
    model = HandNet(cfg).eval()
    batch = {k: v[:6] for k, v in hands.items() if isinstance(v, torch.Tensor)}
    terms = peclr.finetune_step(model, batch, cfg, 0)
    crops, A = hand_view(batch["image"], cfg, 0, batch["index"])
    out, _, root = model(crops, A @ batch["K"])
    target, depth, _ = pose_25d(batch, A, CONVENTIONS["middle"])
    flat = sum(float((out[i, j, k] - target[i, j, k]).abs()) for i in range(6) for j in range(21) for k in (0, 1)) / (6 * 21 * 2)
    deep = sum(float((out[i, j, 2] - target[i, j, 2]).abs()) for i in range(6) for j in range(21)) / (6 * 21)
    far = sum(float((root[i] - depth[i]).abs()) for i in range(6)) / 6
    assert float(terms["loss"]) == pytest.approx(flat + 5 * deep + far, rel=1e-4)


def test_a_random_frozen_encoder_gets_batchnorm_statistics(tmp_path):
    """Without them a deep random ResNet's features grow by orders of magnitude: they must be of order one."""
    data = Synthetic(48, 64, 0, "train", calm=True, margin=peclr.MARGIN)
    torch.manual_seed(0)
    model = HandNet(Config(freeze=True, **(TINY | {"backbone": "resnet50"})))
    images = hand_view(data.batch(torch.arange(16))["image"], model.cfg)[0]
    model.eval()
    before = peclr.encode(model.backbone, images).std()
    peclr.settle_statistics(model, data, torch.device("cpu"))
    after = peclr.encode(model.eval().backbone, images).std()
    assert before > 2 and 0.3 < after < 1.5
    assert {m.momentum for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_samples_without_a_label_do_not_count(hands):
    cfg = Config(**TINY)
    torch.manual_seed(0)
    model = HandNet(cfg).eval()                                                     # BatchNorm must not mix samples
    few = {k: v[:8] for k, v in hands.items() if isinstance(v, torch.Tensor)}
    blank = {k: v.clone() for k, v in few.items()}
    for key in ("uv", "joints"):
        blank[key][:] = math.nan
    blank["joints_ok"][:] = False
    both = {k: torch.cat([few[k], blank[k]]) for k in few}
    slopes, found = [], []
    for batch in (few, both):
        model.zero_grad()
        found.append(peclr.finetune_step(model, batch, cfg, 0))
        found[-1]["loss"].backward()
        slopes.append([p.grad.clone() for p in model.parameters()])
    for name in found[0]:
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-5), name
    assert all(torch.allclose(a, b, atol=1e-4 * float(a.abs().max()) + 1e-7) for a, b in zip(*slopes))


def test_refinement_does_not_reach_the_encoder(hands):
    cfg = Config(**TINY)
    model = HandNet(cfg).train()
    crops, A = hand_view(hands["image"], cfg)
    _, _, root = model(crops, A @ hands["K"])
    root.sum().backward()
    assert model.head[-1].weight.grad is None and model.refine[0].weight.grad.abs().sum() > 0


def test_the_head_starts_at_the_training_set_s_mean(tmp_path):
    from sources.stages import mean_hand
    data = Synthetic(48, 64, 0, "train", calm=True, margin=peclr.MARGIN)
    model = HandNet(Config(**TINY))
    peclr.start_at_mean(model, data, mean_hand(data))
    batch = data.batch(torch.arange(64))
    _, A = hand_view(batch["image"], model.cfg)
    target, _, unit = pose_25d(batch, A, model.convention)
    bias = model.head[-1].bias.unflatten(0, (21, 3))
    assert (bias - target.mean(0)).abs()[:, :2].max() < 0.5 and (bias - target.mean(0)).abs()[:, 2].max() < 0.1
    assert float(model.unit) == pytest.approx(float(unit.mean()), rel=1e-5)


def test_sets_sorted_by_subject_are_read_from_end_to_end(tmp_path, monkeypatch):
    """The mean bone of 8,192 hands, small ones first; the statistics of a random encoder from 300 pictures."""
    class Sorted:
        def __len__(self):
            return 8192

        def targets(self, rows):
            joints = torch.zeros(len(rows), 21, 3)
            joints[:, 10, 0] = 0.02 + 0.02 * (rows >= 4096)
            return {"joints": joints}

    model = HandNet(Config(**TINY))
    peclr.start_at_mean(model, Sorted(), {"joints": torch.zeros(21, 3), "uv": torch.zeros(21, 2)})
    assert float(model.unit) == pytest.approx(0.03, abs=1e-4)
    plans = []
    monkeypatch.setattr(peclr, "batches", lambda data, plan, device, workers: plans.extend(plan) or [])
    peclr.settle_statistics(model, range(300), torch.device("cpu"))
    rows = torch.cat(plans)
    assert [len(plan) for plan in plans] == [32] * 8 and rows[0] == 0 and rows[-1] == 299 and rows.diff().max() == 2


def test_fine_tuning_views_turn_and_shift_as_drawn(hands):
    cfg = Config(**TINY)
    _, A = hand_view(hands["image"], cfg, 3, hands["index"])
    angle = torch.atan2(A[:, 0, 1], A[:, 0, 0])
    assert angle.abs().max() <= math.pi / 4 and angle.std() > 0.2
    size = A[:, 0, :2].norm(dim=1)
    assert torch.allclose(size, torch.full_like(size, 32 / (48 / 2.2 / 0.7)))
    _, still = hand_view(hands["image"], cfg)
    assert still[:, 0, 1].abs().max() == 0 and torch.allclose(still[:, 0, 0], size)


# ---- Command line


def test_peclr_s_paper_values_are_those_of_the_page():
    """Typed from Sec. 4.1 and 4.6: 128 px then 224, ResNet-152, batch 2048, rates 4.5e-3 and 5e-4."""
    import common
    fields = {f.name: f.metadata for f in dataclasses.fields(Config)}
    paper = {k: m["paper"] for k, m in fields.items() if m["paper"] is not common.SILENT}
    assert paper == {"backbone": "resnet152", "image_size": 128, "batch_size": 2048, "lr": 4.5e-3, "objective": "peclr",
                     "augment": ("scale", "rotation", "translation", "colour-jitter"), "freeze": False}
    tuned = {k: m["finetune_paper"] for k, m in fields.items() if m["finetune_paper"] is not common.SILENT}
    assert tuned == {"image_size": 224, "lr": 5e-4}


def test_a_run_broken_off_repeats_a_straight_one_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "synthetic:calm", *TUNE, "--cache", "c", "--epochs", "2", "--save-minutes", "0.0001"]
    peclr.main([*words, "--out", "straight"])

    def crash(step, *words):
        if step == 9:                                                 # in the second epoch, between two saves
            raise RuntimeError("power cut")
        return lr_at(step, *words)

    monkeypatch.setattr(peclr, "lr_at", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        peclr.main([*words, "--out", "broken"])
    monkeypatch.setattr(peclr, "lr_at", lr_at)
    peclr.main(["--out", "broken", "--resume"])
    one, two = (torch.load(tmp_path / n / "pretrain-peclr" / "last.pt") for n in ("straight", "broken"))
    assert one["step"] == two["step"] == 12
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    files = {p.name for p in (tmp_path / "straight" / "pretrain-peclr").iterdir()}
    assert {"last.pt", "log.jsonl", "config.json", "views.png", "transformations.png"} <= files


def test_fine_tuning_ends_in_a_table_and_eval_judges_it_and_a_random_encoder_frozen_by_the_command_is_settled(tmp_path, monkeypatch, capsys):
    import eval as judge
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 16, "test": 32})
    peclr.main(["--data", "synthetic:calm", *TUNE, "--cache", "c", "--epochs", "0", "--out", "pre"])
    tune = [*TUNE, "--finetune", "synthetic:calm", "--init", "pre/backbone.pt", "--cache", "c", "--epochs", "1"]
    peclr.main([*tune, "--out", "tuned"])
    assert "peclr-on-synthetic-calm: from pre/backbone.pt, pre-trained on synthetic:calm from random weights" in capsys.readouterr().out
    rows = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["results"][0]["rows"]
    assert {"mpjpe_mm", "pa_mpjpe_mm", "abs_mpjpe_mm", "auc", "epe_2d_px"} <= set(rows["peclr-on-synthetic-calm"])
    peclr.main([*tune, "--freeze", "--out", "frozen"])
    settled = []
    monkeypatch.setattr(peclr, "settle_statistics", lambda *words: settled.append(1))
    peclr.main([*TUNE, "--finetune", "synthetic:calm", "--cache", "c", "--epochs", "0", "--freeze", "--out", "blind"])
    assert settled == [1]                                                   # a random encoder only, below
    frozen = json.loads((tmp_path / "frozen" / "metrics.json").read_text())["results"][0]["rows"]
    row = frozen["peclr-on-synthetic-calm"]
    assert {"mpjpe_mm_frozen", "epe_2d_px_crop_frozen"} <= set(row) and "mpjpe_mm" not in row
    judge.main(["frozen"])                                                  # told from an encoder that was tuned
    assert "peclr-on-synthetic-calm-frozen" in json.loads((tmp_path / "frozen" / "eval-synthetic-calm" / "metrics.json").read_text())["results"][0]["rows"]
    judge.main(["tuned"])
    assert "the network sees K, image, scale" in capsys.readouterr().out
    again = json.loads((tmp_path / "tuned" / "eval-synthetic-calm" / "metrics.json").read_text())["results"][0]["rows"]
    two, one = (each["peclr-on-synthetic-calm"]["abs_mpjpe_mm"] for each in (again, rows))
    assert two == pytest.approx(one, abs=1e-6)


def test_quick_tunes_what_it_pretrained_and_explicit_flags_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = []
    monkeypatch.setattr(peclr, "pretrain", lambda cfg, out, device: stages.append(cfg))
    monkeypatch.setattr(peclr, "finetune", lambda cfg, out, row, device: stages.append((row, cfg)))
    monkeypatch.setattr(peclr, "report", lambda cfg, folder, row, *rest: stages.append((folder.name, row)))
    peclr.main(["--quick", "--finetune", "synthetic:B", "--lr", "0.25", "--device", "cpu"])
    first, (row, tuned), told = stages
    assert (first.objective, first.data, first.epochs, first.samples) == ("peclr", ("synthetic:calm",), 2, 3072)
    assert (tuned.freeze, Path(tuned.init).name, tuned.finetune, tuned.lr) == (False, "backbone.pt", "synthetic:B", 0.25)
    assert told == (f"finetune-{row}", row)
    stages.clear()
    peclr.main(["--finetune", "synthetic", "--freeze", "--device", "cpu", "--out", "x"])
    assert stages[0][1].epochs == 50 and stages[0][1].lr == 5e-4 and stages[1] == ("probe-scratch", "scratch")


def test_stage_name_and_its_twin_of_handmim_agree():
    assert inspect.getsource(peclr.stage_name) == inspect.getsource(handmim.stage_name)
    assert peclr.stage_name(Config(objective="simclr", variant=("bgr", "accumulate"))) == "simclr-bgr-accumulate"


def test_label_fractions_are_nested_and_by_seed(tmp_path):
    """Fig. 6: the 20 % lie inside the 40 %, and another seed draws others."""
    cfg = Config(cache=str(tmp_path), **TINY)
    rows = lambda share, seed: set(open_data(dataclasses.replace(cfg, label_fraction=share, seed=seed), (
        "synthetic:calm",), "train", 48, 2.2, torch.device("cpu"), labelled=True, live=True).rows.tolist())
    assert len(rows(0.2, 0)) == 7 and rows(0.2, 0) < rows(0.4, 0) and rows(0.2, 0) != rows(0.2, 1)


def freihand_tree(root, training=3, evaluation=4):
    """FreiHAND's official layout with literal numbers: three hands in four pictures each, four to be judged."""
    import PIL.Image
    K, xyz = [[500, 0, 112], [0, 500, 112], [0, 0, 1]], [[0.004 * j - 0.04, 0.0002 * j * j - 0.04, 0.7 + 0.001 * j] for j in range(21)]
    entry = {"K": K, "xyz": xyz, "verts": [[0.0, 0.0, 0.7]] * 778, "mano": [[0.0] * 61], "scale": 0.03}
    for home, count, variants in (("training", training, 4), ("evaluation", evaluation, 1)):
        (root / home / "rgb").mkdir(parents=True)
        for variant in range(variants):
            for number in range(count):
                picture = PIL.Image.new("RGB", (224, 224), (40 * number, 30 * variant, 90))
                picture.save(root / home / "rgb" / f"{number + 32560 * variant:08d}.jpg")
        for kind, value in entry.items():
            (root / f"{home}_{kind}.json").write_text(json.dumps([value] * count))
    return root


def test_a_label_fraction_of_freihand_keeps_all_backgrounds_of_a_hand(tmp_path):
    """Three hands, four pictures each, numbered id + 32560 x variant: one of three labels is four pictures."""
    cfg = Config(label_fraction=0.3, root=str(freihand_tree(tmp_path / "f")), cache=str(tmp_path / "c"), **TINY)
    data = open_data(cfg, ("freihand",), "train", 48, 2.2, torch.device("cpu"), labelled=True)
    ids = next(data.batches([torch.arange(len(data))], torch.device("cpu"), 0))["id"]
    assert len({int(name[-12:-4]) % 32560 for name in ids}) == 1 and len(ids) == 4


def test_the_central_crop_needs_no_truth(tmp_path):
    """`freihand:centre`: 73.92 px around (112, 112) edges where `freihand` takes the true joints' box."""
    cfg = Config(root=str(freihand_tree(tmp_path / "f")), cache=str(tmp_path / "c"), **TINY)
    for part, source in (("freihand", "joints"), ("freihand:centre", "data set")):
        data = open_data(cfg, (part,), "test", 48, 2.2, torch.device("cpu"))
        scale = float(data[0]["crop"][0, 0])
        assert data.box_source == source
        assert (scale == pytest.approx(48 / (2.2 * 73.92), rel=1e-5)) == (part != "freihand")


def test_a_released_network_is_scored_untrained_and_writes_the_server_s_file(gold, tmp_path, monkeypatch, capsys):
    """ResNet-50 with the release's 336 entries, --epochs 0: finetune.pt is that network; eval.py submits it."""
    import zipfile

    import eval as judge
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    true = {k: v * 1.01 if v.is_floating_point() else v for k, v in HandNet(Config(backbone="resnet50", image_size=32)).backbone.state_dict().items()}
    state = {f"backend_model.{k}": v for k, v in true.items()}
    state |= {"backend_model.fc.weight": 0.01 * torch.randn(64, 2048), "backend_model.fc.bias": 16 + torch.randn(64)}
    state |= {f"zroot_ref.{k.removeprefix('rn_sd.')}": torch.tensor(gold[k]) for k in gold.files if k.startswith("rn_sd.")}
    assert len(state) == 336
    torch.save({"state_dict": state}, "released.pth")
    freihand_tree(tmp_path / "data" / "freihand")
    peclr.main(["--init", "released.pth", "--finetune", "freihand:centre", "--two-pass", "--backbone", "resnet50",
                "--image-size", "32", "--batch-size", "4", "--micro-batch", "4", "--epochs", "0", "--workers", "0", "--device", "cpu", "--out", "run"])
    kept = torch.load("run/finetune.pt")["model"]
    assert torch.equal(kept["head.0.bias"][3:6], state["backend_model.fc.bias"][3:6])          # thumb's MCP is their joint 1
    assert torch.equal(kept["head.0.bias"][6:9], state["backend_model.fc.bias"][18:21])        # its PIP their joint 6
    assert torch.equal(kept["backbone.conv1.weight"], true["conv1.weight"])
    judge.main(["run", "--submit", "--workers", "0", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "freihand: mesh scores are not applicable" in said and "4 samples scored" in said
    with zipfile.ZipFile(tmp_path / "run" / "eval-freihand-centre" / "pred.zip") as archive:
        xyz, verts = json.loads(archive.read("pred.json"))
    assert np.array(xyz).shape == (4, 21, 3) and np.array(verts).shape == (4, 778, 3)
    results = json.loads((tmp_path / "run" / "eval-freihand-centre" / "metrics.json").read_text())["results"]
    assert {r["protocol"] for r in results} == {"ours", "freihand", "peclr"}
    for file in tmp_path.glob("data/freihand/evaluation_[xmv]*"):
        file.unlink()
    judge.main(["run", "--submit", "--workers", "0", "--device", "cpu", "--out", "blind"])      # no truth: no score
    assert {p.name for p in (tmp_path / "blind").iterdir()} == {"pred.zip", "samples.png"}
