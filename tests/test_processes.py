"""Several processes: the same step, the same log, the same end; what becomes of a job when one of them ends.

tests/processes.py does this with the real commands under torchrun, for every stage.
"""
import json
import math
import os
import signal
import time

import pytest
import torch
from tqdm import tqdm

import handmim
import peclr
import ti_net
from common import Stop, UserError, load_checkpoint, rank, start, unwrapped, world
from group import ends, on_processes
from hand.builtin import builtin_hand
from sources.progress import Run
from sources.steps import MicroBatches

SMALL = ("--finetune synthetic:calm --image-size 32 --samples 24 --batch-size 24 --micro-batch 4 --workers 0 --device cpu "
         "--mano builtin --precision fp32 --backbone")


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """What processes need is made before they are forked; and they draw no pictures."""
    builtin_hand()
    monkeypatch.setattr("hand.drawing.save_picture", lambda *_: None)


# ---- Nothing happens


class Seen(Exception):
    """The first step's gradients are there."""


def gradients(script, words):
    """Gradients of a script's first step of fine-tuning, in float64, as its own loop makes them."""
    plain = {name: getattr(script, name) for name in ("normalise", "parallel", "finetune_step")}
    found = {}

    def exact(net, batch, *rest):
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        return plain["finetune_step"](net, batch, *rest)

    def parallel(model, *rest):
        found["net"] = plain["parallel"](model.double(), *rest)
        return found["net"]

    def stop(*_, **__):
        raise Seen

    script.normalise = lambda x: plain["normalise"](x).double()
    script.parallel, script.finetune_step = parallel, exact
    torch.optim.AdamW.step = torch.optim.Adam.step = stop
    with pytest.raises(Seen):
        script.main(f"{SMALL} {words} --out on-{world()}-of-{os.environ.get('WORLD_SIZE', 1)}".split())
    return {n: p.grad for n, p in unwrapped(found["net"]).named_parameters() if p.grad is not None}


@pytest.mark.parametrize("script, backbone", [(ti_net, "resnet10"), (handmim, "vit_mini"), (peclr, "resnet10")])
def test_a_step_of_fine_tuning_is_the_same_on_one_and_three_processes(here, script, backbone):
    one, three = (on_processes(here, count, lambda: gradients(script, backbone))[0] for count in (1, 3))
    assert one.keys() == three.keys() and len(one) > 20
    # a bias before BatchNorm has no gradient but rounding: 1e-10 of a millionth of the largest, at least
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    for name, gradient in one.items():
        scale = max(float(gradient.abs().max()), 1e-6 * largest)
        assert float((gradient - three[name]).abs().max()) < 1e-10 * scale, name


def test_a_line_of_the_log_is_the_mean_over_all_processes(tmp_path):
    def course():
        start("cpu")
        model = torch.nn.Linear(2, 2)
        run = Run(tmp_path, "ti_net", ti_net.Config(), model, torch.optim.AdamW(model.parameters()), 20)
        run.advance({"loss": torch.tensor(1.0 + rank()), "L_a": torch.tensor([0.5, math.nan, 0.5][rank()])}, 0, 0.1, True)

    on_processes(tmp_path, 3, course)
    _, line = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert line["loss"] == 2.0 and math.isnan(line["L_a"])


# ---- Something happens


def course(trouble, name="run"):
    """TI-Net's fine-tuning, 4 steps; the last process has its trouble before the third."""
    plain, asked = MicroBatches.__getitem__, []

    def read(self, k):
        asked.extend([self] if k == 0 else [])
        if len(asked) == 3 and rank() == world() - 1:
            trouble()
        return plain(self, k)

    MicroBatches.__getitem__ = read
    return ti_net.main(f"{SMALL} resnet10 --samples 48 --epochs 2 --save-minutes 1e-6 --out {name}".split())


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def unreadable():
    raise UserError("frames/7.jpg: cannot be read")


LOST = "error: another process of this job ended, and says why unless it was killed; go on with --resume"


def test_a_process_that_is_killed_ends_the_job_which_torchrun_s_restart_takes_to_the_same_end(here, monkeypatch):
    on_processes(here, 2, lambda: course(lambda: None, "straight"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    began = time.monotonic()
    codes, said = ends(here, 2, lambda: course(killed))
    assert codes == [2, -signal.SIGKILL] and time.monotonic() - began < 60
    assert said[0].splitlines()[-1] == LOST and "Traceback" not in said[0]
    assert load_checkpoint(here / "run" / "finetune-scratch" / "last.pt")["step"] == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    on_processes(here, 2, lambda: course(lambda: None))
    assert "going on at step 2 of 4" in (here / "said-0").read_text()
    one, two = (load_checkpoint(here / name / "finetune.pt")["model"] for name in ("straight", "run"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    one, two = ((here / name / "finetune-scratch" / "log.jsonl").read_text().splitlines()[1:] for name in ("straight", "run"))
    assert one == two and len(one) == 6


def test_a_picture_that_one_process_cannot_read_ends_the_job_in_its_sentence(here):
    began = time.monotonic()
    codes, said = ends(here, 3, lambda: course(unreadable))
    assert codes == [2, 2, 2] and time.monotonic() - began < 60
    assert [text.splitlines()[-1] for text in said] == [LOST, LOST, "error: frames/7.jpg: cannot be read"]
    assert all("\n\nerror: " in f"\n{text}" for text in said[1:])        # below the bar, which the first process draws


@pytest.mark.parametrize("moment, code", [("before", 143), ("after", 2)])
def test_torchrun_s_signal_does_not_silence_a_process_that_has_lost_another(tmp_path, moment, code):
    """The signal comes at the same time: before the broken connection is seen, or while that is being said."""
    bars = []

    def lonely():
        start("cpu")
        if rank() == 1:
            killed()
        signalled = lambda: os.kill(os.getpid(), signal.SIGTERM)
        Stop.patient = moment == "before"                          # as in a training loop
        try:
            torch.distributed.barrier()
        finally:
            if moment == "before":
                signalled()
            else:
                bars.append(tqdm(total=1, disable=False))
                bars[0].close = signalled

    codes, said = ends(tmp_path, 2, lonely)
    assert codes == [code, -signal.SIGKILL] and said[0].endswith(f"{LOST}\n")
