"""Runs beside runs: what a row is called, which runs share a line, which cameras and splits are tested, what is
handed in."""
import json
import math
import zipfile

import numpy as np
import pytest
import torch

import eval as judge
import hamuco
import handmim
import peclr
import sources.stages
import ti_net
from common import UserError, project, save_checkpoint
from sources import Cameras, Source, scored_split
from sources.judging import Exam, assess
from sources.recipes import key_of, pretraining, recipe, row_name
from sources.synthetic import Synthetic
from sources.tables import seed_groups
from trees import open_tree, rig_tree, write_freihand
from test_eval import truth
from test_eval_protocols import HERE, results, run_of


def pretrained(folder, name="peclr", file="backbone.pt", seed=0, **options):
    """A folder as a pre-training leaves it, with options of our choice."""
    stage = folder / f"pretrain-{name}"
    stage.mkdir(parents=True)
    cfg = {"data": ["freihand:90=/d"], "init": "random", "seed": seed, "out": str(folder), "epochs": 3} | options
    (stage / "config.json").write_text(json.dumps({"cfg": cfg}))
    (folder / file).write_bytes(b"")
    return str(folder / file)


# ---- Rows ----


def test_a_row_says_what_its_first_weights_learnt_and_on_what(tmp_path):
    """Fig. 6 has PeCLR on FreiHAND and on FreiHAND with YouTube3DHands; Fig. 5 has it under several augmentations."""
    one = pretrained(tmp_path / "a")
    both = pretrained(tmp_path / "b", data=["freihand=/d", "yt3d=/y"])
    drawn = pretrained(tmp_path / "c", augment=["scale", "rotation"])
    assert row_name(one) == "peclr-on-freihand-90" and row_name(both) == "peclr-on-freihand+yt3d"
    assert row_name(drawn) == "peclr-scale-rotation-on-freihand-90"
    assert row_name("random") == "scratch" and row_name(both, "ours") == "ours" and row_name("random", "x") == "x"
    assert row_name("/elsewhere/resnet50.pth") == "resnet50"


def test_two_pre_trainings_in_one_folder_keep_their_files_apart(tmp_path):
    plain = pretrained(tmp_path, "simclr", "backbone-simclr.pt", data=["coco"])
    ours = pretrained(tmp_path, "peclr")
    assert row_name(plain) == "simclr-on-coco" and row_name(ours) == "peclr-on-freihand-90"
    assert pretraining(ours)["name"] == "peclr" and pretraining(str(tmp_path / "other.pt")) is None


@pytest.mark.parametrize("module", [ti_net, peclr, handmim])
def test_row_names_a_fine_tuning_and_is_refused_elsewhere(tmp_path, monkeypatch, module):
    rows, init = [], pretrained(tmp_path / "p", "x")
    monkeypatch.setattr(module, "finetune", lambda cfg, out, row, device: rows.append(row))
    monkeypatch.setattr(module, "report", lambda cfg, folder, row, *rest: rows.append((folder.name, row)))
    words = ["--finetune", "synthetic", "--init", init, "--device", "cpu", "--batch-size", "4", "--micro-batch", "4"]
    module.main([*words, "--out", str(tmp_path / "a")])
    module.main([*words, "--row", "fig-5", "--out", str(tmp_path / "b")])
    name = "x-on-freihand-90"
    assert rows == [name, (f"finetune-{name}", name), "fig-5", ("finetune-fig-5", "fig-5")]
    with pytest.raises(UserError, match="--row"):
        module.main(["--row", "fig-5", "--device", "cpu", "--out", str(tmp_path / "c")])
    with pytest.raises(UserError, match="--row a/b: becomes the name of a folder"):
        module.main([*words, "--row", "a/b", "--out", str(tmp_path / "d")])


def test_hamuco_s_rows_have_no_other_name():
    with pytest.raises(UserError, match="--row"):
        hamuco.stage_config({"row": "mine"})


# ---- Which runs are repeats ----


