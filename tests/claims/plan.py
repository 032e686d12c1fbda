"""PLAN.md as data: what a claim is, the one recipe of all rows, the commands that make a row."""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
UNIT = 131_072                         # pictures through the network at budget 1


@dataclass(frozen=True)
class Scale:
    """How large everything is; a test makes it tiny."""

    unit: int = UNIT                   # pictures of budget 1
    pictures: int = 16_384             # unlabelled set, of which the labels are a share
    tuned: int = 81_920                # pictures that a fine-tuning sees, whatever the share; Tuning.times
    side: int = 64                     # of the network's input, px
    probed: int = 8_192                # hands that the ridge probe is fitted to
    device: str = "cpu"                # where networks are trained
    cnn: str = "resnet10"
    vit: str = "vit_mini"              # of HandMIM and iBOT


@dataclass(frozen=True)
class Weights:
    """A pre-training: its script and what its command says beside the recipe of all rows."""

    script: str
    words: tuple[str, ...] = ()
    share: float = 1.0                 # of the unlabelled set
    data: str = "synthetic"


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning of every row of a claim: measures are called after it."""

    name: str
    share: float                       # of the labels
    words: tuple[str, ...] = ()
    times: int = 1                     # as long as Scale.tuned says


@dataclass(frozen=True)
class Row:
    """One line of a table; None: random weights. `words` go to its fine-tuning."""

    name: str
    weights: Weights | None = None
    words: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()    # where not the claim's
    rate: float = 0.0                  # of a row of calibration


@dataclass(frozen=True)
class Comparison:
    """Row and measure that are to be lower than another row and measure."""

    says: str
    better: tuple[str, str]
    than: tuple[str, str]
    paper: str                         # its gain and where it stands
    least: float                       # smallest gain that counts, percent of `than`


@dataclass(frozen=True)
class Claim:
    """What a `claim NAME` runs and says."""

    name: str
    title: str
    script: str                        # whose head and crop all rows share
    rows: tuple[Row, ...]
    compared: tuple[Comparison, ...]
    probe: bool = False
    tunings: tuple[Tuning, ...] = ()
    budgets: tuple[float, ...] = (1,)
    tests: tuple[str, ...] = ("synthetic",)       # where fine-tuned rows are scored
    first_seed: int = 0
    minutes: float = 0                 # of a core, a row and seed beyond its pre-training
    chooser: str = ""                  # of its rate: calibrate-CHOOSER; empty: calibrate-SCRIPT
    monitors: tuple[str, ...] = ()     # of pre-training, shown beside the scores
    also: tuple[str, ...] = ()         # measures that are shown and not compared
    beside: tuple[tuple[str, str, str], ...] = ()      # rows that are shown: title, the row whose lines have them, their scores' prefix


# ---- The one recipe of all rows ------------------------------------------------------------------

SEEDS = 3
SHARE = 0.25                           # the small share of labels; see PLAN.md, Calibration
PLAIN = ("--workers", "0", "--save-minutes", "2")
VIEWS = {"peclr": 2, "ti_net": 12, "handmim": 2}       # pictures a sample sends through the encoder
BATCH = {"peclr": 128, "ti_net": 64, "handmim": 64}
RECIPE = {                             # what a short run on a CPU forces, once for all rows
    "peclr": (),
    "ti_net": ("--decoder-width", "32", "--probe-every", "0"),
    "handmim": ("--lr", "8e-3", "--teacher-tau", "0.008", "--prototypes", "512",
                "--head-hidden", "256", "--decoder-width", "16", "--probe-every", "0"),
    "hamuco": ("--alpha", "0.1", "--gamma", "10", "--augment", "0.1"),
}
TUNE = ("--batch-size", "64", "--micro-batch", "64")
GRID = {"peclr": (5e-4, 1.5e-3, 4.5e-3), "ti_net": (5e-4, 1.5e-3, 4.5e-3),
        "handmim": (1e-4, 3e-4, 1e-3), "hamuco": (3e-4, 1e-3, 3e-3)}
LABELS_ALONE = ("canonpose", "lt_algebraic")           # learn from 2D labels: no picture goes through them
MINUTES = {"peclr": 6.5, "ti_net": 8, "handmim": 16, "hamuco": 23, "canonpose": 4, "lt_algebraic": 2}      # of a core, at budget 1


def backbone_of(script: str, scale: Scale) -> str:
    """The network of a script's rows."""
    return scale.vit if script == "handmim" else scale.cnn


def samples_of(weights: Weights, scale: Scale) -> int:
    """Pictures in the unlabelled set; of HaMuCo moments, whose views together are as many."""
    of = 1 if weights.script in VIEWS else views_of(weights.words)
    return round(weights.share * scale.pictures / of)


def _number(words: tuple[str, ...], flag: str, default: int) -> int:
    """What a flag says, or the default."""
    return int(words[words.index(flag) + 1]) if flag in words else default


def views_of(words: tuple[str, ...]) -> int:
    """HaMuCo's cameras: four, or what --views says."""
    return _number(words, "--views", 4)


