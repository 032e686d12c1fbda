"""Which official protocols judge a data set beside `ours`, and which of them have a file to submit.

A protocol takes the facts of some pictures (`sources.judging.facts`) and a hand with the data set's
joints, and gives {metric: values}; means come last, in `sources.judging.Tally`. Values (N,) are one
a sample; (N, P) one a point: the mean over samples of each point, then over points, as the tool
kits average; (N, P, 1): every point counts alike. NaN does not count. A name that ends in _median
asks for the median of all values.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# common before torch: it settles how threads wait
from common import Mano
from sources import assembly101, coco, dexycb, freihand, h2o, hanco, ho3d, interhand, yt3d
from sources.index import Index

from torch import Tensor

Protocol = Callable[[dict, Mano], dict[str, Tensor]]

PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "dexycb": dexycb.PROTOCOLS, "interhand": interhand.PROTOCOLS, "freihand": freihand.PROTOCOLS,
    "ho3d": ho3d.PROTOCOLS, "yt3d": yt3d.PROTOCOLS, "coco": coco.PROTOCOLS,
    "hanco": hanco.PROTOCOLS, "h2o": h2o.PROTOCOLS, "assembly101": assembly101.PROTOCOLS}

# (folder, index, {"joints": (N, 21, 3) m, perhaps "verts": (N, 778, 3)}) -> the file, un-mirrored
SUBMIT: dict[str, Callable[[Path, Index, dict[str, Tensor]], Path]] = {
    "freihand": freihand.submit_freihand, "ho3d": ho3d.submit_ho3d, "dexycb": dexycb.submit_dexycb}
SUBMITTED_PART = {"freihand": "centre"}           # of others, crops may know the evaluation's truth