def test_a_recipe_is_all_but_the_seed_and_the_folders(tmp_path):
    inits = [pretrained(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    other = pretrained(tmp_path / "2", data=["freihand:90=/d", "yt3d"])
    cfgs = [{"init": init, "seed": k, "out": f"r{k}", "lr": 0.1, "workers": k, "row": f"x{k}"}
            for k, init in enumerate([*inits, other])]
    same, too, apart = (key_of(recipe(cfg)) for cfg in cfgs)
    assert same == too != apart
    assert recipe(cfgs[0]) == {"lr": 0.1, "init.data": ["freihand:90=/d"], "init.epochs": 3, "init.init": "random",
                               "init.name": "peclr"}
    assert recipe(cfgs[0], ("lr",)) == {key: x for key, x in recipe(cfgs[0]).items() if key != "lr"}
    assert key_of(recipe(cfgs[0] | {"lr": 0.2})) != same
    assert recipe({"init": "runs/a/half.pt", "out": "runs/a"}) == recipe({"init": "runs/b/half.pt", "out": "runs/b"})
    assert recipe({"init": "x.pth", "out": "o"}) != recipe({"init": "y.pth", "out": "o"})


def test_rows_are_repeats_only_where_their_first_weights_are(tmp_path):
    inits = [pretrained(tmp_path / "a"), pretrained(tmp_path / "b", seed=5), pretrained(tmp_path / "c", epochs=9)]
    rows = {}
    for k, init in enumerate(inits):
        exam = Exam(range(3), "coco", None, None)
        net = judge.Net(str(k), "peclr", None, peclr.Config(seed=k, init=init), "peclr", {}, 8, 1.0)
        rows[f"r{k}"] = sources.judging.Row(exam, net, "peclr")
    assert seed_groups(rows) == {"peclr, 2 seeds": ["r0", "r1"]}


def finished(folder, error, cfg, row="peclr"):
    """A run's folder with one row and its error."""
    (folder / f"finetune-{row}").mkdir(parents=True)
    (folder / f"finetune-{row}" / "config.json").write_text(json.dumps({"cfg": cfg}))
    (folder / "metrics.json").write_text(json.dumps({"data": "x", "results": [
        {"protocol": "ours", "rows": {"mean_pose": {"mpjpe_mm": 60.0}, row: {"mpjpe_mm": error}}}]}))


def test_a_curve_averages_seeds_and_nothing_else(here, capsys):
    """Fig. 6: two pre-trainings whose rows are both called peclr, two seeds of the first."""
    small = [pretrained(here / f"p{seed}", seed=seed) for seed in (0, 1)]
    large = pretrained(here / "q", data=["freihand:90=/d", "yt3d=/y"])
    for k, (init, error) in enumerate(((small[0], 40.0), (small[1], 42.0), (large, 30.0))):
        finished(here / f"r{k}", error, {"label_fraction": 0.1, "seed": k, "init": init, "out": f"r{k}"})
    judge.main(["r0", "r1", "r2", "--curve", "label_fraction", "--out", "o"])
    lines = (here / "o" / "curve.md").read_text().splitlines()[2:]
    assert len(lines) == 2 and "41.00 (n 2)" in lines[0] and "30.00 (n 1)" in lines[1]
    assert "init.data ['freihand:90=/d']" in lines[0] and "yt3d" in lines[1] and "seed" not in lines[0]
    judge.main(["r0", "r0", "--curve", "label_fraction", "--out", "p"])
    assert "(n 1)" in (here / "p" / "curve.md").read_text()                     # a run counts once


def test_the_option_that_a_curve_is_over_parts_no_line(here):
    for k, share in enumerate((0.1, 1.0)):
        finished(here / f"r{k}", 40.0 - k, {"label_fraction": share, "seed": 0, "variant": ["a", "b"][:k]})
    judge.main(["r0", "r1", "--curve", "label_fraction", "--out", "o"])
    assert len((here / "o" / "curve.md").read_text().splitlines()) == 4          # they differ in variant too
    judge.main(["r1", "--curve", "variant", "--out", "p"])
    assert "peclr,a,39.0" in (here / "p" / "curve.csv").read_text()


def test_curves_over_views_are_over_the_cameras_that_were_tested(here, capsys):
    """The first cameras make one line; others are another test, and so another line. Trained with 8 throughout."""
    finished(here / "r", 9.0, {"views": 8, "seed": 0, "data": ["hanco"]}, "hamuco")
    for views, error in (([0], 20.0), ([0, 1], 15.0), ([3, 5], 17.0)):
        folder = here / "r" / f"eval-hanco-views-{len(views)}{views[-1]}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"data": "hanco", "results": [
            {"protocol": "hanco", "views": views, "split": "test", "rows": {"fusion": {"mpjpe_mm": 0.0}}},
            {"protocol": "ours", "views": views, "split": "test",
             "rows": {"mean_pose": {"mpjpe_mm": 60.0}, "fusion": {"mpjpe_mm": error}}}]}))
    judge.main(["r", "--curve", "views", "--out", "o"])
    found = (here / "o" / "curve.csv").read_text().splitlines()[1:]
    assert [line.rpartition('"')[2] or line for line in found] and len(found) == 3
    first = [line for line in found if "the first" in line]
    assert [line.rpartition(",")[0][-1] + line.rpartition(",")[2] for line in first] == ["120.0", "215.0"]
    assert any("[3, 5]" in line and line.endswith(",2,17.0") for line in found)


