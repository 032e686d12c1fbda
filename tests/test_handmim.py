"""HandMIM: views and their inverse, masks, losses, teacher, decoder, rectifiers, the command line.

golden/handmim.npz is made by the official iBOT, MAE, SimMIM and PyMAF code. Not in it, for no function
of ours computes it: iBOT's local crops, DINOLoss, the resizing of timm and DINO, SimMIM's decoder, MAE's
pixel loss, PyMAF's regressor, mean parameters, grid and axis-angle; and, for size, ViT-B and -L, the
teacher's weights, the first two calls of the loss.
"""
import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import handmim
from common import (
    Mano, UserError, ViT, axis_angle_to_matrix, matrix_to_six_d, rotate_z,
    rotation, settle, six_d_to_matrix, transform, warp)
from group import on_processes
from hand.builtin import builtin_hand
from handmim import (Config, Decoder, HandMIM, HandNet, Head, PointMlp, View, block_mask, cosine,
                     crop_intrinsics, draw_masks, draw_paths, draw_view, draw_views, finetune_step, in_latent_units, lr_at,
                     make_views, move, patch_loss, pose_loss, pretrain_step, random_mask,
                     recon_loss, sample, taps_of, teacher_tau, undo, update_centre, walk)

ROOT = Path(__file__).parent.parent
EXACT = torch.float64
TINY = dict(backbone="vit_mini", image_size=32, batch_size=4, micro_batch=4, prototypes=16, head_hidden=16,
            decoder_width=4)


def batch_of(n=4, size=48):
    torch.manual_seed(3)
    return {"image": torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8),
            "index": torch.arange(n)}


@pytest.fixture
def double():
    torch.set_default_dtype(EXACT)
    yield
    torch.set_default_dtype(torch.float32)


# ---- Options


def test_defaults_match_the_paper_or_say_why():
    for field in dataclasses.fields(Config):
        note = field.metadata
        assert note["help"], field.name
        if note["paper"] is not common.SILENT:
            assert note["ref"], f"{field.name}: a paper's value without its place"
            assert field.default == note["paper"] or note["why"], f"{field.name}: differs without a why"
        elif field.name not in common.Flags.__dataclass_fields__ and field.name != "variant":
            assert note["why"], f"{field.name}: the paper is silent, and so are we"
        if note["finetune"] is not common.SILENT:
            assert note["finetune_why"] or note["finetune"] == note["finetune_paper"], field.name


def test_paper_values_are_those_of_sections_3_1_and_3_2():
    """Typed from the page: 1,024 and 2e-3 for 400 epochs; 128 and 4e-5 for 100 epochs at 224 px."""
    before, after = settle(Config, {}, "pretrain", {}), settle(Config, {}, "finetune", {})
    assert (before.batch_size, before.lr, before.epochs) == (1024, 2e-3, 400)
    assert (after.batch_size, after.lr, after.epochs, after.image_size) == (128, 4e-5, 100, 224)
    assert handmim.MASK_RATIO == (0.1, 0.5) and handmim.LATENT == (128, 2)
    assert taps_of(12, 4, ()) == [3, 6, 9, 12] == taps_of(24, 4, ("printed-taps",))
    assert taps_of(24, 4, ()) == [6, 12, 18, 24]


# ---- Views: Eq. 3 and 4


def drawn(n=64, variant=()):
    """Views of n samples in float64, and 21 points each within the source square."""
    cfg = Config(**TINY, variant=variant)
    view = View(*(x.to(EXACT) for x in draw_view(torch.arange(n), 0, 48, cfg, 0)))
    torch.manual_seed(1)
    return view, torch.rand(n, 21, 2, dtype=EXACT) - 0.5


def test_undoing_what_a_view_did_gives_the_points_back():
    view, points = drawn()
    assert (undo(move(points, view), view) - points).abs().max() < 1e-12
    assert (move(undo(points, view), view) - points).abs().max() < 1e-12
    # in latent units: a view side is the points' own range, here gamma x that of the source's points
    unit = (points.amax(1) - points.amin(1)) * view.gamma[:, None]
    moved = move(points, view._replace(shift=view.shift * unit))
    assert (undo(moved, in_latent_units(view, moved)) - points).abs().max() < 1e-12


def test_the_order_the_centre_and_the_shift_all_matter():
    """What Eq. 4 turns into under three misreadings; each leaves an error of a tenth of the square."""
    view, points = drawn()
    q, gamma = move(points, view), view.gamma[:, None, None]
    c, s = view.angle.cos(), view.angle.sin()
    back = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)       # R^-1, y down
    error = lambda p: float((p - points).norm(dim=-1).mean())
    right = (q @ back.mT + view.shift[:, None]) / gamma
    assert error(right) < 1e-12
    swapped = (q + view.shift[:, None]) @ back.mT / gamma                              # shift first
    corner = ((q + 0.5) @ back.mT - 0.5 + view.shift[:, None]) / gamma                 # about the corner
    dropped = q @ back.mT / gamma
    assert min(error(swapped), error(corner), error(dropped)) > 0.1
    middle = (view.shift / view.gamma[:, None]).norm(dim=-1).mean()
    assert error(dropped) == pytest.approx(float(middle), rel=1e-9)


def test_the_undone_latent_follows_the_scale_of_the_latent():
    view, points = drawn()
    undone = undo(points, in_latent_units(view, points))
    assert torch.allclose(undo(7 * points, in_latent_units(view, 7 * points)), 7 * undone)


def test_pictures_move_as_points_do():
    """Eq. 3 in source sides against the matrix that warps the picture, in px."""
    view, points = drawn()
    stored = 47 / 2 + 48 * 1.2 / 1.7 * points
    assert torch.allclose(transform(view.A, stored), 31 / 2 + 32 * move(points, view), atol=1e-4)


def test_views_have_the_paper_s_range_and_no_black_corner():
    cfg = Config(**TINY)
    view = draw_view(torch.arange(4000), 1, 48, cfg, 0)
    area = view.gamma ** -2
    assert 0.08 <= area.min() < 0.09 and 0.99 < area.max() <= 1 and abs(area.mean() - 0.54) < 0.02
    degrees = view.angle.rad2deg()
    assert 0 <= degrees.min() < 1 and 149 < degrees.max() < 150
    both = draw_view(torch.arange(4000), 1, 48, Config(**TINY, variant=("symmetric",)), 0).angle
    assert abs(float(both.mean())) < 0.1 and both.rad2deg().min() < -149
    middle = view.shift / view.gamma[:, None]
    assert (middle.abs() + 0.5 / view.gamma[:, None]).max() <= 0.5 + 1e-6              # crops lie inside
    white = torch.full((64, 3, 48, 48), 255, dtype=torch.uint8)
    assert warp(white, view.A[:64], 32).amin() > 254


def test_ibot_s_own_views_flip_half_the_time_and_never_turn():
    cfg = Config(**TINY, objective="ibot")
    view = draw_views(torch.arange(2000), 48, cfg, 0)
    flips = view.A[..., 0, 0] < 0
    assert abs(float(flips.float().mean()) - 0.5) < 0.03 and (view.A[..., 0, 1] == 0).all()
    size = 32 / (48 * 1.2 / 1.7 * view.A.diagonal(dim1=-2, dim2=-1)[..., :2].abs())    # share of the square
    assert 0.13 < size.prod(-1).min() < 0.15 and size.max() <= 1 + 1e-6
    ours = draw_views(torch.arange(8), 48, Config(**TINY, objective="ibot", variant=("our-views",)), 0)
    assert torch.equal(ours.A, draw_views(torch.arange(8), 48, Config(**TINY), 0).A)


def test_views_ignore_their_batch_and_heed_the_epoch():
    cfg, batch = Config(**TINY), batch_of(8)
    views, view, masks = make_views(batch, cfg, 0, 4)
    assert views.shape == (8, 2, 3, 32, 32) and masks.shape == (8, 2, 16) and masks.dtype == torch.bool
    again, _, same = make_views({k: v[2:5] for k, v in batch.items()}, cfg, 0, 4)
    assert torch.allclose(again, views[2:5], atol=1e-5) and torch.equal(same, masks[2:5])
    other, _, different = make_views(batch, cfg, 1, 4)
    assert not torch.allclose(other, views, atol=0.1) and not torch.equal(different, masks)
    assert not torch.equal(view.angle[:, 0], view.angle[:, 1])


# ---- Colours


