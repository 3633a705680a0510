"""Probes beside the class embedding: accuracies by definition, with scikit-learn as the probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import CLASSES, build
from torch import Tensor

from captum_classemb.data import Sample
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.errors import DataError, InputError
from captum_classemb.readout import LinearProbe, load_readout
from captum_classemb.runs import Row, RunOptions, StudyConfig, read_rows, run_study, select
from captum_classemb.studies import fit_linear_probe
from captum_classemb.studies.linear_probing.study import LinearProbingStudy
from captum_classemb.study_commands import study_dataset, study_group
from captum_classemb.vit import adapt, record

linear_model = pytest.importorskip("sklearn.linear_model")

QUIET = RunOptions(batch_size=4, progress=False)
#: Five of class 5 and so on; class 3 has one image only, others have none.
LABELS = [5, 0, 5, 2, 0, 3, 5, 2, 0, 5, 2, 0, 5, 2]


class Drawn:
    """Random images with a trace of their class; the object is their upper half."""

    layout = "drawn"

    def __init__(self, labels: list[int], seed: int = 0) -> None:
        self.labels, self.seed = labels, seed
        self.with_masks = len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        label = self.labels[index]
        image = torch.randn(3, 32, 32, generator=generator)
        image[label % 3, 8 * (label // 2) : 8 * (label // 2) + 8] += 1.5
        mask = torch.zeros(32, 32, dtype=torch.uint8)
        mask[:16] = 1
        return Sample(image, label, mask, str(index))

    def fingerprint(self) -> str:
        return f"{self.labels}-{self.seed}"


def config(name: str = "cls", **changes: object) -> StudyConfig:
    return StudyConfig(build(name, torch.float32), "small", **changes)  # type: ignore[arg-type]


def features(data: Drawn, site: str, block: int, normed: bool = True) -> Tensor:
    vit = adapt(build("cls", torch.float32))
    images = torch.stack([data[i].image for i in range(len(data))])
    hidden = record(vit, images, [site], blocks=[block])[site][block]
    return vit.readout.normalise(hidden) if normed else hidden  # type: ignore[operator]


def predicted(x: Tensor, train: list[int], test: list[int], labels: Tensor) -> Tensor:
    """scikit-learn's ridge on the tokens of some images, asked about those of others: B×Q."""
    targets = 2.0 * torch.nn.functional.one_hot(labels[train], CLASSES).double() - 1.0
    targets = targets.repeat_interleave(x.shape[1], 0)
    fitted = linear_model.Ridge(alpha=1.0).fit(x[train].flatten(0, 1).double(), targets)
    scores = fitted.predict(x[test].flatten(0, 1).double().numpy())
    return torch.from_numpy(scores.argmax(-1)).unflatten(0, (len(test), x.shape[1]))


def run(
    study: LinearProbingStudy, data: object, folder: Path, options: RunOptions = QUIET
) -> list[Row]:
    return run_study(study, data, folder, options).tables["linear_probing"]  # type: ignore[arg-type]


def one(rows: list[Row], **fields: object) -> Row:
    (row,) = select(rows, **fields)
    return row


@pytest.mark.parametrize("variant", ["corrected", "paper"])
def test_without_a_training_set_each_fold_is_read_by_the_probe_of_the_others(
    tmp_path: Path, variant: str
) -> None:
    data = Drawn(LABELS)
    study = LinearProbingStudy(config(variant=variant))
    rows = run(study, data, tmp_path / "out")
    labels = torch.tensor(LABELS)
    kept = [i for i in range(len(LABELS)) if LABELS[i] != 3]
    ordered = sorted(kept, key=lambda i: LABELS[i])
    vit = adapt(build("cls", torch.float32))
    for block, site in ((0, "mlp_out"), (2, "resid_post")):
        x = features(data, site, block, normed=variant == "corrected")
        logits = vit.readout.project(record(vit, whole(data), [site])[site][block])
        own = torch.tensor([0, 2, 5])[logits[..., [0, 2, 5]].argmax(-1)]
        right = torch.zeros(len(LABELS), 17, dtype=torch.bool)
        for fold in range(5):
            test = ordered[fold::5]
            train = [i for i in kept if i not in test]
            for tokens in (slice(0, 1), slice(1, None)):
                best = predicted(x[:, tokens], train, test, labels)
                right[test, tokens] = best == labels[test, None]
        for metric, found in (("probe", right), ("projection", own == labels[:, None])):
            where = {"block": block, "site": site, "metric": f"{metric}_accuracy"}
            groups = {
                ("cls", "all"): found[kept, :1],
                ("image", "all"): found[kept, 1:],
                ("image", "class"): found[kept, 1:9],
                ("image", "context"): found[kept, 9:],
            }
            for (tokens, group), expected in groups.items():
                row = one(rows, **where, tokens=tokens, group=group)
                assert row.value == pytest.approx(expected.double().mean().item(), abs=1e-9)
                assert row.n == expected.numel()
    accuracy = one(rows, metric="accuracy")
    logits = vit(whole(data))[kept][:, [0, 2, 5]]
    best = torch.tensor([0, 2, 5])[logits.argmax(-1)]
    assert accuracy.value == pytest.approx((best == labels[kept]).double().mean().item())
    assert accuracy.n == len(kept)
    told = study.notices()
    assert told[0].startswith("18 probes in 1 pass")
    assert "3 classes from 13 images (5 folds)" in told[1]
    assert told[2] == "1 class is left out, with fewer than 2 images: class 3."


