"""Faults of peclr: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    # PeCLR: the notes' list, then detaches, masks, units
    ("peclr.py", "z = torch.stack([c * x - s * y, s * x + c * y], -1) + mean", "z = torch.stack([c * x + s * y, c * y - s * x], -1) + mean",
     "test_peclr.py", "peclr_loss_and_gradient or whatever_was_drawn"),
    ("peclr.py", "z = z - shift[:, None] * L_z", "z = z + shift[:, None] * L_z", "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)).detach()", "L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True))",
     "test_peclr.py", "peclr_loss_and_gradient"),
    ("peclr.py", "mean = z.mean(1, keepdim=True).detach()", "mean = z.mean(1, keepdim=True)", "test_peclr.py", "peclr_loss_and_gradient"),
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
    ("peclr.py", "with autocast(views.device):               # the network only", "if True:               # the network only", "test_peclr.py", "bfloat16"),
    ("peclr.py", "self.backbone.train(mode and not self.cfg.freeze)", "self.backbone.train(mode)", "test_peclr.py", "frozen"),
    ("peclr.py", "rays, root = self.depth(out.detach(), K)", "rays, root = self.depth(out, K)", "test_peclr.py", "refinement_does_not"),
    ("peclr.py", "wrist = wrist - rooted[:, joint, None]", "wrist = wrist - rooted[:, :1]", "test_peclr.py", "lift_back or true_hand"),
    ("peclr.py", "\"middle\": Convention((0, 9), MIDDLE_BONE,", "\"middle\": Convention((0, 9), (5, 6),", "test_peclr.py", "true_hand"),
    ("peclr.py", "q = (trust / group[\"lr\"]).clamp(max=1)", "q = trust / group[\"lr\"]", "test_peclr.py", "lars"),
    ("peclr.py", "return peak * step / max(1, warm - 1)", "return peak * step / warm", "test_peclr.py", "official_schedule"),
    ("peclr.py", "        seen_K = A @ K                          # outside: bfloat16 intrinsics are millimetres off\n        with autocast(crops.device):\n",
     "        with autocast(crops.device):\n            seen_K = A @ K\n", "test_peclr.py", "true_hand"),
    ("peclr.py", "loss = L_J2D + 5 * L_d + L_root", "loss = L_J2D + L_d + L_root", "test_peclr.py", "equation_5"),
    ("peclr.py", "            (terms[\"loss\"] / len(micro_batches)).backward()\n        for", "            terms[\"loss\"].backward()\n        for", "test_peclr.py", "only_their_micro_batch"),
    ("peclr.py", "rate = lr_at(run.step, peak, warm, total)", "rate = peak", "test_peclr.py", "rate_of_every_step"),
    ("peclr.py", "low = torch.tensor([0.01, 0.01, 0.5, 5 / 255]", "low = torch.tensor([0.01, 0.01, 0.01, 5 / 255]", "test_peclr.py", "ranges_are"),
    ("peclr.py", "VIEW_MARGIN = 2.9 ", "VIEW_MARGIN = 2.2 ", "test_peclr.py", "black_wedge"),
    ("peclr.py", "    elif cfg.freeze:\n        settle_statistics(model, data, device)\n", "", "test_peclr.py", "random_encoder_frozen_by_the_command"),
    ("peclr.py", "length = torch.where(batch[\"scale\"] == NOT_GIVEN, self.unit, batch[\"scale\"])", "length = batch[\"scale\"]", "test_peclr.py", "true_hand"),
]
