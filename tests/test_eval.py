"""eval.py: what it loads and refuses, its named protocols, its pictures."""
import json
import math
import zipfile

import numpy as np
import pytest
import torch

import eval as judge
import ti_net
from sources import dexycb, freihand, hanco, ho3d, interhand, yt3d
from sources.submission import write_submission
from common import Mano, UserError, axis_angle_to_matrix, guarded, save_checkpoint
from hand.builtin import builtin_hand
from sources.tally import Tally

SMALL = dict(backbone="resnet10", image_size=32)


def checkpoint(path, **changes):
    torch.manual_seed(0)
    cfg = ti_net.Config(**SMALL, finetune="synthetic:calm")
    mean = {"pose": torch.zeros(48), "shape": torch.zeros(10), "joints": torch.zeros(21, 3),
            "uv": torch.full((21, 2), 0.5), "labels": 7}
    from dataclasses import asdict
    content = {"method": "ti_net", "cfg": asdict(cfg), "row": "ti_net", "epoch": 1, "mean": mean,
               "model": ti_net.build(cfg).state_dict()}
    save_checkpoint(path, content | changes)
    return path


def test_load_gives_a_model_that_predicts_on_an_array(tmp_path):
    model, cfg = judge.load(checkpoint(tmp_path / "finetune.pt"))
    assert cfg.backbone == "resnet10" and model.USES == {"image"}
    image = torch.randint(0, 255, (1, 3, 60, 60), dtype=torch.uint8)
    with torch.no_grad():
        assert model.eval().predict({"image": image})["joints"].shape == (1, 21, 3)
    assert judge.load(tmp_path)[1].image_size == 32                       # a run folder


@pytest.mark.parametrize("changes, said", [
    ({"method": "os"}, "names the method 'os'; known are ti_net, handmim, peclr, hamuco"),
    ({"model": {}}, "does not fit this version's ti_net"),
    ({"cfg": {"backbone": "nonsense"}}, "does not fit this version's ti_net"),
    ({"mean": None}, None)])
def test_foreign_checkpoints_are_refused_in_a_sentence(tmp_path, changes, said):
    path = checkpoint(tmp_path / "a.pt", **changes)
    if said is None:
        judge.load(path)                                                  # only its mean is needed later
        return
    with pytest.raises(UserError, match=said):
        judge.load(path)


def test_a_backbone_file_is_not_a_run(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "backbone.pt")
    with pytest.raises(UserError, match="holds no fine-tuned model"):
        judge.load(tmp_path / "backbone.pt")


def means(values):
    """The means of a protocol's values, as tables show them."""
    every = Tally(len(next(iter(values.values()))))
    every.add(torch.arange(every.n), values)
    return every.means()


def truth(n=40):
    torch.manual_seed(2)
    pose, shape = 0.3 * torch.randn(n, 48), torch.randn(n, 10)
    R = axis_angle_to_matrix(pose.unflatten(-1, (16, 3)))
    joints = Mano(builtin_hand()).joints(R, shape) + torch.randn(n, 1, 3)
    return {"joints": joints.clone(), "camera": joints.clone(), "true": joints, "ok": torch.ones(n, 21, dtype=torch.bool), "R": R,
            "R_true": R, "shape_true": shape, "left": torch.arange(n) % 2 == 0, "columns": {
        "hand_type": np.array(["interacting", "right"])[np.arange(n) % 2]}}


def hands_of(gold):
    true, pred = torch.tensor(gold["ev_gt"]), torch.tensor(gold["ev_pred"])
    return {"true": true, "camera": pred, "joints": pred, "ok": torch.ones(len(true), 21, dtype=torch.bool)}


def test_freihand_s_scores_match_the_official_script(golden):
    """Mean, median and area of its EvalUtil on six hands, raw and aligned; millimetres here, metres there."""
    gold = golden("peclr")
    scores = means(freihand.freihand_scores(hands_of(gold)))
    for prefix, name, suffix in (("abs", "xyz", ""), ("pa", "pa", "_reflect")):
        mean, _, area = gold[f"fh_measures_{name}_mean_median_auc"]
        assert scores[f"{prefix}_mpjpe_mm{suffix}"] == pytest.approx(1000 * mean, abs=1e-4)
        assert scores[f"{prefix}_auc{suffix}"] == pytest.approx(area, abs=1e-9)
    assert scores["abs_mpjpe_mm"] == pytest.approx(75.876, abs=1e-3) and scores["pa_auc_reflect"] == pytest.approx(0.6620972, abs=1e-6)
    assert len(scores) == 4                                                # no mesh, no mesh scores


def test_peclr_s_helper_scores_match_golden(golden):
    gold = golden("peclr")
    scores = means(freihand.peclr_scores(hands_of(gold)))
    for prefix, name in (("abs", "raw"), ("pa", "pa")):
        mean, median = gold[f"peclr_{name}_epe"][:2]
        assert scores[f"{prefix}_mpjpe_mm"] == pytest.approx(1000 * mean, abs=1e-4)
        assert scores[f"{prefix}_auc_495"] == pytest.approx(gold[f"peclr_{name}_auc_per_joint"].mean(), abs=1e-8)
        assert scores[f"{prefix}_mpjpe_mm_median"] == pytest.approx(1000 * median, abs=0.5)    # of two middle ones


