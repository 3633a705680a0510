"""The patches a prediction rests on, along every path through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._base import check_classes
from captum_classemb.attr._forward_pass import Classes, Needs, run
from captum_classemb.attr._inputs import TensorOrTuple, forward_args, images, like_inputs
from captum_classemb.attr.refine import Refinable
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.ledger import PathLedger
from captum_classemb.functional.objectives import check_objective
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.vit.linearised import carried_back, refuse_unknown_steps
from captum_classemb.vit.memories import ForwardPass

__all__ = ["AllPathImportance"]

_CAP = 2.0
"""How much more than the median block one block may count."""

_CLASSES = 100
"""Classes whose entries by block are formed at once from those of a basis."""


class AllPathImportance(Refinable):
    """What each patch brings to the target along every path, at every depth.

    With attention, the σ of norms and the gates f(x)/x of activations at their values the model is
    linear from every block on. With g_b the derivative of the score there, token j has the entry
    x_b[j] · g_b[j] at the input of block b, and at every block the entries and biases add up to the
    score (:meth:`ledger`). A patch's importance is the mean of its entries over blocks. Paths run
    through all tokens, where :class:`PatchImportance` follows the rows of the readout alone; it
    costs one forward pass and, for each cotangent, one chain of transposed products.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        objective (str, optional): ``"logit"``, ``"log_probability"``, or ``"both"``: the logit
            above the mean of all classes and the log-probability, their maps added by shares.
            A block whose entries spread over the patches more than twice as far as the median
            block's counts for no more than that: the first blocks of some models would drown all
            others. The scale has no unit. A model with one logit is explained by it. Default:
            ``"both"``

    Raises:
        InputError: if the objective has no such value.
        UnsupportedModelError: if the model is not supported, or its adapter does not say how
            every block makes its branches.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> model, image = demo_vit(), torch.rand(1, 3, 64, 64)
        >>> paths = AllPathImportance(model)
        >>> paths.attribute(image, target=7).shape
        torch.Size([1, 3, 64, 64])
        >>> paths.attribute_patches(image, target=7).shape
        torch.Size([1, 6, 1, 8, 8])
        >>> ledger = AllPathImportance(model, objective="logit").ledger(image, target=7)
        >>> bool((ledger.delta.abs() < 1e-3).all())
        True
    """

    #: A cotangent holds every token's: fewer classes at once than of other methods.
    _AT_ONCE = 8
    by_head = False

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module | None = None,
        objective: Literal["both", "logit", "log_probability"] = "both",
    ) -> None:
        check_objective(objective, ("both", "logit", "log_probability"))
        super().__init__(model, readout)
        check_classes(self.vit, objective)
        refuse_unknown_steps(self.vit)
        self.objective = objective

    def needs(self) -> Needs:
        return Needs(self.readout.reads, tuple(self.blocks), calls=True)

    # -- The maps

    def _entries(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        g = torch.cat(self._weightings(done, classes), 1)
        paths = self._patches(self._followed(done, self._directions(done, g)[0])[0])
        return [self._combined(paths.split(classes.index.shape[1], 2))[:, :, None]]

    def _kinds(self, classes: Classes) -> tuple[str, ...]:
        """The estimates that are added."""
        if self.objective != "both":
            return (self.objective,)
        # The difference of two log-probabilities is that of the logits.
        plain = classes.contrast is not None or self.readout.num_classes == 1
        return ("logit",) if plain else ("above the mean", "log_probability")

    def _weightings(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        """∂score/∂logits of each estimate, B×K×C."""
        if self.objective == "log_probability":
            return [self.resolved(done, self._weighting(done, classes, self.objective))]
        # Log-odds have the direction of the log-probability and lose no digits.
        kinds = [kind.replace("probability", "odds") for kind in self._kinds(classes)]
        return [self._weighting(done, classes, kind) for kind in kinds]

    def _weighting(self, done: ForwardPass, classes: Classes, kind: str) -> Tensor:
        logits = self.model_logits(done)
        if kind != "above the mean":
            return self.weights(logits, classes, kind)
        g = self.weights(logits, classes, "logit")
        return g - g.mean(-1, keepdim=True)

    def _combined(self, parts: Sequence[Tensor]) -> Tensor:
        """The mean over blocks, or the sum of both estimates: L×B×K×(N − P)."""
        if self.objective != "both":
            return parts[0] / len(parts[0])
        return torch.stack([part * _factors(part) for part in parts]).sum(0)

    def _directions(self, done: ForwardPass, g: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            return self.last_readout.linearised(done.final, g)
        except UnsupportedModelError:
            return self.last_readout.vjp(done.final, g), None

    def _followed(self, done: ForwardPass, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Entries x·g at every block's input (L×B×K×N), and the biases from there on (L×B×K)."""
        assert done.calls is not None
        rows, product = done.rows, upcast(done.final)[:, :, None] * cotangent
        entries, biases = [], []
        for index in reversed(range(len(self.vit.blocks))):
            calls, above = done.calls[index], product.sum((1, 3))
            size = product.abs().sum((1, 3))
            cotangent, bias = carried_back(self.vit.blocks[index], calls, cotangent, rows)
            rows, product = slice(None), upcast(calls.tokens)[:, :, None] * cotangent
            entry = product.sum(-1).transpose(1, 2)
            size = torch.maximum(size, product.abs().sum((1, 3)))
            self._check(done, index, entry.sum(-1) + bias, above, size)
            entries.append(entry)
            biases.append(bias)
        later = torch.stack(biases).cumsum(0).flip(0)
        return torch.stack(entries[::-1]), later

    @staticmethod
    def _check(done: ForwardPass, block: int, found: Tensor, above: Tensor, size: Tensor) -> None:
        """What enters a block and its biases add up to what leaves it, relative to Σ|x·g|."""
        size = size.clamp_min(torch.finfo(size.dtype).tiny)
        whole = torch.ones_like(size)
        pair = [torch.stack([part / size, whole], -1)[None] for part in (found, above)]
        done.checks.equal("sums over all paths", [block], *pair)

    # -- Many classes: what a block does to a cotangent is linear, so where there are more classes
    # than dimensions it is followed back for the dimensions alone.

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        batch, rows, width = done.final.shape
        if len(index) <= rows * width:
            return super().class_maps(done, index)
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            eye = torch.eye(rows * width, dtype=done.final.dtype, device=done.final.device)
            basis = eye.view(1, -1, rows, width).transpose(1, 2).expand(batch, -1, -1, -1)
            found = [self._followed(done, c)[0] for c in basis.split(self._AT_ONCE, 2)]
            paths = self._patches(torch.cat(found, 2))
            weightings = self._weightings(done, Classes(index.expand(batch, -1)))
            directions = [
                self._directions(done, g)[0].transpose(1, 2).flatten(2) for g in weightings
            ]
            some = [u.split(_CLASSES, 1) for u in directions]
            maps = [
                self._combined([u @ paths for u in part]).sum(0) for part in zip(*some, strict=True)
            ]
            return torch.cat(maps, 1)

    # -- The ledger

    def has_convergence_delta(self) -> bool:
        """True: the entries of every block are complete."""
        return True

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
        return_convergence_delta: bool = False,
    ) -> TensorOrTuple | tuple[TensorOrTuple, Tensor]:
        """Scores of pixels; see :meth:`PatchAttribution.attribute`.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            contrast (int, Tensor, list or "runner-up", optional): explain why the target and not
                this class: the target's logit minus the other's. ``"runner-up"`` is the highest
                other logit. Default: None
            return_convergence_delta (bool, optional): also return the sum of the ledger minus
                the model's own score, the mean over blocks, B. Default: False

        Raises:
            InputError: if the inputs are wrong, or the contrast is the target itself.
            TargetError: if the target is missing, out of range, or of the wrong length or type.
        """
        if not return_convergence_delta:
            maps: TensorOrTuple = super().attribute(
                inputs, target, additional_forward_args, contrast=contrast
            )
            return maps
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        ledger = self._ledger(pixels, target, args, contrast)
        maps_of_pixels = self._shared_out(self._on_grid(ledger.patches, pixels), pixels)
        return like_inputs(inputs, maps_of_pixels), ledger.delta.mean(1)

    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: Any = None,
        end_point: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
    ) -> Tensor:
        """Σ attributions + ``ledger(end_point).rest`` − score: 0 up to rounding, B.

        Raises:
            InputError: if a ``start_point`` is given, since there is no baseline.
        """
        if start_point is not None:
            raise InputError("a start_point was given: the ledger has no baseline, leave it None.")
        if end_point is None:
            raise InputError("no end_point was given: it is the images that were explained.")
        ledger = self.ledger(end_point, target, additional_forward_args, contrast=contrast)
        maps = attributions[0] if isinstance(attributions, (tuple, list)) else attributions
        apart = upcast(maps).flatten(1).sum(1) - ledger.patches.sum(1)
        return apart + ledger.delta.mean(1)

    def ledger(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
    ) -> PathLedger:
        """Every token's entry at every block, and the biases.

        With ``objective="both"`` what is split at a block is the logit above the mean of all
        classes and the log-probability, each times its block's factor in the map.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            contrast (int, Tensor, list or "runner-up", optional): as for :meth:`attribute`; the
                ledger is then of the difference of the two logits. Default: None

        Returns:
            PathLedger: the entries; at every block they add up to the score up to rounding.

        Raises:
            UnsupportedModelError: if the readout is not affine with its norms frozen.
        """
        args = forward_args(additional_forward_args)
        return self._ledger(images(self.vit, inputs, args), target, args, contrast)

    def _ledger(
        self, pixels: Tensor, target: Any, args: tuple[Any, ...], contrast: Any
    ) -> PathLedger:
        index = self._early_targets(target, pixels)
        done = run(self.vit, self.needs(), pixels, args)
        ledger = self.ledger_of(done, self._late_targets(done, index), contrast)
        done.checks.finish()
        return ledger

    def ledger_of(self, done: ForwardPass, index: Tensor, contrast: Any = None) -> PathLedger:
        """The ledger of one class an image (B) from a forward pass."""
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            classes = self.against(done, index, contrast)
            parts = [self._part(done, classes, kind) for kind in self._kinds(classes)]
        if self.objective != "both":
            return parts[0]
        factors = [_factors(self._patches(p.entries).transpose(0, 1)) for p in parts]
        # A map is the sum of these entries, and of a ledger's the mean.
        scaled = [
            _times(part, factor[..., 0].T * len(factor))
            for part, factor in zip(parts, factors, strict=True)
        ]
        return scaled[0] if len(scaled) == 1 else _sum(*scaled)

    def _part(self, done: ForwardPass, classes: Classes, kind: str) -> PathLedger:
        logits = self.model_logits(done)
        g = self._weighting(done, classes, kind)
        u, constant = self.last_readout.linearised(done.final, g)
        entries, biases = self._followed(done, u)
        score, entropy = (logits[:, None] * g).sum(-1)[:, 0], None
        if kind == "log_probability" and classes.contrast is None and logits.shape[1] > 1:
            self.resolved(done, g)
            log_p = logits.log_softmax(-1)
            score, entropy = log_p.gather(1, classes.index)[:, 0], (log_p.exp() * log_p).sum(-1)
        return PathLedger(
            entries[:, :, 0].transpose(0, 1),
            (biases + constant)[..., 0].T,
            score,
            self.vit.prefix_tokens,
            entropy,
        )


