"""Options, folders, logs, checkpoints, processes: what surrounds every training loop."""
import dataclasses
import inspect
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import common
import eval as judge
import hamuco
import handmim
import peclr
import sources.log
import sources.progress
import ti_net
from common import UserError, load_checkpoint, parse, save_checkpoint, settle, share
from group import on_processes
from sources.log import Log
from sources.progress import Run

ROOT = Path(__file__).parent.parent
FIRST = ["--data", "synthetic:calm", "--decoder-width", "4", "--probe-every", "0"]       # flags of pre-training
BOTH = ["--samples", "48", "--backbone", "resnet10", "--image-size", "32", "--batch-size", "8", "--micro-batch", "4",
        "--epochs", "2", "--workers", "0", "--device", "cpu"]
SMALL = [*FIRST, *BOTH]


# ---- Options


@pytest.mark.parametrize("script", [ti_net, peclr, handmim, hamuco])
def test_defaults_match_the_paper_or_say_why(script):
    for field in dataclasses.fields(script.Config):
        note = field.metadata
        assert note["help"], field.name
        if note["paper"] is not common.SILENT:
            assert note["ref"], f"{field.name}: a paper's value without its place"
            assert field.default == note["paper"] or note["why"], f"{field.name}: differs without a why"
        if note["finetune"] is not common.SILENT:
            assert note["finetune_why"] or note["finetune"] == note["finetune_paper"], field.name


def test_ti_net_s_paper_values_are_those_of_section_4_1():
    """Typed from the page: 224 px, 50 epochs, batch 68, base rate 1.5e-3, w 0.001, ResNet-50."""
    paper = {f.name: f.metadata["paper"] for f in dataclasses.fields(ti_net.Config)
             if f.metadata["paper"] is not common.SILENT}
    assert paper == {"backbone": "resnet50", "image_size": 224, "epochs": 50, "batch_size": 68,
                     "lr": 0.0015, "w": 0.001}


def test_help_lists_every_paper_value_and_variant(command):
    text = command("ti_net.py", "--help").stdout
    for value in ("paper resnet50, Tab. 2", "paper 224, Sec. 4.1", "paper 50, Sec. 4.1",
                  "paper 68, Sec. 4.1", "paper 0.0015, Sec. 4.1", "paper 0.001, Sec. 3.2", *ti_net.VARIANTS):
        assert value in text, value


def test_peclr_s_help_lists_every_paper_value_and_variant(command):
    text = command("peclr.py", "--help").stdout
    for value in ("paper resnet152, Sec. 4.6", "pre-training default 128; paper 128, Sec. 4.1", "fine-tuning default 224; paper 224",
                  "paper 2048, Sec. 4.1", "paper 0.0045, Sec. 4.1", "paper 0.0005, Sec. 4.1", *peclr.VARIANTS):
        assert value in text, value


def test_help_gives_quick_values_in_the_order_of_the_stages_or_of_the_one_that_has_one():
    """PeCLR: 2 epochs of pre-training and 10 of fine-tuning, whose rate alone is another; 64 px are those of both."""
    option = {field.name: common._describe(field, peclr.QUICK) for field in dataclasses.fields(peclr.Config)}
    assert option["epochs"].endswith("quick 2 / 10)") and option["lr"].endswith("quick fine-tuning 0.001)")
    assert option["image_size"].endswith("quick 64)") and option["warmup_epochs"].endswith("quick pre-training 0.2)")


def test_quick_changes_defaults_and_explicit_flags_win():
    given = parse(ti_net.Config, ["--quick", "--epochs", "9"], "x", ti_net.QUICK, {})
    cfg = settle(ti_net.Config, given, "finetune", ti_net.QUICK)
    assert cfg.backbone == "resnet10" and cfg.epochs == 9 and cfg.weight_decay == 0.0
    assert settle(ti_net.Config, {}, "pretrain", ti_net.QUICK).epochs == 50
    assert settle(ti_net.Config, {}, "finetune", ti_net.QUICK).epochs == 120


