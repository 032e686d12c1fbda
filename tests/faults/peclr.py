"""Faults of peclr: file, line as it stands, line as broken, the test file and the part of the test's name."""

STEP = "test_peclr_step.py"
PRE = "step_of_pretraining and whole-peclr"                  # the quickest test that sees the line
VIEWS = "ten_transformations"
TUNE = "step_of_finetuning and tuned-middle"
PREDICT = "equation_6 and middle-one-pass"
LOOP = "loop_of_pretraining and whole"
CACHED = "loop_of_pretraining and cached"
TUNED = "loop_of_finetuning and frozen"

# Line as it stands, line as broken, part of the test's name in test_peclr_step.py.
BROKEN = [
    # Views: what is drawn, from which stream, and in which order it is applied
    ("amax(1)\n    known", "mean(1)\n    known", VIEWS),
    ("known = (radius > 0) &", "known = (radius >= 0).logical_not() &", VIEWS),
    ("& (not box_only)", "& True", "variants and box-crops"),
    ("middle = torch.where(known[:, None], middle, (side - 1) / 2)", "middle = torch.where(known[:, None], middle, side / 2)", VIEWS),
    ("RADIUS * side / VIEW_MARGIN", "RADIUS * side / MARGIN", VIEWS),
    ("u = uniform(batch[\"index\"], 4, cfg.seed, \"peclr view\", epoch, view)", "u = uniform(batch[\"index\"], 4, cfg.seed, \"peclr view\", epoch, 0)", PRE),
    ("\"peclr view\", epoch, view)", "\"peclr view\", 0, view)", PRE),
    ("margin = 0.9 + 0.6 * u[:, 0] if", "margin = 0.9 + 0.6 * u[:, 1] if", PRE),
    ("torch.full_like(u[:, 0], 1.25)", "torch.full_like(u[:, 0], 1.5)", "variants and rotation"),
    ("A = rotation(angle, S) @ A", "A = rotation(-angle, S) @ A", PRE),
    ("        shift = (15 * u[:, 2:] - 7.5) / 128\n        A = translation(S * shift) @ A", "        shift = (15 * u[:, 2:] - 7.5) / 128\n        A = A @ translation(S * shift)", PRE),
    ("picture_side = side / batch[\"crop\"][:, 0, 0].abs() ", "picture_side = side / batch[\"crop\"][:, 0, 0] ", "variants and authors-shift"),
    ("shift = jitter / S  ", "shift = jitter / picture_side[:, None]  ", "variants and authors-shift"),
    ("return uniform(index, n, cfg.seed, f\"peclr {purpose}\", epoch, view)", "return uniform(index, n, cfg.seed, f\"peclr {purpose}\", epoch)", VIEWS),
    ("\"peclr noise\", epoch, view)", "\"peclr noise\", epoch)", VIEWS),
    ("cut_out(images, draw(3, \"cut-out\"))", "cut_out(images, draw(3, \"blur\"))", VIEWS),
    ("epoch, k, transformations(cfg))", "epoch, 0, transformations(cfg))", PRE),
    ("drawn = (draw_view(batch, cfg, epoch, 0), draw_view(batch, cfg, epoch, 1))", "drawn = (draw_view(batch, cfg, epoch, 0),) * 2", PRE),
    ("return normalise(255 * torch.stack(views)), drawn", "return torch.stack(views), drawn", PRE),
    ("return cfg.augment or BEST[cfg.objective]", "return cfg.augment or BEST[\"peclr\"]", "step_of_pretraining and whole-simclr"),
    # The network and what is undone
    ("images.contiguous(memory_format=torch.channels_last))[-1].mean((2, 3))", "images.contiguous(memory_format=torch.channels_last))[-1].amax((2, 3))", PRE),
    ("nn.BatchNorm1d(512), nn.ReLU(),\n                               nn.Linear(512, 128", "nn.BatchNorm1d(512), nn.GELU(),\n                               nn.Linear(512, 128", PRE),
    ("undo_view(p[k], g.angle, g.shift, one_range) for k, g in enumerate(drawn)", "undo_view(p[k], g.angle, g.shift, one_range) for k, g in enumerate(drawn[::-1])", PRE),
    ("undo_view(p[k], g.angle, g.shift, one_range) for", "undo_view(p[k], g.angle, g.shift) for", "variants and one-range"),
    ("p = p.to(torch.promote_types(p.dtype, torch.float32)).unflatten(0, (2, -1))", "p = p.to(torch.promote_types(p.dtype, torch.float32)).unflatten(0, (-1, 2)).transpose(0, 1)", PRE),
    ("axes = (1, 2) if one_range else (1,)", "axes = (0, 1) if one_range else (1,)", "variants and one-range"),
    ("similarity = (z @ z.T / tau).fill_diagonal_(-math.inf)", "similarity = z @ z.T / tau", PRE),
    ("\"nearest\": nearest.float().mean()", "\"nearest\": positive.float().mean()", PRE),
    ("(table.sum() - positive.sum()) / max(1, B * B - B)", "table.mean()", PRE),
    # The three forms of a step
    ("slopes = z.grad.split(cfg.micro_batch, 1)", "slopes = z.grad.split(cfg.micro_batch, 1)[::-1]", "step_of_pretraining and cached-peclr"),
    ("projections(net, batch, cfg, epoch).backward(slope)", "projections(net, batch, cfg, 0).backward(slope)", "step_of_pretraining and cached-peclr"),
    ("terms = {\"loss\": nt_xent(z, cfg.tau),", "terms = {\"loss\": nt_xent(z, 0.1),", "step_of_pretraining and accumulated-peclr"),
    ("loss = nt_xent(everyone, cfg.tau)", "loss = nt_xent(everyone, 0.5)", "variants and one-range"),
    # 2.5D targets, losses and the network
    ("joints = torch.where(batch[\"joints_ok\"][..., None], batch[\"joints\"], math.nan)", "joints = batch[\"joints\"]", TUNE),
    ("unit = bone_length(joints, convention.bone)", "unit = bone_length(joints, MIDDLE_BONE)", "step_of_finetuning and tuned-index"),
    ("root_uv = transform(A, project(rooted[:, :1], batch[\"K\"]))", "root_uv = project(rooted[:, :1], batch[\"K\"])", TUNE),
    ("root_uv = torch.where(root_uv.isfinite(), root_uv, rooted_uv[:, :1])", "root_uv = rooted_uv[:, :1]", TUNE),
    ("return torch.cat([uv, (depth - depth[:, :1])[..., None]], -1), depth[:, 0], unit", "return torch.cat([uv, (depth - depth[:, :1])[..., None]], -1), rooted[:, 0, 2], unit", TUNE),
    ("flat = known[..., :2].all(-1)", "flat = known.all(-1)", TUNE),
    ("L_J2D = (error[..., :2].mean(-1) * flat)", "L_J2D = (error[..., :2].sum(-1) * flat)", TUNE),
    ("/ deep.sum().clamp(min=1)", "/ deep.numel()", TUNE),
    ("error = (pred - true).abs().where(known, 0)", "error = (pred.detach() - true).abs().where(known, 0) + 0 * pred", TUNE),
    ("crops, A = hand_view(batch[\"image\"], cfg, epoch, batch[\"index\"])\n    true", "crops, A = hand_view(batch[\"image\"], cfg)\n    true", TUNE),
    ("K = A @ view_intrinsics(batch)  ", "K = view_intrinsics(batch)  ", TUNE),
    ("known = root_true.isfinite()", "known = batch[\"joints_ok\"].any(1) & root_true.isfinite()[0]", TUNE),
    ("\"peclr fine-tuning\", epoch)", "\"peclr fine-tuning\")", TUNE),
    ("turn = rotation((2 * u[:, 0] - 1) * math.pi / 4, S)", "turn = rotation((2 * u[:, 1] - 1) * math.pi / 4, S)", TUNE),
    ("torch.full((B,), L * CROP / MARGIN, device=image.device)", "torch.full((B,), L / MARGIN, device=image.device)", TUNE),
    ("return normalise(warp(image, A, S)), A", "return warp(image, A, S) / 255.0, A", TUNE),
    ("hidden = [nn.Linear(width, 512), nn.ReLU()]", "hidden = [nn.Linear(width, 512), nn.Tanh()]", "step_of_finetuning and frozen-middle"),
    ("slope = self.convention.slope", "slope = 0.0", TUNE),
    ("F.pad(out[:, 1:, 2:], (0, 0, 1, 0))], -1)", "out[..., 2:]], -1)", TUNE),
    ("root = root_depth(rays, out[..., 2], c.bone, c.floor).clamp(*c.limits)", "root = root_depth(rays, out[..., 2], c.bone, c.floor)", "equation_6 and middle"),
    ("parts = parts[::-1] if c.depth_first else parts", "parts = parts[::-1]", TUNE),
    ("return rays, root + self.refine(torch.cat(parts, 1))[:, 0]", "return rays, self.refine(torch.cat(parts, 1))[:, 0]", TUNE),
    # Prediction is training's twin
    ("        seen_K = A @ K\n        out", "        seen_K = K\n        out", PREDICT),
    ("            seen_K = A @ K\n", "            seen_K = seen_K + 0\n", "equation_6 and middle-two-pass"),
    ("            crops = normalise(warp(batch[\"image\"], A, S))", "            crops = warp(batch[\"image\"], A, S) / 255.0", "equation_6 and middle-two-pass"),
    ("length = length / bone_length(joints, MIDDLE_BONE).clamp(min=1e-6)", "length = length * bone_length(joints, MIDDLE_BONE)", "equation_6 and index-one-pass"),
    ("uv = torch.cat([project(joints[:, :1], seen_K), out[:, 1:, :2]], 1)", "uv = out[..., :2]", PREDICT),
    ("\"uv\": transform(invert(A), uv)}", "\"uv\": transform(A, uv)}", PREDICT),
    # Loops: schedule, decay, --init, modes, gradients, what is opened and what is written
    ("        say(load_backbone(model.backbone, cfg.init))\n    side", "        say(str(cfg.init))\n    side", LOOP),
    ("        say(load_backbone(model.backbone, cfg.init))\n        released", "        say(str(cfg.init))\n        released", TUNED),
    ("optimizer = Lars(decay_groups(model, cfg.weight_decay))", "optimizer = Lars(decay_groups(model, 0.0))", LOOP),
    ("optimizer = torch.optim.Adam(decay_groups(model, cfg.weight_decay),", "optimizer = torch.optim.Adam(model.parameters(),", TUNED),
    ("peak = cfg.lr * math.sqrt(cfg.batch_size / 2048)", "peak = cfg.lr", LOOP),
    ("rate = lr_at(run.step, cfg.lr, warm, total)", "rate = lr_at(step, cfg.lr, warm, total)", TUNED),
    ("    for epoch in range(run.step // steps, cfg.epochs):\n        model.train()\n        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):",
     "    model.train()\n    for epoch in range(run.step // steps, cfg.epochs):\n        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):", TUNED),
    ("terms = cached_step(net, micro_batches, cfg, epoch)", "terms = cached_step(net, micro_batches, cfg, 0)", CACHED),
    ("terms = whole_step(net, micro_batches[0], cfg, epoch)", "terms = accumulated_step(net, micro_batches[:1], cfg, 0)", LOOP),
    ("terms = finetune_step(net, batch, cfg, epoch)", "terms = finetune_step(net, batch, cfg, 0)", TUNED),
    ("                        (terms[\"loss\"] / len(micro_batches)).backward()", "                        terms[\"loss\"].backward()", TUNED),
    ("order = mixed_order(sizes, cfg.seed, epoch) if mixed else None", "order = mixed_order(sizes, cfg.seed, 0) if mixed else None", "mixed_data"),
    ("mixed = cfg.mix == \"authors\" and len(sizes) > 1", "mixed = len(sizes) > 1", "mixed_data"),
    ("            with batch_statistics(model):\n                if", "            if True:\n                if", CACHED),
    ("    start_at_mean(model, data, mean)\n", "", TUNED),
    ("\"val\", side, MARGIN, device)", "\"val\", side, VIEW_MARGIN, device)", TUNED),
    ("data = open_data(cfg, cfg.data, \"train\", side, VIEW_MARGIN, device)", "data = open_data(cfg, cfg.data, \"train\", side, MARGIN, device)", LOOP),
    ("for view, uv in zip(crops, transform(A, batch[\"uv\"]))]", "for view, uv in zip(crops, batch[\"uv\"])]", "pictures_of_views"),
    ("STORE = 1.5   ", "STORE = 1.0   ", "authors_code"),
    ("PROBE = dict(epochs=50)   ", "PROBE = dict(epochs=100)   ", "authors_code"),
    ("            with batch_statistics(model):\n                for", "            if True:\n                for", TUNED),
    ("terms = accumulated_step(net, micro_batches, cfg, epoch)", "terms = accumulated_step(model, micro_batches, cfg, epoch)", "loop_of_pretraining and accumulated"),
    ("        for step, micro_batches in training_steps(data, cfg, epoch, run.step % steps, device):", "        for step, micro_batches in training_steps(data, cfg, epoch, 0, device):", "broken_off"),
    ("    torch.manual_seed(cfg.seed)\n    folder = out / f\"{'probe'", "    folder = out / f\"{'probe'", "broken_off"),
    ("    torch.manual_seed(cfg.seed)\n    name =", "    name =", "agree_between_runs"),
    ("return \"-\".join((cfg.objective, *cfg.variant))", "return cfg.objective", "writes_its_encoder"),
    ("given = (QUICK_PROBE if given.get(\"quick\") else PROBE) | given", "given = given | (QUICK_PROBE if given.get(\"quick\") else PROBE)", "authors_code"),
    ("            group[\"weight_decay\"] = 0.0  ", "            group[\"weight_decay\"] = decay  ", LOOP),
    ("        for group, decay in zip(self.param_groups, decays):\n            group[\"weight_decay\"] = decay", "        del decays", LOOP),
    ("            optimizer.zero_grad(set_to_none=True)\n            run.advance(terms", "            run.advance(terms", LOOP),
    ("            optimizer.zero_grad(set_to_none=True)\n            run.advance(sums", "            run.advance(sums", TUNED),
]

