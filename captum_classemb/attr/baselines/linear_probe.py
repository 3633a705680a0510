"""Patch importance from linear probes, as Vilas et al. (2023) compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_classemb.attr._forward_pass import Needs, any_rows
from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.errors import InputError
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.readout import LinearProbe
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.record import ALL

__all__ = ["LinearProbeImportance"]


class LinearProbeImportance(Baseline):
    """How high the target stands among the classes that probes read from a patch, over blocks.

    The class identifiability 1 − rank/C of each patch token after each block, read by that block's
    linear probe and summed over blocks: as the published code orders patches when it compares
    with probes. It costs one forward pass, and probes that were fitted before.
    ``ClassEmbeddingGradient(model, readout=probe)`` is the gradient of the same probes.

    Args:
        model (nn.Module): a supported Vision Transformer.
        probe (LinearProbe): fitted to ``resid_post`` of some blocks, those that are summed.

    Raises:
        InputError: if the probe was fitted to no output of a block.
        UnsupportedModelError: if the model is not supported.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.readout import ProbeHeads
        >>> from captum_classemb.vit import adapt
        >>> heads = ProbeHeads(torch.randn(2, 10, 96), torch.zeros(2, 10))
        >>> own = adapt(demo_vit()).readout
        >>> probe = LinearProbe(own, {(5, "resid_post"): heads}, prefix_tokens=1)
        >>> importance = LinearProbeImportance(demo_vit(), probe)
        >>> importance.attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, probe: LinearProbe) -> None:
        super().__init__(model, probe)
        self.blocks = [block for block, site in probe.places if site == "resid_post"]
        if not self.blocks:
            raise InputError(
                "the probe was fitted to no output of a block: fit it with the site resid_post."
            )

    def needs(self) -> Needs:
        blocks = tuple(self.blocks)
        return Needs(any_rows(self.vit), (), sites={"resid_post": ALL}, site_blocks=blocks)

    def _recorded_scores(self, done: ForwardPass, target: Tensor) -> Tensor:
        recording = done.recording
        assert recording is not None
        total = torch.zeros(())
        with torch.no_grad():
            for block in self.blocks:
                logits = self.readout.at(block, "resid_post").project(
                    recording["resid_post"][block]
                )
                index = target[:, None].expand(logits.shape[:2])
                total = total.to(logits) + identifiability(logits, index).to(logits)
        return total
