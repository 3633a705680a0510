"""What a model computes, by slow and independent means: eager attention, autograd, frozen norms.

Nothing here uses the package. Attention is computed explicitly, in the graph, by taking the place
of ``scaled_dot_product_attention``; the σ of norms is frozen at one forward pass by hooks that
answer in their place; everything else runs through the model's own modules. Each construction is
compared with the model's own output before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from anatomy import ALL, Layer, anatomy
from torch import Tensor, nn
from torch.nn import functional as F


def logits_of(output: Any) -> Tensor:
    """The logits of a Hugging Face output, or the tensor itself."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@dataclass
class Trace:
    """One forward pass. Lists are by block; heads of parallel modules stand side by side."""

    attention: list[Tensor]  # A, B×H×Q×N: leaves, what follows them is in their graph
    values: list[Tensor]  # v, B×H×N×d
    raw: list[Tensor]  # what attention adds before LayerScale, but after a post-norm
    branch: list[Tensor]  # what attention adds to the residual stream
    mlp_branch: list[Tensor]  # what the MLP adds to the residual stream
    attn_coefficients: list[Tensor]  # what enters W_O
    coefficients: list[Tensor]  # what enters fc2
    gates: list[list[Tensor | None]]
    resid_pre: list[Tensor]
    resid_post: list[Tensor]
    final: Tensor
    logits: Tensor
    entered: dict[nn.Module, Tensor]
    pool_attention: Tensor | None = None  # of attention pooling, B×H×1×N
    pool_mlp: Tensor | None = None  # what the MLP after it adds, B×1×D


