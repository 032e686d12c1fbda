"""The bench's counts are true: bytes against torch's allocator, FLOPs against numbers worked out by hand."""
import pytest
import torch

from benches.counting import bytes_of, flops_of
from benches.measuring import peak_of
from benches.stages import STAGES, batch_of, chosen
from common import UserError


@pytest.mark.parametrize("recompute", [False, True])
def test_counted_bytes_are_those_that_the_allocator_gives(recompute):
    """A step's peak within 3 %. (Of convolutions oneDNN's scratch comes on top, some copies of the largest weight.)"""
    stage = STAGES["handmim:finetune"]
    cfg = stage.config(image_size=64, backbone="vit_mini", batch_size=16, micro_batch=16, recompute=recompute,
                       precision="fp32")
    counted = bytes_of(stage, cfg, 16)
    model, batch = stage.build(cfg), batch_of(stage, cfg, 16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    measured = peak_of(lambda: stage.step(model, model, [batch], cfg))
    before = counted.network + counted.gradients + counted.optimizer + counted.inputs
    assert counted.peak == pytest.approx(before + measured, rel=0.03)
    assert counted.peak - before < (20 if recompute else 50) * 2 ** 20


def test_counted_flops_are_three_forward_passes():
    """ViT-mini at 32 px: 17 tokens of width 128 through 4 blocks, and patches of 8 x 8 x 3; heads beside."""
    stage = STAGES["handmim:finetune"]
    cfg = stage.config(image_size=32, backbone="vit_mini", batch_size=2, micro_batch=2, precision="fp32")
    N, D = 17, 128
    block = 12 * N * D * D + 2 * N * N * D
    encoder = 2 * (4 * block + 16 * 8 * 8 * 3 * D)
    rectifier = 21 * (128 * 128 + 256 * 64 + 192 * 64) + (64 * 21 + 128 + 109) * 1024 + 1024 * 1024 + 1024 * 109
    expected = 3 * (encoder + 3 * 2 * rectifier)
    assert flops_of(stage, cfg, 2) / 2 == pytest.approx(expected, rel=0.05)


def test_every_view_of_a_moment_is_counted():
    """ResNet-18 at 64 px: 1.81 GMAC at 224 px, the same a pixel, in each of 8 views; the rest of HaMuCo is small beside."""
    stage = STAGES["hamuco:train"]
    cfg = stage.config(image_size=64, backbone="resnet18", batch_size=2, micro_batch=2, views=8, precision="fp32")
    encoders = 3 * 2 * 1.81e9 * (64 / 224) ** 2 * 8
    assert encoders < flops_of(stage, cfg, 2) / 2 < 2 * encoders


def test_stages_are_chosen_by_script_or_by_name():
    assert [stage.name for stage in chosen(["peclr", "ti_net:finetune"])] == [
        "ti_net:finetune", "peclr:pretrain", "peclr:finetune"]
    assert len(chosen([])) == 7
    with pytest.raises(UserError, match="peclr:probe: no such script or stage"):
        chosen(["peclr:probe"])
