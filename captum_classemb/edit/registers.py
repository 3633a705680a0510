"""A register for a trained model: sinks move to a token of their own (Jiang et al., 2025).

Few MLP neurons make the tokens of large norm on which attention rests. Moved to an added token,
their activations leave the patches to themselves; no weight changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.edit.tokens import reads_patches, refuse_class_attention
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.functional.sinks import sinks
from captum_classemb.hooks import before, hooks_removed
from captum_classemb.vit import MLP, Call, ViT, adapt, record

__all__ = ["Neuron", "sink_neurons", "with_register"]

#: What libraries call a norm between the embedding and the first block.
_FIRST_NORMS = ("norm_pre", "pre_layrnorm", "pre_layernorm", "ln_pre")


class Neuron(NamedTuple):
    """A hidden unit of an MLP: block, and unit among its memories, both counted from 0."""

    block: int
    unit: int


def sink_neurons(model: nn.Module, images: Tensor, count: int = 10) -> list[Neuron]:
    """The MLP neurons that are most active where sinks will be.

    A neuron's score is the mean size of its activation at the patch tokens that are sinks after the
    last block, over all images. Neurons of blocks before the one after which there are most sinks
    count.

    Args:
        model: a supported Vision Transformer.
        images: a few images in which it has sinks, B×3×H×W.
        count: how many neurons.

    Returns:
        the neurons with the highest scores, the highest first.

    Raises:
        InputError: if no image has a sink, or the model has fewer neurons before they appear.
    """
    vit = adapt(model)
    depth = len(vit.blocks)
    number = torch.zeros(depth, dtype=torch.float64)
    totals: list[Tensor | None] = [None] * depth
    patches = slice(vit.prefix_tokens, None)
    for image in images.split(1):
        kept = record(vit, image, {"mlp_coefficients": patches, "resid_post": patches})
        found = [sinks(upcast(x).norm(dim=-1)) for x in kept["resid_post"]]
        number += torch.tensor([int(each.sum()) for each in found])
        for block, by_module in enumerate(kept["mlp_coefficients"]):
            sizes = torch.cat([upcast(c).abs() for c in by_module], -1)[found[-1]].sum(0)
            total = totals[block]
            totals[block] = sizes if total is None else total + sizes
    if not number[-1]:
        raise InputError("no patch token of these images is a sink: there is nothing to move.")
    before_peak = totals[: int(number.argmax())]
    scores = [(total / number[-1]).cpu() for total in before_peak if total is not None]
    if sum(map(len, scores)) < count:
        raise InputError(
            f"{count} neurons were asked for, but sinks are most after block {len(scores)}, with "
            f"{sum(map(len, scores))} neurons before."
        )
    every = [Neuron(block, unit) for block, each in enumerate(scores) for unit in range(len(each))]
    return [every[place] for place in torch.cat(scores).topk(count).indices.tolist()]


def with_register(model: nn.Module, neurons: Sequence[tuple[int, int]]) -> ViT:
    """The model with one more prefix token, which takes over the activations of some neurons.

    The token enters as zeros, before a norm that lies in front of the blocks if there is one. Of
    each neuron it gets the activation of largest size among the patches, with its sign; the patches
    get 0. CLS is left alone. The model itself is not changed and shares its weights.

    Args:
        model: a supported Vision Transformer whose readout reads prefix tokens.
        neurons: block and unit of each, as :func:`sink_neurons` finds them.

    Returns:
        an adapted model, which everything takes that takes a model.

    Raises:
        InputError: if there is no such neuron.
        UnsupportedModelError: if the readout reads patches, or the model has no place for a token:
            with positions in attention, class attention, or MLPs that share their last layer.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> edited = with_register(demo_vit(), [Neuron(block=1, unit=5)])
        >>> edited(torch.rand(2, 3, 64, 64)).shape, edited.prefix_tokens
        (torch.Size([2, 10]), 2)
    """
    return _WithRegister(adapt(model), tuple(Neuron(*neuron) for neuron in neurons))


class _WithRegister(ViT):
    def __init__(self, vit: ViT, neurons: tuple[Neuron, ...]) -> None:
        refuse_class_attention(vit)
        name = type(vit.model).__qualname__
        if reads_patches(vit):
            raise UnsupportedModelError(
                f"the readout of {name} reads patches, and would read the register among them: "
                "registers are for models that read a class token."
            )
        for block in vit.blocks:
            tables = [a.bias(Call((), {}), slice(0, 1)) is not None for a in block.attentions]
            if any(tables) or any(mlp.proj.columns is not None for mlp in block.mlps):
                raise UnsupportedModelError(
                    f"{name} has no place for one more token in its blocks."
                )
        super().__init__(
            vit.model,
            vit.blocks,
            vit.readout if vit.has_readout else None,
            vit.prefix_tokens + 1,
            vit.patch_size,
            vit.image_size,
            vit.channels,
            vit._grid,
        )
        self.adapter, self.call, self.resized_to = vit.adapter, vit.call, vit.resized_to
        self.neurons = neurons
        for neuron in neurons:
            self._place(neuron)

    def read_again(self) -> None:
        if self.adapter is not None:
            super().read_again()
            self.prefix_tokens += 1

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        handles: list[RemovableHandle] = []
        with hooks_removed(handles):
            handles.append(self._append())
            handles += [before(b.module, self._refuse_positions, first=True) for b in self.blocks]
            by_mlp: dict[nn.Module, list[int]] = {}
            for neuron in self.neurons:
                mlp, index = self._place(neuron)
                by_mlp.setdefault(mlp.fc2, []).append(index)
            for fc2, indices in by_mlp.items():
                handles.append(before(fc2, self._moved(indices), first=True))
            return super().forward(*args, **kwargs)

    def _place(self, neuron: Neuron) -> tuple[MLP, int]:
        """The MLP of a neuron, and its index among the features that enter the last layer."""
        index = neuron.unit
        for mlp in self.block(neuron.block).mlps if neuron.block >= 0 else ():
            width = mlp.proj.weight.shape[-1]
            if 0 <= index < width:
                return mlp, index
            index -= width
        raise InputError(f"there is no neuron {neuron.unit} in block {neuron.block}.")

    def _refuse_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())[1:]):
            raise UnsupportedModelError(
                f"blocks of {type(self.model).__qualname__} take positions beside their tokens, "
                "which have none for a register."
            )

    def _append(self) -> RemovableHandle:
        """Append zeros to the prefix tokens where the first norm or block takes them."""
        module, argument = self.blocks[0].module, self.blocks[0].stream
        for name, each in self.model.named_modules():
            if name.rpartition(".")[2] in _FIRST_NORMS and not isinstance(each, nn.Identity):
                module, argument = each, 0
        place = self.prefix_tokens - 1

        def append(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = Call(args, kwargs).argument(argument)
            zeros = torch.zeros_like(tokens[:, :1])
            more = torch.cat([tokens[:, :place], zeros, tokens[:, place:]], 1)
            if argument < len(args):
                return (*args[:argument], more, *args[argument + 1 :]), kwargs
            name = list(kwargs)[argument - len(args)]
            return args, {**kwargs, name: more}

        return before(module, append, first=True)

    def _moved(self, indices: list[int]) -> Any:
        """A hook that moves activations from the patches to the register."""
        first = self.prefix_tokens

        def move(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            coefficients = Call(args, kwargs).input.clone()
            of_patches = coefficients[:, first:, indices]
            extreme = of_patches.abs().argmax(1, keepdim=True)
            coefficients[:, first - 1, indices] = of_patches.gather(1, extreme)[:, 0]
            coefficients[:, first:, indices] = 0.0
            return (coefficients, *args[1:]), kwargs

        return move
