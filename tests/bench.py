"""Speed and memory, as ratios against a baseline measured in the same run: python tests/bench.py [NAME ...]

    mano      our layer against smplx 0.1.28 on the same model (`pip install --no-deps smplx`); "not run" without
    render    synthetic images a second at 64, 128 and 256 px, everything included, and the bar
    score     joint scores of 3,960 samples in one batch against a loop with one SVD a sample
    ti_net    12 encoder passes a sample against the 27 that Algorithm 1 writes; decoder and warp share

Run by hand on a quiet machine: two threads that share a core with another program say nothing.
"""
from __future__ import annotations

import lzma
import pickle
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

# common before torch: it settles how threads wait
from common import MANO_SHAPES, Mano, Synthetic, axis_angle_to_matrix, load_mano, score
import ti_net

import numpy as np
import torch


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
    bars = {("forward", 64): 1.6, ("forward", 1024): 2.5, ("joints", 64): 3.0, ("joints", 1024): 8.0,
            ("backward", 64): 1.4, ("backward", 1024): 2.2}
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

    t = interleaved({"batch": lambda: score(pred, truth), "loop": loop}, 3)
    print(f"score 3,960 samples: {1e3 * t['batch']:.0f} ms, one by one {1e3 * t['loop']:.0f} ms: "
          f"x{t['loop'] / t['batch']:.1f}")


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


def main() -> None:
    torch.set_num_threads(2)
    names = sys.argv[1:] or ["mano", "render", "score", "ti_net"]
    for name in names:
        {"mano": bench_mano, "render": bench_render, "score": bench_score, "ti_net": bench_ti_net}[name]()


if __name__ == "__main__":
    main()
