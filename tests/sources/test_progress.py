"""One trained thing on bad days: files of other runs, losses that are lost, full disks, signals, other processes."""
import json
import math
import os
import resource
import signal
import sys
import time

import pytest
import torch

import ti_net
from common import Stop, UserError, guarded, load_checkpoint
from sources import course
from sources.progress import Run
from sources.runs import open_out


def begin(folder, total=20, **more):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Run(folder, "ti_net", ti_net.Config(**more), model, optimizer, total)


def step(run, may_save=True, **terms):
    """A step of training, without a gradient, with a loss of 1 where none is given."""
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.advance({"loss": torch.tensor(1.0)} | {k: torch.tensor(v) for k, v in terms.items()}, 0, 0.1, may_save)


# ---- What a run goes on from


def put(content, name, value):
    """A copy with content["a/b/0"] = value; `del` where value is ..."""
    *path, last = [int(word) if word.isdigit() else word for word in name.split("/")]
    at = content
    for word in path:
        at = at[word]
    if value is ...:
        del at[last]
    else:
        at[last] = value


WRONG = [
    ("method", "peclr", "was written by peclr.py"), ("method", 3, "its method is no str"), ("cfg", [1], "its cfg is no dict"),
    ("step", 2.0, "its step is no int"), ("step", True, "its step is no int"), ("step", -1, "it is at step -1 of 20"),
    ("step", 21, "it is at step 21 of 20"), ("step", ..., "its step is no int"), ("memo", None, "its memo is no dict"),
    ("memo", {"curve": "long"}, "its memo holds no curve"), ("memo", {"curve": [1.0, "x"]}, "its memo holds no curve"),
    ("log_bytes", "3", "its log_bytes is no int"), ("log_bytes", -3, "its log_bytes are below 0"),
    ("model", torch.ones(2), "its model is no dict"), ("model/0.bias", torch.ones(3), "0.bias is (3,)"),
    ("model/0.bias", torch.ones(2).long(), "0.bias is (2,) torch.int64"), ("model/0.bias", ..., "0.bias is there once only"),
    ("model/0.bias", "x", "0.bias is there once only, or no tensor"), ("model/extra", torch.ones(1), "extra is there once only"),
    ("model/0.bias", torch.tensor([1, math.nan]), "0.bias is not finite"), ("optimizer", [], "its optimizer is no dict"),
    ("optimizer/state", 7, "does not fit these options"), ("optimizer/param_groups", ..., "does not fit these options"),
    ("optimizer/param_groups", [], "the optimiser has 1 groups, not 0"), ("optimizer/param_groups/0/lr", "x", "the optimiser's lr is str"),
    ("optimizer/param_groups/0/betas", 0.9, "the optimiser's betas is float"),
    ("optimizer/param_groups/0/params", [0, 1], "the optimiser has other parameters"),
    ("optimizer/state/0/exp_avg", torch.ones(5), "exp_avg of parameter 0 is (5,)"),
    ("optimizer/state/99", {"exp_avg": torch.ones(2)}, "does not fit these options")]


def test_a_last_pt_of_wrong_types_is_refused_and_what_the_sentence_says_works(tmp_path):
    run = begin(tmp_path)
    step(run)
    run.save()
    good = (tmp_path / "last.pt").read_bytes()
    for name, value, said in WRONG:
        (tmp_path / "last.pt").write_bytes(good)
        content = load_checkpoint(tmp_path / "last.pt")
        put(content, name, value)
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(UserError) as refused:
            begin(tmp_path)
        assert said in str(refused.value) and "move the file away, and --resume begins this stage anew" in str(refused.value)
    for content in ([1], torch.ones(1), {}):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(UserError, match="move the file away"):
            begin(tmp_path)
    (tmp_path / "last.pt").unlink()
    assert begin(tmp_path).step == 0
    (tmp_path / "last.pt").write_bytes(good)
    assert begin(tmp_path).step == 1


