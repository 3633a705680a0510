"""One recorded forward pass of each batch serves every method that reads one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_classemb.attr import METHODS
from captum_classemb.data import Preprocess, open_dataset, read_image
from captum_classemb.evaluation import RemovalCurves
from captum_classemb.evaluation.removal_metric import RandomRemoval
from captum_classemb.explain import Explore, MapOptions, write_maps
from captum_classemb.explain.compute import OWN, Explainer
from captum_classemb.models import class_names, demo_image_paths, demo_vit
from captum_classemb.runs import StudyConfig
from captum_classemb.runs.batches import load_batches
from captum_classemb.studies.faithfulness.study import FaithfulnessStudy
from captum_classemb.vit import ViT, adapt

ONE_PASS = (*OWN, "rollout", "raw-attention")


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> ViT:
    """The packaged model, taken as verified: that runs it once for each structure and weights."""
    monkeypatch.setattr("captum_classemb.attr._inputs.verify", lambda *_: None)
    return adapt(demo_vit())


@pytest.fixture
def passes(vit: ViT) -> Iterator[list[int]]:
    """The size of each batch that went through a block in the middle."""
    seen: list[int] = []
    block = vit.blocks[2].module
    handle = block.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    yield seen
    handle.remove()


@pytest.mark.parametrize("targets", [(), (3,), (1, 2, 7)])
@pytest.mark.parametrize("methods", [OWN, ONE_PASS, OWN[1:2]])
def test_explain(methods: tuple[str, ...], targets: Any, vit: ViT, passes: list[int]) -> None:
    images = torch.rand(3, 3, 64, 64)
    found = Explainer(vit, methods, targets)(images)
    assert passes == [3]
    index = torch.tensor([explanation.targets for explanation in found])
    for name in methods:
        method = METHODS[name].build(vit)
        for k in range(index.shape[1]):
            expected = method.attribute_patches(images, index[:, k]).flatten(1, -3).sum(1)
            maps = torch.stack([torch.from_numpy(e.maps[name][k]) for e in found])
            torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


def test_methods_with_passes_of_their_own_add_theirs(vit: ViT, passes: list[int]) -> None:
    Explainer(vit, ("patch-importance", "token-occlusion"), (1,))(torch.rand(1, 3, 64, 64))
    assert len(passes) > 2


def test_page(vit: ViT, passes: list[int]) -> None:
    preprocess = Preprocess.of_model(vit.model)
    run = Explore(vit, preprocess.view(read_image(demo_image_paths()[0])), preprocess)
    for step in run.steps([3]):
        step()
    run.page(class_names(vit.model), title="", model="")
    assert passes == [1]


@pytest.mark.parametrize("variant", ["paper", "corrected"])
def test_faithfulness(
    variant: Any, vit: ViT, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The curves run the model, once a point: not what is counted.
    monkeypatch.setattr(RemovalCurves, "update", lambda *_: None)
    monkeypatch.setattr(RandomRemoval, "update", lambda *_: None)
    study = FaithfulnessStudy(StudyConfig(vit, "demo_vit", variant=variant), ONE_PASS)
    data = open_dataset("scenes", Preprocess.of_model(vit.model), None, class_names(vit.model))
    (batch,) = load_batches(data, [(0, [0, 1, 2])], torch.device("cpu"))
    study.update(batch)
    assert passes == [3]


@pytest.mark.parametrize(
    "targets", [(0,), ("predicted",), ("label",), ("label", "predicted", 9), (1, 2, 3)]
)
@pytest.mark.parametrize("method", ["patch-importance", "class-embedding-projection", "rollout"])
def test_maps(method: str, targets: Any, vit: ViT, passes: list[int], tmp_path: Path) -> None:
    """The targets included that the model itself chooses."""
    data = open_dataset("scenes", Preprocess.of_model(vit.model), None, class_names(vit.model))
    options = MapOptions(targets, method, shard=3, batch_size=2, limit=8, progress=False)
    write_maps(vit, "demo_vit", data, tmp_path / "out", options)
    assert passes == [2, 1, 2, 1, 2]


def test_faithfulness_of_predictions(
    vit: ViT, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model chooses is in the pass that its maps are made of."""
    given = []
    monkeypatch.setattr(RemovalCurves, "update", lambda *words: given.append(words[-1]))
    monkeypatch.setattr(
        "captum_classemb.evaluation.removal_metric.RandomRemoval.update", lambda *_: None
    )
    config = StudyConfig(vit, "demo_vit")
    study = FaithfulnessStudy(config, ONE_PASS, target="predicted")
    data = open_dataset("scenes", Preprocess.of_model(vit.model), None, class_names(vit.model))
    (batch,) = load_batches(data, [(0, [0, 1, 2])], torch.device("cpu"))
    study.update(batch)
    assert passes == [3]
    with torch.no_grad():
        predicted = vit(batch.images).argmax(-1)
    assert len(given) == len(ONE_PASS)
    assert all(torch.equal(target, predicted) for target in given)
