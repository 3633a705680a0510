"""The studies of perturbed forward passes, against the definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from squares import CLASSES, DEPTH, IMAGES, QUIET, Squares, one, small_vit, whole
from timm.models.cait import Cait
from torch import Tensor

from captum_classemb.edit import knock_out, remove_tokens
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.identifiability import rank
from captum_classemb.runs import StudyConfig, run_study
from captum_classemb.studies.attention_perturbation.study import AttentionPerturbationStudy
from captum_classemb.studies.token_perturbation.study import TokenPerturbationStudy
from captum_classemb.vit import ViT, adapt, record

#: The left half of the image, as patches.
LEFT = torch.tensor([[True, True, False, False]] * 4).flatten()
WITH_MASK = torch.arange(IMAGES) != 2


def passed(vit: ViT, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the last block but one, B×N, and logits."""
    recording = record(vit, images, ["resid_post"])
    logits = vit.readout.project(recording["resid_post"][DEPTH - 2])
    return rank(logits, labels[:, None].expand(logits.shape[:2])), recording.logits


@pytest.mark.parametrize("variant", ["corrected", "paper"])
def test_attention_perturbation_against_the_definitions(tmp_path: Path, variant: str) -> None:
    model, data = small_vit(), Squares()
    study = AttentionPerturbationStudy(StudyConfig(model, "small", variant=variant))  # type: ignore[arg-type]
    rows = run_study(study, data, tmp_path / "out", QUIET).tables["attention-perturbation"]
    images, labels = whole(data)
    vit = adapt(model)
    others = ~torch.eye(17, dtype=torch.bool)
    others[0] = False
    if variant == "corrected":
        others[:, 0] = False
    from_cls = torch.zeros(17, 17, dtype=torch.bool)
    from_cls[1:, 0] = True
    found = {"unperturbed": passed(vit, images, labels)}
    with knock_out(vit, others):
        found["self_only"] = passed(vit, images, labels)
    with knock_out(vit, from_cls, renormalise=variant == "corrected"):
        found["no_cls"] = passed(vit, images, labels)
    for name, (ranks, logits) in found.items():
        accuracy = (logits.argmax(-1) == labels).double().mean()
        assert one(rows, metric=f"{name}/accuracy") == pytest.approx(accuracy.item())
        where = {"block": DEPTH - 2, "tokens": "image", "group": "all"}
        r = 1 - ranks[:, 1:].double() / CLASSES
        value = one(rows, **where, metric=f"{name}/class_identifiability")
        assert value == pytest.approx(r.mean().item())
        value = one(rows, **where, metric=f"{name}/class_identifiability_rate")
        # As published, CLS is counted in the perturbed passes, and not in the whole one.
        counted = ranks if variant == "paper" and name != "unperturbed" else ranks[:, 1:]
        assert value == pytest.approx((counted == 0).double().mean().item())
        value = one(rows, **{**where, "group": "class"}, metric=f"{name}/class_identifiability")
        assert value == pytest.approx(r[WITH_MASK][:, LEFT].mean().item())
    assert len({one(rows, metric=f"{n}/class_identifiability", **where) for n in found}) == 3


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg", "class_token": False}])
@pytest.mark.parametrize("variant", ["corrected", "paper"])
def test_token_perturbation_against_the_definitions(
    tmp_path: Path,
    variant: str,
    changes: dict,  # type: ignore[type-arg]
) -> None:
    model, data = small_vit(**changes), Squares()
    study = TokenPerturbationStudy(StudyConfig(model, "small", variant=variant))  # type: ignore[arg-type]
    rows = run_study(study, data, tmp_path / "out", QUIET).tables["token-perturbation"]
    images, labels = (x[WITH_MASK] for x in whole(data))
    vit = adapt(model)
    cls = vit.prefix_tokens
    ranks, logits = passed(vit, images, labels)
    where = {"block": DEPTH - 2, "tokens": "image"}
    accuracy = (logits.argmax(-1) == labels).double().mean()
    assert one(rows, metric="unperturbed/accuracy") == pytest.approx(accuracy.item())
    for name, group, left in (
        ("without_context", "class", LEFT),
        ("without_class", "context", ~LEFT),
    ):
        before = (ranks[:, cls:][:, left] == 0).double().mean()
        where["group"] = group
        value = one(rows, **where, metric="unperturbed/class_identifiability_rate")
        assert value == pytest.approx(before.item())
        with remove_tokens(vit, left.expand(len(images), -1)):
            kept, logits = passed(vit, images, labels)
        accuracy = (logits.argmax(-1) == labels).double().mean()
        assert one(rows, metric=f"{name}/accuracy") == pytest.approx(accuracy.item())
        counted = kept if variant == "paper" else kept[:, cls:]
        value = one(rows, **where, metric=f"{name}/class_identifiability_rate")
        assert value == pytest.approx((counted == 0).double().mean().item())
        mean = 1 - kept[:, cls:].double().mean() / CLASSES
        value = one(rows, **where, metric=f"{name}/class_identifiability")
        assert value == pytest.approx(mean.item())
        assert {row.group for row in rows if row.metric.startswith(name) and row.tokens} <= {
            group,
            "all",
        }


