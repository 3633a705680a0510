"""From a branch's product to the residual stream: steps in a row, and what entered each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from captum_classemb.readout.derivatives import lifted
from captum_classemb.readout.steps import LayerScale, Step

__all__ = [
    "OutputPath",
    "along",
]


@dataclass(frozen=True)
class OutputPath:
    """Steps in a row from a branch's product to the residual stream, with what entered each.

    Attributes:
        steps: the maps, first to last.
        inputs: what entered each step at some rows of one forward pass (…×Q×·). It may be empty
            for a step whose derivative does not depend on it.
        output: what the last step returned.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor

    @classmethod
    def of(cls, steps: Sequence[Step], x: Tensor) -> OutputPath:
        """Run the steps from ``x``."""
        inputs = []
        for step in steps:
            inputs.append(x)
            x = step(x)
        return cls(tuple(steps), tuple(inputs), x)

    @property
    def uniform(self) -> bool:
        """Whether the derivative is the same for every row."""
        return all(step.uniform for step in self.steps)

    def before_layer_scale(self) -> OutputPath:
        """The path up to LayerScale, which is where the published code reads a branch."""
        for index, step in enumerate(self.steps):
            if isinstance(step, LayerScale):
                return OutputPath(self.steps[:index], self.inputs[:index], self.inputs[index])
        return self

    def since(self, kind: type[Step]) -> OutputPath:
        """The path from the last step of a kind on."""
        index = max(i for i, step in enumerate(self.steps) if isinstance(step, kind))
        return OutputPath(self.steps[index:], self.inputs[index:], self.output)

    def vjp(self, cotangent: Tensor, frozen: bool = False) -> Tensor:
        """The cotangents of the first input, …×Q×K×·, with every σ a constant if ``frozen``."""
        for step, x in zip(reversed(self.steps), reversed(self.inputs), strict=True):
            cotangent = step.at(x, frozen).vjp(cotangent)
        return cotangent

    def jvp(self, tangent: Tensor, frozen: bool = False) -> Tensor:
        """The tangents of the output, …×Q×K×·."""
        for step, x in zip(self.steps, self.inputs, strict=True):
            tangent = step.at(x, frozen).jvp(tangent)
        return tangent

    def biases(self, cotangent: Tensor) -> Tensor:
        """Σ over steps and rows of bias · cotangent, with every σ frozen: …×K."""
        total = along(None, cotangent)
        for step, x in zip(reversed(self.steps), reversed(self.inputs), strict=True):
            total = total + along(step.offset(), cotangent)
            cotangent = step.at(x, frozen=True).vjp(cotangent)
        return total


def along(offset: Tensor | None, cotangent: Tensor) -> Tensor:
    """Offset · cotangent summed over rows: D or L×D and …×Q×K×D to …×K."""
    if offset is None:
        return cotangent.new_zeros((*cotangent.shape[:-3], cotangent.shape[-2]))
    return (cotangent * lifted(offset.to(cotangent.dtype), cotangent.dim())).sum((-3, -1))
