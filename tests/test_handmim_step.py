"""HandMIM's training, pinned from outside: each step against the paper's equations typed out sample by
sample, each loop against a hand-written optimiser, and prediction against training.

The oracles use MANO's layer, `warp`, the draws and the photometric functions of common, and the network's
own weights; they call none of the script's views, losses or steps. "Sec. 3.1" and the like are the paper's.
"""
import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import handmim
from common import Mano, axis_angle_to_matrix, blur, jitter_colour, normal, solarise, to_grey, uniform, warp
from hand.builtin import builtin_hand
from handmim import Config, HandMIM, HandNet, finetune_step, pretrain_step

EXACT = torch.float64
CPU = torch.device("cpu")
S, STORED, D = 32, 48, 32                           # network's side, stored side; 4 x 4 patches of 8 px, D numbers
TINY = dict(backbone="vit_mini", image_size=S, prototypes=12, head_hidden=8, decoder_width=2, drop_path=0.5,
            batch_size=4, micro_batch=2, seed=3)
MEAN, STD = (torch.tensor(x, dtype=EXACT).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(autouse=True)
def tiny_and_double(monkeypatch):
    """Float64, also of the draws, and a vit_mini of 32 numbers a token instead of 128."""
    monkeypatch.setitem(common._VITS, "vit_mini", (8, D, 4, 4))
    monkeypatch.setattr(handmim, "uniform", lambda *given: uniform(*given).double())
    monkeypatch.setattr(handmim, "normal", lambda *given: normal(*given).double())
    torch.set_default_dtype(EXACT)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, expected, name, rel=1e-6):
    """Equal but for rounding, as a share of the largest number expected; pictures are float32, MANO too."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    scale = max(float(expected.abs().max()), 1e-9)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    assert float((found - expected).abs().max()) < rel * scale, (name, float((found - expected).abs().max()), scale)


def same_weights(found, expected, step, rel):
    """Two state dicts, but for the attention's key bias: softmax forgets it, so Adam moves it by rounding."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        keys = slice(D, 2 * D) if name.endswith("qkv.bias") else slice(0, 0)
        one, other = found[name].clone(), value.detach().clone()
        one[keys], other[keys] = 0, 0
        close(one, other, f"{name} after step {step}", rel)


def same_gradients(model, loss, oracle, rel=1e-4):
    """Every parameter: the accumulated gradient that stands in `model` against that of the oracle's loss."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(oracle, list(trained.values()), allow_unused=True)))
    close(loss, oracle.detach(), "loss")
    whole = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, p in trained.items():
        if expected[name] is None or float(expected[name].abs().max()) < 1e-9 * whole:   # also the qkv's key bias
            assert p.grad is None or float(p.grad.abs().max()) < 1e-6 * whole, name
        else:
            keys = slice(D, 2 * D) if name.endswith("qkv.bias") else slice(0, 0)         # softmax forgets them
            p.grad[keys], expected[name][keys] = 0, 0
            close(p.grad, expected[name], name, rel)
    return {n for n, g in expected.items() if g is not None}


# ---- Pre-training: the step


def draw(i, n, purpose, epoch, view=0):
    """The n numbers of a sample's stream, in double precision."""
    return uniform(torch.tensor([i]), n, TINY["seed"], purpose, epoch, view)[0].double()


def turned(angle):
    """R: counter-clockwise on the screen, where y points down, as a matrix for columns."""
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def one_view(image, i, v, epoch, ibot, how):
    """Sec. 3.1: crop, rotation, then jitter, grey, blur, solarisation -> picture (3, S, S), angle, gamma, (a, b)."""
    square, middle_px = STORED * 1.2 / 1.7, (STORED - 1) / 2
    A = torch.eye(3)
    if ibot:                                             # area U(0.14, 1), aspect 3/4 to 4/3, a coin flips
        area, aspect, x, y, coin = draw(i, 5, "ibot view", epoch, v).tolist()
        area, ratio = 0.14 + 0.86 * area, (3 / 4) ** (1 - 2 * aspect)
        sides = [min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))]
        angle, gamma, shift = 0.0, 1.0, torch.zeros(2)
        for axis, (side, u) in enumerate(zip(sides, (x, y))):
            zoom = S / (square * side)
            A[axis, axis] = zoom
            A[axis, 2] = (S - 1) / 2 - zoom * (middle_px + square * (u - 0.5) * (1 - side))
        if coin < 0.5:
            A = torch.tensor([[-1.0, 0, S - 1], [0, 1, 0], [0, 0, 1]]) @ A
    else:                                                # Sec. 3.1: "(0.08, 1)", "(0, 150 degrees)"
        area, x, y, turn = draw(i, 4, "handmim view", epoch, v).tolist()
        side = math.sqrt(0.08 + 0.92 * area)
        angle = math.radians(150) * (2 * turn - 1 if "symmetric" in how else turn)
        middle = torch.tensor([x - 0.5, y - 0.5]) * (1 - side)          # of the crop, in squares
        gamma, shift = 1 / side, middle / side                          # Eq. 3: gamma p - (a, b)
        R, zoom = turned(angle), S / (square * side)
        A[:2, :2] = zoom * R
        A[:2, 2] = (S - 1) / 2 - zoom * R @ (middle_px + square * middle)
    picture = warp(image[None].double(), A[None], S) / 255
    jittered, *strength, grey, soft, sigma, solar = draw(i, 9, "handmim colour", epoch, v).tolist()
    factors = torch.tensor([1.0, 1, 1, 0])
    if jittered < 0.8:
        factors += torch.tensor([0.4, 0.4, 0.2, 0.1]) * (2 * torch.tensor(strength) - 1)
    picture = to_grey(jitter_colour(picture, factors[None]), torch.tensor([grey < 0.2]))
    softened = soft < (1.0, 0.1)[v]                                      # blur nearly always in the first view
    sigma = (0.1 + 1.9 * sigma) * S / 224 * softened
    picture = blur(picture, torch.tensor([sigma]), reach=math.ceil(6 * S / 224))
    picture = solarise(picture, torch.tensor([v == 1 and solar < 0.2]))
    return (picture[0] - MEAN) / STD, angle, gamma, shift