def test_the_second_view_alone_is_solarised_and_blurred_less():
    """iBOT's chances: blur 1 and 0.1, solarise 0 and 0.2, seen on a white picture and on noise."""
    cfg, index = Config(**TINY | dict(image_size=224)), torch.arange(400)
    noise = torch.rand(1, 3, 8, 8).expand(400, 3, 8, 8)
    rough = [handmim.colour(noise, index, k, cfg, 0).diff(dim=-1).abs().mean((1, 2, 3)) for k in (0, 1)]
    assert rough[0].mean() < 0.75 * rough[1].mean()
    dark = [(handmim.colour(torch.ones(400, 3, 8, 8), index, k, cfg, 0).amax((1, 2, 3)) < 0.5).float().mean()
            for k in (0, 1)]
    assert dark[0] == 0 and abs(dark[1] - 0.2) < 0.05


# ---- Masks


@pytest.mark.parametrize("row", range(5))
def test_block_masks_have_ibot_s_statistics(golden, row):
    _, nominal, mean, sd, low, high, empty = golden("handmim")["F_stats"][row]
    draws = common.uniform(torch.arange(1500), 4 * 96, 0, "test").unflatten(1, (96, 4))
    share = block_mask(draws, torch.full((1500,), nominal), 14).float().mean((1, 2))
    assert abs(float(share.mean()) - mean) < 0.0015 and abs(float(share.std()) - sd) < 0.003
    assert share.max() <= nominal + 1e-6 and share.min() >= low - 0.03


def test_block_masks_are_as_clumped_as_ibot_s(golden):
    """Share of equal neighbours; the golden masks have nominal 0.1 to 0.5."""
    there = torch.tensor(golden("handmim")["F_block_0.3_0.2_seed0"])
    alike = lambda m: float((m[:, 1:] == m[:, :-1]).float().mean() + (m[..., 1:] == m[..., :-1]).float().mean())
    mine = draw_masks(torch.arange(600), 14, Config(), 0)[:, 0].view(-1, 14, 14)
    single = draw_masks(torch.arange(600), 14, Config(variant=("random-mask",)), 0)[:, 0].view(-1, 14, 14)
    assert abs(alike(mine) - alike(there)) < 0.06 and alike(single) < alike(mine) - 0.2


def test_random_masks_hide_exactly_the_share_asked_for():
    mask = random_mask(common.uniform(torch.arange(5), 196, 0, "x"), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert mask.sum(1).tolist() == [19, 39, 58, 78, 98]


def test_mask_ratios_fill_the_paper_s_range_and_ibot_leaves_half_unmasked():
    share = draw_masks(torch.arange(2000), 14, Config(variant=("random-mask",)), 0)[:, 0].float().mean(1)
    assert 0.09 < share.min() < 0.11 and 0.48 < share.max() < 0.5 and abs(share.mean() - 0.298) < 0.01
    none = draw_masks(torch.arange(2000), 14, Config(objective="ibot"), 0)[:, 0].sum(1) == 0
    assert abs(float(none.float().mean()) - 0.5) < 0.03


def test_stochastic_depth_keeps_the_mean_and_grows_with_depth():
    keep = draw_paths(torch.arange(4000), 5, Config(drop_path=0.4), 0)
    assert keep.shape == (4000, 2, 5, 2) and torch.allclose(keep.mean((0, 1, 3)), torch.ones(5), atol=0.03)
    assert torch.allclose((keep == 0).float().mean((0, 1, 3)), torch.tensor([0, 0.1, 0.2, 0.3, 0.4]), atol=0.02)
    assert draw_paths(torch.arange(4), 5, Config(drop_path=0.0), 0) is None


# ---- Golden arrays: ViT, one training step, losses, schedules


def formula_weights(module, dtype=torch.float32):
    """The golden file's weights: a function of each key's name and shape."""
    for key, value in module.state_dict().items():
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(value.numel()).reshape(value.shape)
        ones = key.endswith(("norm1.weight", "norm2.weight")) or key == "norm.weight"
        value.copy_(torch.tensor(1 + 0.1 * r if ones else 0.04 * r))


@torch.no_grad()
def test_masked_vit_and_its_tapped_blocks_match_golden(golden):
    g = golden("handmim")
    vit = common.build_backbone("vit_s", 224)
    vit.masked_embed = torch.nn.Parameter(torch.zeros(1, 384))
    formula_weights(vit)
    x = torch.tensor(np.random.RandomState(11).standard_normal((2, 3, 224, 224))[:1]).float()
    embedded = vit.embed(x, torch.tensor(g["A_mask"]).flatten(1), vit.masked_embed)
    out, taps = walk(vit, embedded, None, (3, 6, 9, 12))
    near = lambda a, b: float((a - torch.tensor(b)).abs().max() / np.abs(b).max())
    assert near(out[:, [0, 1, 98, 196]], g["A_vits16_out_masked"]) < 1e-5
    for tap, expected in zip(taps, g["A_vits16_blocks_masked"]):
        assert near(tap[:, [0, 1, 98, 196]], expected) < 1e-5
    ones = torch.ones(1, 12, 2)
    assert torch.allclose(walk(vit, embedded, ones)[0], out, atol=1e-5)
    assert torch.equal(walk(vit, embedded, 0 * ones)[0], vit.norm(embedded))


def golden_student(g):
    model = HandMIM(Config(objective="ibot", backbone="vit_mini", image_size=32, prototypes=40))
    model.student.backbone, model.student.head = ViT(32, 8, 32, 3, 4), Head(32, 48, 16, 40)
    model.masked_embed = torch.nn.Parameter(torch.zeros(1, 32))
    given = {k.removeprefix("B_student0/"): torch.tensor(g[k]) for k in g if k.startswith("B_student0/")}
    with torch.no_grad():
        model.masked_embed.copy_(given.pop("backbone.masked_embed"))
    model.student.load_state_dict(given, strict=True)
    return model


def by_view(x, n=3):
    """Golden rows are view-major; ours (B, 2, ...)."""
    return torch.tensor(x).unflatten(0, (2, n)).transpose(0, 1)


def test_one_training_step_matches_golden(golden):
    """Logits, losses, every gradient's norm, the centres, which parameters decay."""
    g = golden("handmim")
    model, step = golden_student(g), lambda name: g[f"B_step0/{name}"]
    views = torch.stack([torch.tensor(step(f"img{k}")) for k in (0, 1)], 1)
    masks = torch.stack([torch.tensor(step(f"mask{k}")).flatten(1) for k in (0, 1)], 1)
    net, hidden = model.student, masks.flatten(0, 1)
    tokens, _ = walk(net.backbone, net.backbone.embed(views.flatten(0, 1), hidden, model.masked_embed))
    logits = model.logits(net, net.head(tokens)).unflatten(0, (3, 2))
    assert torch.allclose(logits[:, :, 0], by_view(step("student_cls")), atol=2e-6)
    assert torch.allclose(logits[:, :, 1:], by_view(step("student_patch")), atol=2e-6)
    teacher, teacher_patch = by_view(step("teacher_cls")), by_view(step("teacher_patch"))
    L_pose = pose_loss(logits[:, :, 0], teacher, torch.zeros(40), 0.04)
    weight = (1 / masks.sum(2, keepdim=True).clamp(min=1) / 6).expand_as(masks)[masks]
    L_patch = patch_loss(logits[:, :, 1:][masks], teacher_patch[masks], torch.zeros(40), weight, 0.04)
    expected = step("loss_cls_patch_total")
    assert [float(x.detach()) for x in (L_pose, L_patch, L_pose + L_patch)] == pytest.approx(expected, rel=1e-5)
    (L_pose + L_patch).backward()
    found = {f"head.{n}": p for n, p in net.head.named_parameters()} | {
        f"backbone.{n}": p for n, p in net.backbone.named_parameters()} | {"backbone.masked_embed": model.masked_embed}
    assert set(found) == set(g["B_gradnorm_names"])
    for name, norm in zip(g["B_gradnorm_names"], step("gradnorm_preclip")):
        assert float(found[name].grad.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    update_centre(model.centre, teacher.mean((0, 1)))
    update_centre(model.centre_patch, teacher_patch.mean((0, 1, 2)))
    assert torch.allclose(model.centre, torch.tensor(step("center"))[0], atol=1e-6)
    assert torch.allclose(model.centre_patch, torch.tensor(step("center2"))[0, 0], atol=1e-6)
    assert {n for n, p in found.items() if p.ndim > 1} == set(g["B_decayed_names"])


def test_losses_and_gradients_match_golden(golden):
    """The third of three calls: old centres, temperature after its warm-up."""
    g = golden("handmim")
    sc, sp = by_view(g["C2_sc"]).requires_grad_(), by_view(g["C2_sp"]).requires_grad_()
    tc, tp = by_view(g["C2_tc"]), by_view(g["C2_tp"])
    masks = torch.tensor(g["C2_mask"]).flatten(2).transpose(0, 1)
    centre, centre_patch = torch.tensor(g["C1_center"])[0], torch.tensor(g["C1_center2"])[0, 0]
    weight = (1 / masks.sum(2, keepdim=True).clamp(min=1) / 6).expand_as(masks)[masks]
    L_pose = pose_loss(sc, tc, centre, 0.07)
    L_patch = patch_loss(sp[masks], tp[masks], centre_patch, weight, 0.07)
    assert [float(x.detach()) for x in (L_pose, L_patch)] == pytest.approx(g["C2_loss"][:2], rel=1e-5)
    (L_pose + L_patch).backward()
    assert torch.allclose(sc.grad, by_view(g["C2_gsc"]), atol=1e-6)
    assert torch.allclose(sp.grad, by_view(g["C2_gsp"]), atol=1e-6)
    update_centre(centre, tc.mean((0, 1)))
    update_centre(centre_patch, tp.mean((0, 1, 2)))
    assert torch.allclose(centre, torch.tensor(g["C2_center"])[0], atol=1e-6)
    assert torch.allclose(centre_patch, torch.tensor(g["C2_center2"])[0, 0], atol=1e-6)


def test_schedules_match_golden(golden):
    g = golden("handmim")
    assert [cosine(k, 30, 2e-3, 1e-6, 10) for k in range(30)] == pytest.approx(g["D_lr"], rel=1e-9)
    assert [cosine(k, 30, 0.04, 0.4) for k in range(30)] == pytest.approx(g["D_wd"], rel=1e-9)
    assert [cosine(k, 30, 0.996, 1.0) for k in range(30)] == pytest.approx(g["D_mom"], rel=1e-9)
    assert [teacher_tau(k, warm=3) for k in range(5)] == pytest.approx(g["C_temp_cls_sched"])


def test_schedules_hold_for_runs_of_any_length():
    cfg = Config()
    assert lr_at(0, cfg, 216) == 0 and lr_at(2159, cfg, 216) == pytest.approx(2e-3)        # 10 epochs of 216
    assert lr_at(400 * 216 - 1, cfg, 216) == pytest.approx(1e-6, rel=0.01)
    assert lr_at(0, Config(batch_size=256, epochs=1, warmup_epochs=0), 5) == pytest.approx(5e-4)
    assert [teacher_tau(e) for e in (0, 1, 29, 399)] == pytest.approx([0.04, 0.04 + 0.03 / 29, 0.07, 0.07])
    assert [teacher_tau(e, 0.02) for e in (0, 29)] == pytest.approx([0.02, 0.035])
    for epochs in (1, 2, 3):
        short = handmim.configure({"epochs": epochs}, "pretrain")
        assert all(0 <= lr_at(k, short, 4) <= 2e-3 for k in range(4 * epochs))
    tuned = Config(finetune="synthetic", lr=4e-5)
    assert lr_at(0, tuned, 9) == lr_at(900, tuned, 9) == 4e-5


def test_position_embedding_is_resized_as_mae_does(golden):
    g = golden("handmim")
    assert torch.allclose(common._resize_positions(torch.tensor(g["E_pos"]), 6),
                          torch.tensor(g["E_pos_mae_6x6"]), atol=1e-6)


def test_recon_loss_matches_simmim_s_weighted_by_hidden_patches(golden):
    """SimMIM divides by the batch's hidden pixels, we by each picture's: weigh ours to compare."""
    g = golden("handmim")
    rec, img, mask = (torch.tensor(g[f"H_simmim_{n}"]) for n in ("rec", "img", "mask"))
    mask = mask.flatten(1).bool()
    each = [float(recon_loss(rec[k:k + 1], img[k:k + 1], mask[k:k + 1])) for k in (0, 1)]
    count = mask.sum(1).tolist()
    assert sum(n * x for n, x in zip(count, each)) / sum(count) == pytest.approx(float(g["H_simmim_loss"]), rel=1e-5)
    assert float(recon_loss(rec, img, mask)) == pytest.approx(sum(each) / 2, rel=1e-6)
    seen = torch.where(mask.view(2, 1, 4, 1, 4, 1).expand(2, 3, 4, 8, 4, 8).reshape(2, 3, 32, 32), img, rec)
    assert float(recon_loss(seen, img, mask)) == 0                        # what is not hidden does not count


# ---- Losses against loops typed from Eq. 6 and 7


def test_losses_match_loops():
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 5, dtype=EXACT), torch.randn(2, 2, 5, dtype=EXACT)
    c, tau = torch.randn(5, dtype=EXACT), 0.05
    def H(student, teacher):
        p = [math.exp((x - y) / tau) for x, y in zip(teacher.tolist(), c.tolist())]
        q = [math.exp(x / 0.1) for x in student.tolist()]
        return -sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q))
    cross = sum(H(s[i, 0], t[i, 1]) + H(s[i, 1], t[i, 0]) for i in (0, 1)) / 4
    assert float(pose_loss(s, t, c, tau)) == pytest.approx(cross)
    weight = torch.tensor([0.5, 0.25, 0.25], dtype=EXACT)
    same = 0.5 * H(s[0, 0], t[0, 0]) + 0.25 * H(s[0, 1], t[0, 1]) + 0.25 * H(s[1, 0], t[1, 0])
    assert float(patch_loss(s.flatten(0, 1)[:3], t.flatten(0, 1)[:3], c, weight, tau)) == pytest.approx(same)
    two = patch_loss(s[:, :, None].expand(2, 2, 2, 5).flatten(0, 1)[:3],
                     t[:, :, None].expand(2, 2, 2, 5).flatten(0, 1)[:3], c, weight, tau)
    assert float(two) == pytest.approx(same)                             # reading C: mean of two axes
    assert float(patch_loss(s.flatten(0, 1)[:0], t.flatten(0, 1)[:0], c, weight[:0], tau)) == 0


