"""HaMuCo: network parts, alignment, losses and triangulation against golden arrays and formulas; views
that are missing, repeated or permuted; the command line."""
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
from group import on_processes
from hand.builtin import builtin_hand
from sources.freihand import index_freihand
from sources.index import Index
from sources.hands import Hands
from sources.synthetic import LENGTH
from sources.synthetic import Synthetic
from trees import rig_tree
import hamuco
from common import UserError, axis_angle_to_matrix, matrix_to_axis_angle, score, six_d_to_matrix
from sources.judging import only_made
from sources.predictors import as_pictures, outputs
from hamuco import (
    JOINTS, Attention, Config, Draws, Graph, HaMuCo, Heads, Interaction, View, align, best_rotation,
    coordinates, draw_masks, fuse, loss_2d, loss_c2d, loss_cf, loss_d, lr_at, opt_center, projections, quiet,
    ransac, refine, reproject, sample_joints, targets, to_cameras, train_step, triangulate, view_rotations)

TINY = dict(backbone="resnet10", image_size=32, batch_size=2, micro_batch=2, views=3, mano="builtin",
            warm_epochs=0, epochs=2)
EXACT = torch.float64


@pytest.fixture(scope="module")
def g(golden):
    arrays = golden("hamuco")
    return lambda name: torch.tensor(arrays[name])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def near(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) < tolerance


# ---- Network parts against golden arrays


def test_parameter_counts_are_the_paper_s_network():
    for backbone, total, heads, interaction in (("resnet18", 32_539_832, 843_885, 20_519_435),
                                                ("resnet50", 134_683_000, 12_812_397, 98_362_571)):
        with torch.device("meta"):
            blocks = Interaction(512 if backbone == "resnet18" else 2048, 448 if backbone == "resnet18" else 1792, 64)
        count = lambda module: sum(p.numel() for p in module.parameters())
        assert count(blocks) == interaction
        if backbone == "resnet18":
            model = HaMuCo(Config(backbone=backbone, mano="builtin"))
            assert count(model) == total and count(model.heads) == heads
        else:
            assert count(Heads(2048)) == heads
            assert count(common.build_backbone(backbone, 256)) + heads + interaction == total


def test_rotations_match_golden(g):
    near(six_d_to_matrix(g("rot/x6")), g("rot/hamuco_rot6d_to_rotmat"), 1e-12)
    near(matrix_to_axis_angle(g("rot/Rm")), g("rot/tgm_rotmat_to_aa"), 1e-9)
    near(matrix_to_axis_angle(six_d_to_matrix(g("dec/pose6d").unflatten(1, (16, 6)))).flatten(1), g("dec/pose_aa"))


def test_coordinates_match_golden(g):
    xyz, uv = coordinates(g("dec/verts_mm") / 1000, g("dec/joints_mm") / 1000, g("dec/cam"))
    near(xyz[:, ::29], g("dec/coord_xyz"))
    near(torch.cat([uv, xyz[..., 2:]], -1)[:, ::29], g("dec/coord_uvd"))


def test_camera_projects_by_the_formula_of_the_256_px_crop():
    """pixel = 256 s x + 128 t + 128, x in m from the middle MCP, and (pixel - 128) / 128 is ours."""
    joints = torch.randn(2, 21, 3, dtype=EXACT) * 0.05
    verts, camera = torch.randn(2, 778, 3, dtype=EXACT) * 0.05, torch.tensor([[4.0, 0.1, -0.2], [-3, 0.3, 0]])
    _, uv = coordinates(verts, joints, camera.to(EXACT))
    x = joints[0, 4, :2] - joints[0, 9, :2]
    pixel = 256 * 4.0 * x + 128 * torch.tensor([0.1, -0.2]) + 128
    near(uv[0, 778 + 4], (pixel - 128) / 128, 1e-7)
    near(uv[1], torch.tensor([0.3, 0], dtype=EXACT).expand(799, 2), 1e-7)              # s < 0 is 0


def loaded(module, names, g, prefix):
    """The module in float64 with golden weights: our key prefix -> official key prefix."""
    module = module.double()
    state = {}
    for key in module.state_dict():
        ours = next(o for o in sorted(names, key=len, reverse=True) if key.startswith(o))
        state[key] = g(prefix + names[ours] + key[len(ours):])
    module.load_state_dict(state)
    return module


GRAPH = {"norm.": "reg.ln.", "first.A": "reg.gcn_i.adj", "first.fc.": "reg.gcn_i.fc.",
         "second.A": "reg.gcn_1.adj", "second.fc.": "reg.gcn_1.fc."}
ATTENTION = {"q.": "w_qs.", "k.": "w_ks.", "v.": "w_vs.", "norm.": "layer_norm.", "out.": "fc.",
             "norm_mlp.": "ff.layer_norm.", "mlp.0.": "ff.fc1.", "mlp.2.": "ff.fc2."}


def test_graph_attention_and_sampler_match_golden(g):
    near(loaded(Graph(6, 5), GRAPH, g, "gcn_lastact/w/")(g("gcn_lastact/x"), None), g("gcn_lastact/y"))
    every = torch.ones(2, 12, 12, dtype=torch.bool)
    near(loaded(Attention(18), ATTENTION, g, "att/w/")(g("att/x"), every), g("att/y"))
    near(sample_joints(g("jfs/feat"), g("jfs/uv")), g("jfs/out_BCJ").mT)


def test_heads_match_golden(g):
    names = {f"{k}.{ours}.": f"layers_{name}.{theirs}." for k, name in enumerate(("pose", "shape", "cam"))
             for ours, theirs in ((0, 2), (2, 4))}
    found, true = loaded(Heads(8), names, g, "head/w/")(g("head/x")), g("head/mano_params")
    near(torch.cat([found[:, :106], found[:, 106:107].relu()], 1), true[:, :107])      # theirs ends in ReLU


def test_saigb_gives_a_joint_its_own_maps(g):
    net = Interaction(6, 0, 4, ("no-g1", "no-g3"), maps=2).double()
    net.G2[0].load_state_dict({k: g(f"saigb/w/group.0.{k}") for k in ("weight", "bias")})
    N = len(g("saigb/x"))
    near(net.features(g("saigb/x"), torch.zeros(N, 21, 0), torch.zeros(N, 21, 3), torch.zeros(N, 96)), g("saigb/y"))


OFFICIAL = {"G1.": "pose_mapping.", "G2.": "saigb_pose.group.", "F_r.": "fc.",
            **{"fuse." + ours: "fuse." + theirs for ours, theirs in GRAPH.items()},
            **{f"blocks.{k}.graph.{ours}": f"gcn_{k}.{theirs}" for k in (0, 1) for ours, theirs in GRAPH.items()},
            **{f"blocks.{k}.attention.{ours}": f"att_{k}.{theirs}" for k in (0, 1)
               for ours, theirs in ATTENTION.items()}}


def closed_form(keys):
    """The golden weights: wave(n, a)_i = sin(0.7 i + a), a = 0.01 x rank of the official key."""
    wave = lambda n, a: torch.sin(0.7 * torch.arange(n, dtype=EXACT) + a)

    def weight(key, shape):
        w = wave(math.prod(shape), 0.01 * keys.index(key)).view(shape)
        if key.endswith("adj"):
            return torch.eye(21, dtype=EXACT) + 0.02 * w.abs()
        if "ln.weight" in key or "layer_norm.weight" in key:
            return 1 + 0.1 * w
        return 0.05 * w if len(shape) == 1 else w * math.sqrt(2 / math.prod(shape[1:]))

    return wave, weight


def test_the_whole_cross_view_network_matches_golden(g, golden):
    keys = golden("hamuco")["cvi/keys"].tolist()
    wave, weight = closed_form(keys)
    net, state = Interaction(16, 14, 4, maps=2).double(), {}
    for key, value in net.state_dict().items():
        ours = next(o for o in sorted(OFFICIAL, key=len, reverse=True) if key.startswith(o))
        official = OFFICIAL[ours] + key[len(ours):]
        state[key] = weight(official, tuple(value.shape))
        assert float(state[key].abs().sum()) == pytest.approx(float(g("cvi/key_abssum")[keys.index(official)]))
    net.load_state_dict(state)
    ok, parameters = torch.ones(2, 3, dtype=torch.bool), g("cvi/mano_params")
    out = net(g("cvi/feat_high"), g("cvi/jaf"), g("cvi/joint_uvd"), parameters[:, :96], ok, quiet(ok))
    near(out[:, 106:], g("cvi/cam"))
    aa = matrix_to_axis_angle(six_d_to_matrix(out[:, :96].unflatten(1, (16, 6)))).flatten(1)
    near(aa, g("cvi/pose_aa"))
    mm = 100 * wave(2334, 0.1) + 5 * aa @ wave(48 * 2334, 0.2).view(48, -1) \
        + 2 * parameters[:, 96:106] @ wave(10 * 2334, 0.3).view(10, -1)
    verts = mm.view(-1, 778, 3) / 1000
    near(coordinates(verts, verts[:, torch.arange(21) * 37], out[:, 106:])[0][:, ::29], g("cvi/coord_xyz"))


