"""The studies of one model, against the definitions and against the published code's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from squares import CLASSES, DEPTH, IMAGES, QUIET, SIDE, Squares, one, small_vit, whole

from captum_classemb.data import patch_mask
from captum_classemb.errors import InputError
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.runs import RunOptions, StudyConfig, read_rows, run_study, select
from captum_classemb.studies import all_studies
from captum_classemb.studies.identifiability.study import IdentifiabilityStudy
from captum_classemb.studies.memories.metric import random_classes
from captum_classemb.studies.memories.study import MemoriesStudy
from captum_classemb.studies.token_reader import TokenReader
from captum_classemb.study_commands import study_group
from captum_classemb.vit import adapt, record


@pytest.mark.parametrize("variant", ["corrected", "paper"])
def test_identifiability_against_the_definitions(tmp_path: Path, variant: str) -> None:
    model, data = small_vit(), Squares()
    study = IdentifiabilityStudy(StudyConfig(model, "small", variant=variant))
    rows = run_study(study, data, tmp_path / "out", QUIET).tables["identifiability"]
    assert {row.variant for row in rows} == {variant}
    images, labels = whole(data)
    vit = adapt(model)
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    recording = record(vit, images, sites)
    logits = {s: torch.stack([vit.readout.project(x) for x in recording[s]]) for s in sites}
    assert one(rows, metric="accuracy") == pytest.approx(
        (recording.logits.argmax(-1) == labels).double().mean().item()
    )
    with_mask = torch.arange(IMAGES) != 2
    left = torch.tensor([0, 1] * 2).repeat(4)[:16].reshape(4, 4) == 0
    left[:, 1], left[:, 2] = True, False
    left = left.flatten()
    for block in range(DEPTH):
        r = identifiability(logits["mlp_out"][block], labels[:, None].expand(-1, 17))
        where = {"block": block, "site": "mlp_out", "metric": "class_identifiability"}
        assert one(rows, **where, tokens="cls") == pytest.approx(r[:, 0].mean().item())
        every = one(rows, **where, tokens="image", group="all")
        assert every == pytest.approx(r[:, 1:].mean().item())
        inside = r[with_mask][:, 1:][:, left]
        assert one(rows, **where, group="class") == pytest.approx(inside.mean().item())
        outside = r[with_mask][:, 1:][:, ~left]
        assert one(rows, **where, group="context") == pytest.approx(outside.mean().item())
        gap = one(rows, **{**where, "metric": "class_identifiability_class_minus_context"})
        if variant == "paper":
            assert gap == pytest.approx((inside.mean() - outside.mean()).item())
        else:
            assert gap == pytest.approx((inside.mean(1) - outside.mean(1)).mean().item())
            where["metric"] = "class_identifiability_by_image"
            means = [one(rows, **where, group=group) for group in ("class", "context")]
            assert means == pytest.approx([x.mean(1).mean().item() for x in (inside, outside)])
            assert gap == pytest.approx(means[0] - means[1])
        where["metric"] = "images_with_identifiable_token"
        best = (r[:, 1:] == 1).any(1).double().mean().item()
        assert one(rows, **where, tokens="image", group="all") == pytest.approx(best)
    own = {
        s: logits[s].gather(-1, labels[None, :, None, None].expand(DEPTH, -1, 17, 1)) for s in sites
    }
    before = "resid_mid" if variant == "corrected" else "resid_pre"
    where = {"metric": "class_similarity_change_rate", "tokens": "image", "group": "all"}
    for block in range(variant == "paper", DEPTH):
        for site, source in (
            ("mlp_out", before),
            ("attn_out", "resid_pre"),
            ("resid_post", "resid_pre"),
        ):
            rate = (own[site][block] > own[source][block])[:, 1:].double().mean().item()
            assert one(rows, **where, block=block, site=site) == pytest.approx(rate)
    assert bool(select(rows, **where, block=0)) == (variant == "corrected")
    tops = {s: logits[s].argmax(-1)[:, :, 1:] for s in sites}
    for block in range(1, DEPTH):
        same = [
            tops[s][block] == tops["resid_post"][block]
            for s in ("resid_pre", "attn_out", "mlp_out")
        ]
        none = ~(same[0] | same[1] | (same[2] if variant == "corrected" else same[1]))
        for source, share in zip(
            ("previous", "attention", "mlp", "none"), [*same, none], strict=True
        ):
            metric = f"residual_composition_{source}"
            found = one(rows, metric=metric, block=block, tokens="image", group="all")
            assert found == pytest.approx(share.double().mean().item())


def test_memories_against_the_definitions(tmp_path: Path) -> None:
    model, data = small_vit(), Squares()
    config = StudyConfig(model, "small", random_model=small_vit)
    rows = run_study(MemoriesStudy(config), data, tmp_path / "out", QUIET).tables["memories"]
    images, labels = whole(data)
    vit = adapt(model)
    sites = ("attn_out", "mlp_out", "attn_coefficients", "mlp_coefficients")
    recording = record(vit, images, sites)
    for layer in ("attn", "mlp"):
        for block in range(DEPTH):
            module = model.blocks[block]  # type: ignore[index]
            weight = (module.attn.proj if layer == "attn" else module.mlp.fc2).weight.detach()
            logits = model.head.weight.detach() @ weight
            strongest = recording[f"{layer}_coefficients"][block][0].topk(5).indices
            classes = logits.T.topk(5).indices[strongest]
            agree = (classes == labels[:, None, None, None]).flatten(2).any(-1)
            where = {"block": block, "site": f"{layer}_out", "group": "all"}
            found = one(rows, **where, tokens="cls", metric="key_value_agreement_rate")
            assert found == pytest.approx(agree[:, 0].double().mean().item())
            top = vit.readout.project(recording[f"{layer}_out"][block]).argmax(-1)
            same = logits.argmax(0)[strongest] == top[..., None]
            found = one(rows, **where, tokens="image", metric="memory_compositionality")
            assert found == pytest.approx(same[:, 1:].double().mean().item())
            # The control is the same model here: no class can tell them apart.
            value = one(rows, **where, metric="class_value_agreement")
            assert one(rows, **where, metric="class_value_agreement_random_model") == value
            assert one(rows, **where, metric="class_value_agreement_wilcoxon_p") == 1.0
    other = random_classes(labels, range(IMAGES), CLASSES)
    drawn = (classes == other[:, None, None, None]).flatten(2).any(-1)[:, 1:]
    where["metric"] = "key_value_agreement_rate_random_class"
    assert one(rows, **where, tokens="image") == pytest.approx(drawn.double().mean().item())


def test_layer_scale_belongs_to_a_value_vector() -> None:
    model = small_vit(init_values=1.0)
    plain = MemoriesStudy(StudyConfig(model, "small"))
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(2.0)  # type: ignore[index]
        signs = torch.tensor([1.0, -1.0] * 12)
        model.blocks[1].mlp.fc2.weight.mul_(signs[:, None])  # type: ignore[index]
        model.blocks[1].ls2.gamma.copy_(signs)  # type: ignore[index]
    moved = MemoriesStudy(StudyConfig(model, "small"))
    published = MemoriesStudy(StudyConfig(model, "small", variant="paper"))
    layer = DEPTH + 1
    assert torch.equal(plain.values[layer].classes, moved.values[layer].classes)
    assert not torch.equal(plain.values[layer].classes, published.values[layer].classes)


@pytest.mark.parametrize("study", [IdentifiabilityStudy, MemoriesStudy])
@pytest.mark.parametrize(
    "changes", [{"global_pool": "avg", "class_token": False}, {"reg_tokens": 2}]
)
def test_models_without_cls_and_with_registers(study, changes, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = StudyConfig(small_vit(**changes), "small")
    result = run_study(study(config), Squares(), tmp_path / "out", QUIET)
    (rows,) = result.tables.values()
    assert ("cls" in {row.tokens for row in rows}) == ("reg_tokens" in changes)
    counts = {row.n for row in rows if (row.tokens, row.group) == ("image", "all")}
    assert IMAGES * 16 in counts
    assert all(not np.isnan(row.value) for row in rows)


def test_interrupted_studies_go_on_bit_for_bit(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    class Stopping(IdentifiabilityStudy):
        name = "identifiability"

        def update(self, batch) -> None:  # type: ignore[no-untyped-def]
            if batch.number == 3:
                raise StopError
            super().update(batch)

    config = StudyConfig(small_vit(), "small")
    every = RunOptions(batch_size=4, checkpoint_every=4, progress=False)
    with pytest.raises(StopError):
        run_study(Stopping(config), Squares(), tmp_path / "cut", every)
    again = RunOptions(batch_size=4, checkpoint_every=4, progress=False, resume=True)
    run_study(IdentifiabilityStudy(config), Squares(), tmp_path / "cut", again)
    run_study(IdentifiabilityStudy(config), Squares(), tmp_path / "whole", every)
    name = "identifiability.csv"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_saved_tokens(tmp_path: Path) -> None:
    model, data, output = small_vit(), Squares(), tmp_path / "out"
    with pytest.raises(InputError, match="output folder"):
        IdentifiabilityStudy(StudyConfig(model, "small"), save_tokens=True)
    study = IdentifiabilityStudy(StudyConfig(model, "small", output=output), save_tokens=True)
    run_study(study, data, output, QUIET)
    shards = sorted((output / "tokens").iterdir())
    assert len(shards) == 4
    parts = [np.load(shard) for shard in shards]
    images, labels = whole(data)
    vit = adapt(model)
    scores = TokenReader(vit.readout).scores(
        record(vit, images, ["attn_out"])["attn_out"][1], labels, 5
    )
    site = parts[0]["sites"].tolist().index("attn_out")
    for key, expected in (("rank", scores.rank), ("top5", scores.top)):
        found = np.concatenate([part[key][site, 1] for part in parts])
        np.testing.assert_array_equal(found, expected.numpy())
    assert np.concatenate([part["names"] for part in parts]).tolist() == [str(i) for i in range(15)]


def test_every_study_is_registered_with_its_summary() -> None:
    found = all_studies()
    own = {"identifiability", "memories", "attention-perturbation", "token-perturbation"}
    assert own <= found.keys()
    for name, study in found.items():
        assert study.name == name and study.summary()[-1] in ".?"


def test_command_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (40 * i, 0, 90)).save(tmp_path / f"data/{name}/{i}.png")
    output = tmp_path / "out"
    arguments = [
        "memories", "--model", "test_vit", "--random-init", "--data", str(tmp_path / "data"),
        "--output", str(output), "--batch-size", "3", "--device", "cpu", "--limit", "3",
        "--labels", "sorted",
    ]  # fmt: skip
    group = study_group()
    done = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "key_value_agreement_rate" in done.output and "3 images" in done.output
    run = json.loads((output / "run.json").read_text())
    assert run["complete"] and run["settings"]["model"] == "test_vit (random)"
    rows = read_rows(output / "memories.csv")
    assert select(rows, metric="class_value_agreement_wilcoxon_p")
    for name in run["figures"]:
        with Image.open(output / f"{name}.png") as figure:
            assert figure.info["dpi"][0] == pytest.approx(200, abs=1)
    help_text = CliRunner().invoke(group, ["identifiability", "--help"]).output
    assert "--save-tokens" in help_text and "--resume" in help_text
    assert CliRunner().invoke(group, ["nothing"]).exit_code == 2


def test_options_of_the_whole_command_line_reach_every_study() -> None:
    debug = click.option("--debug", is_flag=True, expose_value=False)
    group = study_group(debug)
    assert "--debug" in CliRunner().invoke(group, ["memories", "--help"]).output


def test_the_paper_takes_the_top_left_pixel_of_a_patch() -> None:
    study = IdentifiabilityStudy(StudyConfig(small_vit(), "small", variant="paper"))
    assert study.patch_rule == "nearest"
    mask = torch.randint(0, 2, (SIDE, SIDE), dtype=torch.uint8)
    assert torch.equal(patch_mask(mask, (4, 4), study.patch_rule), mask[::8, ::8])
