"""TI-Net's two stages against oracles typed here: one step, three steps of the loop, and prediction.

The step's oracle is the paper's text in slow code, one picture and one constraint at a time, in float64:
it takes the network's weights, MANO's layer, `warp` and the seeded draws, and none of the script's views,
losses or steps. The loop's oracle is a hand-written AdamW beside the real command's loop.
"""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import ti_net
from common import axis_angle_to_matrix, matrix_to_axis_angle, permutation, uniform, warp
from ti_net import Config, HandNet, TINet

PI = math.pi
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # of ImageNet, as everybody has them
CPU = torch.device("cpu")


class Encoder(torch.nn.Module):
    """A back-bone in small: 8 px to a cell, 12 channels, BatchNorm, more than one cell."""

    dim, stride = 12, 8

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 8, 5, 4, 2, bias=False), torch.nn.BatchNorm2d(8)
        self.conv2 = torch.nn.Conv2d(8, 12, 3, 2, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return [x, self.conv2(x)]


@pytest.fixture
def small(monkeypatch):
    """Everything in float64, from the draws on, with an encoder of a few hundred weights."""
    monkeypatch.setattr(ti_net, "build_backbone", lambda name, side: Encoder())
    monkeypatch.setattr(ti_net, "uniform", lambda *words: uniform(*words).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(model, spread=0.1):
    """Every weight moved at random, so that nothing is at a start where terms vanish."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def smooth_pictures(n, side, seed):
    """(n, 3, side, side) in 0..255, no two alike, smooth, so that a pixel's rounding changes little."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64)
    return 255 * F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def normalised(pictures):
    """0..255 -> zero mean, unit variance over ImageNet; (..., 3, H, W)."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    return (pictures / 255 - mean) / std


def gradients(model, loss):
    """d loss / d parameter by name; 0 where the loss does not depend on it."""
    names, values = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, values, found)}


def assert_same_gradients(model, expected, tolerance=1e-5):
    """Of every parameter, in norm; a part of the network that the oracle does not reach must not move."""
    largest = max(float(g.norm()) for g in expected.values())
    for name, p in model.named_parameters():
        found = torch.zeros_like(p) if p.grad is None else p.grad
        off = float((found - expected[name]).norm())
        assert off <= tolerance * float(expected[name].norm()) + 1e-8 * largest, f"{name}: gradient is off by {off}"


# ---- Pre-training: one step

# Table 1 as printed: rows H, R_a1, HR_a2, columns H, R_b1, HR_b2; an entry is (flip, turns of a1, a2, b1, b2)
TABLE_1 = [[(0, (0, 0, 0, 0)), (1, (0, 0, 1, 0)), (0, (0, 0, 0, 1))],
           [(1, (-1, 0, 0, 0)), (0, (1, 0, 1, 0)), (1, (-1, 0, 0, 1))],
           [(0, (0, -1, 0, 0)), (1, (0, 1, 1, 0)), (0, (0, -1, 0, 1))]]
# Alg. 1: a pair draws alpha (R) and beta (HR) of line 10 for both operations: Table 1 with a1 = b1, a2 = b2
ALGORITHM_1 = [[(0, (0, 0, 0, 0)), (1, (0, 0, 1, 0)), (0, (0, 0, 0, 1))],
               [(1, (0, 0, -1, 0)), (0, (0, 0, 2, 0)), (1, (0, 0, -1, 1))],
               [(0, (0, 0, 0, -1)), (1, (0, 0, 1, 1)), (0, (0, 0, 0, 0))]]
A_FIRST = [("H", None), ("R", 0), ("HR", 1)]                          # operator, number of its angle
B_THEN = [("H", None), ("R", 2), ("HR", 3)]
ONCE = {("H", None): (1, (0, 0, 0, 0)), ("R", 0): (0, (1, 0, 0, 0)), ("HR", 1): (1, (0, 1, 0, 0)),
        ("R", 2): (0, (0, 0, 1, 0)), ("HR", 3): (1, (0, 0, 0, 1))}


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def turn_about(angle, centre):
    """Counter-clockwise on the screen, y down, about (centre, centre)."""
    c, s = math.cos(angle), math.sin(angle)
    R = matrix([[c, s], [-s, c]])
    A = torch.eye(3, dtype=torch.float64)
    A[:2, :2], A[:2, 2] = R, torch.tensor([centre, centre]) - R @ torch.tensor([centre, centre])
    return A


def picture_matrix(entry, angles, u, side, cfg):
    """Stored picture -> the picture F(I) of one sample: crop, flip, turn, cut to the middle (Sec. 3.1, docstring 10)."""
    v, S = cfg.variant, cfg.image_size
    square = S if {"black-corners", "disc"} & set(v) else math.ceil(S * 2 ** 0.5)
    # a random resized crop: area 0.4..1 (the authors: 0.2..1), sides as 3/4..4/3, anywhere inside
    least = 0.2 if "authors-crops" in v else 0.4
    area, log_ratio = least + (1 - least) * u[0], math.log(3 / 4) + u[1] * 2 * math.log(4 / 3)
    width, height = (min(side, side * math.sqrt(area * math.exp(k * log_ratio))) for k in (1, -1))
    x0, y0 = u[2] * (side - width) - 0.5, u[3] * (side - height) - 0.5              # the crop's corner, px
    crop = matrix([[square / width, 0, -0.5 - x0 * square / width], [0, square / height, -0.5 - y0 * square / height],
                   [0, 0, 1]])
    if "authors-crops" in v:
        crop = turn_about(2 * PI * u[4], (square - 1) / 2) @ crop
    flip, turns = entry
    flipped = matrix([[-1, 0, square - 1], [0, 1, 0], [0, 0, 1]]) if flip else torch.eye(3, dtype=torch.float64)
    angle = sum(t * a for t, a in zip(turns, angles)) * (PI / 180 if "degrees" in v else 1)
    turned = turn_about(angle, square / 2 if "half-pixel" in v else (square - 1) / 2)
    cut = matrix([[1, 0, (S - square) / 2], [0, 1, (S - square) / 2], [0, 0, 1]])
    return cut @ turned @ flipped @ crop


def operator(w, name, v, angle, variant):
    """Eq. 3 and Sec. 3.2 from the weights `w` by name; v (d,), one angle or None."""
    M, N = w[f"operators.T.{name}.M.weight"], w[f"operators.T.{name}.N.weight"]
    if angle is None:
        return v + M @ (N @ v)
    x = torch.tensor([math.cos(angle), math.sin(angle)])
    x = w["operators.K.2.weight"] @ torch.relu(w["operators.K.0.weight"] @ x + w["operators.K.0.bias"])
    x = x + w["operators.K.2.bias"]
    if "two-layer-embedding" not in variant:
        x = w["operators.K.4.weight"] @ torch.relu(x)
    if "modulated" in variant:
        return v + M @ ((N @ v) * (w[f"operators.T.{name}.g.weight"] @ x + w[f"operators.T.{name}.g.bias"]))
    return v + M @ (N @ torch.cat([v, x]))


def decode(w, maps, variant):
    """D_aux: transposed convolutions of kernel 4 and stride 2, with BatchNorm and ReLU between them (docstring 11)."""
    if "decode-latent" in variant:
        maps = maps.mean((2, 3), keepdim=True).expand_as(maps)
    number, x = 0, maps
    while f"decoder.{number}.weight" in w:
        x = F.conv_transpose2d(x, w[f"decoder.{number}.weight"], w[f"decoder.{number}.bias"], stride=2, padding=1)
        number += 1
        if f"decoder.{number}.weight" in w and w[f"decoder.{number}.weight"].ndim == 1:
            x = F.batch_norm(x, None, None, w[f"decoder.{number}.weight"], w[f"decoder.{number}.bias"], training=True)
            x, number = torch.relu(x), number + 2
    assert (number == 7) == ("relu-decoder" not in variant)              # 3 layers for a stride of 8, the last one linear
    return x


def pretraining_oracle(model, image, index, epoch, cfg):
    """Algorithm 1 of one micro-batch, sample by sample -> its terms."""
    w, variant = dict(model.named_parameters()), cfg.variant
    alg_1 = "algorithm-1" in variant
    table, first = (ALGORITHM_1, B_THEN) if alg_1 else (TABLE_1, A_FIRST)
    single = A_FIRST + (B_THEN[1:] if "five-ordinary" in variant else [])
    angles = 2 * PI * uniform(index, 4, cfg.seed, "ti_net angles", epoch).double()
    crops = uniform(index, 5, cfg.seed, "ti_net crop", epoch).double()
    wanted = list(dict.fromkeys([(0, (0, 0, 0, 0))] + [ONCE[one] for one in single] + sum(table, [])))
    assert len(wanted) == (11 if alg_1 else 14 if "five-ordinary" in variant else 12)
    S, pictures = cfg.image_size, {}
    for entry in wanted:
        for i in range(len(index)):
            A = picture_matrix(entry, angles[i].tolist(), crops[i].tolist(), image.shape[-1], cfg)
            seen = normalised(warp(image[i:i + 1], A[None], S))[0]
            if "disc" in variant:
                for y in range(S):
                    for x in range(S):
                        if math.hypot(x - (S - 1) / 2, y - (S - 1) / 2) > S / 2:
                            seen[:, y, x] = 0
            pictures[entry, i] = seen
    keys = list(pictures)
    maps = model.backbone(torch.stack([pictures[key] for key in keys]))[-1]       # one BatchNorm for all of them
    latent = {key: m.mean((1, 2)) for key, m in zip(keys, maps)}
    norm = (lambda a: a.flatten().norm()) if "unsquared" in variant else (lambda a: a.square().mean())
    T = lambda op, v, i: operator(w, op[0], v, None if op[1] is None else float(angles[i, op[1]]), variant)
    B, source, terms = len(index), (0, (0, 0, 0, 0)), dict.fromkeys(("L_ord", "L_sec", "L_id", "L_classic"), 0.0)
    for i in range(B):
        v = latent[source, i]
        for op in single:                                                          # Alg. 1, lines 6-8
            terms["L_ord"] += norm(latent[ONCE[op], i] - T(op, v, i)) / B
        for row, one in zip(table, first):                                         # lines 12-14
            for entry, two in zip(row, B_THEN):
                terms["L_sec"] += norm(latent[entry, i] - T(two, T(one, v, i), i)) / B
        terms["L_id"] += norm(operator(w, "R", v, 0.0, variant) - v) / B           # docstring 6
    if "no-reconstruction" not in variant:                                         # lines 15-18, docstring 12
        decoded = [ONCE[op] for op in A_FIRST] if "reconstruct-3" in variant else wanted
        these = [(entry, i) for entry in decoded for i in range(B)]
        drawn = decode(w, torch.stack([maps[keys.index(key)] for key in these]), variant)
        for key, picture in zip(these, drawn):
            terms["L_classic"] += norm(picture - pictures[key]) / len(these)
    on = [0.0 if f"no-{name}" in variant else 1.0 for name in ("ordinary", "secondary", "identity")]
    constraints = on[0] * terms["L_ord"] + on[1] * terms["L_sec"] + on[2] * terms["L_id"]
    return terms | {"loss": terms["L_classic"] + cfg.w * constraints}              # Eq. 1


@pytest.mark.parametrize("variant", [
    (), ("algorithm-1", "unsquared", "reconstruct-3", "two-layer-embedding", "decode-latent", "no-identity"),
    ("five-ordinary", "relu-decoder", "degrees", "half-pixel", "black-corners", "authors-crops", "no-ordinary"),
    ("modulated", "disc", "no-secondary", "no-reconstruction")], ids=["paper", "literal", "authors", "ours"])
def test_pretraining_step_equals_algorithm_1_typed_out(small, variant):
    cfg = Config(image_size=24, rank=5, embed_dim=4, decoder_width=3, w=0.4, seed=7, variant=variant)
    torch.manual_seed(0)
    model = shaken(TINet(cfg))
    expected, loss = [], 0.0
    for k, index in enumerate((torch.tensor([3, 40]), torch.tensor([8, 1]))):
        image = smooth_pictures(2, 36, seed=k)
        expected.append(pretraining_oracle(model, image, index, 2, cfg))
        loss = loss + expected[-1]["loss"] / 2
        found = ti_net.pretrain_step(model, {"image": image, "index": index}, cfg, 2)
        (found["loss"] / 2).backward()
        for name, value in expected[-1].items():
            value = float(torch.as_tensor(value).detach())
            assert float(found[name].detach()) == pytest.approx(value, rel=1e-6, abs=1e-10), name
    assert abs(float(expected[0]["loss"]) - float(expected[1]["loss"])) > 1e-4
    assert_same_gradients(model, gradients(model, loss))
