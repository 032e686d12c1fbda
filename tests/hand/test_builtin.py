"""The built-in hand: topology, skinning, joints, fingertips, poses."""
import numpy as np
import pytest
import torch

from common import TIPS, mano_numpy
from hand.builtin import GESTURES, HAND_LIMITS, builtin_hand, draw_pose, draw_shape, hand_axes

FINGERS = ("thumb", "index", "middle", "ring", "pinky")
FIRST = dict(index=1, middle=4, pinky=7, ring=10, thumb=13)                 # MANO's joint numbers


@pytest.fixture(scope="module")
def hand():
    return builtin_hand()


def posed(hand, pose=None, shape=None):
    """Vertices and joints of one hand under (15, 3) axis-angle; Rodrigues in float64."""
    pose = np.zeros((15, 3)) if pose is None else np.asarray(pose, float)
    R = np.tile(np.eye(3), (1, 16, 1, 1))
    for j, v in enumerate(pose):
        t = np.linalg.norm(v)
        if t > 0:
            x, y, z = v / t
            k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            R[0, j + 1] = np.eye(3) + np.sin(t) * k + (1 - np.cos(t)) * k @ k
    verts, joints = mano_numpy(hand, R, np.zeros((1, 10)) if shape is None else shape[None])
    return verts[0], joints[0]


def edges(hand):
    f = hand["f"]
    return np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])


def test_arrays_have_manos_layout(hand):
    shapes = dict(v_template=(778, 3), shapedirs=(778, 3, 10), posedirs=(778, 3, 135), f=(1538, 3),
                  J_regressor=(16, 778), weights=(778, 16), kintree_table=(2, 16), J=(16, 3),
                  hands_components=(45, 45), hands_mean=(45,), hands_coeffs=(1554, 45))
    for key, shape in shapes.items():
        assert hand[key].shape == shape
        assert hand[key].dtype == (np.int64 if key in ("f", "kintree_table") else np.float64)
        assert np.isfinite(hand[key]).all()
    assert (hand["bs_style"], hand["bs_type"]) == ("lbs", "lrotmin")
    parents = [4294967295, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]
    assert hand["kintree_table"].tolist() == [parents, list(range(16))]


def test_surface_is_a_disc_with_one_wrist_opening_of_16_edges(hand):
    directed = [tuple(e) for e in edges(hand).tolist()]
    assert len(set(directed)) == len(directed)                     # consistently oriented, manifold
    undirected = {tuple(sorted(e)) for e in directed}
    assert len(undirected) == 2315
    assert 778 - len(undirected) + len(hand["f"]) == 1                                   # Euler
    following = {b: a for a, b in set(directed) if (b, a) not in set(directed)}
    start = place = next(iter(following))
    loop = 0
    while loop == 0 or place != start:
        place, loop = following[place], loop + 1
    assert loop == len(following) == 16


def test_faces_round_every_vertex_form_one_fan(hand):
    directed = {tuple(e) for e in edges(hand).tolist()}
    rim = {a for a, b in directed if (b, a) not in directed}
    steps = [{} for _ in range(778)]                        # around a vertex: neighbour -> next
    for a, b, c in hand["f"].tolist():
        for v, p, q in ((a, b, c), (b, c, a), (c, a, b)):
            steps[v][p] = q
    for v, step in enumerate(steps):
        start = next(iter(set(step) - set(step.values())), next(iter(step)))
        seen, place = 0, start
        while place in step and seen < len(step):
            place, seen = step[place], seen + 1
        assert seen == len(step) >= 2 and (place == start) == (v not in rim)


def test_faces_point_outward_and_none_is_tiny(hand):
    a, b, c = hand["v_template"][hand["f"]].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    assert area.min() > 1e-6                                                             # 1 mm^2
    centre = hand["v_template"].mean(0)
    volume = ((a - centre) * np.cross(b - centre, c - centre)).sum() / 6
    assert 2.2e-4 < volume < 4.5e-4                                                      # m^3


def test_it_is_a_right_hand(hand):
    """Palm to the camera and fingers up: the thumb is at the right of the picture."""
    v, j = hand["v_template"], hand["J"]
    up = v[443] - j[0]
    a, b, c = v[hand["f"][(hand["f"] == 22).any(1)]].transpose(1, 0, 2)
    of_palm = np.cross(b - a, c - a).sum(0)                              # outward from the palm
    looking = -of_palm                                                   # the camera faces the palm
    right = np.cross(looking, up)                                        # forward x up
    assert (v[744] - j[0]) @ right > 0 > (v[671] - j[0]) @ right
    assert up @ [-1, 0, 0] > 0.17 and of_palm[1] < 0                     # MANO's frame


def test_wrist_is_near_manos_and_not_the_origin(hand):
    np.testing.assert_allclose(hand["J"][0], [0.09, 0.006, 0.006], atol=1e-6)