def test_decoder_poses_the_hand_with_its_mean(g):
    """Oracle: MANO in NumPy with axis-angle plus the mean; joints regressed from the mesh, tips 745 .."""
    params = dict(builtin_hand())
    params["hands_mean"] = 0.1 * np.sin(np.arange(45.0))
    model = HaMuCo(Config(**TINY | dict(data=("hanco",))))
    model.mano = common.Mano(params, "graphormer", EXACT, regressed=True)
    numbers = torch.randn(2, 109, dtype=EXACT)
    hand = model.decode(numbers)
    aa = matrix_to_axis_angle(six_d_to_matrix(numbers[:, :96].unflatten(1, (16, 6)))).numpy()
    aa[:, 1:] += params["hands_mean"].reshape(15, 3)
    from scipy.spatial.transform import Rotation
    R = Rotation.from_rotvec(aa.reshape(-1, 3)).as_matrix().reshape(2, 16, 3, 3)
    verts, _ = common.mano_numpy(params, R, numbers[:, 96:106].numpy())
    regressed = np.einsum("jv,bvc->bjc", params["J_regressor"], verts)
    joints = np.concatenate([regressed, verts[:, [745, 317, 445, 556, 673]]], 1)[
        :, [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]]
    expected = (np.concatenate([verts, joints], 1) - joints[:, 9:10]) / 0.2
    near(hand.xyz, torch.tensor(expected), 1e-9)
    near(hand.theta, torch.tensor(aa[:, 1:] - params["hands_mean"].reshape(15, 3)).flatten(1), 1e-12)


