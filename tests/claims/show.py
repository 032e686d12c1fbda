"""The claims' tables: on the screen, as a picture, and between two marks of README.md."""
from __future__ import annotations

from pathlib import Path

from claims.plan import ROOT, SEEDS, Claim, budgets_of, key, minutes_of
from claims.rows import CLAIMS, CORE, FURTHER
from claims.sitting import RESULTS, lines, told
from claims.verdict import Verdict, line_of, verdicts

import numpy as np

CAPTION = """Synthetic hands at 64 px, freely turned but where a title says otherwise. Budget 1 is 131,072 pictures through the network. A gain is what
the first of two rows has less of error than the second, in percent: mean and deviation over seeds, 95 % intervals over seeds and over test
hands. The plan, `tests/claims/PLAN.md`, says what counts as shown; it was made before the first result, but for claims whose title says
that they were asked after one. "not run" stands until three seeds are there. Rows: tuned with a tenth of the labels, a quarter (small) or
all; area is the mean validation error over the epochs; probe, class and patch are ridge regressions on frozen features, dimensions their
participation ratio; L_ord to residual and L_pose to agreement are monitors of pre-training (`collapse_monitors` in `ti_net.py` and
`handmim.py`)."""
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"


def needed(claim: Claim, found: list[dict], budget: float | None = None) -> float:
    """Core-minutes that a claim's rows still need; weights that rows share count once."""
    total, made = 0.0, set()
    for row in claim.rows:
        for b in budgets_of(claim, row, budget):
            for seed in range(claim.first_seed, claim.first_seed + (1 if claim.first_seed else SEEDS)):
                if (row.name, seed, b) in map(key, found):
                    continue
                before, after = minutes_of(claim, row, b)
                total += after + before * ((row.weights, row.rate, b, seed) not in made)
                made.add((row.weights, row.rate, b, seed))
    return total


def number(x: float, digits: int = 1) -> str:
    """As a table shows it; a dash where there is none."""
    return "-" if np.isnan(x) else f"{x:.{digits}f}"


def spread(v: Verdict) -> str:
    """Mean gain over seeds +- their standard deviation, percent."""
    deviation = f" ± {np.std(v.gains, ddof=1):.1f}" if len(v.gains) > 1 else ""
    return f"{v.gain:+.1f}{deviation}" if v.gains else "-"


def between(interval: tuple[float, float]) -> str:
    """An interval in percent."""
    return "-" if np.isnan(interval).any() else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def word(v: Verdict) -> str:
    """The verdict, and of how many seeds there are where some are missing."""
    return v.word if len(v.seeds) in (0, *range(SEEDS, 99)) else f"{v.word} ({len(v.seeds)} of {SEEDS} seeds)"


def table(claim: Claim, results: Path = RESULTS) -> str:
    """A claim in markdown: a line for each comparison and budget, then one for each row."""
    found = lines(claim, results)
    out = [f"**{claim.title}**", "",
           "| claim | budget | mm or px, against | paper's gain | ours, % | over seeds | over hands | verdict |",
           "|---|---:|---:|---|---:|---:|---:|---|"]
    for compared in claim.compared:
        for v in verdicts(claim, compared, found):
            pair = f"{number(v.better)} / {number(v.than)}" if v.seeds else "-"
            out.append(f"| {compared.says} | {v.budget:g} | {pair} | {compared.paper} | {spread(v)} | "
                       f"{between(v.over_seeds)} | {between(v.over_hands)} | {word(v)} |")
    if not claim.compared:
        out = out[:1]
    if found:
        out += ["", rows_table(claim, found), "", provenance(found)]
    known = set(map(key, found))
    other = sum(key(line) not in known for line in told(claim, results))
    if other:
        out += ["", f"{other} lines of `tests/claims/{claim.name}.jsonl` are of commands that the plan no longer has, and are not counted."]
    left = needed(claim, found)
    if left:
        state = "Still to run" if found else "Not run"
        out += ["", f"{state}: `python tests/reproduce.py claim {claim.name}`, about {left / 60:.1f} "
                    "core-hours."]
    return "\n".join(out)


def provenance(found: list[dict]) -> str:
    """Rows, seconds, machine and dates behind a table."""
    seconds = sum(sum(line["seconds"].values()) for line in found)
    machines = sorted({line["machine"] for line in found})
    dates = sorted({line["date"] for line in found})
    precision = sorted({name for line in found for name in line["precision"]})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (f"{len(found)} rows and seeds, {seconds:,} s, {' and '.join(precision) or 'nothing trained'} "
            f"on {'; '.join(machines)}; {span}.")


