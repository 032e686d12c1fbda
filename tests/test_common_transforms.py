"""Transforms, the warp and the draws: one convention, checked with literal numbers."""
import math

import pytest
import torch

from common import (
    bits, centre, crop, flip, invert, normal, permutation, place, project, rotate_z, rotation, scale,
    transform, translation, uniform, view_intrinsics, warp)


def points(*xy):
    return torch.tensor([xy], dtype=torch.float64)


def test_a_quarter_turn_takes_the_right_to_the_top():
    A = rotation(torch.tensor([math.pi / 2], dtype=torch.float64), 21)
    assert torch.allclose(transform(A, points((20, 10), (10, 10))), points((10, 0), (10, 10)))
    moved = rotate_z(torch.tensor([math.pi / 2], dtype=torch.float64), points((1, 0, 5)))
    assert torch.allclose(moved, points((0, -1, 5)), atol=1e-12)          # y points down: up is -y


def test_each_transform_moves_a_point_as_its_name_says():
    one = torch.ones(1, dtype=torch.float64)
    assert torch.equal(transform(flip(one, 224), points((3, 7))), points((220, 7)))
    assert torch.equal(transform(scale(2 * one, (5, 9)), points((3, 7))), points((4, 10)))
    assert torch.equal(transform(translation(points((2, -1))[0]), points((3, 7))), points((5, 6)))
    assert centre((640, 480)) == (319.5, 239.5)


def test_crop_follows_the_resizing_rule():
    """A square of side 8 around 3.5 resized to 16: x to (x + .5) 2 - .5, so 0 to 0.5 and 7 to 14.5."""
    A = crop(torch.tensor([[3.5, 3.5]], dtype=torch.float64), torch.tensor([8.0], dtype=torch.float64), 16)
    assert torch.allclose(transform(A, points((0, 7))), points((0.5, 14.5)))


def test_the_right_factor_is_applied_first():
    A = translation(torch.tensor([[10.0, 0.0]])) @ flip(torch.ones(1), 101)
    assert torch.allclose(transform(A, torch.tensor([[[0.0, 0.0]]])), torch.tensor([[[110.0, 0.0]]]))


@pytest.mark.parametrize("size", [33, 64])
def test_warp_puts_dots_where_transform_says(size):
    """Dots drawn, picture warped, dots found again by their centre of mass, to a tenth of a pixel."""
    start = torch.tensor([[size * 0.3, size * 0.6], [size * 0.7, size * 0.5]]).round()
    images = torch.zeros(2, 1, size, size)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for image, (px, py) in zip(images, start):
        image[0] = torch.exp(-((x - px) ** 2 + (y - py) ** 2) / 4)
    angle, big = torch.tensor([0.5, -2.2]), torch.tensor([1.3, 0.8])
    A = scale(big, size) @ rotation(angle, size) @ flip(torch.tensor([1.0, 0.0]), size)
    out = warp(images, A, size)[:, 0]
    mass = out.sum((1, 2))
    found = torch.stack([(out * x).sum((1, 2)) / mass, (out * y).sum((1, 2)) / mass], 1)
    assert torch.allclose(found, transform(A, start[:, None])[:, 0], atol=0.1)


def test_flip_and_quarter_turn_are_exact_rearrangements():
    image = torch.rand(1, 3, 16, 16)
    assert torch.allclose(warp(image, flip(torch.ones(1), 16), 16), image.flip(3), atol=1e-5)
    turned = warp(image, rotation(torch.tensor([math.pi / 2]), 16), 16)
    assert torch.allclose(turned, image.rot90(1, (2, 3)), atol=1e-4)       # counter-clockwise


def test_many_views_of_one_source_equal_one_at_a_time():
    image, A = torch.rand(2, 3, 20, 24), rotation(torch.rand(10), 20).view(2, 5, 3, 3)
    together = warp(image, A, 12)
    for k in range(5):
        assert torch.equal(together[:, k], warp(image, A[:, k], 12))


