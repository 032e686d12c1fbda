"""What all tests share: the project on the path, two threads, the golden arrays, a hand's file."""
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")         # as common.py, before torch is loaded

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
for place in (ROOT / "tests" / "sources", ROOT / "tests", ROOT):      # trees that several tests write
    sys.path.insert(0, str(place))
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def golden():
    """golden("name") -> the arrays of tests/golden/name.npz."""
    return lambda name: np.load(ROOT / "tests" / "golden" / f"{name}.npz")


@pytest.fixture(scope="session")
def official_file(tmp_path_factory):
    """A synthetic hand in MANO's own file format, written by Python 2.7 and chumpy."""
    path = tmp_path_factory.mktemp("mano") / "MANO_RIGHT.pkl"
    path.write_bytes(lzma.decompress((ROOT / "tests/golden/mano_format_chumpy.pkl.xz").read_bytes()))
    return path


@pytest.fixture(scope="session")
def params(official_file):
    """The arrays of `official_file`, in our reading; no test may change them."""
    from hand.official import load_mano
    return load_mano(official_file)


@pytest.fixture
def tmp_path(tmp_path, request):
    """A test's own folder, gone once the test has passed: the suite would leave gigabytes behind."""
    failed = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def command(tmp_path):
    """command("ti_net.py", ...) runs a script in tmp_path as a user would; returns the process."""
    def run(script: str, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess:
        env = os.environ | {"OMP_NUM_THREADS": "2"} | more
        done = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder of its own, and few rendered hands to be judged on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sources.synthetic.LENGTH", {"val": 16, "test": 24})
    return tmp_path