def test_auto_precision_is_bfloat16_where_torch_says_that_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def of(device="auto", asked="auto", backbone="resnet10"):
        return settle(ti_net.Config, dict(device=device, precision=asked, backbone=backbone), "pretrain", {}).precision

    for avx, amx, mkldnn, expected in ((1, 0, 1, "bf16"), (0, 1, 1, "bf16"), (0, 0, 1, "fp32"), (1, 1, 0, "fp32"), (1, 0, 1, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx), raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bool(mkldnn), raising=False)
        assert of("cpu") == of() == expected
        assert of("cuda:1") == of(asked="bf16") == "bf16" and of("cuda", "fp32") == of(asked="fp32") == "fp32"
        assert of(backbone="efficientnet_b0") == "fp32" and of("cuda", backbone="efficientnet_b0") == "bf16"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")                  # another torch, that has no such question
    assert of("cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert of() == "bf16" and of("cpu") == "fp32"


def test_autocast_is_bfloat16_where_the_settled_precision_says_so():
    x = torch.ones(2, 2)
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("auto", torch.float32)):
        with common.autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == kind


@dataclasses.dataclass
class Staged(common.Flags):
    """Flags of both stages, of the first and of the second."""

    lr: float = common.arg(0.1, "rate")
    tau: float = common.arg(0.5, "temperature", stage="pretrain")
    bone: float = common.arg(1.0, "length", stage="finetune")


@pytest.mark.parametrize("stage, good, bad, said", [
    ("pretrain", {"tau": 0.5, "lr": 0.2}, {"bone": 1.0}, "--bone: belongs to fine-tuning, and this command pre-trains"),
    ("finetune", {"bone": 2.0, "lr": 0.2}, {"tau": 0.5}, "--tau: belongs to pre-training, and this command fine-tunes"),
    ("pretrain", {}, {"label_fraction": 0.5}, "--label-fraction: belongs to fine-tuning, and this command pre-trains")])
def test_a_flag_of_the_other_stage_is_refused_unless_quick_runs_both(stage, good, bad, said):
    quick = {"pretrain": {"tau": 0.7}, "finetune": {"bone": 3.0}}
    settled = settle(Staged, good, stage, quick)
    assert all(getattr(settled, name) == value for name, value in good.items())
    with pytest.raises(UserError) as refused:
        settle(Staged, good | bad, stage, quick)
    assert str(refused.value) == said
    assert settle(Staged, good | bad | {"quick": True}, stage, quick).quick
    if "label_fraction" not in bad:                      # HaMuCo's stage has another name
        assert settle(Staged, bad, "hamuco", {}).lr == 0.1


@pytest.mark.parametrize("script", [ti_net, peclr, handmim, hamuco])
def test_no_number_may_be_nan_infinite_or_negative_and_a_rate_is_above_0(script):
    stage = "hamuco" if script is hamuco else "pretrain"
    for option in dataclasses.fields(script.Config):
        if type(option.default) not in (int, float) or option.metadata["stage"] == "finetune":
            continue
        bad = [-1] + [float("nan"), float("inf")] * isinstance(option.default, float) + [0.0] * (option.name == "lr")
        for value in bad:
            with pytest.raises(UserError, match=f"^--{option.name.replace('_', '-')} {value}: must be "):
                settle(script.Config, {option.name: value}, stage, script.QUICK)
        assert getattr(settle(script.Config, {}, stage, script.QUICK), option.name) is not None


@pytest.mark.parametrize("read", [
    lambda maps, at: handmim.sample(maps, 32 * at, 32), lambda maps, at: handmim.sample(maps, 32 * at, 32, pymaf=True),
    hamuco.sample_joints], ids=["handmim", "pymaf", "hamuco"])
