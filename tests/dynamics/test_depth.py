"""Metrics by depth against the same metrics fed by hand; counting of obedient steps."""

from __future__ import annotations

import pytest
import timm
import torch

from captum_classemb.dynamics.depth import DepthMetrics, SignAgreement, sign_agreement
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.tracing.traced_steps import TracedStep, find_steps, record_steps
from captum_classemb.dynamics.variance import FeatureMapVariance
from captum_classemb.errors import InputError


def test_one_pass_feeds_all() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    batches = [torch.randn(4, 3, 64, 64), torch.randn(2, 3, 64, 64)]
    depth = DepthMetrics(model, {"fourier": FourierAmplitude, "variance": FeatureMapVariance})
    with pytest.raises(InputError, match="no batch of images"):
        depth.compute("fourier")
    depth.run(batches)
    steps = find_steps(model, batches[0])
    assert depth.steps == steps
    maps = record_steps(model, torch.cat(batches), steps)
    for i, x in enumerate(maps):
        by_hand = FourierAmplitude()
        by_hand.update(x)
        torch.testing.assert_close(
            depth.compute("fourier")[i], by_hand.compute(), atol=1e-4, rtol=1e-4
        )
        variance = FeatureMapVariance()
        variance.update(x)
        torch.testing.assert_close(depth.compute("variance")[i], variance.compute())
    assert not any("conv" in name for name, _ in depth.named_modules())


def test_sign_agreement() -> None:
    kinds = ("embedding", "attention", "mlp", "attention", "mlp")
    steps = [TracedStep(k, k, 0, "", "output") for k in kinds]  # type: ignore[arg-type]
    values = [3.0, 2.0, 2.5, 2.6, 2.0]
    assert sign_agreement(steps, values, "attention", rises=False) == SignAgreement(1, 2)
    assert sign_agreement(steps, values, "mlp", rises=True) == SignAgreement(1, 2)
    assert sign_agreement(steps, values, "convolution", rises=True) == SignAgreement(0, 0)
