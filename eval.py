"""The roof: any checkpoint of the four papers against any data set, and your own pictures.

    python eval.py runs/ti_net-finetune-dexycb --data dexycb=DIR  a run folder or a .pt file
    python eval.py RUN RUN ... --data NAME --scratch RUN --sheet  a fair comparison
    python eval.py RUN RUN ... --curve label_fraction             error over an option of the runs
    python eval.py RUN --images DIR|PHOTO|VIDEO [--obj]           your own: overlays, JSON, meshes
    python eval.py RUN --data hanco=DIR --views 0 2 5             HaMuCo with some of the cameras
    python eval.py RUN --data cameras=DIR                         your rig: fused hands, JSON, .obj
    python eval.py RUN --data freihand:centre=DIR --submit        the file that its server reads
    python eval.py --inspect --data interhand=DIR                 is my data read right?

Judging prints a table with the mean-pose row, a 95 % interval beside each number (bootstrap over
samples), paired differences and the spread over seeds where runs differ in nothing else; it says
what a prediction looks like where it seems mirrored, or in other units, axes or joint order. Into
--out, by default RUN/eval-DATA, go metrics.json, table.md, table.csv, pck.png (share of joints
within a distance), joints.png, visibility.png, predictions.png (best, median and worst samples) and
with --sheet sheet.png. --curve reads metrics.json and config.json: `epoch` for TI-Net's Fig. 5,
`label_fraction` or `labels` for PeCLR's Fig. 6, `freeze_blocks` for HandMIM's Fig. 7,
`data_fraction` for HaMuCo's Fig. 3 a, and `views`, those --views tested with, for its Fig. 3 b.
Runs share a line where they differ in nothing but the seed. --images wants a folder, a picture or
a video (read by OpenCV); hands are those of labels.jsonl beside it, or what MediaPipe finds.

Protocols, each named beside its numbers; the code stands in the data set's own file in sources/
    ours            all labelled samples, wrist-rooted MPJPE, Procrustes with a proper rotation, the
                    data set's own joints
    dexycb          the tool kit's (dex-ycb-toolkit @64551b0): labelled frames, absolute,
                    root-relative and Procrustes errors, the last with reflections allowed; area
                    under the curve to 50 mm. Networks without a root are given the true one for
                    the absolute row
    interhand       the tool kit's (InterHand2.6M @5d0e456): the mean over 42 joints of each
                    joint's mean, wrists at zero, over all, single and interacting hands; mrrpe_mm,
                    the vector between the two wrists, where both are known and the network says
                    where they are
    intaghand       IntagHand's: middle MCP on middle MCP, scaled to the true bone wrist-middle MCP
    freihand        the official script's (lmb-freiburg/freihand @5ea4ab9): absolute errors in the
                    camera frame, no root taken away, and Procrustes with reflections; areas to
                    50 mm; F-scores. Mesh scores where there is a mesh. Networks without a root are
                    given the true one
    ho3d            the official script's (ho3d @2fd6ee1): as freihand, and st_mpjpe_mm: scaled by
                    the bone wrist-middle MCP (its joints 0 and 4), wrist on wrist. Needs
                    evaluation_xyz.json
    peclr           PeCLR's helper (dahiyaaneesh/peclr @f29f0a9): the same errors, Procrustes
                    without reflections, areas to 49.5 cm with a strict <
    yt3d            PeCLR's Table 3: the truth is pixels, so each true hand is scaled until its
                    bone 9-10 is as long as the mean hand's (--mano, or the built-in one);
                    Procrustes then, and px in 2D
    coco            COCO-WholeBody hands as mmpose scores them: mean error of all key points in px,
                    PCK within 0.2 of the annotated box's longer side (<), area of 20 thresholds
                    below 30 px
    hanco           HaMuCo's (zxz267/HaMuCo @6885b7a): scaled by one bone about the middle MCP, and
                    Procrustes with a proper rotation; every picture of every camera counts once
    h2o             H2O's: mean errors in the camera frame, unaligned, of left and of right hands.
                    Networks without a root are given the true one
    assembly101     AssemblyHands' (assemblyhands-toolkit @73fe963): the mean over 42 joints of each
                    joint's mean where it is visible, wrists at zero
    ti_net          TI-Net's (Mine268/TI-Net, test_DexYCB.py @7c7f2779): truth and prediction both
                    posed with the TRUE betas, MANO joints, every frame, unlabelled ones included
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# common before torch: it settles how threads wait
from common import (
    FINGERS, MANO_TO_OURS, MIDDLE_MCP, N_JOINTS, ROOT, Flags, Mano, UserError,
    axis_angle_to_matrix, barrier, guarded, invert, load_checkpoint, place, rank, say, start,
    transform, view_intrinsics)
from hand import hand_mark, user_hand
from hand.drawing import CURVE_COLOURS, draw_mesh, draw_skeleton, figure, label, sheet
from sources import (
    Hands, batches, data_name, hand_for, open_data, parse_data, read_index, scored_split)
from sources.exports import (
    Fused, bone_lengths, described, draw_moment, draw_photo, flat_name, obj_text, of_moment,
    overlay)
from sources.files import pictures_below
from sources.index import PICTURES, Index
from sources.interhand import INTERHAND_TO_OURS
from sources.judging import LIMITS, Exam, Row, assess
from sources.photos import VIDEOS, found_hands, frames_of, write_video
from sources.pictures import read_image
from sources.predictors import Net, answer, scored_on
from sources.protocols import PROTOCOLS, SUBMIT, SUBMITTED_PART
from sources.reading import to_device
from sources.sheets import best_median_worst, draw_rows
from sources.recipes import key_of, recipe, stored_config
from sources.tables import (
    about_table, differences, for_screen, gain, markdown, px_compare, score_table, seed_table,
    write_csv, write_results)
import hamuco
import handmim
import peclr
import ti_net

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

METHODS = {"ti_net": ti_net, "handmim": handmim, "peclr": peclr, "hamuco": hamuco}   # no others


# ---- Checkpoints ---------------------------------------------------------------------------------


def load(path: str | Path) -> tuple[nn.Module, Flags]:
    """A run folder or a finetune.pt -> (model, its Config). The model has USES and predict(batch).

    Raises UserError where there is no such file, or it is not one of ours.
    """
    net = load_net(path)
    return net.model, net.cfg


def load_net(path: str | Path, mano: str = "") -> Net:
    """As `load`, with what else the file holds; `mano` replaces the hand file that it names."""
    file = Path(path) / "finetune.pt" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(file)
    needed = {"method", "cfg", "model", "mean", "row"}
    if not isinstance(content, dict) or not needed <= set(content):
        raise UserError(f"{file}: holds no fine-tuned model; give a finetune.pt that a script here "
                        "wrote")
    if not {type(content["method"]), type(content["row"])} <= {str}:
        raise UserError(f"{file}: names a method or a row that is no word")
    if content["method"] not in METHODS:
        raise UserError(f"{file}: names the method {str(content['method'])[:40]!r}; known are "
                        f"{', '.join(METHODS)}")
    module = METHODS[content["method"]]
    try:
        cfg = stored_config(module.Config, content["cfg"])
        cfg = dataclasses.replace(cfg, mano=mano or cfg.mano)
        model = module.build(cfg)
        for name, value in content["model"].items():
            if value.is_complex() or not value.float().isfinite().all():
                raise TypeError(f"{name} holds what is no weight")
        model.load_state_dict(content["model"])
        other = content.get("hand", hand_mark(cfg.mano)) != hand_mark(cfg.mano)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file}: does not fit this version's {content['method']} "
                        f"({str(error).strip().splitlines()[-1][:120]})") from None
    if other and hasattr(model, "mano"):
        raise UserError(f"{file}: its mesh is another hand's than {user_hand(cfg.mano)[1]}; name "
                        "the MANO file it was trained with (--mano), or `--mano builtin`")
    frozen = isinstance(cfg, peclr.Config) and cfg.freeze                         # PeCLR, Tab. 1
    rig = hamuco.rig_of(cfg) if isinstance(cfg, hamuco.Config) else None
    return Net(str(path), content["method"], model, cfg, content["row"] + "-frozen" * frozen,
               content["mean"], module.stored_side(cfg), module.MARGIN, rig)


# ---- What a prediction looks like ----------------------------------------------------------------

FINGER = [list(range(4 * k + 1, 4 * k + 5)) for k in range(5)]
ORDERS = {                                    # where our joints stand in an order that others use
    "": tuple(range(N_JOINTS)),
    "MANO's joint order (index, middle, pinky, ring, thumb, then the tips)": MANO_TO_OURS,
    "MANO's joint order with the tips in MANO's order": (
        0, 13, 14, 15, 20, 1, 2, 3, 16, 4, 5, 6, 17, 10, 11, 12, 19, 7, 8, 9, 18),
    "InterHand2.6M's joint order (tips first, the wrist last)": INTERHAND_TO_OURS,
    "joints from tip to base in each finger": (0, *itertools.chain(*(f[::-1] for f in FINGER))),
    "joints from pinky to thumb": (0, *itertools.chain(*FINGER[::-1])),
    "joints level by level (all bases, ..., all tips)": peclr.RELEASED}
UNITS = {1000.0: "millimetres where metres are expected",
         0.001: "metres divided by 1,000 once too often",
         100.0: "centimetres where metres are expected"}
AXES = {(-1, 2, 3): "a mirrored hand (x has the wrong sign)", (1, -2, 3): "y pointing up",
        (1, -2, -3): "OpenGL axes (y up, z towards the viewer)",
        (1, 2, -3): "depth with the wrong sign",
        (-1, -2, -3): "all axes with the wrong sign",
        (-1, -2, 3): "a hand turned by 180 degrees in the picture"}


def looks_like(pred: dict, truth: dict) -> str:
    """A sentence where undoing a common mistake makes a prediction fit far better, else "".

    `pred` and `truth` as in `score`. Tried are units, the 48 ways of naming the axes and six joint
    orders. It must explain the samples: end below 0.9 x the error of the best constant hand and
    0.75 x its own. So a constant or untrained answer is accused of nothing; nor is one of fewer
    than 8 samples.
    """
    p, t = (x["joints"].detach().double().cpu() for x in (pred, truth))
    ok = truth["joints_ok"].cpu() & t.isfinite().all(-1)
    rows = ok[:, ROOT] & p.isfinite().flatten(1).all(1) & (ok.sum(1) > N_JOINTS // 2)
    p, t, ok = (x[rows][:512] for x in (p, t, ok))
    if len(p) < 8:
        return ""
    t = torch.where(ok[..., None], t - t[:, :1], math.nan)

    def typical(x: Tensor) -> float:
        return float((x - t).norm(dim=-1).nanmean(-1).median())

    def size(x: Tensor) -> Tensor:
        return torch.where(ok[..., None], x - x.mean(1, keepdim=True), 0).norm(dim=(1, 2)).median()

    plain = typical(p - p[:, :1])
    constant = typical(t.nanmean(0)) * len(p) / (len(p) - 1)
    ratio = float(size(p) / size(t.nan_to_num(0)))
    unit = next((u for u in UNITS if 0.5 < ratio / u < 2), 1.0)
    found = []
    for order, where in ORDERS.items():
        q = (p[:, list(where)] - p[:, where[0], None]) / unit
        signs = itertools.product((1, -1), repeat=3)
        for axes, sign in itertools.product(itertools.permutations((1, 2, 3)), signs):
            named = tuple(a * s for a, s in zip(axes, sign))
            turned = q[..., [a - 1 for a in axes]] * torch.tensor(sign, dtype=q.dtype)
            otherwise = AXES.get(named, f"axes named otherwise ({written(named)})")
            named_right = "" if named == (1, 2, 3) else otherwise
            wrong = [one for one in (UNITS.get(unit, ""), named_right, order) if one]
            found.append((typical(turned) * 1.02 ** len(wrong), wrong))      # the simpler, if alike
    error, wrong = min(found)
    if not wrong or error > 0.9 * constant or error > 0.75 * plain:
        return ""
    return (f"looks like {' and '.join(wrong)}: undone, the median MPJPE falls from "
            f"{1000 * plain:,.1f} to {1000 * error:,.1f} mm")


def written(axes: tuple[int, ...]) -> str:
    """(2, -1, 3) -> "y, -x, z"."""
    return ", ".join("-" * (a < 0) + "xyz"[abs(a) - 1] for a in axes)


# ---- One command: judge --------------------------------------------------------------------------


@dataclasses.dataclass
class Asked:
    """What a command asks of all its networks, checked."""

    spec: str
    split: str
    protocols: dict[str, Callable]           # beside `ours`
    ours: bool                               # whether its table is wanted
    submit: bool
    flags: Flags
    hand: Mano                               # with the joints that the data set means


def check_submission(spec: str, split: str, nets: list[Net]) -> None:
    """UserError where no server takes a data set, or its crops could know the truth."""
    name, part, folder = parse_data(spec)
    if name not in SUBMIT or split != "test" or len(nets) > 1:
        raise UserError(f"--submit: no server takes {name} {split}; it can be the test split of "
                        f"{', '.join(SUBMIT)}, for one run")
    wanted = SUBMITTED_PART.get(name, part)
    one_pass = (isinstance(nets[0].cfg, peclr.Config) and not nets[0].model.cfg.two_pass
                and name in SUBMITTED_PART)
    if part != wanted or one_pass:
        place = f"={folder}" if folder else ""
        more = " --two-pass" if isinstance(nets[0].cfg, peclr.Config) else ""
        raise UserError(f"--submit: the first crops must not come from the evaluation's own truth; "
                        f"give --data {name}:{wanted}{place}{more}")


def asked_for(args: argparse.Namespace, flags: Flags, nets: list[Net]) -> Asked:
    """UserError where the data set has no such protocol, or no server takes it."""
    head = nets[0]
    spec = args.data or head.cfg.finetune or head.cfg.data[0]
    name = data_name(spec)
    split = args.split or scored_split(spec)
    flags = dataclasses.replace(flags, mano=head.cfg.mano)
    if not args.data:
        flags = dataclasses.replace(flags, root=args.root or head.cfg.root,
                                    backgrounds=head.cfg.backgrounds)
    if args.submit:
        check_submission(spec, split, nets)
    known = PROTOCOLS.get(name, {})
    if unknown := set(args.protocol) - {"ours", *known}:
        raise UserError(f"--protocol {' '.join(sorted(unknown))}: {name} is judged by "
                        f"{', '.join(sorted({'ours', *known}))}")
    wanted = {p: f for p, f in known.items() if not args.protocol or p in args.protocol}
    hand = hand_for(spec, flags.mano)
    ours = not args.protocol or "ours" in args.protocol
    return Asked(spec, split, wanted, ours, args.submit, flags, hand)


def open_exam(net: Net, asked: Asked, device: torch.device) -> Exam:
    """The data set as a network stores it, its joints, and the protocols that are asked for."""
    data = open_data(asked.flags, (asked.spec,), asked.split, net.side, net.margin, device,
                     unlabelled="ti_net" in asked.protocols, rig=net.rig)
    if not len(data):
        raise UserError(f"{asked.spec} {asked.split}: holds no sample, so nothing can be scored")
    return Exam(data, asked.spec, asked.hand, scored_on(device), asked.flags.workers,
                asked.protocols, asked.submit)


def images_a_second(exam: Exam, net: Net, count: int) -> float:
    """Pictures predicted in a second in batches of `count` samples, median of three; no reading."""
    rows = torch.arange(count) % len(exam.data)
    batch = next(batches(exam.data, [rows], exam.device, 0))
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        with torch.no_grad():
            net(batch)
        if exam.device.type == "cuda":
            torch.cuda.synchronize(exam.device)
        taken.append(time.perf_counter() - began)
    return math.prod(batch["image"].shape[:-3]) / sorted(taken[1:])[1]


def about(net: Net, exam: Exam) -> dict[str, str]:
    """What stands beside a network's scores."""
    speed = {f"images/s, batch {b}": f"{images_a_second(exam, net, b):.0f}" for b in (1, 64)}
    return {"parameters": net.millions, "labels": f"{net.mean['labels']:,}",
            "seed": str(net.cfg.seed), "keys given": ", ".join(sorted(net.model.USES)), **speed}


