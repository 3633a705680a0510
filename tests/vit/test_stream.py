"""Cotangents along the rows that are read, against autograd with all other tokens detached."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Case, case
from families import FAMILIES, NOT_FOLLOWED
from torch import Tensor

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Linear
from captum_classemb.vit.forward_pass import forward_pass
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.stream import RowStream, follows_rows

K = 2


def followed(known: Case, rows: slice) -> tuple[ForwardPass, RowStream]:
    tolerance = tolerance_of(known)
    done = forward_pass(known.vit, known.images, rows, keys=True, tolerance=tolerance)
    with torch.no_grad():
        return done, RowStream(known.vit, done)


def tolerance_of(known: Case) -> float:
    # Eager attention of Hugging Face rounds its weights to float32.
    return 1e-5 if known.name.endswith("eager") else 1e-9


class Detached:
    """One pass in which each block starts anew from its rows, all other tokens detached.

    Attributes:
        entered, left: the rows that each block takes and returns.
        mixed: what enters each W_O at the rows, by block and module.
    """

    def __init__(self, known: Case, rows: slice) -> None:
        self.vit, self.rows = known.vit, rows
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        self.mixed: list[list[Tensor]] = []
        with self._hooked(), torch.enable_grad():
            self.vit(known.images)

    @contextmanager
    def _hooked(self) -> Any:
        handles = []
        for block in self.vit.blocks:
            handles.append(block.module.register_forward_pre_hook(self._start(block.stream)))
            handles.append(block.module.register_forward_hook(self._end))
            for attention in block.attentions:
                handles.append(attention.proj.module.register_forward_pre_hook(self._write))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, stream: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            free = [a.detach() if isinstance(a, Tensor) else a for a in args]
            tokens = free[stream]
            leaf = tokens[:, self.rows].clone().requires_grad_(True)
            before, after = tokens[:, : self.rows.start], tokens[:, self.rows.stop :]
            free[stream] = torch.cat([before, leaf, after], 1)
            self.entered.append(leaf)
            self.mixed.append([])
            return tuple(free)

        return hook

    def _end(self, module: Any, args: Any, output: Any) -> None:
        self.left.append((output[0] if isinstance(output, tuple) else output)[:, self.rows])

    def _write(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = args[0][:, self.rows] * 1.0
        self.mixed[-1].append(rows)
        rest = args[0][:, : self.rows.start], args[0][:, self.rows.stop :]
        return (torch.cat([rest[0], rows, rest[1]], 1),)

    def vjp(self, block: int, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """∂(cotangent·block)/∂(rows that enter), and of what enters W_O: B×Q×K×· each."""
        found = []
        for c in cotangent.unbind(2):
            leaves = [self.entered[block], *self.mixed[block]]
            found.append(torch.autograd.grad(self.left[block], leaves, c, retain_graph=True))
        entering, *directions = (torch.stack(parts, 2) for parts in zip(*found, strict=True))
        return entering, directions


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def check(known: Case, rows: slice) -> None:
    done, stream = followed(known, rows)
    tolerance = tolerance_of(known)
    reference, width = Detached(known, rows), done.final.shape[-1]
    generator = torch.Generator().manual_seed(4)
    c = torch.randn(*done.final.shape[:2], K, width, generator=generator, dtype=torch.float64)
    for block in reversed(range(len(known.vit.blocks))):
        entering, directions, carried = stream.vjp(block, c)
        expected, into_w_o = reference.vjp(block, c)
        assert worst(entering, expected) <= tolerance, f"what enters block {block}"
        weights, values = stream.memories(block)
        parts = zip(known.vit.blocks[block].attentions, directions, strict=True)
        for i, (attention, z) in enumerate(parts):
            # torchvision does not call W_O as a module.
            if into_w_o and isinstance(_path(done, block, i).steps[0], Linear):
                assert worst(z, into_w_o[i]) <= tolerance, f"A·V of block {block}"
            by_head = z.unflatten(-1, (attention.heads, -1)).permute(0, 3, 1, 2, 4)
            along = torch.einsum("bhqkd,bhnd->bhqkn", by_head, values[i])
            # Up to a factor that all blocks share, where they do.
            scale = attention.scale() if stream._even else 1.0
            assert worst(carried[i], scale * weights[i][:, :, :, None] * along) <= 1e-12
        c = entering
    done.checks.finish()


def _path(done: ForwardPass, block: int, module: int) -> Any:
    stage = next(stage for stage in done.stages if block in stage.blocks)
    return stage.modules[module].path


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_FOLLOWED])
def test_a_block_back_along_the_rows_that_are_read(name: str) -> None:
    known = case(name)
    rows = known.vit.readout.reads
    assert follows_rows(known.vit, rows)
    check(known, rows)


#: Rows that the readout does not read, so that more ways of making them are followed.
OTHER_ROWS = {
    "registers": slice(1, 3),
    "distilled": slice(1, 2),
    "mean, registers": slice(0, 3),
    "mean, layer scale": slice(0, 1),
    "mean, post-norm": slice(0, 1),
    "mean, norm and gate": slice(0, 1),
    "parallel modules, mean": slice(0, 1),
    "eva": slice(0, 1),
    "eva, rotary and gated MLP": slice(0, 1),
    "eva, rotary attention": slice(0, 1),
    "eva, shared keys and values": slice(0, 1),
    "eva, post-norm": slice(0, 1),
    "mean, rms norm": slice(0, 1),
    "mean, simple norm": slice(0, 1),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_a_block_back_along_other_rows(name: str) -> None:
    known = case(name)
    assert follows_rows(known.vit, OTHER_ROWS[name])
    check(known, OTHER_ROWS[name])


@pytest.mark.parametrize("name", sorted(NOT_FOLLOWED))
def test_rows_that_are_not_followed(name: str) -> None:
    vit = case(name).vit
    assert not follows_rows(vit, vit.readout.reads)
    assert not follows_rows(vit, slice(0, None))
    assert not follows_rows(vit, slice(0, vit.prefix_tokens + 1)), "a patch is among them"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_FOLLOWED])
def test_attention_of_the_rows(name: str) -> None:
    known = case(name)
    rows = known.vit.readout.reads
    done, stream = followed(known, rows)
    found = [
        torch.cat([part[i] for part in parts], 1)
        for stage, parts in zip(done.stages, stream.attention, strict=True)
        for i in range(len(stage.blocks))
    ]
    for block, expected in enumerate(known.oracle.trace.attention):
        assert worst(found[block], expected[:, :, rows].detach()) <= tolerance_of(known)


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_a_block_that_is_more_than_its_rows_is_refused(site: str) -> None:
    """What the model computed along the rows is not what the rows alone give."""
    known = case("cls")
    done = forward_pass(known.vit, known.images, slice(0, 1), keys=True, tolerance=1e-9)
    spoiled = getattr(done, site).clone()
    spoiled[1, 1] = spoiled[1, 1].flip(-1)
    setattr(done, site, spoiled)
    with torch.no_grad():
        RowStream(known.vit, done)
    with pytest.raises(UnsupportedModelError, match="outputs of block 1 differ .* for image 1"):
        done.checks.finish()
