"""TI-Net's two stages against oracles typed here: one step, three steps of the loop, and prediction.

The step's oracle is the paper's text in slow code, one picture and one constraint at a time, in float64:
it takes the network's weights, MANO's layer, `warp` and the seeded draws, and none of the script's views,
losses or steps. The loop's oracle is a hand-written AdamW beside the real command's loop.
"""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import ti_net
from common import Mano, matrix_to_axis_angle, permutation, score, uniform, warp
from hand.builtin import builtin_hand
from sources import Source, open_data
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
    monkeypatch.setattr(ti_net, "build_backbone", lambda name, side, recompute: Encoder())
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
    wanted = list(dict.fromkeys([(0, (0, 0, 0, 0))] + [ONCE[one] for one in single]
                                 + [entry for row in table for entry in row]))
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
    cfg = Config(image_size=16, rank=5, embed_dim=4, decoder_width=3, w=0.4, seed=7, variant=variant)
    torch.manual_seed(0)
    model = shaken(TINet(cfg))
    expected, loss = [], 0.0
    for k, index in enumerate((torch.tensor([3, 40]), torch.tensor([8, 1]))):
        image = smooth_pictures(2, 24, seed=k)
        expected.append(pretraining_oracle(model, image, index, 2, cfg))
        loss = loss + expected[-1]["loss"] / 2
        found = ti_net.pretrain_step(model, {"image": image, "index": index}, cfg, 2)
        (found["loss"] / 2).backward()
        for name, value in expected[-1].items():
            value = float(torch.as_tensor(value).detach())
            assert float(found[name].detach()) == pytest.approx(value, rel=1e-6, abs=1e-10), name
    assert abs(float(expected[0]["loss"]) - float(expected[1]["loss"])) > 1e-4
    assert_same_gradients(model, gradients(model, loss))


# ---- Fine-tuning: one step


def rodrigues(v):
    """(3,) axis-angle -> (3, 3), as the exponential of the cross-product matrix."""
    x, y, z = v
    zero = torch.zeros(())
    return torch.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3))


def middle_crop(side, S):
    """Stored picture (1.7 x the hand's box) -> the network's S px (1.2 x the box), typed from docstring 14."""
    s = S / (side * 1.2 / 1.7)
    return matrix([[s, 0, (S - 1) / 2 - s * (side - 1) / 2], [0, s, (S - 1) / 2 - s * (side - 1) / 2], [0, 0, 1]])


def finetuning_oracle(model, batch, S):
    """The supervised terms of one micro-batch, hand by hand, joint by joint -> its terms (docstring 14)."""
    w, B, side = dict(model.named_parameters()), len(batch["image"]), batch["image"].shape[-1]
    A = middle_crop(side, S)
    seen = normalised(warp(batch["image"], A.expand(B, 3, 3), S))
    f = model.backbone(seen)[-1].mean((2, 3))
    layer = lambda part, k, x: x @ w[f"{part}.{k}.weight"].T + w[f"{part}.{k}.bias"]
    theta = layer("head", 4, layer("head", 2, layer("head", 0, f).relu()).relu())
    extra = layer("extra", 2, layer("extra", 0, torch.cat([f.detach(), theta.detach()], 1)).relu())
    sums, counts = dict.fromkeys(("L_theta", "L_joints", "L_beta", "L_camera"), 0.0), dict.fromkeys(
        ("L_theta", "L_joints", "L_beta", "L_camera"), 0)
    for i in range(B):
        has, beta, camera = {k: bool(v[i]) for k, v in batch["has"].items()}, extra[i, :10], extra[i, 10:]
        R = torch.stack([rodrigues(theta[i, 3 * j:3 * j + 3]) for j in range(16)])
        joints = model.mano.joints(R[None], beta.detach()[None])[0].double()
        joints = joints - joints[0]
        if has["pose"]:
            for j in range(16):
                sums["L_theta"] += (R[j] - rodrigues(batch["pose"][i, 3 * j:3 * j + 3])).abs().sum()
            counts["L_theta"] += 1
        elif batch["joints_ok"][i, 0] and batch["joints_ok"][i].any():
            for j in range(21):
                if batch["joints_ok"][i, j]:
                    true = batch["joints"][i, j] - batch["joints"][i, 0]
                    sums["L_joints"] += 10 * (joints[j] - true).abs().sum()
            counts["L_joints"] += 1
        if has["shape"]:
            sums["L_beta"] += (beta - batch["shape"][i]).square().sum() / 10
            counts["L_beta"] += 1
        for j in range(21):
            true = A[:2, :2] @ batch["uv"][i, j] + A[:2, 2]
            if true.isfinite().all():
                # weak perspective: at camera 0 the joints' box is 1 / 1.2 of the crop, in its middle
                x, y = joints[:, 0].detach(), joints[:, 1].detach()
                middle = torch.stack([x.min() + x.max(), y.min() + y.max()]) / 2
                longer = max(x.max() - x.min(), y.max() - y.min())
                place = 2 / 1.2 / longer * camera[0].exp() * (joints[j, :2].detach() - middle) + camera[1:]
                sums["L_camera"] += (((S - 1) / 2 + S / 2 * place - true) / S).abs().sum()
                counts["L_camera"] += 1
    terms = {name: sums[name] / max(1, counts[name]) for name in sums}
    return terms | {"loss": terms["L_theta"] + terms["L_joints"] + terms["L_beta"] + terms["L_camera"]}


