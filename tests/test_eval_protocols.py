"""eval.py as the one judge: further protocols, what predictions look like, intervals, comparison, photos."""
import dataclasses
import json
import math
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate as collate

import common
from group import on_processes
from hand import hand_mark
import sources
from sources import Source, coco, dexycb, hanco, ho3d, interhand
from sources.ho3d import index_ho3d
from sources.index import Index
from sources.interhand import INTERHAND_TO_OURS
from sources.hands import Hands
from sources.pictures import _hand_detector
from sources.reading import read_items
from sources.pictures import detect_hands
from sources.synthetic import Synthetic
from sources import judging
from sources.judging import Exam
from sources.predictors import as_pictures, redefined
from sources.tables import for_screen
import eval as judge
import peclr
import ti_net
from common import MANO_TO_OURS, Mano, UserError, axis_angle_to_matrix, save_checkpoint
from hand.builtin import builtin_hand
from trees import evaluation_label, person, write_coco, write_freihand, write_ho3d, write_interhand
from test_eval import means, truth

TINY = dict(backbone="resnet10", image_size=32)
HERE = ["--device", "cpu", "--workers", "0", "--cache", "c"]


def run_of(folder, module=ti_net, row=None, seed=0, weights=0, **options):
    """A run folder with an untrained network."""
    folder.mkdir(parents=True)
    torch.manual_seed(weights)
    cfg = module.Config(**TINY, seed=seed, **{"finetune": "synthetic:calm"} | options)
    name = module.__name__
    model = module.build(cfg)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    R = torch.zeros(48)
    joints = Mano(builtin_hand()).joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))[0]
    mean = {"pose": R, "shape": torch.zeros(10), "joints": joints - joints[0], "uv": torch.full((21, 2), 0.5), "labels": 7}
    save_checkpoint(folder / "finetune.pt", {"method": name, "cfg": dataclasses.asdict(cfg), "row": row or name,
                                             "epoch": 1, "mean": mean, "model": model.state_dict()})
    return folder


def results(file, protocol="ours"):
    return next(r for r in json.loads(file.read_text())["results"] if r["protocol"] == protocol)


# ---- Protocols ----


def test_hanco_s_errors_match_golden(golden):
    """HaMuCo's own numbers on six pictures; its unit is 0.2 m."""
    gold = golden("judge")
    true, ok = 0.2 * torch.tensor(gold["true"]), torch.ones(6, 21, dtype=torch.bool)
    for kind in ("single", "interaction"):
        scores = means(hanco.hanco_scores({"joints": 0.2 * torch.tensor(gold[kind]), "true": true, "ok": ok}))
        assert scores["n_mpjpe_mm"] == pytest.approx(float(gold[f"{kind}_n"]), abs=1e-6)
        assert scores["pa_mpjpe_mm"] == pytest.approx(float(gold[f"{kind}_pa"]), abs=1e-6)


def test_ho3d_scales_by_one_bone_and_puts_wrist_on_wrist():
    """A hand 1.3 times as large elsewhere scores 0; a finger tip 21 mm off, 1 mm; the bone is wrist-middle MCP."""
    f = truth(6)
    f["joints"] = 1.3 * f["true"] + 0.2
    f["camera"] = f["joints"]
    assert means(ho3d.ho3d_scores(f))["st_mpjpe_mm"] < 1e-4
    f["joints"] = f["true"].clone()
    f["joints"][:, 8, 1] += 0.021
    assert means(ho3d.ho3d_scores(f))["st_mpjpe_mm"] == pytest.approx(1, abs=1e-4)
    f["joints"] = f["true"].clone()
    f["joints"][:, 0] += torch.tensor([0.012, -0.003, 0.01])                         # another bone, another wrist
    expected = []
    for p, t in zip(f["joints"].double(), f["true"].double()):
        s = (t[9] - t[0]).norm() / (p[9] - p[0]).norm()
        expected += [float((s * (p[j] - p[0]) - (t[j] - t[0])).norm()) for j in range(21)]
    assert means(ho3d.ho3d_scores(f))["st_mpjpe_mm"] == pytest.approx(1000 * np.mean(expected), rel=1e-5)


