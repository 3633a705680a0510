"""Every measurement of the dynamics room for one model and its data, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_classemb.data.corrupted import SEVERITIES
from captum_classemb.dynamics.augmentation import augment
from captum_classemb.dynamics.cka import cka
from captum_classemb.dynamics.corruptions import SUBSET, corrupt
from captum_classemb.dynamics.depth import DepthMetrics
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.frequency_noise import FrequencyNoise
from captum_classemb.dynamics.hessian import spectrum
from captum_classemb.dynamics.landscape import LossLandscape
from captum_classemb.dynamics.lesion import LesionAccuracy, find_lesions
from captum_classemb.dynamics.robustness import Quality, Robustness
from captum_classemb.dynamics.trajectory import polar_trajectory
from captum_classemb.dynamics.variance import FeatureMapVariance

__all__ = ["Labelled", "augmented", "measure", "normalise"]

Labelled = tuple[Tensor, Tensor]
"""Images N×3×H×W in 0..1 and labels N."""

#: Images of each Hessian, Hessians of the final model and of each checkpoint looked at, of which
#: there are at most eight, points a side of the plane.
HESSIAN_BATCH, HESSIANS, PATH_HESSIANS, POINTS = 16, 6, 1, 13
SHIFT = 3


def normalise(images: Tensor) -> Tensor:
    """0..1 to −1..1."""
    return images * 2 - 1


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """As in training; digits are not mirrored."""
    return augment(images, generator, shift=SHIFT)


def measure(
    model: nn.Module,
    train: Labelled,
    test: Labelled,
    weight_decay: float,
    checkpoints: Sequence[Path] = (),
) -> dict[str, Any]:
    """All measurements.

    Args:
        model: in eval mode, on the device to measure on.
        train: whose loss is looked at, augmented, with L2.
        test: whose predictions and feature maps are looked at.
        weight_decay: λ of the loss's λ/2·‖w‖².
        checkpoints: of the training, from the initial weights to the model's own.
    """
    device = next(model.parameters()).device
    seen = train[0][:512], train[1][:512]
    loss_data = (augmented(seen[0], torch.Generator().manual_seed(1)), seen[1])
    few = (test[0][:400], test[1][:400])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_images": len(test[1]),
        "clean": _quality(model, test)._asdict(),
        "robustness": {
            name: [
                _quality(model, (corrupt(few[0], name, s), few[1]))
                for s in range(1, SEVERITIES + 1)
            ]
            for name in SUBSET
        },
        "hessian": _hessian(model, loss_data, weight_decay),
        **_depth(model, few),
        "landscape": _landscape(model, loss_data, weight_decay),
        "frequency_noise": _noise(model, few),
        "lesion": _lesion(model, few),
        "cka": cka(model, (x for x, _ in _batches(few, device)))[0],
        "trajectory": _trajectory(model, loss_data, test, weight_decay, checkpoints),
    }


def _batches(data: Labelled, device: torch.device, size: int = 100) -> Iterator[Labelled]:
    """Normalised images and labels, in order."""
    for images, labels in zip(data[0].split(size), data[1].split(size), strict=True):
        yield normalise(images).to(device), labels.to(device)


def _quality(model: nn.Module, data: Labelled) -> Quality:
    device = next(model.parameters()).device
    metric = Robustness().to(device)
    for x, y in _batches(data, device):
        metric.update(model, x, y)
    quality: Quality = metric.compute()
    return quality


def _hessian(model: nn.Module, data: Labelled, weight_decay: float) -> dict[str, Any]:
    device = next(model.parameters()).device
    start = perf_counter()
    batches = islice(_batches(data, device, HESSIAN_BATCH), HESSIANS)
    found = spectrum(model, batches, 5, weight_decay=weight_decay, vectors=4)
    return {
        "batch": HESSIAN_BATCH,
        "eigenvalues": found.eigenvalues,
        "traces": found.traces,
        "negative": found.negative,
        "seconds": perf_counter() - start,
    }


def _depth(model: nn.Module, data: Labelled) -> dict[str, Any]:
    device = next(model.parameters()).device
    makes: Mapping[str, Callable[[], Any]] = {
        "fourier": FourierAmplitude,
        "variance": lambda: FeatureMapVariance("paper"),
        "varying": FeatureMapVariance,
    }
    depth = DepthMetrics(model, makes).run(x for x, _ in _batches(data, device))
    return {
        "steps": [[s.kind, s.block] for s in depth.steps],
        "fourier": {
            "frequency": [m.frequencies for m in depth["fourier"]],
            "amplitude": depth.compute("fourier"),
        },
        "variance": depth.compute("variance"),
        "varying": depth.compute("varying"),
    }


def _landscape(model: nn.Module, data: Labelled, weight_decay: float) -> dict[str, Any]:
    device = next(model.parameters()).device
    plane = LossLandscape(model, points=POINTS, weight_decay=weight_decay).to(device)
    plane.update(*next(_batches(data, device, 64)))
    return {"axis": plane.axis, "loss": plane.compute()}


def _noise(model: nn.Module, data: Labelled) -> dict[str, Any]:
    device = next(model.parameters()).device
    noise = FrequencyNoise(bands=8, rms=0.35).to(device)
    for x, y in _batches(data, device):
        noise.update(model, x, y)
    return {"rms": noise.rms, "frequency": noise.centres, "accuracy": noise.compute()}


def _lesion(model: nn.Module, data: Labelled) -> dict[str, Any]:
    device = next(model.parameters()).device
    lesions = find_lesions(model, normalise(data[0][:1]).to(device))
    metric = LesionAccuracy(lesions).to(device)
    for x, y in _batches(data, device):
        metric.update(model, x, y)
    whole, *parts = metric.compute()
    found = [[le.kind, le.block, le.depth, a] for le, a in zip(lesions, parts, strict=True)]
    return {"whole": whole, "parts": found}


def _trajectory(
    model: nn.Module,
    data: Labelled,
    test: Labelled,
    weight_decay: float,
    files: Sequence[Path],
) -> dict[str, Any] | None:
    """The way through weight space; test accuracy and Hessian at each of its points."""
    if not files:
        return None
    device = next(model.parameters()).device
    path = polar_trajectory([lambda f=f: load_file(f) for f in files])
    last = {name: w.clone() for name, w in model.state_dict().items()}
    accuracy, largest, negative = [], [], []
    seen = range(0, len(files), -(-len(files) // 8))
    for file in (files[i] for i in seen):
        model.load_state_dict(load_file(file))
        accuracy.append(_quality(model, test).accuracy)
        batches = islice(_batches(data, device, HESSIAN_BATCH), PATH_HESSIANS)
        found = spectrum(model, batches, 5, weight_decay=weight_decay)
        largest.append(found.eigenvalues.amax(1).mean())
        negative.append(found.negative)
    model.load_state_dict(last)
    return {
        "radius": path.radius, "angle": path.angle, "seen": list(seen), "accuracy": accuracy,
        "largest_eigenvalue": largest, "negative": negative,
    }  # fmt: skip
