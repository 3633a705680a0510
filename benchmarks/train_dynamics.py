"""Train a ResNet, a ViT and an AlterNet of equal size and measure them side by side.

    python benchmarks/train_dynamics.py --output FOLDER [--data digits|FOLDER of CIFAR-100]

The data are digits of scikit-learn in textured scenes, cropped about the digit to 32×32, or
CIFAR-100 where its folder is given. Every epoch's weights are kept for trajectories; a model
whose last epoch is there already is measured without training it again. ``--model demo`` measures
the packaged demo ViT on the whole scenes that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from dynamics_table import side_by_side
from measure_dynamics import Labelled, augmented, measure, normalise
from safetensors.torch import load_file, save_file
from timing import environment
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR100

from captum_classemb.data.scenes import Scenes
from captum_classemb.dynamics.alternet import AlterNet
from captum_classemb.models import demo_vit

SIDE = 32
BATCH = 64
WEIGHT_DECAY = 1e-4


def resnet(classes: int) -> nn.Module:
    """Pre-activation ResNet of three stages."""
    return AlterNet(
        (2, 2, 2), (0, 0, 0), (20, 40, 72), (1, 1, 2), "basic", SIDE, num_classes=classes
    )


def alternet(classes: int) -> nn.Module:
    """The same with attention at the end of the last two stages."""
    return AlterNet(
        (2, 2, 2), (0, 1, 1), (24, 48, 88), (1, 1, 2), "basic", SIDE, num_classes=classes
    )


def vit(classes: int) -> nn.Module:
    """Vision Transformer of patches of 4×4."""
    return VisionTransformer(
        img_size=SIDE, patch_size=4, embed_dim=72, depth=4, num_heads=4, num_classes=classes
    )


#: Images whose training loss is looked at, and those that predictions are measured on.
HELD = (("train", 512), ("test", 1000))

MODELS: dict[str, Callable[[int], nn.Module]] = {"ResNet": resnet, "ViT": vit, "AlterNet": alternet}


def scenes(split: str, count: int, crop: bool = True) -> Labelled:
    """Scenes as they are, or cropped to a square about the digit, half as large again."""
    data = Scenes(split, length=count)  # type: ignore[arg-type]
    images = []
    for i in range(count):
        sample = data[i]
        assert sample.mask is not None
        if not crop:
            images.append(sample.image[None])
            continue
        rows, columns = (sample.mask == 1).nonzero(as_tuple=True)
        y = int((rows.min() + rows.max()) / 2)
        x = int((columns.min() + columns.max()) / 2)
        half = int(0.75 * max(int(rows.max() - rows.min()), int(columns.max() - columns.min()), 8))
        padded = F.pad(sample.image[None], (half,) * 4, mode="reflect")
        cut = padded[..., y : y + 2 * half, x : x + 2 * half]
        images.append(F.interpolate(cut, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(images).clamp(0, 1), torch.tensor(data.labels)


def cifar(folder: Path, train: bool) -> Labelled:
    """CIFAR-100 in the layout that torchvision knows."""
    data = CIFAR100(str(folder), train=train)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor(data.targets)


def read(data: str, split: str, count: int) -> Labelled:
    """So many scenes of a split, or all of CIFAR-100's."""
    return scenes(split, count) if data == "digits" else cifar(Path(data), split == "train")


def train(model: nn.Module, data: Labelled, epochs: int, device: str, folder: Path) -> None:
    """Adam on NLL + L2, one-cycle learning rate; keeps every epoch's weights and its last loss."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(data[0]) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=WEIGHT_DECAY)
    # A ViT this small does not leave the plateau it starts on at the ResNets' rate.
    rate = 1e-3 if isinstance(model, VisionTransformer) else 3e-3
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "epoch0.safetensors")
    start = perf_counter()
    losses = []
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            x = normalise(augmented(data[0][index], generator)).to(device)
            loss = F.cross_entropy(model(x), data[1][index].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        save_file(model.state_dict(), folder / f"epoch{epoch + 1}.safetensors")
        losses.append(float(loss.detach()))
        click.echo(f"  epoch {epoch + 1}: loss {losses[-1]:.3f}")
    log = {"images": len(data[1]), "epochs": epochs, "rate": rate, "weight_decay": WEIGHT_DECAY,
           "last_losses": losses, "seconds": perf_counter() - start}  # fmt: skip
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def plain(value: Any) -> Any:
    """Numbers, lists and dictionaries for JSON, floats to six digits."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def trained(
    name: str, data: Callable[[], Labelled], classes: int, epochs: int, device: str, output: Path
) -> tuple[nn.Module, list[Path]]:
    """The model with its last epoch's weights, and the files of all epochs."""
    torch.manual_seed(0)
    model = MODELS[name](classes).to(device)
    folder = output / "checkpoints" / name
    files = [folder / f"epoch{i}.safetensors" for i in range(epochs + 1)]
    if not files[-1].is_file():
        click.echo(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        train(model, data(), epochs, device, folder)
    model.load_state_dict(load_file(files[-1]))
    return model.eval(), files


@click.command()
@click.option("--data", default="digits", show_default=True)
@click.option("--images", default=10000, show_default=True, help="Training images.")
@click.option("--epochs", default=14, show_default=True)
@click.option("--model", "names", multiple=True, default=tuple(MODELS), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(data: str, images: int, epochs: int, names: tuple[str, ...], output: Path) -> None:
    """Train and measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        result: dict[str, Any] = {"environment": environment(torch.device(device)), "data": data}
        if name == "demo":
            model, files = demo_vit().to(device), []
            sets = [scenes(*held, crop=False) for held in HELD]
        else:
            sets = [read(data, *held) for held in HELD]
            classes = int(sets[1][1].max()) + 1
            model, files = trained(
                name, lambda: read(data, "train", images), classes, epochs, device, output
            )
            log = output / "checkpoints" / name / "training.json"
            result["training"] = json.loads(log.read_text())
        result |= measure(model, sets[0], sets[1], WEIGHT_DECAY, files)
        (output / f"{name}.json").write_text(json.dumps(plain(result)) + "\n")
    files = [output / f"{name}.json" for name in (*MODELS, "demo")]
    table = side_by_side({f.stem: json.loads(f.read_text()) for f in files if f.is_file()})
    (output / "side_by_side.md").write_text(table)
    click.echo(table)


if __name__ == "__main__":
    main()
