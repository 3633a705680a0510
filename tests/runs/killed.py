"""Runs that are killed again and again, each resumed by the next; and the same undisturbed.

Argument: where results go. Each process is forked from this one, which has all libraries loaded.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from captum_classemb.data import Preprocess, open_dataset
from captum_classemb.explain import MapOptions, write_maps
from captum_classemb.models import class_names, demo_vit
from captum_classemb.runs import RunOptions, StudyConfig, run_study
from captum_classemb.studies.catalogue import all_studies
from captum_classemb.vit import adapt

#: How often each run is killed.
KILLS = {
    "identifiability": 4,
    "memories": 4,
    "cka": 4,
    "fourier": 4,
    "variance": 4,
    "lesion": 4,
    "attention-perturbation": 3,
    "maps": 4,
}
IMAGES = 24


def study(name: str, output: Path) -> None:
    model = demo_vit()
    data = open_dataset("scenes", Preprocess.of_model(model), None, class_names(model))
    options = RunOptions(
        batch_size=4, checkpoint_every=4, limit=IMAGES, resume=output.exists(), progress=False
    )
    config = StudyConfig(model, "demo_vit", random_model=demo_vit)
    run_study(all_studies()[name](config), data, output, options)


def maps(output: Path) -> None:
    model = demo_vit()
    data = open_dataset("scenes", Preprocess.of_model(model), None, class_names(model))
    options = MapOptions(
        ("label", "predicted"), batch_size=2, shard=4, limit=IMAGES, resume=True, progress=False
    )
    write_maps(adapt(model), "demo_vit", data, output, options)


def forked(run: Callable[[Path], None], output: Path) -> int:
    """Starts a run in a process of its own, and returns its id."""
    child = os.fork()
    if child == 0:
        torch.manual_seed(0)
        code = 1
        try:
            run(output)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """Kill and resume every run, and leave what both ways wrote."""
    torch.set_num_threads(1)
    moments = random.Random(0)
    for name, kills in KILLS.items():
        run = maps if name == "maps" else partial(study, name)
        started = time.monotonic()
        assert ended(forked(run, folder / "whole" / name)) == 0
        whole = time.monotonic() - started
        times = 0
        while times < kills:
            child = forked(run, folder / "killed" / name)
            time.sleep(moments.uniform(0.1, 0.9) * whole / 2)
            os.kill(child, signal.SIGKILL)
            times += ended(child) == -signal.SIGKILL
        assert ended(forked(run, folder / "killed" / name)) == 0
        print(name, times, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
