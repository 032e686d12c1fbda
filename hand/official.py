"""Reads a MANO hand from its official file, a re-saved copy or an .npz; executes nothing in it."""
from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path

# common before torch: it settles how threads wait
from common import MANO_PARENTS, N_VERTS, UserError

import numpy as np


MANO_SHAPES = {
    "v_template": (N_VERTS, 3), "shapedirs": (N_VERTS, 3, 10), "posedirs": (N_VERTS, 3, 135),
    "J_regressor": (16, N_VERTS), "weights": (N_VERTS, 16), "kintree_table": (2, 16),
    "f": (1538, 3), "hands_components": (45, 45), "hands_mean": (45,)}
MANO_LARGEST = 100.0                              # metres, rad or a share
MANO_MAX_BYTES = 1 << 27                          # official files are below 10 MB

# The official file is a Python 2 pickle that names seven classes, among them chumpy's and scipy's.
# Each name below, with the spellings of later NumPy, SciPy and Python, becomes a Recorded, which
# notes what was asked for; worked_out works the arrays out afterwards. Nothing that a file names is
# called.
PICKLE_NAMES = {
    "numpy.core.multiarray._reconstruct": "array", "numpy._core.multiarray._reconstruct": "array",
    "numpy.core.numeric._frombuffer": "buffer", "numpy._core.numeric._frombuffer": "buffer",
    "numpy.ndarray": "ndarray", "numpy.dtype": "dtype", "_codecs.encode": "bytes",
    "__builtin__.set": "set", "builtins.set": "set", "chumpy.ch.Ch": "ch",
    "chumpy.reordering.Select": "select", "chumpy.ch_ops.multiply": "multiply",
    "scipy.sparse.csc.csc_matrix": "csc", "scipy.sparse._csc.csc_matrix": "csc"}
