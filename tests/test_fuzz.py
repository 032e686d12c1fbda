"""Some hundred damaged files; `python tests/fuzz.py` damages ten thousand."""
import pytest

import fuzz


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_are_read_rightly_or_refused_in_a_sentence(reader):
    count, _, wrong = fuzz.fuzz(reader, 9, seed=0)
    assert not wrong and count["right"] + count["clear"] == 9


def test_fuzzing_sees_what_it_looks_for(tmp_path, monkeypatch):
    """Readers that do each wrong thing, which no reader here does."""
    def read(root):
        number = int((root / "a.txt").read_text())
        if number == 1:
            raise ValueError("not a sentence")
        if number == 2:
            open(root.parent / "outside" / "secret.png").close()
        return {"told": None, "n": fuzz.np.array([float("inf") if number == 3 else 0.0])}

    def change(rng, file):
        file.write_text(str(rng.randrange(4)))
        return False

    monkeypatch.setattr(fuzz, "change_file", change)
    monkeypatch.setitem(fuzz.READERS, "stand-in", fuzz.Reader(lambda root: (root / "a.txt").write_text("0"), "a.txt", read))
    count, _, wrong = fuzz.fuzz("stand-in", 40, seed=0)
    assert all(count[kind] for kind in ("right", "traceback", "unsafe", "silent")) and len(wrong) == 40 - count["right"]
