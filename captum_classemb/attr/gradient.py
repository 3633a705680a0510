"""Gradient patch importance in closed form (Vilas et al. 2023, §6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classemb.attr._base import check_classes
from captum_classemb.attr._forward_pass import Classes, ForwardPassAttribution, Needs
from captum_classemb.attr._inputs import forward_args, images
from captum_classemb.attr.token_gradients import Of, token_gradients
from captum_classemb.errors import InputError
from captum_classemb.functional.attention import chunks, values_along
from captum_classemb.functional.objectives import check_objective, logit_gradient, paper_weights
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.readout import ClassEmbedding, OutputPath, Readout
from captum_classemb.vit.memories import ForwardPass, Stage

__all__ = ["ClassEmbeddingGradient"]


class ClassEmbeddingGradient(ForwardPassAttribution):
    """The patch importance of Vilas et al. (2023, §6), in one forward pass.

    For block b, the output of its attention takes the place of the final hidden states; the
    importance of token j in head k is ∂score/∂A_b[k, q, j] summed over the tokens q that the
    readout reads. It equals v_j^k · (W_O^kᵀ δ), with δ the derivative of the score with respect to
    attention's output, so no backward pass and no attention matrix is needed.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        objective (str, optional): ``"paper"``, what the published code computes: the
            log-probability after a second softmax, read before LayerScale;
            ``"log_probability"``; ``"logit"``, the one to take for multi-label heads, where other
            labels change nothing. A model with one logit is explained by it. Default: ``"paper"``
        blocks (Sequence[int], optional): the blocks used. Default: all
        heads (Sequence[int], optional): the heads used. Default: all

    Raises:
        InputError: if an option has no such value.
        UnsupportedModelError: if the model is not supported.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> model, image = demo_vit(), torch.rand(1, 3, 64, 64)
        >>> gradient = ClassEmbeddingGradient(model)
        >>> gradient.attribute(image, target=7).shape
        torch.Size([1, 3, 64, 64])
        >>> gradient.attribute_classes(image).shape
        torch.Size([1, 10, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module | None = None,
        objective: Literal["paper", "log_probability", "logit"] = "paper",
        blocks: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        check_objective(objective, ("paper", "log_probability", "logit"))
        super().__init__(model, readout, blocks, heads)
        check_classes(self.vit, objective)
        self.objective = objective

    def attribute_tokens(
        self,
        inputs: Tensor,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        of: Of = "attention",
    ) -> Tensor:
        """The gradient for every query token, each read as if it were the only one.

        Args:
            inputs (Tensor): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None
            of (str, optional): ``"attention"``: the weights of the query's row; or
                ``"coefficients"``: of the memories, what enters W_O. Default: ``"attention"``

        Returns:
            Tensor: B×L'×H'×N×N (queries, keys) for the chosen blocks and heads, or B×L'×N×M.

        Raises:
            InputError: for another ``of``.
            UnsupportedModelError: if only some tokens attend in the model's blocks.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args)
        index = self._targets(target, pixels)
        found = token_gradients(
            self.vit, self.readout, self.objective, list(self.blocks), pixels, index, args, of
        )
        return found if self._every_head or of != "attention" else found[:, :, self.heads]

    def needs(self) -> Needs:
        return Needs(self.readout.reads, tuple(self.blocks))

    def against(self, done: ForwardPass, index: Tensor, contrast: Any) -> Classes:
        if contrast is not None and self.objective == "paper":
            raise InputError(
                "contrast is not defined for the objective 'paper': take 'logit' or "
                "'log_probability'."
            )
        return super().against(done, index, contrast)

    def _paths(self, stage: Stage) -> list[OutputPath]:
        paths = [memories.path for memories in stage.modules]
        if self.objective == "paper":
            return [path.before_layer_scale() for path in paths]
        return paths

    def _entries(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        return [self._patches(self._stage_entries(done, stage, classes)) for stage in done.stages]

    def _stage_entries(
        self,
        done: ForwardPass,
        stage: Stage,
        classes: Classes,
        read: tuple[Tensor, tuple[Tensor, Tensor] | None] | None = None,
    ) -> Tensor:
        """∂score/∂A summed over query rows: L×B×H×K×N.

        ``read`` holds the stage's logits and paper weights, where one readout gave them already.
        """
        paths = self._paths(stage)
        rows = added(paths)
        alike = all(path.uniform for path in paths)

        def of(readout: Readout, x: Tensor) -> Tensor:
            logits, paper = read or (readout(x), None)
            g = logit_gradient(logits, classes.index, self.objective, classes.contrast, paper)
            g = g if self.objective == "logit" else self.resolved(done, g)
            return readout.vjp(x, g, summed=alike)

        readouts = [self.readout.at(block, "attn_out") for block in stage.blocks]
        if all(readout is readouts[0] for readout in readouts):
            delta = of(readouts[0], rows)
        else:
            delta = torch.stack([of(r, x) for r, x in zip(readouts, rows, strict=True)])
        parts = []
        for memories, path in zip(stage.modules, paths, strict=True):
            z = path.vjp(delta)
            z = z if z.shape[-3] == 1 else z.sum(-3, keepdim=True)
            parts.append(values_along(memories.values, z)[..., 0, :, :])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    # -- All classes of a linear head: what a unit of attention does to the features goes forward,
    # and one product with the class embedding makes logits of it.

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        readout = self.readout
        paths = [path for stage in done.stages for path in self._paths(stage)]
        one_way = all(path.uniform or path.output.shape[2] == 1 for path in paths)
        if len(index) <= self._AT_ONCE or not (one_way and isinstance(readout, ClassEmbedding)):
            return super().class_maps(done, index)
        with no_autocast(done.logits.device), self._reading():
            return self._linear_head(done, readout, index)

    def _linear_head(self, done: ForwardPass, readout: ClassEmbedding, index: Tensor) -> Tensor:
        """B×K×N. With M_c the logit's map: M_c, M_c − Σ p M, or p_c(M_c − Σ p M) − Σ r M."""
        everything = readout.head_weight()
        chosen = everything[index].T
        sums: list[Tensor] = []
        common: list[Tensor] = []
        readings = []
        for stage in done.stages:
            paths = self._paths(stage)
            rows = added(paths)
            logits = readout(rows)
            paper = paper_weights(logits) if self.objective == "paper" else None
            readings.append((logits, paper))
            p, r = paper or (logits.softmax(-1),) * 2
            for some in chunks(stage.modules[0].values):
                features = readout.jvp_features(rows[some], self._tangents(stage, paths, some))
                common.append((features @ (r[some] @ everything)[..., None]).sum(0))
                if paper is None:
                    _add(sums, features)
                    continue
                mean = features @ (p[some] @ everything)[..., None]
                flat = torch.addmm(mean.flatten(0, 2), features.flatten(0, 2), chosen, beta=-1)
                _add(sums, flat.view(*mean.shape[:3], -1), p[some][..., None, index])
        maps = sums[0] if self.objective == "paper" else sums[0] @ chosen
        if self.objective != "logit":
            maps -= common[0] if len(common) == 1 else torch.stack(common).sum(0)
            maps = self._leading(done, maps, readings, index)
        return self._patches(maps.transpose(1, 2))

    def _tangents(self, stage: Stage, paths: Sequence[OutputPath], some: slice) -> Tensor:
        """What a unit of attention to each token adds to the rows, all chosen heads: L'×B×N×D."""
        total: Tensor | None = None
        first = 0
        for memories, path in zip(stage.modules, paths, strict=True):
            v = upcast(memories.values[some])
            if not self._every_head:
                chosen = [float(first + k in self.heads) for k in range(v.shape[2])]
                v = v * v.new_tensor(chosen)[:, None, None]
            first += v.shape[2]
            # Each source token is one of K = N tangents that all rows share.
            t = v.transpose(2, 3).flatten(3)[:, :, None]
            for step, x in zip(path.steps, path.inputs, strict=True):
                t = step.at(x)[some].jvp(t)
            total = t if total is None else total + t
        assert total is not None
        return total[:, :, 0]

    def _leading(
        self, done: ForwardPass, maps: Tensor, readings: Sequence[Any], index: Tensor
    ) -> Tensor:
        """Classes that lead in some block take their maps (B×N×K) from the plain form.

        Where p_c is close to 1, the differences above are lost to rounding.
        """
        tops = [logits.argmax(-1) for logits, _ in readings]
        leads = (tops[0] if len(tops) == 1 else torch.cat(tops)).T
        plain: list[Tensor] = []
        for stage, read in zip(done.stages, readings, strict=True):
            entries = self._stage_entries(done, stage, Classes(leads), read)
            _add(plain, self._of_heads(entries).sum(2))
        same = leads[:, :, None] == index
        found = same.to(torch.uint8).argmax(1)
        taken = plain[0].gather(1, found[..., None].expand(-1, -1, plain[0].shape[2]))
        return torch.where(same.any(1)[:, None], taken.transpose(1, 2), maps)


def _add(total: list[Tensor], parts: Tensor, factor: Tensor | None = None) -> None:
    """Add Σ_L parts · factor (L×…) to the one tensor that ``total`` holds.

    In place: fresh pages would cost more than the products.
    """
    if len(parts) == 1 and total and factor is not None:
        total[0].addcmul_(parts[0], factor[0])
        return
    parts = parts if factor is None else parts.mul_(factor)
    part = parts[0] if len(parts) == 1 else parts.sum(0)
    total[:] = [total[0].add_(part) if total else part]


def added(paths: Sequence[OutputPath]) -> Tensor:
    """What parallel attention modules add together: L×B×Q×D."""
    return sum((path.output for path in paths[1:]), paths[0].output)