def test_coco_is_scored_as_mmpose_does():
    """Two hands, box sides 100 and 50: errors 9 and 21 px, one key point of the second not labelled."""
    uv = torch.zeros(2, 21, 2)
    f = {"uv": uv + torch.tensor([[9.0, 0], [0, 21]])[:, None], "uv_true": uv.clone(),
         "columns": {"box": np.array([[0, 0, 80, 100], [5, 5, 50, 40.0]])}}
    f["uv_true"][1, 3] = math.nan
    scores = means(coco.coco_scores(f))
    assert scores["epe_2d_px"] == pytest.approx((21 * 9 + 20 * 21) / 41)                       # all points alike
    assert scores["pck_2d_20"] == pytest.approx((20 * 0.5 + 1) / 21)                           # 21 px is not < 10
    # thresholds 0, 1.5, .. 28.5: 9 < 10.5 .. 28.5 are 13 of 20, 21 < 22.5 .. 28.5 are 5
    assert scores["auc_2d_30"] == pytest.approx((20 * (13 + 5) / 40 + 13 / 20) / 21)


def test_mrrpe_is_the_error_between_two_wrists():
    """Picture 5 has both: the left, read mirrored, 3 mm off in its x, the right 1 mm in x and 3 in y: |(-4, -3)|."""
    error = torch.tensor([[0.001, 0.003, 0], [0.003, 0, 0], [9, 9, 9], [math.nan, 0, 0], [1, 1, 1]])
    left, pictures = torch.tensor([False, True, False, True, False]), np.array([5, 5, 6, 7, 7])
    at, found = interhand.mrrpe(error, left, pictures)
    assert at.tolist() == [0] and found.tolist() == pytest.approx([0.005])


def test_intaghand_roots_at_the_middle_knuckle_and_scales_its_bone():
    f = truth(4)
    f["joints"] = 0.5 * f["true"] + 1
    f["joints"][:, 9] += 0.0
    scores = means(interhand.intaghand_scores(f))
    assert scores["n_mpjpe_mm"] < 1e-3 and set(scores) == {"n_mpjpe_mm", "n_mpjpe_mm_interacting"}


# ---- What a prediction looks like ----


def predicted(n=64, noise=0.008):
    """True joints of turned, bent hands and a prediction with noise of 8 mm an axis, as {joints, ..}."""
    index = torch.arange(n)
    pose = 0.4 * common.normal(index, 48, 5, "pose")
    true = Mano(builtin_hand()).joints(axis_angle_to_matrix(pose.unflatten(-1, (16, 3))), torch.zeros(n, 10))
    pred = true + noise * common.normal(index, 63, 6, "noise").view(n, 21, 3)
    return {"joints": pred}, {"joints": true, "joints_ok": torch.ones(n, 21, dtype=torch.bool)}


MANO_ORDER = np.argsort(MANO_TO_OURS)                   # a hand in MANO's order, as that data set stores it
TIP_FIRST = [0, *(4 * k + j for k in range(5) for j in (4, 3, 2, 1))]


@pytest.mark.parametrize("change, said", [
    (lambda x: x * torch.tensor([-1.0, 1, 1]), "a mirrored hand"),
    (lambda x: 1000 * x, "millimetres where metres are expected"),
    (lambda x: x / 1000, "divided by 1,000"),
    (lambda x: x[:, MANO_ORDER], "MANO's joint order (index, middle, pinky, ring, thumb, then the tips)"),
    (lambda x: x[:, TIP_FIRST], "joints from tip to base in each finger"),
    (lambda x: x[:, np.argsort(INTERHAND_TO_OURS)], "InterHand2.6M's joint order"),
    (lambda x: x * torch.tensor([1.0, -1, -1]), "OpenGL axes"),
    (lambda x: x * torch.tensor([1.0, 1, -1]), "depth with the wrong sign"),
    (lambda x: x[..., [1, 2, 0]], "axes named otherwise (z, x, y)"),
    (lambda x: 1000 * x[:, MANO_ORDER] * torch.tensor([1.0, -1, -1]), "millimetres")])
def test_common_mistakes_are_named(change, said):
    pred, true = predicted()
    found = judge.looks_like({"joints": change(pred["joints"])}, true)
    assert found.startswith("looks like") and said in found
    if said == "millimetres":
        assert "OpenGL axes" in found and "MANO's joint order" in found
    assert (" and " in found.partition(":")[0].replace(" (x", "")) == (said == "millimetres")


