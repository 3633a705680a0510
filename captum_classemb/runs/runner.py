"""Run a study over a dataset: streaming, resumable, on one process or many.

The dataset is cut into batches whose content and order depend on the dataset and the batch size
alone. Process r of R takes batches r, r + R, …; so every batch is computed as one process would
compute it, and counts are the same whatever R is. A checkpoint holds the sums and the number of
batches in them: a run that is killed and resumed repeats at most the batches since the last one.
A study may ask for several passes, between which the processes add up what they have.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ReduceOp
from torchmetrics import Metric
from tqdm import tqdm

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data import StudyDataset
from captum_classemb.data.marks import PNG_MARK
from captum_classemb.errors import DataError, OutputError
from captum_classemb.runs.batches import batch_plan, chosen_images, load_batches
from captum_classemb.runs.merge import add_up
from captum_classemb.runs.processes import (
    all_gather,
    all_reduce,
    barrier,
    get_rank,
    get_world_size,
    init_process_group,
    is_main_process,
    on_main_process,
)
from captum_classemb.runs.settings import (
    RUN,
    describe_data,
    environment,
    open_folder,
    plain,
    read_run,
    write_json,
)
from captum_classemb.runs.sources import ReadFiles, write_files
from captum_classemb.runs.storage import Checkpoint, Checkpoints, exclusive
from captum_classemb.runs.study import Study
from captum_classemb.runs.tables import Row, read_rows, write_rows

_CHECKPOINTS = "checkpoints"
_DPI = 200


@dataclass(frozen=True)
class RunOptions:
    """How a study runs; nothing here changes what it measures.

    Attributes:
        batch_size: images a batch. Another batch size rounds otherwise in the last digits.
        limit: take this many images, evenly spaced over the dataset; all if None.
        workers: processes that read images.
        checkpoint_every: images between two checkpoints, of each process.
        resume: go on with an interrupted run in the same folder.
        verify: when a run goes on, read all files again that it has read, not only those whose
            size or time of change differs.
        progress: show a progress bar.
        compare: folders of complete runs of the same study on other models, which the figures show
            beside this one.
        called: the command that makes the run, kept in ``run.json``.
        command: further settings that have to be the same when a run goes on.
    """

    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    checkpoint_every: int = 1024
    resume: bool = False
    verify: bool = False
    progress: bool = True
    compare: Sequence[Path] = ()
    called: str = ""
    command: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class StudyResult:
    """The result of a study.

    Attributes:
        tables: rows by table name.
        output: the folder with the files.
        images: number of images measured.
        refused: why images were left out that could not be read.
        seconds: of this process, without what was done before a resume.
    """

    tables: dict[str, list[Row]]
    output: Path
    images: int
    seconds: float = 0.0
    refused: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


def _settings(study: Study, data: StudyDataset, options: RunOptions) -> dict[str, Any]:
    return plain(
        {
            "study": study.name,
            **study.settings(),
            "command": dict(options.command),
            **describe_data(data),
            "limit": options.limit,
            "batch_size": options.batch_size,
            "processes": get_world_size(),
        }
    )


def run_study(
    study: Study,
    data: StudyDataset,
    output: str | Path,
    options: RunOptions | None = None,
    device: torch.device | str = "cpu",
) -> StudyResult:
    """Run a study and write its result folder.

    The folder gets one CSV file a table, one PNG file a figure and ``run.json`` with settings,
    versions, the data's fingerprint and counts. Until the run is complete there are checkpoints
    beside them.

    Args:
        study: with empty sums.
        data: the dataset.
        output: a new or empty folder, or that of an interrupted run with ``options.resume``.
        options: how to run.
        device: where the batches go.

    Returns:
        the result; tables are the same on every process.

    Raises:
        OutputError: when the folder is in use, holds something else, or cannot be written; when a
            run to compare with is not complete, or of another study.
        DataError: when no image can be read.
    """
    options = options or RunOptions()
    output = Path(output)
    init_process_group()
    plan = _plan(study, data, options)
    notices = study.notices()
    others = [_complete_run(study, folder) for folder in options.compare]
    with exclusive(output / f".lock-{get_rank()}"):
        settings = _settings(study, data, options)
        here = environment(torch.device(device))
        run = on_main_process(lambda: open_folder(output, settings, here, options.resume))
        if run["complete"]:
            tables = _read_tables(output, run)
            if others and is_main_process():
                _draw(study, tables, others, output)
            refused = run.get("refused", [])
            return StudyResult(tables, output, run["images"], refused=refused, info=run)
        started = time.monotonic()
        if options.progress and is_main_process():
            for notice in notices:
                tqdm.write(notice, file=sys.stderr)
        checkpoints = Checkpoints(output / _CHECKPOINTS, get_rank())
        files = ReadFiles(output / _CHECKPOINTS, get_rank())
        _run_passes(study, data, plan, (checkpoints, files), options, torch.device(device))
        study.metrics.cpu()
        reads = all_gather(list(files.known.values()))
        why = {read.image: read.refused for read in reads if read.refused}
        images = len({index for batches in plan for batch in batches for index in batch} - {*why})
        if images == 0:
            raise DataError(f"no image could be read: {next(iter(why.values()), 'there is none')}")
        add_up(study.metrics)
        tables = study.tables()
        seconds = time.monotonic() - started
        run |= {"complete": True, "tables": list(tables), "images": images}
        run |= {"notices": notices, **study.notes()}
        run |= {"seconds": round(seconds, 3), "device": str(device), "called": options.called}
        if is_main_process():
            run |= write_files(output, reads)
            for name, rows in tables.items():
                write_rows(output / f"{name}.csv", rows)
            # Last, so that a run that is called complete has all its files.
            write_json(output / RUN, {**run, "figures": _draw(study, tables, others, output)})
        barrier()
        files.remove()
        checkpoints.remove()
        return StudyResult(tables, output, images, seconds, list(why.values()), run)


def _read_tables(output: Path, run: Mapping[str, Any]) -> dict[str, list[Row]]:
    try:
        return {name: read_rows(output / f"{name}.csv") for name in run["tables"]}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise OutputError(
            f"{output} says that it is complete, but a table is missing or damaged: choose another "
            "folder."
        ) from error


def _plan(study: Study, data: StudyDataset, options: RunOptions) -> list[list[list[int]]]:
    """The batches of each pass."""
    images = chosen_images(len(data), options.limit)
    return [batch_plan(part, options.batch_size) for part in study.passes(data, images)]


def _run_passes(
    study: Study,
    data: StudyDataset,
    plan: Sequence[Sequence[list[int]]],
    stored: tuple[Checkpoints, ReadFiles],
    options: RunOptions,
    device: torch.device,
) -> None:
    """Take this process's batches into the study's sums, pass after pass."""
    checkpoints, files = stored
    numbers = count()
    mine = [
        [(next(numbers), indices) for indices in batches][get_rank() :: get_world_size()]
        for batches in plan
    ]
    study.metrics.to(device)
    for metric in study.metrics.modules():
        if isinstance(metric, Metric):
            metric.persistent(True)
    first, done = _restore(study, checkpoints, options.resume, device)

    consumed = [*(batch for batches in mine[:first] for batch in batches), *mine[first][:done]]
    files.restore((index for _, indices in consumed for index in indices), options.verify)

    def save(number: int, done: int) -> None:
        # First what was read, so that no sum is of files that nobody knows of.
        files.save()
        checkpoints.save(Checkpoint(number, done, study.metrics.state_dict()))

    every = max(1, options.checkpoint_every // options.batch_size)
    bar = tqdm(
        total=sum(len(indices) for batches in mine for _, indices in batches),
        initial=sum(len(indices) for batches in mine[:first] for _, indices in batches)
        + sum(len(indices) for _, indices in mine[first][:done]),
        unit="image",
        desc=study.name,
        # None: shown on terminals alone.
        disable=None if options.progress and is_main_process() else True,
    )
    with bar, torch.no_grad():
        for number in range(first, len(mine)):
            saved = done
            for batch in load_batches(data, mine[number][done:], device, options.workers):
                files.add(batch.files)
                for read in batch.files:
                    if read.refused and options.progress:
                        tqdm.write(f"Error: {read.refused}", file=sys.stderr)
                if batch.indices:
                    study.update(batch)
                done += 1
                bar.update(len(batch.indices))
                if done - saved >= every:
                    save(number, done)
                    saved = done
            if done > saved:
                save(number, done)
            if number + 1 < len(mine):
                # All have saved the pass before any goes on, and none goes far ahead: whenever
                # they are killed, there is a pass of which everyone has a checkpoint.
                barrier()
                study.end_pass(number)
                study.begin_pass(number + 1)
                done = 0
                save(number + 1, done)
                barrier()


def _restore(
    study: Study, checkpoints: Checkpoints, resume: bool, device: torch.device
) -> tuple[int, int]:
    """Restore the last pass that all processes reached: its number, and the batches done in it."""
    stored = checkpoints.load() if resume else iter(())
    newest = next(stored, Checkpoint(0, 0, {}))
    number = _least(newest.number)
    # A process may be a pass ahead of the slowest one, by no more.
    found = newest if newest.number == number else next(stored, Checkpoint(0, 0, {}))
    # A pass after the first one starts with what the one before it found.
    if not _least(int(found.number == number)):
        number, found = 0, Checkpoint(0, 0, {})
    study.begin_pass(number)
    if found.state:
        _load(study, found.state, checkpoints.folder)
        study.metrics.to(device)
    return number, found.done


def _load(study: Study, state: dict[str, Any], folder: Path) -> None:
    """Take sums from a checkpoint: all of them, for a metric takes a missing one for nothing."""
    missing = study.metrics.state_dict().keys() - state.keys()
    try:
        if missing:
            raise KeyError(min(missing))
        study.metrics.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"a checkpoint in {folder} is not of this study ({error}): start the run anew in "
            "another folder."
        ) from error


def _least(value: int) -> int:
    """The smallest of all processes' values."""
    return int(all_reduce(torch.tensor(value), ReduceOp.MIN))


def _complete_run(study: Study, folder: Path) -> dict[str, list[Row]]:
    """The tables of a run to compare with."""
    if not study.compares:
        raise OutputError(f"figures of the study {study.name} show one run: leave compare out.")
    run = read_run(folder)
    if not run["complete"] or run["settings"].get("study") != study.name:
        raise OutputError(f"{folder} is no complete run of the study {study.name}.")
    return _read_tables(folder, run)


def _draw(
    study: Study,
    tables: dict[str, list[Row]],
    others: Sequence[dict[str, list[Row]]],
    output: Path,
) -> list[str]:
    """Write the figures, and return their names."""
    together = {
        name: [*rows, *(row for other in others for row in other.get(name, ()))]
        for name, rows in tables.items()
    }
    figures = study.figures(together)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata=PNG_MARK)
        write_atomically(output / f"{name}.png", buffer.getvalue())
    return list(figures)
