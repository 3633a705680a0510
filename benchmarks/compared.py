"""Methods of other packages as methods of the study ``faithfulness``: importing registers them.

    python benchmarks/compared.py study faithfulness --model … --method captum-saliency …

is the command line with them. Captum's own methods, Grad-CAM, and other packages' code where they
are installed: ``pip install -e ".[bench,peers]"``, and ``pip install --no-deps lxt``, whose rules
alone are read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import peers
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, Saliency
from peers import Maps, last_norm
from torch import Tensor, nn

from captum_classemb.attr import PatchAttribution, register_method
from captum_classemb.evaluation.removal_order import patch_sums
from captum_classemb.vit import ViT


class OtherMethod(PatchAttribution):
    """A function from images and targets to maps B×h×w, as a method like those of the package."""

    def __init__(self, build: Callable[[ViT], Maps], model: nn.Module) -> None:
        super().__init__(model)
        self.make = build(self.vit)

    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        index = torch.as_tensor(target, device=pixels.device).expand(len(pixels))
        return self.make(pixels, index)[:, None]

    def attribute_classes(
        self, inputs: Any, classes: Sequence[int] | None = None, additional_forward_args: Any = None
    ) -> Tensor:
        """One class after another."""
        wanted = range(self.vit.num_classes) if classes is None else classes
        return torch.cat([self.attribute_patches(inputs, c) for c in wanted], 1)


def _captum(
    cls: Callable[[ViT], Any], absolute: bool = False, **options: Any
) -> Callable[[ViT], Maps]:
    def build(vit: ViT) -> Maps:
        attribution = cls(vit)

        def maps(images: Tensor, target: Tensor) -> Tensor:
            size = (images.shape[2], images.shape[3])
            masks = {"feature_mask": vit.feature_mask(size).to(images.device)}
            more = masks if cls is FeatureAblation else {}
            scores = attribution.attribute(images, target=target, **options, **more).detach()
            return patch_sums(scores.abs() if absolute else scores, vit.grid(size))

        return maps

    return build


@contextmanager
def kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns, with its graph."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def grad_cam(vit: ViT) -> Maps:
    """Grad-CAM at the first norm of the last block."""

    def maps(images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad(), kept(last_norm(vit)) as outputs:
            score = vit(images).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, outputs[0])
        tokens, prefix = outputs[0].detach()[:, vit.prefix_tokens :], vit.prefix_tokens
        weights = gradient[:, prefix:].mean(1, keepdim=True)
        grid = vit.grid((images.shape[2], images.shape[3]))
        return (tokens * weights).sum(-1).relu().unflatten(1, grid)

    return maps


#: Name, what its map shows, how it is made, and the library it needs beside this package.
OTHERS: dict[str, tuple[str, Callable[[ViT], Maps], str]] = {
    "captum-integrated-gradients": (
        "Integrated Gradients, 20 steps",
        _captum(IntegratedGradients, n_steps=20, internal_batch_size=16),
        "",
    ),
    "captum-input-x-gradient": ("Input × Gradient", _captum(InputXGradient), ""),
    "captum-saliency": ("Saliency", _captum(Saliency, absolute=True), ""),
    "captum-feature-ablation": (
        "Patches set to 0, one at a time",
        _captum(FeatureAblation, perturbations_per_eval=4),
        "",
    ),
    "grad-cam": ("Grad-CAM at the last block", grad_cam, ""),
    "pytorch-grad-cam": ("Grad-CAM of grad-cam", peers.grad_cam, "pytorch_grad_cam"),
    "legrad-torch": ("LeGrad of legrad_torch", peers.legrad, "legrad"),
    "lxt-cp-lrp": ("CP-LRP of lxt", peers.cp_lrp, "lxt"),
    "lxt-attnlrp": ("AttnLRP of lxt", peers.attn_lrp, "lxt"),
}

for _name, (_caption, _build, _library) in OTHERS.items():
    if not _library or importlib.util.find_spec(_library):
        register_method(_name, _caption)(partial(OtherMethod, _build))

if __name__ == "__main__":
    from captum_classemb.cli import main

    main()
