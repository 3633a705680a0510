"""What the baselines share: one score a patch, one class after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr._forward_pass import run
from captum_classemb.attr._inputs import forward_args, images
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.vit.memories import ForwardPass

__all__ = ["Baseline", "pooled_rows"]


class Baseline(PatchAttribution):
    """A method with one score a patch.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.
    """

    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        # Derivatives are taken by autograd, which inference mode and its tensors do not allow.
        with torch.inference_mode(False):
            pixels = pixels.clone() if pixels.is_inference() else pixels
            scores = self._token_scores(pixels, self._targets(target, pixels), args)
        return self._to_grid(scores[:, None], pixels)

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Scores of all tokens, prefix tokens included: B×N."""
        needs = self.needs()
        assert needs is not None
        done = run(self.vit, needs, pixels, args)
        scores = self._recorded_scores(done, target)
        done.checks.finish()
        return scores

    def _recorded_scores(self, done: ForwardPass, target: Tensor) -> Tensor:
        """The same from a recorded forward pass, for a method that reads one."""
        raise NotImplementedError

    def image_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        with torch.inference_mode(False):
            each = [self._recorded_scores(done, column) for column in index.unbind(1)]
            return torch.stack(each, 1)[..., self.vit.prefix_tokens :]

    def attribute_classes(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        classes: Sequence[int] | None = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """The map of every class, one after another: the method has no faster way.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            classes (Sequence[int], optional): the K classes wanted; all C if None. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None

        Returns:
            Tensor: B×K×h×w.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args)
        wanted = range(self.readout.num_classes) if classes is None else classes
        maps = [self._patch_scores(pixels, int(c), args)[:, 0] for c in wanted]
        return upcast(torch.stack(maps, 1))

    def _cotangent(self, final: Tensor, target: Tensor, frozen: bool = False) -> Tensor:
        """∂logit/∂ of the last tokens (B×N×D), with every σ of the readout held if ``frozen``."""
        readout = self.readout.at(len(self.vit.blocks) - 1, "resid_post")
        rows = final.detach()[:, readout.reads]
        g = torch.nn.functional.one_hot(target, readout.num_classes).to(upcast(rows).dtype)
        cotangent = torch.zeros_like(upcast(final))
        cotangent[:, readout.reads] = readout.vjp(rows, g[:, None], frozen)[:, :, 0]
        return cotangent.to(final.dtype)


def pooled_rows(method: PatchAttribution) -> slice:
    """The prefix tokens that the readout reads.

    Raises:
        UnsupportedModelError: if it reads patches: the method is defined for a class token.
    """
    reads = method.readout.reads
    if reads.stop is None or not 0 <= reads.start < reads.stop <= method.vit.prefix_tokens:
        raise UnsupportedModelError(
            f"{type(method).__name__} is defined for models that read a class token; "
            f"{type(method.vit.model).__qualname__} reads its patches."
        )
    return reads
