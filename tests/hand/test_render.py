"""Rendering: the rasteriser and the shader against slow oracles."""
import numpy as np
import pytest
import torch

from common import Mano, axis_angle_to_matrix, normal, project, six_d_to_matrix
from hand.builtin import builtin_hand, draw_pose
from hand.render import Light, rasterise, render, shade, studio, vertex_normals, visible_joints
from hand.scene import boundary

PALM = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])        # palm to the camera, fingers up


@pytest.fixture(scope="module")
def mano():
    return Mano(builtin_hand())


def camera(n, size, focal):
    c = (size - 1) / 2
    return torch.tensor([[focal, 0, c], [0, focal, c], [0, 0, 1.0]]).expand(n, 3, 3)


def posed(mano, turn, index=None, depth=0.6):
    """Hands (B, 778, 3) and joints, turned, their middle `depth` m in front of the camera."""
    fingers = torch.eye(3).expand(len(turn), 15, 3, 3) if index is None else axis_angle_to_matrix(
        draw_pose(index, 0))
    verts, joints = mano(torch.cat([turn[:, None], fingers], 1), torch.zeros(len(turn), 10))
    shift = torch.tensor([0, 0, depth]) - joints.mean(1, keepdim=True)
    return verts + shift, joints + shift


# ---- the rasteriser

def test_rasterise_matches_a_loop_over_samples_and_faces():
    g = torch.Generator().manual_seed(3)
    verts = torch.rand(1, 30, 3, generator=g) - 0.5 + torch.tensor([0, 0, 1.5])
    faces = torch.randint(0, 30, (40, 3), generator=g)
    faces = faces[(faces != faces.roll(1, 1)).all(1)]           # three different corners
    size, samples, K = 14, 2, camera(1, 14, 18.0)
    got = rasterise(verts, faces, K, size, samples)[0].numpy()
    v, k, wrong, hits = verts[0].double().numpy(), K[0].double().numpy(), 0, 0
    for row in range(size * samples):
        for column in range(size * samples):
            px, py = (column + 0.5) / samples - 0.5, (row + 0.5) / samples - 0.5
            ray = np.array([(px - k[0, 2]) / k[0, 0], (py - k[1, 2]) / k[1, 1], 1.0])
            best, face = np.inf, -1
            for i, (a, b, c) in enumerate(v[faces.numpy()]):
                n = np.cross(b - a, c - a)
                if n @ a >= 0:                                  # seen from behind
                    continue
                p = ray * (n @ a) / (n @ ray)
                inside = all(np.cross(q - o, p - o) @ n >= 0 for o, q in ((a, b), (b, c), (c, a)))
                if inside and 0 < p[2] < best:
                    best, face = p[2], i
            wrong += face != got[row, column]
            hits += face >= 0
    assert hits > 100 and wrong <= 1                            # a sample may sit on an edge


def test_front_and_back_silhouettes_of_the_closed_hand_match(mano):
    hand, index = builtin_hand(), torch.arange(16)
    loop = boundary(hand["f"])
    cap = [(loop[0], loop[k + 1], loop[k]) for k in range(1, 15)]
    faces = torch.tensor(np.concatenate([hand["f"], cap]))
    edges = {(int(t[i]), int(t[(i + 1) % 3])) for t in faces for i in range(3)}
    assert all((b, a) in edges for a, b in edges)               # closed, consistently oriented
    verts, _ = posed(mano, six_d_to_matrix(normal(index, 6, 0, "turn")), index)
    K = camera(16, 192, 450.0)
    front, back = (rasterise(verts, faces, K, 192, back=side) >= 0 for side in (False, True))
    assert front.float().mean() > 0.1
    assert (front != back).sum() <= 3                           # of 2.4 million samples


