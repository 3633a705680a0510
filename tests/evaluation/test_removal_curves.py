"""Removal curves against image-by-image evaluation, and with maps whose quality is known."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import families
import numpy as np
import pytest
import torch
from drawn import small_timm
from masking import logits_without
from torch import Tensor, nn

from captum_classemb.edit import remove_tokens
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.evaluation import RemovalCurves
from captum_classemb.evaluation.removal_curves import removal_curves
from captum_classemb.evaluation.removal_order import outcomes, removal_order
from captum_classemb.functional.grid import spread, tile
from captum_classemb.vit import adapt


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    vit = small_timm(num_heads=3, num_classes=4, **options)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.double().eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    return images, scores, torch.tensor([0, 2, 1])


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False}])
def test_tokens_one_image_and_one_count_at_a_time(options: dict[str, Any]) -> None:
    vit = adapt(model(**options))
    images, scores, target = batch()
    curves = removal_curves(vit, images, scores, target, steps=5)
    assert curves.removed.tolist() == (
        [0, 3, 6, 10, 13, 16] if not options else [0, 3, 6, 9, 12, 15]
    )
    order = removal_order(scores)
    for b in range(3):
        for s, count in enumerate(curves.removed.tolist()):
            for o, keep in enumerate((order[b, count:], order[b, : 16 - count])):
                with torch.no_grad(), remove_tokens(vit, keep[None]):
                    expected = outcomes(vit(images[b : b + 1]), target[b : b + 1])
                assert torch.allclose(curves.values[b, o, s], expected[0].float(), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["eva, rotary and gated MLP", "beit", "relative positions, shared"]
)
def test_models_whose_attention_reads_positions(name: str) -> None:
    vit = adapt(families.build(name))
    images, scores, target = batch()
    curves = removal_curves(vit, images, scores, target, steps=3)
    order = removal_order(scores)
    for s, count in enumerate(curves.removed.tolist()):
        keep = torch.ones(3, 16, dtype=torch.bool).scatter_(1, order[:, :count], False)
        expected = outcomes(logits_without(vit.model, images, keep), target)
        assert torch.allclose(curves.values[:, 0, s], expected.float(), atol=1e-6)
    refused = adapt(families.build("cait"))
    with pytest.raises(UnsupportedModelError, match="class attention"):
        removal_curves(refused, images, scores, target, steps=3)


def test_painting_in_the_mean_colour() -> None:
    vit = adapt(model())
    images, scores, target = batch()
    curves = removal_curves(vit, images, scores, target, steps=4, perturbation="mean")
    gone = (
        tile(scores, (32, 32)) >= scores.flatten(1).sort(descending=True).values[:, 3, None, None]
    )
    painted = torch.where(gone[:, None], images.mean((2, 3), keepdim=True), images)
    with torch.no_grad():
        expected = outcomes(vit(painted), target).float()
    assert torch.allclose(curves.values[:, 1, 1], expected, atol=1e-6)
    with torch.no_grad():
        blank = outcomes(vit(images.mean((2, 3), keepdim=True).expand_as(images)), target)
    assert torch.allclose(curves.values[:, 0, -1], blank.float(), atol=1e-6)


def test_blurring_takes_details_away_and_keeps_flat_images() -> None:
    vit = adapt(model())
    _, scores, target = batch()
    flat = torch.full((3, 3, 32, 32), 0.7, dtype=torch.float64)
    values = removal_curves(vit, flat, scores, target, steps=4, perturbation="blur").values
    assert torch.allclose(values, values[:, :, :1].expand_as(values), atol=1e-5)
    images = batch()[0]
    values = removal_curves(vit, images, scores, target, steps=4, perturbation="blur").values
    assert (values[:, :, -1, 2] - values[:, :, 0, 2]).abs().min() > 1e-3


@pytest.mark.parametrize("perturbation", ["tokens", "mean", "blur"])
def test_both_orders_meet_at_both_ends(perturbation: Any) -> None:
    images, scores, target = batch()
    values = removal_curves(
        model(), images, scores, target, steps=3, perturbation=perturbation
    ).values
    assert torch.allclose(values[:, 0, 0], values[:, 1, 0])
    assert torch.allclose(values[:, 0, -1], values[:, 1, -1], atol=1e-6)
    reverse = removal_curves(
        model(), images, -scores, target, steps=3, perturbation=perturbation
    ).values
    assert torch.allclose(reverse, values.flip(1), atol=1e-6)


def test_an_oracle_is_near_the_top_its_reverse_near_the_bottom_and_chance_between() -> None:
    """A model that adds up known evidence of its patches: the evidence is the perfect map."""
    options = {"num_heads": 3, "num_classes": 2, "global_pool": "avg", "class_token": False}
    vit: Any = small_timm(depth=1, **options).double().eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    images, _, _ = batch()
    adapted = adapt(vit)
    with torch.no_grad():
        features = vit.patch_embed(images) + vit.pos_embed
        logits = adapted.readout.project(features)
    target = logits.mean(1).argmax(-1)
    evidence = (logits * (2 * nn.functional.one_hot(target, 2) - 1)[:, None]).sum(-1)
    evidence = evidence.unflatten(1, (4, 4))
    rng = torch.Generator().manual_seed(0)

    def gap(scores: Tensor) -> float:
        metric = RemovalCurves(steps=15)
        metric.update(vit, images, scores, target)
        return float(metric.compute()["probability/gap"])

    oracle = gap(evidence)
    chance = [gap(torch.randn(3, 4, 4, generator=rng)) for _ in range(20)]
    assert oracle > max(chance) and gap(-evidence) == pytest.approx(-oracle)
    assert abs(float(np.mean(chance))) < 0.2 * oracle


def test_the_metric_averages_curves_before_it_takes_areas() -> None:
    vit = model()
    images, scores, target = batch()
    metric = RemovalCurves(steps=16)
    metric.update(vit, images[:1], scores[:1], target[:1])
    metric.update(vit, images[1:], spread(scores[1:], (32, 32), 3), target[1:])
    curves = removal_curves(vit, images, scores, target, steps=16)
    assert torch.allclose(metric.curves().values, curves.values, atol=1e-6)
    accuracy = curves.values[..., 0].mean(0)
    expected = torch.trapezoid(accuracy.double(), dx=1 / 16, dim=-1).tolist()
    found = metric.compute()
    assert found["accuracy/negative"].item() == pytest.approx(expected[0])
    assert found["accuracy/gap"].item() == pytest.approx(expected[0] - expected[1])
    by_image = metric.images()["accuracy/gap"]
    each = torch.trapezoid(curves.values[..., 0].double(), dx=1 / 16, dim=-1)
    torch.testing.assert_close(by_image, each[:, 0] - each[:, 1], atol=1e-6, rtol=0)
    inner = curves.values[..., 1].double().mean(0)[0, 1:16]
    published = inner.sum() / (16 * inner.max())
    assert found["probability/paper_negative"].item() == pytest.approx(published.item())


def test_the_plot_shows_both_orders() -> None:
    images, scores, target = batch()
    metric = RemovalCurves(steps=8)
    metric.update(model(), images, scores, target)
    figure, axis = metric.plot(measure="probability")
    mean = metric.curves().values[..., 1].mean(0)
    lines = [line for line in axis.lines if line.get_label()[0] != "_"]
    for line, expected in zip(lines, mean, strict=True):
        assert line.get_ydata() == pytest.approx(expected.tolist(), abs=1e-6)
        assert line.get_xdata() == pytest.approx([i / 8 for i in range(9)])
    assert metric.plot(axis)[0] is figure
    with pytest.raises(InputError, match="accuracy, probability, logit"):
        metric.plot(measure="loss")


def test_the_metric_pickles_resets_and_leaves_the_model_alone() -> None:
    vit = model()
    before = copy.deepcopy(vit.state_dict())
    images, scores, target = batch()
    metric = RemovalCurves(steps=2, perturbation="mean")
    metric.update(vit, images, scores, target)
    again = pickle.loads(pickle.dumps(metric))
    assert again.compute() == metric.compute()
    assert not metric.state_dict()
    metric.reset()
    assert metric.values == []
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    assert not vit.training and not any(m._forward_pre_hooks for m in vit.modules())


def test_refusals_say_what_is_wrong() -> None:
    vit = model()
    images, scores, target = batch()
    with pytest.raises(InputError, match="4×4 patches"):
        removal_curves(vit, images, scores[:, :3], target)
    with pytest.raises(InputError, match="3 targets"):
        removal_curves(vit, images, scores, target[:2])
    with pytest.raises(InputError, match="'tokens', 'mean', 'blur'"):
        removal_curves(vit, images, scores, target, perturbation="zero")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="between 2 and 17"):
        removal_curves(vit, images, scores, target, steps=17)
