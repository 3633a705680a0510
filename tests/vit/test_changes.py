"""Whatever is done to a model, a map is exact or refused: judged by ledger, gradient and pixels.

1. *Ledger*: its total is the model's own logit, in float64.
2. *Gradient*: maps are those of autograd through explicit attention on the changed model.
3. *Pixels*: changing the pixels of patch j moves token j, which stays at its place in the stream.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vit import changes_of_ends, changes_of_parts, changes_of_stream, changes_of_weights
from vit.changed import LIBRARIES, Parts, random_images, small
from vit.changes import CHANGES, EXACT, Change
from vit.truth import Truth, UnlikeError, logits_in

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import adapt

GATHERED = (changes_of_ends, changes_of_parts, changes_of_stream, changes_of_weights)
METHODS: dict[str, Callable[..., Any]] = {
    "memory": MemoryPatchImportance,
    "gradient": partial(ClassEmbeddingGradient, objective="logit"),
    "patches": PatchImportance,
    "paths": AllPathImportance,
    "projection": ClassEmbeddingProjection,
}
#: Eager attention of Hugging Face rounds its weights to float32.
TOLERANCE = 2e-6


def refusal(error: Exception, known: Change) -> str:
    """ "refused", if the message is a sentence that says what differed."""
    message = str(error)
    if "\n" in message or not message.endswith(".") or len(message) < 40:
        return f"refused without a sentence: {message!r}"
    if not re.search(known.names, message):
        return f"refused without naming {known.names!r}: {message!r}"
    return "refused"


#: What is asked of a method, new and after an earlier call: maps of one class where the other asks
#: for all, since both are the same map.
QUESTIONS = {
    "memory": ("patches pixels ledger", "classes ledger"),
    "gradient": ("patches", "classes"),
    "patches": ("classes", "patches"),
    "paths": ("patches", "classes"),
    "projection": ("patches", "patches"),
}


def run(name: str, method: Any, images: Tensor, target: Tensor, later: bool) -> dict[str, Any]:
    """What a method says; pixels share maps in one way for all methods."""
    questions = {
        "patches": partial(method.attribute_patches, images, target),
        "classes": partial(method.attribute_classes, images),
        "pixels": partial(method.attribute, images, target),
        "ledger": partial(getattr(method, "ledger", len), images, target),
    }
    return {key: questions[key]() for key in QUESTIONS[name][later].split()}


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference by image, relative to the image's largest entry."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.flatten(1).abs().amax(1).clamp_min(1e-30)
    error = (found - expected).flatten(1).abs().amax(1) / scale
    return float(error.nan_to_num(nan=torch.inf).max())


class Judge:
    """Three oracles of one changed model."""

    def __init__(self, model: nn.Module, parts: Parts, images: Tensor, target: Tensor) -> None:
        self.truth = Truth(model, parts, images, target)
        self.affine = True  # until the ledger is refused
        self._expected: dict[str, Tensor] = {}
        self._places: dict[Any, str] = {}

    def verdict(self, name: str, found: dict[str, Any]) -> str:
        """ "exact", or what is wrong."""
        maps = [found[key] for key in ("patches", "classes", "pixels") if key in found]
        if not all(bool(torch.isfinite(part).all()) for part in maps):
            return "wrong: maps are not finite"
        steps = [self.by_gradient, self.by_pixels]
        for step in [self.by_ledger, *steps] if name == "memory" else steps:
            if wrong := step(name, found):
                return f"wrong: {wrong}"
        return "exact"

    def by_ledger(self, name: str, found: dict[str, Any]) -> str:
        """Whether all entries add up to the model's own logit."""
        own, ledger = self.truth.logits.gather(1, self.truth.target[:, None])[:, 0], found["ledger"]
        error = (ledger.total - own).abs() / ledger.magnitude.clamp_min(1e-30)
        if not float(error.max()) <= TOLERANCE:
            return f"the ledger's total by {float(error.max()):.0e}"
        error = (ledger.score - own).abs() / ledger.magnitude.clamp_min(1e-30)
        return "" if float(error.max()) <= TOLERANCE else "the ledger's score is no logit"

    def expected(self, name: str, count: int) -> Tensor:
        """The map by autograd: B×L×H×P."""
        if name not in self._expected:
            make = {
                "memory": self.truth.memory,
                "gradient": self.truth.gradient,
                "patches": partial(self.truth.patches, count, self.affine),
                "paths": partial(self.truth.paths, count, self.affine),
                "projection": self.truth.projection,
            }[name]
            self._expected[name] = make()
        return self._expected[name][..., -count:]

    def by_gradient(self, name: str, found: dict[str, Any]) -> str:
        """Whether maps are those of explicit attention."""
        if "classes" in found:
            target = self.truth.target
            flat = found["classes"][torch.arange(len(target)), target].flatten(1)
            expected = self.expected(name, flat.shape[-1]).sum((1, 2))
        else:
            flat = found["patches"].flatten(-2)
            flat = flat.unsqueeze(1) if flat.dim() == 3 else flat
            expected = self.expected(name, flat.shape[-1])
            if flat.shape != expected.shape:  # blocks called more than once may be read as one
                flat, expected = flat.sum((1, 2)), expected.sum((1, 2))
        error = apart(flat, expected)
        return f"the map by {error:.0e}" if error > TOLERANCE else ""

    def by_pixels(self, name: str, found: dict[str, Any]) -> str:
        """Whether patch j is what lies under j in the map."""
        grid = found.get("classes", found.get("patches")).shape[-2:]
        regions = patch_regions(grid, *self.truth.images.shape[-2:])
        if "pixels" in found:
            pixels = found["pixels"]
            shares = torch.stack([pixels[:, :, region].sum((1, 2)) for region in regions], 1)
            summed = found["patches"].flatten(1, -3).sum(1).flatten(1)
            even = all(bool((p == p[..., :1]).all()) for p in (pixels[:, :, r] for r in regions))
            if apart(shares, summed) > 1e-5 or not even:
                return "pixels do not share the map"
        if grid not in self._places:
            self._places[grid] = self._in_place(regions)
        return self._places[grid]

    def _in_place(self, regions: list[Tensor]) -> str:
        moved = self.truth.moved(regions)
        first = moved.shape[1] - len(regions)
        if first < 0:
            return "there are more patches than tokens"
        own = moved[:, first:].diagonal()
        others = moved[:, first:] - torch.diag(own)
        if not bool((own > 2 * others.amax(1)).all()):
            return "the pixels of a patch are not what moves its token"
        stay = (self.truth.stays(first + j) for j in (0, 5, len(regions) - 2))
        return "" if all(stay) else "a token of the stream is not where its patch was"


