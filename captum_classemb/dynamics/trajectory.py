"""Optimisation trajectory in polar coordinates about the final weights (Park & Kim, Figure 1b).

r_t = ‖w_t − w_T‖/‖w_0 − w_T‖ against the angle between w_t − w_T and w_0 − w_T.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import CheckpointError, InputError, NonFiniteError

_SUFFIXES = {".safetensors", ".pt", ".pth"}
# Statistics of the data that batch norm keeps beside the weights.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Trajectory(NamedTuple):
    """Radius and angle (radians) of each checkpoint; the last one lies at radius 0, angle 0."""

    radius: Tensor
    angle: Tensor


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, in the order of the numbers in their names.

    Raises:
        CheckpointError: the folder holds fewer than two checkpoints.
    """
    path = Path(folder)
    files = [f for f in path.iterdir() if f.suffix in _SUFFIXES] if path.is_dir() else []
    if len(files) < 2:
        raise CheckpointError(
            f"A trajectory needs at least two checkpoints ({', '.join(sorted(_SUFFIXES))}), but "
            f"{path} holds {len(files)}."
        )

    def numbers(file: Path) -> list[tuple[int, int | str]]:
        parts = re.split(r"(\d+)", file.stem)
        return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]

    return sorted(files, key=numbers)


def _flat(weights: Mapping[str, Tensor], like: Mapping[str, torch.Size]) -> Tensor:
    """The weights as one vector, or an error where they are not those of the last checkpoint."""
    for name, shape in like.items():
        if name not in weights or weights[name].shape != shape:
            raise CheckpointError(
                f"A checkpoint has no {name} of shape {tuple(shape)}, as the last one has."
            )
    return torch.cat([weights[name].detach().double().cpu().flatten() for name in like])


def polar_trajectory(
    checkpoints: Iterable[Callable[[], Mapping[str, Tensor]]],
) -> Trajectory:
    """Radius and angle of each checkpoint.

    Args:
        checkpoints: from the first to the last; each is called when its weights are needed, so
            that no more than three are held at a time.

    Returns:
        One radius and one angle per checkpoint.

    Raises:
        InputError: there are fewer than two checkpoints, or the first equals the last.
        CheckpointError: a checkpoint holds other weights than the last one.
        NonFiniteError: a weight is NaN or infinite.
    """
    loads = list(checkpoints)
    if len(loads) < 2:
        raise InputError(f"A trajectory needs at least two checkpoints, not {len(loads)}.")
    last = loads[-1]()
    like = {
        name: w.shape
        for name, w in last.items()
        if w.is_floating_point() and not name.endswith(_STATISTICS)
    }
    end = _flat(last, like)
    start = _flat(loads[0](), like) - end
    length = start.norm()
    if not float(length):
        raise InputError("The first checkpoint equals the last one: there is no trajectory.")
    radii, angles = [], []
    for load in loads:
        offset = _flat(load(), like) - end
        if not bool(torch.isfinite(offset).all()):
            raise NonFiniteError("The weights of a checkpoint hold NaN or infinity.")
        radius = offset.norm() / length
        # The half-angle form keeps its digits where the cosine is near one.
        u, v = offset / offset.norm().clamp_min(1e-300), start / length
        angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
        radii.append(radius)
        angles.append(torch.where(radius > 0, angle, 0.0))
    return Trajectory(torch.stack(radii), torch.stack(angles))
