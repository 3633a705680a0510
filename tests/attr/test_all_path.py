"""AllPathImportance and its ledger: complete at every block, in closed form what autograd gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import reference
import timm
import torch
from cases import case
from families import CLASSES, FAMILIES, WITHOUT_LEDGER, images, randomise, tiny
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classemb import AllPathImportance, PatchImportance
from captum_classemb.attr import attribute_together
from captum_classemb.attr.baselines import CPLRP, LibraFullGrad
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import ClassEmbedding
from captum_classemb.vit import adapt

PIXELS, TARGET = images("cls"), torch.tensor([1, 4])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double().reshape(expected.shape) - expected).abs().max()) / float(
        expected.abs().max()
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "hugging face, eager"])
def test_the_closed_form_is_autograd_on_a_detached_copy(family: str) -> None:
    known = case(family)
    expected = reference.all_paths(known, known.target, "logit")
    method = AllPathImportance(known.vit, objective="logit")
    assert apart(method.attribute_patches(known.images, known.target), expected) <= 1e-10


@pytest.mark.parametrize("objective", ["logit", "log_probability", "both"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_LEDGER])
def test_every_block_adds_up_to_the_score(family: str, objective: Any) -> None:
    known = case(family)
    method = AllPathImportance(known.vit, objective=objective)
    ledger = method.ledger(known.images, known.target)
    size = ledger.entries.abs().sum((1, 2)) + ledger.bias.abs().amax(1)
    assert ledger.delta.shape == (2, 3)
    assert float((ledger.delta.abs() / size[:, None]).max()) <= 1e-12
    if objective != "both":
        z = known.oracle.logits.detach()
        assert torch.allclose(ledger.score, reference.score(z, known.target, objective))
    maps, delta = method.attribute(known.images, known.target, return_convergence_delta=True)
    assert torch.allclose(maps, method.attribute(known.images, known.target), rtol=1e-9)
    again = method.compute_convergence_delta(maps, None, known.images, known.target)
    assert torch.allclose(delta, ledger.delta.mean(1)) and float(again.abs().max()) <= 1e-9


@pytest.mark.parametrize("family", sorted(WITHOUT_LEDGER))
def test_a_readout_that_is_not_affine_has_a_map_and_no_ledger(family: str) -> None:
    method = AllPathImportance(case(family).vit)
    assert method.attribute(case(family).images, 1).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="not affine"):
        method.ledger(case(family).images, 1)


@pytest.mark.parametrize("family", ["cls", "mean, norm first", "attention pooling"])
def test_a_contrast_is_the_difference_of_two_logits(family: str) -> None:
    known, other = case(family), torch.tensor([6, 0])
    method = AllPathImportance(known.vit, objective="logit")
    both = [method.attribute_patches(known.images, c) for c in (known.target, other)]
    found = method.attribute_patches(known.images, known.target, contrast=other)
    assert apart(found, both[0] - both[1]) <= 1e-12
    ledger = method.ledger(known.images, known.target, contrast=other)
    z = known.oracle.logits
    rows = torch.arange(2)
    assert torch.allclose(ledger.score, (z[rows, known.target] - z[rows, other]).detach())
    assert float(ledger.delta.abs().max()) <= 1e-10


def test_blocks_of_baselines_are_those_of_all_paths() -> None:
    known = case("registers")
    every = AllPathImportance(known.vit, objective="logit").attribute_patches(known.images, 2)
    libra = LibraFullGrad(known.vit).attribute_patches(known.images, 2)
    assert torch.equal(libra, every)
    first = CPLRP(known.vit).attribute_patches(known.images, 2)
    assert torch.allclose(first, every[:, :1] * len(known.vit.blocks))


MLPS: dict[str, dict[str, Any]] = {
    "a sigmoid gate": {"mlp_layer": GluMlp, "act_layer": nn.Sigmoid},
    "a product of two layers": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "an activation in place": {"act_layer": lambda: nn.ReLU(inplace=True)},
    "a bounded activation": {"act_layer": nn.Tanh},
}


@pytest.mark.parametrize("mlp", MLPS)
def test_mlps_of_other_kinds_add_up(mlp: str) -> None:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7, **MLPS[mlp]
    )
    ledger = AllPathImportance(randomise(model).double().eval()).ledger(PIXELS, TARGET)
    assert float(ledger.delta.abs().max()) <= 1e-10


def test_an_activation_that_is_not_zero_at_zero_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="take PatchImportance"):
        AllPathImportance(tiny(act_layer=nn.Softplus))


def test_a_block_of_unknown_make_is_refused() -> None:
    vit = adapt(tiny())
    vit.blocks[1].mlps[0].hidden = None
    with pytest.raises(UnsupportedModelError, match="Mlp its adapter does not say"):
        AllPathImportance(vit)


def test_what_does_not_add_up_is_refused_at_the_call() -> None:
    """A layer that answers otherwise in one call alone, once the model's reading is verified."""
    model: Any = tiny().double()
    method, calls = AllPathImportance(model), [0]

    def steer(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + 0.05 * output.norm() * (calls[0] == 1)

    model.blocks[1].mlp.fc1.register_forward_hook(steer)
    plain = method.attribute(PIXELS, TARGET)
    calls[0] = 1
    with pytest.raises(UnsupportedModelError, match="sums over all paths of block 1"):
        method.attribute(PIXELS, TARGET)
    calls[0] = 0
    assert torch.equal(method.attribute(PIXELS, TARGET), plain)


def test_a_hook_that_runs_the_model_does_not_disturb() -> None:
    model: Any = tiny().double()
    expected = AllPathImportance(model).attribute(PIXELS, TARGET)
    inside = [False]

    def again(*_: Any) -> None:
        if not inside[0]:
            inside[0] = True
            model(torch.zeros_like(PIXELS))
            inside[0] = False

    model.blocks[2].register_forward_hook(again)
    assert torch.equal(AllPathImportance(model).attribute(PIXELS, TARGET), expected)


def test_more_classes_than_dimensions_are_followed_for_the_dimensions() -> None:
    model = tiny(num_classes=40).double()
    method = AllPathImportance(model)
    together = method.attribute_classes(PIXELS)
    for c in (0, 17, 39):
        alone = method.attribute_patches(PIXELS, c).sum((1, 2))
        assert apart(together[:, c], alone) <= 1e-10


def test_a_zero_shot_readout() -> None:
    vit = adapt(tiny(global_pool="map", class_token=False).double())
    text = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    readout = ClassEmbedding.from_text_features(vit.readout, text, 20.0, 0.5)
    ledger = AllPathImportance(vit, readout).ledger(PIXELS, [0, 4])
    assert float(ledger.delta.abs().max()) <= 1e-10


def test_one_pass_serves_both_importances() -> None:
    vit, passes = adapt(tiny().double()), []
    both: list[Any] = [PatchImportance(vit), AllPathImportance(vit)]
    alone = [method.attribute(PIXELS, TARGET) for method in both]
    vit.model.register_forward_hook(lambda *_: passes.append(1))
    attribute_together(both, PIXELS, TARGET)  # verified anew for the hook
    passes.clear()
    for expected, found in zip(alone, attribute_together(both, PIXELS, TARGET), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9)
    assert len(passes) == 1


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="'both', 'logit', 'log_probability'"):
        AllPathImportance(tiny(), objective="paper")  # type: ignore[arg-type]
    method = AllPathImportance(tiny())
    with pytest.raises(InputError, match="no baseline"):
        method.compute_convergence_delta(PIXELS, PIXELS, PIXELS, 1)


@pytest.mark.parametrize(("objective", "passes"), [("logit", 2.3), ("both", 3.2)])
def test_arithmetic_in_forward_passes(objective: Any, passes: float) -> None:
    """Matrix products of a model of ViT-B's proportions: 12 heads, 197 tokens."""
    model = tiny(img_size=224, patch_size=16, embed_dim=192, num_heads=3, mlp_ratio=4.0, depth=4)
    method, x = AllPathImportance(model, objective=objective), torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        sums = []
        for run in (
            model,
            partial(method.attribute, target=1),
            partial(method.attribute, target=1),
        ):
            run(x)
            sums.append(counted.get_total_flops())
    # The first call verifies how the model is read.
    assert sums[2] - sums[1] <= passes * sums[0]
    assert sums[2] - sums[1] > 1.5 * sums[0], "the products are counted"
