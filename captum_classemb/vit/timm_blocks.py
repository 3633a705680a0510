"""timm's transformer blocks: where their attention and MLP are, and what follows each branch."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, LayerScale, Linear, Norm, Step
from captum_classemb.readout.activation import GatedActivation
from captum_classemb.readout.linear import SideBySide, Slice
from captum_classemb.vit.parts import MLP, Attention, Block
from captum_classemb.vit.timm_attention import read_attention

__all__ = ["read_block"]

_PRE_NORM = {"Block", "EvaBlock", "RelPosBlock", "LayerScaleBlockClassAttn"}
_POST_NORM = {"ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"}
_PARALLEL = {"ParallelScalingBlock", "DiffParallelScalingBlock"}


def _scaled(module: Any) -> tuple[Step, ...]:
    """LayerScale as a module, as a bare parameter, or none."""
    if module is None or isinstance(module, nn.Identity):
        return ()
    return (LayerScale(getattr(module, "gamma", module)),)


def _branch(block: Any, number: str) -> tuple[Step, ...]:
    """What lies between a branch and the residual stream."""
    if type(block).__name__ in _POST_NORM:
        return (Norm(getattr(block, f"norm{number}")),)
    scale = getattr(block, f"ls{number}", getattr(block, f"gamma_{number}", None))
    return _scaled(scale)


def _norms(module: Any) -> tuple[Step, ...]:
    return () if module is None or isinstance(module, nn.Identity) else (Norm(module),)


def _hidden(mlp: Any) -> tuple[Step, ...] | None:
    """The steps to what enters ``fc2``, of timm's own MLPs."""
    if type(mlp) is Mlp and isinstance(mlp.fc1, nn.Module):
        return Linear(mlp.fc1), Activation(mlp.act), *_norms(mlp.norm)
    if type(mlp) is GluMlp and mlp.chunk_dim == -1:
        return Linear(mlp.fc1), GatedActivation(mlp.act, mlp.gate_last), *_norms(mlp.norm)
    if type(mlp) is SwiGLU:
        both = SideBySide((mlp.fc1_g, mlp.fc1_x))
        return both, GatedActivation(mlp.act), *_norms(mlp.norm)
    return None


def _mlp(module: Any, outer: tuple[Step, ...], entry: tuple[Step, ...] = ()) -> MLP:
    if not isinstance(getattr(module, "fc2", None), nn.Module):
        raise UnsupportedModelError(
            f"an MLP of type {type(module).__qualname__} has no fc2 that writes to the "
            "residual stream."
        )
    return MLP(module, module.fc2, outer, entry=entry, hidden=_hidden(module))


def _attention(module: Any, outer: tuple[Step, ...], entry: tuple[Step, ...] = ()) -> Attention:
    attention = read_attention(module, outer)
    attention.entry = entry
    return attention


def _parallel(block: Any) -> Block:
    outer, entry, width = _scaled(block.ls), _norms(block.in_norm), block.in_split[0]
    attention = read_attention(block, outer)
    attention.entry = entry
    attention.projections = (Slice(block.in_proj, slice(width, None)),)
    fc2 = block.mlp_out_proj if block.out_proj is None else block.out_proj
    columns = None if block.out_proj is None else slice(block.in_split[1], None)
    first = Slice(block.in_proj, slice(0, width), block.mlp_bias)
    mlp = MLP(fc2, fc2, outer, columns, entry, (first, Activation(block.mlp_act)))
    return Block(block, (attention,), (mlp,), parallel=True)


def read_block(block: Any) -> Block:
    """The parts of a block of timm.

    Raises:
        UnsupportedModelError: if the block's class is not known.
    """
    name = type(block).__name__
    if name in _PARALLEL:
        return _parallel(block)
    if name == "ParallelThingsBlock":
        return Block(
            block,
            tuple(_attention(a.attn, _scaled(a.ls), _norms(a.norm)) for a in block.attns),
            tuple(_mlp(f.mlp, _scaled(f.ls), _norms(f.norm)) for f in block.ffns),
        )
    if name not in _PRE_NORM | _POST_NORM or not type(block).__module__.startswith("timm."):
        known = sorted(_PRE_NORM | _POST_NORM | _PARALLEL | {"ParallelThingsBlock"})
        raise UnsupportedModelError(
            f"blocks of type {type(block).__qualname__} are not supported: timm's "
            f"{', '.join(known)} are."
        )
    before = name in _PRE_NORM
    norms = [_norms(getattr(block, norm)) if before else () for norm in ("norm1", "norm2")]
    return Block(
        block,
        (_attention(block.attn, _branch(block, "1"), norms[0]),),
        (_mlp(block.mlp, _branch(block, "2"), norms[1]),),
        stream=1 if name == "LayerScaleBlockClassAttn" else 0,
    )
