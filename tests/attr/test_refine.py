"""Ranks of patches that are necessary, and of those that suffice."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from families import build, images
from torch import Tensor, nn

from captum_classemb import AllPathImportance, PatchImportance
from captum_classemb.attr._forward_pass import run
from captum_classemb.attr.refine import Refinable
from captum_classemb.errors import InputError, TargetError, UnsupportedModelError
from captum_classemb.vit import adapt

METHODS = (PatchImportance, AllPathImportance)
FAMILIES = ("cls", "cls, with sinks", "registers", "mean, fc_norm", "mean, registers", "beit")
N = 16


class Kept(nn.Module):
    """Drops the patches that are not among those left, one CLS token aside."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix, self.left = prefix, [list(range(N))]

    def forward(self, tokens: Tensor) -> Tensor:
        prefix = list(range(self.prefix))
        rows = [[*prefix, *(self.prefix + i for i in left)] for left in self.left]
        return torch.stack([t[row] for t, row in zip(tokens, rows, strict=True)])


def by_hand(kind: Any, family: str, target: int, necessary: bool, steps: int) -> Tensor:
    """One image, patch by patch, with the model's own tokens dropped by a module of its own."""
    model: Any = build(family)
    keep = Kept(model.num_prefix_tokens)
    behind = model.pos_drop
    model.pos_drop = nn.Sequential(behind, keep)
    vit, x = adapt(model), images(family, batch=1)
    method = kind(vit)
    left, ranks = list(range(N)), torch.zeros(N, dtype=torch.int64)
    following = list(range(N, 0, -1)) if necessary else list(range(1, N + 1))
    for t in range(steps):
        keep.left = [left]
        m = method.one_class(run(vit, method.needs(), x, ()), torch.tensor([target]))[0].tolist()
        scored = sorted(zip(left, m, strict=True), key=lambda p: -p[1] if necessary else p[1])
        gone = [p for p, _ in scored[: N * (t + 1) // steps - N * t // steps]]
        for patch in gone:
            ranks[patch] = following.pop(0)
        left = [p for p in left if p not in gone]
    return ranks


@pytest.mark.parametrize("steps", [1, 3, 4, N])
@pytest.mark.parametrize("family", ["cls", "registers", "mean, fc_norm"])
@pytest.mark.parametrize("kind", METHODS)
def test_against_a_loop(kind: Any, family: str, steps: int) -> None:
    method, x = kind(build(family)), images(family, batch=1)
    necessary, sufficient = method.refine(x, 2, steps=steps)
    assert torch.equal(necessary.flatten(), by_hand(kind, family, 2, True, steps))
    assert torch.equal(sufficient.flatten(), by_hand(kind, family, 2, False, steps))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_permutations_of_every_family(kind: Any, family: str) -> None:
    try:
        method = kind(build(family))
    except UnsupportedModelError:
        pytest.skip("not supported by this method")
    x = images(family)
    both = method.refine(x, torch.tensor([1, 3]))
    for ranks, order in zip(both, ("necessary", "sufficient"), strict=True):
        assert ranks.shape == (2, 4, 4) and ranks.dtype == torch.int64
        assert torch.equal(ranks.flatten(1).sort(1).values, torch.arange(1, N + 1).expand(2, -1))
        assert torch.equal(ranks, method.refine(x, torch.tensor([1, 3]), order))
        # Images do not see each other.
        assert torch.equal(ranks[1:], method.refine(x[1:], 3, order))


def test_one_step_is_the_map() -> None:
    method, x = PatchImportance(build("cls")), images("cls")
    necessary, sufficient = method.refine(x, 2, steps=1)
    order = method.attribute_patches(x, 2).sum((1, 2)).flatten(1).argsort(1)
    for ranks in (necessary, sufficient):
        assert torch.equal(ranks.flatten(1).argsort(1), order)


def test_ties_and_steps_by_hand() -> None:
    """Five patches in two steps: two, then three; equal scores go by index."""
    scores = {5: [3.0, 1.0, 3.0, 0.0, 1.0], 3: [7.0, 7.0, 9.0]}

    def scripted(self: Any, x: Tensor, index: Any, args: Any, left: Tensor | None) -> Tensor:
        return torch.tensor([scores[5 if left is None else left.shape[1]]])

    first = torch.tensor([scores[5]])
    method = PatchImportance(build("cls"))
    with mock.patch.object(Refinable, "_map_of_left", scripted):
        ranks = method._ranks(first, first, (), first, "necessary", 2)
        # 0 and 2 go first; of 1, 3, 4 the last has 9, then 1 before 3.
        assert ranks.tolist() == [[5, 2, 4, 1, 3]]
        ranks = method._ranks(first, first, (), first, "sufficient", 2)
        # 3 and 1 go first; of 0, 2, 4 the first two are equal.
        assert ranks.tolist() == [[3, 2, 4, 1, 5]]


@pytest.mark.parametrize(("order", "passes"), [("necessary", 4), ("sufficient", 4), ("both", 7)])
def test_passes_and_their_tokens(order: Any, passes: int) -> None:
    model: Any = build("cls")
    method, x = PatchImportance(model), images("cls")
    method.attribute(x, 1)
    seen: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda m, a, o: seen.append(o.shape[1] - 1))
    method.attribute(x, 1)
    seen.clear()
    method.refine(x, 1, order)
    handle.remove()
    later = [12, 8, 4] * (2 if order == "both" else 1)
    assert seen == [16, *later] and len(seen) == passes


@pytest.mark.parametrize("steps", [0, 17, -1, 2.0, True, "4"])
def test_steps_are_a_number_of_patches(steps: Any) -> None:
    with pytest.raises(InputError, match="from 1 to 16"):
        PatchImportance(build("cls")).refine(images("cls"), 1, steps=steps)


def test_what_is_refused() -> None:
    method, x = PatchImportance(build("cls")), images("cls")
    with pytest.raises(InputError, match="order 'important' is none of"):
        method.refine(x, 1, "important")  # type: ignore[arg-type]
    with pytest.raises(TargetError):
        method.refine(x, 99)
    with pytest.raises(UnsupportedModelError):
        PatchImportance(build("cait")).refine(images("cait"), 1)


def test_half_precision_and_a_model_handed_back() -> None:
    model: Any = build("cls", torch.float32)
    x = images("cls").float()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ranks = PatchImportance(model).refine(x, 1, "necessary")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    half = PatchImportance(model.bfloat16()).refine(x.bfloat16(), 1, "necessary")
    assert isinstance(ranks, Tensor) and isinstance(half, Tensor)
    agree = torch.corrcoef(torch.stack([ranks.flatten(), half.flatten()]).double())[0, 1]
    assert agree > 0.9
