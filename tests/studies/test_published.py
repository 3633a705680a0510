"""What the published code gives on real weights, number by number, with ``variant="paper"``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_classemb.data import Preprocess, StudyDataset, open_dataset
from captum_classemb.edit import remove_tokens
from captum_classemb.runs import RunOptions, StudyConfig, run_study, select
from captum_classemb.runs.batches import Batch, load_batches
from captum_classemb.studies.attention_perturbation.study import AttentionPerturbationStudy
from captum_classemb.studies.identifiability.study import IdentifiabilityStudy
from captum_classemb.studies.memories.study import MemoriesStudy
from captum_classemb.studies.memories.value_vectors import compositional
from captum_classemb.studies.token_perturbation.study import TokenPerturbationStudy
from captum_classemb.studies.token_reader import TokenReader
from captum_classemb.vit import adapt, record

#: Another build moves logits by up to 2e-4: within this the order is not certain.
NOISE = 1e-3
SITES = {"hs": "resid_post", "hs-attn": "attn_out", "hs-mlp": "mlp_out"}
Golden = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(assets: Path) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    model.load_state_dict(load_file(assets / "weights/vit_tiny_patch16_224.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def golden(assets: Path) -> Golden:
    return dict(np.load(assets / "golden/paper_code.npz"))


@pytest.fixture(scope="module")
def data(assets: Path) -> StudyDataset:
    return open_dataset(assets / "mini_imagenet_s", Preprocess(mode="squash"), None, 1000)


#: A few of the hundred rows, or all of them.
ROWS = pytest.mark.parametrize(
    "step",
    [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)],
)


def batches(data: StudyDataset, step: int) -> Iterator[Batch]:
    chosen = list(range(0, 100, step))
    plan = [(i, chosen[i : i + 10]) for i in range(0, len(chosen), 10)]
    return load_batches(data, plan, torch.device("cpu"))


def published(golden: Golden, key: str, batch: Batch) -> Tensor:
    return torch.from_numpy(golden[key][list(batch.indices)])


def close_calls(logits: Tensor, labels: Tensor) -> Tensor:
    """How many other logits lie within the noise of the correct one's: B×N."""
    own = logits.gather(-1, labels[:, None, None].expand(*logits.shape[:2], 1))
    return ((logits - own).abs() < NOISE).sum(-1) - 1


def check_ranks(ranks: Tensor, logits: Tensor, labels: Tensor, expected: Tensor) -> None:
    """Equal where no other logit is close; elsewhere off by no more than the close ones."""
    margin = close_calls(logits, labels)
    assert bool(((ranks - expected.long()).abs() <= margin).all())
    assert float((margin == 0).float().mean()) > 0.5


@ROWS
def test_positions_logits_and_best_classes(
    tiny: nn.Module, data: StudyDataset, golden: Golden, step: int
) -> None:
    vit = adapt(tiny)
    for batch in batches(data, step):
        recording = record(vit, batch.images, SITES.values())
        right = recording.logits.argmax(-1) == batch.labels
        assert torch.equal(right, published(golden, "accuracy", batch).bool())
        for block in range(12):
            for key, site in SITES.items():
                scores = TokenReader(vit.readout).scores(
                    recording[site][block], batch.labels, top=5
                )
                logits = vit.readout.project(recording[site][block])
                position = published(golden, f"pos/{key}_{block}", batch)
                check_ranks(scores.rank, logits, batch.labels, position)
                expected = published(golden, f"logit/{key}_{block}", batch)
                torch.testing.assert_close(scores.target_logit, expected, atol=5e-4, rtol=1e-4)
                best = logits.topk(6).values
                clear = ((best[..., :-1] - best[..., 1:]) > NOISE).all(-1)
                top = published(golden, f"top5/{key}_{block}", batch).long()
                assert torch.equal(scores.top.long()[clear], top[clear])
                assert clear.float().mean() > 0.9


