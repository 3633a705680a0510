"""The faithfulness study gives what its metrics give, is resumable, and draws its curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drawn import DrawnData, small_timm
from torch import Tensor, nn

from captum_classemb.attr.baselines import CheferRelevance
from captum_classemb.cli import cli
from captum_classemb.edit import remove_tokens
from captum_classemb.errors import CheckpointError, InputError, OutputError
from captum_classemb.evaluation import BoxLocalisation, RemovalCurves
from captum_classemb.readout import (
    LinearProbe,
    ProbeHeads,
    Translator,
    TunedLens,
    load_readout,
    save_readout,
)
from captum_classemb.runs import RunOptions, StudyConfig, run_study, select
from captum_classemb.studies import all_studies
from captum_classemb.studies.faithfulness.study import FaithfulnessStudy
from captum_classemb.studies.linear_probing.study import LinearProbingStudy
from captum_classemb.vit import adapt, record

IMAGES, WIDTH, DEPTH, CLASSES, TOKENS = 6, 24, 2, 4, 17
OPTIONS = RunOptions(batch_size=4, progress=False)


class Boxes(DrawnData):
    """Random images whose object is a quarter of each; one has no mask."""

    layout = "boxes"
    images = IMAGES
    with_masks = IMAGES - 1

    def mask(self, index: int) -> Tensor | None:
        mask = torch.zeros(32, 32, dtype=torch.uint8)
        mask[:16, 16:] = 1
        return None if index == 2 else mask


def model(width: int = WIDTH, depth: int = DEPTH, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    return small_timm(embed_dim=width, depth=depth, num_classes=classes).eval()


def whole() -> tuple[Tensor, Tensor]:
    images = torch.stack([Boxes()[i].image for i in range(IMAGES)])
    return images, torch.tensor(Boxes().labels)


def probes(
    width: int = WIDTH,
    classes: int = CLASSES,
    blocks: tuple[int, ...] = (0, 1),
    site: str = "resid_post",
    prefix: int = 1,
    positions: int | None = None,
    seed: int = 0,
) -> LinearProbe:
    """Probes with random weights, as if they had been fitted to a model of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = positions or 2
    heads = {
        (block, site): ProbeHeads(
            torch.randn(kinds, classes, width, generator=generator),
            torch.randn(kinds, classes, generator=generator),
        )
        for block in blocks
    }
    own = adapt(model(width)).readout
    return LinearProbe(own, heads, prefix, None if positions is None else range(positions))


def summed_identifiability(probe: LinearProbe) -> Tensor:
    """1 − rank/C of the label in every patch after every block, token by token: B×4×4."""
    images, labels = whole()
    hidden = record(adapt(model()), images, ["resid_post"])["resid_post"]
    norm = model().norm
    maps = torch.zeros(IMAGES, TOKENS - 1)
    for block in range(DEPTH):
        heads = probe.heads[block, "resid_post"]
        for i, label in enumerate(labels.tolist()):
            for patch in range(TOKENS - 1):
                kind = 1 if probe.positions is None else 1 + patch
                with torch.no_grad():
                    features = norm(hidden[block][i, 1 + patch])
                logits = (heads.weight[kind] @ features + heads.bias[kind]).tolist()
                above = [c for c in range(CLASSES) if c != label and logits[c] >= logits[label]]
                maps[i, patch] += 1 - len(above) / CLASSES
    return maps.view(IMAGES, 4, 4)