def one_mask(i, v, epoch, ibot, how):
    """Sec. 3.1: r in [0.1, 0.5]; rectangles as BEiT's, at least (4 // 3)^2 = 1 patch of the 16; (16,) bool."""
    share, coin = draw(i, 2, "handmim mask", epoch, v).tolist()
    ratio = 0.1 + 0.4 * share
    if ibot and coin >= 0.5:
        ratio = 0.0
    if "random-mask" in how:
        order = draw(i, 16, "handmim patches", epoch, v).argsort().tolist()
        return torch.tensor([patch in order[:math.floor(16 * ratio)] for patch in range(16)])
    hidden, left, failures = set(), 16 * ratio, 0
    for u, aspect, x, y in draw(i, 384, "handmim blocks", epoch, v).view(96, 4).tolist():
        if failures == 10:
            break
        area, aspect = max(0.0, 1 + u * (left - 1)), 0.3 ** (1 - 2 * aspect)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, start = math.floor(y * (4 - h + 1)), math.floor(x * (4 - w + 1))
        new = {4 * row + column for row in range(top, top + h) for column in range(start, start + w)} - hidden
        good = h < 4 and w < 4 and 0 < len(new) <= left
        failures = 0 if good else failures + 1
        hidden, left = (hidden | new, left - len(new)) if good else (hidden, left)
    return torch.tensor([patch in hidden for patch in range(16)])


def attention_block(block, x, keep):
    """Eq. 1 and the inverted bottleneck, pre-norm, for tokens (17, D) in 4 heads; `keep` scales the branches."""
    qkv = block.attn.qkv(F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, 1e-6))
    heads = []
    for h in range(4):
        q, k, v = (qkv[:, D * part + 8 * h:D * part + 8 * h + 8] for part in range(3))
        heads.append((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
    x = x + keep[0] * block.attn.proj(torch.cat(heads, 1))
    normed = F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, 1e-6)
    return x + keep[1] * block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))


def encode(vit, picture, hidden=None, mask_token=None, keep=None):
    """Tokens (17, D) of a picture after the last norm, and every block's output; Sec. 2.1 puts p_mask in."""
    patches = picture.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, 192)
    x = patches @ vit.patch_embed.proj.weight.reshape(D, 192).mT + vit.patch_embed.proj.bias
    if hidden is not None:
        x = torch.stack([mask_token[0] if hidden[n] else x[n] for n in range(16)])
    x, outputs = torch.cat([vit.cls_token[0], x]) + vit.pos_embed[0], []
    for k, block in enumerate(vit.blocks):
        x = attention_block(block, x, (1.0, 1.0) if keep is None else keep[k])
        outputs.append(x)
    return F.layer_norm(x, (D,), vit.norm.weight, vit.norm.bias, 1e-6), outputs


def latent(head, token):
    """Sec. 3.1: the shared MLP."""
    a, b, c = head.mlp[0], head.mlp[2], head.mlp[4]
    return F.gelu(F.gelu(token @ a.weight.mT + a.bias) @ b.weight.mT + b.bias) @ c.weight.mT + c.bias


def scores(head, z, how):
    """Logits of a latent (256,): cosines with prototypes times their norms; or readings A and C."""
    if "reading-c" in how:
        return z.view(128, 2).mT                                                     # (2, 128)
    if "reading-a" in how:
        return z
    last = head.last_layer
    directions = last.weight_v / last.weight_v.norm(dim=1, keepdim=True)
    return last.weight_g[:, 0] * (directions @ (z / z.norm()))


def undone(z, angle, gamma, shift, how):
    """Eq. 4 on 128 pseudo points: R^-1 first, then + (a, b) in units of the points' range, then / gamma."""
    if "no-alignment" in how:
        return z
    back = z.view(128, 2) @ turned(-angle).mT
    if "rotation-only" in how:
        return back.flatten()
    unit = 1.0 if "unscaled-shift" in how else (back.max(0).values - back.min(0).values).detach()
    return ((back + shift * unit) / gamma).flatten()


def decode(decoder, taps):
    """Eq. 8 as printed: enlarge L^i to T^i's size, concatenate, linear layer, transposed convolution."""
    T = torch.zeros(1, 0, 4, 4)
    for k, (L, fuse, up) in enumerate(zip(taps, decoder.fuse, decoder.up)):
        L = L[1:].mT.reshape(1, D, 4, 4).repeat_interleave(2 ** k, 2).repeat_interleave(2 ** k, 3)
        x = torch.cat([T, L], 1).permute(0, 2, 3, 1) @ fuse.weight.mT + fuse.bias
        T = up(F.gelu(x).permute(0, 3, 1, 2))
    return T[0]


def cross_entropy(student, teacher, centre, tau):
    """- sum P_t log P_s with P_t = softmax((t - c) / tau) and P_s = softmax(s / 0.1); reading C: mean of axes."""
    p = ((teacher - centre) / tau).softmax(-1).detach()
    return -(p * (student / 0.1).log_softmax(-1)).sum(-1).mean()


def pretraining_oracle(model, batch, epoch, objective, how):
    """Eq. 5 to 10 of one micro-batch, sample by sample, view by view."""
    ibot = objective == "ibot" and "our-views" not in how
    tau = 0.04 + 0.03 * min(1, epoch / 29)                          # iBOT: 0.04 to 0.07 in 30 epochs
    undo_how = {"no-alignment"} if objective == "ibot" else how
    times, B = 2 if "summed" in how else 1, len(batch["index"])
    pose, patch, recon, centre, centre_patch, answers = 0, 0, 0, [], [], []
    for image, i in zip(batch["image"], batch["index"].tolist()):
        U, V = {}, {}                                               # logits of teacher and student, by view
        for v in (0, 1):
            x, angle, gamma, shift = one_view(image, i, v, epoch, ibot, how)
            hidden = one_mask(i, v, epoch, ibot, how)
            chance = torch.linspace(0, 0.5, 4)[:, None]             # stochastic depth: 0 to the given 0.5
            keep = (draw(i, 8, "handmim depth", epoch, v).view(4, 2) >= chance) / (1 - chance)
            student, outputs = encode(model.student.backbone, x, hidden, model.masked_embed, keep)
            with torch.no_grad():
                teacher, _ = encode(model.teacher.backbone, x)      # Eq. 5: it sees the whole view
                zs = latent(model.teacher.head, teacher)
                U[v] = scores(model.teacher.head, undone(zs[0], angle, gamma, shift, undo_how), how)
                patches = [scores(model.teacher.head, z, how) for z in zs[1:]]
            z = latent(model.student.head, student[0])
            V[v] = scores(model.student.head, undone(z, angle, gamma, shift, undo_how), how)
            places = hidden.nonzero()[:, 0].tolist()
            for n in places:                                        # Eq. 7: the same view, the hidden patches
                own = scores(model.student.head, latent(model.student.head, student[1 + n]), how)
                patch = patch + cross_entropy(own, patches[n], model.centre_patch, tau) / len(places) / (2 * B)
            if model.decoder:
                order = [outputs[0], outputs[2], outputs[3]]        # of 4 blocks, evenly spaced: 1.33, 2.67, 4
                T = decode(model.decoder, order[::-1] if "deep-first" in how else order)
                on = hidden.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
                recon = recon + (T - x).abs()[:, on].mean() / (2 * B) if places else recon       # Eq. 9
            centre.append(U[v])
            centre_patch += patches
            answers.append(((U[v] - model.centre) / tau).softmax(-1))
        for v in (0, 1):                                            # Eq. 6: across the views
            pose = pose + cross_entropy(V[v], U[1 - v], model.centre, tau) / (2 * B)
    def entropy(p):
        return -(p * p.log()).nan_to_num().sum(-1).mean()
    apart = torch.stack(centre) - torch.stack(centre).mean(0)       # view 0, view 1, view 0, ...
    terms = {"L_pose": times * pose, "L_patch": times * torch.as_tensor(patch), "L_recon": torch.as_tensor(recon),
             "entropy": entropy(torch.stack(answers)), "entropy_mean": entropy(torch.stack(answers).mean(0)),
             "agreement": 2 * (apart[::2] * apart[1::2]).sum() / (apart ** 2).sum(),
             "centre": torch.stack(centre).mean(0), "centre_patch": torch.stack(centre_patch).mean(0)}
    kept = [terms[f"L_{name}"] for name in ("pose", "patch", "recon") if f"no-{name}" not in how]
    return {"loss": sum(kept)} | terms                              # Eq. 10


