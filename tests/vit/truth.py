"""What a model computes once it was changed: its maps by autograd, and what its pixels move.

Nothing here uses the package. The changed model itself is run, with its hooks, wrappers and own
forwards; only torch's attention, softmax and norms are replaced by ones that show or hold what they
compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from reference import by_share
from torch import Tensor, nn
from torch.nn import functional as F
from vit.changed import HIDDEN, Parts


@dataclass
class Run:
    """One pass: A and what attention returned by call, and the stream by block."""

    attention: list[Tensor] = field(default_factory=list)
    branches: list[Tensor] = field(default_factory=list)
    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _explicit(
    run: Run, parts: Parts, direct: bool, held: bool, linear: bool = False
) -> Iterator[None]:
    """Attention in the graph; if ``direct``, A as a leaf and no path through later branches.

    ``held``: norms, but those that branches begin with, have their σ detached. ``linear``: so do
    those too, and attention and activations are what they multiply by.
    """
    softmax, layer_norm, rms_norm = Tensor.softmax, F.layer_norm, F.rms_norm
    fused = F.scaled_dot_product_attention

    def seen(weights: Tensor) -> Tensor:
        if direct:
            weights = weights.detach().requires_grad_(True)
        weights = weights.detach() if linear else weights
        run.attention.append(weights)
        return weights

    def eager(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        weights = softmax(scores, *args, **options)
        return seen(weights) if scores.dim() == 4 and not HIDDEN else weights

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *_: Any, **o: Any) -> Tensor:
        if HIDDEN:
            return fused(q, k, v, attn_mask=attn_mask, scale=o.get("scale"))
        scores = q @ k.transpose(-2, -1) * (o.get("scale") or q.shape[-1] ** -0.5)
        if o.get("is_causal"):
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return seen(softmax(scores, -1)) @ (v.detach() if direct else v)

    def normed(x: Tensor, plain: Tensor, sigma: Tensor, centre: bool, weight: Any) -> Tensor:
        branch = any(weight is norm.weight for norm in parts.branch_norms)
        if direct and branch:
            return plain.detach()
        if not held and not (linear and branch):
            return plain
        y = (x - x.mean(-1, keepdim=True) if centre else x) / sigma.detach()
        y = y if weight is None else y * weight
        return y + (plain - y).detach()

    def by_layer(
        x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        sigma = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return normed(x, layer_norm(x, shape, weight, bias, eps), sigma, True, weight)

    def by_rms(x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Any:
        sigma = (x.square().mean(-1, keepdim=True) + (eps or torch.finfo(x.dtype).eps)).sqrt()
        return normed(x, rms_norm(x, shape, weight, eps), sigma, False, weight)

    def gated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def gate(x: Tensor, *args: Any, **options: Any) -> Tensor:
            y = function(x, *args, **options)
            # A head is held where it is affine then.
            inside = held or len(run.leaving) < len(parts.blocks)
            return x * (y / x).detach() if linear and inside else y

        return gate

    with ExitStack() as stack:
        for activation in ("gelu", "silu", "relu"):
            replaced = gated(getattr(F, activation))
            stack.enter_context(mock.patch.object(F, activation, replaced))
        for name, module in parts.model.named_modules() if linear else ():
            if type(module).__name__ == "GELUActivation":  # it keeps torch's function
                stack.enter_context(mock.patch.object(module, "act", gated(F.gelu)))
            if name.endswith("attn.gate"):
                handle = module.register_forward_hook(lambda m, args, y: y.detach())
                stack.callback(handle.remove)
        stack.enter_context(mock.patch.object(Tensor, "softmax", eager))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(F, "layer_norm", by_layer))
        stack.enter_context(mock.patch.object(F, "rms_norm", by_rms))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


@contextmanager
def _watched(run: Run, parts: Parts, enter: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hooks, behind the user's own, on blocks and their attention."""

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if HIDDEN or not args:
            return None
        tokens = enter(args[0])
        run.entering.append(tokens)
        return (tokens, *args[1:]), kwargs

    def tensor(output: Any) -> Tensor:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def attended(scale: Any) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            if not HIDDEN:
                run.branches.append(scale(tensor(output)))

        return hook

    def after(_: Any, __: Any, output: Any) -> None:
        if not HIDDEN:
            run.leaving.append(tensor(output))

    handles = []
    for block in dict.fromkeys(parts.blocks):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
        beside = [(branch.attn, branch.ls) for branch in getattr(block, "attns", ())]
        name = parts.place("attn")
        for owner in [] if beside else [m for m in block.modules() if hasattr(m, name)][:1]:
            beside = [(getattr(owner, name), getattr(owner, "ls1", nn.Identity()))]
        for attention, scale in beside:
            handles.append(attention.register_forward_hook(attended(scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _EnoughError(Exception):
    """Nothing further is needed of a pass."""


class UnlikeError(Exception):
    """What was run is not the model."""


def logits_in(output: Any) -> Tensor:
    """Logits B×C, also of a model that returns one number an image, or more than logits."""
    output = getattr(output, "logits", output)
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    return logits[:, None] if logits.dim() == 1 else logits


class Truth:
    """What the changed model computes on some images, for one target an image."""

    def __init__(self, model: nn.Module, parts: Parts, images: Tensor, target: Tensor) -> None:
        if any(p.is_inference() for p in model.parameters()):  # autograd cannot save them
            model = parts.model = copy.deepcopy(model)
        if getattr(model, "grad_checkpointing", False):  # it would run the blocks again
            model.set_grad_checkpointing(False)
        self.model, self.parts, self.images, self.target = model, parts, images, target
        with torch.no_grad():
            self.logits = logits_in(model(images))

    @cached_property
    def direct(self) -> Run:
        """A pass whose logits are an affine function of its attention maps."""
        return self._run(direct=True, held=True)

    @cached_property
    def free(self) -> Run:
        """The same with every norm's σ as a function of what it is given."""
        return self._run(direct=True, held=False)

    def _run(
        self, *, direct: bool, held: bool, rows: int | None = None, linear: bool = False
    ) -> Run:
        run = Run()

        def enter(tokens: Tensor) -> Tensor:
            if not run.entering:
                tokens = tokens.detach().requires_grad_(True)
            if rows is None:
                return tokens
            return torch.cat([tokens[:, :rows], tokens[:, rows:].detach()], 1)

        explicit = _explicit(run, self.parts, direct, held, linear)
        with explicit, _watched(run, self.parts, enter):
            run.logits = logits_in(self.model(self.images))
        close = partial(torch.allclose, rtol=1e-5, atol=1e-5, equal_nan=True)
        if not close(run.logits.detach(), self.logits):
            raise UnlikeError("with explicit attention the model is another one: is it random?")
        return run

    def _picked(self, logits: Tensor, log_probability: bool) -> Tensor:
        scores = logits.log_softmax(-1) if log_probability else logits
        return scores.gather(1, self.target[:, None]).sum()

    def _weighted(self, run: Run, score: Tensor) -> Tensor:
        """A times its derivative summed over query rows: B×L×H×N."""
        slopes = _slopes(score, run.attention)
        pairs = zip(run.attention, slopes, strict=True)
        return _by_block([(a * slope).sum(2) for a, slope in pairs], run).detach()

    def memory(self, log_probability: bool = False, held: bool = True) -> Tensor:
        """The direct entries of the logit, or of log p at fixed p."""
        run = self.direct if held else self.free
        z = run.logits
        leaf = z.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(self._picked(leaf, log_probability), leaf)
        return self._weighted(run, (g * z).sum())

    def gradient(self) -> Tensor:
        """∂logit/∂A with attention's output in the place of the final tokens."""
        run, maps = self.free, []
        several = max(len(run.branches) // max(len(run.entering), 1), 1)
        for i in range(len(run.branches)):
            first = i // several * several
            beside = run.branches[first : first + several]
            score = self._picked(self.parts.read(sum(beside)), False)  # type: ignore[arg-type]
            maps.append(_slopes(score, [run.attention[i]])[0].sum(2))
        return _by_block(maps, run)

    def patches(self, count: int, affine: bool) -> Tensor:
        """(s + d + c)·√s of the last tokens, which are the patches."""
        rows = self.parts.read_rows
        run = self.free if rows is None else self._run(direct=False, held=False, rows=rows)
        estimates = (
            self._weighted(run, self._picked(run.logits, True)).relu(),
            self.memory(held=affine),
            self.memory(log_probability=True, held=affine),
        )
        estimates = tuple(estimate[..., -count:] for estimate in estimates)
        shares = [e / e.sum((1, 2), keepdim=True).abs().sum(3, keepdim=True) for e in estimates]
        return sum(shares) * shares[0].sum((1, 2), keepdim=True).sqrt()  # type: ignore[no-any-return]

    def paths(self, count: int, affine: bool) -> Tensor:
        """Token · derivative of the linear model, by shares: B×L×1×P."""
        run = self._run(direct=False, held=affine, linear=True)
        several = run.logits.shape[1] > 1
        shares = []
        for log_probability in (False, True)[: 1 + several]:
            leaf = run.logits.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(self._picked(leaf, log_probability), leaf)
            g = g - g.mean(1, keepdim=True) if several else g
            slopes = _slopes((g * run.logits).sum(), run.entering)
            pairs = zip(run.entering, slopes, strict=True)
            maps = torch.stack([(x * slope).sum(-1) for x, slope in pairs], 1).detach()
            maps = maps[:, :, None, -count:]
            shares.append(by_share(maps))
        return sum(shares)  # type: ignore[return-value]

    def projection(self) -> Tensor:
        """The logit of every token of the last block, read alone: B×1×1×N."""
        tokens = self.direct.leaving[-1]
        with torch.no_grad():
            batch, count, width = tokens.shape
            alone = tokens.reshape(-1, 1, width).expand(-1, count, -1)
            logits = self.parts.read(alone).view(batch, count, -1)
        index = self.target.view(-1, 1, 1).expand(-1, count, 1)
        return logits.gather(2, index)[..., 0][:, None, None]

    # -- What a patch is

    def moved(self, regions: list[Tensor]) -> Tensor:
        """How far each token that enters the first block moves with the pixels of each region.

        The images that are changed are not the first of their batch: R×N.
        """
        image = self.images[1]
        same = torch.stack([self.images[0], *[image for _ in regions]])
        other = same.clone()
        for r, region in enumerate(regions):
            other[r + 1][:, region] += 1.5
        return (self._embedded(other) - self._embedded(same))[1:].norm(dim=-1)

    def _embedded(self, images: Tensor) -> Tensor:
        """What enters the first block."""
        run = Run()

        def stop(tokens: Tensor) -> Tensor:
            run.entering.append(tokens)
            raise _EnoughError

        with torch.no_grad(), _watched(run, self.parts, stop), suppress(_EnoughError):
            self.model(images)
        return run.entering[0]

    def stays(self, token: int) -> bool:
        """Whether a token of the stream is at its place in every block, branches held."""
        first = self.direct.entering[0]
        for tokens in [*self.direct.entering[1:], *self.direct.leaving]:
            if tokens.shape != first.shape:
                return False
            (slope,) = _slopes(tokens[1, token].sum(), [first])
            moved = slope.abs().sum(-1)
            if moved[1, token] == 0 or (moved > 0).sum() > 1:
                return False
        return True


def _by_block(maps: list[Tensor], run: Run) -> Tensor:
    """B×L×H×N, the heads of parallel modules side by side."""
    most = max(len(part[0]) for part in maps)  # where a block has fewer heads, zeros
    padded = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in maps]
    return torch.cat(padded, 1).unflatten(1, (max(len(run.entering), 1), -1))


def _slopes(score: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not score.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    slopes = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if slope is None else slope
        for leaf, slope in zip(leaves, slopes, strict=True)
    ]
