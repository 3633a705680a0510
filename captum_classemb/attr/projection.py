"""Projection onto class embedding space (Vilas et al. 2023, §3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_classemb.attr._base import PatchAttribution, check_classes, choose
from captum_classemb.attr._forward_pass import Needs, any_rows, run
from captum_classemb.attr._inputs import forward_args, images
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.grid import tile
from captum_classemb.functional.identifiability import all_ranks, identifiability
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.readout import OutputPath, Readout
from captum_classemb.vit import Recording
from captum_classemb.vit.checks import reading
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.record import ALL

__all__ = ["ClassEmbeddingProjection", "Score", "token_scores"]

Score = Literal["logit", "log_probability", "probability", "identifiability"]
SITE_NAMES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "value")


def token_scores(readout: Readout, tokens: Tensor, target: Tensor, score: Score) -> Tensor:
    """The target's score at every token: B×N.

    Args:
        readout: what maps features to logits.
        tokens: hidden states, B×N×D.
        target: class indices, B.
        score: ``"logit"``, ``"log_probability"``, ``"probability"`` or ``"identifiability"``.
    """
    if score == "logit":
        return readout.project(tokens, target)
    logits = readout.project(tokens)
    index = target[:, None].expand(logits.shape[:2])
    if score == "identifiability":
        return identifiability(logits, index).to(logits.dtype)
    log_p = logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
    return log_p if score == "log_probability" else log_p.exp()


def _value_tokens(recording: Recording, block: int) -> Tensor:
    """What a block's attention would write for each token if it attended to itself alone: B×N×D."""
    modules = zip(recording["values"][block], recording["attn_path"][block], strict=True)
    written = [
        OutputPath.of(path.steps, upcast(values).transpose(1, 2).flatten(2)).output
        for values, path in modules
    ]
    return sum(written[1:], written[0])


class ClassEmbeddingProjection(PatchAttribution):
    """The evidence for the target that each patch token carries at a site.

    Every hidden token is read by the model's own last norm and classifier, as if it were the CLS
    token of the last block: p = E·LN(x) + bias (Vilas et al. 2023, §3).

    This is a readout, and no importance map: patches that it names may be taken out without loss
    (on one DeiT the most important first cost less than the least important). The last patch
    tokens of CLIP and SigLIP do not lie in the space of their texts: take ``site="value"`` there,
    and ``attribute_classes`` minus its mean over the classes.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        score (str, optional): ``"logit"``, ``"log_probability"``, ``"probability"`` or
            ``"identifiability"``. Default: ``"logit"``
        site (str, optional): ``"resid_pre"``, ``"attn_out"``, ``"resid_mid"``, ``"mlp_out"``,
            ``"resid_post"``, or ``"value"``: what attention's output projection makes of the
            token's own value vectors, without residual stream and MLP. Default: ``"resid_post"``
        block (int, optional): the block whose site is read. Default: -1

    Raises:
        InputError: if an option has no such value.
        UnsupportedModelError: if the model is not supported.

    Examples:
        >>> import torch
        >>> from captum_classemb.models import demo_vit
        >>> model, image = demo_vit(), torch.rand(1, 3, 64, 64)
        >>> projection = ClassEmbeddingProjection(model, block=3)
        >>> projection.attribute(image, target=7).shape
        torch.Size([1, 3, 64, 64])
        >>> projection.attribute_patches(image, target=7).shape
        torch.Size([1, 1, 8, 8])
        >>> projection.attribute_classes(image).shape
        torch.Size([1, 10, 8, 8])
    """

    _LOOKS_FOR_NAN = False

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module | None = None,
        score: Score = "logit",
        site: str = "resid_post",
        block: int = -1,
    ) -> None:
        super().__init__(model, readout)
        if score not in get_args(Score):
            options = ", ".join(map(repr, get_args(Score)))
            raise InputError(f"score {score!r} is none of {options}.")
        if site not in SITE_NAMES:
            raise InputError(f"site {site!r} is none of {', '.join(map(repr, SITE_NAMES))}.")
        check_classes(self.vit, score)
        self.score = score
        self.site = site
        self._block = block
        _ = self.block
        self.additive = score in ("logit", "log_probability")

    @property
    def block(self) -> int:
        """The block whose site is read."""
        return choose([self._block], len(self.vit.blocks), "block")[0]

    def needs(self) -> Needs:
        names = ("values", "attn_path") if self.site == "value" else (self.site,)
        sites = dict.fromkeys(names, ALL)
        return Needs(any_rows(self.vit), (), sites=sites, site_blocks=(self.block,))

    def _tokens(self, done: ForwardPass) -> Tensor:
        assert done.recording is not None
        if self.site == "value":
            with no_autocast(done.logits.device):
                tokens = _value_tokens(done.recording, self.block)
        else:
            tokens = done.recording[self.site][self.block]
        if tokens.shape[1] <= self.vit.prefix_tokens:
            raise UnsupportedModelError(
                f"{self.site} of block {self.block} holds no patch tokens: these blocks of "
                f"{type(self.vit.model).__qualname__} write to the CLS token alone."
            )
        with no_autocast(tokens.device):
            # What is not finite makes its image's sum so.
            total = upcast(tokens).sum((1, 2))[:, None]
            done.checks.equal("tokens", (), total, total)
        return tokens

    def image_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        tokens = self._tokens(done)
        with no_autocast(tokens.device), reading(done.checks.model):
            each = [
                token_scores(self._readout(), tokens, column, self.score)
                for column in index.unbind(1)
            ]
            return torch.stack(each, 1)[..., self.vit.prefix_tokens :]

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        tokens = self._tokens(done)
        with no_autocast(tokens.device), reading(done.checks.model):
            scores = self._readout().project(tokens)
            if self.score == "identifiability":
                scores = (1.0 - all_ranks(scores).double() / scores.shape[-1]).to(scores.dtype)
            elif self.score != "logit":
                scores = scores.log_softmax(-1)
                scores = scores.exp() if self.score == "probability" else scores
            return scores[:, self.vit.prefix_tokens :, index].transpose(1, 2)

    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        index = self._early_targets(target, pixels)
        done = run(self.vit, self.needs(), pixels, args)
        maps = self.image_maps(done, self._late_targets(done, index)[:, None])
        done.checks.finish()
        return self._on_grid(maps, pixels)

    def _to_pixels(self, patches: Tensor, pixels: Tensor) -> Tensor:
        if self.additive:
            return super()._to_pixels(patches, pixels)
        size = (pixels.shape[2], pixels.shape[3])
        tiled = tile(patches[:, 0], size, self.vit.patch_pixels(size))
        return tiled[:, None].repeat(1, pixels.shape[1], 1, 1)

    def _readout(self) -> Readout:
        return self.readout.at(self.block, self.site)

    def attribute_classes(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        classes: Sequence[int] | None = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=False)
        index = self._classes(classes, pixels)
        done = run(self.vit, self.needs(), pixels, args)
        maps = self.class_maps(done, index)
        done.checks.finish()
        return self._on_grid(maps, pixels)
