"""Break one line at a time and see a named test turn red.

    python tests/mutants.py                  every fault in tests/faults/
    python tests/mutants.py ti_net hand      those of some files
    python tests/mutants.py ti_net:3         one of them

Each fault: file, line as it stands, line as broken, the test file and the part of the test's name that
must fail. Runs on a copy of the tree; the tests of a fault must pass unbroken and fail broken.
"""
from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")         # as common.py, before torch is loaded
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
sys.dont_write_bytecode = True

import pytest
import scipy.optimize      # noqa: F401    what the tests load, once for all forks
import torch._dynamo       # noqa: F401
import torchvision         # noqa: F401

ROOT = Path(__file__).parent.parent
FAULTS = {file.stem: runpy.run_path(str(file))["FAULTS"]
          for file in sorted((ROOT / "tests" / "faults").glob("*.py"))}
LEFT_BEHIND = (".git", ".venv", "runs", "cache", "data", "__pycache__")


def chosen(words: list[str]) -> list[tuple[str, int]]:
    """Names and numbers of the faults that the command line asks for, all without a word."""
    out = []
    for word in words or FAULTS:
        name, _, number = word.partition(":")
        if name not in FAULTS:
            raise SystemExit(f"{name}: no such file in tests/faults ({', '.join(FAULTS)})")
        out += [(name, int(number))] if number else [(name, k) for k in range(len(FAULTS[name]))]
    return out


def passes(tree: Path, tests: str, words: str) -> bool:
    """Whether the chosen tests pass in a tree: in a fork, which has the packages loaded already."""
    some = ["-k", words] if words else []
    said = tree.parent / "said.txt"
    child = os.fork()
    if not child:
        os.chdir(tree)
        sys.path[:] = [place for place in sys.path if place != str(ROOT / "tests")]
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}", *some]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (3, 4, 5):                              # pytest's own errors; a crash is a death
        raise SystemExit(f"{tests} -k {words!r}: pytest could not run it\n{said.read_text()[-1500:]}")
    return code == 0


def main() -> int:
    wanted, began = chosen(sys.argv[1:]), time.monotonic()
    survived: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        unbroken: set[tuple[str, str]] = set()
        for name, number in wanted:
            file, old, new, tests, words = FAULTS[name][number]
            text = (ROOT / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{name}:{number}: {file} holds {old!r} {text.count(old)} times, not once")
            if (tests, words) not in unbroken and not passes(tree, tests, words):
                raise SystemExit(f"{name}:{number}: {tests} -k {words!r} fails before anything is broken")
            unbroken.add((tests, words))
            (tree / file).write_text(text.replace(old, new))
            killed = not passes(tree, tests, words)
            (tree / file).write_text(text)
            survived[name] = survived.get(name, 0) + (not killed)
            line = new.strip().splitlines()[0][:70] if new.strip() else "(line removed)"
            print(f"{name}:{number} {'killed by' if killed else 'SURVIVES'} {tests} -k {words!r}: {line}",
                  flush=True)
    for name, left in survived.items():
        count = sum(name == other for other, _ in wanted)
        print(f"{name}: {count - left} of {count} killed")
    print(f"{len(wanted) - sum(survived.values())} of {len(wanted)} killed in "
          f"{time.monotonic() - began:.0f} s")
    return 1 if any(survived.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
