"""The four identities on every structural variant of timm's registry; by marker on all of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch.nn import functional as F

from captum_classemb.edit import knock_out, remove_tokens
from captum_classemb.vit import adapt, record

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_conformance.py"

#: One architecture for each way in which blocks, attention, pooling and readout are put together.
VARIANTS = (
    "vit_tiny_patch16_224",  # CLS, norm → token
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_base_patch16_rpn_224",  # post-norm blocks, mean → norm
    "vit_base_patch16_siglip_224",  # attention pooling, no prefix token
    "vit_base_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_giant_patch14_dinov2",  # packed SwiGLU
    "vit_small_patch16_36x1_224",  # LayerScale
    "vit_small_patch16_18x2_224",  # parallel attention modules
    "vit_base_patch16_xp_224",  # parallel scaling block, RMS norm
    "vit_dpwee_patch16_reg1_gap_256",  # differential attention in a parallel block
    "vit_dlittle_patch16_reg1_gap_256",  # differential attention
    "vit_base_mci_224",  # convolutional stem
    "vit_base_r50_s16_224",  # hybrid
    "deit_tiny_distilled_patch16_224",  # a pair of heads
    "eva02_tiny_patch14_224",  # rotary positions, split projections, gated MLP, norms inside
    "vit_base_patch16_rope_mixed_224",  # rotary positions learnt per block
    "vit_5b_patch16_sapiens2",  # shared keys and values
    "vit_pe_core_tiny_patch16_384",  # attention pooling over prefix tokens too
    "beit_base_patch16_224",  # relative positions, biases apart, mean → norm
    "vit_relpos_small_patch16_224",  # relative positions
    "vit_relpos_base_patch32_plus_rpn_256",  # relative positions in post-norm blocks
    "vit_srelpos_small_patch16_224",  # shared relative positions
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_map",
    "naflexvit_base_patch16_parfac_gap",
    "cait_xxs24_224",  # class attention
)


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_conformance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_identities_hold(name: str, conformance: ModuleType) -> None:
    row = conformance.check(name, "sample")
    assert row.outcome == "pass", row


@pytest.mark.parametrize(
    "name", [*VARIANTS[:-1], "vit_small_patch16_dinov3", "vit_small_patch16_rope_224"]
)
def test_removed_tokens_are_tokens_that_nobody_attends_to(
    name: str, conformance: ModuleType
) -> None:
    model = conformance.build(name)
    image = conformance.sample_input(model)
    images, vit = torch.cat([image, image.flip(-1)]), adapt(model)
    h, w = vit.grid((image.shape[2], image.shape[3]))
    keep = torch.rand(2, h * w) < torch.tensor([[0.3], [0.7]])
    keep[:, 0] = True
    seen = F.pad(keep, (vit.prefix_tokens, 0), value=True)
    with torch.no_grad(), remove_tokens(vit, keep):
        found = vit(images)
    with knock_out(vit, ~seen[:, None].expand(-1, seen.shape[1], -1)):
        tokens = record(vit, images, ["resid_post"])["resid_post"][-1]
    left = [tokens[i : i + 1, seen[i]][:, vit.readout.reads] for i in range(2)]
    expected = torch.cat([vit.readout(rows) for rows in left])
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, vit(images), rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "pit_ti_224", "mvitv2_tiny"]
)
def test_windowed_and_hierarchical_models_are_refused_with_the_reason(
    name: str, conformance: ModuleType
) -> None:
    row = conformance.check(name, "others")
    assert row.outcome.startswith("refused")
    assert "no single token grid" in row.outcome


@pytest.mark.registry
@pytest.mark.slow
def test_the_whole_registry(conformance: ModuleType) -> None:
    names = [
        (name, module) for module in conformance.PLAIN for name in timm.list_models(module=module)
    ]
    outcomes = {name: conformance.check(name, module).outcome for name, module in names}
    silent = {k: v for k, v in outcomes.items() if v != "pass" and not v.startswith("refused")}
    assert sum(v == "pass" for v in outcomes.values()) >= 250
    assert not silent
