"""Break one line at a time and see a named test turn red: python tests/mutants.py [NUMBER ...]

Each entry: file, line as it stands, line as broken, the test file and the part of the test's name that
must fail. Runs on a copy of the tree; the tests of an entry must pass unbroken and fail broken.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MUTANTS = [
    # signs
    ("common.py", "return _matrix([[c, s, x - c * x - s * y], [-s, c,", "return _matrix([[c, -s, x - c * x - s * y], [s, c,",
     "test_common_transforms.py", "quarter_turn"),
    ("common.py", "return torch.stack([c * x + s * y, c * y - s * x, z], -1)", "return torch.stack([c * x - s * y, c * y + s * x, z], -1)",
     "test_common_transforms.py", "quarter_turn"),
    ("common.py", "return torch.stack([c + bx * x, xy - az, xz + ay,", "return torch.stack([c + bx * x, xy + az, xz + ay,", "test_common_mano.py", "numpy_model or torch_model or fronts"),
    ("ti_net.py", "sign = -1 if then.flip else 1", "sign = 1", "test_ti_net.py", "table_1"),
    ("ti_net.py", "return v + self.M(self.N(v if e is None", "return v - self.M(self.N(v if e is None", "test_ti_net.py", "operators_match"),
    # orders
    ("ti_net.py", "number(compose(e1, e2)))", "number(compose(e2, e1)))", "test_ti_net.py", "losses_match"),
    ("ti_net.py", "secondary = torch.stack([T(n2, firsts[n1, k1], k2)", "secondary = torch.stack([T(n1, firsts[n1, k1], k2)",
     "test_ti_net.py", "losses_match"),
    ("ti_net.py", "return cut @ turn @ flip(flips, square)", "return cut @ flip(flips, square).to(turn) @ turn", "test_ti_net.py", "one_step_after"),
    ("common.py", "MANO_TO_OURS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)",
     "MANO_TO_OURS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 7, 8, 9, 19, 10, 11, 12, 20)", "test_common_mano.py", "21_joints"),
    ("sources/interhand.py", "INTERHAND_TO_OURS = (20, 3, 2, 1, 0,", "INTERHAND_TO_OURS = (20, 0, 1, 2, 3,", "sources/test_data.py", "interhand"),
    # units and half pixels
    ("common.py", "return (width - 1) / 2, (height - 1) / 2", "return width / 2, height / 2", "test_common_transforms.py", "rearrangements or quarter_turn"),
    ("common.py", "shift = (size - 1) / 2 - s[..., None] * middle", "shift = size / 2 - s[..., None] * middle", "test_common_transforms.py", "resizing"),
    ("common.py", "return _matrix([[1 - 2 * on, zero, on * (width - 1)]", "return _matrix([[1 - 2 * on, zero, on * width]", "test_common_transforms.py", "name_says"),
    ("common.py", "+ back[..., k, 2, None, None]) + 1) / side - 1", "+ back[..., k, 2, None, None])) / side - 1", "test_common_transforms.py", "dots or rearrangements"),
    ("sources/interhand.py", 'joints = np.einsum("nij,nkj->nki", column["R"], joints) / 1000', 'joints = np.einsum("nij,nkj->nki", column["R"], joints) / 100',
     "sources/test_data.py", "interhand"),
    ("ti_net.py", "return 2 * math.pi * uniform(index, 4, cfg.seed", "return 360 * uniform(index, 4, cfg.seed", "test_ti_net.py", "fill_the_circle"),
    ("ti_net.py", "xy = 10 * camera[:, None, :1].exp()", "xy = 10 * camera[:, None, :1]", "test_ti_net.py", "back_in_the_picture"),
    # detached, masked, counted
    ("ti_net.py", "self.extra(torch.cat([f, theta], 1).detach())", "self.extra(torch.cat([f, theta], 1))", "test_ti_net.py", "does_not_reach"),
    ("ti_net.py", 'ok.any(1) & ~has["pose"])', 'ok.any(1))', "test_ti_net.py", "without_a_label"),
    ("ti_net.py", "every = list(range(len(self.plan.pictures)))", "every = [0]", "test_ti_net.py", "mean_over_all"),
    ("ti_net.py", "    if element not in pictures:\n            pictures.append(element)", "    pictures.append(element)", "test_ti_net.py", "number_of_pictures"),
    ("ti_net.py", "square = S if corners else math.ceil(S * math.sqrt(2))", "square = S", "test_ti_net.py", "black_corners"),
    ("ti_net.py", "nn.init.zeros_(self.M.weight)", "pass", "test_ti_net.py", "start_at_the_identity"),
    ("ti_net.py", "return difference.square().mean()", "return difference.square().sum()", "test_ti_net.py", "mean_square"),
    ("ti_net.py", "with autocast(views.device):                    # the network only", "if True:                    # the network only",
     "test_ti_net.py", "bfloat16"),
    ("common.py", "    return (A[..., None, :2, :2] * points[..., None, :]).sum(-1) + A[..., None, :2, 2]",
     "    return points @ A[..., :2, :2].mT + A[..., None, :2, 2]", "test_common_transforms.py", "autocast"),
    ("ti_net.py", 'ok = batch["joints_ok"] & batch["joints_ok"][:, :1]', 'ok = batch["joints_ok"]', "test_ti_net.py", "without_a_wrist"),
    # PeCLR: the notes' list, then detaches, masks, units
    ("peclr.py", "z = torch.stack([c * x - s * y, s * x + c * y], -1) + mean", "z = torch.stack([c * x + s * y, c * y - s * x], -1) + mean",
     "test_peclr.py", "peclr_loss_and_gradient or whatever_was_drawn"),
    ("peclr.py", "z = z - shift[:, None] * L_z", "z = z + shift[:, None] * L_z", "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)).detach()", "L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True))",
     "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "mean, (c, s) = z.mean(1, keepdim=True).detach(),", "mean, (c, s) = z.mean(1, keepdim=True),", "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "z = F.normalize(p, dim=1).unflatten(1, (-1, 2))", "z = p.unflatten(1, (-1, 2))", "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "    if shift is not None:\n        axes = (1, 2) if one_range else (1,)\n        L_z =",
     "    if angle is not None:\n        m, a = z.mean(1, keepdim=True).detach(), -angle\n        x, y = (z - m).unbind(-1)\n"
     "        z = torch.stack([a.cos()[:, None] * x + a.sin()[:, None] * y, a.cos()[:, None] * y - a.sin()[:, None] * x], -1) + m\n"
     "        angle = None\n    if shift is not None:\n        axes = (1, 2) if one_range else (1,)\n        L_z =",
     "test_peclr.py", "peclr_loss_and_gradient"),                       # rotate before translate
    ("peclr.py", "return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B))",
     "return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B), reduction='sum')", "test_peclr.py", "double_loop"),
    ("peclr.py", "        norm.track_running_stats = False\n", "        pass\n", "test_peclr.py", "cached_step"),
    ("peclr.py", "(world() * terms[\"loss\"]).backward()\n    norms", "terms[\"loss\"].backward()\n    norms", "test_peclr.py", "processes"),
    ("peclr.py", "parts[rank()] = z", "parts[0] = z", "test_peclr.py", "processes"),
    ("peclr.py", "if cfg.objective == \"simclr\":\n        return p", "if cfg.objective == \"none\":\n        return p", "test_peclr.py", "simclr_objective"),
    ("peclr.py", "with autocast(views.device):                    # the network only", "if True:                    # the network only", "test_peclr.py", "bfloat16"),
    ("peclr.py", "self.backbone.train(mode and not self.cfg.freeze)", "self.backbone.train(mode)", "test_peclr.py", "frozen"),
    ("peclr.py", "return out, *self.depth(out.detach(), K)", "return out, *self.depth(out, K)", "test_peclr.py", "refinement_does_not"),
    ("peclr.py", "first = 2 * joints[:, 0] - other if back", "first = joints[:, 0] if back", "test_peclr.py", "lift_back or true_hand"),
    ("peclr.py", "\"middle\": Convention((0, 9), MIDDLE_BONE,", "\"middle\": Convention((0, 9), (5, 6),", "test_peclr.py", "true_hand"),
    ("peclr.py", "w.grad.copy_(torch.where(both, (w.grad + decay * w) * q.clamp(max=1), w.grad))",
     "w.grad.copy_(torch.where(both, (w.grad + decay * w) * q, w.grad))", "test_peclr.py", "lars"),
    ("peclr.py", "return peak * step / max(1, warm - 1)", "return peak * step / warm", "test_peclr.py", "official_schedule"),
    ("peclr.py", "            seen_K = A @ K                          # outside: bfloat16 intrinsics are millimetres off\n            with autocast(crops.device):\n",
     "            with autocast(crops.device):\n                seen_K = A @ K\n", "test_peclr.py", "true_hand"),
    ("peclr.py", "loss = L_J2D + 5 * L_d + L_root", "loss = L_J2D + L_d + L_root", "test_peclr.py", "equation_5"),
    ("peclr.py", "(terms[\"loss\"] / last).backward()", "terms[\"loss\"].backward()", "test_peclr.py", "only_their_micro_batch"),
    ("peclr.py", "group[\"lr\"] = lr_at(run.step, peak, warm, total)", "group[\"lr\"] = peak", "test_peclr.py", "rate_of_every_step"),
    ("peclr.py", "low = torch.tensor([0.01, 0.01, 0.5, 5 / 255]", "low = torch.tensor([0.01, 0.01, 0.01, 5 / 255]", "test_peclr.py", "ranges_are"),
    ("peclr.py", "VIEW_MARGIN, VIEW_STORE = 2.9, 2.0", "VIEW_MARGIN, VIEW_STORE = 2.2, 2.0", "test_peclr.py", "black_wedge"),
    ("peclr.py", "    elif cfg.freeze:\n        settle_statistics(model, data, device)\n", "", "test_peclr.py", "random_encoder_frozen_by_the_command"),
    ("peclr.py", "length = torch.where(batch[\"scale\"] == 1, self.unit, batch[\"scale\"])", "length = batch[\"scale\"]", "test_peclr.py", "true_hand"),
    ("common.py", "order = torch.cat([order + k * again for k in range(math.ceil(need / n))])[:need]", "order = torch.cat([order for k in range(math.ceil(need / n))])[:need]",
     "test_common_run.py", "taken_again"),
    ("eval.py", "area = (99.5 - torch.searchsorted(limits, error, right=True)", "area = (99.5 - torch.searchsorted(limits, error)", "test_eval.py", "zero_under_every"),
    # HandMIM
    # signs, orders, centres
    ("handmim.py", "return torch.stack([c * x + s * y, c * y - s * x], -1)", "return torch.stack([c * x - s * y, c * y + s * x], -1)", "test_handmim.py", "pictures_move or order_the"),
    ("handmim.py", "return turn(view.gamma[..., None, None] * points - view.shift", "return turn(view.gamma[..., None, None] * points + view.shift", "test_handmim.py", "pictures_move or undoing"),
    ("handmim.py", "back, shift = turn(points, -view.angle), view.shift", "back, shift = turn(points, view.angle), view.shift", "test_handmim.py", "undoing"),
    ("handmim.py", "return (back + shift) / view.gamma", "return (back - shift) / view.gamma", "test_handmim.py", "undoing"),
    ("handmim.py", "shift = shift * (back.amax(-2", "shift = shift * (points.amax(-2", "test_handmim.py", "undoing"),
    ("handmim.py", "return View(rotation(angle, cfg.image_size) @ A, angle,", "return View(A @ rotation(angle, side), angle,", "test_handmim.py", "pictures_move or range_and"),
    ("handmim.py", "width = (0.08 + 0.92 * u[:, 0]).sqrt()", "width = 0.08 + 0.92 * u[:, 0]", "test_handmim.py", "range_and"),
    ("handmim.py", "scaled=\"unscaled-shift\" not in how", "scaled=False", "test_handmim.py", "a_pass_scores"),
    ("handmim.py", "flip(u[:, 4] < 0.5, S)", "flip(u[:, 4] < 0.0, S)", "test_handmim.py", "ibot_s_own"),
    # colours and masks
    ("handmim.py", "u[:, 6] < (1.0, 0.1)[number]", "u[:, 6] < (0.1, 1.0)[number]", "test_handmim.py", "second_view"),
    ("handmim.py", "u[:, 8] < (0.0, 0.2)[number]", "u[:, 8] < 0.2", "test_handmim.py", "second_view"),
    ("common.py", "saturation * torch.minimum(k, 4 - k).clamp(0, 1))", "saturation * torch.minimum(k, 3 - k).clamp(0, 1))", "test_handmim.py", "jitter"),
    ("common.py", "(images >= 0.5), 1 - images", "(images <= 0.5), 1 - images", "test_handmim.py", "grey_blur"),
    ("handmim.py", "least = float((grid // 3) ** 2)", "least = 1.0", "test_handmim.py", "statistics"),
    ("handmim.py", "(count <= left) & (failures < 10)", "(failures < 10)", "test_handmim.py", "statistics"),
    ("handmim.py", "ratio = ratio * (u[:, 1] < 0.5)", "ratio = ratio * 1", "test_handmim.py", "leaves_half"),
    ("common.py", "x = torch.where(mask[..., None], mask_token.to(x.dtype), x)", "x = torch.where(~mask[..., None], mask_token.to(x.dtype), x)", "test_handmim.py", "masked_vit"),
    ("handmim.py", ">= chance) / (1 - chance)", ">= chance) * 1.0", "test_handmim.py", "stochastic"),
    # model and losses
    ("handmim.py", "p = ((teacher - centre) / tau).softmax(-1)\n    return", "p = (teacher / tau).softmax(-1)\n    return", "test_handmim.py", "match_golden or match_loops"),
    ("handmim.py", "cross_entropy(student, teacher.flip(1), centre, tau).mean()", "cross_entropy(student, teacher, centre, tau).mean()", "test_handmim.py", "match_loops"),
    ("handmim.py", "weight = 1 / hidden.sum(1, keepdim=True).clamp(min=1) / len(x)", "weight = 1 / hidden.sum(1, keepdim=True).clamp(min=1)", "test_handmim.py", "a_pass_scores"),
    ("handmim.py", "cls.mean((0, 1)), self.mean_logits(tokens[:, 1:].flatten(0, 1))", "cls.mean((0, 1)), self.mean_logits(tokens[:, 1:][hidden])", "test_handmim.py", "a_pass_scores"),
    ("handmim.py", "        if k + 1 in taps:\n            tapped.append(x)\n    return vit.norm(x), tapped", "        if k in taps:\n            tapped.append(x)\n    return vit.norm(x), tapped", "test_handmim.py", "masked_vit"),
    ("handmim.py", "x = F.interpolate(x, scale_factor=2 ** k) if k else x", "x = F.interpolate(x, scale_factor=2 ** k, mode='bilinear') if k else x", "test_handmim.py", "linear_of"),
    ("handmim.py", "T = up(F.gelu(x))", "T = up(F.relu(x))", "test_handmim.py", "linear_of"),
    ("handmim.py", "return ((error * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()", "return (error * mask).sum() / mask.sum().clamp(min=1)", "test_handmim.py", "simmim"),
    ("handmim.py", "return z.unflatten(-1, LATENT).mT", "return z.unflatten(-1, LATENT)", "test_handmim.py", "readings"),
    # teacher, centres, clipping
    ("handmim.py", "torch._foreach_lerp_(teacher, student, 1 - momentum)", "torch._foreach_lerp_(teacher, student, momentum)", "test_handmim.py", "moves_the_teacher"),
    ("handmim.py", "centre.lerp_(now.to(centre.dtype), 1 - CENTRE_MOMENTUM)", "centre.lerp_(now.to(centre.dtype), CENTRE_MOMENTUM)", "test_handmim.py", "moves_the_teacher or offset"),
    ("handmim.py", "            p.grad = None                           # AdamW", "            pass                           # AdamW", "test_handmim.py", "moves_the_teacher"),
    ("handmim.py", "gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))", "gradient.mul_(1)", "test_handmim.py", "moves_the_teacher"),
    ("handmim.py", "            torch.distributed.all_reduce(now)\n            now /= world()", "            pass", "test_handmim.py", "two_processes"),
    ("handmim.py", "learn_norm = cfg.backbone in (\"vit_mini\", \"vit_s\")", "learn_norm = True", "test_handmim.py", "small_vits"),
    ("handmim.py", "save_checkpoint(out / file, cpu_state(vit))", "save_checkpoint(out / file, cpu_state(model.student.backbone))", "test_handmim.py", "cli_smoke"),
    # fine-tuning
    ("handmim.py", "grid = uv / (size / 2) - 1 if pymaf else (2 * uv + 1) / size - 1", "grid = uv / (size / 2) - 1 if pymaf else 2 * uv / size - 1", "test_handmim.py", "a_pixel_reads"),
    ("handmim.py", "padding_mode=\"zeros\" if pymaf else \"border\"", "padding_mode=\"zeros\"", "test_handmim.py", "a_pixel_reads"),
    ("handmim.py", "return A @ K @ invert(rotation(angle, 1))", "return A @ K @ rotation(angle, 1)", "test_handmim.py", "turned_hands"),
    ("handmim.py", "state = state.detach()                       # PyMAF", "state = state + 0                       # PyMAF", "test_handmim.py", "feedback"),
    ("handmim.py", "turned = rotate_z(angle, R[:, 0].mT).mT", "turned = rotate_z(angle, R[:, 0])", "test_handmim.py", "perfect_answer"),
    ("handmim.py", "wrist = joints[:, :1]\n    return Hand(torch.cat", "wrist = batch['joints'][:, :1]\n    return Hand(torch.cat", "test_handmim.py", "perfect_answer"),
    ("handmim.py", "depth = focal / (self.size / 2 * 10 * camera[:, 0].exp())", "depth = focal / (self.size / 2 * 10) * camera[:, 0].exp()", "test_handmim.py", "perfect_answer"),
    ("handmim.py", "root, trans = (torch.where(finite[:, None], x, math.nan) for x in (hand.t, hand.trans))", "root, trans = hand.t, hand.trans", "test_handmim.py", "keeps_the_contract"),
    ("handmim.py", "project(joints + t[:, None], K), t - wrist[:, 0])", "project(joints + t[:, None], K), t)", "test_handmim.py", "keeps_the_contract"),
    ("handmim.py", "L_pose = times * pose_loss(out.student, out.teacher, model.centre, tau)", "L_pose = times * pose_loss(out.student, out.teacher, model.centre_patch, tau)", "test_handmim.py", "its_own_centre"),
    ("handmim.py", "flat(out.pictures), flat(views), flat(masks))", "flat(out.pictures), flat(views), ~flat(masks))", "test_handmim.py", "its_own_centre"),
    ("handmim.py", "masked(square(hand.beta, true.beta).mean(1), many(has[\"shape\"]))", "square(hand.beta, true.beta).mean()", "test_handmim.py", "without_a_label"),
    ("handmim.py", "for part in (vit.patch_embed, vit.cls_token, vit.pos_embed,", "for part in (vit.patch_embed,", "test_handmim.py", "frozen_blocks"),
    ("common.py", "order = len(missing), \"teacher\" not in f\"{place}/{prefix}\",", "order = len(missing), \"student\" not in f\"{place}/{prefix}\",", "test_handmim.py", "dino_ibot"),
    ("handmim.py", "left=hand[\"side\"] == \"left\"", "left=hand[\"side\"] == \"right\"", "test_handmim.py", "cut_from_whole"),
    # HaMuCo
    ("hamuco.py", "camera[:, None, :1].relu() * xyz[..., :2] + camera[:, None, 1:]",
     "camera[:, None, :1] * xyz[..., :2] + camera[:, None, 1:]", "test_hamuco.py", "camera_projects"),
    ("hamuco.py", "(self.A.sum(1, keepdim=True) + 1e-5)",
     "(self.A.sum(0, keepdim=True) + 1e-5)", "test_hamuco.py", "golden"),
    ("hamuco.py", "- x[:, :, None, :, :2].detach()).abs()",
     "- x[:, :, None, :, :2]).abs()", "test_hamuco.py", "golden or loss"),
    ("hamuco.py", "return mean_where((fuse(aligned, ok).detach() - x).abs(), ok)",
     "return mean_where((fuse(aligned, ok) - x).abs(), ok)", "test_hamuco.py", "golden or loss"),
    ("hamuco.py", "not in off and step % 2 == 0)",
     "not in off and step % 2 == 1)", "test_hamuco.py", "step_number"),
    ("hamuco.py", 'turn = None if R is None else torch.einsum("biac,bjdc->bijad"',
     'turn = None if R is None else torch.einsum("bjac,bidc->bijad"', "test_hamuco.py", "rotated_hands or golden"),
    ("hamuco.py", '    w = ok.to(aligned.dtype)\n',
     '    w = torch.ones_like(ok).to(aligned.dtype)\n', "test_hamuco.py", "missing_view"),
    ("hamuco.py", "    return R + W @ R\n", "    return R\n", "test_hamuco.py", "golden or gradcheck or rotation"),
    ("hamuco.py", "return R if angle is None else rotate_z(",
     "return R if angle is not None else rotate_z(", "test_hamuco.py", "turned_pictures"),
    ("hamuco.py", "norm(dim=-1) / 2 < limit",
     "norm(dim=-1) < limit", "test_hamuco.py", "ransac"),
    ("hamuco.py", 'labels[batch["index"].cpu() % len(labels)]',
     'labels[batch["index"].cpu()]', "test_hamuco.py", "repeated_one"),
    ("hamuco.py", "single.beta.detach()",
     "single.beta", "test_hamuco.py", "gradients_reach"),
    ("hamuco.py", "sample_joints(H, uv.detach())",
     "sample_joints(H, uv)", "test_hamuco.py", "gradients_reach or golden"),
    ("hamuco.py", 'return {"loss": L_c + L_d + L_2D + L_p + L_3D,',
     'return {"loss": L_c + L_d + L_2D + L_p,', "test_hamuco.py", "full_supervision"),
    ("hamuco.py", "view.A.flatten(0, 1), S).float()",
     "view.A.transpose(0, 1).flatten(0, 1), S).float()", "test_hamuco.py", "lie_on_each"),
    ("hamuco.py", "uv = SPAN * xyz, transform(invert(A), to_px(uv, self.size))",
     "uv = SPAN * xyz, transform(A, to_px(uv, self.size))", "test_hamuco.py", "lie_on_each"),
    ("sources/loader.py", 'M[v] = D @ index.columns["cameras"][row] @ D',
     'M[v] = index.columns["cameras"][row]', "test_hamuco.py", "left_hands_are_mirrored"),
    # scores
    ("common.py", ".to(A) if reflect else", ".to(A) if not reflect else", "test_common_metrics.py", ""),
    ("eval.py", "mpjpe(f[\"joints\"], f[\"true\"], ok), pa_mpjpe(f[\"joints\"], f[\"true\"], ok, reflect=True)",
     "mpjpe(f[\"joints\"], f[\"true\"], ok), pa_mpjpe(f[\"joints\"], f[\"true\"], ok)", "test_eval.py", "reflections"),
    ("eval.py", "wide = torch.cat([error.masked_fill(left, math.nan), error.masked_fill(~left, math.nan)], 1)", "wide = error",
     "test_eval.py", "joints_first"),
    ("sources/judging.py", '"joints": mean(t["joints"] - t["joints"][:, :1]),', '"joints": mean(t["joints"]),', "test_common_metrics.py", "mean_hand_is_rooted"),
    ("common.py", "b = (ray * points[..., 2:] - points[..., :2])", "b = (ray * points[..., 2:] + points[..., :2])", "test_common_metrics.py", "place"),
    # runs
    ("common.py", 'if p.ndim <= 1], "weight_decay": 0.0}', 'if p.ndim <= 1], "weight_decay": weight_decay}', "test_common_run.py", "decay"),
    ("common.py", "micro = order.view(steps, -1, cfg.micro_batch)[first:,", "micro = order.view(steps, -1, cfg.micro_batch)[:steps - first,", "test_common_run.py", "goes_on_where"),
    ("common.py", 'self.log = Log(folder, state["log_bytes"] if state else 0)', "self.log = Log(folder, 10 ** 9)", "test_common_run.py", "cuts_its_log"),
    ("common.py", "    partial.replace(path)\n\n\ndef load_checkpoint", "    pass\n\n\ndef load_checkpoint", "test_common_run.py", "replaced_whole"),
    ("common.py", "return torch.load(path, map_location=\"cpu\", weights_only=True)", "return torch.load(path, map_location=\"cpu\", weights_only=False)",
     "test_common_backbones.py", "hostile"),
    ("hand/official.py", "kind = _PICKLE_NAMES.get(f\"{module}.{name}\")", "kind = _PICKLE_NAMES.get(f\"{module}.{name}\", \"set\")", "test_common_mano.py", "payloads"),
]


def run(tree: Path, tests: str, words: str) -> bool:
    """Whether the chosen tests pass in a tree."""
    chosen = ["-k", words] if words else []
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}",
                           *chosen], cwd=tree, capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"{tests} -k {words!r}: pytest could not run it\n{done.stdout[-1500:]}")
    return done.returncode == 0


def main() -> int:
    numbers = [int(x) for x in sys.argv[1:]] or range(len(MUTANTS))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", "cache", "data", "__pycache__"))
        passed: set[tuple[str, str]] = set()
        for number in numbers:
            name, old, new, tests, words = MUTANTS[number]
            text = (ROOT / name).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{number}: {name} holds {old!r} {text.count(old)} times, not once")
            if (tests, words) not in passed and not run(tree, tests, words):
                raise SystemExit(f"{number}: {tests} -k {words!r} fails before anything is broken")
            passed.add((tests, words))
            (tree / name).write_text(text.replace(old, new))
            killed = not run(tree, tests, words)
            (tree / name).write_text(text)
            survivors += not killed
            print(f"{number:2d} {'killed by' if killed else 'SURVIVES '} {tests} -k '{words}': {new[:70].splitlines()[:1]}", flush=True)
    print(f"{len(numbers) - survivors} of {len(numbers)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
