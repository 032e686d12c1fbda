"""The bench's counts are true: bytes against torch's allocator, FLOPs against numbers worked out by hand."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benches.counting import apart
from benches import profiling
from benches.measuring import peak_of
from benches.profiling import PARTS, seconds_of
from benches.stages import STAGES, batch_of, chosen
from common import UserError
import ti_net


BYTES = dict(image_size=64, backbone="vit_mini", batch_size=16, micro_batch=16, precision="fp32")
COUNT = """
import json, sys
from benches.counting import bytes_of, flops_of
from benches.stages import STAGES
tuning, views = STAGES["handmim:finetune"], STAGES["hamuco:train"]
sizes = json.loads(sys.argv[1])
small = tuning.config(image_size=32, backbone="vit_mini", batch_size=2, micro_batch=2, precision="fp32")
eight = views.config(image_size=64, backbone="resnet18", batch_size=2, micro_batch=2, views=8, precision="fp32")
print(json.dumps([[bytes_of(tuning, tuning.config(recompute=again, **sizes), 16)._asdict() for again in (False, True)],
                  flops_of(tuning, small, 2), flops_of(views, eight, 2)]))
"""


@pytest.fixture(scope="module")
def counted():
    """Counts of a process of its own: a backward pass of fake tensors forbids this one to fork, as other tests do."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", COUNT, json.dumps(BYTES)], capture_output=True, text=True, timeout=300,
                          cwd=here, env=os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recompute", [False, True])
def test_counted_bytes_are_those_that_the_allocator_gives(counted, recompute):
    """A step's peak within 3 %. (Of convolutions oneDNN's scratch comes on top, some copies of the largest weight.)"""
    stage = STAGES["handmim:finetune"]
    cfg = stage.config(recompute=recompute, **BYTES)
    found = counted[0][recompute]
    model, batch = stage.build(cfg), batch_of(stage, cfg, 16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    measured = peak_of(lambda: stage.step(model, model, [batch], cfg))
    before = sum(found[name] for name in ("network", "gradients", "optimizer", "inputs"))
    assert found["peak"] == pytest.approx(before + measured, rel=0.03)
    assert found["peak"] - before < (20 if recompute else 50) * 2 ** 20


def test_counted_flops_are_three_forward_passes(counted):
    """ViT-mini at 32 px: 17 tokens of width 128 through 4 blocks, and patches of 8 x 8 x 3; heads beside."""
    N, D = 17, 128
    block = 12 * N * D * D + 2 * N * N * D
    encoder = 2 * (4 * block + 16 * 8 * 8 * 3 * D)
    rectifier = 21 * (128 * 128 + 256 * 64 + 192 * 64) + (64 * 21 + 128 + 109) * 1024 + 1024 * 1024 + 1024 * 109
    expected = 3 * (encoder + 3 * 2 * rectifier)
    assert counted[1] / 2 == pytest.approx(expected, rel=0.05)


def test_every_view_of_a_moment_is_counted(counted):
    """ResNet-18 at 64 px: 1.81 GMAC at 224 px, the same a pixel, in each of 8 views; the rest of HaMuCo is small beside."""
    encoders = 3 * 2 * 1.81e9 * (64 / 224) ** 2 * 8
    assert encoders < counted[2] / 2 < 2 * encoders


def test_a_profile_s_parts_make_the_step_and_what_is_outside_the_network_is_found(monkeypatch, tmp_path):
    """Views that idle for 0.2 s of processor time are found as views, and the parts' sum is the clock's."""
    stage, views = STAGES["ti_net:finetune"], ti_net.hand_view
    cfg = stage.config(image_size=32, backbone="resnet10", batch_size=2, micro_batch=2, precision="fp32", workers=0)

    def slow(*words):
        began = time.process_time()
        while time.process_time() < began + 0.2:
            pass
        return views(*words)

    monkeypatch.setattr(ti_net, "hand_view", slow)
    monkeypatch.setattr(profiling, "peak_of", lambda step: step() or 7)
    began = time.perf_counter()
    spent, bare, peak = seconds_of(stage, cfg, torch.device("cpu"), str(tmp_path), rounds=1)
    took = time.perf_counter() - began
    assert set(spent) <= set(PARTS) and all(part in spent for part in ("data", "views", "forward", "backward", "optimiser"))
    assert 0.2 < spent["views"] < sum(spent.values()) < took and 0 < bare < took and peak == 7


def test_what_is_counted_apart_comes_back_or_fails_aloud():
    parent = os.getpid()
    assert apart(lambda: (os.getpid() != parent, torch.get_num_threads())) == (True, 1)
    with pytest.raises(RuntimeError, match="division by zero"):
        apart(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="ended without a word"):
        apart(lambda: os._exit(9))


def test_stages_are_chosen_by_script_or_by_name():
    assert [stage.name for stage in chosen(["peclr", "ti_net:finetune"])] == [
        "ti_net:finetune", "peclr:pretrain", "peclr:finetune"]
    assert len(chosen([])) == 7
    with pytest.raises(UserError, match="peclr:probe: no such script or stage"):
        chosen(["peclr:probe"])