def rounds_of(words: tuple[str, ...]) -> int:
    """HaMuCo's rounds, each a training of its own."""
    return _number(words, "--rounds", 1)


def batch_of(weights: Weights, scale: Scale) -> int:
    """Samples of a step. HaMuCo's moments make 32 pictures, so that rows of other cameras take as many steps."""
    batch = BATCH.get(weights.script) or 32 // views_of(weights.words)
    return min(batch, samples_of(weights, scale))


def epochs_of(weights: Weights, budget: float, scale: Scale) -> int:
    """The whole epochs that come nearest to a budget, at least one."""
    views = VIEWS.get(weights.script) or views_of(weights.words)
    return max(1, round(budget * scale.unit / (views * samples_of(weights, scale))))


def pictures_of(weights: Weights, budget: float, scale: Scale) -> int:
    """Pictures that go through the network in training, forward and backward."""
    views = VIEWS.get(weights.script) or views_of(weights.words)
    if weights.script in LABELS_ALONE:
        return 0
    n, batch = samples_of(weights, scale), batch_of(weights, scale)
    return rounds_of(weights.words) * views * max(1, n // batch) * batch * epochs_of(weights, budget, scale)


def momentum(steps: int) -> float:
    """Of HandMIM's and iBOT's teacher at first: a hundredth of its start is left (handmim.py, 1)."""
    return round(max(0.0, min(0.996, 1 - 2 * math.log(100) / steps)), 4)


# ---- Commands ------------------------------------------------------------------------------------


def pretrain_words(weights: Weights, seed: int, budget: float, out: Path | str, cache: Path | str,
                   scale: Scale, rate: float = 0.0) -> list[str]:
    """The command that makes weights: words behind the interpreter, the script first.

    `rate` is HaMuCo's, the one that was chosen on single views; the others have their scripts' own.
    """
    script = weights.script
    if script in LABELS_ALONE:
        data = ["--data", weights.data] if weights.data != "synthetic" else []        # their default: so stand their first lines
        return [f"tests/claims/{script}.py", *data, "--samples", str(samples_of(weights, scale)), "--image-size", str(scale.side),
                "--seed", str(seed), "--out", str(out), "--cache", str(cache)]
    n, epochs = samples_of(weights, scale), epochs_of(weights, budget, scale)
    given = [script + ".py", "--data", weights.data, "--samples", str(n), "--epochs", str(epochs),
             "--image-size", str(scale.side), "--seed", str(seed), "--out", str(out), "--cache",
             str(cache), "--device", scale.device, "--backbone",
             backbone_of(script, scale), *PLAIN, *RECIPE[script]]
    batch = batch_of(weights, scale)
    given += ["--batch-size", str(batch), "--micro-batch", str(batch)]
    if script == "handmim":
        steps = epochs * max(1, n // batch)
        given += ["--teacher-momentum", str(momentum(steps))]
    if script == "hamuco":
        given += ["--lr", f"{rate:g}"]
        given += [] if "--views" in weights.words else ["--views", "4"]
        if "single-view" not in weights.words:
            given += ["--warm-epochs", str(epochs // 4)]
    return given + [*weights.words]


def tune_words(claim: Claim, row: Row, tuning: Tuning, seed: int, init: Path | str,
               out: Path | str, cache: Path | str, scale: Scale, rate: float) -> list[str]:
    """The command that fine-tunes a row; `init` is its weights' file, or random, `rate` the claim's."""
    epochs = max(1, round(tuning.times * scale.tuned / (tuning.share * scale.pictures)))
    return [claim.script + ".py", "--init", str(init), "--finetune", "synthetic", "--samples",
             str(scale.pictures), "--label-fraction", f"{tuning.share:g}", "--epochs", str(epochs),
             "--lr", f"{rate:g}", "--image-size", str(scale.side),
             "--seed", str(seed), "--out", str(out), "--cache", str(cache), "--row", row.name,
             "--device", scale.device, "--backbone", backbone_of(claim.script, scale), *PLAIN, *TUNE, *tuning.words, *row.words]


# ---- Results -------------------------------------------------------------------------------------


def key(line: dict) -> tuple[str, int, float]:
    """Which row, seed and budget a line of results is of."""
    return line["row"], line["seed"], line["budget"]


# ---- Costs ---------------------------------------------------------------------------------------


def without_pictures(row: Row) -> bool:
    """Whether a row has no budget: nothing is pre-trained, or nothing on pictures."""
    return row.weights is None or row.weights.script in LABELS_ALONE


def budgets_of(claim: Claim, row: Row, asked: float | None = None) -> tuple[float, ...]:
    """The budgets of a row; 0 where nothing is pre-trained, so that one result serves them all."""
    if without_pictures(row):
        return (0,)
    return (asked,) if asked else row.budgets or claim.budgets


def minutes_of(claim: Claim, row: Row, budget: float) -> tuple[float, float]:
    """Estimated core-minutes of a row and seed: its pre-training, and what comes after."""
    if row.weights is None:
        return 0, claim.minutes
    minutes = 8 if "single-view" in row.weights.words else MINUTES[row.weights.script]
    return (budget or 1) * minutes * rounds_of(row.weights.words), claim.minutes
