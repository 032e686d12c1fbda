"""What README shows, made again: python tests/reproduce.py [RUN ...]

Writes tests/pictures/synthetic.png and, given run folders, sheet.png and the table of their comparison. README's other
tables are the last ones that each script's --quick prints.
"""
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hand.drawing import draw_skeleton, sheet
from sources.synthetic import Synthetic
import eval as judge

import torch


def compare(runs: list[str]) -> None:
    """The same synthetic hands under several runs, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        judge.main([*runs, "--data", "synthetic:calm", "--sheet", "--out", folder])
        shutil.copy(Path(folder) / "sheet.png", Path(__file__).parent / "pictures")


def main() -> None:
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
