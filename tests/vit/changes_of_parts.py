"""Changes of attention, MLPs and norms: what a block computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from vit.changed import Parts, random_images, small, unseen
from vit.changes import (
    EITHER,
    EXACT,
    REFUSED,
    TIMM,
    WITH_HUGGING_FACE,
    WITH_TORCHVISION,
    Wrapped,
    after_first,
    change,
    entered,
    hooked,
    linear,
    scaled,
    vector,
)

# -- Replaced forwards and users' hooks, by part


def on(name: str, edit: Callable[[Any], None]) -> Callable[[Parts], None]:
    return lambda p: edit(p.get(name, 1))


for part in ("attn", "proj", "mlp", "fc2", "norm2"):
    change(f"{part}: forward replaced", EITHER, names="block")(on(part, scaled))
for part in ("attn", "fc2", "norm1"):
    change(f"{part}: a hook that scales", EITHER, libraries=WITH_HUGGING_FACE)(
        on(part, lambda module: hooked(module, lambda x: 1.3 * x))
    )
for part in ("proj", "mlp", "norm2"):
    label = f"{part}: a hook of all but the first image"
    change(label, EITHER, libraries=WITH_TORCHVISION)(
        on(part, lambda m: hooked(m, lambda x: after_first(x, lambda rest: rest + vector())))
    )
for part in ("attn", "proj", "fc2"):
    change(f"{part}: a hook before that scales", EITHER)(
        on(part, lambda module: entered(module, lambda x: 1.3 * x))
    )


@change("the values shifted by a hook", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    attention = p.get("attn", 1)
    name = "qkv" if p.library == "timm" else "v_proj"
    hooked(getattr(attention, name), lambda x: x + 0.3)


@change("a head of attention cut by a hook", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    kept = torch.ones(32, dtype=torch.float64).index_fill_(0, torch.arange(8), 0.0)
    entered(p.get("proj", 1), lambda x: x * kept)


@change("a hook of every module of torch", EITHER)
def _(p: Parts) -> Callable[[], None]:
    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        return 1.1 * output if module is p.get("norm2", 1) else None

    return register_module_forward_hook(hook).remove


@change("a recorder of every module of torch", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> Callable[[], None]:
    return register_module_forward_hook(lambda *_: None).remove


@change("a hook that runs the model on other images", EITHER)
def _(p: Parts) -> None:
    running: list[bool] = []

    def hook(*_: Any) -> None:
        if not running:
            running.append(True)
            with unseen(), torch.no_grad():
                p.model(random_images(3).flip(0) * 2)
            running.pop()

    p.get("attn", 1).register_forward_hook(hook)
    p.get("norm2", 2).register_forward_pre_hook(hook)


# -- Attention


@change("attention unfused", EXACT, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    if p.library == "timm":
        p.get("attn", 1).fused_attn = False
    else:
        p.model.set_attn_implementation("eager")


@change("the scale of fused attention", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    name = "scale" if p.library == "timm" else "scaling"
    setattr(p.get("attn", 1), name, 0.9)


@change("the scale of unfused attention", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.get("attn", 1).fused_attn = False
    p.get("attn", 1).scale = 0.9


@change("queries and keys normed", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    attention = p.get("attn", 1)
    attention.q_norm, attention.k_norm = nn.LayerNorm(8).double(), nn.LayerNorm(8).double()


@change("a norm before W_O", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.get("attn", 1).norm = nn.LayerNorm(32).double()


@change("a gate before W_O", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.get("attn", 1).gate = linear(32, 32)


@change("fewer heads", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    attention = p.get("attn", 1)
    attention.num_heads, attention.head_dim, attention.scale = 2, 16, 16**-0.5


@change("another projection of queries, keys and values", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.get("attn", 1).qkv = linear(32, 96)


@change("another projection of values", EITHER, libraries=("hugging face",))
def _(p: Parts) -> None:
    p.get("attn", 1).v_proj = linear(32, 32)


@change("another W_O", EITHER)
def _(p: Parts) -> None:
    new = linear(32, 32)
    if p.library == "torchvision":
        new = type(p.get("proj", 1))(32, 32).double()
    p.put("proj", new, 1)


@change("W_O and dropout in a sequence", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    p.put("proj", nn.Sequential(p.get("proj", 1), nn.Dropout(0.1)).eval(), 1)


@change("W_O with an activation behind it", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    p.put("proj", nn.Sequential(p.get("proj", 1), nn.Tanh()), 1)


@change("an attention mask", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    mask = torch.randn(17, 17, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    forward = p.get("attn", 1).forward
    p.get("attn", 1).forward = lambda x, *_, **__: forward(x, mask[None, None])


@change("a causal mask", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.get("attn", 1).forward = partial(p.get("attn", 1).forward, is_causal=True)


@change("a mask passed to blocks", EITHER)
def _(p: Parts) -> None:
    mask = torch.randn(17, 17, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        if p.library == "torchvision":
            return args, {**kwargs, "attn_mask": mask}
        name = "attn_mask" if p.library == "timm" else "attention_mask"
        return args[:1], {**kwargs, name: mask[None, None]}

    p.get("attn", 1).register_forward_pre_hook(hook, with_kwargs=True)


@change("attention of fewer tokens", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    entered(p.get("attn", 1), lambda x: torch.cat([x[:, :1], x[:, 1:] * 0 + vector()], 1))


@change("attention left out", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    scaled(p.get("attn", 1), 0.0)


@change("attention inside a wrapper", EITHER)
def _(p: Parts) -> None:
    p.put("attn", Wrapped(p.get("attn", 1), 1.1), 1)


def parallel(_: str) -> nn.Module:
    return small("timm", block_fn=ParallelThingsBlock, init_values=0.5)


@change("the first of two attention modules", EITHER, libraries=TIMM, make=parallel)
def _(p: Parts) -> None:
    hooked(p.blocks[1].attns[0].attn, lambda x: 1.5 * x)


@change("the first of two MLPs", EITHER, libraries=TIMM, make=parallel)
def _(p: Parts) -> None:
    hooked(p.blocks[1].ffns[0].mlp, lambda x: 1.5 * x)


@change("NaN in the first of two MLPs", REFUSED, libraries=TIMM, make=parallel)
def _(p: Parts) -> None:
    p.blocks[1].ffns[0].mlp.fc1.weight.data[0, 0] = torch.nan


# -- MLPs, norms and branches


@change("another activation", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.put("act", nn.ReLU(), 1)


@change("another MLP", EITHER)
def _(p: Parts) -> None:
    p.put("fc1", linear(32, 48), 1)
    p.put("fc2", linear(48, 32), 1)


@change("an MLP inside a wrapper", EITHER)
def _(p: Parts) -> None:
    p.put("mlp", Wrapped(p.get("mlp", 1), 1.1), 1)


@change("an MLP that does nothing", EITHER)
def _(p: Parts) -> None:
    p.put("mlp", nn.Identity(), 1)


@change("an MLP that mixes tokens", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    entered(p.get("mlp", 1), lambda x: x + x.mean(1, keepdim=True))


@change("eps of a norm", EXACT)
def _(p: Parts) -> None:
    p.get("norm1", 1).eps = 0.5
    p.get("norm2", 2).eps = 0.5


@change("eps of the last norm", EXACT)
def _(p: Parts) -> None:
    p.get("norm").eps = 0.5


@change("a block's norm left out", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.put("norm1", nn.Identity(), 1)


@change("the last norm left out", EITHER)
def _(p: Parts) -> None:
    p.put("norm", nn.Identity())


@change("a root-mean-square norm at the end", EITHER)
def _(p: Parts) -> None:
    p.put("norm", nn.RMSNorm(32).double())


@change("a last norm without scale", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.put("norm", nn.LayerNorm(32, elementwise_affine=False).double())


@change("the last norm's forward replaced", EITHER)
def _(p: Parts) -> None:
    scaled(p.get("norm"))


@change("LayerScale put in", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.blocks[1].ls1 = LayerScale(32, 0.3).double()
    p.blocks[2].ls2 = LayerScale(32, 0.6).double()


@change("drop path, switched off", EXACT, libraries=TIMM)
def _(p: Parts) -> None:
    p.blocks[1].drop_path1 = DropPath(0.3).eval()


@change("a branch scaled through drop path", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    hooked(p.blocks[1].drop_path1, lambda x: 0.5 * x)


# -- Modes


@change("train mode without anything random", EXACT)
def _(p: Parts) -> None:
    p.model.train()


@change("dropout of one block", REFUSED)
def _(p: Parts) -> None:
    for module in p.blocks[1].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
            module.train()
    if p.library != "hugging face":
        return
    p.get("attn", 1).train()
    p.get("attn", 1).attention_dropout = 0.3


@change("drop path of one block", REFUSED, libraries=TIMM)
def _(p: Parts) -> None:
    p.blocks[1].drop_path1 = DropPath(0.5).train()


@change("dropout of the function's own", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.get("mlp", 1), lambda x: nn.functional.dropout(x, 0.3, training=True))


@change("dropout of patches", REFUSED, libraries=TIMM)
def _(p: Parts) -> None:
    from timm.layers import PatchDropout

    p.model.patch_drop = PatchDropout(0.25, num_prefix_tokens=1).train()