def labelled_batch(seed, pose, shape, no_wrist, side=34):
    """Four hands: `pose`, `shape` say who has them; `no_wrist` has no wrist; every hand lacks other joints."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    batch = {"image": smooth_pictures(4, side, seed), "index": torch.arange(4), "pose": 0.4 * draw(4, 48),
             "shape": draw(4, 10), "joints": 0.05 * draw(4, 21, 3) + torch.tensor([0.1, 0.0, 0.6]),
             "uv": side / 2 + 6 * draw(4, 21, 2)}
    batch["has"] = {"pose": torch.tensor(pose), "shape": torch.tensor(shape), "joints": torch.tensor([True] * 4)}
    batch["pose"][~batch["has"]["pose"]], batch["shape"][~batch["has"]["shape"]] = math.nan, math.nan
    for i in range(4):
        batch["joints"][i, 3 * i + 2:3 * i + 4], batch["uv"][i, 4 * i + 1] = math.nan, math.nan
    batch["joints"][no_wrist, 0], batch["uv"][2] = math.nan, math.nan
    return batch | {"joints_ok": batch["joints"].isfinite().all(-1)}


HANDS = [dict(seed=1, pose=[True, False, False, False], shape=[True, False, True, False], no_wrist=3),
         dict(seed=2, pose=[False, True, False, True], shape=[False, False, False, True], no_wrist=0)]


def hand_net(**more):
    torch.manual_seed(0)
    cfg = Config(image_size=16, mano="builtin", finetune="synthetic", **more)
    model = HandNet(cfg)
    model.mano = Mano(builtin_hand(), dtype=torch.float64)
    with torch.no_grad():
        model.head[-1].weight.normal_(0, 0.02)
        model.head[-1].bias.normal_(0, 0.4)
        model.extra[-1].weight.normal_(0, 0.05)
        model.extra[-1].bias.normal_(0, 0.3)
    return cfg, model


def test_finetuning_step_equals_the_text_typed_out(small):
    cfg, model = hand_net()
    loss = 0.0
    for hands in HANDS:
        batch = labelled_batch(**hands)
        expected = finetuning_oracle(model, batch, 16)
        loss = loss + expected["loss"] / 2
        found = ti_net.finetune_step(model, batch, cfg)
        (found["loss"] / 2).backward()
        for name, value in expected.items():
            assert float(value.detach()) > 0.01, f"{name}: nothing to see"
            assert float(found[name].detach()) == pytest.approx(float(value.detach()), rel=1e-6), name
    assert_same_gradients(model, gradients(model, loss))


def test_a_hand_without_any_label_leaves_every_gradient_finite(small):
    cfg, model = hand_net()
    batch = labelled_batch(**HANDS[0])
    for key in ("pose", "shape", "joints", "uv"):
        batch[key][1:] = math.nan
    batch["has"] = {key: torch.tensor([True, False, False, False]) for key in batch["has"]}
    batch["joints_ok"] = batch["joints"].isfinite().all(-1)
    ti_net.finetune_step(model, batch, cfg)["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- Prediction is training's twin


def test_what_predict_answers_costs_the_step_nothing(small):
    """Same crop, normalisation, joints and units: the answer to a picture, taken as its label, has no loss."""
    cfg, model = hand_net()
    model.eval()
    batch, seen = labelled_batch(**HANDS[0]), []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    before = ti_net.finetune_step(model, batch, cfg)
    with torch.no_grad():
        answer = model.predict({"image": batch["image"]})
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen) and HandNet.USES == {"image"}
    yes = torch.ones(4, dtype=torch.bool)
    somewhere = torch.tensor([0.1, -0.2, 0.7])
    label = {"joints": answer["joints"].double() + somewhere, "joints_ok": yes[:, None].expand(4, 21),
             "pose": matrix_to_axis_angle(answer["pose"].double()).flatten(1), "shape": answer["shape"], "uv": answer["uv"]}
    for has_pose in (True, False):
        has = {"pose": yes & has_pose, "shape": yes, "joints": yes}
        terms = ti_net.finetune_step(model, batch | label | {"has": has}, cfg)
        for name in ("L_theta", "L_joints", "L_beta", "L_camera"):
            assert float(terms[name].detach()) < 1e-4 * float(before[name].detach()), name
    # the mesh moves with the joints, and the joints are rooted
    hand = Mano(builtin_hand())
    verts, joints = hand(answer["pose"].float(), answer["shape"].float())
    assert torch.allclose(answer["verts"].float(), verts - joints[:, :1], atol=1e-5)
    assert answer["joints"][:, 0].abs().max() == 0


def test_the_network_and_its_judge_see_the_same_middle_of_the_picture():
    """1.2 of the 1.7 x box that is stored, whole pixels where they fall on each other, ImageNet's normalisation."""
    picture = torch.randint(0, 256, (2, 3, 34, 34), dtype=torch.uint8)
    crops, A = ti_net.hand_view(picture, 24)                              # 34 x 1.2 / 1.7 = 24: no resizing
    assert torch.allclose(A[0].double(), middle_crop(34, 24), atol=1e-5)
    assert torch.allclose(crops.double(), normalised(picture[:, :, 5:29, 5:29].double()), atol=1e-4)