def named(nets: list[Net], scratch: str) -> list[str]:
    """A name for each network's row: its own, with what tells it apart where two are alike."""
    names = ["scratch" if scratch and net.path == scratch else net.row for net in nets]
    out = []
    for net, name in zip(nets, names):
        alike = [other for other, theirs in zip(nets, names) if theirs == name]
        if scratch and net.path == scratch:
            alike = [net]                               # the one that others are compared with
        seeds = {other.cfg.seed for other in alike}
        tail = f", seed {net.cfg.seed}" if len(seeds) == len(alike) > 1 else f" ({net.folder.name})"
        out.append(name + tail * (len(alike) > 1))
    return out


def unused(rows: dict[str, Row], name: str, net: Net) -> str:
    """A row's name that no other row has: two runs may call their outputs alike."""
    numbered = (f"{name} of {net.path} {k}" for k in itertools.count(2))
    names = itertools.chain((name, f"{name} of {net.row}", f"{name} of {net.path}"), numbered)
    return next(candidate for candidate in names if candidate not in rows)


def prepared(args: argparse.Namespace) -> list[Net]:
    """The networks to judge; UserError where one cannot do what is asked."""
    paths = [*args.run, args.scratch] if args.scratch else args.run
    nets = [load_net(path, args.mano) for path in dict.fromkeys(paths)]
    if any(camera < 0 for camera in args.views) or len(set(args.views)) < len(args.views):
        raise UserError(f"--views {' '.join(map(str, args.views))}: cameras are counted from 0, "
                        "and none counts twice")
    if args.views == [0]:
        raise UserError("--views 0: leaves no camera; one number is how many of the first to take")
    for net in nets if args.views else ():
        if net.rig is None:
            raise UserError(f"--views: {net.method} sees one picture at a time")
        cameras = tuple(args.views if len(args.views) > 1 else range(args.views[0]))
        rig = net.rig._replace(views=max(net.rig.views, 1 + max(cameras)), cameras=cameras)
        net.rig = rig
    for net in nets if args.two_pass else ():
        if not isinstance(net.cfg, peclr.Config):
            raise UserError(f"--two-pass: {net.method} predicts in one pass")
        net.model.cfg = dataclasses.replace(net.cfg, two_pass=True)
        net.row += "-two_pass"
    return nets


