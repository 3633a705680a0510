"""Readouts that have a map of their own for every block and site."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from captum_classemb.errors import InputError
from captum_classemb.readout.base import Readout

__all__ = ["Place", "PlacedReadout"]

#: A block, counted from 0, and a site of the residual stream.
Place = tuple[int, str]


class PlacedReadout(Readout):
    """One readout for each place; asked for none in particular, the one after the last block.

    Args:
        places: the readout of each (block, site).

    Raises:
        InputError: if there is none.
    """

    def __init__(self, places: Mapping[Place, Readout]) -> None:
        super().__init__()
        if not places:
            raise InputError("no place was given: a readout by place needs at least one.")
        # Not registered: what they hold belongs to the model, or is written by save_readout.
        self._places = dict(places)
        self.num_classes = next(iter(places.values())).num_classes
        self.reads = next(iter(places.values())).reads

    @property
    def places(self) -> list[Place]:
        """Every (block, site) that has a readout."""
        return list(self._places)

    def at(self, block: int, site: str) -> Readout:
        """The readout of a place.

        Raises:
            InputError: if this place has none.
        """
        # The same tensor under two names.
        same = [(block, site)]
        same += [(block - 1, "resid_post")] if site == "resid_pre" and block else []
        same += [(0, "embedding")] if (block, site) == (0, "resid_pre") else []
        same += [(0, "resid_pre")] if site == "embedding" else []
        for place in same:
            if place in self._places:
                return self._places[place]
        sites = ", ".join(dict.fromkeys(site for _, site in self._places))
        blocks = sorted({block for block, _ in self._places})
        raise InputError(
            f"this {type(self).__name__} has nothing for {site} of block {block}: it was fitted on "
            f"{sites} of blocks {blocks[0]} to {blocks[-1]}."
        )

    @property
    def last(self) -> Readout:
        """The readout of the last hidden states."""
        return self.at(max(block for block, _ in self._places), "resid_post")

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.last(rows)
        return logits

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        return self.last.project(tokens, target)

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        return self.last.vjp(rows, g, frozen, summed)

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.last.constants(rows, g)

    def linearised(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.last.linearised(rows, g)

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.last.token_directions(tokens, target)