def test_the_study_is_known_and_measures_what_the_metrics_measure(tmp_path: Path) -> None:
    assert all_studies()["faithfulness"] is FaithfulnessStudy
    config = StudyConfig(model(), "small")
    study = FaithfulnessStudy(config, ["chefer", "rollout"], steps=4)
    options = RunOptions(batch_size=4, progress=False)
    result = run_study(study, Boxes(), tmp_path, options)
    samples = [Boxes()[i] for i in range(IMAGES)]
    images, labels = torch.stack([s.image for s in samples]), torch.tensor(Boxes().labels)
    maps = CheferRelevance(model()).attribute_patches(images, labels)[:, 0]
    metric = RemovalCurves(steps=4)
    metric.update(model(), images, maps, labels)
    for name, value in metric.compute().items():
        if "paper" not in name:
            (row,) = select(result.tables["areas"], metric=f"chefer/{name}")
            assert row.value == pytest.approx(value.item(), abs=1e-5) and row.n == IMAGES
    (low,) = select(result.tables["areas"], metric="chefer/probability/gap/low")
    (mean,) = select(result.tables["areas"], metric="chefer/probability/gap")
    assert low.value <= mean.value
    place = BoxLocalisation()
    known = [0, 1, 3, 4, 5]
    masks = torch.stack([samples[i].mask == 1 for i in known if samples[i].mask is not None])
    place.update(maps[known], masks)
    (row,) = select(result.tables["areas"], metric="chefer/energy")
    assert row.value == pytest.approx(place.compute()["energy"].item(), abs=1e-5) and row.n == 5
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_papers_variant_gives_published_areas(tmp_path: Path) -> None:
    config = StudyConfig(model(), "small", variant="paper")
    options = RunOptions(batch_size=3, progress=False)
    study = FaithfulnessStudy(config, ["chefer"], steps=16)
    rows = run_study(study, Boxes(), tmp_path, options).tables["areas"]
    names = {row.metric for row in rows}
    assert "chefer/accuracy/negative" in names and "chefer/accuracy/gap" not in names


def test_random_orders_are_measured_beside_the_methods(tmp_path: Path) -> None:
    study = FaithfulnessStudy(StudyConfig(model(), "small"), ["rollout"], steps=4)
    tables = run_study(study, Boxes(), tmp_path, OPTIONS).tables
    images, labels = whole()
    vit, curves = adapt(model()), torch.zeros(5, 5, IMAGES)
    for seed in range(5):
        for image in range(IMAGES):
            order = np.random.Generator(np.random.Philox(key=[seed, image])).permutation(16)
            for point, gone in enumerate((0, 4, 8, 12, 16)):
                kept = torch.from_numpy(order[gone:].copy())[None]
                with torch.no_grad(), remove_tokens(vit, kept):
                    logits = vit(images[image, None])
                curves[seed, point, image] = logits.softmax(-1)[0, labels[image]]
    mean = curves.mean(-1)
    for point in range(5):
        for name, value in (("mean", mean.mean(0)), ("low", mean.amin(0)), ("high", mean.amax(0))):
            metric = f"random/probability/{name}@{point / 4:.4f}"
            (row,) = select(tables["curves"], metric=metric)
            assert row.value == pytest.approx(value[point].item(), abs=1e-5)
    (row,) = select(tables["areas"], metric="random/probability/area")
    area = torch.trapezoid(mean.mean(0), dx=0.25).item()
    assert row.value == pytest.approx(area, abs=1e-5) and row.n == IMAGES


def test_the_predicted_class_and_half_of_the_images(tmp_path: Path) -> None:
    config = StudyConfig(model(), "small")
    study = FaithfulnessStudy(config, ["chefer"], 4, target="predicted", half="odd")
    areas = run_study(study, Boxes(), tmp_path, OPTIONS).tables["areas"]
    images = whole()[0][1::2]
    predicted = model()(images).argmax(-1)
    metric = RemovalCurves(steps=4)
    maps = CheferRelevance(model()).attribute_patches(images, predicted)[:, 0]
    metric.update(model(), images, maps, predicted)
    (row,) = select(areas, metric="chefer/probability/gap")
    assert row.n == 3 and row.value == pytest.approx(metric.compute()["probability/gap"].item())
    for wrong in ({"target": "other"}, {"half": "third"}):
        with pytest.raises(InputError, match="'label' or 'predicted'"):
            FaithfulnessStudy(config, ["chefer"], 4, **wrong)  # type: ignore[arg-type]