# ---- Cameras ----


def test_some_cameras_of_rendered_moments_are_those_of_all():
    data = Synthetic(32, 8, 0, "test", 3)
    rows, device = torch.tensor([4, 1]), torch.device("cpu")
    every = next(data.batches([rows], device, 0))
    some = Cameras(data, (2, 0))
    batch = next(some.batches([rows], device, 0))
    for key in ("image", "uv_label", "joints", "cameras", "view_ok", "K"):
        assert torch.equal(batch[key], every[key][:, [2, 0]]), key
    assert len(some) == 8 and some.targets(rows)["uv"].shape[:2] == (2, 2)
    assert torch.equal(some.targets(rows)["side_px"], data.targets(rows)["side_px"])


def test_some_cameras_of_a_rig_are_read_alone(tmp_path):
    rig_tree(tmp_path / "rig")
    both = open_tree(tmp_path / "rig")
    alone = sources.Views(both.hands, 2, (1,))
    assert len(both) == 10 and len(alone) == 9                                   # one moment has no second camera
    assert alone[0]["image"].shape[0] == 1 and torch.equal(alone[0]["cameras"][0], both[0]["cameras"][1])
    with pytest.raises(UserError, match="has 2 cameras, from 0 on, so no 2"):
        sources.Views(both.hands, 3, (0, 2))


@pytest.fixture
def multi_view_run(here, monkeypatch):
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 8, "test": 8})
    monkeypatch.setattr(judge, "images_a_second", lambda exam, net, count: 1.0)
    return run_of(here / "run", hamuco, finetune="", data=("synthetic:calm",), views=3)


def test_a_multi_view_network_is_tested_with_the_cameras_that_are_named(here, multi_view_run, monkeypatch):
    seen, assessed = [], judge.assess

    def watched(exam, net, mean):
        seen.append(next(exam.data.batches([torch.tensor([2, 5])], torch.device("cpu"), 0))["cameras"])
        return assessed(exam, net, mean)

    monkeypatch.setattr(judge, "assess", watched)
    for views in (["2"], ["0", "2"], []):
        judge.main(["run", *HERE, *(["--views", *views] if views else [])])
    folders = ("eval-synthetic-calm-views-0-1", "eval-synthetic-calm-views-0-2", "eval-synthetic-calm")
    assert [results(here / "run" / name / "metrics.json")["views"] for name in folders] == [[0, 1], [0, 2], [0, 1, 2]]
    assert torch.equal(seen[0], seen[2][:, :2]) and torch.equal(seen[1], seen[2][:, [0, 2]])
    finished(here / "run", 9.0, {"views": 3}, "hamuco")
    judge.main(["run", "--curve", "views", "--metric", "n_mpjpe_mm", "--out", "o"])
    assert "the first" in (here / "o" / "curve.md").read_text() and "[0, 2]" in (here / "o" / "curve.md").read_text()


@pytest.mark.parametrize("views, said", [(["0", "-1"], "counted from 0"), (["1", "1"], "none counts twice"),
                                         (["0"], "leaves no camera")])
def test_views_that_cannot_be_tested_are_refused(here, multi_view_run, views, said):
    with pytest.raises(UserError, match=said):
        judge.main(["run", *HERE, "--views", *views])
    run_of(here / "other")
    with pytest.raises(UserError, match="--views: ti_net sees one picture at a time"):
        judge.main(["other", *HERE, "--views", "2"])


# ---- Splits and submissions ----


@pytest.mark.parametrize("spec, split", [("freihand:90", "val"), ("freihand:90-gs=d", "val"), ("freihand", "test"),
                                         ("coco", "val"), ("dexycb:s1", "test"), ("synthetic:B", "test")])
