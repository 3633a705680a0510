"""What this installation can do: versions, devices, optional extras, and where weights are."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

_PACKAGE = "captum-classemb"
_VERSIONS = (_PACKAGE, "torch", "torchvision", "timm", "captum", "torchmetrics", "numpy")
_EXTRAS = ("transformers", "open_clip", "studies", "dynamics", "scenes", "docs", "test")
_EXAMPLE = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
_TIMEOUT = 5.0
_REQUIREMENT = re.compile(r"^([\w.-]+).*;.*extra == [\"'](\w+)[\"']")


def check_up() -> Iterator[tuple[str, str]]:
    """What there is to know, as (what, how it is), one after the other.

    Examples:
        >>> next(check_up())[0]
        'python'
    """
    from captum_classemb.attr import METHODS

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _VERSIONS:
        yield package, _version(package) or "not installed"
    yield from _devices()
    for extra, libraries in _extras().items():
        missing = [library for library in libraries if _version(library) is None]
        state = f"missing: {', '.join(missing)}; pip install '{_PACKAGE}[{extra}]'"
        yield f"extra {extra}", state if missing else "complete"
    yield "published weights", _weights()
    for name, method in METHODS.items():
        yield f"method {name}", method.caption + (f"; needs a {method.needs}" * bool(method.needs))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", f"{torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        yield "accelerator", "none: --device cpu is the one that works here"


def _extras() -> dict[str, list[str]]:
    """The libraries of each extra, as the installed package declares them."""
    found: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    try:
        declared = requires(_PACKAGE) or []
    except PackageNotFoundError:
        declared = []
    for line in declared:
        match = _REQUIREMENT.match(line)
        # An extra that is made of others repeats their libraries.
        if match and match[2] in found and match[1] != _PACKAGE:
            found[match[2]].append(match[1])
    return found


def _weights() -> str:
    """Whether timm's published weights can be fetched."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return f"offline (HF_HUB_OFFLINE is set): those in {constants.HF_HUB_CACHE} are used"
    try:
        HfApi().model_info(_EXAMPLE, timeout=_TIMEOUT)
    # The libraries below the client raise whatever their layer calls a failed connection.
    except Exception as error:
        kind = type(error).__name__
        return f"not reached ({kind}): give files with --checkpoint; the packaged model needs none"
    return f"reached at {constants.ENDPOINT}"