def test_samples_average_what_a_pixel_covers():
    """Stripes one pixel wide, halved: the mean of each pair, where plain bilinear at 0.25 aliases."""
    image = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    A = crop(torch.tensor([[31.5, 31.5]]), torch.tensor([64.0]), 32)
    assert torch.allclose(warp(image, A, 32, samples=2), torch.full((1, 1, 32, 32), 0.5), atol=1e-5)


def test_warp_keeps_its_grid_in_float32_for_half_pictures():
    ramp = torch.arange(224).float().expand(1, 1, 224, 224) / 224
    A = translation(torch.tensor([[0.25, 0.0]]))
    exact = warp(ramp, A, 224)
    for dtype in (torch.bfloat16, torch.float16):
        assert (warp(ramp.to(dtype), A, 224).float() - exact)[..., 2:].abs().max() < 0.006
    assert warp((ramp * 255).byte(), A, 224).dtype == torch.float32


def test_warp_is_differentiable_in_the_picture_and_the_transform():
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, a: warp(i, rotation(a, 6), 5), (image, angle))


def test_invert_is_the_inverse_and_ignores_the_batch():
    A = translation(torch.rand(7, 2)) @ rotation(torch.rand(7), 64) @ scale(0.5 + torch.rand(7), 64)
    assert torch.allclose(invert(A) @ A, torch.eye(3).expand(7, 3, 3), atol=1e-4)
    assert torch.equal(invert(A)[3:4], invert(A[3:4]))


def test_intrinsics_move_with_the_picture():
    """Projecting with A @ K is transforming the projection."""
    K = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], dtype=torch.float64)
    joints = torch.tensor([[0.1, -0.05, 0.7]], dtype=torch.float64)
    A = crop(points((300, 200))[0], torch.tensor([180.0], dtype=torch.float64), 224)[0]
    project = lambda K: (joints @ K.T)[:, :2] / (joints @ K.T)[:, 2:]
    assert torch.allclose(project(A @ K), transform(A, project(K)))


def test_points_are_seen_where_the_pinhole_puts_them():
    """f X / Z + c with two focal lengths: 500 x 0.1 / 0.5 + 320 and 400 x -0.2 / 0.5 + 240."""
    K = torch.tensor([[500.0, 0, 320], [0, 400, 240], [0, 0, 1]])
    assert project(torch.tensor([[0.1, -0.2, 0.5]]), K).tolist() == [[420.0, 80.0]]
    twice = project(torch.tensor([[[0.1, -0.2, 0.5]], [[0.0, 0.0, 1.0]]]), torch.stack([K, 2 * K]))
    assert twice.tolist() == [[[420.0, 80.0]], [[640.0, 480.0]]]


def test_place_finds_where_a_hand_stands_from_the_key_points_that_are_known():
    torch.manual_seed(0)
    points, t = 0.1 * torch.randn(2, 21, 3), torch.tensor([[0.05, -0.1, 0.6], [0.0, 0.2, 0.9]])
    K = torch.tensor([[300.0, 0, 120], [0, 310, 90], [0, 0, 1]]).expand(2, 3, 3)
    seen = (points + t[:, None]) @ K.mT
    uv = seen[..., :2] / seen[..., 2:]
    uv[0, 3:9] = math.nan
    assert torch.allclose(place(points, uv, K), t, atol=1e-4)


def test_an_unknown_camera_has_the_diagonal_as_its_focal_length():
    K = torch.tensor([[500.0, 0, 20], [0, 500, 24], [0, 0, 1]]).repeat(2, 1, 1)
    K[1, 0, 2] = math.nan
    found = view_intrinsics({"image": torch.zeros(2, 3, 48, 48), "K": K})
    assert torch.equal(found[0], K[0])
    assert torch.allclose(found[1], torch.tensor([[67.8822510, 0, 23.5], [0, 67.8822510, 23.5], [0, 0, 1]]))