def rows_table(claim: Claim, found: list[dict]) -> str:
    """Every row's scores, mean and deviation over seeds, in the measures that are compared, and its monitors."""
    names = list(dict.fromkeys(name for c in claim.compared for _, name in (c.better, c.than)))
    names += [name for name in dict.fromkeys(name for line in found for name in line["scores"])
              if name.endswith(("_dimensions", "_mean_pose_mpjpe_mm")) or not claim.compared]
    titles = [name if name.startswith("L_") else name.replace("_", " ") for name in (*names, *claim.monitors)]
    out = [f"| row | budget | seeds | {' | '.join(titles)} |", "|---|---:|---:|" + "---:|" * len(titles)]
    for row in claim.rows:
        for b in sorted({line["budget"] for line in found if line["row"] == row.name}):
            mine = [line_of(found, row, seed, b) for seed in sorted({x["seed"] for x in found})]
            mine = [line for line in mine if line]
            cells = [over_seeds([line["scores"][name] for line in mine if name in line["scores"]]) for name in names]
            cells += [over_seeds([line["monitors"][name] for line in mine if name in line.get("monitors", {})], 2)
                      for name in claim.monitors]
            out.append(f"| {row.name} | {f'{b:g}' if b else '-'} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(out)


def over_seeds(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


# ---- README --------------------------------------------------------------------------------------


def readme_block(results: Path = RESULTS) -> str:
    """What stands between the marks."""
    claims = (*CORE, *FURTHER)
    parts = [table(claim, results) for claim in claims if lines(claim, results)]
    if parts:
        parts.insert(0, CAPTION)
    rest = [claim for claim in claims if not lines(claim, results)]
    if rest:
        out = ["| not run yet | command | core-hours, three seeds |", "|---|---|---:|"]
        for claim in rest:
            out.append(f"| {claim.title} | `python tests/reproduce.py claim {claim.name}` | "
                       f"{needed(claim, []) / 60:.1f} |")
        parts.append("\n".join(out))
    return "\n\n".join(parts)


def with_block(text: str, block: str) -> str:
    """README's text with a new block between the marks; ValueError where it lacks them."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"README.md: has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def write_readme() -> None:
    """Put the present results into README.md."""
    file = ROOT / "README.md"
    file.write_text(with_block(file.read_text(), readme_block()))


# ---- Pictures ------------------------------------------------------------------------------------


def draw(claim: Claim, out: Path, results: Path = RESULTS) -> list[Path]:
    """Gains with their intervals, and validation curves where rows were tuned: OUT/NAME-*.png."""
    from hand.drawing import CURVE_COLOURS, curve, figure
    found, files = lines(claim, results), []
    out.mkdir(parents=True, exist_ok=True)
    judged = [(f"{c.says}, {v.budget:g}", v) for c in claim.compared
              for v in verdicts(claim, c, found) if v.gains]
    if judged:
        files.append(out / f"{claim.name}-gains.png")
        with figure(files[-1], 7.5, 0.8 + 0.3 * len(judged)) as axes:
            for k, (_, v) in enumerate(reversed(judged)):
                axes.plot(v.gains, [k] * len(v.gains), "o", color=CURVE_COLOURS[0], ms=4)
                axes.plot(v.over_hands, [k, k], color=CURVE_COLOURS[0])              # NaN draws nothing
            axes.axvline(0, color="#888888", lw=1)
            axes.set_yticks(range(len(judged)), [name for name, _ in reversed(judged)], fontsize=7)
            axes.set_xlabel("gain in percent: seeds, and 95 % over test hands")
    for tuning in claim.tunings:
        name = f"{tuning.name}_curve_mm"
        series = {}
        for row in claim.rows:
            for b in sorted({line["budget"] for line in found if line["row"] == row.name}):
                mine = [line_of(found, row, seed, b) for seed in sorted({x["seed"] for x in found})]
                curves = [line["groups"][name] for line in mine if line and name in line["groups"]]
                if curves:
                    label = row.name + f", {b:g}" * bool(b)
                    series[label] = (range(1, 1 + len(curves[0])), np.mean(curves, 0).tolist())
        if series:
            files.append(out / f"{claim.name}-{tuning.name}.png")
            curve(files[-1], series, f"validation MPJPE, {tuning.share:.0%} of the labels", "epoch", "mm")
    return files


def plan_table() -> str:
    """What each claim costs, in core-hours."""
    out = ["| claim | rows | budgets | core-hours, 3 seeds |", "|---|---:|---|---:|"]
    for claim in CLAIMS.values():
        budgets = sorted({b for row in claim.rows for b in budgets_of(claim, row)} - {0}) or [0]
        out.append(f"| `{claim.name}` | {len(claim.rows)} | {', '.join(f'{b:g}' for b in budgets)} | "
                   f"{needed(claim, []) / 60:.1f} |")
    return "\n".join(out)