# ---- Three steps and more of the real loops, beside a hand-written AdamW


plain_pretrain_step = ti_net.pretrain_step                                # whatever a test puts in their place
plain_finetune_step = ti_net.finetune_step


class Little(Source):
    """Some synthetic hands, held in memory; 24 px of 1.7 x the box."""

    name, box_source = "little", "annotated"

    def __init__(self, count, seed, cache):
        cfg = Config(samples=count, seed=seed, mano="builtin", cache=str(cache))
        rendered, rows = open_data(cfg, ("synthetic:calm",), "train", 24, 1.7, CPU), torch.arange(count)
        self.all, self.labels = next(rendered.batches([rows], CPU, 0)), rendered.targets(rows)

    def __len__(self):
        return len(self.all["image"])

    def _rows(self, held, rows):
        pick = lambda x: x[rows] if isinstance(x, torch.Tensor) else [x[i] for i in rows.tolist()]
        return {k: {n: x[rows] for n, x in v.items()} if isinstance(v, dict) else pick(v) for k, v in held.items()}

    def batches(self, plan, device, workers):
        return (self._rows(self.all, rows) for rows in plan)

    def targets(self, rows):
        return self._rows(self.labels, rows)


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    """What the stages open: 5 hands to train on, 3 to validate on (rendered in float32, so before `small`)."""
    cache = tmp_path_factory.mktemp("cache")
    return {"train": Little(5, 3, cache), "val": Little(3, 4, cache)}


class Watched:
    """Runs a stage and keeps what is seen at every step: modes, samples, weights after it, its log."""

    def __init__(self, monkeypatch, stage, hands):
        self.steps, self.states, self.logged, self.asked, self.lasts, self.drawn = [], [], [], [], [], []
        self.stop_at = None                                               # a micro-batch at which the run is killed
        plain = getattr(ti_net, f"{stage}_step")

        def step(net, batch, *rest):
            modes = {name: module.training for name, module in net.named_modules()}
            self.steps.append((batch["index"].tolist(), rest[1:], modes))
            if len(self.steps) == self.stop_at:
                raise KeyboardInterrupt
            return plain(net, batch, *rest)

        watched = self

        class Run(ti_net.Run):
            def advance(self, sums, epoch, lr, may_save):
                watched.states.append({k: v.clone() for k, v in self.model.state_dict().items()})
                watched.logged.append((lr, {k: float(v) for k, v in sums.items()}))
                super().advance(sums, epoch, lr, may_save)

        def opened(cfg, specs, split, *rest, **more):
            self.asked.append((specs, split, rest[:2], more))
            return hands[split]

        monkeypatch.setattr(ti_net, f"{stage}_step", step)
        monkeypatch.setattr(ti_net, "Run", Run)
        monkeypatch.setattr(ti_net, "open_data", opened)
        monkeypatch.setattr(ti_net, "sheet", lambda path, *rest, **more: self.drawn.append(path.name))
        accumulate = ti_net.accumulate
        monkeypatch.setattr(ti_net, "accumulate", lambda net, last: (self.lasts.append(last), accumulate(net, last))[1])


