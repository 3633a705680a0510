"""Fine-tuned weights, folders, zero-shot classifiers and models given in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import Explain
from pages import unpacked
from PIL import Image
from torch import Tensor, nn

from captum_classemb import PatchImportance, zero_shot
from captum_classemb.data import Preprocess
from captum_classemb.errors import ClassEmbError, InputError
from captum_classemb.explain import Options, Run, explore
from captum_classemb.explain.subject import Texts

NAME = "test_vit"
METHOD = "patch-importance"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "photo.json").read_text())
    return found


def maps(folder: Path) -> Tensor:
    with np.load(folder / "photo.npz") as file:
        return torch.from_numpy(file[METHOD])


def built(**options: Any) -> Any:
    torch.manual_seed(3)
    return timm.create_model(NAME, **options).eval()


def test_a_fine_tuned_file_says_its_sizes(explain: Explain, photo: Path, tmp_path: Path) -> None:
    model = built(num_classes=3, in_chans=1, img_size=96)
    weights, names = tmp_path / "best.ckpt", tmp_path / "names.txt"
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.zeros(2)}, "epoch": 4}, weights)
    names.write_text("cat\ndog\nbird\n")
    result = explain(
        photo, "--checkpoint", weights, "--class-names", names, "--target", "dog",
        "--method", METHOD, model=NAME, weights=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = record(tmp_path / "out")
    assert found["preprocess"]["input_size"] == [1, 96, 96]
    assert found["targets"][0]["name"] == "dog" and found["model"]["classes"] == 3
    transform = Preprocess.of_model(model)
    pixels = transform(Image.open(photo))[0][None]
    assert pixels.shape == (1, 1, 96, 96)
    expected = PatchImportance(model).attribute_classes(pixels, [1])[0]
    assert torch.allclose(maps(tmp_path / "out"), expected, rtol=1e-3, atol=1e-7)


def test_a_headless_file_is_refused(explain: Explain, photo: Path, tmp_path: Path) -> None:
    torch.save(built(num_classes=0).state_dict(), tmp_path / "a.pt")
    result = explain(photo, "--checkpoint", tmp_path / "a.pt", model=NAME, weights=False)
    assert result.exit_code == 2 and "has no classifier" in result.output


def test_text_features_make_a_classifier(explain: Explain, photo: Path, tmp_path: Path) -> None:
    model = built(num_classes=24)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    text = np.random.default_rng(1).standard_normal((3, 24))
    features = tmp_path / "text.npz"
    np.savez(features, text=text, names=["cat", "dog", "bird"], scale=20.0)
    result = explain(
        photo, "--checkpoint", tmp_path / "a.pt", "--text-features", features,
        "--target", "bird", "--method", METHOD, model=NAME, weights=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = record(tmp_path / "out")
    assert found["zero_shot"]["classes"] == ["cat", "dog", "bird"]
    scores = zero_shot(model, ["a", "b", "c"], features=text.astype("float32"), scale=20.0)
    pixels = Preprocess.of_model(model)(Image.open(photo))[0][None]
    expected = PatchImportance(scores).attribute_classes(pixels, [2])[0]
    assert torch.allclose(maps(tmp_path / "out"), expected, rtol=1e-3, atol=1e-7)


def test_open_clip_by_its_own_tokenizer(
    explain: Explain, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")
    options = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 1}
    small = open_clip.CLIP(24, options, {"width": 32, "heads": 2, "layers": 1}).eval()
    open_clip.model.set_model_preprocess_cfg(
        small, {"size": 32, "mean": (0.4,) * 3, "std": (0.2,) * 3}
    )
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: small)
    texts = tmp_path / "classes.txt"
    texts.write_text("a bird\n")
    result = explain(
        photo, "--checkpoint", "openai", "--class", "a cat", "--class", "a dog", "--classes", texts,
        "--template", "{}.", "--method", METHOD, model="open_clip:ViT-B-16", weights=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    bare = explain(photo, "--checkpoint", "openai", model="open_clip:ViT-B-16", weights=False)
    assert bare.exit_code == 2 and "name the classes with --class" in bare.output
    found = record(tmp_path / "out")
    assert found["zero_shot"] == {"classes": ["a cat", "a dog", "a bird"], "templates": ["{}."]}
    assert found["preprocess"]["mean"] == [0.4] * 3
    assert found["model"]["weights"] == {"source": "open_clip", "tag": "openai"}
    model = zero_shot(small, ["a cat", "a dog", "a bird"], templates=["{}."])
    pixels = Preprocess.of_model(model)(Image.open(photo))[0][None]
    best = int(model(pixels).argmax())
    assert found["targets"][0]["index"] == best
    expected = PatchImportance(model).attribute_classes(pixels, [best])[0]
    assert torch.allclose(maps(tmp_path / "out"), expected, rtol=1e-3, atol=1e-7)


# -- In Python


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Normalised(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net((x - 0.5) / 0.5)
        return y


@pytest.mark.parametrize(
    "wrap", [Wrapper, nn.DataParallel, lambda m: nn.Sequential(nn.Identity(), m)]
)
@pytest.mark.parametrize("options", [{"img_size": 96}, {"in_chans": 1, "num_classes": 4}])
def test_run_and_page_take_what_the_methods_take(
    wrap: Any, options: dict[str, Any], photo: Path, tmp_path: Path
) -> None:
    model = built(**options)
    run = Run(Options([photo], model=wrap(model), methods=[METHOD], output=tmp_path / "out"))
    (outcome,) = run
    assert outcome.error is None
    transform = Preprocess.of_model(model)
    assert run.preprocess == transform and transform.size[0] == options.get("img_size", 160)
    pixels = transform(Image.open(photo))[0][None]
    best = int(model(pixels).argmax())
    expected = PatchImportance(model).attribute_classes(pixels, [best])[0]
    assert torch.allclose(maps(tmp_path / "out"), expected, rtol=1e-3, atol=1e-7)
    contents, _ = unpacked(explore(wrap(model), photo))
    assert f"The model reads the image {transform}." in contents["notes"]


def test_images_of_a_model_that_normalises_them_itself_are_asked_for(
    photo: Path, tmp_path: Path
) -> None:
    model, folder = Normalised(built()), tmp_path / "out"
    with pytest.raises(InputError, match="Preprocess with size, mean and std"):
        Run(Options([photo], model=model, output=folder))
    plain = Preprocess((160, 160), mean=(0.0,) * 3, std=(1.0,) * 3)
    (outcome,) = Run(Options([photo], model=model, output=folder, preprocess=plain))
    assert outcome.error is None and record(folder)["preprocess"]["std"] == [1.0] * 3


def test_hugging_face_in_memory(photo: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=48, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"}
    )
    model = transformers.ViTForImageClassification(config).eval()
    page = explore(model, photo, targets=["dog"], preprocess=Preprocess((32, 32)))
    assert unpacked(page)[0]["names"] == ["cat", "dog"]


@pytest.mark.parametrize("options", [{"class_names": ["a", "b"]}, {"texts": Texts(["cat"])}])
def test_names_and_texts_that_do_not_fit(options: Any, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(ClassEmbError, match="names of classes were given|has no text tower"):
        Run(Options([photo], model=built(), output=tmp_path / "out", **options))
