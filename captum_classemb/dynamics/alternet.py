"""AlterNet: a pre-activation ResNet whose stages end in local attention (Park & Kim 2022, §4).

Importing this module registers ``alternet_18``, ``_34``, ``_50``, ``_101`` and ``_152`` with timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from captum_classemb.errors import InputError

# Attention blocks by stage in the published models, where the stage is deep enough.
_PUBLISHED_COUNTS: Final = (0, 1, 3, 2)
_HEAD_WIDTH: Final = 64
# Images up to this side get a stem that does not subsample.
_SMALL: Final = 64


def attention_blocks(
    depths: Sequence[int], counts: Sequence[int] | None = None
) -> tuple[tuple[bool, ...], ...]:
    """Which blocks of a ResNet become attention, by stage.

    A stage ends in pairs of a convolution and an attention block, as many as its count says.

    Args:
        depths: number of blocks of each stage.
        counts: number of attention blocks of each stage; None gives the published models' 0, 1,
            3, 2, or as many as fit.

    Returns:
        For each stage, for each block, whether it is attention.

    Raises:
        InputError: a stage has fewer than twice as many blocks as it should have attention blocks.

    Examples:
        >>> attention_blocks((2, 4))
        ((False, False), (False, False, False, True))
    """
    if counts is None:
        counts = [min(c, d // 2) for c, d in zip(_PUBLISHED_COUNTS, depths, strict=False)]
    fits = [0 <= 2 * c <= d for c, d in zip(counts, depths, strict=False)]
    if len(counts) != len(depths) or not all(fits):
        raise InputError(
            f"Stages of {tuple(depths)} blocks take at most {tuple(d // 2 for d in depths)} "
            f"attention blocks, not {tuple(counts)}."
        )
    return tuple(
        (False,) * (d - 2 * c) + (False, True) * c for d, c in zip(depths, counts, strict=True)
    )


def build_up(
    depths: Sequence[int], improves: Callable[[tuple[int, ...]], bool]
) -> Iterator[tuple[int, ...]]:
    """Build up an AlterNet by the paper's rule, one attention block at a time.

    Convolutions are replaced alternately from the end of the network; where the added attention
    block does not help, the next is put at the end of the stage before (§4.1).

    Args:
        depths: number of blocks of each stage.
        improves: told the attention blocks by stage of a trial, says whether it is better than
            what was kept last: for instance by training it.

    Yields:
        The attention blocks by stage of each model that was kept.

    Examples:
        >>> list(build_up((2, 2, 4), lambda counts: counts[-1] < 2))
        [(0, 0, 1), (0, 1, 1), (1, 1, 1)]
    """
    counts = [0] * len(depths)
    for stage in reversed(range(len(depths))):
        while 2 * (counts[stage] + 1) <= depths[stage]:
            trial = [c + (i == stage) for i, c in enumerate(counts)]
            if not improves(tuple(trial)):
                break
            counts = trial
            yield tuple(counts)


class LocalAttention(nn.Module):
    """Multi-head attention within windows, with one table of relative positions for all heads.

    Args:
        width: channels that come in.
        out: channels that go out.
        heads: number of heads, 64 wide each.
        window: side of a window.
    """

    positions: Tensor

    def __init__(self, width: int, out: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        inner = heads * _HEAD_WIDTH
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.proj = nn.Conv2d(inner, out, 1)
        side = 2 * window - 1
        self.relative_position = nn.Parameter(torch.empty(side, side))
        trunc_normal_(self.relative_position, std=0.02)
        place = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1
        ).flatten(0, 1)
        offset = place[None] - place[:, None] + window - 1
        self.register_buffer("positions", offset[..., 0] * side + offset[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """B×C×h×w to B×out×h×w; h and w must be multiples of the window."""
        b, _, h, w = x.shape
        p = self.window
        if h % p or w % p:
            raise InputError(
                f"Attention in windows of {p}×{p} needs feature maps of a multiple of that, not "
                f"{h}×{w}: give images of another size, or another window_size."
            )
        rows, columns = h // p, w // p
        # B×(3·H·d)×(rows·p)×(columns·p) to 3×(B·rows·columns)×H×p²×d
        qkv = self.qkv(x).view(b, 3, self.heads, _HEAD_WIDTH, rows, p, columns, p)
        qkv = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3).reshape(
            3, b * rows * columns, self.heads, p * p, _HEAD_WIDTH
        )
        bias = self.relative_position.flatten()[self.positions]
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias.to(qkv.dtype))
        mixed = mixed.view(b, rows, columns, self.heads, p, p, _HEAD_WIDTH)
        mixed = mixed.permute(0, 3, 6, 1, 4, 2, 5).reshape(b, -1, h, w)
        output: Tensor = self.proj(mixed)
        return output


class _ConvBlock(nn.Module):
    """Pre-activation residual block: two 3×3 convolutions, or a bottleneck of 1×1, 3×3, 1×1."""

    def __init__(
        self, width_in: int, width: int, stride: int, expansion: int, drop_path: float
    ) -> None:
        super().__init__()
        out = width * expansion
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or width_in != out:
            self.shortcut = nn.Conv2d(width_in, out, 1, stride, bias=False)
        if expansion == 1:
            shapes = [(width_in, width, 3, stride), (width, out, 3, 1)]
        else:
            shapes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[0]) for shape in shapes)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in shapes
        )
        self.act = nn.ReLU()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = self.act(norm(x))
            if i == 0 and self.shortcut is not None:
                skip = self.shortcut(x)
            x = conv(x)
        output: Tensor = skip + self.drop_path(x)
        return output


class _AttentionBlock(nn.Module):
    """Pre-activation residual block of a 1×1 convolution and local attention."""

    def __init__(
        self, width: int, expansion: int, heads: int, window: int, drop_path: float
    ) -> None:
        super().__init__()
        out = width * expansion
        self.norm1 = nn.BatchNorm2d(out)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(out, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.attn = LocalAttention(width, out, heads, window)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(self.norm2(self.conv(self.act(self.norm1(x)))))
        output: Tensor = x + self.drop_path(mixed)
        return output


class AlterNet(nn.Module):
    """A pre-activation ResNet whose stages end in attention blocks.

    Args:
        depths: blocks of each stage.
        counts: attention blocks of each stage, see :func:`attention_blocks`.
        widths: width of each stage, before a bottleneck's expansion.
        heads: attention heads by stage, 64 wide each.
        block: two 3×3 convolutions, or a bottleneck that widens fourfold.
        img_size: side of the images, or H, W. Up to 64 the stem is one 3×3 convolution, beyond
            that a 7×7 one of stride 2 and a max pooling.
        window_size: side of the attention windows; None takes 7, or 4 where 7 does not divide the
            feature maps.
        num_classes: C; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: "avg", or "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly over the blocks.

    Raises:
        InputError: no window fits the feature maps.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 4),
        counts: Sequence[int] | None = None,
        widths: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (3, 6, 12, 24),
        block: Literal["basic", "bottleneck"] = "bottleneck",
        img_size: int | tuple[int, int] = 224,
        window_size: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        expansion = 1 if block == "basic" else 4
        pattern = attention_blocks(depths, counts)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1] * expansion
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        small = max(size) <= _SMALL
        grids = []
        for i in range(len(depths)):
            stride = (1 if small else 4) << i
            grids.append((-(-size[0] // stride), -(-size[1] // stride)))
        attended = [grid for grid, row in zip(grids, pattern, strict=True) if any(row)]
        window = _window(attended, window_size)
        self.stem: nn.Module
        if small:
            self.stem = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, widths[0], 7, 2, padding=3, bias=False),
                nn.MaxPool2d(3, 2, padding=1),
            )
        last = max(sum(depths) - 1, 1)
        drops = [drop_path_rate * i / last for i in range(sum(depths))]
        stages = []
        width_in = widths[0]
        for i, (row, width) in enumerate(zip(pattern, widths, strict=True)):
            blocks: list[nn.Module] = []
            for j, attention in enumerate(row):
                drop = drops.pop(0)
                if attention:
                    blocks.append(_AttentionBlock(width, expansion, heads[i], window, drop))
                else:
                    stride = 2 if i and not j else 1
                    blocks.append(_ConvBlock(width_in, width, stride, expansion, drop))
                width_in = width * expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width_in)
        self.act = nn.ReLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.fc = nn.Linear(width_in, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """B×3×H×W to B×D×h×w."""
        features: Tensor = self.act(self.norm(self.stages(self.stem(x))))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """B×D×h×w to logits B×C, or to B×D before the classifier."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        logits: Tensor = x if pre_logits else self.fc(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """B×3×H×W to logits B×C."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["avg", ""] | None = None
    ) -> None:
        """Put a new last layer in."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers should not decay."""
        return {n for n, _ in self.named_parameters() if n.endswith("relative_position")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups the layers for layer-wise learning rates."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        )
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused: these models fit without."""
        if enable:
            raise InputError("AlterNet has no gradient checkpointing.")


def _window(grids: Sequence[tuple[int, int]], asked: int | None) -> int:
    """The window that divides every grid with attention."""
    for window in (7, 4) if asked is None else (asked,):
        if all(h % window == 0 and w % window == 0 for h, w in grids):
            return window
    sizes = ", ".join(f"{h}×{w}" for h, w in grids)
    windows = "7×7 or 4×4" if asked is None else f"{asked}×{asked}"
    raise InputError(
        f"Feature maps of {sizes} cannot be divided into windows of {windows}: give an img_size "
        "or window_size that fits, such as 224 and 7 or 32 and 4."
    )


_CFG: Final[dict[str, Any]] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stem.0",
    "classifier": "fc",
}

default_cfgs = generate_default_cfgs(
    {f"alternet_{depth}.untrained": _CFG for depth in (18, 34, 50, 101, 152)}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> AlterNet:
    model: AlterNet = build_model_with_cfg(AlterNet, name, pretrained, **kwargs)
    return model


@register_model
def alternet_18(pretrained: bool = False, **kwargs: Any) -> AlterNet:
    """Alter-ResNet-18."""
    shape = {"depths": (2, 2, 2, 2), "block": "basic"}
    return _create("alternet_18", pretrained, **{**shape, **kwargs})


@register_model
def alternet_34(pretrained: bool = False, **kwargs: Any) -> AlterNet:
    """Alter-ResNet-34."""
    shape = {"depths": (3, 4, 6, 4), "block": "basic"}
    return _create("alternet_34", pretrained, **{**shape, **kwargs})


@register_model
def alternet_50(pretrained: bool = False, **kwargs: Any) -> AlterNet:
    """Alter-ResNet-50."""
    return _create("alternet_50", pretrained, **{"depths": (3, 4, 6, 4), **kwargs})


@register_model
def alternet_101(pretrained: bool = False, **kwargs: Any) -> AlterNet:
    """Alter-ResNet-101."""
    return _create("alternet_101", pretrained, **{"depths": (3, 4, 23, 4), **kwargs})


@register_model
def alternet_152(pretrained: bool = False, **kwargs: Any) -> AlterNet:
    """Alter-ResNet-152."""
    return _create("alternet_152", pretrained, **{"depths": (3, 8, 36, 4), **kwargs})