class Oracle:
    """A model on a batch of images, taken apart. The model is copied, never touched."""

    def __init__(self, model: nn.Module, images: Tensor, *further: Tensor) -> None:
        with torch.no_grad():
            self.logits = logits_of(model(images, *further))
        self.model = copy.deepcopy(model)
        self.anatomy = anatomy(self.model)
        self.inputs = (images, *further)
        self.trace = self._run()
        assert torch.allclose(self.trace.logits, self.logits, rtol=1e-12, atol=1e-12), (
            "the unfused forward pass is not the model's"
        )
        assert torch.allclose(self.anatomy.read(self.trace.final), self.logits, rtol=1e-11)

    # -- One unfused forward pass, rebuilt from its attention maps.

    def _run(self) -> Trace:
        seen: dict[nn.Module, tuple[tuple[Tensor, ...], Any]] = {}
        handles = [
            module.register_forward_hook(_keep(seen), with_kwargs=True)
            for module in self.model.modules()
        ]
        with torch.no_grad(), eager_attention() as calls:
            logits = logits_of(self.model(*self.inputs))
        for handle in handles:
            handle.remove()
        layers = self.anatomy.layers
        if not calls:  # Hugging Face's eager attention returns A beside its output.
            calls = [_from_module(layer.block, seen) for layer in layers]
        wanted = sum(part.calls for layer in layers for part in layer.attentions)
        queue = calls[-wanted:] if self.anatomy.last_calls else calls[:wanted]
        first, pool = layers[0], self.anatomy.pool
        trace = Trace([], [], [], [], [], [], [], [], [], [], logits, logits, {})
        trace.entered = {module: args[0] for module, (args, _) in seen.items() if args}
        if pool is not None:
            trace.pool_attention, trace.pool_mlp = calls[wanted][0], seen[pool.module.mlp][1]
        for layer in layers:
            pre = seen[layer.block][0][layer.stream]
            trace.resid_pre.append(pre)
            trace.resid_post.append(_tensor(seen[layer.block][1]))
            self._rebuild(layer, trace, queue, seen)
            total = pre + trace.branch[-1] + trace.mlp_branch[-1]
            assert torch.allclose(total, trace.resid_post[-1], rtol=1e-10, atol=1e-10), (
                "the block is not the sum of its parts"
            )
        trace.final = trace.resid_post[-1]
        if first.rows != ALL:  # the tokens that class attention only looks at
            trace.final = torch.cat([trace.final, seen[first.block][0][0]], 1)
        return trace

    def _rebuild(self, layer: Layer, trace: Trace, queue: list[Any], seen: dict[Any, Any]) -> None:
        weights, values, gates = [], [], []
        for part in layer.attentions:
            a, v = queue.pop(0)
            if part.factor is not None:
                second, _ = queue.pop(0)
                a = a - part.factor() * second
            weights.append(a)
            values.append(v)
            gates.append(None if part.gate is None else seen[part.gate][1].sigmoid())
        leaf = torch.cat(weights, 1).detach().requires_grad_(True)
        trace.attention.append(leaf)
        trace.values.append(torch.cat(values, 1))
        trace.gates.append(gates)
        mixed = leaf @ trace.values[-1]
        m = self.attention_coefficients(layer, mixed, gates)
        raw = [part.write(x) for part, x in zip(layer.attentions, m, strict=True)]
        outer = [part.outer(x) for part, x in zip(layer.attentions, raw, strict=True)]
        parts = zip(layer.attentions, raw, outer, strict=True)
        trace.attn_coefficients.append(torch.cat(m, -1).detach())
        trace.raw.append(sum(r if part.scaled else o for part, r, o in parts))  # type: ignore[arg-type]
        trace.branch.append(sum(outer))  # type: ignore[arg-type]
        # A linear layer shared with attention is entered by both.
        given = [seen[part.fc2][0][0][..., part.columns] for part in layer.mlps]
        trace.coefficients.append(torch.cat(given, -1))
        trace.mlp_branch.append(self._mlp_branch(layer, trace.coefficients[-1]).detach())

    @staticmethod
    def attention_coefficients(
        layer: Layer, mixed: Tensor, gates: list[Tensor | None]
    ) -> list[Tensor]:
        """What enters W_O of each attention module, from A·V of all heads."""
        parts = layer.attentions
        heads = mixed.chunk(len(parts), 1)
        return [p.coefficients(x, g) for p, x, g in zip(parts, heads, gates, strict=True)]

    @staticmethod
    def _mlp_branch(layer: Layer, coefficients: Tensor) -> Tensor:
        parts = zip(layer.mlps, coefficients.chunk(len(layer.mlps), -1), strict=True)
        return sum(part.outer(part.write(m)) for part, m in parts)  # type: ignore[return-value]

    # -- Gradients by autograd.

    def gradient(self, target: Tensor, objective: str) -> Tensor:
        """∂score/∂A summed over query rows, the branch read as if it were the last: B×L×H×N."""
        maps = []
        for b, layer in enumerate(self.anatomy.layers):
            # The published code reads a branch before LayerScale, but after a post-norm.
            tokens = self.trace.raw[b] if objective == "paper" else self.trace.branch[b]
            z = self.anatomy.read(self.in_place(layer, tokens))
            score = {
                "logit": lambda z: z,
                "log_probability": lambda z: z.log_softmax(-1),
                "paper": lambda z: z.softmax(-1).log_softmax(-1),
            }[objective](z)
            picked = score.gather(1, target[:, None]).sum()
            (a,) = torch.autograd.grad(picked, self.trace.attention[b], retain_graph=True)
            maps.append(a.sum(2))
        return torch.stack(maps, 1)

    def in_place(self, layer: Layer, tokens: Tensor) -> Tensor:
        """Tokens that a block writes, as the final tokens; other rows do not count."""
        if layer.rows == ALL:
            return tokens
        rest = tokens.new_zeros(len(tokens), self.trace.final.shape[1] - 1, tokens.shape[2])
        return torch.cat([tokens, rest], 1)

    # -- The logit as an affine function of memories, every σ frozen.

    def mixed(self, block: int) -> Tensor:
        """A·V of a block: B×H×Q×d."""
        return (self.trace.attention[block] @ self.trace.values[block]).detach()

    def assemble(
        self,
        mixed: dict[int, Tensor] | None = None,
        coefficients: dict[int, Tensor] | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Logits of the frozen model with the memories given, and all others 0.

        With nothing given they are what the biases make by themselves. E·B memories are E cases
        of every image, and give E·B logits.
        """
        mixed, coefficients = mixed or {}, coefficients or {}
        given = [*mixed.values(), *coefficients.values()]
        tokens = torch.zeros_like(self.trace.resid_pre[0]) if embedding is None else embedding
        cases = len(given[0]) // len(tokens) if given else 1
        tokens = tokens.repeat(cases, 1, 1)
        with torch.no_grad(), self.frozen():
            for b, layer in enumerate(self.anatomy.layers):
                none = torch.zeros_like(self.mixed(b)).repeat(cases, 1, 1, 1)
                gates = [None if g is None else g.repeat(cases, 1, 1) for g in self.trace.gates[b]]
                m = self.attention_coefficients(layer, mixed.get(b, none), gates)
                parts = zip(layer.attentions, m, strict=True)
                tokens = tokens + sum(part.outer(part.write(x)) for part, x in parts)
                none = torch.zeros_like(self.trace.coefficients[b]).repeat(cases, 1, 1)
                tokens = tokens + self._mlp_branch(layer, coefficients.get(b, none))
            return self.read_frozen(self.in_place(self.anatomy.layers[0], tokens))

    def read_frozen(self, tokens: Tensor) -> Tensor:
        """Logits of final tokens with the attention of a pool at its values, without its MLP."""
        pool, weights = self.anatomy.pool, self.trace.pool_attention
        if pool is None or weights is None:
            return self.anatomy.read(tokens)
        return pool.frozen(tokens, weights.repeat(len(tokens) // len(weights), 1, 1, 1))

    def pool_entry(self) -> Tensor | None:
        """What the MLP of attention pooling brings to every logit: B×C; None without one."""
        pool, added = self.anatomy.pool, self.trace.pool_mlp
        return None if pool is None or added is None else pool.mlp_entry(added).detach()

    def check_whole(self) -> None:
        """The frozen model on all memories at once gives the model's own logits."""
        count = range(len(self.anatomy.layers))
        logits = self.assemble(
            {b: self.mixed(b) for b in count},
            {b: self.trace.coefficients[b] for b in count},
            self.trace.resid_pre[0],
        )
        entry = self.pool_entry()
        logits = logits if entry is None else logits + entry
        assert torch.allclose(logits, self.trace.logits, rtol=1e-10, atol=1e-10), (
            "the frozen model is not the model"
        )

    def bias(self) -> Tensor:
        """Logits that biases make by themselves: B×C."""
        return self.assemble()

    def attention_entries(self, block: int) -> Tensor:
        """What each head brings from each source token to every logit: B×H×N×C."""
        weights, values = self.trace.attention[block].detach(), self.trace.values[block]
        batch, heads, count, _ = values.shape
        alone = []
        for k in range(heads):
            for j in range(count):
                only = torch.zeros_like(values)
                only[:, k, j] = values[:, k, j]
                alone.append(weights @ only)
        logits = self.assemble({block: torch.cat(alone)}) - self.bias().repeat(len(alone), 1)
        return logits.view(heads, count, batch, -1).permute(2, 0, 1, 3)

    def mlp_entry(self, block: int) -> Tensor:
        """What one MLP brings to every logit: B×C."""
        return self.assemble(None, {block: self.trace.coefficients[block]}) - self.bias()

    def mlp_memories(self, block: int) -> Tensor:
        """What each memory of one MLP brings to every logit: B×M×C."""
        coefficients = self.trace.coefficients[block]
        alone = []
        for memory in range(coefficients.shape[-1]):
            only = torch.zeros_like(coefficients)
            only[..., memory] = coefficients[..., memory]
            alone.append(only)
        logits = self.assemble(None, {block: torch.cat(alone)})
        logits = logits - self.bias().repeat(len(alone), 1)
        return logits.view(len(alone), len(coefficients), -1).transpose(0, 1)

    def embedding_entry(self) -> Tensor:
        """What the tokens brought before the first block to every logit: B×C."""
        return self.assemble(embedding=self.trace.resid_pre[0]) - self.bias()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Every norm on the way answers with the σ it had in the forward pass."""
        norms = [*self.anatomy.norms]
        for layer in self.anatomy.layers:
            for part in layer.attentions:
                norms += [*part.norms, part.outer]
            norms += [part.outer for part in layer.mlps]
        handles = [
            norm.register_forward_hook(frozen_at(self.trace.entered[norm]))
            for norm in norms
            if "Norm" in type(norm).__name__
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def frozen_at(real: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that applies a norm with the σ of other inputs."""

    def hook(norm: Any, args: Any, output: Tensor) -> Tensor:
        (x,) = args
        kind = type(norm).__name__.lower()
        if kind.startswith("rmsnorm"):
            sigma, centre = (real.square().mean(-1, keepdim=True) + norm.eps).sqrt(), False
        elif kind.startswith("simplenorm"):
            sigma, centre = (real.var(-1, keepdim=True) + norm.eps).sqrt(), False
        else:
            sigma = (real.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
            centre = True
        sigma = sigma.repeat(len(x) // len(real), *[1] * (x.dim() - 1))
        y = (x - x.mean(-1, keepdim=True) if centre else x) / sigma * norm.weight
        return y if getattr(norm, "bias", None) is None else y + norm.bias

    return hook


def _keep(seen: dict[nn.Module, tuple[tuple[Tensor, ...], Any]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[module] = ((*args, *kwargs.values()), output)

    return hook


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def _from_module(block: Any, seen: dict[Any, Any]) -> tuple[Tensor, Tensor]:
    module = block.attention
    attention: Tensor = seen[module][1][1]
    values = seen[module.v_proj][1].unflatten(-1, (attention.shape[1], -1)).transpose(1, 2)
    return attention, values


@contextmanager
def eager_attention(held: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Fused attention is replaced by one that shows its weights, and values, to autograd.

    Its weights are constants if ``held``.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def explicit(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        assert dropout_p == 0.0 and not is_causal
        if rest.get("enable_gqa"):
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        weights = scores.softmax(-1)
        weights = weights.detach() if held else weights
        calls.append((weights, value))
        return weights @ value

    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = explicit
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = fused
