"""The map of each method from its formula alone: explicit attention, autograd, float64.

Nothing here uses the package. Each function returns the maps of patches with blocks and heads
apart, B×L×H×P, for one target an image. ``other`` is the class that the target is set against.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case
from oracle import eager_attention, frozen_at, logits_of
from torch import Tensor
from torch.nn import functional as F


def score(z: Tensor, target: Tensor, objective: str, other: Tensor | None = None) -> Tensor:
    """What is explained, from logits B×C: B."""
    own = z.gather(1, target[:, None])[:, 0]
    if other is not None:  # log p_c - log p_other is the same
        return own - z.gather(1, other[:, None])[:, 0]
    if objective == "logit":
        return own
    if objective == "above the mean":
        return own - z.mean(1)
    if objective == "paper" and z.shape[1] > 1:
        return z.softmax(-1).log_softmax(-1).gather(1, target[:, None])[:, 0]
    if z.shape[1] > 1:  # log p_c = log sigma(z_c - log sum of the others), at any confidence
        own = own - z.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    return F.logsigmoid(own)


def runner_up(z: Tensor, target: Tensor) -> Tensor:
    """The class with the highest other logit: B."""
    return z.scatter(1, target[:, None], -torch.inf).argmax(1)


def projection(known: Case, target: Tensor, objective: str, tokens: Tensor) -> Tensor:
    """Each token read by the last norm and the classifier as if it were the only one: B×P."""
    batch, count, width = tokens.shape
    # A sequence of one and the same token is pooled to that token, whatever the pooling.
    alone = tokens.reshape(-1, 1, width).expand(-1, count, -1)
    z = known.oracle.anatomy.read(alone).detach()
    scores = {
        "logit": z,
        "log_probability": z.log_softmax(-1),
        "probability": z.softmax(-1),
        "identifiability": 1 - ((z[:, None] >= z[..., None]).sum(-1) - 1).double() / z.shape[1],
    }[objective]
    picked = scores.gather(1, target.repeat_interleave(count)[:, None])
    return picked.view(batch, count)[:, known.oracle.anatomy.prefix :]


def gradient(known: Case, target: Tensor, objective: str, other: Tensor | None = None) -> Tensor:
    """∂score/∂A_b[k, q, j] summed over q, attention's output in the place of the final tokens."""
    oracle, maps = known.oracle, []
    for b, layer in enumerate(oracle.anatomy.layers):
        # The published code reads a branch before LayerScale, but after a post-norm.
        tokens = oracle.trace.raw[b] if objective == "paper" else oracle.trace.branch[b]
        z = oracle.anatomy.read(oracle.in_place(layer, tokens))
        attention = oracle.trace.attention[b]
        (slope,) = torch.autograd.grad(
            score(z, target, objective, other).sum(), attention, retain_graph=True
        )
        maps.append(slope.sum(2))
    return torch.stack(maps, 1)[..., oracle.anatomy.prefix :]


def memory(known: Case, target: Tensor, objective: str, other: Tensor | None = None) -> Tensor:
    """A_b[k, q, j] · v_j · (W_Oᵀ u) summed over q: A times its derivative, every σ frozen."""
    oracle, attention = known.oracle, known.oracle.trace.attention
    z = frozen_logits(known)
    leaf = z.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(score(leaf, target, objective, other).sum(), leaf)
    slopes = torch.autograd.grad((g * z).sum(), attention, retain_graph=True)
    maps = [(a * slope).sum(2) for a, slope in zip(attention, slopes, strict=True)]
    return torch.stack(maps, 1).detach()[..., oracle.anatomy.prefix :]


