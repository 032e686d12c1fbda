"""Damage files of every kind and see what their readers make of it.

    python tests/fuzz.py --tries 10000               all readers, this many tries together
    python tests/fuzz.py coco mano --tries 500       some of them
    python tests/fuzz.py coco --seed 3 --show        and what was wrong, try by try

A reader gets a small tree in its official layout in which one file was changed: bytes flipped, cut,
doubled or swapped; or one value of parsed JSON, YAML, arrays or pickles replaced by what does not
belong there: no number, an absurd one, another type or length, endless nesting, a path that leaves
the folder, an object that runs a command when it is unpickled. What then comes is

    right       the answer for the unchanged tree, or one that a data set might as well have held
    clear       a UserError
    traceback   any other exception, or the death of the process
    hang        no answer within 10 s
    silent      an answer that holds what cannot be, or that differs although the change can be in
                no data set, without a word about it
    unsafe      a file beside the tree was looked at, or a process started
    noise       a warning was printed; counted beside the others

Tries run in forks with 3 GB of memory more than now; the seed and number of a try name its change.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

HERE = Path(__file__).parent
for place in (HERE / "sources", HERE, HERE.parent):
    sys.path.insert(0, str(place))

import eval as judge
import numpy as np
import peclr
import sources.dexycb
import sources.photos
import ti_net
import torch
import trees
import yaml
from common import UserError, load_checkpoint, save_checkpoint, settle
from hand.builtin import builtin_hand
from hand.official import MANO_SHAPES, load_mano, save_mano
from PIL import Image
from sources import Hands, Index
from sources.assembly101 import index_assembly101
from sources.cameras import index_cameras
from sources.coco import index_coco
from sources.doh100 import index_doh100
from sources.folder import index_folder, index_imagenet
from sources.freihand import index_freihand
from sources.h2o import index_h2o
from sources.hanco import index_hanco
from sources.ho3d import index_ho3d
from sources.interhand import index_interhand
from sources.pictures import check_images, picture_size, read_image
from sources.runs import recall
from sources.yt3d import index_yt3d

SECONDS = 10                                          # beyond, a try hangs
MEMORY = 3 << 30                                      # bytes more than the parent has
KINDS = ("right", "clear", "traceback", "hang", "silent", "unsafe", "noise")


class Reader(NamedTuple):
    """A kind of file: how its tree is written, which files are changed, what is read and looked at."""
    write: Callable[[Path], None]
    files: str                                        # glob of the files that may be changed
    read: Callable[[Path], object]
    unknown: bool = False                             # null and NaN are the layout's "not known"
    names_a_hand: bool = False                        # a MANO file of the user's, which may lie anywhere


# ---- Changes of values ---------------------------------------------------------------------------

RAW = {"@deep@": "[" * 20_000 + "]" * 20_000, "@digits@": "1" + "0" * 400, "@5000@": "7" * 5000,
       "@1e999@": "1e999"}                            # texts that json.dumps cannot write
NUMBERS = [math.nan, math.inf, -math.inf, 1e308, -1e308, "@digits@", "@5000@", "@1e999@"]
TYPES = ["text", {}, {"a": 1}, [[]], "@deep@", [1e308] * 3]
PLACES = ["../outside/secret.png", "../../outside/secret.png", "/etc/passwd", "C:\\secret.png",
          "~/secret", "a\0b", "\ud800", "", ".", "x" * 5000, "..\\outside\\secret.png"]
LEGAL = [None, 0, 1, -1, True, 0.5, 12345678]         # may stand in some field of some layout


def change_value(rng: random.Random, root: object) -> tuple[object, bool]:
    """A copy with one value changed, and whether that can be in no data set."""
    root = copy.deepcopy(root)
    holder, key, item, name = None, None, root, ""
    while isinstance(item, (dict, list)) and item and (holder is None or rng.random() < 0.8):
        holder = item
        key = rng.choice([*item] if isinstance(item, dict) else range(len(item)))
        item = item[key]
        name = key if isinstance(key, str) else name
    if holder is None:
        return rng.choice(TYPES), True
    kind = rng.randrange(8)
    number = isinstance(item, (int, float)) and not isinstance(item, bool)
    if kind <= 2:
        holder[key] = rng.choice(NUMBERS)
        return root, number or isinstance(item, list)
    if kind == 3:
        holder[key] = rng.choice(TYPES)
        return root, number or (isinstance(item, list) and len(item) > 1)
    if kind == 4:
        holder[key] = rng.choice(PLACES)
        return root, number
    if kind == 5:
        holder[key] = rng.choice(LEGAL)
        return root, False
    if kind == 6:
        if isinstance(holder, dict):
            holder[rng.choice(["other", key + " ", "a"])] = holder.pop(key)
        else:
            del holder[key]
            return root, number and len(holder) > 1 and name != "dist"     # of which there are several
        return root, False
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(item))
        return root, number and len(holder) > 2 and name != "dist"
    holder[key] = [item, item]
    return root, number


def raw(text: str) -> str:
    """The texts in RAW in place of their names."""
    for name, long in RAW.items():
        text = text.replace(f'"{name}"', long)
    return text


def change_json(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    text = data.decode()
    if rng.random() < 0.05:                           # a key twice
        at = text.find("{") + 1
        value, _ = change_value(rng, json.loads(text))
        return (text[:at] + json.dumps(text[at:at + 1] and next(iter(json.loads(text)), "a"))
                + ": 5, " + text[at:]).encode() if at else json.dumps(value).encode(), bool(at)
    value, wrong = change_value(rng, json.loads(text))
    return raw(json.dumps(value)).encode(), wrong


def change_lines(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    lines = data.decode().splitlines()
    k = rng.randrange(len(lines))
    changed, wrong = change_json(rng, lines[k].encode())
    return "\n".join([*lines[:k], changed.decode(), *lines[k + 1:]]).encode(), wrong


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefghi", "bcdefghij"))


def change_yaml(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    value = yaml.safe_load(data)
    kind = rng.randrange(10)
    if kind == 0:                                     # an alias of aliases of aliases ...
        key = rng.choice([*value])
        rest = {k: v for k, v in value.items() if k != key}
        return (BOMB + yaml.safe_dump(rest) + f"{key}: *j\n").encode(), True
    if kind == 1:                                     # a key twice
        return data + f"\n{rng.choice([*value])}: 7\n".encode(), True
    if kind == 2:
        return data + rng.choice([b"\nx: !!python/object/apply:os.system ['touch pwned']\n",
                                  b"\nx: *nothing\n", b"\n<<: 5\n", b"\n? {a: 1}\n: 2\n"]), False
    changed, wrong = change_value(rng, value)
    text = raw(json.dumps(changed))
    for name in ("NaN", "Infinity"):
        text = text.replace(name, {"NaN": ".nan", "Infinity": ".inf"}[name])
    return text.encode(), wrong


class Command:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


def change_array(rng: random.Random, x: np.ndarray) -> tuple[object, bool]:
    """An array changed, and whether that can be in no data set."""
    x = np.array(x)
    kind = rng.randrange(9)
    if kind <= 2 and x.size and x.dtype.kind == "f":
        limit = float(np.finfo(x.dtype).max)
        x.ravel()[rng.randrange(x.size)] = rng.choice([math.nan, math.inf, -math.inf, limit, -limit])
        return x, True
    if kind == 3:
        return np.concatenate([x.ravel(), x.ravel()[:1]]), x.size > 1
    if kind == 4:
        return x.astype(rng.choice(["c16", "S4", "U4", "M8[s]", "?", "O"])), False
    if kind == 5:
        return np.array(Command(), dtype=object), False
    if kind == 6:
        return np.array({"a": 1}, dtype=object), False
    if kind == 7:
        return x.ravel()[:-1], x.size > 1
    return np.zeros((0,), x.dtype), x.size > 1


def change_npz(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = dict(stored)
    key = rng.choice([*arrays])
    kind = rng.randrange(6)
    out = io.BytesIO()
    wrong = False
    if kind == 0:
        del arrays[key]
    elif kind == 1:                                   # a head that promises more than there is
        np.savez(out, **arrays)
        return out.getvalue().replace(b"'shape': (1", b"'shape': (" + rng.choice([b"9" * 12, b"-1"]), 1), False
    elif kind == 2:
        np.savez_compressed(out, **arrays, bomb=np.zeros(1 << 18))
        return out.getvalue(), False
    else:
        arrays[key], wrong = change_array(rng, arrays[key])
    np.savez(out, **arrays)
    return out.getvalue(), wrong


def change_pickle(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """A pickle with another value, or one that asks for more than values."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([b"cposix\nsystem\n(S'touch pwned'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.",
                           b"\x80\x02]r\xff\xff\xff\x7f.", b"(" * 50_000 + b".",
                           b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", b"Pid\n.", b"\x80\x02I" + b"9" * 5000 + b"\n.",
                           b"]q\0h\0a."]) + data[:rng.randrange(50)], False
    try:
        value = pickle.loads(data, encoding="latin1")
    except Exception:                                 # Python 2's file of chumpy: bytes only
        return change_bytes(rng, data)
    value = dict(value)
    key = rng.choice([*value])
    wrong = False
    if kind == 1:
        value[key] = Command()
    elif kind == 2:
        del value[key]
    elif isinstance(value[key], np.ndarray) and kind > 3:
        value[key], wrong = change_array(rng, value[key])
    else:
        value[key] = rng.choice([None, "text", 5, math.nan, [], {}, [[1]] * 3, set(), 10 ** 400])
    return pickle.dumps(value, rng.choice([2, 4, 5])), wrong