def judge(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """All that is known of some checkpoints on one data set: tables, metrics.json, pictures."""
    nets = prepared(args)
    asked = asked_for(args, flags, nets)
    out = folder_for(args, nets[0], asked)
    exams: dict[tuple, Exam] = {}                     # one for all networks that store alike
    rows: dict[str, Row] = {}
    for net, called in zip(nets, named(nets, args.scratch)):
        stored = (net.side, net.margin, net.rig)
        if stored not in exams:
            exams[stored] = open_exam(net, asked, device)
        exam = exams[stored]
        net.model.to(device)
        found, kept = assess(exam, net, nets[0].mean if net is nets[0] else None)
        tail = called.removeprefix("scratch" if called == "scratch" else net.row)
        beside = about(net, exam)
        for output, row in found.items():
            row.about = beside
            name = called if output == net.row else output + tail
            rows[unused(rows, name, net) if row.net else output] = row
        if asked.submit:
            SUBMIT[data_name(asked.spec)](out, exam.data.index, kept)
    rows = {"mean_pose": rows.pop("mean_pose"), **rows}
    if rank() == 0:
        conclude(rows, asked, out, args.sheet)
    barrier()


def folder_for(args: argparse.Namespace, head: Net, asked: Asked) -> Path:
    """--out, or RUN/eval-DATA, or runs/compare-DATA; UserError where it cannot be written."""
    name = asked.spec.partition("=")[0].replace(":", "-")
    name += f"-{asked.split}" * (asked.split != "test") + "-two_pass" * args.two_pass
    name += f"-views-{'-'.join(map(str, head.rig.cameras))}" if args.views else ""
    alone = len(args.run) == 1
    out = Path(args.out or (head.folder / f"eval-{name}" if alone else f"runs/compare-{name}"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def conclude(rows: dict[str, Row], asked: Asked, out: Path, all_rows: bool) -> None:
    """Print and write what `judge` found; `all_rows` asks for sheet.png."""
    trained = {name: row for name, row in rows.items() if row.net}
    first = next(iter(trained.values()))
    texts = [sentence(name, row, asked) for name, row in trained.items()]
    if all(row.count("scored ours") == 0 for row in rows.values()):
        say("\n".join(texts))
        if not asked.submit:
            raise UserError(f"{asked.spec} {asked.split}: no sample has joints or key points to "
                            "score against; --images DIR predicts pictures without")
        draw_rows(out / "samples.png", rows, some_of(len(first.errors), 6), [""] * 6,
                  "Six samples, evenly spread.")
        say(f"wrote {out}/samples.png")
        return
    texts += judged(rows, asked, out)
    say("\n" + for_screen("\n\n".join(texts), f"{out}/table.md"))
    (out / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    write_csv(out / "table.csv", rows)
    pictures_of(rows, out, all_rows)
    say(f"\nwrote {', '.join(sorted(str(file) for file in out.glob('[!.]*.*')))}")


def sentence(name: str, row: Row, asked: Asked) -> str:
    """What a row is: the run, its samples, what it sees and was trained on."""
    n, lost = row.count("scored ours"), row.count("not made")
    left_out = len(row.errors) - n - row.count("absent")
    return (f"{name} = {row.net.path} on {asked.spec} {asked.split}: {n:,} samples scored, "
            f"{left_out:,} without truth" + f" or hand ({lost:,})" * bool(lost)
            + f"; boxes from {row.exam.data.box_source}; the network sees "
            f"{', '.join(sorted(row.net.model.USES))}; {row.about['parameters']} parameters; "
            f"trained on {row.net.mean['labels']:,} labelled hands, seed {row.net.cfg.seed}")


def judged(rows: dict[str, Row], asked: Asked, out: Path) -> list[str]:
    """The tables of all protocols as texts; they go to metrics.json too."""
    suspects = {name: found for name, row in rows.items() if (found := suspect(row))}
    texts = []
    for protocol in ["ours"] * asked.ours + list(asked.protocols):
        if not any(row.net and row.means(protocol) for row in rows.values()):
            files = "; a pose or regressed joints need the MANO files (--mano)"
            say(f"{protocol}: not run, no sample has what it needs"
                + files * (protocol in ("ti_net", "yt3d")))
            continue
        texts.append(protocol_text(rows, protocol, asked.spec))
        trained = [row for row in rows.values() if row.net]
        meshes = all("f_5_raw" in row.means(protocol) for row in trained)
        if protocol in ("freihand", "ho3d") and not meshes:
            texts.append(f"{protocol}: mesh scores are not applicable to a network without one")
        for path in dict.fromkeys(row.net.path for row in trained):
            mine = {name: row for name, row in rows.items() if not row.net or row.net.path == path}
            found = entry(path, protocol, asked, mine, suspects)
            write_results(out / "metrics.json", asked.spec, found)
    if not px_compare(rows, asked.spec):
        texts.append("px are left out: synthetic pictures are as large as each network stores them")
    texts += [about_table(rows), gains(rows)]
    return texts + [f"{name} {found}" for name, found in suspects.items()]


def protocol_text(rows: dict[str, Row], protocol: str, spec: str) -> str:
    """The tables of one protocol, and what belongs below them."""
    base = "scratch" if "scratch" in rows else next(name for name, row in rows.items() if row.net)
    counts = {row.count(f"scored {protocol}") for row in rows.values() if row.net} - {0}
    samples = " / ".join(f"{n:,}" for n in sorted(counts))
    given = [name for name, row in rows.items() if not row.rooted and any(
        metric.startswith("abs_") for metric in row.means(protocol))]
    parts = [f"{protocol} ({samples} samples, 95 % intervals over samples)",
             score_table(rows, protocol, spec), differences(rows, protocol, base, spec),
             seed_table(rows, protocol, spec),
             f"abs_: {', '.join(given)} do not say where the wrist is and are given the true one"
             * bool(given)]
    return "\n\n".join(filter(None, parts))


def entry(path: str, protocol: str, asked: Asked, mine: dict[str, Row], suspects: dict[str, str]
          ) -> dict[str, Any]:
    """What metrics.json says of a run under a protocol; `mine` are its rows and the mean pose."""
    row = next(row for row in mine.values() if row.net)
    n = row.count(f"scored {protocol}")
    rig, V = row.net.rig, len(row.errors) // len(row.exam.data)
    tested = {"views": list(rig.cameras or range(rig.views))[:V]} if rig else {}
    return {"run": path, "split": asked.split, "protocol": protocol, "n": n, **tested,
            "left_out": len(row.errors) - n - row.count("absent"),
            "box_source": row.exam.data.box_source, "uses": sorted(row.net.model.USES),
            "rows": {name: one.means(protocol) for name, one in mine.items()},
            "intervals": {name: one.tallies[protocol].intervals() for name, one in mine.items()},
            "looks_like": {name: suspects[name] for name in mine if name in suspects}}


def gains(rows: dict[str, Row]) -> str:
    """How much of the mean pose's and of scratch's error each row takes away."""
    means = {name: row.means() for name, row in rows.items()}
    missing = not any(name.startswith("scratch") for name in rows)
    said = ["scratch: not run (--scratch RUN)"] if missing else []
    said += [gain(means, "mean_pose"), gain(means, "scratch")]
    return "; ".join(filter(None, said))


def suspect(row: Row) -> str:
    """`looks_like` of the samples that a row kept; "" for the mean pose, which keeps none."""
    if not row.parts:
        return ""
    whole = {key: torch.cat([part[key] for part in row.parts]) for key in row.parts[0]}
    truth = {"joints": whole["true"], "joints_ok": whole["ok"]}
    return looks_like({"joints": whole["joints"]}, truth)


def some_of(n: int, count: int) -> Tensor:
    """`count` of n numbers, evenly spread."""
    return torch.linspace(0, n - 1, count).long()


def pictures_of(rows: dict[str, Row], out: Path, all_rows: bool) -> None:
    """Plots of all rows; predictions.png of the last row's best to worst; sheet.png."""
    plot_rows(out, rows)
    *_, (name, last) = ((name, row) for name, row in rows.items() if row.net)
    picked, kinds = best_median_worst(last.errors)
    what = "MPJPE" if last.unit == "mm" else "2D"
    draw_rows(out / "predictions.png", {name: last}, picked, [f"{kind} {what}" for kind in kinds],
              f"The samples that {name} does best, in the middle and worst.")
    if all_rows:
        base, errors = next((name, row.errors) for name, row in rows.items() if row.net)
        order = errors.argsort()[:int(errors.isfinite().sum())]
        count = min(5, len(order))
        shares = [f"{k:.0%}" for k in torch.linspace(0, 1, count).tolist()]
        draw_rows(out / "sheet.png", rows, order[some_of(len(order), count)], shares,
                  f"From {base}'s best sample (0%) to its worst (100%).")


# ---- Plots ---------------------------------------------------------------------------------------


def plot_rows(out: Path, rows: dict[str, Row]) -> None:
    """pck.png, joints.png and visibility.png of all rows in a folder; in mm without the wrist."""
    unit = "mm" if any(row.unit == "mm" for row in rows.values()) else "px"
    shown = {name: row for name, row in rows.items() if row.plots[unit].count("joints")}
    plot_pck(out / "pck.png", shown, unit)
    names = ["wrist", *(f"{finger} {k}" for finger in FINGERS for k in range(1, 5))]
    first = int(unit == "mm")
    with figure(out / "joints.png", 7.5) as axis:
        bars(axis, {name: row.plots[unit].points("joints")[first:] for name, row in shown.items()})
        axis.set_xticks(range(N_JOINTS - first), names[first:], rotation=60, ha="right", fontsize=8)
        title = "error by joint, base to tip" + ", wrist-rooted" * (unit == "mm")
        axis.set(ylabel=f"error, {unit}", title=title)
    plots = {name: row.plots[unit] for name, row in shown.items()}
    with figure(out / "visibility.png", 5) as axis:
        for drawn in bars(axis, {name: torch.cat([one.points("visible"), one.points("hidden")])
                                 for name, one in plots.items()}):
            axis.bar_label(drawn, fmt="%.1f", fontsize=8)
        visible, hidden = (next(iter(plots.values())).count(kind) for kind in ("visible", "hidden"))
        axis.set_xticks(range(2), [f"visible ({visible:,} joints)", f"hidden ({hidden:,})"])
        axis.margins(y=0.3)
        axis.set(ylabel=f"error, {unit}", title="error by visibility")


def bars(axis: Any, series: dict[str, Tensor]) -> list[Any]:
    """Bars of several rows beside each other, {name: (n,)}, with a legend; what is NaN has none."""
    width, drawn = 0.8 / len(series), []
    for k, (name, values) in enumerate(series.items()):
        at = np.arange(len(values)) + (k - (len(series) - 1) / 2) * width
        drawn.append(axis.bar(at, values.numpy(), width, label=name,
                              color=CURVE_COLOURS[k % len(CURVE_COLOURS)]))
    axis.legend(fontsize=8)
    return drawn


def plot_pck(path: Path, rows: dict[str, Row], unit: str) -> None:
    """Share of joints within 0-50 mm (px), rooted and, dashed, aligned; bands: 95 % intervals."""
    n = max(row.count("scored ours") for row in rows.values())
    with figure(path) as axis:
        for k, (name, row) in enumerate(rows.items()):
            colour, plots = CURVE_COLOURS[k % len(CURVE_COLOURS)], row.plots[unit]
            axis.plot(LIMITS, plots.points("pck"), color=colour, label=name)
            if unit == "mm":
                axis.plot(LIMITS, plots.points("pck_aligned"), "--", color=colour, lw=1)
            ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
            low, high = torch.nanquantile(plots.draws("pck"), ends, dim=0)
            axis.fill_between(LIMITS, low, high, color=colour, alpha=0.2, lw=0)
        axis.set(xlabel=f"error, {unit}", ylabel="share of joints", xlim=(0, 50), ylim=(0, 1),
                 title=f"PCK of {n:,} samples" + "; the wrist is left out, dashed: aligned" * (
                     unit == "mm"))
        axis.legend(fontsize=8)


# ---- Curves over runs ----------------------------------------------------------------------------


class Point(NamedTuple):
    """One number of one run."""

    row: str
    recipe: dict[str, Any]       # all that it was trained (and tested) with, but for the seed and x
    x: Any
    y: float


def run_points(path: str, field: str, metric: str) -> list[Point]:
    """What a finished run says of a metric over a field, from metrics.json and config.json.

    The field `epoch` gives the validation errors that the run logged; `labels` the hands learnt
    from; `views` how many cameras `eval.py --views` tested with. UserError where the folder holds
    no run, or nothing that has the field or the metric.
    """
    folder = Path(path)
    configs = {file.parent.name.partition("-")[2]: file for stage in ("train", "probe", "finetune")
               for file in sorted(folder.glob(f"{stage}-*/config.json"))}
    found: list[Point] = []
    try:
        results = json.loads((folder / "metrics.json").read_bytes())["results"]
        rows = next((r["rows"] for r in results if r["protocol"] == "ours"), results[0]["rows"])
        for row, file in configs.items():
            cfg = json.loads(file.read_bytes())["cfg"]
            outputs = (row, "single", "interaction", "fusion")
            same = recipe(cfg, (field, "label_fraction") if field == "labels" else (field,))
            if field == "views":
                found += [Point(name, same | tested, x, y) for name, tested, x, y
                          in tested_views(folder, metric) if name in outputs]
            elif field == "epoch":
                log = (file.parent / "log.jsonl").read_text(encoding="utf-8")
                lines = [json.loads(line) for line in log.splitlines()]
                found += [Point(row, same, line["epoch"], line[f"val_{metric}"]) for line in lines
                          if f"val_{metric}" in line and "epoch" in line]
            else:
                x = load_net(path).mean["labels"] if field == "labels" else cfg.get(field)
                x = " ".join(map(str, x)) if isinstance(x, list) else x
                found += [Point(name, same, x, one[metric]) for name, one in rows.items()
                          if name in outputs and metric in one and x is not None]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder}: is not the folder of a finished run "
                        f"({type(error).__name__}: {error})") from None
    if not found:
        raise UserError(f"{folder}: no row has the field {field!r} in config.json and {metric!r} "
                        "in metrics.json" + "; judge it with --views first" * (field == "views"))
    return found


def tested_views(folder: Path, metric: str) -> list[tuple[str, dict[str, Any], int, float]]:
    """(row, what was tested, number of cameras, metric) of a run's judgements: HaMuCo, Fig. 3 b.

    Cameras other than the first ones are another test, and so another line.
    """
    found = []
    for file in sorted(folder.glob("eval-*/metrics.json")):
        content = json.loads(file.read_bytes())
        for one in content["results"]:
            if one["protocol"] == "ours" and "views" in one:
                first = one["views"] == list(range(len(one["views"])))
                tested = {"tested on": f"{content['data']} {one['split']}",
                          "cameras": "the first" if first else str(one["views"])}
                found += [(name, tested, len(one["views"]), row[metric])
                          for name, row in one["rows"].items() if metric in row]
    return found


def lines_of(points: list[Point]) -> dict[str, dict[Any, list[float]]]:
    """Points as lines {name: {x: values}}; only runs that differ in nothing but the seed share one.

    Where rows of one name are several lines, the name says in what they differ.
    """
    alike: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        alike.setdefault(point.row, {})[key_of(point.recipe)] = point.recipe
    lines: dict[str, dict[Any, list[float]]] = {}
    for point in points:
        recipes = alike[point.row].values()
        options = dict.fromkeys(option for one in recipes for option in one)
        apart = [f"{option} {point.recipe.get(option)}" for option in options
                 if len({key_of({"": one.get(option)}) for one in recipes}) > 1]
        name = point.row + f" ({', '.join(apart)})" * bool(apart)
        lines.setdefault(name, {}).setdefault(point.x, []).append(point.y)
    return lines


def draw_curve(args: argparse.Namespace) -> None:
    """Error over a field, a line a row: the mean of its runs, bars from least to most."""
    points = [point for path in dict.fromkeys(args.run)
              for point in run_points(path, args.curve, args.metric)]
    lines = lines_of(points)
    out = Path(args.out or f"runs/curve-{args.curve}")
    out.mkdir(parents=True, exist_ok=True)
    every = {point.x for point in points}
    values = sorted(every, key=lambda x: (isinstance(x, str), x))
    numbers = not any(isinstance(x, (str, bool)) for x in values)
    where = {x: x if numbers else k for k, x in enumerate(values)}
    with figure(out / "curve.png") as axis:
        for name, line in lines.items():
            xs = [x for x in values if x in line]
            ys = np.array([np.mean(line[x]) for x in xs])
            reach = np.array([[y - min(line[x]), max(line[x]) - y] for x, y in zip(xs, ys)]).T
            at = [where[x] for x in xs]
            axis.errorbar(at, ys, reach, marker="o", ms=4, capsize=3, label=name)
        if not numbers:
            axis.set_xticks(list(where.values()), [str(x) for x in values])
        axis.set(xlabel=args.curve.replace("_", " "), ylabel=args.metric.replace("_", " "))
        axis.legend(fontsize=8)
    cells = [[name, *(f"{np.mean(line[x]):.2f} (n {len(line[x])})" if x in line else "-"
                      for x in values)] for name, line in lines.items()]
    text = markdown([f"{args.metric} over {args.curve}", *map(str, values)], cells)
    say(text if len(values) <= 20 else f"{len(values)} values of {args.curve}")
    (out / "curve.md").write_text(text + "\n", encoding="utf-8")
    with open(out / "curve.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["row", args.curve, args.metric], *(
            [name, x, y] for name, line in lines.items() for x in line for y in line[x])])
    say(f"wrote {out}/curve.png, curve.md, curve.csv")