# ---- One pass


def one_pass(variant=(), objective="handmim", n=4):
    cfg = Config(**TINY, variant=variant, objective=objective, drop_path=0.0)
    torch.manual_seed(0)
    model = HandMIM(cfg)
    torch.nn.init.normal_(model.masked_embed)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    views, view, masks = make_views(batch_of(n), cfg, 0, 4)
    return model, views, view, masks, model(views, masks, view, None)


def test_a_pass_scores_hidden_patches_and_aligned_class_tokens():
    model, views, view, masks, out = one_pass()
    masked, count = [], 0
    for i in range(4):
        for v in range(2):
            s, t = model.student, model.teacher
            embedded = s.backbone.embed(views[i, v][None], masks[i, v][None], model.masked_embed)
            for block in s.backbone.blocks:
                embedded = block(embedded)
            zs = s.head(s.backbone.norm(embedded))[0]
            zt = t.head(t.backbone.tokens(views[i, v][None]))[0]
            one = View(*(x[i, v] for x in view))
            for z, net, found in ((zs, s, out.student), (zt, t, out.teacher)):
                points = z[0].view(128, 2)
                points = undo(points, in_latent_units(one, points)).flatten()
                g, w = net.head.last_layer.weight_g, net.head.last_layer.weight_v
                logits = (g * w / w.norm(dim=1, keepdim=True)) @ (points / points.norm())
                assert torch.allclose(found[i, v], logits, atol=1e-4)
            k = int(masks[i, v].sum())
            assert torch.allclose(out.student_patch[count:count + k], s.head.last_layer(zs[1:][masks[i, v]]), atol=1e-5)
            assert torch.allclose(out.teacher_patch[count:count + k], t.head.last_layer(zt[1:][masks[i, v]]), atol=1e-5)
            assert torch.allclose(out.weight[count:count + k], torch.full((k,), 1 / (8 * k)))
            masked.append(t.head.last_layer(zt[1:]))
            count += k
    assert count == len(out.student_patch) == int(masks.sum())
    assert torch.allclose(out.centre_patch, torch.cat(masked).mean(0), atol=1e-5)
    assert torch.allclose(out.centre, out.teacher.mean((0, 1)))
    assert out.pictures.shape == views.shape and not out.teacher.requires_grad


@pytest.mark.parametrize("variant, shape", [((), (16,)), (("reading-a",), (256,)), (("reading-c",), (2, 128))])
def test_readings_have_their_number_of_logits(variant, shape):
    model, _, _, masks, out = one_pass(variant)
    assert out.student.shape == (4, 2, *shape) and out.centre.shape == shape == model.centre.shape
    assert out.student_patch.shape == (int(masks.sum()), *shape) and out.centre_patch.shape == shape


