"""Which patches are necessary, and which suffice: maps made again on what is left."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from captum_classemb.attr._forward_pass import ForwardPassAttribution, run
from captum_classemb.attr._inputs import forward_args, images
from captum_classemb.edit import remove_tokens
from captum_classemb.errors import InputError

__all__ = ["Order", "Refinable"]

Order = Literal["necessary", "sufficient", "both"]


class Refinable(ForwardPassAttribution):
    """A method whose map can be refined by taking patches out and asking again."""

    def refine(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        order: Order = "both",
        steps: int = 4,
        additional_forward_args: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rank the patches by two questions that one map cannot answer both.

        *Necessary*: which patches does the prediction miss most? The most important ones are taken
        out a step at a time, and after each step the map is made again of what is left, where
        evidence that stood in for theirs now shows. *Sufficient*: which patches carry the
        prediction by themselves? The least important are taken out first. Patches are taken out
        as :func:`~captum_classemb.edit.remove_tokens` does, N/T a step.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            order (str, optional): ``"necessary"``, ``"sufficient"``, or ``"both"``, which share
                the first pass. Default: ``"both"``
            steps (int, optional): T; the cost is that of about (T + 1)/2 maps for one order.
                Default: 4
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None

        Returns:
            Tensor or tuple[Tensor, Tensor]: ranks, int64, B×h×w, a permutation of 1 … N, N for the
            patch that is most necessary or most needed to suffice; with ``"both"`` the pair
            (necessary, sufficient).

        Raises:
            InputError: if the order is none of these, or there are more steps than patches.
            UnsupportedModelError: if tokens cannot be taken out of this model exactly.

        Examples:
            >>> from captum_classemb import PatchImportance
            >>> from captum_classemb.models import demo_vit
            >>> importance = PatchImportance(demo_vit())
            >>> necessary, sufficient = importance.refine(torch.rand(1, 3, 64, 64), target=7)
            >>> necessary.flatten().sort().values.equal(torch.arange(1, 65))
            True
        """
        if order not in get_args(Order):
            raise InputError(f"order {order!r} is none of {', '.join(map(repr, get_args(Order)))}.")
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        h, w = self.vit.grid((pixels.shape[2], pixels.shape[3]))
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= h * w:
            raise InputError(f"steps {steps!r} is no number from 1 to {h * w}, the patches.")
        index = self._early_targets(target, pixels)
        first = self._map_of_left(pixels, index, args, None)
        found = [
            self._ranks(pixels, index, args, first, question, steps).unflatten(1, (h, w))
            for question in (("necessary", "sufficient") if order == "both" else (order,))
        ]
        return found[0] if len(found) == 1 else (found[0], found[1])

    def _ranks(
        self,
        pixels: Tensor,
        index: Tensor,
        args: tuple[Any, ...],
        first: Tensor,
        question: str,
        steps: int,
    ) -> Tensor:
        """The ranks 1 … N of the patches: B×N."""
        batch, count = first.shape
        necessary = question == "necessary"
        left = torch.arange(count, device=first.device).expand(batch, -1)
        taken = []
        for step in range(steps):
            scores = first if step == 0 else self._map_of_left(pixels, index, args, left)
            some = count * (step + 1) // steps - count * step // steps
            order = scores.argsort(dim=1, descending=necessary, stable=True)
            taken.append(left.gather(1, order[:, :some]))
            left = left.gather(1, order[:, some:].sort(1).values)
        sequence = torch.cat(taken, 1)
        ranks = torch.arange(1, count + 1, device=first.device)
        ranks = ranks.flip(0) if necessary else ranks
        return torch.empty_like(sequence).scatter_(1, sequence, ranks.expand(batch, -1))

    def _map_of_left(
        self, pixels: Tensor, index: Tensor, args: tuple[Any, ...], left: Tensor | None
    ) -> Tensor:
        """The map of the patches that are left (B×K, ascending): B×K; of all for None."""
        with nullcontext() if left is None else remove_tokens(self.vit, left):
            done = run(self.vit, self.needs(), pixels, args)
            # Attention may be computed again for the map: with the positions that are left.
            maps = self.one_class(done, self._late_targets(done, index))
            done.checks.finish()
        return maps