def test_gradients_are_finite_where_training_begins():
    """Last layers start at the mean pose, the identity in 6D, where a detour by axis-angle can be NaN."""
    model = HaMuCo(Config(**TINY))
    ok = torch.ones(2, 3, dtype=torch.bool)
    single, star = model(torch.randn(2, 3, 3, 32, 32), ok, quiet(ok))
    near(single.theta, torch.zeros(6, 45), 1e-6)
    (single.xyz.square().sum() + star.uv.square().sum() + star.theta.abs().sum()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(x.isfinite().all() for x in grads) and sum(float(x.abs().sum()) for x in grads) > 0
    assert float(single.uv[:, JOINTS].detach().abs().max()) < 1.2 and float(single.camera[0, 0].detach()) == 5


# ---- Alignment and losses


def test_alignment_matches_golden(g):
    x = torch.stack([g("proc/S1").mT, g("proc/S2").mT], 1)
    near(align(x, None)[:, 1, 0], g("proc/free_np_hat").mT)
    R = torch.stack([torch.eye(3, dtype=EXACT).expand(5, 3, 3), g("proc/R_given")], 1)
    near(align(x, R)[:, 1, 0], g("proc/givenR_np_hat").mT)


def loss_inputs(g):
    V = lambda name: g(f"loss/in/{name}").unflatten(0, (2, 3)).clone().requires_grad_()
    return V("coord_xyz"), V("coord_xyz_mvf"), g("loss/in/rotation"), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("name, term", [("c2d", loss_c2d), ("cf", loss_cf)])
def test_losses_and_gradients_match_golden(g, name, term):
    single, star, R, ok = loss_inputs(g)
    aligned = align(star, R)
    L_c, L_d = term(aligned, star, ok), loss_d(aligned, single, ok)
    value = lambda key: float(g(f"loss/{name}/{key}"))
    assert float(L_c.detach()) == pytest.approx(value("L_mvc_mvf_0"), abs=1e-12)
    assert float(L_d.detach()) == pytest.approx(value("L_coord_xyz_dist_0"), abs=1e-12)
    near(fuse(aligned, ok)[:, :, ::29], g(f"loss/{name}/avg_fuse_BVN3"))
    c = g("loss/in/confidence")[..., 0]
    for key, which in (("coord_uvd", "L_coord_uv_0"), ("coord_uvd_mvf", "L_coord_uv_mvf_0")):
        uv = g(f"loss/in/{key}").unflatten(0, (2, 3))[..., :2]
        assert float(loss_2d(uv, g("loss/in/mesh_pose_uvd")[..., :2], c, ok)) == pytest.approx(value(which), abs=1e-12)
    grads = torch.autograd.grad(L_c + L_d, (single, star))
    near(grads[0].flatten(0, 1)[:, ::29], g(f"loss/{name}/grad_coord_xyz"), 1e-12)
    error = (grads[1].flatten(0, 1)[:, ::29] - g(f"loss/{name}/grad_coord_xyz_mvf")).abs()
    if name == "c2d":      # view i's own hand meets itself: theirs adds the sign of a rounding error in x and y, ours 0
        error = torch.minimum(error, (error - 1 / 6 / 4794).abs())
    assert float(error.max()) < 1e-12 and float(error[..., 2].max()) < 1e-12


def test_alignment_without_calibration_is_gower_s(g):
    """Oracle typed from s = tr(R K) / var, t = mu_i - s R mu_j, R of the SVD, one pair at a time."""
    _, star, _, ok = loss_inputs(g)
    x, aligned = star.detach(), align(star.detach(), None)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        source, target = x[b, j].numpy(), x[b, i].numpy()
        mu_j, mu_i = source.mean(0), target.mean(0)
        K = (source - mu_j).T @ (target - mu_i)
        U, S, Vt = np.linalg.svd(K)
        Z = np.diag([1, 1, np.sign(np.linalg.det(U @ Vt))])
        R = Vt.T @ Z @ U.T
        s = np.trace(R @ K) / ((source - mu_j) ** 2).sum()
        near(aligned[b, i, j], torch.tensor(s * (source - mu_j) @ R.T + mu_i), 1e-11)
    # values that the authors' code gives for unknown rotations, from the sheet of golden numbers
    assert float(loss_c2d(aligned, x, ok)) == pytest.approx(0.0223529874, abs=1e-9)
    assert float(loss_cf(aligned, x, ok)) == pytest.approx(0.0193124914, abs=1e-9)
    single = g("loss/in/coord_xyz").unflatten(0, (2, 3))
    assert float(loss_d(aligned, single, ok)) == pytest.approx(0.0752236402, abs=1e-9)


def test_best_rotation_has_the_svd_s_derivative():
    K = torch.randn(4, 3, 3, dtype=EXACT, requires_grad=True)
    assert torch.autograd.gradcheck(best_rotation, K, atol=1e-6)
    equal = torch.eye(3, dtype=EXACT).mul(2).requires_grad_()                 # where the SVD's is infinite
    assert torch.autograd.gradcheck(best_rotation, equal[None], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_other_turns_are_as_good_best_rotation_is_one_of_the_best(dtype):
    """Points on a line (rank 1), in one place (0), a mirrored pair of equal axes: a turn about one axis changes nothing."""
    a, b = torch.tensor([1.0, 2, 2], dtype=dtype), torch.tensor([2.0, -1, 2], dtype=dtype)
    cases = (torch.outer(a, b), 9.0), (torch.zeros(3, 3, dtype=dtype), 0.0), (torch.diag(torch.tensor([3.0, 1, -1])).to(dtype), 3.0)
    for K, best in cases:
        K = K.clone().requires_grad_()
        R = best_rotation(K[None])[0]
        near((R.mT @ R).detach(), torch.eye(3, dtype=dtype), 1e-5)
        assert float(R.det().detach()) > 0.99 and float((R @ K).trace().detach()) == pytest.approx(best, abs=1e-5)
        (R * torch.arange(9.0).view(3, 3)).sum().backward()
        assert K.grad.isfinite().all() and float(K.grad.abs().max()) < 20           # 1 / stiffness, not 1 / rounding error
    assert best_rotation(torch.full((1, 3, 3), math.nan, dtype=dtype)).isnan().all()


def test_a_moment_without_views_adds_nothing_and_nan_shows():
    block, G = hamuco.Block(8, ("no-cva",)), torch.randn(2, 3, 21, 8)
    ok = torch.tensor([[True, True, True], [False, False, False]])
    out = block(G, quiet(ok).see[0], ok, None)
    near(out[1], G[1], 1e-12)
    G[0, 1, 4, 2] = math.nan                                # of view 1, and by the maximum of view 0 too
    assert block(G, quiet(ok).see[0], ok, None)[0, 0].isnan().any()


def test_a_label_that_is_not_known_has_no_loss_and_no_gradient():
    uv, target, c = torch.randn(1, 1, 21, 2, requires_grad=True), torch.zeros(1, 1, 21, 2), torch.ones(1, 1, 21)
    target[0, 0, 4], c[0, 0, 4] = math.nan, 0.0
    value = loss_2d(uv, target, c, torch.ones(1, 1, dtype=torch.bool))
    others = [j for j in range(21) if j != 4]
    assert float(value.detach()) == pytest.approx(float(uv.detach()[:, :, others].abs().sum()) / 42)
    grad, = torch.autograd.grad(value, uv)
    assert grad.isfinite().all() and not grad[0, 0, 4].any()


def hands(B=2, V=4, dtype=EXACT):
    """One hand seen by V cameras, with its rotations: x_i = s_i R_i x + t_i."""
    x = torch.randn(B, 1, 799, 3, dtype=dtype)
    R = axis_angle_to_matrix(torch.randn(B, V, 3, dtype=dtype))
    s = 0.5 + torch.rand(B, V, 1, 1, dtype=dtype)
    return s * x @ R.mT + torch.randn(B, V, 1, 3, dtype=dtype), R


def test_consistent_hands_have_no_loss_with_and_without_calibration():
    x, R = hands()
    ok = torch.ones(2, 4, dtype=torch.bool)
    for rotations in (R, None):
        aligned = align(x, rotations)
        assert float(loss_c2d(aligned, x, ok)) < 1e-12 and float(loss_cf(aligned, x, ok)) < 1e-12
        near(fuse(aligned, ok), x, 1e-11)
    wrong = align(x, R.flip(1))
    assert float(loss_c2d(wrong, x, ok)) > 0.1


def test_a_moment_without_calibration_is_aligned_by_procrustes():
    x, R = hands()
    R[1] = math.nan
    aligned = align(x, R)
    near(aligned, torch.cat([align(x[:1], R[:1]), align(x[1:], None)]), 1e-12)


def test_a_missing_view_does_not_count_in_any_loss():
    x, R = hands(V=3)
    x = x + 0.1 * torch.randn_like(x)
    uv, target, c = torch.randn(2, 3, 21, 2), torch.randn(2, 3, 21, 2), torch.rand(2, 3, 21)
    ok = torch.tensor([[True, False, True]] * 2)
    blank = torch.where(ok[..., None, None], x, 0).requires_grad_()
    aligned, two = align(blank, R), align(x[:, ::2], R[:, ::2])
    all_2 = torch.ones(2, 2, dtype=torch.bool)
    for term in (loss_c2d, loss_cf):
        assert float(term(aligned, blank, ok)) == pytest.approx(float(term(two, x[:, ::2], all_2)), rel=1e-12)
        grad, = torch.autograd.grad(term(aligned, blank, ok), blank, retain_graph=True)
        assert grad.isfinite().all() and grad[:, 1].abs().sum() == 0
    target[:, 1], c[:, 1] = math.nan, 0
    assert float(loss_2d(uv, target, c, ok)) == pytest.approx(
        float((c[:, ::2, :, None] * (uv - target)[:, ::2]).abs().mean()), rel=1e-6)


def test_projected_c2d_weighs_by_the_view_s_scale():
    x, R = hands()
    x = x + 0.1 * torch.randn_like(x)
    ok, aligned = torch.ones(2, 4, dtype=torch.bool), align(x, R)
    scale = torch.rand(2, 4, dtype=EXACT)
    expected = np.mean([float(scale[b, i]) * float((aligned[b, i, j, :, :2] - x[b, i, :, :2]).abs().mean())
                        for b in range(2) for i in range(4) for j in range(4)])
    assert float(loss_c2d(aligned, x, ok, scale)) == pytest.approx(expected, rel=1e-12)


# ---- Views and targets


def test_turned_pictures_turn_their_cameras():
    """K' = A K projects R_z(angle) R x + t' to A times the old pixels, for any in-plane turn."""
    cfg = Config(**TINY)
    view = hamuco.draw_view(torch.arange(2), 3, 56, cfg, 0)
    M = torch.eye(4).repeat(2, 3, 1, 1)
    M[..., :3, :3] = axis_angle_to_matrix(torch.randn(2, 3, 3))
    turned = view_rotations(M, torch.ones(2, 3, dtype=torch.bool), view.angle)
    x = torch.randn(5, 3)
    linear = view.A[..., :2, :2] / view.A[..., :2, :2].det().abs().sqrt()[..., None, None]
    near((x @ turned.mT)[..., :2], (x @ M[..., :3, :3].mT)[..., :2] @ linear.mT, 1e-5)
    near((x @ turned.mT)[..., 2], (x @ M[..., :3, :3].mT)[..., 2], 1e-6)


def test_training_crops_are_those_of_the_authors_code():
    """120 to 159 px of HanCo's 224 around its centre +-20 +-10 px, scaled by 0.9 to 1.1, any turn."""
    cfg = Config(mano="builtin")
    side = hamuco.stored_side(cfg)
    view = hamuco.draw_view(torch.arange(3000), 2, side, cfg, 1)
    A = view.A.flatten(0, 1)
    wide = 256 / A[:, :2, :2].det().sqrt() * 104 * hamuco.MARGIN / side                # px of 224
    assert 120 / 1.1 <= wide.min() < 112 and 170 < wide.max() <= 159 / 0.9 + 1e-3
    middle = common.transform(torch.linalg.inv(A), torch.full((1, 2), 127.5).expand(len(A), 1, 2))[:, 0]
    shift = (middle - (side - 1) / 2) * 104 * hamuco.MARGIN / side
    assert 27 < shift.abs().max() <= 30 and abs(float(shift.mean())) < 1
    assert view.angle.min() < -3.1 and view.angle.max() > 3.1
    assert 0.8 <= view.colour.min() < 0.81 and 1.19 < view.colour.max() <= 1.2
    assert not torch.equal(view.A[:, 0], view.A[:, 1])                                 # each view its own


def batch_of(B=2, V=3, size=56, seed=0):
    """A batch as `synthetic` gives it, of noise pictures and one random hand a moment."""
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=gen)
    M = torch.eye(4).repeat(B, V, 1, 1)
    M[..., :3, :3] = axis_angle_to_matrix(rand(B, V, 3) * 2)
    M[..., :3, 3] = torch.tensor([0, 0, 0.6])
    joints = to_cameras(0.1 * (rand(B, 21, 3) - 0.5), M)
    K = torch.tensor([[300.0, 0, 27.5], [0, 300, 27.5], [0, 0, 1]]).expand(B, V, 3, 3)
    uv, yes = common.project(joints, K), torch.ones(B, dtype=torch.bool)
    return {"image": (255 * rand(B, V, 3, size, size)).byte(), "index": torch.arange(B), "K": K, "cameras": M,
            "view_ok": torch.ones(B, V, dtype=torch.bool), "joints": joints, "uv": uv, "uv_label": uv + rand(B, V, 21, 2),
            "confidence": 0.1 + 0.9 * rand(B, V, 21), "scale": torch.ones(B, V), "has": {"cameras": yes, "uv": yes, "joints": yes}}


def still(V=3, S=32, side=56):
    eye = common.crop(torch.full((1, 2), (side - 1) / 2), torch.full((1,), side / 1.76), S)
    return View(eye.expand(2, V, 3, 3), torch.zeros(2, V), torch.ones(2, V, 3))


@pytest.mark.parametrize("supervision", ["labels2d", "truth2d", "truth3d", "triangulated"])
def test_supervision_chooses_the_labels(supervision):
    batch, view = batch_of(), still()
    if supervision == "triangulated":                                   # exact labels give the truth back
        batch["uv_label"] = batch["uv"].clone()
    batch["uv_label"][0, 0, 3] = math.nan
    true = targets(batch, view, Config(**TINY, supervision=supervision))
    moved = lambda uv: 2 * (common.transform(view.A, uv) + 0.5) / 32 - 1
    if supervision == "labels2d":
        near(true.uv[1], moved(batch["uv_label"])[1], 1e-5)
        near(true.c[1], batch["confidence"][1], 1e-7)
        assert true.c[0, 0, 3] == 0 and true.uv.isfinite().all()
    else:
        near(true.uv[1], moved(batch["uv"])[1], 1e-4)
        assert (true.c == 1).all()
    assert (true.xyz is None) == (supervision in ("labels2d", "truth2d"))
    if true.xyz is not None:
        near(true.xyz, (batch["joints"] - batch["joints"][:, :, 9:10]) / 0.2, 1e-4)


def test_full_supervision_is_l1_on_known_joints_of_both_networks():
    xyz, target = torch.zeros(1, 2, 21, 3), torch.full((1, 2, 21, 3), math.nan)
    target[0, 0, 4], target[0, 1] = torch.tensor([0.3, -0.1, 0.2]), 5.0
    ok = torch.tensor([[True, False]])
    assert float(hamuco.loss_3d(xyz, target, ok)) == pytest.approx((0.3 + 0.1 + 0.2) / 3)
    terms, slopes = grads_of(Config(**TINY, supervision="truth3d"), batch_of())
    total = sum(float(terms[name]) for name in ("L_c", "L_d", "L_2D", "L_p", "L_3D"))
    assert float(terms["L_3D"]) > 0 and float(terms["loss"]) == pytest.approx(total, rel=1e-6)
    one, _ = grads_of(Config(**TINY, supervision="truth3d", variant=("single-view",)), batch_of())
    assert float(terms["L_3D"]) > 1.5 * float(one["L_3D"])                    # M and M* begin alike
    batch = batch_of() | {"scale": torch.full((2, 3), math.nan)}               # a rig without a unit says no metres
    assert targets(batch, still(), Config(**TINY, supervision="truth3d")).xyz.isnan().all()


def test_pictures_labels_and_predictions_lie_on_each_other():
    """Bright dots at key points are found where `targets` puts them, each view by its own draw; and `predict`
    gives px of the stored picture."""
    batch, cfg = batch_of(B=2, V=3, size=112), Config(**TINY | dict(image_size=64), supervision="truth2d")
    batch["image"].zero_()
    at = torch.randint(50, 62, (2, 3, 2))
    for b in range(2):
        for v in range(3):
            x, y = at[b, v].tolist()
            batch["image"][b, v, :, y - 1:y + 2, x - 1:x + 2] = 255
    batch["uv"] = at[:, :, None].float().expand(-1, -1, 21, -1).clone()
    pictures, view = hamuco.make_views(batch, cfg, 0)
    found = hamuco.to_px(targets(batch, view, cfg).uv[:, :, 0], 64)
    light = (pictures - pictures.amin((-1, -2), keepdim=True)).mean(2)
    pixel = torch.arange(64.0)
    total = light.sum((-1, -2))
    seen = torch.stack([(light.sum(-2) * pixel).sum(-1), (light.sum(-1) * pixel).sum(-1)], -1) / total[..., None]
    assert (seen - found).abs().max() < 0.5 and (found[0, 0] - found[0, 1]).norm() > 1
    peak = common.denormalise(pictures).amax((-1, -2))                                  # channels by their own factors
    assert 0.75 < float(peak.min()) < 0.99 and float((peak[:, :, 0] - peak[:, :, 1]).abs().max()) > 0.02
    model = trained_like()
    batch = batch_of()
    ok = batch["view_ok"]
    with torch.no_grad():
        crops, A = hamuco.hand_view(batch["image"], 32)
        hand = model(crops, ok, quiet(ok))[0]
        out = predict(model, batch)["single"]["uv"]
    crop_uv = common.transform(A, out.flatten(0, 1))
    near(crop_uv, hamuco.to_px(hand.uv[:, JOINTS], 32), 1e-3)


def test_3d_targets_turn_with_the_picture():
    batch, cfg = batch_of(), Config(**TINY, supervision="truth3d")
    view = hamuco.draw_view(batch["index"], 3, 56, cfg, 0)
    xyz = targets(batch, view, cfg).xyz
    linear = view.A[..., :2, :2] / view.A[..., :2, :2].det().sqrt()[..., None, None]
    rooted = (batch["joints"] - batch["joints"][:, :, 9:10]) / 0.2
    near(xyz[..., :2], rooted[..., :2] @ linear.mT, 1e-5)


# ---- A training step


def grads_of(cfg, batch, step=0, epoch=1, dtype=torch.float32):
    torch.manual_seed(0)
    model = HaMuCo(cfg).to(dtype)
    terms = train_step(model, batch, cfg, epoch, step)
    terms["loss"].backward()
    return terms, {n: p.grad for n, p in model.named_parameters()}


def test_the_step_number_alone_decides_between_the_two_consistency_losses():
    cfg, batch = Config(**TINY), batch_of()
    torch.manual_seed(0)
    model = HaMuCo(cfg)
    torch.nn.init.normal_(model.interaction.F_r[-1].weight, std=0.05)
    model.eval()
    L_c = lambda step, *variant: float(
        train_step(model, batch, dataclasses.replace(cfg, variant=variant), 1, step)["L_c"].detach())
    even, odd, again = L_c(4), L_c(5), L_c(4)
    assert even == again and abs(even - odd) > 1e-6
    assert L_c(4, "no-c2d", "no-cf") == L_c(5, "no-c2d", "no-cf") == 0           # Tab. 4: the same as #11
    assert L_c(4, "no-cf") == L_c(5, "no-cf") == even and L_c(4, "no-c2d") == L_c(5, "no-c2d") == odd


def test_warm_up_leaves_consistency_and_distillation_out():
    cfg = Config(**TINY | dict(warm_epochs=1))
    warm, full = (grads_of(cfg, batch_of(), epoch=epoch)[0] for epoch in (0, 1))
    assert float(warm["L_c"]) == float(warm["L_d"]) == 0 and float(full["L_c"]) > 0 and float(full["L_d"]) > 0


def test_the_loss_is_the_sum_that_sec_3_2_3_writes():
    terms, _ = grads_of(Config(**TINY), batch_of())
    total = sum(float(terms[name]) for name in ("L_c", "L_d", "L_2D", "L_p"))
    assert float(terms["loss"]) == pytest.approx(total, rel=1e-6) and float(terms["L_3D"]) == 0


def test_prior_weighs_pose_by_alpha_and_shape_by_alpha_gamma(g):
    class Fixed(torch.nn.Module):
        interaction = None

        def forward(self, pictures, ok, draws):
            n = int(ok.sum())
            beta, theta = torch.full((n, 10), -0.5), torch.full((n, 45), 0.3)
            return hamuco.Hand(torch.zeros(n, 799, 3), torch.zeros(n, 799, 2), theta, beta, torch.ones(n, 3), None), None

    terms = train_step(Fixed(), batch_of(), Config(**TINY, variant=("single-view",)), 0, 0)
    assert float(terms["L_p"]) == pytest.approx(0.01 * (0.3 + 100 * 0.5))
    aa, beta = g("loss/in/pose")[:, 3:], g("loss/in/shape")                     # and of the golden inputs
    assert 0.01 * float(aa.abs().mean()) == pytest.approx(float(g("loss/cf/L_prior_pose_0")), abs=1e-12)
    assert float(beta.abs().mean()) == pytest.approx(float(g("loss/cf/L_prior_shape_0")), abs=1e-12)


def test_gradients_reach_what_the_paper_trains():
    """Location features are not detached, sampled places and the interaction's shape are."""
    cfg = Config(**TINY)
    torch.manual_seed(0)
    model, ok = HaMuCo(cfg), torch.ones(2, 3, dtype=torch.bool)
    for last in (*(head[-1] for head in model.heads), model.interaction.F_r[-1]):
        torch.nn.init.normal_(last.weight, std=0.05)
    _, star = model(torch.randn(2, 3, 3, 32, 32), ok, quiet(ok))
    star.uv.sum().backward()
    pose, shape, camera = (head[-1].weight.grad for head in model.heads)
    assert pose.abs().sum() > 0 and camera.abs().sum() > 0
    model.zero_grad()
    model.interaction.G1 = None
    model.interaction.features = lambda H4, G3, uvd, six_d: torch.zeros(6, 21, model.interaction.D) + G3.mean()
    _, star = model(torch.randn(2, 3, 3, 32, 32), ok, quiet(ok))
    star.uv.sum().backward()
    assert all(head[-1].weight.grad is None or head[-1].weight.grad.abs().sum() == 0 for head in model.heads)


def two_steps(variant):
    cfg, batch = Config(**TINY, variant=variant), batch_of()
    torch.manual_seed(0)
    model = HaMuCo(cfg)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        loss = train_step(model, batch, cfg, 1, step)["loss"]
        loss.backward()
        optimizer.step()
    return float(loss.detach()), model.backbone.conv1.weight.detach().clone()


@pytest.fixture(scope="module")
def plain():
    return two_steps(())


@pytest.mark.parametrize("variant", sorted(hamuco.VARIANTS))
def test_variant_changes_the_step(plain, variant):
    changed = two_steps((variant,))
    assert abs(plain[0] - changed[0]) > 1e-7 and not torch.equal(plain[1], changed[1])


def test_bfloat16_is_for_the_network_only(monkeypatch):
    """Encoder and interaction compute in bfloat16, hands, places and losses do not."""
    sample, seen = hamuco.sample_joints, {}
    monkeypatch.setattr(hamuco, "sample_joints", lambda H, uv: (seen.update(grid=uv.dtype), sample(H, uv))[1])
    cfg = Config(**TINY, precision="bf16")
    torch.manual_seed(0)
    model = HaMuCo(cfg)
    model.backbone.register_forward_hook(lambda _, x, y: seen.update(map=y[-1].dtype))
    model.interaction.blocks[0].attention.q.register_forward_hook(lambda _, x, y: seen.update(q=y.dtype))
    terms = train_step(model, batch_of(), cfg, 1, 0)
    terms["loss"].backward()
    assert seen == {"map": torch.bfloat16, "q": torch.bfloat16, "grid": torch.float32}
    assert terms["loss"].dtype == torch.float32 and terms["loss"].isfinite()
    model.predict(batch_of())
    assert seen == {"map": torch.float32, "q": torch.float32, "grid": torch.float32}
    exact = train_step(HaMuCo(cfg), batch_of(), Config(**TINY), 1, 0)
    assert float(terms["L_2D"].detach()) == pytest.approx(float(exact["L_2D"].detach()), rel=0.05)


def test_ours_sv_has_no_cross_view_part_and_takes_single_pictures():
    cfg, batch = Config(**TINY, variant=("single-view",)), batch_of(V=1)
    many = grads_of(cfg, batch)[0]
    one = {k: v[:, 0] if isinstance(v, torch.Tensor) and k not in ("index", "cameras") else v for k, v in batch.items()
           if k not in ("view_ok", "cameras")}
    alone = grads_of(cfg, hamuco.as_views(one))[0]
    assert float(alone["loss"]) == float(many["loss"]) and float(alone["L_c"]) == 0
    assert HaMuCo(cfg).interaction is None


def test_accumulated_micro_batches_have_the_gradients_of_their_mean(monkeypatch):
    """float64: backward of each micro-batch on its own equals one backward of the mean loss."""
    monkeypatch.setattr(hamuco, "normalise", lambda x: x.double() / 255)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())
    cfg, batch = Config(**TINY), batch_of(4)
    cut = lambda s: {k: {n: x[s] for n, x in v.items()} if isinstance(v, dict) else v[s] for k, v in batch.items()}
    parts = [cut(slice(0, 2)), cut(slice(2, 4))]

    def run(backward):
        torch.manual_seed(0)
        model = HaMuCo(cfg).double()
        backward([lambda part=part: train_step(model, part, cfg, 1, 0)["loss"] for part in parts])
        return {n: p.grad for n, p in model.named_parameters()}

    split = run(lambda losses: [(loss() / 2).backward() for loss in losses])
    whole = run(lambda losses: (sum(loss() for loss in losses) / 2).backward())
    largest = max(float(x.abs().max()) for x in whole.values())
    for name, gradient in whole.items():
        assert float((gradient - split[name]).abs().max()) < 1e-10 * max(largest, 1)


