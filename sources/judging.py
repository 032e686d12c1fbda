"""What ends a stage: predictions, the mean pose, tables and pictures."""
from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import (
    Mano, Run, UserError, axis_angle_to_matrix, cpu_state, gather, load_checkpoint,
    matrix_to_axis_angle, open_out, origin, parse, place, rank, recall, save_checkpoint, say,
    score, settle, share, start, stored_config, summarise, to_device, view_intrinsics, world)
from hand import hand_mark
from hand.drawing import curve, draw_mesh, draw_side, draw_skeleton, label, sheet
from sources import batches, data_name, hand_for, open_data
from sources.synthetic import Cached, Synthetic

import torch
from torch import Tensor, nn


@torch.no_grad()
def predictions(model: nn.Module, data: Any, cfg: Any, device: torch.device
                ) -> Iterator[tuple[dict, dict]]:
    """(batch, prediction) over a data set; of several processes each takes every n-th sample.

    The model sees the batch keys in its USES, as far as they are there, and nothing else.
    """
    model.eval()
    mine = torch.arange(len(data))[rank()::world()]
    for batch in batches(data, [rows for rows in mine.split(64) if len(rows)], device, cfg.workers):
        yield batch, model.predict({key: batch[key] for key in model.USES if key in batch})


def evaluate(model: nn.Module, data: Any, cfg: Any, device: torch.device) -> dict[str, Tensor]:
    """Scores of every sample of a data set, {name: (N,) float64}, each sample once over all processes."""
    parts = [score(pred, batch) for batch, pred in predictions(model, data, cfg, device)]
    return gather(parts, len(data))


def mean_hand(data: Any, most: int = 16384) -> dict[str, Any]:
    """What a blind guess knows of a training set (of at most `most` samples, evenly spread).

    pose (48,) rad: of each joint the rotation nearest to the mean matrix; shape (10,); joints (21, 3) m,
    wrist-rooted; uv (21, 2) as a share of the picture's side; labels: hands with a pose or joints.
    """
    n = len(data)                                     # evenly spread: real sets are sorted by subject and scene
    parts = [data.targets(index) for index in torch.linspace(0, n - 1, min(n, most)).long().split(512)]
    t = {k: torch.cat([part[k] for part in parts]) for k in ("pose", "shape", "joints", "uv", "side_px")}
    mean = lambda x: x.double().nanmean(0).nan_to_num().float()
    R = axis_angle_to_matrix(t["pose"].double().unflatten(-1, (16, 3))).nanmean(0)
    U, _, Vh = torch.linalg.svd(R.nan_to_num() + 1e-9 * torch.eye(3, dtype=R.dtype))
    U = U * torch.linalg.det(U @ Vh).sign()[:, None, None] ** torch.tensor([0, 0, 1])
    known = t["joints"].isfinite().any(-1).any(-1) | t["pose"].isfinite().all(-1)
    return {"pose": matrix_to_axis_angle(U @ Vh).flatten().float(), "shape": mean(t["shape"]),
            "joints": mean(t["joints"] - t["joints"][:, :1]),
            "uv": mean(t["uv"] / t["side_px"][:, None, None]),
            "labels": round(float(known.double().mean()) * len(data))}


def mean_pose_scores(mean: dict[str, Any], data: Any, hand: Mano) -> dict[str, Tensor]:
    """The `mean_pose` row: raw errors of the mean joints, aligned errors of the hand in the mean pose.

    The mean of joints under free rotation is a ball, which no alignment can judge; so the aligned scores
    are those of `hand` (on the CPU, with the data set's tips) in the mean pose and shape.
    """
    R = axis_angle_to_matrix(mean["pose"].unflatten(-1, (16, 3)))[None]
    verts, joints = hand(R, mean["shape"][None])
    parts = []
    for index in torch.arange(len(data)).split(512):
        t = data.targets(index)
        many = lambda x: x.expand(len(index), *x.shape[-2:])
        guess = {"joints": many(mean["joints"]), "uv": many(mean["uv"]) * t["side_px"][:, None, None]}
        raw, posed = score(guess, t), score({"joints": many(joints), "verts": many(verts)}, t)
        parts.append(posed | {k: v for k, v in raw.items() if not k.startswith(("pa_", "f_"))})
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


