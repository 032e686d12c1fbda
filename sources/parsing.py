"""Numbers of other people's files: of the shape and range they must have, or refused by name."""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

# common before torch: it settles how threads wait
from common import N_JOINTS, UserError

import numpy as np

LARGEST = 1e6                        # in px, mm, m or rad no data set's numbers come near it


_REPR = reprlib.Repr()
_REPR.maxstring = 120


@contextlib.contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Whatever the content of a file makes fail inside, as one UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{file}: it has no {_short(error.args[0])}") from None
    except Exception as error:               # parsers of hostile files fail in any class
        said = "it nests too deeply" if isinstance(error, RecursionError) else _short(error)
        raise UserError(f"{file}: {said}") from None


def _short(value: object) -> str:
    """A value as a sentence can hold it: one line of at most 120 letters."""
    text = str(value) if isinstance(value, Exception) else _REPR.repr(value)   # YAML's may explode
    text = " ".join(text.split()) or type(value).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def file_bytes(file: str | Path) -> bytes:
    """The content of a plain file; ValueError where it is none: a pipe would be waited for."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise ValueError("it is not a file")
    return Path(file).read_bytes()


def parse_json(data: bytes, then: Callable[[dict], dict] | None = None, nan: bool = True) -> object:
    """The value in a JSON text, `then` applied to each object; ValueError where a key comes twice.

    Without `nan`, the words NaN and Infinity, which JSON does not have, are refused too.
    """
    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            _refuse_twice([key for key, _ in pairs])
        return then(found) if then else found

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not allowed, use null")

    return json.loads(data, object_pairs_hook=once, parse_constant=None if nan else refuse)


def parse_yaml(data: bytes) -> object:
    """The value in a YAML text of plain types; ValueError also where a mapping has a key twice."""
    return _yaml_reader()(data).get_single_data()


@functools.cache
def _yaml_reader() -> type:
    import yaml                                      # only one data set needs PyYAML

    class Reader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return Reader


def _refuse_twice(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        raise ValueError(f"it has {_short(max(keys, key=keys.count))} twice")


def numbers(value: object, name: str, *dims: int, least: float = -LARGEST, most: float = LARGEST,
            unknown: bool = False) -> np.ndarray:
    """A parsed value as a float64 array of `dims`, which may be flat or have axes of 1 more.

    ValueError names it where it is anything else, or holds a number below `least`, above `most` or
    not finite; with `unknown`, null and NaN mean "not known" and become NaN.
    """
    n = math.prod(dims)
    shape = []
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        shape = [*value.shape]
        flat = value.ravel()
    else:
        flat = [value]
        while {*map(type, flat)} & {list, tuple}:             # level by level, never beyond n items
            sizes = {len(item) if isinstance(item, (list, tuple)) else -1 for item in flat}
            if len(sizes) > 1 or len(flat) * max(sizes) > n or len(shape) > 9:
                shape = [-1]
                break
            shape += sizes
            flat = [*chain.from_iterable(flat)]
        kinds = {int, float, type(None)} if unknown else {int, float}
        if shape != [-1] and {*map(type, flat)} - kinds:
            wrong = next(item for item in flat if type(item) not in kinds)
            raise ValueError(f"{name} must be numbers, not {_short(wrong)}")
    long = [k for k in shape if k != 1]
    if len(flat) != n or long not in ([k for k in dims if k != 1], [n] if n != 1 else []):
        raise ValueError(f"{name} must be {' x '.join(map(str, dims)) or 'one'} number"
                         f"{'s' * (n != 1)}")
    try:
        out = np.array(flat, float).reshape(dims)
    except OverflowError:
        raise ValueError(f"{name} holds a number beyond all bounds") from None
    wrong = out[~((out >= least) & (out <= most)) & ~(np.isnan(out) & unknown)]
    if len(wrong):
        raise ValueError(f"{name} must lie from {least:g} to {most:g}, not hold {wrong[0]:g}")
    return out


def whole(value: object, name: str, least: int = 0, most: int = 1 << 53) -> int:
    """A parsed whole number; ValueError names it where it is anything else."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}")
    return value