def gradients_of_a_step():
    """Gradients of four micro-batches in float64, one view missing, shared out to the processes."""
    torch.set_default_dtype(torch.float64)
    device = common.start("cpu")
    cfg = hamuco.Config(**TINY | dict(batch_size=8, micro_batch=2))
    torch.manual_seed(0)
    model = hamuco.HaMuCo(cfg)
    net = common.parallel(model, device, False)
    batch = batch_of(8)
    batch["view_ok"][2, 1] = False
    cut = lambda s: {k: {n: x[s] for n, x in v.items()} if isinstance(v, dict) else v[s] for k, v in batch.items()}
    mine = common.share(8, 2)
    for m in mine:
        with common.accumulate(net, last=m == mine[-1]):
            loss = hamuco.train_step(net, cut(slice(2 * m, 2 * m + 2)), cfg, 1, 0)["loss"]
            (loss / len(mine)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_gradients_agree_on_one_and_two_processes(tmp_path):
    found = {count: on_processes(tmp_path, count, gradients_of_a_step)[0] for count in (1, 2)}
    largest = max(float(x.abs().max()) for x in found[1].values())
    for name, gradient in found[1].items():
        scale = max(float(gradient.abs().max()), 1e-6 * largest)
        assert float((gradient - found[2][name]).abs().max()) < 1e-10 * scale, name


# ---- Any number of views


def trained_like(V=3, **more):
    """A network whose outputs depend on its input, BatchNorm with statistics."""
    torch.manual_seed(0)
    model = HaMuCo(Config(**TINY | more))
    for head in model.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    if model.interaction is not None:
        torch.nn.init.normal_(model.interaction.F_r[-1].weight, std=0.1)
    return model.eval()


@torch.no_grad()
def predict(model, batch):
    return model.predict({key: batch[key] for key in model.USES})


def close(a, b, tolerance=1e-5):
    for name in a:
        for key in a[name]:
            assert torch.allclose(a[name][key], b[name][key], atol=tolerance * (100 if key == "uv" else 1),
                                  equal_nan=True), (name, key)


@pytest.mark.parametrize("V", [1, 2, 5, 8])
def test_one_model_takes_any_number_of_views(V):
    out = predict(trained_like(), batch_of(V=V))
    assert set(out) == {"single", "interaction", "fusion"}
    for hand in out.values():
        assert hand["joints"].shape == (2, V, 21, 3) and hand["verts"].shape == (2, V, 778, 3)
        assert hand["uv"].shape == (2, V, 21, 2) and hand["joints"].isfinite().all()
    assert out["single"]["pose"].shape == (2, V, 16, 3, 3) and out["interaction"]["shape"].shape == (2, V, 10)
    if V == 1:
        near(out["fusion"]["joints"], out["interaction"]["joints"], 1e-6)
        near(out["fusion"]["uv"], out["interaction"]["uv"], 1e-3)


@pytest.mark.parametrize("calibration", ["known", "none"])
def test_permuted_views_give_permuted_hands(calibration):
    model, batch, order = trained_like(calibration=calibration), batch_of(V=4), [2, 0, 3, 1]
    shuffled = {k: v[:, order] if k in model.USES else v for k, v in batch.items()}
    a, b = predict(model, batch), predict(model, shuffled)
    close({n: {k: x[:, order] for k, x in h.items()} for n, h in a.items()}, b)


def test_copies_of_a_view_say_what_the_view_says():
    model, batch = trained_like(), batch_of(V=1)
    copies = {k: v.repeat(1, 5, *[1] * (v.dim() - 2)) if k in model.USES else v for k, v in batch.items()}
    a, b = predict(model, batch), predict(model, copies)
    close({n: {k: x.expand_as(b[n][k]) for k, x in h.items()} for n, h in a.items()}, b)


def test_a_missing_view_has_no_influence():
    model, batch = trained_like(), batch_of(V=4)
    batch["view_ok"][0, 1], batch["view_ok"][1, 2:] = False, False
    batch["cameras"][0, 1] = math.nan
    a = predict(model, batch)
    batch["image"][~batch["view_ok"]] = 255 - batch["image"][~batch["view_ok"]]
    close(a, predict(model, batch), 0)
    assert a["fusion"]["joints"].isnan()[~batch["view_ok"]].all()
    assert a["fusion"]["joints"].isfinite()[batch["view_ok"]].all()
    two = {k: v[1:, :2] if k in model.USES else v for k, v in batch.items()}       # as if it had never been
    close({n: {k: x[1:, :2] for k, x in h.items()} for n, h in a.items()}, predict(model, two))


def test_a_missing_view_has_no_influence_on_training():
    cfg, batch = Config(**TINY), batch_of()
    batch["view_ok"][0, 1] = False
    for key in ("uv_label", "uv", "joints", "cameras", "K"):
        batch[key] = torch.where(batch["view_ok"].view(2, 3, *[1] * (batch[key].dim() - 2)), batch[key], math.nan)
    a = grads_of(cfg, batch)
    batch["image"][0, 1] = 255 - batch["image"][0, 1]
    b = grads_of(cfg, batch)
    assert float(a[0]["loss"]) == float(b[0]["loss"]) and math.isfinite(float(a[0]["loss"]))
    assert all(torch.equal(x, b[1][n]) and x.isfinite().all() for n, x in a[1].items())


def test_views_share_information():
    """The interaction of view 0 heeds view 1's picture; its single-view hand does not."""
    model, batch = trained_like(), batch_of()
    a = predict(model, batch)
    batch["image"][:, 1] = 255 - batch["image"][:, 1]
    b = predict(model, batch)
    near(a["single"]["joints"][:, 0], b["single"]["joints"][:, 0], 1e-7)
    for name in ("interaction", "fusion"):
        assert float((a[name]["joints"][:, 0] - b[name]["joints"][:, 0]).abs().max()) > 1e-5
    for variant, quiet_branch in (("no-vsf", "graph"), ("no-cva", "attention")):
        assert getattr(trained_like(variant=(variant,)).interaction.blocks[0], quiet_branch) is None


def test_fusion_is_the_mean_of_rotated_hands():
    """Oracle in a loop, from the interaction's hands and the calibration."""
    model, batch = trained_like(), batch_of()
    out = predict(model, batch)
    x = torch.cat([out["interaction"]["verts"], out["interaction"]["joints"]], 2).double()
    R = batch["cameras"][..., :3, :3].double()
    for b, i in itertools.product(range(2), range(3)):
        total = 0
        for j in range(3):
            turn, c_j, c_i = R[b, i] @ R[b, j].T, x[b, j] - x[b, j].mean(0), x[b, i] - x[b, i].mean(0)
            s = (c_i * (c_j @ turn.T)).sum() / c_j.square().sum()
            total = total + s * c_j @ turn.T + x[b, i].mean(0)
        near(out["fusion"]["joints"][b, i].double(), (total / 3)[778:], 1e-6)


def test_random_masks_keep_the_own_view_and_hide_others():
    cfg, ok = Config(**TINY | dict(mask_epochs=1)), torch.ones(400, 5, dtype=torch.bool)
    ok[:100, 3] = False
    draws = draw_masks(torch.arange(400), ok, 8, cfg, cfg.epochs)
    assert draws.see.diagonal(dim1=-2, dim2=-1).all() and draws.shared.any(-1).all()
    assert not draws.see[:, :100, :3, 3].any() and not draws.shared[:, :100, 3].any()
    few = draws.see[:, 100:].sum(-1)                       # one number of views a call, 1 .. 5 evenly
    assert (few == few[..., :1]).all()
    assert all(90 < int((few[0, :, 0] == k).sum()) * 2 < 160 for k in range(1, 6))
    assert set(draws.shared[0, 100:].sum(-1).tolist()) == {1, 2, 3, 4, 5}
    assert not torch.equal(draws.see[0], draws.see[1])
    plain = draw_masks(torch.arange(400), ok, 8, cfg, cfg.epochs - 1)
    assert torch.equal(plain.see, quiet(ok).see) and torch.equal(plain.shared, quiet(ok).shared)
    assert 0.895 < float(plain.keep.float().mean()) < 0.905
    part = draw_masks(torch.arange(7, 9), ok[7:9], 8, cfg, cfg.epochs)
    assert torch.equal(part.keep, draws.keep[:, 7:9]) and torch.equal(part.see, draws.see[:, 7:9])


def test_dropout_scales_what_it_keeps():
    graph, x = Graph(4, 4), torch.randn(2, 21, 4)
    keep = torch.rand(2, 21, 4) > 0.5
    graph.second.fc.weight.data, graph.second.fc.bias.data = torch.eye(4), torch.zeros(4)
    hidden = torch.nn.functional.leaky_relu(graph.first(graph.norm(x)), 0.1)
    expected = torch.nn.functional.leaky_relu(hidden * keep / 0.9 / (1 + 1e-5), 0.1)
    near(graph(x, keep), expected, 1e-6)


def test_an_unseen_view_does_not_enter_attention_or_maximum():
    block = hamuco.Block(8, ())
    G = torch.randn(1, 3, 21, 8)
    ok = torch.tensor([[True, True, False]])
    draws = quiet(ok)
    changed = G.clone()
    changed[:, 2] += 1
    a, b = (block(x, draws.see[0], draws.shared[0], None) for x in (G, changed))
    near(a[:, :2], b[:, :2], 1e-7)
    assert float((a[:, 2] - b[:, 2]).abs().max()) > 0.1
    assert isinstance(draws, Draws) and draws.keep is None


# ---- Triangulation


def test_triangulation_matches_golden(g):
    P, uv, conf = g("tri/P")[None].expand(21, 8, 3, 4), g("tri/uv_noisy").transpose(0, 1), g("tri/conf_VJ").T
    near(projections(g("tri/K"), g("tri/M_w2c")), g("tri/P"), 1e-12)
    near(triangulate(g("tri/uv_exact").transpose(0, 1), P), g("tri/dlt_np_exact"))
    near(triangulate(uv, P), g("tri/dlt_np_noisy"))
    near(triangulate(uv, P, conf), g("tri/dlt_torch_conf"))
    near(triangulate(uv[:, [0, 2]], P[:, [0, 2]]), g("tri/dlt_np_views02"))
    half = (reproject(triangulate(uv, P), P) - uv).norm(dim=-1) / 2
    near(half, g("tri/reproj_half_err_JV_at_dlt"), 1e-8)
    u, c = uv[0].clone().requires_grad_(), conf[0].clone().requires_grad_()
    (triangulate(u, P[0], c) @ g("tri/grad_w")).backward()
    near(u.grad, g("tri/grad_uv_joint0"))
    near(c.grad, g("tri/grad_conf_joint0"))


def test_ransac_and_refinement_follow_their_text(g):
    """Oracle: a loop over joints and given pairs; then SciPy's Huber, as the sheet describes them."""
    from scipy.optimize import least_squares
    P, uv = g("tri/P"), g("tri/uv_noisy")
    pairs = torch.tensor(list(itertools.combinations(range(8), 2)))[torch.randperm(28)[:10]]
    by_joint, all_P, ok = uv.transpose(0, 1), P[None].expand(21, 8, 3, 4), torch.ones(21, 8, dtype=torch.bool)
    X, inliers = ransac(by_joint, all_P, ok, pairs)
    refined = refine(X, by_joint, all_P, inliers)

    def dlt(views, j):
        rows = [r for v in views for r in (uv[v, j, 0] * P[v, 2] - P[v, 0], uv[v, j, 1] * P[v, 2] - P[v, 1])]
        x = np.linalg.svd(torch.stack(rows).numpy())[2][-1]
        return x[:3] / x[3]

    def half(x, views, j):
        y = [P[v].numpy() @ np.append(x, 1) for v in views]
        return np.array([np.linalg.norm(a[:2] / a[2] - uv[v, j].numpy()) / 2 for a, v in zip(y, views)])

    for j in range(21):
        best = set()
        for a, b in pairs.tolist():
            agree = {v for v, d in enumerate(half(dlt((a, b), j), range(8), j)) if d < 15} | {a, b}
            best = agree if len(agree) > len(best) else best
        views = sorted(best)
        assert inliers[j].nonzero()[:, 0].tolist() == views
        near(X[j], torch.tensor(dlt(views, j)), 1e-9)
        found = least_squares(half, dlt(views, j), args=(views, j), loss="huber", xtol=1e-14, ftol=1e-14, gtol=1e-14)
        huber = lambda x: float(np.where((d := half(x, views, j)) <= 1, d * d, 2 * d - 1).sum())
        assert huber(refined[j].numpy()) <= huber(found.x) * (1 + 1e-6) + 1e-12
        assert np.abs(refined[j].numpy() - found.x).max() < 2e-4
    mm = lambda X: 1000 * float((X - g("tri/X_true")).norm(dim=-1).mean())
    every = ransac(by_joint, all_P, ok)
    assert mm(refine(every[0], by_joint, all_P, every[1])) < 5 < 30 < mm(triangulate(by_joint, all_P))


def test_refinement_is_done_with_points_that_stand_still(g, monkeypatch):
    """All 60 solves of 21 points, or those that still move: the same points, and the host asks once in ten solves."""
    P, uv = g("tri/P")[None].expand(21, 8, 3, 4), g("tri/uv_noisy").transpose(0, 1)
    X, inliers = ransac(uv, P, torch.ones(21, 8, dtype=torch.bool))
    X[5], solve = math.nan, torch.linalg.solve_ex
    whole = refine(X, uv, P, inliers, still=-1)
    solved, asked = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            asked.extend([name] * (name in ("nonzero", "_local_scalar_dense", "masked_select", "equal")))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.linalg, "solve_ex", lambda A, b: (solved.append(len(A)), solve(A, b))[1])
    with Watch():
        found = refine(X, uv, P, inliers)
    assert found[5].isnan().all() and float((found - whole).norm(dim=-1).nan_to_num().max()) < 1e-6
    assert solved[:10] == [21] * 10 and solved == sorted(solved, reverse=True) and sum(solved) < 0.6 * 21 * 60
    assert set(asked) == {"nonzero"} and len(asked) <= 4


