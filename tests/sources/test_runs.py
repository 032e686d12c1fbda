"""What stands between a command and its run folder: names, refusals, flags that are remembered."""
import json

import pytest

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
    assert recall(now) == now | {"data": ("a", "b")}
    assert recall(now | {"resume": False}) == now | {"resume": False}
    (tmp_path / "flags.json").write_text("{")
    with pytest.raises(UserError, match="flags.json: is damaged"):
        recall(now)
