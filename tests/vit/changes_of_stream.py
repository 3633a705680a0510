"""Changes of the residual stream: between blocks, of blocks, and of what tokens are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vit.changed import SMALL, Parts
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
    scaled,
    shuffled,
    vector,
)

# -- The stream between blocks


def along(name: str, allowed: frozenset[str] = EITHER) -> Callable[..., Any]:
    """A loop over blocks of the user's own."""

    def add(through: Callable[[Any, Tensor], Tensor]) -> None:
        change(name, allowed, libraries=WITH_HUGGING_FACE)(lambda p: p.walk(through))

    return add


@along("a loop that changes nothing", EXACT)
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@along("the first tokens added before every block")
def _(blocks: Any, x: Tensor) -> Tensor:
    first = x
    for block in blocks:
        x = block(x + 0.5 * first)
    return x


@along("the stream scaled between blocks")
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = 0.9 * block(x)
    return x


@along("the stream shifted before the last block")
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks[:-1]:
        x = block(x)
    return blocks[-1](x + vector())  # type: ignore[no-any-return]


@along("a long skip")
def _(blocks: Any, x: Tensor) -> Tensor:
    skipped = x = blocks[0](x)
    for block in blocks[1:-1]:
        x = block(x)
    return blocks[-1](x + skipped)  # type: ignore[no-any-return]


@along("every block twice")
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in (*blocks, *blocks):
        x = block(x)
    return x


@along("blocks in reverse")
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in reversed(blocks):
        x = block(x)
    return x


@along("a block left out by the loop")
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in (*blocks[:1], *blocks[2:]):
        x = block(x)
    return x


@along("a block left out for all images but the first")
def _(blocks: Any, x: Tensor) -> Tensor:
    x = blocks[0](x)
    x = after_first(blocks[1](x), lambda _: x[1:])
    for block in blocks[2:]:
        x = block(x)
    return x


@along("patches shuffled between blocks", REFUSED)
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = shuffled(block(x))
    return x


@along("the stream noisy", REFUSED)
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x + torch.randn_like(x))
    return x


@along("patches dropped on the way", REFUSED)
def _(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)[:, :-2]
    return x


@along("patches merged on the way", REFUSED)
def _(blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x)
        if i < 2:
            x = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (-1, 2)).mean(2)], 1)
    return x


@along("prompt tokens put before the patches", EITHER)
def _(blocks: Any, x: Tensor) -> Tensor:
    prompts = vector().expand(len(x), 2, -1)
    x = torch.cat([x[:, :1], prompts, x[:, 1:]], 1)
    for block in blocks:
        x = block(x)
    return x


@along("the embedding subtracted from the end")
def _(blocks: Any, x: Tensor) -> Tensor:
    first = x
    for block in blocks:
        x = block(x)
    return x - 0.5 * first


# -- Users' hooks on blocks


@change("a hook that steers", EITHER, names="block")
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: x + vector())


@change("a hook that scales", EITHER, libraries=WITH_TORCHVISION, names="block")
def _(p: Parts) -> None:
    hooked(p.blocks[2], lambda x: 1.2 * x)


@change("a hook that writes in place", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: x.mul_(1.2))


@change("a hook before a block that steers", EITHER)
def _(p: Parts) -> None:
    entered(p.blocks[2], lambda x: x + vector())


@change("a hook of all but the first image", EITHER)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: after_first(x, lambda rest: rest + vector()))


@change("a hook of one patch", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    mask = torch.zeros(17, 1, dtype=torch.float64).index_fill_(0, torch.tensor([9]), 1.0)
    hooked(p.blocks[1], lambda x: x + mask * vector())


@change("a hook that rounds a little", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: x.half().to(x.dtype))


@change(
    "a hook that puts NaN into one image",
    REFUSED,
    libraries=WITH_TORCHVISION,
    names="image 2|images? .*2",
)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: torch.cat([x[:2], x[2:] * torch.nan]))


@change("a hook that shuffles patches", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], shuffled)


@change("a hook that shuffles the patches of other images", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: after_first(x, shuffled))


@change("images exchanged on the way", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], lambda x: x.roll(1, 0))


@change("a recorder", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    kept: list[Any] = []
    for block in p.blocks:
        block.register_forward_hook(lambda _, __, output: kept.append(output))
        block.register_forward_pre_hook(lambda _, args: kept.append(args))


@change("recorders of every kind", EXACT)
def _(p: Parts) -> None:
    kept: list[Any] = []
    for module in p.model.modules():
        module.register_forward_hook(lambda *call: kept.append(len(call)), with_kwargs=True)
        module.register_forward_hook(lambda *_: None, always_call=True, prepend=True)
        module.register_forward_pre_hook(lambda *call: kept.append(len(call)), with_kwargs=True)


@change("a hook that returns a copy", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.blocks[1], torch.clone)
    entered(p.blocks[3], torch.clone)


@change("hooks of a backward pass", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.blocks[1].register_full_backward_hook(lambda *_: None)
    p.blocks[2].register_full_backward_pre_hook(lambda *_: None)


# -- Blocks


def rebuilt(p: Parts, order: list[int]) -> None:
    """The blocks in a container of the user's own."""
    blocks = [p.blocks[i] for i in order]
    kind = nn.ModuleList if p.library == "hugging face" else nn.Sequential
    p.put("blocks", kind(blocks) if kind is nn.ModuleList else kind(*blocks))


for label, order, allowed in (
    ("one block for all", [0, 0, 0, 0], EITHER),
    ("two blocks in turns", [0, 1, 0, 1], EITHER),
    ("blocks in another order", [2, 0, 3, 1], EITHER),
    ("a block fewer", [0, 1, 3], EITHER),
):
    change(label, allowed, libraries=WITH_HUGGING_FACE)(lambda p, order=order: rebuilt(p, order))


@change("a block that does nothing", EITHER)
def _(p: Parts) -> None:
    p.blocks[2] = nn.Identity() if p.library != "hugging face" else Skip()


class Skip(nn.Module):
    """Hands the tokens on."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


@change("a block inside a wrapper", EITHER)
def _(p: Parts) -> None:
    p.blocks[1] = Wrapped(p.blocks[1], 1.1)


@change("a block's forward replaced", EITHER, names="block")
def _(p: Parts) -> None:
    scaled(p.blocks[1])


@change("a block that shuffles inside", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    forward = p.blocks[1].forward
    p.blocks[1].forward = lambda x, *a, **k: shuffled(forward(x, *a, **k))


@change("a block without its skip", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    forward = p.blocks[1].forward
    p.blocks[1].forward = lambda x, *a, **k: forward(x, *a, **k) - x


@change("a block compiled", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.blocks[1] = torch.compile(p.blocks[1], backend="eager")


@change("a block compiled in place", EITHER, libraries=("torchvision",))
def _(p: Parts) -> None:
    p.blocks[1].compile(backend="eager")


@change("blocks checkpointed", EXACT, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.set_grad_checkpointing(True)


@change("a new block", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    torch.manual_seed(4)
    kind = type(p.blocks[1])
    p.blocks[1] = kind(32, SMALL["num_heads"], qkv_bias=True).double().eval()


@change("a block more", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    torch.manual_seed(4)
    kind = type(p.blocks[1])
    p.blocks.append(kind(32, SMALL["num_heads"], qkv_bias=True).double().eval())
