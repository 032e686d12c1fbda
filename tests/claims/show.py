"""The claims' tables: on the screen, as a picture, and between the marks of README.md."""
from __future__ import annotations

import re
from pathlib import Path

from claims.plan import ROOT, SEEDS, Claim, budgets_of, key, minutes_of
from claims.rows import CLAIMS, CORE, FURTHER
from claims.sitting import RESULTS, lines, told
from claims.verdict import Verdict, line_of, verdicts

import numpy as np

MARKS = re.compile(r"(<!-- claims: ([\w -]+) -->).*?(<!-- /claims -->)", re.DOTALL)
METRICS = ("pa_mpjpe_mm", "n_mpjpe_mm", "mpjpe_mm", "2d_px")          # the first that a measure's name ends with


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
        planned = verdicts(claim, compared, found)
        there = [v for v in planned if v.seeds] or planned[:1]
        for v in there:
            pair = f"{number(v.better)} / {number(v.than)}" if v.seeds else "-"
            waiting = [f"{other.budget:g}" for other in planned if other not in there] if v is there[-1] and v.seeds else []
            says = word(v) + (f"; at {', '.join(waiting)} not run" if waiting else "")
            out.append(f"| {compared.says} | {v.budget:g} | {pair} | {compared.paper} | {spread(v)} | "
                       f"{between(v.over_seeds)} | {between(v.over_hands)} | {says} |")
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
    machines = sorted({line["machine"] for line in found})                # a GPU's name is in it (sitting.machine)
    dates = sorted({line["date"] for line in found})
    precision = sorted({name for line in found for name in line["precision"]})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (f"{len(found)} rows and seeds, {seconds:,} s, {' and '.join(precision) or 'nothing trained'} "
            f"on {'; '.join(machines)}; {span}.")


def rows_table(claim: Claim, found: list[dict]) -> str:
    """Every row's scores, mean and deviation over seeds, in the measures that are compared, and its monitors.

    Below them stand the rows `Claim.beside`: the mean pose, HaMuCo's triangulated labels.
    """
    names = [name for c in claim.compared for _, name in (c.better, c.than)] + [*claim.also]
    besides = tuple(f"{prefix}_" for *_, prefix in claim.beside)
    names = [name for name in dict.fromkeys(map(_column, names)) if not name.startswith(besides)]
    names += [name for name in dict.fromkeys(name for line in found for name in line["scores"])
              if name.endswith("_dimensions") or not claim.compared]
    titles = [name if name.startswith("L_") else name.replace("_", " ") for name in (*names, *claim.monitors)]
    out = [f"| row | budget | seeds | {' | '.join(titles)} |", "|---|---:|---:|" + "---:|" * len(titles)]
    for row in claim.rows:
        for b in sorted({line["budget"] for line in found if line["row"] == row.name}):
            mine = [line_of(found, row, seed, b) for seed in sorted({x["seed"] for x in found})]
            mine = [line for line in mine if line]
            scores = [{_column(name): x for name, x in line["scores"].items()} for line in mine]
            cells = [over_seeds([x[name] for x in scores if name in x]) for name in names]
            cells += [over_seeds([line["monitors"][name] for line in mine if name in line.get("monitors", {})], 2)
                      for name in claim.monitors]
            out.append(f"| {row.name} | {f'{b:g}' if b else '-'} | {len(mine)} | {' | '.join(cells)} |")
    for title, name, prefix in claim.beside:
        mine = [line for line in found if line["row"] == name]
        if mine:
            least = min(line["budget"] for line in mine)
            scores = [line["scores"] for line in mine if line["budget"] == least]
            cells = [over_seeds([x[key] for x in scores for key in _beside(column, prefix) if key in x]) for column in names]
            cells += ["-"] * len(claim.monitors)
            budget = f"{least:g}" if prefix.startswith("fusion") else "-"                  # labels and a mean pose have none
            out.append(f"| {title} | {budget} | {len(scores)} | {' | '.join(cells)} |")
    return "\n".join(out)


