"""tests/reproduce.py: every planned command is accepted, a tiny claim runs, verdicts, README agrees."""
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hamuco
import handmim
import peclr
import ti_net
from claims import canonpose, lt_algebraic, measure, papers, show, sitting, verdict
from claims.plan import (
    BATCH, ROOT, Claim, Comparison, Row, Scale, Tuning, Weights, budgets_of, epochs_of, key, momentum,
    pictures_of, pretrain_words, tune_words)
from claims.rows import CLAIMS, CORE, FURTHER, PECLR, TI_NET, calibration
from common import UserError, pa_mpjpe, parse, settle, share
from sources import parse_data
from sources.protocols import PROTOCOLS
from sources.synthetic import Synthetic

SCRIPTS = {"ti_net.py": ti_net, "handmim.py": handmim, "peclr.py": peclr, "hamuco.py": hamuco}


def accepted(words):
    """The Config that a command line gives, as far as the script checks before it reads any data."""
    if words[0].startswith("tests/claims/"):
        return {"canonpose.py": canonpose, "lt_algebraic.py": lt_algebraic}[words[0][13:]].options(words[1:])
    script = SCRIPTS[words[0]]
    given = parse(script.Config, words[1:], script.__doc__, script.QUICK, script.VARIANTS)
    stage = "finetune" if given.get("finetune") else "pretrain"
    if script is hamuco:
        cfg = hamuco.stage_config(given)
    elif script is peclr and stage == "finetune":
        cfg = peclr.finetune_config(given)
    elif script is handmim:
        cfg = handmim.configure(given, stage)
    else:
        cfg = settle(script.Config, given, stage, script.QUICK)
    if script is handmim and stage == "pretrain":
        handmim.check_pretraining(cfg)
    assert not (given.get("data") and given.get("finetune"))
    share(cfg.batch_size, cfg.micro_batch)
    return cfg


# ---- The plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_scripts_accept_every_planned_command(claim):
    scale = Scale()
    for row in claim.rows:
        for budget in budgets_of(claim, row):
            if row.weights:
                cfg = accepted(pretrain_words(row.weights, 2, budget, "out", "cache", scale, 1e-3))
                assert cfg.seed == 2
                no_pictures = row.weights.script in ("canonpose", "lt_algebraic")
                assert no_pictures or cfg.backbone == ("vit_mini" if row.weights.script == "handmim" else "resnet10")
                assert no_pictures or cfg.epochs == epochs_of(row.weights, budget, scale)
                assert cfg.data == (row.weights.data,) and cfg.out == "out" and cfg.cache == "cache"
                rounds = 3 if row.name == "three" else 1
                assert pictures_of(row.weights, budget, scale) == rounds * budget * 131_072
        for tuning in claim.tunings:
            cfg = accepted(tune_words(claim, row, tuning, 2, "file.pt", "out", "cache", scale, 1e-3))
            assert cfg.backbone == ("vit_mini" if claim.script == "handmim" else "resnet10")
            assert cfg.init == "file.pt" and cfg.row == row.name and cfg.label_fraction == tuning.share
            seen = 163_840 if claim.name in ("ti_net", "calibrate-ti_net") else 81_920
            assert abs(cfg.epochs * tuning.share * 16_384 - seen) < 820


def test_the_batch_that_pictures_are_counted_by_is_the_commands():
    for script, batch in BATCH.items():
        assert accepted(pretrain_words(Weights(script), 0, 1, "out", "cache", Scale())).batch_size == batch
    for views, moments in ((2, 16), (4, 8), (8, 4)):                     # 32 pictures a step, as many steps for all
        cfg = accepted(pretrain_words(Weights("hamuco", ("--views", str(views))), 0, 0.5, "out", "cache", Scale(), 1e-3))
        assert (cfg.batch_size, cfg.micro_batch) == (moments, moments) and cfg.samples / moments * cfg.epochs == 2048


def test_the_smallest_gain_that_counts_is_the_plans():
    """1 % for frozen features, 2 % for tuned networks and HaMuCo, 5 % where the claim is "clearly"."""
    clear = {"PeCLR beats random features", "in 2D predictions beat the labels learnt from"}
    for claim in (*CORE, *FURTHER):
        for compared in claim.compared:
            frozen = compared.better[1].startswith(("probe_", "class_", "patch_"))
            assert compared.least == (5 if compared.says in clear else 1 if frozen else 2), compared.says


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_comparisons_name_rows_of_their_claim_that_share_a_budget(claim):
    rows = {row.name: row for row in claim.rows}
    assert len(rows) == len(claim.rows)
    for compared in claim.compared:
        assert {compared.better[0], compared.than[0]} <= set(rows)
        assert all(v.word == "not run" for v in verdict.verdicts(claim, compared, []))
        assert verdict.verdicts(claim, compared, [])


def test_rows_of_a_claim_are_tuned_alike():
    """The commands of a claim's fine-tunings differ in first weights, row and what the row is about."""
    about = {"--freeze-blocks"}
    for claim in CLAIMS.values():
        if claim.name.startswith("calibrate"):
            continue
        for tuning in claim.tunings:
            seen = set()
            for row in claim.rows:
                words = tune_words(claim, row, tuning, 0, "X", "out", "cache", Scale(), 1e-3)
                words[words.index("--row") + 1] = "ROW"
                assert not row.words or row.words[0] in about
                seen.add(" ".join(words[:len(words) - len(row.words)]))
            assert len(seen) == 1


def test_the_teachers_momentum_leaves_a_hundredth_of_its_start():
    # it rises to 1 by a cosine, so of the start exp(-sum of 1 - m) = exp(-(1 - m) steps / 2) is left
    for steps in (200, 1024, 2000):
        assert np.exp(-(1 - momentum(steps)) * steps / 2) == pytest.approx(0.01, rel=0.25)
    assert momentum(100_000) == 0.996                            # iBOT's own, which leaves less


def calibrated(tmp_path, errors, mean_pose=100.0):
    """A folder with the lines of calibrate-ti_net: the errors of its rates in order."""
    rows = calibration(TI_NET).rows
    scores = [{"small_val_mm": e, "small_mpjpe_mm": e, "small_mean_pose_mpjpe_mm": mean_pose} for e in errors]
    (tmp_path / "calibrate-ti_net.jsonl").write_text("".join(
        json.dumps({"row": row.name, "seed": 100, "budget": 0, "scores": s}) + "\n" for row, s in zip(rows, scores)))
    return tmp_path


