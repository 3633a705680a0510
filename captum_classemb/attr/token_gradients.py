"""The gradient of Vilas et al. (2023, §6) at every query token, each with a readout of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.objectives import Objective, logit_gradient
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.readout import Linear, OutputPath, Readout
from captum_classemb.vit import ViT, record

__all__ = ["Of", "token_gradients"]

Of = Literal["attention", "coefficients"]


def token_gradients(
    vit: ViT,
    readout: Readout,
    objective: Objective,
    blocks: list[int],
    pixels: Tensor,
    index: Tensor,
    args: tuple[Any, ...],
    of: Of,
) -> Tensor:
    """∂score_q/∂A[k, q, j] or ∂score_q/∂m_q for every query q, score_q read of q's row alone.

    Args:
        vit: an adapted model.
        readout: from tokens to logits.
        objective: what the score is.
        blocks: the L' blocks that are read.
        pixels: B×3×H×W.
        index: target classes, B.
        args: further arguments of the model's forward.
        of: ``"attention"`` or ``"coefficients"``, which enter W_O.

    Returns:
        B×L'×H×N×N, or B×L'×N×M.

    Raises:
        InputError: for another ``of``.
        UnsupportedModelError: if the blocks differ in their heads, or not all tokens ask in them.
    """
    if of not in ("attention", "coefficients"):
        raise InputError(f"of={of!r} is neither 'attention' nor 'coefficients'.")
    recording = record(vit, pixels, ["values", "attn_path"], blocks=blocks, forward_args=args)
    found = []
    with torch.inference_mode(False), no_autocast(pixels.device):
        for block in blocks:
            paths: list[OutputPath] = list(recording["attn_path"][block])
            if objective == "paper":
                paths = [path.before_layer_scale() for path in paths]
            rows = sum((upcast(path.output) for path in paths[1:]), upcast(paths[0].output))
            delta = _at_rows(readout.at(block, "attn_out"), rows, objective, index)
            parts = []
            for path, values in zip(paths, recording["values"][block], strict=True):
                if of == "coefficients":
                    parts.append(path.since(Linear).vjp(delta)[:, :, 0])
                    continue
                by_head = path.vjp(delta)[:, :, 0].unflatten(-1, (values.shape[1], -1))
                parts.append(by_head.transpose(1, 2) @ upcast(values).mT)
            found.append(torch.cat(parts, 1 if of == "attention" else -1))
    if len({part.shape for part in found}) > 1 or rows.shape[1] != values.shape[2]:
        raise UnsupportedModelError(
            f"{type(vit.model).__qualname__} has no gradient of this shape for every token: its "
            "blocks differ, or only some of its tokens attend."
        )
    return torch.stack(found, 1)


def _at_rows(readout: Readout, rows: Tensor, objective: Objective, index: Tensor) -> Tensor:
    """∂score/∂row for every row as if it were the only one read: B×N×1×D."""
    leaf = rows.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = readout.project(leaf)
        g = logit_gradient(logits.detach(), index[:, None, None], objective)
        (delta,) = torch.autograd.grad(logits, leaf, g[:, :, 0].to(logits.dtype))
    return delta[:, :, None]