def test_sizes_are_those_of_a_person(hand):
    v, j = hand["v_template"], hand["J"]
    assert 0.175 < np.linalg.norm(v[443] - j[0]) < 0.195               # wrist to middle's tip
    knuckles = (np.abs(v[:, 0] - j[1, 0]) < 0.015) & (hand["weights"][:, 13:].sum(1) < 0.5)
    assert 0.076 < np.ptp(v[knuckles][:, 2]) < 0.095
    for first in (1, 4, 7, 10):
        bones = np.linalg.norm(np.diff(j[first:first + 3], axis=0), axis=1)
        assert bones[0] > 1.4 * bones[1] > 0.02


def test_weights_are_sparse_and_each_finger_sees_its_own_chain(hand):
    W = hand["weights"]
    np.testing.assert_allclose(W.sum(1), 1, atol=1e-12)
    assert W.min() >= 0 and (W > 0).sum(1).max() <= 4
    for finger, first in FIRST.items():
        tip = TIPS["smplx"][FINGERS.index(finger)]
        assert W[tip, first + 2] == pytest.approx(1)
    first_bones = W[:, [1, 4, 7, 10, 13]]                          # skin of the palm runs smoothly
    a, b = edges(hand).T
    palm = (W[:, 0] > 0.02)[a] & (W[:, 0] > 0.02)[b]
    assert np.abs(first_bones[a] - first_bones[b])[palm].max() < 0.45


def test_every_tip_preset_lies_on_its_finger(hand):
    for name, tips in TIPS.items():
        for finger, tip in zip(FINGERS, tips):
            pole = hand["v_template"][TIPS["smplx"][FINGERS.index(finger)]]
            assert np.linalg.norm(hand["v_template"][tip] - pole) < 0.009, (name, finger)
            assert hand["weights"][tip, FIRST[finger] + 2] > 0.99, (name, finger)


def test_vertices_22_and_95_are_the_middles_of_palm_and_back(hand):
    front, back = hand["v_template"][[22, 95]]
    middle = (hand["J"][0] + hand["J"][4]) / 2
    assert front[1] < middle[1] - 0.008 and back[1] > middle[1] + 0.008
    assert np.abs([front - middle, back - middle])[:, [0, 2]].max() < 0.012


def test_joint_regressor_is_exact_at_rest_and_close_under_shape(hand):
    from hand.builtin import _surface
    R = hand["J_regressor"]
    np.testing.assert_allclose(R.sum(1), 1, atol=1e-12)
    assert R.min() >= 0
    np.testing.assert_allclose(R @ hand["v_template"], _surface(np.zeros(10))[1] / 1e3, atol=1e-9)
    truth = np.stack([_surface(e)[1] - _surface(-e)[1] for e in np.eye(10) / 2], -1) / 1e3
    error = np.linalg.norm(np.einsum("jv,vck->jck", R, hand["shapedirs"]) - truth, axis=1)
    assert error.max() < 0.65e-3 and np.sqrt((error ** 2).mean()) < 0.12e-3                  # m


def test_shape_directions_are_the_generators_own(hand):
    """One standard deviation along a direction is the generated hand to a quarter millimetre."""
    from hand.builtin import _mesh, _surface
    order = _mesh().order()
    for k in range(10):
        truth = _surface(0.5 * np.eye(10)[k])[0][order] / 1e3
        got = hand["v_template"] + 0.5 * hand["shapedirs"][:, :, k]
        assert np.abs(got - truth).max() < 0.25e-3
    rms = 1e3 * np.sqrt((hand["shapedirs"] ** 2).sum(1).mean(0))                         # mm
    assert rms.argmax() == 0 and 4 < rms[0] < 10 and rms.min() > 0.1


@pytest.mark.parametrize("degrees", [45, 60, 90])
def test_bent_middle_joint_keeps_its_radius(hand, degrees):
    rest, joints = posed(hand)
    near = np.linalg.norm(rest - joints[2], axis=1) < 0.0125
    near &= hand["weights"][:, 1:4].sum(1) > 0.5
    pose = np.zeros((15, 3))
    pose[1] = np.radians(degrees) * hand_axes()[1, 0]
    bent, moved = posed(hand, pose)
    ratio = np.linalg.norm(bent[near] - moved[2], axis=1).mean() \
        / np.linalg.norm(rest[near] - joints[2], axis=1).mean()
    assert near.sum() > 20 and abs(ratio - 1) < 0.02


def test_bending_curls_the_fingers_toward_the_palm(hand):
    for finger in ("index", "middle", "ring", "pinky"):
        tip = TIPS["smplx"][FINGERS.index(finger)]
        pose = np.zeros((15, 3))
        for j in range(3):
            pose[FIRST[finger] - 1 + j] = np.radians(60) * hand_axes()[FIRST[finger] - 1 + j, 0]
        bent, joints = posed(hand, pose)
        assert bent[tip, 1] < joints[FIRST[finger], 1] - 0.03


def test_components_are_orthonormal_ordered_and_rebuild_the_poses(hand):
    C = hand["hands_components"]
    np.testing.assert_allclose(C @ C.T, np.eye(45), atol=1e-12)
    poses = draw_pose(torch.arange(1554), 0, "hands_coeffs").double().numpy().reshape(1554, 45)
    np.testing.assert_allclose(hand["hands_coeffs"] @ C + hand["hands_mean"], poses, atol=1e-12)
    np.testing.assert_allclose(hand["hands_mean"], poses.mean(0), atol=1e-12)
    spread = hand["hands_coeffs"].var(0)
    assert (np.diff(spread[:18]) < 0).all() and spread[:10].sum() > 0.95 * spread.sum()
    assert (C[np.arange(45), np.abs(C).argmax(1)] > 0).all()


