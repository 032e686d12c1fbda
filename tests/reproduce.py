"""What README shows, made again.

    python tests/reproduce.py               tests/pictures/synthetic.jpg
    python tests/reproduce.py RUN ...       sheet.jpg and the table of some runs' comparison
    python tests/reproduce.py labels        how far triangulated synthetic labels are from the truth
    python tests/reproduce.py claim NAME ... [--seeds N] [--budget X] [--jobs N] [--hours H] [--device D]
                                            what tests/claims/PLAN.md compares, going on where it was
                                            stopped; names: core, further, calibrate, or single ones
    python tests/reproduce.py readme        the claims' tables of README.md, from their result files
    python tests/reproduce.py tables        every table and figure of the four papers, with its command
"""
import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as judge
import hamuco
from common import UserError, n_mpjpe, pa_mpjpe
from hand.drawing import draw_skeleton, save_picture, sheet
from sources.synthetic import Synthetic

from claims import papers, show
from claims.plan import SEEDS, Claim, Scale
from claims.rows import CALIBRATE, CLAIMS, CORE, FURTHER
from claims.sitting import Place, all_of, begun, sit, stop_at_a_signal

import torch
from PIL import Image
from scipy.stats import spearmanr

CLAIM_GROUPS = {"core": CORE, "further": FURTHER, "calibrate": CALIBRATE}


def compare(runs: list[str]) -> None:
    """The same synthetic hands under several runs, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        judge.main([*runs, "--data", "synthetic:calm", "--sheet", "--out", folder])
        save_picture(Path(__file__).parent / "pictures" / "sheet.jpg", Image.open(Path(folder) / "sheet.png"))


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
    print("N-MPJPE / PA-MPJPE mm; the paper's MPJPE / PA-MPJPE, 8 views: dlt 16.8 / 13.2, ransac 12.3 / 9.8")
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


def chosen(names: list[str]) -> list[Claim]:
    """The claims that a command line names, each once."""
    found: dict[str, Claim] = {}
    for name in names:
        if name not in CLAIM_GROUPS and name not in CLAIMS:
            raise SystemExit(f"claim {name}: choose from {', '.join([*CLAIM_GROUPS, *CLAIMS])}")
        found |= {claim.name: claim for claim in CLAIM_GROUPS.get(name) or [CLAIMS[name]]}
    return list(found.values())


def claim(words: list[str]) -> int:
    """Run what is not done of some claims, then print and draw their tables."""
    parser = argparse.ArgumentParser(prog="reproduce.py claim")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--budget", type=float, metavar="X", help="in the place of the plan's budgets")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes of one thread each")
    parser.add_argument("--hours", type=float, default=math.inf, metavar="H",
                        help="start no row after so many; 0 prints what is there")
    parser.add_argument("--device", default="cpu", help="where networks are trained (default cpu)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    claims = chosen(args.names)
    stop_at_a_signal()
    if args.jobs > 1 and args.hours > 0:
        command = [__file__, "claim", *words, "--jobs", "1", "--worker"]
        failed = sum(code != 0 for code in all_of([begun(command) for _ in range(args.jobs)]))
    else:
        torch.set_num_threads(1)
        place = Place(scale=Scale(device=args.device))
        failed = sit(claims, args.seeds, args.budget, place, time.monotonic() + 3600 * args.hours)
    if args.worker:
        return int(failed > 0)
    for one in claims:
        print(f"\n{show.table(one)}")
        for file in show.draw(one, Place().runs):
            print(f"wrote {file}")
    return int(failed > 0)


def main() -> None:
    if sys.argv[1:2] == ["claim"]:
        try:
            sys.exit(claim(sys.argv[2:]))
        except KeyboardInterrupt:
            sys.exit(130 if "--worker" in sys.argv else "stopped; the same command goes on")
        except UserError as error:
            sys.exit(f"error: {error}")
    if sys.argv[1:] == ["readme"]:
        return show.write_readme()
    if sys.argv[1:] == ["tables"]:
        return print(papers.listing())
    if sys.argv[1:] == ["labels"]:
        return labels()
    if sys.argv[1:]:
        compare(sys.argv[1:])
    batch = Synthetic(192, samples=64, part="test").batch(torch.arange(64))
    clear = (batch["visible"].float().mean(1) > 0.5).nonzero()[:15, 0].tolist()
    drawn = [draw_skeleton(batch["image"][i], batch["uv"][i], visible=batch["visible"][i]) if k % 2
             else batch["image"][i] for k, i in enumerate(clear)]
    path = Path(__file__).parent / "pictures" / "synthetic.jpg"
    sheet(path, [drawn[k:k + 5] for k in range(0, 15, 5)], bones=True,
          note="Hands as they are rendered; in every second picture their key points, hidden ones hollow.")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