_NUMBER_TYPES = {"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}


class Recorded:
    """An object of a pickle: its kind, arguments and state as the file states them, and no more."""

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state


class Recorder(pickle.Unpickler):
    """Reads a pickle into dicts, lists, strings, numbers and Recorded; refuses other names."""

    def find_class(self, module: str, name: str) -> type:
        kind = PICKLE_NAMES.get(f"{module}.{name}")
        if kind is None:
            raise UserError(f"names {f'{module}.{name}'[:99]!r}, which no MANO file needs; "
                            "refused, and nothing in the file was run")
        return type(kind, (Recorded,), {"kind": kind})

    def persistent_load(self, pid: object) -> None:
        raise UserError("holds a persistent id, which no MANO file needs; refused")


def read_pickle(data: bytes, reader: type[Recorder] = Recorder) -> dict:
    """The dict in a pickle, undecoded. Python 2's strings are latin-1, arrays included."""
    for opcode, argument, _ in pickletools.genops(data):     # executes nothing; finds cut-off files
        if "PUT" in opcode.name and int(argument) > len(data):
            raise UserError("asks for an absurd memo table; refused")      # 2^32 slots of 8 bytes
    found = reader(io.BytesIO(data), encoding="latin1").load()
    if not isinstance(found, dict):
        raise UserError(f"holds a {type(found).__name__}, not a dictionary of arrays")
    return found


def worked_out(item: object, depth: int = 0) -> object:
    """Work out a Recorded object; everything else is its own value.

    A chumpy Select is its array `a`, flattened, at `idxs`: of the file's 20 shape directions the
    first 10. HO3D's set-up script re-saves the left hand's shapedirs as a product, `multiply`.
    """
    if not isinstance(item, Recorded):
        return item
    if depth > 4:
        raise UserError("nests its arrays too deeply")

    def part(name: str) -> object:
        return worked_out(item.state[name], depth + 1)

    if item.kind == "ch":
        return part("x")
    if item.kind == "select":
        flat = part("a").ravel()[part("idxs")]
        return flat.reshape(part("preferred_shape")) if "preferred_shape" in item.state else flat
    if item.kind == "multiply":
        return part("a") * float(np.asarray(part("b")).item())
    if item.kind == "csc":
        return _dense(item.state)
    if item.kind == "bytes":                                 # _codecs.encode(text, "latin1")
        text, codec = item.args
        if codec not in ("latin1", "latin-1"):
            raise UserError(f"asks for the codec {codec[:99]!r}, only latin1 is read")
        return text.encode("latin1")
    if item.kind in ("array", "buffer"):
        return _array(item)
    raise UserError(f"has a {item.kind} where an array belongs")


def _array(item: Recorded) -> np.ndarray:
    """An array from raw bytes and a plain number type; no NumPy code is given the file's state."""
    if item.kind == "buffer":                                # protocol 5
        raw, dtype, shape, order, *axes = item.args
    else:
        _, shape, dtype, fortran, raw = item.state
        order, axes = "F" if fortran else "C", []
    code, endian = dtype.args[0], dtype.state[1]
    if code not in _NUMBER_TYPES or endian not in ("<", ">", "|"):
        raise UserError(f"holds an array of type {str(code)[:99]!r}, which is not a plain number")
    raw = worked_out(raw)
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    flat = np.frombuffer(raw, endian + code)
    if order == "K" and axes and axes[0] is not None:        # NumPy 2.3 and later
        return flat.reshape(shape).transpose(axes[0])
    return flat.reshape(shape, order=order)


def _dense(state: dict) -> np.ndarray:
    """scipy's csc_matrix, by the names in its state, as a full (16, 778); duplicates add up."""
    shape = tuple(state["_shape"] if "_shape" in state else state["shape"])
    data, rows, starts = (worked_out(state[name]) for name in ("data", "indices", "indptr"))
    starts = starts.astype(np.int64)
    counts = np.diff(starts)
    if (shape != MANO_SHAPES["J_regressor"] or len(counts) != N_VERTS or starts[0] != 0
            or counts.min() < 0 or starts[-1] != len(rows) or rows.min() < 0):
        raise UserError(f"has a damaged sparse matrix of shape {shape}, MANO's is (16, 778)")
    out = np.zeros(shape)
    np.add.at(out, (rows, np.repeat(np.arange(N_VERTS), counts)), data)
    return out


def _read_npz(data: bytes) -> dict:
    """The arrays of an .npz by name, without unpickling."""
    size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
    if size > MANO_MAX_BYTES:
        raise UserError(f"unpacks to {size >> 20} MB, a MANO file is below 10 MB")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _checked(raw: dict) -> dict[str, np.ndarray]:
    """MANO's arrays as float64 and int64, or a UserError saying which is not what it must be."""
    params = {}
    for key, shape in MANO_SHAPES.items():
        if key not in raw:
            raise UserError(f"has no {key}, so it is not a MANO hand")
        value = worked_out(raw[key])
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
            raise UserError(f"has a {key} that is not an array of numbers")
        if value.shape != shape:
            raise UserError(f"has a {key} of shape {value.shape}, MANO's is {shape}")
        whole = key in ("f", "kintree_table")
        if not (np.abs(value.astype(float)) <= (2 ** 32 if whole else MANO_LARGEST)).all():
            raise UserError(f"has numbers in {key} that are not finite, or beyond any hand's")
        kind = np.int64 if whole else np.float64
        params[key] = np.array(value, kind, order="C")
    params["kintree_table"][0, 0] = -1                       # official: an unsigned -1, 4294967295
    if tuple(params["kintree_table"][0]) != MANO_PARENTS:
        raise UserError("has a kintree_table that is not MANO's tree of 16 joints")
    if params["f"].min() < 0 or params["f"].max() >= N_VERTS:
        raise UserError(f"has faces f that name vertices outside 0..{N_VERTS - 1}")
    for key in ("weights", "J_regressor"):
        if abs(params[key].sum(1) - 1).max() > 1e-4:
            raise UserError(f"has a {key} whose rows do not sum to 1")
    return params


def load_mano(path: str | Path) -> dict[str, np.ndarray]:
    """Read a MANO hand: the official MANO_RIGHT.pkl or MANO_LEFT.pkl, a re-saved copy, or an .npz.

    Returns the keys and shapes of MANO_SHAPES, numbers in float64 (lengths in m, angles in rad),
    `f` and `kintree_table` in int64 with the wrist's parent -1. Neither chumpy nor scipy is used
    and nothing in the file is run. UserError, one sentence, for a file that is not such a hand.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():         # a pipe would be waited for
            raise UserError("is not a file")
        if Path(path).stat().st_size > MANO_MAX_BYTES:
            raise UserError(f"is larger than {MANO_MAX_BYTES >> 20} MB, a MANO file is below 10 MB")
        data = Path(path).read_bytes()
        return _checked(_read_npz(data) if data[:2] == b"PK" else read_pickle(data))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the MANO_RIGHT.pkl of the MANO "
                        "authors or an .npz that save_mano wrote") from None
    except Exception as error:      # bytes that are no pickle can fail anywhere in the decoders
        raise UserError(f"{path}: damaged, or not a MANO file ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:99]})") from None


def save_mano(path: str | Path, params: dict[str, np.ndarray]) -> None:
    """Write the keys of MANO_SHAPES as an .npz for `load_mano`. MANO's licence stays on it."""
    with open(path, "wb") as file:
        np.savez_compressed(file, **{key: params[key] for key in MANO_SHAPES})


def mirror_mano(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same hand in a mirror, x to -x: a left hand from a right one, or back.

    Posed with `mirror_pose`, it gives the mirrored vertices exactly. A MANO_LEFT.pkl read so makes
    right hands of data that was annotated with it, whichever shapedirs the annotators used.
    """
    s = np.array([-1.0, 1.0, 1.0])
    axis_angle = np.tile([1.0, -1.0, -1.0], 15)
    feature = np.tile(np.outer(s, s).ravel(), 15)            # (135,) entries of R - I, row by row
    return params | {
        "v_template": params["v_template"] * s, "shapedirs": params["shapedirs"] * s[:, None],
        "posedirs": params["posedirs"] * s[:, None] * feature, "f": params["f"][:, ::-1].copy(),
        "hands_mean": params["hands_mean"] * axis_angle,
        "hands_components": params["hands_components"] * axis_angle}


def fix_left_shapedirs(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Negate the x of shapedirs: MANO_LEFT.pkl carries the right hand's, not mirrored.

    InterHand2.6M and HOT3D annotate with the fix; DexYCB, manopth and smplx go without it.
    """
    return params | {"shapedirs": params["shapedirs"] * np.array([-1.0, 1.0, 1.0])[:, None]}
