"""How the command line answers wrong arguments and images."""

from __future__ import annotations

import os
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from command_line import MODEL, Explain, assert_refused, errors, files
from PIL import Image

from captum_classemb.cli import cli


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "1000"), "0 to 999"),
        (("--target", "-1"), "0 to 999"),
        (("--target", "crane"), "134 (crane) and 517 (crane)"),
        (("--target", "maillot"), "638"),
        (("--target", "cardigan"), "474"),
        (("--target", "tabbi"), "'tabby'"),
        (
            ("--target", "1", "--target", "2", "--target", "3", "--target", "4", "--target", "5"),
            "4",
        ),
        (("--method", "saliency"), "class-embedding-projection"),
        (("--device", "cuda:77"), "'cpu'"),
        (("--device", "toaster"), "'cpu'"),
        (("--dtype", "int8"), "float32"),
        (("--batch-size", "0"), "--batch-size"),
        (("--colour",), "--colour"),
    ],
)
def test_bad_argument_is_one_line(
    arguments: tuple[str, ...], words: str, explain: Explain, photos: Path, tmp_path: Path
) -> None:
    assert_refused(explain(photos, *arguments), words, tmp_path / "out")


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_model_that_is_no_supported_vit(
    name: str, explain: Explain, photos: Path, tmp_path: Path
) -> None:
    """Refused for what it is, before any weights are fetched or read."""
    for weights in (True, False):
        result = explain(photos, model=name, weights=weights)
        assert_refused(result, "Vision Transformer", tmp_path / "out")


def test_model_without_classifier(explain: Explain, photos: Path, tmp_path: Path) -> None:
    result = explain(photos, model="vit_small_patch14_dinov2", weights=False)
    assert_refused(result, "has no classifier", tmp_path / "out")


def test_unknown_model(explain: Explain, photos: Path, tmp_path: Path) -> None:
    result = explain(photos, model="vit_bse_patch16_224")
    assert_refused(result, "'vit_base_patch16_224'", tmp_path / "out")


def test_download_that_fails(
    explain: Explain, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool, **arguments: Any) -> Any:
        if pretrained:
            raise urllib.error.URLError("no route to host")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    assert_refused(explain(photos, weights=False), "--checkpoint", tmp_path / "out")


def test_paper_model_that_needs_a_file(explain: Explain, photos: Path, tmp_path: Path) -> None:
    result = explain(photos, model="vit_cifar_16", weights=False)
    assert_refused(result, "CIFAR-100", tmp_path / "out")


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickle", "shapes"])
def test_bad_checkpoint(
    kind: str, explain: Explain, photos: Path, tmp_path: Path, checkpoint: Path
) -> None:
    path = tmp_path / "b.pt"
    if kind == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:5000])
    elif kind == "pickle":
        torch.save({"weights": Path("x")}, path)
    elif kind == "shapes":
        torch.save(timm.create_model(MODEL, embed_dim=32).state_dict(), path)
    words = {
        "missing": "does not exist",
        "truncated": "truncated",
        "pickle": "not executed",
        "shapes": "32 in the file and",
    }[kind]
    result = explain(photos, "--checkpoint", path, weights=False)
    assert_refused(result, words, tmp_path / "out")


def test_output_that_is_a_file(explain: Explain, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    result = explain(photos)
    assert result.exit_code == 2
    assert "choose another with --output" in result.output
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to the administrator")
def test_output_that_is_closed(explain: Explain, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    result = explain(photos)
    assert result.exit_code == 2
    assert "choose another with --output" in result.output


def test_disk_that_fills_up_leaves_nothing_half_written(
    explain: Explain, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".npz" in path.name:
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = explain(photos / "one.png")
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert files(tmp_path / "out") == set()


def test_bad_images_do_not_stop_the_others(explain: Explain, photos: Path, tmp_path: Path) -> None:
    (photos / "empty.png").touch()
    content = (photos / "one.png").read_bytes()
    (photos / "cut.png").write_bytes(content[: len(content) // 2])
    result = explain(photos, photos / "nowhere.png", "--batch-size", "2")
    assert result.exit_code == 2
    lines = errors(result)
    assert len(lines) == 3
    for name, words in (("nowhere", "does not exist"), ("empty", "is empty"), ("cut", "truncated")):
        assert sum(f"{name}.png" in line and words in line for line in lines) == 1
    assert {path for path in files(tmp_path / "out") if path.endswith(".png")} == {
        "one.png",
        "two.png",
        "three.png",
    }


def test_no_image_that_can_be_read(explain: Explain, tmp_path: Path) -> None:
    assert_refused(explain(tmp_path / "nowhere.png"), "does not exist", tmp_path / "out")
    (tmp_path / "folder").mkdir()
    assert_refused(explain(tmp_path / "folder"), "holds no image", tmp_path / "out")


def test_unusual_images_are_simply_read(explain: Explain, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = Image.new("RGB", (40, 30), (200, 100, 50))
    for mode, suffix in [("L", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg")]:
        photo.convert(mode).save(folder / f"{mode}.{suffix}")
    result = explain(folder, "--method", "class-embedding-projection")
    assert result.exit_code == 0, result.output
    assert len(files(tmp_path / "out")) == 12


@pytest.mark.parametrize("device", ["cuda:77", "toaster", "meta", "meta:0", "cuda"])
@pytest.mark.parametrize("command", ["explain", "maps", "study"])
def test_devices_that_are_not_there_are_refused_by_every_command(
    command: str, device: str, photos: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one")
    words = {
        "explain": ["explain", str(photos)],
        "maps": ["maps", "--data", str(photos)],
        "study": ["study", "fourier", "--model", "demo_vit", "--data", str(photos)],
    }[command]
    output = tmp_path / "out"
    result = CliRunner().invoke(cli, [*words, "--output", str(output), "--device", device])
    assert result.exit_code == 2, result.output
    assert "give 'cpu'" in result.output or "give cpu" in result.output
    assert not output.exists()
