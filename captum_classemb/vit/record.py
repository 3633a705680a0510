"""Record one forward pass by hooks, keeping only what is asked for.

Fused attention stays on: value vectors are a slice of what the projections return, and attention
weights are computed from queries and keys for the query rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.readout import OutputPath
from captum_classemb.vit.active_edits import refuse_edits
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Block, Call

__all__ = ["ALL", "SITES", "Recording", "SiteRecorder", "record", "record_module"]

ALL = slice(None)

#: Sites of the residual stream, then what the memories hold.
SITES = (
    "resid_pre",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
    "values",
    "keys",
    "attention",
    "attn_path",
    "mlp_path",
    "attn_coefficients",
    "mlp_coefficients",
    "embedding",
    "final",
)


@dataclass
class Recording:
    """One forward pass: ``recording[site][block]``, and the model's logits.

    Sites of the residual stream are tensors B×N×D; ``embedding`` is the first block's
    ``resid_pre`` and ``final`` the last block's ``resid_post``, and these lists have one entry.
    ``values`` and ``keys`` (B×H×N×d), ``attention`` (B×H×Q×N), the coefficients (B×N×M) and the
    paths are tuples with one entry for each parallel module of the block. A path is the
    :class:`~captum_classemb.readout.OutputPath` from memory coefficients to the residual stream.
    """

    sites: dict[str, list[Any]]
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def __getitem__(self, site: str) -> list[Any]:
        if site not in self.sites:
            raise KeyError(f"{site} was not recorded; recorded are {', '.join(self.sites)}.")
        return self.sites[site]


def record(
    vit: ViT,
    inputs: Tensor,
    sites: Iterable[str] | Mapping[str, slice],
    *,
    blocks: Sequence[int] | None = None,
    forward_args: tuple[Any, ...] = (),
) -> Recording:
    """Run the model once, without gradients, and keep what ``sites`` names.

    Args:
        vit: an adapted model.
        inputs: images, B×3×H×W.
        sites: names of :data:`SITES`; or a mapping from names to the token rows to keep (query
            rows for ``"attention"``).
        blocks: the blocks to keep; all by default. Others hold None.
        forward_args: further positional arguments of the model.

    Returns:
        the recording. Every hook is gone when this returns or raises.

    Raises:
        InputError: if a site is unknown, a block is out of range, or attention weights are asked
            for within an edit of attention, which they would not show.
        UnsupportedModelError: if a module the adapter reads was not called.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt, record
        >>> rec = record(adapt(demo_vit()), torch.rand(1, 3, 64, 64), ["resid_post"])
        >>> rec["resid_post"][-1].shape[0], rec.logits.shape
        (1, torch.Size([1, 10]))
    """
    recorder = SiteRecorder.of(vit, sites, blocks)
    with recorder.hooked(), torch.no_grad():
        logits = vit(inputs, *forward_args)
    return recorder.finish(logits)


def _wanted(sites: Iterable[str] | Mapping[str, slice]) -> dict[str, slice]:
    wanted = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites, ALL)
    unknown = [site for site in wanted if site not in SITES]
    if unknown:
        raise InputError(f"unknown site {unknown[0]!r}: sites are {', '.join(SITES)}.")
    return wanted


def record_module(
    vit: ViT,
    inputs: Tensor,
    module: nn.Module,
    *,
    of_input: bool = False,
    forward_args: tuple[Any, ...] = (),
) -> Tensor:
    """The output of one module of the model, or its first input, in one forward pass.

    Raises:
        UnsupportedModelError: if the module is not called, or gives no tensor.
    """
    seen: list[Any] = []

    def hook(args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        seen[:] = [Call(args, kwargs).input if of_input else output]

    with hooks_removed([after(module, hook)]), torch.no_grad():
        vit(inputs, *forward_args)
    value = seen[0][0] if seen and isinstance(seen[0], (tuple, list)) else (seen or [None])[0]
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__qualname__} gave no tensor: it is not called in the forward pass of "
            f"{type(vit.model).__qualname__}, or returns something else."
        )
    return value


class _Room:
    """Memory for the copies of all blocks, taken at once.

    Copies that lie between the model's own passing tensors keep the allocator from using that
    memory again: every block would be computed in fresh pages.

    Args:
        pieces: how many copies of one shape there will be.
    """

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.free: list[Tensor] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous, in memory of its own."""
        if self.pieces:
            self.free = list(tensor.new_empty(self.pieces, *tensor.shape))
            self.pieces = 0
        if not self.free or (self.free[-1].shape, self.free[-1].dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            return tensor.contiguous()
        return self.free.pop(0).copy_(tensor)


class SiteRecorder:
    """The hooks of one recording."""

    def __init__(self, vit: ViT, wanted: dict[str, slice], keep: set[int]) -> None:
        self.vit = vit
        self.depth = 0
        self.wanted = wanted
        last = len(vit.blocks) - 1
        self.keep = {site: {"embedding": {0}, "final": {last}}.get(site, keep) for site in wanted}
        self.recording = Recording({site: [None] * (last + 1) for site in wanted})
        self.handles: list[RemovableHandle] = []
        modules = sum(len(vit.blocks[index].attentions) for index in keep)
        self.room = _Room(modules * len(wanted.keys() & {"values", "keys"}))

    @classmethod
    def of(
        cls,
        vit: ViT,
        sites: Iterable[str] | Mapping[str, slice],
        blocks: Sequence[int] | None = None,
    ) -> SiteRecorder:
        """The hooks of :func:`record`, not yet set."""
        wanted, count = _wanted(sites), len(vit.blocks)
        chosen = range(count) if blocks is None else blocks
        for index in chosen:
            vit.block(index)
        if wanted.keys() & {"attention", "attn_path"}:
            refuse_edits(of_attention=True)
        return cls(vit, wanted, {index % count for index in chosen})

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the context the hooks are set."""
        with hooks_removed(self.handles):
            self.handles += [
                before(self.vit.model, self._enter),
                after(self.vit.model, self._leave),
            ]
            for index, block in enumerate(self.vit.blocks):
                self._watch_block(index, block)
            yield

    # A hook of the user's may run the model on other images: that pass is not heard.
    def _enter(self, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def _leave(self, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
        return before(module, lambda *call: hook(*call) if self.depth <= 1 else None)

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
        return after(module, lambda *call: hook(*call) if self.depth <= 1 else None)

    def finish(self, logits: Tensor) -> Recording:
        """What was kept, once the pass is done."""
        for site, entries in self.recording.sites.items():
            for index in sorted(self.keep[site]):
                if entries[index] is None:
                    raise UnsupportedModelError(
                        f"{site} of block {index} was not reached: "
                        f"{type(self.vit.model).__qualname__} did not call that module in its "
                        "forward pass."
                    )
            if site in ("embedding", "final"):
                self.recording.sites[site] = [entries[0 if site == "embedding" else -1]]
        self.recording.logits = logits
        return self.recording

    def _wants(self, site: str, index: int) -> bool:
        return site in self.wanted and index in self.keep[site]

    # -- hooks

    def _keep(self, site: str, index: int, tensor: Tensor) -> None:
        rows = self.wanted[site]
        kept = tensor if rows == ALL else tensor[:, rows].clone()
        self.recording.sites[site][index] = kept

    def _append(self, site: str, index: int, entry: Tensor | OutputPath) -> None:
        held = self.recording.sites[site][index] or ()
        self.recording.sites[site][index] = (*held, entry)

    def _watch_block(self, index: int, block: Block) -> None:
        wants = {site for site in self.wanted if self._wants(site, index)}
        if not wants:
            return
        pending: dict[str, Any] = {}

        def enter(args: tuple[Any, ...], kwargs: Any) -> None:
            for site in wants:
                self.recording.sites[site][index] = None
            pending.clear()
            pending["resid_pre"] = Call(args, kwargs).argument(block.stream)
            for site in wants & {"resid_pre", "embedding"}:
                self._keep(site, index, pending["resid_pre"])

        def leave(args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            post = output[0] if isinstance(output, tuple) else output
            for site in wants & {"resid_post", "final"}:
                self._keep(site, index, post)
            pending.clear()

        self.handles.append(self._before(block.module, enter))
        if wants & {"values", "keys", "attention", "attn_path", "attn_coefficients"} or (
            wants & {"attn_out", "resid_mid"}
        ):
            for attention in block.attentions:
                self._watch_attention(index, block, attention, pending)
        for mlp in block.mlps:
            self._watch_mlp(index, mlp, pending)
        self.handles.append(self._after(block.module, leave))

    def _watch_attention(
        self, index: int, block: Block, attention: Attention, pending: dict[str, Any]
    ) -> None:
        calls: list[Call] = []

        def start(args: tuple[Any, ...], kwargs: Any) -> None:
            calls[:] = [Call(args, kwargs)]

        def end(args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            call = calls.pop()
            call.output = output
            self._read_memories(index, attention, call)
            self._read_branch(index, block, attention, call, pending)

        self.handles.append(self._before(attention.module, start))
        for module in {*attention.watch, attention.proj.module}:

            def inside(args: Any, kwargs: Any, output: Any, module: nn.Module = module) -> None:
                if calls:
                    calls[0].inner[module] = output
                    calls[0].entered[module] = Call(args, kwargs).input

            self.handles.append(self._after(module, inside))
        self.handles.append(self._after(attention.module, end))

    def _read_memories(self, index: int, attention: Attention, call: Call) -> None:
        wanted = self.wanted
        if self._wants("values", index):
            # Copied, so that the queries and keys beside them need not be kept.
            self._append("values", index, self.room.copy(attention.values(call)))
        if self._wants("keys", index):
            self._append("keys", index, self.room.copy(attention.keys(call)))
        if self._wants("attention", index):
            self._append("attention", index, attention.weights(call, wanted["attention"]))
        if self._wants("attn_path", index):
            self._append("attn_path", index, attention.path(call, wanted["attn_path"]))
        if self._wants("attn_coefficients", index):
            coefficients = attention.coefficients(call, wanted["attn_coefficients"])
            self._append("attn_coefficients", index, coefficients)

    def _read_branch(
        self, index: int, block: Block, attention: Attention, call: Call, pending: dict[str, Any]
    ) -> None:
        if not (self._wants("attn_out", index) or self._wants("resid_mid", index)):
            return
        out = OutputPath.of(attention.outer, attention.output(call, ALL)).output
        pending["attn_out"] = pending["attn_out"] + out if "attn_out" in pending else out
        if self._wants("attn_out", index):
            self._keep("attn_out", index, pending["attn_out"])
        if self._wants("resid_mid", index):
            if block.parallel:
                raise InputError(
                    "resid_mid does not exist in a parallel block: attention and MLP read the "
                    "same input."
                )
            self._keep("resid_mid", index, pending["resid_pre"] + pending["attn_out"])

    def _watch_mlp(self, index: int, mlp: MLP, pending: dict[str, Any]) -> None:
        entered: list[Tensor] = []

        def enter(args: tuple[Any, ...], kwargs: Any) -> None:
            entered[:] = [Call(args, kwargs).input]
            if self._wants("mlp_coefficients", index):
                coefficients = mlp.coefficients(entered[0][:, self.wanted["mlp_coefficients"]])
                self._append("mlp_coefficients", index, coefficients)

        def end(args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            tokens = entered.pop() if entered else None
            if self._wants("mlp_path", index):
                rows = self.wanted["mlp_path"]
                some = None if tokens is None else tokens[:, rows]
                self._append("mlp_path", index, mlp.path(mlp.output(some, output[:, rows]).clone()))
            if self._wants("mlp_out", index):
                out = OutputPath.of(mlp.outer, mlp.output(tokens, output)).output
                pending["mlp_out"] = pending["mlp_out"] + out if "mlp_out" in pending else out
                self._keep("mlp_out", index, pending["mlp_out"])

        if self._wants("mlp_coefficients", index) or mlp.proj.columns is not None:
            self.handles.append(self._before(mlp.fc2, enter))
        self.handles.append(self._after(mlp.module, end))