def test_reading_c_cannot_see_the_shift():
    """Softmax forgets a common offset: along one axis the undone shift is one (notes of reading C)."""
    view, points = drawn(8)
    still = view._replace(shift=torch.zeros_like(view.shift))
    p, q = (undo(points, in_latent_units(v, points)).mT.softmax(-1) for v in (view, still))
    assert torch.allclose(p, q, atol=1e-12)


def test_linear_of_concatenation_is_what_the_decoder_computes():
    torch.manual_seed(0)
    decoder = Decoder(dim=6, stages=3, grid=2, width=4).double()
    taps = [torch.randn(2, 4, 6, dtype=EXACT) for _ in range(3)]
    T = torch.zeros(2, 0, 2, 2, dtype=EXACT)
    for k, L in enumerate(taps):                                  # Eq. 8 as printed: enlarge, concatenate
        L = L.mT.reshape(2, 6, 2, 2).repeat_interleave(2 ** k, 2).repeat_interleave(2 ** k, 3)
        x = torch.cat([T, L], 1).permute(0, 2, 3, 1) @ decoder.fuse[k].weight.mT + decoder.fuse[k].bias
        T = decoder.up[k](F.gelu(x).permute(0, 3, 1, 2))
    assert T.shape == (2, 3, 16, 16) and torch.allclose(decoder(taps), T, atol=1e-12)
    assert [fuse.weight.shape for fuse in Decoder(384, 4, 14, 32).fuse] == [
        (256, 384), (128, 512), (64, 448), (32, 416)]


def two_steps(variant, objective="handmim"):
    torch.manual_seed(0)
    cfg = Config(**TINY, variant=variant, objective=objective)
    model, batch = HandMIM(cfg), batch_of()
    optimizer = torch.optim.AdamW(common.decay_groups(model, cfg.weight_decay), 1e-2)
    for _ in range(2):
        terms = pretrain_step(model, batch, cfg, 0)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        update_centre(model.centre, terms["centre"])
    return float(terms["loss"].detach()), model.student.backbone.patch_embed.proj.weight.detach().clone()


@pytest.fixture(scope="module")
def plain():
    return {objective: two_steps((), objective) for objective in ("handmim", "ibot")}


TUNING = {"linear-rectifiers", "pymaf-sampler", "printed-taps"}          # tested where they act


@pytest.mark.parametrize("variant", sorted(set(handmim.VARIANTS) - TUNING))
def test_variant_changes_loss_and_weights(plain, variant):
    objective = "ibot" if variant == "our-views" else "handmim"
    loss, weight = two_steps((variant,), objective)
    assert abs(loss - plain[objective][0]) > 1e-6, "the loss after two steps is the same"
    assert not torch.equal(weight, plain[objective][1]), "the weights after two steps are the same"


def test_two_equal_runs_are_equal(plain):
    loss, weight = two_steps(())
    assert loss == plain["handmim"][0] and torch.equal(weight, plain["handmim"][1])


def test_vit_l_pretrains_for_250_epochs_unless_told_otherwise():
    """Sec. 3.1; fine-tuning takes 100 of every size (Sec. 3.2)."""
    assert handmim.configure({"backbone": "vit_l"}, "pretrain").epochs == 250
    assert handmim.configure({"backbone": "vit_b"}, "pretrain").epochs == 400
    assert handmim.configure({"backbone": "vit_l", "epochs": 400}, "pretrain").epochs == 400
    assert handmim.configure({"backbone": "vit_l", "quick": True}, "pretrain").epochs == 1
    assert handmim.configure({"backbone": "vit_l", "finetune": "synthetic"}, "finetune").epochs == 100


