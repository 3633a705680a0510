"""The share of the target's logit that attention's memories bring from each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._base import PatchAttribution, choose
from captum_classemb.attr._direct import direct_features
from captum_classemb.attr._heads import head_count, pick_heads, stack_heads
from captum_classemb.attr._inputs import TensorOrTuple, forward_args, images, like_inputs
from captum_classemb.errors import InputError
from captum_classemb.functional.attention import attention_contributions
from captum_classemb.functional.ledger import LogitLedger
from captum_classemb.functional.objectives import check_objective
from captum_classemb.functional.precision import exact, wide
from captum_classemb.readout import Chain, ClassEmbedding, Linear, Readout
from captum_classemb.readout.steps import along
from captum_classemb.vit import ALL, Recording, record

__all__ = ["MemoryPatchImportance"]


class MemoryPatchImportance(PatchAttribution):
    """What attention's memories bring to the target's logit from each patch.

    With every σ on the path held at its value, the logit splits exactly into what each block,
    head and source token, each MLP, the embedding and the biases add (:meth:`ledger`). A patch's
    importance is the sum of its attention entries. Attributions alone do not sum to the logit:
    MLPs, prefix tokens, embedding and biases bring the rest.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        objective (str, optional): ``"logit"`` or ``"log_probability"``. Default: ``"logit"``
        blocks (Sequence[int], optional): the blocks used. Default: all
        heads (Sequence[int], optional): the heads used. Default: all

    Raises:
        InputError: if an option has no such value.
        UnsupportedModelError: if the model or readout has no exact ledger.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> model, image = demo_vit(), torch.rand(1, 3, 64, 64)
        >>> memory = MemoryPatchImportance(model)
        >>> maps, delta = memory.attribute(image, target=7, return_convergence_delta=True)
        >>> maps.shape, bool(delta.abs() < 1e-3)
        (torch.Size([1, 3, 64, 64]), True)
        >>> memory.ledger(image, target=7).mlp.shape
        torch.Size([1, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        readout: Readout | None = None,
        objective: Literal["logit", "log_probability"] = "logit",
        blocks: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, readout)
        check_objective(objective, ("logit", "log_probability"))
        self.objective = objective
        self.blocks = choose(blocks, len(self.vit.blocks), "block")
        self.heads = choose(heads, head_count(self.vit), "head")

    def has_convergence_delta(self) -> bool:
        """True if all blocks and heads are used: then the ledger is complete."""
        every_block = len(self.blocks) == len(self.vit.blocks)
        return every_block and len(self.heads) == head_count(self.vit)

    @overload
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: Literal[False] = False,
    ) -> TensorOrTuple: ...

    @overload
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: Literal[True],
    ) -> tuple[TensorOrTuple, Tensor]: ...

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
    ) -> TensorOrTuple | tuple[TensorOrTuple, Tensor]:
        """Scores of pixels; see :meth:`PatchAttribution.attribute`.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            return_convergence_delta (bool, optional): also return the sum of the ledger minus
                the model's own score, B. Default: False

        Raises:
            InputError: if the inputs are wrong, or the delta is asked for with some blocks or
                heads only.
            TargetError: if the target is missing, out of range, or of the wrong length or type.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args)
        if not return_convergence_delta:
            patches = self._patch_scores(pixels, target, args)
            return like_inputs(inputs, self._to_pixels(patches, pixels))
        self._require_complete()
        ledger = self._ledger(pixels, target, args)
        patches = self._to_grid(ledger.attention, pixels)
        return like_inputs(inputs, self._to_pixels(patches, pixels)), ledger.delta

    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: Any = None,
        end_point: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Σ attributions + ``ledger(end_point).rest`` − score: 0 up to rounding, B.

        Raises:
            InputError: if a ``start_point`` is given, since there is no baseline, or if some
                blocks or heads only are used.
        """
        if start_point is not None:
            raise InputError("a start_point was given: the ledger has no baseline, leave it None.")
        if end_point is None:
            raise InputError("no end_point was given: it is the images that were explained.")
        self._require_complete()
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, end_point, args)
        ledger = self._ledger(pixels, target, args)
        maps = attributions[0] if isinstance(attributions, (tuple, list)) else attributions
        return wide(maps).flatten(1).sum(1) + ledger.rest - ledger.score

    def _require_complete(self) -> None:
        if not self.has_convergence_delta():
            raise InputError(
                "a convergence delta needs all blocks and heads: the ledger is not complete."
            )

    def ledger(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        memories: bool = False,
    ) -> LogitLedger:
        """Every entry of the target's logit or log-probability, of all blocks and heads.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            memories (bool, optional): also split the entries by memory. Default: False

        Returns:
            LogitLedger: the entries; their sum is the model's own score up to rounding.
        """
        args = forward_args(additional_forward_args)
        return self._ledger(images(self.vit, inputs, args), target, args, memories)

    # -- One recorded pass, and the class direction u carried back through each branch.

    def _sites(self, *further: str) -> dict[str, slice]:
        reads = self.readout.reads
        sites = {"values": ALL, "attention": reads, "attn_tail": reads, "final": reads}
        return sites | dict.fromkeys(further, reads)

    def _logit_weights(self, logits: Tensor, target: Tensor) -> Tensor:
        """g, with score = g·logits (+ entropy): e_c, or e_c − p."""
        one_hot = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
        return one_hot if self.objective == "logit" else one_hot - logits.softmax(-1)

    def _model_logits(self, recording: Recording) -> Tensor:
        own = self.vit.has_readout and self.readout is self.vit.readout
        return wide(recording.logits) if own else self.readout(recording["final"][0])

    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        index = self._targets(target, pixels)
        recording = record(self.vit, pixels, self._sites(), blocks=self.blocks, forward_args=args)
        with exact(pixels.device):
            g = self._logit_weights(self._model_logits(recording), index)
            u = self.readout.hold(recording["final"][0]).pull(g)
            entries = [_attention_entries(recording, block, u)[0] for block in self.blocks]
        return self._to_grid(pick_heads(torch.stack(entries, 1), self.heads), pixels)

    def _ledger(
        self, pixels: Tensor, target: Any, args: tuple[Any, ...], memories: bool = False
    ) -> LogitLedger:
        index = self._targets(target, pixels)
        by_memory = ("attn_coefficients", "mlp_coefficients") if memories else ()
        sites = self._sites("mlp_tail", "embedding", *by_memory)
        recording = record(self.vit, pixels, sites, forward_args=args)
        with exact(pixels.device):
            logits = self._model_logits(recording)
            g = self._logit_weights(logits, index)
            held = self.readout.hold(recording["final"][0])
            u, bias = held.pull(g), held.offset(g)
            attention, mlp = [], []
            for block in range(len(self.vit.blocks)):
                entries, offsets = _attention_entries(recording, block, u)
                attention.append(entries)
                bias = bias + offsets
                added, offsets = _mlp_entry(recording["mlp_tail"][block], u)
                mlp.append(added)
                bias = bias + offsets
            log_p = logits.log_softmax(-1)
            plain = self.objective == "logit"
            score = (logits if plain else log_p).gather(1, index[:, None])[:, 0]
            return LogitLedger(
                attention=torch.stack(attention, 1),
                mlp=torch.stack(mlp, 1),
                embedding=(wide(recording["embedding"][0]) * u).sum((1, 2)),
                bias=bias,
                score=score,
                prefix_tokens=self.vit.prefix_tokens,
                pool=held.pooled_mlp(g),
                entropy=None if plain else (log_p.exp() * log_p).sum(-1),
                attention_memories=_by_memory(recording, "attn", u) if memories else None,
                mlp_memories=_by_memory(recording, "mlp", u) if memories else None,
            )

    # -- All classes

    def attribute_classes(
        self, inputs: Tensor | tuple[Tensor, ...], classes: Sequence[int] | None = None
    ) -> Tensor:
        pixels = images(self.vit, inputs)
        index = self._classes(classes, pixels)
        recording = record(self.vit, pixels, self._sites(), blocks=self.blocks)
        with exact(pixels.device):
            tails = [tail for block in self.blocks for tail in recording["attn_tail"][block]]
            shared = all(tail.uniform or tail.output.shape[1] == 1 for tail in tails)
            if shared and isinstance(self.readout, ClassEmbedding):
                maps = self._all_classes(recording, self.readout, index)
            else:
                maps = self._class_by_class(recording, index)
        return self._to_grid(maps, pixels)

    def _all_classes(
        self, recording: Recording, readout: ClassEmbedding, classes: Tensor | None
    ) -> Tensor:
        """B×K×N: the features' change goes forward to all classes."""
        tails, attention, values = (
            [recording[site][block] for block in self.blocks]
            for site in ("attn_tail", "attention", "values")
        )
        final = recording["final"][0]
        features = direct_features(readout, final, tails, attention, values, self.heads)
        maps = features @ readout.head_weight(classes).T
        if self.objective == "log_probability":
            p = self._model_logits(recording).softmax(-1)
            maps = maps - features @ (p @ readout.head_weight())[..., None]
        return maps.transpose(1, 2)

    def _class_by_class(self, recording: Recording, classes: Tensor | None) -> Tensor:
        logits = self._model_logits(recording)
        held = self.readout.hold(recording["final"][0])
        wanted = range(logits.shape[1]) if classes is None else classes.tolist()
        maps = []
        for c in wanted:
            g = self._logit_weights(logits, logits.new_full((len(logits),), c, dtype=torch.int64))
            u = held.pull(g)
            entries = [_attention_entries(recording, block, u)[0] for block in self.blocks]
            maps.append(pick_heads(torch.stack(entries, 1), self.heads).sum((1, 2)))
        return torch.stack(maps, 1)


