"""Names of data sets, what opens them, and which joints they mean."""
import json

import numpy as np
import pytest
import torch

import hamuco
import handmim
import ti_net
from common import Flags, Mano, UserError, axis_angle_to_matrix, score, transform
from hand.official import save_mano
from sources import DATA_NAMES, hand_for, joints_of, open_data, parse_data, read_index
from sources.predictors import blind, redefined
from sources.stages import mean_hand
from trees import (
    mesh, meta, noise, person, save, write_coco, write_freihand, write_ho3d, write_yt3d)


def test_data_names_are_parsed():
    assert parse_data("dexycb:s1=/a/b:c=d") == ("dexycb", "s1", "/a/b:c=d")
    assert parse_data("folder=x") == ("folder", "", "x")
    assert parse_data("imagenet") == ("imagenet", "", "")
    for wrong, words in (("imagent", "'imagent' is not known.*imagenet"), ("folder=", "NAME"),
                         ("dexycb:=x", "NAME"), ("", "not known")):
        with pytest.raises(UserError, match=words):
            parse_data(wrong)


def test_read_index_reads_by_name_and_refuses_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data" / "folder" / "a.png", noise(8, 8))
    assert read_index("folder", "", "", "all").id(0) == "a.png"
    for arguments, words in ((("dexycb", "", "", "train"), "data/dexycb"),
                             (("folder", "x", "", "all"), "folder:x"),
                             (("folder", "", "", "trian"), "trian"),
                             (("dexycb", "", "", "all"), "all"),
                             (("synthetic", "", "", "train"), "rendered")):
        with pytest.raises(UserError, match=words) as error:
            read_index(*arguments)
        assert "\n" not in str(error.value)


def test_data_sets_are_read_by_name(tmp_path):
    write_freihand(tmp_path)
    assert parse_data("freihand:90-gs=/a") == ("freihand", "90-gs", "/a")
    assert len(read_index("freihand", "", str(tmp_path), "train")) == 12
    assert len(read_index("freihand", "gs", str(tmp_path), "train")) == 3
    assert len(read_index("freihand", "", str(tmp_path), "val")) == 0
    write_yt3d(tmp_path)
    assert len(read_index("yt3d", "", str(tmp_path), "train")) == 4
    write_ho3d(tmp_path, "train", [meta(0)], ["A/0"])
    assert len(read_index("ho3d", "", str(tmp_path), "train")) == 1
    write_coco(tmp_path, [person(5)])
    assert len(read_index("coco", "", str(tmp_path), "val")) == 2
    for name in ("yt3d", "coco", "ho3d"):
        with pytest.raises(UserError, match=f"{name} has no parts"):
            read_index(name, "x", str(tmp_path), "train")
    with pytest.raises(UserError, match="coco has no split 'test'"):
        read_index("coco", "", str(tmp_path), "test")
    with pytest.raises(UserError, match="freihand has no split 'all'"):
        read_index("freihand", "", str(tmp_path), "all")


# ---- Which joints a data set means ----

# typed from the notes: the five tip vertices, thumb to pinky, and whether the others come from the posed mesh
MEANT = {"freihand": ((744, 320, 443, 555, 672), True), "yt3d": ((744, 320, 443, 554, 671), True),
         "hanco": ((745, 317, 445, 556, 673), True), "cameras": ((745, 317, 445, 556, 673), True),
         "ho3d": ((744, 333, 444, 555, 672), False), "dexycb": ((745, 317, 444, 556, 673), False),
         "h2o": ((745, 317, 444, 556, 673), False), "100doh": ((744, 320, 443, 554, 671), False),
         "assembly101": ((744, 320, 443, 554, 671), False),
         "interhand": ((744, 320, 443, 554, 671), False), "coco": ((744, 320, 443, 554, 671), False),
         "folder": ((744, 320, 443, 554, 671), False), "imagenet": ((744, 320, 443, 554, 671), False),
         "synthetic": ((744, 320, 443, 554, 671), False)}
ORDER = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
REGRESSED = ["freihand", "yt3d", "hanco"]


def joints_meant(name, params, pose, shape, trans=(0, 0, 0)):
    """Vertices (778, 3) m and the joints (21, 3) m that a data set means, by NumPy alone."""
    verts, chain = mesh(params, pose, shape, trans)
    tips, regressed = MEANT[name]
    first = params["J_regressor"] @ verts if regressed else chain
    return verts, np.concatenate([first, verts[list(tips)]])[ORDER]


