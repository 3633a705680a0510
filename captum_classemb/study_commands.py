"""The ``study`` command: one subcommand for every study in this package.

Nothing but click is imported before a subcommand is looked up, so that the command line that
holds this group answers at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from captum_classemb.command_options import option

if TYPE_CHECKING:
    from captum_classemb.data import StudyDataset
    from captum_classemb.runs.config import StudyConfig
    from captum_classemb.runs.study import Study
    from captum_classemb.runs.tables import Row

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options() -> list[click.Option]:
    from captum_classemb.data import LAYOUTS

    return [
        option("model", required=True),
        option("checkpoint"),
        click.Option(
            ["--random-init"], is_flag=True, help="Leave weights as initialised (control)."
        ),
        option("data", "data_path"),
        option("layout", type=click.Choice(list(LAYOUTS))),
        option("labels"),
        option(
            "resize", type=click.Choice(["crop", "squash", "paper"]),
            help="crop: the model's own evaluation transform; squash: the whole image, resized; "
            "paper: what the published code does for this one of its seven models.",
        ),
        click.Option(
            ["--variant"], type=click.Choice(["corrected", "paper"]), default="corrected",
            show_default=True, help="paper: what the published code computes.",
        ),
        option("limit"),
        option("batch-size"),
        option("workers"),
        click.Option(
            ["--checkpoint-every"], type=click.IntRange(min=1), default=1024, show_default=True,
            metavar="N", help="Images between two checkpoints.",
        ),
        option("device"),
        click.Option(["--seed"], type=click.IntRange(min=0), default=0, show_default=True),
        option("output", required=True),
        option("resume"),
        option("verify"),
        option("quiet"),
    ]  # fmt: skip


def _compare_option() -> click.Option:
    return click.Option(
        ["--compare"], type=click.Path(path_type=Path), multiple=True, metavar="RUN",
        help="Folder of a run of this study on another model: the figures show both (several "
        "allowed).",
    )  # fmt: skip


def _training_option() -> click.Option:
    return click.Option(
        ["--train-data"], type=click.Path(path_type=Path), metavar="PATH",
        help="What is fitted on. Default: the dataset's own train split; without one, 5 folds.",
    )  # fmt: skip


class StudyGroup(click.Group):
    """Subcommands that are looked up in the registry of studies.

    Args:
        decorate: applied to the function of every subcommand, for options that all commands of
            the command line have.
    """

    def __init__(self, *args: Any, decorate: Decorator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decorate = decorate

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all studies."""
        from captum_classemb.studies.catalogue import all_studies

        return list(all_studies())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of one study."""
        from captum_classemb.studies.catalogue import all_studies

        study = all_studies().get(cmd_name)
        if study is None:
            return None

        def callback(**given: Any) -> None:
            run_command(study, given)

        function = callback if self.decorate is None else self.decorate(callback)
        extra = getattr(function, "__click_params__", [])
        trains = [_training_option()] if study.trains else []
        trains += [_compare_option()] if study.compares else []
        parameters = [*_options(), *trains, *study.parameters, *extra]
        return click.Command(
            cmd_name, callback=callback, params=parameters, help=study.summary(),
            epilog=_example(cmd_name),
            context_settings={"show_default": True},
        )  # fmt: skip


def study_group(decorate: Decorator | None = None) -> click.Group:
    """The group ``study``, to be added to a command line."""
    return StudyGroup(
        "study",
        decorate=decorate,
        help="Measure a model over a dataset, as the paper does.",
        epilog=_example("identifiability"),
    )


def _example(name: str) -> str:
    options = "--model vit_base_patch16_224 --data FOLDER --output results"
    return f"Example: captum-classemb study {name} {options}"


def run_command(study: type[Study], given: dict[str, Any]) -> None:
    """Build dataset, model and study from the options, run, and print a short table."""
    from captum_classemb.models.load import resolve_device
    from captum_classemb.runs.processes import init_process_group, is_main_process, local_device
    from captum_classemb.runs.runner import RunOptions, run_study

    init_process_group()
    device = local_device(resolve_device(given["device"]))
    loud = is_main_process() and not given["quiet"]
    data = study_dataset(given, study.labelled, say=loud)
    config = _config(given)
    config.model.to(device)
    names = [str(parameter.name) for parameter in study.parameters]
    make: Any = study
    experiment: Study = make(config, **{name: given[name] for name in names})
    options = RunOptions(
        batch_size=given["batch_size"],
        limit=given["limit"],
        workers=given["workers"],
        checkpoint_every=given["checkpoint_every"],
        resume=given["resume"],
        verify=given["verify"],
        progress=not given["quiet"],
        compare=given.get("compare", ()),
        called=_called(),
        command={name: given[name] for name in names} | {"random_init": given["random_init"]},
    )
    result = run_study(experiment, data, given["output"], options, device)
    if loud:
        _print_rows(experiment.headline(result.tables))
        click.echo(f"{result.images} images; all results are in {result.output}")
    if result.refused:
        count = len(result.refused)
        raise ImagesRefused(f"{count} of the images could not be read: run.json names them.")


def _called() -> str:
    """This command, without the folders of this machine."""
    program, *arguments = sys.argv
    names = [Path(each).name if Path(each).is_absolute() else each for each in arguments]
    own = Path(program).name in ("captum-classemb", "__main__.py")
    return shlex.join(["captum-classemb"] if own else ["python", program]) + " " + shlex.join(names)


class ImagesRefused(click.ClickException):
    """A study that ended, but without some of its images."""

    exit_code = 2


def _config(given: dict[str, Any]) -> StudyConfig:
    from torch import nn

    from captum_classemb.models.load import load_model
    from captum_classemb.runs.config import StudyConfig

    def random_model() -> nn.Module:
        return load_model(given["model"], random_init=True, seed=given["seed"] + 1)

    model = load_model(
        given["model"], given["checkpoint"], random_init=given["random_init"], seed=given["seed"]
    )
    name = f"{given['model']} (random)" if given["random_init"] else given["model"]
    return StudyConfig(
        model,
        name,
        variant=given["variant"],
        seed=given["seed"],
        random_model=random_model,
        output=given["output"],
    )


def study_dataset(given: dict[str, Any], labelled: bool, *, say: bool) -> StudyDataset:
    """The data, before the weights are loaded: what a model reads is known without them."""
    from captum_classemb.data import Preprocess, data_config, open_dataset, recognise_layout
    from captum_classemb.data.labels import read_labels
    from captum_classemb.data.splits import TrainAndTest
    from captum_classemb.models import class_names, load_model
    from captum_classemb.models.names import published_transform

    layout = given["layout"] or recognise_layout(given["data_path"])
    labels: Any = given["labels"]
    if labels not in (None, "sorted"):
        labels = read_labels(Path(labels))
    model = load_model(given["model"], random_init=True, device="meta")
    names = class_names(model)
    if given["resize"] == "paper":
        published = published_transform(given["model"])
        transform = Preprocess.from_config({**data_config(model), **published})
    else:
        transform = Preprocess.of_model(model, given["resize"])
    data = open_dataset(given["data_path"], transform, layout, names, labels, labelled=labelled)
    folders = getattr(data, "folders", None)
    if say and folders is not None:
        click.echo(folders.summary(names), err=True)
    if "train_data" not in given:
        return data
    if given["train_data"] is not None:
        train = open_dataset(given["train_data"], transform, None, names, labels)
        return TrainAndTest(data, train)
    own = getattr(data, "training", None)
    return data if own is None else TrainAndTest(data, own())


def _print_rows(rows: Sequence[Row]) -> None:
    """A line for each number."""
    lines = [("metric", "block", "site", "tokens", "value", "n")]
    for row in rows:
        block = "" if row.block < 0 else str(row.block)
        tokens = row.tokens if row.group == "all" else row.group
        lines.append((row.metric, block, row.site, tokens, f"{row.value:.4f}", str(row.n)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
