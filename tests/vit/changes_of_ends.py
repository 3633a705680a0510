"""Changes of how images become tokens, and tokens logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import randomise
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vit.changed import CLASSES, SMALL, Parts, random_images, small
from vit.changes import (
    EITHER,
    EXACT,
    REFUSED,
    TIMM,
    WITH_HUGGING_FACE,
    WITH_TORCHVISION,
    after_first,
    change,
    hooked,
    linear,
    scaled,
    shuffled,
)

# -- The head


@change("another head", EITHER)
def _(p: Parts) -> None:
    p.put("head", linear(32, CLASSES))


@change("a head of more classes", EITHER)
def _(p: Parts) -> None:
    p.put("head", linear(32, 40))


@change("the classifier reset to the mean", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.reset_classifier(9, "avg")
    p.model.head = linear(32, 9)


@change("pooling switched", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.global_pool = "avg"


@change("a norm before the head", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.fc_norm = nn.LayerNorm(32).double()


@change("dropout before the head", EITHER)
def _(p: Parts) -> None:
    p.put("head", nn.Sequential(nn.Dropout(0.2), p.get("head")).eval())


@change("a head of two layers", EITHER)
def _(p: Parts) -> None:
    p.put("head", nn.Sequential(linear(32, 16), nn.GELU(), linear(16, CLASSES)))


class Gated(nn.Module):
    """A linear head times a gate of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.gate = linear(32, CLASSES), linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.classes(x) * self.gate(x).sigmoid()
        return gated


