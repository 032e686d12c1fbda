"""Tables of rows: means and intervals, paired differences, seeds; and the files they go to."""
from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError, whole_file
from sources import data_name
from sources.judging import Row
from sources.recipes import key_of, recipe
from sources.tally import interval, is_mean

import numpy as np
import torch

# Columns of `ours` in a table of eval.py, and of a stage; the other metrics go to files. A screen
# shows the first of them, see `for_screen`.
MAIN = ("mpjpe_mm", "pa_mpjpe_mm", "epe_2d_px", "n_mpjpe_mm", "abs_mpjpe_mm", "auc", "mpvpe_mm",
        "pa_mpvpe_mm", "f_5", "f_15", "pck_2d_20", "auc_2d")
STAGE = ("mpjpe_mm", "pa_mpjpe_mm", "mpjpe_mm_frozen", "pa_mpjpe_mm_frozen", "epe_2d_px_crop",
         "mpvpe_mm", "pa_mpvpe_mm", "auc", "f_5", "f_15", "epe_2d_px_crop_frozen")
ABOUT = ("parameters", "images/s, batch 1", "images/s, batch 64", "labels", "seed", "keys given")
SCREEN = 100                                       # columns of letters that tables may take

Means = dict[str, dict[str, float]]                # {row: {metric: number}}


# ---- Text ----------------------------------------------------------------------------------------


def digits(metric: str, value: float) -> str:
    """A number as tables show it: shares with three digits, mm, px and percent with two."""
    share = "auc" in metric or metric.startswith(("f_", "pck"))
    return f"{value:.{3 if share else 2}f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    width = [max(map(len, column)) for column in zip(head, *lines)]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    text = [[line[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(line[1:], width[1:]))]
            for line in (head, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (text[0], rule, *text[1:]))


def for_screen(text: str, file: str) -> str:
    """A text whose tables are cut to the first columns that fit a screen.

    Below each the columns are named that are left out, and the `file` that has them.
    """
    out: list[str] = []
    lines = [*text.split("\n"), ""]
    fits, left_out = 0, []
    for line in lines:
        cells = line[2:-2].split(" | ") if line.startswith("| ") else []
        if cells and not fits:                                       # the head; all lines are alike
            ends = list(itertools.accumulate(len(cell) + 3 for cell in cells))
            fits = max(2, sum(end + 1 <= SCREEN for end in ends))
            left_out = [cell.strip() for cell in cells[fits:]]
        if cells:
            line = "| " + " | ".join(cells[:fits]) + " |"
        elif fits:
            out += [f"further columns in {file}: {', '.join(left_out)}"] * bool(left_out)
            fits = 0
        out.append(line.replace("\\*", "*"))
    return "\n".join(out[:-1])


def table(means: Means, columns: Sequence[str],
          spans: dict[str, dict[str, tuple[float, float]]] | None = None) -> str:
    """A line a row, with the columns that some row has; a score that a row lacks is a dash.

    `spans` {row: {metric: (low, high)}} stand in brackets behind the means.
    """
    shown = [m for m in columns if any(m in row for row in means.values())]
    lines = []
    for name, row in means.items():
        cells = []
        for m in shown:
            span = (spans or {}).get(name, {}).get(m, ())
            text = digits(m, row[m]) if m in row else "-"
            cells.append(text + f" [{', '.join(digits(m, x) for x in span)}]" * bool(span))
        lines.append([name, *cells])
    return markdown(["row", *shown], lines)


def gain(means: Means, base: str) -> str:
    """How much of a base row's error each other row takes away, "" where nothing can be said."""
    found = means.get(base, {})
    metric = next((m for m in ("mpjpe_mm", "epe_2d_px") if m in found), "")
    better = [f"{name} {1 - row[metric] / found[metric]:.0%}" for name, row in means.items()
              if metric in row and name not in ("mean_pose", base)]
    return f"relative gain in {metric} over {base}: {', '.join(better)}" * bool(better)


# ---- Rows beside each other ----------------------------------------------------------------------


def px_compare(rows: dict[str, Row], spec: str) -> bool:
    """Whether px mean the same in all rows: rendered ones are as large as each network stores."""
    sizes = {(row.net.side, row.net.margin) for row in rows.values() if row.net}
    return data_name(spec) != "synthetic" or len(sizes) == 1


def shown_metrics(rows: dict[str, Row], protocol: str, spec: str) -> list[str]:
    """The metrics that a table of a protocol has columns for."""
    some = dict.fromkeys(itertools.chain(*(row.means(protocol) for row in rows.values())))
    shown = [m for m in (MAIN if protocol == "ours" else some) if m in some]
    return [m for m in shown if px_compare(rows, spec) or m not in ("epe_2d_px", "auc_2d")]