@pytest.fixture()
def posed(hand, tmp_path):
    """A pose (48,) with the mean in it, a shape (10,), and the file of a hand whose mean is not flat."""
    rng = np.random.default_rng(5)
    save_mano(tmp_path / "MANO_RIGHT.npz", hand)
    return rng.normal(0, 0.5, 48), rng.normal(0, 1, 10), str(tmp_path / "MANO_RIGHT.npz")


def rotations(pose):
    return axis_angle_to_matrix(torch.tensor(pose).float().view(1, 16, 3))


@pytest.mark.parametrize("name", MEANT)
def test_a_hand_has_the_joints_that_its_data_set_means(name, hand, posed):
    pose, shape, file = posed
    layer, beta = hand_for(f"{name}=somewhere", file), torch.tensor(shape).float()[None]
    verts, joints = layer(rotations(pose), beta)
    want = joints_meant(name, hand, pose, shape)
    assert np.abs(verts[0].numpy() - want[0]).max() < 1e-6 and np.abs(joints[0].numpy() - want[1]).max() < 1e-6
    assert torch.allclose(layer.joints(rotations(pose), beta), joints, atol=1e-6)
    chain = layer.chain_joints(rotations(pose), beta)
    apart = 1000 * (chain - joints).norm(dim=-1).mean()
    assert apart > 0.5 if MEANT[name][1] else apart < 1e-3


def test_every_data_set_says_which_joints_it_means():
    assert set(MEANT) == set(DATA_NAMES) and joints_of("") == joints_of("synthetic:B") == ("smplx", False)


@pytest.mark.parametrize("name", REGRESSED)
def test_every_network_has_the_joints_of_the_data_it_learns_from(name, hand, posed):
    pose, shape, file = posed
    want = joints_meant(name, hand, pose, shape)[1]
    nets = [ti_net.HandNet(ti_net.Config(backbone="resnet10", image_size=32, finetune=name, mano=file)),
            handmim.HandNet(handmim.Config(backbone="vit_mini", image_size=32, finetune=name, mano=file)),
            hamuco.HaMuCo(hamuco.Config(backbone="resnet10", image_size=32, data=(name,), mano=file, variant=("single-view",)))]
    for net in nets:
        joints = net.mano(rotations(pose), torch.tensor(shape).float()[None])[1]
        assert np.abs(joints[0].numpy() - want).max() < 1e-6


def written(name, root, hand, pose, shape):
    """One hand in the layout of a data set, as its annotators would have: mesh or joints, and pose."""
    mean = np.concatenate([np.zeros(3), hand["hands_mean"]])
    root.mkdir()
    if name == "freihand":
        verts, joints = joints_meant(name, hand, pose, shape, (0.02, -0.01, 0.6))
        theta = np.concatenate([pose - mean, shape, np.zeros(3)])
        write_freihand(root, n=1, xyz=[joints.tolist()], verts=[verts.tolist()], mano=[[theta.tolist()]])
    elif name == "yt3d":
        verts, _ = joints_meant(name, hand, pose, shape)
        px = verts * [60, 60, 60] + [20, 15, 0]
        images = [{"name": "youtube/a/video/frames/1.png", "width": 40, "height": 30, "id": 1}]
        notes = [{"vertices": px.tolist(), "is_left": 0, "image_id": 1, "id": 1}]
        write_yt3d(root, {images[0]["name"]: (40, 30)}, images=images, annotations=notes)
    else:
        _, joints = joints_meant(name, hand, pose, shape, (0.02, -0.01, 0.6))
        identity, K = np.tile(np.eye(4), (8, 1, 1)), np.tile([[300.0, 0, 112], [0, 300, 112], [0, 0, 1]], (8, 1, 1))
        for top, content in (("calib", {"K": K.tolist(), "M": identity.tolist()}), ("xyz", joints.tolist()),
                             ("shape", {"poses": [(pose - mean).tolist()], "shapes": [shape.tolist()],
                                        "global_t": [[[0.02, -0.01, 0.6]]]})):
            (root / top / "0001").mkdir(parents=True)
            (root / top / "0001" / "0.json").write_text(json.dumps(content))
        save(root / "rgb" / "0001" / "cam0" / "0.jpg", noise(224, 224))