def test_refinement_reaches_the_minimum_also_where_labels_stand_near_delta():
    """400 points before four cameras, 3 px of noise, a label in 28 astray: 3,000 solves with weights alone end in the same."""
    draw = torch.Generator().manual_seed(0)
    turns = axis_angle_to_matrix(torch.tensor([[0, 0.6 * v, 0] for v in range(4)]))
    K = torch.tensor([[500.0, 0, 128], [0, 500, 128], [0, 0, 1]])
    P = (K @ torch.cat([turns, torch.tensor([0, 0, 0.6]).expand(4, 3)[..., None]], 2)).expand(400, 4, 3, 4)
    X = 0.08 * torch.randn(400, 3, generator=draw)
    uv = reproject(X, P) + 3 * torch.randn(400, 4, 2, generator=draw)
    uv[::7, 1] += 60
    first, ok = triangulate(uv, P), torch.ones(400, 4, dtype=torch.bool)
    found = refine(first, uv, P, ok, steps=40)
    assert float((found - refine(first, uv, P, ok, steps=1000)).norm(dim=-1).max()) < 1e-7
    X = found.clone().requires_grad_()
    d = (reproject(X, P.double()) - uv).norm(dim=-1)
    torch.where(d <= 2, d * d, 4 * d - 4).sum().backward()                       # Huber at 2 px: its slope is 0 there
    assert float(X.grad.norm(dim=-1).max()) < 1e-2                               # px^2 a metre; a micrometre off it is 1


