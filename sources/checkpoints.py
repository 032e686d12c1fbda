"""What a last.pt must be for a run to go on from it: written by the same options, and whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError

import torch
from torch import Tensor, nn

# What a resumed run may change, since no number of it comes from there; of FILES the folder only.
FREE = {"out", "root", "cache", "keep", "row", "workers", "device", "save_minutes", "resume",
        "compile", "recompute"}
FILES = {"init", "mano", "backgrounds"}
# What last.pt holds. Nothing random is in it.
FIELDS = {"method": str, "cfg": dict, "model": dict, "optimizer": dict, "step": int, "memo": dict,
          "log_bytes": int}


def take_up(state: Any, file: Path, head: dict[str, Any], model: nn.Module,
            optimizer: torch.optim.Optimizer, total: int) -> None:
    """Give a last.pt's content back to the model and its optimiser.

    `head` has the run's own method and cfg, `total` is its steps. UserError where the file is of
    another method or other options, each of them named, or is not what a run writes.
    """
    mend = "move the file away, and --resume begins this stage anew"
    wrong = misfits(state)
    if not wrong and state["method"] != head["method"]:
        wrong = f"was written by {state['method']}.py"
    if wrong:
        raise UserError(f"{file}: {wrong}; {mend}")
    # A file from before there was --precision has what was then the only one.
    device = next(model.parameters()).device
    stored = {"precision": "fp32" if device.type == "cpu" else "bf16"} | state["cfg"]
    if changed := differences(stored, head["cfg"]):
        said = ", ".join(f"{name} {_shown(old)}, not {_shown(now)}" for name, old, now in changed)
        own = ", ".join(_flag(name, old) for name, old, _ in changed)
        raise UserError(f"{file}: was written with {said}; a resumed run cannot change it, so "
                        f"{own}")
    try:
        if not 0 <= state["step"] <= total:
            raise ValueError(f"it is at step {state['step']} of {total}")
        _match(state["model"], model.state_dict())
        for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
            if "fused" in group and "fused" in own:         # the device's, which may change
                group["fused"] = own["fused"]
        _match_optimizer(state["optimizer"], optimizer)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:                  # torch raises of every kind where a type is wrong
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{file}: does not fit these options ({reason[0][:120]}); {mend}") from None
    if broken := not_finite(model):
        raise UserError(f"{file}: {broken} is not finite; {mend}")


def misfits(state: Any) -> str:
    """What is wrong with the types in a last.pt, or ""."""
    if not isinstance(state, dict):
        return "is no checkpoint of a run"
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            return f"its {name} is no {kind.__name__}"
    curve = state["memo"].get("curve", [])
    if not isinstance(curve, list) or not all(isinstance(mm, float) for mm in curve):
        return "its memo holds no curve of numbers"
    return "its log_bytes are below 0" if state["log_bytes"] < 0 else ""


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(option, value stored, value now) where both have it, it differs, and numbers come from it.

    A data set may have moved, and a file too: its folder does not count.
    """
    def meant(name: str, value: Any) -> Any:
        if name in ("data", "finetune"):
            specs = value if isinstance(value, (tuple, list)) else (value,)
            return [str(spec).partition("=")[0] for spec in specs]
        if name in FILES:
            return Path(str(value)).name
        return list(value) if isinstance(value, tuple) else value

    return [(name, stored[name], value) for name, value in now.items() if name in stored
            and name not in FREE and meant(name, stored[name]) != meant(name, value)]


def _shown(value: Any) -> str:
    """A value as one types it on the command line, and "nothing"."""
    words = value if isinstance(value, (tuple, list)) else (value,)
    return " ".join(map(str, words)) or "nothing"


def _flag(name: str, value: Any) -> str:
    """How one asks for a value on the command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return f"give {flag if value else flag.replace('--', '--no-', 1)}"
    return f"leave out {flag}" if _shown(value) == "nothing" else f"give {flag} {_shown(value)}"


def _match(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """ValueError where two dicts of tensors have other names, shapes or types."""
    for name in [*own, *stored]:
        if name not in own or not isinstance(stored.get(name), Tensor):
            raise ValueError(f"weights: {name} is there once only, or no tensor")
        one, other = stored[name], own[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise ValueError(f"weights: {name} is {tuple(one.shape)} {one.dtype}, not "
                             f"{tuple(other.shape)} {other.dtype}")


def _match_optimizer(stored: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """ValueError where options have other types, or a parameter's state another shape."""
    own = optimizer.state_dict()["param_groups"]
    groups = stored["param_groups"]
    if len(groups) != len(own):
        raise ValueError(f"the optimiser has {len(own)} groups, not {len(groups)}")
    for group, known in zip(groups, own):
        for name, value in known.items():
            number = isinstance(value, (int, float))
            kind = (int, float) if number else type(value)
            if name in group and not isinstance(group[name], kind):
                raise ValueError(f"the optimiser's {name} is {type(group[name]).__name__}")
        if group["params"] != known["params"]:
            raise ValueError("the optimiser has other parameters")
    sizes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for number, parts in stored["state"].items():
        for name, value in parts.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != sizes[number]:
                raise ValueError(f"the optimiser's {name} of parameter {number} is "
                                 f"{tuple(value.shape)}")


def not_finite(model: nn.Module) -> str:
    """The name of the first weight or running statistic that is not finite, or ""."""
    floats = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    sound = torch.stack([value.isfinite().all() for value in floats.values()])
    return "" if sound.all() else list(floats)[int(sound.int().argmin())]