def _column(name: str) -> str:
    """Which column a score stands in: a single-view network's output is its single hand, triangulated labels are fused ones."""
    return name.replace("single_view_", "single_", 1).replace("dlt_learnt_", "fusion_", 1)


def _beside(column: str, prefix: str) -> list[str]:
    """The scores that a row of `Claim.beside` has in a column, of which one exists at most.

    `mean_pose` stands in every column but N-MPJPE's, which divides by a bone that has nearly no length in a mean of turned hands;
    hands that were put together from all views below the fused hand and in 2D.
    """
    metric = next((name for name in METRICS if column.endswith(f"_{name}")), "")
    part = column.removesuffix(f"_{metric}")
    if prefix == "mean_pose":
        return [] if metric in ("", "n_mpjpe_mm") else [f"{part}_{prefix}_{metric}", f"{prefix}_{metric}"]
    return [f"{prefix}_{metric}"] if part == "fusion" or metric == "2d_px" else []


def over_seeds(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


# ---- README --------------------------------------------------------------------------------------


def not_run(results: Path = RESULTS) -> str:
    """A table of the claims that have no result yet."""
    out = ["| not run yet | command | core-hours, three seeds |", "|---|---|---:|"]
    for claim in (*CORE, *FURTHER):
        if not lines(claim, results):
            out.append(f"| {claim.title} | `python tests/reproduce.py claim {claim.name}` | {needed(claim, []) / 60:.1f} |")
    return "\n".join(out)


def with_tables(text: str, results: Path = RESULTS) -> str:
    """README's text with the present tables between its marks; ValueError where a claim has no place, or two.

    `<!-- claims: NAME ... -->` is followed by those of these claims that have results, `<!-- claims: rest -->` by the others.
    """
    claims = {claim.name: claim for claim in (*CORE, *FURTHER)}
    placed = [name for _, names, _ in MARKS.findall(text) for name in names.split()]
    wanted = [name for name, claim in claims.items() if lines(claim, results)]
    wrong = [name for name in {*claims, *placed, "rest"} if placed.count(name) != 1 or name not in (*claims, "rest")]
    if wrong:
        raise ValueError(f"README.md: marks must name each of these claims once: {', '.join(sorted(wrong))}")

    def filled(match: re.Match) -> str:
        tables = [not_run(results) if name == "rest" else table(claims[name], results)
                  for name in match[2].split() if name == "rest" or name in wanted]
        return "\n\n".join([match[1], *tables, match[3]])

    return MARKS.sub(filled, text)


def write_readme() -> None:
    """Put the present results into README.md."""
    file = ROOT / "README.md"
    file.write_text(with_tables(file.read_text()))


# ---- Pictures ------------------------------------------------------------------------------------


def draw(claim: Claim, out: Path, results: Path = RESULTS) -> list[Path]:
    """Gains with their intervals, and validation curves where rows were tuned: OUT/NAME-*.png."""
    from hand.drawing import CURVE_COLOURS, curve, figure
    found, files = lines(claim, results), []
    out.mkdir(parents=True, exist_ok=True)
    judged = [(f"{c.says}, {v.budget:g}: {word(v)}\npaper: {c.paper}", v) for c in claim.compared
              for v in verdicts(claim, c, found) if v.gains]
    if judged:
        files.append(out / f"{claim.name}-gains.png")
        with figure(files[-1], 8.5, 1.0 + 0.4 * len(judged)) as axes:
            for k, (_, v) in enumerate(reversed(judged)):
                axes.plot(v.over_seeds, [k, k], color="#888888", lw=1)              # NaN draws nothing
                axes.plot(v.over_hands, [k, k], color=CURVE_COLOURS[0], lw=3)
                axes.plot(v.gains, [k] * len(v.gains), "o", color=CURVE_COLOURS[1], ms=4)
            axes.axvline(0, color="#888888", lw=1)
            axes.set_yticks(range(len(judged)), [name for name, _ in reversed(judged)], fontsize=7)
            axes.set_xlabel("gain in percent of each seed; 95 %: thin over seeds, thick over hands", fontsize=7, loc="right")
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
