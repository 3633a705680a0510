"""Put activations of other images, a mean or noise in the place of an image's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.edit.coefficients import Layer, coefficients_changed, head_columns
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.readout import Norm, Scale
from captum_classemb.vit.active_edits import marked, paused, unless_paused
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Call
from captum_classemb.vit.record import ALL, SiteRecorder

__all__ = ["SITES", "Change", "fitting", "observed", "part_of", "patch_activations", "patched"]

#: Sites of the residual stream, then what enters W_O and the last layer of an MLP.
SITES = (
    "resid_pre",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
    "attn_coefficients",
    "mlp_coefficients",
)

#: Images; activations by block, as a recording holds them; or what makes new ones of the own.
Source = Tensor | Sequence[Any] | Callable[[Tensor], Tensor]

#: From the activations of a site in a block (B×N×·) to those that take their place; of the
#: coefficients of parallel modules, those of one, and where they begin among all.
Change = Callable[[Tensor, int], Tensor]


@contextmanager
def patch_activations(
    vit: ViT,
    site: str,
    source: Source,
    *,
    blocks: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Tensor | Sequence[int] | None = None,
) -> Iterator[None]:
    """Within the context, activations of a site are replaced before the model goes on.

    Later blocks compute with what takes their place. Denoising runs the corrupted images with
    activations of the clean ones; noising the clean images with those of the corrupted ones. What
    is recorded within the context is patched, but for a branch that ends in a norm or runs beside
    another: the patch is put after it. Maps are those of the patched pass where no token is patched
    that the readout reads, and refused elsewhere.

    Args:
        vit: an adapted model.
        site: ``"resid_pre"``, ``"attn_out"``, ``"resid_mid"``, ``"mlp_out"``, ``"resid_post"``;
            ``"attn_coefficients"``, what the heads give to W_O; or ``"mlp_coefficients"``.
        source: what takes their place: that of other images (B×3×H×W, or one for all), which are
            run when the context is entered; a list with an entry B×N×· or 1×N×· for each block,
            such as ``record(vit, clean, [site])[site]`` or a mean of it; or a function of the
            image's own activations, such as one that adds noise.
        blocks: the blocks that are patched; all by default.
        heads: the heads that are patched, of ``"attn_coefficients"``; all by default. Those of
            parallel modules are counted through.
        tokens: the tokens that are patched, prefix tokens first: indices, or bool, N or B×N; all by
            default.

    Raises:
        InputError: if the site, a block, a head or a token does not exist; raised by the forward
            pass if ``source`` does not fit its activations.
        UnsupportedModelError: if the site of this model cannot be written to.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt, record
        >>> vit, clean, corrupted = adapt(demo_vit()), *torch.rand(2, 2, 3, 64, 64)
        >>> known = record(vit, clean, ["resid_post"])
        >>> with patch_activations(vit, "resid_post", known["resid_post"], blocks=[-1]):
        ...     torch.allclose(vit(corrupted), known.logits)
        True
    """
    count = len(vit.blocks)
    chosen = range(count) if blocks is None else blocks
    for block in chosen:
        vit.block(block)
    if heads is not None and site != "attn_coefficients":
        raise InputError(
            f"heads are given for {site}, where they are summed up: patch 'attn_coefficients'."
        )
    if isinstance(source, Tensor):
        source = observed(vit, site, source, chosen)
    elif not callable(source) and len(source) != count:
        raise InputError(
            f"source has {len(source)} entries: the model has {count} blocks, and source an entry "
            "for each (None where a block is not patched)."
        )

    def change(index: int) -> Change:
        columns = None if heads is None else head_columns(vit, index, heads)

        def replace(own: Tensor, start: int) -> Tensor:
            stop, mask = start + own.shape[-1], _token_mask(tokens, own)
            if columns is not None:
                mask = mask & columns.to(own.device)[start:stop]
            made = source(own) if callable(source) else part_of(source[index], start, stop)
            return torch.where(mask, fitting(made, own, site, index), own)

        return replace

    changes = {index % count: change(index % count) for index in chosen}
    with patched(vit, site, changes, unseen=_leaves_rows(vit, tokens)):
        yield


def _leaves_rows(vit: ViT, tokens: Tensor | Sequence[int] | None) -> bool:
    """Whether none of the tokens is one that the model's own readout reads."""
    if tokens is None or not vit.has_readout:
        return False
    chosen, reads = torch.as_tensor(tokens), vit.readout.reads
    if chosen.dtype == torch.bool:
        return not bool(chosen[..., reads].any())
    stop = reads.stop if reads.stop is not None and reads.stop > 0 else 0
    return stop > 0 and bool((chosen >= stop).all())


def observed(vit: ViT, site: str, images: Tensor, blocks: Sequence[int]) -> list[Any]:
    """Activations of a site in some blocks, without gradients; None in others."""
    seen: list[Any] = [None] * len(vit.blocks)

    def watch(index: int) -> Change:
        def keep(own: Tensor, start: int) -> Tensor:
            seen[index] = own if start == 0 else torch.cat([seen[index], own], -1)
            return own

        return keep

    with torch.no_grad(), patched(vit, site, {i % len(seen): watch(i % len(seen)) for i in blocks}):
        vit(images)
    return seen