@ROWS
def test_memories(tiny: nn.Module, data: StudyDataset, golden: Golden, step: int) -> None:
    vit = adapt(tiny)
    study = MemoriesStudy(StudyConfig(tiny, "tiny", variant="paper"))
    for place, layer in enumerate(("attn", "mlp")):
        for block in range(12):
            agreement = study.values[place * 12 + block].agreement.numpy()
            expected = golden[f"class_value_top1/{layer}"][block]
            np.testing.assert_allclose(agreement, expected, atol=2e-6)
    for batch in batches(data, step):
        sites = [f"{layer}_{kind}" for layer in ("attn", "mlp") for kind in ("out", "coefficients")]
        recording = record(vit, batch.images, sites)
        for place, layer in enumerate(("attn", "mlp")):
            for block in range(12):
                value = study.values[place * 12 + block]
                six = recording[f"{layer}_coefficients"][block][0].topk(6)
                gaps = six.values[..., :-1] - six.values[..., 1:]
                strongest, known = six.indices[..., :5], gaps[..., 4] > 1e-4
                agree = study.agreement.agreeing([strongest], [value], batch.labels)[0]
                key = f"kv_agreement/{layer}_{block}"
                expected = torch.from_numpy(golden[key]).flatten(0, 1)[list(batch.indices)]
                assert torch.equal(agree[known], expected[known])
                assert known.float().mean() > 0.9
                best = vit.readout.project(recording[f"{layer}_out"][block]).topk(2)
                sure = known & (best.values[..., 0] - best.values[..., 1] > NOISE)
                same = compositional(strongest, value, best.indices[..., 0])
                key = f"composition/{layer}_{block}"
                expected = torch.from_numpy(golden[key]).flatten(0, 1)[list(batch.indices)]
                assert torch.equal(same.sum(-1)[sure], expected.sum(-1)[sure])
                sure &= (gaps > 1e-4).all(-1)
                assert torch.equal(same[sure], expected[sure])
                assert sure.float().mean() > 0.9


@ROWS
def test_attention_perturbation(
    tiny: nn.Module, data: StudyDataset, golden: Golden, step: int
) -> None:
    study = AttentionPerturbationStudy(StudyConfig(tiny, "tiny", variant="paper"))
    close, positions = 0, []
    for batch in batches(data, step):
        study.update(batch)
        positions.append(published(golden, "attn_no_cls_pos", batch))
        for name in ("self_only", "no_cls"):
            with study.edit(name, (224, 224)):
                recording = record(study.vit, batch.images, ["resid_post"])
            right = recording.logits.argmax(-1) == batch.labels
            assert torch.equal(right, published(golden, f"attn_{name}_acc", batch).bool())
            logits = study.vit.readout.project(recording["resid_post"][11])
            ranks = study.ranks(recording, batch.labels)[-1]
            check_ranks(ranks, logits, batch.labels, published(golden, f"attn_{name}_pos", batch))
        close += int((close_calls(logits, batch.labels) > 0).sum())
    # Over all tokens with CLS, as published: 4.51 % over the hundred images.
    where = {"metric": "no_cls/class_identifiability_rate", "tokens": "image", "group": "all"}
    (rate,) = select(study.tables()["attention-perturbation"], **where, block=11)
    expected = torch.cat(positions)
    assert rate.n == expected.numel()
    assert abs(rate.value - float((expected == 0).double().mean())) * rate.n <= close
    if step == 1:
        assert round(100 * rate.value, 2) == 4.51


