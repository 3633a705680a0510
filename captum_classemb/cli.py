"""The command line: arguments in, the rooms below called, files and a short table out.

The libraries below are imported where a command runs, so that help and mistyped arguments are
answered at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from captum_classemb import __version__
from captum_classemb.command_options import option
from captum_classemb.errors import ClassEmbError, ClassEmbWarning
from captum_classemb.maps_command import maps_command
from captum_classemb.study_commands import study_group

if TYPE_CHECKING:
    from captum_classemb.data.preprocess import ResizeMode
    from captum_classemb.explain.run import Outcome

__all__ = ["cli", "debug_option", "main"]

_BAD_INPUT = 2
_BUG = 1
_INTERRUPTED = 130
_DEBUG = "captum_classemb.debug"


class Commands(click.Group):
    """Commands that answer a mistake with one line, which says what to do, and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is written.")
            ctx.exit(_INTERRUPTED)
        except click.ClickException as error:
            if ctx.meta.get(_DEBUG):
                raise
            _fail(error.format_message())
            ctx.exit(_BAD_INPUT)
        except ClassEmbError as error:
            if ctx.meta.get(_DEBUG):
                raise
            _fail(str(error))
            ctx.exit(_BAD_INPUT)
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            _fail(f"{type(error).__name__}: {error} (this is a bug: --debug shows where).")
            ctx.exit(_BUG)


def _fail(message: str) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option --debug: show tracebacks."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )(command)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: captum-classemb explain --output out",
)
@click.version_option(__version__, prog_name="captum-classemb")
def cli() -> None:
    """Explain Vision Transformers in class embedding space."""