def test_coverage_is_antialiased():
    square = torch.tensor([[[-0.5, -0.5, 1], [0.5, -0.5, 1], [0.5, 0.5, 1], [-0.5, 0.5, 1]]])
    faces = torch.tensor([[0, 2, 1], [0, 3, 2]])
    K = torch.tensor([[[8.0, 0, 4.0], [0, 8.0, 4.0], [0, 0, 1]]])    # from pixel centre 0 to 8
    black = torch.zeros(1, 3, 9, 9)
    picture, coverage = render(square, faces, K, 9, torch.ones(1, 4, 3), studio(1), black)
    assert coverage[0, 4, 4] == 1 and coverage[0, 4, 0] == 0.5 and coverage[0, 0, 0] == 0.25
    assert picture[0, :, 0, 0].max() < picture[0, :, 4, 4].min()


def test_a_face_is_brightest_when_the_lamp_shines_on_it():
    square = torch.tensor([[[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]])
    faces, K = torch.tensor([[0, 2, 1], [0, 3, 2]]), camera(1, 8, 8.0)
    tone, grey = [], torch.full((1, 4, 3), 0.5)
    for z, lit in ((-1.0, 1.0), (-1.0, 0.5), (1.0, 1.0)):
        light = studio(1)._replace(direction=torch.tensor([[0, 0, z]]), gloss=torch.zeros(1))
        ids = rasterise(square, faces, K, 8)
        out = shade(ids, square, faces, K, grey, light, torch.full((1, 4), lit))
        tone.append(out[0, 1, 4, 4].item())
    # 0.5 (0.75 lit + 0.35 0.85) to the front, ambient light alone from behind
    assert tone == pytest.approx([0.52375, 0.33625, 0.14875], abs=1e-5)


def test_gentle_edges_are_shaded_smoothly_and_sharp_ones_are_not():
    faces, K = torch.tensor([[0, 2, 1], [0, 1, 3]]), camera(1, 32, 30.0)
    light = studio(1)._replace(direction=torch.tensor([[-1.0, 0, 0]]), gloss=torch.zeros(1))
    spread = []
    for slope in (0.2, 1.5):                                    # two triangles meet in a ridge
        roof = torch.tensor([[[0, -1, 2], [0, 1, 2], [-1, 0, 2 + slope], [1, 0, 2 + slope]]])
        out = shade(rasterise(roof, faces, K, 32), roof, faces, K, torch.ones(1, 4, 3), light)[0]
        assert out[3, 16, 14] == out[3, 16, 10] == out[3, 16, 20] == 1
        spread.append((out[1, 16, 14] - out[1, 16, 10]).abs().item())
    assert spread[0] > 0.01 and spread[1] < 1e-5


def test_attributes_are_interpolated_with_perspective():
    # a floor from z = 1 to z = 4, albedo (z - 1) / 3: linear in depth, not along the picture
    verts = torch.tensor([[[-4.0, 1, 1], [4, 1, 1], [4, 1, 4], [-4, 1, 4]]])
    albedo = torch.tensor([[0.0, 0, 1, 1]])[..., None].expand(1, 4, 3)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    K = torch.tensor([[[16.0, 0, 8], [0, 16.0, 0], [0, 0, 1]]])
    white = Light(torch.tensor([[0.0, 1, 0]]), torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1))
    ids = rasterise(verts, faces, K, 17, samples=1)
    picture = shade(ids, verts, faces, K, albedo, white, samples=1)[0]
    row, column = (picture[3] > 0).nonzero(as_tuple=True)
    z = 16.0 / row.float()                                      # y = 1 = z row / 16
    got = picture[0, row, column] / picture[0].max()
    assert len(z) > 50 and torch.allclose(got, (z - 1) / 3 / ((z - 1) / 3).max(), atol=1e-4)


def test_faces_behind_the_camera_or_nearer_than_near_are_not_drawn():
    verts = torch.tensor([[[-1.0, -1, 1], [1, -1, 1], [0, 1, 1]]])
    faces, K = torch.tensor([[0, 2, 1]]), camera(1, 16, 8.0)
    assert (rasterise(verts, faces, K, 16) >= 0).any()
    assert not (rasterise(-verts, faces.flip(1), K, 16) >= 0).any()
    assert not (rasterise(verts * 0.01, faces, K, 16) >= 0).any()
    half_behind = verts * torch.tensor([[1.0], [1.0], [-1.0]])
    for order in (faces, faces.flip(1)):
        assert not (rasterise(half_behind, order, K, 16) >= 0).any()


