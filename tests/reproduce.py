"""What README shows, made again: python tests/reproduce.py

Writes tests/pictures/synthetic.png. The table is the last one that `python ti_net.py --quick` prints.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import Synthetic, draw_skeleton, sheet

import torch


def main() -> None:
    batch = Synthetic(192, samples=64, part="test").batch(torch.arange(64))
    clear = (batch["visible"].float().mean(1) > 0.5).nonzero()[:15, 0].tolist()
    drawn = [draw_skeleton(batch["image"][i], batch["uv"][i], visible=batch["visible"][i]) if k % 2
             else batch["image"][i] for k, i in enumerate(clear)]
    path = Path(__file__).parent / "pictures" / "synthetic.png"
    sheet(path, [drawn[k:k + 5] for k in range(0, 15, 5)])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