def test_a_right_a_mean_and_an_untrained_prediction_are_accused_of_nothing():
    pred, true = predicted()
    n = len(pred["joints"])
    rest = Mano(builtin_hand()).joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))
    mean = (true["joints"] - true["joints"][:, :1]).mean(0, keepdim=True)
    wild = 0.05 * common.normal(torch.arange(n), 63, 8, "wild").view(n, 21, 3)
    for joints in (pred["joints"], predicted(noise=0.03)[0]["joints"], mean.expand(n, -1, -1),
                   (mean * torch.tensor([-1.0, 1, 1])).expand(n, -1, -1), rest.expand(n, -1, -1),
                   pred["joints"] * torch.tensor([1, 1, -0.1]),                      # nearly flat, which flipping hardly helps
                   rest.expand(n, -1, -1)[..., [1, 0, 2]], rest + 0.01 * wild, wild, 0 * wild):
        assert judge.looks_like({"joints": joints}, true) == ""


def test_hands_without_truth_or_wrist_do_not_mislead():
    pred, true = predicted()
    true["joints"][::2, 5:9], true["joints_ok"][::2, 5:9] = math.nan, False
    true["joints_ok"][1, 0] = False
    assert judge.looks_like(pred, true) == ""
    assert "mirrored" in judge.looks_like({"joints": pred["joints"] * torch.tensor([-1.0, 1, 1])}, true)
    assert judge.looks_like({"joints": -pred["joints"][:5]}, {k: x[:5] for k, x in true.items()}) == ""      # too few


# ---- Whole data sets ----


def test_ho3d_is_judged_and_submitted_in_its_order_and_axes(here):
    names = [f"SM1/{k:04d}" for k in range(9)]
    (here / "d").mkdir()
    write_ho3d(here / "d", "evaluation", [evaluation_label(i) for i in range(9)], names)
    run_of(here / "run", peclr)
    judge.main(["run", "--data", "ho3d=d", "--submit", *HERE])                       # no truth: the file all the same
    with zipfile.ZipFile("run/eval-ho3d/pred.zip") as archive:
        xyz, verts = map(np.array, json.loads(archive.read("pred.json")))
    assert xyz.shape == (9, 21, 3) and verts.shape == (9, 778, 3) and (xyz[..., 2] < 0).all()
    model, _ = judge.load("run")
    batch = next(sources.batches(Hands(index_ho3d("d", "test"), peclr.stored_side(peclr.Config(**TINY)),
                                             peclr.MARGIN), [torch.arange(9)], torch.device("cpu"), 0))
    with torch.no_grad():
        ours = model.eval().predict({key: batch[key] for key in model.USES})["joints"].numpy()
    assert np.abs(xyz[:, 13] * [1, -1, -1] - ours[:, 1]).max() < 1e-4                # their 13 is our thumb's base
    assert np.abs(xyz[:, 20] * [1, -1, -1] - ours[:, 20]).max() < 1e-4
    (here / "d" / "evaluation_xyz.json").write_text(json.dumps(xyz.tolist()))
    wrists = [evaluation_label(i) | {"handJoints3D": xyz[i, 0]} for i in range(9)]                # as this truth has them
    write_ho3d(here / "d", "evaluation", wrists, names)
    judge.main(["run", "--data", "ho3d=d", *HERE])
    found = results(here / "run" / "eval-ho3d" / "metrics.json", "ho3d")
    assert found["n"] == 9 and found["left_out"] == 0 and found["box_source"] == "annotated"
    row = found["rows"]["peclr"]
    assert row["st_mpjpe_mm"] < 0.1 and row["abs_mpjpe_mm"] < 0.1 and row["pa_mpjpe_mm_reflect"] < 0.1
    assert found["rows"]["mean_pose"]["st_mpjpe_mm"] > 1
    (here / "d" / "evaluation" / "SM1" / "rgb" / "0004.png").unlink()
    with pytest.raises(UserError, match="the server wants every sample"):
        judge.main(["run", "--data", "ho3d=d", "--submit", *HERE])


def test_freihand_is_judged_by_three_protocols(here, monkeypatch, capsys):
    """Twelve scores with the user's own hand; without it MANO's vertices mean nothing, and four are left."""
    (here / "d").mkdir()
    write_freihand(here / "d", "evaluation", 9)
    run_of(here / "run")
    judge.main(["run", "--data", "freihand=d", "--out", "blind", *HERE])
    assert len(results(here / "blind" / "metrics.json", "freihand")["rows"]["ti_net"]) == 4
    assert "mesh, pose and shape are left out: they are MANO's" in capsys.readouterr().out
    monkeypatch.setattr("sources.both_hands", lambda mano: {"right": builtin_hand()})
    judge.main(["run", "--data", "freihand=d", *HERE])
    said = capsys.readouterr().out
    assert "9 samples scored, 0 without truth; boxes from" in said and "the network sees image" in said
    rows = {p: results(here / "run" / "eval-freihand" / "metrics.json", p)["rows"] for p in ("ours", "freihand", "peclr")}
    assert len(rows["freihand"]["ti_net"]) == 12 and len(rows["peclr"]["ti_net"]) == 6
    assert "f_5_reflect" in rows["freihand"]["mean_pose"]


