"""PeCLR's steps, loops and prediction against slow functions typed here from the paper.

An oracle shares the weights of the script's networks, takes `warp` and the draws of common.py, and calls
no view, loss, step or optimiser of peclr.py. Everything is float64.
"""
import colorsys
import copy
import json
import math

import common
import peclr
import pytest
import torch
import torch.nn.functional as F
from peclr import Config, HandNet, PeCLR
from sources import Source
from sources.loader import Joined

SIDE, STORED = 32, 48
TINY = dict(backbone="resnet10", image_size=SIDE, workers=0)
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]


class Encoder(torch.nn.Module):
    """A back-bone of two convolutions: (B, 3, S, S) -> [map (B, 12, 4, 4)] at S = 32."""

    dim = 12

    def __init__(self, name, size, recompute=False):
        super().__init__()
        assert (name, size) == ("resnet10", SIDE)
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(8)
        self.conv2, self.bn2 = torch.nn.Conv2d(8, 12, 3, 4, 1, bias=False), torch.nn.BatchNorm2d(12)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return [x, self.bn2(self.conv2(x)).relu()]


def exact_names(monkeypatch):
    """Draws and pictures of the script in float64, its back-bone small."""
    monkeypatch.setattr(peclr, "build_backbone", Encoder)
    for name in ("uniform", "normal"):
        draw = getattr(common, name)
        monkeypatch.setattr(peclr, name, lambda *words, draw=draw: draw(*words).double())
    monkeypatch.setattr(peclr, "normalise", lambda pictures: (pictures.double() / 255 - MEAN) / STD)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float64 networks, draws and pictures."""
    exact_names(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def samples(n=6, seed=3):
    """n rows in a batch; the first six differ in all that can be missing or known."""
    torch.manual_seed(seed)
    f = 150 + 40 * torch.rand(n)
    K = torch.eye(3).repeat(n, 1, 1)
    K[:, 0, 0], K[:, 1, 1], K[:, :2, 2] = f, 1.02 * f, 26 + 3 * torch.rand(n, 2)
    joints = torch.tensor([0.0, 0.0, 0.55]) + 0.05 * torch.randn(n, 21, 3)
    joints[:, 10] = joints[:, 9] + 0.05 * F.normalize(torch.randn(n, 3), dim=1)
    batch = {"image": torch.randint(0, 256, (n, 3, STORED, STORED), dtype=torch.uint8),
             "index": 3 + 7 * torch.arange(n), "uv": common.project(joints, K) + torch.randn(n, 21, 2),
             "crop": torch.diag(torch.tensor([1.0, 1.0, 1.0])).repeat(n, 1, 1) * (0.5 + torch.rand(n))[:, None, None],
             "K": K, "joints": joints, "joints_ok": torch.ones(n, 21, dtype=torch.bool),
             "scale": (joints[:, 10] - joints[:, 9]).norm(dim=1)}
    batch["crop"][2, 0, 0] *= -1                                   # a left hand, mirrored at load
    batch["joints_ok"][1, [3, 10, 17]] = False                     # the middle finger's bone among them
    batch["joints_ok"][2, 0] = False                               # no wrist
    batch["K"][3], batch["scale"][3] = math.nan, 1.0               # no camera, no length
    batch["joints"][4], batch["joints_ok"][4], batch["uv"][4, 7] = math.nan, False, math.nan       # 2D alone
    batch["uv"][5], batch["joints"][5], batch["joints_ok"][5] = math.nan, math.nan, False          # no label
    return batch


def rows(batch, chosen):
    return {key: value[chosen] for key, value in batch.items()}


def affine(A, points):
    return points @ A[:2, :2].T + A[:2, 2]


def close(got, want, tolerance=1e-9):
    return bool((got - want).abs().max() <= tolerance * (1 + float(want.abs().max())))


# ---- Oracles: views


def matrix(middle, side, angle, shift, size=SIDE):
    """Square of `side` px around `middle` onto `size` px, turned counter-clockwise, moved by a share."""
    s, c0 = size / side, (size - 1) / 2
    crop = torch.tensor([[s, 0, c0 - s * middle[0]], [0, s, c0 - s * middle[1]], [0, 0, 1]])
    c, n = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, n, c0 - c * c0 - n * c0], [-n, c, c0 + n * c0 - c * c0], [0, 0, 1]])
    move = torch.tensor([[1, 0, size * shift[0]], [0, 1, size * shift[1]], [0, 0, 1]])
    return move @ turn @ crop


def true_view(batch, b, cfg, epoch, view, on):
    """Matrix, angle and v / L of one view (Sec. 3.2; ranges: the authors' code, notes 1.1)."""
    u = common.uniform(batch["index"][b:b + 1], 4, cfg.seed, "peclr view", epoch, view)[0].tolist()
    uv, stored = batch["uv"][b], batch["image"].shape[-1]
    middle, radius = [(stored - 1) / 2] * 2, 0.65 * stored / 2.9
    if uv.isfinite().all() and "box-crops" not in cfg.variant:
        middle = [float(uv[:, 0].sum() / 21), float(uv[:, 1].sum() / 21)]
        radius = max(math.dist(point, middle) for point in uv.tolist())
    side = 2 * radius * (0.9 + 0.6 * u[0] if "scale" in on else 1.25)
    angle = math.radians(90 * u[1] - 45) if "rotation" in on else 0.0
    moved = shift = [(15 * u[k] - 7.5) / 128 if "translation" in on else 0.0 for k in (2, 3)]
    if "authors-shift" in cfg.variant and "translation" in on:
        jitter = [-math.floor(15 * u[k]) for k in (2, 3)]                  # px of the picture, to one side
        moved = [j * abs(float(batch["crop"][b, 0, 0])) / side for j in jitter]
        shift = [j / SIDE for j in jitter]
    return matrix(middle, side, angle, moved), angle, shift


def true_colours(image, index, cfg, epoch, view, on):
    """t^a of one picture (3, S, S) in 0..1, pixel by pixel (notes 1.1, in the order of point 7)."""
    S = image.shape[-1]

    def draw(n, purpose):
        return common.uniform(index, n, cfg.seed, f"peclr {purpose}", epoch, view)[0].double()

    def chosen(name):
        return name in on and float(draw(1, f"{name} on")) < 0.5

    def at(x, y):
        return image[:, min(max(y, 0), S - 1), min(max(x, 0), S - 1)]

    if chosen("sobel"):
        out = torch.zeros_like(image)
        for y in range(S):
            for x in range(S):
                gx = sum(w * (at(x + 1, y + k) - at(x - 1, y + k)) for k, w in ((-1, 1), (0, 2), (1, 1)))
                gy = sum(w * (at(x + k, y + 1) - at(x + k, y - 1)) for k, w in ((-1, 1), (0, 2), (1, 1)))
                out[:, y, x] = (gx * gx + gy * gy).sqrt().clamp(max=1)
        image = out
    if chosen("cut-out"):
        size, x0, y0 = draw(3, "cut-out").tolist()
        image = image.clone()
        for y in range(S):
            for x in range(S):
                if abs(x + 0.5 - S * x0) < 0.08 * S * size and abs(y + 0.5 - S * y0) < 0.08 * S * size:
                    image[:, y, x] = 0
    if chosen("blur"):
        sigma, reach = 0.1 + 1.9 * float(draw(1, "blur")), max(1, round(0.05 * S))
        weight = {k: math.exp(-k * k / (2 * sigma * sigma)) for k in range(-reach, reach + 1)}
        total = sum(weight.values())
        for axis in (0, 1):
            image = torch.stack([torch.stack([sum(w / total * (at(x + k, y) if axis else at(x, y + k))
                                                  for k, w in weight.items()) for x in range(S)], -1)
                                 for y in range(S)], -2)
    if "colour-jitter" in on:
        u = draw(4, "colour").tolist()
        order = [2, 1, 0] if "bgr" in cfg.variant else [0, 1, 2]
        out = torch.zeros_like(image)
        for y in range(S):
            for x in range(S):
                h, s, v = colorsys.rgb_to_hsv(*image[order, y, x].tolist())
                v = v * (0.5 + 0.5 * u[2]) + (5 + 15 * u[3]) / 255
                rgb = colorsys.hsv_to_rgb(h * (0.01 + 0.99 * u[0]), s * (0.01 + 0.99 * u[1]), min(1, max(0, v)))
                out[:, y, x] = torch.tensor(rgb)[order]
        image = out
    if chosen("noise"):
        noise = common.normal(index, 3 * S * S, cfg.seed, "peclr noise", epoch, view)[0].double()
        image = (image + 25 / 255 * noise.view_as(image)).clamp(0, 1)
    if chosen("colour-drop"):
        image = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]).expand(3, S, S)
    return image