@torch.no_grad()
def probe_error(model: nn.Module, encode: Callable[[Tensor], Tensor], cfg: Any, size: int,
                margin: float, device: torch.device) -> float:
    """Frozen probe: mm MPJPE of ridge regression from features to the joints of synthetic hands.

    512 hands to fit, 256 to judge, the same in every run of a size. `encode` takes stored pictures
    (B, 3, size, size) to (B, d); the ridge is a tenth of the features' variance.
    """
    model.eval()
    X, Y = [], []
    for part, count in (("train", 512), ("val", 256)):
        data = Synthetic(size, count, 0, part, margin=margin)
        data = Cached(data, Path(cfg.cache)) if device.type == "cpu" else data
        for batch in batches(data, list(torch.arange(count).split(64)), device, 0):
            X.append(encode(batch["image"]).double())
            Y.append((batch["joints"] - batch["joints"][:, :1]).double().flatten(1))
    X, Y = torch.cat(X).cpu(), torch.cat(Y).cpu()
    X = (X - X[:512].mean(0)) / X[:512].std(0).clamp(min=1e-6)
    kernel, mean = X @ X[:512].T / X.shape[1], Y[:512].mean(0)
    solved = torch.linalg.solve(kernel[:512] + 0.1 * torch.eye(512, dtype=X.dtype), Y[:512] - mean)
    guess = (kernel[512:] @ solved + mean).unflatten(1, (21, 3))
    return 1000 * float((guess - Y[512:].unflatten(1, (21, 3))).norm(dim=-1).mean())


COLUMNS = ("mpjpe_mm", "pa_mpjpe_mm", "auc", "mpvpe_mm", "pa_mpvpe_mm", "f_5", "f_15", "epe_2d_px_crop",
           "mpjpe_mm_frozen", "pa_mpjpe_mm_frozen", "epe_2d_px_crop_frozen")