def patch_importance(
    known: Case,
    target: Tensor,
    objective: str = "log_probability",
    other: Tensor | None = None,
) -> Tensor:
    """(s + d + c)·√s of the shares: stream, direct to the logit, direct to the objective.

    A patch whose token enters the last block with three times the median norm scores no more than
    a quarter of the other patches.
    """
    estimates = (
        stream(known, target, objective, other).relu(),
        memory(known, target, "logit", other),
        memory(known, target, objective, other),
    )
    totals = [estimate.sum((1, 2)).abs().sum(1) for estimate in estimates]
    s, d, c = (e / total.view(-1, 1, 1, 1) for e, total in zip(estimates, totals, strict=True))
    maps = (s + d + c) * s.sum((1, 2), keepdim=True).sqrt()
    norms = known.oracle.trace.resid_pre[-1][:, known.oracle.anatomy.prefix :].norm(dim=-1)
    if norms.shape[1] != maps.shape[-1]:  # the last block takes patches apart from the stream
        return maps
    sink = norms > 3 * norms.median(1, keepdim=True).values
    whole = maps.sum((1, 2))
    others = whole.masked_fill(sink, -torch.inf).sort(1, descending=True).values
    bound = others[:, whole.shape[1] // 4 - 1, None].clamp_min(0.0)
    part = torch.where(sink & (whole > bound), bound / whole, 1.0)
    return maps * part[:, None, None]


def stream(known: Case, target: Tensor, objective: str, other: Tensor | None = None) -> Tensor:
    """A_b[k, q, j] · v_j · z summed over q, z the derivative along the rows that are read.

    All other tokens are held constant. Where the rows cannot be followed by themselves, the
    derivative takes the residual stream alone.
    """
    if known.followed:
        z, attention = detached_logits(known)
    else:
        oracle, attention = known.oracle, known.oracle.trace.attention
        moved = sum(branch - branch.detach() for branch in oracle.trace.branch)
        z = oracle.anatomy.read(oracle.trace.final.detach() + moved)
    explained = score(z, target, objective, other).sum()
    slopes = torch.autograd.grad(explained, attention, retain_graph=True)
    maps = [(a * slope).sum(2) for a, slope in zip(attention, slopes, strict=True)]
    by_block = torch.cat(maps, 1).unflatten(1, (len(known.oracle.anatomy.layers), -1))
    return by_block.detach()[..., known.oracle.anatomy.prefix :]


def all_paths(
    known: Case, target: Tensor, objective: str = "both", other: Tensor | None = None
) -> Tensor:
    """x_b · ∂score/∂x_b at every block's input, on a copy whose factors are all detached.

    The mean over blocks; for both objectives, the logit above the mean of all classes and the
    log-probability, each by shares: B×L×1×P.
    """
    if objective == "both":
        plain = other is not None or known.oracle.logits.shape[1] == 1
        kinds = ["logit"] if plain else ["above the mean", "log_probability"]
        parts = [all_paths(known, target, kind, other) for kind in kinds]
        return torch.stack([by_share(part) for part in parts]).sum(0)
    z, entering = linear_logits(known)
    leaf = z.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(score(leaf, target, objective, other).sum(), leaf)
    flat = [x for entered in entering for x in entered]
    slopes = iter(torch.autograd.grad((g * z).sum(), flat))
    by_block = [[next(slopes) for _ in entered] for entered in entering]
    maps = []
    for b, entered in enumerate(entering):
        # Patches that class attention hands on reach every later block.
        later = [by_block[b][0], *(sum(s[1] for s in by_block[b:]) for _ in entered[1:])]
        each = [(x * s).sum(-1) for x, s in zip(entered, later, strict=True)]
        maps.append(torch.cat(each, 1).detach() / len(entering))
    return torch.stack(maps, 1)[:, :, None, known.oracle.anatomy.prefix :]


def by_share(maps: Tensor) -> Tensor:
    """Blocks that spread over the patches at most twice as far as the median one, Σ|map| 1."""
    shares = torch.zeros_like(maps)
    for b, blocks in enumerate(maps[:, :, 0]):
        spread = (blocks - blocks.mean(1, keepdim=True)).abs().sum(1)
        most = 2 * spread.sort().values[(len(spread) - 1) // 2]
        far = spread > most
        capped = torch.where(far[:, None], blocks / spread[:, None] * most, blocks)
        shares[b, :, 0] = capped / capped.sum(0).abs().sum()
    return shares


def linear_logits(known: Case) -> tuple[Tensor, list[list[Tensor]]]:
    """The model's logits with attention, σ and gates detached, and what enters each block."""
    model: Any = copy.deepcopy(known.oracle.model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    names = {module: name for name, module in known.oracle.model.named_modules()}
    layers = known.oracle.anatomy.layers
    blocks = [model.get_submodule(names[layer.block]) for layer in layers]
    entering: list[list[Tensor]] = []

    def enter(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if layers[0].stream:
            clones = tuple(x.clone() for x in args[:2])
            entering.append([clones[1], clones[0]])
            return (*clones, *args[2:])
        entering.append([args[0]])
        return args

    # A readout that is no affine map is differentiated as it is.
    linear = [model] if known.affine else blocks
    for module in dict.fromkeys(m for part in linear for m in part.modules()):
        _hold_factors(module)
    for block in blocks:
        block.register_forward_pre_hook(enter)
    with eager_attention(held=True):
        z = logits_of(model(*known.oracle.inputs))
    assert torch.allclose(z, known.oracle.logits, rtol=1e-5, atol=1e-5), "a value was changed"
    return z, entering


def _hold_factors(module: Any) -> None:
    """Hooks that detach what a module multiplies its input by."""
    kind = type(module).__name__
    if "Norm" in kind and "Block" not in kind:
        module.register_forward_hook(lambda m, args, y: frozen_at(args[0].detach())(m, args, y))
    elif kind in ("GELU", "SiLU", "GELUActivation", "ReLU"):
        module.register_forward_hook(lambda m, args, y: args[0] * (y / args[0]).detach())
    elif kind in ("SwiGLU", "GluMlp"):  # a product: half of the derivative to each factor
        module.drop1.register_forward_pre_hook(lambda m, args: args[0] / 2 + (args[0] / 2).detach())
    if getattr(module, "gate", None) is not None:
        module.gate.register_forward_hook(lambda m, args, y: y.detach())


def frozen_logits(known: Case) -> Tensor:
    """The model's logits as a function of its attention maps alone, every σ frozen: B×C."""
    oracle, trace = known.oracle, known.oracle.trace
    tokens = trace.resid_pre[0]
    with oracle.frozen():
        for b, layer in enumerate(oracle.anatomy.layers):
            mixed = trace.attention[b] @ trace.values[b]
            entering = oracle.attention_coefficients(layer, mixed, trace.gates[b])
            parts = zip(layer.attentions, entering, strict=True)
            tokens = tokens + sum(part.outer(part.write(m)) for part, m in parts)
            tokens = tokens + trace.mlp_branch[b]
        tokens = oracle.in_place(oracle.anatomy.layers[0], tokens)
        if known.affine:
            pool = oracle.pool_entry()
            z = oracle.read_frozen(tokens)
            return z if pool is None else z + pool
    return oracle.anatomy.read(tokens)


def detached_logits(known: Case) -> tuple[Tensor, list[Tensor]]:
    """The model's logits with tokens that are not read out detached, and A of each module."""
    model: Any = copy.deepcopy(known.oracle.model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    layers = known.oracle.anatomy.layers
    rows = 2 if hasattr(model, "head_dist") else 1
    names = {module: name for name, module in known.oracle.model.named_modules()}
    blocks = [model.get_submodule(names[layer.block]) for layer in layers]
    with eager_attention() as calls, _detaching(blocks, rows):
        z = logits_of(model(*known.oracle.inputs))
    # Eager attention of Hugging Face rounds its weights to float32.
    assert torch.allclose(z, known.oracle.logits, rtol=1e-5, atol=1e-5), "a value was changed"
    return z, [a for a, _ in calls[-sum(len(layer.attentions) for layer in layers) :]]


@contextmanager
def _detaching(blocks: list[Any], rows: int) -> Iterator[None]:
    def detach(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) > 1 and isinstance(args[1], Tensor):  # class attention: patches, then CLS
            return (args[0].detach(), *args[1:])
        return (torch.cat([args[0][:, :rows], args[0][:, rows:].detach()], 1), *args[1:])

    handles = [block.register_forward_pre_hook(detach) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
