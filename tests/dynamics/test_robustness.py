"""Prediction quality against torchmetrics, corruptions against what they must do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from captum_classemb.dynamics.corruptions import SUBSET, corrupt
from captum_classemb.dynamics.robustness import Robustness
from captum_classemb.errors import InputError, NonFiniteError


def test_quality_equals_torchmetrics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images, labels = 3 * torch.randn(200, 3, 2, 2), torch.randint(0, 5, (200,))
    metric = Robustness()
    for i in range(0, 200, 64):
        metric.update(model, images[i : i + 64], labels[i : i + 64])
    quality = metric.compute()
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(quality.nll, cross_entropy(logits, labels))
    torch.testing.assert_close(quality.accuracy, (logits.argmax(1) == labels).float().mean())
    expected = multiclass_calibration_error(logits.softmax(1), labels, 5, n_bins=15)
    torch.testing.assert_close(quality.ece, expected, atol=1e-6, rtol=1e-5)


def test_bad_predictions() -> None:
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        Robustness().update(nn.Identity(), torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="0–2"):
        Robustness().update(nn.Identity(), torch.zeros(2, 3), torch.tensor([0, 3]))


@pytest.mark.parametrize("corruption", SUBSET)
def test_severity_grows(corruption: str) -> None:
    coarse = 0.2 + 0.6 * torch.rand(4, 3, 5, 5)
    images = nn.functional.interpolate(coarse, (48, 48), mode="bilinear")
    distance = [
        float((corrupt(images, corruption, s, seed=1) - images).square().mean())
        for s in range(1, 6)
    ]
    assert distance[0] > 0
    if corruption == "pixelate":
        # Cells that divide the image do less harm than slightly smaller ones that do not.
        distance = [distance[0], distance[2], distance[4]]
    assert all(a < b for a, b in zip(distance, distance[1:], strict=False))
    again = corrupt(images, corruption, 3, seed=1)
    assert torch.equal(again, corrupt(images, corruption, 3, seed=1))
    assert float(again.min()) >= 0 and float(again.max()) <= 1


def test_closed_forms_of_corruptions() -> None:
    images = 0.25 + 0.25 * torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(corrupt(images, "brightness", 1), images + 0.1)
    grey = corrupt(images, "contrast", 5)
    torch.testing.assert_close(grey.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(grey.std((2, 3)), 0.1 * images.std((2, 3)))
    noise = corrupt(torch.full((8, 3, 64, 64), 0.5), "gaussian_noise", 2) - 0.5
    assert float(noise.std()) == pytest.approx(0.08, rel=0.02)
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(corrupt(flat, "gaussian_blur", 3), flat)
    blocks = corrupt(torch.rand(1, 3, 20, 20), "pixelate", 2)
    torch.testing.assert_close(blocks[..., ::2, ::2], blocks[..., 1::2, 1::2])


def test_bad_corruptions() -> None:
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(InputError, match="No corruption 'fog' is made on the fly"):
        corrupt(images, "fog", 1)
    with pytest.raises(InputError, match="between 1 and 5, not 6"):
        corrupt(images, "contrast", 6)
    with pytest.raises(InputError, match="0..1"):
        corrupt(images - 1, "contrast", 1)
