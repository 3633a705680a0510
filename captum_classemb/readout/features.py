"""What a classification head reads of the last tokens, and the readout that a head makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.attention_pooled import AttentionPooled, LatentPool
from captum_classemb.readout.base import Readout
from captum_classemb.readout.class_embedding import ClassEmbedding, Part
from captum_classemb.readout.derivatives import Diagonal
from captum_classemb.readout.function import FunctionReadout
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.norm import Norm
from captum_classemb.readout.output_path import OutputPath, along
from captum_classemb.readout.steps import Step

__all__ = ["Features", "HeadReadout", "head_size", "layers_of", "linear_head"]

_CLS = slice(0, 1)


@dataclass(frozen=True)
class Features:
    """The pooled tokens of the last block, as a head reads them.

    Attributes:
        tokens: the groups of tokens, as slices of all N, whose means stand side by side.
        width: D.
        prefix: P.
        token_norm: the norm of each token, before pooling.
        pooled_norm: the norm after pooling.
        pool: attention from a latent query, in place of the mean of the one group.
    """

    tokens: tuple[slice, ...]
    width: int
    prefix: int
    token_norm: Norm | None = None
    pooled_norm: Norm | None = None
    pool: LatentPool | None = None

    @property
    def reads(self) -> slice:
        """The tokens that are read, as a slice of all N."""
        stops = [group.stop for group in self.tokens]
        start = min(group.start for group in self.tokens)
        return slice(start, None if None in stops else max(stops))

    def groups(self, rows: Tensor) -> list[Tensor]:
        """The rows of each group, …×Q×D; a row that stands alone belongs to every group."""
        if rows.shape[-2] == 1:
            return [rows] * len(self.tokens)
        start = self.reads.start
        shifted = (
            slice(group.start - start, None if group.stop is None else group.stop - start)
            for group in self.tokens
        )
        return [rows[..., group, :] for group in shifted]

    def pooled(self, rows: Tensor) -> Tensor:
        """What the norm after pooling reads of the rows (…×Q×D): …×1×F."""
        normed = upcast(rows) if self.token_norm is None else self.token_norm(upcast(rows))
        return torch.cat([group.mean(-2, keepdim=True) for group in self.groups(normed)], -1)

    def read_by(self, *modules: nn.Module) -> Readout:
        """The readout that modules called one after another make of these features.

        A first linear layer of width 2D reads CLS beside the mean patch.

        Raises:
            InputError: if the first linear layer is of another width.
        """
        layers = list(layers_of(modules))
        features = self._as_wide_as(layers)
        steps = [_step(layer) for layer in layers]
        linear = steps[-1] if steps and isinstance(steps[-1], Linear) else None
        classes = head_size(layers, features.width * len(features.tokens))
        if features.pool is not None:
            if not all(steps):
                return FunctionReadout(
                    partial(_pool_and_layers, features, layers), features.reads, classes
                )
            known = (features.token_norm, features.pooled_norm)
            pooled = AttentionPooled(features.pool, None, features.reads, classes, *known)
            pooled.after = (*pooled.after, *(step for step in steps if step is not None))
            return pooled
        if linear is not None and len(steps) == 1 and features.pooled_norm is None:
            return ClassEmbedding(features._parts(linear), features.token_norm, None, classes)
        if linear is not None and len(features.tokens) == 1:
            norms = [*filter(None, [features.pooled_norm]), *steps[:-1]]
            if len(norms) == 1 and isinstance(norms[0], Norm):
                return ClassEmbedding(
                    features._parts(linear), features.token_norm, norms[0], classes
                )
        if all(steps):
            return HeadReadout(features, [step for step in steps if step is not None], classes)
        return FunctionReadout(partial(_layers, features, layers), features.reads, classes)

    def _parts(self, linear: Linear) -> list[Part]:
        if len(self.tokens) == 1:
            return [Part(linear, self.tokens[0])]
        columns = [slice(i * self.width, (i + 1) * self.width) for i in range(len(self.tokens))]
        pairs = zip(columns, self.tokens, strict=True)
        return [Part(Linear(linear.module, c), tokens) for c, tokens in pairs]

    def _as_wide_as(self, layers: Sequence[nn.Module]) -> Features:
        first: Any = next((m for m in layers if hasattr(m, "in_features")), None)
        width = self.width * len(self.tokens)
        if first is None or first.in_features == width:
            return self
        if first.in_features == 2 * self.width and self.prefix:
            both, norm = (_CLS, slice(self.prefix, None)), self.token_norm or self.pooled_norm
            return replace(self, tokens=both, token_norm=norm, pooled_norm=None, pool=None)
        raise InputError(
            f"a head that reads {first.in_features} features was given: the model's tokens have "
            f"{self.width}, so a first linear layer of width {self.width}"
            + (f", or {2 * self.width} for CLS beside the mean patch," if self.prefix else "")
            + " is needed."
        )


def layers_of(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The modules in call order, those of ``nn.Sequential`` too, without dropout and identities."""
    for module in modules:
        if type(module) is nn.Sequential:
            yield from layers_of(list(module))
        elif not isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity)):
            yield module


