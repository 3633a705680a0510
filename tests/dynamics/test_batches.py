"""What people bring: loaders of images and labels, wrapped models and outputs, other losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamics.small_models import CLASSES, cnn, vit, whole
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from captum_classemb.dynamics import (
    DepthMetrics,
    FeatureMapVariance,
    FrequencyNoise,
    LesionAccuracy,
    LossLandscape,
    Robustness,
    find_lesions,
    find_steps,
    record_steps,
    top_eigenvalues,
)
from captum_classemb.dynamics.cka import cka
from captum_classemb.dynamics.hessian import hessian_trace, spectrum
from captum_classemb.errors import ClassEmbWarning, InputError

IMAGES, LABELS = whole()


def loader(size: int, kind: str = "pairs") -> Any:
    """Four images or so at a time: the last batch has two."""
    pairs = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=size)
    named = {
        "pairs": lambda x, y: (x, y),
        "lists": lambda x, y: [x, y],
        "triples": lambda x, y: (x, y, ["name"] * len(x)),
        "mappings": lambda x, y: {"pixel_values": x, "labels": y},
        "images": lambda x, y: x,
    }[kind]
    return [named(x, y) for x, y in pairs] if kind != "pairs" else pairs


class Wrapped(nn.Module):
    """A model whose logits lie within something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.wrap = vit(), wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.inner(images))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, "features"),
    "list": lambda x: [x],
    "mapping": lambda x: {"logits": x, "loss": None},
    "Hugging Face": lambda x: ImageClassifierOutput(logits=x),
}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return vit()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda wrap=wrap: Wrapped(wrap)) for name, wrap in WRAPS.items()},  # type: ignore[misc]
    "DataParallel": lambda: nn.DataParallel(plain()),
}


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Every measurement of a model on batches of five and five."""
    data = loader(5)
    lesions = find_lesions(model, IMAGES)
    depth = DepthMetrics(model, {"variance": FeatureMapVariance}).run(data)
    quality = Robustness().run(model, data).compute()
    return {
        "cka": cka(model, data)[0],
        "variance": torch.stack(depth.compute("variance")),
        "landscape": LossLandscape(model, points=3, extent=0.5).run(data).compute(),
        "eigenvalues": spectrum(model, [(IMAGES, LABELS)], 1, tolerance=1e-6).eigenvalues,
        "trace": torch.tensor(hessian_trace(model, IMAGES, LABELS, vectors=2)),
        "robustness": torch.stack(quality),
        "lesions": LesionAccuracy(lesions).run(model, data).compute(),
        "noise": FrequencyNoise(2).run(model, data).compute(),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return everything(plain())


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_models_give_the_numbers_of_the_model_within(
    name: str, expected: dict[str, Tensor]
) -> None:
    model = MODELS[name]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = everything(model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_model_of_hugging_face() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    found = everything(ViTForImageClassification(config).eval())
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("kind", ["pairs", "lists", "triples", "mappings", "images"])
@pytest.mark.parametrize("make", [vit, cnn])
def test_cka_takes_what_loaders_give(make: Callable[[], nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    model = make()
    torch.testing.assert_close(
        cka(model, loader(5, kind))[0], cka(model, IMAGES.split(5))[0], rtol=0, atol=0
    )


def test_a_short_last_batch_is_left_out_of_cka_alone() -> None:
    model = plain()
    with pytest.warns(ClassEmbWarning, match="A batch of 2 images is left out"):
        found = cka(model, loader(4))[0]
    assert torch.equal(found, cka(model, IMAGES[:8].split(4))[0])
    with pytest.raises(InputError, match="at least 4 images"):
        cka(model, loader(3))
    depth = DepthMetrics(model, {"variance": FeatureMapVariance}).run(loader(4))
    maps = record_steps(model, IMAGES, find_steps(model, IMAGES))
    for value, found in zip(depth.compute("variance"), maps, strict=True):
        metric = FeatureMapVariance()
        metric.update(found)
        torch.testing.assert_close(value, metric.compute())
    # Images count, not batches.
    whole_batch = Robustness().run(model, [(IMAGES, LABELS)]).compute()
    torch.testing.assert_close(
        torch.stack(Robustness().run(model, loader(4)).compute()), torch.stack(whole_batch)
    )
    landscape = LossLandscape(model, points=3).run(loader(4)).compute()
    whole_landscape = LossLandscape(model, points=3).run(loader(10)).compute()
    torch.testing.assert_close(landscape, whole_landscape, rtol=1e-5, atol=1e-5)


# -- Losses


class Linear(nn.Module):
    """One layer, whose Hessians are known."""

    def __init__(self, outputs: int, squeezed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3 * 4 * 4, outputs).double()
        self.squeezed = squeezed

    def forward(self, images: Tensor) -> Tensor:
        found = self.layer(images.flatten(1))
        return found[:, 0] if self.squeezed else found


SMALL = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WITH_ONE = torch.cat([SMALL.flatten(1), torch.ones(6, 1, dtype=torch.float64)], 1)
VALUES = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_regression_has_the_hessian_of_least_squares(curvature: Any) -> None:
    """2/n · XᵀX of the weights and the bias, whatever they are."""
    exact = torch.linalg.eigvalsh(2 / 6 * WITH_ONE.T @ WITH_ONE).flip(0)[:3]
    found = top_eigenvalues(
        Linear(1), SMALL, VALUES[:, None], 3,
        curvature=curvature, loss=nn.MSELoss(), tolerance=1e-9,
    )  # fmt: skip
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_one_logit_has_the_hessian_of_logistic_regression(curvature: Any) -> None:
    """1/n · Xᵀ diag(p(1 − p)) X."""
    model = Linear(1)
    p = model(SMALL).sigmoid().detach()
    exact = torch.linalg.eigvalsh(WITH_ONE.T @ (p * (1 - p) * WITH_ONE) / 6).flip(0)[:3]
    found = top_eigenvalues(
        model, SMALL, VALUES[:, None], 3,
        curvature=curvature, loss=nn.BCEWithLogitsLoss(), tolerance=1e-9,
    )  # fmt: skip
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("squeezed", [False, True])
def test_landscape_of_another_loss(squeezed: bool) -> None:
    model = Linear(1, squeezed)
    labels = VALUES if squeezed else VALUES[:, None]
    landscape = LossLandscape(model, points=3, loss=F.binary_cross_entropy_with_logits)
    landscape.update(SMALL[:4], labels[:4])
    landscape.update(SMALL[4:], labels[4:])
    found = landscape.compute()
    for i, j in ((0, 0), (1, 1), (2, 0)):
        weights = landscape.weights_at(float(landscape.axis[i]), float(landscape.axis[j]))
        logits = SMALL.flatten(1) @ weights["layer.weight"].T + weights["layer.bias"]
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], VALUES)
        torch.testing.assert_close(found[i, j], loss)


def one_logit(**options: Any) -> list[Callable[[], object]]:
    model, labels = Linear(1), torch.zeros(6, dtype=torch.long)
    return [
        lambda: top_eigenvalues(model, SMALL, labels, 1, **options),
        lambda: hessian_trace(model, SMALL, labels, **options),
        lambda: spectrum(model, [(SMALL, labels)], 1, **options),
        lambda: LossLandscape(model, points=3, **options).update(SMALL, labels),
    ]


@pytest.mark.parametrize("act", one_logit())
def test_one_logit_without_a_loss_is_refused(act: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="says nothing: give a loss="):
        act()


@pytest.mark.parametrize("act", one_logit(loss=F.binary_cross_entropy_with_logits))
def test_labels_that_a_loss_does_not_take_are_refused(act: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"loss= takes no output of shape \(6, 1\) with labels"):
        act()


@pytest.mark.parametrize("act", one_logit(loss=lambda output, labels: output))
def test_a_loss_of_several_numbers_is_refused(act: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="loss= has to give one number"):
        act()


def test_gauss_newton_takes_losses_it_knows() -> None:
    with pytest.raises(InputError, match="BCEWithLogitsLoss"):
        top_eigenvalues(
            Linear(1), SMALL, VALUES[:, None], 1, curvature="ggn", loss=F.mse_loss
        )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "model"), [(Robustness(), Linear(1)), (FrequencyNoise(1), Linear(1))]
)
def test_accuracy_of_one_logit_is_refused(metric: Any, model: nn.Module) -> None:
    with pytest.raises(InputError, match="one logit"):
        metric.update(model, SMALL, torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("batch", ["a word", {}, {"x": IMAGES}, (), None, ("a", "b"), 3])
def test_batches_without_images_are_refused(batch: Any) -> None:
    for act in (
        lambda: cka(plain(), [batch]),
        lambda: spectrum(plain(), [batch]),
        lambda: Robustness().run(plain(), [batch]),
        lambda: LossLandscape(plain(), points=2).run([batch]),
        lambda: DepthMetrics(plain(), {"variance": FeatureMapVariance}).run([batch]),
    ):
        with pytest.raises(InputError, match="A batch is a tensor of images"):
            act()


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), {"pixel_values": IMAGES}, (IMAGES, "names")])
def test_batches_without_labels_are_refused(batch: Any) -> None:
    for act in (
        lambda: spectrum(plain(), [batch]),
        lambda: Robustness().run(plain(), [batch]),
        lambda: LossLandscape(plain(), points=2).run([batch]),
    ):
        with pytest.raises(InputError, match="without labels"):
            act()


@pytest.mark.parametrize("output", ["a word", (), {"x": 1}, None])
def test_outputs_without_logits_are_refused(output: Any) -> None:
    class Odd(Wrapped):
        def forward(self, images: Tensor) -> Any:
            self.inner(images)
            return output

    with pytest.raises(InputError, match="Odd must put out a tensor"):
        Robustness().update(Odd(lambda x: x), IMAGES, LABELS)
