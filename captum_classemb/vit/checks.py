"""Identities that hold if a model is read rightly, compared once at the end of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import ClassEmbError, NonFiniteError, UnsupportedModelError
from captum_classemb.functional.precision import refuse_non_finite
from captum_classemb.hooks import changes_by_hand

__all__ = ["TOLERANCE", "Checks", "differs", "reading"]

#: Rounding that a local identity may show, relative to its largest entry, by the dtype it ran in.
#: Some models take a softmax in float32 whatever their dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """What goes wrong within, while a model is read, is said of the model in one sentence.

    Raises:
        UnsupportedModelError: in place of any error but the library's own and lack of memory.
    """
    try:
        yield
    except (ClassEmbError, torch.OutOfMemoryError):
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        said = str(error).split("\n")[0]
        raise UnsupportedModelError(
            f"{type(model).__qualname__} is not put together as its adapter expects "
            f"({type(error).__name__}: {said}), so it cannot be read; an adapter of its own can "
            "say how (see register_adapter)."
        ) from error


#: Numbers that wait to be compared with others of their shape at the end.
_FEW = 1 << 22


@dataclass
class _Identity:
    """What is compared, and then the largest difference and entry of each block and image."""

    what: str
    blocks: tuple[int, ...]
    pair: tuple[Tensor, Tensor] | None
    numbers: tuple[Tensor, ...] = ()


class Checks:
    """Gathers comparisons on the device; :meth:`finish` waits for it once.

    Args:
        model: named in messages, with the hooks that are set on it.
        tolerance: of each identity, relative to its largest entry.
    """

    def __init__(self, model: nn.Module, tolerance: float) -> None:
        self.model = model
        #: The images, looked at if something is not finite.
        self.pixels: Tensor | None = None
        self.tolerance = tolerance
        self._identities: list[_Identity] = []
        self._conditions: list[tuple[Tensor, Callable[[], ClassEmbError]]] = []

    def equal(self, what: str, blocks: Sequence[int], rebuilt: Tensor, real: Tensor) -> None:
        """Two values of each block and image are to agree: L×B×…, or B×… for no block."""
        lead = 2 if blocks else 1
        pair = rebuilt.flatten(lead), real.flatten(lead)
        self._identities.append(_Identity(what, tuple(blocks), pair))
        if real.numel() > _FEW:
            _measure(self._identities[-1:])

    def require(self, holds: Tensor, error: Callable[[], ClassEmbError]) -> None:
        """A condition on the device, and the error if it fails."""
        self._conditions.append((holds, error))

    def finish(self) -> None:
        """Compare what was gathered since the last time.

        Raises:
            UnsupportedModelError: if an identity does not hold, for the first that fails.
            NonFiniteError: if an image's values are not finite.
            ClassEmbError: the error of a condition.
        """
        conditions, self._conditions = self._conditions, []
        identities, self._identities = self._identities, []
        alike: dict[Any, list[_Identity]] = {}
        for identity in identities:
            if identity.pair is not None:
                kind = tuple((t.shape, t.dtype) for t in identity.pair)
                alike.setdefault(kind, []).append(identity)
        for group in alike.values():
            _measure(group)
        parts = [(~holds).any()[None] for holds, _ in conditions]
        parts += [n.reshape(-1) for identity in identities for n in identity.numbers]
        if not parts:
            return
        widest = max((i.numbers[0].dtype for i in identities), key=_bits, default=torch.float32)
        both = torch.cat([part.to(widest) for part in parts]).tolist()
        for failed, (_, error) in zip(both, conditions, strict=False):
            if failed:
                raise error()
        both = both[len(conditions) :]
        sizes = [identity.numbers[0].numel() for identity in identities]
        start = 0
        for identity, count in zip(identities, sizes, strict=True):
            difference, size = both[start : start + count], both[start + count : start + 2 * count]
            start += 2 * count
            self._compare(identity, difference, size)

    def _compare(
        self, identity: _Identity, difference: Sequence[float], size: Sequence[float]
    ) -> None:
        batch = identity.numbers[0].shape[-1]
        for k, (d, s) in enumerate(zip(difference, size, strict=True)):
            if d <= self.tolerance * s < float("inf") or d == 0.0:
                continue
            block, image = divmod(k, batch)
            where = f" of block {identity.blocks[block]}" if identity.blocks else ""
            name = type(self.model).__qualname__
            if not d + s < float("inf"):
                if self.pixels is not None:
                    refuse_non_finite(self.pixels)
                raise NonFiniteError(
                    f"{identity.what}{where} of {name} hold NaN or infinity for image "
                    f"{image}: finite values are needed (does the dtype overflow?)."
                )
            raise UnsupportedModelError(
                differs(self.model, identity.what + where, d / max(s, 1e-300), f"image {image}")
            )


def _measure(identities: Sequence[_Identity]) -> None:
    """Compare identities whose values have the same shape, together."""
    pairs = [identity.pair for identity in identities if identity.pair is not None]
    rebuilt, real = (torch.stack(x) if len(x) > 1 else x[0][None] for x in zip(*pairs, strict=True))
    norms = [torch.linalg.vector_norm(x, float("inf"), -1) for x in (rebuilt - real, real)]
    for identity, difference, size in zip(identities, *norms, strict=True):
        identity.pair, identity.numbers = None, (difference, size)


def differs(model: nn.Module, what: str, error: float, where: str) -> str:
    """The sentence of a refusal: what differed, by how much, where, and what was set by hand."""
    by_hand = changes_by_hand(model) or "a module that the adapter does not know"
    return (
        f"{type(model).__qualname__} does not compute what its structure says: {what} differ from "
        f"the reconstruction by {error:.1e} of the largest entry for {where}, so no exact "
        f"attribution is possible (cause: {by_hand}?)."
    )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