def whole(data: Drawn) -> Tensor:
    return torch.stack([data[i].image for i in range(len(data))])


def test_with_a_training_set_the_test_set_is_read(tmp_path: Path) -> None:
    """Its images come first; classes that only it has are left out."""
    test, train = Drawn([5, 0, 2, 1, 5], seed=1), Drawn(LABELS)
    study = LinearProbingStudy(config())
    rows = run(study, TrainAndTest(test, train), tmp_path / "out")
    both = torch.cat([features(test, "attn_out", 1), features(train, "attn_out", 1)])
    labels = torch.tensor(test.labels + train.labels)
    asked = [0, 1, 2, 4]
    fitted = list(range(len(test), len(both)))
    for tokens, place in (("cls", slice(0, 1)), ("image", slice(1, None))):
        best = predicted(both[:, place], fitted, asked, labels)
        expected = (best == labels[asked, None]).double().mean().item()
        where = {"block": 1, "site": "attn_out", "tokens": tokens, "group": "all"}
        assert one(rows, **where, metric="probe_accuracy").value == pytest.approx(expected)
    assert "4 classes from 14 images (a training set)" in study.notices()[1]
    assert study.notices()[2] == "1 class is left out, without training images: class 1."
    notes = json.loads((tmp_path / "out/run.json").read_text())
    assert notes["classes"] == [0, 2, 3, 5] and notes["classes_left_out"] == [1]
    assert set(notes["seconds_by_stage"]) == {
        "forward", "sums", "solve", "read_probes", "read_projection",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in notes["seconds_by_stage"].values())


def test_less_memory_takes_more_passes_to_the_same_table(tmp_path: Path) -> None:
    data = Drawn(LABELS)
    rows = run(LinearProbingStudy(config()), data, tmp_path / "one")
    each = 5 * 8 * (24 * 24 + 3 * 24 + 3)
    small = LinearProbingStudy(config(), memory_limit=7 * each / 1e6)
    assert run(small, data, tmp_path / "three") == rows
    assert [len(part) for part in small.plan.passes] == [6, 6, 6]
    assert small.plan.bytes_held == 6 * each


def test_a_probe_for_each_position(tmp_path: Path) -> None:
    test, train = Drawn([5, 0, 2, 0, 5], seed=1), Drawn(LABELS)
    data = TrainAndTest(test, train)
    rows = run(LinearProbingStudy(config(), positions="all"), data, tmp_path / "all")
    both = torch.cat([features(test, "resid_post", 2), features(train, "resid_post", 2)])
    labels = torch.tensor(test.labels + train.labels)
    where = {"block": 2, "site": "resid_post"}
    asked, fitted = list(range(5)), list(range(5, len(both)))
    shares = []
    for position in range(17):
        best = predicted(both[:, position : position + 1], fitted, asked, labels)
        shares.append((best == labels[asked, None]).double().mean().item())
        row = one(rows, **where, metric=f"probe_accuracy/position_{position}")
        assert (row.value, row.n) == (pytest.approx(shares[-1]), 5)
        assert row.tokens == ("image" if position else "cls")
    image = one(rows, **where, tokens="image", group="all", metric="probe_accuracy")
    assert image.value == pytest.approx(np.mean(shares[1:]))
    some = run(LinearProbingStudy(config(), positions="16,0"), data, tmp_path / "some")
    place = {**where, "metric": "probe_accuracy/position_16"}
    assert one(some, **place) == one(rows, **place)
    assert one(some, **where, tokens="image", group="all", metric="probe_accuracy").n == 5