def by_hand(model, data, cfg, step, rates, betas, clip):
    """Weights and mean terms of every step: gradients of whole batches, clip, AdamW, BatchNorm's means, written out."""
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, x: seen[layer].append(
            (x[0].detach().mean((0, 2, 3)), x[0].detach().var((0, 2, 3), correction=1))))
    states, norms, means, t, steps = [], [], [], 0, len(data) // cfg.batch_size
    for epoch in range(cfg.epochs):
        order = permutation(len(data), cfg.seed, epoch)
        for number in range(steps):
            rows = order[number * cfg.batch_size:(number + 1) * cfg.batch_size].split(cfg.micro_batch)
            before = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
            total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            for layer in layers:
                seen[layer].clear()
            means.append({})
            for some in rows:
                batch = next(data.batches([some], CPU, 0)) | {"index": some}
                model.train()
                terms = step(model, batch, cfg, epoch)
                for name, g in gradients(model, terms["loss"]).items():
                    total[name] += g / len(rows)
                for name, value in terms.items():
                    means[-1][name] = means[-1].get(name, 0.0) + float(value.detach()) / len(rows)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in total.values())))
            rate, shrink, t = rates[t], min(1.0, clip / (norms[-1] + 1e-6)), t + 1
            with torch.no_grad():
                for name, p in model.named_parameters():
                    m, v = moments[name]
                    m.mul_(betas[0]).add_((1 - betas[0]) * shrink * total[name])
                    v.mul_(betas[1]).add_((1 - betas[1]) * (shrink * total[name]) ** 2)
                    p -= rate * (cfg.weight_decay if p.ndim > 1 else 0) * p
                    p -= rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
                for layer, (mean, var) in zip(layers, before):
                    new_mean, new_var = (torch.stack(x).mean(0) for x in zip(*seen[layer]))
                    layer.running_mean.copy_(0.9 * mean + 0.1 * new_mean)
                    layer.running_var.copy_(0.9 * var + 0.1 * new_var)
                    layer.num_batches_tracked.fill_(t)
            states.append({k: v.clone() for k, v in model.state_dict().items()})
    return states, norms, means


def assert_same_states(found, expected, start):
    assert len(found) == len(expected)
    for t, (a, b) in enumerate(zip(found, expected), 1):
        assert a.keys() == b.keys()
        for name in a:
            moved = float((b[name].double() - start[name].double()).norm())
            assert float((a[name].double() - b[name].double()).norm()) <= 1e-5 * moved + 1e-8, f"step {t}: {name}"


def loop_config(tmp_path, **more):
    return Config(**dict(image_size=16, rank=3, embed_dim=4, decoder_width=3, batch_size=2, micro_batch=1, epochs=2,
                         workers=0, device="cpu", cache=str(tmp_path / "cache"), data=("synthetic:calm",),
                         mano="builtin", seed=3) | more)


def first_weights(tmp_path):
    """A file of back-bone weights, unlike any that a network starts with."""
    torch.manual_seed(77)
    state = shaken(Encoder(), 0.2).state_dict()
    torch.save(state, tmp_path / "init.pt")
    return str(tmp_path / "init.pt"), state


def cosine(peak, warm, total):
    """Rates of `total` steps: `warm` of them rise evenly to the peak, then half a cosine falls to 0."""
    return [peak * (t + 1) / warm for t in range(warm)] + [
        peak * (1 + math.cos(PI * (t - warm) / (total - warm))) / 2 for t in range(warm, total)]


def assert_same_terms(watched, rates, means):
    assert [lr for lr, _ in watched.logged] == pytest.approx(rates)
    for (_, logged), mean in zip(watched.logged, means):
        assert logged == pytest.approx(mean, rel=1e-5, abs=1e-9)
    assert watched.lasts == [False, True] * len(means)        # gradients cross processes at the last micro-batch


