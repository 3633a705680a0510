"""What a run is: what its settings say, kept in ``run.json`` and asked again when it goes on."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data import StudyDataset
from captum_classemb.data.marks import JSON_MARK
from captum_classemb.errors import ClassEmbWarning, OutputError
from captum_classemb.versions import versions

RUN = "run.json"


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run runs: other numbers in the last digits are to be expected elsewhere."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": device.type, "card": card, **threads, "versions": versions()}


def _processor() -> str:
    """The processor by its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_data(data: StudyDataset) -> dict[str, Any]:
    """The data and what is made of it, in terms of JSON."""
    labels = getattr(data, "folders", None)
    transform = getattr(data, "transform", None)
    about = {
        "layout": data.layout,
        "fingerprint": data.fingerprint(),
        "images": len(data),
        "classes": len({label for label in data.labels if label >= 0}),
        "with_masks": data.with_masks,
    }
    if labels is not None:
        about["labels"] = {"by": labels.rule, "index": dict(labels.index)}
    found = {"data": about}
    if transform is not None:
        found["preprocess"] = transform.describe()
    return found


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a marked JSON file.

    Raises:
        OutputError: if it cannot be written.
    """
    text = json.dumps({**JSON_MARK, **content}, indent=2, ensure_ascii=False)
    # Names of files may hold bytes that are no text.
    write_atomically(path, f"{text}\n".encode(errors="backslashreplace"))


def read_run(output: Path) -> dict[str, Any]:
    """What a folder's ``run.json`` says.

    Raises:
        OutputError: if it is damaged.
    """
    path = output / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run["settings"], dict) or not isinstance(run["complete"], bool):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is damaged or of another version: choose another folder."
        ) from error
    found: dict[str, Any] = run
    return found


def check_same(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a run goes on as it began.

    Raises:
        OutputError: that names the first setting that differs.
    """
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if inner:
                key, old, new = f"{key}.{inner[0]}", old.get(inner[0]), new.get(inner[0])
        if old != new:
            raise OutputError(
                f"the run in {output} has {key} = {old!r:.200} and this one {new!r:.200}: "
                "resume it with the same settings, or choose another folder."
            )


def open_folder(
    output: Path, settings: Mapping[str, Any], now: Mapping[str, Any], resume: bool
) -> dict[str, Any]:
    """Make the folder, or see that it is the one to go on with; what ``run.json`` says.

    Args:
        output: the folder.
        settings: what has to be the same for the run to go on.
        now: the environment, of which a difference is warned of and kept.
        resume: whether to go on.

    Raises:
        OutputError: if the folder holds a run that is not to be resumed or has other settings, or
            other files.
    """
    path = output / RUN
    if path.is_file():
        if not resume:
            raise OutputError(
                f"{output} holds a run already: choose another folder, or resume that run."
            )
        run = read_run(output)
        check_same(output, run["settings"], settings)
        earlier = run.setdefault("environments", [now])
        if not run["complete"] and earlier[-1] != now:
            changed = [key for key in now if earlier[-1].get(key) != now[key]]
            warnings.warn(
                f"the run in {output} goes on with other {' and '.join(changed)} than it had: "
                "run.json names both.",
                ClassEmbWarning,
                stacklevel=2,
            )
            earlier.append(dict(now))
            write_json(path, run)
        return run
    if output.is_dir() and any(not p.name.startswith(".") for p in output.iterdir()):
        raise OutputError(f"{output} holds other files: choose an empty or a new folder.")
    run = {"complete": False, "settings": dict(settings), "versions": now["versions"]}
    run["environments"] = [dict(now)]
    write_json(path, run)
    return run