def test_other_options_are_named_each_and_places_may_change(tmp_path):
    own = dict(data=("freihand=/a", "yt3d=/b"), init="/a/weights.pt", lr=0.5, variant=("no-ordinary",))
    begin(tmp_path, **own).save()
    moved = dict(data=("freihand=/c", "yt3d=/d"), init="/c/weights.pt", workers=9, device="cuda", save_minutes=3.0, cache="x",
                 keep=0.0, out="/e", root="/f", resume=True, compile=True)
    assert begin(tmp_path, **own | moved).step == 0
    for more, said in (
            ({"lr": 0.6, "batch_size": 34}, r"was written with batch_size 68, not 34, lr 0.5, not 0.6; a resumed run cannot "
                                            "change it, so give --batch-size 68, give --lr 0.5"),
            ({"epochs": 7}, "epochs 50, not 7; .* so give --epochs 50"), ({"seed": 1}, "--seed 0"), ({"samples": 9}, "--samples"),
            ({"data": ("freihand", "coco")}, "data freihand=/a yt3d=/b, not freihand coco"), ({"backbone": "resnet10"}, "--backbone resnet50"),
            ({"init": "random"}, "init /a/weights.pt, not random"), ({"variant": ()}, "variant no-ordinary, not nothing"),
            ({"quick": True}, "give --no-quick"), ({"micro_batch": 34}, "--micro-batch 17")):
        with pytest.raises(UserError, match=said):
            begin(tmp_path, **own | more)


def test_a_run_goes_on_on_a_device_whose_optimiser_has_another_kernel(tmp_path):
    """A GPU's `fused` and a CPU's None, both ways: the state is the file's, the kernel the device's."""
    for then, now in ((True, None), (None, True)):
        folder = tmp_path / str(then)
        run = begin(folder)
        for group in run.optimizer.param_groups:
            group["fused"] = then
        step(run)
        run.save()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=now)
        again = Run(folder, "ti_net", ti_net.Config(), model, optimizer, 20)
        assert again.step == 1 and optimizer.param_groups[0]["fused"] is now
        assert float(optimizer.state_dict()["state"][0]["exp_avg"][0, 0]) == pytest.approx(0.1)
        step(again)


# ---- Losses that are lost