def test_the_quick_teacher_forgets_its_random_start():
    """Of 2,240 / 64 = 35 steps: a product of momenta of at most 1 %; the paper's steps leave nothing."""
    cfg = handmim.configure({"quick": True}, "pretrain")
    steps = cfg.epochs * (cfg.samples // cfg.batch_size)
    left = math.prod(cosine(k, steps, cfg.teacher_momentum, 1.0) for k in range(steps))
    assert steps == 35 and 0.005 < left < 0.011
    assert math.prod(cosine(k, 86400, Config().teacher_momentum, 1.0) for k in range(86400)) < 1e-70


@pytest.mark.parametrize("left_out, layer", [("no-pose", "pose_loss"), ("no-patch", "patch_loss")])
def test_a_loss_that_is_left_out_is_not_computed(left_out, layer, monkeypatch):
    """0 times infinity is NaN: so an infinite loss must not be made in the first place."""
    monkeypatch.setattr(handmim, layer, lambda *given: pytest.fail(f"{layer} was computed"))
    torch.manual_seed(0)
    cfg = Config(**TINY, variant=(left_out,))
    model = HandMIM(cfg)
    terms = pretrain_step(model, batch_of(), cfg, 0)
    terms["loss"].backward()
    assert float(terms["loss"].detach()) > 0 and float(terms[f"L_{left_out[3:]}"]) == 0
    assert ("centre_patch" in terms) == (left_out == "no-pose")
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "a process of several waits for gradients that never come"


@pytest.mark.parametrize("variant", [(), ("no-pose",), ("no-patch",), ("no-recon",), ("summed",)])
def test_the_loss_is_eq_10_without_what_is_removed(variant):
    cfg = Config(**TINY, variant=variant)
    torch.manual_seed(0)
    terms = pretrain_step(HandMIM(cfg), batch_of(), cfg, 0)
    kept = [terms[f"L_{n}"] for n in ("pose", "patch", "recon") if f"no-{n}" not in variant]
    assert torch.allclose(terms["loss"], sum(kept))
    assert ("no-recon" in variant) == (float(terms["L_recon"].detach()) == 0)
    full = pretrain_step(HandMIM(cfg), batch_of(), dataclasses.replace(cfg, variant=()), 0)
    if variant == ("summed",):
        torch.manual_seed(0)
        half = pretrain_step(HandMIM(cfg), batch_of(), dataclasses.replace(cfg, variant=()), 0)
        assert float(terms["L_pose"].detach()) == pytest.approx(2 * float(half["L_pose"].detach()))
    assert float(full["entropy"]) > 0


def test_bfloat16_is_for_the_network_only():
    cfg, batch, seen = Config(**TINY, precision="bf16"), batch_of(), {}
    torch.manual_seed(0)
    model = HandMIM(cfg)
    model.student.head.mlp[0].register_forward_hook(lambda _, x, y: seen.update(mlp=y))
    model.register_forward_hook(lambda _, x, y: seen.update(out=y, views=x[0]))
    terms = pretrain_step(model, batch, cfg, 0)
    assert seen["mlp"].dtype == torch.bfloat16 and terms["loss"].dtype == torch.float32
    assert {x.dtype for x in seen["out"][:7]} == {torch.float32}
    assert torch.equal(seen["views"], make_views(batch, cfg, 0, 4)[0])


# ---- Teacher, centres, clipping


def test_each_gradient_is_clipped_by_its_own_norm():
    """iBOT's 3: (30, 40) has norm 50 and becomes (1.8, 2.4); (1, 2) stays."""
    gradients = [torch.tensor([30.0, 40.0]), torch.tensor([1.0, 2.0])]
    handmim.clip_each(gradients, handmim.CLIP)
    assert gradients[0].tolist() == pytest.approx([1.8, 2.4]) and gradients[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("epochs, step, frozen", [(40, 0, True), (40, 9, True), (40, 10, False), (1, 0, True), (1, 1, False)])
def test_prototypes_keep_still_for_an_epoch_or_a_tenth_of_the_run(epochs, step, frozen):
    """Of ten steps an epoch: ten of a run of 40 epochs, one of a run of one epoch."""
    model = HandMIM(Config(**TINY))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    handmim.freeze_prototypes(model, step, Config(**TINY, epochs=epochs), 10)
    last = model.student.head.last_layer
    assert all((p.grad is None) == frozen for p in last.parameters())
    assert all(p.grad is not None for n, p in model.student.named_parameters() if "last_layer" not in n)


def test_the_teacher_follows_by_its_momentum():
    torch.manual_seed(0)
    model = HandMIM(Config(**TINY))
    with torch.no_grad():
        for p in model.student.parameters():
            p.copy_(torch.full_like(p, 2.0))
        for p in model.teacher.parameters():
            p.copy_(torch.full_like(p, 1.0))
    handmim.update_teacher(model, 0.9)
    for p in model.teacher.parameters():
        assert torch.allclose(p, torch.full_like(p, 1.1)) and p.grad is None


def test_a_step_gives_each_loss_its_own_centre_its_mask_and_the_epoch_s_temperature():
    """Eq. 6, 7 and 9 by loops, with centres that differ and in epoch 15, where tau is 0.04 + 0.03 x 15 / 29."""
    model, views, view, masks, out = one_pass()
    cfg = dataclasses.replace(model.cfg, drop_path=0.0)
    torch.manual_seed(8)
    with torch.no_grad():
        model.centre.normal_(0, 0.3)
        model.centre_patch.normal_(0, 0.3)
    terms = pretrain_step(model, batch_of(4), cfg, 15)
    views, view, masks = make_views(batch_of(4), cfg, 15, 4)
    out, tau = model(views, masks, view, None), 0.04 + 0.03 * 15 / 29
    entropy = lambda s, t, c: float(-(((t - c) / tau).softmax(-1) * (s / 0.1).log_softmax(-1)).sum())
    L_pose = sum(entropy(out.student[i, v], out.teacher[i, 1 - v], model.centre) for i in range(4) for v in (0, 1)) / 8
    L_patch, k = 0.0, 0
    for i in range(4):
        for v in (0, 1):
            n = int(masks[i, v].sum())
            L_patch += sum(entropy(out.student_patch[j], out.teacher_patch[j], model.centre_patch) for j in range(k, k + n)) / n / 8
            k += n
    L_recon = 0.0
    for i in range(4):
        for v in (0, 1):
            hidden = masks[i, v].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
            L_recon += float((out.pictures[i, v] - views[i, v]).abs()[:, hidden].mean()) / 8
    assert [float(terms[k].detach()) for k in ("L_pose", "L_patch", "L_recon")] == pytest.approx(
        [L_pose, L_patch, L_recon], rel=1e-4)


def test_short_runs_reach_the_peak_rate_and_a_given_warm_up_wins():
    for epochs in (1, 2, 3):
        cfg = handmim.configure({"epochs": epochs}, "pretrain")
        rates = [lr_at(k, cfg, 20) for k in range(20 * epochs)]
        assert max(rates) == pytest.approx(2e-3) == rates[2 * epochs - 1] and rates[-1] < 1e-4
    given = handmim.configure({"epochs": 10, "warmup_epochs": 5.0}, "pretrain")
    rates = [lr_at(k, given, 20) for k in range(200)]
    assert rates.index(max(rates)) == 99 and rates[50] == pytest.approx(2e-3 * 50 / 99)
    assert handmim.configure({}, "pretrain").warmup_epochs == 10
    assert settle(Config, {}, "finetune", {}).weight_decay == 0                       # Adam, Sec. 3.2


def test_colours_have_ibot_s_chances_and_strengths(monkeypatch):
    """Jitter in eight of ten by up to 0.4, 0.4, 0.2 and 0.1; grey in two of ten."""
    seen = {}
    monkeypatch.setattr(handmim, "jitter_colour", lambda images, factors: seen.update(factors=factors) or images)
    monkeypatch.setattr(handmim, "to_grey", lambda images, on: seen.update(grey=on) or images)
    handmim.colour(torch.zeros(3000, 3, 2, 2), torch.arange(3000), 0, Config(**TINY), 0)
    f = seen["factors"] - torch.tensor([1.0, 1, 1, 0])
    assert (f != 0).any(1).float().mean() == pytest.approx(0.8, abs=0.03)
    assert f.abs().amax(0).tolist() == pytest.approx([0.4, 0.4, 0.2, 0.1], rel=0.02)
    assert seen["grey"].float().mean() == pytest.approx(0.2, abs=0.03)


def test_norms_of_prototypes_learn_for_small_vits_only():
    learns = lambda name: HandMIM(Config(**TINY | dict(backbone=name))).student.head.last_layer.weight_g.requires_grad
    assert learns("vit_mini") and not learns("vit_b")


def test_centre_removes_an_offset_and_nothing_else_does():
    """One logit of the teacher is 3 too high: every answer is that one, until the centre follows."""
    torch.manual_seed(0)
    model = HandMIM(Config(**TINY))
    logits = 0.1 * torch.randn(64, 2, 16)
    logits[..., 5] += 3
    monitor = lambda: handmim.collapse_monitors(logits, model.centre, 0.07)
    assert float(monitor()["entropy_mean"]) < 1e-3
    without = logits - 3 * F.one_hot(torch.tensor(5), 16)
    fair = float(handmim.collapse_monitors(without, torch.zeros(16), 0.07)["entropy_mean"])
    for _ in range(50):
        update_centre(model.centre, logits.mean((0, 1)))
    assert abs(float(monitor()["entropy_mean"]) - fair) < 0.1 and fair > 2
    assert float((model.centre - logits.mean((0, 1))).abs().max()) < 0.02


def test_monitors_tell_the_two_collapses():
    same = torch.zeros(8, 2, 16)
    flat = handmim.collapse_monitors(same, torch.zeros(16), 0.04)
    assert float(flat["entropy"]) == pytest.approx(math.log(16), rel=1e-5)
    same[..., 3] = 9
    one = handmim.collapse_monitors(same, torch.zeros(16), 0.04)
    assert float(one["entropy"]) == pytest.approx(0, abs=1e-4) == pytest.approx(float(one["entropy_mean"]), abs=1e-4)
    each = 9 * torch.eye(16).view(8, 2, 16)
    healthy = handmim.collapse_monitors(each, torch.zeros(16), 0.04)
    assert float(healthy["entropy"]) < 1e-4 and float(healthy["entropy_mean"]) == pytest.approx(math.log(16), rel=1e-4)
    assert float(flat["agreement"]) == 0 and float(healthy["agreement"]) == pytest.approx(-1 / 15)
    pairs = 7 + torch.randn(8, 1, 16, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1)
    assert float(handmim.collapse_monitors(pairs, torch.zeros(16), 0.04)["agreement"]) == pytest.approx(1)


def test_a_centre_as_fast_as_its_teacher_keeps_answers_apart():
    """Ten steps of a small head beside a teacher of --quick's pace: one answer for all, but for the rule (17)."""
    assert [handmim.centre_share(m) for m in (0.87, 0.98, 0.996, 1.0)] == pytest.approx([1, 0.5, 0.1, 0.1])

    def spread(share):
        torch.manual_seed(0)
        student, teacher = Head(32, 64, 32, 64), Head(32, 64, 32, 64)
        teacher.load_state_dict(student.state_dict())
        adam, centre, offset = torch.optim.AdamW(student.parameters(), 2e-3), torch.zeros(64), torch.randn(32)
        for _ in range(10):
            x = offset + torch.randn(64, 1, 32) + 0.5 * torch.randn(64, 2, 32)      # two views of 64 pictures
            answers = student.last_layer(student(x))
            with torch.no_grad():
                truth = teacher.last_layer(teacher(x))
                seen = handmim.collapse_monitors(truth, centre, 0.04)["entropy_mean"]
            pose_loss(answers, truth, centre, 0.04).backward()
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.13)
            update_centre(centre, truth.mean((0, 1)), share)
        return float(seen)
    assert spread(0.1) < 0.5 and spread(handmim.centre_share(0.87)) > 0.9 * math.log(64)


def gradients(cfg, parts):
    torch.manual_seed(0)
    model, batch, means = HandMIM(cfg), batch_of(), 0
    for rows in torch.arange(4).chunk(parts):
        terms = pretrain_step(model, {k: v[rows] for k, v in batch.items()}, cfg, 0)
        (terms["loss"] / parts).backward()
        means = means + torch.cat([terms["centre"], terms["centre_patch"]]) / parts
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"centres": means}


def test_accumulated_gradients_and_centres_are_those_of_the_whole_batch(double):
    """Nothing in the network or in the losses mixes samples, so the split does not matter (9)."""
    cfg = Config(**TINY)
    whole = gradients(cfg, 1)
    assert "masked_embed" in whole and "decoder.up.0.weight" in whole
    assert not any(name.startswith("teacher") for name in whole)
    for parts in (2, 4):
        split = gradients(cfg, parts)
        for name, gradient in whole.items():
            scale = max(float(gradient.abs().max()), 1e-6)
            assert float((gradient - split[name]).abs().max()) < 1e-10 * scale, (parts, name)


def gradients_of_a_step():
    """Gradients and centres of four micro-batches in float64, shared out to the processes."""
    torch.set_default_dtype(torch.float64)
    device = common.start("cpu")
    cfg = Config(backbone="vit_mini", image_size=32, batch_size=8, micro_batch=2, prototypes=16, head_hidden=16, decoder_width=4)
    torch.manual_seed(0)
    model = HandMIM(cfg)
    net = common.parallel(model, device, False)
    pictures = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    mine, sums = common.share(8, 2), {}
    for m in mine:
        batch = {"image": pictures[2 * m:2 * m + 2], "index": torch.arange(2 * m, 2 * m + 2)}
        with common.accumulate(net, last=m == mine[-1]):
            terms = pretrain_step(net, batch, cfg, 0)
            (terms["loss"] / len(mine)).backward()
        sums = {n: sums.get(n, 0) + t.detach() / len(mine) for n, t in terms.items()}
    handmim.update_centre(model.centre, sums["centre"])
    handmim.update_centre(model.centre_patch, sums["centre_patch"])
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"centre": model.centre, "centre_patch": model.centre_patch}


