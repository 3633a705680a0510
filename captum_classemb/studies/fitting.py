"""Fit readouts to a model's hidden states: probes to labels, tuned lenses to the last block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.attr._base import choose
from captum_classemb.errors import InputError
from captum_classemb.readout import ClassEmbedding, LinearProbe, Translator, TunedLens
from captum_classemb.readout.placed import Place
from captum_classemb.readout.probe import features_of, probe_tokens
from captum_classemb.readout.training import LogisticTrainer, TranslatorTrainer
from captum_classemb.studies.linear_probing.metric import (
    FITTED_SITES,
    MEMORY_LIMIT,
    ProbeStatistics,
    plan_probes,
    stack_probes,
)
from captum_classemb.vit import Recording, ViT, adapt, record

#: Images and labels; anything after them is passed over.
Batches = Iterable[Sequence[Tensor]]


def _nothing(_: str) -> None:
    return None


def _again(batches: Batches, passes: int) -> None:
    """See that the batches can be read several times."""
    if passes > 1 and iter(batches) is batches:
        raise InputError(
            f"{passes} passes over the batches are needed and an iterator can be read once: give a "
            "DataLoader or a list."
        )


def _recordings(
    vit: ViT, batches: Batches, places: Iterable[Place], extra: Sequence[str] = ()
) -> Iterator[tuple[Recording, Tensor]]:
    """Each batch's recording of the places, and its labels."""
    chosen = list(places)
    sites = dict.fromkeys([*(site for _, site in chosen), *extra])
    blocks = sorted({block for block, _ in chosen})
    empty = True
    for images, labels, *_ in batches:
        empty = False
        pixels = images.to(device=vit.device, dtype=vit.dtype)
        yield record(vit, pixels, list(sites), blocks=blocks), labels.to(vit.device)
    if empty:
        raise InputError("there was no batch of images to fit a readout to.")


def _places(vit: ViT, sites: Sequence[str], blocks: Sequence[int] | None) -> list[Place]:
    return list(product(choose(blocks, len(vit.blocks), "block"), sites))


def _sizes(vit: ViT, num_classes: int | None) -> tuple[ClassEmbedding, int, int]:
    """The readout that normalises features, C and D."""
    own = features_of(vit.readout)
    return own, num_classes or vit.readout.num_classes, own.parts[0].head.weight.shape[1]


def _check_positions(positions: Sequence[int] | None, tokens: Tensor) -> None:
    count = tokens.shape[1]
    for position in positions or ():
        if not 0 <= position < count:
            raise InputError(f"position {position} is out of range: an image has {count} tokens.")


def fit_linear_probe(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sequence[str] = FITTED_SITES,
    blocks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    num_classes: int | None = None,
    alpha: float = 1.0,
    memory_limit: int = MEMORY_LIMIT,
    log: Callable[[str], None] = _nothing,
) -> LinearProbe:
    """Fit ridge probes to ±1 one-hot classes, streaming (Vilas et al. §7).

    The features are the layer-normed tokens that the class embedding reads. Sums are kept in
    float64, so that one pass over the batches is enough for all places where they fit.

    Args:
        model: a supported Vision Transformer.
        batches: pairs of images and labels; something that can be read again, unless one pass is
            enough.
        sites: whose hidden states are probed.
        blocks: all by default.
        positions: a probe for each of these tokens; by default one for CLS and one for all image
            tokens.
        num_classes: C; by default the model's.
        alpha: the penalty of the squared weights.
        memory_limit: bytes that the sums may take; with less there are more passes.
        log: is told what will be fitted in how many passes, and what the sums take, beforehand.

    Returns:
        the probe of every block and site. A class without images has the constant logit −1.

    Raises:
        InputError: if the batches cannot be read often enough, or a position does not exist.
        UnsupportedModelError: if the model's classifier reads no features of single tokens.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> batch = (torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]))
        >>> probe = fit_linear_probe(demo_vit(), [batch], sites=["resid_post"], log=print)
        12 probes in 1 pass over the images, whose sums take 1 MB
        >>> probe.at(5, "resid_post").project(torch.randn(1, 65, 96)).shape
        torch.Size([1, 65, 10])
    """
    vit = adapt(model)
    own, classes, width = _sizes(vit, num_classes)
    tokens = probe_tokens(vit.prefix_tokens, positions)
    plan = plan_probes(_places(vit, sites, blocks), tokens, width, classes, 1, memory_limit)
    log(str(plan))
    _again(batches, len(plan.passes))
    solved = []
    for probes in plan.passes:
        statistics = ProbeStatistics(len(probes), width, classes).to(vit.device)
        for recording, labels in _recordings(vit, batches, dict(probes)):
            for index, ((block, site), which) in enumerate(probes):
                hidden = recording[site][block]
                _check_positions(positions, hidden)
                statistics.update(index, own.normalise(hidden[:, which]), labels)
        solved += [statistics.solve(index, alpha=alpha) for index in range(len(probes))]
    heads = dict(stack_probes(list(chain(*plan.passes)), solved))
    return LinearProbe(vit.readout, heads, vit.prefix_tokens, positions)


