"""The synthetic hands against their labels, their draws, their noise and their cache."""
import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Mano, UserError, axis_angle_to_matrix, project
from hand.builtin import builtin_hand
from sources.synthetic import Cached, Synthetic, noisy_labels


@pytest.fixture(scope="module")
def mano():
    return Mano(builtin_hand())


@pytest.fixture(scope="module")
def sixteen():
    return Synthetic(64).batch(torch.arange(16))


def test_no_picture_is_mirrored():
    batch = Synthetic(64, calm=True).batch(torch.arange(48))
    a, b = (batch["uv"][:, k] - batch["uv"][:, 0] for k in (5, 17))
    assert (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0] < 0).all()    # index right of pinky


def test_free_rotations_are_proper_and_show_palm_and_back_equally():
    R = Synthetic(64)._turns(torch.arange(4096))
    assert torch.allclose(torch.linalg.det(R), torch.ones(4096), atol=1e-5)
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(4096, 3, 3), atol=1e-5)
    assert R.mean(0).abs().max() < 0.05                         # uniform: every entry has mean 0
    assert (R.square().mean(0) - 1 / 3).abs().max() < 0.03


# ---- one sample

def test_sample_has_every_key_shape_and_type(sixteen):
    shapes = {"image": (3, 64, 64), "crop": (3, 3), "size": (2,), "K": (3, 3), "joints": (21, 3),
              "joints_ok": (21,), "verts": (778, 3), "uv": (21, 2), "uv_label": (21, 2),
              "confidence": (21,), "visible": (21,), "pose": (48,), "shape": (10,), "trans": (3,),
              "scale": (), "mask": (64, 64)}
    assert {k: tuple(sixteen[k].shape) for k in shapes} == {k: (16, *s) for k, s in shapes.items()}
    assert set(sixteen) == set(shapes) | {"has", "side", "id", "box_source"}
    assert sixteen["image"].dtype == sixteen["mask"].dtype == torch.uint8
    assert sixteen["visible"].dtype == sixteen["joints_ok"].dtype == torch.bool
    assert set(sixteen["has"]) == {"K", "joints", "uv", "verts", "pose", "shape", "cameras"}
    assert not sixteen["has"]["cameras"].any() and sixteen["has"]["K"].all()
    assert sixteen["side"] == ["right"] * 16 and len(set(sixteen["id"])) == 16


def test_joints_project_onto_uv_and_the_box_fills_its_share():
    batch = Synthetic(128, margin=1.5).batch(torch.arange(16))
    j, K = batch["joints"], batch["K"]
    x = j[..., 0] / j[..., 2] * K[:, None, 0, 0] + K[:, None, 0, 2]
    y = j[..., 1] / j[..., 2] * K[:, None, 1, 1] + K[:, None, 1, 2]
    assert (torch.stack([x, y], -1) - batch["uv"]).abs().max() < 1e-4
    low, high = batch["uv"].amin(1), batch["uv"].amax(1)
    assert ((low + high) / 2 - 63.5).abs().max() < 1e-3
    extent = (high - low).amax(1)
    assert extent.median() == pytest.approx(128 / 1.5, abs=1e-3) and extent.max() < 128 / 1.5 + 1e-3


def test_pose_shape_and_trans_give_the_vertices_and_joints_back(sixteen, mano):
    R = axis_angle_to_matrix(sixteen["pose"].view(16, 16, 3))
    verts, joints = mano(R, sixteen["shape"], sixteen["trans"])
    assert (verts - sixteen["verts"]).abs().max() < 5e-6
    assert (joints - sixteen["joints"]).abs().max() < 5e-6
    bone = (joints[:, 10] - joints[:, 9]).norm(dim=1)
    assert torch.allclose(bone, sixteen["scale"], atol=1e-5)


def test_mask_covers_the_projected_vertices_and_little_else():
    batch = Synthetic(64, calm=True, occluders=False).batch(torch.arange(32))
    uv = project(batch["verts"], batch["K"])
    inside = ((uv > 1) & (uv < 62)).all(-1)
    spot = torch.nn.functional.max_pool2d(batch["mask"].float(), 3, 1, 1)
    x, y = uv.round().long().clamp(0, 63).unbind(-1)
    on = spot[torch.arange(32)[:, None], y, x] > 0
    assert (on | ~inside).float().mean() > 0.995                # the forearm may hide some
    near = torch.zeros(32, 64, 64)
    near[torch.arange(32)[:, None], y, x] = 1.0
    near = torch.nn.functional.max_pool2d(near[:, None], 9, 1, 4)[:, 0]
    assert (near[batch["mask"] > 0] > 0).float().mean() > 0.995


