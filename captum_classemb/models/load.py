"""Models by name, with published weights or with those of a local file."""

from __future__ import annotations

import argparse
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import CheckpointError, InputError
from captum_classemb.models.demo import build_demo_vit, demo_vit
from captum_classemb.models.elsewhere import elsewhere, load_elsewhere
from captum_classemb.models.file_shapes import below_prefix, shapes
from captum_classemb.models.names import DEMO_MODEL, ModelSource, find_model

# What training scripts wrap a state dict in, and what their wrappers put before its names.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "ema", "net",
)  # fmt: skip
_PREFIXES = ("_orig_mod.", "module.", "model.", "net.", "backbone.")


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    random_init: bool = False,
    seed: int = 0,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
) -> nn.Module:
    """A model in evaluation mode.

    Args:
        name: a timm name, one of the papers' short names, or "demo_vit", the packaged model
            (`captum_classemb.models.names`); ``open_clip:NAME``; or a folder of Hugging Face.
        checkpoint: a local file of weights for it, safetensors or a PyTorch file of plain
            tensors, of open_clip also the tag of published ones; without it, published weights
            are fetched. Classes, channels and image size are those of the file.
        device: where the model goes.
        dtype: what its floating-point weights are converted to.
        random_init: leave the weights as initialised, for controls.
        seed: of that initialisation.
        num_classes: C, where it is not that of the file; 0 for a model without a classifier.
        img_size: height and width of its images, likewise.
        in_chans: channels of its images, likewise.

    Returns:
        The model.

    Raises:
        ModelNameError: if nobody knows the name.
        CheckpointError: if weights are missing, cannot be fetched or read, or do not fit.
        InputError: if the device is not there, or `random_init` and `checkpoint` are both given.
    """
    if random_init and checkpoint is not None:
        raise InputError("random_init and a checkpoint exclude each other: give one of them.")
    sizes = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    given = {key: value for key, value in sizes.items() if value is not None}
    for key, value in given.items():
        if value < (key != "num_classes"):
            raise InputError(f"{key} is {value}: give 1 or more.")
    if elsewhere(name):
        if given:
            raise InputError(f"{next(iter(given))} belongs to models of timm: leave it out.")
        other = load_elsewhere(name, checkpoint, random_init=random_init, seed=seed)
        return other.to(device=resolve_device(device), dtype=dtype).eval()
    source = find_model(name)
    device = resolve_device(device)
    if random_init:
        model = _build(source, device, seed, given)
    elif checkpoint is not None:
        state = read_checkpoint(checkpoint)
        like = _build(source, torch.device("meta"))
        state = below_prefix(state, like.state_dict())
        model = _build(source, torch.device("cpu"), given={**shapes(like, state), **given})
        _fill(model, state, source, Path(checkpoint))
    elif given.get("num_classes") is not None:
        raise InputError(
            "num_classes says what a checkpoint holds: give --checkpoint (in Python, checkpoint=)."
        )
    elif source.checkpoint is not None:
        raise CheckpointError(
            f"The weights of {name} are not published by timm: give the file with --checkpoint "
            f"(in Python, checkpoint=), {source.checkpoint}."
        )
    else:
        model = _fetch(source, given)
    return model.to(device=device, dtype=dtype).eval()


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a given name; ``"auto"`` is a GPU where there is one, else the CPU.

    Raises:
        InputError: if there is no such device on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    # Which exception says that a backend is absent depends on the backend and the build.
    except Exception as error:
        raise InputError(
            f"The device {str(device)!r} is not available here: give 'cpu'"
            + (", 'cuda' or 'cuda:<number>'." if torch.cuda.is_available() else ".")
        ) from error
    return resolved


def _arguments(source: ModelSource) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if source.num_classes is not None:
        arguments["num_classes"] = source.num_classes
    if source.data_config:
        arguments["pretrained_cfg_overlay"] = dict(source.data_config)
    return arguments


def _build(
    source: ModelSource,
    device: torch.device,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
) -> nn.Module:
    """An untrained model, on the CPU; or on "meta", which takes neither time nor memory."""
    import timm

    def build() -> nn.Module:
        torch.manual_seed(seed)
        if source.timm_name == DEMO_MODEL:
            return build_demo_vit()
        model: nn.Module = timm.create_model(
            source.timm_name, pretrained=False, **{**_arguments(source), **(given or {})}
        )
        return model

    with torch.random.fork_rng(devices=[]):
        if device.type == "meta":
            try:
                with device:
                    return build()
            except (NotImplementedError, RuntimeError):
                # Older versions of timm read numbers from tensors while they build.
                pass
        return build()


