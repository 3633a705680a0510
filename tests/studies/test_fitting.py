"""Fitting over batches against scikit-learn on features gathered at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import CLASSES, build, images
from torch import Tensor

from captum_classemb import ClassEmbeddingGradient, ClassEmbeddingProjection
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.studies import fit_linear_probe, fit_logistic_probe, fit_tuned_lens
from captum_classemb.studies.token_reader import TokenReader
from captum_classemb.vit import ViT, adapt, record

linear_model = pytest.importorskip("sklearn.linear_model")

IMAGES = 12
PLACES = [(block, site) for block in range(3) for site in ("resid_post", "attn_out", "mlp_out")]


def vit(name: str = "cls") -> ViT:
    return adapt(build(name))


def data(name: str = "cls", size: int = 5) -> list[tuple[Tensor, Tensor]]:
    pixels = images(name, IMAGES)
    labels = torch.arange(IMAGES) % (CLASSES - 1)
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def gathered(model: ViT, site: str, block: int, name: str = "cls") -> Tensor:
    pixels = torch.cat([images for images, _ in data(name)])
    hidden = record(model, pixels, [site], blocks=[block])[site][block]
    return model.readout.normalise(hidden)  # type: ignore[operator, no-any-return]


def sklearn_ridge(features: Tensor) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Q tokens an image, B×Q×D."""
    labels = torch.cat([labels for _, labels in data()]).repeat_interleave(features.shape[1])
    targets = 2.0 * torch.nn.functional.one_hot(labels, CLASSES).double() - 1.0
    fitted = linear_model.Ridge(alpha=1.0).fit(features.flatten(0, 1).numpy(), targets.numpy())
    return fitted.coef_, fitted.intercept_


@pytest.mark.parametrize("name", ["cls", "registers", "mean, no cls"])
def test_ridge_in_one_pass_is_scikit_learns(name: str) -> None:
    model = vit(name)
    probe = fit_linear_probe(model, iter(data(name)))
    assert set(probe.places) == set(PLACES)
    prefix = model.prefix_tokens
    for block, site in ((0, "resid_post"), (2, "attn_out")):
        features = gathered(model, site, block, name)
        groups = [features[:, :1], features[:, prefix:]] if prefix else [features]
        heads = probe.heads[block, site]
        for kind, group in enumerate(groups):
            weight, bias = sklearn_ridge(group)
            np.testing.assert_allclose(heads.weight[kind].numpy(), weight, rtol=2e-4, atol=1e-6)
            np.testing.assert_allclose(heads.bias[kind].numpy(), bias, rtol=2e-4, atol=1e-6)


def test_neither_batches_nor_passes_change_a_probe() -> None:
    model, told = vit(), []
    whole = fit_linear_probe(model, data(size=IMAGES), alpha=0.5, log=told.append)
    parts = fit_linear_probe(model, data(size=1), alpha=0.5, memory_limit=20_000, log=told.append)
    assert told == [
        "18 probes in 1 pass over the images, whose sums take 0 MB",
        "18 probes in 6 passes over the images, whose sums take 0 MB",
    ]
    for place in PLACES:
        one, other = whole.heads[place], parts.heads[place]
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-6, atol=1e-7)


