"""The shape of the project: who imports whom, how long and how wide files are, what no file may hold."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The floors from the ground up; the four papers share one and do not import each other.
FLOORS = [["common"], ["hand"], ["sources"], ["hamuco", "handmim", "peclr", "ti_net"], ["eval"]]
LINES = {"common.py": 1600, "eval.py": 1100, "sources/synthetic.py": 600}
LINES_OF_A_FLOOR = {"hand": 600, "sources": 250}
LINES_OF_A_SCRIPT = 1400
WIDTH = 100
PRODUCT = sorted(str(path.relative_to(ROOT)) for pattern in ("*.py", "hand/*.py", "sources/*.py")
                 for path in ROOT.glob(pattern))
# Folders of the machine that something was written on, and addresses of package mirrors.
MACHINE = re.compile(r"(?<![\w.])/(?:work|farm|root|home|mnt)/\w|--(?:extra-)?index-url")


def floor_of(module):
    """The number of the floor that a module or one of its files stands on; None if it is not ours."""
    home = module.split(".")[0]
    return next((k for k, names in enumerate(FLOORS) if home in names), None)


def imports(text):
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def wrong_imports(file, text):
    """What a file imports from its own floor's neighbours or from a floor above."""
    home = file.removesuffix(".py").split("/")[0]
    here = floor_of(home)
    return sorted(name for name in imports(text) if name.split(".")[0] != home
                  and floor_of(name) is not None and floor_of(name) >= here)


def test_every_file_stands_on_a_floor():
    assert PRODUCT and all(floor_of(file.removesuffix(".py").split("/")[0]) is not None for file in PRODUCT)


@pytest.mark.parametrize("file", PRODUCT)
def test_imports_run_downward(file):
    assert wrong_imports(file, (ROOT / file).read_text()) == []


def test_an_import_upward_or_sideways_would_be_seen():
    assert wrong_imports("common.py", "def f():\n    from hand.builtin import builtin_hand") == ["hand.builtin"]
    assert wrong_imports("peclr.py", "import math, ti_net") == ["ti_net"]
    assert wrong_imports("hand/render.py", "import sources") == ["sources"]
    assert wrong_imports("sources/coco.py", "from common import x\nfrom sources.index import y") == []


@pytest.mark.parametrize("file", PRODUCT)
def test_a_file_is_no_longer_than_its_floor_allows(file):
    limit = LINES.get(file, LINES_OF_A_FLOOR.get(file.split("/")[0], LINES_OF_A_SCRIPT))
    count = (ROOT / file).read_text().count("\n")
    assert count <= limit, "which floor do the rest belong on?"


@pytest.mark.parametrize("file", PRODUCT)
def test_lines_are_at_most_100_columns_wide(file):
    lines = (ROOT / file).read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []


def test_no_file_names_a_folder_of_one_machine():
    texts = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".md", ".txt", ".toml", ".sh")]
    texts += [ROOT / ".ci" / "run"]
    own = [path for path in texts if not {"data", "runs", "cache"} & set(path.relative_to(ROOT).parts)
           and not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1] if part != ".ci")]
    found = [f"{path.relative_to(ROOT)}: {MACHINE.search(path.read_text()).group()}" for path in own
             if path != Path(__file__) and MACHINE.search(path.read_text())]
    assert found == []


ONE_SYSTEM = {"fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "tty", "winreg"}


def of_one_system(text: str) -> list[str]:
    """What a file asks of the system that not every one gives: text files in UTF-8, and modules that it loads unasked."""
    tree = ast.parse(text)
    found = [f"{node.lineno}: {name.name}" for node in tree.body if isinstance(node, ast.Import) for name in node.names
             if name.name in ONE_SYSTEM]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(word.arg in ("encoding", None) for word in node.keywords):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            plain = name == "open" and isinstance(node.func, ast.Name)
            mode = node.args[1] if plain and len(node.args) > 1 else ast.Constant("r")
            if (plain and "b" not in ast.literal_eval(mode)) or len(node.args) == {"read_text": 0, "write_text": 1}.get(name):
                found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("file", PRODUCT)
def test_a_file_asks_for_nothing_that_one_system_has(file):
    assert not of_one_system((ROOT / file).read_text(encoding="utf-8"))


def test_what_one_system_has_would_be_seen():
    assert of_one_system("import fcntl") == ["1: fcntl"] and not of_one_system("try:\n    import fcntl\nexcept ImportError:\n    pass")
    assert len(of_one_system("open(a)\nopen(a, 'w')\na.read_text()\na.write_text(b)")) == 4
    assert not of_one_system("open(a, 'rb')\nopen(a, encoding='utf-8')\na.read_text('utf-8')\na.write_text(b, encoding='utf-8')")
