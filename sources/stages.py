"""What begins and ends a stage: command line, mean hand, probe, choice of an epoch, report."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import (
    N_JOINTS, UserError, axis_angle_to_matrix, cpu_state, load_checkpoint, matrix_to_axis_angle,
    parse, rank, save_checkpoint, say, score, settle, share, start, summarise)
from hand import hand_mark
from hand.drawing import curve
from sources import Source, Targets, batches, data_name, hand_for, open_data, scored_split
from sources.judging import Exam, Row, assess, predictions
from sources.loader import gather
from sources.predictors import Net, scored_on
from sources.course import COURSE, SCORING
from sources.progress import Run
from sources.recipes import origin, stored_config
from sources.runs import open_out, recall, remember
from sources.sheets import best_median_worst, draw_rows
from sources.synthetic import Cached, Synthetic
from sources.tables import STAGE, Means, for_screen, gain, table, write_results

import torch
from torch import Tensor, nn


# ---- Before --------------------------------------------------------------------------------------


def launch(Config: type, method: str, argv: list[str] | None, about: str, quick: dict,
           variants: dict[str, str],
           run_stages: Callable[[dict[str, Any], Path, torch.device], None]) -> None:
    """The command line of a script with two stages: options, device, folder, then its stages."""
    given = recall(Config, parse(Config, argv, about, quick, variants))
    if given.get("data") and given.get("finetune") and not given.get("quick"):
        raise UserError("--data pre-trains and --finetune fine-tunes: one command runs one stage")
    cfg = settle(Config, given, "finetune" if given.get("finetune") else "pretrain", quick)
    device = start(cfg.device)
    share(cfg.batch_size, cfg.micro_batch)
    name = "-".join(map(data_name, cfg.data))
    name = f"finetune-{data_name(cfg.finetune)}" if cfg.finetune else name
    with open_out(cfg.out, f"runs/{method}-{name}{'-quick' * cfg.quick}", cfg.resume) as out:
        given = given if cfg.out else recall(Config, given | {"out": str(out)})
        run_stages(remember(out, given), out, device)


def mean_hand(data: Targets, most: int = 16384) -> dict[str, Any]:
    """What a blind guess knows of a training set (of at most `most` samples, evenly spread).

    pose (48,) rad: of each joint the rotation nearest to the mean matrix; shape (10,); joints (21,
    3) m, wrist-rooted; uv (21, 2) as a share of the picture's side, of 2D labels where no truth is
    known; labels: hands with a pose or joints. The views of a moment count as pictures.
    """
    n = len(data)                                     # real sets are sorted by subject and scene
    parts = [_pictures_of(data.targets(rows))
             for rows in torch.linspace(0, n - 1, min(n, most)).long().split(512)]
    t = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    views = len(t["side_px"]) / min(n, most)
    R = axis_angle_to_matrix(t["pose"].double().unflatten(-1, (16, 3))).nanmean(0)
    U, _, Vh = torch.linalg.svd(R.nan_to_num() + 1e-9 * torch.eye(3, dtype=R.dtype))
    U = U * torch.linalg.det(U @ Vh).sign()[:, None, None] ** torch.tensor([0, 0, 1])
    known = t["joints"].isfinite().any(-1).any(-1) | t["pose"].isfinite().all(-1)

    def mean(x: Tensor) -> Tensor:
        return x.double().nanmean(0).nan_to_num().float()

    return {"pose": matrix_to_axis_angle(U @ Vh).flatten().float(), "shape": mean(t["shape"]),
            "joints": mean(t["joints"] - t["joints"][:, :1]),
            "uv": mean(t["uv"] / t["side_px"][:, None, None]),
            "labels": round(float(known.double().mean()) * n * views)}


def _pictures_of(t: dict) -> dict[str, Tensor]:
    """The targets that `mean_hand` wants, of pictures: the views of moments join the first axis."""
    out = {key: t[key] for key in ("pose", "shape", "joints", "uv", "side_px")}
    if "uv_label" in t:
        out["uv"] = torch.where(t["uv"].isnan(), t["uv_label"], t["uv"])
    if "view_ok" not in t:
        return out
    V = t["view_ok"].shape[1]
    return {key: x.repeat_interleave(V) if key == "side_px" else x.flatten(0, 1)
            for key, x in out.items()}


# ---- During --------------------------------------------------------------------------------------


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
            X.append(encode(batch["image"]).cpu().double())
            Y.append((batch["joints"] - batch["joints"][:, :1]).cpu().double().flatten(1))
    X, Y = torch.cat(X), torch.cat(Y)
    X = (X - X[:512].mean(0)) / X[:512].std(0).clamp(min=1e-6)
    kernel, mean = X @ X[:512].T / X.shape[1], Y[:512].mean(0)
    solved = torch.linalg.solve(kernel[:512] + 0.1 * torch.eye(512, dtype=X.dtype), Y[:512] - mean)
    guess = (kernel[512:] @ solved + mean).unflatten(1, (N_JOINTS, 3))
    return 1000 * float((guess - Y[512:].unflatten(1, (N_JOINTS, 3))).norm(dim=-1).mean())


def evaluate(model: nn.Module, data: Source, cfg: Any, device: torch.device) -> dict[str, Tensor]:
    """Scores of every sample of a data set, {name: (N,) float64}, over all processes."""
    parts = [score(pred, batch) for batch, pred in predictions(model, data, cfg, device)]
    return gather(parts, len(data))


def keep_best(run: Run, epoch: int, val: Any, cfg: Any, device: torch.device, about: dict[str, Any]
              ) -> dict[str, float]:
    """After an epoch of fine-tuning: score `val`; best.pt, unless an earlier epoch did better.

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