# ---- Your own pictures ---------------------------------------------------------------------------

def hands_in(given: Path, cache: str) -> Index:
    """The hands of a folder of photos, or of one: labels.jsonl's, or those that MediaPipe finds.

    Unreadable photos and photos without a hand are named and counted. UserError where nothing is
    left.
    """
    if not given.exists():
        raise UserError(f"--images {given}: there is no such file or folder")
    root = given if given.is_dir() else given.parent
    if (root / "labels.jsonl").is_file():
        index = read_index("folder", "", str(root), "all", cache=Path(cache) / "index")
        if not given.is_dir():
            same = [index.path(row) == given.name for row in range(len(index))]
            index = index.take(np.array(same, bool))
            if not len(index):
                raise UserError(f"--images {given}: {root / 'labels.jsonl'} has no line for it")
    else:
        files = pictures_below(root) if given.is_dir() else [given.name]
        index = found_hands(root, files, Path(cache) / "index", "images")
    say(index.summary())
    if not len(index):
        raise UserError(f"--images {given}: holds no picture of a hand ({' '.join(PICTURES)})")
    return index


def with_cameras(index: Index) -> np.ndarray:
    """Give every hand a K, from the photo's diagonal where it has none; which were known, (N,)."""
    K = np.array(index.columns.get("K", np.full((len(index), 3, 3), np.nan)), float)
    known = np.isfinite(K).all((1, 2))
    sizes: dict[str, tuple[int, int]] = {}
    for row in np.flatnonzero(~known):
        path = index.path(row)
        if path not in sizes:
            sizes[path] = read_image(Path(index.root, path)).shape[1::-1]
        w, h = sizes[path]
        K[row] = [[math.hypot(w, h), 0, (w - 1) / 2], [0, math.hypot(w, h), (h - 1) / 2], [0, 0, 1]]
    index.columns["K"] = K.astype(np.float32)
    return known