def _factors(maps: Tensor) -> Tensor:
    """What the blocks of a map (L×…×N) are multiplied by: L×…×1.

    A block counts in full unless its entries spread over the patches, Σ|entry − mean entry|, more
    than twice as far as the median block's: then as much as that. The map is divided by Σ|map|.
    """
    tiny = torch.finfo(maps.dtype).tiny
    spread = (maps - maps.mean(-1, keepdim=True)).abs().sum(-1, keepdim=True)
    most = _CAP * spread.median(0, keepdim=True).values
    kept = (most / spread.clamp_min(tiny)).clamp(max=1.0)
    kept = torch.where(spread > most, kept, 1.0)
    whole = (maps * kept).sum(0).abs().sum(-1, keepdim=True)
    return kept / whole.clamp_min(tiny)


def _times(ledger: PathLedger, factor: Tensor) -> PathLedger:
    """Everything times a factor of each image and block, B×L."""
    return PathLedger(
        ledger.entries * factor[..., None],
        ledger.bias * factor,
        ledger.score[:, None] * factor,
        ledger.prefix_tokens,
        None if ledger.entropy is None else ledger.entropy[:, None] * factor,
    )


def _sum(first: PathLedger, second: PathLedger) -> PathLedger:
    return PathLedger(
        first.entries + second.entries,
        first.bias + second.bias,
        first.score + second.score,
        first.prefix_tokens,
        second.entropy,
    )