def test_occluders_change_two_pictures_of_five_and_only_hide_joints():
    a, b = (Synthetic(64, occluders=on).batch(torch.arange(256)) for on in (True, False))
    changed = (a["image"] != b["image"]).flatten(1).any(1)
    assert 0.3 < changed.float().mean() < 0.5
    assert not (a["visible"] & ~b["visible"]).any()
    assert (a["visible"] != b["visible"]).any(1)[changed].float().mean() > 0.5
    assert torch.equal(a["verts"], b["verts"])


def test_the_forearm_starts_at_the_wrist_and_never_points_at_the_camera():
    data, eye = Synthetic(64), torch.tensor([[0.0, 0, -1]]).expand(64, 3)
    world = data._world(torch.arange(64), eye)
    rings = world["mesh"][:, 778:778 + 9 * len(data.loop)].unflatten(1, (9, -1)).mean(2)
    assert ((rings[:, 0] - world["joints"][:, 0]).norm(dim=1) < 0.04).all()
    way = rings[:, -1] - rings[:, -2]
    assert (way / way.norm(dim=1, keepdim=True))[:, 2].min() > -0.11
    assert ((world["joints"][:, 9] - rings[:, 0]) * (rings[:, 1] - rings[:, 0])).sum(1).max() < 0


def test_hands_have_human_colours_and_stand_out():
    batch = Synthetic(64, occluders=False).batch(torch.arange(128))
    inside = (batch["mask"] == 255)[:, None]
    mean = (batch["image"] * inside).sum((2, 3)) / inside.sum((2, 3)).clamp_min(1)
    r, g, b = mean[inside.sum((1, 2, 3)) > 100].unbind(1)
    assert ((r > g) & (g > b - 8)).float().mean() > 0.97
    grey = (r + g + b) / 3
    assert grey.min() < 75 and grey.max() > 160


# ---- draws

def test_a_sample_has_the_same_bits_in_every_batch():
    data = Synthetic(64)
    one = data.batch(torch.tensor([37]))
    many = data.batch(torch.tensor([80, 3, 37, 38, 37]))
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[0], many[key][2]) and torch.equal(value[0], many[key][4]), key
    assert many["id"][2] == one["id"][0]
    assert not torch.equal(many["image"][2], many["image"][3])


def test_parts_seeds_and_domains_share_no_sample_and_test_ignores_the_seed():
    names = [dict(part="train"), dict(part="train", seed=1), dict(part="val"), dict(part="test"),
             dict(part="train", domain="B"), dict(part="test", domain="B")]
    poses = torch.cat([Synthetic(64, **n).batch(torch.arange(16))["pose"] for n in names])
    assert len(poses.unique(dim=0)) == 16 * len(names)
    for part, length in (("val", 1000), ("test", 2000)):
        a, b = (Synthetic(64, part=part, seed=s) for s in (0, 5))
        assert len(a) == length
        assert torch.equal(a.batch(torch.arange(2))["image"], b.batch(torch.arange(2))["image"])
    assert len(Synthetic(64)) == 32560


def test_domain_c_has_fingers_up_palm_and_back_alike_and_photos_that_end():
    """Of hands six in ten lean at most 60 degrees and roll 45; the palm's side is drawn; nothing ends over a joint."""
    data = Synthetic(64, domain="C", margin=2.2)
    turns = data._turns(torch.arange(512))
    assert torch.allclose(torch.linalg.det(turns), torch.ones(512), atol=1e-4)                           # none is mirrored
    fingers, palm = turns @ torch.tensor([-1.0, 0, 0]), turns @ torch.tensor([0.0, -1, 0])       # from the wrist; out of the palm
    up, seen = -fingers[:, 1], -palm[:, 2]
    assert 0.6 < float((up > 0.3).float().mean()) < 0.8 and abs(float((up > -2).float().mean()) - 1) < 1e-6
    high = seen[up > 0.6]
    assert 0.35 < float((high > 0.4).float().mean()) < 0.6 and 0.35 < float((high < -0.4).float().mean()) < 0.6
    batch = data.batch(torch.arange(24))
    black = (batch["image"] == 0).all(1)                                         # (24, 64, 64): whole rows or columns
    ends = torch.stack([black[:, 0].all(1), black[:, -1].all(1), black[..., 0].all(1), black[..., -1].all(1)], 1)
    assert 8 < int(ends.sum()) < 34 and bool(ends.any(0).all())
    at = batch["uv"].round().long().clamp(0, 63)
    assert not black.logical_and(black.all(1, keepdim=True) | black.all(2, keepdim=True))[
        torch.arange(24)[:, None], at[..., 1], at[..., 0]].any()