@cli.command(
    epilog="Example: captum-classemb explain photo.jpg --model vit_base_patch16_224 --target tabby",
    params=[
        click.Argument(
            ["images"], nargs=-1, type=click.Path(path_type=Path), metavar="[IMAGE]..."
        ),
        option("model", help="A name of timm's or the papers'; open_clip:NAME; a folder of Hugging "
               "Face. Default: the packaged model of digits."),
        option("checkpoint", help="Its weights, tensors alone; or open_clip's tag."),
        click.Option(["--num-classes"], type=int, metavar="N",
                     help="Its classes. Default: as the file says."),
        click.Option(["--img-size"], type=int, metavar="N",
                     help="Side of its images. Default: as the file says."),
        click.Option(["--in-chans"], type=int, metavar="N",
                     help="Their channels. Default: as the file says."),
        click.Option(["--class-names"], metavar="FILE", type=click.Path(path_type=Path),
                     help="Names of the classes, one a line."),
        click.Option(["--class", "classes"], multiple=True, metavar="TEXT",
                     help="A class of a zero-shot model; give several."),
        click.Option(["--classes", "classes_file"], metavar="FILE",
                     type=click.Path(path_type=Path), help="The same, one a line."),
        click.Option(["--template", "templates"], multiple=True, metavar="TEXT",
                     help="Prompt; several allowed. Default: a photo of a {}."),
        click.Option(["--text-features"], metavar="FILE", type=click.Path(path_type=Path),
                     help="npz with text (C×F), for a bare image tower."),
        click.Option(
            ["--target", "targets"], multiple=True, metavar="CLASS",
            help="Index or name. Default: the first choice.",
        ),
        option("method", "methods", multiple=True,
               help="Several allowed. Default: no baselines."),
        click.Option(
            ["--readout"], metavar="FILE", type=click.Path(path_type=Path),
            help="Probe or lens. Default: the own classifier.",
        ),
        option("resize", help="squash: all of the image."),
        option("device", help="cpu, cuda, ..."),
        option("dtype", metavar="TYPE", help="Or float64, bfloat16, float16."),
        option("batch-size", default=8, help="Images at once."),
        option("output", default=Path("explanations"), help="Folder of results."),
        click.Option(
            ["--html"], metavar="FILE", type=click.Path(path_type=Path),
            help="Write a page to explore one image instead.",
        ),
        click.Option(
            ["--overwrite"], is_flag=True,
            help="Write over files of others, inputs never.",
        ),
        option("quiet"),
    ],
)  # fmt: skip
@debug_option
@click.pass_context
def explain(
    ctx: click.Context,
    images: tuple[Path, ...],
    model: str | None,
    checkpoint: Path | None,
    num_classes: int | None,
    img_size: int | None,
    in_chans: int | None,
    class_names: Path | None,
    classes: tuple[str, ...],
    classes_file: Path | None,
    templates: tuple[str, ...],
    text_features: Path | None,
    targets: tuple[str, ...],
    methods: tuple[str, ...],
    readout: Path | None,
    resize: ResizeMode,
    device: str,
    dtype: str,
    batch_size: int,
    output: Path,
    html: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Show which patches of an image speak for a class.

    IMAGE is a file or a folder; without any, a packaged image is explained. DIR gets a figure, the
    maps (.npz) and a record (.json) of each. The exit code is 2 if an image cannot be explained.
    """
    import torch
    from tqdm import tqdm

    from captum_classemb.explain import Options, Run, write_page
    from captum_classemb.explain.subject import Texts, lines_of

    if html is not None and readout is not None:
        raise click.UsageError("the page of --html has no place for a --readout: leave one out.")
    on_terminal = not quiet and sys.stderr.isatty()

    def say(sentence: str) -> None:
        if on_terminal:
            click.echo(sentence, err=True)

    if classes_file is not None:
        classes += tuple(lines_of(classes_file))
    shape = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    given: dict[str, Any] = {
        "model": model,
        "methods": methods,
        "shape": {key: value for key, value in shape.items() if value is not None},
        "class_names": class_names,
        "texts": Texts(classes, templates, text_features),
    }
    run = Run(
        Options(
            images=images,
            checkpoint=checkpoint,
            targets=targets,
            readout=readout,
            device=device,
            dtype=getattr(torch, dtype),
            batch_size=batch_size,
            resize=resize,
            output=output,
            page=html,
            overwrite=overwrite,
            **{key: value for key, value in given.items() if value},
        ),
        say,
    )
    if images and not model and not quiet:
        click.echo(
            "Note: the packaged model knows handwritten digits only: name another with --model.",
            err=True,
        )
    if html is not None:
        outcome = write_page(run, progress=not quiet)
        if not quiet:
            _say_frames(outcome)
            _print_table([outcome], "page")
        return
    outcomes: list[Outcome] = []
    bar = tqdm(
        run,
        total=len(run),
        unit="image",
        file=sys.stderr,
        disable=not on_terminal,
        leave=False,
    )
    for outcome in bar:
        outcomes.append(outcome)
        if outcome.error is not None:
            bar.clear()
            _fail(str(outcome.error))
        elif not quiet:
            bar.clear()
            _say_frames(outcome)
    if not quiet:
        _print_table([outcome for outcome in outcomes if outcome.error is None])
    if any(outcome.error is not None for outcome in outcomes):
        ctx.exit(_BAD_INPUT)


def _say_frames(outcome: Outcome) -> None:
    if outcome.frames > 1:
        count = f"{outcome.path} holds {outcome.frames} images"
        click.echo(f"Note: {count}: the first is explained.", err=True)


def _print_table(outcomes: Sequence[Outcome], written: str = "picture") -> None:
    """A line for each image: its class, what was explained, where the picture is."""
    if not outcomes:
        return
    from captum_classemb.data.images import printable

    rows = [("image", "top class", "", "explained", written)]
    for outcome in outcomes:
        best = outcome.top[0]
        explained = ", ".join(target.name for target in outcome.targets)
        rows.append(
            (
                printable(outcome.path.name),
                best.name,
                f"{100 * best.probability:.1f} %",
                explained,
                printable(str(outcome.picture)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[2] = row[2].rjust(widths[2])
        click.echo("  ".join(cells).rstrip())


@cli.command(epilog="Example: captum-classemb doctor")
@debug_option
def doctor() -> None:
    """Say what this installation can do: versions, devices, extras, weights."""
    from captum_classemb.doctor import check_up

    for what, state in check_up():
        click.echo(f"{what:<36}{state}")


cli.add_command(study_group(debug_option))
cli.add_command(maps_command(debug_option))


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Note: {message}", err=True)


def main() -> None:
    """Run the command line."""
    if not sys.warnoptions:
        # What libraries say to programmers is no news to who only runs a command.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ClassEmbWarning)
        warnings.showwarning = _note
    cli(prog_name="captum-classemb")