def test_a_moment_with_one_view_is_scored_like_any_other():
    """Its triangulated hands are NaN; the rest of the batch, and the network's hands, are not."""
    model, batch = trained_like(), batch_of(B=3, V=3)
    batch["view_ok"][0, 1:] = False
    batch["cameras"][0, 1:], batch["K"] = math.nan, batch["K"].clone()
    with torch.no_grad():
        rows = hamuco.label_rows(batch, 32) | hamuco.model_rows({"hamuco": model}, batch)
    assert {"dlt", "ransac", "ransac_huber", "fusion", "fusion_center", "fusion_ransac"} <= set(rows)
    for name in ("dlt", "ransac", "ransac_huber", "fusion_center", "fusion_ransac"):
        assert rows[name]["joints"][0].isnan().all() and rows[name]["joints"][1:].isfinite().all(), name
    assert rows["fusion"]["joints"][0, 0].isfinite().all()
    batch |= {"joints_ok": torch.ones(3, 3, 21, dtype=torch.bool), "crop": torch.eye(3).expand(3, 3, 3, 3)}
    pictures = as_pictures(batch | {"index": torch.arange(3), "side": ["right"] * 3})
    refined = outputs(rows, "")["ransac_huber"]
    scores = score(refined, only_made(refined, pictures))["mpjpe_mm"].view(3, 3)
    assert scores[0].isnan().all() and scores[1:].isfinite().all()