def test_gradients_and_centres_agree_on_one_and_two_processes(tmp_path):
    found = {count: on_processes(tmp_path, count, gradients_of_a_step)[0] for count in (1, 2)}
    for name, value in found[1].items():
        scale = max(float(value.abs().max()), 1e-6)
        assert float((value - found[2][name]).abs().max()) < 1e-10 * scale, name


# ---- Fine-tuning: geometry


def test_sampling_matches_pymaf_s_golden_and_its_point_mlp(golden):
    g = golden("handmim")
    maps, points = torch.tensor(g["P_maf_feat"]), torch.tensor(g["P_maf_points"])
    read = sample(maps, (points + 1) * 112, 224, pymaf=True)                 # golden points are in -1 .. 1
    assert torch.allclose(read.mT, torch.tensor(g["P_maf_rawsample"]), atol=1e-5)
    mlp = PointMlp((24, 16, 8, 5))
    mlp.load_state_dict({f"layers.{k}.{n}": torch.tensor(g[f"P_maf_sd/conv{k}.{n}"]).squeeze(-1) if n == "weight"
                         else torch.tensor(g[f"P_maf_sd/conv{k}.{n}"]) for k in range(3) for n in ("weight", "bias")})
    assert torch.allclose(mlp(read), torch.tensor(g["P_maf_out"]), atol=1e-5)


def test_a_pixel_reads_the_patch_it_lies_in():
    """A ramp over 14 patches of 16 px: pixel u lies at (u + 0.5) / 16 - 0.5; the border goes on."""
    ramp = torch.arange(14.0).expand(1, 1, 14, 14)
    u = torch.tensor([0.0, 7.5, 8.0, 100.0, 215.5, 223.0, 400.0])
    uv = torch.stack([u, torch.full_like(u, 50.0)], -1)[None]
    ours = sample(ramp, uv, 224)[0, :, 0]
    assert ours.tolist() == pytest.approx([0, 0, 0.03125, 5.78125, 13, 13, 13], abs=1e-4)
    theirs = sample(ramp, uv, 224, pymaf=True)[0, :, 0]
    assert float(theirs[2]) == pytest.approx(0.464, abs=1e-3)                # half a patch off


def test_projection_and_6d_rotations_match_pymaf_s_golden(golden):
    g = golden("handmim")
    pts, cam = torch.tensor(g["P_pts"]), torch.tensor(g["P_cam"])
    K = lambda f, centres: torch.tensor([[[f, 0, x], [0, f, y], [0, 0, 1.0]] for x, y in centres])
    t = torch.tensor([[0.01, 0.02, 0.7], [0, 0, 0.5]])
    found = handmim.project(pts + t[:, None], K(500.0, [(112, 110), (112, 112)]))
    assert torch.allclose(found, torch.tensor(g["P_persp"]), rtol=1e-5, atol=1e-3)
    depth = 2 * 5000 / (224 * cam[:, 0])                                  # PyMAF's far camera
    t = torch.stack([cam[:, 1], cam[:, 2], depth], 1)
    found = handmim.project(pts + t[:, None], K(5000.0, [(0, 0), (0, 0)])) / 112
    assert torch.allclose(found, torch.tensor(g["P_projection"]), rtol=1e-5, atol=1e-5)
    R = six_d_to_matrix(torch.tensor(g["P_rot6d"]))
    assert torch.allclose(R, torch.tensor(g["P_rot6d_to_rotmat"]), atol=1e-6)


def cameras(n=5):
    torch.manual_seed(2)
    points = torch.randn(n, 21, 3, dtype=EXACT) * 0.05 + torch.tensor([0.02, -0.03, 0.6], dtype=EXACT)
    K = torch.tensor([[480.0, 0, 47], [0, 460, 52], [0, 0, 1]], dtype=EXACT).expand(n, 3, 3)
    angle = torch.rand(n, dtype=EXACT) * 6
    A = rotation(angle, 32) @ common.crop(torch.rand(n, 2, dtype=EXACT) * 40, 20 + torch.rand(n, dtype=EXACT), 32)
    return points, K, angle, A


def test_turned_hands_project_where_the_turned_picture_shows_them():
    """Exact also where fx is not fy: K' = A K Rz^-1 keeps the skew."""
    points, K, angle, A = cameras()
    direct = transform(A, common.project(points, K))
    turned = handmim.project(rotate_z(angle, points), crop_intrinsics(A, K, angle))
    assert (direct - turned).abs().max() < 1e-9


def test_the_camera_puts_the_wrist_where_it_says():
    """Worked: S 224, f 500 px: log s = 0 is Z = 500 / (112 x 10) = 0.446 m; (0.5, 0) is 56 px right."""
    net = HandNet(Config(**TINY | dict(image_size=224, backbone="vit_s")))
    K = torch.tensor([[[500.0, 0, 100], [0, 500, 120], [0, 0, 1]]])
    state = net.start.clone()[None]
    state[:, 106:] = torch.tensor([0.0, 0.5, 0.0])
    hand = net.hand(state, K)
    assert float(hand.t[0, 2]) == pytest.approx(500 / 1120, rel=1e-5)
    assert hand.uv[0, 0].tolist() == pytest.approx([111.5 + 56, 111.5], abs=1e-3)
    assert torch.allclose(handmim.project(hand.t[:, None], K)[0, 0], hand.uv[0, 0], atol=1e-3)
    assert hand.joints[0, 0].abs().max() == 0


def hand_batch(n=3, size=48, seed=5):
    torch.manual_seed(seed)
    pose, shape = 0.3 * torch.randn(n, 48), 0.5 * torch.randn(n, 10)
    mano = Mano(builtin_hand())
    verts, joints = mano(axis_angle_to_matrix(pose.unflatten(-1, (16, 3))), shape, torch.tensor([[0.0, 0.0, 0.7]]))
    K = torch.tensor([[100.0, 0, 24], [0, 100, 23], [0, 0, 1]]).expand(n, 3, 3)
    yes = torch.ones(n, dtype=torch.bool)
    return {"image": torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8), "joints": joints,
            "verts": verts, "joints_ok": yes[:, None].expand(n, 21).clone(), "pose": pose, "shape": shape, "K": K,
            "uv": common.project(joints, K), "index": torch.arange(n),
            "has": {k: yes.clone() for k in ("pose", "joints", "shape", "verts", "K", "uv")}}


class Answer(HandNet):
    """A network that gives the same states whatever it sees."""

    def forward(self, crops, K):
        self.K = K
        return self.states


