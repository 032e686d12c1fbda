"""What a run was trained with, and what its row is called for it."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

# common before torch: it settles how threads wait
from common import UserError

# Options that make no run another recipe.
PLAIN = {"seed", "out", "row", "resume", "workers", "device", "cache", "save_minutes", "root",
         "compile", "recompute", "precision"}


def stored_config(Config: type, stored: dict[str, Any]) -> Any:
    """The Config that a checkpoint keeps as a plain dict, without options of other versions."""
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: tuple(value) if isinstance(value, list) else value
                     for name, value in stored.items() if name in known})


def pretraining(init: str) -> dict[str, Any] | None:
    """The options that made the weights in a file, from config.json beside it, and their `name`.

    None where no pre-training here wrote the file, or it lies elsewhere by now. backbone.pt is that
    of the one pre-training beside it that has no backbone-NAME.pt, which older versions wrote too.
    """
    file = Path(init)
    made = {folder.name.removeprefix("pretrain-"): folder
            for folder in file.parent.glob("pretrain-*")}
    own = [name for name in made if file.name == f"backbone-{name}.pt"]
    if file.name == "backbone.pt":
        own = [name for name in made if not (file.parent / f"backbone-{name}.pt").is_file()]
    if len(own) != 1 or not (made[own[0]] / "config.json").is_file():
        return None
    return json.loads((made[own[0]] / "config.json").read_bytes())["cfg"] | {"name": own[0]}


def row_name(init: str, given: str = "") -> str:
    """What a fine-tuned row is called: `given` (--row), scratch, or what made --init, and on what.

    METHOD[-VARIANT ...][-AUGMENTATION ...]-on-DATA[+DATA ...], or else the file's name.
    """
    if {"/", "\\"} & set(given) or given.startswith("."):
        raise UserError(f"--row {given}: becomes the name of a folder, so write a plain word")
    if given or init == "random":
        return given or "scratch"
    made = pretraining(init)
    if made is None:
        return Path(init).stem.removeprefix("backbone-")
    data = "+".join(spec.partition("=")[0].replace(":", "-") for spec in made["data"])
    drawn = made.get("augment") or ()
    return "-".join((made["name"], *drawn, "on", data))


def origin(init: str) -> str:
    """Where a row's first weights come from, back to the beginning: for the line below a table."""
    if init == "random":
        return "random weights"
    made = pretraining(init)
    if made is None:
        return init
    return f"{init}, pre-trained on {' '.join(made['data'])} from {origin(made['init'])}"


def recipe(cfg: dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a run was trained with, {option: value}: not its seed, nor what changes no number.

    Nor the options in `but`. First weights count by what they were trained with, as init.OPTION.
    """
    options = {key: x for key, x in cfg.items() if key not in (*PLAIN, *but, "init")}
    init = cfg.get("init", "random")
    made = pretraining(init) if init != "random" else None
    if made is None:                         # a file of the run itself is not named by its folder
        return options | {"init": init.removeprefix(cfg.get("out", ""))}
    return options | {f"init.{key}": x for key, x in recipe(made).items()}


def key_of(options: dict[str, Any]) -> str:
    """The same text for the same options, whether they come from a file or from a Config."""
    return json.dumps(options, sort_keys=True, default=str)
