"""Spectrum of the loss Hessian batch by batch (Park & Kim 2022, Figures 1c and 4).

The loss is the mean cross-entropy plus weight_decay/2·‖w‖², whose Hessian is weight_decay·I: the
L2 term shifts every eigenvalue by exactly that. Eigenvalues come from SciPy's Lanczos solver,
Gauss–Newton products from curvlinops, Hessian products from a double backward. Images are to be
augmented as in training: the paper's spectra are those of the training loss, not of the loss on
clean images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from captum_classemb.dynamics.inference import (
    Loss,
    finite_loss,
    labelled,
    mean_loss,
    output_of,
    twice_differentiable,
)
from captum_classemb.dynamics.tracing.feature_maps import without_wrapper
from captum_classemb.errors import InputError, MissingExtraError

Curvature = Literal["hessian", "ggn"]
Floats = NDArray[np.float64]


class _Outputs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return output_of(self.model, images)


def _product(
    model: nn.Module, images: Tensor, labels: Tensor, curvature: Curvature, loss: Loss | None
) -> Callable[[Tensor], Tensor]:
    """The product of a vector over all parameters with one batch's curvature."""
    if curvature not in ("hessian", "ggn"):
        raise InputError(f'curvature is "hessian" or "ggn", not {curvature!r}.')
    with torch.no_grad():
        output = output_of(model, images)
        finite_loss(output, "on this batch")
        finite_loss(mean_loss(output, labels, loss), "on this batch")
    if curvature == "hessian":
        return _hessian_product(model, images, labels, loss)
    if loss is None:
        loss, labels = nn.CrossEntropyLoss(), labels.long()
    if not isinstance(loss, (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)):
        raise InputError(
            'curvature="ggn" takes a loss= of torch.nn: CrossEntropyLoss(), MSELoss() or '
            "BCEWithLogitsLoss()."
        )
    try:
        from curvlinops import GGNLinearOperator
    except ImportError as error:
        raise MissingExtraError("curvlinops-for-pytorch", "dynamics") from error
    operator = GGNLinearOperator(
        _Outputs(model),
        loss,
        list(model.parameters()),
        [(images, labels)],
        # Eval mode makes the model deterministic; there is nothing to test.
        check_deterministic=False,
    )
    return lambda vector: operator @ vector


def _hessian_product(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None
) -> Callable[[Tensor], Tensor]:
    """Products by double backward through one graph, which is built once.

    curvlinops differentiates the gradient forwards instead. PyTorch lacks that derivative for
    some operations (SiLU) and, up to 2.15, has it wrong for the weight of a layer norm.
    """
    parameters = list(model.parameters())
    value = mean_loss(output_of(model, images), labels, loss)
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def product(vector: Tensor) -> Tensor:
        rows = torch.autograd.grad(
            gradient, parameters, vector, retain_graph=True, materialize_grads=True
        )
        return torch.cat([row.flatten() for row in rows])

    return product