def test_the_split_that_closes_a_stage_is_the_paper_s(tmp_path, monkeypatch, capsys, spec, split):
    """PeCLR's Table 1 is about a tenth of FreiHAND's training hands; COCO has no test split."""
    assert scored_split(spec) == split
    asked = []
    monkeypatch.setattr(sources.stages, "open_data", lambda cfg, specs, split, *rest: asked.append((specs, split)) or [])
    (tmp_path / "finetune-x").mkdir()
    save_checkpoint(tmp_path / "finetune-x" / "best.pt", {"row": "x"})
    cfg = ti_net.Config(finetune=spec)
    sources.stages.report(cfg, tmp_path / "finetune-x", "x", torch.device("cpu"), ti_net.build, 8, 1.0)
    assert asked == [((spec,), split)] and f"no {split} split" in capsys.readouterr().out
    assert (tmp_path / "finetune.pt").is_file()


def test_a_submission_to_freihand_never_sees_its_truth(here, monkeypatch):
    """The evaluation's truth may lie in the folder: neither crops nor places come from it."""
    monkeypatch.setattr(judge, "images_a_second", lambda exam, net, count: 1.0)
    (here / "d").mkdir()
    write_freihand(here / "d", "evaluation", 9)
    run_of(here / "run")
    run_of(here / "two", peclr)
    for words, said in ((["run", "--data", "freihand=d"], "give --data freihand:centre=d$"),
                        (["two", "--data", "freihand:centre=d"], "give --data freihand:centre=d --two-pass$"),
                        (["two", "--data", "freihand=d", "--two-pass"], "freihand:centre=d --two-pass$")):
        with pytest.raises(UserError, match=said):
            judge.main([*words, "--submit", *HERE])
    found = []
    for shift in (0.0, 0.1):
        xyz = np.array(json.loads((here / "d" / "evaluation_xyz.json").read_text())) + shift
        (here / "d" / "evaluation_xyz.json").write_text(json.dumps(xyz.tolist()))
        for run, more in (("run", []), ("two", ["--two-pass"])):
            judge.main([run, "--data", "freihand:centre=d", "--submit", *more, *HERE, "--out", f"{run}{shift}"])
            with zipfile.ZipFile(here / f"{run}{shift}" / "pred.zip") as archive:
                found.append(np.array(json.loads(archive.read("pred.json"))[0]))
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
    assert np.isfinite(found[0]).all() and found[0].shape == (9, 21, 3)


# ---- Truth and labels ----


class Pictures(Source):
    """Hands in memory; those before `known` have no truth, and none has labels but the last."""

    name, box_source = "pictures", "joints"

    def __init__(self, n=66, known=64):
        t = truth(n)
        self.numbers = {"joints": t["true"], "joints_ok": t["ok"].clone(), "uv": torch.full((n, 21, 2), 9.0),
                        "crop": torch.eye(3).expand(n, 3, 3), "visible": t["ok"], "pose": torch.zeros(n, 48),
                        "shape": torch.zeros(n, 10), "K": torch.eye(3).expand(n, 3, 3),
                        "image": torch.zeros(n, 3, 8, 8)}
        for key in ("joints", "uv"):
            self.numbers[key][:known] = math.nan
        self.numbers["joints_ok"][:known] = False

    def __len__(self):
        return len(self.numbers["joints"])

    def batches(self, plan, device, workers):
        for rows in plan:
            yield {key: x[rows] for key, x in self.numbers.items()} | {"side": ["right"] * len(rows)}


def test_truth_that_only_the_last_hands_have_is_found():
    """The first batch of 64 has none: what is known is decided over all."""
    data = Pictures()
    exam = Exam(data, "folder", None, torch.device("cpu"))
    rows, _ = assess(exam, lambda batch: {"x": {"joints": batch["joints"].nan_to_num() + 0.01, "uv": batch["uv"].nan_to_num()}})
    assert rows["x"].count("scored ours") == 2 and rows["x"].unit == "mm" and rows["x"].means()["mpjpe_mm"] < 1e-3
    assert rows["x"].errors.isfinite().sum() == 2 and rows["x"].means()["epe_2d_px"] == 0


def test_a_label_that_is_missing_scores_nothing_and_says_nothing_of_3d():
    data = Pictures(known=0)
    labels = torch.full((66, 21, 2), math.nan)
    labels[5] = 12.0
    exam = Exam(data, "folder", None, torch.device("cpu"))
    rows, _ = assess(exam, lambda batch: {"labels": {"uv": labels[batch["index"]]},
                                          "x": {"joints": batch["joints"], "uv": batch["uv"]}})
    means = rows["labels"].means()
    assert rows["labels"].count("scored ours") == 1 and means["epe_2d_px"] == pytest.approx(3 * 2 ** 0.5)
    assert not [metric for metric in means if "mpjpe" in metric] and rows["x"].count("scored ours") == 66


