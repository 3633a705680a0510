"""Gradient × input with attention, norms and activations frozen, in the manner of AttnLRP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.hooks import after, hooks_removed
from captum_classemb.vit import ViT
from captum_classemb.vit.backward import AttentionTape, watched
from captum_classemb.vit.record import ALL

__all__ = ["AttnLRP"]

_NORMS = ("LayerNorm", "RMSNorm")
_ACTIVATIONS = (
    "GELU",
    "GELUActivation",
    "GELUTanh",
    "NewGELUActivation",
    "PytorchGELUTanh",
    "QuickGELU",
    "QuickGELUActivation",
    "ReLU",
    "SiLU",
    "SiLUActivation",
)


class AttnLRP(Baseline):
    """Input × the gradient of a model whose only variables are its additions.

    Attention probabilities, the σ of norms and the ratio act(x)/x of activations are held at their
    values, which makes the model linear in the tokens entering the first block; a patch scores
    Σ over the width of token × gradient. These are the rules of AttnLRP (Achtibat et al., ICML
    2024) for norms and activations; of attention's product A·V the values alone get relevance.
    Costs one forward and one backward pass for each class.

    Args:
        model (nn.Module): a supported Vision Transformer with plain MLPs.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, has gated MLPs, or activations whose
            rule is not known.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> AttnLRP(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__(model, readout)
        for block in self.vit.blocks:
            acts = [m for m in block.module.modules() if type(m).__name__ in _ACTIVATIONS]
            gated = [m for m in block.module.modules() if "glu" in type(m).__name__.lower()]
            if len(acts) != len(block.mlps) or gated:
                raise UnsupportedModelError(
                    f"blocks of type {type(block.module).__qualname__} do not have one known "
                    "activation for each MLP: gradient × input with frozen activations is not "
                    "defined for them here."
                )

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        with watched(self.vit) as tape, _frozen(self.vit, tape):
            self.vit(pixels, *args)
            assert tape.entering is not None
            final = tape.resid_post[-1]
            cotangent = self._cotangent(final, target, frozen=True)
            (gradient,) = torch.autograd.grad(final, tape.entering, cotangent)
        return upcast(gradient * tape.entering.detach()).sum(-1)


@contextmanager
def _frozen(vit: ViT, tape: AttentionTape) -> Iterator[None]:
    """Replace what norms, activations and attention return by the same values, partly held."""
    handles = []

    def replaced(
        module: nn.Module, rule: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> RemovableHandle:
        def hook(args: tuple[Any, ...], kwargs: Any, output: Tensor) -> Tensor | None:
            # A fused module may hand its own output on; only calls of this pass are rewritten.
            return rule(module, args[0], output) if args[0].requires_grad else None

        return after(module, hook)

    for module in vit.model.modules():
        name = type(module).__name__
        if name.startswith(_NORMS):
            handles.append(replaced(module, _hold_scale))
        elif name in _ACTIVATIONS:
            handles.append(replaced(module, _hold_ratio))
    # Registered after the tape's own hooks, so the call is on the tape already.
    for index, attention in enumerate(tape.attentions):

        def hold_weights(args: Any, kwargs: Any, output: Any, index: int = index) -> Any:
            mixed = tape.weights(index) @ upcast(tape.attentions[index].values(tape.calls[index]))
            x = mixed.transpose(1, 2).flatten(2)
            for step in tape.attentions[index].inner(tape.calls[index], ALL):
                x = step(x)
            rewritten = tape.attentions[index].proj(x).to(tape.output(index).dtype)
            return (rewritten, *output[1:]) if isinstance(output, tuple) else rewritten

        handles.append(after(attention.module, hold_weights))
    with hooks_removed(handles):
        yield


def _hold_scale(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The norm with σ held: an affine map."""
    y = x - x.mean(-1, keepdim=True) if "LayerNorm" in type(module).__name__ else x
    eps: Any = getattr(module, "eps", None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = y * torch.rsqrt(y.detach().square().mean(-1, keepdim=True) + eps)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _hold_ratio(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """act(x) as x times the constant act(x)/x; at x = 0 both are 0 whatever the constant."""
    safe = torch.where(x.detach().abs() < 1e-12, torch.ones_like(x), x.detach())
    return x * (output.detach() / safe)
