"""A hand to look at: the user's own MANO file or the one built in, how it is rendered and drawn."""
from __future__ import annotations

import zlib
from pathlib import Path

# common before torch: it settles how threads wait
from hand.builtin import builtin_hand
from hand.official import load_mano

import numpy as np


def user_hand(mano: str) -> tuple[dict[str, np.ndarray], str]:
    """The right hand's arrays and what to call them: --mano's file, data/mano/'s, or the built-in one."""
    usual = Path("data/mano/MANO_RIGHT.pkl")
    if mano == "builtin" or not mano and not usual.is_file():
        return builtin_hand(), "the built-in hand"
    path = mano or str(usual)
    return load_mano(path), path


def hand_mark(mano: str) -> str:
    """Which hand --mano means, in eight digits: networks with a mesh are of use with that one only."""
    return f"{zlib.crc32(np.ascontiguousarray(user_hand(mano)[0]['v_template']).tobytes()):08x}"


def _both_hands(mano: str) -> dict[str, dict] | None:
    """{"right": .., "left": ..} of the user's own files; MANO_LEFT lies beside MANO_RIGHT."""
    right, name = user_hand(mano)
    if name == "the built-in hand":
        return None
    left = Path(name).with_name(Path(name).name.replace("RIGHT", "LEFT"))
    return {"right": right} | ({"left": load_mano(left)} if left.is_file() and str(left) != name else {})
