"""HaMuCo's training step and loop against slow oracles typed from the paper, and `predict` as their twin.

The oracle of the step takes MANO's layer, `warp`, the counter-based draws and the encoder; views, heads, sampling,
graphs, attention, alignment and losses are typed here, one picture, joint or pair of views at a time.
"""
import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch import nn

import common
import hamuco
import sources
from hamuco import Config, HaMuCo
from hand.builtin import builtin_hand
from sources import Source

S, L, V, J = 32, 56, 3, 21                       # crop and stored picture px, views, joints
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tiny(nn.Module):
    """An encoder with four maps of different widths and sizes, and BatchNorm."""

    dim, stride = 10, 16

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in ((3, 4, 4), (4, 6, 2), (6, 8, 1), (8, 10, 2)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in (4, 6, 8, 10))

    def forward(self, x):
        maps = []
        for conv, norm in zip(self.convs, self.norms):
            x = nn.functional.leaky_relu(norm(conv(x)), 0.3)
            maps.append(x)
        return maps


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(hamuco, "build_backbone", lambda name, size, recompute: Tiny())
    monkeypatch.setattr(hamuco, "LOCATION", 8)                      # 64 in the paper's network


@pytest.fixture()
def exact(monkeypatch):
    """Everything in float64, also what the script makes single precision."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(**more):
    return Config(**dict(backbone="resnet10", image_size=S, batch_size=4, micro_batch=2, views=V, mano="builtin", epochs=3,
                         warm_epochs=1, mask_epochs=1, alpha=0.3, gamma=7.0, augment=0.8, seed=5) | more)


def trained(cfg):
    """A network all of whose numbers differ, with cameras of which some look the wrong way (s < 0)."""
    torch.manual_seed(3)
    model = HaMuCo(cfg).double()
    for name, p in model.named_parameters():
        p.data += (0.3 if name.endswith(".A") else 0.5 / math.sqrt(max(1, p[0].numel() if p.dim() > 1 else 25))) * torch.randn_like(p)
    for last in [model.heads[2][2]] + ([model.interaction.F_r[2]] if model.interaction is not None else []):
        last.bias.data[-3:] = torch.tensor([2.5, 0.8, -0.7])            # and some joints outside the crop
        last.weight.data[-3] *= 3
    model.mano.hands_mean += 0.1 * torch.sin(torch.arange(45.0))
    return model


def moments(seed):
    """A micro-batch of two moments that differ in everything that can differ.

    One view is missing in the first, one moment has no calibration in the second batch, labels are missing or unsure, a
    rig does not say its unit, and the true key points are not the labels.
    """
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=gen)
    M = torch.eye(4).repeat(2, V, 1, 1)
    M[..., :3, :3] = torch.linalg.matrix_exp(skew(3 * rand(2, V, 3) - 1.5))
    M[..., :3, 3] = 0.1 * rand(2, V, 3) + torch.tensor([0, 0, 0.6])
    world = 0.16 * (rand(2, 1, J, 3) - 0.5)
    joints = world @ M[..., :3, :3].mT + M[..., None, :3, 3]
    K = torch.tensor([[300.0, 0, 27], [0, 310, 28], [0, 0, 1]]).repeat(2, V, 1, 1)
    uv = joints[..., :2] / joints[..., 2:] * torch.tensor([300.0, 310]) + torch.tensor([27.0, 28])
    batch = {"image": (255 * rand(2, V, 3, L, L)).byte(), "index": torch.tensor([11, 4 + seed]), "K": K, "cameras": M,
             "view_ok": torch.ones(2, V, dtype=torch.bool), "joints": joints, "uv": uv, "uv_label": uv + 4 * rand(2, V, J, 2),
             "confidence": 0.02 + 0.98 * rand(2, V, J), "scale": torch.ones(2, V), "side": ["left", "right"]}
    batch["uv_label"][0, 1, 4:7], batch["confidence"][0, 1, 4:7] = math.nan, 0.0
    batch["confidence"][1, 2, 9] = 0.0                       # a label of no confidence counts as none
    batch["uv"][1, 0, 3], batch["joints"][1, 0, 3] = math.nan, math.nan
    if seed == 0:
        batch["view_ok"][0, 1] = False
        for key in ("uv", "uv_label", "joints", "K", "cameras"):
            batch[key][0, 1] = math.nan
        batch["confidence"][0, 1] = 0
        batch["scale"][1] = math.nan
    else:
        batch["cameras"][0, 2] = math.nan                    # a view that is there without its camera: A is fitted
    return batch


# ---- The oracle ----


def skew(w):
    x, y, z = w.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


def linear(net, name, x):
    return x @ net[name + ".weight"].T + net[name + ".bias"]


def layer_norm(net, name, x, eps):
    apart = x - x.mean(-1, keepdim=True)
    return apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt() * net[name + ".weight"] + net[name + ".bias"]


def mlp(net, name, x):
    """Linear, LeakyReLU(0.1), Linear."""
    return linear(net, name + ".2", leaky(linear(net, name + ".0", x)))


def sheet_view(index, v, epoch, cfg):
    """The authors' augmentation (notes, 1.6), in px of HanCo's picture, whose hand box is 104 px: A and colour."""
    u = common.uniform(torch.tensor([index]), 10, cfg.seed, "hamuco view", epoch, v)[0]
    a, px = cfg.augment, L / 2.2 / 104                             # stored px a HanCo px
    wide = (130 + a * (39 * u[0] - 10)) / (1 + a * (0.2 * u[1] - 0.1)) * px
    middle = (L - 1) / 2 + a * (40 * (u[2:4] - 0.5) + 20 * (u[4:6] - 0.5)) * px
    angle = a * math.pi * (2 * u[6] - 1)
    c, s = angle.cos(), angle.sin()
    linear = S / wide * torch.stack([torch.stack([c, s]), torch.stack([-s, c])])     # counter-clockwise on the screen
    A = torch.eye(3)
    A[:2, :2], A[:2, 2] = linear, (S - 1) / 2 - linear @ middle
    return A, angle, 0.8 + 0.4 * u[7:]


def own_hand(data):
    """MANO's layer with the joints of a data set: the chain's, or HanCo's, regressed from the posed mesh."""
    hand = common.Mano(builtin_hand(), "graphormer" if data == "hanco" else "smplx", torch.float32).double()
    hand.hands_mean += 0.1 * torch.sin(torch.arange(45.0))
    return hand


