"""What README shows, made again.

    python tests/reproduce.py               tests/pictures/synthetic.png
    python tests/reproduce.py RUN ...       sheet.png and the table of some runs' comparison
    python tests/reproduce.py labels        how far triangulated synthetic labels are from the truth
"""
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as judge
import hamuco
from common import n_mpjpe, pa_mpjpe
from hand.drawing import draw_skeleton, sheet
from sources.synthetic import Synthetic

import torch
from scipy.stats import spearmanr


def compare(runs: list[str]) -> None:
    """The same synthetic hands under several runs, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        judge.main([*runs, "--data", "synthetic:calm", "--sheet", "--out", folder])
        shutil.copy(Path(folder) / "sheet.png", Path(__file__).parent / "pictures")


def labels(moments: int = 256) -> None:
    """Noisy 2D labels of eight cameras, triangulated: HaMuCo's Table 3, without any network.

    The paper's labels are OpenPose's on HanCo. Freely turned hands, cameras all around, pictures of
    64 px (px are given on a 256 px crop, as the paper's).
    """
    side = round(64 * hamuco.CROP / hamuco.MARGIN)
    data = Synthetic(64, moments, 0, "test", 8, margin=hamuco.MARGIN,
                     detector=hamuco.CROP / hamuco.MARGIN)
    batches = [data.batch(index) for index in torch.arange(moments).split(32)]
    keys = ("uv", "uv_label", "confidence", "K", "cameras", "joints")
    uv, label, confidence, K, cameras, joints = (
        torch.cat([batch[key] for batch in batches]) for key in keys)
    error = 256 / side * (label - uv).norm(dim=-1)
    rho = spearmanr(error.flatten(), confidence.flatten()).statistic
    print(f"2D error of the labels {error.mean():.1f} px (median {error.median():.1f}); rank "
          f"correlation with the confidence {rho:.2f}")
    print("N-MPJPE / PA-MPJPE mm; the paper, 8 views: dlt 16.8 / 13.2, ransac 12.3 / 9.8")
    for views in (4, 8):
        some = torch.arange(0, 8, 8 // views)
        P = hamuco.projections(K[:, some], cameras[:, some])
        by_joint = label[:, some].transpose(1, 2)
        weight = confidence[:, some].transpose(1, 2)
        everywhere = torch.ones(len(P), views, dtype=torch.bool)
        _, ransac = hamuco.triangulate_robustly(label[:, some], P, everywhere, side)
        found = {"dlt": hamuco.triangulate(by_joint, P[:, None]),
                 "dlt_confidence": hamuco.triangulate(by_joint, P[:, None], weight),
                 "ransac": ransac}
        for name, X in found.items():
            guess = hamuco.to_cameras(X, cameras[:, some])[:, 0]
            scores = [1000 * float(score(guess, joints[:, 0]).nanmean()) for score in (n_mpjpe, pa_mpjpe)]
            print(f"{views} views  {name:15s} {scores[0]:5.1f} / {scores[1]:4.1f}")


def main() -> None:
    if sys.argv[1:] == ["labels"]:
        return labels()
    if sys.argv[1:]:
        compare(sys.argv[1:])
    batch = Synthetic(192, samples=64, part="test").batch(torch.arange(64))
    clear = (batch["visible"].float().mean(1) > 0.5).nonzero()[:15, 0].tolist()
    drawn = [draw_skeleton(batch["image"][i], batch["uv"][i], visible=batch["visible"][i]) if k % 2
             else batch["image"][i] for k, i in enumerate(clear)]
    path = Path(__file__).parent / "pictures" / "synthetic.png"
    sheet(path, [drawn[k:k + 5] for k in range(0, 15, 5)])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
