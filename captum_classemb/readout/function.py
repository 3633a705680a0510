"""A readout through any function of the tokens: other poolings, heads with hidden layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout

__all__ = ["FunctionReadout"]


class FunctionReadout(Readout):
    """Logits by a function of the rows that are read; derivatives by autograd through it alone.

    Args:
        function: …×Q×D to …×C.
        reads: the tokens it reads, as a slice of all N.
        num_classes: C.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], reads: slice, num_classes: int
    ) -> None:
        super().__init__()
        self.function = function
        self.reads = reads
        self.num_classes = num_classes

    def forward(self, rows: Tensor) -> Tensor:
        logits = upcast(self.function(rows.flatten(0, -3)))
        return logits.view(*rows.shape[:-2], logits.shape[-1])

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        batch, count, width = tokens.shape
        alone = tokens.reshape(batch * count, 1, width)
        logits = self.forward(alone).reshape(batch, count, -1)
        if target is None:
            return logits
        return logits.gather(-1, target[:, None, None].expand(batch, count, 1))[..., 0]