def pictures(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    rough = torch.rand(n, 3, 12, 12, generator=g)
    return (255 * F.interpolate(rough, size=STORED, mode="bilinear")).to(torch.uint8)


def awake_model(objective, how):
    """A HandMIM in which nothing is at its first value: masked token, prototypes' norms, teacher, centres."""
    torch.manual_seed(1)
    model = HandMIM(Config(**TINY, objective=objective, variant=how))
    with torch.no_grad():
        model.masked_embed.normal_(0, 0.3)
        for network in (model.student, model.teacher):
            for p in network.parameters():
                p.add_(0.05 * torch.randn_like(p))
            for layer in network.head.mlp[::2]:
                layer.weight.mul_(10)                               # latents of all sizes, logits that differ
        model.centre.normal_(0, 0.1)
        model.centre_patch.normal_(0, 0.1)
    return model


STEPS = [("handmim", ()), ("handmim", ("reading-a", "symmetric")), ("handmim", ("reading-c", "no-patch")),
         ("handmim", ("no-alignment", "summed", "deep-first")), ("handmim", ("rotation-only", "no-pose")),
         ("handmim", ("unscaled-shift", "random-mask", "no-recon")), ("ibot", ()), ("ibot", ("our-views", "summed"))]


@pytest.mark.parametrize("objective, how", STEPS)
def test_pretraining_step_is_the_paper_s_typed_out(objective, how):
    """Every term, the sum, every gradient, both centres and monitors, over two unlike micro-batches."""
    model, epoch = awake_model(objective, how), 17
    cfg, total, whole = model.cfg, 0, 0
    for rows, seed in (([5, 100_003], 1), ([31, 2], 2)):
        batch = {"image": pictures(2, seed), "index": torch.tensor(rows)}
        terms = pretrain_step(model, batch, cfg, epoch)
        (terms["loss"] / 2).backward()
        expected = pretraining_oracle(model, batch, epoch, objective, how)
        left_out = {"L_pose": "no-pose", "L_patch": "no-patch", "centre_patch": "no-patch"}
        for name, value in expected.items():
            if left_out.get(name) not in how:
                close(terms[name].detach(), value.detach(), name, 1e-5)
        total, whole = total + float(terms["loss"].detach()) / 2, whole + expected["loss"] / 2
    reached = same_gradients(model, total, whole)
    parts = {"masked_embed", "student.backbone.patch_embed.proj.weight", "student.backbone.cls_token",
             "student.backbone.pos_embed", "student.backbone.blocks.3.mlp.fc2.weight", "student.head.mlp.0.weight"}
    parts |= {"decoder.fuse.0.weight", "decoder.up.2.weight"} if model.decoder else set()
    parts |= {"student.head.last_layer.weight_g"} if not {"reading-a", "reading-c"} & set(how) else set()
    assert parts <= reached and all(p.grad is None for p in model.teacher.parameters())


# ---- Pre-training: the loop


class Few:
    """A source of a few samples in memory."""

    box_source = "none"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples["image"])

    def batch(self, rows, device=CPU):
        take = lambda x: {k: take(v) for k, v in x.items()} if isinstance(x, dict) else x[rows % len(self)]
        return {k: take(v) for k, v in self.samples.items()}

    def batches(self, plan, device, workers):
        for rows in plan:
            yield self.batch(rows)


class HandAdamW:
    """AdamW typed from its paper: betas 0.9 and 0.999, epsilon 1e-8, decay apart from the gradient."""

    def __init__(self):
        self.state = {}

    def step(self, name, p, g, rate, decay):
        t, m, v = self.state.get(name, (0, 0, 0))
        t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.state[name] = t, m, v
        p -= rate * decay * p
        p -= rate * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)


