"""README's commands are accepted by the programs they name, and its snippets run on what they say."""
import re
import shlex
from pathlib import Path

import pytest

import eval as judge
from common import UserError
from test_reproduce import SCRIPTS, accepted

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^ {4}((?:python|torchrun) .*?)(?: {2,}#.*| # .*)?$", TEXT, re.M)
COMMANDS += re.findall(r"`(python [\w/]+\.py [^`]*)`", TEXT)
OURS = [line for line in COMMANDS if re.search(r"(^|\s)(?:%s)" % "|".join([*SCRIPTS, "eval.py"]), line)]


def words_of(line):
    """A command's words from the script on, its places for the reader filled in."""
    words = shlex.split(line.partition(" && ")[0])
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    return [word for word in words if word not in ("...", "|")]


def test_readme_has_the_commands_of_every_program():
    assert len(OURS) > 35 and {words_of(line)[0] for line in OURS} == {*SCRIPTS, "eval.py"}


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_readme_is_accepted(line, monkeypatch):
    """As far as a command is checked before any data are read."""
    words = words_of(line)
    if words[0] != "eval.py":
        accepted(words)
        return
    reached = []
    for name in ("judge", "inspect", "own_pictures", "own_cameras", "draw_curve"):
        monkeypatch.setattr(judge, name, lambda *args, name=name: reached.append(name))
    judge.main(words[1:])
    assert len(reached) == 1


def test_a_command_that_readme_gets_wrong_would_be_seen():
    with pytest.raises((UserError, SystemExit)):
        accepted(["ti_net.py", "--no-such-flag"])