def one_of(value: object, name: str, *choices: object) -> object:
    """A parsed value that is one of few; ValueError names it where it is anything else."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, "
                         f"not {_short(value)}")
    return value


def below(path: object, name: str) -> str:
    """A parsed path that stays below its data set; ValueError where it leads elsewhere."""
    if not isinstance(path, str) or not path or "\0" in path or path[0] in "/\\~" \
            or ".." in re.split(r"[/\\]", path) or re.match("[A-Za-z]:", path):
        raise ValueError(f"{name} must be a path below the data set, not {_short(path)}")
    os.fsencode(path)                                # a ValueError where no file can have that name
    return path


def intrinsics(K: np.ndarray, name: str = "K") -> np.ndarray:
    """Camera matrices (..., 3, 3) px, as given; ValueError where one is none. NaN is unknown."""
    fixed = K[..., [1, 2, 2, 2], [0, 0, 1, 2]] - [0, 0, 0, 1]
    if (np.abs(fixed) > 1e-6).any() or (K[..., [0, 1], [0, 1]] <= 0).any():
        raise ValueError(f"{name} must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in px, with focal "
                         "lengths above 0")
    return K


def rotations(R: np.ndarray, name: str = "R") -> np.ndarray:
    """Rotation matrices (..., 3, 3), as given; ValueError where one is none."""
    if (np.abs(R @ R.swapaxes(-1, -2) - np.eye(3)).max() > 1e-3) or (np.linalg.det(R) < 0).any():
        raise ValueError(f"{name} is no rotation")
    return R


def json_numbers(file: Path, dims: tuple[int, ...]) -> np.ndarray:
    """A .json that is nested lists of numbers as (N, *dims), float64; UserError if it is not that.

    It is read as one run of numbers: FreiHAND's vertices would be 76 million Python objects.
    """
    text = file.read_bytes().translate(None, b"[] \t\r\n")
    try:
        values = np.fromstring(text, sep=",")
    except ValueError:
        values = np.empty(0)
    if not text or len(values) != text.count(b",") + 1 or len(values) % math.prod(dims):
        raise UserError(f"{file}: is not a list of entries of "
                        f"{' x '.join(map(str, dims)) or 'one'} numbers each, or is cut off")
    if not (np.abs(values) <= LARGEST).all():
        row = int(np.flatnonzero(~(np.abs(values) <= LARGEST))[0]) // math.prod(dims)
        raise UserError(f"{file}: entry {row} holds a number that is not finite, or above "
                        f"{LARGEST:g}")
    return values.reshape(-1, *dims)


def hand_labels(file: str | Path, side: str = "right", both: bool = False
                ) -> tuple[np.ndarray, np.ndarray]:
    """2D key points of a JSON file -> (21, 2) px, NaN where none, and (21,) confidence.

    Either [coordinates, confidences] as HaMuCo's released labels, or OpenPose's output, of which
    the surest person's hand is taken. UserError where it is neither; and with `both`, where a
    picture has two hands, also for the first, which does not say which of them it is.
    """
    key = f"hand_{side}_keypoints_2d"
    with reading(file):
        found = parse_json(file_bytes(file))
        if isinstance(found, dict):
            people = [numbers(person[key], key, N_JOINTS, 3, unknown=True)
                      for person in found["people"] if person.get(key)]
            people.sort(key=lambda hand: hand[:, 2].sum())
            hand = people[-1] if people else np.zeros((N_JOINTS, 3))
            uv, sure = hand[:, :2], hand[:, 2]
        elif isinstance(found, list) and both:
            raise ValueError("does not say which hand it is, as OpenPose's output does")
        elif isinstance(found, list) and len(found) == 2:
            uv = numbers(found[0], "coordinates", N_JOINTS, 2, unknown=True)
            sure = numbers(found[1], "confidences", N_JOINTS, unknown=True)
        else:
            raise ValueError("neither [coordinates, confidences] of 21 points nor OpenPose's hands")
        if (sure < 0).any() or (sure > 2).any():              # detectors go a little beyond 1
            raise ValueError("confidences must lie in [0, 1]")
    known = np.isfinite(uv).all(1) & (sure > 0)
    return np.where(known[:, None], uv, np.nan), np.where(known, sure, 0).clip(0, 1)