class Around(torch.nn.Module):
    """What `parallel` may put around a network: gradients cross processes only if steps call this."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.calls = model, 0

    def forward(self, *given):
        self.calls += 1
        return self._orig_mod(*given)


def watch(monkeypatch, step_name, stop):
    """Record every step of a command's loop: modes of all modules, then weights, rate and logged terms.

    Gradients cross processes at the last micro-batch of a step: `accumulate` is told which that is.
    """
    modes, after, rates, logged, lasts = [], [], [], [], []
    step, advance = getattr(handmim, step_name), handmim.Run.advance
    monkeypatch.setattr(handmim, "accumulate", lambda net, last: lasts.append(last) or contextlib.nullcontext())

    def seen(net, *more):
        modes.append({module.training for module in common.unwrapped(net).modules()})
        found = step(net, *more)
        assert net.calls == len(modes), "the network is called past what stands around it"
        return found

    def noted(run, terms, epoch, lr, may_save):
        assert all(p.grad is None for p in run.model.parameters()), "gradients of this step go into the next"
        assert lasts[-2:] == [False, True] and len(lasts) == 2 * (run.step + 1)
        assert may_save == (run.step % 2 == 0), "the end of an epoch saves by itself"
        after.append({k: v.clone() for k, v in run.model.state_dict().items()})
        rates.append(lr)
        logged.append({k: float(v) for k, v in terms.items()})
        advance(run, terms, epoch, lr, may_save)
        if run.step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(handmim, "parallel", lambda model, device, compile: Around(model))
    monkeypatch.setattr(handmim, step_name, seen)
    monkeypatch.setattr(handmim.Run, "advance", noted)
    return modes, after, rates, logged


def first_weights(path):
    """A ViT of its own seed, in a file for --init."""
    torch.manual_seed(99)
    vit = common.build_backbone("vit_mini", S)
    torch.save(vit.state_dict(), path)
    return vit.state_dict()


def half_cosine(k, n, first, last):
    return last + (first - last) * (1 + math.cos(math.pi * k / n)) / 2


SIZES = ["--backbone", "vit_mini", "--image-size", str(S), "--batch-size", "4", "--micro-batch", "2", "--workers", "0",
         "--device", "cpu", "--seed", "3", "--out", "run"]


def test_pretraining_loop_is_adamw_ema_and_centres_by_hand(monkeypatch, tmp_path):
    """Five steps of 20: warm-up over 3, prototypes still for 2, a probe after 4, gradients clipped."""
    monkeypatch.chdir(tmp_path)
    init = first_weights("init.pt")
    data, opened = Few({"image": pictures(8)}), []
    monkeypatch.setattr(handmim, "open_data", lambda cfg, *given, **more: opened.append((*given, more)) or data)
    monkeypatch.setattr(handmim, "draw_pretraining", lambda *given: None)
    monkeypatch.setattr(handmim, "CLIP", 0.05)
    probed = []
    monkeypatch.setattr(handmim, "probe_error", lambda model, *more: probed.append(model.eval()) or 1.0)
    modes, after, rates, logged = watch(monkeypatch, "pretrain_step", stop=5)
    with pytest.raises(KeyboardInterrupt):
        handmim.main(["--data", "synthetic", "--epochs", "10", *SIZES, "--lr", "2.56", "--warmup-epochs", "1.5",
                      "--weight-decay", "4.0", "--teacher-momentum", "0.98", "--probe-every", "2", "--drop-path", "0.5",
                      "--prototypes", "12", "--head-hidden", "8", "--decoder-width", "2", "--init", "init.pt"])
    assert modes == [{True}] * 10 and len(probed) == 1
    assert opened == [(("synthetic",), "train", 48, 1.7, CPU, {})]          # 1.5 x 32 px, 1.2 x sqrt(2) boxes
    epochs = [json.loads(line) for line in Path("run/pretrain-handmim/log.jsonl").read_text().splitlines() if "loss" not in line][1:]
    assert epochs == [{"epoch": 1}, {"epoch": 2, "probe_mpjpe_mm": 1.0}]

    torch.manual_seed(3)
    model = HandMIM(Config(**TINY))
    model.student.backbone.load_state_dict(init)
    model.teacher.load_state_dict(model.student.state_dict())       # --init is in both
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert {n for n, _ in model.named_buffers()} == {"centre", "centre_patch"}
    adam, clipped = HandAdamW(), set()
    for step in range(5):
        epoch = step // 2
        order = common.permutation(8, 3, epoch)[4 * (step % 2):4 * (step % 2) + 4]
        sums = {}
        for rows in order.view(2, 2):                               # two micro-batches of two
            terms = pretrain_step(model, data.batch(rows) | {"index": rows}, model.cfg, epoch)
            (terms["loss"] / 2).backward()
            sums = {k: sums.get(k, 0) + v.detach() / 2 for k, v in terms.items()}
        rate = (0, 0.005, 0.01)[step] if step < 3 else half_cosine(step - 3, 17, 0.01, 1e-6)     # 2.56 x 4 / 1,024
        decay = half_cosine(step, 20, 0.4, 4.0)                     # from a tenth of the given 4
        momentum = half_cosine(step, 20, 0.98, 1.0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is None or ("last_layer" in name and step < 2):
                    continue
                norm = float(p.grad.norm())
                clipped |= {name} if norm > 0.05 else set()
                g = p.grad * min(1.0, 0.05 / (norm + 1e-6))
                adam.step(name, p, g, rate, decay if p.ndim > 1 else 0.0)
            student = dict(model.student.named_parameters())
            for name, p in model.teacher.named_parameters():
                p.copy_(momentum * p + (1 - momentum) * student[name])
            for name in ("centre", "centre_patch"):                 # 25 times as fast as the teacher's first steps
                getattr(model, name).lerp_(sums[name], 0.5)
        model.zero_grad(set_to_none=True)
        assert rates[step] == pytest.approx(rate, abs=1e-12)
        same_weights(after[step], model.state_dict(), step, 1e-6)
        shown = {k: v for k, v in sums.items() if not k.startswith("centre")}
        assert logged[step] == pytest.approx({k: float(v) for k, v in shown.items()}, rel=1e-6)
    assert 5 < len(clipped) < len(adam.state), "clipping by each tensor's own norm must show"
    assert not torch.equal(after[1]["student.head.mlp.0.weight"], after[0]["student.head.mlp.0.weight"])
    assert torch.equal(after[1]["student.head.last_layer.weight_v"], after[0]["student.head.last_layer.weight_v"])


# ---- Fine-tuning: the step


def labelled(n, seed):
    """Hands before a camera of their own, every label known."""
    torch.manual_seed(seed)
    pose, shape = 0.3 * torch.randn(n, 48), 0.5 * torch.randn(n, 10)
    R = axis_angle_to_matrix(pose.unflatten(-1, (16, 3)))
    away = torch.tensor([[0.02, -0.01, 0.7]]) + 0.05 * torch.randn(n, 3)
    verts, joints = (x.double() for x in Mano(builtin_hand())(R, shape, away))
    K = torch.tensor([[100.0, 0, 24], [0, 110, 23], [0, 0, 1]]).repeat(n, 1, 1)
    yes = torch.ones(n, dtype=torch.bool)
    return {"image": pictures(n, seed), "joints": joints, "verts": verts, "joints_ok": yes[:, None].repeat(1, 21),
            "pose": pose, "shape": shape, "K": K, "uv": common.project(joints, K),
            "has": {k: yes.clone() for k in ("pose", "joints", "shape", "verts", "K", "uv")}}


def forget(batch, row, *keys):
    """Take labels away from one sample, as readers do: NaN in the numbers, False in `has`."""
    for key in keys:
        batch[key][row] = math.nan
        batch["has"][key][row] = False
    if "joints" in keys:
        batch["joints_ok"][row] = False


def two_unlike_batches():
    """Six hands: whole; without pose and K; without wrist; without shape and mesh; without joints, uv; a few."""
    first, second = labelled(3, 5), labelled(3, 6)
    forget(first, 1, "pose", "K")
    first["joints"][2, 0], first["joints_ok"][2, 0] = math.nan, False
    forget(second, 0, "shape", "verts")
    forget(second, 1, "joints", "uv", "verts")
    second["joints"][2, 5:9], second["joints_ok"][2, 5:9] = math.nan, False
    second["uv"][2, 3:12] = math.nan
    first["side"], second["side"] = ["right", "left", "right"], ["left", "left", "right"]
    return [first | {"index": torch.tensor([4, 700_001, 11])}, second | {"index": torch.tensor([0, 9, 77])}]


def awake_hand(data="synthetic", how=()):
    """A HandNet whose rectifiers do something, starting from no special hand."""
    torch.manual_seed(2)
    net = HandNet(Config(**TINY, finetune=data, variant=how, mano="builtin"))
    with torch.no_grad():
        for rectifier in net.rectifiers:
            rectifier.mlp[-1].weight.normal_(0, 0.02)
            rectifier.mlp[-1].bias.normal_(0, 0.02)
        for p in net.backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
        net.start.add_(0.05 * torch.randn_like(net.start))
    return net


def read_map(tokens, uv, how):
    """Bilinear reading of 4 x 4 patches (16, D) at pixels (21, 2): patch k is centred on pixel 8 k + 3.5."""
    rows = []
    for u in uv.tolist():
        if "pymaf-sampler" in how:                       # aligned corners: u / 16 - 1 in -1 .. 1 is 0 .. 3; 0 outside
            x, y = (3 * value / 32 for value in u)
        else:
            x, y = (min(max((value + 0.5) / 8 - 0.5, 0.0), 3.0) for value in u)
        row = 0
        for a in (math.floor(x), math.floor(x) + 1):
            for b in (math.floor(y), math.floor(y) + 1):
                if 0 <= a < 4 and 0 <= b < 4:
                    row = row + max(0.0, 1 - abs(x - a)) * max(0.0, 1 - abs(y - b)) * tokens[4 * b + a]
        rows.append(row + torch.zeros(tokens.shape[1]))
    return torch.stack(rows)                             # (21, D)


def rectified(rectifier, sampled, token, state, how):
    """PyMAF's feedback (11): three layers for each point, channel by channel, then three for the state."""
    a, b, c = rectifier.points.layers
    y = F.leaky_relu(sampled @ a.weight.mT + a.bias)
    y = F.leaky_relu(torch.cat([y, sampled], 1) @ b.weight.mT + b.bias)
    y = F.relu(torch.cat([y, sampled], 1) @ c.weight.mT + c.bias)
    act = (lambda x: x) if "linear-rectifiers" in how else F.relu
    a, b, c = rectifier.mlp[0], rectifier.mlp[2], rectifier.mlp[4]
    x = act(torch.cat([y.mT.flatten(), token, state]) @ a.weight.mT + a.bias)
    return act(x @ b.weight.mT + b.bias) @ c.weight.mT + c.bias