class Cosine(nn.Linear):
    """Cosines between features and class embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        unit = nn.functional.normalize
        return 9 * nn.functional.linear(unit(x, dim=-1), unit(self.weight, dim=-1))


class Several(nn.Module):
    """Two rows of logits for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = linear(32, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.classes(x).unflatten(-1, (2, CLASSES))
        return rows


class Squeezed(nn.Linear):
    """One logit an image, as B numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 0]


for label, allowed, make in (
    ("a gated head", EITHER, Gated),
    ("a head of cosines", EITHER, lambda: Cosine(32, CLASSES).double()),
    ("a head of several rows", REFUSED, Several),
    ("a head of one logit, squeezed", EITHER, lambda: Squeezed(32, 1).double()),
    ("a head without layers", REFUSED, nn.Identity),
):
    change(label, allowed)(lambda p, make=make: p.put("head", make()))


@change("a head's forward replaced", EITHER)
def _(p: Parts) -> None:
    scaled(p.get("head"))


@change("a hook that scales logits a little", EITHER)
def _(p: Parts) -> None:
    hooked(p.get("head"), lambda z: 1.02 * z)


@change("a hook that shifts the logits of other images", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    hooked(p.get("head"), lambda z: after_first(z, lambda rest: rest + torch.arange(CLASSES)))


@change("a hook that turns logits into probabilities", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    hooked(p.get("head"), lambda z: z.softmax(-1))


def edit_logits(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return edit(output)
    output.logits = edit(output.logits)
    return output


@change("a hook on the model", EITHER)
def _(p: Parts) -> None:
    p.model.register_forward_hook(lambda _, __, out: edit_logits(out, lambda z: 1.5 * z))


@change("the model's forward replaced", EITHER)
def _(p: Parts) -> None:
    forward = p.model.forward
    p.model.forward = lambda *a, **k: edit_logits(
        forward(*a, **k), lambda z: z - z.mean(1, keepdim=True)
    )


@change("logits averaged over an image and its mirror", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    forward = p.model.forward

    def both(x: Tensor) -> Any:
        mirrored = forward(x.flip(-1))
        return edit_logits(forward(x), lambda z: (z + getattr(mirrored, "logits", mirrored)) / 2)

    p.model.forward = both


@change("the way from tokens to logits replaced", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.forward_head = lambda x, **_: p.model.head(x[:, 0] + x[:, 1:].mean(1))


@change("a model that returns its features too", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    forward = p.model.forward
    p.model.forward = lambda x: (forward(x), p.model.forward_features(x))


@change("outputs as tuples", EITHER, libraries=("hugging face",))
def _(p: Parts) -> None:
    forward = p.model.forward
    p.model.forward = lambda pixels: forward(pixels, return_dict=False)


def distilled(_: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(VisionTransformerDistilled(**SMALL)).double().eval()


@change("distilled heads replaced", EITHER, libraries=TIMM, make=distilled)
def _(p: Parts) -> None:
    p.model.head, p.model.head_dist = linear(32, 9), linear(32, 9)


@change("a distilled model that returns both", REFUSED, libraries=TIMM, make=distilled)
def _(p: Parts) -> None:
    p.model.forward_head = lambda x, **_: (p.model.head(x[:, 0]), p.model.head_dist(x[:, 1]))


class Doubled(VisionTransformer):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]


@change("a subclass with a forward of its own", EITHER, libraries=TIMM, late=False)
def _(p: Parts) -> nn.Module:
    p.model = randomise(Doubled(**SMALL)).double().eval()
    return p.model  # type: ignore[no-any-return]


# -- Dtypes: the readings are verified as strictly in every one


def in_half(dtype: torch.dtype) -> Callable[[str], nn.Module]:
    return lambda library: small(library).to(dtype)


for dtype, by in ((torch.bfloat16, 1.08), (torch.float16, 1.019)):
    change(
        f"logits scaled by {by} in {dtype}",
        REFUSED,
        make=in_half(dtype),
        libraries=WITH_TORCHVISION,
    )(lambda p, by=by: hooked(p.get("head"), lambda z: by * z))


def one_bright() -> Tensor:
    images = random_images()
    images[2] *= 8e3
    return images


@change(
    "an overflow in one image", REFUSED, make=in_half(torch.float16), images=one_bright,
    names="image 2|images? .*2", late=False,
)  # fmt: skip
def _(p: Parts) -> None:
    p.get("conv").weight.data.mul_(8)


# -- Pixels and patches


@change("patches shuffled by the embedding", REFUSED)
def _(p: Parts) -> None:
    hooked(p.get("conv"), lambda x: x.flip(-1))


@change("patches of other images shuffled", REFUSED, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    hooked(p.get("conv"), lambda x: after_first(x, lambda rest: rest.flip(-1)))


@change("patches shuffled before the blocks", REFUSED, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    forward = p.blocks[0].forward
    p.blocks[0].forward = lambda x, *a, **k: forward(shuffled(x), *a, **k)


@change("patches that see their neighbours", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    hooked(p.get("conv"), lambda x: x + x.roll(1, -1))


@change("patches that overlap", EITHER)
def _(p: Parts) -> None:
    torch.manual_seed(3)
    p.put("conv", nn.Conv2d(3, 32, 24, stride=8, padding=8).double())


@change("a patch left out by the embedding", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    kept = torch.ones(4, 4, dtype=torch.float64)
    kept[2, 1] = 0
    hooked(p.get("conv"), lambda x: x * kept)


@change("positions replaced", EXACT)
def _(p: Parts) -> None:
    p.put("positions", nn.Parameter(p.get("positions").detach().flip(1)))


@change("tokens normed before the blocks", EITHER, libraries=TIMM)
def _(p: Parts) -> None:
    p.model.norm_pre = nn.LayerNorm(32).double()


@change(
    "smaller patches", EITHER, libraries=TIMM, images=lambda: random_images(size=16)
)  # fmt: skip
def _(p: Parts) -> None:
    p.model.set_input_size(img_size=(16, 16), patch_size=(4, 4))


@change("larger images", EITHER, libraries=TIMM, images=lambda: random_images(size=48))
def _(p: Parts) -> None:
    p.model.set_input_size(img_size=(48, 48))


@change("images of any size", EITHER, libraries=TIMM, images=lambda: random_images(size=40))
def _(p: Parts) -> None:
    p.model.dynamic_img_size = p.model.patch_embed.dynamic_img_size = True
    p.model.patch_embed.flatten, p.model.patch_embed.strict_img_size = False, False
    p.model.patch_embed.output_fmt = "NHWC"


@change("one channel", EITHER, libraries=TIMM, images=lambda: random_images(channels=1))
def _(p: Parts) -> None:
    torch.manual_seed(3)
    p.put("conv", nn.Conv2d(1, 32, 8, stride=8).double())


class Rolled(nn.Module):
    """Pixels moved by one patch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(8, -1)


class OthersMirrored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return after_first(x, lambda rest: rest.flip(-1))


class Centre(nn.Module):
    """The middle 32×32 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        cut = (x.shape[-1] - 32) // 2
        return x[..., cut : cut + 32, cut : cut + 32]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.4) / 0.7


for label, allowed, first, size in (
    ("pixels scaled before", EXACT, Scaled(), 32),
    ("pixels repeated before", EITHER, nn.Upsample(scale_factor=2), 16),
    ("pixels averaged before", EITHER, nn.AvgPool2d(2), 64),
    ("a crop that leaves nothing out", EXACT, Centre(), 32),
    ("a crop before", EITHER, Centre(), 64),
    ("a margin put around", EITHER, nn.ZeroPad2d(4), 24),
    ("other images mirrored before", EITHER, OthersMirrored(), 32),
    ("pixels moved before", EITHER, Rolled(), 32),
):
    change(
        label,
        allowed,
        late=False,
        libraries=WITH_TORCHVISION,
        images=lambda size=size: random_images(size=size),
    )(lambda p, first=first: nn.Sequential(first, p.model))


@change("parallel over devices", EXACT, libraries=WITH_HUGGING_FACE, late=False)
def _(p: Parts) -> nn.Module:
    return nn.DataParallel(p.model)


@change("compiled", EITHER, late=False, libraries=TIMM)
def _(p: Parts) -> nn.Module:
    compiled: nn.Module = torch.compile(p.model, backend="eager")
    return compiled


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


@change("something behind the model", REFUSED, late=False, libraries=("timm", "torchvision"))
def _(p: Parts) -> nn.Module:
    return nn.Sequential(p.model, Centred())


@change("moved to float32 and back", EXACT, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    p.model.float().double()