def _attention_entries(recording: Recording, block: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """A·v·(W_Oᵀu) by head and source token (B×H×N), and what biases on the way add (B)."""
    entries, total = [], u.new_zeros(len(u))
    sites = (recording[site][block] for site in ("attn_tail", "attention", "values"))
    for tail, weights, values in zip(*sites, strict=True):
        z, bias = tail.pull_offsets(u)
        heads = z.unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
        entries.append(attention_contributions(weights, values, heads[:, None])[:, 0])
        total = total + bias
    return stack_heads(entries), total


def _mlp_entry(tails: Sequence[Chain], u: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLPs of a block add along u without biases, and what their biases add: B, B."""
    entry, total = u.new_zeros(len(u)), u.new_zeros(len(u))
    for tail in tails:
        outer = Chain(tail.steps[1:], tail.trace[1:])
        direction, offsets = outer.pull_offsets(u)
        bias = along(tail.steps[0].offset(), direction)
        entry = entry + (wide(tail.trace[1]) * direction).sum((1, 2)) - bias
        total = total + offsets + bias
    return entry, total


def _by_memory(recording: Recording, branch: str, u: Tensor) -> Tensor:
    """Coefficient × (value vector · u), summed over the rows read: B×L×M."""
    rows = []
    pairs = zip(recording[f"{branch}_tail"], recording[f"{branch}_coefficients"], strict=True)
    for tails, coefficients in pairs:
        parts = [
            (wide(m) * tail.since(Linear).pull(u, hold=True)).sum(1)
            for tail, m in zip(tails, coefficients, strict=True)
        ]
        rows.append(torch.cat(parts, -1))
    return torch.stack(rows, 1)
