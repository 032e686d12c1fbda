"""MANO: rotations, and the model against other people's numbers.

golden/mano.npz holds what smplx 0.1.28, the original chumpy code and manopth make of the synthetic
hand in conftest's `official_file` for six hands: at rest, shape only, no shape, a wrist
turned by almost pi, rotations near zero, and an extreme one; `verts` are every tenth vertex.
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from common import (
    MANO_TO_OURS, TIPS, Mano, UserError, axis_angle_to_matrix, mano_numpy,
    matrix_to_axis_angle, matrix_to_six_d, mirror_pose, six_d_to_matrix)

GOLDEN = Path(__file__).parent / "golden"
EVERY = slice(None, None, 10)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "mano.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def mano(params):
    return Mano(params, dtype=torch.float64)


def t64(array):
    return torch.tensor(np.asarray(array, np.float64))


def matrices(pose):
    """(B, 48) rad -> (B, 16, 3, 3) by the matrix exponential of the cross-product matrix."""
    v = t64(pose).view(-1, 16, 3)
    K = torch.zeros(*v.shape, 3, dtype=torch.float64)
    K[..., 2, 1], K[..., 0, 2], K[..., 1, 0] = v.unbind(-1)
    return torch.linalg.matrix_exp(K - K.mT)


def normal(*size, seed=3):
    """Standard normal numbers in float64, the same in every run."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=draw, dtype=torch.float64)


# ---- Rotations ----