def test_limits_shrink_with_the_crop(monkeypatch):
    """30 and 2 px of a 256 px crop, of which a network with smaller crops gets its share."""
    seen = []
    monkeypatch.setattr(hamuco, "ransac", lambda uv, P, ok, limit: (seen.append(limit), ransac(uv, P, ok, limit=limit))[1])
    monkeypatch.setattr(hamuco, "refine", lambda *args, delta, **more: (seen.append(delta), refine(*args, delta=delta, **more))[1])
    batch = batch_of()
    P = projections(batch["K"], batch["cameras"])
    for size, expected in ((256, [30, 2]), (64, [7.5, 0.5])):
        seen.clear()
        hamuco.triangulate_robustly(batch["uv"], P, batch["view_ok"], size)
        assert seen == expected


def test_triangulation_needs_two_views():
    P, uv = torch.randn(3, 3, 4, dtype=EXACT), torch.randn(2, 3, 2, dtype=EXACT)
    weight = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    X = triangulate(uv, P.expand(2, 3, 3, 4), weight)
    assert X[0].isnan().all() and X[1].isfinite().all()
    uv[1, 1] = math.nan
    assert triangulate(uv, P.expand(2, 3, 3, 4), weight)[1].isnan().all()
    X, inliers = ransac(uv, P.expand(2, 3, 3, 4), weight > 0)
    assert X.isnan().all() and not inliers.any()
    assert ransac(uv[:, :1], P[:1].expand(2, 1, 3, 4), weight[:, :1] > 0)[0].isnan().all()


def test_a_missing_or_wild_view_does_not_move_ransac(g):
    P, uv = g("tri/P")[None].expand(21, 8, 3, 4), g("tri/uv_exact").transpose(0, 1).clone()
    ok = torch.ones(21, 8, dtype=torch.bool)
    ok[:, 5], uv[:, 5] = False, math.nan
    uv[:, 2] += 300
    X, inliers = ransac(uv, P, ok)
    near(X, g("tri/X_true"), 1e-6)
    assert not inliers[:, [2, 5]].any()


def test_opt_center_finds_where_a_rigid_hand_stands():
    batch = batch_of(V=4)
    P = projections(batch["K"], batch["cameras"])
    world = (batch["joints"][:, 0] - batch["cameras"][:, 0, None, :3, 3]).double() @ batch["cameras"][:, 0, :3, :3].double()
    shape = world - world[:, 9:10]
    uv = batch["uv"].clone()
    near(opt_center(shape, uv, P, batch["view_ok"]), world[:, 9], 1e-6)
    uv[:, 1] += 12 * torch.rand(2, 21, 2)                                              # one bad view of four
    off = (opt_center(shape, uv, P, batch["view_ok"]) - world[:, 9]).norm(dim=-1)
    every = batch["view_ok"][..., None].expand(-1, -1, 21).flatten(1)
    squares = refine(world[:, 9], uv.flatten(1, 2), P[:, :, None].expand(-1, -1, 21, -1, -1).flatten(1, 2), every,
                     shape[:, None].expand(-1, 4, -1, -1).flatten(1, 2), 1e9)
    assert (1.5 * off < (squares - world[:, 9]).norm(dim=-1)).all()
    missing = batch["view_ok"].clone()
    missing[:, 1] = False
    near(opt_center(shape, uv, P, missing), world[:, 9], 1e-6)


def test_placed_hands_are_in_camera_frames():
    batch = batch_of(V=4)
    rooted = (batch["joints"] - batch["joints"][:, :, 9:10])
    pred = {name: {"joints": rooted, "uv": batch["uv"]} for name in ("single", "interaction", "fusion")}
    for name, hand in hamuco.place_fused(pred, batch, 32).items():
        near(hand["joints"].float(), batch["joints"], 1e-5), name
        near(hand["root"].float(), batch["joints"][:, :, 0], 1e-5)
        near(hand["uv"].float(), batch["uv"], 1e-2)


# ---- Labels


def test_label_noise_is_that_of_a_detector_on_the_network_s_crop():
    """About 23 px on a 256 px crop of 1.25 x the box, however wide the stored square is."""
    data = Synthetic(113, 64, part="train", views=2, margin=2.2, calm=True, detector=1.25 / 2.2)
    batch = data.batch(torch.arange(64))
    error = (batch["uv_label"] - batch["uv"]).norm(dim=-1) * 256 / 64
    assert 18 < float(error.mean()) < 28
    off = (batch["uv_label"] - 56).abs()
    assert float((off > 45).float().mean()) < 0.02                       # lost joints stay in the crop


# ---- Rate and command line


def test_rate_falls_as_a_cosine_and_again_for_masks():
    cfg = Config(mano="builtin", mask_epochs=4)
    assert lr_at(0, cfg, 10) == 3e-4 and lr_at(200, cfg, 10) == pytest.approx(1.5e-4)
    assert lr_at(399, cfg, 10) < 1e-8 and lr_at(400, cfg, 10) == pytest.approx(3e-5)
    assert lr_at(420, cfg, 10) == pytest.approx(1.5e-5)


def test_hamuco_s_paper_values_are_those_of_section_4_2():
    """Typed from the page: ResNet-50, 256 px, 10 + 30 epochs, 8 time steps of 8 cameras, rate 3e-4."""
    notes = {f.name: f.metadata for f in dataclasses.fields(Config)}
    paper = {name: note["paper"] for name, note in notes.items() if note["paper"] is not common.SILENT}
    assert paper == {"backbone": "resnet50", "image_size": 256, "epochs": 40, "warm_epochs": 10, "batch_size": 8,
                     "lr": 3e-4, "views": 8, "calibration": "known", "supervision": "labels2d", "rounds": 1}
    for field in dataclasses.fields(Config):
        assert field.metadata["help"], field.name
        if field.name in paper:
            assert field.metadata["ref"] and field.default == paper[field.name], field.name


@pytest.mark.parametrize("words, said", [
    (["--finetune", "synthetic"], "HaMuCo has one stage"),
    (["--label-fraction", "0.5"], "--data-fraction takes a part"),
    (["--supervision", "triangulated", "--calibration", "none"], "needs --calibration known"),
    (["--views", "0"], "--views 0: must be at least 1"),
    (["--data-fraction", "0"], "--data-fraction 0.0: must be above 0 and at most 1"),
    (["--rounds", "0"], "--rounds 0: must be at least 1"),
    (["--variant", "single-view", "--warm-epochs", "3"], "--warm-epochs: does nothing beside --variant single-view"),
    (["--variant", "no-c", "no-cf"], "--variant no-cf: does nothing beside --variant no-c"),
    (["--variant", "no-dcvi", "--mask-epochs", "3"], "--mask-epochs: does nothing beside --variant no-dcvi"),
    (["--rounds", "2", "--supervision", "truth3d"], "later rounds replace noisy labels"),
    (["--data", "synthetic", "assembly101=a"], "--data synthetic assembly101=a: are scored on other splits"),
    (["--variant", "no-g1", "no-g2", "no-g3", "--samples", "16", "--image-size", "32"], "without an input")])
def test_bad_options_give_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert common.guarded(lambda: hamuco.main(["--device", "cpu", "--data", "synthetic:calm", "--views", "2",
                                               "--backbone", "resnet10", *words])) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("spec, split", [("assembly101=a", "val"), ("hanco=a", "test")])
def test_the_split_that_is_scored_is_one_that_the_data_set_has(tmp_path, monkeypatch, capsys, spec, split):
    asked = []
    monkeypatch.setattr(hamuco, "load_checkpoint", lambda file: {"cfg": {}, "model": {}})
    monkeypatch.setattr(hamuco, "build", lambda cfg: torch.nn.Module())
    monkeypatch.setattr(hamuco, "open_rig", lambda cfg, split, device, most: asked.append(split) or [])
    hamuco.report(Config(data=(spec,)), tmp_path, "hamuco", torch.device("cpu"))
    assert asked == [split] and f"{spec} has no {split} split" in capsys.readouterr().out