def test_maps_may_be_read_anywhere_also_where_a_diverged_network_points(read):
    maps = torch.ones(1, 2, 4, 4, requires_grad=True)
    at = torch.tensor([[[0.0, 0.0], [1e30, 0], [0, -1e38], [math.inf, 0], [math.nan, 0]]], requires_grad=True)
    found = read(maps, at)
    found.sum().backward()
    assert found.shape == (1, 5, 2) and found.isfinite().all() and maps.grad.isfinite().all()


def test_a_warm_up_takes_a_tenth_at_most_unless_it_was_given():
    @dataclasses.dataclass
    class Warm(common.Flags):
        epochs: int = common.arg(100, "epochs")
        warmup_epochs: float = common.arg(10.0, "warm-up")

    for given, epochs in (({}, 10), ({"epochs": 200}, 10), ({"epochs": 5}, 0.5), ({"epochs": 5, "warmup_epochs": 4.0}, 4),
                          ({"quick": True}, 0.2), ({"quick": True, "warmup_epochs": 2.0}, 2)):
        cfg = settle(Warm, given, "pretrain", {"pretrain": {"epochs": 4, "warmup_epochs": 0.2}})
        assert cfg.warmup_epochs == epochs


def test_help_says_to_which_stage_a_flag_belongs(capsys):
    with pytest.raises(SystemExit):
        parse(Staged, ["--help"], "x", {}, {})
    text = capsys.readouterr().out
    assert "pre-training: temperature" in text and "fine-tuning: length" in text and ": rate" not in text


@pytest.mark.parametrize("words, said", [
    (["--variant", "nonsense"], "invalid choice: 'nonsense'"),
    (["--epochs", "-1"], "--epochs -1: must be at least 0"),
    (["--finetune", "synthetic:calm", "--label-fraction", "0"], "--label-fraction 0.0: must be above 0 and at most 1"),
    (["--data", "nowhere"], "data set 'nowhere' is not known"),
    (["--data", "imagenet", "--root", "absent"], "there is no folder absent"),
    (["--data", "folder=empty"], "holds no picture"),
    (["--batch-size", "10", "--micro-batch", "4"], "is no multiple of --micro-batch 4"),
    (["--data", "synthetic:Q"], "synthetic has the domains"),
    (["--init", "absent.pt", "--samples", "16"], "absent.pt: no such file"),
    (["--mano", "absent.pkl"], "absent.pkl"),
    (["--out", "file"], "holds something already"),
    (["--out", "full"], "take another folder, or --resume"),
    (["--resume"], "is not there"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--data", "synthetic", "--finetune", "dexycb"], "one command runs one stage"),
    (["--image-size", "100"], "--image-size 100: must be a multiple of its last map's stride, 32"),
    (["--image-size", "0"], "--image-size 0: must be a multiple"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--lr", "nan"], "--lr nan: must be above 0"),
    (["--save-minutes", "nan"], "--save-minutes nan: must be above 0"),
    (["--weight-decay", "-0.1"], "--weight-decay -0.1: must be at least 0"),
    (["--w", "inf"], "--w inf: must be at least 0 and at most 1,000,000,000"),
    (["--workers", "-1"], "--workers -1: must be at least 0"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--seed", str(2 ** 64)], "--seed 18446744073709551616: must be at least 0 and at most 18,446,744,073,709,551,615"),
    (["--cache", "file", "--image-size", "64", "--backbone", "resnet10"], "--cache file: cannot be written"),
    (["--finetune", "dexycb=absent"], "there is no folder absent"),
    (["--backbone", "vit_mini", "--image-size", "30"], "multiple of the ViT's patch"),
    (["--nonsense"], "unrecognized arguments: --nonsense")])
def test_bad_input_gives_one_sentence_and_leaves_no_folder(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    base = [] if {"--data", "--finetune"} & set(words) else ["--data", "synthetic:calm"]
    small = ["--device", "cpu"] if "--device" not in words else []
    try:
        code = common.guarded(lambda: ti_net.main([*base, *small, *words]))
    except SystemExit as stop:                                            # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path / "file" / "log.jsonl").exists()


# ---- Folders, logs, checkpoints


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.ones(3)})

    def broken(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError, match=r"a.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(tmp_path / "a.pt")["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path):
    log = Log(tmp_path)
    log(step=1, loss=torch.tensor(0.123456789))
    kept = log.size()
    log(step=2, loss=0.5)
    Log(tmp_path, kept)(step=2, loss=0.25)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.123457}, {"step": 2, "loss": 0.25}]


