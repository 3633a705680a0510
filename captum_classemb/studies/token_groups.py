"""Groups of tokens: CLS, image tokens, and those on and off the object."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.data import CONTEXT, OBJECT
from captum_classemb.errors import InputError

#: (tokens, group) in the order in which metrics give their numbers.
GROUPS = (("cls", "all"), ("image", "all"), ("image", "class"), ("image", "context"))


def membership(
    batch: int,
    tokens: int,
    prefix_tokens: int,
    patches: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which tokens belong to each of :data:`GROUPS`.

    CLS is the first token of a model with prefix tokens; other prefix tokens (distillation,
    registers) belong to no group.

    Args:
        batch: B.
        tokens: N, prefix tokens included.
        prefix_tokens: P.
        patches: what each patch shows, B×h×w or B×(h·w), of 0 (context), 1 (object), 255
            (ignored); without it no token is of the class or the context.
        device: of the result; that of ``patches`` if they are given.

    Returns:
        bool, 4×B×N.

    Raises:
        InputError: if the patches are not as many as the tokens behind the prefix.

    Examples:
        >>> membership(1, 3, 1, torch.tensor([[1, 0]])).int().squeeze().tolist()
        [[1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]]
    """
    device = patches.device if patches is not None else device
    members = torch.zeros(len(GROUPS), batch, tokens, dtype=torch.bool, device=device)
    if prefix_tokens:
        members[0, :, 0] = True
    members[1, :, prefix_tokens:] = True
    if patches is not None:
        codes = patches.flatten(1)
        if codes.shape != (batch, tokens - prefix_tokens):
            raise InputError(
                f"{tuple(codes.shape)} patches were given for {batch} images of "
                f"{tokens - prefix_tokens} patch tokens."
            )
        members[2, :, prefix_tokens:] = codes == OBJECT
        members[3, :, prefix_tokens:] = codes == CONTEXT
    return members