def test_rows_of_labels_say_nothing_of_3d():
    data = Synthetic(32, 8, 0, "test", 2)
    batch = next(data.batches([torch.arange(2)], torch.device("cpu"), 0))
    assert hamuco.predictor({}, 32, False)(batch) == {}
    found = hamuco.predictor({}, 32, data.gives("uv_label"))(batch)
    assert {"labels", "dlt", "ransac"} <= set(found) and "joints" not in found["labels"]


# ---- Your own cameras ----


class Knowing(torch.nn.Module):
    """Says where the hand of each moment is: world joints (21, 3) by the moment's name, seen by every camera."""
    USES = frozenset({"image", "view_ok", "cameras", "K", "id"})
    size = 64

    def __init__(self, world, mirrored):
        super().__init__()
        self.world, self.mirrored = world, mirrored

    def predict(self, batch):
        X = torch.stack([self.world[name] for name in batch["id"]])
        X = X * torch.tensor([-1.0, 1, 1]) if self.mirrored else X
        x = hamuco.to_cameras(X, batch["cameras"])
        x = torch.where(batch["view_ok"][..., None, None], x, torch.nan)
        rooted = x - x[:, :, 9:10]
        return {"single": {"joints": rooted, "uv": project(x, batch["K"].to(x))},
                "fusion": {"joints": rooted, "verts": (rooted[:, :, :1] + 0.01).expand(-1, -1, 778, -1), "uv": project(x, batch["K"].to(x))}}


@pytest.mark.parametrize("side, unit", [("right", 0.5), ("left", 0.5), ("right", None)])
def test_a_rig_s_hands_come_back_in_world_axes_of_the_rig(here, monkeypatch, side, unit):
    """Ten frames, of which the fifth is in one camera only: it is left out and named."""
    X = (unit or 1) * rig_tree(here / "rig", unit=unit, side=side)
    world = {f"{f:04d}": torch.tensor(X[f], dtype=torch.float32) for f in range(10)}
    run_of(here / "run", hamuco, finetune="", data=("synthetic:calm",), views=2)
    net = judge.load_net(here / "run")
    net.model = Knowing(world, side == "left")
    monkeypatch.setattr(judge, "load_net", lambda path, mano: net)
    judge.main(["run", "--data", f"cameras={here / 'rig'}", "--views", "1", "0", "--out", "o", "--workers", "0"])
    said = json.loads((here / "o" / "rig.json").read_text())
    assert said["frames"] == 9 and said["left_out"] == ["0004"] and said["reprojection_px"] < 1e-3
    assert said["unit"] == ("m" if unit else "cameras.json's own") and 20 < said["bone_spread_percent"] < 90
    hand = json.loads((here / "o" / "0007.json").read_text())
    assert np.allclose(hand["joints"], X[7], atol=1e-4) and hand["side"] == side
    # cam1 looks along the world's x axis, from 3 units before the origin.
    x, y, z = (X[7] / (unit or 1)).T
    seen = hand["cameras"]["cam1"]
    assert np.allclose(seen["joints"], np.stack([-z, y, x + 3], 1) * (unit or 1), atol=1e-4)
    assert np.allclose(seen["uv"], np.stack([300 * -z / (x + 3) + 150, 310 * y / (x + 3) + 120], 1), atol=0.01)
    assert seen["picture"] == "frames/cam1/0007.jpg" and not (here / "o" / "0004.json").exists()
    assert (here / "o" / "0007.png").exists() and (here / "o" / "0007.obj").exists() == bool(unit)
    if unit:
        first = (here / "o" / "0007.obj").read_text().split("\n")[0].split()[1:]
        towards = np.array([0.01, 0.01, 0.01 if side == "left" else -0.01])            # as cam1 has its axes
        assert np.allclose(np.array(first, float), X[7][0] + towards, atol=1e-4)


def test_only_a_network_of_several_views_is_asked_about_a_rig(here):
    rig_tree(here / "rig")
    run_of(here / "run")
    with pytest.raises(UserError, match="of hamuco.py, which fuses views"):
        judge.main(["run", "--data", f"cameras={here / 'rig'}"])