def made_flesh(state, K, mano, regressed):
    """State (109,) -> R, beta, t, verts, joints rooted, uv, and the chain's joints seen by the rectifiers (12)."""
    six = state[:96].view(16, 3, 2)
    x = six[..., 0] / six[..., 0].norm(dim=1, keepdim=True)
    y = six[..., 1] - (x * six[..., 1]).sum(1, keepdim=True) * x
    y = y / y.norm(dim=1, keepdim=True)
    R = torch.stack([x, y, torch.linalg.cross(x, y)], -1)
    focal = (K[0, 0] * K[1, 1] - K[0, 1] * K[1, 0]).abs().sqrt()
    depth = focal / (16 * 10 * state[106].exp())         # half a crop is 16 px; a metre spans 10 e^s of them
    pixel = torch.cat([15.5 + 16 * state[107:], torch.ones(1)])
    t = depth * torch.linalg.solve(K, pixel)
    verts, chain = (x[0].double() for x in mano(R[None], state[None, 96:106]))
    joints = mano.regress(verts[None])[0].double() if regressed else chain
    def seen(points):
        places = (points - points[0] + t) @ K.mT
        return places[:, :2] / places[:, 2:]
    return R, state[96:106], t, verts - joints[0], joints - joints[0], seen(joints), seen(chain)


def skew_exp(v):
    """The rotation of an axis-angle vector, by its matrix exponential."""
    x, y, z = v.tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def finetuning_oracle(net, batch, epoch, data, how):
    """Eq. 11 and 12 of one micro-batch, hand by hand, over the three outputs; weights as in (13)."""
    mano, regressed = Mano(builtin_hand(), "freihand" if data == "freihand" else "smplx"), data == "freihand"
    errors = {name: [] for name in ("theta", "beta", "t", "vert", "3d", "2d")}
    for b, i in enumerate(batch["index"].tolist()):
        coin, *moved = draw(i, 3, "handmim crop", epoch).tolist()
        grown, spun = normal(torch.tensor([i]), 2, 3, "handmim crop size and angle", epoch)[0].tolist()
        width = STORED * 1.2 / 2.2 * (1 + 0.25 * max(-1, min(1, grown)))
        angle = math.radians(30) * max(-2, min(2, spun)) * (coin < 0.6)
        middle = (STORED - 1) / 2 + 0.1 * width * (torch.tensor(moved) - 0.5)
        A, Rz = torch.eye(3), torch.eye(3)
        A[:2, :2] = S / width * turned(angle)
        A[:2, 2] = (S - 1) / 2 - A[:2, :2] @ middle
        Rz[:2, :2] = turned(angle)
        factors = torch.tensor([1.0, 1, 1, 0]) + torch.tensor([0.2, 0.2, 0.2, 0.05]) * (
            2 * draw(i, 4, "handmim hand colour", epoch) - 1)
        x = jitter_colour(warp(batch["image"][b][None].double(), A[None], S) / 255, factors[None])[0]
        K = batch["K"][b]
        if not K.isfinite().all():                       # as if the focal length were the stored diagonal
            f, c = math.sqrt(2) * STORED, (STORED - 1) / 2
            K = torch.tensor([[f, 0, c], [0, f, c], [0, 0, 1]])
        K = A @ K @ Rz.T
        tokens, state = encode(net.backbone, (x - MEAN) / STD)[0], net.start
        R_true = torch.stack([skew_exp(v) for v in batch["pose"][b].nan_to_num().view(16, 3)])
        R_true[0] = Rz @ R_true[0]
        joints, verts = batch["joints"][b] @ Rz.T, batch["verts"][b] @ Rz.T
        uv = batch["uv"][b] @ A[:2, :2].T + A[:2, 2]
        wrist = bool(batch["joints_ok"][b, 0])
        for rectifier in net.rectifiers:
            state = state.detach()
            where = made_flesh(state, K, mano, regressed)[-1].clamp(-16, 48).detach()
            state = state + rectified(rectifier, read_map(tokens[1:], where, how), tokens[0], state, how)
            R, beta, t, mesh, points, pixels, _ = made_flesh(state, K, mano, regressed)
            if batch["has"]["pose"][b]:
                errors["theta"].append(((R - R_true) ** 2).sum() / 16)
            if batch["has"]["shape"][b]:
                errors["beta"].append(((beta - batch["shape"][b]) ** 2).sum() / 10)
            if wrist and batch["has"]["K"][b]:
                errors["t"].append(((t - joints[0]) ** 2).sum())
            if wrist and batch["has"]["verts"][b]:
                errors["vert"] += (mesh - (verts - joints[0])).abs().sum(1)
            if wrist:
                errors["3d"] += [(points[j] - (joints[j] - joints[0])).abs().sum() for j in range(21)
                                 if batch["joints_ok"][b, j]]
            errors["2d"] += [(pixels[j] - uv[j]).abs().sum() / 16 for j in range(21) if uv[j].isfinite().all()]
    mean = {name: sum(found) / len(found) for name, found in errors.items()}
    terms = {"L_theta": mean["theta"], "L_beta": mean["beta"], "L_t": mean["t"], "L_vert": 10 * mean["vert"],
             "L_3d": 10 * mean["3d"], "L_2d": mean["2d"]}
    loss = (terms["L_theta"] + 0.01 * terms["L_beta"] + 10 * terms["L_t"] + terms["L_vert"] + terms["L_3d"]
            + terms["L_2d"])
    return {"loss": loss} | terms