def test_the_screen_has_words_where_the_file_has_json(tmp_path, capsys, monkeypatch):
    """Steps 11 to 21 took two seconds: 11 steps of 68 samples are 374 a second, whatever was resumed before."""
    model = torch.nn.Linear(2, 2)
    run = Run(tmp_path, "ti_net", ti_net.Config(), model, torch.optim.AdamW(model.parameters()), total=2000)
    run.step = run.first = 39
    monkeypatch.setattr(sources.progress.time, "monotonic", lambda: run.began + 2)
    for _ in range(11):
        run.advance({"loss": torch.tensor(1.25), "L_inv": torch.tensor(0.03125)}, 0, 0.1, may_save=True)
    run.log(epoch=1, val_mpjpe_mm=38.14, agreement=0.25)
    run.log(epoch=2)
    said = capsys.readouterr().out
    assert "step 50 of 2,000: loss 1.25, L_inv 0.03125; 374 samples/s" in said
    assert "epoch 1: val mpjpe 38.1 mm, agreement 0.25" in said and "{" not in said and "epoch 2" not in said
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-2]) == {
        "epoch": 1, "val_mpjpe_mm": 38.14, "agreement": 0.25}


def test_losses_are_drawn_once_there_are_ten_lines(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sources.log, "curve", lambda path, series, *words: drawn.append((path.name, series)))
    log = Log(tmp_path)
    for step in range(1, 11):
        assert not drawn
        log(step=step, epoch=0, lr=0.1, loss=2.0 * step, L_inv=1.0 * step, entropy=3.0)
        log(epoch=step)
        sources.log.draw_losses(tmp_path)
    steps = list(range(1, 11))
    assert drawn == [("losses.png", {"loss": (steps, [2.0 * s for s in steps]), "L_inv": (steps, [1.0 * s for s in steps])})]


def test_a_resumed_run_goes_on_from_its_checkpoint_and_cuts_its_log(tmp_path):
    def begin():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        return Run(tmp_path, "ti_net", ti_net.Config(), model,
                          torch.optim.AdamW(model.parameters()), total=20), model

    run, model = begin()
    for step in range(3):
        run.advance({"loss": torch.tensor(1.0)}, 0, 0.1, may_save=False)
        if step == 1:
            run.memo["curve"] = [4.0]
            torch.nn.init.ones_(model.weight)
            run.save()
    again, model = begin()
    assert again.step == 2 and again.memo == {"curve": [4.0]} and (model.weight == 1).all()
    steps = [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").open()]
    assert steps == [None, 1, 2]


def test_a_resumed_run_has_its_optimiser_back(tmp_path):
    def begin():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return Run(tmp_path, "ti_net", ti_net.Config(), model, optimizer, total=20), model, optimizer

    def step(run, model, optimizer, k):
        model.zero_grad()
        model(torch.tensor([[1.0, k]])).square().sum().backward()
        optimizer.step()
        run.advance({"loss": torch.tensor(1.0)}, 0, 0.1, may_save=False)

    run, model, optimizer = begin()
    for k in range(5):
        step(run, model, optimizer, k)
        if k == 2:
            run.save()
    again, copy, optimizer = begin()
    for k in range(3, 5):
        step(again, copy, optimizer, k)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters()))