def fit_logistic_probe(
    model: nn.Module,
    batches: Batches,
    *,
    sites: Sequence[str] = FITTED_SITES,
    blocks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    num_classes: int | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-2,
    penalty: float = 1e-4,
) -> LinearProbe:
    """Fit multinomial logistic probes by mini-batches over several passes.

    Features and probes are those of :func:`fit_linear_probe`. Adam starts at 0 and slows down
    linearly, so that the result depends on nothing but the batches and their order.

    Args:
        model: a supported Vision Transformer.
        batches: pairs of images and labels, read ``epochs`` times.
        sites: whose hidden states are probed.
        blocks: all by default.
        positions: a probe for each of these tokens; by default one for CLS and one for all image
            tokens.
        num_classes: C; by default the model's.
        epochs: passes over the batches.
        learning_rate: of the first pass.
        penalty: of the squared weights, beside the mean cross-entropy.

    Returns:
        the probe of every block and site.

    Raises:
        InputError: if the batches cannot be read often enough, or a position does not exist.
        UnsupportedModelError: if the model's classifier reads no features of single tokens.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> batch = (torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]))
        >>> probe = fit_logistic_probe(demo_vit(), [batch], blocks=[5], epochs=2)
        >>> probe.at(5, "attn_out").project(torch.randn(1, 65, 96)).shape
        torch.Size([1, 65, 10])
    """
    vit = adapt(model)
    own, classes, width = _sizes(vit, num_classes)
    _again(batches, epochs)
    tokens = probe_tokens(vit.prefix_tokens, positions)
    probes = list(product(_places(vit, sites, blocks), tokens))
    trainers = [LogisticTrainer(classes, width, learning_rate, penalty, vit.device) for _ in probes]
    for epoch in range(epochs):
        for recording, labels in _recordings(vit, batches, dict(probes)):
            for ((block, site), which), trainer in zip(probes, trainers, strict=True):
                hidden = recording[site][block]
                _check_positions(positions, hidden)
                features = own.normalise(hidden[:, which])
                trainer.slow_down(1.0 - epoch / epochs)
                trainer.step(features.flatten(0, 1), labels.repeat_interleave(features.shape[1]))
    heads = dict(stack_probes(probes, [trainer.head for trainer in trainers]))
    return LinearProbe(vit.readout, heads, vit.prefix_tokens, positions)


def fit_tuned_lens(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Sequence[str] = ("resid_post",),
    blocks: Sequence[int] | None = None,
    epochs: int = 5,
    learning_rate: float = 1e-3,
) -> TunedLens:
    """Fit a tuned lens: one affine translator for each block and site.

    What the class embedding reads of a translated token is drawn to what it reads of the same
    token after the last block, in KL divergence. No label is used. Adam starts at the translator
    that changes nothing, which is the class embedding itself, and slows down linearly.

    Args:
        model: a supported Vision Transformer with a classifier.
        batches: images, or sequences that begin with them (labels are passed over), read
            ``epochs`` times.
        sites: whose hidden states are translated.
        blocks: all by default.
        epochs: passes over the batches.
        learning_rate: of the first pass.

    Returns:
        the lens; after the last block it is the class embedding.

    Raises:
        InputError: if the batches cannot be read often enough.
        UnsupportedModelError: if the model has no classifier.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> lens = fit_tuned_lens(demo_vit(), [torch.rand(2, 3, 64, 64)], epochs=1)
        >>> lens.at(2, "resid_post").project(torch.randn(1, 65, 96)).shape
        torch.Size([1, 65, 10])
    """
    vit = adapt(model)
    own = vit.readout
    last = (len(vit.blocks) - 1, "resid_post")
    places = [place for place in _places(vit, sites, blocks) if place != last]
    _again(batches, epochs)
    trainers: dict[Place, TranslatorTrainer] = {}
    width = 0
    for epoch in range(epochs):
        pairs = _ImagesAlone(batches)
        for recording, _ in _recordings(vit, pairs, places, extra=["final"]):
            final = recording["final"][0]
            width = final.shape[-1]
            for block, site in places:
                hidden = recording[site][block]
                if (block, site) not in trainers:
                    trainers[block, site] = TranslatorTrainer(own, width, learning_rate, vit.device)
                trainer = trainers[block, site]
                trainer.slow_down(1.0 - epoch / epochs)
                trainer.step(hidden, final)
    translators = {place: trainer.translator for place, trainer in trainers.items()}
    return TunedLens(own, {**translators, last: Translator.identity(width, vit.device)})


class _ImagesAlone:
    """Batches of images as pairs of images and no labels."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for batch in self.batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            yield images, torch.empty(0)
