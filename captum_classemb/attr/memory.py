"""The share of the target's logit that attention's memories bring from each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._base import check_classes
from captum_classemb.attr._forward_pass import (
    Classes,
    ForwardPassAttribution,
    Needs,
    head_counts,
    run,
)
from captum_classemb.attr._inputs import TensorOrTuple, forward_args, images, like_inputs
from captum_classemb.errors import InputError
from captum_classemb.functional.attention import carried, chunks
from captum_classemb.functional.ledger import LogitLedger
from captum_classemb.functional.objectives import check_objective
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.readout import ClassEmbedding, Linear, OutputPath
from captum_classemb.readout.output_path import along
from captum_classemb.vit import Recording
from captum_classemb.vit.memories import ForwardPass, Stage

__all__ = ["MemoryPatchImportance", "direct_entries", "direct_maps"]


def direct_entries(stage: Stage, attention: Sequence[Tensor], u: Tensor) -> Tensor:
    """A · v · (W_Oᵀu): what attention adds along the directions u, later blocks aside.

    Args:
        stage: blocks with their values and output paths.
        attention: A at the query rows for each module, L×B×H×Q×N.
        u: directions of the residual stream, B×Q×K×D.

    Returns:
        L×B×H×K×N.
    """
    each = u.expand(len(stage.blocks), *u.shape)
    parts = [
        carried(a, memories.values, memories.path.vjp(each, frozen=True))
        for a, memories in zip(attention, stage.modules, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def direct_maps(
    readout: ClassEmbedding,
    final: Tensor,
    stages: Sequence[Stage],
    attention: Sequence[Sequence[Tensor]],
    heads: Sequence[int] | None = None,
) -> Tensor:
    """The features of :func:`direct_entries` summed over blocks and heads, for a linear head.

    The direction of a class is the same for all blocks, so blocks add up before classes are read:
    ``maps = features @ readout.head_weight().T``.

    Args:
        readout: the class embedding.
        final: the rows read after the last block, B×Q×D.
        stages: blocks with their values and output paths.
        attention: A at the query rows, for each stage and module, L×B×H×Q×N.
        heads: the heads that count; all by default.

    Returns:
        B×N×F.
    """
    shares = readout.frozen_shares(final)
    total: Tensor | None = None
    for stage, weights in zip(stages, attention, strict=True):
        first = 0
        for a, memories in zip(weights, stage.modules, strict=True):
            pooled = torch.einsum("bpq,lbhqn->lbphn", shares, a)
            if heads is not None:
                chosen = [float(first + k in heads) for k in range(a.shape[2])]
                pooled = pooled * pooled.new_tensor(chosen)[:, None]
            first += a.shape[2]
            derivatives = [
                step.at(x, frozen=True)
                for step, x in zip(memories.path.steps, memories.path.inputs, strict=True)
            ]
            for some in chunks(memories.values):
                v = upcast(memories.values[some])[:, :, None] * pooled[some][..., None]
                # Each source token is one of K = N tangents of a row.
                t = v.transpose(3, 4).flatten(4)
                for derivative in derivatives:
                    t = derivative[some].jvp(t)
                t = t[0] if len(t) == 1 else t.sum(0)
                total = t if total is None else total.add_(t)
    assert total is not None
    return readout.frozen_features(final, total)


class MemoryPatchImportance(ForwardPassAttribution):
    """What attention's memories bring to the target's logit from each patch.

    With every σ on the path frozen, the logit splits exactly into what each block,
    head and source token, each MLP, the embedding and the biases add (:meth:`ledger`). A patch's
    importance is the sum of its attention entries. Attributions alone do not sum to the logit:
    MLPs, prefix tokens, embedding and biases bring the rest.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        objective (str, optional): ``"logit"`` or ``"log_probability"``; a model with one
            logit is explained by it. Default: ``"logit"``
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
        readout: nn.Module | None = None,
        objective: Literal["logit", "log_probability"] = "logit",
        blocks: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        check_objective(objective, ("logit", "log_probability"))
        super().__init__(model, readout, blocks, heads)
        check_classes(self.vit, objective)
        self.objective = objective

    def needs(self) -> Needs:
        return Needs(self.readout.reads, tuple(self.blocks), attention=True)

    def _entries(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        g = self.weights(self.model_logits(done), classes, self.objective)
        g = g if self.objective == "logit" else self.resolved(done, g)
        u = self.readout.vjp(done.final, g, frozen=True)
        return [
            self._patches(direct_entries(stage, attention_of(stage), u)) for stage in done.stages
        ]

    # All classes of a linear head: the features' change goes forward, one product reads classes.
    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        readout = self.readout
        paths = [memories.path for stage in done.stages for memories in stage.modules]
        one_way = all(path.uniform or path.output.shape[2] == 1 for path in paths)
        if len(index) <= self._AT_ONCE or not (one_way and isinstance(readout, ClassEmbedding)):
            return super().class_maps(done, index)
        with no_autocast(done.logits.device), self._reading():
            attention = [attention_of(stage) for stage in done.stages]
            heads = None if self._every_head else self.heads
            features = direct_maps(readout, done.final, done.stages, attention, heads)
            features = features[:, self.vit.prefix_tokens :]
            maps = features @ readout.head_weight(index).T
            if self.objective == "log_probability":
                logits = self.model_logits(done)
                maps = maps - features @ (logits.softmax(-1) @ readout.head_weight())[..., None]
                # Where p_c is close to 1, this difference is lost to rounding.
                top = logits.argmax(-1)
                plain = self._summed(done, Classes(top[:, None]))
                maps = torch.where((index == top[:, None])[:, None], plain.transpose(1, 2), maps)
            return maps.transpose(1, 2)

    # -- The ledger

    def has_convergence_delta(self) -> bool:
        """True if all blocks and heads are used: then the ledger is complete."""
        every_block = len(self.blocks) == len(self.vit.blocks)
        return every_block and len(self.heads) == max(head_counts(self.vit))

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
        return_convergence_delta: bool = False,
    ) -> TensorOrTuple | tuple[TensorOrTuple, Tensor]:
        """Scores of pixels; see :meth:`PatchAttribution.attribute`.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            contrast (int, Tensor, list or "runner-up", optional): explain why the target and not
                this class: the target's logit minus the other's. ``"runner-up"`` is the highest
                other logit. Default: None
            return_convergence_delta (bool, optional): also return the sum of the ledger minus
                the model's own score, B. Default: False

        Raises:
            InputError: if the inputs are wrong, or the delta is asked for with some blocks or
                heads only.
            TargetError: if the target is missing, out of range, or of the wrong length or type.
        """
        if not return_convergence_delta:
            maps: TensorOrTuple = super().attribute(
                inputs, target, additional_forward_args, contrast=contrast
            )
            return maps
        self._require_complete()
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        ledger = self._ledger(pixels, target, args, contrast)
        patches = self._on_grid(self._patches(ledger.attention), pixels)
        return like_inputs(inputs, self._to_pixels(patches, pixels)), ledger.delta

    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: Any = None,
        end_point: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        contrast: Any = None,
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
        ledger = self._ledger(pixels, target, args, contrast)
        maps = attributions[0] if isinstance(attributions, (tuple, list)) else attributions
        return upcast(maps).flatten(1).sum(1) + ledger.rest - ledger.score

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
        contrast: Any = None,
        memories: bool = False,
    ) -> LogitLedger:
        """Every entry of the target's logit or log-probability, of all blocks and heads.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            contrast (int, Tensor, list or "runner-up", optional): as for :meth:`attribute`; the
                ledger is then of the difference of the two logits. Default: None
            memories (bool, optional): also split the entries by memory. Default: False

        Returns:
            LogitLedger: the entries; their sum is the model's own score up to rounding.
        """
        args = forward_args(additional_forward_args)
        return self._ledger(images(self.vit, inputs, args), target, args, contrast, memories)

    def _ledger(
        self,
        pixels: Tensor,
        target: Any,
        args: tuple[Any, ...],
        contrast: Any,
        memories: bool = False,
    ) -> LogitLedger:
        index = self._early_targets(target, pixels)
        done = run(self.vit, self.ledger_needs(memories), pixels, args)
        ledger = self.ledger_of(done, self._late_targets(done, index), contrast, memories)
        done.checks.finish()
        return ledger

    def ledger_needs(self, memories: bool = False) -> Needs:
        """What :meth:`ledger_of` reads of a forward pass."""
        reads = self.readout.reads
        by_memory = ("attn_coefficients", "mlp_coefficients") if memories else ()
        sites = dict.fromkeys(("mlp_path", "embedding", *by_memory), reads)
        return Needs(reads, tuple(range(len(self.vit.blocks))), attention=True, sites=sites)

    def ledger_of(
        self, done: ForwardPass, index: Tensor, contrast: Any = None, memories: bool = False
    ) -> LogitLedger:
        """The ledger of one class an image (B) from a forward pass."""
        recording = done.recording
        assert recording is not None
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            classes = self.against(done, index, contrast)
            logits = self.model_logits(done)
            g = self.weights(logits, classes, self.objective)
            u = self.readout.vjp(done.final, g, frozen=True)
            constant, pool = self.readout.constants(done.final, g)
            bias, attention, mlp = constant[:, 0], [], []
            for stage in done.stages:
                attention.append(direct_entries(stage, attention_of(stage), u)[..., 0, :])
                for memories_ in stage.modules:
                    each = u.expand(len(stage.blocks), *u.shape)
                    bias = bias + memories_.path.biases(each).sum(0)[:, 0]
            for paths in recording["mlp_path"]:
                entry, offsets = _mlp_entry(paths, u)
                mlp.append(entry)
                bias = bias + offsets
            plain = (
                self.objective == "logit" or logits.shape[1] == 1 or classes.contrast is not None
            )
            log_p = logits.log_softmax(-1)
            score = (logits if plain else log_p).gather(1, classes.index)[:, 0]
            if classes.contrast is not None:
                score = score - logits.gather(1, classes.contrast)[:, 0]
            return LogitLedger(
                attention=torch.cat(attention).transpose(0, 1),
                mlp=torch.stack(mlp, 1),
                embedding=(upcast(recording["embedding"][0]) * u[:, :, 0]).sum((1, 2)),
                bias=bias,
                score=score,
                prefix_tokens=self.vit.prefix_tokens,
                pool=None if pool is None else pool[:, 0],
                entropy=None if plain else (log_p.exp() * log_p).sum(-1),
                attention_memories=_by_memory(recording, "attn", done, u) if memories else None,
                mlp_memories=_by_memory(recording, "mlp", done, u) if memories else None,
            )