def test_axis_angle_to_matrix_equals_the_matrix_exponential():
    v = normal(200, 48)
    v *= torch.logspace(-9, 0.3, 200, dtype=torch.float64)[:, None]
    v[0] = 0
    error = axis_angle_to_matrix(v.view(200, 16, 3)) - matrices(v)
    assert error.abs().max() < 5e-15
    quarter = axis_angle_to_matrix(torch.tensor([0, 0, np.pi / 2], dtype=torch.float64))
    assert torch.allclose(quarter, t64([[0, -1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-15)


def test_axis_angle_derivatives_are_right_at_and_near_zero():
    for length in (0.0, 1e-8, 1e-4, 0.00999, 0.01001, 1.0, 3.14):
        v = (t64([[0.6, -0.64, 0.48]]) * length).requires_grad_()
        assert torch.autograd.gradcheck(axis_angle_to_matrix, v)
        assert torch.autograd.gradgradcheck(axis_angle_to_matrix, v)
    corner = lambda v: axis_angle_to_matrix(v)[0, 0]         # 1 - (y^2 + z^2) / 2 near 0
    hessian = torch.autograd.functional.hessian(corner, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(hessian, torch.diag(t64([0, -1, -1])))
    minus = torch.full((3,), -1e-8).requires_grad_()                     # NaN with a "+ 1e-8" angle
    axis_angle_to_matrix(minus).sum().backward()
    assert minus.grad.isfinite().all()


def test_axis_angle_float32_gradients_are_accurate_at_every_angle():
    v = normal(4000, 3).float()
    v = v / v.norm(dim=1, keepdim=True) * torch.logspace(-6, 0.49, 4000)[:, None]
    jacobian = lambda u: torch.func.vmap(torch.func.jacrev(axis_angle_to_matrix))(u)
    assert (jacobian(v).double() - jacobian(v.double())).abs().max() < 5e-7
    corner = lambda u: axis_angle_to_matrix(u)[0, 1]
    for length in (1e-6, 1e-4, 5e-3):
        u = torch.tensor([0.6, -0.64, 0.48]) * length
        single, double = (torch.autograd.functional.hessian(corner, x) for x in (u, u.double()))
        assert (single.double() - double).abs().max() < 1e-6


def test_half_precision_rotations_are_made_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(axis_angle_to_matrix(torch.zeros(3, dtype=dtype)), torch.eye(3))
        flat = torch.tensor([1, 0, 0, 1, 0, 0], dtype=dtype)
        assert torch.equal(six_d_to_matrix(flat), torch.eye(3))


def test_matrix_to_axis_angle_inverts_up_to_pi(golden):
    v = normal(500, 3)
    v = v / v.norm(dim=1, keepdim=True) * torch.linspace(0, np.pi - 1e-6, 500)[:, None].double()
    assert (matrix_to_axis_angle(matrices(v.repeat(1, 16))[:, 0]) - v).abs().max() < 1e-9
    tiny = v[1:] / v[1:].norm(dim=1, keepdim=True) * torch.logspace(-12, -1, 499).double()[:, None]
    assert ((matrix_to_axis_angle(axis_angle_to_matrix(tiny)) - tiny).abs().max(1)[0]
            < 3e-16 + 1e-15 * tiny.norm(dim=1)).all()
    got, want = matrix_to_axis_angle(t64(golden["rot/Rm"])), t64(golden["rot/tgm_rotmat_to_aa"])
    assert (matrices(got.repeat(1, 16)) - matrices(want.repeat(1, 16))).abs().max() < 4e-6
    half_turns = t64([[[1, 0, 0], [0, -1, 0], [0, 0, -1]], [[-1, 0, 0], [0, 1, 0], [0, 0, -1]],
                      [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]])
    assert torch.allclose(matrix_to_axis_angle(half_turns).abs(), torch.eye(3).double() * np.pi)


def test_matrix_to_axis_angle_gradients_are_finite_and_right():
    through = lambda v: matrix_to_axis_angle(axis_angle_to_matrix(v))
    for length in (0.0, 1e-6, 1e-4, 0.0199, 0.0201, 1.0, 2.0, 3.1):
        v = t64([0.6, -0.64, 0.48]) * length
        jacobian = torch.autograd.functional.jacobian(through, v)
        assert (jacobian - torch.eye(3)).abs().max() < 1e-9
    R = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone().requires_grad_()
    assert torch.autograd.gradcheck(matrix_to_axis_angle, R)
    assert torch.autograd.gradgradcheck(matrix_to_axis_angle, R)
    half_turn = torch.diag(t64([1, -1, -1])).requires_grad_()            # w = 0
    matrix_to_axis_angle(half_turn).sum().backward()
    assert half_turn.grad.isfinite().all()


def test_six_d_is_interleaved_and_equals_hamuco(golden):
    R = six_d_to_matrix(t64(golden["rot/x6"]))
    assert (R - t64(golden["rot/hamuco_rot6d_to_rotmat"])).abs().max() < 1e-9
    assert (six_d_to_matrix(matrix_to_six_d(R)) - R).abs().max() < 1e-14
    scaled = six_d_to_matrix(t64([2, 1, 0, 3, 0, 0]))            # columns (2, 0, 0), (1, 3, 0)
    assert torch.allclose(scaled, torch.eye(3).double())
    turn = t64([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert matrix_to_six_d(turn).tolist() == [0, -1, 1, 0, 0, 0]


def test_mirror_pose_equals_golden(golden):
    flipped = mirror_pose(t64(golden["mirror_aa"]).view(1, 48))
    assert (flipped.view(16, 3) - t64(golden["mirror_aa_flipped"])).abs().max() < 1e-15
    D = torch.diag(t64([-1, 1, 1]))
    R = axis_angle_to_matrix(t64(golden["mirror_aa"]))
    assert (axis_angle_to_matrix(flipped.view(16, 3)) - D @ R @ D).abs().max() < 1e-14


# ---- The model against golden numbers ----


def front(golden, config):
    """(input of full_pose, its options) of a golden configuration, gradients on."""
    orient, hand = t64(golden["orient"]), t64(golden["hand" if config[:2] == "aa" else config[:-5]])
    pose = torch.cat([orient, hand], 1).requires_grad_()
    pca = None if config[:2] == "aa" else int(config[3:-5])
    return pose, dict(flat_hand_mean=config.endswith("flat"), pca=pca)


def rotations(mano, pose, options):
    return axis_angle_to_matrix(mano.full_pose(pose, **options).unflatten(1, (16, 3)))


def chain16(joints):
    """21 joints in our order -> the 16 of the chain in MANO's."""
    return joints[..., [MANO_TO_OURS.index(j) for j in range(16)], :]


def golden_loss(golden, verts, joints):
    """The scalar whose gradients are stored."""
    return ((verts * t64(golden["cot_verts"])).sum()
            + (chain16(joints) * t64(golden["cot_joints"])).sum())


def test_numpy_model_equals_chumpy_and_smplx(params, golden):
    verts, joints = mano_numpy(params, golden["rotmat/R"], golden["betas"], golden["transl"])
    for source in ("chumpy", "rotmat"):
        assert np.abs(verts[:, EVERY] - golden[f"{source}/verts"]).max() < 1e-14
        assert np.abs(joints - golden[f"{source}/joints"]).max() < 1e-14
    assert abs(verts.sum() - 866.582444193152) < 1e-9


def test_torch_model_equals_chumpy_and_smplx(params, golden):
    mano = Mano(params, dtype=torch.float64)
    R, betas, transl = (t64(golden[k]).requires_grad_() for k in ("rotmat/R", "betas", "transl"))
    verts, joints = mano(R, betas, transl)
    for source in ("chumpy", "rotmat"):
        assert (verts[:, EVERY] - t64(golden[f"{source}/verts"])).abs().max() < 1e-14
        assert (chain16(joints) - t64(golden[f"{source}/joints"])).abs().max() < 1e-14
    assert abs(verts.sum().item() - 866.582444193152) < 1e-9
    golden_loss(golden, verts, joints).backward()
    for name, got in (("grad_R", R.grad), ("grad_betas", betas.grad), ("grad_transl", transl.grad)):
        want = t64(golden[f"rotmat/{name}"])
        assert (got - want).abs().max() < 1e-12 * want.abs().max(), name


@pytest.mark.parametrize("config", ["aa_mean", "pca6_flat", "pca6_mean"])
def test_axis_angle_and_pca_fronts_equal_smplx_with_gradients(mano, golden, config):
    pose, options = front(golden, config)
    betas, transl = (t64(golden[k]).requires_grad_() for k in ("betas", "transl"))
    want = lambda key: t64(golden[f"{config}/{key}"])
    assert (mano.full_pose(pose, **options) - want("full_pose")).abs().max() < 1e-15
    verts, joints = mano(rotations(mano, pose, options), betas, transl)
    assert (verts[:, EVERY] - want("verts")).abs().max() < 5e-9
    assert (chain16(joints) - want("joints")).abs().max() < 5e-9
    golden_loss(golden, verts, joints).backward()
    for name, got in (("grad_orient", pose.grad[:, :3]), ("grad_pose", pose.grad[:, 3:]),
                      ("grad_betas", betas.grad), ("grad_transl", transl.grad)):
        assert (got - want(name)).abs().max() < 1e-7 * want(name).abs().max(), name


def test_vertex_sums_equal_smplx_with_and_without_the_mean(mano, golden):
    for config, total in (("aa_mean", 866.582443889727), ("aa_flat", 858.1248368397348),
                          ("pca6_mean", 848.4808530327958), ("pca6_flat", 834.5010924588297)):
        pose, options = front(golden, config)
        verts, _ = mano(rotations(mano, pose, options), t64(golden["betas"]), t64(golden["transl"]))
        assert abs(verts.sum().item() - total) < 2e-6, config


def test_float32_layer_is_within_2e_7_m(params, golden):
    pose, options = front(golden, "aa_mean")
    mano, placed = Mano(params), (t64(golden["betas"]), t64(golden["transl"]))
    verts, joints = mano(rotations(mano, pose, options), *placed)
    assert verts.dtype == joints.dtype == torch.float32
    assert (verts[:, EVERY] - t64(golden["aa_mean/verts"])).abs().max() < 2e-7
    assert (chain16(joints) - t64(golden["aa_mean/joints"])).abs().max() < 2e-7


@pytest.mark.parametrize("config", ["aa_mean", "pca6_mean"])
def test_21_joints_with_manopth_tips_equal_manopth(params, golden, config):
    mano = Mano(params, tips="manopth", dtype=torch.float64)
    pose, options = front(golden, config)
    _, joints = mano(rotations(mano, pose, options), t64(golden["betas"]), t64(golden["transl"]))
    assert (joints * 1000 - t64(golden[f"manopth_mm/{config}/joints21"])).abs().max() < 3e-4
    centred = joints - joints[:, 9:10]                       # its center_idx 9: the middle MCP
    want = t64(golden[f"manopth_mm/{config}/joints21"])
    assert (centred * 1000 - (want - want[:, 9:10])).abs().max() < 6e-4


def test_joints_regressed_from_the_posed_mesh_are_freihands(params, golden, mano):
    verts, joints = mano(t64(golden["rotmat/R"]), t64(golden["betas"]), t64(golden["transl"]))
    regressed = mano.regress(verts)
    want = t64(golden["freihand/joints16_from_posed_verts"])
    assert (chain16(regressed) - want).abs().max() < 1e-14
    assert torch.equal(regressed[:, 4::4], joints[:, 4::4])                   # the same tips
    apart = (chain16(regressed) - chain16(joints)).norm(dim=-1).mean()
    assert 0.002 < apart < 0.0024                            # the two definitions: 2.2 mm here


def slow_hand(params, pose, betas, tips):
    """One hand, 4x4 matrices joint by joint and vertex by vertex: a second reading of the paper."""
    R = matrices(pose[None])[0].numpy()
    shaped = params["v_template"] + params["shapedirs"] @ betas
    J = params["J_regressor"] @ shaped
    posed = shaped + params["posedirs"] @ (R[1:] - np.eye(3)).ravel()
    world = []
    for j, parent in enumerate([None, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]):
        local = np.eye(4)
        local[:3, :3] = R[j]
        local[:3, 3] = J[j] if parent is None else J[j] - J[parent]
        world.append(local if parent is None else world[parent] @ local)
    verts = np.zeros((778, 3))
    for v in range(778):
        for j in np.flatnonzero(params["weights"][v]):
            away = np.linalg.inv(world[j]) @ world[j] @ np.append(posed[v] - J[j], 1)
            verts[v] += params["weights"][v, j] * (world[j] @ away)[:3]
    places = {"wrist": world[0][:3, 3]}
    for finger, first in (("index", 1), ("middle", 4), ("pinky", 7), ("ring", 10), ("thumb", 13)):
        for k in range(3):
            places[finger, k] = world[first + k][:3, 3]
    for finger, tip in zip(("thumb", "index", "middle", "ring", "pinky"), tips):
        places[finger, 3] = verts[tip]
    fingers = ("thumb", "index", "middle", "ring", "pinky")
    order = ["wrist", *((finger, k) for finger in fingers for k in range(4))]
    return verts, np.stack([places[name] for name in order])


def test_every_front_and_tip_preset_equals_a_slow_second_implementation(params, golden):
    mean, components = params["hands_mean"], params["hands_components"]
    row = 5                                                  # the extreme hand
    orient, hand = golden["orient"][row], golden["hand"][row]
    fronts = {
        "axis-angle flat": (hand, hand, dict(flat_hand_mean=True)),
        "15 PCA, mean": (golden["pca15"][row], golden["pca15"][row] @ components[:15] + mean,
                         dict(flat_hand_mean=False, pca=15)),
        "45 PCA, mean": (hand, hand @ components + mean, dict(flat_hand_mean=False, pca=45)),
        "45 PCA, flat": (hand, hand @ components, dict(flat_hand_mean=True, pca=45))}
    for (name, (numbers, fingers, options)), (preset, tips) in zip(fronts.items(), TIPS.items()):
        mano = Mano(params, tips=preset, dtype=torch.float64)
        pose = t64(np.concatenate([orient, numbers]))[None]
        verts, joints = mano(rotations(mano, pose, options), t64(golden["betas"][row])[None])
        want = slow_hand(params, np.concatenate([orient, fingers]), golden["betas"][row], tips)
        assert np.abs(verts[0].numpy() - want[0]).max() < 1e-14, name
        assert np.abs(joints[0].numpy() - want[1]).max() < 1e-14, (name, preset)


def test_45_pca_coefficients_are_not_axis_angle(mano, golden):
    pose = torch.cat([t64(golden["orient"]), t64(golden["hand"])], 1)
    as_pca = mano.full_pose(pose, flat_hand_mean=False, pca=45)
    as_angles = mano.full_pose(pose, flat_hand_mean=False)
    assert (as_pca - as_angles)[4:].abs().max() > 0.1


def test_tip_presets_are_the_published_vertices():
    assert TIPS["smplx"] == (744, 320, 443, 554, 671)
    assert TIPS["manopth"] == (745, 317, 444, 556, 673) and TIPS["manopth_left"][2] == 445
    assert TIPS["freihand"] == (744, 320, 443, 555, 672)
    assert TIPS["ho3d"] == (744, 333, 444, 555, 672)
    assert TIPS["graphormer"] == (745, 317, 445, 556, 673)
    assert TIPS["contactpose"] == (745, 333, 444, 555, 672)


# ---- Properties ----


def hands(n, seed=3, scale=0.5):
    """Random R (n, 16, 3, 3), shape (n, 10), trans (n, 3) in float64."""
    pose, shape, trans = normal(n, 61, seed=seed).split([48, 10, 3], 1)
    return matrices(scale * pose), shape.clone(), 0.3 * trans


def test_mean_conversion_identity(mano, params, golden):
    pose = torch.cat([t64(golden["orient"]), t64(golden["hand"])], 1)
    moved = pose + torch.cat([torch.zeros(3), t64(params["hands_mean"])])
    assert torch.equal(mano.full_pose(moved, flat_hand_mean=True),
                       mano.full_pose(pose, flat_hand_mean=False))
    assert torch.equal(mano.full_pose(pose, flat_hand_mean=True), pose)


def test_the_wrist_stays_at_its_rest_place_plus_trans(mano, params):
    R, shape, trans = hands(5)
    rest = np.einsum("v,bvc->bc", params["J_regressor"][0], params["v_template"] + np.einsum(
        "vcl,bl->bvc", params["shapedirs"], shape.numpy()))
    assert (mano(R, shape, trans)[1][:, 0] - trans - t64(rest)).abs().max() < 1e-15
    assert np.abs(rest).min() > 1e-3                         # or the test could not fail


def test_a_hand_in_another_camera_is_the_moved_hand(mano):
    R, shape, trans = hands(4)
    M = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    M[:, :3, :3], M[:, :3, 3] = hands(4, seed=9, scale=2)[0][:, 0], hands(4, seed=10)[2]
    verts, joints = mano(R, shape, trans)
    moved, moved_joints = mano(*(lambda r, t: (r, shape, t))(*mano.to_camera(R, shape, trans, M)))
    assert (moved - (verts @ M[:, :3, :3].mT + M[:, None, :3, 3])).abs().max() < 1e-15
    assert (moved_joints - (joints @ M[:, :3, :3].mT + M[:, None, :3, 3])).abs().max() < 1e-15


def test_joints_without_the_mesh_equal_those_with_it(params):
    for tips in ("smplx", "freihand"):
        mano = Mano(params, tips=tips, dtype=torch.float64)
        R, shape, trans = hands(3)
        assert (mano.joints(R, shape, trans) - mano(R, shape, trans)[1]).abs().max() < 1e-15
        assert (mano.joints(R, shape) - mano(R, shape)[1]).abs().max() < 1e-15


def test_joints_never_build_the_mesh(params):
    mano = Mano(params)
    mano.basis.fill_(torch.nan)
    mano.weights.fill_(torch.nan)
    assert mano.joints(*hands(2)).isfinite().all() and mano(*hands(2))[0].isnan().any()


def test_first_and_second_derivatives_pass_numerical_checks(params):
    mano = Mano(params, dtype=torch.float64)

    def few(pose, shape, trans):
        verts, joints = mano(axis_angle_to_matrix(pose.unflatten(1, (16, 3))), shape, trans)
        return torch.cat([verts[:, 100::400], joints[:, 7::9]], 1)

    at_rest = torch.zeros(1, 48, dtype=torch.float64)
    _, shape, trans = hands(1)
    for pose in (at_rest, 0.5 * normal(1, 48)):
        inputs = [x.clone().requires_grad_() for x in (pose, shape, trans)]
        assert torch.autograd.gradcheck(few, inputs)
        assert torch.autograd.gradgradcheck(few, inputs, fast_mode=True)


def test_the_layer_works_under_vmap_and_jacrev(params):
    mano = Mano(params, dtype=torch.float64)
    R, shape, _ = hands(3)
    one = lambda r, s: mano(r[None], s[None])[1][0]
    jacobian = torch.func.vmap(torch.func.jacrev(one))(R, shape)
    assert jacobian.shape == (3, 21, 3, 16, 3, 3) and jacobian.isfinite().all()


def test_compiles_as_one_graph(params):
    mano, inputs = Mano(params), [x.float().requires_grad_() for x in hands(3)]
    pose = 0.3 * normal(3, 48).float()

    def whole(pose, shape, trans):
        R = axis_angle_to_matrix(mano.full_pose(pose, flat_hand_mean=False).unflatten(1, (16, 3)))
        return *mano(R, shape, trans), mano.joints(R, shape, trans)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(pose, *inputs[1:]), whole(pose, *inputs[1:])):
        assert (got - want).abs().max() < 1e-6
    compiled(pose, *inputs[1:])[0].sum().backward()
    assert inputs[1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit_and_the_flat_hand_is_finite(params, dtype):
    mano = Mano(params)
    pose = torch.cat([torch.zeros(1, 48), 0.5 * normal(3, 48).float()])
    shape, trans = (x.float() for x in hands(4)[1:])
    M = torch.eye(4).repeat(4, 1, 1)

    def everything():
        R = axis_angle_to_matrix(mano.full_pose(pose, flat_hand_mean=True).unflatten(1, (16, 3)))
        verts, joints = mano(R, shape, trans)
        coefficients = mano.full_pose(pose, flat_hand_mean=False, pca=45)
        return (verts, joints, mano.joints(R, shape, trans), mano.regress(verts), coefficients,
                mano.rest_joints(shape), *mano.to_camera(R, shape, trans, M),
                matrix_to_axis_angle(R), six_d_to_matrix(matrix_to_six_d(R)))

    want = everything()
    with torch.autocast("cpu", dtype):
        got = everything()
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and a.isfinite().all() and torch.equal(a, b)
    flat = mano(torch.eye(3, dtype=dtype).expand(1, 16, 3, 3), shape[:1].to(dtype))
    assert flat[0].dtype == flat[1].dtype == torch.float32


def test_one_shape_serves_a_batch_and_an_empty_batch_works(params, mano):
    R, shape, trans = hands(4)
    verts, joints = mano(R, shape[:1], trans[:1])
    assert np.abs(mano_numpy(params, R, shape[:1], trans[:1])[0] - verts.numpy()).max() < 1e-14
    for k in range(4):
        assert torch.allclose(verts[k], mano(R[k:k + 1], shape[:1], trans[:1])[0][0], atol=1e-15)
    empty = R[:0].clone().requires_grad_()
    for given in (shape[:0], shape[:1]):
        verts, joints = mano(empty, given, trans[:0])
        assert verts.shape == (0, 778, 3) and joints.shape == (0, 21, 3)
        assert mano.joints(empty, given).shape == (0, 21, 3)
        (verts.sum() + joints.sum()).backward()
        assert empty.grad.shape == (0, 16, 3, 3)
    assert mano.full_pose(torch.zeros(0, 48), flat_hand_mean=False).shape == (0, 48)


def test_wrong_widths_say_what_is_wanted(mano):
    R, shape, trans = hands(4)
    for call, words in (
            (lambda: mano(R[:, :15], shape), "full_pose"),
            (lambda: mano(R, shape[:, :9]), "(4, 10)"), (lambda: mano(R, shape[:3]), "(4, 10)"),
            (lambda: mano.joints(R, shape, trans[:2]), "trans"),
            (lambda: mano(torch.zeros(4, 48), shape), "axis-angle"),
            (lambda: mano.full_pose(torch.zeros(4, 9), flat_hand_mean=True), "(B, 48)"),
            (lambda: mano.full_pose(torch.zeros(4, 48), flat_hand_mean=True, pca=6), "(B, 9)"),
            (lambda: mano.full_pose(torch.zeros(4, 45), flat_hand_mean=False), "flat_hand_mean"),
            (lambda: mano.full_pose(torch.zeros(4, 3), flat_hand_mean=True, pca=0), "1 to 45"),
            (lambda: Mano({}, tips="openpose"), "manopth")):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)
    with pytest.raises(TypeError):
        mano.full_pose(torch.zeros(4, 48))                   # flat_hand_mean has no default


def test_float64_layer_keeps_the_digits_of_its_parameters(params):
    moved = params | {"v_template": params["v_template"] + 1e-12}
    R, shape, _ = hands(1)
    there, here = (Mano(p, dtype=torch.float64)(R, shape)[0] for p in (moved, params))
    assert (there - here - 1e-12).abs().max() < 1e-15


def test_no_array_of_the_hand_enters_a_checkpoint(params):
    mano = Mano(params)
    assert mano.state_dict() == {}
    assert mano.faces.dtype == torch.int64 and mano.faces.shape == (1538, 3)
    assert mano.double()(*hands(2))[0].dtype == torch.float64
