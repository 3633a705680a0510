"""All studies over fewer batches than there are processes; with torchrun, or alone.

Arguments: where results go, a folder of checkpoints, and which studies.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from captum_classemb.data import Preprocess, open_dataset
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.models import class_names, demo_vit
from captum_classemb.runs import RunOptions, StudyConfig, run_study
from captum_classemb.studies.catalogue import all_studies

#: What a study needs beside its defaults; small, so that all of them take little time.
OPTIONS = {
    "hessian": {"eigenvalues": 1},
    "loss-landscape": {"points": 3},
    "trajectory": {"eigenvalues": 1},
    "frequency-noise": {"bands": 2},
    "faithfulness": {"methods": ("patch-importance",), "steps": 2},
}
IMAGES = 4


def main(output: Path, checkpoints: Path, names: list[str]) -> None:
    """Run studies of the packaged model over four scenes, in one batch."""
    torch.manual_seed(0)
    model = demo_vit()
    for name in names:
        study = all_studies()[name]
        subject = StudyConfig(model, "demo_vit", random_model=demo_vit)
        options = dict(OPTIONS.get(name, {}))
        if name == "trajectory":
            options["checkpoints"] = checkpoints
        data = open_dataset("scenes", Preprocess.of_model(model), None, class_names(model))
        if study.trains:
            data = TrainAndTest(data, open_dataset("scenes:train", Preprocess.of_model(model)))
        run = RunOptions(batch_size=2 * IMAGES, limit=IMAGES, progress=False)
        run_study(study(subject, **options), data, output / name, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
