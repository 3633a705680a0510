"""Small models and images for the dynamics studies; as a program, all studies of one model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from drawn import DrawnData, small_timm
from safetensors.torch import save_file
from torch import nn

from captum_classemb.dynamics.alternet import AlterNet
from captum_classemb.dynamics.studies.corruption_robustness import RobustnessStudy
from captum_classemb.dynamics.studies.curvature import (
    HessianStudy,
    LossLandscapeStudy,
    TrajectoryStudy,
)
from captum_classemb.dynamics.studies.fourier_and_variance import FourierStudy, VarianceStudy
from captum_classemb.dynamics.studies.response import CKAStudy, FrequencyNoiseStudy, LesionStudy
from captum_classemb.runs import RunOptions, Study, StudyConfig, run_study

IMAGES, SIDE, CLASSES = 10, 32, 4
OPTIONS = RunOptions(batch_size=5, progress=False)


class Noise(DrawnData):
    layout = "noise"
    images, side, classes = IMAGES, SIDE, CLASSES

    def pixels(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return 2 * torch.rand(3, SIDE, SIDE, generator=generator) - 1


def configured(model: nn.Module) -> nn.Module:
    model.pretrained_cfg = {
        "input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3
    }  # fmt: skip
    return model.eval()


def vit() -> nn.Module:
    return configured(small_timm(embed_dim=12, num_classes=CLASSES))


def cnn() -> nn.Module:
    return configured(
        AlterNet(
            (1, 2, 2), widths=(4, 8, 8), heads=(1, 1, 1), block="basic", img_size=SIDE,
            num_classes=CLASSES,
        )
    )  # fmt: skip


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    data = Noise()
    return torch.stack([data[i].image for i in range(IMAGES)]), torch.tensor(data.labels)


def save_checkpoints(model: nn.Module, folder: Path, scales: tuple[float, ...]) -> None:
    """Checkpoints of a training that shrinks the weights to those of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scale in enumerate(scales):
        state = {
            k: v * scale if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        save_file(state, folder / f"epoch{i}.safetensors")


def every_study(model: nn.Module, checkpoints: Path) -> Iterator[Callable[[], Study]]:
    """What makes each of the studies, small."""
    config = StudyConfig(model, "small")
    yield lambda: FourierStudy(config)
    yield lambda: VarianceStudy(config)
    yield lambda: HessianStudy(config, eigenvalues=2)
    yield lambda: LossLandscapeStudy(config, points=3)
    yield lambda: TrajectoryStudy(config, checkpoints, eigenvalues=1)
    yield lambda: FrequencyNoiseStudy(config, bands=3)
    yield lambda: RobustnessStudy(config)
    yield lambda: LesionStudy(config)
    yield lambda: CKAStudy(config)


if __name__ == "__main__":
    torch.manual_seed(0)
    output = Path(sys.argv[1])
    for make in every_study(vit(), output / "checkpoints"):
        study = make()
        run_study(study, Noise(), output / study.name, RunOptions(batch_size=4, progress=False))
