"""Speed and memory, as ratios against a baseline measured in the same run: python tests/bench.py [NAME ...]

    feed      pictures a second a core, read and kept, against torchvision's ImageFolder with Pillow; a step's
              micro-batches waited for one by one against all at once; HanCo's squares with the px they have against
              those asked for; labels before step 1, columns at once against row by row
    launches  operators of a step, numbers the host reads and copies it waits for, as a GPU would be asked
    precision forward and backward in bfloat16 against float32 on this CPU: back-bones, steps of --quick
    mano      our layer against smplx 0.1.28 on the same model (`pip install --no-deps smplx`); "not run" without
    render    synthetic images a second at 64, 128 and 256 px, everything included, and the bar
    score     raw, aligned and AUC scores of 3,960 samples in one batch against a loop with one SVD a sample;
              all scores of joints; and of meshes with F-scores under FreiHAND's protocols
    ti_net    12 encoder passes a sample against the 27 that Algorithm 1 writes; decoder and warp share
    hamuco    triangulation in a batch against a loop with one SVD a point; refinement that stops early; views
    handmim   the share of a step outside the networks, and of its masks; Eq. 8's decoder in our order and as printed
    peclr     two views a picture against Pillow's, one by one; Sobel by hypot against a norm; the share of a step outside the network;
              memory of a step of 512 pictures, in one graph and cached
    rss       memory of a fresh process at steps 50 and 300
    start     processor seconds of --help of the five commands against importing torch and torchvision alone

    profile [SCRIPT[:STAGE] ...]    where a step's time goes, at quick and paper sizes; --device cuda --precision bf16 --compile
    memory [SCRIPT[:STAGE] ...]     bytes of a step at the paper's sizes, counted, and the micro-batch that fits 8 to 80 GB; --check: measured, too
    compile [SCRIPT[:STAGE] ...]    --compile of tiny steps on this CPU: losses and gradients against eager ones, and the pace (a minute each)
    hours [SCRIPT[:STAGE] ...]      a paper's whole recipe on an A100 and an H100, extrapolated from counted FLOPs

Run by hand on a quiet machine: two threads that share a core with another program say nothing.
"""
from __future__ import annotations

import contextlib
import io
import lzma
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

# common before torch: it settles how threads wait
from common import Mano, auc, axis_angle_to_matrix, mpjpe, normalise, pa_mpjpe, score, uniform
from hand.builtin import builtin_hand
from hand.official import MANO_SHAPES, load_mano
from sources import Source, reading, training_steps
from sources.folder import index_folder
from sources.hands import Hands, enough_px
from sources.index import Index
from sources.judging import Exam, values_of
from sources.predictors import facts
from sources.protocols import PROTOCOLS
from sources.reading import read_items
from sources.squares import keep_squares
from sources.synthetic import Cached, Synthetic
from sources.views import Views
from benches.asking import bench_compile, bench_launches, bench_precision
from benches.profiling import bench_profile
from benches.starting import bench_rss, bench_start
from benches.tables import PEAK, bench_hours, bench_memory
import hamuco
import handmim
import peclr
import ti_net

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def interleaved(calls: dict[str, object], rounds: int = 5, repeats: int = 1) -> dict[str, float]:
    """Median over `rounds` of the mean time of `repeats` calls, s, the calls taking turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: median(taken[1:]) for name, taken in times.items()}           # the first warms up


def smplx_layer(params: dict[str, np.ndarray]) -> torch.nn.Module | None:
    """smplx's MANO over the same arrays, or None where smplx is not installed."""
    try:
        import smplx
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "MANO_RIGHT.pkl"
        path.write_bytes(pickle.dumps({key: params[key] for key in MANO_SHAPES}))
        return smplx.MANO(str(path), is_rhand=True, use_pca=False, flat_hand_mean=False)


def fixture() -> dict[str, np.ndarray]:
    """The synthetic hand in the official file's format that the tests read."""
    packed = Path(__file__).parent / "golden" / "mano_format_chumpy.pkl.xz"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hand.pkl"
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        return load_mano(path)