def test_images_lose_different_numbers_of_tokens(tmp_path: Path) -> None:
    class Uneven(Squares):
        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            sample = super().__getitem__(index)
            if sample.mask is None:
                return sample
            mask = torch.zeros_like(sample.mask)
            mask[:, : 8 * (index % 5)] = 1
            return sample._replace(mask=mask)

    model, data = small_vit(), Uneven()
    study = TokenPerturbationStudy(StudyConfig(model, "small"))
    rows = run_study(study, data, tmp_path / "out", QUIET).tables["token-perturbation"]
    vit, hits, count, right = adapt(model), 0, 0, 0
    # Images without a class or a context token are left out.
    chosen = [i for i in range(IMAGES) if i != 2 and i % 5 not in (0, 4)]
    for index in chosen:
        sample = data[index]
        keep = (sample.mask[::8, ::8] == 1).flatten()[None]
        label = torch.tensor([sample.label])
        with remove_tokens(vit, keep):
            ranks, logits = passed(vit, sample.image[None], label)
        hits += int((ranks[:, 1:] == 0).sum())
        count += int(keep.sum())
        right += int(logits.argmax() == label)
    where = {"block": DEPTH - 2, "group": "class"}
    value = one(rows, **where, metric="without_context/class_identifiability_rate")
    assert value == pytest.approx(hits / count) and hits
    value = one(rows, metric="without_context/accuracy")
    assert value == pytest.approx(right / len(chosen))


def test_removal_needs_masks(tmp_path: Path) -> None:
    class Bare(Squares):
        with_masks = 0

        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            return super().__getitem__(index)._replace(mask=None)

    study = TokenPerturbationStudy(StudyConfig(small_vit(), "small"))
    with pytest.raises(InputError, match="neither masks nor boxes"):
        run_study(study, Bare(), tmp_path / "out", QUIET)


def test_a_model_without_cls_has_no_attention_to_it(tmp_path: Path) -> None:
    model = small_vit(global_pool="avg", class_token=False)
    study = AttentionPerturbationStudy(StudyConfig(model, "small"))
    result = run_study(study, Squares(), tmp_path / "out", QUIET)
    rows = result.tables["attention-perturbation"]
    assert {row.metric.split("/")[0] for row in rows} == {"unperturbed", "self_only"}
    assert (tmp_path / "out" / "attention_perturbation.png").is_file()


@pytest.mark.parametrize("study", [AttentionPerturbationStudy, TokenPerturbationStudy])
def test_models_whose_patches_attend_elsewhere_are_refused(study) -> None:  # type: ignore[no-untyped-def]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with pytest.raises(UnsupportedModelError, match="Cait attend .* before .* class attention"):
        study(StudyConfig(Cait(num_classes=CLASSES, **sizes).eval(), "cait"))