def true_views(batch, cfg, epoch):
    """(2, B, 3, S, S) as the network must see them, and [(matrix, angle, shift), ...] of both views."""
    best = {"peclr": ("scale", "rotation", "translation", "colour-jitter"), "simclr": ("scale", "colour-jitter")}
    on, views, drawn = cfg.augment or best[cfg.objective], [], []            # Sec. 4.4, last paragraph
    for view in (0, 1):
        drawn.append([true_view(batch, b, cfg, epoch, view, on) for b in range(len(batch["index"]))])
        pictures = [common.warp(batch["image"][b:b + 1], A[None], SIDE)[0] / 255 for b, (A, _, _) in enumerate(drawn[-1])]
        pictures = [true_colours(picture, batch["index"][b:b + 1], cfg, epoch, view, on) for b, picture in enumerate(pictures)]
        views.append((torch.stack(pictures) - MEAN) / STD)
    return torch.stack(views), drawn


def normed(layer, x):
    """BatchNorm over the rows of x, by hand; the statistics of training mode are kept for `moved`."""
    if not layer.training:
        return (x - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias
    kept(layer, x)
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * layer.weight + layer.bias


def kept(layer, x):
    axes = [0, 2, 3][:x.ndim - 1]
    layer.calls = [*getattr(layer, "calls", ()), (x.detach().mean(axes), x.detach().var(axes))]


# ---- Oracles: pre-training, Eq. 1, 3, 4


def true_projections(model, batch, cfg, epoch):
    """z~ (2, B, 128): head (authors' widths), Eq. 4 and (t^g)^-1 point by point."""
    views, drawn = true_views(batch, cfg, epoch)
    f = model.backbone(views.flatten(0, 1))[-1]
    h = F.linear(f.sum((2, 3)) / (f.shape[2] * f.shape[3]), model.g[0].weight, model.g[0].bias)
    p = (normed(model.g[1], h).clamp(min=0) @ model.g[3].weight.T).unflatten(0, (2, -1))
    if cfg.objective == "simclr":                                           # Eq. 1: nothing is undone
        return p
    out = []
    for k in (0, 1):
        for b in range(p.shape[1]):
            _, angle, shift = drawn[k][b]
            x, y = (p[k, b] / p[k, b].norm()).view(64, 2).T
            reach = [v.detach().max() - v.detach().min() for v in (x, y)]
            if "one-range" in cfg.variant:
                both = torch.stack([x, y]).detach()
                reach = [both.max() - both.min()] * 2
            x, y = x - shift[0] * reach[0], y - shift[1] * reach[1]
            x0, y0 = x.detach().mean(), y.detach().mean()
            c, s = math.cos(angle), math.sin(angle)
            out.append(torch.stack([x0 + c * (x - x0) - s * (y - y0), y0 + s * (x - x0) + c * (y - y0)], 1).flatten())
    return torch.stack(out).unflatten(0, (2, -1))


def true_contrast(z, tau):
    """Eq. 1, 3 anchor by anchor, and what is logged beside them."""
    B = z.shape[1]
    flat = [z[k, b] for k in (0, 1) for b in range(B)]
    sim = [[(u @ v) / (u.norm() * v.norm()) for v in flat] for u in flat]
    loss = 0
    for i in range(2 * B):
        below = sum((sim[i][k] / tau).exp() for k in range(2 * B) if k != i)
        loss = loss - ((sim[i][(i + B) % (2 * B)] / tau).exp() / below).log() / (2 * B)
    table = [[float(sim[b][B + other].detach()) for other in range(B)] for b in range(B)]
    off = [table[a][b] for a in range(B) for b in range(B) if a != b]
    return {"loss": loss, "positive": sum(table[b][b] for b in range(B)) / B, "negative": sum(off) / len(off),
            "nearest": sum(max(range(B), key=row.__getitem__) == b for b, row in enumerate(table)) / B}


def true_pretraining(model, micro_batches, cfg, epoch):
    """Terms of a batch with one graph over all of it: each micro-batch is encoded by itself (Sec. 4.1)."""
    parts = [true_projections(model, batch, cfg, epoch) for batch in micro_batches]
    if "accumulate" not in cfg.variant:
        return true_contrast(torch.cat(parts, 1), cfg.tau)
    found = [true_contrast(z, cfg.tau) for z in parts]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


# ---- Oracles: fine-tuning, Eq. 5, 6


def true_targets(batch, b, A, bone):
    """u, v, d of one sample (21, 3), its root's depth in bones (Sec. 3.3; notes 1.7, 1.8)."""
    X = torch.where(batch["joints_ok"][b][:, None], batch["joints"][b], math.nan)
    K, seen = batch["K"][b], affine(A, batch["uv"][b])
    m, n = {"middle": (9, 10), "index": (0, 5)}[bone]
    unit = (X[n] - X[m]).norm()
    root = (X[0] + X[9]) / 2 if bone == "middle" else X[0]
    where = torch.stack([K[0, 0] * root[0] / root[2] + K[0, 2], K[1, 1] * root[1] / root[2] + K[1, 2]])
    uv = seen.clone()
    uv[0] = affine(A, where)
    if not uv[0].isfinite().all():                                          # no 3D: the middle in the picture
        uv[0] = (seen[0] + seen[9]) / 2 if bone == "middle" else seen[0]
    d = (X[:, 2] - root[2]) / unit
    d[0] = 0 * root[2] / unit
    return torch.cat([uv, d[:, None]], 1), root[2] / unit


def true_root(rays, d, bone):
    """Iqbal et al. 2018, Eq. 6, 7, with the floors and limits of each code (notes 1.9)."""
    (m, n), floor, low, high = {"middle": ((9, 10), 1e-8, 4, 50), "index": ((0, 5), 1e-6, -math.inf, math.inf)}[bone]
    (xm, ym), (xn, yn), zm, zn = rays[m].tolist(), rays[n].tolist(), float(d[m]), float(d[n])
    a = (xn - xm) ** 2 + (yn - ym) ** 2
    b = 2 * (zn * (xn ** 2 + yn ** 2 - xn * xm - yn * ym) + zm * (xm ** 2 + ym ** 2 - xn * xm - yn * ym))
    c = (xn * zn - xm * zm) ** 2 + (yn * zn - ym * zm) ** 2 + (zn - zm) ** 2 - 1
    return min(high, max(low, (-b + math.sqrt(max(floor, b * b - 4 * a * c))) / (2 * max(a, floor))))


def true_output(model, pictures, Ks, cfg):
    """u, v, d (B, 21, 3), rays and refined root depth (B,) of views whose intrinsics are Ks."""
    if cfg.freeze:
        with torch.no_grad():
            maps = model.backbone(pictures)[-1]
    else:
        maps = model.backbone(pictures)[-1]
    f = maps.sum((2, 3)) / (maps.shape[2] * maps.shape[3])
    if cfg.freeze:                                                          # Sec. 4.4: a two-layer MLP
        f = F.linear(f, model.head[0].weight, model.head[0].bias).clamp(min=0)
    raw = F.linear(f, model.head[-1].weight, model.head[-1].bias).view(-1, 21, 3)
    out = torch.stack([raw[..., 0], raw[..., 1], raw[..., 2] * (torch.arange(21) > 0)], -1)
    rays, roots, given = [], [], []
    for hand, K in zip(out.detach(), Ks):
        ray = torch.stack([torch.linalg.solve(K, torch.tensor([u, v, 1.0]))[:2] for u, v, _ in hand.tolist()])
        root, d = torch.tensor(true_root(ray, hand[:, 2], cfg.bone)), hand[:, 2]
        rays.append(ray)
        roots.append(root)
        given.append(torch.cat([d, ray.flatten(), root[None]] if cfg.bone == "middle" else [root[None], ray.flatten(), d]))
    x = torch.stack(given)
    for k in (0, 3):                                                        # Linear, BatchNorm, (Leaky)ReLU, twice
        x = F.linear(x, model.refine[k].weight, model.refine[k].bias)
        x = normed(model.refine[k + 1], x)
        x = torch.where(x > 0, x, x * (0.01 if cfg.bone == "middle" else 0.0))
    return out, torch.stack(rays), torch.stack(roots) + F.linear(x, model.refine[6].weight, model.refine[6].bias)[:, 0]


def true_camera(batch, b):
    """K of the stored picture; where it is not known the focal length is the diagonal."""
    f, c = math.sqrt(2) * STORED, (STORED - 1) / 2
    guess = torch.tensor([[f, 0, c], [0, f, c], [0, 0, 1]])
    return batch["K"][b] if batch["K"][b].isfinite().all() else guess


def true_finetuning(model, batch, cfg, epoch, augmented=True):
    """Eq. 5 by loops: 2D 1, depth 5, root 1, over what each sample has (notes 1.7)."""
    crops, Ks, targets, depths = [], [], [], []
    for b in range(len(batch["index"])):
        u = common.uniform(batch["index"][b:b + 1], 3, cfg.seed, "peclr fine-tuning", epoch)[0].tolist()
        u = u if augmented else [0.5] * 3
        A = matrix([(STORED - 1) / 2] * 2, STORED / 0.7 / 2.2, math.radians(90 * u[0] - 45),
                   [(15 * u[k] - 7.5) / 128 for k in (1, 2)])
        crops.append((common.warp(batch["image"][b:b + 1], A[None], SIDE)[0] / 255 - MEAN) / STD)
        Ks.append(A @ true_camera(batch, b))
        target, depth = true_targets(batch, b, A, cfg.bone)
        targets.append(target)
        depths.append(depth)
    out, _, root = true_output(model, torch.stack(crops), Ks, cfg)
    flat, deep, far = [], [], []
    for b, (target, depth) in enumerate(zip(targets, depths)):
        for j in range(21):
            if target[j, :2].isfinite().all():
                flat.append(((out[b, j, 0] - target[j, 0]).abs() + (out[b, j, 1] - target[j, 1]).abs()) / 2)
            if target[j, 2].isfinite():
                deep.append((out[b, j, 2] - target[j, 2]).abs())
        if depth.isfinite():
            far.append((root[b] - depth).abs())
    L_J2D, L_d, L_root = (sum(x) / max(1, len(x)) + 0 * root.sum() for x in (flat, deep, far))
    return {"loss": L_J2D + 5 * L_d + L_root, "L_J2D": L_J2D, "L_d": L_d, "L_root": L_root}


# ---- Steps


def check_terms(got, want):
    assert set(got) == set(want)
    for name in want:
        assert float(got[name]) == pytest.approx(float(want[name]), abs=1e-7), name


def check_gradients(model, other, untouched=()):
    """Every gradient of the script's network is the oracle's; parts that take none have none."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name.startswith(untouched) and untouched:
            assert p.grad is None and (q.grad is None or not q.grad.any()), name
        else:
            assert p.grad is not None and q.grad is not None and (q.grad.any() or p.ndim < 2), name
            assert close(p.grad, q.grad, 1e-8), name


def two(batch):
    """Two micro-batches, of samples that differ."""
    return [rows(batch, [0, 1, 4]), rows(batch, [2, 3, 5])]


def pretrained(cfg, parts, epoch=5):
    torch.manual_seed(0)
    model = PeCLR(cfg).train()
    other = copy.deepcopy(model)
    if "accumulate" in cfg.variant:
        terms = peclr.accumulated_step(model, parts, cfg, epoch)
    elif len(parts) > 1:
        terms = peclr.cached_step(model, parts, cfg, epoch)
    else:
        terms = peclr.whole_step(model, parts[0], cfg, epoch)
    true = true_pretraining(other, parts, cfg, epoch)
    true["loss"].backward()
    check_terms({k: v.detach() for k, v in terms.items()}, {k: v.detach() if k == "loss" else v for k, v in true.items()})
    check_gradients(model, other)
    return terms


@pytest.mark.parametrize("objective", ["peclr", "simclr"])
@pytest.mark.parametrize("form", ["whole", "cached", "accumulated"])
def test_a_step_of_pretraining_is_equation_3_or_1_with_all_its_gradients(objective, form):
    variant = ("accumulate",) if form == "accumulated" else ()
    batch = samples()
    parts = [batch] if form == "whole" else two(batch)
    cfg = Config(objective=objective, variant=variant, seed=2, batch_size=6, micro_batch=6 if form == "whole" else 3, **TINY)
    pretrained(cfg, parts)


@pytest.mark.parametrize("more", [
    dict(objective="simclr", augment=("rotation", "translation", "scale")), dict(augment=("rotation",)),
    dict(augment=("translation",)), dict(variant=("one-range",), tau=0.2), dict(variant=("authors-shift",)),
    dict(variant=("box-crops", "bgr"))], ids=lambda more: "-".join(f"{v}" for v in more.values()))
def test_other_compositions_and_variants_take_their_own_step(more):
    pretrained(Config(seed=1, batch_size=6, micro_batch=6, **(TINY | more)), [samples()])


def test_views_are_the_ten_transformations_drawn_anew_for_each_view_sample_and_epoch():
    batch = rows(samples(), [0, 2, 5])
    cfg = Config(augment=peclr.GEOMETRIC + peclr.APPEARANCE, seed=4, **TINY)
    for epoch in (0, 3):
        views, drawn = peclr.make_views(batch, cfg, epoch)
        true, want = true_views(batch, cfg, epoch)
        assert close(views, true, 1e-7)
        for k in (0, 1):
            assert close(drawn[k].A, torch.stack([A for A, _, _ in want[k]]))
            assert close(drawn[k].angle, torch.tensor([angle for _, angle, _ in want[k]]))
            assert close(drawn[k].shift, torch.tensor([shift for _, _, shift in want[k]]))


def hand_net(cfg):
    """A network whose outputs look like hands, so that their depth is found and not clamped."""
    torch.manual_seed(1)
    model = HandNet(cfg)
    with torch.no_grad():
        batch = samples()
        A = matrix([(STORED - 1) / 2] * 2, STORED / 0.7 / 2.2, 0.2, [0.01, -0.02])
        target, _ = true_targets(batch, 0, A, cfg.bone)
        model.head[-1].weight.mul_(0.2)
        model.head[-1].bias.copy_(target.flatten() + 0.05 * torch.randn(63))
        for k in (1, 4):
            model.refine[k].running_mean.normal_(0, 0.1)
            model.refine[k].running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("bone", ["middle", "index"])
@pytest.mark.parametrize("freeze", [False, True], ids=["tuned", "frozen"])
def test_a_step_of_finetuning_is_equation_5_and_the_root_s_depth_with_all_their_gradients(bone, freeze):
    cfg = Config(bone=bone, freeze=freeze, seed=2, **TINY)
    for part in two(samples()):
        model = hand_net(cfg).train()
        other = copy.deepcopy(model)
        terms = peclr.finetune_step(model, part, cfg, 4)
        terms["loss"].backward()
        true = true_finetuning(other, part, cfg, 4)
        true["loss"].backward()
        check_terms({k: v.detach() for k, v in terms.items()}, {k: v.detach() for k, v in true.items()})
        check_gradients(model, other, ("backbone",) if freeze else ())
        for (name, a), b in zip(model.named_buffers(), other.named_buffers(), strict=True):
            if name.startswith("backbone"):
                assert torch.allclose(a, b[1]), name


# ---- Loops: three steps an epoch for two epochs of the real command


class Few(Source):
    """Some samples as a source."""

    name = box_source = "few"

    def __init__(self, batch):
        self.batch = {key: value for key, value in batch.items() if key != "index"}

    def __len__(self):
        return len(self.batch["image"])

    def batches(self, plan, device, workers):
        for chosen in plan:
            yield rows(self.batch, chosen)

    def targets(self, chosen):
        known = {key: value for key, value in rows(self.batch, chosen).items() if key != "image"}
        return known | {"side_px": torch.full((len(chosen),), float(STORED)), "pose": torch.full((len(chosen), 48), math.nan),
                        "shape": torch.full((len(chosen), 10), math.nan)}

    def gives(self, key):
        return True


def twelve():
    """Twelve samples, twice of each kind."""
    one, two = samples(seed=3), samples(seed=4)
    return {key: torch.cat([one[key], two[key]]) for key in one}


class Wrapped(torch.nn.Module):
    """Stands for DistributedDataParallel: gradients of several processes meet only behind it."""

    def __init__(self, model):
        super().__init__()
        self.module, self.calls = model, 0

    def forward(self, *given):
        self.calls += 1
        return self.module(*given)


class Watched:
    """What a command's loop did: a record for each step, of weights, gradients, rates, modes and inputs."""

    def __init__(self, monkeypatch, train, val=None):
        self.steps, self.given, self.model, self.opened, self.crossed = [], [], None, [], []
        watch, training_steps = self, peclr.training_steps

        def steps(data, cfg, epoch, first, device, *order):
            for step, micro_batches in training_steps(data, cfg, epoch, first, device, *order):
                watch.given.append((epoch, micro_batches))
                yield step, micro_batches

        def opened(cfg, specs, split, size, margin, device, labelled=False):
            watch.opened.append((specs, split, size, margin, labelled))
            return train if split == "train" else val

        def crossing(net, last, accumulate=peclr.accumulate):
            watch.crossed.append(last)
            return accumulate(net, last)

        def spied(optimizer):
            class Spy(optimizer):
                def step(self, closure=None):
                    watch.steps.append({
                        "before": copy.deepcopy(watch.model), "rates": [group["lr"] for group in self.param_groups],
                        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in watch.model.named_parameters()},
                        "modes": {name: part.training for name, part in watch.model.named_modules()}})
                    super().step(closure)
                    watch.steps[-1]["after"] = copy.deepcopy(watch.model.state_dict())
            return Spy

        def built(kind):
            def build(cfg):
                watch.model = kind(cfg)
                watch.initial = copy.deepcopy(watch.model.state_dict())
                watch.seen = []
                watch.model.register_forward_pre_hook(lambda model, given: watch.seen.append(given[0].detach().clone())
                                                      if model.training else None)
                return watch.model
            return build

        def parallel(model, device, compile):
            watch.net = Wrapped(model)
            return watch.net

        monkeypatch.setattr(peclr, "parallel", parallel)
        monkeypatch.setattr(peclr, "training_steps", steps)
        monkeypatch.setattr(peclr, "Lars", spied(peclr.Lars))
        monkeypatch.setattr(torch.optim, "Adam", spied(torch.optim.Adam))
        monkeypatch.setattr(peclr, "PeCLR", built(PeCLR))
        monkeypatch.setattr(peclr, "HandNet", built(HandNet))
        monkeypatch.setattr(peclr, "open_data", opened)
        monkeypatch.setattr(peclr, "accumulate", crossing)
        for name in ("draw_views", "draw_crops", "report"):
            monkeypatch.setattr(peclr, name, lambda *words: None)


