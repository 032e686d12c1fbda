"""The restricted reader of MANO's file: what it reads bit by bit, and what it refuses in one sentence.

conftest's `official_file` is a synthetic hand written by Python 2.7 and chumpy in the official
file's format; no number comes from MANO.
"""
import codecs
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import Mano, UserError, axis_angle_to_matrix, mano_numpy, mirror_pose
from hand.official import MANO_SHAPES, fix_left_shapedirs, load_mano, mirror_mano, save_mano

# sha256 of each array's bytes as Python 2.7, chumpy and scipy themselves evaluate the file.
DIGESTS = {
    "v_template": "48ba028142d333e7f12cbc650001e8557b9af8a1e79535ae61bce2d5643f8534",
    "shapedirs": "545c3ced03392d928f6d0609ea0be81126b6a9ccc0ccc534cc892c6adca865bf",
    "posedirs": "227c0d4ac1f5ae68df6fea827b32d2350a4a64f11359c06d21f4380df0997134",
    "J_regressor": "889e077e663535aa665e11f98f73b7d692b25191dae692fa1fc28b3c391a17db",
    "weights": "0853f2b3ded56df983243834a787d828a4ab8a08bebec3577ba00634ef9b4c33",
    "kintree_table": "25dfe1fcee4b2458c9231186471f61ef988b25de090cacb80bbe6f6916952a90",
    "f": "713f91e070538212574692fbadd6b174496cad307ff958f4bd714505f81a1475",
    "hands_components": "f8a9a15b402ea76cc4a37fc4e9bc6ce0350d260bfad9edf98a8f56ec3e396e1b",
    "hands_mean": "899bcd0ce337572c21342a21831ae2cb335857c12e712d068be5f6a6ba408bf2"}


def digest(key, value):
    """Digest of an array in the official file's own types."""
    value = value.astype(np.uint32) if key == "f" else value.copy()
    if key == "kintree_table":
        value[0, 0] = 4294967295
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def test_official_format_decodes_bit_exactly_and_keeps_float64(params):
    assert list(params) == list(MANO_SHAPES)
    assert {key: digest(key, value) for key, value in params.items()} == DIGESTS
    assert all(v.dtype == (np.int64 if k in ("f", "kintree_table") else np.float64)
               and v.flags.c_contiguous and v.flags.writeable for k, v in params.items())
    parents = [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]
    assert params["kintree_table"][0].tolist() == parents


def test_reading_imports_neither_chumpy_nor_scipy(official_file):
    code = ("import sys\n"
            "from hand.official import load_mano\n"
            "before = set(sys.modules)\n"
            f"load_mano({str(official_file)!r})\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
            "assert not new & {'chumpy', 'scipy'}, new\n"
            "assert 'chumpy' not in sys.modules\n")
    folders = [str(Path(common.__file__).parent), *sys.path]
    subprocess.run([sys.executable, "-c", code], check=True,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)})


def test_npz_round_trip_is_bit_exact(params, tmp_path):
    save_mano(tmp_path / "hand.npz", params)
    again = load_mano(tmp_path / "hand.npz")
    assert {key: digest(key, value) for key, value in again.items()} == DIGESTS


class Plain:
    """Stands in for a foreign class while a test pickles; `foreign` sets its module and name."""

    def __init__(self, **state):
        self.__dict__.update(state)


@pytest.fixture
def foreign(monkeypatch):
    """Makes classes that pickle under any name, e.g. foreign("chumpy.ch", "Ch")."""
    def make(module, name):
        parts = module.split(".")
        for k in range(1, len(parts) + 1):
            path = ".".join(parts[:k])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        cls = type(name, (Plain,), {"__module__": module, "__qualname__": name})
        setattr(sys.modules[module], name, cls)
        return cls
    return make