@contextmanager
def patched(
    vit: ViT, site: str, changes: Mapping[int, Change], unseen: bool = False
) -> Iterator[None]:
    """Within the context, ``changes[block]`` is applied to a site's activations in some blocks.

    Maps are refused there, unless the rows that the readout reads are left alone (``unseen``).

    Raises:
        InputError: if there is no such site.
        UnsupportedModelError: raised by the forward pass if it cannot be written to.
    """
    if site not in SITES:
        raise InputError(f"{site!r} cannot be patched: sites are {', '.join(SITES)}.")
    if site.endswith("coefficients"):
        layer: Layer = "attn" if site.startswith("attn") else "mlp"
        with coefficients_changed(vit, layer, changes, unseen):
            yield
        return
    recorder = None
    if site not in ("resid_pre", "resid_post"):
        recorder = _Recorder.of(vit, {site: ALL}, list(changes))
    handles: list[RemovableHandle] = []
    with (
        nullcontext() if unseen else marked(False),
        nullcontext() if recorder is None else recorder.hooked(),
        hooks_removed(handles),
    ):
        for index, change in changes.items():
            if recorder is None:
                handles.append(_stream_hook(vit, site, index, change))
            else:
                handles.append(_branch_hook(vit, recorder, site, index, change))
        yield


class _Recorder(SiteRecorder):
    """A recorder that hears nothing while edits are paused."""

    def _enter(self, args: Any, kwargs: Any) -> None:
        self.depth += not paused()

    def _leave(self, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= not paused()

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
        return super()._before(module, unless_paused(hook))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
        return super()._after(module, unless_paused(hook))


def fitting(made: Any, own: Tensor, site: str, block: int) -> Tensor:
    """What takes the place of a site's own activations.

    Raises:
        InputError: if it does not have their shape, for each image or for all.
    """
    shape = tuple(made.shape) if isinstance(made, Tensor) else None
    if shape is None or shape not in (tuple(own.shape), (1, *own.shape[1:]), own.shape[1:]):
        raise InputError(
            f"source holds {shape or type(made).__name__} for {site} of block {block}: the forward "
            f"pass has {tuple(own.shape)} there."
        )
    return made.to(own.device, own.dtype)  # type: ignore[no-any-return]


def part_of(entry: Any, start: int, stop: int) -> Any:
    """Some columns of a block's activations; coefficients of parallel modules are side by side."""
    whole = torch.cat(entry, -1) if isinstance(entry, tuple) else entry
    return whole[..., start:stop] if isinstance(whole, Tensor) else whole


def _token_mask(tokens: Tensor | Sequence[int] | None, own: Tensor) -> Tensor:
    """Which tokens are replaced: bool, B×N×1, of what is named for B×N×· activations."""
    batch, count = own.shape[:2]
    if tokens is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=own.device)
    chosen = torch.as_tensor(tokens, device=own.device)
    if chosen.dtype == torch.bool:
        if chosen.shape not in ((count,), (1, count), (batch, count)):
            raise InputError(
                f"tokens have shape {tuple(chosen.shape)}: the forward pass has {batch} images of "
                f"{count} tokens."
            )
        return chosen.reshape(-1, count, 1)
    if chosen.dim() != 1 or (chosen.numel() and not -count <= int(chosen.min())):
        raise InputError("tokens are indices, prefix tokens first, or bool, tokens or B×tokens.")
    if chosen.numel() and int(chosen.max()) >= count:
        raise InputError(
            f"token {int(chosen.max())} is out of range: the forward pass has {count}."
        )
    mask = torch.zeros(count, dtype=torch.bool, device=own.device)
    mask[chosen.long()] = True
    return mask[None, :, None]


def _stream_hook(vit: ViT, site: str, index: int, change: Change) -> RemovableHandle:
    """The residual stream where a block takes it or leaves it."""
    if site == "resid_pre" and index > 0:
        # What enters a block is what the one before left: one and the same to whoever reads both.
        site, index = "resid_post", index - 1
    block = vit.blocks[index]
    if site == "resid_post":

        def leave(args: Any, kwargs: Any, output: Any) -> Any:
            return _first_changed(output, lambda own: change(own, 0))

        return after(block.module, unless_paused(leave))

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = block.stream
        own = change(Call(args, kwargs).argument(place), 0)
        if place < len(args):
            return (*args[:place], own, *args[place + 1 :]), kwargs
        return args, {**kwargs, list(kwargs)[place - len(args)]: own}

    return before(block.module, unless_paused(enter))


def _branch_hook(
    vit: ViT, recorder: SiteRecorder, site: str, index: int, change: Change
) -> RemovableHandle:
    """What a branch adds to the stream, or the stream after it.

    The difference to what was computed is added where the branch ends. Where nothing reads the
    branch before its block is left, that is the end of the block.
    """
    block = vit.blocks[index]
    owner: Attention | MLP = block.mlps[-1] if site == "mlp_out" else block.attentions[-1]
    module, scales = (block.module, []) if block.parallel else _end_of_branch(owner)

    def add(args: Any, kwargs: Any, output: Any) -> Any:
        own = recorder.recording.sites[site][index]
        difference = change(own, 0) - own
        for scale in scales:
            factor = scale.at(difference).factor
            if isinstance(factor, Tensor) and not factor.all():
                raise UnsupportedModelError(
                    f"{site} of block {index} cannot be patched: its LayerScale has entries that "
                    "are 0."
                )
            difference = difference / factor
        return _first_changed(output, lambda whole: whole + difference.to(whole.dtype))

    return after(module, unless_paused(add))


def _end_of_branch(owner: Attention | MLP) -> tuple[nn.Module, list[Scale]]:
    """The last module of a branch, and the factors between it and the residual stream."""
    scales: list[Scale] = []
    for step in reversed(owner.outer):
        if not isinstance(step, Scale):
            break
        scales.append(step)
    rest = owner.outer[: len(owner.outer) - len(scales)]
    if not rest:
        return owner.module, scales
    if not isinstance(rest[-1], Norm):
        raise UnsupportedModelError(
            f"a branch that ends in {type(rest[-1]).__name__} cannot be patched: patch resid_pre "
            "or resid_post."
        )
    return rest[-1].module, scales


def _first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module returns, its tokens changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