def hand_of(mano, six_d, beta, camera, regressed):
    """Sec. 3.1, one picture: 6D (96,), shape (10,), (s, t) -> xyz (799, 3) in 0.2 m, uv (799, 2) in [-1, 1], theta (45,)."""
    R, theta = [], []
    for k in range(16):
        a, b = six_d[6 * k:6 * k + 6].view(3, 2).T                 # interleaved: two columns
        x = a / a.norm()
        y = b - (x @ b) * x
        y = y / y.norm()
        rotation = torch.stack([x, y, torch.linalg.cross(x, y)], 1)
        if k:                                                      # the 15 local joints: logarithm, plus MANO's mean
            turn = torch.acos((rotation.trace() - 1) / 2)
            w = torch.stack([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
            w = turn * w / (2 * turn.sin())
            theta.append(w)
            rotation = torch.linalg.matrix_exp(skew(w + mano.hands_mean[3 * k - 3:3 * k]))
        R.append(rotation)
    verts, joints = mano(torch.stack(R)[None], beta[None])
    joints = mano.regress(verts) if regressed else joints
    points = torch.cat([verts[0], joints[0]])
    metres = points - joints[0, 9]                                 # root: the middle finger's first joint
    s, t = camera[0].clamp(min=0), camera[1:]
    return metres / 0.2, 2 * s * metres[:, :2] + t, torch.cat(theta)      # Pi(P) = s Omega(P) + t, a crop being 2 wide


def sampled(H, uv):
    """JFS: map (C, h, w) at (J, 2) in [-1, 1], corners aligned, bilinear, zero outside -> (J, C)."""
    C, h, w = H.shape
    rows = []
    for u, v in uv.tolist():
        x, y = (u + 1) / 2 * (w - 1), (v + 1) / 2 * (h - 1)
        total = torch.zeros(C)
        for i, j in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= i < w and 0 <= j < h:
                total = total + (1 - abs(x - i)) * (1 - abs(y - j)) * H[:, j, i]
        rows.append(total)
    return torch.stack(rows)


def graph_conv(net, name, x):
    A = net[name + ".A"]
    return linear(net, name + ".fc", torch.stack([row / (row.sum() + 1e-5) @ x for row in A]))


def graph(net, name, x, keep):
    """F_a of one view's joints (J, D): norm, convolution, LeakyReLU, dropout, convolution, LeakyReLU."""
    x = leaky(graph_conv(net, name + ".first", layer_norm(net, name + ".norm", x, 1e-5)))
    return leaky(graph_conv(net, name + ".second", x * keep / 0.9))


def attention(net, name, G, allowed):
    """F_t of one moment: G {view: (J, D)}, allowed {view: views its joints attend to}; both residuals are inside."""
    D = next(iter(G.values())).shape[1]
    wide, normed, out = D // 4, {v: layer_norm(net, name + ".norm", x, 1e-6) for v, x in G.items()}, {}
    for v in G:
        keys = torch.cat([normed[k] for k in sorted(allowed[v])])
        q, k, value = linear(net, name + ".q", normed[v]), linear(net, name + ".k", keys), linear(net, name + ".v", keys)
        heads = []
        for head in range(4):
            part = slice(head * wide, (head + 1) * wide)
            weight = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(wide), 1)
            heads.append(weight @ value[:, part])
        x = G[v] + linear(net, name + ".out", torch.cat(heads, 1))
        hidden = linear(net, name + ".mlp.0", layer_norm(net, name + ".norm_mlp", x, 1e-6)).clamp(min=0)
        out[v] = x + linear(net, name + ".mlp.2", hidden)
    return out


def kept(index, D, layer, epoch, cfg):
    """Dropout's draw of one moment, (V, J, D): 16 bits each, four in a word, lowest first."""
    n = V * J * D
    words = common.bits(torch.tensor([index]), math.ceil(n / 4), cfg.seed, "hamuco dropout", epoch, layer)[0].tolist()
    parts = [(word >> shift) % 65536 for word in words for shift in (0, 16, 32, 48)]
    return torch.tensor([float(part >= round(0.1 * 65536)) for part in parts[:n]]).view(V, J, D)


def masks(index, there, block, epoch, cfg):
    """Sec. 4.6: whom each view attends to, and who enters the maximum; everybody before the last epochs."""
    if epoch < cfg.epochs:
        return dict.fromkeys(there, there), there
    u = common.uniform(torch.tensor([index]), 2 + V + V * V, cfg.seed, "hamuco mask", epoch, block)[0].tolist()
    seen, shared = (1 + math.floor(x * len(there)) for x in u[:2])
    allowed = {v: [v, *sorted((k for k in there if k != v), key=lambda k: u[2 + V + V * v + k])][:seen] for v in there}
    return allowed, sorted(there, key=lambda k: u[2 + k])[:shared]


def turned(M, angle):
    """The rotation of a camera (4, 4) whose picture was turned counter-clockwise by an angle."""
    c, s, o = angle.cos(), angle.sin(), torch.zeros(())
    return torch.stack([torch.stack([c, s, o]), torch.stack([-s, c, o]), torch.tensor([0.0, 0, 1])]) @ M[:3, :3]


def aligned_hand(x_j, x_i, R):
    """A of Sec. 3.2.3: view j's hand as view i has it; R (3, 3), or None: Procrustes."""
    mu_j, mu_i = x_j.mean(0), x_i.mean(0)
    K = (x_j - mu_j).T @ (x_i - mu_i)
    if R is None:
        U, _, Vh = torch.linalg.svd(K)
        R = Vh.T @ torch.diag(torch.tensor([1.0, 1, float(torch.det(U @ Vh).detach().sign())])) @ U.T
    scale = (R @ K).trace() / (x_j - mu_j).square().sum()
    return scale * (x_j - mu_j) @ R.T + mu_i


def triangulated(uv, c, P):
    """DLT of one joint: rows u P3 - P1 and v P3 - P2 of each view, times its confidence; last singular vector."""
    rows = [w * r for p, w, q in zip(uv, c, P) if w > 0 and p.isfinite().all() and q.isfinite().all()
            for r in (p[0] * q[2] - q[0], p[1] * q[2] - q[1])]
    X = torch.linalg.svd(torch.stack(rows))[2][-1]
    return X[:3] / X[3]


def labels_of(batch, b, v, A, angle, cfg):
    """What view v of moment b is to learn: uv (J, 2) in [-1, 1], confidence (J,), xyz (J, 3) in 0.2 m or None."""
    px, c = batch["uv"][b, v], torch.ones(J)
    xyz = batch["joints"][b, v] if cfg.supervision == "truth3d" else None
    if cfg.supervision == "labels2d":
        px, c = batch["uv_label"][b, v], batch["confidence"][b, v]
    if cfg.supervision == "triangulated":
        P = [batch["K"][b, k] @ batch["cameras"][b, k, :3] for k in range(V)]
        X = torch.stack([triangulated(batch["uv_label"][b, :, j], batch["confidence"][b, :, j] * batch["view_ok"][b], P)
                         for j in range(J)])
        xyz = X @ batch["cameras"][b, v, :3, :3].T + batch["cameras"][b, v, :3, 3]
        px = (xyz / xyz[:, 2:] @ batch["K"][b, v].T)[:, :2]
    c = c * px.isfinite().all(1)
    crop = px @ A[:2, :2].T + A[:2, 2]                             # pixel centres are integers: the crop ends at S - 1/2
    if xyz is not None:
        xyz = (turned(torch.eye(4), angle) @ (xyz - xyz[9]).T).T / 0.2
        xyz = xyz * math.nan if batch["scale"][b, v].isnan() else xyz
    return (crop + 0.5) / S * 2 - 1, c, xyz


def oracle(model, batch, cfg, epoch, step):
    """Sec. 3.1 to 3.2.3 for a micro-batch, in loops: {term: scalar}."""
    net, off = dict(model.named_parameters()), set(cfg.variant)
    mano, regressed = own_hand(cfg.data[0]), cfg.data[0] == "hanco"
    there = [[v for v in range(V) if batch["view_ok"][b, v]] for b in range(2)]
    keys = [(b, v) for b in range(2) for v in there[b]]
    views = {(b, v): sheet_view(int(batch["index"][b]), v, epoch, cfg) for b, v in keys}
    pictures = []
    for b, v in keys:
        A, _, colour = views[b, v]
        moved = common.warp(batch["image"][b, v][None].double(), A[None], S)[0] * colour[:, None, None]
        pictures.append(torch.stack([(x / 255 - m) / d for x, m, d in zip(moved.clamp(0, 255), MEAN, STD)]))
    maps = model.backbone(torch.stack(pictures))
    single, star, six_ds = {}, {}, {}
    for n, key in enumerate(keys):
        pooled = maps[3][n].mean((1, 2))
        six_ds[key], beta, camera = (mlp(net, f"heads.{k}", pooled) for k in range(3))
        single[key] = (*hand_of(mano, six_ds[key], beta, camera, regressed), beta, camera)
    if not off & {"single-view", "no-dcvi"}:
        G = {}
        for n, key in enumerate(keys):                             # VSGFE, Sec. 3.2.1: joint features G2, G3, G1
            xyz, uv = single[key][0][778:], single[key][1][778:]
            parts = []
            if "no-g2" not in off:                                 # SAIGB: 8 maps of H4 for each joint
                W, bias = net["interaction.G2.0.weight"][:, :, 0, 0], net["interaction.G2.0.bias"]
                parts.append(leaky(torch.einsum("oc,chw->ohw", W, maps[3][n]) + bias[:, None, None]).reshape(J, -1))
            if "no-g3" not in off:                                 # JFS: no gradient by the places
                parts.append(torch.cat([sampled(maps[k][n], uv.detach()) for k in range(3)], 1))
            if "no-g1" not in off:                                 # (u, v, depth) and the 15 local rotations
                place = torch.cat([uv, xyz[:, 2:]], 1).flatten()
                parts.append(mlp(net, "interaction.G1", torch.cat([place, six_ds[key][6:]])).view(J, 8))
            G[key] = torch.cat(parts, 1)
        D = next(iter(G.values())).shape[1]
        for b in range(2):                                         # DCVI, Sec. 3.2.2: G* = G + F_t(G) + C'
            index, mine = int(batch["index"][b]), {v: G[b, v] for v in there[b]}
            for block in range(2):
                allowed, shared = masks(index, there[b], block, epoch, cfg)
                keep, name = kept(index, D, block, epoch, cfg), f"interaction.blocks.{block}"
                new = mine if "no-cva" in off else attention(net, name + ".attention", mine, allowed)
                if "no-vsf" not in off:
                    C = torch.stack([graph(net, name + ".graph", mine[v], keep[v]) for v in shared]).amax(0)
                    new = {v: x + C for v, x in new.items()}
                mine = new
            keep = kept(index, D, 2, epoch, cfg)
            for v in there[b]:                                     # F_r; the shape is the single view's, a constant here
                last = graph(net, "interaction.fuse", mine[v], keep[v]).flatten()
                out, beta = mlp(net, "interaction.F_r", last), single[b, v][3].detach()
                star[b, v] = (*hand_of(mano, out[:96], beta, out[106:], regressed), beta, out[106:])
    final = star or single
    mean = lambda values: torch.stack(values).mean()
    L_2D, L_3D, n_3d = 0, 0, 0
    true = {key: labels_of(batch, *key, views[key][0], views[key][1], cfg) for key in keys}
    for hands in (single, star):
        if hands:
            errors = []
            for key in keys:                                       # L1, weighted by confidence; nothing without a label
                uv, c, _ = true[key]
                errors += [c[j] * (hands[key][1][778 + j] - uv[j]).abs().mean() if c[j] > 0 else torch.zeros(()) for j in range(J)]
            L_2D = L_2D + mean(errors)
            if cfg.supervision in ("truth3d", "triangulated"):
                apart = torch.cat([(hands[key][0][778:] - true[key][2]).flatten() for key in keys])
                L_3D, n_3d = L_3D + apart[apart.isfinite()].abs().mean(), n_3d + 1
    L_p = cfg.alpha * (sum(mean([hands[key][2].abs().mean() for key in keys]) for hands in (single, star) if hands)
                       + cfg.gamma * mean([single[key][3].abs().mean() for key in keys]))
    L_c, L_d = torch.zeros(()), torch.zeros(())
    if epoch >= cfg.warm_epochs and "single-view" not in off:
        flat, fused, distilled = [], [], []
        for b in range(2):
            known = cfg.calibration == "known" and all(batch["cameras"][b, v].isfinite().all() for v in there[b])
            R = {v: turned(batch["cameras"][b, v], views[b, v][1]) for v in there[b]}
            for i in there[b]:
                x_i = final[b, i][0]
                moved = {j: aligned_hand(final[b, j][0], x_i, R[i] @ R[j].T if known else None) for j in there[b]}
                for j in there[b]:                                 # |x_i, y_i as a label - A_i(M*_j)|; 0 for j = i
                    error = (moved[j][:, :2] - x_i[:, :2].detach()).abs().mean() if j != i else torch.zeros(())
                    pixels = 0.4 * final[b, i][4][0].clamp(min=0) if "projected-c2d" in off else 1.0
                    flat.append(error * pixels)
                label = (sum(moved.values()) / len(moved)).detach()                          # M~ as view i has it
                fused.append((label - x_i).abs().mean())
                distilled.append((label - single[b, i][0]).abs().mean())
        even = step % 2 == 0
        use_flat = "no-c2d" not in off and (even or "no-cf" in off)
        use_fused = "no-cf" not in off and (not even or "no-c2d" in off)
        if "no-c" not in off:
            L_c = mean(flat) if use_flat else mean(fused) if use_fused else L_c
        L_d = mean(distilled) if star and "no-d" not in off else L_d
    zero = torch.zeros(())
    return {"loss": L_c + L_d + L_2D + L_p + L_3D, "L_c": L_c, "L_d": L_d, "L_2D": L_2D, "L_p": L_p, "L_3D": zero + L_3D}


# ---- The step ----

CASES = {
    "even step": dict(), "odd step": dict(step=7), "before warm-up ends": dict(epoch=0),
    "random masks": dict(epoch=3), "random masks, odd": dict(epoch=3, step=9),
    "fitted": dict(calibration="none"), "fitted, odd": dict(calibration="none", step=3),
    "regressed joints": dict(data=("hanco",)),
    "single view": dict(variant=("single-view",)), "single view, warm": dict(variant=("single-view",), epoch=0, step=3),
    "truth2d": dict(supervision="truth2d", step=1), "truth3d": dict(supervision="truth3d"),
    "triangulated": dict(supervision="triangulated", variant=("single-view",)),
    **{" ".join(words): dict(variant=words, step=step) for step, *words in (
        (4, "no-vsf"), (5, "no-cva"), (4, "no-g1"), (5, "no-g2"), (4, "no-g3"), (4, "no-c2d"), (5, "no-cf"), (4, "no-dcvi"),
        (5, "no-dcvi", "no-g1"), (4, "no-c"), (4, "no-d"), (6, "projected-c2d"), (5, "no-c2d", "no-cf"))},
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_and_its_gradient_are_those_of_the_paper_s_equations(exact, case):
    more = dict(CASES[case])
    epoch, step = more.pop("epoch", 1), more.pop("step", 4)
    cfg = config(**more)
    batches = [moments(0), moments(1)]
    if cfg.supervision == "triangulated":                   # cannot do without a camera
        batches[1]["cameras"][0, 2] = moments(1)["cameras"][1, 2]
    model, slow = trained(cfg), trained(cfg)
    for batch in batches:
        terms, expected = hamuco.train_step(model, batch, cfg, epoch, step), oracle(slow, batch, cfg, epoch, step)
        assert set(terms) == set(expected)
        for name, value in expected.items():
            assert float(terms[name].detach()) == pytest.approx(float(value.detach()), rel=1e-9, abs=1e-12), name
        (terms["loss"] / 2).backward()
        (expected["loss"] / 2).backward()
    wanted = dict(slow.named_parameters())
    for name, p in model.named_parameters():
        a, b = p.grad, wanted[name].grad
        if a is None or b is None:
            assert (a is None and (b is None or not b.any())) or (b is None and not a.any()), name
            continue
        assert float((a - b).abs().max()) <= 1e-7 * max(float(b.abs().max()), 1e-6), name
    parts = ["backbone.convs.0.weight", "backbone.norms.3.bias", "heads.0.0.weight", "heads.1.2.bias", "heads.2.2.weight"]
    if model.interaction is not None:
        parts += [f"interaction.{part}" for part in (
            "G1.0.weight", "G2.0.weight", "blocks.0.attention.k.weight", "blocks.1.graph.first.A", "fuse.second.fc.bias",
            "F_r.2.weight") if f"interaction.{part}" in wanted]
    assert all(wanted[name].grad.abs().max() > 1e-8 for name in parts)


# ---- The loop ----


class Given(Source):
    """Moments that are given, as a source: without pictures also."""

    name, box_source = "given", "annotated"

    def __init__(self, moments):
        self.moments = moments

    def __len__(self):
        return len(self.moments["image"])

    def batches(self, plan, device, workers):
        for rows in plan:
            yield pick(self.moments, rows)

    def targets(self, rows):
        found = pick(self.moments, rows)
        return {k: v for k, v in found.items() if k != "image"} | {"side_px": torch.full((len(rows),), float(L))}

    def gives(self, key):
        return key in self.moments


def pick(moments, rows):
    """Rows of a dictionary of samples, collated."""
    return {k: pick(v, rows) if isinstance(v, dict) else [v[r] for r in rows.tolist()] if isinstance(v, list) else v[rows].clone()
            for k, v in moments.items()}


def eight():
    """Eight different moments, some with a missing view, with all that a source gives."""
    found = [moments(k % 2) for k in range(4)]
    for k, one in enumerate(found):
        one["image"] = one["image"].roll(k, -1)
        one["uv_label"] = one["uv_label"] + k
    every = {k: torch.cat([one[k] for one in found]) if isinstance(v, torch.Tensor) else [x for one in found for x in one[k]]
             for k, v in found[0].items() if k != "index"}
    yes = torch.ones(8, dtype=torch.bool)
    return every | {"has": {"cameras": yes, "uv": yes, "joints": yes}, "pose": torch.full((8, V, 48), math.nan),
                    "shape": torch.full((8, V, 10), math.nan), "joints_ok": every["joints"].isfinite().all(-1)}


class Recorder:
    """What the real command gives its step, and the network's state at each."""

    def __init__(self, monkeypatch):
        self.calls, step = [], hamuco.train_step

        def recorded(net, batch, cfg, epoch, number):
            self.calls.append({
                "batch": dict(batch), "epoch": epoch, "step": number, "net": net, "cfg": cfg,
                "training": all(module.training for module in net.modules()),
                "state": {k: v.clone() for k, v in net.state_dict().items()}})
            return step(net, batch, cfg, epoch, number)

        recorded.__wrapped__ = step
        monkeypatch.setattr(hamuco, "train_step", recorded)


@pytest.fixture()
def command(monkeypatch, tmp_path):
    """command(*words) runs hamuco.py on the eight moments as a user would; returns what was recorded, and the folder."""
    opened = []

    def open_data(cfg, specs, split, size, margin, device, **more):
        opened.append((split, size, margin, more["rig"].views))
        return Given(eight()) if split == "train" else Given(pick(eight(), torch.arange(0)))

    monkeypatch.setattr(hamuco, "open_data", open_data)

    def run(*words, out="run"):
        record = Recorder(monkeypatch)
        hamuco.main(["--data", "synthetic", "--mano", "builtin", "--image-size", str(S), "--views", str(V), "--batch-size", "4",
                     "--micro-batch", "2", "--epochs", "1", "--warm-epochs", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32",
                     "--lr", "1e-3", "--seed", "5", "--out", str(tmp_path / out), *words])
        assert ("train", L, 2.2, V) in opened
        return record.calls, tmp_path / out
    return run


def final(folder, name="train-hamuco"):
    return torch.load(folder / name / "last.pt", weights_only=True)["model"]


def test_four_steps_of_the_command_are_those_of_a_hand_written_loop(command):
    """AdamW of (Loshchilov and Hutter), a cosine to 0 over two steps, then one from a tenth for the masks' epoch."""
    calls, out = command("--mask-epochs", "1", "--weight-decay", "0.3")
    assert [(c["epoch"], c["step"]) for c in calls] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 2), (1, 2), (1, 3), (1, 3)]
    order = torch.cat([common.permutation(8, 5, 0), common.permutation(8, 5, 1)]).split(2)
    for call, rows in zip(calls, order):
        assert call["batch"]["index"].tolist() == rows.tolist()
        assert torch.equal(call["batch"]["image"], eight()["image"][rows])
        assert torch.allclose(call["batch"]["uv_label"], eight()["uv_label"][rows], equal_nan=True)
    assert all(call["training"] for call in calls)
    model = HaMuCo(calls[0]["cfg"]).to(memory_format=torch.channels_last).train()
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    states = [calls[2 * n]["state"] for n in range(4)] + [final(out)]
    lines = [json.loads(line) for line in (out / "train-hamuco" / "log.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "step" in line}
    for n in range(4):
        model.load_state_dict(states[n])
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        inputs = {name: [] for name in norms}
        hooks = [module.register_forward_hook(lambda _, x, y, name=name: inputs[name].append(x[0].detach()))
                 for name, module in norms.items()]
        loss = 0
        for call in calls[2 * n:2 * n + 2]:
            terms = hamuco.train_step.__wrapped__(model, dict(call["batch"]), call["cfg"], call["epoch"], n)
            (terms["loss"] / 2).backward()
            loss += float(terms["loss"].detach()) / 2
        for hook in hooks:
            hook.remove()
        peak, done = (1e-3, n / 2) if n < 2 else (1e-4, (n - 2) / 2)
        rate = peak * (1 + math.cos(math.pi * done)) / 2
        assert logged[n + 1]["lr"] == pytest.approx(rate, rel=1e-5, abs=1e-15)
        assert logged[n + 1]["loss"] == pytest.approx(loss, rel=1e-4)
        for name, p in model.named_parameters():
            g = torch.zeros_like(p) if p.grad is None else p.grad
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            move = first[name] / (1 - 0.9 ** (n + 1)) / ((second[name] / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8)
            expected = p.detach() * (1 - rate * (0.3 if p.dim() > 1 else 0.0)) - rate * move
            if p.grad is not None:
                assert float((states[n + 1][name] - expected).abs().max()) < 1e-3 * rate + 1e-7, (n, name)
            p.grad = None
        for name in norms:
            mean = sum(x.mean((0, 2, 3)) for x in inputs[name]) / 2
            var = sum(x.transpose(0, 1).flatten(1).var(1) for x in inputs[name]) / 2
            for key, value in (("running_mean", mean), ("running_var", var)):
                expected = 0.9 * states[n][f"{name}.{key}"] + 0.1 * value
                assert torch.allclose(states[n + 1][f"{name}.{key}"], expected, rtol=1e-5, atol=1e-6), (n, name, key)
            assert int(states[n + 1][f"{name}.num_batches_tracked"]) == n + 1
    assert torch.equal(torch.load(out / "finetune.pt", weights_only=True)["model"]["heads.0.0.weight"], states[4]["heads.0.0.weight"])


def test_the_network_that_trains_is_the_one_that_init_began(command, tmp_path):
    torch.manual_seed(99)
    file = tmp_path / "encoder.pt"
    torch.save({k: v + 1 if v.is_floating_point() else v for k, v in Tiny().state_dict().items()}, file)
    given = torch.load(file, weights_only=True)
    calls, out = command("--init", str(file), "--rounds", "2", "--batch-size", "8", "--micro-batch", "4")
    assert len(calls) == 4 and all(call["training"] for call in calls)          # also after labels were predicted
    for call in (calls[0], calls[2]):                                           # both rounds begin anew
        for key, value in given.items():
            assert torch.equal(call["state"]["backbone." + key], value), key
        assert all(torch.equal(x, calls[0]["state"][key]) for key, x in call["state"].items())
    assert not torch.equal(calls[0]["state"]["backbone.convs.0.weight"], final(out)["backbone.convs.0.weight"])
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert all(torch.equal(x, final(out, "train-hamuco-2")["backbone." + key]) for key, x in backbone.items())


def test_a_second_round_learns_what_the_first_predicts_of_each_moment(command):
    calls, out = command("--rounds", "2")
    model = HaMuCo(calls[0]["cfg"])
    model.load_state_dict(final(out))
    model.eval()
    rows = eight()
    with torch.no_grad():
        uv = [model.predict({k: rows[k][r:r + 1] for k in ("image", "view_ok", "cameras")})["interaction"]["uv"][0] for r in range(8)]
    assert [call["epoch"] for call in calls] == [0] * 8 and [call["step"] for call in calls] == [0, 0, 1, 1] * 2
    for call in calls[4:]:
        index = call["batch"]["index"]
        expected = torch.stack([uv[r] for r in index.tolist()])
        assert torch.allclose(call["batch"]["uv_label"], expected, atol=1e-2, equal_nan=True)
        assert (call["batch"]["confidence"] == 1).all()
        assert torch.equal(call["batch"]["image"], rows["image"][index])
    assert not torch.allclose(calls[0]["batch"]["uv_label"], torch.stack([uv[r] for r in calls[0]["batch"]["index"].tolist()]), atol=1)


def test_draws_differ_between_epochs_views_and_samples_and_agree_between_runs():
    cfg, ok = config(epochs=2), torch.ones(2, V, dtype=torch.bool)
    index = torch.tensor([3, 3 + 8])                                            # a sample, and its second time in an epoch
    view = hamuco.draw_view(index, V, L, cfg, 0)
    for name, x in view._asdict().items():
        flat = x.flatten(0, 1)
        assert len({tuple(row.flatten().tolist()) for row in flat}) == 2 * V, name
        assert torch.equal(x, getattr(hamuco.draw_view(index, V, L, cfg, 0), name))
        for other in (hamuco.draw_view(index, V, L, cfg, 1), hamuco.draw_view(index, V, L, dataclasses.replace(cfg, seed=6), 0)):
            assert not (getattr(other, name) == x).flatten(2).all(-1).any() if x.dim() > 2 else not (getattr(other, name) == x).any()
    keep = hamuco.draw_masks(index, ok, 16, cfg, 0).keep
    again = [hamuco.draw_masks(index, ok, 16, *more).keep for more in ((cfg, 1), (dataclasses.replace(cfg, seed=6), 0))]
    assert torch.equal(keep, hamuco.draw_masks(index, ok, 16, cfg, 0).keep)
    sheets = [keep[layer, b, v] for layer in range(3) for b in range(2) for v in range(V)] + [x[0, 0, 0] for x in again]
    for a, b in itertools.combinations(sheets, 2):                              # chance: 0.18 of the numbers differ
        assert 0.05 < float((a != b).double().mean()) < 0.4
    many, every = torch.arange(200), torch.ones(200, V, dtype=torch.bool)
    late = [hamuco.draw_masks(many, every, 1, cfg, epoch) for epoch in (2, 2, 3)]
    for part in ("see", "shared"):
        x, same, other = (getattr(draws, part) for draws in late)
        assert torch.equal(x, same) and not torch.equal(x, other) and not torch.equal(x[0], x[1])
        assert not (x == x[:, :1]).all()
    off_diagonal = late[0].see[0][:, 0, 1:].any(-1) != late[0].see[0][:, 1, [0, 2]].any(-1)
    assert not off_diagonal.any()                                               # one number of views a call for all
    assert not torch.equal(late[0].see[0][:, 0, 1], late[0].see[0][:, 1, 0])    # but each view draws whom


# ---- Prediction ----


@pytest.mark.parametrize("variant, data", [((), "synthetic"), (("single-view",), "synthetic"), (("no-dcvi",), "hanco")])
def test_what_predict_feeds_and_answers_is_what_the_step_saw_and_scored(exact, monkeypatch, variant, data):
    """Without augmentation and dropout, both in eval mode: the same crop, hands, places, fusion and units."""
    cfg = config(augment=0.0, variant=variant, data=(data,), supervision="truth3d")
    model, batch = trained(cfg).eval(), moments(0)
    draw, seen = hamuco.draw_view, []
    monkeypatch.setattr(hamuco, "draw_view", lambda *a: draw(*a)._replace(colour=torch.ones(2, V, 3)))
    monkeypatch.setattr(hamuco, "draw_masks", lambda index, ok, *more: hamuco.quiet(ok))
    for name in ("loss_2d", "loss_3d", "loss_d", "loss_cf"):
        term = getattr(hamuco, name)
        monkeypatch.setattr(hamuco, name, lambda *args, name=name, term=term: (seen.append((name, args)), term(*args))[1])
    model.backbone.register_forward_hook(lambda _, x, y: seen.append(("crops", x)))
    with torch.no_grad():
        hamuco.train_step(model, batch, cfg, 1, 1)
        step, seen[:] = list(seen), []
        out = model.predict({key: batch[key] for key in model.USES})
    (_, trained_on), (_, tested_on) = next(x for x in step if x[0] == "crops"), seen[0]
    assert torch.allclose(trained_on[0], tested_on[0], atol=1e-9)
    ok = batch["view_ok"]
    names = [name for name in ("single", "interaction") if name in out]
    assert set(out) == {*names, "fusion"} and len(names) == (1 if variant else 2)
    flat, solid = ([args for name, args in step if name == loss] for loss in ("loss_2d", "loss_3d"))
    for name, scored, placed in zip(names, flat, solid):
        A = common.crop(torch.full((1, 2), (L - 1) / 2), torch.tensor([L * 1.25 / 2.2]), S)         # 1.25 x the hand's box
        crop = common.transform(A, out[name]["uv"][ok])
        assert torch.allclose((crop + 0.5) / S * 2 - 1, scored[0][ok], atol=1e-9)
        assert torch.allclose(out[name]["joints"][ok] / 0.2, placed[0][ok], atol=1e-9)
        true = batch["uv"][ok]                                     # a prediction at the truth would have no loss
        known = true.isfinite().all(-1)
        assert torch.allclose(((common.transform(A, true) + 0.5) / S * 2 - 1)[known], scored[1][ok][known], atol=1e-9)
        assert (scored[2][ok] == known).all()
        metres = batch["joints"] - batch["joints"][:, :, 9:10]
        both = metres[ok].isfinite() & placed[1][ok].isfinite()
        assert both.any() and torch.allclose(metres[ok][both] / 0.2, placed[1][ok][both], atol=1e-9)
        assert out[name]["joints"][~ok].isnan().all() and out[name]["pose"].shape == (2, V, 16, 3, 3)
        hand = own_hand(data)
        verts, joints = hand(out[name]["pose"][ok], out[name]["shape"][ok])
        joints = hand.regress(verts) if data == "hanco" else joints
        assert torch.allclose(joints - joints[:, 9:10], out[name]["joints"][ok], atol=1e-9)
        assert torch.allclose(verts - joints[:, 9:10], out[name]["verts"][ok], atol=1e-9)
    if variant != ("single-view",):
        aligned = next(args for name, args in step if name == "loss_cf")[0]
        mean = (aligned * ok[:, None, :, None, None]).sum(2) / ok.sum(1)[:, None, None, None]
        assert torch.allclose(0.2 * mean[..., 778:, :][ok], out["fusion"]["joints"][ok], atol=1e-9)
        assert torch.allclose(0.2 * mean[..., :778, :][ok], out["fusion"]["verts"][ok], atol=1e-9)


# ---- What stands around them ----


def test_training_begins_with_an_upright_hand_in_its_mean_pose_whatever_the_picture(exact):
    """Zero last weights; palm to the camera, fingers up; no turn of a joint, no shape, s = 5, t = 0; graphs join nothing."""
    model = HaMuCo(config()).double()
    assert model.training and all(module.training for module in model.modules())
    for norm in model.backbone.norms:                       # the look at a black picture left no trace
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all() and norm.num_batches_tracked == 0
    for block in (*model.interaction.blocks, model.interaction):
        for conv in ((g := block.graph if hasattr(block, "graph") else block.fuse).first, g.second):
            assert torch.equal(conv.A.detach(), torch.eye(J))
    ok = torch.ones(2, V, dtype=torch.bool)
    for hand in model(torch.randn(2, V, 3, S, S), ok, hamuco.quiet(ok)):
        assert float(hand.theta.detach().abs().max()) < 1e-6 and (hand.beta == 0).all()
        assert torch.equal(hand.camera.detach(), torch.tensor([5.0, 0, 0]).expand(6, 3))
        wrist, tip = (hand.xyz[:, 778 + j].detach() for j in (0, 12))
        assert (tip[:, 1] < wrist[:, 1] - 0.5).all()        # the middle finger's tip is above the wrist, y down
        assert hand.uv[:, 778:].detach().abs().max() < 1.2
    assert HaMuCo.USES == {"image", "view_ok", "cameras"}


def test_values_of_the_authors_code_are_the_defaults():
    cfg = Config()
    assert (cfg.weight_decay, cfg.alpha, cfg.gamma, cfg.augment, cfg.micro_batch) == (0.01, 0.01, 100.0, 1.0, 8)
    assert hamuco.rig_of(cfg) == sources.Rig(8, 0.1, 1.25 / 2.2)
    assert hamuco.rig_of(dataclasses.replace(cfg, quick=True, views=4)) == sources.Rig(4, 0.2, 1.25 / 2.2)


def test_a_share_of_the_training_moments_lies_in_a_larger_one_and_tests_are_whole(monkeypatch):
    monkeypatch.setattr(hamuco, "open_data", lambda cfg, *more, **rig: Given(eight()))
    found = {share: hamuco.open_rig(config(data_fraction=share), "train", torch.device("cpu")) for share in (0.25, 0.6, 1.0)}
    rows = {share: set(map(float, data.targets(torch.arange(len(data)))["uv_label"][:, 0, 0, 0])) for share, data in found.items()}
    assert [len(x) for x in rows.values()] == [2, 5, 8] and rows[0.25] < rows[0.6] < rows[1.0]
    other = hamuco.open_rig(config(data_fraction=0.25, seed=9), "train", torch.device("cpu"))
    assert set(map(float, other.targets(torch.arange(2))["uv_label"][:, 0, 0, 0])) != rows[0.25]
    assert len(hamuco.open_rig(config(data_fraction=0.25), "test", torch.device("cpu"))) == 8


def test_no_epochs_leave_the_first_weights(command, tmp_path):
    torch.manual_seed(99)
    torch.save(Tiny().state_dict(), tmp_path / "encoder.pt")
    calls, out = command("--epochs", "0", "--init", str(tmp_path / "encoder.pt"))
    assert not calls
    kept = torch.load(out / "finetune.pt", weights_only=True)
    given = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert all(torch.equal(kept["model"]["backbone." + key], x) for key, x in given.items()) and kept["epoch"] == 0
    assert (kept["method"], kept["row"]) == ("hamuco", "hamuco") and (kept["model"]["heads.0.2.weight"] == 0).all()


def test_a_resumed_round_learns_the_labels_that_were_kept(command):
    calls, out = command("--rounds", "2")
    (out / "train-hamuco-2" / "last.pt").unlink()
    file = out / "train-hamuco" / "labels.pt"
    torch.save({"uv": torch.load(file, weights_only=True)["uv"] + 3}, file)
    again, _ = command("--rounds", "2", "--resume")
    assert len(again) == 4
    for old, new in zip(calls[4:], again):
        assert torch.allclose(new["batch"]["uv_label"], old["batch"]["uv_label"] + 3, equal_nan=True)
    assert all(torch.equal(x, again[0]["state"][key]) for key, x in calls[4]["state"].items())
    (out / "train-hamuco-2" / "last.pt").unlink()
    torch.save({"uv": torch.load(file, weights_only=True)["uv"][:5]}, file)
    with pytest.raises(common.UserError, match="holds labels of 5 moments, the data are 8"):
        command("--rounds", "2", "--resume")


def test_rows_of_labels_are_what_they_are_called(exact):
    """Tab. 3, top: plain and weighted DLT, RANSAC, and RANSAC refined; a placed hand is seen where its joints were."""
    batch = moments(0) | {"has": {"cameras": torch.ones(2, dtype=torch.bool)}, "crop": torch.eye(3).expand(2, V, 3, 3)}
    batch["uv_label"] = batch["uv"].nan_to_num() + torch.randn(2, V, J, 2)
    for key in ("cameras", "K", "uv_label"):
        batch[key][0, 1] = math.nan
    P = batch["K"] @ batch["cameras"][..., :3, :]
    uv, by_joint = batch["uv_label"].transpose(1, 2), P[:, None].expand(-1, J, -1, -1, -1)
    c = (batch["confidence"] * batch["view_ok"][..., None]).transpose(1, 2)
    there = batch["view_ok"][:, None].expand(-1, J, -1)
    plain, inliers = hamuco.ransac(uv, by_joint, there, limit=30 * S / 256)
    refined = hamuco.refine(plain, uv, by_joint, inliers, delta=2 * S / 256)
    expected = {"dlt": hamuco.triangulate(uv, by_joint, (c > 0).double()), "dlt_confidence": hamuco.triangulate(uv, by_joint, c),
                "ransac": plain, "ransac_huber": refined}
    rows = hamuco.label_rows(batch, S)
    assert list(rows) == ["labels", *expected] and rows["labels"]["uv"] is batch["uv_label"]
    prediction = {name: {"uv": batch["uv_label"], "joints": batch["joints"]} for name in ("single", "interaction", "fusion")}
    prediction["single"] = {"uv": torch.zeros(2, V, J, 2)}
    batch["scale"][1] = 1.0
    rows |= {"fusion": hamuco.place_fused(prediction, batch, S)["fusion_ransac"]}
    ok = batch["view_ok"]
    for name, X in (expected | {"fusion": refined}).items():
        for b, v in zip(*ok.nonzero().T.tolist()):
            M = batch["cameras"][b, v]
            x = X[b] @ M[:3, :3].T + M[:3, 3]
            assert torch.allclose(rows[name]["joints"][b, v], x, equal_nan=True, atol=1e-9), name
            assert torch.allclose(rows[name]["root"][b, v], x[0], equal_nan=True, atol=1e-9), name
            seen = x / x[:, 2:] @ batch["K"][b, v].T
            assert torch.allclose(rows[name]["uv"][b, v], seen[:, :2], equal_nan=True, atol=1e-6), name
    assert not torch.allclose(expected["dlt"][1], expected["dlt_confidence"][1]) and not torch.allclose(plain[1], refined[1])


def test_a_network_that_was_judged_before_trains_in_training_mode(monkeypatch, tmp_path):
    cfg, record = config(epochs=1, mask_epochs=0), Recorder(monkeypatch)
    model = HaMuCo(cfg).eval()
    before = model.backbone.norms[0].running_mean.clone()
    hamuco.train(cfg, tmp_path, model, Given(eight()), torch.device("cpu"), None)
    assert len(record.calls) == 4 and all(call["training"] for call in record.calls)
    assert not torch.equal(model.backbone.norms[0].running_mean, before)
