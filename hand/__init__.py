"""A hand to look at: the user's own MANO file or the one built in, how it is rendered and drawn."""
from __future__ import annotations

import zlib
from pathlib import Path

# common before torch: it settles how threads wait
from hand.builtin import builtin_hand
from hand.official import load_mano

import numpy as np


def user_hand(mano: str) -> tuple[dict[str, np.ndarray], str]:
    """The right hand's arrays and what to call them.

    --mano's file, else data/mano/MANO_RIGHT.pkl where it is there, else the built-in hand.
    """
    usual = Path("data/mano/MANO_RIGHT.pkl")
    if mano == "builtin" or (not mano and not usual.is_file()):
        return builtin_hand(), "the built-in hand"
    path = mano or str(usual)
    return load_mano(path), path


def hand_mark(mano: str) -> str:
    """Which hand --mano means, in eight digits: a network's mesh is of use with that one only."""
    template, _ = user_hand(mano)
    return f"{zlib.crc32(np.ascontiguousarray(template['v_template']).tobytes()):08x}"


def both_hands(mano: str) -> dict[str, dict] | None:
    """{"right": .., "left": ..} of the user's own files; MANO_LEFT lies beside MANO_RIGHT."""
    right, name = user_hand(mano)
    if name == "the built-in hand":
        return None
    hands = {"right": right}
    left = Path(name).with_name(Path(name).name.replace("RIGHT", "LEFT"))
    if left.is_file() and str(left) != name:
        hands["left"] = load_mano(left)
    return hands