def test_a_lost_loss_is_named_by_its_step_and_first_term_within_the_interval_and_the_last_good_file_stays(tmp_path):
    run = begin(tmp_path, total=100)                         # a line of the log every 5 steps
    for _ in range(6):
        step(run, L_a=0.0, L_b=0.0, residual=math.nan)       # a monitor may be NaN
    run.save()
    step(run, L_a=0.0, L_b=math.inf, residual=0.0)           # what has no weight in the loss does not lose it
    step(run, loss=math.nan, L_a=0.0, L_b=math.nan, residual=0.0)
    with pytest.raises(UserError, match="not finite any more at step 8, by its term L_b; a lower --lr may help. last.pt is from step 6"):
        for _ in range(2):
            step(run, loss=math.nan, L_a=math.nan, L_b=math.nan, residual=0.0)
    assert run.step == 10 and load_checkpoint(tmp_path / "last.pt")["step"] == 6
    steps = [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").open()]
    assert steps == [None, 1, 5]


@pytest.mark.parametrize("part", ["0.weight", "1.running_var"])
def test_weights_that_are_lost_are_never_saved_though_the_loss_is_fine(tmp_path, part):
    run = begin(tmp_path, total=100)
    step(run)
    run.save()
    run.model.state_dict()[part].fill_(math.nan)
    step(run)
    for end in (run.save, lambda: step(run, may_save=False)):
        with pytest.raises(UserError, match=f"{part} is not finite any more after step .*, though the loss is"):
            end()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_the_end_of_an_epoch_is_checked_before_its_weights_may_become_the_best(tmp_path):
    run = begin(tmp_path, total=1000)
    for _ in range(2):
        step(run, may_save=True)
    with pytest.raises(UserError, match="at step 3"):
        step(run, loss=math.nan, may_save=False)


# ---- In a process of its own


class Child:
    """A function in a fork, its stderr in a file; exits with what the function returns."""

    def __init__(self, folder, function, name="stderr"):
        self.said = folder / name
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                torch.set_num_threads(1)
                file = os.open(self.said, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                code = function()
            finally:
                os._exit(code)

    def end(self):
        """Its exit code, below 0 for the signal that ended it; SIGKILL after half a minute."""
        until = time.monotonic() + 30
        while True:
            gone, status = os.waitpid(self.pid, os.WNOHANG)
            if gone:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)

    def wait_for(self, path):
        began = time.monotonic()
        while not path.exists():
            assert time.monotonic() - began < 30
            time.sleep(0.005)


def train(folder, resume=False, total=10 ** 6, pause=0.01, after=lambda run: None):
    """A command that trains in `folder`; makes folder/5 after five steps."""
    def main():
        with open_out(str(folder), "", resume) as out:
            (out / "flags.json").write_text("{}")
            run = begin(out / "pretrain", total=total)
            while run.step < total:
                step(run, may_save=True)
                time.sleep(pause)
                after(run)
                if run.step - run.first == 5:
                    (out / "5").touch()
    return lambda: guarded(main)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_says_how_to_go_on(tmp_path, number, code):
    child = Child(tmp_path, train(tmp_path / "run"))
    child.wait_for(tmp_path / "run" / "5")
    os.kill(child.pid, number)
    assert child.end() == code
    at = load_checkpoint(tmp_path / "run" / "pretrain" / "last.pt")["step"]
    lines = child.said.read_text().splitlines()
    assert lines[-1] == f"stopped at step {at}; go on with --resume --out {tmp_path}/run" and at >= 5
    assert not (tmp_path / "run" / ".lock").exists()
    again = Child(tmp_path, train(tmp_path / "run", resume=True, total=10 ** 6, after=lambda run: os.kill(os.getpid(), number)))
    assert again.end() == code and load_checkpoint(tmp_path / "run" / "pretrain" / "last.pt")["step"] == at + 2


def test_a_second_signal_ends_at_once_and_one_that_torchrun_passes_on_does_not(tmp_path):
    child = Child(tmp_path, train(tmp_path / "run", pause=0, after=lambda run: run.step == 5 and ((tmp_path / "5").touch(), time.sleep(60))))
    child.wait_for(tmp_path / "5")
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGTERM)                       # the same wish, from torchrun
    time.sleep(1.0)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0) and "a second time: at once" in child.said.read_text()
    os.kill(child.pid, signal.SIGTERM)
    assert child.end() == -signal.SIGTERM


def test_outside_training_a_signal_ends_at_once(tmp_path):
    child = Child(tmp_path, lambda: guarded(lambda: ((tmp_path / "there").touch(), time.sleep(60))))
    child.wait_for(tmp_path / "there")
    os.kill(child.pid, signal.SIGTERM)
    assert child.end() == 143 and child.said.read_text() == "stopped\n"


def test_a_file_limit_ends_the_run_in_a_sentence_and_leaves_the_last_checkpoint(tmp_path):
    def limited(run):
        if run.step == 5:
            run.save()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            run.save()

    child = Child(tmp_path, train(tmp_path / "run", after=limited))
    assert child.end() == 2
    assert child.said.read_text().splitlines()[-1] == (
        f"error: {tmp_path}/run/pretrain/last.pt: cannot be written (File too large); what stood there before is intact")
    assert load_checkpoint(tmp_path / "run" / "pretrain" / "last.pt")["step"] == 5
    assert {path.name for path in (tmp_path / "run" / "pretrain").iterdir()} == {"last.pt", "log.jsonl", "config.json"}


@pytest.mark.parametrize("moment, file", [(49, "log.jsonl"), (3, "log.jsonl")])
def test_a_folder_that_is_moved_away_ends_the_run_in_a_sentence(tmp_path, moment, file):
    def move(run):
        if run.step == moment:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            if moment == 3:
                run.save()

    child = Child(tmp_path, train(tmp_path / "run", pause=0, after=move))
    assert child.end() == 2
    assert child.said.read_text().splitlines()[-1].startswith(
        f"error: {tmp_path}/run/pretrain/{file}: cannot be written (No such file or directory)")


