"""Every Captum-style method of the package; a new one is one line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from captum_classemb.attr import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    LayerClassEmbeddingProjection,
    LayerMemoryContribution,
    MemoryPatchImportance,
    baselines,
)
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.readout import LinearProbe, ProbeHeads
from captum_classemb.vit import adapt


def probe_importance(model: Any) -> Any:
    """Probes of every block with weights drawn at random."""
    vit = adapt(model)
    classes, width = vit.readout.parts[0].head.weight.shape  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(2)
    heads = {
        (block, "resid_post"): ProbeHeads(
            torch.randn(2, classes, width, generator=generator),
            torch.randn(2, classes, generator=generator),
        )
        for block in range(len(vit.blocks))
    }
    probe = LinearProbe(vit.readout, heads, vit.prefix_tokens)
    return baselines.LinearProbeImportance(model, probe)


#: Methods that score pixels, made from a model: attributions have the shape of the images.
PIXEL_METHODS: dict[str, Callable[[Any], Any]] = {
    "patch importance": PatchImportance,
    "all paths": AllPathImportance,
    "all paths, log-probability": partial(AllPathImportance, objective="log_probability"),
    "projection": ClassEmbeddingProjection,
    "projection, log-probability": partial(ClassEmbeddingProjection, score="log_probability"),
    "projection, probability": partial(ClassEmbeddingProjection, score="probability"),
    "projection, identifiability": partial(
        ClassEmbeddingProjection, score="identifiability", site="attn_out", block=1
    ),
    "gradient": ClassEmbeddingGradient,
    "gradient, log-probability": partial(ClassEmbeddingGradient, objective="log_probability"),
    "gradient, logit, some heads": partial(
        ClassEmbeddingGradient, objective="logit", blocks=[0, 2], heads=[1]
    ),
    "memory": MemoryPatchImportance,
    "memory, log-probability": partial(MemoryPatchImportance, objective="log_probability"),
    "attention rollout": baselines.AttentionRollout,
    "raw attention": baselines.RawAttention,
    "relevance of Chefer et al.": baselines.CheferRelevance,
    "LeGrad": baselines.LeGrad,
    "CP-LRP": baselines.CPLRP,
    "LibraGrad": baselines.LibraFullGrad,
    "token occlusion": baselines.TokenOcclusion,
    "linear probes": probe_importance,
}

#: Methods that score the tokens of one module.
LAYER_METHODS: dict[str, Callable[[Any], Any]] = {
    "projection of a block": lambda model: LayerClassEmbeddingProjection(model, model.blocks[1]),
    "memories of an MLP": lambda model: LayerMemoryContribution(model, model.blocks[1].mlp),
    "memories of attention": lambda model: LayerMemoryContribution(model, model.blocks[2].attn),
}

METHODS = PIXEL_METHODS | LAYER_METHODS

#: Maps that do not depend on the target, or only on the order of classes.
BLIND_TO_THE_TARGET = {"attention rollout", "raw attention"}
