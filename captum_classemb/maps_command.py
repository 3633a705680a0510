"""The ``maps`` command: the maps of a whole data set, without pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from captum_classemb.study_commands import ImagesRefused, study_dataset


def maps_command(
    methods: tuple[str, ...], debug_option: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> click.Command:
    """The command, to be added to a command line.

    Args:
        methods: names of the methods there are.
        debug_option: the option that all commands have.
    """
    positive, path = click.IntRange(min=1), click.Path(path_type=Path)
    parameters = [
        click.Option(
            ["--model"], default="demo_vit", show_default=True, metavar="NAME",
            help="A Vision Transformer that timm knows, or one of the papers' short names.",
        ),
        click.Option(
            ["--checkpoint"], type=path, metavar="FILE",
            help="Weights for it: safetensors, or a PyTorch file of plain tensors.",
        ),
        click.Option(
            ["--data", "data_path"], required=True, type=path, metavar="PATH",
            help="Folder of images, with labels or without; or the word scenes.",
        ),
        click.Option(
            ["--layout"], metavar="NAME", help="Layout of the folder. Default: recognised."
        ),
        click.Option(
            ["--labels"], metavar="FILE",
            help="Which class each folder is, as for study; or the word sorted.",
        ),
        click.Option(
            ["--resize"], type=click.Choice(["crop", "squash"]), default="crop", show_default=True,
            help="crop: the model's own evaluation transform; squash: the whole image, resized.",
        ),
        click.Option(
            ["--target", "targets"], multiple=True, metavar="CLASS",
            help="label, predicted, or an index or name of a class; several allowed. "
            "Default: predicted.",
        ),
        click.Option(
            ["--method"], type=click.Choice(methods), default=methods[0], show_default=True,
            metavar="NAME", help=f"{', '.join(methods)}.",
        ),
        click.Option(
            ["--keep-as"], type=click.Choice(["float16", "bfloat16", "float32"]),
            default="float16", show_default=True, help="Type of the scores on disk.",
        ),
        click.Option(
            ["--limit"], type=positive, metavar="N",
            help="Take N images, evenly spaced over the dataset.",
        ),
        click.Option(["--batch-size"], type=positive, default=32, show_default=True),
        click.Option(
            ["--workers"], type=click.IntRange(min=0), default=0, show_default=True,
            help="Processes that read images.",
        ),
        click.Option(
            ["--shard"], type=positive, default=1024, show_default=True, metavar="N",
            help="Images in one file.",
        ),
        click.Option(
            ["--device"], default="auto", show_default=True,
            help="cpu, cuda, ...; auto: a GPU where there is one.",
        ),
        click.Option(
            ["--dtype"], type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
            default="float32", show_default=True, help="Type the model computes in.",
        ),
        click.Option(
            ["--output"], required=True, type=path, metavar="DIR", help="Folder for the maps."
        ),
        click.Option(["--resume"], is_flag=True, help="Go on with an interrupted run in DIR."),
        click.Option(
            ["--verify"], is_flag=True,
            help="With --resume: read again all files that were read, to see that none changed.",
        ),
        click.Option(["--quiet"], is_flag=True, help="No progress bar, no summary."),
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
    device = local_device(given["device"])
    resolve_device(device)
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