def _fetch(source: ModelSource, given: Mapping[str, Any]) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    if source.timm_name == DEMO_MODEL:
        return demo_vit()
    published = get_pretrained_cfg(source.timm_name)
    if published is None or not published.has_weights:
        raise CheckpointError(
            f"timm publishes no weights for {source.timm_name}: give a local file with "
            "--checkpoint (in Python, checkpoint=)."
        )
    try:
        with _quiet_hub():
            model: nn.Module = timm.create_model(
                source.timm_name, pretrained=True, **{**_arguments(source), **given}
            )
    # A failed download surfaces as whatever the hub's client, urllib or the disk raises.
    except Exception as error:
        raise CheckpointError(
            f"The weights of {source.timm_name} could not be downloaded "
            f"({type(error).__name__}): go online, or give a local file with --checkpoint "
            "(in Python, checkpoint=)."
        ) from error
    return model


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's client from printing a line for every retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without executing anything that the file holds.

    Args:
        path: a safetensors file, or a PyTorch file of plain tensors. A state dict wrapped in
            {"state_dict": ...} or {"model": ...} is unwrapped, and a prefix that a wrapper put
            before every name ("module.", "model.", "_orig_mod.") taken off.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: if the file is missing, empty, truncated, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} does not exist: give a file of weights.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes).")
    # A safetensors file opens with the length of its header, 8 bytes, and the header, JSON.
    is_safetensors = path.suffix == ".safetensors" or head[8:9] == b"{"
    content = _read_safetensors(path) if is_safetensors else _read_torch(path, head)
    return _state_dict(content, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is no complete safetensors file: it is truncated or damaged."
        ) from error


def _read_torch(path: Path, head: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            # A foreign file makes the unpickler warn of protocols; the error below says enough.
            warnings.simplefilter("ignore")
            # Training scripts lay their arguments beside the weights, in this plain class.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK", b"\x80")) or "truncated" in str(error).lower():
            raise _damaged(path) from error
        raise CheckpointError(
            f"The checkpoint {path} is a pickle that holds more than plain tensors, and is not "
            "executed: save the state dict alone, as safetensors or with "
            "torch.save(model.state_dict(), ...)."
        ) from error
    # Truncated and foreign files surface as RuntimeError, EOFError, KeyError, ... from the depths.
    except Exception as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} is truncated or damaged, or neither a safetensors nor a "
        "PyTorch file."
    )


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        held = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
        if not held:
            break
        content = content[held[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"The checkpoint {path} holds no state dict: save model.state_dict() into it."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"The checkpoint {path} is no state dict, its entry {name!r} being no tensor: "
                "save model.state_dict() into it."
            )
    state = dict(content)
    while True:
        shared = [p for p in _PREFIXES if all(name.startswith(p) for name in state)]
        if not shared:
            return state
        state = {name[len(shared[0]) :]: value for name, value in state.items()}


def _fill(model: nn.Module, state: dict[str, Tensor], source: ModelSource, path: Path) -> None:
    """Put a state dict into a model that it fits exactly."""
    state = {name: value for name, value in state.items() if not name.startswith(source.unused)}
    wanted = model.state_dict()
    problems = [
        f"{name} is {_shape(state[name])} in the file and {_shape(wanted[name])} in the model"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems += [f"{name} is missing from the file" for name in wanted if name not in state]
    problems += [f"{name} is unknown to the model" for name in state if name not in wanted]
    if problems:
        more = f", and {len(problems) - 1} more such entries" if len(problems) > 1 else ""
        raise CheckpointError(
            f"The checkpoint {path} does not fit {source.timm_name}: {problems[0]}{more}; "
            "give the name of the model that the weights were saved from."
        )
    non_finite = [name for name, value in state.items() if not _finite(value)]
    if non_finite:
        raise CheckpointError(
            f"The checkpoint {path} holds NaN or infinity in {non_finite[0]}: give sound weights."
        )
    model.load_state_dict(state)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