def csc_state(dense):
    """The fields of scipy's csc_matrix, column by column, written out by hand."""
    rows, columns = [], []
    for column in range(dense.shape[1]):
        rows += [(row, dense[row, column]) for row in np.flatnonzero(dense[:, column])]
        columns.append(len(rows))
    return {"_shape": dense.shape, "maxprint": 50, "indptr": np.array([0, *columns], np.int32),
            "indices": np.array([r for r, _ in rows], np.int32),
            "data": np.array([v for _, v in rows])}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_3_resaves_with_chumpy_decode_bit_exactly(params, foreign, tmp_path, protocol):
    Ch, Select = foreign("chumpy.ch", "Ch"), foreign("chumpy.reordering", "Select")
    csc = foreign("scipy.sparse._csc", "csc_matrix")
    twenty = np.concatenate([params["shapedirs"], np.ones((778, 3, 10))], 2)
    picked = np.arange(46680).reshape(778, 3, 20)[:, :, :10].ravel()
    file = params | {
        "shapedirs": Select(a=Ch(x=twenty, _dirty_vars={"x"}, _itr=None), idxs=picked,
                            preferred_shape=(778, 3, 10), _dirty_vars=set()),
        "J_regressor": csc(**csc_state(params["J_regressor"])), "bs_type": "lrotmin",
        "hands_coeffs": np.zeros((5, 45)), "J": np.zeros((16, 3))}
    data = pickle.dumps(file, protocol=protocol)
    if protocol < 4:     # as NumPy 1 spells it
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"numpy._core" not in data and b"numpy.core.multiarray" in data
    (tmp_path / "hand.pkl").write_bytes(data)
    again = load_mano(tmp_path / "hand.pkl")
    assert {key: digest(key, value) for key, value in again.items()} == DIGESTS


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_resaves_of_any_layout_decode_bit_exactly(params, foreign, tmp_path, protocol):
    csc = foreign("scipy.sparse.csc", "csc_matrix")
    file = params | {
        "v_template": np.asfortranarray(params["v_template"]),
        "shapedirs": params["shapedirs"].transpose(1, 0, 2).copy().transpose(1, 0, 2),
        "posedirs": params["posedirs"].astype(">f8"), "hands_mean": params["hands_mean"][::1],
        "kintree_table": params["kintree_table"].astype(np.uint32),
        "f": params["f"].astype(np.uint16),
        "J_regressor": csc(**csc_state(params["J_regressor"]))}
    (tmp_path / "hand.pkl").write_bytes(pickle.dumps(file, protocol=protocol))
    again = load_mano(tmp_path / "hand.pkl")
    assert {key: digest(key, value) for key, value in again.items()} == DIGESTS
    assert all(value.flags.c_contiguous for value in again.values())


def test_sparse_duplicates_add_up_and_older_scipy_may_say_shape(params, foreign, tmp_path):
    csc = foreign("scipy.sparse.csc", "csc_matrix")
    state = csc_state(params["J_regressor"])
    state["shape"] = state.pop("_shape")
    halves = {"data": np.repeat(state["data"] / 2, 2), "indices": np.repeat(state["indices"], 2),
              "indptr": state["indptr"] * 2}
    file = params | {"J_regressor": csc(**state | halves)}
    (tmp_path / "hand.pkl").write_bytes(pickle.dumps(file, 2))
    again = load_mano(tmp_path / "hand.pkl")
    assert digest("J_regressor", again["J_regressor"]) == DIGESTS["J_regressor"]


@pytest.mark.parametrize("scalar", [-1, np.array(-1.0), np.array([-1])])
def test_ho3d_negated_shapedirs_are_evaluated(params, foreign, tmp_path, scalar):
    Ch, multiply = foreign("chumpy.ch", "Ch"), foreign("chumpy.ch_ops", "multiply")
    Select = foreign("chumpy.reordering", "Select")
    product = multiply(a=Select(a=Ch(x=params["shapedirs"]), idxs=np.arange(23340),
                                preferred_shape=np.array([778, 3, 10])), b=Ch(x=scalar))
    (tmp_path / "hand.pkl").write_bytes(pickle.dumps(params | {"shapedirs": product}, 2))
    assert (load_mano(tmp_path / "hand.pkl")["shapedirs"] == -params["shapedirs"]).all()


class Payload:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def refusal(path):
    """The one sentence with which load_mano refuses `path`."""
    with pytest.raises(UserError) as caught:
        load_mano(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence and len(sentence) < 400
    return sentence


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["v_template", "extra", "top"])
def test_payloads_are_refused_by_name_and_do_not_run(params, tmp_path, protocol, where):
    mark, path = tmp_path / "mark", tmp_path / "hand.pkl"
    for call, argument, name in (
            (os.system, f"touch {mark}", f"{os.name}.system"),
            (eval, f"open({str(mark)!r}, 'w')", "eval"),
            (exec, f"open({str(mark)!r}, 'w')", "exec"),
            (getattr, (mark, "touch"), "getattr"), (codecs.decode, ("a", "rot13"), "decode"),
            (subprocess.call, ["touch", str(mark)], ".call")):
        payload = Payload(call, *(argument if isinstance(argument, tuple) else (argument,)))
        file = payload if where == "top" else params | {where: payload}
        path.write_bytes(pickle.dumps(file, protocol=protocol))
        assert name in refusal(path)
        assert not mark.exists()