def chosen_output(every: dict[str, dict]) -> str:
    """Of several outputs the last that is a posed hand, else the last."""
    posed = [name for name, pred in every.items() if "pose" in pred]
    return (posed or list(every))[-1]


@torch.no_grad()
def own_pictures(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """--images: every hand of a photo, a folder of them or a video, see `--help`."""
    if len(args.run) != 1:
        raise UserError("--images wants one run")
    net = load_net(args.run[0], args.mano)
    net.model.to(device)
    given = Path(args.images)
    out = Path(args.out or net.folder / f"images-{given.stem}")
    film = given.suffix.lower() in VIDEOS and given.is_file()
    if film:
        rate = frames_of(given, out / "frames")
        given = out / "frames"
    index = hands_in(given, flags.cache)
    known = with_cameras(index)
    data = Hands(index, net.side, net.margin)
    out.mkdir(parents=True, exist_ok=True)
    faces = Mano(user_hand(net.cfg.mano)[0]).faces
    hands: dict[str, list[dict]] = {}
    plan = list(torch.arange(len(data)).split(64))
    stream = batches(data, plan, device, flags.workers)
    for batch in tqdm(stream, "predicting", len(plan), unit="batch"):
        every = net(batch)
        pred = {key: x.float().cpu() for key, x in every[chosen_output(every)].items()}
        batch = to_device(batch, torch.device("cpu"))
        if args.obj and "verts" not in pred:
            raise UserError(f"--obj: {net.row} predicts joints only, so there is no mesh to write")
        for row, hand in zip(batch["index"].tolist(), described(batch, pred, index, known)):
            hands.setdefault(index.path(row), []).append(hand)
    if film:
        frames = tqdm(sorted(Path(index.root).glob("*.jpg")), "drawing", unit="frame")
        write_video(out / "overlay.mp4", (
            overlay(Image.open(file), hands.get(file.name, []), faces) for file in frames), rate)
    else:
        for path, found in tqdm(hands.items(), "drawing", unit="photo"):
            draw_photo(out, Path(index.root), path, found, faces)
    for path, k, hand in ((path, k, hand) for path, found in hands.items() if args.obj
                          for k, hand in enumerate(found)):
        upright = hand["verts"] * torch.tensor([1.0, -1, -1])             # as viewers expect: y up
        mesh = obj_text(upright, faces, hand["side"])
        (out / f"{flat_name(path)}-{k}.obj").write_text(mesh, encoding="utf-8")
    public = [{key: x for key, x in hand.items() if key != "verts"}
              for found in hands.values() for hand in found]
    text = json.dumps(public, indent=1, allow_nan=False) + "\n"
    (out / "hands.json").write_text(text, encoding="utf-8")
    scale = "the scale is metric where K was given"
    if not known.any():
        scale = "no K was given: focal length is the diagonal, 3D is up to scale"
    drawn = "overlay.mp4" if film else "a picture of each"
    say(f"wrote {out}: {len(public):,} hands in {len(hands):,} photos, hands.json, {drawn}"
        + ", .obj" * args.obj + f"; {scale}")


# ---- Your own cameras ----------------------------------------------------------------------------


def in_world(model: nn.Module, batch: dict) -> Fused:
    """A calibrated batch of moments -> the fused hands; left hands as they are, not mirrored."""
    pred = answer(model, batch)
    placed = hamuco.place_fused(pred, batch, model.size)
    hand = placed.get("fusion_center", placed["fusion_ransac"])
    every = torch.arange(len(batch["id"]), device=hand["joints"].device)
    seen = batch["view_ok"].int().argmax(1)                     # all views agree; the first one
    M = batch["cameras"].double()[every, seen]
    camera = hand["joints"].double()
    joints = (camera[every, seen] - M[:, None, :3, 3]) @ M[:, :3, :3]                  # R^T (x - t)
    verts = None
    if "fusion_center" in placed:                           # rooted at the middle finger's base
        verts = pred["fusion"]["verts"].double()[every, seen] @ M[:, :3, :3]
        verts = verts + joints[:, MIDDLE_MCP, None]
    own = pred.get("interaction", pred["single"])["uv"]
    back = invert(batch["crop"].double().flatten(0, 1))
    off = [transform(back, uv.double().flatten(0, 1)).view_as(uv) for uv in (own, hand["uv"])]
    error = (off[0] - off[1]).norm(dim=-1).flatten(1).nanmean(1)
    mirror = torch.ones(len(every), 1, 3, dtype=torch.float64, device=every.device)
    mirror[:, 0, 0] = torch.tensor([-1.0 if side == "left" else 1.0 for side in batch["side"]])
    verts = None if verts is None else verts * mirror
    return Fused(joints * mirror, verts, camera * mirror[:, None], hand["uv"], error)


@torch.no_grad()
def own_cameras(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """--data cameras=DIR: every frame of a rig, fused into one hand in the world.

    OUT/FRAME.json has the joints (21, 3) in world axes and in each camera's, and where each camera
    sees them in px of its picture, lens distortion taken away; FRAME.png the overlays; FRAME.obj
    the mesh, where the rig's unit is known. rig.json has the numbers that are printed.
    """
    net = prepared(args)[0]
    if len(args.run) != 1 or net.rig is None:
        raise UserError("--data cameras=DIR wants one run, of hamuco.py, which fuses views; the "
                        "other networks see one picture at a time (--images DIR/frames/CAMERA)")
    flags = dataclasses.replace(flags, mano=net.cfg.mano)
    data = open_data(flags, (args.data,), args.split or "all", net.side, net.margin, device,
                     rig=net.rig)
    net.model.to(device)
    out = Path(args.out or net.folder / "eval-cameras")
    out.mkdir(parents=True, exist_ok=True)
    faces = Mano(user_hand(net.cfg.mano)[0]).faces
    plan = list(torch.arange(len(data)).split(16))
    stream = batches(data, plan, scored_on(device), flags.workers)
    errors, lengths, lost = [], [], []
    for batch in tqdm(stream, "predicting", len(plan), unit="batch"):
        found = in_world(net.model, batch)
        for i, frame in enumerate(batch["id"]):
            if not found.joints[i].isfinite().all():
                lost.append(frame)
                continue
            errors.append(float(found.error[i]))
            lengths.append(bone_lengths(found.joints[i]))
            file = out / flat_name(frame)
            pictures = data.paths(int(batch["index"][i]))
            hand = of_moment(batch, found, pictures, i)
            text = json.dumps(hand, allow_nan=False) + "\n"
            file.with_suffix(".json").write_text(text, encoding="utf-8")
            draw_moment(file.with_suffix(".png"), batch, found, pictures, faces, i)
            if found.verts is not None:
                file.with_suffix(".obj").write_text(
                    obj_text(found.verts[i], faces, batch["side"][i]), encoding="utf-8")
    if not errors:
        raise UserError(f"{args.data}: no frame has the hand in two calibrated cameras")
    bones = torch.stack(lengths)
    spread = 100 * float((bones.std(0, correction=0) / bones.mean(0)).mean())
    metric = found.verts is not None
    numbers = {"run": str(net.path), "frames": len(errors), "left_out": lost,
               "unit": "m" if metric else "cameras.json's own",
               "reprojection_px": float(np.median(errors)), "bone_spread_percent": spread}
    (out / "rig.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    lengths_in = "metres" if metric else ("cameras.json's own unit, in which no hand of known size "
                                          "can be placed, so there is no mesh (give unit_m)")
    say(f"{len(errors):,} frames, {len(lost):,} left out (the hand in fewer than two cameras); the "
        f"fused hand lies {numbers['reprojection_px']:.1f} px of the picture (median) from the "
        f"network's own 2D; its bones change by {spread:.1f} % over the frames; lengths are in "
        f"{lengths_in}")
    say(f"wrote {out}: rig.json, and for each frame a .json, a .png" + " and an .obj" * metric)


# ---- Inspect -------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace, flags: Flags, device: torch.device) -> None:
    """16 samples of a data set with their joints and, where there is a pose, the mesh; counts."""
    if not args.data:
        raise UserError("--inspect needs --data NAME[:PART][=DIR]")
    split = args.split or scored_split(args.data)
    data = open_data(flags, (args.data,), split, 256, 1.5, device, live=True)
    if not len(data):
        raise UserError(f"{args.data} {split}: there is no sample to look at")
    index = some_of(len(data), min(16, len(data)))
    batch = next(batches(data, [index], device, 0))
    hand = hand_for(args.data, flags.mano).to(device)
    verts, joints = hand(axis_angle_to_matrix(batch["pose"].unflatten(-1, (16, 3)).nan_to_num()),
                         batch["shape"].nan_to_num())
    K = view_intrinsics(batch)
    posed = verts + place(joints, batch["uv"], K)[:, None]
    points = torch.where(batch["uv"].isnan(), batch["uv_label"], batch["uv"])
    pictures = []
    for i in range(len(index)):
        drawn = draw_skeleton(batch["image"][i], points[i], visible=batch["visible"][i])
        pictures.append(label(drawn, f"{int(index[i])} {batch['side'][i]}"))
        if batch["has"]["pose"][i] and batch["has"]["uv"][i]:
            pictures.append(draw_mesh(batch["image"][i], posed[i], hand.faces, K[i]))
    out = Path(args.out or f"runs/inspect-{data_name(args.data)}")
    sheet(out / "inspect.png", [pictures[k:k + 8] for k in range(0, len(pictures), 8)],
          width=8 * 206 + 6, bones=True, note="Samples spread over the data set, each with its "
          "number, side and key points, true ones or else 2D labels (hidden ones hollow); beside "
          "it, where a pose is known, the mesh that it means. Squares of 1.5 times the hand's box; "
          "left hands are mirrored.")
    has = {key: int(value.sum()) for key, value in batch["has"].items()}
    has["2D labels"] = int(batch["uv_label"].isfinite().flatten(1).any(1).sum())
    say(f"{len(data):,} samples in {args.data} {split}; of the {len(index)} drawn: "
        + ", ".join(f"{count} have {key}" for key, count in has.items()))
    say(f"wrote {out}/inspect.png; left hands are shown as the right hands they become")


# ---- CLI -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="*", help="run folders or finetune.pt files")
    add("--data", default="", metavar="NAME",
        help="NAME[:PART][=DIR] (default: what RUN was tuned on)")
    add("--root", default="", metavar="DIR", help="the data set's folder (default data/NAME)")
    add("--split", default="", choices=("train", "val", "test"),
        help="default test; val where a paper's table is about it, or a data set has no test")
    add("--protocol", nargs="+", default=(), metavar="NAME", help="default: all of the data set's")
    add("--out", default="", metavar="DIR",
        help="default RUN/eval-DATA, for several runs runs/compare-DATA")
    add("--scratch", default="", metavar="RUN",
        help="the run trained from random weights, as the row scratch")
    add("--sheet", action="store_true",
        help="sheet.png: the same samples for the truth and all runs")
    add("--curve", default="", metavar="FIELD",
        help="draw --metric over an option, `epoch`, `labels` or the tested `views`")
    add("--metric", default="mpjpe_mm", metavar="NAME", help="of --curve (default mpjpe_mm)")
    add("--images", default="", metavar="DIR|FILE", help="predict your own photos or a video")
    add("--obj", action="store_true", help="with --images: write each hand's mesh")
    add("--views", nargs="+", type=int, default=[], metavar="N",
        help="HaMuCo: test with the first N cameras, or with those of several numbers (0 2 5)")
    add("--submit", action="store_true",
        help=f"write the server's or tool kit's file: {', '.join(SUBMIT)}")
    add("--two-pass", action="store_true",
        help="PeCLR: predict, crop around the prediction, predict again")
    add("--inspect", action="store_true", help="draw 16 samples of --data and count what they have")
    add("--mano", default="", metavar="FILE", help="MANO_RIGHT.pkl or .npz, or builtin")
    add("--cache", default="cache", metavar="DIR",
        help="rendered hands, indexes, and hands found in photos (default cache)")
    add("--workers", type=int, default=4, metavar="N",
        help="processes that read pictures (default 4)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default)")
    args = parser.parse_args(argv)
    if not args.run and not args.inspect:
        raise UserError("name a run folder or a finetune.pt, or --inspect --data NAME (see --help)")
    if args.obj and not args.images:
        raise UserError("--obj writes the meshes of --images DIR")
    flags = Flags(root=args.root, mano=args.mano, cache=args.cache, workers=args.workers)
    if args.curve:
        return draw_curve(args)
    device = start(args.device)
    rig = data_name(args.data) == "cameras" and not args.submit
    chosen = (inspect if args.inspect else own_pictures if args.images
              else own_cameras if rig else judge)
    chosen(args, flags, device)


if __name__ == "__main__":
    sys.exit(guarded(main))