def perfect(batch, cfg):
    """States that mean the labels: 6D of the turned pose, shape, and the camera solved by hand."""
    net, S = Answer(cfg), cfg.image_size
    A, angle = handmim.draw_crop(batch["index"], batch["image"].shape[-1], cfg, 0)
    K = crop_intrinsics(A, batch["K"], angle)
    R = axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)))
    c, s, zero, one = angle.cos(), angle.sin(), 0 * angle, 0 * angle + 1
    Rz = torch.stack([c, s, zero, -s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    R = torch.cat([(Rz @ R[:, 0])[:, None], R[:, 1:]], 1)
    wrist = (Rz @ batch["joints"][:, 0, :, None])[..., 0]
    pixel = (K @ wrist[..., None])[..., 0]
    pixel = pixel[:, :2] / pixel[:, 2:]
    f = K[:, 0, 0]                                                       # fx = fy: no skew
    camera = torch.cat([(f / (5 * S * wrist[:, 2])).log()[:, None], (pixel - (S - 1) / 2) / (S / 2)], 1)
    state = torch.cat([matrix_to_six_d(R).flatten(1), batch["shape"], camera], 1)
    net.states = state.expand(3, *state.shape).clone().requires_grad_()
    return net


TERMS = ("L_theta", "L_beta", "L_t", "L_vert", "L_3d", "L_2d")


def test_a_perfect_answer_has_no_loss_under_every_augmentation():
    cfg, batch = Config(**TINY, finetune="synthetic"), hand_batch(8)
    terms = finetune_step(perfect(batch, cfg), batch, cfg, 0)
    assert all(float(terms[name].detach()) < 2e-4 for name in TERMS), terms
    A, angle = handmim.draw_crop(torch.arange(2000), 48, cfg, 0)
    angles, width = angle.rad2deg(), 1 / A[:, :2, :2].det().sqrt()
    assert abs(float(torch.corrcoef(torch.stack([width, (angles == 0).float()]))[0, 1])) < 0.06     # own streams
    assert abs(float(width.max() / width.min()) - 5 / 3) < 0.01                                     # 1.25 / 0.75
    assert 30 < angles.abs().max() < 60.001 and abs(float((angles == 0).float().mean()) - 0.4) < 0.1


def test_each_term_judges_its_own_part_of_every_output():
    cfg, batch = Config(**TINY, finetune="synthetic"), hand_batch(8)
    for part, name in ((slice(6, 96), "L_theta"), (slice(96, 106), "L_beta"), (slice(106, 107), "L_t"),
                       (slice(107, 109), "L_2d")):
        for output in range(3):
            net = perfect(batch, cfg)
            with torch.no_grad():
                net.states[output, :, part] += 0.3
            terms = finetune_step(net, batch, cfg, 0)
            assert float(terms[name].detach()) > 1e-3, (name, output)
            if part.start >= 106:
                assert float(terms["L_theta"].detach()) < 1e-4 and float(terms["L_3d"].detach()) < 1e-3


def test_the_loss_is_eq_11_with_our_weights():
    cfg, batch = Config(**TINY, finetune="synthetic"), hand_batch()
    net = perfect(batch, cfg)
    with torch.no_grad():
        net.states += 0.1 * torch.randn_like(net.states)
    t = {k: float(v.detach()) for k, v in finetune_step(net, batch, cfg, 0).items()}
    assert t["loss"] == pytest.approx(
        t["L_theta"] + 0.01 * t["L_beta"] + 10 * t["L_t"] + t["L_vert"] + t["L_3d"] + t["L_2d"], rel=1e-5)
    hand, size = net.hand(net.states[0], net.K), cfg.image_size
    A, angle = handmim.draw_crop(batch["index"], 48, cfg, 0)
    rooted = rotate_z(angle, batch["verts"] - batch["joints"][:, :1])
    by_hand = [net.hand(s, net.K) for s in net.states]
    assert t["L_vert"] == pytest.approx(
        10 * float(sum((h.verts - rooted).abs().sum(-1).mean() for h in by_hand).detach()) / 3, rel=1e-4)
    uv = transform(A, batch["uv"])
    assert t["L_2d"] == pytest.approx(
        float(sum((h.uv - uv).abs().sum(-1).mean() for h in by_hand).detach()) / 3 / (size / 2), rel=1e-4)
    assert hand.R.shape == (3, 16, 3, 3)


def test_samples_without_a_label_do_not_count():
    cfg, batch = Config(**TINY, finetune="synthetic"), hand_batch(3)
    net = perfect(batch, cfg)
    for key in ("pose", "shape", "verts", "joints", "uv", "K"):
        batch[key] = batch[key].clone()
        batch[key][1:] = math.nan
        batch["has"][key][1:] = False
    batch["joints_ok"][1:] = False
    with torch.no_grad():
        net.states += 0.1
    terms = finetune_step(net, batch, cfg, 0)
    terms["loss"].backward()
    assert net.states.grad.isfinite().all() and net.states.grad[:, 1:].abs().sum() == 0
    assert net.states.grad[:, 0].abs().sum() > 0
    alone = finetune_step(perfect(hand_batch(1), cfg), hand_batch(1), cfg, 0)
    assert float(alone["loss"].detach()) < 1e-2 < float(terms["loss"].detach())


def test_regressed_joints_are_for_data_that_defines_them_so():
    batch, cfg = hand_batch(2), Config(**TINY, finetune="synthetic")
    for data, same in (("synthetic", True), ("ho3d", True), ("freihand", False)):
        net, state = HandNet(dataclasses.replace(cfg, finetune=data)), perfect(batch, cfg).states[0]
        hand = net.hand(state, batch["K"])
        chain = net.mano.chain_joints(hand.R, hand.beta)
        assert torch.allclose(hand.joints, chain - chain[:, :1], atol=1e-6) == same


# ---- Fine-tuning: network


def awake(cfg, seed=0):
    """A HandNet whose rectifiers already do something."""
    torch.manual_seed(seed)
    net = HandNet(cfg)
    for rectifier in net.rectifiers:
        torch.nn.init.normal_(rectifier.mlp[-1].weight, std=0.02)
    return net


def test_rectifiers_start_at_the_mean_hand_and_change_one_after_the_other():
    cfg = Config(**TINY, finetune="synthetic")
    torch.manual_seed(0)
    net, K, crops = HandNet(cfg), hand_batch(2)["K"], torch.randn(2, 3, 32, 32)
    uv = torch.full((21, 2), 0.5)
    uv[0] = torch.tensor([0.6, 0.45])
    mean = {"pose": 0.2 * torch.randn(48), "shape": torch.ones(10), "uv": uv}
    net.start_at(mean)
    states = net(crops, K)
    assert torch.equal(states[0], states[2]) and states.shape == (3, 2, 109)
    R = six_d_to_matrix(states[0, 0, :96].unflatten(0, (16, 6)))
    assert torch.allclose(R, axis_angle_to_matrix(mean["pose"].unflatten(0, (16, 3))), atol=1e-5)
    assert states[0, 0, 106:].tolist() == pytest.approx([0, 0.1 * 2 * 2.2 / 1.2, -0.05 * 2 * 2.2 / 1.2], abs=1e-6)
    states = awake(cfg)(crops, K)
    assert not torch.allclose(states[0], states[1], atol=1e-3) and not torch.allclose(states[1], states[2], atol=1e-3)


def test_no_gradient_passes_through_the_feedback():
    """Each output teaches its own rectifier only; the back-bone learns from all."""
    cfg = Config(**TINY, finetune="synthetic")
    net = awake(cfg)
    net(torch.randn(2, 3, 32, 32), hand_batch(2)["K"])[2].sum().backward()
    moved = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in r.parameters()) for r in net.rectifiers]
    assert moved == [False, False, True] and net.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", ["linear-rectifiers", "pymaf-sampler"])
def test_fine_tuning_variants_change_the_answer(variant):
    K, crops = hand_batch(2)["K"], torch.randn(2, 3, 32, 32)
    a, b = (awake(Config(**TINY, finetune="synthetic", variant=v))(crops, K) for v in ((), (variant,)))
    assert not torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("data", ["synthetic", "freihand"])                        # the chain's joints, the mesh's
def test_prediction_keeps_the_contract(data):
    net = awake(Config(**TINY, finetune=data, mano="builtin")).eval()
    batch = hand_batch(3)
    K = batch["K"].clone()
    K[2] = math.nan
    with torch.no_grad():
        out = net.predict({"image": batch["image"], "K": K})
    shapes = {k: tuple(v.shape[1:]) for k, v in out.items()}
    assert shapes == {"joints": (21, 3), "verts": (778, 3), "root": (3,), "trans": (3,), "uv": (21, 2),
                      "pose": (16, 3, 3), "shape": (10,)} and HandNet.USES == {"image", "K"}
    placed = out["joints"] + out["root"][:, None]
    assert torch.allclose(common.project(placed, K)[:2], out["uv"][:2], atol=1e-3)       # px of the stored image
    verts, joints = net.mano(out["pose"], out["shape"], out["trans"])
    joints = net.mano.regress(verts) if data == "freihand" else joints
    assert torch.allclose(joints[:2], placed[:2], atol=1e-5)
    assert torch.allclose(verts[:2], (out["verts"] + out["root"][:, None])[:2], atol=1e-5)
    assert out["root"][2].isnan().all() and out["joints"].isfinite().all() and out["uv"].isfinite().all()


def test_prediction_is_the_last_rectifier_s():
    net, batch = awake(Config(**TINY, finetune="synthetic")).eval(), hand_batch(2)
    states = []
    net.register_forward_hook(lambda _, given, out: states.append((out, given[1])))
    with torch.no_grad():
        found = net.predict({"image": batch["image"], "K": batch["K"]})
        (out, K), = states
        assert torch.equal(found["joints"], net.hand(out[2], K).joints)
        assert not torch.allclose(found["joints"], net.hand(out[0], K).joints, atol=1e-5)


def test_rectifiers_read_the_class_token_their_state_and_the_map_at_the_joints():
    net, batch = awake(Config(**TINY, finetune="synthetic")).eval(), hand_batch(3)
    state = net.start.expand(3, -1) + 0.02 * torch.randn(3, 109)
    seen = net.where(state, batch["K"])
    assert torch.allclose(seen, net.hand(state, batch["K"]).uv.clamp(-16, 48), atol=1e-3)
    token, sampled = torch.randn(3, 128), torch.randn(3, 21, 128)
    step = net.rectifiers[0]
    with torch.no_grad():
        whole = step(sampled, token, state)
        for part in (step(sampled, 0 * token, state), step(sampled, token, 0 * state), step(0 * sampled, token, state)):
            assert not torch.allclose(part, whole)