def test_picture_does_not_depend_on_the_order_of_faces(mano):
    verts, _ = posed(mano, PALM[None])
    order = torch.randperm(1538, generator=torch.Generator().manual_seed(0))
    a = rasterise(verts, mano.faces, camera(1, 64, 150.0), 64)
    b = rasterise(verts, mano.faces[order], camera(1, 64, 150.0), 64)
    same = torch.where(b >= 0, order[b], b) == a
    assert (~same).sum() <= 2                                   # equal depths on a shared edge


def test_vertex_normals_match_a_double_loop(mano):
    verts, _ = posed(mano, PALM[None], torch.arange(1))
    got, flat = vertex_normals(verts, mano.faces)
    v, f = verts[0].double().numpy(), mano.faces.numpy()
    total = np.zeros_like(v)
    for a, b, c in f:
        total[[a, b, c]] += np.cross(v[b] - v[a], v[c] - v[a])
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    assert np.abs(got[0].numpy() - total).max() < 1e-3
    assert np.allclose(np.linalg.norm(flat[0], axis=1), 1, atol=1e-5)


def test_a_hand_beside_the_picture_leaves_it_as_it_is(mano):
    verts, _ = posed(mano, PALM[None])
    behind = torch.full((1, 3, 24, 24), 0.5)
    drawn, _ = render(verts + 10, mano.faces, camera(1, 24, 60.0), 24, torch.ones(1, 778, 3), studio(1), behind)
    assert torch.allclose(drawn, behind, atol=1e-6)


# ---- conventions

def test_a_right_hand_with_its_palm_to_the_camera_has_its_thumb_at_the_right(mano):
    assert torch.linalg.det(PALM) == 1
    _, joints = posed(mano, PALM[None])
    uv = project(joints, camera(1, 64, 150.0))[0]
    assert uv[12, 1] < uv[9, 1] < uv[0, 1]                      # fingers up
    assert uv[4, 0] > uv[8, 0] > uv[12, 0] > uv[16, 0] > uv[20, 0]


def test_a_flat_palm_shows_every_joint_and_a_plate_hides_those_behind_it(mano):
    verts, joints = posed(mano, PALM[None])
    K = camera(1, 96, 220.0)
    seen = visible_joints(joints, verts, mano.faces, K, rasterise(verts, mano.faces, K, 96))
    assert seen.all()
    top = joints[0, 5:, 1].max().item() + 0.005                 # down to below the knuckles
    plate = torch.tensor([[[-0.2, -0.3, 0.5], [0.2, -0.3, 0.5], [0.2, top, 0.5], [-0.2, top, 0.5]]])
    plate[..., 1] *= 0.5 / 0.6
    both = torch.cat([verts, plate], 1)
    faces = torch.cat([mano.faces, 778 + torch.tensor([[0, 2, 1], [0, 3, 2]])])
    seen = visible_joints(joints, both, faces, K, rasterise(both, faces, K, 96))[0]
    assert seen[0] and seen[1] and not seen[5:].any()


def test_a_fist_seen_from_the_back_hides_its_fingertips(mano):
    bend = torch.zeros(1, 16, 3)
    bend[:, 1:13, 2] = 1.4
    R = axis_angle_to_matrix(bend)
    verts, joints = mano(R, torch.zeros(1, 10))
    tips = joints[0, [8, 12, 16], 1] - joints[0, [5, 9, 13], 1]
    assert (tips < -0.02).all()                                 # curled toward the palm, -y
    back = torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])
    verts, joints = ((x - joints.mean(1, keepdim=True)) @ back.T + torch.tensor([0, 0, 0.6])
                     for x in (verts, joints))
    K = camera(1, 96, 400.0)
    seen = visible_joints(joints, verts, mano.faces, K, rasterise(verts, mano.faces, K, 96))[0]
    assert not seen[[8, 12, 16]].any() and seen[[5, 9, 13]].all()
