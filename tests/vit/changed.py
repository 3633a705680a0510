"""A small model of each library, and its parts by one name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import CLASSES, randomise
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": CLASSES,
}

#: Where the parts are in each library: those of the model, then those of a block.
PLACES = {
    "blocks": ("blocks", "encoder.layers", "vit.layers"),
    "norm": ("norm", "encoder.ln", "vit.layernorm"),
    "head": ("head", "heads.head", "classifier"),
    "conv": ("patch_embed.proj", "conv_proj", "vit.embeddings.patch_embeddings.projection"),
    "positions": ("pos_embed", "encoder.pos_embedding", "vit.embeddings.position_embeddings"),
    "cls": ("cls_token", "class_token", "vit.embeddings.cls_token"),
    "attn": ("attn", "self_attention", "attention"),
    "proj": ("attn.proj", "self_attention.out_proj", "attention.o_proj"),
    "norm1": ("norm1", "ln_1", "layernorm_before"),
    "norm2": ("norm2", "ln_2", "layernorm_after"),
    "mlp": ("mlp", "mlp", "mlp"),
    "fc1": ("mlp.fc1", "mlp.0", "mlp.fc1"),
    "act": ("mlp.act", "mlp.1", "mlp.activation_fn"),
    "fc2": ("mlp.fc2", "mlp.3", "mlp.fc2"),
}
LIBRARIES = ("timm", "torchvision", "hugging face")


def small(library: str, **options: Any) -> nn.Module:
    """A model of the library with random weights, in float64 and eval mode."""
    torch.manual_seed(0)
    if library == "timm":
        model: nn.Module = VisionTransformer(**{**SMALL, **options})
    elif library == "torchvision":
        kind = pytest.importorskip("torchvision.models").VisionTransformer
        sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4}
        model = kind(**{**sizes, "hidden_dim": 32, "mlp_dim": 64, "num_classes": CLASSES})
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
        config = transformers.ViTConfig(
            **sizes, num_hidden_layers=4, num_attention_heads=4, num_labels=CLASSES
        )
        config._attn_implementation = "sdpa"
        model = transformers.ViTForImageClassification(config)
    return randomise(model).double().eval()


def random_images(batch: int = 3, size: int = 32, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, channels, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Parts:
    """A model whose parts have the same names in every library."""

    def __init__(self, model: nn.Module, library: str) -> None:
        self.model: Any = model
        self.library = library

    def place(self, name: str) -> str:
        """Where a part is."""
        return PLACES[name][LIBRARIES.index(self.library)]

    def _find(self, name: str, block: int | None) -> tuple[Any, str]:
        root = self.model if block is None else self.blocks[block]
        *path, last = self.place(name).split(".")
        for step in path:
            root = root[int(step)] if step.isdigit() else getattr(root, step)
        return root, last

    def get(self, name: str, block: int | None = None) -> Any:
        root, last = self._find(name, block)
        return root[int(last)] if last.isdigit() else getattr(root, last)

    def put(self, name: str, new: Any, block: int | None = None) -> None:
        root, last = self._find(name, block)
        if last.isdigit():
            root[int(last)] = new
        else:
            setattr(root, last, new)

    @property
    def blocks(self) -> Any:
        return self.get("blocks")

    @property
    def branch_norms(self) -> list[Any]:
        """The norms that branches of blocks begin with."""
        beside = [
            b for m in self.blocks for name in ("attns", "ffns") for b in getattr(m, name, ())
        ]
        norms = [getattr(branch, "norm", None) for branch in beside]
        for module in self.blocks.modules():
            norms += [getattr(module, self.place(n), None) for n in ("norm1", "norm2")]
        return [norm for norm in norms if getattr(norm, "weight", None) is not None]

    @property
    def read_rows(self) -> int | None:
        """How many of the first tokens are read out, or None where patches are."""
        if getattr(self.model, "global_pool", "token") != "token":
            return None
        return 2 if hasattr(self.model, "head_dist") else 1

    def read(self, tokens: Tensor) -> Tensor:
        """The model's own way from the final tokens to logits."""
        normed = self.get("norm")(tokens)
        if self.library == "timm":
            logits: Tensor = self.model.forward_head(normed)
        elif self.library == "torchvision":
            logits = self.model.heads(normed[:, 0])
        else:
            logits = self.model.classifier(normed[:, 0])
        return logits

    def walk(self, through: Callable[[Any, Tensor], Tensor]) -> None:
        """Let ``through(blocks, tokens)`` run the blocks instead of the model."""
        if self.library != "hugging face":
            self.blocks.forward = lambda tokens: through(list(self.blocks), tokens)
            return
        output = pytest.importorskip("transformers.modeling_outputs").BaseModelOutputWithPooling
        vit = self.model.vit

        def forward(pixels: Tensor, **_: Any) -> Any:
            tokens = through(list(vit.layers), vit.embeddings(pixels))
            return output(last_hidden_state=vit.layernorm(tokens))

        vit.forward = forward


HIDDEN: list[bool] = []


@contextmanager
def unseen() -> Iterator[None]:
    """What a user's hook computes by itself is no part of the pass that is looked at."""
    HIDDEN.append(True)
    try:
        yield
    finally:
        HIDDEN.pop()
