"""What stands between a command and its run folder: names, refusals, flags that are remembered."""
import json
import os
import signal
import time
from pathlib import Path

import pytest

import ti_net
from common import UserError, save_checkpoint
from sources.runs import open_out, recall, remember


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        with open_out("/proc/nowhere/run", "x", False):
            pass


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/a", "runs/a-2", "runs/a-3"):
        with open_out("", "runs/a", False) as folder:
            assert str(folder) == expected
            remember(folder, {})
    with open_out("", "runs/a", True) as folder:
        assert str(folder) == "runs/a-3"


def test_a_failed_start_leaves_nothing_and_a_later_failure_keeps_the_run(tmp_path):
    with pytest.raises(UserError):
        with open_out(str(tmp_path / "a"), "x", False) as folder:
            (folder / "views.png").touch()
            raise UserError("no")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError):
        with open_out(str(tmp_path / "b"), "x", False) as folder:
            save_checkpoint(folder / "last.pt", {"step": 1})
            raise UserError("no")
    assert (tmp_path / "b" / "last.pt").exists()


def test_a_resumed_command_remembers_its_flags_and_those_given_now_win(tmp_path):
    remember(tmp_path, {"out": str(tmp_path), "resume": False, "data": ("a", "b"), "epochs": 3})
    assert json.loads((tmp_path / "flags.json").read_text()) == {"data": ["a", "b"], "epochs": 3}
    now = {"out": str(tmp_path), "resume": True, "epochs": 5}
    assert recall(ti_net.Config, now) == now | {"data": ("a", "b")}
    assert recall(ti_net.Config, now | {"resume": False}) == now | {"resume": False}


WRONG = [
    (b"{", "is damaged"), (b"\xff\xfe", "is damaged"), (b"[" * 100_000, "is damaged"), (b"[1]", "is no object of options"),
    (b'{"learning_rate": 1}', "holds 'learning_rate', which is no option of this command"),
    (b'{"epochs": "3"}', "holds epochs '3', which is of another type"), (b'{"epochs": true}', "holds epochs True"),
    (b'{"epochs": 1.5}', "holds epochs 1.5"), (b'{"data": "a"}', "holds data 'a'"), (b'{"data": [1]}', "holds data [1]"),
    (b'{"seed": [1]}', "holds seed [1]"), (b'{"backbone": "resnet7"}', "holds backbone 'resnet7', which is no choice"),
    (b'{"lr": null}', "holds lr None"), (b'{"variant": ["x"]}', "which is no choice")]


def test_flags_that_are_damaged_or_of_another_command_are_said_and_giving_them_again_works(tmp_path, capsys):
    now = {"out": str(tmp_path), "resume": True, "workers": 3}
    for text, said in WRONG:
        (tmp_path / "flags.json").write_bytes(text)
        with pytest.raises(UserError) as refused:
            recall(ti_net.Config, now)
        assert said in str(refused.value) and "give the run's flags again beside --resume, or move the file away" in str(refused.value)
        assert recall(ti_net.Config, now | {"epochs": 5}) == now | {"epochs": 5}
        assert said in capsys.readouterr().out
    (tmp_path / "flags.json").unlink()
    assert recall(ti_net.Config, now) == now
    (tmp_path / "flags.json").write_text('{"lr": 1, "data": ["a=b"], "quick": true, "variant": []}')
    assert recall(ti_net.Config, now) == now | {"lr": 1, "data": ("a=b",), "quick": True, "variant": ()}


def test_flags_of_a_run_that_has_a_checkpoint_are_not_replaced_by_those_of_a_refused_command(tmp_path):
    assert remember(tmp_path, {"epochs": 3, "cache": str(tmp_path)}) == {"epochs": 3, "cache": str(tmp_path), "out": str(tmp_path)}
    remember(tmp_path, {"epochs": 4})
    assert json.loads((tmp_path / "flags.json").read_text()) == {"epochs": 4}
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    remember(tmp_path, {"epochs": 5})
    assert json.loads((tmp_path / "flags.json").read_text()) == {"epochs": 4}


def test_two_runs_do_not_write_into_one_folder_and_a_kill_frees_it(tmp_path):
    child = os.fork()
    if not child:
        with open_out(str(tmp_path / "run"), "", False) as folder:
            if not os.fork():                              # a data worker, which outlives the run for a while
                time.sleep(3)
                os._exit(0)
            (folder / "flags.json").write_text("{}")
            time.sleep(20)
            os._exit(0)
    while not (tmp_path / "run" / "flags.json").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="run: another run writes there; wait for its end, or take another folder"):
        with open_out(str(tmp_path / "run"), "", True):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_out(str(tmp_path / "run"), "", True) as folder:
        assert (folder / ".lock").exists()
    assert [path.name for path in folder.iterdir()] == ["flags.json"]


def test_two_that_start_at_once_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)                   # each looked before the other made its own
    with open_out("", f"{tmp_path}/a", False) as one, open_out("", f"{tmp_path}/a", False) as other:
        assert [one.name, other.name] == ["a", "a-2"]


def test_resume_in_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run .neither flags.json nor a last.pt.; start one without --resume"):
        with open_out(str(tmp_path), "", True):
            pass
    with open_out(str(tmp_path), "", False):                                  # and that works
        pass


@pytest.mark.parametrize("name", ["none", "job-7"])
def test_a_command_that_torchrun_starts_again_goes_on_in_its_own_folder(tmp_path, monkeypatch, name):
    def opened(start, out="", most=3, run=name, parent=5):
        monkeypatch.setattr("os.getppid", lambda: parent)
        for word, value in (("MAX_RESTARTS", most), ("RESTART_COUNT", start), ("RUN_ID", run)):
            monkeypatch.setenv(f"TORCHELASTIC_{word}", str(value))
        with open_out(str(out), f"{tmp_path}/a", False) as folder:
            (folder / "flags.json").write_text("{}")
            return folder.name

    assert [opened(0), opened(1), opened(2)] == ["a", "a", "a"]
    assert [opened(0), opened(1)] == ["a-2", "a-2"]
    assert opened(1, tmp_path / "b") == "b" and opened(2, tmp_path / "b") == "b"      # killed before it had one
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "flags.json").write_text("{}")                                # another's run
    for start in (0, 1):
        with pytest.raises(UserError, match="holds something already"):
            opened(start, tmp_path / "c")
    with pytest.raises(UserError, match="holds something already"):
        opened(1, tmp_path / "b", **({"parent": 6} if name == "none" else {"run": "job-8"}))
    assert opened(0, most=0) == "a-3" and not (tmp_path / "a-3" / ".job").exists()


def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path):
    (tmp_path / "run" / "pretrain-x").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    left = [tmp_path / "run" / ".flags.json.123", tmp_path / "run" / "pretrain-x" / ".last.pt.4567"]
    stays = [tmp_path / "run" / "flags.json", tmp_path / "run" / "pretrain-x" / "log.jsonl", tmp_path / "run" / "backbone.7"]
    index = [tmp_path / "cache" / name for name in ("index-ab.99.part", "index-cd.99.part", "synthetic-0123abcd.part")]
    for path in (*left, *stays, *index):
        path.write_text("x")
    for path in (index[0], index[2]):
        os.utime(path, (0, 0))                                                # index-cd may be written right now
    with open_out(str(tmp_path / "run"), "", True) as out:
        remember(out, {"cache": str(tmp_path / "cache")})
    assert not any(path.exists() for path in (*left, index[0]))
    assert all(path.exists() for path in (*stays, *index[1:]))
