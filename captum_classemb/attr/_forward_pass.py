"""What the methods share that contract one recorded forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._base import PatchAttribution, choose
from captum_classemb.attr._inputs import (
    TensorOrTuple,
    early_targets,
    forward_args,
    images,
    like_inputs,
)
from captum_classemb.errors import InputError, NonFiniteError, TargetError, UnsupportedModelError
from captum_classemb.functional.objectives import logit_gradient, runner_up
from captum_classemb.functional.precision import no_autocast
from captum_classemb.readout import Readout
from captum_classemb.vit import ViT
from captum_classemb.vit.checks import reading
from captum_classemb.vit.forward_pass import forward_pass
from captum_classemb.vit.linearised import calls_kept
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.verify import call_tolerance

__all__ = ["Classes", "ForwardPassAttribution", "Needs"]


class Needs(NamedTuple):
    """What a method reads of a forward pass: see :func:`~captum_classemb.vit.forward_pass`.

    Without blocks no rows are read: any will do.
    """

    rows: slice
    blocks: tuple[int, ...]
    attention: bool = False
    keys: bool = False
    sites: Mapping[str, slice] | None = None
    site_blocks: tuple[int, ...] | None = None
    calls: bool = False
    norms: bool = False

    def united(self, other: Needs) -> Needs | None:
        """What serves both; None where they read other rows or blocks."""
        if not other.blocks:
            base = self
        elif not self.blocks or self[:2] == other[:2]:
            base = other
        else:
            return None
        sites = dict(self.sites or {})
        for site, rows in (other.sites or {}).items():
            sites[site] = rows if sites.get(site, rows) == rows else slice(None)
        blocks = None
        if sites and all(n.site_blocks is not None for n in (self, other) if n.sites):
            blocks = tuple(sorted({b for n in (self, other) for b in n.site_blocks or ()}))
        attention, keys = self.attention or other.attention, self.keys or other.keys
        calls, norms = self.calls or other.calls, self.norms or other.norms
        return Needs(*base[:2], attention, keys, sites, blocks, calls, norms)


@dataclass(frozen=True)
class Classes:
    """The classes explained and those they are set against: B×K both, the second or None."""

    index: Tensor
    contrast: Tensor | None = None


class ForwardPassAttribution(PatchAttribution):
    """Maps of any classes as one expression in what a forward pass leaves.

    A subclass writes :meth:`_entries`: for K classes at once, by block, head and token.
    :meth:`attribute` and :meth:`attribute_patches` are the case K = 1 of :meth:`attribute_classes`.

    Args:
        model: a supported Vision Transformer.
        readout: what maps features to logits; the model's own class embedding by default.
        blocks: the blocks used; all by default.
        heads: the heads used; all by default.
    """

    #: Classes whose entries by block and head are formed at once.
    _AT_ONCE = 16

    #: Whether entries are of heads, of which every block then needs as many.
    by_head = True

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module | None = None,
        blocks: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, readout)
        self._named = blocks, heads
        self._every_head = heads is None
        _ = self.blocks, self.heads
        if heads is not None:
            head_count(self.vit)

    @property
    def blocks(self) -> list[int]:
        """The blocks used."""
        return choose(self._named[0], len(self.vit.blocks), "block")

    @property
    def heads(self) -> list[int]:
        """The heads used."""
        return choose(self._named[1], max(head_counts(self.vit)), "head")

    # -- What a method says of itself

    @abstractmethod
    def needs(self) -> Needs: ...

    @abstractmethod
    def _entries(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        """For each stage of blocks the entries of every head and patch: L×B×H×K×(N − P)."""

    # -- Captum's interface

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
    ) -> TensorOrTuple:
        """Scores of pixels; see :meth:`PatchAttribution.attribute`.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            contrast (int, Tensor, list or "runner-up", optional): explain why the target and not
                this class: the target's logit minus the other's. ``"runner-up"`` is the highest
                other logit. Default: None

        Raises:
            InputError: if the inputs are wrong, or the contrast is the target itself.
            TargetError: if the target is missing, out of range, or of the wrong length or type.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        maps = self._one_class(pixels, target, args, contrast, summed=True)
        return like_inputs(inputs, self._shared_out(maps, pixels))

    def attribute_patches(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
    ) -> Tensor:
        """Scores of patches, nothing summed: B×L'×H'×h×w for the chosen blocks and heads.

        Prefix tokens are left out. Arguments and errors as for :meth:`attribute`.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        return self._one_class(pixels, target, args, contrast, summed=False)

    def attribute_classes(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        classes: Sequence[int] | None = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        index = self._classes(classes, pixels)
        done = run(self.vit, self.needs(), pixels, args)
        maps = self.class_maps(done, index)
        done.checks.finish()
        return self._on_grid(maps, pixels)

    # -- From one forward pass, which several methods may share

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        return self.image_maps(done, index.expand(len(done.logits), -1))

    def image_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            some = index.split(self._AT_ONCE, 1)
            return torch.cat([self._summed(done, Classes(classes)) for classes in some], 1)

    def _summed(self, done: ForwardPass, classes: Classes) -> Tensor:
        """B×K×(N − P): entries over blocks and the chosen heads."""
        total = None
        for entries in self._entries(done, classes):
            part = self._of_heads(entries).sum((0, 2))
            total = part if total is None else total + part
        assert total is not None
        return total

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self.vit.model)

    def _patches(self, tokens: Tensor) -> Tensor:
        """…×N without prefix tokens."""
        return tokens[..., self.vit.prefix_tokens :]

    def _of_heads(self, entries: Tensor) -> Tensor:
        """The chosen heads of L×B×H×K×N, in the order they are named."""
        every = self._every_head or self.heads == list(range(entries.shape[2]))
        return entries if every else entries[:, :, self.heads]

    def _one_class(
        self, pixels: Tensor, target: Any, args: tuple[Any, ...], contrast: Any, summed: bool
    ) -> Tensor:
        index = self._early_targets(target, pixels)
        done = run(self.vit, self.needs(), pixels, args)
        maps = self.one_class(done, self._late_targets(done, index), contrast, summed)
        done.checks.finish()
        return self._on_grid(maps, pixels)

    def one_class(
        self, done: ForwardPass, index: Tensor, contrast: Any = None, summed: bool = True
    ) -> Tensor:
        """The maps of one class an image (B): B×(N − P), or B×L'×H'×(N − P)."""
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            classes = self.against(done, index, contrast)
            if summed:
                return self._summed(done, classes)[:, 0]
            if self.by_head and len(set(head_counts(self.vit))) > 1:
                head_count(self.vit)
            stages = self._entries(done, classes)
            by_block = stages[0] if len(stages) == 1 else torch.cat(stages)
            order = [sorted(self.blocks).index(block) for block in self.blocks]
            by_block = by_block if order == sorted(order) else by_block[order]
            return self._of_heads(by_block)[..., 0, :].transpose(0, 1)

    def against(self, done: ForwardPass, index: Tensor, contrast: Any) -> Classes:
        """The target of each image with the class it is set against: B×1 both.

        Raises:
            InputError: if there is no other class, or it is the target itself.
        """
        if contrast is None:
            return Classes(index[:, None])
        if self.readout.num_classes < 2:
            raise InputError("contrast needs another class: the model has one class.")
        if isinstance(contrast, str):
            if contrast != "runner-up":
                raise InputError(f"contrast {contrast!r} is no class index and not 'runner-up'.")
            return Classes(index[:, None], runner_up(self.model_logits(done), index[:, None]))
        try:
            early = early_targets(contrast, len(index), self.readout.num_classes, index.device)
            other = self._late_targets(done, early)
        except TargetError as error:
            raise InputError(f"contrast: {error}") from None
        same = InputError("the contrast is the target itself: name another class.")
        if index.device.type == "cpu" and bool((other == index).any()):
            raise same
        done.checks.require(other != index, lambda: same)
        return Classes(index[:, None], other[:, None])

    def model_logits(self, done: ForwardPass) -> Tensor:
        """B×C, from the last hidden states in float32 or wider."""
        own = self.vit.has_readout and self.readout is self.vit.readout
        return done.rebuilt if own and done.rebuilt is not None else self.last_readout(done.final)

    @property
    def last_readout(self) -> Readout:
        """The readout of the last hidden states."""
        return self.readout.at(len(self.vit.blocks) - 1, "resid_post")

    def weights(
        self, logits: Tensor, classes: Classes, objective: Any, of_logit: Tensor | None = None
    ) -> Tensor:
        """∂score/∂logits: …×B×K×C; ``of_logit`` is that of the logit, where it is at hand."""
        contrast = classes.contrast
        return logit_gradient(logits, classes.index, objective, contrast, of_logit=of_logit)

    def resolved(self, done: ForwardPass, g: Tensor) -> Tensor:
        """The weights g (…×B×K×C), to be reported at the end where they fall below the dtype."""
        size = torch.linalg.vector_norm(g, float("inf"), -1)
        size = size.amax(0) if size.dim() == 3 else size
        tiny = torch.finfo(g.dtype).tiny

        def error() -> NonFiniteError:
            gone = (size < tiny).any(-1).nonzero()[:, 0].tolist()
            return NonFiniteError(
                f"the prediction for image {', '.join(map(str, gone))} is so certain that the "
                f"derivative of its probability is below the smallest {g.dtype}: take "
                "objective='logit', or PatchImportance, or a model in float64."
            )

        done.checks.require(size >= tiny, error)
        return g

    # Everything goes by :meth:`_entries`.
    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        return self._one_class(pixels, target, args, None, summed=False)


def any_rows(vit: ViT) -> slice:
    """The rows of a pass whose rows nobody reads: those of the model's own readout."""
    return vit.readout.reads if vit.has_readout else slice(0, 1)


