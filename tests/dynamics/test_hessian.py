"""Lanczos eigenvalues and Hutchinson traces against the dense Hessian of tiny models."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from captum_classemb.dynamics.hessian import (
    density,
    hessian_trace,
    negative_share,
    spectrum,
    top_eigenvalues,
)
from captum_classemb.errors import InputError, NonFiniteError


def dense_hessian(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w: Tensor) -> Tensor:
        parts = [c.view(s) for c, s in zip(w.split(sizes), shapes, strict=True)]
        return cross_entropy(
            functional_call(model, dict(zip(names, parts, strict=True)), (images,)), labels
        )

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


def tiny_mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def tiny_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2,
        mlp_ratio=1, num_classes=3,
    ).double().eval()  # fmt: skip


def tiny_cnn() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    nn.init.uniform_(model[1].running_mean)
    return model.double().eval()


def data(size: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, size, size).double(), torch.arange(batch) % 3


def by_magnitude(values: Tensor, count: int) -> Tensor:
    kept = values[values.abs().argsort(descending=True)[:count]]
    return kept.sort(descending=True).values


@pytest.mark.parametrize(("make", "size"), [(tiny_mlp, 2), (tiny_vit, 8), (tiny_cnn, 6)])
def test_top_eigenvalues_and_trace_equal_the_dense_hessian(make: object, size: int) -> None:
    model = make()  # type: ignore[operator]
    images, labels = data(size)
    dense = dense_hessian(model, images, labels)
    exact = torch.linalg.eigvalsh(dense)
    top = top_eigenvalues(model, images, labels, 4, tolerance=1e-8)
    torch.testing.assert_close(top, by_magnitude(exact, 4), rtol=1e-6, atol=1e-8)
    # The variance of Hutchinson's estimate is 2·Σ_{i≠j} H_ij².
    off = dense - dense.diagonal().diag()
    vectors = 64
    deviation = float((2 * off.square().sum() / vectors).sqrt())
    estimate = hessian_trace(model, images, labels, vectors=vectors)
    assert abs(estimate - float(exact.sum())) < 4 * deviation


def test_weight_decay_shifts_the_spectrum() -> None:
    model, (images, labels) = tiny_mlp(), data(2)
    plain = top_eigenvalues(model, images, labels, 3, tolerance=1e-8)
    decayed = top_eigenvalues(model, images, labels, 3, weight_decay=0.5, tolerance=1e-8)
    torch.testing.assert_close(decayed, plain + 0.5)
    size = sum(p.numel() for p in model.parameters())
    difference = hessian_trace(model, images, labels, weight_decay=0.5) - hessian_trace(
        model, images, labels
    )
    assert difference == pytest.approx(0.5 * size)


def test_gauss_newton_of_a_linear_model_is_its_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images, labels = data(2)
    exact = torch.linalg.eigvalsh(dense_hessian(model, images, labels))
    top = top_eigenvalues(model, images, labels, 4, curvature="ggn", tolerance=1e-8)
    torch.testing.assert_close(top, by_magnitude(exact, 4), rtol=1e-6, atol=1e-9)


def test_gauss_newton_is_the_product_of_jacobians() -> None:
    """Mean over images of Jᵀ (diag p − ppᵀ) J."""
    model, (images, labels) = tiny_vit(), data(8)
    names = [n for n, _ in model.named_parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        rows = torch.autograd.functional.jacobian(
            lambda *ps: functional_call(model, dict(zip(names, ps, strict=True)), (images,)),
            tuple(p.detach() for p in model.parameters()),
        )
    jacobian = torch.cat([row.flatten(2) for row in rows], 2)
    p = model(images).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    dense = torch.einsum("bcw,bcd,bdv->wv", jacobian, inner, jacobian) / len(images)
    top = top_eigenvalues(model, images, labels, 4, curvature="ggn", tolerance=1e-8)
    exact = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(top, by_magnitude(exact, 4), rtol=1e-6, atol=1e-8)


def test_gauss_newton_is_never_negative() -> None:
    model, (images, labels) = tiny_vit(), data(8)
    top = top_eigenvalues(model, images, labels, 5, curvature="ggn", tolerance=1e-6)
    assert bool((top > -1e-9).all())
    hessian = torch.linalg.eigvalsh(dense_hessian(model, images, labels))
    assert float(hessian.min()) < -1e-4


def test_model_is_left_as_it_was() -> None:
    model = tiny_vit().train()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    top_eigenvalues(model, *data(8), 1)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_spectrum_over_batches() -> None:
    model = tiny_mlp()
    batches = [data(2), data(2)]
    with torch.no_grad():
        summary = spectrum(model, batches, 3, vectors=4, tolerance=1e-8)
    assert summary.eigenvalues.shape == (2, 3) and summary.traces.shape == (2,)
    torch.testing.assert_close(
        summary.eigenvalues[1], top_eigenvalues(model, *batches[1], 3, tolerance=1e-8)
    )
    assert summary.negative == negative_share(summary.eigenvalues)


def test_density_integrates_to_one() -> None:
    values = torch.randn(40, 5)
    points = torch.linspace(-8, 8, 801)
    height = density(values, points)
    assert float(height.sum() * (points[1] - points[0])) == pytest.approx(1.0, abs=1e-3)
    assert float(points[height.argmax()]) == pytest.approx(0.0, abs=0.5)


def test_bad_input() -> None:
    model, (images, labels) = tiny_mlp(), data(2)
    with pytest.raises(InputError, match="eigenvalues can be asked for, not 0"):
        top_eigenvalues(model, images, labels, 0)
    with pytest.raises(InputError, match="6 images need as many labels"):
        top_eigenvalues(model, images, labels[:5])
    with pytest.raises(InputError, match="0–2"):
        top_eigenvalues(model, images, labels + 1)
    with pytest.raises(InputError, match='"hessian" or "ggn"'):
        top_eigenvalues(model, images, labels, curvature="fisher")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        top_eigenvalues(model, images * torch.inf, labels)
    with pytest.raises(InputError, match="two different eigenvalues"):
        density(torch.ones(5), torch.zeros(1))
    with pytest.raises(InputError, match="at least one batch"):
        spectrum(model, [])