SMALL = ["--data", "synthetic:calm", "--samples", "16", "--backbone", "resnet10", "--image-size", "32", "--views", "2",
         "--batch-size", "8", "--micro-batch", "4", "--epochs", "2", "--warm-epochs", "1", "--workers", "0",
         "--device", "cpu"]


def run(folder, *words):
    hamuco.main([*SMALL, "--cache", str(folder.parent / "cache"), "--out", str(folder), *words])
    return torch.load(folder / "finetune.pt", weights_only=True)


@pytest.fixture()
def few_tests(monkeypatch):
    monkeypatch.setitem(LENGTH, "test", 16)


def test_cli_smoke_then_resume_equals_straight_run(tmp_path, few_tests, monkeypatch):
    straight = run(tmp_path / "a")
    save, saves = hamuco.Run.save, []

    def stop_after_one(self):
        save(self)
        saves.append(self.step)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(hamuco.Run, "save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    again = run(tmp_path / "b", "--resume")
    assert saves == [2, 4] and all(torch.equal(x, again["model"][k]) for k, x in straight["model"].items())
    results = json.loads((tmp_path / "a" / "metrics.json").read_text())["results"]
    assert {"mean_pose", "labels", "dlt", "ransac", "single", "interaction", "fusion", "fusion_center",
            "fusion_ransac"} <= set(results[0]["rows"]) and results[0]["n"] == 32
    for name in ("backbone.pt", "predictions.png", "pck_2d.png", "train-hamuco/views.png", "train-hamuco/final.pt"):
        assert (tmp_path / "a" / name).stat().st_size > 500
    model = hamuco.build(hamuco.stored_config(Config, straight["cfg"]))
    model.load_state_dict(straight["model"])
    assert straight["method"] == "hamuco" and straight["row"] == "hamuco"


def test_rounds_learn_from_the_round_before(tmp_path, few_tests, monkeypatch):
    step, seen = hamuco.train_step, []
    monkeypatch.setattr(hamuco, "train_step", lambda net, batch, *rest: (seen.append(batch), step(net, batch, *rest))[1])
    run(tmp_path / "a", "--rounds", "2", "--epochs", "1")
    labels = torch.load(tmp_path / "a" / "train-hamuco" / "labels.pt", weights_only=True)["uv"]
    assert labels.shape == (16, 2, 21, 2) and labels.isfinite().all() and len(seen) == 8
    for batch in seen[4:]:
        assert torch.equal(batch["uv_label"], labels[batch["index"]]) and (batch["confidence"] == 1).all()
    assert not torch.equal(seen[0]["uv_label"], labels[seen[0]["index"]])
    first, second = (torch.load(tmp_path / "a" / name / "last.pt", weights_only=True)["model"]
                     for name in ("train-hamuco", "train-hamuco-2"))
    assert any(not torch.equal(x, second[k]) for k, x in first.items())


@pytest.mark.parametrize("views", ["1", "2"])
def test_rounds_heed_which_sample_a_repeated_one_is(tmp_path, few_tests, monkeypatch, views):
    """Five moments in batches of eight: three come twice, and single pictures have labels of their own too."""
    step, seen = hamuco.train_step, []
    monkeypatch.setattr(hamuco, "train_step", lambda net, batch, *rest: (seen.append(batch), step(net, batch, *rest))[1])
    run(tmp_path / "a", "--rounds", "2", "--epochs", "1", "--samples", "5", "--views", views)
    labels = torch.load(tmp_path / "a" / "train-hamuco" / "labels.pt", weights_only=True)["uv"]
    assert len(labels) == 5
    for batch in seen[2:]:
        assert torch.equal(batch["uv_label"], labels[batch["index"] % 5])


def test_data_without_2d_labels_is_refused_not_taught_the_truth(tmp_path):
    """Self-supervision on a data set that has true key points only would be supervision."""
    picture = Image.new("RGB", (64, 64))
    picture.save(tmp_path / "a.jpg")
    uv = [[20 + j, 30] for j in range(21)]
    (tmp_path / "labels.jsonl").write_text(json.dumps({"path": "a.jpg", "uv": uv}))
    cfg = Config(**TINY | dict(views=1), data=(f"folder={tmp_path}",), cache=str(tmp_path / "c"), workers=0)
    with pytest.raises(UserError, match="has no 2D labels"):
        hamuco.fit(cfg, tmp_path, "hamuco", torch.device("cpu"))
    with pytest.raises(UserError, match="needs data with several calibrated cameras"):
        hamuco.check_labels(Hands(Index("x", "x", {"paths": np.zeros(1, "S"), "uv_label": np.zeros((1, 21, 2))}), 32, 2.0),
                            dataclasses.replace(cfg, supervision="triangulated"))


def test_a_part_of_the_data_and_random_masks_train(tmp_path, few_tests, capsys):
    content = run(tmp_path / "a", "--data-fraction", "0.5", "--mask-epochs", "1", "--variant", "no-d")
    assert "8 moments used" in capsys.readouterr().out and content["epoch"] == 3 and content["row"] == "hamuco-no-d"


def test_a_rig_without_truth_prints_scale_free_numbers_only(tmp_path):
    rig_tree(tmp_path / "rig")
    hamuco.main([*SMALL, "--data", "cameras", "--root", str(tmp_path / "rig"), "--batch-size", "4", "--epochs", "1",
                 "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "a")])
    rows = json.loads((tmp_path / "a" / "metrics.json").read_text())["results"][0]["rows"]
    assert set(rows["fusion"]) == {"label_px_crop", "bone_spread_percent"} and set(rows["mean_pose"]) == {"label_px_crop"}
    assert "fusion_ransac" in rows and "fusion_center" not in rows            # no size, no place
    assert rows["dlt"]["label_px_crop"] < 0.1                                  # exact labels, exactly met


def test_quick_begins_with_single_views_and_goes_on_from_their_backbone(tmp_path, few_tests):
    content = run(tmp_path / "a", "--quick", "--image-size", "32", "--warm-epochs", "0")
    config = json.loads((tmp_path / "a" / "train-hamuco" / "config.json").read_text())["cfg"]
    assert config["init"].endswith("train-single_view/final.pt") and content["row"] == "hamuco"
    first = torch.load(tmp_path / "a" / "train-single_view" / "final.pt", weights_only=True)
    assert first["cfg"]["init"] == "random" and not any(k.startswith("interaction") for k in first["model"])
    results = json.loads((tmp_path / "a" / "metrics.json").read_text())["results"]
    assert {"single", "interaction", "fusion"} <= set(results[0]["rows"]) and "single_view" not in results[0]["rows"]
    assert {"labels", "single", "interaction", "fusion"} == set(results[1]["rows"])
    assert [(r["protocol"], r["split"]) for r in results] == [("ours", "test"), ("training_2d", "train")]
    assert results[1]["n"] == 32 and results[1]["left_out"] == 0 and results[0]["n"] == 32
    assert "mpjpe_mm" not in results[0]["rows"]["labels"] and "epe_2d_px_crop" in results[0]["rows"]["labels"]


def test_ours_sv_learns_from_a_detector_s_labels_of_freihand(tmp_path, few_tests, monkeypatch):
    """Tab. 2: single pictures, 2D labels in training/labels; without them it is refused."""
    from test_peclr import freihand_tree
    monkeypatch.chdir(tmp_path)
    root = freihand_tree(tmp_path / "data" / "freihand", training=4, evaluation=2)
    words = ["--data", "freihand:gs", "--variant", "single-view", "--backbone", "resnet10", "--image-size", "32", "--batch-size",
             "4", "--micro-batch", "4", "--epochs", "1", "--workers", "0", "--device", "cpu", "--cache", "c"]
    with pytest.raises(UserError, match="has no 2D labels"):
        hamuco.main([*words, "--out", "a"])
    (root / "training" / "labels").mkdir()
    for i in range(3):                                                   # the fourth hand was not found
        content = [[[100 + j, 90 + i] for j in range(21)], [[0.5]] * 21]
        (root / "training" / "labels" / f"{i:08d}.json").write_text(json.dumps(content))
    columns = index_freihand(root, "train", "gs").columns
    assert columns["uv_label"][1, 20].tolist() == [120, 91] and columns["confidence"][:, 0].tolist() == [0.5, 0.5, 0.5, 0]
    assert np.isnan(columns["uv_label"][3]).all()
    hamuco.main([*words, "--out", "b"])
    rows = json.loads((tmp_path / "b" / "metrics.json").read_text())["results"][0]["rows"]
    assert "pa_mpjpe_mm" in rows["single_view"]
    assert "labels" not in rows                     # the evaluation part has none: its truth is not scored as if it had