def test_freihand_s_mesh_scores_are_absolute_and_aligned():
    torch.manual_seed(0)
    true = 0.05 * torch.randn(3, 778, 3)
    found = hands_of({"ev_gt": true[:, :21].numpy(), "ev_pred": true[:, :21].numpy()})
    found |= {"verts": true + torch.tensor([0.0, 0.004, 0.0]), "verts_true": true}
    scores = means(freihand.freihand_scores(found))
    assert scores["abs_mpvpe_mm"] == pytest.approx(4, abs=1e-4) and scores["pa_mpvpe_mm_reflect"] < 1e-3
    assert scores["f_15_raw"] == 1 and scores["f_5_reflect"] == 1 and len(scores) == 12
    assert scores["abs_auc_verts"] == pytest.approx(91.5 / 99, abs=1e-6)        # 4 mm is below the ninth threshold
    found["verts"] = true * torch.tensor([-1.0, 1, 1])
    assert means(freihand.freihand_scores(found))["pa_mpvpe_mm_reflect"] < 1e-3            # a mirrored hand passes


def test_pixel_hands_borrow_the_mean_hand_s_length(golden):
    """A left hand in pixels, mirrored and 4,000 times as large as its metric twin, scores 0; one joint moved by
    1 cm is felt; without a regressor nothing is scored."""
    hand = Mano(builtin_hand())
    rest = hand.joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))
    px = 4000 * rest.numpy() * np.array([-1.0, 1, 1]) + 300
    nowhere = torch.full((1, 21, 2), math.nan)

    def score(joints, side="left", px=px):
        found = {"joints": joints, "left": torch.tensor([side == "left"]), "columns": {"joints_px": px},
                 "uv": nowhere, "uv_true": nowhere}
        return means(yt3d.yt3d_scores(found, hand))

    assert score(rest)["pa_mpjpe_mm"] < 1e-3
    moved = rest.clone()
    moved[0, 8, 2] += 0.01
    assert 0.5 < score(moved)["pa_mpjpe_mm"] < 1.5
    assert score(rest, "right")["pa_mpjpe_mm"] > 5
    assert score(rest, px=np.full((1, 21, 3), np.nan)) == {}


def test_a_submission_is_a_flat_zip_in_the_server_s_form(tmp_path):
    joints = torch.arange(2 * 63).view(2, 21, 3) / 1000 + 0.000001
    write_submission(tmp_path / "pred.zip", joints, None)
    with zipfile.ZipFile(tmp_path / "pred.zip") as archive:
        assert archive.namelist() == ["pred.json"]
        xyz, verts = json.loads(archive.read("pred.json"))
    assert len(xyz) == len(verts) == 2 and len(verts[0]) == 778 and verts[1][777] == [0, 0, 0]
    assert xyz[1][20] == [0.123, 0.124, 0.125]


def test_the_truth_scores_zero_under_every_protocol():
    found, hand = truth(), Mano(builtin_hand())
    kit = means(dexycb.dexycb_scores(found))
    assert kit["mpjpe_mm"] == 0 and kit["pa_mpjpe_mm_reflect"] < 1e-3
    assert kit["auc"] == 1 and kit["abs_mpjpe_mm"] == 0
    official = means(freihand.freihand_scores(found))
    assert official["abs_mpjpe_mm"] == 0 and official["pa_auc_reflect"] > 0.98
    scaled = means(ho3d.ho3d_scores(found))
    assert scaled["st_mpjpe_mm"] < 1e-6 and scaled["st_auc"] > 0.98
    assert means(freihand.peclr_scores(found))["abs_auc_495"] == pytest.approx(98.5 / 99)    # strict: 0 is not < 0
    assert set(means(interhand.interhand_scores(found)).values()) == {0.0}
    assert max(means(interhand.intaghand_scores(found)).values()) < 1e-6
    assert max(means(hanco.hanco_scores(found)).values()) < 1e-3
    assert means(dexycb.ti_net_scores(found, hand)) == {"mpjpe_mm": 0.0, "pa_mpjpe_mm": pytest.approx(0, abs=1e-3)}


def test_dexycb_s_kit_lets_reflections_pass_and_skips_unlabelled_frames():
    found = truth()
    found["joints"] = found["true"] * torch.tensor([-1.0, 1, 1])
    found["true"][3], found["ok"][3] = -1.0, False
    scores = means(dexycb.dexycb_scores(found))
    assert scores["pa_mpjpe_mm_reflect"] < 1e-3 < 10 < scores["mpjpe_mm"]


def test_dexycb_s_area_is_the_trapezoid_over_a_hundred_thresholds():
    """All joints but the wrist 20 mm off along x: errors 0 once and 20 twenty times."""
    found = truth(4)
    found["joints"][:, 1:, 0] += 0.02
    scores = means(dexycb.dexycb_scores(found))
    assert scores["mpjpe_mm"] == pytest.approx(20 * 20 / 21, abs=1e-3)
    share = [1 / 21 if 50 * k / 99 < 20 else 1.0 for k in range(100)]
    area = sum((a + b) / 2 for a, b in zip(share, share[1:])) / 99
    assert scores["auc"] == pytest.approx(area, abs=1e-6)