WORDS = ["--backbone", "resnet10", "--image-size", str(SIDE), "--batch-size", "4", "--epochs", "2", "--workers", "0",
         "--device", "cpu", "--seed", "5"]


@pytest.fixture
def first_weights(tmp_path):
    """A file of back-bone weights, as --init takes it."""
    torch.manual_seed(7)
    state = PeCLR(Config(**TINY)).backbone.state_dict()
    for key in state:
        if "running" in key:
            state[key] = 0.5 + torch.rand_like(state[key])
    torch.save(state, tmp_path / "first.pt")
    return tmp_path / "first.pt", state


def moved(before, layer_calls):
    """One update of running statistics, by a tenth, to the mean over the micro-batches (DESIGN: one a step)."""
    return [0.9 * old + 0.1 * sum(new) / len(new) for old, new in zip(before, zip(*layer_calls))]


def check_loop(watch, terms_of, adam, rates, first, log, frozen=()):
    """Each step: gradients by the oracle, then a hand-written optimiser and BatchNorm; modes, rates, log."""
    assert watch.net.calls == len(watch.seen) >= len(watch.steps)          # never past what joins processes
    moments, lines = {}, [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-5)
    running = watch.initial | {f"backbone.{key}": value for key, value in first.items()}     # --init arrived
    assert all(torch.equal(p, running[name]) for name, p in watch.steps[0]["before"].named_parameters() if name.startswith("backbone"))
    for number, (step, (epoch, micro_batches)) in enumerate(zip(watch.steps, watch.given, strict=True)):
        other = step["before"]
        for layer in other.modules():
            layer._forward_pre_hooks.clear()
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.register_forward_pre_hook(lambda layer, given: kept(layer, given[0]) if layer.training else None)
        assert step["modes"] == {name: not name.startswith(frozen) if frozen else True for name in step["modes"]}
        assert step["rates"] == [pytest.approx(rates[number], abs=1e-12)] * 2
        assert epoch == number // 3
        old = copy.deepcopy(other.state_dict())
        other.zero_grad()
        terms = terms_of(other, micro_batches, epoch)
        terms["loss"].backward()
        assert {name: lines[number][name] for name in terms} == {
            name: pytest.approx(float(torch.as_tensor(term).detach()), rel=2e-5, abs=1e-6) for name, term in terms.items()}
        for name, p in other.named_parameters():
            if frozen and name.startswith(frozen):
                assert step["grads"][name] is None and torch.equal(step["after"][name], old[name]), name
                continue
            assert close(step["grads"][name], p.grad, 1e-8), name
            m, v = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            w, m, v = adam(old[name], step["grads"][name], m, v, number + 1, rates[number])      # a bias before a norm has but noise
            moments[name] = m, v
            assert close(step["after"][name], w, 1e-10), name
        for name, layer in other.named_modules():                        # moved before the optimiser stepped
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                want = [running[f"{name}.running_mean"], running[f"{name}.running_var"]]
                want = moved(want, layer.calls) if layer.training else want
                assert close(old[f"{name}.running_mean"], want[0], 1e-8) and close(old[f"{name}.running_var"], want[1], 1e-8), name
        running = old