def linear_head(head: nn.Module) -> Linear:
    """A head that is one linear layer, dropout aside, as a step.

    Raises:
        UnsupportedModelError: if it is not.
    """
    layers = list(layers_of([head]))
    if len(layers) != 1 or not hasattr(layers[0], "in_features"):
        raise UnsupportedModelError(
            "the heads of a distilled model are to be one linear layer each, "
            f"one is a {type(head).__qualname__}."
        )
    return Linear(layers[0])


def _step(layer: nn.Module) -> Step | None:
    """A layer that is affine with its σ frozen; None for any other."""
    if isinstance(layer, nn.BatchNorm1d):
        return BatchNorm(layer)
    if isinstance(layer, nn.Linear) or hasattr(layer, "in_features") and not _own(layer):
        return Linear(layer)
    try:
        return Norm(layer)
    except UnsupportedModelError:
        return None


def _own(layer: nn.Module) -> bool:
    """Whether a layer with ``in_features`` may be no affine map: a class of the user's own."""
    wrappers = ("torch.", "peft.", "bitsandbytes.", "torchao.", "timm.")
    return not type(layer).__module__.startswith(wrappers)


def head_size(layers: Sequence[nn.Module], width: int) -> int:
    """The number of classes: the width of the last layer, or of what it returns."""
    if layers and hasattr(layers[-1], "out_features"):
        return int(layers[-1].out_features)  # type: ignore[arg-type]
    like = next((p for m in layers for p in m.parameters()), torch.zeros(()))
    with torch.no_grad():
        return int(_run(layers, torch.zeros(2, width).to(like)).shape[-1])


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _cast(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    like = next((p for m in layers for p in m.parameters() if p.is_floating_point()), x)
    return x.to(like.dtype)


def _layers(features: Features, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
    pooled = features.pooled(rows)
    if features.pooled_norm is not None:
        pooled = features.pooled_norm(pooled)
    return _run(layers, _cast(pooled[..., 0, :], layers))


def _pool_and_layers(features: Features, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
    assert features.pool is not None
    known = (features.token_norm, features.pooled_norm)
    pooled = AttentionPooled(features.pool, None, features.reads, features.width, *known)
    return _run(layers, _cast(pooled(rows), layers))


class BatchNorm(Step):
    """Batch norm in eval mode: a factor and an offset of each feature."""

    def __init__(self, module: nn.BatchNorm1d) -> None:
        self.module = module

    def _affine(self) -> tuple[Tensor, Tensor]:
        module, mean, var = self.module, self.module.running_mean, self.module.running_var
        if mean is None or var is None:
            raise UnsupportedModelError(
                "batch norm without running statistics reads the whole batch: no image has a map "
                "of its own."
            )
        factor, mean = (upcast(var) + module.eps).rsqrt(), upcast(mean)
        factor = factor if module.weight is None else factor * upcast(module.weight.detach())
        offset = -mean * factor
        return factor, offset if module.bias is None else offset + upcast(module.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        factor, offset = self._affine()
        return x * factor + offset

    def at(self, x: Tensor, frozen: bool = False) -> Diagonal:
        return Diagonal(self._affine()[0])

    def offset(self) -> Tensor:
        return self._affine()[1]


class HeadReadout(Readout):
    """A head of several layers, affine with every σ frozen, on pooled tokens.

    Args:
        features: what the head reads.
        steps: its batch norms, layer norms and linear layers.
        num_classes: C.
    """

    def __init__(self, features: Features, steps: Sequence[Step], num_classes: int) -> None:
        super().__init__()
        self.features = features
        norm = features.pooled_norm
        self.steps = (*(() if norm is None else (norm,)), *steps)
        self.num_classes = num_classes
        self.reads = features.reads

    def _path(self, rows: Tensor) -> OutputPath:
        return OutputPath.of(self.steps, self.features.pooled(rows))

    def forward(self, rows: Tensor) -> Tensor:
        return self._path(rows).output[..., 0, :]

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        logits = self._path(tokens[..., None, :]).output[..., 0, :]
        if target is None:
            return logits
        return logits.gather(-1, target[:, None, None].expand(*tokens.shape[:2], 1))[..., 0]

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        rows, norm = upcast(rows), self.features.token_norm
        parts = self._path(rows).vjp(g[..., None, :, :], frozen).split(self.features.width, -1)
        total = rows.new_zeros(*rows.shape[:-1], *parts[0].shape[-2:])
        places = self.features.groups(torch.arange(rows.shape[-2], device=rows.device)[:, None])
        for part, place in zip(parts, places, strict=True):
            index = place[:, 0]
            c = (part / len(index)).expand(*part.shape[:-3], len(index), *part.shape[-2:])
            if norm is not None:
                c = norm.at(rows[..., index, :], frozen).vjp(c)
            total.index_add_(-3, index, c)
        return total.sum(-3, keepdim=True) if summed else total

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, None]:
        path, norm = self._path(rows), self.features.token_norm
        g = g[..., None, :, :]
        total = path.biases(g)
        if norm is not None:
            parts = path.vjp(g, frozen=True).split(self.features.width, -1)
            total = total + sum(along(norm.offset(), part) for part in parts)
        return total, None

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(target, self.num_classes).to(tokens.dtype)
        g = one_hot[:, None, None].expand(-1, tokens.shape[1], -1, -1)
        return self.vjp(tokens[..., None, :], g, frozen=True)[..., 0, 0, :]