def test_views_show_the_same_hand_through_their_cameras(mano):
    batch = Synthetic(64, views=4).batch(torch.arange(6))
    M, joints = batch["cameras"], batch["joints"]
    assert M.shape == (6, 4, 4, 4) and batch["view_ok"].all() and batch["has"]["cameras"].all()
    R, t = M[..., :3, :3], M[..., :3, 3]
    assert torch.allclose(torch.linalg.det(R), torch.ones(6, 4), atol=1e-5)
    world = (joints - t[..., None, :]) @ R                      # R^-1 (x - t)
    assert (world - world[:, :1]).abs().max() < 1e-6
    assert (batch["verts"][:, 0] - batch["verts"][:, 1]).abs().max() > 0.05
    assert (project(joints, batch["K"]) - batch["uv"]).abs().max() < 1e-4
    pose = axis_angle_to_matrix(batch["pose"].view(24, 16, 3))
    verts, _ = mano(pose, batch["shape"].view(24, 10), batch["trans"].view(24, 3))
    assert (verts - batch["verts"].flatten(0, 1)).abs().max() < 5e-6
    assert (R[:, :, 1, 1] > 0.3).all()                          # cameras stand upright
    place = -(R.mT @ t[..., None])[..., 0]                      # on a ring around the hand
    rise = torch.rad2deg(torch.asin(-place[..., 1] / place.norm(dim=-1)))
    assert rise.min() > -35 and rise.max() > 30 and rise.max() < 65
    angle = torch.rad2deg(torch.atan2(place[..., 2], place[..., 0])).sort(1).values
    gap = torch.cat([angle.diff(dim=1), angle[:, :1] + 360 - angle[:, -1:]], 1)
    assert gap.min() > 15 and gap.max() < 170


def labels_of(batch, size, **more):
    """Labels of a batch of one view, by hand: every moment has one picture."""
    n = len(batch["uv"])
    index = torch.arange(n)
    return noisy_labels(batch["uv"], batch["uv"] + more.pop("off", 0.0), batch["visible"], index, index, 0,
                        size, **more)


@pytest.fixture(scope="module")
def many():
    """512 hands as key points and visibility, 256 px wide: one in two joints hidden, as seen from all around."""
    batch = Synthetic(256).batch(torch.arange(16))
    return {"uv": batch["uv"].repeat(32, 1, 1),
            "visible": torch.rand(512, 21, generator=torch.Generator().manual_seed(0)) < 0.55}


def test_label_noise_is_that_of_openpose_on_hanco():
    errors = {}
    for outliers in (0.0, 0.1, 0.2):
        data = Synthetic(64, 16, 0, "val", 8, margin=2.2, outliers=outliers, detector=1.25 / 2.2)
        batch = data.batch(torch.arange(16))
        error = 256 / 36 * (batch["uv_label"] - batch["uv"]).norm(dim=-1)     # 64 x 1.25 / 2.2 = 36 px
        errors[outliers] = error.mean().item()
    assert 22 < errors[0.1] < 28 and 30 < errors[0.2] < 40 and errors[0.0] < 18, errors
    seen = batch["visible"]
    assert error[seen].median() < 0.7 * error[~seen].median()
    assert batch["confidence"].min() >= 0 and batch["confidence"].max() <= 1