def test_an_error_stands_on_a_line_of_its_own_below_the_progress_bar(tmp_path, capsys):
    def main():
        for _ in range(2):
            step(begin.run)
        raise UserError("no")

    begin.run = begin(tmp_path)
    assert guarded(main) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no"
    begin.run = begin(tmp_path / "b")
    with pytest.raises(ZeroDivisionError):                   # what is nobody's but ours: the traceback begins a line, too
        guarded(lambda: step(begin.run) or 1 / 0)
    assert capsys.readouterr().err.endswith("\n")
    assert guarded((tmp_path / "absent").read_text) == 2
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path}/absent'\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not Stop.asked


# ---- Two processes


def both(tmp_path, function):
    """Exit codes of two processes of one group in which function(rank) runs under `guarded`."""
    def member(rank):
        def main():
            torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
            function(rank)
        return lambda: guarded(main)

    children = [Child(tmp_path, member(rank), f"stderr-{rank}") for rank in (0, 1)]
    return [child.end() for child in children], [child.said.read_text() for child in children]


def test_processes_stop_at_the_same_step_though_one_alone_gets_the_signal(tmp_path):
    def course(rank):
        run = begin(tmp_path)
        while run.step < 20:
            step(run, may_save=True)
            if run.step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    codes, said = both(tmp_path, course)
    assert codes == [143, 143] and "stopped at step 4" in said[0]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4


def test_processes_save_together_whatever_their_clocks_say_and_end_together_where_the_first_cannot(tmp_path):
    def course(rank):
        run = begin(tmp_path)
        run.save_seconds = 0 if rank == 1 else 1e9           # one of them thinks that it is time
        step(run, may_save=True)
        assert run.saved_step == 1
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        step(run, may_save=True)

    codes, said = both(tmp_path, course)
    assert codes == [2, 2] and "File too large" in said[0] and "the first process cannot write it" in said[1]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_processes_agree_on_a_loss_that_one_of_them_lost(tmp_path):
    def course(rank):
        run = begin(tmp_path, total=40)
        for k in range(1, 5):
            step(run, loss=math.nan if (rank, k) in ((1, 3), (0, 4)) else 1.0)

    codes, said = both(tmp_path, course)
    assert codes == [2, 2] and all("not finite any more at step 3;" in text for text in said)


def test_a_process_whose_neighbour_ended_says_so_in_a_sentence(tmp_path):
    def course(rank):
        if rank == 0:
            raise UserError("no")
        torch.distributed.barrier()

    codes, said = both(tmp_path, course)
    assert codes == [2, 2] and said[0].splitlines()[-1] == "error: no"
    assert said[1].splitlines()[-1] == "error: another process of this job ended, and says why unless it was killed; go on with --resume"


# ---- The stages of a command


def test_the_stages_of_a_command_are_counted_and_the_time_of_later_ones_is_told(monkeypatch, capsys):
    """Work 100, 50 and 25: a third of the first in 10 s leaves 20 s of it, and 75 x 0.3 s of the others; later stages
    are as fast as all before: the second, begun half done, takes 5 s for 25, so 15 s a 125 of work."""
    clock = [0.0]
    monkeypatch.setattr(course.time, "monotonic", lambda: clock[0])
    one = course.Course()
    one.plan({"a": 100.0, "b": 50.0, "scoring": 25.0})
    one.begin("a")
    assert one.left(0.0) == (math.inf, math.inf)
    clock[0] = 10.0
    assert one.left(1 / 3) == pytest.approx((20, 20 + 75 * 0.3))
    one.left(1.0)
    one.begin("b", share=0.5)
    clock[0] = 15.0
    assert one.left(1.0) == pytest.approx((0, 25 * 15 / 125))
    one.begin("scoring")
    one.begin("elsewhere")
    assert capsys.readouterr().out.splitlines() == ["stage 1 of 3: a", "stage 2 of 3: b", "stage 3 of 3: scoring"]
    clock[0] = 17.0
    assert one.left(0.5) == (2, 2)                                      # a stage that no plan knows
    assert [course.spelled(s) for s in (40.4, 186, 8640)] == ["40 s", "3.1 min", "2.4 h"]