@pytest.mark.parametrize("after", [2, 5, 6, 9])
def test_interrupted_in_any_pass_it_goes_on_bit_for_bit(tmp_path: Path, after: int) -> None:
    class StopError(Exception):
        pass

    class Stopping(LinearProbingStudy):
        name = "linear-probing"

        def update(self, batch) -> None:  # type: ignore[no-untyped-def]
            if batch.number == after:
                raise StopError
            super().update(batch)

    data, own = Drawn(LABELS), config()
    often = {"batch_size": 4, "checkpoint_every": 4, "progress": False}
    limit = 10 * 5 * 8 * (24 * 24 + 3 * 24 + 3) / 1e6
    with pytest.raises(StopError):
        run_study(Stopping(own, memory_limit=limit), data, tmp_path / "cut", RunOptions(**often))
    study = LinearProbingStudy(own, memory_limit=limit)
    rows = run(study, data, tmp_path / "cut", RunOptions(**often, resume=True))
    assert rows == run(LinearProbingStudy(own), data, tmp_path / "whole")


def test_saved_probes_are_those_of_all_training_images(tmp_path: Path) -> None:
    data, output = Drawn(LABELS), tmp_path / "out"
    own = config(output=output)
    run(LinearProbingStudy(own, save_probes=True), data, output)
    saved = load_readout(output / "probes.safetensors", adapt(own.model).readout)
    assert isinstance(saved, LinearProbe) and saved.num_classes == CLASSES
    kept = [i for i in range(len(LABELS)) if LABELS[i] != 3]
    batch = (whole(data)[kept], torch.tensor(LABELS)[kept])
    direct = fit_linear_probe(own.model, [batch])
    for place in direct.places:
        one_file, other = saved.heads[place], direct.heads[place]
        torch.testing.assert_close(one_file.weight, other.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one_file.bias, other.bias, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="output folder"):
        LinearProbingStudy(config(), save_probes=True)


@pytest.mark.parametrize("name", ["mean, no cls", "registers", "distilled", "parallel scaling"])
def test_other_models(tmp_path: Path, name: str) -> None:
    rows = run(LinearProbingStudy(config(name)), Drawn(LABELS), tmp_path / "out")
    assert ("cls" in {row.tokens for row in rows}) == (name != "mean, no cls")
    assert all(0 <= row.value <= 1 for row in rows)
    counts = {row.n for row in rows if (row.tokens, row.group) == ("image", "all")}
    assert counts == {13 * 16}


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"positions": "17"}, InputError, "position 17 is out of range: an image has 17 tokens"),
        ({"positions": "0;1"}, InputError, "no list like 0,17"),
        ({}, DataError, "1 classes can be probed, on 2 images"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    tmp_path: Path, given: dict[str, str], error: type[Exception], message: str
) -> None:
    data = Drawn(LABELS if given else [0, 1, 2, 1])
    with pytest.raises(error, match=message):
        run(LinearProbingStudy(config(), **given), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_with_scenes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [
        "linear-probing", "--model", "demo_vit", "--data", "scenes", "--device", "cpu",
        "--output", str(output), "--limit", "50", "--save-probes", "--batch-size", "16",
    ]  # fmt: skip
    done = CliRunner().invoke(study_group(), arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "projection_accuracy" in done.output
    run_json = json.loads((output / "run.json").read_text())
    assert run_json["settings"]["data"]["layout"] == "scenes" and run_json["folds"] == 1
    assert run_json["settings"]["data"]["images"] == 25_000 and run_json["images"] == 50
    assert one(read_rows(output / "linear_probing.csv"), metric="accuracy").n == 10
    assert (output / "probes.safetensors").is_file() and len(run_json["figures"]) == 2


def test_a_training_set_of_its_own() -> None:
    given = {
        "model": "demo_vit", "data_path": "scenes", "resize": "crop", "layout": None, "labels": None
    }  # fmt: skip
    assert len(study_dataset(given, True, say=False)) == 5_000
    assert len(study_dataset({**given, "train_data": None}, True, say=False)) == 25_000
    named = study_dataset({**given, "train_data": "scenes:val"}, True, say=False)
    assert isinstance(named, TrainAndTest) and len(named.train) == 2_000
