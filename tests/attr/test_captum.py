"""Whatever Captum's own code asks of an attribution method, asked of every method of ours."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    DataLoaderAttribution,
    FeatureAblation,
    LayerAttribution,
    NoiseTunnel,
    ShapleyValueSampling,
)
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from families import build, images, tiny
from methods import BLIND_TO_THE_TARGET, LAYER_METHODS, METHODS, PIXEL_METHODS
from target_forms import ONE_EACH, ONE_FOR_ALL
from torch import Tensor

from captum_classemb import AllPathImportance, MemoryPatchImportance
from captum_classemb.attr import PatchAttribution
from captum_classemb.errors import TargetError
from captum_classemb.vit import adapt

TARGET = torch.tensor([2, 0, 6])


def model() -> Any:
    return tiny().double()


def pixels(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64)


def same(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-9 * scale


def test_every_public_method_is_listed() -> None:
    listed = {type(make(model())) for make in METHODS.values()}
    for name in ("captum_classemb", "captum_classemb.attr", "captum_classemb.attr.baselines"):
        module = importlib.import_module(name)
        for public in module.__all__:
            found = getattr(module, public)
            if not inspect.isclass(found) or found is PatchAttribution:
                continue
            if issubclass(found, Attribution):
                assert found in listed, f"{public} is missing in tests/methods.py"


@pytest.mark.parametrize("name", METHODS)
class TestConformance:
    """One instance of every method, on three images of a small model."""

    @pytest.fixture
    def method(self, name: str) -> Any:
        return METHODS[name](model())

    def test_it_is_an_attribution(self, name: str, method: Any) -> None:
        assert isinstance(method, Attribution)
        assert isinstance(method, LayerAttribution) == (name in LAYER_METHODS)
        assert type(method).get_name().replace(" ", "") == type(method).__name__
        assert method.multiplies_by_inputs is False
        complete = (AllPathImportance, MemoryPatchImportance)
        assert method.has_convergence_delta() is isinstance(method, complete)
        assert callable(type(method).attribute.__wrapped__), "NoiseTunnel and TCAV call it"
        with torch.no_grad():
            assert method.forward_func(pixels()).shape == (3, 7)

    def test_parameters_are_captums(self, name: str, method: Any) -> None:
        names = list(inspect.signature(method.attribute).parameters)
        assert names[:3] == ["inputs", "target", "additional_forward_args"]
        assert ("attribute_to_layer_input" in names) == (name in LAYER_METHODS)

    def test_shape_and_state_of_the_result(self, name: str, method: Any) -> None:
        maps = method.attribute(pixels(), TARGET)
        if name in PIXEL_METHODS:
            assert maps.shape == (3, 3, 32, 32)
        else:
            assert maps.shape[:2] == (3, 17)
        assert maps.is_contiguous() and not maps.requires_grad and torch.isfinite(maps).all()
        assert float(maps.abs().max()) > 0.0

    def test_images_do_not_see_each_other(self, name: str, method: Any) -> None:
        together = method.attribute(pixels(), TARGET)
        for i in range(3):
            assert same(method.attribute(pixels()[i : i + 1], int(TARGET[i]))[0], together[i])

    def test_the_target_matters(self, name: str, method: Any) -> None:
        one, other = method.attribute(pixels(), 1), method.attribute(pixels(), 4)
        assert torch.equal(one, other) == (name in BLIND_TO_THE_TARGET)

    def test_every_form_of_target(self, name: str, method: Any) -> None:
        for expected, forms in ((3, ONE_FOR_ALL), (TARGET, ONE_EACH)):
            plain = method.attribute(pixels(), expected)
            for form, target in forms.items():
                assert torch.equal(method.attribute(pixels(), target=target), plain), form
        for wrong in (None, 7, -1, [0, 1], "cat"):
            with pytest.raises(TargetError):
                method.attribute(pixels(), wrong)

    def test_one_class_needs_no_target(self, name: str) -> None:
        single = METHODS[name](tiny(num_classes=1).double())
        assert same(single.attribute(pixels()), single.attribute(pixels(), 0))

    def test_a_tuple_of_one(self, name: str, method: Any) -> None:
        plain = method.attribute(pixels(), TARGET)
        tupled = method.attribute((pixels(),), TARGET)
        assert isinstance(tupled, tuple) and len(tupled) == 1
        assert torch.equal(tupled[0], plain)

    def test_further_arguments_reach_the_model(self, name: str, method: Any) -> None:
        plain = method.attribute(pixels(), TARGET)
        nothing = method.attribute(pixels(), TARGET, additional_forward_args=(None, False))
        assert torch.equal(nothing, plain)
        seen: list[Any] = []
        inner = method.vit.model

        def remember(_: Any, args: Any) -> None:
            seen.append(args[1:])

        handle = inner.register_forward_pre_hook(remember)
        method.attribute(pixels(), TARGET, additional_forward_args=(None, False))
        handle.remove()
        assert seen and all(args == (None, False) for args in seen)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_gradient_modes(self, name: str, method: Any, mode: Any) -> None:
        plain = method.attribute(pixels(), TARGET)
        with mode():
            maps = method.attribute(pixels(), TARGET)
        assert same(maps.clone(), plain)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    @pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
    def test_noise_tunnel(self, name: str, method: Any, kind: str) -> None:
        torch.manual_seed(5)
        maps = NoiseTunnel(method).attribute(
            pixels(), nt_type=kind, nt_samples=3, stdevs=0.1, target=TARGET
        )
        torch.manual_seed(5)
        noise = torch.normal(0, torch.full((9, 3, 32, 32), 0.1))
        noisy = pixels().repeat_interleave(3, 0) + noise
        each = method.attribute(noisy, TARGET.repeat_interleave(3)).unflatten(0, (3, 3))
        expected = {
            "smoothgrad": each.mean(1),
            "smoothgrad_sq": each.square().mean(1),
            "vargrad": each.var(1, unbiased=False),
        }[kind]
        scale = float(each.abs().max()) ** (1 if kind == "smoothgrad" else 2)
        assert float((maps - expected).abs().max()) <= 1e-9 * scale

    def test_noise_tunnel_in_batches(self, name: str, method: Any) -> None:
        plain = method.attribute(pixels(), TARGET)
        tunnel = NoiseTunnel(method)
        options: dict[str, Any] = {"nt_samples": 5, "nt_samples_batch_size": 2, "stdevs": 0.0}
        for target in (TARGET, TARGET.tolist(), [(int(c),) for c in TARGET]):
            assert same(tunnel.attribute(pixels(), target=target, **options), plain)
        one = method.attribute(pixels(), 4)
        for target in (4, np.int64(4), (4,), torch.tensor(4), torch.tensor([4])):
            assert same(tunnel.attribute(pixels(), target=target, **options), one)
        (tupled,) = tunnel.attribute((pixels(),), target=TARGET, **options)
        assert same(tupled, plain)
        further = {"additional_forward_args": (None, False), **options}
        assert same(tunnel.attribute(pixels(), target=TARGET, **further), plain)

    def test_sensitivity(self, name: str, method: Any) -> None:
        shift = torch.full((3, 32, 32), 0.02, dtype=torch.float64)

        def nudged(inputs: Any) -> Any:
            (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
            return (x + shift,)

        options: dict[str, Any] = {"perturb_func": nudged, "target": TARGET}
        plain, moved = (method.attribute(x, TARGET) for x in (pixels(), pixels() + shift))
        expected = (moved - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        for further in ({"n_perturb_samples": 2}, {"max_examples_per_batch": 3}):
            found = sensitivity_max(method.attribute, pixels(), **options, **further)
            assert torch.allclose(found, expected, rtol=1e-6)
        tunnel = NoiseTunnel(method)
        found = sensitivity_max(
            tunnel.attribute, pixels(), **options, n_perturb_samples=1, nt_samples=2, stdevs=0.0
        )
        assert torch.allclose(found, expected, rtol=1e-6)

    def test_ablation_of_what_a_method_says(self, name: str, method: Any) -> None:
        """A method is itself a function of the image, whose features Captum can take away."""

        def total(x: Tensor) -> Tensor:
            scores: Tensor = method.attribute(x, target=4).flatten(1).abs().sum(1)
            return scores

        x, mask = pixels(2), method.vit.feature_mask((32, 32))
        ablation = FeatureAblation(total).attribute(
            x, feature_mask=mask, perturbations_per_eval=8, baselines=0.3
        )
        without = torch.where(mask == 5, 0.3, x)
        assert torch.allclose(ablation[..., 9, 9].sum(1), 3 * (total(x) - total(without)))

    def test_a_data_loader_attribution_is_closed_to_other_libraries(
        self, name: str, method: Any
    ) -> None:
        with pytest.raises(AssertionError, match="does not support"):
            DataLoaderAttribution(method)

    def test_copies_work(self, name: str, method: Any) -> None:
        plain = method.attribute(pixels(), TARGET)
        assert torch.equal(copy.copy(method).attribute(pixels(), TARGET), plain)
        assert torch.equal(copy.deepcopy(method).attribute(pixels(), TARGET), plain)
        sent = pickle.loads(pickle.dumps(method))
        assert torch.equal(sent.attribute(pixels(), TARGET), plain)

    def test_bfloat16_inside_a_noise_tunnel(self, name: str) -> None:
        """NoiseTunnel adds float32 noise, which must not reach a half-precision model."""
        half = METHODS[name](model().bfloat16())
        x = pixels().bfloat16()
        plain = half.attribute(x, TARGET)
        maps = NoiseTunnel(half).attribute(x, nt_samples=3, stdevs=0.0, target=TARGET)
        # A backward pass in bfloat16 is rounded otherwise in a batch of another size.
        assert float((maps - plain).abs().max()) <= 0.02 * float(plain.abs().max())


@pytest.mark.parametrize("name", PIXEL_METHODS)
class TestPixels:
    """Consumers that take attributions of the shape of the images."""

    def test_infidelity(self, name: str) -> None:
        network = model()
        maps = PIXEL_METHODS[name](network).attribute(pixels(), TARGET)
        change = 0.1 * torch.randn(3, 3, 32, 32, dtype=torch.float64)
        found = infidelity(
            network,
            lambda x: (change.repeat(len(x) // 3, 1, 1, 1), x - change),
            pixels(),
            maps,
            target=TARGET,
            n_perturb_samples=1,
        )
        with torch.no_grad():
            fall = network(pixels()) - network(pixels() - change)
        fall = fall.gather(1, TARGET[:, None])[:, 0]
        expected = ((change * maps).flatten(1).sum(1) - fall) ** 2
        assert torch.allclose(found, expected, rtol=1e-8)

    def test_visualisation(self, name: str) -> None:
        maps = PIXEL_METHODS[name](model()).attribute(pixels(1), 2)
        shown = maps[0].permute(1, 2, 0).numpy()
        image = pixels(1)[0].sigmoid().permute(1, 2, 0).numpy()
        figure, _ = viz.visualize_image_attr(shown, image, "heat_map", "all", use_pyplot=False)
        assert figure.axes
        figure, axes = viz.visualize_image_attr_multiple(
            shown,
            image,
            ["original_image", "blended_heat_map"],
            ["all", "absolute_value"],
            use_pyplot=False,
        )
        assert len(axes) == 2
        plt.close("all")


# -- Features that are patches


@pytest.mark.parametrize("name", ["cls", "non-square", "padded", "hugging face, sdpa"])
def test_ablation_of_patches(name: str) -> None:
    """The model's patch grid as Captum's ``feature_mask``: one score a patch, by brute force."""
    network, x = build(name), images(name)
    vit = adapt(network)
    size = (x.shape[2], x.shape[3])
    mask = vit.feature_mask(size)
    h, w = vit.grid(size)
    assert mask.shape == (1, 1, *size) and mask.unique().numel() == h * w
    scores = FeatureAblation(vit).attribute(x, target=3, feature_mask=mask)
    with torch.no_grad():
        full = vit(x)[:, 3]
        for patch in (0, w - 1, h * w - 1):
            fall = full - vit(torch.where(mask == patch, 0.0, x))[:, 3]
            own = scores[:, :, mask[0, 0] == patch]
            assert torch.allclose(own, fall[:, None, None].expand_as(own), rtol=1e-6)


def test_shapley_values_of_patches_add_up() -> None:
    vit, x = adapt(tiny()), pixels(1).float()
    mask = vit.feature_mask((32, 32))
    torch.manual_seed(0)
    scores = ShapleyValueSampling(vit).attribute(x, target=1, feature_mask=mask, n_samples=2)
    each = torch.stack([scores[0, 0][mask[0, 0] == patch][0] for patch in range(16)])
    with torch.no_grad():
        total = vit(x)[0, 1] - vit(torch.zeros_like(x))[0, 1]
    assert torch.allclose(each.sum(), total, rtol=1e-4)


# -- Completeness and concepts


@pytest.mark.parametrize("kind", [AllPathImportance, MemoryPatchImportance])
def test_the_convergence_delta_passes_through_a_noise_tunnel(kind: Any) -> None:
    method = kind(model())
    maps, delta = NoiseTunnel(method).attribute(
        pixels(), nt_samples=2, stdevs=0.1, target=TARGET, return_convergence_delta=True
    )
    assert maps.shape == (3, 3, 32, 32) and delta.shape == (6,)
    assert float(delta.abs().max()) < 1e-10


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_the_call_that_concept_methods_make(name: str) -> None:
    """Captum's TCAV assigns ``layer`` and calls the function under the logging wrapper."""
    network = model()
    method, other = LAYER_METHODS[name](network), LAYER_METHODS[name](network)
    expected = method.attribute(pixels(), TARGET)
    other.layer, layer = None, method.layer
    other.layer = layer
    maps = other.attribute.__wrapped__(
        other,
        (pixels(),),
        target=TARGET,
        additional_forward_args=None,
        attribute_to_layer_input=False,
    )
    assert torch.equal(maps[0], expected)