def test_persistent_ids_other_codecs_and_object_arrays_are_refused(params, tmp_path):
    path = tmp_path / "hand.pkl"
    for protocol in (0, 2, 4):
        class Writer(pickle.Pickler):
            def persistent_id(self, item):
                return "elsewhere" if isinstance(item, float) else None
        stream = io.BytesIO()
        Writer(stream, protocol).dump(params | {"scale": 1.5})
        path.write_bytes(stream.getvalue())
        assert "persistent id" in refusal(path)
    path.write_bytes(pickle.dumps(params | {"f": Payload(codecs.encode, "hand", "rot13")}, 2))
    assert "rot13" in refusal(path)
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps(params | {"f": params["f"].astype(object)}, protocol))
        assert "'O8'" in refusal(path)
        path.write_bytes(pickle.dumps(params | {"f": params["f"].astype("S4")}, protocol))
        assert "'S4'" in refusal(path)
    path.write_bytes(pickle.dumps(params | {"f": {1, 2}}, 2))
    assert "set" in refusal(path)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "list" in refusal(path)


def test_npz_with_pickled_objects_is_refused(params, tmp_path):
    np.savez(tmp_path / "hand.npz", **params | {"f": np.array([Payload(os.system, "true")])})
    assert "allow_pickle" in refusal(tmp_path / "hand.npz")


