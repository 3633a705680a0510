"""Where the parts of a block are, written down once more and without the package's adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

ALL = slice(None)
NOTHING = nn.Identity()


def _flat(mixed: Tensor) -> Tensor:
    """Heads side by side: B×H×N×d to B×N×(H·d)."""
    return mixed.transpose(1, 2).flatten(2)


@dataclass
class AttentionPart:
    """One attention module of a block, from A·V to the residual stream.

    ``between`` are what A·V (B×H×N×d) passes before W_O, without the gate; ``outer`` lies between
    W_O and the residual stream, and is a LayerScale where ``scaled``. ``calls`` is 2 where two
    attention maps are subtracted, the second times ``factor``.
    """

    proj: nn.Module
    outer: nn.Module = NOTHING
    between: Callable[[Tensor], Tensor] = _flat
    gate: nn.Module | None = None
    scaled: bool = False
    norms: tuple[nn.Module, ...] = ()
    columns: slice = field(default_factory=lambda: ALL)
    calls: int = 1
    factor: Callable[[], Tensor] | None = None

    def coefficients(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """What enters W_O."""
        m = self.between(mixed)
        return m if gate is None else m * gate

    def write(self, coefficients: Tensor) -> Tensor:
        """What W_O returns, with its bias."""
        linear: Any = self.proj
        return F.linear(coefficients, linear.weight[:, self.columns], linear.bias)


@dataclass
class MlpPart:
    """One MLP of a block; one that shares W_O with attention leaves the bias to it."""

    fc2: nn.Module
    outer: nn.Module = NOTHING
    columns: slice = field(default_factory=lambda: ALL)

    def write(self, coefficients: Tensor) -> Tensor:
        """What fc2 returns."""
        linear: Any = self.fc2
        bias = linear.bias if self.columns == ALL else None
        return F.linear(coefficients, linear.weight[:, self.columns], bias)


@dataclass
class Layer:
    """The parts of one block; ``stream`` is the argument that holds the residual stream."""

    block: nn.Module
    attentions: list[AttentionPart]
    mlps: list[MlpPart]
    stream: int = 0
    rows: slice = field(
        default_factory=lambda: ALL
    )  # the rows of the final tokens that the block writes to


@dataclass
class LatentPool:
    """A latent query that attends to the final tokens; then an MLP, and a linear classifier."""

    module: Any
    before: Callable[[Tensor], Tensor]
    head: nn.Linear

    def frozen(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """The affine map that is left of it at fixed attention, without its MLP: B×C."""
        pool = self.module
        values = pool.kv(self.before(tokens)).chunk(2, -1)[1]
        heads = values.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        logits: Tensor = self.head(pool.proj(_flat(weights @ heads)))[:, 0]
        return logits

    def mlp_entry(self, mlp_out: Tensor) -> Tensor:
        """What its MLP brings to the logits: B×C."""
        return mlp_out[:, 0] @ self.head.weight.T


@dataclass
class Anatomy:
    """The blocks of a model, and its own way from the final tokens to logits."""

    layers: list[Layer]
    read: Callable[[Tensor], Tensor]
    prefix: int
    norms: list[nn.Module] = field(default_factory=list)
    last_calls: bool = False  # whether the calls of attention looked at are the last ones
    pool: LatentPool | None = None


class Times(nn.Module):
    """LayerScale as a bare parameter."""

    def __init__(self, gamma: Tensor | None) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x if self.gamma is None else x * self.gamma


def _after(block: Any, number: str) -> tuple[nn.Module, bool]:
    """What follows a branch, and whether it is a LayerScale."""
    if "Post" in type(block).__name__:
        return getattr(block, f"norm{number}"), False
    if hasattr(block, f"gamma_{number}"):
        return Times(getattr(block, f"gamma_{number}")), True
    return getattr(block, f"ls{number}"), True


def _attention_part(attention: Any, outer: nn.Module, scaled: bool) -> AttentionPart:
    """``proj`` after a norm and a gate; differential attention has a norm of each head before."""
    norm = getattr(attention, "norm", NOTHING)
    if hasattr(attention, "sub_norm"):
        return _differential(attention, norm, AttentionPart(attention.proj, outer, scaled=scaled))
    return AttentionPart(
        attention.proj,
        outer,
        lambda mixed: norm(_flat(mixed)),
        getattr(attention, "gate", None),
        scaled,
        (norm,),
    )


def _differential(module: Any, norm: nn.Module, part: AttentionPart) -> AttentionPart:
    part.between = lambda mixed: norm(_flat(module.sub_norm(mixed) * (1 - module.lambda_init)))
    part.norms = (module.sub_norm, norm)
    part.calls, part.factor = 2, lambda: module._compute_lambda().double()
    return part


def _timm_layer(block: Any) -> Layer:
    kind = type(block).__name__
    if kind == "ParallelThingsBlock":
        attentions = [_attention_part(b.attn, b.ls, True) for b in block.attns]
        return Layer(block, attentions, [MlpPart(b.mlp.fc2, b.ls) for b in block.ffns])
    if kind.endswith("ParallelScalingBlock"):
        width = block.in_split[1]
        if block.out_proj is None:
            attention = AttentionPart(block.attn_out_proj, block.ls, scaled=True)
            return Layer(block, [attention], [MlpPart(block.mlp_out_proj, block.ls)])
        columns = slice(0, width), slice(width, None)
        attention = AttentionPart(block.out_proj, block.ls, scaled=True, columns=columns[0])
        if hasattr(block, "sub_norm"):
            attention = _differential(block, NOTHING, attention)
        return Layer(block, [attention], [MlpPart(block.out_proj, block.ls, columns[1])])
    attention = _attention_part(block.attn, *_after(block, "1"))
    layer = Layer(block, [attention], [MlpPart(block.mlp.fc2, _after(block, "2")[0])])
    if kind == "LayerScaleBlockClassAttn":
        layer.stream, layer.rows = 1, slice(0, 1)
    return layer


def _pool(model: Any) -> LatentPool | None:
    if getattr(model, "global_pool", "") != "map":
        return None
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return LatentPool(model.attn_pool, lambda tokens: model.norm(tokens)[:, skipped:], model.head)


def _timm(model: Any) -> Anatomy:
    blocks = getattr(model, "blocks_token_only", None)
    norms = [getattr(model, name, NOTHING) for name in ("norm", "fc_norm")]
    return Anatomy(
        [_timm_layer(block) for block in (blocks or model.blocks)],
        lambda tokens: model.forward_head(model.norm(tokens)),
        model.num_prefix_tokens,
        norms,
        last_calls=blocks is not None,
        pool=_pool(model),
    )


def _torchvision(model: Any) -> Anatomy:
    layers = [
        Layer(layer, [AttentionPart(layer.self_attention.out_proj)], [MlpPart(layer.mlp[3])])
        for layer in model.encoder.layers
    ]
    norm = model.encoder.ln
    return Anatomy(layers, lambda tokens: model.heads(norm(tokens)[:, 0]), 1, [norm])


def _huggingface(model: Any) -> Anatomy:
    layers = []
    for layer in model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer:
        new = hasattr(layer.attention, "o_proj")
        proj = layer.attention.o_proj if new else layer.attention.output.dense
        fc2 = layer.mlp.fc2 if hasattr(layer, "mlp") else layer.output.dense
        layers.append(Layer(layer, [AttentionPart(proj)], [MlpPart(fc2)]))
    norm = model.vit.layernorm
    return Anatomy(layers, lambda tokens: model.classifier(norm(tokens)[:, 0]), 1, [norm])


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy by the library that the model comes from."""
    library = type(model).__module__.split(".")[0]
    known = {"timm": _timm, "torchvision": _torchvision, "transformers": _huggingface}
    return known[library](model)