def test_a_run_cannot_go_on_in_another_precision_also_where_its_file_does_not_say_which(tmp_path):
    model = torch.nn.Linear(2, 2)
    begin = lambda **more: Run(tmp_path, "ti_net", ti_net.Config(**more), model, torch.optim.AdamW(model.parameters()), 20)
    begin(precision="bf16").save()
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["precision"] == "bf16"
    assert json.loads((tmp_path / "config.json").read_text())["cfg"]["precision"] == "bf16"
    with pytest.raises(UserError, match="was written with precision bf16, not fp32; .*, so give --precision bf16"):
        begin(precision="fp32")
    file = torch.load(tmp_path / "last.pt", weights_only=True)
    del file["cfg"]["precision"]                             # as before there was the flag: float32 on a CPU
    torch.save(file, tmp_path / "last.pt")
    begin(precision="fp32")
    with pytest.raises(UserError, match="was written with precision fp32, not bf16"):
        begin(precision="bf16")


def test_a_run_cannot_go_on_with_another_batch_size(tmp_path):
    model = torch.nn.Linear(2, 2)
    begin = lambda **more: Run(tmp_path, "ti_net", ti_net.Config(**more), model, torch.optim.AdamW(model.parameters()), 20)
    begin(batch_size=68).save()
    with pytest.raises(UserError, match="was written with batch_size 68, not 34; a resumed run cannot change it"):
        begin(batch_size=34)


def test_a_lost_loss_stops_the_run_in_a_sentence(tmp_path):
    model = torch.nn.Linear(2, 2)
    run = Run(tmp_path, "ti_net", ti_net.Config(), model, torch.optim.AdamW(model.parameters()), 20)
    with pytest.raises(UserError, match="the loss is not finite any more at step 1; a lower --lr may help"):
        run.advance({"loss": torch.tensor(float("nan"))}, 0, 0.1, may_save=False)


def test_weights_decay_and_biases_and_norms_do_not():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 3))
    model[2].bias.requires_grad_(False)
    groups = {g["weight_decay"]: {tuple(p.shape) for p in g["params"]}
              for g in common.decay_groups(model, 0.05)}
    assert groups == {0.05: {(2, 1, 3, 3), (3, 2)}, 0.0: {(2,)}}


