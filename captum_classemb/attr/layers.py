"""The projections and memories of one module, for every token, unreduced."""

from __future__ import annotations

from typing import Any

from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._inputs import (
    TensorOrTuple,
    forward_args,
    images,
    like_inputs,
    targets,
)
from captum_classemb.errors import InputError
from captum_classemb.functional.memories import memory_contributions
from captum_classemb.functional.precision import no_autocast
from captum_classemb.readout import Linear, OutputPath, Readout
from captum_classemb.vit import ViT, adapt, record
from captum_classemb.vit.record import ALL, record_module

__all__ = ["LayerClassEmbeddingProjection", "LayerMemoryContribution"]


class _LayerMethod(LayerAttribution):  # type: ignore[misc]
    def __init__(
        self, model: nn.Module, layer: nn.Module | None, readout: nn.Module | None = None
    ) -> None:
        self.vit: ViT = adapt(model)
        super().__init__(self.vit, layer)
        self.readout: Readout = self.vit.read_with(readout) or self.vit.readout

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: no score is multiplied by the input."""
        return False

    def _layer(self) -> nn.Module:
        # Read at each call: concept methods assign the layer after construction.
        if not isinstance(self.layer, nn.Module):
            raise InputError(f"layer is a {type(self.layer).__qualname__}: a module is needed.")
        return self.layer

    def _targets(self, target: Any, pixels: Tensor) -> Tensor:
        return targets(target, len(pixels), self.readout.num_classes).to(pixels.device)


class LayerClassEmbeddingProjection(_LayerMethod):
    """The target's logit at every token of one module's output (Vilas et al. 2023, §3).

    Args:
        model (nn.Module): a supported Vision Transformer.
        layer (nn.Module): a module of the model whose output is B×N×D.
        readout (Readout, optional): maps features to logits. Default: the class embedding.

    Examples:
        >>> import torch
        >>> from captum_classemb.models import demo_vit
        >>> model = demo_vit()
        >>> lens = LayerClassEmbeddingProjection(model, model.blocks[2])
        >>> lens.attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 65])
    """

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> TensorOrTuple:
        """Scores of tokens, prefix tokens first: B×N, a tuple if the inputs are one.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            attribute_to_layer_input (bool, optional): read the module's input instead of its
                output. Default: False

        Raises:
            InputError: if the layer's tokens have not the width that the readout reads.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args)
        index = self._targets(target, pixels)
        tokens = record_module(
            self.vit,
            pixels,
            self._layer(),
            of_input=attribute_to_layer_input,
            forward_args=args,
        )
        if tokens.dim() != 3:
            raise InputError(f"the layer has shape {tuple(tokens.shape)}: tokens B×N×D are needed.")
        width = self.vit.blocks[-1].attentions[0].proj.weight.shape[0]
        if tokens.shape[-1] != width:
            raise InputError(
                f"the layer's tokens have width {tokens.shape[-1]}, which the readout does not "
                f"read: hidden states have {width}."
            )
        with no_autocast(pixels.device):
            scores = self.readout.project(tokens, index)
        return like_inputs(inputs, scores)


class LayerMemoryContribution(_LayerMethod):
    """What every memory of one attention or MLP module adds to the target's logit at each token.

    Coefficient × (value vector · class): the coefficients enter W_O or fc2, the value vectors are
    its columns, and the class direction is the readout of the token's last hidden state with σ
    frozen. For the token that the readout reads, the memories of an MLP sum to its ledger entry
    (Vilas et al. 2023, §5).

    Args:
        model (nn.Module): a supported Vision Transformer.
        layer (nn.Module): the attention or MLP module of a block.
        readout (Readout, optional): maps features to logits. Default: the class embedding.

    Examples:
        >>> import torch
        >>> from captum_classemb.models import demo_vit
        >>> model = demo_vit()
        >>> memories = LayerMemoryContribution(model, model.blocks[2].mlp)
        >>> memories.attribute(torch.rand(1, 3, 64, 64), target=7).shape[:2]
        torch.Size([1, 65])
    """

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> TensorOrTuple:
        """Contributions of memories: B×N×M, a tuple if the inputs are one.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            attribute_to_layer_input (bool, optional): must be False: memories lie inside the
                module. Default: False

        Raises:
            InputError: if the layer is no attention or MLP module of a block, or
                ``attribute_to_layer_input`` is True.
        """
        if attribute_to_layer_input:
            raise InputError("attribute_to_layer_input is True: memories lie inside the layer.")
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args)
        index = self._targets(target, pixels)
        branch, block, part = self._find()
        sites = [f"{branch}_coefficients", f"{branch}_path", "final"]
        recording = record(
            self.vit,
            pixels,
            dict.fromkeys(sites, ALL),
            blocks=[block],
            forward_args=args,
        )
        with no_autocast(pixels.device):
            u = self.readout.token_directions(recording["final"][0], index)
            path: OutputPath = recording[f"{branch}_path"][block][part]
            values = path.since(Linear).vjp(u[:, :, None], frozen=True)[:, :, 0]
            coefficients = recording[f"{branch}_coefficients"][block][part]
            scores = memory_contributions(coefficients.to(values.dtype), values)
        return like_inputs(inputs, scores)

    def _find(self) -> tuple[str, int, int]:
        layer = self._layer()
        for index, block in enumerate(self.vit.blocks):
            for part, attention in enumerate(block.attentions):
                if layer is attention.module:
                    return "attn", index, part
            for part, mlp in enumerate(block.mlps):
                if layer is mlp.module:
                    return "mlp", index, part
        raise InputError(
            f"the layer {type(layer).__qualname__} is no attention or MLP module of a block."
        )