# Line as it stands, line as broken, part of the test's name in test_peclr.py.
PIECES = [
    ("z = torch.stack([c * x - s * y, s * x + c * y], -1) + mean", "z = torch.stack([c * x + s * y, c * y - s * x], -1) + mean",
     "peclr_loss_and_gradient or whatever_was_drawn"),
    ("z = z - shift[:, None] * L_z", "z = z + shift[:, None] * L_z", "peclr_loss_and_gradient"),
    ("L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)).detach()", "L_z = (z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True))",
     "peclr_loss_and_gradient"),
    ("mean = z.mean(1, keepdim=True).detach()", "mean = z.mean(1, keepdim=True)", "peclr_loss_and_gradient"),
    ("z = F.normalize(p, dim=1).unflatten(1, (-1, 2))", "z = p.unflatten(1, (-1, 2))", "peclr_loss_and_gradient"),
    ("    if shift is not None:\n        axes =",                             # rotate before translate
     "    if angle is not None:\n        m, a = z.mean(1, keepdim=True).detach(), -angle\n        x, y = (z - m).unbind(-1)\n"
     "        z = torch.stack([a.cos()[:, None] * x + a.sin()[:, None] * y, a.cos()[:, None] * y - a.sin()[:, None] * x], -1) + m\n"
     "        angle = None\n    if shift is not None:\n        axes =", "peclr_loss_and_gradient"),
    ("return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B))",
     "return F.cross_entropy(similarity, (torch.arange(2 * B, device=z.device) + B) % (2 * B), reduction='sum')", "double_loop"),
    ("    (world() * loss).backward()", "    loss.backward()", "processes"),
    ("parts[rank()] = z", "parts[0] = z", "processes"),
    ("if cfg.objective == \"simclr\":\n        return p", "if cfg.objective == \"none\":\n        return p", "simclr_objective"),
    ("with autocast(views.device, cfg.precision):     # the network only", "if True:     # the network only", "bfloat16"),
    ("self.backbone.train(mode and not self.cfg.freeze)", "self.backbone.train(mode)", "frozen_encoder_does"),
    ("rays, root = self.depth(out.detach(), K)", "rays, root = self.depth(out, K)", "refinement_does_not"),
    ("wrist = wrist - rooted[:, joint, None]", "wrist = wrist - rooted[:, :1]", "lift_back or true_hand"),
    ("\"middle\": Convention((0, 9), MIDDLE_BONE,", "\"middle\": Convention((0, 9), (5, 6),", "true_hand"),
    ("q = (trust / group[\"lr\"]).clamp(max=1)", "q = trust / group[\"lr\"]", "lars"),
    ("return peak * step / max(1, warm - 1)", "return peak * step / warm", "official_schedule"),
    ("loss = L_J2D + 5 * L_d + L_root", "loss = L_J2D + L_d + L_root", "equation_5"),
    ("            (terms[\"loss\"] / len(micro_batches)).backward()\n        for", "            terms[\"loss\"].backward()\n        for", "only_their_micro_batch"),
    ("rate = lr_at(run.step, peak, warm, total)", "rate = peak", "rate_of_every_step"),
    ("low = constant((0.01, 0.01, 0.5, 5 / 255)", "low = constant((0.01, 0.01, 0.01, 5 / 255)", "ranges_are"),
    ("VIEW_MARGIN = 2.9 ", "VIEW_MARGIN = 2.2 ", "black_wedge"),
    ("    elif cfg.freeze:\n        settle_statistics(model, data, device)\n", "", "random_encoder_frozen_by_the_command"),
    ("length = torch.where(batch[\"scale\"] == NOT_GIVEN, self.unit, batch[\"scale\"])", "length = batch[\"scale\"]", "true_hand"),
    ("index = torch.linspace(0, len(data) - 1, min(len(data), 4096)).long()", "index = torch.arange(min(len(data), 4096))", "sorted_by_subject"),
    ("index = torch.linspace(0, len(data) - 1, min(len(data), 256)).long()", "index = torch.arange(min(len(data), 256))", "sorted_by_subject"),
]

FAULTS = [("peclr.py", old, new, STEP, words) for old, new, words in BROKEN]
FAULTS += [("peclr.py", old, new, "test_peclr.py", words) for old, new, words in PIECES]
FAULTS += [("peclr.py", "torch.hypot(across, down)", "torch.stack([across, down]).norm(dim=0)", "test_steps.py", "sobel")]
FAULTS += [("peclr.py", "torch.cdist(pixels, known).amin(1) < size / 8", "torch.cdist(pixels, known).amin(1) < size / 4", STEP, "looked_for")]
