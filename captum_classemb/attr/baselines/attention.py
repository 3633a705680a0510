"""Attention itself as an explanation: the last block's, and rolled out over all blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_classemb.attr._forward_pass import Needs
from captum_classemb.attr.baselines._base import Baseline, pooled_rows
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.record import ALL

__all__ = ["AttentionRollout", "RawAttention"]


class RawAttention(Baseline):
    """Attention of the class token to the patches in the last block, averaged over heads.

    The same for every class.

    Args:
        model (nn.Module): a supported Vision Transformer that reads a class token.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, or reads its patches.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> RawAttention(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__(model, readout)
        self.rows = pooled_rows(self)

    def needs(self) -> Needs:
        last = len(self.vit.blocks) - 1
        return Needs(self.rows, (), sites={"attention": self.rows}, site_blocks=(last,))

    def _recorded_scores(self, done: ForwardPass, target: Tensor) -> Tensor:
        assert done.recording is not None
        attention = torch.cat(done.recording["attention"][-1], 1)
        # Another method may have asked for all rows.
        every = attention.shape[2] == attention.shape[3]
        return (attention[:, :, self.rows] if every else attention).mean((1, 2))


class AttentionRollout(Baseline):
    """Attention multiplied over blocks, half of each token staying where it is.

    R = Π_b (½·I + ½·mean over heads of A_b), read at the class token (Abnar & Zuidema, ACL 2020).
    The same for every class.

    Args:
        model (nn.Module): a supported Vision Transformer that reads a class token.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, reads its patches, or its recorded
            blocks have no attention among all tokens.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> AttentionRollout(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__(model, readout)
        self.rows = pooled_rows(self)

    def needs(self) -> Needs:
        return Needs(self.rows, (), sites={"attention": ALL})

    def _recorded_scores(self, done: ForwardPass, target: Tensor) -> Tensor:
        assert done.recording is not None
        attention = done.recording["attention"]
        carried: Tensor | None = None
        # From the last block down, only the rows that are read have to be carried.
        for block in reversed(attention):
            mean = torch.cat(block, 1).mean(1)
            if mean.shape[1] != mean.shape[2]:
                raise UnsupportedModelError(
                    f"the blocks of {type(self.vit.model).__qualname__} that are read attend from "
                    "the class token alone: there is no attention among patches to roll out."
                )
            if carried is None:
                identity = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
                carried = identity[self.rows].expand(len(mean), -1, -1)
            carried = (carried + carried @ mean) / 2
        assert carried is not None
        return carried.mean(1)
