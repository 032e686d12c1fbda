"""100 Days of Hands: the boxes of its 100K frames (ddshan/hand_object_detector e6eec71)."""
from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

# common before torch: it settles how threads wait
from common import UserError
from sources.files import cached, data_folder, drop_missing, path_column
from sources.index import DataSet, Index
from sources.parsing import below, file_bytes, numbers, one_of, reading

import numpy as np
from tqdm import tqdm

HOMES = ("VOCdevkit2007_handobj_100K/VOC2007", "VOC2007", ".")
EDGES = ("xmin", "ymin", "xmax", "ymax")


def index_doh100(root: str | Path, split: str = "train", cache: str | Path | None = None) -> Index:
    """100DOH's annotated frames as pascal_voc_format.zip holds them, one row a hand: box and side.

    VOCdevkit2007_handobj_100K/VOC2007, in root or root itself, holds ImageSets/Main/SPLIT.txt, the
    names of a split, and for each of them Annotations/NAME.xml and JPEGImages/NAME.jpg. Boxes count
    pixels from 1, both ends included. Nothing else is annotated: no key points, no camera. So the
    set serves pre-training, and none of it can be scored. Left out and counted: hands whose side is
    not annotated (the authors' loader calls them left), empty boxes, missing pictures. UserError:
    another layout, a file that is not such an annotation.
    """
    root = data_folder(root, "100doh")
    listing = f"ImageSets/Main/{split}.txt"
    home = next((root / place for place in HOMES if (root / place / listing).is_file()), None)
    if home is None:
        raise UserError(f"100doh: {root / HOMES[0] / listing} is missing (layout of "
                        "pascal_voc_format.zip)")
    files = [name for name in (listing, "Annotations") if (home / name).exists()]
    return drop_missing(_parse_doh100(home, listing, files=files, cache=cache))


def _hands(file: Path) -> list[tuple[str, np.ndarray]]:
    """Side, "" where none is annotated, and edges (4,), as written, of the hands in a frame."""
    with reading(f"100doh: {file}"):
        data = file_bytes(file)
        if b"<!DOCTYPE" in data:
            raise ValueError("a document type is not allowed")            # entities may explode
        found = []
        for thing in ElementTree.fromstring(data).iter("object"):
            if one_of(_word(thing, "name"), "name", "hand", "targetobject") == "hand":
                side = one_of(_word(thing, "handside"), "handside", "0", "1", "", "None")
                edges = [float(_word(thing, f"bndbox/{edge}")) for edge in EDGES]
                found.append(({"0": "left", "1": "right"}.get(side, ""),
                              numbers(edges, "bndbox", 4)))
        return found


def _word(thing: ElementTree.Element, tag: str) -> str:
    """The text of a tag, "" where there is none."""
    return (thing.findtext(tag) or "").strip()


@cached
def _parse_doh100(root: Path, listing: str) -> Index:
    """All hands of a list of frames."""
    rows = []
    with reading(f"100doh: {root / listing}"):
        names = [below(name, "a frame") for name in file_bytes(root / listing).decode().split()]
    empty = 0
    for name in tqdm(names, "reading 100doh", disable=len(names) < 2000):
        hands = _hands(root / "Annotations" / f"{name}.xml")
        empty += not hands
        rows += [(name, f"{name}-{k}", *hand) for k, hand in enumerate(hands)]
    if not rows:
        raise UserError(f"100doh: no frame of {root / listing} has a hand")
    name, ids, side, edges = map(np.array, zip(*rows))
    box = np.concatenate([edges[:, :2] - 1, edges[:, 2:] - edges[:, :2] + 1], 1)
    index = Index(f"100doh {Path(listing).stem}", str(root), {
        "paths": path_column([f"JPEGImages/{one}.jpg" for one in name.tolist()]), "id": ids,
        "side": side, "box": box.astype(np.float32)}, "annotated",
        notes=[f"{empty} of {len(names)} frames have no hand"] if empty else [])
    index = index.drop(side == "", "hands without a side")
    return index.drop((index.columns["box"][:, 2:] <= 1).any(1), "hands without a box")


# No joints are annotated, so none are meant.
DOH100 = DataSet(index_doh100)
