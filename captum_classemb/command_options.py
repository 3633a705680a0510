"""Options that several commands have, under one name and with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


def _known_method(ctx: click.Context, option: click.Parameter, given: Any) -> Any:
    """Names of `captum_classemb.attr.METHODS`, which is imported to look one up."""
    if given:
        from captum_classemb.attr import METHODS

        known = click.Choice([name for name, method in METHODS.items() if not method.needs])
        for name in given if isinstance(given, tuple) else (given,):
            known.convert(name, option, ctx)
    return given


def _real_device(ctx: click.Context, option: click.Parameter, given: str) -> str:
    if given.split(":")[0] == "meta":
        raise click.BadParameter("meta computes nothing: give cpu, cuda, ...", ctx, option)
    return given


_SHARED: dict[str, dict[str, Any]] = {
    "model": {
        "metavar": "NAME",
        "help": "A name of timm's, or of the papers' models.",
    },
    "checkpoint": {
        "type": _PATH,
        "metavar": "FILE",
        "help": "Weights for it, as tensors alone.",
    },
    "data": {
        "type": _PATH,
        "metavar": "PATH",
        "required": True,
        "help": "Folder of images; or scenes, digits.",
    },
    "layout": {"metavar": "NAME", "help": "Layout of the folder. Default: recognised."},
    "labels": {
        "metavar": "FILE",
        "help": "File of lines folder,class; or sorted.",
    },
    "method": {"metavar": "NAME", "callback": _known_method},
    "resize": {
        "type": click.Choice(["crop", "squash"]),
        "default": "crop",
        "help": "crop: the model's own evaluation transform; squash: the whole image, resized.",
    },
    "limit": {"type": _POSITIVE, "metavar": "N", "help": "Take N images, evenly spaced."},
    "batch-size": {
        "type": _POSITIVE,
        "default": 32,
        "metavar": "N",
        "help": "Images in one forward pass.",
    },
    "workers": {
        "type": click.IntRange(min=0),
        "default": 0,
        "metavar": "N",
        "help": "Processes that read images.",
    },
    "device": {
        "callback": _real_device,
        "default": "auto",
        "metavar": "NAME",
        "help": "cpu, cuda, ...; auto: a GPU, if any.",
    },
    "dtype": {
        "type": click.Choice(["float32", "float64", "bfloat16", "float16"]),
        "default": "float32",
        "help": "Type the model computes in.",
    },
    "output": {"type": _PATH, "metavar": "DIR", "help": "Folder for the results."},
    "resume": {"is_flag": True, "help": "Go on with an interrupted run in DIR."},
    "verify": {
        "is_flag": True,
        "help": "With --resume: hash all files again.",
    },
    "quiet": {"is_flag": True, "help": "No progress bar, no table."},
}


def option(name: str, *parameter: str, **changes: Any) -> click.Option:
    """A shared option.

    Args:
        name: without dashes before it.
        parameter: what the function calls it, where that is not its name.
        changes: what is otherwise for one command.
    """
    settings = {**_SHARED[name], **changes}
    shown = "default" in settings and not settings.get("is_flag", False)
    return click.Option([f"--{name}", *parameter], show_default=shown, **settings)