# ---- After ---------------------------------------------------------------------------------------


def report(cfg: Any, folder: Path, row: str, device: torch.device,
           build: Callable[[Any], nn.Module], side: int, margin: float) -> None:
    """Score the best checkpoint of a stage on the `scored_split`: table, metrics.json, pictures.

    `folder` is the stage's, finetune-NAME or probe-NAME in the run's: its checkpoint becomes the
    run's finetune.pt, whatever the test split holds. Scores of a probe end in _frozen.
    """
    out = folder.parent
    best = load_checkpoint(folder / "best.pt")
    if rank() == 0:
        save_checkpoint(out / "finetune.pt", best)
    split = scored_split(cfg.finetune)
    COURSE.begin(SCORING)
    test = open_data(cfg, (cfg.finetune,), split, side, margin, device)
    if not len(test):
        say(f"wrote {out}/finetune.pt; {cfg.finetune} has no {split} split, so nothing was scored")
        return
    exam = Exam(test, cfg.finetune, hand_for(cfg.finetune, cfg.mano), scored_on(device),
                cfg.workers)
    options = stored_config(type(cfg), best["cfg"])
    model = build(options).to(device)
    model.load_state_dict(best["model"])
    net = Net(str(out), best["method"], model, options, row, best["mean"], side, margin)
    judged, _ = assess(exam, net, mean=best["mean"])
    frozen = "_frozen" * folder.name.startswith("probe-")
    means = {"mean_pose": judged["mean_pose"].means(),
             row: {metric + frozen: value for metric, value in judged[row].means().items()}}
    if rank() == 0:
        _conclude(cfg, out, exam, judged[row], means, split)
        say(f"{row}: from {origin(options.init)}")
        _draw(folder, row, judged[row])


def _conclude(cfg: Any, out: Path, exam: Exam, row: Row, means: Means, split: str) -> None:
    """Print the table and what belongs beside it, and write metrics.json."""
    n = row.count("scored ours")
    left_out, uses = len(row.errors) - n, sorted(row.net.model.USES)
    if "scratch" not in means and not cfg.quick:
        say("scratch: not run (--finetune without --init)")
    say("\n" + for_screen(table(means, STAGE), "metrics.json"))
    better = gain(means, "mean_pose")
    chosen = " (the epoch was chosen on them)" * (split == "val")
    say(f"{n:,} {split} samples scored{chosen}, {left_out} left out; MPJPE is wrist-rooted; one "
        f"seed ({cfg.seed}); {row.net.millions} parameters; boxes from {exam.data.box_source}; the "
        f"network sees {', '.join(uses)}" + f"; {better}" * bool(better))
    write_results(out / "metrics.json", cfg.finetune, {
        "run": out.name, "split": split, "protocol": "ours", "n": n, "left_out": left_out,
        "box_source": exam.data.box_source, "uses": uses, "rows": means})


def _draw(folder: Path, row: str, judged: Row) -> None:
    """curve.png of a stage's validation errors and predictions.png, in the run's folder."""
    out = folder.parent
    errors = load_checkpoint(folder / "last.pt")["memo"].get("curve", [])
    name = f"{row}, frozen" if folder.name.startswith("probe-") else row
    curve(out / "curve.png", {name: (range(1, 1 + len(errors)), errors)},
          "validation MPJPE while fine-tuning", "epoch", "mm")
    picked, kinds = best_median_worst(judged.errors)
    if len(picked):
        draw_rows(out / "predictions.png", {row: judged}, picked, kinds,
                  f"The test samples that {row} does best, in the middle and worst.")
    else:
        say(f"{out}/predictions.png: no sample has a score, so no sheet was drawn")
    say(f"wrote {', '.join(sorted(str(file) for file in out.glob('[!.]*.*')))}")
