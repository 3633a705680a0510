"""Linear probes: classifiers that were fitted to hidden states, a classifier for each place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout
from captum_classemb.readout.class_embedding import ClassEmbedding, Part
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.placed import Place, PlacedReadout
from captum_classemb.readout.text import TextEmbedding

__all__ = ["LinearProbe", "PlaceProbe", "ProbeHeads", "features_of", "probe_tokens"]


def features_of(readout: Readout) -> ClassEmbedding:
    """The class embedding whose layer-normed features a probe reads.

    Raises:
        UnsupportedModelError: if the model's classifier reads no features of single tokens.
    """
    inner = readout.image if isinstance(readout, TextEmbedding) else readout
    if not isinstance(inner, ClassEmbedding):
        raise UnsupportedModelError(
            f"probes read the layer-normed tokens that a class embedding reads, and the readout "
            f"{type(inner).__name__} reads no single tokens."
        )
    return inner


def probe_tokens(prefix_tokens: int, positions: Sequence[int] | None) -> list[slice]:
    """The tokens that each probe of a place is fitted on.

    Args:
        prefix_tokens: P.
        positions: a probe for each of these positions; by default one for CLS, where there is
            one, and one for all image tokens.

    Examples:
        >>> probe_tokens(1, None)
        [slice(0, 1, None), slice(1, None, None)]
        >>> probe_tokens(1, [0, 7])
        [slice(0, 1, None), slice(7, 8, None)]
    """
    if positions is not None:
        return [slice(position, position + 1) for position in positions]
    image = slice(prefix_tokens, None)
    return [slice(0, 1), image] if prefix_tokens else [image]


@dataclass(frozen=True)
class ProbeHeads:
    """The classifiers of one place.

    Attributes:
        weight: G×C×D, a classifier for each entry of :func:`probe_tokens`.
        bias: G×C.
    """

    weight: Tensor
    bias: Tensor


class PlaceProbe(Readout):
    """The probe of one place: logits = W·LN(x) + b, with the W and b of each token's kind.

    An image is pooled as the model pools it, with a probe in the place of the classifier. Prefix
    tokens beside CLS (registers, distillation) are read by the probe of CLS.

    Args:
        own: the model's class embedding, whose norm and pooling are used.
        heads: the classifiers.
        prefix_tokens: P.
        positions: the tokens that have a probe each; None for one for CLS and one for the image.
        normed: False reads the hidden state itself, as the published code does.
    """

    def __init__(
        self,
        own: ClassEmbedding,
        heads: ProbeHeads,
        prefix_tokens: int,
        positions: Sequence[int] | None = None,
        normed: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.prefix_tokens = prefix_tokens
        self.positions = None if positions is None else tuple(positions)
        self.num_classes = heads.bias.shape[1]
        self.reads = own.reads
        norms = (own.token_norm, own.pooled_norm) if normed else (None, None)
        # In a tuple, so that the modules of the model are not registered a second time.
        self._features = (ClassEmbedding(own.parts, *norms, own.num_classes),)

    def _kinds(self, count: int) -> Iterator[tuple[int, list[int]]]:
        """Each classifier with the tokens it reads, among N = ``count``."""
        if self.positions is None:
            split = min(self.prefix_tokens, count)
            groups = [list(range(split)), list(range(split, count))]
            yield from enumerate(groups if self.prefix_tokens else groups[1:])
            return
        missing = sorted(set(range(count)) - set(self.positions))
        if missing:
            raise InputError(
                f"token {missing[0]} has no probe: the probes were fitted at "
                f"{len(self.positions)} of {count} positions."
            )
        for place, position in enumerate(self.positions):
            if position < count:
                yield place, [position]

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        features = self._features[0].normalise(tokens)
        batch, count, _ = tokens.shape
        shape = (batch, count) if target is not None else (batch, count, self.num_classes)
        logits = features.new_empty(shape)
        for kind, chosen in self._kinds(count):
            weight, bias = self.heads.weight[kind].to(features), self.heads.bias[kind].to(features)
            x = features[:, chosen]
            if target is None:
                logits[:, chosen] = x @ weight.T + bias
            else:
                own = (x @ weight[target][..., None])[..., 0]
                logits[:, chosen] = own + bias[target][:, None]
        return logits

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        directions = torch.zeros_like(upcast(tokens))
        for kind, chosen in self._kinds(tokens.shape[1]):
            alone = self._embedding([Part(self._head(kind, tokens), slice(0, None))])
            directions[:, chosen] = alone.token_directions(tokens[:, chosen], target)
        return directions

    def _head(self, kind: int, like: Tensor) -> Linear:
        weight, bias = self.heads.weight[kind], self.heads.bias[kind]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Linear(_linear(weight.to(like.device, dtype), bias.to(like.device, dtype)))

    def _embedding(self, parts: Sequence[Part]) -> ClassEmbedding:
        own = self._features[0]
        return ClassEmbedding(parts, own.token_norm, own.pooled_norm, self.num_classes)

    def _pooled(self, rows: Tensor) -> ClassEmbedding:
        """The map from the rows that are read to the logits of the image."""
        parts = self._features[0].parts
        return self._embedding(
            [
                Part(self._head(self._kind_of(part.tokens), rows), part.tokens, 1.0 / len(parts))
                for part in parts
            ]
        )

    def _kind_of(self, tokens: slice) -> int:
        single = tokens.stop is not None and tokens.stop - tokens.start == 1
        if self.positions is None:
            inside = tokens.stop is not None and tokens.stop <= self.prefix_tokens
            return 0 if inside or not self.prefix_tokens else 1
        if not single or tokens.start not in self.positions:
            raise UnsupportedModelError(
                "this model's classifier does not read a single token that has a probe, so these "
                "probes give no logits of images: fit one probe for all image tokens."
            )
        return self.positions.index(tokens.start)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._pooled(rows)(rows)
        return logits

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        return self._pooled(rows).vjp(rows, g, frozen, summed)

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._pooled(rows).constants(rows, g)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A module that holds these tensors; nothing is drawn, nothing copied."""
    module = nn.Linear(weight.shape[1], len(weight), device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(bias, requires_grad=False)
    return module


class LinearProbe(PlacedReadout):
    """A linear classifier fitted to the hidden states of every place (Vilas et al. §7).

    It stands wherever a readout is taken. The class embedding was trained with the model, on the
    model's training set; a probe knows the images it was fitted on and nothing else.

    Args:
        own: the model's readout.
        heads: the classifiers of each (block, site).
        prefix_tokens: P.
        positions: the tokens that have a probe each; by default there is one for CLS and one for
            all image tokens.
        normed: whether the probes read layer-normed features, as the class embedding does; False
            reads the hidden state itself, as the published code does.

    Raises:
        InputError: if there is no place, or a probe's width is not that of the model.
        UnsupportedModelError: if the model's classifier reads no features of single tokens.

    Examples:
        >>> from captum_classemb import ClassEmbeddingProjection
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit = adapt(demo_vit())
        >>> heads = ProbeHeads(torch.randn(2, 3, 96), torch.zeros(2, 3))
        >>> probe = LinearProbe(vit.readout, {(5, "resid_post"): heads}, prefix_tokens=1)
        >>> projection = ClassEmbeddingProjection(vit, readout=probe)
        >>> projection.attribute_patches(torch.rand(1, 3, 64, 64), target=2).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        own: Readout,
        heads: Mapping[Place, ProbeHeads],
        prefix_tokens: int,
        positions: Sequence[int] | None = None,
        normed: bool = True,
    ) -> None:
        features = features_of(own)
        width = features.parts[0].head.weight.shape[1]
        for (block, site), head in heads.items():
            if head.weight.shape[2] != width:
                raise InputError(
                    f"the probe for {site} of block {block} reads {head.weight.shape[2]} features "
                    f"and the model has {width}: it belongs to another model."
                )
        places = {
            place: PlaceProbe(features, head, prefix_tokens, positions, normed)
            for place, head in heads.items()
        }
        super().__init__(places)
        self.heads = dict(heads)
        self.prefix_tokens = prefix_tokens
        self.positions = None if positions is None else tuple(positions)
        self.normed = normed