def reference_bits(index, column, seed, crc, epoch, view):
    """The hash with Python's big integers, typed from the definition."""
    M = 2 ** 64

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % M
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % M
        return z ^ (z >> 31)

    key = seed * 0xD1342543DE82EF95 + crc * 0xA0761D6478BD642F
    key += epoch * 0xE7037ED1A0B428DB + view * 0x8EBC6AF09C88C6E3
    state = mix((index * 0x9E3779B97F4A7C15 + key) % M)
    return mix((state + (column + 1) * 0x9E3779B97F4A7C15) % M)


def test_draws_are_the_documented_hash():
    """Every bit agrees with big integers, for samples, columns, epoch and view."""
    crc = 0xEDC23D9B                                                      # CRC-32 of "crop"
    out = bits(torch.arange(40, 60), 9, 7, "crop", 3, 2)
    for i in (0, 7, 19):
        for j in (0, 4, 8):
            assert out[i, j].item() % 2 ** 64 == reference_bits(40 + i, j, 7, crc, 3, 2)
    u = uniform(torch.tensor([41]), 2, 7, "crop", 3, 2)
    assert u[0, 1].item() == (reference_bits(41, 1, 7, crc, 3, 2) >> 40) / 2 ** 24


def test_draws_depend_on_every_key_and_not_on_the_batch():
    index = torch.arange(100)
    base = uniform(index, 4, 0, "a")
    assert torch.equal(uniform(index[30:40], 4, 0, "a"), base[30:40])
    assert torch.equal(uniform(index.flip(0), 4, 0, "a").flip(0), base)
    for other in (uniform(index, 4, 1, "a"), uniform(index, 4, 0, "b"), uniform(index, 4, 0, "a", 1),
                  uniform(index, 4, 0, "a", 0, 1)):
        assert (other != base).float().mean() > 0.99
        assert abs(torch.corrcoef(torch.stack([other.flatten(), base.flatten()]))[0, 1]) < 0.15


def test_draws_have_the_right_moments():
    u = uniform(torch.arange(40000), 4, 5, "moments")
    assert u.min() >= 0 and u.max() < 1
    assert torch.allclose(u.mean(0), torch.full((4,), 0.5), atol=0.006)
    assert torch.allclose(u.var(0), torch.full((4,), 1 / 12), atol=0.002)
    assert (torch.corrcoef(u.T) - torch.eye(4)).abs().max() < 0.02
    n = normal(torch.arange(40000), 4, 5, "moments")
    assert torch.allclose(n.mean(0), torch.zeros(4), atol=0.02)
    assert torch.allclose(n.std(0), torch.ones(4), atol=0.02)
    assert torch.allclose((n ** 4).mean(0), torch.full((4,), 2.9), atol=0.15)    # Irwin-Hall of 12


def test_permutation_visits_everything_once_and_changes_with_the_epoch():
    first, second = permutation(1000, 0, 0), permutation(1000, 0, 1)
    assert torch.equal(first.sort().values, torch.arange(1000)) and not torch.equal(first, second)
    assert torch.equal(first, permutation(1000, 0, 0))


def test_geometry_keeps_float32_under_autocast():
    A, points_ = rotation(torch.tensor([0.7]), 224), 224 * torch.rand(1, 21, 2)
    image = torch.rand(1, 3, 32, 32)
    plain = transform(A, points_), warp(image, A, 32)
    with torch.autocast("cpu", torch.bfloat16):
        again = transform(A, points_), warp(image, A, 32)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


def test_a_warp_to_nowhere_is_black_and_has_gradients_without_nan():
    """grid_sample on a CPU ends the process at huge coordinates, and reads any pixel at a NaN."""
    pictures = torch.rand(4, 3, 6, 6)
    A = torch.eye(3).repeat(4, 1, 1)
    A[:, 0, 2] = torch.tensor([1e30, -1e30, math.nan, math.inf])
    A.requires_grad_()
    out = warp(pictures, A, 6)
    out.sum().backward()
    assert (out == 0).all() and A.grad[:2].isfinite().all()
