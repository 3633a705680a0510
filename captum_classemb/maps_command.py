"""The ``maps`` command: the maps of a whole data set, without pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from captum_classemb.command_options import option
from captum_classemb.study_commands import ImagesRefused, study_dataset


def maps_command(debug_option: Callable[[Callable[..., Any]], Callable[..., Any]]) -> click.Command:
    """The command, to be added to a command line.

    Args:
        debug_option: the option that all commands have.
    """
    parameters = [
        option("model", default="demo_vit"),
        option("checkpoint"),
        option("data", "data_path"),
        option("layout"),
        option("labels"),
        option("resize"),
        click.Option(
            ["--target", "targets"], multiple=True, metavar="CLASS",
            help="label, predicted, or an index or name of a class; several allowed. "
            "Default: predicted.",
        ),
        option("method", default="patch-importance", help="One that doctor lists."),
        click.Option(
            ["--keep-as"], type=click.Choice(["float16", "bfloat16", "float32"]),
            default="float16", show_default=True, help="Type of the scores on disk.",
        ),
        option("limit"),
        option("batch-size"),
        option("workers"),
        click.Option(
            ["--shard"], type=click.IntRange(min=1), default=1024, show_default=True, metavar="N",
            help="Images in one file.",
        ),
        option("device"),
        option("dtype"),
        option("output", required=True, help="Folder for the maps."),
        option("resume"),
        option("verify"),
        option("quiet"),
    ]  # fmt: skip

    def callback(**given: Any) -> None:
        _run(given)

    extra = getattr(debug_option(callback), "__click_params__", [])
    return click.Command(
        "maps", callback=callback, params=[*parameters, *extra],
        help="Write the maps of a whole data set: sums of patches and an index, no pictures.",
        epilog="Example: captum-classemb maps --model vit_base_patch16_224 --data FOLDER "
        "--output maps",
    )  # fmt: skip


def _run(given: dict[str, Any]) -> None:
    import torch

    from captum_classemb.explain.maps import MapOptions, write_maps
    from captum_classemb.models import class_names, load_model
    from captum_classemb.models.load import resolve_device
    from captum_classemb.runs.processes import init_process_group, is_main_process, local_device
    from captum_classemb.vit import adapt

    init_process_group()
    device = local_device(resolve_device(given["device"]))
    loud = is_main_process() and not given["quiet"]
    model = load_model(given["model"], random_init=True, device="meta")
    targets = _targets(given["targets"], class_names(model))
    _ = adapt(model).readout
    data = study_dataset(given, "label" in targets, say=loud)
    options = MapOptions(
        targets=targets,
        method=given["method"],
        dtype=given["keep_as"],
        progress=not given["quiet"],
        **{key: given[key] for key in _SAME},
    )
    dtype = getattr(torch, given["dtype"])
    model = load_model(given["model"], given["checkpoint"], device=device, dtype=dtype)
    result = write_maps(adapt(model), given["model"], data, given["output"], options)
    if loud:
        click.echo(f"{result.images} images; their maps are in {result.output}")
    if result.refused:
        count = len(result.refused)
        raise ImagesRefused(f"{count} of the images could not be read: run.json names them.")


_SAME = ("shard", "batch_size", "limit", "workers", "resume", "verify")


def _targets(given: Sequence[str], names: Any) -> list[Any]:
    """Targets as the command line takes them: ``label``, ``predicted``, an index or a name.

    Raises:
        TargetError: if a class is unknown.
    """
    found: list[Any] = []
    for text in dict.fromkeys(given or ("predicted",)):
        if text == "label" or text == "predicted":
            found.append(text)
        else:
            found.append(names.find(text))
    return list(dict.fromkeys(found))
