"""Devices without float64, as Apple's: nothing asks them for it. There is none here, so a fake GPU refuses it."""
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import common
import hamuco
import handmim
from common import UserError, batch_statistics
from sources.predictors import answer, scored_on
from sources.reading import to_device
from steps import STAGES, Watch, samples_of, stage_of


class Refuses(Watch):
    """A device "cuda" on which a tensor of float64 is an error, as on "mps"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float64 and x.device.type == "cuda":
                raise TypeError(f"{func}: this device has no float64")
        return out


@pytest.mark.parametrize("script, name", STAGES)
def test_training_and_answers_ask_the_device_for_no_float64(script, name, monkeypatch):
    monkeypatch.setattr(common, "WITHOUT_FLOAT64", ("cuda",))
    stage = stage_of(script, name)
    batch = samples_of(stage, 2)
    assert not [key for key, x in batch.items() if isinstance(x, Tensor) and x.dtype == torch.float64]
    common._made.cache_clear()
    try:
        with (FakeTensorMode() as fake, torch.backends.cudnn.flags(enabled=False),
              mock.patch.object(handmim, "draw_masks", lambda index, grid, *_: torch.zeros(len(index), 2, grid ** 2, dtype=torch.bool)),
              mock.patch.object(nn.init, "trunc_normal_", lambda x, **_: x)):
            batch = pytree.tree_map(lambda x: fake.from_tensor(x) if isinstance(x, Tensor) else x, batch)
            with torch.device("cuda"):
                net = stage.model()
            with Refuses(batch["image"].shape[:-3].numel()):
                with batch_statistics(net.train()):
                    terms = stage.terms(net, to_device(batch, "cuda"))
                assert {x.device.type for x in terms.values()} == {"cuda"}
                if name == "pretrain":
                    return
                with torch.no_grad():
                    pred = answer(net, batch)                     # a batch that is to be judged is on the CPU
                assert {x.device.type for x in pytree.tree_leaves(pred)} == {"cpu"}
    finally:
        common._made.cache_clear()


def test_what_is_judged_is_judged_where_float64_is():
    assert scored_on(torch.device("mps")) == torch.device("cpu")
    assert scored_on(torch.device("cuda", 1)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--supervision triangulated: needs float64, which --device mps:0 does not have"):
        hamuco.stage_config({"supervision": "triangulated", "device": "mps:0"})