def score_table(rows: dict[str, Row], protocol: str, spec: str) -> str:
    """Means with their 95 % intervals, a line a row."""
    shown = shown_metrics(rows, protocol, spec)
    spans = {name: {m: row.tallies[protocol].interval(m) for m in shown
                    if m in row.means(protocol) and is_mean(m)} for name, row in rows.items()}
    return table({name: row.means(protocol) for name, row in rows.items()}, shown, spans)


def difference(mine: Row, theirs: Row, protocol: str, metric: str) -> str:
    """A cell: difference of two rows on the same samples, its 95 % interval, * where that lacks 0.

    A row that scored other samples has no difference, nor has an absolute error where one of the
    two was given the true wrist.
    """
    a, b = mine.tallies[protocol], theirs.tallies[protocol]
    absolute = metric.startswith("abs_") and mine.rooted != theirs.rooted
    if metric not in a.means() or absolute:
        return "-"
    counts = [one.sums[metric][..., 1].sum(1) for one in (a, b)]
    if a.n != b.n or not torch.equal(*counts):                     # not paired
        return "other samples"
    low, high = interval((a.draws(metric) - b.draws(metric)).nanmean(1))
    apart = digits(metric, a.means()[metric] - b.means()[metric])
    return f"{apart} [{digits(metric, low)}, {digits(metric, high)}]" + "*" * (low > 0 or high < 0)


def differences(rows: dict[str, Row], protocol: str, base: str, spec: str) -> str:
    """Each row less `base`, metric by metric: "" where there is nothing to compare."""
    shown = [m for m in shown_metrics(rows, protocol, spec)
             if m in rows[base].means(protocol) and is_mean(m)][:6]
    lines = [[f"{name} - {base}", *(difference(row, rows[base], protocol, m) for m in shown)]
             for name, row in rows.items() if name != base and row.net]
    text = markdown(["paired difference", *shown], lines) + "\n\\* its interval does not hold 0"
    return text if lines else ""


def seed_groups(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Rows whose runs differ in nothing but the seed, two or more: {what to call them: names}."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        if row.net:
            key = key_of(recipe(dataclasses.asdict(row.net.cfg)))
            groups.setdefault((row.output, key), []).append(name)
    return {f"{output}, {len(names)} seeds": names for (output, _), names in groups.items()
            if len({rows[name].net.cfg.seed for name in names}) > 1}


def seed_table(rows: dict[str, Row], protocol: str, spec: str) -> str:
    """Mean and standard deviation over seeds; "" where every row has one."""
    shown = shown_metrics(rows, protocol, spec)
    lines = []
    for called, names in seed_groups(rows).items():
        every = [rows[name].means(protocol) for name in names]
        values = {m: np.array([one.get(m, math.nan) for one in every]) for m in shown}
        lines.append([called, *(
            f"{digits(m, x.mean())} ± {digits(m, x.std(ddof=1))}" if np.isfinite(x).all() else "-"
            for m, x in values.items())])
    return markdown(["mean ± std over seeds", *shown], lines) if lines else ""


def about_table(rows: dict[str, Row]) -> str:
    """What each row's network is and costs."""
    return markdown(["row", *ABOUT], [[name, *(row.about.get(key, "-") for key in ABOUT)]
                                      for name, row in rows.items() if row.net])


# ---- Files ---------------------------------------------------------------------------------------


def write_results(path: Path, data: str, result: dict[str, Any]) -> None:
    """Add one entry (run, split, protocol, n, left_out, box_source, uses, rows) to a metrics.json.

    An entry of the same run and protocol is replaced. UserError where the file is no metrics.json.
    """
    content: dict[str, Any] = {"data": data, "results": []}
    if path.exists():
        try:
            content = json.loads(path.read_bytes())
            known = [(old["run"], old["protocol"]) for old in content["results"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a metrics.json ({type(error).__name__}); move it away"
                            ) from None
        content["results"] = [old for old, name in zip(content["results"], known)
                              if name != (result["run"], result["protocol"])]
    content["results"].append(result)
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_csv(path: Path, rows: dict[str, Row]) -> None:
    """table.csv: a line a protocol, row and metric."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["protocol", "row", "run", "seed", "metric", "value", "low_95", "high_95",
                        "n"])
        for name, row in rows.items():
            run = (row.net.path, row.net.cfg.seed) if row.net else ("", "")
            for protocol, one in row.tallies.items():
                spans = one.intervals()
                for metric, value in one.means().items():
                    low, high = spans.get(metric, ("", ""))
                    lines.writerow([protocol, name, *run, metric, value, low, high,
                                    row.count(f"scored {protocol}")])