def test_interhand_counts_pairs_and_hand_types(here, capsys):
    write_interhand(here / "d")
    run_of(here / "run", peclr)
    judge.main(["run", "--data", "interhand=d", *HERE])
    said = capsys.readouterr().out
    found = results(here / "run" / "eval-interhand" / "metrics.json", "interhand")
    assert found["n"] == 4 and {"mpjpe_mm", "mpjpe_mm_single", "mpjpe_mm_interacting", "mrrpe_mm"} == set(
        found["rows"]["peclr"])
    assert "mrrpe_mm" not in found["rows"]["mean_pose"] and "ti_net: not run" in said


def test_coco_is_judged_in_2d_and_draws_px(here, capsys):
    write_coco(here / "d", [person(i) for i in range(3)])
    run_of(here / "run")
    judge.main(["run", "--data", "coco=d", *HERE])
    said = capsys.readouterr().out
    found = results(here / "run" / "eval-coco-val" / "metrics.json", "coco")
    assert {"epe_2d_px", "pck_2d_20", "auc_2d_30"} == set(found["rows"]["ti_net"]) and "pa_mpjpe_mm" not in said
    assert (here / "run" / "eval-coco-val" / "predictions.png").stat().st_size > 1000


def test_dexycb_s_file_has_a_line_a_frame_in_millimetres_with_left_hands_given_back(tmp_path):
    """image_id, then 63 numbers; the left hand, read mirrored, gets its x back."""
    index = Index("dexycb:s1 test", "", {"paths": np.array([b"a", b"b"]), "image_id": np.array([4, 9])})
    f = truth(2) | {"left": torch.tensor([False, True])}
    f |= {"pred": {"joints": f["joints"], "root": f["joints"][:, 0]}, "batch": {"joints": f["true"]}}
    exam = Exam(None, "dexycb:s1", None, None, submit=True)
    file = dexycb.submit_dexycb(tmp_path, index, judging._keep(f, exam))
    lines = [line.split(",") for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == ["4", "9"] and [len(line) for line in lines] == [64, 64]
    assert float(lines[0][4]) == pytest.approx(1000 * float(f["camera"][0, 1, 0]), abs=1e-3)
    assert float(lines[1][4]) == pytest.approx(-1000 * float(f["camera"][1, 1, 0]), abs=1e-3)
    assert float(lines[1][5]) == pytest.approx(1000 * float(f["camera"][1, 1, 1]), abs=1e-3)


def test_a_submission_needs_a_server_and_one_run(here):
    run_of(here / "run")
    with pytest.raises(UserError, match="no server takes synthetic test"):
        judge.main(["run", "--submit", *HERE])


# ---- Several views, several outputs ----


class Moments(Source):
    """Five moments of three views, the last view missing in the first moment."""

    batches = read_items
    name = "moments"
    box_source = "joints"

    def __init__(self):
        self.moments = [Synthetic(32, 16, 0, "test").batch(torch.arange(3 * i, 3 * i + 3)) for i in range(5)]

    def __len__(self):
        return 5

    def __getitem__(self, i):
        one = self.moments[i]
        ok = torch.tensor([True, True, i > 0])
        keep = {k: x for k, x in one.items() if isinstance(x, torch.Tensor) and x.shape[:1] == (3,) and k != "index"}
        return keep | {"view_ok": ok, "side": "right", "cameras": torch.eye(4).expand(3, 4, 4)}


def test_moments_become_pictures_without_truth_where_a_view_is_missing():
    data = Moments()
    batch = collate([data[0], data[1]]) | {"index": torch.tensor([3, 4])}
    flat = as_pictures(batch)
    assert flat["index"].tolist() == [9, 10, 11, 12, 13, 14] and flat["side"] == ["right"] * 6
    assert flat["image"].shape[:2] == (6, 3) and torch.equal(flat["uv"][4], batch["uv"][1, 1])
    assert flat["joints_ok"].any(1).tolist() == [True, True, False, True, True, True]
    for key in ("joints", "uv", "verts", "pose", "shape"):
        assert flat[key].isnan().flatten(1).all(1).tolist() == [False, False, True, False, False, False]


def test_named_outputs_of_several_views_are_rows_and_missing_views_do_not_count(here, monkeypatch, capsys):
    class Net(torch.nn.Module):
        USES = {"image", "view_ok", "cameras"}

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def predict(self, batch):
            B, V = batch["view_ok"].shape
            assert batch["cameras"].shape == (B, V, 4, 4)
            joints = truth(B * V)["true"].unflatten(0, (B, V))
            fusion = joints.clone()
            fusion[1:2] = math.nan                                                   # could not be fused
            uv = torch.full((B, V, 21, 2), 16.0)
            return {"single": {"joints": joints, "uv": uv}, "fusion": {"joints": fusion, "uv": uv}}

    module = types.SimpleNamespace(__name__="stand_in", Config=ti_net.Config, build=lambda cfg: Net(), MARGIN=1.7,
                                   stored_side=lambda cfg: 32)
    monkeypatch.setitem(judge.METHODS, "stand_in", module)
    monkeypatch.setattr(judge, "open_data", lambda *given, **more: Moments())
    monkeypatch.setitem(judge.PROTOCOLS, "synthetic", {"hanco": hanco.hanco_scores})
    run_of(here / "old")
    content = common.load_checkpoint("old/finetune.pt")
    (here / "run").mkdir()
    save_checkpoint(here / "run" / "finetune.pt", content | {"method": "stand_in", "row": "stand_in-small",
                                                             "model": Net().state_dict()})
    judge.main(["run", *HERE, "--sheet"])
    said = capsys.readouterr().out
    assert "14 samples scored, 0 without truth;" in said                             # 15 pictures, one view missing
    assert "11 samples scored, 3 without truth or hand (3)" in said
    rows = results(here / "run" / "eval-synthetic-calm" / "metrics.json", "hanco")["rows"]
    assert set(rows) == {"mean_pose", "single-small", "fusion-small"}


# ---- Comparison ----


def test_several_runs_stand_beside_each_other_with_scratch_and_seeds(here, monkeypatch, capsys):
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 8, "test": 8})
    run_of(here / "a", weights=1)
    run_of(here / "b", weights=2, seed=1)
    run_of(here / "c", peclr, weights=3)
    run_of(here / "s", weights=4, label_fraction=0.5, row="scratch")
    judge.main(["a", "b", "c", "--scratch", "s", *HERE, "--sheet"])
    said, out = capsys.readouterr().out, here / "runs" / "compare-synthetic-calm"
    for words in ("ti_net, seed 0", "ti_net, seed 1", "| scratch ", "ti_net, 2 seeds", "paired difference",
                  "ti_net, seed 0 - scratch", "relative gain in mpjpe_mm over scratch", "images/s, batch 64",
                  "px are left out"):
        assert words in said, words
    rows = [r["rows"] for r in json.loads((out / "metrics.json").read_text())["results"] if r["protocol"] == "ours"]
    assert [set(r) - {"mean_pose"} for r in rows] == [{"ti_net, seed 0"}, {"ti_net, seed 1"}, {"peclr"}, {"scratch"}]
    pair = [rows[k][f"ti_net, seed {k}"]["mpjpe_mm"] for k in (0, 1)]
    assert f"{np.mean(pair):.2f} ± {np.std(pair, ddof=1):.2f}" in said
    lines = (out / "table.csv").read_text().splitlines()
    assert lines[0].startswith("protocol,row,run,seed,metric,value,low_95,high_95,n")
    assert any(line.startswith("ours,peclr,c,0,mpjpe_mm,") for line in lines)
    assert "epe_2d_px" not in said.partition("mean ± std")[0]          # peclr stores other squares than ti_net
    for name in ("pck", "joints", "visibility", "predictions", "sheet"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert for_screen((out / "table.md").read_text().strip(), "runs/compare-synthetic-calm/table.md") in said
    assert max(len(line) for line in said.splitlines() if line.startswith("|")) <= 100


def test_curves_come_from_run_folders(here, capsys):
    for k, (share, error) in enumerate(((0.1, 40.0), (0.1, 42.0), (1.0, 30.0))):
        folder = here / f"r{k}"
        (folder / "finetune-peclr").mkdir(parents=True)
        (folder / "finetune-peclr" / "config.json").write_text(json.dumps({"cfg": {"label_fraction": share, "seed": k}}))
        (folder / "finetune-peclr" / "log.jsonl").write_text("".join(json.dumps(
            {"epoch": e, "val_mpjpe_mm": 50.0 - e}) + "\n" for e in (1, 2)) + '{"step": 1}\n')
        (folder / "metrics.json").write_text(json.dumps({"data": "x", "results": [
            {"protocol": "ours", "rows": {"mean_pose": {"mpjpe_mm": 60.0}, "peclr": {"mpjpe_mm": error}}}]}))
    judge.main(["r0", "r1", "r2", "--curve", "label_fraction", "--out", "o"])
    said = capsys.readouterr().out
    assert "41.00 (n 2)" in said and "30.00 (n 1)" in said and (here / "o" / "curve.png").stat().st_size > 1000
    judge.main(["r0", "--curve", "epoch", "--out", "e"])
    assert (here / "e" / "curve.csv").read_text().split() == ["row,epoch,mpjpe_mm", "peclr,1,49.0", "peclr,2,48.0"]
    with pytest.raises(UserError, match="no row has the field 'views'.*judge it with --views first"):
        judge.main(["r0", "--curve", "views"])
    with pytest.raises(UserError, match="is not the folder of a finished run"):
        judge.main(["nowhere", "--curve", "views"])


# ---- Photos ----


def photos(root):
    """A photo with two hands, one without, one broken."""
    (root / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (120, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "sub" / "two.png")
    Image.new("RGB", (60, 60)).save(root / "none.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no picture")


def stand_in_detector(picture):
    if picture.shape[0] != 120:
        return []
    grid = np.stack([np.arange(21) % 5, np.arange(21) // 5], -1) * 10.0
    return [{"side": side, "uv": grid + [x, 40], "confidence": 0.9} for side, x in (("right", 20), ("left", 130))]


def test_photos_give_overlays_json_and_meshes(here, monkeypatch, capsys):
    photos(here / "p")
    run_of(here / "run")
    monkeypatch.setattr("sources.photos.detect_hands", stand_in_detector)
    judge.main(["run", "--images", "p", "--out", "o", "--obj", *HERE])
    said = capsys.readouterr().out
    assert "1 unreadable photos, 1 photos without a hand" in said and "broken.jpg" in said and "none.png" in said
    hands = json.loads((here / "o" / "hands.json").read_text())
    assert [hand["side"] for hand in hands] == ["right", "left"] and not hands[0]["metric"]
    assert np.shape(hands[0]["joints"]) == (21, 3) and np.shape(hands[0]["pose"]) == (48,)
    assert hands[0]["K"][0][0] == pytest.approx(math.hypot(200, 120))                # the diagonal
    # both are of one network that sees nothing but noise: each lies in its own box, and projects where it says
    for hand, (low, high) in zip(hands, ((0, 90), (110, 200))):
        uv, X, K = np.array(hand["uv"]), np.array(hand["joints"]), np.array(hand["K"])
        assert low < uv[:, 0].mean() < high
        seen = X @ K.T
        assert np.abs(seen[:, :2] / seen[:, 2:] - uv).mean() < 12
    mesh = (here / "o" / "sub__two.png-1.obj").read_text().splitlines()
    assert sum(line[0] == "v" for line in mesh) == 778 and sum(line[0] == "f" for line in mesh) == 1538
    assert Image.open(here / "o" / "sub__two.png.png").size[0] > 200


def test_a_left_hand_in_a_photo_is_the_mirror_image_of_a_right_one(here):
    """The same pixels mirrored and called left: joints with x negated, uv mirrored; labels.jsonl gives box and K."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    (here / "p").mkdir()
    K = [[90.0, 0, 39.5], [0, 90, 29.5], [0, 0, 1]]
    for name, side, pixels in (("a", "right", noise), ("b", "left", noise[:, ::-1])):
        Image.fromarray(pixels).save(here / "p" / f"{name}.png")
    (here / "p" / "labels.jsonl").write_text("".join(json.dumps(
        {"path": f"{n}.png", "side": s, "box": [x, 10, 30, 30], "K": K}) + "\n" for n, s, x in (
            ("a", "right", 10), ("b", "left", 40))))
    run_of(here / "run", peclr)
    judge.main(["run", "--images", "p", "--out", "o", *HERE])
    right, left = json.loads((here / "o" / "hands.json").read_text())
    assert right["metric"] and left["metric"] and "pose" not in right
    assert np.abs(np.array(right["joints"]) * [-1, 1, 1] - left["joints"]).max() < 1e-4
    mirrored = np.array(right["uv"]) * [-1, 1] + [79, 0]
    assert np.abs(mirrored - left["uv"]).max() < 1e-2
    with pytest.raises(UserError, match="peclr predicts joints only, so there is no mesh"):
        judge.main(["run", "--images", "p", "--out", "o2", "--obj", *HERE])


def test_one_photo_and_nothing_to_find(here, monkeypatch):
    photos(here / "p")
    run_of(here / "run")
    monkeypatch.setattr("sources.photos.detect_hands", stand_in_detector)
    judge.main(["run", "--images", "p/sub/two.png", "--out", "o", *HERE])
    assert len(json.loads((here / "o" / "hands.json").read_text())) == 2
    with pytest.raises(UserError, match="holds no picture of a hand"):
        judge.main(["run", "--images", "p/none.png", "--out", "o", *HERE])
    with pytest.raises(UserError, match="there is no such file or folder"):
        judge.main(["run", "--images", "absent", *HERE])


class StandInVideo:
    """What OpenCV does with a video: three frames of 201 x 121 px in its order of colours, blue first."""
    CAP_PROP_FPS, written = 5, []

    def VideoCapture(self, name):
        frames = [np.full((121, 201, 3), (200, 100, k), np.uint8) for k in (0, 90, 180)]
        return type("Stream", (), {"get": lambda _, what: 12.5,
                                   "read": lambda _: (bool(frames), frames.pop(0) if frames else None)})()

    def VideoWriter_fourcc(self, *letters):
        return "".join(letters)

    def VideoWriter(self, path, kind, rate, size):
        self.opened = (path, kind, rate, size)
        return type("Writer", (), {"write": lambda _, frame: self.written.append(frame), "release": lambda _: None})()


def test_a_video_comes_back_with_its_hands_drawn(here, monkeypatch):
    """Frames without a hand are in it too, colours are not swapped, sides are even as the codec wants them."""
    run_of(here / "run")
    seen = {0: stand_in_detector, 90: lambda picture: [], 180: stand_in_detector}
    monkeypatch.setattr("sources.photos.detect_hands", lambda picture: next(
        find for red, find in seen.items() if abs(red - int(picture[0, 0, 0])) < 9)(picture[:120]))
    video = StandInVideo()
    monkeypatch.setitem(sys.modules, "cv2", video)
    (here / "clip.MP4").write_bytes(b"")
    judge.main(["run", "--images", "clip.MP4", "--out", "o", *HERE])
    hands = json.loads((here / "o" / "hands.json").read_text())
    assert [hand["path"] for hand in hands] == ["000001.jpg"] * 2 + ["000003.jpg"] * 2
    assert video.opened == ("o/overlay.mp4", "mp4v", 12.5, (640, 384)) and len(video.written) == 3
    assert np.abs(video.written[1].mean((0, 1)) - (200, 100, 90)).max() < 3            # blue, green, red, as it came
    assert not list((here / "o").glob("*.png"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="clip.MP4: reading a video needs OpenCV"):
        judge.main(["run", "--images", "clip.MP4", "--out", "o2", *HERE])


def test_without_mediapipe_one_sentence_says_so(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.hands", None)
    _hand_detector.cache_clear()
    with pytest.raises(UserError, match="needs MediaPipe.*labels.jsonl"):
        detect_hands(np.zeros((8, 8, 3), np.uint8))


# ---- One's own labels ----


def own_labels(folder, n):
    """Synthetic hands as somebody's own pictures with a labels.jsonl; every fourth has no 3D."""
    folder.mkdir()
    data, lines = Synthetic(64, n, 0, "train"), []
    for k in range(0, n, 40):
        batch = data.batch(torch.arange(k, k + 40))
        for i in range(40):
            Image.fromarray(batch["image"][i].permute(1, 2, 0).numpy()).save(folder / f"{k + i}.png")
            lines.append(json.dumps({"path": f"{k + i}.png", "uv": batch["uv"][i].tolist(), "K": batch["K"][i].tolist(),
                                     "joints": batch["joints"][i].tolist() if i % 4 else None}))
    (folder / "labels.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("module", [ti_net, peclr])
def test_own_labels_are_learnt_from_and_judged(here, module):
    own_labels(here / "f", 120)
    module.main(["--finetune", "folder=f", "--backbone", "resnet10", "--image-size", "32", "--epochs", "1",
                 "--batch-size", "16", "--micro-batch", "8", "--out", "r", *HERE])
    judge.main(["r", *HERE, "--split", "val"])
    found = results(here / "r" / "eval-folder-val" / "metrics.json")
    assert found["n"] >= 1 and "mpjpe_mm" in found["rows"]["scratch"]


# ---- Several processes ----


def test_three_processes_score_every_sample_of_forty_once(here):
    own_labels(here / "f", 40)
    run_of(here / "run", peclr)
    words = ["run", "--data", "folder=f", "--split", "train", "--device", "cpu", "--workers", "0"]
    judge.main([*words, "--out", "one"])
    on_processes(here, 3, lambda: judge.main([*words, "--out", "two"]))
    one, two = (results(here / name / "metrics.json") for name in ("one", "two"))
    assert one["n"] == two["n"] > 30 and one["left_out"] == two["left_out"]
    for row in ("mean_pose", "peclr"):
        for metric, value in one["rows"][row].items():
            assert two["rows"][row][metric] == pytest.approx(value, rel=1e-5), metric
            assert two["intervals"][row][metric] == pytest.approx(one["intervals"][row][metric], rel=1e-5)


# ---- A network on another data set, another hand, in two passes ----


@pytest.mark.parametrize("trained, tested", [("synthetic", "freihand"), ("freihand", "ho3d"), ("dexycb", "dexycb")])
def test_a_mesh_s_joints_are_those_of_the_data_set_it_is_tested_on(trained, tested):
    """Tips of FreiHAND are vertices 744, 320, 443, 555, 672 and its joints come from the mesh; HO3D's 744, 333, ..."""
    torch.manual_seed(0)
    R, shape = axis_angle_to_matrix(0.3 * torch.randn(2, 16, 3)), torch.randn(2, 10)
    tips = {"synthetic": "smplx", "freihand": "freihand", "ho3d": "ho3d", "dexycb": "manopth"}
    hand = sources.hand_for(tested, "builtin")
    verts, joints = Mano(builtin_hand(), tips[trained])(R, shape)
    move, root = torch.tensor([0.1, 0.2, 0.3]), torch.full((2, 3), 0.5)
    pred = {"joints": joints + move, "verts": verts + move, "pose": R, "shape": shape, "root": root}
    got = redefined(pred, trained, tested, hand)
    if trained == tested:
        assert got is pred
        return
    index = {"freihand": (744, 320, 443, 555, 672), "ho3d": (744, 333, 444, 555, 672)}[tested]
    assert torch.allclose(got["joints"][:, [4, 8, 12, 16, 20]], verts[:, list(index)] + move, atol=1e-5)
    others = hand.regress(verts) if tested == "freihand" else hand.joints(R, shape)
    assert torch.allclose(got["joints"], others + move, atol=1e-5)
    assert torch.allclose(got["root"] - got["joints"][:, 0], root - pred["joints"][:, 0], atol=1e-6)
    assert redefined({"joints": joints}, trained, tested, hand)["joints"] is joints             # no mesh


def test_a_network_with_a_mesh_is_refused_with_another_hand(here):
    run_of(here / "run")
    content = torch.load(here / "run" / "finetune.pt", weights_only=True)
    save_checkpoint(here / "run" / "finetune.pt", content | {"hand": hand_mark("builtin")})
    judge.load("run")
    save_checkpoint(here / "run" / "finetune.pt", content | {"hand": "00000000"})
    with pytest.raises(UserError, match="its mesh is another hand's than the built-in hand"):
        judge.load("run")


def test_two_passes_are_a_row_and_a_folder_of_their_own(here, capsys):
    run_of(here / "run", peclr)
    judge.main(["run", *HERE])
    judge.main(["run", "--two-pass", *HERE])
    one, two = (results(here / "run" / name / "metrics.json") for name in ("eval-synthetic-calm", "eval-synthetic-calm-two_pass"))
    assert "peclr" in one["rows"] and "peclr-two_pass" in two["rows"]
    assert one["rows"]["peclr"]["epe_2d_px"] != two["rows"]["peclr-two_pass"]["epe_2d_px"]
    run_of(here / "other")
    with pytest.raises(UserError, match="--two-pass: ti_net predicts in one pass"):
        judge.main(["other", "--two-pass", *HERE])


def test_runs_that_call_their_rows_alike_keep_all_of_them(here, capsys):
    """Two folders of one name; their rows are both there, and the second does not replace the first."""
    run_of(here / "x" / "run", weights=0)
    run_of(here / "y" / "run", weights=1)
    judge.main(["x/run", "y/run", "--data", "synthetic:calm", "--out", "o", *HERE])
    rows = {name: row for r in json.loads((here / "o" / "metrics.json").read_text())["results"] for name, row in r["rows"].items()}
    assert len(rows) == 3 and len({row["mpjpe_mm"] for row in rows.values()}) == 3
