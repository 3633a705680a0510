"""Infidelity, sensitivity and what is left of a map when the model's weights are shuffled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_classemb.evaluation.sanity import randomisation_check
from captum_classemb.functional.grid import patch_index, spread
from captum_classemb.vit import ViT, adapt

Build = Callable[[ViT], Callable[[Tensor, Tensor], Tensor]]

REMOVED = 0.25
"""Share of patches taken away for infidelity."""
SAMPLES = 10
"""Random sets of patches for infidelity."""
NEARBY = 5
"""Nearby images for sensitivity."""
RADIUS = 0.02
"""How far nearby images may be, in units of the normalised pixels."""


def axioms(build: Build, vit: ViT, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Infidelity (squared error of a probability), max-sensitivity and rank correlation, by image.

    Args:
        build: from an adapted model to the function that makes its maps B×h×w, float32, of images
            and targets.
        vit: an adapted model.
        images: B×3×H×W.
        target: B.

    Returns:
        B values for each name. Infidelity asks how well the summed scores of removed patches, on
        the best common scale, foretell what removing them (painting them in the image's mean
        colour) takes from the target's probability; ``"sensitivity"``, how far a map moves within a
        small ball around the image; and ``"randomised"`` is its rank correlation with the map of a
        shuffled model, 0 for a map that shows what the model has learnt.
    """
    make, generator = build(vit), torch.Generator().manual_seed(0)
    size = (images.shape[2], images.shape[3])
    index = patch_index(size, vit.grid(size), vit.patch_size).to(images.device)

    def probability(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = vit(x).softmax(-1)
        return found

    def remove(x: Any) -> tuple[Tensor, Tensor]:
        x = x[0] if isinstance(x, tuple) else x
        draw = torch.rand(len(x), int(index.max()) + 1, generator=generator)
        gone = (draw < REMOVED).to(x.device)
        pixels = gone[:, index][:, None].expand_as(x)
        painted = torch.where(pixels, x.mean((2, 3), keepdim=True), x)
        return pixels.to(x.dtype), painted

    scores = spread(make(images, target), size, images.shape[1], vit.patch_size)
    found = infidelity(
        probability,
        remove,
        images,
        scores,
        target=target,
        n_perturb_samples=SAMPLES,
        max_examples_per_batch=16,
        normalize=True,
    )

    def explain(x: Any, target: Tensor) -> tuple[Tensor]:
        x = x[0] if isinstance(x, tuple) else x
        with torch.enable_grad():
            return (make(x, target),)

    # Captum draws the nearby images from torch's own generator, which is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = torch.cat(
            [
                sensitivity_max(
                    explain, x, perturb_radius=RADIUS, n_perturb_samples=NEARBY, target=c
                )
                for x, c in zip(images.split(4), target.split(4), strict=True)
            ]
        )

    def maps(model: Any, x: Tensor, c: Tensor) -> Tensor:
        return build(adapt(model))(x, c)

    left = randomisation_check(maps, vit.model, images, target)
    return {"infidelity": found.detach(), "sensitivity": moved.detach(), "randomised": left}