def top_eigenvalues(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    count: int = 5,
    *,
    curvature: Curvature = "hessian",
    loss: Loss | None = None,
    weight_decay: float = 0.0,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """The eigenvalues of largest magnitude of one batch's loss.

    Args:
        model: any classifier; used in eval mode and left as it was.
        images: B×3×H×W, augmented as in training.
        labels: B.
        count: how many.
        curvature: the Hessian, or the Gauss–Newton matrix, which is never negative.
        loss: the mean loss of a batch from (output, labels): binary cross-entropy, a regression's,
            ...; cross-entropy by default. A model with one logit needs one.
        weight_decay: λ of the loss's λ/2·‖w‖².
        tolerance: relative accuracy of the eigenvalues.
        seed: of the Lanczos start vector.

    Returns:
        ``count`` eigenvalues, largest first, float64.

    Raises:
        MissingExtraError: curvlinops or SciPy is missing.
        InputError: the model has one logit and no loss is given.
        NonFiniteError: the loss is not finite.
    """
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise MissingExtraError("scipy", "dynamics") from error
    model = without_wrapper(model)
    size = sum(p.numel() for p in model.parameters())
    if not 1 <= count < size:
        raise InputError(f"Between 1 and {size - 1} eigenvalues can be asked for, not {count}.")
    like = next(model.parameters())
    with twice_differentiable(model):
        product = _product(model, images, labels, curvature, loss)

        def multiply(vector: Floats) -> Floats:
            on_device = torch.from_numpy(vector.reshape(-1)).to(like)
            found: Floats = product(on_device).detach().cpu().double().numpy()
            return found

        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(size)
        values = eigsh(
            operator, k=count, which="LM", tol=tolerance, v0=start, return_eigenvectors=False
        )
    return torch.from_numpy(np.sort(values)[::-1].copy()) + weight_decay


def hessian_trace(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    curvature: Curvature = "hessian",
    loss: Loss | None = None,
    weight_decay: float = 0.0,
    vectors: int = 16,
    seed: int = 0,
) -> float:
    """Hutchinson's estimate of the trace of one batch's loss Hessian.

    Args:
        model: any classifier.
        images: B×3×H×W.
        labels: B.
        curvature: the Hessian or the Gauss–Newton matrix.
        loss: as for :func:`top_eigenvalues`.
        weight_decay: λ of the loss's λ/2·‖w‖².
        vectors: number of random sign vectors; the variance falls as one over it.
        seed: of these vectors.
    """
    model = without_wrapper(model)
    size = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    with twice_differentiable(model):
        product = _product(model, images, labels, curvature, loss)
        total = 0.0
        for _ in range(vectors):
            sign = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
            sign = sign.to(like)
            total += float(sign @ product(sign).detach())
    return total / vectors + weight_decay * size


class HessianSpectrum(Metric):
    """Top eigenvalues and trace of every batch's loss Hessian, gathered over batches.

    ``update(model, images, labels)`` takes one batch; ``compute()`` gives a
    :class:`SpectrumSummary`, batches in the order of their ``number`` (by default, of their turn),
    whichever process took them. The keyword arguments are those of :func:`top_eigenvalues` and
    :func:`trace`; ``vectors=0`` leaves the trace out.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    eigenvalues: list[Tensor]
    traces: list[Tensor]
    numbers: list[Tensor]

    def __init__(
        self,
        count: int = 5,
        *,
        curvature: Curvature = "hessian",
        loss: Loss | None = None,
        weight_decay: float = 0.0,
        tolerance: float = 1e-3,
        vectors: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.count, self.curvature, self.weight_decay = count, curvature, weight_decay
        self.loss = [loss]
        self.tolerance, self.vectors, self.seed = tolerance, vectors, seed
        for name in ("eigenvalues", "traces", "numbers"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @torch.enable_grad()
    def update(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, number: int | None = None
    ) -> None:
        """Add the spectrum of one batch."""
        shared: dict[str, Any] = {
            "curvature": self.curvature,
            "loss": self.loss[0],
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }
        values = top_eigenvalues(
            model, images, labels, self.count, tolerance=self.tolerance, **shared
        )
        turn = len(self.eigenvalues) if number is None else number
        self.eigenvalues.append(values[None])
        self.numbers.append(torch.tensor([turn]))
        if self.vectors:
            value = hessian_trace(model, images, labels, vectors=self.vectors, **shared)
            self.traces.append(torch.tensor([value], dtype=torch.float64))

    def compute(self) -> SpectrumSummary:
        """Eigenvalues of all batches, their traces, the share of negative ones."""
        order = dim_zero_cat(self.numbers).argsort(stable=True)
        values = dim_zero_cat(self.eigenvalues)[order]
        traces = torch.empty(0, dtype=torch.float64)
        if self.vectors:
            traces = dim_zero_cat(self.traces)[order]
        return SpectrumSummary(values, traces, negative_share(values))


class SpectrumSummary(NamedTuple):
    """Eigenvalues batches×k (largest first), traces by batch (or none), share of negative ones."""

    eigenvalues: Tensor
    traces: Tensor
    negative: float


def negative_share(eigenvalues: Tensor) -> float:
    """Share of eigenvalues under zero.

    Examples:
        >>> negative_share(torch.tensor([2.0, 1.0, -1.0, 3.0]))
        0.25
    """
    return float((eigenvalues < 0).double().mean())


def density(eigenvalues: Tensor, points: Tensor) -> Tensor:
    """Density of eigenvalues over batches: a Gaussian kernel estimate of half Scott's bandwidth.

    A few batches have much larger eigenvalues than the rest, which would smooth all away.

    Args:
        eigenvalues: any shape, at least two different values.
        points: where to evaluate.

    Returns:
        The density at ``points``, float64.
    """
    try:
        from scipy.stats import gaussian_kde
    except ImportError as error:
        raise MissingExtraError("scipy", "dynamics") from error
    values = eigenvalues.flatten().double().cpu().numpy()
    if np.unique(values).size < 2:
        raise InputError(
            f"A density needs at least two different eigenvalues, but {values.size} of "
            f"{np.unique(values).size} distinct values were given."
        )
    estimate = gaussian_kde(values, bw_method=lambda kernel: kernel.scotts_factor() / 2)
    return torch.from_numpy(estimate(points.double().cpu().numpy()))


def spectrum(model: nn.Module, batches: Any, count: int = 5, **kwargs: Any) -> SpectrumSummary:
    """:class:`HessianSpectrum` over an iterable of (images, labels)."""
    metric = HessianSpectrum(count, **kwargs)
    for images, labels in labelled(batches, model):
        metric.update(model, images, labels)
    if not metric.eigenvalues:
        raise InputError("A Hessian spectrum needs at least one batch, but none was given.")
    summary: SpectrumSummary = metric.compute()
    return summary