def test_a_probe_for_each_position() -> None:
    model = vit()
    probe = fit_linear_probe(model, data(), sites=["resid_post"], blocks=[-1], positions=[7, 0])
    assert probe.places == [(2, "resid_post")]
    features = gathered(model, "resid_post", 2)
    for place, position in enumerate([7, 0]):
        weight, bias = sklearn_ridge(features[:, position : position + 1])
        heads = probe.heads[2, "resid_post"]
        np.testing.assert_allclose(heads.weight[place].numpy(), weight, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(heads.bias[place].numpy(), bias, rtol=2e-4, atol=1e-6)


def test_logistic_is_scikit_learns() -> None:
    model = vit()
    probe = fit_logistic_probe(
        model, data(size=IMAGES), sites=["resid_post"], blocks=[2], num_classes=CLASSES - 1,
        epochs=400, learning_rate=0.05, penalty=0.1,
    )  # fmt: skip
    labels = torch.cat([labels for _, labels in data()]).numpy()
    features = gathered(model, "resid_post", 2)
    # scikit-learn sums the losses, and weighs their sum by C.
    for kind, tokens in enumerate((slice(0, 1), slice(1, None))):
        x = features[:, tokens].flatten(0, 1).numpy()
        y = labels.repeat(x.shape[0] // IMAGES)
        fitted = linear_model.LogisticRegression(C=1 / (0.1 * len(x)), tol=1e-8, max_iter=2000)
        fitted.fit(x, y)
        weight = probe.heads[2, "resid_post"].weight[kind].numpy()
        np.testing.assert_allclose(weight, fitted.coef_, atol=5e-3)


def test_logistic_in_mini_batches_comes_close() -> None:
    model, hard = vit(), {"sites": ["resid_post"], "blocks": [2], "penalty": 0.1}
    whole = fit_logistic_probe(model, data(size=IMAGES), epochs=100, learning_rate=0.05, **hard)
    parts = fit_logistic_probe(model, data(size=4), epochs=50, learning_rate=0.05, **hard)
    one, other = (p.heads[2, "resid_post"].weight.flatten() for p in (whole, parts))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def divergence(model: ViT, lens: object, block: int) -> float:
    """Mean KL of what is read of a block's tokens from what is read of them after the last."""
    pixels = torch.cat([images for images, _ in data()])
    recording = record(model, pixels, ["resid_post", "final"])
    wanted = model.readout.project(recording["final"][0]).log_softmax(-1)
    readout = lens.at(block, "resid_post")  # type: ignore[attr-defined]
    found = readout.project(recording["resid_post"][block]).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_a_tuned_lens_comes_closer_to_the_last_block() -> None:
    model = vit()
    lens = fit_tuned_lens(model, data(), epochs=30, learning_rate=0.02)
    for block in (0, 1):
        assert divergence(model, lens, block) < 0.5 * divergence(model, model.readout, block)
    assert divergence(model, lens, 2) == pytest.approx(0.0, abs=1e-12)


def test_fitted_readouts_stand_wherever_a_readout_is() -> None:
    model = vit()
    pixels, target = images("cls", 2), torch.tensor([1, 4])
    probe = fit_linear_probe(model, data())
    lens = fit_tuned_lens(model, data(), sites=["resid_post", "attn_out"], epochs=2)
    for readout in (probe, lens):
        hidden = record(model, pixels, ["resid_post"])["resid_post"][1]
        projection = ClassEmbeddingProjection(model, readout=readout, block=1)
        logits = readout.at(1, "resid_post").project(hidden, target)
        patches = projection.attribute_patches(pixels, target).flatten(1)
        torch.testing.assert_close(patches, logits[:, 1:])
        gradient = ClassEmbeddingGradient(model, readout=readout, objective="cross_entropy")
        maps = gradient.attribute_patches(pixels, target).sum((1, 2))
        classes = gradient.attribute_classes(pixels)
        torch.testing.assert_close(classes[torch.arange(2), target], maps)
        scores = TokenReader(readout.at(1, "resid_post")).scores(hidden, target)
        every = readout.at(1, "resid_post").project(hidden)
        torch.testing.assert_close(scores.target_logit, logits)
        assert torch.equal(scores.top[..., 0], every.argmax(-1))


def test_a_probe_of_enough_features_knows_the_images_it_was_fitted_on() -> None:
    model = vit()
    probe = fit_linear_probe(model, data(), sites=["resid_post"], alpha=1e-6)
    labels = torch.cat([labels for _, labels in data()])
    hidden = record(model, torch.cat([x for x, _ in data()]), ["resid_post"])["resid_post"]
    for block, tokens in enumerate(hidden):
        logits = probe.at(block, "resid_post")(tokens[:, :1])
        assert torch.equal(logits.argmax(-1), labels)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"positions": [17]}, "position 17 is out of range: an image has 17 tokens"),
        ({"blocks": [3]}, "block 3 is out of range"),
        ({"memory_limit": 1}, "18 passes over the batches are needed"),
    ],
)
def test_mistakes_are_one_sentence(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_linear_probe(vit(), iter(data()), **given)  # type: ignore[arg-type]


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="no batch of images"):
        fit_linear_probe(vit(), [])
    with pytest.raises(UnsupportedModelError, match="reads no single tokens"):
        fit_linear_probe(vit("attention pooling"), data("attention pooling"))


def test_models_are_left_as_they_were() -> None:
    model = build("cls")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_tuned_lens(model, data(), epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