def log_of(folder, word):
    return [line for line in map(json.loads, (folder / "log.jsonl").open()) if word in line]


def test_pretraining_s_loop_is_adamw_by_hand(hands, small, tmp_path, monkeypatch):
    init, weights = first_weights(tmp_path)
    cfg = loop_config(tmp_path, init=init, lr=0.5, warmup_epochs=1.0, weight_decay=4.0, w=0.8, probe_every=2, epochs=3)
    watched, probes = Watched(monkeypatch, "pretrain", hands), []

    def probe(model, encode, *rest):
        """As the real one, it leaves the network in eval mode."""
        model.eval()
        picture = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
        crop = normalised(warp(picture, middle_crop(24, 16).expand(3, 3, 3), 16))
        with torch.no_grad():
            assert torch.allclose(encode(picture), model.backbone(crop)[-1].mean((2, 3)), atol=1e-5)
        probes.append(rest[1:3])
        return 9.0

    monkeypatch.setattr(ti_net, "probe_error", probe)
    ti_net.pretrain(cfg, tmp_path, CPU)
    assert watched.asked == [(("synthetic:calm",), "train", (24, 1.7), {})]
    assert watched.drawn == ["views.png", "reconstructions.png"]
    assert probes == [(24, 1.7)] * 2                                      # after epochs 2 and 3, the last
    assert [(x["epoch"], x["probe_mpjpe_mm"]) for x in log_of(tmp_path / "pretrain-ti_net", "probe_mpjpe_mm")] == [(2, 9), (3, 9)]
    assert all(all(modes.values()) for *_, modes in watched.steps)        # training mode, also after a probe
    assert [epoch for _, (epoch,), _ in watched.steps] == [0] * 4 + [1] * 4 + [2] * 4

    torch.manual_seed(cfg.seed)
    model = TINet(cfg)
    model.backbone.load_state_dict(weights)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    rates = cosine(0.5 * 2 / 256, 2, 6)
    states, norms, means = by_hand(model, hands["train"], cfg, plain_pretrain_step, rates, (0.9, 0.95), 5.0)
    assert max(norms) > 6 and min(norms) < 4, norms                       # some are clipped to 5, some are not
    assert_same_states(watched.states, states, start)
    assert_same_terms(watched, rates, means)
    kept = torch.load(tmp_path / "backbone.pt")
    assert all(torch.equal(kept[k], watched.states[-1][f"backbone.{k}"]) for k in kept) and kept.keys() == weights.keys()


def test_finetuning_s_loop_is_adamw_by_hand(hands, small, tmp_path, monkeypatch):
    init, weights = first_weights(tmp_path)
    cfg = loop_config(tmp_path, init=init, finetune="synthetic:calm", lr=0.5, warmup_epochs=1.0, weight_decay=3.0, epochs=3)
    watched = Watched(monkeypatch, "finetune", hands)
    ti_net.finetune(cfg, tmp_path, "row", CPU)
    assert watched.asked == [(("synthetic:calm",), "train", (24, 1.7), {"labelled": True}),
                             (("synthetic:calm",), "val", (24, 1.7), {})]
    assert len(watched.states) == 6 and all(all(modes.values()) for *_, modes in watched.steps)

    torch.manual_seed(cfg.seed)
    model = HandNet(cfg)
    model.backbone.load_state_dict(weights)
    with torch.no_grad():
        model.head[-1].bias.copy_(ti_net.mean_hand(hands["train"])["pose"])
    start = {k: v.clone() for k, v in model.state_dict().items()}
    step = lambda model, batch, cfg, epoch: plain_finetune_step(model, batch, cfg)
    rates = cosine(0.5 * 2 / 256, 2, 6)
    states, norms, means = by_hand(model, hands["train"], cfg, step, rates, (0.9, 0.999), math.inf)
    assert max(norms) > 10                                                # a clip would be seen
    assert_same_states(watched.states, states, start)
    assert_same_terms(watched, rates, means)

    folder = tmp_path / "finetune-row"
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    curve = last["memo"]["curve"]                                         # validation after each epoch
    assert len(curve) == 3 and best["epoch"] == 1 + min(range(3), key=curve.__getitem__)
    for file, number in ((last, 5), (best, 2 * best["epoch"] - 1)):
        assert all(torch.equal(file["model"][k], v) for k, v in watched.states[number].items())
    with torch.no_grad():
        answer = model.eval().predict({"image": hands["val"].all["image"]})
    assert curve[-1] == pytest.approx(float(score(answer, hands["val"].all)["mpjpe_mm"].mean()), rel=1e-5)
    assert [x["epoch"] for x in log_of(folder, "val_mpjpe_mm")] == [1, 2, 3]
    assert (best["method"], best["row"]) == ("ti_net", "row") and best["mean"]["labels"] == 5


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_killed_within_an_epoch_and_resumed_repeats_the_straight_one(hands, small, tmp_path, monkeypatch, stage):
    cfg = loop_config(tmp_path, lr=0.1, probe_every=0, finetune="synthetic:calm" * (stage == "finetune"), save_minutes=1e-9)
    watched = Watched(monkeypatch, stage, hands)
    run = lambda folder: ti_net.pretrain(cfg, folder, CPU) if stage == "pretrain" else ti_net.finetune(cfg, folder, "row", CPU)
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    run(tmp_path / "straight")
    straight, seen = watched.states[:], [rows for rows, *_ in watched.steps]
    assert len(straight) == 4 and seen[:4] != seen[4:]                    # each epoch in an order of its own
    watched.states.clear()
    watched.steps.clear()
    watched.stop_at = 8                                                   # the second epoch's second step, its second half
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    watched.stop_at = None
    run(tmp_path / "killed")
    assert [rows for rows, *_ in watched.steps] == seen + seen[6:]
    assert len(watched.states) == 4
    assert all(torch.equal(a[k], b[k]) for a, b in zip(straight, watched.states) for k in a)