def test_the_rate_is_the_one_that_was_best_for_scratch(tmp_path):
    assert sitting.rate_of(TI_NET, tmp_path) == 0 and sitting.rate_of(PECLR, tmp_path) == 1
    assert sitting.rate_of(TI_NET, calibrated(tmp_path, [90, 80])) == 0               # not all are run
    assert sitting.rate_of(TI_NET, calibrated(tmp_path, [90, 80, 85])) == 1.5e-3
    assert sitting.rate_of(TI_NET, calibrated(tmp_path, [79, 80, 85])) == 5e-4


def test_a_rate_is_chosen_at_the_plans_budget_and_share_alone(tmp_path):
    rows = calibration(CLAIMS["hamuco"]).rows
    line = lambda row, budget, error: {"row": row.name, "seed": 100, "budget": budget, "scores": {"single_view_n_mpjpe_mm": error}}
    found = [line(row, 0.5, error) for row, error in zip(rows, (40, 35, 38))] + [line(rows[0], 2.0, 30)]
    (tmp_path / "calibrate-hamuco.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    assert sitting.rate_of(CLAIMS["hamuco"], tmp_path) == 1e-3
    todo = sitting.tasks([CLAIMS["hamuco"]], 1, 2.0)
    assert {t.budget for t in todo if t.row.name == "full"} == {2.0}


# As it stood in a line of ti_net.jsonl.
SCRATCH = ("python ti_net.py --init random --finetune synthetic --samples 16384 --label-fraction 0.25 --epochs 40 --lr 0.0045 --image-size 64 "
           "--seed 1 --out runs/claims/ti_net-scratch-b0-s1/small --cache cache --row scratch --device cpu --backbone resnet10 --workers 0 "
           "--save-minutes 2 --batch-size 64 --micro-batch 64")


@pytest.mark.parametrize("old, new, counts", [
    ("--out runs/claims/ti_net-scratch-b0-s1/small --cache cache", "--out elsewhere --cache a", True), ("--device cpu", "--device cuda", True),
    ("0.25", "0.5", False), ("--epochs 40", "--epochs 20", False), ("0.0045", "0.0015", False), ("--batch-size 64", "--batch-size 32", False),
    ("--row scratch", "--row peclr", False)])
def test_lines_of_commands_that_the_plan_no_longer_has_do_not_count(tmp_path, old, new, counts):
    assert SCRATCH.count(old) == 1
    line = {"row": "scratch", "seed": 1, "budget": 0, "machine": "M", "date": "2026-01-01", "precision": [], "seconds": {"small": 10},
            "scores": {"small_mpjpe_mm": 80.0}, "commands": {"small": SCRATCH.replace(old, new)}}
    (tmp_path / "ti_net.jsonl").write_text(json.dumps(line) + "\n")
    assert len(sitting.lines(TI_NET, tmp_path)) == (counts or new == "0.0015")          # the rate is not chosen yet
    calibrated(tmp_path, [90, 85, 80])
    assert len(sitting.lines(TI_NET, tmp_path)) == counts
    assert ("1 lines of `tests/claims/ti_net.jsonl`" in show.table(TI_NET, tmp_path)) != counts


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_lines_that_are_there_are_of_the_plans_commands(claim):
    found = set(map(key, sitting.told(claim)))
    old = 3 if claim.name == "calibrate-ti_net" else 0                     # of half the length: PLAN.md, Changes
    assert len(sitting.lines(claim)) == len(found) - old


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_seeds_of_a_row_are_of_one_precision_and_kind_of_device(claim):
    kinds = {}
    for line in sitting.lines(claim):
        kinds.setdefault((line["row"], line["budget"]), set()).add((*line["precision"], line["device"]))
    assert all(len(kind) == 1 for kind in kinds.values())


def test_a_line_names_the_processor_or_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 of {device}")
    assert sitting.machine("cuda:1") == "H200 of cuda:1" and sitting.machine("mps") == "mps"
    assert sitting.machine().endswith(f", one thread of {os.cpu_count()}")


def test_a_line_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "ti_net.jsonl").write_text('{"row": "scratch", "seed": 0, "budget": 0}\n{"row": "ti_n')
    with pytest.raises(UserError, match="ti_net.jsonl: line 2 is cut off; delete it"):
        sitting.lines(TI_NET, tmp_path)


def test_a_rate_is_chosen_on_the_pictures_of_the_claim():
    for name, data in (("hamuco", "synthetic"), ("hamuco-calm", "synthetic:calm")):
        rows = [*CLAIMS[name].rows, *calibration(CLAIMS[name]).rows]
        assert {row.weights.data for row in rows} == {data}
    a, b = (sitting.slug(CLAIMS[name].rows[0].weights, 1e-3) for name in ("hamuco", "hamuco-calm"))
    assert (a, b) == ("hamuco-lr0.001", "hamuco-synthetic-calm-lr0.001")


def test_scratch_above_the_mean_pose_stops_a_claim(tmp_path):
    with pytest.raises(sitting.Failed, match="double SHARE"):
        sitting.rate_of(TI_NET, calibrated(tmp_path, [120, 110, 130]))
    # those of half the length, which are kept, choose nothing
    file = tmp_path / "calibrate-ti_net.jsonl"
    file.write_text(file.read_text().replace("-twice", ""))
    assert sitting.rate_of(TI_NET, tmp_path) == 0


# ---- Order, locks, going on ----------------------------------------------------------------------


def test_a_whole_seed_comes_before_the_next_one_and_a_budget_before_a_larger():
    todo = sitting.tasks([PECLR, TI_NET], 2, None)
    assert [(t.seed, t.budget) for t in todo if t.row.name == "peclr" and t.claim is PECLR] == [
        (0, 1), (1, 1), (0, 4), (1, 4)]
    first = [t for t in todo if t.budget in (0, 1, 1.5)]
    assert todo[:len(first)] == first and [t.seed for t in first] == sorted(t.seed for t in first)
    assert len(todo) == len(set(todo)) == 2 * (8 + 5 + 7 + 3)