@pytest.mark.parametrize("data, how, frozen", [("synthetic", (), 0), ("freihand", (), 2),
                                               ("synthetic", ("linear-rectifiers", "pymaf-sampler"), 0)])
def test_finetuning_step_is_the_paper_s_typed_out(data, how, frozen):
    """Every term, the sum and every gradient over two unlike micro-batches; frozen parts have no gradient."""
    net, epoch, total, whole = awake_hand(data, how), 7, 0, 0
    handmim.freeze(net.backbone, frozen)
    for batch in two_unlike_batches():
        terms = finetune_step(net, batch, Config(**TINY, finetune=data, variant=how), epoch)
        (terms["loss"] / 2).backward()
        expected = finetuning_oracle(net, batch, epoch, data, how)
        for name, value in expected.items():
            close(terms[name].detach(), value.detach(), name, 1e-5)
        total, whole = total + float(terms["loss"].detach()) / 2, whole + expected["loss"] / 2
    still = {n for n, p in net.named_parameters() if not p.requires_grad}
    reached = same_gradients(net, total, whole)
    assert {"backbone.blocks.3.attn.qkv.weight", "rectifiers.0.points.layers.1.weight", "rectifiers.2.mlp.0.weight",
            "rectifiers.1.mlp.4.bias"} <= reached
    held = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed", "backbone.blocks.0.", "backbone.blocks.1.")
    assert still == ({n for n, _ in net.named_parameters() if n.startswith(held)} if frozen else set())
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)


# ---- Fine-tuning: the loop


@pytest.mark.parametrize("frozen", [0, 2])
def test_finetuning_loop_is_adam_by_hand(monkeypatch, tmp_path, frozen):
    """Three steps at a constant rate, without decay or clipping; a validation after the second."""
    monkeypatch.chdir(tmp_path)
    init = first_weights("init.pt")
    data, val, opened = Few(labelled(8, 4)), Few(labelled(2, 5)), []
    mean = {"pose": 0.1 * torch.randn(48), "shape": torch.full((10,), 0.3), "uv": torch.rand(21, 2),
            "joints": torch.zeros(21, 3), "labels": 8}
    kept = []

    def judged(run, epoch, *more):
        run.model.eval()
        kept.append((epoch, more[0] is val, more[-1]["row"], more[-1]["mean"] is mean))
        return {"val_mpjpe_mm": 7.0}

    def opener(cfg, specs, split, *given, **more):
        opened.append((specs, split, *given, more))
        return {"train": data, "val": val}[split]

    monkeypatch.setattr(handmim, "open_data", opener)
    monkeypatch.setattr(handmim, "mean_hand", lambda given: mean if given is data else None)
    monkeypatch.setattr(handmim, "draw_crops", lambda *given: None)
    monkeypatch.setattr(handmim, "keep_best", judged)
    modes, after, rates, logged = watch(monkeypatch, "finetune_step", stop=3)
    with pytest.raises(KeyboardInterrupt):
        handmim.main(["--finetune", "synthetic", "--epochs", "2", *SIZES, "--lr", "0.01", "--init", "init.pt",
                      "--freeze-blocks", str(frozen), "--mano", "builtin"])
    assert modes == [{True}] * 6 and kept == [(0, True, "init", True)]
    assert opened == [(("synthetic",), "train", 56, 2.2, CPU, {"labelled": True}),             # 1.75 x 32 px
                      (("synthetic",), "val", 56, 2.2, CPU, {})]
    epochs = [json.loads(line) for line in Path("run/finetune-init/log.jsonl").read_text().splitlines() if "loss" not in line][1:]
    assert epochs == [{"epoch": 1, "val_mpjpe_mm": 7.0}]

    torch.manual_seed(3)
    cfg = Config(**TINY, finetune="synthetic", mano="builtin")
    model, adam = HandNet(cfg), HandAdamW()
    model.backbone.load_state_dict(init)
    model.start_at(mean)
    held = ("backbone.cls", "backbone.pos", "backbone.patch", "backbone.blocks.0.", "backbone.blocks.1.") if frozen else ()
    for step in range(3):
        epoch, sums = step // 2, {}
        order = common.permutation(8, 3, epoch)[4 * (step % 2):4 * (step % 2) + 4]
        for rows in order.view(2, 2):
            terms = finetune_step(model, data.batch(rows) | {"index": rows}, cfg, epoch)
            (terms["loss"] / 2).backward()
            sums = {k: sums.get(k, 0) + float(v.detach()) / 2 for k, v in terms.items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith(held or "nothing"):
                    adam.step(name, p, p.grad, 0.01, 0.0)
        model.zero_grad(set_to_none=True)
        assert rates[step] == 0.01 and logged[step] == pytest.approx(sums, rel=1e-5)
        same_weights(after[step], model.state_dict(), step, 1e-5)
    assert torch.equal(after[2]["backbone.blocks.1.mlp.fc1.weight"], init["blocks.1.mlp.fc1.weight"]) == bool(frozen)


# ---- Prediction is training's twin


@pytest.mark.parametrize("data", ["synthetic", "freihand"])
def test_prediction_is_what_an_unaugmented_step_saw_and_scored(monkeypatch, data):
    """Draws in the middle of their range: predict feeds the network the step's crop and K, and answers its hand."""
    monkeypatch.setattr(handmim, "uniform", lambda index, n, *more: torch.full((len(index), n), 0.5))
    monkeypatch.setattr(handmim, "normal", lambda index, n, *more: torch.zeros(len(index), n))
    net, batch = awake_hand(data), labelled(3, 8) | {"index": torch.arange(3)}
    with torch.no_grad():
        for rectifier in net.rectifiers[1:]:             # all three outputs are then the first one's
            rectifier.mlp[-1].weight.zero_()
            rectifier.mlp[-1].bias.zero_()
    fed = []
    net.register_forward_pre_hook(lambda _, given: fed.append(given))
    with torch.no_grad():
        terms = finetune_step(net, batch, Config(**TINY, finetune=data), 5)
        out = net.eval().predict({key: batch[key] for key in net.USES})
    (crops, K), (again, K_again) = fed
    close(again, crops, "crops", 1e-5)                   # jitter of strength 0 goes through HSV and back
    close(K_again, K, "K", 1e-6)
    rooted = {k: batch[k] - batch["joints"][:, :1] for k in ("joints", "verts")}
    R = axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)))
    close(10 * (out["joints"] - rooted["joints"]).abs().sum(-1).mean(), terms["L_3d"], "joints, m", 1e-5)
    close(10 * (out["verts"] - rooted["verts"]).abs().sum(-1).mean(), terms["L_vert"], "vertices, m")
    close((out["root"] - batch["joints"][:, 0]).square().sum(1).mean(), terms["L_t"], "wrist, m, camera")
    close((out["pose"] - R).square().sum((2, 3)).mean(), terms["L_theta"], "rotations")
    close((out["shape"] - batch["shape"]).square().mean(), terms["L_beta"], "shape")
    px = STORED * 1.2 / 2.2 / S                          # stored px a crop px
    close((out["uv"] - batch["uv"]).abs().sum(-1).mean() / px / 16, terms["L_2d"], "key points, px")