def adam(w, g, m, v, t, rate):
    """Kingma and Ba 2015, Algorithm 1, its defaults."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w - rate * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8), m, v


def lars_adam(w, g, m, v, t, rate, decay=0.05):
    """Notes 1.6: decay on matrices alone, trust 0.02 for every tensor, then Adam."""
    decay = decay if w.ndim > 1 else 0.0
    if w.norm() > 0 and g.norm() > 0:
        q = 0.02 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
        g = (g + decay * w) * (min(1.0, float(q) / rate) if rate else 1.0)
    return adam(w, g, m, v, t, rate)


def pretraining(monkeypatch, tmp_path, *words, data=None):
    watch = Watched(monkeypatch, Few(twelve()) if data is None else data)
    peclr.main(["--data", "synthetic", "--out", str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), *WORDS, *words])
    return watch


PEAK = 0.3 * math.sqrt(4 / 2048)
WARM = [0.0, PEAK / 2, PEAK, PEAK, PEAK * 0.75, PEAK * 0.25]              # 3 steps up, then cosine at 0, 1/3, 2/3


@pytest.mark.parametrize("form", ["whole", "cached", "accumulated"])
def test_the_loop_of_pretraining_is_lars_adam_on_the_equations(form, monkeypatch, tmp_path, first_weights):
    words = ["--micro-batch", "4" if form == "whole" else "2", *["--variant", "accumulate"] * (form == "accumulated")]
    watch = pretraining(monkeypatch, tmp_path, *words, "--init", str(first_weights[0]), "--lr", "0.3",
                        "--weight-decay", "0.05", "--warmup-epochs", "1")
    cfg = Config(seed=5, variant=("accumulate",) if form == "accumulated" else (), **TINY)
    check_loop(watch, lambda model, parts, epoch: true_pretraining(model, parts, cfg, epoch), lars_adam, WARM,
               first_weights[1], next(tmp_path.glob("run*/pretrain-*/log.jsonl")))
    assert watch.opened == [(("synthetic",), "train", 2 * SIDE, 2.9, False)]          # twice the side, 2.9 boxes
    assert watch.crossed == ([] if form == "whole" else [False, True] * 6)      # gradients meet at the last one
    written, = tmp_path.glob("run*/backbone.pt")
    assert all(torch.equal(value, watch.model.backbone.state_dict()[key]) for key, value in torch.load(written).items())


def test_views_differ_between_epochs_views_and_samples_and_agree_between_runs(monkeypatch, tmp_path):
    one = samples()
    same = {key: value[:1].repeat(12, *[1] * (value.ndim - 1)) for key, value in one.items()}
    found, weights = [], []
    for seed in ("5", "5", "6"):
        watch = pretraining(monkeypatch, tmp_path, "--micro-batch", "4", "--seed", seed, data=Few(same))
        found.append(torch.cat(watch.seen))
        weights.append(watch.initial["g.0.weight"])
        monkeypatch.undo()
        exact_names(monkeypatch)
    assert found[0].shape == (2 * 3 * 2 * 4, 3, SIDE, SIDE)               # epochs, steps, views, samples
    assert torch.equal(found[0], found[1])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    every = torch.cat([found[0], found[2]]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)


def test_each_epoch_of_mixed_data_draws_every_source_equally_often(monkeypatch, tmp_path):
    """Ten and two samples: six of each, the small ones three times, in another order and with other views."""
    ten, two_more = Few(rows(twelve(), slice(0, 10))), Few(rows(twelve(), slice(10, 12)))
    watch = pretraining(monkeypatch, tmp_path, "--micro-batch", "4", data=Joined([ten, two_more]))
    plans = [torch.cat([batch["index"] for at, (batch,) in watch.given if at == epoch]) for epoch in (0, 1)]
    for plan in plans:
        assert ((plan % 12) < 10).sum() == 6 and torch.bincount(plan % 12)[10:].tolist() == [3, 3]
        assert len(plan.unique()) == 12
    assert plans[0].tolist() != plans[1].tolist()
    monkeypatch.undo()
    exact_names(monkeypatch)
    watch = pretraining(monkeypatch, tmp_path, "--micro-batch", "4", "--mix", "concat", data=Joined([ten, two_more]))
    assert all(torch.cat([batch["index"] for at, (batch,) in watch.given if at == epoch]).unique().numel() == 12 for epoch in (0, 1))
    assert all(batch["index"].max() < 12 for _, (batch,) in watch.given)


def check_start(model, initial, batch, bone):
    """Point 11: the head starts at the training set's mean u, v, d, its weights at a tenth; 13: the mean bone."""
    hands = list(batch["joints"])
    whole = [hand for hand in batch["joints"] if hand.isfinite().all()]
    lengths = torch.stack([(hand[10] - hand[9]).norm() for hand in whole])
    assert float(model.unit) == pytest.approx(float(lengths.mean()), rel=1e-5)
    assert len(hands) == 12
    mean = torch.stack([hand - hand[0] for hand in whole]).mean(0)
    uv, depth = batch["uv"].nanmean(0), mean[:, 2] - mean[0, 2]
    if bone == "middle":
        depth = mean[:, 2] - (mean[0, 2] + mean[9, 2]) / 2
        uv[0] = (uv[0] + uv[9]) / 2
    else:
        known = [hand for hand in hands if hand[[0, 5]].isfinite().all()]
        lengths = torch.stack([(hand[5] - hand[0]).norm() for hand in known])
    uv = (uv / STORED - 0.5) * SIDE * 2.2 * 0.7 + SIDE / 2
    bias = model.head[-1].bias.view(21, 3)
    assert close(bias[:, :2], uv, 1e-4) and close(bias[1:, 2], depth[1:] / lengths.mean(), 1e-4)
    assert close(model.head[-1].weight, initial[f"head.{len(model.head) - 1}.weight"] / 10)


