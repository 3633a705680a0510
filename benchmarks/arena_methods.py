"""Who competes in the arena: each method as a function from images and targets to maps B×h×w."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arena_peers as peers
import torch
from arena_peers import Maps, last_norm
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_classemb.attr import (
    AllPathImportance,
    ClassEmbeddingGradient,
    MemoryPatchImportance,
)
from captum_classemb.attr.baselines import (
    CPLRP,
    AttentionRollout,
    CheferRelevance,
    LeGrad,
    LibraFullGrad,
    LinearProbeImportance,
    RawAttention,
    TokenOcclusion,
)
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.evaluation.removal_order import patch_sums
from captum_classemb.functional.grid import patch_index
from captum_classemb.readout import LinearProbe, load_readout
from captum_classemb.vit import ViT


@dataclass(frozen=True)
class Method:
    """A competitor.

    Attributes:
        name: what it is called in tables.
        build: from an adapted model to the function that makes its maps.
        one_pass: it needs one forward pass and no backward pass through the network.
        slow: the work of more than 50 forward passes an image (a backward pass is two), so it
            runs on the first images alone.
        peer: a library it needs beside this package, or None.
        version: what tells it from others of its name, such as the file it was read from.
    """

    name: str
    build: Callable[[ViT], Maps]
    one_pass: bool = False
    slow: bool = False
    peer: str | None = None
    version: str = ""

    @property
    def stem(self) -> str:
        """The beginning of the names of its files."""
        return "_".join([*self.name.split(), *filter(None, [self.version])])

    @property
    def installed(self) -> bool:
        """Whether the library it needs can be imported."""
        return self.peer is None or importlib.util.find_spec(self.peer) is not None


def _ours(cls: Callable[[ViT], Any]) -> Callable[[ViT], Maps]:
    def build(vit: ViT) -> Maps:
        attribution = cls(vit)

        def maps(images: Tensor, target: Tensor) -> Tensor:
            patches: Tensor = attribution.attribute_patches(images, target)
            return patches.flatten(1, -3).sum(1)

        return maps

    return build


def _captum(
    cls: Callable[[ViT], Any], absolute: bool = False, **options: Any
) -> Callable[[ViT], Maps]:
    def build(vit: ViT) -> Maps:
        attribution = cls(vit)

        def maps(images: Tensor, target: Tensor) -> Tensor:
            grid = vit.grid((images.shape[2], images.shape[3]))
            scores = attribution.attribute(images, target=target, **options).detach()
            return patch_sums(scores.abs() if absolute else scores, grid)

        return maps

    return build


def _random(vit: ViT) -> Maps:
    generator = torch.Generator().manual_seed(0)

    def maps(images: Tensor, target: Tensor) -> Tensor:
        grid = vit.grid((images.shape[2], images.shape[3]))
        return torch.rand(len(images), *grid, generator=generator).to(images.device)

    return maps


def _feature_ablation(vit: ViT) -> Maps:
    attribution = FeatureAblation(vit)

    def maps(images: Tensor, target: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        grid = vit.grid(size)
        mask = patch_index(size, grid)[None, None].to(images.device)
        scores = attribution.attribute(
            images, target=target, feature_mask=mask, perturbations_per_eval=4
        )
        return patch_sums(scores, grid)

    return maps


@contextmanager
def kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns, with its graph."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _grad_cam(vit: ViT) -> Maps:
    def maps(images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad(), kept(last_norm(vit)) as outputs:
            score = vit(images).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, outputs[0])
        tokens, prefix = outputs[0].detach()[:, vit.prefix_tokens :], vit.prefix_tokens
        weights = gradient[:, prefix:].mean(1, keepdim=True)
        grid = vit.grid((images.shape[2], images.shape[3]))
        return (tokens * weights).sum(-1).relu().unflatten(1, grid)

    return maps


def linear_probes(path: Path) -> Method:
    """The method that reads patches with the linear probes of a file."""

    def build(vit: ViT) -> Maps:
        probe = load_readout(path, vit.readout)
        if not isinstance(probe, LinearProbe):
            raise ValueError(f"{path} holds no linear probes.")
        return _ours(lambda model: LinearProbeImportance(model, probe))(vit)

    version = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return Method("linear probes", build, one_pass=True, version=version)


METHODS = (
    Method("PatchImportance", _ours(PatchImportance), one_pass=True),
    Method("Chefer relevance", _ours(CheferRelevance)),
    Method("AllPathImportance", _ours(AllPathImportance)),
    Method("LibraGrad FullGrad+", _ours(LibraFullGrad)),
    Method("CP-LRP", _ours(CPLRP)),
    Method("LeGrad", _ours(LeGrad)),
    Method("MemoryPatchImportance", _ours(MemoryPatchImportance), one_pass=True),
    Method("attention rollout", _ours(AttentionRollout), one_pass=True),
    Method("ClassEmbeddingGradient", _ours(ClassEmbeddingGradient), one_pass=True),
    Method("random order", _random),
    Method(
        "Integrated Gradients",
        _captum(IntegratedGradients, n_steps=20, internal_batch_size=16),
        slow=True,
    ),
    Method("raw attention", _ours(RawAttention), one_pass=True),
    Method("Grad-CAM", _grad_cam),
    Method("Input x Gradient", _captum(InputXGradient)),
    Method("Saliency", _captum(Saliency, absolute=True)),
    Method("token occlusion", _ours(TokenOcclusion), slow=True),
    Method("Grad-CAM (grad-cam)", peers.grad_cam, peer="pytorch_grad_cam"),
    Method("LeGrad (legrad_torch)", peers.legrad, peer="legrad"),
    Method("CP-LRP (lxt)", peers.cp_lrp, peer="lxt"),
    Method("AttnLRP (lxt)", peers.attn_lrp, peer="lxt"),
    Method("FeatureAblation", _feature_ablation, slow=True),
)