def bombs(params):
    """Small files that ask for a great deal of memory."""
    class Huge:
        def __reduce__(self):
            state = (1, (10 ** 12,), np.dtype("f8"), False, bytes(24))
            return *np.zeros(3).__reduce__()[:2], state
    yield pickle.dumps(params | {"f": Huge()}, 4)
    yield b"\x80\x02}r\xff\xff\xff\xff."                                      # memo slot 2^32 - 1
    yield b"\x80\x02}p4000000000\n."
    yield b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc."              # bytes of a terabyte
    yield b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"abc."              # a bytearray of 8 GB
    yield b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}."                # a frame
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("v_template.npy", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
    yield stream.getvalue()


def test_memory_bombs_are_refused_without_the_memory(params, tmp_path):
    for bomb in bombs(params):
        (tmp_path / "hand.pkl").write_bytes(bomb)
        tracemalloc.start()
        sentence = refusal(tmp_path / "hand.pkl")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6
        assert ("memo table" in sentence) == (b"}r" in bomb[:9] or b"}p" in bomb[:9])


def test_sparse_and_select_bombs_are_refused(params, foreign, tmp_path):
    csc, Select = foreign("scipy.sparse.csc", "csc_matrix"), foreign("chumpy.reordering", "Select")
    good, path = csc_state(params["J_regressor"]), tmp_path / "hand.pkl"
    jump = good["indptr"].astype(np.int64)
    end = jump.copy()
    jump[5], end[-1] = 10 ** 10, 10 ** 10
    for change, words in (
            ({"_shape": (10 ** 9, 10 ** 9)}, "sparse matrix"), ({"indptr": jump}, "sparse matrix"),
            ({"indptr": end}, "sparse matrix"), ({"indptr": good["indptr"][:5]}, "sparse matrix"),
            ({"indptr": good["indptr"] - 1}, "sparse matrix"),
            ({"indices": good["indices"] - 1}, "sparse matrix"),
            ({"indices": good["indices"] + 9}, "damaged"), ({"data": good["data"][:7]}, "damaged")):
        path.write_bytes(pickle.dumps(params | {"J_regressor": csc(**good | change)}, 4))
        assert words in refusal(path)
    loop = Select(idxs=np.arange(3))
    loop.a = loop
    path.write_bytes(pickle.dumps(params | {"shapedirs": loop}, 4))
    assert "deep" in refusal(path)


def test_cut_off_and_random_files_are_refused_in_one_sentence(official_file, params, tmp_path):
    whole, path = official_file.read_bytes(), tmp_path / "hand.pkl"
    for size in (0, 1, 2, 50, 1000, 600_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)
    save_mano(path, params)
    zipped = path.read_bytes()
    for size in (2, 4, 100, len(zipped) // 2, len(zipped) - 1):
        path.write_bytes(zipped[:size])
        refusal(path)
    random = np.random.default_rng(0)
    for k in range(300):
        path.write_bytes((b"", b"\x80\x02", b"PK\x03\x04")[k % 3] + random.bytes(k))
        refusal(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")    # an invalid escape, on its way out
def test_damaged_bytes_are_refused_in_one_sentence(params, tmp_path):
    path, random = tmp_path / "hand.pkl", np.random.default_rng(1)
    data = bytearray(pickle.dumps(params | {"posedirs": np.zeros(1)}, 2))
    starts = [data.index(key.encode()) for key in MANO_SHAPES]           # where the opcodes are
    for k in range(300):
        changed = data.copy()
        changed[starts[k % 9] + int(random.integers(-40, 160))] = int(random.integers(256))
        path.write_bytes(changed)
        refusal(path)                                                    # posedirs is wrong


def test_files_that_are_no_hand_are_refused_by_the_array_at_fault(params, tmp_path):
    wrong = params["kintree_table"].copy()
    wrong[0, 3] = 9
    nan = params["v_template"].copy()
    nan[5, 1] = np.nan
    for change, words in (
            ({"v_template": np.zeros((10475, 3))}, "v_template of shape (10475, 3)"),
            ({"shapedirs": np.zeros((778, 3, 20))}, "shapedirs of shape (778, 3, 20)"),
            ({"v_template": nan}, "v_template that are not finite"),
            ({"weights": params["weights"] * 1.01}, "weights whose rows do not sum to 1"),
            ({"J_regressor": params["J_regressor"] * 0.99}, "J_regressor whose rows"),
            ({"f": params["f"] + 1}, "outside 0..777"), ({"f": params["f"] - 1}, "outside 0..777"),
            ({"kintree_table": wrong}, "kintree_table"), ({"hands_mean": "none"}, "hands_mean"),
            ({"hands_mean": np.zeros(45, bool)}, "'b1'")):
        (tmp_path / "hand.pkl").write_bytes(pickle.dumps(params | change, 4))
        assert words in refusal(tmp_path / "hand.pkl")
    save_mano(tmp_path / "hand.npz", params)
    without = {key: value for key, value in params.items() if key != "posedirs"}
    np.savez(tmp_path / "hand.npz", **without)
    assert "posedirs" in refusal(tmp_path / "hand.npz")
    with open(tmp_path / "hand.pkl", "r+b") as file:
        file.truncate(1 << 28)
    assert "larger than 128 MB" in refusal(tmp_path / "hand.pkl")
    assert "MANO_RIGHT.pkl" in refusal(tmp_path / "absent.pkl")
    refusal(tmp_path)


# ---- Left hands


def test_left_hands_mirror_right_ones_once_their_shapedirs_are_fixed(params):
    draw = np.random.default_rng(3)
    pose, shape = torch.tensor(0.5 * draw.standard_normal((4, 48))), draw.standard_normal((4, 10))
    R, mirrored = (axis_angle_to_matrix(p.view(4, 16, 3)).numpy() for p in (pose, mirror_pose(pose)))
    left = mirror_mano(params)
    theirs = left | {"shapedirs": params["shapedirs"] * [[-1], [1], [1]] * [[-1], [1], [1]]}
    flip = np.array([-1.0, 1.0, 1.0])
    want = [part * flip for part in mano_numpy(params, R, shape)]
    for got, part in zip(mano_numpy(left, mirrored, shape), want):
        assert np.abs(got - part).max() < 1e-15
    for got, part in zip(mano_numpy(fix_left_shapedirs(theirs), mirrored, shape), want):
        assert np.abs(got - part).max() < 1e-15
    off = np.linalg.norm(mano_numpy(theirs, mirrored, shape)[0] - want[0], axis=-1).mean()
    assert off > 0.002                                       # what the official left file costs
    verts = mano_numpy(params, R, shape)[0][0]
    volume = lambda v, f: np.einsum("fa,fa->", v[f[:, 0]], np.cross(v[f[:, 1]], v[f[:, 2]]))
    assert volume(verts, params["f"]) * volume(verts * flip, left["f"]) > 0         # faces reversed
    means = [hand["hands_mean"].reshape(15, 3) for hand in (left, params)]
    assert (means[0] == means[1] * [1, -1, -1]).all()
    right, other = Mano(params, dtype=torch.float64), Mano(left, dtype=torch.float64)
    options = dict(flat_hand_mean=False, pca=45)             # the same coefficients, mirrored
    want = mirror_pose(right.full_pose(pose, **options))
    got = other.full_pose(torch.cat([mirror_pose(pose[:, :3]), pose[:, 3:]], 1), **options)
    assert (got - want).abs().max() < 1e-14
    again = mirror_mano(left)
    assert all((again[key] == params[key]).all() for key in MANO_SHAPES)


def test_what_a_decoder_says_in_several_lines_is_one_sentence(tmp_path, monkeypatch):
    def wordy(data):
        raise ValueError("the header is long\nand may not be safe")

    monkeypatch.setattr("hand.official._read_npz", wordy)
    (tmp_path / "MANO_RIGHT.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"MANO_RIGHT.npz: damaged, .* \(ValueError: the header is long and may not be safe\)$"):
        load_mano(tmp_path / "MANO_RIGHT.npz")