def test_without_an_epoch_the_first_weights_are_written(hands, small, tmp_path, monkeypatch):
    init, weights = first_weights(tmp_path)
    Watched(monkeypatch, "pretrain", hands)
    cfg = loop_config(tmp_path, init=init, epochs=0, finetune="synthetic:calm")
    ti_net.pretrain(cfg, tmp_path, CPU)
    ti_net.finetune(cfg, tmp_path, "row", CPU)
    kept = torch.load(tmp_path / "backbone.pt")
    assert all(torch.equal(kept[k], weights[k]) for k in weights)
    assert (tmp_path / "pretrain-ti_net" / "last.pt").is_file() and (tmp_path / "finetune-row" / "last.pt").is_file()
    best = torch.load(tmp_path / "finetune-row" / "best.pt", weights_only=True)
    model = HandNet(cfg).eval()
    model.load_state_dict(best["model"])
    assert best["epoch"] == 0 and all(torch.equal(best["model"][f"backbone.{k}"], weights[k]) for k in weights)
    with torch.no_grad():                                                 # it answers with the mean pose, for any picture
        answer = model.predict({"image": hands["val"].all["image"]})
    assert torch.allclose(matrix_to_axis_angle(answer["pose"]).flatten(1).float(), best["mean"]["pose"].expand(3, 48), atol=1e-5)
    assert answer["shape"].abs().max() == 0


# ---- Draws


def test_draws_are_new_for_every_epoch_sample_and_view():
    cfg = Config(image_size=16)
    index = torch.arange(300)
    angles = torch.cat([ti_net.draw_angles(index, cfg, epoch) for epoch in range(3)])
    assert len(angles.flatten().unique()) > 3590                          # 3,600 draws of 24 bits
    assert torch.corrcoef(angles.T).fill_diagonal_(0).abs().max() < 0.15
    crops = torch.cat([ti_net.draw_source(index, 24, cfg, epoch, 23) for epoch in range(3)])
    for row, column in ((0, 0), (0, 2), (1, 1), (1, 2)):
        assert len(crops[:, row, column].unique()) > 500          # the largest ones fill the picture
    assert torch.equal(ti_net.draw_angles(index[7:9], cfg, 1), angles[307:309])      # whatever the batch
    assert not torch.equal(ti_net.draw_angles(index, dataclasses.replace(cfg, seed=1), 0), angles[:300])
    other = ti_net.draw_source(index, 24, dataclasses.replace(cfg, seed=1), 0, 23)
    assert not torch.equal(other, crops[:300])
    first = 2 * PI * uniform(index, 1, cfg.seed, "ti_net crop", 0)[:, 0]  # a crop does not tell its angle
    assert float(torch.corrcoef(torch.stack([first, angles[:300, 0]]))[0, 1]) < 0.15