def test_fine_tuning_crops_stay_inside_the_stored_square():
    """At most 1.5 boxes wide, turned by 60 degrees, shifted by 5 %: a white square shows no black."""
    cfg, index = Config(**TINY), torch.arange(256)
    A, angle = handmim.draw_crop(index, 56, cfg, 0)
    white = torch.full((256, 3, 56, 56), 255, dtype=torch.uint8)
    black = (common.warp(white, A, 32) < 128).float().mean((1, 2, 3))
    assert (black > 0.02).float().mean() < 0.02 and black.mean() < 0.002
    assert angle.abs().max() == pytest.approx(math.pi / 3, abs=1e-3) and 0.3 < (angle == 0).float().mean() < 0.5
    middle = common.transform(common.invert(A), torch.full((256, 1, 2), 15.5))[:, 0] - 27.5
    width = 32 / A[:, 0, :2].norm(dim=1)
    share = middle / width[:, None]
    assert share.abs().max() <= 0.05 + 1e-5 and share.abs().max() > 0.045
    assert (width * 2.2 / 56).min() >= 0.9 - 1e-4 and (width * 2.2 / 56).max() <= 1.5 + 1e-4


def test_frozen_blocks_stay_and_the_rest_learns():
    cfg, batch = Config(**TINY, finetune="synthetic"), hand_batch()
    net = awake(cfg)
    handmim.freeze(net.backbone, 2)
    finetune_step(net, batch, cfg, 0)["loss"].backward()
    still = {n for n, p in net.backbone.named_parameters() if p.grad is None}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight",
            "blocks.1.norm2.bias"} <= still
    assert not any(n.startswith(("blocks.2", "blocks.3", "norm")) for n in still)
    with pytest.raises(UserError, match="--freeze-blocks 5: the back-bone has 4 blocks"):
        handmim.freeze(net.backbone, 5)


# ---- The command line

SMALL = ["--samples", "16", "--backbone", "vit_mini", "--image-size", "32", "--batch-size", "8", "--micro-batch", "4",
         "--workers", "0", "--device", "cpu"]
PRE = ["--data", "synthetic:calm", "--epochs", "2", *SMALL, "--prototypes", "16", "--head-hidden", "16",
       "--decoder-width", "4", "--probe-every", "0"]


def test_cli_smoke_then_resume_equals_straight_run(tmp_path, monkeypatch):
    """Stopped after its third step of four and resumed, a run ends bit-equal, teacher and centres too."""
    monkeypatch.chdir(tmp_path)
    handmim.main([*PRE, "--out", "straight"])
    advance, count = handmim.Run.advance, []

    def stop(run, *more, **named):
        advance(run, *more, **named)
        count.append(run.step)
        if run.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(handmim.Run, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            handmim.main([*PRE, "--out", "stopped", "--save-minutes", "1e-9"])
    handmim.main(["--out", "stopped", "--resume"])
    a, b = (torch.load(tmp_path / n / "pretrain-handmim" / "last.pt", weights_only=True)["model"]
            for n in ("straight", "stopped"))
    assert {"centre", "centre_patch", "masked_embed", "teacher.head.mlp.0.weight"} <= set(a)
    assert all(torch.equal(a[k], b[k]) for k in a) and float(a["centre"].abs().sum()) > 0
    logs = [[json.loads(line) for line in (tmp_path / n / "pretrain-handmim" / "log.jsonl").open()][1:]
            for n in ("straight", "stopped")]
    assert logs[0] == logs[1] and {"L_pose", "L_patch", "L_recon", "entropy", "entropy_mean"} <= set(logs[0][0])
    saved = torch.load(tmp_path / "straight" / "backbone.pt", weights_only=True)
    assert all(torch.equal(v, a[f"teacher.backbone.{k}"]) for k, v in saved.items())
    for name in ("views.png", "recovered.png"):
        assert (tmp_path / "straight" / "pretrain-handmim" / name).stat().st_size > 1000


def test_pretraining_goes_on_from_a_file_student_and_teacher_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(handmim, "probe_error", lambda *given: 2.5)
    handmim.main([*PRE, "--epochs", "1", "--probe-every", "3", "--out", "one"])
    assert '"probe_mpjpe_mm": 2.5' in Path("one/pretrain-handmim/log.jsonl").read_text()    # after the last epoch
    handmim.main([*PRE, "--epochs", "0", "--init", "one/backbone.pt", "--out", "two"])
    one, two = (torch.load(f"{name}/backbone.pt", weights_only=True) for name in ("one", "two"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())                       # backbone.pt is the teacher's


def test_cli_finetunes_from_a_pretrained_file_and_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 16, "test": 32})
    handmim.main([*PRE, "--epochs", "1", "--objective", "ibot", "--out", "pre"])
    assert not (tmp_path / "pre" / "pretrain-ibot" / "recovered.png").exists()          # it has no decoder
    tune = ["--finetune", "synthetic:calm", *SMALL, "--init", "pre/backbone.pt", "--freeze-blocks", "1"]
    handmim.main([*tune, "--epochs", "1", "--out", "tuned"])
    said = capsys.readouterr().out
    assert "scratch: not run" in said and "1 blocks frozen" in said
    results = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["results"][0]
    assert set(results["rows"]) == {"mean_pose", "ibot-on-synthetic-calm"} and results["n"] == 32 and results["uses"] == ["K", "image"]
    assert {"mpjpe_mm", "pa_mpvpe_mm", "f_5", "f_15", "abs_mpjpe_mm"} <= set(results["rows"]["ibot-on-synthetic-calm"])
    before = torch.load("pre/backbone.pt", weights_only=True)
    after = torch.load("tuned/finetune.pt", weights_only=True)
    assert after["method"] == "handmim" and after["row"] == "ibot-on-synthetic-calm"
    same = lambda key: torch.equal(before[key], after["model"][f"backbone.{key}"])
    assert same("pos_embed") and same("blocks.0.mlp.fc1.weight") and not same("blocks.1.mlp.fc1.weight")
    for name in ("predictions.png", "curve.png", "finetune-ibot-on-synthetic-calm/views.png"):
        assert (tmp_path / "tuned" / name).stat().st_size > 1000
    handmim.main([*tune, "--epochs", "0", "--out", "untrained"])
    blind = json.loads((tmp_path / "untrained" / "metrics.json").read_text())["results"][0]["rows"]
    assert blind["ibot-on-synthetic-calm"]["pa_mpjpe_mm"] == pytest.approx(blind["mean_pose"]["pa_mpjpe_mm"], rel=1e-3)


@pytest.mark.parametrize("words, said", [
    (["--data", "synthetic:calm", "--objective", "ibot", "--variant", "reading-a"], "--objective ibot knows"),
    (["--data", "synthetic:calm", "--variant", "our-views"], "--variant our-views: pre-training with"),
    (["--data", "synthetic:calm", "--variant", "pymaf-sampler"], "--variant pymaf-sampler: pre-training"),
    (["--data", "synthetic:calm", "--freeze-blocks", "2"], "--freeze-blocks: belongs to fine-tuning"),
    (["--finetune", "synthetic:calm", "--teacher-momentum", "0.9"], "--teacher-momentum: belongs to pre-training"),
    (["--finetune", "synthetic:calm", "--objective", "handmim"], "--objective: belongs to pre-training"),
    (["--data", "synthetic:calm", "--variant", "no-pose", "no-patch", "no-recon"], "no loss is left to learn from"),
    (["--data", "synthetic:calm", "--objective", "ibot", "--variant", "no-pose", "no-patch"], "no loss is left to learn"),
    (["--finetune", "synthetic:calm", "--variant", "no-pose"], "--variant no-pose: fine-tuning knows"),
    (["--data", "synthetic:calm", "--variant", "reading-a", "reading-c"], "a class token has one reading"),
    (["--data", "synthetic:calm", "--backbone", "vit_mini", "--image-size", "30"], "multiple of the ViT's patch"),
    (["--data", "synthetic:calm", "--backbone", "resnet50"], "invalid choice"),
    (["--finetune", "synthetic:calm", "--freeze-blocks", "13"], "the back-bone has 12 blocks"),
    (["--data", "synthetic", "--finetune", "synthetic"], "one command runs one stage")])
def test_bad_input_gives_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    try:
        code = common.guarded(lambda: handmim.main([*words, "--device", "cpu", "--samples", "16"]))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error
    assert not list(tmp_path.glob("runs/*"))