def run(vit: ViT, needs: Needs, pixels: Tensor, args: tuple[Any, ...]) -> ForwardPass:
    """One forward pass, with the logits compared where the model has a classifier."""
    with torch.inference_mode(False):
        pixels = pixels.clone() if pixels.is_inference() else pixels
        with calls_kept(vit) if needs.calls else nullcontext() as calls:
            done = forward_pass(
                vit,
                pixels,
                needs.rows,
                blocks=needs.blocks,
                attention=needs.attention,
                keys=needs.keys,
                norms=needs.norms,
                sites=needs.sites,
                site_blocks=needs.site_blocks,
                forward_args=args,
                tolerance=call_tolerance(vit, pixels),
            )
        done.calls = calls
        done.checks.pixels = pixels
        if vit.has_readout and vit.readout.reads == needs.rows:
            with no_autocast(pixels.device), reading(done.checks.model):
                done.rebuilt = vit.readout(done.final)
                done.checks.equal("logits", (), done.rebuilt, done.logits)
    return done


def head_counts(vit: ViT) -> list[int]:
    """H of each block, parallel modules counted together."""
    return [sum(a.heads for a in block.attentions) for block in vit.blocks]


def head_count(vit: ViT) -> int:
    """H of every block.

    Raises:
        UnsupportedModelError: if blocks differ.
    """
    counts = set(head_counts(vit))
    if len(counts) != 1:
        raise UnsupportedModelError(
            f"blocks have different numbers of heads ({sorted(counts)}): maps by head need one."
        )
    return counts.pop()