def patch_regions(grid: Any, height: int, width: int) -> list[Tensor]:
    """The pixels under each patch of the map."""
    rows, columns = height // grid[0], width // grid[1]
    regions = []
    for j in range(grid[0] * grid[1]):
        r, c = divmod(j, grid[1])
        region = torch.zeros(height, width, dtype=torch.bool)
        region[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = True
        regions.append(region)
    return regions


def outcomes(known: Change, library: str) -> dict[str, str]:
    """What each method does with the changed model, made before the first call and after it."""
    parts = Parts(known.make(library), library)
    used: dict[str, Any] = {}
    if known.late:
        vit = adapt(parts.model)
        used = {name: make(vit) for name, make in METHODS.items()}
        for method in used.values():
            method.attribute_classes(random_images(2).to(vit.dtype))
    made = known.apply(parts)
    model, undo = (made, None) if isinstance(made, nn.Module) else (parts.model, made)
    try:
        images = known.images().to(next(model.parameters()).dtype)
        target = torch.tensor([2, 0, 4]) % class_count(model, images)
        judge = None if images.dtype != torch.float64 else Judge(model, parts, images, target)
        found = {}
        adapted: list[Any] = []  # once, by the first method

        def new(make: Any) -> Any:
            if not adapted:
                adapted.append(adapt(model))
            return make(adapted[0])

        for name, make in METHODS.items():
            asked = (known, judge, images, target)
            found[name] = said(name, partial(new, make), *asked, later=False)
            if name in used:
                found[f"{name}, later"] = said(name, partial(used.get, name), *asked, later=True)
        return found
    finally:
        if undo is not None:
            undo()


def said(
    name: str,
    make: Any,
    known: Change,
    judge: Judge | None,
    images: Tensor,
    target: Tensor,
    *,
    later: bool,
) -> str:
    """The outcome of one method."""
    try:
        found = run(name, make(), images, target, later)
    except (InputError, UnsupportedModelError) as error:
        if judge is not None and "no exact ledger" in str(error):
            judge.affine = False
        return refusal(error, known)
    except Exception as error:  # noqa: BLE001
        return f"raised {type(error).__name__}: {str(error)[:90]}"
    if judge is None:
        maps = found.get("classes", found.get("patches"))
        finite = bool(torch.isfinite(maps).all())
        return f"returned in half precision, {'finite' if finite else 'not finite'}"
    try:
        return judge.verdict(name, found)
    except UnlikeError as error:
        return f"wrong: {error}"


def class_count(model: nn.Module, images: Tensor) -> int:
    """How many classes the model's own logits have."""
    with torch.no_grad():
        logits = logits_in(model(images))
    return logits.shape[-1]


CASES = {
    f"{known.name}, {library}": (known, library) for known in CHANGES for library in known.libraries
}


@pytest.mark.parametrize("label", CASES)
def test_a_changed_model_is_explained_exactly_or_refused(label: str) -> None:
    known, library = CASES[label]
    wrong = {
        name: what for name, what in outcomes(known, library).items() if what not in known.allowed
    }
    assert not wrong, "; ".join(f"{name}: {what}" for name, what in wrong.items())


def test_the_catalogue_is_wide() -> None:
    counts = Counter(known.name for known in CHANGES)
    assert max(counts.values()) == 1 and len(counts) >= 60
    for library in LIBRARIES:
        assert sum(library in known.libraries for known in CHANGES) >= 60


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_judges_judge(library: str) -> None:
    """Unchanged models are exact; a map that is moved, scaled or of another class is not."""
    unchanged = Change("nothing", EXACT, lambda p: None)
    assert set(outcomes(unchanged, library).values()) == {"exact"}
    parts = Parts(small(library), library)
    images, target = random_images(), torch.tensor([2, 0, 4])
    judge = Judge(parts.model, parts, images, target)
    for name, make in METHODS.items():
        for later in (False, True):
            found = run(name, make(parts.model), images, target, later)
            assert judge.verdict(name, found) == "exact"
            wrong = {key: found[key].roll(1, -1) for key in found if key != "ledger"}
            scaled = {key: found[key] * (1 + 1e-5) for key in found if key != "ledger"}
            for key in wrong:
                assert judge.verdict(name, found | {key: wrong[key]}).startswith("wrong"), key
                assert judge.verdict(name, found | {key: scaled[key]}).startswith("wrong"), key