def test_a_stopped_stage_goes_on_and_a_finished_one_is_not_run_again(tmp_path):
    calls = []

    def execute(words, log):
        calls.append(words)
        out = tmp_path / "out" / "pretrain-x"
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text('{"cfg": {"precision": "bf16"}}')
        if len(calls) == 1:
            raise sitting.Failed("killed before a checkpoint")
        (out / "last.pt").touch()
        if len(calls) == 2:
            raise sitting.Failed("killed after one")

    place = sitting.Place(tmp_path, tmp_path, tmp_path, execute=execute)
    for _ in range(2):
        with pytest.raises(sitting.Failed):
            sitting.stage(["x.py"], tmp_path / "out", place)
    (tmp_path / "out.seconds").write_text("100")
    about = sitting.stage(["x.py"], tmp_path / "out", place)
    assert about["seconds"] == 100 and about["precision"] == "bf16" and about["command"] == "python x.py"
    assert sitting.stage(["x.py"], tmp_path / "out", place) == about
    assert calls == [["x.py"], ["x.py"], ["x.py", "--resume"]]
    with pytest.raises(sitting.Failed, match="out was made by another command; move it away"):
        sitting.stage(["x.py", "--teacher-tau", "0.008"], tmp_path / "out", place)


def test_a_script_that_fails_is_quoted_and_one_that_is_interrupted_is_stopped(tmp_path, monkeypatch):
    with pytest.raises(sitting.Failed, match="(?s)ended with 3.*error: no such flag"):
        sitting.in_a_process(["-c", "print('error: no such flag'); raise SystemExit(3)"], tmp_path / "log")
    children = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if self in children:
                return super().wait(timeout)
            children.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        sitting.in_a_process(["-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert children[0].returncode == -signal.SIGTERM


def test_of_two_signals_the_first_counts(monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            for other in numbers:
                signal.signal(other, signal.SIG_DFL)               # whatever this suite was started by
            sitting.stop_at_a_signal()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            for other in numbers:
                signal.raise_signal(other)                         # what runs is saving
        signal.signal(signal.SIGHUP, signal.SIG_IGN)               # nohup's
        sitting.stop_at_a_signal()
        signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# Stands in for peclr.py: says which signals it got while it "saved"; a module for whoever imports it.
PATIENT = """import sys
if __name__ == "__main__":
    import pathlib, signal, time
    seen = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: seen.append(number))
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True)
    while not seen and time.sleep(0.1) is None:
        pass
    time.sleep(3)
    (out / "last.pt").write_text(" ".join(str(int(number)) for number in seen))
    sys.exit(1)
exec(compile(open(REAL).read(), REAL, "exec"))
"""


def test_ctrl_c_stops_every_process_of_a_claim_once_and_they_save(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    names = [path for path in ROOT.iterdir() if path.suffix == ".py" or path.name in ("hand", "sources", "tests")]
    for path in names:
        if path.is_dir():
            shutil.copytree(path, project / path.name, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__", "*.jpg"))
        else:
            shutil.copy(path, project)
    (project / "peclr.py").write_text(PATIENT.replace("REAL", repr(str(ROOT / "peclr.py"))))
    command = [sys.executable, "tests/reproduce.py", "claim", "calibrate-peclr", "--jobs", "2"]
    parent = subprocess.Popen(command, cwd=project, text=True, start_new_session=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    runs = project / "runs/claims"
    until = time.monotonic() + 90
    while len(list(runs.glob("*/small"))) < 2 and time.monotonic() < until and parent.poll() is None:
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGINT)               # as a terminal does: all that are of its group
    said, _ = parent.communicate(timeout=60)
    assert [file.read_text() for file in runs.glob("*/small/last.pt")] == ["15", "15"], said
    assert said.splitlines()[-1] == "stopped; the same command goes on" and said.count("stopped") == 1
    assert "Traceback" not in said and "ignored" not in said and "ended with" not in said


def test_a_lock_that_another_holds_is_not_taken(tmp_path):
    place = sitting.Place(runs=tmp_path)
    with sitting.alone("a", place) as first, sitting.alone("a", place) as second, \
            sitting.alone("b", place) as other:
        assert first and not second and other
    with sitting.alone("a", place) as again:
        assert again


def test_a_script_that_outlives_its_worker_keeps_the_lock_of_its_row(tmp_path):
    place = sitting.Place(runs=tmp_path)
    with sitting.alone("a", place):
        child = sitting.begun(["-c", "input()"], stdin=subprocess.PIPE)
    with sitting.alone("a", place) as mine:
        assert not mine
    child.communicate(b"\n")
    with sitting.alone("a", place) as mine:
        assert mine


def test_what_was_tuned_from_weights_that_are_made_anew_is_not_kept(tmp_path):
    def execute(words, log):
        out = tmp_path / "weights" / "peclr-b1-s0" / "pretrain-peclr"
        out.mkdir(parents=True)
        (out / "config.json").write_text('{"cfg": {}}')

    place = sitting.Place(tmp_path, tmp_path, tmp_path, execute=execute)
    row = next(row for row in PECLR.rows if row.name == "peclr")
    old = [tmp_path / name / "small" for name in ("peclr-labels-peclr-b1-s0", "peclr-labels-peclr-b1-s1", "peclr-labels-simclr-b1-s0")]
    for folder in old:
        folder.mkdir(parents=True)
    sitting.weights_of(sitting.Task(PECLR, row, 0, 1), 1.0, place)
    assert [folder.is_dir() for folder in old] == [False, True, True]
    old[0].mkdir(parents=True)
    sitting.weights_of(sitting.Task(PECLR, row, 0, 1), 1.0, place)                   # they are there now
    assert old[0].is_dir()


# ---- One tiny claim, through the tool ------------------------------------------------------------

TINY = Scale(unit=32, pictures=16, tuned=16, side=32, probed=16, cnn="vit_mini")
TOY = Claim("toy", "a toy", "peclr",
            (Row("scratch"), Row("simclr", Weights("peclr", ("--objective", "simclr")))),
            (Comparison("better", ("simclr", "class_mpjpe_mm"), ("scratch", "class_mpjpe_mm"), "no", 1),
             Comparison("tuned", ("simclr", "small_mpjpe_mm"), ("scratch", "small_mpjpe_mm"), "no", 1)),
            probe=True, tunings=(Tuning("small", 0.5),))


def test_a_tiny_claim_runs_goes_on_and_ends_in_a_table(here, monkeypatch):
    calls = []
    for place, name in (("sources.stages", "_draw"), ("peclr", "draw_views"), ("peclr", "draw_crops")):
        monkeypatch.setattr(f"{place}.{name}", lambda *args: None)
    render, rendered = Synthetic.block, {}

    def block(source, index):
        """A block of a set, rendered once: each opening of a set renders its first block anew."""
        key = (source.settings, int(index[0]))
        rendered.setdefault(key, None)
        rendered[key] = rendered[key] or render(source, index)
        return rendered[key]

    monkeypatch.setattr(Synthetic, "block", block)

    def execute(words, log):
        calls.append(words)
        SCRIPTS[words[0]].main(words[1:])

    monkeypatch.setattr(sitting, "_chosen", lambda claim, results: (1e-3, {}))
    monkeypatch.setattr(sitting, "calibration", lambda claim: None)
    monkeypatch.setattr(sitting, "Scale", lambda: TINY)
    monkeypatch.setattr(sitting, "machine", lambda device: f"machine of {device}")
    place = sitting.Place(here / "results", here / "runs", here / "cache", TINY, execute)
    assert sitting.sit([TOY], seeds=1, place=place) == 0
    found = sitting.lines(TOY, place.results)
    assert [line["row"] for line in found] == ["scratch", "simclr"] and len(calls) == 3
    for line in found:
        assert {"small_mpjpe_mm", "small_pa_mpjpe_mm", "small_area_mm", "small_val_mm", "class_mpjpe_mm",
                "patch_2d_px", "patch_dimensions"} <= set(line["scores"])
        assert 10 < line["scores"]["class_mpjpe_mm"] < 300 and len(line["groups"]["small_mpjpe_mm"]) == 24
        assert np.mean(line["groups"]["small_mpjpe_mm"]) == pytest.approx(line["scores"]["small_mpjpe_mm"], abs=0.01)
        assert set(line["commands"]) == {"small"} | ({"weights"} if line["row"] == "simclr" else set())
    assert [line["pictures"] for line in found] == [0, 32] and {line["machine"] for line in found} == {"machine of cpu"}
    assert [sorted(line["monitors"]) for line in found] == [[], ["loss", "nearest", "negative", "positive"]]
    assert found[0]["scores"]["class_mpjpe_mm"] != found[1]["scores"]["class_mpjpe_mm"]
    assert not list((here / "runs").rglob("last.pt")) and not list((here / "runs").rglob("best.pt"))
    assert sitting.sit([TOY], seeds=1, place=place) == 0 and len(calls) == 3          # nothing left to do
    text = show.table(TOY, place.results)
    assert "not run (1 of 3 seeds)" in text and "2 rows and seeds" in text and "Still to run" in text
    files = show.draw(TOY, here / "pictures", place.results)
    assert [file.name for file in files] == ["toy-gains.png", "toy-small.png"]


def test_a_failing_row_is_named_and_the_others_run(tmp_path, capsys, monkeypatch):
    tried = []

    def run(task, place):
        tried.append(task.row.name)
        if task.row.name == "scratch":
            raise sitting.Failed("python peclr.py ended with 2")
        line = {"row": task.row.name, "seed": task.seed, "budget": task.budget}
        (tmp_path / "toy.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(sitting, "run", run)
    monkeypatch.setattr(sitting, "rate_of", lambda claim, results: 1e-3)
    monkeypatch.setattr(sitting, "calibration", lambda claim: None)
    assert sitting.sit([TOY], 1, None, sitting.Place(tmp_path, tmp_path, tmp_path)) == 1
    assert tried == ["scratch", "simclr"] and "ended with 2" in capsys.readouterr().out
    assert sitting.sit([TOY], 1, None, sitting.Place(tmp_path, tmp_path, tmp_path), until=0) == 0 and len(tried) == 2


def test_rows_wait_for_their_calibration_which_comes_first(tmp_path, monkeypatch):
    tried = []

    def run(task, place):
        tried.append((task.claim.name, task.row.name, task.seed))
        scores = {"small_val_mm": 90, "small_mpjpe_mm": 90, "small_mean_pose_mpjpe_mm": 100}
        with open(tmp_path / f"{task.claim.name}.jsonl", "a") as file:
            file.write(json.dumps({"row": task.row.name, "seed": task.seed, "budget": task.budget, "scores": scores}) + "\n")

    monkeypatch.setattr(sitting, "run", run)
    assert sitting.sit([TI_NET], 1, None, sitting.Place(tmp_path, tmp_path, tmp_path)) == 0
    assert [(name, seed) for name, _, seed in tried] == 3 * [("calibrate-ti_net", 100)] + 10 * [("ti_net", 0)]


# ---- Scores --------------------------------------------------------------------------------------


def test_ridge_is_the_closed_form_with_the_weight_that_is_best_on_val():
    """Against a solve of the normal equations for every weight, and a brute choice on val."""
    g = torch.Generator().manual_seed(1)
    W = torch.randn(5, 6, generator=g, dtype=torch.float64)
    X = {s: 3 + 2 * torch.randn(n, 5, generator=g, dtype=torch.float64) for s, n in (("train", 12), ("val", 40), ("test", 6))}
    Y = {s: x @ W + 4 * torch.randn(len(x), 6, generator=g, dtype=torch.float64) for s, x in X.items()}
    Z = {s: (x - X["train"].mean(0)) / X["train"].std(0) for s, x in X.items()}
    err = {"val": [], "test": []}
    for weight in measure.RIDGES:
        A = Z["train"].T @ Z["train"] / 12 + weight * torch.eye(5, dtype=torch.float64)
        B = torch.linalg.solve(A, Z["train"].T @ (Y["train"] - Y["train"].mean(0)) / 12)
        for s, errors in err.items():
            errors.append((Z[s] @ B + Y["train"].mean(0) - Y[s]).view(-1, 2, 3).norm(dim=-1).mean(1))
    chosen, luckiest = (int(torch.stack(err[s]).mean(1).argmin()) for s in ("val", "test"))
    assert chosen != luckiest and 0 < chosen < 24
    assert torch.allclose(measure.ridge(X, {"joints": (Y, 3)})["joints"], err["test"][chosen], rtol=1e-8)


def test_dimensions_are_the_axes_that_vary():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(20_000, 10, generator=g, dtype=torch.float64) + 5
    assert measure.dimensions(X) == pytest.approx(10, rel=0.02)
    X[:, 3:] = 7
    assert measure.dimensions(X) == pytest.approx(3, rel=0.02)


def test_scores_keep_means_of_neighbouring_hands():
    scores = measure.Scores({}, {})
    scores.add("x", torch.arange(400.0))
    assert scores.means["x"] == 199.5 and scores.groups["x"][:2] == [1.5, 5.5] and len(scores.groups["x"]) == 100


def test_monitors_are_means_over_the_last_quarter_of_the_logged_steps(tmp_path):
    (tmp_path / "pretrain-x").mkdir()
    log = [{"command": "x.py"}] + [{"step": n, "epoch": 0, "lr": 1.0, "L_c": float(n), "entropy": 2.0} for n in (1, 30, 75, 80, 100)]
    (tmp_path / "pretrain-x" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, {"epoch": 1}]))
    assert measure.monitored(tmp_path) == {"L_c": 90.0, "entropy": 2.0}
    assert measure.monitored(tmp_path / "pretrain-x") == {}


def test_of_two_lines_the_later_counts_and_once(tmp_path):
    row = {"budget": 1.5, "machine": "M", "date": "2026-01-01", "precision": [], "seconds": {"weights": 10}}
    told = [row | {"row": "ti_net", "seed": seed, "scores": {"small_mpjpe_mm": x}} for seed, x in ((0, 80.0), (1, 90.0), (0, 84.0))]
    told[1]["monitors"], told[2]["monitors"] = {"residual": 0.5, "L_ord": 1}, {"residual": 0.75}
    (tmp_path / "ti_net.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    text = show.table(TI_NET, tmp_path)
    titles, _, cells = [line.split(" | ") for line in text.splitlines() if line.startswith(("| row", "|---", "| ti_net |"))][-3:]
    of = dict(zip([title.strip("| ") for title in titles], [cell.strip("| ") for cell in cells]))
    assert of["small mpjpe mm"] == "87.0 ± 4.2" and of["seeds"] == "2"
    assert (of["residual"], of["L_ord"], of["turn change"]) == ("0.62 ± 0.18", "1.00", "-")
    assert "2 rows and seeds, 20 s," in text


def test_a_metric_of_every_sample_is_its_mean_over_views():
    sums = torch.tensor([[[3.0, 2, 0]], [[5.0, 1, 0]], [[0.0, 0, 0]]])
    row = SimpleNamespace(tallies={"ours": SimpleNamespace(sums={"x": sums})})
    assert measure.by_hand(row, "x").nan_to_num(-1).tolist() == [1.5, 5.0, -1.0]


def views_of_hands(n=24, V=3):
    """Moments of random hands seen by an orthographic camera each, y down: joints in cameras, R, labels."""
    g = torch.Generator().manual_seed(0)
    world = torch.randn(n, 1, 21, 3, generator=g) * 0.03
    R = torch.linalg.qr(torch.randn(n, V, 3, 3, generator=g))[0]
    R = R * torch.linalg.det(R)[..., None, None].sign()
    joints = world @ R.mT
    cameras = torch.eye(4).repeat(n, V, 1, 1)
    cameras[..., :3, :3] = R
    scale = 500 + 500 * torch.rand(n, V, 1, 1, generator=g)
    uv = scale * joints[..., :2] + 40 * torch.rand(n, V, 1, 2, generator=g)
    return joints, {"uv_label": uv, "confidence": torch.rand(n, V, 21, generator=g), "cameras": cameras,
                    "view_ok": torch.ones(n, V, dtype=torch.bool)}


def test_the_true_hand_reprojects_onto_all_labels_whatever_place_and_size():
    joints, batch = views_of_hands()
    uv, c, R = canonpose.labels(batch)
    assert canonpose.reprojection(3 * joints + 1, R, uv, c) < 1e-5
    assert canonpose.reprojection(joints * torch.tensor([1, 1, -1.0]), R, uv, c) > 0.2          # depth the wrong way
    assert canonpose.reprojection(joints, R.mT, uv, c) > 0.2
    batch["uv_label"][:, :, 4] = math.nan                              # a joint without a label counts nowhere
    batch["view_ok"][0, 1] = False
    uv, c, R = canonpose.labels(batch)
    assert (c[:, :, 4] == 0).all() and (c[0, 1] == 0).all() and canonpose.reprojection(joints, R, uv, c) < 1e-5


def test_lifted_labels_come_near_the_hands_and_their_fusion_nearer():
    joints, batch = views_of_hands()
    torch.manual_seed(0)
    model = canonpose.Lifter(width=64)
    losses = canonpose.train(model, batch, 60, 0, size=24)
    found = {name: 1000 * pa_mpjpe(pred["joints"].flatten(0, 1), joints.flatten(0, 1)).nanmean()
             for name, pred in canonpose.predict(model, batch).items()}
    before = 1000 * pa_mpjpe(canonpose.predict(canonpose.Lifter(64), batch)["single"]["joints"].flatten(0, 1),
                             joints.flatten(0, 1)).nanmean()
    assert losses[-1] < 0.6 * losses[0] and found["single"] < 0.85 * before and found["fusion"] < 0.9 * found["single"]


def rig_of_labels(n=8, V=4):
    """Moments before cameras on a ring, labels half a px off, 20 px in one view a moment, whose confidence is the highest."""
    g = torch.Generator().manual_seed(0)
    world = 0.03 * torch.randn(n, 21, 3, generator=g)
    turn = 2 * math.pi * torch.arange(V) / V + 0.3 * torch.rand(n, V, generator=g)
    cos, sin, none = turn.cos(), turn.sin(), torch.zeros(n, V)
    R = torch.stack([cos, none, -sin, none, none + 1, none, sin, none, cos], -1).view(n, V, 3, 3)
    cameras = torch.eye(4).repeat(n, V, 1, 1)
    cameras[..., :3, :3], cameras[..., 2, 3] = R, 0.6
    K = torch.tensor([[500.0, 0, 64], [0, 500, 64], [0, 0, 1]]).repeat(n, V, 1, 1)
    seen = (world[:, None] @ R.mT + torch.tensor([0, 0, 0.6])) @ K.mT
    uv = seen[..., :2] / seen[..., 2:]
    bad = torch.nn.functional.one_hot(torch.randint(V, (n,), generator=g), V)[..., None]             # (n, V, 1)
    noise = torch.randn(uv.shape, generator=g) * torch.where(bad == 1, 20.0, 0.5)[..., None]
    c = torch.where(bad == 1, 0.9, 0.3 + 0.5 * torch.rand(n, V, 21, generator=g))
    return world, bad[..., 0] == 1, uv, {"uv_label": uv + noise, "confidence": c, "K": K, "cameras": cameras,
                                         "view_ok": torch.ones(n, V, dtype=torch.bool), "side_px": torch.full((n,), 128.0)}


def test_learnt_confidences_weight_a_bad_view_less_whatever_its_detector_says():
    world, bad, _, batch = rig_of_labels()
    torch.manual_seed(0)
    model = lt_algebraic.Weigher(width=32)
    before = lt_algebraic.predict(model, batch)["dlt_learnt"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    with torch.no_grad():
        weight = model(*canonpose.labels(batch)[:2])
    found = lt_algebraic.predict(model, batch)["dlt_learnt"]
    true = hamuco.to_cameras(world, batch["cameras"])
    error = [(x["joints"] - true).norm(dim=-1).mean() for x in (before, found)]
    assert weight[bad].mean() < 0.2 * weight[~bad].mean()
    assert error[1] < 0.2 * error[0] and found["uv"].shape == batch["uv_label"].shape


def test_a_held_out_label_is_compared_with_the_other_views_and_cannot_vouch_for_itself():
    _, _, uv, batch = rig_of_labels(2, 3)
    P, limit = lt_algebraic.cameras_of(batch), torch.tensor([10.0, 20.0])
    c = torch.ones(2, 3, 21)
    weight = torch.rand(2, 3, 21).double().requires_grad_()
    assert lt_algebraic.held_out(weight, uv, c, P, limit) < 1e-6
    c[:, :2], uv = 1e-9, uv + torch.tensor([0, 0, 1.0])[:, None, None] * torch.tensor([6.0, 8.0])       # view 2, 10 px off
    loss = lt_algebraic.held_out(weight, uv, c, P, limit)
    assert loss.item() == pytest.approx((math.log(2) + math.log(1.25)) / 2, rel=1e-3)
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-6


def test_confidences_learn_through_the_triangulation_by_its_derivative():
    _, _, _, batch = rig_of_labels(2, 4)
    uv, c, _ = canonpose.labels(batch)
    uv, c, P, limit = uv[:, :, :3].double(), c[:, :, :3].double(), lt_algebraic.cameras_of(batch), torch.full((2,), 15.0).double()
    weight = (0.4 + 0.2 * torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: lt_algebraic.held_out(w, uv, c, P, limit), weight, eps=1e-5,
                                    check_undefined_grad=False)


@pytest.mark.parametrize("apart", [0, 1e-9, 1e-5])
def test_gradients_are_finite_and_small_where_singular_values_are_equal_or_near(apart):
    """Of two views whose rows, each 0.7 long in each of four axes, triangulate to any point at all."""
    P = torch.tensor([[[-1.0, 0, -1, 0], [0, -1, 0, -1], [0, 0, 1, 0]], [[-1, 0, 1, 0], [0, -1, 0, 1], [0, 0, 1, 0]],
                      [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]]).double()[None]
    P = P + apart * torch.randn(P.shape, generator=torch.Generator().manual_seed(0))
    c = torch.ones(1, 3, 21)
    c[:, :2] = 1e-9                                                    # view 2 is held out, as far as counts
    weight = torch.full((1, 3, 21), 0.5).double().requires_grad_()
    (slope,) = torch.autograd.grad(lt_algebraic.held_out(weight, torch.zeros(1, 3, 21, 2), c, P, torch.ones(1)), weight)
    assert slope.isfinite().all() and 21 * slope.norm(dim=1).max() <= 1.0001 * lt_algebraic.STEEPEST


def test_views_that_are_missing_teach_nothing_and_spoil_nothing():
    _, _, _, batch = rig_of_labels(2, 4)
    for lost in ((0, 2), (0, 3), (1, 2)):
        batch["view_ok"][lost], batch["cameras"][lost], batch["uv_label"][lost] = False, math.nan, math.nan
    uv, c, _ = canonpose.labels(batch)
    weight = torch.full((2, 4, 21), 0.5).requires_grad_()
    loss = lt_algebraic.held_out(weight, uv, c, lt_algebraic.cameras_of(batch), torch.full((2,), 15.0))
    (slope,) = torch.autograd.grad(loss, weight)
    assert slope.isfinite().all() and (slope[0] == 0).all()       # with two views there is none to hold out
    assert (slope[1, [0, 1, 3]] != 0).all() and (slope[1, 2] == 0).all()
    found = lt_algebraic.predict(lt_algebraic.Weigher(8), batch)["dlt_learnt"]["joints"]
    assert found[0, :2].isfinite().all() and found[1, [0, 1, 3]].isfinite().all()


def test_a_gradient_is_cut_to_its_longest_and_dropped_where_it_is_not_finite():
    gradient = torch.tensor([[math.nan, 1], [3, 4], [0.3, 0.4], [math.inf, 0]])
    cut = lt_algebraic.tamed(gradient, torch.tensor([1, 2, 2, 1.0]))
    assert torch.allclose(cut, torch.tensor([[0, 0], [1.2, 1.6], [0.3, 0.4], [0, 0]]))


def test_two_views_are_too_few_to_hold_one_out():
    with pytest.raises(SystemExit, match="--views must be 3 or more"):
        lt_algebraic.options(["--out", "X", "--views", "2"])


# ---- Verdicts ------------------------------------------------------------------------------------


def result(row, seed, value, budget=1.0, spread=0.0):
    groups = [value + spread * (-1) ** k for k in range(100)]
    return {"row": row, "seed": seed, "budget": budget, "scores": {"x": value}, "groups": {"x": groups},
            "seconds": {"weights": 60}, "machine": "M", "date": "2026-11-22", "precision": ["bf16"]}


WEIGHTS = Weights("peclr")
TWO = Claim("two", "two rows", "peclr", (Row("base"), Row("ours", WEIGHTS)),
            (Comparison("ours is better", ("ours", "x"), ("base", "x"), "10 %", 2),))


def verdict_of(ours, base=(100, 100, 100)):
    found = [result("base", k, b, 0) for k, b in enumerate(base)]
    found += [result("ours", k, v) for k, v in enumerate(ours)]
    (v,) = verdict.verdicts(TWO, TWO.compared[0], found)
    return v


def test_gains_and_their_interval_over_seeds():
    v = verdict_of((90, 91, 92))
    assert v.gain == pytest.approx(9) and v.word == "shown"
    # t of 2 degrees of freedom, 4.3027, x standard deviation 1 / sqrt 3
    assert v.over_seeds == pytest.approx((9 - 2.4841, 9 + 2.4841), abs=1e-3)
    assert v.over_hands == pytest.approx((9, 9))                                    # all hands alike


@pytest.mark.parametrize("ours,word", [
    ((90, 91, 92), "shown"),
    ((99.1, 99.0, 99.2), "not shown"),                      # a gain, but surely smaller than what counts
    ((110, 111, 112), "not shown: the other way"),
    ((80, 100, 95), "undecided"),
    ((90, 91), "not run"),
    ((), "not run")])
def test_verdicts_follow_the_plans_rule(ours, word):
    assert verdict_of(ours).word == word


def test_a_gain_of_few_hands_is_not_shown():
    found = [result("base", k, 100, 0, spread=0) for k in range(3)] + [result("ours", k, 90 + k) for k in range(3)]
    for line in found[3:]:
        line["groups"]["x"] = [100.0] * 99 + [-800.0]          # one group makes the whole gain
    (v,) = verdict.verdicts(TWO, TWO.compared[0], found)
    assert v.over_hands[0] <= 0 and v.word == "undecided"


@pytest.mark.parametrize("name, word, cell", [("x", "not run", "| - | not run |"), ("small_area_mm", "shown", "| - | shown |")])
def test_without_test_hands_only_an_area_has_a_verdict(tmp_path, name, word, cell):
    claim = dataclasses.replace(TWO, compared=(Comparison("ours is better", ("ours", name), ("base", name), "10 %", 2),))
    found = [result("base", k, 100, 0) for k in range(3)] + [result("ours", k, 90 + k) for k in range(3)]
    for line in found:
        line["scores"], line["groups"] = {name: line["scores"]["x"]}, {}
    (v,) = verdict.verdicts(claim, claim.compared[0], found)
    assert v.word == word and np.isnan(v.over_hands).all() and v.gain == pytest.approx(9)
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    assert cell in show.table(claim, tmp_path)
    assert show.draw(claim, tmp_path, tmp_path) == [tmp_path / "two-gains.png"]


def test_hands_are_drawn_alike_in_both_rows():
    """Paired: hands that are hard for both rows do not widen the interval."""
    hard = np.linspace(10, 200, 100)
    low, high = verdict.over_hands([((0.9 * hard).tolist(), hard.tolist())])
    assert low == pytest.approx(10) and high == pytest.approx(10)


def test_a_row_without_pre_training_serves_all_budgets():
    found = [result("base", 0, 100, 0), result("ours", 0, 90, 1), result("ours", 0, 80, 4)]
    assert [(v.budget, v.gain) for v in verdict.verdicts(TWO, TWO.compared[0], found)] == [
        (1, pytest.approx(10)), (4, pytest.approx(20))]


# ---- Tables --------------------------------------------------------------------------------------


def test_a_table_says_what_was_found_and_what_is_missing(tmp_path):
    file = tmp_path / "two.jsonl"
    found = [result("base", k, 100, 0) for k in range(3)] + [result("ours", k, 90 + k) for k in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in found))
    text = show.table(TWO, tmp_path)
    assert "| ours is better | 1 | 90.5 / 100.0 | 10 % | +9.5 ± 0.7 |" in text and "not run (2 of 3 seeds)" in text
    assert "| row | budget | seeds | x |" in text and "| base | - | 3 | 100.0 ± 0.0 |\n| ours | 1 | 2 | 90.5 ± 0.7 |" in text
    assert "5 rows and seeds, 300 s, bf16 on M; 2026-11-22." in text and "Still to run: `python tests/reproduce.py claim two`" in text


def test_a_budget_that_was_not_run_stands_beside_the_one_that_was(tmp_path):
    claim = dataclasses.replace(TWO, budgets=(1, 4))
    found = [result("base", k, 100, 0) for k in range(3)] + [result("ours", k, 90 + k) for k in range(3)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    text = show.table(claim, tmp_path)
    assert text.count("| ours is better |") == 1 and "| shown; at 4 not run |" in text
    found += [result("ours", k, 80 + k, 4) for k in range(2)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    text = show.table(claim, tmp_path)
    assert "| shown |" in text and "| not run (2 of 3 seeds) |" in text and "at 4" not in text
    (tmp_path / "two.jsonl").unlink()
    assert "| ours is better | 1 | - | 10 % | - | - | - | not run |" in show.table(claim, tmp_path)


def test_a_table_shows_the_mean_pose_and_triangulated_labels_in_their_columns(tmp_path):
    claim = dataclasses.replace(
        TWO, compared=(Comparison("x", ("ours", "single_n_mpjpe_mm"), ("base", "single_view_n_mpjpe_mm"), "-", 2),
                       Comparison("y", ("ours", "fusion_pa_mpjpe_mm"), ("ours", "dlt_pa_mpjpe_mm"), "-", 2)),
        also=("single_pa_mpjpe_mm", "single_2d_px"), beside=(("DLT", "ours", "dlt"), ("mean pose", "ours", "mean_pose")))
    base, ours = result("base", 0, 1, 0), result("ours", 0, 1)
    base["scores"] = {"single_view_n_mpjpe_mm": 2, "single_view_pa_mpjpe_mm": 3}
    ours["scores"] = {"single_n_mpjpe_mm": 4, "fusion_pa_mpjpe_mm": 5, "single_pa_mpjpe_mm": 6, "single_2d_px": 7, "dlt_pa_mpjpe_mm": 8,
                      "dlt_n_mpjpe_mm": 9, "dlt_2d_px": 10, "mean_pose_pa_mpjpe_mm": 11, "mean_pose_n_mpjpe_mm": 12, "mean_pose_2d_px": 13}
    longer = ours | {"budget": 4, "scores": {"dlt_pa_mpjpe_mm": 0}}
    assert show.rows_table(claim, [base, ours]).splitlines() == [
        "| row | budget | seeds | single n mpjpe mm | fusion pa mpjpe mm | single pa mpjpe mm | single 2d px |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| base | - | 1 | 2.0 | - | 3.0 | - |",
        "| ours | 1 | 1 | 4.0 | 5.0 | 6.0 | 7.0 |",
        "| DLT | - | 1 | - | 8.0 | - | 10.0 |",
        "| mean pose | - | 1 | - | 11.0 | 11.0 | 13.0 |"]
    assert show.rows_table(claim, [base, ours, longer]).splitlines()[-2:] == [                     # one budget stands for all
        "| DLT | - | 1 | - | 8.0 | - | 10.0 |", "| mean pose | - | 1 | - | 11.0 | 11.0 | 13.0 |"]


def test_a_tuned_row_has_the_mean_pose_of_its_own_test_hands(tmp_path):
    claim = dataclasses.replace(
        TWO, compared=(Comparison("x", ("ours", "small_mpjpe_mm"), ("base", "small_mpjpe_mm"), "-", 2),), also=("small_pa_mpjpe_mm",),
        beside=(("mean pose", "base", "mean_pose"),), monitors=("L_ord",))
    line = result("base", 0, 1, 0)
    line["scores"] = {"small_mpjpe_mm": 80, "small_mean_pose_mpjpe_mm": 99, "small_pa_mpjpe_mm": 18, "small_mean_pose_pa_mpjpe_mm": 21}
    assert show.rows_table(claim, [line]).splitlines()[2:] == [
        "| base | - | 1 | 80.0 | 18.0 | - |", "| mean pose | - | 1 | 99.0 | 21.0 | - |"]


def test_readme_agrees_with_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert show.with_tables(text) == text, "run python tests/reproduce.py readme"


def test_readme_gets_tables_of_what_was_run_and_the_names_of_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "CORE", (PECLR, CLAIMS["hamuco"]))
    monkeypatch.setattr(show, "FURTHER", (CLAIMS["handmim"],))
    (tmp_path / "peclr.jsonl").write_text(json.dumps(result("random", 0, 91.6, 0)) + "\n")
    marks = "above <!-- claims: handmim peclr hamuco --> old <!-- /claims --> between <!-- claims: rest -->\n\n<!-- /claims --> below"
    text = show.with_tables(marks, tmp_path)
    assert text.startswith("above <!-- claims: handmim peclr hamuco -->\n\n**PeCLR, frozen features") and text.count("**") == 2 and " old " not in text
    assert "<!-- /claims --> between <!-- claims: rest -->\n\n| not run yet |" in text and text.endswith("\n\n<!-- /claims --> below")
    assert all(f"claim {name}`" in text for name in ("peclr", "hamuco", "handmim")) and "| HandMIM (Tab. 3 and 5) |" in text
    assert show.with_tables(text, tmp_path) == text


@pytest.mark.parametrize("marks, named", [
    ("no marks", "peclr, rest"), ("<!-- claims: rest --><!-- /claims -->", "peclr"),
    ("<!-- claims: peclr rest --><!-- /claims --><!-- claims: peclr --><!-- /claims -->", "peclr"),
    ("<!-- claims: peclr nobody rest --><!-- /claims -->", "nobody")])
def test_a_claim_without_a_place_in_readme_or_with_two_is_named(tmp_path, monkeypatch, marks, named):
    monkeypatch.setattr(show, "CORE", (PECLR,))
    monkeypatch.setattr(show, "FURTHER", ())
    (tmp_path / "peclr.jsonl").write_text(json.dumps(result("random", 0, 91.6, 0)) + "\n")
    with pytest.raises(ValueError, match=f"README.md: marks must name each of these claims once: {named}$"):
        show.with_tables(marks, tmp_path)


# ---- The papers' tables --------------------------------------------------------------------------


def judged(words, monkeypatch):
    """What eval.py was asked for, as far as it checks before it opens any run."""
    import eval as judge
    seen = []
    monkeypatch.setattr(judge, "start", lambda device: None)
    for name in ("judge", "own_pictures", "inspect"):
        monkeypatch.setattr(judge, name, lambda args, flags, device: seen.append(args))
    monkeypatch.setattr(judge, "draw_curve", seen.append)
    judge.main(words)
    (args,) = seen
    return args


@pytest.mark.parametrize("entry", [e for e in papers.ENTRIES if any(row.commands for row in e.rows)],
                         ids=lambda e: f"{e.paper} {e.item}")
def test_every_command_of_the_papers_tables_is_accepted(entry, monkeypatch):
    for row in entry.rows:
        assert bool(row.commands) != bool(row.why)
        for command in row.commands:
            words = shlex.split(command)
            if words[0] == "eval.py":
                args = judged(words[1:], monkeypatch)
                specs = [args.data] if args.data else []
                assert not args.curve or args.metric in ("mpjpe_mm", "pa_mpjpe_mm", "n_mpjpe_mm", "pa_mpvpe_mm")       # those of every run
                assert set(args.protocol) <= {"ours", *(name for spec in specs for name in PROTOCOLS.get(parse_data(spec)[0], ()))}
            else:
                cfg = accepted(words)
                specs = [cfg.finetune] if cfg.finetune else cfg.data
            assert all(parse_data(spec)[2].startswith("DIR") for spec in specs)


def test_no_table_or_figure_is_missing():
    """What the papers number in their main text."""
    items = {"TI-Net": (4, 5), "PeCLR": (3, 6), "HandMIM": (5, 7), "HaMuCo": (4, 6)}
    for paper, (tables, figures) in items.items():
        listed = {e.item.removesuffix(" a").removesuffix(" b") for e in papers.ENTRIES if e.paper == paper}
        wanted = {f"Table {k + 1}" for k in range(tables)} | {f"Figure {k + 1}" for k in range(figures)}
        assert wanted <= listed and listed - wanted <= {"Algorithm 1", "Section 4.6"}


def test_the_listing_names_every_row_once():
    text = papers.listing()
    assert text.count("\n    python ") == sum(len(row.commands) for e in papers.ENTRIES for row in e.rows)
    assert "HandMIM, Table 5: losses removed\n  all:\n    python handmim.py" in text