@ROWS
def test_token_perturbation(tiny: nn.Module, data: StudyDataset, golden: Golden, step: int) -> None:
    study = TokenPerturbationStudy(StudyConfig(tiny, "tiny", variant="paper"))
    vit = study.vit
    conditions = {"without_context": "no_context", "without_class": "no_class_label"}
    for batch in batches(data, step):
        masks = batch.masks
        assert masks is not None
        shown = masks[:, ::16, ::16].flatten(1)
        for name, key in conditions.items():
            keep = shown == (1 if name == "without_context" else 0)
            expected = published(golden, f"tokens_{key}_rate", batch)
            right = published(golden, f"tokens_{key}_acc", batch)
            for i in range(len(batch.indices)):
                one = Batch(
                    0, batch.indices[i : i + 1], batch.images[i : i + 1], batch.labels[i : i + 1],
                    masks[i : i + 1], batch.names[i : i + 1],
                )  # fmt: skip
                for metric in study.metrics.values():
                    metric.reset()  # type: ignore[operator]
                study.update(one)
                rows = study.tables()["token-perturbation"]
                (accuracy,) = select(rows, metric=f"{name}/accuracy")
                assert accuracy.value == right[i]
                (rate,) = select(
                    rows, metric=f"{name}/class_identifiability_rate", tokens="image", block=11
                )
                with remove_tokens(vit, keep[i : i + 1]):
                    tokens = record(vit, one.images, ["resid_post"])["resid_post"][11]
                logits = vit.readout.project(tokens)
                close = (close_calls(logits, one.labels) > 0).sum().item()
                assert abs(rate.value - expected[i]) * tokens.shape[1] <= close + 1e-6


@pytest.mark.slow
def test_means_over_the_whole_set(
    tiny: nn.Module, data: StudyDataset, golden: Golden, tmp_path: Path
) -> None:
    study = IdentifiabilityStudy(StudyConfig(tiny, "tiny", variant="paper"))
    options = RunOptions(batch_size=15, progress=False)
    rows = run_study(study, data, tmp_path / "out", options).tables["identifiability"]

    def by_block(**fields: str) -> np.ndarray:  # type: ignore[type-arg]
        chosen = sorted(select(rows, **fields), key=lambda row: row.block)
        return np.array([row.value for row in chosen])

    means = {"metric": "class_identifiability", "site": "resid_post"}
    changes = {"metric": "class_similarity_change_rate"}
    groups = {"cls": {"tokens": "cls"}, "image": {"tokens": "image", "group": "all"}}
    for name, group in groups.items():
        published = golden[f"mean_evolution_{name}"]
        np.testing.assert_allclose(by_block(**means, **group), published, atol=1e-6)
    parted = np.stack([by_block(**means, group=g) for g in ("class", "context")], 1)
    np.testing.assert_allclose(parted, golden["ident_segmented_class_context"], atol=2e-6)
    gap = "class_identifiability_class_minus_context"
    where = {"site": "resid_post", "group": "class - context"}
    found, p = by_block(metric=gap, **where), by_block(metric=f"{gap}_p", **where)
    published = golden["ident_segmented_class_context"]
    np.testing.assert_allclose(found, published[:, 0] - published[:, 1], atol=4e-6)
    np.testing.assert_allclose(found[[5, 8, 11]], [0.03445, 0.02658, 0.02654], atol=1e-5)
    assert (p[[5, 8, 11]] == 0).all()
    np.testing.assert_allclose(
        by_block(**changes, site="resid_post", **groups["image"]), golden["change_rate"], atol=1e-4
    )
    for layer in ("attn", "mlp"):
        found = np.stack(
            [by_block(**changes, site=f"{layer}_out", **groups[name]) for name in groups], 1
        )
        np.testing.assert_allclose(found, golden[f"class_similarity_change_{layer}"], atol=1e-4)
    for place, source in enumerate(("previous", "attention", "mlp", "none")):
        metric = f"residual_composition_{source}"
        cls, image = (by_block(metric=metric, **groups[name]) for name in groups)
        published = golden["residual_match_prev_attn_mlp_comp"][:, place]
        # The published numbers are over all 197 tokens, in per cent.
        np.testing.assert_allclose(100 * (cls + 196 * image) / 197, published, atol=0.01)
