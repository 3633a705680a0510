"""Train small Vision Transformers of four structures on CIFAR-10, for comparing explanations.

    python benchmarks/train_variants.py --data cifar10_jpeg.npz --output variants [--variant mean]

The data is one file: ``train_bytes``, ``train_offsets`` and ``train_labels`` (image i is the JPEG
``bytes[offsets[i]:offsets[i + 1]]``), and the same for ``test``. Every epoch leaves a checkpoint,
and a run that was interrupted goes on after the last. At the end the weights lie in ``output`` in
half precision, with a log that holds the settings and the accuracy after every epoch. All training
images are trained on and no epoch is chosen, so the even half of the test images is free to choose
explanations on, and the odd half to report them.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
_PLAIN = partial(VisionTransformer, **SMALL, mlp_ratio=2.0)

#: A gated MLP has three matrices where others have two.
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "mean": partial(_PLAIN, global_pool="avg", class_token=False),
    "attention": partial(_PLAIN, global_pool="map", class_token=False),
    "registers": partial(_PLAIN, reg_tokens=4, no_embed_class=True),
    "rotary": partial(
        Eva, **SMALL, mlp_ratio=4 / 3, swiglu_mlp=True, use_rot_pos_emb=True, global_pool="token"
    ),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    variant: str
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 400
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    padding: int = 4
    train_images: int = 50_000
    test_images: int = 10_000


def read(path: Path, split: str, limit: int) -> tuple[Tensor, Tensor]:
    """Images N×3×32×32 (uint8) and labels N."""
    with np.load(path) as stored:
        packed, offsets = stored[f"{split}_bytes"], stored[f"{split}_offsets"]
        labels = torch.from_numpy(stored[f"{split}_labels"][:limit].astype(np.int64))
    pictures = [
        np.asarray(Image.open(io.BytesIO(packed[offsets[i] : offsets[i + 1]].tobytes())))
        for i in range(len(labels))
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: Tensor) -> Tensor:
    """uint8 to −1..1."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A random crop of each padded image, half of them mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect").to(images.dtype)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.where(
        flip[:, None], torch.arange(width).flip(0), torch.arange(width)
    )
    index = torch.arange(count)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rate(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose highest logit is the label's."""
    model.eval()
    found = torch.cat([model(normalise(chunk)).argmax(-1) for chunk in images.split(500)])
    return float((found == labels).float().mean())


class Training:
    """A model on its way, kept in a checkpoint after every epoch."""

    def __init__(self, settings: Settings, checkpoint: Path) -> None:
        self.settings, self.checkpoint = settings, checkpoint
        torch.manual_seed(settings.seed)
        self.model = VARIANTS[settings.variant]()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.log: list[dict[str, float]] = []
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            if state["settings"] != asdict(settings):
                raise SystemExit(f"{checkpoint} is of other settings: name another --output.")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.log = state["log"]

    def epoch(self, images: Tensor, labels: Tensor) -> float:
        """One pass over the training images, the same whether or not the run was interrupted.

        Returns:
            the mean loss.
        """
        settings, number = self.settings, len(self.log)
        generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
        order = torch.randperm(len(images), generator=generator).split(settings.batch_size)
        total, steps = 0.0, settings.epochs * len(order)
        self.model.train()
        for i, some in enumerate(tqdm(order, desc=f"epoch {number}", mininterval=10)):
            for group in self.optimiser.param_groups:
                group["lr"] = rate(settings, number * len(order) + i, steps)
            x = normalise(augment(images[some], settings.padding, generator))
            smoothing = settings.label_smoothing
            loss = F.cross_entropy(self.model(x), labels[some], label_smoothing=smoothing)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
            self.optimiser.step()
            total += float(loss.detach()) * len(some)
        return total / len(images)

    def save(self) -> None:
        """Everything that the next epoch starts from, written whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "log": self.log,
        }
        written = self.checkpoint.with_suffix(".part")
        torch.save(state, written)
        written.replace(self.checkpoint)


def train(settings: Settings, data: Path, output: Path) -> dict[str, Any]:
    """Train one variant, or go on with it; weights and log lie in ``output`` at the end."""
    output.mkdir(parents=True, exist_ok=True)
    training = Training(settings, output / f"{settings.variant}.checkpoint.pt")
    test = read(data, "test", settings.test_images)
    if len(training.log) < settings.epochs:
        images = read(data, "train", settings.train_images)
    while len(training.log) < settings.epochs:
        start = time.perf_counter()
        loss = training.epoch(*images)
        entry = {"loss": loss, "accuracy": accuracy(training.model, *test)}
        training.log.append({**entry, "seconds": round(time.perf_counter() - start, 1)})
        training.save()
        print(settings.variant, len(training.log), training.log[-1], flush=True)
    model = training.model
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(half, output / f"{settings.variant}.safetensors")
    model.load_state_dict(half)
    result = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy_of_saved_weights": accuracy(model, *test),
        "epochs": training.log,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    (output / f"{settings.variant}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Train the variants named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--train-images", type=int, default=Settings.train_images)
    parser.add_argument("--test-images", type=int, default=Settings.test_images)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    for variant in args.variant or VARIANTS:
        settings = Settings(
            variant,
            seed=args.seed,
            epochs=args.epochs,
            train_images=args.train_images,
            test_images=args.test_images,
        )
        result = train(settings, args.data, args.output)
        print(variant, f"accuracy {result['accuracy_of_saved_weights']:.3f}")


if __name__ == "__main__":
    main()
