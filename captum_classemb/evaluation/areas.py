"""Areas under removal curves, in two conventions that must not be compared with each other.

``"paper"`` is what the code of Vilas et al. (2023) computes; ``"trapezoid"`` is the ordinary area.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from captum_classemb.errors import InputError, NonFiniteError

Convention = Literal["paper", "trapezoid"]


def removal_counts(removable: int, points: int) -> Tensor:
    """How many tokens are gone at each of ``points`` evenly spaced points from none to all.

    Args:
        removable: largest number of tokens that may go.
        points: number of points, the unperturbed one included; at most ``removable + 1``.

    Returns:
        int64, ascending, from 0 to ``removable``.

    Raises:
        InputError: if the points are fewer than two or more than there are counts.

    Examples:
        >>> removal_counts(10, 5)
        tensor([ 0,  2,  5,  8, 10])
    """
    if not 2 <= points <= removable + 1:
        raise InputError(
            f"{points} points were asked for; a curve over {removable} tokens has between 2 and "
            f"{removable + 1}."
        )
    return torch.linspace(0, removable, points, dtype=torch.float64).round().long()


def _checked(removed: Tensor, curve: Tensor) -> tuple[Tensor, Tensor]:
    if removed.dim() != 1 or curve.shape[-1:] != removed.shape or len(removed) < 2:
        raise InputError(
            f"a curve of shape {tuple(curve.shape)} does not fit removal counts of shape "
            f"{tuple(removed.shape)}: the last dimension needs one value a count, two at least."
        )
    if removed[0] != 0 or (removed.diff() <= 0).any():
        raise InputError("removal counts must start at 0, the unperturbed point, and ascend.")
    if not torch.isfinite(curve).all():
        raise NonFiniteError("the curve holds NaN or infinity: an area needs finite numbers.")
    return removed.to(curve.device, torch.float64), curve.double()


def trapezoid_area(removed: Tensor, curve: Tensor) -> Tensor:
    """Area from nothing removed to everything removed, the unperturbed point included.

    The share removed runs from 0 to 1 and the area is not divided by anything, so a curve that
    stays at 1 scores 1.

    Args:
        removed: tokens gone at each point, S, from 0 to the largest count.
        curve: values at these points, …×S.

    Returns:
        float64, of the leading shape of ``curve``.

    Raises:
        InputError: if the shapes do not fit, or the counts do not ascend from 0.
        NonFiniteError: if a value is NaN or infinite.

    Examples:
        >>> trapezoid_area(torch.tensor([0, 5, 10]), torch.tensor([1.0, 0.5, 0.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    removed, curve = _checked(removed, curve)
    return torch.trapezoid(curve, removed / removed[-1])


def paper_area(removed: Tensor, curve: Tensor, tokens: int) -> Tensor:
    """Σ_{n=1}^{T−1} curve(n) / (T · max_n curve(n)), as Vilas et al. (2023) publish it.

    The unperturbed point is left out, each curve is divided by its own maximum, and a flat curve
    scores (T − 1)/T. Counts between two points are filled in linearly.

    Args:
        removed: tokens gone at each point, S, from 0 to at least T − 1.
        curve: values at these points, …×S, none below 0.
        tokens: T, the number of patch tokens.

    Returns:
        float64, of the leading shape of ``curve``; 0 where the curve is 0 throughout.

    Raises:
        InputError: if the shapes do not fit, the counts do not ascend from 0 to T − 1 at least,
            or a value is below 0.
        NonFiniteError: if a value is NaN or infinite.

    Examples:
        >>> paper_area(torch.arange(4), torch.tensor([0.9, 0.6, 0.3, 0.0]), tokens=4)
        tensor(0.3750, dtype=torch.float64)
    """
    removed, curve = _checked(removed, curve)
    if removed[-1] < tokens - 1 or tokens < 2:
        raise InputError(
            f"the curve ends at {int(removed[-1])} removed tokens: the published area needs a "
            f"curve up to {tokens - 1} of {tokens} tokens, and two tokens at least."
        )
    if (curve < 0).any():
        raise InputError("the published area divides by the curve's maximum: no value below 0.")
    counts = torch.arange(1, tokens, dtype=torch.float64, device=curve.device)
    right = torch.searchsorted(removed, counts).clamp(min=1)
    left = right - 1
    weight = (counts - removed[left]) / (removed[right] - removed[left])
    filled = curve[..., left] * (1 - weight) + curve[..., right] * weight
    largest = filled.amax(-1)
    # A curve of zeros has no maximum to divide by, and nothing under it either.
    return filled.sum(-1) / (tokens * torch.where(largest > 0, largest, 1.0))


def area(removed: Tensor, curve: Tensor, tokens: int, convention: Convention) -> Tensor:
    """The area in the named convention: :func:`trapezoid_area` or :func:`paper_area`.

    Raises:
        InputError: for an unknown convention, and as the two functions say.
    """
    if convention not in get_args(Convention):
        names = " or ".join(map(repr, get_args(Convention)))
        raise InputError(f"convention {convention!r} is unknown: it is {names}.")
    if convention == "paper":
        return paper_area(removed, curve, tokens)
    return trapezoid_area(removed, curve)