def test_axioms_cost_and_differences(tmp_path: Path) -> None:
    config = StudyConfig(model(), "small")
    names = ["chefer", "raw-attention"]
    study = FaithfulnessStudy(config, names, 4, axioms=True, cost=True)
    areas = run_study(study, Boxes(), tmp_path / "one", OPTIONS).tables["areas"]
    value = {row.metric: row.value for row in areas}
    assert value["chefer/cost/backward_passes"] > 0.4
    assert value["raw-attention/cost/backward_passes"] == 0.0
    assert value["raw-attention/cost/forward_passes"] == pytest.approx(1.0)
    assert value["chefer/cost/memory"] > value["raw-attention/cost/memory"]
    (row,) = select(areas, metric="raw-attention/axioms/infidelity")
    assert row.n == 4 and row.value > 0
    # Attention of the last block knows of no class: shuffled weights leave nothing of its map.
    assert abs(value["raw-attention/axioms/randomised"]) < 0.5
    ours, other = (study.metrics[f"curve {name}"].images() for name in names)  # type: ignore
    for area in ("accuracy/gap", "probability/negative"):
        expected = (ours[area] - other[area]).mean().item()
        assert value[f"raw-attention/{area}/first_minus_this"] == pytest.approx(expected)
    assert not any("chefer" in name and "first_minus" in name for name in value)
    # The other model of a comparison is in both figures.
    config = StudyConfig(model(depth=3), "deep")
    study = FaithfulnessStudy(config, names, 4)
    options = replace(OPTIONS, compare=[tmp_path / "one"])
    result = run_study(study, Boxes(), tmp_path / "two", options)
    assert {row.model for rows in result.tables.values() for row in rows} == {"deep"}
    assert (tmp_path / "two" / "methods.png").stat().st_size > 10_000


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="'smoothgrad' is none of"):
        FaithfulnessStudy(StudyConfig(model(), "small"), ["smoothgrad"])


@pytest.mark.parametrize("positions", [None, TOKENS])
def test_probes_order_patches_by_the_class_they_read(tmp_path: Path, positions: int | None) -> None:
    probe = probes(positions=positions)
    save_readout(probe, tmp_path / "probe")
    study = FaithfulnessStudy(
        StudyConfig(model(), "small"), ["linear-probe", "rollout"], 4, probe=tmp_path / "probe"
    )
    result = run_study(study, Boxes(), tmp_path / "out", OPTIONS)
    metric = RemovalCurves(steps=4)
    maps = summed_identifiability(probe)
    # Random probes rank the label of most patches differently: the order is not one of ties.
    assert maps.unique().numel() > CLASSES
    metric.update(model(), whole()[0], maps, whole()[1])
    for name, value in metric.compute().items():
        if "paper" not in name:
            (row,) = select(result.tables["areas"], metric=f"linear-probe/{name}")
            assert row.value == pytest.approx(value.item(), abs=1e-5) and row.n == IMAGES
    (probed,) = select(result.tables["areas"], metric="linear-probe/probability/gap")
    (rolled,) = select(result.tables["areas"], metric="rollout/probability/gap")
    assert probed.value != rolled.value


def test_the_file_that_linear_probing_writes_is_read(tmp_path: Path) -> None:
    fitted = StudyConfig(model(), "small", output=tmp_path / "fitted")
    run_study(LinearProbingStudy(fitted, save_probes=True), Boxes(), tmp_path / "fitted", OPTIONS)
    file = tmp_path / "fitted" / "probes.safetensors"
    study = FaithfulnessStudy(StudyConfig(model(), "small"), ["linear-probe"], 4, probe=str(file))
    rows = run_study(study, Boxes(), tmp_path / "out", OPTIONS).tables["areas"]
    saved = load_readout(file, adapt(model()).readout)
    assert isinstance(saved, LinearProbe)
    place = BoxLocalisation()
    known = [0, 1, 3, 4, 5]
    masks = torch.stack([mask == 1 for i in known if (mask := Boxes()[i].mask) is not None])
    place.update(summed_identifiability(saved)[known], masks)
    (row,) = select(rows, metric="linear-probe/energy")
    assert row.value == pytest.approx(place.compute()["energy"].item(), abs=1e-5) and row.n == 5