def test_confidence_tells_little_more_than_that_an_error_is_likely(many):
    label, confidence = labels_of(many, 256, off=8.0)
    error = (label - many["uv"]).norm(dim=-1)
    ranks = [x.flatten().argsort().argsort().double() for x in (error, confidence)]
    rho = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    assert -0.65 < rho < -0.35
    assert (confidence[error > 60] > 0.5).float().mean() > 0.05           # some are wrong and sure
    assert confidence[many["visible"]].mean() > confidence[~many["visible"]].mean() + 0.15


def test_lost_joints_are_as_many_as_stated_and_more_often_hidden_ones(many):
    far = many | {"uv": many["uv"] + 1e5}                                 # lost labels come back to the square
    label, _ = labels_of(far, 256, outliers=0.2)
    lost = (label < 1000).all(-1)
    assert lost[many["visible"]].float().mean() == pytest.approx(0.1, abs=0.01)
    assert lost[~many["visible"]].float().mean() == pytest.approx(0.3, abs=0.02)
    assert label[lost].min() >= -0.5 and label[lost].max() <= 255.5


def test_views_of_a_moment_share_what_their_hidden_labels_believe():
    data = Synthetic(64, samples=32, views=4, part="val", outliers=0.0)
    batch = data.batch(torch.arange(32))
    focal = batch["K"][..., 0, 0][..., None, None]
    metres = (batch["uv_label"] - batch["uv"]) / focal * batch["joints"][..., 2:]
    world = torch.einsum("bvji,bvpj->bvpi", batch["cameras"][..., :2, :3], metres)    # of the picture's plane
    hidden = ~batch["visible"]
    pairs = [(world[:, a] * world[:, b]).sum(-1)[hidden[:, a] & hidden[:, b]]
             for a in range(4) for b in range(a)]
    agree = (torch.cat(pairs) > 0).float().mean()
    mixed = [(world[:, a] * world[:, b].roll(1, 0)).sum(-1)[hidden[:, a] & hidden[:, b].roll(1, 0)]
             for a in range(4) for b in range(a)]
    chance = (torch.cat(mixed) > 0).float().mean()
    assert agree > 0.58 and abs(chance - 0.5) < 0.05, (agree, chance)


def test_swapped_fingers_are_neighbours_and_as_frequent_as_stated():
    uv = torch.arange(21.0)[None, :, None].expand(4096, 21, 2) * 1000
    visible = torch.ones(4096, 21, dtype=torch.bool)
    image = torch.arange(4096)
    label, _ = noisy_labels(uv, uv, visible, image // 4, image, 0, 64, outliers=0.0)
    found = (label[..., 0] / 1000).round().long()
    moved = (found != torch.arange(21)).any(1)
    assert moved.float().mean() == pytest.approx(1 / 12, abs=0.02)
    assert moved.view(-1, 4).any(1).float().mean() < 0.2                  # the views of few moments, together
    for row in found[moved][:40]:
        changed = (row != torch.arange(21)).nonzero()[:, 0]
        first = changed[0].item()
        assert first % 4 == 1 and row[first] == first + 4 and row[first + 4] == first
        assert changed.tolist() == list(range(first, first + 8))


# ---- files

def test_cache_equals_live_rendering_and_is_written_once(tmp_path, capsys):
    data = Synthetic(64, samples=40)
    cached = Cached(data, tmp_path)
    assert "MB" in capsys.readouterr().out
    index = torch.tensor([39, 0, 17, 16])
    a, b = data.batch(index), cached.batch(index)
    assert set(a) == set(b) and a["id"] == b["id"] and a["side"] == b["side"]
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key
    before = cached.kept.path.stat().st_mtime_ns
    again = Cached(Synthetic(64, samples=40), tmp_path)
    assert again.kept.path == cached.kept.path and again.kept.path.stat().st_mtime_ns == before
    assert {p.name for p in tmp_path.iterdir()} == {cached.kept.path.name, cached.kept.path.with_suffix(".lock").name}


def test_all_seeds_share_one_cache_of_the_test_hands_and_what_one_rendered_of_them_is_there_for_another(tmp_path, monkeypatch):
    """Of 56 the first 20 are asked for, two blocks of 16; a later run renders the other two; one that is read in passing, too."""
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 16, "test": 56})
    some = Cached(Synthetic(64, None, 7, "test"), tmp_path, most=20).kept
    assert np.flatnonzero(some.marks).tolist() == list(range(32))
    data = Synthetic(64, None, 0, "test")
    drawn, plain = [], data.block
    data.block = lambda index: drawn.append(int(index[0])) or plain(index)
    early = Cached(data, tmp_path, most=20)
    assert early.kept.path == some.path and torch.equal(early.batch(torch.tensor([50]))["image"], data.batch(torch.tensor([50]))["image"])
    assert drawn == [0, 48, 48]                                 # 0: the block that names the file
    assert Cached(data, tmp_path).kept.marks.all() and drawn == [0, 48, 48, 0, 32]


