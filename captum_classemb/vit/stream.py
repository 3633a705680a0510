"""The derivative of a score along the rows that the readout reads, all other tokens constant.

Per block it runs back through MLP, output projection, values, softmax, queries and norms of these
few rows alone, in closed form. The way forward along the same rows is rebuilt first, from the
weights that the way back uses, and compared with what the model computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_classemb.functional.norm import NormJacobian
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.derivatives import GateDerivative
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.steps import Gate, Step, stacked
from captum_classemb.vit.memories import ForwardPass, Stage
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Call

__all__ = ["RowStream", "follows_rows"]


def follows_rows(vit: ViT, rows: slice) -> bool:
    """Whether the rows are few, and the adapter says how a block makes them.

    Not so where the readout reads the patches, or where attention is more than one softmax, holds
    biases for all pairs of tokens, or is no module apart from its block.
    """
    if rows.stop is None or not 0 <= rows.start < rows.stop <= vit.prefix_tokens:
        return False
    nothing = Call((), {})
    return all(
        attention.projections is not None
        and (type(attention).weights is Attention.weights or attention.shows_weights)
        and attention.bias(nothing, rows) is None
        and attention.module is not block.module
        for block in vit.blocks
        for attention in block.attentions
    ) and all(mlp.hidden is not None for block in vit.blocks for mlp in block.mlps)


@dataclass
class _Module:
    """One attention module of a stage, at the rows, with what its derivative reads."""

    attention: Tensor
    keys: Tensor
    values: Tensor
    query: Tensor
    scaled: Tensor
    scale: list[float]
    entry: list[Any]
    query_steps: list[Any]
    key_steps: list[Any]
    projections: list[list[Linear]]
    path: list[Any]
    gates: list[Linear] | None
    gated: Tensor | None


class RowStream:
    """The blocks of a recorded pass along the rows, ready to carry cotangents back.

    Attributes:
        attention: A of the rows for each stage and module, L×B×H×Q×N.
    """

    def __init__(self, vit: ViT, done: ForwardPass) -> None:
        self.vit, self.rows = vit, done.rows
        assert done.resid_pre is not None and done.mlp_out is not None
        assert done.resid_post is not None
        self.attention: list[list[Tensor]] = []
        self._modules: dict[int, tuple[list[_Module], int]] = {}
        self._mlps: dict[int, tuple[list[list[Any]], int]] = {}
        scales: set[float] = set()
        for stage in done.stages:
            some = slice(stage.blocks[0], stage.blocks[-1] + 1)
            entering = done.resid_pre[some]
            modules = [self._attend(done, stage, i, entering) for i in range(len(stage.modules))]
            self.attention.append([module.attention for module in modules])
            mid = done.resid_mid
            middle = entering + stage.attn_out if mid is None else mid[some]
            number = len(vit.blocks[stage.blocks[0]].mlps)
            columns = [[vit.blocks[b].mlps[i] for b in stage.blocks] for i in range(number)]
            written, chains = zip(*(self._mlp(column, middle) for column in columns), strict=True)
            added = sum(written[1:], written[0])
            done.checks.equal("MLP outputs", stage.blocks, added, done.mlp_out[some])
            scales.update(number for module in modules for number in module.scale)
            for i, block in enumerate(stage.blocks):
                self._modules[block] = modules, i
                self._mlps[block] = list(chains), i
        # A factor that all blocks share is none of a map's business.
        self._even = len(scales) == 1

    # -- forward along the rows

    def _attend(self, done: ForwardPass, stage: Stage, number: int, entering: Tensor) -> _Module:
        attentions = [self.vit.blocks[b].attentions[number] for b in stage.blocks]
        memories = stage.modules[number]
        assert memories.keys is not None
        x, entry = _run([a.entry for a in attentions], entering)
        projections = [[p.read() for p in a.projections or ()] for a in attentions]
        made = torch.stack(
            [
                torch.cat([p(x[i]) for p in ps], -1) if len(ps) > 1 else ps[0](x[i])
                for i, ps in enumerate(projections)
            ]
        )
        heads, width = memories.values.shape[-3], memories.values.shape[-1]
        shared = (made.shape[-1] - heads * width) // 2
        query, key = made[..., : heads * width], made[..., heads * width : heads * width + shared]
        query, query_steps = _run([a.query_steps for a in attentions], query)
        _, key_steps = _run([a.key_steps for a in attentions], key)
        keys, values = upcast(memories.keys), upcast(memories.values)
        by_head = query.unflatten(-1, (heads, width)).transpose(-2, -3)
        scale = [a.scale() for a in attentions]
        factor: Any = scale[0]
        if len(set(scale)) > 1:
            factor = made.new_tensor(scale).view(-1, 1, 1, 1, 1)
        scores = (by_head * factor) @ keys.mT
        if any(b is not None for b in memories.bias):
            scores = torch.stack(
                [
                    s if b is None else s + b.to(s.dtype)
                    for s, b in zip(scores, memories.bias, strict=True)
                ]
            )
        attention = scores.softmax(-1)
        mixed = (attention @ values).transpose(-2, -3).flatten(-2)
        count = len(memories.path.steps) - len(attentions[0].outer)
        rebuilt = OutputPath.of(memories.path.steps[:count], mixed).output
        after_w_o = memories.path.inputs[count:]
        real = after_w_o[0] if after_w_o else memories.path.output
        done.checks.equal("attention outputs", stage.blocks, rebuilt, real)
        path = [s.at(x) for s, x in zip(memories.path.steps, memories.path.inputs, strict=True)]
        gates = [a.gate.read() for a in attentions if a.gate is not None] or None
        gated = None
        for step, x in zip(memories.path.steps, memories.path.inputs, strict=True):
            if isinstance(step, Gate) and gates is not None:
                # What a change of the gate's logit does to its product with x.
                gated = x * step.gate * (1.0 - step.gate)
        return _Module(
            attention,
            keys,
            values,
            by_head,
            attention * factor,
            scale,
            entry,
            query_steps,
            key_steps,
            projections,
            path,
            gates,
            gated,
        )

    def _mlp(self, mlps: Sequence[MLP], middle: Tensor) -> tuple[Tensor, list[Any]]:
        steps = [(*m.entry, *(m.hidden or ()), m.proj, *m.outer) for m in mlps]
        return _run(steps, middle)

    # -- back along the rows

    def memories(self, block: int) -> tuple[list[Tensor], list[Tensor]]:
        """A of the rows (B×H×Q×N) and values (B×H×N×d) of each module of a block."""
        modules, at = self._modules[block]
        return [m.attention[at] for m in modules], [m.values[at] for m in modules]

    def vjp(self, block: int, cotangent: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Carry cotangents of a block's output back, one block.

        Args:
            block: which.
            cotangent: B×Q×K×D.

        Returns:
            the cotangent of the block's input (B×Q×K×D), and of each attention module that of A·V
            (z, B×Q×K×(H·d)) and scale·A·v·z of each query row (B×H×Q×K×N).
        """
        chains, at = self._mlps[block]
        middle = cotangent
        for chain in chains:
            middle = _back(chain, at, cotangent, middle)
        modules, at = self._modules[block]
        entering, directions, carried = middle, [], []
        for module in modules:
            z, through_gate = middle, None
            for derivative in reversed(module.path):
                gate = module.gates is not None and isinstance(derivative, GateDerivative)
                if gate and module.gates is not None and module.gated is not None:
                    through_gate = (z * module.gated[at][..., None, :]) @ module.gates[at].weight
                z = derivative[at].vjp(z)
            into, evidence = self._through_attention(module, at, z)
            into = into if through_gate is None else into + through_gate
            entering = _back(module.entry, at, into, entering)
            evidence = evidence if self._even else evidence / module.scale[at]
            directions.append(z)
            carried.append(evidence)
        return entering, directions, carried

    def _through_attention(self, module: _Module, at: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """From a cotangent of A·V to that of what queries, keys and values are made of."""
        weights, keys, values = module.attention[at], module.keys[at], module.values[at]
        query, scaled = module.query[at], module.scaled[at]
        batch, heads, rows, _ = weights.shape
        count, width = z.shape[2], values.shape[-1]
        by_head = z.reshape(batch, rows * count, heads, width).transpose(1, 2)
        along = (by_head @ values.mT).unflatten(2, (rows, count))
        # Times the factor of the dot products, which the derivatives of queries and keys need.
        carried = scaled[:, :, :, None] * along
        whole = carried.sum(-1, keepdim=True)
        scores = torch.addcmul(carried, weights[:, :, :, None], whole, value=-1)
        d_query = (scores.flatten(2, 3) @ keys).unflatten(2, (rows, count))
        own = scores[..., self.rows]
        if rows == 1:
            d_key = own * query[:, :, :, None]
            d_value = weights[..., self.rows, None] * by_head[:, :, None]
        else:
            d_key = torch.einsum("bhqkr,bhqd->bhrkd", own, query)
            by_row = by_head.unflatten(2, (rows, count))
            d_value = torch.einsum("bhqr,bhqkd->bhrkd", weights[..., self.rows], by_row)
        # B×H×Q×K×d to B×Q×K×H×d.
        parts = [part.permute(0, 2, 3, 1, 4) for part in (d_query, d_key, d_value)]
        kept = sum(p.weight.shape[-2] for p in module.projections[at]) - heads * width
        groups = 2 * heads * width // kept
        if groups > 1:
            # Heads that share keys and values add up.
            parts[1:] = [p.unflatten(-2, (heads // groups, groups)).sum(-2) for p in parts[1:]]
        d_query, d_key, d_value = (part.flatten(-2) for part in parts)
        d_query = _back(module.query_steps, at, d_query)
        d_key = _back(module.key_steps, at, d_key)
        made = torch.cat([d_query, d_key, d_value], -1)
        total: Tensor | None = None
        start = 0
        for step in module.projections[at]:
            weight = step.weight
            part = made[..., start : start + weight.shape[-2]] @ weight
            start += weight.shape[-2]
            total = part if total is None else total + part
        assert total is not None
        return total, carried


def _run(paths: Sequence[Sequence[Step]], x: Tensor) -> tuple[Tensor, list[Any]]:
    """The steps of L blocks from x (L×B×Q×·), with their derivatives.

    Small parameters are stacked; of linear layers each block's own is used, so that no weight is
    copied.

    Returns:
        what the last step returns; for each step its derivative, stacked or by block.
    """
    found: list[Any] = []
    derivative: Any
    for column in zip(*paths, strict=True):
        read = [step.read() for step in column]
        whole = None if isinstance(read[0], Linear) else stacked([(step,) for step in read])
        if whole is not None:
            x, derivative = whole[0].linearised(x)
            if isinstance(derivative, NormJacobian):
                derivative = derivative.factors()
        else:
            each = [step.linearised(x[i]) for i, step in enumerate(read)]
            x, derivative = torch.stack([y for y, _ in each]), [d for _, d in each]
        found.append(derivative)
    return x, found


def _back(chain: Sequence[Any], at: int, cotangent: Tensor, onto: Tensor | None = None) -> Tensor:
    """A cotangent carried back through one block's steps, added to another."""
    c = cotangent
    for i, derivative in reversed(list(enumerate(chain))):
        first = i == 0
        if isinstance(derivative, tuple):
            scale, into, back = (part[at] for part in derivative)
            along = c @ into
            moved = c * scale if not first or onto is None else torch.addcmul(onto, c, scale)
            c = torch.baddbmm(
                moved.flatten(0, 1),
                along.flatten(0, 1),
                back.flatten(0, 1),
                alpha=-1.0 / moved.shape[-1],
            ).unflatten(0, moved.shape[:2])
            if first and onto is not None:
                done: Tensor = c
                return done
        else:
            c = derivative[at].vjp(c)
    return c if onto is None else c + onto