def table(rows: dict[str, dict[str, float]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Markdown, one line a row; a score that a row lacks is a dash."""
    shown = [name for name in columns if any(name in row for row in rows.values())]
    digits = {name: 3 if "auc" in name or name.startswith("f_") else 2 for name in shown}
    lines = [["row", *shown], *([label, *(f"{row[name]:.{digits[name]}f}" if name in row else "-"
                                          for name in shown)] for label, row in rows.items())]
    width = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    return "\n".join("| " + " | ".join([line[0].ljust(width[0]), *(
        cell.rjust(w) for cell, w in zip(line[1:], width[1:]))]) + " |"
        for line in (lines[0], rule, *lines[1:]))


def write_results(path: Path, data: str, result: dict[str, Any]) -> None:
    """Add one entry (run, protocol, n, left_out, box_source, uses, rows) to a metrics.json."""
    content = json.loads(path.read_text()) if path.exists() else {"data": data, "results": []}
    same = lambda old: (old["run"], old["protocol"]) == (result["run"], result["protocol"])
    content["results"] = [old for old in content["results"] if not same(old)] + [result]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@torch.no_grad()
def draw_predictions(path: str | Path, models: dict[str, nn.Module], data: Any, errors: Tensor,
                     device: torch.device, each: int = 2, title: str = "MPJPE") -> None:
    """Write a sheet of the best, median and worst samples by `errors` (N,) mm, which may hold NaN.

    Columns: the picture, the truth, for each model its skeleton with its error in mm; of the last model
    the mesh, and the joints from the side with the truth in grey.
    """
    known = errors.isfinite().nonzero()[:, 0]
    if not len(known):
        say(f"{path}: no sample has a score, so no sheet was drawn")
        return
    order = known[errors[known].argsort()]
    middle = max(0, len(order) // 2 - each // 2)
    picked = torch.cat([order[:each], order[middle:middle + each], order[-each:]])
    batch = to_device(next(batches(data, [picked], device, 0)), device)
    rows = [[batch["image"][i], draw_skeleton(batch["image"][i], batch["uv"][i], batch["joints_ok"][i],
                                              batch["visible"][i], 256)] for i in range(len(picked))]
    for name, model in models.items():
        model.eval()
        pred = model.predict({key: batch[key] for key in model.USES})
        mm = score(pred, batch)["mpjpe_mm"]
        for i, row in enumerate(rows):
            drawn = draw_skeleton(batch["image"][i], pred["uv"][i], width=256)
            row.append(label(drawn, f"{mm[i]:.1f} mm"))
    K = view_intrinsics(batch)
    if "verts" in pred:
        verts = pred["verts"] + place(pred["joints"], pred["uv"], K)[:, None]
    for i, row in enumerate(rows):
        if "verts" in pred:
            row.append(draw_mesh(batch["image"][i], verts[i], model.mano.faces, K[i], width=256))
        row.append(draw_side(pred["joints"][i], 256, batch["joints"][i]))
    titles = ["input", "truth", *models, *(["mesh"] if "verts" in pred else []), "side, truth grey"]
    names = [f"{kind} {title}" for kind in ("best", "median", "worst") for _ in range(each)]
    sheet(path, rows, titles, names)


def launch(Config: type, method: str, argv: list[str] | None, about: str, quick: dict, variants: dict[str, str],
           run_stages: Callable[[dict[str, Any], Path, torch.device], None]) -> None:
    """The command line of a script that pre-trains and fine-tunes: options, device, folder, then its stages."""
    given = recall(parse(Config, argv, about, quick, variants))
    if given.get("data") and given.get("finetune") and not given.get("quick"):
        raise UserError("--data pre-trains and --finetune fine-tunes: one command runs one stage")
    cfg = settle(Config, given, "finetune" if given.get("finetune") else "pretrain", quick)
    device = start(cfg.device)
    share(cfg.batch_size, cfg.micro_batch)
    name = f"finetune-{data_name(cfg.finetune)}" if cfg.finetune else "-".join(map(data_name, cfg.data))
    with open_out(cfg.out, f"runs/{method}-{name}{'-quick' * cfg.quick}", cfg.resume) as out:
        run_stages(given, out, device)


def keep_best(run: Run, epoch: int, val: Any, cfg: Any, device: torch.device, about: dict[str, Any]
              ) -> dict[str, float]:
    """After an epoch of fine-tuning: score `val`; best.pt, unless an earlier epoch was better there.

    `about` has what the file says beside weights and options: method, row, mean (see `mean_hand`).
    Without a validation split the last epoch counts. Returns the errors to log.
    """
    scores = summarise(evaluate(run.model, val, cfg, device))[0] if len(val) else {}
    now, past = scores.get("mpjpe_mm", math.nan), run.memo.get("curve", [])
    run.memo["curve"] = [*past, now]
    if rank() == 0 and (not any(x < now for x in past) or math.isnan(now)):
        save_checkpoint(run.folder / "best.pt", about | {
            "cfg": dataclasses.asdict(cfg), "epoch": epoch + 1, "model": cpu_state(run.model),
            "hand": hand_mark(cfg.mano)})
    return {f"val_{k}": v for k, v in scores.items() if k in ("mpjpe_mm", "pa_mpjpe_mm")}


def report(cfg: Any, out: Path, names: list[str], device: torch.device,
           build: Callable[[Any], nn.Module], side: int, margin: float) -> None:
    """Score the best checkpoint of each row on the test split: table, metrics.json, pictures.

    A row's networks are OUT/finetune-NAME and, with scores that end in _frozen, OUT/probe-NAME.
    OUT/finetune.pt is the last row's, the fine-tuned one where there are both.
    """
    found = {(name, stage): load_checkpoint(file) for name in names for stage in ("probe", "finetune")
             if (file := out / f"{stage}-{name}" / "best.pt").is_file()}
    last = list(found.values())[-1]
    if rank() == 0:
        save_checkpoint(out / "finetune.pt", last)                          # whatever the test split holds
    test = open_data(cfg, (cfg.finetune,), "test", side, margin, device)
    if not len(test):
        say(f"wrote {out}/finetune.pt; {cfg.finetune} has no test split, so nothing was scored")
        return
    hand = hand_for(cfg.finetune, cfg.mano)
    blind, n, left_out = summarise(mean_pose_scores(last["mean"], test, hand))
    rows, models = {"mean_pose": blind} | {name: {} for name in names}, {}
    if "scratch" not in names:
        say("scratch: not run (--finetune without --init)")
    for (name, stage), content in found.items():
        model = build(stored_config(type(cfg), content["cfg"])).to(device)
        model.load_state_dict(content["model"])
        scores = evaluate(model, test, cfg, device)
        means, n, left_out = summarise(scores)
        rows[name] |= {k + "_frozen" * (stage == "probe"): v for k, v in means.items()}
        models[name] = model
    if rank() != 0:
        return
    size = sum(p.numel() for p in model.parameters()) / 1e6
    gains = [f"{name} {1 - row['mpjpe_mm'] / blind['mpjpe_mm']:.0%}" for name, row in rows.items()
             if name != "mean_pose" and {"mpjpe_mm"} <= row.keys() & blind.keys()]
    say("\n" + table(rows))
    say(f"{n:,} test samples scored, {left_out} left out; MPJPE is wrist-rooted; one seed ({cfg.seed}); "
        f"{size:.1f} M parameters; boxes from {test.box_source}; the network sees "
        f"{', '.join(sorted(model.USES))}"
        + f"; relative gain over the mean pose: {', '.join(gains)}" * bool(gains))
    write_results(out / "metrics.json", cfg.finetune, {
        "run": out.name, "protocol": "ours", "n": n, "left_out": left_out, "box_source": test.box_source,
        "uses": sorted(model.USES), "rows": rows})
    for name in names:
        say(f"{name}: from {next(origin(c['cfg']['init']) for (n, _), c in found.items() if n == name)}")
    memo = {f"{name}, frozen" if stage == "probe" else name:
            load_checkpoint(out / f"{stage}-{name}" / "last.pt")["memo"].get("curve", []) for name, stage in found}
    curve(out / "curve.png", {name: (range(1, 1 + len(mm)), mm) for name, mm in memo.items()},
          "validation MPJPE while fine-tuning", "epoch", "mm")
    if "mpjpe_mm" in scores:
        draw_predictions(out / "predictions.png", models, test, scores["mpjpe_mm"], device)
    say(f"wrote {', '.join(sorted(str(file) for file in out.glob('*.*')))}")
