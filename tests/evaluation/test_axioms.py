"""Axioms and cost of maps whose values are known."""

from __future__ import annotations

import pytest
import torch
from families import build, images
from torch import Tensor

from captum_classemb.evaluation.axioms import axioms
from captum_classemb.evaluation.cost import map_cost
from captum_classemb.vit import ViT, adapt

TARGET = torch.tensor([2, 5])


def test_a_map_that_never_moves() -> None:
    """A constant map: nothing near it differs, and shuffled weights leave all of it."""
    vit, pixels = adapt(build("cls").float()), images("cls").float()
    fixed = torch.arange(16.0).view(4, 4)

    def constant(model: ViT):  # type: ignore[no-untyped-def]
        return lambda x, target: fixed.expand(len(x), -1, -1)

    state = torch.random.get_rng_state()
    found = axioms(constant, vit, pixels, TARGET)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found["sensitivity"].tolist() == [0.0, 0.0]
    assert found["randomised"].tolist() == pytest.approx([1.0, 1.0])
    assert (found["infidelity"] >= 0).all()
    again = axioms(constant, vit, pixels, TARGET)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_infidelity_of_what_removal_takes() -> None:
    """Scores whose sums are what painting patches takes have none; others have some."""
    pixels = images("cls").float()

    def linear(x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))[:, None] / 400

    class Linear(torch.nn.Module):
        grid, patch_size, model = staticmethod(lambda size: (4, 4)), (8, 8), None

        def forward(self, x: Tensor) -> Tensor:
            # The log of a probability that falls as pixels do: softmax gives it back.
            p = 0.5 + linear(x)
            return torch.cat([p.log(), (1 - p).log()], 1)

    model = Linear()
    exact = (pixels - pixels.mean((2, 3), keepdim=True)).unfold(2, 8, 8).unfold(3, 8, 8)
    exact = exact.sum((1, 4, 5))
    shuffled = exact.flatten(1)[:, torch.randperm(16)].view_as(exact)
    for maps, best in ((exact, True), (shuffled, False)):
        import captum_classemb.evaluation.axioms as module

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "randomisation_check", lambda *_: torch.zeros(2))
            found = axioms(
                lambda _, maps=maps: lambda x, c: maps.repeat_interleave(len(x) // 2, 0),  # type: ignore[misc]
                model,  # type: ignore[arg-type]
                pixels,
                torch.tensor([0, 0]),
            )
        assert bool((found["infidelity"] < 1e-9).all()) == best


def test_passes_are_counted() -> None:
    vit, pixels = adapt(build("cls").float()), images("cls").float()

    def twice(x: Tensor, target: Tensor) -> Tensor:
        vit(x)
        with torch.enable_grad():
            vit(x.requires_grad_()).sum().backward()
        return x

    with torch.no_grad():
        cost = map_cost(vit, twice, pixels, TARGET, repeats=3)
    assert cost.forward_passes == pytest.approx(2.0)
    assert cost.backward_passes == pytest.approx(1.0)
    assert cost.time > 1.5 and cost.memory > 1.0 and cost.milliseconds > 0
