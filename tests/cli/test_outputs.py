"""What the command line writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from click.testing import CliRunner
from command_line import MODEL, Explain, files
from PIL import Image
from safetensors.torch import save_file

from captum_classemb.attr import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
)
from captum_classemb.cli import cli
from captum_classemb.explain.compute import OWN
from captum_classemb.models.load import load_model


def test_every_image_gets_a_figure_its_maps_and_a_record(
    explain: Explain, photos: Path, tmp_path: Path
) -> None:
    result = explain(photos)
    assert result.exit_code == 0, result.output
    stems = ("one", "two", "three")
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("png", "npz", "json")}
    assert files(tmp_path / "out") == expected
    with Image.open(tmp_path / "out" / "one.png") as picture:
        picture.verify()


@pytest.mark.parametrize("targets", [(), ("281", "white shark")])
def test_maps_are_those_of_the_attributions(
    targets: tuple[str, ...], explain: Explain, photos: Path, tmp_path: Path, checkpoint: Path
) -> None:
    words = [word for target in targets for word in ("--target", target)]
    assert explain(photos / "one.png", *words).exit_code == 0
    model = load_model(MODEL, checkpoint)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    inputs = transform(Image.open(photos / "one.png"))[None]
    wanted = [281, 2] if targets else [int(model(inputs).argmax())]
    with np.load(tmp_path / "out" / "one.npz") as archive:
        assert archive["targets"].tolist() == wanted
        for name, method in {
            "class-embedding-projection": ClassEmbeddingProjection(model),
            "class-embedding-gradient": ClassEmbeddingGradient(model),
            "memory-patch-importance": MemoryPatchImportance(model),
        }.items():
            expected = method.attribute_classes(inputs, wanted)[0].numpy()
            assert archive[name].shape == (len(wanted), 10, 10)
            np.testing.assert_allclose(
                archive[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
            )
        assert archive["identifiability_cls"].shape == (len(wanted), 6)
        assert archive["identifiability_patches"].shape == (len(wanted), 6, 10, 10)
        probabilities = model(inputs).softmax(-1)[0].detach().numpy()
        np.testing.assert_allclose(archive["probabilities"], probabilities, rtol=1e-4, atol=1e-7)


def test_identifiability_of_the_last_cls_is_the_rank_of_the_prediction(
    explain: Explain, photos: Path, tmp_path: Path
) -> None:
    explain(photos / "one.png", "--target", "7")
    with np.load(tmp_path / "out" / "one.npz") as archive:
        p = archive["probabilities"]
        expected = 1 - ((p >= p[7]).sum() - 1) / 1000
        assert archive["identifiability_cls"][0, -1] == pytest.approx(expected)


def test_record_says_what_was_computed_on_what(
    explain: Explain, photos: Path, tmp_path: Path, checkpoint: Path
) -> None:
    explain(
        photos / "one.png",
        "--target",
        "tabby",
        "--method",
        "memory-patch-importance",
        "--dtype",
        "float64",
    )
    record = json.loads((tmp_path / "out" / "one.json").read_text())
    assert record["image"]["file"] == str(photos / "one.png")
    assert (record["image"]["width"], record["image"]["height"]) == (220, 180)
    assert record["model"]["name"] == MODEL
    assert record["model"]["weights"]["file"] == str(checkpoint)
    assert len(record["model"]["weights"]["sha256"]) == 64
    assert record["model"]["grid"] == [10, 10]
    assert record["model"]["dtype"] == "float64"
    assert record["preprocess"]["input_size"] == [3, 160, 160]
    assert [target["index"] for target in record["targets"]] == [281]
    assert record["targets"][0]["name"] == "tabby"
    assert len(record["top"]) == 5
    assert record["methods"]["memory-patch-importance"]["options"]["objective"] == "logit"
    assert {"torch", "timm", "captum-classemb"} <= set(record["versions"])


def test_only_the_methods_asked_for(explain: Explain, photos: Path, tmp_path: Path) -> None:
    words = (
        "--method",
        "memory-patch-importance",
        "--method",
        "class-embedding-projection",
        "--method",
        "memory-patch-importance",
    )
    assert explain(photos / "one.png", *words).exit_code == 0
    with np.load(tmp_path / "out" / "one.npz") as archive:
        assert set(OWN) & set(archive) == {
            "memory-patch-importance",
            "class-embedding-projection",
        }
    record = json.loads((tmp_path / "out" / "one.json").read_text())
    assert list(record["methods"]) == ["memory-patch-importance", "class-embedding-projection"]


@pytest.mark.parametrize("name", ["test_vit2", "deit_tiny_distilled_patch16_224"])
def test_other_families(name: str, photos: Path, tmp_path: Path) -> None:
    """A model that averages its patches has no curve for CLS; a distilled one has two tokens."""
    save_file(load_model(name, random_init=True).state_dict(), tmp_path / "b.safetensors")
    words = ["explain", str(photos / "one.png"), "--model", name, "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*words, "--checkpoint", str(tmp_path / "b.safetensors")])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out" / "one.npz") as archive:
        assert ("identifiability_cls" in archive) == (name != "test_vit2")


def test_batches_change_nothing(explain: Explain, photos: Path, tmp_path: Path) -> None:
    def maps(batch_size: int) -> dict[str, Any]:
        explain(photos, "--batch-size", str(batch_size))
        with np.load(tmp_path / "out" / "two.npz") as archive:
            return dict(archive)

    alone, together = maps(1), maps(2)
    for name in OWN:
        atol = 1e-5 * np.abs(alone[name]).max()
        np.testing.assert_allclose(alone[name], together[name], rtol=1e-4, atol=atol)


def test_images_of_one_name_do_not_overwrite_each_other(
    explain: Explain, photos: Path, tmp_path: Path
) -> None:
    (photos / "sub").mkdir()
    Image.new("RGB", (20, 20)).save(photos / "sub" / "one.jpg")
    explain(photos, "--method", "class-embedding-projection")
    assert {"one.png", "one-2.png", "two.png", "three.png"} <= files(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "one-2.json").read_text())
    assert record["image"]["file"].endswith("one.jpg")


def test_table_says_what_was_found_and_where(
    explain: Explain, photos: Path, tmp_path: Path
) -> None:
    result = explain(photos / "one.png", "--target", "tabby")
    head, row = result.output.splitlines()
    assert head.split() == ["image", "top", "class", "explained", "picture"]
    assert row.startswith("one.png")
    assert row.split()[-2:] == ["tabby", str(tmp_path / "out" / "one.png")]
    assert explain(photos / "one.png", "--quiet").output == ""


def test_nothing_given_explains_the_packaged_image(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["explain", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert sorted(Path(name).suffix for name in files(tmp_path / "out")) == [
        ".json",
        ".npz",
        ".png",
    ]
    (record,) = (tmp_path / "out").glob("*.json")
    assert json.loads(record.read_text())["model"]["weights"] == {"source": "package"}


def test_photographs_are_no_digits(photos: Path, tmp_path: Path) -> None:
    words = ["explain", str(photos / "one.png"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "name another with --model" in result.output