def test_a_run_is_resumed_with_the_same_probes_alone(tmp_path: Path) -> None:
    changed = probes()
    changed.heads[1, "resid_post"].bias[1, 3] += 1e-6
    unnormed = LinearProbe(adapt(model()).readout, probes().heads, 1, normed=False)
    others = {"drawn anew": probes(seed=1), "changed": changed, "unnormed": unnormed}
    backwards = LinearProbe(
        adapt(model()).readout, dict(reversed(probes().heads.items())), prefix_tokens=1
    )
    for name, probe in {"first": probes(), "again": backwards, **others}.items():
        save_readout(probe, tmp_path / name)
    resume = RunOptions(batch_size=4, progress=False, resume=True)

    def study(file: str) -> FaithfulnessStudy:
        config = StudyConfig(model(), "small")
        return FaithfulnessStudy(config, ["linear-probe"], 4, probe=tmp_path / file)

    first = run_study(study("first"), Boxes(), tmp_path / "out", OPTIONS)
    digest = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["probe"]
    for name in others:
        with pytest.raises(OutputError, match=f"has probe = '{digest}' and this one"):
            run_study(study(name), Boxes(), tmp_path / "out", resume)
    again = run_study(study("again"), Boxes(), tmp_path / "out", resume)
    assert again.images == first.images == IMAGES


def test_a_run_without_probes_has_none_in_its_settings() -> None:
    assert FaithfulnessStudy(StudyConfig(model(), "small"), ["rollout"]).settings()["probe"] is None


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"width": 48}, "reads 48 features and the model has 24: it belongs to another model"),
        ({"classes": 10}, "has 10 classes and the model 4"),
        ({"blocks": (0, 1, 5)}, "reads block 5 and the model has blocks 0 to 1"),
        ({"blocks": (0,)}, "has nothing for resid_post of block 1"),
        ({"site": "attn_out"}, "has nothing for resid_post of block 0"),
        ({"prefix": 2}, "2 tokens before the patches and this one has 1"),
    ],
)
def test_probes_of_another_model_are_refused(
    tmp_path: Path, sizes: dict[str, object], message: str
) -> None:
    save_readout(probes(**sizes), tmp_path / "probe")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        FaithfulnessStudy(StudyConfig(model(), "small"), ["linear-probe"], probe=tmp_path / "probe")


@pytest.mark.parametrize("positions", [3, TOKENS + 4])
def test_probes_of_other_positions_are_refused_before_anything_is_written(
    tmp_path: Path, positions: int
) -> None:
    save_readout(probes(positions=positions), tmp_path / "probe")
    study = FaithfulnessStudy(
        StudyConfig(model(), "small"), ["linear-probe"], probe=tmp_path / "probe"
    )
    with pytest.raises(InputError, match=f"at {positions} positions.* an image has 17 tokens"):
        run_study(study, Boxes(), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_file_without_probes_is_refused(tmp_path: Path) -> None:
    config = StudyConfig(model(), "small")
    identity = {(block, "resid_post"): Translator.identity(WIDTH) for block in range(DEPTH)}
    save_readout(TunedLens(adapt(model()).readout, identity), tmp_path / "lens")
    (tmp_path / "text").write_text("no tensors")
    for name, error, message in (
        ("lens", InputError, "lens holds a TunedLens"),
        ("text", CheckpointError, "text cannot be read"),
        ("nothing", CheckpointError, "nothing cannot be read"),
    ):
        with pytest.raises(error, match=message):
            FaithfulnessStudy(config, ["linear-probe"], probe=tmp_path / name)
    with pytest.raises(InputError, match="no method that was chosen: add linear-probe"):
        FaithfulnessStudy(config, ["rollout"], probe=tmp_path / "lens")


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    words = ["study", "faithfulness", "--model", "demo_vit", "--data", "scenes", "--device", "cpu"]
    words += ["--method", "linear-probe", "--output", str(tmp_path / "out")]
    (tmp_path / "text").write_text("no tensors")
    for more, message in (
        ([], "no file was given: give one with --probe"),
        (["--probe", str(tmp_path / "text")], "cannot be read"),
    ):
        done = CliRunner().invoke(cli, [*words, *more])
        (line,) = done.output.splitlines()
        assert done.exit_code == 2 and line.startswith("Error: ") and message in line
        assert not (tmp_path / "out").exists()
