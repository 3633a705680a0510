"""Other packages' own code on a timm ViT: images and targets to maps B×h×w."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.evaluation.removal_order import patch_sums
from captum_classemb.vit import ViT

Maps = Callable[[Tensor, Tensor], Tensor]


def last_norm(vit: ViT) -> nn.Module:
    """The first norm of the last block, where Grad-CAM is usually put.

    At the last norm of a model that reads a class token, patches have no gradient at all.
    """
    norms = [m for m in vit.blocks[-1].module.modules() if "Norm" in type(m).__name__]
    return norms[0]


def grad_cam(vit: ViT) -> Maps:
    """Grad-CAM of the package grad-cam."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def maps(images: Tensor, target: Tensor) -> Tensor:
        grid = vit.grid((images.shape[2], images.shape[3]))

        def reshape(tokens: Tensor) -> Tensor:
            patches: Tensor = tokens[:, vit.prefix_tokens :].transpose(1, 2).unflatten(2, grid)
            return patches

        with GradCAM(vit, [last_norm(vit)], reshape_transform=reshape) as cam:
            scores = cam(images, [ClassifierOutputTarget(int(c)) for c in target])
        # The library enlarges its map to the image; the sum over a patch is the patch's score.
        return patch_sums(torch.from_numpy(scores)[:, None], grid).to(images.device)

    return maps


def legrad(vit: ViT, layer_index: int = -2) -> Maps:
    """LeGrad of the package legrad_torch, which explains the last two blocks unless told otherwise.

    Its map is made of a CLIP model's attention, and tokens after blocks; a timm ViT of the same
    names gives both. Features are scaled to length 1 there: those of a LayerNorm have the length
    √D whatever the token, so that with the norm's weight moved into the class the cosine is the
    logit, but for a constant factor and the bias.
    """
    from legrad import LeWrapper

    model: Any = vit.model
    norm, head, blocks = model.norm, model.head, model.blocks
    if vit.prefix_tokens != 1 or not isinstance(head, nn.Linear):
        raise ValueError("legrad_torch reads one class token, and here a linear classifier.")
    unscaled = partial(F.layer_norm, normalized_shape=norm.normalized_shape, eps=norm.eps)

    def maps(images: Tensor, target: Tensor) -> Tensor:
        visual = SimpleNamespace(
            transformer=SimpleNamespace(resblocks=blocks),
            ln_post=unscaled,
            proj=torch.eye(norm.normalized_shape[0]).to(images),
            zero_grad=model.zero_grad,
        )
        depth = layer_index % len(blocks)
        # Not enlarged: a patch stays one number.
        clip = SimpleNamespace(visual=visual, starting_depth=depth, patch_size=1)
        classes = (head.weight[target] * norm.weight).detach()
        with torch.enable_grad(), _as_legrad_wants(blocks):
            model(images.detach().requires_grad_())
            scores: Tensor = LeWrapper.compute_legrad_clip(clip, classes)[0]
        return scores.detach()

    return maps


@contextmanager
def _as_legrad_wants(blocks: nn.Module) -> Iterator[None]:
    """Keep each block's tokens N×B×D and attention (B·H)×N×N where legrad_torch looks for them."""

    def keep_attention(module: Any, args: Any, output: Tensor, attention: Any) -> Tensor:
        attention.attention_maps = output.flatten(0, 1)
        return attention.attention_maps.view_as(output)

    def keep_tokens(module: Any, args: Any, output: Tensor) -> None:
        module.feat_post_mlp = output.transpose(0, 1)

    with ExitStack() as stack:
        for block in blocks.children():
            attention: Any = block.attn
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            hook = partial(keep_attention, attention=attention)
            stack.callback(attention.attn_drop.register_forward_hook(hook).remove)
            stack.callback(block.register_forward_hook(keep_tokens).remove)
            stack.callback(attention.__dict__.pop, "attention_maps", None)
            stack.callback(block.__dict__.pop, "feat_post_mlp", None)
        yield


def lxt_rules() -> ModuleType:
    """lxt's rules by themselves: its package also imports models that transformers 5 has not."""
    spec = importlib.util.find_spec("lxt.efficient")
    assert spec is not None
    sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    return importlib.import_module("lxt.efficient.patches")


def cp_lrp(vit: ViT) -> Maps:
    """What lxt does to ViTs: rules for norms and activations, attention frozen (its ``cp_LRP``)."""
    return _lrp(vit, lxt_rules().cp_wrap_attention_forward)


def attn_lrp(vit: ViT) -> Maps:
    """What lxt does to language models: relevance goes through attention too (``attnLRP``)."""
    return _lrp(vit, lxt_rules().wrap_attention_forward)


def _lrp(vit: ViT, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Maps:
    """Tokens that enter the first block × their gradient under the rules of lxt."""
    rules = lxt_rules()
    split = wrap(lambda module, *parts: torch.cat(parts, -1))

    def through_attention(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return split(module, *output.chunk(3, -1))

    def maps(images: Tensor, target: Tensor) -> Tensor:
        tokens: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens.append(args[0].detach().requires_grad_())
            return (tokens[0], *args[1:])

        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(patched(vit.model, nn.GELU, rules.non_linear_forward))
            stack.enter_context(patched(vit.model, nn.LayerNorm, rules.layer_norm_forward))
            first = vit.blocks[0].module.register_forward_pre_hook(keep)
            stack.callback(first.remove)
            for block in vit.blocks:
                qkv: Any = block.module.attn.qkv
                stack.callback(qkv.register_forward_hook(through_attention).remove)
            score = vit.model(images).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, tokens[0])
        relevance = (tokens[0].detach() * gradient).sum(-1)[:, vit.prefix_tokens :]
        return relevance.unflatten(1, vit.grid((images.shape[2], images.shape[3])))

    return maps


@contextmanager
def patched(
    model: nn.Module, kind: type[nn.Module], forward: Callable[..., Tensor]
) -> Iterator[None]:
    """Call lxt's rule for every module of a kind; its rules look for ``original_forward``."""
    changed: list[Any] = [m for m in model.modules() if isinstance(m, kind)]
    for module in changed:
        module.original_forward = module.forward
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward, module.original_forward