def change_checkpoint(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    content = torch.load(io.BytesIO(data), weights_only=True)
    kind = rng.randrange(8)
    holder = content
    while isinstance(holder, dict) and holder and (kind or holder is content):
        above, key = holder, rng.choice([*holder])
        holder = holder[key]
        if rng.random() < 0.3:
            break
    value = above[key]
    if kind == 1:
        del above[key]
    elif kind == 2:
        above[key] = Command()
    elif isinstance(value, torch.Tensor) and kind > 4:
        above[key] = rng.choice([value.flatten()[:-1], value.double() * math.nan, value.to(torch.complex64),
                                 value[None], torch.full_like(value.double(), 1e308), value.to("meta"), value.bool()])
    else:
        above[key] = rng.choice([None, "text", -1, 10 ** 400, math.nan, math.inf, [], {}, {"a": 1}, 0, True, "x" * 9999,
                                 "../outside/secret.png"])
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue(), False


def change_bytes(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """Bytes flipped, cut off, doubled, swapped, removed or zeroed."""
    data = bytearray(data)
    n = len(data)
    if not n:
        return bytes([rng.randrange(256)]), False
    a = rng.randrange(n)
    b = min(n, a + rng.choice([1, 7, 60, 999]))
    kind = rng.randrange(8)
    if kind <= 2:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(n) if rng.random() < 0.6 else rng.randrange(min(n, 200))] = rng.randrange(256)
    elif kind == 3:
        del data[rng.choice([0, 1, a, n - 1]):]
    elif kind == 4:
        data[a:a] = data[a:b]
    elif kind == 5:
        c = rng.randrange(n)
        data[a:b], data[c:c + b - a] = data[c:c + b - a], data[a:b]
    elif kind == 6:
        del data[a:b]
    else:
        data[a:b] = bytes(b - a)
    return bytes(data), False


CHANGES = {".json": change_json, ".jsonl": change_lines, ".yml": change_yaml, ".npz": change_npz,
           ".pkl": change_pickle, ".pt": change_checkpoint}


def change_file(rng: random.Random, file: Path) -> bool:
    """Change a file of a tree; whether the change can be in no data set."""
    data = file.read_bytes()
    if rng.random() < 0.03:                           # something else in its place
        file.unlink()
        kind = rng.randrange(5)
        if kind == 0:
            file.mkdir()
        elif kind == 1:
            file.symlink_to(file)
        elif kind == 2:
            os.mkfifo(file)
        elif kind == 3:
            file.symlink_to("/dev/zero")
        return False
    change = CHANGES.get(file.suffix, change_bytes) if rng.random() < 0.6 else change_bytes
    try:
        changed, wrong = change(rng, data)
    except (ValueError, TypeError):                   # this value does not become that type
        changed, wrong = change_bytes(rng, data)
    file.write_bytes(changed)
    return wrong


# ---- What is read --------------------------------------------------------------------------------


def samples(index: Index) -> dict:
    """An index as numbers, with what its first hands look like to a script."""
    rows = torch.arange(min(len(index), 2))
    data = Hands(index, 32, 1.5)
    batch = next(iter(data.batches([rows], torch.device("cpu"), 0))) if len(index) else {}
    aim = data.targets(rows) if len(index) else {}
    told = {"dropped": index.dropped, "notes": index.notes}
    return {"told": told, "n": len(index), "columns": index.columns, "batch": batch, "aim": aim}


def reading(index: Callable[..., Index], *given: object, **more: object) -> Callable[[Path], dict]:
    return lambda root: samples(index(root, *given, **more))


def write_pictures(root: Path) -> None:
    x = trees.noise(40, 50)
    for k, (name, options) in enumerate({
            "a.jpg": {"quality": 90}, "b.jpg": {"progressive": True}, "c.png": {}, "d.webp": {"lossless": True},
            "e.bmp": {}, "f.webp": {"quality": 50}}.items()):
        trees.save(root / "p" / name, x, **options)
    Image.fromarray(x).convert("P").save(root / "p" / "palette.png", transparency=3)
    Image.fromarray(x).convert("CMYK").save(root / "p" / "cmyk.jpg")
    Image.fromarray((x[..., 0].astype(np.uint16) * 257)).save(root / "p" / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    trees.save(root / "p" / "turned.jpg", x, exif=exif)
    Image.fromarray(x).save(root / "p" / "moving.png", save_all=True, append_images=[Image.fromarray(255 - x)])


def read_pictures(root: Path) -> dict:
    out = {}
    for file in sorted((root / "p").iterdir()):
        try:
            out[file.name] = read_image(file), picture_size(file)
        except UserError as error:
            out[file.name] = str(error).partition(":")[0]
    good = check_images([str(file) for file in sorted((root / "p").iterdir())], 1)
    return {"told": good.tolist(), "n": len(out), "pictures": out}


def write_photos(root: Path) -> None:
    for name in ("a.png", "b.jpg"):
        trees.save(root / "photos" / name, trees.noise(60, 90))
    index_folder(root / "photos", "all", "hands", root / "cache")


def found_hand(picture: np.ndarray) -> list[dict]:
    uv = np.array([(20, 20), (40, 20), *[(30, 15 + k / 2) for k in range(19)]], float)
    return [{"side": "left", "confidence": 0.9, "uv": uv}]


def read_photos(root: Path) -> dict:
    return samples(index_folder(root / "photos", "all", "hands", root / "cache"))


def write_labels(root: Path) -> None:
    trees.label_folder(root, trees.LABEL, {"path": "a.png"}, {"path": "a.png", "box": [3, 3, 9, 9]})


def write_kept(root: Path) -> None:
    write_labels(root)
    index_folder(root, cache=root / ".cache")


def read_kept(root: Path) -> dict:
    return samples(index_folder(root, cache=root / ".cache"))


@functools.cache
def golden(name: str) -> Callable[[str], np.ndarray]:
    arrays = np.load(HERE / "golden" / f"{name}.npz")
    return lambda key: arrays[key]


def write_mano(root: Path) -> None:
    data = lzma.decompress((HERE / "golden/mano_format_chumpy.pkl.xz").read_bytes())
    (root / "MANO_RIGHT.pkl").write_bytes(data)


def write_mano_plain(root: Path) -> None:
    hand = {key: builtin_hand()[key] for key in MANO_SHAPES}
    (root / "MANO_RIGHT.pkl").write_bytes(pickle.dumps(hand, 2))


def write_mano_npz(root: Path) -> None:
    save_mano(root / "MANO_RIGHT.npz", builtin_hand())
    (root / "npz").touch()


def mano_numbers(root: Path) -> dict:
    found = load_mano(root / ("MANO_RIGHT.npz" if (root / "npz").exists() else "MANO_RIGHT.pkl"))
    return {"told": None, "n": 1, "hand": found}


def write_checkpoint(root: Path) -> None:
    torch.manual_seed(0)
    cfg = ti_net.Config(backbone="vit_mini", image_size=32, finetune="synthetic:calm")
    mean = {"pose": torch.zeros(48), "shape": torch.zeros(10), "joints": torch.zeros(21, 3),
            "uv": torch.full((21, 2), 0.5), "labels": 7}
    save_checkpoint(root / "finetune.pt", {
        "method": "ti_net", "cfg": dataclasses.asdict(cfg), "row": "ti_net", "epoch": 1, "mean": mean,
        "model": ti_net.build(cfg).state_dict()})


def read_checkpoint(root: Path) -> dict:
    content = load_checkpoint(root / "finetune.pt")
    try:
        model, cfg = judge.load(root)
    except UserError as error:
        return {"told": str(error), "n": 0}
    return {"told": type(content).__name__, "n": 1, "state": model.state_dict()}


def write_flags(root: Path) -> None:
    (root / "flags.json").write_text(json.dumps({"data": ["synthetic"], "lr": 0.001, "epochs": 3, "quick": True}))


def read_flags(root: Path) -> dict:
    given = recall(peclr.Config, {"resume": True, "out": str(root)})
    cfg = settle(peclr.Config, given, "pretrain", peclr.QUICK)
    return {"told": None, "n": 1, "flags": dataclasses.asdict(cfg)}


def write_freihand(root: Path) -> None:
    trees.write_freihand(root)
    (root / "training" / "labels").mkdir()
    for i in range(2):
        (root / "training" / "labels" / f"{i:08d}.json").write_text(json.dumps([[[5.0, 6.0]] * 21, [0.5] * 21]))


def write_yt3d(root: Path) -> None:
    trees.write_yt3d(root)


def write_rig(root: Path, moving: bool = False) -> None:
    trees.rig_tree(root, 0.04, moving=moving, frames=4)


def write_imagenet(root: Path) -> None:
    trees.save(root / "train" / "a" / "1.png", trees.noise(30, 40))


def write_hanco(root: Path) -> None:
    trees.hanco_tree(root, golden("hamuco"))


def write_dexycb(root: Path) -> None:
    trees.write_dexycb(root, [0], sequences=1)


def read_dexycb(root: Path) -> dict:
    folder = sorted(root.glob("2*/*"))[0].relative_to(root).as_posix()
    index = sources.dexycb._parse_dexycb(root, "dexycb", [folder], [0, 1], files=[], cache=None, mano=HANDS)
    for reason in sorted(set(index.columns["reason"].tolist()) - {""}):
        index = index.drop(index.columns["reason"] == reason, reason)
    return samples(index)


def write_ho3d(root: Path) -> None:
    trees.write_ho3d(root, "train", [trees.meta(0), pickle.dumps(trees.meta(1), 2)], ["A/0", "A/1"])


def write_ho3d_test(root: Path) -> None:
    trees.write_ho3d(root, "evaluation", [trees.evaluation_label(i) for i in range(2)], ["A/0", "A/1"], ".jpg")
    joints = [[[0.01 * i, -0.02, 0.5]] + [[0.01 * i, -0.02, 0.5 + 0.01 * k] for k in range(20)] for i in range(2)]
    joints = (np.array(joints) * [1, -1, -1]).tolist()
    (root / "evaluation_xyz.json").write_text(json.dumps(joints))


HANDS = {"right": builtin_hand(), "left": builtin_hand()}
READERS = {
    "freihand": Reader(write_freihand, "training*.json", reading(index_freihand, "train", mano=HANDS)),
    "freihand_labels": Reader(write_freihand, "training/labels/*.json", reading(index_freihand, "train", mano=HANDS), True),
    "yt3d": Reader(write_yt3d, "*.json", reading(index_yt3d, "train", mano=HANDS)),
    "coco": Reader(lambda root: trees.write_coco(root, [trees.person(0), trees.person(1)]), "annotations/*.json", reading(index_coco, "val")),
    "ho3d": Reader(write_ho3d, "train/*/meta/*.pkl", reading(index_ho3d, "train", mano=HANDS)),
    "ho3d_test": Reader(write_ho3d_test, "evaluation*.*", reading(index_ho3d, "test", mano=HANDS)),
    "dexycb": Reader(write_dexycb, "2*/*_140000/*/*.npz", read_dexycb),
    "dexycb_yaml": Reader(write_dexycb, "*/*_14000[0]/meta.yml|calibration/*/*.yml", read_dexycb),
    "interhand": Reader(lambda root: trees.write_interhand(root, fits={"100": {"right": {"pose": [0.1] * 48, "shape": [0.0] * 10, "trans": [0.0] * 3}}}),
                        "annotations/test/*.json", reading(index_interhand, "test", mano=HANDS)),
    "hanco": Reader(write_hanco, "calib/*/*.json|xyz/*/*.json|shape/*/*.json", reading(index_hanco, "train", mano=HANDS)),
    "hanco_labels": Reader(write_hanco, "rgb_2d_keypoints/*/*/*.json", reading(index_hanco, "train", mano=HANDS), True),
    "100doh": Reader(trees.write_doh100, "Annotations/*.xml|ImageSets/Main/train.txt", reading(index_doh100, "train")),
    "assembly101": Reader(trees.write_assembly101, "annotations/val/*.json", reading(index_assembly101, "val")),
    "h2o": Reader(trees.write_h2o, "subject1/*/*/*/*/*.txt|subject1/*/*/*/*.txt", reading(index_h2o, "train")),
    "cameras": Reader(functools.partial(write_rig, moving=True), "cameras.json", reading(index_cameras, "all")),
    "cameras_labels": Reader(write_rig, "labels/*/*.json", reading(index_cameras, "all"), True),
    "folder": Reader(write_labels, "labels.jsonl", reading(index_folder, "all"), True),
    "imagenet": Reader(write_imagenet, "train/a/*", reading(index_imagenet, "train")),
    "kept": Reader(write_kept, ".cache/*.npz", read_kept),
    "photos": Reader(write_photos, "photos/*|cache/*.jsonl", read_photos),
    "pictures": Reader(write_pictures, "p/*", read_pictures),
    "mano": Reader(write_mano, "*.pkl", mano_numbers),
    "mano_plain": Reader(write_mano_plain, "*.pkl", mano_numbers),
    "mano_npz": Reader(write_mano_npz, "*.npz", mano_numbers),
    "checkpoint": Reader(write_checkpoint, "*.pt", read_checkpoint, names_a_hand=True),
    "flags": Reader(write_flags, "flags.json", read_flags, names_a_hand=True)}


# ---- What came of it -----------------------------------------------------------------------------


def flatten(value: object, name: str = "") -> dict[str, object]:
    """A nested answer as {name: array or plain value}."""
    if isinstance(value, dict):
        parts = [flatten(item, f"{name}.{key}") for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [flatten(item, f"{name}.{k}") for k, item in enumerate(value)]
    else:
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value}
    return {key: item for part in parts for key, item in part.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(x, b[key], equal_nan=x.dtype.kind == "f" and b[key].dtype.kind == "f") if isinstance(x, np.ndarray) and isinstance(b[key], np.ndarray)
        else (x is b[key] or x == b[key]) if type(x) is type(b[key]) else False for key, x in a.items())


def impossible(flat: dict) -> str:
    """What no answer may hold, or ""."""
    for key, x in flat.items():
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            continue
        if np.isinf(x).any() or (np.abs(np.nan_to_num(x)) > 1e9).any():
            return f"{key} holds {np.abs(x[~np.isnan(x)]).max()}"
        if key == ".columns.K" and ((x[:, [0, 1], [0, 1]] <= 0).any() or np.isnan(x).any()) and "folder" not in key:
            return f"{key} has no focal length" if not np.isnan(x).all(1).all(1).any() else ""
        if key == ".columns.box" and (x[:, 2:] < 0).any():
            return f"{key} is no box"
        if key.endswith("confidence") and ((x < 0) | (x > 1)).any():
            return f"{key} is outside [0, 1]"
    return ""


SEEN: list[str] = []                                  # what a try did that no reader should
GUARD = {"on": False, "root": "", "outside": ""}


def audit(event: str, given: tuple) -> None:
    if not GUARD["on"]:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        SEEN.append(f"{event} {given[:1]}")
    elif event == "pickle.find_class" and given[0] in ("os", "posix", "builtins", "subprocess", "__builtin__"):
        SEEN.append(f"{event} {given}")
    elif event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], (str, bytes)):
        path = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(given[0])))
        if path.startswith(GUARD["outside"]) or path in ("/etc/passwd", "/secret"):
            SEEN.append(f"{event} {path}")