def test_a_wrapped_network_is_unwrapped_and_synchronised_once_a_step(tmp_path):
    net = torch.nn.Linear(2, 2)
    compiled = torch.compile(net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrapped in (net, compiled, DistributedDataParallel(net), DistributedDataParallel(compiled)):
            assert common.unwrapped(wrapped) is net
            for last in (False, True):                   # gradients cross processes at the last micro-batch only
                with common.accumulate(wrapped, last):
                    assert getattr(wrapped, "require_backward_grad_sync", last) == last
    finally:
        del wrapped
        torch.distributed.destroy_process_group()


# ---- Processes


def test_a_gpu_chooses_its_kernels_and_updates_all_weights_in_one_and_a_cpu_stays_as_it_is(monkeypatch):
    """A device that does not exist, asked for by name; every script's AdamW or Adam takes `fused_on`."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: None)
    for device, on in (("cpu", None), ("cuda", True)):
        assert common.fused_on(common.start(device)) is on and torch.backends.cudnn.benchmark is bool(on)
    for script in (ti_net, handmim, peclr, hamuco):
        made = re.findall(r"torch\.optim\.Adam(?:W)?\((?:[^()]|\([^()]*\))*\)", inspect.getsource(script))
        assert made and all("fused=" in call for call in made), script


def test_micro_batches_must_be_shared_evenly(monkeypatch):
    monkeypatch.setattr("common.world", lambda: 3)
    with pytest.raises(UserError, match="take 1, 2, 4 processes"):
        share(68, 17)
    monkeypatch.setattr("common.rank", lambda: 2)
    assert list(share(48, 8)) == [4, 5]


# ---- Whole runs


def test_a_kill_at_a_random_moment_changes_no_bit_of_any_script_s_run():
    """One SIGKILL each, at moments drawn afresh in each test run; tests/endurance.py has the other stages, and more kills."""
    halves = ("ti_net:pretrain", "peclr:finetune"), ("handmim:pretrain", "hamuco:train")      # at once: they take one thread each
    command = (sys.executable, str(ROOT / "tests" / "endurance.py"), "--kills", "1", "--seed", str(random.randrange(10 ** 6)))
    runs = [subprocess.Popen([*command, *stages], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for stages in halves]
    texts = [run.communicate(timeout=600) for run in runs]
    for stages, run, (printed, errors) in zip(halves, runs, texts):
        lines = printed.splitlines()
        assert run.returncode == 0, printed + errors[-3000:]
        assert [line.split(": 1 kills, 1 resumes")[0] for line in lines] == list(stages)
        assert all("files equal" in line for line in lines)


def test_pretrain_then_finetune_then_eval(here, capsys):
    """The three commands of a user, each by its ordinary flags."""
    ti_net.main([*SMALL, "--samples", "16", "--epochs", "1", "--out", "pre"])
    assert {p.name for p in (here / "pre").iterdir()} == {"backbone.pt", "flags.json", "pretrain-ti_net"}
    assert {"views.png", "reconstructions.png", "log.jsonl", "last.pt", "config.json"} <= {
        p.name for p in (here / "pre" / "pretrain-ti_net").iterdir()}
    tune = ["--finetune", "synthetic:calm", "--init", "pre/backbone.pt", *BOTH, "--samples", "16",
            "--epochs", "1", "--label-fraction", "0.5"]
    capsys.readouterr()
    ti_net.main([*tune, "--out", "tuned"])
    said = capsys.readouterr().out
    assert "8 labels used" in said and "scratch: not run" in said and ".lock" not in said
    results = json.loads((here / "tuned" / "metrics.json").read_text())["results"]
    assert set(results[0]["rows"]) == {"mean_pose", "ti_net-on-synthetic-calm"} and results[0]["n"] == 24
    for name in ("finetune.pt", "predictions.png", "curve.png", "finetune-ti_net-on-synthetic-calm/views.png"):
        assert (here / "tuned" / name).stat().st_size > 1000
    ti_net.main([*tune, "--epochs", "0", "--out", "untrained"])
    assert (here / "untrained" / "finetune.pt").exists()
    capsys.readouterr()
    judge.main(["tuned", "--workers", "0", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "mean_pose" in said and "24 samples scored" in said
    again = json.loads((here / "tuned" / "eval-synthetic-calm" / "metrics.json").read_text())["results"]
    two, one = (each[0]["rows"]["ti_net-on-synthetic-calm"]["mpjpe_mm"] for each in (again, results))
    assert two == pytest.approx(one, abs=1e-6)


def statistics_of(cached):
    """Running statistics and more of a small network after three steps of six micro-batches, `cached` run twice each."""
    common.start("cpu")
    gathers = []
    plain = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda x, *more: (gathers.append(x.numel()), plain(x, *more))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
                                torch.nn.Linear(64, 5), torch.nn.BatchNorm1d(5, momentum=0.3), torch.nn.BatchNorm1d(5))
    model.register_buffer("constant", torch.tensor([float(common.rank())]))   # as MANO's, but another in each process
    model.train()
    model[6].eval()                                                           # a frozen layer
    pictures = torch.randn(3, 12, 3, 6, 6) * torch.arange(1.0, 13)[:, None, None, None]
    for batch in pictures:
        with common.batch_statistics(model):
            for m in share(12, 2):
                for _ in range(1 + cached):                                   # the cached step runs each one twice
                    model(batch[2 * m:2 * m + 2])
    return {"state": model.state_dict(), "gathers": gathers, "constant": model.constant, "momentum": model[5].momentum,
            "hooks": sum(len(layer._forward_hooks) for layer in model.modules())}


def slow_statistics():
    """Running statistics of `statistics_of`'s network after three steps of six micro-batches, layer by layer."""
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(64, 5)
    pictures = torch.randn(3, 12, 3, 6, 6) * torch.arange(1.0, 13)[:, None, None, None]
    first, second = [torch.zeros(4), torch.ones(4)], [torch.zeros(5), torch.ones(5)]
    for step in pictures:
        seen = []
        for m in range(6):
            x = conv(step[2 * m:2 * m + 2]).detach()                      # (2, 4, 4, 4)
            flat = x.movedim(1, -1).reshape(32, 4)
            mean, var = flat.mean(0), flat.var(0, correction=0)
            y = linear(((x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()).relu().flatten(1)).detach()
            seen.append((mean, 32 / 31 * var, y.mean(0), y.var(0, correction=1)))
        means = [torch.stack(part).mean(0) for part in zip(*seen)]
        first = [0.9 * old + 0.1 * new for old, new in zip(first, means[:2])]
        second = [0.7 * old + 0.3 * new for old, new in zip(second, means[2:])]
    return first, second


@pytest.mark.parametrize("count, cached", [(1, True), (2, False), (3, True)])
def test_running_statistics_move_once_a_step_on_any_number_of_processes(tmp_path, count, cached):
    first, second = slow_statistics()
    for rank, found in enumerate(on_processes(tmp_path, count, lambda: statistics_of(cached))):
        state = found["state"]
        for layer, (mean, var) in (("1", first), ("5", second)):
            assert torch.allclose(state[f"{layer}.running_mean"], mean, rtol=1e-5, atol=1e-6), layer
            assert torch.allclose(state[f"{layer}.running_var"], var, rtol=1e-5), layer
            assert state[f"{layer}.num_batches_tracked"] == 3
        assert (state["6.running_var"] == 1).all() and state["6.num_batches_tracked"] == 0
        assert found["constant"] == rank and found["momentum"] == 0.3 and found["hooks"] == 0
        assert found["gathers"] == ([2 * 4 + 1 + 2 * 5 + 1] * 3 if count > 1 else [])


def test_a_step_of_one_micro_batch_moves_the_statistics_as_torch_does_and_a_broken_step_does_not():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.BatchNorm1d(3) for _ in range(2))
    for _ in range(3):
        x = torch.randn(8, 3) + 2
        with common.batch_statistics(ours):
            assert torch.equal(ours(x), theirs(x))
    assert torch.allclose(ours.running_mean, theirs.running_mean) and torch.allclose(ours.running_var, theirs.running_var)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        with common.batch_statistics(ours):
            ours(x)
            raise KeyboardInterrupt
    with common.batch_statistics(ours):
        pass                                             # and a step without a call
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())
    assert ours.momentum == 0.1