@pytest.mark.parametrize("freeze", [False, True], ids=["tuned", "frozen"])
def test_the_loop_of_finetuning_is_adam_on_equation_5_also_after_a_validation(freeze, monkeypatch, tmp_path, first_weights):
    watch = Watched(monkeypatch, Few(twelve()), Few(rows(samples(seed=8), [0, 1, 3])))
    peclr.main(["--finetune", "synthetic", "--out", str(tmp_path / "run"), *WORDS, "--init", str(first_weights[0]),
                "--micro-batch", "2", "--lr", "0.01", "--weight-decay", "0.05", *["--freeze", "--bone", "index"] * freeze])
    bone = "index" if freeze else "middle"
    cfg = Config(seed=5, freeze=freeze, bone=bone, **TINY)

    def terms(model, parts, epoch):
        found = [true_finetuning(model, part, cfg, epoch) for part in parts]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def decayed(w, g, *words):
        return adam(w, g + 0.05 * w if w.ndim > 1 else g, *words)

    rates = [0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    check_loop(watch, terms, decayed, rates, first_weights[1], next((tmp_path / "run").glob("*/log.jsonl")), ("backbone",) if freeze else ())
    if freeze:                                                             # neither weights nor statistics
        assert all(torch.equal(value, first_weights[1][key]) for key, value in watch.model.backbone.state_dict().items())
    log = [json.loads(line) for line in (tmp_path / "run").glob("*/log.jsonl").__next__().read_text().splitlines()]
    assert [line["epoch"] for line in log if "val_mpjpe_mm" in line] == [1, 2]
    assert watch.opened == [(("synthetic",), "train", STORED, 2.2, True), (("synthetic",), "val", STORED, 2.2, False)]
    assert watch.crossed == [False, True] * 6
    check_start(watch.steps[0]["before"], watch.initial, twelve(), bone)
    inputs = torch.cat(watch.seen).flatten(1)
    assert len(inputs) == 24 and len(inputs.unique(dim=0)) == 24


def test_finetuning_broken_off_goes_on_where_it_was(monkeypatch, tmp_path):
    """In the second epoch, after a save within it; the weights are those of a straight run."""
    words = ["--finetune", "synthetic", *WORDS, "--micro-batch", "4", "--save-minutes", "0.00001"]
    rate, found = peclr.lr_at, {}

    def power_cut(step, *more):
        if step == 5 and "broken" not in found:
            raise RuntimeError("power cut")
        return rate(step, *more)

    for name in ("straight", "broken"):
        Watched(monkeypatch, Few(twelve()), Few(rows(samples(seed=8), [0, 1, 3])))
        torch.manual_seed(len(name))                                       # the first weights are --seed's alone
        if name == "broken":
            monkeypatch.setattr(peclr, "lr_at", power_cut)
            with pytest.raises(RuntimeError, match="power cut"):
                peclr.main([*words, "--out", str(tmp_path / name)])
            found[name] = None
            peclr.main(["--out", str(tmp_path / name), "--resume"])
        else:
            peclr.main([*words, "--out", str(tmp_path / name)])
        found[name] = torch.load(tmp_path / name / "finetune-scratch" / "last.pt")
        monkeypatch.undo()
        exact_names(monkeypatch)
    assert found["straight"]["step"] == found["broken"]["step"] == 6
    assert all(torch.equal(value, found["broken"]["model"][key]) for key, value in found["straight"]["model"].items())


@pytest.mark.parametrize("words, folder, file", [
    ([], "pretrain-peclr", "backbone.pt"), (["--objective", "simclr"], "pretrain-simclr", "backbone.pt"),
    (["--variant", "one-range", "bgr"], "pretrain-peclr-one-range-bgr", "backbone.pt")])
def test_pretraining_writes_its_encoder_and_a_folder_named_after_its_objective(words, folder, file, monkeypatch, tmp_path):
    Watched(monkeypatch, Few(twelve()))
    peclr.main(["--data", "synthetic", "--out", str(tmp_path / "run"), *WORDS, "--micro-batch", "4", "--epochs", "0", *words])
    assert (tmp_path / "run" / folder / "last.pt").is_file() and (tmp_path / "run" / file).is_file()


# ---- Prediction is training's twin


def true_prediction(model, batch, cfg):
    """Eq. 6 sample by sample: joints m and uv px of image (B, 21, .), typed from notes 1.9 to 1.11."""
    joints, where = [], []
    for b in range(len(batch["image"])):
        K = true_camera(batch, b)
        A = matrix([(STORED - 1) / 2] * 2, STORED / 0.7 / 2.2, 0.0, [0.0, 0.0])
        out = None
        for _ in range(1 + cfg.two_pass):
            if out is not None:                                            # the points' box fills 70 % of the crop
                seen = affine(torch.linalg.inv(A), out[0, :, :2].detach())
                low, high = seen.min(0).values, seen.max(0).values
                A = matrix(((low + high) / 2).tolist(), max(4.0, float((high - low).max())) / 0.7, 0.0, [0.0, 0.0])
            crop = (common.warp(batch["image"][b:b + 1], A[None], SIDE)[0] / 255 - MEAN) / STD
            out, rays, root = true_output(model, crop[None], [A @ K], cfg)
        hand, ray, root = out[0].detach(), rays[0], root[0].detach()
        X = torch.cat([ray, torch.ones(21, 1)], 1) * (hand[:, 2] + root)[:, None]
        if cfg.bone == "middle":
            X[0] = 2 * X[0] - X[9]
        uv = hand[:, :2].clone()
        p = A @ K @ (X[0] / X[0, 2])
        uv[0] = p[:2]
        length = float(batch["scale"][b]) if batch["scale"][b] != 1 else float(model.unit)
        X = X * length / (float((X[10] - X[9]).norm()) if cfg.bone == "index" else 1)
        joints.append(X)
        where.append(affine(torch.linalg.inv(A), uv))
    return torch.stack(joints), torch.stack(where)


@pytest.mark.parametrize("two_pass", [False, True], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("bone", ["middle", "index"])
def test_prediction_is_equation_6_of_what_the_network_answers(bone, two_pass):
    cfg = Config(bone=bone, two_pass=two_pass, **TINY)
    model, batch = hand_net(cfg).eval(), samples()
    model.unit.fill_(0.033)
    with torch.no_grad():
        got = model.predict({key: batch[key] for key in HandNet.USES})
    joints, uv = true_prediction(model, batch, cfg)
    assert close(got["joints"], joints) and close(got["uv"], uv) and torch.equal(got["root"], got["joints"][:, 0])


@pytest.mark.parametrize("bone", ["middle", "index"])
def test_without_augmentation_the_step_sees_and_scores_what_prediction_does(bone, monkeypatch):
    """The same pictures and intrinsics; and its terms are the errors of the prediction, in px, bones and metres."""
    monkeypatch.setattr(peclr, "uniform", lambda index, n, *words: torch.full((len(index), n), 0.5))
    cfg = Config(bone=bone, **TINY)
    model, batch = hand_net(cfg).eval(), rows(samples(), [0, 0])
    seen = []
    model.register_forward_pre_hook(lambda model, given: seen.append(given))
    terms = peclr.finetune_step(model, batch, cfg, 0)
    got = model.predict({key: batch[key] for key in HandNet.USES})
    (step_images, step_K), (images, K) = seen
    assert torch.equal(step_images, images) and torch.equal(step_K, K)
    zoom = SIDE / (STORED / 0.7 / 2.2)                                     # px of the crop in a px of image
    error = (got["uv"] - batch["uv"])[:, 1:].abs().mean()
    K0 = batch["K"][0]
    center = (batch["joints"][0, 0] + batch["joints"][0, 9]) / 2 if bone == "middle" else batch["joints"][0, 0]
    guess = (got["joints"][0, 0] + got["joints"][0, 9]) / 2 if bone == "middle" else got["joints"][0, 0]
    true, mine = (K0 @ (x / x[2]) for x in (center, guess))
    first = (true - mine)[:2].abs().mean()
    assert float(terms["L_J2D"]) == pytest.approx(float(zoom * (20 * error + first) / 21), rel=1e-6)
    m, n = (9, 10) if bone == "middle" else (0, 5)
    unit = (batch["joints"][0, n] - batch["joints"][0, m]).norm()
    if bone == "middle":                                                   # scale is that bone's true length
        assert float(terms["L_root"]) == pytest.approx(float((guess[2] - center[2]).abs() / unit), rel=1e-6)
        d = [(x[:, 2] - root[2])[1:] / unit for x, root in ((got["joints"][0], guess), (batch["joints"][0], center))]
        assert float(terms["L_d"]) == pytest.approx(float((d[0] - d[1]).abs().sum() / 21), rel=1e-6)


# ---- Pictures and numbers beside the loops


def test_pictures_of_views_show_their_key_points_moved_along(monkeypatch, tmp_path):
    drawn, sheets = [], []
    monkeypatch.setattr(peclr, "draw_skeleton", lambda view, uv, **more: drawn.append(uv) or view)
    monkeypatch.setattr(peclr, "sheet", lambda path, cells, **more: sheets.append((path.name, [len(row) for row in cells])))
    batch, cfg = rows(twelve(), [0, 2, 3, 6, 8, 9, 0, 2]), Config(**TINY)
    data = Few(batch)
    peclr.draw_views(tmp_path, data, cfg, torch.device("cpu"))
    for n, (k, b) in enumerate([(k, b) for k in (0, 1) for b in (0, 2, 4, 7)]):
        one = {key: value[b:b + 1] for key, value in batch.items()} | {"index": torch.tensor([b])}
        A, _, _ = true_view(one, 0, cfg, 0, k, ("scale", "rotation", "translation"))
        assert close(drawn[n], affine(A, batch["uv"][b]))
    drawn.clear()
    peclr.draw_crops(tmp_path, data, cfg, torch.device("cpu"))
    for b, uv in enumerate(drawn):
        u = common.uniform(torch.tensor([b]), 3, 0, "peclr fine-tuning", 0)[0].tolist()
        A = matrix([(STORED - 1) / 2] * 2, STORED / 0.7 / 2.2, math.radians(90 * u[0] - 45), [(15 * u[k] - 7.5) / 128 for k in (1, 2)])
        assert close(uv, affine(A, batch["uv"][b]))
    assert sheets == [("views.png", [4, 4, 4]), ("transformations.png", [5, 5]), ("views.png", [4, 4])]


def test_what_a_transformation_changes_is_looked_for_on_the_hand():
    """Pixels nearer than 8 / 8 px to a point; without any, the middle half."""
    on = peclr.near_points(torch.tensor([[2.0, 5.0], [math.nan, 1.0]]), 8)
    assert on.nonzero().tolist() == [[5, 2]]
    assert peclr.near_points(torch.full((2, 2), math.nan), 8).nonzero().tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]


def test_numbers_of_the_authors_code_are_those_of_the_notes():
    """Notes 1.1, 1.5 to 1.7, 1.11 and the release: what the paper leaves out, typed again."""
    cfg = Config()
    assert (cfg.tau, cfg.micro_batch, cfg.warmup_epochs, cfg.weight_decay, cfg.epochs, cfg.mix, cfg.bone) == (
        0.5, 128, 10.0, 1e-6, 100, "authors", "middle")
    tuned = peclr.finetune_config({"finetune": "freihand"})
    assert (tuned.batch_size, tuned.micro_batch, tuned.warmup_epochs, tuned.weight_decay, tuned.epochs, tuned.lr,
            tuned.image_size, tuned.freeze, tuned.two_pass) == (128, 32, 0.0, 2e-4, 100, 5e-4, 224, False, False)
    frozen = peclr.finetune_config({"finetune": "freihand", "freeze": True})
    assert (frozen.epochs, frozen.lr, frozen.freeze) == (50, 5e-4, True)
    for given, epochs, rate in (({"epochs": 3}, 3, 5e-4), ({"quick": True}, 3, 5e-3), ({"quick": True, "lr": 0.1}, 3, 0.1)):
        frozen = peclr.finetune_config({"finetune": "freihand", "freeze": True} | given)
        assert (frozen.epochs, frozen.lr) == (epochs, rate)
    assert (peclr.stored_side(tuned), peclr.MARGIN, peclr.VIEW_MARGIN, peclr.RADIUS) == (336, 2.2, 2.9, 0.65)
    assert pytest.approx(0.7) == 1 / peclr.CROP