def bench_mano() -> None:
    """ms of smplx and ours, and the ratio; axis-angle 48 + 10 betas, float32."""
    params = fixture()
    ours, theirs = Mano(params), smplx_layer(params)
    if theirs is None:
        print("mano against smplx: not run (smplx is not installed)")
        return
    bars = {("forward", 64): 1.6, ("joints", 64): 3.0, ("joints", 1024): 8.0}
    for batch in (1, 64, 1024):
        pose = (0.3 * torch.randn(batch, 48)).requires_grad_()
        shape = torch.randn(batch, 10).requires_grad_()

        def run(joints_only: bool = False):
            R = axis_angle_to_matrix(ours.full_pose(pose, flat_hand_mean=False).unflatten(1, (16, 3)))
            return (ours.joints(R, shape),) if joints_only else ours(R, shape)

        def run_smplx():
            out = theirs(betas=shape, global_orient=pose[:, :3], hand_pose=pose[:, 3:])
            return out.vertices, out.joints

        backward = lambda call: lambda: sum(part.sum() for part in call()).backward()
        repeats = max(10, 640 // (batch + 9))
        with torch.no_grad():
            assert torch.allclose(run()[0], run_smplx()[0], atol=1e-5)
            t = interleaved({"smplx": run_smplx, "forward": run, "joints": lambda: run(True)}, 5, repeats)
        t |= {"smplx backward": 0.0} | {f"{k}": v for k, v in interleaved(
            {"smplx backward": backward(run_smplx), "backward": backward(run)}, 5, repeats).items()}
        for name in ("forward", "joints", "backward"):
            base = t["smplx backward" if name == "backward" else "smplx"]
            bar = f", bar {bars[name, batch]}" if (name, batch) in bars else ""
            print(f"mano B={batch:4d} {name:8s} {1e3 * t[name]:7.2f} ms, smplx {1e3 * base:7.2f} ms: "
                  f"x{base / t[name]:.2f}{bar}")


def bench_render() -> None:
    """Images a second: pose, hand, forearm, occluder, light, background, camera; and labels."""
    for size, bar in ((64, 500), (128, 150), (256, 35)):
        data, n = Synthetic(size, samples=10 ** 6), {64: 256, 128: 128, 256: 32}[size]
        data.batch(torch.arange(16))
        times = []
        for k in range(5):
            start = time.perf_counter()
            data.batch(torch.arange(n * k, n * (k + 1)))
            times.append(time.perf_counter() - start)
        print(f"render {size:3d} px: {n / median(times):5.0f} images/s, bar {bar}")


def bench_score() -> None:
    """Raw, aligned and AUC scores of joints, in one batch and sample by sample."""
    torch.manual_seed(0)
    true = 0.1 * torch.randn(3960, 21, 3)
    pred = {"joints": true + 0.01 * torch.randn(3960, 21, 3)}
    truth = {"joints": true, "joints_ok": torch.ones(3960, 21, dtype=torch.bool)}

    def loop():
        for p, t in zip(pred["joints"].double().numpy(), true.double().numpy()):
            a, b = p - p.mean(0), t - t.mean(0)
            U, S, Vt = np.linalg.svd(a.T @ b)
            d = np.array([1, 1, np.sign(np.linalg.det(U @ Vt))])
            aligned = a @ (U * d) @ Vt * (S * d).sum() / (a * a).sum()
            errors = np.linalg.norm(aligned - b, axis=1), np.linalg.norm(p - p[0] - t + t[0], axis=1)
            [np.trapezoid((e[:, None] <= np.linspace(0, 0.05, 100)).mean(0)) / 99 for e in errors]

    def batch():
        for error in (mpjpe(pred["joints"], true), pa_mpjpe(pred["joints"], true)):
            error.mean(1), auc(error).mean(1)

    t = interleaved({"batch": batch, "all": lambda: score(pred, truth), "loop": loop}, 5)
    print(f"score 3,960 samples, raw, PA, AUC: {1e3 * t['batch']:.0f} ms, one by one {1e3 * t['loop']:.0f} ms: "
          f"x{t['loop'] / t['batch']:.1f}, bar 15; every score of joints {1e3 * t['all']:.0f} ms, bar 100")
    layer, n = Mano(builtin_hand()), 330
    verts, joints = layer(axis_angle_to_matrix(0.3 * torch.randn(n, 16, 3)), torch.randn(n, 10))
    truth = {"joints": joints, "verts": verts, "joints_ok": torch.ones(n, 21, dtype=torch.bool),
             "visible": torch.ones(n, 21, dtype=torch.bool), "uv": torch.zeros(n, 21, 2), "pose": torch.zeros(n, 48),
             "crop": torch.eye(3).expand(n, 3, 3), "shape": torch.zeros(n, 10), "side": ["right"] * n}
    pred = {"joints": joints + 0.005, "verts": verts + 0.005 * torch.randn(n, 778, 3), "root": joints[:, 0]}
    start = time.perf_counter()
    values_of(facts(pred, truth, {}), Exam(None, "freihand", layer, torch.device("cpu"), 0, PROTOCOLS["freihand"]))
    print(f"score 3,960 meshes with all F-scores: {(time.perf_counter() - start) * 3960 / n:.0f} s, bar 30")


def bench_ti_net() -> None:
    """One pre-training step of ResNet-10 at 64 px: shared pictures against Algorithm 1's 27 calls."""
    cfg = ti_net.Config(backbone="resnet10", image_size=64, micro_batch=16, decoder_width=32)
    model = ti_net.TINet(cfg)
    model.to(memory_format=torch.channels_last)
    batch = {"image": torch.randint(0, 255, (16, 3, 96, 96), dtype=torch.uint8), "index": torch.arange(16)}
    views, angles, _ = ti_net.make_views(batch, cfg, 0, model.plan)
    encode = lambda n: model.backbone(views[:, :1].expand(-1, n, -1, -1, -1).reshape(-1, 3, 64, 64))[-1].sum()
    t = interleaved({"step": lambda: ti_net.pretrain_step(model, batch, cfg, 0)["loss"].backward(),
                     "12": lambda: encode(12).backward(), "27": lambda: encode(27).backward(),
                     "views": lambda: ti_net.make_views(batch, cfg, 0, model.plan)}, 3)
    print(f"ti_net: encoding 12 pictures a sample {t['12']:.2f} s, 27 as printed {t['27']:.2f} s: "
          f"x{t['27'] / t['12']:.2f}; a step {t['step']:.2f} s, of it views {t['views'] / t['step']:.0%}")


def pil_views(batch: dict, cfg: peclr.Config) -> torch.Tensor:
    """The same two views of each sample, one picture at a time with Pillow: one affine resample, HSV tables."""
    out, S = [], cfg.image_size
    for k in (0, 1):
        back = torch.linalg.inv(peclr.draw_view(batch, cfg, 0, k).A).tolist()
        u = uniform(batch["index"], 4, cfg.seed, "peclr colour", 0, k).tolist()
        for image, A, (h, s, v, b) in zip(batch["image"], back, u):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            view = picture.transform((S, S), Image.Transform.AFFINE, (*A[0], *A[1]), Image.Resampling.BILINEAR)
            factors = 0.01 + 0.99 * h, 0.01 + 0.99 * s, 0.5 + 0.5 * v
            plus = 0, 0, 5 + 15 * b
            table = [min(255, int(f * x + p)) for f, p in zip(factors, plus) for x in range(256)]
            view = np.asarray(view.convert("HSV").point(table).convert("RGB"))
            out.append(normalise(torch.from_numpy(view.copy()).permute(2, 0, 1)[None])[0])
    return torch.stack(out)


def peak_of_a_step(micro_batch: int) -> float:
    """GiB that a pre-training step of 512 pictures adds to a fresh process (Linux)."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch, peclr
torch.set_num_threads(2)
cfg = peclr.Config(backbone="resnet10", image_size=64, batch_size=512, micro_batch={micro_batch})
model = peclr.PeCLR(cfg).to(memory_format=torch.channels_last)
parts = [dict(image=torch.zeros({micro_batch}, 3, 96, 96, dtype=torch.uint8), index=i, uv=40 + 20 * torch.rand({micro_batch}, 21, 2),
              crop=torch.eye(3).expand({micro_batch}, 3, 3)) for i in torch.arange(512).split({micro_batch})]
kib = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")                 # the peak starts anew
before = kib("VmRSS")
if len(parts) > 1:
    peclr.cached_step(model, parts, cfg, 0)
else:
    peclr.whole_step(model, parts[0], cfg, 0)
print((kib("VmHWM") - before) / 2 ** 20)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def bench_peclr() -> None:
    """Augmentation against Pillow; what of a step is outside the network; memory of the cached step."""
    cfg = peclr.Config(batch_size=32, micro_batch=32)
    side = peclr.stored_side(cfg)
    batch = {"image": torch.randint(0, 255, (32, 3, side, side), dtype=torch.uint8), "index": torch.arange(32),
             "uv": side / 2 + side / 8 * torch.randn(32, 21, 2), "crop": torch.eye(3).expand(32, 3, 3)}
    t = interleaved({"ours": lambda: peclr.make_views(batch, cfg, 0), "pil": lambda: pil_views(batch, cfg)}, 5)
    print(f"peclr views at 128 px: {64 / t['ours']:.0f} images/s, with Pillow one by one {64 / t['pil']:.0f}: "
          f"x{t['pil'] / t['ours']:.2f}, bar 1.5")
    images = torch.rand(32, 3, 224, 224)

    def by_norm():
        with mock.patch.object(torch, "hypot", lambda x, y: torch.stack([x, y], 2).norm(dim=2)):
            return peclr.sobel(images)

    assert torch.allclose(by_norm(), peclr.sobel(images), atol=1e-6)
    t = interleaved({"hypot": lambda: peclr.sobel(images), "norm": by_norm}, 3)
    print(f"peclr Sobel of 32 pictures at 224 px: {1000 * t['hypot']:.0f} ms, with a norm over the third axis {1000 * t['norm']:.0f} ms: "
          f"x{t['norm'] / t['hypot']:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        side = round(peclr.VIEW_STORE * 128)
        data = Cached(Synthetic(side, 32, calm=True, margin=peclr.VIEW_MARGIN), folder)
        for name in ("resnet50", "resnet152"):
            cfg = peclr.Config(backbone=name, batch_size=32, micro_batch=16, workers=0)
            model = peclr.PeCLR(cfg).to(memory_format=torch.channels_last)
            optimizer = peclr.Lars(model.parameters(), lr=1e-9)
            views = torch.randn(32, 3, 128, 128)

            def step():
                (_, parts), = training_steps(data, cfg, 0, 0, torch.device("cpu"))
                model.zero_grad()
                peclr.cached_step(model, parts, cfg, 0)

            def network():
                for _ in range(2):
                    with torch.no_grad():
                        model(views)
                    model(views).sum().backward()

            t = interleaved({"step": step, "network": network, "lars": optimizer.step}, 2)
            whole = 64 * t["step"] + t["lars"]                                       # 2,048 pictures, one LARS
            print(f"peclr {name}, 128 px: 32 pictures in a cached step {t['step']:.2f} s, the network alone {t['network']:.2f} s, "
                  f"LARS {t['lars']:.2f} s: outside the network {1 - 64 * t['network'] / whole:.1%} of 2,048, bar 10 %", flush=True)
    plain, cached = peak_of_a_step(512), peak_of_a_step(32)
    print(f"peclr step of 512, ResNet-10 at 64 px: plain {plain:.2f} GiB, cached by 32 {cached:.2f} GiB: x{plain / cached:.1f} less")


class Literal(handmim.Decoder):
    """Eq. 8 as printed: every L^i enlarged to T^i's size before the linear layer."""

    def forward(self, taps):
        T = None
        for k, (L, fuse, up) in enumerate(zip(taps, self.fuse, self.up)):
            L = F.interpolate(L.mT.unflatten(2, (self.grid, self.grid)), scale_factor=2 ** k)
            x = L if T is None else torch.cat([T, L], 1)
            T = up(F.gelu(fuse(x.movedim(1, -1)).movedim(-1, 1)))
        return T


def bench_handmim() -> None:
    """What of a step of ViT-S at 224 px is outside the networks; the decoder against Eq. 8 as printed."""
    cfg, n = handmim.Config(drop_path=0.1), 8
    model = handmim.HandMIM(cfg)
    batch = {"image": torch.randint(0, 256, (n, 3, 336, 336), dtype=torch.uint8), "index": torch.arange(n)}
    views, view, masks = handmim.make_views(batch, cfg, 0, 14)
    with torch.no_grad():
        out = model(views, masks, view, None)
    leaf = lambda x: x.detach().requires_grad_()
    student, patch, pictures = leaf(out.student), leaf(out.student_patch), leaf(out.pictures)

    def losses():
        (handmim.pose_loss(student, out.teacher, model.centre, 0.04)
         + handmim.patch_loss(patch, out.teacher_patch, model.centre_patch, out.weight, 0.04)
         + handmim.recon_loss(pictures.flatten(0, 1), views.flatten(0, 1), masks.flatten(0, 1))).backward()
        handmim.collapse_monitors(out.teacher, model.centre, 0.04)

    t = interleaved({"views": lambda: handmim.make_views(batch, cfg, 0, 14), "losses": losses,
                     "step": lambda: handmim.pretrain_step(model, batch, cfg, 0)["loss"].backward()}, 2)
    print(f"handmim: a step of {n} pictures {t['step']:.2f} s, of it views and masks {t['views'] / t['step']:.1%}, "
          f"losses {t['losses'] / t['step']:.1%}; bar 10 % together")
    began = time.process_time()
    for k in range(20):
        handmim.draw_masks(torch.arange(64 * k, 64 * (k + 1)), 14, cfg, 0)
    masks = (time.process_time() - began) / 20
    shares = {name: masks / (64 * 88.5e9 / (0.25 * 1e12 * peak)) for name, peak in PEAK.items()}         # as `hours` extrapolates
    print(f"handmim: masks of 64 pictures take the host {1000 * masks:.1f} ms of processor time, {masks * n / 64 / t['step']:.2%} of a step "
          f"on this CPU; of an extrapolated one on a GPU, which computes meanwhile, {', '.join(f'{x:.0%} ({k})' for k, x in shares.items())}")
    ours, printed = handmim.Decoder(384, 4, 14, 32), Literal(384, 4, 14, 32)
    printed.load_state_dict(ours.state_dict())
    taps = [torch.randn(n, 196, 384, requires_grad=True) for _ in range(4)]
    assert torch.allclose(ours(taps), printed(taps), atol=1e-4)
    t = interleaved({"ours": lambda: ours(taps).sum().backward(), "printed": lambda: printed(taps).sum().backward()}, 2)
    print(f"handmim decoder: projected first {1000 * t['ours']:.0f} ms, as printed {1000 * t['printed']:.0f} ms: "
          f"x{t['printed'] / t['ours']:.1f}")


def bench_hamuco() -> None:
    """DLT of 10,000 points in 8 views in one batch against a loop with one SVD a point; the cross-view network of
    ResNet-50 at 256 px against the number of views: time, and bytes kept for the backward pass."""
    torch.manual_seed(0)
    n, V = 10_000, 8
    R = axis_angle_to_matrix(0.5 * torch.randn(V, 3, dtype=torch.float64))
    K = torch.tensor([[500.0, 0, 128], [0, 500, 128], [0, 0, 1]], dtype=torch.float64)
    P = K @ torch.cat([R, torch.tensor([0, 0, 0.8]).double().expand(V, 3)[..., None]], 2)
    X = torch.cat([0.1 * torch.randn(n, 3), torch.ones(n, 1)], 1).double()
    x = torch.einsum("vij,nj->nvi", P, X)
    uv = x[..., :2] / x[..., 2:]
    points, cameras = uv.numpy(), P.numpy()

    def one(point):
        rows = (point[:, :, None] * cameras[:, 2:] - cameras[:, :2]).reshape(-1, 4)
        h = np.linalg.svd(rows)[2][-1]
        return h[:3] / h[3]

    loop = lambda: np.stack([one(point) for point in points])
    ours = lambda: hamuco.triangulate(uv, P.expand(n, V, 3, 4))
    assert np.abs(ours().numpy() - loop()).max() < 1e-5
    t = interleaved({"ours": ours, "loop": loop}, 3)
    print(f"hamuco DLT of 10,000 points in 8 views: {1000 * t['ours']:.0f} ms, one by one {1000 * t['loop']:.0f} ms: "
          f"x{t['loop'] / t['ours']:.1f}, bar 5")
    n = 64
    rig = Synthetic(hamuco.stored_side(hamuco.Config()), n, calm=True, margin=hamuco.MARGIN, views=V,
                    detector=hamuco.CROP / hamuco.MARGIN).targets(torch.arange(n))
    P = hamuco.projections(rig["K"], rig["cameras"])[:, None].expand(n, 21, V, 3, 4)
    uv = rig["uv_label"].transpose(1, 2)
    X, inliers = hamuco.ransac(uv, P, torch.ones(n, 21, V, dtype=torch.bool))
    refine = lambda still: hamuco.refine(X, uv, P, inliers, still=still)
    apart = float((refine(1e-6) - refine(-1)).norm(dim=-1).max())
    t = interleaved({"early": lambda: refine(1e-6), "all": lambda: refine(-1)}, 5)
    print(f"hamuco refinement of {n * 21:,} joints in 8 views: done with those that stand still {1000 * t['early']:.0f} ms, all of "
          f"60 solves {1000 * t['all']:.0f} ms: x{t['all'] / t['early']:.2f}; {1000 * apart:.1e} mm apart")
    network = hamuco.Interaction(2048, 1792, 64)
    for V in (1, 2, 4, 8):
        inputs = torch.randn(V, 2048, 8, 8), torch.randn(V, 21, 1792), torch.randn(V, 21, 3), torch.randn(V, 96)
        ok, kept = torch.ones(1, V, dtype=torch.bool), []
        step = lambda: network(*inputs, ok, hamuco.quiet(ok)).sum().backward()
        own = {p.data_ptr() for p in network.parameters()}
        count = lambda x: kept.append(x.nbytes * (x.data_ptr() not in own)) or x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            step()
        print(f"hamuco cross-view network, {V} views: {1000 * interleaved({'step': step}, 2)['step']:.0f} ms, "
              f"{sum(kept) / 2 ** 20:.0f} MiB kept", flush=True)


def texture(path: Path, width: int, height: int, seed: int) -> None:
    """A JPEG of random blobs of every size, about as large a file as a photo."""
    rng, whole = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for k in range(1, 8):
        rough = rng.integers(0, 256, (max(2, height >> k), max(2, width >> k), 3), np.uint8)
        whole += np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)) * np.float32(2.0 ** (k - 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(whole.astype(np.uint8)).save(path, quality=90)


class Slow(Source):
    """A micro-batch takes a worker 40 ms."""

    batches = read_items

    def read(self, rows: list[int]) -> dict:
        time.sleep(0.04)
        return {"x": torch.tensor(rows)}

    def __len__(self) -> int:
        return 16 * 6


def bench_feed() -> None:
    """Pictures a second a core, 224 px squares of whole pictures; seconds a step that reads and computes equally long."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    for width, height, n, bar in ((500, 375, 64, 1), (1280, 720, 24, 1), (4000, 3000, 6, 3)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for k in range(n):
                texture(root / "train" / "some" / f"{k}.jpg", width, height, k)
            theirs = ImageFolder(root / "train", transforms.Compose([
                transforms.Resize(224), transforms.CenterCrop(224), transforms.PILToTensor()]))
            index, rows = index_folder(root / "train" / "some"), list(range(n))
            ours = Hands(index, 224, 1.0)
            with contextlib.redirect_stdout(io.StringIO()):
                kept = Hands(index, 224, 1.0, keep_squares(index, 224, 1.0, root / "cache", 1.0))
            t = interleaved({"theirs": lambda: torch.stack([image for image, _ in theirs]), "ours": lambda: ours.read(rows),
                             "kept": lambda: kept.read(rows)}, 5)
            gap = (ours.read(rows)["image"].float() - torch.stack([image for image, _ in theirs]).float()).abs().mean()
            print(f"feed {width} x {height}: ImageFolder {n / t['theirs']:.0f} pictures/s a core, ours {n / t['ours']:.0f}: "
                  f"x{t['theirs'] / t['ours']:.2f}, bar {bar}; kept squares {n / t['kept']:.0f}: x{t['theirs'] / t['kept']:.0f}, "
                  f"bar 20; they differ by {gap:.2f} grey levels", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(32):
            texture(Path(folder, "train", f"{k}.jpg"), 224, 224, k)
        index, rows = index_folder(Path(folder, "train")), list(range(32))
        index.columns["box"] = np.tile(np.float32([60, 60, 104, 104]), (32, 1))
        cfg, margin = hamuco.Config(), hamuco.MARGIN
        wide = hamuco.stored_side(cfg)
        few = enough_px(index, wide, margin)
        read = {px: Hands(index, px, margin) for px in (few, wide)}
        t = interleaved({px: (lambda hands=hands: hands.read(rows)) for px, hands in read.items()}, 5)
        size = {px: 3 * px ** 2 * cfg.batch_size * cfg.views / 1e6 for px in read}
        print(f"feed HanCo's 224 px pictures: squares of {few} px {1e3 * t[few] / 32:.1f} ms a picture and {size[few]:.0f} MB a step, of "
              f"{wide} px {1e3 * t[wide] / 32:.1f} ms and {size[wide]:.0f} MB: x{t[wide] / t[few]:.1f}, x{size[wide] / size[few]:.1f}")
    n, few = 512, 64                                       # moments of eight cameras, as HanCo has them
    rng = np.random.default_rng(0)
    shapes = {"joints": (21, 3), "uv": (21, 2), "uv_label": (21, 2), "confidence": (21,), "K": (3, 3), "pose": (48,), "shape": (10,),
              "trans": (3,), "cameras": (4, 4)}
    columns = {key: rng.random((8 * n, *shape), np.float32) for key, shape in shapes.items()}
    columns |= {"paths": np.full(8 * n, b"a.jpg"), "side": np.full(8 * n, "right"), "moment": np.repeat(np.arange(n).astype(str), 8),
                "camera": np.tile(np.arange(8), n), "box": np.tile(np.float32([60, 60, 104, 104]), (8 * n, 1))}
    data = Views(Hands(Index("hanco", ".", columns), 229, 2.2), 8)
    loop = lambda: [data.targets(torch.tensor([row])) for row in range(few)]
    t = interleaved({"columns": lambda: data.targets(torch.arange(n)), "rows": loop}, 3)
    rate = {"columns": n / t["columns"], "rows": few / t["rows"]}
    print(f"feed labels of HanCo's moments, for the mean hand before step 1: columns at once {rate['columns']:.0f} moments/s, one by one "
          f"{rate['rows']:.0f}: x{rate['columns'] / rate['rows']:.0f}; 16,384 of them {16384 / rate['columns']:.1f} s", flush=True)
    cfg, steps = peclr.Config(batch_size=16, micro_batch=1, workers=4), {}
    for name, ahead, take in (("all at once, 8 ahead", 8, list), ("one by one", 64, iter)):
        reading.AHEAD = ahead
        start = time.perf_counter()
        for step, micro_batches in training_steps(Slow(), cfg, 0, 0, torch.device("cpu")):
            for _ in take(micro_batches):
                time.sleep(0.01)
            if step == 0:
                start = time.perf_counter()                    # the first waits for the workers to start
        steps[name] = (time.perf_counter() - start) / 5
    print(f"feed, a step of 16 micro-batches, 4 workers, simulated: {', '.join(f'{k} {v:.3f} s' for k, v in steps.items())}; "
          f"reading or computing alone 0.160 s")


BENCHES = {"feed": bench_feed, "launches": bench_launches, "precision": bench_precision, "mano": bench_mano,
           "render": bench_render, "score": bench_score, "ti_net": bench_ti_net, "hamuco": bench_hamuco,
           "handmim": bench_handmim, "peclr": bench_peclr, "rss": bench_rss, "start": bench_start}
COMMANDS = {"memory": bench_memory, "hours": bench_hours, "profile": bench_profile, "compile": bench_compile}    # these take words of their own


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        torch.set_num_threads(1)                    # its processor time is then a step's
        COMMANDS[sys.argv[1]](sys.argv[2:])
        return
    torch.set_num_threads(2)
    if set(sys.argv[1:]) - set(BENCHES):
        sys.exit(__doc__)
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()
