"""Faults of common: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    # signs
    ("common.py", "return _matrix([[c, s, x - c * x - s * y], [-s, c,", "return _matrix([[c, -s, x - c * x - s * y], [s, c,",
     "test_common_transforms.py", "quarter_turn"),
    ("common.py", "return torch.stack([c * x + s * y, c * y - s * x, z], -1)", "return torch.stack([c * x - s * y, c * y + s * x, z], -1)",
     "test_common_transforms.py", "quarter_turn"),
    ("common.py", "return torch.stack([c + bx * x, xy - az, xz + ay,", "return torch.stack([c + bx * x, xy + az, xz + ay,", "test_common_mano.py", "numpy_model or torch_model or fronts"),
    ("common.py", "MANO_TO_OURS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)",
     "MANO_TO_OURS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 7, 8, 9, 19, 10, 11, 12, 20)", "test_common_mano.py", "21_joints"),
    # units and half pixels
    ("common.py", "return (width - 1) / 2, (height - 1) / 2", "return width / 2, height / 2", "test_common_transforms.py", "rearrangements or quarter_turn"),
    ("common.py", "shift = (size - 1) / 2 - s[..., None] * middle", "shift = size / 2 - s[..., None] * middle", "test_common_transforms.py", "resizing"),
    ("common.py", "return _matrix([[1 - 2 * on, zero, on * (width - 1)]", "return _matrix([[1 - 2 * on, zero, on * width]", "test_common_transforms.py", "name_says"),
    ("common.py", "axes.append((2 * at + 1) / side - 1)", "axes.append(2 * at / side - 1)", "test_common_transforms.py", "dots or rearrangements"),
    ("common.py", "    return (A[..., None, :2, :2] * points[..., None, :]).sum(-1) + A[..., None, :2, 2]",
     "    return points @ A[..., :2, :2].mT + A[..., None, :2, 2]", "test_common_transforms.py", "autocast"),
    ("common.py", "order = torch.cat([order + k * again for k in range(math.ceil(need / n))])[:need]", "order = torch.cat([order for k in range(math.ceil(need / n))])[:need]",
     "test_common_run.py", "taken_again"),
    ("common.py", "saturation * torch.minimum(k, 4 - k).clamp(0, 1))", "saturation * torch.minimum(k, 3 - k).clamp(0, 1))", "test_common_augmentation.py", "jitter"),
    ("common.py", "(images >= 0.5), 1 - images", "(images <= 0.5), 1 - images", "test_common_augmentation.py", "grey_blur"),
    ("common.py", "x = torch.where(mask[..., None], mask_token.to(x.dtype), x)", "x = torch.where(~mask[..., None], mask_token.to(x.dtype), x)", "test_handmim.py", "masked_vit"),
    ("common.py", "\"teacher\" not in name, name)", "\"student\" not in name, name)", "test_common_backbones.py", "dino_ibot"),
    # scores
    ("common.py", "    if not reflect:\n        sign[:, 2]", "    if reflect:\n        sign[:, 2]", "test_common_metrics.py", "procrustes"),
    ("common.py", "torch.linalg.svd(torch.where(finite[:, None, None], A, 0))", "torch.linalg.svd(A)", "test_common_metrics.py", "spoils_no_other"),
    ("common.py", "verts = away.addcmul(along_x, x).addcmul(along_y, y)", "verts = away.addcmul(along_x, y).addcmul(along_y, x)", "test_common_mano.py", "numpy_model or torch_model"),
    ("common.py", "b = (ray * points[..., 2:] - points[..., :2])", "b = (ray * points[..., 2:] + points[..., :2])", "test_common_metrics.py", "place"),
    # runs
    ("common.py", 'if p.ndim <= 1], "weight_decay": 0.0}', 'if p.ndim <= 1], "weight_decay": weight_decay}', "test_common_run.py", "decay"),
    ("common.py", "micro = order.view(steps, -1, cfg.micro_batch)[first:,", "micro = order.view(steps, -1, cfg.micro_batch)[:steps - first,", "test_common_run.py", "goes_on_where"),
    ("common.py", 'self.log = Log(folder, state["log_bytes"] if state else 0)', "self.log = Log(folder, 10 ** 9)", "test_common_run.py", "cuts_its_log"),
    ("common.py", "    partial.replace(path)\n\n\ndef load_checkpoint", "    pass\n\n\ndef load_checkpoint", "test_common_run.py", "replaced_whole"),
    ("common.py", "return torch.load(path, map_location=\"cpu\", weights_only=True)", "return torch.load(path, map_location=\"cpu\", weights_only=False)",
     "test_common_backbones.py", "hostile"),
]
