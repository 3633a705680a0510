"""What the page shows, as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from captum_classemb.explorer.quantise import Quantised

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class MethodMaps:
    """What one method says of the image.

    Args:
        key: its name on the command line.
        title: its name on the page.
        caption: what its scores are, in a few words.
        whole: what the map of all blocks is, as "all blocks, all heads".
        classes: the classes with a map, C'.
        maps: their maps over all blocks and heads, C'×h×w.
        parts: of the first K' classes in focus, K'×L×H'×h×w: first all heads of a block together,
            then, where the method has heads, each of them.
        totals: the sum of every part over the patches, K'×L×H'.
    """

    key: str
    title: str
    caption: str
    whole: str
    classes: Integers
    maps: Quantised
    parts: Quantised
    totals: Floats


@dataclass(frozen=True)
class LedgerEntries:
    """The exact split of the logit of every class in focus (K of them).

    Args:
        patches: attention entries by patch, summed over blocks and heads: K×(h·w).
        heads: attention entries of all patches, by block and head: K×L×H.
        prefix: those of the prefix tokens: K×L×H.
        mlp: K×L.
        embedding: K.
        bias: K.
        pool: what the MLP of an attention pool adds, K; 0 elsewhere.
        score: the model's own logit, K.
    """

    patches: Floats
    heads: Floats
    prefix: Floats
    mlp: Floats
    embedding: Floats
    bias: Floats
    pool: Floats
    score: Floats


@dataclass(frozen=True)
class Contents:
    """Everything on the page.

    Args:
        image: H×W×3, 8 bits: what the model saw.
        grid: h, w.
        title: of the image.
        model: its name.
        names: of the C classes, no two alike.
        probabilities: of the C classes.
        focus: the K classes with every detail: the targets, then the top classes.
        targets: how many of them were asked for.
        top_classes: the classes of highest probability at every token after every block, best
            first: L×N×5.
        top_probabilities: their probabilities, L×N×5.
        ranks: the number of other classes with a logit at least as high, for the classes in focus
            at every token after every block: K×L×N.
        prefix: the names of the prefix tokens, P.
        methods: in the order of the page.
        ledger: None where the readout has no exact one.
        colors: the diverging colours of maps, 257×3, 8 bits; the upper half is the sequential one.
        notes: further sentences at the foot of the page.
    """

    image: npt.NDArray[np.uint8]
    grid: tuple[int, int]
    title: str
    model: str
    names: Sequence[str]
    probabilities: Floats
    focus: Sequence[int]
    targets: int
    top_classes: Integers
    top_probabilities: Floats
    ranks: Integers
    prefix: Sequence[str]
    methods: Sequence[MethodMaps]
    ledger: LedgerEntries | None
    colors: npt.NDArray[np.uint8]
    notes: Sequence[str] = ()


def lighter(contents: Contents) -> Contents | None:
    """The same with less detail, or None if nothing more can be left out."""
    detailed = max(method.parts.levels.shape[0] for method in contents.methods)
    classes = max(len(method.classes) for method in contents.methods)
    if detailed > max(contents.targets, 1):
        detailed -= 1
    elif classes > len(contents.focus):
        classes = max(classes // 2, len(contents.focus))
    elif detailed > 1:
        detailed -= 1
    else:
        return None
    methods = [
        replace(
            method,
            classes=method.classes[:classes],
            maps=method.maps.first(classes),
            parts=method.parts.first(detailed),
            totals=method.totals[:detailed],
        )
        for method in contents.methods
    ]
    return replace(contents, methods=methods)