def one_try(reader: Reader, root: Path, files: list[Path], seed: str, baseline: dict) -> tuple[str, bool, str]:
    """Kind, noise and a remark of one change; the tree is as before afterwards."""
    rng = random.Random(seed)
    file = rng.choice(files)
    data = file.read_bytes()
    before = {path.relative_to(root) for path in root.rglob("*")}
    try:
        wrong = change_file(rng, file)
        what = str(file.relative_to(root))
        SEEN.clear()
        with warnings.catch_warnings(record=True) as noise:
            GUARD["on"] = True
            try:
                answer = reader.read(root)
            except UserError as error:
                kind, remark = "clear", str(error)
                if "\n" in remark or ("--" not in remark and not {root.name, *(path.name for path in before)} & set(re.findall(r"[\w.]+", remark))):
                    kind, remark = "traceback", f"no sentence that names the file: {remark}"
            except BaseException:
                kind, remark = "traceback", "".join(traceback.format_exc().splitlines(True)[-9:])
            else:
                flat = flatten(answer)
                told = {k: v for k, v in flat.items() if k.startswith(".told")}
                was = {k: v for k, v in baseline.items() if k.startswith(".told")}
                kind, remark = "right", ""
                if not same(flat, baseline):
                    remark = impossible(flat)
                    if not remark and wrong and same(told, was) and not reader.unknown:
                        differ = [k for k in flat if k not in baseline or not same({k: flat[k]}, {k: baseline[k]})]
                        remark = f"other {differ[:4]} without a word"
                    kind = "silent" if remark else "right"
            finally:
                GUARD["on"] = False
        # Its path is read as a hand's arrays by a reader that executes nothing, which "mano" attacks.
        looked = [one for one in SEEN if not (reader.names_a_hand and one.startswith("open "))]
        if looked or (root / "pwned").exists():
            kind, remark = "unsafe", str(looked)
        loud = [str(one.message) for one in noise if not issubclass(one.category, DeprecationWarning)]
        if kind in ("right", "clear") and loud:
            remark = f"warned: {loud[0]}"
        return kind, bool(loud), f"{what}: {remark}"
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        elif os.path.lexists(file):
            file.unlink()
        file.write_bytes(data)
        for path in sorted((p for p in root.rglob("*") if p.relative_to(root) not in before), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


def fork_tries(name: str, reader: Reader, root: Path, seeds: list[str], baseline: dict) -> list[tuple[str, bool, str]]:
    """The outcomes of tries, in one fork after another: whoever kills one takes none with it."""
    files = sorted({file for pattern in reader.files.split("|") for file in root.glob(pattern) if file.is_file()})
    out: list[tuple[str, bool, str]] = []
    while len(out) < len(seeds):
        come, go = os.pipe()
        child = os.fork()
        if not child:
            os.close(come)
            with contextlib.suppress(BaseException):
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                os.chdir(root)
                torch.set_num_threads(1)                  # a pool of threads does not survive a fork
                sys.addaudithook(audit)
                for seed in seeds[len(out):]:
                    signal.alarm(SECONDS)
                    line = json.dumps(one_try(reader, root, files, seed, baseline))
                    os.write(go, line.encode("utf-8", "backslashreplace") + b"\n")
            os._exit(0)
        os.close(go)
        with os.fdopen(come) as pipe:
            lines = [json.loads(line) for line in pipe]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out += [tuple(line) for line in lines]
        if len(out) < len(seeds):
            kind = "hang" if code == -signal.SIGALRM else "traceback"
            out.append((kind, False, f"the process ended with {code}"))
            fresh(reader, root)
    return out


def fresh(reader: Reader, root: Path) -> None:
    """Write a tree anew, and beside it what no reader should look at."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    reader.write(root)


def fuzz(name: str, tries: int, seed: int) -> tuple[Counter, float, list[tuple[str, str, str]]]:
    """How many tries of a reader came to what, seconds, and what was wrong: (kind, try, remark)."""
    reader = READERS[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()), \
            mock.patch.object(sources.photos, "detect_hands", found_hand):        # not MediaPipe's
        outside = Path(folder).resolve() / "outside"
        trees.save(outside / "secret.png", trees.noise(9, 9))
        root = Path(folder).resolve() / "tree"
        GUARD.update(root=str(root), outside=str(outside))
        fresh(reader, root)
        answer = reader.read(root)
        fresh(reader, root)
        seeds = [f"{seed}-{name}-{k}" for k in range(tries)]
        found = fork_tries(name, reader, root, seeds, flatten(answer))
    count = Counter(kind for kind, _, _ in found)
    count["noise"] = sum(noise for _, noise, _ in found)
    bad = [(kind, one, remark) for one, (kind, noise, remark) in zip(seeds, found)
           if noise or kind not in ("right", "clear")]
    return count, time.monotonic() - began, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", choices=[[], *READERS], help=", ".join(READERS))
    parser.add_argument("--tries", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what was wrong")
    words = parser.parse_args()
    names = words.readers or [*READERS]
    total: Counter = Counter()
    seconds = 0.0
    print(f"{'reader':16}{'tries':>7}" + "".join(f"{kind:>11}" for kind in KINDS) + f"{'seconds':>9}")
    for name in names:
        tries = -(-words.tries // len(names))
        count, took, bad = fuzz(name, tries, words.seed)
        print(f"{name:16}{tries:7}" + "".join(f"{count[kind]:11}" for kind in KINDS) + f"{took:9.1f}", flush=True)
        total += count
        seconds += took
        for kind, one, remark in bad if words.show else ():
            print(f"  {kind} {one} {remark}")
    print(f"{'all':16}{sum(total[kind] for kind in KINDS[:-1]):7}" + "".join(f"{total[kind]:11}" for kind in KINDS)
          + f"{seconds:9.1f}")
    return 1 if sum(total[kind] for kind in KINDS[2:-1]) else 0


if __name__ == "__main__":
    sys.exit(main())
