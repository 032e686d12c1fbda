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
from hamuco import Config, HaMuCo
from hand.builtin import builtin_hand

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
    monkeypatch.setattr(hamuco, "build_backbone", lambda name, size: Tiny())
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
        last.bias.data[-3] = 2.5
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
        return {v: there for v in there}, there
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
            assert a is None and (b is None or not b.any()) or b is None and not a.any(), name
            continue
        assert float((a - b).abs().max()) <= 1e-7 * max(float(b.abs().max()), 1e-6), name
    parts = ["backbone.convs.0.weight", "backbone.norms.3.bias", "heads.0.0.weight", "heads.1.2.bias", "heads.2.2.weight"]
    if model.interaction is not None:
        parts += [f"interaction.{part}" for part in (
            "G1.0.weight", "G2.0.weight", "blocks.0.attention.k.weight", "blocks.1.graph.first.A", "fuse.second.fc.bias",
            "F_r.2.weight") if f"interaction.{part}" in wanted]
    assert all(wanted[name].grad.abs().max() > 1e-8 for name in parts)
