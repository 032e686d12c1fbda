"""Colours, blur and solarisation against torchvision's own and literal numbers."""
import pytest
import torch

from common import blur, jitter_colour, solarise, to_grey


def test_jitter_is_torchvision_s_one_step_after_the_other():
    from torchvision.transforms import functional as TF
    torch.manual_seed(0)
    images = torch.rand(6, 3, 9, 9, dtype=torch.float64)
    factors = torch.tensor([[1.3, 0.7, 1.2, 0.1], [0.6, 1.4, 0.8, -0.1], [1, 1, 1, 0], [1, 1, 1, 0.4],
                            [1.2, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
    found = jitter_colour(images, factors)
    for image, (b, c, s, h), out in zip(images, factors.tolist(), found):
        expected = TF.adjust_brightness(image, b)
        expected = TF.adjust_saturation(TF.adjust_contrast(expected, c), s)
        assert torch.allclose(out, TF.adjust_hue(expected, h), atol=2e-3), (b, c, s, h)   # .2989 for .299
    assert torch.allclose(found[2], images[2], atol=1e-12)


def test_grey_blur_and_solarise_act_where_they_should():
    images = torch.zeros(2, 3, 15, 15)
    images[:, 0, 7, 7] = 1.0
    on = torch.tensor([True, False])
    grey = to_grey(images, on)
    assert grey[0, :, 7, 7].tolist() == pytest.approx([0.299] * 3) and torch.equal(grey[1], images[1])
    soft = blur(images, torch.tensor([1.5, 0.0]))
    assert torch.equal(soft[1], images[1])
    x = torch.arange(-6, 7)
    bell = torch.exp(-x ** 2 / (2 * 1.5 ** 2)) / torch.exp(-x ** 2 / (2 * 1.5 ** 2)).sum()
    assert torch.allclose(soft[0, 0, 1:14, 1:14], bell[:, None] * bell, atol=1e-6)
    solar = solarise(torch.tensor([0.2, 0.5, 0.9]).expand(2, 3, 1, 3), on)
    assert solar[0, 0, 0].tolist() == pytest.approx([0.2, 0.5, 0.1])
    assert solar[1, 0, 0].tolist() == pytest.approx([0.2, 0.5, 0.9])