def attention_of(stage: Stage) -> list[Tensor]:
    """A at the query rows of each module, where it was recorded: L×B×H×Q×N."""
    return [memories.attention for memories in stage.modules if memories.attention is not None]


def _mlp_entry(paths: Sequence[OutputPath], u: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLPs of a block add along u without biases, and what their biases add: B, B."""
    entry, total = u.new_zeros(len(u)), u.new_zeros(len(u))
    for path in paths:
        outer = OutputPath(path.steps[1:], path.inputs[1:], path.output)
        direction = outer.vjp(u, frozen=True)
        bias = along(path.steps[0].offset(), direction)[:, 0]
        written = path.inputs[1] if len(path.inputs) > 1 else path.output
        entry = entry + (upcast(written) * direction[:, :, 0]).sum((1, 2)) - bias
        total = total + outer.biases(u)[:, 0] + bias
    return entry, total


def _by_memory(recording: Recording, branch: str, done: ForwardPass, u: Tensor) -> Tensor:
    """Coefficient × (value vector · u), summed over the rows read: B×L×M."""
    rows = []
    for block, coefficients in enumerate(recording[f"{branch}_coefficients"]):
        if branch == "mlp":
            along_u = [p.since(Linear).vjp(u, True) for p in recording["mlp_path"][block]]
        else:
            stage = next(s for s in done.stages if block in s.blocks)
            place = stage.blocks.index(block)
            each = u.expand(len(stage.blocks), *u.shape)
            paths = [m.path.since(Linear) for m in stage.modules]
            along_u = [path.vjp(each, frozen=True)[place] for path in paths]
        pairs = zip(coefficients, along_u, strict=True)
        rows.append(torch.cat([(upcast(m) * v[:, :, 0]).sum(1) for m, v in pairs], -1))
    return torch.stack(rows, 1)