def gradients_of_a_step():
    """Gradients of six micro-batches of TI-Net in float64, shared out to the processes."""
    torch.set_default_dtype(torch.float64)
    device = common.start("cpu")
    cfg = ti_net.Config(backbone="resnet10", image_size=32, batch_size=12, micro_batch=2, rank=8, embed_dim=4,
                        decoder_width=4, w=1.0)
    torch.manual_seed(0)
    model = ti_net.TINet(cfg)
    net = common.parallel(model, device, False)
    pictures = 255 * torch.rand(12, 3, 48, 48)
    mine = share(12, 2)
    for m in mine:
        batch = {"image": pictures[2 * m:2 * m + 2], "index": torch.arange(2 * m, 2 * m + 2)}
        with common.accumulate(net, last=m == mine[-1]):
            (ti_net.pretrain_step(net, batch, cfg, 0)["loss"] / len(mine)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_gradients_agree_on_one_two_and_three_processes(tmp_path):
    found = {count: on_processes(tmp_path, count, gradients_of_a_step)[0] for count in (1, 2, 3)}
    # a bias before BatchNorm has no gradient but rounding: 1e-10 of a millionth of the largest, at least
    largest = max(float(gradient.abs().max()) for gradient in found[1].values())
    for count in (2, 3):
        for name, gradient in found[1].items():
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            assert float((gradient - found[count][name]).abs().max()) < 1e-10 * scale, (count, name)