def test_interhand_s_mean_is_over_joints_first():
    """Right hands: joint 5 of one hand 42 mm off. Left hands: all joints of one of two 10 mm off."""
    found = truth(5)
    found["joints"] = found["true"].clone()
    found["left"] = torch.tensor([False, False, False, True, True])
    found["joints"][0, 5, 0] += 0.042
    found["joints"][3, 1:, 1] += 0.010
    found["ok"][1, 5] = False                                             # 5 counts in two right hands
    found["columns"] = {"hand_type": np.array(["interacting", "right", "right", "interacting", "interacting"])}
    scores = means(interhand.interhand_scores(found))
    expected = (42 / 2 + 20 * 10 / 2) / 42
    assert scores["mpjpe_mm"] == pytest.approx(expected, abs=1e-3)
    assert scores["mpjpe_mm_interacting"] == pytest.approx((42 + 20 * 10 / 2) / 42, abs=1e-3)
    assert scores["mpjpe_mm_single"] == pytest.approx(0, abs=1e-3)


def test_ti_net_s_protocol_gives_the_prediction_the_true_betas():
    """Only the pose counts: another wrist rotation costs, other joints or shapes do not."""
    found, hand = truth(), Mano(builtin_hand())
    found["joints"] = found["joints"] * 3
    assert means(dexycb.ti_net_scores(found, hand))["mpjpe_mm"] == 0
    turn = axis_angle_to_matrix(torch.tensor([0.0, 0, 0.1]))
    found["R"] = found["R"].clone()
    found["R"][:, 0] = turn @ found["R"][:, 0]
    scores = means(dexycb.ti_net_scores(found, hand))
    reach = hand.joints(found["R_true"], found["shape_true"])
    reach = (reach - reach[:, :1])[..., :2].norm(dim=-1).mean()           # what a turn about z moves
    assert scores["mpjpe_mm"] == pytest.approx(1000 * float(reach) * 2 * math.sin(0.05), rel=1e-3)
    assert scores["pa_mpjpe_mm"] < 1e-3


@pytest.mark.parametrize("words, said", [
    ([], "name a run folder"), (["absent"], "absent: no such file"), (["--inspect"], "--inspect needs --data"),
    (["run", "--protocol", "nonsense"], "--protocol nonsense: synthetic is judged by ours"),
    (["run", "--data", "dexycb=absent"], "there is no folder absent"),
    (["run", "--mano", "absent.npz"], "absent.npz")])
def test_bad_input_gives_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run" / "finetune.pt")
    assert guarded(lambda: judge.main([*words, "--device", "cpu", "--workers", "0"])) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("spec, split", [("assembly101=a", "val"), ("coco=a", "val"), ("imagenet=a", "val"), ("hanco=a", "test")])
def test_inspect_opens_a_split_that_the_data_set_has(monkeypatch, spec, split):
    asked = []
    monkeypatch.setattr(judge, "open_data", lambda flags, specs, split, *rest, **more: asked.append(split) or [])
    with pytest.raises(UserError, match=f"{spec} {split}: there is no sample to look at"):
        judge.main(["--inspect", "--data", spec, "--device", "cpu"])
    assert asked == [split]


def test_inspect_draws_and_counts_a_folder_of_labels(tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    lines = []
    for k in range(3):
        Image.new("RGB", (80, 60), (40 * k, 90, 120)).save(tmp_path / "photos" / f"{k}.png")
        lines.append(json.dumps({"path": f"{k}.png", "side": "left" if k else "right", "box": [10, 10, 40, 40],
                                 "uv": [[20 + j, 20 + j] for j in range(21)]}))
    (tmp_path / "photos" / "labels.jsonl").write_text("\n".join(lines))
    judge.main(["--inspect", "--data", "folder=photos", "--split", "train", "--device", "cpu", "--out", "o"])
    said = capsys.readouterr().out
    assert "3 have uv" in said and "0 have pose" in said
    assert (tmp_path / "o" / "inspect.png").stat().st_size > 1000


def test_absolute_errors_feel_where_the_hand_stands():
    """The true hand 30 mm to the right: nothing for rooted and aligned errors, 30 mm for absolute ones."""
    found = truth()
    found["camera"] = found["true"] + torch.tensor([0.03, 0.0, 0.0])
    for scores in (means(dexycb.dexycb_scores(found)), means(freihand.freihand_scores(found)), means(freihand.peclr_scores(found))):
        assert scores["abs_mpjpe_mm"] == pytest.approx(30, abs=1e-3)
    assert means(dexycb.dexycb_scores(found))["mpjpe_mm"] == 0
    assert means(dexycb.dexycb_scores(found))["abs_auc"] == pytest.approx((99.5 - 60) / 99, abs=1e-6)     # the sixtieth threshold