@pytest.mark.parametrize("name", REGRESSED)
def test_truth_posed_truth_and_mean_pose_mean_the_same_joints(name, hand, posed, tmp_path):
    """The mean of one hand is that hand: its row has no error where truth and layer mean the same joints."""
    pose, shape, file = posed
    written(name, tmp_path / "data", hand, pose, shape)
    cfg = Flags(root=str(tmp_path / "data"), mano=file, cache=str(tmp_path / "cache"), workers=0)
    data, layer = open_data(cfg, (name,), "train", 32, 1.25, torch.device("cpu")), hand_for(name, file)
    if name == "yt3d":                                              # a mesh in pixels is all there is
        found = data.columns(torch.tensor([0]))
        assert np.allclose(found["joints_px"], layer.regress(torch.tensor(found["verts_px"])), atol=1e-4)
        truth = data.targets(torch.tensor([0]))["uv"]
        assert np.allclose(truth[0], transform(data[0]["crop"], torch.tensor(found["joints_px"][0, :, :2])), atol=1e-3)
        return
    sample = data.targets(torch.tensor([0]))
    R = axis_angle_to_matrix(sample["pose"].unflatten(1, (16, 3)))
    assert (layer(R, sample["shape"], sample["trans"])[1] - sample["joints"]).abs().max() < 2e-6
    batch = next(data.batches([torch.tensor([0])], torch.device("cpu"), 0))
    raw, aligned = blind(mean_hand(data), batch, layer)
    assert float(score(raw, batch)["mpjpe_mm"]) < 0.01 and float(score(aligned, batch)["pa_mpjpe_mm"]) < 0.01
    other = Mano(hand, layer.tips.tolist())                         # the chain's joints of the same hand
    assert float(score(blind(mean_hand(data), batch, other)[1], batch)["pa_mpjpe_mm"]) > 0.3


def test_a_mesh_is_read_out_as_the_tested_data_set_means_it(hand, posed):
    pose, shape, file = posed
    R, beta = rotations(pose), torch.tensor(shape).float()[None]
    verts, joints = hand_for("ho3d", file)(R, beta)
    place = torch.tensor([0.1, 0.2, 0.7])
    pred = {"verts": verts + place, "joints": joints + place, "pose": R, "shape": beta, "root": joints[:, 0] + place}
    moved = redefined(pred, "ho3d", "freihand", hand_for("freihand", file))
    want = joints_meant("freihand", hand, pose, shape, place.numpy())[1]
    assert np.abs(moved["joints"][0].numpy() - want).max() < 1e-6
    assert torch.allclose(moved["root"], moved["joints"][:, 0], atol=1e-6)
    assert redefined(pred, "ho3d", "ho3d", hand_for("ho3d", file)) is pred


# ---- Opening ----


def options(root, **changes):
    return Flags(**{"root": str(root), "mano": "builtin", "cache": str(root) + "-cache", "workers": 0} | changes)


def test_a_share_of_the_labels_takes_all_pictures_of_a_hand(tmp_path, capsys):
    """FreiHAND's four backgrounds show one label: half of four hands is two hands, eight pictures."""
    write_freihand(tmp_path, n=4)
    cfg = ti_net.Config(root=str(tmp_path), mano="builtin", cache=str(tmp_path / "c"), label_fraction=0.5)
    data = open_data(cfg, ("freihand",), "train", 32, 1.25, torch.device("cpu"), labelled=True)
    hands = data.columns(torch.arange(len(data)))["hand"]
    assert sorted(hands.tolist()) == sorted([*set(hands.tolist())] * 4) and len(data) == 8
    assert "2 labels used" in capsys.readouterr().out
    wider = open_data(ti_net.Config(root=str(tmp_path), mano="builtin", cache=str(tmp_path / "c"), label_fraction=0.6),
                      ("freihand",), "train", 32, 1.25, torch.device("cpu"), labelled=True)
    more = set(wider.columns(torch.arange(len(wider)))["hand"].tolist())
    assert len(more) == 3 and set(hands.tolist()) < more              # a smaller share lies inside a larger one


def test_numbers_of_mano_are_left_out_for_another_hand(tmp_path, capsys):
    write_freihand(tmp_path, n=2)
    data = open_data(options(tmp_path), ("freihand",), "train", 32, 1.25, torch.device("cpu"))
    has = data[0]["has"]
    assert has["joints"] and not (has["verts"] or has["pose"] or has["shape"])
    assert "mesh, pose and shape are left out" in capsys.readouterr().out


def test_photos_without_labels_train_all_of_them(tmp_path):
    for k in range(40):
        save(tmp_path / f"{k}.png", noise(8, 8, k))
    count = lambda split: len(open_data(options(tmp_path), ("folder",), split, 16, 1.25, torch.device("cpu")))
    assert count("train") == 40 and count("val") < 10
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"path": f"{k}.png"}) + "\n" for k in range(40)))
    assert count("train") == 40 - count("val") - count("test") < 40


def test_one_root_is_for_one_data_set(tmp_path):
    with pytest.raises(UserError, match="--root names the folder of one data set"):
        open_data(options(tmp_path), ("folder", "imagenet"), "train", 16, 1.25, torch.device("cpu"))