def test_the_probe_reads_the_teacher_s_class_token_of_the_prediction_s_crop(monkeypatch):
    model, seen = awake_model("handmim", ()), {}
    cfg = Config(**TINY)
    monkeypatch.setattr(handmim, "probe_error", lambda net, encode, cfg, size, margin, device: seen.update(
        net=net, encode=encode, size=size, margin=margin) or 2.5)
    assert handmim.probe(model, cfg, CPU) == 2.5
    assert seen["net"] is model and seen["size"] == 56 and seen["margin"] == 2.2              # 1.75 x 32 px
    image = (255 * torch.rand(1, 3, 56, 56)).to(torch.uint8)
    A, zoom = torch.eye(3), 32 / (56 * 1.2 / 2.2)
    A[0, 0] = A[1, 1] = zoom
    A[:2, 2] = 15.5 - zoom * 27.5
    x = (warp(image.double(), A[None], S)[0] / 255 - MEAN) / STD
    with torch.no_grad():
        close(seen["encode"](image)[0], encode(model.teacher.backbone, x)[0][0], "class token")


# ---- Draws


DRAWS = {
    "view": lambda index, cfg, epoch, v: handmim.draw_view(index, v, STORED, cfg, epoch).A,
    "ibot view": lambda index, cfg, epoch, v: handmim.draw_ibot_view(index, v, STORED, cfg, epoch).A,
    "mask": lambda index, cfg, epoch, v: handmim.draw_masks(index, 14, cfg, epoch)[:, v],
    "random mask": lambda index, cfg, epoch, v: handmim.draw_masks(
        index, 14, Config(**TINY | dict(seed=cfg.seed), variant=("random-mask",)), epoch)[:, v],
    "colour": lambda index, cfg, epoch, v: handmim.colour(
        torch.linspace(0.1, 0.4, 48).view(1, 3, 4, 4).expand(len(index), 3, 4, 4), index, v, cfg, epoch),
    "depth": lambda index, cfg, epoch, v: handmim.draw_paths(index, 16, cfg, epoch)[:, v],
    "crop": lambda index, cfg, epoch, v: handmim.draw_crop(index, STORED, cfg, epoch)[0],
    "hand colour": lambda index, cfg, epoch, v: handmim.draw_colour(index, cfg, epoch)}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_new_for_each_epoch_view_sample_and_seed_and_the_same_again(name):
    index, cfg = torch.tensor([3, 4]), Config(**TINY)
    first = DRAWS[name](index, cfg, 0, 0)
    assert torch.equal(first, DRAWS[name](index, cfg, 0, 0)) and not torch.equal(first[0], first[1])
    assert torch.allclose(first[1:], DRAWS[name](index[1:], cfg, 0, 0))                      # whatever the batch
    others = [DRAWS[name](index, cfg, 1, 0), DRAWS[name](index, Config(**TINY | dict(seed=4)), 0, 0)]
    others += [] if name in ("crop", "hand colour") else [DRAWS[name](index, cfg, 0, 1)]     # one view a sample
    assert not any(torch.equal(one[k], first[k]) for one in others for k in (0, 1))


# ---- Commands


def test_each_command_runs_its_stages_with_their_options(monkeypatch, tmp_path):
    """--quick: both stages, each with the variants that it knows; else one."""
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(handmim, "pretrain", lambda cfg, out, device: ran.append(
        ("pretrain", cfg.objective, cfg.variant, cfg.epochs)))
    monkeypatch.setattr(handmim, "finetune", lambda cfg, out, row, device: ran.append(
        ("finetune", row, cfg.init, cfg.variant, cfg.finetune, cfg.epochs)))
    monkeypatch.setattr(handmim, "report", lambda cfg, folder, row, device, build, side, margin: ran.append(
        ("report", folder.name, row, build(cfg).__class__, side, margin)))
    handmim.main(["--quick", "--variant", "no-recon", "pymaf-sampler", "--out", "a", "--device", "cpu"])
    row = "handmim-no-recon-pymaf-sampler"
    assert ran == [
        ("pretrain", "handmim", ("no-recon",), 1),
        ("finetune", row, str(Path("a", "backbone.pt")), ("pymaf-sampler",), "synthetic:calm", 12),
        ("report", f"finetune-{row}", row, HandNet, 112, 2.2)]
    ran.clear()
    handmim.main(["--quick", "--objective", "ibot", "--out", "i", "--device", "cpu"])
    assert [stage[:2] for stage in ran] == [("pretrain", "ibot"), ("finetune", "ibot"), ("report", "finetune-ibot")]
    ran.clear()
    handmim.main(["--finetune", "ho3d=DIR", "--init", "x/backbone-ibot.pt", "--out", "b", "--device", "cpu",
                  "--variant", "linear-rectifiers"])
    row = "ibot-linear-rectifiers"
    assert ran == [("finetune", row, "x/backbone-ibot.pt", ("linear-rectifiers",), "ho3d=DIR", 100),
                   ("report", f"finetune-{row}", row, HandNet, 392, 2.2)]
    ran.clear()
    handmim.main(["--data", "freihand=A", "yt3d=B", "--backbone", "vit_l", "--out", "c", "--device", "cpu"])
    assert ran == [("pretrain", "handmim", (), 250)]


def test_defaults_left_open_by_the_paper_are_ibot_s():
    """Typed from iBOT's README recipe and defaults (1)."""
    cfg = handmim.configure({}, "pretrain")
    assert (cfg.warmup_epochs, cfg.weight_decay, cfg.teacher_momentum, cfg.drop_path) == (10, 0.4, 0.996, 0.1)
    assert (cfg.prototypes, cfg.head_hidden, cfg.objective, cfg.image_size) == (8192, 2048, "handmim", 224)
    assert cfg.teacher_tau == 0.04 and handmim.centre_share(cfg.teacher_momentum) == pytest.approx(0.1, abs=1e-12)