def test_generation_is_bit_equal_between_calls(hand):
    again = builtin_hand.__wrapped__()
    for key, value in hand.items():
        assert np.array_equal(value, again[key]), key


def test_drawn_poses_do_not_depend_on_the_batch():
    whole = draw_pose(torch.arange(64), 5)
    assert torch.equal(whole[[63, 7]], draw_pose(torch.tensor([63, 7]), 5))
    assert not torch.equal(whole, draw_pose(torch.arange(64), 6))
    assert not torch.equal(whole, draw_pose(torch.arange(64), 5, "other"))
    assert torch.equal(draw_shape(torch.arange(9), 1)[8:], draw_shape(torch.tensor([8]), 1))


def test_drawn_poses_stay_within_the_limits():
    pose = draw_pose(torch.arange(4000), 2).double()
    assert pose.shape == (4000, 15, 3)
    axes = torch.tensor(hand_axes())
    np.testing.assert_allclose(axes @ axes.mT, np.tile(np.eye(3), (15, 1, 1)), atol=1e-12)
    bend, spread, twist = torch.rad2deg(torch.einsum("bjc,jac->abj", pose, axes))
    fingers = bend[:, :12].view(-1, 4, 3)
    for k, name in enumerate(("mcp", "pip", "dip")):
        low, high = HAND_LIMITS[name]
        assert low - 1e-3 <= fingers[:, :, k].min() and fingers[:, :, k].max() <= high + 1e-3
    for value, name in ((spread, "spread"), (twist, "twist"), (bend[:, 12:], "thumb")):
        low, high = HAND_LIMITS[name]
        assert low - 1e-3 <= value.min() and value.max() <= high + 1e-3
    assert spread[:, [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]].abs().max() < 1e-3          # hinges
    assert twist[:, :12].abs().max() < 1e-3


def test_drawn_poses_are_varied():
    """Open hands, fists and everything between; every finger alone may be straight or bent."""
    pose = draw_pose(torch.arange(2000), 3).double()
    bend = torch.rad2deg(torch.einsum("bjc,jc->bj", pose, torch.tensor(hand_axes()[:, 0])))
    middle = bend[:, [1, 4, 10, 7]]                                    # index, middle, ring, pinky
    straight, bent = middle < 20, middle > 80
    assert straight.all(1).float().mean() > 0.08 and bent.all(1).float().mean() > 0.08
    alone = [(straight[:, k] & bent[:, [i for i in range(4) if i != k]].all(1)).float().mean()
             for k in range(4)]
    assert alone[0] > 0.03 and alone[3] > 0.02 and alone[2] < 0.005     # point; shaka; not the ring
    assert len(GESTURES) >= 12 and middle.std(0).min() > 25
    thumb = pose[:, 12:].flatten(1)
    assert torch.pca_lowrank(thumb - thumb.mean(0), 4)[1].min() > 0.02 * 2000 ** 0.5


def winding(verts, faces, points):
    """How often a closed surface goes round each point: 1 inside, 2 where two parts overlap."""
    a, b, c = (verts[faces[:, k]][None] - points[:, None] for k in range(3))
    la, lb, lc = (np.linalg.norm(e, axis=-1) for e in (a, b, c))
    dot = lambda p, q: (p * q).sum(-1)
    solid = np.arctan2(dot(a, np.cross(b, c)),
                       la * lb * lc + dot(a, b) * lc + dot(b, c) * la + dot(c, a) * lb)
    return 2 * solid.sum(1) / (4 * np.pi)


def test_fingertips_do_not_sink_into_other_parts(hand):
    """Points 3 mm under 5 x 120 tips and in the middles of the last bones: 3 in 1,000 may."""
    directed = {tuple(e) for e in edges(hand).tolist()}
    rim = [(a, b) for a, b in directed if (b, a) not in directed]
    faces = np.concatenate([hand["f"], [(b, a, 778) for a, b in rim]])
    inside = []
    for pose in draw_pose(torch.arange(120), 7).numpy():
        verts, joints = posed(hand, pose)
        verts = np.concatenate([verts, verts[[a for a, _ in rim]].mean(0, keepdims=True)])
        tips = verts[list(TIPS["smplx"])]
        last = joints[[FIRST[f] + 2 for f in FINGERS]]
        inside.append([winding(verts, faces, last + u * (tips - last)) for u in (0.5, 0.85)])
    inside = np.array(inside)
    assert inside.min() > 0.9                                            # inside their own finger
    assert (inside > 1.5).mean() <= 0.003


def test_drawn_shapes_are_standard_normal_within_three():
    shape = draw_shape(torch.arange(20000), 4)
    assert shape.shape == (20000, 10) and shape.abs().max() <= 3
    assert shape.mean(0).abs().max() < 0.03 and (shape.std(0) - 1).abs().max() < 0.03