def test_cache_of_other_settings_is_another_file(tmp_path):
    kinds = [{}, {"margin": 1.6}, {"calm": True}, {"occluders": False}, {"seed": 1},
             {"part": "val"}, {"domain": "B"}, {"outliers": 0.2}]
    paths = {Cached(Synthetic(64, **{"samples": 16} | kind), tmp_path).kept.path for kind in kinds}
    hand = dict(builtin_hand())
    hand["hands_mean"] = hand["hands_mean"] + 1e-9              # changes no picture
    paths.add(Cached(Synthetic(64, samples=16, hand=hand), tmp_path).kept.path)
    paths.add(Cached(Synthetic(64, samples=20), tmp_path).kept.path)
    assert len(paths) == len(kinds) + 2


def test_a_killed_cache_goes_on_where_it_stopped(tmp_path):
    data = Synthetic(64, samples=56)
    whole = Cached(data, tmp_path).kept
    content = whole.path.read_bytes()
    with open(whole.path, "r+b") as file:                       # blocks 0 and 2; the third is marked but not all there
        file.write(np.where(np.isin(np.arange(56) // 16, (0, 2)), whole.marks, 0).tobytes())
        file.seek(whole.whole - 17 * whole.record.itemsize)
        file.write(bytes(5000))
    drawn, plain = [], data.block
    data.block = lambda index: drawn.append(int(index[0])) or plain(index)
    again = Cached(data, tmp_path)
    assert drawn == [0, 16, 48]                                 # 0: the block that names the file
    fresh, torn = again.batch(torch.arange(36)), again.batch(torch.tensor([39]))
    assert drawn == [0, 16, 48, 32] and again.kept.path.read_bytes() == content
    assert torch.equal(torch.cat([fresh["image"], torn["image"]]), data.batch(torch.tensor([*range(36), 39]))["image"])


def test_backgrounds_come_from_the_folder_and_bad_ones_are_named(tmp_path):
    with pytest.raises(UserError, match="no .jpg or .png"):
        Synthetic(64, backgrounds=tmp_path)
    Image.new("RGB", (90, 200), (0, 255, 0)).save(tmp_path / "a.png")
    data = Synthetic(64, backgrounds=tmp_path, occluders=False)
    image = data.batch(torch.arange(16))["image"].float()
    corner = image[:, :, :8, :8].mean((2, 3))
    assert (corner[:, 1] - corner[:, 0] > 100).float().mean() > 0.5
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="b.jpg"):
        Synthetic(64, backgrounds=tmp_path)


def test_wrong_requests_are_refused():
    with pytest.raises(UserError, match="train, val and test"):
        Synthetic(64, part="dev")
    with pytest.raises(UserError, match="domains A, B"):
        Synthetic(64, domain="D")
    data = Synthetic(64, samples=20)
    for bad in ([20], [-1], []):
        with pytest.raises(IndexError):
            data.batch(torch.tensor(bad, dtype=torch.long))


@pytest.mark.parametrize("given", [{}, {"calm": True}, {"domain": "C"}])
def test_turns_are_made_on_the_device_of_the_index(given):
    """The meta device refuses, as a GPU does, to meet a constant that was left on the host."""
    data = Synthetic(64, **given)
    common._made.cache_clear()
    try:
        assert data._turns(torch.arange(4, device="meta")).device.type == "meta"
    finally:
        common._made.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_pictures_are_within_one_level_of_the_cpu():
    index = torch.arange(16)
    a, b = Synthetic(64).batch(index), Synthetic(64).batch(index, "cuda")
    gap = (a["image"].float() - b["image"].cpu().float()).abs()
    assert (gap > 1).float().mean() < 1e-3 and (a["joints"] - b["joints"].cpu()).abs().max() < 1e-5