# ---- Small things that the tiny networks above never reach


def test_only_the_network_of_a_fine_tuning_step_is_in_bfloat16(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(handmim, "uniform", uniform)
    monkeypatch.setattr(handmim, "normal", normal)
    cfg = Config(**TINY, finetune="synthetic", precision="bf16")
    net, batch, seen = awake_hand(), labelled(2, 3) | {"index": torch.arange(2)}, {}
    batch = {k: v.float() if isinstance(v, torch.Tensor) and v.dtype == EXACT else v for k, v in batch.items()}
    net.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda _, x, y: seen.update(inside=y.dtype))
    net.rectifiers[0].mlp[0].register_forward_hook(lambda _, x, y: seen.update(feedback=y.dtype))
    for run, kind in ((lambda: finetune_step(net, batch, cfg, 0)["loss"], torch.bfloat16),
                      (lambda: net.predict(batch)["joints"], torch.float32)):
        seen.clear()
        assert run().dtype == torch.float32
        assert seen == {"inside": kind, "feedback": torch.float32}


def test_a_point_nearer_than_5_cm_is_seen_as_if_at_5_cm():
    K = torch.tensor([[[100.0, 0, 10], [0, 100, 20], [0, 0, 1]]])
    points = torch.tensor([[[0.01, 0.02, 0.01], [0.01, 0.02, -1.0], [0.01, 0.02, 0.1]]])
    found = handmim.project(points, K)[0]
    assert torch.allclose(found, torch.tensor([[30.0, 60], [30, 60], [20, 40]]))


def test_a_term_that_no_sample_has_a_label_for_is_zero():
    loss = torch.tensor([3.0, 5.0], requires_grad=True)
    none = handmim.masked(loss, torch.tensor([False, False]))
    assert float(none.detach()) == 0 and float(handmim.masked(loss, torch.tensor([False, True])).detach()) == 5
    none.backward()
    assert loss.grad.tolist() == [0, 0]


def test_the_sheets_show_what_the_steps_see(monkeypatch, tmp_path):
    """Key points move with their pictures, hidden patches are grey, and only they are the decoder's."""
    drawn, points = {}, []
    monkeypatch.setattr(handmim, "sheet", lambda path, rows, **more: drawn.update({path.name: rows}))
    monkeypatch.setattr(handmim, "draw_skeleton", lambda image, uv, **more: points.append(uv) or image)
    samples = labelled(6, 9)
    data, cfg, model = Few(samples), Config(**TINY), awake_model("handmim", ())
    handmim.draw_recovered(tmp_path, model, data, cfg, CPU)
    handmim.draw_pretraining(tmp_path, data, cfg, CPU, 4)
    stored, first, seen_first, second, seen_second = drawn["views.png"]
    assert len(points) == 12
    for i in range(6):
        x, angle, gamma, shift = one_view(samples["image"][i], i, 0, 0, False, ())
        y = one_view(samples["image"][i], i, 1, 0, False, ())[0]
        true, other = ((z * STD + MEAN).clamp(0, 1) for z in (x, y))
        on = one_mask(i, 0, 0, False, ()).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
        whole, seen, recovered = (row[i] for row in drawn["recovered.png"])
        hand = common.warp(samples["image"][i:i + 1], common.crop(torch.full((1, 2), 23.5), torch.tensor([48 * 1.2 / 1.7]), 32), 32)
        for found, expected in ((whole, hand[0] / 255), (first[i], true), (second[i], other), (seen[:, ~on], whole[:, ~on]),
                                (seen_first[i][:, ~on], true[:, ~on]), (recovered[:, ~on], whole[:, ~on])):
            close(found, expected, "sheet", 1e-4)
        assert torch.equal(stored[i], samples["image"][i]) and (seen[:, on] == 0.5).all() and (recovered[:, on] != 0.5).any()
        assert not torch.allclose(recovered[:, on], whole[:, on], atol=0.01)
        source = (samples["uv"][i] - 23.5) / (48 * 1.2 / 1.7)              # from the square's centre, in its sides
        moved = (gamma * source - shift) @ turned(angle).mT                # Eq. 3
        close(points[i], 15.5 + 32 * moved, "key points")
    handmim.draw_crops(tmp_path, data, cfg, CPU)
    assert len(points) == 20 and [len(row) for row in drawn["views.png"]] == [4, 4]


def test_a_run_of_no_epochs_keeps_what_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    init, kept = first_weights("init.pt"), []
    monkeypatch.setattr(handmim, "open_data", lambda *given, **more: Few(labelled(4, 4)))
    monkeypatch.setattr(handmim, "draw_pretraining", lambda *given: None)
    monkeypatch.setattr(handmim, "draw_recovered", lambda *given: None)
    monkeypatch.setattr(handmim, "draw_crops", lambda *given: None)
    monkeypatch.setattr(handmim, "keep_best", lambda run, epoch, *given: kept.append(epoch))
    monkeypatch.setattr(handmim, "mean_hand", lambda data: {
        "pose": torch.zeros(48), "shape": torch.zeros(10), "uv": torch.zeros(21, 2), "labels": 4})
    for folder in ("pretrain-handmim", "finetune-x"):
        Path(folder).mkdir()
    cfg = Config(**TINY, epochs=0, init="init.pt", mano="builtin")
    handmim.pretrain(cfg, Path(), CPU)
    written = torch.load("backbone.pt", weights_only=True)
    assert all(torch.equal(written[k], v) for k, v in init.items())
    handmim.finetune(Config(**TINY, epochs=0, finetune="synthetic", mano="builtin"), Path(), "x", CPU)
    assert kept == [-1]                                     # judged as it is
    weights = torch.load("finetune-x/last.pt", weights_only=True)["model"]
    assert weights["start"][106:].tolist() == [0, 0, 0]     # key points of no sample: the crop's middle
    assert Path("pretrain-handmim/last.pt").exists()


def test_first_weights_are_ibot_s_and_the_teacher_s_are_the_student_s():
    """Linear layers of deviation 0.02 and bias 0, unit prototypes, no masked token yet."""
    torch.manual_seed(0)
    model = HandMIM(Config(**TINY | dict(head_hidden=400)))
    teacher = dict(model.teacher.named_parameters())
    assert all(torch.equal(p, teacher[n]) and not teacher[n].requires_grad for n, p in model.student.named_parameters())
    head = model.student.head
    assert [float(layer.weight.detach().std()) for layer in head.mlp[::2]] == pytest.approx([0.02] * 3, rel=0.03)
    assert all((layer.bias == 0).all() for layer in head.mlp[::2]) and (head.last_layer.weight_g == 1).all()
    assert float(head.last_layer.weight_v.detach().abs().max()) == pytest.approx(1 / 16, rel=0.01)
    assert (model.masked_embed == 0).all() and (model.centre == 0).all() and (model.centre_patch == 0).all()
